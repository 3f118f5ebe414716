// The cells of a SLOT cache: which position each holds, and for which sequences.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "pellucid.h"

namespace pld {

class Slots {
 public:
  explicit Slots(int64_t n_cells);

  // Cells of a sequence by position; a query sees those at or before its own.
  using Sequence = std::map<int32_t, int32_t>;
  const Sequence *find(int32_t seq) const;
  int32_t pos_max(int32_t seq) const;
  int64_t free_cells() const { return static_cast<int64_t>(free_.size()); }
  bool is_shared(int32_t cell) const { return owners_[static_cast<size_t>(cell)] > 1; }

  // The cell that is taken next but `ahead`; it stays free until `put`.
  int32_t peek(int64_t ahead) const { return free_[free_.size() - 1 - static_cast<size_t>(ahead)]; }
  // Takes the next free cell for a position that the sequence does not have.
  int32_t put(int32_t seq, int32_t position);

  pld_status copy(int32_t dst, int32_t src, int32_t p0, int32_t p1);
  pld_status remove(int32_t seq, int32_t p0, int32_t p1);
  pld_status keep(int32_t seq);
  // The range that shifts, checked: begin and end of it in the sequence. Nothing is changed.
  pld_status check_shift(int32_t seq, int32_t p0, int32_t p1, int32_t delta, std::vector<int32_t> *positions) const;
  // A free cell in place of one of the owners' shared cell.
  int32_t replace_shared(int32_t cell);
  // Moves checked positions to cells, in order.
  void shift(int32_t seq, const std::vector<int32_t> &positions, int32_t delta, const std::vector<int32_t> &cells);

 private:
  int32_t take();
  pld_status check_range(int32_t seq, int32_t *p0, int32_t *p1) const;
  void release(int32_t cell);

  std::map<int32_t, Sequence> sequences_;
  std::vector<int32_t> owners_;  // sequences that share a cell
  std::vector<int32_t> free_;    // the last is taken next
};

}  // namespace pld
