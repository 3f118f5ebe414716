// A context: threads, the kernels of one instruction set, and scratch.
#pragma once

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "kernels/kernels.hpp"
#include "pellucid.h"
#include "pool.hpp"

namespace pld {

// 64-byte aligned bytes that are not initialised.
class Scratch {
 public:
  void reserve(size_t bytes);
  std::byte *data() { return data_; }

 private:
  std::unique_ptr<std::byte[]> storage_;
  std::byte *data_ = nullptr;
  size_t capacity_ = 0;
};

struct Counter {
  alignas(64) std::atomic<int64_t> next{0};
};

}  // namespace pld

struct pld_context {
  pld_context(int n_threads, int spin_us, pld_isa isa);

  pld::Pool pool;
  const pld_isa isa;
  const pld::KernelTable &table;
  std::mutex mutex;  // one region at a time; held by every call that computes
  std::vector<pld::Scratch> thread_scratch;
  pld::Scratch op_scratch;
};

namespace pld {

// All stages of one op, on one thread of a region; `counters` are kMaxStages counters at zero, shared by the threads.
void run_stages(const Kernel &kernel, const OpArgs &args, pld_context &context, Counter *counters, int thread);
// One op as a region of its own. The caller holds the mutex.
void run_op(pld_context &context, OpArgs &args);

// body(i) for i in [0, n) on all threads, in any order. The caller holds the mutex.
template <typename Body>
void parallel_for(pld_context &context, int64_t n, Body &&body) {
  struct Region {
    Body &body;
    int64_t n;
    Counter counter;
  } region{body, n, {}};
  context.pool.run(
      [](void *argument, int) {
        Region &r = *static_cast<Region *>(argument);
        for (int64_t i; (i = r.counter.next.fetch_add(1, std::memory_order_relaxed)) < r.n;) r.body(i);
      },
      &region);
}

}  // namespace pld
