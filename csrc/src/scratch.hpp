// Where the scratch regions of a program's ops lie: regions that live in a common step never share a byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stages.hpp"

namespace pld {

// A region of op `op`, alive from step `first` to step `last`, both included. Steps of the logits are numbered after
// those of the forward part.
struct PlacedRegion {
  int32_t op, region;
  int32_t first, last;
  size_t bytes, offset;
};

struct ScratchPlan {
  std::vector<PlacedRegion> regions;
  size_t bytes = 0;
};

// The steps of both parts in one row.
using StepRow = std::vector<const Step *>;

// Regions of all ops for `max_rows` rows by domain, with their lives. Offsets are 0 until they are placed.
std::vector<PlacedRegion> find_regions(const StepRow &steps, const std::vector<OpArgs> &args, const KernelTable &table,
                                       int32_t n_forward_ops, const int64_t *max_rows);
// Gives each region the lowest offset that no region of a common step takes. Throws bad_alloc beyond any memory.
ScratchPlan place_regions(std::vector<PlacedRegion> regions);
// Walks the steps with the regions' owners as a witness: PLD_INTERNAL when a stage touches a region of which another
// stage has taken a byte, in this step or since the region's first.
pld_status check_scratch(const ScratchPlan &plan, const StepRow &steps, const std::vector<OpArgs> &args,
                         const KernelTable &table, int32_t n_forward_ops, const int64_t *max_rows);

}  // namespace pld
