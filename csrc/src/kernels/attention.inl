// Attention through the cache. One recipe for prefill and decode, so that a row's bits depend on nothing but its own
// sequence: a (query row, head) pair walks tiles of 64 absolute positions in ascending order with an online softmax
// (https://arxiv.org/abs/1805.02867), scores by multiply-adds over E ascending, values added position by position
// ascending. Which pairs share the loads of a tile is a matter of speed alone.
//
// K is read as "words" of 4 bytes, sixteen positions a vector: one float32, or a pair of bfloat16 (even, odd).
#include "../kv.hpp"
#include "attention_softmax.inl"

namespace pld {
namespace PLD_ISA_NS {

constexpr int kTileVectors = kTile / kLanes;
constexpr int kWriteRows = 16;          // tokens a task of stage 0 writes
constexpr int kMaxQueryRows = 16;       // query rows of a task of stage 1
constexpr int64_t kTasksPerThread = 8;  // enough to even out causal work
constexpr int64_t kMaxChunkPairs = 64;
constexpr int64_t kPrefetchPairs = 12;  // with more, computing takes longer than the next tile takes to arrive

// What a thread keeps while it works on a chunk of pairs of one sequence and one kv head.
struct AttentionScratch {
  float *scores;     // [pairs, kTile]: scores, then weights
  float *q;          // [pairs, E] floats, or E / 2 words
  float *acc;        // [pairs, width]
  Softmax *softmax;  // [pairs]
  char *gathered;    // [kTileVectors, words, 64]: K of groups that do not lie together
  int64_t max_pairs;
};

struct AttentionShape {
  int64_t e;      // E
  int64_t width;  // E rounded up to vectors
  int64_t words;  // K words of a position
  int64_t heads_per_group;
  int64_t n_kv_heads;
  float scale, softcap;
  int64_t window;
  bool bf16;
};

PLD_INLINE AttentionShape attention_shape(const OpArgs &args) {
  const pld_op &op = *args.op;
  AttentionShape s;
  s.e = op.i[3];
  s.width = (s.e + kLanes - 1) / kLanes * kLanes;
  s.bf16 = args.kv->dtype == PLD_BF16;
  s.words = s.bf16 ? s.e / 2 : s.e;
  s.n_kv_heads = op.i[2];
  s.heads_per_group = op.i[1] / op.i[2];
  s.scale = op.f[0];
  s.softcap = op.f[1];
  s.window = op.i[4];
  return s;
}

PLD_INLINE AttentionScratch attention_scratch(const AttentionShape &s, char *memory) {
  AttentionScratch scratch;
  scratch.gathered = memory;
  memory += kTileVectors * s.words * kWordGroupBytes;
  int64_t pair_bytes = 4 * (kTile + 2 * s.width) + (int64_t)sizeof(Softmax);
  int64_t room = (int64_t)kThreadScratchBytes - kTileVectors * s.words * kWordGroupBytes;
  int64_t n = room / pair_bytes;
  n = n < kMaxChunkPairs ? n : kMaxChunkPairs;
  scratch.max_pairs = n;
  scratch.scores = (float *)memory;
  scratch.q = scratch.scores + n * kTile;
  scratch.acc = scratch.q + n * s.width;
  scratch.softmax = (Softmax *)(scratch.acc + n * s.width);
  return scratch;
}

// ---- Stage 0: new keys and values ----------------------------------------------------------------------------------

// n values as cache words: two bfloat16 a word, or the float's own bits.
PLD_INLINE void to_cache(const float *x, int64_t n, bool bf16, void *target) {
  if (!bf16) {
    memcpy(target, x, (size_t)n * 4);
    return;
  }
  uint16_t *half = (uint16_t *)target;
  for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(x[i]);
}

static void write_kv(const OpArgs &args, int64_t first, int64_t last, uint32_t *row) {
  const AttentionShape s = attention_shape(args);
  pld_kv &kv = *args.kv;
  char *k_layer = (char *)kv.k + args.op->i[0] * kv.k_layer_bytes;
  char *v_layer = (char *)kv.v + args.op->i[0] * kv.v_layer_bytes;
  int64_t value_bytes = s.bf16 ? 2 : 4;
  for (int64_t t = first; t < last; ++t) {
    int64_t cell = args.batch->slot_mapping[t];
    if (cell < 0) continue;  // stands in a shared block already
    const float *k = args.in[1] + t * args.in_stride[1], *v = args.in[2] + t * args.in_stride[2];
    char *group = k_layer + cell / kLanes * s.n_kv_heads * s.words * kWordGroupBytes + cell % kLanes * 4;
    for (int64_t g = 0; g < s.n_kv_heads; ++g) {
      to_cache(k + g * s.e, s.e, s.bf16, row);
      for (int64_t w = 0; w < s.words; ++w, group += kWordGroupBytes) memcpy(group, row + w, 4);
    }
    to_cache(v, s.n_kv_heads * s.e, s.bf16, v_layer + cell * s.n_kv_heads * s.e * value_bytes);
  }
}

// ---- Stage 1: tiles ------------------------------------------------------------------------------------------------

// Where positions [begin, end) of one tile of one sequence and kv head lie.
struct TilePlace {
  int begin, end;
  const char *keys[kTileVectors];  // groups of sixteen positions; null: they do not lie together
  const char *values[kTile];       // [E] of each position
  int64_t cells[kTile];
};

// One layer's cache as one kv head sees it.
struct HeadCache {
  const char *k, *v;
  int64_t word_bytes;   // of a head in a K group
  int64_t group_bytes;  // of all heads in a K group
  int64_t value_bytes;  // of a head in a V cell
  int64_t cell_bytes;   // of all heads in a V cell
  int64_t block_size;
};

PLD_INLINE HeadCache head_cache(const OpArgs &args, const AttentionShape &s, int64_t g) {
  const pld_kv &kv = *args.kv;
  HeadCache c;
  c.word_bytes = s.words * kWordGroupBytes;
  c.group_bytes = s.n_kv_heads * c.word_bytes;
  c.value_bytes = s.e * (s.bf16 ? 2 : 4);
  c.cell_bytes = s.n_kv_heads * c.value_bytes;
  c.k = (const char *)kv.k + args.op->i[0] * kv.k_layer_bytes + g * c.word_bytes;
  c.v = (const char *)kv.v + args.op->i[0] * kv.v_layer_bytes + g * c.value_bytes;
  c.block_size = kv.block_size;
  return c;
}

// Finds positions [begin, end) (within the tile that starts at `start`) of a block table; nothing outside is looked at.
static void find_tile(const HeadCache &cache, const int32_t *table, int64_t start, int begin, int end,
                      TilePlace &place) {
  place.begin = begin;
  place.end = end;
  int64_t block = (start + begin) / cache.block_size, offset = (start + begin) % cache.block_size;
  for (int p = begin; p < end; ++block, offset = 0) {
    int64_t cell = (int64_t)table[block] * cache.block_size + offset;
    int64_t left = cache.block_size - offset;
    int last = left < end - p ? p + (int)left : end;
    for (; p < last; ++p, ++cell) {
      place.cells[p] = cell;
      place.values[p] = cache.v + cell * cache.cell_bytes;
    }
  }
  for (int v = begin / kLanes; v < (end + kLanes - 1) / kLanes; ++v) {
    int first = begin > v * kLanes ? begin : v * kLanes;
    int last = end < (v + 1) * kLanes ? end : (v + 1) * kLanes;
    bool together = place.cells[first] % kLanes == first % kLanes;
    if (cache.block_size % kLanes != 0)
      for (int p = first + 1; p < last; ++p) together = together && place.cells[p] == place.cells[p - 1] + 1;
    place.keys[v] = together ? cache.k + place.cells[first] / kLanes * cache.group_bytes : nullptr;
  }
}

// Brings keys that do not lie together into one group of scratch, lane by lane.
static void gather_keys(const HeadCache &cache, char *gathered, TilePlace &place) {
  for (int v = place.begin / kLanes; v < (place.end + kLanes - 1) / kLanes; ++v) {
    if (place.keys[v] != nullptr) continue;
    char *target = gathered + v * cache.word_bytes;
    int first = place.begin > v * kLanes ? place.begin : v * kLanes;
    int last = place.end < (v + 1) * kLanes ? place.end : (v + 1) * kLanes;
    for (int p = first; p < last; ++p) {
      const char *from = cache.k + place.cells[p] / kLanes * cache.group_bytes + place.cells[p] % kLanes * 4;
      for (int64_t w = 0; w < cache.word_bytes; w += kWordGroupBytes) memcpy(target + w + p % kLanes * 4, from + w, 4);
    }
    place.keys[v] = target;
  }
}

// Asks for what a later tile will read. A few pairs take less time than their tile takes to arrive.
PLD_INLINE void prefetch_keys(const HeadCache &cache, const TilePlace &place) {
  for (int v = place.begin / kLanes; v < (place.end + kLanes - 1) / kLanes; ++v)
    for (int64_t b = 0; place.keys[v] != nullptr && b < cache.word_bytes; b += 64)
      __builtin_prefetch(place.keys[v] + b);
}
PLD_INLINE void prefetch_values(const HeadCache &cache, const TilePlace &place) {
  for (int p = place.begin; p < place.end; ++p)
    for (int64_t b = 0; b < cache.value_bytes; b += 64) __builtin_prefetch(place.values[p] + b);
}

// Query rows of one sequence: row i stands at position first_position + i and is row first_token + i of the batch.
struct QuerySpan {
  int64_t seq, first_token, first_position;
  int64_t begin(const AttentionShape &s, int64_t row) const {
    int64_t p = first_position + row - s.window + 1;
    return s.window > 0 && p > 0 ? p : 0;
  }
  int64_t end(int64_t row) const { return first_position + row + 1; }
};

// One tile for n pairs (n <= kMaxPairs), the first of which is pair `pair` of the span and index `i` of the scratch.
// `next`: the tile to ask for meanwhile, or null.
static void attend_pairs(const AttentionShape &s, const QuerySpan &span, const AttentionScratch &scratch,
                         const HeadCache &cache, const TilePlace &place, const TilePlace *next, int64_t start,
                         int64_t pair, int64_t i, int n) {
  int begin[kMaxPairs], end[kMaxPairs];
  int low = kTile, high = 0, shared_begin = 0, shared_end = kTile;
  for (int j = 0; j < n; ++j) {
    int64_t row = (pair + j) / s.heads_per_group, b = span.begin(s, row) - start, e = span.end(row) - start;
    begin[j] = b < 0 ? 0 : (int)b;
    end[j] = e > kTile ? kTile : (int)e;
    low = begin[j] < low ? begin[j] : low;
    high = end[j] > high ? end[j] : high;
    shared_begin = begin[j] > shared_begin ? begin[j] : shared_begin;
    shared_end = end[j] < shared_end ? end[j] : shared_end;
  }
  float *scores = scratch.scores + i * kTile, *acc = scratch.acc + i * s.width;
  if (next != nullptr) prefetch_keys(cache, *next);
  score_tile(s.bf16, n, scratch.q + i * s.width, s.width, place.keys, s.words, low, high, scores);
  if (next != nullptr) prefetch_values(cache, *next);
  for (int j = 0; j < n; ++j)
    soften(s.scale, s.softcap, scores + j * kTile, begin[j], end[j], scratch.softmax[i + j], acc + j * s.width,
           s.width);
  if (shared_begin > shared_end) shared_begin = shared_end = kTile;  // nothing in common: each pair alone
  for (int j = 0; j < n; ++j)
    add_values(s.bf16, 1, scores + j * kTile, place.values, begin[j], end[j] < shared_begin ? end[j] : shared_begin,
               s.e, acc + j * s.width, s.width);
  add_values(s.bf16, n, scores, place.values, shared_begin, shared_end, s.e, acc, s.width);
  for (int j = 0; j < n; ++j)
    add_values(s.bf16, 1, scores + j * kTile, place.values, shared_end, end[j], s.e, acc + j * s.width, s.width);
}

// Queries as the score kernels read them: rounded to the cache's dtype.
PLD_INLINE void load_query(const AttentionShape &s, const float *x, float *q) {
#if defined(__AVX512BF16__)
  to_cache(x, s.e, s.bf16, q);
#else
  for (int64_t e = 0; e < s.e; ++e) q[e] = s.bf16 ? from_bf16(to_bf16(x[e])) : x[e];
#endif
}

// Pairs [first, last) of a span: as many as the scratch holds.
struct Chunk {
  QuerySpan span;
  int64_t first, last;
};

// The pairs [a, b) of a chunk that see anything of the tile that starts at `start`; and where that lies.
struct ChunkTile {
  int64_t start, a, b;
  TilePlace place;
};

PLD_INLINE int64_t first_tile(const AttentionShape &s, const Chunk &chunk) {
  return chunk.span.begin(s, chunk.first / s.heads_per_group) / kTile * kTile;
}
PLD_INLINE int64_t end_of_chunk(const AttentionShape &s, const Chunk &chunk) {
  return chunk.span.end((chunk.last - 1) / s.heads_per_group);
}

static void place_tile(const OpArgs &args, const AttentionShape &s, const HeadCache &cache, const Chunk &chunk,
                       int64_t start, ChunkTile &tile) {
  const QuerySpan &span = chunk.span;
  int64_t n = s.heads_per_group, first_row = chunk.first / n, last_row = (chunk.last - 1) / n;
  int64_t row_a = start - span.first_position;  // the first row that reaches this tile
  row_a = row_a > first_row ? row_a : first_row;
  int64_t row_b = last_row;  // the last row whose window has not left it
  while (span.begin(s, row_b) >= start + kTile) --row_b;
  int64_t low = span.begin(s, row_a) - start, high = span.end(row_b) - start;
  tile.start = start;
  tile.a = row_a * n > chunk.first ? row_a * n : chunk.first;
  tile.b = (row_b + 1) * n < chunk.last ? (row_b + 1) * n : chunk.last;
  find_tile(cache, args.batch->block_tables + span.seq * args.batch->block_table_width, start, low < 0 ? 0 : (int)low,
            high > kTile ? kTile : (int)high, tile.place);
}

static void begin_chunk(const OpArgs &args, const AttentionShape &s, const Chunk &chunk, int64_t g,
                        const AttentionScratch &scratch) {
  int64_t n = s.heads_per_group;
  for (int64_t pair = chunk.first; pair < chunk.last; ++pair) {
    int64_t i = pair - chunk.first, head = g * n + pair % n;
    load_query(s, args.in[0] + (chunk.span.first_token + pair / n) * args.in_stride[0] + head * s.e,
               scratch.q + i * s.width);
    memset(scratch.acc + i * s.width, 0, (size_t)s.width * sizeof(float));
    scratch.softmax[i] = {Native{}, -__builtin_inff()};
  }
}

static void finish_chunk(const OpArgs &args, const AttentionShape &s, const Chunk &chunk, int64_t g,
                         const AttentionScratch &scratch) {
  int64_t n = s.heads_per_group;
  for (int64_t pair = chunk.first; pair < chunk.last; ++pair) {
    int64_t i = pair - chunk.first, head = g * n + pair % n;
    float *out = args.out[0] + (chunk.span.first_token + pair / n) * args.out_stride[0] + head * s.e;
    const Native sum = native_splat(lanes_sum(scratch.softmax[i].sum));
    for (int64_t e = 0; e < s.e; e += kNativeLanes) {
      const Native y = native_load(scratch.acc + i * s.width + e) / sum;
      memcpy(out + e, &y, (size_t)(s.e - e < kNativeLanes ? s.e - e : kNativeLanes) * sizeof(float));
    }
  }
}

// One chunk. `tiles` are two; the first is placed already, and is left so for `following` (null: none).
static void attend_chunk(const OpArgs &args, const AttentionShape &s, const HeadCache &cache, const Chunk &chunk,
                         const Chunk *following, int64_t g, const AttentionScratch &scratch, ChunkTile *&tile,
                         ChunkTile *&next) {
  begin_chunk(args, s, chunk, g, scratch);
  for (int64_t end = end_of_chunk(s, chunk), more = true; more;) {
    more = tile->start + kTile < end;
    if (more)
      place_tile(args, s, cache, chunk, tile->start + kTile, *next);
    else if (following != nullptr)
      place_tile(args, s, cache, *following, first_tile(s, *following), *next);
    const TilePlace *wanted =
        (more || following != nullptr) && tile->b - tile->a <= kPrefetchPairs ? &next->place : nullptr;
    gather_keys(cache, scratch.gathered, tile->place);
    int64_t n_blocks = (tile->b - tile->a + kMaxPairs - 1) / kMaxPairs;
    int64_t size = (tile->b - tile->a + n_blocks - 1) / n_blocks;
    for (int64_t pair = tile->a; pair < tile->b; pair += size) {
      attend_pairs(s, chunk.span, scratch, cache, tile->place, wanted, tile->start, pair, pair - chunk.first,
                   (int)(tile->b - pair < size ? tile->b - pair : size));
      wanted = nullptr;
    }
    ChunkTile *done = tile;
    tile = next;
    next = done;
  }
  finish_chunk(args, s, chunk, g, scratch);
}

// ---- Stages --------------------------------------------------------------------------------------------------------

PLD_INLINE int64_t query_rows_of_task(const OpArgs &args, int n_threads) {
  int64_t rows = args.rows * args.op->i[2] / (n_threads * kTasksPerThread);
  return rows < 1 ? 1 : rows > kMaxQueryRows ? kMaxQueryRows : rows;
}

static int64_t attention_tasks(const OpArgs &args, int stage, int n_threads) {
  if (stage == 0) return (args.rows + kWriteRows - 1) / kWriteRows;
  int64_t rows = query_rows_of_task(args, n_threads);
  return (args.rows + rows - 1) / rows * args.op->i[2];
}

// The chunks of tokens [token, last_token), in order.
struct ChunkWalk {
  const pld_batch &batch;
  int64_t heads_per_group, max_pairs;
  int64_t token, last_token, seq, pair;

  // The last sequence that starts at or before the first token is where it begins.
  void start() {
    seq = 0;
    pair = 0;
    for (int64_t beyond = batch.n_seqs; beyond - seq > 1;) {
      int64_t middle = (seq + beyond) / 2;
      if (batch.query_start[middle] <= token)
        seq = middle;
      else
        beyond = middle;
    }
  }
  bool step(Chunk &chunk) {
    while (token < last_token) {
      int64_t end = batch.query_start[seq + 1] < last_token ? batch.query_start[seq + 1] : last_token;
      int64_t n_pairs = (end - token) * heads_per_group;
      if (pair >= n_pairs) {
        token = end > token ? end : token;
        ++seq;
        pair = 0;
        continue;
      }
      chunk.span = {seq, token, (int64_t)batch.seq_lens[seq] - (batch.query_start[seq + 1] - token)};
      chunk.first = pair;
      chunk.last = pair + max_pairs < n_pairs ? pair + max_pairs : n_pairs;
      pair = chunk.last;
      return true;
    }
    return false;
  }
};

// The last tokens first: in a prompt they have the most to do.
static void attend(const OpArgs &args, int64_t task, int n_threads, char *memory) {
  const AttentionShape s = attention_shape(args);
  const AttentionScratch scratch = attention_scratch(s, memory);
  int64_t rows = query_rows_of_task(args, n_threads), n_blocks = (args.rows + rows - 1) / rows;
  int64_t g = task % s.n_kv_heads, token = (n_blocks - 1 - task / s.n_kv_heads) * rows;
  int64_t last_token = token + rows < args.rows ? token + rows : args.rows;
  const HeadCache cache = head_cache(args, s, g);
  ChunkWalk walk{*args.batch, s.heads_per_group, scratch.max_pairs, token, last_token, 0, 0};
  walk.start();
  Chunk chunks[2];
  ChunkTile tiles[2];
  ChunkTile *tile = &tiles[0], *next = &tiles[1];
  bool more = walk.step(chunks[0]);
  if (more) place_tile(args, s, cache, chunks[0], first_tile(s, chunks[0]), *tile);
  for (int i = 0; more; i ^= 1) {
    more = walk.step(chunks[i ^ 1]);
    attend_chunk(args, s, cache, chunks[i], more ? &chunks[i ^ 1] : nullptr, g, scratch, tile, next);
  }
}

static void run_attention(const OpArgs &args, int stage, int64_t task, int n_threads, std::byte *thread_scratch) {
  if (stage == 0) {
    int64_t first = task * kWriteRows, last = first + kWriteRows;
    write_kv(args, first, last < args.rows ? last : args.rows, (uint32_t *)thread_scratch);
  } else {
    attend(args, task, n_threads, (char *)thread_scratch);
  }
}

static const Kernel attention_kernel = {2, attention_tasks, run_attention, nullptr, nullptr, nullptr};

}  // namespace PLD_ISA_NS
}  // namespace pld
