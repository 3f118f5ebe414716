// The KV store: cells (one position of one sequence each) in groups of 16, whatever the block size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "pellucid.h"

namespace pld {
struct Sequences;
}

// What one kv head keeps of a group of 16 cells is one unit: its keys, its values, and for int8 their scales. So a
// sequence is read in runs of whole units. Keys are transposed: a vector is sixteen positions, and one multiply-add
// scores sixteen keys without a horizontal sum. Two neighbours of E (of keys), or of positions (of values), lie
// together for dot products of pairs.
//
//   [layer][group][G] units of
//     F32    K [E][16]          V [16][W]
//     BF16   K [E/2][16][2]     V [8][W][2]
//     int8   K [E/2][16][2]     V [8][W][2]    scales of K float32 [16], of V float32 [16]
//
// W is E rounded up to 16; the columns from E on are 0. cell = block * S + offset, group = cell / 16, lane = cell % 16.
// The arithmetic of a position does not depend on its cell, so neither block size nor placement changes a bit.
struct pld_kv {
  int32_t n_layers, n_kv_heads, head_dim, block_size, n_blocks;
  pld_dtype dtype;       // PLD_F32, PLD_BF16 or PLD_I8
  int64_t n_cells;       // n_blocks * block_size
  int64_t n_groups;      // ceil(n_cells / 16)
  int64_t value_width;   // W
  int64_t value_bytes;   // of one number
  int64_t v_offset;      // of V in a unit
  int64_t scale_offset;  // of the scales in a unit
  int64_t unit_bytes;
  int64_t layer_bytes;
  std::byte *data;  // 64-byte aligned, zero, touched on first use
  pld_kv_layout layout;
  // Of block size 1, from params of the first version: they come by value from pld_kv_default_params, and a caller
  // built against the header after that may have set a layout that cannot be read. The first use says which it is.
  bool is_undecided;
  pld::Sequences *sequences;  // owned: who holds what
};

namespace pld {

// The first use of a cache whose layout is undecided.
inline void decide_layout(pld_kv &kv, pld_kv_layout layout) {
  if (kv.is_undecided) kv.layout = layout;
  kv.is_undecided = false;
}
inline bool may_be_slot(const pld_kv &kv) { return kv.layout == PLD_KV_SLOT || kv.is_undecided; }

// All layers of one cell to another; and one layer's keys [G, E] of a cell, rounded as the cache rounds them.
void copy_cell(pld_kv &kv, int64_t from, int64_t to);
void store_keys(pld_kv &kv, int32_t layer, int64_t cell, const float *keys);

// What cells hold, put back at the end unless it was dropped: for a step that may end on its way.
class CellBackup {
 public:
  CellBackup(pld_kv &kv, const std::vector<int64_t> &cells);  // those below 0 are passed over
  ~CellBackup();
  void drop() { saved_.clear(); }

 private:
  pld_kv &kv_;
  std::vector<int64_t> cells_;
  std::vector<std::byte> saved_;
};

}  // namespace pld
