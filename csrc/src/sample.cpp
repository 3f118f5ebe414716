// Sampling: the edits of a row of logits, and the chain that narrows and draws. One task a row.
//
// Order and ties, so that a result is a function of the row alone: tokens stand in descending order of logit, equal
// ones by ascending id; top_k keeps all that are at least the k-th greatest; top_p keeps the shortest prefix whose mass
// reaches p of what top_k left; min_p keeps what is at least min_p times as likely as the greatest. The draw is the
// first id, ascending, at which the cumulative mass exceeds the uniform number times the whole. Weights are float32,
// sums float64.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "context.hpp"
#include "error.hpp"
#include "sized.hpp"

namespace pld {
namespace {

constexpr float kMinTemperature = 1e-30f;  // below it all mass is on the greatest logits anyway

// A float as an integer that ascends as the float descends; both zeros are one.
uint32_t descending_key(float x) {
  uint32_t bits;
  x += 0.0f;
  std::memcpy(&bits, &x, 4);
  return (bits & 0x80000000u) != 0 ? bits : ~(bits | 0x80000000u);
}

// ---- Philox4x32-10: Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405 ------------------------------------

double uniform(uint64_t seed, uint64_t position, uint32_t choice) {
  uint32_t c[4] = {static_cast<uint32_t>(position), static_cast<uint32_t>(position >> 32), choice, 0};
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c[0], b = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<uint32_t>(a)};
    std::memcpy(c, next, sizeof c);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (static_cast<double>(c[0] >> 5) * 67108864.0 + static_cast<double>(c[1] >> 6)) * 0x1p-53;
}

// ---- Edits ---------------------------------------------------------------------------------------------------------

// A row's own copy of its logits, and what narrowing works on.
struct Work {
  std::vector<float> logits, weights;
  std::vector<int32_t> ids, some;
};

template <typename Visit>
void each_id(const int32_t *ids, int32_t count, int32_t vocab, Visit &&visit) {
  for (int32_t i = 0; i < count; ++i)
    if (ids[i] >= 0 && ids[i] < vocab) visit(ids[i], i);
}

bool edits(const pld_sample_row &row) {
  return (row.repetition_penalty != 1.0f && row.n_seen > 0) ||
         ((row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f) && row.n_counted > 0) || row.n_biases > 0 ||
         row.n_banned > 0 || row.n_allowed >= 0 || row.mask != nullptr ||
         (row.n_stops > 0 && row.position < static_cast<uint64_t>(std::max(row.min_tokens, 0)));
}

void keep_allowed(const pld_sample_row &row, int32_t vocab, std::vector<float> &x, std::vector<float> &spare) {
  spare.assign(static_cast<size_t>(vocab), -INFINITY);
  each_id(row.allowed_ids, row.n_allowed, vocab,
          [&](int32_t id, int32_t) { spare[static_cast<size_t>(id)] = x[static_cast<size_t>(id)]; });
  x.swap(spare);
}

void edit(const pld_sample_row &row, int32_t vocab, Work &work) {
  std::vector<float> &x = work.logits;
  const auto ban = [&](const int32_t *ids, int32_t count) {
    each_id(ids, count, vocab, [&](int32_t id, int32_t) { x[static_cast<size_t>(id)] = -INFINITY; });
  };
  if (row.repetition_penalty != 1.0f)
    each_id(row.seen_ids, row.n_seen, vocab, [&](int32_t id, int32_t) {
      float &logit = x[static_cast<size_t>(id)];
      logit = logit > 0 ? logit / row.repetition_penalty : logit * row.repetition_penalty;
    });
  if (row.frequency_penalty != 0.0f || row.presence_penalty != 0.0f)
    each_id(row.counted_ids, row.n_counted, vocab, [&](int32_t id, int32_t i) {
      float &logit = x[static_cast<size_t>(id)];
      logit = logit - row.frequency_penalty * row.counts[i];
      logit = logit - row.presence_penalty;
    });
  each_id(row.bias_ids, row.n_biases, vocab,
          [&](int32_t id, int32_t i) { x[static_cast<size_t>(id)] += row.biases[i]; });
  ban(row.banned_ids, row.n_banned);
  if (row.n_allowed >= 0) keep_allowed(row, vocab, x, work.weights);
  for (int32_t id = 0; row.mask != nullptr && id < vocab; ++id)
    if ((row.mask[id / 32] >> (id % 32) & 1u) == 0) x[static_cast<size_t>(id)] = -INFINITY;
  if (row.position < static_cast<uint64_t>(std::max(row.min_tokens, 0))) ban(row.stop_ids, row.n_stops);
}

// ---- The chain: `ids` are the tokens that are left, ascending, `weights` theirs by id ------------------------------

template <typename Keep>
void narrow(std::vector<int32_t> &ids, Keep &&keep) {
  ids.erase(std::remove_if(ids.begin(), ids.end(), [&](int32_t id) { return !keep(id); }), ids.end());
}

// All ids whose logit is at least the k-th greatest of the row.
void apply_top_k(const float *x, int32_t vocab, int32_t k, float max, std::vector<int32_t> &ids,
                 std::vector<float> &some) {
  for (float window : {4.0f, 8.0f, 16.0f, 32.0f, INFINITY}) {
    ids.clear();
    some.clear();
    for (int32_t id = 0; id < vocab; ++id)
      if (x[id] >= max - window) ids.push_back(id);
    if (static_cast<int64_t>(ids.size()) >= k) break;
  }
  for (int32_t id : ids) some.push_back(x[id]);
  const auto place = some.begin() + std::min<int64_t>(k, static_cast<int64_t>(some.size())) - 1;
  std::nth_element(some.begin(), place, some.end(), [](float a, float b) { return a > b; });
  const float least = *place;
  narrow(ids, [&](int32_t id) { return x[id] >= least; });
}

// The shortest prefix whose mass reaches p: the bin of the key in which that happens, three times finer, then by id.
void apply_top_p(const float *x, const float *weights, double p, std::vector<int32_t> &ids,
                 std::vector<int32_t> &some) {
  double total = 0.0;
  for (int32_t id : ids) total += static_cast<double>(weights[id]);
  const double wanted = std::max(p * total, std::numeric_limits<double>::min());  // above 0: one token stays
  double above = 0.0;
  // What weighs less than this adds up to less than 1 - p: it cannot be needed.
  const auto floor = static_cast<float>((1.0 - p) * total / static_cast<double>(ids.size()));
  some.clear();
  for (int32_t id : ids)
    if (weights[id] >= floor) some.push_back(id);
  uint32_t prefix = 0;
  for (int shift : {21, 10, 0}) {
    const uint32_t bins = shift == 0 ? 1024 : 2048;
    double mass[2048] = {};
    for (int32_t id : some) mass[descending_key(x[id]) >> shift & (bins - 1)] += static_cast<double>(weights[id]);
    uint32_t last = 0, bin = 0;
    for (double reached = above; bin < bins; ++bin) {
      if (mass[bin] > 0.0) last = bin;
      reached += mass[bin];
      if (reached >= wanted) break;
    }
    bin = bin < bins ? bin : last;  // where rounding left a little over
    for (uint32_t b = 0; b < bin; ++b) above += mass[b];
    prefix |= bin << shift;
    narrow(some, [&](int32_t id) { return (descending_key(x[id]) >> shift & (bins - 1)) == bin; });
  }
  // `some` are now the tokens of one logit: as many as are needed, by ascending id.
  int32_t last_id = some.empty() ? -1 : some.back();
  for (int32_t id : some) {
    above += static_cast<double>(weights[id]);
    if (above >= wanted) {
      last_id = id;
      break;
    }
  }
  narrow(ids, [&](int32_t id) {
    const uint32_t key = descending_key(x[id]);
    return key < prefix || (key == prefix && id <= last_id);
  });
}

int32_t draw(const float *weights, const std::vector<int32_t> &ids, double number) {
  double total = 0.0, reached = 0.0;
  int32_t last = ids.front();
  for (int32_t id : ids) total += static_cast<double>(weights[id]);
  const double target = number * total;
  for (int32_t id : ids) {
    if (weights[id] <= 0.0f) continue;
    last = id;
    reached += static_cast<double>(weights[id]);
    if (reached > target) break;
  }
  return last;
}

int32_t choose(const KernelTable &table, const float *x, int32_t vocab, const RowScan &scan, const pld_sample_row &row,
               Work &work) {
  if (row.temperature == 0.0f || row.top_k == 1) return scan.argmax;
  work.weights.resize(static_cast<size_t>(vocab));
  table.weigh_row(x, vocab, scan.max, std::max(row.temperature, kMinTemperature), work.weights.data());
  const float *weights = work.weights.data();
  std::vector<float> values;
  if (row.top_k > 0 && row.top_k < vocab) {
    apply_top_k(x, vocab, row.top_k, scan.max, work.ids, values);
  } else {
    work.ids.clear();
    for (int32_t id = 0; id < vocab; ++id)
      if (weights[id] > 0.0f) work.ids.push_back(id);
  }
  if (row.top_p < 1.0) apply_top_p(x, weights, row.top_p, work.ids, work.some);
  if (row.min_p > 0.0f) narrow(work.ids, [&](int32_t id) { return weights[id] >= row.min_p; });
  return draw(weights, work.ids, uniform(row.seed, row.position, row.choice));
}

pld_sample_result sample_row(const KernelTable &table, const float *x, int32_t vocab, const pld_sample_row &row) {
  RowScan scan = table.scan_row(x, vocab);
  pld_sample_result result = {-1, PLD_SAMPLED, scan.any_nan ? NAN : scan.max, NAN};
  if (scan.any_nan || !std::isfinite(scan.max)) {
    result.status = PLD_SAMPLE_NOT_FINITE;
    return result;
  }
  if (row.wants_log_sum_exp != 0) result.log_sum_exp = std::log(table.sum_exp(x, vocab, scan.max));
  static thread_local Work work;
  if (edits(row)) {
    work.logits.assign(x, x + vocab);
    edit(row, vocab, work);
    x = work.logits.data();
    scan = table.scan_row(x, vocab);
    if (scan.any_nan || !std::isfinite(scan.max)) {
      const bool is_overflow = scan.any_nan || scan.max > 0.0f;
      result.status = is_overflow ? PLD_SAMPLE_OVERFLOW : PLD_SAMPLE_NONE_LEFT;
      return result;
    }
  }
  result.token = choose(table, x, vocab, scan, row, work);
  return result;
}

pld_status check_lists(const pld_sample_row &row, int32_t index) {
  const struct {
    const char *name;
    int32_t count;
    const void *data;
  } lists[] = {{"seen", row.n_seen, row.seen_ids},          {"counted", row.n_counted, row.counted_ids},
               {"counts", row.n_counted, row.counts},       {"bias", row.n_biases, row.bias_ids},
               {"biases", row.n_biases, row.biases},        {"banned", row.n_banned, row.banned_ids},
               {"allowed", row.n_allowed, row.allowed_ids}, {"stop", row.n_stops, row.stop_ids}};
  for (const auto &list : lists)
    if (list.count > 0 && list.data == nullptr)
      return fail(PLD_INVALID_ARGUMENT, "rows[%d]: %d %s ids, but no array", index, list.count, list.name);
  return PLD_OK;
}

// The ranges of pellucid/api/sampling_params.py: what is admitted there is taken here.
pld_status check_numbers(const pld_sample_row &row, int32_t index) {
  const struct {
    const char *name;
    double value, low, high;
    const char *range;
    bool is_open;  // the low end itself is refused
  } numbers[] = {{"repetition_penalty", row.repetition_penalty, PLD_MIN_REPETITION_PENALTY, 10.0, "[1e-06, 10]", false},
                 {"frequency_penalty", row.frequency_penalty, -2.0, 2.0, "[-2, 2]", false},
                 {"presence_penalty", row.presence_penalty, -2.0, 2.0, "[-2, 2]", false},
                 {"temperature", row.temperature, 0.0, 100.0, "[0, 100]", false},
                 {"top_p", row.top_p, 0.0, 1.0, "(0, 1]", true},
                 {"min_p", row.min_p, 0.0, 1.0, "[0, 1]", false}};
  for (const auto &number : numbers)
    if (!(number.low <= number.value && number.value <= number.high) || (number.is_open && number.value == number.low))
      return fail(PLD_INVALID_ARGUMENT, "rows[%d]: %s is %g; it must be in %s", index, number.name, number.value,
                  number.range);
  return PLD_OK;
}

pld_status read_row(const pld_sample_row *given, int32_t index, pld_sample_row *row) {
  if (given == nullptr) return fail(PLD_INVALID_ARGUMENT, "rows[%d] is null", index);
  if (pld_status status = read_sized(given, row)) return status;
  if (pld_status status = check_lists(*row, index)) return status;
  return check_numbers(*row, index);
}

pld_status sample(pld_context *context, const pld_sample_call *given) {
  pld_sample_call call = {};
  size_t result_size = 0;
  if (pld_status status = read_sized(given, &call)) return status;
  if (pld_status status = read_stride<pld_sample_result>(call.result_size, "result_size", &result_size)) return status;
  if (context == nullptr || call.logits == nullptr || call.rows == nullptr || call.results == nullptr)
    return fail(PLD_INVALID_ARGUMENT, "context, logits, rows or results is null");
  if (call.vocab_size < 1 || call.stride < call.vocab_size || call.n_rows < 1)
    return fail(PLD_INVALID_ARGUMENT, "vocab_size is %d, stride %lld and n_rows %d", call.vocab_size,
                static_cast<long long>(call.stride), call.n_rows);
  std::vector<pld_sample_row> rows(static_cast<size_t>(call.n_rows));
  for (int32_t i = 0; i < call.n_rows; ++i)
    if (pld_status status = read_row(call.rows[i], i, &rows[static_cast<size_t>(i)]))
      return blame(PLD_ITEM_SAMPLE_ROW, i, status);
  auto *results = reinterpret_cast<char *>(call.results);
  std::lock_guard<std::mutex> lock(context->mutex);
  parallel_for(*context, call.n_rows, [&](int64_t i) {
    const auto at = static_cast<size_t>(i);
    write_fields(sample_row(context->table, call.logits + i * call.stride, call.vocab_size, rows[at]),
                 results + at * result_size, result_size);
  });
  return PLD_OK;
}

}  // namespace
}  // namespace pld

extern "C" pld_status pld_sample_run(pld_context *context, const pld_sample_call *call) {
  return pld::guard([&] { return pld::sample(context, call); });
}
extern "C" pld_status pld_sample(pld_context *context, const float *logits, int64_t stride, int32_t vocab_size,
                                 const pld_sample_row *const *rows, int32_t n_rows, pld_sample_result *results) {
  const pld_sample_call call = {sizeof call, logits, stride, vocab_size, n_rows, rows, results, 0};
  return pld_sample_run(context, &call);
}
