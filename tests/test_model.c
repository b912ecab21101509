// Logits against transformers, the same bits however they are computed, and llama2.c's two stories. Part of test.c.

enum { GOLDEN_TOKENS = 45 };

#define FAMILY(name) { "families/" name ".gguf", "families/" name, true, 0 }

// The models of tests/golden and whose logits they must have (tests/make_goldens.py and make_family_goldens.py:
// transformers in float32; for mixed, which transformers has no model for, a forward pass of its own in float32).
static const struct {
    const char *file, *logits;
    bool float_weights;  // all of them: then --exact changes nothing, but for the cache
    int context;         // 0: the model's
} goldens[] = {
    { "llama_tied.gguf", "llama_tied", true, 0 }, { "llama_bias.gguf", "llama_bias", true, 0 },
    { "llama3_rope.gguf", "llama3_rope", true, 0 }, { "llama_linear.gguf", "llama_linear", true, 0 },
    { "llama_mqa.gguf", "llama_mqa", true, 0 }, { "qwen2.gguf", "qwen2", true, 0 },
    { "qwen2_untied.gguf", "qwen2_untied", true, 0 }, { "llama2c_v0.bin", "llama2c_v0", true, 0 },
    { "llama2c_v0.gguf", "llama2c_v0", true, 0 }, { "llama2c_v1.bin", "llama2c_v1", true, 0 },
    { "llama2c_v2.bin", "llama2c_v2", false, 0 }, { "mixed.gguf", "mixed", false, 0 },
    { "mixed_fused.gguf", "mixed", false, 0 }, { "mixtral.gguf", "mixtral", false, 0 }, FAMILY("mistral"),
    FAMILY("mistral_yarn"), FAMILY("qwen2_window"), FAMILY("qwen3"), FAMILY("qwen3moe"), FAMILY("phi3"),
    FAMILY("phi3_long"), FAMILY("granite"), FAMILY("smollm3"), FAMILY("olmo2"), FAMILY("olmo3"), FAMILY("stablelm"),
    FAMILY("gemma2"), FAMILY("gemma3"), { "families/phi3_short.gguf", "families/phi3_short", true, 48 },
};
enum { N_GOLDENS = sizeof goldens / sizeof *goldens };

static void read_golden_ids(const char *name, int *ids) {
    char path[128];
    snprintf(path, sizeof path, "tests/golden/%s.ids", name);
    char *text = read_text(path), *at = text;
    for (int i = 0; text && i < GOLDEN_TOKENS; i++) ids[i] = (int)strtol(at, &at, 10);
    check(text && *at == '\n', "%s: not %d ids", path, GOLDEN_TOKENS);
    free(text);
}

static size_t n_logits_of(const Model *m) { return GOLDEN_TOKENS * (size_t)m->config.n_tokens; }

// Sends the tokens from `from` to `to` on and keeps each row of logits that a batch gives in `rows`.
static bool run_from(const Model *m, Runner *s, const int *ids, int from, int to, float *rows, Error *e) {
    size_t n_tokens = (size_t)m->config.n_tokens;
    for (int done = from; done < to;) {
        int n = to - done < s->w.settings.batch ? to - done : s->w.settings.batch;
        int n_rows = n < LOGITS_AT_ONCE ? n : LOGITS_AT_ONCE;
        if (!run_tokens(m, s, ids + done, n, n_rows, e)) return false;
        done += n;
        for (int i = 0; i < n_rows; i++)
            memcpy(rows + (size_t)(done - n_rows + i) * n_tokens, s->w.logits + (size_t)i * s->w.logits_stride,
                   n_tokens * sizeof(float));
    }
    return true;
}

// All logits with this setting; those that a batch of more than 16 does not give stay as they are in `rows`.
static void run_all(const Model *m, const int *ids, Setting how, float *rows) {
    Runner s;
    Error e = { 0 };
    bool ok = start_runner(m, how, &s, &e) && run_from(m, &s, ids, 0, GOLDEN_TOKENS, rows, &e);
    if (!ok) check(false, "a run: got \"%s\"", e.text), memset(rows, 0, n_logits_of(m) * sizeof *rows);
    free_runner(&s);
}

static Setting plain(bool exact, bool cache_f32) { return (Setting){ exact, cache_f32, 1, 1, &scalar }; }

static bool is_f32(const Model *m) {
    bool all = true;
    for (const Slot *s = m->slots; s < m->slots + m->n_slots; s++) all &= !s->data || s->is_vector || s->type == F32;
    return all;
}

static void test_goldens(void) {
    for (int i = 0; i < N_GOLDENS; i++) {
        Opened o = open_golden(goldens[i].file);
        char path[128];
        snprintf(path, sizeof path, "%s.logits", goldens[i].logits);
        Bytes file = read_golden(path);
        int ids[GOLDEN_TOKENS];
        read_golden_ids(goldens[i].logits, ids);
        size_t n = n_logits_of(&o.model);
        const float *wanted = (const float *)(const void *)file.bytes;
        float *exact = get(n * sizeof *exact), *usual = get(n * sizeof *usual);
        if (check(file.n == n * sizeof *wanted, "%s: got %zu bytes of logits, wanted %zu", path, file.n,
                  n * sizeof *wanted)) {
            context_asked = goldens[i].context;
            run_all(&o.model, ids, (Setting){ true, true, 2, 16, NULL }, exact);
            run_all(&o.model, ids, (Setting){ false, goldens[i].float_weights, 2, 16, NULL }, usual);
            context_asked = 0;
            double worst = 0, errors = 0, squares = 0;
            size_t at = 0;
            for (size_t k = 0; k < n; k++) {
                double error = fabs(exact[k] - (double)wanted[k]);
                if (!(error <= worst)) worst = error, at = k;
                errors += (usual[k] - (double)wanted[k]) * (usual[k] - (double)wanted[k]);
                squares += (double)wanted[k] * wanted[k];
            }
            check(worst <= 1e-4, "%s --exact, token %zu, logit %zu: got %.6f, wanted %.6f", goldens[i].file,
                  at / (size_t)o.model.config.n_tokens, at % (size_t)o.model.config.n_tokens, (double)exact[at],
                  (double)wanted[at]);
            double rms = sqrt(errors / squares);
            if (goldens[i].float_weights)
                check(!memcmp(exact, usual, n * sizeof *exact), "%s: float weights, but --exact gives other bits",
                      goldens[i].file);
            else
                check(rms <= 0.04,
                      "%s with activations in 8 bits: got a relative rms error of %.2f %%, wanted at most 4",
                      goldens[i].file, 100 * rms);
            if (!goldens[i].float_weights)
                check(rms >= 1e-4, "%s: got a relative rms error of %g: were no activations rounded?", goldens[i].file,
                      rms);
        }
        free(file.bytes), free(exact), free(usual);
        close_opened(&o);
    }
}

// ---- Experts ----

// Which experts a token goes to, and with what weights, against an ordering and a softmax in double.
static void test_experts(void) {
    for (int i = 0; i < 2000; i++) {
        enum { MOST = 130 };
        float logits[MOST], got[MOST];
        int n = 1 + (int)random_below(MOST), used = 1 + (int)random_below((size_t)n);
        for (int e = 0; e < n; e++) logits[e] = i % 2 ? random_float(3) : (float)random_below(4);  // or with equal ones
        memcpy(got, logits, sizeof got);
        choose_experts(got, n, used);
        double sum = 0;
        int rank[MOST], n_wrong = 0;
        for (int e = 0; e < n; e++) {
            rank[e] = 0;
            for (int j = 0; j < n; j++) rank[e] += logits[j] > logits[e] || (logits[j] == logits[e] && j < e);
            if (rank[e] < used) sum += exp((double)logits[e]);
        }
        for (int e = 0; e < n; e++) {
            double wanted = rank[e] < used ? exp((double)logits[e]) / sum : 0;
            n_wrong += !(fabs(got[e] - wanted) <= (used + 24) * 0x1p-24 * wanted);  // of the sum, of a logit up to 24
        }
        check(!n_wrong, "%d of %d experts, case %d: %d weights are wrong", used, n, i, n_wrong);
    }
    float broken[5] = { NAN, NAN, NAN, NAN, NAN };
    choose_experts(broken, 5, 2);
    int n_chosen = 0;
    for (int e = 0; e < 5; e++) n_chosen += broken[e] != 0;
    check(n_chosen == 2 && isnan(broken[0]), "logits that are no numbers: %d chosen, wanted 2", n_chosen);
}

// ---- The same bits ----

typedef struct {
    const Model *model;
    const char *name;
    const int *ids;
    const float *wanted;  // by one thread, token by token, with the plain C kernels
    float *rows;          // room
    bool exact, cache_f32;
} Same;

static void check_same_rows(const Same *c, const char *what, int a, int b) {
    size_t n = (size_t)c->model->config.n_tokens, total = n_logits_of(c->model);
    size_t at = 0;
    while (at < total && !memcmp(c->rows + at, c->wanted + at, sizeof(float))) at++;
    check(at == total, "%s%s, cache %s: %s (%d, %d) changes the logits of token %zu: got %a, wanted %a", c->name,
          c->exact ? " --exact" : "", c->cache_f32 ? "f32" : "f16", what, a, b, at / n,
          at < total ? (double)c->rows[at] : 0, at < total ? (double)c->wanted[at] : 0);
}

// The first n tokens.
static void check_setting(const Same *c, int threads, int batch, int n, const Kernels *k) {
    char what[80];
    Runner s;
    Error e = { 0 };
    snprintf(what, sizeof what, "kernel %s with (threads, batch)", k->name);
    memcpy(c->rows, c->wanted, n_logits_of(c->model) * sizeof(float));
    bool ok = start_runner(c->model, (Setting){ c->exact, c->cache_f32, threads, batch, k }, &s, &e) &&
              run_from(c->model, &s, c->ids, 0, n, c->rows, &e);
    check(ok && s.text.n == n, "%s, %s (%d, %d): got \"%s\"", c->name, what, threads, batch, e.text);
    check_same_rows(c, what, threads, batch);
    free_runner(&s);
}

// The prompt in two parts, cut at `cut`; then the cache rewound to `cut` and run again.
static void check_cut(const Same *c, Runner *s, int cut) {
    Error e = { 0 };
    for (int again = 0; again < 2; again++) {
        memset(c->rows, 0, n_logits_of(c->model) * sizeof(float));
        memcpy(c->rows, c->wanted, (size_t)(GOLDEN_TOKENS - 1) * (size_t)c->model->config.n_tokens * sizeof(float));
        if (!again) rewind_sequence(&s->text, 0);
        bool ok = (again || prefill(c->model, &s->w, &s->text, c->ids, (size_t)cut, NULL, &e));
        if (again) rewind_sequence(&s->text, cut);
        ok = ok && prefill(c->model, &s->w, &s->text, c->ids + cut, (size_t)(GOLDEN_TOKENS - cut), NULL, &e);
        memcpy(c->rows + (size_t)(GOLDEN_TOKENS - 1) * (size_t)c->model->config.n_tokens, s->w.logits,
               (size_t)c->model->config.n_tokens * sizeof(float));
        check(ok, "%s cut at %d: got \"%s\"", c->name, cut, e.text);
        check_same_rows(c, again ? "the cache rewound to" : "the prompt cut at", cut, again);
    }
}

static void check_same_bits(const Model *m, const char *name, const int *ids, bool exact, bool cache_f32) {
    float *wanted = get(n_logits_of(m) * sizeof(float)), *rows = get(n_logits_of(m) * sizeof(float));
    Same c = { m, name, ids, wanted, rows, exact, cache_f32 };
    run_all(m, ids, plain(exact, cache_f32), wanted);
    // Eight threads on few cores wait long for each other: for them few tokens go alone, and one cache is enough.
    static const struct { int threads, batch, n; } settings[] = {
        { 1, 1, GOLDEN_TOKENS }, { 1, 7, GOLDEN_TOKENS }, { 1, 16, GOLDEN_TOKENS }, { 1, 45, GOLDEN_TOKENS },
        { 2, 1, GOLDEN_TOKENS }, { 2, 7, GOLDEN_TOKENS }, { 3, 64, GOLDEN_TOKENS }, { 8, 1, 5 },
        { 8, 7, GOLDEN_TOKENS }, { 2, 45, GOLDEN_TOKENS },
    };
    for (const Kernels *const *k = usable_kernels(); *k; k++) {
        for (size_t i = 0; i < sizeof settings / sizeof *settings; i++) {
            if (settings[i].threads == 1 || (*k == usable_kernels()[0] && (settings[i].threads < 8 || !cache_f32)))
                check_setting(&c, settings[i].threads, settings[i].batch, settings[i].n, *k);
        }
    }
    Runner s;
    Error e = { 0 };
    bool ok = start_runner(m, (Setting){ exact, cache_f32, 1, 64, usable_kernels()[0] }, &s, &e);
    if (check(ok, "%s: got \"%s\"", name, e.text)) {
        for (int cut = 1; cut < GOLDEN_TOKENS; cut += exact ? 11 : 1) check_cut(&c, &s, cut);
    }
    free_runner(&s);
    free(wanted), free(rows);
}

static void test_same_bits(void) {
    for (int i = 0; i < N_GOLDENS; i++) {
        Opened o = open_golden(goldens[i].file);
        int ids[GOLDEN_TOKENS];
        read_golden_ids(goldens[i].logits, ids);
        for (int mode = 0; mode < 4; mode++)  // with float weights --exact is no other way
            if (!(mode & 1 && goldens[i].float_weights))
                check_same_bits(&o.model, goldens[i].file, ids, mode & 1, mode & 2);
        close_opened(&o);
    }
}

// ---- Many texts in one pass ----

enum { MOST_TEXTS = 17, LONG_TEXT = 150 };  // tokens: three pages

static pthread_t main_thread;

// The kernels in use, but all threads but the main one take much longer for a tile.
static void slow_add_tiles(float sum[][16], Type type, const unsigned char *tiles, size_t n_blocks, const Block *x,
                           size_t n_all, int n) {
    for (volatile int i = 0; !pthread_equal(pthread_self(), main_thread) && i < 20000; i++) {}
    usable_kernels()[0]->add_tiles(sum, type, tiles, n_blocks, x, n_all, n);
}

// Texts that go through together must have the logits that each has alone.
typedef struct {
    const Model *model;
    const char *name;
    int n_texts, n_each;
    int ids[MOST_TEXTS][LONG_TEXT], same[MOST_TEXTS];  // text t begins with the first same[t] tokens of text t / 2
    float *wanted[MOST_TEXTS];                         // of each alone, token by token, on one thread
} Crowd;

static Crowd make_crowd(const Model *m, const char *name, int n_texts, int n_each) {
    Crowd c = { .model = m, .name = name, .n_texts = n_texts, .n_each = n_each };
    for (int t = 0; t < n_texts; t++) {
        Runner r;
        Error e = { 0 };
        c.same[t] = t ? (int)random_below((size_t)n_each) : 0;
        for (int i = 0; i < n_each; i++)
            c.ids[t][i] = i < c.same[t] ? c.ids[t / 2][i] : (int)random_below((size_t)m->config.n_tokens);
        c.wanted[t] = get((size_t)n_each * (size_t)m->config.n_tokens * sizeof(float));
        bool ok = start_runner(m, plain(false, false), &r, &e) &&
                  run_from(m, &r, c.ids[t], 0, n_each, c.wanted[t], &e);
        check(ok, "%s, text %d alone: got \"%s\"", name, t, e.text);
        free_runner(&r);
    }
    return c;
}

// Some rows of some texts, in any order; then all the logits that were asked for are compared.
static bool run_rows(const Crowd *c, Workspace *w, Sequence *texts, int threads, Error *e) {
    size_t n_tokens = (size_t)c->model->config.n_tokens;
    int n = 0, pending[MOST_TEXTS] = { 0 };
    for (int tries = 1 + (int)random_below(30); tries > 0 && n < w->settings.batch; tries--) {
        int t = (int)random_below((size_t)c->n_texts), run = random_below(2) ? 1 : 1 + (int)random_below(9);
        for (; run > 0 && n < w->settings.batch && texts[t].n + pending[t] < c->n_each; run--, pending[t]++) {
            int position = texts[t].n + pending[t];
            w->room[n++] = (Row){ c->ids[t][position], position, t, random_below(2) };
        }
    }
    if (!forward(c->model, w, texts, w->room, n, e)) return false;
    for (int i = 0; i < w->n_wanted; i++) {
        const float *got = logits_of(c->model, w, i, e);
        if (!got) return false;
        const Row *row = &w->room[w->wanted[i]];
        check(!memcmp(got, c->wanted[row->sequence] + (size_t)row->position * n_tokens, n_tokens * sizeof *got),
              "%s, %d rows of %d texts, %d threads: token %d of text %d has other logits than alone", c->name, n,
              c->n_texts, threads, row->position, row->sequence);
    }
    return true;
}

static void check_crowd(const Crowd *c, int threads, int rounds) {
    Workspace w;
    Cache cache;
    Error e = { 0 };
    Settings settings = { .threads = threads, .context = c->n_each, .batch = 40 };
    Sequence texts[MOST_TEXTS];
    bool ok = make_workspace(c->model, &w, settings, &e) && make_cache(c->model, &cache, settings, c->n_texts, &e);
    w.work = SIZE_MAX;
    w.deep_pages = random_below(2);
    for (int t = 0; ok && t < c->n_texts; t++) texts[t] = new_sequence(&cache, t);
    int n_spare = cache.n_spare;
    for (int round = 0; ok && round < rounds; round++) {
        int t = (int)random_below((size_t)c->n_texts), n = texts[t].n, of_other = texts[t / 2].n;
        int most = of_other < c->same[t] ? of_other : c->same[t];
        if (random_below(4) == 0) rewind_sequence(&texts[t], (int)random_below((size_t)n + 1));
        if (t > 0 && random_below(3) == 0) fork_sequence(&texts[t], &texts[t / 2], most);
        ok = run_rows(c, &w, texts, threads, &e);
        for (int i = 0; ok && i < c->n_texts; i++)
            check(!memcmp(texts[i].ids, c->ids[i], (size_t)texts[i].n * sizeof(int)), "text %d has other ids", i);
    }
    check(ok, "%s, %d texts together: got \"%s\"", c->name, c->n_texts, e.text);
    for (int t = 0; t < c->n_texts; t++) rewind_sequence(&texts[t], 0);
    check(cache.n_spare == n_spare, "%s: %d of %d pages are free after all", c->name, cache.n_spare, n_spare);
    munmap(w.arena, w.arena_bytes), munmap(cache.arena, cache.arena_bytes);
}

// Tokens far down two texts, whose attention threads share, must have the logits that one thread gives each alone. The
// second text is the first one's fork.
static void check_depth(const Model *m, const char *name) {
    enum { DEPTH = 700, TAIL = 3, CONTEXT = DEPTH + TAIL };
    int ids[DEPTH + 2 * TAIL];
    size_t n_tokens = (size_t)m->config.n_tokens;
    float *wanted = get(2 * TAIL * n_tokens * sizeof *wanted);
    Workspace w;
    Cache cache;
    Error e = { 0 };
    Settings settings = { .threads = 8, .context = CONTEXT, .batch = 64 };
    bool ok = make_workspace(m, &w, settings, &e) && make_cache(m, &cache, settings, 2, &e);
    Sequence texts[2] = { new_sequence(&cache, 0), new_sequence(&cache, 1) };
    w.work = SIZE_MAX;
    w.settings.threads = 1;
    for (int i = 0; i < DEPTH + 2 * TAIL; i++) ids[i] = (int)random_below(n_tokens);
    ok = ok && prefill(m, &w, &texts[0], ids, DEPTH, NULL, &e);
    for (int i = 0; ok && i < 2 * TAIL; i++) {
        if (i == TAIL) rewind_sequence(&texts[0], DEPTH);
        w.room[0] = (Row){ ids[DEPTH + i], texts[0].n, 0, true };
        ok = forward(m, &w, texts, w.room, 1, &e) && make_logits(m, &w, 0, 1, &e);
        memcpy(wanted + (size_t)i * n_tokens, w.logits, n_tokens * sizeof *wanted);
    }
    for (int i = 0; ok && i < 12; i++) {  // one token of one text, of each, or all of both, on 2, 3 and 8 threads
        int threads = i % 3 == 2 ? 8 : 2 + i % 3, n_texts = i < 3 ? 1 : 2, each = i < 6 ? 1 : TAIL, n = 0;
        w.settings.threads = threads;
        rewind_sequence(&texts[0], DEPTH);
        fork_sequence(&texts[1], &texts[0], DEPTH);
        for (int k = 0; k < each * n_texts; k++) {
            int text = k % n_texts, at = k / n_texts;
            if (i >= 9) text = k / each, at = k % each;  // one text after the other
            w.room[n++] = (Row){ ids[DEPTH + text * TAIL + at], DEPTH + at, text, true };
        }
        ok = forward(m, &w, texts, w.room, n, &e) && make_logits(m, &w, 0, n, &e);
        for (int k = 0; ok && k < n; k++) {
            int which = w.room[k].sequence * TAIL + w.room[k].position - DEPTH;
            const float *got = w.logits + (size_t)k * w.logits_stride;
            check(!memcmp(got, wanted + (size_t)which * n_tokens, n_tokens * sizeof *got),
                  "%s, %d tokens by %d threads: token %d of text %d has other logits than alone", name, n, threads,
                  w.room[k].position, w.room[k].sequence);
        }
    }
    check(ok, "%s, %d tokens: got \"%s\"", name, DEPTH, e.text);
    munmap(w.arena, w.arena_bytes), munmap(cache.arena, cache.arena_bytes);
    free(wanted);
}

// What is in a page: its first byte, and its last; or puts it there.
static int page_mark(const Cache *c, int page, int mark) {
    unsigned char *first = page_at(c, page), *last = first + c->page_bytes - 1;
    if (mark >= 0) *first = *last = (unsigned char)mark;
    return *first == *last ? *first : -1;
}

// Rewinding and forking, page by page, as by hand: what is shared, what is copied, what is free again.
static void test_pages(void) {
    Opened o = open_golden("llama_mqa.gguf");
    Cache c;
    Error e = { 0 };
    Settings settings = { .context = 200 };
    if (!check(make_cache(&o.model, &c, settings, 3, &e), "a cache: got \"%s\"", e.text)) return;
    Sequence a = new_sequence(&c, 0), b = new_sequence(&c, 1), d = new_sequence(&c, 2);
    check(c.n_spare == 12, "3 texts of 200: got %d pages, wanted 12", c.n_spare);
    for (int i = 0; i < 130; i++) append_token(&a, i);
    for (int i = 0; i < 3; i++) page_mark(&c, a.pages[i], 10 + i);
    check(a.n == 130 && c.n_spare == 9 && a.ids[129] == 129, "130 tokens: %d pages are left, wanted 9", c.n_spare);
    fork_sequence(&b, &a, 100);
    check(b.n == 100 && c.n_spare == 9 && b.pages[1] == a.pages[1] && b.ids[99] == 99,
          "a fork of 100: %d pages are left, wanted 9", c.n_spare);
    append_token(&b, 1000);
    check(c.n_spare == 8 && b.pages[0] == a.pages[0] && b.pages[1] != a.pages[1] && b.ids[100] == 1000 &&
              a.ids[100] == 100,
          "a token more: %d pages are left, wanted 8", c.n_spare);
    check(page_mark(&c, b.pages[1], -1) == 11 && page_mark(&c, a.pages[1], -1) == 11, "a page is copied whole");
    append_token(&b, 1001);
    check(c.n_spare == 8, "its own page is not copied: %d pages are left, wanted 8", c.n_spare);
    fork_sequence(&d, &a, 128);
    check(c.n_spare == 8 && d.pages[1] == a.pages[1], "a fork of two pages: %d are left, wanted 8", c.n_spare);
    append_token(&d, 2000);
    check(c.n_spare == 7 && d.pages[1] == a.pages[1] && d.pages[2] != a.pages[2], "%d pages are left, wanted 7",
          c.n_spare);
    rewind_sequence(&d, 128);
    check(d.n == 128 && c.n_spare == 8, "rewound to two pages: %d are left, wanted 8", c.n_spare);
    rewind_sequence(&a, 70);
    check(a.n == 70 && c.n_spare == 9, "rewound to 70: %d pages are left, wanted 9", c.n_spare);
    append_token(&a, 3000);  // the page is d's too
    check(c.n_spare == 8 && a.pages[1] != d.pages[1] && page_mark(&c, a.pages[1], -1) == 11 && d.ids[70] == 70,
          "written after that: %d pages are left, wanted 8", c.n_spare);
    rewind_sequence(&a, 100);
    check(a.n == 71, "rewound to more than there is: got %d tokens, wanted 71", a.n);
    fork_sequence(&a, &b, 0);
    check(a.n == 0 && c.n_spare == 9, "a fork of nothing: %d pages are left, wanted 9", c.n_spare);
    fork_sequence(&a, &b, 102);  // a's own are given back first
    fork_sequence(&a, &d, 128);
    rewind_sequence(&d, 0), rewind_sequence(&b, 0);
    check(c.n_spare == 10 && page_mark(&c, a.pages[1], -1) == 11, "%d pages are left, wanted 10", c.n_spare);
    rewind_sequence(&a, 0);
    bool is_spare[12] = { false };
    for (int i = 0; i < c.n_spare && i < 12; i++) is_spare[c.spare[i]] = true;
    for (int i = 0; i < 12; i++)
        check(is_spare[i] && c.users[i] == 0, "page %d is lost, or has %d users", i, c.users[i]);
    munmap(c.arena, c.arena_bytes);
    close_opened(&o);
}

static void test_sequences(void) {
    static const char *const files[] = {
        "llama_mqa.gguf", "mixed.gguf", "mixtral.gguf", "families/gemma2.gguf", "families/olmo2.gguf",
    };
    static const struct { int n_texts, n_each, threads[4]; } crowds[] = {
        { 1, 45, { 1, 2 } }, { 3, LONG_TEXT, { 2, 3 } }, { 8, 45, { 1, 3, 2 } }, { MOST_TEXTS, 70, { 1, 2 } },
    };
    main_thread = pthread_self();
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        Opened o = open_golden(files[i]);
        int context = o.model.config.context;
        o.model.config.context = LONG_TEXT;
        for (int k = 0; k < 4; k++) {
            Crowd c = make_crowd(&o.model, files[i], crowds[k].n_texts, crowds[k].n_each);
            kernels = usable_kernels()[0];
            for (const int *threads = crowds[k].threads; *threads; threads++) check_crowd(&c, *threads, 50);
            Kernels slow = *kernels;
            slow.add_tiles = slow_add_tiles;
            if (k == 2) kernels = &slow, check_crowd(&c, 2, 40);
            if (k == 2) kernels = usable_kernels()[0], check_crowd(&c, 8, 4);
            for (int t = 0; t < c.n_texts; t++) free(c.wanted[t]);
        }
        check_depth(&o.model, files[i]);
        o.model.config.context = context;
        close_opened(&o);
    }
}

// Without -b the batch shrinks for what it makes large itself, and not for a long context, many threads or tokens.
static void test_batches(void) {
    Opened o = open_golden("llama_linear.gguf");
    const struct { int context, threads, ffn_dim; long asked; bool shrinks; } cases[] = {
        { 128, 1, 36, 0, false }, { 1 << 20, 64, 36, 0, false }, { 128, 1, 1 << 17, 0, true },
        { 128, 1, 1 << 17, 128, false },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        o.model.layers[0].ffn_dim = cases[i].ffn_dim;
        options.batch = cases[i].asked;
        Runner s;
        Error e = { 0 };
        bool ok = make_runner(&o.model, (Settings){ cases[i].threads, cases[i].context, 128, false, false }, &s, &e);
        int batch = s.w.settings.batch;
        check(ok && (batch < 128) == cases[i].shrinks && batch >= 16, "a batch of 128, case %zu: got %d and \"%s\"", i,
              batch, e.text);
        free_runner(&s);
    }
    options.batch = 0;
    o.model.layers[0].ffn_dim = 36;
    close_opened(&o);
}

// ---- What does not go on ----

// More tokens than a batch or the context holds; and after Ctrl-C, which the program looks for between two steps.
static void test_stops(void) {
    Opened o = open_golden("llama_tied.gguf");
    Runner s;
    Error e = { 0 };
    int ids[64] = { 1 };
    const char *path = temporary("interrupted.bin");
    bool ok = start_runner(&o.model, (Setting){ false, true, 1, 8, NULL }, &s, &e) &&
              run_tokens(&o.model, &s, ids, 8, 1, &e);
    check(ok && s.text.n == 8, "8 tokens: got \"%s\"", e.text);
    check(!run_tokens(&o.model, &s, ids, 9, 1, &e) && e.status == NO_ROOM && s.text.n == 8, "9 tokens in batches of 8");
    rewind_sequence(&s.text, 0);
    interrupted = SIGINT;
    check(!prefill(&o.model, &s.w, &s.text, ids, 3, NULL, &e) && e.status == INTERRUPTED && s.text.n == 0,
          "prefill after Ctrl-C");
    e.status = DONE;
    options.output = temporary("interrupted.logits");
    check(!run_logits(&o.model, &s.w, &s.text, &(Tokens){ ids, 3, 3, 0 }, &e) && e.status == INTERRUPTED,
          "logits after Ctrl-C");
    options.output = NULL;
    e.status = DONE;
    check(!export_model(&o.model, path, &e) && e.status == INTERRUPTED && access(path, F_OK), "export after Ctrl-C");
    interrupted = 0;
    free_runner(&s);
    close_opened(&o);
}

// ---- The same weights in other files ----

static void check_same_model(const Model *a, const Model *b, const char *name_a, const char *name_b, const int *ids) {
    if (!check(a->config.n_tokens == b->config.n_tokens, "%s and %s: other vocabularies", name_a, name_b)) return;
    float *x = get(n_logits_of(a) * sizeof *x), *y = get(n_logits_of(a) * sizeof *y);
    for (int mode = 0; mode < 4; mode++) {
        Setting how = { mode & 1, mode & 2, 2, 16, usable_kernels()[0] };
        run_all(a, ids, how, x);
        run_all(b, ids, how, y);
        check(!memcmp(x, y, n_logits_of(a) * sizeof *x), "%s and %s, exact %d, f32 cache %d: other logits", name_a,
              name_b, mode & 1, mode >> 1);
    }
    free(x), free(y);
}

static void check_same_tokens(const Tokenizer *a, const Tokenizer *b, const char *name) {
    const char *text = "Once upon a time, <s> 12 \xC3\xA4\xE4\xBD\xA0\xF0\x9F\x98\x80\n";
    Tokens x = { 0 }, y = { 0 };
    Error e = { 0 };
    Span span = { text, strlen(text), true };
    bool ok = encode(a, &span, 1, &x, &e) && encode(b, &span, 1, &y, &e);
    check(ok && x.n == y.n && !memcmp(x.ids, y.ids, x.n * sizeof *x.ids),
          "%s exported: its tokenizer gives other tokens", name);
    check(a->bos == b->bos && a->eos == b->eos && a->flags == b->flags && a->n_end == b->n_end,
          "%s exported: other special tokens", name);
    free(x.ids), free(y.ids);
}

// Compared field by field: what lies between them is not the same under every compiler.
static bool same_config(const Model *a, const Model *b) {
    const Config *c = &a->config, *d = &b->config;
    bool same = !strcmp(c->family, d->family) && c->n_layers == d->n_layers && c->pairing == d->pairing &&
                c->wide_head_norms == d->wide_head_norms;
    for (const ConfigField *f = config_fields; same && f < config_fields + N_CONFIG_FIELDS; f++)
        for (int l = 0; l < n_values(a, f); l++)
            same = same && get_field(a, f, l) == get_field(b, f, l);
    return same;
}

static void test_containers(void) {
    for (int i = 0; i < N_GOLDENS; i++) {
        Opened o = open_golden(goldens[i].file), native;
        Error e = { 0 };
        int ids[GOLDEN_TOKENS];
        read_golden_ids(goldens[i].logits, ids);
        const char *path = temporary("exported.bin"), *again = temporary("again.bin");
        bool ok = export_model(&o.model, path, &e);
        Bytes file = read_bytes(path);
        if (check(ok && file.bytes, "%s exported: got \"%s\"", goldens[i].file, e.text)) {
            if (check(open_bytes(&native, file, &e), "%s exported and opened: got \"%s\"", goldens[i].file, e.text)) {
                check_same_model(&o.model, &native.model, goldens[i].file, "its export", ids);
                check_same_tokens(&o.model.tokenizer, &native.model.tokenizer, goldens[i].file);
                check(same_config(&o.model, &native.model), "%s exported: another configuration", goldens[i].file);
                ok = export_model(&native.model, again, &e);
                Bytes copy = read_bytes(again);
                check(ok && copy.n == file.n && !memcmp(copy.bytes, file.bytes, file.n),
                      "%s exported twice: the second file differs", goldens[i].file);
                free(copy.bytes);
                unlink(again);
            }
            close_opened(&native);
        }
        unlink(path);
        close_opened(&o);
    }
    static const char *const pairs[][3] = {
        { "llama2c_v0.bin", "llama2c_v0.gguf", "llama2c_v0" }, { "mixed.gguf", "mixed_fused.gguf", "mixed" },
    };
    for (int i = 0; i < 2; i++) {
        Opened a = open_golden(pairs[i][0]), b = open_golden(pairs[i][1]);
        int ids[GOLDEN_TOKENS];
        read_golden_ids(pairs[i][2], ids);
        check_same_model(&a.model, &b.model, pairs[i][0], pairs[i][1], ids);
        close_opened(&a);
        close_opened(&b);
    }
}

// ---- Hashes ----

static uint64_t fnv1a(const void *bytes, size_t n) {
    uint64_t hash = 0xcbf29ce484222325u;
    for (size_t i = 0; i < n; i++) hash = (hash ^ ((const unsigned char *)bytes)[i]) * 0x100000001b3u;
    return hash;
}

// A lock, not a proof: these come from this code, on the day when its logits agreed with transformers' (test_goldens).
// They show that a compiler, an option or an edit has changed the arithmetic. Changing one needs a measured reason, in
// the commit's message.
static const struct {
    const char *file, *ids;
    bool exact, cache_f32;
    uint64_t hash;
} hashes[] = {
    { "llama_tied.gguf", "llama_tied", false, true, 0xb17de3686391cb6d },
    { "llama_tied.gguf", "llama_tied", false, false, 0x5e1d1dd1f069119b },
    { "llama_bias.gguf", "llama_bias", false, true, 0xcfe3ceeb4dfb1c99 },
    { "llama3_rope.gguf", "llama3_rope", false, true, 0x740686fcaf124ec3 },
    { "llama_linear.gguf", "llama_linear", false, false, 0x8c8da5882cdc7434 },
    { "llama_mqa.gguf", "llama_mqa", false, false, 0x4e55b5c1aa394c69 },
    { "qwen2.gguf", "qwen2", false, true, 0x0e3810d9f14cc877 },
    { "mixed.gguf", "mixed", false, false, 0x450a5396c3c69e8b },
    { "mixed.gguf", "mixed", true, true, 0x00c4b6bd21967861 },
    { "mixed.gguf", "mixed", true, false, 0x328993dca3745f73 },
    { "llama2c_v2.bin", "llama2c_v2", false, false, 0x28d1052b3c7a4c5e },
    { "llama2c_v2.bin", "llama2c_v2", true, true, 0x50c58548deef9b56 },
    { "mixtral.gguf", "mixtral", false, false, 0x1afb9b0cef4e4e87 },
    { "mixtral.gguf", "mixtral", true, true, 0x34f61669c2662fc3 },
};

static void test_hashes(void) {
    for (size_t i = 0; i < sizeof hashes / sizeof *hashes; i++) {
        Opened o = open_golden(hashes[i].file);
        int ids[GOLDEN_TOKENS];
        read_golden_ids(hashes[i].ids, ids);
        size_t n = n_logits_of(&o.model);
        float *rows = get(n * sizeof *rows);
        run_all(&o.model, ids, (Setting){ hashes[i].exact, hashes[i].cache_f32, 2, 16, NULL }, rows);
        uint64_t hash = fnv1a(rows, n * sizeof *rows);
        check(hash == hashes[i].hash, "%s, exact %d, f32 cache %d: got 0x%016llx, wanted 0x%016llx", hashes[i].file,
              hashes[i].exact, hashes[i].cache_f32, (unsigned long long)hash, (unsigned long long)hashes[i].hash);
        free(rows);
        close_opened(&o);
    }
    check(fnv1a("foobar", 6) == 0x85944171f73967e8u, "FNV-1a of foobar");  // the authors' test vector
}

// ---- What bench counts ----

// Three texts after the same five tokens: they get the same tokens, so the same logits, which are those of one alone.
static void test_parallel(void) {
    enum { N = 3, DEPTH = 5, MADE = 2 };
    Opened o = open_golden("llama_tied.gguf");
    Runner alone;
    Workspace w;
    Cache cache;
    Sequence texts[N];
    Error e = { 0 };
    Settings settings = { .threads = 2, .context = 16, .batch = 8 };
    int tokens[16], n_tokens = o.model.config.n_tokens;
    bool ok = make_workspace(&o.model, &w, settings, &e) && make_cache(&o.model, &cache, settings, N, &e) &&
              make_runner(&o.model, settings, &alone, &e);
    for (int i = 0; ok && i < N; i++) texts[i] = new_sequence(&cache, i);
    for (int i = 0; i < 16; i++) tokens[i] = i * 7 % n_tokens;
    Bench b = { .m = &o.model, .workspace = &w, .texts = texts, .tokens = tokens, .depth = DEPTH };
    Measured r = { 0 };
    ok = ok && prefill(&o.model, &w, texts, tokens, DEPTH, NULL, &e);
    for (int i = 1; ok && i < N; i++) fork_sequence(&texts[i], texts, DEPTH);
    for (int i = 0; ok && i < 3; i++) {  // a prompt, one text, three; each twice, since what a run has added goes again
        r = (Measured){ .parallel = i < 2 ? i : N, .n_tokens = i == 0 ? 4 : i == 1 ? MADE : N * MADE };
        ok = run_model(&b, &r, &e) && run_model(&b, &r, &e);
    }
    ok = ok && run_tokens(&o.model, &alone, tokens, DEPTH, 0, &e) && run_tokens(&o.model, &alone, tokens, 1, 1, &e) &&
         run_tokens(&o.model, &alone, tokens + 1, 1, 1, &e);
    for (int i = 0; ok && i < N; i++)
        check(texts[i].n == DEPTH + MADE && !memcmp(texts[i].ids, alone.text.ids, (DEPTH + MADE) * sizeof(int)) &&
                  !memcmp(w.logits + (size_t)i * w.logits_stride, alone.w.logits, (size_t)n_tokens * sizeof(float)),
              "text %d of %d together: got %d tokens, or other ones or other logits than alone", i, N, texts[i].n);
    check(ok, "texts together: got \"%s\"", e.text);
    free_runner(&alone);
    munmap(w.arena, w.arena_bytes), munmap(cache.arena, cache.arena_bytes);
    close_opened(&o);
}

// Expected by hand. llama_mqa: 2 layers of 30 dimensions, 5 heads of 6 that share one key/value head, 36 in the
// feed-forward layer, 135 tokens; in f32, tiles of 16 rows by 32 columns. A layer's matrices have 3 * 36 * 30 +
// 2 * 30 * 30 + 2 * 6 * 30 = 5400 numbers and, padded, (2 * 48 + 64) * 32 + 2 * (32 + 16) * 32 = 8192 of 4 bytes; the
// head has 4050, and padded 144 * 32. A position of the cache has 2 * 6 * 4 = 48 bytes a layer.
static void test_counts(void) {
    static const struct { const char *name; int past, n; bool exact; int parallel; Load wanted; } cases[] = {
        // two tokens that see 1 and 2, then one that sees 3; each 4 * 30 operations a position and layer
        { "llama_mqa.gguf", 0, 3, true, 0,
          { 2 * 2 * 32768 + 18432 + 2 * 48 * (2 + 3), 0, 2 * (2 * 3 * 5400 + 4050) + 2 * 120 * (1 + 2 + 3) } },
        { "llama_mqa.gguf", 5, 2, true, 1,
          { 2 * (2 * 32768 + 18432) + 2 * 48 * (6 + 7), 0, 2 * 2 * (2 * 5400 + 4050) + 2 * 120 * (6 + 7) } },
        // three texts read the weights together, and each its own cache
        { "llama_mqa.gguf", 5, 2, true, 3,
          { 2 * (2 * 32768 + 18432) + 3 * 2 * 48 * (6 + 7), 0, 3 * (2 * 2 * (2 * 5400 + 4050) + 2 * 120 * (6 + 7)) } },
        // 2 of 5 experts of 3 * 32 * 40 numbers in each of 2 layers: of all 38400, 19200 in q8, 6400 in q4, the others
        // in 16 bits; 3072 of attention, 5 * 32 of the router, 131 * 32 of the head; 4 heads of 8 that see 1 position
        { "mixtral.gguf", 0, 1, false, 1,
          { 0, 2 * 25600 * 2 / 5.0, 2 * (12800 * 2 / 5.0 + 2 * (3072 + 160) + 4192) + 2 * 4 * 32 } },
        { "mixtral.gguf", 0, 1, true, 1, { 0, 0, 2 * (38400 * 2 / 5.0 + 2 * (3072 + 160) + 4192) + 2 * 4 * 32 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Opened o = open_golden(cases[i].name);
        Workspace w = { .settings = { .batch = 2, .exact = cases[i].exact, .cache_f32 = cases[i].exact } };
        Load steps[N_STEPS];
        const Load *wanted = &cases[i].wanted;
        Load got = load_of(&o.model, &w, cases[i].past, cases[i].n, cases[i].parallel, steps);
        check(got.int8 == wanted->int8 && got.f32 == wanted->f32 && (!wanted->bytes || got.bytes == wanted->bytes),
              "%s, %d tokens after %d: got %g bytes, %g and %g operations, wanted %g, %g and %g", cases[i].name,
              cases[i].n, cases[i].past, got.bytes, got.int8, got.f32, wanted->bytes, wanted->int8, wanted->f32);
        close_opened(&o);
    }
    // 100 bytes at 10 a nanosecond take 10; 1000 operations at 50 and 500 at 25 take 40. The median run took 80.
    Measured r = { .n_tokens = 4, .load = { 100, 1000, 500 }, .ceiling = { 10, 50, 25 }, .ns = { 90, 60, 80 } };
    conclude(&r, 3);
    check(r.per_s == 5e7 && r.percent == 50 && !strcmp(r.bound, "arithmetic") && r.most_gop == 37.5 && r.gb == 1.25,
          "a test's figures: got %g tokens/s, %g %% of %s", r.per_s, r.percent, r.bound);
    r = (Measured){ .n_tokens = 1, .load = { 100, 10, 0 }, .ceiling = { 10, 50, 25 }, .ns = { 20, 20 } };
    conclude(&r, 2);
    check(r.percent == 50 && !strcmp(r.bound, "memory") && r.gop == 0.5 && r.spread == 0,
          "what reads: got %g %% of %s", r.percent, r.bound);
    test_parallel();
}

// ---- Stories ----

// What llama2.c prints with stories260K.bin: ../shared/data/README.md. The first needs one token more than its -n 256.
static const struct {
    const char *arguments, *text;
} stories[] = {
    { "-t 0 -n 257 -q",
      "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. One day, she saw a "
      "big, red ball. She wanted to play with it, but it was too high.\n"
      "Lily's mom said, \"Lily, let's go to the park.\" Lily was sad and didn't know what to do. She said, \"I want to "
      "play with your ball, but I can't find it.\"\n"
      "Lily was sad and didn't know what to do. She said, \"I'm sorry, Lily. I didn't know what to do.\"\n"
      "Lily didn't want to help her mom, so she said, \"I'm sorry, mom. I didn't know what to do.\" Her mom said, "
      "\"Don't worry, Lily. We can help you.\"\n" },
    { "-t 1.0 -p 0.9 -s 133742 -n 256 -q",
      "Once upon a time, there was a little boy named Timmy. Timmy loved to play with his toys and eat sandwiches. One "
      "day, Timmy's mom told him it was time to rest for a while. Timmy's friend Billy came over and took him a down.\n"
      "Timmy's mom saw that Timmy was sad, but Timmy said, \"I didn't understand what is it! We need to find some "
      "leafs.\" Timmy thought about it and took a deep breath on a spoon. He hoped it was important to be kind and "
      "continued to find its image next time.\n"
      "After they finished getting, Timmy's dad came up to his house and promised to help Timmy.\n" },
};

static char *run_command(const char *arguments, int *status);  // test_command.c

static void test_stories(void) {
    static const char model[] = "../shared/data/stories260K.bin", vocabulary[] = "../shared/data/tok512.bin";
    if (!file_exists(model) || !file_exists(vocabulary)) {
        printf("stories: skipped, there is no %s\n", model);
        return;
    }
    char command[512];
    int status;
    const char *native = temporary("stories.bin");
    snprintf(command, sizeof command, "%s -z %s -m export -o %s", model, vocabulary, native);
    free(run_command(command, &status));
    check(status == 0, "exporting stories260K: got status %d", status);
    for (size_t i = 0; i < 4; i++) {
        if (i % 2) snprintf(command, sizeof command, "%s %s", native, stories[i / 2].arguments);
        else snprintf(command, sizeof command, "%s -z %s %s", model, vocabulary, stories[i / 2].arguments);
        char *got = run_command(command, &status);
        size_t at = 0;
        while (got[at] && got[at] == stories[i / 2].text[at]) at++;
        check(status == 0 && !strcmp(got, stories[i / 2].text),
              "%s: got status %d and, from byte %zu on, \"%.40s\", wanted \"%.40s\"", command, status, at, got + at,
              stories[i / 2].text + at);
        free(got);
    }
    unlink(native);
}
