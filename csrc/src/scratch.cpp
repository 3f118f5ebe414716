#include "scratch.hpp"

#include <algorithm>
#include <map>
#include <new>
#include <utility>

#include "error.hpp"

namespace pld {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMaxScratchBytes = size_t{1} << 46;

struct Declared {
  ScratchRegion regions[kMaxRegions];
  int count = 0;
};

class Declarations {
 public:
  Declarations(const std::vector<OpArgs> &args, const KernelTable &table, int32_t n_forward_ops,
               const int64_t *max_rows)
      : of_op_(args.size()) {
    for (size_t op = 0; op < args.size(); ++op) {
      const Kernel &kernel = table.ops[args[op].op->kind];
      const int64_t rows = max_rows[static_cast<int32_t>(op) < n_forward_ops ? PLD_ROWS_T : PLD_ROWS_L];
      if (kernel.regions != nullptr)
        of_op_[op].count = kernel.regions(*args[op].op, args[op].weight, rows, of_op_[op].regions);
    }
  }
  const Declared &of(int32_t op) const { return of_op_[static_cast<size_t>(op)]; }

  // visit(op, region, bytes) for the regions that a part of a step touches, those of stages fused into it included.
  template <typename Visit>
  void each_touched(const Part &part, const std::vector<OpArgs> &args, Visit &&visit) const {
    each_of_stage(part.op, part.stage, visit);
    each_fused(args, part, [&](int32_t op, int stage) { each_of_stage(op, stage, visit); });
  }

 private:
  template <typename Visit>
  void each_of_stage(int32_t op, int stage, Visit &&visit) const {
    const Declared &declared = of(op);
    for (int r = 0; r < declared.count; ++r) {
      const ScratchRegion &region = declared.regions[r];
      if (region.bytes > 0 && region.first_stage <= stage && stage <= region.last_stage) visit(op, r, region.bytes);
    }
  }
  std::vector<Declared> of_op_;
};

using Key = std::pair<int32_t, int32_t>;  // op, region

}  // namespace

std::vector<PlacedRegion> find_regions(const StepRow &steps, const std::vector<OpArgs> &args, const KernelTable &table,
                                       int32_t n_forward_ops, const int64_t *max_rows) {
  const Declarations declared(args, table, n_forward_ops, max_rows);
  std::map<Key, PlacedRegion> found;
  for (size_t step = 0; step < steps.size(); ++step)
    for (const Part &part : steps[step]->parts)
      declared.each_touched(part, args, [&](int32_t op, int32_t region, size_t bytes) {
        const auto at = static_cast<int32_t>(step);
        const auto [it, is_new] = found.insert({{op, region}, {op, region, at, at, bytes, 0}});
        if (!is_new) it->second.last = at;
      });
  std::vector<PlacedRegion> regions;
  for (const auto &entry : found) regions.push_back(entry.second);
  std::stable_sort(regions.begin(), regions.end(),
                   [](const PlacedRegion &a, const PlacedRegion &b) { return a.first < b.first; });
  return regions;
}

ScratchPlan place_regions(std::vector<PlacedRegion> regions) {
  ScratchPlan plan;
  std::vector<const PlacedRegion *> alive;  // by offset
  for (PlacedRegion &region : regions) {    // by first step
    alive.erase(std::remove_if(alive.begin(), alive.end(),
                               [&](const PlacedRegion *other) { return other->last < region.first; }),
                alive.end());
    size_t offset = 0;
    auto place = alive.begin();
    for (; place != alive.end() && (*place)->offset < offset + region.bytes; ++place)
      offset = ((*place)->offset + (*place)->bytes + kAlignment - 1) / kAlignment * kAlignment;
    region.offset = offset;
    alive.insert(place, &region);
    if (region.bytes > kMaxScratchBytes || offset > kMaxScratchBytes) throw std::bad_alloc();
    plan.bytes = std::max(plan.bytes, offset + region.bytes);
  }
  plan.regions = std::move(regions);
  return plan;
}

pld_status check_scratch(const ScratchPlan &plan, const StepRow &steps, const std::vector<OpArgs> &args,
                         const KernelTable &table, int32_t n_forward_ops, const int64_t *max_rows) {
  const Declarations declared(args, table, n_forward_ops, max_rows);
  std::map<Key, const PlacedRegion *> placed;
  for (const PlacedRegion &region : plan.regions) placed[{region.op, region.region}] = &region;
  std::map<size_t, const PlacedRegion *> owners;  // by offset; their bytes never overlap
  std::map<Key, bool> begun;
  for (const Step *step : steps) {
    std::vector<const PlacedRegion *> touched;
    for (const Part &part : step->parts) {
      pld_status status = PLD_OK;
      declared.each_touched(part, args, [&](int32_t op, int32_t r, size_t bytes) {
        const auto it = placed.find({op, r});
        if (it == placed.end() || it->second->bytes < bytes || it->second->offset % kAlignment != 0 ||
            it->second->offset + bytes > plan.bytes)
          status = fail(PLD_INTERNAL, "op %d: scratch region %d has no place", op, r);
        else
          touched.push_back(it->second);
      });
      if (status != PLD_OK) return status;
    }
    for (const PlacedRegion *region : touched) {
      if (std::exchange(begun[{region->op, region->region}], true)) continue;
      auto it = owners.lower_bound(region->offset);
      if (it != owners.begin() && std::prev(it)->first + std::prev(it)->second->bytes > region->offset) --it;
      while (it != owners.end() && it->first < region->offset + region->bytes) it = owners.erase(it);
      owners[region->offset] = region;
    }
    for (const PlacedRegion *region : touched) {
      const auto it = owners.find(region->offset);
      if (it == owners.end() || it->second != region)
        return fail(PLD_INTERNAL, "op %d: its scratch region %d is overwritten before its last stage", region->op,
                    region->region);
    }
  }
  return PLD_OK;
}

}  // namespace pld
