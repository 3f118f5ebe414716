#pragma once

#include <cstdint>
#include <vector>

#include "pellucid.h"

namespace pld {

// Marks of the cells that one batch writes, so that two tokens are never given the same cell. Sized once for a cache.
class CellMarks {
 public:
  void reserve(int64_t n_cells) {
    if (static_cast<int64_t>(marks_.size()) < n_cells) marks_.assign(static_cast<size_t>(n_cells), 0), step_ = 0;
  }
  void begin() {
    if (++step_ == 0) {
      marks_.assign(marks_.size(), 0);
      step_ = 1;
    }
  }
  bool mark(int64_t cell) {  // false: taken already
    uint32_t &mark = marks_[static_cast<size_t>(cell)];
    if (mark == step_) return false;
    mark = step_;
    return true;
  }

 private:
  std::vector<uint32_t> marks_;
  uint32_t step_ = 0;
};

struct BatchLimits {
  int64_t max_tokens;
  int64_t max_logit_rows;
  int64_t vocab_size;       // 0: ids are not checked
  int64_t n_positions = 0;  // rows of the smallest table that positions are looked up in; 0: there is none
};

// PLD_NOT_SUPPORTED: the caller has no say in the cells of this cache.
pld_status check_block_layout(const pld_kv &kv);
// A copy of a caller's batch of any version, or PLD_INVALID_BATCH.
pld_status read_batch(const pld_batch *given, pld_batch *batch);
// Checks every field against the others and against the cache. PLD_INVALID_BATCH names field, index, value and limit,
// and blames the token, sequence or logit row that is wrong by itself.
pld_status check_batch(const pld_batch &batch, const pld_kv &kv, const BatchLimits &limits, CellMarks &marks);

}  // namespace pld
