// Sessions and guesses: whatever is taken from a file or guessed, the text and its bits are those of a plain run. Part
// of test.c.

enum { SESSION_TOKENS = 150, SESSION_CONTEXT = 200 };  // three pages, the last one full in part

static int session_ids[SESSION_TOKENS + 1];

static void make_session_ids(const Model *m) {
    for (int i = 0; i <= SESSION_TOKENS; i++) session_ids[i] = (int)random_below((size_t)m->config.n_tokens);
}

static bool start_session_runner(const Model *m, bool exact, bool f32, int batch, Runner *r, Error *e) {
    Settings settings = { .context = SESSION_CONTEXT, .batch = batch, .threads = 2, .exact = exact, .cache_f32 = f32 };
    bool ok = make_runner(m, settings, r, e);
    r->w.work = SIZE_MAX;  // as in start_runner()
    return ok;
}

// Reads n tokens as a text's beginning and, with a path, keeps them in a session there.
static bool keep_session(const Model *m, Runner *r, int n, const char *path, Error *e) {
    options.session = path;
    bool ok = prefill(m, &r->w, &r->text, session_ids, (size_t)n, NULL, e) && write_session(m, &r->w, &r->text, e);
    options.session = NULL;
    return ok;
}

// A text that has the session's first n_common tokens, then others, `total` in all: its logits and the cache's tokens
// are those of a run without the session, and n_kept tokens did not go through the model.
static void check_resumed(const Model *m, const char *what, bool f32, int batch, const char *path, int n_common,
                          int total) {
    Runner cold, warm;
    Error e = { 0 };
    Speed speed = { 0 };
    int ids[SESSION_CONTEXT];
    size_t n_kept = (size_t)(n_common < total ? n_common : total - 1);
    size_t size = (size_t)m->config.n_tokens * sizeof(float);
    for (int i = 0; i < total; i++)
        ids[i] = i < n_common ? session_ids[i] : (session_ids[i % SESSION_TOKENS] + 1) % m->config.n_tokens;
    Tokens tokens = { .ids = ids, .n = (size_t)total };
    bool ok = start_session_runner(m, false, f32, batch, &cold, &e) &&
              take_prompt(m, &cold.w, &cold.text, &tokens, &speed, &e);
    speed = (Speed){ 0 };
    options.session = path;
    ok = start_session_runner(m, false, f32, batch, &warm, &e) && ok &&
         take_prompt(m, &warm.w, &warm.text, &tokens, &speed, &e);
    options.session = NULL;
    check(ok && speed.n_kept == n_kept && speed.n_prompt == (size_t)total - n_kept && warm.text.n == total &&
              !memcmp(warm.text.ids, ids, (size_t)total * sizeof *ids),
          "%s, %d of %d tokens in the session: got %zu kept, %zu read and \"%s\", wanted %zu kept", what, n_common,
          total, speed.n_kept, speed.n_prompt, e.text, n_kept);
    check(ok && !memcmp(cold.w.logits, warm.w.logits, size), "%s, %d of %d tokens in the session: other logits", what,
          n_common, total);
    for (int i = 0; ok && i < 5; i++) {  // and it goes on as the other
        ok = run_tokens(m, &cold, ids + i, 1, 1, &e) && run_tokens(m, &warm, ids + i, 1, 1, &e);
        check(ok && !memcmp(cold.w.logits, warm.w.logits, size), "%s, %d of %d, %d tokens later: other logits", what,
              n_common, total, i + 1);
    }
    free_runner(&cold), free_runner(&warm);
}

static void check_session_refused(const Model *m, bool exact, bool f32, int context, const char *path,
                                  const char *wanted) {
    Runner r;
    Error e = { 0 };
    Settings settings = { .context = context, .batch = 8, .threads = 1, .exact = exact, .cache_f32 = f32 };
    bool ok = make_runner(m, settings, &r, &e);
    options.session = path;
    ok = ok && open_session(m, &r.w, &r.text, NULL, &e);
    options.session = NULL;
    check(wanted ? !ok && e.status == BAD_FILE && strstr(e.text, wanted) : ok,
          "a session, exact %d, f32 %d, context %d: got %d and \"%s\", wanted \"%s\"", exact, f32, context, ok, e.text,
          wanted ? wanted : "none");
    free_runner(&r);
}

// What a session depends on beside the model: rounding, the cache's numbers, and LongRoPE's choice by the context.
static void test_foreign_sessions(void) {
    Opened a = open_golden("qwen2.gguf"), b = open_golden("llama_tied.gguf");
    Opened c = open_golden("families/phi3_long.gguf");
    Runner r, s;
    Error e = { 0 };
    const char *path = temporary("a.session"), *long_path = temporary("long.session");
    int original = c.model.config.original_context, all = c.model.config.context;
    for (int i = 0; i <= SESSION_TOKENS; i++) session_ids[i] = i % 50;
    options.checkpoint = "models/qwen2.gguf";
    bool ok = start_session_runner(&a.model, false, false, 8, &r, &e) && keep_session(&a.model, &r, 20, path, &e);
    options.checkpoint = "b.gguf";
    check_session_refused(&a.model, false, false, 30, path, NULL);
    check_session_refused(&a.model, false, true, 30, path, "another --kv");
    check_session_refused(&a.model, true, false, 30, path, "another --kv or --exact");
    check_session_refused(&b.model, false, false, 30, path, "another model: qwen2.gguf, and not b.gguf");
    Slot *slot = &a.model.slots[a.model.n_slots - N_LAYER_RULES + 2];  // a matrix of the last layer
    float *weight = (float *)(void *)(slot->data + slot_bytes(slot) / 2), kept = *weight;
    *weight += 1;
    check_session_refused(&a.model, false, false, 30, path, "another model");
    *weight = kept;
    a.model.config.rope_theta += 1;
    check_session_refused(&a.model, false, false, 30, path, "another model");
    a.model.config.rope_theta -= 1;
    options.checkpoint = NULL;
    Settings settings = { .context = original, .batch = 8, .threads = 1 };
    ok = ok && make_runner(&c.model, settings, &s, &e) && keep_session(&c.model, &s, 10, long_path, &e);
    check(ok && original > 10 && all > original, "sessions: got \"%s\", contexts %d and %d", e.text, original, all);
    check_session_refused(&c.model, false, false, original - 1, long_path, NULL);
    check_session_refused(&c.model, false, false, original + 1, long_path, "a -c that changes");
    unlink(path), unlink(long_path);
    free_runner(&r), free_runner(&s);
    close_opened(&a), close_opened(&b), close_opened(&c);
}

static void test_sessions(void) {
    static const struct { const char *name; bool f32; } cases[] = {
        { "llama_tied.gguf", true }, { "mixed.gguf", false }, { "mixtral.gguf", false },
        { "families/gemma3.gguf", false }, { "families/gemma2.gguf", true }, { "llama_mqa.gguf", false },
    };
    static const int lengths[][2] = {  // in common, in all
        { 0, 10 }, { 1, 1 }, { 1, 2 }, { 63, 70 }, { 64, 64 }, { 64, 65 }, { 65, 150 }, { 128, 129 },
        { 150, 150 }, { 150, 151 }, { 150, 190 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Opened o = open_golden(cases[i].name);
        Runner r;
        Error e = { 0 };
        const char *path = temporary("text.session");
        o.model.config.context = SESSION_CONTEXT;
        make_session_ids(&o.model);
        bool ok = start_session_runner(&o.model, false, cases[i].f32, 16, &r, &e) &&
                  keep_session(&o.model, &r, SESSION_TOKENS, path, &e);
        check(ok, "%s: a session of %d tokens: got \"%s\"", cases[i].name, SESSION_TOKENS, e.text);
        for (size_t k = 0; ok && k < sizeof lengths / sizeof *lengths; k++)
            check_resumed(&o.model, cases[i].name, cases[i].f32, k % 3 ? 16 : 7, path, lengths[k][0], lengths[k][1]);
        unlink(path);
        free_runner(&r);
        close_opened(&o);
    }
    test_foreign_sessions();
}

// ---- Damage ----

// Reads a session from memory for a text of which it has n_common tokens.
static bool read_damaged(const Model *m, Runner *r, Bytes b, size_t n_common, Error *e) {
    FILE *f = b.n ? fmemopen(b.bytes, b.n, "rb") : NULL;
    int ids[SESSION_TOKENS + 1];
    *e = (Error){ BAD_FILE, "nothing" };
    if (!f) return false;
    for (int i = 0; i <= SESSION_TOKENS; i++) ids[i] = session_ids[i] + ((size_t)i >= n_common);
    *e = (Error){ 0 };
    bool ok = read_session(m, &r->w, &r->text, f, &(Tokens){ .ids = ids, .n = SESSION_TOKENS + 1 }, e);
    fclose(f);
    return ok;
}

// Numbers of the header that no run writes, with a right checksum: the tokens are not where they were, or the file is
// refused before anything of its size is allocated.
static void check_forged(const Model *m, Runner *r, Bytes b) {
    static const uint64_t numbers[] = { 1, 63, 64, 200, MAX_CONTEXT, MAX_CONTEXT + 1, INT32_MAX, UINT32_MAX,
                                        0x100000096, UINT64_MAX / 4, UINT64_MAX - 63, UINT64_MAX };
    for (size_t at = offsetof(SessionHeader, n); at <= offsetof(SessionHeader, settings); at += 8) {
        for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
            Bytes copy = copy_bytes(b.bytes, b.n);
            Error e;
            SessionHeader h;
            memcpy(copy.bytes + at, &numbers[i], 8);
            memcpy(&h, copy.bytes, sizeof h);
            const int *in_file = (void *)(copy.bytes + sizeof h);
            if (h.n <= (b.n - sizeof h) / sizeof *in_file) h.head_sum = sum_head(&h, in_file);
            memcpy(copy.bytes, &h, sizeof h);
            bool ok = read_damaged(m, r, copy, SESSION_TOKENS, &e);
            check((ok || (e.status == BAD_FILE && e.text[0])) && r->text.n == 0,  // nothing is of this text
                  "a session with %llu at byte %zu: got %d, %d tokens and \"%s\"", (unsigned long long)numbers[i], at,
                  ok, r->text.n, e.text);
            rewind_sequence(&r->text, 0);
            free(copy.bytes);
        }
    }
}

// 10,000 sessions with a flipped bit, with bytes exchanged, cut, or too long. Where a text has all of a session, each
// damage is refused, and the text is empty; where it has only the beginning, damage after that does not matter, nor do
// bytes after the end. The pages are then those of the whole session.
static void test_damaged_sessions(void) {
    enum { N = 10000, SOME = 40 };
    Opened o = open_golden("llama_mqa.gguf");
    Runner r;
    Error e = { 0 };
    const char *path = temporary("damaged.session");
    size_t n_taken = 0, n_refused = 0;
    o.model.config.context = SESSION_CONTEXT;
    make_session_ids(&o.model);
    bool ok = start_session_runner(&o.model, false, false, 16, &r, &e) &&
              keep_session(&o.model, &r, SESSION_TOKENS, path, &e);
    Bytes b = read_bytes(path);
    int n_spare = r.cache.n_spare + (int)n_pages(SESSION_TOKENS);
    if (!check(ok && b.bytes, "a session: got \"%s\"", e.text)) return;
    size_t n_head = sizeof(SessionHeader) + SESSION_TOKENS * sizeof(int);
    size_t n_page = (b.n - n_head) / n_pages(SESSION_TOKENS);
    for (size_t i = 0; i < N; i++) {
        Bytes damaged = { b.bytes, b.n };
        size_t at = i % 2 ? random_below(b.n) : random_below(n_head), n_common = i % 3 ? SESSION_TOKENS : SOME;
        unsigned char kept = b.bytes[at], *longer = NULL;
        size_t kind = random_below(8);
        if (kind == 0) damaged.n = at;
        else if (kind == 1) {
            damaged = new_bytes(b.n + 1 + at);
            longer = memset(damaged.bytes, 0, damaged.n);
            memcpy(longer, b.bytes, b.n);
        } else if (kind == 2) b.bytes[at] = (unsigned char)(kept + 1 + random_below(255));
        else b.bytes[at] ^= (unsigned char)(1 << random_below(8));
        rewind_sequence(&r.text, 0);
        ok = read_damaged(&o.model, &r, damaged, n_common, &e);
        b.bytes[at] = kept;
        free(longer);
        bool matters = at < (n_common > SOME ? b.n : n_head + n_page) && kind != 1;
        n_taken += ok, n_refused += !ok;
        check(ok == !matters && (ok || (e.status == BAD_FILE && e.text[0] && !strchr(e.text, '\n'))) &&
                  r.text.n == (ok ? (int)n_common : 0) && r.cache.n_spare == n_spare - (int)n_pages(r.text.n),
              "a session of %zu bytes, damage of kind %zu at byte %zu: got %d, %d tokens, %d spare pages and \"%s\"",
              b.n, kind, at, ok, r.text.n, r.cache.n_spare, e.text);
        if (ok) check(!memcmp(keys_at(&r.cache.layers[0], r.text.pages[0], 0), b.bytes + n_head,
                              r.cache.layers[0].key_bytes), "damage at byte %zu: another first page", at);
    }
    check(n_taken > 500 && n_refused > 7000, "damaged sessions: %zu were taken, %zu refused", n_taken, n_refused);
    rewind_sequence(&r.text, 0);
    check_forged(&o.model, &r, b);
    unlink(path);
    free(b.bytes);
    free_runner(&r);
    close_opened(&o);
}

// ---- As a command ----

static void test_session_commands(void) {
    static const struct { const char *what, *text; } steps[] = {
        { "a text without one", "$EMULATOR ./run $tied -q -t 0.5 -s 7 -n 20 -i 'Once upon a time' >$T/wanted" },
        { "a new one", "$EMULATOR ./run $tied -q -t 0.5 -s 7 -n 20 -i 'Once upon a time' --session $T/s | "
                       "cmp - $T/wanted && test -s $T/s" },
        { "again, all of it", "$EMULATOR ./run $tied -q -t 0.5 -s 7 -n 20 -i 'Once upon a time' --session $T/s | "
                              "cmp - $T/wanted" },
        { "with guesses too", "$EMULATOR ./run $tied -q -t 0.5 -s 7 -n 20 -i 'Once upon a time' --session $T/s "
                              "--lookup 4 -b 3 | cmp - $T/wanted" },
        { "what it tells", "$EMULATOR ./run $tied -t 0 -n 2 -i 'Once upon' --session $T/s 2>&1 >/dev/null | "
                           "grep -q '[1-9][0-9]* tokens of the session$'" },
        { "a chat", "printf 'a\\nb\\n' | $EMULATOR ./run $long -q -m chat -t 0 -n 4 >$T/wanted; for i in 1 2; do "
                    "printf 'a\\nb\\n' | $EMULATOR ./run $long -q -m chat -t 0 -n 4 --session $T/c | "
                    "cmp - $T/wanted || exit 1; done; test -s $T/c" },
        { "another model's", "cp $T/s $T/old; $EMULATOR ./run $mixed -q -i a --session $T/s 2>$T/err; test $? = 1 && "
                             "grep -q '^run: --session: the file is of another model: llama_tied.gguf, and not "
                             "mixed.gguf$' $T/err && cmp $T/s $T/old" },
        { "what is no session stays", "cp $T/prompt $T/p; $EMULATOR ./run $tied -q -i a --session $T/p 2>$T/err; "
                                      "test $? = 1 && grep -q 'no session' $T/err && cmp $T/p $T/prompt" },
        { "a folder", "$EMULATOR ./run $tied -q -i a --session $T 2>$T/err; test $? = 1 && grep -q 'expected a file' "
                      "$T/err" },
        { "a folder that is not there", "$EMULATOR ./run $tied -q -n 1 -i a --session $T/no/s 2>$T/err >$T/out; "
                                        "test $? = 3 && test $(wc -l <$T/err) = 1 && test ! -s $T/out" },
        { "too large for the file system", "cp $T/s $T/old; (trap '' XFSZ; ulimit -f 8; $EMULATOR ./run $tied -q -n 40 "
                                           "-i a --session $T/s) >/dev/null 2>$T/err; test $? = 3 && cmp $T/s $T/old" },
        { "damaged in its pages", "cp $T/s $T/d; printf X | dd of=$T/d bs=1 seek=$(($(wc -c <$T/d) - 3000)) "
                                  "conv=notrunc 2>/dev/null; $EMULATOR ./run $tied -q -i 'Once upon' --session $T/d "
                                  "2>$T/err; test $? = 1 && grep -q '^run: --session: the file is damaged: ' $T/err" },
        { "an empty one", ": >$T/e; $EMULATOR ./run $tied -q -i a --session $T/e 2>$T/err; test $? = 1" },
        { "and no other file is left", "test -z \"$(find $T -name '*.tmp')\"" },
    };
    if (!check(file_exists("run"), "there is no ./run: make builds it")) return;
    make_files();
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        Result r = run_shell(steps[i].text);
        check(r.status == 0, "a session, %s: got status %d, \"%s\" and \"%s\"", steps[i].what, r.status, r.out, r.err);
        free_result(&r);
    }
    char endless[128], command[200];
    for (int i = 0; i < 2 && make_endless("", endless, sizeof endless); i++) {  // Ctrl-C, and what ends it at once
        snprintf(command, sizeof command, "%s --session $T/i%d", endless, i);
        Command c = start_command(command, false, -1);
        bool begun = wait_for(&c, c.out, 50, NULL), exists;
        Result r = i ? end_by(&c, SIGHUP) : interrupt(&c);
        exists = file_exists(temporary(i ? "i1" : "i0"));
        check(begun && r.status == (i ? 128 + SIGHUP : 130) && exists == !i,
              "%s, then %s: got status %d, and the session is %s", command, i ? "SIGHUP" : "Ctrl-C", r.status,
              exists ? "there" : "missing");
        free_result(&r);
    }
    Result r = run_shell("$EMULATOR ./run $long -t 0 -n 1 -c 0 -i a --session $T/i0");
    check(r.status == 0 && strstr(r.err, "tokens of the session"), "after Ctrl-C: got status %d and \"%s\"", r.status,
          r.err);
    free_result(&r);
    Command c = start_command("exec $EMULATOR ./run $long -m chat -t 0 -n 3 -i Hi --session $T/chat", true, -1);
    bool begun = wait_for(&c, c.err, 1, "[stopped at -n tokens]");
    usleep(20000);
    r = interrupt(&c);
    check(begun && r.status == 130 && file_exists(temporary("chat")),
          "a chat with a session, Ctrl-C at its prompt: got status %d and \"%s\"", r.status, r.err);
    free_result(&r);
    remove_files();
}

// ---- Guesses ----

// What look_up() has to find, by its definition: of the longest matches, of 2 to 64 tokens, the latest.
static int plain_guess(const int *ids, int n, int most, int *guess) {
    for (int length = 64; length >= 2; length--) {
        for (int end = n - 1; end >= length; end--) {
            if (memcmp(ids + end - length, ids + n - length, (size_t)length * sizeof *ids)) continue;
            int n_guess = most < length ? most : length;
            for (int i = 0; i < n_guess; i++) guess[i] = end + i < n ? ids[end + i] : guess[end + i - n];
            return n_guess;
        }
    }
    return 0;
}

static void test_guesses(void) {
    int n_long = 0, n_none = 0;
    for (int i = 0; i < 3000; i++) {
        int ids[300], guess[100], n = 1 + (int)random_below(i % 10 ? 40 : 200), most = (int)random_below(100);
        int letters = 1 + (int)random_below(6);
        for (int k = 0; k < n; k++) ids[k] = (int)random_below((size_t)letters);
        if (i % 4 == 0) for (int k = n / 2; k < n; k++) ids[k] = ids[k - n / 2];
        int wanted = plain_guess(ids, n, most, guess), got = look_up(ids, n, most);
        check(got == wanted && !memcmp(ids + n, guess, (size_t)wanted * sizeof *ids),
              "a guess of at most %d after %d tokens of %d kinds: got %d, wanted %d, or others", most, n, letters, got,
              wanted);
        n_long += got > 16, n_none += got == 0;
    }
    check(n_long > 100 && n_none > 100, "guesses: %d were long, %d empty", n_long, n_none);
}

// One text by generate_ahead(), whose guesses are of at most `lookup` tokens; 0: by generate() itself.
typedef struct { int ids[SESSION_CONTEXT], n, last; size_t n_made; uint64_t random; Stop why; Speed speed; } Generated;

static Generated make_text(const Model *m, Runner *r, const Tokens *prompt, float temperature, uint64_t seed,
                           size_t limit, int lookup) {
    Generated g = { .n = 0 };
    Error e = { 0 };
    Sampler sampler = { .temperature = temperature, .top_p = 0.9f };
    Continuation c = { &r->text, &sampler, .limit = limit, .last = -1 };
    int n_spare = r->cache.n_spare;
    fflush(stdout);
    int kept = exchange(stdout, "/dev/null", O_WRONLY);
    options.lookup = lookup;
    bool ok = make_sampler(&sampler, m->config.n_tokens, seed, &e) &&
              take_prompt(m, &r->w, &r->text, prompt, &g.speed, &e) &&
              generate_ahead(m, &r->w, &c, &g.why, &g.speed, &e);
    options.lookup = 0;
    put_back(stdout, kept);
    check(ok && e.status == DONE, "a text, lookup %d: got \"%s\"", lookup, e.text);
    g.n = r->text.n, g.last = c.last, g.n_made = c.n_made, g.random = sampler.random;
    memcpy(g.ids, r->text.ids, (size_t)g.n * sizeof *g.ids);
    check(r->cache.n_spare == n_spare - (int)n_pages(g.n), "lookup %d: pages of wrong guesses are left", lookup);
    rewind_sequence(&r->text, 0);
    free(sampler.candidates);
    return g;
}

static void check_same_text_made(const char *name, const Generated *got, const Generated *wanted, int lookup, int how) {
    check(got->n == wanted->n && got->last == wanted->last && got->n_made == wanted->n_made &&
              got->random == wanted->random && got->why == wanted->why &&
              !memcmp(got->ids, wanted->ids, (size_t)wanted->n * sizeof(int)),
          "%s, lookup %d, setting %d: got %zu tokens, %d in the cache, stop %d; wanted %zu, %d, %d and the same ids "
          "and coins", name, lookup, how, got->n_made, got->n, got->why, wanted->n_made, wanted->n, wanted->why);
}

// A pass of several rows, or their logits, cannot be computed: as if a guess led to numbers that are not finite.
static Workspace *watched;
static const float *refused_weight;  // NULL: any
static bool refuse_guesses(float *out, const float *x, const float *weight, const float *bias, size_t dim, float eps) {
    bool ok = usable_kernels()[0]->normalise(out, x, weight, bias, dim, eps);
    return ok && !(watched->n > 1 && (!refused_weight || weight == refused_weight));
}

static size_t test_failing_guesses(const Model *m, const char *name, const Tokens *prompt) {
    size_t n_guessed = 0;
    Kernels failing = *usable_kernels()[0];
    Runner r;
    Error e = { 0 };
    Settings settings = { .context = 64, .batch = 1, .threads = 1 };
    if (!check(make_runner(m, settings, &r, &e), "%s: got \"%s\"", name, e.text)) return 0;
    Generated wanted = make_text(m, &r, prompt, 0, 1, 30, 0);
    free_runner(&r);
    failing.normalise = refuse_guesses;
    kernels = &failing;
    for (int i = 0; i < 2; i++) {
        settings.batch = 16;
        if (!check(make_runner(m, settings, &r, &e), "%s: got \"%s\"", name, e.text)) break;
        watched = &r.w;
        refused_weight = i ? m->final_norm : NULL;
        int n = (int)prompt->n;
        Sampler sampler = { .temperature = 0 };
        Continuation c = { &r.text, &sampler, .limit = 30, .last = -1 };
        Generated got = { .n = 0 };
        bool ok = true;
        for (int k = 0; ok && k < n; k++) ok = run_tokens(m, &r, prompt->ids + k, 1, 1, &e);
        fflush(stdout);
        int kept = exchange(stdout, "/dev/null", O_WRONLY);
        options.lookup = 4;
        ok = ok && generate_ahead(m, &r.w, &c, &got.why, &got.speed, &e);
        options.lookup = 0;
        put_back(stdout, kept);
        check(ok && e.status == DONE && r.text.n == wanted.n && got.why == wanted.why && got.speed.n_right == 0 &&
                  !memcmp(r.text.ids, wanted.ids, (size_t)wanted.n * sizeof(int)),
              "%s, guesses that fail (%d): got %d, %d tokens, %zu guessed and \"%s\", wanted %d tokens", name, i, ok,
              r.text.n, got.speed.n_guessed, e.text, wanted.n);
        n_guessed += got.speed.n_guessed;
        free_runner(&r);
    }
    kernels = usable_kernels()[0];
    return n_guessed;
}

static void test_lookup(void) {
    static const char *const names[] = { "llama_tied.gguf", "mixed.gguf", "mixtral.gguf", "families/gemma3.gguf" };
    static const struct { int lookup, batch, threads; } ways[] = {
        { 1, 16, 1 }, { 4, 5, 2 }, { 20, 64, 3 }, { 8, 1, 1 },
    };
    static const float temperatures[] = { 0, 0.05f, 0.3f, 1 };
    size_t n_right = 0, n_wrong = 0, n_failed_guesses = 0, n_stops[8] = { 0 };
    test_guesses();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        Opened o = open_golden(names[i]);
        const Model *m = &o.model;
        o.model.config.context = SESSION_CONTEXT;
        for (int how = 0; how < 4; how++) {
            Runner r, plain;
            Error e = { 0 };
            bool alone = ways[how].threads == 1;  // threads that wait for each other take long on a busy machine
            Settings settings = { .context = alone ? SESSION_CONTEXT : 64, .batch = 16, .threads = 1 };
            bool ok = make_runner(m, settings, &plain, &e);
            settings.batch = ways[how].batch, settings.threads = ways[how].threads;
            ok = make_runner(m, settings, &r, &e) && ok;
            r.w.work = SIZE_MAX;
            check(ok, "%s: got \"%s\"", names[i], e.text);
            for (uint64_t seed = 1; ok && seed <= (alone ? 8 : 6); seed++) {
                int ids[40];
                Tokens prompt = { .ids = ids, .n = 20 + seed };
                for (int k = 0; k < 40; k++) ids[k] = (int)random_below(20) + 3;
                if (seed % 3 == 0) ids[10] = m->tokenizer.n_end ? (int)m->tokenizer.end_id[0] : 2;
                memcpy(ids + 15, ids, 15 * sizeof *ids);
                float temperature = temperatures[seed % 4];
                size_t limit = seed % 5 == 0 ? random_below(30) : SIZE_MAX;
                Generated wanted = make_text(m, &plain, &prompt, temperature, seed, limit, 0);
                Generated got = make_text(m, &r, &prompt, temperature, seed, limit, ways[how].lookup);
                check_same_text_made(names[i], &got, &wanted, ways[how].lookup, how);
                n_right += got.speed.n_right, n_wrong += got.speed.n_guessed - got.speed.n_right;
                n_stops[got.why]++;
            }
            free_runner(&r), free_runner(&plain);
        }
        int ids[] = { 5, 6, 7, 8, 5, 6, 7, 8, 5, 6 };
        n_failed_guesses += test_failing_guesses(m, names[i], &(Tokens){ .ids = ids, .n = 10 });
        close_opened(&o);
    }
    check(n_failed_guesses > 20, "%zu guesses failed", n_failed_guesses);
    check(n_right > 500 && n_wrong > 500 && n_stops[AT_END_TOKEN] > 10 && n_stops[AT_LIMIT] > 10 &&
              n_stops[AT_CONTEXT] > 10,
          "guesses: %zu right, %zu wrong; %zu texts ended at an end token, %zu at the limit, %zu at the context's end",
          n_right, n_wrong, n_stops[AT_END_TOKEN], n_stops[AT_LIMIT], n_stops[AT_CONTEXT]);
}
