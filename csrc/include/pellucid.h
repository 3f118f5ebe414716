/* Pellucid: the C ABI of the native core. C99, no torch, no globals, nothing throws across it.
 *
 * Manners. Handles are opaque. Lengths stand beside pointers. Functions return a pld_status; what a status other than
 * PLD_OK means for the state is said at each function, and its text is pld_last_error() on the calling thread.
 *
 * Versions. Callers built against an older header keep working. Structs grow at their end; every params struct begins
 * with its own size, and for arrays of structs the caller says the size of an element (0: that of its first version).
 * Fields that a caller does not have yet keep their defaults. Fields that this library does not have yet must be zero,
 * which means their defaults, or the call is refused; in structs that are filled for the caller they become zero.
 * pld_*_params_init fill in the defaults for `size` bytes, sizeof the caller's struct: PLD_INVALID_ARGUMENT below the
 * first version's and above 4096. Older headers had functions that gave params by value: they are still exported.
 *
 * Shape letters: T tokens (rows) of a step, R requests, L rows that need logits, D model width, H heads, G kv heads,
 * E head width, F ffn width, V vocabulary, B blocks, S block size, N rows and K columns of a weight.
 */
#ifndef PELLUCID_H
#define PELLUCID_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define PLD_API __declspec(dllexport)
#else
#define PLD_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define PLD_ABI_VERSION 1

typedef int32_t pld_status;
enum {
  PLD_OK = 0,
  PLD_NO_SPACE = 1,          /* no KV space; state unchanged */
  PLD_ABORTED = 2,           /* a caller asked to stop; state unchanged */
  PLD_INVALID_BATCH = -1,    /* the batch contradicts itself or the cache; state unchanged */
  PLD_INVALID_ARGUMENT = -2, /* null, out of range, wrong size */
  PLD_OUT_OF_MEMORY = -3,
  PLD_NOT_SUPPORTED = -4,
  PLD_INTERNAL = -5
};

/* Text of the last failure on this thread; "" when none. Valid until the next call on this thread. */
PLD_API const char *pld_last_error(void);

/* Which element of the caller's arrays that failure is about, where it is about one alone: the call without that token,
 * sequence or row may succeed. So nobody has to read the text. */
typedef int32_t pld_error_item;
enum {
  PLD_ITEM_NONE = 0,      /* the call as a whole, or no failure */
  PLD_ITEM_TOKEN = 1,     /* token_ids and whatever else has T entries; of pld_decode: tokens */
  PLD_ITEM_SEQUENCE = 2,  /* seq_lens, block_tables: R entries */
  PLD_ITEM_LOGIT_ROW = 3, /* logit_rows of a batch: L entries */
  PLD_ITEM_SAMPLE_ROW = 4 /* rows of pld_sample */
};
PLD_API pld_error_item pld_last_error_item(int64_t *index); /* index: null, or set to the element's, -1 when none */
PLD_API int32_t pld_abi_version(void);
/* The number of the arithmetic that this library computes by: equal numbers, equal bits (docs/kernels.md). */
PLD_API int32_t pld_recipe(void);

/* ---- Context: a thread pool and the kernels of one instruction set ---------------------------------------------- */

typedef int32_t pld_isa;
enum {
  PLD_ISA_AUTO = 0,
  PLD_ISA_PORTABLE = 1,
  PLD_ISA_AVX2 = 2,
  PLD_ISA_AVX512 = 3
}; /* AVX512: F, BW, VL, DQ, BF16, VNNI */

typedef struct pld_cpu_info {
  size_t struct_size;
  int32_t physical_cores; /* that this process may use */
  int32_t logical_cores;
  int32_t has_avx2; /* with FMA and F16C */
  int32_t has_avx512;
  int32_t has_avx512_bf16;
  int32_t has_avx512_vnni;
  pld_isa best_isa;
  char model_name[128];
} pld_cpu_info;
PLD_API pld_status pld_cpu_info_get(pld_cpu_info *info);

typedef struct pld_context pld_context;
typedef struct pld_context_params {
  size_t struct_size;
  int32_t num_threads; /* 0: physical cores */
  pld_isa isa;         /* PLD_ISA_AUTO: the best that the machine has */
  int32_t spin_us;     /* how long an idle worker spins before it sleeps; < 0: default */
  /* Padding in the first version of this struct. 1: programs fill memory with NaN as soon as nobody may read it any
   * more, which changes no result unless a program is wrong. Slow: for tests. Anything else: they do not. */
  int32_t poison;
} pld_context_params;
PLD_API pld_status pld_context_params_init(pld_context_params *params, size_t size);
PLD_API pld_status pld_context_create(const pld_context_params *params, pld_context **out);
PLD_API void pld_context_destroy(pld_context *context); /* null is ignored */
PLD_API int32_t pld_context_num_threads(const pld_context *context);
PLD_API pld_isa pld_context_isa(const pld_context *context);

/* ---- Weights ------------------------------------------------------------------------------------------------------
 */

typedef int32_t pld_dtype;
enum { /* storage types; the quantised ones have GGUF's block layouts */
       PLD_F32 = 0,
       PLD_BF16 = 1,
       PLD_F16 = 2,
       PLD_Q8_0 = 3,
       PLD_Q4_0 = 4,
       PLD_Q4_1 = 5,
       PLD_Q5_0 = 6,
       PLD_Q5_1 = 7,
       PLD_Q4_K = 8,
       PLD_Q5_K = 9,
       PLD_Q6_K = 10,
       PLD_I8 = 11 /* packed only: int8 with one float32 scale a row of W */
};

typedef int32_t pld_layout;
enum {
  PLD_ROW_MAJOR = 0, /* [N, K], F32 or BF16: norm weights, biases, tables */
  /* matrices. F32 and BF16: [ceil(N/64)][ceil(K/pair)][64][pair], pair 1 and 2, zero padded. Quantised types (Q8_0,
   * Q4_0, Q4_1, Q4_K, Q5_K, Q6_K, I8): strips of 32 rows, see strips.hpp; K is a multiple of the type's block, but for
   * I8 */
  PLD_PANELS = 1
};

typedef struct pld_weight {
  const void *data; /* 64-byte aligned for PLD_PANELS, else as its values are */
  int64_t rows;     /* N; 1 for vectors */
  int64_t cols;     /* K */
  pld_dtype dtype;  /* PLD_F32, PLD_BF16, or in PLD_PANELS a quantised type */
  pld_layout layout;
} pld_weight;

/* Bytes of one row of `cols` values stored as `dtype`; 0 when cols is negative or no multiple of the dtype's block. */
PLD_API int64_t pld_row_bytes(pld_dtype dtype, int64_t cols);
/* Bytes of a packed [rows, cols] weight; 0 when the arguments are out of range. */
PLD_API int64_t pld_packed_bytes(int64_t rows, int64_t cols, pld_dtype dtype);

/* Converts rows [0, rows) of `src` (row-major, any storage type) to row-major `dst_dtype` (F32 or BF16, rounded to
 * nearest even). */
PLD_API pld_status pld_convert(pld_context *context, const void *src, int64_t src_bytes, pld_dtype src_dtype,
                               int64_t rows, int64_t cols, void *dst, int64_t dst_bytes, pld_dtype dst_dtype);
/* The same into rows [row_offset, row_offset + rows) of a PLD_PANELS weight [dst_rows, cols]; the padding of `dst` must
 * have been zeroed by the caller beforehand. Several calls fill one fused matrix.
 * A quantised `dst_dtype` equal to `src_dtype` keeps the stored values exactly; PLD_Q8_0, PLD_Q4_0, PLD_Q4_1 and PLD_I8
 * are also made from other types, rounding to nearest. Calls for rows of one strip must not run at the same time. */
PLD_API pld_status pld_pack(pld_context *context, const void *src, int64_t src_bytes, pld_dtype src_dtype, int64_t rows,
                            int64_t cols, int64_t row_offset, int64_t dst_rows, void *dst, int64_t dst_bytes,
                            pld_dtype dst_dtype);

/* ---- KV cache ------------------------------------------------------------------------------------------------------
 */

typedef int32_t pld_kv_layout;
enum {
  PLD_KV_BLOCK = 0, /* the caller manages blocks: block tables and slot mapping come with each batch */
  PLD_KV_SLOT = 1   /* the core manages single cells by sequence id; block_size must be 1 */
};

typedef struct pld_kv pld_kv;
typedef struct pld_kv_params {
  size_t struct_size;
  int32_t n_layers;
  int32_t n_kv_heads;   /* G */
  int32_t head_dim;     /* E, even */
  int32_t block_size;   /* S >= 1 */
  int32_t n_blocks;     /* B >= 1 */
  pld_dtype dtype;      /* PLD_F32, PLD_BF16, or PLD_I8: int8 with a float32 scale for each position and head */
  pld_kv_layout layout; /* absent in the first version of this struct: PLD_KV_BLOCK */
} pld_kv_params;
PLD_API pld_status pld_kv_params_init(pld_kv_params *params, size_t size);
/* Memory is reserved at once and touched on first use. */
PLD_API pld_status pld_kv_create(const pld_kv_params *params, pld_kv **out);
PLD_API void pld_kv_destroy(pld_kv *kv);
PLD_API int64_t pld_kv_bytes(const pld_kv_params *params); /* -1 when out of range */
/* Reads back one position as stored, widened to float32: k and v are [G, E]. cell = block * S + offset. For tests and
 * tools. */
PLD_API pld_status pld_kv_read(const pld_kv *kv, int32_t layer, int64_t cell, float *k, float *v);

/* ---- Batch: one step's work ----------------------------------------------------------------------------------------
 */

typedef struct pld_batch {
  size_t struct_size;
  int32_t n_tokens;           /* T >= 1 */
  int32_t n_seqs;             /* R >= 1 */
  int32_t n_logit_rows;       /* L >= 0 */
  int32_t block_table_width;  /* W */
  const int32_t *token_ids;   /* [T] */
  const int32_t *positions;   /* [T], ascending by 1 within a sequence */
  const int32_t *query_start; /* [R + 1], query_start[0] = 0, query_start[R] = T */
  const int32_t *seq_lens; /* [R]: computed tokens after this step, so the last query of r stands at seq_lens[r] - 1 */
  const int32_t *block_tables; /* [R, W], padded with -1 */
  /* [T]: the cell each token's K/V is written to; -1: not written, because a shared block holds it already */
  const int64_t *slot_mapping;
  const int32_t *logit_rows; /* [L], rows of the batch, any order */
} pld_batch;

/* ---- Sampling -------------------------------------------------------------------------------------------------------
 */

/* Logits are divided by the penalty: with this one those below 3.4e32 stay finite. */
#define PLD_MIN_REPETITION_PENALTY 1e-6f

/* How one row of logits becomes a token. The edits are applied in the order of the fields, to a private copy; then
 * temperature, top_k, top_p, min_p, and a draw by Philox4x32-10 keyed by seed, with the counter (position, choice). All
 * pointers may be null where their count is 0. Ids out of the vocabulary are passed over. */
typedef struct pld_sample_row {
  size_t struct_size;
  float repetition_penalty; /* 1: none; of the tokens seen; in [PLD_MIN_REPETITION_PENALTY, 10] */
  int32_t n_seen;
  const int32_t *seen_ids; /* each once */
  float frequency_penalty; /* 0: none; of the tokens counted; both in [-2, 2] */
  float presence_penalty;
  int32_t n_counted;
  int32_t n_biases;
  const int32_t *counted_ids; /* each once */
  const float *counts;
  const int32_t *bias_ids;
  const float *biases;
  int32_t n_banned;
  int32_t n_allowed; /* -1: all */
  const int32_t *banned_ids;
  const int32_t *allowed_ids;
  const uint32_t *mask; /* bit i % 32 of word i / 32: token i may come; null: all may */
  int32_t n_stops;      /* tokens that may not come while position < min_tokens */
  int32_t min_tokens;
  const int32_t *stop_ids;
  float temperature; /* 0: the lowest id of the greatest logit; at most 100; below 1e-30 that divides */
  int32_t top_k;     /* < 1: all */
  double top_p;      /* 1: all; in (0, 1] */
  float min_p;       /* 0: all; in [0, 1] */
  uint32_t choice;
  uint64_t seed;
  uint64_t position; /* of the token in the output */
  int64_t wants_log_sum_exp;
} pld_sample_row;

typedef int32_t pld_sample_status;
enum {
  PLD_SAMPLED = 0,
  PLD_SAMPLE_NOT_FINITE = 1, /* a logit is NaN, or the greatest is not finite */
  PLD_SAMPLE_NONE_LEFT = 2,  /* the edits leave no token */
  PLD_SAMPLE_OVERFLOW = 3    /* behind the edits a logit is NaN, or the greatest is infinite */
};

typedef struct pld_sample_result {
  int32_t token; /* -1 unless PLD_SAMPLED */
  pld_sample_status status;
  float max;         /* of the row as the model made it */
  float log_sum_exp; /* log(sum(exp(x - max))) of it, when asked for */
} pld_sample_result;

/* One token for each of `n_rows` rows of logits [V], `stride` floats apart. A row's result depends on that row alone.
 * On any status but PLD_OK nothing was written; a row that contradicts itself is named (PLD_ITEM_SAMPLE_ROW). */
typedef struct pld_sample_call {
  size_t struct_size;
  const float *logits; /* [n_rows, V] */
  int64_t stride;      /* in floats */
  int32_t vocab_size;  /* V */
  int32_t n_rows;
  const pld_sample_row *const *rows; /* [n_rows] */
  pld_sample_result *results;        /* [n_rows] */
  size_t result_size;                /* sizeof(pld_sample_result) */
} pld_sample_call;
PLD_API pld_status pld_sample_run(pld_context *context, const pld_sample_call *call);
/* The same, with results of the first version. */
PLD_API pld_status pld_sample(pld_context *context, const float *logits, int64_t stride, int32_t vocab_size,
                              const pld_sample_row *const *rows, int32_t n_rows, pld_sample_result *results);

/* ---- Ops and programs -----------------------------------------------------------------------------------------------
 */

/* All activations are float32 [rows, width], row-major with a row stride. An operand may be a column range of a wider
 * buffer. `linear` rounds its input to the weight's dtype (bf16 weights), multiplies, and accumulates in float32 over K
 * ascending in one accumulator per output element; so do all kernels at every row count. With quantised weights the
 * input is rounded to int8 in groups of 32 with scale max/127 (PLD_I8: one group a row), products are summed exactly
 * within a group, and groups ascending in float32. */
typedef int32_t pld_op_kind;
enum {
  /* out0[T,D] = W0[id]                                                       i0 = pld_ids                      */
  PLD_OP_EMBEDDING = 1,
  /* out0[T,N] = act(in0[T,K] W0[N,K]^T + W1[N]?)                              i0 = pld_act                     */
  PLD_OP_LINEAR = 2,
  /* s = in0 + in1? ; out1 = s if in1 ; out0 = s / rms(s) * (W0 + f1)          f0 eps, f1 weight offset, i0 groups: the
   * row is i0 groups of equal width, each normalised alone with the same W0[width / i0] */
  PLD_OP_RMS_NORM = 3,
  /* as above with mean and bias W1?; f0 eps                                                                    */
  PLD_OP_LAYER_NORM = 4,
  /* out0[T,E'] = [cos(p*w_j)*f0 .. , sin(p*w_j)*f0 ..], w = W0[E'/2] (float32), p = id; i0 = pld_ids            */
  PLD_OP_ROPE_TABLE = 5,
  /* out0 = rotate(in0[T, n*E]) by the table in1[T, E'], i0 = E head width; the first E' columns of each head rotate;
   * i1 = 0: halves (x_j with x_{j+E'/2}); i1 = 1: neighbours (x_2j with x_2j+1)                                */
  PLD_OP_ROTARY = 6,
  /* writes in1, in2 [T,G*E] to the cache, then out0[T,H*E] = softmax(f0 * q k^T (softcap f1 if > 0), causal, window i4
   * if > 0) v i0 layer, i1 H, i2 G, i3 E; a query at p sees positions max(0, p - i4 + 1) .. p */
  PLD_OP_ATTENTION = 7,
  /* out0[T,F] = act(in0[:, :F]) * in0[:, F:]                                 i0 = pld_act                     */
  PLD_OP_ACT_AND_MUL = 8,
  PLD_OP_ACT = 9,      /* out0 = act(in0), i0 = pld_act */
  PLD_OP_ADD = 10,     /* out0 = in0 + in1 */
  PLD_OP_SCALE = 11,   /* out0 = in0 * f0 */
  PLD_OP_SOFTCAP = 12, /* out0 = f0 * tanh(in0 / f0) */
  /* out0[T,D] = sum over the top i1 of i0 experts of w_e * down_e(act(gate_e x) * up_e x); in0 x[T,D], in1 router
   * logits [T,X], W0 [X*2F, D] gate then up per expert, W1 [X*D, F]; 2F and D multiples of 64; i2 act; i3 = 1: the
   * weights are renormalised over the chosen; softmax over all experts; ties to the lower expert; the sum runs in the
   * order of rank           */
  PLD_OP_MOE = 13,
  PLD_OP_GATHER_ROWS = 14, /* out0[L,D] = in0[logit_rows[l]] */
  /* out0[L,4] of in0[L,V]: argmax (lowest index of the greatest, as the float's int32 bits), max, log(sum(exp(x -
     max))), 0 */
  PLD_OP_SAMPLE = 15
};

/* What an embedding or a rope_table reads of the batch. By itself an embedding reads token ids, a rope_table positions.
 */
typedef int32_t pld_ids;
enum { PLD_IDS_OF_THE_OP = 0, PLD_IDS_TOKENS = 1, PLD_IDS_POSITIONS = 2 };

typedef int32_t pld_act;
enum { PLD_ACT_NONE = 0, PLD_ACT_SILU = 1, PLD_ACT_GELU = 2, PLD_ACT_GELU_TANH = 3, PLD_ACT_RELU = 4 };

#define PLD_MAX_IN 6
#define PLD_MAX_OUT 2
#define PLD_MAX_WEIGHTS 6

typedef struct pld_op {
  pld_op_kind kind;
  int32_t in[PLD_MAX_IN];     /* buffer, -1: absent */
  int32_t in_col[PLD_MAX_IN]; /* first column within the buffer */
  int32_t in_width[PLD_MAX_IN];
  int32_t out[PLD_MAX_OUT];     /* buffer, -1: absent */
  int32_t out_col[PLD_MAX_OUT]; /* first column that is written: several ops may fill one buffer */
  int32_t out_width[PLD_MAX_OUT];
  int32_t weight[PLD_MAX_WEIGHTS]; /* index of the weight table, -1: absent */
  int32_t i[6];
  float f[4];
} pld_op;

typedef int32_t pld_domain;
enum { PLD_ROWS_T = 0, PLD_ROWS_L = 1 };

typedef struct pld_buffer {
  int32_t width;
  pld_domain domain;
  int32_t slot; /* buffers of one domain whose lives do not meet share a slot */
  int32_t reserved;
} pld_buffer;

/* One op on the caller's memory: what eager modules and tests call. Strides are in floats. */
typedef struct pld_op_call {
  size_t struct_size;
  const pld_op *op; /* `in`, `out`, `weight` only say present (>= 0) or absent (-1); columns are 0 */
  size_t op_size;   /* sizeof(pld_op) */
  int64_t rows;
  const float *in[PLD_MAX_IN];
  int64_t in_stride[PLD_MAX_IN];
  float *out[PLD_MAX_OUT];
  int64_t out_stride[PLD_MAX_OUT];
  const pld_weight *weights; /* [PLD_MAX_WEIGHTS], of which those that are absent are not read */
  size_t weight_size;        /* sizeof(pld_weight) */
  const pld_batch *batch;    /* embedding, rope_table, attention, gather_rows; else null */
  pld_kv *kv;                /* attention; else null */
} pld_op_call;
PLD_API pld_status pld_op_run(pld_context *context, const pld_op_call *call);

typedef struct pld_program pld_program;
typedef struct pld_program_desc {
  size_t struct_size;
  int32_t n_ops; /* the first n_forward_ops make `hidden`; the rest make `logits` from it */
  int32_t n_forward_ops;
  int32_t n_buffers;
  int32_t n_weights;
  const pld_op *ops;
  const pld_buffer *buffers;
  const pld_weight *weights; /* the memory that they point to must outlive the program */
  int32_t hidden;            /* buffer [T, D] */
  int32_t logits;            /* buffer [L, V] */
  int32_t max_tokens;        /* rows of domain T that are allocated */
  int32_t max_logit_rows;    /* rows of domain L */
  int32_t vocab_size;        /* token ids are checked against it */
  int32_t reserved;          /* 0 */
  /* Absent in the first version of this struct: buffers [T, any] that keep what they hold beyond the run. */
  int32_t n_kept;
  const int32_t *kept;
  /* Buffers [T, any] that no op writes, but the caller before each run. */
  int32_t n_inputs;
  const int32_t *inputs;
  /* Bytes of an element: sizeof(pld_op) and so on. 0: those of the first versions. */
  size_t op_size;
  size_t buffer_size;
  size_t weight_size;
} pld_program_desc;
/* Checks every index, width and shape; copies the descriptor's arrays, not the weights. The context must outlive the
 * program. */
PLD_API pld_status pld_program_create(pld_context *context, const pld_program_desc *desc, pld_program **out);
PLD_API void pld_program_destroy(pld_program *program);
PLD_API int64_t pld_program_arena_bytes(const pld_program *program);
/* One step: forward for all T tokens, then logits for the L rows asked for (none: the second part is skipped). The
 * batch is checked first; on any status but PLD_OK the cache holds nothing new that a valid block table could see. No
 * allocation. */
PLD_API pld_status pld_program_run(pld_program *program, pld_kv *kv, const pld_batch *batch);
/* The second part alone, on rows of the hidden buffer that the last run left: for prompt logprobs in slices. */
PLD_API pld_status pld_program_logits(pld_program *program, const int32_t *rows, int32_t n_rows);
/* [T, D] and [L, V] of the last run; valid until the next. */
PLD_API const float *pld_program_hidden(const pld_program *program);
PLD_API const float *pld_program_logits_data(const pld_program *program);
/* A kept buffer of the last run, likewise; null when it is not among `kept`. */
PLD_API const float *pld_program_kept(const pld_program *program, int32_t buffer);
/* An input buffer, to be written before a run and never during one; null when it is not among `inputs`. */
PLD_API float *pld_program_input(pld_program *program, int32_t buffer);

/* ---- Model files ----------------------------------------------------------------------------------------------------
 */

/* A compiled model (`pellucid compile MODEL -o model.pld`): plan and packed weights, mapped. */
typedef struct pld_model pld_model;
typedef struct pld_model_params {
  size_t struct_size;
  int32_t max_tokens;     /* rows of a step */
  int32_t max_logit_rows; /* of which logits are kept */
} pld_model_params;
typedef struct pld_model_info {
  size_t struct_size;
  int32_t vocab_size;
  int32_t n_layers;
  int32_t n_kv_heads;
  int32_t head_dim;
  int32_t max_positions;
  pld_dtype kv_dtype; /* as the model was compiled */
  int32_t n_end_tokens;
  int32_t end_tokens[16];
} pld_model_info;
PLD_API pld_status pld_model_params_init(pld_model_params *params, size_t size);
/* Checks the file as it checks a program; PLD_INVALID_ARGUMENT says what is wrong with it. The context must outlive the
 * model. */
PLD_API pld_status pld_model_open(pld_context *context, const char *path, const pld_model_params *params,
                                  pld_model **out);
PLD_API void pld_model_close(pld_model *model); /* null is ignored */
PLD_API pld_status pld_model_info_get(const pld_model *model, pld_model_info *info);
PLD_API pld_program *pld_model_program(pld_model *model); /* lives as long as the model */

/* The file's own checksums: a CRC-32 for each block of 1 MiB, written with it. Opening does not read them. */
typedef struct pld_verify_params {
  size_t struct_size;
  int64_t bytes_per_second;     /* at most; 0: as fast as it goes */
  const volatile int32_t *stop; /* not 0 ends it; null: never */
  int32_t idle; /* not 0: on a thread that runs only while nobody else wants to (Linux); the caller sleeps meanwhile */
  int32_t reserved;
} pld_verify_params;
PLD_API pld_status pld_verify_params_init(pld_verify_params *params, size_t size);
/* Reads the whole file behind an open descriptor, which others may have mapped: the pages are the same. PLD_OK: all is
 * as it was written. PLD_ABORTED: it was stopped. PLD_INVALID_ARGUMENT: the file has no checksums, or `*bad_block` is
 * the number of the first block that is damaged or cannot be read (else -1); the checksums count as the block behind
 * the last.
 */
PLD_API pld_status pld_model_verify(int32_t file, const pld_verify_params *params, int64_t *bad_block);

/* ---- Decoding by sequence -------------------------------------------------------------------------------------------
 */

/* Tokens of any sequences, in any order. With a SLOT cache the core finds cells for them; with a BLOCK cache the caller
 * says where they lie. A token sees the cells of its sequence up to its own position, those of the batch included. */
typedef struct pld_decode_batch {
  size_t struct_size;
  int32_t n_tokens; /* T >= 1 */
  int32_t block_table_width;
  const int32_t *tokens;    /* [T] */
  const int32_t *positions; /* [T]; null: the next of each sequence. On SLOT any that the sequence does not hold */
  const int32_t *seq_ids;   /* [T], >= 0 */
  const int8_t *logits;     /* [T]: which rows are wanted; null: the last of the batch */
  /* BLOCK alone, a row for each token: */
  const int64_t *slot_mapping;   /* [T] */
  const int32_t *block_tables;   /* [T, W], padded with -1 */
  const int32_t *context_lens;   /* [T]: tokens of its sequence up to and with this one */
  const volatile int32_t *abort; /* not 0 stops: looked at before the step and about once a layer; null: never */
  /* SLOT alone: further sequences of token t, which hold its cell at the same position, are more_seq_ids[more_start[t]]
   * to more_seq_ids[more_start[t + 1] - 1]. The token itself sees the cells of seq_ids[t]. */
  const int32_t *more_start;   /* [T + 1], ascending from 0; null: there are none */
  const int32_t *more_seq_ids; /* [more_start[T]], >= 0 */
} pld_decode_batch;
/* PLD_OK; PLD_NO_SPACE, PLD_ABORTED, PLD_INVALID_BATCH: nothing has changed in the cache, no sequence was evicted.
 * Below that an internal failure, which changes nothing either. A step that was aborted on its way leaves no rows to
 * ask for; cells that it wrote hold again what they held, but for those of a SLOT cache that nobody holds.
 */
PLD_API pld_status pld_decode(pld_program *program, pld_kv *kv, const pld_decode_batch *batch);
/* Logits [V] of row `index` of the last decoded batch; null when none were asked for. Valid until the next. */
PLD_API const float *pld_logits_of(const pld_program *program, int32_t index);
/* Its hidden state [D]; null when there is no such row. */
PLD_API const float *pld_hidden_of(const pld_program *program, int32_t index);

/* Operations on the sequences of a SLOT cache; they wait for a decode of the same cache. Several sequences may share a
 * cell; a sequence has at most one cell for a position. Ranges of positions are half open; p0 < 0 means 0, p1 < 0 the
 * end; one without cells changes nothing. A BLOCK cache answers PLD_NOT_SUPPORTED; on any status but PLD_OK nothing has
 * changed. */
enum {
  PLD_INVALID_SEQ = -6, /* the sequence has no tokens */
  PLD_INVALID_POS = -7, /* the range ends before it begins, or positions would meet */
  PLD_EMPTY_RANGE = -8
};
/* `dst` gets the cells of `src` in the range; no data is copied. */
PLD_API pld_status pld_seq_cp(pld_kv *kv, int32_t dst, int32_t src, int32_t p0, int32_t p1);
PLD_API pld_status pld_seq_rm(pld_kv *kv, int32_t seq, int32_t p0, int32_t p1);
/* Positions of the range shift by `delta`, and keys are rotated accordingly, by the program's own rotary parameters,
 * and rounded to the cache's type once more. Cells that other sequences share are copied first: PLD_NO_SPACE when there
 * is none. PLD_NOT_SUPPORTED when the program changes keys behind their rotation. */
PLD_API pld_status pld_seq_add(pld_program *program, pld_kv *kv, int32_t seq, int32_t p0, int32_t p1, int32_t delta);
PLD_API pld_status pld_seq_keep(pld_kv *kv, int32_t seq);       /* all others go */
PLD_API int32_t pld_seq_pos_max(const pld_kv *kv, int32_t seq); /* -1: absent */
PLD_API int64_t pld_kv_free_cells(const pld_kv *kv);            /* of a SLOT cache; -1 otherwise */
typedef struct pld_kv_stats {
  size_t struct_size;
  int64_t capacity; /* cells */
  int64_t used;     /* cells that a sequence holds, shared ones once; of a BLOCK cache, which its caller fills: -1 */
  int64_t free;     /* -1 likewise */
  int64_t peak;     /* most that were used at once since the cache was made or reset; -1 likewise */
} pld_kv_stats;
PLD_API pld_status pld_kv_stats_get(const pld_kv *kv, pld_kv_stats *stats);
/* Forgets all sequences, on either layout: no cell of before is seen or shared again. */
PLD_API pld_status pld_kv_reset(pld_kv *kv);
/* Forgets a sequence, on either layout: all its cells; with a BLOCK cache, whose blocks are the caller's, its number.
 * One that was never decoded: PLD_INVALID_SEQ. */
PLD_API pld_status pld_request_free(pld_kv *kv, int32_t seq);

#ifdef __cplusplus
}
#endif
#endif
