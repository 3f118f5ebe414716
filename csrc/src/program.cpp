// Programs: ops on numbered buffers, checked once, then run as one parallel region a step.
#include <algorithm>
#include <cstddef>
#include <memory>
#include <utility>
#include <vector>

#include "batch.hpp"
#include "context.hpp"
#include "error.hpp"
#include "kv.hpp"
#include "op.hpp"
#include "program.hpp"
#include "scratch.hpp"
#include "sized.hpp"
#include "stages.hpp"
#include "v1.hpp"

namespace pld {
namespace {

constexpr int32_t kMaxOps = 1 << 20;
constexpr int64_t kMaxArenaBytes = int64_t{1} << 46;  // far below what sums of widths could overflow

// Buffers of domain T that a list of the descriptor names.
pld_status check_named(const pld_program_desc &d, const char *name, int32_t count, const int32_t *buffers) {
  if (count < 0 || count > d.n_buffers || (count > 0 && !buffers))
    return fail(PLD_INVALID_ARGUMENT, "n_%s is %d; there are %d buffers", name, count, d.n_buffers);
  for (int32_t k = 0; k < count; ++k)
    if (buffers[k] < 0 || buffers[k] >= d.n_buffers || d.buffers[buffers[k]].domain != PLD_ROWS_T)
      return fail(PLD_INVALID_ARGUMENT, "%s[%d] is %d; it must be a buffer [T, any] of %d", name, k, buffers[k],
                  d.n_buffers);
  return PLD_OK;
}

// Whether there are tables, of sizes that may be read.
pld_status check_tables(const pld_program_desc *d) {
  if (!d->ops || !d->buffers || (d->n_weights > 0 && !d->weights))
    return fail(PLD_INVALID_ARGUMENT, "program_desc: a table is null");
  if (d->n_ops < 1 || d->n_ops > kMaxOps || d->n_forward_ops < 1 || d->n_forward_ops > d->n_ops)
    return fail(PLD_INVALID_ARGUMENT, "n_ops is %d and n_forward_ops %d; they must be in [1, %d]", d->n_ops,
                d->n_forward_ops, kMaxOps);
  if (d->n_buffers < 1 || d->n_buffers > 2 * kMaxOps || d->n_weights < 0 || d->n_weights > kMaxOps)
    return fail(PLD_INVALID_ARGUMENT, "n_buffers is %d and n_weights %d; the limit is %d", d->n_buffers, d->n_weights,
                kMaxOps);
  return PLD_OK;
}

// The caller's tables, in today's layout.
struct Tables {
  std::vector<pld_op> ops;
  std::vector<pld_buffer> buffers;
  std::vector<pld_weight> weights;
};

pld_status read_tables(pld_program_desc *d, Tables *tables) {
  size_t buffer_size = 0, weight_size = 0;
  if (pld_status status = read_ops(d->ops, d->op_size, d->n_ops, "ops", &tables->ops)) return status;
  if (pld_status status = read_stride<pld_buffer>(d->buffer_size, "buffer_size", &buffer_size)) return status;
  if (pld_status status = read_stride<pld_weight>(d->weight_size, "weight_size", &weight_size)) return status;
  if (pld_status status = read_elements(d->buffers, buffer_size, d->n_buffers, "buffers", &tables->buffers))
    return status;
  if (pld_status status = read_elements(d->weights, weight_size, d->n_weights, "weights", &tables->weights))
    return status;
  d->ops = tables->ops.data();
  d->buffers = tables->buffers.data();
  d->weights = tables->weights.data();
  return PLD_OK;
}

pld_status check_desc(const pld_program_desc *d) {
  if (d->max_tokens < 1 || d->max_tokens > (1 << 20) || d->max_logit_rows < 1 || d->max_logit_rows > (1 << 20))
    return fail(PLD_INVALID_ARGUMENT, "max_tokens is %d and max_logit_rows %d; they must be in [1, %d]", d->max_tokens,
                d->max_logit_rows, 1 << 20);
  if (d->hidden < 0 || d->hidden >= d->n_buffers || d->logits < 0 || d->logits >= d->n_buffers || d->vocab_size < 1)
    return fail(PLD_INVALID_ARGUMENT, "hidden %d, logits %d or vocab_size %d is out of range", d->hidden, d->logits,
                d->vocab_size);
  for (int32_t b = 0; b < d->n_buffers; ++b) {
    const pld_buffer &buffer = d->buffers[b];
    if (buffer.width < 1 || buffer.width > (1 << 26) || buffer.slot < 0 || buffer.slot >= d->n_buffers ||
        (buffer.domain != PLD_ROWS_T && buffer.domain != PLD_ROWS_L))
      return fail(PLD_INVALID_ARGUMENT, "buffer %d: width %d, slot %d or domain %d is out of range", b, buffer.width,
                  buffer.slot, buffer.domain);
  }
  if (d->buffers[d->hidden].domain != PLD_ROWS_T || d->buffers[d->logits].domain != PLD_ROWS_L ||
      d->buffers[d->logits].width != d->vocab_size)
    return fail(PLD_INVALID_ARGUMENT, "hidden must be [T, D] and logits [L, vocab_size %d]", d->vocab_size);
  if (pld_status status = check_named(*d, "kept", d->n_kept, d->kept)) return status;
  if (pld_status status = check_named(*d, "inputs", d->n_inputs, d->inputs)) return status;
  for (int32_t w = 0; w < d->n_weights; ++w)
    if (pld_status status = check_weight(d->weights[w], w)) return status;
  return PLD_OK;
}

pld_domain domain_of(const pld_program_desc &d, int32_t index) {
  return index < d.n_forward_ops ? PLD_ROWS_T : PLD_ROWS_L;
}

// Who holds each slot, and how many columns of each buffer are written: from 0 on, without gaps.
struct Written {
  std::vector<int32_t> owner, columns;

  explicit Written(int32_t n_buffers)
      : owner(static_cast<size_t>(n_buffers), -1), columns(static_cast<size_t>(n_buffers), 0) {}
  bool holds(const pld_program_desc &d, int32_t buffer, int64_t end) const {
    return owner[static_cast<size_t>(d.buffers[buffer].slot)] == buffer && end <= columns[static_cast<size_t>(buffer)];
  }
  bool whole(const pld_program_desc &d, int32_t buffer) const { return holds(d, buffer, d.buffers[buffer].width); }
  bool write(const pld_program_desc &d, int32_t buffer, int32_t column, int32_t width) {
    if (column > 0 && !(holds(d, buffer, column) && columns[static_cast<size_t>(buffer)] == column)) return false;
    owner[static_cast<size_t>(d.buffers[buffer].slot)] = buffer;
    columns[static_cast<size_t>(buffer)] = column + width;
    return true;
  }
};

// Operands in range, of the right domain, written before they are read, and not overwritten by a later buffer of their
// slot.
pld_status check_operands(const pld_program_desc &d, int32_t index, Written &written) {
  const pld_op &op = d.ops[index];
  for (int i = 0; i < PLD_MAX_IN; ++i) {
    if (op.in[i] < 0) continue;
    if (op.in[i] >= d.n_buffers || op.in_col[i] < 0 || op.in_width[i] < 1 ||
        static_cast<int64_t>(op.in_col[i]) + op.in_width[i] > d.buffers[op.in[i]].width)
      return fail(PLD_INVALID_ARGUMENT, "op %d: input %d is buffer %d, columns [%d, +%d]: out of range", index, i,
                  op.in[i], op.in_col[i], op.in_width[i]);
    bool gathers = op.kind == PLD_OP_GATHER_ROWS;
    if (d.buffers[op.in[i]].domain != (gathers ? PLD_ROWS_T : domain_of(d, index)))
      return fail(PLD_INVALID_ARGUMENT, "op %d: input %d is of the wrong domain", index, i);
    if (gathers && op.in[i] != d.hidden)
      return fail(PLD_INVALID_ARGUMENT, "op %d: rows are gathered from the hidden states alone", index);
    if (!written.holds(d, op.in[i], static_cast<int64_t>(op.in_col[i]) + op.in_width[i]))
      return fail(PLD_INVALID_ARGUMENT, "op %d: input %d, buffer %d, was not written or is overwritten", index, i,
                  op.in[i]);
  }
  for (int i = 0; i < PLD_MAX_OUT; ++i) {
    if (op.out[i] < 0) continue;
    if (op.out[i] >= d.n_buffers || op.out_col[i] < 0 ||
        static_cast<int64_t>(op.out_col[i]) + op.out_width[i] > d.buffers[op.out[i]].width ||
        d.buffers[op.out[i]].domain != domain_of(d, index))
      return fail(PLD_INVALID_ARGUMENT, "op %d: output %d is buffer %d, columns [%d, +%d]: out of range", index, i,
                  op.out[i], op.out_col[i], op.out_width[i]);
    for (int j = 0; j < PLD_MAX_IN; ++j)
      if (op.in[j] >= 0 && d.buffers[op.in[j]].slot == d.buffers[op.out[i]].slot)
        return fail(PLD_INVALID_ARGUMENT, "op %d: output %d shares the slot of input %d", index, i, j);
  }
  if (op.out[1] >= 0 && d.buffers[op.out[0]].slot == d.buffers[op.out[1]].slot)
    return fail(PLD_INVALID_ARGUMENT, "op %d: its outputs share a slot", index);
  for (int i = 0; i < PLD_MAX_OUT; ++i)
    if (op.out[i] >= 0 && !written.write(d, op.out[i], op.out_col[i], op.out_width[i]))
      return fail(PLD_INVALID_ARGUMENT, "op %d: output %d, buffer %d, is not written up to column %d", index, i,
                  op.out[i], op.out_col[i]);
  return PLD_OK;
}

pld_status check_program(const pld_program_desc &d) {
  Written written(d.n_buffers);
  std::vector<int8_t> domain(static_cast<size_t>(d.n_buffers), -1);
  for (int32_t b = 0; b < d.n_buffers; ++b) {
    int8_t &slot_domain = domain[static_cast<size_t>(d.buffers[b].slot)];
    if (slot_domain >= 0 && slot_domain != d.buffers[b].domain)
      return fail(PLD_INVALID_ARGUMENT, "buffer %d: slot %d holds buffers of both domains", b, d.buffers[b].slot);
    slot_domain = static_cast<int8_t>(d.buffers[b].domain);
  }
  for (int32_t k = 0; k < d.n_inputs; ++k) written.write(d, d.inputs[k], 0, d.buffers[d.inputs[k]].width);
  for (int32_t index = 0; index < d.n_ops; ++index) {
    const pld_op &op = d.ops[index];
    const pld_weight *weight[PLD_MAX_WEIGHTS];
    for (int i = 0; i < PLD_MAX_WEIGHTS; ++i) {
      if (op.weight[i] >= d.n_weights)
        return fail(PLD_INVALID_ARGUMENT, "op %d: weight %d is %d; there are %d", index, i, op.weight[i], d.n_weights);
      weight[i] = op.weight[i] >= 0 ? &d.weights[op.weight[i]] : nullptr;
    }
    if (pld_status status = check_op(op, weight)) return status;
    bool in_forward = index < d.n_forward_ops;
    if ((op.kind == PLD_OP_GATHER_ROWS) == in_forward && (in_forward || index == d.n_forward_ops))
      return fail(PLD_INVALID_ARGUMENT, "op %d: the second part, and only it, begins with gather_rows", index);
    if (!in_forward && (op.kind == PLD_OP_ATTENTION || op.kind == PLD_OP_EMBEDDING || op.kind == PLD_OP_ROPE_TABLE))
      return fail(PLD_INVALID_ARGUMENT, "op %d: kind %d cannot stand in the second part", index, op.kind);
    if (op.kind == PLD_OP_EMBEDDING && !reads_positions(op) && weight[0]->rows < d.vocab_size)
      return fail(PLD_INVALID_ARGUMENT, "op %d: the embedding has %lld rows; vocab_size is %d", index,
                  (long long)weight[0]->rows, d.vocab_size);
    if (pld_status status = check_operands(d, index, written)) return status;
  }
  if (!written.whole(d, d.hidden) || !written.whole(d, d.logits))
    return fail(PLD_INVALID_ARGUMENT, "hidden or logits is not written, or is overwritten");
  for (int32_t k = 0; k < d.n_inputs; ++k)
    if (!written.whole(d, d.inputs[k]))
      return fail(PLD_INVALID_ARGUMENT, "inputs[%d], buffer %d, is overwritten", k, d.inputs[k]);
  for (int32_t k = 0; k < d.n_kept; ++k)
    if (!written.whole(d, d.kept[k]))
      return fail(PLD_INVALID_ARGUMENT, "kept[%d], buffer %d, is not written, or is overwritten", k, d.kept[k]);
  return PLD_OK;
}

void place_buffers(pld_program &p) {
  std::vector<int64_t> width(p.buffers.size(), 0), start(p.buffers.size(), 0);
  std::vector<pld_domain> domain(p.buffers.size(), PLD_ROWS_T);
  for (const pld_buffer &buffer : p.buffers) {
    int64_t &slot_width = width[static_cast<size_t>(buffer.slot)];
    slot_width = std::max<int64_t>(slot_width, buffer.width);
    domain[static_cast<size_t>(buffer.slot)] = buffer.domain;
  }
  int64_t bytes = 0;
  for (size_t slot = 0; slot < width.size(); ++slot) {
    start[slot] = bytes;
    bytes += (width[slot] * p.max_rows[domain[slot]] * 4 + 63) / 64 * 64;
    if (bytes > kMaxArenaBytes) throw std::bad_alloc();
  }
  p.offset.resize(p.buffers.size());
  for (size_t b = 0; b < p.buffers.size(); ++b) p.offset[b] = start[static_cast<size_t>(p.buffers[b].slot)];
  p.arena_bytes = bytes;
  p.arena.reserve(static_cast<size_t>(bytes));
}

// Everything of an op's arguments but the batch, the cache, the number of rows and scratch.
void resolve_args(pld_program &p) {
  p.args.assign(p.ops.size(), {});
  for (size_t index = 0; index < p.ops.size(); ++index) {
    const pld_op &op = p.ops[index];
    OpArgs &args = p.args[index];
    args.op = &op;
    for (int i = 0; i < PLD_MAX_IN; ++i) {
      if (op.in[i] < 0) continue;
      size_t buffer = static_cast<size_t>(op.in[i]);
      args.in[i] = reinterpret_cast<float *>(p.arena.data() + p.offset[buffer]) + op.in_col[i];
      args.in_stride[i] = p.buffers[buffer].width;
      args.in_width[i] = op.in_width[i];
    }
    for (int i = 0; i < PLD_MAX_OUT; ++i) {
      if (op.out[i] < 0) continue;
      size_t buffer = static_cast<size_t>(op.out[i]);
      args.out[i] = reinterpret_cast<float *>(p.arena.data() + p.offset[buffer]) + op.out_col[i];
      args.out_stride[i] = p.buffers[buffer].width;
      args.out_width[i] = op.out_width[i];
    }
    for (int i = 0; i < PLD_MAX_WEIGHTS; ++i)
      args.weight[i] = op.weight[i] >= 0 ? &p.weights[static_cast<size_t>(op.weight[i])] : nullptr;
  }
}

int64_t rows_of_positions(const pld_program &p) {
  int64_t rows = 0;
  for (const pld_op &op : p.ops) {
    if (op.kind != PLD_OP_EMBEDDING || !reads_positions(op)) continue;
    const int64_t own = p.weights[static_cast<size_t>(op.weight[0])].rows;
    rows = rows == 0 ? own : std::min(rows, own);
  }
  return rows;
}

StepRow row_of_steps(const pld_program &p) {
  StepRow row;
  for (const std::vector<Step> &part : p.steps)
    for (const Step &step : part) row.push_back(&step);
  return row;
}

pld_status place_scratch(pld_program &p) {
  const StepRow steps = row_of_steps(p);
  const KernelTable &table = p.context->table;
  ScratchPlan plan = place_regions(find_regions(steps, p.args, table, p.n_forward_ops, p.max_rows));
  if (pld_status status = check_scratch(plan, steps, p.args, table, p.n_forward_ops, p.max_rows)) return status;
  p.op_scratch.reserve(plan.bytes);
  for (const PlacedRegion &region : plan.regions)
    p.args[static_cast<size_t>(region.op)].scratch[region.region] = p.op_scratch.data() + region.offset;
  p.arena_bytes += static_cast<int64_t>(plan.bytes);
  p.scratch_plan = std::move(plan);
  return PLD_OK;
}

// The first and the last step that touches each buffer; -1: none. Steps count over both parts.
std::vector<std::pair<int32_t, int32_t>> lives_of_buffers(const pld_program &p, const StepRow &steps) {
  std::vector<std::pair<int32_t, int32_t>> lives(p.buffers.size(), {-1, -1});
  for (size_t at = 0; at < steps.size(); ++at) {
    const auto touch = [&](int32_t op, int) {
      const pld_op &touched = p.ops[static_cast<size_t>(op)];
      for (const auto *list : {touched.in, touched.out})
        for (int i = 0; i < (list == touched.in ? PLD_MAX_IN : PLD_MAX_OUT); ++i) {
          if (list[i] < 0) continue;
          auto &life = lives[static_cast<size_t>(list[i])];
          life.first = life.first < 0 ? static_cast<int32_t>(at) : life.first;
          life.second = static_cast<int32_t>(at);
        }
    };
    for (const Part &part : steps[at]->parts) {
      touch(part.op, part.stage);
      each_fused(p.args, part, touch);
    }
  }
  return lives;
}

// Tells each step which memory is dead after it: scratch regions, and buffers whose slot no other buffer has taken.
void find_dead_memory(pld_program &p, const std::vector<int32_t> &outlive) {
  std::vector<Step *> steps;
  for (std::vector<Step> &part : p.steps)
    for (Step &step : part) steps.push_back(&step);
  for (const PlacedRegion &region : p.scratch_plan.regions)
    steps[static_cast<size_t>(region.last)]->dead.push_back({p.op_scratch.data() + region.offset, region.bytes});
  const auto lives = lives_of_buffers(p, row_of_steps(p));
  for (size_t b = 0; b < p.buffers.size(); ++b) {
    const auto [first, last] = lives[b];
    bool is_dead = first >= 0 && std::find(outlive.begin(), outlive.end(), static_cast<int32_t>(b)) == outlive.end();
    for (size_t other = 0; is_dead && other < p.buffers.size(); ++other)
      is_dead = other == b || p.buffers[other].slot != p.buffers[b].slot || lives[other].first > last ||
                lives[other].second <= last;
    const int64_t bytes = p.buffers[b].width * p.max_rows[p.buffers[b].domain] * 4;
    if (is_dead)
      steps[static_cast<size_t>(last)]->dead.push_back({p.arena.data() + p.offset[b], static_cast<size_t>(bytes)});
  }
}

pld_status create_program(pld_context *context, const pld_program_desc *given, pld_program **out) {
  if (out == nullptr || context == nullptr) return fail(PLD_INVALID_ARGUMENT, "context or out is null");
  *out = nullptr;
  pld_program_desc copy = {};
  if (pld_status status = read_sized(given, &copy)) return status;
  Tables tables;
  if (pld_status status = check_tables(&copy)) return status;
  if (pld_status status = read_tables(&copy, &tables)) return status;
  const pld_program_desc *desc = &copy;
  if (pld_status status = check_desc(desc)) return status;
  if (pld_status status = check_program(*desc)) return status;
  auto program = std::make_unique<pld_program>();
  program->context = context;
  program->ops = std::move(tables.ops);
  program->buffers = std::move(tables.buffers);
  program->weights = std::move(tables.weights);
  program->n_forward_ops = desc->n_forward_ops;
  program->hidden = desc->hidden;
  program->logits = desc->logits;
  program->vocab_size = desc->vocab_size;
  program->n_positions = rows_of_positions(*program);
  program->max_rows[PLD_ROWS_T] = desc->max_tokens;
  program->max_rows[PLD_ROWS_L] = desc->max_logit_rows;
  if (desc->n_kept > 0) program->kept.assign(desc->kept, desc->kept + desc->n_kept);
  if (desc->n_inputs > 0) program->inputs.assign(desc->inputs, desc->inputs + desc->n_inputs);
  place_buffers(*program);
  resolve_args(*program);
  std::vector<int32_t> outlive = program->kept;
  outlive.insert(outlive.end(), {desc->hidden, desc->logits});
  fuse_gates(program->ops.data(), program->buffers.data(), desc->n_buffers, program->args, outlive);
  for (int part = 0; part < 2; ++part)
    program->steps[part] =
        plan_steps(program->ops.data(), program->buffers.data(), program->args, context->table,
                   part == 0 ? 0 : desc->n_forward_ops, part == 0 ? desc->n_forward_ops : desc->n_ops);
  if (pld_status status = place_scratch(*program)) return status;
  if (context->poison) {
    outlive.insert(outlive.end(), program->inputs.begin(), program->inputs.end());
    find_dead_memory(*program, outlive);
  }
  *out = program.release();
  return PLD_OK;
}

}  // namespace

void bind_batch(pld_program &p, const pld_batch &batch, pld_kv *kv) {
  for (size_t index = 0; index < p.args.size(); ++index) {
    OpArgs &args = p.args[index];
    args.batch = &batch;
    args.kv = kv;
    args.rows = static_cast<int32_t>(index) < p.n_forward_ops ? batch.n_tokens : batch.n_logit_rows;
  }
}

namespace {

void run_region(pld_program &p, const std::vector<Step> *first, const std::vector<Step> *last) {
  struct Region {
    pld_program &program;
    const std::vector<Step> *first, *last;
  } region{p, first, last};
  p.context->turns.reset();
  p.context->pool.run(
      [](void *argument, int thread) {
        Region &r = *static_cast<Region *>(argument);
        uint32_t turn = 0;
        for (const std::vector<Step> *part = r.first; part != r.last; ++part)
          run_steps(*part, r.program.args, *r.program.context, turn, thread);
      },
      &region);
}

}  // namespace

void run_parts(pld_program &p, int first, int last) { run_region(p, p.steps + first, p.steps + last + 1); }

void run_some(pld_program &p, int part, size_t begin, size_t end) {
  const auto steps = p.steps[part].begin();
  const std::vector<Step> some(steps + static_cast<std::ptrdiff_t>(begin), steps + static_cast<std::ptrdiff_t>(end));
  run_region(p, &some, &some + 1);
}

pld_status check_layers(const pld_program &p, const pld_kv &kv) {
  for (const pld_op &op : p.ops)
    if (op.kind == PLD_OP_ATTENTION && (op.i[0] >= kv.n_layers || op.i[2] != kv.n_kv_heads || op.i[3] != kv.head_dim))
      return fail(PLD_INVALID_ARGUMENT,
                  "attention of layer %d has kv heads %d of %d; the cache has %d layers, %d of %d", op.i[0], op.i[2],
                  op.i[3], kv.n_layers, kv.n_kv_heads, kv.head_dim);
  return PLD_OK;
}

BatchLimits batch_limits(const pld_program &p) {
  return {p.max_rows[PLD_ROWS_T], p.max_rows[PLD_ROWS_L], p.vocab_size, p.n_positions};
}

const float *buffer_data(const pld_program *p, int32_t buffer) {
  auto *program = const_cast<pld_program *>(p);
  return reinterpret_cast<const float *>(program->arena.data() + program->offset[static_cast<size_t>(buffer)]);
}

namespace {

pld_status run_program(pld_program *p, pld_kv *kv, const pld_batch *given) {
  if (p == nullptr || kv == nullptr) return fail(PLD_INVALID_ARGUMENT, "program or kv is null");
  std::lock_guard<std::mutex> lock(p->context->mutex);
  if (pld_status status = check_layers(*p, *kv)) return status;
  if (pld_status status = check_block_layout(*kv)) return status;
  pld_batch batch = {};
  if (pld_status status = read_batch(given, &batch)) return status;
  if (pld_status status = check_batch(batch, *kv, batch_limits(*p), p->marks)) return status;
  decide_layout(*kv, PLD_KV_BLOCK);
  p->hidden_index.clear();
  p->logit_index.clear();
  bind_batch(*p, batch, kv);
  run_parts(*p, 0, batch.n_logit_rows > 0 ? 1 : 0);
  p->rows_left = batch.n_tokens;
  return PLD_OK;
}

pld_status run_logits(pld_program *p, const int32_t *rows, int32_t n_rows) {
  if (p == nullptr || rows == nullptr) return fail(PLD_INVALID_ARGUMENT, "program or rows is null");
  std::lock_guard<std::mutex> lock(p->context->mutex);
  if (n_rows < 1 || n_rows > p->max_rows[PLD_ROWS_L])
    return fail(PLD_INVALID_BATCH, "n_rows is %d; it must be in [1, %lld]", n_rows, (long long)p->max_rows[PLD_ROWS_L]);
  for (int32_t l = 0; l < n_rows; ++l)
    if (rows[l] < 0 || rows[l] >= p->rows_left)
      return fail(PLD_INVALID_BATCH, "rows[%d] is %d; the last run left %d", l, rows[l], p->rows_left);
  std::vector<int32_t> of_hidden(rows, rows + n_rows);
  if (!p->hidden_index.empty())
    for (int32_t &row : of_hidden) row = p->hidden_index[static_cast<size_t>(row)];
  pld_batch batch = {};
  batch.struct_size = sizeof batch;
  batch.n_tokens = p->rows_left;
  batch.n_logit_rows = n_rows;
  batch.logit_rows = of_hidden.data();
  bind_batch(*p, batch, nullptr);
  p->logit_index.clear();
  run_parts(*p, 1, 1);
  return PLD_OK;
}

}  // namespace
}  // namespace pld

extern "C" pld_status pld_program_create(pld_context *context, const pld_program_desc *desc, pld_program **out) {
  return pld::guard([&] { return pld::create_program(context, desc, out); });
}
extern "C" void pld_program_destroy(pld_program *program) { delete program; }
extern "C" int64_t pld_program_arena_bytes(const pld_program *program) {
  return program == nullptr ? 0 : program->arena_bytes;
}
extern "C" pld_status pld_program_run(pld_program *program, pld_kv *kv, const pld_batch *batch) {
  return pld::guard([&] { return pld::run_program(program, kv, batch); });
}
extern "C" pld_status pld_program_logits(pld_program *program, const int32_t *rows, int32_t n_rows) {
  return pld::guard([&] { return pld::run_logits(program, rows, n_rows); });
}
extern "C" const float *pld_program_hidden(const pld_program *program) {
  return program == nullptr ? nullptr : pld::buffer_data(program, program->hidden);
}
extern "C" const float *pld_program_logits_data(const pld_program *program) {
  return program == nullptr ? nullptr : pld::buffer_data(program, program->logits);
}
static bool is_among(const std::vector<int32_t> &buffers, int32_t buffer) {
  return std::find(buffers.begin(), buffers.end(), buffer) != buffers.end();
}
extern "C" const float *pld_program_kept(const pld_program *program, int32_t buffer) {
  return program != nullptr && is_among(program->kept, buffer) ? pld::buffer_data(program, buffer) : nullptr;
}
extern "C" float *pld_program_input(pld_program *program, int32_t buffer) {
  if (program == nullptr || !is_among(program->inputs, buffer)) return nullptr;
  return const_cast<float *>(pld::buffer_data(program, buffer));
}
