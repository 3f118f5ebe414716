// Sequence operations of the C API: statuses as the header says, nothing changed on any but PLD_OK.
#include <algorithm>

#include "error.hpp"
#include "kv.hpp"
#include "program.hpp"
#include "rotation.hpp"
#include "sequences.hpp"
#include "sized.hpp"

namespace pld {
namespace {

// Places [begin, end) of a sequence's cells.
struct Range {
  size_t begin, end;
};

pld_status check_slot(const pld_kv *kv) {
  if (kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "kv is null");
  if (!may_be_slot(*kv))
    return fail(PLD_NOT_SUPPORTED,
                "sequence operations need a cache of layout SLOT; with BLOCK the caller has the tables");
  return PLD_OK;
}

pld_status find_sequence(pld_kv &kv, int32_t seq, SlotSequence **found) {
  const auto at = kv.sequences->slot.find(seq);
  if (at == kv.sequences->slot.end()) return fail(PLD_INVALID_SEQ, "sequence %d is not in the cache", seq);
  *found = &at->second;
  return PLD_OK;
}

pld_status find_range(const SlotSequence &s, int32_t p0, int32_t p1, Range *range) {
  const int32_t begin = p0 < 0 ? 0 : p0, end = p1 < 0 ? INT32_MAX : p1;
  if (begin > end) return fail(PLD_INVALID_POS, "the range begins at %d and ends at %d", begin, end);
  if (begin == end) return fail(PLD_EMPTY_RANGE, "the range [%d, %d) is empty", begin, end);
  *range = {s.first_at_or_behind(begin), s.first_at_or_behind(end)};
  return PLD_OK;
}

int32_t pos_max(const pld_kv *kv, int32_t seq) {
  if (kv == nullptr) return -1;
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  const auto at = kv->sequences->slot.find(seq);
  return at == kv->sequences->slot.end() ? -1 : at->second.positions.back();
}

// What `dst` holds with what `src` holds in the range, by position.
pld_status merge_sequences(const SlotSequence &dst, const SlotSequence &src, Range range, int32_t dst_id,
                           SlotSequence *merged) {
  size_t d = 0, s = range.begin;
  merged->positions.reserve(dst.positions.size() + range.end - range.begin);
  merged->cells.reserve(dst.positions.size() + range.end - range.begin);
  while (d < dst.positions.size() || s < range.end) {
    const bool from_src = d == dst.positions.size() || (s < range.end && src.positions[s] <= dst.positions[d]);
    if (from_src && d < dst.positions.size() && src.positions[s] == dst.positions[d]) {
      if (src.cells[s] != dst.cells[d])
        return fail(PLD_INVALID_POS, "sequence %d holds position %d already", dst_id, dst.positions[d]);
      ++s;  // the same cell
      continue;
    }
    const SlotSequence &from = from_src ? src : dst;
    size_t &at = from_src ? s : d;
    merged->positions.push_back(from.positions[at]);
    merged->cells.push_back(from.cells[at]);
    ++at;
  }
  return PLD_OK;
}

pld_status copy_sequence(pld_kv *kv, int32_t dst, int32_t src, int32_t p0, int32_t p1) {
  if (pld_status status = check_slot(kv)) return status;
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  if (dst < 0) return fail(PLD_INVALID_SEQ, "sequence %d is below 0", dst);
  SlotSequence *from = nullptr;
  if (pld_status status = find_sequence(*kv, src, &from)) return status;
  Range range;
  if (pld_status status = find_range(*from, p0, p1, &range)) return status;
  if (dst == src || range.begin == range.end) return PLD_OK;
  const auto at = kv->sequences->slot.find(dst);
  SlotSequence merged;
  const SlotSequence none, &before = at == kv->sequences->slot.end() ? none : at->second;
  if (pld_status status = merge_sequences(before, *from, range, dst, &merged)) return status;
  std::vector<int32_t> shared;
  shared.reserve(range.end - range.begin);
  for (size_t i = range.begin; i < range.end; ++i)
    if (!before.holds(from->positions[i])) shared.push_back(from->cells[i]);
  kv->sequences->slot[dst] = std::move(merged);
  for (const int32_t cell : shared) kv->sequences->cells.share(cell);
  return PLD_OK;
}

void release_all(Sequences &sequences, const SlotSequence &s) {
  for (size_t i = s.cells.size(); i-- > 0;) sequences.cells.release(s.cells[i]);
}

pld_status remove_range(pld_kv *kv, int32_t seq, int32_t p0, int32_t p1) {
  if (pld_status status = check_slot(kv)) return status;
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  SlotSequence *s = nullptr;
  if (pld_status status = find_sequence(*kv, seq, &s)) return status;
  Range range;
  if (pld_status status = find_range(*s, p0, p1, &range)) return status;
  const auto begin = static_cast<std::ptrdiff_t>(range.begin), end = static_cast<std::ptrdiff_t>(range.end);
  for (size_t i = range.end; i-- > range.begin;) kv->sequences->cells.release(s->cells[i]);
  s->cells.erase(s->cells.begin() + begin, s->cells.begin() + end);
  s->positions.erase(s->positions.begin() + begin, s->positions.begin() + end);
  if (s->positions.empty()) kv->sequences->slot.erase(seq);
  return PLD_OK;
}

pld_status keep_sequence(pld_kv *kv, int32_t seq) {
  if (pld_status status = check_slot(kv)) return status;
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  SlotSequence *kept = nullptr;
  if (pld_status status = find_sequence(*kv, seq, &kept)) return status;
  auto &slot = kv->sequences->slot;
  for (auto at = slot.begin(); at != slot.end();) {
    if (at->first == seq) {
      ++at;
      continue;
    }
    release_all(*kv->sequences, at->second);
    at = slot.erase(at);
  }
  return PLD_OK;
}

// The sequence with positions of the range moved by `delta`.
pld_status shift_positions(const SlotSequence &s, Range range, int64_t delta, SlotSequence *shifted) {
  const int64_t first = s.positions[range.begin] + delta, last = s.positions[range.end - 1] + delta;
  if (first < 0 || last > kMaxPosition)
    return fail(PLD_INVALID_POS, "positions would move to [%lld, %lld]; the limits are 0 and %d",
                static_cast<long long>(first), static_cast<long long>(last), kMaxPosition);
  std::vector<std::pair<int32_t, int32_t>> pairs;
  pairs.reserve(s.positions.size());
  for (size_t i = 0; i < s.positions.size(); ++i) {
    const bool moves = i >= range.begin && i < range.end;
    pairs.emplace_back(static_cast<int32_t>(s.positions[i] + (moves ? delta : 0)), s.cells[i]);
  }
  std::sort(pairs.begin(), pairs.end());
  for (size_t i = 1; i < pairs.size(); ++i)
    if (pairs[i].first == pairs[i - 1].first)
      return fail(PLD_INVALID_POS, "position %d would be held twice", pairs[i].first);
  shifted->positions.reserve(pairs.size());
  shifted->cells.reserve(pairs.size());
  for (const auto &pair : pairs) {
    shifted->positions.push_back(pair.first);
    shifted->cells.push_back(pair.second);
  }
  return PLD_OK;
}

pld_status add_to_positions(pld_program *program, pld_kv *kv, int32_t seq, int32_t p0, int32_t p1, int32_t delta) {
  if (program == nullptr) return fail(PLD_INVALID_ARGUMENT, "program is null");
  if (pld_status status = check_slot(kv)) return status;
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  if (pld_status status = check_layers(*program, *kv)) return status;
  SlotSequence *s = nullptr;
  if (pld_status status = find_sequence(*kv, seq, &s)) return status;
  Range range;
  if (pld_status status = find_range(*s, p0, p1, &range)) return status;
  if (range.begin == range.end || delta == 0) return PLD_OK;
  SlotSequence shifted;
  if (pld_status status = shift_positions(*s, range, delta, &shifted)) return status;
  std::vector<KeyRotation> rotations;
  if (pld_status status = key_rotations(*program, *kv, rotations)) return status;
  CellPool &cells = kv->sequences->cells;
  int64_t n_shared = 0;
  for (size_t i = range.begin; i < range.end; ++i) n_shared += cells.is_shared(s->cells[i]);
  if (n_shared > cells.n_free())
    return fail(PLD_NO_SPACE, "%lld cells are shared and must be copied; %lld are free",
                static_cast<long long>(n_shared), static_cast<long long>(cells.n_free()));
  KeyRotator rotator(*kv, rotations);  // behind this point nothing throws
  for (size_t i = range.begin; i < range.end; ++i) {
    const size_t at = shifted.first_at_or_behind(static_cast<int64_t>(s->positions[i]) + delta);
    int32_t &cell = shifted.cells[at];
    if (cells.is_shared(cell)) {
      const int32_t own = cells.take(static_cast<int64_t>(at), at > 0 ? shifted.cells[at - 1] : -1);
      copy_cell(*kv, cell, own);
      cells.release(cell);
      cell = own;
    }
    rotator.rotate(cell, delta);
  }
  *s = std::move(shifted);
  return PLD_OK;
}

pld_status free_request(pld_kv *kv, int32_t seq) {
  if (kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "kv is null");
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  if (kv->layout == PLD_KV_BLOCK)
    return kv->sequences->known.erase(seq) > 0 ? PLD_OK : fail(PLD_INVALID_SEQ, "sequence %d is not in the cache", seq);
  SlotSequence *s = nullptr;
  if (pld_status status = find_sequence(*kv, seq, &s)) return status;
  release_all(*kv->sequences, *s);
  kv->sequences->slot.erase(seq);
  return PLD_OK;
}

pld_status kv_stats(const pld_kv *kv, pld_kv_stats *stats) {
  if (kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "kv is null");
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  pld_kv_stats value = {0, kv->n_cells, -1, -1, -1};
  if (may_be_slot(*kv)) {
    const CellPool &cells = kv->sequences->cells;
    value.free = cells.n_free();
    value.used = cells.n_cells() - cells.n_free();
    value.peak = cells.peak();
  }
  return write_sized(value, stats);
}

pld_status reset(pld_kv *kv) {
  if (kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "kv is null");
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  CellPool fresh(kv->sequences->cells.n_cells());
  kv->sequences->cells = std::move(fresh);
  kv->sequences->slot.clear();
  kv->sequences->known.clear();
  return PLD_OK;
}

}  // namespace
}  // namespace pld

extern "C" pld_status pld_kv_stats_get(const pld_kv *kv, pld_kv_stats *stats) {
  return pld::guard([&] { return pld::kv_stats(kv, stats); });
}
extern "C" pld_status pld_kv_reset(pld_kv *kv) {
  return pld::guard([&] { return pld::reset(kv); });
}
extern "C" int32_t pld_seq_pos_max(const pld_kv *kv, int32_t seq) { return pld::pos_max(kv, seq); }
extern "C" pld_status pld_seq_cp(pld_kv *kv, int32_t dst, int32_t src, int32_t p0, int32_t p1) {
  return pld::guard([&] { return pld::copy_sequence(kv, dst, src, p0, p1); });
}
extern "C" pld_status pld_seq_rm(pld_kv *kv, int32_t seq, int32_t p0, int32_t p1) {
  return pld::guard([&] { return pld::remove_range(kv, seq, p0, p1); });
}
extern "C" pld_status pld_seq_keep(pld_kv *kv, int32_t seq) {
  return pld::guard([&] { return pld::keep_sequence(kv, seq); });
}
extern "C" pld_status pld_seq_add(pld_program *program, pld_kv *kv, int32_t seq, int32_t p0, int32_t p1,
                                  int32_t delta) {
  return pld::guard([&] { return pld::add_to_positions(program, kv, seq, p0, p1, delta); });
}
extern "C" pld_status pld_request_free(pld_kv *kv, int32_t seq) {
  return pld::guard([&] { return pld::free_request(kv, seq); });
}
extern "C" int64_t pld_kv_free_cells(const pld_kv *kv) {
  if (kv == nullptr || !pld::may_be_slot(*kv)) return -1;
  std::lock_guard<std::mutex> lock(kv->sequences->mutex);
  return kv->sequences->cells.n_free();
}
