// The two products of attention in registers: scores of a tile's positions, and the sum of its weighted values.
//
// In vectors of the machine's own width: a wider vector type would live in memory wherever the machine has no register
// for it. Lanes are independent, so the width changes no bit.

namespace pld {
namespace PLD_ISA_NS {

constexpr int kTile = 64;            // positions
constexpr int kWordGroupBytes = 64;  // one K word (a float32, or an even and an odd bfloat16) of sixteen positions
// Without this GCC keeps arrays of vectors in memory before and after a loop.
#define PLD_UNROLL _Pragma("GCC unroll 8")

#if defined(__AVX512F__)
typedef vf Native;
constexpr int kMaxPairs = 6;    // (query row, head) pairs in registers at once
constexpr int kMaxVectors = 4;  // times vectors: 24 of 32 registers are accumulators
PLD_INLINE Native native_splat(float x) { return splat(x); }
PLD_INLINE Native native_fma(Native a, Native b, Native c) { return fma(a, b, c); }
PLD_INLINE Native widen_bf16(const char *p) {
  return (Native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}
#elif defined(__AVX2__) && defined(__FMA__)
typedef float Native __attribute__((vector_size(32)));
constexpr int kMaxPairs = 4;
constexpr int kMaxVectors = 2;
PLD_INLINE Native native_splat(float x) { return (Native)_mm256_set1_ps(x); }
PLD_INLINE Native native_fma(Native a, Native b, Native c) {
  return (Native)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
PLD_INLINE Native widen_bf16(const char *p) {
  return (Native)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}
#else
typedef float Native __attribute__((vector_size(16)));
constexpr int kMaxPairs = 4;
constexpr int kMaxVectors = 2;
PLD_INLINE Native native_splat(float x) { return Native{x, x, x, x}; }
PLD_INLINE Native native_fma(Native a, Native b, Native c) { return a * b + c; }
PLD_INLINE Native widen_bf16(const char *p) {
  typedef uint16_t Half __attribute__((vector_size(8)));
  typedef uint32_t Whole __attribute__((vector_size(16)));
  Half half;
  memcpy(&half, p, sizeof half);
  return (Native)(__builtin_convertvector(half, Whole) << 16);
}
#endif
constexpr int kNativeLanes = (int)(sizeof(Native) / sizeof(float));
typedef uint32_t NativeBits __attribute__((vector_size(sizeof(Native))));

PLD_INLINE Native native_load(const void *p) {
  Native x;
  memcpy(&x, p, sizeof x);
  return x;
}
PLD_INLINE void native_store(float *p, Native x) { memcpy(p, &x, sizeof x); }

// scores[j][kNativeLanes v ..] = q_j . k over E ascending, for J pairs and V vectors of positions; keys[v] is the first
// word of a vector's positions, kWordGroupBytes from word to word.
template <bool kBf16, int J, int V>
static void score_block(const float *q, int64_t q_stride, const char *const *keys, int64_t words, float *scores) {
  Native acc[J][V];
  const char *k[V];
  PLD_UNROLL
  for (int v = 0; v < V; ++v) {
    k[v] = keys[v];
    PLD_UNROLL
    for (int j = 0; j < J; ++j) acc[j][v] = Native{};
  }
  for (int64_t w = 0; w < words; ++w) {
#if defined(__AVX512BF16__)
    if (kBf16) {
      __m512bh key[V];
      PLD_UNROLL
      for (int v = 0; v < V; ++v) key[v] = (__m512bh)_mm512_loadu_si512(k[v] + w * kWordGroupBytes);
      PLD_UNROLL
      for (int j = 0; j < J; ++j) {
        int32_t pair;
        memcpy(&pair, q + j * q_stride + w, 4);
        __m512bh query = (__m512bh)_mm512_set1_epi32(pair);
        PLD_UNROLL
        for (int v = 0; v < V; ++v) acc[j][v] = (Native)_mm512_dpbf16_ps((__m512)acc[j][v], key[v], query);
      }
      continue;
    }
#endif
    Native key[V];
    PLD_UNROLL
    for (int v = 0; v < V; ++v) key[v] = native_load(k[v] + w * kWordGroupBytes);
    if (kBf16) {
      Native part[V];
      PLD_UNROLL
      for (int v = 0; v < V; ++v) part[v] = (Native)((NativeBits)key[v] << 16);  // even
      PLD_UNROLL
      for (int j = 0; j < J; ++j) {
        Native query = native_splat(q[j * q_stride + 2 * w]);
        PLD_UNROLL
        for (int v = 0; v < V; ++v) acc[j][v] = native_fma(query, part[v], acc[j][v]);
      }
      PLD_UNROLL
      for (int v = 0; v < V; ++v) part[v] = (Native)((NativeBits)key[v] & 0xffff0000u);  // odd
      PLD_UNROLL
      for (int j = 0; j < J; ++j) {
        Native query = native_splat(q[j * q_stride + 2 * w + 1]);
        PLD_UNROLL
        for (int v = 0; v < V; ++v) acc[j][v] = native_fma(query, part[v], acc[j][v]);
      }
    } else {
      PLD_UNROLL
      for (int j = 0; j < J; ++j) {
        Native query = native_splat(q[j * q_stride + w]);
        PLD_UNROLL
        for (int v = 0; v < V; ++v) acc[j][v] = native_fma(query, key[v], acc[j][v]);
      }
    }
  }
  PLD_UNROLL
  for (int j = 0; j < J; ++j) {
    PLD_UNROLL
    for (int v = 0; v < V; ++v) native_store(scores + j * kTile + v * kNativeLanes, acc[j][v]);
  }
}

// n values of a V row, the others 0; nothing behind the n-th is read.
template <bool kBf16>
PLD_INLINE Native load_values(const char *row, int n) {
  if (n == kNativeLanes) return kBf16 ? widen_bf16(row) : native_load(row);
  char padded[sizeof(Native)] = {};
  memcpy(padded, row, (size_t)n * (kBf16 ? 2 : 4));
  return kBf16 ? widen_bf16(padded) : native_load(padded);
}

// acc[j][0 .. V vectors) += weights[j][p] * value[p] for p in [begin, end) ascending. With kTail (V = 1) only n lanes
// exist.
template <bool kBf16, int J, int V, bool kTail>
static void value_block(const float *weights, const char *const *rows, int64_t offset, int begin, int end, float *acc,
                        int64_t acc_stride, int n) {
  Native a[J][V];
  PLD_UNROLL
  for (int j = 0; j < J; ++j) {
    PLD_UNROLL
    for (int v = 0; v < V; ++v) a[j][v] = native_load(acc + j * acc_stride + v * kNativeLanes);
  }
  for (int p = begin; p < end; ++p) {
    const char *row = rows[p] + offset;
    Native value[V];
    PLD_UNROLL
    for (int v = 0; v < V; ++v)
      value[v] = load_values<kBf16>(row + v * kNativeLanes * (kBf16 ? 2 : 4), kTail ? n : kNativeLanes);
    PLD_UNROLL
    for (int j = 0; j < J; ++j) {
      Native weight = native_splat(weights[j * kTile + p]);
      PLD_UNROLL
      for (int v = 0; v < V; ++v) a[j][v] = native_fma(weight, value[v], a[j][v]);
    }
  }
  PLD_UNROLL
  for (int j = 0; j < J; ++j) {
    PLD_UNROLL
    for (int v = 0; v < V; ++v) native_store(acc + j * acc_stride + v * kNativeLanes, a[j][v]);
  }
}

typedef void (*ScoreBlock)(const float *, int64_t, const char *const *, int64_t, float *);
typedef void (*ValueBlock)(const float *, const char *const *, int64_t, int, int, float *, int64_t, int);

// The kernels of one number of pairs, by log2 of the number of vectors.
struct PairKernels {
  ScoreBlock score[3];
  ValueBlock value[3];
  ValueBlock value_tail;
};

template <bool kBf16, int J>
constexpr PairKernels pair_kernels() {
#if defined(__AVX512F__)
  return {{score_block<kBf16, J, 1>, score_block<kBf16, J, 2>, score_block<kBf16, J, 4>},
          {value_block<kBf16, J, 1, false>, value_block<kBf16, J, 2, false>, value_block<kBf16, J, 4, false>},
          value_block<kBf16, J, 1, true>};
#else
  return {{score_block<kBf16, J, 1>, score_block<kBf16, J, 2>, nullptr},
          {value_block<kBf16, J, 1, false>, value_block<kBf16, J, 2, false>, nullptr},
          value_block<kBf16, J, 1, true>};
#endif
}

// By dtype and number of pairs - 1.
static const PairKernels kPairKernels[2][kMaxPairs] = {
    {pair_kernels<false, 1>(), pair_kernels<false, 2>(), pair_kernels<false, 3>(), pair_kernels<false, 4>(),
#if defined(__AVX512F__)
     pair_kernels<false, 5>(), pair_kernels<false, 6>()
#endif
    },
    {pair_kernels<true, 1>(), pair_kernels<true, 2>(), pair_kernels<true, 3>(), pair_kernels<true, 4>(),
#if defined(__AVX512F__)
     pair_kernels<true, 5>(), pair_kernels<true, 6>()
#endif
    }};

// The greatest power of two of vectors that fits, as its exponent.
PLD_INLINE int vectors_at_once(int64_t n) {
  int step = 0;
  while ((2 << step) <= kMaxVectors && (2 << step) <= n) ++step;
  return step;
}

// Scores of positions [begin, end) of a tile, rounded outwards to vectors, for n pairs. groups[i] holds positions 16 i
// ...
PLD_INLINE void score_tile(bool bf16, int n_pairs, const float *q, int64_t q_stride, const char *const *groups,
                           int64_t words, int begin, int end, float *scores) {
  const PairKernels &kernels = kPairKernels[bf16][n_pairs - 1];
  for (int v = begin / kNativeLanes, last = (end + kNativeLanes - 1) / kNativeLanes; v < last;) {
    const int step = vectors_at_once(last - v);
    const char *keys[kMaxVectors];
    for (int i = 0; i < 1 << step; ++i)
      keys[i] = groups[(v + i) * kNativeLanes / kLanes] + (v + i) * kNativeLanes % kLanes * (int)sizeof(float);
    kernels.score[step](q, q_stride, keys, words, scores + v * kNativeLanes);
    v += 1 << step;
  }
}

// acc[j][e] += weights[j][p] * value[p][e] for p in [begin, end) ascending, n pairs, e in [0, width).
PLD_INLINE void add_values(bool bf16, int n_pairs, const float *weights, const char *const *rows, int begin, int end,
                           int64_t width, float *acc, int64_t acc_stride) {
  if (begin >= end) return;
  const PairKernels &kernels = kPairKernels[bf16][n_pairs - 1];
  const int64_t value_bytes = bf16 ? 2 : 4, full = width / kNativeLanes;
  const int tail = (int)(width % kNativeLanes);
  for (int64_t v = 0; v < full;) {
    const int step = vectors_at_once(full - v);
    kernels.value[step](weights, rows, v * kNativeLanes * value_bytes, begin, end, acc + v * kNativeLanes, acc_stride,
                        kNativeLanes);
    v += 1 << step;
  }
  if (tail != 0)
    kernels.value_tail(weights, rows, full * kNativeLanes * value_bytes, begin, end, acc + full * kNativeLanes,
                       acc_stride, tail);
}

}  // namespace PLD_ISA_NS
}  // namespace pld
