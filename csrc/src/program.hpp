// A program as it is run: ops on buffers of one arena, and the steps in which threads walk them.
#pragma once

#include <vector>

#include "batch.hpp"
#include "context.hpp"
#include "kv.hpp"
#include "stages.hpp"

struct pld_program {
  pld_context *context;
  std::vector<pld_op> ops;
  std::vector<pld_buffer> buffers;
  std::vector<pld_weight> weights;
  int32_t n_forward_ops, hidden, logits, vocab_size;
  int64_t max_rows[2];  // by domain

  pld::Scratch arena;
  int64_t arena_bytes = 0;
  std::vector<int64_t> offset;  // of each buffer in the arena
  pld::Scratch op_scratch;
  std::vector<pld::OpArgs> args;
  std::vector<pld::Step> steps[2];  // of the forward part, and of the logits
  pld::CellMarks marks;
  int32_t rows_left = 0;             // hidden rows that the last run left
  std::vector<int32_t> logit_index;  // of each token of the last pld_decode; -1: not asked for
};

namespace pld {

// One step of a batch that the caller has made, checked unless `check` is false. The caller holds the context's mutex.
pld_status run_prepared(pld_program &program, pld_kv &kv, const pld_batch &batch, bool check);

}  // namespace pld
