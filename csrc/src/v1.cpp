#include "v1.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "error.hpp"
#include "sized.hpp"

namespace pld {
namespace {

constexpr int kMaxIn = 3, kMaxOut = 2, kMaxWeights = 2;

// The first header's op, and the one that followed it: with columns of outputs.
struct OpV1 {
  int32_t kind;
  int32_t in[kMaxIn], in_col[kMaxIn], in_width[kMaxIn];
  int32_t out[kMaxOut], out_width[kMaxOut];
  int32_t weight[kMaxWeights];
  int32_t i[6];
  float f[4];
};
struct OpV2 {
  int32_t kind;
  int32_t in[kMaxIn], in_col[kMaxIn], in_width[kMaxIn];
  int32_t out[kMaxOut], out_col[kMaxOut], out_width[kMaxOut];
  int32_t weight[kMaxWeights];
  int32_t i[6];
  float f[4];
};
static_assert(sizeof(OpV1) == 104 && sizeof(OpV2) == 112, "frozen");

struct WeightV1 {
  const void *data;
  int64_t rows, cols;
  int32_t dtype, layout;
};
struct OpCallV1 {
  size_t struct_size;
  const void *op;
  int64_t rows;
  const float *in[kMaxIn];
  int64_t in_stride[kMaxIn];
  float *out[kMaxOut];
  int64_t out_stride[kMaxOut];
  WeightV1 weight[kMaxWeights];
  const pld_batch *batch;
  pld_kv *kv;
};
static_assert(sizeof(OpCallV1) == 184 && sizeof(OpCallV1) != sizeof(pld_op_call), "told apart by their sizes");

template <typename Op>
pld_op op_of(const void *given) {
  Op old;
  std::memcpy(&old, given, sizeof old);
  pld_op op = {};
  op.kind = old.kind;
  std::fill_n(op.in, PLD_MAX_IN, -1);
  std::fill_n(op.weight, PLD_MAX_WEIGHTS, -1);
  std::copy_n(old.in, kMaxIn, op.in);
  std::copy_n(old.in_col, kMaxIn, op.in_col);
  std::copy_n(old.in_width, kMaxIn, op.in_width);
  std::copy_n(old.out, kMaxOut, op.out);
  std::copy_n(old.out_width, kMaxOut, op.out_width);
  std::copy_n(old.weight, kMaxWeights, op.weight);
  std::copy_n(old.i, 6, op.i);
  std::copy_n(old.f, 4, op.f);
  if constexpr (sizeof(Op) == sizeof(OpV2)) std::copy_n(old.out_col, kMaxOut, op.out_col);
  return op;
}

// Neither of the two layouts says its size. But an op by itself, and the first of a program, writes its first output,
// which has a width, from column 0: what is the width in the one layout, and the column in the other, says which it is.
bool is_first_version(const void *op) {
  static_assert(offsetof(OpV1, out_width) == offsetof(OpV2, out_col), "");
  int32_t width_or_column;
  std::memcpy(&width_or_column, static_cast<const char *>(op) + offsetof(OpV1, out_width), sizeof width_or_column);
  return width_or_column != 0;
}

}  // namespace

pld_status read_ops(const void *ops, size_t op_size, int64_t count, const char *list, std::vector<pld_op> *out) {
  if (op_size != 0) {
    if (pld_status status = check_size<pld_op>(op_size, "op_size")) return status;
    return read_elements(ops, op_size, count, list, out);
  }
  const bool first = is_first_version(ops);
  const size_t stride = first ? sizeof(OpV1) : sizeof(OpV2);
  for (int64_t i = 0; i < count; ++i) {
    const void *op = static_cast<const char *>(ops) + static_cast<size_t>(i) * stride;
    out->push_back(first ? op_of<OpV1>(op) : op_of<OpV2>(op));
  }
  return PLD_OK;
}

static pld_status read_op_call_v1(const pld_op_call *given, OpCall *out) {
  OpCallV1 old;
  std::memcpy(&old, given, sizeof old);
  pld_op_call &call = out->call;
  call.struct_size = sizeof call;
  call.rows = old.rows;
  std::copy_n(old.in, kMaxIn, call.in);
  std::copy_n(old.in_stride, kMaxIn, call.in_stride);
  std::copy_n(old.out, kMaxOut, call.out);
  std::copy_n(old.out_stride, kMaxOut, call.out_stride);
  call.batch = old.batch;
  call.kv = old.kv;
  if (old.op == nullptr) return PLD_OK;
  if (pld_status status = read_ops(old.op, 0, 1, "op", &out->op)) return status;
  for (int i = 0; i < kMaxWeights; ++i)
    if (out->op[0].weight[i] >= 0) read_fields(&old.weight[i], sizeof(WeightV1), &out->weight[i]);
  return PLD_OK;
}

pld_status read_op_call(const pld_op_call *given, OpCall *out) {
  size_t size = 0;
  if (given != nullptr) std::memcpy(&size, given, sizeof size);
  if (size == sizeof(OpCallV1)) return read_op_call_v1(given, out);
  if (pld_status status = read_sized(given, &out->call)) return status;
  const pld_op_call &call = out->call;
  if (call.op == nullptr) return PLD_OK;
  if (pld_status status = read_ops(call.op, call.op_size, 1, "op", &out->op)) return status;
  size_t stride = 0;
  if (pld_status status = read_stride<pld_weight>(call.weight_size, "weight_size", &stride)) return status;
  for (int i = 0; i < PLD_MAX_WEIGHTS && call.weights != nullptr; ++i) {
    if (out->op[0].weight[i] < 0) continue;
    const void *weight = reinterpret_cast<const char *>(call.weights) + static_cast<size_t>(i) * stride;
    if (!read_fields(weight, stride, &out->weight[i]))
      return fail(PLD_INVALID_ARGUMENT, "weights[%d] has %zu bytes: unknown fields behind byte %zu are set", i, stride,
                  sizeof(pld_weight));
  }
  return PLD_OK;
}

}  // namespace pld

// ---- params by value: what callers built against older headers call. The first versions of the structs, since a
// caller
// ---- has room for no more.

extern "C" {

struct pld_context_params_v1 {
  size_t struct_size;
  int32_t num_threads, isa, spin_us, padding;
};
struct pld_kv_params_v1 {
  size_t struct_size;
  int32_t n_layers, n_kv_heads, head_dim, block_size, n_blocks, dtype;
};
struct pld_model_params_v1 {
  size_t struct_size;
  int32_t max_tokens, max_logit_rows;
};
struct pld_verify_params_v1 {
  size_t struct_size;
  int64_t bytes_per_second;
  const volatile int32_t *stop;
  int32_t idle, reserved;
};
static_assert(sizeof(pld_context_params_v1) == 24 && sizeof(pld_kv_params_v1) == 32 &&
                  sizeof(pld_model_params_v1) == 16 && sizeof(pld_verify_params_v1) == 32,
              "frozen");

PLD_API pld_context_params_v1 pld_context_default_params(void);
PLD_API pld_kv_params_v1 pld_kv_default_params(void);
PLD_API pld_model_params_v1 pld_model_default_params(void);
PLD_API pld_verify_params_v1 pld_verify_default_params(void);
}

template <typename Old, typename New>
static Old old_defaults(pld_status (*init)(New *, size_t)) {
  New now = {};
  init(&now, sizeof now);
  now.struct_size = sizeof(Old);
  Old old;
  std::memcpy(&old, &now, sizeof old);
  return old;
}

pld_context_params_v1 pld_context_default_params(void) {
  return old_defaults<pld_context_params_v1>(pld_context_params_init);
}
pld_kv_params_v1 pld_kv_default_params(void) { return old_defaults<pld_kv_params_v1>(pld_kv_params_init); }
pld_model_params_v1 pld_model_default_params(void) { return old_defaults<pld_model_params_v1>(pld_model_params_init); }
pld_verify_params_v1 pld_verify_default_params(void) {
  return old_defaults<pld_verify_params_v1>(pld_verify_params_init);
}
