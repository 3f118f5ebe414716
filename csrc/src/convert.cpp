// Weights on their way in: any storage type to float32 or bfloat16, in rows or in panels of 64 rows.
#include <algorithm>
#include <cstring>
#include <vector>

#include "context.hpp"
#include "dequantize.hpp"
#include "error.hpp"
#include "quantise.hpp"
#include "strips.hpp"

namespace pld {
namespace {

constexpr int64_t kPanelRows = 64;
constexpr int64_t kChunk = 256;  // columns widened at a time: a multiple of every block

bool is_target(pld_dtype dtype) { return dtype == PLD_F32 || dtype == PLD_BF16; }
int64_t ceil_div(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// 0 when out of range.
int64_t row_bytes(pld_dtype dtype, int64_t cols) {
  const StorageType *type = storage_type(dtype);
  int64_t bytes = 0;
  if (type == nullptr || cols < 0 || cols % type->block_values != 0 ||
      __builtin_mul_overflow(cols / type->block_values, type->block_bytes, &bytes))
    return 0;
  return bytes;
}

// 0 when out of range.
int64_t packed_bytes(int64_t rows, int64_t cols, pld_dtype dtype) {
  if (strip_format(dtype) != nullptr) return strips_bytes(rows, cols, dtype);
  int64_t words = 0, bytes = 0;
  if (!is_target(dtype) || rows < 1 || cols < 1 || rows > INT64_MAX - kPanelRows) return 0;
  int64_t row_words =
      dtype == PLD_F32 ? cols : ceil_div(cols, 2);  // a word is 4 bytes: one float32 or a pair of bfloat16
  if (__builtin_mul_overflow(ceil_div(rows, kPanelRows) * kPanelRows, row_words, &words) ||
      __builtin_mul_overflow(words, int64_t{4}, &bytes))
    return 0;
  return bytes;
}

struct Source {
  const uint8_t *data;
  const StorageType *type;
  pld_dtype dtype;
  int64_t cols;
  int64_t row_bytes;
};

pld_status check_source(const void *data, int64_t bytes, pld_dtype dtype, int64_t rows, int64_t cols, Source *source) {
  const StorageType *type = storage_type(dtype);
  if (type == nullptr) return fail(PLD_INVALID_ARGUMENT, "source dtype is %d; it must be in [0, %d]", dtype, PLD_Q6_K);
  if (data == nullptr) return fail(PLD_INVALID_ARGUMENT, "source is null");
  if (rows < 1 || cols < 1)
    return fail(PLD_INVALID_ARGUMENT, "shape is [%lld, %lld]; both must be at least 1", static_cast<long long>(rows),
                static_cast<long long>(cols));
  if (cols % type->block_values != 0)
    return fail(PLD_INVALID_ARGUMENT, "%lld columns are no multiple of the %lld values of a %s block",
                static_cast<long long>(cols), static_cast<long long>(type->block_values), type->name);
  int64_t row = row_bytes(dtype, cols), needed = 0;
  if (row == 0 || __builtin_mul_overflow(row, rows, &needed))
    return fail(PLD_INVALID_ARGUMENT, "shape [%lld, %lld] does not fit the address space", static_cast<long long>(rows),
                static_cast<long long>(cols));
  if (bytes != needed)
    return fail(PLD_INVALID_ARGUMENT, "source has %lld bytes; [%lld, %lld] as %s takes %lld",
                static_cast<long long>(bytes), static_cast<long long>(rows), static_cast<long long>(cols), type->name,
                static_cast<long long>(needed));
  *source = {static_cast<const uint8_t *>(data), type, dtype, cols, row};
  return PLD_OK;
}

pld_status check_target(const void *data, int64_t bytes, pld_dtype dtype, int64_t needed) {
  if (data == nullptr) return fail(PLD_INVALID_ARGUMENT, "target is null");
  if (needed <= 0) return fail(PLD_INVALID_ARGUMENT, "target dtype is %d or its shape is out of range", dtype);
  if (bytes < needed)
    return fail(PLD_INVALID_ARGUMENT, "target has %lld bytes; %lld are needed", static_cast<long long>(bytes),
                static_cast<long long>(needed));
  return PLD_OK;
}

// Columns [col, col + n) of one row as `dtype`, n <= kChunk; col is a multiple of kChunk.
void convert_piece(const Source &source, int64_t row, int64_t col, int64_t n, pld_dtype dtype, void *target) {
  const uint8_t *from =
      source.data + row * source.row_bytes + col / source.type->block_values * source.type->block_bytes;
  int64_t n_blocks = n / source.type->block_values;
  if (dtype == source.dtype) {
    std::memcpy(target, from, static_cast<size_t>(n_blocks * source.type->block_bytes));
  } else if (dtype == PLD_F32) {
    float widened[kChunk];
    source.type->widen(from, n_blocks, widened);
    std::memcpy(target, widened, static_cast<size_t>(n) * 4);
  } else {
    float widened[kChunk];
    uint16_t rounded[kChunk];
    source.type->widen(from, n_blocks, widened);
    for (int64_t i = 0; i < n; ++i) rounded[i] = round_to_bf16(widened[i]);
    std::memcpy(target, rounded, static_cast<size_t>(n) * 2);
  }
}

pld_status convert(pld_context *context, const void *src, int64_t src_bytes, pld_dtype src_dtype, int64_t rows,
                   int64_t cols, void *dst, int64_t dst_bytes, pld_dtype dst_dtype) {
  if (context == nullptr) return fail(PLD_INVALID_ARGUMENT, "context is null");
  Source source;
  if (pld_status status = check_source(src, src_bytes, src_dtype, rows, cols, &source)) return status;
  int64_t target_row = is_target(dst_dtype) ? row_bytes(dst_dtype, cols) : 0, needed = 0;
  if (__builtin_mul_overflow(target_row, rows, &needed)) needed = 0;
  if (pld_status status = check_target(dst, dst_bytes, dst_dtype, needed)) return status;

  int64_t value = dst_dtype == PLD_F32 ? 4 : 2, n_chunks = ceil_div(cols, kChunk);
  int64_t task_rows = std::max<int64_t>(1, 64 / n_chunks);
  auto *target = static_cast<uint8_t *>(dst);
  std::lock_guard<std::mutex> lock(context->mutex);
  parallel_for(*context, ceil_div(rows, task_rows), [&](int64_t task) {
    for (int64_t row = task * task_rows; row < std::min(rows, (task + 1) * task_rows); ++row)
      for (int64_t col = 0; col < cols; col += kChunk)
        convert_piece(source, row, col, std::min(kChunk, cols - col), dst_dtype,
                      target + row * target_row + col * value);
  });
  return PLD_OK;
}

using Word = uint32_t;
typedef Word Words4 __attribute__((vector_size(16)));

// out[w * kPanelRows + r] = in[r * kChunk + w] for r < rows, w < words: the transpose by which a row becomes a lane.
void scatter(const Word *in, int64_t rows, int64_t words, Word *out) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    const Word *source = in + r * kChunk;
    int64_t w = 0;
    for (; w + 4 <= words; w += 4) {
      Words4 a, b, c, d;
      std::memcpy(&a, source + w, 16);
      std::memcpy(&b, source + kChunk + w, 16);
      std::memcpy(&c, source + 2 * kChunk + w, 16);
      std::memcpy(&d, source + 3 * kChunk + w, 16);
      Words4 ab_low{a[0], b[0], a[1], b[1]}, ab_high{a[2], b[2], a[3], b[3]};
      Words4 cd_low{c[0], d[0], c[1], d[1]}, cd_high{c[2], d[2], c[3], d[3]};
      Words4 columns[4] = {{ab_low[0], ab_low[1], cd_low[0], cd_low[1]},
                           {ab_low[2], ab_low[3], cd_low[2], cd_low[3]},
                           {ab_high[0], ab_high[1], cd_high[0], cd_high[1]},
                           {ab_high[2], ab_high[3], cd_high[2], cd_high[3]}};
      for (int i = 0; i < 4; ++i) std::memcpy(out + (w + i) * kPanelRows + r, &columns[i], 16);
    }
    for (; w < words; ++w)
      for (int64_t i = 0; i < 4; ++i) out[w * kPanelRows + r + i] = source[i * kChunk + w];
  }
  for (; r < rows; ++r)
    for (int64_t w = 0; w < words; ++w) out[w * kPanelRows + r] = in[r * kChunk + w];
}

// Rows [row_offset, + rows) of a matrix in strips.
pld_status pack_strips(pld_context *context, const Source &source, int64_t rows, int64_t row_offset, uint8_t *target,
                       pld_dtype dtype) {
  const bool exact = dtype == source.dtype;
  if (!exact && !can_quantise_to(dtype))
    return fail(PLD_NOT_SUPPORTED, "values of type %s cannot be rounded to dtype %d", source.type->name, dtype);
  const int64_t one = strip_bytes(*strip_format(dtype), source.cols);
  const int64_t first = row_offset / kStrip, last = (row_offset + rows - 1) / kStrip;
  std::lock_guard<std::mutex> lock(context->mutex);
  parallel_for(*context, last - first + 1, [&](int64_t task) {
    const int64_t strip = first + task, begin = std::max(row_offset, strip * kStrip);
    std::vector<float> widened(exact ? 0 : static_cast<size_t>(source.cols + kChunk));
    std::vector<uint8_t> blocks(exact ? 0 : static_cast<size_t>(source.cols / 32 * 34 + 64));
    for (int64_t row = begin; row < std::min(row_offset + rows, (strip + 1) * kStrip); ++row) {
      const uint8_t *from = source.data + (row - row_offset) * source.row_bytes;
      if (exact) {
        blocks_to_strip(from, source.cols, dtype, row % kStrip, target + strip * one);
        continue;
      }
      source.type->widen(from, source.cols / source.type->block_values, widened.data());
      floats_to_strip(widened.data(), source.cols, dtype, row % kStrip, blocks.data(), target + strip * one);
    }
  });
  return PLD_OK;
}

pld_status pack(pld_context *context, const void *src, int64_t src_bytes, pld_dtype src_dtype, int64_t rows,
                int64_t cols, int64_t row_offset, int64_t dst_rows, void *dst, int64_t dst_bytes, pld_dtype dst_dtype) {
  if (context == nullptr) return fail(PLD_INVALID_ARGUMENT, "context is null");
  Source source;
  if (pld_status status = check_source(src, src_bytes, src_dtype, rows, cols, &source)) return status;
  if (row_offset < 0 || dst_rows < 1 || row_offset > dst_rows || rows > dst_rows - row_offset)
    return fail(PLD_INVALID_ARGUMENT, "rows [%lld, %lld + %lld) are not within the %lld of the target",
                static_cast<long long>(row_offset), static_cast<long long>(row_offset), static_cast<long long>(rows),
                static_cast<long long>(dst_rows));
  if (pld_status status = check_target(dst, dst_bytes, dst_dtype, packed_bytes(dst_rows, cols, dst_dtype)))
    return status;
  if (strip_format(dst_dtype) != nullptr)
    return pack_strips(context, source, rows, row_offset, static_cast<uint8_t *>(dst), dst_dtype);

  int64_t pair = dst_dtype == PLD_F32 ? 1 : 2;
  int64_t panel_words = ceil_div(cols, pair) * kPanelRows;
  int64_t first_panel = row_offset / kPanelRows, last_panel = (row_offset + rows - 1) / kPanelRows;
  auto *target = static_cast<Word *>(dst);
  std::lock_guard<std::mutex> lock(context->mutex);
  parallel_for(*context, last_panel - first_panel + 1, [&](int64_t task) {
    int64_t panel = first_panel + task;
    int64_t begin = std::max(row_offset, panel * kPanelRows);
    int64_t end = std::min(row_offset + rows, (panel + 1) * kPanelRows);
    Word lines[kPanelRows * kChunk];
    for (int64_t col = 0; col < cols; col += kChunk) {
      int64_t n = std::min(kChunk, cols - col), words = ceil_div(n, pair);
      for (int64_t row = begin; row < end; ++row) {
        Word *line = lines + (row - begin) * kChunk;
        if (n % pair != 0) line[words - 1] = 0;
        convert_piece(source, row - row_offset, col, n, dst_dtype, line);
      }
      scatter(lines, end - begin, words, target + panel * panel_words + col / pair * kPanelRows + begin % kPanelRows);
    }
  });
  return PLD_OK;
}

}  // namespace
}  // namespace pld

extern "C" int64_t pld_row_bytes(pld_dtype dtype, int64_t cols) { return pld::row_bytes(dtype, cols); }

extern "C" int64_t pld_packed_bytes(int64_t rows, int64_t cols, pld_dtype dtype) {
  return pld::packed_bytes(rows, cols, dtype);
}

extern "C" pld_status pld_convert(pld_context *context, const void *src, int64_t src_bytes, pld_dtype src_dtype,
                                  int64_t rows, int64_t cols, void *dst, int64_t dst_bytes, pld_dtype dst_dtype) {
  return pld::guard(
      [&] { return pld::convert(context, src, src_bytes, src_dtype, rows, cols, dst, dst_bytes, dst_dtype); });
}

extern "C" pld_status pld_pack(pld_context *context, const void *src, int64_t src_bytes, pld_dtype src_dtype,
                               int64_t rows, int64_t cols, int64_t row_offset, int64_t dst_rows, void *dst,
                               int64_t dst_bytes, pld_dtype dst_dtype) {
  return pld::guard([&] {
    return pld::pack(context, src, src_bytes, src_dtype, rows, cols, row_offset, dst_rows, dst, dst_bytes, dst_dtype);
  });
}
