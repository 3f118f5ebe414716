// The one reader and writer of structs whose size the caller says: params, which begin with it, and elements of arrays.
//
// A caller built against an older header has fewer fields: those that are missing keep their defaults. One built
// against a newer header has more: they must all be zero, which means their defaults. `oldest` is the size of the first
// version.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <vector>

#include "error.hpp"
#include "pellucid.h"

namespace pld {

inline constexpr size_t kMaxStructSize = 4096;  // so that a size that was never set is not read over

// What messages call a struct, and the bytes of its first version.
template <typename Struct>
struct Sized;
#define PLD_SIZED(Struct, NAME, OLDEST)          \
  template <>                                    \
  struct Sized<Struct> {                         \
    static constexpr const char *kName = NAME;   \
    static constexpr size_t kOldest = OLDEST;    \
    static_assert(OLDEST <= sizeof(Struct), ""); \
  }
PLD_SIZED(pld_cpu_info, "cpu_info", 168);
PLD_SIZED(pld_context_params, "context_params", 20);
PLD_SIZED(pld_weight, "weight", 32);
PLD_SIZED(pld_kv_params, "kv_params", 32);
PLD_SIZED(pld_batch, "batch", 80);
PLD_SIZED(pld_sample_row, "sample_row", 168);
PLD_SIZED(pld_sample_result, "sample_result", 16);
PLD_SIZED(pld_sample_call, "sample_call", 56);
PLD_SIZED(pld_op, "op", sizeof(pld_op));
PLD_SIZED(pld_buffer, "buffer", 16);
PLD_SIZED(pld_op_call, "op_call", sizeof(pld_op_call));
PLD_SIZED(pld_program_desc, "program_desc", 72);
PLD_SIZED(pld_model_params, "model_params", 16);
PLD_SIZED(pld_model_info, "model_info", 104);
PLD_SIZED(pld_verify_params, "verify_params", 32);
PLD_SIZED(pld_decode_batch, "decode_batch", 80);
PLD_SIZED(pld_kv_stats, "kv_stats", 40);
#undef PLD_SIZED

template <typename Struct>
pld_status check_size(size_t size, const char *field) {
  using Known = Sized<Struct>;
  if (size < Known::kOldest || size > kMaxStructSize)
    return fail(PLD_INVALID_ARGUMENT, "%s is %zu; it must be in [%zu, %zu]", field, size, Known::kOldest,
                kMaxStructSize);
  return PLD_OK;
}

// Copies what a caller's struct of `size` bytes has over `copy`, which holds the defaults. False: it has more that is
// set.
template <typename Struct>
bool read_fields(const void *given, size_t size, Struct *copy) {
  const auto *bytes = static_cast<const unsigned char *>(given);
  std::memcpy(static_cast<void *>(copy), bytes, std::min(size, sizeof(Struct)));
  return size <= sizeof(Struct) ||
         std::all_of(bytes + sizeof(Struct), bytes + size, [](unsigned char byte) { return byte == 0; });
}

// Writes `value` to a caller's struct of `size` bytes; fields that are unknown here become zero.
template <typename Struct>
void write_fields(const Struct &value, void *out, size_t size) {
  std::memset(out, 0, size);
  std::memcpy(out, &value, std::min(size, sizeof(Struct)));
}

// A copy of params that begin with their size; `copy` comes with the defaults.
template <typename Struct>
pld_status read_sized(const Struct *given, Struct *copy) {
  const char *name = Sized<Struct>::kName;
  if (given == nullptr) return fail(PLD_INVALID_ARGUMENT, "%s is null", name);
  size_t size = 0;
  std::memcpy(&size, given, sizeof size);
  char field[64];
  std::snprintf(field, sizeof field, "%s.struct_size", name);
  if (pld_status status = check_size<Struct>(size, field)) return status;
  if (!read_fields(given, size, copy))
    return fail(PLD_INVALID_ARGUMENT, "%s.struct_size is %zu: unknown fields behind byte %zu are set", name, size,
                sizeof(Struct));
  return PLD_OK;
}

// Fills a struct that begins with its size, and keeps that.
template <typename Struct>
pld_status write_sized(Struct value, Struct *out) {
  Struct given = {};
  if (out == nullptr) return fail(PLD_INVALID_ARGUMENT, "%s is null", Sized<Struct>::kName);
  std::memcpy(&given.struct_size, out, sizeof given.struct_size);
  char field[64];
  std::snprintf(field, sizeof field, "%s.struct_size", Sized<Struct>::kName);
  if (pld_status status = check_size<Struct>(given.struct_size, field)) return status;
  value.struct_size = given.struct_size;
  write_fields(value, out, value.struct_size);
  return PLD_OK;
}

// Fills params of the caller's size with defaults.
template <typename Struct>
pld_status init_sized(Struct defaults, Struct *out, size_t size) {
  if (out == nullptr) return fail(PLD_INVALID_ARGUMENT, "%s is null", Sized<Struct>::kName);
  if (pld_status status = check_size<Struct>(size, "size")) return status;
  defaults.struct_size = size;
  write_fields(defaults, out, size);
  return PLD_OK;
}

// Bytes from one element to the next, as a caller says; 0: those of the first version.
template <typename Struct>
pld_status read_stride(size_t given, const char *field, size_t *stride) {
  *stride = given == 0 ? Sized<Struct>::kOldest : given;
  return check_size<Struct>(*stride, field);
}

// Elements of an array at a stride. `list` names the array in messages.
template <typename Struct>
pld_status read_elements(const void *given, size_t stride, int64_t count, const char *list, std::vector<Struct> *out) {
  out->assign(static_cast<size_t>(count), {});
  for (int64_t i = 0; i < count; ++i)
    if (!read_fields(static_cast<const char *>(given) + static_cast<size_t>(i) * stride, stride,
                     &(*out)[static_cast<size_t>(i)]))
      return fail(PLD_INVALID_ARGUMENT, "%s[%lld] has %zu bytes: unknown fields behind byte %zu are set", list,
                  static_cast<long long>(i), stride, sizeof(Struct));
  return PLD_OK;
}

}  // namespace pld
