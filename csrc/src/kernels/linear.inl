// linear: out = act(x W^T + b) over packed panels of 64 columns, [N/64][K/pair][64][pair].
//
// Every output element has one accumulator that takes K in ascending order by one and the same instruction, whatever
// the number of rows in a tile. So neither the shape of a tile nor the cut into tasks changes a bit.
//
// A panel is walked in slabs of K that stay in the first-level cache while all rows of the task pass over them; between
// slabs the accumulators wait in a block on the stack. Meanwhile the next slab is asked for, a few lines at a time, so
// that reading weights from memory and computing overlap at every number of rows.

namespace pld {
namespace PLD_ISA_NS {

constexpr int kPanel = 64;
constexpr int64_t kRowBlock = 192;
constexpr int64_t kSlab = 64;  // K steps: 16 KiB of a panel
constexpr int64_t kChunk = 8;  // K steps between two requests for lines of the next slab
constexpr int64_t kLine = 64;  // bytes

// Vectors of the machine's own width: longer ones would live in memory, not in registers.
#if defined(__AVX512F__)
constexpr int kNative = 16, kWideRows = 6;  // 24 accumulators of 32 registers
#elif defined(__AVX2__)
constexpr int kNative = 8, kWideRows = 3;  // 12 of 16
#else
constexpr int kNative = 4, kWideRows = 3;
#endif
typedef float nf __attribute__((vector_size(kNative * 4)));
typedef uint32_t nu __attribute__((vector_size(kNative * 4)));
constexpr int kWide = 4, kNarrow = 2;  // vectors of a tile; a narrow one has twice the rows

template <typename T>
PLD_INLINE T load_native(const void *p) {
  T v;
  memcpy(&v, p, sizeof v);
  return v;
}
PLD_INLINE nf splat_native(float x) {
#if defined(__AVX512F__)
  return (nf)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (nf)_mm256_set1_ps(x);
#else
  return nf{x, x, x, x};
#endif
}
PLD_INLINE nf fma_native(nf a, nf b, nf c) {
#if defined(__AVX512F__)
  return (nf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
  return (nf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

// Arrays of vectors stay in registers only when every loop over them is unrolled.
#define PLD_FULLY _Pragma("GCC unroll 16")

// The lines of the next slab that are still to be asked for.
struct Ahead {
  const char *base;
  int64_t next, end;  // lines
  int64_t per_chunk;
  int shift;  // log2 of the lines that a K step of the task's columns has: 4, or 2 of a half panel
};

PLD_INLINE void request(Ahead &a) {
  int64_t next = a.next;
  const int64_t stop = next + a.per_chunk < a.end ? next + a.per_chunk : a.end, mask = ((int64_t)1 << a.shift) - 1;
  for (; next < stop; ++next)
    __builtin_prefetch(a.base + (next >> a.shift) * (kPanel * 4) + (next & mask) * kLine, 0, 3);
  a.next = next;
}

// One K step of M rows and V vectors of columns. `x` steps by one word a K step: a float, or a pair of bf16.
struct F32Panels {
  using Word = float;
  static constexpr int64_t words(int64_t k) { return k; }
  template <int M, int V>
  PLD_INLINE void step(const float *x, int64_t x_stride, const float *w, nf acc[M][V]) {
    nf b[V];
    PLD_FULLY
    for (int v = 0; v < V; ++v) b[v] = load_native<nf>(w + v * kNative);
    PLD_FULLY
    for (int m = 0; m < M; ++m) {
      const nf a = splat_native(x[m * x_stride]);
      PLD_FULLY
      for (int v = 0; v < V; ++v) acc[m][v] = fma_native(a, b[v], acc[m][v]);
    }
  }
};

struct BF16Panels {
  using Word = uint32_t;
  static constexpr int64_t words(int64_t k) { return (k + 1) / 2; }
  template <int M, int V>
  PLD_INLINE void step(const uint32_t *x, int64_t x_stride, const uint32_t *w, nf acc[M][V]) {
#if defined(__AVX512BF16__)
    __m512bh b[V];
    PLD_FULLY
    for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(w + v * kNative);
    PLD_FULLY
    for (int m = 0; m < M; ++m) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32((int)x[m * x_stride]);
      PLD_FULLY
      for (int v = 0; v < V; ++v) acc[m][v] = (nf)_mm512_dpbf16_ps((__m512)acc[m][v], a, b[v]);
    }
#else
    nu b[V];
    PLD_FULLY
    for (int v = 0; v < V; ++v) b[v] = load_native<nu>(w + v * kNative);
    PLD_FULLY
    for (int m = 0; m < M; ++m) {
      const nu a = (nu)splat_native(load_native<float>(x + m * x_stride));
      PLD_FULLY
      for (int v = 0; v < V; ++v) {
        acc[m][v] = fma_native((nf)(a << 16), (nf)(b[v] << 16), acc[m][v]);
        acc[m][v] = fma_native((nf)(a & 0xffff0000u), (nf)(b[v] & 0xffff0000u), acc[m][v]);
      }
    }
#endif
  }
};

// A tile of M rows and V vectors over the K steps of a slab. `sums` has a row of a panel's width for each row.
template <typename Panels, int M, int V>
static void linear_tile(const typename Panels::Word *x, int64_t x_stride, const typename Panels::Word *w, int64_t steps,
                        float *sums, Ahead &ahead) {
  nf acc[M][V];
  PLD_FULLY
  for (int m = 0; m < M; ++m) PLD_FULLY
  for (int v = 0; v < V; ++v) acc[m][v] = load_native<nf>(sums + m * kPanel + v * kNative);
  for (int64_t k = 0; k < steps;) {
    request(ahead);
    const int64_t stop = k + kChunk < steps ? k + kChunk : steps;
    for (; k < stop; ++k, w += kPanel) Panels::template step<M, V>(x + k, x_stride, w, acc);
  }
  PLD_FULLY
  for (int m = 0; m < M; ++m) PLD_FULLY
  for (int v = 0; v < V; ++v) memcpy(sums + m * kPanel + v * kNative, &acc[m][v], sizeof(nf));
}

template <typename Panels, int M, int V>
PLD_INLINE void linear_tile_of(int64_t rows, const typename Panels::Word *x, int64_t x_stride,
                               const typename Panels::Word *w, int64_t steps, float *sums, Ahead &ahead) {
  if constexpr (M > 0) {
    if (rows == M)
      linear_tile<Panels, M, V>(x, x_stride, w, steps, sums, ahead);
    else
      linear_tile_of<Panels, M - 1, V>(rows, x, x_stride, w, steps, sums, ahead);
  }
}

// All rows over V vectors of a slab, in tiles of nearly equal height.
template <typename Panels, int MaxM, int V>
static void linear_rows(const typename Panels::Word *x, int64_t x_stride, int64_t rows, const typename Panels::Word *w,
                        int64_t steps, float *sums, Ahead &ahead) {
  const int64_t tiles = (rows + MaxM - 1) / MaxM;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t row = tile * rows / tiles, height = (tile + 1) * rows / tiles - row;
    linear_tile_of<Panels, MaxM, V>(height, x + row * x_stride, x_stride, w, steps, sums + row * kPanel, ahead);
  }
}

template <typename Panels>
static void linear_slab(const typename Panels::Word *x, int64_t x_stride, int64_t rows, const typename Panels::Word *w,
                        int count, int64_t steps, float *sums, Ahead &ahead) {
  const bool wide = count % (kWide * kNative) == 0 && (kNative == 16 || rows <= kWideRows);
  const int columns = (wide ? kWide : kNarrow) * kNative, height = wide ? kWideRows : 2 * kWideRows;
  const int64_t tiles = (rows + height - 1) / height * (count / columns);
  const int64_t chunks = tiles * ((steps + kChunk - 1) / kChunk);
  ahead.per_chunk = (ahead.end + chunks - 1) / chunks;
  for (int c = 0; c < count; c += columns)
    if (wide)
      linear_rows<Panels, kWideRows, kWide>(x, x_stride, rows, w + c, steps, sums + c, ahead);
    else
      linear_rows<Panels, 2 * kWideRows, kNarrow>(x, x_stride, rows, w + c, steps, sums + c, ahead);
}

// Where results go, and what is done to them on the way.
struct Epilogue {
  float *out;
  int64_t stride, width;  // of the output
  const float *bias;
  pld_act act;
};

static Epilogue epilogue_of(const OpArgs &args) {
  return {args.out[0], args.out_stride[0], args.out_width[0],
          args.weight[1] == nullptr ? nullptr : (const float *)args.weight[1]->data, args.op->i[0]};
}

static void finish_rows(const Epilogue &e, int64_t row, int64_t rows, int64_t column, int count, const float *sums) {
  const int64_t left = e.width - column < count ? e.width - column : count;
  for (int64_t m = 0; m < rows; ++m) {
    float *out = e.out + (row + m) * e.stride + column;
    for_lanes(left, [&](int64_t i, int n) {
      vf y = load(sums + m * kPanel + i);
      if (e.bias != nullptr) y = y + load_lanes(e.bias + column + i, n);
      if (e.act != PLD_ACT_NONE) y = activate(y, e.act);
      store_lanes(out + i, y, n);
    });
  }
}

// `rows` rows, at most kRowBlock, times columns [first, first + count) of one panel, which is all of it or a half.
// `behind`: what is read next.
template <typename Panels>
static void panel_sums(const typename Panels::Word *x, int64_t x_stride, int64_t rows, const void *panel, int first,
                       int count, int64_t steps, const void *behind, float *sums) {
  const auto *w = (const typename Panels::Word *)panel + first;
  for (int64_t m = 0; m < rows; ++m) memset(sums + m * kPanel, 0, (size_t)count * sizeof(float));
  for (int64_t k = 0; k < steps; k += kSlab) {
    const int64_t here = steps - k < kSlab ? steps - k : kSlab, left = steps - k - here;
    const int64_t next = left > 0 ? left : steps;
    const int shift = count == kPanel ? 2 : 1;
    Ahead ahead = {(const char *)(left > 0 ? w + (k + here) * kPanel : behind), 0,
                   (next < kSlab ? next : kSlab) << shift, 0, shift};
    linear_slab<Panels>(x + k, x_stride, rows, w + k * kPanel, count, here, sums, ahead);
  }
}

}  // namespace PLD_ISA_NS
}  // namespace pld
