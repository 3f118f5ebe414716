#include "rotation.hpp"

#include <cmath>

#include "error.hpp"
#include "program.hpp"

namespace pld {
namespace {

// The last op before `index` that wrote a column range of a buffer; null: none wrote all of it.
const pld_op *writer_of(const pld_program &p, const pld_op *before, int32_t buffer, int32_t col, int32_t width) {
  for (const pld_op *op = before; op-- != p.ops.data();)
    for (int i = 0; i < PLD_MAX_OUT; ++i)
      if (op->out[i] == buffer && op->out_col[i] <= col && col + width <= op->out_col[i] + op->out_width[i]) return op;
  return nullptr;
}

bool is_rowwise(pld_op_kind kind) {
  return kind == PLD_OP_RMS_NORM || kind == PLD_OP_LAYER_NORM || kind == PLD_OP_ACT || kind == PLD_OP_ADD ||
         kind == PLD_OP_SCALE || kind == PLD_OP_SOFTCAP;
}

// How the keys that an attention op writes were rotated.
pld_status trace_keys(const pld_program &p, const pld_op *attention, KeyRotation &rotation) {
  const pld_op *op = writer_of(p, attention, attention->in[1], attention->in_col[1], attention->in_width[1]);
  if (op != nullptr && op->kind == PLD_OP_ROTARY && op->i[0] == attention->i[3]) {
    const pld_op *table = writer_of(p, op, op->in[1], op->in_col[1], op->in_width[1]);
    if (table == nullptr || table->kind != PLD_OP_ROPE_TABLE || op->in_width[1] != table->out_width[0] ||
        !reads_positions(*table))
      return fail(PLD_NOT_SUPPORTED, "keys of layer %d are rotated by no rope_table", attention->i[0]);
    rotation.inv_freq = static_cast<const float *>(p.weights[static_cast<size_t>(table->weight[0])].data);
    rotation.half = table->out_width[0] / 2;
    rotation.neighbours = op->i[1] != 0;
    return PLD_OK;
  }
  while (op != nullptr && is_rowwise(op->kind)) op = writer_of(p, op, op->in[0], op->in_col[0], op->in_width[0]);
  if (op != nullptr && op->kind == PLD_OP_LINEAR) return PLD_OK;  // keys without positions
  return fail(PLD_NOT_SUPPORTED, "keys of layer %d are changed behind their rotation", attention->i[0]);
}

bool same(const KeyRotation &a, const KeyRotation &b) {
  return a.inv_freq == b.inv_freq && a.half == b.half && a.neighbours == b.neighbours;
}

}  // namespace

pld_status key_rotations(const pld_program &p, const pld_kv &kv, std::vector<KeyRotation> &rotations) {
  rotations.assign(static_cast<size_t>(kv.n_layers), {});
  std::vector<bool> seen(rotations.size(), false);
  for (const pld_op &op : p.ops) {
    if (op.kind == PLD_OP_EMBEDDING && reads_positions(op))
      return fail(PLD_NOT_SUPPORTED,
                  "the program embeds positions: keys depend on them in other ways than by rotation");
    if (op.kind != PLD_OP_ATTENTION) continue;
    KeyRotation rotation;
    if (pld_status status = trace_keys(p, &op, rotation)) return status;
    const size_t layer = static_cast<size_t>(op.i[0]);
    if (seen[layer] && !same(rotation, rotations[layer]))
      return fail(PLD_NOT_SUPPORTED, "keys of layer %d are rotated in two ways", op.i[0]);
    rotations[layer] = rotation;
    seen[layer] = true;
  }
  return PLD_OK;
}

KeyRotator::KeyRotator(pld_kv &kv, const std::vector<KeyRotation> &rotations)
    : kv_(kv),
      rotations_(rotations),
      keys_(static_cast<size_t>(kv.n_kv_heads) * static_cast<size_t>(kv.head_dim)),
      values_(keys_.size()) {}

void KeyRotator::rotate(int64_t cell, int32_t delta) {
  const size_t width = static_cast<size_t>(kv_.head_dim), heads = static_cast<size_t>(kv_.n_kv_heads);
  for (int32_t layer = 0; layer < kv_.n_layers; ++layer) {
    const KeyRotation &r = rotations_[static_cast<size_t>(layer)];
    if (r.inv_freq == nullptr) continue;
    pld_kv_read(&kv_, layer, cell, keys_.data(), values_.data());
    for (int32_t j = 0; j < r.half; ++j) {
      const double angle = static_cast<double>(delta) * static_cast<double>(r.inv_freq[j]);
      const double c = std::cos(angle), s = std::sin(angle);
      for (size_t g = 0; g < heads; ++g) {
        float *x = keys_.data() + g * width;
        float &a = x[r.neighbours ? 2 * j : j], &b = x[r.neighbours ? 2 * j + 1 : j + r.half];
        const double a0 = a, b0 = b;
        a = static_cast<float>(a0 * c - b0 * s);
        b = static_cast<float>(b0 * c + a0 * s);
      }
    }
    store_keys(kv_, layer, cell, keys_.data());
  }
}

}  // namespace pld
