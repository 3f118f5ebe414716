// Attention through the cache. One recipe for prefill and decode, so that a row's bits depend on nothing but its own
// sequence: a (query row, head) pair walks tiles of 64 absolute positions in ascending order with an online softmax
// (https://arxiv.org/abs/1805.02867), scores by multiply-adds over E ascending, values added position by position
// ascending. After each span of 1,024 positions the softmax begins anew, and spans are merged in ascending order. Which
// pairs share the loads of a tile, and whether one thread or several walk the spans, is a matter of speed alone.
//
// With a bfloat16 cache queries and weights are rounded to bfloat16 and products are taken by pairs. An int8 cache is
// widened to bfloat16, exactly, tile by tile, and its scales multiply the scores and the weights.
//
// Denormals are flushed throughout, because the machine's products of pairs flush them: so a weight of 0 changes
// nothing, whatever stands in the accumulator.
#include "attention_softmax.inl"
#include "attention_write.inl"

namespace pld {
namespace PLD_ISA_NS {

constexpr int kSpan = 1024;             // positions between merges
constexpr int64_t kMaxSplitRows = 64;   // query rows of a step whose spans are tasks
constexpr int64_t kMaxParts = 1024;     // and their spans, all rows together
constexpr int kMaxQueryRows = 16;       // query rows of a task of stage 1
constexpr int64_t kTasksPerThread = 8;  // enough to even out causal work
constexpr int64_t kMaxChunkPairs = 64;
constexpr int64_t kPrefetchPairs = 12;  // with more, computing takes longer than the next tile takes to arrive

// What a thread keeps while it works on a chunk of pairs of one sequence and one kv head.
struct AttentionScratch {
  float *scores;      // [pairs, kTile]
  uint32_t *weights;  // [pairs, kTile] floats, or kTile / 2 words
  uint32_t *q;        // [pairs, width] words
  float *acc;         // [pairs, width] of the span
  float *total;       // [pairs, width] of the spans before
  Softmax *softmax;   // [pairs]
  Softmax *totals;    // [pairs]
  char *gathered;     // [kTileGroups] units that do not lie together
  char *widened;      // [kTileGroups] units of bfloat16, from int8
  int64_t max_pairs;
};

PLD_INLINE AttentionScratch attention_scratch(const AttentionShape &s, const pld_kv &kv, char *memory) {
  AttentionScratch scratch;
  const int64_t widened = kLanes * (s.e + s.width) * 2;
  scratch.gathered = memory;
  scratch.widened = memory + kTileGroups * kv.unit_bytes;
  memory = scratch.widened + kTileGroups * (widened + 64) / 64 * 64;
  const int64_t pair_bytes = 4 * (2 * kTile + 3 * s.width) + 2 * (int64_t)sizeof(Softmax);
  int64_t n = ((int64_t)kThreadScratchBytes - (memory - scratch.gathered)) / pair_bytes;
  n = n < kMaxChunkPairs ? n : kMaxChunkPairs;
  scratch.max_pairs = n;
  scratch.softmax = (Softmax *)memory;
  scratch.totals = scratch.softmax + n;
  scratch.scores = (float *)(scratch.totals + n);
  scratch.weights = (uint32_t *)(scratch.scores + n * kTile);
  scratch.q = scratch.weights + n * kTile;
  scratch.acc = (float *)(scratch.q + n * s.width);
  scratch.total = scratch.acc + n * s.width;
  return scratch;
}

// ---- Stage 1: tiles ------------------------------------------------------------------------------------------------

// Where positions [begin, end) of one tile of one sequence and kv head lie: the units of its groups. A group whose
// positions do not lie together is null until it is gathered.
struct TilePlace {
  int begin, end;
  const char *units[kTileGroups];
};

// One layer's cache as one kv head sees it.
struct HeadCache {
  const char *data;
  int64_t group_bytes;  // from group to group
  int64_t block_size;
};

PLD_INLINE HeadCache head_cache(const OpArgs &args, const AttentionShape &s, int64_t g) {
  const pld_kv &kv = *args.kv;
  return {(const char *)kv.data + args.op->i[0] * kv.layer_bytes + g * kv.unit_bytes, s.n_kv_heads * kv.unit_bytes,
          kv.block_size};
}

PLD_INLINE int64_t cell_of(const HeadCache &cache, const int32_t *table, int64_t position) {
  return (int64_t)table[position / cache.block_size] * cache.block_size + position % cache.block_size;
}

// Finds positions [begin, end) (within the tile that starts at `start`) of a block table; nothing outside is looked at.
static void find_tile(const HeadCache &cache, const int32_t *table, int64_t start, int begin, int end,
                      TilePlace &place) {
  place.begin = begin;
  place.end = end;
  for (int v = begin / kLanes; v < (end + kLanes - 1) / kLanes; ++v) {
    const int first = begin > v * kLanes ? begin : v * kLanes, last = end < (v + 1) * kLanes ? end : (v + 1) * kLanes;
    const int64_t cell = cell_of(cache, table, start + first);
    bool together = cell % kLanes == first % kLanes;
    if (cache.block_size % kLanes != 0)
      for (int p = first + 1; p < last && together; ++p)
        together = cell_of(cache, table, start + p) == cell + p - first;
    place.units[v] = together ? cache.data + cell / kLanes * cache.group_bytes : nullptr;
  }
}

// One position of a unit to another lane of another unit.
static void copy_position(const AttentionShape &s, const pld_kv &kv, const char *from, int64_t from_lane, char *to,
                          int64_t to_lane) {
  const int64_t word = kv.dtype == PLD_I8 ? 2 : 4, per_word = word / kv.value_bytes;
  for (int64_t w = 0; w < s.words; ++w)
    memcpy(to + (w * kLanes + to_lane) * word, from + (w * kLanes + from_lane) * word, (size_t)word);
  const char *v_from =
      from + kv.v_offset + (from_lane / per_word * kv.value_width * per_word + from_lane % per_word) * kv.value_bytes;
  char *v_to =
      to + kv.v_offset + (to_lane / per_word * kv.value_width * per_word + to_lane % per_word) * kv.value_bytes;
  const int64_t step = per_word * kv.value_bytes;
  for (int64_t e = 0; e < kv.value_width; ++e) memcpy(v_to + e * step, v_from + e * step, (size_t)kv.value_bytes);
  for (int part = 0; part < 2 && kv.dtype == PLD_I8; ++part)
    memcpy(to + kv.scale_offset + (part * kLanes + to_lane) * 4,
           from + kv.scale_offset + (part * kLanes + from_lane) * 4, 4);
}

// Brings positions that do not lie together into units of scratch.
static void gather_units(const AttentionShape &s, const pld_kv &kv, const HeadCache &cache, const int32_t *table,
                         int64_t start, char *gathered, TilePlace &place) {
  for (int v = place.begin / kLanes; v < (place.end + kLanes - 1) / kLanes; ++v) {
    if (place.units[v] != nullptr) continue;
    char *target = gathered + v * kv.unit_bytes;
    const int first = place.begin > v * kLanes ? place.begin : v * kLanes;
    const int last = place.end < (v + 1) * kLanes ? place.end : (v + 1) * kLanes;
    for (int p = first; p < last; ++p) {
      const int64_t cell = cell_of(cache, table, start + p);
      copy_position(s, kv, cache.data + cell / kLanes * cache.group_bytes, cell % kLanes, target, p % kLanes);
    }
    place.units[v] = target;
  }
}

// int8 to bfloat16, which holds every int8 exactly. n is a multiple of 32.
PLD_INLINE void widen_int8(const char *from, int64_t n, char *to) {
#if defined(__AVX512BF16__)
  for (int64_t i = 0; i < n; i += 32) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + i))));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(from + i + 16))));
    const __m512bh both = _mm512_cvtne2ps_pbh(high, low);
    memcpy(to + i * 2, &both, sizeof both);
  }
#else
  for (int64_t i = 0; i < n; ++i) {
    const float x = (float)(int8_t)from[i];
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t half = (uint16_t)(bits >> 16);
    memcpy(to + i * 2, &half, 2);
  }
#endif
}

// A tile as the products read it.
struct TileOperands {
  const char *keys[kTileGroups], *next_keys[kTileGroups];
  ValuePlace values;
  const float *key_scales[kTileGroups], *value_scales[kTileGroups];
};

// `next`: the tile to ask for meanwhile, or null.
static void load_tile(const AttentionShape &s, const pld_kv &kv, const TilePlace &place, const TilePlace *next,
                      char *widened, TileOperands &t) {
  const int64_t widened_bytes = kLanes * (s.e + s.width) * 2;
  t.values.next_shift = kv.dtype == PLD_I8 ? 1 : 0;
  for (int v = place.begin / kLanes; v < (place.end + kLanes - 1) / kLanes; ++v) {
    const char *unit = place.units[v];
    t.keys[v] = unit;
    t.values.groups[v] = unit + kv.v_offset;
    if (kv.dtype == PLD_I8) {
      char *wide = widened + v * widened_bytes;
      widen_int8(unit, kLanes * s.e, wide);
      widen_int8(unit + kv.v_offset, kLanes * s.width, wide + kLanes * s.e * 2);
      t.keys[v] = wide;
      t.values.groups[v] = wide + kLanes * s.e * 2;
      t.key_scales[v] = (const float *)(unit + kv.scale_offset);
      t.value_scales[v] = t.key_scales[v] + kLanes;
    }
    const bool ahead = next != nullptr && v >= next->begin / kLanes && v < (next->end + kLanes - 1) / kLanes &&
                       next->units[v] != nullptr;
    if (ahead && kv.dtype == PLD_I8)
      for (int64_t b = kv.scale_offset; b < kv.unit_bytes; b += 64) __builtin_prefetch(next->units[v] + b);
    t.next_keys[v] = ahead ? next->units[v] : t.keys[v];  // the products ask for the same places of the next tile
    t.values.next[v] = ahead ? next->units[v] + kv.v_offset : t.values.groups[v];
  }
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
static void attend_pairs(const AttentionShape &s, bool int8, const QuerySpan &span, const AttentionScratch &scratch,
                         const TileOperands &tile, int64_t start, int64_t pair, int64_t i, int n) {
  int begin[kMaxPairs], end[kMaxPairs], low = kTile, high = 0;
  for (int j = 0; j < n; ++j) {
    const int64_t row = (pair + j) / s.heads_per_group, b = span.begin(s, row) - start, e = span.end(row) - start;
    begin[j] = b < 0 ? 0 : (int)b;
    end[j] = e > kTile ? kTile : (int)e;
    low = begin[j] < low ? begin[j] : low;
    high = end[j] > high ? end[j] : high;
  }
  const int64_t weight_words = s.bf16 ? kTile / 2 : kTile;
  float *scores = scratch.scores + i * kTile, *acc = scratch.acc + i * s.width;
  uint32_t *weights = scratch.weights + i * weight_words;
  const Softening softening = {s.scale, s.softcap, s.bf16, int8 ? tile.key_scales : nullptr,
                               int8 ? tile.value_scales : nullptr};
  score_tile(s.bf16, n, scratch.q + i * s.width, s.width, tile.keys, tile.next_keys, tile.values.next_shift, s.words,
             low, high, scores);
  for (int j = 0; j < n; ++j)
    soften(softening, scores + j * kTile, weights + j * weight_words, begin[j], end[j], low, high,
           scratch.softmax[i + j], acc + j * s.width, s.width);
  add_values(s.bf16, n, weights, tile.values, low, high, s.width, acc);
}

// Queries as the score kernels read them: rounded to bfloat16 by pairs, or floats.
PLD_INLINE void load_query(const AttentionShape &s, const float *x, uint32_t *q) {
  to_cache(x, s.e, s.bf16 ? PLD_BF16 : PLD_F32, 1.0f, q);
}

// Pairs [first, last) of a span: as many as the scratch holds. Positions [from, to) are walked.
struct Chunk {
  QuerySpan span;
  int64_t first, last;
  int64_t from, to;
};

// The pairs [a, b) of a chunk that see anything of the tile that starts at `start`; and where that lies.
struct ChunkTile {
  int64_t start, a, b;
  TilePlace place;
};

PLD_INLINE int64_t first_tile(const AttentionShape &s, const Chunk &chunk) {
  const int64_t begin = chunk.span.begin(s, chunk.first / s.heads_per_group);
  return (begin > chunk.from ? begin : chunk.from) / kTile * kTile;
}
PLD_INLINE int64_t end_of_chunk(const AttentionShape &s, const Chunk &chunk) {
  const int64_t end = chunk.span.end((chunk.last - 1) / s.heads_per_group);
  return end < chunk.to ? end : chunk.to;
}

PLD_INLINE const int32_t *table_of(const OpArgs &args, const Chunk &chunk) {
  return args.batch->block_tables + chunk.span.seq * args.batch->block_table_width;
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
  find_tile(cache, table_of(args, chunk), start, low < 0 ? 0 : (int)low, high > kTile ? kTile : (int)high, tile.place);
}

static void begin_chunk(const OpArgs &args, const AttentionShape &s, const Chunk &chunk, int64_t g,
                        const AttentionScratch &scratch) {
  int64_t n = s.heads_per_group;
  for (int64_t pair = chunk.first; pair < chunk.last; ++pair) {
    int64_t i = pair - chunk.first, head = g * n + pair % n;
    load_query(s, args.in[0] + (chunk.span.first_token + pair / n) * args.in_stride[0] + head * s.e,
               scratch.q + i * s.width);
    begin_softmax(scratch.softmax[i], scratch.acc + i * s.width, s.width);
    scratch.totals[i].begun = false;
  }
}

// The span's softmax goes to the total, and begins anew.
static void end_span(const AttentionShape &s, const Chunk &chunk, const AttentionScratch &scratch) {
  for (int64_t i = 0; i < chunk.last - chunk.first; ++i) {
    merge_softmax(scratch.totals[i], scratch.total + i * s.width, scratch.softmax[i], scratch.acc + i * s.width,
                  s.width);
    begin_softmax(scratch.softmax[i], scratch.acc + i * s.width, s.width);
  }
}

PLD_INLINE void divide_values(const AttentionShape &s, const Softmax &softmax, const float *acc, float *out) {
  const Native sum = native_splat(lanes_sum(softmax.sum));
  for (int64_t e = 0; e < s.e; e += kNativeLanes) {
    const Native y = native_load(acc + e) / sum;
    memcpy(out + e, &y, (size_t)(s.e - e < kNativeLanes ? s.e - e : kNativeLanes) * sizeof(float));
  }
}

static void finish_chunk(const OpArgs &args, const AttentionShape &s, const Chunk &chunk, int64_t g,
                         const AttentionScratch &scratch) {
  int64_t n = s.heads_per_group;
  end_span(s, chunk, scratch);
  for (int64_t pair = chunk.first; pair < chunk.last; ++pair) {
    int64_t i = pair - chunk.first, head = g * n + pair % n;
    divide_values(s, scratch.totals[i], scratch.total + i * s.width,
                  args.out[0] + (chunk.span.first_token + pair / n) * args.out_stride[0] + head * s.e);
  }
}

// One chunk's tiles. `tile` is placed already, and is left so for `following` (null: none).
static void attend_chunk(const OpArgs &args, const AttentionShape &s, const HeadCache &cache, const Chunk &chunk,
                         const Chunk *following, int64_t g, const AttentionScratch &scratch, ChunkTile *&tile,
                         ChunkTile *&next) {
  const pld_kv &kv = *args.kv;
  TileOperands operands;
  begin_chunk(args, s, chunk, g, scratch);
  for (int64_t end = end_of_chunk(s, chunk), more = true; more;) {
    if (tile->start % kSpan == 0) end_span(s, chunk, scratch);
    more = tile->start + kTile < end;
    if (more)
      place_tile(args, s, cache, chunk, tile->start + kTile, *next);
    else if (following != nullptr)
      place_tile(args, s, cache, *following, first_tile(s, *following), *next);
    const TilePlace *wanted =
        (more || following != nullptr) && tile->b - tile->a <= kPrefetchPairs ? &next->place : nullptr;
    gather_units(s, kv, cache, table_of(args, chunk), tile->start, scratch.gathered, tile->place);
    load_tile(s, kv, tile->place, wanted, scratch.widened, operands);
    int64_t n_blocks = (tile->b - tile->a + kMaxPairs - 1) / kMaxPairs;
    int64_t size = (tile->b - tile->a + n_blocks - 1) / n_blocks;
    for (int64_t pair = tile->a; pair < tile->b; pair += size)
      attend_pairs(s, kv.dtype == PLD_I8, chunk.span, scratch, operands, tile->start, pair, pair - chunk.first,
                   (int)(tile->b - pair < size ? tile->b - pair : size));
    ChunkTile *done = tile;
    tile = next;
    next = done;
  }
}

// ---- Stage 1: the cut into tasks -----------------------------------------------------------------------------------

// Spans [first_span, first_span + n_spans) are what a row sees; they are parts first_part and following of the step.
struct RowParts {
  int64_t row, first_part, first_span, n_spans;
};

// visit(parts) for the rows of a step, in order, until it gives true.
template <typename Visit>
PLD_INLINE void each_row_parts(const OpArgs &args, Visit &&visit) {
  const pld_batch &batch = *args.batch;
  const int64_t window = args.op->i[4];
  RowParts parts = {0, 0, 0, 0};
  for (int32_t seq = 0; seq < batch.n_seqs; ++seq)
    for (; parts.row < batch.query_start[seq + 1]; ++parts.row) {
      const int64_t end = (int64_t)batch.seq_lens[seq] - (batch.query_start[seq + 1] - 1 - parts.row);
      parts.first_span = window > 0 && end > window ? (end - window) / kSpan : 0;
      parts.n_spans = (end + kSpan - 1) / kSpan - parts.first_span;
      if (visit(parts)) return;
      parts.first_part += parts.n_spans;
    }
}

// Few rows with long pasts: a task is one span of one row and kv head, and stage 2 merges them. That is worth while
// where the longest walk, as one task, would be more than a quarter of what falls to a thread. 0: it is not so.
PLD_INLINE int64_t split_parts(const OpArgs &args, int n_threads) {
  if (args.rows > kMaxSplitRows || n_threads == 1) return 0;
  int64_t n_parts = 0, longest = 0;
  each_row_parts(args, [&](const RowParts &parts) {
    n_parts += parts.n_spans;
    longest = parts.n_spans > longest ? parts.n_spans : longest;
    return false;
  });
  const bool uneven = longest > 1 && 4 * longest * n_threads > n_parts * args.op->i[2];
  return uneven && n_parts <= kMaxParts ? n_parts : 0;
}

// What a task of such a step leaves: the softmax of each head of the group, then their values.
struct SpanResult {
  Softmax *softmax;
  float *acc;

  SpanResult(const OpArgs &args, const AttentionShape &s, int64_t part, int64_t head) {
    const int64_t index = part * s.heads_per_group * s.n_kv_heads + head;
    softmax = (Softmax *)args.scratch[0] + index;
    acc = (float *)args.scratch[1] + index * s.width;
  }
};

// The span results; untouched unless a step is split.
static int attention_regions(const pld_op &op, const pld_weight *const *, int64_t, ScratchRegion *regions) {
  const size_t results = (size_t)(kMaxParts * op.i[1]), width = (size_t)((op.i[3] + kLanes - 1) / kLanes * kLanes);
  regions[0] = {results * sizeof(Softmax), 1, 2};
  regions[1] = {results * width * sizeof(float), 1, 2};
  return 2;
}

PLD_INLINE int64_t query_rows_of_task(const OpArgs &args, int n_threads) {
  int64_t rows = args.rows * args.op->i[2] / (n_threads * kTasksPerThread);
  return rows < 1 ? 1 : rows > kMaxQueryRows ? kMaxQueryRows : rows;
}

static int64_t attention_tasks(const OpArgs &args, int stage, int n_threads) {
  if (stage != 1) return row_tasks(args, stage, n_threads);
  if (const int64_t n_parts = split_parts(args, n_threads)) return n_parts * args.op->i[2];
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
      chunk.from = 0;
      chunk.to = INT64_MAX;
      pair = chunk.last;
      return true;
    }
    return false;
  }
};

// The last tokens first: in a prompt they have the most to do.
static void attend_rows(const OpArgs &args, const AttentionShape &s, const AttentionScratch &scratch, int64_t task,
                        int n_threads) {
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
    finish_chunk(args, s, chunks[i], g, scratch);
  }
}

static void attend_part(const OpArgs &args, const AttentionShape &s, const AttentionScratch &scratch, int64_t task) {
  const int64_t part = task / s.n_kv_heads, g = task % s.n_kv_heads;
  RowParts of = {};
  each_row_parts(args, [&](const RowParts &parts) {
    of = parts;
    return part < parts.first_part + parts.n_spans;
  });
  const HeadCache cache = head_cache(args, s, g);
  ChunkWalk walk{*args.batch, s.heads_per_group, scratch.max_pairs, of.row, of.row + 1, 0, 0};
  walk.start();
  for (Chunk chunk; walk.step(chunk);) {
    chunk.from = (of.first_span + part - of.first_part) * kSpan;
    chunk.to = chunk.from + kSpan;
    ChunkTile tiles[2];
    ChunkTile *tile = &tiles[0], *next = &tiles[1];
    place_tile(args, s, cache, chunk, first_tile(s, chunk), *tile);
    attend_chunk(args, s, cache, chunk, nullptr, g, scratch, tile, next);
    for (int64_t pair = chunk.first; pair < chunk.last; ++pair) {
      const int64_t i = pair - chunk.first;
      const SpanResult result(args, s, part, g * s.heads_per_group + pair);
      *result.softmax = scratch.softmax[i];
      memcpy(result.acc, scratch.acc + i * s.width, (size_t)s.width * sizeof(float));
    }
  }
}

// Stage 2 of a split step: the spans of rows [begin, end), merged as one walk merges them.
static void merge_rows(const OpArgs &args, int64_t begin, int64_t end) {
  const AttentionShape s = attention_shape(args);
  each_row_parts(args, [&](const RowParts &parts) {
    for (int64_t head = 0; parts.row >= begin && parts.row < end && head < s.heads_per_group * s.n_kv_heads; ++head) {
      const SpanResult total(args, s, parts.first_part, head);
      for (int64_t i = 1; i < parts.n_spans; ++i) {
        const SpanResult part(args, s, parts.first_part + i, head);
        merge_softmax(*total.softmax, total.acc, *part.softmax, part.acc, s.width);
      }
      divide_values(s, *total.softmax, total.acc, args.out[0] + parts.row * args.out_stride[0] + head * s.e);
    }
    return parts.row + 1 >= end;
  });
}

// Flushes denormals while it lives.
struct Flushing {
#if defined(__x86_64__)
  unsigned before = _mm_getcsr();
  Flushing() { _mm_setcsr(before | 0x8040u); }
  ~Flushing() { _mm_setcsr(before); }
#endif
};

static void attention_rows(const OpArgs &args, int stage, int64_t begin, int64_t end, int n_threads) {
  const Flushing flushing;
  if (stage == 2) {
    if (split_parts(args, n_threads) > 0) merge_rows(args, begin, end);
    return;
  }
  prefetch_row(args, begin);
  for (int64_t row = begin; row < end; ++row) {
    if (row + 1 < end) prefetch_row(args, row + 1);
    write_row(args, row);
  }
}

static void run_attention(const OpArgs &args, int stage, int64_t task, int n_threads, std::byte *thread_scratch) {
  if (stage != 1) {
    const int64_t rows = rows_per_task(args, n_threads), end = (task + 1) * rows;
    return attention_rows(args, stage, task * rows, end < args.rows ? end : args.rows, n_threads);
  }
  const Flushing flushing;
  const AttentionShape s = attention_shape(args);
  const AttentionScratch scratch = attention_scratch(s, *args.kv, (char *)thread_scratch);
  if (split_parts(args, n_threads) > 0)
    attend_part(args, s, scratch, task);
  else
    attend_rows(args, s, scratch, task, n_threads);
}

static const Kernel attention_kernel = {3,     attention_tasks, run_attention, attention_regions,
                                        0b101, attention_rows,  nullptr};

}  // namespace PLD_ISA_NS
}  // namespace pld
