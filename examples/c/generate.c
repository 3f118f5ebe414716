/* Greedy generation with a compiled model, without Python:
 *
 *   pellucid compile MODEL -o model.pld
 *   cc -std=c99 examples/c/generate.c -I INCLUDE LIBRARY -Wl,-rpath,FOLDER -o generate
 *   ./generate model.pld 16 slot 504 3575 282 4649 314
 *
 * `pellucid info` prints INCLUDE and LIBRARY. Arguments: model, tokens to generate, slot or block, the prompt's token
 * ids. Prints the generated ids, up to an end token.
 */
#include <pellucid.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEQUENCE = 0, BLOCK = 16 };

static int complain(const char *what) {
  fprintf(stderr, "%s: %s\n", what, pld_last_error());
  return 1;
}

static int32_t greatest(const float *logits, int32_t count) {
  int32_t best = 0;
  for (int32_t i = 1; i < count; ++i)
    if (logits[i] > logits[best]) best = i;
  return best;
}

/* Where tokens lie in a BLOCK cache that one sequence has for itself: position p in cell p. */
typedef struct {
  int64_t *slots;
  int32_t *tables, *lengths;
  int32_t width;
} Blocks;

static int place(Blocks *blocks, int32_t first, int32_t count) {
  blocks->slots = realloc(blocks->slots, (size_t)count * sizeof *blocks->slots);
  blocks->tables = realloc(blocks->tables, (size_t)count * (size_t)blocks->width * sizeof *blocks->tables);
  blocks->lengths = realloc(blocks->lengths, (size_t)count * sizeof *blocks->lengths);
  if (blocks->slots == NULL || blocks->tables == NULL || blocks->lengths == NULL) return 0;
  for (int32_t t = 0; t < count; ++t) {
    blocks->slots[t] = first + t;
    blocks->lengths[t] = first + t + 1;
    for (int32_t w = 0; w < blocks->width; ++w) blocks->tables[t * blocks->width + w] = w;
  }
  return 1;
}

int main(int argc, char **argv) {
  if (argc < 5 || (strcmp(argv[3], "slot") != 0 && strcmp(argv[3], "block") != 0)) {
    fprintf(stderr, "usage: %s MODEL.pld COUNT slot|block TOKEN...\n", argv[0]);
    return 2;
  }
  const int32_t wanted = atoi(argv[2]), n_prompt = argc - 4;
  const int is_slot = strcmp(argv[3], "slot") == 0;

  pld_context_params context_params;
  pld_context_params_init(&context_params, sizeof context_params);
  pld_context *context;
  if (pld_context_create(&context_params, &context) != PLD_OK) return complain("context");
  pld_model_params model_params;
  pld_model_params_init(&model_params, sizeof model_params);
  if (n_prompt > model_params.max_tokens) model_params.max_tokens = n_prompt;
  pld_model *model;
  if (pld_model_open(context, argv[1], &model_params, &model) != PLD_OK) return complain("model");
  pld_model_info info;
  info.struct_size = sizeof info;
  if (pld_model_info_get(model, &info) != PLD_OK) return complain("info");

  pld_kv_params kv_params;
  pld_kv_params_init(&kv_params, sizeof kv_params);
  kv_params.n_layers = info.n_layers;
  kv_params.n_kv_heads = info.n_kv_heads;
  kv_params.head_dim = info.head_dim;
  kv_params.dtype = info.kv_dtype;
  kv_params.layout = is_slot ? PLD_KV_SLOT : PLD_KV_BLOCK;
  kv_params.block_size = is_slot ? 1 : BLOCK;
  kv_params.n_blocks = is_slot ? n_prompt + wanted : (n_prompt + wanted + BLOCK - 1) / BLOCK;
  pld_kv *kv;
  if (pld_kv_create(&kv_params, &kv) != PLD_OK) return complain("cache");

  int32_t *tokens = calloc((size_t)n_prompt, sizeof *tokens), *sequences = calloc((size_t)n_prompt, sizeof *sequences);
  if (tokens == NULL || sequences == NULL) return 1;
  for (int32_t i = 0; i < n_prompt; ++i) {
    tokens[i] = atoi(argv[4 + i]);
    sequences[i] = SEQUENCE;
  }
  Blocks blocks = {NULL, NULL, NULL, kv_params.n_blocks};
  int32_t n_tokens = n_prompt, n_done = 0;
  for (int32_t made = 0; made < wanted; ++made) {
    pld_decode_batch batch;
    memset(&batch, 0, sizeof batch);
    batch.struct_size = sizeof batch;
    batch.n_tokens = n_tokens;
    batch.tokens = tokens;
    batch.seq_ids = sequences;
    if (!is_slot) {
      if (!place(&blocks, n_done, n_tokens)) return 1;
      batch.block_table_width = blocks.width;
      batch.slot_mapping = blocks.slots;
      batch.block_tables = blocks.tables;
      batch.context_lens = blocks.lengths;
    }
    if (pld_decode(pld_model_program(model), kv, &batch) != PLD_OK) return complain("decode");
    n_done += n_tokens;
    const int32_t token = greatest(pld_logits_of(pld_model_program(model), n_tokens - 1), info.vocab_size);
    printf(made == 0 ? "%d" : " %d", token);
    tokens[0] = token;
    n_tokens = 1;
    int ended = 0;
    for (int32_t i = 0; i < info.n_end_tokens; ++i) ended = ended || token == info.end_tokens[i];
    if (ended) break;
  }
  printf("\n");
  free(blocks.slots);
  free(blocks.tables);
  free(blocks.lengths);
  free(tokens);
  free(sequences);
  pld_kv_destroy(kv);
  pld_model_close(model);
  pld_context_destroy(context);
  return 0;
}
