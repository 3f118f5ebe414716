#include "batch.hpp"

#include "error.hpp"
#include "kv.hpp"
#include "sized.hpp"

namespace pld {

static pld_status check_shape(const pld_batch &b, const BatchLimits &limits) {
  if (b.n_tokens < 1 || b.n_tokens > limits.max_tokens)
    return fail(PLD_INVALID_BATCH, "n_tokens is %d; it must be in [1, %lld]", b.n_tokens, (long long)limits.max_tokens);
  if (b.n_seqs < 1 || b.n_seqs > b.n_tokens)
    return fail(PLD_INVALID_BATCH, "n_seqs is %d; it must be in [1, n_tokens = %d]", b.n_seqs, b.n_tokens);
  if (b.n_logit_rows < 0 || b.n_logit_rows > limits.max_logit_rows)
    return fail(PLD_INVALID_BATCH, "n_logit_rows is %d; it must be in [0, %lld]", b.n_logit_rows,
                (long long)limits.max_logit_rows);
  if (b.block_table_width < 1)
    return fail(PLD_INVALID_BATCH, "block_table_width is %d; it must be at least 1", b.block_table_width);
  if (!b.token_ids || !b.positions || !b.query_start || !b.seq_lens || !b.block_tables || !b.slot_mapping ||
      (b.n_logit_rows > 0 && !b.logit_rows))
    return fail(PLD_INVALID_BATCH, "an array of the batch is null");
  if (b.query_start[0] != 0 || b.query_start[b.n_seqs] != b.n_tokens)
    return fail(PLD_INVALID_BATCH, "query_start runs from %d to %d; it must run from 0 to n_tokens = %d",
                b.query_start[0], b.query_start[b.n_seqs], b.n_tokens);
  return PLD_OK;
}

static pld_status check_rows(const pld_batch &b, const BatchLimits &limits) {
  for (int32_t t = 0; limits.vocab_size > 0 && t < b.n_tokens; ++t)
    if (b.token_ids[t] < 0 || b.token_ids[t] >= limits.vocab_size)
      return blame(PLD_ITEM_TOKEN, t,
                   fail(PLD_INVALID_BATCH, "token_ids[%d] is %d; it must be in [0, %lld)", t, b.token_ids[t],
                        (long long)limits.vocab_size));
  for (int32_t t = 0; limits.n_positions > 0 && t < b.n_tokens; ++t)
    if (b.positions[t] < 0 || b.positions[t] >= limits.n_positions)
      return blame(PLD_ITEM_TOKEN, t,
                   fail(PLD_INVALID_BATCH, "positions[%d] is %d; it must be in [0, %lld)", t, b.positions[t],
                        (long long)limits.n_positions));
  for (int32_t l = 0; l < b.n_logit_rows; ++l)
    if (b.logit_rows[l] < 0 || b.logit_rows[l] >= b.n_tokens)
      return blame(PLD_ITEM_LOGIT_ROW, l,
                   fail(PLD_INVALID_BATCH, "logit_rows[%d] is %d; it must be in [0, n_tokens = %d)", l, b.logit_rows[l],
                        b.n_tokens));
  return PLD_OK;
}

static pld_status check_table(const pld_batch &b, const pld_kv &kv, int32_t r) {
  const int32_t *table = b.block_tables + static_cast<int64_t>(r) * b.block_table_width;
  int64_t used = (static_cast<int64_t>(b.seq_lens[r]) + kv.block_size - 1) / kv.block_size;
  if (used > b.block_table_width)
    return fail(PLD_INVALID_BATCH, "seq_lens[%d] is %d and needs %lld blocks; block_table_width is %d", r,
                b.seq_lens[r], (long long)used, b.block_table_width);
  for (int64_t w = 0; w < used; ++w)
    if (table[w] < 0 || table[w] >= kv.n_blocks)
      return fail(PLD_INVALID_BATCH, "block_tables[%d][%lld] is %d; it must be in [0, %d)", r, (long long)w, table[w],
                  kv.n_blocks);
  return PLD_OK;
}

static pld_status check_sequence(const pld_batch &b, const pld_kv &kv, CellMarks &marks, int32_t r) {
  int32_t begin = b.query_start[r], end = b.query_start[r + 1];
  if (begin < 0 || end <= begin || end > b.n_tokens)
    return fail(PLD_INVALID_BATCH, "query_start[%d] is %d behind %d; it must ascend within n_tokens = %d", r + 1, end,
                begin, b.n_tokens);
  if (b.seq_lens[r] < end - begin)
    return blame(
        PLD_ITEM_SEQUENCE, r,
        fail(PLD_INVALID_BATCH, "seq_lens[%d] is %d; the step alone has %d tokens", r, b.seq_lens[r], end - begin));
  if (pld_status status = check_table(b, kv, r)) return blame(PLD_ITEM_SEQUENCE, r, status);
  const int32_t *table = b.block_tables + static_cast<int64_t>(r) * b.block_table_width;
  for (int32_t t = begin; t < end; ++t) {
    int32_t position = b.seq_lens[r] - (end - t);
    if (b.positions[t] != position)
      return blame(PLD_ITEM_TOKEN, t,
                   fail(PLD_INVALID_BATCH, "positions[%d] is %d; by seq_lens[%d] it must be %d", t, b.positions[t], r,
                        position));
    if (b.slot_mapping[t] == -1) continue;
    int64_t cell = static_cast<int64_t>(table[position / kv.block_size]) * kv.block_size + position % kv.block_size;
    if (b.slot_mapping[t] != cell)
      return blame(PLD_ITEM_TOKEN, t,
                   fail(PLD_INVALID_BATCH, "slot_mapping[%d] is %lld; by the block table it must be %lld, or -1", t,
                        (long long)b.slot_mapping[t], (long long)cell));
    if (!marks.mark(cell))  // which of the two is wrong cannot be told from here
      return fail(PLD_INVALID_BATCH, "slot_mapping[%d] is %lld, which another token of the batch writes", t,
                  (long long)cell);
  }
  return PLD_OK;
}

pld_status read_batch(const pld_batch *given, pld_batch *batch) {
  return read_sized(given, batch) == PLD_OK ? PLD_OK : PLD_INVALID_BATCH;
}

pld_status check_block_layout(const pld_kv &kv) {
  if (kv.layout == PLD_KV_BLOCK) return PLD_OK;
  return fail(PLD_NOT_SUPPORTED, "the cache's layout is SLOT: its cells are the core's; pld_decode writes them");
}

pld_status check_batch(const pld_batch &batch, const pld_kv &kv, const BatchLimits &limits, CellMarks &marks) {
  if (pld_status status = check_block_layout(kv)) return status;
  if (pld_status status = check_shape(batch, limits)) return status;
  if (pld_status status = check_rows(batch, limits)) return status;
  marks.reserve(kv.n_cells);
  marks.begin();
  for (int32_t r = 0; r < batch.n_seqs; ++r)
    if (pld_status status = check_sequence(batch, kv, marks, r)) return status;
  return PLD_OK;
}

}  // namespace pld
