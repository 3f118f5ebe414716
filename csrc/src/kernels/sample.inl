// Per row: argmax (lowest index of the greatest), maximum, log of the sum of exp(x - maximum). A NaN anywhere makes the
// sum NaN.

namespace pld {
namespace PLD_ISA_NS {

static int64_t sample_tasks(const OpArgs &args, int, int) { return args.rows; }

static void run_sample(const OpArgs &args, int, int64_t row, int, std::byte *) {
  constexpr int kVectors = 4;  // independent sums, added as a fixed tree
  const vi lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const vf minus_infinity = splat(-__builtin_inff());
  const float *x = args.in[0] + row * args.in_stride[0];
  int32_t width = args.in_width[0];
  vf best = minus_infinity;
  vi best_index = lane, nan = {};
  for (int32_t i = 0; i < width; i += kLanes) {
    int n = width - i < kLanes ? width - i : kLanes;
    vf y = n == kLanes ? load(x + i) : select(lane < n, load_n(x + i, n), minus_infinity);
    vi greater = y > best;
    best = select(greater, y, best);
    best_index = (greater & (lane + i)) | (~greater & best_index);
    nan |= y != y;
  }
  float top = -__builtin_inff();
  int32_t index = 0;
  bool any_nan = false;
  for (int i = 0; i < kLanes; ++i) {
    any_nan = any_nan || nan[i] != 0;
    if (best[i] > top || (best[i] == top && best_index[i] < index)) {
      top = best[i];
      index = best_index[i];
    }
  }
  vf sum[kVectors] = {};
  for (int32_t i = 0; i < width; i += kVectors * kLanes) {
    for (int v = 0; v < kVectors; ++v) {
      int32_t n = width - i - v * kLanes;
      if (n <= 0) break;
      const float *p = x + i + v * kLanes;
      vf y = n >= kLanes ? load(p) : select(lane < n, load_n(p, n), minus_infinity);
      sum[v] = sum[v] + vexp(y - top);
    }
  }
  float total = hsum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  bool defined = !any_nan && top > -__builtin_inff();
  float *out = args.out[0] + row * args.out_stride[0];
  memcpy(out, &index, 4);
  out[1] = top;
  out[2] = defined ? logf(total) : __builtin_nanf("");
  out[3] = 0.0f;
}

static const Kernel sample_kernel = {1, sample_tasks, run_sample, nullptr, 0, nullptr, nullptr};

}  // namespace PLD_ISA_NS
}  // namespace pld
