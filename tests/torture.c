/* Failure injection: whatever fails, and whenever, is told in one line, and no file is left half written.

   make torture        builds this and runs it in the repository's root

   run.c is included whole. Each case is a command line, which runs once for each of its calls that can fail
   (tests/faults.h), in a process of its own, where that call fails: alone, and with all that follow. Then a signal
   comes before each of them. What is allocated, mapped and opened is counted: nothing may be left. The last line is
   the count. */

#define _GNU_SOURCE
#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "faults.h"
#define main cria_main
#include "../run.c"
#undef main
#include "faults.h"

enum { LEAK = 99, MAX_WORDS = 24, SECONDS = 20 };

typedef struct {
    const char *name;
    const char *words;   // the command line; $ is the model, @ the folder for what is written
    const char *input;   // stdin
    bool repeats;        // the same output every time
    bool goes_on;        // after SIGINT, which ends only an answer
} Case;

static const Case cases[] = {
    { "generate", "$ -q -n 4 -t 0.8 -s 1 -i Once", "", true, false },
    { "session", "$ -q -n 4 -t 0.8 -s 1 --lookup 2 -i Once --session @/out", "", true, false },
    { "chat", "$ -q -m chat --template vicuna-lines -n 3 -s 1 -i Hi", "you?\n", true, true },
    { "turn", "$ -q -m chat --template @/template --messages @/messages --template-arg a=1 -st -n 3 -s 1 -i Hi "
              "--log @/log", "", true, true },
    { "render", "$ -q -m render --template @/template --messages @/messages --template-arg a=[1,2.5]", "",
      true, false },
    { "prompts", "$ -q -n 3 -t 0.8 -s 1 --samples 2 --prompts -",
      "Once\n{\"prompt\": \"Once\", \"stop\": [\"a\"], \"seed\": 3}\nupon\n", true, false },
    { "score", "$ -q -m score --logprobs 2 --json -i Once", "", true, false },
    { "choose", "$ -q -m score --choose a|Once -i Once", "", true, false },
    { "one-of", "$ -q --one-of a|upon -s 1 -i Once", "", true, false },
    { "eval", "$ -q -m eval --shots 1 -n 2 -f @/tasks", "", true, false },
    { "export", "$ -q -m export -o @/out", "", true, false },
    { "quantise", "$ -q -m export --type mixed --report -o @/out", "", true, false },
    { "logits", "$ -q -m logits -f @/text -o @/out", "", true, false },
    { "perplexity", "$ -q -m perplexity -c 4 -f -", "Once upon a time there was a little girl", true, false },
    { "tokenize", "$ -q -m tokenize --pieces -i Once", "", true, false },
    { "detokenize", "$ -q -m detokenize -f -", "1 2 3", true, false },
    { "inspect", "$ -q -m inspect --json", "", true, false },
    { "bench", "$ -q -m bench --reps 1 --pp 2 --tg 1 --svg @/out", "", false, false },
};

// What a run leaves behind, in memory that it shares with this process.
typedef struct {
    size_t n;
    char failed[32];
} Shared;

static Shared *shared;
static char folder[64];
static int n_points, n_wrong;

static void path_of(char *path, size_t size, const char *name) { snprintf(path, size, "%s/%s", folder, name); }

// The bytes of a file in the folder with a NUL behind them, or NULL.
static char *read_file(const char *name, size_t *n) {
    char path[400];
    path_of(path, sizeof path, name);
    FILE *f = fopen(path, "rb");
    *n = 0;
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    long end = ftell(f);
    char *bytes = calloc((size_t)end + 1, 1);
    rewind(f);
    if (!bytes || fread(bytes, 1, (size_t)end, f) != (size_t)end) exit(1);
    fclose(f);
    *n = (size_t)end;
    return bytes;
}

// What was printed, without the figures of inspect that depend on the memory, and the threads, that there are.
static char *read_output(size_t *n) {
    char *text = read_file("stdout", n);
    for (char *line = text, *next; line && *line; line = next) {
        next = line + strcspn(line, "\n") + 1;
        if (next > text + *n) next = text + *n;
        char *word = strstr(line, "memory");
        if (strncmp(line, "  \"", 3) || !word || word > next) continue;
        memmove(line, next, (size_t)(text + *n - next) + 1);
        *n -= (size_t)(next - line);
        next = line;
    }
    return text;
}

static void write_file(const char *name, const void *bytes, size_t n) {
    char path[400];
    path_of(path, sizeof path, name);
    FILE *f = fopen(path, "wb");
    if (!f || fwrite(bytes, 1, n, f) != n || fclose(f)) exit(1);
}

static void remove_file(const char *name) {
    char path[400];
    path_of(path, sizeof path, name);
    unlink(path);
}

static void redirect(const char *name, int flags, int to) {
    char path[400];
    path_of(path, sizeof path, name);
    int file = open(path, flags, 0600);
    if (file < 0 || dup2(file, to) < 0) _exit(98);
    close(file);
}

// In the child: the command line's words, with $ and @ replaced, then run.c's main().
static void become(const Case *c, const char *model, unsigned closed) {
    static char text[4096];
    char *argv[MAX_WORDS + 1] = { "run" }, *to = text;
    int argc = 1;
    for (const char *p = c->words; *p && argc < MAX_WORDS; p += strspn(p, " ")) {
        argv[argc++] = to;
        for (; *p && *p != ' '; p++) {
            const char *what = *p == '$' ? model : *p == '@' ? folder : NULL;
            if (!what) *to++ = *p;
            for (; what && *what; what++) {
                *to++ = *what == ' ' ? 0 : *what;
                if (*what == ' ') argv[argc++] = to;
            }
        }
        *to++ = 0;
    }
    argv[argc] = NULL;
    alarm(SECONDS);
    for (int i = 0; i < 3; i++)
        if (closed >> i & 1) close(i);
    int status = cria_main(argc, argv);
    shared->n = faults.n;
    snprintf(shared->failed, sizeof shared->failed, "%s", faults.failed);
    exit(faults.live ? LEAK : status);
}

// Runs a case; the status as waitpid() gives it.
static int run_case(const Case *c, const char *model, unsigned closed) {
    *shared = (Shared){ 0, "" };
    fflush(stdout);
    pid_t child = fork();
    if (child < 0) exit(1);
    if (child == 0) {
        redirect("stdin", O_RDONLY, 0);
        redirect("stdout", O_WRONLY | O_CREAT | O_TRUNC, 1);
        redirect("stderr", O_WRONLY | O_CREAT | O_TRUNC, 2);
        become(c, model, closed);
    }
    int status;
    waitpid(child, &status, 0);
    return status;
}

static bool same(const char *a, size_t n, const char *b, size_t m) {
    return !a == !b && n == m && (!a || !memcmp(a, b, n));
}

// What an undisturbed run gives.
typedef struct {
    char *out, *file;
    size_t n_out, n_file;
    bool ok;
} Wanted;

// Whether there are files besides those that this program makes; on demand it removes them.
static bool has_temporary(bool removes) {
    bool found = false;
    DIR *d = opendir(folder);
    for (struct dirent *entry; d && (entry = readdir(d));) {
        if (!strstr(entry->d_name, ".tmp")) continue;
        found = true;
        if (removes) remove_file(entry->d_name);
    }
    if (d) closedir(d);
    return found;
}

// What is wrong after a run that was disturbed, or NULL.
static const char *judge(const Case *c, const Wanted *w, Text before, int status) {
    static char text[512];
    size_t n_out, n_err, n_file;
    char *out = read_output(&n_out), *err = read_file("stderr", &n_err), *file = read_file("out", &n_file);
    int code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
    bool old_file = same(file, n_file, before.at, before.n), new_file = same(file, n_file, w->file, w->n_file);
    bool is_session = strstr(c->words, "--session");  // it holds what there was of the text when something failed
    if (is_session && code && n_file > 8) new_file = !memcmp(file, w->file, 8);
    if (!c->repeats) new_file = n_file > 7 && !strcmp(file + n_file - 7, "</svg>\n");  // it holds what was measured
    const char *last = err;  // before it only what failed of many texts
    while (!strncmp(last, "line ", 5) && strchr(last, '\n')) last = strchr(last, '\n') + 1;
    bool one_line = !strncmp(last, "run: ", 5) && strchr(last, '\n') == err + n_err - 1;
    bool too_late = new_file && !strcmp(shared->failed, "fclose(stdout)");  // the last call: the file is done by then
    const char *wrong = NULL;
    if (!old_file && !new_file) wrong = "a torn file";
    else if (faults.signal) {
        bool ended = code == -faults.signal || code == 128 + faults.signal;
        if (code == LEAK) wrong = "something was not freed";
        else if (!ended && code) wrong = "not ended by the signal";
        else if (!code && c->repeats && !(c->goes_on && faults.signal == SIGINT) &&
                 !(same(out, n_out, w->out, w->n_out) && new_file))
            wrong = "status 0, but not all of it";
        else if (n_err && strncmp(err, "run: ", 5)) wrong = "other words than an error";
        else if (faults.signal == SIGINT && has_temporary(false)) wrong = "a temporary file is left";
    } else if (code < 0) wrong = code == -SIGALRM ? "it hangs" : "a signal";
    else if (code == LEAK) wrong = "something was not freed";
    else if (has_temporary(false)) wrong = "a temporary file is left";
    else if (code == DONE && c->repeats && !(same(out, n_out, w->out, w->n_out) && new_file))
        wrong = "status 0, but another result";
    else if (code == DONE && n_err) wrong = "status 0, but a message";
    else if (code && !one_line) wrong = "not one line of error";
    else if (code && c->repeats && !old_file && !too_late && !is_session) wrong = "it failed, but the file is there";
    else if (code && code != (faults.kinds == MEMORY ? NO_MEMORY : BROKEN_IO)) wrong = "another status";
    if (wrong) snprintf(text, sizeof text, "%s; status %d, \"%.300s\"", wrong, code, err);
    free(out), free(err), free(file);
    return wrong ? text : NULL;
}

// One kind of disturbance at every point of a case.
static void disturb(const Case *c, const char *model, const Wanted *w, const char *how, Text before) {
    int first_wrong = n_wrong;
    size_t points = 0;
    for (faults.failing = 1; faults.failing <= 100000; faults.failing++) {
        has_temporary(true);
        remove_file("out");
        if (before.at) write_file("out", before.at, before.n);
        int status = run_case(c, model, 0);
        bool interrupted_at_once = WIFEXITED(status) && WEXITSTATUS(status) == INTERRUPTED;  // it leaves no name then
        if (!shared->failed[0] && WIFEXITED(status) && !interrupted_at_once) break;  // there is no call of this number
        points++;
        const char *wrong = judge(c, w, before, status);
        if (wrong && n_wrong++ - first_wrong < 5)
            printf("FAILED %s %s, %s number %zu (%s): %s\n", c->name, model, how, faults.failing, shared->failed,
                   wrong);
    }
    n_points += (int)points;
    printf("%-10s %-34.34s %-28s %5zu points, %d wrong\n", c->name, model, how, points, n_wrong - first_wrong);
    faults.failing = 0;
}

static Wanted undisturbed(const Case *c, const char *model) {
    Wanted w = { 0 };
    remove_file("out");
    int status = run_case(c, model, 0);
    w.out = read_output(&w.n_out);
    w.file = read_file("out", &w.n_file);
    size_t n;
    char *err = read_file("stderr", &n);
    n_points++;
    w.ok = status == 0 && n == 0;
    if (!w.ok) printf("FAILED %s %s: status %d \"%s\"\n", c->name, model, status, err), n_wrong++;
    free(err);
    return w;
}

// Descriptors that are closed when it starts: an export is whole all the same, and what is printed is lost loudly.
static void close_descriptors(const Case *c, const char *model, const Wanted *w) {
    for (unsigned closed = 1; closed < 8; closed++) {
        remove_file("out");
        int status = run_case(c, model, closed);
        size_t n;
        char *file = read_file("out", &n);
        int code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        bool prints = w->n_out > 0, lost = prints && closed >> 1 & 1;
        bool no_input = closed & 1 && *c->input;  // it may be an end or a failure
        bool ok = no_input ? code == DONE || code == BROKEN_IO : lost ? code == BROKEN_IO : code == DONE;
        ok = ok && (code || same(file, n, w->file, w->n_file));
        n_points++;
        if (!ok) printf("FAILED %s %s, closed descriptors %u: status %d\n", c->name, model, closed, code), n_wrong++;
        free(file);
    }
}

static void torture(const Case *c, const char *model, bool quick) {
    static const struct { int kinds; const char *name; } kinds[] = {
        { MEMORY, "memory" }, { INPUT, "input" }, { OUTPUT, "output" },
    };
    static const struct { int number; const char *name; } signals[] = {
        { SIGINT, "SIGINT" }, { SIGTERM, "SIGTERM" }, { SIGHUP, "SIGHUP" }, { SIGPIPE, "SIGPIPE" },
        { SIGKILL, "SIGKILL" },
    };
    write_file("stdin", c->input, strlen(c->input));
    Wanted w = undisturbed(c, model);
    Text nothing = { NULL, 0 }, before = { "what was there before", 21 };
    if (strstr(c->words, "--session")) before = (Text){ w.file, w.n_file };  // no other file is written over
    if (!strstr(c->words, "@/out")) before = nothing;
    for (int i = 0; i < 6 && w.ok; i++) {
        char how[64];
        faults.kinds = kinds[i / 2].kinds;
        faults.for_good = i % 2;
        snprintf(how, sizeof how, "%s fails%s", kinds[i / 2].name, faults.for_good ? " for good" : "");
        disturb(c, model, &w, how, nothing);
        if (before.at) disturb(c, model, &w, how, before);
    }
    for (int i = 0; i < 5 && w.ok && !quick; i++) {
        faults.kinds = ALL_CALLS;
        faults.signal = signals[i].number;
        disturb(c, model, &w, signals[i].name, before);
    }
    faults.signal = 0;
    if (c->repeats && w.ok) close_descriptors(c, model, &w);
    free(w.out), free(w.file);
}

// Exports a model to a file in the folder, for the cases that open native files.
static void make_native(const char *model, const char *name) {
    char words[128];
    snprintf(words, sizeof words, "$ -q -m export -o @/%s", name);
    write_file("stdin", "", 0);
    if (run_case(&(Case){ "export", words, "", true, false }, model, 0)) printf("FAILED: no %s\n", name), n_wrong++;
}

static const struct { const char *name, *text; } texts[] = {
    { "template", "{% for m in messages if m.role != 'system' %}{{ (m.content | trim) ~ a | tojson }}\n{% endfor %}" },
    { "messages", "[{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\\u00e9\"}]" },
    { "tasks", "{\"question\": \"a\", \"answer\": \"b\"}\n"
               "{\"question\": \"c\", \"answer\": 1, \"choices\": [\"a\", \"b\"]}\n" },
};

// build/torture [quick] [CASE ...]
int main(int argc, char **argv) {
    static const char stories[] = "../shared/data/stories260K.bin -z ../shared/data/tok512.bin";
    bool quick = argc > 1 && !strcmp(argv[1], "quick");
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    snprintf(folder, sizeof folder, "/tmp/cria-torture-XXXXXX");
    if (shared == MAP_FAILED || !mkdtemp(folder)) return 1;
    write_file("text", "Once upon a time", 16);
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        write_file(texts[i].name, texts[i].text, strlen(texts[i].text));
    make_native("tests/golden/qwen2.gguf", "native");
    char native[128];
    path_of(native, sizeof native, "native");
    const char *models[] = { "tests/golden/llama_linear.gguf", native,
                             "tests/golden/llama2c_v2.bin -z tests/golden/tokenizer.bin",
                             access("../shared/data/stories260K.bin", R_OK) ? NULL : stories };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        bool wanted = argc == 1 + quick;
        for (int k = 1 + quick; k < argc; k++) wanted = wanted || !strcmp(argv[k], cases[i].name);
        for (int k = 0; wanted && k < 4; k++)
            if (models[k]) torture(&cases[i], models[k], quick);
    }
    static const char *const names[] = { "stdin", "stdout", "stderr", "out", "text", "native", "template", "messages",
                                         "log", "tasks" };
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) remove_file(names[i]);
    if (rmdir(folder)) printf("FAILED: %s is not empty\n", folder), n_wrong++;
    printf("%d of %d points clean\n", n_points - n_wrong, n_points);
    return n_wrong > 0;
}
