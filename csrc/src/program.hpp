// A program as it is run: ops on buffers of one arena, and the steps in which threads walk them.
#pragma once

#include <vector>

#include "batch.hpp"
#include "context.hpp"
#include "kv.hpp"
#include "scratch.hpp"
#include "stages.hpp"

struct pld_program {
  pld_context *context;
  std::vector<pld_op> ops;
  std::vector<pld_buffer> buffers;
  std::vector<pld_weight> weights;
  int32_t n_forward_ops, hidden, logits, vocab_size;
  int64_t n_positions = 0;    // rows of the smallest table that positions are looked up in; 0: there is none
  int64_t max_rows[2];        // by domain
  std::vector<int32_t> kept;  // buffers that outlive a run, beside those two

  std::vector<int32_t> inputs;  // buffers that the caller writes

  pld::Scratch arena;
  int64_t arena_bytes = 0;
  std::vector<int64_t> offset;  // of each buffer in the arena
  pld::Scratch op_scratch;
  pld::ScratchPlan scratch_plan;
  std::vector<pld::OpArgs> args;
  std::vector<pld::Step> steps[2];  // of the forward part, and of the logits
  pld::CellMarks marks;
  int32_t rows_left = 0;  // hidden rows that the last run left
  // Of the last pld_decode, by index in its batch: the row of the hidden states, and of the logits (-1: not asked for).
  // Empty behind other runs, whose rows are as the caller gave them.
  std::vector<int32_t> hidden_index, logit_index;
};

namespace pld {

// Batch, cache and rows of all ops. The caller holds the context's mutex until their steps have run.
void bind_batch(pld_program &program, const pld_batch &batch, pld_kv *kv);
// All steps of the parts [first, last], forward (0) and logits (1), as one region.
void run_parts(pld_program &program, int first, int last);
// Steps [begin, end) of one part, as one region.
void run_some(pld_program &program, int part, size_t begin, size_t end);

// Whether the program's attention fits the cache.
pld_status check_layers(const pld_program &program, const pld_kv &kv);
BatchLimits batch_limits(const pld_program &program);
const float *buffer_data(const pld_program *program, int32_t buffer);

}  // namespace pld
