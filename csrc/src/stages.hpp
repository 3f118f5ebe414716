// A program's stages in the order in which all threads walk them, with a barrier behind each step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "context.hpp"
#include "kernels/kernels.hpp"

namespace pld {

// Bytes of memory.
struct Span {
  std::byte *data;
  size_t bytes;
};

// One stage of one op.
struct Part {
  int32_t op;
  int32_t stage;
};

// Either one stage, cut into the kernel's own tasks, or a chain of row stages: each task takes a few rows through all
// of them, so that neighbours need no barrier between them and a row stays in the first-level cache.
struct Step {
  std::vector<Part> parts;
  bool chain;
  std::vector<Span> dead;  // in a context that poisons: memory that nobody may read after this step
};

inline constexpr int kProductStage = 1;  // of a linear

// Lets each linear whose output only an act_and_mul reads gate it on the way, and round the result for the linear that
// alone reads that. Neither result is stored then. `kept` are buffers that callers look at.
void fuse_gates(const pld_op *ops, const pld_buffer *buffers, int32_t n_buffers, std::vector<OpArgs> &args,
                const std::vector<int32_t> &kept);

// visit(op, stage) for the stages that a part does on the way: those that plan_steps leaves out as fused.
template <typename Visit>
void each_fused(const std::vector<OpArgs> &args, const Part &part, Visit &&visit) {
  const OpArgs &own = args[static_cast<size_t>(part.op)];
  if (own.gated == nullptr || part.stage != kProductStage) return;
  visit(static_cast<int32_t>(own.gated - args.data()), 0);
  if (own.feeds != nullptr) visit(static_cast<int32_t>(own.feeds - args.data()), 0);
}

// Steps of ops [begin, end), without stages that have been fused. `args` are resolved but for batch, cache and rows;
// buffers and slots as in the program.
std::vector<Step> plan_steps(const pld_op *ops, const pld_buffer *buffers, const std::vector<OpArgs> &args,
                             const KernelTable &table, int32_t begin, int32_t end);

// All steps on one thread of a region, as run_stages does for one op.
void run_steps(const std::vector<Step> &steps, const std::vector<OpArgs> &args, pld_context &context, uint32_t &turn,
               int thread);

}  // namespace pld
