// Decoding by sequence: tokens in any order become a batch, and on a SLOT cache the core finds their cells.
#include <cmath>
#include <map>
#include <vector>

#include "error.hpp"
#include "program.hpp"
#include "slots.hpp"

namespace pld {
namespace {

// A decode batch put in order: the tokens of a sequence lie together, sequences in the order of their first token.
struct Ordered {
  std::vector<int32_t> source;  // [T]: index in the caller's batch
  std::vector<int32_t> seq;     // [R]
  std::vector<int32_t> tokens, positions, query_start, seq_lens, tables, logit_rows;
  std::vector<int64_t> slots;
  int32_t width = 1;
};

pld_status check_arrays(const pld_program &p, const pld_kv &kv, const pld_decode_batch &b) {
  if (b.n_tokens < 1 || b.n_tokens > p.max_rows[PLD_ROWS_T])
    return fail(PLD_INVALID_BATCH, "n_tokens is %d; it must be in [1, %lld]", b.n_tokens,
                static_cast<long long>(p.max_rows[PLD_ROWS_T]));
  if (b.tokens == nullptr || b.seq_ids == nullptr) return fail(PLD_INVALID_BATCH, "tokens or seq_ids is null");
  if (kv.slots == nullptr &&
      (b.slot_mapping == nullptr || b.block_tables == nullptr || b.context_lens == nullptr || b.block_table_width < 1))
    return fail(PLD_INVALID_BATCH, "a BLOCK cache needs slot_mapping, block_tables and context_lens");
  for (int32_t t = 0; t < b.n_tokens; ++t) {
    if (b.tokens[t] < 0 || b.tokens[t] >= p.vocab_size)
      return fail(PLD_INVALID_BATCH, "tokens[%d] is %d; it must be in [0, %d)", t, b.tokens[t], p.vocab_size);
    if (b.seq_ids[t] < 0) return fail(PLD_INVALID_BATCH, "seq_ids[%d] is %d; ids are not negative", t, b.seq_ids[t]);
    if (b.positions != nullptr && b.positions[t] < 0)
      return fail(PLD_INVALID_BATCH, "positions[%d] is %d; positions are not negative", t, b.positions[t]);
  }
  return PLD_OK;
}

void order_tokens(const pld_decode_batch &b, Ordered *o) {
  std::map<int32_t, size_t> place;
  std::vector<std::vector<int32_t>> members;
  for (int32_t t = 0; t < b.n_tokens; ++t) {
    auto [found, is_new] = place.emplace(b.seq_ids[t], members.size());
    if (is_new) {
      members.emplace_back();
      o->seq.push_back(b.seq_ids[t]);
    }
    members[found->second].push_back(t);
  }
  o->query_start.push_back(0);
  for (const auto &list : members) {
    for (int32_t t : list) {
      o->source.push_back(t);
      o->tokens.push_back(b.tokens[t]);
    }
    o->query_start.push_back(static_cast<int32_t>(o->source.size()));
  }
}

pld_status choose_logits(const pld_program &p, const pld_decode_batch &b, Ordered *o, std::vector<int32_t> *index) {
  index->assign(static_cast<size_t>(b.n_tokens), -1);
  for (size_t row = 0; row < o->source.size(); ++row) {
    const int32_t t = o->source[row];
    if (b.logits != nullptr ? b.logits[t] == 0 : t != b.n_tokens - 1) continue;
    (*index)[static_cast<size_t>(t)] = static_cast<int32_t>(o->logit_rows.size());
    o->logit_rows.push_back(static_cast<int32_t>(row));
  }
  if (static_cast<int64_t>(o->logit_rows.size()) > p.max_rows[PLD_ROWS_L])
    return fail(PLD_INVALID_BATCH, "%zu rows of logits are wanted; the limit is %lld", o->logit_rows.size(),
                static_cast<long long>(p.max_rows[PLD_ROWS_L]));
  return PLD_OK;
}

// Positions, cells and tables of a SLOT cache. Nothing is taken yet.
pld_status place_slots(const Slots &slots, const pld_decode_batch &b, Ordered *o) {
  const size_t n_seqs = o->seq.size();
  if (static_cast<int64_t>(b.n_tokens) > slots.free_cells())
    return fail(PLD_NO_SPACE, "%d cells are needed; %lld are free", b.n_tokens,
                static_cast<long long>(slots.free_cells()));
  for (size_t r = 0; r < n_seqs; ++r) {
    const Slots::Sequence *past = slots.find(o->seq[r]);
    o->width = std::max(
        o->width, static_cast<int32_t>(past == nullptr ? 0 : past->size()) + o->query_start[r + 1] - o->query_start[r]);
  }
  o->tables.assign(n_seqs * static_cast<size_t>(o->width), -1);
  for (size_t r = 0; r < n_seqs; ++r) {
    const Slots::Sequence *past = slots.find(o->seq[r]);
    int32_t *table = o->tables.data() + r * static_cast<size_t>(o->width), length = 0;
    int32_t last = slots.pos_max(o->seq[r]);
    if (past != nullptr)
      for (const auto &entry : *past) table[length++] = entry.second;
    for (int32_t row = o->query_start[r]; row < o->query_start[r + 1]; ++row) {
      const int32_t t = o->source[static_cast<size_t>(row)];
      const int32_t position = b.positions == nullptr ? last + 1 : b.positions[t];
      if (position <= last)
        return fail(PLD_INVALID_BATCH, "positions[%d] is %d; sequence %d has come to %d", t, position, o->seq[r], last);
      const int32_t cell = slots.peek(row);
      last = position;
      table[length++] = cell;
      o->positions.push_back(position);
      o->slots.push_back(cell);
    }
    o->seq_lens.push_back(length);
  }
  return PLD_OK;
}

// The same from the caller's metadata; check_batch looks at it later.
pld_status place_blocks(const pld_decode_batch &b, Ordered *o) {
  o->width = b.block_table_width;
  for (size_t r = 0; r < o->seq.size(); ++r) {
    for (int32_t row = o->query_start[r]; row < o->query_start[r + 1]; ++row) {
      const int32_t t = o->source[static_cast<size_t>(row)];
      if (b.context_lens[t] < 1)
        return fail(PLD_INVALID_BATCH, "context_lens[%d] is %d; it must be at least 1", t, b.context_lens[t]);
      o->positions.push_back(b.positions == nullptr ? b.context_lens[t] - 1 : b.positions[t]);
      o->slots.push_back(b.slot_mapping[t]);
    }
    const int32_t last = o->source[static_cast<size_t>(o->query_start[r + 1]) - 1];
    const int32_t *table = b.block_tables + static_cast<int64_t>(last) * b.block_table_width;
    o->tables.insert(o->tables.end(), table, table + b.block_table_width);
    o->seq_lens.push_back(b.context_lens[last]);
  }
  return PLD_OK;
}

pld_batch batch_of(const Ordered &o) {
  pld_batch batch = {};
  batch.struct_size = sizeof batch;
  batch.n_tokens = static_cast<int32_t>(o.source.size());
  batch.n_seqs = static_cast<int32_t>(o.seq.size());
  batch.n_logit_rows = static_cast<int32_t>(o.logit_rows.size());
  batch.block_table_width = o.width;
  batch.token_ids = o.tokens.data();
  batch.positions = o.positions.data();
  batch.query_start = o.query_start.data();
  batch.seq_lens = o.seq_lens.data();
  batch.block_tables = o.tables.data();
  batch.slot_mapping = o.slots.data();
  batch.logit_rows = o.logit_rows.data();
  return batch;
}

pld_status decode(pld_program *p, pld_kv *kv, const pld_decode_batch *b) {
  if (p == nullptr || kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "program or kv is null");
  if (check_size(b, "decode_batch") != PLD_OK) return PLD_INVALID_BATCH;
  std::lock_guard<std::mutex> lock(p->context->mutex);
  if (pld_status status = check_arrays(*p, *kv, *b)) return status;
  Ordered ordered;
  std::vector<int32_t> index;
  order_tokens(*b, &ordered);
  if (pld_status status = choose_logits(*p, *b, &ordered, &index)) return status;
  if (pld_status status = kv->slots != nullptr ? place_slots(*kv->slots, *b, &ordered) : place_blocks(*b, &ordered))
    return status;
  if (b->abort != nullptr && *b->abort != 0) return fail(PLD_ABORTED, "the caller asked to stop");
  if (pld_status status = run_prepared(*p, *kv, batch_of(ordered), kv->slots == nullptr)) return status;
  for (size_t r = 0; kv->slots != nullptr && r < ordered.seq.size(); ++r)
    for (int32_t row = ordered.query_start[r]; row < ordered.query_start[r + 1]; ++row)
      kv->slots->put(ordered.seq[r], ordered.positions[static_cast<size_t>(row)]);
  p->logit_index = std::move(index);
  return PLD_OK;
}

// ---- Shifts --------------------------------------------------------------------------------------------------------

// The rotation that the keys of a layer have gone through.
struct Rotation {
  const float *frequencies = nullptr;  // [half]; null: none
  int32_t half = 0;
  bool neighbours = false;
};

const pld_op *writer_of(const pld_program &p, int32_t buffer, size_t before) {
  for (size_t i = before; i-- > 0;)
    if (p.ops[i].out[0] == buffer || p.ops[i].out[1] == buffer) return &p.ops[i];
  return nullptr;
}

std::map<int32_t, Rotation> rotations_of(const pld_program &p) {
  std::map<int32_t, Rotation> found;
  for (size_t i = 0; i < p.ops.size(); ++i) {
    if (p.ops[i].kind != PLD_OP_ATTENTION) continue;
    Rotation &rotation = found[p.ops[i].i[0]];
    const pld_op *rotary = writer_of(p, p.ops[i].in[1], i);
    if (rotary == nullptr || rotary->kind != PLD_OP_ROTARY) continue;
    const pld_op *table = writer_of(p, rotary->in[1], i);
    if (table == nullptr || table->kind != PLD_OP_ROPE_TABLE) continue;
    const pld_weight &weight = p.weights[static_cast<size_t>(table->weight[0])];
    rotation = {static_cast<const float *>(weight.data), static_cast<int32_t>(weight.cols), rotary->i[1] != 0};
  }
  return found;
}

void rotate_keys(const Rotation &rotation, int32_t delta, int32_t n_heads, int32_t width, float *keys) {
  for (int32_t j = 0; j < rotation.half; ++j) {
    const double angle = static_cast<double>(delta) * static_cast<double>(rotation.frequencies[j]);
    const auto c = static_cast<float>(std::cos(angle)), s = static_cast<float>(std::sin(angle));
    for (int32_t g = 0; g < n_heads; ++g) {
      float *head = keys + g * width;
      float &x = head[rotation.neighbours ? 2 * j : j], &y = head[rotation.neighbours ? 2 * j + 1 : j + rotation.half];
      const float before = x;
      x = x * c - y * s;
      y = y * c + before * s;
    }
  }
}

pld_status add(pld_program *p, pld_kv *kv, int32_t seq, int32_t p0, int32_t p1, int32_t delta) {
  if (p == nullptr || kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "program or kv is null");
  if (kv->slots == nullptr) return fail(PLD_NOT_SUPPORTED, "sequence operations need a SLOT cache");
  std::lock_guard<std::mutex> lock(p->context->mutex);
  std::vector<int32_t> positions, cells;
  if (pld_status status = kv->slots->check_shift(seq, p0, p1, delta, &positions)) return status;
  if (delta == 0) return PLD_OK;
  const Slots::Sequence &sequence = *kv->slots->find(seq);
  int64_t shared = 0;
  for (int32_t position : positions) shared += kv->slots->is_shared(sequence.at(position)) ? 1 : 0;
  if (shared > kv->slots->free_cells())
    return fail(PLD_NO_SPACE, "%lld cells are needed; %lld are free", static_cast<long long>(shared),
                static_cast<long long>(kv->slots->free_cells()));
  const auto rotations = rotations_of(*p);
  std::vector<float> keys(static_cast<size_t>(kv->n_kv_heads) * static_cast<size_t>(kv->head_dim)), values(keys.size());
  for (int32_t position : positions) {
    int32_t cell = sequence.at(position);
    if (kv->slots->is_shared(cell)) {
      const int32_t own = kv->slots->replace_shared(cell);
      copy_cell(*kv, cell, own);
      cell = own;
    }
    for (const auto &[layer, rotation] : rotations) {
      if (rotation.frequencies == nullptr) continue;
      pld_kv_read(kv, layer, cell, keys.data(), values.data());
      rotate_keys(rotation, delta, kv->n_kv_heads, kv->head_dim, keys.data());
      store_keys(*kv, layer, cell, keys.data());
    }
    cells.push_back(cell);
  }
  kv->slots->shift(seq, positions, delta, cells);
  return PLD_OK;
}

}  // namespace
}  // namespace pld

extern "C" pld_status pld_decode(pld_program *program, pld_kv *kv, const pld_decode_batch *batch) {
  return pld::guard([&] { return pld::decode(program, kv, batch); });
}
extern "C" const float *pld_logits_of(const pld_program *program, int32_t index) {
  if (program == nullptr || index < 0 || static_cast<size_t>(index) >= program->logit_index.size()) return nullptr;
  const int32_t row = program->logit_index[static_cast<size_t>(index)];
  return row < 0 ? nullptr : pld_program_logits_data(program) + static_cast<int64_t>(row) * program->vocab_size;
}
extern "C" pld_status pld_seq_add(pld_program *program, pld_kv *kv, int32_t seq, int32_t p0, int32_t p1,
                                  int32_t delta) {
  return pld::guard([&] { return pld::add(program, kv, seq, p0, p1, delta); });
}
