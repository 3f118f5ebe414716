// The table of a step's cosines and sines, and the rotation by it.

namespace pld {
namespace PLD_ISA_NS {

static void rope_table_row(const OpArgs &args, int64_t row) {
  const float *inv_freq = (const float *)args.weight[0]->data;
  const float position = (float)batch_ids(*args.op, *args.batch)[row], scale = args.op->f[0];
  const int64_t half = args.out_width[0] / 2;
  float *out = args.out[0] + row * args.out_stride[0];
  for (int64_t j = 0; j < half; ++j) {
    float angle = position * inv_freq[j];
    out[j] = cosf(angle) * scale;
    out[half + j] = sinf(angle) * scale;
  }
}
PLD_ROW_KERNEL(rope_table);

static void rotate_halves(const float *in, const float *cosine, const float *sine, float *out, int64_t half) {
  for_lanes(half, [&](int64_t j, int n) {
    vf a = load_lanes(in + j, n), b = load_lanes(in + half + j, n);
    vf c = load_lanes(cosine + j, n), s = load_lanes(sine + j, n);
    store_lanes(out + j, a * c - b * s, n);
    store_lanes(out + half + j, b * c + a * s, n);
  });
}
static void rotate_neighbours(const float *in, const float *cosine, const float *sine, float *out, int64_t half) {
  for (int64_t j = 0; j < half; ++j) {
    float a = in[2 * j], b = in[2 * j + 1];
    out[2 * j] = a * cosine[j] - b * sine[j];
    out[2 * j + 1] = b * cosine[j] + a * sine[j];
  }
}

static void rotary_row(const OpArgs &args, int64_t row) {
  const float *in = args.in[0] + row * args.in_stride[0];
  const float *table = args.in[1] + row * args.in_stride[1];
  float *out = args.out[0] + row * args.out_stride[0];
  const int64_t head_dim = args.op->i[0], turned = args.in_width[1], half = turned / 2;
  for (int64_t head = 0; head < args.in_width[0]; head += head_dim) {
    (args.op->i[1] ? rotate_neighbours : rotate_halves)(in + head, table, table + half, out + head, half);
    for (int64_t j = turned; j < head_dim; ++j) out[head + j] = in[head + j];
  }
}
PLD_ROW_KERNEL(rotary);

}  // namespace PLD_ISA_NS
}  // namespace pld
