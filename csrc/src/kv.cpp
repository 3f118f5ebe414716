#include "kv.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>

#include "dequantize.hpp"
#include "error.hpp"
#include "sequences.hpp"
#include "sized.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#define PLD_HAS_MMAP 1
#else
#define PLD_HAS_MMAP 0
#endif

namespace pld {
namespace {

constexpr int32_t kMaxHeadDim = 2048;  // bounds what attention keeps in its thread scratch
constexpr int64_t kGroup = 16;         // positions of a K group
constexpr pld_kv_params kDefaultParams = {sizeof(pld_kv_params), 1, 1, 64, 16, 1, PLD_BF16, PLD_KV_BLOCK};

bool multiply(int64_t a, int64_t b, int64_t *product) { return !__builtin_mul_overflow(a, b, product); }
int64_t value_bytes(pld_dtype dtype) { return dtype == PLD_F32 ? 4 : dtype == PLD_BF16 ? 2 : 1; }

struct Field {
  const char *name;
  int32_t value, limit;
};

// Everything but the memory. The three sizes fit int64, and so does their sum.
pld_status plan_kv(const pld_kv_params *given, pld_kv *kv, int64_t *total_bytes) {
  pld_kv_params copy = kDefaultParams;
  if (pld_status status = read_sized(given, &copy)) return status;
  const pld_kv_params *params = &copy;
  const Field fields[] = {{"n_layers", params->n_layers, INT32_MAX},
                          {"n_kv_heads", params->n_kv_heads, INT32_MAX},
                          {"head_dim", params->head_dim, kMaxHeadDim},
                          {"block_size", params->block_size, INT32_MAX},
                          {"n_blocks", params->n_blocks, INT32_MAX}};
  for (const Field &field : fields)
    if (field.value < 1 || field.value > field.limit)
      return fail(PLD_INVALID_ARGUMENT, "kv %s is %d; it must be in [1, %d]", field.name, field.value, field.limit);
  if (params->head_dim % 2 != 0)
    return fail(PLD_INVALID_ARGUMENT, "kv head_dim is %d; it must be even", params->head_dim);
  if (params->dtype != PLD_F32 && params->dtype != PLD_BF16 && params->dtype != PLD_I8)
    return fail(PLD_INVALID_ARGUMENT, "kv dtype is %d; it must be F32 (%d), BF16 (%d) or I8 (%d)", params->dtype,
                PLD_F32, PLD_BF16, PLD_I8);
  if (params->layout != PLD_KV_BLOCK && params->layout != PLD_KV_SLOT)
    return fail(PLD_INVALID_ARGUMENT, "kv layout is %d; it must be BLOCK (0) or SLOT (1)", params->layout);
  if (params->layout == PLD_KV_SLOT && params->block_size != 1)
    return fail(PLD_INVALID_ARGUMENT, "kv block_size is %d; with the SLOT layout it must be 1", params->block_size);
  *kv = {};
  kv->layout = params->layout;
  kv->is_undecided = params->struct_size == Sized<pld_kv_params>::kOldest && params->block_size == 1;
  kv->n_layers = params->n_layers;
  kv->n_kv_heads = params->n_kv_heads;
  kv->head_dim = params->head_dim;
  kv->block_size = params->block_size;
  kv->n_blocks = params->n_blocks;
  kv->dtype = params->dtype;
  kv->n_cells = static_cast<int64_t>(params->n_blocks) * params->block_size;
  kv->n_groups = kv->n_cells / kGroup + (kv->n_cells % kGroup != 0);
  kv->value_width = (params->head_dim + kGroup - 1) / kGroup * kGroup;
  kv->value_bytes = value_bytes(params->dtype);
  kv->v_offset = kGroup * params->head_dim * kv->value_bytes;
  kv->v_offset = (kv->v_offset + 63) / 64 * 64;
  kv->scale_offset = kv->v_offset + kGroup * kv->value_width * kv->value_bytes;
  kv->unit_bytes = kv->scale_offset + (params->dtype == PLD_I8 ? 2 * kGroup * 4 : 0);
  int64_t group_bytes = 0;
  const bool fits = multiply(params->n_kv_heads, kv->unit_bytes, &group_bytes) &&
                    multiply(kv->n_groups, group_bytes, &kv->layer_bytes) &&
                    multiply(kv->layer_bytes, params->n_layers, total_bytes) &&
                    static_cast<uint64_t>(*total_bytes) <= SIZE_MAX / 2;
  if (!fits)
    return fail(PLD_INVALID_ARGUMENT,
                "a kv cache of %d layers, %d heads of %d and %d blocks of %d does not fit the address space",
                params->n_layers, params->n_kv_heads, params->head_dim, params->n_blocks, params->block_size);
  return PLD_OK;
}

size_t data_bytes(const pld_kv &kv) { return static_cast<size_t>(kv.layer_bytes) * static_cast<size_t>(kv.n_layers); }

// Zeroed memory of which untouched pages cost nothing; null when there is none.
std::byte *reserve(size_t bytes) {
#if PLD_HAS_MMAP
  void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return nullptr;
#ifdef MADV_HUGEPAGE
  madvise(memory, bytes, MADV_HUGEPAGE);  // a step reads a little from very many places
#endif
  return static_cast<std::byte *>(memory);
#else
  void *raw = std::calloc(bytes + 128, 1);
  if (raw == nullptr) return nullptr;
  auto address = (reinterpret_cast<uintptr_t>(raw) + 127) / 64 * 64;
  std::memcpy(reinterpret_cast<void *>(address - sizeof raw), &raw, sizeof raw);
  return reinterpret_cast<std::byte *>(address);
#endif
}

void release(std::byte *memory, size_t bytes) {
  if (memory == nullptr) return;
#if PLD_HAS_MMAP
  munmap(memory, bytes);
#else
  (void)bytes;
  void *raw;
  std::memcpy(&raw, memory - sizeof raw, sizeof raw);
  std::free(raw);
#endif
}

pld_status create_kv(const pld_kv_params *params, pld_kv **out) {
  if (out == nullptr) return fail(PLD_INVALID_ARGUMENT, "out is null");
  *out = nullptr;
  pld_kv planned;
  int64_t total = 0;
  if (pld_status status = plan_kv(params, &planned, &total)) return status;
  planned.data = reserve(data_bytes(planned));
  if (planned.data == nullptr)
    return fail(PLD_OUT_OF_MEMORY, "no memory for a kv cache of %lld bytes", static_cast<long long>(total));
  try {
    auto sequences = std::make_unique<Sequences>(planned);
    planned.sequences = sequences.get();
    *out = new pld_kv(planned);
    sequences.release();
  } catch (...) {
    release(planned.data, data_bytes(planned));
    throw;
  }
  return PLD_OK;
}

float widen(const std::byte *base, int64_t index, pld_dtype dtype) {
  uint32_t bits = 0;
  if (dtype == PLD_I8) return static_cast<float>(static_cast<int8_t>(base[index]));
  if (dtype == PLD_F32) {
    std::memcpy(&bits, base + index * 4, 4);
  } else {
    uint16_t half;
    std::memcpy(&half, base + index * 2, 2);
    bits = static_cast<uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Where number e of the keys (part 0) or values (part 1) of a lane lies in a unit.
int64_t place_of(const pld_kv &kv, int part, int64_t lane, int64_t e) {
  const int64_t pair = kv.dtype == PLD_F32 ? 1 : 2;
  return part == 0 ? (e / pair * kGroup + lane) * pair + e % pair
                   : kv.v_offset / kv.value_bytes + (lane / pair * kv.value_width + e) * pair + lane % pair;
}

std::byte *unit_of(const pld_kv &kv, int32_t layer, int64_t cell, int64_t g) {
  return kv.data + layer * kv.layer_bytes + (cell / kGroup * kv.n_kv_heads + g) * kv.unit_bytes;
}

pld_status read_kv(const pld_kv *kv, int32_t layer, int64_t cell, float *k, float *v) {
  if (kv == nullptr || k == nullptr || v == nullptr) return fail(PLD_INVALID_ARGUMENT, "kv, k or v is null");
  if (layer < 0 || layer >= kv->n_layers)
    return fail(PLD_INVALID_ARGUMENT, "layer is %d; the cache has %d", layer, kv->n_layers);
  if (cell < 0 || cell >= kv->n_cells)
    return fail(PLD_INVALID_ARGUMENT, "cell is %lld; the cache has %lld", static_cast<long long>(cell),
                static_cast<long long>(kv->n_cells));
  const int64_t width = kv->head_dim, lane = cell % kGroup;
  for (int64_t g = 0; g < kv->n_kv_heads; ++g) {
    const std::byte *unit = unit_of(*kv, layer, cell, g);
    float scale[2] = {1.0f, 1.0f};
    if (kv->dtype == PLD_I8)
      for (int64_t part = 0; part < 2; ++part)
        std::memcpy(&scale[part], unit + kv->scale_offset + (part * kGroup + lane) * 4, 4);
    for (int64_t e = 0; e < width; ++e) {
      k[g * width + e] = widen(unit, place_of(*kv, 0, lane, e), kv->dtype) * scale[0];
      v[g * width + e] = widen(unit, place_of(*kv, 1, lane, e), kv->dtype) * scale[1];
    }
  }
  return PLD_OK;
}

// visit(place, bytes) for each number of a cell, in one order.
template <typename Visit>
void each_number(const pld_kv &kv, int64_t cell, Visit &&visit) {
  for (int32_t layer = 0; layer < kv.n_layers; ++layer)
    for (int64_t g = 0; g < kv.n_kv_heads; ++g) {
      std::byte *unit = unit_of(kv, layer, cell, g);
      for (int part = 0; part < 2; ++part) {
        for (int64_t e = 0; e < kv.head_dim; ++e)
          visit(unit + place_of(kv, part, cell % kGroup, e) * kv.value_bytes, static_cast<size_t>(kv.value_bytes));
        if (kv.dtype == PLD_I8) visit(unit + kv.scale_offset + (part * kGroup + cell % kGroup) * 4, size_t{4});
      }
    }
}

size_t cell_bytes(const pld_kv &kv) {
  const int64_t part = kv.head_dim * kv.value_bytes + (kv.dtype == PLD_I8 ? 4 : 0);
  return static_cast<size_t>(2 * part * kv.n_kv_heads * kv.n_layers);
}

}  // namespace

CellBackup::CellBackup(pld_kv &kv, const std::vector<int64_t> &cells) : kv_(kv) {
  std::copy_if(cells.begin(), cells.end(), std::back_inserter(cells_), [](int64_t cell) { return cell >= 0; });
  saved_.resize(cells_.size() * cell_bytes(kv));
  std::byte *to = saved_.data();
  for (const int64_t cell : cells_)
    each_number(kv, cell, [&](const std::byte *place, size_t bytes) {
      std::memcpy(to, place, bytes);
      to += bytes;
    });
}

CellBackup::~CellBackup() {
  if (saved_.empty()) return;
  const std::byte *from = saved_.data();
  for (const int64_t cell : cells_)
    each_number(kv_, cell, [&](std::byte *place, size_t bytes) {
      std::memcpy(place, from, bytes);
      from += bytes;
    });
}

void copy_cell(pld_kv &kv, int64_t from, int64_t to) {
  const auto bytes = static_cast<size_t>(kv.value_bytes);
  for (int32_t layer = 0; layer < kv.n_layers; ++layer)
    for (int64_t g = 0; g < kv.n_kv_heads; ++g) {
      const std::byte *source = unit_of(kv, layer, from, g);
      std::byte *target = unit_of(kv, layer, to, g);
      for (int part = 0; part < 2; ++part) {
        for (int64_t e = 0; e < kv.head_dim; ++e)
          std::memcpy(target + place_of(kv, part, to % kGroup, e) * kv.value_bytes,
                      source + place_of(kv, part, from % kGroup, e) * kv.value_bytes, bytes);
        if (kv.dtype == PLD_I8)
          std::memcpy(target + kv.scale_offset + (part * kGroup + to % kGroup) * 4,
                      source + kv.scale_offset + (part * kGroup + from % kGroup) * 4, 4);
      }
    }
}

void store_keys(pld_kv &kv, int32_t layer, int64_t cell, const float *keys) {
  const int64_t lane = cell % kGroup;
  for (int64_t g = 0; g < kv.n_kv_heads; ++g, keys += kv.head_dim) {
    std::byte *unit = unit_of(kv, layer, cell, g);
    float greatest = 0.0f;
    for (int64_t e = 0; e < kv.head_dim; ++e) {
      const float size = std::fabs(keys[e]);
      greatest = size > greatest || std::isnan(size) ? size : greatest;  // a NaN stays, as when keys are first written
    }
    const float scale = greatest / 127.0f;
    const float inverse = scale > 0.0f && 1.0f / scale < 3.0e38f ? 1.0f / scale : 0.0f;
    if (kv.dtype == PLD_I8) std::memcpy(unit + kv.scale_offset + lane * 4, &scale, 4);
    for (int64_t e = 0; e < kv.head_dim; ++e) {
      std::byte *place = unit + place_of(kv, 0, lane, e) * kv.value_bytes;
      const uint16_t half = round_to_bf16(keys[e]);
      const float rounded = std::nearbyint(keys[e] * inverse);
      const auto quant = static_cast<int8_t>(rounded >= -127.0f && rounded <= 127.0f ? rounded : 0.0f);
      if (kv.dtype == PLD_F32)
        std::memcpy(place, &keys[e], 4);
      else if (kv.dtype == PLD_BF16)
        std::memcpy(place, &half, 2);
      else
        std::memcpy(place, &quant, 1);
    }
  }
}

}  // namespace pld

extern "C" pld_status pld_kv_params_init(pld_kv_params *params, size_t size) {
  return pld::guard([&] { return pld::init_sized(pld::kDefaultParams, params, size); });
}

extern "C" pld_status pld_kv_create(const pld_kv_params *params, pld_kv **out) {
  return pld::guard([&] { return pld::create_kv(params, out); });
}

extern "C" void pld_kv_destroy(pld_kv *kv) {
  if (kv == nullptr) return;
  pld::release(kv->data, pld::data_bytes(*kv));
  delete kv->sequences;
  delete kv;
}

extern "C" int64_t pld_kv_bytes(const pld_kv_params *params) {
  pld_kv planned;
  int64_t total = -1;
  return pld::guard([&] { return pld::plan_kv(params, &planned, &total); }) == PLD_OK ? total : -1;
}

extern "C" pld_status pld_kv_read(const pld_kv *kv, int32_t layer, int64_t cell, float *k, float *v) {
  return pld::guard([&] { return pld::read_kv(kv, layer, cell, k, v); });
}
