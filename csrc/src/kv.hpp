// The KV store: cells (one position of one sequence each) in groups of 16, whatever the block size.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pellucid.h"

// K is transposed inside a group so that a vector is sixteen positions: one multiply-add scores sixteen keys and needs
// no horizontal sum.
//   K, F32:  [layer][group][G][E][16]        K, BF16: [layer][group][G][E/2][16][2]
//   V:       [layer][cell][G][E]
// cell = block * S + offset, group = cell / 16, lane = cell % 16. The arithmetic of a position does not depend on its
// cell, so neither block size nor placement changes a bit.
struct pld_kv {
  int32_t n_layers, n_kv_heads, head_dim, block_size, n_blocks;
  pld_dtype dtype;
  int64_t n_cells;        // n_blocks * block_size
  int64_t n_groups;       // ceil(n_cells / 16)
  int64_t k_layer_bytes;  // bytes of one layer's K
  int64_t v_layer_bytes;
  std::byte *k;  // 64-byte aligned, zero, touched on first use
  std::byte *v;
};
