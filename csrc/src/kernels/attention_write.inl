// Stage 0 of attention: new keys and values go to their units of the cache.
#include "../kv.hpp"

namespace pld {
namespace PLD_ISA_NS {

struct AttentionShape {
  int64_t e;      // E
  int64_t width;  // E rounded up to vectors
  int64_t words;  // K words of a position
  int64_t heads_per_group;
  int64_t n_kv_heads;
  float scale, softcap;
  int64_t window;
  bool bf16;  // pairs of bfloat16 are multiplied
};

PLD_INLINE AttentionShape attention_shape(const OpArgs &args) {
  const pld_op &op = *args.op;
  AttentionShape s;
  s.e = op.i[3];
  s.width = (s.e + kLanes - 1) / kLanes * kLanes;
  s.bf16 = args.kv->dtype != PLD_F32;
  s.words = s.bf16 ? s.e / 2 : s.e;
  s.n_kv_heads = op.i[2];
  s.heads_per_group = op.i[1] / op.i[2];
  s.scale = op.f[0];
  s.softcap = op.f[1];
  s.window = op.i[4];
  return s;
}

PLD_INLINE float int8_scale(const float *x, int64_t n) {
  const uint32_t bits = greatest_bits(x, n);
  float greatest;
  memcpy(&greatest, &bits, 4);
  return greatest / 127.0f;
}

// n values as cache numbers: the float's own bits, bfloat16, or int8 times `scale`.
PLD_INLINE void to_cache(const float *x, int64_t n, pld_dtype dtype, float scale, void *target) {
  if (dtype == PLD_F32) {
    memcpy(target, x, (size_t)n * 4);
  } else if (dtype == PLD_BF16) {
    uint16_t *half = (uint16_t *)target;
    for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(x[i]);
  } else {
    const float inverse = scale > 0.0f && 1.0f / scale < 3.0e38f ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < n; ++i) {
      const float rounded = (x[i] * inverse + 12582912.0f) - 12582912.0f;
      ((int8_t *)target)[i] = rounded >= -127.0f && rounded <= 127.0f ? (int8_t)rounded : 0;
    }
  }
}

// Numbers of `bytes` bytes: in[i] to out[i * stride].
template <typename Number>
PLD_INLINE void spread(const void *in, int64_t n, void *out, int64_t stride) {
  for (int64_t i = 0; i < n; ++i) ((Number *)out)[i * stride] = ((const Number *)in)[i];
}

// Where the unit of the first kv head lies that token t is written to; null: it stands in a shared block already.
PLD_INLINE char *unit_of_token(const OpArgs &args, int64_t t) {
  const pld_kv &kv = *args.kv;
  const int64_t cell = args.batch->slot_mapping[t];
  if (cell < 0) return nullptr;
  return (char *)kv.data + args.op->i[0] * kv.layer_bytes + cell / kLanes * kv.n_kv_heads * kv.unit_bytes;
}

// Keys are transposed: a token's are written to as many lines as it has words, and each would be waited for.
PLD_INLINE void prefetch_row(const OpArgs &args, int64_t t) {
  const pld_kv &kv = *args.kv;
  const char *unit = unit_of_token(args, t);
  if (unit == nullptr) return;
  const int64_t lane = args.batch->slot_mapping[t] % kLanes, per_word = kv.dtype == PLD_F32 ? 1 : 2;
  const int64_t row_bytes = kv.value_width * per_word * kv.value_bytes;
  for (int64_t g = 0; g < kv.n_kv_heads; ++g, unit += kv.unit_bytes) {
    for (int64_t b = 0; b < kv.v_offset; b += 64) __builtin_prefetch(unit + b, 1);
    for (int64_t b = 0; b < row_bytes; b += 64)
      __builtin_prefetch(unit + kv.v_offset + lane / per_word * row_bytes + b, 1);
  }
}

static void write_row(const OpArgs &args, int64_t t) {
  char *unit = unit_of_token(args, t);
  if (unit == nullptr) return;
  const AttentionShape s = attention_shape(args);
  const pld_kv &kv = *args.kv;
  const int64_t lane = args.batch->slot_mapping[t] % kLanes;
  alignas(64) float row[2048];
  for (int64_t g = 0; g < s.n_kv_heads; ++g, unit += kv.unit_bytes)
    for (int part = 0; part < 2; ++part) {
      const float *x = args.in[1 + part] + t * args.in_stride[1 + part] + g * s.e;
      char *to = unit + (part == 0 ? 0 : kv.v_offset);
      const float scale = kv.dtype == PLD_I8 ? int8_scale(x, s.e) : 1.0f;
      to_cache(x, s.e, kv.dtype, scale, row);
      if (kv.dtype == PLD_I8) memcpy(unit + kv.scale_offset + (part * kLanes + lane) * 4, &scale, 4);
      if (kv.dtype == PLD_F32)
        spread<uint32_t>(row, s.e, to + (part == 0 ? lane : lane * kv.value_width) * 4, part == 0 ? kLanes : 1);
      else if (part == 0 && kv.dtype == PLD_BF16)
        spread<uint32_t>(row, s.e / 2, to + lane * 4, kLanes);
      else if (part == 0)
        spread<uint16_t>(row, s.e / 2, to + lane * 2, kLanes);
      else if (kv.dtype == PLD_BF16)
        spread<uint16_t>(row, s.e, to + (lane / 2 * kv.value_width * 2 + lane % 2) * 2, 2);
      else
        spread<uint8_t>(row, s.e, to + lane / 2 * kv.value_width * 2 + lane % 2, 2);
    }
}

}  // namespace PLD_ISA_NS
}  // namespace pld
