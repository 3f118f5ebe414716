// Exact widening of every storage type to float32, a block at a time: the block formats of GGUF
// (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Each product is rounded where the reference rounds it:
// scale times sub-scale first, then times the quant, then the offset; -ffp-contract=off keeps it so. Included by
// convert.cpp alone.
#pragma once

#include <cstdint>
#include <cstring>

#include "pellucid.h"

namespace pld {

struct StorageType {
  const char *name;
  int64_t block_values;
  int64_t block_bytes;
  // n_blocks blocks to n_blocks * block_values floats; `source` has any alignment.
  void (*widen)(const uint8_t *source, int64_t n_blocks, float *target);
};

// bfloat16, rounded to nearest even; a NaN stays a NaN.
inline uint16_t round_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  uint32_t nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Exact for every half: a subnormal half becomes a float's subnormal pattern and is scaled up.
inline float from_f16(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  float scaled = from_bits(magnitude << 13) * from_bits(0x77800000u);  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &scaled, 4);
  bits = magnitude >= 0x7c00u ? (magnitude << 13) | 0x7f800000u : bits;
  return from_bits(bits | sign);
}

inline uint16_t load_u16(const uint8_t *source) {
  uint16_t value;
  std::memcpy(&value, source, 2);
  return value;
}
inline float load_f16(const uint8_t *source) { return from_f16(load_u16(source)); }

inline void widen_f32(const uint8_t *source, int64_t n, float *target) {
  std::memcpy(target, source, static_cast<size_t>(n) * 4);
}
inline void widen_bf16(const uint8_t *source, int64_t n, float *target) {
  for (int64_t i = 0; i < n; ++i) target[i] = from_bits(static_cast<uint32_t>(load_u16(source + 2 * i)) << 16);
}
inline void widen_f16(const uint8_t *source, int64_t n, float *target) {
  for (int64_t i = 0; i < n; ++i) target[i] = load_f16(source + 2 * i);
}

// d, 32 signed bytes.
inline void widen_q8_0(const uint8_t *source, int64_t n, float *target) {
  for (int64_t b = 0; b < n; ++b, source += 34, target += 32) {
    float d = load_f16(source);
    for (int i = 0; i < 32; ++i) target[i] = static_cast<float>(static_cast<int8_t>(source[2 + i])) * d;
  }
}

// d, (m), (32 high bits), 16 bytes whose low halves are values 0..15 and high halves 16..31. With an offset m the
// quants are unsigned; without, they are centred.
template <bool kHasMin, bool kHasHigh>
inline void widen_legacy(const uint8_t *source, int64_t n, float *target) {
  constexpr int kHigh = kHasMin ? 4 : 2, kLow = kHigh + (kHasHigh ? 4 : 0);
  constexpr int kCentre = kHasMin ? 0 : (kHasHigh ? 16 : 8);
  for (int64_t b = 0; b < n; ++b, source += kLow + 16, target += 32) {
    float d = load_f16(source), m = kHasMin ? load_f16(source + 2) : 0.0f;
    uint32_t high = 0;
    if (kHasHigh) std::memcpy(&high, source + kHigh, 4);
    for (int i = 0; i < 32; ++i) {
      int q = i < 16 ? source[kLow + i] & 15 : source[kLow + i - 16] >> 4;
      if (kHasHigh) q |= static_cast<int>((high >> i) & 1u) << 4;
      float value = d * static_cast<float>(q - kCentre);
      target[i] = kHasMin ? value + m : value;
    }
  }
}

// d, dmin, eight 6-bit scales and eight 6-bit minima in 12 bytes, (256 high bits: bit s of byte i is value 32 s + i),
// 128 bytes: of 64 values the first 32 in the low halves.
template <bool kHasHigh>
inline void widen_k45(const uint8_t *source, int64_t n, float *target) {
  constexpr int kHigh = 16, kLow = kHigh + (kHasHigh ? 32 : 0);
  for (int64_t b = 0; b < n; ++b, source += kLow + 128, target += 256) {
    float d = load_f16(source), dmin = load_f16(source + 2);
    const uint8_t *s = source + 4;
    for (int j = 0; j < 8; ++j) {
      int scale = j < 4 ? s[j] & 63 : (s[j + 4] & 15) | ((s[j - 4] >> 2) & 48);
      int minimum = j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | ((s[j] >> 2) & 48);
      float step = d * static_cast<float>(scale), offset = dmin * static_cast<float>(minimum);
      const uint8_t *low = source + kLow + j / 2 * 32;
      for (int i = 0; i < 32; ++i) {
        int q = j % 2 == 0 ? low[i] & 15 : low[i] >> 4;
        if (kHasHigh) q |= ((source[kHigh + i] >> j) & 1) << 4;
        target[32 * j + i] = step * static_cast<float>(q) - offset;
      }
    }
  }
}

// 128 bytes of low halves, 64 bytes of high pairs, 16 signed scales, d; each half of 128 values has its own 64 + 32
// bytes.
inline void widen_q6_k(const uint8_t *source, int64_t n, float *target) {
  for (int64_t b = 0; b < n; ++b, source += 210, target += 256) {
    float d = load_f16(source + 208);
    for (int j = 0; j < 8; ++j) {
      const uint8_t *low = source + j / 4 * 64 + j % 2 * 32, *high = source + 128 + j / 4 * 32;
      int low_shift = j % 4 / 2 * 4, high_shift = j % 4 * 2;
      for (int part = 0; part < 2; ++part) {
        float step = d * static_cast<float>(static_cast<int8_t>(source[192 + 2 * j + part]));
        for (int i = 16 * part; i < 16 * part + 16; ++i) {
          int q = ((low[i] >> low_shift) & 15) | (((high[i] >> high_shift) & 3) << 4);
          target[32 * j + i] = step * static_cast<float>(q - 32);
        }
      }
    }
  }
}

constexpr StorageType kStorageTypes[] = {
    {"F32", 1, 4, widen_f32},
    {"BF16", 1, 2, widen_bf16},
    {"F16", 1, 2, widen_f16},
    {"Q8_0", 32, 34, widen_q8_0},
    {"Q4_0", 32, 18, widen_legacy<false, false>},
    {"Q4_1", 32, 20, widen_legacy<true, false>},
    {"Q5_0", 32, 22, widen_legacy<false, true>},
    {"Q5_1", 32, 24, widen_legacy<true, true>},
    {"Q4_K", 256, 144, widen_k45<false>},
    {"Q5_K", 256, 176, widen_k45<true>},
    {"Q6_K", 256, 210, widen_q6_k},
};
static_assert(sizeof kStorageTypes / sizeof kStorageTypes[0] == PLD_Q6_K + 1, "one entry a pld_dtype, in its order");

// Null when `dtype` names none.
inline const StorageType *storage_type(pld_dtype dtype) {
  return dtype >= PLD_F32 && dtype <= PLD_Q6_K ? &kStorageTypes[dtype] : nullptr;
}

}  // namespace pld
