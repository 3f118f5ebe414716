// Per row: argmax (lowest index of the greatest), maximum, log of the sum of exp(x - maximum). A NaN anywhere makes the
// sum NaN.

namespace pld {
namespace PLD_ISA_NS {

static int64_t sample_tasks(const OpArgs &args, int, int) { return args.rows; }

static RowScan scan_row(const float *x, int32_t width) {
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf minus_infinity = splat(-__builtin_inff());
  vf best = minus_infinity;
  vi best_index = lane, nan = {};
  for (int32_t i = 0; i < width; i += kLanes) {
    const int n = width - i < kLanes ? width - i : kLanes;
    const vf y = n == kLanes ? load(x + i) : select(lane < n, load_n(x + i, n), minus_infinity);
    const vi greater = y > best;
    best = select(greater, y, best);
    best_index = (greater & (lane + i)) | (~greater & best_index);
    nan |= y != y;
  }
  RowScan scan = {-__builtin_inff(), 0, false};
  for (int i = 0; i < kLanes; ++i) {
    scan.any_nan = scan.any_nan || nan[i] != 0;
    if (best[i] > scan.max || (best[i] == scan.max && best_index[i] < scan.argmax)) {
      scan.max = best[i];
      scan.argmax = best_index[i];
    }
  }
  return scan;
}

static float sum_exp(const float *x, int32_t width, float max) {
  constexpr int kVectors = 4;  // independent sums, added as a fixed tree
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  vf sum[kVectors] = {};
  for (int32_t i = 0; i < width; i += kVectors * kLanes) {
    for (int v = 0; v < kVectors; ++v) {
      const int32_t n = width - i - v * kLanes;
      if (n <= 0) break;
      const float *p = x + i + v * kLanes;
      const vf y = n >= kLanes ? load(p) : select(lane < n, load_n(p, n), splat(-__builtin_inff()));
      sum[v] = sum[v] + vexp(y - max);
    }
  }
  return hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

static void weigh_row(const float *x, int32_t width, float max, float temperature, float *weights) {
  for_lanes(width,
            [&](int64_t i, int n) { store_lanes(weights + i, vexp((load_lanes(x + i, n) - max) / temperature), n); });
}

static void run_sample(const OpArgs &args, int, int64_t row, int, std::byte *) {
  const float *x = args.in[0] + row * args.in_stride[0];
  const RowScan scan = scan_row(x, args.in_width[0]);
  const bool defined = !scan.any_nan && scan.max > -__builtin_inff();
  float *out = args.out[0] + row * args.out_stride[0];
  memcpy(out, &scan.argmax, 4);
  out[1] = scan.max;
  out[2] = defined ? logf(sum_exp(x, args.in_width[0], scan.max)) : __builtin_nanf("");
  out[3] = 0.0f;
}

static const Kernel sample_kernel = {1, sample_tasks, run_sample, nullptr, 0, nullptr, nullptr};

}  // namespace PLD_ISA_NS
}  // namespace pld
