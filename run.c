/* cria: a baby llama. One C program that reads a LLaMA-style language model from a file and writes text with it.

   cc -O3 -fopenmp run.c -lm -o run        (or: make)
   ./run model.gguf -i "Once upon a time"

   HOW TO READ THIS FILE.  Part I is the story of one token, in the order in which it happens: how text becomes tokens
   (2), what a model consists of (3), the one operation that takes nearly all the time (4), the forward pass that turns
   tokens into a probability for every possible next token (5), the choice of one of them (6), and the loop around it
   all (7). Part II is the machinery, and what Part I leaves out: quantised products (8); experts, the speeds at which
   pairs rotate, and top-p (11). The appendix has the innermost loops again, for fast instruction sets.

     1  The ground floor                      Part II
     2  Text to tokens (tokenizer.c)            8  Number formats, and packing them into tiles
     3  The model                               9  The machine: files, processors, threads
     4  Matrix multiplication                  10  Opening a checkpoint
     5  The forward pass                       11  Experts, long texts, likely tokens, memory
     6  Choosing a token                       12  Writing, chatting; 12a  Many texts, scores
     7  Generating                             13  Measuring
                                                A  Kernels
                                               14  main

   THE LETTERS.  Shapes stand beside every pointer, outermost dimension first, in these letters (SmolLM2-135M's in
   brackets):

     L  layers                      [30]      V  tokens in the vocabulary               [49152]
     D  width of a token's vector  [576]      S  positions that the context can hold
     H  query heads                  [9]      B  tokens that go through the model together, at most
     G  key/value heads: each is     [3]      n  tokens that do so now
        shared by H/G query heads             F  width of the feed-forward layer         [1536]
     K  width of a head             [64]      R  numbers of a head that are rotated, <= K  [64]
     E  experts of a layer, if it has some

   THE SAME BITS.  Every kernel gives, on every CPU and with any number of threads, the bits that the plain C loops of
   chapters 4, 5, 6 and 8 define. So the order of each sum is fixed, and a multiply-add is fused where fmaf is written
   and nowhere else: the pragmas below forbid the compiler to fuse others, or to reorder arithmetic. */

#if defined(__clang__)
#ifdef __x86_64__  // undoes part of what clang has no macro for: -freciprocal-math, -fno-signed-zeros, ...
#pragma float_control(precise, on)
#else
#pragma clang fp reassociate(off)
#endif
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__)  // sanitizers would take minutes to compile
#pragma GCC optimize("O3")  // -O2 would take 1.2 times the instructions, -O1 and -Os nearly 3 times
#endif
#endif
#if __FAST_MATH__ || __FINITE_MATH_ONLY__ || (defined(__GCC_IEC_559) && __GCC_IEC_559 == 0)
#error "cria promises the same bits everywhere: build it without -ffast-math, -Ofast and options that are part of it"
#endif
#if __FLT_EVAL_METHOD__ != 0 && __FLT_EVAL_METHOD__ != 16  // 16: f16 need not be widened for arithmetic either
#error "cria promises the same bits everywhere: this compiler computes floats in another precision (-mfpmath=387?)"
#endif
#pragma GCC diagnostic error "-Wswitch"  // a switch over an enum names every member
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
#include <pthread.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

/* ==== 1. The ground floor ===========================================================================================
   What the rest stands on: how a failure is reported, sums of sizes that cannot wrap, a clock, and a team of threads
   that shares work. */

// The exit statuses of the program: what kind of thing went wrong.
enum { DONE = 0, BAD_FILE = 1, MISUSE = 2, BROKEN_IO = 3, NO_MEMORY = 4, NO_ROOM = 5, INTERRUPTED = 130 };

// What went wrong, in one line. Functions that can fail return false and leave it here; only main prints and exits.
typedef struct {
    int status;      // one of the exit statuses above
    char text[440];  // what was found, what was expected
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

// The same, where the file is wrong.
#define refuse(e, ...) fail(e, BAD_FILE, __VA_ARGS__)

// Zeroed memory for `count` items of `size` bytes, or NULL with the error filled in.
static void *allocate(size_t count, size_t size, Error *e) {
    void *p = calloc(count ? count : 1, size);
    if (!p) fail(e, NO_MEMORY, "no memory for %zu x %zu bytes", count, size);
    return p;
}

// a * b, or SIZE_MAX where that does not fit: no allocation and no file has that many bytes.
static size_t times(size_t a, size_t b) {
    size_t product;
    return __builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product;
}

// a + b, with the same limit.
static size_t plus(size_t a, size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }

// n rounded up to a multiple of step, with the same limit.
static size_t round_up(size_t n, size_t step) {
    size_t up = plus(n, step - 1);
    return up == SIZE_MAX ? up : up / step * step;
}

// A file's bytes, mapped read-only: they are read when they are used, and processes share one copy.
typedef struct { const unsigned char *bytes; size_t n_bytes; const char *path; } Map;

// A half-open range of work.
typedef struct { size_t from, to; } Range;

// One thread's place in a team, whose main work is the pass: sending tokens through the model. A pass is a list of
// steps, and no thread begins a step before all have ended the one before. The work of a step, its rows, heads or
// tokens, comes in chunks: a fast thread takes more. No sum is ever divided, so who computes a number never changes it.
typedef struct {
    int thread, threads;
    struct Gate *gate;  // where the threads wait for each other (chapter 9)
    unsigned n_steps;   // steps that this thread has ended
    int n_helped;       // threads whose share of this step is used up, as seen from here; itself first
    double began;       // the time when the step began, if steps are measured
} Team;

// Runs work(job, team) on a team of at most `threads` threads and waits for all of them. rows > 0: a pass of so many,
// timed, so that a thread that slows it down can rest in the next; 0: not timed; -1: nor may a thread rest.
static void run_team(int threads, int rows, void (*work)(void *job, Team *team), void *job);  // chapter 9

// Takes the next chunk of a step's n items for this thread: of its own share first, then of the shares of slower
// threads. Chunks are multiples of `multiple`, except the last. False if none is left.
static bool take_chunk(Team *team, size_t n, size_t multiple, Range *chunk);  // chapter 9

// Waits until every thread of the team has come here. The step's name is for measuring.
static void end_step(Team *team, int step, int layer);  // chapter 9

// Seconds since a fixed moment.
static double clock_seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

// interrupted: set by Ctrl-C, loops look at it between two passes. at_prompt: a chat waits for the user.
static volatile sig_atomic_t interrupted, at_prompt;

/* ==== 2. Text to tokens =============================================================================================
   A model reads numbers, not letters. tokenizer.c cuts a text into pieces of its vocabulary and looks up their numbers:
   encode() does that, decode() gives a token's bytes back. It is a chapter of its own in a file of its own. */
#include "tokenizer.c"

/* ==== 3. The model ==================================================================================================
   A decoder-only Transformer. Each token is a vector of D numbers; L layers add to it what the token should know of the
   tokens before it (attention) and what the model knows of it (feed forward); a last matrix compares the result with
   every token of the vocabulary. One layer, with the shapes for one token:

       x (D) ──┬── norm ┬─ query (H,K) ─ rotate ────────────────────┐
               │        ├─ key   (G,K) ─ rotate ─ cache (S,G,K) ─ scores (H,S) ─ softmax ─ mix ── attention_out ──┐
               │        └─ value (G,K) ────────── cache (S,G,K) ─────────────────────────┘                        │
               └──────────────────────────────────────────────────────────────────────────────────────── + ───────┤
               ┌──────────────────────────────────────────────────────────────────────────────────────────────────┘
               ├── norm ─┬─ gate (F) ─ silu ─ * ── down ──┐
               │         └─ up   (F) ─────────┘           │
               └──────────────────────────────────────── +──► x (D) of the next layer

   Models differ by numbers and by tensors that are there or not; nothing in Part I asks for a model's name. */

// How the weights of a matrix are stored; ..F: with f32 scales, ..M: with minima. Chapter 4 draws the formats.
typedef enum {
    F32, F16, BF16, Q8, Q8F, Q4, Q4M, Q5, Q5M, Q2K, Q3K, Q4K, Q5K, Q6K, IQ4NL, IQ4XS, MXFP4, N_TYPES
} Type;

// A matrix in tiles of 16 rows and 32 or 256 columns (chapter 4); those of a layer's experts follow each other.
typedef struct {
    Type type;
    int rows, cols;              // of one
    const unsigned char *tiles;  // NULL: this model has no such matrix
} Tensor;

// Which numbers of a head are rotated together: (0,1) (2,3) ..., or (0,R/2) (1,R/2+1) ...
typedef enum { ADJACENT, HALVES } Pairing;
typedef enum { SILU, GELU } Activation;             // x / (1 + e^-x); or with tanh (chapter 5)
typedef enum { UNROTATED, ROTATED, LOCAL } Angles;  // of a layer: none, those by rope_theta, those by local_theta

typedef struct {
    char family[16];
    int n_layers, dim, n_tokens, head_dim, rope_dim;  // L, D, V, K, R
    int context, original_context;          // positions that it was trained for; before its rotation was scaled, or 0
    float norm_eps;
    double rope_theta, local_theta;  // rotary position embedding: theta^(-2i/R) is pair i's speed; local 0: none
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
    int n_experts, n_experts_used;     // E: copies of gate, up, down; how many of them a token visits. 0: no experts
    Tensor query, key, value;          // (H*K,D) (G*K,D) (G*K,D)
    Tensor attention_out;              // (D,H*K)
    const float *query_norm, *key_norm;             // (K) each, or (H*K) and (G*K) at once; NULL: not normalised
    const float *attention_norm, *ffn_norm;  // (D)  before a block; NULL: OLMo2 has only norms after, Gemma has both
    const float *attention_norm_bias, *ffn_norm_bias;  // (D)  or NULL
    const float *attention_post_norm, *ffn_post_norm;  // (D)  of what a block adds, or NULL
    Tensor gate, up, down, router;     // (F,D) (F,D) (D,F) (E,D)
    // Added to a product: one number for each row of the matrix. NULL: none (Qwen2 has the first three).
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
    Text chat_template;         // the checkpoint's own, a program (tokenizer.c); empty: none
    const unsigned char *vocabulary;  // the tokenizer's section
    size_t vocabulary_bytes;
    struct Slot *slots; struct Source *sources;  // each tensor that it has or may have; what its file has (chapter 10)
    Map file, tokenizer_file, *parts;  // what the pointers above point into, if the file's layout is ours ...
    unsigned char *packed;     // ... or else this block, made from the file when it was opened
    Buffer packed_vocabulary;  // likewise for the tokenizer's section
    size_t packed_bytes, n_slots, n_sources, n_parts;  // the last: of a split GGUF those after its first
} Model;

// The steps of a pass, in order: what threads do between two waits. Attention is ATTEND, or else SCORE, SOFTMAX and MIX
// (attend_deep()). A single vector skips steps that only prepare inputs: each thread does these itself (prepare()).
// To add a step: its name here and in step_names[] (chapter 13), its work in a loop over take_chunk(), then end_step().
typedef enum {
    EMBED,
    ATTENTION_NORM, QUERY_KEY_VALUE, WIDE_HEAD_NORM, ROTATE, ATTEND, SCORE, SOFTMAX, MIX, ROUND_ATTENDED, ATTENTION_OUT,
    ATTENTION_POST_NORM,  // must follow ATTENTION_OUT, and FFN_POST_NORM DOWN: end_block() adds 1
    FFN_NORM, ROUTER, CHOOSE_EXPERTS, LIST_VISITORS, ROUND_VISITORS, GATE_UP, ROUND_HIDDEN, DOWN, FFN_POST_NORM,
    FINAL_NORM, HEAD,
    N_STEPS
} Step;

// How models are run, as the user has asked for it.
typedef struct {
    int threads;
    int context, batch;  // S: positions of a text at most; B: rows of a pass at most
    bool exact;          // multiply with dequantised weights in float
    bool cache_f32;      // keep keys and values in 32 bits, else in 16
} Settings;

enum {
    LOGITS_AT_ONCE = 16,    // rows of logits at most: 8 MB for a vocabulary of 128,000 tokens
    QUERIES_TOGETHER = 24,  // queries that share each key once it is loaded: AVX-512 multiplies twelve at a time
    MAX_HEADS = 1024, MAX_HEAD_DIM = 1024,  // H and K at most
};

/* ==== 4. Matrix multiplication ======================================================================================
   Nearly all the time goes into y = W x. For one token the machine does little but read W; for many tokens it reads W
   once and multiplies. Both are served by one layout: a matrix is cut into tiles of 16 rows and 32 columns (256 in some
   types), and a tile holds the weights in the order in which they are used; a row tile is all tiles of 16 rows. One
   SIMD lane is one row, so no sum ever runs across lanes, and every kernel can give the bits of the plain loops here.

       matrix = row tiles, each: | tile of columns 0..31 | columns 32..63 | ...    padded with zeros to whole tiles
       f32, f16, bf16 tile:  column 0: row 0 .. row 15 | column 1: row 0 .. row 15 | ...
       quantised tiles:      the 16 rows' scales, minima if any, then for each 32 columns
           8 bits, groups of four columns:  row 0: c0 c1 c2 c3 | row 1: c0 c1 c2 c3 | ... | row 15 |  next group ...
           fewer bits in planes, of 4, 2 or 1 bit: a 6-bit weight has its low 4 bits in one and its high 2 in another
           4 bits, 256 bytes: four groups in the low halves of the bytes, groups 4 to 7 in the high halves
           2 bits, 128 bytes: two groups in each quarter of the bytes' bits;  1 bit, 64 bytes: bit g is group g's

   A quantised weight is scale * (q - offset), scale * q + min, or scale * values[q], with one scale for 32 columns of a
   row or for 16. The vectors that it is multiplied with, its activations, are rounded to 8 bits too, in blocks of 32
   with a scale of their own: processors are fastest at products of small integers. With --exact they stay floats. */

enum { TILE_ROWS = 16, BLOCK = 32 };  // a block: columns whose activations share a scale

// What a type is; chapter 8 has the table and the functions that unpack tiles.
typedef struct {
    const char *name;
    int cols, per_scale;   // columns of a tile; those of a row that share a scale
    int header;            // bytes of scales and minima at the tile's beginning; 0: the weights are floats
    int bits, offset;      // of q, where the weight is scale * (q - offset)
    bool has_min;
    const int8_t *values;  // the weight is scale * values[q]; NULL: scale * (q - offset)
} TypeInfo;

static const TypeInfo types[N_TYPES];  // chapter 8

static bool is_quantised(Type type) { return types[type].header > 0; }

static size_t tile_bytes(Type type) {
    return (size_t)types[type].header + (size_t)types[type].cols * TILE_ROWS / 8 * (size_t)types[type].bits;
}

static size_t n_row_tiles(const Tensor *w) { return round_up((size_t)w->rows, TILE_ROWS) / TILE_ROWS; }
static size_t n_blocks(const Tensor *w) { return round_up((size_t)w->cols, BLOCK) / BLOCK; }

// Bytes of the tiles of sixteen rows.
static size_t row_tile_bytes(const Tensor *w) {
    size_t cols = (size_t)types[w->type].cols;
    return times(round_up((size_t)w->cols, cols) / cols, tile_bytes(w->type));
}

static size_t tensor_bytes(const Tensor *w) { return times(n_row_tiles(w), row_tile_bytes(w)); }

// Functions that are compiled into several kernels, each time for another instruction set (chapter 8).
#define INLINE static inline __attribute__((always_inline))

INLINE float float_of_bits(uint32_t u) { return (union { uint32_t u; float x; }){ .u = u }.x; }
INLINE uint32_t bits_of_float(float x) { return (union { uint32_t u; float x; }){ .x = x }.u; }

// 32 numbers of a vector, rounded to 8 bits: a number is about scale * q.
typedef struct {
    int8_t q[32];
    float scale;
    float scaled_sum[3];    // scale * sum of the q: of all, of the first 16, of the last 16
    int32_t minus_128_sum;  // -128 * sum of all q: the correction for kernels that store weights as weight + 128
    int32_t minus_8_sum, minus_32_sum[2];  // likewise, of all; of the halves. A block fills a cache line, 64 bytes
} Block;

// The vectors of n tokens that a matrix is multiplied with, in blocks of 32 numbers. The blocks of the same columns lie
// side by side for all tokens, as a tile needs them. Columns past the matrix's are padding; their weights are 0.
typedef struct {
    const float (*x)[32];  // (cols/32, n)
    const Block *rounded;  // (cols/32, n)  or NULL: every product is made in float
    size_t n, first, some; // rows first .. first + some of the n are multiplied: all, or an expert's visitors
    size_t expert;         // whose matrix it is; 0 without experts
} Activations;

// f16 has 1 sign bit, 5 of exponent, 10 of fraction. Put where f32 has them, they give an exponent that is 112 too
// small, which a multiplication mends, for subnormals too. The exponent 31 means infinity and NaN and becomes 255.
INLINE float float_of_half(uint16_t h) {
    uint32_t body = (uint32_t)(h & 0x7fff) << 13, sign = (uint32_t)(h & 0x8000) << 16;
    uint32_t finite = bits_of_float(float_of_bits(body) * 0x1p112f);
    return float_of_bits(sign | (body >= 0x0f800000 ? body | 0x7f800000 : finite));
}

typedef void Widen(float *to, const uint16_t *from, size_t n);  // f16 to f32
INLINE void widen_floats(float *to, const uint16_t *from, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = float_of_half(from[i]);
}

// c[i][j] = ... fmaf(a[i][1], b[1][j], fmaf(a[i][0], b[0][j], c[i][j])), each over k in order: a chain, in which every
// addition takes the result of the one before. Sixteen chains run side by side.
// c (m, c_stride)  a (m, a_stride)  b (depth, 16), in f16 if `half` says so, else in f32
// b + ahead (bytes) is what is multiplied next; kernels prefetch it, since the processor cannot predict it.
INLINE void add_products(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,
                         ptrdiff_t ahead, int m, int depth) {
    (void)ahead;
    enum { TOGETHER = 4 };  // rows that share each number of b; a fixed count, so loops unroll
    for (int i = 0; i < m; i += TOGETHER, c += TOGETHER * c_stride, a += TOGETHER * a_stride) {
        float lane[TOGETHER][16] = { { 0 } }, x[TOGETHER] = { 0 };
        int rows = m - i < TOGETHER ? m - i : TOGETHER;
        for (int r = 0; r < rows; r++) memcpy(lane[r], c + (size_t)r * c_stride, sizeof lane[r]);
        for (int k = 0; k < depth; k++) {
            float wide[16];
            const float *w = half ? wide : (const float *)b + k * 16;
            if (half) widen_floats(wide, (const uint16_t *)b + k * 16, 16);
            for (int r = 0; r < rows; r++) x[r] = a[(size_t)r * a_stride + (size_t)k];
            for (int r = 0; r < (rows == 1 ? 1 : TOGETHER); r++)
                for (int j = 0; j < 16; j++) lane[r][j] = fmaf(w[j], x[r], lane[r][j]);
        }
        for (int r = 0; r < rows; r++) memcpy(c + (size_t)r * c_stride, lane[r], sizeof lane[r]);
    }
}

typedef struct { int id; float p; } Candidate;  // a token that may be next (chapter 6)

// The kernels: the innermost loops of chapters 4, 5, 6 and 8. The plain C there defines the results; the appendix has
// some of the loops again for other instruction sets. `kernels` points to the set in use.
typedef struct {
    const char *name;
    void (*add_tiles)(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks, const Block *x,
                      size_t n_all, int n);
    void (*add_products)(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,
                         ptrdiff_t ahead, int m, int depth);
    void (*multiply_vector)(float *y, Type type, const unsigned char *tiles, size_t rows, size_t cols, const float *x);
    void (*dequantise)(float w[32][16], Type type, const unsigned char *tiles, size_t block);
    void (*narrow)(uint16_t *to, const float *from, size_t n);  // to f16
    void (*round)(Block *blocks, const float *x, size_t stride, size_t cols, size_t n, Range tokens);
    bool (*normalise)(float *out, const float *x, const float *weight, const float *bias, size_t dim, float eps);
    void (*rotate)(float *head, const float *angle, int rope_dim, Pairing pairing);
    float (*scale_scores)(float *p, size_t from, size_t n, float scale, float cap);
    void (*exponentiate)(float lane[16], float *p, size_t n, float max);
    void (*activate)(float *gate, const float *up, size_t n, Activation how);
    void (*make_probabilities)(Candidate *c, const float *logits, int n, float temperature, float max);
    double (*peak)(bool int8, size_t rounds);        // measures arithmetic (chapter 13); returns how many operations
    void (*read)(const uint64_t *memory, size_t n);  // measures memory
} Kernels;

static const Kernels scalar, *kernels = &scalar;  // chapter 8

// y[t,r] = sum_c w[r,c] * x[t,c] for the rows of these row tiles      y (n, y_stride)
// A weight is read once for `together` tokens: 8192 blocks of x, half a megabyte if rounded, stay in the L2 cache.
static void multiply_rows(float *y, size_t y_stride, const Tensor *w, Range tiles, const Activations *a) {
    enum { TOKENS = 128 };
    bool quantised = is_quantised(w->type), rounded = quantised && a->rounded;
    size_t blocks = n_blocks(w), n_bytes = row_tile_bytes(w), together = 8192 / blocks;
    const unsigned char *bytes = w->tiles + a->expert * tensor_bytes(w) + tiles.from * n_bytes;
    together = together < 16 ? 16 : together > TOKENS ? TOKENS : together;
    if (a->n == 1 && a->some == 1 && !quantised) {
        kernels->multiply_vector(y + tiles.from * 16, w->type, bytes, tiles.to - tiles.from, blocks * 32, a->x[0]);
        return;
    }
    for (size_t i = tiles.from; i < tiles.to; i++, bytes += n_bytes) {
        for (size_t t0 = 0; t0 < a->some; t0 += together) {
            int now = (int)(a->some - t0 < together ? a->some - t0 : together);
            _Alignas(64) float sum[TOKENS][16], columns[32][16];  // a row fills a cache line
            memset(sum, 0, (size_t)now * sizeof *sum);
            if (rounded) kernels->add_tiles(sum, w->type, bytes, blocks, a->rounded + a->first + t0, a->n, now);
            for (size_t c = 0; !rounded && c < blocks; c++) {
                const unsigned char *next = bytes + (c + 1) * (n_bytes / blocks);  // is fetched while we multiply
                for (size_t k = 0; k < 2 * (n_bytes / blocks); k += 64) __builtin_prefetch(next + k, 0, 2);
                kernels->dequantise(columns, w->type, bytes, c);
                kernels->add_products(sum[0], 16, a->x[c * a->n + a->first + t0], 32, columns[0], false, 0, now, 32);
            }
            for (int t = 0; t < now; t++) memcpy(y + (t0 + (size_t)t) * y_stride + i * 16, sum[t], sizeof *sum);
        }
    }
}

// Room for the input that the products of a step share.
typedef struct {
    bool rounds, copies;  // some matrix wants its input in 8 bits; some wants it in float
    size_t widest;        // numbers of the widest input, up to a multiple of 32
    float (*blocks)[32];  // (widest/32, B or visits)
    Block *rounded;       // (widest/32, B or visits), for one token (threads, widest/32)
} Inputs;

// y = w x + bias      y (n, y_stride)  bias (rows) or NULL
typedef struct { float *y; size_t y_stride; const Tensor *w; const float *bias; } Product;

// Computes the rows of some row tiles, and returns which rows these are.
static Range multiply_part(const Product *p, Range tiles, const Activations *x) {
    multiply_rows(p->y, p->y_stride, p->w, tiles, x);
    Range rows = { tiles.from * 16, tiles.to * 16 < (size_t)p->w->rows ? tiles.to * 16 : (size_t)p->w->rows };
    for (size_t t = 0; p->bias && t < x->some; t++)
        for (size_t r = rows.from; r < rows.to; r++) p->y[t * p->y_stride + r] += p->bias[r];
    return rows;
}

// Row tiles that are best multiplied side by side: four of floats with one vector.
static size_t tiles_together(const Tensor *w, const Activations *x) {
    return x->n == 1 && !is_quantised(w->type) ? 4 : 1;
}

// Computes products that share their input. The team takes their row tiles as one list.
static void multiply_all(const Product *products, int n, const Activations *x, Team *team) {
    size_t n_tiles = 0, together = 1;
    for (const Product *p = products; p < products + n; p++) {
        n_tiles += n_row_tiles(p->w);
        if (tiles_together(p->w, x) > together) together = tiles_together(p->w, x);
    }
    for (Range chunk; take_chunk(team, n_tiles, together, &chunk);) {
        size_t first = 0;  // tile of this product in the list
        for (const Product *p = products; p < products + n; first += n_row_tiles(p++->w)) {
            size_t from = chunk.from > first ? chunk.from - first : 0, to = chunk.to > first ? chunk.to - first : 0;
            if (to > n_row_tiles(p->w)) to = n_row_tiles(p->w);
            if (from < to) multiply_part(p, (Range){ from, to }, x);
        }
    }
}

/* ==== 5. The forward pass ===========================================================================================
   Tokens enter as numbers and leave as logits: a score for every token of the vocabulary to be the next one. A pass
   takes rows: a Row is one token of one text (a Range of rows is of a matrix). The prompt's tokens, a generated token,
   the next tokens of eight texts: all go the same way, and a row's bits depend on its own text only. First come the
   leaves of the computation, which know no threads and no model; then the steps of a layer, which a team shares.

   Attention, in words: every token has a question (its query), an address (its key) and something to tell (its value).
   How well a key answers a query is their dot product; both are rotated, further at each position, so that it depends
   on the distance. Softmax makes weights of these scores, which add up to 1; a token learns the sum of the values, each
   times its weight. Several heads ask at once; query heads that share a key/value head are a head group. A token sees
   itself and earlier tokens, never later ones. So keys and values never change once they are made: the KV cache keeps
   them, and a new token costs one pass and not the whole text again.

   The arithmetic, in order, of float32s; every operation rounds once, to nearest even. x is the row of the embedding
   times embedding_scale. Products are defined in chapters 4 and 8; then the bias is added. Cosines and sines are the C
   library's, of doubles, rounded once. Keys and values are rounded to f16, or kept in f32 (--kv; the default
   if all matrices are f32, or with --exact); a token reads its own from the cache too. A score is a chain over K, times
   attention_scale, then capped; the weights e^(score - max) are added in 16 lanes, position p in lane p mod 16; the
   result is a chain over positions, divided by that sum. It goes through attention_out; then x + that * residual_scale,
   and so for feed forward. The logits are multiplied by logit_scale, then capped. */

// (x + ROUNDER) - ROUNDER == rintf(x) for abs(x) < 2^22; the sum's low 22 bits are that integer.
#define ROUNDER 0x1.8p23f

// e^x = 2^n * e^r with n = x / ln 2 rounded, |r| <= ln 2 / 2, and e^r as a polynomial (error: at most 0.9 ulp). 0 below
// -87 and infinity above 88, so that 2^n stays a normal number; NaN stays NaN.
INLINE float exponential(float x) {
    float rounded = fmaf(x, 0x1.715476p+0f, ROUNDER), n = rounded - ROUNDER;
    float r = fmaf(n, -0x1.62e4p-1f, x);  // ln 2 in two parts: the first is short, so that this result is exact
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

INLINE float hyperbolic_tangent(float x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }
// About y, but never beyond the cap. Non-finite values become NaN, so the check sees them.
INLINE float cap_at(float y, float cap) { return cap * hyperbolic_tangent(y / cap) + (y - y); }

// The sum of 16 lanes: i and i+8, then +4, +2, +1.
INLINE float fold_lanes(float lane[16]) {
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}

// RMSNorm: out = x / sqrt(mean(x^2) + eps) * weight. With a bias, LayerNorm: the same of x - mean(x), plus the bias.
//     all (dim)      Element i is added in lane i mod 16. If the sum of squares is not finite: false, and out is NaN.
INLINE bool apply_norm(float *out, const float *x, const float *weight, const float *bias, size_t dim, float eps) {
    float lane[16] = { 0 }, of_mean[16] = { 0 };
    size_t i;
    for (i = 0; bias && i < dim; i++) of_mean[i % 16] += x[i];
    float mean = bias ? fold_lanes(of_mean) / (float)dim : 0.0f;
    for (i = 0; i + 16 <= dim; i += 16)
        for (int j = 0; j < 16; j++) lane[j] = fmaf(x[i + j] - mean, x[i + j] - mean, lane[j]);
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

// Rotates the pairs of one head.      head (K)  angle (R/2, 2): cosine and sine of each pair's angle
// Written with + alone: gcc 12 fuses a - beside a + although that is forbidden.
INLINE void rotate(float *head, const float *angle, int rope_dim, Pairing pairing) {
    int half = rope_dim / 2, step = pairing == ADJACENT ? 2 : 1, other = pairing == ADJACENT ? 1 : half;
    for (int i = 0; i < half; i++) {
        float *a = head + i * step, *b = a + other, x = *a, y = *b, cosine = angle[2 * i], sine = angle[2 * i + 1];
        *a = x * cosine + y * -sine;
        *b = y * cosine + x * sine;
    }
}

// p = p * scale or, if there is a cap, cap * tanh(p * scale / cap), for p[from] to p[n - 1]. What is before them, or
// after them up to a multiple of 16, becomes -infinity. Returns the largest.
INLINE float scale_scores(float *p, size_t from, size_t n, float scale, float cap) {
    float max[16];
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
    return max[0];
}

// p = e^(p - max), lane[i mod 16] += p[i]      p (n up to a multiple of 16)
INLINE void exponentiate(float lane[16], float *p, size_t n, float max) {
    for (size_t i = 0; i < n; i += 16) {
        for (int j = 0; j < 16; j++) {
            p[i + j] = exponential(p[i + j] - max);
            lane[j] += p[i + j];
        }
    }
}

// ---- Rows, sequences and the cache ----

// One token of one text, on its way through the model.
typedef struct { int token, position, sequence; bool wants_logits; } Row;

enum { PAGE = 64 };  // positions of a page of the cache: few are unused at a text's end, many follow each other

// A layer's part of the KV cache. Of keys, sixteen positions lie side by side: a SIMD lane is a position.
typedef struct {
    unsigned char *keys;             // (G, 64/16, K, 16) in a page: number d of position p at [p % 64 / 16][d][p % 16]
    unsigned char *values;           // (G, K/16, 64, 16) after them: at [d / 16][p % 64][d % 16]; K is rounded up to 16
    size_t key_bytes, value_bytes;   // of one head in one page
    size_t page_bytes;               // from a page to the next: of all layers
} CachedLayer;

// The KV cache: the keys and values of all texts, in pages from one pool. A page costs no memory before it is used.
typedef struct {
    bool f32;               // else f16: attention is bound by reading this
    int n_layers, context;  // L; S of each text
    CachedLayer *layers;    // (L)
    int *users;             // (pages)  how many sequences hold the page
    int *spare, n_spare;    // (pages)  those that none holds: S/64 for each text suffice; the last is taken first
    int *ids, *pages;       // (texts, S) (texts, S/64)  what the sequences point into
    unsigned char *pool;    // (pages, page_bytes)  a page has of each layer the keys, then the values
    void *arena;            // all of these
    size_t arena_bytes, page_bytes;
} Cache;

// One text, and what the model keeps of it.
typedef struct {
    Cache *cache;
    int *ids;    // (S)     its tokens
    int *pages;  // (S/64)  its pages of the cache
    int n;       // tokens that have gone through the model, and those of the pass under way
} Sequence;

static size_t n_pages(int n) { return ((size_t)n + PAGE - 1) / PAGE; }

static unsigned char *page_at(const Cache *c, int page) { return c->pool + (size_t)page * c->page_bytes; }

// Where the keys, or values, of one head begin in a page.
static unsigned char *keys_at(const CachedLayer *y, int page, size_t head) {
    return y->keys + (size_t)page * y->page_bytes + head * y->key_bytes;
}

static unsigned char *values_at(const CachedLayer *y, int page, size_t head) {
    return y->values + (size_t)page * y->page_bytes + head * y->value_bytes;
}

// Puts one head's key and value of a position into the cache.      key, value (K)
static void store(const Sequence *s, int layer, size_t head, size_t head_dim, size_t position, const float *key,
                  const float *value) {
    uint16_t half_key[MAX_HEAD_DIM], half_value[MAX_HEAD_DIM];
    void *keys = keys_at(&s->cache->layers[layer], s->pages[position / PAGE], head);
    void *values = values_at(&s->cache->layers[layer], s->pages[position / PAGE], head);
    size_t at = position % PAGE;
    if (!s->cache->f32) kernels->narrow(half_key, key, head_dim);
    if (!s->cache->f32) kernels->narrow(half_value, value, head_dim);
    for (size_t d = 0; d < head_dim; d++) {
        size_t k = (at / 16 * head_dim + d) * 16 + at % 16, v = (d / 16 * PAGE + at) * 16 + d % 16;
        if (s->cache->f32) {
            ((float *)keys)[k] = key[d];
            ((float *)values)[v] = value[d];
        } else {
            ((uint16_t *)keys)[k] = half_key[d];
            ((uint16_t *)values)[v] = half_value[d];
        }
    }
}

// Forgets all but the first n tokens.
static void rewind_sequence(Sequence *s, int n) {
    Cache *c = s->cache;
    for (size_t i = n_pages(n); i < n_pages(s->n); i++)
        if (--c->users[s->pages[i]] == 0) c->spare[c->n_spare++] = s->pages[i];
    if (n < s->n) s->n = n;
}

// Adds a token, in the text's last page: a new one if that is full, a copy if another text (fork_sequence()) shares it.
static void append_token(Sequence *s, int token) {
    Cache *c = s->cache;
    int *page = &s->pages[s->n / PAGE], old = *page;
    bool is_new = s->n % PAGE == 0, is_shared = !is_new && c->users[old] > 1;
    if (is_new || is_shared) c->users[*page = c->spare[--c->n_spare]] = 1;
    if (is_shared) c->users[old]--;
    if (is_shared) memcpy(page_at(c, *page), page_at(c, old), c->page_bytes);
    s->ids[s->n++] = token;
}

// ---- Attention ----

// One unit of attention: a head group of some successive tokens of one text.
typedef struct {
    const float *query;  // (n, stride)  each token's head group: `group` heads of K numbers from here on
    float *out;          // (n, stride)
    size_t stride;
    const CachedLayer *cached;
    const int *pages;         // of the text
    bool cache_f32;
    size_t kv_head;
    int group, n_queries;     // H/G; query i belongs to token i / group
    size_t head_dim, padded;  // K, and K rounded up to a multiple of 16
    size_t position, window;  // of the first token; how many positions each token sees
    float scale, cap;         // of the scores
    float *queries, *sums;    // (n_queries, padded)
    float *scores;            // (n_queries, score_stride)  by position
    size_t score_stride;
    float *totals;            // (n_queries)
} Attention;

// Offset of query i's head (and of its result) in `query` and `out`.
static size_t head_at(const Attention *a, int i) {
    return (size_t)(i / a->group) * a->stride + (size_t)(i % a->group) * a->head_dim;
}

// Query i sees the positions from seen_from() to before seen_to(): its token's own is the last.
static size_t seen_to(const Attention *a, int i) { return a->position + (size_t)(i / a->group) + 1; }
static size_t seen_from(const Attention *a, int i) {
    return seen_to(a, i) > a->window ? seen_to(a, i) - a->window : 0;
}

// The positions that any of the queries sees, from a multiple of 16 on.
static Range all_seen(const Attention *a) {
    return (Range){ seen_from(a, 0) / 16 * 16, seen_to(a, a->n_queries - 1) };
}

// The page after p's, to be prefetched; p's own if it is the last one seen.
static int next_page(const Attention *a, size_t p) {
    return a->pages[p / PAGE + (p / PAGE * PAGE + PAGE < seen_to(a, a->n_queries - 1))];
}

// scores[i,p] = query[i] . key[p] for these positions, sixteen at a time      query (n_queries, stride)
static void score_keys(const Attention *a, const float *query, size_t stride, Range positions) {
    for (size_t p = positions.from; p < positions.to; p += 16) {
        const unsigned char *page = keys_at(a->cached, a->pages[p / PAGE], a->kv_head);
        const unsigned char *next = keys_at(a->cached, next_page(a, p), a->kv_head);
        float *scores = a->scores + p;
        for (int i = 0; i < a->n_queries; i++) memset(scores + (size_t)i * a->score_stride, 0, 16 * sizeof *scores);
        kernels->add_products(scores, a->score_stride, query, stride, page + p % PAGE / 16 * (a->cached->key_bytes / 4),
                              !a->cache_f32, next - page, a->n_queries, (int)a->head_dim);
    }
}

// sums[i,d] = sum over the positions p that query i sees of scores[i,p] * value[p,d], for these columns d
static void mix_values(const Attention *a, Range columns) {
    Range seen = all_seen(a);
    size_t item_bytes = a->cache_f32 ? sizeof(float) : sizeof(uint16_t);
    for (int i = 0; i < a->n_queries; i++)
        memset(a->sums + (size_t)i * a->padded + columns.from, 0, (columns.to - columns.from) * sizeof(float));
    for (size_t p = seen.from, end; p < seen.to; p = end) {
        const unsigned char *page = values_at(a->cached, a->pages[p / PAGE], a->kv_head);
        const unsigned char *next = values_at(a->cached, next_page(a, p), a->kv_head);
        end = p / PAGE * PAGE + PAGE < seen.to ? p / PAGE * PAGE + PAGE : seen.to;
        int rows = end <= seen_to(a, 0) ? a->n_queries : a->group;  // where tokens end in this page, each by itself
        for (int i = 0; i < a->n_queries; i += rows) {
            size_t last = seen_to(a, i) < end ? seen_to(a, i) : end;
            const float *weights = a->scores + (size_t)i * a->score_stride + p;
            for (size_t d = columns.from; d < columns.to && p < last; d += 16)
                kernels->add_products(a->sums + (size_t)i * a->padded + d, a->padded, weights, a->score_stride,
                                      page + (d * PAGE + p % PAGE * 16) * item_bytes, !a->cache_f32, next - page, rows,
                                      (int)(last - p));
        }
    }
}

// out = sums / totals, for these columns
static void divide_sums(const Attention *a, Range columns) {
    for (int i = 0; i < a->n_queries; i++) {
        float *out = a->out + head_at(a, i);
        for (size_t d = columns.from; d < columns.to && d < a->head_dim; d++)
            out[d] = a->sums[(size_t)i * a->padded + d] / a->totals[i];
    }
}

// out = softmax(query . keys * scale) . values: the positions up to the token's own, weighted by how well they fit
static void attend_unit(const Attention *a) {
    Range seen = all_seen(a), columns = { 0, a->padded };
    for (int i = 0; i < a->n_queries; i++)
        memcpy(a->queries + (size_t)i * a->padded, a->query + head_at(a, i), a->head_dim * sizeof(float));
    score_keys(a, a->queries, a->padded, seen);
    for (int i = 0; i < a->n_queries; i++) {
        float *p = a->scores + (size_t)i * a->score_stride + seen.from, lane[16] = { 0 };
        size_t n = seen_to(a, i) - seen.from;
        float max = kernels->scale_scores(p, seen_from(a, i) - seen.from, n, a->scale, a->cap);
        kernels->exponentiate(lane, p, n, max);
        a->totals[i] = fold_lanes(lane);
    }
    mix_values(a, columns);
    divide_sums(a, columns);
}

// ---- The steps ----

// Cosine and sine of each position's rotation, by the usual angles and by the local ones.
typedef struct {
    double *turns;      // (2, R/2)  pair i turns theta^(-2i/R) from one position to the next, or less (chapter 11)
    float *cosine_sine; // (2, S, R/2, 2)
    int n, positions;   // those whose angles are there; S up to a multiple of 16
} Rotation;

typedef struct Experts Experts;  // what only models with experts need (chapter 11)

// The scratch buffers of a pass. Inputs of products begin at multiples of 32 numbers (strides), and zeros pad them.
typedef struct {
    Settings settings;
    size_t work;             // multiply-adds of a token: where they are few, one thread does them
    size_t deep_pages;       // a token that sees more pages of the cache is worth two more waits (attend_deep())
    const Row *rows;         // of this pass
    Sequence *sequences;
    int n;                   // rows
    int *wanted, n_wanted;   // (B)     those that want logits
    int *broken;             // (B)     0, or 1 + the number of layers after which the row's vector was not finite
    float *x, *out;          // (B, D)  each row's vector, which each layer adds to; what a block adds to it
    float *normed;           // (B or threads, D)
    float *query, *attended; // (B, H*K)
    float *key, *value;      // (B, G*K)
    float *gate, *up;        // (B, F), with experts (visits, F)
    float *logits;           // (LOGITS_AT_ONCE, V)
    float *scratch;          // (threads, scratch_stride)  for attention
    size_t x_stride, q_stride, kv_stride, ffn_stride, logits_stride, score_stride, scratch_stride;
    Row *room;               // (B)     where callers put a pass's rows together
    Inputs inputs;
    Rotation rotation;
    Experts *experts;        // or NULL
    void *arena;             // all of these
    size_t arena_bytes, batch_bytes;  // of all, and of what a larger batch makes larger
} Workspace;

// The angles of position p: pair i turns by p * turns[i].
static void make_angles(const Model *m, const Rotation *a, size_t p) {
    const Config *c = &m->config;
    int half = c->rope_dim / 2, n = c->local_theta > 0 ? 2 * half : half;
    for (int i = 0; i < n; i++) {
        float *to = a->cosine_sine + (i / half * (size_t)a->positions + p) * (size_t)c->rope_dim + i % half * 2;
        double size = i < half ? c->rope_magnitude : 1;
        to[0] = (float)(cos((double)p * a->turns[i]) * size);
        to[1] = (float)(sin((double)p * a->turns[i]) * size);
    }
}

// x[t] = the embedding's row of row t's token, times embedding_scale      x (n, x_stride)
static void embed(const Model *m, Workspace *w, size_t t) {
    const Tensor *e = &m->embedding;
    size_t row = (size_t)w->rows[t].token;
    for (size_t c = 0; c < n_blocks(e); c++) {
        float columns[32][16];
        kernels->dequantise(columns, e->type, e->tiles + row / 16 * row_tile_bytes(e), c);
        for (size_t i = 0; i < 32; i++)
            w->x[t * w->x_stride + c * 32 + i] = columns[i][row % 16] * m->config.embedding_scale;
    }
}

// Vectors on their way into products: x[t] or, unless `rows` is NULL, x[rows[t]].
typedef struct {
    const float *x;  // (n, stride)
    size_t stride;
    const int *rows;
    size_t cols;
    int n;
} Vectors;

// Rounds x, which is vector t of v (so no stride), and copies it where some products take floats.
static void put_input(const Inputs *in, Block *rounded, const float *x, const Vectors *v, size_t t) {
    size_t n = (size_t)v->n;
    if (in->rounds) kernels->round(rounded, x, 0, v->cols, n, (Range){ t, t + 1 });
    for (size_t c = 0; n > 1 && in->copies && c < v->cols; c += 32)
        memcpy(in->blocks[c / 32 * n + t], x + c, sizeof *in->blocks);
}

// Prepares n vectors as the input of products: norm(x) if there is a weight, else x. A single vector is computed by
// every thread for itself: cheaper than waiting for another. A norm also checks its row: if the sum of squares is not
// finite, the fault lies in the block before, or earlier in a model that has no such norms.
static Activations prepare(const Model *m, Workspace *w, const Vectors *v, const float *weight, const float *bias,
                           Step step, int l, Team *team) {
    const Inputs *in = &w->inputs;
    size_t n = (size_t)v->n, own = n == 1 ? (size_t)team->thread : 0;
    Block *rounded = in->rounded + own * in->widest / 32;
    const float *x = v->x;
    for (Range r = { 0, 1 }; n == 1 || take_chunk(team, n, 1, &r);) {
        for (size_t t = r.from; t < r.to; t++) {
            size_t row = v->rows ? (size_t)v->rows[t] : t;
            float *normed = w->normed + (t + own) * w->x_stride;
            x = v->x + row * v->stride;
            if (weight) {
                bool finite = kernels->normalise(normed, x, weight, bias, v->cols, m->config.norm_eps);
                if (!finite && (n > 1 || team->thread == 0) && !w->broken[row])
                    w->broken[row] = 1 + (step == FFN_NORM ? l + 1 : l);
                x = normed;
            }
            put_input(in, rounded, x, v, t);
        }
        if (n == 1) break;
    }
    if (n > 1) end_step(team, step, l);
    const void *blocks = n == 1 ? (const void *)x : (const void *)in->blocks;
    return (Activations){ blocks, in->rounds ? rounded : NULL, n, 0, n, 0 };
}

// x += residual_scale * out for some tokens and some rows of the matrix
static void add_out(const Model *m, Workspace *w, Range tokens, Range rows) {
    for (size_t t = tokens.from; t < tokens.to; t++) {
        float *x = w->x + t * w->x_stride, *out = w->out + t * w->x_stride;
        for (size_t r = rows.from; r < rows.to; r++) x[r] += out[r] * m->config.residual_scale;
    }
}

// Ends the step that has made `out`. With a norm for it, x += residual_scale * norm(out) comes only now, since it needs
// whole vectors.
static void end_block(const Model *m, Workspace *w, const float *norm, Step step, int l, Team *team) {
    size_t dim = (size_t)m->config.dim;
    end_step(team, step, l);
    if (!norm) return;
    for (Range r; take_chunk(team, (size_t)w->n, 1, &r);) {
        for (size_t t = r.from; t < r.to; t++) {
            float *out = w->out + t * w->x_stride;
            kernels->normalise(out, out, norm, NULL, dim, m->config.norm_eps);
        }
        add_out(m, w, r, (Range){ 0, dim });
    }
    end_step(team, (Step)(step + 1), l);
}

// x += residual_scale * (matrix * in + bias), the sum in brackets normalised first if there is a norm. A chunk of rows
// is made and added by the same thread.
static void add_to_stream(const Model *m, Workspace *w, const Tensor *matrix, const float *bias, const Activations *in,
                          const float *norm, Step step, int l, Team *team) {
    Product p = { w->out, w->x_stride, matrix, bias };
    for (Range chunk; take_chunk(team, n_row_tiles(matrix), tiles_together(matrix, in), &chunk);) {
        Range rows = multiply_part(&p, chunk, in);
        if (!norm) add_out(m, w, (Range){ 0, (size_t)w->n }, rows);
    }
    end_block(m, w, norm, step, l, team);
}

// The end of the rows from `first` on that one unit of attention takes: of one text, one after the other.
static int unit_end(const Workspace *w, int first, int most) {
    int end = first + 1;
    while (end < w->n && end - first < most && w->rows[end].sequence == w->rows[first].sequence) end++;
    return end;
}

// The unit of attention for n rows from `first` on and one key/value head, without its scratch buffers.
static Attention unit_of(const Model *m, const Workspace *w, int l, int first, int n, size_t kv_head) {
    const Layer *layer = &m->layers[l];
    size_t head_dim = (size_t)m->config.head_dim, group = (size_t)(layer->n_heads / layer->n_kv_heads);
    size_t at = (size_t)first * w->q_stride + kv_head * group * head_dim;
    const Sequence *s = &w->sequences[w->rows[first].sequence];
    return (Attention){
        .query = w->query + at, .out = w->attended + at, .stride = w->q_stride,
        .cached = &s->cache->layers[l], .pages = s->pages, .cache_f32 = s->cache->f32, .kv_head = kv_head,
        .group = (int)group, .n_queries = n * (int)group, .head_dim = head_dim, .padded = round_up(head_dim, 16),
        .position = (size_t)w->rows[first].position,
        .window = layer->window ? (size_t)layer->window : SIZE_MAX, .scale = m->config.attention_scale,
        .cap = m->config.attention_cap, .score_stride = w->score_stride,
    };
}

// Gives a unit its scratch buffers from `at` on; returns their end.
static float *place_scratch(Attention *a, float *at) {
    size_t n = (size_t)a->n_queries;
    a->queries = at;
    a->sums = a->queries + n * a->padded;
    a->scores = a->sums + n * a->padded;
    a->totals = a->scores + n * a->score_stride;
    return a->totals + n;
}

// attend() for few tokens far down their texts, whose heads alone would leave threads idle (chapter 11).
static void attend_deep(const Model *m, Workspace *w, int l, size_t n_pages, Team *team);

// attended = attention(query, cache)
static void attend(const Model *m, Workspace *w, int l, Team *team) {
    size_t n_kv_heads = (size_t)m->layers[l].n_kv_heads, group = (size_t)m->layers[l].n_heads / n_kv_heads;
    int most = group < QUERIES_TOGETHER ? (int)(QUERIES_TOGETHER / group) : 1;  // rows of a unit
    int n_runs = 0, last = 0;
    for (int t = 0; t < w->n; t++) last = w->rows[t].position > last ? w->rows[t].position : last;
    for (int t = 0; t < w->n; t = unit_end(w, t, most)) n_runs++;
    size_t n_threads = (size_t)team->threads, pages = (size_t)last / PAGE + 1;
    size_t n_queries = (size_t)w->n * group * n_kv_heads;
    Attention a = unit_of(m, w, l, 0, 1, 0);
    bool fits = n_queries * (2 * a.padded + a.score_stride + 1 + pages) <= n_threads * w->scratch_stride;
    bool is_deep = pages > w->deep_pages && a.window > w->deep_pages * PAGE;
    if (n_threads > 1 && fits && is_deep && (size_t)n_runs * n_kv_heads < 4 * n_threads) {  // too few to share well
        attend_deep(m, w, l, pages, team);
        return;
    }
    for (Range r; take_chunk(team, (size_t)n_runs * n_kv_heads, 1, &r);) {
        for (size_t i = r.from; i < r.to; i++) {
            int first = 0;
            for (size_t run = 0; run < i / n_kv_heads; run++) first = unit_end(w, first, most);
            a = unit_of(m, w, l, first, unit_end(w, first, most) - first, i % n_kv_heads);
            place_scratch(&a, w->scratch + (size_t)team->thread * w->scratch_stride);
            attend_unit(&a);
        }
    }
    end_step(team, ATTEND, l);
}

// Normalises queries and keys over all heads at once, in models that do so (chapter 11).
static void normalise_wide(const Model *m, Workspace *w, const Layer *layer, int l, Team *team);

// One query or key head of row t on its way: normalised, rotated, and a key put into the cache with its value.
static void turn_head(const Model *m, Workspace *w, const Layer *layer, int l, size_t t, size_t h) {
    const Config *c = &m->config;
    size_t head_dim = (size_t)c->head_dim, n_heads = (size_t)layer->n_heads, position = (size_t)w->rows[t].position;
    bool is_key = h >= n_heads;
    float *head = is_key ? w->key + t * w->kv_stride + (h - n_heads) * head_dim
                         : w->query + t * w->q_stride + h * head_dim;
    const float *norm = c->wide_head_norms ? NULL : is_key ? layer->key_norm : layer->query_norm;
    size_t angles = (layer->angles == LOCAL) * (size_t)w->rotation.positions + position;
    if (norm) kernels->normalise(head, head, norm, NULL, head_dim, c->norm_eps);
    if (layer->angles)
        kernels->rotate(head, w->rotation.cosine_sine + angles * (size_t)c->rope_dim, c->rope_dim, c->pairing);
    if (is_key)
        store(&w->sequences[w->rows[t].sequence], l, h - n_heads, head_dim, position, head, w->value + (head - w->key));
}

// What a token should know of those before it: x += W_o attention(W_q y, W_k y, W_v y), y = norm(x)
static void attention_block(const Model *m, Workspace *w, int l, Team *team) {
    const Layer *layer = &m->layers[l];
    size_t n_turned = (size_t)(layer->n_heads + layer->n_kv_heads);
    Vectors v = { w->x, w->x_stride, NULL, (size_t)m->config.dim, w->n };
    Activations input = prepare(m, w, &v, layer->attention_norm, layer->attention_norm_bias, ATTENTION_NORM, l, team);
    const Product products[] = {
        { w->query, w->q_stride, &layer->query, layer->query_bias },
        { w->key, w->kv_stride, &layer->key, layer->key_bias },
        { w->value, w->kv_stride, &layer->value, layer->value_bias },
    };
    multiply_all(products, 3, &input, team);
    end_step(team, QUERY_KEY_VALUE, l);

    if (m->config.wide_head_norms) normalise_wide(m, w, layer, l, team);
    for (Range r; take_chunk(team, (size_t)w->n * n_turned, 1, &r);)
        for (size_t i = r.from; i < r.to; i++) turn_head(m, w, layer, l, i / n_turned, i % n_turned);
    end_step(team, ROTATE, l);

    attend(m, w, l, team);
    v = (Vectors){ w->attended, w->q_stride, NULL, (size_t)layer->n_heads * (size_t)m->config.head_dim, w->n };
    input = prepare(m, w, &v, NULL, NULL, ROUND_ATTENDED, l, team);
    add_to_stream(m, w, &layer->attention_out, layer->attention_out_bias, &input, layer->attention_post_norm,
                  ATTENTION_OUT, l, team);
}

// gate = activation(W_gate x) * W_up x for some row tiles; in a layer with experts, of one of these
static void make_hidden(const Model *m, Workspace *w, const Layer *layer, Range tiles, const Activations *x) {
    float *gate = w->gate + x->first * w->ffn_stride, *up = w->up + x->first * w->ffn_stride;
    Range rows = multiply_part(&(Product){ gate, w->ffn_stride, &layer->gate, layer->gate_bias }, tiles, x);
    multiply_part(&(Product){ up, w->ffn_stride, &layer->up, layer->up_bias }, tiles, x);
    for (size_t t = 0, i = rows.from; t < x->some; t++, i += w->ffn_stride)
        kernels->activate(gate + i, up + i, rows.to - rows.from, (Activation)m->config.activation);
}

// feed_forward_block() for layers with experts (chapter 11).
static void experts_block(const Model *m, Workspace *w, int l, Team *team);

// What the model knows about a token: x += W_down (activation(W_gate norm(x)) * W_up norm(x))
static void feed_forward_block(const Model *m, Workspace *w, int l, Team *team) {
    const Layer *layer = &m->layers[l];
    Vectors v = { w->x, w->x_stride, NULL, (size_t)m->config.dim, w->n };
    Activations input = prepare(m, w, &v, layer->ffn_norm, layer->ffn_norm_bias, FFN_NORM, l, team);
    for (Range r; take_chunk(team, n_row_tiles(&layer->gate), tiles_together(&layer->gate, &input), &r);)
        make_hidden(m, w, layer, r, &input);
    end_step(team, GATE_UP, l);
    v = (Vectors){ w->gate, w->ffn_stride, NULL, (size_t)layer->ffn_dim, w->n };
    input = prepare(m, w, &v, NULL, NULL, ROUND_HIDDEN, l, team);
    add_to_stream(m, w, &layer->down, layer->down_bias, &input, layer->ffn_post_norm, DOWN, l, team);
}

typedef struct {
    const Model *model;
    Workspace *workspace;
    Range new_angles;     // positions that no pass has come to before
    int first, n_logits;  // make_logits(): of which rows
} Job;

static void pass_team(void *p, Team *team) {  // what each thread of a pass does
    const Job *job = p;
    const Model *m = job->model;
    Workspace *w = job->workspace;
    size_t n = (size_t)w->n, n_angles = job->new_angles.to - job->new_angles.from;
    for (Range r; take_chunk(team, n + n_angles, 1, &r);) {
        for (size_t i = r.from; i < r.to; i++) {
            if (i < n) embed(m, w, i);
            else make_angles(m, &w->rotation, job->new_angles.from + i - n);
        }
    }
    end_step(team, EMBED, 0);
    for (int l = 0; l < m->config.n_layers; l++) {
        attention_block(m, w, l, team);
        if (m->layers[l].n_experts) experts_block(m, w, l, team);
        else feed_forward_block(m, w, l, team);
    }
}

static void logits_team(void *p, Team *team) {  // likewise, of make_logits()
    const Job *job = p;
    const Model *m = job->model;
    Workspace *w = job->workspace;
    float scale = m->config.logit_scale, cap = m->config.logit_cap;
    Vectors v = { w->x, w->x_stride, w->wanted + job->first, (size_t)m->config.dim, job->n_logits };
    Activations input = prepare(m, w, &v, m->final_norm, m->final_norm_bias, FINAL_NORM, m->config.n_layers, team);
    Product head = { w->logits, w->logits_stride, &m->head, NULL };
    for (Range r; take_chunk(team, n_row_tiles(&m->head), tiles_together(&m->head, &input), &r);) {
        Range rows = multiply_part(&head, r, &input);
        for (size_t t = 0; t < input.n && (scale != 1 || cap > 0); t++)
            for (size_t i = t * w->logits_stride + rows.from, end = i + rows.to - rows.from; i < end; i++)
                w->logits[i] = cap > 0 ? cap_at(w->logits[i] * scale, cap) : w->logits[i] * scale;
    }
    end_step(team, HEAD, m->config.n_layers);
}

// Threads for n rows: a million multiply-adds take 0.1 ms; to wait for a second thread at each step takes as long.
static int threads_for(const Workspace *w, int n) {
    return times(w->work, (size_t)n) < 1000000 ? 1 : w->settings.threads;
}

// Takes the pass's tokens back out of their texts.
static void undo_rows(Workspace *w, int n) {
    for (int t = n - 1; t >= 0; t--) rewind_sequence(&w->sequences[w->rows[t].sequence], w->rows[t].position);
}

// False where a row's vector is not finite: no token may be chosen from what follows from it.
static bool check_rows(const Workspace *w, const int *rows, int n, Error *e) {
    for (int i = 0; i < n; i++) {
        int t = rows ? rows[i] : i, layers = w->broken[t] - 1, at = w->rows[t].position;
        if (layers == 0) return refuse(e, "the embedding at position %d is not finite or too large", at);
        if (layers > 0) return refuse(e, "layer %d at position %d is not finite or too large", layers, at);
    }
    return true;
}

// Sends n <= B rows through the model: tokens of any texts, each at the next position of its text. A row's bits depend
// on its text up to there and on nothing else. Leaves the vectors of the rows that want logits to make_logits(). If it
// fails, the texts are as they were.
static bool forward(const Model *m, Workspace *w, Sequence *sequences, const Row *rows, int n, Error *e) {
    w->rows = rows, w->sequences = sequences, w->n = n, w->n_wanted = 0;
    if (n > w->settings.batch) return fail(e, NO_ROOM, "%d rows, expected at most %d", n, w->settings.batch);
    Range new_angles = { (size_t)w->rotation.n, (size_t)w->rotation.n };
    for (int t = 0; t < n; t++) {
        Sequence *s = &sequences[rows[t].sequence];
        if (rows[t].position != s->n || s->n == s->cache->context) {
            undo_rows(w, t);
            return fail(e, NO_ROOM, "position %d of a text of %d in a context of %d", rows[t].position, s->n,
                        s->cache->context);
        }
        append_token(s, rows[t].token);
        if (rows[t].wants_logits) w->wanted[w->n_wanted++] = t;
        if ((size_t)s->n > new_angles.to) new_angles.to = (size_t)s->n;
    }
    memset(w->broken, 0, (size_t)n * sizeof *w->broken);
    w->rotation.n = (int)new_angles.to;
    Job job = { m, w, new_angles, 0, 0 };
    run_team(threads_for(w, n), n, pass_team, &job);
    if (check_rows(w, NULL, n, e)) return true;
    undo_rows(w, n);
    return false;
}

// Makes the logits of n <= LOGITS_AT_ONCE of the rows that wanted some in the last pass: from number `first` on.
//     logits (n, logits_stride)
static bool make_logits(const Model *m, Workspace *w, int first, int n, Error *e) {
    Job job = { m, w, { 0, 0 }, first, n };
    run_team(threads_for(w, n), 0, logits_team, &job);
    if (!check_rows(w, w->wanted + first, n, e)) return false;
    for (int i = 0; i < n; i++) {
        const float *logits = w->logits + (size_t)i * w->logits_stride;
        bool finite = true;
        for (int k = 0; k < m->config.n_tokens; k++) finite &= (bits_of_float(logits[k]) & 0x7fffffff) < 0x7f800000;
        if (!finite)
            return refuse(e, "the logits at position %d are not finite", w->rows[w->wanted[first + i]].position);
    }
    return true;
}

/* ==== 6. Choosing a token ===========================================================================================
   The logits become probabilities, and one token is drawn: always the likeliest (temperature 0), or by chance. Lower
   temperatures sharpen the distribution; top-k, top-p and min-p cut off its tail, where a token is wrong more often
   than surprising. The generator of random numbers and top-p are llama2.c's, so that its seeds give its texts here. */

typedef struct {
    float temperature;     // 0 = the likeliest token
    int top_k;             // 0 = off
    float top_p, min_p, typical, xtc, xtc_threshold;  // 0 = off, top_p 1 too
    uint64_t random;       // the generator's state, never 0
    bool from_clock;       // nobody has given a seed
    Candidate *candidates; // (V)
    struct Shaper *shaper; // what changes the logits before; NULL: nothing was asked for
} Sampler;

// A number in [0, 1): xorshift* (Marsaglia, "Xorshift RNGs"; Vigna, "An experimental exploration of ...").
static float flip_coin(uint64_t *state) {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    return (float)((*state * 0x2545F4914F6CDD1Du) >> 40) / 16777216.0f;
}

// The token with the highest logit; of equals, the lowest id.      logits (n)
static int likeliest(const float *logits, int n) {
    int best = 0;
    for (int i = 1; i < n; i++) best = logits[i] > logits[best] ? i : best;
    return best;
}

// p = softmax(logits / temperature), where max is the largest of these quotients      c, logits (n)
INLINE void make_probabilities(Candidate *c, const float *logits, int n, float temperature, float max) {
    float sum = 0.0f;
    for (int i = 0; i < n; i++) c[i] = (Candidate){ i, exponential(logits[i] / temperature - max) };
    for (int i = 0; i < n; i++) sum += c[i].p;  // in the order of the ids, as llama2.c does
    for (int i = 0; i < n; i++) c[i].p /= sum;
}

// Moves the candidates that may be chosen to the front of c, likeliest first, unless all n may. Returns how many they
// are; *sum: of their probabilities (chapter 11).
static size_t cut(Sampler *s, Candidate *c, size_t n, float *sum);

// The logits as penalties for repeats, biases and n-sigma change them (chapter 11).      ids (n_ids), logits (n)
static const float *shape_logits(const struct Shaper *h, const int *ids, int n_ids, const float *logits, int n);

// The next token of the text `ids`, drawn from softmax(logits / temperature) as the sampler says.      logits (n)
static int choose_token(Sampler *s, const int *ids, int n_ids, const float *logits, int n) {
    if (s->shaper) logits = shape_logits(s->shaper, ids, n_ids, logits, n);
    int best = likeliest(logits, n);  // also the answer where logit / temperature is too large for a float
    if (s->temperature < 1e-30f || !isfinite(logits[best] / s->temperature)) return best;
    Candidate *c = s->candidates;
    kernels->make_probabilities(c, logits, n, s->temperature, logits[best] / s->temperature);
    float coin = flip_coin(&s->random), running = 0.0f, sum = 1.0f;
    size_t n_left = cut(s, c, (size_t)n, &sum);
    for (size_t i = 0;; i++) {
        running += c[i].p;  // rounding may leave this below the coin to the end
        if (i + 1 == n_left || coin * sum < running) return c[i].p > 0 ? c[i].id : best;
    }
}

/* ==== 7. Generating =================================================================================================
   The loop around the forward pass: a token comes out, is printed, and goes in as the next row, until the model ends
   its text or there is no more room. Before it the prompt went through, B rows at a time (chapter 12). */

// Text on its way to stdout, which gets whole characters only: the bytes of one may come from several tokens.
typedef struct {
    char held[260];             // an incomplete character, or what may begin a stop text or <think>
    size_t n_held, thought;     // chat, --think hide: a state of chapter 12
    const struct Texts *stops;  // texts that end this one, or NULL
    Buffer *to; Error *error;   // where it goes in place of stdout, or NULL; what fails there (12a)
} Printer;

// Prints whole characters and keeps the bytes of an incomplete one. NULL ends the text: it prints these bytes too.
static const char *print_bytes(Printer *p, const char *bytes, size_t n);  // chapter 12

// Prints what a token adds to the text after the token before it. Returns the stop text that it completes, or NULL.
static const char *print_token(const Model *m, Printer *p, int before, int token);  // chapter 12

typedef enum { GO_ON, AT_END_TOKEN, AT_STOP_TEXT, AT_LIMIT, AT_CONTEXT, AT_INTERRUPT, AT_BROKEN_OUTPUT } Stop;

// A text that the model continues.
typedef struct {
    Sequence *sequence;
    Sampler *sampler;
    Printer printer;
    size_t limit, n_made, n_passes;  // new tokens at most, and so far; passes
    int last;                        // the token printed last; -1: none
    const char *stop_text;           // the one that has ended it, or NULL
} Continuation;

// Chooses the next token and prints it, unless it ends the text. GO_ON: the token has to go through the model.
static Stop next_token(const Model *m, Continuation *c, const float *logits) {
    if (c->n_made == c->limit) return AT_LIMIT;
    int token = choose_token(c->sampler, c->sequence->ids, c->sequence->n, logits, m->config.n_tokens);
    if (interrupted) return AT_INTERRUPT;
    if (is_end_token(&m->tokenizer, token)) return AT_END_TOKEN;
    c->stop_text = print_token(m, &c->printer, c->last, token);
    fflush(stdout);
    c->last = token;
    c->n_made++;
    if (c->stop_text || c->n_made == c->limit) return c->stop_text ? AT_STOP_TEXT : AT_LIMIT;
    return ferror(stdout) ? AT_BROKEN_OUTPUT : c->sequence->n == c->sequence->cache->context ? AT_CONTEXT : GO_ON;
}

// Continues a text, whose last token has left its logits, until it stops. Unless an end token or Ctrl-C stopped it, the
// token printed last is not in the cache.
static bool generate(const Model *m, Workspace *w, Continuation *c, Stop *why, Error *e) {
    bool ok = true;
    while (ok && (*why = next_token(m, c, w->logits)) == GO_ON) {
        Row row = { c->last, c->sequence->n, 0, true };
        ok = forward(m, w, c->sequence, &row, 1, e) && make_logits(m, w, 0, 1, e);
        c->n_passes++;
    }
    print_bytes(&c->printer, NULL, 0);
    return ok;
}

/* ==== 8. Number formats, and packing them into tiles ================================================================
   The types of tiles, the products of quantised weights in plain C, and how the formats that files hold are packed into
   tiles. Packing changes no weight: a tile holds the file's own integers and scales, in another order.

   THE ARITHMETIC OF QUANTISED WEIGHTS.  A token's activations x are rounded to 8 bits in blocks of 32 columns:

       max = the largest |x|; the floats' bits are compared as integers: NaN > infinity > every number, on every CPU
       s = max / 127,  q = x * (127 / max) rounded to nearest even
       max < 2^-100:  s = 0, q = 0      max not finite:  s = NaN, q = 0, so that each output is NaN

   A weight is scale * w, or scale * w + min if its type has minima; w is a small integer. An output y begins at 0. The
   columns that share a scale, 32 or 16, are added together, from left to right:

       y = fmaf(scale * s, (float)(sum of w * q), y)
       y = fmaf(min, s * (float)(sum of q), y)          if there are minima

   Sums of integers are exact, so their order is free. Every kernel gives the same bits where results are finite; of a
   NaN it is only promised to be one. */

// The weights of IQ4_NL and IQ4_XS, which lie closer together near 0; and twice those of MXFP4, floats of 4 bits.
static const int8_t curve[16] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
static const int8_t small_floats[16] = { 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12 };

// To add a type: its name in the enum of chapter 3, a row here, a row of source_types for the files that hold it, and
// its case in add_tiles(), without which nothing compiles. Native files hold the type's number: the name goes
// last, before N_TYPES. A new header also needs a branch in unpack_scales() and one in broken_row().
static const TypeInfo types[N_TYPES] = {
    [F32] = { "f32", .cols = 32, .per_scale = 32, .bits = 32 },
    [F16] = { "f16", .cols = 32, .per_scale = 32, .bits = 16 },
    [BF16] = { "bf16", .cols = 32, .per_scale = 32, .bits = 16 },
    [Q8] = { "q8", .cols = 32, .per_scale = 32, .header = 32, .bits = 8 },  // header: f16 scale[16]
    [Q8F] = { "q8f", .cols = 32, .per_scale = 32, .header = 64, .bits = 8 },  // f32 scale[16]
    [Q4] = { "q4", .cols = 32, .per_scale = 32, .header = 32, .bits = 4, .offset = 8 },
    [Q4M] = { "q4m", .cols = 32, .per_scale = 32, .header = 64, .bits = 4, .has_min = true },  // f16 scale[16], min[16]
    [Q5] = { "q5", .cols = 32, .per_scale = 32, .header = 32, .bits = 5, .offset = 16 },
    [Q5M] = { "q5m", .cols = 32, .per_scale = 32, .header = 64, .bits = 5, .has_min = true },
    // Headers of 256 columns: f16 d[16], f16 dmin[16] if there are minima, then int8 factor[16] of d for each 16 or 32
    // columns, then likewise of dmin; Q2_K has both in a byte, that of d in the low half. A scale is d * factor, a
    // minimum -dmin * factor: both are exact in f32.
    [Q2K] = { "q2k", .cols = 256, .per_scale = 16, .header = 320, .bits = 2, .has_min = true },
    [Q3K] = { "q3k", .cols = 256, .per_scale = 16, .header = 288, .bits = 3, .offset = 4 },
    [Q4K] = { "q4k", .cols = 256, .per_scale = 32, .header = 320, .bits = 4, .has_min = true },
    [Q5K] = { "q5k", .cols = 256, .per_scale = 32, .header = 320, .bits = 5, .has_min = true },
    [Q6K] = { "q6k", .cols = 256, .per_scale = 16, .header = 288, .bits = 6, .offset = 32 },
    [IQ4NL] = { "iq4nl", .cols = 32, .per_scale = 32, .header = 32, .bits = 4, .values = curve },
    [IQ4XS] = { "iq4xs", .cols = 256, .per_scale = 32, .header = 160, .bits = 4, .values = curve },
    [MXFP4] = { "mxfp4", .cols = 32, .per_scale = 32, .header = 16, .bits = 4, .values = small_floats },  // e[16]
};

INLINE void round_block(Block *b, const float *x) {
    int32_t max = 0, q[32], sum[3] = { 0 };
    for (int i = 0; i < 32; i++) {
        int32_t size = (int32_t)(bits_of_float(x[i]) & 0x7fffffff);
        max = size > max ? size : max;
    }
    float largest = float_of_bits((uint32_t)max);
    bool finite = max < 0x7f800000, tiny = largest < 0x1p-100f;
    float inverse = finite && !tiny ? 127.0f / largest : 0.0f;
    for (int i = 0; i < 32; i++)  // the integer is in the low 22 bits of the sum
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

// Rounds some of n vectors.      x (n, stride)  blocks (cols/32, n)
INLINE void round_vectors(Block *blocks, const float *x, size_t stride, size_t cols, size_t n, Range tokens) {
    for (size_t t = tokens.from; t < tokens.to; t++) {
        for (size_t c = 0; c < cols; c += 32) round_block(&blocks[c / 32 * n + t], x + t * stride + c);
    }
}

// Rounds to nearest even. Below 2^-14, f16 has steps of 2^-24, as floats have from 0.5 to 1: adding 0.5f rounds so.
// Above, the last 13 bits go: adding half a step, less one bit if the kept ones are even, carries when it should.
INLINE uint16_t half_of_float(float x) {
    uint32_t u = bits_of_float(x), sign = u >> 16 & 0x8000, body = u & 0x7fffffff;
    uint32_t small = bits_of_float(float_of_bits(body) + 0.5f) - 0x3f000000;
    uint32_t normal = (body - 0x38000000 + 0xfff + (body >> 13 & 1)) >> 13;
    uint32_t half = body < 0x38800000 ? small : normal;
    half = body >= 0x477ff000 ? 0x7c00 : half;  // 65520 and more
    half = body > 0x7f800000 ? 0x7e00 : half;   // NaN
    return (uint16_t)(sign | half);
}

INLINE void narrow_floats(uint16_t *to, const float *from, size_t n) {
    for (size_t i = 0; i < n; i++) to[i] = half_of_float(from[i]);
}

INLINE float float_of_bfloat(uint16_t b) { return float_of_bits((uint32_t)b << 16); }

// ---- Unpacking tiles ----

INLINE uint32_t load_four(const void *p) {
    uint32_t x;
    memcpy(&x, p, sizeof x);
    return x;
}

typedef void LookUp(uint8_t *w, size_t n, const int8_t values[16]);  // w = values[w], in place

INLINE void look_up_bytes(uint8_t *w, size_t n, const int8_t values[16]) {
    for (size_t i = 0; i < n; i++) w[i] = (uint8_t)values[w[i]];
}

// `bits` bits of a byte, from bit `from` on, moved to bit `to`.
INLINE int move_bits(uint8_t byte, int bits, int from, int to) {
    return (from > to ? byte >> (from - to) : byte << (to - from)) & ((1 << bits) - 1) << to;
}

// The stored q of 32 columns as bytes: four columns of the 16 rows in each w[g].
INLINE void unpack_planes_of(uint8_t w[8][64], int bits, const uint8_t *plane) {
    const uint8_t *pairs = plane + (bits & 4 ? 256 : 0), *singles = pairs + (bits & 2 ? 128 : 0);
    int low = bits & 4, lower = bits & 6;  // bits of a weight below the pair, below the single one
#pragma GCC unroll 8
    for (int g = 0; g < 8; g++) {
        for (int j = 0; j < 64; j++) {
            int x = 0;
            if (bits & 4) x = move_bits(plane[64 * (g % 4) + j], 4, g / 4 * 4, 0);
            if (bits & 2) x |= move_bits(pairs[64 * (g / 4) + j], 2, g % 4 * 2, low);
            if (bits & 1) x |= move_bits(singles[j], 1, g, lower);
            w[g][j] = (uint8_t)x;
        }
    }
}

INLINE void unpack_planes(uint8_t w[8][64], int bits, const uint8_t *plane) {
#define PLANES(bits) case bits: unpack_planes_of(w, bits, plane); break;  // the loops know it
    switch (bits) { PLANES(1) PLANES(2) PLANES(3) PLANES(4) PLANES(5) PLANES(6) PLANES(7) }
}

typedef void ScaleSixteen(float y[16], const float x[16], const int8_t factor[16]);  // y = x * factor

INLINE void scale_floats(float y[16], const float x[16], const int8_t factor[16]) {
    for (int i = 0; i < 16; i++) y[i] = x[i] * (float)factor[i];
}

// dots[row] = the dot product of a row's bytes with the activations, for groups `from` to `to` of four columns
typedef void Dot(int32_t dots[16], const uint8_t w[8][64], Type type, const int8_t *q, int from, int to);

INLINE void dot_bytes(int32_t dots[16], const uint8_t w[8][64], Type type, const int8_t *q, int from, int to) {
    (void)type;
    memset(dots, 0, 16 * sizeof *dots);
    for (int g = from; g < to; g++) {
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 4; c++) dots[r] += (int8_t)w[g][4 * r + c] * q[4 * g + c];
    }
}

// What an instruction set does in its own way; these plain functions define it. The dot product takes weights of up to
// `unsigned_bits` bits as unsigned bytes, weight + offset; others as signed bytes.
typedef struct {
    int unsigned_bits;
    Dot *dot;
    Widen *widen;
    LookUp *look_up;
    ScaleSixteen *scale_sixteen;
} Leaves;
#define PLAIN_LEAVES 0, dot_bytes, widen_floats, look_up_bytes, scale_floats

// The tile that a block is in.
INLINE const unsigned char *tile_of(Type type, const unsigned char *tiles, size_t block) {
    return tiles + block * 32 / (size_t)types[type].cols * tile_bytes(type);
}

// 32 columns of a row tile with a byte for each weight: four columns of the 16 rows in each w. The rows' scales and
// minima: [0] of all columns, or [0] of the first 16 and [1] of the last 16.
typedef struct {
    _Alignas(64) uint8_t w[8][64];
    float scale[2][16], min[2][16];
} ByteBlock;

INLINE void unpack_scales(ByteBlock *u, Type type, const unsigned char *tile, size_t block, Leaves leaves) {
    const TypeInfo *i = &types[type];
    int part = (int)(block % ((size_t)i->cols / 32));  // which 32 of the tile's columns
    const uint8_t *factor = tile + (i->has_min ? 64 : 32) + part * (BLOCK / i->per_scale) * 16;
    float d[16], dmin[16];
    if (type == Q8F) memcpy(d, tile, sizeof d);
    else if (type == MXFP4)  // 2^(e - 127) / 2, since the values are doubled
        for (int r = 0; r < 16; r++) d[r] = float_of_bits(tile[r] < 2 ? 0x200000u << tile[r] : (tile[r] - 1u) << 23);
    else leaves.widen(d, (const void *)tile, 16);
    if (i->has_min) leaves.widen(dmin, (const void *)(tile + 32), 16);
    if (i->cols == 32) {
        memcpy(u->scale[0], d, sizeof d);
        if (i->has_min) memcpy(u->min[0], dmin, sizeof dmin);
        return;
    }
    for (int h = 0; h < BLOCK / i->per_scale; h++, factor += 16) {
        _Alignas(16) int8_t factors[2][16];
        memcpy(factors[0], factor, 16);
        if (i->has_min && type != Q2K) memcpy(factors[1], factor + 128, 16);
#pragma GCC unroll 1  // gcc 12 makes no SIMD of what it has unrolled
        for (int r = 0; r < 16 && type == Q2K; r++) {
            factors[0][r] = factor[r] & 15;
            factors[1][r] = (int8_t)(factor[r] >> 4);
        }
        leaves.scale_sixteen(u->scale[h], d, factors[0]);
        if (!i->has_min) continue;
        leaves.scale_sixteen(u->min[h], dmin, factors[1]);
        for (int r = 0; r < 16; r++) u->min[h][r] = -u->min[h][r];
    }
}

// A weight's byte minus the weight.
INLINE int byte_offset(Type type, int unsigned_bits) {
    int bits = types[type].values ? 8 : types[type].bits;
    return bits > unsigned_bits ? 0 : bits == 8 ? 128 : types[type].offset;
}

// The bytes of a block, in C that the compiler makes SIMD of. Returns u->w, or the tile's own bytes if they will do.
// Prefetches the next block's weights in order, because the loads are not: processors then see what will be read next,
// and memory is read 1.5 times as fast.
INLINE const void *unpack_bytes_of(ByteBlock *u, Type type, const unsigned char *tiles, size_t block, Leaves leaves) {
    const TypeInfo *i = &types[type];
    const unsigned char *tile = tile_of(type, tiles, block);
    const uint8_t *from = tile + i->header + block % ((size_t)i->cols / 32) * 64 * (size_t)i->bits;
    int change = byte_offset(type, leaves.unsigned_bits) - i->offset;
    uint8_t *w = u->w[0];
    const uint8_t *q = i->bits == 8 ? from : w;
    for (int line = 0; line < i->bits && i->bits < 8; line++) __builtin_prefetch(from + 64 * line + 256);
    unpack_scales(u, type, tile, block, leaves);
    if (i->bits < 8) unpack_planes(u->w, i->bits, from);
    int8_t values[16];
    for (int j = 0; i->values && j < 16; j++) values[j] = (int8_t)(i->values[j] + change);
    if (i->values) leaves.look_up(w, 512, values);
    for (int j = 0; change && !i->values && j < 512; j++) w[j] = (uint8_t)(q[j] + change);
    return change ? w : q;
}

// n weights of a tile of floats.
INLINE void load_weights(float *w, Type type, const void *from, size_t n, Widen *widen) {
    const uint16_t *half = from;
    if (type == F32) memcpy(w, from, n * sizeof *w);
    else if (type == F16) widen(w, half, n);
    else for (size_t i = 0; i < n; i++) w[i] = float_of_bfloat(half[i]);
}

// The weights of 32 columns in float. The operations, and their order, are those of gguf-py.
INLINE void dequantise(float w[32][16], Type type, const unsigned char *tiles, size_t block, Widen *widen) {
    ByteBlock u;
    if (!is_quantised(type)) {
        load_weights(w[0], type, tile_of(type, tiles, block), 512, widen);
        return;
    }
    const int8_t (*q)[64] = unpack_bytes_of(&u, type, tiles, block, (Leaves){ PLAIN_LEAVES });
    for (int g = 0; g < 8; g++) {
        for (int r = 0; r < 16; r++)
            for (int c = 0; c < 4; c++) w[4 * g + c][r] = q[g][4 * r + c];
    }
    for (int c = 0; c < 32; c++) {
        int half = c / types[type].per_scale;
        for (int r = 0; r < 16; r++) w[c][r] *= u.scale[half][r];
        for (int r = 0; types[type].has_min && r < 16; r++) w[c][r] += u.min[half][r];
    }
}

// ---- Products ----

// -offset * the sum of a block's (or a half's) q, made from the block's own multiple of that sum.
INLINE int32_t offset_product(const Block *x, int part, int offset) {
    if (!part && offset == 128) return x->minus_128_sum;
    int factor = part ? 32 : 8, common = (offset | factor) & -(offset | factor);  // the powers of 2 that both have
    int32_t product = part ? x->minus_32_sum[part - 1] : x->minus_8_sum;
    return (product >> __builtin_ctz((unsigned)(factor / common))) * (offset / common);
}

// Adds the products of quantised tiles for n tokens, block after block.      x (n_blocks, n_all)
INLINE void add_tiles_of_type(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks, const Block *x,
                              size_t n_all, int n, Leaves leaves) {
    int halves = BLOCK / types[type].per_scale, offset = byte_offset(type, leaves.unsigned_bits);
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

// The same. The compiler knows the type.
INLINE void add_tiles(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks, const Block *x,
                      size_t n_all, int n, Leaves leaves) {
#define FOR_TYPE(type) case type: add_tiles_of_type(sum, type, tiles, n_blocks, x, n_all, n, leaves); break;
    switch (type) {
        FOR_TYPE(Q8) FOR_TYPE(Q8F) FOR_TYPE(Q4) FOR_TYPE(Q4M) FOR_TYPE(Q5) FOR_TYPE(Q5M) FOR_TYPE(Q2K) FOR_TYPE(Q3K)
        FOR_TYPE(Q4K) FOR_TYPE(Q5K) FOR_TYPE(Q6K) FOR_TYPE(IQ4NL) FOR_TYPE(IQ4XS) FOR_TYPE(MXFP4)
    case F32: case F16: case BF16: case N_TYPES: break;  // not quantised
    }
}

// y = w x for one token and the rows of n row tiles, whose sums are made side by side
INLINE void multiply_some(float *y, Type type, const unsigned char *tiles, size_t cols, const float *x, size_t n,
                          Widen *widen) {
    _Alignas(64) float sum[4][16] = { { 0 } }, w[16];
    size_t col_bytes = 2 * (size_t)types[type].bits;
    for (size_t c = 0; c < cols; c++) {
        for (size_t i = 0; i < n; i++) {
            const void *from = tiles + (i * cols + c) * col_bytes;
            const float *v = type == F32 ? from : w;  // no copy: its narrow stores would delay a wide load
            if (type != F32) load_weights(w, type, from, 16, widen);
#pragma GCC unroll 1  // gcc 12 makes no SIMD of what it has unrolled
            for (int r = 0; r < 16; r++) sum[i][r] = fmaf(v[r], x[c], sum[i][r]);
        }
    }
    memcpy(y, sum, n * sizeof *sum);
}

// y = w x for one token and weights in float: the tiles of 16 rows are one list of columns
INLINE void multiply_vector(float *y, Type type, const unsigned char *tiles, size_t n_rows, size_t cols, const float *x,
                            Widen *widen) {
    size_t row_bytes = cols * 2 * (size_t)types[type].bits, row = 0;
    for (; row + 4 <= n_rows; row += 4) multiply_some(y + row * 16, type, tiles + row * row_bytes, cols, x, 4, widen);
    for (; row < n_rows; row++) multiply_some(y + row * 16, type, tiles + row * row_bytes, cols, x, 1, widen);
}

// Compiles a set of kernels for the instruction set that `target` names, with functions and leaves that may be its own.
#define MAKE_KERNELS(set, target, name, add_products_of, narrow_of, peak_of, ...)                                      \
    target void set##_add_tiles(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks,               \
                                const Block *x, size_t n_all, int n) {                                                 \
        add_tiles(sum, type, tiles, n_blocks, x, n_all, n, (Leaves){ __VA_ARGS__ });                                   \
    }                                                                                                                  \
    target void set##_add_products(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b,          \
                                   bool half, ptrdiff_t ahead, int m, int depth) {                                     \
        if (half) add_products_of(c, c_stride, a, a_stride, b, true, ahead, m, depth);                                 \
        else add_products_of(c, c_stride, a, a_stride, b, false, ahead, m, depth);                                     \
    }                                                                                                                  \
    target void set##_multiply_vector(float *y, Type type, const unsigned char *tiles, size_t n_rows, size_t cols,     \
                                      const float *x) {                                                                \
        Widen *widen = (Leaves){ __VA_ARGS__ }.widen;                                                                  \
        if (type == F32) multiply_vector(y, F32, tiles, n_rows, cols, x, widen);                                       \
        else if (type == F16) multiply_vector(y, F16, tiles, n_rows, cols, x, widen);                                  \
        else multiply_vector(y, BF16, tiles, n_rows, cols, x, widen);                                                  \
    }                                                                                                                  \
    target void set##_dequantise(float w[32][16], Type type, const unsigned char *tiles, size_t block) {               \
        dequantise(w, type, tiles, block, (Leaves){ __VA_ARGS__ }.widen);                                              \
    }                                                                                                                  \
    target void set##_narrow(uint16_t *to, const float *from, size_t n) { narrow_of(to, from, n); }                    \
    target void set##_round(Block *blocks, const float *x, size_t stride, size_t cols, size_t n, Range r) {            \
        round_vectors(blocks, x, stride, cols, n, r);                                                                  \
    }                                                                                                                  \
    target bool set##_normalise(float *y, const float *x, const float *w, const float *bias, size_t dim, float eps) {  \
        return apply_norm(y, x, w, bias, dim, eps);                                                                    \
    }                                                                                                                  \
    target void set##_rotate(float *h, const float *angle, int n, Pairing p) { rotate(h, angle, n, p); }               \
    target float set##_scale_scores(float *p, size_t from, size_t n, float scale, float cap) {                         \
        return scale_scores(p, from, n, scale, cap);                                                                   \
    }                                                                                                                  \
    target void set##_exponentiate(float lane[16], float *p, size_t n, float max) { exponentiate(lane, p, n, max); }   \
    target void set##_activate(float *gate, const float *up, size_t n, Activation a) { activate(gate, up, n, a); }     \
    target void set##_make_probabilities(Candidate *c, const float *logits, int n, float temperature, float max) {     \
        make_probabilities(c, logits, n, temperature, max);                                                            \
    }                                                                                                                  \
    target void set##_read(const uint64_t *memory, size_t n) { read_memory(memory, n); }                               \
    static const Kernels set = { name, set##_add_tiles, set##_add_products, set##_multiply_vector, set##_dequantise,   \
                                 set##_narrow, set##_round, set##_normalise, set##_rotate, set##_scale_scores,         \
                                 set##_exponentiate, set##_activate, set##_make_probabilities, peak_of, set##_read };

// Reads n numbers; the sum keeps the compiler from leaving that out.
INLINE void read_memory(const uint64_t *memory, size_t n) {
    uint64_t sum = 0;
    for (size_t i = 0; i < n; i++) sum += memory[i];
    volatile uint64_t kept = sum;
    (void)kept;
}

// One multiply-add at a time, in float, whatever is asked for.
static double peak_scalar(bool int8, size_t rounds) {
    volatile float sum = int8;
    for (size_t i = 0; i < rounds; i++) sum = fmaf(sum, 0.5f, 0.5f);
    return 2.0 * (double)rounds;
}

MAKE_KERNELS(scalar, static, "scalar", add_products, narrow_floats, peak_scalar, PLAIN_LEAVES)

// ---- Packing ----

enum { NAME_BYTES = 64, VECTOR = 255 };  // a name and its 0, as long as GGUF allows; a value of Source.tiles

// A tensor in a file: one or more matrices, of rows of blocks. Native files have the members before `type` as a record.
typedef struct SourceType SourceType;
typedef struct Source {
    char name[NAME_BYTES];
    uint32_t tiles, rows, cols, n;       // tiles of this Type, or a VECTOR, which is one row; a matrix for each expert
    uint64_t at, n_bytes;                // of the data: the offset that the file states, and the length
    const SourceType *type;              // not of native files: NULL
    const unsigned char *data, *scales;  // scales: of llama2.c's int8 groups, which has them apart; else NULL
    size_t group, rows_used;             // weights that share one of those; rows that belong to tensors of the model
} Source;

// Packs `rows` <= 16 rows from row `row` on, their columns from `col` on. A tile that they do not fill comes as zeros.
typedef void PackTile(void *tile, const Source *s, size_t row, size_t rows, size_t col);

struct SourceType {
    const char *name;
    int gguf_id;  // -1: GGUF has no such type
    size_t block_cols, block_bytes;
    Type tile;
    PackTile *pack;
    // Offsets in a block of quantised weights: of the f16 scale, which the minimum follows if there is one; of the
    // factors of blocks of 256; of each weight's low bits (8, 4 or 2) and high bits (the 1 or 2 above). The first `run`
    // weights have their low (or high) bits at the bottom of a byte each, the next `run` above those, until the bytes
    // are full; then come further bytes. A run is a multiple of 4, or 1 for single bits.
    int scale_at, scales_at;
    struct Plane { unsigned at, run; } low, high;
};

static size_t source_row_bytes(const Source *s) {
    return times(s->cols / s->type->block_cols, s->type->block_bytes);
}

// Bytes of a matrix (without scales that lie apart).
static size_t source_bytes(const Source *s) {
    return times(s->rows, source_row_bytes(s));
}

static const unsigned char *source_block(const Source *s, size_t row, size_t col) {
    return s->data + row * source_row_bytes(s) + col / s->type->block_cols * s->type->block_bytes;
}

// f32, or f16 and bf16: these two rows at a time, with half as many stores.
static void pack_floats(void *tile, const Source *s, size_t row, size_t rows, size_t col) {
    static const uint16_t zeros[32];
    size_t cols = s->cols - col < 32 ? s->cols - col : 32;
    bool wide = s->type->tile == F32;
    for (size_t r = 0; r < rows; r += wide ? 1 : 2) {
        const void *from = source_block(s, row + r, col);
        const uint16_t *a = from, *b = r + 1 < rows ? a + s->cols : zeros;
        for (size_t c = 0; wide && c < cols; c++) memcpy((float *)tile + 16 * c + r, a + 2 * c, 4);
        for (size_t c = 0; !wide && c < cols; c++) {
            uint32_t pair = a[c] | (uint32_t)b[c] << 16;
            memcpy((uint16_t *)tile + 16 * c + r, &pair, sizeof pair);
        }
    }
}

// Packs the low or high bits of 32 columns, from column `first` on, into a plane of the tile, in which four columns are
// neighbours.      to: the plane  from: those bits of the first row      The sources' layouts: ggml-quants.c
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

// The same. The compiler knows bits and run of the types below: otherwise divisions would take most of the time.
static void pack_plane(unsigned char *to, const unsigned char *from, size_t row_bytes, size_t rows, unsigned bits,
                       unsigned run, unsigned first) {
#define WITH(b, r) if (bits == b && run == r) { pack_plane_by(to, from, row_bytes, rows, b, r, first); return; }
    WITH(8, 32) WITH(4, 16) WITH(4, 32) WITH(4, 64) WITH(2, 32) WITH(1, 32) WITH(1, 1)
    pack_plane_by(to, from, row_bytes, rows, bits, run, first);
}

// Factor i of a row of 256 columns, as a tile has it. Q4_K and Q5_K have 6 bits for each factor, 8 of the scale and 8
// of the minimum; the upper two of each last four stand apart. Q3_K and IQ4_XS have 6 bits for factor + 32.
static uint8_t factor_of(Type type, const unsigned char *s, int i) {
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
    uint8_t(*factors)[16] = (void *)(scales + (info->has_min ? 32 : 16)), *to = (uint8_t *)tile + info->header;
    for (size_t r = 0; r < rows; r++, from += row_bytes) {
        if (t->tile == MXFP4) ((uint8_t *)tile)[r] = from[0];
        else memcpy(&scales[r], from + t->scale_at, 2);
        if (info->has_min) memcpy(&scales[16 + r], from + t->scale_at + 2, 2);
        for (int i = 0; factors[i] < to; i++) factors[i][r] = factor_of(t->tile, from + t->scales_at, i);
    }
    for (unsigned c = 0; c < (unsigned)info->cols; c += 32) {
        for (unsigned bits = 8; bits; bits /= 2) {
            const struct Plane *plane = (unsigned)info->bits < 2 * bits ? &t->low : &t->high;
            if (!((unsigned)info->bits & bits)) continue;
            pack_plane(to, block + plane->at, row_bytes, rows, bits, plane->run, c);
            to += 64 * bits;
        }
    }
}

// llama2.c's version 2: all int8 weights of a matrix, then an f32 scale for each group of them.
static void pack_groups(void *tile, const Source *s, size_t row, size_t rows, size_t col) {
    for (size_t r = 0; r < rows; r++) {
        size_t i = (row + r) * s->cols + col;
        memcpy((char *)tile + 4 * r, s->scales + i / s->group * 4, 4);
        for (size_t g = 0; g < 8; g++) memcpy((char *)tile + 64 + 64 * g + 4 * r, s->data + i + 4 * g, 4);
    }
}

// The formats that files may hold: name, number in GGUF, columns and bytes of a block, type of tile, what packs it, and
// where a block has its parts. To add one: a row at the end, and a function above if pack_blocks() does not fit. Q5_K:
//     | d, dmin | 12 bytes: factors of both | 32 bytes: bit 4 of each weight | 128 bytes: bits 0 to 3 |
//     0         4                           16                               48                       176
enum { SOURCE_F32, SOURCE_GROUPS };  // those that chapter 10 names
static const SourceType source_types[] = {
    [SOURCE_F32] = { "F32", 0, 1, 4, F32, .pack = pack_floats },
    [SOURCE_GROUPS] = { "int8 groups", -1, 32, 32, Q8F, .pack = pack_groups },  // llama2.c's
    { "F16", 1, 1, 2, F16, .pack = pack_floats },
    { "BF16", 30, 1, 2, BF16, .pack = pack_floats },
    { "Q8_0", 8, 32, 34, Q8, pack_blocks, .scale_at = 0, .low = { 2, 32 } },
    { "Q4_0", 2, 32, 18, Q4, pack_blocks, .scale_at = 0, .low = { 2, 16 } },
    { "Q4_1", 3, 32, 20, Q4M, pack_blocks, .scale_at = 0, .low = { 4, 16 } },
    { "Q5_0", 6, 32, 22, Q5, pack_blocks, .scale_at = 0, .low = { 6, 16 }, .high = { 2, 1 } },
    { "Q5_1", 7, 32, 24, Q5M, pack_blocks, .scale_at = 0, .low = { 8, 16 }, .high = { 4, 1 } },
    { "Q2_K", 10, 256, 84, Q2K, pack_blocks, .scale_at = 80, .scales_at = 0, .low = { 16, 32 } },
    { "Q3_K", 11, 256, 110, Q3K, pack_blocks, .scale_at = 108, .scales_at = 96, .low = { 32, 32 }, .high = { 0, 32 } },
    { "Q4_K", 12, 256, 144, Q4K, pack_blocks, .scale_at = 0, .scales_at = 4, .low = { 16, 32 } },
    { "Q5_K", 13, 256, 176, Q5K, pack_blocks, .scale_at = 0, .scales_at = 4, .low = { 48, 32 }, .high = { 16, 32 } },
    { "Q6_K", 14, 256, 210, Q6K, pack_blocks, .scale_at = 208, .scales_at = 192, .low.run = 64, .high = { 128, 32 } },
    { "IQ4_NL", 20, 32, 18, IQ4NL, pack_blocks, .scale_at = 0, .low = { 2, 16 } },
    { "IQ4_XS", 23, 256, 136, IQ4XS, pack_blocks, .scale_at = 0, .scales_at = 2, .low = { 8, 16 } },
    { "MXFP4", 39, 32, 17, MXFP4, pack_blocks, .scale_at = 0, .low = { 1, 16 } },
};
enum { N_SOURCE_TYPES = sizeof source_types / sizeof *source_types };

// Makes row tiles `range` of a matrix from its source.      tiles: the first of them
static void pack_rows(unsigned char *tiles, const Source *s, Range range) {
    size_t tile_cols = (size_t)types[s->type->tile].cols, n_tiles = round_up(s->cols, tile_cols) / tile_cols;
    size_t n_bytes = tile_bytes(s->type->tile);
    for (size_t i = range.from; i < range.to; i++) {
        size_t row = i * TILE_ROWS, rows = s->rows - row < TILE_ROWS ? s->rows - row : TILE_ROWS;
        for (size_t c = 0; c < n_tiles; c++) {
            unsigned char *tile = tiles + ((i - range.from) * n_tiles + c) * n_bytes;
            if (rows < TILE_ROWS || (c + 1) * tile_cols > s->cols) memset(tile, 0, n_bytes);
            s->type->pack(tile, s, row, rows, c * tile_cols);
        }
    }
}

// The first row of a row tile with a weight (quantised: a scale or minimum) that is not finite, or 16. A number is not
// finite if its bits, without the sign and moved to the top of 32, reach the limit: adding 2^31 - limit shows that.
static size_t broken_row(const Tensor *w, const unsigned char *tiles) {
    Type type = w->type;
    size_t n = !is_quantised(type) ? 32 : types[type].has_min ? 2 : 1, row = 0;  // numbers of each row
    uint32_t sum[16] = { 0 }, limit = type == F32 || type == BF16 ? 0x7f800000 : 0x7c000000;
    if (type == MXFP4) limit = 253 << 23;  // exponent e: the largest weight, 12 * 2^(e - 128), must stay below 2^128
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

// ---- Quantising ----

/* -m export --type makes row tiles of another type. For each quantised block it searches for the scale and minimum with
   the least squared error: from guesses, the first of which is ggml's (the whole range fits), and what regression makes
   of them. The sums are in the order that numpy has on x86, so that a script can repeat the bytes. */

// The integers of a block, and its guesses: with a minimum (low is 0), parts of the range that are cut off below and
// above; without, the weight furthest from 0 becomes low * a. A row makes a type of 32 columns writable.
typedef struct { float low, high; int n_starts; struct { double a, b; } starts[4]; } Grid;
static const Grid grids[N_TYPES] = {
    [Q8] = { -127, 127, 3, { { 1, 0 }, { 0.996, 0 }, { 1.004, 0 } } },
    [Q4] = { -8, 7, 3, { { 1, 0 }, { 0.93, 0 }, { 1.07, 0 } } },
    [Q4M] = { 0, 15, 4, { { 0, 0 }, { 0.05, 0.05 }, { 0, 0.06 }, { 0.06, 0 } } },
};
static bool is_writable(Type type) { return !is_quantised(type) || grids[type].n_starts; }

// 32 columns of 16 rows: a weight is about scale * q + min. error: a row's sum of squares
typedef struct { float q[32][16], scale[16], min[16], error[16]; } Fit;
static float through_half(float x) { return float_of_half(half_of_float(x)); }

// sum[r] = sum over c of a[c,r] * b[c,r], in four chains; columns 12 to 15 come first, then 8 to 11, 4 to 7, 0 to 3 ...
static void add_columns(float sum[16], const float a[32][16], const float b[32][16]) {
    float chain[4][16] = { { 0 } };
    for (int i = 0; i < 32; i++)
        for (int r = 0; r < 16; r++) chain[i % 4][r] += a[i ^ 12][r] * b[i ^ 12][r];
    for (int r = 0; r < 16; r++) sum[r] = (chain[0][r] + chain[1][r]) + (chain[2][r] + chain[3][r]);
}

// Sets scale and min of row r as start number k of the grid says.
static void guess_fit(Fit *f, const float x[32][16], int r, const Grid *g, int k) {
    double a = g->starts[k].a, b = g->starts[k].b;
    float least = x[0][r], most = least, peak = least;
    for (int c = 1; c < 32; c++) {
        least = x[c][r] < least ? x[c][r] : least;
        most = x[c][r] > most ? x[c][r] : most;
        peak = fabsf(x[c][r]) > fabsf(peak) ? x[c][r] : peak;
    }
    float range = most - least;
    f->scale[r] = through_half(g->low < 0 ? peak / (float)(g->low * a) : range * (float)((1 - a - b) / g->high));
    f->min[r] = g->low < 0 ? 0 : through_half(least + (float)a * range);
}

// Sets them to those with the least squared error for the row's q.
static void regress_fit(Fit *f, const float x[32][16], int r, const Grid *g, float product, float square) {
    float q[8] = { 0 }, y[8] = { 0 };  // sums of each eighth column
    for (int c = 0; c < 32 && g->low == 0; c++) q[c % 8] += f->q[c][r], y[c % 8] += x[c][r];
    float mean_q = (((q[0] + q[1]) + (q[2] + q[3])) + ((q[4] + q[5]) + (q[6] + q[7]))) / 32;
    float mean_y = (((y[0] + y[1]) + (y[2] + y[3])) + ((y[4] + y[5]) + (y[6] + y[7]))) / 32;
    float up = product - 32 * mean_q * mean_y, down = square - 32 * mean_q * mean_q;
    f->scale[r] = through_half(down != 0 ? up / down : 0);
    f->min[r] = through_half(mean_y - f->scale[r] * mean_q);
}

// Sets q and error from scale and min. A NaN, of numbers beyond f16, becomes the lowest q.
static void round_fit(Fit *f, const float x[32][16], const Grid *g) {
    float off[32][16], inverse[16];
    for (int r = 0; r < 16; r++) inverse[r] = f->scale[r] != 0 ? 1 / f->scale[r] : 0;
    for (int c = 0; c < 32; c++)
        for (int r = 0; r < 16; r++) {
            float q = (x[c][r] - f->min[r]) * inverse[r];
            q = q > g->low ? q : g->low;
            f->q[c][r] = ((q < g->high ? q : g->high) + ROUNDER) - ROUNDER;
            off[c][r] = f->q[c][r] * f->scale[r] + (f->min[r] - x[c][r]);
        }
    add_columns(f->error, off, off);
}

// Quantises the first `rows` of 16 rows of 32 columns; the others stay as they are in the tile, zeros.
static void quantise_tile(unsigned char *tile, Type type, const float x[32][16], size_t rows) {
    const Grid *g = &grids[type];
    Fit f = { .scale = { 0 } }, best = f;
    for (int k = 0; k < 2 * g->n_starts; k++) {
        float product[16], square[16];
        add_columns(product, f.q, x);
        add_columns(square, f.q, f.q);
        for (int r = 0; r < 16; r++)
            k % 2 ? regress_fit(&f, x, r, g, product[r], square[r]) : guess_fit(&f, x, r, g, k / 2);
        round_fit(&f, x, g);
        for (int r = 0; r < 16; r++)
            if (k == 0 || f.error[r] < best.error[r])
                best.scale[r] = f.scale[r], best.min[r] = f.min[r], best.error[r] = f.error[r];
    }
    round_fit(&best, x, g);
    narrow_floats((uint16_t *)(void *)tile, best.scale, rows);
    if (types[type].has_min) narrow_floats((uint16_t *)(void *)tile + 16, best.min, rows);
    for (size_t i = 0; i < 32 * rows; i++) {  // into whole bytes, or planes as unpack_planes() takes them
        size_t r = i / 32, c = i % 32, g4 = c / 4, bits = (size_t)types[type].bits;
        int stored = ((int)best.q[c][r] + types[type].offset) & ((1 << bits) - 1);
        tile[(size_t)types[type].header + 64 * (g4 % bits) + 4 * r + c % 4] |= (uint8_t)(stored << g4 / bits * bits);
    }
}

// What weights lose: sums of squares of the differences, and of the weights; the roots' worst ratio in 32 columns.
typedef struct { double squares, norm, worst; } Loss;

// Makes a row tile of w, of `rows` rows, one of another type.
static Loss convert_row_tile(unsigned char *to, Type type, const Tensor *w, const unsigned char *tiles, size_t rows) {
    Loss loss = { 0, 0, 0 };
    for (size_t block = 0; block < n_blocks(w); block++) {
        float x[32][16], y[32][16];
        void *tile = memset(to + block * tile_bytes(type), 0, tile_bytes(type));
        kernels->dequantise(x, w->type, tiles, block);
        for (size_t c = 0; c < 32; c++)
            for (size_t r = 32 * block + c < (size_t)w->cols ? rows : 0; r < 16; r++) x[c][r] = 0;  // and not -0
        if (type == F32) memcpy(tile, x, sizeof x);
        else if (type == F16) kernels->narrow(tile, x[0], 512);
        else if (is_quantised(type)) quantise_tile(tile, type, (const float(*)[16])x, rows);
        for (uint32_t i = 0, u; i < 512 && type == BF16; ((uint16_t *)tile)[i++] = (uint16_t)(u >> 16))
            u = bits_of_float(x[i / 16][i % 16]), u += 0x7fff + (u >> 16 & 1);  // to nearest even
        kernels->dequantise(y, type, to, block);
        for (size_t r = 0; r < rows; r++) {
            double squares = 0, norm = 0;
            for (size_t c = 0; c < 32; c++)
                squares += pow((double)x[c][r] - (double)y[c][r], 2), norm += pow((double)x[c][r], 2);
            loss.squares += squares, loss.norm += norm;
            if (norm > 0) loss.worst = fmax(loss.worst, sqrt(squares / norm));
        }
    }
    return loss;
}

/* ==== 9. The machine ================================================================================================
   What is asked of the operating system: files in memory, processors, and threads that work as a team. */

#include <sys/ioctl.h>

// Some numbers, written "1,2,4".
typedef struct { int n, at[16]; } List;

enum { MAX_TEXTS = 64, MAX_STOP = 256 };
typedef struct Texts { int n; const char *at[MAX_TEXTS]; } Texts;  // of an option that may be given again
// A piece of the prompt: the text of -i, or the file of -f.
typedef struct { const char *text; bool is_file; } Part;
enum { MAX_PROMPT_PARTS = 64 };

// What the user asked for on the command line; chapter 14 fills it in.
typedef struct {
    const char *program;  // as it was called
    Part parts[MAX_PROMPT_PARTS];  // -i and -f in the order given
    int n_parts;
    const char *checkpoint, *mode, *prompt, *file, *ids, *tokenizer, *system, *template_name, *output;
    const char *messages, *log, *think, *now, *prompts, *choose, *one_of;
    const char *cache, *kernel, *pre, *svg, *session, *type;
    double temperature, top_p, min_p, typical, xtc, xtc_threshold;
    double repeat_penalty, presence_penalty, frequency_penalty, dry_multiplier, dry_base, nsigma;
    int64_t repeat_last_n, dry_allowed, dry_last_n;
    Texts biases, breakers, stops, template_args;
    int64_t n_predict, top_k, context, batch, reps, lookup, samples, logprobs, shots;
    List threads, pp, tg, depth, parallel;
    uint64_t seed, clock_seed;
    bool single, no_shift, ignore_eos, quiet, json, exact, no_echo, no_bos, ends, pieces, special, check, fit, profile;
    bool help, version, cot, report, tables;
} Options;

static Options options;

// Tells a terminal how far a step that began at `start` has come, once it has taken half a second.
static void show_progress(const char *what, double start, size_t done, size_t total) {
    if (options.quiet || clock_seconds() - start < 0.5 || !isatty(STDERR_FILENO)) return;
    fprintf(stderr, "\r%s %zu/%zu%s", what, done, total, done == total ? "\r\033[K" : "");
}

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

// Asks for pages of 2 MB in place of 4 kB for memory that will be used whole: a processor finds some hundred pages'
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
    bool is_broken = errno == EIO || errno == EMFILE || errno == ENFILE;  // rather than missing or forbidden
    if (file < 0 && strstr(path, "://"))
        return refuse(e, "an address, not a file; download it first: curl -LO %s", path);
    if (file < 0 && errno == ENOENT && strpbrk(path, " ?"))
        return refuse(e, "No such file; the model comes first, then the prompt: MODEL \"PROMPT\"");
    if (file < 0 && errno == ENOENT && !strstr(path, ".gguf") && !strstr(path, ".bin"))
        return refuse(e, "No such file; names of models are not known here: download a GGUF file of it; for a model of "
                         "ollama's, `ollama show --modelfile NAME` tells the file");
    if (file < 0) return fail(e, is_broken ? BROKEN_IO : BAD_FILE, "%s", strerror(errno));
    struct stat info;
    void *p = MAP_FAILED;
    if (fstat(file, &info)) fail(e, BROKEN_IO, "%s", strerror(errno));
    else if (S_ISDIR(info.st_mode) && faccessat(file, "config.json", F_OK, 0) == 0)
        refuse(e, "a directory of Hugging Face's; convert it: python3 export_model.py %s -o model.bin", path);
    else if (S_ISDIR(info.st_mode)) refuse(e, "a directory, expected a file in it, such as NAME.gguf");
    else if (!S_ISREG(info.st_mode)) refuse(e, "a pipe or a device, expected a file that can be mapped");
    else if (info.st_size == 0) refuse(e, "an empty file, expected a checkpoint");
    else if ((p = mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_SHARED, file, 0)) == MAP_FAILED)
        fail(e, io_status(), "cannot be mapped: %s", strerror(errno));
    close(file);
    if (p == MAP_FAILED) return false;
    *map = (Map){ p, (size_t)info.st_size, path };
    use_large_pages(p, map->n_bytes);
    return true;
}

// The bytes of a file, or of stdin, to its end or to more than `most`. The caller frees b->bytes.
static bool read_all(const char *path, size_t most, Buffer *b, Error *e) {
    FILE *f = strcmp(path, "-") ? fopen(path, "rb") : stdin;
    if (!f) return fail(e, io_status(), "%s: %s", path, strerror(errno));
    char chunk[4096];
    bool ok = true;
    for (size_t n = sizeof chunk; ok && n == sizeof chunk && b->n <= most;) {  // less: the end, or a failure
        n = fread(chunk, 1, sizeof chunk, f);
        ok = append(b, chunk, n, e);
    }
    if (ok && ferror(f)) ok = fail(e, BROKEN_IO, "%s: reading failed: %s", path, strerror(errno));
    if (f != stdin) fclose(f);
    return ok;
}

// The prompt: the texts of -i and -f, in the order given, with a blank line between two; without them stdin, if that is
// wanted and no terminal. `trims` drops the newline at the end of a file. A NUL follows the text, and counts in b->n.
static bool read_parts(size_t most, bool trims, bool wants_stdin, Buffer *b, Error *e) {
    const Part *parts = options.n_parts ? options.parts : &(Part){ "-", true };
    bool is_closed = (fcntl(STDIN_FILENO, F_GETFL) & O_ACCMODE) == O_WRONLY;  // main's stand-in for a closed stdin
    int n = options.n_parts ? options.n_parts : wants_stdin && !is_closed && !isatty(STDIN_FILENO);
    for (int i = 0; i < n && b->n <= most; i++) {
        const char *text = parts[i].text;
        if (i > 0 && !append(b, "\n\n", 2, e)) return false;
        size_t before = b->n;
        if (!(parts[i].is_file ? read_all(text, most, b, e) : append(b, text, strlen(text), e))) return false;
        bool at_end = trims && parts[i].is_file && b->n > before && b->bytes[b->n - 1] == '\n';
        if (at_end) b->n -= b->n > before + 1 && b->bytes[b->n - 2] == '\r' ? 2 : 1;
    }
    return append(b, "", 1, e);
}

// Whether a file or a pipe at stdin has bytes that nobody has read.
static bool has_unread_input(void) {
    int n = 0;
    return !isatty(STDIN_FILENO) && ioctl(STDIN_FILENO, FIONREAD, &n) == 0 && n > 0;
}

// ---- Processors ----

enum { MAX_THREADS = 4096 };

#ifdef __linux__
// Reads the one or two numbers at the beginning of a file of the system. Returns how many there are.
static int read_numbers(const char *path, double *first, double *second) {
    FILE *f = fopen(path, "r");
    int n = f ? fscanf(f, "%lf %lf", first, second) : 0;
    if (f) fclose(f);
    return n;
}

// The number in such a file of a processor, or `otherwise`.
static double cpu_number(int cpu, const char *name, double otherwise) {
    char path[96];
    double unused;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/%s", cpu, name);
    read_numbers(path, &otherwise, &unused);
    return otherwise;
}

// Whether the list of processors in a file, "0-3,8" for example, has this one; true where there is no such file.
static bool is_listed(const char *path, int cpu) {
    FILE *f = fopen(path, "r");
    bool found = !f;
    for (int from, to, end = ','; f && end == ',' && fscanf(f, "%d", &from) == 1;) {
        to = from;
        if ((end = fgetc(f)) == '-' && fscanf(f, "%d", &to) == 1) end = fgetc(f);
        found |= from <= cpu && cpu <= to;
    }
    if (f) fclose(f);
    return found;
}

// What the control groups leave to this process, the least of its own group (of version 1 or 2) and of those above it:
// processors that it may use at a time, or bytes of memory. INFINITY: they set no limit.
static double group_limit(bool of_memory) {
    char line[512], path[700];
    double least = INFINITY, quota, period, unused;
    FILE *groups = fopen("/proc/self/cgroup", "r");  // number:controllers:path
    while (groups && fgets(line, sizeof line, groups)) {
        char *name = strchr(line, ':'), *group = name ? strchr(name + 1, ':') : NULL;
        if (!group) continue;
        *group++ = 0;
        group[strcspn(group, "\n")] = 0;
        bool second = name[1] == 0;  // version 2 has one group for all controllers
        snprintf(path, sizeof path, ",%s,", name + 1);
        if (!second && !strstr(path, of_memory ? ",memory," : ",cpu,")) continue;
        for (char *end = group + strlen(group); end; end = strrchr(group, '/')) {
            *end = 0;
            const char *folder = of_memory ? "/memory" : "/cpu", *first = of_memory ? "limit_in_bytes" : "cfs_quota_us";
            snprintf(path, sizeof path, "/sys/fs/cgroup%s%s/%s.%s", second ? "" : folder, group, folder + 1,
                     second ? "max" : first);
            period = of_memory;  // 1 byte; of processors, version 2 has it in the same file
            int n = read_numbers(path, &quota, &period);
            snprintf(strrchr(path, '/'), 20, "/cpu.cfs_period_us");
            if (n == 1 && !of_memory) read_numbers(path, &period, &unused);
            if (n > 0 && quota > 0 && period > 0) least = fmin(least, quota / period);
        }
    }
    if (groups) fclose(groups);
    return least;
}
#endif

// Bytes of memory that are free for this process, or 0: not known.
static double free_memory(void) {
    double kilobytes = 0;
#ifdef __linux__
    char line[128];
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f) && sscanf(line, "MemAvailable: %lf", &kilobytes) != 1) {}
    if (f) fclose(f);
    return fmin(1024 * kilobytes, group_limit(true));
#else
    return kilobytes;
#endif
}

// The processors that this process may use; or, by default, one for each physical core, whose second thread would share
// its arithmetic, without cores that are made to save energy, and no more than a control group's quota.
static int count_cores(bool by_default) {
    long n = 0;
#ifdef __linux__
    enum { MOST_CPUS = 1 << 16 };
    static cpu_set_t allowed[MOST_CPUS / CPU_SETSIZE];
    double largest = 0;  // core's capacity
    if (sched_getaffinity(0, sizeof allowed, allowed)) memset(allowed, 0, sizeof allowed);
    for (int cpu = 0; by_default && cpu < MOST_CPUS; cpu++)
        if (CPU_ISSET_S(cpu, sizeof allowed, allowed)) largest = fmax(largest, cpu_number(cpu, "cpu_capacity", 0));
    for (int cpu = 0; by_default && cpu < MOST_CPUS; cpu++) {
        if (!CPU_ISSET_S(cpu, sizeof allowed, allowed)) continue;
        int first = (int)cpu_number(cpu, "topology/thread_siblings_list", cpu);
        bool is_first = first == cpu || first < 0 || !CPU_ISSET_S(first, sizeof allowed, allowed);
        bool is_large = 2 * cpu_number(cpu, "cpu_capacity", 0) >= largest;
        n += is_first && is_large && is_listed("/sys/devices/cpu_core/cpus", cpu);
    }
    if (n == 0) n = CPU_COUNT_S(sizeof allowed, allowed);  // of small cores too, if no others are allowed
    if (by_default) n = (long)fmin((double)n, fmax(group_limit(false), 1));
#elif defined(__APPLE__)
    int cores = 0;
    size_t size = sizeof cores;
    if (by_default && !sysctlbyname("hw.perflevel0.physicalcpu", &cores, &size, NULL, 0)) n = cores;
#endif
    (void)by_default;
    if (n == 0) n = sysconf(_SC_NPROCESSORS_ONLN);
    return n < 1 ? 1 : n < MAX_THREADS ? (int)n : MAX_THREADS;
}

// ---- Threads ----

// Where the threads of a team wait for each other: the last one to come opens it. What different threads write lies in
// different lines of the cache.
typedef struct Gate {
    _Alignas(64) atomic_uint arrived;
    _Alignas(64) atomic_uint round;
    _Alignas(64) atomic_uint microseconds;  // that threads slept
    struct { _Alignas(64) atomic_size_t taken[2]; } seats[MAX_THREADS];  // chunks of a share, in even and in odd steps
} Gate;

// This thread's part of n, by index: for work that takes every thread the same time.
static Range share(size_t n, const Team *team) {
    size_t each = n / (size_t)team->threads, rest = n % (size_t)team->threads, i = (size_t)team->thread;
    Range r = { i * each + (i < rest ? i : rest), 0 };
    r.to = r.from + each + (i < rest);
    return r;
}

static bool take_chunk(Team *team, size_t n, size_t multiple, Range *chunk) {
    enum { CHUNKS = 8 };  // at least, of a share: with fewer, a slow thread's last takes long; more cost time
    size_t threads = (size_t)team->threads, size = round_up(n / (CHUNKS * threads) + (n < CHUNKS * threads), multiple);
    *chunk = (Range){ 0, n };
    if (n == 0 || threads == 1) return n > 0 && team->n_helped++ == 0;
    size_t n_chunks = (n + size - 1) / size;
    for (; team->n_helped < team->threads; team->n_helped++) {
        size_t owner = (size_t)(team->thread + team->n_helped) % threads;
        size_t first = n_chunks * owner / threads, end = n_chunks * (owner + 1) / threads;
        atomic_size_t *taken = &team->gate->seats[owner].taken[team->n_steps % 2];
        if (first + atomic_load_explicit(taken, memory_order_relaxed) >= end) continue;
        size_t i = first + atomic_fetch_add_explicit(taken, 1, memory_order_relaxed);
        if (i >= end) continue;
        *chunk = (Range){ i * size, (i + 1) * size < n ? (i + 1) * size : n };
        return true;
    }
    return false;
}

// Tells the processor that this thread only waits.
static void pause_core(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// What a thread's clock says of each step, with -m bench --profile; else NULL.
typedef struct { size_t calls; double seconds, waiting; } StepTime;
static StepTime (*profile)[N_STEPS];  // (threads)

static void note_step(Team *team, int step, double arrived) {
    double now = clock_seconds();
    StepTime *t = &profile[team->thread][step];
    t->calls++;
    t->seconds += now - team->began;
    t->waiting += now - arrived;
    team->began = now;
}

// One more look at whether the others have come. Threads wait awake, since that takes less than a microsecond. But if
// another program has taken the processor of one of them, the others sleep: awake, they would keep that program on it.
// They sleep and do not yield: after a yield, a busy program runs for its whole time slice.
enum { EAGER = 4000 };  // looks: these take some 60 microseconds
static void look_again(int n_looks) {
    if (n_looks < EAGER) pause_core();
    else nanosleep(&(struct timespec){ .tv_nsec = 1000 }, NULL);
}

static void end_step(Team *team, int step, int layer) {
    Gate *gate = team->gate;
    double arrived = profile ? clock_seconds() : 0;
    (void)layer;
    if (team->threads > 1) {
        // Nobody looks at the counts of the step before any more: the next one begins with them.
        atomic_store_explicit(&gate->seats[team->thread].taken[(team->n_steps + 1) % 2], 0, memory_order_relaxed);
        unsigned round = atomic_load(&gate->round);
        if (atomic_fetch_add(&gate->arrived, 1) + 1 == (unsigned)team->threads) {
            atomic_store(&gate->arrived, 0);
            atomic_store(&gate->round, round + 1);
        }
        double start = 0;
        for (int i = 0; atomic_load(&gate->round) == round; i += i <= EAGER) {
            if (i == EAGER) start = clock_seconds();
            look_again(i);
        }
        if (start > 0) atomic_fetch_add(&gate->microseconds, (unsigned)((clock_seconds() - start) * 1e6));
    }
    team->n_steps++;
    team->n_helped = 0;
    if (profile) note_step(team, step, arrived);
}

static void take_part(int thread, int threads, void (*work)(void *job, Team *team), void *job, Gate *gate) {
#ifdef __APPLE__
    pthread_set_qos_class_self_np(QOS_CLASS_USER_INITIATED, 0);  // else a core that saves energy may be good enough
#endif
    work(job, &(Team){ .thread = thread, .threads = threads, .gate = gate, .began = profile ? clock_seconds() : 0 });
}

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
    enum { STACK = 64 << 10 };  // bytes: clang -O0 needs 36,000
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
    return cramped ? 1 : threads - left;
}
#else
// Without OpenMP the team is made of pthreads, which are kept for the next job.
static struct {
    pthread_mutex_t lock;
    pthread_cond_t called;
    atomic_uint n_jobs;
    atomic_int n_busy;
    int threads, n_started;  // of this job; besides the program's own
    unsigned n_before;       // jobs before the newest threads were started
    void (*work)(void *job, Team *team);
    void *job;
    Gate *gate;
} crew = { .lock = PTHREAD_MUTEX_INITIALIZER, .called = PTHREAD_COND_INITIALIZER, .n_started = 0 };

static void *serve(void *place) {
    int thread = (int)(uintptr_t)place;
    for (unsigned n_done = crew.n_before;;) {
        for (int i = 0; i < 2000 && atomic_load(&crew.n_jobs) == n_done; i++) pause_core();
        pthread_mutex_lock(&crew.lock);
        while (atomic_load(&crew.n_jobs) == n_done) pthread_cond_wait(&crew.called, &crew.lock);
        n_done = atomic_load(&crew.n_jobs);
        bool is_called = thread < crew.threads;
        pthread_mutex_unlock(&crew.lock);
        if (!is_called) continue;
        take_part(thread, crew.threads, crew.work, crew.job, crew.gate);
        atomic_fetch_sub(&crew.n_busy, 1);
    }
    return NULL;
}

// Of so many threads, those that can work.
static int usable_threads(int threads) {
    crew.n_before = atomic_load(&crew.n_jobs);
    for (pthread_t t; crew.n_started + 1 < threads; crew.n_started++) {
        if (pthread_create(&t, NULL, serve, (void *)(uintptr_t)(crew.n_started + 1))) break;
        pthread_detach(t);
    }
    return crew.n_started + 1;
}
#endif

// A thread whose core another program uses makes all others wait. So after two slow passes in a row, in which threads
// had to sleep, the next one is tried with a thread less, which rests if that is faster than both. Then nothing changes
// for some passes, each time for more. After them a thread that rests is tried again.
typedef struct {
    int threads, rows;     // of the pass before
    int n_resting, n_slow; // threads that rest; slow passes in a row
    int wait, left;        // passes for which nothing changes: of the last such time, and still to come
    bool on_trial;
    double seconds;        // of the faster of the slow passes
} Rest;

static void judge_pass(Rest *r, int rows, double seconds, double slept) {
    bool is_slow = slept > seconds / 8, is_like_last = rows == r->rows;
    bool is_faster = is_like_last && seconds < r->seconds;
    r->rows = rows;
    if (r->on_trial) {
        r->on_trial = false;
        r->n_slow = 0;
        r->left = r->wait = r->wait < 128 ? 2 * r->wait + 8 : 256;
        if (!is_faster) r->n_resting--;
        return;
    }
    r->n_slow = !is_slow ? 0 : is_like_last ? r->n_slow + 1 : 1;
    if (r->n_slow <= 1 || is_faster) r->seconds = seconds;
    r->on_trial = !r->left && r->n_slow >= 2 && r->n_resting < r->threads - 1;
    if (r->left) r->left--;
    else if (r->on_trial) r->n_resting++;
    else if (r->n_resting) r->n_resting--;
    else if (!is_slow && r->wait) r->wait--;
}

static void run_team(int threads, int rows, void (*work)(void *job, Team *team), void *job) {
    static Gate gate;
    static Rest rest;
    static int asked_for = 1, usable = 1;
    if (threads > asked_for) {
        usable = usable_threads(asked_for = threads);
        if (usable < threads && !options.quiet) fprintf(stderr, "-j %d: only %d threads can start\n", threads, usable);
    }
    if (threads > usable) threads = usable;
    if (rows > 0 && threads != rest.threads) rest = (Rest){ .threads = threads };
    if (threads == rest.threads && rows >= 0) threads -= rest.n_resting;
    for (int i = 0; i < threads; i++) gate.seats[i].taken[0] = gate.seats[i].taken[1] = 0;
    gate.microseconds = 0;
    double start = clock_seconds();
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
    take_part(omp_get_thread_num(), omp_get_num_threads(), work, job, &gate);
#else
    if (threads > 1) {
        pthread_mutex_lock(&crew.lock);
        crew.threads = threads, crew.work = work, crew.job = job, crew.gate = &gate;
        atomic_store(&crew.n_busy, threads - 1);
        atomic_fetch_add(&crew.n_jobs, 1);
        pthread_cond_broadcast(&crew.called);
        pthread_mutex_unlock(&crew.lock);
    }
    take_part(0, threads, work, job, &gate);
    for (int i = 0; threads > 1 && atomic_load(&crew.n_busy) > 0; i += i <= EAGER) look_again(i);
#endif
    if (rows > 0) judge_pass(&rest, rows, clock_seconds() - start, gate.microseconds * 1e-6);
}

// Sets a signal's handler, unless whoever started us wants the signal ignored.
static void heed(int number, const struct sigaction *action) {
    struct sigaction old;
    if (sigaction(number, NULL, &old) == 0 && old.sa_handler != SIG_IGN) sigaction(number, action, NULL);
}

/* ==== 10. Opening a checkpoint ======================================================================================
   cria reads three kinds of checkpoint: its own, GGUF, and llama2.c's. A parser for each turns bytes into a
   configuration and a list of the tensors that the file claims to have (Source). Parsers trust nothing: every length
   goes through the cursor, every count is compared with the bytes that are left. The configuration and two tables of
   rules (TensorRule) tell which tensors the model must or may have (Slot). Then bind_model() looks for each of them:
   it must be there once, with its shape and an allowed type, inside the file, and overlap no other. Only there do bytes
   of the file become a Tensor. */

enum { PATH_BYTES = 4096 };  // of the longest path that systems know (PATH_MAX)

// Adds to an error in which part of a split GGUF it is.
static bool in_part(size_t part, Error *e) {
    Error told = *e;
    return fail(e, told.status, "part %zu: %.300s", part, told.text);
}

// Maps a file. If it is part of a split GGUF (NAME-00001-of-00003.gguf), maps all parts.
static bool map_parts(const char *path, Model *m, Error *e) {
    size_t n = strlen(path), prefix = n > 20 ? n - 20 : 0;
    unsigned part = 0, parts = 0;
    char again[32], name[PATH_BYTES];
    sscanf(path + prefix, "-%5u-of-%5u.gguf", &part, &parts);
    snprintf(again, sizeof again, "-%05u-of-%05u.gguf", part, parts);
    if (strcmp(path + prefix, again) || part - 1 >= parts) return map_file(path, &m->file, e);
    bool ok = (m->parts = allocate(parts, sizeof *m->parts, e)) != NULL;
    for (part = 1; ok && part <= parts; part++) {
        snprintf(name, sizeof name, "%.*s-%05u-of-%05u.gguf", (int)prefix, path, part, parts);
        Map *map = part == 1 ? &m->file : &m->parts[part - 2];
        ok = map_file(name, map, e) || in_part(part, e);
        if (ok) m->n_parts = part - 1, map->path = path;
    }
    return ok;
}

// ---- What a model consists of ----

// No file may ask for more than this; known models stay far below.
enum { MAX_LAYERS = 1024, MAX_DIM = 65536, MAX_FFN_DIM = 1 << 20, MAX_EXPERTS = 1024 };
enum { MAX_CONTEXT = 1 << 20, MAX_TENSORS = 65536, MAX_KEYS = 65536 };
_Static_assert(MAX_HEADS * MAX_HEAD_DIM <= MAX_FFN_DIM, "no wider than what is allowed anyway");

// A family of models. To add one: a row in families[]. What is new in it takes a member of Config or Layer and its use
// in chapter 5. A number also takes a row in config_fields[] (then LAYOUT is one more), a tensor a row in model_rules[]
// or layer_rules[]. If not every family may have it, it takes a feature here, the next power of two.
enum {
    ALWAYS = 1, OPTIONAL = 2,  // in a tensor's rule: it must or may be there
    BIASES = 4, HEAD_NORMS = 8, WIDE_HEAD_NORMS = 16, PRE_NORMS = 32, POST_NORMS = 64, LAYER_NORMS = 128,
    SCALES = 256,  // of embedding, residual and logits
    GEMMA = 512,   // GELU, and embeddings times sqrt(D)
    CAPS = 1024,   // defaults: 50 for scores, 30 for logits
};
static const char *const feature_names[] = { "always", "optional", "biases", "head_norms", "wide_head_norms",
    "pre_norms", "post_norms", "layer_norms", "scales", "gemma", "caps" };
typedef struct {
    const char *name;
    Pairing pairing;
    int features;        // a sum of those above
    int global_every;    // n: every n-th layer has no window; 0: all have the same
    int no_rope_every;   // n: every n-th layer does not rotate; 0: all do
    double local_theta;  // of layers with a window; -1: rope_theta, unscaled; 0: they are like the others
} Family;

static const Family families[] = {
    { "llama", ADJACENT, .features = PRE_NORMS },  // LLaMA 1-3, Mistral, Mixtral, TinyLlama, SmolLM, Yi, Vicuna, ...
    { "qwen2", HALVES, .features = PRE_NORMS | BIASES },  // Qwen 1.5, 2, 2.5
    { "qwen3", HALVES, .features = PRE_NORMS | HEAD_NORMS },
    { "qwen3moe", HALVES, .features = PRE_NORMS | HEAD_NORMS },
    { "phi3", HALVES, .features = PRE_NORMS },
    { "granite", ADJACENT, .features = PRE_NORMS | SCALES },
    { "smollm3", ADJACENT, .features = PRE_NORMS, .no_rope_every = 4 },
    { "olmo2", HALVES, .features = WIDE_HEAD_NORMS | POST_NORMS, .global_every = 4, .local_theta = -1 },  // and OLMo 3
    { "stablelm", HALVES, .features = PRE_NORMS | LAYER_NORMS },
    { "gemma2", HALVES, .features = PRE_NORMS | POST_NORMS | GEMMA | CAPS, .global_every = 2 },
    { "gemma3", HALVES, .features = PRE_NORMS | HEAD_NORMS | POST_NORMS | GEMMA, .global_every = 6,
      .local_theta = 10000 },
};

static const Family *find_family(const char *name, Error *e) {
    for (size_t i = 0; i < sizeof families / sizeof *families; i++)
        if (!strcmp(families[i].name, name)) return &families[i];
    refuse(e, "models of family \"%s\" are not supported", name);
    return NULL;
}

// A number of the configuration: its name in native files, its place in memory, its limits, and its key in a GGUF. The
// first row is the number of layers: setting it allocates them.
typedef struct {
    const char *name;
    enum { INTEGER, SINGLE, DOUBLE } type;
    bool per_layer;
    size_t offset;  // in Config or in Layer
    double min, max;
    const char *key;   // after the family's name; its value is one number or, if per_layer, an array; NULL: none
    double otherwise;  // the default; NAN: the key is needed; 0: computed from others
    int feature;       // only families with this feature have the key; 0: all
} ConfigField;

static const ConfigField config_fields[] = {
    { "n_layers", INTEGER, false, offsetof(Config, n_layers), 1, MAX_LAYERS, ".block_count", NAN, 0 },
    { "dim", INTEGER, false, offsetof(Config, dim), 1, MAX_DIM, ".embedding_length", NAN, 0 },
    { "n_tokens", INTEGER, false, offsetof(Config, n_tokens), 1, MAX_TOKENS, NULL, 0, 0 },
    { "head_dim", INTEGER, false, offsetof(Config, head_dim), 1, MAX_HEAD_DIM, ".attention.key_length", 0, 0 },
    { "rope_dim", INTEGER, false, offsetof(Config, rope_dim), 2, MAX_HEAD_DIM, ".rope.dimension_count", 0, 0 },
    { "context", INTEGER, false, offsetof(Config, context), 1, MAX_CONTEXT, ".context_length", NAN, 0 },
    { "original_context", INTEGER, false, offsetof(Config, original_context), 0, MAX_CONTEXT,
      ".rope.scaling.original_context_length", 0, 0 },
    { "norm_eps", SINGLE, false, offsetof(Config, norm_eps), 1e-20f, 1, ".attention.layer_norm_rms_epsilon", NAN, 0 },
    { "rope_theta", DOUBLE, false, offsetof(Config, rope_theta), 1, 1e15, ".rope.freq_base", 10000, 0 },
    { "rope_scale", DOUBLE, false, offsetof(Config, rope_scale), 1e-6, 1e6, NULL, 0, 0 },
    { "rope_magnitude", DOUBLE, false, offsetof(Config, rope_magnitude), 1e-6, 1e6, ".rope.scaling.attn_factor", 0, 0 },
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

static int n_values(const Model *m, const ConfigField *f) { return f->per_layer ? m->config.n_layers : 1; }

static void *field_place(Model *m, const ConfigField *f, int layer) {
    return (char *)(f->per_layer ? (void *)&m->layers[layer] : (void *)&m->config) + f->offset;
}

static double get_field(const Model *m, const ConfigField *f, int layer) {
    const void *p = field_place((Model *)m, f, layer);
    return f->type == INTEGER ? *(const int *)p : f->type == SINGLE ? (double)*(const float *)p : *(const double *)p;
}

static bool set_field(Model *m, const ConfigField *f, int layer, double value, Error *e) {
    if (!(value >= f->min && value <= f->max) || (f->type == INTEGER && value != floor(value)))
        return refuse(e, "%s is %.10g, expected %s%g to %g", f->name, value,
                      f->type == INTEGER ? "an integer from " : "", f->min, f->max);
    void *p = field_place(m, f, layer);
    if (f->type == INTEGER) *(int *)p = (int)value;
    else if (f->type == SINGLE) *(float *)p = (float)value;
    else *(double *)p = value;
    if (f == config_fields && !m->layers) m->layers = allocate((size_t)m->config.n_layers, sizeof *m->layers, e);
    return m->layers != NULL;
}

// A tensor that models must or may have, named as in GGUF: %d is its layer, %s "_exps" if it has a matrix for each
// expert. It is a vector of floats if `rows` is ONE, else a matrix. It may also be part of the rows of the tensor
// `fused`, which holds all that name it, in the order of the table.
typedef enum { ONE, DIM, Q_DIM, KV_DIM, FFN_DIM, N_TOKENS, PAIRS, Q_NORM, K_NORM, N_EXPERTS } Size;

typedef struct {
    const char *name;
    size_t offset;  // of the Tensor or the const float * in Model or in Layer
    Size rows, cols;
    int need;  // the features of a family that make it needed, or ALWAYS, or OPTIONAL
    const char *fused;
} TensorRule;

static const TensorRule model_rules[] = {
    { "token_embd.weight", offsetof(Model, embedding), N_TOKENS, DIM, ALWAYS, NULL },
    { "output_norm.weight", offsetof(Model, final_norm), ONE, DIM, ALWAYS, NULL },
    { "output_norm.bias", offsetof(Model, final_norm_bias), ONE, DIM, LAYER_NORMS, NULL },
    { "output.weight", offsetof(Model, head), N_TOKENS, DIM, OPTIONAL, NULL },
    { "rope_freqs.weight", offsetof(Model, rope_factors), ONE, PAIRS, OPTIONAL, NULL },
    { "rope_factors_long.weight", offsetof(Model, long_factors), ONE, PAIRS, OPTIONAL, NULL },
    { "rope_factors_short.weight", offsetof(Model, short_factors), ONE, PAIRS, OPTIONAL, NULL },
};
static const TensorRule layer_rules[] = {
    { "blk.%d.attn_norm.weight", offsetof(Layer, attention_norm), ONE, DIM, PRE_NORMS, NULL },
    { "blk.%d.attn_norm.bias", offsetof(Layer, attention_norm_bias), ONE, DIM, LAYER_NORMS, NULL },
    { "blk.%d.attn_q.weight", offsetof(Layer, query), Q_DIM, DIM, ALWAYS, "blk.%d.attn_qkv.weight" },
    { "blk.%d.attn_k.weight", offsetof(Layer, key), KV_DIM, DIM, ALWAYS, "blk.%d.attn_qkv.weight" },
    { "blk.%d.attn_v.weight", offsetof(Layer, value), KV_DIM, DIM, ALWAYS, "blk.%d.attn_qkv.weight" },
    { "blk.%d.attn_q.bias", offsetof(Layer, query_bias), ONE, Q_DIM, BIASES | OPTIONAL, NULL },
    { "blk.%d.attn_k.bias", offsetof(Layer, key_bias), ONE, KV_DIM, BIASES | OPTIONAL, NULL },
    { "blk.%d.attn_v.bias", offsetof(Layer, value_bias), ONE, KV_DIM, BIASES | OPTIONAL, NULL },
    { "blk.%d.attn_q_norm.weight", offsetof(Layer, query_norm), ONE, Q_NORM, HEAD_NORMS | WIDE_HEAD_NORMS, NULL },
    { "blk.%d.attn_k_norm.weight", offsetof(Layer, key_norm), ONE, K_NORM, HEAD_NORMS | WIDE_HEAD_NORMS, NULL },
    { "blk.%d.attn_output.weight", offsetof(Layer, attention_out), DIM, Q_DIM, ALWAYS, NULL },
    { "blk.%d.attn_output.bias", offsetof(Layer, attention_out_bias), ONE, DIM, OPTIONAL, NULL },
    { "blk.%d.post_attention_norm.weight", offsetof(Layer, attention_post_norm), ONE, DIM, POST_NORMS, NULL },
    { "blk.%d.ffn_norm.weight", offsetof(Layer, ffn_norm), ONE, DIM, PRE_NORMS, NULL },
    { "blk.%d.ffn_norm.bias", offsetof(Layer, ffn_norm_bias), ONE, DIM, LAYER_NORMS, NULL },
    { "blk.%d.ffn_gate_inp.weight", offsetof(Layer, router), N_EXPERTS, DIM, ALWAYS, NULL },  // or 0 rows, and none
    { "blk.%d.ffn_gate%s.weight", offsetof(Layer, gate), FFN_DIM, DIM, ALWAYS, "blk.%d.ffn_up.weight" },
    { "blk.%d.ffn_gate%s.bias", offsetof(Layer, gate_bias), ONE, FFN_DIM, OPTIONAL, NULL },
    { "blk.%d.ffn_up%s.weight", offsetof(Layer, up), FFN_DIM, DIM, ALWAYS, "blk.%d.ffn_up.weight" },
    { "blk.%d.ffn_up%s.bias", offsetof(Layer, up_bias), ONE, FFN_DIM, OPTIONAL, NULL },
    { "blk.%d.ffn_down%s.weight", offsetof(Layer, down), DIM, FFN_DIM, ALWAYS, NULL },
    { "blk.%d.ffn_down%s.bias", offsetof(Layer, down_bias), ONE, DIM, OPTIONAL, NULL },
    { "blk.%d.post_ffw_norm.weight", offsetof(Layer, ffn_post_norm), ONE, DIM, POST_NORMS, NULL },
};
enum { N_MODEL_RULES = sizeof model_rules / sizeof *model_rules };
enum { N_LAYER_RULES = sizeof layer_rules / sizeof *layer_rules };

// A tensor that this model must or may have: its shape, and its data when they are found.
typedef struct Slot {
    char name[NAME_BYTES];
    const TensorRule *rule;
    int layer;               // -1: the model's
    bool is_vector;
    size_t rows, cols;       // of a vector: 1 and its length
    size_t n, n_used;        // of experts: how many there are, how many a token visits; else 1
    Source *source;          // the file's tensor, or NULL
    size_t first_row;        // in the source
    Type type;               // of a matrix
    const unsigned char *data;  // its tiles or floats; NULL: the model does not have it (yet)
} Slot;

// Makes the model's slots from its configuration, in the order in which native files have the tensors.
static bool make_slots(Model *m, Error *e) {
    const Config *c = &m->config;
    m->n_slots = N_MODEL_RULES + (size_t)c->n_layers * N_LAYER_RULES;
    Slot *slot = m->slots = allocate(m->n_slots, sizeof *m->slots, e);
    for (int l = -1; slot && l < c->n_layers; l++) {
        const TensorRule *rule = l < 0 ? model_rules : layer_rules;
        const Layer *layer = &m->layers[l < 0 ? 0 : l];
        size_t heads = (size_t)layer->n_heads, groups = (size_t)layer->n_kv_heads, head_dim = (size_t)c->head_dim;
        const size_t sizes[] = {
            [ONE] = 1, [DIM] = (size_t)c->dim, [FFN_DIM] = (size_t)layer->ffn_dim, [N_TOKENS] = (size_t)c->n_tokens,
            [Q_DIM] = heads * head_dim, [KV_DIM] = groups * head_dim, [PAIRS] = (size_t)c->rope_dim / 2,
            [Q_NORM] = (c->wide_head_norms ? heads : 1) * head_dim, [N_EXPERTS] = (size_t)layer->n_experts,
            [K_NORM] = (c->wide_head_norms ? groups : 1) * head_dim,
        };
        for (const TensorRule *end = rule + (l < 0 ? N_MODEL_RULES : N_LAYER_RULES); rule < end; rule++, slot++) {
            bool by_expert = strstr(rule->name, "%s") && layer->n_experts > 0;
            *slot = (Slot){ .rule = rule, .layer = l, .is_vector = rule->rows == ONE, .n = 1, .n_used = 1,
                            .rows = sizes[rule->rows], .cols = sizes[rule->cols] };
            if (by_expert) slot->n = (size_t)layer->n_experts, slot->n_used = (size_t)layer->n_experts_used;
            snprintf(slot->name, NAME_BYTES, rule->name, l, by_expert ? "_exps" : "");
        }
    }
    return slot;
}

// Checks each field, then fields against each other; sets what only the family tells, and makes the slots.
static bool check_config(Model *m, Error *e) {
    Config *c = &m->config;
    const Family *family = find_family(c->family, e);
    if (!family) return false;
    c->pairing = family->pairing;
    c->wide_head_norms = family->features & WIDE_HEAD_NORMS;
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++)
        for (int l = 0; l < n_values(m, f); l++) if (!set_field(m, f, l, get_field(m, f, l), e)) return false;
    if (c->rope_dim > c->head_dim || c->rope_dim % 2)
        return refuse(e, "rope_dim is %d, expected an even number up to %d", c->rope_dim, c->head_dim);
    for (int l = 0; l < c->n_layers; l++) {
        const Layer *y = &m->layers[l];
        int experts = y->n_experts, used = y->n_experts_used;
        if (used > experts || !used != !experts) return refuse(e, "layer %d uses %d of %d experts", l, used, experts);
        if (y->angles == LOCAL && c->local_theta < 1) return refuse(e, "layer %d needs local_theta", l);
        if (y->n_heads % y->n_kv_heads)
            return refuse(e, "layer %d: %d heads cannot share %d key/value heads", l, y->n_heads, y->n_kv_heads);
    }
    return make_slots(m, e);
}

static Tensor slot_matrix(const Slot *s) { return (Tensor){ s->type, (int)s->rows, (int)s->cols, s->data }; }

// Bytes of the tensor in memory, and in a native file.
static size_t slot_bytes(const Slot *s) {
    Tensor matrix = slot_matrix(s);
    return s->is_vector ? s->cols * sizeof(float) : times(s->n, tensor_bytes(&matrix));
}

static void set_slot(Model *m, Slot *s, const unsigned char *data) {
    void *place = (s->layer < 0 ? (char *)m : (char *)&m->layers[s->layer]) + s->rule->offset;
    s->data = data;
    if (s->is_vector) *(const float **)place = (const float *)(const void *)data;
    else *(Tensor *)place = slot_matrix(s);
}

// Whether a token is multiplied with it. The embedding (the first slot) is only looked up, unless it is the head too.
static bool is_multiplied(const Model *m, const Slot *s) {
    return s->data && !s->is_vector && (s != m->slots || m->head.tiles == s->data);
}

static int by_name(const void *a, const void *b) { return strcmp(a, b); }  // Source and Key begin with their names

static int by_place(const void *a, const void *b) {
    const unsigned char *x = ((const Source *)a)->data, *y = ((const Source *)b)->data;
    return x < y ? -1 : x > y;
}

// Finds each tensor's bytes in `data`. It must begin at a multiple of `step`, and no two may overlap.
static bool place_sources(Source *sources, size_t n, Cursor data, size_t step, Error *e) {
    for (Source *s = sources; s < sources + n; s++) {
        unsigned long long at = s->at;
        if (at % step) return refuse(e, "%s begins at %llu, no multiple of %zu", s->name, at, step);
        if (data.bad || at > data.left || s->n_bytes > data.left - at)
            return refuse(e, "%s ends after the file does: not copied whole?", s->name);
        s->data = data.at + at;
    }
    qsort(sources, n, sizeof *sources, by_place);
    for (const Source *s = sources; s + 1 < sources + n; s++)
        if (s->n_bytes > (size_t)(s[1].data - s->data))
            return refuse(e, "tensors %s and %s overlap", s->name, s[1].name);
    return true;
}

static Source *find_source(const Model *m, const char *name) {
    return bsearch(name, m->sources, m->n_sources, sizeof *m->sources, by_name);
}

// The file's tensor for a slot: its own, or a fused one (which native files may not have); or NULL.
static Source *find_for_slot(const Model *m, const Slot *slot) {
    char name[NAME_BYTES] = "";
    if (slot->rule->fused) snprintf(name, sizeof name, slot->rule->fused, slot->layer);
    Source *own = find_source(m, slot->name), *fused = find_source(m, name);
    return own ? own : fused && fused->type && fused->rows > slot->rows ? fused : NULL;
}

// Gives back the file's pages of these row tiles, which are packed now: memory need not hold the model twice.
static void give_back(const Source *s, Range tiles) {
    size_t last = tiles.to * TILE_ROWS < s->rows ? tiles.to * TILE_ROWS : s->rows;
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), end = (uintptr_t)source_block(s, last, 0) / page * page;
    uintptr_t begin = round_up((uintptr_t)source_block(s, tiles.from * TILE_ROWS, 0), page);
    if (end > begin) madvise((void *)begin, end - begin, MADV_DONTNEED);  // a mapped file's can be read again
}

// What a file has of one of a slot's matrices, or of its vector.
static Source matrix_source(const Slot *slot, size_t matrix) {
    Source part = *slot->source;
    part.rows = (uint32_t)slot->rows;
    part.data = source_block(&part, slot->first_row, 0) + matrix * source_bytes(&part);
    return part;
}

// Packs all tensors of a file that has no tiles into the places that their slots have.
typedef struct { Model *m; double start; atomic_bool broken; } PackJob;

static void pack_team(void *p, Team *team) {
    PackJob *job = p;
    const Model *m = job->m;
    for (size_t i = 0; i < m->n_slots; i++) {
        const Slot *slot = &m->slots[i];
        if (!slot->source) continue;
        Source part = matrix_source(slot, 0);
        Tensor matrix = slot_matrix(slot);
        unsigned char *to = (unsigned char *)slot->data;
        if (slot->is_vector && team->thread == 0) memcpy(to, part.data, slot_bytes(slot));
        Range tiles = slot->is_vector ? (Range){ 0, 0 } : share(n_row_tiles(&matrix), team);
        for (size_t k = 0; k < slot->n; k++, part.data += source_bytes(&part), to += tensor_bytes(&matrix)) {
            for (size_t row = tiles.from; row < tiles.to; row++) {
                unsigned char *tile = to + row * row_tile_bytes(&matrix);
                pack_rows(tile, &part, (Range){ row, row + 1 });
                if (broken_row(&matrix, tile) < TILE_ROWS) job->broken = true;
            }
            give_back(&part, tiles);
        }
        if (team->thread == 0) show_progress("packing tensor", job->start, i + 1, m->n_slots);
    }
}

// Names the first row with a weight that is not finite, of n row tiles from number `first` of the slot on.
static bool check_row_tiles(const Slot *slot, const Tensor *w, size_t first, size_t n, Error *e) {
    size_t n_tiles = n_row_tiles(w);
    for (size_t j = first, r; j < first + n; j++)
        if ((r = broken_row(w, w->tiles + (j - first) * row_tile_bytes(w))) < TILE_ROWS)
            return refuse(e, w->type == slot->type ? "%s: row %zu has a weight or scale that is not finite"
                                                   : "%s: row %zu has a weight beyond the range of %s; use --type f32",
                          slot->name, j / n_tiles * slot->rows + j % n_tiles * TILE_ROWS + r, types[w->type].name);
    return true;
}

// Checks all weights. For native files it runs on demand only.
static bool check_weights(const Model *m, Error *e) {
    for (const Slot *slot = m->slots; slot < m->slots + m->n_slots; slot++) {
        const Tensor w = slot_matrix(slot);
        if (w.tiles && !slot->is_vector && !check_row_tiles(slot, &w, 0, slot->n * n_row_tiles(&w), e)) return false;
    }
    return true;
}

// Checks a slot against its source, of which it is the next rows. Points into a native file, or counts bytes to pack.
static bool bind_slot(Model *m, Slot *slot, Error *e) {
    Source *s = slot->source;
    slot->first_row = s->rows_used;
    s->rows_used += slot->rows;
    bool rows_fit = slot->rule->fused ? s->rows_used <= s->rows : s->rows_used == s->rows;
    if (!rows_fit || s->cols != slot->cols || s->n != slot->n)
        return refuse(e, "%s is %u x %u x %u, expected %zu x %zu x %zu", s->name, s->n, s->rows, s->cols, slot->n,
                      s->rows_used, slot->cols);
    if (slot->is_vector ? s->tiles != (s->type ? F32 : VECTOR) : s->tiles >= N_TYPES)
        return refuse(e, "%s is of type %s, which no %s has", s->name,
                      s->type ? s->type->name : s->tiles < N_TYPES ? types[s->tiles].name : "unknown",
                      slot->is_vector ? "vector" : "matrix");
    slot->type = slot->is_vector ? F32 : (Type)s->tiles;
    if (!slot->is_vector && is_quantised(slot->type) && slot->cols % (size_t)types[slot->type].cols)
        return refuse(e, "%s has %zu columns, which %s cannot have", s->name, slot->cols, types[slot->type].name);
    if (!s->type && slot_bytes(slot) != s->n_bytes)
        return refuse(e, "%s has %zu bytes, expected %zu", s->name, (size_t)s->n_bytes, slot_bytes(slot));
    for (size_t i = 0; slot->is_vector && i < slot->cols; i++) {
        float x;
        memcpy(&x, s->data + i * sizeof x, sizeof x);
        if (!isfinite(x)) return refuse(e, "%s: number %zu is not finite", s->name, i);
    }
    if (s->type) m->packed_bytes = round_up(plus(m->packed_bytes, slot_bytes(slot)), 64);
    else set_slot(m, slot, s->data);
    return true;
}

// Makes a checked configuration and the file's tensors a model that can run: none may be missing, none left over.
static bool bind_model(Model *m, int threads, Error *e) {
    int features = find_family(m->config.family, e)->features | ALWAYS;
    qsort(m->sources, m->n_sources, sizeof *m->sources, by_name);
    for (Slot *slot = m->slots; slot < m->slots + m->n_slots; slot++) {
        int need = slot->rows ? slot->rule->need : 0;
        if (need & (features | OPTIONAL)) slot->source = find_for_slot(m, slot);
        if (slot->source && !bind_slot(m, slot, e)) return false;
        const Slot *before = slot->layer > 0 && need & OPTIONAL ? slot - N_LAYER_RULES : slot;
        const Slot *lost = slot->source ? before : slot;  // if one layer has what is optional, all must
        bool apart = slot->n > 1 && find_source(m, "blk.0.ffn_gate.0.weight");
        if (!lost->source && (need & features || slot->source || before->source))
            return refuse(e, "tensor %s is missing%s", lost->name,
                          apart ? ": experts are single tensors; join them: export_model.py FILE -o NEW" : "");
    }
    size_t n_bytes = 0;
    for (const Source *s = m->sources; s < m->sources + m->n_sources; n_bytes = plus(n_bytes, s++->n_bytes))
        if (s->rows_used != s->rows)
            return refuse(e, "tensor %s %s there twice, or no %s has it", s->name,
                          s->rows_used ? "has rows that are" : "is", m->config.family);
    if (m->packed_bytes > plus(times(4, n_bytes), 32 << 20))  // one number takes a tile of 2 KB: some may be small
        return refuse(e, "matrices so small that their %zu bytes take %zu in tiles", n_bytes, m->packed_bytes);
    PackJob job = { m, clock_seconds(), false };
    if (m->packed_bytes && threads > 0 && !(m->packed = map_memory(m->packed_bytes, true, e))) return false;
    if (m->packed) {
        unsigned char *to = m->packed;
        for (Slot *slot = m->slots; slot < m->slots + m->n_slots; slot++)
            if (slot->source) set_slot(m, slot, to), to += round_up(slot_bytes(slot), 64);
        use_large_pages(m->packed, m->packed_bytes);
        run_team(threads, 0, pack_team, &job);
    }
    if (job.broken) return check_weights(m, e);
    if (!m->head.tiles) m->head = m->embedding;
    return !m->long_factors == !m->short_factors ||
           refuse(e, "of rope_factors_long.weight and rope_factors_short.weight one is missing");
}

// ---- cria's own file ----

/* The format, byte by byte. Integers are little-endian, floats are IEEE 754, records have no gaps. Every section and
   every tensor begins at a multiple of 64 bytes from the beginning of the file, after padding with zeros.

       | header, 128 bytes | configuration | tensor records | tokenizer (tokenizer.c) | chat template | weights |

   HEADER: a FileHeader. `layout` changes whenever anything here does. `family` is a name of families[]. A section is
   given by its offset in the file and its length. The length of `weights` includes the padding of each tensor, the
   others do not include their padding. The chat template is text without a zero at its end; it may be empty. Names are
   padded with zeros, at least one.

   CONFIGURATION: for each row of config_fields[], in that order, a ConfigRecord, then `count` numbers of type f64: one,
   or one for each layer. They are within the limits of the row, and integers where it says so. rope_dim is even and at
   most head_dim; n_kv_heads divides n_heads; n_experts_used is at most n_experts, and 0 only if that is 0. `activation`
   and `angles` are enumerators of chapter 3. A 0 means: no cap, no window, no experts, no YaRN (yarn_fast), no
   local_theta, or an original_context that equals context; layers whose `angles` are LOCAL need a local_theta. A scale
   or a rope_magnitude of 1 changes nothing.

   TENSOR RECORDS, in any order: name, type, rows, columns, n, offset, bytes. The name is that of model_rules[] or
   layer_rules[]; a tensor of layer N has "blk.N." before it, and one with a matrix for each expert has "_exps" after
   the stem ("blk.0.ffn_gate_exps.weight"). The type is a Type of chapter 3 (F32 is 0); a vector has type 255, 1 row and
   f32 elements. n is the number of experts, or 1. The offset is from the beginning of the file. The rules give the
   shapes and say which tensors must be there; no others may be, and none is fused. If one layer has a tensor, all have
   it; likewise long and short factors. Without output.weight, the embedding is the output matrix too. Rows of attn_q
   and attn_k are in GGUF's order (for llama, pairs are neighbours).

   WEIGHTS: a matrix is stored in the tiles that chapter 4 draws, of 16 rows and 32 or 256 columns (types[], chapter 8):
   those of the first 16 rows from left to right, then the next 16 rows. Each expert's matrix begins a new tile. Zeros
   pad the last rows and columns. A quantised tile begins with the header below. x is a weight as stored, in row r of
   its tile; d, m and e stand for d[r], m[r] and e[r]; s and t for s[k][r] and t[k][r], where k counts the tile's groups
   of 32 columns, or of 16 if there are 16 groups. Each operation rounds to f32.

       f32, f16, bf16  no header                                       x
       q8, q8f         f16 d[16]; q8f: f32 d[16]                       d * x, x is signed
       q4, q5          f16 d[16]                                       d * (x - 8), d * (x - 16)
       q4m, q5m        f16 d[16], f16 m[16]                            d * x + m
       iq4nl           f16 d[16]                                       d * curve[x]
       mxfp4           u8 e[16]                                        2^(e - 128) * small_floats[x]
       q2k             f16 d[16], f16 m[16], u8 s[16][16]              (d * (s & 15)) * x - m * (s >> 4)
       q3k, q6k        f16 d[16], i8 s[16][16]                         (d * s) * (x - 4), (d * s) * (x - 32)
       q4k, q5k        f16 d[16], f16 m[16], u8 s[8][16], u8 t[8][16]  (d * s) * x - m * t
       iq4xs           f16 d[16], i8 s[8][16]                          (d * s) * curve[x] */
enum { LAYOUT = 2 };
static const char native_magic[] = "\x89" "cria\r\n\x1a";

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
_Static_assert(sizeof(FileHeader) == 128 && sizeof(ConfigRecord) == 32 && offsetof(Source, type) == 96, "no padding");

enum { RECORD_BYTES = offsetof(Source, type) };  // a tensor's record is the beginning of a Source

// Appends the configuration to `to` or, if that is NULL, reads it from the cursor.
static bool transfer_config(Model *m, Cursor from, Buffer *to, Error *e) {
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++) {
        ConfigRecord record = { .count = (uint32_t)n_values(m, f) }, found;
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
    return from.left == 0 || refuse(e, "the configuration has %zu bytes more than expected", from.left);
}

static bool read_tensor_records(const FileHeader *h, Cursor c, Model *m, Error *e) {
    if (h->n_tensors > MAX_TENSORS || h->n_tensors != c.left / RECORD_BYTES || c.left % RECORD_BYTES)
        return refuse(e, "%u tensors in a table of %zu bytes", h->n_tensors, c.left);
    if (!(m->sources = allocate(h->n_tensors, sizeof *m->sources, e))) return false;
    for (; m->n_sources < h->n_tensors; m->n_sources++) {
        Source *s = &m->sources[m->n_sources];
        take_into(&c, s, RECORD_BYTES);
        s->name[NAME_BYTES - 1] = 0;
        s->at -= h->weights.at;
    }
    return true;
}

// A parser sets a model's vocabulary and template and, for the `whole` model, its configuration and sources.
static bool parse_native(Cursor file, Model *m, bool whole, Error *e) {
    FileHeader h;
    Cursor c = file, sections[N_SECTIONS];
    take_into(&c, &h, sizeof h);
    if (c.bad) return refuse(e, "%zu bytes, expected a header of %zu", file.left, sizeof h);
    size_t n_bytes = (size_t)h.file_bytes;
    if (h.layout != LAYOUT)
        return refuse(e, "layout %u, expected %d: make it again: ./run SOURCE -m export -o FILE", h.layout, LAYOUT);
    if (n_bytes != file.left) return refuse(e, "%zu bytes, expected %zu: not copied whole?", file.left, n_bytes);
    for (int i = 0; i < N_SECTIONS; i++) {
        Section s = h.sections[i];
        if (s.at > file.left || s.n_bytes > file.left - s.at || s.at % 64)
            return refuse(e, "a section is outside the file or misaligned");
        sections[i] = (Cursor){ file.at + s.at, (size_t)s.n_bytes, false };
    }
    m->vocabulary = sections[TOKENIZER].at;
    m->vocabulary_bytes = sections[TOKENIZER].left;
    m->chat_template = (Text){ (const char *)sections[CHAT_TEMPLATE].at, sections[CHAT_TEMPLATE].left };
    if (!whole) return true;
    snprintf(m->config.family, sizeof m->config.family, "%.15s", h.family);
    return transfer_config(m, sections[CONFIG], NULL, e) && check_config(m, e) &&
           read_tensor_records(&h, sections[TENSORS], m, e) &&
           place_sources(m->sources, m->n_sources, sections[WEIGHTS], 64, e);
}

// A file being written: under a temporary name, which becomes `path` only when all of it is on disk. What is no regular
// file, such as a pipe, is written to directly. So is stdout's file: it is appended to.
typedef struct {
    FILE *stream;
    char path[PATH_BYTES], temporary[PATH_BYTES + 32];  // without symbolic links; "": there is no other name
} Output;

static char *volatile unfinished;  // the temporary file that there is now, for the signals of chapter 14

static bool open_output(Output *o, const char *path, Error *e) {
    struct stat info, out;
    o->stream = NULL;
    o->temporary[0] = 0;
    if (!path) return fail(e, MISUSE, "-m %s needs -o FILE to write to", options.mode);
    bool exists = stat(path, &info) == 0, is_file = exists && S_ISREG(info.st_mode);
    bool is_stdout = exists && !fstat(1, &out) && out.st_dev == info.st_dev && out.st_ino == info.st_ino;
    snprintf(o->path, sizeof o->path, "%s", path);
    if (exists ? access(path, W_OK) || (is_file && !realpath(path, o->path)) : errno != ENOENT)
        return fail(e, io_status(), "%s: %s", path, strerror(errno));
    if (!exists && lstat(path, &info) == 0) return fail(e, BROKEN_IO, "%s: a symbolic link to nothing", path);
    if (is_stdout || (exists && !is_file)) {
        o->stream = is_stdout ? fdopen(dup(1), "wb") : fopen(path, "wb");
    } else {
        snprintf(o->temporary, sizeof o->temporary, "%s.%ld.tmp", o->path, (long)getpid());
        unlink(unfinished = o->temporary);  // left by a process of the same number that was killed
        int file = open(o->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        bool same_mode = file >= 0 && (!is_file || fchmod(file, info.st_mode & 0777) == 0);
        o->stream = same_mode ? fdopen(file, "wb") : NULL;
        if (file >= 0 && !o->stream) close(file);
    }
    return o->stream || fail(e, io_status(), "%s: cannot be written: %s", path, strerror(errno));
}

// Completes the file if all went well so far (ok), else removes it and returns false.
static bool close_output(Output *o, bool ok, Error *e) {
    bool written = o->stream && !ferror(o->stream) && fflush(o->stream) == 0;
    written = written && (!*o->temporary || fsync(fileno(o->stream)) == 0);
    if (o->stream) written = fclose(o->stream) == 0 && written;
    written = written && ok && (!*o->temporary || rename(o->temporary, o->path) == 0);
    if (ok && !written) fail(e, BROKEN_IO, "%s: cannot be written: %s", o->path, strerror(errno));
    if (!written) unlink(o->temporary);
    unfinished = NULL;
    return written;
}

// What -m export writes matrices in, beside single types: the model's own; Q8 where errors show most, else Q4M.
enum { KEEP = N_TYPES, MIXED };
static bool find_choice(const char *name, int *choice, Error *e) {
    for (*choice = 0; *choice < N_TYPES; ++*choice)
        if (is_writable((Type)*choice) && !strcmp(name, types[*choice].name)) return true;
    *choice = strcmp(name, "keep") ? MIXED : KEEP;
    return *choice == KEEP || !strcmp(name, "mixed") ||
           fail(e, MISUSE, "--type %s: expected keep, f32, f16, bf16, q8, q4, q4m or mixed", name);
}

// The type in which a slot is written. Vectors and routers stay f32; columns that are no whole blocks become f16.
static Type exported_type(const Slot *s, int choice) {
    if (choice == KEEP || s->is_vector) return s->type;
    if (s->rule->rows == N_EXPERTS) return F32;
    bool shows_most = s->layer < 0 || s->rule->offset == offsetof(Layer, down) ||
                      s->rule->offset == offsetof(Layer, value) || strstr(s->source->name, ".attn_qkv.");
    Type type = choice != MIXED ? (Type)choice : shows_most ? Q8 : Q4M;
    return is_quantised(type) && s->cols % BLOCK ? F16 : type;
}

// Appends the tensor records, counts them in h, and sets h->file_bytes to where the weights will end.
static bool append_tensor_records(const Model *m, int choice, Buffer *b, FileHeader *h, Error *e) {
    for (const Slot *s = m->slots; s < m->slots + m->n_slots; s++) h->n_tensors += s->source != NULL;
    h->file_bytes = round_up(b->n + h->n_tensors * RECORD_BYTES, 64) + round_up(m->vocabulary_bytes, 64) +
                    round_up(m->chat_template.n, 64);
    for (size_t i = 0; i < m->n_slots; i++) {
        Slot s = m->slots[i];
        if (!s.source) continue;
        s.type = exported_type(&s, choice);
        Source record = { "", s.is_vector ? VECTOR : s.type, (uint32_t)s.rows, (uint32_t)s.cols, (uint32_t)s.n,
                          .at = h->file_bytes, .n_bytes = slot_bytes(&s) };
        memcpy(record.name, s.name, NAME_BYTES);
        if (!append(b, &record, RECORD_BYTES, e)) return false;
        h->file_bytes = round_up(h->file_bytes + record.n_bytes, 64);
    }
    return true;
}

// Some row tiles of a slot on their way into a file: those of all its matrices are one list.
typedef struct {
    const Slot *slot;
    Tensor from, to;               // .tiles: the first of these row tiles, as the model has them and as the file will
    unsigned char *packed, *made;  // room for them, where the model has not packed them, and where types differ
    Loss *losses;                  // of each
    size_t first, n;
    atomic_bool broken;            // a number is not finite, before or after
} Conversion;

static void convert_team(void *p, Team *team) {
    Conversion *c = p;
    size_t n_tiles = n_row_tiles(&c->from), from_bytes = row_tile_bytes(&c->from), to_bytes = row_tile_bytes(&c->to);
    for (Range chunk; take_chunk(team, c->n, 1, &chunk);) {
        for (size_t i = chunk.from; i < chunk.to; i++) {
            size_t tile = (c->first + i) % n_tiles, left = (size_t)c->from.rows - tile * TILE_ROWS;
            unsigned char *from = (unsigned char *)c->from.tiles + i * from_bytes, *to = c->made + i * to_bytes;
            if (!c->slot->data) {
                Source part = matrix_source(c->slot, (c->first + i) / n_tiles);
                pack_rows(from, &part, (Range){ tile, tile + 1 });
                give_back(&part, (Range){ tile, tile + 1 });
            }
            if (broken_row(&c->from, from) < TILE_ROWS) c->broken = true;
            if (c->to.type == c->from.type) continue;
            c->losses[i] = convert_row_tile(to, c->to.type, &c->from, from, left < TILE_ROWS ? left : TILE_ROWS);
            if (broken_row(&c->to, to) < TILE_ROWS) c->broken = true;
        }
    }
}

// Writes a slot in this type, and its padding. Memory never holds a whole tensor. With --report, says what is lost.
static bool write_slot(const Slot *slot, Type type, FILE *stream, Error *e) {
    static const char zeros[64];
    enum { AT_ONCE = 16 << 20 };  // bytes: row tiles for every thread, and reading and writing in long pieces
    Conversion c = { .slot = slot, .from = slot_matrix(slot), .to = { type, (int)slot->rows, (int)slot->cols, NULL } };
    size_t from_bytes = row_tile_bytes(&c.from), to_bytes = row_tile_bytes(&c.to);
    size_t n = slot->is_vector ? 0 : slot->n * n_row_tiles(&c.from), most = AT_ONCE / (from_bytes + to_bytes) + 1;
    size_t n_bytes = slot->is_vector ? slot_bytes(slot) : n * to_bytes;
    Loss all = { 0, 0, 0 };
    if (slot->is_vector) fwrite(slot->data ? slot->data : matrix_source(slot, 0).data, 1, n_bytes, stream);
    bool ok = true;
    if (!(c.packed = allocate(most, from_bytes + to_bytes + sizeof(Loss), e))) return false;
    c.made = c.packed + most * from_bytes;
    c.losses = (void *)(c.made + most * to_bytes);
    for (; ok && c.first < n && !ferror(stream); c.first += c.n) {
        c.n = n - c.first < most ? n - c.first : most;
        c.from.tiles = slot->data ? slot->data + c.first * from_bytes : c.packed;
        c.to.tiles = type == slot->type ? c.from.tiles : c.made;
        run_team(options.threads.n ? options.threads.at[0] : 1, 0, convert_team, &c);
        ok = !c.broken || (check_row_tiles(slot, &c.from, c.first, c.n, e) &&
                           check_row_tiles(slot, &c.to, c.first, c.n, e));
        if (ok) fwrite(c.to.tiles, to_bytes, c.n, stream);
        for (const Loss *l = c.losses; l < c.losses + c.n; l++)
            all = (Loss){ all.squares + l->squares, all.norm + l->norm, fmax(all.worst, l->worst) };
        if (interrupted) ok = fail(e, INTERRUPTED, "interrupted");
    }
    fwrite(zeros, 1, round_up(n_bytes, 64) - n_bytes, stream);
    if (ok && options.report && type != slot->type)
        fprintf(stderr, "%-32s %5s -> %-5s RMSE %9.3e  worst block %9.3e\n", slot->name, types[slot->type].name,
                types[type].name, all.norm > 0 ? sqrt(all.squares / all.norm) : 0, all.worst);
    free(c.packed);
    return ok;
}

// Ends a section of the file that is in the buffer, and begins the next.
static bool end_section(FileHeader *h, int section, Buffer *b, Error *e) {
    h->sections[section].n_bytes = b->n - h->sections[section].at;
    h->sections[section + 1].at = round_up(b->n, 64);
    return append(b, NULL, round_up(b->n, 64) - b->n, e);
}

// Writes the model as a native file, its matrices in the type that --type says.
static bool export_model(Model *m, const char *path, Error *e) {
    int choice;
    Buffer b = { 0 };  // all before the weights
    FileHeader h = { .layout = LAYOUT, .config = { .at = sizeof h } };
    memcpy(h.magic, native_magic, sizeof h.magic);
    snprintf(h.family, sizeof h.family, "%s", m->config.family);
    if (!find_choice(options.type ? options.type : "keep", &choice, e)) return false;
    struct stat from, to;
    bool is_itself = choice != KEEP && path && !stat(options.checkpoint, &from) && !stat(path, &to) &&
                     from.st_dev == to.st_dev && from.st_ino == to.st_ino;
    if (is_itself) return fail(e, MISUSE, "-o %.200s: the model itself; choose another name", path);
    bool ok = append(&b, NULL, sizeof h, e) &&
              transfer_config(m, (Cursor){ NULL, 0, false }, &b, e) && end_section(&h, CONFIG, &b, e) &&
              append_tensor_records(m, choice, &b, &h, e) && end_section(&h, TENSORS, &b, e) &&
              append(&b, m->vocabulary, m->vocabulary_bytes, e) && end_section(&h, TOKENIZER, &b, e) &&
              append(&b, m->chat_template.at, m->chat_template.n, e) && end_section(&h, CHAT_TEMPLATE, &b, e);
    h.weights.n_bytes = h.file_bytes - h.weights.at;
    Output out = { .stream = NULL };
    ok = ok && open_output(&out, path, e);
    if (ok) memcpy(b.bytes, &h, sizeof h), fwrite(b.bytes, 1, b.n, out.stream);
    double start = clock_seconds();
    for (size_t i = 0; ok && i < m->n_slots && !ferror(out.stream); i++) {
        const Slot *slot = &m->slots[i];
        if (slot->source) ok = write_slot(slot, exported_type(slot, choice), out.stream, e);
        if (!options.report) show_progress("writing tensor", start, i + 1, m->n_slots);
    }
    ok = close_output(&out, ok, e);  // which also finds out whether all was written
    free(b.bytes);
    return ok;
}

// ---- GGUF ----

// | "GGUF", version, n_tensors, n_keys | keys: name, type, value | tensors: name, shape, type, offset | data |
typedef enum {
    G_U8, G_I8, G_U16, G_I16, G_U32, G_I32, G_F32, G_BOOL, G_STRING, G_ARRAY, G_U64, G_I64, G_F64, N_G,
    G_INTEGER = N_G, G_NUMBER,  // what may be asked for: u or i; u, i or f
} GgufType;
static const struct { const char *name; unsigned char n_bytes; } gguf_types[] = {
    { "u8", 1 }, { "i8", 1 }, { "u16", 2 }, { "i16", 2 }, { "u32", 4 }, { "i32", 4 }, { "f32", 4 }, { "bool", 1 },
    { "string", 0 }, { "array", 0 }, { "u64", 8 }, { "i64", 8 }, { "f64", 8 }, { "integer", 0 }, { "number", 0 },
};

typedef struct {
    char name[128];  // cut where it is longer, which no key is that anything asks for
    GgufType type;   // of its items
    bool is_array, used;
    size_t count;
    Cursor value;    // its items
} Key;

typedef struct {
    Cursor rest;  // what has not been read ...
    size_t n_bytes;  // ... of so many bytes
    Key *keys;    // sorted by name
    size_t n_keys, n_tensors;
    char family[16];
    Error *error;  // of the first key asked for that is not as it must be ...
    bool bad;      // ... if there was one: a parser may ask for many keys and look once
} Gguf;

// How many bytes of a text a message shows.
static int shown(Text t) { return t.n < 64 ? (int)t.n : 64; }

static bool read_key(Cursor *c, Key *k, Error *e) {
    Text name = take_string(c);
    uint32_t type = take_u32(c);
    k->is_array = type == G_ARRAY;
    if (k->is_array) type = take_u32(c);
    k->count = k->is_array ? (size_t)take_u64(c) : 1;
    if (c->bad) return refuse(e, "the file ends within its keys");
    if (memchr(name.at, 0, name.n)) return refuse(e, "a key's name has a NUL in it");
    memcpy(k->name, name.at, name.n < sizeof k->name ? name.n : sizeof k->name - 1);
    if (type >= N_G || type == G_ARRAY) return refuse(e, "key %s has type %u, which is not known", k->name, type);
    k->type = (GgufType)type;
    k->value = *c;
    if (type != G_STRING) take(c, times(k->count, gguf_types[type].n_bytes));
    for (size_t i = 0; type == G_STRING && i < k->count && !c->bad; i++) take_string(c);
    k->value.left -= c->left;
    return !c->bad || refuse(e, "key %s is longer than the file", k->name);
}

// The key of that name, or NULL. A name that begins with a dot follows the family's name.
static Key *find_key(Gguf *g, const char *name) {
    char full[128];
    snprintf(full, sizeof full, "%s%s", name[0] == '.' ? g->family : "", name);
    Key *k = bsearch(full, g->keys, g->n_keys, sizeof *k, by_name);
    if (k) k->used = true;
    return k;
}

// Item i of a key that holds numbers, as a double: integers above 2^53, which no key needs, would be rounded.
static double key_number(const Key *k, size_t i) {
    union { uint64_t u; float f32; double f64; } x = { 0 };
    size_t n = gguf_types[k->type].n_bytes;
    memcpy(&x, k->value.at + i * n, n);
    if (k->type == G_F32) return (double)x.f32;
    if (k->type == G_F64) return x.f64;
    if (gguf_types[k->type].name[0] != 'i') return (double)x.u;
    return (double)((int64_t)(x.u << (64 - 8 * n)) >> (64 - 8 * n));  // a shift to the right copies the sign
}

// A copy of the key of that name, which must hold a value, or an array of values, of that type. Zeros if there is none.
static Key get_key(Gguf *g, const char *name, GgufType type, bool is_array) {
    const Key *k = find_key(g, name);
    const char *kinds = type == G_INTEGER ? "ui" : type == G_NUMBER ? "uif" : "";
    bool fits = k && k->is_array == is_array && (k->type == type || strchr(kinds, gguf_types[k->type].name[0]));
    if (k && !fits && !g->bad)
        g->bad = !refuse(g->error, "key %s is %s%s, expected %s %s", k->name, k->is_array ? "an array of " : "",
                         gguf_types[k->type].name,
                         is_array ? "an array of type" : type == G_INTEGER ? "an" : "a", gguf_types[type].name);
    return fits ? *k : (Key){ 0 };
}

// A key's number; `otherwise` if there is no such key.
static double get_value(Gguf *g, const char *name, GgufType type, double min, double max, double otherwise) {
    Key k = get_key(g, name, type, false);
    double x = k.value.at ? key_number(&k, 0) : otherwise;
    bool fits = !k.value.at || (x >= min && x <= max);
    if (!fits && !g->bad)
        g->bad = !refuse(g->error, "key %s is %.10g, expected %g to %g", k.name, x, min, max);
    return fits ? x : otherwise;
}

static double get_number(Gguf *g, const char *name, double min, double max, double otherwise) {
    return get_value(g, name, G_NUMBER, min, max, otherwise);
}

static int get_integer(Gguf *g, const char *name, int min, int max, int otherwise) {
    return (int)get_value(g, name, G_INTEGER, min, max, otherwise);
}

// 0 or 1; -1 if there is no such key.
static int get_flag(Gguf *g, const char *name) { return (int)get_value(g, name, G_BOOL, 0, 1, -1); }

// A token's id; -1 if the file has none, or one outside its vocabulary (2^32 - 1 often stands for none).
static int get_token(Gguf *g, const char *name, size_t n_tokens) {
    double id = get_value(g, name, G_INTEGER, -1, UINT32_MAX, -1);
    return id < fmin((double)n_tokens, MAX_TOKENS) ? (int)id : -1;
}

static Text get_text(Gguf *g, const char *name) {
    Key k = get_key(g, name, G_STRING, false);
    return take_string(&k.value);
}

// A key that no code has asked for may change what the model computes, if it is the family's or one of this table. So
// it is refused, unless its value switches its feature off: 0 or false, if the table has no other value (NAN: any).
static const struct { const char *key; double harmless; } other_keys[] = {
    { ".attention.causal", 1 }, { ".logit_scale", 1 }, { ".residual_scale", 1 }, { ".embedding_scale", 1 },
    { ".rope.scaling.finetuned", NAN }, { ".tensor_data_layout", NAN }, { ".rope.scaling.yarn_ext_factor", 1 },
    { ".vocab_size", NAN },  // the rows of the embedding count
    { "stablelm.use_parallel_residual", NAN },  // often set; the files that mean it have no ffn_norm.weight
    { ".expert_feed_forward_length", NAN },  // no code asks for it if there are no experts
    { ".expert_weights_norm", 1 }, { ".expert_weights_scale", 1 }, { ".expert_gating_func", 1 },  // 1: softmax
    { "tokenizer.ggml.precompiled_charsmap", 0 }, { "tokenizer.ggml.remove_extra_whitespaces", 0 },
};

static bool is_harmless(const Gguf *g, const Key *k, bool whole) {
    size_t n = strlen(g->family);
    bool is_ours = whole && !strncmp(k->name, g->family, n) && k->name[n] == '.';
    double harmless = is_ours ? 0 : NAN;
    for (size_t i = 0; i < sizeof other_keys / sizeof *other_keys; i++)
        if (!strcmp(k->name, other_keys[i].key) || (is_ours && !strcmp(k->name + n, other_keys[i].key)))
            harmless = other_keys[i].harmless;
    if (k->used || isnan(harmless)) return true;
    if (k->type == G_STRING) return false;
    for (size_t i = 0; i < k->count; i++) if (key_number(k, i) != harmless) return false;
    return true;
}

// A field's values from its key: one for all layers, or an array.
static bool get_field_of_key(Gguf *g, Model *m, const ConfigField *f, Error *e) {
    int features = find_family(g->family, e)->features, n = n_values(m, f);
    bool layer_norm = features & LAYER_NORMS && !strcmp(f->name, "norm_eps");
    const char *name = layer_norm ? ".attention.layer_norm_epsilon" : f->key;
    const Key *found = !f->feature || features & f->feature ? find_key(g, name) : NULL;
    if (!found && isnan(f->otherwise)) return refuse(e, "key %s%s is missing", g->family, name);
    if (!found && f->otherwise == 0) return true;
    Key k = { .count = 0 };
    if (found) k = get_key(g, name, f->type == INTEGER ? G_INTEGER : G_NUMBER, f->per_layer && found->is_array);
    if (g->bad) return false;
    if (k.is_array && k.count != (size_t)n)
        return refuse(e, "key %s%s has %zu values, expected one or %d", g->family, name, k.count, n);
    for (int l = 0; l < n; l++)
        if (!set_field(m, f, l, found ? key_number(&k, k.is_array ? (size_t)l : 0) : f->otherwise, e)) return false;
    return true;
}

// Sets what files of a family do not say. pattern: whether each layer has the window. If it is NULL, all have but the
// last of each `every` layers.
static void complete_config(Model *m, const Family *f, int every, const Key *pattern) {
    Config *c = &m->config;
    bool largest_gemma = f->features & GEMMA && (c->n_layers == 46 || c->n_layers == 62);
    if (!c->head_dim) c->head_dim = c->dim / m->layers->n_heads;
    if (!c->rope_dim) c->rope_dim = c->head_dim;
    c->logit_scale = 1 / c->logit_scale;  // Granite divides by it
    if (f->features & GEMMA) c->embedding_scale = sqrtf((float)c->dim), c->activation = GELU;
    if (f->features & CAPS && c->attention_cap == 0) c->attention_cap = 50;
    if (f->features & CAPS && c->logit_cap == 0) c->logit_cap = 30;
    float width = largest_gemma ? (float)c->dim / (float)m->layers->n_heads : (float)c->head_dim;
    if (c->attention_scale == 0) c->attention_scale = 1.0f / sqrtf(width);
    if (c->local_theta == 0 && f->local_theta < 0 && m->layers->window) c->local_theta = c->rope_theta;
    if (c->local_theta == 0) c->local_theta = fmax(f->local_theta, 0);
    for (int l = 0; l < c->n_layers; l++) {
        Layer *layer = &m->layers[l];
        if (pattern ? !key_number(pattern, (size_t)l) : every && (l + 1) % every == 0) layer->window = 0;
        bool rotates = !f->no_rope_every || (l + 1) % f->no_rope_every;
        layer->angles = !rotates ? UNROTATED : layer->window && c->local_theta > 0 ? LOCAL : ROTATED;
    }
}

// How the angles are scaled. has_factors: LongRoPE's tensors are there; some files say it in no other way.
static bool read_gguf_scaling(Gguf *g, Config *c, bool has_factors, Error *e) {
    Text type = get_text(g, ".rope.scaling.type");
    bool none = is_text(type, "none"), yarn = is_text(type, "yarn"), longrope = is_text(type, "longrope");
    double factor = get_number(g, ".rope.scaling.factor", 0, 1e6, get_number(g, ".rope.scale_linear", 1e-6, 1e6, 1));
    double original = c->original_context, magnitude = 1;
    c->rope_scale = factor == 0 || none ? 1 : factor;
    if (yarn) {  // the magnitude is 1 + 0.1 ln(factor), or that over the same with a multiplier of the logarithm
        double x = 0.1 * log(fmax(factor, 1)), all = get_number(g, ".rope.scaling.yarn_log_multiplier", 0, 1e6, 0);
        magnitude = (1 + x) / (1 + all * x);
        c->yarn_fast = get_number(g, ".rope.scaling.yarn_beta_fast", 1e-6, 1e6, 32);
        c->yarn_slow = get_number(g, ".rope.scaling.yarn_beta_slow", 1e-6, 1e6, 1);
        get_number(g, ".rope.scaling.yarn_attn_factor", magnitude * 0.9999, magnitude * 1.0001, 1);
    }
    double usual = original > 0 && has_factors ? sqrt(1 + log(fmax(c->context / original, 1)) / log(original)) : 1;
    c->rope_magnitude = magnitude * (c->rope_magnitude > 0 ? c->rope_magnitude : usual);
    return !type.at || none || yarn || (longrope && has_factors) || is_text(type, "linear") ||
           refuse(e, "rope scaling \"%.*s\" %s", shown(type), type.at,
                  longrope ? "needs rope_factors_long.weight" : "is not implemented");
}

static bool read_gguf_config(Gguf *g, Model *m, Error *e) {
    Config *c = &m->config;
    snprintf(c->family, sizeof c->family, "%s", g->family);
    qsort(m->sources, m->n_sources, sizeof *m->sources, by_name);
    const Source *embedding = find_source(m, "token_embd.weight");
    if (!m->n_sources) return refuse(e, "no tensors, only a vocabulary: enough for -m tokenize and -m detokenize");
    if (!embedding) return refuse(e, "token_embd.weight is missing");
    c->n_tokens = (int)embedding->rows;
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++)
        if (f->key && !get_field_of_key(g, m, f, e)) return false;
    for (Layer *y = m->layers; y < m->layers + c->n_layers; y++) {
        if (!y->n_kv_heads) y->n_kv_heads = y->n_heads;
        if (y->n_experts) y->ffn_dim = get_integer(g, ".expert_feed_forward_length", 1, MAX_FFN_DIM, y->ffn_dim);
    }
    const Family *family = find_family(c->family, e);
    const char *name = ".attention.sliding_window_pattern";
    const Key *found = find_key(g, name), *pattern = found && found->is_array ? found : NULL;
    int every = pattern ? 0 : get_integer(g, name, 0, MAX_CONTEXT, family->global_every);
    if (pattern) get_key(g, name, pattern->type == G_BOOL ? G_BOOL : G_INTEGER, true);
    if (g->bad) return false;
    if (pattern && pattern->count != (size_t)c->n_layers)
        return refuse(e, "key %s has %zu values, expected %d", pattern->name, pattern->count, c->n_layers);
    complete_config(m, family, every, pattern);
    get_integer(g, ".attention.value_length", c->head_dim, c->head_dim, 0);
    return read_gguf_scaling(g, c, find_source(m, "rope_factors_long.weight"), e);
}

// The keys of a tokenizer's flags, from ADD_BOS to ADDED_FIRST.
static const char *const flag_keys[N_FLAGS] = {
    "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix",
    "tokenizer.ggml.ignore_merges", "tokenizer.ggml.normalizer.nfc", "tokenizer.ggml.space_prefix.first",
    "tokenizer.ggml.space_prefix.unless_space", "tokenizer.ggml.added_tokens_first",
    "tokenizer.ggml.space_prefix.last", "tokenizer.ggml.takes_white", "tokenizer.ggml.text_begin_ids",
};

// The ids of one of export_model.py's own keys, -1 after them. Returns whether there is such a key.
static bool get_around(Gguf *g, const char *name, int *ids) {
    Key k = get_key(g, name, G_U32, true);
    if (k.count > MAX_AROUND && !g->bad) g->bad = !refuse(g->error, "key %s: more than %d ids", name, MAX_AROUND);
    for (size_t i = 0; i < MAX_AROUND; i++) {
        double id = i < k.count ? key_number(&k, i) : -1;
        if (id >= MAX_TOKENS && !g->bad) g->bad = !refuse(g->error, "key %s: no token has the id %.0f", name, id);
        ids[i] = g->bad ? -1 : (int)id;
    }
    return k.count > 0;
}

// Makes the tokenizer's section of a native file. False too if any key asked for before was bad.
static bool read_gguf_vocabulary(Gguf *g, Model *m, Error *e) {
    m->chat_template = get_text(g, "tokenizer.chat_template");
    Text model = get_text(g, "tokenizer.ggml.model"), pre = get_text(g, "tokenizer.ggml.pre");
    bool spm = is_text(model, "llama");  // nothing else has a use for scores
    Key pieces = get_key(g, "tokenizer.ggml.tokens", G_STRING, true), scores = { 0 };
    if (spm) scores = get_key(g, "tokenizer.ggml.scores", G_F32, true);
    Key piece_types = get_key(g, "tokenizer.ggml.token_type", G_I32, true);
    Key merges = get_key(g, "tokenizer.ggml.merges", G_STRING, true);
    Key ends = get_key(g, "tokenizer.ggml.end_token_ids", G_U32, true);  // export_model.py's own, as is the next
    Key takes = get_key(g, "tokenizer.ggml.takes_white", G_I32, true);
    Text name = get_text(g, "general.name");
    bool phi3 = false;
    for (size_t i = 0; i + 4 <= name.n; i++)
        phi3 = phi3 || ((name.at[i] | 32) == 'p' && (name.at[i + 1] | 32) == 'h' && (name.at[i + 2] | 32) == 'i' &&
                        name.at[i + 3 + (name.at[i + 3] == '-' && i + 4 < name.n)] == '3');
    Vocabulary v = {
        .kind = spm ? SPM : BPE, .pre = options.pre ? (Text){ options.pre, strlen(options.pre) } : pre,
        .n_tokens = pieces.count, .pieces = pieces.value, .n_merges = merges.count, .merges = merges.value,
        .scores = scores.value.at, .types = piece_types.value.at, .takes = takes.value.at, .phi3 = phi3,
        .ends = ends.value.at, .n_ends = ends.count < 64 ? ends.count : 64,
        .bos = get_token(g, "tokenizer.ggml.bos_token_id", pieces.count),
        .eos = get_token(g, "tokenizer.ggml.eos_token_id", pieces.count),
        .eot = get_token(g, "tokenizer.ggml.eot_token_id", pieces.count),
        .eom = get_token(g, "tokenizer.ggml.eom_token_id", pieces.count),
        .unk = get_token(g, "tokenizer.ggml.unknown_token_id", pieces.count),
    };
    for (int i = 0; i < N_FLAGS - 2; i++) v.says[i] = get_flag(g, flag_keys[i]);
    v.says[N_FLAGS - 2] = takes.value.at || phi3;
    bool begins = get_around(g, "tokenizer.ggml.text_begin_ids", v.around[0]);
    v.says[N_FLAGS - 1] = get_around(g, "tokenizer.ggml.text_end_ids", v.around[1]) || begins;
    if (g->bad) return false;
    if (v.kind == BPE && !is_text(model, "gpt2"))
        return refuse(e, "tokenizer.ggml.model \"%.*s\" is unknown", shown(model), model.at ? model.at : "");
    if ((v.scores && scores.count != v.n_tokens) || (v.types && piece_types.count != v.n_tokens) ||
        (v.takes && takes.count != v.n_tokens))
        return refuse(e, "%zu tokens, %zu scores, %zu types", v.n_tokens, scores.count, piece_types.count);
    return pack_vocabulary(&v, &m->packed_vocabulary, e);
}

// Reads a tensor's name, shape, type and offset. place_sources() finds its data, bind_slot() checks its shape.
static bool read_gguf_tensor(Cursor *c, Source *s, Error *e) {
    Text name = take_string(c);
    uint32_t n_dims = take_u32(c);
    uint64_t dims[4] = { 1, 1, 1, 1 };
    for (uint32_t i = 0; i < n_dims && i < 4; i++) dims[i] = take_u64(c);
    uint32_t type = take_u32(c);
    s->at = take_u64(c);
    if (c->bad) return refuse(e, "the file ends within its list of tensors");
    if (name.n == 0 || name.n >= NAME_BYTES || memchr(name.at, 0, name.n))
        return refuse(e, "a tensor's name has %zu bytes or a NUL", name.n);
    memcpy(s->name, name.at, name.n);
    if (n_dims > 4 || dims[3] != 1 || (dims[0] | dims[1] | dims[2]) > UINT32_MAX)
        return refuse(e, "%s has %u dimensions, expected 1 to 3 of at most 32 bits", s->name, n_dims);
    for (int i = 0; i < N_SOURCE_TYPES; i++) if (source_types[i].gguf_id == (int64_t)type) s->type = &source_types[i];
    if (!s->type) return refuse(e, "%s is of GGUF type %u, which is not supported", s->name, type);
    s->tiles = s->type->tile;
    s->cols = (uint32_t)dims[0];
    s->rows = (uint32_t)dims[1];
    s->n = (uint32_t)dims[2];
    s->n_bytes = times(s->n, source_bytes(s));
    return true;
}

// Adds the tensors of a file, or of a part of a split one, to the model's sources.
static bool read_gguf_tensors(Gguf *g, Model *m, Error *e) {
    Cursor *c = &g->rest;
    size_t n = g->n_tensors, before = m->n_sources, parts = m->n_parts + 1;
    size_t count = (size_t)get_integer(g, "split.count", 1, 65535, 1);
    size_t step = (size_t)get_integer(g, "general.alignment", 8, 1 << 20, 32);
    if (g->bad) return false;
    if (count != parts) return refuse(e, "one of %zu parts of a split GGUF, but of %zu by its name", count, parts);
    if (step & (step - 1)) return refuse(e, "key general.alignment is %zu, expected a power of two", step);
    if (n > MAX_TENSORS - before || n > c->left / 24)  // 24: a tensor's bytes without its name and dimensions
        return refuse(e, "claims to have %zu tensors; %zu bytes are left", n, c->left);
    Buffer all = { (void *)m->sources, before * sizeof *m->sources, before * sizeof *m->sources };
    if (!append(&all, NULL, (n + 1) * sizeof *m->sources, e)) return false;  // one more, so that it is never 0
    m->sources = (void *)all.bytes;
    for (; m->n_sources < before + n; m->n_sources++)
        if (!read_gguf_tensor(c, &m->sources[m->n_sources], e)) return false;
    size_t n_read = g->n_bytes - c->left;
    take(c, round_up(n_read, step) - n_read);
    return place_sources(m->sources + before, n, *c, step, e);
}

// Reads the header and all keys; what is left are the tensors. The caller frees g->keys.
static bool read_gguf_keys(Gguf *g, Error *e) {
    Cursor *c = &g->rest;
    uint32_t magic = take_u32(c), version = take_u32(c);
    g->n_tensors = (size_t)take_u64(c);
    size_t n_keys = (size_t)take_u64(c);
    if (c->bad || magic != 0x46554747) return refuse(e, "the file ends within its header");
    if (version != 2 && version != 3) return refuse(e, "has GGUF version %u, expected 2 or 3", version);
    if (n_keys > MAX_KEYS || n_keys > c->left / 13)  // 13: the least bytes of a key
        return refuse(e, "claims to have %zu keys; %zu bytes are left", n_keys, c->left);
    if (!(g->keys = allocate(n_keys, sizeof *g->keys, e))) return false;
    for (; g->n_keys < n_keys; g->n_keys++) if (!read_key(c, &g->keys[g->n_keys], e)) return false;
    qsort(g->keys, g->n_keys, sizeof *g->keys, by_name);
    for (const Key *k = g->keys; k + 1 < g->keys + g->n_keys; k++)
        if (by_name(k, k + 1) == 0 && strlen(k->name) < sizeof k->name - 1)
            return refuse(e, "key %s is there twice", k->name);
    Text family = get_text(g, "general.architecture");
    snprintf(g->family, sizeof g->family, "%.*s", shown(family), family.at ? family.at : "");
    if (family.at && memchr(family.at, 0, family.n)) return refuse(e, "key general.architecture has a NUL in it");
    return !g->bad;
}

static bool parse_gguf(Cursor file, Model *m, bool whole, Error *e) {
    Gguf g = { .rest = file, .n_bytes = file.left, .error = e };
    bool ok = read_gguf_keys(&g, e) && (*g.family || refuse(e, "key general.architecture is missing, or empty")) &&
              (!whole || (find_family(g.family, e) && read_gguf_tensors(&g, m, e)));
    for (size_t i = 0; whole && ok && i < m->n_parts; i++) {
        size_t n_bytes = m->parts[i].n_bytes;
        Gguf part = { .rest = { m->parts[i].bytes, n_bytes, false }, .n_bytes = n_bytes, .error = e };
        ok = (read_gguf_keys(&part, e) && read_gguf_tensors(&part, m, e)) || in_part(i + 2, e);
        free(part.keys);
    }
    int has = (int)m->n_sources, n = whole && ok ? get_integer(&g, "split.tensors.count", 0, MAX_TENSORS, has) : 0;
    if (whole && ok && n != has) ok = refuse(e, "has %d tensors, key split.tensors.count says %d", has, n);
    ok = ok && (!whole || read_gguf_config(&g, m, e)) && read_gguf_vocabulary(&g, m, e);
    for (const Key *k = g.keys; ok && k < g.keys + g.n_keys; k++)
        if (!is_harmless(&g, k, whole))
            ok = refuse(e, "key %s asks for something that is not implemented", k->name);
    ok = ok && (!whole || check_config(m, e));
    free(g.keys);
    return ok;
}

// ---- llama2.c ----

// v0: seven integers, then floats. v1: a header of 256 bytes, then floats. v2: the same header, vectors of floats,
// matrices of int8 in groups. The tensors come in this order, those of one name by layer; from v1 on, all vectors come
// before all matrices. "" stands for v0's table of angles.
static const char *const llama2c_order[] = {
    "token_embd.weight", "blk.%d.attn_norm.weight", "blk.%d.attn_q.weight", "blk.%d.attn_k.weight",
    "blk.%d.attn_v.weight", "blk.%d.attn_output.weight", "blk.%d.ffn_norm.weight", "blk.%d.ffn_gate%s.weight",
    "blk.%d.ffn_down%s.weight", "blk.%d.ffn_up%s.weight", "output_norm.weight", "", "output.weight",
};
enum { N_LLAMA2C = sizeof llama2c_order / sizeof *llama2c_order };

static bool read_llama2c_tensors(Model *m, Cursor *c, int version, bool shared, size_t group, Error *e) {
    if (!(m->sources = allocate(m->n_slots, sizeof *m->sources, e))) return false;
    for (int i = 0; i < (version ? 2 : 1) * N_LLAMA2C; i++) {
        const char *name = llama2c_order[i % N_LLAMA2C];
        if (!*name && !version) take(c, (size_t)m->config.context * (size_t)m->config.head_dim * 4);
        if (shared && !strcmp(name, "output.weight")) continue;
        for (const Slot *slot = m->slots; slot < m->slots + m->n_slots; slot++) {
            if (strcmp(slot->rule->name, name) || (version && slot->is_vector != (i < N_LLAMA2C))) continue;
            bool grouped = group && !slot->is_vector;
            if (grouped && (slot->cols % group || group % 32))
                return refuse(e, "%s: groups of %zu do not fit %zu columns", slot->name, group, slot->cols);
            Source *s = &m->sources[m->n_sources++];
            *s = (Source){ .type = &source_types[grouped ? SOURCE_GROUPS : SOURCE_F32], .rows = slot->rows,
                           .cols = slot->cols, .n = 1, .tiles = grouped ? Q8F : F32, .data = c->at, .group = group };
            memcpy(s->name, slot->name, NAME_BYTES);
            s->n_bytes = source_bytes(s);
            take(c, s->n_bytes);
            if (grouped) s->scales = take(c, times(s->rows, s->cols) / group * 4);
            if (c->bad) return refuse(e, "the file ends within %s: not copied whole?", s->name);
        }
    }
    return c->left == 0 || refuse(e, "%zu bytes are left after the weights that its header asks for", c->left);
}

static bool parse_llama2c(Cursor file, Model *m, bool whole, Error *e) {
    if (!whole) return read_llama2c_tokenizer(file, &m->packed_vocabulary, e);
    Cursor c = file;
    struct { int32_t dim, ffn_dim, n_layers, n_heads, n_kv_heads, n_tokens, context; } h;
    bool is_v0 = file.left < 4 || memcmp(file.at, "24ka", 4);  // 0x616b3432, "ak42", little-endian
    uint32_t version = is_v0 ? 0 : (take_u32(&c), take_u32(&c));
    int32_t group = 0;
    if (!is_v0 && version != 1 && version != 2) return refuse(e, "llama2.c's version %u, expected 1 or 2", version);
    take_into(&c, &h, sizeof h);
    uint8_t shared = h.n_tokens > 0;  // v0: a negative number says that the head has weights of its own
    if (!version && h.n_tokens < 0 && h.n_tokens > INT32_MIN) h.n_tokens = -h.n_tokens;
    if (version) take_into(&c, &shared, sizeof shared);
    if (shared > 1) return refuse(e, "its shared-classifier byte is %d, expected 0 or 1", shared);
    if (version == 2) take_into(&c, &group, sizeof group);
    if (version) take(&c, 256 - (size_t)(c.at - file.at));  // a file that ends before has no heads, or no tensors
    if (h.n_heads < 1 || h.dim % h.n_heads || (version == 2 && group < 1))
        return refuse(e, "is no checkpoint that cria knows: GGUF, its own, or llama2.c's");
    m->config = (Config){ .family = "llama", .n_layers = h.n_layers, .dim = h.dim, .n_tokens = h.n_tokens,
                          .context = h.context, .norm_eps = 1e-5f, .rope_theta = 10000, .rope_scale = 1,
                          .rope_magnitude = 1, .embedding_scale = 1, .residual_scale = 1, .logit_scale = 1 };
    if (!set_field(m, &config_fields[0], 0, h.n_layers, e)) return false;
    for (int l = 0; l < h.n_layers; l++)
        m->layers[l] = (Layer){ .n_heads = h.n_heads, .n_kv_heads = h.n_kv_heads, .ffn_dim = h.ffn_dim };
    complete_config(m, families, 0, NULL);
    return check_config(m, e) && read_llama2c_tensors(m, &c, (int)version, shared, (size_t)group, e);
}

// ---- Any of them ----

typedef enum { LLAMA2C, NATIVE, GGUF } Container;
typedef bool Parser(Cursor file, Model *m, bool whole, Error *e);

// Kinds of files, by what they have at a place: those that can be opened, then what people take for a checkpoint. The
// first kind has no sign: it is what no other row fits.
static const struct { size_t at; const char *sign, *thing; Parser *parse; } file_kinds[] = {
    [LLAMA2C] = { 0, "", "llama2.c", parse_llama2c },
    [NATIVE] = { 0, native_magic, "cria", parse_native },
    [GGUF] = { 0, "GGUF", "GGUF", parse_gguf },
    { 0, "PK\3\4", "a zip archive or PyTorch file; for a model: python3 export_model.py FOLDER -o model.bin", NULL },
    { 8, "{\"", "a safetensors file; convert its folder: python3 export_model.py FOLDER -o model.bin", NULL },
    { 0, "version ", "a Git LFS pointer: the file itself was not fetched (git lfs pull)", NULL },
    { 0, "<!", "a web page: was it the right link?", NULL }, { 0, "<h", "a web page: was it the right link?", NULL },
    { 0, "FUGG", "a big-endian GGUF, which is not supported", NULL }, { 0, "\177ELF", "a program", NULL },
};

// The file's kind: a Container or, of a mistake, another row.
static size_t recognise(const unsigned char *bytes, size_t n) {
    size_t kind = sizeof file_kinds / sizeof *file_kinds - 1;
    for (; kind > 0; kind--) {
        size_t at = file_kinds[kind].at, length = strlen(file_kinds[kind].sign);
        if (n >= at + length && !memcmp(bytes + at, file_kinds[kind].sign, length)) break;
    }
    return kind;
}

// Parses the file and opens its vocabulary, which replaces the model's. The model must have as many tokens, if it has
// weights; of the whole model, the vocabulary may be missing.
static bool parse_file(Cursor file, Model *m, bool whole, Error *e) {
    size_t kind = recognise(file.at, file.left);
    const char *path = file.at == m->file.bytes ? m->file.path : "FILE";
    if (!file_kinds[kind].parse) return refuse(e, "is %s", file_kinds[kind].thing);
    if (kind == LLAMA2C && !memchr(file.at, 0, file.left < 64 ? file.left : 64))  // small numbers have bytes of 0
        return refuse(e, "not a model; if it is a text, as a prompt: -f %s", path);
    const Buffer *made = &m->packed_vocabulary;
    close_tokenizer(&m->tokenizer);
    m->vocabulary = NULL;
    m->vocabulary_bytes = m->packed_vocabulary.n = 0;
    if (!file_kinds[kind].parse(file, m, whole, e)) return false;
    if (made->n) m->vocabulary = made->bytes, m->vocabulary_bytes = made->n;
    if (m->vocabulary && !open_tokenizer(m->vocabulary, m->vocabulary_bytes, &m->tokenizer, e)) return false;
    int n = m->tokenizer.n_tokens, wanted = m->config.n_tokens;
    if (!wanted) m->config.n_tokens = n;
    return !wanted || n == wanted || (whole && n == 0) ||
           refuse(e, "the tokenizer has %d tokens, the model has %d", n, wanted);
}

// Opens a model from a file's bytes; with 0 threads, without its weights; with -1, without packing them, which
// export_model() does as it writes them. Even after a failure, the caller closes it.
static bool open_model(const unsigned char *bytes, size_t n_bytes, int threads, Model *m, Error *e) {
    return parse_file((Cursor){ bytes, n_bytes, false }, m, true, e) && (threads == 0 || bind_model(m, threads, e));
}

// Opens the tokenizer of any file that has one. It must have n_tokens tokens; -1: any number.
static bool open_vocabulary(const unsigned char *bytes, size_t n_bytes, int n_tokens, Model *m, Error *e) {
    m->config.n_tokens = n_tokens < 0 ? 0 : n_tokens;
    return parse_file((Cursor){ bytes, n_bytes, false }, m, false, e);
}

static void close_model(Model *m) {
    close_tokenizer(&m->tokenizer);
    free(m->packed_vocabulary.bytes);
    free(m->layers);
    free(m->slots);
    free(m->sources);
    if (m->packed) munmap(m->packed, m->packed_bytes);
    if (m->file.bytes) munmap((void *)m->file.bytes, m->file.n_bytes);
    for (size_t i = 0; i < m->n_parts; i++) munmap((void *)m->parts[i].bytes, m->parts[i].n_bytes);
    free(m->parts);
    if (m->tokenizer_file.bytes) munmap((void *)m->tokenizer_file.bytes, m->tokenizer_file.n_bytes);
    *m = (Model){ 0 };
}

/* ==== 11. Experts, long texts, likely tokens, memory ================================================================
   What only some models, texts and samplers need; the memory of all, and what of it can be kept in a file. */

// ---- Experts ----

// Each token visits a few experts, whose results are added up, each times its weight (Shazeer et al., "Outrageously
// Large Neural Networks"). An expert takes all its visitors of a pass at once, so that its weights are read once.
struct Experts {
    size_t routes_stride;  // E up to a multiple of 16
    float *routes;         // (B, E)    the weight of each expert's result for a token; 0: not visited
    int *visitors;         // (visits)  the tokens that visit expert 0, expert 1, ...
    int *first_visit;      // (E+1)     where each one's begin
    float *out;            // (B, D)    what an expert makes of its visitors
};

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

// Chooses each token's experts, and prepares the tokens as their input, expert by expert.
static Activations route(const Model *m, Workspace *w, int l, Team *team) {
    const Layer *layer = &m->layers[l];
    const Experts *x = w->experts;
    size_t n_experts = (size_t)layer->n_experts;
    Vectors v = { w->x, w->x_stride, NULL, (size_t)m->config.dim, w->n };
    Activations input = prepare(m, w, &v, layer->ffn_norm, layer->ffn_norm_bias, FFN_NORM, l, team);
    multiply_all(&(Product){ x->routes, x->routes_stride, &layer->router, NULL }, 1, &input, team);
    end_step(team, ROUTER, l);
    for (Range r; take_chunk(team, (size_t)w->n, 1, &r);) {
        for (size_t t = r.from; t < r.to; t++)
            choose_experts(x->routes + t * x->routes_stride, layer->n_experts, layer->n_experts_used);
        memset(w->out + r.from * w->x_stride, 0, (r.to - r.from) * w->x_stride * sizeof *w->out);
    }
    end_step(team, CHOOSE_EXPERTS, l);
    for (size_t e = 0, i = 0; e < n_experts && team->thread == 0; x->first_visit[++e] = (int)i) {
        for (int t = 0; t < w->n; t++) if (x->routes[(size_t)t * x->routes_stride + e] != 0) x->visitors[i++] = t;
    }
    end_step(team, LIST_VISITORS, l);
    v = (Vectors){ layer->ffn_norm ? w->normed : w->x, w->x_stride, x->visitors, v.cols, x->first_visit[n_experts] };
    return prepare(m, w, &v, NULL, NULL, ROUND_VISITORS, l, team);
}

// The part of all visits that is expert e's.
static Activations visits(const Experts *x, size_t e, Activations all) {
    size_t first = (size_t)x->first_visit[e];
    return (Activations){ all.x, all.rounded, all.n, first, (size_t)x->first_visit[e + 1] - first, e };
}

// out += weight * what the expert has made, for each of its visitors
static void add_visits(const Workspace *w, const Activations *visits, Range rows) {
    const Experts *x = w->experts;
    for (size_t i = 0; i < visits->some; i++) {
        size_t t = (size_t)x->visitors[visits->first + i];
        const float *weight = x->routes + t * x->routes_stride + visits->expert, *y = x->out + i * w->x_stride;
        for (size_t r = rows.from; r < rows.to; r += 16)
            kernels->add_products(w->out + t * w->x_stride + r, 16, weight, 1, y + r, false, 0, 1, 1);
    }
}

// x += the sum over a token's experts of weight * W_down (activation(W_gate x) * W_up x), in the order of their numbers
static void experts_block(const Model *m, Workspace *w, int l, Team *team) {
    const Layer *layer = &m->layers[l];
    size_t n_experts = (size_t)layer->n_experts;
    Activations all = route(m, w, l, team), some;
    for (Range r; take_chunk(team, n_row_tiles(&layer->gate), tiles_together(&layer->gate, &all), &r);)
        for (size_t e = 0; e < n_experts; e++)
            if ((some = visits(w->experts, e, all)).some) make_hidden(m, w, layer, r, &some);
    end_step(team, GATE_UP, l);
    Vectors v = { w->gate, w->ffn_stride, NULL, (size_t)layer->ffn_dim, (int)all.n };
    all = prepare(m, w, &v, NULL, NULL, ROUND_HIDDEN, l, team);
    Product down = { w->experts->out, w->x_stride, &layer->down, layer->down_bias };
    for (Range r, rows; take_chunk(team, n_row_tiles(&layer->down), tiles_together(&layer->down, &all), &r);) {
        for (size_t e = 0; e < n_experts; e++) {
            if (!(some = visits(w->experts, e, all)).some) continue;
            rows = multiply_part(&down, r, &some);
            add_visits(w, &some, rows);
        }
        if (!layer->ffn_post_norm) add_out(m, w, (Range){ 0, (size_t)w->n }, rows);
    }
    end_block(m, w, layer->ffn_post_norm, DOWN, l, team);
}

// ---- Norms over all heads ----

// OLMo 2.
static void normalise_wide(const Model *m, Workspace *w, const Layer *layer, int l, Team *team) {
    size_t head_dim = (size_t)m->config.head_dim;
    float eps = m->config.norm_eps;
    for (Range r; take_chunk(team, (size_t)w->n, 1, &r);) {
        for (size_t t = r.from; t < r.to; t++) {
            float *query = w->query + t * w->q_stride, *key = w->key + t * w->kv_stride;
            kernels->normalise(query, query, layer->query_norm, NULL, (size_t)layer->n_heads * head_dim, eps);
            kernels->normalise(key, key, layer->key_norm, NULL, (size_t)layer->n_kv_heads * head_dim, eps);
        }
    }
    end_step(team, WIDE_HEAD_NORM, l);
}

// ---- One token far down a text ----

// Unit i of those that attend_deep() shares. After its totals is room for the largest score of each query and page.
static Attention deep_unit(const Model *m, const Workspace *w, int l, size_t i, size_t n_pages) {
    size_t n_kv_heads = (size_t)m->layers[l].n_kv_heads;
    Attention a = unit_of(m, w, l, (int)(i / n_kv_heads), 1, i % n_kv_heads);
    place_scratch(&a, w->scratch + i * (size_t)a.group * (2 * a.padded + a.score_stride + 1 + n_pages));
    return a;
}

// The positions of a page that a unit sees; none if they end before they begin.
static Range seen_in_page(const Attention *a, size_t page) {
    Range seen = all_seen(a);
    if (seen.from < page * PAGE) seen.from = page * PAGE;
    if (seen.to > page * PAGE + PAGE) seen.to = page * PAGE + PAGE;
    return seen;
}

// The largest score of query q, from those of its pages.
static float largest_score(const Attention *a, size_t q, size_t n_pages) {
    Range seen = all_seen(a);
    const float *of_page = a->totals + a->group + q * n_pages + seen.from / PAGE;
    return of_page[likeliest(of_page, (int)((seen.to - 1) / PAGE - seen.from / PAGE) + 1)];
}

// totals[q] = the sum of weights scores[q], position p in lane p mod 16
static void add_weights(const Attention *a) {
    Range seen = all_seen(a);
    for (int q = 0; q < a->group; q++) {
        float lane[16] = { 0 };
        const float *weights = a->scores + (size_t)q * a->score_stride;
        for (size_t p = seen.from; p < seen.to; p += 16)
            for (int j = 0; j < 16; j++) lane[j] += weights[p + (size_t)j];
        a->totals[q] = fold_lanes(lane);
    }
}

// For few tokens far down their texts, whose heads alone would leave threads idle: scores, their maximum and their
// exponentials are shared by pages, then the mix of values by columns. No sum is split: the bits are attend_unit()'s.
static void attend_deep(const Model *m, Workspace *w, int l, size_t n_pages, Team *team) {
    size_t n_units = (size_t)w->n * (size_t)m->layers[l].n_kv_heads;
    size_t n_columns = round_up((size_t)m->config.head_dim, 16);
    float max[MAX_HEADS], lane[16] = { 0 };
    for (Range r; take_chunk(team, n_units * n_pages, 1, &r);) {
        for (size_t i = r.from; i < r.to; i++) {
            Attention a = deep_unit(m, w, l, i / n_pages, n_pages);
            Range p = seen_in_page(&a, i % n_pages);
            size_t first = seen_from(&a, 0) > p.from ? seen_from(&a, 0) - p.from : 0;
            if (p.from < p.to) score_keys(&a, a.query, a.head_dim, p);
            for (size_t q = 0; q < (size_t)a.group && p.from < p.to; q++) {
                float *scores = a.scores + q * a.score_stride + p.from;
                float largest = kernels->scale_scores(scores, first, p.to - p.from, a.scale, a.cap);
                a.totals[(size_t)a.group + q * n_pages + i % n_pages] = largest;
            }
        }
    }
    end_step(team, SCORE, l);
    for (Range r; take_chunk(team, n_units * n_pages, 1, &r);) {
        for (size_t i = r.from; i < r.to; i++) {
            Attention a = deep_unit(m, w, l, i / n_pages, n_pages);
            Range p = seen_in_page(&a, i % n_pages);
            bool is_next_unit = i == r.from || i % n_pages == 0;
            for (size_t q = 0; q < (size_t)a.group && is_next_unit; q++) max[q] = largest_score(&a, q, n_pages);
            for (size_t q = 0; q < (size_t)a.group && p.from < p.to; q++)
                kernels->exponentiate(lane, a.scores + q * a.score_stride + p.from, p.to - p.from, max[q]);
        }
    }
    end_step(team, SOFTMAX, l);
    for (Range r; take_chunk(team, n_units * n_columns / 16, 1, &r);) {
        for (size_t i = r.from; i < r.to; i++) {
            Attention a = deep_unit(m, w, l, i * 16 / n_columns, n_pages);
            Range columns = { i * 16 % n_columns, i * 16 % n_columns + 16 };
            a.totals = max;  // each thread makes its own
            add_weights(&a);
            mix_values(&a, columns);
            divide_sums(&a, columns);
        }
    }
    end_step(team, MIX, l);
}

// ---- Rotations that are scaled ----

// The factor by which a pair's angle is divided. Linear scaling turns all pairs slower alike; YaRN not those that turn
// more than yarn_fast times in the original context, wholly those that turn less than yarn_slow times, and in part
// those between (Peng et al., "YaRN"). LLaMA 3.1 has a factor for each pair; LongRoPE too, and others where the context
// is longer than the original one (Ding et al., "LongRoPE").
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

// What pair i turns from a position to the next: theta^(-2i/R), the first pair fastest. A model sees how far apart two
// tokens are by how far their rotations differ (Su et al., "RoFormer").
static void make_turns(const Model *m, Rotation *a, int context) {
    const Config *c = &m->config;
    int half = c->rope_dim / 2;
    for (int i = 0; i < half; i++) {
        a->turns[i] = pow(c->rope_theta, -2.0 * i / c->rope_dim) / slow_down(m, context, i);
        if (c->local_theta > 0) a->turns[half + i] = pow(c->local_theta, -2.0 * i / c->rope_dim);
    }
}

// ---- Top-k, typical, top-p, min-p, XTC ----

// What changes the logits before a token is chosen.
typedef struct Shaper {
    const Tokenizer *tokenizer;
    float *logits;  // (V)  the changed ones
    float *bias;    // (V)  what is added to them
    int *seen;      // (V)  how often, or in how long a sequence, a token was seen; 0 between two calls
} Shaper;

static bool is_likelier(Candidate a, Candidate b) {
    return a.p > b.p || (a.p == b.p && a.id < b.id);
}

static void swap(Candidate *a, Candidate *b) {
    Candidate old = *a;
    *a = *b;
    *b = old;
}

// In a heap, c[i] sinks to where none below it is likelier.
static void sink(Candidate *c, size_t i, size_t n) {
    for (size_t child; (child = 2 * i + 1) < n; i = child) {
        if (child + 1 < n && is_likelier(c[child + 1], c[child])) child++;
        if (!is_likelier(c[child], c[i])) return;
        swap(&c[i], &c[child]);
    }
}

static void make_heap(Candidate *c, size_t n) {
    for (size_t i = n / 2; i-- > 0;) sink(c, i, n);
}

// Takes the top of the heap's *n candidates out of it: to the place that becomes free after the heap.
static Candidate *take_likeliest(Candidate *c, size_t *n) {
    swap(&c[0], &c[--*n]);
    sink(c, 0, *n);
    return &c[*n];
}

// Keeps the likeliest: at most so many, until their sum is above `mass`, none below min_p times the first. They come to
// the front in order; the others, which cannot be chosen, are never sorted. Returns how many are kept, and their sum.
static size_t keep_likeliest(Candidate *c, size_t n, size_t most, float mass, float min_p, float *sum) {
    size_t left = n;
    make_heap(c, n);
    float least = min_p * c[0].p;
    for (*sum = 0.0f; left > 0 && n - left < most && c[0].p > 0 && c[0].p >= least && *sum <= mass;)
        *sum += take_likeliest(c, &left)->p;
    for (size_t i = 0; i < n - left && i < n - 1 - i; i++) swap(&c[i], &c[n - 1 - i]);
    return n - left;
}

// Keeps the tokens whose surprise, -ln p, is nearest to the entropy, until their sum is above s->typical (Meister et
// al., "Locally Typical Sampling"). Before, the sum of all is *sum; then it is 1.
static size_t keep_typical(const Sampler *s, Candidate *c, size_t n, float *sum) {
    float *p = s->shaper->logits;  // (V)  by id: the logits are not needed any more
    double entropy = 0, total = 0;
    size_t left = n;
    for (size_t i = 0; i < n; i++) {
        p[c[i].id] = c[i].p / *sum;
        if (c[i].p > 0) entropy -= (double)p[c[i].id] * log((double)p[c[i].id]);
    }
    for (size_t i = 0; i < n; i++) c[i].p = -(float)fabs(log((double)p[c[i].id]) + entropy);
    make_heap(c, n);
    while (left > 0 && total <= (double)s->typical) total += (double)p[take_likeliest(c, &left)->id];
    memmove(c, c + left, (n - left) * sizeof *c);
    for (size_t i = 0; i < n - left; i++) c[i].p = (float)((double)p[c[i].id] / total);
    *sum = 1.0f;
    return n - left;
}

// To add a filter: a member of Sampler, its part in `cuts`, its cut before the sum is made, and an option (chapter 14),
// put in by run().
static size_t cut(Sampler *s, Candidate *c, size_t n, float *sum) {
    bool has_top_p = s->top_p > 0 && s->top_p < 1, has_top_k = s->top_k > 0;
    bool cuts = has_top_k || has_top_p || s->min_p > 0 || s->typical > 0 || s->xtc > 0;
    if (!cuts) return n;
    size_t n_above = 0, n_top = 0;
    if (has_top_k) n = keep_likeliest(c, n, (size_t)s->top_k, INFINITY, 0, sum);
    if (s->typical > 0) n = keep_typical(s, c, n, sum);
    // Without top-k, a token below this cannot be among those that make up top_p.
    float cutoff = has_top_p && !has_top_k && n > 1 ? (1.0f - s->top_p) / (float)(n - 1) : 0.0f;
    for (size_t i = 0; i < n; i++) if (c[i].p >= cutoff) c[n_above++] = c[i];
    if (n_above > 0) n = n_above;  // where top_p is below 1/n, none may reach it
    n = keep_likeliest(c, n, n, has_top_p ? s->top_p * *sum : INFINITY, s->min_p, sum);
    // XTC, "exclude top choices": with probability s->xtc, all but the last of the tokens that reach the threshold.
    bool excludes = s->xtc > 0 && flip_coin(&s->random) < s->xtc;
    while (excludes && n_top < n && c[n_top].p >= s->xtc_threshold * *sum) n_top++;
    if (n_top > 1) n -= n_top - 1;
    if (n_top > 1) memmove(c, c + n_top - 1, n * sizeof *c);
    *sum = 0.0f;
    for (size_t i = 0; i < n; i++) *sum += c[i].p;
    return n;
}

// ---- Penalties, biases, DRY, n-sigma ----

// How many of the last n tokens an option asks for.
static int last_of(int64_t asked, int n) { return asked < 0 || asked > n ? n : (int)asked; }

// A token that is among the last has its logit divided by a penalty, or multiplied if that is not positive; then
// logit -= count * frequency_penalty + presence_penalty
static void penalise_repeats(const Shaper *h, const int *ids, int n) {
    float penalty = (float)options.repeat_penalty, frequency = (float)options.frequency_penalty;
    int first = n - last_of(options.repeat_last_n, n);
    for (int i = first; i < n; i++) h->seen[ids[i]]++;
    for (int i = first; i < n; h->seen[ids[i++]] = 0) {
        float *logit = &h->logits[ids[i]], count = (float)h->seen[ids[i]];
        if (count <= 0) continue;  // the same token has been here before
        *logit = *logit > 0 ? *logit / penalty : *logit * penalty;
        *logit -= count * frequency + (float)options.presence_penalty;
    }
}

// Whether a breaker of sequences ends in the last of the n tokens before `end`.
static bool breaks_sequence(const Tokenizer *t, const int *end, int n) {
    static const Texts usual = { 4, { "\n", ":", "\"", "*" } };
    const Texts *breakers = options.breakers.n ? &options.breakers : &usual;
    size_t n_bytes, left = 1, n_last;
    for (int b = 0; b < breakers->n && strcmp(breakers->at[b], "none"); b++) {
        piece(t, end[-1], &n_last);
        for (; n_last > 0; n_last--) {  // its bytes from the last one back, over tokens
            left = strlen(breakers->at[b]);
            for (int i = 1; i <= n && left > 0; i++) {
                const char *s = piece(t, end[-i], &n_bytes);
                if (i == 1) n_bytes = n_last;
                while (n_bytes > 0 && left > 0 && s[n_bytes - 1] == breakers->at[b][left - 1]) n_bytes--, left--;
                if (n_bytes > 0) break;
            }
            if (left == 0) return true;
        }
    }
    return false;
}

// DRY, "don't repeat yourself": if the text's last tokens, at least dry_allowed of them, have stood before, the token
// that followed there loses multiplier * base^(their number - dry_allowed). They are counted back to the last breaker.
static void penalise_sequences(const Shaper *h, const int *ids, int n) {
    int last = last_of(options.dry_last_n, n), allowed = (int)options.dry_allowed, most = 0;
    const int *end = ids + n;
    while (most < last && most < allowed + 1000 && !breaks_sequence(h->tokenizer, end - most, last - most)) most++;
    if (last <= allowed || most < allowed) return;
    for (int k = 1; k < last; k++) {
        int length = 0, *seen = &h->seen[end[-k]];
        while (length < most && k + length < last && end[-1 - length] == end[-1 - k - length]) length++;
        if (length >= allowed && length >= *seen) *seen = length + 1;
    }
    for (int k = 1; k < last; h->seen[end[-k++]] = 0) {
        int longer = h->seen[end[-k]] - 1 - allowed;
        if (longer < 0 || breaks_sequence(h->tokenizer, end - k + 1, 1)) continue;
        double penalty = options.dry_multiplier * pow(options.dry_base, longer);
        h->logits[end[-k]] -= penalty < 1e38 ? (float)penalty : INFINITY;
    }
}

// Excludes what is more than so many standard deviations below the largest (Tang et al., "Top-n-sigma").
static void exclude_below_sigmas(float *logits, int n, double sigmas) {
    double sum = 0, squares = 0, count = 0, max = (double)logits[likeliest(logits, n)];
    for (int i = 0; i < n; i++) {
        double x = (double)logits[i];
        if (x <= -INFINITY) continue;
        sum += x;
        squares += x * x;
        count++;
    }
    double least = max - sigmas * sqrt(fmax(squares / count - sum / count * (sum / count), 0));
    for (int i = 0; i < n; i++) if ((double)logits[i] < least) logits[i] = -INFINITY;
}

static const float *shape_logits(const Shaper *h, const int *ids, int n_ids, const float *logits, int n) {
    for (int i = 0; i < n; i++) h->logits[i] = logits[i] + h->bias[i];
    penalise_repeats(h, ids, n_ids);
    if (options.dry_multiplier > 0) penalise_sequences(h, ids, n_ids);
    if (options.nsigma > 0) exclude_below_sigmas(h->logits, n, options.nsigma);
    return h->logits;
}

// Makes what shape_logits() and keep_typical() need, in one block.
static bool make_shaper(Sampler *s, const Tokenizer *t, int n_tokens, Error *e) {
    size_t n = (size_t)n_tokens;
    Shaper *h = s->shaper = allocate(1, sizeof *h + n * (2 * sizeof *h->logits + sizeof *h->seen), e);
    if (!h) return false;
    float *logits = (float *)(h + 1);
    *h = (Shaper){ t, logits, logits + n, (int *)(logits + 2 * n) };
    for (int i = 0; options.ignore_eos && i < t->n_end; i++) h->bias[t->end_id[i]] = -INFINITY;
    for (int i = 0; i < options.biases.n; i++) {
        const char *text = options.biases.at[i];
        int id = -1, end = 0;
        float x = NAN;
        char sign[2] = "";
        if (sscanf(text, "%9d%1[+-]%f%n", &id, sign, &x, &end) == 3 && *sign == '-') x = -x;
        if (id < 0 || id >= n_tokens || !(x < INFINITY) || text[end])
            return fail(e, MISUSE, "--logit-bias %.99s: expected ID+X or ID-X, the id below %d", text, n_tokens);
        h->bias[id] += x;
    }
    return true;
}

// ---- The memory to run it in ----

// All buffers of a pass come from one block, and so does the cache. What lays them out runs twice: first without the
// block, to count its bytes.
typedef struct { unsigned char *bytes; size_t n; } Arena;

// The next count things of that size, 64-byte aligned; NULL while counting. A sum beyond SIZE_MAX stays there.
static void *place(Arena *a, size_t count, size_t size) {
    unsigned char *p = a->bytes ? a->bytes + a->n : NULL;
    a->n = round_up(plus(a->n, times(count, size)), 64);
    return p;
}

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static void lay_out_workspace(const Model *m, Workspace *w) {
    const Config *c = &m->config;
    Arena a = { w->arena, 0 };
    size_t head_dim = (size_t)c->head_dim, group = QUERIES_TOGETHER, experts = 0, used = 0;
    for (const Layer *layer = m->layers; layer < m->layers + c->n_layers; layer++) {
        w->q_stride = larger(w->q_stride, round_up((size_t)layer->n_heads * head_dim, 32));
        w->kv_stride = larger(w->kv_stride, round_up((size_t)layer->n_kv_heads * head_dim, 32));
        w->ffn_stride = larger(w->ffn_stride, round_up((size_t)layer->ffn_dim, 32));
        group = larger(group, (size_t)(layer->n_heads / layer->n_kv_heads));
        experts = larger(experts, (size_t)layer->n_experts);
        used = larger(used, (size_t)layer->n_experts_used);
    }
    size_t n = (size_t)w->settings.batch, threads = (size_t)w->settings.threads, visits = n * used;
    size_t positions = round_up((size_t)w->settings.context, 16), own = larger(n, threads), rows = larger(n, visits);
    w->x_stride = round_up((size_t)c->dim, 32);
    w->logits_stride = round_up((size_t)c->n_tokens, 16);
    w->score_stride = positions + 16;  // rows that lie a power of two apart would share few places of the L1 cache
    w->scratch_stride = group * (2 * round_up(head_dim, 16) + w->score_stride + 1);
    w->inputs.widest = larger(larger(w->x_stride, w->q_stride), w->ffn_stride);
    w->rotation.positions = (int)positions;
    w->logits = place(&a, LOGITS_AT_ONCE * w->logits_stride, sizeof(float));
    w->rotation.turns = place(&a, (size_t)c->rope_dim, sizeof(double));
    w->batch_bytes = a.n;
    Experts unused, *x = used ? place(&a, 1, sizeof *x) : NULL;
    w->experts = x;
    if (!x) x = &unused;
    x->routes_stride = round_up(experts, 16);
    const struct { float **at; size_t rows, stride; } floats[] = {
        { &w->x, n, w->x_stride }, { &w->normed, own, w->x_stride }, { &w->out, n, w->x_stride },
        { &w->query, n, w->q_stride }, { &w->attended, n, w->q_stride }, { &w->key, n, w->kv_stride },
        { &w->value, n, w->kv_stride }, { &w->gate, rows, w->ffn_stride }, { &w->up, rows, w->ffn_stride },
        { &x->out, used ? n : 0, w->x_stride }, { &x->routes, n, x->routes_stride },
    };
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++)
        *floats[i].at = place(&a, floats[i].rows * floats[i].stride, sizeof(float));
    w->inputs.blocks = place(&a, rows * w->inputs.widest / 32, sizeof *w->inputs.blocks);
    w->inputs.rounded = place(&a, larger(own, visits) * w->inputs.widest / 32, sizeof *w->inputs.rounded);
    x->visitors = place(&a, visits, sizeof *x->visitors);
    x->first_visit = place(&a, experts + 1, sizeof *x->first_visit);
    w->broken = place(&a, n, sizeof *w->broken);
    w->wanted = place(&a, n, sizeof *w->wanted);
    w->room = place(&a, n, sizeof *w->room);
    w->batch_bytes = a.n - w->batch_bytes;
    w->scratch = place(&a, threads * w->scratch_stride, sizeof(float));  // from here on, only the beginnings of rows
    w->rotation.cosine_sine = place(&a, (c->local_theta > 0 ? 2 : 1) * positions * (size_t)c->rope_dim, sizeof(float));
    w->arena_bytes = a.n;
}

// Makes the scratch buffers for passes as the settings say; without -b a large batch may shrink.
static bool make_workspace(const Model *m, Workspace *w, Settings settings, Error *e) {
    *w = (Workspace){ .settings = settings, .deep_pages = 16 };  // two threads gain from 1,000 positions on
    for (const Slot *slot = m->slots; slot < m->slots + m->n_slots; slot++) {
        if (!is_multiplied(m, slot)) continue;
        bool rounds = is_quantised(slot->type) && !settings.exact;
        w->work += slot->rows * slot->cols * slot->n_used;
        w->inputs.rounds |= rounds;
        w->inputs.copies |= !rounds;
    }
    lay_out_workspace(m, w);
    for (; w->batch_bytes > 48 << 20 && w->settings.batch > 1 && !options.batch; lay_out_workspace(m, w))
        w->settings.batch /= 2;
    if (!(w->arena = map_memory(w->arena_bytes, false, e))) return false;
    lay_out_workspace(m, w);
    use_large_pages(w->arena, (size_t)((char *)w->scratch - (char *)w->arena));
    make_turns(m, &w->rotation, settings.context);
    return true;
}

static void lay_out_cache(const Model *m, Cache *c, size_t n_texts) {
    Arena a = { c->arena, 0 };
    size_t head_dim = (size_t)m->config.head_dim, pages = times(n_texts, n_pages(c->context));
    size_t item_bytes = PAGE * (c->f32 ? sizeof(float) : sizeof(uint16_t));  // of one number of each position
    c->layers = place(&a, (size_t)c->n_layers, sizeof *c->layers);
    c->users = place(&a, pages, sizeof *c->users);
    c->spare = place(&a, pages, sizeof *c->spare);
    c->ids = place(&a, times(n_texts, (size_t)c->context), sizeof *c->ids);
    c->pages = place(&a, pages, sizeof *c->pages);
    Arena page = { c->pool = place(&a, 0, 0), 0 };  // the first one
    for (int l = 0; l < c->n_layers; l++) {
        size_t n_heads = (size_t)m->layers[l].n_kv_heads;
        CachedLayer y = { NULL, NULL, head_dim * item_bytes, round_up(head_dim, 16) * item_bytes, 0 };
        y.keys = place(&page, n_heads, y.key_bytes);
        y.values = place(&page, n_heads, y.value_bytes);
        y.page_bytes = c->page_bytes;  // counted in the first run
        if (c->arena) c->layers[l] = y;
    }
    place(&a, pages, c->page_bytes = page.n);
    for (c->n_spare = 0; c->arena && (size_t)c->n_spare < pages; c->n_spare++)  // the first pages are taken first
        c->spare[c->n_spare] = (int)(pages - 1) - c->n_spare;
    c->arena_bytes = a.n;
}

// Makes the cache for so many texts of up to settings.context tokens.
static bool make_cache(const Model *m, Cache *c, Settings settings, int n_texts, Error *e) {
    *c = (Cache){ .f32 = settings.cache_f32, .n_layers = m->config.n_layers, .context = settings.context };
    lay_out_cache(m, c, (size_t)n_texts);
    if (!(c->arena = map_memory(c->arena_bytes, false, e))) return false;
    lay_out_cache(m, c, (size_t)n_texts);
    return true;
}

// An empty text, number i of those that the cache was made for.
static Sequence new_sequence(Cache *c, int i) {
    return (Sequence){ c, c->ids + (size_t)i * (size_t)c->context, c->pages + (size_t)i * n_pages(c->context), 0 };
}

// Makes `to` the first n tokens of `from`, both of one cache. Pages are shared until one of the two writes to them.
static void fork_sequence(Sequence *to, const Sequence *from, int n) {
    rewind_sequence(to, 0);
    for (size_t i = 0; i < n_pages(n); i++) to->cache->users[to->pages[i] = from->pages[i]]++;
    memcpy(to->ids, from->ids, (size_t)n * sizeof *to->ids);
    to->n = n;
}

// ---- Sessions ----

/* A session is a text's tokens and their part of the cache in a file, so that the next run need not read them again. It
   takes as much of it as its own text begins with, and gets the same bits as if it had read that itself.

       | header, 128 bytes | i32 id of each token | page 0, its u64 checksum | page 1, its checksum | ...     no padding

   The last byte of `magic` changes whenever anything here or the arithmetic does. `head_sum` is the checksum of all
   between it and the pages. */
typedef struct {
    unsigned char magic[8];
    uint64_t head_sum, n;      // n: tokens
    uint64_t model, settings;  // hashes of what the cache's bits depend on beside the tokens
    char name[88];             // of the checkpoint, for people
} SessionHeader;
_Static_assert(sizeof(SessionHeader) == 128, "no padding");

// Goes on with a checksum. Each step can be undone, so a change within 8 bytes always shows; a forged file need not.
static uint64_t add_sum(uint64_t sum, const void *bytes, size_t n) {
    for (size_t i = 0; i < n; i += 8) {
        uint64_t word = 0;
        memcpy(&word, (const char *)bytes + i, n - i < 8 ? n - i : 8);
        sum = (sum ^ word) * 0x9E3779B97F4A7C15u;
        sum ^= sum >> 32;
    }
    return sum;
}

static uint64_t sum_head(const SessionHeader *h, const int *ids) {
    return add_sum(add_sum(0, &h->n, sizeof *h - offsetof(SessionHeader, n)), ids, h->n * sizeof *ids);
}

// The header for a model (hashed: configuration, vocabulary, and each tensor's name, type, shape and 64 bytes) and for
// settings (rounding, the cache's type, and the angles, which hold what a scaled rotation makes of -c).
static SessionHeader session_header(const Model *m, const Workspace *w) {
    SessionHeader h = { .magic = { 0x89, 'c', 'r', 's', '\r', '\n', 0x1a, 2 } };
    h.model = add_sum(add_sum(0, m->config.family, strlen(m->config.family)), m->vocabulary, m->vocabulary_bytes);
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++)
        for (int l = 0; l < n_values(m, f); l++)
            h.model = add_sum(h.model, &(double){ get_field(m, f, l) }, sizeof(double));
    for (const Slot *s = m->slots; s < m->slots + m->n_slots; s++) {
        uint64_t shape[] = { s->is_vector ? VECTOR : s->type, s->n, s->rows, s->cols };
        size_t n = s->data ? slot_bytes(s) : 0, some = n < 64 ? n : 64;
        h.model = add_sum(add_sum(h.model, s->name, strlen(s->name)), shape, sizeof shape);
        if (some) h.model = add_sum(h.model, s->data + (n - some) / 2, some);
    }
    uint64_t kinds = w->settings.exact + 2u * w->settings.cache_f32;
    h.settings = add_sum(kinds, w->rotation.turns, (size_t)m->config.rope_dim * sizeof(double));
    const char *name = options.checkpoint ? options.checkpoint : "", *slash = strrchr(name, '/');
    snprintf(h.name, sizeof h.name, "%s", slash ? slash + 1 : name);
    return h;
}

static bool move_bytes(FILE *f, bool writes, void *bytes, size_t n) {
    return (writes ? fwrite(bytes, 1, n, f) : fread(bytes, 1, n, f)) == n;
}

// Writes a page of the cache and its checksum to a file, or reads both. False if that fails or the sum is wrong.
static bool move_page(FILE *f, bool writes, const Cache *c, int page) {
    if (!move_bytes(f, writes, page_at(c, page), c->page_bytes)) return false;
    uint64_t sum = add_sum(0, page_at(c, page), c->page_bytes), stored = sum;
    return move_bytes(f, writes, &stored, sizeof stored) && stored == sum;
}

// Begins an empty text with what a session has of these tokens: the common prefix, without the last token, which has to
// make logits. NULL: only checks the session's beginning.
static bool read_session(const Model *m, const Workspace *w, Sequence *s, FILE *f, const Tokens *tokens, Error *e) {
    SessionHeader h, wanted = session_header(m, w);
    if (fread(&h, sizeof h, 1, f) != 1 || memcmp(h.magic, wanted.magic, sizeof h.magic))
        return refuse(e, "--session: the file is no session of this version, and only those are written over");
    int *ids = allocate(h.n <= MAX_CONTEXT ? h.n : 0, sizeof *ids, e);
    if (!ids) return false;
    bool ok = h.n <= MAX_CONTEXT && fread(ids, sizeof *ids, h.n, f) == h.n && sum_head(&h, ids) == h.head_sum;
    if (!ok) refuse(e, "--session: the file is damaged: a wrong checksum of its beginning");
    else if (h.model != wanted.model)
        ok = refuse(e, "--session: the file is of another model: %.87s, and not %.87s", h.name, wanted.name);
    else if (h.settings != wanted.settings)
        ok = refuse(e, "--session: the file is of another --kv or --exact, or a -c that changes this model's angles");
    for (size_t i = 0; ok && tokens && i < h.n && i + 1 < tokens->n && ids[i] == tokens->ids[i]; i++)
        append_token(s, ids[i]);
    for (size_t i = 0; ok && i < n_pages(s->n); i++)
        ok = move_page(f, false, s->cache, s->pages[i]) ||
             refuse(e, "--session: the file is damaged: a wrong checksum of page %zu", i);
    if (!ok) rewind_sequence(s, 0);
    free(ids);
    return ok;
}

// The same with the file of that name, if there is one.
static bool open_session(const Model *m, const Workspace *w, Sequence *s, const Tokens *tokens, Error *e) {
    struct stat info;
    bool exists = stat(options.session, &info) == 0, is_file = exists && S_ISREG(info.st_mode);
    if (!exists && errno == ENOENT) return true;
    FILE *f = is_file ? fopen(options.session, "rb") : NULL;
    int status = exists && !is_file ? BAD_FILE : io_status();
    if (!f) return fail(e, status, "--session %.200s: expected a file that can be read", options.session);
    bool ok = read_session(m, w, s, f, tokens, e);
    if (ferror(f)) ok = fail(e, BROKEN_IO, "--session %.200s: reading failed", options.session);
    fclose(f);
    return ok;
}

// Writes the text to the file, in place of the session that may be there.
static bool write_session(const Model *m, const Workspace *w, const Sequence *s, Error *e) {
    SessionHeader h = session_header(m, w);
    Output out = { .stream = NULL };
    h.n = (uint64_t)s->n;
    h.head_sum = sum_head(&h, s->ids);
    bool ok = open_output(&out, options.session, e);
    bool written = ok && fwrite(&h, sizeof h, 1, out.stream) && fwrite(s->ids, sizeof *s->ids, h.n, out.stream);
    for (size_t i = 0; written && i < n_pages(s->n); i++) written = move_page(out.stream, true, s->cache, s->pages[i]);
    return close_output(&out, ok, e);  // which finds out whether all was written
}

// Finds out before a text is made whether its session can be written; nothing is changed.
static bool check_session_path(Error *e) {
    Output out;
    bool ok = open_output(&out, options.session, e);
    close_output(&out, false, e);
    return ok;
}

/* ==== 12. Writing, chatting =========================================================================================
   What stands round the loop of chapter 7: the prompt goes in, the text comes out, and speed and seed are told. A chat
   puts the words of both sides into the form that the model was trained on, and keeps all of them in the cache. */

// Logits of row i of those that wanted some in the last pass, asked for in order: 0, 1, 2 ...; NULL: not finite.
//     returns (V)
static const float *logits_of(const Model *m, Workspace *w, int i, Error *e) {
    int left = w->n_wanted - i, n = left < LOGITS_AT_ONCE ? left : LOGITS_AT_ONCE, at = i % LOGITS_AT_ONCE;
    return at || make_logits(m, w, i, n, e) ? w->logits + (size_t)at * w->logits_stride : NULL;
}

// Sends a text's next tokens through the model, B at a time. Only the last one gets logits, or each: then `all` is the
// file that they go to, (n,V). If it fails, the text keeps what has gone through.      tokens (n)
static bool prefill(const Model *m, Workspace *w, Sequence *s, const int *tokens, size_t n, FILE *all, Error *e) {
    double start = clock_seconds();
    for (size_t done = 0; done < n && !(all && ferror(all));) {
        int now = 0;
        for (; now < w->settings.batch && done < n; now++, done++)
            w->room[now] = (Row){ tokens[done], s->n + now, 0, all || done + 1 == n };
        if (interrupted) return fail(e, INTERRUPTED, "interrupted");
        if (!forward(m, w, s, w->room, now, e)) return false;
        for (int i = 0; i < w->n_wanted; i++) {
            const float *logits = logits_of(m, w, i, e);
            if (!logits) return false;
            if (all) fwrite(logits, sizeof *logits, (size_t)m->config.n_tokens, all);
        }
        show_progress("prompt token", start, done, n);
    }
    return true;
}

// How fast prompts went in and tokens came out. The first token of a text comes with its prompt's last pass.
typedef struct {
    size_t n_prompt, n_made, n_passes;
    size_t n_kept, n_guessed, n_right;  // from a session; by --lookup
    double prompt_seconds, made_seconds;
} Speed;

// Sends what no session has of a prompt, or a chat's new part, if it fits the context; and counts the time.
static bool take_prompt(const Model *m, Workspace *w, Sequence *s, const Tokens *tokens, Speed *speed, Error *e) {
    size_t total = plus((size_t)s->n, tokens->n);
    int context = s->cache->context, most = m->config.context;
    if (total > (size_t)context)
        return fail(e, NO_ROOM, "%s needs %zu positions, the context has %d of the model's %d%s",
                    s->n ? "this conversation is full: it" : "the prompt", total, context, most,
                    total <= (size_t)most ? "; see -c" : "");
    if (tokens->n == 0) return fail(e, MISUSE, "no part of the text has a token in this vocabulary");
    bool reads = options.session && s->n == 0;
    if (reads && !open_session(m, w, s, tokens, e)) return false;
    size_t kept = reads ? (size_t)s->n : 0;
    double start = clock_seconds();
    if (!prefill(m, w, s, tokens->ids + kept, tokens->n - kept, NULL, e)) return false;
    speed->n_prompt += tokens->n - kept;
    speed->n_kept += kept;
    speed->prompt_seconds += clock_seconds() - start;
    return true;
}

// Puts ? for what could steer a terminal: control characters that are not in `kept`, and bytes that are not UTF-8.
static void disarm(char *s, size_t n, const char *kept) {
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t c;
        int found = read_character(s + i, n - i, &c);
        bool harmless = found > 0 && (c >= 160 || (c >= 32 && c < 127) || (c && c < 32 && strchr(kept, (int)c)));
        length = found > 0 ? (size_t)found : 1;
        if (!harmless) memset(s + i, '?', length);
    }
}

// A text on its way through the model: it is continued, or some of its tokens are scored.
typedef struct Passage {
    struct Line *line;  // chapter 12a; of a chat it is NULL
    int number;        // which of the line's, from 0 on
    Tokens tokens;     // what is given
    size_t scored;     // the first of these that is scored; SIZE_MAX: the text is continued
    Sampler sampler;
    Continuation c;    // its sequence is NULL before it begins
    bool done;
    Buffer text;       // what was written
    Tokens ids;        // likewise
    Buffer scores;     // (tokens, 1 + --logprobs)  a token's own Score, then those of the likeliest
    double logprob;    // the sum of the tokens' own
    Stop why;
    uint64_t seed;
    double began, prompt_seconds, seconds;
    Error error;       // status DONE: none
    struct Passage *next;
} Passage;

// Prints the first n of the bytes that are held: as they are, unless stdout is a terminal.
static void put_held(Printer *p, size_t n) {
    static int is_terminal = -1;  // the system is asked once
    if (is_terminal < 0) is_terminal = isatty(STDOUT_FILENO);
    if (is_terminal && !p->to) disarm(p->held, n, "\n\t");
    if (p->to) append(p->to, p->held, n, p->error);
    else fwrite(p->held, 1, n, stdout);
    p->n_held -= n;
    memmove(p->held, p->held + n, p->n_held);
}

// How many of the last bytes that are held are the beginning of a text, or all of it.
static size_t n_begun(const Printer *p, const char *text) {
    size_t n = strlen(text);
    if (n > p->n_held) n = p->n_held;
    while (n > 0 && memcmp(p->held + p->n_held - n, text, n)) n--;
    return n;
}

// The stop text that the held bytes end with, the longest of several; or NULL. *n: how many of the last bytes are it,
// or may be its beginning.
static const char *find_stop(const Printer *p, size_t *n) {
    const char *found = NULL;
    *n = 0;
    for (int i = 0; p->stops && i < p->stops->n; i++) {
        size_t begun = n_begun(p, p->stops->at[i]);
        bool whole = begun == strlen(p->stops->at[i]);
        if (whole && (!found || begun > *n)) found = p->stops->at[i], *n = begun;
        if (!found && begun > *n) *n = begun;
    }
    return found;
}

// What the printer does with thoughts: it prints them; looks for one; is in one; looks for the text after one.
enum { PRINTED, WATCHED, HIDDEN, OVER };

// Whether the last byte that is held is a thought's, or ends the mark before or after one; such bytes are dropped.
static bool hide_thought(Printer *p) {
    if (p->thought == OVER && isspace((unsigned char)p->held[0])) return p->n_held = 0, true;
    if (p->thought == OVER) p->thought = WATCHED;
    const char *mark = p->thought == HIDDEN ? "</think>" : "<think>";
    size_t n = n_begun(p, mark);
    bool whole = n == strlen(mark);
    if (p->thought == WATCHED && !whole) return false;
    if (p->thought == WATCHED) put_held(p, p->n_held - n);  // what was kept as the beginning of a stop text
    memmove(p->held, p->held + p->n_held - n, n);
    p->n_held = whole ? 0 : n;
    if (whole) p->thought = p->thought == WATCHED ? HIDDEN : OVER;
    return true;
}

static const char *print_bytes(Printer *p, const char *bytes, size_t n) {
    for (size_t i = 0, kept; bytes && i < n; i++) {
        p->held[p->n_held++] = bytes[i];
        if (p->thought && hide_thought(p)) continue;
        const char *stop = find_stop(p, &kept);
        size_t begun = p->thought && !stop ? n_begun(p, "<think>") : 0;
        size_t most = p->n_held - (begun > kept ? begun : kept);
        put_held(p, stop || p->to ? most : whole_characters(p->held, most));
        if (stop) return p->n_held = 0, stop;
    }
    if (bytes) return NULL;
    put_held(p, p->thought == HIDDEN ? 0 : p->n_held);
    fflush(stdout);
    return NULL;
}

static bool is_control(const Tokenizer *t, int id) {
    return id >= 0 && id < t->n_tokens && t->type[id] == PIECE_CONTROL;
}

// A control token is not printed, but it may be a stop text or, by its name, the mark before or after a thought.
static const char *print_token(const Model *m, Printer *p, int before, int token) {
    size_t n, n_name;
    const char *bytes = decode(&m->tokenizer, before, token, &n), *name = piece(&m->tokenizer, token, &n_name);
    if (!is_control(&m->tokenizer, token)) return print_bytes(p, bytes, n);
    const char *mark = p->thought == HIDDEN ? "</think>" : "<think>";
    if (p->thought && n_name == strlen(mark) && !memcmp(name, mark, n_name)) return print_bytes(p, name, n_name);
    for (int i = 0; p->stops && i < p->stops->n; i++)
        if (n_name == strlen(p->stops->at[i]) && !memcmp(name, p->stops->at[i], n_name)) return p->stops->at[i];
    return NULL;
}

// Bytes of weights that a token needs: of all that are multiplied, and of the experts that it visits.
static size_t bytes_per_token(const Model *m) {
    size_t n = 0;
    for (const Slot *slot = m->slots; slot < m->slots + m->n_slots; slot++)
        if (is_multiplied(m, slot)) n += slot_bytes(slot) / slot->n * slot->n_used;
    return n;
}

// With the clock's seed, which is printed, the same text can be had again.
static void tell_seed(const Sampler *s) {
    static bool told;  // a chat would come here again
    if (s->from_clock && s->temperature > 0 && !options.quiet && !told)
        fprintf(stderr, "seed %llu\n", (unsigned long long)s->random);
    told = true;
}

static void tell_speed(const Model *m, const Speed *v) {
    if (options.quiet) return;
    fprintf(stderr, "prompt %zu tokens, %.1f tokens/s; generated %zu tokens", v->n_prompt,
            v->prompt_seconds > 0 ? (double)v->n_prompt / v->prompt_seconds : 0, v->n_made);
    double rate = v->n_passes ? (double)v->n_passes / v->made_seconds : 0;
    if (rate > 0)
        fprintf(stderr, ", %.1f tokens/s, %.1f GB/s", (double)(v->n_passes + v->n_right) / v->made_seconds,
                rate * (double)bytes_per_token(m) * 1e-9);
    if (options.session) fprintf(stderr, "; %zu tokens of the session", v->n_kept);
    if (options.lookup) fprintf(stderr, "; %zu/%zu guesses right, %zu passes", v->n_right, v->n_guessed, v->n_passes);
    fputc('\n', stderr);
}

static const char *const stop_names[] = { "", "at an end token", "at a stop text", "at -n tokens",
                                          "at the context's end", "by Ctrl-C", "by a broken output" };

// A seed of 0 would keep the generator at 0 for ever; another constant stands for it (2^64 / the golden ratio).
static uint64_t first_state(uint64_t seed) { return seed ? seed : 0x9E3779B97F4A7C15u; }

static bool make_sampler(Sampler *s, int n_tokens, uint64_t seed, Error *e) {
    s->random = first_state(seed);
    s->candidates = allocate((size_t)n_tokens, sizeof *s->candidates, e);
    return s->candidates != NULL;
}

static void count_made(Speed *v, const Continuation *c, double start) {
    v->n_made += c->n_made;
    v->n_passes += c->n_passes;
    v->made_seconds += clock_seconds() - start;
}

// ---- Lossless speculation ----

// Texts repeat themselves: summaries quote, programs are edited. So what the model will say next may be guessed from
// what followed its last tokens before (Saxena, "Prompt Lookup Decoding"). A pass takes the guess's tokens along; a
// row's logits then choose the token after it as they always would, and the next row counts if that token was guessed.

// Writes a guess of at most `most` tokens to ids[n] and on: what followed the latest of the longest earlier matches of
// the last tokens. It is no longer than the match, since a wrong token costs a fifth of a pass. It may run into itself,
// as "ab" is guessed to go on after "abab". Returns its length.      ids (n)
static int look_up(int *ids, int n, int most) {
    enum { SHORTEST = 2, LONGEST = 64 };  // matches: one token says little, and after so many the search ends
    int best = SHORTEST - 1, next = n;
    for (int at = n - 1; at > 0 && best < LONGEST; at--) {
        int length = 0;
        while (length < at && length < LONGEST && ids[at - 1 - length] == ids[n - 1 - length]) length++;
        if (length > best) best = length, next = at;
    }
    int length = next == n ? 0 : most < best ? most : best;
    for (int i = 0; i < length; i++) ids[n + i] = ids[next + i];
    return length;
}

// Sends a text's next token through the model, and a guess after it; returns how many rows that were, 0 if it fails. A
// guess must not fail what would go well without it, so the token is tried alone too.
static int pass_ahead(const Model *m, Workspace *w, Continuation *c, Speed *speed, Error *e) {
    Sequence *s = c->sequence;
    size_t most = (size_t)(s->cache->context - s->n - 1), left = c->limit - c->n_made - 1;
    if (most > (size_t)options.lookup) most = (size_t)options.lookup;
    if (most > (size_t)w->settings.batch - 1) most = (size_t)w->settings.batch - 1;
    s->ids[s->n] = c->last;
    int n_guessed = look_up(s->ids, s->n + 1, (int)(most < left ? most : left));
    for (int n = 1 + n_guessed;; n = 1, e->status = DONE) {
        for (int i = 0; i < n; i++) w->room[i] = (Row){ s->ids[s->n + i], s->n + i, 0, true };
        c->n_passes++;
        speed->n_guessed += (size_t)n - 1;
        bool done = forward(m, w, s, w->room, n, e);
        if (done && logits_of(m, w, 0, e)) return n;
        if (done) rewind_sequence(s, s->n - n);
        if (n == 1) return 0;
    }
}

// What generate() does, to the bit. A token is chosen while the text has the tokens before it only, without a guess.
static bool generate_ahead(const Model *m, Workspace *w, Continuation *c, Stop *why, Speed *speed, Error *e) {
    if (!options.lookup) return generate(m, w, c, why, e);
    Sequence *s = c->sequence;
    const float *logits = w->logits;
    int n_rows = 1;  // of the last pass
    for (int row = 0; n_rows > 0; row++) {
        int end = s->n, n = s->n -= n_rows - 1 - row;
        *why = next_token(m, c, logits);
        s->n = end;
        bool right = *why == GO_ON && n < end && s->ids[n] == c->last;
        speed->n_right += right;
        if (right && (logits = logits_of(m, w, row + 1, e))) continue;
        rewind_sequence(s, n);
        if (*why != GO_ON) break;
        n_rows = pass_ahead(m, w, c, speed, e);
        logits = w->logits, row = -1;
    }
    print_bytes(&c->printer, NULL, 0);
    return n_rows > 0;
}

static size_t most_tokens(void) { return options.n_predict < 0 ? SIZE_MAX : (size_t)options.n_predict; }

static bool run_generate(const Model *m, Workspace *w, Sequence *s, Sampler *sampler, const Tokens *prompt, Error *e) {
    Speed speed = { 0 };
    Continuation c = { s, sampler, .limit = most_tokens(), .last = -1 };
    Stop why;
    if (!take_prompt(m, w, s, prompt, &speed, e)) return false;
    tell_seed(sampler);
    for (size_t i = 0; i < prompt->n; c.last = prompt->ids[i++])
        if (!options.no_echo) print_token(m, &c.printer, c.last, prompt->ids[i]);
    print_bytes(&c.printer, NULL, 0);
    c.printer.stops = &options.stops;
    double start = clock_seconds();
    if (!generate_ahead(m, w, &c, &why, &speed, e)) return false;
    count_made(&speed, &c, start);
    putchar('\n');
    fflush(stdout);
    if (!options.quiet) fprintf(stderr, "stopped %s\n", stop_names[why]);
    tell_speed(m, &speed);
    return why != AT_INTERRUPT || fail(e, INTERRUPTED, "interrupted");
}

// ---- Chat templates ----

enum { MAX_MESSAGES = 1 << 26 };  // bytes of a conversation's file

// Short templates of our own, by name, for models that have none or a wrong one. They are like the published ones of
// the same names (tests/golden/chat.txt), without tools. m is a message.
#define TURNS(system, user, answer, prompt) \
    "{% for m in messages %}{% if m.role == 'system' %}" system "{% elif m.role == 'user' %}" user "{% else %}" answer \
    "{% endif %}{% endfor %}{% if add_generation_prompt %}" prompt "{% endif %}"
#define UNLESS_SYSTEM(text) "{% if not messages or messages[0].role != 'system' %}" text "{% endif %}"
#define AFTER_SYSTEM(text) "{% if loop.previtem and loop.previtem.role == 'system' %}" text "{% endif %}"
#define CHATML(first) first TURNS("<|im_start|>system\n{{ m.content }}<|im_end|>\n", \
    "<|im_start|>user\n{{ m.content }}<|im_end|>\n", "<|im_start|>assistant\n{{ m.content }}<|im_end|>\n", \
    "<|im_start|>assistant\n")
#define CHATML_SYSTEM(text) CHATML(UNLESS_SYSTEM("<|im_start|>system\n" text "<|im_end|>\n"))
#define LLAMA3_HEADER(role) "{{ '<|start_header_id|>" role "<|end_header_id|>\n\n' }}"
#define LLAMA3(first, dates) first TURNS(LLAMA3_HEADER("system") dates "{{ m.content | trim }}<|eot_id|>", \
    LLAMA3_HEADER("user") "{{ m.content | trim }}<|eot_id|>", \
    LLAMA3_HEADER("assistant") "{{ m.content | trim }}<|eot_id|>", LLAMA3_HEADER("assistant"))
#define DATES "{{ 'Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n' }}"
#define SYSTEM_BEFORE AFTER_SYSTEM("{{ loop.previtem.content + '\n\n' }}")
#define MISTRAL(open, close, answer) TURNS("", open SYSTEM_BEFORE "{{ m.content }}" close, \
    answer "{{ m.content }}{{ eos_token }}", "")
static const struct { const char *name, *text; } built_in_templates[] = {
    { "smollm2", CHATML_SYSTEM("You are a helpful AI assistant named SmolLM, trained by Hugging Face") },
    { "qwen2.5", CHATML_SYSTEM("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.") },
    { "qwen2", CHATML_SYSTEM("You are a helpful assistant.") },
    { "qwen1.5", CHATML_SYSTEM("You are a helpful assistant") },
    { "chatml", CHATML("") },
    { "qwen3", CHATML("") "{% if add_generation_prompt and enable_thinking is defined and not enable_thinking %}"
               "{{ '<think>\n\n</think>\n\n' }}{% endif %}" },
    { "llama3.1", LLAMA3(UNLESS_SYSTEM(LLAMA3_HEADER("system") DATES "<|eot_id|>"), DATES) },
    { "llama3", LLAMA3("", "") },
    { "llama2", TURNS("", "{% if not loop.first and loop.previtem.role != 'system' %}{{ bos_token }}{% endif %}[INST] "
                      "{% set c %}" AFTER_SYSTEM("{{ '<<SYS>>\n' + loop.previtem.content + '\n<</SYS>>\n\n' }}")
                      "{{ m.content }}{% endset %}{{ c | trim }} [/INST]",
                      " {{ m.content | trim }} {{ eos_token }}", "") },
    { "mistral-v7", TURNS("[SYSTEM_PROMPT] {{ m.content }}[/SYSTEM_PROMPT]", "[INST] {{ m.content }}[/INST]",
                          " {{ m.content }}{{ eos_token }}", "") },
    { "mistral-v7-tekken", TURNS("[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]", "[INST]{{ m.content }}[/INST]",
                                 "{{ m.content }}{{ eos_token }}", "") },
    { "mistral-v3-tekken", MISTRAL("[INST]", "[/INST]", "") },
    { "mistral-v3", MISTRAL("[INST] ", "[/INST]", " ") },
    { "mistral-v1", MISTRAL(" [INST] ", " [/INST]", " ") },
    { "mistral", TURNS("", "[INST] {{ m.content }} [/INST]", "{{ m.content }}{{ eos_token }}", "") },
    { "phi3", TURNS("<|system|>\n{{ m.content }}<|end|>\n", "<|user|>\n{{ m.content }}<|end|>\n",
                    "<|assistant|>\n{{ m.content }}<|end|>\n", "<|assistant|>\n") },
    { "zephyr", TURNS("<|system|>\n{{ m.content + eos_token + '\n' }}", "<|user|>\n{{ m.content + eos_token + '\n' }}",
                      "<|assistant|>\n{{ m.content + eos_token + '\n' }}", "<|assistant|>\n") },
    { "vicuna", UNLESS_SYSTEM("{{ 'A chat between a curious user and an artificial intelligence assistant. The "
                              "assistant gives helpful, detailed, and polite answers to the user\\'s questions. ' }}")
                TURNS("{{ m.content + ' ' }}", "USER: {{ m.content + ' ' }}", "ASSISTANT: {{ m.content + eos_token }}",
                      "ASSISTANT:") },
    { "vicuna-lines", TURNS("{{ m.content + '\n\n' }}", "USER: {{ m.content + '\n' }}",
                            "ASSISTANT: {{ m.content + eos_token + '\n' }}", "ASSISTANT:") },
    { "alpaca", UNLESS_SYSTEM("{{ 'Below are some instructions that describe some tasks. Write responses that "
                              "appropriately complete each request.\n\n' }}")
                TURNS("{{ m.content + '\n\n' }}", "### Instruction:\n{{ m.content + '\n\n' }}",
                      "### Response:\n{{ m.content + eos_token + '\n\n' }}", "### Response:\n") },
    { "deepseek-r1", TURNS("{{ m.content }}", "<｜User｜>{{ m.content }}",
                           "<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>",
                           "<｜Assistant｜><think>\n") },
    { "deepseek3", TURNS("{{ m.content }}", "<｜User｜>{{ m.content }}",
                         "<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>", "<｜Assistant｜>") },
    { "deepseek", TURNS("{{ m.content + '\n\n' }}", "User: {{ m.content + '\n\n' }}",
                        "Assistant: {{ m.content }}<｜end▁of▁sentence｜>", "Assistant:") },
    { "gemma", TURNS("", "<start_of_turn>user\n" SYSTEM_BEFORE "{{ m.content | trim }}<end_of_turn>\n",
                     "<start_of_turn>model\n{{ m.content | trim }}<end_of_turn>\n", "<start_of_turn>model\n") },
};
enum { N_BUILT_IN = sizeof built_in_templates / sizeof *built_in_templates };

// The template that --template names, a built-in one or a file's, or else the model's. --think is checked here, too.
static bool find_template(const Model *m, const char *name, Buffer *file, Text *template, Error *e) {
    const char *think = options.think;
    if (think && strcmp(think, "on") && strcmp(think, "off") && strcmp(think, "hide"))
        return fail(e, MISUSE, "--think %.40s: expected on, off or hide", think);
    *template = m->chat_template;
    if (!name && template->n) return true;
    for (int i = 0; name && i < N_BUILT_IN; i++) {
        if (strcmp(name, built_in_templates[i].name)) continue;
        *template = (Text){ built_in_templates[i].text, strlen(built_in_templates[i].text) };
        return true;
    }
    char names[360] = "";
    for (int i = 0; i < N_BUILT_IN; i++) {
        size_t n = strlen(names);
        snprintf(names + n, sizeof names - n, "%s%s", i ? ", " : "", built_in_templates[i].name);
    }
    if (!name) return fail(e, MISUSE, "no chat template, so this model may know only how to continue texts; "
                           "--template takes a file or %s", names);
    if (access(name, R_OK) && !strchr(name, '/') && !strchr(name, '.'))
        return fail(e, MISUSE, "--template %.40s: expected a file, or one of %s", name, names);
    bool ok = read_all(name, MAX_TEMPLATE_BYTES, file, e);
    *template = (Text){ (const char *)file->bytes, file->n };
    return ok;
}

// Sets a variable of a template. One that is there already gets another value.
static bool give(Pool *pool, Value *given, Value name, Value v, Error *e) {
    for (size_t i = 0; i < given->n; i += 2)
        if (!compare_strings(&given->items[i], &name)) return given->items[i + 1] = v, true;
    return push_value(pool, given, name, e) && push_value(pool, given, v, e);
}

// The day for the template: --now, or today.
static bool find_now(struct tm *now, Error *e) {
    time_t today = time(NULL);
    if (!options.now) return localtime_r(&today, now) || fail(e, MISUSE, "the clock has no date");
    *now = (struct tm){ .tm_hour = 12, .tm_isdst = -1 };
    const char *end = strptime(options.now, "%Y-%m-%d", now);
    int day = now->tm_mday;  // mktime() makes March 1 of February 30
    return (end && !*end && mktime(now) != -1 && now->tm_mday == day) ||
           fail(e, MISUSE, "--now %.40s: expected a date as in 2024-07-26", options.now);
}

static const char template_marks[MAX_PIECE] = { [0 ... MAX_PIECE - 1] = 1 };  // of what counts as a template's own

// A named token's text; undefined if the model has no such token.
static Value token_text(const Tokenizer *t, int id) {
    Value v = { .kind = id < 0 ? IS_UNDEFINED : IS_STRING, .marks = template_marks };
    v.text = piece(t, id, &v.n);
    return v;
}

// Copies a conversation for a template: the usual roles count as the template's own words, and members that are none
// are left out, as transformers does, since many templates would print None. *work grows: each byte may be copied some
// times.
static bool prepare_messages(Pool *pool, const Value *messages, Value *list, size_t *work, Error *e) {
    static const char own_roles[] = "system user assistant tool";
    *list = (Value){ .kind = IS_LIST };
    for (size_t i = 0; i < messages->n; i++) {
        Value message = messages->items[i], copy = { .kind = IS_DICT };
        const Value *role = find_member(&message, "role");
        if (!role || role->kind != IS_STRING)
            return refuse(e, "message %zu is not {\"role\": ..., \"content\": ...}", i + 1);
        for (size_t k = 0; k < message.n; k += 2) {
            Value key = message.items[k], v = message.items[k + 1];
            bool is_role = v.kind == IS_STRING && same_text(key, "role") && has_word(own_roles, v);
            if (v.kind == IS_STRING) *work = plus(*work, times(v.n, 32));
            if (is_role) v.marks = template_marks;
            if (v.kind != IS_NONE && (!push_value(pool, &copy, key, e) || !push_value(pool, &copy, v, e))) return false;
        }
        if (!push_value(pool, list, copy, e)) return false;
    }
    return true;
}

// Sets the variable that --template-arg NAME=JSON names.
static bool give_argument(Pool *pool, Value *given, const char *name, Error *e) {
    const char *equals = strchr(name, '=');
    Value key = { .kind = IS_STRING, .text = name, .n = equals ? (size_t)(equals - name) : 0 }, v;
    Error why;
    if (!key.n) return fail(e, MISUSE, "--template-arg %.80s: expected NAME=JSON", name);
    if (!parse_json(equals + 1, strlen(equals + 1), pool, &v, &why))
        return fail(e, MISUSE, "--template-arg %.60s: %.199s", name, why.text);
    return give(pool, given, key, v, e);
}

// Renders a conversation, a list of dicts with a role and a content, by a template; with what opens an answer, if it
// asks for one. What the template is given beside it are the named tokens and --template-arg.
static bool render_chat(const Model *m, Text template, const Value *messages, bool asks, Rendered *out, Error *e) {
    const Tokenizer *t = &m->tokenizer;
    size_t work = MAX_TEMPLATE_WORK;
    Pool pool = { 0 };
    struct tm now;
    Value given = { .kind = IS_DICT }, list, none = { .kind = IS_NONE }, undefined = { .kind = IS_UNDEFINED };
    bool ok = find_now(&now, e) && prepare_messages(&pool, messages, &list, &work, e);
    const struct { const char *name; Value v; } usual[] = {
        { "messages", ok ? list : none }, { "tools", none }, { "documents", none },
        { "add_generation_prompt", boolean(asks) },
        { "bos_token", token_text(t, t->bos) }, { "eos_token", token_text(t, t->eos) },
        { "unk_token", token_text(t, t->unk) },
        { "enable_thinking", options.think ? boolean(strcmp(options.think, "off")) : undefined },
    };
    for (size_t i = 0; ok && i < sizeof usual / sizeof *usual; i++)
        ok = usual[i].v.kind == IS_UNDEFINED || give(&pool, &given, string(usual[i].name), usual[i].v, e);
    for (int i = 0; ok && i < options.template_args.n; i++)
        ok = give_argument(&pool, &given, options.template_args.at[i], e);
    ok = ok && render_template(template, &given, &now, work, out, e);
    free_pool(&pool);
    return ok;
}

// The tokens of what was rendered. The begin token is added where the model asks for it and the template has not
// written it.
static bool encode_rendered(const Tokenizer *t, const Rendered *r, Tokens *tokens, Error *e) {
    Buffer spans = { 0 };
    bool ok = true;
    for (size_t i = 0, end; ok && i < r->text.n; i = end) {
        for (end = i; end < r->text.n && r->marks.bytes[end] == r->marks.bytes[i];) end++;
        Span span = { (const char *)r->text.bytes + i, end - i, r->marks.bytes[i] };
        ok = append(&spans, &span, sizeof span, e);
    }
    size_t n = 0;
    const char *bos = piece(t, t->bos, &n);
    bool begins = n && r->text.n >= n && !memcmp(r->text.bytes, bos, n) && r->marks.bytes[n - 1] && r->marks.bytes[0];
    ok = ok && (!(t->flags & ADD_BOS) || begins || emit_around(t, false, tokens, e)) &&
         (!spans.n || encode(t, (const Span *)spans.bytes, (int)(spans.n / sizeof(Span)), tokens, e));
    free(spans.bytes);
    return ok;
}

// A conversation from a JSON file: a list, or a dict that has it as "messages".
static bool read_messages(const char *path, Pool *pool, Value *messages, Error *e) {
    Buffer file = { 0 };
    Error why;
    bool ok = read_all(path, MAX_MESSAGES, &file, e);
    if (ok && file.n > MAX_MESSAGES) ok = fail(e, NO_ROOM, "%.100s: more than %d bytes", path, MAX_MESSAGES);
    if (ok && !parse_json((const char *)file.bytes, file.n, pool, messages, &why))
        ok = fail(e, why.status, "%.100s: %.200s", path, why.text);
    free(file.bytes);
    if (ok && find_member(messages, "messages")) *messages = *find_member(messages, "messages");
    return ok && (messages->kind == IS_LIST || refuse(e, "%.100s: expected a list of messages", path));
}

static bool has_role(const Value *message, const char *role) {
    const Value *v = find_member(message, "role");
    return v && v->kind == IS_STRING && same_text(*v, role);
}

// The first message that is not the system's.
static size_t first_turn(const Value *messages) { return messages->n && has_role(messages->items, "system"); }

// Whether the last message has this role.
static bool ends_with(const Value *messages, const char *role) {
    return messages->n && has_role(&messages->items[messages->n - 1], role);
}

// The content of the last message, of those that a chat has made or loaded.
static Value last_content(const Value *messages) { return *find_member(&messages->items[messages->n - 1], "content"); }

static void print_tokens(const Tokenizer *t, const Tokens *tokens);  // chapter 13

// Prints what the model would read of a conversation: the text, or with --pieces its tokens.
static bool run_render(const Model *m, Error *e) {
    Pool pool = { 0 };
    Buffer file = { 0 };
    Rendered out = { 0 };
    Tokens tokens = { 0 };
    Text template;
    Value messages;
    if (!options.messages) return fail(e, MISUSE, "-m render needs --messages FILE");
    bool ok = find_template(m, options.template_name, &file, &template, e) &&
              read_messages(options.messages, &pool, &messages, e);
    ok = ok && render_chat(m, template, &messages, !ends_with(&messages, "assistant"), &out, e) &&
         (!options.pieces || encode_rendered(&m->tokenizer, &out, &tokens, e));
    if (ok && options.pieces) print_tokens(&m->tokenizer, &tokens);
    else if (ok) fwrite(out.text.bytes, 1, out.text.n, stdout);
    free(tokens.ids);
    free_rendered(&out);
    free(file.bytes);
    free_pool(&pool);
    return ok;
}

// ---- Chat ----

// A text without white space at its ends.
static Span trimmed(const char *text, size_t n) {
    while (n > 0 && isspace((unsigned char)*text)) text++, n--;
    while (n > 0 && isspace((unsigned char)text[n - 1])) n--;
    return (Span){ text, n, false };
}

// Reads a line from stdin, without its end. False after Ctrl-C, where reading failed, or, without an error, at the end.
static bool read_line(Buffer *line, Error *e) {
    char *text = (char *)line->bytes;
    if (isatty(STDIN_FILENO)) fprintf(stderr, "> ");
    at_prompt = 1;
    ssize_t n = interrupted ? -1 : getline(&text, &line->capacity, stdin);
    at_prompt = 0;
    line->bytes = (unsigned char *)text;
    if (n < 0 && interrupted) return fail(e, INTERRUPTED, "interrupted");
    if (n < 0 && !feof(stdin) && errno != EBADF)  // EBADF: stdin was closed from the start, which counts as its end
        return fail(e, io_status(), "reading failed: %s", strerror(errno));
    if (n < 0 && isatty(STDIN_FILENO)) fputc('\n', stderr);
    if (n < 0) return false;
    while (n > 0 && (text[n - 1] == '\n' || text[n - 1] == '\r')) n--;
    line->n = (size_t)n;
    return true;
}

// The columns of the character at s, and its bytes. disarm() turns each byte of a harmful one into a question mark.
static int columns_of(const char *s, size_t n, size_t *n_bytes) {
    uint32_t code, end = 0, count;
    int length = read_character(s, n, &code);
    *n_bytes = length > 0 ? (size_t)length : 1;
    if (length <= 0 || code < 160) return *s == '\n' ? 0 : (int)*n_bytes;
    for (const char *p = unicode_widths; *p; p++) {
        for (count = 0; isdigit((unsigned char)*p); p++) count = count * 10 + (uint32_t)(*p - '0');
        end += count ? count : 1;
        if (code < end) return *p == 'm' ? 0 : *p == 'w' ? 2 : 1;
    }
    return 1;
}

// ---- A line editor ----

#include <poll.h>
#include <termios.h>

enum { NO_KEY, CTRL_C = 3, DELETE_KEY = 256, PASTE_BEGINS, PASTE_ENDS, INPUT_ENDS };  // beside bytes that keys send
enum { USUAL, ANSWERING, EDITING };                                                   // uses of the terminal

typedef struct {
    Buffer line;
    size_t at, shown;    // the cursor's byte; which of `past` is in the line
    int n_above, width;  // rows drawn above the cursor's, and columns of the screen then
    Value past;          // messages and commands, and at last what is being typed
    Pool pool;
} Editor;

static struct termios usual_terminal;  // as it was before the chat
static volatile sig_atomic_t terminal_use;
static int screen;                     // the descriptor to draw on

// Keys come at once and unseen, and pastes marked. In an answer Ctrl-C is a signal, at a prompt it is a key; Ctrl-Z is
// always a key, which waits for the next prompt.
static void use_terminal(int use) {
    struct termios t = usual_terminal;
    if (use) t.c_lflag &= ~(tcflag_t)(ICANON | ECHO | IEXTEN | (use == EDITING ? ISIG : 0));
    if (use) t.c_cc[VSUSP] = _POSIX_VDISABLE;
    terminal_use = use;
    while (tcsetattr(STDIN_FILENO, TCSADRAIN, &t) && errno == EINTR) {}
    while (write(screen, use ? "\033[?2004h" : "\033[?2004l", 8) < 0 && errno == EINTR) {}
}

static void on_resize(int number) { (void)number; }  // but it ends poll() in next_byte()

// Starts the editor, if there are a terminal to type in and one to draw on.
static bool start_editor(void) {
    screen = isatty(STDERR_FILENO) ? STDERR_FILENO : STDOUT_FILENO;
    if (!isatty(screen) || tcgetattr(STDIN_FILENO, &usual_terminal)) return false;
    use_terminal(ANSWERING);
    heed(SIGWINCH, &(struct sigaction){ .sa_handler = on_resize, .sa_flags = SA_RESTART });
    return true;
}

// Where the row of the screen that begins at byte `from` ends: after a newline or at the right edge. *column: the
// cursor's, if it is in this row and was negative.
static size_t row_end(const Editor *d, size_t from, int width, int *column) {
    const char *s = (const char *)d->line.bytes;
    int used = from ? 0 : 2;  // the prompt
    for (size_t i = from, n = 1;; i += n) {
        int columns = i < d->line.n ? columns_of(s + i, d->line.n - i, &n) : 0;
        if (used + (columns ? columns : i == d->at) > width) return i;  // the cursor needs a column, too
        if (i >= d->at && *column < 0) *column = used;  // > where a stray byte and the next are a character
        if (i >= d->line.n || s[i] == '\n') return i + 1;
        used += columns;
    }
}

// Draws the line in place of what was drawn before: of a long one as many rows as the screen has.
static bool draw_line(Editor *d, const char *prompt, Error *e) {
    struct winsize size = { 0 };
    Buffer out = { 0 };
    ioctl(screen, TIOCGWINSZ, &size);
    int width = size.ws_col > 3 ? size.ws_col : 80, height = size.ws_row ? size.ws_row : 24;
    int column = -1, cursor_row = -1, row = 0;
    for (size_t from = 0; column < 0; cursor_row++) from = row_end(d, from, width, &column);
    int top = cursor_row < height ? 0 : cursor_row - height + 1;
    bool ok = top > 0 || append(&out, prompt, 2, e);
    for (size_t from = 0, end; ok && from <= d->line.n && row < top + height; from = end, row++) {
        end = row_end(d, from, width, &column);
        size_t n = (end < d->line.n ? end : d->line.n) - from;
        if (n > 0 && d->line.bytes[from + n - 1] == '\n') n--;
        if (row >= top) ok = append(&out, "\r\n", row > top ? 2 : 0, e) && append(&out, d->line.bytes + from, n, e);
        if (row >= top && ok) disarm((char *)out.bytes + out.n - n, n, "\t");
    }
    for (size_t i = 0; ok && i < out.n; i++) if (out.bytes[i] == '\t') out.bytes[i] = ' ';
    if (width < d->width) d->n_above *= (d->width + width - 1) / width;  // the terminal has broken each row
    dprintf(screen, d->n_above ? "\r\033[%dA\033[J" : "\r\033[J", d->n_above);
    if (ok) dprintf(screen, "%.*s", (int)out.n, (char *)out.bytes);
    dprintf(screen, row > cursor_row + 1 ? "\r\033[%dA" : "\r", row - 1 - cursor_row);
    if (column) dprintf(screen, "\033[%dC", column);
    d->n_above = cursor_row - top;
    d->width = width;
    free(out.bytes);
    return ok;
}

// The next byte that is typed. NO_KEY: none within these milliseconds (-1: no limit), or the screen has changed.
static int next_byte(int milliseconds) {
    unsigned char byte;
    struct pollfd input = { .fd = STDIN_FILENO, .events = POLLIN };
    if (poll(&input, 1, milliseconds) <= 0) return NO_KEY;
    return read(STDIN_FILENO, &byte, 1) == 1 ? byte : INPUT_ENDS;
}

// The next key. Of one with a name it is the control character that does the same: of the key up, Ctrl-P.
static int next_key(int milliseconds) {
    static const char letters[] = "A\20B\16C\6D\2H\1F\5";
    int c = next_byte(milliseconds), number = 0;
    if (c != 27) return c;
    c = next_byte(50);
    if (c != '[' && c != 'O') return NO_KEY;
    while ((c = next_byte(50)) >= '0' && c <= ';') number = (number * 10 + c - '0') % 1000;
    const char *letter = c >= 'A' && c <= 'H' ? strchr(letters, c) : NULL;
    if (letter || c != '~') return letter ? letter[1] : NO_KEY;
    if (number >= 200) return number == 200 ? PASTE_BEGINS : number == 201 ? PASTE_ENDS : NO_KEY;
    return number == 1 || number == 7 ? 1 : number == 3 ? DELETE_KEY : number == 4 || number == 8 ? 5 : NO_KEY;
}

// Puts n bytes in place of those between the cursor and `place`, and the cursor after them.
static bool put_bytes(Editor *d, size_t place, const char *bytes, size_t n, Error *e) {
    size_t from = place < d->at ? place : d->at, to = place < d->at ? d->at : place, rest = d->line.n - to;
    if (!append(&d->line, NULL, n, e)) return false;
    memmove(d->line.bytes + from + n, d->line.bytes + to, rest);
    memcpy(d->line.bytes + from, bytes, n);
    d->line.n = from + n + rest;
    d->at = from + n;
    return true;
}

// Where the character before the cursor begins, or the one after it (step -1 or 1); or the word before it.
static size_t place_beside(const Editor *d, int step, bool word) {
    const char *s = (const char *)d->line.bytes;
    size_t at = d->at, end = step < 0 ? 0 : d->line.n, n;
    while (at != end && (at += (size_t)step) != end) {
        bool starts = (s[at] & 0xC0) != 0x80 && (s[at] == '\n' || columns_of(s + at, d->line.n - at, &n) > 0);
        if (starts && (!word || (isspace((unsigned char)s[at - 1]) && !isspace((unsigned char)s[at])))) break;
    }
    return at;
}

static bool copy_text(Pool *pool, const void *text, size_t n, Value *to, Error *e) {
    char *copy = reserve(pool, plus(n, 1), e);
    if (copy && n) memcpy(copy, text, n);
    *to = (Value){ .kind = IS_STRING, .n = n, .text = copy };
    return copy != NULL;
}

// Shows the message before the one in the line, or after it; the line stays as it was edited.
static bool show_past(Editor *d, int step, Error *e) {
    if (d->shown + (size_t)step >= d->past.n) return true;
    if (!copy_text(&d->pool, d->line.bytes, d->line.n, &d->past.items[d->shown], e)) return false;
    const Value *next = &d->past.items[d->shown += (size_t)step];
    d->at = 0;
    return put_bytes(d, d->line.n, next->text, next->n, e);
}

// Lets a line be typed. Returns the key that ended it: Enter, Ctrl-C or INPUT_ENDS; or NO_KEY where it failed.
static int edit_line(Editor *d, const char *prompt, Error *e) {
    bool ok = append(&d->line, "", 1, e) && push_value(&d->pool, &d->past, (Value){ .kind = IS_STRING }, e);
    d->line.n = d->at = 0;
    d->n_above = d->width = 0;
    d->shown = d->past.n - 1;
    at_prompt = 1;
    int key = interrupted ? CTRL_C : NO_KEY;  // pressed when nothing was there to be stopped
    interrupted = 0;
    use_terminal(EDITING);
    for (bool pastes = false; ok && key != '\n' && key != CTRL_C && key != INPUT_ENDS;) {
        key = next_key(0);
        if (key == NO_KEY && !pastes) ok = draw_line(d, prompt, e);
        if (key == NO_KEY) key = next_key(-1);
        bool is_text = key > 0 && key < 256 && (pastes || (key >= 32 && key != 127));
        if (is_text) ok = ok && put_bytes(d, d->at, (char[]){ (char)key }, 1, e);
        if (is_text) key = NO_KEY;
        switch (key) {
        case 1: d->at = 0; break;
        case 2: d->at = place_beside(d, -1, false); break;
        case 4: if (d->line.n == 0) key = INPUT_ENDS;  // fall through
        case DELETE_KEY: ok = put_bytes(d, place_beside(d, 1, false), "", 0, e); break;
        case 5: d->at = d->line.n; break;
        case 6: d->at = place_beside(d, 1, false); break;
        case 8: case 127: ok = put_bytes(d, place_beside(d, -1, false), "", 0, e); break;
        case 11: ok = put_bytes(d, d->line.n, "", 0, e); break;
        case 12: d->n_above = dprintf(screen, "\033[2J\033[H") < 0; break;
        case 14: ok = show_past(d, 1, e); break;
        case 16: ok = show_past(d, -1, e); break;
        case 21: ok = put_bytes(d, 0, "", 0, e); break;
        case 23: ok = put_bytes(d, place_beside(d, -1, true), "", 0, e); break;
        case 26:
            use_terminal(USUAL);
            kill(0, SIGTSTP);  // the shell has the terminal until it lets the chat go on
            use_terminal(EDITING);
            d->n_above = 0;
            break;
        case PASTE_BEGINS: case PASTE_ENDS: pastes = key == PASTE_BEGINS; break;
        }
    }
    d->at = d->line.n;
    ok = ok && draw_line(d, prompt, e);
    dprintf(screen, key == CTRL_C ? "^C\n" : "\n");
    at_prompt = 0;
    use_terminal(ANSWERING);
    if (d->past.n) d->past.n--;
    return ok ? key : NO_KEY;
}

// ---- A conversation ----

// The text of the next token that has one, unless some is left; false at a control token or the end.
static bool next_text(const Tokenizer *t, const Tokens *tokens, size_t *at, Text *text) {
    while (text->n == 0) {
        if (*at == tokens->n || is_control(t, tokens->ids[*at])) return false;
        text->at = decode(t, *at ? tokens->ids[*at - 1] : -1, tokens->ids[*at], &text->n);
        ++*at;
    }
    return true;
}

// How many of the `old` tokens can stay where a text becomes that of the `new` ones: up to there both make the same
// text, and a control token is beside the place, so that nothing joins there; or no token differs since such a place.
// *from: the next new token.
static size_t count_kept(const Tokenizer *t, const Tokens *old, const Tokens *new, size_t *from) {
    Text a = { NULL, 0 }, b = { NULL, 0 };  // what is left of the token before old->ids[i], and before new->ids[j]
    size_t kept = *from = 0, i = 0, j = 0;
    while (true) {
        bool both_end = a.n == 0 && b.n == 0, ends = j == new->n, is_mark = !ends && is_control(t, new->ids[j]);
        bool same = i == kept + 1 && j == *from + 1 && old->ids[kept] == new->ids[*from];
        bool is_safe = ends || is_mark || (j && is_control(t, new->ids[j - 1]));
        if (both_end && (same || is_safe)) kept = i, *from = j;
        if (both_end && is_mark && i < old->n && old->ids[i] == new->ids[j]) {
            i++, j++;
            continue;
        }
        if (!next_text(t, old, &i, &a) || !next_text(t, new, &j, &b)) return kept;
        size_t n = a.n < b.n ? a.n : b.n;
        if (memcmp(a.at, b.at, n)) return kept;
        a = (Text){ a.at + n, a.n - n };
        b = (Text){ b.at + n, b.n - n };
    }
}

// A chat: what was said, what the model has read of it, and where messages come from.
typedef struct {
    const Model *m;
    Workspace *w;
    Sequence *s;
    Sampler *sampler;
    Text template;
    Buffer template_file;           // what it points into, if --template names a file
    Value messages, before;         // dicts with a role and a content; as they were before this turn, if it fails
    Tokens told;                    // what the model was told and has said; s has read the first of them
    Value opened;                   // the template's last words, if they open a thought that the answer goes on with
    bool has_terminal, has_editor;  // messages are typed: then there are commands; the editor can be used
    bool is_thinking;               // the next answer begins within a thought
    Editor editor;
    Buffer heard;                   // a message or a command
    FILE *log;
    Speed speed;
} Chat;

static bool ends_in(const char *s, size_t n, const char *end) {
    size_t length = strlen(end);
    return n >= length && !memcmp(s + n - length, end, length);
}

static bool copy_marked(Pool *pool, const void *text, const void *marks, size_t n, Value *to, Error *e) {
    Value copy;
    if (!copy_text(pool, text, n, to, e) || !copy_text(pool, marks, n, &copy, e)) return false;
    to->marks = copy.text;
    return true;
}

// Adds a message: a dict of a role, which is a constant, and a content.
static bool add_message(Chat *c, const char *role, const void *text, const void *marks, size_t n, Error *e) {
    Pool *pool = &c->editor.pool;
    Value message = { .kind = IS_DICT }, content;
    return (marks ? copy_marked(pool, text, marks, n, &content, e) : copy_text(pool, text, n, &content, e)) &&
           give(pool, &message, string("role"), string(role), e) &&
           give(pool, &message, string("content"), content, e) && push_value(pool, &c->messages, message, e);
}

// Adds messages of a list from `from` on up to `to`.
static bool add_messages(Chat *c, const Value *list, size_t from, size_t to, Error *e) {
    while (from < to && push_value(&c->editor.pool, &c->messages, list->items[from], e)) from++;
    return from >= to;
}

static bool log_words(const Chat *c, const char *role, const char *text, size_t n, Error *e) {
    if (!c->log) return true;
    fprintf(c->log, "%s: ", role);
    fwrite(text, 1, n, c->log);
    fputs("\n\n", c->log);
    return fflush(c->log) == 0 || fail(e, BROKEN_IO, "--log %.99s: %s", options.log, strerror(errno));
}

static bool say(Chat *c, const char *role, const void *text, size_t n, Error *e) {
    return add_message(c, role, text, NULL, n, e) && log_words(c, role, text, n, e);
}

// Where a text opens the thought in which it ends; n: it ends in none.
static size_t find_thought(const char *text, size_t n) {
    size_t found = n;
    for (size_t i = 0; i < n; i++) {
        if (n - i >= 7 && !memcmp(text + i, "<think>", 7)) found = i;
        if (n - i >= 8 && !memcmp(text + i, "</think>", 8)) found = n;
    }
    return found;
}

// Keeps the template's last words from where they open a thought on. The answer is stored with them.
static bool keep_thought(Chat *c, const Rendered *r, Error *e) {
    size_t n = r->text.n, from = n;
    const char *text = n ? (const char *)r->text.bytes : "";
    while (from > 0 && r->marks.bytes[from - 1]) from--;
    from += find_thought(text + from, n - from);
    c->is_thinking = from < n;
    return from == n || copy_marked(&c->editor.pool, text + from, r->marks.bytes + from, n - from, &c->opened, e);
}

// Cuts what the template writes after an answer, with which the model may go on. `asked` is what asked for it: where
// the template shows nothing of the answer (a thought that is over, white space), it is all that remains; then true.
static bool cut_end(Rendered *r, Rendered *asked) {
    while (r->text.n > 0 && r->marks.bytes[r->text.n - 1]) r->text.n--;
    if (r->text.n >= asked->text.n || memcmp(r->text.bytes, asked->text.bytes, r->text.n)) return false;
    Rendered swap = *r;
    *r = *asked;
    *asked = swap;
    return true;
}

// The tokens of the conversation. An answer at its end is not over: the model may go on with it.
static bool encode_conversation(Chat *c, Tokens *tokens, Error *e) {
    Rendered r = { 0 }, asked = { 0 };
    Value before = c->messages;
    Error ignored = { 0 };
    bool continues = ends_with(&before, "assistant"), begins = !continues;
    tokens->n = 0;
    c->opened = (Value){ .kind = IS_STRING };
    if (!before.n) return true;
    before.n -= continues;
    bool ok = render_chat(c->m, c->template, &c->messages, !continues, &r, e);
    if (ok && continues) {
        Value said = last_content(&c->messages);
        c->is_thinking = find_thought(said.text, said.n) < said.n;
        if (!before.n || !render_chat(c->m, c->template, &before, true, &asked, &ignored)) asked.text.n = 0;
        begins = cut_end(&r, &asked);
    }
    ok = ok && (!begins || keep_thought(c, &r, e));
    if (ok && r.text.n == 0) ok = fail(e, MISUSE, "the chat template makes no text of these messages");
    ok = ok && encode_rendered(&c->m->tokenizer, &r, tokens, e);
    free_rendered(&r);
    free_rendered(&asked);
    return ok;
}

// Encodes the conversation. If the answer would not fit, the oldest turns are dropped until half of the context is
// free, but neither the system's text nor the last turn.
static bool make_room(Chat *c, Tokens *tokens, Error *e) {
    size_t context = (size_t)c->s->cache->context, half = context / 2, most = most_tokens(), end;
    size_t wanted = options.n_predict < 0 ? context / 4 : most < half ? most : half, first = first_turn(&c->messages);
    size_t n_before = c->messages.n;
    bool ok = encode_conversation(c, tokens, e);
    for (bool drops = tokens->n + wanted > context && !options.no_shift; ok && drops && tokens->n > half;) {
        Value old = c->messages;
        for (end = first + 1; end < old.n; end++)  // an eighth of them at once, since each time all are encoded
            if (has_role(&old.items[end], "user") && (end - first) * 8 >= old.n - first) break;
        if (end >= old.n) break;
        c->messages = (Value){ .kind = IS_LIST };
        ok = add_messages(c, &old, 0, first, e) && add_messages(c, &old, end, old.n, e) &&
             encode_conversation(c, tokens, e);
    }
    if (n_before > c->messages.n && tokens->n < context)
        fprintf(stderr, "[the context is full: the oldest %zu messages are forgotten]\n", n_before - c->messages.n);
    return ok;
}

// Has the model read what it has not read of the conversation yet, and at least the last token.
static bool catch_up(Chat *c, const Tokens *now, Error *e) {
    size_t from, kept = count_kept(&c->m->tokenizer, &c->told, now, &from);
    bool ok = true;
    rewind_sequence(c->s, (int)kept);
    for (c->told.n = kept; ok && from < now->n; from++) ok = emit(&c->told, now->ids[from], e);
    if (c->s->n > 0 && (size_t)c->s->n == c->told.n) rewind_sequence(c->s, c->s->n - 1);
    size_t n_read = (size_t)c->s->n;
    Tokens unread = { .ids = c->told.ids + n_read, .n = c->told.n - n_read };
    return ok && take_prompt(c->m, c->w, c->s, &unread, &c->speed, e);
}

static bool append_marked(Rendered *r, const char *text, const char *marks, size_t n, Error *e) {
    return append(&r->text, text, n, e) && append(&r->marks, marks, n, e);
}

// Adds what the model has said to the conversation; or to its last message, which it has continued. Control tokens are
// spelled and marked: templates look for </think>.
static bool note_answer(Chat *c, const Continuation *t, bool continued, Error *e) {
    const Tokenizer *v = &c->m->tokenizer;
    Value old = { 0 };
    if (continued) old = last_content(&c->messages);
    Rendered said = { 0 };
    bool ok = append_marked(&said, old.text, old.marks, old.n, e) &&
              append_marked(&said, c->opened.text, c->opened.marks, c->opened.n, e);
    for (size_t i = 0, n; ok && i < t->n_made; i++) {
        int before = c->told.ids[c->told.n - 1], id = c->told.n < (size_t)c->s->n ? c->s->ids[c->told.n] : t->last;
        const char *bytes = is_control(v, id) ? piece(v, id, &n) : decode(v, before, id, &n);
        ok = append_marked(&said, bytes, is_control(v, id) ? template_marks : NULL, n, e) && emit(&c->told, id, e);
    }
    const char *text = (const char *)said.text.bytes, *stop = t->stop_text ? t->stop_text : "";
    size_t n = said.text.n;
    while (*stop && n > 0 && !ends_in(text, n, stop)) n--;  // after the stop text, its last token may say more
    n -= n > 0 ? strlen(stop) : 0;
    c->messages.n -= continued;
    ok = ok && add_message(c, "assistant", text, (const char *)said.marks.bytes, n, e);
    free_rendered(&said);
    if (!ok) return false;
    Value *content = &c->messages.items[c->messages.n - 1].items[3];
    if (v->flags & DUMMY_PREFIX && !continued && content->n && *content->text == ' ') {  // is it the template's?
        Tokens now = { 0 };
        size_t from;
        bool made = encode_conversation(c, &now, e);  // a template that refuses answers says so when it is asked again
        if (made && count_kept(v, &c->told, &now, &from) < c->told.n) content->text++, content->marks++, content->n--;
        free(now.ids);
        if (e->status == NO_MEMORY) return false;
        e->status = DONE;
    }
    size_t n_old = old.n < content->n ? old.n : content->n;
    return log_words(c, "assistant", content->text + n_old, content->n - n_old, e);
}

static void put_record(const Model *m, const Passage *p);  // chapter 12a

// Answers the last message, or continues the last answer. If Ctrl-C stops the model while it reads, it is as if this
// turn had not been.
static bool answer(Chat *c, Error *e) {
    bool continues = ends_with(&c->messages, "assistant"), hides = options.think && !strcmp(options.think, "hide");
    Tokens now = { 0 };
    Passage p = { .why = AT_INTERRUPT, .seed = options.seed };
    p.c = (Continuation){ c->s, c->sampler, { .stops = &options.stops }, .limit = most_tokens(), .last = -1 };
    if (options.json) p.c.printer.to = &p.text, p.c.printer.error = &p.error;
    double start = clock_seconds();
    bool ok = make_room(c, &now, e) && catch_up(c, &now, e);
    free(now.ids);
    p.prompt_seconds = clock_seconds() - start;
    p.tokens.n = c->told.n;
    if (!ok) c->messages = c->before;
    if (ok && continues) p.c.last = c->told.ids[c->told.n - 1];
    if (hides) p.c.printer.thought = c->is_thinking ? HIDDEN : WATCHED;
    if (ok) tell_seed(c->sampler);
    start = clock_seconds();
    ok = ok && generate_ahead(c->m, c->w, &p.c, &p.why, &c->speed, e);
    p.seconds = clock_seconds() - start;
    if (ok) count_made(&c->speed, &p.c, start);
    ok = ok ? note_answer(c, &p.c, continues, e) : e->status == INTERRUPTED;
    if (p.error.status) ok = false, *e = p.error;
    if (ok) p.ids = (Tokens){ .ids = c->told.ids + p.tokens.n, .n = p.c.n_made };
    if (ok && options.json) putchar('{'), put_record(c->m, &p);
    if (ok) puts(options.json ? "}" : "");
    fflush(stdout);
    free(p.text.bytes);
    if (!ok) return false;
    e->status = DONE;
    if (p.why > AT_STOP_TEXT && !options.quiet) fprintf(stderr, "[stopped %s]\n", stop_names[p.why]);
    if (p.why == AT_INTERRUPT && options.single) return fail(e, INTERRUPTED, "interrupted");
    if (p.why == AT_INTERRUPT) interrupted = 0;
    return true;
}

// Reads a conversation in place of this one: a list of messages, or an object with `messages`.
static bool load_messages(Chat *c, const char *path, Error *e) {
    Value list;
    if (!read_messages(path, &c->editor.pool, &list, e)) return false;
    for (size_t i = 0; i < list.n; i++) {
        const Value *role = find_member(&list.items[i], "role"), *content = find_member(&list.items[i], "content");
        if (!role || !content || role->kind != IS_STRING || content->kind != IS_STRING)
            return refuse(e, "%.99s: message %zu needs a role and a content, both texts", path, i + 1);
    }
    c->messages = list;
    return true;
}

static void put_json_string(FILE *f, const char *text, size_t n);  // chapter 13

static bool save_messages(const Value *messages, const char *path, Error *e) {
    Output o;
    Pool pool = { 0 };
    Value old;
    bool is_other = !access(path, F_OK) && !read_messages(path, &pool, &old, e);
    free_pool(&pool);
    if (is_other) return fail(e, MISUSE, "%.100s exists and is no conversation; take another name", path);
    bool ok = open_output(&o, path, e);
    if (ok) fputs("{\"messages\": [", o.stream);
    for (size_t i = 0; ok && i < messages->n; i++) {
        const Value *message = &messages->items[i], *role = find_member(message, "role");
        const Value *content = find_member(message, "content");
        fputs(i ? ",\n  {\"role\": " : "\n  {\"role\": ", o.stream);
        put_json_string(o.stream, role->text, role->n);
        fputs(", \"content\": ", o.stream);
        put_json_string(o.stream, content->text, content->n);
        fputc('}', o.stream);
    }
    if (ok) fputs("\n]}\n", o.stream);
    return close_output(&o, ok, e);
}

// Puts the system's text before all messages, in place of the one that there is; NULL: takes it away.
static bool set_system(Chat *c, const char *text, Error *e) {
    Value old = c->messages;
    c->messages = (Value){ .kind = IS_LIST };
    return (!text || say(c, "system", text, strlen(text), e)) && add_messages(c, &old, first_turn(&old), old.n, e);
}

// Says the text of a file, or of stdin, without a newline at its end.
static bool say_file(Chat *c, const char *path, Error *e) {
    Buffer text = { 0 };
    bool ok = read_all(path, MAX_TEXT, &text, e);
    if (text.n > 0 && text.bytes[text.n - 1] == '\n') text.n--;
    ok = ok && say(c, "user", text.bytes, text.n, e);
    free(text.bytes);
    return ok;
}

// Commands of a chat at a terminal.
enum { HELP, CLEAR, UNDO, REGEN, CONTINUE, SAVE, LOAD, READ, SYSTEM, COUNT, BYE, EXIT, QUIT, N_COMMANDS };
static const struct { const char *name, *argument, *help; bool asks; } commands[N_COMMANDS] = {
    { "help", "", "this list", false },
    { "clear", "", "forget the conversation, but not the system's text", false },
    { "undo", "", "forget the last message and its answer", false },
    { "regen", "", "answer the last message again", true },
    { "continue", "", "go on with the last answer", true },
    { "save", " FILE", "write the conversation to a file, as JSON; special tokens become plain text", false },
    { "load", " FILE", "go on with the conversation in a file", false },
    { "read", " FILE", "say the text of a file", true },
    { "system", " TEXT", "change the system's text; without TEXT: to the template's", false },
    { "tokens", "", "count the tokens of the conversation", false },
    { "bye", "", "end the chat, as Ctrl-D", false },
    { "exit", "", "likewise", false },
    { "quit", "", "likewise", false },
};

// Does what the command in c->heard says. *asks: whether there is something to be answered then. False without an
// error: the chat ends.
static bool do_command(Chat *c, bool *asks, Error *e) {
    char *name = (char *)c->heard.bytes + 1, *argument = name + strcspn(name, " \t");
    int which = 0, length = (int)(argument - name);
    while (c->heard.bytes[c->heard.n - 1] == ' ') c->heard.bytes[--c->heard.n] = 0;
    argument += strspn(argument, " \t");
    while (which < N_COMMANDS && (strncmp(commands[which].name, name, (size_t)length) || commands[which].name[length]))
        which++;
    if (which == N_COMMANDS) return fail(e, MISUSE, "there is no command /%.*s; see /help", length, name);
    if (which != SYSTEM && !*argument != !*commands[which].argument)
        return fail(e, MISUSE, "usage: /%s%s", commands[which].name, commands[which].argument);
    *asks = commands[which].asks;
    Value *list = &c->messages;
    size_t n = list->n;
    Tokens tokens = { 0 };
    bool ok = which < BYE;
    switch (which) {
    case HELP:
        for (int i = 0; i < N_COMMANDS; i++) {
            int width = fprintf(stderr, "  /%s%s", commands[i].name, commands[i].argument);
            fprintf(stderr, "%*s%s\n", 18 - width, "", commands[i].help);
        }
        fprintf(stderr, "A message of several lines: between \"\"\" and \"\"\", or with \\ at the end of a line.\n");
        break;
    case CLEAR: list->n = first_turn(list); break;
    case UNDO: case REGEN:
        while (n > 0 && !has_role(&list->items[n - 1], "user")) n--;
        if (n == 0) return fail(e, MISUSE, "nothing has been said yet");
        list->n = which == UNDO ? n - 1 : n;
        break;
    case CONTINUE:
        if (!ends_with(list, "assistant")) return fail(e, MISUSE, "there is no answer to continue");
        list->n -= last_content(list).n == 0;
        break;
    case SAVE: ok = save_messages(list, argument, e); break;
    case LOAD: ok = load_messages(c, argument, e); break;
    case READ: return say_file(c, argument, e);
    case SYSTEM: ok = set_system(c, *argument ? argument : NULL, e); break;
    case COUNT:
        ok = encode_conversation(c, &tokens, e);
        if (ok) fprintf(stderr, "[%zu tokens of %d]\n", tokens.n, c->s->cache->context);
        free(tokens.ids);
        return ok;
    }
    if (ok && !*asks && which != HELP) fprintf(stderr, "[%zu messages]\n", list->n);
    return ok;
}

// Reads a message or a command into c->heard. At a terminal, """ or \ at the end of a line asks for more lines; but
// what has several lines at once was pasted, and is a message as it is. False at the end or, with an error, when
// Ctrl-C ends the chat.
static bool hear(Chat *c, bool *is_command, Error *e) {
    Editor *d = &c->editor;
    Buffer *heard = &c->heard;
    bool quoted = false, warned = false;
    heard->n = 0;
    for (bool more = true; more;) {
        int key = c->has_editor ? edit_line(d, heard->n ? ". " : "> ", e) : read_line(&d->line, e) ? '\n' : INPUT_ENDS;
        if (key == CTRL_C && heard->n == 0 && d->line.n == 0) {
            if (warned) return fail(e, INTERRUPTED, "interrupted");
            warned = true;
            fprintf(stderr, "[Ctrl-C again, or Ctrl-D, ends the chat]\n");
        }
        if (key == NO_KEY || key == INPUT_ENDS) return false;
        const char *s = (const char *)d->line.bytes;
        size_t n = d->line.n;
        while (c->has_editor && n > 0 && s[n - 1] == '\n') n--;
        if (key == CTRL_C) heard->n = 0;
        if (key == CTRL_C || (c->has_editor && heard->n == 0 && n == 0)) continue;
        bool as_it_is = !c->has_terminal || memchr(s, '\n', n);
        if (heard->n == 0) quoted = !as_it_is && n >= 3 && ends_in(s, 3, "\"\"\"");
        if (!append(heard, s, n, e)) return false;
        const char *end = quoted ? "\"\"\"" : "\\";
        bool ends = (quoted ? heard->n >= 6 : !as_it_is) && ends_in((char *)heard->bytes, heard->n, end);
        more = quoted != ends;
        heard->n -= ends ? strlen(end) : 0;
        if (!append(heard, "\n", 1, e)) return false;
    }
    if (quoted) memmove(heard->bytes, heard->bytes + 3, heard->n -= 3);
    const char *text = (const char *)heard->bytes;
    heard->bytes[--heard->n] = 0;  // in place of the last \n
    *is_command = c->has_terminal && !quoted && text[0] == '/' && isalpha((unsigned char)text[1]) &&
                  !memchr(text, '\n', heard->n);
    Value past;
    return !c->has_editor || (copy_text(&d->pool, text, heard->n, &past, e) &&
                              push_value(&d->pool, &d->past, past, e));
}

// Opens what a chat needs and says what is said before it begins. *asks: whether something is to be answered.
static bool begin_chat(Chat *c, bool *asks, Error *e) {
    if (!find_template(c->m, options.template_name, &c->template_file, &c->template, e)) return false;
    if (options.log && !(c->log = fopen(options.log, "a")))
        return fail(e, io_status(), "--log %.99s: %s", options.log, strerror(errno));
    if (options.messages && !load_messages(c, options.messages, e)) return false;
    if (options.system && !set_system(c, options.system, e)) return false;
    c->before = c->messages;
    c->has_terminal = !options.single && isatty(STDIN_FILENO);
    c->has_editor = c->has_terminal && start_editor();
    bool is_asked = ends_with(&c->messages, "user");  // by the last message of the history
    *asks = options.prompt || options.single || is_asked;
    if (options.prompt) return say(c, "user", options.prompt, strlen(options.prompt), e);
    if (!options.single || is_asked) return true;
    return say_file(c, "-", e) && (last_content(&c->messages).n > 0 ||
                                   fail(e, MISUSE, "nothing to answer: stdin is empty, and there is no -i TEXT"));
}

// Takes turns until the input ends (exit 0) or Ctrl-C ends it at the prompt (130). In an answer, Ctrl-C stops it. At
// a terminal, neither a command that fails nor, but for --no-shift, a message that does not fit ends the chat.
static bool run_chat(const Model *m, Workspace *w, Sequence *s, Sampler *sampler, Error *e) {
    Value none = { .kind = IS_LIST };
    Chat c = { .m = m, .w = w, .s = s, .sampler = sampler, .messages = none, .before = none, .editor.past = none };
    bool asks = false, is_command, ok = begin_chat(&c, &asks, e);
    for (;;) {
        ok = ok && (!asks || answer(&c, e));
        if (!ok) c.messages = c.before;
        bool is_last = e->status == NO_MEMORY || e->status == INTERRUPTED || (e->status == NO_ROOM && options.no_shift);
        if (e->status && c.has_terminal && !is_last) {
            disarm(e->text, strlen(e->text), "");
            fprintf(stderr, "[%s]\n", e->text);
            e->status = DONE;
            ok = true;
        }
        if (!ok || ferror(stdout) || options.single) break;
        c.before = c.messages;
        if (!hear(&c, &is_command, e)) break;
        asks = true;
        ok = is_command ? do_command(&c, &asks, e) : say(&c, "user", c.heard.bytes, c.heard.n, e);
    }
    if (terminal_use) use_terminal(USUAL);
    if (c.log && fclose(c.log) && !e->status) fail(e, BROKEN_IO, "--log %.99s: %s", options.log, strerror(errno));
    free(c.editor.line.bytes);
    free(c.heard.bytes);
    free(c.told.ids);
    free(c.template_file.bytes);
    free_pool(&c.editor.pool);
    ok = e->status == DONE;
    if (ok || e->status == NO_ROOM) tell_speed(m, &c.speed);
    return ok;
}

/* ==== 12a. Many texts, scores =======================================================================================
   For scripts: many prompts, several continuations of each, scores of given texts. All go through the model side by
   side, each in a sequence of its own, since a pass of many rows takes little longer than one of a single row. A text
   that begins like another one forks its sequence, so that a common beginning is read once. A row's bits depend on its
   own text only, so each text is what a run of its own would give. Results come in the order of the input. */

static double surprise(const float *logits, int n, int token);     // chapter 13
static bool set_own(Text key, Text value, Options *to, Error *e);   // chapter 14

enum { MAX_LOGPROBS = 100, MOST_TOGETHER = 64, MOST_HELD = 1024 };  // texts in a pass; texts that wait to be printed

typedef enum { CONTINUED, SCORED, COMPARED, EVALUATED } ScriptKind;

// How likely a token was, and its place among all, from 1 on.
typedef struct { int id, rank; double logprob; } Score;

// A line of the input, and what its texts have in common.
typedef struct Line {
    size_t number;  // from 1 on
    int n, n_left;  // texts: samples, choices, or one; those that are not printed
    Value value;    // the line, if it is JSON
    Value choices;  // the texts that may be written, or are compared: strings; none: n is 0
    Pool pool;      // what these point into
    Texts stops;
    Text wanted;    // a task's answer
    char room[32];  // for it, if it is a number
} Line;

typedef struct {
    const Model *m;
    Workspace *w;
    const Sampler *sampler;
    ScriptKind kind;
    const Tokens *given;            // the only text, and
    Text prompt;                    // how it is spelled; NULL: texts come as lines
    Sequence *sequences;
    int n_slots, n_free;            // of these; those that no text needs
    Passage *users[MOST_TOGETHER];  // NULL: the text that a sequence was for is done
    Passage *first, **end;          // a queue, in the order of the input
    size_t n_held, n_lines, n_failed, failed_line, n_tasks, n_right, n_written;
    float *logits;                  // (V)  without the tokens that may not come
    Buffer exemplars;               // of an evaluation
    Text template;                  // for lines with messages, once there was one; and the file that it is in
    Buffer template_file;
    Error failure;                  // the first
} Script;

// ---- The model's answers ----

// Adds the score of a token, and those of the likeliest; of equals, the lowest id comes first.      logits (V)
static void add_scores(const Model *m, Passage *p, const float *logits, int token) {
    size_t n = (size_t)m->config.n_tokens, most = (size_t)options.logprobs;
    Score scores[1 + MAX_LOGPROBS] = { { token, 1, -surprise(logits, (int)n, token) } };
    Candidate *c = p->sampler.candidates, own = { token, logits[token] };
    for (size_t i = 0; i < n; i++) {
        c[i] = (Candidate){ (int)i, logits[i] };
        scores[0].rank += is_likelier(c[i], own);
    }
    if (most) make_heap(c, n);
    for (size_t k = 1; k <= most; k++) {
        const Candidate *next = take_likeliest(c, &n);
        scores[k] = (Score){ next->id, (int)k, scores[0].logprob + ((double)next->p - own.p) };
    }
    p->logprob += scores[0].logprob;
    append(&p->scores, scores, (1 + most) * sizeof *scores, &p->error);
}

// Ends a text; `wrong`, if it is not NULL, says what has failed.
static void end_passage(Script *s, Passage *p, Stop why, const Error *wrong) {
    if (wrong) p->error = *wrong;
    print_bytes(&p->c.printer, NULL, 0);
    s->users[p->c.sequence - s->sequences] = NULL;
    s->n_free++;
    p->why = why;
    p->seconds = clock_seconds() - p->began - p->prompt_seconds;
    p->done = true;
}

// Whether a choice begins with what is written so far and goes on with these bytes; or ends there, if there are none.
static bool fits_choice(const Passage *p, const char *bytes, size_t n) {
    size_t made = p->text.n;
    for (const Value *v = p->line->choices.items, *end = v + p->line->choices.n; v < end; v++)
        if (v->n >= made + n && (n > 0 || v->n == made) && !memcmp(v->text + made, bytes, n) &&
            (made == 0 || !memcmp(v->text, p->text.bytes, made))) return true;
    return false;
}

// Copies the logits of the tokens that lead to a choice; an end token does after a whole one. Returns how many there
// are beside those.
static int restrict_tokens(Script *s, const Passage *p, const float *logits) {
    const Tokenizer *t = &s->m->tokenizer;
    bool is_whole = fits_choice(p, "", 0);
    int n_left = 0;
    for (int id = 0; id < s->m->config.n_tokens; id++) {
        size_t n;
        const char *bytes = decode(t, p->c.last, id, &n);
        bool ends = is_end_token(t, id), fits = ends ? is_whole : n > 0 && fits_choice(p, bytes, n);
        s->logits[id] = fits ? logits[id] : -INFINITY;
        n_left += fits && !ends;
    }
    return n_left;
}

// Whether an answer is there: its line has ended or, after steps, its paragraph.
static bool is_answered(const Buffer *text) {
    const char *at = (const char *)text->bytes, *end = options.cot ? "\n\n" : "\n";
    size_t n = text->n;
    while (n > 0 && isspace((unsigned char)*at)) at++, n--;
    return n > 0 && memmem(at, n, end, strlen(end));
}

// Takes what the model says after the token at a position: a score, or the next token.
static void take_logits(Script *s, Passage *p, size_t position, const float *logits) {
    size_t n_made = p->c.n_made;
    bool is_free = s->kind != CONTINUED || p->line->choices.n == 0;
    Stop why = GO_ON;
    if (p->prompt_seconds <= 0) p->prompt_seconds = clock_seconds() - p->began;
    if (p->scored < p->tokens.n) {
        add_scores(s->m, p, logits, p->tokens.ids[position + 1]);
        if (position + 2 == p->tokens.n) why = AT_LIMIT;
    } else if (!is_free && restrict_tokens(s, p, logits) == 0) why = AT_END_TOKEN;
    else why = next_token(s->m, &p->c, is_free ? logits : s->logits);
    if (p->c.n_made > n_made && emit(&p->ids, p->c.last, &p->error) && options.logprobs)
        add_scores(s->m, p, logits, p->c.last);
    if (why == GO_ON && s->kind == EVALUATED && is_answered(&p->text)) why = AT_LIMIT;
    if (!is_free && why != GO_ON && why != AT_INTERRUPT && !fits_choice(p, "", 0))
        fail(&p->error, NO_ROOM, "the text could not become one of --one-of");
    if (why != GO_ON || p->error.status) end_passage(s, p, why, NULL);
}

// ---- Passes ----

// How many of the n tokens are the passage's, from the first on. What needs logits is not counted.
static size_t n_common(const Passage *p, const int *ids, size_t n) {
    size_t i = 0, most = p->scored < p->tokens.n ? p->scored - 1 : p->tokens.n - 1;
    while (i < n && i < most && ids[i] == p->tokens.ids[i]) i++;
    return i;
}

// Gives a passage the free sequence with least in common, and copies to it the longest common beginning of any.
// False if the passage has to wait: for a free sequence, or because one is about to read more of what both have in
// common.
static bool start_passage(Script *s, Passage *p) {
    size_t common = 0, planned = 0, least = 0;
    Sequence *from = NULL, *to = NULL;
    for (int i = 0; i < s->n_slots && s->n_free > 0; i++) {
        Sequence *text = &s->sequences[i];
        const Passage *user = s->users[i];
        size_t n = n_common(p, text->ids, (size_t)text->n), later = 0;
        if (user) later = n_common(p, user->tokens.ids, user->tokens.n);
        if (later > planned) planned = later;
        if (n > common) common = n, from = text;
        if (!user && (!to || n < least || (n == least && text->n < to->n))) least = n, to = text;
    }
    if (!to || planned > common) return false;
    if (from && from != to) fork_sequence(to, from, (int)common);
    else rewind_sequence(to, (int)common);
    s->users[to - s->sequences] = p;
    s->n_free--;
    p->c.sequence = to;
    p->began = clock_seconds();
    return true;
}

// Sends rows of some passages through the model. Those of a passage follow each other. If that fails, the first one has
// a pass of its own, so that only a passage whose numbers are not finite fails.
static void send_rows(Script *s, const Row *rows, int n) {
    Error e = { 0 };
    int n_first = 1;
    while (n_first < n && rows[n_first].sequence == rows[0].sequence) n_first++;
    bool ok = forward(s->m, s->w, s->sequences, rows, n, &e), together = true;
    if (!ok && n_first == n) end_passage(s, s->users[rows[0].sequence], GO_ON, &e);
    else if (!ok) {
        send_rows(s, rows, n_first);
        send_rows(s, rows + n_first, n - n_first);
    }
    for (int i = 0; ok && i < s->w->n_wanted; i++) {
        const Row *row = &rows[s->w->wanted[i]];
        Passage *p = s->users[row->sequence];
        const float *logits = together ? logits_of(s->m, s->w, i, &e) : NULL;
        together = logits != NULL;
        if (!together && make_logits(s->m, s->w, i, 1, &e)) logits = s->w->logits;
        if (p && logits) take_logits(s, p, (size_t)row->position, logits);
        else if (p) end_passage(s, p, GO_ON, &e);
    }
}

// One pass: of each text, in order, given tokens or the next one, as many as there is room for.
static void advance(Script *s) {
    Row *rows = s->w->room;
    int n = 0, most = s->w->settings.batch;
    for (Passage *p = s->first; p && n < most; p = p->next) {
        if (p->done || (!p->c.sequence && !start_passage(s, p))) continue;
        size_t at = (size_t)p->c.sequence->n, end = p->tokens.n - (p->scored < p->tokens.n);  // the last has no next
        int slot = (int)(p->c.sequence - s->sequences);
        if (at >= p->tokens.n) rows[n++] = (Row){ p->c.last, (int)at, slot, true };
        for (; at < end && n < most; at++)
            rows[n++] = (Row){ p->tokens.ids[at], (int)at, slot, at + 1 >= p->scored || at + 1 == p->tokens.n };
    }
    if (n > 0) send_rows(s, rows, n);
}

// ---- Lines of input ----

// The text of a string or a number; `at` is NULL for other values, and if there is none.
static Text value_text(const Value *v, char room[32]) {
    if (!v || (v->kind != IS_STRING && v->kind != IS_INTEGER && v->kind != IS_FLOAT)) return (Text){ NULL, 0 };
    if (v->kind == IS_STRING) return (Text){ v->text, v->n };
    if (v->kind == IS_INTEGER) snprintf(room, 32, "%lld", (long long)v->integer);
    else snprintf(room, 32, "%.17g", v->number);
    return (Text){ room, strlen(room) };
}

// Takes the texts between the bars of --choose or --one-of.
static bool split_choices(Line *l, const char *at, Error *e) {
    for (size_t n; at; at = at[n] ? at + n + 1 : NULL) {
        n = strcspn(at, "|");
        if (!push_value(&l->pool, &l->choices, (Value){ .kind = IS_STRING, .n = n, .text = at }, e)) return false;
    }
    return true;
}

// Reads a text, or a list of them, at which a line's text ends.
static bool read_stops(Line *l, const Value *v, Texts *stops, Error *e) {
    const Value *list = v->kind == IS_LIST ? v->items : v;
    size_t n = v->kind == IS_LIST ? v->n : 1;
    stops->n = 0;
    for (size_t i = 0; i < n; i++) {
        bool fits = list[i].kind == IS_STRING && list[i].n > 0 && list[i].n <= MAX_STOP && i < MAX_TEXTS;
        Value copy;
        if (!fits || memchr(list[i].text, 0, list[i].n))
            return refuse(e, "\"stop\": expected up to %d texts of 1 to %d bytes", MAX_TEXTS, MAX_STOP);
        if (!copy_text(&l->pool, list[i].text, list[i].n, &copy, e)) return false;
        stops->at[stops->n++] = copy.text;
    }
    return true;
}

// Reads a conversation that a line has in place of a prompt.
static bool read_conversation(Script *s, const Value *messages, Tokens *tokens, Error *e) {
    Rendered r = { 0 };
    if (messages->kind != IS_LIST) return refuse(e, "\"messages\" is no list");
    bool ok = (s->template.n || find_template(s->m, options.template_name, &s->template_file, &s->template, e)) &&
              render_chat(s->m, s->template, messages, true, &r, e) &&
              encode_rendered(&s->m->tokenizer, &r, tokens, e);
    free_rendered(&r);
    return ok && (tokens->n || refuse(e, "the messages make no text"));
}

// Reads a line that is a JSON object: its prompt or the tokens of its messages, and what it has in place of options.
static bool read_members(Script *s, Line *l, Options *own, Text *prompt, Tokens *told, Error *e) {
    for (size_t i = 0; i < l->value.n; i += 2) {
        const Value *key = &l->value.items[i];
        char room[32];
        Text name = { key->text, key->n }, text = value_text(key + 1, room);
        bool ok = true;
        if (is_text(name, "prompt") && key[1].kind == IS_STRING) *prompt = text;
        else if (is_text(name, "stop")) ok = read_stops(l, key + 1, &own->stops, e);
        else if (is_text(name, "messages") && s->kind == CONTINUED) ok = read_conversation(s, key + 1, told, e);
        else if (!is_text(name, "id") || !text.at) ok = set_own(name, text, own, e);
        if (!ok) return false;
    }
    if (told->n && prompt->at) return refuse(e, "a \"prompt\" beside \"messages\"");
    return told->n || prompt->at || refuse(e, "no \"prompt\"");
}

// Reads a task. One of the first lines becomes an exemplar, with its answer; of others the exemplars and the question
// are what the model reads. If there are choices, the answer is one of them or the index of one.
static bool read_task(Script *s, Line *l, Buffer *asked, Error *e) {
    const Value *question = find_member(&l->value, "question"), *steps = find_member(&l->value, "solution");
    const Value *list = find_member(&l->value, "choices"), *answer = find_member(&l->value, "answer");
    bool ok = question && question->kind == IS_STRING && (!list || list->kind == IS_LIST);
    if (!list) l->wanted = value_text(answer, l->room);
    for (size_t i = 0; ok && list && answer && i < list->n; i++) {
        const Value *c = &list->items[i];
        ok = c->kind == IS_STRING;
        bool is_it = answer->kind == IS_INTEGER ? answer->integer == (int64_t)i
                                                : ok && answer->kind == IS_STRING && !compare_strings(answer, c);
        if (is_it) l->wanted = (Text){ c->text, c->n };
    }
    if (!ok || !l->wanted.at)
        return refuse(e, "expected \"question\" and \"answer\": of \"choices\", a list of texts, one or its index");
    if (list) l->choices = *list;
    bool is_exemplar = l->number <= (size_t)options.shots, shows = options.cot && steps && steps->kind == IS_STRING;
    const char *opens = options.cot ? "\nAnswer: Let's think step by step." : "\nAnswer:";
    const Text parts[] = {
        { (const char *)s->exemplars.bytes, is_exemplar ? 0 : s->exemplars.n }, { "Question: ", 10 },
        { question->text, question->n }, { opens, strlen(opens) }, { " ", is_exemplar || list },
        { shows ? steps->text : "", shows ? steps->n : 0 }, { " The answer is ", shows ? 15 : 0 }, l->wanted,
        { "\n\n", 2 },
    };
    for (int i = 0; ok && i < (is_exemplar ? 9 : 5); i++)
        ok = append(is_exemplar ? &s->exemplars : asked, parts[i].at, parts[i].n, e);
    return ok;
}

// The tokens of a prompt and what follows it.
static bool encode_prompt(const Script *s, Text prompt, Text more, Tokens *out, Error *e) {
    const Tokenizer *t = &s->m->tokenizer;
    const Span spans[] = { { prompt.at, prompt.n, options.special }, { more.at, more.n, options.special } };
    bool begins = t->flags & ADD_BOS || (prompt.n == 0 && t->bos >= 0);
    if ((begins && !emit_around(t, false, out, e)) || !encode(t, spans, 2, out, e)) return false;
    if (out->n_dropped)
        fprintf(stderr, "line %zu: %zu bytes were left out: no token for them\n", s->n_lines, out->n_dropped);
    return out->n || fail(e, MISUSE, "an empty prompt, and the model has no begin token; see -i");
}

// Appends a text of a line to the queue; its tokens are missing yet.
static Passage *add_passage(Script *s, Line *l, const Options *own, Error *e) {
    Passage *p = allocate(1, sizeof *p, e);
    if (!p) return NULL;
    *p = (Passage){ .line = l, .number = l->n++, .scored = SIZE_MAX, .sampler = *s->sampler };
    p->seed = own->seed + (uint64_t)p->number;
    p->sampler.random = first_state(p->seed);
    p->sampler.temperature = s->kind == EVALUATED ? 0 : (float)own->temperature;
    p->sampler.top_k = (int)own->top_k;
    p->sampler.top_p = (float)own->top_p;
    p->sampler.min_p = (float)own->min_p;
    p->c.sampler = &p->sampler;
    p->c.limit = own->n_predict < 0 || l->choices.n ? SIZE_MAX : (size_t)own->n_predict;
    p->c.printer = (Printer){ .stops = &l->stops, .to = &p->text, .error = &p->error };
    *s->end = p;
    s->end = &p->next;
    s->n_held++;
    l->n_left++;
    return p;
}

// Adds the texts that a line asks for; all begin with these tokens of the prompt. Where choices are compared, what is
// scored begins where not all have the prompt's tokens: its last one may become another together with what follows.
static bool add_texts(Script *s, Line *l, const Options *own, Text prompt, const Tokens *tokens, Error *e) {
    bool compares = l->choices.n > 0 && s->kind != CONTINUED;
    size_t n = compares ? l->choices.n : s->kind == CONTINUED ? (size_t)options.samples : 1;
    size_t context = (size_t)s->w->settings.context, common = compares ? tokens->n : 1;
    Passage **first = s->end, *p;
    for (size_t i = 0; i < n; i++) {
        if (!(p = add_passage(s, l, own, e))) return false;
        const Value *c = compares ? &l->choices.items[i] : NULL;
        if (compares && !encode_prompt(s, prompt, (Text){ c->text, c->n }, &p->tokens, e)) return false;
        for (size_t k = 0; !compares && k < tokens->n; k++) if (!emit(&p->tokens, tokens->ids[k], e)) return false;
        for (size_t k = 0; k < common; k++)
            if (k == p->tokens.n || p->tokens.ids[k] != tokens->ids[k]) common = k;
        if (p->tokens.n > context)
            return fail(e, NO_ROOM, "%zu tokens, the context has %zu; see -c", p->tokens.n, context);
        p->c.last = p->tokens.ids[p->tokens.n - 1];
    }
    for (p = *first; p && (compares || s->kind == SCORED); p = p->next) {
        p->scored = common;
        if (compares && (common == 0 || common == p->tokens.n))
            return refuse(e, "choice %d is empty, or becomes part of the prompt's last token", p->number + 1);
        if (p->tokens.n < 2) return refuse(e, "a single token, with none before it to predict it from");
    }
    return true;
}

// Reads what a line asks for, and adds its texts. An exemplar has none.
static bool open_texts(Script *s, Line *l, Text text, Error *e) {
    Options own = options;
    Buffer asked = { 0 };
    Tokens tokens = { 0 };
    const char *list = s->kind == COMPARED ? options.choose : s->kind == CONTINUED ? options.one_of : NULL;
    bool is_task = s->kind == EVALUATED, is_json = !s->given && (is_task || (text.n && *text.at == '{'));
    bool ok = !is_json || parse_json(text.at, text.n, &l->pool, &l->value, e);
    if (is_json) text = (Text){ NULL, 0 };
    if (ok && is_task) ok = read_task(s, l, &asked, e);
    else if (ok && is_json) ok = read_members(s, l, &own, &text, &tokens, e);
    if (is_task) text = (Text){ (const char *)asked.bytes, asked.n };
    if (!list) l->stops = own.stops;  // what is one of some texts has no other end
    ok = ok && split_choices(l, list, e);
    for (size_t i = 0; ok && s->given && i < s->given->n; i++) ok = emit(&tokens, s->given->ids[i], e);
    if (ok && text.at && !tokens.n) ok = encode_prompt(s, text, (Text){ "", 0 }, &tokens, e);
    ok = ok && (!tokens.n || add_texts(s, l, &own, text, &tokens, e));
    free(tokens.ids);
    free(asked.bytes);
    return ok;
}

static void free_line(Line *l) {
    free_pool(&l->pool);
    free(l);
}

// Adds a line to the queue. If something is wrong with it, each of its texts, or a single one, says what.
static bool open_line(Script *s, Text text, Error *e) {
    Line *l = allocate(1, sizeof *l, e);
    if (!l) return false;
    Passage **first = s->end;
    Error wrong = { 0 };
    l->number = ++s->n_lines;
    bool ok = open_texts(s, l, text, &wrong), fits = ok || *first || add_passage(s, l, &options, e);
    for (Passage *p = *first; p && !ok; p = p->next) {
        p->error = wrong;
        p->done = true;
    }
    if (l->n == 0) free_line(l);
    return fits;
}

// ---- Results ----

// The last number in a text, without commas. Returns how many bytes it takes there; 0: there is none.
static size_t last_number(Text t, double *number) {
    char digits[64];
    size_t end = t.n, begin, n = 0;
    while (end > 0 && !isdigit((unsigned char)t.at[end - 1])) end--;
    for (begin = end; begin > 0 && memchr("0123456789,.", t.at[begin - 1], 12);) begin--;
    begin -= begin < end && begin > 0 && t.at[begin - 1] == '-';
    for (size_t i = begin; i < end && n + 1 < sizeof digits; i++) if (t.at[i] != ',') digits[n++] = t.at[i];
    digits[n] = 0;
    *number = strtod(digits, NULL);
    return end - begin;
}

// Whether an answer is right: the same text or, where a number is wanted, its last number. In GSM8K, the wanted number
// is after #### and its steps are before.
static bool is_right(Text got, Text wanted) {
    double x, y;
    size_t n = last_number(wanted, &x);
    if (n > 0 && (n == wanted.n || memmem(wanted.at, wanted.n, "####", 4)))
        return last_number(got, &y) > 0 && x == y;
    return got.n == wanted.n && !memcmp(got.at, wanted.at, got.n);
}

// A task's answer: the likeliest choice, or what was written.
static void put_task(Script *s, const Passage *first) {
    const Line *l = first->line;
    Span got = trimmed((const char *)first->text.bytes, first->text.n);
    const Passage *best = first;
    for (const Passage *p = first; l->choices.n && p && p->line == l; p = p->next) {
        if (p->logprob > best->logprob) best = p;
        got = (Span){ l->choices.items[best->number].text, l->choices.items[best->number].n, false };
    }
    bool right = is_right((Text){ got.text, got.n_bytes }, l->wanted);
    s->n_tasks++;
    s->n_right += right;
    if (options.json) printf("\"line\": %zu, \"correct\": %s, \"got\": ", l->number, right ? "true" : "false");
    else printf("%5zu  %s  got ", l->number, right ? "right" : "wrong");
    put_json_string(stdout, got.text, got.n_bytes);
    printf(options.json ? ", \"want\": " : ", wanted ");
    put_json_string(stdout, l->wanted.at, l->wanted.n);
}

static void put_accuracy(const Script *s) {
    double n = (double)s->n_tasks, p = (double)s->n_right / fmax(n, 1), error = sqrt(p * (1 - p) / fmax(n - 1, 1));
    printf(options.json ? "{\"n\": %zu, \"correct\": %zu, \"accuracy\": %.9g, \"standard_error\": %.9g, "
                          "\"shots\": %d}\n"
                        : "%zu tasks, %zu right: accuracy %.4f +/- %.4f with %d shots\n", s->n_tasks, s->n_right, p,
           error, (int)options.shots);
}

// The choices with their probabilities, of which each has its share of the sum.
static void put_choices(const Passage *first) {
    const Line *l = first->line;
    double best = -INFINITY, sum = 0;
    for (const Passage *p = first; p && p->line == l; p = p->next) best = fmax(best, p->logprob);
    for (const Passage *p = first; p && p->line == l; p = p->next) sum += exp(p->logprob - best);
    for (const Passage *p = first; p && p->line == l; p = p->next) {
        const Value *c = &l->choices.items[p->number];
        if (options.json) printf(p->number ? "}, " : "\"choices\": [");
        else if (p->number) putchar('\n');
        printf(options.json ? "{\"p\": %.9g, \"logprob\": %.9g, \"logprob_per_byte\": %.9g, \"text\": "
                            : "%.6f %10.4f %10.4f per byte  ", exp(p->logprob - best) / sum, p->logprob,
               p->logprob / (double)larger(c->n, 1));
        put_json_string(stdout, c->text, c->n);
    }
    if (options.json) printf("}]");
}

// Prints a text's scores: members of a list in JSON, or lines.
static void put_scores(const Model *m, const Passage *p) {
    const char *format = options.json ? "{\"id\": %d, \"logprob\": %.9g, \"rank\": %d, \"text\": " : "%7d %10.4f %6d  ";
    size_t most = (size_t)options.logprobs, n_bytes;
    const Score *s = (const void *)p->scores.bytes;
    for (size_t i = 0; i < p->scores.n / sizeof *s; i++, s++) {
        size_t k = i % (1 + most);  // its place among a token's
        if (options.json) fputs(k == 1 ? ", \"top\": [" : i ? ", " : "", stdout);
        else if (k) printf("    ");
        printf(format, s->id, s->logprob, s->rank);
        const char *text = piece(&m->tokenizer, s->id, &n_bytes);
        put_json_string(stdout, text, n_bytes);
        fputs(!options.json ? "\n" : k == most ? most ? "}]}" : "}" : k ? "}" : "", stdout);
    }
}

static void put_scored_text(const Model *m, const Passage *p) {
    size_t n_bytes = 0, n;
    for (size_t i = p->scored; i < p->tokens.n; i++, n_bytes += n)
        decode(&m->tokenizer, p->tokens.ids[i - 1], p->tokens.ids[i], &n);
    if (options.json) printf("\"scores\": [");
    put_scores(m, p);
    printf(options.json ? "], \"total\": %.9g, \"bits_per_byte\": %.9g" : "total %.4f, %.4f bits per byte",
           p->logprob, -p->logprob / log(2) / (double)larger(n_bytes, 1));
}

// The JSON members that tell of a written text.
static void put_record(const Model *m, const Passage *p) {
    static const char *const stops[] = { [GO_ON] = "", [AT_END_TOKEN] = "end", [AT_STOP_TEXT] = "stop_text",
                                         [AT_LIMIT] = "limit", [AT_CONTEXT] = "context",
                                         [AT_INTERRUPT] = "interrupted", [AT_BROKEN_OUTPUT] = "" };
    printf("\"text\": ");
    put_json_string(stdout, (const char *)p->text.bytes, p->text.n);
    printf(", \"ids\": [");
    for (size_t i = 0; i < p->ids.n; i++) printf("%s%d", i ? ", " : "", p->ids.ids[i]);
    printf("], \"prompt_tokens\": %zu, \"tokens\": %zu, \"stop\": \"%s\", \"seed\": %llu, \"prompt_seconds\": %.9g, "
           "\"seconds\": %.9g", p->tokens.n, p->ids.n, stops[p->why], (unsigned long long)p->seed, p->prompt_seconds,
           p->seconds);
    if (p->c.stop_text) printf(", \"stop_text\": ");
    if (p->c.stop_text) put_json_string(stdout, p->c.stop_text, strlen(p->c.stop_text));
    if (options.logprobs) printf(", \"logprobs\": [");
    if (options.logprobs) put_scores(m, p);
    if (options.logprobs) printf("]");
}

// The prompt, unless it is not wanted, and what was written after it.
static void put_text(const Model *m, const Passage *p) {
    Printer printer = { .n_held = 0 };
    bool echoes = !options.no_echo && !find_member(&p->line->value, "messages");
    for (size_t i = 0; echoes && i < p->tokens.n; i++)
        print_token(m, &printer, i ? p->tokens.ids[i - 1] : -1, p->tokens.ids[i]);
    print_bytes(&printer, NULL, 0);
    print_bytes(&printer, (const char *)p->text.bytes, p->text.n);
    print_bytes(&printer, NULL, 0);
}

// Takes the first text out of the queue.
static void drop_first(Script *s) {
    Passage *p = s->first;
    s->first = p->next;
    if (!s->first) s->end = &s->first;
    s->n_held--;
    s->n_written += p->ids.n;
    if (--p->line->n_left == 0) free_line(p->line);
    free(p->text.bytes);
    free(p->ids.ids);
    free(p->scores.bytes);
    free(p->tokens.ids);
    free(p);
}

// Prints the result at the head of the queue, if it is there: of one text or, where they are compared, of a line's.
static bool put_first(Script *s) {
    Passage *first = s->first, *p = first;
    Error *error = NULL;
    int n = !first ? 0 : s->kind == CONTINUED ? 1 : first->line->n;
    for (int i = 0; i < n; i++, p = p->next) {
        if (!p->done) return false;
        if (!error && p->error.status) error = &p->error;
    }
    if (n == 0) return false;
    char room[32];
    Text id = value_text(find_member(&first->line->value, "id"), room);
    if (options.json) putchar('{');
    if (options.json && id.at) {
        printf("\"id\": ");
        if (id.at == room) printf("%s", room);
        else put_json_string(stdout, id.at, id.n);
        printf(", ");
    }
    if (options.json && options.samples > 1) printf("\"sample\": %d, ", first->number);
    if (error) {
        disarm(error->text, strlen(error->text), "");
        if (s->n_failed++ == 0) s->failure = *error, s->failed_line = first->line->number;
        if (options.json) printf("\"line\": %zu, \"error\": ", first->line->number);
        if (options.json) put_json_string(stdout, error->text, strlen(error->text));
        else if (!s->given) fprintf(stderr, "line %zu: %s\n", first->line->number, error->text);
    } else if (s->kind == EVALUATED) put_task(s, first);
    else if (s->kind == COMPARED) put_choices(first);
    else if (s->kind == SCORED) put_scored_text(s->m, first);
    else if (options.json) put_record(s->m, first);
    else put_text(s->m, first);
    if (options.json) putchar('}');
    if (options.json || !error) putchar('\n');
    fflush(stdout);
    while (n-- > 0) drop_first(s);
    return true;
}

// ---- The loop ----

// How many texts go together: as many as have room in a quarter of the memory, if all become as long as they may.
static int n_together(const Model *m, Settings settings) {
    Cache c = { .f32 = settings.cache_f32, .n_layers = m->config.n_layers, .context = settings.context };
    lay_out_cache(m, &c, 1);
    long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    size_t n = pages > 0 && page > 0 ? (size_t)pages / 4 * (size_t)page / c.arena_bytes : 1;
    if (n > MOST_TOGETHER) n = MOST_TOGETHER;
    return n > (size_t)settings.batch ? settings.batch : n > 1 ? (int)n : 1;
}

// Reads lines, waiting only if no text is under way, and prints what is done.
static bool run_lines(Script *s, Error *e) {
    Buffer line = { 0 };
    bool ok = true, more = s->given == NULL;
    if (s->given) ok = open_line(s, s->prompt, e);
    while (ok && (more || s->first) && !ferror(stdout)) {
        while (ok && more && s->n_held < MOST_HELD) {
            struct pollfd input = { STDIN_FILENO, POLLIN, 0 };
            if (s->first && poll(&input, 1, 0) == 0) break;
            more = read_line(&line, e);
            if (more) ok = open_line(s, (Text){ (const char *)line.bytes, line.n }, e);
            else ok = e->status == DONE;
        }
        if (ok) advance(s);
        bool stops = interrupted;  // looked at once: Ctrl-C may come at any time
        for (int i = 0; i < s->n_slots && stops; i++)
            if (s->users[i] && s->kind == CONTINUED) end_passage(s, s->users[i], AT_INTERRUPT, NULL);
        while (put_first(s)) continue;
        if (ok && stops) ok = fail(e, INTERRUPTED, "interrupted");
    }
    free(line.bytes);
    return ok;
}

// Runs what a script asks for: a prompt, or the lines of a file.
static bool run_script(const Model *m, Workspace *w, Sequence *sequences, int n, const Sampler *sampler,
                       ScriptKind kind, const Tokens *given, Text prompt, Error *e) {
    Script s = { .m = m, .w = w, .sequences = sequences, .n_slots = n, .n_free = n, .sampler = sampler, .kind = kind,
                 .given = given, .prompt = prompt };
    const char *path = kind == EVALUATED ? options.file : options.prompts;
    if (options.logprobs > m->config.n_tokens) options.logprobs = m->config.n_tokens;
    s.end = &s.first;
    s.logits = allocate((size_t)m->config.n_tokens, sizeof *s.logits, e);
    bool ok = s.logits != NULL;
    if (ok && path && strcmp(path, "-") && !freopen(path, "rb", stdin))
        ok = fail(e, io_status(), "%s: %s", path, strerror(errno));
    if (path && !strcmp(path, "-")) setvbuf(stdin, NULL, _IONBF, 0);  // so that poll() sees each line
    if (ok && kind == CONTINUED) tell_seed(sampler);
    double start = clock_seconds();
    ok = ok && run_lines(&s, e);
    if (ok && kind == EVALUATED && s.n_tasks) put_accuracy(&s);
    else if (ok && kind == EVALUATED && !s.n_failed) ok = fail(e, MISUSE, "no task is left after %d exemplars",
                                                               (int)options.shots);
    if (ok && !options.quiet && s.n_written)
        fprintf(stderr, "%zu tokens written in %.2f s\n", s.n_written, clock_seconds() - start);
    if (ok && s.n_failed && given) ok = fail(e, s.failure.status, "%s", s.failure.text);
    else if (ok && s.n_failed)
        ok = fail(e, s.failure.status, "%zu of %zu lines failed; line %zu: %s", s.n_failed, s.n_lines, s.failed_line,
                  s.failure.text);
    while (s.first) drop_first(&s);
    free(s.logits);
    free(s.exemplars.bytes);
    free(s.template_file.bytes);
    return ok;
}

/* ==== 13. Measuring =================================================================================================
   What the tokens of a text are (-m tokenize), what a model consists of (inspect), how well it predicts (logits,
   perplexity), and how near it comes to the limits of the machine that it runs on (bench, matmul). */

// ---- Tokens ----

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

// The ids on one line; with --pieces, a line for each token.
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

// The text that the ids stand for and nothing else; with --special, also the names of control tokens.
static void print_text(const Tokenizer *t, const Tokens *tokens) {
    Printer printer = { .n_held = 0 };
    for (size_t i = 0, n; i < tokens->n && !interrupted; i++) {
        const char *bytes = decode(t, i ? tokens->ids[i - 1] : -1, tokens->ids[i], &n);
        if (options.special && t->type[tokens->ids[i]] == PIECE_CONTROL) bytes = piece(t, tokens->ids[i], &n);
        print_bytes(&printer, bytes, n);
    }
    print_bytes(&printer, NULL, 0);
}

// ---- What a model consists of ----

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

// A field: one value, or those of all layers where they differ. Some numbers stand for words.
static void put_field(const Model *m, const ConfigField *f) {
    static const char *const activations[] = { [SILU] = "SiLU", [GELU] = "GELU" };
    static const char *const angles[] = { [UNROTATED] = "none", [ROTATED] = "global", [LOCAL] = "local" };
    const char *const *words = !strcmp(f->name, "angles") ? angles : strcmp(f->name, "activation") ? NULL : activations;
    bool same = true, json = options.json;
    for (int l = 1; l < n_values(m, f); l++) same &= get_field(m, f, l) == get_field(m, f, 0);
    printf(json ? ",\n  \"%s\": %s" : "  %-28s %s", f->name, json && !same ? "[" : "");
    for (int l = 0; l < (same ? 1 : m->config.n_layers); l++) {
        double x = get_field(m, f, l);
        if (l > 0) printf(json ? ", " : " ");
        if (words) printf(json ? "\"%s\"" : "%s", words[(int)x]);
        else printf("%.*g", json ? 17 : x == floor(x) ? 15 : 6, x);
    }
    printf(!json ? "\n" : same ? "" : "]");
}

// The model's name, and its type in llama.cpp's words. Where no key tells them: the file's name, and the type of most
// weights.
static void put_names(const Model *m, Type most) {
    static const char *const file_types[] = {
        [0] = "F32", "F16", "Q4_0", "Q4_1", [7] = "Q8_0", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L",
        "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", [21] = "Q2_K_S", [25] = "IQ4_NL", [30] = "IQ4_XS",
        [32] = "BF16", [38] = "MXFP4",
    };
    enum { N = sizeof file_types / sizeof *file_types };
    Error ignored = { 0 };
    Gguf g = { .rest = { m->file.bytes, m->file.n_bytes, false }, .error = &ignored };
    const char *slash = strrchr(m->file.path, '/'), *file = slash ? slash + 1 : m->file.path, *type = NULL;
    bool has_keys = recognise(m->file.bytes, m->file.n_bytes) == GGUF && read_gguf_keys(&g, &ignored);
    Text name = has_keys ? get_text(&g, "general.name") : (Text){ 0 };
    int number = has_keys ? get_integer(&g, "general.file_type", 0, N - 1, -1) : -1;
    char text[128];
    snprintf(text, sizeof text, "%.*s", name.n ? shown(name) : (int)strlen(file), name.n ? name.at : file);
    disarm(text, strlen(text), "");
    put_word("name", text);
    for (const SourceType *t = source_types; !type; t++) if (t->tile == most) type = t->name;
    put_word("type", number >= 0 && file_types[number] ? file_types[number] : type);
    free(g.keys);
}

// What a context of so many tokens costs, with the bytes of the weights, and whether that is free.
static void put_memory(const char *name, const Model *m, const Workspace *w, bool f32, int context, double bytes) {
    Workspace room = { .settings = w->settings };
    Cache cache = { .f32 = f32, .n_layers = m->config.n_layers, .context = context };
    room.settings.context = context;
    lay_out_workspace(m, &room);
    lay_out_cache(m, &cache, 1);
    double total = bytes + (double)(cache.arena_bytes + room.arena_bytes + m->vocabulary_bytes);
    char text[80];
    snprintf(text, sizeof text, " MiB, %.1f of them cache%s", (double)cache.arena_bytes / 1048576,
             free_memory() <= 0 ? "" : total <= free_memory() ? ": fits" : ": does not fit");
    put_figure(name, total / 1048576, text);
}

// What one wants to know before running a model: sizes, types, costs.
static bool run_inspect(Model *m, const Workspace *w, const Cache *texts, Error *e) {
    const Config *c = &m->config;
    double parameters = 0, bytes = 0, cache = 0, by_type[N_TYPES] = { 0 };
    Type most = F32;
    for (const Slot *slot = m->slots; slot < m->slots + m->n_slots; slot++) {
        double size = (double)slot->n * (double)slot->rows * (double)slot->cols;
        if (!slot->data) continue;
        parameters += size;
        bytes += (double)slot_bytes(slot);
        if (!slot->is_vector) by_type[slot->type] += size;
    }
    for (int l = 0; l < c->n_layers; l++) cache += 2.0 * m->layers[l].n_kv_heads * c->head_dim * (texts->f32 ? 4 : 2);
    const char *tokenizers[] = { "none", [SPM] = "SentencePiece", [BPE] = "byte-level BPE" };
    if (options.check && !check_weights(m, e)) return false;
    if (options.json) printf("{\n  \"version\": \"%s\"", CRIA_VERSION);
    for (int i = 0; i < N_TYPES; i++) if (by_type[i] > by_type[most]) most = (Type)i;
    put_names(m, most);
    put_word("container", file_kinds[recognise(m->file.bytes, m->file.n_bytes)].thing);
    if (options.check) put_word("weights", "all finite");
    put_word("family", c->family);
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++) put_field(m, f);
    put_word("tokenizer", tokenizers[m->tokenizer.kind]);
    put_word("chat template", m->chat_template.n ? "its own" : "none");
    put_figure("parameters", parameters, "");
    for (int i = 0; i < N_TYPES; i++) {
        char name[48];
        snprintf(name, sizeof name, "parameters in %s", types[i].name);
        if (by_type[i] > 0) put_figure(name, by_type[i], "");
    }
    put_figure("bytes of weights", bytes, "");
    put_figure("parameters used per token", (double)w->work, " in products");
    put_figure("bytes read per token", (double)bytes_per_token(m), "");
    put_figure("bytes of cache per position", cache, "");
    put_figure("context in use (-c)", texts->context, " positions");
    put_figure("memory for it", (double)(w->arena_bytes + texts->arena_bytes) / 1048576, " MiB");
    put_figure("free memory", free_memory() / 1048576, " MiB");
    put_memory("total memory", m, w, texts->f32, texts->context, bytes);
    put_figure("FLOPs per token", 2 * (double)w->work, " and what attention takes");
    put_figure("training tokens (Chinchilla)", 20 * parameters, " = 20 per parameter");
    put_word("kernel", kernels->name);
    put_word("kernels of this machine", kernel_names());
    for (int context = 1024; options.fit && context / 2 < c->context; context *= 2) {
        char name[40];
        int at_most = context < c->context ? context : c->context;
        snprintf(name, sizeof name, "total for %d tokens", at_most);
        put_memory(name, m, w, texts->f32, at_most, bytes);
    }
    if (options.json) printf("\n}\n");
    return true;
}

// ---- What the program knows ----

// A row's last member: the names of a set's bits.
static void put_set(const char *member, unsigned set, const char *const *names) {
    printf(", \"%s\": [", member);
    for (int i = 0, n = 0; set >> i; i++) if (set >> i & 1) printf(n++ ? ", \"%s\"" : "\"%s\"", names[i]);
    printf("]}");
}

// The tables as JSON, for scripts. Of a field, "" is no key; a default of 0 is none, or is computed from others.
static void print_tables(void) {
    printf("{\"types\": [");
    for (const SourceType *t = source_types; t < source_types + N_SOURCE_TYPES; t++)
        printf("%c\n {\"name\": \"%s\", \"in_files\": \"%s\", \"gguf\": %d, \"columns\": %zu, \"bytes\": %zu, "
               "\"written\": %d}", t > source_types ? ',' : ' ', types[t->tile].name, t->name, t->gguf_id,
               t->block_cols, t->block_bytes, is_writable(t->tile));
    printf("],\n\"families\": [");
    for (const Family *f = families; f < families + sizeof families / sizeof *families; f++) {
        printf("%c\n {\"name\": \"%s\", \"pairing\": \"%s\", \"global_every\": %d, \"no_rope_every\": %d, "
               "\"local_theta\": %.17g", f > families ? ',' : ' ', f->name,
               f->pairing == ADJACENT ? "adjacent" : "halves", f->global_every, f->no_rope_every, f->local_theta);
        put_set("features", (unsigned)f->features, feature_names);
    }
    printf("],\n\"fields\": [");
    for (const ConfigField *f = config_fields; f < config_fields + N_CONFIG_FIELDS; f++) {
        printf("%c\n {\"name\": \"%s\", \"type\": \"%s\", \"per_layer\": %d, \"min\": %.17g, \"max\": %.17g, "
               "\"key\": \"%s\", \"needed\": %d, \"default\": %.17g", f > config_fields ? ',' : ' ', f->name,
               f->type == INTEGER ? "integer" : f->type == SINGLE ? "f32" : "f64", f->per_layer, f->min, f->max,
               f->key ? f->key : "", isnan(f->otherwise), fmax(f->otherwise, 0));
        put_set("features", (unsigned)f->feature, feature_names);
    }
    printf("],\n\"pre_tokenizers\": [");
    for (int i = 0; i < N_PRE_TOKENIZERS; i++) {
        printf("%c\n {\"names\": \"%s\"", i ? ',' : ' ', pre_tokenizers[i].names);
        put_set("flags", pre_tokenizers[i].flags, flag_keys);
    }
    printf("],\n\"tokenizer_flags\": [");
    for (int i = 0; i < N_FLAGS; i++)
        printf("%c\n {\"key\": \"%s\", \"bit\": %d}", i ? ',' : ' ', flag_keys[i], i);
    printf("]}\n");
}

// ---- Predictions ----

// Writes the logits of every position, float32.      file (tokens, V)
static bool run_logits(const Model *m, Workspace *w, Sequence *s, const Tokens *tokens, Error *e) {
    if (tokens->n > (size_t)s->cache->context)
        return fail(e, NO_ROOM, "%zu tokens do not fit the context of %d; see -c", tokens->n, s->cache->context);
    Output out;
    bool ok = open_output(&out, options.output, e) && prefill(m, w, s, tokens->ids, tokens->n, out.stream, e);
    return close_output(&out, ok, e);
}

// -log softmax(logits)[token], in double      logits (n)
static double surprise(const float *logits, int n, int token) {
    double max = logits[likeliest(logits, n)], sum = 0;
    for (int i = 0; i < n; i++) sum += exp(logits[i] - max);
    return log(sum) + max - logits[token];
}

// Perplexity as llama-perplexity measures it. The text is cut into chunks of -c tokens; each is a text of its own, and
// its second half is scored, so every prediction has at least half a chunk to go by. A pass may take the end of one
// chunk and the beginning of the next, so that it is full.
static bool run_perplexity(const Model *m, Workspace *w, Sequence *texts, int n_texts, const Tokens *tokens, Error *e) {
    size_t size = (size_t)w->settings.context, n_chunks = tokens->n / size, n_scored = 0;
    if (size < 4) return fail(e, MISUSE, "perplexity needs a context of at least 4 tokens (-c)");
    if (n_chunks == 0)
        return fail(e, NO_ROOM, "the text has %zu tokens, less than one chunk of %zu (-c)", tokens->n, size);
    double sum = 0, sum_of_squares = 0, start = clock_seconds();
    for (size_t chunk = 0; m->tokenizer.flags & ADD_BOS && chunk < n_chunks; chunk++)
        tokens->ids[chunk * size] = m->tokenizer.bos;
    for (size_t done = 0, n_rows = n_chunks * (size - 1); done < n_rows;) {  // a chunk's last token predicts nothing
        int n = 0;
        for (; n < w->settings.batch && done < n_rows; n++, done++) {
            size_t chunk = done / (size - 1), at = done % (size - 1), text = chunk % (size_t)n_texts;
            if (at == 0) rewind_sequence(&texts[text], 0);
            w->room[n] = (Row){ tokens->ids[chunk * size + at], (int)at, (int)text, at >= size / 2 };
        }
        if (interrupted) return fail(e, INTERRUPTED, "interrupted");
        if (!forward(m, w, texts, w->room, n, e)) return false;
        for (int i = 0; i < w->n_wanted; i++, n_scored++) {
            const float *logits = logits_of(m, w, i, e);
            if (!logits) return false;
            size_t row = done - (size_t)(n - w->wanted[i]), next = row / (size - 1) * size + row % (size - 1) + 1;
            double x = surprise(logits, m->config.n_tokens, tokens->ids[next]);
            sum += x;
            sum_of_squares += x * x;
        }
        show_progress("chunk", start, done / (size - 1), n_chunks);
    }
    double n = (double)n_scored, mean = sum / n, variance = sum_of_squares / n - mean * mean;
    double ppl = exp(fmin(mean, 600));  // so that it stays finite
    double error = n > 1 && variance > 0 ? sqrt(variance / (n - 1)) * ppl : 0;
    printf(options.json ? "{\"chunks\": %zu, \"tokens_per_chunk\": %zu, \"tokens_scored\": %zu, "
                          "\"perplexity\": %.6f, \"error\": %.6f}\n"
                        : "%zu chunks of %zu tokens, %zu scored\nPPL = %.4f +/- %.4f\n", n_chunks, size, n_scored,
           ppl, error);
    return true;
}

// ---- What the machine can do ----

// The processor's name, as the system tells it.
static const char *cpu_name(void) {
    static char name[128] = "unknown";
#ifdef __APPLE__
    size_t size = sizeof name;
    sysctlbyname("machdep.cpu.brand_string", name, &size, NULL, 0);
#else
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    while (f && fgets(line, sizeof line, f) && sscanf(line, "model name : %127[^\n]", name) != 1) continue;
    if (f) fclose(f);
#endif
    return name;
}

// Bytes read, operations in 8 bits and operations in float (a multiply-add counts as two): those of some work, or the
// most that the machine can do in a nanosecond, which are its GB/s and Gop/s.
typedef struct { double bytes, int8, f32; } Load;

enum { MAX_RUNS = 64, MEMORY_BYTES = 256 << 20 };  // many times what caches hold

typedef struct {
    const uint64_t *memory;  // to read; NULL: to multiply, in 8 bits or in float
    size_t n;                // numbers in memory, or rounds of multiplications
    bool int8;
} CeilingJob;

static void work_at_ceiling(void *p, Team *team) {
    const CeilingJob *job = p;
    Range r = share(job->n, team);
    if (job->memory) kernels->read(job->memory + r.from, r.to - r.from);
    else kernels->peak(job->int8, r.to - r.from);
}

// The most bytes or operations of a team in a nanosecond: the best of some tries. Those of arithmetic take 20 ms
// at least, so that the start of the threads does not count.
static double best_rate(int threads, const uint64_t *memory, bool int8) {
    CeilingJob job = { memory, memory ? MEMORY_BYTES / sizeof *memory : 1 << 16, int8 };
    double best = 0, each = memory ? sizeof *memory : kernels->peak(int8, 1);
    for (int i = 0; i < 7; i++) {
        double start = clock_seconds();
        run_team(threads, -1, work_at_ceiling, &job);
        double seconds = clock_seconds() - start;
        best = fmax(best, each * (double)job.n / seconds * 1e-9);
        if (!memory && seconds < 0.02) job.n *= 2, i = 0;
    }
    return best;
}

// Adds the product of a matrix with n tokens; of several such matrices (experts), n_read are read.
static void add_product(Load *w, const Tensor *t, double n_read, double n, bool exact) {
    w->bytes += n_read * (double)tensor_bytes(t);
    *(is_quantised(t->type) && !exact ? &w->int8 : &w->f32) += 2.0 * t->rows * t->cols * n;
}

// Adds what a pass of n rows does in each step: n / texts tokens of each text, after `past` others.
static void add_pass(Load *steps, const Model *m, const Workspace *w, double past, int n, int texts, int n_logits) {
    bool exact = w->settings.exact;
    double each = (double)n / texts, seen = past + (each + 1) / 2, last = past + each;
    for (const Layer *y = m->layers; y < m->layers + m->config.n_layers; y++) {
        // A token visits k of E experts; n tokens visit E * (1 - (1 - k / E)^n) of them on average, if chance decides.
        double experts = fmax(y->n_experts, 1), used = fmax(y->n_experts_used, 1);
        double read = experts * (1 - pow(1 - used / experts, n)), window = y->window ? y->window : INFINITY;
        add_product(&steps[QUERY_KEY_VALUE], &y->query, 1, n, exact);
        add_product(&steps[QUERY_KEY_VALUE], &y->key, 1, n, exact);
        add_product(&steps[QUERY_KEY_VALUE], &y->value, 1, n, exact);
        add_product(&steps[ATTENTION_OUT], &y->attention_out, 1, n, exact);
        add_product(&steps[ROUTER], &y->router, 1, n, exact);
        add_product(&steps[GATE_UP], &y->gate, read, used * n, exact);
        add_product(&steps[GATE_UP], &y->up, read, used * n, exact);
        add_product(&steps[DOWN], &y->down, read, used * n, exact);
        steps[ATTEND].f32 += 4.0 * y->n_heads * m->config.head_dim * fmin(seen, window) * n;
        steps[ATTEND].bytes += 2.0 * y->n_kv_heads * m->config.head_dim * (w->settings.cache_f32 ? 4 : 2) *
                               fmin(last, window + each) * texts;
    }
    add_product(&steps[HEAD], &m->head, n_logits > 0, n_logits, exact);
}

// What a test's passes do, in each step and in all: a prompt of n tokens in batches, with logits of the last one; or,
// with parallel > 0, n tokens of so many texts, one by one, with logits of each.
static Load load_of(const Model *m, const Workspace *w, int past, int n, int parallel, Load steps[N_STEPS]) {
    Load sum = { 0 };
    memset(steps, 0, N_STEPS * sizeof *steps);
    for (int done = 0, now; done < n; done += now) {
        now = parallel ? 1 : n - done < w->settings.batch ? n - done : w->settings.batch;
        if (parallel) add_pass(steps, m, w, past + done, parallel, parallel, parallel);
        else add_pass(steps, m, w, past + done, now, 1, done + now == n);
    }
    for (int i = 0; i < N_STEPS; i++)
        sum.bytes += steps[i].bytes, sum.int8 += steps[i].int8, sum.f32 += steps[i].f32;
    return sum;
}

static int largest(List list) {
    int most = 0;
    for (int i = 0; i < list.n; i++) most = list.at[i] > most ? list.at[i] : most;
    return most;
}

// ---- Results ----

typedef struct {
    char test[64];
    int threads, n_tokens, parallel;  // parallel: texts that get their tokens together, one by one; 0: others
    Load load, ceiling;      // of a run; in a nanosecond
    Load steps[N_STEPS];     // the load's parts
    double ns[MAX_RUNS];     // nanoseconds of each run
    double per_s, spread;    // tokens per second: the median, and half the distance from the least to the most
    double gb, gop, most_gop;  // GB/s and Gop/s; the ceiling of this mix of operations
    const char *bound;         // what is nearer to its ceiling, memory or arithmetic, and
    double percent;            // how near
} Measured;

// What is tested, and the results.
typedef struct Bench {
    char title[64];
    bool (*run)(struct Bench *b, const Measured *r, Error *e);  // does a test once
    Buffer results;    // Measured
    uint64_t *memory;  // (MEMORY_BYTES)  bytes of 0x31, also read as matrices: 0.16 in f16, 2.6e-9 in f32 and bf16
    // bench: tokens after `depth` others
    const Model *m;
    Workspace *workspace;
    Sequence *texts;
    int *tokens, depth;  // tokens (S)
    // matmul: products, without a model
    Tensor w;
    size_t n_products;
    Activations x;
    float *y;  // (n, MOST_ROWS)
} Bench;

static int by_size(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// The nanoseconds that a run's reading, and its operations, would take at the ceilings.
static double reading_time(const Measured *r) { return r->load.bytes / r->ceiling.bytes; }
static double multiplying_time(const Measured *r) {
    return r->load.int8 / r->ceiling.int8 + r->load.f32 / r->ceiling.f32;
}

// Makes figures of the runs' times. Reading and multiplying happen at the same time, so the one that takes longer is
// the bound.
static void conclude(Measured *r, int n_runs) {
    double best[2] = { INFINITY, INFINITY };  // of the earlier and of the later half
    for (int i = 0; i < n_runs; i++) best[i >= n_runs / 2] = fmin(best[i >= n_runs / 2], r->ns[i]);
    qsort(r->ns, (size_t)n_runs, sizeof *r->ns, by_size);
    double ns = (r->ns[n_runs / 2] + r->ns[(n_runs - 1) / 2]) / 2, ops = r->load.int8 + r->load.f32;
    r->per_s = 1e9 * r->n_tokens / ns;
    r->spread = 1e9 * r->n_tokens * (1 / r->ns[0] - 1 / r->ns[n_runs - 1]) / 2;
    r->gb = r->load.bytes / ns;
    r->gop = ops / ns;
    r->most_gop = ops / multiplying_time(r);
    r->bound = reading_time(r) > multiplying_time(r) ? "memory" : "arithmetic";
    r->percent = 100 * fmax(reading_time(r), multiplying_time(r)) / ns;
    if (n_runs >= 4 && best[1] > 1.05 * best[0] && !options.quiet)
        fprintf(stderr, "%s: the machine got %.0f %% slower meanwhile\n", r->test, 100 * (best[1] / best[0] - 1));
}

static const char *const step_names[N_STEPS] = {
    [EMBED] = "embed", [ATTENTION_NORM] = "attention norm", [QUERY_KEY_VALUE] = "query, key, value",
    [WIDE_HEAD_NORM] = "norm of all heads", [ROTATE] = "rotate, cache", [ATTEND] = "attention",
    [SCORE] = "attention: scores", [SOFTMAX] = "attention: softmax", [MIX] = "attention: mix",
    [ROUND_ATTENDED] = "round attended", [ATTENTION_OUT] = "attention out",
    [ATTENTION_POST_NORM] = "attention post norm", [FFN_NORM] = "ffn norm", [ROUTER] = "router",
    [CHOOSE_EXPERTS] = "choose experts", [LIST_VISITORS] = "list visitors", [ROUND_VISITORS] = "round visitors",
    [GATE_UP] = "gate, up", [ROUND_HIDDEN] = "round hidden", [DOWN] = "down", [FFN_POST_NORM] = "ffn post norm",
    [FINAL_NORM] = "final norm", [HEAD] = "logits",
};

// A step in one run: its calls, the time of the average thread that takes part, and how much of it the thread waits.
static StepTime step_time(int step, int threads) {
    StepTime sum = { 0, 0, 0 };
    size_t calls = profile[0][step].calls, reps = (size_t)options.reps;
    for (int i = 0; i < threads; i++) {
        sum.calls += profile[i][step].calls;
        sum.seconds += profile[i][step].seconds;
        sum.waiting += profile[i][step].waiting;
    }
    double n = calls ? (double)(reps * sum.calls) / (double)calls : 1;
    return (StepTime){ calls / reps, sum.seconds / n, sum.waiting / n };
}

// n per second in billions, as text.
static const char *rate_text(char text[32], double n, double seconds) {
    if (n <= 0 || seconds <= 0) return options.json ? "null" : "-";
    snprintf(text, 32, options.json ? "%.9g" : "%.1f", n / seconds * 1e-9);
    return text;
}

// The steps of a test. Those of attention, ATTEND to MIX, share a load, so they show the rate of all of them.
static void put_profile(const Measured *r) {
    const char *format = options.json
        ? "\n    {\"step\": \"%s\", \"calls\": %zu, \"seconds\": %.9g, \"percent\": %.9g, \"gb_per_s\": %s, "
          "\"gop_per_s\": %s, \"waiting_seconds\": %.9g}"
        : "  %-20s %7zu %10.3f %6.1f %% %8s %8s %12.3f\n";
    double total = 0, attending = 0, unit = options.json ? 1 : 1e-3;
    for (int i = 0; i < N_STEPS; i++) total += step_time(i, r->threads).seconds;
    for (int i = ATTEND; i <= MIX; i++) attending += step_time(i, r->threads).seconds;
    printf(options.json ? ",\n   \"profile\": [" :
           "  step                   calls         ms   share     GB/s    Gop/s   waiting ms\n");
    for (int i = 0, n = 0; i < N_STEPS; i++) {
        StepTime t = step_time(i, r->threads);
        bool attends = i >= ATTEND && i <= MIX;
        const Load *load = &r->steps[attends ? ATTEND : i];
        double seconds = attends ? attending : t.seconds;
        char gb[32], gop[32];
        if (!t.calls) continue;
        if (n++ && options.json) putchar(',');
        printf(format, step_names[i], t.calls, t.seconds / unit, total > 0 ? 100 * t.seconds / total : 0,
               rate_text(gb, load->bytes, seconds), rate_text(gop, load->int8 + load->f32, seconds), t.waiting / unit);
    }
    if (options.json) putchar(']');
}

// llama-bench's columns, then ours; or a member of a JSON list.
static void put_result(const Bench *b, const Measured *r) {
    static const char head[] = "| model                  | backend  | threads | test                  "
                               "|              t/s |   GB/s |   Gop/s |            of limit |\n";
    bool first = b->results.n == 0, heads = first && !options.json;
    if (heads) fputs(head, stdout);
    for (const char *p = head; heads && *p; p++) putchar(*p == '|' || *p == '\n' ? *p : '-');
    printf(options.json ? "%s{\"model\": \"%s\", \"kernel\": \"%s\", \"threads\": %d, \"test\": \"%s\", "
                          "\"tok_per_s\": %.6g, \"spread\": %.6g, \"gb_per_s\": %.6g, \"gop_per_s\": %.6g, "
                          "\"percent_of_ceiling\": %.6g, \"bound_by\": \"%s\""
                        : "%s| %-22s | %-8s | %7d | %-21s | %8.1f ± %5.1f | %6.1f | %7.1f | %6.1f %% %10s |\n",
           !options.json ? "" : first ? "\n" : ",\n", b->title, kernels->name, r->threads, r->test,
           r->per_s, r->spread, r->gb, r->gop, r->percent, r->bound);
    if (options.json) {
        time_t now = time(NULL);
        char date[32] = "";
        strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", gmtime(&now));
        put_figure("runs", (double)options.reps, "");
        put_figure("ceiling_gb_per_s", r->ceiling.bytes, "");
        put_figure("ceiling_gop_per_s", r->most_gop, "");
        if (r->parallel) put_figure("parallel", r->parallel, "");
        put_word("cpu", cpu_name());
        put_word("compiler", strstr(__VERSION__, "lang") ? __VERSION__ : "gcc " __VERSION__);
        put_word("date", date);
    }
    if (profile) put_profile(r);
    if (options.json) putchar('}');
    fflush(stdout);
}

// The roofline (Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model"). Both axes are
// logarithmic: operations per byte from 0.1 to 10,000, and Gop/s from 1 to 10,000.
static double plot_x(double ops_per_byte) { return 70 + 138 * fmin(5, fmax(0, log10(ops_per_byte) + 1)); }
static double plot_y(double gop) { return 460 - 100 * fmin(4, fmax(0, log10(gop))); }

// The ceilings of the most threads, and a point for each result, with its name if there is room. The colours suit light
// and dark pages.
static void draw_roofline(const Bench *b, FILE *f) {
    const Measured *results = (const void *)b->results.bytes, *end = results + b->results.n / sizeof *results;
    const Load *c = &results->ceiling;
    for (const Measured *r = results; r < end; r++) c = r->ceiling.int8 > c->int8 ? &r->ceiling : c;
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
    for (int i = 0; i < 2; i++) {  // a roof rises with what can be read, up to the most operations per second
        double most = i ? c->f32 : c->int8, start = fmax(0.1, 1 / c->bytes), top = plot_y(most);
        fprintf(f, "<path class=\"roof%s\" d=\"M%.1f %.1fL%.1f %.1fH760\"/>"
                   "<text x=\"756\" y=\"%.1f\" class=\"end\">%s: %.0f</text>\n", i ? " dash" : "", plot_x(start),
                plot_y(start * c->bytes), plot_x(most / c->bytes), top, top - 7,
                i ? "in float" : "multiply-adds in 8 bits", most);
    }
    for (const Measured *r = results; r < end; r++) {
        double x = plot_x((r->load.int8 + r->load.f32) / r->load.bytes), y = plot_y(r->gop);
        bool left = x > 550;  // the name must not leave the picture
        fprintf(f, "<circle class=\"%s\" cx=\"%.1f\" cy=\"%.1f\" r=\"5\"/>\n", r->bound, x, y);
        if (end - results > 8) continue;
        fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" class=\"%s\">%s, -j %d: %.0f %%</text>\n",
                left ? x - 9 : x + 9, y + 4, left ? "end" : "", r->test, r->threads, r->percent);
    }
    fprintf(f, "</svg>\n");
}

// ---- Tests ----

// Times a test. The first run does not count, since it finds the caches cold.
static bool time_test(Bench *b, Measured *r, Error *e) {
    for (int i = -1; i < options.reps; i++) {
        double start = clock_seconds();
        if (!b->run(b, r, e)) return false;
        if (i >= 0) r->ns[i] = (clock_seconds() - start) * 1e9;
        if (i < 0 && profile) memset(profile, 0, (size_t)r->threads * sizeof *profile);
    }
    conclude(r, (int)options.reps);
    put_result(b, r);
    return append(&b->results, r, sizeof *r, e);
}

// All tests with each set of kernels that this machine can run, and every number of threads; then the picture. The
// ceilings are measured beside, since machines are shared and throttle.
static bool run_tests(Bench *b, bool (*test)(Bench *b, Measured *r, Error *e), const char *const *sets, int n_sets,
                      Error *e) {
    Error cannot;
    Output out = { .stream = NULL };
    bool ok = !options.svg || open_output(&out, options.svg, e);
    ok = ok && (b->memory = map_memory(MEMORY_BYTES, true, e)) != NULL;
    if (ok) use_large_pages(b->memory, MEMORY_BYTES), memset(b->memory, 0x31, MEMORY_BYTES);
    if (ok && options.json) putchar('[');
    for (int i = 0; ok && i < n_sets * options.threads.n; i++) {
        Measured r = { .threads = options.threads.at[i % options.threads.n] };
        if (!choose_kernels(sets[i / options.threads.n], &cannot)) continue;
        r.ceiling = (Load){ best_rate(r.threads, b->memory, false), best_rate(r.threads, NULL, true),
                            best_rate(r.threads, NULL, false) };
        ok = test(b, &r, e);
    }
    if (b->memory) munmap(b->memory, MEMORY_BYTES);
    if (ok && options.json) printf("\n]\n");
    if (ok && !b->results.n) ok = fail(e, MISUSE, "nothing to measure; see --pp, --tg and --kernel");
    if (ok && options.svg) draw_roofline(b, out.stream);
    if (options.svg) ok = close_output(&out, ok, e);
    free(b->results.bytes);
    return ok;
}

// ---- bench: a model ----

static bool run_model(Bench *b, const Measured *r, Error *e) {
    Sequence *s = b->texts;
    for (int i = 0; i == 0 || i < r->parallel; i++) rewind_sequence(&s[i], b->depth);
    if (!r->parallel) return prefill(b->m, b->workspace, s, b->tokens, (size_t)r->n_tokens, NULL, e);
    for (int n = 0; n < r->n_tokens / r->parallel; n++) {
        if (interrupted) return fail(e, INTERRUPTED, "interrupted");
        for (int i = 0; i < r->parallel; i++) b->workspace->room[i] = (Row){ b->tokens[n], s[i].n, i, true };
        if (!forward(b->m, b->workspace, s, b->workspace->room, r->parallel, e)) return false;
        for (int i = 0; i < r->parallel; i++) if (!logits_of(b->m, b->workspace, i, e)) return false;
    }
    return true;
}

// Tests n tokens: as a prompt (parallel 0), or one by one in each of so many texts. 0 tokens: there is nothing to test.
static bool test_tokens(Bench *b, Measured *r, int n, int parallel, Error *e) {
    r->n_tokens = parallel ? n * parallel : n;
    r->parallel = parallel;
    r->load = load_of(b->m, b->workspace, b->depth, n, parallel, r->steps);
    int length = snprintf(r->test, sizeof r->test, "%s%d", parallel ? "tg" : "pp", n);
    if (parallel > 1) length += snprintf(r->test + length, sizeof r->test - (size_t)length, " x %d", parallel);
    if (b->depth) snprintf(r->test + length, sizeof r->test - (size_t)length, " @ d%d", b->depth);
    return n == 0 || time_test(b, r, e);
}

// At each depth: each length of prompt, then each number of tokens in each number of texts.
static bool test_model(Bench *b, Measured *r, Error *e) {
    const List *tg = &options.tg, *together = &options.parallel;
    int most = largest(*together);
    b->workspace->settings.threads = r->threads;
    for (int d = 0; d < options.depth.n; d++) {
        b->depth = options.depth.at[d];
        for (int k = 0; k < most; k++) rewind_sequence(&b->texts[k], 0);
        if (b->depth && !prefill(b->m, b->workspace, b->texts, b->tokens, (size_t)b->depth, NULL, e)) return false;
        for (int k = 1; k < most; k++) fork_sequence(&b->texts[k], b->texts, b->depth);
        for (int i = 0; i < options.pp.n; i++) if (!test_tokens(b, r, options.pp.at[i], 0, e)) return false;
        for (int i = 0; i < tg->n * together->n; i++)
            if (!test_tokens(b, r, tg->at[i / together->n], together->at[i % together->n], e)) return false;
    }
    return true;
}

static bool run_bench(const Model *m, Workspace *w, Sequence *texts, Error *e) {
    Bench b = { .run = run_model, .m = m, .workspace = w, .texts = texts };
    size_t context = (size_t)w->settings.context;
    if (!(b.tokens = allocate(context, sizeof *b.tokens, e))) return false;
    for (size_t i = 0; i < context; i++) b.tokens[i] = (int)((uint32_t)i * 7919u % (uint32_t)m->config.n_tokens);
    snprintf(b.title, sizeof b.title, "%s %s, %zu MB", m->config.family, types[m->layers[0].gate.type].name,
             bytes_per_token(m) / 1000000);
    bool ok = !options.profile || (profile = allocate((size_t)w->settings.threads, sizeof *profile, e));
    ok = ok && run_tests(&b, test_model, &kernels->name, 1, e);
    free(profile);
    profile = NULL;
    free(b.tokens);
    return ok;
}

// ---- matmul: products alone, without a model ----

static void multiply_team(void *p, Team *team) {
    const Bench *b = p;
    Tensor w = b->w;
    size_t n_bytes = tensor_bytes(&w), n_copies = MEMORY_BYTES / n_bytes;  // so many that no cache holds them
    for (size_t i = 0; i < b->n_products; i++) {
        w.tiles = (const unsigned char *)b->memory + i % n_copies * n_bytes;
        multiply_all(&(Product){ b->y, round_up((size_t)w.rows, 16), &w, NULL }, 1, &b->x, team);
        end_step(team, GATE_UP, 0);
    }
}

static bool run_products(Bench *b, const Measured *r, Error *e) {
    run_team(r->threads, 0, multiply_team, b);
    return !interrupted || fail(e, INTERRUPTED, "interrupted");
}

enum { MOST_ROWS = 5632, MOST_COLS = 2048 };

// Each type with each number of vectors, in two shapes. A test is as many products as would take 5 ms at the ceilings.
static bool test_products(Bench *b, Measured *r, Error *e) {
    static const int shapes[][2] = { { 1536, 576 }, { MOST_ROWS, MOST_COLS } };
    for (int i = 0; i < 2 * N_TYPES * options.pp.n; i++) {
        const int *shape = shapes[i / options.pp.n / N_TYPES], n = options.pp.at[i % options.pp.n];
        b->w = (Tensor){ (Type)(i / options.pp.n % N_TYPES), shape[0], shape[1], NULL };
        b->x = (Activations){ (const void *)b->memory, (const void *)b->memory, (size_t)n, 0, (size_t)n, 0 };
        snprintf(r->test, sizeof r->test, "%dx%d %s x %d", shape[0], shape[1], types[b->w.type].name, n);
        for (r->load = (Load){ 0 }, b->n_products = 0;
             fmax(reading_time(r), multiplying_time(r)) < 5e6; b->n_products++)
            add_product(&r->load, &b->w, 1, n, false);
        r->n_tokens = n * (int)b->n_products;
        if (n && !time_test(b, r, e)) return false;
    }
    return true;
}

static bool run_matmul(Error *e) {
    static const char *const sets[] = { "avx512", "avxvnni", "avx2", "neondot", "neon" };  // scalar would take minutes
    Bench b = { .title = "matrix products", .run = run_products };
    int n = largest(options.pp);
    if (n > 4096) return fail(e, MISUSE, "--pp %d: expected at most 4096 for -m matmul", n);
    if (!(b.y = allocate((size_t)n * MOST_ROWS, sizeof *b.y, e))) return false;
    bool ok = run_tests(&b, test_products, options.kernel ? &options.kernel : sets, options.kernel ? 1 : 5, e);
    free(b.y);
    return ok;
}

/* ==== Appendix A. Kernels ===========================================================================================
   The innermost loops for each instruction set; the program chooses when it starts. Only leaves are written by hand:
   dot products of bytes for add_tiles() (chapter 8), rows of add_products() (chapter 4), conversions and lookups.
   MAKE_KERNELS() compiles the other loops of chapters 4, 5, 6 and 8 round them. The target is an attribute of each
   function, so one plain compile line makes all sets. Each gives the bits of its definition: dot products of integers
   are exact in any order, operations on floats are those of the definition, and a SIMD lane is a row. */

// To add a set of kernels: its leaves and MAKE_KERNELS() below, its place in all_kernels, better ones first, and what
// the CPU must have in cpu_can_run(): all in the part of its processor.

#define LEAF(isa) __attribute__((target(isa))) static
#define LEAF_INLINE(isa) __attribute__((target(isa), always_inline)) static inline

// A Dot, a vector of rows at a time. step: the new dot, from dot, `four` columns of the rows and their activations x
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

// A leaf for add_products(): m rows at once; the compiler knows m and half.
// step: fmaf(w[j], x, sum[i][j]) of vectors      widened: a vector of floats, from f16 at `from`
typedef void Products(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,
                      ptrdiff_t ahead, int m, int depth);
#define MAKE_PRODUCTS(isa, set, Vector, step, widened)                                                                 \
    isa void products_##set(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,      \
                            ptrdiff_t ahead, int m, int depth) {                                                       \
        enum { WIDTH = sizeof(Vector) / sizeof(float), VECTORS = 16 / WIDTH };                                         \
        Vector sum[12][VECTORS], w[VECTORS];                                                                           \
        const char *row = b;                                                                                           \
        _Pragma("GCC unroll 12")                                                                                       \
        for (int i = 0; i < m; i++)                                                                                    \
            for (int j = 0; j < VECTORS; j++) memcpy(&sum[i][j], c + (size_t)i * c_stride + WIDTH * j, sizeof *w);     \
        for (int k = 0; k < depth; k++, a++, row += 16 * (half ? 2 : 4)) {                                             \
            if (m <= 8) __builtin_prefetch(row + ahead, 0, 2);  /* to L2: it would not stay in L1 */                   \
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

// add_products() by that leaf, `most` rows at a time: as many as keep the multipliers busy and fit the registers. For a
// matrix, the compiler knows the strides, so that addresses cost nothing.
INLINE void add_rows(float *c, size_t c_stride, const float *a, size_t a_stride, const void *b, bool half,
                     ptrdiff_t ahead, int m, int depth, int most, Products *leaf) {
    bool of_matrix = !half && c_stride == 16 && a_stride == 32;
    for (int i = 0, now; i < m; i += now, c += (size_t)now * c_stride, a += (size_t)now * a_stride) {
        int left = m - i;
        now = left == most || left >= most + 3 ? most : left >= 8 && most > 8 ? 8 : left >= 4 ? 4 : left == 3 ? 3 : 1;
#define ROWS(m) else if (now == m) leaf(c, c_stride, a, a_stride, b, half, ahead, m, depth);
        if (now == most && of_matrix) leaf(c, 16, a, 32, b, false, 0, most, depth);
        ROWS(most) ROWS(8) ROWS(4) ROWS(3) ROWS(1)
    }
}

// to[i] = from[i] in another type: `width` numbers at a time by `step`, the rest by the plain loop
#define MAKE_CONVERSION(isa, name, To, From, width, step, plain)                                                       \
    isa void name(To *to, const From *from, size_t n) {                                                                \
        size_t i = 0;                                                                                                  \
        for (; i + width <= n; i += width) step;                                                                       \
        plain(to + i, from + i, n - i);                                                                                \
    }

// The most that an instruction set can do: rounds of twelve multiply-adds in registers, of bytes or floats. Returns the
// number of operations. The empty asm hides from the compiler what x is and that nobody uses the results.
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

// ---- 256 bits: AVX2 and AVX-VNNI ----

#define AVX2 "avx2,fma,f16c"
#define AVXVNNI "avx2,fma,f16c,avxvnni"
#define AVX512VL "avx2,fma,f16c,avx512f,avx512vl,avx512vnni"  // another encoding of AVX-VNNI's

// [kernel avx2] vpmaddubsw multiplies unsigned by signed bytes and adds pairs in 16 bits. Eight sums fit if the weights
// have 4 bits: 8 * 2 * 15 * 127 = 30480; four if 5; two if 6. The sign of a signed weight moves to the activation.
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

// [kernel avxvnni] vpdpbusd takes the place of three instructions.
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

// The compiler would store narrow vectors, for which a wide load has to wait.
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

// [kernel avx512] One vpdpbusd for each four columns, which also loads and broadcasts the activations.
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

MAKE_KERNELS(scalar_avx2, LEAF(AVX2), "scalar", add_products, narrow_floats, peak_avx2, PLAIN_LEAVES)

#define LEAVES_256 widen_avx2, look_up_avx2, scale_avx2
#define ROWS_AVX2(...) add_rows(__VA_ARGS__, 6, products_avx2)
MAKE_KERNELS(avx2, LEAF(AVX2), "avx2", ROWS_AVX2, narrow_avx2, peak_avx2, 6, dot_avx2, LEAVES_256)
MAKE_KERNELS(avxvnni, LEAF(AVXVNNI), "avxvnni", ROWS_AVX2, narrow_avx2, peak_avxvnni, 8, dot_avxvnni, LEAVES_256)
MAKE_KERNELS(avx512vl, LEAF(AVX512VL), "avxvnni", ROWS_AVX2, narrow_avx2, peak_avx512vl, 8, dot_avx512vl, LEAVES_256)

#define LEAVES_512 widen_avx512, look_up_avx512, scale_avx512
#define ROWS_AVX512(...) add_rows(__VA_ARGS__, 12, products_avx512)
MAKE_KERNELS(avx512, LEAF(AVX512), "avx512", ROWS_AVX512, narrow_avx2, peak_avx512, 8, dot_avx512, LEAVES_512)

static const Kernels *const all_kernels[] = { &avx512, &avxvnni, &avx512vl, &avx2, &scalar_avx2, &scalar };

// A bit that cpuid gives in eax or ecx, for features that compilers have no name for.
static bool cpuid_bit(unsigned leaf, unsigned part, bool of_ecx, int bit) {
    unsigned a = leaf, b, c = part, d;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    return (of_ecx ? c : a) >> bit & 1;
}

static bool cpu_can_run(const Kernels *k) {
    __builtin_cpu_init();  // also sees which registers the operating system saves
    bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    cpuid_bit(1, 0, true, 29);  // f16c
    bool has_vnni = has_avx2 && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
    if (k == &avx512) return has_vnni && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
    if (k == &avxvnni) return has_avx2 && cpuid_bit(7, 1, false, 4);
    if (k == &avx512vl) return has_vnni;
    if (k == &avx2 || k == &scalar_avx2) return has_avx2;
    return true;
}

#elif defined(__aarch64__)
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

// ---- 128 bits: NEON, without and with the instruction for dot products ----

MAKE_CONVERSION(INLINE, widen_neon, float, uint16_t, 4,
                vst1q_f32(to + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from + i)))), widen_floats)
MAKE_CONVERSION(INLINE, narrow_neon, uint16_t, float, 4,
                vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(from + i)))), narrow_floats)

// [kernel neon] Sums of two products fit 16 bits: 2 * 128 * 127 = 32512. Pairs of these are added in 32.
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

MAKE_PEAK(static, neon, "w", int32x4_t,  // a factor that changes: else the products would be made once
          add_dots(sum[i], vreinterpretq_s8_s32(sum[i]), vreinterpretq_s8_s32(x)), float32x4_t, vfmaq_f32(x, sum[i], x))

#define LEAVES_128 widen_neon, look_up_neon, scale_floats
#define ROWS_NEON(...) add_rows(__VA_ARGS__, 4, products_neon)
MAKE_KERNELS(neon, static, "neon", ROWS_NEON, narrow_neon, peak_neon, 0, dot_neon, LEAVES_128)

// [kernel neondot] One sdot for each four columns adds four products of bytes to each lane. Compilers and assemblers
// know it only if -march or -mcpu names it, and a target attribute would undo what else those name. So it is written in
// bits; the assembler gets the numbers of the registers from symbols.
INLINE int32x4_t add_sdot(int32x4_t sum, int32x4_t w, int32x4_t x) {
    __asm__(".irp n,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31\n"
            ".equ number_of_v\\n,\\n\n.endr\n"
            ".inst 0x4e809400 + number_of_%0 + 32 * number_of_%1 + 65536 * number_of_%2" : "+w"(sum) : "w"(w), "w"(x));
    return sum;
}
MAKE_DOT(INLINE, neondot, int32x4_t, add_sdot(dot, four, vdupq_n_s32(x)))
MAKE_PEAK(static, neondot, "w", int32x4_t, add_sdot(sum[i], x, x), float32x4_t, vfmaq_f32(x, sum[i], x))

MAKE_KERNELS(neondot, static, "neondot", ROWS_NEON, narrow_neon, peak_neondot, 0, dot_neondot, LEAVES_128)

static const Kernels *const all_kernels[] = { &neondot, &neon, &scalar };

static bool cpu_can_run(const Kernels *k) {
#ifdef __linux__
    if (k == &neondot) return getauxval(AT_HWCAP) >> 20 & 1;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int answer = 0;
    size_t size = sizeof answer;
    if (k == &neondot) return !sysctlbyname("hw.optional.arm.FEAT_DotProd", &answer, &size, NULL, 0) && answer;
#endif
    return k != &neondot;
}

#else
static const Kernels *const all_kernels[] = { &scalar };
static bool cpu_can_run(const Kernels *k) { return (void)k, true; }
#endif

enum { N_KERNELS = sizeof all_kernels / sizeof *all_kernels };

// The names of the kernels that this machine can run, the best first.
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

// Takes the best kernels that this machine can run, among those of the name if one is given.
static bool choose_kernels(const char *name, Error *e) {
    for (int i = 0; i < N_KERNELS; i++) {
        if (!cpu_can_run(all_kernels[i])) continue;
        kernels = all_kernels[i];
        if (!name || !strcmp(name, kernels->name)) return true;
    }
    return fail(e, MISUSE, "--kernel %.40s: this machine has %s", name, kernel_names());
}

// Refuses a build that gives other bits than the definitions: some options that reorder arithmetic have no macro, such
// as clang's -fassociative-math and -ffp-contract=fast. The hash (FNV-1a) is that of a build without optimisation.
static bool check_bits(Error *e) {
    struct { float x[64], y[64]; Block blocks[2]; } all;
    volatile float cap = 3;  // so that nothing is computed by the compiler
    uint64_t hash = 14695981039346656037u;
    for (int i = 0; i < 64; i++) all.x[i] = cap_at((float)(i * i % 61 - 30) / cap, cap);
    kernels->normalise(all.y, all.x, all.x, all.x, 64, 1e-5f);
    kernels->rotate(all.y, all.x, 64, HALVES);
    kernels->round(all.blocks, all.y, 64, 64, 1, (Range){ 0, 1 });
    choose_experts(all.y, 64, 40);
    for (size_t i = 0; i < sizeof all; i++) hash = (hash ^ ((unsigned char *)&all)[i]) * 1099511628211u;
    return hash == 0x58532561A3A8B7AA ||
           fail(e, MISUSE, "cria promises the same bits everywhere: build it without options that change arithmetic");
}

/* ==== 14. main ======================================================================================================
   One table of options makes the parser and the help. run() opens the model and does what -m says. */

typedef enum { TEXT, TEXTS, INT, SEED, REAL, LIST, FLAG } OptionType;

// To add an option: a member of Options, its default in run(), a row here, a line in README (a test compares them). A
// help that begins with modes and a colon names those that use the option; else the brackets of the heading above do.
typedef struct {
    char letter;  // 0: a long name only
    const char *name, *argument;
    OptionType type;
    size_t offset;
    double min, max;
    const char *help;
} Option;

#define OF(member) offsetof(Options, member)
#define HEADING(text) { 0, "", NULL, FLAG, 0, 0, 0, text }
#define RUNNERS "generate, chat, logits, perplexity, inspect, bench"
static const char mode_help[] = "generate (default), chat, render, tokenize, detokenize, logits, perplexity, score, "
                                "eval, inspect, export, bench, matmul";
static const Option option_table[] = {
    HEADING("Task"),
    { 'm', "mode", "MODE", TEXT, OF(mode), 0, 0, mode_help },
    { 0, "model", "FILE", TEXT, OF(checkpoint), 0, 0, "the model, which may also be the first word" },
    HEADING("Prompt (generate, chat, logits, perplexity, score, eval, tokenize, detokenize)"),
    { 'i', "prompt", "TEXT", TEXT, OF(prompt), 0, 0, "text to continue; in a chat, the first message" },
    { 'f', "file", "FILE", TEXT, OF(file), 0, 0, "read the prompt, or more of it, from FILE; - is stdin" },
    { 0, "ids", "IDS", TEXT, OF(ids), 0, 0, "the prompt as token ids, as in \"1 2 3\"" },
    { 0, "prompts", "FILE", TEXT, OF(prompts), 0, 0, "generate, score: a prompt a line, text or JSON; - is stdin" },
    { 0, "samples", "N", INT, OF(samples), 1, 1e4, "generate: N continuations, with the seed and those after it" },
    { 0, "one-of", "A|B|C", TEXT, OF(one_of), 0, 0, "generate: the text becomes one of these" },
    { 0, "choose", "A|B|C", TEXT, OF(choose), 0, 0, "score: the probabilities of these continuations" },
    { 0, "logprobs", "N", INT, OF(logprobs), 0, MAX_LOGPROBS, "generate, score: with --json, each token's likeliest" },
    { 0, "shots", "K", INT, OF(shots), 0, 1e6, "eval: the first K tasks are exemplars (default 0)" },
    { 0, "cot", NULL, FLAG, OF(cot), 0, 0, "eval: step by step" },
    HEADING("Generation (generate, chat, eval)"),
    { 'n', "n-predict", "N", INT, OF(n_predict), -1, 1e9, "most new tokens (default 256); -1: fills the context" },
    { 't', "temp", "T", REAL, OF(temperature), 0, 100, "temperature (default 1); 0: the likeliest; threads are -j" },
    { 'p', "top-p", "P", REAL, OF(top_p), 0, 1, "draw from the likeliest P (default 0.9; 1: off); the prompt is -i" },
    { 'k', "top-k", "K", INT, OF(top_k), 0, 1e9, "draw from the K likeliest tokens (default 0: off)" },
    { 0, "min-p", "P", REAL, OF(min_p), 0, 1, "drop what is less likely than P times the likeliest (default 0: off)" },
    { 0, "typical", "P", REAL, OF(typical), 0, 1, "draw from the most typical tokens, of sum P (default 0: off)" },
    { 0, "top-nsigma", "N", REAL, OF(nsigma), -1, 100, "drop logits N deviations below the best (default 0: off)" },
    { 0, "xtc-probability", "P", REAL, OF(xtc), 0, 1, "exclude top choices, with probability P (default 0: off)" },
    { 0, "xtc-threshold", "P", REAL, OF(xtc_threshold), 0, 1, "those of at least P, but the last (default 0.1)" },
    { 0, "repeat-penalty", "X", REAL, OF(repeat_penalty), 0.01, 100, "divide logits of seen tokens (default 1: off)" },
    { 0, "repeat-last-n", "N", INT, OF(repeat_last_n), -1, 1e9, "seen in the last N (default 64; -1: in the text)" },
    { 0, "presence-penalty", "X", REAL, OF(presence_penalty), -100, 100, "subtract X from theirs (default 0)" },
    { 0, "frequency-penalty", "X", REAL, OF(frequency_penalty), -100, 100, "and X for each time (default 0)" },
    { 0, "dry-multiplier", "X", REAL, OF(dry_multiplier), 0, 100, "punish repeated sequences by X (default 0: off)" },
    { 0, "dry-base", "X", REAL, OF(dry_base), 1, 100, "times X for each token (default 1.75)" },
    { 0, "dry-allowed-length", "N", INT, OF(dry_allowed), 0, 1e6, "after the first N (default 2)" },
    { 0, "dry-penalty-last-n", "N", INT, OF(dry_last_n), -1, 1e9, "in the last N tokens (default 64; -1: the text)" },
    { 0, "dry-sequence-breaker", "TEXT", TEXTS, OF(breakers), 0, 0, "what ends one; none (again for more)" },
    { 'l', "logit-bias", "ID+X", TEXTS, OF(biases), 0, 0, "add X to a token's logit (again for more)" },
    { 0, "ignore-eos", NULL, FLAG, OF(ignore_eos), 0, 0, "never choose an end token" },
    { 'r', "stop", "TEXT", TEXTS, OF(stops), 0, 0, "end the text before TEXT (again for more)" },
    { 's', "seed", "S", SEED, OF(seed), 0, 0x1p64, "seed (default -1: from the clock, and printed)" },
    HEADING("Machine"),
    { 'j', "threads", "N", LIST, OF(threads), 1, MAX_THREADS, "threads (default: the physical cores); bench: 1,2" },
    HEADING("Memory (" RUNNERS ")"),
    { 'c', "ctx-size", "N", INT, OF(context), 0, 1 << 20, "context (default: the model's, up to 4096); 0: all" },
    { 'b', "batch-size", "N", INT, OF(batch), 1, 4096, "prompt tokens per step (default 128): speed and memory only" },
    { 0, "session", "FILE", TEXT, OF(session), 0, 0, "generate, chat: keep the cache in FILE for texts that begin so" },
    { 0, "lookup", "N", INT, OF(lookup), 0, 1024, "generate, chat: guess and check N tokens at once; the same text" },
    HEADING("Files and chats"),
    { 'z', "tokenizer", "FILE", TEXT, OF(tokenizer), 0, 0, "for llama2.c's files: tokenizer (default tokenizer.bin)" },
    { 'y', "system", "TEXT", TEXT, OF(system), 0, 0, "chat: system prompt (-sys too)" },
    { 0, "template", "NAME", TEXT, OF(template_name), 0, 0, "chat, render: another template's name or file" },
    { 0, "template-arg", "NAME=JSON", TEXTS, OF(template_args), 0, 0, "chat, render: a value for the template" },
    { 0, "now", "DATE", TEXT, OF(now), 0, 0, "chat, render: the date for the template: 2024-07-26 (default: today)" },
    { 0, "messages", "FILE", TEXT, OF(messages), 0, 0, "chat, render: begin with this conversation in JSON; print it" },
    { 0, "single-turn", NULL, FLAG, OF(single), 0, 0, "chat: answer -i, or all of stdin, and end (-st too)" },
    { 0, "think", "HOW", TEXT, OF(think), 0, 0, "chat, render: on, off; chat: hide, prints no thoughts" },
    { 0, "no-shift", NULL, FLAG, OF(no_shift), 0, 0, "chat: end when the context is full, forget no old turns" },
    { 0, "log", "FILE", TEXT, OF(log), 0, 0, "chat: append what both sides say to FILE" },
    { 'o', "output", "FILE", TEXT, OF(output), 0, 0, "logits, export: the file to write" },
    { 0, "type", "TYPE", TEXT, OF(type), 0, 0, "export: the matrices' type, a name or mixed (default keep)" },
    { 0, "report", NULL, FLAG, OF(report), 0, 0, "export: how far each rounded tensor is from the model's" },
    HEADING("Measurement"),
    { 0, "pp", "N", LIST, OF(pp), 0, 1 << 20, "bench, matmul: prompt tokens (default 512), vectors (default 1,256)" },
    { 0, "tg", "N", LIST, OF(tg), 0, 1 << 20, "bench: tokens to generate (default 128)" },
    { 0, "depth", "N", LIST, OF(depth), 0, 1 << 20, "bench: tokens before those (default 0)" },
    { 0, "parallel", "N", LIST, OF(parallel), 1, 64, "bench: texts generated together (default 1)" },
    { 0, "profile", NULL, FLAG, OF(profile), 0, 0, "bench: where the time goes, step by step" },
    { 0, "reps", "N", INT, OF(reps), 1, 64, "bench, matmul: runs of each test (default 5)" },
    { 0, "svg", "FILE", TEXT, OF(svg), 0, 0, "bench, matmul: draw the roofline, with each result on it" },
    HEADING("Output"),
    { 'q', "quiet", NULL, FLAG, OF(quiet), 0, 0, "no statistics, notes and warnings" },
    { 0, "json", NULL, FLAG, OF(json), 0, 0,
      "generate, chat, tokenize, perplexity, score, eval, inspect, bench, matmul: print JSON" },
    HEADING("Arithmetic (" RUNNERS ")"),
    { 0, "exact", NULL, FLAG, OF(exact), 0, 0, "multiply in float with dequantised weights; slower" },
    { 0, "kv", "TYPE", TEXT, OF(cache), 0, 0, "KV cache: f16 (default) or f32 (default if all weights are)" },
    HEADING("Other"),
    { 0, "kernel", "NAME", TEXT, OF(kernel), 0, 0, "avx512, avxvnni, avx2, neondot, neon, scalar (default: the best)" },
    { 0, "pre", "NAME", TEXT, OF(pre), 0, 0, "pre-tokenizer, if a GGUF file names none that is known" },
    { 0, "no-bos", NULL, FLAG, OF(no_bos), 0, 0, "no begin token before the text" },
    { 0, "no-echo", NULL, FLAG, OF(no_echo), 0, 0, "generate: do not print the prompt" },
    { 0, "ends", NULL, FLAG, OF(ends), 0, 0, "tokenize: add the end token, if the model adds one" },
    { 0, "special", NULL, FLAG, OF(special), 0, 0,
      "generate, logits, perplexity, tokenize, detokenize: <|names|> are special tokens" },
    { 0, "pieces", NULL, FLAG, OF(pieces), 0, 0, "tokenize, render: a line for each token, with its text" },
    { 0, "check", NULL, FLAG, OF(check), 0, 0, "inspect: read all weights, and check that they are finite" },
    { 0, "fit", NULL, FLAG, OF(fit), 0, 0, "inspect: which contexts fit the memory that is free" },
    { 0, "tables", NULL, FLAG, OF(tables), 0, 0, "inspect: the tables of types, families and keys, as JSON; no model" },
    { 'h', "help", NULL, FLAG, OF(help), 0, 0, "this help" },
    { 0, "version", NULL, FLAG, OF(version), 0, 0, "the version" },
};
enum { N_OPTIONS = sizeof option_table / sizeof *option_table };

// Words of llama.cpp: an option of ours by another name, with its value after = if the name stands for one; or, where
// `ours` is NULL, what changes no text here, with the values that may follow it ("": any; NULL: none).
typedef struct { const char *words, *ours, *values; } Habit;
static const Habit habits[] = {
    { "-sys --system-prompt", "--system", NULL }, { "--chat-template", "--template", NULL },
    { "--no-display-prompt", "--no-echo", NULL }, { "-st", "--single-turn", NULL },
    { "--predict", "--n-predict", NULL }, { "--temperature", "--temp", NULL },
    { "-cnv --conversation", "--mode=chat", NULL }, { "-no-cnv --no-conversation", "--mode=generate", NULL },
    { "--mlock --mmap --no-mmap -e --escape --no-escape --simple-io --jinja --no-jinja -nkvo --no-kv-offload --warmup "
      "--no-warmup --perf --no-perf --log-disable --verbose-prompt -v --verbose --swa-full --offline --no-op-offload",
      NULL, NULL },
    { "-ngl --gpu-layers --n-gpu-layers -ub --ubatch-size -tb --threads-batch -mg --main-gpu -sm --split-mode -ts "
      "--tensor-split -dev --device -ctk --cache-type-k -ctv --cache-type-v --prio --poll --numa --keep -lv "
      "--reasoning-format --log-colors", NULL, "" },
    { "-fa --flash-attn -co --color", NULL, "on off auto" },
};

static void print_help(void) {
    printf("usage: %s MODEL [PROMPT] [options]\n", options.program);
    for (int i = 0; i < N_OPTIONS; i++) {
        const Option *o = &option_table[i];
        char left[48], letter[] = { '-', o->letter, ',', ' ', 0 };
        snprintf(left, sizeof left, "%s--%s %s", o->letter ? letter : "    ", o->name, o->argument ? o->argument : "");
        if (*o->name) printf("  %-23s  %s\n", left, o->help);
        else printf("%s:\n", o->help);
    }
    printf("limits: %d layers, %d dimensions, %d tokens in a vocabulary, %d positions, %d tensors\n", MAX_LAYERS,
           MAX_DIM, MAX_TOKENS, MAX_CONTEXT, MAX_TENSORS);
}

static bool mode_uses(const char *mode, const Option *o) {
    char list[160], word[32];
    const char *modes = o->help;
    size_t n = strspn(modes, "abcdefghijklmnopqrstuvwxyz, ");
    if (modes[n] != ':') {
        while (*o->name) o--;
        if (!(modes = strchr(o->help, '('))) return true;
        n = strcspn(++modes, ")");
    }
    snprintf(list, sizeof list, ", %.*s,", (int)n, modes);
    snprintf(word, sizeof word, ", %s,", mode);
    return strstr(list, word) != NULL;
}

static const Habit *find_habit(const char *word) {
    Value name = part_of(string(word), 0, strcspn(word, "="));
    for (const Habit *h = habits; h < habits + sizeof habits / sizeof *habits; h++)
        if (has_word(h->words, name)) return h;
    return NULL;
}

// The option that a word is. *glued: the value that the word has too, as in --temp=1 and -n5; or NULL.
static const Option *find_option(const char *word, const char **glued) {
    bool is_long = word[1] == '-';
    const char *name = word + (is_long ? 2 : 1);
    size_t n = is_long ? strcspn(name, "=") : *name != 0;
    *glued = is_long && name[n] ? name + n + 1 : isdigit((unsigned char)name[n]) ? name + n : NULL;
    if (!n || (name[n] && !*glued)) return NULL;
    for (const Option *o = option_table; o < option_table + N_OPTIONS; o++)
        if (is_long ? !strncmp(name, o->name, n) && !o->name[n] : o->letter == *name) return o;
    return NULL;
}

// Whether b is a with up to `most` letters changed, added or left out, or pairs of them swapped.
static bool resembles(const char *a, const char *b, int most) {
    while (*a && *a == *b) a++, b++;
    if (*a == *b || most == 0) return *a == *b;
    return (*a && resembles(a + 1, b, most - 1)) || (*b && resembles(a, b + 1, most - 1)) ||
           (*a && *b && resembles(a + 1, b + 1, most - 1)) ||
           (*a && *b && *a == b[1] && a[1] == *b && resembles(a + 2, b + 2, most - 1));
}

static bool refuse_option(const char *word, Error *e) {
    char name[40];
    const char *start = word + strspn(word, "-");
    snprintf(name, sizeof name, "%.*s", (int)strcspn(start, "="), start);
    int n = (int)strlen(name), most = n < 3 ? 0 : n < 5 ? 1 : n < 8 ? 2 : 3;
    for (int wrong = 0; wrong <= most; wrong++)
        for (const Option *o = option_table; o < option_table + N_OPTIONS; o++)
            if (*o->name && resembles(name, o->name, wrong))
                return fail(e, MISUSE, "there is no option %s; did you mean --%s?", word, o->name);
    return fail(e, MISUSE, "there is no option %s; %s --help lists them", word, options.program);
}

static bool set_option(const Option *o, const char *value, Options *to, Error *e) {
    static const char *const kinds[] = { [INT] = "an integer", [SEED] = "an integer", [REAL] = "a number",
                                         [LIST] = "integers, as in 1,2," };
    const char *starts = o->min < 0 ? "0123456789.-" : "0123456789.";
    void *place = (char *)to + o->offset;
    List *list = place;
    Texts *texts = place;
    char *end, most[32] = "18446744073709551615";  // the largest seed: no double holds it
    if (o->type == FLAG) return *(bool *)place = true;
    if (o->type == TEXT) return *(const char **)place = value, true;
    if (o->type == TEXTS && *value && strlen(value) <= MAX_STOP && texts->n < MAX_TEXTS)
        return texts->at[texts->n++] = value, true;
    if (o->type == TEXTS)
        return fail(e, MISUSE, "--%s: expected up to %d texts of 1 to %d bytes", o->name, MAX_TEXTS, MAX_STOP);
    if (o->type == SEED && !strcmp(value, "-1")) return to->seed = to->clock_seed, true;
    if (o->type == LIST) list->n = 0;
    for (const char *at = value; *at && strchr(starts, *at); at = end + 1) {
        double x;
        errno = 0;
        if (o->type == SEED) x = (double)(*(uint64_t *)place = strtoull(at, &end, 10));
        else if (o->type == REAL) x = *(double *)place = strtod(at, &end);
        else if (o->type == INT) x = (double)(*(int64_t *)place = strtoll(at, &end, 10));
        else x = (double)strtol(at, &end, 10);
        if ((o->type == SEED && errno) || !(x >= o->min && x <= o->max)) break;  // others that overflow are too large
        if (o->type == LIST) list->at[list->n++] = (int)x;
        if (!*end) return true;
        if (o->type != LIST || *end != ',' || list->n == 16) break;
    }
    if (o->type != SEED) snprintf(most, sizeof most, "%.10g", o->max);
    return fail(e, MISUSE, "--%s %s: expected %s from %.10g to %s (%s)", o->name, value, kinds[o->type], o->min, most,
                o->help);
}

// Sets an option for one line of --prompts: one of those that may differ from text to text.
static bool set_own(Text key, Text value, Options *to, Error *e) {
    char name[16], text[32] = "";
    const char *unused;
    Value word = { .kind = IS_STRING, .n = key.n, .text = key.at };
    bool is_known = has_word("n_predict temp top_p top_k min_p seed", word);
    int n = key.n < 40 ? (int)key.n : 40;
    if (!is_known && !is_text(key, "prompt") && !is_text(key, "id"))
        return refuse(e, "a prompt has no key \"%.*s\", but prompt, messages, id, stop, n_predict, temp, top_k, top_p, "
                      "min_p, seed", n, key.at);
    if (!is_known || !value.at || value.n >= sizeof text || memchr(value.at, 0, value.n))
        return refuse(e, "\"%.*s\" has a value of the wrong kind", n, key.at);
    snprintf(name, sizeof name, "--%.*s", (int)key.n, key.at);
    for (char *c = name; *c; c++) if (*c == '_') *c = '-';
    memcpy(text, value.at, value.n);
    return set_option(find_option(name, &unused), text, to, e);
}

// Adds to the prompt's parts. Of several -i the last one counts.
static bool add_prompt(Options *to, const char *text, bool is_file, Error *e) {
    int i = 0;
    while (i < to->n_parts && (is_file || to->parts[i].is_file)) i++;
    if (i == MAX_PROMPT_PARTS) return fail(e, MISUSE, "more than %d times -f", MAX_PROMPT_PARTS);
    to->parts[i] = (Part){ text, is_file };
    to->n_parts += i == to->n_parts;
    return true;
}

// Reads what begins at word i: an option, the model, or the prompt. Returns where the next begins, or 0.
static int parse_word(char **argv, int i, Options *to, int *given, bool quiet, Error *e) {
    const char *word = argv[i], *next = argv[i + 1], *glued, *unused;
    size_t n = strcspn(word, "=");
    char *end = NULL;
    bool is_option = word[0] == '-';
    const Habit *h = find_habit(word);
    if (h && !h->ours) {
        if (!quiet) fprintf(stderr, "%.*s has no effect here\n", (int)n, word);
        return i + 1 + (next && !word[n] && h->values && (!*h->values || has_word(h->values, string(next))));
    }
    const Option *o = find_option(h ? h->ours : is_option ? word : to->checkpoint ? "-i" : "--model", &glued);
    if (h && !glued && word[n]) glued = word + n + 1;
    if (!o || (glued && o->type == FLAG)) return refuse_option(word, e);
    if (!is_option && to->checkpoint && !quiet && access(word, F_OK) == 0)
        fprintf(stderr, "the word after the model is the prompt, though a file has this name; -f reads the file\n");
    const char *value = !is_option ? word : glued ? glued : next;
    if (o->type != FLAG && !value) return fail(e, MISUSE, "%s needs a value: %s", word, o->argument);
    bool is_number = value && (strchr("+-.0123456789", *value) || (strtod(value, &end), !*end));
    if (!strcmp(word, "-p") && !is_number) o = find_option("-i", &unused);
    if (!strcmp(word, "-m") && strpbrk(value, "./") && access(value, F_OK) == 0) o = find_option("--model", &unused);
    bool is_file = o->offset == OF(file), is_model = o->offset == OF(checkpoint);
    if ((is_model && to->checkpoint) || (!is_option && to->prompt && !is_model))
        return fail(e, MISUSE, "two %ss: \"%.99s\" and \"%.99s\"; put one in quotes", o->name,
                    is_model ? to->checkpoint : to->prompt, value);
    if (given[o - option_table]++ && !quiet && o->type != TEXTS && !is_file)
        fprintf(stderr, "--%s is given again: the last one counts\n", o->name);
    if ((is_file || o->offset == OF(prompt)) && !add_prompt(to, value, is_file, e)) return 0;
    return set_option(o, value, to, e) ? i + 1 + (o->type != FLAG && is_option && !glued) : 0;
}

static bool parse_options(int argc, char **argv, Options *to, int *given, Error *e) {
    bool quiet = false;
    for (int i = 1; i < argc; i++) quiet |= !strcmp(argv[i], "-q") || !strcmp(argv[i], "--quiet");
    for (int i = 1; i < argc;) if (!(i = parse_word(argv, i, to, given, quiet, e))) return false;
    return true;
}

// Up to DETOKENIZE, a vocabulary is enough. TOKENIZE to CHAT read a prompt. GENERATE to BENCH need an Engine.
typedef enum {
    RENDER, TOKENIZE, DETOKENIZE, GENERATE, SCORING, LOGITS, PERPLEXITY, CHAT, EVAL, INSPECT, BENCH, EXPORT, MATMUL,
    N_MODES
} Mode;
static const char *const mode_names[N_MODES] = { "render", "tokenize", "detokenize", "generate", "score", "logits",
                                                 "perplexity", "chat", "eval", "inspect", "bench", "export", "matmul" };

static bool find_mode(const char *name, Mode *mode, Error *e) {
    for (*mode = 0; *mode < N_MODES; ++*mode) if (!strcmp(mode_names[*mode], name)) return true;
    return fail(e, MISUSE, "-m %s: expected %s, or the file of a model", name, mode_help);
}

// Reads token ids from n bytes of text, after which there is a NUL.
static bool read_ids(const char *text, size_t n, int n_tokens, Tokens *tokens, Error *e) {
    static const char gaps[] = " \t\r\n,";
    char *end;
    if (strlen(text) != n) return fail(e, MISUSE, "a NUL among the token ids");
    for (const char *p = text + strspn(text, gaps); *p; p = end + strspn(end, gaps)) {
        long id = isdigit((unsigned char)*p) ? strtol(p, &end, 10) : -1;
        if (id < 0 || id >= n_tokens)
            return fail(e, MISUSE, "\"%.*s\" is no token id below %d", (int)strcspn(p, gaps), p, n_tokens);
        if (!emit(tokens, (int)id, e)) return false;
    }
    return true;
}

// The most bytes that n_tokens can stand for: 8 for each byte of a piece, as 4 characters of 4 bytes may compose to one
// of 2. But there is no limit if some bytes have no token.
static size_t most_bytes(const Tokenizer *t, int n_tokens) {
    size_t longest = 0;
    for (int byte = 0; byte < 256; byte++) if (t->byte_id[byte] < 0) return MAX_TEXT;
    for (int id = 0; id < t->n_tokens; id++) longest = larger(longest, t->text_start[id + 1] - t->text_start[id]);
    size_t n = times((size_t)n_tokens, 8 * longest);
    return n < MAX_TEXT ? n : MAX_TEXT;
}

// Whether a text asks for an answer rather than for its continuation: it is a question, or begins like an order.
static bool is_instruction(Span text) {
    Span t = trimmed(text.text, text.n_bytes);
    char first[16] = "";
    size_t n = 0;
    for (; n < t.n_bytes && n + 1 < sizeof first && t.text[n] != ' '; n++)
        first[n] = (char)tolower((unsigned char)t.text[n]);
    return (t.n_bytes && t.text[t.n_bytes - 1] == '?') || (n < t.n_bytes &&
           has_word("write explain describe summarise summarize translate list give tell name create compare rewrite "
                    "answer classify what who how why when where", string(first)));
}

// Reads the prompt from --ids, from -i and -f, or from stdin: as text, which a NUL follows, and as tokens. In a chat it
// is the first message, and only text.
static bool read_prompt(const Model *m, Mode mode, int context, Buffer *text, Tokens *tokens, Error *e) {
    const Tokenizer *t = &m->tokenizer;
    bool are_ids = options.ids || mode == DETOKENIZE, is_chat = mode == CHAT;
    bool is_limited = is_chat || (mode >= GENERATE && mode <= LOGITS && !are_ids);
    size_t most = is_limited ? most_bytes(t, context) : MAX_TEXT;
    if (options.ids && options.n_parts) return fail(e, MISUSE, "more than one prompt: --ids stands alone");
    bool trims = is_chat || mode == GENERATE || options.choose;
    if (!(options.ids ? append(text, options.ids, strlen(options.ids) + 1, e)
                      : read_parts(most, trims, !is_chat, text, e))) return false;
    if (text->n > plus(most, 1))
        return fail(e, NO_ROOM, "the prompt has more than %zu bytes%s", most, is_limited ? "; see -c" : "");
    Span span = { (const char *)text->bytes, text->n - 1, options.special };
    if ((options.ids || options.n_parts) && !options.quiet && has_unread_input())
        fprintf(stderr, "stdin is not read, since there is a prompt; -f - would read it\n");
    if (is_chat) return strlen(span.text) == span.n_bytes || fail(e, MISUSE, "a NUL in the first message");
    if (are_ids) return read_ids(span.text, span.n_bytes, m->config.n_tokens, tokens, e) &&
        (tokens->n > 0 || !(options.ids || options.prompt) || fail(e, MISUSE, "no token ids; see --ids"));
    // An empty text begins with the begin token, even if the model does not ask for it: something must be first.
    bool begins = t->flags & ADD_BOS || (mode != TOKENIZE && span.n_bytes == 0 && t->bos >= 0);
    bool ends = mode == TOKENIZE && options.ends && t->flags & ADD_EOS;
    if ((begins && !emit_around(t, false, tokens, e)) || !encode(t, &span, 1, tokens, e) ||
        (ends && !emit_around(t, true, tokens, e)))
        return false;
    if (!tokens->n && mode != TOKENIZE)
        return fail(e, MISUSE, "an empty prompt, and the model has no begin token; see -i");
    if (tokens->n_dropped)
        fprintf(stderr, "%zu bytes of the text were left out: this model has no token for them\n", tokens->n_dropped);
    bool hints = mode == GENERATE && m->chat_template.n && !options.quiet && is_instruction(span);
    if (hints && isatty(STDOUT_FILENO) && isatty(STDERR_FILENO))
        fprintf(stderr, "this text is continued; -m chat lets the model answer it\n");
    return true;
}

// Whether it is chapter 12a's to do.
static bool is_script(Mode mode) {
    bool more = options.prompts || options.one_of || options.samples > 1 || options.json;
    return mode == SCORING || mode == EVAL || (mode == GENERATE && more);
}

// Opens the checkpoint and, for llama2.c's, its tokenizer. Where no weights are needed, a vocabulary is enough.
static bool open_files(Model *m, Mode mode, Error *e, const char **culprit) {
    bool only_words = mode <= DETOKENIZE;
    bool needs_words = mode != INSPECT && (only_words || !options.ids || mode > PERPLEXITY);
    *culprit = options.checkpoint;
    if (!map_parts(options.checkpoint, m, e)) return false;
    bool is_llama2c = recognise(m->file.bytes, m->file.n_bytes) == LLAMA2C;
    int threads = only_words ? 0 : mode == EXPORT ? -1 : options.threads.at[0];
    bool ok = (!only_words || is_llama2c) && open_model(m->file.bytes, m->file.n_bytes, threads, m, e);
    if (!ok && only_words && !(is_llama2c && options.tokenizer))
        ok = open_vocabulary(m->file.bytes, m->file.n_bytes, -1, m, e);
    if (!ok || (m->tokenizer.n_tokens && !options.tokenizer)) return ok;
    const char *path = options.tokenizer ? options.tokenizer : "tokenizer.bin";
    if (!options.tokenizer && access(path, R_OK)) return !needs_words ||
        refuse(e, "has no tokenizer in it, and there is no tokenizer.bin here: give it with -z FILE");
    *culprit = path;
    return map_file(path, &m->tokenizer_file, e) &&
           open_vocabulary(m->tokenizer_file.bytes, m->tokenizer_file.n_bytes, m->config.n_tokens, m, e);
}

static bool choose_settings(const Model *m, Mode mode, Settings *s, Error *e) {
    int own = m->config.context, usual = mode == PERPLEXITY ? 512 : 4096, needed = 0;
    int pp = largest(options.pp), tg = largest(options.tg);
    if (mode == BENCH) usual = needed = largest(options.depth) + (pp > tg ? pp : tg);
    s->context = options.context > 0 ? (int)options.context : options.context == 0 || own < usual ? own : usual;
    if (s->context > own)
        return fail(e, MISUSE, "-c %d: the model was trained for %d positions; -c 0 takes them all", s->context, own);
    if (s->context < needed)
        return fail(e, NO_ROOM, "the test needs %d positions, the context has %d of the model's %d", needed, s->context,
                    own);
    s->batch = options.batch ? (int)options.batch : 128;
    if (s->batch > s->context) s->batch = s->context;
    if (mode == BENCH && s->batch < largest(options.parallel)) s->batch = largest(options.parallel);
    s->threads = largest(options.threads);
    s->exact = options.exact;
    bool all_f32 = true;
    for (const Slot *slot = m->slots; slot < m->slots + m->n_slots; slot++)
        all_f32 &= !slot->data || slot->is_vector || slot->type == F32;
    s->cache_f32 = options.cache ? !strcmp(options.cache, "f32") : options.exact || all_f32;
    return !options.cache || s->cache_f32 || !strcmp(options.cache, "f16") ||
           fail(e, MISUSE, "--kv %s: expected f16 or f32", options.cache);
}

// What a model needs to run: scratch buffers, and the texts with their KV cache.
typedef struct {
    Workspace workspace;
    Cache cache;
    Sequence *texts;
    int n_texts;
} Engine;

static bool set_up_engine(const Model *m, Mode mode, Engine *g, Error *e) {
    Settings settings = { .threads = 1 };
    if (!choose_settings(m, mode, &settings, e) || !make_workspace(m, &g->workspace, settings, e)) return false;
    settings = g->workspace.settings;
    if (mode == BENCH && settings.batch < largest(options.parallel))
        return fail(e, NO_ROOM, "--parallel %d: a pass of this model has %d rows; -b sets more",
                    largest(options.parallel), settings.batch);
    g->n_texts = mode == BENCH ? largest(options.parallel) : 1;
    if (mode == PERPLEXITY) g->n_texts = settings.batch / (settings.context > 1 ? settings.context - 1 : 1) + 2;
    if (is_script(mode)) g->n_texts = n_together(m, settings);
    while (!make_cache(m, &g->cache, settings, g->n_texts, e))
        if (!is_script(mode) || (g->n_texts /= 2) == 0) return false;
    e->status = DONE;
    if (!(g->texts = allocate((size_t)g->n_texts, sizeof *g->texts, e))) return false;
    for (int i = 0; i < g->n_texts; i++) g->texts[i] = new_sequence(&g->cache, i);
    if (options.context == 0 && !options.quiet)
        fprintf(stderr, "a context of %d positions: %zu MiB when it is full\n", settings.context,
                (g->workspace.arena_bytes + g->cache.arena_bytes) >> 20);
    return true;
}

// Prints the one line that ends a failed run.
static int tell_error(const char *culprit, const Error *e) {
    char line[1024];
    const char *program = options.program ? options.program : "run", *slash = strrchr(program, '/');
    snprintf(line, sizeof line, "%.40s: %.600s%s%s", slash ? slash + 1 : program, culprit ? culprit : "",
             culprit ? ": " : "", e->text);
    disarm(line, strlen(line), "");
    if (e->status != INTERRUPTED) fprintf(stderr, "%s\n", line);
    else if (isatty(STDERR_FILENO)) fputc('\n', stderr);  // the terminal shows ^C
    return e->status;
}

static const Model *in_use;  // for the handler

// The first Ctrl-C asks loops to stop, a second ends the program. At a chat's prompt one does, after its session.
// Before any signal ends it, the unfinished file is removed. SIGBUS may mean that a mapped file became shorter or its
// disk failed: then the first thread that gets it says so.
static void on_signal(int number, siginfo_t *info, void *context) {
    static atomic_flag said = ATOMIC_FLAG_INIT;
    bool ends = number != SIGINT || interrupted || (at_prompt && !options.session);
    (void)context;
    if (number == SIGINT && at_prompt && options.session) close(STDIN_FILENO);  // reading ends, the session is written
    if (!ends) {
        interrupted = number;
        return;
    }
    if (unfinished) unlink(unfinished);
    if (terminal_use) use_terminal(USUAL);
    if (number == SIGINT) _exit(tell_error(NULL, &(Error){ INTERRUPTED, "" }));
    for (size_t i = 0; number == SIGBUS && i < 2 + in_use->n_parts; i++) {
        const Map *map = i > 1 ? &in_use->parts[i - 2] : i ? &in_use->tokenizer_file : &in_use->file;
        if ((uintptr_t)info->si_addr - (uintptr_t)map->bytes >= map->n_bytes) continue;
        while (atomic_flag_test_and_set(&said)) pause();
        Error e = { BROKEN_IO, "became shorter while it was in use, or cannot be read any more" };
        _exit(tell_error(map->path, &e));
    }
    signal(number, SIG_DFL);
    raise(number);
}

static bool run_mode(Model *m, Mode mode, Engine *g, Sampler *sampler, Error *e) {
    Tokens tokens = { 0 };
    Buffer text = { 0 };
    Workspace *w = &g->workspace;
    bool scripted = is_script(mode), reads_lines = mode == EVAL || (options.prompts && scripted);
    bool keeps = options.session && !scripted && (mode == GENERATE || mode == CHAT);
    ScriptKind kind = mode == EVAL ? EVALUATED : mode != SCORING ? CONTINUED : options.choose ? COMPARED : SCORED;
    if (mode == CHAT && options.ids) return fail(e, MISUSE, "-m chat takes texts, not --ids");
    if (mode == CHAT && options.logprobs) return fail(e, MISUSE, "-m chat has no --logprobs; -m score and --json have");
    if (options.logprobs && mode == GENERATE && !options.json && !options.quiet)
        fprintf(stderr, "--logprobs needs --json here\n");
    if (options.prompts && options.n_parts && mode != EVAL && scripted)
        return fail(e, MISUSE, "two sources of prompts: --prompts, and -i or -f");
    if (mode == EVAL && !options.file) return fail(e, MISUSE, "-m eval needs the tasks: -f FILE");
    if (options.choose && options.ids) return fail(e, MISUSE, "--choose needs a prompt that is text, not --ids");
    if (options.session && scripted && mode == GENERATE && !options.quiet)
        fprintf(stderr, "--session is not used with --prompts, --samples, --one-of, --choose or --json\n");
    bool ok = mode <= DETOKENIZE || mode >= EXPORT || set_up_engine(m, mode, g, e);
    Sequence *s = g->texts;
    ok = ok && (mode == RENDER || mode > CHAT || reads_lines ||
                read_prompt(m, mode, w->settings.context, &text, &tokens, e));
    if (mode == CHAT && options.n_parts) {
        options.prompt = (char *)text.bytes;
        options.single = options.single || !isatty(STDIN_FILENO);  // so a loop over lines keeps its input
    }
    // SA_RESTART: no write is cut short
    heed(SIGINT, &(struct sigaction){ .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART });
    ok = ok && (!keeps || (open_session(m, w, s, NULL, e) && check_session_path(e)));
    if (ok && scripted)
        ok = run_script(m, w, s, g->n_texts, sampler, kind, reads_lines ? NULL : &tokens,
                        (Text){ (const char *)text.bytes, text.n ? text.n - 1 : 0 }, e);
    else switch (ok ? mode : N_MODES) {
    case RENDER: ok = run_render(m, e); break;
    case TOKENIZE: print_tokens(&m->tokenizer, &tokens); break;
    case DETOKENIZE: print_text(&m->tokenizer, &tokens); break;
    case GENERATE: ok = run_generate(m, w, s, sampler, &tokens, e); break;
    case LOGITS: ok = run_logits(m, w, s, &tokens, e); break;
    case PERPLEXITY: ok = run_perplexity(m, w, s, g->n_texts, &tokens, e); break;
    case CHAT: ok = run_chat(m, w, s, sampler, e); break;
    case INSPECT: ok = run_inspect(m, w, &g->cache, e); break;
    case BENCH: ok = run_bench(m, w, s, e); break;
    case EXPORT: ok = export_model(m, options.output, e); break;
    case MATMUL: ok = run_matmul(e); break;
    default: break;
    }
    if (mode <= DETOKENIZE) ok = ok && (!interrupted || fail(e, INTERRUPTED, "interrupted"));
    keeps = keeps && s && s->n > 0 && (ok || e->status == INTERRUPTED || e->status == NO_ROOM);
    if (keeps) ok = write_session(m, w, s, ok ? e : &(Error){ 0 }) && ok;
    free(tokens.ids);
    free(text.bytes);
    return ok;
}

static bool run(int argc, char **argv, Model *m, Engine *g, Sampler *sampler, Error *e, const char **culprit) {
    uint64_t clock = (uint64_t)time(NULL) * 1000003u + (uint64_t)getpid();
    int given[N_OPTIONS] = { 0 };
    Mode mode;
    options = (Options){ .program = argc > 0 ? argv[0] : "run", .mode = "generate", .temperature = 1.0, .top_p = 0.9,
                         .n_predict = 256, .context = -1, .repeat_penalty = 1, .repeat_last_n = 64, .dry_base = 1.75,
                         .dry_allowed = 2, .dry_last_n = 64, .xtc_threshold = 0.1, .reps = 5, .samples = 1,
                         .threads = { 1, { count_cores(true) } }, .tg = { 1, { 128 } }, .depth = { 1, { 0 } },
                         .parallel = { 1, { 1 } }, .seed = clock, .clock_seed = clock };
    if (!parse_options(argc, argv, &options, given, e) || !find_mode(options.mode, &mode, e)) return false;
    for (int i = 0; i < N_OPTIONS && !options.quiet; i++)
        if (given[i] && !mode_uses(options.mode, &option_table[i]))
            fprintf(stderr, "-m %s does not use --%s\n", options.mode, option_table[i].name);
    if (options.pp.n == 0) options.pp = mode == MATMUL ? (List){ 2, { 1, 256 } } : (List){ 1, { 512 } };
    for (int i = 0, most = count_cores(false); i < options.threads.n; i++) {
        if (options.threads.at[i] <= most) continue;
        if (!options.quiet) fprintf(stderr, "-j %d: this process may use only %d\n", options.threads.at[i], most);
        options.threads.at[i] = most;
    }
    if (options.help) return print_help(), true;
    if (options.version) return printf("cria %s\n", CRIA_VERSION), true;
    if (options.tables && mode == INSPECT) return print_tables(), true;
    if (!options.checkpoint && mode != MATMUL)
        return fail(e, MISUSE, "no model given; %s --help lists the options", options.program);
    if (options.temperature >= 2 && options.temperature == floor(options.temperature))
        fprintf(stderr, "a temperature of %g is very high; threads are -j\n", options.temperature);
    if (!choose_kernels(options.kernel, e) || !check_bits(e)) return false;
    if (mode != MATMUL && !open_files(m, mode, e, culprit)) return false;
    if (options.no_bos) m->tokenizer.flags &= ~(unsigned)ADD_BOS;
    *culprit = NULL;
    *sampler = (Sampler){ .from_clock = options.seed == options.clock_seed, .temperature = (float)options.temperature,
                          .typical = options.typical < 1 ? (float)options.typical : 0,
                          .xtc = options.xtc_threshold > 0.5 ? 0 : (float)options.xtc,  // two cannot be above 0.5
                          .xtc_threshold = (float)options.xtc_threshold,
                          .top_k = (int)options.top_k, .top_p = (float)options.top_p, .min_p = (float)options.min_p };
    return make_sampler(sampler, m->config.n_tokens, options.seed, e) &&
           make_shaper(sampler, &m->tokenizer, m->config.n_tokens, e) && run_mode(m, mode, g, sampler, e);
}

// Sets up signals, and fills the descriptors 0 to 2 that are closed: otherwise a file could get one of them, and be
// written to as stdout. Reading from or writing to their substitutes fails.
static void prepare_process(const Model *m) {
    static const int signals[] = { SIGBUS, SIGTERM, SIGHUP, SIGQUIT, SIGPIPE };
    struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO };
    in_use = m;
    for (size_t i = 0; i < sizeof signals / sizeof *signals; i++) heed(signals[i], &action);
    signal(SIGXFSZ, SIG_IGN);  // a file that grows too large is a write that fails
    for (int i = 0; i < 3; i++) if (fcntl(i, F_GETFD) < 0) open(i ? "/" : "/dev/null", i ? O_RDONLY : O_WRONLY);
}

#ifndef CRIA_NO_MAIN
int main(int argc, char **argv) {
    Model model = { 0 };
    Engine engine = { .n_texts = 0 };
    Sampler sampler = { 0 };
    Error error = { 0 };
    const char *culprit = NULL;
    prepare_process(&model);
    bool ok = run(argc, argv, &model, &engine, &sampler, &error, &culprit);
    bool written = !ferror(stdout);  // a run whose text was lost has not succeeded
    written = fclose(stdout) == 0 && written;
    if (ok && !written) ok = fail(&error, BROKEN_IO, "writing to stdout failed: %s", strerror(errno));
    int status = ok ? DONE : tell_error(culprit, &error);
    free(sampler.candidates);
    free(sampler.shaper);
    free(engine.texts);
    if (engine.workspace.arena) munmap(engine.workspace.arena, engine.workspace.arena_bytes);
    if (engine.cache.arena) munmap(engine.cache.arena, engine.cache.arena_bytes);
    close_model(&model);
    return status;
}
#endif
