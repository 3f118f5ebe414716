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

inline constexpr int kPoison = 0xff;  // a byte of a NaN

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

// The tasks of a stage, handed out in contiguous ranges: a thread walks its own range in order, so that what a task
// asks memory for ahead of time is used by the same core, and then helps with the others'.
//
// Stages take turns on three sets of counters. A thread clears its counter of the set after the next one: all have left
// it, for they have passed the barrier behind its stage, and none enters it before another barrier.
class Turns {
 public:
  explicit Turns(int n_threads) : n_threads_(n_threads), counters_(new Counter[3 * static_cast<size_t>(n_threads)]) {}
  void reset();
  // body(task) for the tasks of stage number `turn` (counted from 0 since reset) that fall to this thread.
  template <typename Body>
  void take(uint32_t turn, int64_t n_tasks, int thread, Body &&body) {
    set(turn + 2)[thread].next.store(0, std::memory_order_relaxed);
    Counter *counters = set(turn);
    for (int i = 0, owner = thread; i < n_threads_; ++i, owner = owner + 1 < n_threads_ ? owner + 1 : 0) {
      const int64_t begin = n_tasks * owner / n_threads_, count = n_tasks * (owner + 1) / n_threads_ - begin;
      std::atomic<int64_t> &next = counters[owner].next;
      while (next.load(std::memory_order_relaxed) < count) {  // looked at first: a range that is used up costs no write
        const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
        if (task < count) body(begin + task);
      }
    }
  }

 private:
  Counter *set(uint32_t turn) { return counters_.get() + turn % 3 * static_cast<uint32_t>(n_threads_); }

  const int n_threads_;
  std::unique_ptr<Counter[]> counters_;
};

}  // namespace pld

struct pld_context {
  pld_context(int n_threads, int spin_us, pld_isa isa, bool poison);

  pld::Pool pool;
  const pld_isa isa;
  const bool poison;
  const pld::KernelTable &table;
  std::mutex mutex;  // one region at a time; held by every call that computes
  pld::Turns turns;
  std::vector<pld::Scratch> thread_scratch;
  pld::Scratch op_scratch;
};

namespace pld {

// All stages of one op, on one thread of a region. `turn` counts the stages of the region on this thread, from 0; the
// caller of the region has reset the context's turns.
void run_stages(const Kernel &kernel, const OpArgs &args, pld_context &context, uint32_t &turn, int thread);
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
