// Kernels whose rows are computed one by one: cut into tasks of a few rows.

namespace pld {
namespace PLD_ISA_NS {

static int64_t rows_per_task(const OpArgs &args, int n_threads) {
  int64_t rows = (args.rows + 4 * n_threads - 1) / (4 * n_threads);
  return rows < 1 ? 1 : rows > 32 ? 32 : rows;
}
static int64_t row_tasks(const OpArgs &args, int, int n_threads) {
  int64_t rows = rows_per_task(args, n_threads);
  return (args.rows + rows - 1) / rows;
}

template <void (*Row)(const OpArgs &args, int64_t row)>
static void each_row(const OpArgs &args, int, int64_t begin, int64_t end, int) {
  for (int64_t row = begin; row < end; ++row) Row(args, row);
}
template <void (*Row)(const OpArgs &args, int64_t row)>
static void run_rows(const OpArgs &args, int, int64_t task, int n_threads, std::byte *) {
  int64_t rows = rows_per_task(args, n_threads);
  each_row<Row>(args, 0, task * rows, (task + 1) * rows < args.rows ? (task + 1) * rows : args.rows, n_threads);
}

#define PLD_ROW_KERNEL(name) \
  static const Kernel name##_kernel = {1, row_tasks, run_rows<name##_row>, nullptr, 1, each_row<name##_row>, nullptr}

// f(first column, lanes) for a row of `width`, sixteen columns at a time; the last may have fewer.
template <typename Function>
PLD_INLINE void for_lanes(int64_t width, Function &&f) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) f(i, kLanes);
  if (i < width) f(i, (int)(width - i));
}
PLD_INLINE vf load_lanes(const float *p, int n) { return n == kLanes ? load(p) : load_n(p, n); }
PLD_INLINE void store_lanes(float *p, vf v, int n) {
  if (n == kLanes)
    store(p, v);
  else
    store_n(p, v, n);
}

PLD_INLINE vf tanh_of(vf x) { return 1.0f - 2.0f / (vexp(x + x) + 1.0f); }

static vf erf_of(vf x) {
  float a[kLanes];
  store(a, x);
  for (int i = 0; i < kLanes; ++i) a[i] = erff(a[i]);
  return load(a);
}

PLD_INLINE vf activate(vf x, pld_act act) {
  switch (act) {
    case PLD_ACT_SILU:
      return x / (1.0f + vexp(-x));
    case PLD_ACT_GELU:
      return 0.5f * x * (1.0f + erf_of(x * 0.70710678118654752f));
    case PLD_ACT_GELU_TANH:
      return 0.5f * x * (1.0f + tanh_of(0.79788456080286536f * fma(x * x * x, splat(0.044715f), x)));
    case PLD_ACT_RELU:
      return select(x < 0.0f, vf{}, x);
    default:
      return x;
  }
}

}  // namespace PLD_ISA_NS
}  // namespace pld
