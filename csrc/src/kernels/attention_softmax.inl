// The online softmax of one (query row, head) pair: https://arxiv.org/abs/1805.02867.
#include "attention_tile.inl"

namespace pld {
namespace PLD_ISA_NS {

PLD_INLINE Native native_max(Native a, Native b) {
#if defined(__AVX512F__)
  return (Native)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__) && defined(__FMA__)
  return (Native)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

PLD_INLINE float lanes_max(Native x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int i = 1; i < kNativeLanes; ++i) top = x[i] > top ? x[i] : top;
  return top;
#endif
}

// A tree: (i, i + n / 2), ...
PLD_INLINE float lanes_sum(Native x) {
  float a[kNativeLanes];
  native_store(a, x);
  for (int n = kNativeLanes / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) a[i] += a[i + n];
  return a[0];
}

// exp(x) for x <= 0 as 2^n 2^r, |r| <= 1/2 (Cephes' polynomial); 0 below about -86.6, without denormals; a NaN stays
// one. The error is below 1e-7 absolute: what weights need.
PLD_INLINE Native exp_of_negative(Native x) {
  const Native log2e = native_splat(1.44269504088896341f), least = native_splat(-125.0f);
  const Native y = x * log2e;
#if defined(__AVX512F__)
  const Native n = (Native)_mm512_roundscale_ps((__m512)y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const Native magic = native_splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the rounded integer in the low bits
  const Native shifted = y + magic;
  const Native n = shifted - magic;
#endif
  const Native r = y - n;
  Native p = native_splat(1.535336188319500e-4f);
  p = native_fma(p, r, native_splat(1.339887440266574e-3f));
  p = native_fma(p, r, native_splat(9.618437357674640e-3f));
  p = native_fma(p, r, native_splat(5.550332471162809e-2f));
  p = native_fma(p, r, native_splat(2.402264791363012e-1f));
  p = native_fma(p, r, native_splat(6.931472028550421e-1f));
  p = native_fma(p, r, native_splat(1.0f));
#if defined(__AVX512F__)
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)y, (__m512)least, _CMP_NLT_UQ);
  return (Native)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n);
#else
  const Native power = (Native)(((NativeBits)shifted << 23) + 0x3f800000u);
  return (Native)((NativeBits)(p * power) & ~(NativeBits)(y < least));
#endif
}

// tanh: a polynomial near 0 (Cephes), by exp elsewhere.
PLD_INLINE Native tanh_of_score(Native x) {
  const Native z = x * x;
  Native p = native_splat(-5.70498872745e-3f);
  p = native_fma(p, z, native_splat(2.06390887954e-2f));
  p = native_fma(p, z, native_splat(-5.37397155531e-2f));
  p = native_fma(p, z, native_splat(1.33314422036e-1f));
  p = native_fma(p, z, native_splat(-3.33332819422e-1f));
  const Native near = native_fma(p * z, x, x);
  const NativeBits sign = (NativeBits)x & 0x80000000u;
  const Native size = (Native)((NativeBits)x ^ sign);
  const Native e = exp_of_negative(size * -2.0f);
  const Native far = (Native)((NativeBits)((1.0f - e) / (1.0f + e)) | sign);
  const NativeBits is_near = (NativeBits)(size < 0.625f);
  return (Native)((is_near & (NativeBits)near) | (~is_near & (NativeBits)far));
}

// The state of a pair between tiles, beside its sum of values.
struct Softmax {
  Native sum;  // of the weights, a lane each
  float max;
  bool begun;  // a tile has been seen
};

PLD_INLINE void begin_softmax(Softmax &state, float *acc, int64_t width) {
  state = {Native{}, -__builtin_inff(), false};
  memset(acc, 0, (size_t)width * sizeof(float));
}

// Adds what another softmax has come to: both brought to the greater maximum.
static void merge_softmax(Softmax &state, float *acc, const Softmax &other, const float *other_acc, int64_t width) {
  if (!other.begun) return;
  if (!state.begun) {
    state = other;
    memcpy(acc, other_acc, (size_t)width * sizeof(float));
    return;
  }
  const float max = other.max > state.max ? other.max : state.max;
  const Native mine = exp_of_negative(native_splat(state.max - max));
  const Native theirs = exp_of_negative(native_splat(other.max - max));
  state.sum = state.sum * mine + other.sum * theirs;
  state.max = max;
  for (int64_t e = 0; e < width; e += kNativeLanes)
    native_store(acc + e, native_load(acc + e) * mine + native_load(other_acc + e) * theirs);
}

// How raw scores become weights: the scale of the dot products, the soft cap (0: none), and for int8 the scales of the
// keys and values of each group of sixteen positions (null: none).
struct Softening {
  float scale, softcap;
  bool bf16;  // weights are stored as bfloat16
  const float *const *key_scales, *const *value_scales;
};

PLD_INLINE void store_weights(Native weight, bool bf16, void *weights, int position) {
  if (!bf16) {
    native_store((float *)weights + position, weight);
    return;
  }
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)weight);
  memcpy((uint16_t *)weights + position, &rounded, sizeof rounded);
#else
  typedef uint16_t Halves __attribute__((vector_size(kNativeLanes * 2)));
  const NativeBits u = (NativeBits)weight;
  const Halves rounded = __builtin_convertvector((u + 0x7fffu + ((u >> 16) & 1u)) >> 16, Halves);
  memcpy((uint16_t *)weights + position, &rounded, sizeof rounded);
#endif
}

PLD_INLINE NativeBits seen_lanes(int position, int begin, int end) {
  typedef int32_t Lanes __attribute__((vector_size(sizeof(Native))));
  Lanes lane;
  for (int i = 0; i < kNativeLanes; ++i) lane[i] = position + i;
  return (NativeBits)((lane >= begin) & (lane < end));
}

// What `soften` does, on vectors [first, last) of the tile: constants where the tile is whole, so that the loops
// unroll.
PLD_INLINE void soften_vectors(const Softening &s, float softcap, float *scores, void *weights, int begin, int end,
                               int first, int last, Softmax &state, float *acc, int64_t width) {
  Native top = native_splat(-__builtin_inff());
  PLD_UNROLL
  for (int v = first; v < last; ++v) {
    const int position = v * kNativeLanes;
    Native x = native_load(scores + position) * s.scale;
    if (s.key_scales != nullptr) x = x * native_load(s.key_scales[position / kLanes] + position % kLanes);
    if (softcap > 0) x = softcap * tanh_of_score(x / softcap);
    if (position < begin || position + kNativeLanes > end) {
      const NativeBits seen = seen_lanes(position, begin, end);
      x = (Native)((seen & (NativeBits)x) | (~seen & 0xff800000u));  // minus infinity
    }
    native_store(scores + position, x);
    top = native_max(top, x);
  }
  const float tile_max = lanes_max(top), old_max = state.max, new_max = tile_max > old_max ? tile_max : old_max;
  Native tile_sum = {};
  PLD_UNROLL
  for (int v = first; v < last; ++v) {
    const int position = v * kNativeLanes;
    Native weight = exp_of_negative(native_load(scores + position) - new_max);
    tile_sum = tile_sum + weight;
    if (s.value_scales != nullptr) {
      weight = weight * native_load(s.value_scales[position / kLanes] + position % kLanes);
      weight = (Native)((NativeBits)weight & seen_lanes(position, begin, end));  // a scale may be anything there
    }
    store_weights(weight, s.bf16, weights, position);
  }
  state.begun = true;
  if (old_max == new_max) {
    state.sum = state.sum + tile_sum;
    return;
  }
  const Native correction = exp_of_negative(native_splat(old_max - new_max));
  state.sum = state.sum * correction + tile_sum;
  state.max = new_max;
  for (int64_t e = 0; e < width; e += kNativeLanes) native_store(acc + e, native_load(acc + e) * correction);
}

// Scores of positions [begin, end) of a tile become weights, those of [low, begin) and [end, high) 0; what went before
// (`state`, and acc[0 .. width)) is rescaled to the new maximum.
static void soften(const Softening &s, float *scores, void *weights, int begin, int end, int low, int high,
                   Softmax &state, float *acc, int64_t width) {
  if (begin == 0 && end == kTile && s.softcap <= 0)
    soften_vectors(s, 0.0f, scores, weights, 0, kTile, 0, kTile / kNativeLanes, state, acc, width);
  else
    soften_vectors(s, s.softcap, scores, weights, begin, end, low / kNativeLanes,
                   (high + kNativeLanes - 1) / kNativeLanes, state, acc, width);
}

}  // namespace PLD_ISA_NS
}  // namespace pld
