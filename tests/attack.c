/* Damage everywhere: what run.c makes of files that are cut, or changed, at every place of their headers.

   make attack        (tests/attack.py starts build/attack, and reads what it prints)

   Alone this is a program of its own, compiled with the sanitizers that the compiler has, and runs on the
   scalar kernels; as a part of test.c it is the quick part, the group "damaged everywhere". Each case
   is a copy of the file in a heap block of exactly its size. A file that opens has its vocabulary used in both
   directions and sends two tokens through the model. Whatever the bytes, it must end so, or be refused in one text
   with the status of a bad file, in two seconds and with no more memory than the file's size and 64 MiB. */

#ifndef CRIA_NO_MAIN
#define ATTACK_PROGRAM
#define CRIA_NO_MAIN
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>

static size_t n_requested;  // bytes that the case has asked for

static void *counting_calloc(size_t n, size_t size) { return n_requested += n * size, calloc(n, size); }
static void *counting_realloc(void *p, size_t n) { return n_requested += n, realloc(p, n); }
static void *counting_mmap(void *p, size_t n, int protection, int flags, int file, off_t offset) {
    if (!(flags & MAP_NORESERVE)) n_requested += n;  // of a state only what is used takes memory
    return mmap(p, n, protection, flags, file, offset);
}

#pragma GCC diagnostic ignored "-Wunused-function"
#define calloc counting_calloc
#define realloc counting_realloc
#define mmap counting_mmap
#include "../run.c"
#include "runner.h"
#undef calloc
#undef realloc
#undef mmap
#endif

// ---- One case ----

typedef struct {
    const char *name;
    unsigned char *bytes;  // (n) in a block of exactly their number
    size_t n, header;      // header: where the weights begin
    size_t *edges;         // (n_edges)  where tensors begin and end
    size_t n_edges;
    bool is_vocabulary;
} Victim;

typedef struct {
    size_t n_cases, n_opened, n_refused, n_wrong;
    char first[800];  // of what was wrong
} Count;

static char case_now[160];  // which one it is, for whoever reads a crash

// Both directions, whatever the vocabulary says.
static bool use_vocabulary(const Tokenizer *t, Error *e) {
    static const char text[] = "Once upon </s> \xC3\xA4\xE2\x96\x81\xF0\x9F\x98\x80 12345 don't\n\n\0 \xFF<0x0A>";
    Span spans[] = { { text, sizeof text - 1, false }, { "<s>", 3, true }, { text, 11, true } };
    Tokens tokens = { 0 };
    bool ok = encode(t, spans, 3, &tokens, e);
    size_t n, n_all = 0;
    for (size_t i = 0; i < tokens.n; i++) {
        const char *bytes = decode(t, i ? tokens.ids[i - 1] : -1, tokens.ids[i], &n);
        for (size_t k = 0; k < n; k++) n_all += bytes[k] != 0;  // reads them
    }
    for (int id = -1; id <= t->n_tokens; id++) {
        const char *bytes = decode(t, 0, id, &n);
        for (size_t k = 0; k < n; k++) n_all += bytes[k] != 0;
    }
    free(tokens.ids);
    return ok && n_all < SIZE_MAX;
}

static bool send_two_tokens(const Model *m, Error *e) {
    Runner s;
    Settings settings = { 1, m->config.context < 16 ? m->config.context : 16, 2, false, false };
    int tokens[] = { 0, m->config.n_tokens - 1 };
    Sampler sampler = { .temperature = 1, .top_p = 0.9f };
    bool ok = make_runner(m, settings, &s, e) && make_sampler(&sampler, m->config.n_tokens, 1, e);
    ok = ok && run_tokens(m, &s, tokens, 1, 1, e);
    if (ok) tokens[0] = choose_token(&sampler, NULL, 0, s.w.logits, m->config.n_tokens);
    if (ok && settings.context > 1) ok = run_tokens(m, &s, tokens + 1, 1, 1, e);
    free(sampler.candidates);
    free_runner(&s);
    return ok;
}

static void try_case(Count *c, const Victim *v, size_t n_bytes) {
    Model m = { 0 };
    Error e = { 0 }, run = { 0 };
    const char *wrong = NULL;
#ifdef ATTACK_PROGRAM
    struct itimerval limit = { .it_value = { .tv_sec = 2 } };
    setitimer(ITIMER_VIRTUAL, &limit, NULL);
    n_requested = 0;
#endif
    c->n_cases++;
    bool ok = v->is_vocabulary ? open_vocabulary(v->bytes, n_bytes, -1, &m, &e)
                               : open_model(v->bytes, n_bytes, 1, &m, &e);
    if (ok) {
        c->n_opened++;
        ok = !m.tokenizer.n_tokens || use_vocabulary(&m.tokenizer, &run);
        ok = ok && (v->is_vocabulary || send_two_tokens(&m, &run));
        if (!ok && run.status != BAD_FILE) wrong = run.text;  // numbers that are not finite are a bad file
    } else {
        c->n_refused++;
        if (e.status != BAD_FILE || !e.text[0]) wrong = e.text;
    }
    close_model(&m);
#ifdef ATTACK_PROGRAM
    if (n_requested > n_bytes + (64 << 20)) wrong = "too much memory";
#endif
    if (!wrong) return;
    if (!c->n_wrong++) snprintf(c->first, sizeof c->first, "%s: status %d, \"%s\"", case_now, e.status, wrong);
}

// ---- All cases ----

// Where the weights begin and the tensors' edges, by the parser that is under test. A vocabulary is all header.
static bool open_victim(Victim *v, Error *e) {
    Model m = { 0 };
    if (v->is_vocabulary) return v->header = v->n, true;
    bool ok = parse_file((Cursor){ v->bytes, v->n, false }, &m, true, e);
    v->edges = calloc(2 * m.n_sources + 2, sizeof *v->edges);
    v->header = v->n;
    for (size_t i = 0; ok && v->edges && i < m.n_sources; i++) {
        size_t begin = (size_t)(m.sources[i].data - v->bytes);
        v->header = begin < v->header ? begin : v->header;
        v->edges[v->n_edges++] = begin;
        v->edges[v->n_edges++] = begin + m.sources[i].n_bytes;
    }
    close_model(&m);
    return ok && v->edges;
}

// Cut at each `step`-th length of the header, and at each edge of a tensor, a byte before and a byte behind it.
static Count cut_everywhere(const Victim *whole, size_t step) {
    Count c = { 0 };
    size_t n_all = whole->header / step + 3 * whole->n_edges;
    for (size_t i = 0; i < n_all; i++) {
        size_t k = i - whole->header / step, n = i < whole->header / step ? i * step : whole->edges[k / 3] + k % 3 - 1;
        if (n >= whole->n) continue;
        Victim v = *whole;
        void *p = NULL;
        if (posix_memalign(&p, 64, n ? n : 1)) exit(1);
        v.bytes = memcpy(p, whole->bytes, n);
        snprintf(case_now, sizeof case_now, "%s cut to %zu bytes", v.name, n);
        try_case(&c, &v, n);
        free(p);
    }
    return c;
}

static Count flip_bits(const Victim *v, size_t step) {
    Count c = { 0 };
    for (size_t bit = 0; bit < 8 * v->header; bit += step) {
        v->bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        snprintf(case_now, sizeof case_now, "%s, bit %zu of byte %zu", v->name, bit % 8, bit / 8);
        try_case(&c, v, v->n);
        v->bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    return c;
}

// Each number of 4 or 8 bytes, wherever it may begin, becomes each extreme: all of the first kB, then by steps.
static Count set_words(const Victim *v, size_t step) {
    static const uint64_t values[] = { 0, 1, UINT64_MAX, INT32_MAX, 0x80000000, UINT32_MAX, 1ull << 32, INT64_MAX,
                                       1ull << 63, 0x7ff0000000000000, 0xfff8000000000000 };
    Count c = { 0 };
    for (size_t size = 4; size <= 8; size += 4) {
        for (size_t at = 0; at + size <= v->header; at += at < 1024 && step < 8 ? 1 : step) {
            unsigned char kept[8];
            memcpy(kept, v->bytes + at, size);
            for (size_t i = 0; i < (size == 4 ? 5 : sizeof values / sizeof *values); i++) {
                memcpy(v->bytes + at, &values[i], size);
                snprintf(case_now, sizeof case_now, "%s, %zu bytes at %zu set to %llx", v->name, size, at,
                         (unsigned long long)values[i]);
                try_case(&c, v, v->n);
            }
            memcpy(v->bytes + at, kept, size);
        }
    }
    return c;
}

// The three sweeps, each with its step, if it is above 0.
static void sweep(Victim *v, const size_t steps[3], void (*tell)(const Victim *v, const char *what, const Count *c)) {
    static const struct { const char *what; Count (*run)(const Victim *v, size_t step); } sweeps[] = {
        { "cut", cut_everywhere }, { "bits", flip_bits }, { "words", set_words },
    };
    Error e = { 0 };
    Count none = { .n_wrong = 1 };
    bool ok = open_victim(v, &e);
    snprintf(none.first, sizeof none.first, "%s does not open: %s", v->name, e.text);
    if (!ok) tell(v, "open", &none);
    for (int i = 0; ok && i < 3; i++) {
        if (!steps[i]) continue;
        Count c = sweeps[i].run(v, steps[i]);
        tell(v, sweeps[i].what, &c);
    }
    free(v->edges);
}

#ifdef ATTACK_PROGRAM
void __sanitizer_set_death_callback(void (*callback)(void)) __attribute__((weak));

static void tell_case(void) { fprintf(stderr, "in this case: %s\n", case_now); }

static void give_up(int number) {
    (void)number;
    fprintf(stderr, "more than 2 seconds in this case: %s\n", case_now);
    _exit(1);
}

static void tell_count(const Victim *v, const char *what, const Count *c) {
    printf("%s\t%s\t%zu\t%zu\t%zu\t%zu\t%s\n", v->name, what, c->n_cases, c->n_opened, c->n_refused, c->n_wrong,
           c->first);
    fflush(stdout);
}

// build/attack CUT BITS WORDS FILE ...: the steps of the sweeps (all 0: each file is tried once, as it is), and files,
// of which those whose names end in tokenizer.bin are vocabularies.
int main(int argc, char **argv) {
    size_t steps[3] = { 1, 1, 1 };
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(tell_case);
    signal(SIGVTALRM, give_up);
    for (int i = 0; i < 3 && i + 1 < argc; i++) steps[i] = strtoul(argv[i + 1], NULL, 10);
    for (int i = 4; i < argc; i++) {
        Map file = { 0 };
        Error e = { 0 };
        if (!map_file(argv[i], &file, &e)) return tell_error(argv[i], &e);
        void *p = NULL;
        if (posix_memalign(&p, 64, file.n_bytes)) return 1;
        const char *name = strrchr(argv[i], '/'), *end = argv[i] + strlen(argv[i]);
        size_t length = strlen("tokenizer.bin");
        Victim v = { .name = name ? name + 1 : argv[i], .bytes = memcpy(p, file.bytes, file.n_bytes), .n = file.n_bytes,
                     .is_vocabulary = (size_t)(end - argv[i]) >= length && !strcmp(end - length, "tokenizer.bin") };
        Count c = { 0 };
        snprintf(case_now, sizeof case_now, "%s as it is", v.name);
        if (steps[0] + steps[1] + steps[2] > 0) sweep(&v, steps, tell_count);
        else try_case(&c, &v, v.n), tell_count(&v, "as it is", &c);
        free(p);
        munmap((void *)file.bytes, file.n_bytes);
    }
    return 0;
}
#endif
