#include "pool.hpp"

#include <sched.h>

#include <chrono>
#include <utility>

namespace pld {

static inline void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// A spin that lets another process have the core when the machine is full.
template <typename Condition>
static void spin_until(Condition &&condition) {
  for (uint32_t i = 1; !condition(); ++i) {
    pause_cpu();
    if (i % 2048 == 0) sched_yield();
  }
}

void Barrier::wait() {
  if (n_threads_ == 1) return;
  uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == n_threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    return;
  }
  spin_until([&] { return generation_.load(std::memory_order_acquire) != generation; });
}

Pool::Pool(int n_threads, int spin_us) : n_threads_(n_threads), spin_us_(spin_us), barrier_(n_threads) {
  threads_.reserve(static_cast<size_t>(n_threads - 1));
  try {
    for (int thread = 1; thread < n_threads; ++thread) threads_.emplace_back([this, thread] { work(thread); });
  } catch (...) {
    stop();  // those that were started: nobody else will
    throw;
  }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_.store(true);
    region_.fetch_add(1);
  }
  wake_.notify_all();
  for (std::thread &thread : threads_) thread.join();
}

void Pool::run(Body body, void *argument) {
  if (n_threads_ == 1) {
    body(argument, 0);
    return;
  }
  body_ = body;
  argument_ = argument;
  running_.store(n_threads_ - 1, std::memory_order_relaxed);
  {
    std::lock_guard<std::mutex> lock(mutex_);  // so that no worker misses it between its last look and its sleep
    region_.fetch_add(1, std::memory_order_release);
  }
  wake_.notify_all();
  run_body(0);
  spin_until([&] { return running_.load(std::memory_order_acquire) == 0; });
  if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pool::run_body(int thread) {
  try {
    body_(argument_, thread);
  } catch (...) {
    std::lock_guard<std::mutex> lock(mutex_);
    error_ = std::current_exception();
  }
}

uint64_t Pool::await_region(uint64_t seen) {
  auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(spin_us_);
  do {
    for (int i = 0; i < 64; ++i) {
      uint64_t region = region_.load(std::memory_order_acquire);
      if (region != seen) return region;
      pause_cpu();
    }
  } while (std::chrono::steady_clock::now() < end);
  std::unique_lock<std::mutex> lock(mutex_);
  wake_.wait(lock, [&] { return region_.load(std::memory_order_acquire) != seen; });
  return region_.load(std::memory_order_acquire);
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  while (true) {
    seen = await_region(seen);
    if (stop_.load()) return;
    run_body(thread);
    running_.fetch_sub(1, std::memory_order_release);
  }
}

}  // namespace pld
