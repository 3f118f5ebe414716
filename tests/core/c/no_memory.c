/* Lets each allocation of a call fail in turn: no_memory MODEL.pld. A call that fails must say PLD_OUT_OF_MEMORY and
 * leave everything as it was; in the end, with no allocation left to fail, it must do what it does. Prints, for each
 * call, how often it failed. Plain C99 against pellucid.h, on glibc. */
#include <pellucid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CELLS = 24, SEQS = 6, STATE = 1 << 16 };

/* ---- allocations ---------------------------------------------------------------------------------------------------
 */

extern void *__libc_malloc(size_t bytes);
static long until_failure = 0; /* 0: none fails */

void *malloc(size_t bytes) {
  if (until_failure > 0 && --until_failure == 0) return NULL;
  return __libc_malloc(bytes);
}

/* ---- what can be seen ----------------------------------------------------------------------------------------------
 */

static pld_context *context;
static pld_model *model;
static pld_program *program;
static pld_kv *slot, *block;
static pld_model_info info;
static const char *path;

static void die(const char *name, const char *text) {
  printf("%s: %s: %s\n", name, text, pld_last_error());
  exit(1);
}

/* The words of all cells of both caches, of the cells that sequences hold, and of what they hold. */
static void look(float *state) {
  size_t at = 0;
  memset(state, 0, STATE * sizeof *state);
  for (int32_t seq = 0; seq < SEQS; ++seq) state[at++] = (float)pld_seq_pos_max(slot, seq);
  state[at++] = (float)pld_kv_free_cells(slot);
  const size_t width = (size_t)(info.n_kv_heads * info.head_dim);
  for (int32_t layer = 0; layer < info.n_layers; ++layer)
    for (int64_t cell = 0; cell < CELLS && at + 2 * width <= STATE; ++cell, at += 2 * width)
      pld_kv_read(block, layer, cell, state + at, state + at + width);
}

/* Logits behind one more token of each sequence, which goes again: the cells of a SLOT cache by what they do. */
static void probe(float *logits) {
  int32_t tokens[SEQS], seqs[SEQS];
  int8_t wanted[SEQS];
  int32_t n = 0;
  for (int32_t seq = 0; seq < SEQS; ++seq)
    if (pld_seq_pos_max(slot, seq) >= 0) tokens[n] = 3, wanted[n] = 1, seqs[n++] = seq;
  pld_decode_batch batch = {sizeof batch, n, 0, tokens, NULL, seqs, wanted, NULL, NULL, NULL, NULL, NULL, NULL};
  if (pld_decode(program, slot, &batch) != PLD_OK) die("probe", "fails");
  for (int32_t i = 0; i < n; ++i) {
    memcpy(logits + i * info.vocab_size, pld_logits_of(program, i), sizeof(float) * (size_t)info.vocab_size);
    pld_seq_rm(slot, seqs[i], pld_seq_pos_max(slot, seqs[i]), -1);
  }
}

/* ---- calls ---------------------------------------------------------------------------------------------------------
 */

static pld_status decode_slot(void) {
  static const int32_t tokens[] = {5, 6, 7, 8}, seqs[] = {0, 3, 4, 0}, positions[] = {10, 0, 2, 12};
  pld_decode_batch batch = {sizeof batch, 4, 0, tokens, positions, seqs, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
  return pld_decode(program, slot, &batch);
}

static int32_t stop = 0;
static pld_status decode_block(void) {
  static const int32_t tokens[] = {5, 6, 7}, seqs[] = {7, 8, 9}, tables[] = {0, 1, 2}, lens[] = {1, 1, 1};
  static const int64_t cells[] = {0, 8, 16};
  pld_decode_batch batch = {sizeof batch, 3, 1, tokens, NULL, seqs, NULL, cells, tables, lens, &stop, NULL, NULL};
  const pld_status status = pld_decode(program, block, &batch);
  for (int32_t seq = 7; seq <= 9; ++seq) /* known exactly when it was decoded */
    if ((pld_request_free(block, seq) == PLD_OK) != (status == PLD_OK)) die("decode_block", "a sequence is left");
  if (status != PLD_OK) pld_kv_read(NULL, 0, 0, NULL, NULL); /* some text */
  return status;
}

static pld_status copy(void) { return pld_seq_cp(slot, 2, 0, 0, -1); }
static pld_status shift(void) { return pld_seq_add(program, slot, 0, 0, -1, 3); }
static pld_status cut(void) { return pld_seq_rm(slot, 0, 1, 2); }
static pld_status keep(void) { return pld_seq_keep(slot, 0); }
static pld_status forget(void) { return pld_request_free(slot, 0); }

static pld_status again(void) {
  static const int32_t rows[] = {0};
  return pld_program_logits(program, rows, 1);
}

static pld_status sample(void) {
  static const int32_t ids[] = {1};
  static const float biases[] = {1.0f};
  const float *logits = pld_program_logits_data(program);
  pld_sample_row row;
  memset(&row, 0, sizeof row);
  row.struct_size = sizeof row;
  row.repetition_penalty = 1.0f;
  row.n_allowed = -1;
  row.top_p = 0.5;
  row.temperature = 1.0f;
  row.top_k = 7;
  row.n_biases = 1;
  row.bias_ids = ids;
  row.biases = biases;
  const pld_sample_row *rows[] = {&row};
  pld_sample_result result = {-99, -99, 0.0f, 0.0f};
  const pld_status status = pld_sample(context, logits, info.vocab_size, info.vocab_size, rows, 1, &result);
  if (status != PLD_OK && result.token != -99) die("sample", "a result was written");
  return status;
}

static pld_status make_cache(void) {
  pld_kv_params params;
  pld_kv_params_init(&params, sizeof params);
  pld_kv *kv = NULL;
  params.block_size = 1;
  params.n_blocks = 100;
  params.layout = PLD_KV_SLOT;
  const pld_status status = pld_kv_create(&params, &kv);
  if ((kv != NULL) != (status == PLD_OK)) die("make_cache", "the handle");
  pld_kv_destroy(kv);
  return status;
}

static pld_status make_context(void) {
  pld_context_params params;
  pld_context_params_init(&params, sizeof params);
  pld_context *made = NULL;
  params.num_threads = 3;
  const pld_status status = pld_context_create(&params, &made);
  if ((made != NULL) != (status == PLD_OK)) die("make_context", "the handle");
  pld_context_destroy(made);
  return status;
}

static pld_status open_model(void) {
  pld_model_params params;
  pld_model_params_init(&params, sizeof params);
  pld_model *made = NULL;
  const pld_status status = pld_model_open(context, path, &params, &made);
  if ((made != NULL) != (status == PLD_OK)) die("open_model", "the handle");
  pld_model_close(made);
  return status;
}

/* ---- the loop ------------------------------------------------------------------------------------------------------
 */

static void fill(void) {
  static const int32_t tokens[] = {4, 5, 6, 9, 11}, seqs[] = {0, 0, 0, 1, 1};
  pld_decode_batch batch = {sizeof batch, 5, 0, tokens, NULL, seqs, NULL, NULL, NULL, NULL, NULL, NULL, NULL};
  for (int32_t seq = 0; seq < SEQS; ++seq) pld_request_free(slot, seq);
  if (pld_decode(program, slot, &batch) != PLD_OK || pld_seq_cp(slot, 5, 0, 0, 2) != PLD_OK) die("fill", "fails");
}

static void try(const char *name, pld_status (*call)(void)) {
  static float before[STATE], after[STATE], expected[STATE], found[STATE];
  int failures = 0;
  for (long n = 1;; ++n) {
    fill();
    probe(expected);
    fill();
    look(before);
    until_failure = n;
    const pld_status status = call();
    const int was_reached = until_failure == 0;
    until_failure = 0;
    if (!was_reached) {
      if (status != PLD_OK) die(name, "fails with all memory");
      break;
    }
    if (status == PLD_OK) continue; /* it did without */
    if (status != PLD_OUT_OF_MEMORY) die(name, "another status");
    if (pld_last_error()[0] == '\0') die(name, "no text");
    ++failures;
    look(after);
    if (memcmp(before, after, sizeof before) != 0) die(name, "what can be seen has changed");
    probe(found);
    if (memcmp(expected, found, sizeof found) != 0) die(name, "a step behind it has other bits");
  }
  printf("%s %d\n", name, failures);
}

int main(int argc, char **argv) {
  if (argc != 2) return 2;
  path = argv[1];
  pld_context_params context_params;
  pld_context_params_init(&context_params, sizeof context_params);
  context_params.num_threads = 2;
  pld_model_params params;
  pld_model_params_init(&params, sizeof params);
  pld_kv_params kv;
  pld_kv_params_init(&kv, sizeof kv);
  info.struct_size = sizeof info;
  if (pld_context_create(&context_params, &context) != PLD_OK ||
      pld_model_open(context, path, &params, &model) != PLD_OK || pld_model_info_get(model, &info) != PLD_OK)
    die("start", "fails");
  program = pld_model_program(model);
  kv.n_layers = info.n_layers, kv.n_kv_heads = info.n_kv_heads, kv.head_dim = info.head_dim, kv.dtype = info.kv_dtype;
  kv.block_size = 8, kv.n_blocks = CELLS / 8;
  if (pld_kv_create(&kv, &block) != PLD_OK) die("start", "no BLOCK cache");
  kv.block_size = 1, kv.n_blocks = CELLS, kv.layout = PLD_KV_SLOT;
  if (pld_kv_create(&kv, &slot) != PLD_OK) die("start", "no SLOT cache");
  try("decode_slot", decode_slot);
  try("decode_block", decode_block);
  try("copy", copy);
  try("shift", shift);
  try("cut", cut);
  try("keep", keep);
  try("forget", forget);
  try("again", again);
  try("sample", sample);
  try("make_cache", make_cache);
  try("make_context", make_context);
  try("open_model", open_model);
  pld_kv_destroy(slot);
  pld_kv_destroy(block);
  pld_model_close(model);
  pld_context_destroy(context);
  return 0;
}
