// Decoding by sequence: a batch of tokens in any order becomes the flat batch that programs run, on either layout.
#include <algorithm>
#include <map>
#include <numeric>
#include <tuple>

#include "error.hpp"
#include "kv.hpp"
#include "program.hpp"
#include "sequences.hpp"
#include "sized.hpp"

namespace pld {
namespace {

constexpr size_t kStepsBetweenLooks = 8;  // at the caller's flag: about a layer
constexpr int32_t kMaxMore = 1 << 24;     // further sequences of all tokens of a batch

// A flat batch and what its pointers point to.
struct FlatBatch {
  std::vector<int32_t> token_ids, positions, query_start, seq_lens, logit_rows;
  std::vector<int64_t> slot_mapping;
  std::vector<int32_t> tables;
  pld_batch batch = {};

  void finish(int32_t width, const int32_t *block_tables) {
    batch.struct_size = sizeof batch;
    batch.n_tokens = static_cast<int32_t>(token_ids.size());
    batch.n_seqs = static_cast<int32_t>(seq_lens.size());
    batch.n_logit_rows = static_cast<int32_t>(logit_rows.size());
    batch.block_table_width = width;
    batch.token_ids = token_ids.data();
    batch.positions = positions.data();
    batch.query_start = query_start.data();
    batch.seq_lens = seq_lens.data();
    batch.block_tables = block_tables;
    batch.slot_mapping = slot_mapping.data();
    batch.logit_rows = logit_rows.data();
  }
};

// A batch that has been looked at by itself: positions known, rows in the order in which they are computed.
struct Work {
  const pld_decode_batch &asked;
  std::vector<int32_t> position;  // of each token
  std::vector<int32_t> sequence;  // of each token: place in `ids`
  std::vector<int32_t> ids;       // the batch's sequences in order of first appearance
  std::vector<int32_t> order;     // tokens by sequence, then position
  std::vector<int32_t> wanted;    // tokens whose logits are wanted, ascending
  std::vector<int32_t> row;       // of each token: its place in `order`
};

pld_status check_token(const pld_program &p, const pld_decode_batch &b, int32_t t) {
  if (b.tokens[t] < 0 || b.tokens[t] >= p.vocab_size)
    return fail(PLD_INVALID_BATCH, "tokens[%d] is %d; it must be in [0, %d)", t, b.tokens[t], p.vocab_size);
  if (b.seq_ids[t] < 0) return fail(PLD_INVALID_BATCH, "seq_ids[%d] is %d; it must not be below 0", t, b.seq_ids[t]);
  if (b.positions != nullptr && (b.positions[t] < 0 || b.positions[t] > kMaxPosition))
    return fail(PLD_INVALID_BATCH, "positions[%d] is %d; it must be in [0, %d]", t, b.positions[t], kMaxPosition);
  return PLD_OK;
}

pld_status check_tokens(const pld_program &p, const pld_decode_batch &b) {
  if (b.n_tokens < 1 || b.n_tokens > p.max_rows[PLD_ROWS_T])
    return fail(PLD_INVALID_BATCH, "n_tokens is %d; it must be in [1, %lld]", b.n_tokens,
                static_cast<long long>(p.max_rows[PLD_ROWS_T]));
  if (b.tokens == nullptr || b.seq_ids == nullptr) return fail(PLD_INVALID_BATCH, "tokens or seq_ids is null");
  for (int32_t t = 0; t < b.n_tokens; ++t)
    if (pld_status status = check_token(p, b, t)) return blame(PLD_ITEM_TOKEN, t, status);
  return PLD_OK;
}

// The further sequences of a token: [begin, end) of more_seq_ids.
struct MoreSequences {
  const int32_t *begin_, *end_;
  const int32_t *begin() const { return begin_; }
  const int32_t *end() const { return end_; }
};

MoreSequences more_of(const pld_decode_batch &b, size_t t) {
  if (b.more_start == nullptr) return {nullptr, nullptr};
  return {b.more_seq_ids + b.more_start[t], b.more_seq_ids + b.more_start[t + 1]};
}

pld_status check_more_sequences(const pld_decode_batch &b) {
  if (b.more_start == nullptr) return PLD_OK;
  if (b.more_start[0] != 0) return fail(PLD_INVALID_BATCH, "more_start[0] is %d; it must be 0", b.more_start[0]);
  for (int32_t t = 0; t < b.n_tokens; ++t) {
    const int32_t begin = b.more_start[t], end = b.more_start[t + 1];
    if (end < begin || end > kMaxMore)
      return blame(
          PLD_ITEM_TOKEN, t,
          fail(PLD_INVALID_BATCH, "more_start[%d] is %d; it must be in [%d, %d]", t + 1, end, begin, kMaxMore));
    if (end > begin && b.more_seq_ids == nullptr) return fail(PLD_INVALID_BATCH, "more_seq_ids is null");
    for (int32_t i = begin; i < end; ++i)
      if (b.more_seq_ids[i] < 0)
        return blame(PLD_ITEM_TOKEN, t,
                     fail(PLD_INVALID_BATCH, "more_seq_ids[%d] is %d; it must not be below 0", i, b.more_seq_ids[i]));
  }
  return PLD_OK;
}

// The position behind all that a sequence has.
int64_t next_position(const Sequences &sequences, int32_t seq) {
  const auto at = sequences.slot.find(seq);
  return at == sequences.slot.end() ? 0 : static_cast<int64_t>(at->second.positions.back()) + 1;
}

pld_status place_tokens(const pld_kv &kv, Work &work) {
  const pld_decode_batch &b = work.asked;
  std::unordered_map<int32_t, int32_t> index;
  std::vector<int64_t> next;
  std::unordered_map<int32_t, int64_t> shared;  // sequences that got a cell of another's token: the position behind it
  for (int32_t t = 0; t < b.n_tokens; ++t) {
    const auto [at, is_new] = index.emplace(b.seq_ids[t], static_cast<int32_t>(work.ids.size()));
    if (is_new) {
      work.ids.push_back(b.seq_ids[t]);
      next.push_back(b.positions == nullptr ? next_position(*kv.sequences, b.seq_ids[t]) : 0);
    }
    work.sequence.push_back(at->second);
    int64_t position = 0;
    if (b.positions != nullptr) {
      position = b.positions[t];
    } else {
      int64_t &coming = next[static_cast<size_t>(at->second)];
      const auto behind = shared.find(b.seq_ids[t]);
      if (behind != shared.end()) coming = std::max(coming, behind->second);
      position = coming++;
      for (const int32_t seq : more_of(b, static_cast<size_t>(t))) shared[seq] = std::max(shared[seq], position + 1);
    }
    if (kv.layout == PLD_KV_BLOCK) {
      if (b.context_lens[t] < 1 || (b.positions != nullptr && b.context_lens[t] != position + 1))
        return blame(PLD_ITEM_TOKEN, t,
                     fail(PLD_INVALID_BATCH, "context_lens[%d] is %d; it must be the token's position + 1", t,
                          b.context_lens[t]));
      position = b.context_lens[t] - 1;
    }
    if (position > kMaxPosition)
      return blame(PLD_ITEM_TOKEN, t,
                   fail(PLD_INVALID_BATCH, "the next position of sequence %d is %lld; the limit is %d", b.seq_ids[t],
                        static_cast<long long>(position), kMaxPosition));
    work.position.push_back(static_cast<int32_t>(position));
  }
  return PLD_OK;
}

void order_tokens(Work &work) {
  work.order.resize(work.position.size());
  std::iota(work.order.begin(), work.order.end(), 0);
  const auto key = [&](int32_t t) {
    return std::make_pair(work.sequence[static_cast<size_t>(t)], work.position[static_cast<size_t>(t)]);
  };
  std::stable_sort(work.order.begin(), work.order.end(), [&](int32_t a, int32_t b) { return key(a) < key(b); });
  work.row.resize(work.order.size());
  for (size_t row = 0; row < work.order.size(); ++row)
    work.row[static_cast<size_t>(work.order[row])] = static_cast<int32_t>(row);
}

pld_status choose_logits(const pld_program &p, Work &work) {
  const pld_decode_batch &b = work.asked;
  for (int32_t t = 0; t < b.n_tokens; ++t)
    if (b.logits == nullptr ? t + 1 == b.n_tokens : b.logits[t] != 0) work.wanted.push_back(t);
  if (static_cast<int64_t>(work.wanted.size()) > p.max_rows[PLD_ROWS_L])
    return fail(PLD_INVALID_BATCH, "logits are wanted for %zu tokens; the program has %lld rows", work.wanted.size(),
                static_cast<long long>(p.max_rows[PLD_ROWS_L]));
  return PLD_OK;
}

void fill_rows(const Work &work, FlatBatch &flat) {
  for (const int32_t t : work.order) {
    flat.token_ids.push_back(work.asked.tokens[t]);
    flat.positions.push_back(work.position[static_cast<size_t>(t)]);
  }
  for (const int32_t t : work.wanted) flat.logit_rows.push_back(work.row[static_cast<size_t>(t)]);
}

// ---- SLOT ----------------------------------------------------------------------------------------------------------

// Cells of a batch, given back unless it was computed.
class Placement {
 public:
  Placement(Sequences &sequences, const Work &work) : sequences_(sequences), work_(work) {}
  ~Placement() {
    for (size_t i = n_placed_; i-- > 0;) {
      const auto t = static_cast<size_t>(work_.order[i]);
      for (const int32_t seq : more_of(work_.asked, t)) sequences_.remove(seq, work_.position[t]);
      sequences_.remove(work_.ids[static_cast<size_t>(work_.sequence[t])], work_.position[t]);
    }
  }
  void place(std::vector<int64_t> &slot_mapping) {
    for (const int32_t t : work_.order) {
      const auto at = static_cast<size_t>(t);
      ++n_placed_;
      const int32_t seq = work_.ids[static_cast<size_t>(work_.sequence[at])];
      slot_mapping.push_back(sequences_.insert(seq, work_.position[at]));
      for (const int32_t other : more_of(work_.asked, at))
        sequences_.share(other, work_.position[at], static_cast<int32_t>(slot_mapping.back()));
    }
  }
  void keep() { n_placed_ = 0; }

 private:
  Sequences &sequences_;
  const Work &work_;
  size_t n_placed_ = 0;
};

// Each place of a sequence that a batch fills, its further sequences included, is filled once and was empty.
pld_status check_shared_positions(const Sequences &sequences, const Work &work) {
  if (work.asked.more_start == nullptr) return PLD_OK;
  struct Place {
    int32_t seq, position, token;
    bool operator<(const Place &other) const {
      return std::tie(seq, position, token) < std::tie(other.seq, other.position, other.token);
    }
  };
  std::vector<Place> places;
  for (const int32_t t : work.order) {
    const auto at = static_cast<size_t>(t);
    places.push_back({work.asked.seq_ids[t], work.position[at], t});
    for (const int32_t seq : more_of(work.asked, at)) {
      const auto held = sequences.slot.find(seq);
      if (held != sequences.slot.end() && held->second.holds(work.position[at]))
        return blame(PLD_ITEM_TOKEN, t,
                     fail(PLD_INVALID_BATCH, "positions[%d] is %d, which its further sequence %d holds already", t,
                          work.position[at], seq));
      places.push_back({seq, work.position[at], t});
    }
  }
  std::sort(places.begin(), places.end());
  for (size_t i = 1; i < places.size(); ++i)
    if (places[i].seq == places[i - 1].seq && places[i].position == places[i - 1].position)
      return blame(PLD_ITEM_TOKEN, places[i].token,
                   fail(PLD_INVALID_BATCH, "position %d of sequence %d is given twice, by tokens %d and %d",
                        places[i].position, places[i].seq, places[i - 1].token, places[i].token));
  return PLD_OK;
}

pld_status check_positions(const pld_kv &kv, const Work &work) {
  const Sequences &sequences = *kv.sequences;
  for (size_t row = 0; row < work.order.size(); ++row) {
    const auto t = static_cast<size_t>(work.order[row]);
    const int32_t seq = work.ids[static_cast<size_t>(work.sequence[t])], position = work.position[t];
    const auto at = sequences.slot.find(seq);
    if (at != sequences.slot.end() && at->second.holds(position))
      return blame(PLD_ITEM_TOKEN, work.order[row],
                   fail(PLD_INVALID_BATCH, "positions[%zu] is %d, which sequence %d holds already", t, position, seq));
    if (row == 0) continue;
    const auto before = static_cast<size_t>(work.order[row - 1]);
    if (work.sequence[before] == work.sequence[t] && work.position[before] == position)
      return blame(PLD_ITEM_TOKEN, work.order[row],
                   fail(PLD_INVALID_BATCH, "positions[%zu] is %d, which positions[%zu] of sequence %d is too", t,
                        position, before, seq));
  }
  if (pld_status status = check_shared_positions(sequences, work)) return status;
  if (static_cast<int64_t>(work.order.size()) > sequences.cells.n_free())
    return fail(PLD_NO_SPACE, "the batch has %zu tokens; %lld cells are free", work.order.size(),
                static_cast<long long>(sequences.cells.n_free()));
  return PLD_OK;
}

// Rows [begin, end) of one table: `cells` cells, the first of which stands at `from` of the sequence.
struct Span {
  size_t begin, end, from, cells;
  const SlotSequence *sequence;
};

// Cuts the rows into spans of neighbouring cells of one sequence. With `window`, rows of a sequence with holes are
// spans of their own, whose tables begin where the window does: the kernel counts cells, a window counts positions.
std::vector<Span> cut_spans(const Sequences &sequences, const Work &work, int64_t window) {
  std::vector<Span> spans;
  for (size_t row = 0; row < work.order.size(); ++row) {
    const auto t = static_cast<size_t>(work.order[row]);
    const SlotSequence &s = sequences.slot.at(work.ids[static_cast<size_t>(work.sequence[t])]);
    const size_t rank = s.first_at_or_behind(work.position[t]);
    const bool alone = window > 0 && !s.is_dense();
    if (!alone && !spans.empty() && spans.back().sequence == &s && spans.back().cells == rank) {
      spans.back().end = row + 1;
      spans.back().cells = rank + 1;
      continue;
    }
    const size_t from = alone ? s.first_at_or_behind(static_cast<int64_t>(work.position[t]) - window + 1) : 0;
    spans.push_back({row, row + 1, from, rank + 1 - from, &s});
  }
  return spans;
}

void fill_spans(const std::vector<Span> &spans, FlatBatch &flat) {
  size_t width = 0;
  for (const Span &span : spans) width = std::max(width, span.cells);
  flat.tables.resize(width * spans.size());
  flat.query_start.push_back(0);
  for (size_t r = 0; r < spans.size(); ++r) {
    const Span &span = spans[r];
    const auto cells = span.sequence->cells.begin() + static_cast<std::ptrdiff_t>(span.from);
    std::copy(cells, cells + static_cast<std::ptrdiff_t>(span.cells),
              flat.tables.begin() + static_cast<std::ptrdiff_t>(r * width));
    flat.query_start.push_back(static_cast<int32_t>(span.end));
    flat.seq_lens.push_back(static_cast<int32_t>(span.cells));
  }
  flat.finish(static_cast<int32_t>(width), flat.tables.data());
}

// The batches that layers with a window need where a sequence of the batch has holes, by window.
std::map<int32_t, FlatBatch> windowed_batches(const pld_program &p, const Sequences &sequences, const Work &work,
                                              const FlatBatch &plain) {
  std::map<int32_t, FlatBatch> batches;
  const bool holes =
      std::any_of(work.ids.begin(), work.ids.end(), [&](int32_t seq) { return !sequences.slot.at(seq).is_dense(); });
  for (const pld_op &op : p.ops) {
    if (!holes || op.kind != PLD_OP_ATTENTION || op.i[4] <= 0 || batches.count(op.i[4]) != 0) continue;
    FlatBatch &batch = batches[op.i[4]];
    batch.token_ids = plain.token_ids;
    batch.positions = plain.positions;
    batch.slot_mapping = plain.slot_mapping;
    batch.logit_rows = plain.logit_rows;
    fill_spans(cut_spans(sequences, work, op.i[4]), batch);
  }
  return batches;
}

// ---- BLOCK ---------------------------------------------------------------------------------------------------------

pld_status check_metadata(const pld_decode_batch &b) {
  if (b.slot_mapping == nullptr || b.block_tables == nullptr || b.context_lens == nullptr || b.block_table_width < 1)
    return fail(PLD_INVALID_BATCH, "a BLOCK cache needs slot_mapping, block_tables and context_lens");
  return PLD_OK;
}

// A sequence's table is its last token's; what its other tokens say of their past must be the same.
pld_status take_table(const pld_kv &kv, const Work &work, size_t begin, size_t end, FlatBatch &flat) {
  const pld_decode_batch &b = work.asked;
  const int64_t width = b.block_table_width;
  const int32_t *last = b.block_tables + work.order[end - 1] * width;
  for (size_t row = begin; row + 1 < end; ++row) {
    const int32_t t = work.order[row];
    const int32_t *table = b.block_tables + t * width;
    const int64_t used = (b.context_lens[t] - 1) / kv.block_size + 1;
    for (int64_t w = 0; w < std::min(used, width); ++w)
      if (table[w] != last[w])
        return blame(PLD_ITEM_TOKEN, t,
                     fail(PLD_INVALID_BATCH, "block_tables[%d][%lld] is %d; a later token of the sequence has %d", t,
                          static_cast<long long>(w), table[w], last[w]));
  }
  flat.tables.insert(flat.tables.end(), last, last + width);
  flat.seq_lens.push_back(b.context_lens[work.order[end - 1]]);
  flat.query_start.push_back(static_cast<int32_t>(end));
  return PLD_OK;
}

// What the flat batch was refused for, in the caller's order: of a sequence its last token.
pld_status blame_token(const Work &work, const FlatBatch &flat, pld_status status) {
  int64_t index = -1;
  switch (pld_last_error_item(&index)) {
    case PLD_ITEM_TOKEN:
      return blame(PLD_ITEM_TOKEN, work.order[static_cast<size_t>(index)], status);
    case PLD_ITEM_SEQUENCE: {
      const int32_t end = flat.query_start[static_cast<size_t>(index) + 1];
      return blame(PLD_ITEM_TOKEN, work.order[static_cast<size_t>(end) - 1], status);
    }
    case PLD_ITEM_LOGIT_ROW:
      return blame(PLD_ITEM_TOKEN, work.wanted[static_cast<size_t>(index)], status);
    default:
      return status;
  }
}

pld_status fill_blocks(const pld_program &p, const pld_kv &kv, const Work &work, CellMarks &marks, FlatBatch &flat) {
  flat.query_start.push_back(0);
  for (const int32_t t : work.order) flat.slot_mapping.push_back(work.asked.slot_mapping[t]);
  for (size_t begin = 0, row = 1; row <= work.order.size(); ++row) {
    const auto of = [&](size_t r) { return work.sequence[static_cast<size_t>(work.order[r])]; };
    if (row < work.order.size() && of(row) == of(begin)) continue;
    if (pld_status status = take_table(kv, work, begin, row, flat)) return status;
    begin = row;
  }
  flat.finish(work.asked.block_table_width, flat.tables.data());
  const pld_status status = check_batch(flat.batch, kv, batch_limits(p), marks);
  return status == PLD_OK ? status : blame_token(work, flat, status);
}

// New sequences of a batch, forgotten unless it was computed.
class Entrance {
 public:
  explicit Entrance(Sequences &sequences) : sequences_(sequences) {}
  ~Entrance() {
    for (const int32_t seq : fresh_) sequences_.known.erase(seq);
  }
  void enter(const Work &work) {
    fresh_.reserve(work.ids.size());
    for (const int32_t seq : work.ids)
      if (sequences_.known.insert(seq).second) fresh_.push_back(seq);
  }
  void keep() { fresh_.clear(); }

 private:
  Sequences &sequences_;
  std::vector<int32_t> fresh_;
};

// ---- both ----------------------------------------------------------------------------------------------------------

bool is_aborted(const pld_decode_batch &asked) { return asked.abort != nullptr && *asked.abort != 0; }

pld_status run_steps_of(pld_program &p, const pld_decode_batch &asked, bool with_logits) {
  if (asked.abort == nullptr) {
    run_parts(p, 0, with_logits ? 1 : 0);
    return PLD_OK;
  }
  for (int part = 0; part <= (with_logits ? 1 : 0); ++part)
    for (size_t step = 0; step < p.steps[part].size(); step += kStepsBetweenLooks) {
      if (is_aborted(asked)) return fail(PLD_ABORTED, "the caller asked to stop");
      run_some(p, part, step, std::min(p.steps[part].size(), step + kStepsBetweenLooks));
    }
  return PLD_OK;
}

// Nobody finds rows of a run that did not end.
void forget_rows(pld_program &p) {
  p.rows_left = 0;
  p.hidden_index.clear();
  p.logit_index.clear();
}

pld_status run_work(pld_program &p, pld_kv &kv, const Work &work, const FlatBatch &flat,
                    const std::map<int32_t, FlatBatch> &windowed) {
  std::vector<int32_t> hidden_index = work.row, logit_index(work.order.size(), -1);
  for (size_t l = 0; l < work.wanted.size(); ++l)
    logit_index[static_cast<size_t>(work.wanted[l])] = static_cast<int32_t>(l);
  bind_batch(p, flat.batch, &kv);
  for (OpArgs &args : p.args)
    if (args.op->kind == PLD_OP_ATTENTION)
      if (const auto at = windowed.find(args.op->i[4]); at != windowed.end()) args.batch = &at->second.batch;
  if (is_aborted(work.asked)) return fail(PLD_ABORTED, "the caller asked to stop");
  forget_rows(p);
  if (pld_status status = run_steps_of(p, work.asked, !work.wanted.empty())) return status;
  p.rows_left = work.asked.n_tokens;
  p.hidden_index = std::move(hidden_index);
  p.logit_index = std::move(logit_index);
  return PLD_OK;
}

pld_status decode_slot(pld_program &p, pld_kv &kv, const Work &work) {
  if (pld_status status = check_positions(kv, work)) return status;
  FlatBatch flat;
  fill_rows(work, flat);
  Placement placement(*kv.sequences, work);
  placement.place(flat.slot_mapping);
  fill_spans(cut_spans(*kv.sequences, work, 0), flat);
  const auto windowed = windowed_batches(p, *kv.sequences, work, flat);
  if (pld_status status = run_work(p, kv, work, flat, windowed)) return status;
  placement.keep();
  return PLD_OK;
}

pld_status decode_block(pld_program &p, pld_kv &kv, const Work &work) {
  FlatBatch flat;
  fill_rows(work, flat);
  if (pld_status status = fill_blocks(p, kv, work, p.marks, flat)) return status;
  Entrance entrance(*kv.sequences);
  entrance.enter(work);
  // A cell that is written again may be one that other steps see.
  CellBackup backup(kv, work.asked.abort != nullptr ? flat.slot_mapping : std::vector<int64_t>{});
  if (pld_status status = run_work(p, kv, work, flat, {})) return status;
  backup.drop();
  entrance.keep();
  return PLD_OK;
}

bool has_metadata(const pld_decode_batch &b) {
  return b.slot_mapping != nullptr || b.block_tables != nullptr || b.context_lens != nullptr;
}

pld_status decode(pld_program *p, pld_kv *kv, const pld_decode_batch *given) {
  if (p == nullptr || kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "program or kv is null");
  std::lock_guard<std::mutex> lock(p->context->mutex);
  std::lock_guard<std::mutex> sequences_lock(kv->sequences->mutex);
  if (pld_status status = check_layers(*p, *kv)) return status;
  pld_decode_batch batch = {};
  if (read_sized(given, &batch) != PLD_OK) return PLD_INVALID_BATCH;
  decide_layout(*kv, has_metadata(batch) ? PLD_KV_BLOCK : PLD_KV_SLOT);
  if (kv->layout == PLD_KV_BLOCK) {
    if (batch.more_start != nullptr)
      return fail(PLD_NOT_SUPPORTED, "more_start: a BLOCK cache has no tokens of several sequences; SLOT has them");
    if (pld_status status = check_metadata(batch)) return status;
  }
  if (pld_status status = check_tokens(*p, batch)) return status;
  if (pld_status status = check_more_sequences(batch)) return status;
  Work work{batch, {}, {}, {}, {}, {}, {}};
  if (pld_status status = place_tokens(*kv, work)) return status;
  order_tokens(work);
  if (pld_status status = choose_logits(*p, work)) return status;
  return kv->layout == PLD_KV_SLOT ? decode_slot(*p, *kv, work) : decode_block(*p, *kv, work);
}

const float *row_data(const pld_program *p, const std::vector<int32_t> &rows, int32_t i, int32_t buffer) {
  if (i < 0 || static_cast<size_t>(i) >= rows.size() || rows[static_cast<size_t>(i)] < 0) return nullptr;
  return buffer_data(p, buffer) +
         static_cast<int64_t>(rows[static_cast<size_t>(i)]) * p->buffers[static_cast<size_t>(buffer)].width;
}

}  // namespace
}  // namespace pld

extern "C" pld_status pld_decode(pld_program *program, pld_kv *kv, const pld_decode_batch *batch) {
  return pld::guard([&] { return pld::decode(program, kv, batch); });
}
extern "C" const float *pld_logits_of(const pld_program *program, int32_t i) {
  return program == nullptr ? nullptr : pld::row_data(program, program->logit_index, i, program->logits);
}
extern "C" const float *pld_hidden_of(const pld_program *program, int32_t i) {
  return program == nullptr ? nullptr : pld::row_data(program, program->hidden_index, i, program->hidden);
}
