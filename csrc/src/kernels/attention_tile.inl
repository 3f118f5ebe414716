// The two products of attention in registers: scores of a tile's positions, and the sum of its weighted values.
//
// In vectors of the machine's own width: a wider vector type would live in memory wherever the machine has no register
// for it. Lanes are independent, so the width changes no bit.

namespace pld {
namespace PLD_ISA_NS {

constexpr int kTile = 64;  // positions
constexpr int kTileGroups = kTile / kLanes;
constexpr int kWordGroupBytes = 64;  // one K word (a float32, or an even and an odd bfloat16) of sixteen positions
// Without this GCC keeps arrays of vectors in memory before and after a loop.
#define PLD_UNROLL _Pragma("GCC unroll 8")

#if defined(__AVX512F__)
typedef vf Native;
constexpr int kMaxPairs = 6;    // (query row, head) pairs in registers at once
constexpr int kMaxVectors = 4;  // times vectors: 24 of 32 registers are accumulators
PLD_INLINE Native native_splat(float x) { return splat(x); }
PLD_INLINE Native native_fma(Native a, Native b, Native c) { return fma(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
typedef float Native __attribute__((vector_size(32)));
constexpr int kMaxPairs = 4;
constexpr int kMaxVectors = 2;
PLD_INLINE Native native_splat(float x) { return (Native)_mm256_set1_ps(x); }
PLD_INLINE Native native_fma(Native a, Native b, Native c) {
  return (Native)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
#else
typedef float Native __attribute__((vector_size(16)));
constexpr int kMaxPairs = 4;
constexpr int kMaxVectors = 2;
PLD_INLINE Native native_splat(float x) { return Native{x, x, x, x}; }
PLD_INLINE Native native_fma(Native a, Native b, Native c) { return a * b + c; }
#endif
constexpr int kNativeLanes = (int)(sizeof(Native) / sizeof(float));
typedef uint32_t NativeBits __attribute__((vector_size(sizeof(Native))));

PLD_INLINE Native native_load(const void *p) {
  Native x;
  memcpy(&x, p, sizeof x);
  return x;
}
PLD_INLINE void native_store(float *p, Native x) { memcpy(p, &x, sizeof x); }

// Two bfloat16, even and odd, as they lie in a word.
PLD_INLINE Native even_of(NativeBits words) { return (Native)(words << 16); }
PLD_INLINE Native odd_of(NativeBits words) { return (Native)(words & 0xffff0000u); }

// acc + the products of pairs: q is one word for all lanes, k a vector of words.
PLD_INLINE Native dot_pairs(Native acc, uint32_t q, NativeBits k) {
#if defined(__AVX512BF16__)
  return (Native)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_set1_epi32((int)q), (__m512bh)k);
#else
  const uint32_t high = q & 0xffff0000u, low = q << 16;
  float even, odd;
  memcpy(&even, &low, 4);
  memcpy(&odd, &high, 4);
  return native_fma(native_splat(odd), odd_of(k), native_fma(native_splat(even), even_of(k), acc));
#endif
}

PLD_INLINE uint32_t load_word(const void *p) {
  uint32_t word;
  memcpy(&word, p, 4);
  return word;
}
PLD_INLINE NativeBits load_bits(const void *p) {
  NativeBits x;
  memcpy(&x, p, sizeof x);
  return x;
}

// scores[j][kNativeLanes v ..] = q_j . k over E ascending, for J pairs and V vectors of positions; keys[v] is the first
// word of a vector's positions, kWordGroupBytes from word to word. Meanwhile the same places of `next` are asked for,
// which lie 1 / 2^next_shift as far apart.
template <bool kBf16, int J, int V>
static void score_block(const uint32_t *q, int64_t q_stride, const char *const *keys, const char *const *next,
                        int next_shift, int64_t words, float *scores) {
  Native acc[J][V];
  const char *k[V], *n[V];
  PLD_UNROLL
  for (int v = 0; v < V; ++v) {
    k[v] = keys[v];
    n[v] = next[v];
    PLD_UNROLL
    for (int j = 0; j < J; ++j) acc[j][v] = Native{};
  }
  for (int64_t w = 0; w < words; ++w) {
    NativeBits key[V];
    PLD_UNROLL
    for (int v = 0; v < V; ++v) {
      key[v] = load_bits(k[v] + w * kWordGroupBytes);
      __builtin_prefetch(n[v] + (w * kWordGroupBytes >> next_shift));
    }
    PLD_UNROLL
    for (int j = 0; j < J; ++j) {
      const uint32_t query = load_word(q + j * q_stride + w);
      float one;
      memcpy(&one, &query, 4);
      PLD_UNROLL
      for (int v = 0; v < V; ++v)
        acc[j][v] =
            kBf16 ? dot_pairs(acc[j][v], query, key[v]) : native_fma(native_splat(one), (Native)key[v], acc[j][v]);
    }
  }
  PLD_UNROLL
  for (int j = 0; j < J; ++j) {
    PLD_UNROLL
    for (int v = 0; v < V; ++v) native_store(scores + j * kTile + v * kNativeLanes, acc[j][v]);
  }
}

// Where a tile's values lie: the unit's V of each group of sixteen positions, and what to ask for meanwhile, which lies
// 1 / 2^next_shift as far apart.
struct ValuePlace {
  const char *groups[kTileGroups], *next[kTileGroups];
  int next_shift;
};

// acc[j][0 .. V vectors) += weights[j] . values over positions [begin, end) ascending, by pairs for bfloat16. Weights
// are words: a float, or a pair of bfloat16; those of positions that a row does not see are 0. What lies outside
// [begin, end) is not looked at: it may be anything.
template <bool kBf16, int J, int V>
static void value_block(const uint32_t *weights, const ValuePlace &place, int64_t offset, int64_t row_bytes, int begin,
                        int end, float *acc, int64_t acc_stride) {
  constexpr int kPerWord = kBf16 ? 2 : 1, kRows = kLanes / kPerWord, kStride = kTile / kPerWord;
  Native a[J][V];
  PLD_UNROLL
  for (int j = 0; j < J; ++j) {
    PLD_UNROLL
    for (int v = 0; v < V; ++v) a[j][v] = native_load(acc + j * acc_stride + v * kNativeLanes);
  }
  const auto step = [&](int row, uint32_t mask) __attribute__((always_inline)) {
    const int64_t at = row % kRows * row_bytes + offset;
    const char *from = place.groups[row / kRows] + at, *next = place.next[row / kRows] + (at >> place.next_shift);
    NativeBits value[V];
    PLD_UNROLL
    for (int v = 0; v < V; ++v) {
      value[v] = load_bits(from + v * (int)sizeof(Native)) & mask;
      if (v * sizeof(Native) % 64 == 0) __builtin_prefetch(next + (v * (int)sizeof(Native) >> place.next_shift));
    }
    PLD_UNROLL
    for (int j = 0; j < J; ++j) {
      const uint32_t weight = load_word(weights + j * kStride + row);
      float one;
      memcpy(&one, &weight, 4);
      PLD_UNROLL
      for (int v = 0; v < V; ++v)
        a[j][v] =
            kBf16 ? dot_pairs(a[j][v], weight, value[v]) : native_fma(native_splat(one), (Native)value[v], a[j][v]);
    }
  };
  int row = begin / kPerWord;
  const int last = end / kPerWord;
  if (kBf16 && begin % 2 != 0) {  // the even half of the first pair is not ours
    step(row, 0xffff0000u);
    ++row;
  }
  for (; row < last; ++row) step(row, 0xffffffffu);
  if (kBf16 && end % 2 != 0 && row == last) step(row, 0x0000ffffu);
  PLD_UNROLL
  for (int j = 0; j < J; ++j) {
    PLD_UNROLL
    for (int v = 0; v < V; ++v) native_store(acc + j * acc_stride + v * kNativeLanes, a[j][v]);
  }
}

typedef void (*ScoreBlock)(const uint32_t *, int64_t, const char *const *, const char *const *, int, int64_t, float *);
typedef void (*ValueBlock)(const uint32_t *, const ValuePlace &, int64_t, int64_t, int, int, float *, int64_t);

// The kernels of one number of pairs, by log2 of the number of vectors.
struct PairKernels {
  ScoreBlock score[3];
  ValueBlock value[3];
};

template <bool kBf16, int J>
constexpr PairKernels pair_kernels() {
#if defined(__AVX512F__)
  return {{score_block<kBf16, J, 1>, score_block<kBf16, J, 2>, score_block<kBf16, J, 4>},
          {value_block<kBf16, J, 1>, value_block<kBf16, J, 2>, value_block<kBf16, J, 4>}};
#else
  return {{score_block<kBf16, J, 1>, score_block<kBf16, J, 2>, nullptr},
          {value_block<kBf16, J, 1>, value_block<kBf16, J, 2>, nullptr}};
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

// Scores of positions [begin, end) of a tile, rounded outwards to vectors, for n pairs. groups[i] holds the keys of
// positions 16 i ...; next[i] is what to ask for meanwhile.
PLD_INLINE void score_tile(bool bf16, int n_pairs, const uint32_t *q, int64_t q_stride, const char *const *groups,
                           const char *const *next, int next_shift, int64_t words, int begin, int end, float *scores) {
  const PairKernels &kernels = kPairKernels[bf16][n_pairs - 1];
  for (int v = begin / kNativeLanes, last = (end + kNativeLanes - 1) / kNativeLanes; v < last;) {
    const int step = vectors_at_once(last - v);
    const char *keys[kMaxVectors], *ahead[kMaxVectors];
    for (int i = 0; i < 1 << step; ++i) {
      const int group = (v + i) * kNativeLanes / kLanes, byte = (v + i) * kNativeLanes % kLanes * (int)sizeof(float);
      keys[i] = groups[group] + byte;
      ahead[i] = next[group] + byte;
    }
    kernels.score[step](q, q_stride, keys, ahead, next_shift, words, scores + v * kNativeLanes);
    v += 1 << step;
  }
}

// acc[j][e] += weights[j] . values[e] over positions [begin, end) ascending, n pairs, e in [0, width).
PLD_INLINE void add_values(bool bf16, int n_pairs, const uint32_t *weights, const ValuePlace &place, int begin, int end,
                           int64_t width, float *acc) {
  if (begin >= end) return;
  const PairKernels &kernels = kPairKernels[bf16][n_pairs - 1];
  const int64_t full = width / kNativeLanes;
  for (int64_t v = 0; v < full;) {
    const int step = vectors_at_once(full - v);
    kernels.value[step](weights, place, v * (int)sizeof(Native), width * 4, begin, end, acc + v * kNativeLanes, width);
    v += 1 << step;
  }
}

}  // namespace PLD_ISA_NS
}  // namespace pld
