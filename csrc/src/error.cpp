#include "error.hpp"

#include <cstdarg>
#include <cstdio>

namespace pld {

static thread_local char error_text[512] = "";
static thread_local pld_error_item error_item = PLD_ITEM_NONE;
static thread_local int64_t error_index = -1;

pld_status fail(pld_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return blame(PLD_ITEM_NONE, -1, status);
}

pld_status blame(pld_error_item item, int64_t index, pld_status status) {
  error_item = item;
  error_index = index;
  return status;
}

void clear_error() {
  error_text[0] = '\0';
  blame(PLD_ITEM_NONE, -1, PLD_OK);
}

}  // namespace pld

extern "C" const char *pld_last_error(void) { return pld::error_text; }
extern "C" pld_error_item pld_last_error_item(int64_t *index) {
  if (index != nullptr) *index = pld::error_index;
  return pld::error_item;
}
extern "C" int32_t pld_abi_version(void) { return PLD_ABI_VERSION; }
