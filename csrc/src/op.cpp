#include "op.hpp"

#include <algorithm>
#include <cmath>

#include "batch.hpp"
#include "context.hpp"
#include "error.hpp"
#include "kv.hpp"
#include "sized.hpp"
#include "strips.hpp"
#include "v1.hpp"

namespace pld {

namespace {

constexpr int32_t kMaxWidth = 1 << 26;
constexpr int32_t kMaxI8Cols = 1 << 16;  // so that a row's sum of products stays within an int32

struct Rule {
  const char *name;
  int n_in;           // operands that must be there
  int n_optional_in;  // more that may be
  int n_out;          // 2: the second is there iff the second input is
  int n_weights;
  int n_optional_weights;
};

constexpr Rule kRules[kNumOpKinds] = {
    {nullptr, 0, 0, 0, 0, 0},    {"embedding", 0, 0, 1, 1, 0},  {"linear", 1, 0, 1, 1, 1},
    {"rms_norm", 1, 1, 2, 1, 0}, {"layer_norm", 1, 1, 2, 1, 1}, {"rope_table", 0, 0, 1, 1, 0},
    {"rotary", 2, 0, 1, 0, 0},   {"attention", 3, 0, 1, 0, 0},  {"act_and_mul", 1, 0, 1, 0, 0},
    {"act", 1, 0, 1, 0, 0},      {"add", 2, 0, 1, 0, 0},        {"scale", 1, 0, 1, 0, 0},
    {"softcap", 1, 0, 1, 0, 0},  {"moe", 2, 0, 1, 2, 0},        {"gather_rows", 1, 0, 1, 0, 0},
    {"sample", 1, 0, 1, 0, 0},
};

pld_status check_presence(const pld_op &op, const Rule &rule, const pld_weight *const *weight) {
  for (int i = 0; i < PLD_MAX_IN; ++i) {
    bool present = op.in[i] >= 0;
    if (i < rule.n_in && !present) return fail(PLD_INVALID_ARGUMENT, "%s: input %d is absent", rule.name, i);
    if (i >= rule.n_in + rule.n_optional_in && present)
      return fail(PLD_INVALID_ARGUMENT, "%s takes no input %d", rule.name, i);
    if (present && (op.in_width[i] < 1 || op.in_width[i] > kMaxWidth || op.in_col[i] < 0))
      return fail(PLD_INVALID_ARGUMENT, "%s: input %d has column %d and width %d; the limit is %d", rule.name, i,
                  op.in_col[i], op.in_width[i], kMaxWidth);
  }
  for (int i = 0; i < PLD_MAX_OUT; ++i) {
    bool wanted = i == 0 || (rule.n_out == 2 && op.in[1] >= 0);
    if (wanted != (op.out[i] >= 0))
      return fail(PLD_INVALID_ARGUMENT, "%s: output %d must %sbe there", rule.name, i, wanted ? "" : "not ");
    if (wanted && (op.out_width[i] < 1 || op.out_width[i] > kMaxWidth || op.out_col[i] < 0))
      return fail(PLD_INVALID_ARGUMENT, "%s: output %d has column %d and width %d; the limit is %d", rule.name, i,
                  op.out_col[i], op.out_width[i], kMaxWidth);
  }
  for (int i = 0; i < PLD_MAX_WEIGHTS; ++i) {
    if (i < rule.n_weights && weight[i] == nullptr)
      return fail(PLD_INVALID_ARGUMENT, "%s: weight %d is absent", rule.name, i);
    if (i >= rule.n_weights + rule.n_optional_weights && weight[i] != nullptr)
      return fail(PLD_INVALID_ARGUMENT, "%s takes no weight %d", rule.name, i);
  }
  return PLD_OK;
}

pld_status check_matrix(const char *name, int i, const pld_weight *w, int64_t rows, int64_t cols, bool panels) {
  bool layout_fits = w->layout == PLD_PANELS || !panels;
  if (w->rows != rows || w->cols != cols || !layout_fits)
    return fail(PLD_INVALID_ARGUMENT, "%s: weight %d is [%lld, %lld] in layout %d; it must be [%lld, %lld] in panels",
                name, i, (long long)w->rows, (long long)w->cols, w->layout, (long long)rows, (long long)cols);
  return PLD_OK;
}

pld_status check_vector(const char *name, int i, const pld_weight *w, int64_t cols) {
  if (w == nullptr) return PLD_OK;
  if (w->rows != 1 || w->cols != cols || w->dtype != PLD_F32 || w->layout != PLD_ROW_MAJOR)
    return fail(PLD_INVALID_ARGUMENT, "%s: weight %d is [%lld, %lld]; it must be float32 [%lld]", name, i,
                (long long)w->rows, (long long)w->cols, (long long)cols);
  return PLD_OK;
}

pld_status need(bool condition, const char *name, const char *text) {
  return condition ? PLD_OK : fail(PLD_INVALID_ARGUMENT, "%s: %s", name, text);
}

bool valid_ids(int32_t ids) { return ids >= PLD_IDS_OF_THE_OP && ids <= PLD_IDS_POSITIONS; }

bool valid_act(int32_t act) { return act >= PLD_ACT_NONE && act <= PLD_ACT_RELU; }
bool positive(float value) { return std::isfinite(value) && value > 0; }

pld_status check_norm(const pld_op &op, const char *name, const pld_weight *const *weight) {
  int32_t groups = op.kind == PLD_OP_RMS_NORM ? op.i[0] : 1;
  bool same = op.out_width[0] == op.in_width[0] &&
              (op.in[1] < 0 || (op.in_width[1] == op.in_width[0] && op.out_width[1] == op.in_width[0]));
  if (pld_status s = need(same, name, "inputs and outputs must have one width")) return s;
  if (pld_status s =
          need(groups >= 1 && op.in_width[0] % std::max(groups, 1) == 0, name, "groups must divide the width"))
    return s;
  if (pld_status s = need(std::isfinite(op.f[0]) && op.f[0] >= 0, name, "eps must be finite and not negative"))
    return s;
  if (pld_status s = check_vector(name, 0, weight[0], op.in_width[0] / groups)) return s;
  return check_vector(name, 1, weight[1], op.in_width[0]);
}

pld_status check_attention(const pld_op &op, const char *name) {
  int64_t h = op.i[1], g = op.i[2], e = op.i[3];
  if (pld_status s = need(op.i[0] >= 0 && h >= 1 && g >= 1 && e >= 2 && h % g == 0 && e % 2 == 0 && op.i[4] >= 0, name,
                          "layer, heads, kv heads, even head width and window must fit"))
    return s;
  if (pld_status s = need(e <= 1024, name, "the head width must be at most 1024")) return s;
  if (pld_status s = need(std::isfinite(op.f[0]) && std::isfinite(op.f[1]) && op.f[1] >= 0, name,
                          "scale and softcap must be finite"))
    return s;
  return need(op.in_width[0] == h * e && op.in_width[1] == g * e && op.in_width[2] == g * e && op.out_width[0] == h * e,
              name, "q, k, v and output must be heads times head width wide");
}

pld_status check_moe(const pld_op &op, const char *name, const pld_weight *const *weight) {
  int64_t x = op.i[0], d = op.in_width[0];
  if (pld_status s =
          need(x >= 1 && x <= 512 && op.in_width[1] == x && op.i[1] >= 1 && op.i[1] <= x && valid_act(op.i[2]), name,
               "experts (at most 512), top_k and activation must fit the router"))
    return s;
  for (int i = 0; i < 2; ++i)
    if (pld_status s =
            need(weight[i]->dtype == PLD_F32 || weight[i]->dtype == PLD_BF16, name, "experts are float32 or bfloat16"))
      return s;
  int64_t f = weight[1]->cols;
  if (pld_status s = need(f <= kMaxWidth && f % 64 == 0 && d % 64 == 0 && op.out_width[0] == d, name,
                          "widths must be multiples of 64 and within the limit"))
    return s;
  if (pld_status s = check_matrix(name, 0, weight[0], x * 2 * f, d, true)) return s;
  return check_matrix(name, 1, weight[1], x * d, f, true);
}

pld_status check_shapes(const pld_op &op, const char *name, const pld_weight *const *weight) {
  const int32_t in0 = op.in_width[0], out0 = op.out_width[0];
  switch (op.kind) {
    case PLD_OP_EMBEDDING:
      if (pld_status s = need(valid_ids(op.i[0]), name, "unknown ids")) return s;
      return check_matrix(name, 0, weight[0], weight[0]->rows, out0, false);
    case PLD_OP_LINEAR:
      if (pld_status s = need(valid_act(op.i[0]), name, "unknown activation")) return s;
      if (pld_status s =
              need(weight[0]->dtype != PLD_I8 || in0 <= kMaxI8Cols, name, "an I8 row is at most 65,536 wide"))
        return s;
      if (pld_status s = check_matrix(name, 0, weight[0], out0, in0, true)) return s;
      return check_vector(name, 1, weight[1], out0);
    case PLD_OP_RMS_NORM:
    case PLD_OP_LAYER_NORM:
      return check_norm(op, name, weight);
    case PLD_OP_ROPE_TABLE:
      if (pld_status s = need(valid_ids(op.i[0]), name, "unknown ids")) return s;
      if (pld_status s = need(out0 % 2 == 0, name, "the table's width must be even")) return s;
      return check_vector(name, 0, weight[0], out0 / 2);
    case PLD_OP_ROTARY:
      return need(op.i[0] >= 2 && in0 % std::max(op.i[0], 1) == 0 && op.in_width[1] <= op.i[0] &&
                      op.in_width[1] % 2 == 0 && out0 == in0 && (op.i[1] == 0 || op.i[1] == 1),
                  name, "head width, table and widths must fit");
    case PLD_OP_ATTENTION:
      return check_attention(op, name);
    case PLD_OP_ACT_AND_MUL:
      return need(valid_act(op.i[0]) && in0 == 2 * out0, name, "the input must be twice as wide as the output");
    case PLD_OP_ACT:
      return need(valid_act(op.i[0]) && in0 == out0, name, "input and output must have one width");
    case PLD_OP_ADD:
      return need(in0 == out0 && op.in_width[1] == out0, name, "inputs and output must have one width");
    case PLD_OP_SCALE:
      return need(in0 == out0 && std::isfinite(op.f[0]), name, "widths must agree and the factor be finite");
    case PLD_OP_SOFTCAP:
      return need(in0 == out0 && positive(op.f[0]), name, "widths must agree and the cap be above 0");
    case PLD_OP_MOE:
      return check_moe(op, name, weight);
    case PLD_OP_GATHER_ROWS:
      return need(in0 == out0, name, "input and output must have one width");
    case PLD_OP_SAMPLE:
      return need(out0 == 4, name, "the output must be 4 wide");
    default:
      return fail(PLD_INVALID_ARGUMENT, "op kind %d is unknown", op.kind);
  }
}

}  // namespace

bool needs_batch(pld_op_kind kind) {
  return kind == PLD_OP_EMBEDDING || kind == PLD_OP_ROPE_TABLE || kind == PLD_OP_ATTENTION ||
         kind == PLD_OP_GATHER_ROWS;
}

pld_status check_op(const pld_op &op, const pld_weight *const *weight) {
  if (op.kind < 1 || op.kind >= kNumOpKinds) return fail(PLD_INVALID_ARGUMENT, "op kind %d is unknown", op.kind);
  const Rule &rule = kRules[op.kind];
  if (pld_status status = check_presence(op, rule, weight)) return status;
  return check_shapes(op, rule.name, weight);
}

pld_status check_weight(const pld_weight &w, int index) {
  const bool plain = w.dtype == PLD_F32 || w.dtype == PLD_BF16;
  if (w.data == nullptr || w.rows < 1 || w.cols < 1 || (w.layout != PLD_ROW_MAJOR && w.layout != PLD_PANELS) ||
      (!plain && (w.layout != PLD_PANELS || strip_format(w.dtype) == nullptr)))
    return fail(PLD_INVALID_ARGUMENT, "weight %d: data, shape [%lld, %lld], dtype %d or layout %d is invalid", index,
                (long long)w.rows, (long long)w.cols, w.dtype, w.layout);
  int64_t bytes = w.layout == PLD_PANELS ? pld_packed_bytes(w.rows, w.cols, w.dtype) : pld_row_bytes(w.dtype, w.cols);
  if (bytes == 0) return fail(PLD_INVALID_ARGUMENT, "weight %d: its size overflows", index);
  if (w.layout == PLD_PANELS && reinterpret_cast<uintptr_t>(w.data) % 64 != 0)
    return fail(PLD_INVALID_ARGUMENT, "weight %d is packed but not 64-byte aligned", index);
  if (w.layout == PLD_ROW_MAJOR && reinterpret_cast<uintptr_t>(w.data) % (w.dtype == PLD_F32 ? 4 : 2) != 0)
    return fail(PLD_INVALID_ARGUMENT, "weight %d is not aligned to its values", index);
  return PLD_OK;
}

// ---- single calls ------------------------------------------------------------------------------------------------

static pld_status check_surroundings(const OpCall &given, pld_batch *read, CellMarks &marks) {
  const pld_op_call &call = given.call;
  const pld_op &op = given.op[0];
  if (!needs_batch(op.kind)) return PLD_OK;
  if (pld_status status = read_sized(call.batch, read)) return status;
  const pld_batch &batch = *read;
  if (op.kind == PLD_OP_ATTENTION) {
    if (call.kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "attention: kv is null");
    const pld_kv &kv = *call.kv;
    if (op.i[0] >= kv.n_layers || op.i[2] != kv.n_kv_heads || op.i[3] != kv.head_dim)
      return fail(PLD_INVALID_ARGUMENT, "attention: layer %d, kv heads %d, head width %d; the cache has %d, %d, %d",
                  op.i[0], op.i[2], op.i[3], kv.n_layers, kv.n_kv_heads, kv.head_dim);
    if (batch.n_tokens != call.rows)
      return fail(PLD_INVALID_BATCH, "n_tokens is %d; rows is %lld", batch.n_tokens, (long long)call.rows);
    return check_batch(batch, kv, {call.rows, call.rows, 0}, marks);
  }
  if (op.kind == PLD_OP_GATHER_ROWS) {
    if (batch.n_logit_rows != call.rows || batch.logit_rows == nullptr)
      return fail(PLD_INVALID_BATCH, "n_logit_rows is %d; rows is %lld", batch.n_logit_rows, (long long)call.rows);
    for (int32_t l = 0; l < batch.n_logit_rows; ++l)
      if (batch.logit_rows[l] < 0 || batch.logit_rows[l] >= batch.n_tokens)
        return blame(PLD_ITEM_LOGIT_ROW, l,
                     fail(PLD_INVALID_BATCH, "logit_rows[%d] is %d; it must be in [0, %d)", l, batch.logit_rows[l],
                          batch.n_tokens));
    return PLD_OK;
  }
  const int32_t *ids = batch_ids(op, batch);
  if (batch.n_tokens != call.rows || ids == nullptr)
    return fail(PLD_INVALID_BATCH, "n_tokens is %d; rows is %lld", batch.n_tokens, (long long)call.rows);
  for (int32_t t = 0; op.kind == PLD_OP_EMBEDDING && t < batch.n_tokens; ++t)
    if (ids[t] < 0 || ids[t] >= given.weight[0].rows)
      return blame(PLD_ITEM_TOKEN, t,
                   fail(PLD_INVALID_BATCH, "%s[%d] is %d; it must be in [0, %lld)",
                        reads_positions(op) ? "positions" : "token_ids", t, ids[t], (long long)given.weight[0].rows));
  return PLD_OK;
}

static pld_status check_call(const OpCall &given, const pld_weight **weight) {
  const pld_op_call *call = &given.call;
  if (given.op.empty()) return fail(PLD_INVALID_ARGUMENT, "op is null");
  if (call->rows < 1 || call->rows > INT32_MAX)
    return fail(PLD_INVALID_ARGUMENT, "rows is %lld; it must be in [1, 2^31)", (long long)call->rows);
  const pld_op &op = given.op[0];
  for (int i = 0; i < PLD_MAX_WEIGHTS; ++i) {
    weight[i] = op.weight[i] >= 0 ? &given.weight[i] : nullptr;
    if (weight[i] != nullptr)
      if (pld_status status = check_weight(*weight[i], i)) return status;
  }
  if (pld_status status = check_op(op, weight)) return status;
  for (int i = 0; i < PLD_MAX_IN; ++i)
    if (op.in[i] >= 0 && (call->in[i] == nullptr || call->in_stride[i] < op.in_width[i]))
      return fail(PLD_INVALID_ARGUMENT, "input %d is null or its stride is below its width %d", i, op.in_width[i]);
  for (int i = 0; i < PLD_MAX_OUT; ++i)
    if (op.out[i] >= 0 && (call->out[i] == nullptr || call->out_stride[i] < op.out_width[i]))
      return fail(PLD_INVALID_ARGUMENT, "output %d is null or its stride is below its width %d", i, op.out_width[i]);
  return PLD_OK;
}

static pld_status run_call(pld_context *context, const pld_op_call *caller) {
  if (context == nullptr) return fail(PLD_INVALID_ARGUMENT, "context is null");
  OpCall given;
  if (pld_status status = read_op_call(caller, &given)) return status;
  const pld_weight *weight[PLD_MAX_WEIGHTS];
  if (pld_status status = check_call(given, weight)) return status;
  pld_batch batch = {};
  CellMarks marks;
  if (pld_status status = check_surroundings(given, &batch, marks)) return status;
  const pld_op_call *call = &given.call;
  const pld_op *op = given.op.data();
  OpArgs args = {};
  args.op = op;
  args.rows = call->rows;
  args.batch = &batch;
  args.kv = call->kv;
  for (int i = 0; i < PLD_MAX_IN; ++i) {
    args.in[i] = op->in[i] >= 0 ? call->in[i] : nullptr;
    args.in_stride[i] = call->in_stride[i];
    args.in_width[i] = op->in_width[i];
  }
  for (int i = 0; i < PLD_MAX_OUT; ++i) {
    args.out[i] = op->out[i] >= 0 ? call->out[i] : nullptr;
    args.out_stride[i] = call->out_stride[i];
    args.out_width[i] = op->out_width[i];
  }
  for (int i = 0; i < PLD_MAX_WEIGHTS; ++i) args.weight[i] = weight[i];
  std::lock_guard<std::mutex> lock(context->mutex);
  run_op(*context, args);
  return PLD_OK;
}

}  // namespace pld

extern "C" pld_status pld_op_run(pld_context *context, const pld_op_call *call) {
  return pld::guard([&] { return pld::run_call(context, call); });
}
