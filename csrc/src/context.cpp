#include "context.hpp"

#include <algorithm>
#include <new>
#include <system_error>
#include <utility>

#include "cpu.hpp"
#include "error.hpp"
#include "sized.hpp"

namespace pld {

static constexpr int kMaxThreads = 256;
static constexpr int kDefaultSpinUs = 1000;  // longer than the host takes between two steps
static constexpr int kMaxSpinUs = 1000000;
static constexpr pld_context_params kDefaultParams = {sizeof(pld_context_params), 0, PLD_ISA_AUTO, -1, 0};

void Scratch::reserve(size_t bytes) {
  if (bytes <= capacity_) return;
  // Without an exception of its own, so that a sanitizer's allocator may refuse as well.
  std::unique_ptr<std::byte[]> storage(new (std::nothrow) std::byte[bytes + 64]);
  if (storage == nullptr) throw std::bad_alloc();
  storage_ = std::move(storage);
  size_t misaligned = reinterpret_cast<uintptr_t>(storage_.get()) % 64;
  data_ = storage_.get() + (64 - misaligned) % 64;
  capacity_ = bytes;
}

static const KernelTable &table_of(pld_isa isa) {
#if defined(__x86_64__)
  if (isa == PLD_ISA_AVX512) return avx512::kernels();
  if (isa == PLD_ISA_AVX2) return avx2::kernels();
#endif
  (void)isa;
  return portable::kernels();
}

void Turns::reset() {
  for (int i = 0; i < 3 * n_threads_; ++i) counters_[static_cast<size_t>(i)].next.store(0, std::memory_order_relaxed);
}

void run_stages(const Kernel &kernel, const OpArgs &args, pld_context &context, uint32_t &turn, int thread) {
  const int n_threads = context.pool.n_threads();
  std::byte *scratch = context.thread_scratch[static_cast<size_t>(thread)].data();
  for (int stage = 0; stage < kernel.n_stages; ++stage) {
    const int64_t n_tasks = kernel.n_tasks(args, stage, n_threads);
    if (n_tasks == 0) continue;  // on every thread alike
    context.turns.take(turn++, n_tasks, thread,
                       [&](int64_t task) { kernel.run(args, stage, task, n_threads, scratch); });
    context.pool.barrier().wait();
  }
}

void run_op(pld_context &context, OpArgs &args) {
  const Kernel &kernel = context.table.ops[args.op->kind];
  if (kernel.regions != nullptr) {  // one after another
    ScratchRegion regions[kMaxRegions];
    size_t offsets[kMaxRegions + 1] = {0};
    const int count = kernel.regions(*args.op, args.weight, args.rows, regions);
    for (int r = 0; r < count; ++r) offsets[r + 1] = offsets[r] + (regions[r].bytes + 63) / 64 * 64;
    context.op_scratch.reserve(offsets[count]);
    for (int r = 0; r < count; ++r) args.scratch[r] = context.op_scratch.data() + offsets[r];
  }
  struct Region {
    const Kernel &kernel;
    const OpArgs &args;
    pld_context &context;
  } region{kernel, args, context};
  context.turns.reset();
  context.pool.run(
      [](void *argument, int thread) {
        Region &r = *static_cast<Region *>(argument);
        uint32_t turn = 0;
        run_stages(r.kernel, r.args, r.context, turn, thread);
      },
      &region);
}

static pld_status create_context(const pld_context_params *given, pld_context **out) {
  if (out == nullptr) return fail(PLD_INVALID_ARGUMENT, "out is null");
  *out = nullptr;
  pld_context_params copy = kDefaultParams;
  if (pld_status status = read_sized(given, &copy)) return status;
  const pld_context_params *params = &copy;
  if (params->num_threads < 0 || params->num_threads > kMaxThreads)
    return fail(PLD_INVALID_ARGUMENT, "num_threads is %d; it must be in [0, %d]", params->num_threads, kMaxThreads);
  if (params->isa < PLD_ISA_AUTO || params->isa > PLD_ISA_AVX512)
    return fail(PLD_INVALID_ARGUMENT, "isa is %d; it must be in [0, %d]", params->isa, PLD_ISA_AVX512);
  if (params->spin_us > kMaxSpinUs)
    return fail(PLD_INVALID_ARGUMENT, "spin_us is %d; it must be at most %d", params->spin_us, kMaxSpinUs);
  pld_cpu_info cpu = detect_cpu();
  if (params->isa > cpu.best_isa)
    return fail(PLD_NOT_SUPPORTED, "isa is %d; this machine has at most %d", params->isa, cpu.best_isa);
  int n_threads = params->num_threads > 0 ? params->num_threads : std::min(cpu.physical_cores, kMaxThreads);
  pld_isa isa = params->isa == PLD_ISA_AUTO ? cpu.best_isa : params->isa;
  try {
    *out = new pld_context(n_threads, params->spin_us < 0 ? kDefaultSpinUs : params->spin_us, isa, params->poison == 1);
  } catch (const std::system_error &error) {
    return fail(PLD_OUT_OF_MEMORY, "%d threads cannot be started: %s", n_threads, error.what());
  }
  return PLD_OK;
}

}  // namespace pld

pld_context::pld_context(int n_threads, int spin_us, pld_isa isa_, bool poison_)
    : pool(n_threads, spin_us),
      isa(isa_),
      poison(poison_),
      table(pld::table_of(isa_)),
      turns(n_threads),
      thread_scratch(static_cast<size_t>(n_threads)) {
  for (pld::Scratch &scratch : thread_scratch) scratch.reserve(pld::kThreadScratchBytes);
}

extern "C" pld_status pld_context_params_init(pld_context_params *params, size_t size) {
  return pld::guard([&] { return pld::init_sized(pld::kDefaultParams, params, size); });
}
extern "C" pld_status pld_context_create(const pld_context_params *params, pld_context **out) {
  return pld::guard([&] { return pld::create_context(params, out); });
}
extern "C" void pld_context_destroy(pld_context *context) { delete context; }
extern "C" int32_t pld_context_num_threads(const pld_context *context) {
  return context == nullptr ? 0 : context->pool.n_threads();
}
extern "C" pld_isa pld_context_isa(const pld_context *context) {
  return context == nullptr ? PLD_ISA_AUTO : context->isa;
}
