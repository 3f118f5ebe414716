// Failure across the ABI: a status, and its text on the calling thread.
#pragma once

#include <cstring>
#include <exception>
#include <new>

#include "pellucid.h"

namespace pld {

// Sets the thread's error text and gives back the status.
pld_status fail(pld_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
// Says which element of the caller's arrays a failure is about, behind `fail`; gives the status on.
pld_status blame(pld_error_item item, int64_t index, pld_status status);
void clear_error();

// Runs a function that returns a status; no exception leaves it.
template <typename Function>
pld_status guard(Function &&function) {
  clear_error();
  try {
    return function();
  } catch (const std::bad_alloc &) {
    return fail(PLD_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception &error) {
    return fail(PLD_INTERNAL, "internal error: %s", error.what());
  } catch (...) {
    return fail(PLD_INTERNAL, "internal error");
  }
}

// Params structs begin with their size: smaller ones come from callers built against another header.
template <typename Struct>
pld_status check_size(const Struct *value, const char *name) {
  if (value == nullptr) return fail(PLD_INVALID_ARGUMENT, "%s is null", name);
  if (value->struct_size < sizeof(Struct))
    return fail(PLD_INVALID_ARGUMENT, "%s.struct_size is %zu; this core needs %zu", name, value->struct_size,
                sizeof(Struct));
  return PLD_OK;
}

// A copy of params that may come from an older header: fields behind `struct_size` keep their defaults. `oldest` is the
// size of the first version.
template <typename Struct>
pld_status read_params(const Struct *value, size_t oldest, const char *name, Struct *copy) {
  if (value == nullptr) return fail(PLD_INVALID_ARGUMENT, "%s is null", name);
  if (value->struct_size < oldest)
    return fail(PLD_INVALID_ARGUMENT, "%s.struct_size is %zu; it must be at least %zu", name, value->struct_size,
                oldest);
  std::memcpy(static_cast<void *>(copy), value,
              value->struct_size < sizeof(Struct) ? value->struct_size : sizeof(Struct));
  return PLD_OK;
}

}  // namespace pld
