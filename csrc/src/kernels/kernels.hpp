// The seam between what is compiled once (argument checks, pool, programs) and what is compiled per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pellucid.h"

namespace pld {

inline constexpr int kMaxStages = 3;
inline constexpr int kMaxRegions = 7;

// Memory that the stages of one op share beside its operands: written first by `first_stage`, read last by
// `last_stage`.
struct ScratchRegion {
  size_t bytes;
  int first_stage, last_stage;
};

// One op with every operand resolved. Column offsets are already in the pointers; strides are in floats.
struct OpArgs {
  const pld_op *op;
  int64_t rows;
  const float *in[PLD_MAX_IN];
  int64_t in_stride[PLD_MAX_IN];
  int32_t in_width[PLD_MAX_IN];
  float *out[PLD_MAX_OUT];
  int64_t out_stride[PLD_MAX_OUT];
  int32_t out_width[PLD_MAX_OUT];
  const pld_weight *weight[PLD_MAX_WEIGHTS];  // null: absent
  const pld_batch *batch;
  pld_kv *kv;
  std::byte *scratch[kMaxRegions];  // the regions that Kernel::regions declares, 64-byte aligned; null: no bytes
  // linear within a program (stages.cpp). `gated`: the act_and_mul that alone reads the output is computed on the way,
  // and the output is not stored. `feeds`: the linear that alone reads that result gets it rounded into its scratch.
  const OpArgs *gated;
  const OpArgs *feeds;
};

// What an embedding or a rope_table reads.
inline bool reads_positions(const pld_op &op) {
  return op.i[0] == PLD_IDS_OF_THE_OP ? op.kind == PLD_OP_ROPE_TABLE : op.i[0] == PLD_IDS_POSITIONS;
}

inline const int32_t *batch_ids(const pld_op &op, const pld_batch &batch) {
  return reads_positions(op) ? batch.positions : batch.token_ids;
}

inline constexpr size_t kThreadScratchBytes = 2 * 1024 * 1024;

// An op is a few stages with a barrier between them; a stage is tasks that may run in any order on any thread. How the
// work is cut into tasks never changes a bit of the result: a task owns whole output elements.
struct Kernel {
  int n_stages;
  int64_t (*n_tasks)(const OpArgs &args, int stage, int n_threads);
  void (*run)(const OpArgs &args, int stage, int64_t task, int n_threads, std::byte *thread_scratch);
  // Declares the op's scratch regions for at most `rows` rows; gives their number. null: none.
  int (*regions)(const pld_op &op, const pld_weight *const *weight, int64_t rows, ScratchRegion *regions);
  // Stages (a bit each) of which a row reads no other row of what stands before it (gather_rows: but the hidden states)
  // and writes no other; and such a stage for rows [begin, end).
  uint32_t row_stages;
  void (*run_rows)(const OpArgs &args, int stage, int64_t begin, int64_t end, int n_threads);
  bool (*is_void)(const OpArgs &args, int stage);  // a stage that never has tasks; null: none
};

inline constexpr int kNumOpKinds = PLD_OP_SAMPLE + 1;

// What a pass over a row of logits finds.
struct RowScan {
  float max;
  int32_t argmax;  // the lowest index of the maximum
  bool any_nan;
};

struct KernelTable {
  Kernel ops[kNumOpKinds];  // by pld_op_kind; [0] is unused
  RowScan (*scan_row)(const float *x, int32_t width);
  float (*sum_exp)(const float *x, int32_t width, float max);  // of exp(x - max)
  void (*weigh_row)(const float *x, int32_t width, float max, float temperature,
                    float *);  // exp((x - max) / temperature)
};

namespace portable {
const KernelTable &kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const KernelTable &kernels();
}
namespace avx512 {
const KernelTable &kernels();
}
#endif

}  // namespace pld
