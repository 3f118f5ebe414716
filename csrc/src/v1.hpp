// Layouts of older headers that are not a beginning of today's, and how they become today's. Frozen: never change one.
#pragma once

#include <vector>

#include "pellucid.h"

namespace pld {

// Ops of a caller; `op_size` 0: of an older header.
pld_status read_ops(const void *ops, size_t op_size, int64_t count, const char *list, std::vector<pld_op> *out);

// An op call with everything that it points to but operands, read and of today's layout.
struct OpCall {
  std::vector<pld_op> op;  // one; none: it was null
  pld_op_call call = {};
  pld_weight weight[PLD_MAX_WEIGHTS] = {};  // those that the op says are present
};
pld_status read_op_call(const pld_op_call *given, OpCall *out);

}  // namespace pld
