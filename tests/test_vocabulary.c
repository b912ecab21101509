// Damaged vocabularies: sections as native files carry them, and what GGUF files have. Part of test.c.

// ---- Sections ----

// Opens a section; wanted is what the refusal must say, or NULL: it must open.
static void check_section(Bytes b, const char *what, const char *wanted) {
    Tokenizer t = { 0 };
    Error e = { 0 };
    bool ok = open_tokenizer(b.bytes, b.n, &t, &e);
    check(wanted ? !ok && is_refusal(&e) && strstr(e.text, wanted) : ok, "a vocabulary, %s: got %s\"%s\", wanted %s%s",
          what, ok ? "it opened " : "", e.text, wanted ? "a refusal with " : "it to open", wanted ? wanted : "");
    close_tokenizer(&t);
}

static Bytes section_of(const char *golden) {
    Opened o = open_golden(golden);
    Bytes b = copy_bytes(o.model.vocabulary, o.model.vocabulary_bytes);
    close_opened(&o);
    return b;
}

// Of n tokens with these lengths and types, in a text of letters or, if it is not NULL, that one.
static Bytes make_section(int kind, const uint32_t *lengths, const uint8_t *types, uint32_t n, const char *text,
                          const uint32_t (*merges)[3], uint32_t n_merges) {
    Tokenizer h = { .kind = (uint32_t)kind, .bos = -1, .eos = -1, .unk = -1, .n_tokens = (int)n,
                    .n_merges = (int)n_merges };
    for (uint32_t i = 0; i < n; i++) h.text_bytes += lengths[i];
    Buffer b = { 0 };
    put(&b, &h, HEADER_BYTES);
    put(&b, NULL, 4 * n);
    put_number(&b, 0, 4);
    for (uint32_t i = 0, end = 0; i < n; i++) put_number(&b, end += lengths[i], 4);
    if (n_merges) put(&b, merges, n_merges * sizeof *merges);
    put(&b, types, n);
    for (uint32_t i = 0; i < h.text_bytes; i++) put_number(&b, text ? (unsigned char)text[i] : 'a', 1);
    put(&b, NULL, round_up(b.n, 4) - b.n);
    Bytes made = copy_bytes(b.bytes, b.n);
    free(b.bytes);
    return made;
}

// The arrays that only some sections have: at the right values, and each at one that it cannot have.
static void check_some_arrays(Bytes b, const Tokenizer *h, size_t type) {
    size_t n = (size_t)h->n_tokens, takes = type + 32 + n;
    Bytes wide = new_bytes(round_up(takes + n + h->text_bytes, 4));
    uint32_t flags = h->flags | TAKES_WHITE | AROUND, last = (uint32_t)n - 1;
    memset(wide.bytes, 0, wide.n);
    memcpy(wide.bytes, b.bytes, type);
    memcpy(wide.bytes + offsetof(Tokenizer, flags), &flags, 4);
    memset(wide.bytes + type, 0xFF, 32);
    memcpy(wide.bytes + type + 20, &last, 4);
    memcpy(wide.bytes + type + 32, b.bytes + type, n);
    memset(wide.bytes + takes + 5, TAKES_BOTH, 2);
    memcpy(wide.bytes + takes + n, b.bytes + type + n, h->text_bytes);
    check_section(wide, "arrays that some have", NULL);
    wide.bytes[takes + 5] = 4;
    check_section(wide, "what a token takes", "token 5 takes 4");
    wide.bytes[takes + 5] = 0;
    memcpy(wide.bytes + type + 20, &(uint32_t){ (uint32_t)n }, 4);
    check_section(wide, "a token around", "with which texts begin or end");
    free(wide.bytes);
}

// The fields of the header and the arrays behind it, as tokenizer.c draws them.
static void test_damaged_sections(void) {
    enum { KIND = 0, PRE = 4, FLAGS = 8, BOS = 12, EOS = 16, UNK = 20, N_END = 24, N_TOKENS_AT = 28, N_MERGES = 32,
           TEXT_BYTES = 36 };
    static const char *const files[] = { "llama_linear.gguf", "qwen2.gguf" };
    for (int i = 0; i < 2; i++) {
        Bytes b = section_of(files[i]);
        Tokenizer h;
        memcpy(&h, b.bytes, HEADER_BYTES);
        size_t n = (size_t)h.n_tokens, starts = 40 + 4 * n, ends = starts + 4 * n + 4 + 12 * (size_t)h.n_merges;
        size_t type = ends + 4 * (size_t)h.n_end, less = (uint32_t)-2, no = (uint32_t)-1;
        const struct { const char *what; size_t at, value, at2, value2; const char *wanted; } cases[] = {
            { "kind", KIND, 0, 0, 0, "of kind 0" }, { "kind", KIND, 3, 0, 3, "of kind 3" },
            { "pre-tokenizer", PRE, 1000, PRE, 1000, "pre-tokenizer 1000" },
            { "flags", FLAGS, 2048, FLAGS, 2048, "flags 2048" },
            { "no array of what takes", FLAGS, TAKES_WHITE, FLAGS, TAKES_WHITE, "asks for more" },
            { "no tokens around", FLAGS, AROUND, FLAGS, AROUND, "" },
            { "no tokens", N_TOKENS_AT, 0, N_END, 0, "of 0 tokens" },
            { "many tokens", N_TOKENS_AT, 1048577, N_TOKENS_AT, 1048577, "of 1048577 tokens" },
            { "merges", N_MERGES, i ? 8388609 : 1, KIND, h.kind, "merges and" },
            { "end tokens", N_END, n + 1, N_END, n + 1, "end tokens" },
            { "bos", BOS, less, BOS, less, "special token -2" }, { "bos", BOS, n, BOS, n, "special token" },
            { "eos", EOS, less, EOS, less, "special token -2" }, { "eos", EOS, n, EOS, n, "special token" },
            { "unk", UNK, less, UNK, less, "special token -2" }, { "unk", UNK, n, UNK, n, "special token" },
            { "no bos to add", FLAGS, ADD_BOS, BOS, no, "adds a begin or end token" },
            { "no eos to add", FLAGS, ADD_EOS, EOS, no, "adds a begin or end token" },
            { "a text that does not begin", starts, 1, starts, 1, "do not fill" },
            { "a text that ends early", starts + 4 * n, h.text_bytes - 1, KIND, h.kind, "do not fill" },
            { "a piece that ends before", starts + 4 * 6, 0, starts + 4 * 6, 0, "token 5 ends before" },
            { "a piece that ends behind", starts + 4 * 6, UINT32_MAX, starts + 4 * 6, UINT32_MAX, "token" },
            { "a score of NaN", 40 + 4 * 7, 0x7fc00000, 40 + 4 * 7, 0x7fc00000, "token 7: its score" },
            { "an end token", ends, n, ends, n, "is not in the vocabulary" },
            { "an end token of -1", ends, UINT32_MAX, ends, UINT32_MAX, "end token 4294967295 is not" },
        };
        check_section(b, files[i], NULL);
        for (size_t k = 0; k < sizeof cases / sizeof *cases; k++) {
            Bytes damaged = copy_bytes(b.bytes, b.n);
            memcpy(damaged.bytes + cases[k].at, &cases[k].value, 4);
            memcpy(damaged.bytes + cases[k].at2, &cases[k].value2, 4);
            check_section(damaged, cases[k].what, cases[k].wanted);
            free(damaged.bytes);
        }
        static const struct { unsigned char type; const char *wanted; } types[] = {
            { 0, "token 9 has type 0" }, { 7, "token 9 has type 7" }, { 255, "token 9 has type 255" },
        };
        for (size_t k = 0; k < sizeof types / sizeof *types; k++) {
            unsigned char kept = b.bytes[type + 9];
            b.bytes[type + 9] = types[k].type;
            check_section(b, "a type", types[k].wanted);
            b.bytes[type + 9] = kept;
        }
        check_some_arrays(b, &h, type);
        Bytes longer = new_bytes(b.n + 4);
        memcpy(longer.bytes, b.bytes, b.n);
        memset(longer.bytes + b.n, 0, 4);
        check_section(longer, "four bytes more", "asks for fewer");
        check_section((Bytes){ b.bytes, b.n - 4 }, "four bytes less", "asks for more");
        check_section((Bytes){ b.bytes, 39 }, "39 bytes", "cut short");
        free(longer.bytes), free(b.bytes);
    }
}

// Lengths of pieces, of each type.
static void test_lengths(void) {
    static const struct { uint32_t length; uint8_t type; const char *wanted; } cases[] = {
        { 4096, PIECE_NORMAL, NULL }, { 4097, PIECE_NORMAL, "4097 bytes, at most 4096" },
        { 4097, PIECE_UNUSED, "4097 bytes, at most 4096" }, { 256, PIECE_CONTROL, NULL },
        { 257, PIECE_CONTROL, "257 bytes, at most 256" }, { 257, PIECE_USER_DEFINED, "257 bytes, at most 256" },
        { 1, PIECE_BYTE, NULL }, { 2, PIECE_BYTE, "2 bytes, at most 1" }, { 0, PIECE_BYTE, "0 bytes, at most 1" },
        { 0, PIECE_NORMAL, NULL },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bytes b = make_section(SPM, &cases[i].length, &cases[i].type, 1, NULL, NULL, 0);
        check_section(b, "a piece", cases[i].wanted);
        free(b.bytes);
    }
    for (uint32_t n = 5; n < 9; n++) {  // 40 + 4 + 8 + 1 + n bytes; zeros up to a multiple of 4 belong to it
        Bytes b = make_section(SPM, &n, &(uint8_t){ PIECE_NORMAL }, 1, NULL, NULL, 0);
        size_t end = 53 + n;
        check_section(b, "with its last zeros", NULL);
        check_section((Bytes){ b.bytes, b.n - 4 }, "without its last letters", "asks for more");
        if (end < b.n) check_section((Bytes){ b.bytes, end }, "without its last zeros", "asks for fewer");
        if (end < b.n) b.bytes[b.n - 1] = 1, check_section(b, "with another end", "last bytes are not zero");
        free(b.bytes);
    }
}

// What a merge makes must be the bytes of its parts.
static void test_merges(void) {
    static const uint32_t lengths[] = { 1, 1, 2, 3, 1 };  // a b ab abc c
    static const uint8_t types[] = { 1, 1, 1, 1, 1 };
    static const struct { uint32_t merge[1][3]; const char *wanted; } cases[] = {
        { { { 0, 1, 2 } }, NULL }, { { { 2, 4, 3 } }, NULL }, { { { 1, 1, 2 } }, "merge 0" },
        { { { 0, 0, 2 } }, "merge 0" }, { { { 0, 1, 3 } }, "merge 0" }, { { { 0, 1, 1 } }, "merge 0" },
        { { { 5, 1, 1 } }, "merge 0: token 1 is not 5" }, { { { 1, 5, 1 } }, "merge 0: token 1 is not 1 and 5" },
        { { { INT32_MAX, 1, 1 } }, "merge 0" }, { { { UINT32_MAX, 1, 1 } }, "merge 0" },
        { { { 1, 0x80000000, 1 } }, "merge 0" }, { { { 0, 1, 5 } }, "merge 0" },
        { { { 0, 1, UINT32_MAX } }, "merge 0" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bytes b = make_section(BPE, lengths, types, 5, "abababcc", cases[i].merge, 1);
        check_section(b, "a merge", cases[i].wanted);
        free(b.bytes);
    }
}

// Of two merges of one pair the earlier counts, whatever makes the same bytes.
static void test_merge_twice(void) {
    static const uint32_t lengths[] = { 1, 1, 2, 2 }, merges[][3] = { { 0, 1, 3 }, { 0, 1, 2 } };  // a b ab ab
    Bytes b = make_section(BPE, lengths, (const uint8_t[]){ 1, 1, 1, 1 }, 4, "ababab", merges, 2);
    Tokenizer t = { 0 };
    Error e = { 0 };
    if (check(open_tokenizer(b.bytes, b.n, &t, &e), "two merges of a pair: got \"%s\"", e.text)) {
        Tokens tokens = encode_text(&t, "ab", 2, false);
        check(tokens.n == 1 && tokens.ids[0] == 3, "two merges of a pair: got %zu tokens, %d", tokens.n, tokens.ids[0]);
        free(tokens.ids);
    }
    close_tokenizer(&t);
    free(b.bytes);
}

// All pieces may be special.
static void test_all_special(void) {
    enum { N = 4096 };
    uint32_t lengths[N];
    uint8_t types[N];
    char text[N * 8 + 1];
    for (int i = 0, n = 0; i < N; i++) {
        types[i] = PIECE_USER_DEFINED;
        n += (int)(lengths[i] = (uint32_t)snprintf(text + n, 9, "<t_%d>", i));
    }
    Bytes b = make_section(BPE, lengths, types, N, text, NULL, 0);
    check_section(b, "all its pieces special", NULL);
    free(b.bytes);
}

// A word of so many symbols that the tree of their ranks has 18 levels.
static void test_long_word(void) {
    enum { N_AB = (1 << 16) + 1 };
    static const uint32_t lengths[] = { 1, 1, 2, 4 }, merges[][3] = { { 0, 1, 2 }, { 2, 2, 3 } };  // a b ab abab
    Bytes b = make_section(BPE, lengths, (const uint8_t[]){ 1, 1, 1, 1 }, 4, "abababab", merges, 2);
    Tokenizer t = { 0 };
    Error e = { 0 };
    char *text = get(2 * N_AB);
    for (size_t i = 0; i < 2 * N_AB; i++) text[i] = i % 2 ? 'b' : 'a';
    if (check(open_tokenizer(b.bytes, b.n, &t, &e), "a long word's vocabulary: got \"%s\"", e.text)) {
        Tokens tokens = encode_text(&t, text, 2 * N_AB, false);
        size_t n = 0;
        while (n < tokens.n && tokens.ids[n] == (n < N_AB / 2 ? 3 : 2)) n++;
        check(n == N_AB / 2 + 1 && n == tokens.n, "a long word: got %zu tokens, the first %zu right", tokens.n, n);
        free(tokens.ids);
    }
    close_tokenizer(&t);
    free(b.bytes), free(text);
}

// A vocabulary with more pieces, or pairs, of one hash than are looked at is refused. One whose entries fill a run of
// places, one each, opens: what is not there is not looked for to the run's end.
static void check_collisions(Bytes b, bool run, const char *what, size_t n) {
    Tokenizer t = { 0 };
    Error e = { 0 };
    bool ok = open_tokenizer(b.bytes, b.n, &t, &e);
    if (!run) check(!ok && strstr(e.text, "are made to collide") && strstr(e.text, what),
                    "%s of one hash: got \"%s\", wanted a refusal", what, e.text);
    else check(ok, "%s that fill a run: got \"%s\", wanted it to open", what, e.text);
    for (size_t i = 0; run && ok && i < n; i++) {
        const uint32_t *pair = t.n_merges ? t.merge[i] : NULL;
        size_t length;
        const char *s = piece(&t, (int)i, &length);
        int got = pair ? at_slot(merge_slot(&t, pair[0], pair[1])) : lookup(&t, s, length, TEXT_TYPES);
        check(got == (int)i, "%s that fill a run: got %d for number %zu", what, got, i);
    }
    if (run && ok && !t.n_merges) {  // as long as the run that it leads into is, and not there
        uint64_t x = 1u << 31, hash;
        while (hash = hash_bytes((char *)&x, 8), first_slot(hash) & t.piece_mask) x++;
        check(lookup(&t, (char *)&x, 8, TEXT_TYPES) == -1, "%s that fill a run: found what is not there", what);
    }
    close_tokenizer(&t);
    free(b.bytes);
}

// Pieces, and pairs, whose hashes all lead to one place near the end of the table, so that they go on at its beginning;
// and those that fill a run of places from the table's first on, one each.
static void test_collisions(void) {
    enum { N = MAX_PROBES + 3, SINGLE = 512, PIECES = SINGLE + N, SLOTS = 256 };
    uint32_t lengths[PIECES], merges[N][3], n;
    uint8_t types[PIECES];
    char text[SINGLE + 8 * N];
    for (int run = 0; run < 2; run++) {
        bool used[SLOTS] = { false };
        n = 0;
        for (uint64_t x = 0; n < N; x++) {
            uint64_t hash = hash_bytes((char *)&x, 8), slot = first_slot(hash) % SLOTS;
            if (run ? slot >= N || used[slot] : slot != SLOTS - N / 2) continue;
            used[slot] = true;
            memcpy(text + 8 * n, &x, 8);
            lengths[n] = 8;
            types[n++] = PIECE_NORMAL;
        }
        check_collisions(make_section(SPM, lengths, types, N, text, NULL, 0), run, "pieces", N);
    }
    for (int i = 0; i < PIECES; i++) types[i] = PIECE_NORMAL, lengths[i] = i < SINGLE ? 1 : 2;
    for (int i = 0; i < SINGLE; i++) text[i] = (char)i;  // all bytes, twice, and pairs of these
    for (int run = 0; run < 2; run++) {
        bool used[SLOTS] = { false };
        n = 0;
        for (uint32_t i = 0; i < SINGLE * SINGLE && n < N; i++) {
            const uint32_t left = i / SINGLE, right = i % SINGLE;
            uint64_t hash = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u, slot = first_slot(hash) % SLOTS;
            if (run ? slot >= N || used[slot] : slot != SLOTS - N / 2) continue;
            used[slot] = true;
            memcpy(merges[n], (const uint32_t[]){ left, right, SINGLE + n }, sizeof *merges);
            memcpy(text + SINGLE + 2 * n++, (const unsigned char[]){ (unsigned char)left, (unsigned char)right }, 2);
        }
        check(n == N, "only %u pairs lead to one place", n);
        check_collisions(make_section(BPE, lengths, types, PIECES, text, (const void *)merges, N), run, "merges", N);
    }
}

// Pairs that form grids, as those of a vocabulary do, lie in their table about as random ones do.
static void test_grids(void) {
    static const uint32_t grids[][2] = { { 2, 32768 }, { 32768, 2 }, { 256, 256 }, { 16, 4096 }, { 1, 65536 } };
    enum { SLOTS = 1 << 18 };
    int *probes = get(SLOTS * sizeof *probes);
    for (size_t i = 0; i < sizeof grids / sizeof *grids; i++) {
        Tokenizer t = { .merge_slots = probes, .merge_mask = SLOTS - 1, .n_merges = SLOTS / 4 };
        uint32_t (*merges)[3] = get(SLOTS / 4 * sizeof *merges);
        uint32_t n = 0;
        for (uint32_t left = 0; left < grids[i][0]; left++)
            for (uint32_t right = 0; right < grids[i][1]; right++)
                memcpy(merges[n++], (uint32_t[]){ left, right, 0 }, sizeof *merges);
        t.merge = (const void *)merges;
        memset(probes, 0xFF, SLOTS * sizeof *probes);
        uint32_t placed = 0;
        for (uint32_t rank = 0; rank < n; rank++) {
            int *slot = merge_slot(&t, merges[rank][0], merges[rank][1]);
            if (slot && *slot < 0) *slot = (int)rank, placed++;
        }
        check(placed == n, "a grid of %u x %u merges: %u of %u have a place", grids[i][0], grids[i][1], placed, n);
        free(merges);
    }
    free(probes);
}

// Special pieces: one of the greatest length; and one of two bytes in a text that four bytes long has another's hash.
static void test_special_pieces(void) {
    enum { LONG = MAX_SPECIAL_PIECE };
    char text[2 + LONG + 4 + 5 + 2] = "ab";
    memset(text + 2, 'a', LONG);
    memcpy(text + 2 + LONG, "wxyz", 4);
    uint64_t wanted = hash_bytes("wxyz", 4) >> 48;
    char *alike = text + 2 + LONG + 4;
    for (uint32_t i = 0; i == 0 || hash_bytes(alike, 4) >> 48 != wanted; i++) memcpy(alike, &i, 4);
    alike[4] = 'a';
    memcpy(alike + 5, alike, 2);
    const uint32_t lengths[] = { 1, 1, LONG, 4, 5, 2 };
    const uint8_t types[] = { PIECE_NORMAL, PIECE_NORMAL,
                              PIECE_USER_DEFINED, PIECE_CONTROL, PIECE_CONTROL, PIECE_CONTROL };
    Bytes b = make_section(BPE, lengths, types, 6, text, NULL, 0);
    Tokenizer t = { 0 };
    Error e = { 0 };
    if (check(open_tokenizer(b.bytes, b.n, &t, &e), "special pieces: got \"%s\"", e.text)) {
        Tokens tokens = encode_text(&t, text + 2, LONG, false);
        check(tokens.n == 1 && tokens.ids[0] == 2, "a piece of %d bytes: got %zu tokens", LONG, tokens.n);
        free(tokens.ids);
        char longer[LONG + 2];
        snprintf(longer, sizeof longer, "%.*sb", LONG, text + 2);
        tokens = encode_text(&t, longer, LONG + 1, false);
        check(tokens.n == 2 && tokens.ids[0] == 2 && tokens.ids[1] == 1, "and one more: got %zu tokens", tokens.n);
        free(tokens.ids);
        char other[] = "wxyzb\0\0\0\0b";
        memcpy(other + 5, alike, 4);
        tokens = encode_text(&t, other, 10, true);
        check(tokens.n == 4 && tokens.ids[0] == 3 && tokens.ids[2] == 5 && tokens.ids[3] == 1 && tokens.n_dropped == 2,
              "bytes with the hash of a special piece: got %zu tokens, %zu bytes dropped", tokens.n, tokens.n_dropped);
        free(tokens.ids);
    }
    close_tokenizer(&t);
    free(b.bytes);
    Buffer section = { 0 };
    Vocabulary many = { .kind = BPE, .n_tokens = 1, .n_merges = MAX_MERGES + 1 };
    e = (Error){ 0 };
    check(!pack_vocabulary(&many, &section, &e) && strstr(e.text, "1572865 merges"), "merges: got \"%s\"", e.text);
    free(section.bytes);
}

// ---- GGUF ----

#define TEXT(s) { s, sizeof s - 1 }

static void set_strings(GgufParts *g, const char *key, const Text *texts, size_t n) {
    Buffer b = { 0 };
    put_number(&b, 8, 4);  // strings
    put_number(&b, n, 8);
    for (size_t i = 0; i < n; i++) {
        put_number(&b, texts[i].n, 8);
        if (texts[i].n) put(&b, texts[i].at, texts[i].n);
    }
    set_value(key_named(g, key, true), 9, b.bytes, b.n);
    free(b.bytes);
}

static void set_string(GgufParts *g, const char *key, const char *text) {
    Buffer b = { 0 };
    put_number(&b, strlen(text), 8);
    put(&b, text, strlen(text));
    set_value(key_named(g, key, true), 8, b.bytes, b.n);
    free(b.bytes);
}

// Opens a vocabulary as GGUF files have it. types may be NULL, and n_types another number than n.
static bool open_pieces(Opened *o, const char *model, const Text *pieces, size_t n, const int32_t *types,
                        size_t n_types, const Text *merges, size_t n_merges, Error *e) {
    GgufParts *g = get(sizeof *g);
    g->version = 3;
    set_string(g, "general.architecture", "llama");
    set_string(g, "tokenizer.ggml.model", model);
    set_string(g, "tokenizer.ggml.pre", "gpt-2");
    set_strings(g, "tokenizer.ggml.tokens", pieces, n);
    set_strings(g, "tokenizer.ggml.merges", merges, n_merges);
    if (types) {
        Buffer b = { 0 };
        put_number(&b, 5, 4);  // i32
        put_number(&b, n_types, 8);
        put(&b, types, 4 * n_types);
        set_value(key_named(g, "tokenizer.ggml.token_type", true), 9, b.bytes, b.n);
        free(b.bytes);
    }
    *o = (Opened){ .bytes = put_together(g) };
    *e = (Error){ 0 };
    free_parts(g), free(g);
    return open_vocabulary(o->bytes.bytes, o->bytes.n, -1, &o->model, e);
}

// GPT-2's encoder.py, bytes_to_unicode(): printable characters of Latin-1 stand for their bytes, U+0100 to U+0143 for
// the others in their order. What has another character in it is no text.
static void test_spelled_bytes(void) {
    static const struct { Text spelled; int byte; } cases[] = {
        { TEXT("!"), '!' }, { TEXT("~"), '~' }, { TEXT("\u00A1"), 161 }, { TEXT("\u00AC"), 172 },
        { TEXT("\u00AE"), 174 }, { TEXT("\u00FF"), 255 }, { TEXT("\u0100"), 0 }, { TEXT("\u0120"), ' ' },
        { TEXT("\u0121"), 127 }, { TEXT("\u0142"), 160 }, { TEXT("\u0143"), 173 }, { TEXT(" "), -1 },
        { TEXT("\x1F"), -1 }, { TEXT("\x7F"), -1 }, { TEXT("\xC2\x80"), -1 }, { TEXT("\u00A0"), -1 },
        { TEXT("\u00AD"), -1 }, { TEXT("\u0144"), -1 }, { TEXT("\u4F60"), -1 }, { TEXT("\xFF"), -1 },
        { TEXT("a\xC3"), -1 }, { TEXT("a b"), -1 },
    };
    enum { N = sizeof cases / sizeof *cases };
    Text pieces[N];
    for (int i = 0; i < N; i++) pieces[i] = cases[i].spelled;
    Opened o;
    Error e;
    bool ok = open_pieces(&o, "gpt2", pieces, N, NULL, 0, NULL, 0, &e);
    check(ok, "spelled bytes: got \"%s\"", e.text);
    for (int i = 0; ok && i < N; i++) {
        size_t n;
        const Tokenizer *t = &o.model.tokenizer;
        const char *bytes = piece(t, i, &n);
        bool is_byte = n == 1 && t->type[i] == PIECE_NORMAL && (unsigned char)*bytes == cases[i].byte;
        bool is_kept = n == pieces[i].n && !memcmp(bytes, pieces[i].at, n) && t->type[i] == PIECE_UNUSED;
        size_t n_decoded;
        decode(t, 0, i, &n_decoded);
        check(n_decoded == n, "\"%s\": %zu bytes are decoded, wanted %zu", pieces[i].at, n_decoded, n);
        check(cases[i].byte >= 0 ? is_byte : is_kept, "\"%s\": got %zu bytes of type %d, wanted %d", pieces[i].at, n,
              t->type[i], cases[i].byte);
    }
    close_opened(&o);
}

// Merges that cannot be are left out.
static void test_merge_texts(void) {
    static char huge[9000];
    memset(huge, 'a', sizeof huge);
    huge[4500] = ' ';
    static const Text pieces[] = { TEXT("a"), TEXT("b"), TEXT("ab"), TEXT("bc"), TEXT("db") };
    const Text merges[] = {
        TEXT(""), TEXT("a"), TEXT(" "), TEXT("ab"), TEXT("  "), TEXT(" b"), TEXT("a "), TEXT("abb"), TEXT("   "),
        TEXT("a c"), TEXT("c a"), TEXT("b a"), TEXT("b c"), TEXT("d b"), { huge, sizeof huge }, TEXT("a b"),
    };
    for (size_t i = 0; i < sizeof merges / sizeof *merges; i++) {
        Opened o;
        Error e;
        bool ok = open_pieces(&o, "gpt2", pieces, 5, NULL, 0, merges + i, 1, &e);
        int wanted = merges[i].n == 3 && !memcmp(merges[i].at, "a b", 3);
        check(ok && o.model.tokenizer.n_merges == wanted, "merge %zu: got \"%s\" and %d merges, wanted %d", i, e.text,
              o.model.tokenizer.n_merges, wanted);
        close_opened(&o);
    }
}

static void test_damaged_pieces(void) {
    static char huge[4097];
    memset(huge, 'a', sizeof huge);
    const struct { const char *model; Text piece; int32_t type; const char *wanted; } cases[] = {
        { "llama", TEXT("a"), 0, NULL }, { "llama", TEXT("a"), 7, "has type 7" },
        { "llama", TEXT("a"), -1, "has type -1" }, { "llama", { huge, 4096 }, 1, NULL },
        { "llama", { huge, 4097 }, 1, "more than 4096 bytes" }, { "gpt2", { huge, 4097 }, 1, "more than 4096 bytes" },
        { "llama", TEXT("<0x4a>"), 6, NULL },
        { "llama", TEXT("<0x41"), 6, "byte token 0" }, { "llama", TEXT("<0x41>>"), 6, "byte token 0" },
        { "llama", TEXT("[0x41>"), 6, "byte token 0" }, { "llama", TEXT("<0x41]"), 6, "byte token 0" },
        { "llama", TEXT("<0xG1>"), 6, "byte token 0" }, { "llama", TEXT("<0x1G>"), 6, "byte token 0" },
        { "llama", TEXT(""), 6, "byte token 0" }, { "bert", TEXT("a"), 1, "\"bert\" is unknown" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Opened o;
        Error e;
        bool ok = open_pieces(&o, cases[i].model, &cases[i].piece, 1, &cases[i].type, 1, NULL, 0, &e);
        const char *wanted = cases[i].wanted;
        check(wanted ? !ok && is_refusal(&e) && strstr(e.text, wanted) : ok, "piece \"%.10s\" of type %d: got \"%s\", "
              "wanted \"%s\"", cases[i].piece.at, cases[i].type, e.text, wanted ? wanted : "it to open");
        close_opened(&o);
    }
    static const Text few[] = { TEXT("a"), TEXT("b") };
    Opened o;
    Error e;
    bool ok = open_pieces(&o, "llama", few, 2, (const int32_t[]){ 1, 1, 1 }, 3, NULL, 0, &e);
    check(!ok && strstr(e.text, "2 tokens, 0 scores, 3 types"), "three types of two: got \"%s\"", e.text);
    close_opened(&o);
    ok = open_pieces(&o, "llama", few, 0, NULL, 0, NULL, 0, &e);
    check(!ok && strstr(e.text, "of 0 tokens"), "no pieces: got \"%s\"", e.text);
    close_opened(&o);
    size_t n = MAX_TOKENS + 1;
    Text *many = get(n * sizeof *many);
    ok = open_pieces(&o, "llama", many, n, NULL, 0, NULL, 0, &e);
    check(!ok && strstr(e.text, "than 1048576 tokens"), "many pieces: got \"%s\"", e.text);
    close_opened(&o);
    free(many);
}

// OpenAI's harmony format: an answer ends at <|return|>, and <|end|> only ends one of its messages.
static void test_end_tokens(void) {
    static const Text pieces[] = { TEXT("a"), TEXT("<|end|>"), TEXT("<|return|>") };
    static const int32_t types[] = { PIECE_NORMAL, PIECE_CONTROL, PIECE_CONTROL };
    for (size_t n = 2; n <= 3; n++) {
        Opened o;
        Error e;
        bool ok = open_pieces(&o, "llama", pieces, n, types, n, NULL, 0, &e);
        const Tokenizer *t = &o.model.tokenizer;
        check(ok && !is_end_token(t, 0) && is_end_token(t, 1) == (n == 2) && is_end_token(t, 2) == (n == 3),
              "end tokens of %zu: got \"%s\" and %d of them", n, e.text, t->n_end);
        close_opened(&o);
    }
}

// What only fills a vocabulary up is never printed; a space in SPM is U+2581.
static void test_unused(void) {
    static const Text pieces[] = { TEXT("a"), TEXT("[PAD1]"), TEXT("\u2581b") };
    static const int32_t types[] = { PIECE_NORMAL, PIECE_UNUSED, PIECE_UNUSED };
    for (int bpe = 0; bpe <= 1; bpe++) {
        Opened o;
        Error e;
        size_t n = 2 + !bpe, n_bytes;
        bool ok = open_pieces(&o, bpe ? "gpt2" : "llama", pieces, n, types, n, NULL, 0, &e);
        for (size_t id = 0; ok && id < n; id++) {
            decode(&o.model.tokenizer, 0, (int)id, &n_bytes);
            check(n_bytes == (id == 0), "\"%s\": %zu bytes are decoded", pieces[id].at, n_bytes);
        }
        check(ok, "unused pieces: got \"%s\"", e.text);
        close_opened(&o);
    }
}

// llama.cpp takes <|im_end|>, [EOT] ... for control tokens, whatever a file says; </s> may be meant as text.
static void test_unmarked_end(void) {
    static const Text pieces[] = { TEXT("a"), TEXT("<|im_end|>"), TEXT("</s>"), TEXT("<|im_end|"), TEXT("[EOT]") };
    for (int bpe = 0; bpe <= 1; bpe++) {
        Opened o;
        Error e;
        bool ok = open_pieces(&o, bpe ? "gpt2" : "llama", pieces, 5, NULL, 0, NULL, 0, &e);
        const Tokenizer *t = &o.model.tokenizer;
        for (int id = 0; ok && id < 5; id++) {
            bool ends = id == 1 || id == 4;
            check(is_end_token(t, id) == ends && t->type[id] == (ends ? PIECE_CONTROL : PIECE_NORMAL),
                  "\"%s\" of no type: got type %d", pieces[id].at, t->type[id]);
        }
        check(ok, "an end token of no type: got \"%s\"", e.text);
        close_opened(&o);
    }
}

// A section whose padding needs memory of its own: the buffer that is doubled where it is full has room for one byte.
static void test_padding(void) {
    enum { N = 37, LENGTH = 376 };
    char text[LENGTH];
    memset(text, 'a', sizeof text);
    Text pieces[N] = { { text, LENGTH } };
    Opened o;
    Error e;
    check(open_pieces(&o, "llama", pieces, N, NULL, 0, NULL, 0, &e), "%d pieces: got \"%s\"", N, e.text);
    close_model(&o.model);
    bool ok = false;
    size_t n_told = 0, failing = 0;
    while (!ok && failing < 100) {
        e = (Error){ 0 };
        faults.n = 0;
        faults.failing = ++failing;
        faults.for_good = false;
        ok = open_vocabulary(o.bytes.bytes, o.bytes.n, -1, &o.model, &e);
        n_told += !ok && e.status == NO_MEMORY;
        ok = ok && faults.n < failing;
        faults.failing = 0;
        close_model(&o.model);
    }
    check(failing > 9 && n_told == failing - 1, "padding: %zu of %zu failures were told", n_told, failing - 1);
    close_opened(&o);
}

// More than there may be, of which nothing is read but the number.
static void test_many(void) {
    Error e = { 0 };
    Bytes b = new_bytes(4 + 8 * ((size_t)MAX_TOKENS + 2));  // a tokenizer.bin of empty pieces
    memset(b.bytes, 0, b.n);
    Model m = { 0 };
    check(!open_vocabulary(b.bytes, b.n, -1, &m, &e) && strstr(e.text, "than 1048576 tokens") && !m.packed_vocabulary.n,
          "many pieces: got \"%s\"", e.text);
    close_model(&m);
    Buffer section = { 0 };
    Vocabulary v = { .kind = SPM, .n_tokens = 1, .pieces = { b.bytes, 8, false }, .n_merges = MAX_MERGES + 1 };
    check(!pack_vocabulary(&v, &section, &e) && strstr(e.text, "1572865 merges") && !section.n,
          "many merges: got \"%s\"", e.text);
    free(section.bytes), free(b.bytes);
    b = new_bytes((8 + MAX_PIECE) * (MAX_VOCABULARY / MAX_PIECE + 2));  // pieces as GGUF has them
    memset(b.bytes, 'a', b.n);
    for (size_t i = 0; i < b.n; i += 8 + MAX_PIECE) memcpy(b.bytes + i, &(uint64_t){ MAX_PIECE }, 8);
    v = (Vocabulary){ .kind = SPM, .n_tokens = MAX_VOCABULARY / MAX_PIECE + 2, .pieces = { b.bytes, b.n, false } };
    section = (Buffer){ 0 };
    check(!pack_vocabulary(&v, &section, &e) && strstr(e.text, "more than 16777216 bytes") && !section.n,
          "long pieces: got \"%s\"", e.text);
    free(section.bytes), free(b.bytes);
}

static void test_damaged_vocabularies(void) {
    test_damaged_sections();
    test_lengths();
    test_merges();
    test_merge_twice();
    test_long_word();
    test_all_special();
    test_collisions();
    test_grids();
    test_special_pieces();
    test_spelled_bytes();
    test_merge_texts();
    test_end_tokens();
    test_unused();
    test_unmarked_end();
    test_padding();
    test_many();
    test_damaged_pieces();
}
