#include "stages.hpp"

#include <algorithm>

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

int64_t chain_rows(int64_t rows, int n_threads) {
  return std::min<int64_t>(std::max<int64_t>((rows + 4 * n_threads - 1) / (4 * n_threads), 1), 32);
}

}  // namespace

std::vector<Step> plan_steps(const pld_op *ops, const pld_buffer *buffers, const std::vector<OpArgs> &args,
                             const KernelTable &table, int32_t begin, int32_t end) {
  std::vector<Step> steps;
  SlotStrides strides;
  for (int32_t index = begin; index < end; ++index) {
    const Kernel &kernel = table.ops[ops[index].kind];
    for (int32_t stage = 0; stage < kernel.n_stages; ++stage) {
      if (kernel.is_void != nullptr && kernel.is_void(args[static_cast<size_t>(index)], stage)) continue;
      const bool rowwise = kernel.run_rows != nullptr && stage == 0;
      const bool joins = rowwise && !steps.empty() && steps.back().chain && ops[index].kind != PLD_OP_GATHER_ROWS &&
                         strides.agrees(ops[index], buffers);
      if (!joins) {
        steps.push_back({{}, rowwise});
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
          context.table.ops[a.op->kind].run_rows(a, task * each, std::min(rows, (task + 1) * each));
        }
      });
    } else {
      const int stage = step.parts[0].stage;
      const Kernel &kernel = context.table.ops[first.op->kind];
      const int64_t n_tasks = kernel.n_tasks(first, stage, n_threads);
      if (n_tasks == 0) continue;  // on every thread alike
      context.turns.take(turn++, n_tasks, thread,
                         [&](int64_t task) { kernel.run(first, stage, task, n_threads, scratch); });
    }
    context.pool.barrier().wait();
  }
}

}  // namespace pld
