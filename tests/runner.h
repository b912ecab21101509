// One text with all that it needs to go through a model, for tests that want no more.

typedef struct {
    Workspace w;
    Cache cache;
    Sequence text;
} Runner;

static bool make_runner(const Model *m, Settings settings, Runner *r, Error *e) {
    *r = (Runner){ .w = { .n = 0 } };
    bool ok = make_workspace(m, &r->w, settings, e) && make_cache(m, &r->cache, r->w.settings, 1, e);
    if (ok) r->text = new_sequence(&r->cache, 0);
    return ok;
}

static void free_runner(Runner *r) {
    if (r->w.arena) munmap(r->w.arena, r->w.arena_bytes);
    if (r->cache.arena) munmap(r->cache.arena, r->cache.arena_bytes);
    *r = (Runner){ .w = { .n = 0 } };
}

// The text's next n tokens in one pass, with logits of the last n_logits <= LOGITS_AT_ONCE.
static bool run_tokens(const Model *m, Runner *r, const int *ids, int n, int n_logits, Error *e) {
    for (int i = 0; i < n && i < r->w.settings.batch; i++)
        r->w.room[i] = (Row){ ids[i], r->text.n + i, 0, i >= n - n_logits };
    return forward(m, &r->w, &r->text, r->w.room, n, e) && (n_logits == 0 || make_logits(m, &r->w, 0, n_logits, e));
}
