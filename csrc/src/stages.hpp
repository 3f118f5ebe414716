// A program's stages in the order in which all threads walk them, with a barrier behind each step.
#pragma once

#include <cstdint>
#include <vector>

#include "context.hpp"
#include "kernels/kernels.hpp"

namespace pld {

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
};

// Lets each linear whose output only an act_and_mul reads gate it on the way, and round the result for the linear that
// alone reads that. Neither result is stored then. `kept` are buffers that callers look at.
void fuse_gates(const pld_op *ops, const pld_buffer *buffers, int32_t n_buffers, std::vector<OpArgs> &args,
                const std::vector<int32_t> &kept);

// Steps of ops [begin, end), without stages that have been fused. `args` are resolved but for batch, cache and rows;
// buffers and slots as in the program.
std::vector<Step> plan_steps(const pld_op *ops, const pld_buffer *buffers, const std::vector<OpArgs> &args,
                             const KernelTable &table, int32_t begin, int32_t end);

// All steps on one thread of a region, as run_stages does for one op.
void run_steps(const std::vector<Step> &steps, const std::vector<OpArgs> &args, pld_context &context, uint32_t &turn,
               int thread);

}  // namespace pld
