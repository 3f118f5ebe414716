// Where the bytes of a quantised matrix lie. A strip is 32 rows of W (32 columns of the product) over all of K, cut
// into units of 32 or 256 values of K. Within a unit stand first the scales, then the quants, four neighbours of K to a
// word:
//
//   quants of 8 bits   [8][32][4]   byte [s][c][i] is W[c][4s + i] + 128
//          low halves  [4][32][4]   byte [s][c][i] holds W[c][4s + i] below and W[c][4(s + 4) + i] above
//          high bit       [32][4]   bit s of byte [c][i] is bit 4 of W[c][4s + i]
//          high pairs  [2][32][4]   bits 2s.. of byte [h][c][i] are bits 4 and 5 of W[c][4(4h + s) + i]
//
// All sizes are multiples of 64 bytes. Included on both sides of the instruction-set seam: what stands here is constant
// or static, so that nothing compiled for a newer machine can be linked into code for an older one.
#pragma once

#include <cstdint>

#include "pellucid.h"

namespace pld {

inline constexpr int64_t kStrip = 32;       // rows of W in a strip
inline constexpr int64_t kQuantGroup = 32;  // values of K that share an activation scale

struct StripFormat {
  int64_t head_bytes;   // of a strip, in front of its units: PLD_I8's scales, float32 [32]
  int64_t unit_values;  // of K: 32, or 256 with two levels of scales
  int64_t unit_head;    // bytes of float16 scales in front of a unit's groups: [32] or two times [32]
  int64_t group_head;   // bytes in front of a group's quants, within a unit of 256: 6- or 8-bit scales
  int64_t quant_bytes;  // of a group of 32
  int zero;             // what is subtracted from a stored quant
};

static constexpr int64_t group_bytes(const StripFormat &f) { return f.group_head + f.quant_bytes; }
static constexpr int64_t unit_bytes(const StripFormat &f) {
  return f.unit_head + f.unit_values / kQuantGroup * group_bytes(f);
}

inline constexpr StripFormat kStripI8 = {128, 32, 0, 0, 1024, 128};
inline constexpr StripFormat kStripQ8_0 = {0, 32, 64, 0, 1024, 128};
inline constexpr StripFormat kStripQ4_0 = {0, 32, 64, 0, 512, 8};
inline constexpr StripFormat kStripQ4_1 = {0, 32, 128, 0, 512, 0};
inline constexpr StripFormat kStripQ4_K = {0, 256, 128, 64, 512, 0};
inline constexpr StripFormat kStripQ5_K = {0, 256, 128, 64, 640, 0};
inline constexpr StripFormat kStripQ6_K = {0, 256, 64, 64, 768, 32};

// Null for types that are not kept quantised.
static constexpr const StripFormat *strip_format(pld_dtype dtype) {
  switch (dtype) {
    case PLD_I8:
      return &kStripI8;
    case PLD_Q8_0:
      return &kStripQ8_0;
    case PLD_Q4_0:
      return &kStripQ4_0;
    case PLD_Q4_1:
      return &kStripQ4_1;
    case PLD_Q4_K:
      return &kStripQ4_K;
    case PLD_Q5_K:
      return &kStripQ5_K;
    case PLD_Q6_K:
      return &kStripQ6_K;
    default:
      return nullptr;
  }
}

// Bytes of a strip of `cols` values a row; cols is a multiple of unit_values, but for PLD_I8, which is padded.
static constexpr int64_t strip_bytes(const StripFormat &f, int64_t cols) {
  return f.head_bytes + (cols + f.unit_values - 1) / f.unit_values * unit_bytes(f);
}

// Where group `group` of 32 values begins in a strip: its own scales, then its quants.
static constexpr int64_t group_offset(const StripFormat &f, int64_t group) {
  const int64_t per_unit = f.unit_values / kQuantGroup;
  return f.head_bytes + group / per_unit * unit_bytes(f) + f.unit_head + group % per_unit * group_bytes(f);
}
static constexpr int64_t unit_offset(const StripFormat &f, int64_t group) {
  return f.head_bytes + group / (f.unit_values / kQuantGroup) * unit_bytes(f);
}

}  // namespace pld
