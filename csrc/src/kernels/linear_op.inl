// The linear op: its input rounded to what the weight's type multiplies with (stage 0), then the product (stage 1).
//
// Within a program the product may be gated on the way: then a task owns columns c of the gate and of the up half, and
// what it makes of them goes to the output of act_and_mul, or rounded into the scratch of the linear that reads that.

namespace pld {
namespace PLD_ISA_NS {

static bool is_quantised(const OpArgs &args) { return strip_format(args.weight[0]->dtype) != nullptr; }

// ---- stage 0 -------------------------------------------------------------------------------------------------------

PLD_INLINE void round_values(const float *x, int64_t n, uint16_t *out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vh h = to_bf16(load(x + i));
    memcpy(out + i, &h, sizeof h);
  }
  for (; i < n; ++i) out[i] = to_bf16(x[i]);
}

// Where a row of bfloat16 input begins.
PLD_INLINE uint16_t *rounded_row(const OpArgs &args, int64_t row) {
  return (uint16_t *)args.scratch[0] + row * BF16Panels::words(args.in_width[0]) * 2;
}

static void round_row(const OpArgs &args, int64_t row) {
  if (is_quantised(args)) return quantise_row(args, row);
  const int64_t width = args.in_width[0];
  uint16_t *out = rounded_row(args, row);
  round_values(args.in[0] + row * args.in_stride[0], width, out);
  if (width % 2) out[width] = 0;
}

// ---- stage 1: how the product is cut into tasks --------------------------------------------------------------------

struct LinearCut {
  int64_t slices, columns;  // of the output: tasks across, and columns of each
  int64_t blocks;           // of rows
};

static LinearCut linear_cut(const OpArgs &args, int n_threads) {
  const int64_t width = args.gated != nullptr ? args.gated->out_width[0] : args.out_width[0];
  const int64_t panels = (width + kPanel - 1) / kPanel;
  // Panels are cut in halves when there are too few whole ones to keep the threads level.
  const bool narrow = is_quantised(args) || args.gated != nullptr || (n_threads > 1 && panels < 8 * n_threads);
  LinearCut cut;
  cut.columns = narrow ? kStrip : kPanel;
  cut.slices = (width + cut.columns - 1) / cut.columns;
  const int64_t most = is_quantised(args) ? quantised_block_rows(args.in_width[0]) : kRowBlock;
  cut.blocks = (args.rows + most - 1) / most;
  return cut;
}

static int64_t linear_tasks(const OpArgs &args, int stage, int n_threads) {
  if (stage == 0) return args.weight[0]->dtype == PLD_F32 ? 0 : row_tasks(args, 0, n_threads);
  const LinearCut cut = linear_cut(args, n_threads);
  return cut.slices * cut.blocks;
}

// ---- stage 1: the product ------------------------------------------------------------------------------------------

// Where the columns from `column` on begin in memory.
static const void *columns_of(const pld_weight &w, int64_t column) {
  if (const StripFormat *format = strip_format(w.dtype))
    return (const uint8_t *)w.data + column / kStrip * strip_bytes(*format, w.cols);
  const int64_t words = w.dtype == PLD_F32 ? w.cols : BF16Panels::words(w.cols);
  return (const uint32_t *)w.data + column / kPanel * words * kPanel + column % kPanel;
}

// Rows [begin, end) times columns [column, column + count); `next`: the column that is read after those.
static void product(const OpArgs &args, int64_t begin, int64_t end, int64_t column, int64_t count, int64_t next,
                    float *sums) {
  const pld_weight &w = *args.weight[0];
  const void *behind = columns_of(w, next);
  if (is_quantised(args)) {
    const QuantisedInput layout(w.dtype, args.in_width[0]);
    const QuantisedTarget input(args, layout, begin);
    const QuantisedRows rows = {input.x, layout.row_bytes, input.beside, layout.n_beside, layout.n_groups};
    return strip_sums_of(w.dtype, rows, end - begin, (const uint8_t *)columns_of(w, column), (const uint8_t *)behind,
                         sums);
  }
  const int first = (int)(column % kPanel);
  const void *panel = columns_of(w, column - first);
  if (w.dtype == PLD_F32)
    return panel_sums<F32Panels>(args.in[0] + begin * args.in_stride[0], args.in_stride[0], end - begin, panel, first,
                                 (int)count, w.cols, behind, sums);
  const int64_t words = BF16Panels::words(w.cols);
  panel_sums<BF16Panels>((const uint32_t *)args.scratch[0] + begin * words, words, end - begin, panel, first,
                         (int)count, words, behind, sums);
}

// Gate sums stand in the first half of a row of `sums`, up sums in the second.
static void finish_gated(const OpArgs &args, int64_t begin, int64_t end, int64_t column, const float *sums) {
  const OpArgs &gated = *args.gated;
  const OpArgs *feeds = args.feeds;
  const float *bias = epilogue_of(args).bias;
  const pld_act act = gated.op->i[0];
  const QuantisedInput layout(feeds == nullptr ? PLD_Q8_0 : feeds->weight[0]->dtype, gated.out_width[0]);
  for (int64_t row = begin; row < end; ++row, sums += kPanel) {
    alignas(64) float local[kStrip];
    float *y = feeds == nullptr ? gated.out[0] + row * gated.out_stride[0] + column : local;
    for (int64_t i = 0; i < kStrip; i += kLanes) {
      vf gate = load(sums + i), up = load(sums + kStrip + i);
      if (bias != nullptr) {
        gate = gate + load(bias + column + i);
        up = up + load(bias + gated.out_width[0] + column + i);
      }
      store(y + i, activate(gate, act) * up);
    }
    if (feeds == nullptr) continue;
    if (is_quantised(*feeds))
      quantise_group(y, feeds->weight[0]->dtype, QuantisedTarget(*feeds, layout, row), column / kQuantGroup);
    else
      round_values(y, kStrip, rounded_row(*feeds, row) + column);
  }
}

static void linear_run(const OpArgs &args, int stage, int64_t task, int n_threads, std::byte *scratch) {
  if (stage == 0) {
    run_rows<round_row>(args, 0, task, n_threads, scratch);
    return;
  }
  const LinearCut cut = linear_cut(args, n_threads);
  const int64_t block = task / cut.slices, column = task % cut.slices * cut.columns;  // all columns of a block first
  const int64_t begin = block * args.rows / cut.blocks, end = (block + 1) * args.rows / cut.blocks;
  const int64_t next = column + cut.columns < cut.slices * cut.columns ? column + cut.columns : 0;
  alignas(64) float sums[kRowBlock * kPanel];
  if (args.gated == nullptr) {
    product(args, begin, end, column, cut.columns, next, sums);
    finish_rows(epilogue_of(args), begin, end - begin, column, (int)cut.columns, sums);
    return;
  }
  const int64_t up = args.gated->out_width[0];
  product(args, begin, end, column, cut.columns, up + column, sums);
  product(args, begin, end, up + column, cut.columns, next, sums + kStrip);
  finish_gated(args, begin, end, column, sums);
}

// The rounded input; with quantised weights also what stands beside its groups.
static int linear_regions(const pld_op &op, const pld_weight *const *weight, int64_t rows, ScratchRegion *regions) {
  const pld_dtype dtype = weight[0]->dtype;
  if (dtype == PLD_F32) return 0;
  if (strip_format(dtype) == nullptr) {
    regions[0] = {(size_t)(rows * BF16Panels::words(op.in_width[0]) * 4), 0, 1};
    return 1;
  }
  const QuantisedInput layout(dtype, op.in_width[0]);
  regions[0] = {(size_t)(rows * layout.row_bytes), 0, 1};
  regions[1] = {(size_t)rows * (size_t)layout.n_beside * sizeof(GroupSums), 0, 1};
  return 2;
}

static bool linear_is_void(const OpArgs &args, int stage) { return stage == 0 && args.weight[0]->dtype == PLD_F32; }

static const Kernel linear_kernel = {2, linear_tasks,        linear_run,    linear_regions,
                                     1, each_row<round_row>, linear_is_void};

}  // namespace PLD_ISA_NS
}  // namespace pld
