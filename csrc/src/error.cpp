#include "error.hpp"

#include <cstdarg>
#include <cstdio>

namespace pld {

static thread_local char error_text[512] = "";
static thread_local pld_error_item error_item = PLD_ITEM_NONE;
static thread_local int64_t error_index = -1;

// Bytes of the UTF-8 character at `text`; 0: there is none (RFC 3629, table 3-7 of the Unicode standard).
static int character_bytes(const unsigned char *text) {
  const unsigned char first = text[0];
  if (first < 0x80) return 1;
  const int count = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4) return 0;
  const unsigned char low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  const unsigned char high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  if (text[1] < low || text[1] > high) return 0;
  for (int i = 2; i < count; ++i)
    if ((text[i] & 0xc0) != 0x80) return 0;  // a 0 that ends the text among them
  return count;
}

// Texts name what callers gave, such as paths, and are cut where the room ends: each byte that is no UTF-8 becomes '?'.
static void keep_utf8(char *text) {
  for (auto *at = reinterpret_cast<unsigned char *>(text); *at != 0;) {
    const int count = character_bytes(at);
    if (count == 0) *at = '?';
    at += count == 0 ? 1 : count;
  }
}

pld_status fail(pld_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(error_text, sizeof error_text, format, arguments);
  va_end(arguments);
  keep_utf8(error_text);
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
extern "C" int32_t pld_recipe(void) { return 1; }
