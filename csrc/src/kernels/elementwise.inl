// embedding, act, act_and_mul, add, scale, softcap, gather_rows.

namespace pld {
namespace PLD_ISA_NS {

static void embedding_row(const OpArgs &args, int64_t row) {
  const pld_weight &w = *args.weight[0];
  const int64_t id = batch_ids(*args.op, *args.batch)[row], cols = w.cols;
  float *out = args.out[0] + row * args.out_stride[0];
  if (w.layout == PLD_ROW_MAJOR) {
    if (w.dtype == PLD_F32) {
      memcpy(out, (const float *)w.data + id * cols, (size_t)cols * sizeof(float));
    } else {
      const uint16_t *source = (const uint16_t *)w.data + id * cols;
      for (int64_t i = 0; i < cols; ++i) out[i] = from_bf16(source[i]);
    }
    return;
  }
  if (strip_format(w.dtype) != nullptr) return dequantise_row(w, id, out);
  const int64_t panel = id / 64, lane = id % 64;  // out of the packed matrix, so that a tied head is stored once
  if (w.dtype == PLD_F32) {
    const float *source = (const float *)w.data + panel * cols * 64 + lane;
    for (int64_t k = 0; k < cols; ++k) out[k] = source[k * 64];
  } else {
    const uint16_t *source = (const uint16_t *)w.data + panel * ((cols + 1) / 2) * 128 + lane * 2;
    for (int64_t k = 0; k < cols; ++k) out[k] = from_bf16(source[(k / 2) * 128 + (k & 1)]);
  }
}
PLD_ROW_KERNEL(embedding);

static void act_row(const OpArgs &args, int64_t row) {
  const float *in = args.in[0] + row * args.in_stride[0];
  float *out = args.out[0] + row * args.out_stride[0];
  const pld_act act = args.op->i[0];
  for_lanes(args.out_width[0],
            [&](int64_t i, int n) { store_lanes(out + i, activate(load_lanes(in + i, n), act), n); });
}
PLD_ROW_KERNEL(act);

static void act_and_mul_row(const OpArgs &args, int64_t row) {
  const float *gate = args.in[0] + row * args.in_stride[0], *up = gate + args.out_width[0];
  float *out = args.out[0] + row * args.out_stride[0];
  const pld_act act = args.op->i[0];
  for_lanes(args.out_width[0], [&](int64_t i, int n) {
    store_lanes(out + i, activate(load_lanes(gate + i, n), act) * load_lanes(up + i, n), n);
  });
}
PLD_ROW_KERNEL(act_and_mul);

static void add_row(const OpArgs &args, int64_t row) {
  const float *a = args.in[0] + row * args.in_stride[0], *b = args.in[1] + row * args.in_stride[1];
  float *out = args.out[0] + row * args.out_stride[0];
  for_lanes(args.out_width[0],
            [&](int64_t i, int n) { store_lanes(out + i, load_lanes(a + i, n) + load_lanes(b + i, n), n); });
}
PLD_ROW_KERNEL(add);

static void scale_row(const OpArgs &args, int64_t row) {
  const float *in = args.in[0] + row * args.in_stride[0];
  float *out = args.out[0] + row * args.out_stride[0];
  const vf factor = splat(args.op->f[0]);
  for_lanes(args.out_width[0], [&](int64_t i, int n) { store_lanes(out + i, load_lanes(in + i, n) * factor, n); });
}
PLD_ROW_KERNEL(scale);

static void softcap_row(const OpArgs &args, int64_t row) {
  const float *in = args.in[0] + row * args.in_stride[0];
  float *out = args.out[0] + row * args.out_stride[0];
  const vf cap = splat(args.op->f[0]);
  for_lanes(args.out_width[0],
            [&](int64_t i, int n) { store_lanes(out + i, cap * tanh_of(load_lanes(in + i, n) / cap), n); });
}
PLD_ROW_KERNEL(softcap);

static void gather_rows_row(const OpArgs &args, int64_t row) {
  const float *in = args.in[0] + args.batch->logit_rows[row] * args.in_stride[0];
  memcpy(args.out[0] + row * args.out_stride[0], in, (size_t)args.out_width[0] * sizeof(float));
}
PLD_ROW_KERNEL(gather_rows);

}  // namespace PLD_ISA_NS
}  // namespace pld
