/* Runs one op once on one thread, for counting instructions: one_op CASE ROWS. Plain C99 against pellucid.h. */
#include <pellucid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { N = 256, K = 512, HEADS = 6, KV_HEADS = 2, HEAD = 64, BLOCK = 16, MAX_TOKENS = 640 };

static void *zeroed(size_t bytes) {
  char *raw = calloc(bytes + 64, 1);
  if (raw == NULL) exit(3);
  return raw + (64 - (size_t)raw % 64) % 64;
}

static void require(pld_status status) {
  if (status == PLD_OK) return;
  fprintf(stderr, "%s\n", pld_last_error());
  exit(2);
}

static void absent(pld_op *op) {
  memset(op, 0, sizeof *op);
  for (int i = 0; i < PLD_MAX_IN; ++i) op->in[i] = -1;
  for (int i = 0; i < PLD_MAX_OUT; ++i) op->out[i] = -1;
  for (int i = 0; i < PLD_MAX_WEIGHTS; ++i) op->weight[i] = -1;
}

static float *numbers(size_t count) {
  float *x = zeroed(count * sizeof(float));
  for (size_t i = 0; i < count; ++i) x[i] = (float)((i * 2654435761u >> 16) % 2001u) / 1000.0f - 1.0f;
  return x;
}

static void operand(pld_op_call *call, pld_op *op, int i, const float *x, int width) {
  op->in[i] = i;
  op->in_width[i] = width;
  call->in[i] = x;
  call->in_stride[i] = width;
}

static void result(pld_op_call *call, pld_op *op, int width) {
  op->out[0] = 0;
  op->out_width[0] = width;
  call->out[0] = numbers((size_t)call->rows * (size_t)width);
  call->out_stride[0] = width;
}

static void linear(pld_context *context, pld_op_call *call, pld_op *op, pld_dtype dtype) {
  int64_t bytes = pld_packed_bytes(N, K, dtype);
  void *data = zeroed((size_t)bytes);
  int from_floats = dtype != PLD_Q4_K && dtype != PLD_Q5_K && dtype != PLD_Q6_K;
  if (from_floats)
    require(pld_pack(context, numbers(N * K), N * K * 4, PLD_F32, N, K, 0, N, data, bytes, dtype));
  else
    memset(data, 1, (size_t)bytes);
  op->kind = PLD_OP_LINEAR;
  op->weight[0] = 0;
  pld_weight *weight = zeroed(sizeof *weight);
  weight->data = data;
  weight->rows = N;
  weight->cols = K;
  weight->dtype = dtype;
  weight->layout = PLD_PANELS;
  call->weights = weight;
  call->weight_size = sizeof *weight;
  operand(call, op, 0, numbers((size_t)call->rows * K), K);
  result(call, op, N);
}

/* The last `rows` tokens of a sequence of 512 + rows. */
static void attention(pld_op_call *call, pld_op *op, pld_dtype dtype, pld_batch *batch) {
  static int32_t tokens[MAX_TOKENS], positions[MAX_TOKENS], start[2], length[1], table[MAX_TOKENS / BLOCK];
  static int64_t slots[MAX_TOKENS];
  int rows = (int)call->rows;
  pld_kv_params params;
  require(pld_kv_params_init(&params, sizeof params));
  params.n_kv_heads = KV_HEADS;
  params.head_dim = HEAD;
  params.block_size = BLOCK;
  params.n_blocks = MAX_TOKENS / BLOCK;
  params.dtype = dtype;
  require(pld_kv_create(&params, &call->kv));
  for (int i = 0; i < MAX_TOKENS / BLOCK; ++i) table[i] = i;
  for (int i = 0; i < rows; ++i) slots[i] = positions[i] = 512 + i;
  start[1] = rows;
  length[0] = 512 + rows;
  memset(batch, 0, sizeof *batch);
  batch->struct_size = sizeof *batch;
  batch->n_tokens = rows;
  batch->n_seqs = 1;
  batch->block_table_width = MAX_TOKENS / BLOCK;
  batch->token_ids = tokens;
  batch->positions = positions;
  batch->query_start = start;
  batch->seq_lens = length;
  batch->block_tables = table;
  batch->slot_mapping = slots;
  call->batch = batch;
  op->kind = PLD_OP_ATTENTION;
  op->i[1] = HEADS;
  op->i[2] = KV_HEADS;
  op->i[3] = HEAD;
  op->f[0] = 0.125f;
  operand(call, op, 0, numbers((size_t)rows * HEADS * HEAD), HEADS * HEAD);
  operand(call, op, 1, numbers((size_t)rows * KV_HEADS * HEAD), KV_HEADS * HEAD);
  operand(call, op, 2, numbers((size_t)rows * KV_HEADS * HEAD), KV_HEADS * HEAD);
  result(call, op, HEADS * HEAD);
}

int main(int argc, char **argv) {
  static const struct {
    const char *name;
    pld_dtype dtype;
  } types[] = {{"f32", PLD_F32},   {"bf16", PLD_BF16}, {"q8_0", PLD_Q8_0}, {"q4_0", PLD_Q4_0}, {"q4_1", PLD_Q4_1},
               {"q4_k", PLD_Q4_K}, {"q5_k", PLD_Q5_K}, {"q6_k", PLD_Q6_K}, {"i8", PLD_I8}};
  if (argc != 3) return 1;
  pld_context_params params;
  require(pld_context_params_init(&params, sizeof params));
  params.num_threads = 1;
  params.isa = PLD_ISA_AVX2;
  pld_context *context;
  require(pld_context_create(&params, &context));
  pld_op op;
  absent(&op);
  pld_op_call call;
  memset(&call, 0, sizeof call);
  call.struct_size = sizeof call;
  call.op = &op;
  call.op_size = sizeof op;
  call.rows = atoi(argv[2]);
  pld_batch batch;
  const char *split = strchr(argv[1], '-');
  if (split == NULL) return 1;
  for (size_t i = 0; i < sizeof types / sizeof types[0]; ++i) {
    if (strcmp(split + 1, types[i].name) != 0) continue;
    if (strncmp(argv[1], "linear", 6) == 0) linear(context, &call, &op, types[i].dtype);
    if (strncmp(argv[1], "attention", 9) == 0) attention(&call, &op, types[i].dtype, &batch);
  }
  if (op.kind == 0) return 1;
  require(pld_op_run(context, &call));
  printf("%g\n", (double)call.out[0][0]);
  pld_kv_destroy(call.kv);
  pld_context_destroy(context);
  return 0;
}
