// Sixteen lanes of registers that are narrower. GCC keeps a vector type that no register holds in memory; a pair of
// halves, and of halves of halves, stays in registers. It has the operators of a vector type, so that code is written
// once. Included only by simd.hpp.

namespace pld {
namespace PLD_ISA_NS {

// Vec is a vector type or a pair, E its element.
template <typename Vec, typename E>
struct Pair {
  Vec lo, hi;

  // The same bits as another type.
  template <typename OtherVec, typename Other>
  PLD_MEMBER explicit operator Pair<OtherVec, Other>() const {
    return {(OtherVec)lo, (OtherVec)hi};
  }
  PLD_MEMBER E operator[](int i) const {
    constexpr int kHalf = (int)(sizeof(Vec) / sizeof(E));
    return i < kHalf ? lo[i] : hi[i - kHalf];
  }
};

#define PLD_PAIR_BINARY(op)                                                    \
  template <typename Vec, typename E>                                          \
  PLD_INLINE Pair<Vec, E> operator op(Pair<Vec, E> a, Pair<Vec, E> b) {        \
    return {a.lo op b.lo, a.hi op b.hi};                                       \
  }                                                                            \
  template <typename Vec, typename E>                                          \
  PLD_INLINE Pair<Vec, E> operator op(Pair<Vec, E> a, decltype(E{} + E{}) b) { \
    return {a.lo op b, a.hi op b};                                             \
  }                                                                            \
  template <typename Vec, typename E>                                          \
  PLD_INLINE Pair<Vec, E> operator op(decltype(E{} + E{}) a, Pair<Vec, E> b) { \
    return {a op b.lo, a op b.hi};                                             \
  }                                                                            \
  template <typename Vec, typename E>                                          \
  PLD_INLINE Pair<Vec, E> &operator op##=(Pair<Vec, E> &a, Pair<Vec, E> b) {   \
    a = a op b;                                                                \
    return a;                                                                  \
  }
PLD_PAIR_BINARY(+)
PLD_PAIR_BINARY(-)
PLD_PAIR_BINARY(*)
PLD_PAIR_BINARY(/)
PLD_PAIR_BINARY(&)
PLD_PAIR_BINARY(|)
PLD_PAIR_BINARY(<<)
PLD_PAIR_BINARY(>>)
#undef PLD_PAIR_BINARY

// Masks: all bits of a lane where the comparison holds.
#define PLD_PAIR_COMPARE(op)                                                  \
  template <typename Vec, typename E>                                         \
  PLD_INLINE auto operator op(Pair<Vec, E> a, Pair<Vec, E> b) {               \
    return Pair<decltype(a.lo op b.lo), int32_t>{a.lo op b.lo, a.hi op b.hi}; \
  }                                                                           \
  template <typename Vec, typename E>                                         \
  PLD_INLINE auto operator op(Pair<Vec, E> a, decltype(E{} + E{}) b) {        \
    return Pair<decltype(a.lo op b), int32_t>{a.lo op b, a.hi op b};          \
  }
PLD_PAIR_COMPARE(<)
PLD_PAIR_COMPARE(>)
PLD_PAIR_COMPARE(==)
PLD_PAIR_COMPARE(!=)
#undef PLD_PAIR_COMPARE

template <typename Vec, typename E>
PLD_INLINE Pair<Vec, E> operator-(Pair<Vec, E> a) {
  return {-a.lo, -a.hi};
}
template <typename Vec, typename E>
PLD_INLINE Pair<Vec, E> operator~(Pair<Vec, E> a) {
  return {~a.lo, ~a.hi};
}

// By halves, down to what a register holds.
template <typename Vec>
PLD_INLINE void read_lanes(Vec &v, const void *p) {
  memcpy(&v, p, sizeof v);
}
template <typename Vec, typename E>
PLD_INLINE void read_lanes(Pair<Vec, E> &v, const void *p) {
  read_lanes(v.lo, p);
  read_lanes(v.hi, (const char *)p + sizeof v.lo);
}
template <typename Vec>
PLD_INLINE void write_lanes(void *p, const Vec &v) {
  memcpy(p, &v, sizeof v);
}
template <typename Vec, typename E>
PLD_INLINE void write_lanes(void *p, const Pair<Vec, E> &v) {
  write_lanes(p, v.lo);
  write_lanes((char *)p + sizeof v.lo, v.hi);
}
template <typename To, typename From>
PLD_INLINE void convert_lanes(To &to, const From &from) {
  to = __builtin_convertvector(from, To);
}
template <typename ToVec, typename To, typename FromVec, typename From>
PLD_INLINE void convert_lanes(Pair<ToVec, To> &to, const Pair<FromVec, From> &from) {
  convert_lanes(to.lo, from.lo);
  convert_lanes(to.hi, from.hi);
}
template <typename Vec>
PLD_INLINE void splat_lanes(Vec &v, float x) {
#if defined(__AVX2__)
  v = (Vec)_mm256_set1_ps(x);
#else
  v = Vec{x, x, x, x};
#endif
}
template <typename Vec, typename E>
PLD_INLINE void splat_lanes(Pair<Vec, E> &v, float x) {
  splat_lanes(v.lo, x);
  splat_lanes(v.hi, x);
}
template <typename Vec>
PLD_INLINE Vec fma_lanes(Vec a, Vec b, Vec c) {
#if defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
template <typename Vec, typename E>
PLD_INLINE Pair<Vec, E> fma_lanes(Pair<Vec, E> a, Pair<Vec, E> b, Pair<Vec, E> c) {
  return {fma_lanes(a.lo, b.lo, c.lo), fma_lanes(a.hi, b.hi, c.hi)};
}

// Four lanes in 16 bytes are what every machine has.
#define PLD_LANES(name, element, count) typedef element name __attribute__((vector_size(count * sizeof(element))))
#if defined(__AVX2__)
PLD_LANES(FloatRegister, float, 8);
PLD_LANES(IntRegister, int32_t, 8);
PLD_LANES(UintRegister, uint32_t, 8);
PLD_LANES(HalfRegister, uint16_t, 8);
template <typename Vec, typename E>
using Sixteen = Pair<Vec, E>;
#else
PLD_LANES(FloatRegister, float, 4);
PLD_LANES(IntRegister, int32_t, 4);
PLD_LANES(UintRegister, uint32_t, 4);
PLD_LANES(HalfRegister, uint16_t, 4);
template <typename Vec, typename E>
using Sixteen = Pair<Pair<Vec, E>, E>;
#endif
#undef PLD_LANES

}  // namespace PLD_ISA_NS
}  // namespace pld
