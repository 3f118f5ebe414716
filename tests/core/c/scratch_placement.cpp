// Random steps of ops with scratch: what is placed passes the check, and a region moved onto one of a common step does
// not.
#include <cstdio>
#include <random>

#include "scratch.hpp"

namespace {

std::mt19937 random_bits(7);
int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }

constexpr int kKinds = 4;
pld::ScratchRegion declared[kKinds][3];  // of op kinds 1 .. 4

template <int kKind>
int regions_of(const pld_op &, const pld_weight *const *, int64_t rows, pld::ScratchRegion *regions) {
  for (int r = 0; r < 3; ++r) {
    regions[r] = declared[kKind][r];
    regions[r].bytes *= static_cast<size_t>(rows);
  }
  return 3;
}

pld::KernelTable random_table() {
  pld::KernelTable table = {};
  int (*const all[kKinds])(const pld_op &, const pld_weight *const *, int64_t, pld::ScratchRegion *) = {
      regions_of<0>, regions_of<1>, regions_of<2>, regions_of<3>};
  for (int kind = 0; kind < kKinds; ++kind) {
    table.ops[kind + 1].n_stages = 1 + below(pld::kMaxStages);
    table.ops[kind + 1].regions = all[kind];
    for (pld::ScratchRegion &region : declared[kind]) {
      const int first = below(table.ops[kind + 1].n_stages);
      const int last = first + below(table.ops[kind + 1].n_stages - first);
      region = {static_cast<size_t>(below(4) == 0 ? 0 : 1 + below(300)), first, last};
    }
  }
  return table;
}

bool meet(const pld::PlacedRegion &a, const pld::PlacedRegion &b) { return a.first <= b.last && b.first <= a.last; }
bool overlap(const pld::PlacedRegion &a, const pld::PlacedRegion &b) {
  return a.offset < b.offset + b.bytes && b.offset < a.offset + a.bytes;
}

}  // namespace

int main() {
  int refused = 0, tried = 0;
  for (int round = 0; round < 2000; ++round) {
    const pld::KernelTable table = random_table();
    const int n_ops = 1 + below(30), n_forward = 1 + below(n_ops);
    std::vector<pld_op> ops(static_cast<size_t>(n_ops));
    std::vector<pld::OpArgs> args(static_cast<size_t>(n_ops));
    std::vector<pld::Step> steps;
    for (int i = 0; i < n_ops; ++i) {
      ops[static_cast<size_t>(i)].kind = 1 + below(kKinds);
      args[static_cast<size_t>(i)].op = &ops[static_cast<size_t>(i)];
      for (int stage = 0; stage < table.ops[ops[static_cast<size_t>(i)].kind].n_stages; ++stage) {
        if (steps.empty() || below(2) == 0) steps.push_back({});
        steps.back().parts.push_back({i, stage});
      }
    }
    pld::StepRow row;
    for (const pld::Step &step : steps) row.push_back(&step);
    const int64_t max_rows[2] = {1 + below(5), 1 + below(3)};
    pld::ScratchPlan plan = pld::place_regions(pld::find_regions(row, args, table, n_forward, max_rows));
    for (const pld::PlacedRegion &a : plan.regions)
      for (const pld::PlacedRegion &b : plan.regions)
        if (&a != &b && meet(a, b) && overlap(a, b))
          return std::printf("round %d: two living regions overlap\n", round), 1;
    if (pld::check_scratch(plan, row, args, table, n_forward, max_rows) != PLD_OK)
      return std::printf("round %d: refused: %s\n", round, pld_last_error()), 1;
    if (plan.regions.size() < 2) continue;
    for (int move = 0; move < 4; ++move) {
      pld::ScratchPlan moved = plan;
      pld::PlacedRegion &a = moved.regions[static_cast<size_t>(below(static_cast<int>(plan.regions.size())))];
      const pld::PlacedRegion &b = plan.regions[static_cast<size_t>(below(static_cast<int>(plan.regions.size())))];
      if (a.op == b.op && a.region == b.region) continue;
      a.offset = b.offset / 64 * 64;
      if (a.offset + a.bytes > moved.bytes) moved.bytes = a.offset + a.bytes;
      bool wrong = false;
      for (const pld::PlacedRegion &other : moved.regions)
        wrong = wrong || (&other != &a && meet(a, other) && overlap(a, other));
      const bool is_refused = pld::check_scratch(moved, row, args, table, n_forward, max_rows) != PLD_OK;
      if (wrong != is_refused) return std::printf("round %d: overlap %d, refused %d\n", round, wrong, is_refused), 1;
      tried += 1;
      refused += is_refused;
    }
  }
  std::printf("2000 placements, %d of %d moves refused\n", refused, tried);
  return refused > 100 && refused < tried ? 0 : 1;
}
