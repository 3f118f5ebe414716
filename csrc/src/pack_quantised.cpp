#include <cmath>
#include <cstring>

#include "dequantize.hpp"
#include "quantise.hpp"
#include "strips.hpp"

namespace pld {
namespace {

// A group of 32 quants as stored numbers, without centre.
using Quants = uint8_t[kQuantGroup];

// W[column][4s + i] of a group stands in byte [column][i] of word row s (or s - 4 in the upper halves).
void put_group(const Quants &q, pld_dtype dtype, int64_t column, uint8_t *quants) {
  const bool eight = dtype == PLD_Q8_0 || dtype == PLD_I8;
  for (int s = 0; s < 8; ++s)
    for (int i = 0; i < 4; ++i) {
      const int value = q[4 * s + i];
      const int64_t place = column * 4 + i;
      if (eight) {
        quants[s * 128 + place] = static_cast<uint8_t>(value);
        continue;
      }
      quants[s % 4 * 128 + place] |= static_cast<uint8_t>((value & 15) << (s < 4 ? 0 : 4));
      if (dtype == PLD_Q5_K) quants[512 + place] |= static_cast<uint8_t>(value >> 4 << s);
      if (dtype == PLD_Q6_K) quants[512 + s / 4 * 128 + place] |= static_cast<uint8_t>(value >> 4 << s % 4 * 2);
    }
}

void put_half(uint8_t *scales, int64_t column, const uint8_t *half) { std::memcpy(scales + 2 * column, half, 2); }

// d, (m), 32 quants of 8 or 4 bits.
void put_simple(const uint8_t *block, pld_dtype dtype, int64_t column, uint8_t *unit) {
  const StripFormat &format = *strip_format(dtype);
  Quants q;
  const uint8_t *low = block + (dtype == PLD_Q4_1 ? 4 : 2);
  for (int i = 0; i < 32; ++i)
    q[i] = dtype == PLD_Q8_0 ? static_cast<uint8_t>(low[i] + 128)
                             : static_cast<uint8_t>(i < 16 ? low[i] & 15 : low[i - 16] >> 4);
  put_half(unit, column, block);
  if (dtype == PLD_Q4_1) put_half(unit + 64, column, block + 2);
  put_group(q, dtype, column, unit + format.unit_head);
}

// As widen_k45 and widen_q6_k of dequantize.hpp read them.
void put_k45(const uint8_t *block, pld_dtype dtype, int64_t column, uint8_t *unit) {
  const StripFormat &format = *strip_format(dtype);
  const bool five = dtype == PLD_Q5_K;
  put_half(unit, column, block);
  put_half(unit + 64, column, block + 2);
  const uint8_t *s = block + 4, *high = block + 16, *quants = block + (five ? 48 : 16);
  for (int j = 0; j < 8; ++j) {
    uint8_t *group = unit + format.unit_head + j * group_bytes(format);
    group[column] = static_cast<uint8_t>(j < 4 ? s[j] & 63 : (s[j + 4] & 15) | ((s[j - 4] >> 2) & 48));
    group[32 + column] = static_cast<uint8_t>(j < 4 ? s[j + 4] & 63 : (s[j + 4] >> 4) | ((s[j] >> 2) & 48));
    Quants q;
    for (int i = 0; i < 32; ++i) {
      int value = j % 2 == 0 ? quants[j / 2 * 32 + i] & 15 : quants[j / 2 * 32 + i] >> 4;
      if (five) value |= ((high[i] >> j) & 1) << 4;
      q[i] = static_cast<uint8_t>(value);
    }
    put_group(q, dtype, column, group + format.group_head);
  }
}

void put_q6_k(const uint8_t *block, int64_t column, uint8_t *unit) {
  const StripFormat &format = kStripQ6_K;
  put_half(unit, column, block + 208);
  for (int j = 0; j < 8; ++j) {
    uint8_t *group = unit + format.unit_head + j * group_bytes(format);
    group[column] = block[192 + 2 * j];
    group[32 + column] = block[192 + 2 * j + 1];
    const uint8_t *low = block + j / 4 * 64 + j % 2 * 32, *high = block + 128 + j / 4 * 32;
    const int low_shift = j % 4 / 2 * 4, high_shift = j % 4 * 2;
    Quants q;
    for (int i = 0; i < 32; ++i)
      q[i] = static_cast<uint8_t>(((low[i] >> low_shift) & 15) | (((high[i] >> high_shift) & 3) << 4));
    put_group(q, PLD_Q6_K, column, group + format.group_head);
  }
}

// To nearest even, ties included; subnormal halves too.
uint16_t to_f16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // below 2^-14: a multiple of 2^-24
    const float shifted = from_bits(bits) * 16777216.0f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(shifted)));
  }
  return static_cast<uint16_t>(sign | ((bits + 0xfffu + ((bits >> 13) & 1u) - 0x38000000u) >> 13));
}

void store_half(uint8_t *target, float value) {
  const uint16_t half = to_f16(value);
  std::memcpy(target, &half, 2);
}

// To nearest even, within [low, high]; a NaN becomes `low`.
int round_to(float value, int low, int high) {
  if (!(value > static_cast<float>(low))) return low;
  return value < static_cast<float>(high) ? static_cast<int>(std::nearbyint(value)) : high;
}

// d = greatest magnitude / 127.
void quantise_q8_0(const float *x, uint8_t *block) {
  float greatest = 0.0f;
  for (int i = 0; i < 32; ++i) greatest = std::fmax(greatest, std::fabs(x[i]));
  store_half(block, greatest / 127.0f);
  const float d = load_f16(block), inverse = d > 0.0f ? 1.0f / d : 0.0f;
  for (int i = 0; i < 32; ++i)
    block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(round_to(x[i] * inverse, -127, 127)));
}

// Quants q of `levels` steps from `low` for scale d: sum of squared errors.
template <typename Value>
float error_of(const float *x, const uint8_t *q, Value &&value) {
  float sum = 0.0f;
  for (int i = 0; i < 32; ++i) {
    const float e = x[i] - value(q[i]);
    sum += e * e;
  }
  return sum;
}

void put_nibbles(const uint8_t *q, uint8_t *low) {
  for (int i = 0; i < 16; ++i) low[i] = static_cast<uint8_t>(q[i] | q[i + 16] << 4);
}

// The value of greatest magnitude becomes -8 d; of a few scales near that the one with the least squared error is kept.
void quantise_q4_0(const float *x, uint8_t *block) {
  float greatest = 0.0f;
  for (int i = 0; i < 32; ++i)
    if (std::fabs(x[i]) > std::fabs(greatest)) greatest = x[i];
  float best = INFINITY;
  for (int step = -6; step <= 6; ++step) {
    uint8_t half[2], q[32];
    store_half(half, greatest / (-8.0f + 0.15f * static_cast<float>(step)));
    const float d = load_f16(half), inverse = d != 0.0f ? 1.0f / d : 0.0f;
    for (int i = 0; i < 32; ++i) q[i] = static_cast<uint8_t>(round_to(x[i] * inverse, -8, 7) + 8);
    const float error = error_of(x, q, [&](int v) { return d * static_cast<float>(v - 8); });
    if (error < best || step == -6) {
      best = error;
      std::memcpy(block, half, 2);
      put_nibbles(q, block + 2);
    }
  }
}

// From the least value to the greatest in 15 steps; narrower ranges are tried as well.
void quantise_q4_1(const float *x, uint8_t *block) {
  float low = x[0], high = x[0];
  for (int i = 1; i < 32; ++i) {
    low = std::fmin(low, x[i]);
    high = std::fmax(high, x[i]);
  }
  float best = INFINITY;
  for (int step = 0; step <= 6; ++step) {
    const float cut = 0.015f * static_cast<float>(step) * (high - low);
    uint8_t halves[4], q[32];
    store_half(halves, (high - low - 2.0f * cut) / 15.0f);
    store_half(halves + 2, low + cut);
    const float d = load_f16(halves), m = load_f16(halves + 2), inverse = d > 0.0f ? 1.0f / d : 0.0f;
    for (int i = 0; i < 32; ++i) q[i] = static_cast<uint8_t>(round_to((x[i] - m) * inverse, 0, 15));
    const float error = error_of(x, q, [&](int v) { return d * static_cast<float>(v) + m; });
    if (error < best || step == 0) {
      best = error;
      std::memcpy(block, halves, 4);
      put_nibbles(q, block + 4);
    }
  }
}

// One scale for the whole row; K is padded with zeros.
void put_i8(const float *row, int64_t cols, int64_t column, uint8_t *strip) {
  float greatest = 0.0f;
  for (int64_t k = 0; k < cols; ++k) greatest = std::fmax(greatest, std::fabs(row[k]));
  const float scale = greatest / 127.0f, inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  std::memcpy(strip + 4 * column, &scale, 4);
  for (int64_t k = 0; k < cols; k += kQuantGroup) {
    Quants q;
    for (int64_t i = 0; i < kQuantGroup; ++i) {
      const float x = k + i < cols ? row[k + i] : 0.0f;
      q[i] = static_cast<uint8_t>(round_to(x * inverse, -127, 127) + 128);
    }
    put_group(q, PLD_I8, column, strip + group_offset(kStripI8, k / kQuantGroup));
  }
}

}  // namespace

int64_t strips_bytes(int64_t rows, int64_t cols, pld_dtype dtype) {
  const StripFormat *format = strip_format(dtype);
  constexpr int64_t kLimit = int64_t{1} << 40;
  if (format == nullptr || rows < 1 || cols < 1 || rows > kLimit || cols > kLimit ||
      (dtype != PLD_I8 && cols % format->unit_values != 0))
    return 0;
  int64_t bytes = 0;
  if (__builtin_mul_overflow((rows + kStrip - 1) / kStrip, strip_bytes(*format, cols), &bytes)) return 0;
  return bytes;
}

void blocks_to_strip(const uint8_t *blocks, int64_t cols, pld_dtype dtype, int64_t column, uint8_t *strip) {
  const StripFormat &format = *strip_format(dtype);
  const int64_t block_bytes = storage_type(dtype)->block_bytes;
  for (int64_t k = 0; k < cols; k += format.unit_values, blocks += block_bytes, strip += unit_bytes(format)) {
    if (dtype == PLD_Q6_K)
      put_q6_k(blocks, column, strip);
    else if (format.unit_values == 256)
      put_k45(blocks, dtype, column, strip);
    else
      put_simple(blocks, dtype, column, strip);
  }
}

void floats_to_strip(const float *row, int64_t cols, pld_dtype dtype, int64_t column, uint8_t *blocks, uint8_t *strip) {
  if (dtype == PLD_I8) return put_i8(row, cols, column, strip);
  const int64_t block_bytes = storage_type(dtype)->block_bytes;
  uint8_t *block = blocks;
  for (int64_t k = 0; k < cols; k += 32, block += block_bytes) {
    if (dtype == PLD_Q8_0)
      quantise_q8_0(row + k, block);
    else if (dtype == PLD_Q4_0)
      quantise_q4_0(row + k, block);
    else
      quantise_q4_1(row + k, block);
  }
  blocks_to_strip(blocks, cols, dtype, column, strip);
}

}  // namespace pld
