// The linear op: its input rounded to what the weight's type multiplies with (stage 0), then the product (stage 1).

namespace pld {
namespace PLD_ISA_NS {

// Panels are cut in halves when there are too few whole ones to keep the threads level.
static int linear_halves(const OpArgs &args, int n_threads) {
  const int64_t panels = (args.out_width[0] + kPanel - 1) / kPanel;
  return n_threads > 1 && panels < 8 * n_threads ? 2 : 1;
}
static int64_t linear_row_blocks(const OpArgs &args) { return (args.rows + kRowBlock - 1) / kRowBlock; }

static int64_t linear_tasks(const OpArgs &args, int stage, int n_threads) {
  if (stage == 0) return args.weight[0]->dtype == PLD_F32 ? 0 : row_tasks(args, 0, n_threads);
  if (strip_format(args.weight[0]->dtype) != nullptr) return quantised_tasks(args);
  const int64_t panels = (args.out_width[0] + kPanel - 1) / kPanel;
  return panels * linear_halves(args, n_threads) * linear_row_blocks(args);
}

static void round_row(const OpArgs &args, int64_t row) {
  if (args.weight[0]->dtype != PLD_BF16) return quantise_row(args, row);
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
  if (strip_format(w.dtype) != nullptr) return quantised_run(args, task);
  const int halves = linear_halves(args, n_threads);
  const int64_t slices = (args.out_width[0] + kPanel - 1) / kPanel * halves;
  const int64_t block = task / slices, blocks = linear_row_blocks(args);  // all columns of a block before the next
  const int64_t begin = block * args.rows / blocks, end = (block + 1) * args.rows / blocks;
  const int64_t panel = task % slices / halves;
  const int count = kPanel / halves, first = (int)(task % halves) * count;
  const Epilogue e = epilogue_of(args);
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
  const pld_dtype dtype = weight[0]->dtype;
  if (strip_format(dtype) != nullptr) return (size_t)QuantisedInput(dtype, op.in_width[0]).bytes(rows);
  return dtype == PLD_BF16 ? (size_t)(rows * BF16Panels::words(op.in_width[0]) * 4) : 0;
}

static bool linear_is_void(const OpArgs &args, int stage) { return stage == 0 && args.weight[0]->dtype == PLD_F32; }

static const Kernel linear_kernel = {2, linear_tasks, linear_run, linear_scratch, each_row<round_row>, linear_is_void};

}  // namespace PLD_ISA_NS
}  // namespace pld
