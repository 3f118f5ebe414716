// A compiled model, mapped: magic `PLDPROG4`; u64 length of a header for Python; the index; sections; checksums. See
// pellucid/program/file.py. Everything that a hostile file could say is checked before it is believed.
#include <cstring>
#include <memory>
#include <vector>

#include "checksums.hpp"
#include "error.hpp"
#include "op.hpp"
#include "pellucid.h"
#include "sized.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace pld {
namespace {

struct Section {
  uint64_t offset, length;
};
enum { kPlan, kOps, kBuffers, kWeights, kData, kNumSections };

struct Preamble {
  char magic[8];
  uint64_t header_bytes;
  Section index[kNumSections];
};

// The plan section.
struct Plan {
  int32_t n_forward_ops, hidden, logits, vocab_size;
  int32_t n_layers, n_kv_heads, head_dim, max_positions;
  int32_t kv_dtype, n_end_tokens, end_tokens[16];
};

// A row of the weights section; the offset is within the data section.
struct WeightPlace {
  int64_t rows, cols, offset, bytes;
  int32_t dtype, layout;
};

class Mapping {
 public:
  ~Mapping() {
#if defined(__unix__) || defined(__APPLE__)
    if (data_ != nullptr) munmap(data_, size_);
    if (file_ >= 0) ::close(file_);
#endif
  }
  pld_status open(const char *path) {
#if defined(__unix__) || defined(__APPLE__)
    file_ = ::open(path, O_RDONLY | O_CLOEXEC);
    if (file_ < 0) return fail(PLD_INVALID_ARGUMENT, "%s: cannot be opened", path);
    struct stat info;
    if (fstat(file_, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > 0) {
      void *memory = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, file_, 0);
      if (memory != MAP_FAILED) {
        data_ = memory;
        size_ = static_cast<size_t>(info.st_size);
      }
    }
    (void)flock(file_, LOCK_SH);  // who tidies a cache of models leaves this one alone
    return data_ != nullptr ? PLD_OK : fail(PLD_INVALID_ARGUMENT, "%s: cannot be mapped", path);
#else
    return fail(PLD_NOT_SUPPORTED, "%s: this system maps no files", path);
#endif
  }
  const char *data() const { return static_cast<const char *>(data_); }
  size_t size() const { return size_; }

 private:
  void *data_ = nullptr;
  size_t size_ = 0;
  int file_ = -1;
};

}  // namespace
}  // namespace pld

struct pld_model {
  pld::Mapping file;
  pld::Plan plan;
  pld_program *program = nullptr;
  ~pld_model() { pld_program_destroy(program); }
};

namespace pld {
namespace {

pld_status check_preamble(const Mapping &file, const char *path, Preamble *preamble) {
  if (file.size() < sizeof *preamble) return fail(PLD_INVALID_ARGUMENT, "%s: too short for a model", path);
  std::memcpy(preamble, file.data(), sizeof *preamble);
  if (std::memcmp(preamble->magic, "PLDPROG4", 8) != 0)
    return fail(PLD_INVALID_ARGUMENT, "%s: no compiled model of this version", path);
  const int64_t content = content_bytes(static_cast<int64_t>(file.size()));
  if (content < static_cast<int64_t>(sizeof *preamble))
    return fail(PLD_INVALID_ARGUMENT, "%s: %zu bytes are no size of a compiled model: it was cut", path, file.size());
  const auto size = static_cast<uint64_t>(content);
  for (int i = 0; i < kNumSections; ++i) {
    const Section &s = preamble->index[i];
    if (s.offset % 64 != 0 || s.offset > size || s.length > size - s.offset)
      return fail(PLD_INVALID_ARGUMENT, "%s: section %d [%llu, +%llu] lies outside %llu bytes", path, i,
                  static_cast<unsigned long long>(s.offset), static_cast<unsigned long long>(s.length),
                  static_cast<unsigned long long>(size));
  }
  if (preamble->index[kPlan].length != sizeof(Plan))
    return fail(PLD_INVALID_ARGUMENT, "%s: the plan has %llu bytes; it must have %zu", path,
                static_cast<unsigned long long>(preamble->index[kPlan].length), sizeof(Plan));
  const size_t sizes[kNumSections] = {1, sizeof(pld_op), sizeof(pld_buffer), sizeof(WeightPlace), 1};
  for (int i = kOps; i <= kWeights; ++i)
    if (preamble->index[i].length % sizes[i] != 0 || preamble->index[i].length / sizes[i] > (1u << 21))
      return fail(PLD_INVALID_ARGUMENT, "%s: section %d has %llu bytes", path, i,
                  static_cast<unsigned long long>(preamble->index[i].length));
  return PLD_OK;
}

pld_status place_weights(const pld_model &model, const Preamble &preamble, std::vector<pld_weight> *weights) {
  const Section &table = preamble.index[kWeights], &data = preamble.index[kData];
  for (uint64_t at = 0; at < table.length; at += sizeof(WeightPlace)) {
    WeightPlace place;
    std::memcpy(&place, model.file.data() + table.offset + at, sizeof place);
    const auto index = static_cast<int>(weights->size());
    if (place.offset < 0 || place.bytes < 1 || static_cast<uint64_t>(place.offset) > data.length ||
        static_cast<uint64_t>(place.bytes) > data.length - static_cast<uint64_t>(place.offset))
      return fail(PLD_INVALID_ARGUMENT, "weight %d lies outside the data", index);
    const pld_weight weight = {model.file.data() + data.offset + place.offset, place.rows, place.cols, place.dtype,
                               place.layout};
    if (pld_status status = check_weight(weight, index)) return status;
    int64_t needed = 0;
    if (place.layout == PLD_PANELS)
      needed = pld_packed_bytes(place.rows, place.cols, place.dtype);
    else if (__builtin_mul_overflow(pld_row_bytes(place.dtype, place.cols), place.rows, &needed))
      needed = 0;
    if (needed != place.bytes)
      return fail(PLD_INVALID_ARGUMENT, "weight %d has %lld bytes; its shape takes %lld", index,
                  static_cast<long long>(place.bytes), static_cast<long long>(needed));
    weights->push_back(weight);
  }
  return PLD_OK;
}

template <typename Row>
std::vector<Row> rows_of(const pld_model &model, const Section &section) {
  std::vector<Row> rows(section.length / sizeof(Row));
  if (!rows.empty()) std::memcpy(rows.data(), model.file.data() + section.offset, section.length);
  return rows;
}

constexpr pld_model_params kDefaultParams = {sizeof(pld_model_params), 512, 32};

pld_status open_model(pld_context *context, const char *path, const pld_model_params *given, pld_model **out) {
  if (context == nullptr || path == nullptr || out == nullptr)
    return fail(PLD_INVALID_ARGUMENT, "context, path or out is null");
  *out = nullptr;
  pld_model_params params = kDefaultParams;
  if (pld_status status = read_sized(given, &params)) return status;
  auto model = std::make_unique<pld_model>();
  if (pld_status status = model->file.open(path)) return status;
  Preamble preamble;
  if (pld_status status = check_preamble(model->file, path, &preamble)) return status;
  std::memcpy(&model->plan, model->file.data() + preamble.index[kPlan].offset, sizeof(Plan));
  if (model->plan.n_end_tokens < 0 || model->plan.n_end_tokens > 16)
    return fail(PLD_INVALID_ARGUMENT, "%s: %d end tokens", path, model->plan.n_end_tokens);
  std::vector<pld_weight> weights;
  if (pld_status status = place_weights(*model, preamble, &weights)) return status;
  const auto ops = rows_of<pld_op>(*model, preamble.index[kOps]);
  const auto buffers = rows_of<pld_buffer>(*model, preamble.index[kBuffers]);
  pld_program_desc desc = {};
  desc.struct_size = sizeof desc;
  desc.n_ops = static_cast<int32_t>(ops.size());
  desc.n_forward_ops = model->plan.n_forward_ops;
  desc.n_buffers = static_cast<int32_t>(buffers.size());
  desc.n_weights = static_cast<int32_t>(weights.size());
  desc.ops = ops.data();
  desc.buffers = buffers.data();
  desc.weights = weights.data();
  desc.hidden = model->plan.hidden;
  desc.logits = model->plan.logits;
  desc.max_tokens = params.max_tokens;
  desc.max_logit_rows = params.max_logit_rows;
  desc.vocab_size = model->plan.vocab_size;
  desc.op_size = sizeof(pld_op);
  desc.buffer_size = sizeof(pld_buffer);
  desc.weight_size = sizeof(pld_weight);
  if (pld_status status = pld_program_create(context, &desc, &model->program)) return status;
  *out = model.release();
  return PLD_OK;
}

}  // namespace
}  // namespace pld

extern "C" pld_status pld_model_params_init(pld_model_params *params, size_t size) {
  return pld::guard([&] { return pld::init_sized(pld::kDefaultParams, params, size); });
}

extern "C" pld_status pld_model_open(pld_context *context, const char *path, const pld_model_params *params,
                                     pld_model **out) {
  return pld::guard([&] { return pld::open_model(context, path, params, out); });
}
extern "C" void pld_model_close(pld_model *model) { delete model; }
extern "C" pld_program *pld_model_program(pld_model *model) { return model == nullptr ? nullptr : model->program; }

extern "C" pld_status pld_model_info_get(const pld_model *model, pld_model_info *info) {
  return pld::guard([&] {
    if (model == nullptr) return pld::fail(PLD_INVALID_ARGUMENT, "model is null");
    const pld::Plan &p = model->plan;
    pld_model_info now = {};
    now.vocab_size = p.vocab_size;
    now.n_layers = p.n_layers;
    now.n_kv_heads = p.n_kv_heads;
    now.head_dim = p.head_dim;
    now.max_positions = p.max_positions;
    now.kv_dtype = p.kv_dtype;
    now.n_end_tokens = p.n_end_tokens;
    std::memcpy(now.end_tokens, p.end_tokens, sizeof p.end_tokens);
    return pld::write_sized(now, info);
  });
}
