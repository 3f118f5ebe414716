/* A caller of the core that compiles against every header that there was: any_header ISA prints its numbers. Plain C99.
 * HEADER 1: the first header; 2: the last with params by value; 3: today's, or a longer one. */
#include <pellucid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { T = 5, D = 8, E = 4, V = 16, N_OPS = 6, N_BUFFERS = 5, N_WEIGHTS = 3, CELLS = 16 };
enum { EMBEDDED, QKV, ATTENDED, GATHERED, LOGITS };

static void require(pld_status status) {
  if (status == PLD_OK) return;
  fprintf(stderr, "status %d: %s\n", (int)status, pld_last_error());
  exit(2);
}

static void print(const char *name, const float *x, int count) {
  printf("%s", name);
  for (int i = 0; i < count; ++i) printf(" %a", (double)x[i]);
  printf("\n");
}

static void *zeroed(size_t bytes) {
  static char memory[1 << 18];
  static size_t used;
  char *at = memory + used;
  at += (64 - (size_t)at % 64) % 64;
  used = (size_t)(at - memory) + bytes;
  return at;
}

static pld_weight matrix(pld_context *context, int rows, int cols, unsigned seed) {
  float *x = zeroed((size_t)(rows * cols) * sizeof *x);
  for (int i = 0; i < rows * cols; ++i) x[i] = (float)(((unsigned)i + seed) * 2654435761u >> 16) / 32768.0f - 1.0f;
  const int64_t bytes = pld_packed_bytes(rows, cols, PLD_F32);
  void *data = zeroed((size_t)bytes);
  require(pld_pack(context, x, rows * cols * 4, PLD_F32, rows, cols, 0, rows, data, bytes, PLD_F32));
  pld_weight weight;
  memset(&weight, 0, sizeof weight);
  weight.data = data;
  weight.rows = rows;
  weight.cols = cols;
  weight.dtype = PLD_F32;
  weight.layout = PLD_PANELS;
  return weight;
}

static pld_op op_of(pld_op_kind kind, int out, int out_width, int weight) {
  pld_op op;
  memset(&op, 0, sizeof op);
  for (int i = 0; i < PLD_MAX_IN; ++i) op.in[i] = -1;
  for (int i = 0; i < PLD_MAX_OUT; ++i) op.out[i] = -1;
  for (int i = 0; i < PLD_MAX_WEIGHTS; ++i) op.weight[i] = -1;
  op.kind = kind;
  op.out[0] = out;
  op.out_width[0] = out_width;
  op.weight[0] = weight;
  return op;
}

static void reads(pld_op *op, int i, int buffer, int column, int width) {
  op->in[i] = buffer;
  op->in_col[i] = column;
  op->in_width[i] = width;
}

static pld_program *program_of(pld_context *context, pld_weight *weights) {
  pld_op ops[N_OPS];
  ops[0] = op_of(PLD_OP_EMBEDDING, EMBEDDED, D, 0);
  ops[1] = op_of(PLD_OP_LINEAR, QKV, D + 2 * E, 1);
  reads(&ops[1], 0, EMBEDDED, 0, D);
  ops[2] = op_of(PLD_OP_ATTENTION, ATTENDED, D, -1);
  reads(&ops[2], 0, QKV, 0, D);
  reads(&ops[2], 1, QKV, D, E);
  reads(&ops[2], 2, QKV, D + E, E);
  ops[2].i[1] = 2, ops[2].i[2] = 1, ops[2].i[3] = E, ops[2].i[4] = 3;
  ops[2].f[0] = 0.5f;
  ops[3] = op_of(PLD_OP_GATHER_ROWS, GATHERED, D, -1);
  reads(&ops[3], 0, ATTENDED, 0, D);
  ops[4] = op_of(PLD_OP_LINEAR, LOGITS, V, 2);
  reads(&ops[4], 0, GATHERED, 0, D);
  pld_buffer buffers[N_BUFFERS];
  static const int32_t widths[N_BUFFERS] = {D, D + 2 * E, D, D, V};
  memset(buffers, 0, sizeof buffers);
  for (int i = 0; i < N_BUFFERS; ++i) {
    buffers[i].width = widths[i];
    buffers[i].domain = i < GATHERED ? PLD_ROWS_T : PLD_ROWS_L;
    buffers[i].slot = i;
  }
  pld_program_desc desc;
  memset(&desc, 0, sizeof desc);
  desc.struct_size = sizeof desc;
  desc.n_ops = N_OPS - 1;
  desc.n_forward_ops = 3;
  desc.n_buffers = N_BUFFERS;
  desc.n_weights = N_WEIGHTS;
  desc.ops = ops;
  desc.buffers = buffers;
  desc.weights = weights;
  desc.hidden = ATTENDED;
  desc.logits = LOGITS;
  desc.max_tokens = 8;
  desc.max_logit_rows = 2;
  desc.vocab_size = V;
#if HEADER == 2
  static const int32_t kept[1] = {EMBEDDED};
  desc.n_kept = 1;
  desc.kept = kept;
#elif HEADER == 3
  desc.op_size = sizeof *ops;
  desc.buffer_size = sizeof *buffers;
  desc.weight_size = sizeof *weights;
#endif
  pld_program *program;
  require(pld_program_create(context, &desc, &program));
  return program;
}

static pld_kv *cache_of(int block_size) {
#if HEADER == 3
  pld_kv_params params;
  require(pld_kv_params_init(&params, sizeof params));
#else
  pld_kv_params params = pld_kv_default_params();
#endif
  params.n_kv_heads = 1;
  params.head_dim = E;
  params.block_size = block_size;
  params.n_blocks = CELLS / block_size;
#if HEADER >= 2
  params.layout = block_size == 1 ? PLD_KV_SLOT : PLD_KV_BLOCK;
#endif
  pld_kv *kv;
  require(pld_kv_create(&params, &kv));
  return kv;
}

static void run(pld_program *program) {
  static const int32_t tokens[T] = {1, 5, 3, 15, 0}, positions[T] = {0, 1, 2, 3, 4}, start[2] = {0, T}, length[1] = {T};
  static const int32_t table[2] = {1, 0}, rows[2] = {4, 1};
  static const int64_t slots[T] = {4, 5, 6, 7, 0};
  pld_batch batch;
  memset(&batch, 0, sizeof batch);
  batch.struct_size = sizeof batch;
  batch.n_tokens = T;
  batch.n_seqs = 1;
  batch.n_logit_rows = 2;
  batch.block_table_width = 2;
  batch.token_ids = tokens;
  batch.positions = positions;
  batch.query_start = start;
  batch.seq_lens = length;
  batch.block_tables = table;
  batch.slot_mapping = slots;
  batch.logit_rows = rows;
  pld_kv *kv = cache_of(4);
  require(pld_program_run(program, kv, &batch));
  print("hidden", pld_program_hidden(program), T * D);
  print("logits", pld_program_logits_data(program), 2 * V);
  pld_kv_destroy(kv);
}

static void one_op(pld_context *context, pld_weight *weights) {
  pld_op op = op_of(PLD_OP_LINEAR, 0, V, 0);
  reads(&op, 0, 0, 0, D);
  float x[2 * D], y[2 * V];
  for (int i = 0; i < 2 * D; ++i) x[i] = (float)i / 7.0f;
  pld_op_call call;
  memset(&call, 0, sizeof call);
  call.struct_size = sizeof call;
  call.op = &op;
  call.rows = 2;
  call.in[0] = x;
  call.in_stride[0] = D;
  call.out[0] = y;
  call.out_stride[0] = V;
#if HEADER == 3
  call.op_size = sizeof op;
  call.weights = &weights[2];
  call.weight_size = sizeof *weights;
#else
  call.weight[0] = weights[2];
#endif
  require(pld_op_run(context, &call));
  print("op", y, 2 * V);
}

#if HEADER >= 2
static void decode_and_sample(pld_context *context, pld_program *program) {
  static const int32_t tokens[T] = {1, 5, 3, 15, 0}, seqs[T] = {7, 7, 2, 7, 2};
  pld_decode_batch batch;
  memset(&batch, 0, sizeof batch);
  batch.struct_size = sizeof batch;
  batch.n_tokens = T;
  batch.tokens = tokens;
  batch.seq_ids = seqs;
  pld_kv *kv = cache_of(1);
  printf("free %d\n", (int)pld_kv_free_cells(kv));
  require(pld_decode(program, kv, &batch));
  require(pld_seq_cp(kv, 9, 7, 0, 2));
  printf("pos %d %d free %d\n", (int)pld_seq_pos_max(kv, 7), (int)pld_seq_pos_max(kv, 9), (int)pld_kv_free_cells(kv));
  const float *logits = pld_logits_of(program, T - 1);
  print("decoded", logits, V);
  pld_sample_row rows[2];
  const pld_sample_row *pointers[2] = {&rows[0], &rows[1]};
  memset(rows, 0, sizeof rows);
  for (int i = 0; i < 2; ++i) {
    rows[i].struct_size = sizeof rows[i];
    rows[i].repetition_penalty = 1.0f;
    rows[i].n_allowed = -1;
    rows[i].top_p = 0.9;
    rows[i].temperature = (float)i;
    rows[i].wants_log_sum_exp = 1;
    rows[i].seed = 11;
  }
  pld_sample_result results[3];
  memset(results, 7, sizeof results);
  float both[2 * V];
  memcpy(both, logits, V * sizeof *both);
  memcpy(both + V, logits, V * sizeof *both);
#if HEADER == 3
  pld_sample_call call;
  memset(&call, 0, sizeof call);
  call.struct_size = sizeof call;
  call.logits = both;
  call.stride = call.vocab_size = V;
  call.n_rows = 2;
  call.rows = pointers;
  call.results = results;
  call.result_size = sizeof *results;
  require(pld_sample_run(context, &call));
#else
  require(pld_sample(context, both, V, V, pointers, 2, results));
#endif
  for (int i = 0; i < 2; ++i)
    printf("sampled %d %d %a %a\n", (int)results[i].token, (int)results[i].status, (double)results[i].max,
           (double)results[i].log_sum_exp);
  if (results[2].token != 0x07070707) exit(3);
  pld_kv_destroy(kv);
}
#endif

#ifdef LONGER
/* What a newer header adds is refused by name when it is set. */
static void set_unknown_fields(void) {
  pld_kv_params params;
  pld_kv *kv;
  require(pld_kv_params_init(&params, sizeof params));
  params.added_last = 1;
  if (pld_kv_create(&params, &kv) != PLD_INVALID_ARGUMENT || strstr(pld_last_error(), "unknown fields") == NULL)
    exit(4);
}
#endif

int main(int argc, char **argv) {
  pld_cpu_info info[2];
  memset(info, 7, sizeof info);
  info[0].struct_size = sizeof info[0];
  require(pld_cpu_info_get(&info[0]));
  if (info[0].struct_size != sizeof info[0] || info[1].has_avx2 != 0x07070707) return 3;
#if HEADER == 3
  pld_context_params params;
  require(pld_context_params_init(&params, sizeof params));
#else
  pld_context_params params = pld_context_default_params();
#endif
  params.num_threads = 2;
  params.isa = argc > 1 ? atoi(argv[1]) : PLD_ISA_AUTO;
  pld_context *context;
  require(pld_context_create(&params, &context));
  pld_weight weights[N_WEIGHTS];
  weights[0] = matrix(context, V, D, 1);
  weights[1] = matrix(context, D + 2 * E, D, 99);
  weights[2] = matrix(context, V, D, 777);
  pld_program *program = program_of(context, weights);
  one_op(context, weights);
  run(program);
#if HEADER >= 2
  decode_and_sample(context, program);
#endif
#ifdef LONGER
  set_unknown_fields();
#endif
  pld_program_destroy(program);
  pld_context_destroy(context);
  return 0;
}
