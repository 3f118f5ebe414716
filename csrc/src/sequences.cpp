#include "sequences.hpp"

#include <algorithm>

#include "error.hpp"

namespace pld {

namespace {
constexpr int64_t kGroup = 16;  // cells of a group of the store
constexpr uint16_t kAllFree = 0xffff;
}  // namespace

// ---- cells ---------------------------------------------------------------------------------------------------------

CellPool::CellPool(int64_t n_cells)
    : n_cells_(n_cells),
      n_free_(n_cells),
      owners_(static_cast<size_t>(n_cells), 0),
      free_of_(static_cast<size_t>((n_cells + kGroup - 1) / kGroup), kAllFree) {
  if (n_cells % kGroup != 0) free_of_.back() = static_cast<uint16_t>((1u << n_cells % kGroup) - 1);
  whole_.reserve(free_of_.size());
  for (int64_t group = n_cells / kGroup; group-- > 0;) whole_.push_back(static_cast<int32_t>(group));
}

int32_t CellPool::occupy(int64_t cell) {
  owners_[static_cast<size_t>(cell)] = 1;
  free_of_[static_cast<size_t>(cell / kGroup)] &= static_cast<uint16_t>(~(1u << cell % kGroup));
  --n_free_;
  peak_ = std::max(peak_, n_cells_ - n_free_);
  return static_cast<int32_t>(cell);
}

int32_t CellPool::take(int64_t rank, int32_t before) {
  const int64_t lane = rank % kGroup;
  if (lane != 0 && before % kGroup == lane - 1 && is_free(static_cast<int64_t>(before) + 1)) return occupy(before + 1);
  if (!whole_.empty()) {
    const int64_t group = whole_.back();
    whole_.pop_back();
    return occupy(group * kGroup + lane);
  }
  while (free_of_[search_] == 0) search_ = search_ + 1 < free_of_.size() ? search_ + 1 : 0;
  int64_t cell = static_cast<int64_t>(search_) * kGroup;
  while (!is_free(cell)) ++cell;
  return occupy(cell);
}

void CellPool::release(int32_t cell) {
  if (--owners_[static_cast<size_t>(cell)] > 0) return;
  uint16_t &free = free_of_[static_cast<size_t>(cell / kGroup)];
  free |= static_cast<uint16_t>(1u << cell % kGroup);
  ++n_free_;
  if (free == kAllFree) whole_.push_back(static_cast<int32_t>(cell / kGroup));
}

// ---- sequences -----------------------------------------------------------------------------------------------------

size_t SlotSequence::first_at_or_behind(int64_t position) const {
  return static_cast<size_t>(std::lower_bound(positions.begin(), positions.end(), position) - positions.begin());
}

SlotSequence &Sequences::with_room(int32_t seq, int32_t position, size_t *at) {
  SlotSequence &s = slot[seq];
  *at = s.first_at_or_behind(position);
  if (s.positions.size() == s.positions.capacity() || s.cells.size() == s.cells.capacity()) {
    const size_t room = 2 * s.positions.size() + 16;
    s.positions.reserve(room);
    s.cells.reserve(room);
  }
  return s;
}

int32_t Sequences::insert(int32_t seq, int32_t position) {
  size_t at = 0;
  SlotSequence &s = with_room(seq, position, &at);
  const int32_t cell = cells.take(static_cast<int64_t>(at), at > 0 ? s.cells[at - 1] : -1);
  s.positions.insert(s.positions.begin() + static_cast<std::ptrdiff_t>(at), position);
  s.cells.insert(s.cells.begin() + static_cast<std::ptrdiff_t>(at), cell);
  return cell;
}

void Sequences::share(int32_t seq, int32_t position, int32_t cell) {
  size_t at = 0;
  SlotSequence &s = with_room(seq, position, &at);
  cells.share(cell);
  s.positions.insert(s.positions.begin() + static_cast<std::ptrdiff_t>(at), position);
  s.cells.insert(s.cells.begin() + static_cast<std::ptrdiff_t>(at), cell);
}

void Sequences::remove(int32_t seq, int32_t position) {
  const auto found = slot.find(seq);
  if (found == slot.end()) return;
  SlotSequence &s = found->second;
  const size_t at = s.first_at_or_behind(position);
  if (at < s.positions.size() && s.positions[at] == position) {
    cells.release(s.cells[at]);
    s.positions.erase(s.positions.begin() + static_cast<std::ptrdiff_t>(at));
    s.cells.erase(s.cells.begin() + static_cast<std::ptrdiff_t>(at));
  }
  if (s.positions.empty()) slot.erase(found);
}

}  // namespace pld
