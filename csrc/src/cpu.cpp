// What the processor has. AVX-512 counts only when the operating system saves its registers.
#include <sched.h>

#include <cstdio>
#include <cstring>
#include <set>
#include <string>
#include <utility>

#include "cpu.hpp"
#include "error.hpp"
#include "sized.hpp"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pld {

static int read_topology(int cpu, const char *name) {
  char path[128];
  std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/%s", cpu, name);
  std::FILE *file = std::fopen(path, "r");
  if (file == nullptr) return -1;
  int value = -1;
  if (std::fscanf(file, "%d", &value) != 1) value = -1;
  std::fclose(file);
  return value;
}

static void count_cores(pld_cpu_info &info) {
  info.physical_cores = info.logical_cores = 1;
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  std::set<std::pair<int, int>> cores;
  int logical = 0;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &allowed)) continue;
    ++logical;
    int core = read_topology(cpu, "core_id");
    cores.emplace(read_topology(cpu, "physical_package_id"), core < 0 ? cpu : core);
  }
  if (logical == 0) return;
  info.logical_cores = logical;
  info.physical_cores = static_cast<int32_t>(cores.size());
#endif
}

#if defined(__x86_64__)
static uint64_t extended_control_register() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

static void detect_features(pld_cpu_info &info) {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return;
  bool fma = c & (1u << 12), osxsave = c & (1u << 27), f16c = c & (1u << 29);
  if (!osxsave) return;
  uint64_t saved = extended_control_register();
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  unsigned leaf7_b = b, leaf7_c = c, max_subleaf = a;
  info.has_avx2 = (leaf7_b & (1u << 5)) && fma && f16c && (saved & 0x6) == 0x6;
  unsigned wanted = (1u << 16) | (1u << 17) | (1u << 30) | (1u << 31);  // F, DQ, BW, VL
  info.has_avx512 = info.has_avx2 && (leaf7_b & wanted) == wanted && (saved & 0xe6) == 0xe6;
  info.has_avx512_vnni = info.has_avx512 && (leaf7_c & (1u << 11));
  if (max_subleaf >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d))
    info.has_avx512_bf16 = info.has_avx512 && (a & (1u << 5));
}

static void read_model_name(pld_cpu_info &info) {
  unsigned words[12];
  for (unsigned i = 0; i < 3; ++i)
    if (!__get_cpuid(0x80000002u + i, words + 4 * i, words + 4 * i + 1, words + 4 * i + 2, words + 4 * i + 3)) return;
  std::memcpy(info.model_name, words, sizeof words);
}
#else
static void detect_features(pld_cpu_info &) {}
static void read_model_name(pld_cpu_info &) {}
#endif

pld_cpu_info detect_cpu() {
  pld_cpu_info info = {};
  info.struct_size = sizeof info;
  count_cores(info);
  detect_features(info);
  read_model_name(info);
  bool full_avx512 = info.has_avx512 && info.has_avx512_bf16 && info.has_avx512_vnni;
  info.best_isa = full_avx512 ? PLD_ISA_AVX512 : info.has_avx2 ? PLD_ISA_AVX2 : PLD_ISA_PORTABLE;
  return info;
}

}  // namespace pld

extern "C" pld_status pld_cpu_info_get(pld_cpu_info *info) {
  return pld::guard([&] { return pld::write_sized(pld::detect_cpu(), info); });
}
