/* cria: a baby llama. One C program that reads a LLaMA-style language model from a file and writes text with it.

   cc -O3 -fopenmp run.c -lm -o run        (or: make)
   ./run model.gguf -i "Once upon a time"

   HOW TO READ THIS FILE.  Part I is the story of one token, in the order in which it happens: how text becomes tokens
   (2), what a model consists of (3), the one operation that takes nearly all the time (4), the forward pass that turns
   tokens into a probability for every possible next token (5), the choice of one of them (6), and the loop around it
   all (7). It is complete: read it from top to bottom and you know how such a model works. Part II is the machinery
   that Part I stands on: number formats (8), the files that models come in (9), measuring (10), the command line (11).

     1  The ground floor                      Part II
     2  Text to tokens (tokenizer.c)            8  Number formats, and packing them into tiles
     3  The model                               9  Opening a checkpoint
     4  Matrix multiplication                  10  Measuring
     5  The forward pass                       11  main
     6  Choosing a token                      Appendix
     7  Generating and chatting                A  Kernels

   THE LETTERS.  Shapes stand beside every pointer, outermost dimension first, in these letters (SmolLM2-135M's in
   brackets):

     L  layers                      [30]      V  tokens in the vocabulary               [49152]
     D  width of a token's vector  [576]      S  positions that the context can hold
     H  query heads                  [9]      B  tokens that go through the model together, at most
     G  key/value heads, H/G of      [3]      n  tokens that do so now
        the query heads share one             F  width of the feed-forward layer         [1536]
     K  width of a head             [64]      R  numbers of a head that are rotated, <= K  [64]
     E  experts of a layer, if it has some

   THE SAME BITS.  Every kernel gives, on every CPU and with any number of threads, the bits that the plain C loops of
   chapters 4 and 5 define. So the order of each sum is fixed, a fused multiply-add is used where fmaf is written and
   nowhere else (which the pragma below forbids the compiler), and no option that reorders arithmetic is allowed. */

#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#endif
#ifdef __FAST_MATH__
#error "cria promises the same bits everywhere: build it without -ffast-math and -Ofast"
#endif
#define _GNU_SOURCE
#define CRIA_VERSION "0.1"

#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>
#ifdef _OPENMP
#include <omp.h>
#include <pthread.h>
#endif

/* ==== 1. The ground floor ===========================================================================================
   What the rest stands on: how a failure is told, sums of sizes that cannot wrap, a cursor that cannot read past the
   end of what it was given, a clock, and a team of threads that shares work by index. */

// The exit statuses of the program: what kind of thing went wrong.
enum { DONE = 0, BAD_FILE = 1, MISUSE = 2, BROKEN_IO = 3, NO_MEMORY = 4, NO_ROOM = 5, INTERRUPTED = 130 };

// What went wrong, in one line. Functions that can fail return false and leave it here; only main prints and exits.
typedef struct {
    int status;      // one of the exit statuses above
    char text[320];  // what was found, what was expected
} Error;

// Always false, so that a parser can say `return fail(e, BAD_FILE, "...")`.
__attribute__((format(printf, 3, 4))) static bool fail(Error *e, int status, const char *format, ...) {
    va_list list;
    va_start(list, format);
    vsnprintf(e->text, sizeof e->text, format, list);
    va_end(list);
    e->status = status;
    return false;
}

// Likewise, where it is the file that is wrong.
#define refuse(e, ...) fail(e, BAD_FILE, __VA_ARGS__)

// Zeroed memory for count things of the given size; NULL (and the error filled in) where there is not that much.
static void *allocate(size_t count, size_t size, Error *e) {
    void *p = calloc(count ? count : 1, size);
    if (!p) fail(e, NO_MEMORY, "no memory for %zu x %zu bytes", count, size);
    return p;
}

// a * b, or SIZE_MAX where that does not fit: no allocation of that many bytes can succeed, no file has them.
static size_t times(size_t a, size_t b) {
    size_t product;
    return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}

// a + b, with the same limit.
static size_t plus(size_t a, size_t b) {
    return a > SIZE_MAX - b ? SIZE_MAX : a + b;
}

// n rounded up to a multiple of step, with the same limit.
static size_t round_up(size_t n, size_t step) {
    size_t up = plus(n, step - 1);
    return up == SIZE_MAX ? up : up / step * step;
}

// A place in bytes of a known length. A read past the end gives zeros and makes the cursor bad for good, so that a
// parser may read a whole record and look once.
typedef struct {
    const unsigned char *at;
    size_t left;
    bool bad;
} Cursor;

// The next n bytes where they stand, or NULL.
static const unsigned char *take(Cursor *c, size_t n) {
    if (c->bad || n > c->left) {
        c->bad = true;
        return NULL;
    }
    const unsigned char *at = c->at;
    c->at += n;
    c->left -= n;
    return at;
}

// The next n bytes, copied to a variable of any alignment (files are little-endian, and so are the machines we run on).
static void take_into(Cursor *c, void *to, size_t n) {
    const unsigned char *from = take(c, n);
    if (from) memcpy(to, from, n);
    else memset(to, 0, n);
}

static uint32_t take_u32(Cursor *c) {
    uint32_t x;
    take_into(c, &x, sizeof x);
    return x;
}

static uint64_t take_u64(Cursor *c) {
    uint64_t x;
    take_into(c, &x, sizeof x);
    return x;
}

// Bytes that grow: a text being read, a section of a file being made.
typedef struct {
    unsigned char *bytes;
    size_t n, capacity;
} Buffer;

// Appends n bytes (zeros where `from` is NULL).
static bool append(Buffer *b, const void *from, size_t n, Error *e);  // chapter 9

// A file's bytes, mapped read-only: nothing is read before it is used, and several processes share one copy.
typedef struct { const unsigned char *bytes; size_t n_bytes; const char *path; } Map;

// One thread's place in the team that works on a step.
typedef struct { int thread, threads; struct Gate *gate; } Team;  // the gate: where it waits

// The half-open range of work that is this thread's part of n. By index only: who computes a number never changes it.
typedef struct { size_t from, to; } Range;

static Range share(size_t n, Team team) {
    size_t each = n / (size_t)team.threads, rest = n % (size_t)team.threads, i = (size_t)team.thread;
    Range r = { i * each + (i < rest ? i : rest), 0 };
    r.to = r.from + each + (i < rest);
    return r;
}

// Runs work(job, team) on a team of at most `threads` threads and waits for all of them.
static void run_team(int threads, void (*work)(void *job, Team team), void *job);  // chapter 9

// Every thread of the team waits here for the others.
static void wait_for_team(Team team);  // chapter 9

// Seconds since some fixed moment.
static double clock_seconds(void);  // chapter 9

// Tells a terminal how far a step that began at `start` has come, once it has taken half a second.
static void show_progress(const char *what, double start, size_t done, size_t total);  // chapter 9

// Set by Ctrl-C; the loops of chapter 7 look at it between two tokens. At a chat's prompt it ends the program at once.
static volatile sig_atomic_t interrupted, at_prompt;

/* ==== 2. Text to tokens =============================================================================================
   A model reads numbers, not letters. tokenizer.c cuts a text into pieces of its vocabulary and looks up their numbers:
   encode() does that, decode() gives a token's bytes back. It is a chapter of its own in a file of its own. */
#include "tokenizer.c"

/* ==== 3. The model ==================================================================================================
   A decoder-only Transformer. Each token is a vector of D numbers; L layers add to it what the token should know of the
   tokens before it (attention) and what the model knows of it (feed forward); a last matrix compares the result with
   every token of the vocabulary. One layer, with the shapes for one token:

       x (D) ──┬── norm ── query (H,K) ─ rotate ──┐
               │        ├─ key   (G,K) ─ rotate ─ cache (S,G,K) ─ scores (H,S) ─ softmax ─ mix ── attention_out ──┐
               │        └─ value (G,K) ────────── cache (S,G,K) ─────────────────────────┘                        │
               └──────────────────────────────────────────────────────────────────────────────────────── + ───────┤
               ┌──────────────────────────────────────────────────────────────────────────────────────────────────┘
               ├── norm ─┬─ gate (F) ─ silu ─ * ── down ──┐
               │         └─ up   (F) ─────────┘           │
               └──────────────────────────────────────── +──► x (D) of the next layer

   Models differ by numbers and by tensors that are there or not; no code below asks for a model's name. */

// How the numbers of a matrix are stored. Chapter 4 draws the formats; chapter 8 makes them.
typedef enum {
    F32, F16, BF16, Q8, Q8F, Q4, Q4M, Q5, Q5M, Q2K, Q3K, Q4K, Q5K, Q6K, IQ4NL, IQ4XS, MXFP4, N_TYPES
} Type;

// A matrix in tiles of 16 rows by 32 columns (chapter 4); those of a layer's experts follow each other.
typedef struct {
    Type type;
    int rows, cols;              // of one
    const unsigned char *tiles;  // NULL: this model has no such matrix
} Tensor;

// Which numbers of a head are rotated together: (0,1) (2,3) ..., or (0,R/2) (1,R/2+1) ...
typedef enum { ADJACENT, HALVES } Pairing;
typedef enum { SILU, GELU } Activation;             // x / (1 + e^-x), or nearly that with tanh
typedef enum { UNROTATED, ROTATED, LOCAL } Angles;  // of a layer: none, those by rope_theta, those by local_theta

typedef struct {
    char family[16];
    int n_layers, dim, n_tokens, head_dim, rope_dim;  // L, D, V, K, R
    int context, original_context;          // positions that it was trained for; before its rotation was scaled, or 0
    float norm_eps;
    double rope_theta, local_theta;  // the slowest pair turns about theta times slower than the fastest; 0: none
    double rope_scale, yarn_fast, yarn_slow, rope_magnitude;  // for slow_down(); what multiplies cosine and sine
    float embedding_scale, residual_scale;  // what a token's first vector, and what is added to it, are multiplied by
    float attention_scale, logit_scale;     // likewise the scores (1 / sqrt(K) in most models), and the logits
    float attention_cap, logit_cap;         // c * tanh(y / c) keeps scores and logits below c; 0: it does not
    int activation;                         // of the gate
    Pairing pairing;
    bool wide_head_norms;                   // query and key are normalised over all heads, not each
} Config;

typedef struct {
    int n_heads, n_kv_heads, ffn_dim;  // H, G, F: a layer may have its own
    int window, angles;                // how many positions a token sees, itself the last (0: all); an Angles
    int n_experts, n_experts_used;     // E: of gates, ups and downs; how many a token visits. 0: one of each, for all
    Tensor query, key, value;          // (H*K,D) (G*K,D) (G*K,D)
    Tensor attention_out;              // (D,H*K)
    const float *query_norm, *key_norm;             // (K) each, or (H*K) and (G*K) at once; NULL: not normalised
    const float *attention_norm, *ffn_norm;  // (D)  before a block; NULL: OLMo2 has only those behind, Gemma has both
    const float *attention_norm_bias, *ffn_norm_bias;  // (D)  or NULL
    const float *attention_post_norm, *ffn_post_norm;  // (D)  of what a block adds, or NULL
    Tensor gate, up, down, router;     // (F,D) (F,D) (D,F) (E,D)
    // Added after the product, as long as its matrix has rows; NULL where there is none (Qwen2 has the first three).
    const float *query_bias, *key_bias, *value_bias, *attention_out_bias, *gate_bias, *up_bias, *down_bias;
} Layer;

typedef struct {
    Config config;
    Layer *layers;              // (L)
    Tensor embedding;           // (V,D): a token's row is its first vector
    const float *final_norm, *final_norm_bias;  // (D)  the second may be NULL
    Tensor head;                // (V,D): the embedding itself, where the model has no other
    const float *rope_factors, *long_factors, *short_factors;  // (R/2) or NULL: of each pair, for slow_down()
    Tokenizer tokenizer;
    Text chat_template;         // the checkpoint's own, as text that is compared and never run; empty if there is none
    const unsigned char *vocabulary;  // the tokenizer's section
    size_t vocabulary_bytes;
    Map file, tokenizer_file, *parts;  // what the pointers above point into, if the file's layout is ours ...
    unsigned char *packed;     // ... or else this block, made from the file when it was opened
    Buffer packed_vocabulary;  // likewise for the tokenizer's section
    size_t packed_bytes, n_parts;  // the latter: of a split GGUF those after its first
} Model;

// 32 numbers of a vector, rounded to 8 bits (chapter 4): a number is about scale * q.
typedef struct {
    int8_t q[32];
    float scale;
    float scaled_sum[3];    // scale * sum of the q: of all, of the first 16, of the last 16
    int32_t minus_128_sum;  // -128 * sum of all q: what makes a product with weight + 128 one with the weight
    int32_t minus_8_sum, minus_32_sum[2];  // of all; of the halves. So a block fills a line of the cache, 64 bytes
} Block;

// The vectors of n tokens that a matrix is multiplied with, in blocks of 32 numbers: those of the same columns lie side
// by side for all tokens, as a tile meets them. What lies behind a float matrix's width meets zeros.
typedef struct {
    const float (*x)[32];  // (cols/32, n)
    const Block *rounded;  // (cols/32, n)  or NULL: every product is made in float
    size_t n, first, some; // of the n, `some` from number `first` on are multiplied
    size_t expert;         // with this one's matrix, or 0
} Activations;

// What changes while text is made.
typedef struct {
    int context, batch;  // S and B as allocated
    int n_past;          // positions that are in the cache
    int threads;
    size_t work;         // multiply-adds of a token: where they are few, one thread does them
    bool exact, cache_f32; // multiply with dequantised weights in float; keys and values in 32 bits, else in 16
    bool rounds, copies; // some matrix wants its input in 8 bits; some wants it in float
    size_t x_stride, q_stride, kv_stride, ffn_stride;  // D, H*K, G*K, F of the widest layer, up to a multiple of 32
    size_t logits_stride, routes_stride;               // V, E up to a multiple of 16
    float *x;                   // (B, D)    the token's vector, which each layer adds to
    float *normed;              // (B or threads, D)
    float *query, *key, *value; // (B, H*K) (B, G*K) (B, G*K)
    float *attended;            // (B, H*K)
    float *gate, *up;           // (B, F), with experts (visits, F): a token visits n_experts_used of them
    float *out, *expert_out;    // (B, D)    what a block adds to x, and what an expert adds to that
    float *routes;              // (B, E)    the weight of each expert's result for a token, 0: not visited
    int *visitors, *first_visit;// (visits) (E+1)  the tokens that visit expert 0, expert 1, ...; where each one's begin
    float (*blocks)[32];        // (widest/32, B or visits)  the input of a product in blocks, as it is
    Block *rounded;             // (widest/32, B or visits), for one token (threads, widest/32)  and rounded
    size_t widest;              // of the strides above but the logits'
    float *logits;              // (LOGITS_AT_ONCE, V)
    float *angles;              // (1 or 2, S, R/2, 2)  cosine and sine of each position's rotation; the local ones
    int n_angles;               // positions whose angles are there
    void **keys;                // (L)(G, S/16, K, 16)  sixteen positions side by side, f16 or f32
    void **values;              // (L)(G, K/16, S, 16)  sixteen numbers of each position side by side
    float *scratch;             // (threads, scratch_stride)  each thread's room for attention scores
    size_t scratch_stride;
    int *broken;                // (B)  0, or 1 + the number of layers after which the token's vector was not finite
    void *arena;                // all of these
    size_t arena_bytes, batch_bytes;  // of all, and of what a larger batch makes larger
} State;

enum {
    LOGITS_AT_ONCE = 16,      // rows of logits at most: with 128,000 tokens these are 8 MB
    QUERIES_TOGETHER = 24, POSITIONS_TOGETHER = 64,  // of one key/value head, for one thread at once
    MAX_HEAD_DIM = 1024,      // K at most
};

/* ==== 4. Matrix multiplication ======================================================================================
   Nearly all the time goes into y = W x. For one token the machine does little but read W; for many tokens it reads W
   once and multiplies. Both are served by one layout: a matrix is cut into tiles of 16 rows and 32 columns, and a tile
   holds the weights in the order in which they are used. One SIMD lane is one row, so that no sum ever runs across
   lanes, and that is why every kernel can give the same bits as the plain loops here.

       matrix = row tiles, each: | tile of columns 0..31 | columns 32..63 | ...    padded with zeros on both sides
       f32, f16, bf16 tile:  column 0: row 0 .. row 15 | column 1: row 0 .. row 15 | ...
       quantised tiles:      the 16 rows' scales, minima if any, then for each 32 columns (there are tiles of 256)
           8 bits, groups of four columns:  row 0: c0 c1 c2 c3 | row 1: c0 c1 c2 c3 | ... | row 15 |  next group ...
           fewer bits in planes, each a part of every weight's bits, the lowest first:
           4 bits: 256 bytes ordered like four groups; low halves: groups 0 to 3, high halves: groups 4 to 7
           2 bits: 128 bytes like two groups;  1 bit: 64 bytes like one, bit g of a byte: group g

   A quantised weight is scale * (q - offset), or scale * q + min, with one scale for 32 columns of a row or for 16. Its
   activations are rounded to 8 bits too, in blocks of 32 with a scale of their own, so that the inner product is one of
   small integers, which processors do fastest. */

enum { TILE_ROWS = 16, BLOCK = 32 };  // a block: columns whose activations share a scale

// What is to be known of a type; chapter 8 has the table and the functions that unpack tiles.
typedef struct {
    const char *name;
    int cols, per_scale;   // columns of a tile; those of a row that share a scale
    int header;            // bytes of scales and minima at the tile's beginning; 0: the weights are floats
    int bits, offset;      // the q of a weight, scale * (q - offset), has so many bits
    bool has_min;
    const int8_t *values;  // q is the place of the weight in this table; NULL: the weight itself
} TypeInfo;

static const TypeInfo types[N_TYPES];

static bool is_quantised(Type type) {
    return types[type].header > 0;
}

static size_t tile_bytes(Type type) {
    return (size_t)types[type].header + (size_t)types[type].cols * TILE_ROWS / 8 * (size_t)types[type].bits;
}

static size_t n_row_tiles(const Tensor *w) {
    return round_up((size_t)w->rows, TILE_ROWS) / TILE_ROWS;
}

static size_t n_blocks(const Tensor *w) {
    return round_up((size_t)w->cols, BLOCK) / BLOCK;
}

// The tiles of sixteen rows.
static size_t row_tile_bytes(const Tensor *w) {
    size_t cols = (size_t)types[w->type].cols;
    return times(round_up((size_t)w->cols, cols) / cols, tile_bytes(w->type));
}

static size_t tensor_bytes(const Tensor *w) {
    return times(n_row_tiles(w), row_tile_bytes(w));
}

// Functions that are compiled into several kernels, each time for another instruction set (chapter 8).
#define INLINE static inline __attribute__((always_inline))

INLINE float float_of_bits(uint32_t u) { return (union { uint32_t u; float x; }){ .u = u }.x; }
INLINE uint32_t bits_of_float(float x) { return (union { uint32_t u; float x; }){ .x = x }.u; }

// Adding and subtracting this rounds a float below 2^22 to a whole number, ties to even, which the sum's low bits are.
#define ROUNDER 0x1.8p23f

// q[i] = x[i] * (127 / max|x|) rounded, scale = max|x| / 127, for one block of 32.
// max is found among the bits as integers, so that NaN > Inf > numbers on every CPU; a block that is not finite gets
// the scale NaN, and the check of the layer will find what comes of it.
INLINE void round_block(Block *b, const float *x) {
    int32_t max = 0, q[32], sum[3] = { 0 };
    for (int i = 0; i < 32; i++) {
        int32_t size = (int32_t)(bits_of_float(x[i]) & 0x7fffffff);
        max = size > max ? size : max;
    }
    float largest = float_of_bits((uint32_t)max);
    bool finite = max < 0x7f800000, tiny = largest < 0x1p-100f;
    float inverse = finite && !tiny ? 127.0f / largest : 0.0f;
    for (int i = 0; i < 32; i++)  // the low 22 bits of the sum are the whole number
        q[i] = (int32_t)(bits_of_float((finite ? x[i] * inverse : 0.0f) + ROUNDER) << 10) >> 10;
    for (int i = 0; i < 32; i++) b->q[i] = (int8_t)q[i];
    for (int i = 0; i < 16; i++) sum[1] += q[i];
    for (int i = 16; i < 32; i++) sum[2] += q[i];
    sum[0] = sum[1] + sum[2];
    b->scale = !finite ? NAN : tiny ? 0.0f : largest / 127.0f;
    for (int i = 0; i < 3; i++) b->scaled_sum[i] = b->scale * (float)sum[i];
    for (int i = 0; i < 2; i++) b->minus_32_sum[i] = -32 * sum[i + 1];
    b->minus_128_sum = -128 * sum[0];
    b->minus_8_sum = -8 * sum[0];
}

// Some of n vectors x (n, stride) in 8 bits      blocks (cols/32, n)
INLINE void round_vectors(Block *blocks, const float *x, size_t stride, size_t cols, size_t n, Range tokens) {
    for (size_t t = tokens.from; t < tokens.to; t++) {
        for (size_t c = 0; c < cols; c += 32) round_block(&blocks[c / 32 * n + t], x + t * stride + c);
    }
}

typedef void Widen(float *to, const uint16_t *from, size_t n);  // f16 to f32
INLINE Widen widen_floats;                                      // chapter 8

// c[i][j] = ... fmaf(a[i][1], b[1][j], fmaf(a[i][0], b[0][j], c[i][j])): rows of 16 chains, each over k in order
// c (m, c_stride)  a (m, a_stride)  b (depth, b_stride), in f16 if `half` says so, else in f32
INLINE void add_products(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,
                         size_t b_stride, int m, int depth) {
    enum { TOGETHER = 4 };  // rows that share each number of b once it is loaded
    for (int i = 0; i < m; i += TOGETHER, c += TOGETHER * c_stride, a += TOGETHER * a_stride) {
        float lane[TOGETHER][16] = { { 0 } }, x[TOGETHER] = { 0 };
        int rows = m - i < TOGETHER ? m - i : TOGETHER;
        for (int r = 0; r < rows; r++) memcpy(lane[r], c + (size_t)r * c_stride, sizeof lane[r]);
        for (int k = 0; k < depth; k++) {
            float wide[16];
            const float *w = half ? wide : (const float *)b + (size_t)k * b_stride;
            if (half) widen_floats(wide, (const uint16_t *)b + (size_t)k * b_stride, 16);
            for (int r = 0; r < rows; r++) x[r] = a[(size_t)r * a_stride + (size_t)k];
            for (int r = 0; r < (rows == 1 ? 1 : TOGETHER); r++)
                for (int j = 0; j < 16; j++) lane[r][j] = fmaf(w[j], x[r], lane[r][j]);
        }
        for (int r = 0; r < rows; r++) memcpy(c + (size_t)r * c_stride, lane[r], sizeof lane[r]);
    }
}

// 32 columns of a row tile as floats, w[column][row]. Quantised weights are min[row] + scale[row] * w, w a small whole
// number; the second scale and minimum are those of the last 16 columns, if they have their own.
typedef struct {
    float w[32][16], scale[2][16], min[2][16];
} UnpackedBlock;

INLINE void unpack(UnpackedBlock *u, Type type, const unsigned char *tiles, size_t block);

// sum[t][r] = fmaf(scale[r] * s[t], dot(w[r], q[t]), sum[t][r]), and with minima fmaf(min[r], s[t] * sum(q[t]), that)
// for those columns of a block that share a scale: all 32 (part 0), the first 16 (1) or the last 16 (2).
// The dot products are whole numbers below 32 * 128 * 128 = 2^19: exact in float, in whatever order they are added.
INLINE void add_part(float sum[][16], const UnpackedBlock *u, bool has_min, const Block *x, int n, int part) {
    enum { TOGETHER = 4 };
    const int first = part == 2 ? 16 : 0, cols = part == 0 ? 32 : 16;
    const float *scale = u->scale[part == 2], *min = u->min[part == 2];
    for (int t0 = 0; t0 < n; t0 += TOGETHER) {
        float dot[TOGETHER][16] = { { 0 } }, q[TOGETHER][32];
        int now = n - t0 < TOGETHER ? n - t0 : TOGETHER;
        for (int i = 0; i < now * cols; i++) q[i / cols][i % cols] = x[t0 + i / cols].q[first + i % cols];
        add_products(dot[0], 16, q[0], 32, u->w[first], false, 16, now, cols);
        for (int t = 0; t < now; t++) {
            float *y = sum[t0 + t], s = x[t0 + t].scale, scaled_sum = x[t0 + t].scaled_sum[part];
            for (int r = 0; r < 16; r++) y[r] = fmaf(scale[r] * s, dot[t][r], y[r]);
            for (int r = 0; has_min && r < 16; r++) y[r] = fmaf(min[r], scaled_sum, y[r]);
        }
    }
}

// Adds the products of quantised tiles, block after block. x: n tokens' input for the first; each next is n_all behind.
INLINE void add_tiles(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks, const Block *x,
                      size_t n_all, int n) {
    bool has_min = types[type].has_min, halves = types[type].per_scale == 16;
    for (size_t c = 0; c < n_blocks; c++, x += n_all) {
        UnpackedBlock u;
        unpack(&u, type, tiles, c);
        if (!halves) add_part(sum, &u, has_min, x, n, 0);
        if (halves) add_part(sum, &u, has_min, x, n, 1);
        if (halves) add_part(sum, &u, has_min, x, n, 2);
    }
}

// The kernels: the innermost loops, here and in chapter 5. The loops there define the results; the appendix has some of
// them again for other instruction sets, and `kernels` points to the set in use.
typedef struct {
    const char *name;
    void (*add_tiles)(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks, const Block *x,
                      size_t n_all, int n);
    void (*add_products)(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,
                         size_t b_stride, int m, int depth);
    void (*multiply_vector)(float *y, Type type, const unsigned char *tiles, size_t rows, size_t cols, const float *x);
    void (*dequantise)(float w[32][16], Type type, const unsigned char *tiles, size_t block);
    void (*narrow)(uint16_t *to, const float *from, size_t n);  // to f16
    void (*round)(Block *blocks, const float *x, size_t stride, size_t cols, size_t n, Range tokens);
    bool (*normalise)(float *out, const float *x, const float *weight, const float *bias, size_t dim, float eps);
    void (*rotate)(float *head, const float *angle, int rope_dim, Pairing pairing);
    float (*exponentiate)(float *p, size_t from, size_t n, float scale, float cap);
    void (*activate)(float *gate, const float *up, size_t n, Activation how);
    double (*peak)(bool int8, size_t rounds);  // for chapter 10: as many operations as it can; returns their number
    void (*read)(const uint64_t *memory, size_t n);  // likewise: reads as fast as it can
} Kernels;

static const Kernels scalar, *kernels = &scalar;  // chapter 8

// y[t,r] = sum_c w[r,c] * x[t,c] for the rows of some row tiles      y (n, y_stride)
// A weight is read once for up to 128 tokens, whose sums fit the nearest cache.
static void multiply_rows(float *y, size_t y_stride, const Tensor *w, Range rows, const Activations *a) {
    enum { TOKENS = 128 };
    bool quantised = is_quantised(w->type), rounded = quantised && a->rounded;
    size_t blocks = n_blocks(w), row_bytes = row_tile_bytes(w), together = 8192 / blocks;
    const unsigned char *tiles = w->tiles + a->expert * tensor_bytes(w) + rows.from * row_bytes;
    together = together < 16 ? 16 : together > TOKENS ? TOKENS : together;
    if (a->n == 1 && a->some == 1 && !quantised) {
        kernels->multiply_vector(y + rows.from * 16, w->type, tiles, rows.to - rows.from, blocks * 32, a->x[0]);
        return;
    }
    for (size_t row = rows.from; row < rows.to; row++, tiles += row_bytes) {
        for (size_t t0 = 0; t0 < a->some; t0 += together) {
            int now = (int)(a->some - t0 < together ? a->some - t0 : together);
            _Alignas(64) float sum[TOKENS][16], columns[32][16];  // as wide as a line of the cache
            memset(sum, 0, (size_t)now * sizeof *sum);
            if (rounded) kernels->add_tiles(sum, w->type, tiles, blocks, a->rounded + a->first + t0, a->n, now);
            for (size_t c = 0; !rounded && c < blocks; c++) {
                const unsigned char *next = tiles + (c + 1) * (row_bytes / blocks);  // asked for while we multiply
                for (size_t i = 0; i < 2 * (row_bytes / blocks); i += 64) __builtin_prefetch(next + i, 0, 2);
                kernels->dequantise(columns, w->type, tiles, c);
                kernels->add_products(sum[0], 16, a->x[c * a->n + a->first + t0], 32, columns[0], false, 16, now, 32);
            }
            for (int t = 0; t < now; t++) memcpy(y + (t0 + (size_t)t) * y_stride + row * 16, sum[t], sizeof *sum);
        }
    }
}

/* ==== 5. The forward pass ===========================================================================================
   n tokens enter as numbers and leave as logits: a score for every token of the vocabulary to be the next one. A
   prompt goes through in batches, a generated token alone; both take the same way, and with the same bits. First the
   leaves of the computation, which have no threads and know no model; then the steps of a layer, which a team of
   threads shares by rows, heads or tokens; they wait for each other where one reads what another has written.

   Attention, in words: every token has a question (its query), an address (its key) and something to tell (its value).
   How well a key answers a query is their product; softmax makes weights of these scores, which add up to 1; and the
   values so weighted are what the token learns. Several heads ask different questions at once. A token sees itself and
   those before it, never later ones: so keys and values stay as they are once made, the cache keeps them, and a new
   token costs one pass and not the whole text again. */

INLINE float exponential(float x);  // e^x, with the same bits everywhere (chapter 8)
static double slow_down(const Model *m, int context, int pair);  // by what angles are divided (chapter 9)
INLINE float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }
// About y, but never beyond the cap; what is not finite becomes no number, so that it is noticed.
INLINE float cap_at(float y, float cap) { return cap * hyperbolic_tangent(y / cap) + (y - y); }

// The sum of 16 lanes: i and i+8, then +4, +2, +1.
INLINE float fold_lanes(float lane[16]) {
    for (int half = 8; half; half /= 2) {
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    }
    return lane[0];
}

// out = x / sqrt(mean(x^2) + eps) * weight; with a bias, LayerNorm: that of x - mean(x), + bias      all (dim)
// Element i belongs to lane i mod 16. False, and no numbers, if the sum of squares is not finite.
INLINE bool apply_norm(float *out, const float *x, const float *weight, const float *bias, size_t dim, float eps) {
    float lane[16] = { 0 }, of_mean[16] = { 0 };
    size_t i;
    for (i = 0; bias && i < dim; i++) of_mean[i % 16] += x[i];
    float mean = bias ? fold_lanes(of_mean) / (float)dim : 0.0f;
    for (i = 0; i + 16 <= dim; i += 16) {
        for (int j = 0; j < 16; j++) lane[j] = fmaf(x[i + j] - mean, x[i + j] - mean, lane[j]);
    }
    for (; i < dim; i++) lane[i % 16] = fmaf(x[i] - mean, x[i] - mean, lane[i % 16]);
    float sum = fold_lanes(lane), r = sum < INFINITY ? 1.0f / sqrtf(sum / (float)dim + eps) : NAN;
    for (i = 0; i < dim; i++) out[i] = (x[i] - mean) * r * weight[i];
    for (i = 0; bias && i < dim; i++) out[i] += bias[i];
    return sum < INFINITY;
}

// gate = silu(gate) * up or gelu(gate) * up      both (n)
// silu(x) = x / (1 + e^-x); gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
INLINE void activate(float *gate, const float *up, size_t n, Activation how) {
    for (size_t i = 0; i < n && how == SILU; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    for (size_t i = 0; i < n && how == GELU; i++) {
        float x = gate[i], inner = 0.7978845608f * (x + 0.044715f * x * x * x);
        gate[i] = 0.5f * x * (1.0f + hyperbolic_tangent(inner)) * up[i];
    }
}

// Turns the pairs of one head by the angles of its position.      head (K)  angle (R/2, 2)
// Written with + alone: for a - beside a +, gcc 12 takes a fused instruction although that is forbidden.
INLINE void rotate(float *head, const float *angle, int rope_dim, Pairing pairing) {
    int half = rope_dim / 2, step = pairing == ADJACENT ? 2 : 1, other = pairing == ADJACENT ? 1 : half;
    for (int i = 0; i < half; i++) {
        float *a = head + i * step, *b = a + other, x = *a, y = *b, cosine = angle[2 * i], sine = angle[2 * i + 1];
        *a = x * cosine + y * -sine;
        *b = y * cosine + x * sine;
    }
}

// p[i] = e^(y - max), y = p[i] * scale or, if there is a cap, cap * tanh(p[i] * scale / cap), for numbers `from` to n
// of p; zeros before them, and behind up to a multiple of 16; returns their sum.
INLINE float exponentiate(float *p, size_t from, size_t n, float scale, float cap) {
    float max[16], lane[16] = { 0 };
    for (size_t i = 0; i < n && cap > 0; i++) p[i] = cap_at(p[i] * scale, cap);
    if (cap > 0) scale = 1;
    for (size_t i = 0; i < from; i++) p[i] = -INFINITY;
    for (size_t i = n; i % 16; i++) p[i] = -INFINITY;
    for (int j = 0; j < 16; j++) max[j] = -INFINITY;
    for (size_t i = 0; i < n; i += 16) {
        for (int j = 0; j < 16; j++) {
            p[i + j] *= scale;
            max[j] = p[i + j] > max[j] ? p[i + j] : max[j];
        }
    }
    for (int j = 1; j < 16; j++) max[0] = max[j] > max[0] ? max[j] : max[0];
    for (size_t i = 0; i < n; i += 16) {
        for (int j = 0; j < 16; j++) {
            p[i + j] = exponential(p[i + j] - max[0]);
            lane[j] += p[i + j];
        }
    }
    return fold_lanes(lane);
}

// Some tokens' queries that share a key/value head, of which a thread makes what they get from those before them.
typedef struct {
    const float *query;  // (n, stride)  `group` heads of K numbers from here on
    float *out;          // (n, stride)
    size_t stride;
    const void *keys;    // (S/16, K, 16)
    const void *values;  // (row/16, S, 16)
    bool cache_f32;
    int group, n_queries;     // number i is of token i / group and head i % group
    size_t head_dim, row, positions;  // K, that up to a multiple of 16, S
    size_t position, window;  // of the first of the n tokens; how many each sees
    float scale, cap;         // of the scores
    float *queries, *sums;    // (n_queries, row)
    float *scores;            // (n_queries, score_stride)
    size_t score_stride;
} Attention;

// Where the K numbers of query i, or of its result, are.
static size_t head_at(const Attention *a, int i) {
    return (size_t)(i / a->group) * a->stride + (size_t)(i % a->group) * a->head_dim;
}

// The positions that query i may see: up to its token's own.
static size_t seen_by(const Attention *a, int i) {
    return a->position + (size_t)(i / a->group) + 1;
}

// The first that it may see.
static size_t seen_from(const Attention *a, int i) {
    return seen_by(a, i) > a->window ? seen_by(a, i) - a->window : 0;
}

// Number i of the cache.
static const void *cached(const Attention *a, const void *cache, size_t i) {
    return (const char *)cache + i * (a->cache_f32 ? sizeof(float) : sizeof(uint16_t));
}

// scores[i,p] = query[i] . key[p] for all positions that some query may see, sixteen at a time
static void score_keys(const Attention *a) {
    for (size_t p = seen_from(a, 0) / 16 * 16; p < seen_by(a, a->n_queries - 1); p += 16) {
        float *scores = a->scores + p;
        for (int i = 0; i < a->n_queries; i++) memset(scores + (size_t)i * a->score_stride, 0, 16 * sizeof *scores);
        kernels->add_products(scores, a->score_stride, a->queries, a->row, cached(a, a->keys, p * a->head_dim),
                              !a->cache_f32, 16, a->n_queries, (int)a->head_dim);
    }
}

// sums[i] = sum over the positions p that query i may see of scores[i,p] * value[p]
static void mix_values(const Attention *a) {
    size_t n = seen_by(a, a->n_queries - 1);
    for (size_t p = seen_from(a, 0) / 16 * 16, now; p < n; p += now) {
        now = n - p < POSITIONS_TOGETHER ? n - p : POSITIONS_TOGETHER;
        bool all_see = p + now <= seen_by(a, 0);
        int rows = all_see ? a->n_queries : a->group;  // the last positions are for some tokens only
        for (int i = 0; i < a->n_queries; i += rows) {
            size_t seen = seen_by(a, i), depth = seen >= p + now ? now : seen > p ? seen - p : 0;
            const float *weights = a->scores + (size_t)i * a->score_stride + p;
            for (size_t d = 0; d < a->row; d += 16) {
                const void *values = cached(a, a->values, d * a->positions + p * 16);
                kernels->add_products(a->sums + (size_t)i * a->row + d, a->row, weights, a->score_stride, values,
                                      !a->cache_f32, 16, rows, (int)depth);
            }
        }
    }
}

// out = softmax(query . keys * scale) . values: the positions up to the token's own, weighted by how well they fit
static void attend_group(const Attention *a) {
    size_t begin = seen_from(a, 0) / 16 * 16;
    for (int i = 0; i < a->n_queries; i++)
        memcpy(a->queries + (size_t)i * a->row, a->query + head_at(a, i), a->head_dim * sizeof(float));
    score_keys(a);
    memset(a->sums, 0, (size_t)a->n_queries * a->row * sizeof(float));
    for (int i = 0; i < a->n_queries; i++) {
        float *p = a->scores + (size_t)i * a->score_stride;
        p[a->score_stride - 1] = kernels->exponentiate(  // a row's last place is free for this
            p + begin, seen_from(a, i) - begin, seen_by(a, i) - begin, a->scale, a->cap);
    }
    mix_values(a);
    for (int i = 0; i < a->n_queries; i++) {
        float sum = a->scores[(size_t)(i + 1) * a->score_stride - 1], *out = a->out + head_at(a, i);
        for (size_t d = 0; d < a->head_dim; d++) out[d] = a->sums[(size_t)i * a->row + d] / sum;
    }
}

// x[t] = row tokens[t] of the embedding      x (n, x_stride)
static void embed(const Model *m, State *s, const int *tokens, Range range) {
    const Tensor *w = &m->embedding;
    for (size_t t = range.from; t < range.to; t++) {
        size_t row = (size_t)tokens[t];
        for (size_t c = 0; c < n_blocks(w); c++) {
            float columns[32][16];
            kernels->dequantise(columns, w->type, w->tiles + row / 16 * row_tile_bytes(w), c);
            for (size_t i = 0; i < 32; i++)
                s->x[t * s->x_stride + c * 32 + i] = columns[i][row % 16] * m->config.embedding_scale;
        }
    }
}

// The angles of positions n_angles to n: pair i of position p turns by p * theta^(-2i/R), the first pair fastest. A
// model sees how far apart two tokens are by how far their rotations differ (Su et al., "RoFormer").
static void make_angles(const Model *m, State *s, int n) {
    const Config *c = &m->config;
    size_t positions = round_up((size_t)s->context, 16);
    for (; s->n_angles < n; s->n_angles++) {
        for (int i = 0; i < c->rope_dim / (c->local_theta > 0 ? 1 : 2); i++) {  // usual angles, then local ones
            int pair = i % (c->rope_dim / 2), local = i >= c->rope_dim / 2;
            double theta = local ? c->local_theta : c->rope_theta, size = local ? 1 : c->rope_magnitude;
            double turn = pow(theta, -2.0 * pair / c->rope_dim) / (local ? 1 : slow_down(m, s->context, pair));
            float *angle = s->angles + ((size_t)local * positions + (size_t)s->n_angles) * (size_t)c->rope_dim;
            angle[2 * pair] = (float)(cos(s->n_angles * turn) * size);
            angle[2 * pair + 1] = (float)(sin(s->n_angles * turn) * size);
        }
    }
}

// Puts one head's key and value of a position into the cache (chapter 9).      key, value (K)
static void remember(const State *s, int layer, size_t head, size_t head_dim, size_t position, const float *key,
                     const float *value);

// Which of n vectors a thread makes: its share; but a single one every thread makes for itself, in a place of its own,
// which takes less time than to wait for another.
static Range own_share(int n, Team team) {
    return n == 1 ? (Range){ 0, 1 } : share((size_t)n, team);
}

// x (n, stride), or unless `rows` is NULL these n of its rows, as input of products; a thread has own_share(n, team).
static Activations prepare(const State *s, const float *x, size_t stride, const int *rows, size_t cols, int n,
                           Team team) {
    Range tokens = own_share(n, team);
    Block *rounded = s->rounded + (n == 1 ? (size_t)team.thread * s->widest / 32 : 0);
    const float (*blocks)[32] = (const void *)(n == 1 ? x : s->blocks[0]);
    for (size_t t = tokens.from; t < tokens.to; t++) {
        const float *row = x + (rows ? (size_t)rows[t] : t) * stride;
        if (s->rounds) kernels->round(rounded, row, 0, cols, (size_t)n, (Range){ t, t + 1 });
        for (size_t c = 0; n > 1 && s->copies && c < cols; c += 32)
            memcpy(s->blocks[c / 32 * (size_t)n + t], row + c, sizeof *s->blocks);
    }
    if (n > 1) wait_for_team(team);
    return (Activations){ blocks, s->rounds ? rounded : NULL, (size_t)n, 0, (size_t)n, 0 };
}

// y = w x + bias for this thread's rows, which are returned.      y (n, y_stride)  bias (rows) or NULL
static Range matmul(float *y, size_t y_stride, const Tensor *w, const float *bias, const Activations *x, Team team) {
    Range tiles = share(n_row_tiles(w), team);
    multiply_rows(y, y_stride, w, tiles, x);
    Range rows = { tiles.from * 16, tiles.to * 16 < (size_t)w->rows ? tiles.to * 16 : (size_t)w->rows };
    for (size_t t = 0; bias && t < x->some; t++) {
        for (size_t r = rows.from; r < rows.to; r++) y[t * y_stride + r] += bias[r];
    }
    return rows;
}

// normed = norm(x) of n tokens from `first` on, as input of the next products. Each layer's result is checked here: a
// sum of squares that is not finite comes from the last of the `n_layers` layers that the token has gone through.
static Activations normalise_stream(const Model *m, State *s, const float *weight, const float *bias, int first, int n,
                                    int n_layers, Team team) {
    size_t dim = (size_t)m->config.dim;
    float *normed = s->normed + (n == 1 ? (size_t)team.thread * s->x_stride : 0);
    Range tokens = own_share(n, team);
    for (size_t t = tokens.from; t < tokens.to; t++) {
        const float *x = s->x + ((size_t)first + t) * s->x_stride;
        if (!weight) memcpy(normed + t * s->x_stride, x, dim * sizeof *x);
        bool finite = !weight || kernels->normalise(normed + t * s->x_stride, x, weight, bias, dim, m->config.norm_eps);
        int *broken = &s->broken[(size_t)first + t];
        if (!finite && (n > 1 || team.thread == 0) && !*broken) *broken = n_layers + 1;
    }
    return prepare(s, normed, s->x_stride, NULL, dim, n, team);
}

// x += residual_scale * out, normalised before if there is a norm for it; this thread has made these rows of out
static void add_to_stream(const Model *m, State *s, Range rows, const float *norm, int n, Team team) {
    Range tokens = { 0, (size_t)n };
    if (norm) {  // needs whole vectors, so that the tokens are shared and not the rows
        wait_for_team(team);
        rows = (Range){ 0, (size_t)m->config.dim };
        tokens = share((size_t)n, team);
    }
    for (size_t t = tokens.from; t < tokens.to; t++) {
        float *x = s->x + t * s->x_stride, *out = s->out + t * s->x_stride;
        if (norm) kernels->normalise(out, out, norm, NULL, rows.to, m->config.norm_eps);
        for (size_t r = rows.from; r < rows.to; r++) x[r] += out[r] * m->config.residual_scale;
    }
    wait_for_team(team);
}

// attended = attention(query, cache). A unit of work is some tokens of one key/value head; the later, the longer they
// take, so the threads deal them out one by one.
static void attend(const Model *m, State *s, int l, int n, Team team) {
    const Layer *layer = &m->layers[l];
    size_t head_dim = (size_t)m->config.head_dim, group = (size_t)(layer->n_heads / layer->n_kv_heads);
    size_t positions = round_up((size_t)s->context, 16), item_bytes = s->cache_f32 ? sizeof(float) : sizeof(uint16_t);
    size_t per_unit = group < QUERIES_TOGETHER ? QUERIES_TOGETHER / group : 1, row = round_up(head_dim, 16);
    size_t n_units = ((size_t)n + per_unit - 1) / per_unit * (size_t)layer->n_kv_heads;
    size_t n_queries = group > QUERIES_TOGETHER ? group : QUERIES_TOGETHER;
    float *scratch = s->scratch + (size_t)team.thread * s->scratch_stride;
    for (size_t i = (size_t)team.thread; i < n_units; i += (size_t)team.threads) {
        size_t kv_head = i % (size_t)layer->n_kv_heads, t = i / (size_t)layer->n_kv_heads * per_unit;
        size_t at = kv_head * positions * item_bytes, q = t * s->q_stride + kv_head * group * head_dim;
        int n_now = (int)((size_t)n - t < per_unit ? (size_t)n - t : per_unit);
        Attention a = {
            .query = s->query + q, .out = s->attended + q, .stride = s->q_stride,
            .keys = (const char *)s->keys[l] + at * head_dim, .values = (const char *)s->values[l] + at * row,
            .cache_f32 = s->cache_f32, .group = (int)group, .n_queries = n_now * (int)group,
            .head_dim = head_dim, .row = row, .positions = positions, .position = (size_t)s->n_past + t,
            .window = layer->window ? (size_t)layer->window : SIZE_MAX, .scale = m->config.attention_scale,
            .cap = m->config.attention_cap,
            .queries = scratch, .sums = scratch + n_queries * row,
            .scores = scratch + 2 * n_queries * row, .score_stride = positions + 16,
        };
        attend_group(&a);
    }
}

// Queries and keys of all heads normalised at once, in models that do so (chapter 9).
static void normalise_heads(const Model *m, State *s, const Layer *layer, int n, Team team);

// What a token should know of those before it: x += W_o attention(W_q x, W_k x, W_v x)
static void attention_block(const Model *m, State *s, int l, int n, Team team) {
    const Layer *layer = &m->layers[l];
    const Config *c = &m->config;
    size_t head_dim = (size_t)c->head_dim, n_heads = (size_t)layer->n_heads, n_kv_heads = (size_t)layer->n_kv_heads;
    Activations input = normalise_stream(m, s, layer->attention_norm, layer->attention_norm_bias, 0, n, l, team);
    matmul(s->query, s->q_stride, &layer->query, layer->query_bias, &input, team);
    matmul(s->key, s->kv_stride, &layer->key, layer->key_bias, &input, team);
    matmul(s->value, s->kv_stride, &layer->value, layer->value_bias, &input, team);
    wait_for_team(team);

    if (c->wide_head_norms) normalise_heads(m, s, layer, n, team);
    const float *angles = s->angles + (layer->angles == LOCAL) * round_up((size_t)s->context, 16) * (size_t)c->rope_dim;
    Range heads = share((size_t)n * (n_heads + n_kv_heads), team);
    for (size_t i = heads.from; i < heads.to; i++) {
        size_t t = i / (n_heads + n_kv_heads), h = i % (n_heads + n_kv_heads), position = (size_t)s->n_past + t;
        float *head = h < n_heads ? s->query + t * s->q_stride + h * head_dim
                                  : s->key + t * s->kv_stride + (h - n_heads) * head_dim;
        const float *norm = c->wide_head_norms ? NULL : h < n_heads ? layer->query_norm : layer->key_norm;
        if (norm) kernels->normalise(head, head, norm, NULL, head_dim, c->norm_eps);
        if (layer->angles) kernels->rotate(head, angles + position * (size_t)c->rope_dim, c->rope_dim, c->pairing);
        if (h >= n_heads) remember(s, l, h - n_heads, head_dim, position, head, s->value + (head - s->key));
    }
    wait_for_team(team);

    attend(m, s, l, n, team);
    wait_for_team(team);
    input = prepare(s, s->attended, s->q_stride, NULL, n_heads * head_dim, n, team);
    Range rows = matmul(s->out, s->x_stride, &layer->attention_out, layer->attention_out_bias, &input, team);
    add_to_stream(m, s, rows, layer->attention_post_norm, n, team);
}

// Chooses the experts that each token visits (Shazeer et al., "Outrageously Large Neural Networks"), and prepares their
// input; the part of it that is expert e's; out += weight * what that one has made of it (chapter 9).
static Activations route(const Model *m, State *s, const Layer *layer, const Activations *x, int n, Team team);
static Activations visits(const State *s, size_t e, Activations all);
static void add_visits(State *s, const Activations *x, Range rows);

// What the model knows about a token: x += W_down (silu(W_gate x) * W_up x)
// Or, with experts, the sum of that over those that the token visits, each times its weight. An expert takes all its
// visitors of a batch at once, so that each of its weights is read once, if at all.
static void feed_forward_block(const Model *m, State *s, int l, int n, Team team) {
    const Layer *layer = &m->layers[l];
    size_t n_experts = (size_t)layer->n_experts, n_parts = n_experts ? n_experts : 1;
    Activations all = normalise_stream(m, s, layer->ffn_norm, layer->ffn_norm_bias, 0, n, l + 1, team);
    if (n_experts) all = route(m, s, layer, &all, n, team);
    for (size_t e = 0; e < n_parts; e++) {
        Activations x = n_experts ? visits(s, e, all) : all;
        if (!x.some) continue;
        float *gate = s->gate + x.first * s->ffn_stride, *up = s->up + x.first * s->ffn_stride;
        Range rows = matmul(gate, s->ffn_stride, &layer->gate, layer->gate_bias, &x, team);
        matmul(up, s->ffn_stride, &layer->up, layer->up_bias, &x, team);
        for (size_t i = rows.from, t = 0; t < x.some && rows.to > rows.from; t++, i += s->ffn_stride)
            kernels->activate(gate + i, up + i, rows.to - rows.from, (Activation)m->config.activation);
    }
    wait_for_team(team);
    all = prepare(s, s->gate, s->ffn_stride, NULL, (size_t)layer->ffn_dim, (int)all.n, team);
    Range rows = { 0, 0 };
    for (size_t e = 0; e < n_parts; e++) {
        Activations x = n_experts ? visits(s, e, all) : all;
        if (!x.some) continue;
        rows = matmul(n_experts ? s->expert_out : s->out, s->x_stride, &layer->down, layer->down_bias, &x, team);
        if (n_experts) add_visits(s, &x, rows);
    }
    add_to_stream(m, s, rows, layer->ffn_post_norm, n, team);
}

typedef struct {
    const Model *model;
    State *state;
    const int *tokens;
    int n, n_logits;
} ForwardJob;

static void forward_team(void *p, Team team) {
    ForwardJob *job = p;
    const Model *m = job->model;
    State *s = job->state;
    embed(m, s, job->tokens, share((size_t)job->n, team));
    wait_for_team(team);
    for (int l = 0; l < m->config.n_layers; l++) {
        attention_block(m, s, l, job->n, team);
        feed_forward_block(m, s, l, job->n, team);
    }
    if (job->n_logits == 0) return;
    int n = job->n_logits, first = job->n - n;
    Activations input = normalise_stream(m, s, m->final_norm, m->final_norm_bias, first, n, m->config.n_layers, team);
    Range rows = matmul(s->logits, s->logits_stride, &m->head, NULL, &input, team);
    float scale = m->config.logit_scale, cap = m->config.logit_cap;
    for (size_t t = 0; t < (size_t)n && (scale != 1 || cap > 0); t++) {
        for (size_t r = rows.from; r < rows.to; r++) {
            float *y = &s->logits[t * s->logits_stride + r];
            *y = cap > 0 ? cap_at(*y * scale, cap) : *y * scale;
        }
    }
}

// False, and the first position named, where a token's vector or its logits are not finite.
static bool check_finite(const Model *m, const State *s, int n, int n_logits, Error *e);  // chapter 9

// Sends n <= B tokens through the model, at the positions after those in the cache; leaves the logits of the last
// n_logits <= LOGITS_AT_ONCE of them in s->logits.      tokens (n)  logits (n_logits, logits_stride)
static bool forward(const Model *m, State *s, const int *tokens, int n, int n_logits, Error *e) {
    if (n > s->batch || n > s->context - s->n_past)
        return fail(e, NO_ROOM, "%d positions do not hold %d + %d", s->context, s->n_past, n);
    make_angles(m, s, s->n_past + n);
    memset(s->broken, 0, (size_t)n * sizeof *s->broken);
    ForwardJob job = { m, s, tokens, n, n_logits };
    run_team(times(s->work, (size_t)n) < 1000000 ? 1 : s->threads, forward_team, &job);
    if (!check_finite(m, s, n, n_logits, e)) return false;
    s->n_past += n;
    return true;
}

// Takes tokens into the cache in batches, with the logits of the last one.      tokens (n)
static bool prefill(const Model *m, State *s, const int *tokens, size_t n, Error *e) {
    double start = clock_seconds();
    for (size_t done = 0; done < n;) {
        size_t now = n - done < (size_t)s->batch ? n - done : (size_t)s->batch;
        if (interrupted) return fail(e, INTERRUPTED, "interrupted");
        if (!forward(m, s, tokens + done, (int)now, done + now == n, e)) return false;
        done += now;
        show_progress("prompt token", start, done, n);
    }
    return true;
}

/* ==== 6. Choosing a token ===========================================================================================
   The logits become probabilities, and one token is drawn: always the likeliest (temperature 0), or by chance. Lower
   temperatures sharpen the distribution; top-k, top-p and min-p cut off its tail, where a token is wrong more often
   than surprising. The generator of random numbers and top-p are llama2.c's, so that its seeds give its texts here. */

typedef struct { int id; float p; } Candidate;

typedef struct {
    float temperature;     // 0 = the likeliest token
    int top_k;             // 0 = off
    float top_p, min_p;    // 0 or 1 = off; 0 = off
    uint64_t random;       // the generator's state, never 0
    bool from_clock;       // nobody has given a seed
    Candidate *candidates; // (V)
} Sampler;

// A number in [0, 1): xorshift* (Marsaglia, "Xorshift RNGs"; Vigna, "An experimental exploration of ...").
static float flip_coin(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 0x2545F4914F6CDD1Du) >> 40) / 16777216.0f;
}

// The token with the highest logit, the lowest of several.      logits (n)
static int likeliest(const float *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) best = logits[i] > logits[best] ? i : best;
    return best;
}

// p = softmax(logits / temperature)      both (n)
static void make_probabilities(Candidate *c, const float *logits, int n, float temperature) {
    float max = logits[likeliest(logits, n)] / temperature, sum = 0.0f;
    for (int i = 0; i < n; i++) {
        c[i].id = i;
        c[i].p = exponential(logits[i] / temperature - max);
        sum += c[i].p;
    }
    for (int i = 0; i < n; i++) c[i].p /= sum;
}

// Candidates as a heap, the likeliest on top: c[i] sinks to where none below it is likelier; the top of *n candidates
// is moved to a place behind them (chapter 9).
static void sink(Candidate *c, size_t i, size_t n);
static void take_likeliest(Candidate *to, Candidate *heap, size_t *n);

// Cuts the tail off: returns how many of the n candidates are left and puts them, likeliest first, at the END of c,
// from its last place down, with their sum in *sum. Only what can be chosen gets sorted; the rest stays in the heap.
static size_t cut_tail(const Sampler *s, Candidate *c, size_t n, float *sum) {
    bool has_top_p = s->top_p > 0.0f && s->top_p < 1.0f;
    float total, cutoff = has_top_p && !s->top_k && n > 1 ? (1.0f - s->top_p) / (float)(n - 1) : 0.0f;
    size_t n_heap = 0, n_sorted = 0;
    for (size_t i = 0; i < n; i++) {  // a token below the cutoff cannot be among those that make up top_p
        if (c[i].p >= cutoff) c[n_heap++] = c[i];
    }
    if (n_heap == 0) n_heap = n;  // where top_p is below 1/n, no token may reach the cutoff
    for (size_t i = n_heap / 2; i-- > 0;) sink(c, i, n_heap);
    size_t limit = s->top_k && (size_t)s->top_k < n_heap ? (size_t)s->top_k : n_heap;
    bool both = has_top_p && s->top_k;  // then top-p is of what top-k has left
    for (total = both ? 0.0f : 1.0f; both && n_sorted < limit; total += c[n - n_sorted].p)
        take_likeliest(&c[n - ++n_sorted], c, &n_heap);
    *sum = 0.0f;
    for (size_t i = 1; i <= limit; i++) {
        if (i > n_sorted) take_likeliest(&c[n - i], c, &n_heap);
        if (c[n - i].p < s->min_p * c[n - 1].p) return i - 1;
        *sum += c[n - i].p;
        if (has_top_p && *sum > s->top_p * total) return i;
    }
    return limit;
}

// The next token, drawn from softmax(logits / temperature) as the sampler says.      logits (n)
static int choose_token(Sampler *s, const float *logits, int n) {
    int best = likeliest(logits, n);  // also the answer where logit / temperature is too large for a float
    if (s->temperature < 1e-30f || !isfinite(logits[best] / s->temperature)) return best;
    Candidate *c = s->candidates;
    make_probabilities(c, logits, n, s->temperature);
    float coin = flip_coin(&s->random), running = 0.0f, sum;
    bool cuts = s->top_k > 0 || s->min_p > 0.0f || (s->top_p > 0.0f && s->top_p < 1.0f);
    if (!cuts) {
        for (int i = 0;; i++) {
            running += c[i].p;
            if (i == n - 1 || coin < running) return i;  // rounding may leave the sum below the coin
        }
    }
    size_t n_left = cut_tail(s, c, (size_t)n, &sum);
    for (size_t i = 1;; i++) {
        running += c[(size_t)n - i].p;
        if (i == n_left || coin * sum < running) return c[(size_t)n - i].id;
    }
}

/* ==== 7. Generating and chatting ====================================================================================
   The loop around the forward pass: the prompt goes in, a token comes out, is printed, and goes in as the next one,
   until the model ends its text or there is no more room. A chat is the same loop with the words of both sides put
   into the form that the model was trained on, and with all that was said so far kept in the cache. */

// Some numbers, written "1,2,4".
typedef struct { int n, at[16]; } List;

// What the user asked for on the command line; chapter 11 fills it in.
typedef struct {
    const char *checkpoint, *mode, *prompt, *file, *ids, *tokenizer, *system, *template_name, *output;
    const char *cache, *kernel, *pre, *svg;
    double temperature, top_p, min_p;
    int64_t n_predict, top_k, context, batch, reps;
    List threads, pp, tg, depth;
    uint64_t seed, clock_seed;
    bool quiet, json, exact, no_echo, no_bos, ends, pieces, special, check, help, version;
} Options;

static Options options;

// Text on its way to stdout, which gets whole characters only: the bytes of one may come from several tokens.
typedef struct {
    char held[4];
    size_t n_held;
} Printer;

static void print_bytes(Printer *p, const char *bytes, size_t n);  // chapter 9

// Prints what a token adds to the text after the token before it.
static void print_token(const Model *m, Printer *p, int before, int token) {
    size_t n;
    const char *bytes = decode(&m->tokenizer, before, token, &n);
    print_bytes(p, bytes, n);
}

static void end_printing(Printer *p);  // also what is held, which was never completed, since nothing is to be lost

// How fast prompts went in and tokens came out. The first token of a text comes with its prompt's last pass.
typedef struct {
    size_t n_prompt, n_made, n_passes;
    double prompt_seconds, made_seconds;
} Speed;

static void tell_speed(const Model *m, const Speed *v);  // chapter 10
static void tell_seed(const Sampler *s);  // if the clock made it

typedef enum { AT_END_TOKEN, AT_LIMIT, AT_CONTEXT, AT_INTERRUPT } Stop;
static const char *const stop_names[] = { "at an end token", "at -n tokens", "at the context's end", "by Ctrl-C" };

// Generates from the logits of the last prompt token until it stops. *last is the token before, and in the end the one
// printed last, which the cache does not have if the limit or the context stopped it.
static bool generate(const Model *m, State *s, Sampler *sampler, int *last, Stop *why, Speed *speed, Error *e) {
    Printer printer = { .n_held = 0 };
    double start = clock_seconds();
    size_t n = 0, limit = options.n_predict < 0 ? SIZE_MAX : (size_t)options.n_predict;
    bool ok = true;
    *why = AT_LIMIT;
    while (ok && n < limit) {
        int token = choose_token(sampler, s->logits, m->config.n_tokens);
        *why = interrupted ? AT_INTERRUPT : is_end_token(&m->tokenizer, token) ? AT_END_TOKEN : AT_CONTEXT;
        if (*why != AT_CONTEXT) break;
        if (++n == limit) *why = AT_LIMIT;
        print_token(m, &printer, *last, token);
        fflush(stdout);
        *last = token;
        if (*why == AT_LIMIT || s->n_past == s->context || ferror(stdout)) break;
        ok = forward(m, s, &token, 1, 1, e);
        speed->n_passes++;
    }
    end_printing(&printer);
    speed->n_made += n;
    speed->made_seconds += clock_seconds() - start;
    return ok;
}

// Sends tokens through the model, if they fit, and counts the time.
static bool take_prompt(const Model *m, State *s, const int *tokens, size_t n, Speed *speed, Error *e) {
    size_t total = plus((size_t)s->n_past, n);
    if (total > (size_t)s->context)
        return fail(e, NO_ROOM, "the prompt needs %zu positions, the context has %d of the model's %d%s", total,
                    s->context, m->config.context, total <= (size_t)m->config.context ? "; see -c" : "");
    double start = clock_seconds();
    if (!prefill(m, s, tokens, n, e)) return false;
    speed->n_prompt += n;
    speed->prompt_seconds += clock_seconds() - start;
    return true;
}

static bool run_generate(const Model *m, State *s, Sampler *sampler, const Tokens *prompt, Error *e) {
    Speed speed = { 0 };
    Stop why;
    if (!take_prompt(m, s, prompt->ids, prompt->n, &speed, e)) return false;
    tell_seed(sampler);
    Printer printer = { .n_held = 0 };
    int last = -1;
    for (size_t i = 0; i < prompt->n; last = prompt->ids[i++]) {
        if (!options.no_echo) print_token(m, &printer, last, prompt->ids[i]);
    }
    end_printing(&printer);
    if (!generate(m, s, sampler, &last, &why, &speed, e)) return false;
    putchar('\n');
    fflush(stdout);
    if (!options.quiet) fprintf(stderr, "stopped %s\n", stop_names[why]);
    tell_speed(m, &speed);
    return why != AT_INTERRUPT || fail(e, INTERRUPTED, "interrupted");
}

// The form that a family of models was trained to chat in: what is put round a text of the system, the user, the model.
typedef struct ChatTemplate ChatTemplate;  // chapter 9

enum { MAX_SPANS = 8 };
static const ChatTemplate *choose_template(const Model *m, const char *name, Error *e);  // chapter 9, with the table

// What the model is to read before it answers, at most MAX_SPANS pieces of text; returns their number.
static int render_turn(const ChatTemplate *t, bool first, const char *system, const char *message, size_t n,
                       Span *spans);

// From stdin, without its end; false at the end of input, which is no failure, after Ctrl-C, or where reading failed.
static bool read_line(Buffer *line, Error *e);

// One answer: renders what is new (the end of the answer before and the message), lets the model read it, generates.
// *unread: tokens that the cache does not have yet: the begin token, the last one of an answer that was cut short.
static bool answer(const Model *m, State *s, Sampler *sampler, const ChatTemplate *t, Tokens *unread,
                   const char *message, size_t n_message, Speed *speed, Error *e) {
    Span spans[MAX_SPANS];
    size_t n_unread = unread->n;
    int n_past = s->n_past, last = -1;
    int n_spans = render_turn(t, n_past == 0, options.system, message, n_message, spans);
    Stop why = AT_INTERRUPT;
    bool ok = encode(&m->tokenizer, spans, n_spans, unread, e) &&
              take_prompt(m, s, unread->ids, unread->n, speed, e);
    unread->n = ok ? 0 : n_unread;
    ok = ok && generate(m, s, sampler, &last, &why, speed, e);
    if (last >= 0 && (why == AT_LIMIT || why == AT_CONTEXT)) ok = ok && emit(unread, last, e);
    if (!ok && e->status == INTERRUPTED) {  // Ctrl-C while it was reading: as if nothing had been said
        s->n_past = n_past;
        e->status = DONE;
        ok = true;
    }
    if (ok) putchar('\n');
    fflush(stdout);
    if (ok && why != AT_END_TOKEN && !options.quiet) fprintf(stderr, "[stopped %s]\n", stop_names[why]);
    if (ok && why == AT_INTERRUPT) interrupted = 0;
    return ok;
}

// Takes turns until the input ends (exit 0) or Ctrl-C comes at the prompt (130). Ctrl-C in an answer stops the answer.
static bool run_chat(const Model *m, State *s, Sampler *sampler, Error *e) {
    const ChatTemplate *t = choose_template(m, options.template_name, e);
    if (!t) return false;
    tell_seed(sampler);
    Buffer line = { 0 };
    Tokens unread = { 0 };
    Speed speed = { 0 };
    bool ok = !m->tokenizer.add_bos || emit(&unread, m->tokenizer.bos, e);
    const char *message = options.prompt;
    for (; ok && !ferror(stdout) && (message || read_line(&line, e)); message = NULL) {
        size_t n = message ? strlen(message) : line.n;
        ok = answer(m, s, sampler, t, &unread, message ? message : (const char *)line.bytes, n, &speed, e);
    }
    free(line.bytes);
    free(unread.ids);
    ok = ok && e->status == DONE;
    if (ok || e->status == NO_ROOM) tell_speed(m, &speed);
    return ok;
}

/* ==== 8. Number formats, and packing them into tiles ================================================================
   How other programs' files hold a row of weights, and how sixteen of their rows become tiles. No weight changes here:
   a tile holds the file's own integers and scales, only in another order. Then the kernels of plain C, and e^x. */

// What weights stand for: of IQ4_NL and IQ4_XS, places on a curve; of MXFP4, twice a float of 1 + 2 + 1 bits.
static const int8_t curve[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
static const int8_t small_floats[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

// To add a type: a row here, a branch in unpack_scales() if its header is new, its source in the table below, and its
// case in add_byte_tiles() for the kernels of the appendix.
static const TypeInfo types[N_TYPES] = {
    [F32] = { "f32", 32, 32, 0, 32, 0, false, NULL },
    [F16] = { "f16", 32, 32, 0, 16, 0, false, NULL },
    [BF16] = { "bf16", 32, 32, 0, 16, 0, false, NULL },
    [Q8] = { "q8", 32, 32, 32, 8, 0, false, NULL },           // header: f16 scale[16]
    [Q8F] = { "q8f", 32, 32, 64, 8, 0, false, NULL },         // f32 scale[16]
    [Q4] = { "q4", 32, 32, 32, 4, 8, false, NULL },
    [Q4M] = { "q4m", 32, 32, 64, 4, 0, true, NULL },          // f16 scale[16], f16 min[16]
    [Q5] = { "q5", 32, 32, 32, 5, 16, false, NULL },
    [Q5M] = { "q5m", 32, 32, 64, 5, 0, true, NULL },
    [Q2K] = { "q2k", 256, 16, 320, 2, 0, true, NULL },        // f16 d[16], f16 dmin[16], u8 scale and min[16][16]
    [Q3K] = { "q3k", 256, 16, 288, 3, 4, false, NULL },       // f16 d[16], i8 scale[16][16]
    [Q4K] = { "q4k", 256, 32, 320, 4, 0, true, NULL },        // f16 d[16], f16 dmin[16], i8 scale[8][16], u8 min[8][16]
    [Q5K] = { "q5k", 256, 32, 320, 5, 0, true, NULL },
    [Q6K] = { "q6k", 256, 16, 288, 6, 32, false, NULL },
    [IQ4NL] = { "iq4nl", 32, 32, 32, 4, 0, false, curve },
    [IQ4XS] = { "iq4xs", 256, 32, 160, 4, 0, false, curve },  // f16 d[16], i8 scale[8][16]
    [MXFP4] = { "mxfp4", 32, 32, 16, 4, 0, false, small_floats },  // u8 exponent[16]
};

// e^x by e^x = 2^n * e^r, n = x / ln 2 rounded, |r| <= ln 2 / 2, and e^r as a polynomial (error: at most 0.9 ulp).
// 0 below -87 and Inf above 88, so that 2^n stays a normal number; NaN stays NaN.
INLINE float exponential(float x) {
    float rounded = fmaf(x, 0x1.715476p+0f, ROUNDER), n = rounded - ROUNDER;
    float r = fmaf(n, -0x1.62e4p-1f, x);  // ln 2 in two parts: the first is short, so that its product is exact
    r = fmaf(n, -0x1.7f7d1cp-20f, r);
    float e = 0x1.6ac6b2p-10f;
    e = fmaf(e, r, 0x1.123de0p-7f);
    e = fmaf(e, r, 0x1.555858p-5f);
    e = fmaf(e, r, 0x1.55548cp-3f);
    e = fmaf(e, r, 0x1.fffffcp-2f);
    e = fmaf(e, r, 1.0f);
    e = fmaf(e, r, 1.0f);
    uint32_t bits = bits_of_float(e * float_of_bits((bits_of_float(rounded) + 127) << 23));
    uint32_t low = -(uint32_t)(x < -87.0f), high = -(uint32_t)(x > 88.0f);  // masks: gcc vectorises them, but not ?:
    return float_of_bits((bits & ~low & ~high) | (high & 0x7f800000));
}

// f16: 1 sign, 5 exponent, 10 fraction bits. Put where f32 has them, the exponent is 112 too small, which a
// multiplication mends, for subnormals too; the exponent 31 means Inf and NaN and becomes 255.
INLINE float float_of_half(uint16_t h) {
    uint32_t body = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t finite = bits_of_float(float_of_bits(body) * 0x1p112f);
    return float_of_bits(sign | (body >= 0x0f800000 ? body | 0x7f800000 : finite));
}

// To the nearest f16, ties to even. Below 2^-14 f16 is fixed point in steps of 2^-24, which adding 0.5f, whose last bit
// is 2^-24, rounds to; above, half a step less one, and one more if the last kept bit is odd, carries where it must.
INLINE uint16_t half_of_float(float x) {
    uint32_t u = bits_of_float(x), sign = u >> 16 & 0x8000, body = u & 0x7fffffff;
    uint32_t small = bits_of_float(float_of_bits(body) + 0.5f) - 0x3f000000;
    uint32_t normal = (body - 0x38000000 + 0xfff + (body >> 13 & 1)) >> 13;
    uint32_t half = body < 0x38800000 ? small : normal;
    half = body >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more
    half = body > 0x7f800000 ? 0x7e00 : half;   // NaN
    return (uint16_t)(sign | half);
}

INLINE void widen_floats(float *to, const uint16_t *from, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = float_of_half(from[i]);
}

INLINE void narrow_floats(uint16_t *to, const float *from, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = half_of_float(from[i]);
}

INLINE float float_of_bfloat(uint16_t b) { return float_of_bits((uint32_t)b << 16); }

// n weights of a tile of floats.
INLINE void load_weights(float *w, Type type, const void *from, size_t n, Widen *widen) {
    const uint16_t *half = from;
    if (type == F32) memcpy(w, from, n * sizeof *w);
    else if (type == F16) widen(w, half, n);
    else for (size_t i = 0; i < n; i++) w[i] = float_of_bfloat(half[i]);
}

// y = w x for one token and the rows of `n` row tiles, whose chains run side by side.
INLINE void multiply_some(float *y, Type type, const unsigned char *tiles, size_t cols, const float *x, size_t n,
                          Widen *widen) {
    _Alignas(64) float sum[4][16] = { { 0 } }, w[16];
    size_t col_bytes = 2 * (size_t)types[type].bits;
    for (size_t c = 0; c < cols; c++) {
        for (size_t i = 0; i < n; i++) {
            const void *from = tiles + (i * cols + c) * col_bytes;
            const float *v = type == F32 ? from : w;  // a copy would be stored in halves, and read whole has to wait
            if (type != F32) load_weights(w, type, from, 16, widen);
#pragma GCC unroll 1  // gcc 12 makes no SIMD of what it has unrolled
            for (int r = 0; r < 16; r++) sum[i][r] = fmaf(v[r], x[c], sum[i][r]);
        }
    }
    memcpy(y, sum, n * sizeof *sum);
}

// y = w x for one token and the rows of some tiles of floats, in which the columns simply follow each other
INLINE void multiply_vector(float *y, Type type, const unsigned char *tiles, size_t n_rows, size_t cols, const float *x,
                            Widen *widen) {
    size_t row_bytes = cols * 2 * (size_t)types[type].bits, row = 0;
    for (; row + 4 <= n_rows; row += 4) multiply_some(y + row * 16, type, tiles + row * row_bytes, cols, x, 4, widen);
    for (; row < n_rows; row++) multiply_some(y + row * 16, type, tiles + row * row_bytes, cols, x, 1, widen);
}

// Four bytes as one number.
INLINE uint32_t load_four(const void *p) {
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

typedef void LookUp(uint8_t *w, size_t n, const int8_t values[16]);  // w = values[w], in place

INLINE void look_up_bytes(uint8_t *w, size_t n, const int8_t values[16]) {
    for (size_t i = 0; i < n; i++) w[i] = (uint8_t)values[w[i]];
}

// So many bits of a byte, from number `from` on, moved to number `to` of the result.
INLINE int move_bits(uint8_t byte, int bits, int from, int to) {
    return (from > to ? byte >> (from - to) : byte << (to - from)) & ((1 << bits) - 1) << to;
}

// The stored weights of 32 columns as bytes, four columns of the 16 rows in each w[g].
INLINE void unpack_planes(uint8_t w[8][64], int bits, const uint8_t *plane) {
    const uint8_t *pairs = plane + (bits & 4 ? 256 : 0), *singles = pairs + (bits & 2 ? 128 : 0);
    int low = bits & 4, lower = bits & 6;  // bits below the pair's, and below the single one
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        for (int j = 0; j < 64; j++) {
            int x = bits == 8 ? plane[64 * g + j] : 0;
            if (bits & 4) x = move_bits(plane[64 * (g % 4) + j], 4, g / 4 * 4, 0);
            if (bits & 2) x |= move_bits(pairs[64 * (g / 4) + j], 2, g % 4 * 2, low);
            if (bits & 1) x |= move_bits(singles[j], 1, g, lower);
            w[g][j] = (uint8_t)x;
        }
    }
}

typedef void ScaleSixteen(float y[16], const float x[16], const int8_t factor[16]);  // y = x * factor

INLINE void scale_floats(float y[16], const float x[16], const int8_t factor[16]) {
    for (int i = 0; i < 16; i++) y[i] = x[i] * (float)factor[i];
}

// The scales and minima of a block: of its 32 columns, or of 16 and 16.
INLINE void unpack_scales(float scale[2][16], float min[2][16], Type type, const unsigned char *tile, int part,
                          Widen *widen, ScaleSixteen *scale_sixteen) {
    const TypeInfo *i = &types[type];
    const uint8_t *narrow = tile + (i->has_min ? 64 : 32) + part * (BLOCK / i->per_scale) * 16;  // of 256 columns
    float d[16], dmin[16];
    if (type == Q8F) memcpy(d, tile, sizeof d);
    else if (type == MXFP4)  // 2^(e - 128), since the values are doubled
        for (int r = 0; r < 16; r++) d[r] = float_of_bits(tile[r] < 2 ? 0x200000u << tile[r] : (tile[r] - 1u) << 23);
    else widen(d, (const void *)tile, 16);
    if (i->has_min) widen(dmin, (const void *)(tile + 32), 16);
    for (int h = 0; h < BLOCK / i->per_scale; h++, narrow += 16) {
        if (i->cols == 32) memcpy(scale[h], d, sizeof d);
        if (i->cols == 32 && i->has_min) memcpy(min[h], dmin, sizeof dmin);
        if (i->cols == 32) continue;
        _Alignas(16) int8_t factors[2][16];
        memcpy(factors[0], narrow, 16);
        if (i->has_min && type != Q2K) memcpy(factors[1], narrow + 128, 16);
#pragma GCC unroll 1  // gcc 12 makes no SIMD of what it has unrolled
        for (int r = 0; r < 16 && type == Q2K; r++) {
            factors[0][r] = narrow[r] & 15;
            factors[1][r] = (int8_t)(narrow[r] >> 4);
        }
        scale_sixteen(scale[h], d, factors[0]);
        if (!i->has_min) continue;
        scale_sixteen(min[h], dmin, factors[1]);
        for (int r = 0; r < 16; r++) min[h][r] = -min[h][r];
    }
}

// Where the tile is that has the block, and the block's weights in it.
INLINE const unsigned char *tile_of(Type type, const unsigned char *tiles, size_t block) {
    return tiles + block * 32 / (size_t)types[type].cols * tile_bytes(type);
}

INLINE const unsigned char *weights_of(Type type, const unsigned char *tile, size_t block) {
    return tile + types[type].header + block % ((size_t)types[type].cols / 32) * 64 * (size_t)types[type].bits;
}

INLINE void unpack(UnpackedBlock *u, Type type, const unsigned char *tiles, size_t block) {
    const unsigned char *tile = tile_of(type, tiles, block), *weights = weights_of(type, tile, block);
    _Alignas(64) uint8_t q[8][64];
    unpack_scales(u->scale, u->min, type, tile, (int)(block % ((size_t)types[type].cols / 32)), widen_floats,
                  scale_floats);
    switch (types[type].bits) {  // a loop of its own for each
    case 2: unpack_planes(q, 2, weights); break;
    case 3: unpack_planes(q, 3, weights); break;
    case 4: unpack_planes(q, 4, weights); break;
    case 5: unpack_planes(q, 5, weights); break;
    case 6: unpack_planes(q, 6, weights); break;
    default: unpack_planes(q, 8, weights); break;
    }
    if (types[type].values) look_up_bytes(q[0], 512, types[type].values);
    for (int g = 0; g < 8; g++) {
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 4; c++) u->w[4 * g + c][r] = (int8_t)(q[g][4 * r + c] - types[type].offset);
    }
}

// The weights of 32 columns in float, dequantised by the operations of gguf-py, in their order.
INLINE void dequantise(float w[32][16], Type type, const unsigned char *tiles, size_t block, Widen *widen) {
    UnpackedBlock u;
    if (is_quantised(type)) unpack(&u, type, tiles, block);
    else load_weights(w[0], type, tile_of(type, tiles, block), 512, widen);
    for (int c = 0; c < 32 && is_quantised(type); c++) {
        int half = c / types[type].per_scale;
        for (int r = 0; r < 16; r++) w[c][r] = u.w[c][r] * u.scale[half][r];
        for (int r = 0; types[type].has_min && r < 16; r++) w[c][r] += u.min[half][r];
    }
}

// The innermost loops compiled for the instruction set that `target` names, four of them from its own leaves.
#define MAKE_KERNELS(set, target, name, add_tiles_of, add_products_of, widen_of, narrow_of, peak_of)                   \
    target void set##_add_tiles(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks,               \
                                const Block *x, size_t n_all, int n) {                                                 \
        add_tiles_of(sum, type, tiles, n_blocks, x, n_all, n);                                                         \
    }                                                                                                                  \
    target void set##_add_products(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b,          \
                                   bool half, size_t b_stride, int m, int depth) {                                     \
        if (half) add_products_of(c, c_stride, a, a_stride, b, true, b_stride, m, depth);                              \
        else add_products_of(c, c_stride, a, a_stride, b, false, b_stride, m, depth);                                  \
    }                                                                                                                  \
    target void set##_multiply_vector(float *y, Type type, const unsigned char *tiles, size_t n_rows, size_t cols,     \
                                      const float *x) {                                                                \
        if (type == F32) multiply_vector(y, F32, tiles, n_rows, cols, x, widen_of);                                    \
        else if (type == F16) multiply_vector(y, F16, tiles, n_rows, cols, x, widen_of);                               \
        else multiply_vector(y, BF16, tiles, n_rows, cols, x, widen_of);                                               \
    }                                                                                                                  \
    target void set##_dequantise(float w[32][16], Type type, const unsigned char *tiles, size_t block) {               \
        dequantise(w, type, tiles, block, widen_of);                                                                   \
    }                                                                                                                  \
    target void set##_narrow(uint16_t *to, const float *from, size_t n) { narrow_of(to, from, n); }                    \
    target void set##_round(Block *blocks, const float *x, size_t stride, size_t cols, size_t n, Range r) {            \
        round_vectors(blocks, x, stride, cols, n, r);                                                                  \
    }                                                                                                                  \
    target bool set##_normalise(float *y, const float *x, const float *w, const float *bias, size_t dim, float eps) {  \
        return apply_norm(y, x, w, bias, dim, eps);                                                                    \
    }                                                                                                                  \
    target void set##_rotate(float *h, const float *angle, int n, Pairing p) { rotate(h, angle, n, p); }               \
    target float set##_exponentiate(float *p, size_t from, size_t n, float scale, float cap) {                         \
        return exponentiate(p, from, n, scale, cap);                                                                   \
    }                                                                                                                  \
    target void set##_activate(float *gate, const float *up, size_t n, Activation a) { activate(gate, up, n, a); }     \
    target void set##_read(const uint64_t *memory, size_t n) { read_memory(memory, n); }                               \
    static const Kernels set = { name, set##_add_tiles, set##_add_products, set##_multiply_vector, set##_dequantise,   \
                                 set##_narrow, set##_round, set##_normalise, set##_rotate, set##_exponentiate,         \
                                 set##_activate, peak_of, set##_read };

// Reads n numbers and keeps nothing of them but a sum.
INLINE void read_memory(const uint64_t *memory, size_t n) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += memory[i];
    volatile uint64_t kept = sum;
    (void)kept;
}

// One multiply-add at a time, in float: the scalar loops multiply whole numbers as floats, too.
static double peak_scalar(bool int8, size_t rounds) {
    volatile float sum = int8;
    for (size_t i = 0; i < rounds; i++) sum = fmaf(sum, 0.5f, 0.5f);
    return 2.0 * (double)rounds;
}

MAKE_KERNELS(scalar, static, "scalar", add_tiles, add_products, widen_floats, narrow_floats, peak_scalar)

// A matrix as a file has it: rows of blocks, one after the other.
typedef struct SourceType SourceType;
typedef struct {
    const SourceType *type;
    size_t rows, cols;
    const unsigned char *data, *scales;  // scales: llama2.c's int8 groups have theirs apart, else NULL
    size_t group;                        // weights that share one of those
} Source;

// Fills one tile: `rows` of its 16 rows, of which row 0 is the source's row `row`, and the columns from `col` on. The
// tile comes as zeros, which are what the padding must be.
typedef void PackTile(void *tile, const Source *s, size_t row, size_t rows, size_t col);

struct SourceType {
    const char *name;
    int gguf_id;  // -1: GGUF has no such type
    size_t block_cols, block_bytes;
    Type tile;
    PackTile *pack;
    // Where in a block of quantised weights things are: the scale in 16 bits, with the minimum behind it if there is
    // one; the smaller scales of 256 columns; the weights' lowest 8, 4 or 2 bits; the one or two above them. Of either,
    // the first `run` weights have theirs in a byte each, the next `run` above these, until the bytes are full.
    int scale_at, scales_at, low_at, low_run, high_at, high_run;
};

static size_t source_row_bytes(const Source *s) {
    return times(s->cols / s->type->block_cols, s->type->block_bytes);
}

// Bytes of the source's rows (without scales that lie apart).
static size_t source_bytes(const Source *s) {
    return times(s->rows, source_row_bytes(s));
}

static const unsigned char *source_block(const Source *s, size_t row, size_t col) {
    return s->data + row * source_row_bytes(s) + col / s->type->block_cols * s->type->block_bytes;
}

static void pack_floats(void *tile, const Source *s, size_t row, size_t rows, size_t col) {
    size_t cols = s->cols - col < 32 ? s->cols - col : 32;
    for (size_t r = 0; r < rows; r++) {
        const unsigned char *from = source_block(s, row + r, col);
        for (size_t c = 0; c < cols; c++) memcpy((float *)tile + 16 * c + r, from + 4 * c, 4);
    }
}

// Floats of 16 bits, from two rows at once: half as many stores.
static void pack_halves(void *tile, const Source *s, size_t row, size_t rows, size_t col) {
    static const uint16_t zeros[32];
    size_t cols = s->cols - col < 32 ? s->cols - col : 32;
    for (size_t r = 0; r < rows; r += 2) {
        const uint16_t *a = (const void *)source_block(s, row + r, col);
        const uint16_t *b = r + 1 < rows ? a + s->cols : zeros;
        for (size_t c = 0; c < cols; c++) {
            uint32_t pair = a[c] | (uint32_t)b[c] << 16;
            memcpy((uint16_t *)tile + 16 * c + r, &pair, sizeof pair);
        }
    }
}

// Moves so many bits of each weight of 32 columns, `first` the first of them, to their plane of the tile, in which four
// columns are neighbours, too.      to: the plane  from: the first of some rows      Sources: ggml-quants.c
INLINE void pack_plane_by(unsigned char *to, const unsigned char *from, size_t row_bytes, size_t rows, unsigned bits,
                          unsigned run, unsigned first) {
    unsigned per_byte = 8 / bits, shift = first / run % per_byte * bits;
    uint32_t mask = 0x01010101u * (255u >> (8 - bits));
    from += first / (run * per_byte) * run + first % run;
    for (; rows > 0; rows--, to += 4, from += row_bytes) {
        for (unsigned i = 0; i < bits; i++) {
            uint32_t all = 0;
            for (unsigned j = 0; j < per_byte; j++) {
                unsigned c = 4 * (bits == 2 ? 4 * i + j : i + bits * j);
                uint32_t four = run > 1 ? load_four(from + c % run) >> (shift + c / run * bits)
                                        : (load_four(from) >> c & 15) * 0x00204081u;  // bit j of the four to byte j
                all |= (four & mask) << j * bits;
            }
            memcpy(to + 64 * i, &all, sizeof all);
        }
    }
}

// A loop of its own for each way that there is: divisions by what is not known would take most of the time.
static void pack_plane(unsigned char *to, const unsigned char *from, size_t row_bytes, size_t rows, int bits, int run,
                       unsigned first) {
    if (bits == 8) pack_plane_by(to, from, row_bytes, rows, 8, 32, first);
    else if (bits == 4 && run == 16) pack_plane_by(to, from, row_bytes, rows, 4, 16, first);
    else if (bits == 4 && run == 32) pack_plane_by(to, from, row_bytes, rows, 4, 32, first);
    else if (bits == 4) pack_plane_by(to, from, row_bytes, rows, 4, 64, first);
    else if (bits == 2) pack_plane_by(to, from, row_bytes, rows, 2, 32, first);
    else pack_plane_by(to, from, row_bytes, rows, 1, run == 1 ? 1 : 32, first);
}

// Scale i of a row of 256 columns, as it is stored in a tile; from 8 on the minima of Q4_K and Q5_K. Both have 6 bits
// there, whose upper two stand apart for the last four; Q3_K and IQ4_XS have 6 bits for scales less 32.
static uint8_t narrow_scale(Type type, const unsigned char *s, int i) {
    const unsigned char *k = s + i % 4 + i / 8 * 4;
    switch (type) {
    case Q3K: return (uint8_t)((s[i % 8] >> i / 8 * 4 & 15) + (s[8 + i % 4] >> i / 4 * 2 & 3) * 16 - 32);
    case IQ4XS: return (uint8_t)((s[2 + i / 2] >> i % 2 * 4 & 15) + (s[i / 4] >> i % 4 * 2 & 3) * 16 - 32);
    case Q4K:
    case Q5K: return i % 8 < 4 ? *k & 63 : (s[8 + i % 4] >> i / 8 * 4 & 15) | *k >> 6 << 4;
    default: return s[i];
    }
}

static void pack_blocks(void *tile, const Source *s, size_t row, size_t rows, size_t col) {
    const SourceType *t = s->type;
    const TypeInfo *info = &types[t->tile];
    const unsigned char *block = source_block(s, row, col), *from = block;
    size_t row_bytes = source_row_bytes(s);
    uint16_t *scales = tile;
    uint8_t(*narrow)[16] = (void *)(scales + (info->has_min ? 32 : 16)), *to = (uint8_t *)tile + info->header;
    for (size_t r = 0; r < rows; r++, from += row_bytes) {
        if (t->tile == MXFP4) ((uint8_t *)tile)[r] = from[0];
        else memcpy(&scales[r], from + t->scale_at, 2);
        if (info->has_min) memcpy(&scales[16 + r], from + t->scale_at + 2, 2);
        for (int i = 0; narrow[i] < to; i++) narrow[i][r] = narrow_scale(t->tile, from + t->scales_at, i);
    }
    for (unsigned c = 0; c < (unsigned)info->cols; c += 32) {
        for (int bits = 8; bits; bits /= 2) {
            bool is_low = info->bits < 2 * bits;
            if (!(info->bits & bits)) continue;
            pack_plane(to, block + (is_low ? t->low_at : t->high_at), row_bytes, rows, bits,
                       is_low ? t->low_run : t->high_run, c);
            to += 64 * bits;
        }
    }
}

// llama2.c's v2: all int8 weights of a matrix, then a float for every group of them.
static void pack_groups(void *tile, const Source *s, size_t row, size_t rows, size_t col) {
    for (size_t r = 0; r < rows; r++) {
        size_t i = (row + r) * s->cols + col;
        memcpy((char *)tile + 4 * r, s->scales + i / s->group * 4, 4);
        for (size_t g = 0; g < 8; g++) memcpy((char *)tile + 64 + 64 * g + 4 * r, s->data + i + 4 * g, 4);
    }
}

// The formats that files may hold. To add one: a block and a function above, and a row here; the tile is chapter 4's.
static const SourceType source_types[] = {
    { "F32", 0, 1, 4, F32, pack_floats, 0, 0, 0, 0, 0, 0 },
    { "F16", 1, 1, 2, F16, pack_halves, 0, 0, 0, 0, 0, 0 },
    { "BF16", 30, 1, 2, BF16, pack_halves, 0, 0, 0, 0, 0, 0 },
    { "Q8_0", 8, 32, 34, Q8, pack_blocks, 0, 0, 2, 32, 0, 0 },
    { "Q4_0", 2, 32, 18, Q4, pack_blocks, 0, 0, 2, 16, 0, 0 },
    { "Q4_1", 3, 32, 20, Q4M, pack_blocks, 0, 0, 4, 16, 0, 0 },
    { "Q5_0", 6, 32, 22, Q5, pack_blocks, 0, 0, 6, 16, 2, 1 },
    { "Q5_1", 7, 32, 24, Q5M, pack_blocks, 0, 0, 8, 16, 4, 1 },
    { "Q2_K", 10, 256, 84, Q2K, pack_blocks, 80, 0, 16, 32, 0, 0 },
    { "Q3_K", 11, 256, 110, Q3K, pack_blocks, 108, 96, 32, 32, 0, 32 },
    { "Q4_K", 12, 256, 144, Q4K, pack_blocks, 0, 4, 16, 32, 0, 0 },
    { "Q5_K", 13, 256, 176, Q5K, pack_blocks, 0, 4, 48, 32, 16, 32 },
    { "Q6_K", 14, 256, 210, Q6K, pack_blocks, 208, 192, 0, 64, 128, 32 },
    { "IQ4_NL", 20, 32, 18, IQ4NL, pack_blocks, 0, 0, 2, 16, 0, 0 },
    { "IQ4_XS", 23, 256, 136, IQ4XS, pack_blocks, 0, 2, 8, 16, 0, 0 },
    { "MXFP4", 39, 32, 17, MXFP4, pack_blocks, 0, 0, 1, 16, 0, 0 },
    { "int8 groups", -1, 32, 32, Q8F, pack_groups, 0, 0, 0, 0, 0, 0 },
};
enum { N_SOURCE_TYPES = sizeof source_types / sizeof *source_types };
enum { SOURCE_F32 = 0, SOURCE_GROUPS = N_SOURCE_TYPES - 1 };

// Makes row tiles `range` of a matrix from its source.
static void pack_rows(unsigned char *tiles, const Source *s, Range range) {
    size_t tile_cols = (size_t)types[s->type->tile].cols, n_tiles = round_up(s->cols, tile_cols) / tile_cols;
    size_t n_bytes = tile_bytes(s->type->tile);
    for (size_t i = range.from; i < range.to; i++) {
        size_t row = i * TILE_ROWS, rows = s->rows - row < TILE_ROWS ? s->rows - row : TILE_ROWS;
        for (size_t c = 0; c < n_tiles; c++) {
            unsigned char *tile = tiles + (i * n_tiles + c) * n_bytes;
            if (rows < TILE_ROWS || (c + 1) * tile_cols > s->cols) memset(tile, 0, n_bytes);
            s->type->pack(tile, s, row, rows, c * tile_cols);
        }
    }
}

// The first row of a row tile that has a weight or, if it is quantised, a scale which is not finite; or 16. One is not
// if its bits, without the sign and moved to the top of 32, reach the limit: then the sum here has the top bit.
static size_t broken_row(const Tensor *w, const unsigned char *tiles) {
    Type type = w->type;
    size_t n = !is_quantised(type) ? 32 : types[type].has_min ? 2 : 1, row = 0;  // numbers of each row
    uint32_t sum[16] = { 0 }, limit = type == F32 || type == BF16 ? 0x7f800000 : 0x7c000000;
    if (type == MXFP4) limit = 253 << 23;  // of its exponents; the largest weight is 12 * 2^(e - 128)
    for (const unsigned char *p = tiles, *end = p + row_tile_bytes(w); p < end; p += tile_bytes(type)) {
        for (size_t i = 0; i < 16 * n; i += 16) {
            for (size_t r = 0; r < 16; r++) {
                uint32_t x = type == MXFP4 ? (uint32_t)p[r] << 23
                           : type == F32 || type == Q8F ? ((const uint32_t *)(const void *)p)[i + r]
                                                        : (uint32_t)((const uint16_t *)(const void *)p)[i + r] << 16;
                sum[r] |= (x & 0x7fffffff) + (0x80000000 - limit);
            }
        }
    }
    while (row < TILE_ROWS && !(sum[row] >> 31)) row++;
    return row;
}

/* ==== 9. Opening a checkpoint =======================================================================================
   Three kinds of file are read: cria's own, GGUF, and llama2.c's. Each parser turns bytes into a configuration and a
   directory of the tensors that the file claims to have, and believes nothing: lengths go through the cursor, counts
   are held against the bytes that are left. Then one function, bind_model(), derives from the configuration which
   tensors the model must have and demands each of them once, with its shape and an allowed type, inside the file,
   overlapping no other. Only there does a pointer into the file become a weight. */

// ---- The operating system ----

// Zeroed pages that cost no memory before they are touched: a long context is paid for only as far as it is used. What
// will be used whole is refused by the system if it is more than the machine has.
static void *map_memory(size_t n_bytes, bool whole, Error *e) {
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | (whole ? 0 : MAP_NORESERVE);
    void *p = mmap(NULL, n_bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (p != MAP_FAILED) return p;
    fail(e, NO_MEMORY, "no memory for %zu MiB", (n_bytes >> 20) + 1);
    return NULL;
}

// Asks for pages of 2 MB in place of 4 kB for memory that will be used whole: a processor finds few hundred pages'
// addresses without a look-up, and reading memory in order is half as fast again where it needs none.
static void use_large_pages(const void *p, size_t n_bytes) {
#ifdef MADV_HUGEPAGE
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), begin = (uintptr_t)p / page * page;
    madvise((void *)begin, (uintptr_t)p + n_bytes - begin, MADV_HUGEPAGE);  // where there are none, it is only slower
#else
    (void)p, (void)n_bytes;
#endif
}

// What kind of failure errno is.
static int io_status(void) { return errno == ENOMEM ? NO_MEMORY : BROKEN_IO; }

static bool map_file(const char *path, Map *map, Error *e) {
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // O_NONBLOCK: a pipe without a writer must not hang us
    bool is_broken = errno == EIO || errno == EMFILE || errno == ENFILE;  // and not only not there, or not ours
    if (file < 0 && strstr(path, "://"))
        return refuse(e, "an address, not a file; download it first: curl -LO %s", path);
    if (file < 0) return fail(e, is_broken ? BROKEN_IO : BAD_FILE, "%s", strerror(errno));
    struct stat info;
    void *p = MAP_FAILED;
    if (fstat(file, &info)) fail(e, BROKEN_IO, "%s", strerror(errno));
    else if (!S_ISREG(info.st_mode))
        refuse(e, "a directory, a pipe or a device, expected a checkpoint; export_model.py converts folders");
    else if (info.st_size == 0) refuse(e, "an empty file, expected a checkpoint");
    else if ((p = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, file, 0)) == MAP_FAILED)
        fail(e, io_status(), "cannot be mapped: %s", strerror(errno));
    close(file);
    if (p == MAP_FAILED) return false;
    *map = (Map){ p, (size_t)info.st_size, path };
    use_large_pages(p, map->n_bytes);
    return true;
}

// Says in which part of a split GGUF something went wrong.
static bool in_part(size_t part, Error *e) {
    Error told = *e;
    return fail(e, told.status, "part %zu: %.300s", part, told.text);
}

// Maps a file or, of a split GGUF (NAME-00001-of-00003.gguf), all parts, whichever of them is named.
static bool map_parts(const char *path, Model *m, Error *e) {
    size_t n = strlen(path), prefix = n > 20 ? n - 20 : 0;
    unsigned part = 0, parts = 0;
    char again[32];
    sscanf(path + prefix, "-%5u-of-%5u.gguf", &part, &parts);
    snprintf(again, sizeof again, "-%05u-of-%05u.gguf", part, parts);
    if (strcmp(path + prefix, again) || part - 1 >= parts) return map_file(path, &m->file, e);
    char *name = allocate(n + 1, 1, e);
    bool ok = name && (m->parts = allocate(parts, sizeof *m->parts, e));
    for (part = 1; ok && part <= parts; part++) {
        snprintf(name, n + 1, "%.*s-%05u-of-%05u.gguf", (int)prefix, path, part, parts);
        Map *map = part == 1 ? &m->file : &m->parts[part - 2];
        ok = map_file(name, map, e) || in_part(part, e);
        if (ok) m->n_parts = part - 1, map->path = path;
    }
    free(name);
    return ok;
}

static bool append(Buffer *b, const void *from, size_t n, Error *e) {
    size_t needed = plus(b->n, n);
    if (needed > b->capacity) {
        size_t capacity = needed > SIZE_MAX / 2 ? needed : needed * 2;
        unsigned char *bytes = realloc(b->bytes, capacity);
        if (!bytes) return fail(e, NO_MEMORY, "no memory for %zu bytes", needed);
        b->bytes = bytes;
        b->capacity = capacity;
    }
    if (from) memcpy(b->bytes + b->n, from, n);
    else memset(b->bytes + b->n, 0, n);
    b->n = needed;
    return true;
}

// The bytes of a file, or of stdin, to its end or to more than `most`. The caller frees b->bytes.
static bool read_all(const char *path, size_t most, Buffer *b, Error *e) {
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) return fail(e, io_status(), "%s: %s", path, strerror(errno));
    char chunk[4096];
    bool ok = true;
    while (ok && !feof(f) && !ferror(f) && b->n <= most) {  // a terminal's end comes only once
        size_t n = fread(chunk, 1, sizeof chunk, f);
        ok = n == 0 || append(b, chunk, n, e);
    }
    if (ok && ferror(f)) ok = fail(e, BROKEN_IO, "%s: reading failed: %s", path, strerror(errno));
    if (f != stdin) fclose(f);
    return ok;
}

// The processors that this process may use, or only the physical cores: a core's second thread shares its arithmetic.
static int count_cores(bool physical) {
    long n = 0;
#if defined(_OPENMP) && defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed)) CPU_ZERO(&allowed);
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        char path[80];
        int first = cpu;  // of the threads of its core
        if (!CPU_ISSET(cpu, &allowed)) continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        FILE *f = physical ? fopen(path, "r") : NULL;
        if (f && fscanf(f, "%d", &first) != 1) first = cpu;
        if (f) fclose(f);
        n += first == cpu || !CPU_ISSET(first, &allowed);
    }
#endif
#ifdef _OPENMP
    if (n == 0) n = sysconf(_SC_NPROCESSORS_ONLN);
#endif
    (void)physical;
    return n > 0 && n <= 1024 ? (int)n : 1;
}

// Where the threads of a team wait for each other: the last one to come opens it.
typedef struct Gate { atomic_uint arrived, round; } Gate;

#ifdef _OPENMP
// Each thread starts the next and waits for its end, so that all are there at once. *left: how many are still to come.
static void *start_next(void *left) {
    pthread_t next;
    if (--*(int *)left > 0 && pthread_create(&next, NULL, start_next, left) == 0) pthread_join(next, NULL);
    return NULL;
}

// Of so many threads, those that can work. OpenMP ends the program where it cannot start one (ulimit -u), so this finds
// out first; and it gives them what stack OMP_STACKSIZE says: where that is too little, one thread has to do.
static int usable_threads(int threads) {
    enum { STACK = 48 << 10 };  // bytes: clang -O0 needs 36,000
    int left = threads;
    atomic_bool cramped = false;
    start_next(&left);
#ifdef __GLIBC__
#pragma omp parallel num_threads(threads - left)
    {
        pthread_attr_t own;
        size_t size = STACK;
        if (omp_get_thread_num() && pthread_getattr_np(pthread_self(), &own) == 0)
            cramped |= pthread_attr_getstacksize(&own, &size) || pthread_attr_destroy(&own) || size < STACK;
    }
#endif
    int usable = cramped ? 1 : threads - left;
    if (usable < threads && !options.quiet) fprintf(stderr, "-j %d: only %d can work here\n", threads, usable);
    return usable;
}
#endif

static void run_team(int threads, void (*work)(void *job, Team team), void *job) {
    Gate gate = { 0 };
#ifdef _OPENMP
    static int asked_for = 1, usable = 1;
    if (threads > asked_for) usable = usable_threads(asked_for = threads);
    threads = threads < usable ? threads : usable;
#pragma omp parallel num_threads(threads)
    work(job, (Team){ omp_get_thread_num(), omp_get_num_threads(), &gate });
#else
    (void)threads;
    work(job, (Team){ 0, 1, &gate });
#endif
}

// They wait awake, since it takes less than a microsecond. But where another program has got the processor of one of
// them, the others had better sleep than keep that program off their own.
static void wait_for_team(Team team) {
    enum { EAGER = 5000, PATIENCE = 6000 };  // looks; the first ones take some microseconds, all of them a millisecond
    unsigned round = atomic_load(&team.gate->round);
    if (atomic_fetch_add(&team.gate->arrived, 1) + 1 == (unsigned)team.threads) {
        atomic_store(&team.gate->arrived, 0);
        atomic_store(&team.gate->round, round + 1);
    }
    for (int i = 0; atomic_load(&team.gate->round) == round; i += i <= PATIENCE) {
        if (i > PATIENCE) nanosleep(&(struct timespec){ .tv_nsec = 1000 }, NULL);
        else if (i > EAGER) sched_yield();
    }
}

static double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void show_progress(const char *what, double start, size_t done, size_t total) {
    if (options.quiet || clock_seconds() - start < 0.5 || !isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r%s %zu/%zu%s", what, done, total, done == total ? "\r\033[K" : "");
}

// Sets a signal's handler, unless whoever started us wants the signal ignored.
static void heed(int number, const struct sigaction *action) {
    struct sigaction old;
    if (sigaction(number, NULL, &old) == 0 && old.sa_handler != SIG_IGN) sigaction(number, action, NULL);
}

// Makes question marks of what could steer a terminal: control characters not in `kept`, and bytes that are no UTF-8.
static void disarm(char *s, size_t n, const char *kept) {
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t c;
        int found = read_character(s + i, n - i, &c);
        bool harmless = found > 0 && (c >= 160 || (c >= 32 && c < 127) || (c && c < 32 && strchr(kept, (int)c)));
        length = found > 0 ? (size_t)found : 1;
        if (!harmless) memset(s + i, '?', length);
    }
}

// Prints the first n bytes that are held: as they are, unless stdout is a terminal.
static void put_held(Printer *p, size_t n) {
    static int is_terminal = -1;  // the system is asked once
    if (is_terminal < 0) is_terminal = isatty(STDOUT_FILENO);
    if (is_terminal) disarm(p->held, n, "\n\t");
    fwrite(p->held, 1, n, stdout);
    p->n_held -= n;
    memmove(p->held, p->held + n, p->n_held);
}

static void print_bytes(Printer *p, const char *bytes, size_t n) {
    for (size_t i = 0; i < n; i++) {
        p->held[p->n_held++] = bytes[i];
        put_held(p, whole_characters(p->held, p->n_held));
    }
}

static void end_printing(Printer *p) {
    put_held(p, p->n_held);
    fflush(stdout);
}

static bool read_line(Buffer *line, Error *e) {
    char *text = (char *)line->bytes;
    if (isatty(STDIN_FILENO)) fprintf(stderr, "> ");
    at_prompt = 1;
    ssize_t n = interrupted ? -1 : getline(&text, &line->capacity, stdin);
    at_prompt = 0;
    line->bytes = (unsigned char *)text;
    if (n < 0 && interrupted) return fail(e, INTERRUPTED, "interrupted");
    if (n < 0 && !feof(stdin) && errno != EBADF)  // that is a stdin which was closed from the start
        return fail(e, io_status(), "reading failed: %s", strerror(errno));
    if (n < 0 && isatty(STDIN_FILENO)) fputc('\n', stderr);
    if (n < 0) return false;
    while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == '\r')) n--;
    line->n = (size_t)n;
    return true;
}

// ---- For the sampler ----

// A seed of 0 would keep the generator at 0 for ever; another constant stands for it (2^64 / the golden ratio).
static bool make_sampler(Sampler *s, int n_tokens, uint64_t seed, Error *e) {
    s->random = seed ? seed : 0x9E3779B97F4A7C15u;
    s->candidates = allocate((size_t)n_tokens, sizeof *s->candidates, e);
    return s->candidates != NULL;
}

static bool is_likelier(Candidate a, Candidate b) {
    return a.p > b.p || (a.p == b.p && a.id < b.id);
}

static void sink(Candidate *c, size_t i, size_t n) {
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && is_likelier(c[child + 1], c[child])) child++;
        if (!is_likelier(c[child], c[i])) return;
        Candidate above = c[i];
        c[i] = c[child];
        c[child] = above;
    }
}

static void take_likeliest(Candidate *to, Candidate *heap, size_t *n) {
    Candidate top = heap[0];
    heap[0] = heap[--*n];
    sink(heap, 0, *n);
    *to = top;
}

// ---- What a model consists of ----

enum { MAX_LAYERS = 1024, MAX_DIM = 65536, MAX_HEADS = 1024, MAX_FFN_DIM = 1 << 20, MAX_EXPERTS = 1024 };
enum { MAX_CONTEXT = 1 << 20, MAX_TENSORS = 65536, MAX_KEYS = 65536 };
_Static_assert(MAX_HEADS * MAX_HEAD_DIM <= MAX_FFN_DIM, "no wider than what is allowed anyway");

// A family of models. To add one: a row here; a config_fields row, a Layer member, a rule below for what is new in it.
enum {
    BIASES = 1, HEAD_NORMS = 2, WIDE_HEAD_NORMS = 4, PRE_NORMS = 8, POST_NORMS = 16,
    SCALES = 32,  // of embedding, residual and logits
    GEMMA = 64,   // GELU, and embeddings times sqrt(D)
    CAPS = 128,   // of 50 and 30, where the file does not say others
    LAYER_NORMS = 256,
    ALWAYS = 512, OPTIONAL = 1024, BY_EXPERT = 2048,  // in a tensor's rule: it must, or may, be there; for each expert
};
typedef struct {
    const char *name;
    Pairing pairing;
    int features;       // a set of those above
    int global_every;   // where there is a window, the last of so many layers has none
    int no_rope_every;  // the last of so many layers does not rotate
    double local_theta; // of layers with a window; -1: rope_theta, but not scaled
} Family;

static const Family families[] = {
    { "llama", ADJACENT, PRE_NORMS, 0, 0, 0 },  // LLaMA 1-3, Mistral, Mixtral, TinyLlama, SmolLM, Yi, Vicuna, ...
    { "qwen2", HALVES, PRE_NORMS | BIASES, 0, 0, 0 },  // Qwen 1.5, 2, 2.5
    { "qwen3", HALVES, PRE_NORMS | HEAD_NORMS, 0, 0, 0 },
    { "qwen3moe", HALVES, PRE_NORMS | HEAD_NORMS, 0, 0, 0 },
    { "phi3", HALVES, PRE_NORMS, 0, 0, 0 },
    { "granite", ADJACENT, PRE_NORMS | SCALES, 0, 0, 0 },
    { "smollm3", ADJACENT, PRE_NORMS, 0, 4, 0 },
    { "olmo2", HALVES, WIDE_HEAD_NORMS | POST_NORMS, 4, 0, -1 },  // OLMo 3 has windows
    { "stablelm", HALVES, PRE_NORMS | LAYER_NORMS, 0, 0, 0 },
    { "gemma2", HALVES, PRE_NORMS | POST_NORMS | GEMMA | CAPS, 2, 0, 0 },
    { "gemma3", HALVES, PRE_NORMS | HEAD_NORMS | POST_NORMS | GEMMA, 6, 0, 10000 },
};

static const Family *find_family(const char *name, Error *e) {
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (!strcmp(families[i].name, name)) return &families[i];
    refuse(e, "models of family \"%s\" are not supported", name);
    return NULL;
}

// A number of the configuration: its name in native files, where it lives, what it may be, and where a GGUF has it.
// The first says of how many layers the others are to be had.
typedef struct {
    const char *name;
    enum { INTEGER, SINGLE, DOUBLE } type;
    bool per_layer;
    size_t offset;  // in Config or in Layer
    double min, max;
    const char *key;   // the family's: one number for all layers, or an array of one for each; NULL: found elsewhere
    double otherwise;  // where there is no such key; NAN: it is needed; 0: worked out from others
    int feature;       // 0, or the one without which a family does not have the key
} ConfigField;

static const ConfigField config_fields[] = {
    { "n_layers", INTEGER, false, offsetof(Config, n_layers), 1, MAX_LAYERS, ".block_count", NAN, 0 },
    { "dim", INTEGER, false, offsetof(Config, dim), 1, MAX_DIM, ".embedding_length", NAN, 0 },
    { "n_tokens", INTEGER, false, offsetof(Config, n_tokens), 1, MAX_TOKENS, NULL, 0, 0 },
    { "head_dim", INTEGER, false, offsetof(Config, head_dim), 1, MAX_HEAD_DIM, ".attention.key_length", 0, 0 },
    { "rope_dim", INTEGER, false, offsetof(Config, rope_dim), 2, MAX_HEAD_DIM, ".rope.dimension_count", 0, 0 },
    { "context", INTEGER, false, offsetof(Config, context), 1, MAX_CONTEXT, ".context_length", NAN, 0 },
    { "original_context", INTEGER, false, offsetof(Config, original_context), 0, MAX_CONTEXT, NULL, 0, 0 },
    { "norm_eps", SINGLE, false, offsetof(Config, norm_eps), 1e-20f, 1, ".attention.layer_norm_rms_epsilon", NAN, 0 },
    { "rope_theta", DOUBLE, false, offsetof(Config, rope_theta), 1, 1e15, ".rope.freq_base", 10000, 0 },
    { "rope_scale", DOUBLE, false, offsetof(Config, rope_scale), 1e-6, 1e6, NULL, 0, 0 },
    { "rope_magnitude", DOUBLE, false, offsetof(Config, rope_magnitude), 1e-6, 1e6, NULL, 0, 0 },
    { "yarn_fast", DOUBLE, false, offsetof(Config, yarn_fast), 0, 1e6, NULL, 0, 0 },
    { "yarn_slow", DOUBLE, false, offsetof(Config, yarn_slow), 0, 1e6, NULL, 0, 0 },
    { "local_theta", DOUBLE, false, offsetof(Config, local_theta), 0, 1e15, ".rope.freq_base_swa", 0, 0 },
    { "embedding_scale", SINGLE, false, offsetof(Config, embedding_scale), 1e-6f, 1e6, ".embedding_scale", 1, SCALES },
    { "residual_scale", SINGLE, false, offsetof(Config, residual_scale), 1e-6f, 1e6, ".residual_scale", 1, SCALES },
    { "attention_scale", SINGLE, false, offsetof(Config, attention_scale), 1e-6f, 1e6, ".attention.scale", 0, 0 },
    { "logit_scale", SINGLE, false, offsetof(Config, logit_scale), 1e-6f, 1e6, ".logit_scale", 1, SCALES },
    { "attention_cap", SINGLE, false, offsetof(Config, attention_cap), 0, 1e6, ".attn_logit_softcapping", 0, 0 },
    { "logit_cap", SINGLE, false, offsetof(Config, logit_cap), 0, 1e6, ".final_logit_softcapping", 0, 0 },
    { "activation", INTEGER, false, offsetof(Config, activation), SILU, GELU, NULL, 0, 0 },
    { "n_heads", INTEGER, true, offsetof(Layer, n_heads), 1, MAX_HEADS, ".attention.head_count", NAN, 0 },
    { "n_kv_heads", INTEGER, true, offsetof(Layer, n_kv_heads), 1, MAX_HEADS, ".attention.head_count_kv", 0, 0 },
    { "ffn_dim", INTEGER, true, offsetof(Layer, ffn_dim), 1, MAX_FFN_DIM, ".feed_forward_length", NAN, 0 },
    { "window", INTEGER, true, offsetof(Layer, window), 0, MAX_CONTEXT, ".attention.sliding_window", 0, 0 },
    { "angles", INTEGER, true, offsetof(Layer, angles), UNROTATED, LOCAL, NULL, 0, 0 },
    { "n_experts", INTEGER, true, offsetof(Layer, n_experts), 0, MAX_EXPERTS, ".expert_count", 0, 0 },
    { "n_experts_used", INTEGER, true, offsetof(Layer, n_experts_used), 0, MAX_EXPERTS, ".expert_used_count", 0, 0 },
};
enum { N_CONFIG_FIELDS = sizeof config_fields / sizeof *config_fields };

static void *field_place(Model *m, const ConfigField *f, int layer) {
    return (char *)(f->per_layer ? (void *)&m->layers[layer] : (void *)&m->config) + f->offset;
}

static double get_field(const Model *m, const ConfigField *f, int layer) {
    const void *p = field_place((Model *)m, f, layer);
    return f->type == INTEGER ? *(const int *)p : f->type == SINGLE ? (double)*(const float *)p : *(const double *)p;
}

// Sets a field, if the value is one that it may have; the number of layers makes room for these.
static bool set_field(Model *m, const ConfigField *f, int layer, double value, Error *e) {
    if (!(value >= f->min && value <= f->max) || (f->type == INTEGER && value != floor(value)))
        return refuse(e, "%s is %g, expected %s%g to %g", f->name, value,
                    f->type == INTEGER ? "an integer from " : "", f->min, f->max);
    void *p = field_place(m, f, layer);
    if (f->type == INTEGER) *(int *)p = (int)value;
    else if (f->type == SINGLE) *(float *)p = (float)value;
    else *(double *)p = value;
    if (f == config_fields && !m->layers) m->layers = allocate((size_t)m->config.n_layers, sizeof *m->layers, e);
    return m->layers != NULL;
}

// What the fields must be to each other; completes the configuration from its family.
static bool check_config(Model *m, Error *e) {
    Config *c = &m->config;
    const Family *family = find_family(c->family, e);
    if (!family) return false;
    c->pairing = family->pairing;
    c->wide_head_norms = family->features & WIDE_HEAD_NORMS;
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++)
        for (int l = 0; l < (f->per_layer ? c->n_layers : 1); l++)
            if (!set_field(m, f, l, get_field(m, f, l), e)) return false;
    if (c->rope_dim > c->head_dim || c->rope_dim % 2)
        return refuse(e, "rope_dim is %d, expected an even number up to %d", c->rope_dim, c->head_dim);
    for (int l = 0; l < c->n_layers; l++) {
        int heads = m->layers[l].n_heads, groups = m->layers[l].n_kv_heads;
        int experts = m->layers[l].n_experts, used = m->layers[l].n_experts_used;
        if (used > experts || !used != !experts)
            return refuse(e, "layer %d: n_experts_used is %d of %d experts", l, used, experts);
        if (m->layers[l].angles == LOCAL && c->local_theta < 1) return refuse(e, "layer %d needs local_theta", l);
        if (heads % groups)
            return refuse(e, "layer %d: %d heads cannot share %d key/value heads evenly", l, heads, groups);
    }
    return true;
}

// A tensor that the model has or may have, named as in GGUF. With rows ONE it is a vector of floats, else a matrix.
// With `fused` it may instead be a range of that tensor's rows, which has its parts in the order of this table.
typedef enum { ONE, DIM, Q_DIM, KV_DIM, FFN_DIM, N_TOKENS, PAIRS, Q_NORM, K_NORM, N_EXPERTS } Size;

typedef struct {
    const char *name;
    size_t offset;  // of the Tensor or the const float * in Model or in Layer
    Size rows, cols;
    int need;  // what makes it needed: of the family's features, ALWAYS; or OPTIONAL
    const char *fused;
} TensorRule;

static const TensorRule rules[] = {
    { "token_embd.weight", offsetof(Model, embedding), N_TOKENS, DIM, ALWAYS, NULL },
    { "output_norm.weight", offsetof(Model, final_norm), ONE, DIM, ALWAYS, NULL },
    { "output_norm.bias", offsetof(Model, final_norm_bias), ONE, DIM, LAYER_NORMS, NULL },
    { "output.weight", offsetof(Model, head), N_TOKENS, DIM, OPTIONAL, NULL },
    { "rope_freqs.weight", offsetof(Model, rope_factors), ONE, PAIRS, OPTIONAL, NULL },
    { "rope_factors_long.weight", offsetof(Model, long_factors), ONE, PAIRS, OPTIONAL, NULL },
    { "rope_factors_short.weight", offsetof(Model, short_factors), ONE, PAIRS, OPTIONAL, NULL },
    // and of each layer
    { "attn_norm.weight", offsetof(Layer, attention_norm), ONE, DIM, PRE_NORMS, NULL },
    { "attn_norm.bias", offsetof(Layer, attention_norm_bias), ONE, DIM, LAYER_NORMS, NULL },
    { "attn_q.weight", offsetof(Layer, query), Q_DIM, DIM, ALWAYS, "attn_qkv.weight" },
    { "attn_k.weight", offsetof(Layer, key), KV_DIM, DIM, ALWAYS, "attn_qkv.weight" },
    { "attn_v.weight", offsetof(Layer, value), KV_DIM, DIM, ALWAYS, "attn_qkv.weight" },
    { "attn_q.bias", offsetof(Layer, query_bias), ONE, Q_DIM, BIASES | OPTIONAL, NULL },
    { "attn_k.bias", offsetof(Layer, key_bias), ONE, KV_DIM, BIASES | OPTIONAL, NULL },
    { "attn_v.bias", offsetof(Layer, value_bias), ONE, KV_DIM, BIASES | OPTIONAL, NULL },
    { "attn_q_norm.weight", offsetof(Layer, query_norm), ONE, Q_NORM, HEAD_NORMS | WIDE_HEAD_NORMS, NULL },
    { "attn_k_norm.weight", offsetof(Layer, key_norm), ONE, K_NORM, HEAD_NORMS | WIDE_HEAD_NORMS, NULL },
    { "attn_output.weight", offsetof(Layer, attention_out), DIM, Q_DIM, ALWAYS, NULL },
    { "attn_output.bias", offsetof(Layer, attention_out_bias), ONE, DIM, OPTIONAL, NULL },
    { "post_attention_norm.weight", offsetof(Layer, attention_post_norm), ONE, DIM, POST_NORMS, NULL },
    { "ffn_norm.weight", offsetof(Layer, ffn_norm), ONE, DIM, PRE_NORMS, NULL },
    { "ffn_norm.bias", offsetof(Layer, ffn_norm_bias), ONE, DIM, LAYER_NORMS, NULL },
    { "ffn_gate_inp.weight", offsetof(Layer, router), N_EXPERTS, DIM, ALWAYS, NULL },  // of 0 rows: it is not there
    { "ffn_gate.weight", offsetof(Layer, gate), FFN_DIM, DIM, ALWAYS | BY_EXPERT, "ffn_up.weight" },
    { "ffn_gate.bias", offsetof(Layer, gate_bias), ONE, FFN_DIM, OPTIONAL | BY_EXPERT, NULL },
    { "ffn_up.weight", offsetof(Layer, up), FFN_DIM, DIM, ALWAYS | BY_EXPERT, "ffn_up.weight" },
    { "ffn_up.bias", offsetof(Layer, up_bias), ONE, FFN_DIM, OPTIONAL | BY_EXPERT, NULL },
    { "ffn_down.weight", offsetof(Layer, down), DIM, FFN_DIM, ALWAYS | BY_EXPERT, NULL },
    { "ffn_down.bias", offsetof(Layer, down_bias), ONE, DIM, OPTIONAL | BY_EXPERT, NULL },
    { "post_ffw_norm.weight", offsetof(Layer, ffn_post_norm), ONE, DIM, POST_NORMS, NULL },
};
enum { N_MODEL_RULES = 7, N_LAYER_RULES = sizeof rules / sizeof *rules - N_MODEL_RULES, NAME_BYTES = 64 };

// One of the tensors that a model has or may have.
typedef struct {
    const TensorRule *rule;
    int layer;          // -1: the model's
    size_t rows, cols;  // of a vector: 1 and its length
    size_t n, n_used;   // how many there are, and how many a token is multiplied with: of experts, or 1
    Tensor *tensor;     // one of these two is where it belongs
    const float **vector;
    char name[NAME_BYTES], fused[NAME_BYTES];
    size_t first_row, all_rows;  // where it begins in the fused tensor, and what that has in all
} Slot;

static size_t n_slots(const Model *m) { return N_MODEL_RULES + (size_t)m->config.n_layers * N_LAYER_RULES; }

// The i-th tensor of the model, in the order in which native files hold them.
static Slot get_slot(Model *m, size_t i) {
    bool whole = i < N_MODEL_RULES;
    int index = whole ? -1 : (int)((i - N_MODEL_RULES) / N_LAYER_RULES);
    const TensorRule *rule = &rules[whole ? i : N_MODEL_RULES + (i - N_MODEL_RULES) % N_LAYER_RULES];
    Layer *layer = &m->layers[whole ? 0 : index];
    char *place = (whole ? (char *)m : (char *)layer) + rule->offset;
    size_t head_dim = (size_t)m->config.head_dim;
    const size_t sizes[] = {
        [ONE] = 1, [DIM] = (size_t)m->config.dim, [FFN_DIM] = (size_t)layer->ffn_dim,
        [PAIRS] = (size_t)m->config.rope_dim / 2, [N_TOKENS] = (size_t)m->config.n_tokens,
        [Q_DIM] = (size_t)layer->n_heads * head_dim, [KV_DIM] = (size_t)layer->n_kv_heads * head_dim,
        [Q_NORM] = (m->config.wide_head_norms ? (size_t)layer->n_heads : 1) * head_dim,
        [K_NORM] = (m->config.wide_head_norms ? (size_t)layer->n_kv_heads : 1) * head_dim,
        [N_EXPERTS] = (size_t)layer->n_experts,
    };
    bool by_expert = rule->need & BY_EXPERT && layer->n_experts > 0;
    Slot slot = { .rule = rule, .layer = index, .rows = sizes[rule->rows], .cols = sizes[rule->cols], 1, 1 };
    if (by_expert) slot.n = (size_t)layer->n_experts, slot.n_used = (size_t)layer->n_experts_used;
    if (rule->rows == ONE) slot.vector = (const float **)(void *)place;
    else slot.tensor = (Tensor *)(void *)place;
    int stem = (int)strcspn(rule->name, ".");
    if (whole) snprintf(slot.name, NAME_BYTES, "%s", rule->name);
    else snprintf(slot.name, NAME_BYTES, "blk.%d.%.*s%s%s", index, stem, rule->name, by_expert ? "_exps" : "",
                  rule->name + stem);
    if (!rule->fused || by_expert) return slot;
    snprintf(slot.fused, NAME_BYTES, "blk.%d.%s", index, rule->fused);
    for (const TensorRule *r = rules; r < rules + N_MODEL_RULES + N_LAYER_RULES; r++) {
        if (!r->fused || strcmp(r->fused, rule->fused)) continue;
        if (r == rule) slot.first_row = slot.all_rows;
        slot.all_rows += sizes[r->rows];
    }
    return slot;
}

static const void *slot_data(const Slot *s) { return s->tensor ? (const void *)s->tensor->tiles : *s->vector; }
// Bytes in the form in which it is used.
static size_t slot_bytes(const Slot *s) {
    return s->tensor ? times(s->n, tensor_bytes(s->tensor)) : s->cols * sizeof(float);
}

static void set_slot(const Slot *s, const unsigned char *data) {
    if (s->tensor) s->tensor->tiles = data;
    else *s->vector = (const float *)(const void *)data;
}

// Whether the model has it, and not as a second name of the embedding.
static bool is_stored(const Model *m, const Slot *s) {
    return slot_data(s) && !(s->tensor == &m->head && m->head.tiles == m->embedding.tiles);
}

// Whether every token is multiplied with it, which an embedding that is not the head is not.
static bool is_multiplied(const Model *m, const Slot *s) {
    return s->tensor && s->tensor->tiles && s->tensor != &m->embedding;
}

// A tensor that a file says it has.
typedef struct {
    char name[NAME_BYTES];
    size_t n;         // how many matrices follow each other
    Source source;    // how one is stored: rows, cols, data; type NULL in native files,
    int native_type;  // where it is in tiles of this type, or NATIVE_VECTOR
    bool is_vector;   // one dimension
    uint64_t offset;  // of source.data, from where the data of all tensors begin
    size_t n_bytes;   // from source.data on
    size_t rows_used;
} Entry;

enum { NATIVE_VECTOR = 255 };
typedef struct { Entry *entries; size_t n; } Directory;

static int by_name(const void *a, const void *b) { return strcmp(a, b); }  // an Entry begins with its name

static int by_place(const void *a, const void *b) {
    const unsigned char *x = ((const Entry *)a)->source.data, *y = ((const Entry *)b)->source.data;
    return x < y ? -1 : x > y;
}

// Finds each tensor's bytes in those of all. It must begin at a multiple of `step`, and no two may share any.
static bool place_entries(Directory *d, Cursor data, size_t step, Error *e) {
    for (Entry *entry = d->entries; entry < d->entries + d->n; entry++) {
        unsigned long long at = entry->offset;
        if (at % step) return refuse(e, "%s begins at %llu, no multiple of %zu", entry->name, at, step);
        if (data.bad || at > data.left || entry->n_bytes > data.left - at)
            return refuse(e, "%s ends after the file does: not copied whole?", entry->name);
        entry->source.data = data.at + at;
    }
    qsort(d->entries, d->n, sizeof *d->entries, by_place);
    for (const Entry *a = d->entries; a + 1 < d->entries + d->n; a++)
        if (a->n_bytes > (size_t)(a[1].source.data - a->source.data))
            return refuse(e, "tensors %s and %s overlap", a->name, a[1].name);
    return true;
}

// The entry for a slot, or NULL: its own, which is all that native files have, or the fused one.
static Entry *entry_for(const Directory *d, Slot *slot) {
    Entry *own = bsearch(slot->name, d->entries, d->n, sizeof *d->entries, by_name), *fused = NULL;
    if (slot->fused[0]) fused = bsearch(slot->fused, d->entries, d->n, sizeof *d->entries, by_name);
    bool is_up = fused && fused->source.rows != slot->all_rows && !strcmp(slot->rule->fused, "ffn_up.weight");
    if (fused && fused->source.type && !is_up && (!own || own == fused)) return fused;
    slot->first_row = 0;
    slot->all_rows = slot->rows;
    return own;
}

// Makes the tiles of a file that has none, in one block.
typedef struct { Model *m; const Directory *d; double start; atomic_bool broken; } PackJob;

// The file's pages of these row tiles are not needed any more: two copies of a model would be one too many.
static void give_back(const Source *s, Range tiles) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), row_bytes = source_bytes(s) / s->rows;
    size_t last = tiles.to * TILE_ROWS < s->rows ? tiles.to * TILE_ROWS : s->rows;
    uintptr_t begin = round_up((uintptr_t)s->data + tiles.from * TILE_ROWS * row_bytes, page);
    uintptr_t end = ((uintptr_t)s->data + last * row_bytes) / page * page;
    if (end > begin) madvise((void *)begin, end - begin, MADV_DONTNEED);  // a mapped file's can be read again
}

static void pack_team(void *p, Team team) {
    PackJob *job = p;
    unsigned char *to = job->m->packed;
    for (size_t i = 0; i < n_slots(job->m); i++) {
        Slot slot = get_slot(job->m, i);
        const Entry *entry = entry_for(job->d, &slot);
        if (!entry) continue;
        Source part = entry->source;
        part.rows = slot.rows;
        part.data = source_block(&part, slot.first_row, 0);
        Range tiles = slot.tensor ? share(n_row_tiles(slot.tensor), team) : (Range){ 0, 0 };
        for (size_t k = 0; k < slot.n && tiles.to > tiles.from; k++, part.data += source_bytes(&part)) {
            unsigned char *matrix = to + k * tensor_bytes(slot.tensor);
            for (size_t row = tiles.from; row < tiles.to; row++) {
                pack_rows(matrix, &part, (Range){ row, row + 1 });
                if (broken_row(slot.tensor, matrix + row * row_tile_bytes(slot.tensor)) < TILE_ROWS) job->broken = true;
            }
            give_back(&part, tiles);
        }
        if (!slot.tensor && team.thread == 0) memcpy(to, part.data, slot_bytes(&slot));
        if (team.thread == 0) set_slot(&slot, to);
        if (team.thread == 0) show_progress("packing tensor", job->start, i + 1, n_slots(job->m));
        to += round_up(slot_bytes(&slot), 64);
    }
}

// False, and the first row named, where a matrix is not finite. A native file's are read for this only on demand.
static bool check_weights(Model *m, Error *e) {
    for (size_t i = 0; i < n_slots(m); i++) {
        Slot slot = get_slot(m, i);
        const Tensor *w = slot.tensor;
        size_t n_tiles = w && w->tiles ? n_row_tiles(w) : 0;
        for (size_t j = 0, r; j < slot.n * n_tiles; j++)
            if ((r = broken_row(w, w->tiles + j * row_tile_bytes(w))) < TILE_ROWS)
                return refuse(e, "%s: row %zu has a weight or scale that is not finite", slot.name,
                              j / n_tiles * slot.rows + j % n_tiles * TILE_ROWS + r);
    }
    return true;
}

// Fills one slot from its entry: points into a native file, or counts what is to be packed.
static bool bind_slot(Model *m, const Slot *slot, Entry *entry, Error *e) {
    const Source *s = &entry->source;
    if (entry->is_vector != (slot->vector != NULL) || s->rows != slot->all_rows || s->cols != slot->cols ||
        entry->n != slot->n)
        return refuse(e, "%s is %zu x %zu x %zu, expected %zu x %zu x %zu", entry->name, entry->n, s->rows, s->cols,
                      slot->n, slot->all_rows, slot->cols);
    entry->rows_used += slot->rows;
    Type type = s->type ? s->type->tile : (Type)entry->native_type;
    if (slot->tensor && is_quantised(type) && slot->cols % (size_t)types[type].cols)
        return refuse(e, "%s has %zu columns, which %s cannot have", entry->name, slot->cols, types[type].name);
    if (slot->tensor) *slot->tensor = (Tensor){ type, (int)slot->rows, (int)slot->cols, NULL };
    if (!s->type) set_slot(slot, s->data);
    if (!s->type && slot_bytes(slot) != entry->n_bytes)
        return refuse(e, "%s has %zu bytes, expected %zu", entry->name, entry->n_bytes, slot_bytes(slot));
    if (slot->vector && s->type && s->type != &source_types[SOURCE_F32])
        return refuse(e, "%s is of type %s, expected F32", entry->name, s->type->name);
    for (size_t i = 0; slot->vector && i < slot->cols; i++) {
        float x;
        memcpy(&x, s->data + i * sizeof x, sizeof x);
        if (!isfinite(x)) return refuse(e, "%s: number %zu is not finite", entry->name, i);
    }
    if (s->type) m->packed_bytes = round_up(plus(m->packed_bytes, slot_bytes(slot)), 64);
    return true;
}

// From a checked configuration and what a file says it has to a model that can run: finds every tensor that the
// configuration needs, and sees that none is left over.
static bool bind_model(Model *m, Directory *d, int threads, Error *e) {
    int features = find_family(m->config.family, e)->features | ALWAYS;
    qsort(d->entries, d->n, sizeof *d->entries, by_name);
    for (size_t i = 0; i < n_slots(m); i++) {
        Slot slot = get_slot(m, i);
        int need = slot.rows ? slot.rule->need : 0;
        Entry *entry = need & (features | OPTIONAL) ? entry_for(d, &slot) : NULL;
        if (entry && !bind_slot(m, &slot, entry, e)) return false;
        bool apart = slot.n > 1 && bsearch("blk.0.ffn_gate.0.weight", d->entries, d->n, sizeof *d->entries, by_name);
        if (!entry && need & features)
            return refuse(e, "tensor %s is missing%s", slot.name,
                          apart ? ": experts are single tensors; join them: export_model.py FILE -o NEW" : "");
        if (slot.layer < 1 || !(need & OPTIONAL)) continue;
        Slot before = get_slot(m, i - N_LAYER_RULES);  // what one layer has, all have: else a tensor was lost
        if ((entry_for(d, &before) != NULL) != (entry != NULL))
            return refuse(e, "tensor %s is missing", entry ? before.name : slot.name);
    }
    size_t n_bytes = 0;
    for (const Entry *a = d->entries; a < d->entries + d->n; n_bytes = plus(n_bytes, a++->n_bytes))
        if (a->rows_used != a->source.rows)
            return refuse(e, "tensor %s is there twice, or no %s has it", a->name, m->config.family);
    if (m->packed_bytes > plus(times(4, n_bytes), 32 << 20))  // the smallest matrix has one number and 2 KB in tiles
        return refuse(e, "matrices so small that their %zu bytes take %zu in tiles", n_bytes, m->packed_bytes);
    PackJob job = { m, d, clock_seconds(), false };
    if (m->packed_bytes && !(m->packed = map_memory(m->packed_bytes, true, e))) return false;
    if (m->packed) {
        use_large_pages(m->packed, m->packed_bytes);
        run_team(threads, pack_team, &job);
    }
    if (job.broken) return check_weights(m, e);
    if (!m->head.tiles) m->head = m->embedding;
    return !m->long_factors == !m->short_factors ||
           refuse(e, "of rope_factors_long.weight and rope_factors_short.weight one is missing");
}

// ---- cria's own file ----

// | header, 128 bytes | configuration | tensor records | tokenizer (tokenizer.c) | chat template | weights |
// Everything is little-endian; every section and every tensor begins at a multiple of 64 and is padded with zeros. The
// weights lie in the tiles of chapter 4, so that a mapped file is ready. README draws it byte by byte.
enum { LAYOUT = 2 };  // of tiles and sections: it changes when either does
static const unsigned char native_magic[8] = { 0x89, 'c', 'r', 'i', 'a', '\r', '\n', 0x1a };

typedef struct { uint64_t at, n_bytes; } Section;
enum { CONFIG, TENSORS, TOKENIZER, CHAT_TEMPLATE, WEIGHTS, N_SECTIONS };

typedef struct {
    unsigned char magic[8];
    uint32_t layout, n_tensors;
    uint64_t file_bytes;
    char family[16];
    union {
        struct { Section config, tensors, tokenizer, chat_template, weights; };
        Section sections[N_SECTIONS];
    };
    uint64_t zero;
} FileHeader;

// Followed by `count` doubles: one, or one for each layer.
typedef struct { char name[28]; uint32_t count; } ConfigRecord;

typedef struct {
    char name[NAME_BYTES];
    uint32_t type, rows, cols, n;     // type: Type, or NATIVE_VECTOR; n: how many matrices there are, of experts
    uint64_t at, n_bytes;             // from the beginning of the file
} TensorRecord;
_Static_assert(sizeof(FileHeader) == 128 && sizeof(ConfigRecord) == 32 && sizeof(TensorRecord) == 96, "no padding");

// Appends the configuration to `to` or, where that is NULL, reads it from the cursor.
static bool transfer_config(Model *m, Cursor from, Buffer *to, Error *e) {
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++) {
        ConfigRecord record = { .count = f->per_layer ? (uint32_t)m->config.n_layers : 1 }, found;
        snprintf(record.name, sizeof record.name, "%s", f->name);
        if (to && !append(to, &record, sizeof record, e)) return false;
        if (!to) take_into(&from, &found, sizeof found);
        if (!to && (strncmp(found.name, record.name, sizeof found.name) || found.count != record.count))
            return refuse(e, "the configuration has %u values of \"%.28s\", expected %u of %s", found.count,
                        found.name, record.count, record.name);
        for (int l = 0; l < (int)record.count; l++) {
            double value = to ? get_field(m, f, l) : 0;
            if (!to) take_into(&from, &value, sizeof value);
            if (to ? !append(to, &value, sizeof value, e) : !set_field(m, f, l, value, e)) return false;
        }
    }
    int n = from.left < 28 ? (int)from.left : 28;
    return n == 0 || refuse(e, "the configuration asks for \"%.*s\", which is not known", n, (const char *)from.at);
}

static bool read_tensor_records(const FileHeader *h, Cursor c, Directory *d, Error *e) {
    if (h->n_tensors > MAX_TENSORS || h->n_tensors != c.left / sizeof(TensorRecord) || c.left % sizeof(TensorRecord))
        return refuse(e, "%u tensors in a table of %zu bytes", h->n_tensors, c.left);
    if (!(d->entries = allocate(h->n_tensors, sizeof *d->entries, e))) return false;
    for (; d->n < h->n_tensors; d->n++) {
        TensorRecord r;
        take_into(&c, &r, sizeof r);
        r.name[NAME_BYTES - 1] = 0;
        if (r.type >= N_TYPES && r.type != NATIVE_VECTOR)
            return refuse(e, "%s is of type %u, which is not known", r.name, r.type);
        Entry *entry = &d->entries[d->n];
        *entry = (Entry){ .n = r.n, .source = { .rows = r.rows, .cols = r.cols }, .native_type = (int)r.type,
                          .is_vector = r.type == NATIVE_VECTOR, .offset = r.at - h->weights.at, .n_bytes = r.n_bytes };
        memcpy(entry->name, r.name, NAME_BYTES);
    }
    return true;
}

// What each parser makes of a file: a Model's configuration, vocabulary and template, and what tensors there are; or,
// where there is no directory to put these in, the vocabulary only.
static bool parse_native(Cursor file, Model *m, Directory *d, Error *e) {
    FileHeader h;
    Cursor c = file, sections[N_SECTIONS];
    take_into(&c, &h, sizeof h);
    if (c.bad) return refuse(e, "%zu bytes, expected a header of %zu", file.left, sizeof h);
    unsigned long long whole = h.file_bytes;
    if (h.layout != LAYOUT)
        return refuse(e, "has layout %u, expected %d: make it again with  ./run SOURCE -m export -o FILE",
                      h.layout, LAYOUT);
    if (whole != file.left) return refuse(e, "%zu bytes, expected %llu: not copied whole?", file.left, whole);
    for (int i = 0; i < N_SECTIONS; i++) {
        Section s = h.sections[i];
        if (s.at > file.left || s.n_bytes > file.left - s.at || s.at % 64)
            return refuse(e, "a section of the header lies outside the file");
        sections[i] = (Cursor){ file.at + s.at, (size_t)s.n_bytes, false };
    }
    m->vocabulary = sections[TOKENIZER].at;
    m->vocabulary_bytes = sections[TOKENIZER].left;
    if (!d) return true;
    snprintf(m->config.family, sizeof m->config.family, "%.15s", h.family);
    m->chat_template = (Text){ (const char *)sections[CHAT_TEMPLATE].at, sections[CHAT_TEMPLATE].left };
    return transfer_config(m, sections[CONFIG], NULL, e) && read_tensor_records(&h, sections[TENSORS], d, e) &&
           place_entries(d, sections[WEIGHTS], 64, e);
}

// The tensor records, with places from where the weights begin on, and how many bytes those take.
static bool append_tensor_records(Model *m, Buffer *b, uint64_t *end, Error *e) {
    for (size_t i = 0; i < n_slots(m); i++) {
        Slot slot = get_slot(m, i);
        if (!is_stored(m, &slot)) continue;
        TensorRecord r = { .type = slot.tensor ? slot.tensor->type : NATIVE_VECTOR, .rows = (uint32_t)slot.rows,
                           .cols = (uint32_t)slot.cols, .n = (uint32_t)slot.n, .n_bytes = slot_bytes(&slot) };
        r.at = *end;
        memcpy(r.name, slot.name, NAME_BYTES);
        *end = round_up(*end + r.n_bytes, 64);
        if (!append(b, &r, sizeof r, e)) return false;
    }
    return true;
}

// A file being written: under a temporary name, which becomes `path` only when all of it is on disk. What is no regular
// file, a pipe for instance, is written to directly, and so is stdout's file, behind what there is.
typedef struct {
    FILE *stream;
    char *path, *temporary;  // the path without symbolic links; NULL: there is no other name
} Output;

static char *volatile unfinished;  // the temporary file that there is now, for the signals of chapter 11

static bool open_output(Output *o, const char *path, Error *e) {
    struct stat info, out;
    *o = (Output){ NULL, NULL, NULL };
    if (!path) return fail(e, MISUSE, "-m %s needs -o FILE to write to", options.mode);
    bool exists = stat(path, &info) == 0, is_file = exists && S_ISREG(info.st_mode);
    bool is_stdout = exists && !fstat(1, &out) && out.st_dev == info.st_dev && out.st_ino == info.st_ino;
    o->path = is_file ? realpath(path, NULL) : strdup(path);
    if (!o->path) return fail(e, io_status(), "%s: %s", path, strerror(errno));
    if (!exists && lstat(path, &info) == 0) return fail(e, BROKEN_IO, "%s: a symbolic link to nothing", path);
    if (exists && access(path, W_OK)) return fail(e, BROKEN_IO, "%s: %s", path, strerror(errno));
    if (is_stdout || (exists && !is_file)) {
        o->stream = is_stdout ? fdopen(dup(1), "wb") : fopen(o->path, "wb");
    } else {
        size_t length = strlen(o->path) + 32;
        if (!(o->temporary = allocate(length, 1, e))) return false;
        snprintf(o->temporary, length, "%s.%ld.tmp", o->path, (long)getpid());
        unlink(unfinished = o->temporary);  // what a run of the same number left when it was killed
        int file = open(o->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        bool same_mode = file >= 0 && (!is_file || fchmod(file, info.st_mode & 0777) == 0);
        o->stream = same_mode ? fdopen(file, "wb") : NULL;
        if (file >= 0 && !o->stream) close(file);
    }
    return o->stream || fail(e, io_status(), "%s: cannot be written: %s", path, strerror(errno));
}

// Ends the file, if all went well so far (ok); else removes what there is of it, and passes the failure on.
static bool close_output(Output *o, bool ok, Error *e) {
    bool written = o->stream && !ferror(o->stream) && fflush(o->stream) == 0;
    written = written && (!o->temporary || fsync(fileno(o->stream)) == 0);
    if (o->stream) written = fclose(o->stream) == 0 && written;
    written = written && ok && (!o->temporary || rename(o->temporary, o->path) == 0);
    if (ok && !written) fail(e, BROKEN_IO, "%s: cannot be written: %s", o->path, strerror(errno));
    if (!written && o->temporary) unlink(o->temporary);
    unfinished = NULL;
    free(o->path);
    free(o->temporary);
    return written;
}

// What fails here, close_output() finds in the stream.
static void write_padded(FILE *f, Cursor part) {
    static const char zeros[64];
    if (part.left) fwrite(part.at, 1, part.left, f);
    fwrite(zeros, 1, round_up(part.left, 64) - part.left, f);
}

// Writes the model as a native file.
static bool export_model(Model *m, const char *path, Error *e) {
    Buffer config = { 0 }, records = { 0 };
    FileHeader h = { .layout = LAYOUT, .weights = { .at = sizeof h } };
    memcpy(h.magic, native_magic, sizeof h.magic);
    snprintf(h.family, sizeof h.family, "%s", m->config.family);
    bool ok = check_weights(m, e) && transfer_config(m, (Cursor){ NULL, 0, false }, &config, e) &&
              append_tensor_records(m, &records, &h.weights.n_bytes, e);
    const Cursor sections[WEIGHTS] = {
        [CONFIG] = { config.bytes, config.n, false }, [TENSORS] = { records.bytes, records.n, false },
        [TOKENIZER] = { m->vocabulary, m->vocabulary_bytes, false },
        [CHAT_TEMPLATE] = { (const unsigned char *)m->chat_template.at, m->chat_template.n, false },
    };
    for (int i = 0; i < WEIGHTS; i++) {
        h.sections[i] = (Section){ h.weights.at, sections[i].left };
        h.weights.at = round_up(h.weights.at + sections[i].left, 64);
    }
    h.file_bytes = h.weights.at + h.weights.n_bytes;
    h.n_tensors = (uint32_t)(records.n / sizeof(TensorRecord));
    for (uint32_t i = 0; i < h.n_tensors; i++) ((TensorRecord *)(void *)records.bytes)[i].at += h.weights.at;

    Output out = { 0 };
    ok = ok && open_output(&out, path, e);
    if (ok) write_padded(out.stream, (Cursor){ (const unsigned char *)&h, sizeof h, false });
    for (int i = 0; ok && i < WEIGHTS; i++) write_padded(out.stream, sections[i]);
    for (size_t i = 0; ok && i < n_slots(m) && !ferror(out.stream); i++) {
        Slot slot = get_slot(m, i);
        if (is_stored(m, &slot)) write_padded(out.stream, (Cursor){ slot_data(&slot), slot_bytes(&slot), false });
        if (interrupted) ok = fail(e, INTERRUPTED, "interrupted");
    }
    ok = close_output(&out, ok, e);
    free(config.bytes);
    free(records.bytes);
    return ok;
}

// ---- GGUF ----

// | "GGUF", version, n_tensors, n_keys | keys: name, type, value | tensors: name, shape, type, offset | data |
typedef enum {
    G_U8, G_I8, G_U16, G_I16, G_U32, G_I32, G_F32, G_BOOL, G_STRING, G_ARRAY, G_U64, G_I64, G_F64, N_G,
    G_NUMBER = N_G,  // any but G_STRING
} GgufType;
static const struct { const char *name; unsigned char n_bytes; } gguf_types[] = {
    { "u8", 1 }, { "i8", 1 }, { "u16", 2 }, { "i16", 2 }, { "u32", 4 }, { "i32", 4 }, { "f32", 4 }, { "bool", 1 },
    { "string", 0 }, { "array", 0 }, { "u64", 8 }, { "i64", 8 }, { "f64", 8 }, { "number", 0 },
};

typedef struct {
    Text name;
    GgufType type;  // of its items
    bool is_array, used;
    size_t count;
    Cursor value;  // from the first item on
} Key;

typedef struct {
    Key *keys;
    size_t n_keys;
    char family[16];
    Error *error;  // of the first key that was asked for and is not as it must be, so that a parser may ask for
    bool bad;      // many and look once
} Gguf;

// How much of a text a message shows.
static int shown(Text t) { return t.n < 64 ? (int)t.n : 64; }

static bool is_text(Text t, const char *expected) {
    return t.at && strlen(expected) == t.n && !memcmp(t.at, expected, t.n);
}

static bool read_key(Cursor *c, Key *k, Error *e) {
    k->name = take_string(c);
    uint32_t type = take_u32(c);
    k->is_array = type == G_ARRAY;
    if (k->is_array) type = take_u32(c);
    uint64_t count = k->is_array ? take_u64(c) : 1;
    if (c->bad) return refuse(e, "the file ends within its keys");
    if (type >= N_G || type == G_ARRAY)
        return refuse(e, "key %.*s has type %u, which is not known", shown(k->name), k->name.at, type);
    k->type = (GgufType)type;
    k->count = (size_t)count;
    k->value = *c;
    size_t least = type == G_STRING ? sizeof(uint64_t) : gguf_types[type].n_bytes;
    c->bad = count > c->left / least;  // strings have to be walked one by one: not more than there can be
    if (type != G_STRING) take(c, k->count * least);
    for (size_t i = 0; type == G_STRING && i < k->count && !c->bad; i++) take_string(c);
    if (c->bad) return refuse(e, "key %.*s is longer than the file", shown(k->name), k->name.at);
    k->value.left -= c->left;
    return true;
}

// The key of that name, or NULL; a name that begins with a dot is the family's.
static Key *find_key(Gguf *g, const char *name) {
    char full[128];
    snprintf(full, sizeof full, "%s%s", name[0] == '.' ? g->family : "", name);
    for (Key *k = g->keys; k < g->keys + g->n_keys; k++) {
        if (!is_text(k->name, full)) continue;
        k->used = true;
        return k;
    }
    return NULL;
}

// Item i of a key that holds numbers, as a double (no whole number of interest is above 2^53).
static double key_number(const Key *k, size_t i) {
    union { uint64_t u; float f32; double f64; } x = { 0 };
    size_t n = gguf_types[k->type].n_bytes;
    memcpy(&x, k->value.at + i * n, n);
    if (k->type == G_F32) return (double)x.f32;
    if (k->type == G_F64) return x.f64;
    if (gguf_types[k->type].name[0] != 'i') return (double)x.u;
    return (double)((int64_t)(x.u << (64 - 8 * n)) >> (64 - 8 * n));  // the shift to the right copies the sign
}

// A copy of the key of that name, which must hold a value, or an array of values, of that type; zeros if there is none.
static Key get_key(Gguf *g, const char *name, GgufType type, bool is_array) {
    const Key *k = find_key(g, name);
    bool fits = k && k->is_array == is_array && (type == G_NUMBER ? k->type != G_STRING : k->type == type);
    if (k && !fits && !g->bad)
        g->bad = !fail(g->error, BAD_FILE, "key %s is %s%s, expected %s%s", name, k->is_array ? "an array of " : "",
                       gguf_types[k->type].name, is_array ? "an array of " : "", gguf_types[type].name);
    return fits ? *k : (Key){ 0 };
}

// A key's number, or `otherwise` where there is no such key.
static double get_number(Gguf *g, const char *name, double min, double max, double otherwise) {
    Key k = get_key(g, name, G_NUMBER, false);
    double x = k.value.at ? key_number(&k, 0) : otherwise;
    if (!k.value.at || (x >= min && x <= max)) return x;
    if (!g->bad) g->bad = !fail(g->error, BAD_FILE, "key %s is %g, expected %g to %g", name, x, min, max);
    return otherwise;
}

static int get_whole(Gguf *g, const char *name, double min, double max, int otherwise) {
    double x = get_number(g, name, min, max, otherwise);
    if (x != floor(x) && !g->bad) g->bad = !fail(g->error, BAD_FILE, "key %s is %g, not an integer", name, x);
    return (int)x;
}

static Text get_text(Gguf *g, const char *name) {
    Key k = get_key(g, name, G_STRING, false);
    return take_string(&k.value);
}

static bool refuse_key(const Key *k, Error *e) {
    return refuse(e, "key %.*s asks for something that is not implemented", shown(k->name), k->name.at);
}

// A key of the family that nobody has asked for may change what a model computes, and is refused by name, but for the
// value at which it does not: 0 or false, by which files say that they lack a feature, unless this table says more.
static const struct {
    const char *key;
    double harmless;  // NAN: any value is
} other_keys[] = {
    { ".attention.causal", 1 }, { ".logit_scale", 1 }, { ".residual_scale", 1 }, { ".embedding_scale", 1 },
    { ".rope.scaling.finetuned", NAN }, { ".tensor_data_layout", NAN }, { ".rope.scaling.yarn_ext_factor", 1 },
    { "stablelm.use_parallel_residual", NAN },  // often said; the files that mean it have no ffn_norm.weight
    { ".expert_feed_forward_length", NAN },  // of experts that expert_count says there are not
    { ".expert_weights_norm", 1 }, { ".expert_weights_scale", 1 }, { ".expert_gating_func", 1 },  // 1: softmax
};

static bool is_harmless(const Gguf *g, const Key *k) {
    size_t n = strlen(g->family);
    if (k->used || k->name.n <= n || memcmp(k->name.at, g->family, n) || k->name.at[n] != '.') return true;
    double harmless = 0;
    for (size_t i = 0; i < sizeof other_keys / sizeof *other_keys; i++)
        if (is_text((Text){ k->name.at + n, k->name.n - n }, other_keys[i].key) || is_text(k->name, other_keys[i].key))
            harmless = other_keys[i].harmless;
    if (isnan(harmless)) return true;
    if (k->type == G_STRING) return false;
    for (size_t i = 0; i < k->count; i++) if (key_number(k, i) != harmless) return false;
    return true;
}

static bool get_field_of_key(Gguf *g, Model *m, const ConfigField *f, Error *e) {
    int features = find_family(g->family, e)->features, n = f->per_layer ? m->config.n_layers : 1;
    bool layer_norm = features & LAYER_NORMS && !strcmp(f->name, "norm_eps");
    const char *key = layer_norm ? ".attention.layer_norm_epsilon" : f->key;
    const Key *k = !f->feature || features & f->feature ? find_key(g, key) : NULL;
    if (!k && isnan(f->otherwise)) return refuse(e, "key %s%s is missing", g->family, key);
    if (k && (k->type == G_STRING || (k->is_array && (!f->per_layer || k->count != (size_t)n))))
        return refuse(e, "key %s%s is %zu of type %s, expected a number%s", g->family, key, k->count,
                    gguf_types[k->type].name, f->per_layer ? ", or one for each layer" : "");
    for (int l = 0; l < n && (k || f->otherwise > 0); l++)
        if (!set_field(m, f, l, k ? key_number(k, k->is_array ? (size_t)l : 0) : f->otherwise, e)) return false;
    return true;
}

// What files of a family leave to the programs that know it. pattern: for each layer, whether it has the window; or a
// number: the last of so many has none; or NULL.
static void complete_config(Model *m, const Family *f, const Key *pattern) {
    Config *c = &m->config;
    bool largest_gemma = f->features & GEMMA && (c->n_layers == 46 || c->n_layers == 62);
    c->logit_scale = 1 / c->logit_scale;  // Granite divides by it
    if (f->features & GEMMA) c->embedding_scale = sqrtf((float)c->dim);
    if (f->features & GEMMA) c->activation = GELU;
    if (f->features & CAPS && c->attention_cap == 0) c->attention_cap = 50;
    if (f->features & CAPS && c->logit_cap == 0) c->logit_cap = 30;
    float width = largest_gemma ? (float)c->dim / (float)m->layers->n_heads : (float)c->head_dim;
    if (c->attention_scale == 0) c->attention_scale = 1.0f / sqrtf(width);
    if (c->local_theta == 0 && f->local_theta < 0 && m->layers->window) c->local_theta = c->rope_theta;
    if (c->local_theta == 0) c->local_theta = fmax(f->local_theta, 0);
    bool each = pattern && pattern->is_array;
    double every = pattern && !each ? key_number(pattern, 0) : f->global_every;
    for (int l = 0; l < c->n_layers; l++) {
        Layer *layer = &m->layers[l];
        if (each ? !key_number(pattern, (size_t)l) : every != 0 && fmod(l + 1, every) == 0) layer->window = 0;
        bool rotates = !f->no_rope_every || (l + 1) % f->no_rope_every;
        layer->angles = !rotates ? UNROTATED : layer->window && c->local_theta > 0 ? LOCAL : ROTATED;
    }
}

// How the angles are scaled. has_factors: LongRoPE's tensors are there, of which some files have no other sign.
static bool read_gguf_scaling(Gguf *g, Config *c, bool has_factors, Error *e) {
    Text type = get_text(g, ".rope.scaling.type");
    bool none = is_text(type, "none"), yarn = is_text(type, "yarn"), longrope = is_text(type, "longrope");
    double factor = get_number(g, ".rope.scaling.factor", 0, 1e6, get_number(g, ".rope.scale_linear", 1e-6, 1e6, 1));
    double original = get_number(g, ".rope.scaling.original_context_length", 0, MAX_CONTEXT, 0), magnitude = 1;
    c->rope_scale = factor == 0 || none ? 1 : factor;
    c->original_context = (int)original;
    if (yarn) {  // the magnitude is 1 + 0.1 ln(factor), or that over the same with a multiplier of the logarithm
        double x = 0.1 * log(fmax(factor, 1)), all = get_number(g, ".rope.scaling.yarn_log_multiplier", 0, 1e6, 0);
        magnitude = (1 + x) / (1 + all * x);
        c->yarn_fast = get_number(g, ".rope.scaling.yarn_beta_fast", 1e-6, 1e6, 32);
        c->yarn_slow = get_number(g, ".rope.scaling.yarn_beta_slow", 1e-6, 1e6, 1);
        get_number(g, ".rope.scaling.yarn_attn_factor", magnitude * 0.9999, magnitude * 1.0001, 1);
    }
    double usual = original > 0 && has_factors ? sqrt(1 + log(fmax(c->context / original, 1)) / log(original)) : 1;
    c->rope_magnitude = magnitude * get_number(g, ".rope.scaling.attn_factor", 1e-6, 1e6, usual);
    return !type.at || none || yarn || (longrope && has_factors) || is_text(type, "linear") ||
           refuse(e, "rope scaling \"%.*s\" %s", shown(type), type.at,
                  longrope ? "needs rope_factors_long.weight" : "is not implemented");
}

// The configuration, and the refusal of every key that would need code which is not here.
static bool read_gguf_config(Gguf *g, Model *m, const Directory *d, Error *e) {
    Config *c = &m->config;
    bool has_factors = false;
    snprintf(c->family, sizeof c->family, "%s", g->family);
    for (const Entry *entry = d->entries; entry < d->entries + d->n; entry++) {
        bool embeds = !strcmp(entry->name, "token_embd.weight"), fits = entry->source.rows - 1 < MAX_TOKENS;
        if (embeds && !fits) return refuse(e, "%s has %zu rows", entry->name, entry->source.rows);
        if (embeds) c->n_tokens = (int)entry->source.rows;
        has_factors |= !strcmp(entry->name, "rope_factors_long.weight");
    }
    if (d->n == 0) return refuse(e, "no tensors, only a vocabulary: enough for -m tokenize and -m detokenize");
    if (!c->n_tokens) return refuse(e, "token_embd.weight is missing");
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++)
        if (f->key && !get_field_of_key(g, m, f, e)) return false;
    for (Layer *y = m->layers; y < m->layers + c->n_layers; y++) {
        if (!y->n_kv_heads) y->n_kv_heads = y->n_heads;
        if (y->n_experts) y->ffn_dim = get_whole(g, ".expert_feed_forward_length", 1, MAX_FFN_DIM, y->ffn_dim);
    }
    if (!c->head_dim) c->head_dim = c->dim / m->layers->n_heads;
    if (!c->rope_dim) c->rope_dim = c->head_dim;
    const Key *pattern = find_key(g, ".attention.sliding_window_pattern");
    size_t n = pattern ? pattern->is_array ? (size_t)c->n_layers : 1 : 0;
    bool fits = !pattern || (pattern->type != G_STRING && pattern->count == n);
    for (size_t i = 0; fits && i < n; i++) fits = fmod(key_number(pattern, i), 1) == 0 && key_number(pattern, i) >= 0;
    if (!fits) return refuse_key(pattern, e);
    complete_config(m, find_family(c->family, e), pattern);
    get_number(g, ".attention.value_length", c->head_dim, c->head_dim, 0);
    get_number(g, ".vocab_size", c->n_tokens, c->n_tokens, 0);
    m->chat_template = get_text(g, "tokenizer.chat_template");
    if (!read_gguf_scaling(g, c, has_factors, e)) return false;
    for (const Key *k = g->keys; k < g->keys + g->n_keys; k++) if (!is_harmless(g, k)) return refuse_key(k, e);
    return true;
}

// The vocabulary of a GGUF, as a section of our own. options.pre takes the place of a pre-tokenizer that is not known.
// False too where any key before was bad.
static bool read_gguf_vocabulary(Gguf *g, Buffer *section, Error *e) {
    Text model = get_text(g, "tokenizer.ggml.model"), pre = get_text(g, "tokenizer.ggml.pre");
    Key pieces = get_key(g, "tokenizer.ggml.tokens", G_STRING, true);
    Key scores = get_key(g, "tokenizer.ggml.scores", G_F32, true);
    Key piece_types = get_key(g, "tokenizer.ggml.token_type", G_I32, true);
    Key merges = get_key(g, "tokenizer.ggml.merges", G_STRING, true);
    Vocabulary v = {
        .kind = is_text(model, "llama") ? SPM : BPE,
        .pre = options.pre ? (Text){ options.pre, strlen(options.pre) } : pre,
        .n_tokens = pieces.count, .pieces = pieces.value, .n_merges = merges.count, .merges = merges.value,
        .scores = scores.value.at, .types = piece_types.value.at,
        .bos = get_whole(g, "tokenizer.ggml.bos_token_id", 0, INT32_MAX, -1),
        .eos = get_whole(g, "tokenizer.ggml.eos_token_id", 0, INT32_MAX, -1),
        .eot = get_whole(g, "tokenizer.ggml.eot_token_id", 0, INT32_MAX, -1),
        .eom = get_whole(g, "tokenizer.ggml.eom_token_id", 0, INT32_MAX, -1),
        .unk = get_whole(g, "tokenizer.ggml.unknown_token_id", 0, INT32_MAX, -1),
        .add_bos = get_whole(g, "tokenizer.ggml.add_bos_token", 0, 1, -1),
        .add_eos = get_whole(g, "tokenizer.ggml.add_eos_token", 0, 1, -1),
        .ignore_merges = get_whole(g, "tokenizer.ggml.ignore_merges", 0, 1, -1),
        .composes = get_whole(g, "tokenizer.ggml.normalizer.nfc", 0, 1, -1),
        .dummy_prefix = get_whole(g, "tokenizer.ggml.add_space_prefix", 0, 1, -1),
    };
    get_number(g, "tokenizer.ggml.remove_extra_whitespaces", 0, 0, 0);
    if (g->bad) return false;
    if (v.kind == BPE && !is_text(model, "gpt2"))
        return refuse(e, "tokenizer.ggml.model \"%.*s\" is unknown", shown(model), model.at ? model.at : "");
    const Key *map = find_key(g, "tokenizer.ggml.precompiled_charsmap");
    if (map && map->count > 0) return refuse_key(map, e);
    if ((v.scores && scores.count != v.n_tokens) || (v.types && piece_types.count != v.n_tokens))
        return refuse(e, "%zu tokens, %zu scores, %zu types", v.n_tokens, scores.count, piece_types.count);
    return pack_vocabulary(&v, section, e);
}

// One tensor's name, shape, type and offset; place_entries() finds its data, bind_slot() says what shape fits.
static bool read_gguf_tensor(Cursor *c, Entry *entry, Error *e) {
    Text name = take_string(c);
    uint32_t n_dims = take_u32(c);
    uint64_t dims[3] = { 1, 1, 1 };
    for (uint32_t i = 0; i < n_dims && i < 3; i++) dims[i] = take_u64(c);
    uint32_t type = take_u32(c);
    entry->offset = take_u64(c);
    if (c->bad) return refuse(e, "the file ends within its list of tensors");
    if (name.n == 0 || name.n >= NAME_BYTES || memchr(name.at, 0, name.n))
        return refuse(e, "a tensor's name has %zu bytes or a NUL", name.n);
    memcpy(entry->name, name.at, name.n);
    if (n_dims > 3) return refuse(e, "%s has %u dimensions, expected 1 to 3", entry->name, n_dims);
    const SourceType *source = NULL;
    for (int i = 0; i < N_SOURCE_TYPES; i++) if (source_types[i].gguf_id == (int64_t)type) source = &source_types[i];
    if (!source) return refuse(e, "%s is of GGUF type %u, which is not supported", entry->name, type);
    entry->is_vector = n_dims == 1;
    entry->n = (size_t)dims[2];
    entry->source = (Source){ source, (size_t)dims[1], (size_t)dims[0], NULL, NULL, 0 };
    entry->n_bytes = times(entry->n, source_bytes(&entry->source));
    return true;
}

// Adds a file's tensors, from the cursor on, to the directory; `bytes` is where the file begins.
static bool read_gguf_tensors(Gguf *g, Cursor *c, const unsigned char *bytes, uint64_t n, Directory *d, Error *e) {
    size_t step = (size_t)get_number(g, "general.alignment", 8, 1 << 20, 32);
    if (g->bad) return false;
    if (step & (step - 1)) return refuse(e, "key general.alignment is %zu, expected a power of two", step);
    if (n > MAX_TENSORS - d->n || n > c->left / 24)
        return refuse(e, "claims to have %llu tensors; %zu bytes are left", (unsigned long long)n, c->left);
    Buffer all = { (void *)d->entries, d->n * sizeof *d->entries, d->n * sizeof *d->entries };
    if (!append(&all, NULL, ((size_t)n + 1) * sizeof *d->entries, e)) return false;  // one more, so that it is never 0
    d->entries = (void *)all.bytes;
    Directory own = { d->entries + d->n, 0 };
    for (; own.n < n; own.n++, d->n++) if (!read_gguf_tensor(c, &own.entries[own.n], e)) return false;
    size_t n_read = (size_t)(c->at - bytes);
    take(c, round_up(n_read, step) - n_read);
    return place_entries(&own, *c, step, e);
}

static int by_key_name(const void *a, const void *b) {
    const Text *x = a, *y = b;  // a Key begins with its name
    return x->n == y->n ? memcmp(x->at, y->at, x->n) : x->n < y->n ? -1 : 1;
}

// The header and all keys, sorted; the cursor is left at the tensors. The caller frees g->keys.
static bool read_gguf_keys(Cursor *c, Gguf *g, uint64_t *n_tensors, Error *e) {
    uint32_t magic = take_u32(c), version = take_u32(c);
    *n_tensors = take_u64(c);
    uint64_t n_keys = take_u64(c);
    if (c->bad || magic != 0x46554747) return refuse(e, "the file ends within its header");
    if (version != 2 && version != 3) return refuse(e, "has GGUF version %u, expected 2 or 3", version);
    if (n_keys > MAX_KEYS || n_keys > c->left / 13)
        return refuse(e, "claims to have %llu keys; %zu bytes are left", (unsigned long long)n_keys, c->left);
    *g = (Gguf){ .keys = allocate((size_t)n_keys, sizeof *g->keys, e), .error = e };
    if (!g->keys) return false;
    for (; g->n_keys < n_keys; g->n_keys++) if (!read_key(c, &g->keys[g->n_keys], e)) return false;
    qsort(g->keys, g->n_keys, sizeof *g->keys, by_key_name);
    for (const Key *k = g->keys; k + 1 < g->keys + g->n_keys; k++)
        if (by_key_name(k, k + 1) == 0) return refuse(e, "key %.*s is there twice", shown(k->name), k->name.at);
    Text family = get_text(g, "general.architecture");
    snprintf(g->family, sizeof g->family, "%.*s", shown(family), family.at ? family.at : "");
    return !family.at || !memchr(family.at, 0, family.n) || refuse(e, "key general.architecture has a NUL in it");
}

// A whole file, or a part of a split one, of which the first has all keys but those that number the parts. Its tensors
// are added to d, if that is not NULL. The caller frees g->keys.
static bool read_gguf_part(Cursor file, size_t part, size_t parts, Gguf *g, Directory *d, Error *e) {
    Cursor c = file;
    uint64_t n_tensors;
    if (!read_gguf_keys(&c, g, &n_tensors, e)) return false;
    if (part == 1 && !find_key(g, "general.architecture")) return refuse(e, "key general.architecture is missing");
    if (!d) return true;
    double number = get_number(g, "split.no", 0, 65535, 0) + 1, count = get_number(g, "split.count", 0, 65535, 0);
    if (g->bad || (part == 1 && !find_family(g->family, e))) return false;
    if (number != (double)part || fmax(count, 1) != (double)parts)
        return refuse(e, "says that it is part %g of %g of a split GGUF, its name says %zu of %zu", number, count, part,
                      parts);
    return read_gguf_tensors(g, &c, file.at, n_tensors, d, e);
}

static bool parse_gguf(Cursor file, Model *m, Directory *d, Error *e) {
    Gguf g = { 0 };
    bool ok = read_gguf_part(file, 1, m->n_parts + 1, &g, d, e);
    for (size_t i = 0; d && ok && i < m->n_parts; i++) {
        Gguf part = { 0 };
        Cursor c = { m->parts[i].bytes, m->parts[i].n_bytes, false };
        ok = read_gguf_part(c, i + 2, m->n_parts + 1, &part, d, e) || in_part(i + 2, e);
        free(part.keys);
    }
    double n = d && ok ? get_number(&g, "split.tensors.count", 0, MAX_TENSORS, (double)d->n) : 0;
    if (d && ok && n != (double)d->n) ok = refuse(e, "has %zu tensors, key split.tensors.count says %g", d->n, n);
    if (d) ok = ok && read_gguf_config(&g, m, d, e);
    ok = ok && read_gguf_vocabulary(&g, &m->packed_vocabulary, e);
    free(g.keys);
    return ok;
}

// ---- llama2.c ----

// v0: seven integers, then floats. v1: a header of 256 bytes, then floats. v2: the same header, norms in floats,
// matrices as int8 in groups. Tensors follow each other by kind and, within a kind, by layer; from v1 on all vectors
// come before all matrices. "" stands for v0's table of angles.
static const char *const llama2c_order[] = {
    "token_embd.weight", "attn_norm.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight",
    "ffn_norm.weight", "ffn_gate.weight", "ffn_down.weight", "ffn_up.weight", "output_norm.weight", "", "output.weight",
};
enum { N_LLAMA2C = sizeof llama2c_order / sizeof *llama2c_order };

typedef struct { int32_t dim, ffn_dim, n_layers, n_heads, n_kv_heads, n_tokens, context; } Llama2cHeader;

// Adds the tensor of a slot that lies at the cursor.
static bool add_llama2c_tensor(const Slot *slot, Cursor *c, int32_t group, Directory *d, Error *e) {
    Entry *entry = &d->entries[d->n++];
    bool grouped = group && slot->tensor;
    const SourceType *type = &source_types[grouped ? SOURCE_GROUPS : SOURCE_F32];
    entry->source = (Source){ type, slot->rows, slot->cols, c->at, NULL, (size_t)group };
    entry->n = 1;
    entry->is_vector = slot->vector != NULL;
    memcpy(entry->name, slot->name, NAME_BYTES);
    if (grouped && (slot->cols % (size_t)group || group % 32))
        return refuse(e, "groups of %d: no multiple of 32 that divides the %zu columns of %s", group,
                    slot->cols, slot->name);
    entry->n_bytes = source_bytes(&entry->source);
    take(c, entry->n_bytes);
    if (grouped) entry->source.scales = take(c, times(slot->rows, slot->cols) / (size_t)group * 4);
    return !c->bad || refuse(e, "the file ends within %s: not copied whole?", slot->name);
}

static bool read_llama2c_tensors(Model *m, Cursor *c, int version, bool shared, int32_t group, Directory *d, Error *e) {
    if (!(d->entries = allocate(n_slots(m), sizeof *d->entries, e))) return false;
    for (int i = 0; i < (version ? 2 : 1) * N_LLAMA2C; i++) {
        const char *name = llama2c_order[i % N_LLAMA2C];
        bool vectors = !version || i < N_LLAMA2C, matrices = !version || i >= N_LLAMA2C;
        if (!*name && !version) take(c, (size_t)m->config.context * (size_t)m->config.head_dim * 4);
        if (!*name || (shared && !strcmp(name, "output.weight"))) continue;
        for (size_t j = 0; j < n_slots(m); j++) {
            Slot slot = get_slot(m, j);
            if (strcmp(slot.rule->name, name) || !(slot.vector ? vectors : matrices)) continue;
            if (!add_llama2c_tensor(&slot, c, group, d, e)) return false;
        }
    }
    return c->left == 0 || refuse(e, "%zu bytes are left after the weights that its header asks for", c->left);
}

static bool parse_llama2c(Cursor file, Model *m, Directory *d, Error *e) {
    if (!d) return read_llama2c_tokenizer(file, &m->packed_vocabulary, e);
    Cursor c = file;
    Llama2cHeader h;
    uint32_t version = 0;
    int32_t group = 0;
    if (file.left >= 4 && !memcmp(file.at, "24ka", 4)) {  // 0x616b3432, "ak42", little-endian
        take_u32(&c);
        version = take_u32(&c);
        if (version < 1 || version > 2)
            return refuse(e, "has version %u of llama2.c's format, expected 1 or 2", version);
    }
    take_into(&c, &h, sizeof h);
    uint8_t shared = h.n_tokens > 0;  // v0 says by a negative number that the head has weights of its own
    if (!version && h.n_tokens < 0 && h.n_tokens > INT32_MIN) h.n_tokens = -h.n_tokens;
    if (version) take_into(&c, &shared, sizeof shared);
    if (shared > 1) return refuse(e, "its shared-classifier byte is %d, expected 0 or 1", shared);
    if (version == 2) take_into(&c, &group, sizeof group);
    if (version) take(&c, 256 - (size_t)(c.at - file.at));  // what ends before that has no heads, or no tensors
    if (h.n_heads < 1 || h.dim % h.n_heads || (version == 2 && group < 1))
        return refuse(e, "is no checkpoint that cria knows: GGUF, its own, or llama2.c's");
    int head_dim = h.dim / h.n_heads;
    m->config = (Config){ .family = "llama", .n_layers = h.n_layers, .dim = h.dim, .n_tokens = h.n_tokens,
                          .head_dim = head_dim, .rope_dim = head_dim, .context = h.context,
                          .norm_eps = 1e-5f, .rope_theta = 10000, .rope_scale = 1, .rope_magnitude = 1,
                          .embedding_scale = 1, .residual_scale = 1, .logit_scale = 1 };
    if (!set_field(m, &config_fields[0], 0, h.n_layers, e)) return false;
    for (int l = 0; l < h.n_layers; l++)
        m->layers[l] = (Layer){ .n_heads = h.n_heads, .n_kv_heads = h.n_kv_heads, .ffn_dim = h.ffn_dim };
    complete_config(m, families, NULL);
    return check_config(m, e) && read_llama2c_tensors(m, &c, (int)version, shared, group, d, e);
}

// ---- Any of them ----

// Things that people take for a checkpoint, by the bytes at some place.
static const struct { size_t at; const char *sign, *thing; } mistakes[] = {
    { 0, "PK\3\4", "a zip archive or PyTorch file: export_model.py converts those of models" },
    { 8, "{\"", "a safetensors file: export_model.py converts its folder" },
    { 0, "version ", "a Git LFS pointer: the file itself was not fetched (git lfs pull)" },
    { 0, "<!", "a web page: was it the right link?" }, { 0, "<h", "a web page: was it the right link?" },
    { 0, "FUGG", "a big-endian GGUF, which is not supported" }, { 0, "\177ELF", "a program" },
};

typedef enum { NATIVE, GGUF, LLAMA2C } Container;

static Container recognise(const unsigned char *bytes, size_t n) {
    if (n >= 8 && !memcmp(bytes, native_magic, 8)) return NATIVE;
    return n >= 4 && !memcmp(bytes, "GGUF", 4) ? GGUF : LLAMA2C;
}

// Parses the file, and opens the vocabulary that is in it or was made from it, in place of the one there may be.
static bool parse_file(Cursor file, Model *m, Directory *d, Error *e) {
    static bool (*const parsers[])(Cursor file, Model *m, Directory *d, Error *e) = {
        [NATIVE] = parse_native, [GGUF] = parse_gguf, [LLAMA2C] = parse_llama2c,
    };
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
        size_t at = mistakes[i].at, length = strlen(mistakes[i].sign);
        if (file.left >= at + length && !memcmp(file.at + at, mistakes[i].sign, length))
            return refuse(e, "is %s", mistakes[i].thing);
    }
    Container container = recognise(file.at, file.left);
    const char *path = file.at == m->file.bytes ? m->file.path : "FILE";
    size_t n = file.left < 64 ? file.left : 64, n_text = 0;  // llama2.c's files have zeros there
    while (n_text < n && (file.at[n_text] >= ' ' || (file.at[n_text] >= '\t' && file.at[n_text] <= '\r'))) n_text++;
    if (container == LLAMA2C && n_text == n) return refuse(e, "a text file, not a model; as a prompt: -f %s", path);
    const Buffer *made = &m->packed_vocabulary;
    close_tokenizer(&m->tokenizer);
    m->vocabulary = NULL;
    m->packed_vocabulary.n = 0;
    if (!parsers[container](file, m, d, e)) return false;
    if (made->n) m->vocabulary = made->bytes;
    if (made->n) m->vocabulary_bytes = made->n;
    return !m->vocabulary || open_tokenizer(m->vocabulary, m->vocabulary_bytes, &m->tokenizer, e);
}

// A model from a file's bytes; without threads all but its weights. On failure too, close_model() frees what it has.
static bool open_model(const unsigned char *bytes, size_t n_bytes, int threads, Model *m, Error *e) {
    Directory d = { 0 };
    Cursor file = { bytes, n_bytes, false };
    bool ok = parse_file(file, m, &d, e) && check_config(m, e) && (threads == 0 || bind_model(m, &d, threads, e));
    free(d.entries);
    int n = m->tokenizer.n_tokens;
    return ok && (n == 0 || n == m->config.n_tokens ||
                  refuse(e, "its tokenizer has %d tokens, its weights %d", n, m->config.n_tokens));
}

// The tokenizer of any file that holds one. n_tokens: how many it must have, or -1: then it says so itself.
static bool open_vocabulary(const unsigned char *bytes, size_t n_bytes, int n_tokens, Model *m, Error *e) {
    if (!parse_file((Cursor){ bytes, n_bytes, false }, m, NULL, e)) return false;
    int n = m->tokenizer.n_tokens;
    if (n_tokens < 0) n_tokens = m->config.n_tokens = n;
    return n == n_tokens || refuse(e, "the tokenizer has %d tokens, the model has %d", n, n_tokens);
}

static void close_model(Model *m) {
    close_tokenizer(&m->tokenizer);
    free(m->packed_vocabulary.bytes);
    free(m->layers);
    if (m->packed) munmap(m->packed, m->packed_bytes);
    if (m->file.bytes) munmap((void *)m->file.bytes, m->file.n_bytes);
    for (size_t i = 0; i < m->n_parts; i++) munmap((void *)m->parts[i].bytes, m->parts[i].n_bytes);
    free(m->parts);
    if (m->tokenizer_file.bytes) munmap((void *)m->tokenizer_file.bytes, m->tokenizer_file.n_bytes);
    *m = (Model){ 0 };
}

// ---- Chat templates ----

// In system, user and answer, @ stands for the text; what is round it are the template's own words.
struct ChatTemplate {
    const char *name;
    const char *signs[6];              // in the template of the checkpoint that it is for; "!..." is not in it
    const char *default_system;        // where the user says nothing; NULL: then there is no system text
    const char *system;                // NULL: this form knows no system text
    const char *user, *answer;
    bool trims;                        // white space round the texts is dropped
    bool system_in_user;               // the system text stands in the first user text, at its beginning
};

// The checkpoint's template is a program in a language of its own (Jinja), which is compared and never run. To add a
// form: a row here, before those whose signs it has too; tests/make_chat_goldens.py has the same table beside the
// published templates. LLaMA 3.1's dates are those that its template has where nobody gives it the day.
#define CHATML "<|im_start|>system\n@<|im_end|>\n", "<|im_start|>user\n@<|im_end|>\n", \
               "<|im_start|>assistant\n@<|im_end|>\n", false, false
#define LLAMA3(dates) "<|start_header_id|>system<|end_header_id|>\n\n" dates "@<|eot_id|>", \
                      "<|start_header_id|>user<|end_header_id|>\n\n@<|eot_id|>", \
                      "<|start_header_id|>assistant<|end_header_id|>\n\n@<|eot_id|>", true, false
static const ChatTemplate chat_templates[] = {
    { "smollm2", { "<|im_start|>system", "AI assistant named SmolLM, trained by Hugging Face<|im_end|>" },
      "You are a helpful AI assistant named SmolLM, trained by Hugging Face", CHATML },
    { "qwen2.5", { "<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. " },
      "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", CHATML },
    { "qwen2", { "<|im_start|>system", "You are a helpful assistant.", "!You are Qwen" },
      "You are a helpful assistant.", CHATML },
    { "qwen1.5", { "<|im_start|>system", "You are a helpful assistant<|im_end|>" },
      "You are a helpful assistant", CHATML },
    { "chatml", { "<|im_start|>", "<|im_end|>", "!<|im_sep|>", "!<think>", "!You are" }, NULL, CHATML },
    { "qwen3", { "<|im_start|>", "<|im_end|>", "enable_thinking is false", "!## Metadata", "!raise_exception" },
      NULL, CHATML },
    { "llama3.1", { "<|start_header_id|>", "Cutting Knowledge Date: December 2023", "26 Jul 2024" },
      "", LLAMA3("Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n") },
    { "llama3", { "<|start_header_id|>", "<|eot_id|>", "!Cutting Knowledge", "!tools" }, NULL, LLAMA3("") },
    { "llama2", { "<<SYS>>", "bos_token + '[INST] '", "strip() + ' ' + eos_token" },
      NULL, "<<SYS>>\n@\n<</SYS>>\n\n", "[INST] @ [/INST]", "@ </s><s>", true, true },
    { "mistral-v7", { "[SYSTEM_PROMPT] ", "[INST] " },
      NULL, "[SYSTEM_PROMPT] @[/SYSTEM_PROMPT]", "[INST] @[/INST]", "@</s>", false, false },
    { "mistral-v7-tekken", { "[SYSTEM_PROMPT]", "[INST]", "![THINK]" },
      NULL, "[SYSTEM_PROMPT]@[/SYSTEM_PROMPT]", "[INST]@[/INST]", "@</s>", false, false },
    { "mistral-v3-tekken", { "\"[INST]\" + system_message" }, NULL, "@\n\n", "[INST]@[/INST]", "@</s>", false, true },
    { "mistral-v3", { "\"[INST] \" + system_message", "[/INST]" },
      NULL, "@\n\n", "[INST] @[/INST]", "@</s>", false, true },
    { "mistral-v1", { "' [INST] ' + system_message" }, NULL, "@\n\n", " [INST] @ [/INST]", "@</s>", false, true },
    { "mistral", { "{{ '[INST] ' + message['content'] + ' [/INST]' }}", "message['content'] + eos_token}}" },
      NULL, NULL, "[INST] @ [/INST]", "@</s>", false, false },
    { "phi3", { "<|assistant|>", "<|end|>", "!tools", "!<think>" },
      NULL, "<|system|>\n@<|end|>\n", "<|user|>\n@<|end|>\n", "<|assistant|>\n@<|end|>\n", false, false },
    { "zephyr", { "<|user|>", "<|assistant|>", "+ eos_token", "!tools" },
      NULL, "<|system|>\n@</s>\n", "<|user|>\n@</s>\n", "<|assistant|>\n@</s>\n", false, false },
    { "vicuna", { "USER: ", "A chat between a curious user" },
      "A chat between a curious user and an artificial intelligence assistant. "
      "The assistant gives helpful, detailed, and polite answers to the user's questions.",
      "@ ", "USER: @ ", "ASSISTANT:@</s>", false, false },
    { "vicuna-lines", { "USER: ", "ASSISTANT:", "!SYSTEM: ", "!curious" },
      NULL, "@\n\n", "USER: @\n", "ASSISTANT:@</s>\n", false, false },
    { "alpaca", { "### Instruction:", "### Response:", "that appropriately complete each request." },
      "Below are some instructions that describe some tasks. Write responses that appropriately complete each request.",
      "@\n\n", "### Instruction:\n@\n\n", "### Response:\n@</s>\n\n", false, false },
    { "deepseek-r1", { "<｜User｜>", "<｜Assistant｜><think>\\n'}}", "!enable_thinking" },
      NULL, "@", "<｜User｜>@", "<｜Assistant｜><think>\n@<｜end▁of▁sentence｜>", false, false },
    { "deepseek3", { "<｜User｜>", "<｜Assistant｜>", "!<think>" },
      NULL, "@", "<｜User｜>@", "<｜Assistant｜>@<｜end▁of▁sentence｜>", false, false },
    { "deepseek", { "'Assistant: ' + message['content'] + eos_token" },
      NULL, "@\n\n", "User: @\n\n", "Assistant:@<｜end▁of▁sentence｜>", false, false },
    { "gemma", { "<start_of_turn>", "<end_of_turn>" }, NULL, "@\n\n", "<start_of_turn>user\n@<end_of_turn>\n",
      "<start_of_turn>model\n@<end_of_turn>\n", true, true },
};
enum { N_CHAT_TEMPLATES = sizeof chat_templates / sizeof *chat_templates };
enum { MAX_TEMPLATE = 1 << 20 };  // bytes; in a larger one no signs are looked for

// The form with that name, or, without a name, the one whose signs are in the checkpoint's template.
static const ChatTemplate *choose_template(const Model *m, const char *name, Error *e) {
    char names[320] = "";
    for (int i = 0; i < N_CHAT_TEMPLATES; i++) {
        const ChatTemplate *t = &chat_templates[i];
        bool fits = name ? !strcmp(name, t->name) : m->chat_template.n && m->chat_template.n <= MAX_TEMPLATE;
        for (int j = 0; !name && fits && j < 6 && t->signs[j]; j++) {
            bool absent = t->signs[j][0] == '!';
            const char *sign = t->signs[j] + absent;
            fits = (memmem(m->chat_template.at, m->chat_template.n, sign, strlen(sign)) != NULL) != absent;
        }
        if (fits) return t;
        size_t n = strlen(names);
        snprintf(names + n, sizeof names - n, "%s%s", i ? ", " : "", t->name);
    }
    if (name) fail(e, MISUSE, "--template %.40s: expected one of %s", name, names);
    else fail(e, MISUSE, "the checkpoint's chat template is not known; choose with --template: %s", names);
    return NULL;
}

static Span trimmed(const char *text, size_t n, bool start, bool end) {
    while (start && n > 0 && isspace((unsigned char)*text)) text++, n--;
    while (end && n > 0 && isspace((unsigned char)text[n - 1])) n--;
    return (Span){ text, n, false };
}

// The template's own words before the text, and after it. Only in these special tokens are read as such.
static Span opening(const char *form) { return (Span){ form, strcspn(form, "@"), true }; }

static Span closing(const char *form) {
    const char *words = strchr(form, '@') + 1;
    return (Span){ words, strlen(words), true };
}

// What the model is to read before it answers: the end of its last answer or the system text, and the message.
static int render_turn(const ChatTemplate *t, bool first, const char *system, const char *message, size_t n,
                       Span *spans) {
    int i = 0;
    bool inside = t->system_in_user, trims_system = t->trims && !inside;
    system = !first || !t->system ? NULL : system ? system : t->default_system;
    if (!first) spans[i++] = closing(t->answer);
    if (inside) spans[i++] = opening(t->user);
    if (system) {
        spans[i++] = opening(t->system);
        spans[i++] = trimmed(system, strlen(system), trims_system, trims_system);
        spans[i++] = closing(t->system);
    }
    if (!inside) spans[i++] = opening(t->user);
    spans[i++] = trimmed(message, n, t->trims && !(system && inside), t->trims);
    spans[i++] = closing(t->user);
    spans[i++] = opening(t->answer);
    return i;
}

// ---- What only some models do ----

// OLMo2.
static void normalise_heads(const Model *m, State *s, const Layer *layer, int n, Team team) {
    size_t head_dim = (size_t)m->config.head_dim;
    float eps = m->config.norm_eps;
    Range tokens = share((size_t)n, team);
    for (size_t t = tokens.from; t < tokens.to; t++) {
        float *query = s->query + t * s->q_stride, *key = s->key + t * s->kv_stride;
        kernels->normalise(query, query, layer->query_norm, NULL, (size_t)layer->n_heads * head_dim, eps);
        kernels->normalise(key, key, layer->key_norm, NULL, (size_t)layer->n_kv_heads * head_dim, eps);
    }
    wait_for_team(team);
}

// Makes of the router's logits for a token the weights of its n_used likeliest experts, the softmax of theirs, and 0.
// A logit that is not finite makes none of them a number.
static void choose_experts(float *p, int n_experts, int n_used) {
    float weight[MAX_EXPERTS], sum = 0;
    int best[MAX_EXPERTS + 1];  // and a place for the one that falls out
    for (int e = 0, at; e < n_experts; e++) {
        for (at = e < n_used ? e : n_used; at > 0 && p[e] > p[best[at - 1]]; at--) best[at] = best[at - 1];
        best[at] = e;
        sum += p[e] - p[e];
    }
    for (int i = 0; i < n_used; i++) sum += weight[i] = exponential(p[best[i]] - p[best[0]]);
    memset(p, 0, (size_t)n_experts * sizeof *p);
    for (int i = 0; i < n_used; i++) p[best[i]] = weight[i] / sum;
}

static Activations route(const Model *m, State *s, const Layer *layer, const Activations *x, int n, Team team) {
    size_t n_experts = (size_t)layer->n_experts;
    Range tokens = share((size_t)n, team);
    matmul(s->routes, s->routes_stride, &layer->router, NULL, x, team);
    wait_for_team(team);
    for (size_t t = tokens.from; t < tokens.to; t++) {
        choose_experts(s->routes + t * s->routes_stride, layer->n_experts, layer->n_experts_used);
        memset(s->out + t * s->x_stride, 0, s->x_stride * sizeof *s->out);
    }
    wait_for_team(team);
    for (size_t e = 0, i = 0; e < n_experts && team.thread == 0; s->first_visit[++e] = (int)i) {
        for (int t = 0; t < n; t++) if (s->routes[(size_t)t * s->routes_stride + e] != 0) s->visitors[i++] = t;
    }
    wait_for_team(team);
    return prepare(s, s->normed, s->x_stride, s->visitors, (size_t)m->config.dim, s->first_visit[n_experts], team);
}

static Activations visits(const State *s, size_t e, Activations all) {
    size_t first = (size_t)s->first_visit[e];
    return (Activations){ all.x, all.rounded, all.n, first, (size_t)s->first_visit[e + 1] - first, e };
}

static void add_visits(State *s, const Activations *x, Range rows) {
    for (size_t i = 0; i < x->some; i++) {
        size_t t = (size_t)s->visitors[x->first + i];
        const float *weight = s->routes + t * s->routes_stride + x->expert, *y = s->expert_out + i * s->x_stride;
        for (size_t r = rows.from; r < rows.to; r += 16)
            kernels->add_products(s->out + t * s->x_stride + r, 16, weight, 1, y + r, false, 16, 1, 1);
    }
}

// ---- The memory to run it in ----

// All buffers of the forward pass come from one block. lay_out_state() runs twice, first without it, to count bytes.
// The next count things of that size, 64-byte aligned; NULL while counting. A sum beyond SIZE_MAX stays there.
static void *place(State *s, size_t count, size_t size) {
    unsigned char *p = s->arena ? (unsigned char *)s->arena + s->arena_bytes : NULL;
    s->arena_bytes = round_up(plus(s->arena_bytes, times(count, size)), 64);
    return p;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static void lay_out_state(const Model *m, State *s) {
    const Config *c = &m->config;
    s->arena_bytes = 0;
    size_t head_dim = (size_t)c->head_dim, group = QUERIES_TOGETHER, experts = 0, used = 0;
    for (const Layer *layer = m->layers; layer < m->layers + c->n_layers; layer++) {
        s->q_stride = larger(s->q_stride, round_up((size_t)layer->n_heads * head_dim, 32));
        s->kv_stride = larger(s->kv_stride, round_up((size_t)layer->n_kv_heads * head_dim, 32));
        s->ffn_stride = larger(s->ffn_stride, round_up((size_t)layer->ffn_dim, 32));
        group = larger(group, (size_t)(layer->n_heads / layer->n_kv_heads));
        experts = larger(experts, (size_t)layer->n_experts);
        used = larger(used, (size_t)layer->n_experts_used);
    }
    size_t n = (size_t)s->batch, positions = round_up((size_t)s->context, 16), visits = n * used;
    size_t n_or_threads = larger(n, (size_t)s->threads), rows = larger(n, visits);
    s->x_stride = round_up((size_t)c->dim, 32);
    s->logits_stride = round_up((size_t)c->n_tokens, 16);
    s->routes_stride = round_up(experts, 16);
    s->scratch_stride = 2 * group * round_up(head_dim, 16) + group * (positions + 16);
    s->widest = larger(larger(s->x_stride, s->q_stride), s->ffn_stride);
    s->logits = place(s, LOGITS_AT_ONCE * s->logits_stride, sizeof(float));
    s->scratch = place(s, (size_t)s->threads * s->scratch_stride, sizeof(float));
    s->angles = place(s, (c->local_theta > 0 ? 2 : 1) * positions * (size_t)c->rope_dim, sizeof(float));
    s->batch_bytes = s->arena_bytes;
    const struct { float **at; size_t rows, stride; } floats[] = {
        { &s->x, n, s->x_stride }, { &s->normed, n_or_threads, s->x_stride }, { &s->out, n, s->x_stride },
        { &s->query, n, s->q_stride }, { &s->attended, n, s->q_stride }, { &s->key, n, s->kv_stride },
        { &s->value, n, s->kv_stride }, { &s->gate, rows, s->ffn_stride }, { &s->up, rows, s->ffn_stride },
        { &s->expert_out, used ? n : 0, s->x_stride }, { &s->routes, n, s->routes_stride },
    };
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++)
        *floats[i].at = place(s, floats[i].rows * floats[i].stride, sizeof(float));
    s->blocks = place(s, rows * s->widest / 32, sizeof *s->blocks);
    s->rounded = place(s, larger(n_or_threads, visits) * s->widest / 32, sizeof *s->rounded);
    s->visitors = place(s, visits, sizeof *s->visitors);
    s->first_visit = place(s, experts + 1, sizeof *s->first_visit);
    s->broken = place(s, n, sizeof *s->broken);
    s->keys = place(s, (size_t)c->n_layers, sizeof *s->keys);
    s->values = place(s, (size_t)c->n_layers, sizeof *s->values);
    s->batch_bytes = s->arena_bytes - s->batch_bytes;
    for (int l = 0; l < c->n_layers; l++) {
        size_t size = positions * (size_t)m->layers[l].n_kv_heads * (s->cache_f32 ? sizeof(float) : sizeof(uint16_t));
        void *key = place(s, size, head_dim), *value = place(s, size, round_up(head_dim, 16));
        if (!s->arena) continue;
        s->keys[l] = key;
        s->values[l] = value;
    }
}

// In the order in which attention reads it: see State.
static void remember(const State *s, int layer, size_t head, size_t head_dim, size_t position, const float *key,
                     const float *value) {
    size_t positions = round_up((size_t)s->context, 16), row = round_up(head_dim, 16);
    size_t tile = (head * positions + position / 16 * 16) * head_dim + position % 16;
    uint16_t half_key[MAX_HEAD_DIM], half_value[MAX_HEAD_DIM];
    if (!s->cache_f32) kernels->narrow(half_key, key, head_dim);
    if (!s->cache_f32) kernels->narrow(half_value, value, head_dim);
    for (size_t d = 0; d < head_dim; d++) {
        size_t k = tile + d * 16, v = (head * row + d / 16 * 16) * positions + position * 16 + d % 16;
        if (s->cache_f32) {
            ((float *)s->keys[layer])[k] = key[d];
            ((float *)s->values[layer])[v] = value[d];
        } else {
            ((uint16_t *)s->keys[layer])[k] = half_key[d];
            ((uint16_t *)s->values[layer])[v] = half_value[d];
        }
    }
}

// By what the angles of a pair are smaller than theta says. Linear scaling turns all pairs slower alike; YaRN not those
// that turn more than yarn_fast times in the original context, wholly those that turn less than yarn_slow times, and in
// part those between (Peng et al., "YaRN"). LLaMA 3.1 has a factor for each pair; LongRoPE too, and others where the
// context is longer than the original one (Ding et al., "LongRoPE").
static double slow_down(const Model *m, int context, int pair) {
    const Config *c = &m->config;
    double scale = c->rope_scale, ramp = 1;
    int original = c->original_context ? c->original_context : c->context;
    if (c->yarn_fast > 0) {  // pair i turns n times where i = R ln(original / (2 pi n)) / (2 ln theta)
        double pairs = c->rope_dim / (2 * log(c->rope_theta)), once = pairs * log(original / (2 * M_PI));
        double first = fmax(floor(once - pairs * log(c->yarn_fast)), 0);
        double last = fmin(ceil(once - pairs * log(c->yarn_slow)), c->rope_dim - 1);
        ramp = fmin(fmax((pair - first) / fmax(last - first, 0.001), 0), 1);
    }
    const float *own = m->rope_factors ? m->rope_factors : context > original ? m->long_factors : m->short_factors;
    return scale / (ramp + (1 - ramp) * scale) * (own ? (double)own[pair] : 1);
}

// Makes a state. The caller has set s->context, batch (without -b one that may shrink), threads, exact and cache_f32.
static bool make_state(const Model *m, State *s, Error *e) {
    for (size_t i = 0; i < n_slots(m); i++) {
        Slot slot = get_slot((Model *)m, i);
        if (!is_multiplied(m, &slot)) continue;
        bool rounds = is_quantised(slot.tensor->type) && !s->exact;
        s->work += slot.rows * slot.cols * slot.n_used;
        s->rounds |= rounds;
        s->copies |= !rounds;
    }
    lay_out_state(m, s);
    for (; s->batch_bytes > 48 << 20 && s->batch > 1 && !options.batch; lay_out_state(m, s)) s->batch /= 2;
    if (!(s->arena = map_memory(s->arena_bytes, false, e))) return false;
    lay_out_state(m, s);
    use_large_pages(s->arena, (size_t)((char *)s->keys - (char *)s->arena));  // all before the cache
    return true;
}

static void free_state(State *s) {
    if (s->arena) munmap(s->arena, s->arena_bytes);
    s->arena = NULL;
}

// Not finite is what no weights should give and no token may be chosen from.
static bool check_finite(const Model *m, const State *s, int n, int n_logits, Error *e) {
    for (int t = 0; t < n; t++) {
        int layers = s->broken[t] - 1, row = t - (n - n_logits), at = s->n_past + t;
        bool finite = true;
        for (int i = 0; row >= 0 && i < m->config.n_tokens; i++)
            finite &= (bits_of_float(s->logits[(size_t)row * s->logits_stride + (size_t)i]) & 0x7fffffff) < 0x7f800000;
        if (layers == 0) return refuse(e, "the embedding at position %d is not finite or too large", at);
        if (layers > 0) return refuse(e, "layer %d at position %d is not finite or too large", layers, at);
        if (!finite) return refuse(e, "the logits at position %d are not finite", at);
    }
    return true;
}

/* ==== 10. Measuring =================================================================================================
   What a model is, how well it predicts, and how near it comes to the limits of the machine that it runs on. */

// Bytes of weights that a token is multiplied with: all but the embedding, if that is not the head, and idle experts.
static size_t bytes_per_token(const Model *m) {
    size_t n = 0;
    for (size_t i = 0; i < n_slots(m); i++) {
        Slot slot = get_slot((Model *)m, i);
        if (is_multiplied(m, &slot)) n += slot_bytes(&slot) / slot.n * slot.n_used;
    }
    return n;
}

// Says the seed that nobody has given, so that the text can be had again.
static void tell_seed(const Sampler *s) {
    if (s->from_clock && s->temperature > 0 && !options.quiet)
        fprintf(stderr, "seed %llu\n", (unsigned long long)s->random);
}

static void tell_speed(const Model *m, const Speed *v) {
    if (options.quiet) return;
    fprintf(stderr, "prompt %zu tokens, %.1f tokens/s; generated %zu tokens", v->n_prompt,
            v->prompt_seconds > 0 ? (double)v->n_prompt / v->prompt_seconds : 0, v->n_made);
    double rate = v->n_passes ? (double)v->n_passes / v->made_seconds : 0;
    if (rate > 0) fprintf(stderr, ", %.1f tokens/s, %.1f GB/s", rate, rate * (double)bytes_per_token(m) * 1e-9);
    fputc('\n', stderr);
}

// Writes a text as a JSON string. Bytes that are not UTF-8 become U+FFFD.
static void put_json_string(FILE *f, const char *text, size_t n) {
    fputc('"', f);
    for (size_t i = 0; i < n;) {
        uint32_t c;
        int length = read_character(text + i, n - i, &c);
        if (length <= 0) fputs("\\ufffd", f);
        else if (c == '"' || c == '\\') fprintf(f, "\\%c", (char)c);
        else if (c < 32 || (c >= 127 && c < 160)) fprintf(f, "\\u%04x", (unsigned)c);
        else fwrite(text + i, 1, (size_t)length, f);
        i += length > 0 ? (size_t)length : 1;
    }
    fputc('"', f);
}

// The ids on one line, or with --pieces a line for each token.
static void print_tokens(const Tokenizer *t, const Tokens *tokens) {
    bool json = options.json, pieces = options.pieces;
    if (json) putchar('[');
    for (size_t i = 0, n; i < tokens->n; i++) {
        const char *bytes = piece(t, tokens->ids[i], &n);
        if (interrupted) return;
        if (i && (json || !pieces)) printf(json ? ", " : " ");
        printf(!pieces ? "%d" : json ? "{\"id\": %d, \"piece\": " : "%7d  ", tokens->ids[i]);
        if (pieces) put_json_string(stdout, bytes, n);
        if (pieces) putchar(json ? '}' : '\n');
    }
    if (json) putchar(']');
    if (json || !pieces) putchar('\n');
}

// The text that the ids stand for, and nothing after it; with --special the names of control tokens, too.
static void print_text(const Tokenizer *t, const Tokens *tokens) {
    Printer printer = { .n_held = 0 };
    for (size_t i = 0, n; i < tokens->n && !interrupted; i++) {
        const char *bytes = decode(t, i ? tokens->ids[i - 1] : -1, tokens->ids[i], &n);
        if (options.special && t->type[tokens->ids[i]] == PIECE_CONTROL) bytes = piece(t, tokens->ids[i], &n);
        print_bytes(&printer, bytes, n);
    }
    end_printing(&printer);
}

// Sends the first of n tokens through the model, as many as all can have logits of: their number, 0 if that failed.
static size_t forward_some(const Model *m, State *s, const int *tokens, size_t n, Error *e) {
    n = n < LOGITS_AT_ONCE ? n : LOGITS_AT_ONCE;
    n = n < (size_t)s->batch ? n : (size_t)s->batch;
    bool ok = interrupted ? fail(e, INTERRUPTED, "interrupted") : forward(m, s, tokens, (int)n, (int)n, e);
    return ok ? n : 0;
}

// Runs the tokens and writes the logits of every position, float32, tokens x vocabulary.
static bool run_logits(const Model *m, State *s, const Tokens *tokens, Error *e) {
    if (tokens->n > (size_t)s->context)
        return fail(e, NO_ROOM, "%zu tokens do not fit the context of %d; see -c", tokens->n, s->context);
    Output out;
    size_t n_tokens = (size_t)m->config.n_tokens;
    bool ok = open_output(&out, options.output, e);
    for (size_t done = 0, n; ok && done < tokens->n && !ferror(out.stream); done += n) {
        n = forward_some(m, s, tokens->ids + done, tokens->n - done, e);
        ok = n > 0;
        for (size_t t = 0; t < n; t++) fwrite(s->logits + t * s->logits_stride, sizeof(float), n_tokens, out.stream);
    }
    return close_output(&out, ok, e);  // which also looks whether all was written
}

// -log softmax(logits)[token], in double      logits (n)
static double surprise(const float *logits, int n, int token) {
    double max = logits[likeliest(logits, n)], sum = 0;
    for (int i = 0; i < n; i++) sum += exp(logits[i] - max);
    return log(sum) + max - logits[token];
}

// Perplexity as llama-perplexity measures it: the text is cut into chunks of -c tokens, each read anew; the second
// half of each is scored, so that every prediction has at least half a chunk to go by.
static bool run_perplexity(const Model *m, State *s, const Tokens *tokens, Error *e) {
    size_t size = (size_t)s->context, n_chunks = tokens->n / size, n_scored = 0;
    if (size < 4) return fail(e, MISUSE, "perplexity needs a context of at least 4");
    if (n_chunks == 0)
        return fail(e, NO_ROOM, "the text has %zu tokens, which is less than one chunk of %zu (-c)", tokens->n, size);
    double sum = 0, sum_of_squares = 0, start = clock_seconds();
    for (size_t chunk = 0; chunk < n_chunks; chunk++) {
        int *ids = tokens->ids + chunk * size;
        if (m->tokenizer.add_bos) ids[0] = m->tokenizer.bos;
        s->n_past = 0;
        if (!prefill(m, s, ids, size / 2, e)) return false;
        for (size_t i = size / 2; i < size - 1;) {
            size_t n = forward_some(m, s, ids + i, size - 1 - i, e);
            if (!n) return false;
            for (size_t t = 0; t < n; t++, i++, n_scored++) {
                double x = surprise(s->logits + t * s->logits_stride, m->config.n_tokens, ids[i + 1]);
                sum += x;
                sum_of_squares += x * x;
            }
        }
        show_progress("chunk", start, chunk + 1, n_chunks);
    }
    double n = (double)n_scored, mean = sum / n, variance = sum_of_squares / n - mean * mean;
    double ppl = exp(fmin(mean, 600)), error = n > 1 && variance > 0 ? sqrt(variance / (n - 1)) * ppl : 0;  // finite
    if (options.json)
        printf("{\"perplexity\": %.6f, \"error\": %.6f, \"tokens_scored\": %zu, \"chunks\": %zu}\n", ppl, error,
               n_scored, n_chunks);
    else printf("%zu chunks of %zu tokens, %zu scored\nPPL = %.4f +/- %.4f\n", n_chunks, size, n_scored, ppl, error);
    return true;
}

// A line of -m inspect: "name  value unit", or a member of its JSON object.
static void put_figure(const char *name, double value, const char *unit) {
    if (options.json) printf(",\n  \"%s\": %.17g", name, value);
    else printf("  %-28s %.*g%s\n", name, value == floor(value) ? 15 : 6, value, unit);
}

static void put_word(const char *name, const char *text) {
    printf(options.json ? ",\n  \"%s\": " : "  %-28s ", name);
    if (options.json) put_json_string(stdout, text, strlen(text));
    else puts(text);
}

static const char *kernel_names(void);  // the appendix
static bool choose_kernels(const char *name, Error *e);

// Sizes, types, costs: what one needs to know before running a model.
static bool run_inspect(Model *m, const State *s, Error *e) {
    const Config *c = &m->config;
    double parameters = 0, bytes = 0, cache = 0, by_type[N_TYPES] = { 0 };
    for (size_t i = 0; i < n_slots(m); i++) {
        Slot slot = get_slot(m, i);
        double size = (double)slot.n * (double)slot.rows * (double)slot.cols;
        if (!is_stored(m, &slot)) continue;
        parameters += size;
        bytes += (double)slot_bytes(&slot);
        if (slot.tensor) by_type[slot.tensor->type] += size;
    }
    for (int l = 0; l < c->n_layers; l++) cache += 2.0 * m->layers[l].n_kv_heads * c->head_dim * (s->cache_f32 ? 4 : 2);
    const char *containers[] = { [NATIVE] = "cria", [GGUF] = "GGUF", [LLAMA2C] = "llama2.c" };
    const char *tokenizers[] = { "none", [SPM] = "SentencePiece", [BPE] = "byte-level BPE" };
    const ChatTemplate *t = choose_template(m, options.template_name, e);
    if ((!t && options.template_name) || (options.check && !check_weights(m, e))) return false;
    if (options.json) printf("{\n  \"version\": \"%s\"", CRIA_VERSION);
    put_word("container", containers[recognise(m->file.bytes, m->file.n_bytes)]);
    put_word("family", c->family);
    for (int i = 0; i < N_CONFIG_FIELDS; i++) {
        const ConfigField *f = &config_fields[i];
        bool same = true;
        for (int l = 1; f->per_layer && l < c->n_layers; l++) same &= get_field(m, f, l) == get_field(m, f, 0);
        if (same) put_figure(f->name, get_field(m, f, 0), "");
        else printf(options.json ? ",\n  \"%s\": [" : "  %-28s ", f->name);
        for (int l = 0; !same && l < c->n_layers; l++)
            printf("%s%.0f", l == 0 ? "" : options.json ? ", " : " ", get_field(m, f, l));
        if (!same) printf(options.json ? "]" : "\n");
    }
    put_word("tokenizer", tokenizers[m->tokenizer.kind]);
    put_word("chat template", t ? t->name : "none");
    put_figure("parameters", parameters, "");
    for (int i = 0; i < N_TYPES; i++) {
        char name[48];
        snprintf(name, sizeof name, "parameters in %s", types[i].name);
        if (by_type[i] > 0) put_figure(name, by_type[i], "");
    }
    put_figure("bytes of weights", bytes, "");
    put_figure("parameters used per token", (double)s->work, " in products");
    put_figure("bytes read per token", (double)bytes_per_token(m), "");
    put_figure("bytes of cache per position", cache, "");
    put_figure("context in use (-c)", s->context, " positions");
    put_figure("memory for it", (double)s->arena_bytes / 1048576, " MiB");
    put_figure("FLOPs per token", 2 * (double)s->work, " and what attention takes");
    put_figure("training tokens (Chinchilla)", 20 * parameters, " = 20 per parameter");
    put_word("kernel", kernels->name);
    put_word("kernels of this machine", kernel_names());
    if (options.json) printf("\n}\n");
    return true;
}

// ---- What the machine can do ----

// Bytes that are read, operations in 8 bits and in float (a multiply-add is two): of some work, or the most in a
// nanosecond, which makes GB/s and Gop/s of them.
typedef struct { double bytes, int8, f32; } Load;

enum { MAX_RUNS = 64, MEMORY_BYTES = 256 << 20 };  // of memory: many times the caches

typedef struct {
    const uint64_t *memory;  // to read; NULL: to multiply, in 8 bits or in float
    size_t n;                // numbers of memory, or rounds of multiplying
    bool int8;
} CeilingJob;

static void work_at_ceiling(void *p, Team team) {
    const CeilingJob *job = p;
    Range r = share(job->n, team);
    if (job->memory) kernels->read(job->memory + r.from, r.to - r.from);
    else kernels->peak(job->int8, r.to - r.from);
}

// The most that a team can read or do in a nanosecond: the best of several tries, of 20 ms at least.
static double best_rate(int threads, const uint64_t *memory, bool int8) {
    CeilingJob job = { memory, memory ? MEMORY_BYTES / sizeof *memory : 1 << 16, int8 };
    double best = 0, each = memory ? sizeof *memory : kernels->peak(int8, 1);
    for (int i = 0; i < 7; i++) {
        double start = clock_seconds();
        run_team(threads, work_at_ceiling, &job);
        double seconds = clock_seconds() - start;
        best = fmax(best, each * (double)job.n / seconds * 1e-9);
        if (!memory && seconds < 0.02) job.n *= 2, i = 0;
    }
    return best;
}

// Adds the product of a matrix, of which n_read are read, with n tokens.
static void add_product(Load *w, const Tensor *t, double n_read, double n, bool exact) {
    w->bytes += n_read * (double)tensor_bytes(t);
    *(is_quantised(t->type) && !exact ? &w->int8 : &w->f32) += 2.0 * t->rows * t->cols * n;
}

// n tokens after `past` others: in batches, the last of which ends with logits, or one by one, each with its own.
static Load load_of(const Model *m, const State *s, int past, int n, bool one_by_one) {
    Load w = { 0 };
    for (int done = 0, now, batch = one_by_one ? 1 : s->batch; done < n; done += now) {
        now = n - done < batch ? n - done : batch;
        double seen = past + done + (now + 1) / 2.0, last = past + done + now;
        for (const Layer *y = m->layers; y < m->layers + m->config.n_layers; y++) {
            const Tensor *matrices[] = { &y->gate, &y->up, &y->down, &y->query, &y->key, &y->value, &y->attention_out,
                                         &y->router };
            // Of E experts, each token visits k: n tokens some E * (1 - (1 - k / E)^n) of them, if chance decides.
            double experts = fmax(y->n_experts, 1), used = fmax(y->n_experts_used, 1);
            double read = experts * (1 - pow(1 - used / experts, now));
            for (int i = 0; i < 8; i++)
                add_product(&w, matrices[i], i < 3 ? read : 1, i < 3 ? used * now : now, s->exact);
            double window = y->window ? y->window : INFINITY;
            w.f32 += 4.0 * y->n_heads * m->config.head_dim * fmin(seen, window) * now;
            w.bytes += 2.0 * y->n_kv_heads * m->config.head_dim * (s->cache_f32 ? 4 : 2) * fmin(last, window + now);
        }
        if (one_by_one || done + now == n) add_product(&w, &m->head, 1, 1, s->exact);
    }
    return w;
}

// ---- Results: a table, and a picture ----

// How fast something went, and how fast it could.
typedef struct { const char *what, *unit; double reached, ceiling; } Rate;

typedef struct {
    char test[64];
    const char *kernel;
    int threads, n_tokens;
    Load load, ceiling;       // of a run; in a nanosecond
    double ns[MAX_RUNS];      // that each run took
    double per_s, spread;     // tokens a second: the median, and half of what lies between the least and the most
    Rate memory, arithmetic;  // reading; this mix of operations
    const Rate *bound;        // the one that is nearer to its ceiling, and
    double percent;           // how near
} Measured;

// A list of tests, and what came out. prepare() makes the test of a number: its name, its load and its number of tokens
// (0: there is no such test); run() does it.
typedef struct Bench {
    char title[64];
    int n_tests, n_results;
    bool (*prepare)(struct Bench *b, int number, Measured *r, Error *e);
    bool (*run)(struct Bench *b, const Measured *r, Error *e);
    uint64_t *memory;  // (MEMORY_BYTES)  to read, as matrices and vectors too: 0.16 in f16, 2.6e-9 in f32 and bf16
    // bench: tokens at a depth, as a prompt ("pp") or one by one ("tg")
    const Model *m;
    State *s;
    int *tokens, depth;  // (S)
    bool one_by_one;
    // matmul: products, without a model
    Tensor w;
    size_t n_products;
    Activations x;
    float *y;  // (n, MOST_ROWS)
    Measured *results;
} Bench;

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// The median of n numbers, which it sorts.
static double median_of(double *x, int n) {
    qsort(x, (size_t)n, sizeof *x, by_size);
    return (x[n / 2] + x[(n - 1) / 2]) / 2;
}

// The nanoseconds that a run's operations take at the ceilings.
static double multiplying_time(const Measured *r) {
    return r->load.int8 / r->ceiling.int8 + r->load.f32 / r->ceiling.f32;
}

// Makes figures of the runs' times. Reading and multiplying go on at the same time: the longer one bounds.
static void conclude(Measured *r, int n_runs) {
    int half = n_runs / 2;
    double slower = median_of(r->ns + half, n_runs - half) / median_of(r->ns, half) - 1;
    double ns = median_of(r->ns, n_runs), ops = r->load.int8 + r->load.f32;
    r->per_s = 1e9 * r->n_tokens / ns;
    r->spread = 1e9 * r->n_tokens * (1 / r->ns[0] - 1 / r->ns[n_runs - 1]) / 2;
    r->memory = (Rate){ "memory", "GB/s", r->load.bytes / ns, r->ceiling.bytes };
    r->arithmetic = (Rate){ "arithmetic", "Gop/s", ops / ns, ops / multiplying_time(r) };
    r->bound = r->load.bytes / r->ceiling.bytes > multiplying_time(r) ? &r->memory : &r->arithmetic;
    r->percent = 100 * r->bound->reached / r->bound->ceiling;
    if (half >= 2 && slower > 0.05 && !options.quiet)
        fprintf(stderr, "%s: the machine got %.0f %% slower meanwhile\n", r->test, 100 * slower);
}

// llama-bench's columns, then ours; or a member of a JSON list.
static void put_result(const Measured *r, const char *title, bool first) {
    static const char head[] = "| model                  | backend  | threads | test                  "
                               "|              t/s |   GB/s |   Gop/s | of limit |\n";
    if (options.json) {
        printf("%s\n  {\"model\": \"%s\", \"kernel\": \"%s\", \"threads\": %d, \"test\": \"%s\", \"tok_per_s\": %.6g,\n"
               "   \"spread\": %.6g, \"runs\": %d, \"gb_per_s\": %.6g, \"gop_per_s\": %.6g, \"bound_by\": \"%s\",\n"
               "   \"ceiling_gb_per_s\": %.6g, \"ceiling_gop_per_s\": %.6g, \"percent_of_ceiling\": %.6g}",
               first ? "" : ",", title, r->kernel, r->threads, r->test, r->per_s, r->spread, (int)options.reps,
               r->memory.reached, r->arithmetic.reached, r->bound->what, r->memory.ceiling, r->arithmetic.ceiling,
               r->percent);
    } else {
        for (const char *p = first ? head : ""; *p; p++) putchar(*p);
        for (const char *p = first ? head : ""; *p; p++) putchar(*p == '|' || *p == '\n' ? *p : '-');
        printf("| %-22s | %-8s | %7d | %-21s | %8.1f ± %5.1f | %6.1f | %7.1f | %6.1f %% |\n", title, r->kernel,
               r->threads, r->test, r->per_s, r->spread, r->memory.reached, r->arithmetic.reached, r->percent);
    }
    fflush(stdout);
}

// The roofline (Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model"). Both axes are
// logarithmic: operations per byte from 0.1 to 10,000, Gop/s from 1 to 10,000.
static double plot_x(double ops_per_byte) { return 70 + 138 * fmin(5, fmax(0, log10(ops_per_byte) + 1)); }
static double plot_y(double gop) { return 460 - 100 * fmin(4, fmax(0, log10(gop))); }

// Up the slope of what can be read, then flat at the most operations a second.
static void draw_roof(FILE *f, double gb, double gop, const char *style, const char *what) {
    double start = fmax(0.1, 1 / gb), top = plot_y(gop);
    fprintf(f, "<path class=\"roof%s\" d=\"M%.1f %.1fL%.1f %.1fH760\"/>"
               "<text x=\"756\" y=\"%.1f\" class=\"end\">%s: %.0f</text>\n", style, plot_x(start), plot_y(start * gb),
            plot_x(gop / gb), top, top - 7, what, gop);
}

// The ceilings of the most threads, and a point for each result, named if there is room; for light and dark pages.
static void draw_roofline(const Bench *b, FILE *f) {
    const Load *c = &b->results[0].ceiling;
    const Measured *end = b->results + b->n_results;
    for (const Measured *r = b->results; r < end; r++) c = r->ceiling.int8 > c->int8 ? &r->ceiling : c;
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 800 530\" font-family=\"sans-serif\">\n"
               "<style>text { fill: #7d8590; font-size: 13px } .end { text-anchor: end }\n"
               "path { stroke: #7d8590; fill: none } .grid { opacity: 0.3 } .roof { stroke-width: 2 }\n"
               ".dash { stroke-dasharray: 6 5 } .memory { fill: #2f81f7 } .arithmetic { fill: #db6d28 }</style>\n"
               "<text x=\"70\" y=\"32\">%s: Gop/s</text><text x=\"84\" y=\"452\">memory: %.1f GB/s</text>\n"
               "<text x=\"760\" y=\"508\" class=\"end\">operations per byte that is read</text>\n",
            b->title, c->bytes);
    for (double gop = 1; gop < 2e5; gop *= 10) {
        double x = plot_x(gop / 10), y = plot_y(gop);
        fprintf(f, "<path class=\"grid\" d=\"M%.0f 60v400M70 %.0fh690\"/><text x=\"%.0f\" y=\"482\">%g</text>\n", x, y,
                x - 6, gop / 10);
        if (gop < 2e4) fprintf(f, "<text x=\"62\" y=\"%.0f\" class=\"end\">%g</text>\n", y + 4, gop);
    }
    draw_roof(f, c->bytes, c->int8, "", "multiply-adds in 8 bits");
    draw_roof(f, c->bytes, c->f32, " dash", "in float");
    for (const Measured *r = b->results; r < end; r++) {
        double x = plot_x((r->load.int8 + r->load.f32) / r->load.bytes), y = plot_y(r->arithmetic.reached);
        bool left = x > 550;  // the name must not leave the picture
        fprintf(f, "<circle class=\"%s\" cx=\"%.1f\" cy=\"%.1f\" r=\"5\"/>\n", r->bound->what, x, y);
        if (b->n_results > 8) continue;
        fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">%s, -j %d: %.0f %%</text>\n",
                left ? x - 9 : x + 9, y + 4, left ? "end" : "", r->test, r->threads, r->percent);
    }
    fprintf(f, "</svg>\n");
}

// ---- Tests ----

// Times a test; the first run does not count.
static bool time_test(Bench *b, Measured *r, Error *e) {
    for (int i = -1; i < options.reps; i++) {
        double start = clock_seconds();
        if (!b->run(b, r, e)) return false;
        if (i >= 0) r->ns[i] = (clock_seconds() - start) * 1e9;
    }
    conclude(r, (int)options.reps);
    put_result(r, b->title, b->n_results++ == 0);
    return true;
}

// Every test with every number of threads. The ceilings are of the same run: machines are shared, and throttle.
static bool time_tests(Bench *b, Error *e) {
    for (int j = 0; j < options.threads.n; j++) {
        int threads = options.threads.at[j];
        Load ceiling = { best_rate(threads, b->memory, false), best_rate(threads, NULL, true),
                         best_rate(threads, NULL, false) };
        for (int i = 0; i < b->n_tests; i++) {
            Measured *r = &b->results[b->n_results];
            *r = (Measured){ .kernel = kernels->name, .threads = threads, .ceiling = ceiling };
            if (!b->prepare(b, i, r, e) || (r->n_tokens && !time_test(b, r, e))) return false;
        }
    }
    return true;
}

// All tests, with those of the kernels that this machine has; then what the figures say, in words, and the picture.
static bool run_tests(Bench *b, const char *const *sets, int n_sets, Error *e) {
    Error cannot;
    Output out = { NULL, NULL, NULL };
    size_t most = (size_t)n_sets * (size_t)options.threads.n * (size_t)b->n_tests;
    b->results = allocate(most, sizeof *b->results, e);
    b->memory = b->results ? map_memory(MEMORY_BYTES, true, e) : NULL;
    bool ok = b->memory && (!options.svg || open_output(&out, options.svg, e));
    if (ok) use_large_pages(b->memory, MEMORY_BYTES), memset(b->memory, 0x31, MEMORY_BYTES);
    if (ok && options.json) putchar('[');
    for (int i = 0; ok && i < n_sets; i++) if (choose_kernels(sets[i], &cannot)) ok = time_tests(b, e);
    if (b->memory) munmap(b->memory, MEMORY_BYTES);
    if (ok && options.json) printf("\n]\n");
    bool speaks = ok && !options.json && b->n_results <= 16;  // more sentences would say less than the table
    for (const Measured *r = b->results; speaks && r < b->results + b->n_results; r++)
        printf("%s on %d thread%s, bound by %s: %.1f of the %.1f %s that are possible here, %.0f %%\n", r->test,
               r->threads, r->threads > 1 ? "s" : "", r->bound->what, r->bound->reached, r->bound->ceiling,
               r->bound->unit, r->percent);
    if (ok && options.svg) draw_roofline(b, out.stream);
    if (options.svg) ok = close_output(&out, ok, e);
    free(b->results);
    return ok;
}

// ---- bench: a model ----

static bool run_model(Bench *b, const Measured *r, Error *e) {
    b->s->n_past = b->depth;  // what the cache holds up to there is kept
    if (!b->one_by_one) return prefill(b->m, b->s, b->tokens, (size_t)r->n_tokens, e);
    for (int i = 0; i < r->n_tokens; i++) {
        if (interrupted) return fail(e, INTERRUPTED, "interrupted");
        if (!forward(b->m, b->s, &b->tokens[i], 1, 1, e)) return false;
    }
    return true;
}

static bool prepare_model(Bench *b, int number, Measured *r, Error *e) {
    int n_at_depth = options.pp.n + options.tg.n, i = number % n_at_depth;
    b->depth = options.depth.at[number / n_at_depth];
    b->one_by_one = i >= options.pp.n;
    b->s->threads = r->threads;
    r->n_tokens = b->one_by_one ? options.tg.at[i - options.pp.n] : options.pp.at[i];
    r->load = load_of(b->m, b->s, b->depth, r->n_tokens, b->one_by_one);
    int length = snprintf(r->test, sizeof r->test, "%s%d", b->one_by_one ? "tg" : "pp", r->n_tokens);
    if (b->depth) snprintf(r->test + length, sizeof r->test - (size_t)length, " @ d%d", b->depth);
    b->s->n_past = 0;
    return i > 0 || b->depth == 0 || prefill(b->m, b->s, b->tokens, (size_t)b->depth, e);
}

static int largest(List list) {
    int most = 0;
    for (int i = 0; i < list.n; i++) most = list.at[i] > most ? list.at[i] : most;
    return most;
}

static bool run_bench(const Model *m, State *s, Error *e) {
    static Bench b = { .prepare = prepare_model, .run = run_model };
    b.n_tests = options.depth.n * (options.pp.n + options.tg.n);
    b.m = m, b.s = s;
    if (!(b.tokens = allocate((size_t)s->context, sizeof *b.tokens, e))) return false;
    for (int i = 0; i < s->context; i++) b.tokens[i] = (int)((uint32_t)i * 7919u % (uint32_t)m->config.n_tokens);
    snprintf(b.title, sizeof b.title, "%s %s, %zu MB", m->config.family, types[m->layers[0].gate.type].name,
             bytes_per_token(m) / 1000000);
    bool ok = run_tests(&b, &kernels->name, 1, e);
    free(b.tokens);
    return ok;
}

// ---- matmul: products alone, without a model ----

static void multiply_team(void *p, Team team) {
    const Bench *b = p;
    Tensor w = b->w;
    size_t n_bytes = tensor_bytes(&w), n_copies = MEMORY_BYTES / n_bytes;  // so many that none is found in a cache
    Range rows = share(n_row_tiles(&w), team);
    for (size_t i = 0; i < b->n_products; i++) {
        w.tiles = (const unsigned char *)b->memory + i % n_copies * n_bytes;
        multiply_rows(b->y, round_up((size_t)w.rows, 16), &w, rows, &b->x);
        wait_for_team(team);
    }
}

static bool run_products(Bench *b, const Measured *r, Error *e) {
    run_team(r->threads, multiply_team, b);
    return !interrupted || fail(e, INTERRUPTED, "interrupted");
}

enum { MATMUL_SHAPES = 2, MOST_ROWS = 5632, MOST_COLS = 2048 };

// Shapes x types x numbers of tokens. A test is as many products as take 5 ms at the ceilings.
static bool prepare_products(Bench *b, int number, Measured *r, Error *e) {
    static const int shapes[MATMUL_SHAPES][2] = { { 1536, 576 }, { MOST_ROWS, MOST_COLS } };
    const int *shape = shapes[number / options.pp.n / N_TYPES], n = options.pp.at[number % options.pp.n];
    (void)e;
    b->w = (Tensor){ (Type)(number / options.pp.n % N_TYPES), shape[0], shape[1], NULL };
    b->x = (Activations){ (const void *)b->memory, (const void *)b->memory, (size_t)n, 0, (size_t)n, 0 };
    snprintf(r->test, sizeof r->test, "%dx%d %s x %d", shape[0], shape[1], types[b->w.type].name, n);
    for (b->n_products = 0; fmax(r->load.bytes / r->ceiling.bytes, multiplying_time(r)) < 5e6; b->n_products++) {
        add_product(&r->load, &b->w, 1, n, false);
        r->n_tokens += n;
    }
    return true;
}

static bool run_matmul(Error *e) {
    static const char *const sets[] = { "avx512", "avxvnni", "avx2", "neondot", "neon" };  // scalar takes minutes
    static Bench b = { .title = "matrix products", .prepare = prepare_products, .run = run_products };
    int n = largest(options.pp);
    if (n > 4096) return fail(e, MISUSE, "--pp %d: expected at most 4096 for -m matmul", n);
    if (!(b.y = allocate((size_t)n * MOST_ROWS, sizeof *b.y, e))) return false;
    b.n_tests = MATMUL_SHAPES * N_TYPES * options.pp.n;
    bool ok = options.kernel ? run_tests(&b, &options.kernel, 1, e) : run_tests(&b, sets, 5, e);
    free(b.y);
    return ok;
}

/* ==== Appendix A. Kernels ===========================================================================================
   The leaves of chapters 4 and 5 for the instruction sets that the machine may have, chosen when the program starts;
   the loops above are compiled anew round each. A set has two: products of quantised tiles, which unpack a format and
   multiply bytes, and products of floats. A function's target is an attribute, so that one plain compile line has them
   all. Each gives its definition's bits: products of bytes are exact, in whatever order they are added, and the
   operations on floats are the definition's, one SIMD lane a row. */

#define LEAF(isa) __attribute__((target(isa))) static
#define LEAF_INLINE(isa) __attribute__((target(isa), always_inline)) static inline

// 32 columns of a row tile with a byte for each weight: four columns of sixteen rows in each w. How the byte of a
// weight q that is stored as q + offset looks: q, or q + offset, or q + offset in up to 6 bits but q in more.
typedef enum { SIGNED, UNSIGNED, UNSIGNED_SIX_BITS } Signs;
typedef struct {
    _Alignas(64) uint8_t w[8][64];
    float scale[2][16], min[2][16];
} ByteBlock;

// The leaves of an instruction set: dots[row] = the dot product of a row with groups `from` to `to` of the columns.
typedef void Dot(int32_t dots[16], const uint8_t w[8][64], Type type, const int8_t *q, int from, int to);
typedef struct {
    Signs signs;
    Dot *dot;
    Widen *widen;
    LookUp *look_up;
    ScaleSixteen *scale_sixteen;
} Leaves;

// What is to be taken off a byte to get its weight.
INLINE int byte_offset(Type type, Signs signs) {
    const TypeInfo *i = &types[type];
    if (signs == UNSIGNED && (i->bits == 8 || i->values)) return 128;
    return signs == UNSIGNED || (signs == UNSIGNED_SIX_BITS && i->bits <= 6) ? i->offset : 0;
}

// That times the sum of a block's activations, or of those of a half, less than 0.
INLINE int32_t offset_product(const Block *x, int part, int offset) {
    if (part) return offset == 32 ? x->minus_32_sum[part - 1] : offset ? x->minus_32_sum[part - 1] >> 3 : 0;
    return offset == 8 ? x->minus_8_sum : offset == 16 ? 2 * x->minus_8_sum : offset ? x->minus_128_sum : 0;
}

// A kernel's part for a format, in C that the compiler makes SIMD of. Returns u->w, or the tile's own bytes if they are
// what is needed. Asks for the next block's weights from the first to the last, an order that the loads do not keep:
// processors that guess what will be read next then guess right, and memory is read half as fast again.
INLINE const void *unpack_bytes_of(ByteBlock *u, Type type, const unsigned char *tiles, size_t block, Leaves leaves) {
    const TypeInfo *i = &types[type];
    const unsigned char *tile = tile_of(type, tiles, block), *from = weights_of(type, tile, block);
    int change = byte_offset(type, leaves.signs) - i->offset;
    uint8_t *w = u->w[0];
    for (int line = 0; line < i->bits && i->bits < 8; line++) __builtin_prefetch(from + 64 * line + 256);
    unpack_scales(u->scale, u->min, type, tile, (int)(block % ((size_t)i->cols / 32)), leaves.widen,
                  leaves.scale_sixteen);
    if (i->bits < 8) unpack_planes(u->w, i->bits, from);
    int8_t values[16];
    for (int j = 0; i->values && j < 16; j++) values[j] = (int8_t)(i->values[j] + change);
    if (i->values) leaves.look_up(w, 512, values);
    for (int j = 0; change && !i->values && j < 512; j++) w[j] = (uint8_t)((i->bits == 8 ? from : w)[j] + change);
    return i->bits == 8 && !change ? from : w;
}

INLINE void add_tiles_of_type(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks, const Block *x,
                              size_t n_all, int n, Leaves leaves) {
    int halves = BLOCK / types[type].per_scale, offset = byte_offset(type, leaves.signs);
    for (size_t c = 0; c < n_blocks; c++, x += n_all) {
        ByteBlock u;
        const uint8_t (*w)[64] = unpack_bytes_of(&u, type, tiles, c, leaves);
        for (int t = 0; t < n; t++) {
            for (int h = 0; h < halves; h++) {
                _Alignas(64) int32_t dots[16];
                int part = halves == 1 ? 0 : 1 + h;
                int32_t correction = offset_product(&x[t], part, offset);
                float *y = sum[t], scale = x[t].scale, scaled_sum = x[t].scaled_sum[part];
                leaves.dot(dots, w, type, x[t].q, 4 * h, halves == 1 ? 8 : 4 * h + 4);
#pragma GCC unroll 1  // gcc 12 makes no SIMD of what it has unrolled
                for (int r = 0; r < 16; r++) {
                    y[r] = fmaf(u.scale[h][r] * scale, (float)(dots[r] + correction), y[r]);
                    if (types[type].has_min) y[r] = fmaf(u.min[h][r], scaled_sum, y[r]);
                }
            }
        }
    }
}

// A leaf for dot products, one vector of rows after the other, step: dot from w, four columns of the rows, and x.
#define MAKE_DOT(isa, set, Vector, step)                                                                               \
    isa void dot_##set(int32_t dots[16], const uint8_t w[8][64], Type type, const int8_t *q, int from, int to) {       \
        (void)type;                                                                                                    \
        for (int row = 0; row < 16; row += (int)sizeof(Vector) / 4) {                                                  \
            Vector dot = { 0 }, four;                                                                                  \
            for (int g = from; g < to; g++) {                                                                          \
                int32_t x = (int32_t)load_four(q + 4 * g);                                                             \
                memcpy(&four, w[g] + 4 * row, sizeof four);                                                            \
                dot = step;                                                                                            \
            }                                                                                                          \
            memcpy(dots + row, &dot, sizeof dot);                                                                      \
        }                                                                                                              \
    }

// add_tiles() by the leaves of an instruction set, with the type known to the compiler.
INLINE void add_byte_tiles(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks, const Block *x,
                           size_t n_all, int n, Leaves leaves) {
#define FOR_TYPE(type) case type: add_tiles_of_type(sum, type, tiles, n_blocks, x, n_all, n, leaves); break;
    switch (type) {
        FOR_TYPE(Q8) FOR_TYPE(Q8F) FOR_TYPE(Q4) FOR_TYPE(Q4M) FOR_TYPE(Q5) FOR_TYPE(Q5M) FOR_TYPE(Q2K) FOR_TYPE(Q3K)
        FOR_TYPE(Q4K) FOR_TYPE(Q5K) FOR_TYPE(Q6K) FOR_TYPE(IQ4NL) FOR_TYPE(IQ4XS) FOR_TYPE(MXFP4)
    default: break;
    }
}

// A leaf for add_products(): m rows of chains side by side, m and half known to the compiler.
// step: sum[i][j] + w[j] * x      widened: a vector of floats, from those in f16 at `from`
typedef void Products(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,
                      size_t b_stride, int m, int depth);
#define MAKE_PRODUCTS(isa, set, Vector, step, widened)                                                                 \
    isa void products_##set(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,      \
                            size_t b_stride, int m, int depth) {                                                       \
        enum { WIDTH = sizeof(Vector) / sizeof(float), VECTORS = 16 / WIDTH };                                         \
        Vector sum[12][VECTORS], w[VECTORS];                                                                           \
        const char *row = b;                                                                                           \
        _Pragma("GCC unroll 12")                                                                                       \
        for (int i = 0; i < m; i++)                                                                                    \
            for (int j = 0; j < VECTORS; j++) memcpy(&sum[i][j], c + (size_t)i * c_stride + WIDTH * j, sizeof *w);     \
        for (int k = 0; k < depth; k++, a++, row += b_stride * (half ? 2 : 4)) {                                       \
            for (int j = 0; j < VECTORS; j++) {                                                                        \
                const void *from = row + WIDTH * j * (half ? 2 : 4);                                                   \
                if (half) w[j] = widened;                                                                              \
                else memcpy(&w[j], from, sizeof *w);                                                                   \
            }                                                                                                          \
            _Pragma("GCC unroll 12")                                                                                   \
            for (int i = 0; i < m; i++) {                                                                              \
                float x = a[(size_t)i * a_stride];                                                                     \
                for (int j = 0; j < VECTORS; j++) sum[i][j] = step;                                                    \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 12")                                                                                       \
        for (int i = 0; i < m; i++)                                                                                    \
            for (int j = 0; j < VECTORS; j++) memcpy(c + (size_t)i * c_stride + WIDTH * j, &sum[i][j], sizeof *w);     \
    }

// add_products() by that leaf, `most` rows of c at a time: as many as keep the multipliers busy and fit the registers.
// With the strides of a product with a matrix known, their addresses cost nothing.
INLINE void add_rows(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,
                     size_t b_stride, int m, int depth, int most, Products *leaf) {
    bool of_matrix = !half && c_stride == 16 && a_stride == 32 && b_stride == 16;
    for (int i = 0, now; i < m; i += now, c += (size_t)now * c_stride, a += (size_t)now * a_stride) {
        int left = m - i;
        now = left == most || left >= most + 3 ? most : left >= 8 && most > 8 ? 8 : left >= 4 ? 4 : left == 3 ? 3 : 1;
        if (now == most && of_matrix) leaf(c, 16, a, 32, b, false, 16, most, depth);
        else if (now == most) leaf(c, c_stride, a, a_stride, b, half, b_stride, most, depth);
        else if (now == 8) leaf(c, c_stride, a, a_stride, b, half, b_stride, 8, depth);
        else if (now == 4) leaf(c, c_stride, a, a_stride, b, half, b_stride, 4, depth);
        else if (now == 3) leaf(c, c_stride, a, a_stride, b, half, b_stride, 3, depth);
        else leaf(c, c_stride, a, a_stride, b, half, b_stride, 1, depth);
    }
}

// to[i] = from[i] as another type: `width` numbers at a time by `step`, the rest by the plain loop.
#define MAKE_CONVERSION(isa, name, To, From, width, step, plain)                                                       \
    isa void name(To *to, const From *from, size_t n) {                                                                \
        size_t i = 0;                                                                                                  \
        for (; i + width <= n; i += width) step;                                                                       \
        plain(to + i, from + i, n - i);                                                                                \
    }

// The most that an instruction set can do: rounds of twelve multiply-adds in registers, in 8 bits or in float. Returns
// the number of operations. The compiler must not see what x is, nor that nobody wants the results.
#define CHAINS(Vector, in_register, step)                                                                              \
    do {                                                                                                               \
        Vector x = (Vector){ 0 } + 1, sum[12] = { x };                                                                 \
        __asm__ volatile("" : "+" in_register(x));                                                                     \
        for (size_t n = 0; n < rounds; n++) {                                                                          \
            _Pragma("GCC unroll 12")                                                                                   \
            for (int i = 0; i < 12; i++) {                                                                             \
                sum[i] = step;                                                                                         \
                __asm__ volatile("" : "+" in_register(sum[i]));                                                        \
            }                                                                                                          \
        }                                                                                                              \
    } while (0)

#define MAKE_PEAK(isa, set, in_register, Bytes, product, Floats, multiply_add)                                         \
    isa double peak_##set(bool int8, size_t rounds) {                                                                  \
        if (int8) CHAINS(Bytes, in_register, product);                                                                 \
        else CHAINS(Floats, in_register, multiply_add);                                                                \
        return 12 * (double)(int8 ? 2 * sizeof(Bytes) : sizeof(Floats) / 2) * (double)rounds;                          \
    }

#if defined(__x86_64__)
#include <immintrin.h>

// ---- 256 bits: AVX2, and AVX-VNNI, which has one instruction for three ----

#define AVX2 "avx2,fma,f16c"
#define AVXVNNI "avx2,fma,f16c,avxvnni"
#define AVX512VL "avx2,fma,f16c,avx512f,avx512vl,avx512vnni"  // AVX-VNNI's instructions in the form of other CPUs

// [kernel avx2] vpmaddubsw multiplies unsigned by signed bytes and adds pairs in 16 bits. Eight sums of 4-bit weights
// fit: 8 * 2 * 15 * 127 = 30480; four of 5 bits; two of 6. Of bytes one does, if the sign moves to the other factor.
LEAF_INLINE(AVX2) void dot_avx2(int32_t dots[16], const uint8_t w[8][64], Type type, const int8_t *q, int from,
                                int to) {
    __m256i ones = _mm256_set1_epi16(1);
    int bits = types[type].bits, n = to - from, fit = bits <= 4 ? n : bits == 5 ? 4 : 2;
    bool is_small = bits <= 6 && !types[type].values;
    for (int half = 0; half < 2; half++) {
        __m256i dot = _mm256_setzero_si256(), pairs = dot;
        for (int g = 0; g < n; g++) {
            __m256i v = _mm256_load_si256((const __m256i *)&w[from + g][32 * half]);
            __m256i x = _mm256_set1_epi32((int32_t)load_four(q + 4 * (from + g)));
            if (is_small) pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(v, x));
            else pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(v), _mm256_sign_epi8(x, v));
            if (is_small && (g + 1) % fit) continue;
            dot = _mm256_add_epi32(dot, _mm256_madd_epi16(pairs, ones));
            pairs = _mm256_setzero_si256();
        }
        _mm256_store_si256((__m256i *)&dots[8 * half], dot);
    }
}

// [kernel avxvnni] One vpdpbusd for three instructions.
MAKE_DOT(LEAF_INLINE(AVXVNNI), avxvnni, __m256i, _mm256_dpbusd_avx_epi32(dot, four, _mm256_set1_epi32(x)))
MAKE_DOT(LEAF_INLINE(AVX512VL), avx512vl, __m256i, _mm256_dpbusd_epi32(dot, four, _mm256_set1_epi32(x)))

MAKE_CONVERSION(LEAF_INLINE(AVX2), widen_avx2, float, uint16_t, 8,
                _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const void *)(from + i)))), widen_floats)
MAKE_CONVERSION(LEAF_INLINE(AVX2), narrow_avx2, uint16_t, float, 8,
                _mm_storeu_si128((void *)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0)), narrow_floats)

LEAF_INLINE(AVX2) void look_up_avx2(uint8_t *w, size_t n, const int8_t values[16]) {
    __m256i table = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)values));
    for (size_t i = 0; i < n; i += 32)
        _mm256_storeu_si256((void *)(w + i), _mm256_shuffle_epi8(table, _mm256_loadu_si256((const void *)(w + i))));
}

// The compiler would make narrow vectors of the loop, and then reading wide ones would have to wait for their stores.
LEAF_INLINE(AVX2) void scale_avx2(float y[16], const float x[16], const int8_t factor[16]) {
    for (int i = 0; i < 16; i += 8) {
        __m256i whole = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(factor + i)));
        _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_cvtepi32_ps(whole)));
    }
}

MAKE_PRODUCTS(LEAF_INLINE(AVX2), avx2, __m256, _mm256_fmadd_ps(w[j], _mm256_set1_ps(x), sum[i][j]),
              _mm256_cvtph_ps(_mm_loadu_si128(from)))

#define PEAK_256(isa, set, product)                                                                                    \
    MAKE_PEAK(LEAF(isa), set, "x", __m256i, product, __m256, _mm256_fmadd_ps(sum[i], x, x))
PEAK_256(AVX2, avx2, _mm256_add_epi16(_mm256_maddubs_epi16(x, sum[i]), x))
PEAK_256(AVXVNNI, avxvnni, _mm256_dpbusd_avx_epi32(sum[i], x, x))
PEAK_256(AVX512VL, avx512vl, _mm256_dpbusd_epi32(sum[i], x, x))

// ---- 512 bits: AVX-512 VNNI ----

#define AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni"

// [kernel avx512] One vpdpbusd a group of columns, with the activations broadcast as it loads them.
MAKE_DOT(LEAF_INLINE(AVX512), avx512, __m512i, _mm512_dpbusd_epi32(dot, four, _mm512_set1_epi32(x)))
MAKE_CONVERSION(LEAF_INLINE(AVX512), widen_avx512, float, uint16_t, 16,
                _mm512_storeu_ps(to + i, _mm512_cvtph_ps(_mm256_loadu_si256((const void *)(from + i)))), widen_floats)
MAKE_PRODUCTS(LEAF_INLINE(AVX512), avx512, __m512, _mm512_fmadd_ps(w[j], _mm512_set1_ps(x), sum[i][j]),
              _mm512_cvtph_ps(_mm256_loadu_si256(from)))

LEAF_INLINE(AVX512) void scale_avx512(float y[16], const float x[16], const int8_t factor[16]) {
    __m512i whole = _mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)factor));
    _mm512_storeu_ps(y, _mm512_mul_ps(_mm512_loadu_ps(x), _mm512_cvtepi32_ps(whole)));
}

LEAF_INLINE(AVX512) void look_up_avx512(uint8_t *w, size_t n, const int8_t values[16]) {
    __m512i table = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)values));
    for (size_t i = 0; i < n; i += 64)
        _mm512_storeu_si512(w + i, _mm512_shuffle_epi8(table, _mm512_loadu_si512(w + i)));
}

MAKE_PEAK(LEAF(AVX512), avx512, "v", __m512i, _mm512_dpbusd_epi32(sum[i], x, x),
          __m512, _mm512_fmadd_ps(sum[i], x, x))

MAKE_KERNELS(scalar_avx2, LEAF(AVX2), "scalar", add_tiles, add_products, widen_floats, narrow_floats, peak_avx2)

#define LEAVES_256 widen_avx2, look_up_avx2, scale_avx2
#define TILES_AVX2(...) add_byte_tiles(__VA_ARGS__, (Leaves){ UNSIGNED_SIX_BITS, dot_avx2, LEAVES_256 })
#define ROWS_AVX2(...) add_rows(__VA_ARGS__, 6, products_avx2)
MAKE_KERNELS(avx2, LEAF(AVX2), "avx2", TILES_AVX2, ROWS_AVX2, widen_avx2, narrow_avx2, peak_avx2)

#define TILES_AVXVNNI(...) add_byte_tiles(__VA_ARGS__, (Leaves){ UNSIGNED, dot_avxvnni, LEAVES_256 })
MAKE_KERNELS(avxvnni, LEAF(AVXVNNI), "avxvnni", TILES_AVXVNNI, ROWS_AVX2, widen_avx2, narrow_avx2, peak_avxvnni)

#define TILES_AVX512VL(...) add_byte_tiles(__VA_ARGS__, (Leaves){ UNSIGNED, dot_avx512vl, LEAVES_256 })
MAKE_KERNELS(avx512vl, LEAF(AVX512VL), "avxvnni", TILES_AVX512VL, ROWS_AVX2, widen_avx2, narrow_avx2, peak_avx512vl)

#define LEAVES_512 widen_avx512, look_up_avx512, scale_avx512
#define TILES_AVX512(...) add_byte_tiles(__VA_ARGS__, (Leaves){ UNSIGNED, dot_avx512, LEAVES_512 })
#define ROWS_AVX512(...) add_rows(__VA_ARGS__, 12, products_avx512)
MAKE_KERNELS(avx512, LEAF(AVX512), "avx512", TILES_AVX512, ROWS_AVX512, widen_avx512, narrow_avx2, peak_avx512)

#elif defined(__aarch64__)
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// ---- NEON: 128 bits, with and without the instruction for dot products ----

MAKE_CONVERSION(INLINE, widen_neon, float, uint16_t, 4,
                vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i)))), widen_floats)
MAKE_CONVERSION(INLINE, narrow_neon, uint16_t, float, 4,
                vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i)))), narrow_floats)

// [kernel neon] Products in 16 bits, where two of them fit: 2 * 128 * 127 = 32512; pairs of these are added up in 32.
INLINE int32x4_t add_dots(int32x4_t sum, int8x16_t w, int8x16_t x) {
    int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
}
MAKE_DOT(INLINE, neon, int32x4_t, add_dots(dot, vreinterpretq_s8_s32(four), vreinterpretq_s8_s32(vdupq_n_s32(x))))

INLINE void look_up_neon(uint8_t *w, size_t n, const int8_t values[16]) {
    int8x16_t table = vld1q_s8(values);
    for (size_t i = 0; i < n; i += 16) vst1q_u8(w + i, vreinterpretq_u8_s8(vqtbl1q_s8(table, vld1q_u8(w + i))));
}

MAKE_PRODUCTS(INLINE, neon, float32x4_t, vfmaq_n_f32(sum[i][j], w[j], x),
              vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from))))

INLINE int32x4_t sixteen_products(int32x4_t sum, int8x16_t x) {
    int8x16_t y = vreinterpretq_s8_s32(sum);  // so that no product can be made once for all rounds
    return vpadalq_s16(vpadalq_s16(sum, vmull_s8(vget_low_s8(x), vget_low_s8(y))), vmull_high_s8(x, y));
}

MAKE_PEAK(static, neon, "w", int32x4_t, sixteen_products(sum[i], vreinterpretq_s8_s32(x)),
          float32x4_t, vfmaq_f32(x, sum[i], x))

#define LEAVES_128 widen_neon, look_up_neon, scale_floats
#define TILES_NEON(...) add_byte_tiles(__VA_ARGS__, (Leaves){ SIGNED, dot_neon, LEAVES_128 })
#define ROWS_NEON(...) add_rows(__VA_ARGS__, 4, products_neon)
MAKE_KERNELS(neon, static, "neon", TILES_NEON, ROWS_NEON, widen_neon, narrow_neon, peak_neon)

// A target would take from the compiler what an -march or -mcpu has given; and clang's header has vdotq_s32 only then.
#if defined(__ARM_FEATURE_DOTPROD)
#define NEON_DOT static
#define NEON_DOT_INLINE INLINE
#elif !defined(__clang__)
#define NEON_DOT LEAF("arch=armv8.2-a+dotprod")
#define NEON_DOT_INLINE LEAF_INLINE("arch=armv8.2-a+dotprod")
#endif

#ifdef NEON_DOT

// [kernel neondot] One sdot a group of columns.
MAKE_DOT(NEON_DOT_INLINE, neondot, int32x4_t,
         vdotq_s32(dot, vreinterpretq_s8_s32(four), vreinterpretq_s8_s32(vdupq_n_s32(x))))

MAKE_PEAK(NEON_DOT, neondot, "w", int32x4_t, vdotq_s32(sum[i], vreinterpretq_s8_s32(x), vreinterpretq_s8_s32(x)),
          float32x4_t, vfmaq_f32(x, sum[i], x))

#define TILES_NEONDOT(...) add_byte_tiles(__VA_ARGS__, (Leaves){ SIGNED, dot_neondot, LEAVES_128 })
MAKE_KERNELS(neondot, NEON_DOT, "neondot", TILES_NEONDOT, ROWS_NEON, widen_neon, narrow_neon, peak_neondot)
#endif
#endif

// To add a set of kernels: its leaves above, a row here, better ones first.
static const Kernels *const all_kernels[] = {
#if defined(__x86_64__)
    &avx512, &avxvnni, &avx512vl, &avx2, &scalar_avx2,
#elif defined(__aarch64__)
#ifdef NEON_DOT
    &neondot,
#endif
    &neon,
#endif
    &scalar,
};
enum { N_KERNELS = sizeof all_kernels / sizeof *all_kernels };

#if defined(__x86_64__)
// A bit of what cpuid says in eax and ecx, for the features that compilers have no name for.
static bool cpuid_bit(unsigned leaf, unsigned part, bool of_ecx, int bit) {
    unsigned a = leaf, b, c = part, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (of_ecx ? c : a) >> bit & 1;
}
#endif

static bool cpu_can_run(const Kernels *k) {
#if defined(__x86_64__)
    __builtin_cpu_init();  // looks at what the operating system saves, too
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    cpuid_bit(1, 0, true, 29);  // f16c
    bool has_vnni = has_avx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (k == &avx512) return has_vnni && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (k == &avxvnni) return has_avx2 && cpuid_bit(7, 1, false, 4);
    if (k == &avx512vl) return has_vnni;
    if (k == &avx2 || k == &scalar_avx2) return has_avx2;
#elif defined(NEON_DOT) && defined(__linux__)
    if (k == &neondot) return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(NEON_DOT) && defined(__APPLE__)
    int answer = 0;
    size_t size = sizeof answer;
    if (k == &neondot) return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &answer, &size, NULL, 0) && answer;
#endif
    (void)k;
    return true;
}

// The names of those that this machine can run, the best first.
static const char *kernel_names(void) {
    static char names[80];
    const char *last = "";
    for (int i = 0, n = 0; i < N_KERNELS; i++) {
        if (!cpu_can_run(all_kernels[i]) || !strcmp(last, all_kernels[i]->name)) continue;
        last = all_kernels[i]->name;
        n += snprintf(names + n, sizeof names - (size_t)n, "%s%s", n ? ", " : "", last);
    }
    return names;
}

// Takes the best kernels that this machine can run, of those with that name if one is given.
static bool choose_kernels(const char *name, Error *e) {
    for (int i = 0; i < N_KERNELS; i++) {
        if (!cpu_can_run(all_kernels[i])) continue;
        kernels = all_kernels[i];
        if (!name || !strcmp(name, kernels->name)) return true;
    }
    return fail(e, MISUSE, "--kernel %.40s: this machine has %s", name, kernel_names());
}

/* ==== 11. main ======================================================================================================
   One table of options makes the parser and the help. Then: open the model, make its state, and do what -m says. */

typedef enum { TEXT, WHOLE, SEED, REAL, LIST, FLAG } OptionType;

// To add an option: a member of Options, a row here, a line in README (a test compares them).
typedef struct {
    char letter;  // 0: the long name only
    const char *name, *argument;
    OptionType type;
    size_t offset;
    double min, max;
    const char *help;
} Option;

#define OF(member) offsetof(Options, member)
static const Option option_table[] = {
    { 'm', "mode", "MODE", TEXT, OF(mode), 0, 0,
      "generate (default), chat, tokenize, detokenize, logits, perplexity, inspect, export, bench, matmul" },
    { 'i', "prompt", "TEXT", TEXT, OF(prompt), 0, 0, "what the text begins with; in a chat, the first message" },
    { 'f', "file", "FILE", TEXT, OF(file), 0, 0, "the prompt from a file; - is stdin" },
    { 0, "ids", "IDS", TEXT, OF(ids), 0, 0, "the prompt as token ids: \"1 2 3\"" },
    { 'n', "n-predict", "N", WHOLE, OF(n_predict), -1, 1e9, "new tokens at most: 256; -1 = until the context is full" },
    { 't', "temp", "T", REAL, OF(temperature), 0, 100, "1.0; 0 = always the likeliest token; threads are -j" },
    { 'p', "top-p", "P", REAL, OF(top_p), 0, 1, "the likeliest that make up P: 0.9; 0 or 1 = off; the prompt is -i" },
    { 'k', "top-k", "K", WHOLE, OF(top_k), 0, 1e9, "choose among the K likeliest; 0 = off" },
    { 0, "min-p", "P", REAL, OF(min_p), 0, 1, "leave out what is less likely than P times the likeliest; 0 = off" },
    { 's', "seed", "S", SEED, OF(seed), 0, 0x1p64, "seed; default -1: from the clock, and printed" },
    { 'c', "ctx-size", "N", WHOLE, OF(context), 0, 1 << 20, "positions: the model's, at most 4096; 0 = all it has" },
    { 'j', "threads", "N", LIST, OF(threads), 1, 1024, "the physical cores that this process may use; bench: 1,2" },
    { 'b', "batch-size", "N", WHOLE, OF(batch), 1, 4096,
      "prompt tokens per step (default 128); changes speed and memory, never the text" },
    { 'z', "tokenizer", "FILE", TEXT, OF(tokenizer), 0, 0, "the tokenizer of a llama2.c checkpoint: tokenizer.bin" },
    { 'y', "system", "TEXT", TEXT, OF(system), 0, 0, "chat: system prompt (-sys too)" },
    { 0, "template", "NAME", TEXT, OF(template_name), 0, 0, "chat: the form of the turns, where it is not recognised" },
    { 'o', "output", "FILE", TEXT, OF(output), 0, 0, "what logits and export write" },
    { 0, "pp", "N", LIST, OF(pp), 0, 1 << 20, "bench: prompts of so many tokens: 512; matmul: tokens at once: 1,256" },
    { 0, "tg", "N", LIST, OF(tg), 0, 1 << 20, "bench: so many tokens one by one: 128" },
    { 0, "depth", "N", LIST, OF(depth), 0, 1 << 20, "bench: after so many others: 0" },
    { 0, "reps", "N", WHOLE, OF(reps), 1, 64, "bench, matmul: runs of each test: 5" },
    { 0, "svg", "FILE", TEXT, OF(svg), 0, 0, "bench, matmul: draws the roofline, with each result on it" },
    { 'q', "quiet", NULL, FLAG, OF(quiet), 0, 0, "no statistics" },
    { 0, "json", NULL, FLAG, OF(json), 0, 0, "tokenize, perplexity, inspect, bench, matmul: for programs" },
    { 0, "exact", NULL, FLAG, OF(exact), 0, 0, "multiply in float with dequantised weights; slower" },
    { 0, "kv", "TYPE", TEXT, OF(cache), 0, 0, "the cache of keys and values: f16, or f32 if all weights are" },
    { 0, "kernel", "NAME", TEXT, OF(kernel), 0, 0, "avx512, avxvnni, avx2, neondot, neon or scalar; the CPU's best" },
    { 0, "pre", "NAME", TEXT, OF(pre), 0, 0, "how a GGUF's text is split before merging, where it does not say" },
    { 0, "no-bos", NULL, FLAG, OF(no_bos), 0, 0, "no begin token before the text" },
    { 0, "no-echo", NULL, FLAG, OF(no_echo), 0, 0, "generate: do not print the prompt" },
    { 0, "ends", NULL, FLAG, OF(ends), 0, 0, "tokenize: the end token after the text, too, where the model adds one" },
    { 0, "special", NULL, FLAG, OF(special), 0, 0, "read <|names|> of special tokens as such; detokenize: write them" },
    { 0, "pieces", NULL, FLAG, OF(pieces), 0, 0, "tokenize: a line for each token, with its text" },
    { 0, "check", NULL, FLAG, OF(check), 0, 0, "inspect: reads all weights, whether they are finite" },
    { 'h', "help", NULL, FLAG, OF(help), 0, 0, "this" },
    { 0, "version", NULL, FLAG, OF(version), 0, 0, "the version" },
};
enum { N_OPTIONS = sizeof option_table / sizeof *option_table };

static void print_help(void) {
    printf("usage: ./run CHECKPOINT [PROMPT] [options]\n");
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *o = &option_table[i];
        char left[48], letter[] = { '-', o->letter, ',', ' ', 0 };
        snprintf(left, sizeof left, "%s--%s %s", o->letter ? letter : "    ", o->name, o->argument ? o->argument : "");
        printf("  %-24s %s\n", left, o->help);
    }
    printf("limits: %d layers, %d dimensions, %d tokens in a vocabulary, %d positions, %d tensors\n", MAX_LAYERS,
           MAX_DIM, MAX_TOKENS, MAX_CONTEXT, MAX_TENSORS);
}

static const Option *find_option(const char *word) {
    if (!strcmp(word, "-sys")) word = "-y";
    size_t n = strcspn(word, "=");
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *o = &option_table[i];
        if (word[1] == '-' ? !strncmp(word + 2, o->name, n - 2) && !o->name[n - 2]
                           : o->letter && word[1] == o->letter && !word[2]) return o;
    }
    return NULL;
}

// Puts the value of an option into *to.
static bool set_option(const Option *o, const char *value, Options *to, Error *e) {
    static const char *const kinds[] = { [WHOLE] = "an integer", [SEED] = "an integer", [REAL] = "a number",
                                         [LIST] = "integers, as in 1,2," };
    char most[32] = "18446744073709551615";  // the largest seed, which no double is
    const char *starts = o->min < 0 ? "0123456789-" : "0123456789.";
    void *place = (char *)to + o->offset;
    List *list = place;
    char *end;
    if (o->type == FLAG) return *(bool *)place = true;
    if (o->type == TEXT) return *(const char **)place = value, true;
    if (o->type == SEED && !strcmp(value, "-1")) return to->seed = to->clock_seed, true;
    if (o->type == LIST) list->n = 0;
    for (const char *at = value; *at && strchr(starts, *at); at = end + 1) {
        double x;
        errno = 0;
        if (o->type == SEED) x = (double)(*(uint64_t *)place = strtoull(at, &end, 10));
        else if (o->type == REAL) x = *(double *)place = strtod(at, &end);
        else if (o->type == WHOLE) x = (double)(*(int64_t *)place = strtoll(at, &end, 10));
        else x = (double)strtol(at, &end, 10);
        if (errno || !(x >= o->min && x <= o->max)) break;
        if (o->type == LIST) list->at[list->n++] = (int)x;
        if (!*end) return true;
        if (o->type != LIST || *end != ',' || list->n == 16) break;
    }
    if (o->type != SEED) snprintf(most, sizeof most, "%.10g", o->max);
    return fail(e, MISUSE, "--%s %s: expected %s from %.10g to %s (%s)", o->name, value, kinds[o->type], o->min, most,
                o->help);
}

static bool parse_options(int argc, char **argv, Options *to, Error *e) {
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        if (word[0] != '-') {
            const char **place = to->checkpoint ? &to->prompt : &to->checkpoint;
            if (*place) return fail(e, MISUSE, "two prompts: \"%.99s\" and \"%.99s\"; put it in quotes", *place, word);
            *place = word;
            continue;
        }
        const Option *o = find_option(word);
        const char *glued = word[1] == '-' ? strchr(word, '=') : NULL;  // --name=value
        const char *value = glued ? glued + 1 : argv[i + 1];
        if (!o && value && !strncmp(word, "--model", 7))
            return fail(e, MISUSE, "--model %.100s: the model comes first: ./run %.100s", value, value);
        if (!o || (glued && o->type == FLAG)) return fail(e, MISUSE, "there is no option %s; see ./run --help", word);
        if (o->type != FLAG && !glued && ++i >= argc) return fail(e, MISUSE, "%s needs a value: %s", word, o->argument);
        if (!set_option(o, value, to, e)) return false;
    }
    return true;
}

// Up to DETOKENIZE a vocabulary is enough; up to PERPLEXITY they take a prompt; those before EXPORT need a state.
typedef enum { TOKENIZE, DETOKENIZE, GENERATE, LOGITS, PERPLEXITY, CHAT, INSPECT, BENCH, EXPORT, MATMUL, N_MODES } Mode;
static const char *const mode_names[N_MODES] = { "tokenize", "detokenize", "generate", "logits", "perplexity", "chat",
                                                 "inspect", "bench", "export", "matmul" };

static bool find_mode(const char *name, Mode *mode, Error *e) {
    for (*mode = 0; *mode < N_MODES; ++*mode) if (!strcmp(mode_names[*mode], name)) return true;
    return fail(e, MISUSE, "-m %s: expected %s; the checkpoint comes first: ./run FILE", name, find_option("-m")->help);
}

// Token ids from a text of numbers, which has a NUL after its n bytes.
static bool read_ids(const char *text, size_t n, int n_tokens, Tokens *tokens, Error *e) {
    for (const char *p = text;;) {
        p += strspn(p, " \t\r\n,");
        if (!*p) return p == text + n || fail(e, MISUSE, "a NUL among the token ids");
        char *end;
        long id = isdigit((unsigned char)*p) ? strtol(p, &end, 10) : -1;
        if (id < 0 || id >= n_tokens)
            return fail(e, MISUSE, "\"%.*s\" is no token id below %d", (int)strcspn(p, " \t\r\n,"), p, n_tokens);
        if (!emit(tokens, (int)id, e)) return false;
        p = end;
    }
}

// A text of more bytes has more than n_tokens. A token has at most the longest piece's bytes, and each of these comes
// from at most 8 of the text: 4 characters of 4 bytes may compose to one of 2. Bytes without a token have no limit.
static size_t most_bytes(const Tokenizer *t, int n_tokens) {
    size_t longest = 0, n;
    for (int id = 0; id < t->n_tokens; id++) {
        piece(t, id, &n);
        longest = n > longest ? n : longest;
    }
    for (int byte = 0; byte < 256; byte++) if (t->byte_id[byte] < 0) return MAX_TEXT;
    n = times((size_t)n_tokens, 8 * longest);
    return n < MAX_TEXT ? n : MAX_TEXT;
}

// The prompt as tokens: from --ids, -f or -i.
static bool read_prompt(const Model *m, Mode mode, int context, Tokens *tokens, Error *e) {
    const Tokenizer *t = &m->tokenizer;
    const char *given = options.ids ? options.ids : options.prompt ? options.prompt : "";
    bool is_limited = mode == GENERATE || mode == LOGITS, are_ids = options.ids || mode == DETOKENIZE;
    size_t most = is_limited && !are_ids ? most_bytes(t, context) : MAX_TEXT;
    Buffer text = { 0 };
    if (!!options.ids + !!options.file + !!options.prompt > 1)
        return fail(e, MISUSE, "more than one prompt: -i, -f and --ids exclude each other");
    bool ok = options.file ? read_all(options.file, most, &text, e) && append(&text, "", 1, e)
                           : append(&text, given, strlen(given) + 1, e);
    Span span = { (const char *)text.bytes, ok ? text.n - 1 : 0, options.special };
    if (span.n_bytes > most)
        ok = fail(e, NO_ROOM, "the prompt has more than %zu bytes%s", most, is_limited ? "; see -c" : "");
    // A text has to begin with something: where neither the model nor the user puts it there, its begin token does.
    bool begins = t->add_bos || (mode != TOKENIZE && span.n_bytes == 0 && t->bos >= 0);
    bool ends = mode == TOKENIZE && options.ends && t->add_eos;
    if (are_ids) ok = ok && read_ids(span.text, span.n_bytes, m->config.n_tokens, tokens, e) &&
                      (tokens->n > 0 || options.file || fail(e, MISUSE, "no token ids; see --ids"));
    else ok = ok && (!begins || emit(tokens, t->bos, e)) && encode(t, &span, 1, tokens, e) &&
              (!ends || emit(tokens, t->eos, e)) && (tokens->n > 0 || mode == TOKENIZE ||
              fail(e, MISUSE, "an empty prompt, and the model has no begin token; see -i"));
    if (ok && tokens->n_dropped)
        fprintf(stderr, "%zu bytes of the text have no token here and were left out\n", tokens->n_dropped);
    free(text.bytes);
    return ok;
}

// Opens the checkpoint and, for llama2.c's, the tokenizer beside it. Where no weights are needed, a vocabulary will do.
static bool open_files(Model *m, Mode mode, Error *e, const char **culprit) {
    bool only_words = mode <= DETOKENIZE;
    bool needs_words = mode != INSPECT && (only_words || !options.ids || mode > PERPLEXITY);
    *culprit = options.checkpoint;
    if (!map_parts(options.checkpoint, m, e)) return false;
    bool is_llama2c = recognise(m->file.bytes, m->file.n_bytes) == LLAMA2C;
    int threads = only_words ? 0 : options.threads.at[0];
    bool ok = (!only_words || is_llama2c) && open_model(m->file.bytes, m->file.n_bytes, threads, m, e);
    if (!ok && only_words && !(is_llama2c && options.tokenizer))
        ok = open_vocabulary(m->file.bytes, m->file.n_bytes, -1, m, e);
    if (!ok || (m->tokenizer.n_tokens && !options.tokenizer)) return ok;
    const char *path = options.tokenizer ? options.tokenizer : "tokenizer.bin";
    if (!options.tokenizer && access(path, R_OK)) return !needs_words ||
        fail(e, BAD_FILE, "has no tokenizer in it and there is no tokenizer.bin here: give it with -z FILE");
    *culprit = path;
    return map_file(path, &m->tokenizer_file, e) &&
           open_vocabulary(m->tokenizer_file.bytes, m->tokenizer_file.n_bytes, m->config.n_tokens, m, e);
}

// A state as the options ask for it.
static bool set_up_state(const Model *m, Mode mode, State *s, Error *e) {
    int own = m->config.context, usual = mode == PERPLEXITY ? 512 : 4096;
    if (mode == BENCH && options.context < 0) {
        int pp = largest(options.pp), tg = largest(options.tg);
        usual = largest(options.depth) + (pp > tg ? pp : tg);
        if (usual > own) return fail(e, NO_ROOM, "%d positions; the model was trained for %d", usual, own);
    }
    s->context = options.context > 0 ? (int)options.context : options.context == 0 ? own : own < usual ? own : usual;
    if (s->context > own)
        return fail(e, MISUSE, "-c %d: the model was trained for %d positions; -c 0 takes them all", s->context, own);
    s->batch = options.batch ? (int)options.batch : 128;
    if (s->batch > s->context) s->batch = s->context;
    s->threads = largest(options.threads);
    s->exact = options.exact;
    bool all_f32 = true;
    for (size_t i = 0; i < n_slots(m); i++) {
        Slot slot = get_slot((Model *)m, i);
        all_f32 &= !slot.tensor || !slot.tensor->tiles || slot.tensor->type == F32;
    }
    s->cache_f32 = options.cache ? !strcmp(options.cache, "f32") : options.exact || all_f32;
    if (options.cache && !s->cache_f32 && strcmp(options.cache, "f16"))
        return fail(e, MISUSE, "--kv %s: expected f16 or f32", options.cache);
    bool ok = make_state(m, s, e);
    if (ok && options.context == 0 && !options.quiet)
        fprintf(stderr, "a context of %d positions: %zu MiB when it is full\n", s->context, s->arena_bytes >> 20);
    return ok;
}

// The one line that ends a run that failed.
static int tell_error(const char *culprit, const Error *e) {
    char line[1024];
    snprintf(line, sizeof line, "run: %.600s%s%s", culprit ? culprit : "", culprit ? ": " : "", e->text);
    disarm(line, strlen(line), "");
    if (e->status != INTERRUPTED) fprintf(stderr, "%s\n", line);
    else if (isatty(STDERR_FILENO)) fputc('\n', stderr);  // after the terminal's ^C
    return e->status;
}

// The first Ctrl-C asks for the end, and loops look for it. A second one, or one at a chat's prompt, is the end.
static void on_interrupt(int number) {
    bool ends = interrupted || at_prompt;
    if (ends && unfinished) unlink(unfinished);
    if (ends) _exit(tell_error(NULL, &(Error){ INTERRUPTED, "" }));
    interrupted = number;
}

static bool run_mode(Model *m, Mode mode, State *s, Sampler *sampler, Error *e) {
    Tokens tokens = { 0 };
    if (mode == CHAT && (options.file || options.ids))
        return fail(e, MISUSE, "-m chat takes -i and stdin, not -f and --ids");
    bool ok = mode <= DETOKENIZE || mode >= EXPORT || set_up_state(m, mode, s, e);
    ok = ok && (mode > PERPLEXITY || read_prompt(m, mode, s->context, &tokens, e));
    heed(SIGINT, &(struct sigaction){ .sa_handler = on_interrupt, .sa_flags = SA_RESTART });  // no write is cut short
    switch (ok ? mode : N_MODES) {
    case TOKENIZE: print_tokens(&m->tokenizer, &tokens); break;
    case DETOKENIZE: print_text(&m->tokenizer, &tokens); break;
    case GENERATE: ok = run_generate(m, s, sampler, &tokens, e); break;
    case LOGITS: ok = run_logits(m, s, &tokens, e); break;
    case PERPLEXITY: ok = run_perplexity(m, s, &tokens, e); break;
    case CHAT: ok = run_chat(m, s, sampler, e); break;
    case INSPECT: ok = run_inspect(m, s, e); break;
    case BENCH: ok = run_bench(m, s, e); break;
    case EXPORT: ok = export_model(m, options.output, e); break;
    case MATMUL: ok = run_matmul(e); break;
    default: break;
    }
    if (mode <= DETOKENIZE) ok = ok && (!interrupted || fail(e, INTERRUPTED, "interrupted"));
    free(tokens.ids);
    return ok;
}

static bool run(int argc, char **argv, Model *m, State *s, Sampler *sampler, Error *e, const char **culprit) {
    uint64_t clock = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    Mode mode;
    options = (Options){ .mode = "generate", .temperature = 1.0, .top_p = 0.9, .n_predict = 256, .context = -1,
                         .reps = 5, .threads = { 1, { count_cores(true) } }, .tg = { 1, { 128 } },
                         .depth = { 1, { 0 } }, .seed = clock, .clock_seed = clock };
    if (!parse_options(argc, argv, &options, e) || !find_mode(options.mode, &mode, e)) return false;
    if (options.pp.n == 0) options.pp = mode == MATMUL ? (List){ 2, { 1, 256 } } : (List){ 1, { 512 } };
    for (int i = 0, most = count_cores(false); i < options.threads.n; i++) {
        if (options.threads.at[i] <= most) continue;
        if (!options.quiet) fprintf(stderr, "-j %d: this process may use %d\n", options.threads.at[i], most);
        options.threads.at[i] = most;
    }
    if (options.help) return print_help(), true;
    if (options.version) return printf("cria %s\n", CRIA_VERSION), true;
    if (!options.checkpoint && mode != MATMUL)
        return fail(e, MISUSE, "no checkpoint given; ./run --help lists the options");
    if (options.temperature >= 4 && options.temperature == floor(options.temperature))
        fprintf(stderr, "a temperature of %g is very high; threads are -j\n", options.temperature);
    if (!choose_kernels(options.kernel, e)) return false;
    if (mode != MATMUL && !open_files(m, mode, e, culprit)) return false;
    if (options.no_bos) m->tokenizer.add_bos = false;
    *culprit = NULL;
    *sampler = (Sampler){ .from_clock = options.seed == options.clock_seed, .temperature = (float)options.temperature,
                          .top_k = (int)options.top_k, .top_p = (float)options.top_p, .min_p = (float)options.min_p };
    if (!make_sampler(sampler, m->config.n_tokens, options.seed, e)) return false;
    return run_mode(m, mode, s, sampler, e);
}

static const Model *in_use;  // for the handler

// Before a signal ends the program, the unfinished file goes. SIGBUS may mean that a mapped file became shorter, or its
// disk failed: then the first thread that meets it says so.
static void on_end(int number, siginfo_t *info, void *context) {
    static atomic_flag said = ATOMIC_FLAG_INIT;
    (void)context;
    if (unfinished) unlink(unfinished);
    for (size_t i = 0; number == SIGBUS && i < 2 + in_use->n_parts; i++) {
        const Map *map = i > 1 ? &in_use->parts[i - 2] : i ? &in_use->tokenizer_file : &in_use->file;
        if ((uintptr_t)info->si_addr - (uintptr_t)map->bytes >= map->n_bytes) continue;
        while (atomic_flag_test_and_set(&said)) pause();
        Error e = { BROKEN_IO, "became shorter while it was in use, or cannot be read any more" };
        _exit(tell_error(map->path, &e));
    }
    signal(number, SIG_DFL);  // it ends as it would have
    raise(number);
}

// Signals; and descriptors 0 to 2, where they are closed: else a file would get one of them, and what is meant for a
// terminal. What takes them fails as they do.
static void prepare_process(const Model *m) {
    static const int signals[] = { SIGBUS, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE };
    struct sigaction action = { .sa_sigaction = on_end, .sa_flags = SA_SIGINFO };
    in_use = m;
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) heed(signals[i], &action);
    signal(SIGXFSZ, SIG_IGN);  // a file that grows too large is a write that fails
    for (int i = 0; i < 3; i++) if (fcntl(i, F_GETFD) < 0) open(i ? "/" : "/dev/null", i ? O_RDONLY : O_WRONLY);
}

#ifndef CRIA_NO_MAIN
int main(int argc, char **argv) {
    Model model = { 0 };
    State state = { 0 };
    Sampler sampler = { 0 };
    Error error = { 0 };
    const char *culprit = NULL;
    prepare_process(&model);
    bool ok = run(argc, argv, &model, &state, &sampler, &error, &culprit);
    bool written = !ferror(stdout);  // a run whose text was lost has not succeeded
    written = fclose(stdout) == 0 && written;
    if (ok && !written) ok = fail(&error, BROKEN_IO, "writing to stdout failed: %s", strerror(errno));
    int status = ok ? DONE : tell_error(culprit, &error);
    free(sampler.candidates);
    free_state(&state);
    close_model(&model);
    return status;
}
#endif
