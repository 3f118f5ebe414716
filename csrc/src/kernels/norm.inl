// rms_norm and layer_norm. Sums run in sixteen lanes over ascending columns, then as the fixed tree of hsum.

namespace pld {
namespace PLD_ISA_NS {

// The row that is normalised: the input, or its sum with the residual, which is stored as the second output.
static const float *norm_source(const OpArgs &args, int64_t row) {
  const float *x = args.in[0] + row * args.in_stride[0];
  if (args.in[1] == nullptr) return x;
  const float *residual = args.in[1] + row * args.in_stride[1];
  float *sum = args.out[1] + row * args.out_stride[1];
  for_lanes(args.in_width[0],
            [&](int64_t i, int n) { store_lanes(sum + i, load_lanes(x + i, n) + load_lanes(residual + i, n), n); });
  return sum;
}

static void rms_norm_row(const OpArgs &args, int64_t row) {
  const float *source = norm_source(args, row);
  const float *weight = (const float *)args.weight[0]->data;
  float *out = args.out[0] + row * args.out_stride[0];
  const int64_t width = args.in_width[0] / args.op->i[0];
  const vf offset = splat(args.op->f[1]);
  for (int32_t group = 0; group < args.op->i[0]; ++group, source += width, out += width) {
    vf squares = {};
    for_lanes(width, [&](int64_t i, int n) {
      vf x = load_lanes(source + i, n);
      squares = fma(x, x, squares);
    });
    const vf factor = splat(1.0f / sqrtf(hsum(squares) / (float)width + args.op->f[0]));
    for_lanes(width, [&](int64_t i, int n) {
      store_lanes(out + i, load_lanes(source + i, n) * factor * (load_lanes(weight + i, n) + offset), n);
    });
  }
}
PLD_ROW_KERNEL(rms_norm);

static void layer_norm_row(const OpArgs &args, int64_t row) {
  const float *source = norm_source(args, row);
  const float *weight = (const float *)args.weight[0]->data;
  const float *bias = args.weight[1] == nullptr ? nullptr : (const float *)args.weight[1]->data;
  float *out = args.out[0] + row * args.out_stride[0];
  const int64_t width = args.in_width[0];
  vf sum = {};
  for_lanes(width, [&](int64_t i, int n) { sum += load_lanes(source + i, n); });
  const vf mean = splat(hsum(sum) / (float)width);
  vf squares = {};
  for_lanes(width, [&](int64_t i, int n) {
    vf x = load_lanes(source + i, n) - mean;
    if (n < kLanes) {  // lanes behind the end hold -mean: they do not count
      float a[kLanes];
      store(a, x);
      x = load_n(a, n);
    }
    squares = fma(x, x, squares);
  });
  const vf factor = splat(1.0f / sqrtf(hsum(squares) / (float)width + args.op->f[0]));
  for_lanes(width, [&](int64_t i, int n) {
    vf y = (load_lanes(source + i, n) - mean) * factor * load_lanes(weight + i, n);
    store_lanes(out + i, bias == nullptr ? y : y + load_lanes(bias + i, n), n);
  });
}
PLD_ROW_KERNEL(layer_norm);

}  // namespace PLD_ISA_NS
}  // namespace pld
