// Quantised matrices on their way in: floats to blocks, and blocks to strips (strips.hpp). Included by convert.cpp and
// pack_quantised.cpp.
#pragma once

#include <cstdint>

#include "pellucid.h"

namespace pld {

// Bytes of a [rows, cols] matrix in strips; 0 when out of range, or when cols is no multiple of the type's block.
int64_t strips_bytes(int64_t rows, int64_t cols, pld_dtype dtype);

// Row `column` (of 32) of a strip from one row of W in GGUF's block layout. `strip` was zeroed beforehand.
void blocks_to_strip(const uint8_t *blocks, int64_t cols, pld_dtype dtype, int64_t column, uint8_t *strip);

// The same from floats, which are rounded: PLD_Q8_0, PLD_Q4_0, PLD_Q4_1, PLD_I8. `blocks` is scratch for the row.
void floats_to_strip(const float *row, int64_t cols, pld_dtype dtype, int64_t column, uint8_t *blocks, uint8_t *strip);

constexpr bool can_quantise_to(pld_dtype dtype) {
  return dtype == PLD_Q8_0 || dtype == PLD_Q4_0 || dtype == PLD_Q4_1 || dtype == PLD_I8;
}

}  // namespace pld
