// Mixture of experts: route, gate and up with activation, down and sum. Rows are sorted by expert, so that an expert's
// panels are read once for all of its rows; the tiles are linear's, so a row's bits do not depend on who shares its
// experts.

namespace pld {
namespace PLD_ISA_NS {

constexpr int64_t kMoeRows = 96;  // rows of an expert that are gathered at once
constexpr int kMaxRoutedExperts = 512;

struct MoeShape {
  int64_t rows, experts, top_k, d, f;
  bool bf16;
  int64_t x_words, h_words;  // 4-byte words of one input row, of one hidden row
  int64_t block;             // input rows of an expert that a thread's scratch holds; 0: not even one
};

// What the stages share.
struct MoeScratch {
  int32_t *offsets;  // [experts + 1]: the sorted rows of an expert
  int32_t *token;    // [rows * top_k]: whose row a sorted row is
  int32_t *place;    // [rows, top_k]: the sorted row of a choice, in the order of rank
  float *weight;     // [rows, top_k]
  uint32_t *sorted;  // [rows * top_k, x_words]: the sorted input rows; null unless too wide for a thread's scratch
  uint32_t *hidden;  // [rows * top_k, h_words]
  float *y;          // [rows * top_k, d]
};

PLD_INLINE MoeShape moe_shape(const pld_op &op, const pld_weight *const *weight, int64_t rows) {
  MoeShape s;
  s.rows = rows;
  s.experts = op.i[0];
  s.top_k = op.i[1];
  s.d = weight[0]->cols;
  s.f = weight[1]->cols;
  s.bf16 = weight[0]->dtype == PLD_BF16;
  s.x_words = s.bf16 ? s.d / 2 : s.d;
  s.h_words = weight[1]->dtype == PLD_BF16 ? s.f / 2 : s.f;
  s.block = ((int64_t)kThreadScratchBytes - 2 * kMoeRows * kPanel * 4) / (s.x_words * 4);
  s.block = s.block < kMoeRows ? s.block : kMoeRows;
  return s;
}

PLD_INLINE MoeScratch moe_scratch(const OpArgs &args) {
  return {(int32_t *)args.scratch[0], (int32_t *)args.scratch[1],  (int32_t *)args.scratch[2],
          (float *)args.scratch[3],   (uint32_t *)args.scratch[4], (uint32_t *)args.scratch[5],
          (float *)args.scratch[6]};
}

static int moe_regions(const pld_op &op, const pld_weight *const *weight, int64_t rows, ScratchRegion *regions) {
  const MoeShape s = moe_shape(op, weight, rows);
  const size_t choices = (size_t)(rows * s.top_k);
  regions[0] = {((size_t)s.experts + 1) * 4, 0, 2};
  regions[1] = {choices * 4, 0, 1};
  regions[2] = {choices * 4, 0, 2};
  regions[3] = {choices * 4, 0, 2};
  regions[4] = {s.block == 0 ? choices * (size_t)s.x_words * 4 : 0, 0, 1};
  regions[5] = {choices * (size_t)s.h_words * 4, 1, 2};
  regions[6] = {choices * (size_t)s.d * 4, 2, 2};
  return 7;
}

// The chosen experts of one row by rank, and their weights.
static void route_row(const MoeShape &s, const float *logits, bool renormalise, int32_t *chosen, float *weight) {
  float p[kMaxRoutedExperts + kLanes];
  float top = -__builtin_inff();
  bool nan = false;
  for (int64_t e = 0; e < s.experts; ++e) {
    top = logits[e] > top ? logits[e] : top;
    nan = nan || logits[e] != logits[e];
  }
  vf lanes_sum = {};
  for (int64_t e = 0; e < s.experts; e += kLanes) {
    const int n = s.experts - e < kLanes ? (int)(s.experts - e) : kLanes;
    store(p + e, vexp(load_lanes(logits + e, n) - top));
    for (int i = n; i < kLanes; ++i) p[e + i] = 0.0f;
    lanes_sum = lanes_sum + load(p + e);
  }
  float sum = nan ? __builtin_nanf("") : hsum(lanes_sum), kept = 0.0f;  // vexp hides a NaN
  bool taken[kMaxRoutedExperts] = {};
  for (int64_t k = 0; k < s.top_k; ++k) {
    int64_t best = -1;
    for (int64_t e = 0; e < s.experts; ++e)
      if (!taken[e] && (best < 0 || p[e] > p[best])) best = e;
    taken[best] = true;
    chosen[k] = (int32_t)best;
    weight[k] = p[best] / sum;
    kept = kept + weight[k];
  }
  if (renormalise)
    for (int64_t k = 0; k < s.top_k; ++k) weight[k] = weight[k] / kept;
}

// n floats as words of a panel's other operand: the floats, or pairs of bfloat16.
PLD_INLINE void to_words(const float *x, int64_t n, bool bf16, uint32_t *words) {
  for (int64_t i = 0; i < n; i += kLanes) {
    if (bf16) {
      const vh rounded = to_bf16(load(x + i));
      memcpy((uint16_t *)words + i, &rounded, sizeof rounded);
    } else {
      memcpy(words + i, x + i, sizeof(vf));
    }
  }
}

static void route(const OpArgs &args, const MoeShape &s, const MoeScratch &scratch) {
  for (int64_t e = 0; e <= s.experts; ++e) scratch.offsets[e] = 0;
  for (int64_t t = 0; t < s.rows; ++t) {
    int32_t *chosen = scratch.place + t * s.top_k;
    route_row(s, args.in[1] + t * args.in_stride[1], args.op->i[3] == 1, chosen, scratch.weight + t * s.top_k);
    for (int64_t k = 0; k < s.top_k; ++k) ++scratch.offsets[chosen[k] + 1];
  }
  for (int64_t e = 0; e < s.experts; ++e) scratch.offsets[e + 1] += scratch.offsets[e];
  int32_t next[kMaxRoutedExperts];
  memcpy(next, scratch.offsets, (size_t)s.experts * 4);
  for (int64_t i = 0; i < s.rows * s.top_k; ++i) {
    const int32_t row = next[scratch.place[i]]++;
    scratch.place[i] = row;
    scratch.token[row] = (int32_t)(i / s.top_k);
    if (s.block == 0)
      to_words(args.in[0] + i / s.top_k * args.in_stride[0], s.d, s.bf16, scratch.sorted + row * s.x_words);
  }
}

// Rows of x times one panel of a weight, 64 columns, to `out`.
PLD_INLINE void moe_panel(const pld_weight &w, const uint32_t *x, int64_t x_words, int64_t rows, int64_t panel,
                          pld_act act, float *out, int64_t stride) {
  const char *data = (const char *)w.data + panel * x_words * kPanel * 4;
  const void *behind = data + x_words * kPanel * 4;
  alignas(64) float sums[kRowBlock * kPanel];
  for (int64_t row = 0; row < rows; row += kRowBlock) {
    const int64_t n = rows - row < kRowBlock ? rows - row : kRowBlock;
    if (w.dtype == PLD_F32)
      panel_sums<F32Panels>((const float *)x + row * x_words, x_words, n, data, 0, kPanel, x_words, behind, sums);
    else
      panel_sums<BF16Panels>(x + row * x_words, x_words, n, data, 0, kPanel, x_words, behind, sums);
    finish_rows({out, stride, kPanel, nullptr, act}, row, n, 0, kPanel, sums);
  }
}

static void gate_and_up(const OpArgs &args, const MoeShape &s, const MoeScratch &scratch, int64_t task, char *memory) {
  const int64_t panels = s.f / kPanel, expert = task / panels, panel = task % panels;
  const bool h_bf16 = args.weight[1]->dtype == PLD_BF16;
  float *gate = (float *)memory, *up = gate + kMoeRows * kPanel;
  const int64_t block = s.block > 0 ? s.block : kMoeRows;
  for (int64_t row = scratch.offsets[expert]; row < scratch.offsets[expert + 1]; row += block) {
    const int64_t left = scratch.offsets[expert + 1] - row, n = left < block ? left : block;
    uint32_t *x = s.block > 0 ? (uint32_t *)(up + kMoeRows * kPanel) : scratch.sorted + row * s.x_words;
    for (int64_t i = 0; i < n && s.block > 0; ++i)
      to_words(args.in[0] + scratch.token[row + i] * args.in_stride[0], s.d, s.bf16, x + i * s.x_words);
    moe_panel(*args.weight[0], x, s.x_words, n, expert * 2 * panels + panel, args.op->i[2], gate, kPanel);
    moe_panel(*args.weight[0], x, s.x_words, n, expert * 2 * panels + panels + panel, PLD_ACT_NONE, up, kPanel);
    for (int64_t i = 0; i < n; ++i) {
      float *line = gate + i * kPanel;
      for (int c = 0; c < kPanel; c += kLanes) store(line + c, load(line + c) * load(up + i * kPanel + c));
      to_words(line, kPanel, h_bf16, scratch.hidden + (row + i) * s.h_words + panel * kPanel / (h_bf16 ? 2 : 1));
    }
  }
}

static void down_and_sum(const OpArgs &args, const MoeShape &s, const MoeScratch &scratch, int64_t panel) {
  for (int64_t expert = 0; expert < s.experts; ++expert) {
    const int64_t first = scratch.offsets[expert], n = scratch.offsets[expert + 1] - first;
    if (n > 0)
      moe_panel(*args.weight[1], scratch.hidden + first * s.h_words, s.h_words, n, expert * (s.d / kPanel) + panel,
                PLD_ACT_NONE, scratch.y + first * s.d + panel * kPanel, s.d);
  }
  for (int64_t t = 0; t < s.rows; ++t) {
    float *out = args.out[0] + t * args.out_stride[0] + panel * kPanel;
    for (int c = 0; c < kPanel; c += kLanes) {
      vf sum = {};
      for (int64_t k = 0; k < s.top_k; ++k)
        sum = fma(splat(scratch.weight[t * s.top_k + k]),
                  load(scratch.y + scratch.place[t * s.top_k + k] * s.d + panel * kPanel + c), sum);
      store(out + c, sum);
    }
  }
}

static int64_t moe_tasks(const OpArgs &args, int stage, int) {
  const MoeShape s = moe_shape(*args.op, args.weight, args.rows);
  return stage == 0 ? 1 : stage == 1 ? s.experts * (s.f / kPanel) : s.d / kPanel;
}

static void run_moe(const OpArgs &args, int stage, int64_t task, int, std::byte *thread_scratch) {
  const MoeShape s = moe_shape(*args.op, args.weight, args.rows);
  const MoeScratch scratch = moe_scratch(args);
  if (stage == 0)
    route(args, s, scratch);
  else if (stage == 1)
    gate_and_up(args, s, scratch, task, (char *)thread_scratch);
  else
    down_and_sum(args, s, scratch, task);
}

static const Kernel moe_kernel = {3, moe_tasks, run_moe, moe_regions, 0, nullptr, nullptr};

}  // namespace PLD_ISA_NS
}  // namespace pld
