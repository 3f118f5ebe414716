// Sixteen-lane vectors for every instruction set: GCC/Clang vector extensions, and the few operations that need an
// intrinsic. Included only by the per-ISA translation units, inside their namespace (PLD_ISA_NS), so that no inline
// function compiled for a newer machine can be linked into code for an older one. For the same reason no standard
// template is used in kernels.
//
// All arithmetic is spelled out: -ffp-contract=off, and fma() where a fused multiply-add is meant. Lane order of sums
// is fixed (hsum).
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define PLD_INLINE static inline __attribute__((always_inline))
#define PLD_MEMBER inline __attribute__((always_inline))
#if !defined(__AVX512F__)
#include "wide.hpp"
#endif

namespace pld {
namespace PLD_ISA_NS {

#if defined(__AVX512F__)
typedef float vf __attribute__((vector_size(64), aligned(64)));
typedef int32_t vi __attribute__((vector_size(64), aligned(64)));
typedef uint32_t vu __attribute__((vector_size(64), aligned(64)));
typedef uint16_t vh __attribute__((vector_size(32), aligned(32)));
#else
using vf = Sixteen<FloatRegister, float>;
using vi = Sixteen<IntRegister, int32_t>;
using vu = Sixteen<UintRegister, uint32_t>;
using vh = Sixteen<HalfRegister, uint16_t>;
#endif
constexpr int kLanes = 16;

PLD_INLINE vf splat(float x) {
#if defined(__AVX512F__)
  return (vf)_mm512_set1_ps(x);
#else
  vf v;
  splat_lanes(v, x);
  return v;
#endif
}
PLD_INLINE vf load(const float *p) {
  vf v;
#if defined(__AVX512F__)
  memcpy(&v, p, sizeof v);
#else
  read_lanes(v, p);
#endif
  return v;
}
PLD_INLINE void store(float *p, vf v) {
#if defined(__AVX512F__)
  memcpy(p, &v, sizeof v);
#else
  write_lanes(p, v);
#endif
}
// The first n lanes (0 <= n <= 16); the others are 0 / untouched. Reads nothing behind the n-th float.
PLD_INLINE vf load_n(const float *p, int n) {
#if defined(__AVX512F__)
  return (vf)_mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1u), p);
#else
  float a[kLanes] = {};
  memcpy(a, p, (size_t)n * sizeof(float));
  return load(a);
#endif
}
PLD_INLINE void store_n(float *p, vf v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << n) - 1u), (__m512)v);
#else
  float a[kLanes];
  store(a, v);
  memcpy(p, a, (size_t)n * sizeof(float));
#endif
}

// a * b + c, rounded once where the machine can, twice on the portable path.
PLD_INLINE vf fma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return fma_lanes(a, b, c);
#endif
}
PLD_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
PLD_INLINE vf vmax(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return select(a > b, a, b);
#endif
}
PLD_INLINE vf vmin(vf a, vf b) {
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return select(a < b, a, b);
#endif
}
// Sum of the lanes as a fixed tree: (i, i + 8), (i, i + 4), (i, i + 2), (0, 1).
PLD_INLINE float hsum(vf v) {
  float a[16];
  store(a, v);
  for (int w = 8; w > 0; w >>= 1)
    for (int i = 0; i < w; ++i) a[i] += a[i + w];
  return a[0];
}
PLD_INLINE float hmax(vf v) {
  float a[16];
  store(a, v);
  for (int w = 8; w > 0; w >>= 1)
    for (int i = 0; i < w; ++i) a[i] = a[i] > a[i + w] ? a[i] : a[i + w];
  return a[0];
}

// bfloat16, rounded to nearest even; a NaN stays a NaN.
PLD_INLINE uint16_t to_bf16(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
  return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
PLD_INLINE float from_bf16(uint16_t h) {
  uint32_t u = (uint32_t)h << 16;
  float x;
  memcpy(&x, &u, 4);
  return x;
}
template <typename To, typename From>
PLD_INLINE To convert(From from) {
#if defined(__AVX512F__)
  return __builtin_convertvector(from, To);
#else
  To to;
  convert_lanes(to, from);
  return to;
#endif
}
PLD_INLINE vf from_bf16(vh h) { return (vf)(convert<vu>(h) << 16); }
// In plain integer arithmetic on every machine, so that a denormal rounds alike everywhere.
PLD_INLINE vh to_bf16(vf x) {
  vu u = (vu)x;
  vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  vu nan = (u >> 16) | 0x40u;
  vu is_nan = (vu)((u & 0x7fffffffu) > 0x7f800000u);
  return convert<vh>((is_nan & nan) | (~is_nan & rounded));
}

// exp(x) for x <= about 88, 0 below about -87.3 (no denormals); Cephes' degree-6 polynomial after range reduction by ln
// 2; < 2 ulp.
PLD_INLINE vf vexp(vf x) {
  const vf lo = splat(-87.33654f), hi = splat(88.37626f);
  vi under = x < lo;
  x = vmin(hi, vmax(lo, x));      // in this order a NaN stays one
  vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  vf n = fma(x, splat(1.44269504088896341f), magic) - magic;
  vf r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  vf p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  vi e = (convert<vi>(n) + 127) << 23;
  return select(under, vf{}, p * (vf)e);
}

}  // namespace PLD_ISA_NS
}  // namespace pld
