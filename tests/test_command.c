// ./run as a command, and the limits of style. Part of test.c.


// ---- Running a command ----

// What a command left behind. The names of the models below are variables of its shell: $tied, $qwen2 ...
typedef struct {
    char *out, *err;  // stdout and stderr, each with a NUL behind it
    size_t n_out;
    int status;       // of its exit, or 128 + the number of the signal that ended it
} Result;

typedef struct {
    pid_t pid;
    FILE *out, *err;  // unnamed files, so that nobody has to read for the command to go on
    int to_stdin;     // what is written here the command reads; -1: it has /dev/null
} Command;

static FILE *unnamed_file(void) {
    FILE *f = tmpfile();
    if (!f) {
        printf("no temporary file: %s\n", strerror(errno));
        exit(1);
    }
    return f;
}

// out: where stdout goes, or -1: to c.out.
static Command start_command(const char *text, bool with_stdin, int out) {
    Command c = { .out = unnamed_file(), .err = unnamed_file(), .to_stdin = -1 };
    int in[2] = { -1, -1 };
    if (with_stdin && pipe(in)) exit(1);
    fflush(stdout);
    c.pid = fork();
    if (c.pid < 0) exit(1);
    if (c.pid == 0) {
        setsid();  // so that a terminal which it opens is its own, and sends it signals
        if (!with_stdin) in[0] = open("/dev/null", O_RDONLY);
        bool ok = dup2(in[0], 0) == 0 && dup2(out < 0 ? fileno(c.out) : out, 1) == 1 && dup2(fileno(c.err), 2) == 2;
        if (with_stdin) close(in[0]), close(in[1]);
        if (out > 2) close(out);
        for (int i = 1; i < 32; i++) signal(i, SIG_DFL);  // a shell ignores some in what it starts in the background
        alarm(120);  // nothing here takes long: what hangs is ended
        if (ok) execl("/bin/sh", "sh", "-c", text, (char *)NULL);
        _exit(127);
    }
    if (with_stdin) {
        close(in[0]);
        c.to_stdin = in[1];
    }
    return c;
}

static char *read_stream(FILE *f, size_t *n) {
    char *text = get(1);
    *n = 0;
    rewind(f);
    for (size_t now = 1; now > 0; *n += now) {
        text = realloc(text, *n + 65537);
        if (!text) exit(1);
        now = fread(text + *n, 1, 65536, f);
    }
    text[*n] = 0;
    return text;
}

static Result end_command(Command *c) {
    Result r = { .status = -1 };
    int status;
    size_t n_err;
    if (c->to_stdin >= 0) close(c->to_stdin);
    if (waitpid(c->pid, &status, 0) == c->pid)
        r.status = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    r.out = read_stream(c->out, &r.n_out);
    r.err = read_stream(c->err, &n_err);
    fclose(c->out);
    fclose(c->err);
    return r;
}

// Waits until a stream of a running command has so many bytes and, if `part` is given, has it in them.
static bool wait_for(Command *c, FILE *stream, size_t n, const char *part) {
    for (int i = 0; i < 4000; i++) {
        char text[4096] = "";
        struct stat info;
        ssize_t n_read = pread(fileno(stream), text, sizeof text - 1, 0);
        bool found = n_read >= 0 && fstat(fileno(stream), &info) == 0 && (size_t)info.st_size >= n;
        if (found && (!part || strstr(text, part))) return true;
        siginfo_t ended = { 0 };
        if (waitid(P_PID, (id_t)c->pid, &ended, WEXITED | WNOHANG | WNOWAIT) || ended.si_pid) return false;
        usleep(5000);
    }
    return false;
}

// Presses Ctrl-C until the command ends, but leaves it time: a second one ends it wherever it is.
static Result interrupt(Command *c) {
    siginfo_t ended = { 0 };
    for (int i = 0; i < 50 && !ended.si_pid; i++) {
        kill(c->pid, SIGINT);
        for (int k = 0; k < 400 && !ended.si_pid; k++) {
            usleep(5000);
            if (waitid(P_PID, (id_t)c->pid, &ended, WEXITED | WNOHANG | WNOWAIT)) break;
        }
    }
    return end_command(c);
}

static Result run_shell(const char *text) {
    Command c = start_command(text, false, -1);
    return end_command(&c);
}

// The arguments may end in redirections and pipes. $EMULATOR is the Makefile's.
static Result run_with(const char *arguments) {
    char *text = get(strlen(arguments) + 64);
    sprintf(text, "$EMULATOR ./run %s", arguments);
    Result r = run_shell(text);
    free(text);
    return r;
}

static void free_result(Result *r) {
    free(r->out), free(r->err);
    *r = (Result){ 0 };
}

// ./run with these arguments: what it writes to stdout, to be freed. What it writes to stderr is dropped.
static char *run_command(const char *arguments, int *status) {
    Result r = run_with(arguments);
    *status = r.status;
    free(r.err);
    return r.out;
}

// ---- Cases in tables ----

// Of stdout and stderr: NULL - empty; "" - whatever; "=text" - exactly the text; else the text is in it.
typedef struct {
    const char *arguments;
    int status;
    const char *out, *err;
} Case;

static bool fits(const char *got, const char *wanted) {
    if (!wanted) return !*got;
    return *wanted == '=' ? !strcmp(got, wanted + 1) : strstr(got, wanted) != NULL;
}

// An error is one line that names the program.
static bool is_error_line(const char *err) {
    return !strncmp(err, "run: ", 5) && strchr(err, '\n') == err + strlen(err) - 1;
}

static void check_case(const Case *c) {
    if (strstr(c->arguments, "/dev/full") && !file_exists("/dev/full")) return;  // macOS has none
    Result r = run_with(c->arguments);
    bool ok = r.status == c->status && fits(r.out, c->out) && fits(r.err, c->err);
    check(ok, "./run %s: got status %d, \"%.300s\" and \"%.300s\", wanted %d, \"%s\" and \"%s\"", c->arguments,
          r.status, r.out, r.err, c->status, c->out ? c->out : "", c->err ? c->err : "");
    if (c->status >= 1 && c->status <= 5)
        check(is_error_line(r.err), "./run %s: got \"%.300s\", wanted one line that begins with \"run: \"",
              c->arguments, r.err);
    free_result(&r);
}

// Wrong options: status 2, and what the line has to say.
static const struct { const char *arguments, *wanted; } misuses[] = {
    { "", "no model given; ./run --help lists the options" }, { "-m model.gguf", "or the file of a model" },
    { "-x", "no option -x; ./run --help lists them" },
    { "$tied -m nonsense", "-m nonsense: expected generate" }, { "$tied -m ''", "expected generate" },
    { "$tied -m Generate", "expected generate" }, { "$tied 'a b' c", "two prompts: \"a b\" and \"c\"" },
    { "$tied -i a b", "two prompts" }, { "-", "no option -" }, { "$tied -", "no option -" },
    { "$tied --model", "--model needs a value: FILE" },
    { "--model $tied --model a", "two models: \"tests/golden/llama_tied.gguf\" and \"a\"" },
    { "$tied -m $qwen2", "two models: \"tests/golden/llama_tied.gguf\" and \"tests/golden/qwen2.gguf\"" },
    { "--model $tied a b", "two prompts: \"a\" and \"b\"" }, { "$tied -n5x", "--n-predict 5x" },
    { "$tied -q5", "no option -q5" }, { "$tied -t5,", "--temp 5,: expected a number" },
    { "$tied -nx", "no option -nx" },
    { "$tied --tmep 1", "no option --tmep; did you mean --temp?" }, { "$tied --thread=2", "did you mean --threads?" },
    { "$tied -temp 0", "no option -temp; did you mean --temp?" }, { "$tied --ctx-sise 9", "did you mean --ctx-size?" },
    { "$tied --batchsize=1", "did you mean --batch-size?" }, { "$tied --lora x", "--lora; ./run --help lists them" },
    { "$tied --completely-different", "--completely-different; ./run --help lists them" },
    { "$tied --mqqk", "no option --mqqk; ./run" }, { "$tied -ng 1", "no option -ng; ./run --help" },
    { "$tied $(yes -- '-f a' | head -n 65)", "more than 64 times -f" }, { "$tied -m chat --ids 1", "not --ids" },
    { "$tied -m chat --template zephyr -f $T/bytes", "a NUL in the first message" },
    { "$tied --quiet=1", "no option --quiet=1" }, { "$tied --=1", "no option --=1" },
    { "$tied -n=1", "no option -n=1" },
    { "$tied --top-p=2", "--top-p 2" }, { "$tied --temp=", "--temp" },
    { "$tied --nonsense", "--nonsense" }, { "$tied -tt 1", "-tt" }, { "$tied --", "--" },
    { "$tied -i", "needs a value" }, { "$tied --temp", "needs a value" }, { "$tied -m", "needs a value" },
    { "$tied -n 1 -f", "needs a value" }, { "$tied -t abc", "--temp abc" }, { "$tied -t nan", "--temp nan" },
    { "$tied -t -nan", "--temp -nan" }, { "$tied -t inf", "--temp inf" }, { "$tied -t -1", "--temp -1" },
    { "$tied -t -inf", "--temp" }, { "$tied -t 0,7", "--temp 0,7" }, { "$tied -t 1.0x", "--temp 1.0x" },
    { "$tied -t ''", "--temp" }, { "$tied -t ' 1'", "--temp" }, { "$tied -t 1e400", "--temp" },
    { "$tied -t 101", "threads are -j" }, { "$tied -t .", "--temp" }, { "$tied -p 1.5", "--top-p 1.5" },
    { "$tied -p -0.1", "--top-p -0.1" }, { "$tied -p nan", "--top-p nan" }, { "$tied -p -nan", "--top-p -nan" },
    { "$tied -p 0,9", "the prompt is -i" }, { "$tied -p ''", "the prompt is -i" }, { "$tied --min-p 2", "--min-p 2" },
    { "$tied --min-p -1", "--min-p" }, { "$tied --min-p nan", "--min-p nan" }, { "$tied -k -1", "--top-k -1" },
    { "$tied --stop ''", "--stop: expected up to 64 texts" }, { "$tied -l x+1", "--logit-bias x+1: expected ID+X" },
    { "$tied -l 99999+1", "below 277" }, { "$tied -l 1+inf", "ID+X" }, { "$tied -l 1+nan", "ID+X" },
    { "$tied -l 1", "ID+X" }, { "$tied -l 1+", "ID+X" }, { "$tied -l 1+1x", "ID+X" }, { "$tied -l -1+1", "ID+X" },
    { "$tied --repeat-penalty 0", "--repeat-penalty 0" }, { "$tied --dry-base 0.5", "--dry-base 0.5" },
    { "$tied -k 1.5", "--top-k 1.5" }, { "$tied -k x", "--top-k x" }, { "$tied -n -2", "--n-predict -2" },
    { "$tied -n abc", "--n-predict abc" }, { "$tied -n 99999999999", "--n-predict" },
    { "$tied -n 99999999999999999999", "--n-predict" }, { "$tied -n 1.5", "expected an integer from -1" },
    { "$tied -n 0x10", "--n-predict" }, { "$tied -n ''", "--n-predict" }, { "$tied -s -2", "--seed -2" },
    { "$tied -s 18446744073709551616", "expected an integer from 0 to 18446744073709551615 (" },
    { "$tied -s abc", "--seed abc" }, { "$tied -s 1x", "--seed 1x" },
    { "$tied -s ''", "--seed" }, { "$tied -j 0", "--threads 0" }, { "$tied -j -1", "--threads -1" },
    { "$tied -j 100000", "--threads 100000" }, { "$tied -j '1;2'", "--threads 1;2" },
    { "$tied -j 1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1", "--threads 1,1" }, { "-m matmul --pp 5000", "at most 4096" },
    { "$tied -m chat -i Hi --template nonsense", "nonsense" },
    { "$T/no_bos.bin -t 0", "an empty prompt, and the model has no begin token; see -i" },
    { "$tied -j two", "--threads two" }, { "$tied -b 0", "--batch-size 0" },
    { "$tied -b -1", "--batch-size" }, { "$tied -c -5", "--ctx-size -5" }, { "$tied -c 999999999", "--ctx-size" },
    { "$tied -c x", "--ctx-size x" }, { "$tied -i a -t 0 -c 65", "64 positions; -c 0" },
    { "$tied -i a -t 0 --kv f8", "--kv f8" }, { "$tied -i a -t 0 --kv ''", "--kv" },
    { "$tied --kernel nonsense", "nonsense" }, { "$tied -m chat -t 0 --template nonsense", "nonsense" },
    { "$tied -m chat -t 0", "--template" }, { "$tied -m logits -i a", "-o FILE" }, { "$tied -m export", "-o FILE" },
    { "$tied -m export --type q9 -o $T/x", "--type q9: expected keep, f32, f16, bf16, q8, q4, q4m or mixed" },
    { "$tied -m export --type '' -o $T/x", "expected keep" }, { "$tied -m export --type q5 -o $T/x", "expected keep" },
    { "$tied -t 0 --ids ''", "no token ids" }, { "$tied -t 0 --ids x", "\"x\"" },
    { "$tied -t 0 --ids '1 2x'", "\"x\"" },
    { "$tied -t 0 --ids '1 277'", "\"277\"" }, { "$tied -t 0 --ids -1", "\"-1\"" },
    { "$tied -t 0 --ids 99999999999999999999", "9999" }, { "$tied -m perplexity -i a -c 2", "at least 4" },
};

static const Case cases[] = {
    // a bad model or tokenizer
    { "nowhere.gguf", 1, NULL, "=run: nowhere.gguf: No such file or directory\n" },
    { "tests", 1, NULL, "=run: tests: a directory, expected a file in it, such as NAME.gguf\n" },
    { "$T/folder", 1, NULL, "convert it: python3 export_model.py " },
    { "/dev/null", 1, NULL, "run: /dev/null: a pipe or a device" },
    { "'Why is the sky blue?'", 1, NULL, "the model comes first, then the prompt: MODEL \"PROMPT\"" },
    { "llama3.2:1b", 1, NULL, "`ollama show --modelfile NAME` tells the file" },
    { "Qwen/Qwen3-0.6B -i a", 1, NULL, "names of models are not known here: download a GGUF" },
    { "$T/zip", 1, NULL, "python3 export_model.py FOLDER -o model.bin" },
    { "$T/safetensors", 1, NULL, "a safetensors file; convert its folder: python3 export_model.py" },
    { "run.c", 1, NULL, "=run: run.c: not a model; if it is a text, as a prompt: -f run.c\n" },
    { "$T/prompt", 1, NULL, "/prompt: not a model; if it is a text" },
    { "https://a.b/c.gguf", 1, NULL, "an address, not a file; download it first: curl -LO https://a.b/c.gguf\n" },
    { "$T/empty", 1, NULL, "empty" },
    { "$T/cut.bin", 1, NULL, "not copied whole" },
    { "$T/layout.bin", 1, NULL, "make it again: ./run SOURCE -m export -o FILE" },
    { "\"$(printf 'a\\033[31m\\nb')\"", 1, NULL, "a?[31m?b" },
    { "\"$(printf 'a\\302\\233\\377\\303\\244b')\"", 1, NULL, "run: a???\xC3\xA4" "b: " },
    { "$v0 -z nowhere", 1, NULL, "run: nowhere: " },
    { "$T/nan.bin -m inspect --check", 1, NULL, "run: blk.1.ffn_up.weight: row 17 " },
    { "$T/nan.bin -m export -o $T/x", 1, NULL, "run: blk.1.ffn_up.weight: row 17 " },
    { "$tied -m export --type q8 -o tests/../$tied", 2, NULL, "the model itself; choose another name" },
    { "$T/nan.bin -m export --type q8 -o $T/x", 1, NULL, "run: blk.1.ffn_up.weight: row 17 " },
    { "$T/nan.bin -q -t 0 -n 1", 1, "", "run: layer 2 at position 0 is not finite" },
    { "$T/rows.bin -q -t 0 -n 5 --ids '1 2 3'", 1, "\"#$", "run: the embedding at position 3 is not finite" },
    { "$v0 -z $tied", 1, NULL, "277 tokens, the model has 275" },
    { "$tied -z $z", 1, NULL, "275 tokens, the model has 277" }, { "$v0 -z run.c", 1, NULL, "run: run.c: " },
    { "$v0 -z tests", 1, NULL, "run: tests: " }, { "$v0 -i a", 1, NULL, "give it with -z FILE" },
    { "$v0 -m tokenize --ids 1", 1, NULL, "give it with -z FILE" },
    // reading and writing
    { "$tied -t 0 -f nowhere", 3, NULL, "run: nowhere: " }, { "$tied -t 0 -f tests", 3, NULL, "run: " },
    { "$tied -t 0 -f - <&-", 3, NULL, "run: -: reading failed" },
    { "$tied -q -t 0 -n 2 -i a >/dev/full", 3, NULL, "No space" }, { "$tied -q -t 0 -n 2 -i a >&-", 3, NULL, "stdout" },
    { "$tied -m inspect >/dev/full", 3, NULL, "No space" },
    { "$tied -m tokenize -i a >/dev/full", 3, NULL, "No space" }, { "--help >/dev/full", 3, NULL, "No space" },
    { "$tied -q -t 0 -n 2 -i a <&- 2>&-", 0, "a", NULL },
    { "$long -m chat -t 0 -n 3 -q -i a >/dev/full", 3, NULL, "No space" },
    { "$mixed -m bench -q --pp 4 --tg 2 --reps 1 -j 1 >/dev/full", 3, NULL, "No space" },
    { "--version >&-", 3, NULL, "stdout" }, { "$tied -m perplexity -f $T/text -q >/dev/full", 3, NULL, "No space" },
    { "$tied -m logits -i a -o $T/none/x", 3, NULL, "/none/x: " }, { "$tied -m logits -i a -o $T", 3, NULL, "run: " },
    { "$tied -m logits -i a -o /dev/full", 3, NULL, "/dev/full" },
    { "$tied -m export -o $T/none/x", 3, NULL, "/none/x" }, { "$tied -m export -o $T/folder", 3, NULL, "/folder: " },
    { "$tied -m export -o ''", 3, NULL, "run: " },
    // more text than room
    { "$tied -t 0 -f $T/text", 5, NULL, "the context has 64" },
    { "$tied -t 0 -i aaaaaaaaaaaaaaaa -c 8", 5, NULL, "; see -c" },
    { "$tied -t 0 -f /dev/zero", 5, NULL, "; see -c" }, { "$qwen2 -t 0 -f /dev/zero", 5, NULL, "; see -c" },
    { "$tied -m logits -o $T/x -f /dev/zero", 5, NULL, "; see -c" },
    { "$tied -m bench -q --reps 1 -j 1 --pp 4 --tg 0 --svg $T/none/x", 3, NULL, "/none/x: " },
    { "$tied -m bench --pp 8 --tg 65", 5, NULL, "needs 65 positions, the context has 64 of the model's 64" },
    { "$tied -m bench -c 20 --pp 30 --tg 2", 5, NULL, "needs 30 positions, the context has 20 of" },
    { "$tied -m logits -f $T/text -o $T/x", 5, NULL, "see -c" }, { "$tied -m perplexity -i a -c 16", 5, NULL, "(-c)" },
    // texts; stdout has nothing else
    { "$tied -t 0 -n 0 -i 'Once upon'", 0, "=Once upon\n", "stopped at -n tokens" },
    { "$tied -t 0 -n 0 -i 'Once upon' -q", 0, "=Once upon\n", NULL },
    { "$tied -t 0 -n 0 -i 'Once upon' -q --no-echo", 0, "=\n", NULL },
    { "$v0 -z $z -t 0 -n 0 -i a -q", 0, "=a\n", NULL }, { "$tied -t 0 -n 3 -i a", 0, "a", "prompt 2 tokens" },
    { "$tied -t 0 -n 3 -i a", 0, "a", "generated 3 tokens" }, { "$tied -t 0 -n 3 -i a", 0, "", " GB/s\n" },
    { "$tied -t 0 -n -1 -i a", 0, "a", "stopped at the context's end" },
    { "$tied -t 0 -n -1 -i a", 0, "a", "generated 63 tokens" },
    { "$tied -t 0 -n -1 -i a -c 16", 0, "a", "generated 15 tokens" }, { "$tied -t 0 -n -1 -q -i a", 0, "a", NULL },
    { "-q -i a -t 0 -n 0 $tied", 0, "=a\n", NULL },
    { "--prompt a --temp 0 --n-predict 0 --quiet $tied", 0, "=a\n", NULL }, { "$tied -t 0 -n 1 -q", 0, "", NULL },
    { "$tied -t 8 -n 1 -i a -s 1", 0, "a", "threads are -j" }, { "$tied -t 4.5 -n 1 -i a -s 1 -q", 0, "a", NULL },
    { "$tied -t 0 -n 12 -i 'Once upon' --stop pH --stop Hh", 0, "=Once uponh\xFF\x10\x02h\n", "at a stop text" },
    { "$tied -t 0 -n 12 -q -i 'Once upon' -r X -r h", 0, "=Once upon\n", "" },
    { "$tied -t 0 -n 2 -q -i Once --logit-bias 82+99 -l 82-0.5", 0, "=OnceOO\n", "" },
    { "$tied -t 0 -n 2 -q -i a --logit-bias 265-inf --ignore-eos --typical 0.5 --xtc-probability 1", 0, "a", "" },
    { "$T/no_bos.bin -t 0 -n 0 -q -i a", 0, "=a\n", NULL }, { "$T/no_bos.bin -q -m tokenize", 0, "=\n", NULL },
    { "$tied -m perplexity --ids '1 2 3 4' -c 4 -q", 0, "1 scored\nPPL = ", NULL },
    { "$tied -t 0 -n 1 -i a -c 0", 0, "a", "context of 64 positions" },
    { "$tied -t 0 -n 1 -i a -c 0 -q", 0, "a", NULL }, { "$tied -s 18446744073709551615 -n 2 -i a -q", 0, "a", NULL },
    { "$tied -s 0 -n 2 -i a -q", 0, "a", NULL }, { "$tied -k 1000000000 -p 0 --min-p 1 -n 2 -i a -q", 0, "a", NULL },
    { "$tied -t 100 -p 1 -n 2 -i a -q", 0, "a", "" }, { "$tied -b 4096 -t 0 -n 2 -i a -q", 0, "a", NULL },
    { "$v0 -t 0 -n 1 --ids '1 2 3'", 0, "", "prompt 3 tokens" },
    { "$tied -t 0 -n 0 -q --ids '1 265 82,271\n102'", 0, "=Onc\n", NULL },
    { "$tied -t 0 -n 0 -q -f $T/prompt", 0, "=Once upon\n", NULL },
    { "$tied -t 0 -n 0 -q -f - <$T/prompt", 0, "=Once upon\n", NULL },
    { "$tied -t 0 -i a --ids 1", 2, "=", "more than one prompt" },
    { "$tied -q -m logits --ids '1 2' -o /dev/stdout | wc -c", 0, "=2216\n", NULL },
    { "$tied -q -m logits --ids '1 2' -o /dev/stdout >>$T/more && $EMULATOR ./run $tied -q -m logits --ids '1 2' "
      "-o /dev/stdout >>$T/more; wc -c <$T/more", 0, "=4432\n", NULL },
    { "$tied -t 0 -n 0 -q -i '</s>'", 0, "=</s>\n", NULL },
    { "$tied -t 0 -n 0 -q --special -i 'a</s>b'", 0, "=ab\n", NULL },
    { "$tied -t 0 -n 0 -f $T/empty", 0, "=\n", "prompt 1 tokens" },
    { "$tied -t 0 -n 0 -i a --no-bos", 0, "=a\n", "prompt 1 tokens" },
    { "$qwen2 -t 0 -n 0 -i a", 0, "=a\n", "prompt 1 tokens" },
    { "$tied -q -t 0 -n 1 -i a --exact --kv f32", 0, "a", NULL },
    { "$tied -q -t 0 -n 1 -i a --kv f16 --kernel scalar", 0, "a", NULL },
    // tokens
    { "$tied -m tokenize -i 'Once upon'", 0, "=1 265 82 271 102 266 265 120 115 273 271\n", NULL },
    { "$tied -m tokenize -i Once --no-bos", 0, "=265 82 271 102 266\n", NULL },
    { "$tied -m tokenize --no-bos", 0, "=\n", NULL }, { "$tied -m tokenize --json -i O", 0, "=[1, 265, 82]\n", NULL },
    { "$tied -m tokenize --json --no-bos", 0, "=[]\n", NULL },
    { "$tied -m tokenize --pieces -i O", 0, "=      1  \"<s>\"\n    265  \" \"\n     82  \"O\"\n", NULL },
    { "$tied -m tokenize --pieces --json -i O --no-bos", 0,
      "=[{\"id\": 265, \"piece\": \" \"}, {\"id\": 82, \"piece\": \"O\"}]\n", NULL },
    { "$tied -m tokenize --special -i '</s>' --no-bos", 0, "=2\n", NULL },
    { "$tied -m tokenize --ids '3 2'", 0, "=3 2\n", NULL }, { "$v0 -z $z -m tokenize -i a", 0, "1 ", NULL },
    // a vocabulary is enough for them, in both directions: with $t from a text, with $d to a text
    { "$tied $t <$T/prompt", 0, "=265 82 271 102 266 265 120 115 273 271\n", NULL },
    { "$tied -m tokenize -f - --ends <$T/prompt", 0, "=1 265 82 271 102 266 265 120 115 273 271\n", NULL },
    { "$T/ends.bin -m tokenize -i O --ends", 0, "=1 265 82 2\n", NULL },
    { "$T/ends.bin -m tokenize -i O --ends --no-bos", 0, "=265 82 2\n", NULL },
    { "$T/ends.bin -m tokenize -i O", 0, "=1 265 82\n", NULL },
    { "$T/ends.bin -m tokenize --ends --ids 5", 0, "=5\n", NULL },
    { "$qwen2 -m tokenize --ends -f $T/prompt >$T/ids; $EMULATOR ./run $qwen2 $t <$T/prompt | cmp - $T/ids", 0, NULL,
      NULL },
    { "$tied $t", 0, "=\n", NULL }, { "$tied -m tokenize", 0, "=1\n", NULL }, { "$z -m tokenize -i a", 0, "1 ", NULL },
    { "$v0 $t", 1, NULL, "run: tests/golden/llama2c_v0.bin: has no tokenizer in it" },
    { "nowhere $t", 1, NULL, "run: nowhere: " }, { "run.c $t", 1, NULL, "run: run.c: not a model; if it is a text" },
    { "$v0 -z README.md $t", 1, NULL, "run: README.md: not a model; if it is a text, as a prompt: -f FILE" },
    { "$T/cut_v0.bin -z $z -m tokenize -i a", 1, NULL, "not copied whole" },
    { "$tied -z $z -m tokenize -i a", 1, NULL, "275 tokens, the model has 277" },
    { "$bpe -m inspect", 1, NULL, "enough for -m tokenize" }, { "$z -i a", 1, NULL, "tests/golden/tokenizer.bin: " },
    { "$tied $t <&-", 3, NULL, "reading" }, { "$tied $d <&-", 3, NULL, "reading" },
    { "$tied $t <$T/prompt >/dev/full", 3, NULL, "No space" }, { "$tied -m detokenize --ids 9 >&-", 3, NULL, "stdout" },
    { "$tied $d <$T/prompt", 2, NULL, "\"Once\" is no token id" }, { "$tied $d <$T/bytes", 2, NULL, "a NUL among" },
    { "$tied $d", 0, NULL, NULL }, { "$tied -m detokenize", 0, NULL, NULL },
    { "$tied -m detokenize --ids '1 265 82'", 0, "=O", NULL },
    { "$tied -m detokenize -i '265 82,271'", 0, "=On", NULL },
    { "$z -m detokenize --ids 275", 2, NULL, "\"275\" is no token id below 275" },
    { "$tied $t --special <$T/special", 0, "=1 263 2\n", NULL },
    { "$tied $t --special <$T/special | $EMULATOR ./run $tied $d", 0, "=a", NULL },
    { "$tied $t --special <$T/special | $EMULATOR ./run $tied $d --special", 0, "=<s>a</s>", NULL },
    { "$tied -m tokenize --special -i 'O</s>' | $EMULATOR ./run $tied $d --special", 0, "=<s>O</s>", NULL },
    { "$tied $t <$T/special | $EMULATOR ./run $tied $d", 0, "=<s>a</s>", NULL },
    { "$tied $t <$T/bytes | $EMULATOR ./run $tied $d | cmp - $T/bytes", 0, NULL, NULL },
    { "$qwen2 $t <$T/bytes | $EMULATOR ./run $qwen2 $d | cmp - $T/bytes", 0, NULL, NULL },
    { "$z $t <$T/bytes | $EMULATOR ./run $z $d | cmp - $T/bytes", 0, NULL, NULL },
    { "$T/native.bin -m tokenize --ends -f $T/text | $EMULATOR ./run $tied $d | cmp - $T/text", 0, NULL, NULL },
    { "$bpe $t <$T/text | $EMULATOR ./run $bpe $d | cmp - $T/text", 0, NULL, NULL },
    { "$T/holes.bin $t", 1, NULL, "than 1048576 tokens" },
    { "$v0 -z $T/holes.bin $t", 1, NULL, "than 1048576 tokens" },
    // what there is
    { "$tied -m inspect", 0, "family                       llama\n", NULL },
    { "$tied -m inspect --check", 0, "all finite\n", NULL },
    { "$T/nan.bin -m inspect", 0, "family                       llama\n", NULL },
    { "$qwen2 -m inspect", 0, "byte-level BPE", NULL }, { "$v0 -m inspect", 0, "llama2.c", NULL },
    { "$mixed -m inspect", 0, "ffn_dim                      64 32\n", NULL },
    { "$long -m inspect", 0, "chat template                its own\n", NULL },
    { "--version", 0, "=cria " CRIA_VERSION "\n", NULL }, { "-h", 0, "usage: ./run", NULL },
    { "nowhere --help", 0, "usage: ./run", NULL },
    // chats
    { "$long -m chat -t 0 -n 3 -q", 0, NULL, NULL }, { "$long -m chat -t 0 -n 3 -q <&-", 0, NULL, NULL },
    { "$long -m chat -t 0 -n 3 -i Hi", 0, "\n", "[stopped at -n tokens]\n" },
    { "$tied -m chat -t 0 -q --template vicuna -i a", 5, "=", "the context has 64" },
};

// ---- What the cases need ----

static void put_file(const char *name, const void *bytes, size_t n) {
    Bytes b = copy_bytes(bytes, n);
    check(write_bytes(temporary(name), b), "%s cannot be written", temporary(name));
    free(b.bytes);
}

static void write_text(const char *name, const char *text) { put_file(name, text, strlen(text)); }

// A model with room for a million tokens and a chat template of its own.
static void make_long_model(void) {
    static const char jinja[] = "{% for m in messages %}{% if m.role == 'user' %}"
                                "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}"
                                "{% endif %}{% endfor %}";
    unsigned char value[8 + sizeof jinja];
    uint32_t context = 1 << 20;
    uint64_t n = sizeof jinja - 1;
    Bytes b = read_golden("llama_linear.gguf");
    GgufParts g;
    take_apart(b, &g);
    memcpy(value, &n, 8);
    memcpy(value + 8, jinja, n);
    set_value(key_named(&g, "llama.context_length", true), 4, &context, 4);
    set_value(key_named(&g, "tokenizer.chat_template", true), 8, value, 8 + n);
    Bytes longer = put_together(&g);
    put_file("long.gguf", longer.bytes, longer.n);
    free(longer.bytes), free(b.bytes);
    free_parts(&g);
}

static void make_files(void) {
    const struct { const char *name, *value; } variables[] = {
        { "tied", "tests/golden/llama_tied.gguf" }, { "qwen2", "tests/golden/qwen2.gguf" },
        { "mixed", "tests/golden/mixed.gguf" }, { "v0", "tests/golden/llama2c_v0.bin" },
        { "z", "tests/golden/tokenizer.bin" }, { "bpe", "tests/golden/tokens/bpe.gguf" },
        { "long", temporary("long.gguf") }, { "T", folder },
        { "t", "-m tokenize --no-bos -f -" }, { "d", "-m detokenize -f -" },
    };
    static const char bytes[] = "\0a\377\xE4\xBD b\n\xF0\x9F\x98\x80\0\0";
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++) setenv(variables[i].name, variables[i].value, 1);
    make_long_model();
    put_file("empty", "", 0);
    write_text("prompt", "Once upon");
    write_text("once", "Once\n");
    write_text("two_lines", "O\nn\n");
    write_text("special", "<s>a</s>");
    Bytes chat = read_golden("chat.txt");
    put_file("text", chat.bytes, 1000);
    free(chat.bytes);
    put_file("bytes", bytes, sizeof bytes - 1);
    mkdir(temporary("folder"), 0777);
    write_text("folder/config.json", "{}");
    write_text("zip", "PK\3\4 and the rest");
    write_text("safetensors", "\2aaaaaaa{\"a\": 1}");
    put_file("holes.bin", "", 0);
    check(truncate(temporary("holes.bin"), (off_t)4 << 30) == 0, "a file of 4 GiB of holes");
    Bytes v0 = read_golden("llama2c_v0.bin");
    put_file("cut_v0.bin", v0.bytes, v0.n / 2);
    free(v0.bytes);
    Bytes b = export_golden("qwen2_untied.gguf");
    FileHeader header;
    memcpy(&header, b.bytes, sizeof header);
    memset(b.bytes + header.tokenizer.at + offsetof(Tokenizer, bos), 0xFF, 4);
    put_file("no_bos.bin", b.bytes, b.n);
    size_t n_bytes;
    unsigned char *rows = native_tensor(b, "output.weight", &n_bytes);
    for (size_t i = 0; i < n_bytes; i += 4) {
        float weight;
        memcpy(&weight, rows + i, 4);
        memcpy(rows + i, (const float[]){ weight * 1e9f }, 4);
    }
    put_file("loud.bin", b.bytes, b.n);
    rows = native_tensor(b, "token_embd.weight", &n_bytes);  // 263 x 24, f32; finite are 1, 2 and 3:
    for (size_t row = 0; row < 263; row++)
        if (row < 1 || row > 3) memcpy(rows + 4 * (row / 16 * 32 * 16 + row % 16), (const float[]){ NAN }, 4);
    put_file("rows.bin", b.bytes, b.n);
    free(b.bytes);
    Result r = run_with("$tied -m export -o $T/native.bin");
    b = read_bytes(temporary("native.bin"));
    if (check(r.status == 0 && b.bytes, "-m export: got status %d and \"%s\"", r.status, r.err)) {
        put_file("cut.bin", b.bytes, b.n - 64);
        memcpy(&header, b.bytes, sizeof header);
        unsigned char *flags = b.bytes + header.tokenizer.at + offsetof(Tokenizer, flags);
        *flags |= ADD_EOS;
        put_file("ends.bin", b.bytes, b.n);
        *flags &= ~ADD_EOS;
        uint32_t layout = LAYOUT + 1;
        memcpy(b.bytes + offsetof(FileHeader, layout), &layout, sizeof layout);
        put_file("layout.bin", b.bytes, b.n);
        memcpy(b.bytes + offsetof(FileHeader, layout), (const uint32_t[]){ LAYOUT }, sizeof layout);
        unsigned char *data = native_tensor(b, "blk.1.ffn_up.weight", &n_bytes);  // f32, 44 rows in three row tiles
        memcpy(data + n_bytes / 3 + 4 * (17 % 16), (const float[]){ NAN }, 4);
        put_file("nan.bin", b.bytes, b.n);
    }
    free(b.bytes);
    free_result(&r);
}

static void remove_files(void) {
    Result r = run_shell("rm -rf \"$T\"/*");
    free_result(&r);
}

// ---- Texts ----

static void check_same_text(const char *what, const char *a, const char *b) {
    Result x = run_with(a), y = run_with(b);
    check(x.status == 0 && y.status == 0 && x.n_out == y.n_out && !memcmp(x.out, y.out, x.n_out),
          "%s: ./run %s: got status %d and \"%.200s\", ./run %s: status %d and \"%.200s\", wanted the same", what, a,
          x.status, x.out, b, y.status, y.out);
    free_result(&x);
    free_result(&y);
}

static void test_texts(void) {
    static const char *const pairs[][3] = {
        { "the native file", "$tied -t 0 -n -1 -i Once -q", "$T/native.bin -t 0 -n -1 -i Once -q" },
        { "the native file", "$tied -s 7 -n 50 -i Once -q", "$T/native.bin -s 7 -n 50 -i Once -q" },
        { "the statistics", "$tied -s 7 -n 50 -i Once -q", "$tied -s 7 -n 50 -i Once" },
        { "-f and -i", "$tied -s 7 -n 50 -i 'Once upon' -q", "$tied -s 7 -n 50 -f $T/prompt -q" },
        { "threads", "$tied -s 7 -n 50 -i Once -q -j 1", "$tied -s 7 -n 50 -i Once -q -j 3" },
        { "batches", "$tied -s 7 -n 50 -i Once -q -b 1", "$tied -s 7 -n 50 -i Once -q -b 3" },
        { "long and short names", "$tied -s 7 -n 9 -p 0.5 -k 9 -t 2 -q", "$tied --seed 7 --n-predict 9 --top-p 0.5 "
                                                                        "--top-k 9 --temp 2 --quiet" },
        { "the last -t counts", "$tied -s 7 -n 9 -t 0 -q", "$tied -s 7 -n 9 -t 1 -t 0 -q" },
        { "seed 0", "$tied -s 0 -n 9 -q", "$tied -s 11400714819323198485 -n 9 -q" },
        { "a value after =", "$tied -s 7 -n 9 -t 0.5 -q -i Once", "$tied --seed=7 --n-predict=9 --temp=0.5 -q "
                                                                  "--prompt=Once" },
        { "glued values", "$tied -s 7 -n 9 -t 0.5 -q -k 3", "$tied -s7 -n9 -t0.5 -q -k3" },
        { "other names", "$tied -s 7 -n 9 -q --no-echo -i a", "-m $tied --seed 7 --predict 9 -q --no-display-prompt "
                                                              "-p a" },
        { "other names", "$tied -s 7 -n 9 -q -t 2", "--model $tied -s 7 --predict=9 -q --temperature=2 -no-cnv" },
        { "-cnv", "$long -m chat -t 0 -n 9 -q -i a --template mistral", "$long -cnv -t 0 -n 9 -q -i a "
                                                                       "--chat-template mistral" },
        { "-p and a prompt", "$tied -s 7 -n 9 -q -p 0.5 -i 'Once upon'", "$tied -s 7 -n 9 -q -p 0.5 -p 'Once upon'" },
        { "what is ignored", "$tied -s 7 -n 9 -q -i a", "$tied -s 7 -ngl 99 -fa -n 9 -fa on --mlock --color off -q "
                                                        "--gpu-layers=1 -tb 4 --no-mmap -i a -ub 512" },
        { "a file, and the same as -i", "$tied -m tokenize -i \"$(printf 'O\\nn\\n.')\" -q | sed 's/ [0-9]*$//'",
          "$tied -m tokenize -q -f $T/two_lines" },
        { "a chat's first message", "$long -m chat -t 0 -n 9 -q -i \"$(printf 'Once upon\\n\\na')\"",
          "$long -m chat -t 0 -n 9 -q -f $T/prompt -i a" },
        { "a chat's first message from stdin", "$long -m chat -t 0 -n 9 -q -i Once", "$long -m chat -t 0 -n 9 -q -f - "
                                               "<$T/once" },
        { "a prompt without -i", "$tied -s 7 -n 9 -q -i 'Once upon'", "-n 9 $tied -q 'Once upon' -s 7" },
        { "-t 0 needs no seed", "$tied -s 5 -n 9 -t 0 -q", "$tied -s 6 -n 9 -t 0 -q" },
    };
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) check_same_text(pairs[i][0], pairs[i][1], pairs[i][2]);

    Result with = run_with("$tied -s 3 -n 20 -q -i 'Once upon'");
    Result without = run_with("$tied -s 3 -n 20 -q -i 'Once upon' --no-echo");
    check(with.n_out == without.n_out + 9 && !memcmp(with.out, "Once upon", 9) &&
              !memcmp(with.out + 9, without.out, without.n_out),
          "--no-echo: got \"%s\", and with the prompt \"%s\"", without.out, with.out);
    free_result(&with);
    free_result(&without);

    Result timed = run_with("$tied -n 40 -i Once");  // a seed of the clock's is printed, and gives the text again
    unsigned long long seed = 0;
    char arguments[80];
    check(sscanf(timed.err, "seed %llu", &seed) == 1, "without -s: got \"%s\", wanted a seed", timed.err);
    Result clock = run_with("$tied -n 1 -i Once -s 5 -s -1");
    check(clock.status == 0 && strstr(clock.err, "seed "), "-s -1: got \"%s\", wanted the clock's seed", clock.err);
    free_result(&clock);
    snprintf(arguments, sizeof arguments, "$tied -n 40 -i Once -s %llu", seed);
    Result again = run_with(arguments);
    check(timed.n_out == again.n_out && !memcmp(timed.out, again.out, again.n_out) && !strstr(again.err, "seed"),
          "-s %llu: got \"%s\", wanted \"%s\"", seed, again.out, timed.out);
    free_result(&timed);
    free_result(&again);

    bool ended = false, differ = false;  // by chance, a text comes to an end token; other seeds give other texts
    Result first = run_with("$tied -s 1 -n -1 -p 0 -q");
    for (int i = 1; i <= 60 && !(ended && differ); i++) {
        snprintf(arguments, sizeof arguments, "$tied -s %d -n -1 -p 0", i);
        Result r = run_with(arguments);
        ended = ended || strstr(r.err, "stopped at an end token");
        differ = differ || strcmp(r.out, first.out);
        free_result(&r);
    }
    check(ended && differ, "60 seeds: %s", ended ? "the same text" : "none stops at an end token");
    free_result(&first);

    Bytes bytes = read_bytes(temporary("bytes"));  // NUL and bytes that are no UTF-8 come through
    for (int i = 0; i < 3; i++) {
        static const char *const how[] = { "$tied -q -t 0 -n 0 -f $T/bytes", "$qwen2 -q -t 0 -n 0 -f - <$T/bytes",
                                           "$v0 -z $z -q -t 0 -n 0 -f $T/bytes" };
        Result r = run_with(how[i]);
        check(r.n_out == bytes.n + 1 && !memcmp(r.out, bytes.bytes, bytes.n) && r.out[bytes.n] == '\n',
              "%s: got %zu bytes, wanted the file's %zu and a newline", how[i], r.n_out, bytes.n);
        free_result(&r);
    }
    free(bytes.bytes);
}

// ---- Where the prompt comes from ----

// $R: ./run with a model that prints its prompt and nothing else. A note says that something waits unread.
static void test_inputs(void) {
    static const char note[] = "stdin is not read, since there is a prompt; -f - would read it\n";
    static const struct { const char *command, *out; bool noted; } cases[] = {
        // nothing but stdin
        { "printf 'a b\\n' | $R", "a b\n", false }, { "printf 'a b' | $R", "a b\n", false },
        { "printf 'a\\r\\n' | $R", "a\n", false }, { "printf 'a\\n\\n' | $R", "a\n\n", false },
        { "printf '\\n' | $R", "\n", false }, { "printf '\\r\\n' | $R", "\n", false },
        { "printf '\\r' | $R", "\r\n", false }, { "printf '' | $R", "\n", false }, { "$R <&-", "\n", false },
        { "$R </dev/null", "\n", false },
        { "$R <$T/once", "Once\n", false }, { "(sleep 0.1; echo a) | $R", "a\n", false },
        // -i, -f, or a second word alone: stdin is left as it is
        { "$R -i a <$T/once", "a\n", true }, { "$R a <$T/once", "a\n", true },
        { "$R -f $T/once <$T/prompt", "Once\n", true },
        { "$R --ids 265 <$T/once", "\n", true },
        { "echo b | (sleep 0.2; $R -i a; cat)", "a\nb\n", true }, { "$R -i '' <$T/once", "\n", true },
        { "$R -i a <$T/empty", "a\n", false }, { "printf '' | $R -i a", "a\n", false },
        { "$R -i a </dev/null", "a\n", false },
        { "$R -i a <&-", "a\n", false }, { "(cat; $R -i a) <$T/once", "Once\na\n", false },
        { "(sleep 0.1; echo b) | $R -i a", "a\n", false },
        { "printf 'a\\nb\\n' | while read -r x; do $R -q -i \"$x\"; done", "a\nb\n", false },
        { "$R -q -i a <$T/once", "a\n", false },
        // several, in the order given
        { "$R -i a -f - <$T/once", "a\n\nOnce\n", false }, { "$R -f - -i a <$T/once", "Once\n\na\n", false },
        { "$R a -f $T/once", "a\n\nOnce\n", false }, { "$R -f $T/once a", "Once\n\na\n", false },
        { "$R -f $T/two_lines -i a -f - -f $T/once <$T/prompt", "O\nn\n\na\n\nOnce upon\n\nOnce\n", false },
        { "$R -q -i a -f $T/once -i b", "b\n\nOnce\n", false }, { "$R -f $T/empty -i a", "\n\na\n", false },
        { "$R -f - -f - <$T/once", "Once\n\n\n", false },
        // other modes keep every byte
        { "printf 'O\\n' | $R -q -m tokenize --no-bos", "265 82 13\n", false },
        { "echo 265 82 | $R -q -m detokenize", "O", false },
        { "printf 'O\\n' | $R -q -m logits -o $T/inputs && test $(wc -c <$T/inputs) = $((4 * 4 * 277))", "", false },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[400];
        snprintf(text, sizeof text, "R=\"$EMULATOR ./run $tied -n 0 -t 0\"; %s", cases[i].command);
        Result r = run_shell(text);
        check(r.status == 0 && !strcmp(r.out, cases[i].out) && !!strstr(r.err, note) == cases[i].noted,
              "%s: got status %d, \"%s\" and \"%s\", wanted \"%s\" and %s note", cases[i].command, r.status, r.out,
              r.err, cases[i].out, cases[i].noted ? "a" : "no");
        free_result(&r);
    }
}

// What is said of options that do nothing; -q says nothing.
static void test_warnings(void) {
    static const struct { const char *arguments, *wanted; } cases[] = {
        { "-ngl 99", "-ngl has no effect here\n" }, { "--gpu-layers=99", "--gpu-layers has no effect here\n" },
        { "-fa", "-fa has no effect here\n" }, { "-ngl", "-ngl has no effect here\n" },
        { "-fa on --mlock", "-fa has no effect here\n--mlock has no effect here\n" },
        { "--color auto -e", "--color has no effect here\n-e has no effect here\n" },
        { "-t 0", "--temp is given again: the last one counts\n" }, { "-f $T/prompt -f $T/once", "" },
        { "-j 1 -c 0 -b 3", "" },
        { "--dry-sequence-breaker a --dry-sequence-breaker b", "" },
        { "-s 1 -s -1", "--seed is given again: the last one counts\n" },
        { "--pp 3", "-m generate does not use --pp\n" }, { "-y a", "-m generate does not use --system\n" },
        { "-m tokenize", "-m tokenize does not use --n-predict\n-m tokenize does not use --temp\n" },
        { "-q -ngl 99 -t 0 --pp 3", "" }, { "-ngl 99 -t 0 --pp 3 --quiet", "" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[200];
        snprintf(text, sizeof text, "$tied -n 0 -t 0 -i a %s", cases[i].arguments);
        Result r = run_with(text);
        char *end = strstr(r.err, "a context of"), *stopped = strstr(r.err, "stopped at");
        if (stopped) *stopped = 0;
        if (end) *end = 0;
        check(r.status == 0 && !strcmp(r.err, cases[i].wanted), "./run %s: got status %d and \"%s\", wanted \"%s\"",
              text, r.status, r.err, cases[i].wanted);
        free_result(&r);
    }
}

// On a terminal, a model that has a chat template hints at -m chat where the text asks for an answer.
static void test_hints(void) {
    static const struct { const char *arguments; bool hinted; } cases[] = {
        { "$long -i 'Who are you?'", true }, { "$long -i ' explain the moon '", true }, { "$long -i List", false },
        { "$long -i 'Once upon a time'", false }, { "$long -i 'Tellers tell'", false },
        { "$tied -i 'Who are you?'", false }, { "$long -q -i 'Who are you?'", false },
        { "$long -i 'Who are you?' 2>$T/hint", false },
        { "$long -i 'Who are you?' >$T/hint", false }, { "$long -i ''", false },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[200], got[2000] = "";
        int terminal = posix_openpt(O_RDWR | O_NOCTTY);
        if (terminal < 0 || grantpt(terminal) || unlockpt(terminal)) return;
        int slave = open(ptsname(terminal), O_RDWR | O_NOCTTY);
        snprintf(text, sizeof text, "exec 2>&1; $EMULATOR ./run -n 0 -t 0 %s", cases[i].arguments);
        Command c = start_command(text, false, slave);
        close(slave);
        for (ssize_t n = 0, now; (now = read(terminal, got + n, sizeof got - 1 - (size_t)n)) > 0;) n += now;
        Result r = end_command(&c);
        check(r.status == 0 && !!strstr(got, "-m chat lets the model answer it\r\n") == cases[i].hinted,
              "%s on a terminal: got status %d and \"%s\", wanted %s hint", text, r.status, got,
              cases[i].hinted ? "a" : "no");
        close(terminal);
        free_result(&r);
    }
}

// ---- Logits and perplexity ----

static void test_logits(void) {
    static const char *const names[] = { "mixed", "llama_tied", "qwen2" };
    static const struct { int threads, batch; } settings[] = {
        { 1, 1 }, { 1, 7 }, { 1, 64 }, { 2, 1 }, { 2, 64 }, { 3, 7 }, { 8, 1 }, { 8, 64 },
    };
    for (size_t i = 0; i < 3; i++) {
        char name[64], arguments[512];
        int ids[GOLDEN_TOKENS];
        snprintf(name, sizeof name, "%s.gguf", names[i]);
        Opened o = open_golden(name);
        read_golden_ids(names[i], ids);
        size_t n_bytes = n_logits_of(&o.model) * sizeof(float);
        float *wanted = get(n_bytes);
        run_all(&o.model, ids, (Setting){ false, is_f32(&o.model), 1, 16, NULL }, wanted);
        for (size_t k = 0; k < sizeof settings / sizeof *settings; k++) {
            snprintf(arguments, sizeof arguments, "tests/golden/%s -m logits --ids \"$(cat tests/golden/%s.ids)\" "
                     "-o $T/logits -j %d -b %d", name, names[i], settings[k].threads, settings[k].batch);
            Result r = run_with(arguments);
            Bytes got = read_bytes(temporary("logits"));
            check(r.status == 0 && !*r.out && got.n == n_bytes && !memcmp(got.bytes, wanted, n_bytes),
                  "%s: got status %d, \"%s\" and %zu bytes, wanted the same %zu bytes as in this process", arguments,
                  r.status, r.err, got.n, n_bytes);
            free(got.bytes);
            free_result(&r);
        }
        free(wanted);
        close_opened(&o);
    }
}

// As llama-perplexity does it: the text's tokens, its begin token included, are cut into chunks; of a chunk of n, the
// logits at n/2 .. n-2 predict the tokens n/2+1 .. n-1; a begin token takes the place of a chunk's first where the
// model adds one; what is left over at the end is dropped.
static void check_perplexity(const char *model, bool begins, int size) {
    char arguments[4096], ids[3000];
    double sum = 0, squares = 0, got[2] = { 0 };
    int n_scored = 0, n_ids = 0, *all = get(100000 * sizeof *all);
    snprintf(arguments, sizeof arguments, "%s -m tokenize %s -f $T/text", model, begins ? "" : "--no-bos");
    Result r = run_with(arguments);
    for (char *p = r.out, *end = p; n_ids < 100000 && (all[n_ids] = (int)strtol(p, &end, 10), end != p); p = end)
        n_ids++;
    free_result(&r);
    for (int chunk = 0; (chunk + 1) * size <= n_ids; chunk++) {
        int *c = all + chunk * size, n = 0;
        if (begins) c[0] = 1;
        for (int i = 0; i < size; i++) n += snprintf(ids + n, sizeof ids - (size_t)n, "%d ", c[i]);
        snprintf(arguments, sizeof arguments, "%s -m logits --ids '%s' -o $T/logits", model, ids);
        r = run_with(arguments);
        Bytes file = read_bytes(temporary("logits"));
        size_t n_tokens = file.n / sizeof(float) / (size_t)size;
        for (int i = size / 2; n_tokens && i < size - 1; i++, n_scored++) {
            const float *row = (const float *)(const void *)file.bytes + (size_t)i * n_tokens;
            double total = 0;
            for (size_t k = 0; k < n_tokens; k++) total += exp(row[k]);
            double surprisal = log(total) - row[c[i + 1]];
            sum += surprisal;
            squares += surprisal * surprisal;
        }
        free(file.bytes);
        free_result(&r);
    }
    double mean = sum / n_scored, wanted = exp(mean);
    double error = sqrt((squares / n_scored - mean * mean) / (n_scored - 1)) * wanted;
    snprintf(arguments, sizeof arguments, "%s -m perplexity -f $T/text -c %d", model, size);
    r = run_with(arguments);
    char *line = strstr(r.out, "PPL = "), *end = r.out + strlen(r.out);
    int n_read = 0;
    bool last = line && sscanf(line, "PPL = %lf +/- %lf%n", &got[0], &got[1], &n_read) == 2 && line + n_read + 1 == end;
    check(r.status == 0 && last && (line == r.out || line[-1] == '\n') && n_scored > 100,
          "%s: got status %d and \"%s\", wanted a last line PPL = %%f +/- %%f", arguments, r.status, r.out);
    check(fabs(got[0] - wanted) <= 1e-4 * wanted && fabs(got[1] - error) <= 1e-3 * error,
          "%s: got %.4f +/- %.4f, wanted %.4f +/- %.4f", arguments, got[0], got[1], wanted, error);
    free_result(&r);
    free(all);
}

// ---- JSON ----

static const char *json_space(const char *p) { return p + strspn(p, " \t\r\n"); }

static const char *json_string(const char *p) {
    if (*p++ != '"') return NULL;
    while (*p != '"') {
        unsigned char c = (unsigned char)*p++;
        if (c < 32) return NULL;
        if (c == '\\') {
            if (!*p || !strchr("\"\\/bfnrtu", *p)) return NULL;
            if (*p++ == 'u') {
                if (strspn(p, "0123456789abcdefABCDEF") < 4) return NULL;
                p += 4;
            }
        } else if (c >= 0x80) {
            int n = c >= 0xF0 ? 3 : c >= 0xE0 ? 2 : 1;
            if (c < 0xC2 || c > 0xF4) return NULL;
            for (; n > 0; n--, p++) if (((unsigned char)*p & 0xC0) != 0x80) return NULL;
        }
    }
    return p + 1;
}

static const char *json_number(const char *p) {
    if (*p == '-') p++;
    size_t n = strspn(p, "0123456789");
    if (n == 0 || (n > 1 && *p == '0')) return NULL;
    p += n;
    if (*p == '.') {
        n = strspn(++p, "0123456789");
        if (n == 0) return NULL;
        p += n;
    }
    if (*p != 'e' && *p != 'E') return p;
    p++;
    p += *p == '+' || *p == '-';
    n = strspn(p, "0123456789");
    return n ? p + n : NULL;
}

// The place behind a value (RFC 8259), or NULL.
static const char *json_value(const char *p) {
    static const char *const words[] = { "true", "false", "null" };
    char end = *p == '{' ? '}' : ']';
    if (*p == '"') return json_string(p);
    for (int i = 0; i < 3; i++) if (!strncmp(p, words[i], strlen(words[i]))) return p + strlen(words[i]);
    if (*p != '{' && *p != '[') return json_number(p);
    p = json_space(p + 1);
    if (*p == end) return p + 1;
    for (;;) {
        if (end == '}') {
            if (!(p = json_string(p))) return NULL;
            p = json_space(p);
            if (*p++ != ':') return NULL;
            p = json_space(p);
        }
        if (!(p = json_value(p))) return NULL;
        p = json_space(p);
        if (*p == end) return p + 1;
        if (*p++ != ',') return NULL;
        p = json_space(p);
    }
}

static bool is_json(const char *text) {
    const char *end = json_value(json_space(text));
    return end && !*json_space(end);
}

static void test_json(void) {
    static const char letters[] = "a\"\033\177\302\233\302\240\xFF";
    char line[80] = "";
    FILE *f = unnamed_file();
    put_json_string(f, letters, sizeof letters - 1);
    rewind(f);
    check(fgets(line, sizeof line, f) && !strcmp(line, "\"a\\\"\\u001b\\u007f\\u009b\302\240\\ufffd\""),
          "control characters as a JSON string: got %s", line);
    fclose(f);
    static const char *const right[] = { "{}", "[1, -0.5e+3, \"\\u00e9\\\"\", null]", "{\"a\": {\"b\": []}}\n" };
    static const char *const wrong[] = { "", "{", "[1,]", "{\"a\" 1}", "nan", "[01]", "\"\n\"", "\"\xE4\"", "[] []",
                                         "{a: 1}" };
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) check(is_json(right[i]), "%s: it is JSON", right[i]);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) check(!is_json(wrong[i]), "%s: it is not JSON", wrong[i]);
    static const struct { const char *arguments, *part; } printed[] = {
        { "$tied -m tokenize --json -f $T/bytes", "[1, " }, { "$qwen2 -m tokenize --json", "[]" },
        { "$tied -m tokenize --json --pieces -f $T/bytes", "\"piece\": " },
        { "$qwen2 -m tokenize --json --pieces -f tests/golden/chat.txt", "\\\\" },
        { "$tied -m inspect --json", "\"n_layers\": 2" }, { "$mixed -m inspect --json", "\"ffn_dim\": [64, 32]" },
        { "$v0 -m inspect --json", "\"container\": \"llama2.c\"" },
        { "$tied -m perplexity --json -f $T/text", "\"perplexity\": " },
        { "$T/loud.bin -m perplexity --json -f $T/text -c 64", "\"perplexity\": 3773020" },  // e^600, and not infinity
        { "$mixed -m bench --json -q --pp 8,3 --tg 2 --depth 0,5 --reps 2", "\"test\": \"tg2 @ d5\"" },
        { "$tied -m bench --json -q --pp 4 --tg 0 --exact --reps 1 -j 1", "\"percent_of_ceiling\": " },
        { "-m matmul --json -q --pp 1 --reps 1 -j 1", "\"test\": \"5632x2048 q4m x 1\"" },
    };
    for (size_t i = 0; i < sizeof printed / sizeof *printed; i++) {
        Result r = run_with(printed[i].arguments);
        check(r.status == 0 && is_json(r.out) && strstr(r.out, printed[i].part) && !*r.err,
              "./run %s: got status %d, \"%.100s\" and \"%s\", wanted JSON with %s", printed[i].arguments, r.status,
              r.out, r.err, printed[i].part);
        free_result(&r);
    }
}

// ---- What inspect says ----

// A model with these keys; a family's file where a name is of none.
static void make_named_model(const char *name, const char *title, uint32_t file_type) {
    unsigned char value[100];
    uint64_t n = strlen(title);
    Bytes b = read_golden("llama_tied.gguf");
    GgufParts g;
    take_apart(b, &g);
    memcpy(value, &n, 8);
    memcpy(value + 8, title, n);
    set_value(key_named(&g, "general.name", true), 8, value, 8 + n);
    set_value(key_named(&g, "general.file_type", true), 4, &file_type, 4);
    Bytes named = put_together(&g);
    put_file(name, named.bytes, named.n);
    free(named.bytes), free(b.bytes);
    free_parts(&g);
}

static void test_inspect(void) {
    static const struct { const char *model, *part; } parts[] = {
        { "$T/named.gguf",
          "  name                         A?[31mmodel \xC3\xA4\n  type                         Q4_K_M\n" },
        { "$T/odd.gguf", "  name                         odd.gguf\n  type                         F32\n" },
        { "$v0", "  name                         llama2c_v0.bin\n  type                         F32\n" },
        { "$tied", "activation                   SiLU\n" }, { "$tied", "angles                       global\n" },
        { "tests/golden/families/gemma3.gguf", "activation                   GELU\n" },
        { "tests/golden/families/gemma3.gguf --json", "\"angles\": [\"local\", " },
        { "tests/golden/families/gemma3.gguf --json", "\"activation\": \"GELU\"" },
        { "tests/golden/families/smollm3.gguf", "global global global none" },
        { "$tied --json", "\"total memory\": " }, { "$tied", "MiB, 0.0 of them cache: fits\n" },
    };
    make_named_model("named.gguf", "A\033[31mmodel \xC3\xA4", 15);
    make_named_model("odd.gguf", "", 999);
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++) {
        char text[100];
        snprintf(text, sizeof text, "%s -m inspect", parts[i].model);
        Result r = run_with(text);
        check(r.status == 0 && strstr(r.out, parts[i].part), "%s: got status %d and \"%s\", wanted \"%s\" in it", text,
              r.status, r.out, parts[i].part);
        free_result(&r);
    }
    // A token of $long: 2 layers x 3 heads x (a key of 4 numbers and a value, which has room for 16), and its id.
    for (int f32 = 0; f32 < 2; f32++) {
        Result r = run_with(f32 ? "$long -m inspect --fit --kv f32" : "$long -m inspect --fit --kv f16");
        int n = 0;
        for (int tokens = 1024; tokens <= 1 << 20; tokens *= 2) {
            char name[60];
            snprintf(name, sizeof name, "\n  total for %d tokens ", tokens);
            const char *line = strstr(r.out, name);
            double total = 0, cache = 0, wanted = tokens / 1048576.0 * (2 * 3 * (4 + 16) * (f32 ? 4 : 2) + 4);
            bool found = line && sscanf(line + strlen(name), "%lf MiB, %lf of them cache: ", &total, &cache) == 2;
            n += found && fabs(cache - wanted) < 0.06 + 0.01 * wanted && total > cache;
        }
        check(r.status == 0 && n == 11 && !strstr(r.out, "total for 2097152"),
              "--fit: got status %d, %d of 11 contexts, %s", r.status, n, r.out);
        free_result(&r);
    }
}

// ---- Files written ----

// Exports that fail leave nothing behind, and those that succeed take the place of what was there.
static void test_exports(void) {
    static const struct { const char *what, *text; } steps[] = {
        { "over another file", "echo junk >$T/over.bin; $EMULATOR ./run $tied -m export -o $T/over.bin && "
                               "cmp $T/over.bin $T/native.bin" },
        { "over itself", "$EMULATOR ./run $T/over.bin -m export -o $T/over.bin && cmp $T/over.bin $T/native.bin" },
        { "what is too large for the file system", "(trap '' XFSZ; ulimit -f 8; $EMULATOR ./run $tied -m export "
                                                   "-o $T/large.bin); test $? = 3 && test ! -e $T/large.bin" },
        { "over a file that stays if it fails", "(trap '' XFSZ; ulimit -f 8; $EMULATOR ./run $mixed -m export "
                                                "-o $T/over.bin); test $? = 3 && cmp $T/over.bin $T/native.bin" },
        { "and no other file is left", "test -z \"$(find $T -name '*tmp*' | grep -v '/cria[^/]*$')\"" },
        { "through a symbolic link", "ln -s over.bin $T/link; $EMULATOR ./run $tied -m export -o $T/link && "
                                     "test -L $T/link && cmp $T/over.bin $T/native.bin" },
        { "into a pipe", "mkfifo $T/pipe; cat $T/pipe >$T/piped & $EMULATOR ./run $tied -m export -o $T/pipe; wait; "
                         "test -p $T/pipe && cmp $T/piped $T/native.bin" },
        { "as logits, of the model that is being read", "$EMULATOR ./run $T/over.bin -q -m logits --ids '1 2' "
                                                        "-o $T/over.bin && test $(wc -c <$T/over.bin) -gt 8" },
        { "as logits, into a pipe", "cat $T/pipe >$T/piped & $EMULATOR ./run $tied -q -m logits --ids '1 2' -o $T/pipe "
                                    "&& wait && test $(wc -c <$T/piped) = 2216" },
        { "through a link to nothing", "ln -s nowhere $T/dangling; $EMULATOR ./run $tied -m export -o $T/dangling "
                                       "2>/dev/null; test $? = 3 && test -L $T/dangling && test ! -e $T/nowhere" },
        { "in f32, f16 and back: the first is the model's own", "for t in f32 f16; do $EMULATOR ./run $tied -m export "
          "--type $t -o $T/$t || exit; done; $EMULATOR ./run $T/f16 -m export --type f32 -o $T/again "
          "&& $EMULATOR ./run $T/again -m export --type f16 -o $T/over && "
          "cmp $T/f32 $T/native.bin && cmp $T/over $T/f16" },
        { "in q8, the same from one thread and from four", "for j in 1 4; do $EMULATOR ./run $mixed -q -m export "
          "--type q8 -j $j -o $T/j$j || exit; done; cmp $T/j1 $T/j4" },
        { "of a type that it has already: the same bytes", "$EMULATOR ./run $T/j1 -m export --type q8 -o $T/over && "
                                                           "cmp $T/over $T/j1" },
        { "over a file of another mode", "chmod 600 $T/over.bin; $EMULATOR ./run $tied -m export -o $T/over.bin && "
                                         "test $(stat -c %a $T/over.bin) = 600" },
        { "with quotes and blanks in its name", "$EMULATOR ./run $tied -m export -o \"$T/a 'b\" && "
                                                "cmp \"$T/a 'b\" $T/native.bin" },
    };
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        Result r = run_shell(steps[i].text);
        check(r.status == 0 && !*r.out, "an export %s: got status %d, \"%s\" and \"%s\"", steps[i].what, r.status,
              r.out, r.err);
        free_result(&r);
    }
}

// The picture of a bench is a whole SVG, with a point for each result.
static void test_picture(void) {
    Result r = run_with("$mixed -m bench -q --pp 4 --tg 2 --reps 1 -j 1 --svg $T/roof.svg");
    char *svg = read_text(temporary("roof.svg"));
    int n_points = 0;
    for (const char *p = svg; p && (p = strstr(p, "<circle")); p++) n_points++;
    check(r.status == 0 && svg && !strncmp(svg, "<svg ", 5) && n_points == 2 && strstr(svg, "</svg>\n") &&
              strstr(r.out, "| pp4 ") && strstr(r.out, "| tg2 "),
          "--svg: got status %d, %d points and \"%s\"", r.status, n_points, r.err);
    free(svg);
    free_result(&r);
}

// ---- What bench prints ----

// The value of the first member of that name in JSON that begins there; "" if there is none.
static const char *json_member(const char *object, const char *name) {
    static char value[4][100];
    static int next;
    char key[40], *to = value[next = (next + 1) % 4];
    snprintf(key, sizeof key, "\"%s\": ", name);
    const char *p = strstr(object, key), *begin = p ? p + strlen(key) : NULL, *end = p ? json_value(begin) : NULL;
    snprintf(to, sizeof value[0], "%.*s", end ? (int)(end - begin) : 0, end ? begin : "");
    return to;
}

// The steps that a model of two layers takes, and how often, by hand. A token alone is prepared by each thread for
// itself, without a step; and so is the row of one prompt that wants logits.
static void test_profile(void) {
    static const struct { const char *arguments, *steps; } cases[] = {
        { "$tied --pp 0 --tg 3",
          "embed 3, query, key, value 6, rotate, cache 6, attention 6, attention out 6, gate, up 6, down 6, "
          "logits 3, " },
        { "$tied --pp 3 --tg 0",
          "embed 1, attention norm 2, query, key, value 2, rotate, cache 2, attention 2, round attended 2, "
          "attention out 2, ffn norm 2, gate, up 2, round hidden 2, down 2, logits 1, " },
        { "$tied --pp 3 --tg 0 -b 2",  // two tokens, then one
          "embed 2, attention norm 2, query, key, value 4, rotate, cache 4, attention 4, round attended 2, "
          "attention out 4, ffn norm 2, gate, up 4, round hidden 2, down 4, logits 1, " },
        { "$tied --pp 0 --tg 2 --parallel 20",  // logits of 16, then of 4
          "embed 2, attention norm 4, query, key, value 4, rotate, cache 4, attention 4, round attended 4, "
          "attention out 4, ffn norm 4, gate, up 4, round hidden 4, down 4, final norm 4, logits 4, " },
        { "tests/golden/mixtral.gguf --pp 0 --tg 1",  // its two visits are prepared together
          "embed 1, query, key, value 2, rotate, cache 2, attention 2, attention out 2, router 2, choose experts 2, "
          "list visitors 2, round visitors 2, gate, up 2, round hidden 2, down 2, logits 1, " },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char arguments[200], got[1000] = "";
        double total = 0;
        snprintf(arguments, sizeof arguments, "%s -m bench --profile --json -q -j 2 --reps 2", cases[i].arguments);
        Result r = run_with(arguments);
        for (const char *p = r.out; (p = strstr(p, "{\"step\": \"")); p++) {
            double seconds = strtod(json_member(p, "seconds"), NULL);
            double waiting = strtod(json_member(p, "waiting_seconds"), NULL);
            const char *name = json_member(p, "step"), *rate = json_member(p, "gb_per_s");
            bool has_load = strstr("\"query, key, value\" \"attention\" \"attention out\" \"router\" \"gate, up\" "
                                   "\"down\" \"logits\"", name) != NULL;
            snprintf(got + strlen(got), sizeof got - strlen(got), "%.*s %s, ", (int)strlen(name) - 2, name + 1,
                     json_member(p, "calls"));
            check(seconds > 0 && waiting >= 0 && waiting <= seconds * 1.000001, "%s, step %s: %g s, of them %g waiting",
                  arguments, name, seconds, waiting);
            check(has_load ? strtod(rate, NULL) > 0 && strtod(json_member(p, "gop_per_s"), NULL) > 0
                           : !strcmp(rate, "null") && !strcmp(json_member(p, "gop_per_s"), "null"),
                  "%s, step %s: got %s GB/s and %s Gop/s", arguments, name, rate, json_member(p, "gop_per_s"));
            total += seconds;
        }
        check(r.status == 0 && is_json(r.out) && !strcmp(got, cases[i].steps), "%s: got the steps %s", arguments, got);
        check(total > 0 && total < 120, "%s: got %g seconds in all", arguments, total);
        free_result(&r);
    }
}

// A profile of two threads and two runs, of which the second thread has no part in the first step: the table's numbers
// by hand. Scores and the mix share the load of attention, which took 3 + 5 ms. A test that took no time has no rates.
static void test_profile_table(void) {
    static StepTime times[2][N_STEPS];
    static const char head[] = "  step                   calls         ms   share     GB/s    Gop/s   waiting ms\n";
    static const char *const wanted[] = {
        "  embed                      2      2.000   10.0 %        -        -        0.500\n"
        "  attention: scores          2      3.000   15.0 %      2.0     10.0        1.000\n"
        "  attention: mix             2      5.000   25.0 %      2.0     10.0        0.000\n"
        "  down                       2     10.000   50.0 %      0.6     12.0        2.000\n",
        "  embed                      2      0.000    0.0 %        -        -        0.000\n"
        "  down                       2      0.000    0.0 %        -        -        0.000\n", "",
    };
    Measured r = { .threads = 2 };
    r.steps[ATTEND] = (Load){ 16e6, 0, 8e7 }, r.steps[DOWN] = (Load){ 6e6, 1e8, 2e7 };
    options.reps = 2;
    profile = times;
    for (int i = 0; i < 3; i++) {
        char text[1000];
        memset(times, 0, sizeof times);
        for (int k = 0; k < 2 && i < 2; k++) times[k][DOWN].calls = 4;
        if (i < 2) times[0][EMBED].calls = 4;
        if (i == 0) {
            times[0][EMBED] = (StepTime){ 4, 0.004, 0.001 };
            times[0][SCORE] = (StepTime){ 4, 0.006, 0.001 }, times[1][SCORE] = (StepTime){ 4, 0.006, 0.003 };
            times[0][MIX] = times[1][MIX] = (StepTime){ 4, 0.010, 0 };
            times[0][DOWN] = (StepTime){ 4, 0.019, 0 }, times[1][DOWN] = (StepTime){ 4, 0.021, 0.008 };
        }
        fflush(stdout);
        int kept = exchange(stdout, temporary("profile"), O_WRONLY | O_CREAT | O_TRUNC);
        put_profile(&r);
        fflush(stdout);
        put_back(stdout, kept);
        char *got = read_text(temporary("profile"));
        snprintf(text, sizeof text, "%s%s", head, wanted[i]);
        check(got && !strcmp(got, text), "a profile, case %d: got\n%swanted\n%s", i, got ? got : "nothing\n", text);
        free(got);
    }
    profile = NULL;
    options.reps = 0;
}

// Each length of prompt and each number of texts at each depth, in order; and what was measured with what, and when.
static void test_bench(void) {
    static const char *const wanted[] = { "pp3", "tg2", "tg2 x 3", "tg2 x 20", "pp3 @ d5", "tg2 @ d5", "tg2 x 3 @ d5",
                                          "tg2 x 20 @ d5" };
    static const char *const parallel[] = { "", "1", "3", "20" };
    time_t before = time(NULL);
    Result r = run_with("$mixed -m bench --json -q --pp 3 --tg 2 --depth 0,5 --parallel 1,3,20 --reps 1 -j 2");
    char *cpus = read_text("/proc/cpuinfo"), cpu[100];
    const char *p = r.out;
    int n = 0;
    for (char *end; (p = strstr(p, "{\"model\": ")); p += 10, n++) {
        if ((end = strstr(p + 1, "{\"model\": "))) end[-1] = 0;
        char test[40], *name = cpu;
        struct tm t = { 0 };
        snprintf(test, sizeof test, "\"%s\"", wanted[n % 8]);
        snprintf(cpu, sizeof cpu, "%s", json_member(p, "cpu"));
        bool dated = sscanf(json_member(p, "date"), "\"%d-%d-%dT%d:%d:%dZ\"", &t.tm_year, &t.tm_mon, &t.tm_mday,
                            &t.tm_hour, &t.tm_min, &t.tm_sec) == 6;
        t.tm_year -= 1900, t.tm_mon--;
        time_t date = timegm(&t);
        check(!strcmp(json_member(p, "test"), test) && !strcmp(json_member(p, "parallel"), parallel[n % 4]),
              "bench, result %d: got %s and parallel %s, wanted %s", n, json_member(p, "test"),
              json_member(p, "parallel"), test);
        check(dated && date >= before && date <= time(NULL), "bench, result %d: got the date %s", n,
              json_member(p, "date"));
        check(strpbrk(json_member(p, "compiler"), "0123456789"), "bench, result %d: got the compiler %s", n,
              json_member(p, "compiler"));
        if (strlen(cpu) > 2) cpu[strlen(cpu) - 1] = 0, name++;
        check(strlen(name) > 0 && (!cpus || !strstr(cpus, "model name") || strstr(cpus, name)),
              "bench, result %d: got the CPU %s", n, name);
        if (end) end[-1] = ' ';
    }
    check(r.status == 0 && n == 8 && is_json(r.out), "bench: got status %d and %d results, wanted 8", r.status, n);
    free(cpus);
    free_result(&r);
}

// ---- The environment ----

// The address sanitizer makes frames several times as large: 64 kB do not hold them.
#if defined(__SANITIZE_ADDRESS__)
#define HAS_LARGE_FRAMES 1
#elif defined(__has_feature)
#define HAS_LARGE_FRAMES __has_feature(address_sanitizer)
#else
#define HAS_LARGE_FRAMES 0
#endif

// $long with a text that takes several threads, and their stacks, in every kernel: they are asked for by their names.
static void test_small_stacks(void) {
    Result list = run_with("$long -m inspect --kernel none");
    char *kernel = strstr(list.err, "has "), text[256];
    for (kernel = kernel ? strtok(kernel + 4, ", \n") : NULL; kernel; kernel = strtok(NULL, ", \n")) {
        static const char *const how[] = { "", "OMP_STACKSIZE=16k", "OMP_STACKSIZE=1k", "ulimit -s 64;" };
        enum { N = HAS_LARGE_FRAMES ? 3 : 4 };
        Result r[N];
        for (int i = 0; i < N; i++) {
            snprintf(text, sizeof text, "%s $EMULATOR ./run $long -q -t 0 -n 3 -f $T/text -j 3 --kernel %s", how[i],
                     kernel);
            r[i] = run_shell(text);
            check(r[i].status == 0 && r[i].n_out > 1000 && !strcmp(r[i].out, r[0].out),
                  "%s: got status %d, %zu bytes and \"%s\", wanted the same text as without", text, r[i].status,
                  r[i].n_out, r[i].err);
        }
        for (int i = 0; i < N; i++) free_result(&r[i]);
    }
    free_result(&list);
}

static void test_environment(void) {
    static const char *const variables[] = {
        "OMP_NUM_THREADS=100000", "OMP_NUM_THREADS=0", "OMP_NUM_THREADS=1", "OMP_THREAD_LIMIT=1", "OMP_DYNAMIC=true",
        "OMP_WAIT_POLICY=active", "LC_ALL=de_DE.UTF-8", "LC_ALL=C", "TERM=", "HOME=",
#ifndef __clang__
        "OMP_NUM_THREADS=abc",  // this makes LLVM's OpenMP 14 start as many threads as some memory says, and abort
#endif
    };
    Result wanted = run_with("$mixed -q -s 5 -t 0.7 -p 0.95 -n 20 -i Once -j 3");
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++) {
        char text[200];
        snprintf(text, sizeof text, "%s $EMULATOR ./run $mixed -q -s 5 -t 0.7 -p 0.95 -n 20 -i Once -j 3",
                 variables[i]);
        Result r = run_shell(text);
        check(r.status == 0 && r.n_out == wanted.n_out && !memcmp(r.out, wanted.out, r.n_out) && r.n_out > 5,
              "with %s: got status %d and \"%s\", wanted \"%s\"", variables[i], r.status, r.out, wanted.out);
        free_result(&r);
    }
    free_result(&wanted);
    // Little memory: status 4. Not where even a small context does not fit, as in a sanitizer or an emulator.
    Result small = run_shell("ulimit -v 150000 && $EMULATOR ./run $long -j 1 -q -t 0 -n 1 -c 64");
    if (small.status == 0) {
        Result r = run_shell("ulimit -v 150000 && exec $EMULATOR ./run $long -j 1 -q -t 0 -n 1 -c 0");
        check(r.status == 4 && !*r.out && is_error_line(r.err) && strstr(r.err, "memory"),
              "a context of 2^20 in 150 MB: got status %d and \"%s\", wanted 4", r.status, r.err);
        free_result(&r);
    }
    free_result(&small);
}

// ---- Chats ----

// Three turns in this process: before each answer all that was said goes through the model again, from the beginning.
static void put_reference_chat(const char *const *said, int n_said, int limit, Buffer *out) {
    Opened o;
    Error e = { 0 };
    Runner s = { .w = { .n = 0 } };
    Tokens all = { 0 };
    if (!check(open_bytes(&o, read_bytes(temporary("long.gguf")), &e), "long.gguf: got \"%s\"", e.text)) return;
    const Model *m = &o.model;
    bool ok = make_runner(m, (Settings){ 1, 1024, 16, false, true }, &s, &e) && emit(&all, m->tokenizer.bos, &e);
    for (int turn = 0; ok && turn < n_said; turn++) {
        Span spans[] = { { "[INST] ", 7, true }, { said[turn], strlen(said[turn]), false }, { " [/INST]", 8, true } };
        int last = -1;
        ok = (turn == 0 || emit(&all, m->tokenizer.eos, &e)) && encode(&m->tokenizer, spans, 3, &all, &e);
        for (int n = 0; ok && n < limit; n++) {
            size_t n_bytes;
            rewind_sequence(&s.text, 0);
            ok = prefill(m, &s.w, &s.text, all.ids, all.n, NULL, &e);
            int token = likeliest(s.w.logits, m->config.n_tokens);
            if (is_end_token(&m->tokenizer, token)) break;
            const char *bytes = decode(&m->tokenizer, last, token, &n_bytes);
            put_text_into(out, bytes, n_bytes);
            ok = ok && emit(&all, token, &e);
            last = token;
        }
        put_text_into(out, "\n", 1);
    }
    check(ok, "three turns in this process: got \"%s\"", e.text);
    free(all.ids);
    free_runner(&s);
    close_opened(&o);
}

static void test_chats(void) {
    static const char *const said[] = { "Hi there", "Who are you?", "\xC3\xA4 </s>" };
    static const char *const how[] = {
        "$long -m chat -t 0 -q -n %d <$T/said",
        "$long -m chat -t 0 -q -n %d -b 3 -j 3 -c 1000 <$T/said3",
        "$long -m chat -t 0 -q -n %d --template mistral <$T/said",
    };
    write_text("said", "Hi there\nWho are you?\n\xC3\xA4 </s>\n");
    write_text("said3", "Hi there\r\nWho are you?\r\n\xC3\xA4 </s>");
    for (int limit = 1; limit <= 30; limit += 29) {
        Buffer wanted = { 0 };
        put_reference_chat(said, 3, limit, &wanted);
        for (size_t i = 0; i < sizeof how / sizeof *how; i++) {
            char arguments[200];
            snprintf(arguments, sizeof arguments, how[i], limit);
            Result r = run_with(arguments);
            check(r.status == 0 && r.n_out == wanted.n && !memcmp(r.out, wanted.bytes, wanted.n) && !*r.err,
                  "%s: got status %d, \"%s\" and \"%s\", wanted \"%.*s\"", arguments, r.status, r.out, r.err,
                  (int)wanted.n, (char *)wanted.bytes);
            free_result(&r);
        }
        free(wanted.bytes);
    }
    Result none = run_with("$tied -m chat -t 0 -q -n 9 -i Hi --template zephyr");
    Result brief = run_with("$tied -m chat -t 0 -q -n 9 -i Hi --template zephyr -y 'Be brief'");
    Result sys = run_with("$tied -m chat -t 0 -q -n 9 -i Hi --template zephyr -sys 'Be brief'");
    check(none.status == 0 && strcmp(none.out, brief.out), "-y: got \"%s\", the same as without", brief.out);
    check(brief.status == 0 && !strcmp(brief.out, sys.out), "-sys: got \"%s\", wanted -y's \"%s\"", sys.out, brief.out);
    free_result(&none);
    free_result(&brief);
    free_result(&sys);
}

// ---- Conversations ----

// A chat that a file begins, one answer, a full context, thoughts, a transcript: against chats that say the same.
static void test_conversations(void) {
    static const struct { const char *one, *other; } equal[] = {
        { "-st <$T/lines", "-i \"$(cat $T/lines)\" </dev/null" },
        { "-st -i Hi", "-i Hi </dev/null" },
        { "-st --messages $T/asked.json", "-i 'Hi there' </dev/null" },
        { "-st --messages $T/asked2.json", "-i 'Hi there' </dev/null" },
        { "--single-turn --messages $T/told.json -i 'Who?' </dev/null", "--messages $T/told.json <$T/who" },
        { "--template zephyr -st --messages $T/system.json", "--template zephyr -y Brief -i a </dev/null" },
        { "--template zephyr -st --messages $T/system.json -y Long", "--template zephyr -y Long -i a </dev/null" },
        { "--template mistral -c 64 -n 20 <$T/many | tail -n 1", "--template mistral -i 'q q q q q q z' </dev/null" },
    };
    write_text("lines", "Hi\nthere\n");
    write_text("who", "Who?");
    write_text("role.json", "[{\"role\": 1, \"content\": \"a\"}]");
    write_text("asked.json", "[{\"role\": \"user\", \"content\": \"Hi\\u0020there\"}]");
    write_text("asked2.json", "\xEF\xBB\xBF{\"x\": 1, "
               "\"messages\": [{\"content\": \"Hi there\", \"role\": \"user\", \"n\": 2}]}");
    write_text("told.json", "[{\"role\":\"user\",\"content\":\"a\"},{\"role\":\"assistant\",\"content\":\"b c\"}]");
    write_text("system.json", "[{\"role\":\"system\",\"content\":\"Brief\"},{\"role\":\"user\",\"content\":\"a\"}]");
    write_text("many", "a a a a a a\nb b b b b b\nc c c c c c\nq q q q q q z\n");
    write_text("bad.json", "[{\"role\": \"user\"}]");
    char *big = get(4000000);
    memset(big, 'a', 4000000);
    put_file("big", big, 4000000);
    free(big);
    write_text("refuses",
               "{{ messages[0].content }}{% if messages|length > 1 %}{{ raise_exception('no') }}{% endif %}");
    for (size_t i = 0; i < sizeof equal / sizeof *equal; i++) {
        char one[200], other[200];
        snprintf(one, sizeof one, "$long -m chat -t 0 -q -n 9 %s", equal[i].one);
        snprintf(other, sizeof other, "$long -m chat -t 0 -q -n %d %s", strstr(one, "-n 20") ? 20 : 9, equal[i].other);
        Result r = run_with(one), wanted = run_with(other);
        check(r.status == 0 && r.n_out > 3 && r.n_out == wanted.n_out && !memcmp(r.out, wanted.out, r.n_out),
              "%s: got status %d, \"%s\" and \"%s\", wanted %s's \"%s\"", one, r.status, r.out, r.err, other,
              wanted.out);
        free_result(&r);
        free_result(&wanted);
    }
    static const Case cases_of_chats[] = {
        { "$long -m chat -t 0 -q -c 64 -n 20 <$T/many", 0, "",
          "[the context is full: the oldest 2 messages are forgotten]\n" },
        { "$long -m chat -t 0 -q -c 64 -n 20 --no-shift <$T/many", 5, "",
          "the context has 64 of the model's 1048576; see -c\n" },
        { "$long -m chat -st -q </dev/null", 2, NULL, "nothing to answer" },
        { "$long -m chat -st -i a --think maybe", 2, NULL, "--think maybe: expected on, off or hide" },
        { "$long -m chat -st -i a --log $T/none/log", 3, NULL, "--log" },
        { "$long -m chat -st -i a --messages $T/none", 3, NULL, "none: No such file" },
        { "$long -m chat -st -i a --messages $T/lines", 1, NULL, "lines: line 1, column 1 is not JSON" },
        { "$long -m chat -st -i a --messages $T/bad.json", 1, NULL, "message 1 needs a role and a content" },
        { "$long -m chat -st -i a --messages $T/empty", 1, NULL, "not JSON" },
        { "$long -m chat -st -i /help -n 3 -t 0 -q", 0, "", NULL },
        { "$long -m chat -st -t 0 -i a --template $T/empty", 2, NULL,
          "the chat template makes no text of these messages" },
        { "$long -m render --messages $T/asked.json --template $T/refuses --pieces", 0, "", NULL },
        { "$long -m render --messages $T/role.json --template chatml", 1, "", "message 1 is not {" },
        { "$long -m chat -st -q <$T/big", 5, NULL, "positions, the context has 4096" },
        { "$long -m render --messages $T/asked.json --think maybe", 2, NULL, "--think maybe: expected" },
        { "$long -m chat -st -t 0 -q -n 2 -i a --template $T/refuses", 0, "", NULL },
        { "$long --json --session $T/none -t 0 -n 1 -i a", 0, "", "--session is not used with" },
    };
    for (size_t i = 0; i < sizeof cases_of_chats / sizeof *cases_of_chats; i++) check_case(&cases_of_chats[i]);
    Result r = run_with("$long -m chat -t 0 -q -n 0 -st -i 'a\n' --log $T/log && $EMULATOR ./run $long -m chat -t 0 -q "
                        "-n 4 -st -i b --log $T/log");
    Result log = run_shell("cat $T/log");
    char wanted[200];
    snprintf(wanted, sizeof wanted, "user: a\n\n\nassistant: \n\nuser: b\n\nassistant: %s\n", r.out + 1);
    check(r.status == 0 && !strcmp(log.out, wanted), "--log: got \"%s\", wanted \"%s\"", log.out, wanted);
    free_result(&r);
    free_result(&log);
}

// With --json an answer is an object, with the text that is printed otherwise. A transcript has what is said now, not
// the history. The seed is told once, and not of a chat that never starts.
static void test_chat_output(void) {
    static const char *const chats[] = { "-m chat -t 0 -q -n 4 <$T/said", "-m chat -st -t 0 -q -n 4 -i Hi" };
    for (int i = 0; i < 2; i++) {
        char plain[100], json[100];
        snprintf(plain, sizeof plain, "$long %s", chats[i]);
        snprintf(json, sizeof json, "$long --json %s", chats[i]);
        Result wanted = run_with(plain), r = run_with(json);
        const char *line = r.out, *text = wanted.out;
        int n = 0;
        for (; *line; line += strcspn(line, "\n") + 1, text += strcspn(text, "\n") + 1, n++) {
            Pool pool = { 0 };
            Value v = { 0 };
            Error e;
            bool ok = parse_json(line, strcspn(line, "\n"), &pool, &v, &e);
            const Value *got = find_member(&v, "text"), *ids = find_member(&v, "ids");
            const Value *stop = find_member(&v, "stop");
            const Value *n_tokens = find_member(&v, "tokens"), *n_prompt = find_member(&v, "prompt_tokens");
            bool same = got && got->n == strcspn(text, "\n") && !memcmp(got->text, text, got->n);
            check(ok && same && stop && ids &&
                      same_text(*stop, "limit") && ids->n == 4 && n_tokens->integer == 4 && n_prompt->integer > 0,
                  "%s: got %s", json, r.out);
            free_pool(&pool);
        }
        check(r.status == 0 && n == (i ? 1 : 3) && !*text, "%s: got status %d and %d lines", json, r.status, n);
        free_result(&wanted), free_result(&r);
    }
    Result r = run_with("$long -m chat -t 0 -q -n 0 -st --messages $T/told.json -i x --log $T/log2; cat $T/log2 >&2");
    check(!strcmp(r.err, "user: x\n\nassistant: \n\n"), "--log with --messages: got \"%s\"", r.err);
    free_result(&r);
    r = run_with("$long -m chat -n 1 <$T/said");
    const char *seed = strstr(r.err, "seed ");
    check(seed && !strstr(seed + 1, "seed "), "the seed of a chat: got \"%s\"", r.err);
    free_result(&r);
    r = run_with("$long -m chat -st -i a --template $T/empty");
    check(r.status == 2 && !strstr(r.err, "seed"), "a chat that never starts: got \"%s\"", r.err);
    free_result(&r);
}

// Where an answer may go on in what a template makes of it. Capital letters are the template's.
static void test_continued_answers(void) {
    static const struct { const char *said, *asked, *wanted; } cases[] = {
        { "UuEAaE", "UuEA", "UuEAa" }, { "UuEAE", "UuEA", "UuEA" }, { "UuEAE", "UuEAT", "UuEAT" },
        { "UuEAaE", "UuEAT", "UuEAa" }, { "UuEATaE", "UuEAT", "UuEATa" }, { "AE", "", "" }, { "AaE", "", "Aa" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Rendered two[2] = { { .text = { 0 } } };
        Error e;
        for (int k = 0; k < 2; k++)
            for (const char *p = k ? cases[i].asked : cases[i].said; *p; p++)
                append(&two[k].text, p, 1, &e), append(&two[k].marks, isupper((unsigned char)*p) ? "\1" : "", 1, &e);
        cut_end(&two[0], &two[1]);
        check(two[0].text.n == strlen(cases[i].wanted) && !memcmp(two[0].text.bytes, cases[i].wanted, two[0].text.n),
              "%s, asked for by %s: got \"%.*s\", wanted \"%s\"", cases[i].said, cases[i].asked, (int)two[0].text.n,
              (char *)two[0].text.bytes, cases[i].wanted);
        free_rendered(&two[0]);
        free_rendered(&two[1]);
    }
    check(find_thought("a", 1) == 1 && find_thought("a<think>b", 9) == 1 &&
          find_thought("<think>a</think>", 16) == 16 &&
          find_thought("<think></think><think>", 22) == 15, "an answer within a thought");
}

// What is printed of a text with thoughts, whatever its parts.
static void test_thoughts(void) {
    static const struct { size_t state; const char *text, *wanted; } texts[] = {
        { WATCHED, "a<think>b</think>\n\nc", "ac" }, { WATCHED, "<think>b</think>", "" },
        { WATCHED, "a<thin", "a<thin" },
        { WATCHED, "<<think>b<</think>c", "<c" }, { WATCHED, "<think>b", "" }, { WATCHED, "<think>b</thin", "" },
        { HIDDEN, "b</think> c\n", "c\n" }, { HIDDEN, "b<think></thin</think>\xC3\xA4", "\xC3\xA4" },
        { WATCHED, "\xC3\xA4<think>\xC3\xA4</think>\xE4\xBD", "\xC3\xA4\xE4\xBD" },
        { WATCHED, "a</think>b <think>c</think> <think>d</think> e", "a</think>b e" },
        { PRINTED, "<think>b</think>", "<think>b</think>" }, { WATCHED, "\xE4<think>x</think>y", "\xE4y" },
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        for (size_t step = 1; step < 6; step++) {
            Printer p = { .thought = texts[i].state, .stops = &(Texts){ 1, { "a<thinking>" } } };
            size_t n = strlen(texts[i].text);
            fflush(stdout);
            int kept = exchange(stdout, temporary("printed"), O_WRONLY | O_CREAT | O_TRUNC);
            for (size_t at = 0; at < n; at += step) print_bytes(&p, texts[i].text + at, n - at < step ? n - at : step);
            print_bytes(&p, NULL, 0);
            put_back(stdout, kept);
            char *got = read_text(temporary("printed"));
            check(got && !strcmp(got, texts[i].wanted), "\"%s\" in parts of %zu: got \"%s\", wanted \"%s\"",
                  texts[i].text, step, got ? got : "nothing", texts[i].wanted);
            free(got);
        }
    }
}

// Whether a prompt has been drawn, with nothing typed yet. (One with a text comes each time that a key is seen.)
static bool has_prompt(const char *shown) {
    return strstr(shown, "\033[J> \r\033[2C") || strstr(shown, "\033[J. \r\033[2C");
}

// Reads what a terminal shows until this part comes (NULL: a prompt), or for 30 seconds.
static bool wait_for_screen(int terminal, const char *part) {
    char shown[65536] = "";
    size_t n = 0;
    for (int i = 0; i < 6000 && !(part ? strstr(shown, part) != NULL : has_prompt(shown)); i++) {
        struct pollfd ready = { .fd = terminal, .events = POLLIN };
        ssize_t now = poll(&ready, 1, 5) > 0 ? read(terminal, shown + n, sizeof shown - 1 - n) : 0;
        for (ssize_t k = 0; k < now; k++) if (!shown[n + (size_t)k]) shown[n + (size_t)k] = '?';
        if (now > 0) n += (size_t)now;
        if (n > sizeof shown / 2) memmove(shown, shown + n - 1000, 1001), n = 1000;
        shown[n] = 0;
    }
    return part ? strstr(shown, part) != NULL : has_prompt(shown);
}

// A chat at a terminal. `keys` are pressed one after the other: where an answer or a command ends, there is a prompt
// again. At last the screen shows `shown` if a signal is sent. The terminal is as before when the chat ends, and the
// conversation in $T/chat.json is `saved`.
static void check_typed(const char *const *keys, int status, int number, const char *shown, const char *saved) {
    char text[256];
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal < 0 || grantpt(terminal) || unlockpt(terminal)) return;  // not every system has them
    int slave = open(ptsname(terminal), O_RDWR | O_NOCTTY);
    struct termios before = { 0 }, after = { 0 };
    struct winsize size = { .ws_row = 10, .ws_col = 40 };
    bool ok = slave >= 0 && !tcgetattr(slave, &before) && !ioctl(slave, TIOCSWINSZ, &size);
    unlink(temporary("chat.json"));
    snprintf(text, sizeof text, "exec $EMULATOR ./run $long -m chat -t 0 -n 3 -q <%s 2>%s",
             ptsname(terminal), ptsname(terminal));
    Command c = start_command(text, false, -1);
    for (; ok && *keys; keys++) {
        ok = wait_for_screen(terminal, NULL);
        size_t n = strlen(*keys);
        for (size_t at = 0; ok && at < n;) {
            ssize_t now = write(terminal, *keys + at, n - at < 1000 ? n - at : 1000);
            ok = now > 0;
            at += ok ? (size_t)now : 0;
        }
    }
    if (number) {
        ok = ok && wait_for_screen(terminal, shown);
        for (int i = 0; i < 2000 && saved && !file_exists(temporary("chat.json")); i++) usleep(5000);
        kill(c.pid, number);
    }
    Result r = end_command(&c);
    ok = ok && !tcgetattr(slave, &after);
    char *got = read_text(temporary("chat.json"));
    for (char *a = got ? strstr(got, "\"assistant\"") : NULL, *end; a; a = strstr(a + 1, "\"assistant\"")) {
        end = strchr(a, '\n');  // what a random model says is cut out
        if (end) memmove(a + 11, end - (end[-1] == ','), strlen(end - (end[-1] == ',')) + 1);
    }
    check(ok && r.status == status && !memcmp(&before, &after, sizeof before) &&
              (!saved || (got && !strcmp(got, saved))),
          "typed \"%.99s\": got status %d, the terminal %s, and %.900s; wanted %d and %.900s",
          ok ? "all" : *keys, r.status,
          ok && !memcmp(&before, &after, sizeof before) ? "as before" : "changed", got ? got : "no file", status,
          saved ? saved : "nothing");
    free(got);
    free_result(&r);
    close(slave), close(terminal);
}

#define SAID(text) "\n  {\"role\": \"user\", \"content\": \"" text "\"},\n  {\"role\": \"assistant\""
#define CHAT(turns) "{\"messages\": [" turns "\n]}\n"

static void test_typing(void) {
    enum { LONG = 20000 };
    const char *save = temporary("chat.json");
    char saves[160], loads[160], *paste = get(LONG + 100), *pasted = get(2 * LONG + 200);
    snprintf(saves, sizeof saves, "/save %s \r", save);
    snprintf(loads, sizeof loads, "/load %s\r", save);
    const char *const edits[] = { "ac\033[Db\r", "\033[A\033[1~x\033OFy\r", "one two\027three\r",
                                  "\xE4\xB8\x96\xF0\x9F\x98\x80z\033[D\177\006e\xCC\x81\002\002q\r",
                                  "abc\001\013d\x05" "e\r",
                                  "abc\002\025\033[3~x\r", "draft\020\016ed\r", saves, "\4", NULL };
    check_typed(edits, 0, 0, NULL, CHAT(SAID("abc") "," SAID("xabcy") "," SAID("one three") ","
                                        SAID("\xE4\xB8\x96qze\xCC\x81")
                                  "," SAID("de") "," SAID("x") "," SAID("drafted")));
    const char *const stray[] = { "\x80\001\xC3", NULL };  // a byte before a stray one makes a character with it
    check_typed(stray, 128 + SIGTERM, SIGTERM, "\xC3\x80", NULL);
    const char *const lines[] = { "\"\"\"a\r", "/undo\"\"\"\r", "b\\\r", "c\r", "not this\3", "\r", "\"\"\"\"\"\"\r",
                                  "/nothing\r",
                                  "/* no\r", saves, "/bye\r", NULL };
    check_typed(lines, 0, 0, NULL, CHAT(SAID("a\\u000a/undo") "," SAID("b\\u000ac") "," SAID("") "," SAID("/* no")));
    const char *const turns[] = { "a\r", "b\r", "/undo\r", "/system S\r", "/regen\r", "/continue\r", saves, "/clear\r",
                                  "c\r", loads, "/tokens\r", "/save\r", "/read nowhere\r", "/system\r", saves,
                                  "/help\r",
                                  "\3", "\3", NULL };
    check_typed(turns, 130, 0, NULL, CHAT(SAID("a")));
    for (size_t size = 600; size <= LONG; size += LONG - 600) {
        size_t n = (size_t)sprintf(paste, "\033[200~"), m = 0;
        for (int i = 0; n < size; i++) {
            n += (size_t)sprintf(paste + n, "/line %d\t\"\"\" \\\r", i);
            m += (size_t)sprintf(pasted + m, "%s/line %d\\u0009\\\"\\\"\\\" \\\\", i ? "\\u000a" : "", i);
        }
        for (size_t i = 0; i < n; i++) paste[i] = paste[i] == '\r' ? '\n' : paste[i];
        put_file("pasted", paste + 6, n - 6 - 1);
        Result r = run_with("$long -m chat -t 0 -n 3 -q -st <$T/pasted");
        sprintf(paste + n, "\033[201~\r");
        char *wanted = get(m + 200), *needed = strstr(r.err, "needs");
        sprintf(wanted, CHAT(SAID("%s")), pasted);
        check(r.status == (size == LONG ? 5 : 0) && !needed == (size < LONG), "a text of %zu bytes: got status %d",
              size, r.status);
        if (needed) needed[strcspn(needed, ",")] = 0;
        if (needed) check_typed((const char *const[]){ paste, NULL }, 128 + SIGTERM, SIGTERM, needed, NULL);
        else check_typed((const char *const[]){ paste, saves, NULL }, 128 + SIGTERM, SIGTERM, "> ", wanted);
        free(wanted);
        free_result(&r);
    }
    check_typed((const char *const[]){ NULL }, 130, SIGINT, "> ", NULL);
    free(paste), free(pasted);
}

// ---- Signals ----

// A message with which $long writes on and on, found by trying some; `mode` is -m chat or nothing.
static bool make_endless(const char *mode, char *command, size_t size) {
    for (char message = 'a'; message <= 'z'; message++) {
        snprintf(command, size, "$long %s -t 0 -c 0 -j 1 -n 2000 -i %c", mode, message);
        Result r = run_with(command);
        bool endless = r.status == 0 && strstr(r.err, "stopped at -n tokens");
        snprintf(command, size, "exec $EMULATOR ./run $long %s -t 0 -c 0 -j 1 -n -1 -i %c", mode, message);
        free_result(&r);
        if (endless) return true;
    }
    return check(false, "no message makes long.gguf write 2000 tokens %s", mode);
}

// What a command that was started leaves behind when this signal has ended it.
static Result end_by(Command *c, int number) {
    kill(c->pid, number);
    return end_command(c);
}

// A command that writes for some seconds, and whether it has begun.
static const char writes_long[] = "exec $EMULATOR ./run $long -q -m logits -f $T/long_text -c 0 -j 3 -o $T/logits.out";

static bool has_unfinished_file(void) {
    Result r = run_shell("ls $T | grep -c '^logits.out.*tmp$'");
    bool found = !strcmp(r.out, "1\n");
    free_result(&r);
    return found;
}

// A file that is being written under a temporary name goes, whatever ends the program; and no other takes its place.
static void test_unfinished_files(void) {
    static const int numbers[] = { SIGTERM, SIGHUP, SIGINT, SIGQUIT, SIGPIPE, SIGXCPU };
    Result r = run_shell("for i in 1 2 3 4 5 6 7 8; do cat $T/text $T/text $T/text $T/text; done >$T/long_text;"
                         "for i in 1 2 3 4 5 6 7 8 9; do $EMULATOR ./run $tied $t <$T/long_text; done >$T/long_ids");
    free_result(&r);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        bool begun = false, ours = numbers[i] != SIGXCPU;  // which we leave alone
        Command c = start_command(writes_long, false, -1);
        for (int k = 0; k < 1000 && !begun; k++, usleep(2000)) begun = has_unfinished_file();
        r = end_by(&c, numbers[i]);
        Result left = run_shell("ls $T | grep '^logits.out'; rm -f $T/logits.out*");
        check(begun && r.status == (numbers[i] == SIGINT ? 130 : 128 + numbers[i]) && (!*left.out) == ours && !*r.err,
              "signal %d while a file is written: got status %d, \"%s\", and %s, wanted nothing left", numbers[i],
              r.status, r.err, left.out);
        free_result(&r);
        free_result(&left);
    }
}

// A model's file that becomes shorter while it is used, by one thread or several; or between two messages.
static void test_shrunk_files(const char *endless) {
    const char *commands[] = { endless, writes_long, "exec $EMULATOR ./run $long -q -m chat -t 0" };
    Result r = run_with("$long -m export -o $T/whole.bin");
    free_result(&r);
    for (int i = 0; i < 3; i++) {
        char text[256];
        r = run_shell("cp $T/whole.bin $T/shrinks.bin");
        free_result(&r);
        snprintf(text, sizeof text, "long=$T/shrinks.bin; %s", commands[i]);
        Command c = start_command(text, true, -1);
        bool begun = i == 0 && wait_for(&c, c.out, 50, NULL);
        for (int k = 0; k < 1000 && i == 1 && !begun; k++, usleep(2000)) begun = has_unfinished_file();
        if (i == 2) begun = write(c.to_stdin, "a\n", 2) == 2 && wait_for(&c, c.out, 1, NULL);
        check(truncate(temporary("shrinks.bin"), 0) == 0, "shrinks.bin cannot be cut");
        bool sent = i == 2 && write(c.to_stdin, "a\n", 2) == 2;  // it may have ended before
        r = end_command(&c);
        char *line = strstr(r.err, "run: ");
        check((begun || sent) && r.status == 3 && line && is_error_line(line) &&
                  strstr(line, "shrinks.bin: became shorter") && !has_unfinished_file(),
              "%s, and its file is cut: got status %d and \"%s\", wanted 3", text, r.status, r.err);
        free_result(&r);
    }
}

// Of a text that steers a terminal, the terminal gets question marks; what is no terminal gets the bytes as they are.
static void test_terminal(void) {
    static const struct { const char *command, *wanted, *raw; } cases[] = {
        { "$tied -q -t 0 -n 0 -f $T/escapes", "a?[31m??b\t\xC3\xA4??\r\nc\r\n",
          "a\033[31m\302\233b\t\xC3\xA4\177\r\nc\n" },
        { "$qwen2 -q -t 0 -n 0 -f $T/escapes", "a?[31m??b\t\xC3\xA4??\r\nc\r\n",
          "a\033[31m\302\233b\t\xC3\xA4\177\r\nc\n" },
        { "$tied -q -t 0 -n 0 -f $T/cut", "a?\r\n", "a\x9B\n" },
    };
    write_text("escapes", "a\033[31m\302\233b\t\xC3\xA4\177\r\nc");
    write_text("cut", "a\x9B");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[200], got[400] = "";
        int terminal = posix_openpt(O_RDWR | O_NOCTTY);
        if (terminal < 0 || grantpt(terminal) || unlockpt(terminal)) return;  // not every system has them
        int slave = open(ptsname(terminal), O_RDWR | O_NOCTTY);
        snprintf(text, sizeof text, "$EMULATOR ./run %s", cases[i].command);
        Command c = start_command(text, false, slave);
        close(slave);
        for (ssize_t n = 0, now; (now = read(terminal, got + n, sizeof got - 1 - (size_t)n)) > 0;) n += now;
        Result on_terminal = end_command(&c), r = run_with(cases[i].command);
        check(on_terminal.status == 0 && !strcmp(got, cases[i].wanted),
              "%s on a terminal: got status %d and \"%s\", wanted \"%s\"", text, on_terminal.status, got,
              cases[i].wanted);
        check(!strcmp(r.out, cases[i].raw), "%s into a file: got \"%s\", wanted the bytes as they are", text, r.out);
        close(terminal);
        free_result(&on_terminal);
        free_result(&r);
    }
}

// The system is asked once what stdout is, however much is printed.
static void test_printing(void) {
    char text[1000];
    Printer printer = { .n_held = 0 };
    memset(text, 'a', sizeof text);
    fflush(stdout);
    int kept = exchange(stdout, "/dev/null", O_WRONLY);
    n_isatty = 0;
    print_bytes(&printer, text, sizeof text);
    print_bytes(&printer, NULL, 0);
    put_back(stdout, kept);
    check(n_isatty <= 1, "printing %zu bytes asks %zu times what stdout is", sizeof text, n_isatty);
}

// Random texts in random parts, against a search in the whole text: the stop text that ends first ends it, of several
// that end there the longest. All before it is printed, and without one everything.
static void test_stop_texts(void) {
    static const char *const letters[] = { "a", "b", "\xC3\xA9", "\xE2\x82\xAC", "\xE2", "\n" };
    for (int round = 0; round < 400; round++) {
        char text[200] = "", stop[4][16] = { "" }, file[40];
        Texts stops = { .n = (int)random_below(5) };
        Printer printer = { .stops = &stops };
        size_t most = 1 + random_below(6), best_end = SIZE_MAX, cut = 0;
        for (size_t i = random_below(40); i > 0; i--) strcat(text, letters[random_below(most)]);
        size_t n = strlen(text);
        for (int i = 0; i < stops.n; i++) {
            for (size_t k = 1 + random_below(4); k > 0; k--) strcat(stop[i], letters[random_below(most)]);
            stops.at[i] = stop[i];
            const char *found = strstr(text, stop[i]);
            size_t end = found ? (size_t)(found - text) + strlen(stop[i]) : SIZE_MAX, begin = end - strlen(stop[i]);
            if (end < best_end || (end == best_end && found && begin < cut)) best_end = end, cut = begin;
        }
        snprintf(file, sizeof file, "%s", temporary("stops"));
        fflush(stdout);
        int kept = exchange(stdout, file, O_WRONLY | O_CREAT | O_TRUNC);
        const char *by = NULL;
        for (size_t at = 0, part; at < n && !by; at += part) {
            part = 1 + random_below(n - at < 5 ? n - at : 5);
            by = print_bytes(&printer, text + at, part);
        }
        print_bytes(&printer, NULL, 0);
        put_back(stdout, kept);
        char *got = read_text(file);
        if (best_end != SIZE_MAX) text[cut] = 0;
        check(got && !strcmp(got, text) && !by == (best_end == SIZE_MAX), "stop texts \"%s\" \"%s\" \"%s\" \"%s\": got "
              "\"%s\", wanted \"%s\"", stop[0], stop[1], stop[2], stop[3], got, text);
        free(got);
        unlink(file);
    }
}

// A chat whose messages come from a terminal, which shows where they are expected; and progress on one, after a while.
static void test_talking(void) {
    char text[256], shown[4096] = "";
    int terminal = posix_openpt(O_RDWR | O_NOCTTY);
    if (terminal < 0 || grantpt(terminal) || unlockpt(terminal)) return;
    int slave = open(ptsname(terminal), O_RDWR | O_NOCTTY);
    snprintf(text, sizeof text, "exec $EMULATOR ./run $long -m chat -t 0 -n 3 -q <%s", ptsname(terminal));
    Command c = start_command(text, false, -1);
    bool sent = wait_for(&c, c.err, 2, "> ") && write(terminal, "a\n", 2) == 2 && wait_for(&c, c.err, 4, "> > ") &&
                write(terminal, "\4", 1) == 1;
    Result r = end_command(&c);
    check(sent && r.status == 0 && r.n_out > 1 && !strcmp(r.err, "> > \n"), "%s: got status %d, \"%s\" and \"%s\"",
          text, r.status, r.out, r.err);
    free_result(&r);
    snprintf(text, sizeof text, "exec $EMULATOR ./run $long -t 0 -n 0 -c 0 -b 16 -j 1 -f $T/long_text 2>%s",
             ptsname(terminal));
    c = start_command(text, false, -1);
    fcntl(terminal, F_SETFL, O_NONBLOCK);
    for (size_t i = 0, n = 0; i < 4000 && !strstr(shown, "\rprompt token "); i++, usleep(5000)) {
        ssize_t now = read(terminal, shown + n, sizeof shown - 1 - n);
        if (now > 0) n += (size_t)now;
    }
    kill(c.pid, SIGKILL);
    r = end_command(&c);
    close(slave), close(terminal);
    check(strstr(shown, "\rprompt token "), "%s: got \"%s\"", text, shown);
    free_result(&r);
}

// Ctrl-C while the model reads a message: as if it had not been said.
static void test_unsaid(void) {
    enum { LONG = 60000 };
    Result wanted = run_shell("printf 'a\nb\n' | $EMULATOR ./run $long -q -m chat -t 0 -n 4 -c 0");
    Command c = start_command("exec $EMULATOR ./run $long -q -m chat -t 0 -n 4 -c 0 -b 16 -j 1", true, -1);
    char *message = get(LONG + 1);
    memset(message, 'a', LONG);
    message[LONG] = '\n';
    bool ok = write(c.to_stdin, "a\n", 2) == 2 && wait_for(&c, c.out, 1, NULL) &&
              write(c.to_stdin, message, LONG + 1) == LONG + 1;
    for (int i = 0, left = 1; i < 4000 && ok && left > 0; i++, usleep(5000))
        ok = ioctl(c.to_stdin, FIONREAD, &left) == 0;
    usleep(50000);
    kill(c.pid, SIGINT);
    ok = ok && write(c.to_stdin, "b\n", 2) == 2;
    Result r = end_command(&c);
    const char *second = strchr(wanted.out, '\n');
    size_t n = second ? (size_t)(second - wanted.out) + 1 : 0;
    check(ok && n && r.status == 0 && !*r.err && !strncmp(r.out, wanted.out, n) && r.out[n] == '\n' &&
              !strcmp(r.out + n + 1, wanted.out + n),
          "Ctrl-C while a message is read: got status %d, \"%s\" and \"%s\", wanted \"%s\" with an empty line",
          r.status, r.out, r.err, wanted.out);
    free(message);
    free_result(&r);
    free_result(&wanted);
}

// Ctrl-C where a pipe is full since its reader has stopped reading: after a first one nothing is missing in the middle
// of what the reader gets, and a second one ends the program.
static void test_full_pipe(const char *arguments) {
    char text[200];
    snprintf(text, sizeof text, "%s", arguments);
    Result whole = run_with(text);
    snprintf(text, sizeof text, "exec $EMULATOR ./run %s", arguments);
    for (int presses = 1; presses <= 2; presses++) {
        int ends[2], n_waiting = 0, before = -1;
        if (pipe(ends)) exit(1);
        fcntl(ends[0], F_SETFD, FD_CLOEXEC);
        Command c = start_command(text, false, ends[1]);
        close(ends[1]);
        for (int i = 0; i < 400 && (n_waiting == 0 || n_waiting != before); i++, usleep(50000)) {
            before = n_waiting;
            ioctl(ends[0], FIONREAD, &n_waiting);
        }
        siginfo_t ended = { 0 };
        kill(c.pid, SIGINT);
        usleep(100000);
        bool waits = waitid(P_PID, (id_t)c.pid, &ended, WEXITED | WNOHANG | WNOWAIT) == 0 && !ended.si_pid;
        if (presses == 2) kill(c.pid, SIGINT);
        for (int i = 0; i < 400 && presses == 2 && !ended.si_pid; i++, usleep(5000))
            waitid(P_PID, (id_t)c.pid, &ended, WEXITED | WNOHANG | WNOWAIT);
        bool on_time = presses == 1 || ended.si_pid;
        size_t n = 0;
        char *got = get(whole.n_out + 1);
        for (ssize_t now = 1; on_time && now > 0; n += (size_t)now) now = read(ends[0], got + n, whole.n_out + 1 - n);
        close(ends[0]);
        if (!on_time) kill(c.pid, SIGKILL);
        Result r = end_command(&c);
        check(waits && on_time && r.status == 130 && n > 0 && n < whole.n_out && !memcmp(got, whole.out, n) && !*r.err,
              "./run %s into a full pipe, %d times Ctrl-C: got status %d, %zu bytes of %zu and \"%s\", wanted 130",
              arguments, presses, r.status, n, whole.n_out, r.err);
        free(got);
        free_result(&r);
    }
    free_result(&whole);
}

// A second Ctrl-C, or one at a chat's prompt, takes an unfinished file away.
static void test_last_interrupt(void) {
    for (int i = 0; i < 3; i++) {
        write_text("unfinished", "a");
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            unfinished = (char *)temporary("unfinished");
            interrupted = i == 1 ? SIGINT : 0;
            at_prompt = i == 2;
            on_signal(SIGINT, NULL, NULL);
            _exit(interrupted == SIGINT ? 0 : 1);
        }
        int status = -1;
        waitpid(child, &status, 0);
        bool is_last = i > 0, is_left = access(temporary("unfinished"), F_OK) == 0;
        check(WIFEXITED(status) && WEXITSTATUS(status) == (is_last ? 130 : 0) && is_left == !is_last,
              "%s: got status %d, and the unfinished file is %s", i ? "the last Ctrl-C" : "the first Ctrl-C",
              WEXITSTATUS(status), is_left ? "there" : "gone");
    }
}

// Ctrl-C ends a text, and one that waits for a message; an answer it only cuts, and the chat goes on.
static void test_interrupts(void) {
    char endless[128], chat[128];
    if (!make_endless("", endless, sizeof endless) || !make_endless("-m chat", chat, sizeof chat)) return;
    Command c = start_command(endless, false, -1);
    bool begun = wait_for(&c, c.out, 50, NULL);
    Result r = interrupt(&c);
    check(begun && r.status == 130 && r.n_out > 50 && r.out[r.n_out - 1] == '\n' && strstr(r.err, "stopped by Ctrl-C"),
          "%s, Ctrl-C: got status %d, %zu bytes and \"%s\", wanted 130", endless, r.status, r.n_out, r.err);
    free_result(&r);

    c = start_command("exec $EMULATOR ./run $long -m chat -t 0 -n 3", true, -1);
    begun = write(c.to_stdin, "Hi\n", 3) == 3 && wait_for(&c, c.err, 1, "[stopped at -n tokens]");
    r = interrupt(&c);
    check(begun && r.status == 130 && r.n_out > 1, "a chat, Ctrl-C at its prompt: got status %d, \"%s\" and \"%s\"",
          r.status, r.out, r.err);
    free_result(&r);

    char *first = strstr(chat, " -i "), asked[2] = { first[4], '\n' };  // this message comes by the pipe, as others do
    *first = 0;
    c = start_command(chat, true, -1);
    begun = write(c.to_stdin, asked, 2) == 2 && wait_for(&c, c.out, 50, NULL);
    kill(c.pid, SIGINT);
    bool cut = wait_for(&c, c.err, 1, "[stopped by Ctrl-C]\n");
    struct stat info;
    fstat(fileno(c.out), &info);
    bool sent = write(c.to_stdin, "a\n", 2) == 2, goes_on = wait_for(&c, c.out, (size_t)info.st_size + 2, NULL);
    r = interrupt(&c);
    check(begun && cut && sent && goes_on && r.status == 130,
          "%s, Ctrl-C in its answer, then another message: got status %d, \"%.60s\" and \"%s\"", chat, r.status, r.out,
          r.err);
    free_result(&r);

    int ends[2];  // a reader that goes away
    char byte;
    if (pipe(ends)) exit(1);
    fcntl(ends[0], F_SETFD, FD_CLOEXEC);
    c = start_command(endless, false, ends[1]);
    close(ends[1]);
    begun = read(ends[0], &byte, 1) == 1;
    close(ends[0]);
    r = end_command(&c);
    check(begun && r.status == 128 + SIGPIPE && !strstr(r.err, "run: "),
          "%s, and nobody reads: got status %d and \"%s\", wanted the end by SIGPIPE", endless, r.status, r.err);
    free_result(&r);

    char text[256];  // where SIGPIPE is ignored, and where the disk is full, an endless text ends all the same
    snprintf(text, sizeof text, "(trap '' PIPE; (%s); echo $? >$T/status) | head -c 50 >/dev/null; cat $T/status",
             endless);
    r = run_shell(text);
    check(!strcmp(r.out, "3\n") && strstr(r.err, "Broken pipe"), "%s: got \"%s\" and \"%s\", wanted 3", text, r.out,
          r.err);
    free_result(&r);
    snprintf(text, sizeof text, "%s >/dev/full", endless);
    r = run_shell(text);
    check(!file_exists("/dev/full") || (r.status == 3 && strstr(r.err, "No space")),
          "%s: got status %d and \"%s\", wanted 3", text, r.status, r.err);
    free_result(&r);

    snprintf(text, sizeof text, "trap '' HUP INT; %s", endless);  // as nohup and a shell's & do it
    c = start_command(text, false, -1);
    begun = wait_for(&c, c.out, 50, NULL);
    kill(c.pid, SIGHUP);
    kill(c.pid, SIGINT);
    fstat(fileno(c.out), &info);
    goes_on = wait_for(&c, c.out, (size_t)info.st_size + 100, NULL);
    r = end_by(&c, SIGTERM);
    check(begun && goes_on && r.status == 128 + SIGTERM, "%s, then SIGHUP and SIGINT: got status %d and \"%s\"", text,
          r.status, r.err);
    free_result(&r);

    c = start_command(endless, false, -1);  // a SIGBUS that is not of a mapped file is none of ours
    begun = wait_for(&c, c.out, 50, NULL);
    r = end_by(&c, SIGBUS);
    check(begun && r.status == 128 + SIGBUS && !strstr(r.err, "run: "), "%s, SIGBUS: got status %d and \"%s\"", endless,
          r.status, r.err);
    free_result(&r);
    test_shrunk_files(endless);
}

// ---- Help ----

static void test_help(void) {
    Result r = run_with("--help");
    char *readme = read_text("README.md");
    for (int i = 0; i < N_OPTIONS; i++) {
        char name[40];
        snprintf(name, sizeof name, "--%s", option_table[i].name);
        check(strstr(r.out, name) && strstr(r.out, option_table[i].help), "--help: %s is not in it", name);
        check(!readme || strstr(readme, name), "README.md: %s is not in it", name);
        int n_modes = 0;  // every text before a colon or in a heading's brackets names modes
        for (int k = 0; k < N_MODES; k++) n_modes += mode_uses(mode_names[k], &option_table[i]);
        check(n_modes > 0, "--%s, %s: no mode uses it", option_table[i].name, option_table[i].help);
    }
    check(r.status == 0 && !*r.err, "--help: got status %d and \"%s\"", r.status, r.err);
    free(readme);
    free_result(&r);
}

// --tables is JSON, has every row, and each feature of a family and each flag has its name.
static void test_tables(void) {
    static const char *const names[] = { "types", "families", "fields", "pre_tokenizers", "tokenizer_flags" };
    const size_t rows[] = { N_SOURCE_TYPES, sizeof families / sizeof *families, N_CONFIG_FIELDS, N_PRE_TOKENIZERS,
                            N_FLAGS };
    Result r = run_with("-m inspect --tables");
    Pool pool = { 0 };
    Value v = { 0 };
    Error e = { 0 };
    bool ok = r.status == 0 && !*r.err && parse_json(r.out, strlen(r.out), &pool, &v, &e);
    if (!check(ok, "--tables: got status %d, \"%s\" and \"%s\"", r.status, r.err, e.text)) return;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        const Value *list = find_member(&v, names[i]);
        check(list && list->n == rows[i], "--tables: %s: wanted %zu rows", names[i], rows[i]);
    }
    for (const Family *f = families; f < families + sizeof families / sizeof *families; f++) {
        char text[48];
        snprintf(text, sizeof text, "{\"name\": \"%s\", \"pairing\"", f->name);
        check(strstr(r.out, text) != NULL, "--tables: family %s is not in it", f->name);
        check(f->features >> sizeof feature_names / sizeof *feature_names == 0, "%s: a feature has no name", f->name);
    }
    free_pool(&pool);
    free_result(&r);
}

// --report: a line for each tensor that is rounded. test_quantised_blocks() compares the numbers.
static void test_report(void) {
    Result r = run_with("$tied -m export --type mixed --report -o $T/reported");
    const char *line = "token_embd.weight                  f32 -> f16   RMSE ";  // 36 columns are no blocks
    check(r.status == 0 && !strncmp(r.err, line, strlen(line)) && !strstr(r.err, "norm"),
          "--report: got status %d and \"%s\"", r.status, r.err);
    free_result(&r);
}

static void test_command_line(void) {
    if (!check(file_exists("run"), "there is no ./run: make builds it")) return;
    signal(SIGPIPE, SIG_IGN);
    make_files();
    for (size_t i = 0; i < sizeof misuses / sizeof *misuses; i++)
        check_case(&(Case){ misuses[i].arguments, 2, NULL, misuses[i].wanted });
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) check_case(&cases[i]);
    test_texts();
    test_inputs();
    test_warnings();
    test_hints();
    test_inspect();
    test_logits();
    check_perplexity("$tied", true, 64);
    check_perplexity("$qwen2", false, 48);
    check_perplexity("$mixed -b 5", true, 33);
    test_json();
    test_exports();
    test_picture();
    test_bench();
    test_profile();
    test_profile_table();
    test_environment();
    test_small_stacks();
    test_unfinished_files();
    test_interrupts();
    test_full_pipe("$tied -m tokenize --pieces -f $T/long_text");
    test_full_pipe("$tied -m tokenize --json -f $T/long_text");
    test_full_pipe("$tied -m detokenize -f $T/long_ids");
    test_last_interrupt();
    test_unsaid();
    test_terminal();
    test_talking();
    test_tables();
    test_report();
    test_help();
    remove_files();
}

// Chats and what is printed, apart from the other commands: make mutate runs these often.
static void test_talks(void) {
    if (!check(file_exists("run"), "there is no ./run: make builds it")) return;
    signal(SIGPIPE, SIG_IGN);
    make_files();
    test_continued_answers();
    test_thoughts();
    test_printing();
    test_chats();
    test_conversations();
    test_chat_output();
    test_stop_texts();
    test_typing();
    remove_files();
}

// ---- Style ----

enum { MAX_COLUMNS = 120, MAX_FUNCTION = 80, MAX_PART_ONE = 1300, MAX_BOTH = 11050 };

static size_t columns(const char *line, size_t n) {
    size_t count = 0;
    for (size_t i = 0; i < n; i++) count += ((unsigned char)line[i] & 0xC0) != 0x80;
    return count;
}

// Looks at every line of a source; returns their number, and in *part_one those before chapter 8. The generated tables
// of characters are data, and not counted.
static int check_source(const char *path, bool whole_style, int *part_one) {
    char *text = read_text(path);
    int n = 0, begin = 0, n_generated = 0;
    bool generated = false;
    *part_one = 0;
    if (!check(text != NULL, "%s cannot be read", path)) return 0;
    for (char *line = text, *end; *line; line = end + (*end != 0)) {
        end = line + strcspn(line, "\n");
        size_t length = (size_t)(end - line), wide = columns(line, length);
        n++;
        if (wide > MAX_COLUMNS) check(false, "%s:%d: got %zu columns, wanted at most %d", path, n, wide, MAX_COLUMNS);
        if (length && isspace((unsigned char)end[-1])) check(false, "%s:%d: blanks at the end", path, n);
        if (memchr(line, '\t', length)) check(false, "%s:%d: a tab", path, n);
        if (!strncmp(line, "/* ==== 8.", 10)) *part_one = n - 1;
        n_generated += generated;
        if (generated ? end[-1] == ';' : !strncmp(line, "static const char unicode_", 26))
            generated = !generated;
        if (!whole_style) continue;
        if (isalpha((unsigned char)line[0]) || line[0] == '_') begin = n;  // a definition begins
        if (length == 1 && line[0] == '}' && n - begin + 1 > MAX_FUNCTION)
            check(false, "%s:%d: got a function of %d lines, wanted at most %d", path, begin, n - begin + 1,
                  MAX_FUNCTION);
    }
    check(n > 10 && text[strlen(text) - 1] == '\n', "%s: no text of whole lines", path);
    free(text);
    return n - n_generated;
}

static void test_style(void) {
    int part_one, ignored, n_sources = 0, run_lines = check_source("run.c", true, &part_one);
    int n = run_lines + check_source("tokenizer.c", true, &ignored);
    check(part_one > 500 && part_one <= MAX_PART_ONE, "run.c, Part I: got %d lines, wanted at most %d", part_one,
          MAX_PART_ONE);
    check(n > 1000 && n <= MAX_BOTH, "run.c and tokenizer.c: got %d lines, wanted at most %d", n, MAX_BOTH);
    DIR *tests = opendir("tests");
    for (struct dirent *d; tests && (d = readdir(tests));) {
        char path[300];
        size_t length = strlen(d->d_name);
        if (length < 2 || strcmp(d->d_name + length - 2, ".c")) continue;
        snprintf(path, sizeof path, "tests/%s", d->d_name);
        check_source(path, false, &ignored);
        n_sources++;
    }
    if (tests) closedir(tests);
    check(n_sources >= 6, "tests: got %d sources", n_sources);
}
