/* Fuzzing: bytes that nobody thought of.

   make fuzz        builds six programs from this file with clang's libFuzzer, ASan and UBSan (tests/fuzz.py does)

     FILES   any bytes as a checkpoint and as a tokenizer file: they open, or are refused with one line
     STRINGS any text in small vocabularies of every kind, or in one that the input brings along: the tokens are those
             of a plain quadratic encoder below, and decoding gives the text back
     MODELS  what opens goes through the model, two tokens at once and one after the other, by the scalar kernels and by
             this machine's best: the same bits
     SESSIONS  any bytes as a session of a small model: taken, and the text goes on, or refused, and nothing is left

     TEMPLATES  any bytes as a chat template, or, after a 0, as JSON: text whose bytes have origins, or one line
     LINES   any bytes as the lines of --prompts and of -m eval, messages among them: a JSON object for each line

   test.c includes this file too and replays tests/corpus with the same functions, which return what is wrong, or NULL.
   In the fuzzers every map is a block of its exact size, so that ASan sees who leaves it, and allocations are added up:
   the bytes of a file have to justify them. */

#ifdef FUZZ  // 1 FILES, 2 STRINGS, 3 MODELS, 4 SESSIONS, 5 TEMPLATES or 6 LINES; else this is a part of test.c
#define CRIA_NO_MAIN
#define _GNU_SOURCE
#pragma clang diagnostic ignored "-Wunused-function"
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { MAX_MAP = 1 << 20 };  // a larger one fails: what needs it would be slow
static size_t n_allocated;   // bytes asked for since the input began

static void *fuzz_calloc(size_t n, size_t size) {
    n_allocated += n * size;
    return calloc(n, size);
}

static void *fuzz_realloc(void *p, size_t n) {
    n_allocated += n;
    return realloc(p, n);
}

static void *fuzz_mmap(void *at, size_t n, int protection, int flags, int file, off_t offset) {
    (void)at, (void)protection, (void)flags, (void)file, (void)offset;
    void *p = NULL;
    if (n > MAX_MAP || posix_memalign(&p, 64, n)) return MAP_FAILED;
    return memset(p, 0, n);
}

static int fuzz_munmap(void *p, size_t n) {
    (void)n;
    free(p);
    return 0;
}

#define calloc fuzz_calloc
#define realloc fuzz_realloc
#define mmap fuzz_mmap
#define munmap fuzz_munmap
#define madvise(at, n, advice) ((void)(at), (void)(n), 0)
#include "../run.c"
#include "runner.h"
#undef calloc
#undef realloc
#undef mmap
#undef munmap
#undef madvise
#endif

// ---- A tokenizer that is only right ----

#ifdef FUZZ  // what is only there to compare with is not looked at, which is five times as fast
#define PLAIN __attribute__((no_sanitize("address", "undefined", "coverage")))
#else
#define PLAIN
#endif

// A vocabulary sorted: pieces by their bytes, then by id; merges by their parts, then by rank.
typedef struct {
    const Tokenizer *t;
    int *by_bytes;      // (n_tokens)
    int *by_parts;      // (n_merges)
    int first[257];     // where in by_bytes the pieces are that begin with this byte
    size_t longest[8];  // the longest piece of each type
    int byte[256];      // the token of a single byte, or -1
} Lexicon;

static const Tokenizer *sorted_tokenizer;  // qsort passes no context

PLAIN static int compare_bytes(const char *s, size_t n, const char *r, size_t m) {
    for (size_t i = 0; i < n && i < m; i++)
        if (s[i] != r[i]) return (unsigned char)s[i] < (unsigned char)r[i] ? -1 : 1;
    return n < m ? -1 : n > m;
}

PLAIN static int compare_to_piece(const char *s, size_t n, const Tokenizer *t, int id) {
    uint32_t start = t->text_start[id];
    return compare_bytes(s, n, t->text + start, t->text_start[id + 1] - start);
}

PLAIN static int compare_pieces(const void *a, const void *b) {
    const Tokenizer *t = sorted_tokenizer;
    int i = *(const int *)a, k = *(const int *)b;
    int order = compare_to_piece(t->text + t->text_start[i], t->text_start[i + 1] - t->text_start[i], t, k);
    return order ? order : i - k;
}

PLAIN static int compare_parts(const uint32_t *a, const uint32_t *b) {
    return a[0] != b[0] ? (a[0] < b[0] ? -1 : 1) : a[1] != b[1] ? (a[1] < b[1] ? -1 : 1) : 0;
}

PLAIN static int compare_merges(const void *a, const void *b) {
    int i = *(const int *)a, k = *(const int *)b;
    int order = compare_parts(sorted_tokenizer->merge[i], sorted_tokenizer->merge[k]);
    return order ? order : i - k;
}

PLAIN static Lexicon make_lexicon(const Tokenizer *t) {
    int *ids = malloc((size_t)(t->n_tokens + t->n_merges) * sizeof(int));
    if (!ids) abort();
    Lexicon x = { .t = t, .by_bytes = ids, .by_parts = ids + t->n_tokens };
    memset(x.byte, 0xFF, sizeof x.byte);
    for (int i = t->n_tokens - 1; i >= 0; i--) {
        size_t n = t->text_start[i + 1] - t->text_start[i], *longest = &x.longest[t->type[i]];
        unsigned char first = n ? (unsigned char)t->text[t->text_start[i]] : 0;
        *longest = n > *longest ? n : *longest;
        if (n == 1 && t->type[i] == (t->kind == SPM ? PIECE_BYTE : PIECE_NORMAL)) x.byte[first] = i;
        for (int k = first + 1; k <= 256; k++) x.first[k]++;
        x.first[0] += n == 0;
        x.by_bytes[i] = i;
    }
    for (int i = 0; i < t->n_merges; i++) x.by_parts[i] = i;
    sorted_tokenizer = t;
    qsort(x.by_bytes, (size_t)t->n_tokens, sizeof(int), compare_pieces);
    qsort(x.by_parts, (size_t)t->n_merges, sizeof(int), compare_merges);
    return x;
}

// The lowest id with these bytes and one of these types, or -1.
PLAIN static int find_in(const Lexicon *x, const char *s, size_t n, unsigned types) {
    int low = x->first[(unsigned char)*s], high = x->first[(unsigned char)*s + 1];
    while (low < high) {
        int middle = (low + high) / 2;
        if (compare_to_piece(s, n, x->t, x->by_bytes[middle]) > 0) low = middle + 1;
        else high = middle;
    }
    for (; low < x->t->n_tokens && compare_to_piece(s, n, x->t, x->by_bytes[low]) == 0; low++)
        if (types >> x->t->type[x->by_bytes[low]] & 1) return x->by_bytes[low];
    return -1;
}

// The first merge of the pair, or -1.
PLAIN static int find_pair(const Lexicon *x, const uint32_t *pair) {
    int low = 0, high = x->t->n_merges;
    while (low < high) {
        int middle = (low + high) / 2;
        if (compare_parts(x->t->merge[x->by_parts[middle]], pair) < 0) low = middle + 1;
        else high = middle;
    }
    bool found = low < x->t->n_merges && compare_parts(x->t->merge[x->by_parts[low]], pair) == 0;
    return found ? x->by_parts[low] : -1;
}

enum { MAX_REFERENCE = 4096, MAX_COMPOSED = 3 * MAX_REFERENCE };  // bytes of a text, and tokens; in NFC

typedef struct {
    const Lexicon *x;
    int ids[2 * MAX_COMPOSED];
    int n, first;  // first: where this stretch of plain text begins
    size_t n_dropped;
    bool composed;  // decoding gives NFC, and not the text
    const char *wrong;
} Reference;

// Tokens of a character that is no piece: its bytes', else one unknown token for all such in a row.
PLAIN static void reference_unknown(Reference *r, const char *s, size_t n) {
    const Tokenizer *t = r->x->t;
    for (size_t i = 0; i < n; i++) {
        int id = r->x->byte[(unsigned char)s[i]];
        if (id < 0) id = t->unk;
        if (id < 0) r->n_dropped++;
        else if (id != t->unk || r->n == r->first || r->ids[r->n - 1] != id) r->ids[r->n++] = id;
    }
}

typedef struct {
    size_t at, n;
    int id;
    int joined, rank;  // with its right neighbour: the piece, or -1, and in BPE the merge
} Stretch;

PLAIN static void reference_pair(const Lexicon *x, const char *s, Stretch *a, const Stretch *b) {
    const Tokenizer *t = x->t;
    a->joined = t->kind == SPM ? find_in(x, s + a->at, a->n + b->n, TEXT_TYPES) : -1;
    if (t->kind == SPM || (a->rank = find_pair(x, (const uint32_t[]){ (uint32_t)a->id, (uint32_t)b->id })) < 0) return;
    a->joined = (int)t->merge[a->rank][2];
}

// Joins the best pair of all neighbours, again and again.
PLAIN static void reference_join(Reference *r, const char *s, size_t n) {
    const Tokenizer *t = r->x->t;
    static Stretch part[MAX_COMPOSED + 1];
    size_t parts = 0;
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t code;
        int of_character = t->kind == SPM ? read_character(s + i, n - i, &code) : 1;
        length = of_character > 0 ? (size_t)of_character : 1;
        int id = find_in(r->x, s + i, length, t->kind == SPM ? TEXT_TYPES : 1 << PIECE_NORMAL);
        if (id < 0 && t->kind == BPE) r->n_dropped++;
        else part[parts++] = (Stretch){ i, length, id, -1, 0 };
        if (parts > 1) reference_pair(r->x, s, &part[parts - 2], &part[parts - 1]);
    }
    for (;;) {
        Stretch *best = NULL;
        for (Stretch *a = part; a + 1 < part + parts; a++) {
            if (a->joined < 0) continue;
            if (!best || (t->kind == BPE ? a->rank < best->rank : t->score[a->joined] > t->score[best->joined]))
                best = a;
        }
        if (!best) break;
        *best = (Stretch){ best->at, best->n + best[1].n, best->joined, -1, 0 };
        parts--;
        memmove(best + 1, best + 2, (size_t)(part + parts - best - 1) * sizeof *part);
        if (best + 1 < part + parts) reference_pair(r->x, s, best, best + 1);
        if (best > part) reference_pair(r->x, s, best - 1, best);
    }
    for (size_t i = 0; i < parts; i++) {
        if (part[i].id >= 0) r->ids[r->n++] = part[i].id;
        else reference_unknown(r, s + part[i].at, part[i].n);
    }
}

// NFC of a text, which is its own NFC. What else it is, is compose_text()'s affair: tests/golden/tokens has that.
PLAIN static char *reference_compose(Reference *r, const char **s, size_t *n) {
    const char *text = *s;
    char *composed = NULL, *again = NULL;
    size_t n_text = *n;
    Error e;
    if (!compose_text(r->x->t, s, n, &composed, &e)) abort();
    r->composed = r->composed || compare_bytes(*s, *n, text, n_text);
    text = *s, n_text = *n;
    if (!compose_text(r->x->t, &text, &n_text, &again, &e)) abort();
    if (compare_bytes(*s, *n, text, n_text)) r->wrong = "a composed text is composed to another one";
    free(again);
    return composed;
}

// Text between user-defined pieces. Where the words end is cut_words()'s affair: tests/golden/tokens has that.
PLAIN static void reference_words(Reference *r, const char *s, size_t n) {
    const Tokenizer *t = r->x->t;
    static uint16_t class[MAX_COMPOSED];
    char *composed = t->flags & COMPOSE ? reference_compose(r, &s, &n) : NULL;
    if (n && t->kind == BPE) cut_words(t, s, n, class);
    for (size_t at = 0, end; at < n; at = end) {
        for (end = at + 1; end < n && !(t->kind == BPE && class[end] & CUT);) end++;
        int whole = t->flags & IGNORE_MERGES ? find_in(r->x, s + at, end - at, TEXT_TYPES) : -1;
        if (whole >= 0) r->ids[r->n++] = whole;
        else reference_join(r, s + at, end - at);
    }
    free(composed);
}

// The longest piece of that type that begins at s, or -1.
PLAIN static int reference_longest(const Lexicon *x, int type, const char *s, size_t n, size_t *length) {
    for (*length = n < x->longest[type] ? n : x->longest[type]; *length > 0; --*length) {
        int id = find_in(x, s, *length, 1u << type);
        if (id >= 0) return id;
    }
    *length = 1;
    return -1;
}

PLAIN static void reference_plain(Reference *r, const char *text, size_t n_text) {
    const Tokenizer *t = r->x->t;
    char s[MAX_REFERENCE + 1];
    size_t n = 0, begin = 0;
    if (n_text == 0) return;
    r->first = r->n;
    if (t->flags & DUMMY_PREFIX) s[n++] = ' ';
    for (size_t i = 0; i < n_text; i++) {
        bool bar = t->kind == SPM && n_text - i >= 3 && !memcmp(text + i, "\xE2\x96\x81", 3);
        s[n++] = bar ? ' ' : text[i];
        if (bar) i += 2;
    }
    for (size_t at = 0, length; at < n; at += length) {
        int id = reference_longest(r->x, PIECE_USER_DEFINED, s + at, n - at, &length);
        if (id < 0) continue;
        reference_words(r, s + begin, at - begin);
        r->ids[r->n++] = id;
        begin = at + length;
    }
    reference_words(r, s + begin, n - begin);
}

// Tokens of a text whose bytes from `special` on may be control tokens. *rest: the text without those that it has.
PLAIN static void reference_encode(Reference *r, const char *s, size_t n, size_t special, char *rest, size_t *n_rest) {
    size_t begin = 0;
    *n_rest = 0;
    for (size_t at = special, length; at < n; at += length) {
        int id = reference_longest(r->x, PIECE_CONTROL, s + at, n - at, &length);
        if (id < 0) continue;
        reference_plain(r, s + begin, at - begin);
        memcpy(rest + *n_rest, s + begin, at - begin);
        *n_rest += at - begin;
        r->ids[r->n++] = id;
        begin = at + length;
    }
    reference_plain(r, s + begin, n - begin);
    memcpy(rest + *n_rest, s + begin, n - begin);
    *n_rest += n - begin;
}

// ---- The targets ----

// The program's tokens are the reference's, and give the text back if the vocabulary had all of it.
static const char *try_text(const Lexicon *x, const char *s, size_t n, size_t special) {
    static Reference r;
    static char rest[MAX_REFERENCE];
    size_t n_rest, at = 0;
    if (n > MAX_REFERENCE - 1) return NULL;
    if (special > n) special = n;
    r.x = x, r.n = 0, r.n_dropped = 0, r.composed = false, r.wrong = NULL;
    reference_encode(&r, s, n, special, rest, &n_rest);
    Tokens tokens = { 0 };
    Error e = { 0 };
    const Tokenizer *t = x->t;
    const Span spans[] = { { s, special, false }, { s + special, n - special, true } };
    const char *wrong = r.wrong;
    bool whole = r.n_dropped == 0 && !r.composed && !(t->kind == SPM && memmem(s, n, "\xE2\x96\x81", 3));
    if (!encode(t, spans, 2, &tokens, &e)) wrong = e.status == NO_MEMORY ? wrong : "a text was not encoded";
    else if (tokens.n != (size_t)r.n || (r.n && memcmp(tokens.ids, r.ids, tokens.n * sizeof(int))))
        wrong = "other tokens than the reference's";
    else if (tokens.n_dropped != r.n_dropped) wrong = "another number of bytes without a token";
    for (size_t i = 0; i < tokens.n && !wrong; i++) {
        size_t n_bytes;
        const char *bytes = decode(t, i ? tokens.ids[i - 1] : -1, tokens.ids[i], &n_bytes);
        whole = whole && tokens.ids[i] != t->unk && t->type[tokens.ids[i]] != PIECE_UNKNOWN;
        if (whole && (n_bytes > n_rest - at || (n_bytes && memcmp(rest + at, bytes, n_bytes))))
            wrong = "decoding gives another text";
        at += n_bytes;
    }
    if (!wrong && whole && at != n_rest) wrong = "decoding gives a shorter text";
    free(tokens.ids);
    return wrong;
}

static const char *try_vocabulary(const Tokenizer *t, const char *s, size_t n, size_t special) {
    Lexicon x = make_lexicon(t);
    const char *wrong = try_text(&x, s, n, special);
    free(x.by_bytes);
    return wrong;
}

typedef enum { RAN, REFUSED, TOO_MUCH, BROKEN } Outcome;
static size_t n_forward;  // models that went through run_tokens()

// Two tokens, together or one after the other; their logits.       rows (2, V)
static Outcome run_two(const Model *m, bool exact, int batch, const Kernels *with, float *rows) {
    enum { MAX_WORK = 1 << 15, MAX_DEPTH = 4, CONTEXT = 8 };
    const int ids[2] = { 0, m->config.n_tokens - 1 };
    size_t n_tokens = (size_t)m->config.n_tokens;
    Runner s = { .w = { .n = 0 } };
    Settings settings = { 1, m->config.context < CONTEXT ? m->config.context : CONTEXT, batch, exact, exact };
    Error e = { 0 };
    bool small = m->config.n_layers <= MAX_DEPTH && settings.context >= 2;
    Outcome outcome = small && make_runner(m, settings, &s, &e) && s.w.work <= MAX_WORK ? RAN : TOO_MUCH;
    kernels = with;
    for (int done = 0; outcome == RAN && done < 2; done += batch) {
        if (!run_tokens(m, &s, ids + done, batch, batch, &e)) outcome = e.status == BAD_FILE ? REFUSED : BROKEN;
        for (int t = 0; outcome == RAN && t < batch; t++)
            memcpy(rows + (size_t)(done + t) * n_tokens, s.w.logits + (size_t)t * s.w.logits_stride, n_tokens * 4);
    }
    free_runner(&s);
    return outcome;
}

// Two tokens at once by the scalar kernels, and one after the other by the best that are set.
static const char *try_forward(const Model *m, bool exact) {
    size_t n = 2 * (size_t)m->config.n_tokens;
    const Kernels *best = kernels;
    float *rows = malloc(2 * n * sizeof *rows);
    if (!rows) abort();
    Outcome together = run_two(m, exact, 2, &scalar, rows);
    Outcome apart = together == TOO_MUCH ? TOO_MUCH : run_two(m, exact, 1, best, rows + n);
    const char *wrong = NULL;
    kernels = best;
    n_forward += together != TOO_MUCH;
    if (together == BROKEN || apart == BROKEN) wrong = "forward failed without a refusal";
    else if (together != apart) wrong = "finite in one way, not in the other";
    else if (together == RAN && memcmp(rows, rows + n, n * sizeof *rows)) wrong = "the logits differ";
    free(rows);
    return wrong;
}

static bool is_clean(bool ok, const Error *e) {
    return ok || e->status == NO_MEMORY || (e->status == BAD_FILE && e->text[0]);
}

// A file from an exact copy on the heap: opened as a checkpoint and run, or opened as a checkpoint and as a tokenizer.
static const char *try_file(const unsigned char *bytes, size_t n, bool runs) {
    static const char sample[] = "a ab  aab\nb'll 12 \xC3\xA4\xE4\xBD\xA0\xFF<s></s>";
    void *copy = NULL;
    if (posix_memalign(&copy, 64, n ? n : 1)) return NULL;
    if (n) memcpy(copy, bytes, n);
    Model m = { 0 };
    Error e = { 0 };
    const char *wrong = NULL;
    bool ok = open_model(copy, n, 1, &m, &e);
    if (!is_clean(ok, &e)) wrong = "it was neither opened nor refused";
    if (ok && runs && m.tokenizer.n_tokens) wrong = try_vocabulary(&m.tokenizer, sample, sizeof sample - 1, 20);
    if (ok && runs && !wrong) wrong = try_forward(&m, n % 2);
    close_model(&m);
    if (!wrong && !runs && (recognise(copy, n) == LLAMA2C || n % 4 == 0)) {  // of the others it is the same code
        e = (Error){ 0 };
        ok = open_vocabulary(copy, n, -1, &m, &e);
        if (!is_clean(ok, &e)) wrong = "as a tokenizer it was neither opened nor refused";
        close_model(&m);
    }
    free(copy);
    return wrong;
}

// A template, or 0 and JSON.
static const char *try_template(const unsigned char *bytes, size_t n) {
    static const char conversation[] =
        "{\"messages\": [{\"role\": \"user\", \"content\": \"Hi \u00e9<|x|>\"}, "
        "{\"role\": \"x\", \"content\": [1, 2.5]}], "
        "\"n\": 3, \"d\": {\"a\": null, \"b\": [true, \"\"]}, \"s\": \" a b,c\\n\", \"add_generation_prompt\": true}";
    static const struct tm now = { .tm_year = 124, .tm_mday = 26 };
    Pool pool = { 0 };
    Error e = { 0 };
    Value given;
    Rendered out = { .text = { 0 } };
    bool is_json = n > 0 && bytes[0] == 0;
    char *text = malloc(n ? n : 1);
    if (!text) abort();
    if (n) memcpy(text, bytes + is_json, n - is_json);
    bool ok = is_json ? parse_json(text, n - 1, &pool, &given, &e)
                      : parse_json(conversation, sizeof conversation - 1, &pool, &given, &e) &&
                        render_template((Text){ text, n }, &given, &now, 1 << 18, &out, &e);
    const char *wrong = !ok && !e.text[0] ? "neither a result nor one line" : NULL;
    if (out.text.n != out.marks.n) wrong = "bytes without an origin";
    for (size_t i = 0; i < out.marks.n; i++) if (out.marks.bytes[i] > 1) wrong = "an origin that is none";
    free(text);
    free(out.text.bytes);
    free(out.marks.bytes);
    free_pool(&pool);
    return wrong;
}

// | which vocabulary | where special tokens may begin | text |, or a vocabulary of the input's own:
// | 255 | where special tokens may begin | 16 bits: bytes of the text | text | section |
static const char *try_text_input(const unsigned char *bytes, size_t n) {
    static const struct { const char *path, *pre; } files[] = {
        { "spm.gguf", NULL }, { "spm-bare.gguf", NULL }, { "../tokenizer.bin", NULL }, { "bpe.gguf", "gpt-2" },
        { "bpe.gguf", "smollm" }, { "bpe.gguf", "llama-bpe" }, { "bpe.gguf", "dbrx" }, { "bpe.gguf", "qwen2" },
        { "bpe.gguf", "deepseek-llm" }, { "bpe.gguf", "default" }, { "bpe.gguf", "qwen2" },
    };
    enum { N_FILES = sizeof files / sizeof *files };  // the last one does not compose
    static Model models[N_FILES];
    static Lexicon lexicons[N_FILES];
    if (n < 2) return NULL;
    size_t special = bytes[1], which = bytes[0] % N_FILES;
    if (bytes[0] == 255) {
        size_t n_text = n < 4 ? 0 : (size_t)bytes[2] | (size_t)bytes[3] << 8, n_section = n < 4 ? 0 : n - 4;
        if (n_text > n_section) n_text = n_section;
        n_section -= n_text;
        unsigned char *section = malloc(n_section ? n_section : 1);
        if (!section) abort();
        if (n_section) memcpy(section, bytes + 4 + n_text, n_section);
        Tokenizer t = { 0 };
        Error e = { 0 };
        const char *wrong = NULL;
        bool ok = open_tokenizer(section, n_section, &t, &e);
        if (ok) wrong = try_vocabulary(&t, (const char *)bytes + 4, n_text, special);
        else if (!is_clean(ok, &e)) wrong = "the section was neither opened nor refused";
        close_tokenizer(&t);
        free(section);
        return wrong;
    }
    if (!lexicons[which].t) {
        char path[64];
        Error e = { 0 };
        snprintf(path, sizeof path, "tests/golden/tokens/%s", files[which].path);
        options.pre = files[which].pre;
        Buffer file = { 0 };
        if (!read_all(path, MAX_TEXT, &file, &e) || !open_vocabulary(file.bytes, file.n, -1, &models[which], &e)) {
            printf("%s: %s\n", path, e.text);
            exit(1);
        }
        options.pre = NULL;
        if (which == N_FILES - 1) models[which].tokenizer.flags &= ~(unsigned)COMPOSE;
        free(file.bytes);
        lexicons[which] = make_lexicon(&models[which].tokenizer);
    }
    return try_text(&lexicons[which], (const char *)bytes + 2, n - 2, special);
}

// A session for tests/golden/llama_mqa.gguf: a text that may begin with its tokens, 0, 7, 14, ..., goes on after them.
static const char *try_session(const unsigned char *bytes, size_t n) {
    enum { N = 100 };
    static Model m;
    static Runner r;
    Error e = { 0 };
    int ids[N], n_spare = r.cache.n_spare;
    if (!m.layers) {
        Buffer file = { 0 };
        Settings settings = { .threads = 1, .context = 128, .batch = 1 };
        void *copy = NULL;
        bool ok = read_all("tests/golden/llama_mqa.gguf", MAX_TEXT, &file, &e) && !posix_memalign(&copy, 64, file.n);
        if (ok) memcpy(copy, file.bytes, file.n);
        free(file.bytes);
        if (!ok || !open_model(copy, file.n, 1, &m, &e) || !make_runner(&m, settings, &r, &e)) {
            printf("tests/golden/llama_mqa.gguf: %s\n", e.text);
            exit(1);
        }
        n_spare = r.cache.n_spare;
    }
    for (int i = 0; i < N; i++) ids[i] = i * 7 % m.config.n_tokens;
    FILE *f = n ? fmemopen((void *)bytes, n, "rb") : NULL;
    if (!f) return NULL;
    Tokens tokens = { .ids = ids, .n = N };
    bool ok = read_session(&m, &r.w, &r.text, f, &tokens, &e);
    const char *wrong = !is_clean(ok, &e) ? "it was neither taken nor refused" : NULL;
    fclose(f);
    int kept = r.text.n;
    if (!ok && (kept || r.cache.n_spare != n_spare)) wrong = "something is left of a session that was refused";
    if (kept >= N || memcmp(r.text.ids, ids, (size_t)kept * sizeof *ids)) wrong = "other tokens than the text's";
    ok = ok && run_tokens(&m, &r, ids + kept, 1, 1, &e);
    if (!is_clean(ok, &e)) wrong = "the text does not go on, and it was not refused";
    rewind_sequence(&r.text, 0);
    return wrong;
}

// | what is done with them | lines |: they are continued, scored, compared with choices, or tasks of -m eval.
static const char *try_lines(const unsigned char *bytes, size_t n) {
    static Model m;
    static Engine g;
    static Sampler sampler = { .temperature = 1, .top_p = 0.9f };
    Error e = { 0 };
    if (!g.texts) {
        Buffer file = { 0 };
        void *copy = NULL;
        options.threads = (List){ 1, { 1 } };
        options.quiet = options.json = true;
        options.n_predict = 2, options.samples = 1;
        options.template_name = "chatml";
        options.prompts = options.file = "-";
        bool ok = read_all("tests/golden/llama_mqa.gguf", MAX_TEXT, &file, &e) && !posix_memalign(&copy, 64, file.n);
        if (ok) memcpy(copy, file.bytes, file.n);
        free(file.bytes);
        if (!ok || !open_model(copy, file.n, 1, &m, &e) || !set_up_engine(&m, GENERATE, &g, &e) ||
            !make_sampler(&sampler, m.config.n_tokens, 1, &e) ||
            !make_shaper(&sampler, &m.tokenizer, m.config.n_tokens, &e)) {
            printf("tests/golden/llama_mqa.gguf: %s\n", e.text);
            exit(1);
        }
    }
    if (n < 2) return NULL;
    ScriptKind kind = bytes[0] % 4;
    options.choose = kind == COMPARED ? "a|b" : NULL;
    options.shots = kind == EVALUATED ? bytes[0] / 4 % 4 : 0;
    char *out = NULL;
    size_t n_out, n_lines = bytes[n - 1] != '\n', n_objects = 0;
    for (size_t i = 1; i < n; i++) n_lines += bytes[i] == '\n';
    FILE *usual_out = stdout, *usual_in = stdin;
    stdin = fmemopen((void *)(bytes + 1), n - 1, "rb");
    stdout = open_memstream(&out, &n_out);
    if (!stdin || !stdout) abort();
    bool ok = run_script(&m, &g.workspace, g.texts, g.n_texts, &sampler, kind, NULL, (Text){ "", 0 }, &e);
    fclose(stdin), fclose(stdout);
    stdin = usual_in, stdout = usual_out;
    const char *wrong = !ok && !e.text[0] ? "neither done nor refused" : NULL;
    for (char *line = out, *end; !wrong && (end = strchr(line, '\n')); line = end + 1, n_objects++) {
        Pool pool = { 0 };
        Value v;
        if (!parse_json(line, (size_t)(end - line), &pool, &v, &e) || v.kind != IS_DICT) wrong = "a line is no object";
        free_pool(&pool);
    }
    if (!wrong && kind != EVALUATED && n_objects != n_lines) wrong = "not an object for each line";
    free(out);
    for (int i = 0; i < g.n_texts; i++) rewind_sequence(&g.texts[i], 0);
    return wrong;
}

#ifdef FUZZ
enum { FILES = 1, STRINGS, MODELS, SESSIONS, TEMPLATES, LINES };

#ifndef FUZZ_WITHOUT_MUTATOR  // AFL++ has its own

// ---- Mutations that keep a file plausible ----

size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t max_size);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed);

static uint64_t mutation_state;

static uint64_t random_bits(void) {
    uint64_t z = mutation_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static size_t below(size_t n) { return (size_t)(random_bits() % n); }
static bool one_in(size_t n) { return below(n) == 0; }

// What a file consists of: numbers that can be set, and keys and tensors that can be lost, doubled or change places.
typedef struct { size_t at, n; } Place;
typedef struct {
    Place numbers[1024], keys[128], tensors[128], texts[512];
    int n_numbers, n_keys, n_tensors, n_texts;
    size_t tables_end;  // where keys and tensors end
} Layout;

static void note_part(Place *parts, int *n, int max, size_t at, size_t n_bytes) {
    if (*n < max) parts[(*n)++] = (Place){ at, n_bytes };
}

static void note_number(Layout *l, size_t at, size_t n) { note_part(l->numbers, &l->n_numbers, 1024, at, n); }

static void note_text(Layout *l, size_t at, size_t n) { note_part(l->texts, &l->n_texts, 512, at, n); }

static void lay_out_key(Layout *l, const unsigned char *bytes, const Cursor *before, const Cursor *after,
                        const Key *k) {
    size_t at = (size_t)(before->at - bytes), value = (size_t)(k->value.at - bytes);
    size_t n_name = (size_t)take_u64(&(Cursor){ before->at, 8, false }), type = at + 8 + n_name;
    note_part(l->keys, &l->n_keys, 128, at, (size_t)(after->at - before->at));
    note_number(l, at, 8);
    note_text(l, at, n_name);
    note_number(l, type, 4);
    if (k->is_array) note_number(l, type + 4, 4);
    if (k->is_array) note_number(l, type + 8, 8);
    Cursor c = k->value;
    for (size_t i = 0; i < k->count && i < 16; i++) {
        size_t item = (size_t)(c.at - bytes), n = gguf_types[k->type].n_bytes;
        if (k->type == G_STRING) note_number(l, item, 8);
        if (k->type == G_STRING) note_text(l, item, take_string(&c).n);
        else note_number(l, value + i * n, n);
    }
}

static bool lay_out_gguf(Layout *l, const unsigned char *bytes, size_t n) {
    Cursor c = { bytes, n, false };
    Error e;
    take(&c, 8);
    uint64_t n_tensors = take_u64(&c), n_keys = take_u64(&c);
    for (size_t at = 4; at < 24; at += at == 4 ? 4 : 8) note_number(l, at, at == 4 ? 4 : 8);
    for (uint64_t i = 0; i < n_keys && !c.bad; i++) {
        Cursor before = c;
        Key k = { .count = 0 };
        if (!read_key(&c, &k, &e)) return false;
        lay_out_key(l, bytes, &before, &c, &k);
    }
    for (uint64_t i = 0; i < n_tensors && !c.bad; i++) {
        size_t at = (size_t)(c.at - bytes);
        size_t n_name = take_string(&c).n;
        uint32_t n_dims = take_u32(&c);
        if (n_dims > 4 || c.bad) return false;
        take(&c, 8 * n_dims + 12);
        note_part(l->tensors, &l->n_tensors, 128, at, 24 + n_name + 8 * n_dims);
        note_text(l, at, n_name);
        note_number(l, at + 8 + n_name, 4);
        for (size_t d = 0; d < n_dims; d++) note_number(l, at + 12 + n_name + 8 * d, 8);
        note_number(l, at + 12 + n_name + 8 * n_dims, 4);
        note_number(l, at + 16 + n_name + 8 * n_dims, 8);
    }
    l->tables_end = (size_t)(c.at - bytes);
    return !c.bad;
}

static bool lay_out_native(Layout *l, const unsigned char *bytes, size_t n) {
    FileHeader h;
    if (n < sizeof h) return false;
    memcpy(&h, bytes, sizeof h);
    for (size_t at = 8; at < sizeof h; at += at == 8 || at == 12 ? 4 : 8) note_number(l, at, at < 16 ? 4 : 8);
    for (int i = 0; i < N_SECTIONS; i++)
        if (h.sections[i].at > n || h.sections[i].n_bytes > n - h.sections[i].at) return false;
    for (size_t at = h.config.at; at + 40 <= h.config.at + h.config.n_bytes && l->n_keys < 128;) {
        uint32_t count;
        memcpy(&count, bytes + at + 28, 4);
        if (count > (h.config.at + h.config.n_bytes - at - 32) / 8) break;
        note_part(l->keys, &l->n_keys, 128, at, 32 + 8 * count);
        note_number(l, at + 28, 4);
        for (size_t i = 0; i < count && i < 16; i++) note_number(l, at + 32 + 8 * i, 8);
        at += 32 + 8 * count;
    }
    for (size_t at = h.tensors.at; at + 96 <= h.tensors.at + h.tensors.n_bytes; at += 96) {
        note_part(l->tensors, &l->n_tensors, 128, at, 96);
        for (size_t k = 64; k < 96; k += k < 80 ? 4 : 8) note_number(l, at + k, k < 80 ? 4 : 8);
    }
    for (size_t k = 0; k + 4 <= h.tokenizer.n_bytes && k < 400; k += 4) note_number(l, h.tokenizer.at + k, 4);
    return true;
}

static bool lay_out(Layout *l, const unsigned char *bytes, size_t n) {
    *l = (Layout){ .tables_end = 0 };
    Container container = recognise(bytes, n);
    if (container == GGUF) return lay_out_gguf(l, bytes, n);
    if (container == NATIVE) return lay_out_native(l, bytes, n);
    size_t header = n > 4 && !memcmp(bytes, "24ka", 4) ? 44 : 28;
    for (size_t at = 0; at + 4 <= n && at < header; at += 4) note_number(l, at, 4);
    if (header == 44 && n >= 41) note_number(l, 36, 1), note_number(l, 37, 4);
    for (size_t at = 4, length; at + 8 < n && l->n_numbers < 100; at += 8 + length) {  // of a tokenizer.bin
        note_number(l, at, 4);
        note_number(l, at + 4, 4);
        length = take_u32(&(Cursor){ bytes + at + 4, 4, false });
        if (length > n) break;
    }
    return true;
}

static void set_number(unsigned char *at, size_t n, size_t file_bytes) {
    static const uint64_t edges[] = { 0, 1, 2, 3, 4, 5, 7, 8, 16, 31, 32, 33, 64, 127, 255, 256, 257, 1024, 1025, 65535,
                                      65536, 65537, 1 << 20, (1 << 20) + 1, INT32_MAX, 0x80000000, UINT32_MAX };
    static const double reals[] = { 0, 1, 2, 3, 4, 0.5, 1.5, -1, 1e-20, 1e-5, 1e300, 10000, 1025, NAN, INFINITY };
    uint64_t x;
    memcpy(&x, at, n);
    switch (below(8)) {
    case 0: x += below(2) ? 1 : UINT64_MAX; break;
    case 1: x = edges[below(sizeof edges / sizeof *edges)] << 32; break;
    case 2: x = UINT64_MAX - below(65); break;
    case 3: x = file_bytes - below(65); break;
    case 4: memcpy(&x, &reals[below(sizeof reals / sizeof *reals)], 8); break;
    case 5: memcpy(&x, &(float){ (float)reals[below(sizeof reals / sizeof *reals)] }, 4); break;
    case 6: x ^= 1ull << below(8 * n); break;
    default: x = edges[below(sizeof edges / sizeof *edges)];
    }
    memcpy(at, &x, n);
}

// A file being put together.
typedef struct { unsigned char *bytes; size_t n, max; } Draft;

static void draft(Draft *d, const void *from, size_t n) {
    if (n > d->max - d->n) n = d->max - d->n;
    if (from) memcpy(d->bytes + d->n, from, n);
    else memset(d->bytes + d->n, 0, n);
    d->n += n;
}

static void draft_padding(Draft *d, size_t step) { draft(d, NULL, round_up(d->n, step) - d->n); }

// The keys, or the tensors: one lost, one twice, or two in each other's place.
static int change_list(Place *parts, int n, int max) {
    if (n == 0) return 0;
    int i = (int)below((size_t)n), j = (int)below((size_t)n);
    Place kept = parts[i];
    switch (below(3)) {
    case 0:
        memmove(parts + i, parts + i + 1, (size_t)(n - i - 1) * sizeof *parts);
        return n - 1;
    case 1:
        if (n == max) return n;
        memmove(parts + j + 1, parts + j, (size_t)(n - j) * sizeof *parts);
        parts[j] = kept;
        return n + 1;
    default:
        parts[i] = parts[j];
        parts[j] = kept;
        return n;
    }
}

// A key that the program knows, with a number or a text.
static void draft_new_key(Draft *d, const char *family) {
    static const char *const others[] = {
        ".rope.scaling.factor", ".rope.scaling.type", ".rope.scale_linear", ".attention.sliding_window_pattern",
        ".vocab_size", ".attention.value_length", ".expert_count", ".attention.causal", "general.alignment",
        "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
        "tokenizer.ggml.unknown_token_id", "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token",
        "tokenizer.ggml.add_space_prefix", "tokenizer.chat_template", "split.count", "general.architecture",
    };
    static const char *const texts[] = { "none", "linear", "llama", "gpt2", "qwen2", "gemma2", "olmo2", "yarn" };
    size_t i = below(N_CONFIG_FIELDS + sizeof others / sizeof *others);
    const char *name = i < N_CONFIG_FIELDS ? config_fields[i].key : others[i - N_CONFIG_FIELDS];
    char full[128];
    snprintf(full, sizeof full, "%s%s", name && name[0] == '.' ? family : "", name ? name : "general.name");
    uint64_t n = strlen(full), x = below(3) ? below(9) : random_bits();
    uint32_t type = (uint32_t)below(N_G);
    draft(d, &n, 8);
    draft(d, full, n);
    draft(d, &type, 4);
    const char *text = texts[below(sizeof texts / sizeof *texts)];
    float f = (float)x;
    double g = (double)x;
    n = strlen(text);
    if (type == G_STRING) draft(d, &n, 8), draft(d, text, n);
    else if (type == G_ARRAY) draft(d, &(uint32_t){ G_U32 }, 4), draft(d, &(uint64_t){ 2 }, 8), draft(d, &x, 8);
    else draft(d, type == G_F32 ? (void *)&f : type == G_F64 ? (void *)&g : (void *)&x, gguf_types[type].n_bytes);
}

// Gives every tensor of a GGUF a place of its own behind the others, and zeros where there is nothing yet.
static void place_again(Draft *d) {
    static Layout l;
    if (!lay_out(&l, d->bytes, d->n) || recognise(d->bytes, d->n) != GGUF) return;
    size_t begin = round_up(l.tables_end, 32), end = 0;
    for (int i = 0; i < l.n_tensors; i++) {
        Cursor c = { d->bytes + l.tensors[i].at, l.tensors[i].n, false };
        Source source = { .n_bytes = 0 };
        Error e;
        uint64_t place = end;
        if (read_gguf_tensor(&c, &source, &e)) end = round_up(plus(end, source.n_bytes), 32);
        memcpy(d->bytes + l.tensors[i].at + l.tensors[i].n - 8, &place, 8);
    }
    if (end < d->max && begin + end < d->max && begin + end > d->n) draft(d, NULL, begin + end - d->n);
}

static void rebuild_gguf(Draft *d, const unsigned char *bytes, size_t n, Layout *l) {
    if (one_in(2)) l->n_keys = change_list(l->keys, l->n_keys, 128);
    else l->n_tensors = change_list(l->tensors, l->n_tensors, 128);
    const Family *family = &families[below(sizeof families / sizeof *families)];
    bool adds = one_in(3);
    uint64_t counts[2] = { (uint64_t)l->n_tensors, (uint64_t)l->n_keys + adds };
    draft(d, bytes, 8);
    draft(d, counts, sizeof counts);
    for (int i = 0; i < l->n_keys; i++) draft(d, bytes + l->keys[i].at, l->keys[i].n);
    if (adds) draft_new_key(d, one_in(4) ? family->name : "llama");
    for (int i = 0; i < l->n_tensors; i++) draft(d, bytes + l->tensors[i].at, l->tensors[i].n);
    draft_padding(d, 32);
    size_t data = round_up(l->tables_end, 32);
    if (data < n) draft(d, bytes + data, n - data);
    if (!one_in(4)) place_again(d);
}

static void rebuild_native(Draft *d, const unsigned char *bytes, Layout *l) {
    FileHeader h;
    memcpy(&h, bytes, sizeof h);
    Section old[N_SECTIONS];
    memcpy(old, h.sections, sizeof old);
    if (one_in(3)) l->n_keys = change_list(l->keys, l->n_keys, 128);
    else l->n_tensors = change_list(l->tensors, l->n_tensors, 128);
    h.n_tensors = (uint32_t)l->n_tensors;
    draft(d, &h, sizeof h);
    for (int i = 0; i < N_SECTIONS; i++) {
        size_t begin = d->n;
        for (int k = 0; i == CONFIG && k < l->n_keys; k++) draft(d, bytes + l->keys[k].at, l->keys[k].n);
        for (int k = 0; i == TENSORS && k < l->n_tensors; k++) draft(d, bytes + l->tensors[k].at, l->tensors[k].n);
        if (i > TENSORS) draft(d, bytes + old[i].at, old[i].n_bytes);
        h.sections[i] = (Section){ begin, d->n - begin };
        draft_padding(d, 64);
    }
    h.file_bytes = d->n;
    memcpy(d->bytes, &h, sizeof h);
    for (size_t at = h.tensors.at; at + 96 <= h.tensors.at + h.tensors.n_bytes; at += 96) {
        uint64_t place;
        memcpy(&place, d->bytes + at + 80, 8);
        place += h.weights.at - old[WEIGHTS].at;
        memcpy(d->bytes + at + 80, &place, 8);
    }
}

// Changes a text of a GGUF (a name, a piece of the vocabulary), and its length with it.
static void change_text(Draft *d, const unsigned char *bytes, size_t n, const Layout *l) {
    Place p = l->texts[below((size_t)l->n_texts)];
    uint8_t text[256];
    size_t length = p.n < 128 ? p.n : 128;
    memcpy(text, bytes + p.at + 8, length);
    if (one_in(2)) length = LLVMFuzzerMutate(text, length, sizeof text);
    else length = (size_t)snprintf((char *)text, sizeof text, layer_rules[below(N_LAYER_RULES)].name, 0,
                                   one_in(2) ? "_exps" : "");
    uint64_t n_text = length;
    draft(d, bytes, p.at);
    draft(d, &n_text, 8);
    draft(d, text, length);
    size_t rest = p.at + 8 + p.n;
    draft(d, bytes + rest, l->tables_end - rest);
    draft_padding(d, 32);
    size_t data = round_up(l->tables_end, 32);
    if (data < n) draft(d, bytes + data, n - data);
}

// A llama2.c checkpoint as long as its header says, where that is not long.
static void fit_llama2c(Draft *d) {
    Model m = { 0 };
    Error e = { 0 };
    Cursor c = { d->bytes, d->max, false };
    if (d->n < 28 || recognise(d->bytes, d->n) != LLAMA2C) return;
    memset(d->bytes + d->n, 0, d->max - d->n);
    if (!parse_llama2c(c, &m, true, &e)) {  // "N bytes are left": what is too much
        size_t left = strtoull(e.text, NULL, 10);
        if (strstr(e.text, "bytes are left") && left < d->max) d->n = d->max - left;
    }
    close_model(&m);
}

static size_t change_file(uint8_t *data, size_t size, size_t max_size) {
    static Layout l;
    static unsigned char bytes[1 << 16];
    Draft d = { bytes, 0, max_size < sizeof bytes ? max_size : sizeof bytes };
    if (one_in(8) || size > d.max || !lay_out(&l, data, size) || l.n_numbers == 0)
        return LLVMFuzzerMutate(data, size, max_size);
    Container container = recognise(data, size);
    bool has_lists = l.n_keys + l.n_tensors > 0;
    if (has_lists && one_in(3)) {
        if (container == GGUF) rebuild_gguf(&d, data, size, &l);
        else rebuild_native(&d, data, &l);
    } else if (container == GGUF && l.n_texts && one_in(4)) {
        change_text(&d, data, size, &l);
    } else {
        draft(&d, data, size);
        for (size_t i = 1 + below(3); i > 0; i--) {
            Place p = l.numbers[below((size_t)l.n_numbers)];
            if (p.at + p.n <= d.n) set_number(d.bytes + p.at, p.n, size);
        }
        if (container == GGUF && one_in(2)) place_again(&d);
        if (container == LLAMA2C && one_in(2)) fit_llama2c(&d);
    }
    memcpy(data, bytes, d.n);
    return d.n;
}

// Another model that can be expected to open: bytes change in the vocabulary's texts, or behind the tables, where the
// weights are.
static size_t change_model(uint8_t *data, size_t size, size_t max_size) {
    static Layout l;
    if (one_in(4) || !lay_out(&l, data, size)) return change_file(data, size, max_size);
    size_t begin = l.tables_end, native = offsetof(FileHeader, weights);
    if (recognise(data, size) == NATIVE) memcpy(&begin, data + native, sizeof begin);
    else if (!begin) begin = 28;  // llama2.c's
    for (size_t i = 1 + below(4); i > 0 && begin < size; i--) {
        size_t at = begin + below(size - begin);
        if (l.n_texts && one_in(4)) {
            Place p = l.texts[below((size_t)l.n_texts)];
            at = p.at + 8 + below(p.n + 1);
        }
        if (at < size) data[at] = one_in(2) ? (uint8_t)random_bits() : data[at] ^ (uint8_t)(1 << below(8));
    }
    return size;
}

static size_t change_text_input(uint8_t *data, size_t size, size_t max_size) {
    static const char *const words[] = { " ", "  ", "\n", "'ll", "\xE2\x96\x81", "<s>", "</s>", "<|im_start|>",
                                         "<tool>", "\xC3\xA4", "\xE4\xBD\xA0", "\xC5\xBF", "\xF0\x9F\x91\xA9", "123",
                                         "the", "\xFF" };
    if (size > 44 && data[0] == 255 && one_in(2)) {
        size_t at = 4 + take_u32(&(Cursor){ data, 4, false }) / 65536, words_there = (size - 4) / 4;
        if (one_in(2)) words_there = 10;
        at += 4 * below(words_there);
        if (at + 4 <= size) set_number(data + at, 4, size);
        return size;
    }
    const char *word = words[below(sizeof words / sizeof *words)];
    size_t n = strlen(word), at = 2 + below(size > 2 ? size - 1 : 1);
    if (size < 2 || one_in(2) || size + n > max_size) return LLVMFuzzerMutate(data, size, max_size);
    memmove(data + at + n, data + at, size - at);
    memcpy(data + at, word, n);
    return size + n;
}

// A session of one page becomes one of two, which no file of 64 positions has.
static size_t double_session(uint8_t *data, size_t size, size_t max_size) {
    static uint8_t made[1 << 16];
    SessionHeader h;
    memcpy(&h, data, sizeof h);
    size_t before = sizeof h + (size_t)h.n * 4, n = PAGE + 1 + below(PAGE), at = sizeof h + n * 4;
    if (h.n == 0 || h.n > PAGE || size <= before) return size;
    size_t n_page = size - before;
    if (at + 2 * n_page > max_size || at + 2 * n_page > sizeof made) return size;
    h.n = n;
    memcpy(made, &h, sizeof h);
    for (size_t i = 0; i < n; i++) memcpy(made + sizeof h + 4 * i, &(int32_t){ (int32_t)(i * 7 % 135) }, 4);
    memcpy(made + at, data + before, n_page);
    memcpy(made + at + n_page, data + before, n_page);
    memcpy(data, made, at + 2 * n_page);
    return at + 2 * n_page;
}

// Mostly with the right hash and checksums, which else would be all that is ever looked at.
static size_t change_session(uint8_t *data, size_t size, size_t max_size) {
    SessionHeader h;
    if (size >= sizeof h && one_in(2)) set_number(data + 8 * below(sizeof h / 8), 8, size);
    else size = LLVMFuzzerMutate(data, size, max_size);
    if (size < sizeof h || one_in(8)) return size;
    if (one_in(4)) size = double_session(data, size, max_size);
    static uint64_t model, settings;  // those of the seeds
    memcpy(&h, data, sizeof h);
    if (!model) model = h.model, settings = h.settings;
    h.model = model, h.settings = settings;
    if (!one_in(4)) h.n %= 130;
    size_t pages = h.n < 1000 ? n_pages((int)h.n) : 0, at = sizeof h + (size_t)(h.n % 1000) * 4;
    for (size_t i = 0; i < pages && at < size; i++) {
        size_t n = (size - at) / (pages - i);
        uint64_t sum = n > 8 ? add_sum(0, data + at, n - 8) : 0;
        if (n > 8 && !one_in(8)) memcpy(data + at + n - 8, &sum, 8);
        at += n;
    }
    static int ids[1000];
    if (h.n < 1000 && h.n * 4 <= size - sizeof h) {
        memcpy(ids, data + sizeof h, h.n * 4);
        h.head_sum = sum_head(&h, ids);
    }
    memcpy(data, &h, sizeof h);
    return size;
}

size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t max_size, unsigned seed) {
    mutation_state = seed;
    if (FUZZ == SESSIONS) return change_session(data, size, max_size);
    if (FUZZ == STRINGS) return change_text_input(data, size, max_size);
    if (FUZZ >= TEMPLATES) return LLVMFuzzerMutate(data, size, max_size);
    return (FUZZ == MODELS ? change_model : change_file)(data, size, max_size);
}
#endif

// ---- What libFuzzer calls ----

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void tell_forward(void) { fprintf(stderr, "stat::models_that_ran:           %zu\n", n_forward); }

int LLVMFuzzerInitialize(int *argc, char ***argv) {
    Error e;
    (void)argc, (void)argv;
    options.quiet = true;
    if (FUZZ == MODELS) atexit(tell_forward);
    return (FUZZ == MODELS || FUZZ == LINES) && !choose_kernels(NULL, &e);
}

#ifndef FUZZ_WITHOUT_MUTATOR
// The counters of clang's -fsanitize=fuzzer. An input with all at 0 is not kept: of models, each that is to be changed
// further has to open, else nearly all of their children would not. The linker puts __wrap_f in the place of f.
void __real___sanitizer_cov_8bit_counters_init(uint8_t *begin, uint8_t *end);
void __wrap___sanitizer_cov_8bit_counters_init(uint8_t *begin, uint8_t *end);
static uint8_t *counters, *counters_end;

void __wrap___sanitizer_cov_8bit_counters_init(uint8_t *begin, uint8_t *end) {
    counters = begin, counters_end = end;
    __real___sanitizer_cov_8bit_counters_init(begin, end);
}

static void forget_coverage(void) { memset(counters, 0, (size_t)(counters_end - counters)); }
#else
static void forget_coverage(void) {}
#endif

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    size_t before = n_forward;
    n_allocated = 0;
    const char *wrong = FUZZ == LINES ? try_lines(data, size) : FUZZ == TEMPLATES ? try_template(data, size)
                      : FUZZ == STRINGS ? try_text_input(data, size)
                      : FUZZ == SESSIONS ? try_session(data, size) : try_file(data, size, FUZZ == MODELS);
    if (!wrong && n_allocated > (4u << 20) + 64 * size) wrong = "more memory than the file's size justifies";
    if (wrong) fprintf(stderr, "\n%s\n", wrong), abort();
    if (FUZZ == MODELS && n_forward == before) forget_coverage();
    return 0;
}
#endif
