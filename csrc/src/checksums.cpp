// Reading a compiled model against its checksums, beside a computation that is not to notice.
#include "checksums.hpp"

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "error.hpp"
#include "pellucid.h"
#include "sized.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#endif
#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#endif

namespace pld {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

// tables[k][b]: the effect of byte b with k bytes of zeros behind it.
constexpr Tables make_tables() {
  Tables tables = {};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1) != 0 ? 0xEDB88320u : 0u);
    tables[0][byte] = crc;
  }
  for (size_t k = 1; k < 8; ++k)
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = tables[k - 1][byte];
      tables[k][byte] = (before >> 8) ^ tables[0][before & 0xFF];
    }
  return tables;
}
constexpr Tables kTables = make_tables();

}  // namespace

// Eight bytes at a time: Kounavis and Berry, "A systematic approach to building high performance software-based CRC
// generators" (2005).
uint32_t crc32(uint32_t crc, const void *data, size_t size) {
  const auto *byte = static_cast<const unsigned char *>(data);
  crc = ~crc;
  for (; size >= 8; size -= 8, byte += 8) {
    uint32_t low, high;
    std::memcpy(&low, byte, 4);
    std::memcpy(&high, byte + 4, 4);
    low ^= crc;
    crc = kTables[7][low & 0xFF] ^ kTables[6][(low >> 8) & 0xFF] ^ kTables[5][(low >> 16) & 0xFF] ^
          kTables[4][low >> 24] ^ kTables[3][high & 0xFF] ^ kTables[2][(high >> 8) & 0xFF] ^
          kTables[1][(high >> 16) & 0xFF] ^ kTables[0][high >> 24];
  }
  for (; size > 0; --size, ++byte) crc = (crc >> 8) ^ kTables[0][(crc ^ *byte) & 0xFF];
  return ~crc;
}

int64_t content_bytes(int64_t file_bytes) {
  const int64_t blocks = (file_bytes - 4 + kChecksumBlock + 3) / (kChecksumBlock + 4);
  const int64_t content = file_bytes - 4 * (blocks + 1);
  const bool is_one = file_bytes > 0 && content > (blocks - 1) * kChecksumBlock && content <= blocks * kChecksumBlock;
  return is_one && content > 0 && content % 64 == 0 ? content : -1;
}

#if defined(__unix__) || defined(__APPLE__)
namespace {

constexpr size_t kPiece = 1 << 16;  // stays in the cache of one core
constexpr int64_t kSliceNs = 10'000'000;

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1'000'000'000) + now.tv_nsec;
}

bool is_set(const volatile int32_t *stop) { return stop != nullptr && __atomic_load_n(stop, __ATOMIC_RELAXED) != 0; }

// The calling thread runs, and reads, only while nobody else wants to, from now on: not everybody may go back.
void become_idle() {
#if defined(__linux__)
  const sched_param none = {};
  sched_setscheduler(0, SCHED_IDLE, &none);
  syscall(SYS_ioprio_set, 1, 0, 3 << 13);  // this thread: the idle class
#endif
}

class Verification {
 public:
  Verification(int file, int64_t bytes_per_second, std::function<bool()> is_stopped)
      : file_(file), rate_(static_cast<double>(bytes_per_second)), is_stopped_(std::move(is_stopped)), piece_(kPiece) {}

  pld_status run(int64_t *bad_block) {
    struct stat info;
    if (fstat(file_, &info) != 0) return fail(PLD_INVALID_ARGUMENT, "file %d: %s", file_, std::strerror(errno));
    content_ = content_bytes(info.st_size);
    if (content_ < 0)
      return fail(PLD_INVALID_ARGUMENT, "a file of %lld bytes has no checksums", static_cast<long long>(info.st_size));
    const int64_t blocks = (content_ + kChecksumBlock - 1) / kChecksumBlock;
    std::vector<uint32_t> table(static_cast<size_t>(blocks) + 1);
    if (!read(table.data(), table.size() * 4, content_) ||
        crc32(0, table.data(), static_cast<size_t>(blocks) * 4) != table.back()) {
      *bad_block = blocks;
      return fail(PLD_INVALID_ARGUMENT, "the checksums at byte %lld are damaged", static_cast<long long>(content_));
    }
    due_ = now_ns();
    for (int64_t block = 0; block < blocks; ++block) {
      uint32_t crc = 0;
      const pld_status status = sum(block, &crc);
      if (status == PLD_ABORTED) return fail(status, "the verification was stopped");
      if (status != PLD_OK || crc != table[static_cast<size_t>(block)]) {
        *bad_block = block;
        return fail(PLD_INVALID_ARGUMENT, "block %lld at byte %lld is damaged", static_cast<long long>(block),
                    static_cast<long long>(block * kChecksumBlock));
      }
    }
    return PLD_OK;
  }

 private:
  pld_status sum(int64_t block, uint32_t *crc) {
    const int64_t begin = block * kChecksumBlock, end = std::min(content_, begin + kChecksumBlock);
    if (!wait(end - begin)) return PLD_ABORTED;
    for (int64_t at = begin; at < end;) {
      const size_t size = static_cast<size_t>(std::min<int64_t>(kPiece, end - at));
      if (is_stopped_()) return PLD_ABORTED;
      if (!read(piece_.data(), size, at)) return PLD_INVALID_ARGUMENT;
      *crc = crc32(*crc, piece_.data(), size);
      at += static_cast<int64_t>(size);
    }
    return PLD_OK;
  }

  // Reads by descriptor, not through a mapping: the same pages of the same file, but one that cannot be read is an
  // error and not a signal.
  bool read(void *target, size_t size, int64_t at) const {
    auto *byte = static_cast<char *>(target);
    while (size > 0) {
      const ssize_t got = pread(file_, byte, size, static_cast<off_t>(at));
      if (got < 0 && errno == EINTR) continue;
      if (got <= 0) return false;
      byte += got, size -= static_cast<size_t>(got), at += got;
    }
    return true;
  }

  // Until `size` bytes more may be read; what was not read in time is not made up for. False: it was stopped.
  bool wait(int64_t size) {
    if (rate_ <= 0) return !is_stopped_();
    int64_t now = now_ns();
    for (; now < due_; now = now_ns()) {
      if (is_stopped_()) return false;
      const timespec slice = {0, static_cast<long>(std::min(kSliceNs, due_ - now))};
      nanosleep(&slice, nullptr);
    }
    due_ = now + static_cast<int64_t>(static_cast<double>(size) * 1e9 / rate_);
    return true;
  }

  int file_;
  double rate_;
  std::function<bool()> is_stopped_;
  std::vector<char> piece_;
  int64_t content_ = 0, due_ = 0;
};

// A verification on a thread of its own, which may outlive its caller: where all processors are busy it notices late
// that it was stopped. So it has a descriptor of its own.
class IdleVerification {
 public:
  static pld_status run(int file, const pld_verify_params &params, int64_t *bad_block) {
    const int own = dup(file);
    if (own < 0) return fail(PLD_INVALID_ARGUMENT, "file %d: %s", file, std::strerror(errno));
    auto job = std::make_shared<IdleVerification>(own);
    std::thread([job, rate = params.bytes_per_second] { job->work(rate); }).detach();
    return job->await(params.stop, bad_block);
  }
  explicit IdleVerification(int file) : file_(file) {}
  ~IdleVerification() { close(file_); }
  IdleVerification(const IdleVerification &) = delete;
  IdleVerification &operator=(const IdleVerification &) = delete;

 private:
  void work(int64_t bytes_per_second) {
    become_idle();
    int64_t bad_block = -1;
    const pld_status status =
        guard([&] { return Verification(file_, bytes_per_second, [this] { return stop_.load(); }).run(&bad_block); });
    const std::lock_guard<std::mutex> lock(mutex_);
    status_ = status, bad_block_ = bad_block, text_ = pld_last_error(), is_done_ = true;
    done_.notify_all();
  }

  pld_status await(const volatile int32_t *stop, int64_t *bad_block) {
    std::unique_lock<std::mutex> lock(mutex_);
    while (!is_done_ && !is_set(stop)) done_.wait_for(lock, std::chrono::nanoseconds(kSliceNs));
    stop_ = true;
    done_.wait_for(lock, kPatience, [this] { return is_done_; });
    *bad_block = is_done_ ? bad_block_ : -1;
    return is_done_ ? fail_unless_ok() : fail(PLD_ABORTED, "the verification was stopped");
  }

  pld_status fail_unless_ok() const { return status_ == PLD_OK ? status_ : fail(status_, "%s", text_.c_str()); }

  static constexpr std::chrono::milliseconds kPatience{100};
  int file_;
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable done_;
  bool is_done_ = false;
  pld_status status_ = PLD_OK;
  int64_t bad_block_ = -1;
  std::string text_;
};

}  // namespace
#endif

}  // namespace pld

static constexpr pld_verify_params kDefaultParams = {sizeof(pld_verify_params), 0, nullptr, 0, 0};

extern "C" pld_status pld_verify_params_init(pld_verify_params *params, size_t size) {
  return pld::guard([&] { return pld::init_sized(kDefaultParams, params, size); });
}

extern "C" pld_status pld_model_verify(int32_t file, const pld_verify_params *given, int64_t *bad_block) {
  return pld::guard([&]() -> pld_status {
    if (bad_block == nullptr) return pld::fail(PLD_INVALID_ARGUMENT, "bad_block is null");
    *bad_block = -1;
    pld_verify_params copy = kDefaultParams;
    if (pld_status status = pld::read_sized(given, &copy)) return status;
    const pld_verify_params *params = &copy;
    if (params->bytes_per_second < 0)
      return pld::fail(PLD_INVALID_ARGUMENT, "bytes_per_second is %lld; it must be at least 0",
                       static_cast<long long>(params->bytes_per_second));
#if defined(__unix__) || defined(__APPLE__)
    if (params->idle != 0) return pld::IdleVerification::run(file, *params, bad_block);
    return pld::Verification(file, params->bytes_per_second, [params] { return pld::is_set(params->stop); })
        .run(bad_block);
#else
    (void)file;
    return pld::fail(PLD_NOT_SUPPORTED, "this system reads no files by descriptor");
#endif
  });
}
