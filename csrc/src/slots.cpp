#include "slots.hpp"

#include <climits>

#include "error.hpp"
#include "kv.hpp"

namespace pld {

Slots::Slots(int64_t n_cells) : owners_(static_cast<size_t>(n_cells), 0), free_(static_cast<size_t>(n_cells)) {
  for (int64_t i = 0; i < n_cells; ++i) free_[static_cast<size_t>(i)] = static_cast<int32_t>(n_cells - 1 - i);
}

const Slots::Sequence *Slots::find(int32_t seq) const {
  auto found = sequences_.find(seq);
  return found == sequences_.end() ? nullptr : &found->second;
}

int32_t Slots::pos_max(int32_t seq) const {
  const Sequence *sequence = find(seq);
  return sequence == nullptr ? -1 : sequence->rbegin()->first;
}

int32_t Slots::take() {
  const int32_t cell = free_.back();
  free_.pop_back();
  owners_[static_cast<size_t>(cell)] = 1;
  return cell;
}

int32_t Slots::put(int32_t seq, int32_t position) {
  const int32_t cell = take();
  sequences_[seq][position] = cell;
  return cell;
}

int32_t Slots::replace_shared(int32_t cell) {
  --owners_[static_cast<size_t>(cell)];
  return take();
}

void Slots::release(int32_t cell) {
  if (--owners_[static_cast<size_t>(cell)] == 0) free_.push_back(cell);
}

pld_status Slots::check_range(int32_t seq, int32_t *p0, int32_t *p1) const {
  const Sequence *sequence = find(seq);
  if (sequence == nullptr) return fail(PLD_INVALID_SEQ, "sequence %d has no tokens", seq);
  *p0 = *p0 < 0 ? 0 : *p0;
  *p1 = *p1 < 0 ? INT_MAX : *p1;
  if (*p0 > *p1) return fail(PLD_INVALID_POS, "the range [%d, %d) ends before it begins", *p0, *p1);
  if (*p0 == *p1) return fail(PLD_EMPTY_RANGE, "the range [%d, %d) is empty", *p0, *p1);
  return PLD_OK;
}

pld_status Slots::copy(int32_t dst, int32_t src, int32_t p0, int32_t p1) {
  if (dst < 0) return fail(PLD_INVALID_SEQ, "sequence %d: ids are not negative", dst);
  if (pld_status status = check_range(src, &p0, &p1)) return status;
  if (dst == src) return PLD_OK;
  const Sequence from = sequences_[src];
  const Sequence *there = find(dst);
  for (auto it = from.lower_bound(p0); it != from.end() && it->first < p1; ++it)
    if (there != nullptr && there->count(it->first) != 0 && there->at(it->first) != it->second)
      return fail(PLD_INVALID_POS, "sequence %d has a token at position %d already", dst, it->first);
  for (auto it = from.lower_bound(p0); it != from.end() && it->first < p1; ++it)
    if (sequences_[dst].emplace(it->first, it->second).second) ++owners_[static_cast<size_t>(it->second)];
  return PLD_OK;
}

pld_status Slots::remove(int32_t seq, int32_t p0, int32_t p1) {
  if (pld_status status = check_range(seq, &p0, &p1)) return status;
  Sequence &sequence = sequences_[seq];
  for (auto it = sequence.lower_bound(p0); it != sequence.end() && it->first < p1; it = sequence.erase(it))
    release(it->second);
  if (sequence.empty()) sequences_.erase(seq);
  return PLD_OK;
}

pld_status Slots::keep(int32_t seq) {
  if (find(seq) == nullptr) return fail(PLD_INVALID_SEQ, "sequence %d has no tokens", seq);
  for (auto it = sequences_.begin(); it != sequences_.end();) {
    if (it->first == seq) {
      ++it;
      continue;
    }
    for (const auto &entry : it->second) release(entry.second);
    it = sequences_.erase(it);
  }
  return PLD_OK;
}

pld_status Slots::check_shift(int32_t seq, int32_t p0, int32_t p1, int32_t delta,
                              std::vector<int32_t> *positions) const {
  if (pld_status status = check_range(seq, &p0, &p1)) return status;
  const Sequence &sequence = *find(seq);
  for (auto it = sequence.lower_bound(p0); it != sequence.end() && it->first < p1; ++it) {
    const int64_t moved = static_cast<int64_t>(it->first) + delta;
    if (moved < 0 || moved > INT_MAX) return fail(PLD_INVALID_POS, "position %d cannot shift by %d", it->first, delta);
    const bool stays = moved < p0 || moved >= p1;  // a place outside the range keeps its token
    if (stays && sequence.count(static_cast<int32_t>(moved)) != 0)
      return fail(PLD_INVALID_POS, "sequence %d has a token at position %lld already", seq,
                  static_cast<long long>(moved));
    positions->push_back(it->first);
  }
  return PLD_OK;
}

void Slots::shift(int32_t seq, const std::vector<int32_t> &positions, int32_t delta,
                  const std::vector<int32_t> &cells) {
  Sequence &sequence = sequences_[seq];
  for (int32_t position : positions) sequence.erase(position);
  for (size_t i = 0; i < positions.size(); ++i) sequence[positions[i] + delta] = cells[i];
}

}  // namespace pld

static pld::Slots *slots_of(pld_kv *kv, pld_status *status) {
  if (kv == nullptr)
    *status = pld::fail(PLD_INVALID_ARGUMENT, "kv is null");
  else if (kv->slots == nullptr)
    *status = pld::fail(PLD_NOT_SUPPORTED, "sequence operations need a SLOT cache");
  return kv == nullptr ? nullptr : kv->slots;
}

extern "C" pld_status pld_seq_cp(pld_kv *kv, int32_t dst, int32_t src, int32_t p0, int32_t p1) {
  return pld::guard([&] {
    pld_status status = PLD_OK;
    pld::Slots *slots = slots_of(kv, &status);
    return slots == nullptr ? status : slots->copy(dst, src, p0, p1);
  });
}
extern "C" pld_status pld_seq_rm(pld_kv *kv, int32_t seq, int32_t p0, int32_t p1) {
  return pld::guard([&] {
    pld_status status = PLD_OK;
    pld::Slots *slots = slots_of(kv, &status);
    return slots == nullptr ? status : slots->remove(seq, p0, p1);
  });
}
extern "C" pld_status pld_seq_keep(pld_kv *kv, int32_t seq) {
  return pld::guard([&] {
    pld_status status = PLD_OK;
    pld::Slots *slots = slots_of(kv, &status);
    return slots == nullptr ? status : slots->keep(seq);
  });
}
extern "C" int32_t pld_seq_pos_max(const pld_kv *kv, int32_t seq) {
  return kv == nullptr || kv->slots == nullptr ? -1 : kv->slots->pos_max(seq);
}
extern "C" int64_t pld_kv_free_cells(const pld_kv *kv) {
  return kv == nullptr || kv->slots == nullptr ? -1 : kv->slots->free_cells();
}
extern "C" pld_status pld_request_free(pld_kv *kv, int32_t seq) {
  return pld::guard([&] {
    if (kv != nullptr && kv->slots == nullptr) return pld::fail(PLD_INVALID_SEQ, "sequence %d is not known", seq);
    pld_status status = PLD_OK;
    pld::Slots *slots = slots_of(kv, &status);
    return slots == nullptr ? status : slots->remove(seq, 0, -1);
  });
}
