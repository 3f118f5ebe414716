// A thread pool that runs one parallel region at a time. The caller is worker 0; workers spin briefly, then sleep.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace pld {

// Spins, gives the core away now and then, and never sleeps: for waits of microseconds inside a region.
class Barrier {
 public:
  explicit Barrier(int n_threads) : n_threads_(n_threads) {}
  void wait();

 private:
  const int n_threads_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> generation_{0};
};

class Pool {
 public:
  using Body = void (*)(void *argument, int thread);

  Pool(int n_threads, int spin_us);
  ~Pool();
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  int n_threads() const { return n_threads_; }
  Barrier &barrier() { return barrier_; }
  // Calls body(argument, thread) on every worker and waits for all. What one of them throws is thrown here when all
  // have ended; a body that waits for others must not throw.
  void run(Body body, void *argument);

 private:
  void run_body(int thread);
  void stop();
  void work(int thread);
  uint64_t await_region(uint64_t seen);

  const int n_threads_;
  const int spin_us_;
  Barrier barrier_;
  Body body_ = nullptr;
  void *argument_ = nullptr;
  std::exception_ptr error_;  // of the region
  alignas(64) std::atomic<uint64_t> region_{0};
  alignas(64) std::atomic<int> running_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};

}  // namespace pld
