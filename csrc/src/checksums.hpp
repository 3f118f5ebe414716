// The checksums at the end of a compiled model. See pellucid/program/checksums.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pld {

// Bytes that one checksum stands for; the last block may be shorter.
constexpr int64_t kChecksumBlock = 1 << 20;

// Bytes of a file before its checksums: a file has that many, then four for each block, then four for those. -1: no
// file of that size has checksums.
int64_t content_bytes(int64_t file_bytes);

// CRC-32 as gzip and PNG have it, of `size` more bytes behind those that gave `crc`; 0 to begin with.
uint32_t crc32(uint32_t crc, const void *data, size_t size);

}  // namespace pld
