// Keys that move: which rotary tables a program's keys went through, and turning stored keys further.
#pragma once

#include <cstdint>
#include <vector>

#include "kv.hpp"
#include "pellucid.h"

namespace pld {

// How one layer's keys were rotated.
struct KeyRotation {
  const float *inv_freq = nullptr;  // [half]; null: keys do not depend on positions
  int32_t half = 0;
  bool neighbours = false;  // x_2j with x_2j+1, else x_j with x_j+half
};

// By layer. PLD_NOT_SUPPORTED where something else than a rotation stands between a rotation and the cache, or two ops
// write one layer differently.
pld_status key_rotations(const pld_program &program, const pld_kv &kv, std::vector<KeyRotation> &rotations);

// Turns stored keys. All memory that this takes is taken when it is made.
class KeyRotator {
 public:
  KeyRotator(pld_kv &kv, const std::vector<KeyRotation> &rotations);
  // The keys of a cell by `delta` positions, in all layers.
  void rotate(int64_t cell, int32_t delta);

 private:
  pld_kv &kv_;
  const std::vector<KeyRotation> &rotations_;
  std::vector<float> keys_, values_;
};

}  // namespace pld
