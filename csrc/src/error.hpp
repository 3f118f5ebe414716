// Failure across the ABI: a status, and its text on the calling thread.
#pragma once

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

}  // namespace pld
