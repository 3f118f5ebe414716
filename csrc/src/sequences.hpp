// Who holds what in a cache: cells and positions by sequence (SLOT), or sequences alone (BLOCK).
#pragma once

#include <cstdint>
#include <mutex>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "kv.hpp"

namespace pld {

inline constexpr int32_t kMaxPosition = INT32_MAX - 1;  // so that the end of a range fits an int32

// Single cells and their owners. A sequence's cells are taken, where that is possible, so that sixteen neighbours of it
// fill a group of the store in order: such a group is read where it lies.
class CellPool {
 public:
  explicit CellPool(int64_t n_cells);
  int64_t n_cells() const { return n_cells_; }
  int64_t n_free() const { return n_free_; }
  int64_t peak() const { return peak_; }  // most that were taken at once
  // A free cell for the `rank`-th cell of a sequence, behind cell `before` (-1: none). There must be a free one.
  int32_t take(int64_t rank, int32_t before);
  void share(int32_t cell) { ++owners_[static_cast<size_t>(cell)]; }
  void release(int32_t cell);
  bool is_shared(int32_t cell) const { return owners_[static_cast<size_t>(cell)] > 1; }

 private:
  int32_t occupy(int64_t cell);
  bool is_free(int64_t cell) const { return cell < n_cells_ && owners_[static_cast<size_t>(cell)] == 0; }

  int64_t n_cells_, n_free_, peak_ = 0;
  std::vector<int32_t> owners_;    // of each cell
  std::vector<uint16_t> free_of_;  // of each group: a bit a free cell
  std::vector<int32_t> whole_;     // groups of which all sixteen are free; the next to be taken last
  size_t search_ = 0;              // group at which a search for any free cell goes on
};

// The cells of one sequence by ascending position: the attention kernel's table, for blocks of one.
struct SlotSequence {
  std::vector<int32_t> positions, cells;

  // Positions 0, 1, 2, ...: a cell's place in the table is its position.
  bool is_dense() const {
    return positions.front() == 0 && static_cast<size_t>(positions.back()) + 1 == positions.size();
  }
  size_t first_at_or_behind(int64_t position) const;
  bool holds(int32_t position) const {
    const size_t at = first_at_or_behind(position);
    return at < positions.size() && positions[at] == position;
  }
};

struct Sequences {
  explicit Sequences(const pld_kv &kv) : cells(may_be_slot(kv) ? kv.n_cells : 0) {}

  // Held by whoever reads or changes what follows; taken after a context's.
  std::mutex mutex;
  CellPool cells;
  std::unordered_map<int32_t, SlotSequence> slot;  // never an empty one
  std::unordered_set<int32_t> known;               // BLOCK: sequences that have been decoded

  // Puts one more cell into a sequence, which may be new. The position must not be held, and a cell be free.
  int32_t insert(int32_t seq, int32_t position);
  // Likewise, but the cell is one that another sequence holds.
  void share(int32_t seq, int32_t position, int32_t cell);
  void remove(int32_t seq, int32_t position);

 private:
  // The sequence with room for one more cell, which comes at the place `at`: behind this nothing throws.
  SlotSequence &with_room(int32_t seq, int32_t position, size_t *at);
};

}  // namespace pld
