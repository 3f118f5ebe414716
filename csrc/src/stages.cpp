#include "stages.hpp"

#include <algorithm>
#include <cstring>

#include "strips.hpp"

namespace pld {
namespace {

// Which rows of memory the ops of a chain touch: a slot may be touched with one stride only. With two, a row of the one
// buffer lies over several rows of the other, and a thread could overwrite what another has still to read.
class SlotStrides {
 public:
  bool agrees(const pld_op &op, const pld_buffer *buffers) const {
    bool same = true;
    each(op, buffers, [&](int32_t slot, int32_t width) {
      for (const auto &[other, stride] : seen_) same = same && (other != slot || stride == width);
    });
    return same;
  }
  void add(const pld_op &op, const pld_buffer *buffers) {
    each(op, buffers, [&](int32_t slot, int32_t width) { seen_.emplace_back(slot, width); });
  }
  void clear() { seen_.clear(); }

 private:
  template <typename Visit>
  static void each(const pld_op &op, const pld_buffer *buffers, Visit &&visit) {
    for (int32_t buffer : op.in)
      if (buffer >= 0) visit(buffers[buffer].slot, buffers[buffer].width);
    for (int32_t buffer : op.out)
      if (buffer >= 0) visit(buffers[buffer].slot, buffers[buffer].width);
  }
  std::vector<std::pair<int32_t, int32_t>> seen_;
};

// The op at `reader` reads all of the output of the op before it, and nothing else does.
bool reads_alone(const pld_op *ops, const pld_buffer *buffers, const std::vector<int32_t> &reads, int32_t reader) {
  const pld_op &from = ops[reader - 1], &to = ops[reader];
  const int32_t buffer = from.out[0];
  return to.in[0] == buffer && reads[static_cast<size_t>(buffer)] == 1 && from.out_col[0] == 0 && to.in_col[0] == 0 &&
         from.out_width[0] == buffers[buffer].width && to.in_width[0] == buffers[buffer].width;
}

// The stage is done by the gated linear in front of it.
bool is_fused(const std::vector<OpArgs> &args, int32_t index, int stage) {
  const auto at = static_cast<size_t>(index);
  return (at >= 1 && args[at - 1].gated != nullptr) || (at >= 2 && args[at - 2].feeds != nullptr && stage == 0);
}

int64_t chain_rows(int64_t rows, int n_threads) {
  return std::min<int64_t>(std::max<int64_t>((rows + 4 * n_threads - 1) / (4 * n_threads), 1), 32);
}

}  // namespace

void fuse_gates(const pld_op *ops, const pld_buffer *buffers, int32_t n_buffers, std::vector<OpArgs> &args,
                const std::vector<int32_t> &kept) {
  std::vector<int32_t> reads(static_cast<size_t>(n_buffers), 0);
  for (size_t index = 0; index < args.size(); ++index)
    for (int32_t buffer : ops[index].in)
      if (buffer >= 0) ++reads[static_cast<size_t>(buffer)];
  for (int32_t buffer : kept) reads[static_cast<size_t>(buffer)] += 2;
  const auto count = static_cast<int32_t>(args.size());
  for (int32_t index = 0; index + 1 < count; ++index) {
    OpArgs &linear = args[static_cast<size_t>(index)];
    const OpArgs &gate = args[static_cast<size_t>(index) + 1];
    if (ops[index].kind != PLD_OP_LINEAR || ops[index].i[0] != PLD_ACT_NONE ||
        ops[index + 1].kind != PLD_OP_ACT_AND_MUL || gate.out_width[0] % kStrip != 0 ||
        !reads_alone(ops, buffers, reads, index + 1))
      continue;
    // Float32 input is read where it stands: what is written meanwhile must stand elsewhere.
    if (linear.weight[0]->dtype == PLD_F32 && buffers[ops[index].in[0]].slot == buffers[ops[index + 1].out[0]].slot)
      continue;
    linear.gated = &gate;
    if (index + 2 >= count || ops[index + 2].kind != PLD_OP_LINEAR || !reads_alone(ops, buffers, reads, index + 2))
      continue;
    const OpArgs &next = args[static_cast<size_t>(index) + 2];
    const pld_dtype dtype = next.weight[0]->dtype;
    if (dtype != PLD_F32 && dtype != PLD_I8) linear.feeds = &next;
  }
}

std::vector<Step> plan_steps(const pld_op *ops, const pld_buffer *buffers, const std::vector<OpArgs> &args,
                             const KernelTable &table, int32_t begin, int32_t end) {
  std::vector<Step> steps;
  SlotStrides strides;
  for (int32_t index = begin; index < end; ++index) {
    const Kernel &kernel = table.ops[ops[index].kind];
    for (int32_t stage = 0; stage < kernel.n_stages; ++stage) {
      if (is_fused(args, index, stage)) continue;
      if (kernel.is_void != nullptr && kernel.is_void(args[static_cast<size_t>(index)], stage)) continue;
      const bool rowwise = ((kernel.row_stages >> stage) & 1u) != 0;
      const bool joins = rowwise && !steps.empty() && steps.back().chain && ops[index].kind != PLD_OP_GATHER_ROWS &&
                         strides.agrees(ops[index], buffers);
      if (!joins) {
        steps.push_back({{}, rowwise, {}});
        strides.clear();
      }
      steps.back().parts.push_back({index, stage});
      strides.add(ops[index], buffers);
    }
  }
  return steps;
}

void run_steps(const std::vector<Step> &steps, const std::vector<OpArgs> &args, pld_context &context, uint32_t &turn,
               int thread) {
  const int n_threads = context.pool.n_threads();
  std::byte *scratch = context.thread_scratch[static_cast<size_t>(thread)].data();
  for (const Step &step : steps) {
    const OpArgs &first = args[static_cast<size_t>(step.parts[0].op)];
    if (step.chain) {
      const int64_t rows = first.rows, each = chain_rows(rows, n_threads);
      context.turns.take(turn++, (rows + each - 1) / each, thread, [&](int64_t task) {
        for (const Part &part : step.parts) {
          const OpArgs &a = args[static_cast<size_t>(part.op)];
          context.table.ops[a.op->kind].run_rows(a, part.stage, task * each, std::min(rows, (task + 1) * each),
                                                 n_threads);
        }
      });
    } else {
      const int stage = step.parts[0].stage;
      const Kernel &kernel = context.table.ops[first.op->kind];
      const int64_t n_tasks = kernel.n_tasks(first, stage, n_threads);
      context.turns.take(turn++, n_tasks, thread,
                         [&](int64_t task) { kernel.run(first, stage, task, n_threads, scratch); });
    }
    context.pool.barrier().wait();
    if (step.dead.empty()) continue;
    if (thread == 0)
      for (const Span &span : step.dead) std::memset(span.data, kPoison, span.bytes);
    context.pool.barrier().wait();
  }
}

}  // namespace pld
