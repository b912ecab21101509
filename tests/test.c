/* The offline tests of cria.

   cc -O2 -fopenmp tests/test.c -lm -o build/test && build/test        (or: make test), in the repository's root

   The program is included here whole, so that every function can be tested on its own; ./run is tested as a command
   too. What a test wants comes from a named source that is not the code under test: transformers, sentencepiece,
   Hugging Face's tokenizers (the files in tests/golden and the scripts that made them), llama2.c, the definition of a
   format, IEEE 754, or plain arithmetic in double. A failure prints the case, what came and what was wanted. The last
   line is the count.

     test.c              this frame: files, random numbers, models in memory
     faults.h            calls that are counted and can fail
     runner.h            a text that goes through a model
     test_arithmetic.c   numbers and kernels against plain arithmetic in double
     test_model.c        logits against transformers, the same bits however they are computed, llama2.c's two stories
     test_machine.c      chunks of work, threads that rest, processors and quotas
     test_text.c         sampling against plain algorithms, tokens against sentencepiece and tokenizers, chat templates
     test_templates.c    JSON, chat templates against jinja2
     test_files.c        damaged files
     test_vocabulary.c   damaged vocabularies
     fuzz.c              the inputs that fuzzing found worth keeping
     test_session.c      sessions, whole and damaged; guesses that leave a text as it is
     test_command.c      ./run as a command, and the limits of style
     test_scripts.c      many texts, scores */

#define CRIA_NO_MAIN
#define _GNU_SOURCE
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"
#endif

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <float.h>
#include <math.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faults.h"  // run.c's own allocations are counted, and one of them, or all from one on, can be made to fail
#include "../run.c"
#if defined(__OPTIMIZE__) && !defined(__clang__)
#pragma GCC optimize("O1")  // for the tests themselves: the compiler takes three quarters of the time
#endif
#include "runner.h"
#include "faults.h"

// ---- Counting ----

static const char *group_name = "";
static int n_passed, n_failed, n_failed_in_group;

// One test: whether it passed. The message says case, got, wanted; a group's failures are printed up to 20.
__attribute__((format(printf, 2, 3))) static bool check(bool ok, const char *format, ...) {
    if (ok) {
        n_passed++;
        return true;
    }
    n_failed++;
    if (++n_failed_in_group > 20) return false;
    va_list list;
    va_start(list, format);
    printf("FAILED %s: ", group_name);
    vprintf(format, list);
    printf("\n");
    if (n_failed_in_group == 20) printf("FAILED %s: more are not printed\n", group_name);
    va_end(list);
    return false;
}

// What cannot be allocated ends the tests.
static void *get(size_t n) {
    void *p = calloc(n ? n : 1, 1);
    if (!p) {
        printf("no memory for %zu bytes\n", n);
        exit(1);
    }
    return p;
}

// ---- Random numbers (splitmix64), the same in every run ----

static uint64_t random_state;

static uint64_t random_bits(void) {
    uint64_t z = random_state += 0x9E3779B97F4A7C15u;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
    z = (z ^ z >> 27) * 0x94D049BB133111EBu;
    return z ^ z >> 31;
}

static size_t random_below(size_t n) { return (size_t)(random_bits() % n); }
static double random_real(double low, double high) {
    return low + (high - low) * ((double)(random_bits() >> 11) * 0x1p-53);
}

// A float of roughly normal distribution, standard deviation `size`.
static float random_float(double size) {
    double sum = 0;
    for (int i = 0; i < 12; i++) sum += random_real(-0.5, 0.5);
    return (float)(sum * size);
}

// ---- Files in memory ----

// Bytes in a heap block of exactly their size, so that ASan sees whoever reads behind them.
typedef struct {
    unsigned char *bytes;
    size_t n;
} Bytes;

static Bytes new_bytes(size_t n) {
    void *p = NULL;
    if (posix_memalign(&p, 64, n ? n : 1)) exit(1);
    return (Bytes){ p, n };
}

static Bytes copy_bytes(const unsigned char *from, size_t n) {
    Bytes b = new_bytes(n);
    if (n) memcpy(b.bytes, from, n);
    return b;
}

static bool file_exists(const char *path) { return access(path, R_OK) == 0; }

// A whole file; bytes is NULL where there is none.
static Bytes read_bytes(const char *path) {
    FILE *f = fopen(path, "rb");
    if (!f) return (Bytes){ NULL, 0 };
    struct stat info;
    if (fstat(fileno(f), &info)) exit(1);
    Bytes b = new_bytes((size_t)info.st_size);
    if (fread(b.bytes, 1, b.n, f) != b.n) exit(1);
    fclose(f);
    return b;
}

static Bytes read_golden(const char *name) {
    char path[160];
    snprintf(path, sizeof path, "tests/golden/%s", name);
    Bytes b = read_bytes(path);
    if (!b.bytes) {
        printf("%s cannot be read: the tests run in the repository's root\n", path);
        exit(1);
    }
    return b;
}

static bool write_bytes(const char *path, Bytes b) {
    FILE *f = fopen(path, "wb");
    bool ok = f && fwrite(b.bytes, 1, b.n, f) == b.n;
    return f && fclose(f) == 0 && ok;
}

// The text of a file with a final NUL, or NULL.
static char *read_text(const char *path) {
    Bytes b = read_bytes(path);
    if (!b.bytes) return NULL;
    char *text = get(b.n + 1);
    memcpy(text, b.bytes, b.n);
    free(b.bytes);
    return text;
}

static char folder[64];  // for temporary files

static const char *temporary(const char *name) {
    static char path[4][128];
    static int next;
    next = (next + 1) % 4;
    snprintf(path[next], sizeof path[next], "%s/%s", folder, name);
    return path[next];
}

// ---- Models in memory ----

typedef struct {
    Model model;
    Bytes bytes;  // what its pointers may point into
} Opened;

static bool open_bytes(Opened *o, Bytes b, Error *e) {
    *o = (Opened){ .bytes = b };
    *e = (Error){ 0 };
    return open_model(b.bytes, b.n, 2, &o->model, e);
}

static void close_opened(Opened *o) {
    close_model(&o->model);
    free(o->bytes.bytes);
    *o = (Opened){ .bytes = { NULL, 0 } };
}

// A model of tests/golden, with tokenizer.bin's vocabulary where it has none of its own.
static Opened open_golden(const char *name) {
    Opened o;
    Error e;
    bool ok = open_bytes(&o, read_golden(name), &e);
    if (ok && !o.model.tokenizer.n_tokens) {
        Bytes b = read_golden("tokenizer.bin");
        ok = open_vocabulary(b.bytes, b.n, o.model.config.n_tokens, &o.model, &e);
        free(b.bytes);
    }
    if (!check(ok, "%s: got \"%s\", wanted it to open", name, e.text)) exit(1);
    return o;
}

// How a model is run.
typedef struct {
    bool exact, cache_f32;
    int threads, batch;
    const Kernels *kernels;
} Setting;

static int context_asked;  // as by -c; 0: the model's

static bool start_runner(const Model *m, Setting how, Runner *r, Error *e) {
    Settings settings = { .context = context_asked ? context_asked : m->config.context, .batch = how.batch,
                          .threads = how.threads, .exact = how.exact, .cache_f32 = how.cache_f32 };
    if (how.kernels) kernels = how.kernels;
    bool ok = make_runner(m, settings, r, e);
    r->w.work = SIZE_MAX;  // small as they are: all threads shall work
    return ok;
}

// The kernels that this machine can run, and a list of them that ends with NULL.
static const Kernels *const *usable_kernels(void) {
    static const Kernels *list[N_KERNELS + 1];
    int n = 0;
    for (int i = 0; i < N_KERNELS; i++) {
        if (cpu_can_run(all_kernels[i])) list[n++] = all_kernels[i];
    }
    list[n] = NULL;
    return list;
}

#include "test_arithmetic.c"
#include "test_model.c"
#include "test_machine.c"
#include "test_text.c"
#include "test_templates.c"
#include "fuzz.c"
#include "test_files.c"
#include "test_vocabulary.c"
#include "test_command.c"
#include "test_session.c"
#include "test_scripts.c"

static const struct {
    const char *name;
    void (*run)(void);
} groups[] = {
    { "sizes", test_sizes },
    { "half and bfloat", test_halves },
    { "exponential", test_exponential },
    { "quantise", test_quantise },
    { "multiply", test_multiply },
    { "normalise, activate", test_vectors },
    { "attention", test_attention },
    { "rotation", test_rotation },
    { "goldens", test_goldens },
    { "experts", test_experts },
    { "same bits", test_same_bits },
    { "many texts", test_sequences },
    { "pages", test_pages },
    { "batches", test_batches },
    { "chunks", test_chunks },
    { "resting", test_resting },
    { "processors", test_processors },
    { "stops", test_stops },
    { "containers", test_containers },
    { "hashes", test_hashes },
    { "what bench counts", test_counts },
    { "stories", test_stories },
    { "sampler", test_sampler },
    { "shaping", test_shaping },
    { "tokenizer", test_tokenizer },
    { "words", test_words },
    { "composing", test_composing },
    { "characters", test_characters },
    { "chat", test_chat },
    { "JSON", test_json_reader },
    { "templates", test_templates },
    { "damaged files", test_damaged_files },
    { "damaged vocabularies", test_damaged_vocabularies },
    { "damaged everywhere", test_damage_everywhere },
    { "fuzzing's corpus", test_corpus },
    { "failing calls", test_failing_calls },
    { "sessions", test_sessions },
    { "damaged sessions", test_damaged_sessions },
    { "lookup", test_lookup },
    { "./run --session", test_session_commands },
    { "command line", test_command_line },
    { "conversations", test_talks },
    { "scripts", test_scripts },
    { "style", test_style },
};
enum { N_GROUPS = sizeof groups / sizeof *groups };

// Ids of many texts, one in hexadecimal on each line of stdin: build/test FILE --lines-hex [--pre NAME] [--special],
// for make_token_goldens.py. Texts must come back, unless control tokens may be in them.
static int encode_lines(const char *path, const char *pre, bool special) {
    Error e = { 0 };
    Model m = { 0 };
    Buffer line = { 0 };
    options.pre = pre;
    if (!map_file(path, &m.file, &e) || !open_vocabulary(m.file.bytes, m.file.n_bytes, -1, &m, &e))
        return tell_error(path, &e);
    while (read_line(&line, &e)) {
        size_t n = read_hex((char *)line.bytes, line.n, (char *)line.bytes);
        Tokens tokens = encode_text(&m.tokenizer, (char *)line.bytes, n, special);
        bool has_bar = false, lost = tokens.n_dropped > 0 || (m.tokenizer.kind == SPM && m.tokenizer.byte_id['a'] < 0);
        for (size_t k = 0; k + 3 <= n; k++) has_bar = has_bar || !memcmp(line.bytes + k, "\xE2\x96\x81", 3);
        print_tokens(&m.tokenizer, &tokens);
        if (!special && !lost && !(has_bar && m.tokenizer.kind == SPM))
            check_round_trip(&m.tokenizer, path, (char *)line.bytes, n);
        free(tokens.ids);
    }
    free(line.bytes);
    close_model(&m);
    return n_failed > 0;
}

// How long texts take that have made other tokenizers slow, one megabyte and two, under every pre-tokenizer:
// build/test FILE --times. Only shown: how fast a machine is, and what else it does, is no failure.
static int print_times(const char *path) {
    enum { N = 2 << 20 };
    static const char *const units[] = {
        "a", " ", "ab ", "\n", " \n", "\r\n ", "=", "1", "'", "'s", "'l", "<", "/", "A", "Aa", "aA", "\u4F60",
        "\u4F60A", "\u02B0AA", "\u0301", "a\u0301", "\u0301\u0323", "\u0344\u0323", "A\u0301\u0323", "\u1100\u1161",
        "\u09C7\u09BE", "\U0001D160", "\U0001F469\u200D", "\xFF", "\u2581", "\u00A0 ", "\x85\n",
        "abcdefghijklmnopqrstuvwxyz", "random bytes",
    };
    enum { N_UNITS = sizeof units / sizeof *units };
    char *text = get(N);
    for (size_t pre = 0; pre < N_PRE_TOKENIZERS; pre++) {
        Error e = { 0 };
        Model m = { 0 };
        char name[32];
        snprintf(name, sizeof name, "%.*s", (int)strcspn(pre_tokenizers[pre].names, " "), pre_tokenizers[pre].names);
        options.pre = name;
        if (!map_file(path, &m.file, &e) || !open_vocabulary(m.file.bytes, m.file.n_bytes, -1, &m, &e))
            return tell_error(path, &e);
        double worst = 0, worst_ratio = 0;
        const char *slowest = "", *steepest = "";
        for (size_t i = 0; i < N_UNITS; i++) {
            double seconds[2] = { INFINITY, INFINITY };  // of this process alone, the least of four
            size_t n_unit = strlen(units[i]);
            for (size_t k = 0; k < N; k++) text[k] = i < N_UNITS - 1 ? units[i][k % n_unit] : (char)random_bits();
            for (int round = 0; round < 8; round++) {
                clock_t start = clock();
                Tokens tokens = encode_text(&m.tokenizer, text, N / 2 << round % 2, true);
                double time = (double)(clock() - start) / CLOCKS_PER_SEC;
                if (time < seconds[round % 2]) seconds[round % 2] = time;
                free(tokens.ids);
            }
            double ratio = seconds[1] > 0.1 ? seconds[1] / seconds[0] : 0;  // less is too short to be compared
            if (seconds[0] > worst) worst = seconds[0], slowest = units[i];
            if (ratio > worst_ratio) worst_ratio = ratio, steepest = units[i];
        }
        printf("%s: a megabyte takes at most %.3f s (%s); twice the text at most %.2f times the time (%s)\n",
               m.tokenizer.kind == SPM ? "SentencePiece" : name, worst, slowest, worst_ratio, steepest);
        fflush(stdout);
        bool spm = m.tokenizer.kind == SPM;
        close_model(&m);
        if (spm) break;
    }
    free(text);
    return 0;
}

// One group, in this process.
static void run_group(size_t i) {
    int n = n_passed;
    group_name = groups[i].name;
    n_failed_in_group = 0;
    random_state = i;
    kernels = usable_kernels()[0];
    snprintf(folder, sizeof folder, "/tmp/cria-test-XXXXXX");
    if (!mkdtemp(folder)) exit(1);
    groups[i].run();
    check(rmdir(folder) == 0, "%s is not empty", folder);
    printf("%-20s %d passed, %d failed\n", group_name, n_passed - n, n_failed_in_group);
    fflush(stdout);
}

// Starts a group in a process of its own, which prints to a file and leaves its score: passed, failed.
static pid_t start_group(size_t i, FILE *out, int score[2]) {
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) exit(1);
    if (child > 0) return child;
    if (dup2(fileno(out), 1) != 1) exit(1);
    n_passed = n_failed = 0;
    run_group(i);
    score[0] = n_passed, score[1] = n_failed;
    exit(0);
}

// All groups, two at a time: one comes from the table's beginning, the other from its end. What they print is shown in
// the table's order.
static void run_all_groups(void) {
    FILE *out[N_GROUPS];
    int status[N_GROUPS], (*scores)[2];
    bool ended[N_GROUPS] = { false };
    scores = mmap(NULL, N_GROUPS * sizeof *scores, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (scores == MAP_FAILED) exit(1);
    pid_t running[2] = { 0, 0 };
    size_t group[2], begin = 0, end = N_GROUPS, n_shown = 0;
    while (n_shown < N_GROUPS) {
        for (int side = 0; side < 2; side++) {
            if (running[side] || begin == end) continue;
            size_t i = group[side] = side ? --end : begin++;
            out[i] = unnamed_file();
            running[side] = start_group(i, out[i], scores[i]);
        }
        int now;
        pid_t pid = waitpid(-1, &now, 0);
        if (pid < 0) exit(1);
        for (int side = 0; side < 2; side++)
            if (running[side] == pid) running[side] = 0, status[group[side]] = now, ended[group[side]] = true;
        for (; n_shown < N_GROUPS && ended[n_shown]; n_shown++) {
            size_t n, i = n_shown;
            char *text = read_stream(out[i], &n);
            fwrite(text, 1, n, stdout);
            if (status[i]) printf("FAILED %s: its process ends with wait status %#x\n", groups[i].name, status[i]);
            fflush(stdout);
            n_passed += scores[i][0], n_failed += scores[i][1] + (status[i] != 0);
            fclose(out[i]), free(text);
        }
    }
    munmap(scores, N_GROUPS * sizeof *scores);
}

// With arguments, only the groups whose names contain one of them, in this process: a debugger sees them.
int main(int argc, char **argv) {
    if (argc > 1 && !strcmp(argv[1], "--templates")) return render_lines();
    if (argc > 2 && !strcmp(argv[2], "--times")) return print_times(argv[1]);
    if (argc > 2 && !strcmp(argv[2], "--samplers")) {  // for make_sampler_goldens.py
        int n = check_shapings(argv[1]);
        printf("%d cases: %d passed, %d failed\n", n, n_passed, n_failed);
        return n_failed > 0 || n == 0;
    }
    if (argc > 2 && !strcmp(argv[2], "--lines-hex"))
        return encode_lines(argv[1], argc > 4 && !strcmp(argv[3], "--pre") ? argv[4] : NULL,
                            !strcmp(argv[argc - 1], "--special"));
    if (!getenv("OMP_WAIT_POLICY")) {  // threads that wait leave the cores to others; OpenMP reads this when it starts
        setenv("OMP_WAIT_POLICY", "passive", 1);
        execv(argv[0], argv);
    }
    options.quiet = true;
    if (argc == 1) run_all_groups();
    int n_unknown = argc - 1;
    uint64_t known = 0;  // a bit for each argument that some group's name contains
    for (size_t i = 0; i < N_GROUPS && argc > 1; i++) {
        bool wanted = false;
        for (int k = 1; k < argc; k++) {
            bool fits = strstr(groups[i].name, argv[k]);
            wanted = wanted || fits;
            n_unknown -= fits && k < 64 && !(known >> k & 1);
            known |= (uint64_t)fits << (k < 64 ? k : 0);
        }
        if (wanted) run_group(i);
    }
    if (n_unknown) printf("FAILED: %d arguments are in no group's name\n", n_unknown), n_failed++;
    printf("%d passed, %d failed\n", n_passed, n_failed);
    return n_failed > 0;
}
