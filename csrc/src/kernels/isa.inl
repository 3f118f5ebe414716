// All kernels of one instruction set, in the namespace PLD_ISA_NS, and their table.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "kernels.hpp"
#include "kv.hpp"
#include "strips.hpp"
// clang-format off: each builds on those before
#include "simd.hpp"
#include "rows.inl"
#include "linear.inl"
#include "quantised.inl"
#include "linear_op.inl"
#include "elementwise.inl"
#include "norm.inl"
#include "rotary.inl"
#include "attention.inl"
#include "moe.inl"
#include "sample.inl"
// clang-format on

namespace pld {
namespace PLD_ISA_NS {

const KernelTable &kernels() {
  static const KernelTable table = [] {
    KernelTable t = {};
    t.ops[PLD_OP_EMBEDDING] = embedding_kernel;
    t.ops[PLD_OP_LINEAR] = linear_kernel;
    t.ops[PLD_OP_RMS_NORM] = rms_norm_kernel;
    t.ops[PLD_OP_LAYER_NORM] = layer_norm_kernel;
    t.ops[PLD_OP_ROPE_TABLE] = rope_table_kernel;
    t.ops[PLD_OP_ROTARY] = rotary_kernel;
    t.ops[PLD_OP_ATTENTION] = attention_kernel;
    t.ops[PLD_OP_ACT_AND_MUL] = act_and_mul_kernel;
    t.ops[PLD_OP_ACT] = act_kernel;
    t.ops[PLD_OP_ADD] = add_kernel;
    t.ops[PLD_OP_SCALE] = scale_kernel;
    t.ops[PLD_OP_SOFTCAP] = softcap_kernel;
    t.ops[PLD_OP_MOE] = moe_kernel;
    t.ops[PLD_OP_GATHER_ROWS] = gather_rows_kernel;
    t.ops[PLD_OP_SAMPLE] = sample_kernel;
    t.scan_row = scan_row;
    t.sum_exp = sum_exp;
    t.weigh_row = weigh_row;
    return t;
  }();
  return table;
}

}  // namespace PLD_ISA_NS
}  // namespace pld
