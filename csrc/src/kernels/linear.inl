// linear: out = act(x W^T + b) over packed panels of 64 columns, [N/64][K/pair][64][pair].
//
// Every output element has one accumulator that takes K in ascending order by one and the same instruction, whatever
// the number of rows in a tile. So neither the shape of a tile nor the cut into tasks changes a bit.

namespace pld {
namespace PLD_ISA_NS {

constexpr int kPanel = 64;
constexpr int64_t kRowBlock = 96;

// A tile of M rows and V vectors of columns. `x` steps by one word a K step: a float, or a pair of bf16.
struct F32Panels {
  using Word = float;
  static constexpr int64_t words(int64_t k) { return k; }
  template <int M, int V>
  PLD_INLINE void tile(const float *x, int64_t x_stride, const void *panel, int first, int64_t steps, vf acc[M][V]) {
    const float *w = (const float *)panel + first;
    for (int64_t k = 0; k < steps; ++k, w += kPanel) {
      vf b[V];
      for (int v = 0; v < V; ++v) b[v] = load(w + v * kLanes);
      for (int m = 0; m < M; ++m) {
        vf a = splat(x[m * x_stride + k]);
        for (int v = 0; v < V; ++v) acc[m][v] = fma(a, b[v], acc[m][v]);
      }
    }
  }
};

struct BF16Panels {
  using Word = uint32_t;
  static constexpr int64_t words(int64_t k) { return (k + 1) / 2; }
  template <int M, int V>
  PLD_INLINE void tile(const uint32_t *x, int64_t x_stride, const void *panel, int first, int64_t steps, vf acc[M][V]) {
    const uint32_t *w = (const uint32_t *)panel + first;
    for (int64_t k = 0; k < steps; ++k, w += kPanel) {
#if defined(__AVX512BF16__)
      __m512bh b[V];
      for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(w + v * kLanes);
      for (int m = 0; m < M; ++m) {
        __m512bh a = (__m512bh)_mm512_set1_epi32((int)x[m * x_stride + k]);
        for (int v = 0; v < V; ++v) acc[m][v] = (vf)_mm512_dpbf16_ps((__m512)acc[m][v], a, b[v]);
      }
#else
      vf even[V], odd[V];
      for (int v = 0; v < V; ++v) {
        vu pair;
        memcpy(&pair, w + v * kLanes, sizeof pair);
        even[v] = (vf)(pair << 16);
        odd[v] = (vf)(pair & 0xffff0000u);
      }
      for (int m = 0; m < M; ++m) {
        const uint32_t pair = x[m * x_stride + k], low = pair << 16, high = pair & 0xffff0000u;
        float a0, a1;
        memcpy(&a0, &low, 4);
        memcpy(&a1, &high, 4);
        for (int v = 0; v < V; ++v) acc[m][v] = fma(splat(a1), odd[v], fma(splat(a0), even[v], acc[m][v]));
      }
#endif
    }
  }
};

// Where a tile's results go, and what is done to them on the way.
struct Epilogue {
  float *out;
  int64_t stride, width;  // of the output
  const float *bias;
  pld_act act;
};

template <int M, int V>
PLD_INLINE void finish_tile(const Epilogue &e, int64_t row, int64_t column, const vf acc[M][V]) {
  for (int v = 0; v < V; ++v) {
    const int64_t left = e.width - column - v * kLanes;
    if (left <= 0) return;
    const int n = left < kLanes ? (int)left : kLanes;
    const vf bias = e.bias == nullptr ? vf{} : load_lanes(e.bias + column + v * kLanes, n);
    for (int m = 0; m < M; ++m) {
      vf y = e.bias == nullptr ? acc[m][v] : acc[m][v] + bias;
      if (e.act != PLD_ACT_NONE) y = activate(y, e.act);
      store_lanes(e.out + (row + m) * e.stride + column + v * kLanes, y, n);
    }
  }
}

template <typename Panels, int M, int V>
static void linear_tile(const typename Panels::Word *x, int64_t x_stride, int64_t row, const void *panel, int first,
                        int64_t steps, int64_t column, const Epilogue &e) {
  vf acc[M][V] = {};
  Panels::template tile<M, V>(x + row * x_stride, x_stride, panel, first, steps, acc);
  finish_tile<M, V>(e, row, column + first, acc);
}

// Rows [begin, end) of V vectors of one panel, beginning at column `first` of it.
template <typename Panels, int MaxM, int V>
static void linear_rows(const typename Panels::Word *x, int64_t x_stride, int64_t begin, int64_t end, const void *panel,
                        int first, int64_t steps, int64_t column, const Epilogue &e) {
  int64_t row = begin;
  for (; row + MaxM <= end; row += MaxM) linear_tile<Panels, MaxM, V>(x, x_stride, row, panel, first, steps, column, e);
#define PLD_TAIL(M)                                                                                  \
  if constexpr (M < MaxM) {                                                                          \
    if (end - row == M) linear_tile<Panels, M, V>(x, x_stride, row, panel, first, steps, column, e); \
  }
  PLD_TAIL(1)
  PLD_TAIL(2) PLD_TAIL(3) PLD_TAIL(4) PLD_TAIL(5) PLD_TAIL(6) PLD_TAIL(7) PLD_TAIL(8) PLD_TAIL(9) PLD_TAIL(10)
      PLD_TAIL(11)
#undef PLD_TAIL
}

#if defined(__AVX512F__)
constexpr int kWideRows = 6, kNarrowRows = 12, kWide = 4, kNarrow = 2;  // 24 accumulators of 32 registers
#else
constexpr int kWideRows = 6, kNarrowRows = 6, kWide = 1, kNarrow = 1;  // a vector is two (AVX2) or four registers
#endif

// One task: rows [begin, end) of half a panel or of a whole one.
template <typename Panels>
static void linear_panel(const typename Panels::Word *x, int64_t x_stride, int64_t begin, int64_t end,
                         const void *panel, int first, int count, int64_t steps, int64_t column, const Epilogue &e) {
  if (end - begin > kWideRows) {
    for (int c = first; c < first + count; c += kNarrow * kLanes)
      linear_rows<Panels, kNarrowRows, kNarrow>(x, x_stride, begin, end, panel, c, steps, column, e);
  } else {
    for (int c = first; c < first + count; c += kWide * kLanes)
      linear_rows<Panels, kWideRows, kWide>(x, x_stride, begin, end, panel, c, steps, column, e);
  }
}

// Panels are cut in halves when there are too few whole ones to keep the threads level.
static int linear_halves(const OpArgs &args, int n_threads) {
  const int64_t panels = (args.out_width[0] + kPanel - 1) / kPanel;
  return args.rows > kWideRows && panels < 8 * n_threads ? 2 : 1;
}

static int64_t linear_tasks(const OpArgs &args, int stage, int n_threads) {
  const bool is_bf16 = args.weight[0]->dtype == PLD_BF16;
  if (stage == 0) return is_bf16 ? row_tasks(args, 0, n_threads) : 0;
  const int64_t panels = (args.out_width[0] + kPanel - 1) / kPanel;
  return panels * linear_halves(args, n_threads) * ((args.rows + kRowBlock - 1) / kRowBlock);
}

static void round_row(const OpArgs &args, int64_t row) {
  const int64_t width = args.in_width[0], words = BF16Panels::words(width);
  const float *in = args.in[0] + row * args.in_stride[0];
  uint16_t *out = (uint16_t *)args.scratch + row * words * 2;
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    vh h = to_bf16(load(in + i));
    memcpy(out + i, &h, sizeof h);
  }
  for (; i < width; ++i) out[i] = to_bf16(in[i]);
  if (width % 2) out[width] = 0;
}

static void linear_run(const OpArgs &args, int stage, int64_t task, int n_threads, std::byte *scratch) {
  if (stage == 0) {
    run_rows<round_row>(args, 0, task, n_threads, scratch);
    return;
  }
  const pld_weight &w = *args.weight[0];
  const int halves = linear_halves(args, n_threads);
  const int64_t slices = (args.out_width[0] + kPanel - 1) / kPanel * halves;
  const int64_t begin = task / slices * kRowBlock;  // all columns of a block of rows before the next block
  const int64_t end = begin + kRowBlock < args.rows ? begin + kRowBlock : args.rows;
  const int64_t panel = task % slices / halves;
  const int count = kPanel / halves, first = (int)(task % halves) * count;
  const Epilogue e = {args.out[0], args.out_stride[0], args.out_width[0],
                      args.weight[1] == nullptr ? nullptr : (const float *)args.weight[1]->data, args.op->i[0]};
  if (w.dtype == PLD_F32) {
    const float *data = (const float *)w.data + panel * w.cols * kPanel;
    linear_panel<F32Panels>(args.in[0], args.in_stride[0], begin, end, data, first, count, w.cols, panel * kPanel, e);
  } else {
    const int64_t words = BF16Panels::words(w.cols);
    const uint32_t *data = (const uint32_t *)w.data + panel * words * kPanel;
    linear_panel<BF16Panels>((const uint32_t *)args.scratch, words, begin, end, data, first, count, words,
                             panel * kPanel, e);
  }
}

static size_t linear_scratch(const pld_op &op, const pld_weight *const *weight, int64_t rows) {
  return weight[0]->dtype == PLD_BF16 ? (size_t)(rows * BF16Panels::words(op.in_width[0]) * 4) : 0;
}

static const Kernel linear_kernel = {2, linear_tasks, linear_run, linear_scratch};

}  // namespace PLD_ISA_NS
}  // namespace pld
