#include "error.hpp"

#include <cstdarg>
#include <cstdio>

namespace pld {

static thread_local char error_text[512] = "";

pld_status fail(pld_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  return status;
}

void clear_error() { error_text[0] = '\0'; }

}  // namespace pld

extern "C" const char *pld_last_error(void) { return pld::error_text; }
extern "C" int32_t pld_abi_version(void) { return PLD_ABI_VERSION; }
