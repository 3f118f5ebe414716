// What each op needs: the one table against which single calls and whole programs are checked.
#pragma once

#include "kernels/kernels.hpp"
#include "pellucid.h"

namespace pld {

// Operands, widths, attributes and weights of one op. `weight` holds what op.weight refers to, null where absent.
pld_status check_op(const pld_op &op, const pld_weight *const *weight);

// True for the ops that need a batch; attention needs a cache as well.
bool needs_batch(pld_op_kind kind);

pld_status check_weight(const pld_weight &weight, int index);

}  // namespace pld
