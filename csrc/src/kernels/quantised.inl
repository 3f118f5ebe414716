// linear with quantised weights: out = act(x W^T + b) over strips of 32 columns (strips.hpp).
//
// A row of x becomes int8 with one scale for each group of 32 values. The products of a group are summed exactly in
// int32, whatever the order; then sum * (scale of w * scale of x) is added to the element's one float accumulator by
// one fused multiply-add, groups ascending. So neither the shape of a tile nor the cut into tasks changes a bit.
//
// Quants of W are stored without sign: w = zero + stored, and the accumulator of a group begins at -zero * sum(x).

namespace pld {
namespace PLD_ISA_NS {

typedef int32_t ni __attribute__((vector_size(kNative * 4)));

// What stands beside a group of a row of x.
struct GroupSums {
  float scale;       // of x
  float scaled_sum;  // scale * sum(x), for types with a minimum
  int32_t start[2];  // -zero * sum(x): of 32 values (PLD_Q6_K: of either half)
};

#if defined(__AVX512F__)
constexpr bool kSignedEight = false;
#else
constexpr bool kSignedEight = true;  // dot_eight takes off the 128 itself
#endif

PLD_INLINE ni splat_word(const int8_t *x) {
  int32_t word;
  memcpy(&word, x, 4);
#if defined(__AVX512F__)
  return (ni)_mm512_set1_epi32(word);
#elif defined(__AVX2__)
  return (ni)_mm256_set1_epi32(word);
#else
  return ni{word, word, word, word};
#endif
}
PLD_INLINE ni splat_int(int32_t x) {
#if defined(__AVX512F__)
  return (ni)_mm512_set1_epi32(x);
#elif defined(__AVX2__)
  return (ni)_mm256_set1_epi32(x);
#else
  return ni{x, x, x, x};
#endif
}

// acc + the four products of each lane; w without sign and at most 63.
PLD_INLINE ni dot_small(ni acc, ni w, ni x) {
#if defined(__AVX512F__)
  return (ni)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
  const __m256i pairs = _mm256_maddubs_epi16((__m256i)w, (__m256i)x);
  return acc + (ni)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  uint8_t a[kNative * 4];
  int8_t b[kNative * 4];
  memcpy(a, &w, sizeof a);
  memcpy(b, &x, sizeof b);
  for (int c = 0; c < kNative; ++c)
    for (int i = 0; i < 4; ++i) acc[c] += a[4 * c + i] * b[4 * c + i];
  return acc;
#endif
}
// The same for stored quants of 8 bits.
PLD_INLINE ni dot_eight(ni acc, ni w, ni x) {
#if defined(__AVX512F__)
  return dot_small(acc, w, x);
#elif defined(__AVX2__)
  const __m256i centred = _mm256_xor_si256((__m256i)w, _mm256_set1_epi8((char)0x80));
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(centred), _mm256_sign_epi8((__m256i)x, centred));
  return acc + (ni)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
  uint8_t a[kNative * 4];
  int8_t b[kNative * 4];
  memcpy(a, &w, sizeof a);
  memcpy(b, &x, sizeof b);
  for (int c = 0; c < kNative; ++c)
    for (int i = 0; i < 4; ++i) acc[c] += (a[4 * c + i] - 128) * b[4 * c + i];
  return acc;
#endif
}

PLD_INLINE nf to_float(ni x) { return __builtin_convertvector(x, nf); }

PLD_INLINE float from_half(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  uint32_t bits = magnitude << 13;
  float value;
  memcpy(&value, &bits, 4);
  value *= 5.192296858534828e33f;  // 2^112
  memcpy(&bits, &value, 4);
  bits = (magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : bits) | sign;
  memcpy(&value, &bits, 4);
  return value;
}
PLD_INLINE nf load_halves(const uint8_t *p) {
#if defined(__AVX512F__)
  return (nf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX2__)
  return (nf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
  uint16_t h[kNative];
  memcpy(h, p, sizeof h);
  nf v;
  for (int i = 0; i < kNative; ++i) v[i] = from_half(h[i]);
  return v;
#endif
}
// Bytes as floats. Spelled out, because the compiler would take them one by one.
PLD_INLINE nf load_unsigned(const uint8_t *p) {
#if defined(__AVX512F__)
  return (nf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  return (nf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
  return nf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
#endif
}
PLD_INLINE nf load_signed(const uint8_t *p) {
#if defined(__AVX512F__)
  return (nf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
#elif defined(__AVX2__)
  return (nf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
#else
  return nf{(float)(int8_t)p[0], (float)(int8_t)p[1], (float)(int8_t)p[2], (float)(int8_t)p[3]};
#endif
}

// A type of weights: where a group's quants and scales are found, for native vector v at column c of the strip.
template <pld_dtype kType>
struct Quantised {
  static constexpr const StripFormat &kFormat = *strip_format(kType);
  static constexpr bool kEight = kType == PLD_Q8_0 || kType == PLD_I8, kHalves = kType == PLD_Q6_K;
  static constexpr bool kMinimum = kType == PLD_Q4_1 || kType == PLD_Q4_K || kType == PLD_Q5_K;
  static constexpr int kZero = kEight && kSignedEight ? 0 : kFormat.zero;

  // Word row `s` (of 8) of a group's quants, as numbers without sign.
  PLD_INLINE ni word(const uint8_t *quants, int s, int c) {
    if constexpr (kEight) return load_native<ni>(quants + s * 128 + c * 4);
    const nu low = load_native<nu>(quants + s % 4 * 128 + c * 4);
    nu q = (s < 4 ? low : low >> 4) & 0x0f0f0f0fu;
    if constexpr (kType == PLD_Q5_K) {
      const nu high = load_native<nu>(quants + 512 + c * 4);
      q |= (s < 4 ? high << (4 - s) : high >> (s - 4)) & 0x10101010u;
    }
    if constexpr (kType == PLD_Q6_K) {
      const nu high = load_native<nu>(quants + 512 + s / 4 * 128 + c * 4);
      q |= (s % 4 < 2 ? high << (4 - s % 4 * 2) : high >> (s % 4 * 2 - 4)) & 0x30303030u;
    }
    return (ni)q;
  }
  PLD_INLINE ni dot(ni acc, ni w, ni x) { return kEight ? dot_eight(acc, w, x) : dot_small(acc, w, x); }

  // The scale of w in half `h` of a group, and its minimum; `unit` and `group` are where those begin.
  PLD_INLINE nf scale(const uint8_t *unit, const uint8_t *group, int h, int c) {
    const nf d = load_halves(unit + c * 2);
    if constexpr (kType == PLD_Q4_K || kType == PLD_Q5_K) return d * load_unsigned(group + c);
    if constexpr (kType == PLD_Q6_K) return d * load_signed(group + h * 32 + c);
    return d;
  }
  PLD_INLINE nf minimum(const uint8_t *unit, const uint8_t *group, int c) {
    const nf m = load_halves(unit + 64 + c * 2);
    if constexpr (kType == PLD_Q4_1) return m;
    return -(m * load_unsigned(group + 32 + c));
  }
};

// The bytes behind a slab, which is what is read next: asked for a few lines at a time while the slab is computed.
struct AheadBytes {
  const uint8_t *next, *end;
  int64_t per_group;  // bytes
};

PLD_INLINE void request(AheadBytes &a) {
  const uint8_t *stop = a.next + a.per_group < a.end ? a.next + a.per_group : a.end;
  const uint8_t *next = a.next;
  for (; next < stop; next += kLine) __builtin_prefetch(next, 0, 3);
  a.next = next;
}

constexpr int kQuantVectors = 2;
#if defined(__AVX512F__)
constexpr int kQuantRows = 6;  // 12 integer and 12 float accumulators of 32 registers
#else
constexpr int kQuantRows = 3;
#endif

// M rows times kQuantVectors vectors at column `c` of a strip, over groups [begin, end), added to `sums` (rows of
// kPanel).
template <typename Q, int M>
static void quantised_tile(const int8_t *x, int64_t x_stride, const GroupSums *beside, int64_t n_groups,
                           const uint8_t *strip, int64_t begin, int64_t end, int c, float *sums, AheadBytes &ahead) {
  constexpr int V = kQuantVectors;
  nf total[M][V];
  PLD_FULLY
  for (int m = 0; m < M; ++m) PLD_FULLY
  for (int v = 0; v < V; ++v) total[m][v] = load_native<nf>(sums + m * kPanel + v * kNative);
  for (int64_t g = begin; g < end; ++g) {
    request(ahead);
    const uint8_t *unit = strip + unit_offset(Q::kFormat, g), *group = strip + group_offset(Q::kFormat, g);
    const uint8_t *quants = group + Q::kFormat.group_head;
    PLD_FULLY
    for (int h = 0; h < (Q::kHalves ? 2 : 1); ++h) {
      ni acc[M][V];
      PLD_FULLY
      for (int m = 0; m < M; ++m) PLD_FULLY
      for (int v = 0; v < V; ++v) acc[m][v] = splat_int(beside[m * n_groups + g].start[h]);
      PLD_FULLY
      for (int j = 0; j < (Q::kHalves ? 4 : 8); ++j) {
        const int s = Q::kHalves ? 4 * h + j : j / 2 + j % 2 * 4;  // both halves of a byte one after the other
        ni w[V];
        PLD_FULLY
        for (int v = 0; v < V; ++v) w[v] = Q::word(quants, s, c + v * kNative);
        PLD_FULLY
        for (int m = 0; m < M; ++m) {
          const ni a = splat_word(x + m * x_stride + g * kQuantGroup + s * 4);
          PLD_FULLY
          for (int v = 0; v < V; ++v) acc[m][v] = Q::dot(acc[m][v], w[v], a);
        }
      }
      nf scale[V];
      PLD_FULLY
      for (int v = 0; v < V; ++v) scale[v] = Q::scale(unit, group, h, c + v * kNative);
      PLD_FULLY
      for (int m = 0; m < M; ++m) {
        const nf a = splat_native(beside[m * n_groups + g].scale);
        PLD_FULLY
        for (int v = 0; v < V; ++v) total[m][v] = fma_native(to_float(acc[m][v]), scale[v] * a, total[m][v]);
      }
    }
    if constexpr (Q::kMinimum) {
      nf minimum[V];
      PLD_FULLY
      for (int v = 0; v < V; ++v) minimum[v] = Q::minimum(unit, group, c + v * kNative);
      PLD_FULLY
      for (int m = 0; m < M; ++m) {
        const nf a = splat_native(beside[m * n_groups + g].scaled_sum);
        PLD_FULLY
        for (int v = 0; v < V; ++v) total[m][v] = fma_native(minimum[v], a, total[m][v]);
      }
    }
  }
  PLD_FULLY
  for (int m = 0; m < M; ++m) PLD_FULLY
  for (int v = 0; v < V; ++v) memcpy(sums + m * kPanel + v * kNative, &total[m][v], sizeof(nf));
}

// PLD_I8: one scale a row and a column, so that all of K is one integer sum.
template <int M>
static void channel_tile(const int8_t *x, int64_t x_stride, const GroupSums *beside, int64_t n_groups,
                         const uint8_t *strip, int c, float *sums, AheadBytes &ahead) {
  using Q = Quantised<PLD_I8>;
  constexpr int V = kQuantVectors;
  ni acc[M][V];
  PLD_FULLY
  for (int m = 0; m < M; ++m) PLD_FULLY
  for (int v = 0; v < V; ++v) acc[m][v] = splat_int(beside[m].start[0]);
  for (int64_t g = 0; g < n_groups; ++g) {
    request(ahead);
    const uint8_t *quants = strip + group_offset(Q::kFormat, g);
    PLD_FULLY
    for (int s = 0; s < 8; ++s) {
      ni w[V];
      PLD_FULLY
      for (int v = 0; v < V; ++v) w[v] = Q::word(quants, s, c + v * kNative);
      PLD_FULLY
      for (int m = 0; m < M; ++m) {
        const ni a = splat_word(x + m * x_stride + g * kQuantGroup + s * 4);
        PLD_FULLY
        for (int v = 0; v < V; ++v) acc[m][v] = Q::dot(acc[m][v], w[v], a);
      }
    }
  }
  PLD_FULLY
  for (int m = 0; m < M; ++m) {
    const nf a = splat_native(beside[m].scale);
    PLD_FULLY
    for (int v = 0; v < V; ++v) {
      const nf scale = load_native<nf>(strip + (c + v * kNative) * 4);
      const nf y = to_float(acc[m][v]) * (scale * a);
      memcpy(sums + m * kPanel + v * kNative, &y, sizeof y);
    }
  }
}

// A row block of x as int8, and what stands beside its groups.
struct QuantisedRows {
  const int8_t *x;
  int64_t stride;  // bytes
  const GroupSums *beside;
  int64_t beside_stride, n_groups;
};

template <pld_dtype kType, int M>
PLD_INLINE void quantised_rows_of(int64_t rows, const QuantisedRows &r, int64_t row, const uint8_t *strip,
                                  int64_t begin, int64_t end, int c, float *sums, AheadBytes &ahead) {
  if constexpr (M > 0) {
    if (rows != M) return quantised_rows_of<kType, M - 1>(rows, r, row, strip, begin, end, c, sums, ahead);
    const int8_t *x = r.x + row * r.stride;
    const GroupSums *beside = r.beside + row * r.beside_stride;
    if constexpr (kType == PLD_I8)
      channel_tile<M>(x, r.stride, beside, r.n_groups, strip, c, sums, ahead);
    else
      quantised_tile<Quantised<kType>, M>(x, r.stride, beside, r.n_groups, strip, begin, end, c, sums, ahead);
  }
}

// Groups of a strip that all rows pass over at once: slabs of nearly equal size that stay in the first-level cache.
template <pld_dtype kType>
PLD_INLINE int64_t slab_groups(int64_t n_groups) {
  constexpr const StripFormat &kFormat = *strip_format(kType);
  constexpr int64_t kMost = 24 * 1024 * kFormat.unit_values / (unit_bytes(kFormat) * kQuantGroup);
  const int64_t slabs = (n_groups + kMost - 1) / kMost;
  return (n_groups + slabs - 1) / slabs;
}

// `rows` rows times one strip. `behind`: what is read next.
template <pld_dtype kType>
static void strip_sums(const QuantisedRows &r, int64_t rows, const uint8_t *strip, const uint8_t *behind, float *sums) {
  constexpr const StripFormat &kFormat = *strip_format(kType);
  constexpr int kColumns = kQuantVectors * kNative, kMost = kType == PLD_I8 ? 2 * kQuantRows : kQuantRows;
  const int64_t tiles = (rows + kMost - 1) / kMost,
                slab = kType == PLD_I8 ? r.n_groups : slab_groups<kType>(r.n_groups);
  for (int64_t m = 0; m < rows; ++m) memset(sums + m * kPanel, 0, kStrip * sizeof(float));
  for (int64_t group = 0; group < r.n_groups; group += slab) {
    const int64_t stop = group + slab < r.n_groups ? group + slab : r.n_groups;
    const int64_t visits = (stop - group) * tiles * (kStrip / kColumns);
    const int64_t bytes = unit_bytes(kFormat) * kQuantGroup / kFormat.unit_values * (stop - group);
    const uint8_t *next = stop < r.n_groups ? strip + group_offset(kFormat, stop) : behind;
    AheadBytes ahead = {next, next + bytes, (bytes / kLine + visits - 1) / visits * kLine};
    for (int c = 0; c < kStrip; c += kColumns)
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = tile * rows / tiles, height = (tile + 1) * rows / tiles - row;
        quantised_rows_of<kType, kMost>(height, r, row, strip, group, stop, c, sums + row * kPanel + c, ahead);
      }
  }
}

static void strip_sums_of(pld_dtype dtype, const QuantisedRows &r, int64_t rows, const uint8_t *strip,
                          const uint8_t *behind, float *sums) {
  switch (dtype) {
    case PLD_I8:
      return strip_sums<PLD_I8>(r, rows, strip, behind, sums);
    case PLD_Q8_0:
      return strip_sums<PLD_Q8_0>(r, rows, strip, behind, sums);
    case PLD_Q4_0:
      return strip_sums<PLD_Q4_0>(r, rows, strip, behind, sums);
    case PLD_Q4_1:
      return strip_sums<PLD_Q4_1>(r, rows, strip, behind, sums);
    case PLD_Q4_K:
      return strip_sums<PLD_Q4_K>(r, rows, strip, behind, sums);
    case PLD_Q5_K:
      return strip_sums<PLD_Q5_K>(r, rows, strip, behind, sums);
    default:
      return strip_sums<PLD_Q6_K>(r, rows, strip, behind, sums);
  }
}

// ---- rounding of x -------------------------------------------------------------------------------------------------

// How the scratch of a linear op holds its quantised input: rows of int8 in one region, what stands beside them in
// another.
struct QuantisedInput {
  int64_t row_bytes, n_groups, n_beside;

  QuantisedInput(pld_dtype dtype, int64_t width) {
    n_groups = (width + kQuantGroup - 1) / kQuantGroup;
    row_bytes = (n_groups * kQuantGroup + 63) / 64 * 64;
    n_beside = dtype == PLD_I8 ? 1 : n_groups;
  }
};

static int zero_of(pld_dtype dtype) {
  const bool eight = dtype == PLD_Q8_0 || dtype == PLD_I8;
  return eight && kSignedEight ? 0 : strip_format(dtype)->zero;
}

// The greatest magnitude as its bits: ordered as integers, so that a NaN is the greatest of all.
PLD_INLINE uint32_t greatest_bits(const float *x, int64_t count) {
  vi most = {};
  for_lanes(count, [&](int64_t i, int n) {
    const vi bits = (vi)load_lanes(x + i, n) & 0x7fffffff, above = bits > most;
    most = (above & bits) | (~above & most);
  });
  int32_t lanes[kLanes], result = 0;
  memcpy(lanes, &most, sizeof lanes);
  for (int i = 0; i < kLanes; ++i) result = lanes[i] > result ? lanes[i] : result;
  return (uint32_t)result;
}

struct Rounding {
  float scale, inverse;
};
// A group that is not finite gets a scale of NaN, which reaches every output of its row.
PLD_INLINE Rounding rounding_of(uint32_t bits) {
  float greatest;
  memcpy(&greatest, &bits, 4);
  if (bits >= 0x7f800000u) return {__builtin_nanf(""), 0.0f};
  const float scale = greatest / 127.0f;
  return {scale, scale > 0.0f && 127.0f / greatest < 3.0e38f ? 127.0f / greatest : 0.0f};
}

// Sixteen values as int8; gives their sum. With inverse 0 the values may be anything and all become 0.
PLD_INLINE int32_t round_sixteen(vf x, float inverse, int8_t *out) {
  if (inverse == 0.0f) x = vf{};
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vi q = convert<vi>((x * splat(inverse) + magic) - magic);
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i *)out, _mm512_cvtepi32_epi8((__m512i)q));
  return _mm512_reduce_add_epi32((__m512i)q);
#else
  int32_t lanes[kLanes], sum = 0;
  memcpy(lanes, &q, sizeof lanes);
  for (int i = 0; i < kLanes; ++i) {
    out[i] = (int8_t)lanes[i];
    sum += lanes[i];
  }
  return sum;
#endif
}

// The scratch of a linear op, row by row.
struct QuantisedTarget {
  int8_t *x;
  GroupSums *beside;

  QuantisedTarget(const OpArgs &args, const QuantisedInput &layout, int64_t row)
      : x((int8_t *)args.scratch[0] + row * layout.row_bytes),
        beside((GroupSums *)args.scratch[1] + row * layout.n_beside) {}
};

// `count` values, at most a group, as int8; gives the sums of both halves.
PLD_INLINE void round_group(const float *x, int64_t count, float inverse, int8_t *out, int32_t sums[2]) {
  for (int h = 0; h < 2; ++h) {
    const int64_t left = count - 16 * h;
    const vf values = left >= 16 ? load(x + 16 * h) : left > 0 ? load_n(x + 16 * h, (int)left) : vf{};
    sums[h] = round_sixteen(values, inverse, out + 16 * h);
  }
}

// A whole group with a scale of its own: every type but PLD_I8.
PLD_INLINE void quantise_group(const float *x, pld_dtype dtype, const QuantisedTarget &target, int64_t g) {
  const Rounding rounding = rounding_of(greatest_bits(x, kQuantGroup));
  int32_t sums[2];
  round_group(x, kQuantGroup, rounding.inverse, target.x + g * kQuantGroup, sums);
  const int32_t sum = sums[0] + sums[1], zero = zero_of(dtype);
  target.beside[g] = {
      rounding.scale, rounding.scale * (float)sum, {-zero * (dtype == PLD_Q6_K ? sums[0] : sum), -zero * sums[1]}};
}

static void quantise_row(const OpArgs &args, int64_t row) {
  const int64_t width = args.in_width[0];
  const pld_dtype dtype = args.weight[0]->dtype;
  const QuantisedInput layout(dtype, width);
  const QuantisedTarget target(args, layout, row);
  const float *x = args.in[0] + row * args.in_stride[0];
  if (dtype != PLD_I8) {
    for (int64_t g = 0; g < layout.n_groups; ++g) quantise_group(x + g * kQuantGroup, dtype, target, g);
    return;
  }
  const Rounding rounding = rounding_of(greatest_bits(x, width));
  int32_t total = 0, sums[2];
  for (int64_t k = 0; k < width; k += kQuantGroup) {
    round_group(x + k, width - k < kQuantGroup ? width - k : kQuantGroup, rounding.inverse, target.x + k, sums);
    total += sums[0] + sums[1];
  }
  target.beside[0] = {rounding.scale, 0.0f, {-zero_of(dtype) * total, 0}};
}

// Rows of a task: as many as stay in the second-level cache while strips pass by.
static int64_t quantised_block_rows(int64_t width) {
  const int64_t rows = 256 * 1024 / width / 12 * 12;
  return rows < 48 ? 48 : rows > 192 ? 192 : rows;
}

// One row of W, exactly as stored: for embeddings that share the head's matrix.
static void dequantise_row(const pld_weight &w, int64_t row, float *out) {
  const StripFormat &format = *strip_format(w.dtype);
  const uint8_t *strip = (const uint8_t *)w.data + row / kStrip * strip_bytes(format, w.cols);
  const int64_t c = row % kStrip;
  for (int64_t g = 0; g * kQuantGroup < w.cols; ++g) {
    const uint8_t *unit = strip + unit_offset(format, g), *group = strip + group_offset(format, g);
    const uint8_t *quants = group + format.group_head;
    float d = 0.0f, m = 0.0f, scale[2];
    uint16_t half[2] = {0, 0};
    if (w.dtype == PLD_I8) {
      memcpy(&d, strip + 4 * c, 4);
    } else {
      memcpy(&half[0], unit + 2 * c, 2);
      if (format.unit_head > 64) memcpy(&half[1], unit + 64 + 2 * c, 2);
      d = from_half(half[0]);
      m = from_half(half[1]);
    }
    scale[0] = scale[1] = d;
    if (w.dtype == PLD_Q4_K || w.dtype == PLD_Q5_K) {
      scale[0] = scale[1] = d * (float)group[c];
      m = -(m * (float)group[32 + c]);
    } else if (w.dtype == PLD_Q6_K) {
      for (int h = 0; h < 2; ++h) scale[h] = d * (float)(int8_t)group[h * 32 + c];
    }
    const int64_t count = w.cols - g * kQuantGroup < kQuantGroup ? w.cols - g * kQuantGroup : kQuantGroup;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = i / 4, place = c * 4 + i % 4;
      int q = quants[(format.quant_bytes == 1024 ? s : s % 4) * 128 + place];
      if (format.quant_bytes != 1024) q = s < 4 ? q & 15 : q >> 4;
      if (w.dtype == PLD_Q5_K) q |= (quants[512 + place] >> s & 1) << 4;
      if (w.dtype == PLD_Q6_K) q |= (quants[512 + s / 4 * 128 + place] >> s % 4 * 2 & 3) << 4;
      const float value = scale[i / 16] * (float)(q - format.zero);
      out[g * kQuantGroup + i] = format.unit_head > 64 ? value + m : value;
    }
  }
}

}  // namespace PLD_ISA_NS
}  // namespace pld
