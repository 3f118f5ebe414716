/* Pellucid: the C ABI of the native core. C99, no torch, no globals, nothing throws across it.
 *
 * Manners. Handles are opaque. Every params struct begins with its own size, so that a caller built against an older
 * header keeps working. Lengths stand beside pointers. Functions return a pld_status; what a status other than PLD_OK
 * means for the state is said at each function, and its text is pld_last_error() on the calling thread.
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
PLD_API int32_t pld_abi_version(void);

/* ---- Context: a thread pool and the kernels of one instruction set ---------------------------------------------- */

typedef int32_t pld_isa;
enum { PLD_ISA_AUTO = 0, PLD_ISA_PORTABLE = 1, PLD_ISA_AVX2 = 2, PLD_ISA_AVX512 = 3 }; /* AVX512: F, BW, VL, DQ, BF16, VNNI */

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
} pld_context_params;
PLD_API pld_context_params pld_context_default_params(void);
PLD_API pld_status pld_context_create(const pld_context_params *params, pld_context **out);
PLD_API void pld_context_destroy(pld_context *context); /* null is ignored */
PLD_API int32_t pld_context_num_threads(const pld_context *context);
PLD_API pld_isa pld_context_isa(const pld_context *context);

/* ---- Weights ------------------------------------------------------------------------------------------------------ */

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
  PLD_Q6_K = 10
};

typedef int32_t pld_layout;
enum {
  PLD_ROW_MAJOR = 0, /* [N, K], F32 or BF16: norm weights, biases, tables */
  PLD_PANELS = 1     /* [ceil(N/64)][ceil(K/pair)][64][pair], pair 1 for F32 and 2 for BF16, zero padded: matrices */
};

typedef struct pld_weight {
  const void *data; /* 64-byte aligned for PLD_PANELS */
  int64_t rows;     /* N; 1 for vectors */
  int64_t cols;     /* K */
  pld_dtype dtype;  /* PLD_F32 or PLD_BF16 */
  pld_layout layout;
} pld_weight;

/* Bytes of one row of `cols` values stored as `dtype`; 0 when cols is negative or no multiple of the dtype's block. */
PLD_API int64_t pld_row_bytes(pld_dtype dtype, int64_t cols);
/* Bytes of a packed [rows, cols] weight; 0 when the arguments are out of range. */
PLD_API int64_t pld_packed_bytes(int64_t rows, int64_t cols, pld_dtype dtype);

/* Converts rows [0, rows) of `src` (row-major, any storage type) to row-major `dst_dtype` (F32 or BF16, rounded to nearest even). */
PLD_API pld_status pld_convert(pld_context *context, const void *src, int64_t src_bytes, pld_dtype src_dtype, int64_t rows,
                               int64_t cols, void *dst, int64_t dst_bytes, pld_dtype dst_dtype);
/* The same into rows [row_offset, row_offset + rows) of a PLD_PANELS weight [dst_rows, cols]; the padding of `dst` must have
 * been zeroed by the caller beforehand. Several calls fill one fused matrix. */
PLD_API pld_status pld_pack(pld_context *context, const void *src, int64_t src_bytes, pld_dtype src_dtype, int64_t rows, int64_t cols,
                            int64_t row_offset, int64_t dst_rows, void *dst, int64_t dst_bytes, pld_dtype dst_dtype);

/* ---- KV cache ------------------------------------------------------------------------------------------------------ */

typedef struct pld_kv pld_kv;
typedef struct pld_kv_params {
  size_t struct_size;
  int32_t n_layers;
  int32_t n_kv_heads; /* G */
  int32_t head_dim;   /* E, even */
  int32_t block_size; /* S >= 1 */
  int32_t n_blocks;   /* B >= 1 */
  pld_dtype dtype;    /* PLD_F32 or PLD_BF16 */
} pld_kv_params;
PLD_API pld_kv_params pld_kv_default_params(void);
/* Memory is reserved at once and touched on first use. */
PLD_API pld_status pld_kv_create(const pld_kv_params *params, pld_kv **out);
PLD_API void pld_kv_destroy(pld_kv *kv);
PLD_API int64_t pld_kv_bytes(const pld_kv_params *params); /* -1 when out of range */
/* Reads back one position as stored, widened to float32: k and v are [G, E]. cell = block * S + offset. For tests and tools. */
PLD_API pld_status pld_kv_read(const pld_kv *kv, int32_t layer, int64_t cell, float *k, float *v);

/* ---- Batch: one step's work ---------------------------------------------------------------------------------------- */

typedef struct pld_batch {
  size_t struct_size;
  int32_t n_tokens;           /* T >= 1 */
  int32_t n_seqs;             /* R >= 1 */
  int32_t n_logit_rows;       /* L >= 0 */
  int32_t block_table_width;  /* W */
  const int32_t *token_ids;   /* [T] */
  const int32_t *positions;   /* [T], ascending by 1 within a sequence */
  const int32_t *query_start; /* [R + 1], query_start[0] = 0, query_start[R] = T */
  const int32_t *seq_lens;    /* [R]: computed tokens after this step, so the last query of r stands at seq_lens[r] - 1 */
  const int32_t *block_tables; /* [R, W], padded with -1 */
  const int64_t *slot_mapping; /* [T]: the cell each token's K/V is written to */
  const int32_t *logit_rows;   /* [L], rows of the batch, any order */
} pld_batch;

/* ---- Ops and programs ----------------------------------------------------------------------------------------------- */

/* All activations are float32 [rows, width], row-major with a row stride. An operand may be a column range of a wider buffer.
 * `linear` rounds its input to the weight's dtype (bf16 weights), multiplies, and accumulates in float32 over K ascending in
 * one accumulator per output element; so do all kernels at every row count. */
typedef int32_t pld_op_kind;
enum {
  /* out0[T,D] = W0[id]                                                       i: -                             */
  PLD_OP_EMBEDDING = 1,
  /* out0[T,N] = act(in0[T,K] W0[N,K]^T + W1[N]?)                              i0 = pld_act                     */
  PLD_OP_LINEAR = 2,
  /* s = in0 + in1? ; out1 = s if in1 ; out0 = s / rms(s) * (W0 + f1)          f0 eps, f1 weight offset, i0 groups: the row is
   * i0 groups of equal width, each normalised alone with the same W0[width / i0]                               */
  PLD_OP_RMS_NORM = 3,
  /* as above with mean and bias W1?; f0 eps                                                                    */
  PLD_OP_LAYER_NORM = 4,
  /* out0[T,E'] = [cos(p*w_j)*f0 .. , sin(p*w_j)*f0 ..], w = W0[E'/2] (float32), p = position                    */
  PLD_OP_ROPE_TABLE = 5,
  /* out0 = rotate(in0[T, n*E]) by the table in1[T, E'], i0 = E head width; the first E' columns of each head rotate;
   * i1 = 0: halves (x_j with x_{j+E'/2}); i1 = 1: neighbours (x_2j with x_2j+1)                                */
  PLD_OP_ROTARY = 6,
  /* writes in1, in2 [T,G*E] to the cache, then out0[T,H*E] = softmax(f0 * q k^T (softcap f1 if > 0), causal, window i4 if > 0) v
   * i0 layer, i1 H, i2 G, i3 E; a query at p sees positions max(0, p - i4 + 1) .. p                             */
  PLD_OP_ATTENTION = 7,
  /* out0[T,F] = act(in0[:, :F]) * in0[:, F:]                                 i0 = pld_act                     */
  PLD_OP_ACT_AND_MUL = 8,
  PLD_OP_ACT = 9,      /* out0 = act(in0), i0 = pld_act */
  PLD_OP_ADD = 10,     /* out0 = in0 + in1 */
  PLD_OP_SCALE = 11,   /* out0 = in0 * f0 */
  PLD_OP_SOFTCAP = 12, /* out0 = f0 * tanh(in0 / f0) */
  /* out0[T,D] = sum over the top i1 of i0 experts of w_e * down_e(act(gate_e x) * up_e x); in0 x[T,D], in1 router logits [T,X],
   * W0 [X*2F, D] gate then up per expert, W1 [X*D, F]; 2F and D multiples of 64; i2 act; i3 = 1: the weights are renormalised over
   * the chosen; softmax over all experts; ties to the lower expert; the sum runs in the order of rank           */
  PLD_OP_MOE = 13,
  PLD_OP_GATHER_ROWS = 14, /* out0[L,D] = in0[logit_rows[l]] */
  /* out0[L,4] of in0[L,V]: argmax (lowest index of the greatest, as the float's int32 bits), max, log(sum(exp(x - max))), 0 */
  PLD_OP_SAMPLE = 15
};

typedef int32_t pld_act;
enum { PLD_ACT_NONE = 0, PLD_ACT_SILU = 1, PLD_ACT_GELU = 2, PLD_ACT_GELU_TANH = 3, PLD_ACT_RELU = 4 };

#define PLD_MAX_IN 3
#define PLD_MAX_OUT 2
#define PLD_MAX_WEIGHTS 2

typedef struct pld_op {
  pld_op_kind kind;
  int32_t in[PLD_MAX_IN];          /* buffer, -1: absent */
  int32_t in_col[PLD_MAX_IN];      /* first column within the buffer */
  int32_t in_width[PLD_MAX_IN];
  int32_t out[PLD_MAX_OUT];        /* buffer, written from column 0, -1: absent */
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
  int64_t rows;
  const float *in[PLD_MAX_IN];
  int64_t in_stride[PLD_MAX_IN];
  float *out[PLD_MAX_OUT];
  int64_t out_stride[PLD_MAX_OUT];
  pld_weight weight[PLD_MAX_WEIGHTS];
  const pld_batch *batch; /* embedding, rope_table, attention, gather_rows; else null */
  pld_kv *kv;             /* attention; else null */
} pld_op_call;
PLD_API pld_status pld_op_run(pld_context *context, const pld_op_call *call);

typedef struct pld_program pld_program;
typedef struct pld_program_desc {
  size_t struct_size;
  int32_t n_ops;         /* the first n_forward_ops make `hidden`; the rest make `logits` from it */
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
} pld_program_desc;
/* Checks every index, width and shape; copies the descriptor's arrays, not the weights. The context must outlive the program. */
PLD_API pld_status pld_program_create(pld_context *context, const pld_program_desc *desc, pld_program **out);
PLD_API void pld_program_destroy(pld_program *program);
PLD_API int64_t pld_program_arena_bytes(const pld_program *program);
/* One step: forward for all T tokens, then logits for the L rows asked for (none: the second part is skipped). The batch is checked
 * first; on any status but PLD_OK the cache holds nothing new that a valid block table could see. No allocation. */
PLD_API pld_status pld_program_run(pld_program *program, pld_kv *kv, const pld_batch *batch);
/* The second part alone, on rows of the hidden buffer that the last run left: for prompt logprobs in slices. */
PLD_API pld_status pld_program_logits(pld_program *program, const int32_t *rows, int32_t n_rows);
/* [T, D] and [L, V] of the last run; valid until the next. */
PLD_API const float *pld_program_hidden(const pld_program *program);
PLD_API const float *pld_program_logits_data(const pld_program *program);

#ifdef __cplusplus
}
#endif
#endif
