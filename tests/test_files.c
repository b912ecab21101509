// Damaged files: each is refused with one line that names what is wrong, or runs. Part of test.c.

#include "attack.c"

// Opens a file and, if it opens, runs one token through it. Returns whether it opened; *e tells why not.
static bool try_open(Bytes b, Error *e) {
    Model m = { 0 };
    *e = (Error){ 0 };
    bool ok = open_model(b.bytes, b.n, 1, &m, e);
    if (ok) {
        Runner s;
        int context = m.config.context < 16 ? m.config.context : 16;
        Error run = { 0 };
        int token = 0;
        // numbers that are not finite are refused here
        if (make_runner(&m, (Settings){ 1, context, 1, false, false }, &s, &run))
            run_tokens(&m, &s, &token, 1, 1, &run);
        if (run.status != DONE && run.status != BAD_FILE && run.status != NO_MEMORY) e->status = -1, ok = false;
        free_runner(&s);
    }
    close_model(&m);
    return ok;
}

// The text may have bytes of the file in it; main() shows those that are no characters as question marks.
static bool is_refusal(const Error *e) { return e->status == BAD_FILE && e->text[0]; }

static void check_refused(Bytes b, const char *what, const char *wanted) {
    Error e;
    bool ok = try_open(b, &e);
    check(!ok && is_refusal(&e) && strstr(e.text, wanted), "%s: got %s\"%s\", wanted a refusal with \"%s\"", what,
          ok ? "it opened " : "", e.text, wanted);
}

// A whole model as an exported file in memory.
static Bytes export_golden(const char *name) {
    Opened o = open_golden(name);
    Error e = { 0 };
    const char *path = temporary("native.bin");
    bool ok = export_model(&o.model, path, &e);
    Bytes b = read_bytes(path);
    if (!check(ok && b.bytes, "%s exported: got \"%s\"", name, e.text)) exit(1);
    unlink(path);
    close_opened(&o);
    return b;
}

// ---- A GGUF taken apart, changed and put together again ----

enum { MAX_PARTS = 128 };

typedef struct {
    char name[600];
    size_t n_name;
    Bytes value;  // from its type on
} GgufKey;

typedef struct {
    char name[600];
    size_t n_name;
    uint32_t n_dims, type;
    uint64_t dims[4], offset;
} GgufTensor;

typedef struct {
    uint32_t version;
    uint64_t n_keys, n_tensors;              // as in the header
    int keys, tensors;                       // as there are
    GgufKey key[MAX_PARTS];
    GgufTensor tensor[MAX_PARTS];
    Bytes data;
} GgufParts;

static uint64_t number_at(const unsigned char *p, size_t n_bytes) {
    uint64_t x = 0;
    memcpy(&x, p, n_bytes);
    return x;
}

// Only for our own goldens: nothing is checked.
static void take_apart(Bytes b, GgufParts *g) {
    static const size_t sizes[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    *g = (GgufParts){ .version = (uint32_t)number_at(b.bytes + 4, 4) };
    g->n_tensors = number_at(b.bytes + 8, 8);
    g->n_keys = number_at(b.bytes + 16, 8);
    const unsigned char *p = b.bytes + 24;
    for (g->keys = 0; g->keys < (int)g->n_keys; g->keys++) {
        GgufKey *k = &g->key[g->keys];
        k->n_name = number_at(p, 8);
        memcpy(k->name, p + 8, k->n_name);
        const unsigned char *value = p += 8 + k->n_name;
        uint64_t type = number_at(p, 4), count = 1, item = type;
        p += 4;
        if (type == 9) item = number_at(p, 4), count = number_at(p + 4, 8), p += 12;
        for (uint64_t i = 0; i < count; i++) p += item == 8 ? 8 + number_at(p, 8) : sizes[item];
        k->value = copy_bytes(value, (size_t)(p - value));
    }
    for (g->tensors = 0; g->tensors < (int)g->n_tensors; g->tensors++) {
        GgufTensor *t = &g->tensor[g->tensors];
        t->n_name = number_at(p, 8);
        memcpy(t->name, p + 8, t->n_name);
        p += 8 + t->n_name;
        t->n_dims = (uint32_t)number_at(p, 4);
        memcpy(t->dims, p + 4, 8 * t->n_dims);
        p += 4 + 8 * t->n_dims;
        t->type = (uint32_t)number_at(p, 4);
        t->offset = number_at(p + 4, 8);
        p += 12;
    }
    size_t begin = round_up((size_t)(p - b.bytes), 32);
    g->data = copy_bytes(b.bytes + begin, b.n - begin);
}

static void put(Buffer *b, const void *from, size_t n) {
    Error e;
    if (!append(b, from, n, &e)) exit(1);
}

static void put_number(Buffer *b, uint64_t x, size_t n_bytes) { put(b, &x, n_bytes); }

static Bytes put_together(const GgufParts *g) {
    Buffer b = { 0 };
    put(&b, "GGUF", 4);
    put_number(&b, g->version, 4);
    put_number(&b, g->n_tensors, 8);
    put_number(&b, g->n_keys, 8);
    for (int i = 0; i < g->keys; i++) {
        put_number(&b, g->key[i].n_name, 8);
        put(&b, g->key[i].name, g->key[i].n_name);
        put(&b, g->key[i].value.bytes, g->key[i].value.n);
    }
    for (int i = 0; i < g->tensors; i++) {
        const GgufTensor *t = &g->tensor[i];
        put_number(&b, t->n_name, 8);
        put(&b, t->name, t->n_name);
        put_number(&b, t->n_dims, 4);
        put(&b, t->dims, 8 * (size_t)(t->n_dims <= 4 ? t->n_dims : 4));
        put_number(&b, t->type, 4);
        put_number(&b, t->offset, 8);
    }
    put(&b, NULL, round_up(b.n, 32) - b.n);
    put(&b, g->data.bytes, g->data.n);
    Bytes result = copy_bytes(b.bytes, b.n);
    free(b.bytes);
    return result;
}

static void free_parts(GgufParts *g) {
    for (int i = 0; i < g->keys; i++) free(g->key[i].value.bytes);
    free(g->data.bytes);
}

static GgufKey *key_named(GgufParts *g, const char *name, bool make) {
    for (int i = 0; i < g->keys; i++) {
        if (!strcmp(g->key[i].name, name)) return &g->key[i];
    }
    if (!make) return NULL;
    GgufKey *k = &g->key[g->keys++];
    *k = (GgufKey){ .n_name = strlen(name) };
    memcpy(k->name, name, k->n_name);
    g->n_keys++;
    return k;
}

static GgufTensor *tensor_named(GgufParts *g, const char *name) {
    for (int i = 0; i < g->tensors; i++) {
        if (!strcmp(g->tensor[i].name, name)) return &g->tensor[i];
    }
    return NULL;
}

static void set_value(GgufKey *k, uint32_t type, const void *value, size_t n) {
    free(k->value.bytes);
    k->value = new_bytes(4 + n);
    memcpy(k->value.bytes, &type, 4);
    if (n) memcpy(k->value.bytes + 4, value, n);
}

// What is done to a file: to a key (K) or a tensor (T) of that name.
typedef enum {
    K_U32, K_U64, K_F32, K_F64, K_TEXT, K_NUL, K_BOOL, K_TYPE, K_DROP, K_TWICE, K_ITEM_TYPE, K_COUNT, K_ARRAY,
    K_ARRAY_OF_ONE, K_FLOATS,
    T_DROP, T_TWICE, T_RENAME, T_NUL, T_DIM0, T_DIM1, T_DIM2, T_DIM3, T_ONE_ROW, T_SWAP, T_N_DIMS, T_TYPE, T_OFFSET,
    T_EXTRA,
    H_VERSION, H_TENSORS, H_KEYS,
} Damage;

typedef struct {
    Damage how;
    const char *name;
    double number;
    const char *text;    // a text value, or a new name
    const char *wanted;  // in the error
} DamageCase;

// A whole number's lower 64 bits; 0 for what has none.
static uint64_t low_bits(double x) {
    uint64_t size = fabs(x) < 0x1p64 ? (uint64_t)fabs(x) : 0;
    return x < 0 ? -size : size;
}

static void damage_key(GgufParts *g, const DamageCase *c) {
    GgufKey *k = key_named(g, c->name, c->how != K_DROP && c->how != K_TWICE);
    uint32_t u = (uint32_t)low_bits(c->number);
    float f = (float)c->number;
    unsigned char text[600];
    uint64_t n = c->text ? strlen(c->text) : 0;
    if (!check(k != NULL, "no key %s to damage", c->name)) return;
    memcpy(text, &n, 8);
    if (n) memcpy(text + 8, c->text, n);
    switch (c->how) {
    case K_U32: set_value(k, c->number < 0 ? 5 : 4, &u, 4); break;
    case K_U64: n = low_bits(c->number), set_value(k, 10, &n, 8); break;
    case K_F32: set_value(k, 6, &f, 4); break;
    case K_F64: set_value(k, 12, &c->number, 8); break;
    case K_TEXT: set_value(k, 8, text, 8 + n); break;
    case K_NUL: k->value.bytes[k->value.n - 1] = 0; break;  // a text's last byte
    case K_BOOL: set_value(k, 7, &u, 1); break;
    case K_ARRAY: set_value(k, 9, (const uint32_t[]){ 4, u ? 0 : 3, 0, 1, 2, 3 }, u ? 12 : 24); break;  // of u32
    case K_ARRAY_OF_ONE: set_value(k, 9, (const uint32_t[]){ 4, 1, 0, u }, 16); break;
    case K_FLOATS: set_value(k, 9, (const uint32_t[]){ 6, 3, 0, 0, 0, 0 }, 24); break;
    case K_TYPE: memcpy(k->value.bytes, &u, 4); break;
    case K_ITEM_TYPE: memcpy(k->value.bytes + 4, &u, 4); break;
    case K_COUNT: n = (uint64_t)c->number, memcpy(k->value.bytes + 8, &n, 8); break;
    case K_DROP:
        free(k->value.bytes);
        memmove(k, k + 1, (size_t)(&g->key[--g->keys] - k) * sizeof *k);
        g->n_keys--;
        break;
    default: {
        GgufKey twin = *k;
        twin.value = copy_bytes(k->value.bytes, k->value.n);
        g->key[g->keys++] = twin;
        g->n_keys++;
    }
    }
}

static void damage_tensor(GgufParts *g, const DamageCase *c) {
    GgufTensor *t = tensor_named(g, c->name);
    if (!check(t != NULL, "no tensor %s to damage", c->name)) return;
    uint64_t u = low_bits(c->number), first = t->dims[0];
    switch (c->how) {
    case T_DROP:
        memmove(t, t + 1, (size_t)(&g->tensor[--g->tensors] - t) * sizeof *t);
        g->n_tensors--;
        break;
    case T_TWICE: case T_EXTRA:  // with bytes of its own
        g->tensor[g->tensors] = *t;
        t = &g->tensor[g->tensors++];
        t->offset = g->data.n;
        g->n_tensors++;
        Bytes longer = new_bytes(g->data.n + 65536);
        memset(longer.bytes, 0, longer.n);
        memcpy(longer.bytes, g->data.bytes, g->data.n);
        free(g->data.bytes);
        g->data = longer;
        if (c->how == T_TWICE) break;
        t->n_dims = 1, t->dims[0] = u ? u : 8;
        // fall through: a name of its own
        __attribute__((fallthrough));
    case T_RENAME:
        memset(t->name, 0, sizeof t->name);
        t->n_name = strlen(c->text);
        memcpy(t->name, c->text, t->n_name);
        break;
    case T_DIM0: t->dims[0] = u; break;
    case T_DIM1: t->dims[1] = u; break;
    case T_DIM2: t->dims[2] = u, t->n_dims = 3; break;
    case T_DIM3:  // after as many of 1 as there are not
        for (int i = (int)t->n_dims; i < 3; i++) t->dims[i] = 1;
        t->dims[3] = u, t->n_dims = 4;
        break;
    case T_ONE_ROW: t->dims[1] = 1, t->n_dims = 2; break;
    case T_NUL: t->n_name++; break;
    case T_SWAP: t->dims[0] = t->dims[1], t->dims[1] = first; break;
    case T_N_DIMS: t->n_dims = (uint32_t)u; break;
    case T_TYPE: t->type = (uint32_t)u; break;
    default: t->offset = u; break;
    }
}

static void check_damaged_gguf(const char *file, const DamageCase *c) {
    Bytes b = read_golden(file);
    GgufParts g;
    take_apart(b, &g);
    if (c->how == H_VERSION) g.version = (uint32_t)c->number;
    else if (c->how == H_TENSORS) g.n_tensors = (uint64_t)c->number;
    else if (c->how == H_KEYS) g.n_keys = (uint64_t)c->number;
    else if (c->how < T_DROP) damage_key(&g, c);
    else damage_tensor(&g, c);
    Bytes damaged = put_together(&g);
    char what[200];
    snprintf(what, sizeof what, "%s, damage %d to %s (%g, %.20s)", file, (int)c->how, c->name ? c->name : "its header",
             c->number, c->text ? c->text : "");
    check_refused(damaged, what, c->wanted);
    free(damaged.bytes);
    free(b.bytes);
    free_parts(&g);
}

// of llama_linear.gguf: dim 24, 6 heads, 3 kv heads, ffn 36, 131 tokens, 2 layers
static const DamageCase gguf_cases[] = {
    { H_VERSION, NULL, 1, NULL, "version 1" }, { H_VERSION, NULL, 4, NULL, "version 4" },
    { H_VERSION, NULL, 0, NULL, "version 0" }, { H_VERSION, NULL, 0x03000000, NULL, "version" },
    { H_TENSORS, NULL, 0x1p63, NULL, "tensors" }, { H_TENSORS, NULL, 0x1p32, NULL, "tensors" },
    { H_TENSORS, NULL, 65537, NULL, "tensors" }, { H_KEYS, NULL, 0x1p63, NULL, "keys" },
    { H_TENSORS, NULL, 0, NULL, "no tensors, only a vocabulary: enough for -m tokenize and" },
    { H_KEYS, NULL, 0x1p32, NULL, "keys" }, { H_KEYS, NULL, 0, NULL, "" },
    // keys that are needed
    { K_DROP, "general.architecture", 0, NULL, "key general.architecture is missing" },
    { K_NUL, "general.architecture", 0, NULL, "has a NUL in it" },
    { K_DROP, "llama.embedding_length", 0, NULL, "llama.embedding_length" },
    { K_DROP, "llama.context_length", 0, NULL, "llama.context_length" },
    { K_DROP, "llama.block_count", 0, NULL, "llama.block_count" },
    { K_DROP, "llama.feed_forward_length", 0, NULL, "llama.feed_forward_length" },
    { K_DROP, "llama.attention.head_count", 0, NULL, "head_count" },
    { K_DROP, "llama.attention.layer_norm_rms_epsilon", 0, NULL, "layer_norm_rms_epsilon" },
    { K_DROP, "tokenizer.ggml.model", 0, NULL, "tokenizer.ggml.model" },
    { K_DROP, "tokenizer.ggml.tokens", 0, NULL, "tokens" },
    { K_DROP, "llama.attention.head_count_kv", 0, NULL, "attn_k.weight" },
    { K_TWICE, "llama.context_length", 0, NULL, "llama.context_length" },
    { K_TWICE, "general.name", 0, NULL, "general.name" },
    // of the right type
    { K_TYPE, "llama.context_length", 13, NULL, "llama.context_length" },
    { K_TYPE, "llama.context_length", 0x7fffffff, NULL, "llama.context_length" },
    { K_TYPE, "general.name", 4, NULL, "" }, { K_TEXT, "llama.attention.head_count", 0, "6", "head_count" },
    { K_TEXT, "llama.block_count", 0, "2", "block_count" },
    { K_ARRAY, "llama.embedding_length", 0, NULL, "embedding_length" },
    { K_ARRAY, "llama.attention.head_count", 0, NULL, "head_count" },
    { K_ARRAY, "llama.block_count", 0, NULL, "block_count" },
    { K_ARRAY_OF_ONE, "llama.context_length", 64, NULL, "context_length is an array of u32, expected an integer" },
    { K_U32, "general.architecture", 1, NULL, "general.architecture" },
    { K_U32, "tokenizer.ggml.model", 1, NULL, "tokenizer.ggml.model" },
    { K_U32, "tokenizer.ggml.tokens", 1, NULL, "tokens" },
    { K_U32, "tokenizer.chat_template", 1, NULL, "chat_template" },
    { K_ITEM_TYPE, "tokenizer.ggml.scores", 0, NULL, "" }, { K_ITEM_TYPE, "tokenizer.ggml.scores", 5, NULL, "scores" },
    { K_ITEM_TYPE, "tokenizer.ggml.token_type", 6, NULL, "token_type" },
    { K_ITEM_TYPE, "tokenizer.ggml.scores", 9, NULL, "scores" },
    { K_ITEM_TYPE, "tokenizer.ggml.token_type", 8, NULL, "token_type" },
    { K_COUNT, "tokenizer.ggml.scores", 0x1p63, NULL, "scores" },
    { K_COUNT, "tokenizer.ggml.tokens", 0x1p61, NULL, "tokens" },
    { K_COUNT, "tokenizer.ggml.tokens", 0x1p62, NULL, "tokens" },
    { K_COUNT, "tokenizer.ggml.scores", 0x1p62, NULL, "scores" },
    { K_BOOL, "llama.rope.freq_base", 1, NULL, "key llama.rope.freq_base is bool, expected a number" },
    { K_BOOL, "llama.attention.layer_norm_rms_epsilon", 1, NULL, "layer_norm_rms_epsilon is bool, expected a number" },
    { K_BOOL, "llama.rope.scaling.factor", 1, NULL, "key llama.rope.scaling.factor is bool, expected a number" },
    { K_BOOL, "llama.block_count", 2, NULL, "key llama.block_count is bool, expected an integer" },
    { K_F32, "llama.block_count", 2, NULL, "key llama.block_count is f32, expected an integer" },
    { K_F64, "llama.embedding_length", 24, NULL, "key llama.embedding_length is f64, expected an integer" },
    { K_F32, "llama.attention.head_count_kv", 3, NULL, "head_count_kv is f32, expected an integer" },
    { K_FLOATS, "llama.feed_forward_length", 0, NULL, "feed_forward_length is an array of f32, expected an" },
    { K_BOOL, "llama.attention.sliding_window", 1, NULL, "sliding_window is bool, expected an integer" },
    { K_F32, "llama.attention.value_length", 4, NULL, "value_length is f32, expected an integer" },
    { K_F32, "llama.rope.scaling.original_context_length", 16, NULL, "length is f32, expected an integer" },
    { K_F32, "general.alignment", 32, NULL, "key general.alignment is f32, expected an integer" },
    { K_BOOL, "general.alignment", 32, NULL, "key general.alignment is bool, expected an integer" },
    { K_F32, "split.count", 1, NULL, "key split.count is f32, expected an integer" },
    { K_BOOL, "tokenizer.ggml.bos_token_id", 1, NULL, "bos_token_id is bool, expected an integer" },
    { K_F64, "tokenizer.ggml.unknown_token_id", 1, NULL, "unknown_token_id is f64, expected an integer" },
    { K_U32, "tokenizer.ggml.add_bos_token", 1, NULL, "add_bos_token is u32, expected a bool" },
    { K_F32, "tokenizer.ggml.add_space_prefix", 1, NULL, "add_space_prefix is f32, expected a bool" },
    { K_U32, "tokenizer.ggml.remove_extra_whitespaces", 1, NULL, "remove_extra_whitespaces asks for" },
    // with values that can be
    { K_TEXT, "general.architecture", 0, "gemma9", "gemma9" }, { K_TEXT, "general.architecture", 0, "", "or empty" },
    { K_TEXT, "general.architecture", 0, "llama-with-a-very-long-name-that-fits-nowhere", "llama-with-a-ve" },
    { K_TEXT, "general.architecture", 0, "qwen2", "qwen2." },
    { K_TEXT, "llama.rope.scaling.type", 0, "dynamic", "dynamic" },
    { K_TEXT, "llama.rope.scaling.type", 0, "longrope", "rope_factors_long" },
    { K_F32, "llama.rope.scaling.attn_factor", 0, NULL, "rope_magnitude is 0" },
    { K_F32, "llama.rope.scaling.attn_factor", NAN, NULL, "rope_magnitude is nan" },
    { K_F32, "llama.rope.scaling.yarn_beta_fast", 32, NULL, "yarn_beta_fast" },  // where there is no YaRN
    { K_U32, "llama.rope.scaling.original_context_length", 4294967295.0, NULL, "original_context is 4294967295" },
    { T_EXTRA, "output_norm.weight", 0, "rope_factors_long.weight", "rope_factors_long" },
    { T_EXTRA, "output_norm.weight", 2, "rope_factors_long.weight", "one is missing" },
    { T_EXTRA, "output_norm.weight", 2, "rope_factors_short.weight", "one is missing" },
    { K_BOOL, "llama.use_parallel_residual", 1, NULL, "llama.use_parallel_residual" },
    { K_TEXT, "llama.tensor_data_format", 0, "x", "llama.tensor_data_format" },
    { K_ARRAY, "tokenizer.ggml.precompiled_charsmap", 0, NULL, "precompiled_charsmap" },
    { K_F32, "llama.rope.scaling.factor", NAN, NULL, "factor" },
    { K_F32, "llama.rope.scaling.factor", -2, NULL, "factor" },
    { K_U32, "llama.expert_count", 8, NULL, "0 of 8 experts" },
    { K_U32, "llama.expert_used_count", 2, NULL, "2 of 0 experts" },
    { K_U32, "llama.expert_gating_func", 2, NULL, "llama.expert_gating_func" },
    { K_BOOL, "llama.expert_shared_count", 1, NULL, "llama.expert_shared_count" },
    { K_F32, "llama.attention.sliding_window", 0.5f, NULL, "window" },
    { K_F32, "llama.attn_logit_softcapping", -1, NULL, "attention_cap" },
    { K_F32, "llama.logit_scale", 2, NULL, "llama.logit_scale" },
    { K_BOOL, "llama.attention.causal", 0, NULL, "llama.attention.causal" },
    { K_TEXT, "llama.something_new", 0, "on", "llama.something_new" },
    { K_U32, "split.count", 3, NULL, "one of 3 parts" },
    { K_TEXT, "split.count", 0, "1", "split.count is string" },
    { K_U32, "llama.attention.head_count_kv", 4, NULL, "heads" },
    { K_U32, "llama.attention.head_count_kv", 0, NULL, "n_kv_heads" },
    { K_U32, "llama.attention.head_count", 0, NULL, "n_heads" },
    { K_U32, "llama.attention.head_count", -1, NULL, "n_heads" },
    { K_U32, "llama.attention.head_count", 5, NULL, "heads" },
    { K_U32, "llama.attention.head_count", 12, NULL, "rope_dim" },
    { K_F32, "llama.attention.head_count", 6.5, NULL, "head_count is f32, expected an integer" },
    { K_U32, "llama.attention.key_length", 8, NULL, "attn_q" },
    { K_U32, "llama.attention.value_length", 8, NULL, "value_length" },
    { K_U32, "llama.embedding_length", 48, NULL, "token_embd" }, { K_U32, "llama.embedding_length", 0, NULL, "dim" },
    { K_U32, "llama.embedding_length", 65537, NULL, "dim" },
    { K_U32, "llama.feed_forward_length", 37, NULL, "ffn_gate" },
    { K_U32, "llama.feed_forward_length", -1, NULL, "ffn_dim" }, { K_U32, "llama.block_count", 0, NULL, "n_layers" },
    { K_U32, "llama.block_count", 1025, NULL, "n_layers" }, { K_U32, "llama.block_count", 3, NULL, "blk.2." },
    { K_U32, "llama.block_count", 1, NULL, "blk.1." }, { K_F32, "llama.block_count", NAN, NULL, "block_count" },
    { K_F32, "llama.block_count", 1.5, NULL, "block_count" }, { K_U32, "llama.context_length", 0, NULL, "context" },
    { K_U32, "llama.context_length", 4294967295.0, NULL, "context" },
    { K_F64, "llama.context_length", INFINITY, NULL, "context" },
    { K_F32, "llama.rope.freq_base", 0, NULL, "rope_theta" },
    { K_F32, "llama.rope.freq_base", NAN, NULL, "rope_theta" },
    { K_F32, "llama.rope.freq_base", -1e4, NULL, "rope_theta" },
    { K_F32, "llama.attention.layer_norm_rms_epsilon", 0, NULL, "norm_eps" },
    { K_F32, "llama.attention.layer_norm_rms_epsilon", NAN, NULL, "norm_eps" },
    { K_F32, "llama.attention.layer_norm_rms_epsilon", -1, NULL, "norm_eps" },
    { K_U32, "llama.rope.dimension_count", 3, NULL, "rope_dim" },
    { K_U32, "llama.rope.dimension_count", 6, NULL, "rope_dim" },
    { K_U32, "llama.rope.dimension_count", 0, NULL, "rope_dim" }, { K_U32, "general.alignment", 0, NULL, "alignment" },
    { K_U32, "general.alignment", 1, NULL, "alignment" }, { K_U32, "general.alignment", 24, NULL, "alignment" },
    { K_U32, "general.alignment", 2147483648.0, NULL, "alignment" },
    { K_TEXT, "general.alignment", 0, "32", "alignment" },
    { K_ARRAY, "general.alignment", 0, NULL, "general.alignment is an array of u32, expected an integer" },
    { K_F32, "llama.rope.scale_linear", 0, NULL, "scale_linear" },
    { K_F32, "llama.rope.scale_linear", 1e7, NULL, "scale_linear" },
    { K_F32, "llama.rope.scaling.factor", 1e7, NULL, "scaling.factor" },
    { K_F32, "llama.rope.scaling.attn_factor", 1e7, NULL, "rope_magnitude is 10000000" },
    { K_U32, "llama.rope.scaling.original_context_length", -1, NULL, "original_context is -1" },
    { K_U32, "llama.attention.value_length", 3, NULL, "value_length" },
    { K_U32, "general.alignment", 4, NULL, "alignment" }, { K_U32, "general.alignment", 1 << 21, NULL, "alignment" },
    { K_U32, "split.count", -1, NULL, "split.count" }, { K_U32, "split.count", 65536, NULL, "split.count" },
    // the vocabulary
    { K_U32, "tokenizer.ggml.bos_token_id", -2, NULL, "bos_token_id" },
    { K_U32, "tokenizer.ggml.eos_token_id", -2, NULL, "eos_token_id" },
    { K_U32, "tokenizer.ggml.eot_token_id", -2, NULL, "eot_token_id" },
    { K_U32, "tokenizer.ggml.eom_token_id", -2, NULL, "eom_token_id" },
    { K_U32, "tokenizer.ggml.unknown_token_id", -2, NULL, "unknown_token_id" },
    { K_U64, "tokenizer.ggml.bos_token_id", 0x1p32, NULL, "bos_token_id is 4294967296" },
    { K_U64, "tokenizer.ggml.eot_token_id", 0x1p32, NULL, "eot_token_id is 4294967296" },
    { K_U64, "tokenizer.ggml.eom_token_id", 0x1p32, NULL, "eom_token_id is 4294967296" },
    { K_U64, "tokenizer.ggml.unknown_token_id", 0x1p32, NULL, "unknown_token_id is 4294967296" },
    { K_BOOL, "tokenizer.ggml.add_bos_token", 2, NULL, "add_bos_token is 2, expected 0 to 1" },
    { K_BOOL, "tokenizer.ggml.add_eos_token", 2, NULL, "add_eos_token is 2, expected 0 to 1" },
    { K_BOOL, "tokenizer.ggml.ignore_merges", 2, NULL, "ignore_merges is 2, expected 0 to 1" },
    { K_BOOL, "tokenizer.ggml.normalizer.nfc", 2, NULL, "normalizer.nfc is 2, expected 0 to 1" },
    { K_BOOL, "tokenizer.ggml.add_space_prefix", 2, NULL, "add_space_prefix is 2, expected 0 to 1" },
    { K_BOOL, "tokenizer.ggml.remove_extra_whitespaces", 1, NULL, "remove_extra_whitespaces asks for" },
    { K_TEXT, "tokenizer.ggml.model", 0, "bert", "bert" }, { K_TEXT, "tokenizer.ggml.model", 0, "", "tokenizer" },
    { K_ARRAY, "tokenizer.ggml.precompiled_charsmap", 0, NULL, "precompiled_charsmap" },
    { K_FLOATS, "tokenizer.ggml.scores", 0, NULL, "131 tokens, 3 scores" },
    { K_TEXT, "tokenizer.ggml.add_bos_token", 0, "yes", "add_bos_token" },
    // tensors
    { T_TWICE, "blk.0.attn_q.weight", 0, NULL, "blk.0.attn_q.weight" },
    { T_TWICE, "output_norm.weight", 0, NULL, "output_norm.weight" },
    { T_EXTRA, "output_norm.weight", 0, "blk.0.attn_q_norm.weight", "" },
    { T_RENAME, "blk.0.attn_q.weight", 0, "blk.0.attn_Q.weight", "blk.0.attn_q.weight" },
    { T_RENAME, "blk.0.attn_q.weight", 0, "", "name" },
    { T_RENAME, "blk.0.attn_q.weight", 0, "blk.00.attn_q.weight", "blk.0.attn_q.weight" },
    { T_RENAME, "blk.1.attn_q.weight", 0, "blk.-1.attn_q.weight", "blk.1.attn_q.weight" },
    { T_RENAME, "blk.1.ffn_up.weight", 0, "blk.4294967295.ffn_up.weight", "blk.1.ffn_up.weight" },
    { T_RENAME, "blk.1.ffn_up.weight", 0, "a-name-that-is-as-long-as-sixty-four-bytes-or-even-longer-than-it", "name" },
    { T_SWAP, "token_embd.weight", 0, NULL, "131" },
    { T_SWAP, "blk.0.ffn_down.weight", 0, NULL, "blk.0.ffn_down.weight" },
    { T_SWAP, "blk.1.attn_k.weight", 0, NULL, "blk.1.attn_k.weight" },
    { T_DIM0, "blk.0.attn_q.weight", 0, NULL, "blk.0.attn_q.weight is 1 x 24 x 0, expected 1 x 24 x 24" },
    { T_DIM1, "blk.0.attn_q.weight", 0, NULL, "blk.0.attn_q.weight is 1 x 0 x 24, expected 1 x 24 x 24" },
    { T_DIM1, "token_embd.weight", 0, NULL, "n_tokens is 0" },
    { T_DIM0, "blk.0.attn_q.weight", 0x1p63, NULL, "blk.0.attn_q.weight" },
    { T_DIM0, "blk.0.attn_q.weight", -1, NULL, "blk.0.attn_q.weight" },
    { T_DIM1, "blk.0.attn_q.weight", 0x1p62, NULL, "blk.0.attn_q.weight" },
    { T_DIM0, "blk.0.attn_q.weight", 0x1p32, NULL, "blk.0.attn_q.weight" },
    { T_DIM1, "token_embd.weight", 130, NULL, "13" }, { T_DIM1, "token_embd.weight", 2147483648.0, NULL, "token_embd" },
    { T_DIM0, "output_norm.weight", 23, NULL, "output_norm.weight" },
    { T_N_DIMS, "blk.0.attn_q.weight", 0, NULL, "blk.0.attn_q.weight" },
    { T_N_DIMS, "blk.0.attn_q.weight", 4, NULL, "blk.0.attn_q.weight has 4 dimensions" },
    { T_DIM3, "blk.0.attn_q.weight", 2, NULL, "blk.0.attn_q.weight has 4 dimensions" },
    { T_N_DIMS, "blk.0.attn_q.weight", 5, NULL, "blk.0.attn_q.weight has 5 dimensions" },
    { T_NUL, "blk.0.attn_q.weight", 0, NULL, "20 bytes or a NUL" },
    { T_N_DIMS, "blk.0.attn_q.weight", 4294967295.0, NULL, "has 4294967295 dimensions" },
    { T_N_DIMS, "blk.0.attn_q.weight", 1, NULL, "blk.0.attn_q.weight" },
    { T_N_DIMS, "blk.0.attn_norm.weight", 2, NULL, "" },
    { T_TYPE, "blk.0.attn_q.weight", 4, NULL, "type 4" },
    { T_TYPE, "blk.0.attn_q.weight", 5, NULL, "type 5" }, { T_TYPE, "blk.0.attn_q.weight", 31, NULL, "type 31" },
    { T_TYPE, "blk.0.attn_q.weight", 99, NULL, "blk.0.attn_q.weight is of GGUF type 99" },
    { T_TYPE, "blk.0.attn_q.weight", 4294967295.0, NULL, "type 4294967295" },
    { T_TYPE, "blk.0.attn_q.weight", 8, NULL, "24 columns, which q8 cannot have" },
    { T_TYPE, "blk.0.attn_norm.weight", 1, NULL, "blk.0.attn_norm.weight" },
    { T_TYPE, "output_norm.weight", 30, NULL, "output_norm.weight" },
    { T_OFFSET, "blk.0.attn_q.weight", 33, NULL, "no multiple of 32" },
    { T_OFFSET, "blk.0.attn_q.weight", 0, NULL, "overlap" },
    { T_OFFSET, "blk.0.attn_q.weight", 0x1p40, NULL, "blk.0.attn_q.weight" },
    { T_OFFSET, "blk.0.attn_q.weight", -32, NULL, "blk.0.attn_q.weight" },
    { T_OFFSET, "blk.0.attn_q.weight", 0x1p63, NULL, "blk.0.attn_q.weight" },
    { T_OFFSET, "blk.0.attn_norm.weight", 32, NULL, "overlap" },
};

// Values that mean nothing bad: the file still opens.
static const DamageCase harmless_cases[] = {
    { H_VERSION, NULL, 2, NULL, NULL }, { K_U32, "llama.expert_count", 0, NULL, NULL },
    { K_U32, "general.alignment", 32, NULL, NULL }, { K_TEXT, "general.author", 0, "x", NULL },
    { K_DROP, "llama.rope.dimension_count", 0, NULL, NULL }, { K_DROP, "llama.rope.freq_base", 0, NULL, NULL },
    { K_DROP, "general.name", 0, NULL, NULL }, { K_TEXT, "llama.rope.scaling.type", 0, "none", NULL },
    { K_TEXT, "llama.rope.scaling.type", 0, "yarn", NULL },
    { K_U32, "llama.rope.scaling.original_context_length", 16, NULL, NULL },
    { K_DROP, "tokenizer.ggml.scores", 0, NULL, NULL },
    { K_U32, "llam", 1, NULL, NULL },
    { K_BOOL, "llama.attention.causal", 1, NULL, NULL }, { K_F32, "llama.logit_scale", 1, NULL, NULL },
    { K_U32, "split.count", 1, NULL, NULL }, { K_BOOL, "llama.rope.scaling.finetuned", 1, NULL, NULL },
    { K_TEXT, "llama.tensor_data_layout", 0, "Meta AI original pth", NULL },
    { K_ARRAY, "tokenizer.ggml.precompiled_charsmap", 1, NULL, NULL },  // an empty one
    { K_U32, "llama.vocab_size", 140, NULL, NULL }, { K_U32, "llama.vocab_size", 130, NULL, NULL },  // padded, or not
    { K_U32, "llama.rope.freq_base", 10000, NULL, NULL }, { K_F64, "llama.rope.freq_base", 10000, NULL, NULL },
    { K_U64, "llama.embedding_length", 24, NULL, NULL },
    { K_U32, "tokenizer.ggml.bos_token_id", 4294967295.0, NULL, NULL },  // none, or an id that there is not
    { K_U32, "tokenizer.ggml.bos_token_id", -1, NULL, NULL }, { K_U32, "tokenizer.ggml.bos_token_id", 131, NULL, NULL },
    { K_U32, "tokenizer.ggml.eos_token_id", 131, NULL, NULL },
    { K_U32, "tokenizer.ggml.eot_token_id", 1e6, NULL, NULL },
    { K_U32, "tokenizer.ggml.unknown_token_id", 1e6, NULL, NULL },
    { T_ONE_ROW, "blk.0.attn_norm.weight", 0, NULL, NULL }, { T_DIM2, "blk.0.attn_q.weight", 1, NULL, NULL },
    { T_DIM3, "blk.0.attn_q.weight", 1, NULL, NULL }, { T_DIM3, "output_norm.weight", 1, NULL, NULL },
};

// Beside a fused tensor a part of it under its own name: nobody would use that part of the fused one.
static void test_half_used(void) {
    static const char file[] = "families/phi3.gguf", *const names[][2] = {
        { "blk.0.attn_qkv.weight", "blk.0.attn_q.weight" }, { "blk.0.ffn_up.weight", "blk.0.ffn_gate.weight" },
    };
    Opened o = open_golden(file);
    const int rows[] = { o.model.layers[0].query.rows, o.model.layers[0].gate.rows };
    close_opened(&o);
    for (int i = 0; i < 2; i++) {
        Bytes b = read_golden(file);
        GgufParts g;
        take_apart(b, &g);
        const GgufTensor *fused = tensor_named(&g, names[i][0]);
        GgufTensor *part = &g.tensor[g.tensors++];
        *part = *fused;
        part->n_name = strlen(strcpy(part->name, names[i][1]));
        part->dims[1] = (uint64_t)rows[i];
        part->offset = round_up(g.data.n, 32);
        g.n_tensors++;
        Bytes more = new_bytes(part->offset + 8 * part->dims[0] * part->dims[1]);
        memset(more.bytes, 0, more.n);
        memcpy(more.bytes, g.data.bytes, g.data.n);
        free(g.data.bytes);
        g.data = more;
        Bytes damaged = put_together(&g);
        char wanted[80];
        snprintf(wanted, sizeof wanted, "tensor %s has rows that are there twice, or", names[i][0]);
        check_refused(damaged, names[i][1], wanted);
        free(damaged.bytes), free(b.bytes);
        free_parts(&g);
    }
}

static void test_damaged_ggufs(void) {
    test_half_used();
    Bytes b = read_golden("llama_linear.gguf");
    GgufParts g;
    take_apart(b, &g);
    Bytes same = put_together(&g);
    check(same.n == b.n && !memcmp(same.bytes, b.bytes, b.n),
          "llama_linear.gguf taken apart and put together: another file");
    free(same.bytes);
    for (int i = 0; i < g.tensors; i++) {  // each tensor in turn is missing, or has one row less
        DamageCase missing = { T_DROP, g.tensor[i].name, 0, NULL, g.tensor[i].name };
        check_damaged_gguf("llama_linear.gguf", &missing);
        DamageCase narrow = { T_DIM0, g.tensor[i].name, (double)g.tensor[i].dims[0] - 1, NULL, g.tensor[i].name };
        check_damaged_gguf("llama_linear.gguf", &narrow);
    }
    free(b.bytes);
    free_parts(&g);
    for (size_t i = 0; i < sizeof gguf_cases / sizeof *gguf_cases; i++)
        check_damaged_gguf("llama_linear.gguf", &gguf_cases[i]);
    for (size_t i = 0; i < sizeof harmless_cases / sizeof *harmless_cases; i++) {
        const DamageCase *c = &harmless_cases[i];
        b = read_golden("llama_linear.gguf");
        take_apart(b, &g);
        if (c->how == H_VERSION) g.version = 2;
        else if (c->how < T_DROP) damage_key(&g, c);
        else damage_tensor(&g, c);
        Error e;
        same = put_together(&g);
        check(try_open(same, &e), "harmless case %zu, %s: got \"%s\", wanted it to open", i,
              c->name ? c->name : "version 2", e.text);
        free(same.bytes), free(b.bytes);
        free_parts(&g);
    }
    static const DamageCase qwen2[] = {
        { T_DROP, "blk.0.attn_q.bias", 0, NULL, "blk.0.attn_q.bias" },
        { T_DROP, "blk.1.attn_v.bias", 0, NULL, "blk.1.attn_v.bias" },
        { K_TEXT, "tokenizer.ggml.pre", 0, "hitherto-unknown", "hitherto-unknown" },
        { K_DROP, "tokenizer.ggml.pre", 0, NULL, "--pre" }, { K_ITEM_TYPE, "tokenizer.ggml.merges", 4, NULL, "" },
        { T_DIM0, "blk.0.attn_k.bias", 15, NULL, "blk.0.attn_k.bias" },
    };
    for (size_t i = 0; i < sizeof qwen2 / sizeof *qwen2; i++) check_damaged_gguf("qwen2.gguf", &qwen2[i]);
    static const DamageCase bias[] = {  // llama has biases only by choice, but then in every layer
        { T_DROP, "blk.0.attn_output.bias", 0, NULL, "blk.0.attn_output.bias" },
        { T_DROP, "blk.1.ffn_down.bias", 0, NULL, "blk.1.ffn_down.bias" },
    };
    for (size_t i = 0; i < 2; i++) check_damaged_gguf("llama_bias.gguf", &bias[i]);
    static const DamageCase fused[] = {
        { T_DROP, "blk.1.attn_qkv.weight", 0, NULL, "blk.1.attn_" },
        { T_DIM1, "blk.0.attn_qkv.weight", 127, NULL, "blk.0.attn_qkv.weight" },
        { T_TYPE, "blk.0.attn_qkv.weight", 3, NULL, "" },
        { T_RENAME, "blk.0.ffn_up.weight", 0, "blk.0.attn_q.weight", "blk.0." },
    };
    for (size_t i = 0; i < sizeof fused / sizeof *fused; i++) check_damaged_gguf("mixed_fused.gguf", &fused[i]);
    static const DamageCase layers[] = {
        { K_ARRAY, "llama.feed_forward_length", 0, NULL, "feed_forward_length" },
        { K_U32, "llama.feed_forward_length", 64, NULL, "blk.1.ffn" },
        { T_DIM0, "blk.0.attn_q.weight", 63, NULL, "blk.0.attn_q.weight" },
        { T_TYPE, "blk.0.attn_norm.weight", 8, NULL, "blk.0.attn_norm.weight" },
    };
    for (size_t i = 0; i < sizeof layers / sizeof *layers; i++) check_damaged_gguf("mixed.gguf", &layers[i]);
    static const DamageCase experts[] = {  // 5 experts of 40 x 32, of which a token uses 2
        { K_U32, "llama.expert_count", 4, NULL, "expected 1 x 4 x 32" },
        { K_U32, "llama.expert_count", 0, NULL, "2 of 0 experts" },
        { K_U32, "llama.expert_count", 1025, NULL, "n_experts" },
        { K_F32, "llama.expert_count", 4.5, NULL, "expert_count is f32" },
        { K_DROP, "llama.expert_count", 0, NULL, "2 of 0 experts" },
        { K_U32, "llama.expert_used_count", 0, NULL, "0 of 5 experts" },
        { K_U32, "llama.expert_used_count", 6, NULL, "6 of 5 experts" },
        { K_U32, "llama.expert_used_count", -1, NULL, "n_experts_used" },
        { K_DROP, "llama.expert_used_count", 0, NULL, "0 of 5 experts" },
        { K_U32, "llama.expert_feed_forward_length", 20, NULL, "expected 5 x 32 x 20" },
        { K_U32, "llama.expert_feed_forward_length", 0, NULL, "expert_feed_forward_length" },
        { K_U32, "llama.expert_feed_forward_length", (1 << 20) + 1, NULL, "expert_feed_forward_length" },
        { K_F32, "llama.expert_weights_scale", 2, NULL, "expert_weights_scale" },
        { T_DROP, "blk.1.ffn_gate_inp.weight", 0, NULL, "blk.1.ffn_gate_inp.weight is missing" },
        { T_DROP, "blk.0.ffn_up_exps.weight", 0, NULL, "blk.0.ffn_up_exps.weight is missing" },
        { T_RENAME, "blk.0.ffn_up_exps.weight", 0, "blk.0.ffn_up.weight", "blk.0.ffn_up_exps.weight is missing" },
        { T_EXTRA, "blk.0.ffn_norm.weight", 0, "blk.0.ffn_up.bias", "blk.0.ffn_up.bias" },
        { T_RENAME, "blk.0.ffn_gate_exps.weight", 0, "blk.0.ffn_gate.0.weight",
          "blk.0.ffn_gate_exps.weight is missing: experts are single tensors; join them: export_model.py FILE -o NEW" },
        { T_EXTRA, "blk.0.ffn_norm.weight", 0, "blk.0.ffn_up_exps.bias", "blk.0.ffn_up_exps.bias" },
        { T_N_DIMS, "blk.0.ffn_gate_exps.weight", 2, NULL, "is 1 x 40 x 32" },
        { T_DIM1, "blk.1.ffn_down_exps.weight", 31, NULL, "blk.1.ffn_down_exps.weight" },
        { T_DIM1, "blk.1.ffn_down_exps.weight", 0x1p61, NULL, "blk.1.ffn_down_exps.weight" },
        { T_DIM2, "blk.1.ffn_down_exps.weight", 0, NULL, "is 0 x 32 x 40, expected 5 x 32 x 40" },
        { T_DIM2, "blk.1.ffn_down_exps.weight", 6, NULL, "" },
        { T_DIM2, "blk.1.ffn_down_exps.weight", 4, NULL, "is 4 x 32 x 40, expected 5 x" },
        { T_DIM2, "blk.1.ffn_down_exps.weight", 0x1p60, NULL, "blk.1.ffn_down_exps.weight" },
        { T_DIM2, "blk.1.attn_q.weight", 2, NULL, "" },
        { T_SWAP, "blk.1.ffn_down_exps.weight", 0, NULL, "blk.1.ffn_down_exps.weight" },
    };
    for (size_t i = 0; i < sizeof experts / sizeof *experts; i++) check_damaged_gguf("mixtral.gguf", &experts[i]);
    static const DamageCase yarn[] = {
        { K_F32, "llama.rope.scaling.yarn_log_multiplier", -1, NULL, "yarn_log_multiplier" },
        { K_F32, "llama.rope.scaling.yarn_log_multiplier", 1e7, NULL, "yarn_log_multiplier" },
        { K_F32, "llama.rope.scaling.yarn_beta_fast", 0, NULL, "yarn_beta_fast" },
        { K_F32, "llama.rope.scaling.yarn_beta_fast", 1e7, NULL, "yarn_beta_fast" },
        { K_F32, "llama.rope.scaling.yarn_beta_slow", 0, NULL, "yarn_beta_slow" },
        { K_F32, "llama.rope.scaling.yarn_beta_slow", 1e7, NULL, "yarn_beta_slow" },
        { K_F32, "llama.rope.scaling.yarn_attn_factor", 1, NULL, "yarn_attn_factor" },
        { K_F32, "llama.rope.scaling.yarn_attn_factor", 1.2f, NULL, "yarn_attn_factor" },
    };
    for (size_t i = 0; i < sizeof yarn / sizeof *yarn; i++)
        check_damaged_gguf("families/mistral_yarn.gguf", &yarn[i]);
    static const DamageCase longrope[] = {
        { T_DROP, "rope_factors_short.weight", 0, NULL, "of rope_factors_long.weight and rope_factors_short.weight" },
        { T_DROP, "rope_factors_long.weight", 0, NULL, "of rope_factors_long.weight and rope_factors_short.weight" },
        { T_DIM0, "rope_factors_long.weight", 1, NULL, "rope_factors_long.weight is 1 x 1 x 1, expected 1 x 1 x 2" },
    };
    for (size_t i = 0; i < sizeof longrope / sizeof *longrope; i++)
        check_damaged_gguf("families/phi3_long.gguf", &longrope[i]);
    static const char pattern[] = "gemma3.attention.sliding_window_pattern";  // of other than seven layers
    const DamageCase patterns[] = {
        { K_TEXT, pattern, 0, "6", pattern }, { K_ARRAY, pattern, 0, NULL, pattern },
        { K_ARRAY, pattern, 1, NULL, pattern }, { K_F32, pattern, -3, NULL, pattern },
        { K_F32, pattern, 2.5, NULL, pattern }, { K_F32, pattern, NAN, NULL, pattern },
        { K_F64, pattern, INFINITY, NULL, pattern },
    };
    for (size_t i = 0; i < sizeof patterns / sizeof *patterns; i++)
        check_damaged_gguf("families/gemma3.gguf", &patterns[i]);
}

// Where a file that is cut says that it is. It may not claim to have more than there is room for.
static void test_cut_ggufs(void) {
    Bytes b = read_golden("llama_linear.gguf");
    GgufParts g;
    take_apart(b, &g);
    size_t name = 24 + 8 + g.key[0].n_name, list = 24;  // the ends of the first key's name and of the list of tensors
    for (int i = 0; i < g.keys; i++) list += 8 + g.key[i].n_name + g.key[i].value.n;
    size_t first = list;
    for (int i = 0; i < g.tensors; i++) list += 8 + g.tensor[i].n_name + 4 + 8 * g.tensor[i].n_dims + 12;
    const struct { size_t n_bytes; bool one_key; const char *wanted; } cases[] = {
        { 4, false, "ends within its header" }, { 23, false, "ends within its header" },
        { 24, false, "26 keys; 0 bytes are left" }, { 24 + 26 * 13 - 1, false, "26 keys; 337 bytes are left" },
        { name - 1, true, "ends within its keys" }, { name + 3, true, "ends within its keys" },
        { name + 4 + 7, true, "general.architecture is longer" },
        { name + 4 + 8 + 4, true, "general.architecture is longer" }, { first, false, "20 tensors; 0 bytes are left" },
        { first + 20 * 24 - 1, false, "20 tensors; 479 bytes are left" },
        { first + 20 * 24, false, "within its list of tensors" }, { list - 1, false, "within its list of tensors" },
        { list, false, "ends after the file does" }, { b.n - 1, false, "ends after the file does" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bytes cut = copy_bytes(b.bytes, cases[i].n_bytes);
        if (cases[i].one_key) cut.bytes[16] = 1;
        check_refused(cut, "a GGUF that is cut", cases[i].wanted);
        free(cut.bytes);
    }
    free(b.bytes);
    free_parts(&g);
}

// Of several keys that are wrong the first that is asked for is named: others may only follow from it.
static void test_first_key(void) {
    static const struct { DamageCase damage[2]; const char *wanted; } cases[] = {
        { { { K_U32, "llama.attention.value_length", 8, NULL, NULL },
            { K_U32, "tokenizer.chat_template", 1, NULL, NULL } }, "value_length" },
        { { { K_U32, "tokenizer.chat_template", 1, NULL, NULL },
            { K_F32, "llama.rope.scaling.factor", NAN, NULL, NULL } }, "scaling.factor" },
        { { { K_F32, "tokenizer.ggml.bos_token_id", 0.5, NULL, NULL },
            { K_F32, "tokenizer.ggml.eos_token_id", 1.5, NULL, NULL } }, "bos_token_id" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bytes b = read_golden("llama_linear.gguf");
        GgufParts g;
        take_apart(b, &g);
        for (int k = 0; k < 2; k++) damage_key(&g, &cases[i].damage[k]);
        Bytes damaged = put_together(&g);
        check_refused(damaged, "two keys that are wrong", cases[i].wanted);
        free(damaged.bytes), free(b.bytes);
        free_parts(&g);
    }
}

// Without one kind of tensor, in all layers, of the families that need it.
static void test_missing_kinds(void) {
    static const char *const files[] = {
        "families/mistral.gguf", "qwen2.gguf", "families/qwen3.gguf", "families/qwen3moe.gguf", "families/phi3.gguf",
        "families/granite.gguf", "families/smollm3.gguf", "families/olmo2.gguf", "families/stablelm.gguf",
        "families/gemma2.gguf", "families/gemma3.gguf",
    };
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        Bytes b = read_golden(files[i]);
        GgufParts *whole = get(sizeof *whole), *g = get(sizeof *g);
        take_apart(b, whole);
        bool biases_needed = strstr(files[i], "qwen2");
        for (int k = 0; k < whole->tensors; k++) {
            const char *kind = whole->tensor[k].name;
            if (!strcmp(kind, "token_embd.weight") || !strcmp(kind, "output.weight") || !strncmp(kind, "blk.1.", 6))
                continue;
            if (!strncmp(kind, "blk.0.", 6)) kind += 6;
            if (!biases_needed && !strncmp(kind, "attn_", 5) && kind[6] == '.' && strstr(kind, ".bias")) continue;
            *g = *whole;
            g->tensors = 0;
            for (int j = 0; j < whole->tensors; j++) {
                const char *name = whole->tensor[j].name, *end = name + strlen(name) - strlen(kind);
                if (end < name || strcmp(end, kind) || (end > name && end[-1] != '.'))
                    g->tensor[g->tensors++] = whole->tensor[j];
            }
            g->n_tensors = (uint64_t)g->tensors;
            Bytes damaged = put_together(g);
            char what[700];
            snprintf(what, sizeof what, "%s without %s", files[i], kind);
            check(g->tensors < whole->tensors, "%s: it is there", what);
            check_refused(damaged, what, "is missing");
            free(damaged.bytes);
        }
        free_parts(whole), free(whole), free(g), free(b.bytes);
    }
}

// Where there are experts, no bias is that of all of them.
static void test_expert_biases(void) {
    static const struct { const char *name; uint64_t length; } biases[] = {
        { "ffn_gate.bias", 40 }, { "ffn_up.bias", 40 }, { "ffn_down.bias", 32 },
    };
    for (int i = 0; i < 3; i++) {
        Bytes b = read_golden("mixtral.gguf");
        GgufParts g;
        take_apart(b, &g);
        for (int l = 0; l < 2; l++) {
            GgufTensor *t = &g.tensor[g.tensors++];
            *t = (GgufTensor){ .n_dims = 1, .dims = { biases[i].length }, .offset = g.data.n };
            t->n_name = (size_t)snprintf(t->name, sizeof t->name, "blk.%d.%s", l, biases[i].name);
            Bytes longer = new_bytes(g.data.n + 160);
            memset(longer.bytes, 0, longer.n);
            memcpy(longer.bytes, g.data.bytes, g.data.n);
            free(g.data.bytes);
            g.data = longer;
        }
        g.n_tensors += 2;
        Bytes damaged = put_together(&g);
        check_refused(damaged, biases[i].name, "is there twice, or no llama has it");
        free(damaged.bytes), free(b.bytes);
        free_parts(&g);
    }
}

// ---- What files leave to the programs that know their family ----

// A file, what is done to it, and what a number of the configuration must then be. Sources: transformers' configuration
// classes and modeling_rope_utils.py, the GGUF specification and, for scales of 0, llama.cpp's llama-model.cpp.
static const struct { const char *file; DamageCase damage; const char *field; double wanted; } readings[] = {
    { "llama_linear", { K_TEXT, "llama.rope.scaling.type", 0, "none", NULL }, "rope_scale", 1 },
    { "llama_linear", { K_F32, "llama.rope.scaling.factor", 0, NULL, NULL }, "rope_scale", 1 },
    { "llama_linear", { K_DROP, "llama.rope.scaling.type", 0, NULL, NULL }, "rope_scale", 4 },
    { "llama_mqa", { K_F32, "llama.rope.scale_linear", 2.5, NULL, NULL }, "rope_scale", 2.5 },
    { "qwen2", { K_ARRAY, "tokenizer.ggml.scores", 0, NULL, NULL }, "activation", SILU },  // nothing reads these
    { "llama_mqa", { K_DROP, "llama.rope.freq_base", 0, NULL, NULL }, "rope_theta", 10000 },
    { "families/mistral_yarn", { K_DROP, "llama.rope.scaling.yarn_beta_fast", 0, NULL, NULL }, "yarn_fast", 32 },
    { "families/mistral_yarn", { K_DROP, "llama.rope.scaling.yarn_beta_slow", 0, NULL, NULL }, "yarn_slow", 1 },
    { "families/mistral_yarn", { K_F32, "llama.rope.scaling.factor", 0.5, NULL, NULL }, "rope_magnitude", 1 },
    { "families/phi3_long", { K_U32, "phi3.rope.scaling.original_context_length", 100, NULL, NULL },
      "rope_magnitude", 1 },
    { "families/phi3_short", { K_TEXT, "phi3.rope.scaling.type", 0, "longrope", NULL }, "rope_magnitude", 1.2f },
    { "families/olmo2", { K_U32, "olmo2.context_length", 128, NULL, NULL }, "local_theta", 0 },  // it has no window
    { "families/olmo3", { K_F32, "olmo2.rope.freq_base_swa", 500, NULL, NULL }, "local_theta", 500 },
    { "families/gemma3", { K_F32, "gemma3.rope.freq_base_swa", 500, NULL, NULL }, "local_theta", 500 },
    { "families/stablelm", { K_BOOL, "stablelm.use_parallel_residual", 1, NULL, NULL }, "n_heads", 3 },
    { "families/granite", { K_DROP, "granite.logit_scale", 0, NULL, NULL }, "logit_scale", 1 },
    { "families/granite", { K_DROP, "granite.embedding_scale", 0, NULL, NULL }, "embedding_scale", 1 },
    { "families/granite", { K_DROP, "granite.residual_scale", 0, NULL, NULL }, "residual_scale", 1 },
};

static void check_reading(const char *name, const DamageCase *c, const char *field, double wanted, int layer) {
    char file[64];
    snprintf(file, sizeof file, "%s.gguf", name);
    Bytes b = read_golden(file);
    GgufParts g;
    take_apart(b, &g);
    damage_key(&g, c);
    Opened o;
    Error e;
    bool opens = open_bytes(&o, put_together(&g), &e);
    const ConfigField *f = config_fields;
    while (strcmp(f->name, field)) f++;
    double got = opens ? get_field(&o.model, f, layer) : NAN;
    check(got == (f->type == SINGLE ? (double)(float)wanted : wanted), "%s with %s of %g: %s is %g, wanted %g \"%s\"",
          file, c->name, c->number, field, got, wanted, e.text);
    close_opened(&o);
    free(b.bytes);
    free_parts(&g);
}

// The published sizes of the Gemmas and what their config.json says beside: query_pre_attn_scalar, of which the scale
// of scores is one over the root, attn_logit_softcapping, final_logit_softcapping. GGUF files do not say the first.
static void check_sizes(const char *name, int layers, int dim, int heads, int head_dim, double scalar, float caps[2]) {
    Error e;
    Model m = { .config = { .n_layers = layers, .dim = dim, .head_dim = head_dim, .logit_scale = 1 } };
    m.layers = get((size_t)layers * sizeof *m.layers);
    for (int l = 0; l < layers; l++) m.layers[l].n_heads = heads;
    complete_config(&m, find_family(name, &e), 0, NULL);
    const Config *c = &m.config;
    check(fabs(c->attention_scale * sqrt(scalar) - 1) < 1e-6 && c->attention_cap == caps[0] && c->logit_cap == caps[1],
          "%s of %d layers: scores times %g, caps of %g and %g, wanted 1 / sqrt(%g), %g and %g", name, layers,
          (double)c->attention_scale, (double)c->attention_cap, (double)c->logit_cap, scalar, (double)caps[0],
          (double)caps[1]);
    free(m.layers);
}

static void test_readings(void) {
    for (size_t i = 0; i < sizeof readings / sizeof *readings; i++)
        check_reading(readings[i].file, &readings[i].damage, readings[i].field, readings[i].wanted, 0);
    static const struct { int pattern, layer, window; } windows[] = {
        { 3, 1, 9 }, { 3, 2, 0 }, { 6, 5, 0 }, { 1, 0, 0 }, { 0, 5, 9 },
    };
    for (int i = 0; i < 5; i++) {
        const DamageCase c = { K_U32, "gemma3.attention.sliding_window_pattern", windows[i].pattern, NULL, NULL };
        check_reading("families/gemma3", &c, "window", windows[i].window, windows[i].layer);
    }
    float gemma2[] = { 50, 30 }, none[] = { 0, 0 };
    check_sizes("gemma2", 26, 2304, 8, 256, 256, gemma2);
    check_sizes("gemma2", 46, 4608, 32, 128, 144, gemma2);
    check_sizes("gemma3", 48, 3840, 16, 256, 256, none);
    check_sizes("gemma3", 62, 5376, 32, 128, 168, none);
    check_sizes("qwen3", 62, 5120, 64, 128, 128, none);
}

// ---- Native and llama2.c files ----

// n bytes put at a place of a file.
typedef struct {
    const char *what;
    size_t at, n;
    uint64_t value;
    const char *wanted;
} Patch;

static void check_patched(const char *file, Bytes b, const Patch *p) {
    char what[160];
    unsigned char kept[8];
    snprintf(what, sizeof what, "%s: %s (%llu at %zu)", file, p->what, (unsigned long long)p->value, p->at);
    memcpy(kept, b.bytes + p->at, p->n);
    memcpy(b.bytes + p->at, &p->value, p->n);
    check_refused(b, what, p->wanted);
    memcpy(b.bytes + p->at, kept, p->n);
}

// The numbers of the configuration and what they may be, as README has it, each with a value below and one above that.
static const struct { const char *name; double below, above; } limits[] = {
    { "n_layers", 0, 1025 }, { "dim", 0, 65537 }, { "n_tokens", 0, 1048577 }, { "head_dim", 0, 1025 },
    { "rope_dim", 1, 1025 }, { "context", 0, 1048577 }, { "original_context", -1, 1048577 },
    { "norm_eps", 0.9e-20, 1.1 }, { "rope_theta", 0.9, 1.1e15 }, { "rope_scale", 0.9e-6, 1.1e6 },
    { "rope_magnitude", 0.9e-6, 1.1e6 }, { "yarn_fast", -1, 1.1e6 }, { "yarn_slow", -1, 1.1e6 },
    { "local_theta", -1, 1.1e15 }, { "embedding_scale", 0.9e-6, 1.1e6 }, { "residual_scale", 0.9e-6, 1.1e6 },
    { "attention_scale", 0.9e-6, 1.1e6 }, { "logit_scale", 0.9e-6, 1.1e6 }, { "attention_cap", -1, 1.1e6 },
    { "logit_cap", -1, 1.1e6 }, { "activation", -1, 2 }, { "n_heads", 0, 1025 }, { "n_kv_heads", 0, 1025 },
    { "ffn_dim", 0, 1048577 }, { "window", -1, 1048577 }, { "angles", -1, 3 }, { "n_experts", -1, 1025 },
    { "n_experts_used", -1, 1025 },
};

static void test_limits(void) {
    Bytes b = export_golden("llama_linear.gguf");  // of two layers
    FileHeader h;
    memcpy(&h, b.bytes, sizeof h);
    size_t at = h.config.at;
    check(sizeof limits / sizeof *limits == N_CONFIG_FIELDS, "%d numbers", N_CONFIG_FIELDS);
    for (size_t i = 0; i < sizeof limits / sizeof *limits; i++) {
        ConfigRecord record;
        memcpy(&record, b.bytes + at, sizeof record);
        at += sizeof record + (record.count - 1) * sizeof(double);  // the last layer's
        check(!strcmp(record.name, limits[i].name), "number %zu is %s, wanted %s", i, record.name, limits[i].name);
        double values[] = { limits[i].below, limits[i].above, NAN, INFINITY, -INFINITY, 1.5 }, kept;
        bool whole = limits[i].above == floor(limits[i].above) && limits[i].above < 1.05e6;
        memcpy(&kept, b.bytes + at, sizeof kept);
        for (int k = 0; k < 5 + whole; k++) {
            char wanted[80];
            snprintf(wanted, sizeof wanted, "%s is %.10g, expected %s", limits[i].name, values[k],
                     whole ? "an integer" : "");
            memcpy(b.bytes + at, &values[k], sizeof kept);
            check_refused(b, "a configuration", wanted);
        }
        memcpy(b.bytes + at, &kept, sizeof kept);
        at += sizeof kept;
    }
    free(b.bytes);
}

// A tensor's record in a native file, as README draws it.
typedef struct {
    char name[NAME_BYTES];
    uint32_t type, rows, cols, n;
    uint64_t at, n_bytes;
} TensorRecord;

// Where a native file has the values of a field of the configuration.
static size_t values_begin(Bytes b, const char *name) {
    FileHeader h;
    ConfigRecord record = { 0 };
    memcpy(&h, b.bytes, sizeof h);
    size_t at = h.config.at;
    for (; strcmp(record.name, name); at += sizeof record + record.count * sizeof(double))
        memcpy(&record, b.bytes + at, sizeof record);
    return at - record.count * sizeof(double);
}

static void test_damaged_native(void) {
    Bytes b = export_golden("llama_linear.gguf");
    FileHeader h;
    memcpy(&h, b.bytes, sizeof h);
    size_t config = h.config.at, record = h.tensors.at, tokenizer = h.tokenizer.at;
    TensorRecord first, second;
    memcpy(&first, b.bytes + record, sizeof first);
    memcpy(&second, b.bytes + record + sizeof first, sizeof second);
    const Patch patches[] = {
        { "layout 1", offsetof(FileHeader, layout), 4, 1, "make it again" },
        { "layout 3", offsetof(FileHeader, layout), 4, 3, "make it again" },
        { "layout 0", offsetof(FileHeader, layout), 4, 0, "make it again" },
        { "longer than it is", offsetof(FileHeader, file_bytes), 8, b.n + 1, "not copied whole" },
        { "another family", offsetof(FileHeader, family), 8, 0x78787878, "xxxx" },
        { "a table with a rest", offsetof(FileHeader, tensors) + 8, 8, h.tensors.n_bytes + 4, "in a table of" },
        { "no tensors", offsetof(FileHeader, n_tensors), 4, 0, "tensors" },
        { "2^32 - 1 tensors", offsetof(FileHeader, n_tensors), 4, UINT32_MAX, "tensors" },
        { "configuration outside", offsetof(FileHeader, config), 8, b.n + 64, "section" },
        { "tensors outside", offsetof(FileHeader, tensors), 8, UINT64_MAX - 63, "section" },
        { "tokenizer too long", offsetof(FileHeader, tokenizer) + 8, 8, UINT64_MAX, "section" },
        { "weights too long", offsetof(FileHeader, weights) + 8, 8, b.n, "section" },
        { "template outside", offsetof(FileHeader, chat_template), 8, 1, "section" },
        { "configuration cut", offsetof(FileHeader, config) + 8, 8, 40, "configuration" },
        { "configuration with more in it", offsetof(FileHeader, config) + 8, 8, h.config.n_bytes + 4, "4 bytes more" },
        { "local angles", values_begin(b, "angles"), 8, 0x4000000000000000, "layer 0 needs local_theta" },
        { "configuration moved", offsetof(FileHeader, config), 8, record, "configuration" },
        { "tokenizer moved", offsetof(FileHeader, tokenizer), 8, record, "vocabulary" },
        { "another field", config, 1, 'N', "n_layers" }, { "0 values", config + 28, 4, 0, "n_layers" },
        { "2^32 - 1 values", config + 28, 4, UINT32_MAX, "n_layers" },
        { "NaN layers", config + 32, 8, 0x7ff8000000000000, "n_layers" },
        { "3 layers", config + 32, 8, 0x4008000000000000, "" }, { "1 layer", config + 32, 8, 0x3ff0000000000000, "" },
        { "1e300 layers", config + 32, 8, 0x7e37e43c8800759c, "n_layers" },
        { "another name", record, 1, 'T', first.name }, { "the name of the second", record, 8, 0, "" },
        { "type 99", record + offsetof(TensorRecord, type), 4, 99, first.name },
        { "a vector", record + offsetof(TensorRecord, type), 4, VECTOR, first.name },
        { "an f16 matrix", record + offsetof(TensorRecord, type), 4, F16, first.name },
        { "a q8 matrix", record + offsetof(TensorRecord, type), 4, Q8, "24 columns, which q8 cannot have" },
        { "one row more", record + offsetof(TensorRecord, rows), 4, first.rows + 1, first.name },
        { "2^32 - 1 columns", record + offsetof(TensorRecord, cols), 4, UINT32_MAX, first.name },
        { "before the weights", record + offsetof(TensorRecord, at), 8, 0, first.name },
        { "behind the weights", record + offsetof(TensorRecord, at), 8, b.n, first.name },
        { "at no multiple of 64", record + offsetof(TensorRecord, at), 8, first.at + 4, first.name },
        { "where the second is", record + offsetof(TensorRecord, at), 8, second.at, "overlap" },
        { "one byte less", record + offsetof(TensorRecord, n_bytes), 8, first.n_bytes - 1, first.name },
        { "2^64 - 1 bytes", record + offsetof(TensorRecord, n_bytes), 8, UINT64_MAX, first.name },
        { "a longer one", record + offsetof(TensorRecord, n_bytes), 8, first.n_bytes + 64, "" },
        { "a tokenizer of kind 3", tokenizer, 4, 3, "vocabulary" },
        { "a tokenizer with 132 tokens", tokenizer + 28, 4, 132, "vocabulary" },
        { "its begin token is 131", tokenizer + 12, 4, 131, "131" },
        { "its begin token is -2", tokenizer + 12, 4, (uint32_t)-2, "-2" },
    };
    Error e;
    check(try_open(b, &e), "an exported llama_linear: got \"%s\"", e.text);
    for (size_t i = 0; i < sizeof patches / sizeof *patches; i++) check_patched("native", b, &patches[i]);
    memcpy(b.bytes + record, second.name, NAME_BYTES);  // two of one name, none of another
    check_refused(b, "native: two tensors with one name", "");
    memset(b.bytes + record, 'x', NAME_BYTES);
    b.bytes[record + NAME_BYTES] = 'c';  // the first byte of its type
    check_patched("native", b, &(Patch){ "a name without an end", record + offsetof(TensorRecord, at), 8, first.at + 4,
                                         "x begins at" });
    memcpy(b.bytes + record, &first, sizeof first);
    Bytes longer = new_bytes(b.n + 1);
    memcpy(longer.bytes, b.bytes, b.n);
    longer.bytes[b.n] = 0;
    check_refused(longer, "native: a byte more", "not copied whole");
    free(longer.bytes);
    h.n_tensors = MAX_TENSORS + 1;
    h.tensors = (Section){ round_up(b.n, 64), h.n_tensors * sizeof(TensorRecord) };
    h.file_bytes = h.tensors.at + h.tensors.n_bytes;
    longer = new_bytes((size_t)h.file_bytes);
    memset(longer.bytes, 0, longer.n);
    memcpy(longer.bytes, b.bytes, b.n);
    memcpy(longer.bytes, &h, sizeof h);
    check_refused(longer, "native: more tensors than there may be", "65537 tensors in a table");
    free(longer.bytes), free(b.bytes);
}

static void test_damaged_llama2c(void) {
    // v0: dim, ffn, layers, heads, kv heads, tokens, context; v1 and v2: magic, version, the same, shared, group
    static const struct { const char *file; Patch patch; } cases[] = {
        { "llama2c_v0.bin", { "dim 0", 0, 4, 0, "" } }, { "llama2c_v0.bin", { "dim -24", 0, 4, (uint32_t)-24, "" } },
        { "llama2c_v0.bin", { "dim 2^31 - 4", 0, 4, 0x7ffffffc, "dim" } },
        { "llama2c_v0.bin", { "dim 60", 0, 4, 60, "rope_dim" } }, { "llama2c_v0.bin", { "dim 28", 0, 4, 28, "" } },
        { "llama2c_v0.bin", { "ffn 0", 4, 4, 0, "ffn_dim" } },
        { "llama2c_v0.bin", { "ffn 2^30", 4, 4, 1 << 30, "ffn_dim" } },
        { "llama2c_v0.bin", { "ffn 37", 4, 4, 37, "" } }, { "llama2c_v0.bin", { "0 layers", 8, 4, 0, "n_layers" } },
        { "llama2c_v0.bin", { "2^31 - 1 layers", 8, 4, INT32_MAX, "n_layers" } },
        { "llama2c_v0.bin", { "1 layer", 8, 4, 1, "left" } },
        { "llama2c_v0.bin", { "3 layers", 8, 4, 3, "ends within" } },
        { "llama2c_v0.bin", { "0 heads", 12, 4, 0, "no checkpoint" } },
        { "llama2c_v0.bin", { "7 heads", 12, 4, 7, "no checkpoint" } },
        { "llama2c_v0.bin", { "-4 heads", 12, 4, (uint32_t)-4, "" } },
        { "llama2c_v0.bin", { "8 heads of 3", 12, 4, 8, "rope_dim" } },
        { "llama2c_v0.bin", { "3 kv heads", 16, 4, 3, "" } },
        { "llama2c_v0.bin", { "0 kv heads", 16, 4, 0, "n_kv_heads" } },
        { "llama2c_v0.bin", { "8 kv heads", 16, 4, 8, "" } },
        { "llama2c_v0.bin", { "0 tokens", 20, 4, 0, "n_tokens" } },
        { "llama2c_v0.bin", { "INT_MIN tokens", 20, 4, 0x80000000, "n_tokens" } },
        { "llama2c_v0.bin", { "-275 tokens", 20, 4, (uint32_t)-275, "output.weight" } },
        { "llama2c_v0.bin", { "276 tokens", 20, 4, 276, "" } },
        { "llama2c_v0.bin", { "2^31 - 1 tokens", 20, 4, INT32_MAX, "n_tokens" } },
        { "llama2c_v0.bin", { "no context", 24, 4, 0, "context" } },
        { "llama2c_v0.bin", { "context -1", 24, 4, UINT32_MAX, "context" } },
        { "llama2c_v0.bin", { "context 65", 24, 4, 65, "" } },
        { "llama2c_v1.bin", { "version 3", 4, 4, 3, "version 3" } },
        { "llama2c_v1.bin", { "version 0", 4, 4, 0, "version 0" } },
        { "llama2c_v1.bin", { "shared 2", 36, 1, 2, "shared" } }, { "llama2c_v1.bin", { "shared", 36, 1, 1, "left" } },
        { "llama2c_v1.bin", { "version 2", 4, 4, 2, "" } }, { "llama2c_v2.bin", { "groups of 0", 37, 4, 0, "" } },
        { "llama2c_v2.bin", { "groups of -32", 37, 4, (uint32_t)-32, "" } },
        { "llama2c_v2.bin", { "groups of 33", 37, 4, 33, "33" } },
        { "llama2c_v2.bin", { "groups of 16", 37, 4, 16, "16" } },
        { "llama2c_v2.bin", { "groups of 64", 37, 4, 64, "64" } },
        { "llama2c_v2.bin", { "not shared", 36, 1, 0, "output.weight" } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bytes b = read_golden(cases[i].file);
        check_patched(cases[i].file, b, &cases[i].patch);
        free(b.bytes);
    }
    Bytes cut = read_golden("llama2c_v1.bin");
    check_refused((Bytes){ cut.bytes, 100 }, "llama2c_v1.bin of 100 bytes", "ends within blk.0.attn_norm.weight");
    check_refused((Bytes){ cut.bytes, 30 }, "llama2c_v1.bin of 30 bytes", "no checkpoint");
    free(cut.bytes);
    static const struct { const char *what, *begin, *wanted; } mistakes[] = {
        { "a program", "\177ELF\2\1\1", "program" },
        { "PyTorch", "PK\3\4aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "PyTorch" },
        { "LFS", "version https://git-lfs.github.com/spec/v1\noid sha256:0", "LFS" },
        { "a web page", "<!DOCTYPE html><html><body>404</body></html>", "web page" },
        { "another web page", "<html><body>404</body></html>", "web page" },
        { "big-endian GGUF", "FUGG\3", "big-endian" },
        { "text", "Once upon a time, there was a little girl.", "not a model; if it is a text" },
        { "one byte", "x", "" }, { "GGUF and no more", "GGUF", "" },
        { "a magic and no more", "\x89" "cria\r\n\x1a", "expected a header of 128" }, { "ak42", "24ka", "" },
        { "safetensors", "\x10\x01\x01\x01\x01\x01\x01\x01{\"a\":", "safetensors" },
    };
    for (size_t i = 0; i < sizeof mistakes / sizeof *mistakes; i++) {
        Bytes b = copy_bytes((const unsigned char *)mistakes[i].begin, strlen(mistakes[i].begin));
        check_refused(b, mistakes[i].what, mistakes[i].wanted);
        free(b.bytes);
    }
    static const struct { const char *what; size_t at, n; uint64_t value; const char *wanted; } vocabularies[] = {
        { "a length of -1", 8, 4, UINT32_MAX, "token 0" }, { "a length of 2^31 - 1", 8, 4, INT32_MAX, "token 0" },
        { "a score of NaN", 4, 4, 0x7fc00000, "score" }, { "a score of Inf", 4, 4, 0x7f800000, "score" },
        { "a longer first token", 8, 4, 6, "" },
    };
    for (size_t i = 0; i < sizeof vocabularies / sizeof *vocabularies; i++) {
        Bytes b = read_golden("tokenizer.bin");
        memcpy(b.bytes + vocabularies[i].at, &vocabularies[i].value, vocabularies[i].n);
        Model m = { 0 };
        Error e = { 0 };
        bool ok = open_vocabulary(b.bytes, b.n, 275, &m, &e);
        check(!ok && is_refusal(&e) && strstr(e.text, vocabularies[i].wanted),
              "tokenizer.bin, %s: got \"%s\", wanted a refusal with \"%s\"", vocabularies[i].what, e.text,
              vocabularies[i].wanted);
        close_model(&m);
        free(b.bytes);
    }
    Bytes b = read_golden("tokenizer.bin");
    Model m = { 0 };
    Error e = { 0 };
    check(!open_vocabulary(b.bytes, b.n, 276, &m, &e) && strstr(e.text, "275"),
          "tokenizer.bin for 276 tokens: got \"%s\", wanted a refusal with \"275\"", e.text);
    close_model(&m);
    check(!open_vocabulary(b.bytes, 4, -1, &m, &e) && strstr(e.text, "0 tokens, expected 1 to"),
          "tokenizer.bin without tokens: got \"%s\"", e.text);
    close_model(&m);
    free(b.bytes);
}

// ---- Right but rare ----

// More keys than are compared with each other; 32 bytes each, so that the tensors stay where they are.
static void test_many_keys(void) {
    enum { MANY = 5000 };
    Bytes b = read_golden("llama_linear.gguf");
    Buffer all = { 0 };
    put(&all, b.bytes, 16);
    put_number(&all, number_at(b.bytes + 16, 8) + MANY, 8);
    for (int i = 0; i < MANY; i++) {
        char name[32];
        put_number(&all, (uint64_t)snprintf(name, sizeof name, "general.k%07d", i), 8);
        put(&all, name, 16);
        put_number(&all, 4, 4), put_number(&all, 1, 4);
    }
    put(&all, b.bytes + 24, b.n - 24);
    Bytes larger = copy_bytes(all.bytes, all.n);
    Error e;
    check(try_open(larger, &e), "%d keys: got \"%s\", wanted it to open", MANY, e.text);
    free(larger.bytes);
    larger = new_bytes(24 + 13 * (MAX_KEYS + 1));  // room for more of the shortest than there may be
    memset(larger.bytes, 0, larger.n);
    memcpy(larger.bytes, b.bytes, 16);
    memcpy(larger.bytes + 16, &(const uint64_t){ MAX_KEYS + 1 }, 8);
    check_refused(larger, "many keys", "claims to have 65537 keys");
    free(b.bytes), free(all.bytes), free(larger.bytes);
}

// A vocabulary that is whole, but another model's.
static void test_other_vocabulary(void) {
    enum { N_TOKENS = 130 };  // the weights have 131
    static const DamageCase dropped[] = { { K_DROP, "tokenizer.ggml.scores", 0, NULL, NULL },
                                          { K_DROP, "tokenizer.ggml.token_type", 0, NULL, NULL } };
    Bytes b = read_golden("llama_linear.gguf");
    GgufParts g;
    take_apart(b, &g);
    unsigned char array[12 + 8 * N_TOKENS] = { 8, 0, 0, 0, N_TOKENS };  // of strings
    set_value(key_named(&g, "tokenizer.ggml.tokens", false), 9, array, sizeof array);
    for (int i = 0; i < 2; i++) damage_key(&g, &dropped[i]);
    Bytes other = put_together(&g);
    check_refused(other, "another vocabulary", "the tokenizer has 130 tokens, the model has 131");
    free(other.bytes), free(b.bytes);
    free_parts(&g);
}

// 40 query heads that share a key/value head, more than are taken together: the model's own 5, and 35 more, which the
// matrix behind them multiplies with 0. That changes no bit of what transformers has for the 5.
static void test_wide_group(void) {
    enum { TIMES = 8, HEADS = 5, HEAD_DIM = 6 };
    Bytes b = read_golden("llama_mqa.gguf");
    GgufParts *g = get(sizeof *g);
    take_apart(b, g);
    Buffer data = { 0 };
    for (int i = 0; i < g->tensors; i++) {
        GgufTensor *t = &g->tensor[i];
        bool is_query = strstr(t->name, "attn_q."), is_out = strstr(t->name, "attn_output.");
        size_t row = 4 * t->dims[0], rows = t->n_dims > 1 ? t->dims[1] : 1;
        const unsigned char *from = g->data.bytes + t->offset;
        t->offset = data.n;
        for (size_t k = 0; k < rows * (is_query ? TIMES : 1); k++) {
            put(&data, from + k % rows * row, row);
            if (is_out) put(&data, NULL, (TIMES - 1) * row);
        }
        put(&data, NULL, round_up(data.n, 32) - data.n);
        if (is_query) t->dims[1] *= TIMES;
        if (is_out) t->dims[0] *= TIMES;
    }
    free(g->data.bytes);
    g->data = copy_bytes(data.bytes, data.n);
    set_value(key_named(g, "llama.attention.head_count", false), 4, &(uint32_t){ TIMES * HEADS }, 4);
    set_value(key_named(g, "llama.attention.key_length", true), 4, &(uint32_t){ HEAD_DIM }, 4);
    Opened own = open_golden("llama_mqa.gguf"), wide;
    Error e;
    int ids[GOLDEN_TOKENS];
    read_golden_ids("llama_mqa", ids);
    size_t n_bytes = n_logits_of(&own.model) * sizeof(float);
    float *wanted = get(n_bytes), *got = get(n_bytes);
    if (check(open_bytes(&wide, put_together(g), &e), "40 heads: got \"%s\"", e.text)) {
        run_all(&own.model, ids, plain(false, true), wanted);
        for (int batch = 1; batch <= 16; batch += 5) {
            run_all(&wide.model, ids, (Setting){ false, true, 2, batch, NULL }, got);
            check(!memcmp(got, wanted, n_bytes), "40 heads, batches of %d: other bits than with 5", batch);
        }
    }
    close_opened(&own), close_opened(&wide);
    free(wanted), free(got), free(data.bytes), free(b.bytes);
    free_parts(g), free(g);
}

// ---- Numbers that are not finite ----

// Of every format: a weight, a scale or a minimum of one row is Inf or NaN, or the largest that there is. What a
// float's bits mean is IEEE 754's; of MXFP4, scales of 2^(e - 128) times 12, those from e = 253 on are beyond f32.
static void check_broken_source(const SourceType *type) {
    enum { ROWS = 37, TILES = 3 };
    Tensor w = { type->tile, ROWS, TILES * types[type->tile].cols, NULL };
    bool floats = type->block_cols == 1, groups = type->gguf_id < 0;
    size_t n_bytes = ROWS * (size_t)w.cols / type->block_cols * type->block_bytes;
    size_t size = floats ? type->block_bytes : groups ? 4 : type->tile == MXFP4 ? 1 : 2;
    size_t begin = floats || size == 1 ? 0 : (size_t)type->scale_at;  // of the scale in a block
    unsigned char *data = get(n_bytes), *scales = get(n_bytes / 8), *tiles = get(tensor_bytes(&w) + 64);
    unsigned char *aligned = tiles + 64 - (uintptr_t)tiles % 64;
    Source source = { .type = type, .rows = ROWS, .cols = (size_t)w.cols, .data = data,
                      .scales = groups ? scales : NULL, .group = 32 };
    for (int i = 0; i < 3 * (types[type->tile].has_min ? 2 : 1); i++) {
        uint64_t bits = size == 4 ? (uint64_t[]){ 0xff800000, 0x7f800001, 0x7f7fffff }[i % 3]
                        : type->tile == BF16 ? (uint64_t[]){ 0xff80, 0x7f81, 0x7f7f }[i % 3]
                        : size == 1 ? (uint64_t[]){ 255, 253, 252 }[i % 3]
                                              : (uint64_t[]){ 0xfc00, 0x7c01, 0x7bff }[i % 3];
        if (groups && i == 2) bits = 0x7b7fffff;  // times 127
        for (size_t row = 0; row < ROWS; row += 5) {
            size_t tile = row * 7 % TILES, number = row * (size_t)w.cols + tile * (size_t)types[w.type].cols;
            unsigned char *at = data + number / type->block_cols * type->block_bytes + begin + (size_t)(i / 3) * 2;
            if (groups) at = scales + (row * TILES + tile) * 4;
            memcpy(at, &bits, size);
            pack_rows(aligned, &source, (Range){ 0, n_row_tiles(&w) });
            for (size_t k = 0; k < n_row_tiles(&w); k++) {
                size_t got = broken_row(&w, aligned + k * row_tile_bytes(&w));
                size_t wanted = row / 16 == k && i % 3 < 2 ? row % 16 : 16;
                check(got == wanted, "%s, %llx in row %zu, row tile %zu: got %zu, wanted %zu", type->name,
                      (unsigned long long)bits, row, k, got, wanted);
            }
            memset(at, 0, size);
        }
    }
    free(data), free(scales), free(tiles);
}

// An embedding of a million rows with two columns each, which have 64 bytes each in tiles.
static void test_small_matrices(void) {
    const int32_t header[] = { 2, 1, 1, 1, 1, MAX_TOKENS, 1 };  // of llama2.c: D, F, L, H, G, V and positions
    Bytes b = new_bytes(sizeof header + 4 * (2 * (size_t)MAX_TOKENS + 30));
    memset(b.bytes, 0, b.n);
    memcpy(b.bytes, header, sizeof header);
    // 2 V + 28 numbers; tiles of 2 KB for 16 rows, here V / 16 + 7, and three norms in 64 bytes each
    check_refused(b, "many small rows", "matrices so small that their 8388720 bytes take 134232256 in tiles");
    free(b.bytes);
}

// The bytes of a tensor in a native file.
static unsigned char *native_tensor(Bytes b, const char *name, size_t *n_bytes) {
    FileHeader h;
    memcpy(&h, b.bytes, sizeof h);
    for (uint32_t i = 0; i < h.n_tensors; i++) {
        TensorRecord r;
        memcpy(&r, b.bytes + h.tensors.at + i * sizeof r, sizeof r);
        *n_bytes = (size_t)r.n_bytes;
        if (!strcmp(r.name, name)) return b.bytes + r.at;
    }
    check(false, "%s is not in the native file", name);
    exit(1);
}

// One number of a tensor that is not finite: a GGUF is refused when its matrices are packed, a native file by
// check_weights(), and both when they are opened if it is in a vector. Each time tensor and row are named.
static void test_broken_numbers(void) {
    static const struct { const char *tensor; size_t row, col; double value; const char *wanted; } cases[] = {
        { "token_embd.weight", 130, 23, NAN, "token_embd.weight: row 130 " },
        { "blk.0.ffn_down.weight", 0, 35, INFINITY, "blk.0.ffn_down.weight: row 0 " },
        { "blk.1.attn_k.weight", 11, 0, -INFINITY, "blk.1.attn_k.weight: row 11 " },
        { "blk.1.ffn_gate.weight", 16, 7, NAN, "blk.1.ffn_gate.weight: row 16 " },
        { "output_norm.weight", 0, 23, NAN, "output_norm.weight: number 23 " },
        { "blk.1.ffn_norm.weight", 0, 0, INFINITY, "blk.1.ffn_norm.weight: number 0 " },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bytes b = read_golden("llama_linear.gguf"), native = export_golden("llama_linear.gguf");
        GgufParts g;
        take_apart(b, &g);
        float value = (float)cases[i].value;
        const GgufTensor *t = tensor_named(&g, cases[i].tensor);
        size_t row = cases[i].row, col = cases[i].col, n_bytes, tiles_across = (t->dims[0] + 31) / 32;
        memcpy(g.data.bytes + t->offset + 4 * (row * t->dims[0] + col), &value, 4);
        Bytes damaged = put_together(&g);
        check_refused(damaged, "a GGUF with a number that is not finite", cases[i].wanted);

        size_t place = ((row / 16 * tiles_across + col / 32) * 32 + col % 32) * 16 + row % 16;  // as chapter 4 draws it
        memcpy(native_tensor(native, cases[i].tensor, &n_bytes) + 4 * (t->n_dims > 1 ? place : col), &value, 4);
        Opened o;
        Error e;
        bool opens = open_bytes(&o, native, &e), finite = opens && check_weights(&o.model, &e);
        check(opens == (t->n_dims > 1) && !finite && e.status == BAD_FILE && strstr(e.text, cases[i].wanted),
              "%s of %g in a native file: got %s\"%s\", wanted \"%s\"", cases[i].tensor, cases[i].value,
              opens ? "it opened, " : "", e.text, cases[i].wanted);
        check(!opens || !export_model(&o.model, temporary("broken.bin"), &e), "%s of %g: it was exported",
              cases[i].tensor, cases[i].value);
        close_opened(&o);
        free(b.bytes), free(damaged.bytes);
        free_parts(&g);
    }
}

// A native file's matrices are not looked at before they are used: the run says where.
static void test_broken_weights(void) {
    static const struct { const char *tensor; double value; const char *wanted, *file; bool one; } cases[] = {
        { "token_embd.weight", NAN, "embedding", "qwen2_untied.gguf", false },
        { "blk.0.ffn_down.weight", INFINITY, "layer 1", "qwen2_untied.gguf", false },
        { "blk.1.attn_output.weight", NAN, "layer 2", "qwen2_untied.gguf", false },
        { "output.weight", NAN, "logits", "qwen2_untied.gguf", false },
        { "blk.0.attn_v.weight", NAN, "layer 1", "qwen2_untied.gguf", false },
        { "blk.1.ffn_gate.weight", NAN, "layer 2", "qwen2_untied.gguf", false },
        { "blk.0.ffn_gate_inp.weight", NAN, "layer 1", "mixtral.gguf", false },
        { "blk.1.ffn_gate_inp.weight", INFINITY, "layer 2", "mixtral.gguf", false },
        // one in row 3, which a comparison or a cap would make finite again
        { "blk.0.ffn_gate_inp.weight", NAN, "layer 1", "mixtral.gguf", true },
        { "token_embd.weight", 0x1.00f8p121, "logits", "families/gemma2.gguf", true },  // in f16 infinity, twice
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bytes b = export_golden(cases[i].file);
        float value = (float)cases[i].value;
        size_t n_bytes;
        unsigned char *data = native_tensor(b, cases[i].tensor, &n_bytes);
        for (size_t k = cases[i].one ? 12 : 0; k < (cases[i].one ? 16 : n_bytes); k += 4) memcpy(data + k, &value, 4);
        Opened o;
        Error e;
        Runner s = { .w = { .n = 0 } };
        int token = 5;
        bool ok = open_bytes(&o, b, &e) && start_runner(&o.model, (Setting){ false, true, 2, 4, NULL }, &s, &e);
        check(ok, "%s of %g: got \"%s\", wanted it to open", cases[i].tensor, cases[i].value, e.text);
        s.w.room[0] = (Row){ token, 0, 0, true };
        ok = ok && forward(&o.model, &s.w, &s.text, s.w.room, 1, &e);
        check(s.text.n == ok, "%s of %g: the text has %d tokens after a pass", cases[i].tensor, cases[i].value,
              s.text.n);
        ok = ok && make_logits(&o.model, &s.w, 0, 1, &e);
        check(!ok && e.status == BAD_FILE && strstr(e.text, cases[i].wanted) && strstr(e.text, "position 0"),
              "%s of %g: got \"%s\", wanted \"%s\"", cases[i].tensor, cases[i].value, e.text, cases[i].wanted);
        free_runner(&s);
        close_opened(&o);
    }
}

// ---- A GGUF in parts ----

enum { N_SPLIT = 3 };

static void set_number(GgufParts *g, const char *name, uint32_t type, uint64_t value, size_t n_bytes) {
    set_value(key_named(g, name, true), type, &value, n_bytes);
}

// Part `part` of a GGUF as llama.cpp's gguf-split makes it: the first has all keys, each its own tensors, with places
// of their own, and three keys of the types that are there (u16, u16, i32).
static Bytes make_part(const char *golden, int part) {
    Bytes b = read_golden(golden);
    GgufParts whole;
    take_apart(b, &whole);
    GgufParts *g = get(sizeof *g);
    *g = (GgufParts){ .version = 3 };
    for (int i = 0; part == 1 && i < whole.keys; i++) {
        GgufKey *k = key_named(g, whole.key[i].name, true);
        k->value = copy_bytes(whole.key[i].value.bytes, whole.key[i].value.n);
    }
    set_number(g, "split.count", 2, N_SPLIT, 2);
    set_number(g, "split.tensors.count", 5, whole.n_tensors, 4);
    Buffer data = { 0 };
    int from = whole.tensors * (part - 1) / N_SPLIT, to = whole.tensors * part / N_SPLIT;
    for (int i = from; i < to; i++) {
        const GgufTensor *t = &whole.tensor[i];
        size_t end = i + 1 < whole.tensors ? whole.tensor[i + 1].offset : whole.data.n;
        g->tensor[g->tensors] = *t;
        g->tensor[g->tensors++].offset = data.n;
        put(&data, whole.data.bytes + t->offset, end - t->offset);
        put(&data, NULL, round_up(data.n, 32) - data.n);
    }
    g->n_tensors = (uint64_t)g->tensors;
    g->data = copy_bytes(data.bytes, data.n);
    Bytes made = put_together(g);
    free_parts(g), free_parts(&whole);
    free(g), free(data.bytes), free(b.bytes);
    return made;
}

// The parts in memory; close_in_parts() takes them out again, since close_model() would unmap them.
static bool open_in_parts(Bytes *parts, size_t n, Model *m, Error *e) {
    *e = (Error){ 0 };
    *m = (Model){ .n_parts = n - 1, .parts = get(n * sizeof *m->parts) };
    for (size_t i = 1; i < n; i++) m->parts[i - 1] = (Map){ parts[i].bytes, parts[i].n, NULL };
    return open_model(parts[0].bytes, parts[0].n, 2, m, e);
}

static void close_in_parts(Model *m) {
    free(m->parts);
    m->parts = NULL;
    m->n_parts = 0;
    close_model(m);
}

// What is done to part `part`.
static void check_damaged_part(int part, const DamageCase *c, const char *wanted) {
    Bytes parts[N_SPLIT];
    for (int i = 0; i < N_SPLIT; i++) parts[i] = make_part("llama_linear.gguf", i + 1);
    GgufParts *g = get(sizeof *g);
    take_apart(parts[part - 1], g);
    if (c->how < T_DROP) damage_key(g, c);
    else damage_tensor(g, c);
    free(parts[part - 1].bytes);
    parts[part - 1] = put_together(g);
    Model m;
    Error e;
    bool ok = open_in_parts(parts, N_SPLIT, &m, &e);
    check(!ok && is_refusal(&e) && strstr(e.text, wanted), "part %d, damage %d to %s: got %s\"%s\", wanted \"%s\"",
          part, (int)c->how, c->name, ok ? "it opened " : "", e.text, wanted);
    close_in_parts(&m);
    free_parts(g), free(g);
    for (int i = 0; i < N_SPLIT; i++) free(parts[i].bytes);
}

// What was mapped becomes shorter, and is read all the same: status 3, and the path that was given.
static void check_shrunk_part(const char *path, const Map *map, const Model *m) {
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        close(2);
        in_use = m;
        sigaction(SIGBUS, &(struct sigaction){ .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO }, NULL);
        _exit(truncate(path, 0) ? 98 : 90 + *(const volatile unsigned char *)map->bytes % 2);
    }
    waitpid(child, &status, 0);
    check(!strcmp(map->path, path) && WIFEXITED(status) && WEXITSTATUS(status) == BROKEN_IO,
          "%s is cut while it is mapped: got %x and \"%s\", wanted status 3 and \"%s\"", path, status, map->path, path);
}

static void check_named_parts(const Bytes *parts, Bytes wanted) {
    char path[N_SPLIT][160], plain[160];
    for (int i = 0; i < N_SPLIT; i++) {
        snprintf(path[i], sizeof path[i], "%s/model-%05d-of-%05d.gguf", folder, i + 1, N_SPLIT);
        check(write_bytes(path[i], parts[i]), "%s cannot be written", path[i]);
    }
    Model m = { 0 };
    Error e = { 0 };
    const char *native = temporary("native.bin");
    for (int i = 0; i < N_SPLIT; i++) {
        bool ok = map_parts(path[i], &m, &e) && open_model(m.file.bytes, m.file.n_bytes, 2, &m, &e) &&
                  export_model(&m, native, &e);
        Bytes got = read_bytes(native);
        check(ok && got.n == wanted.n && !memcmp(got.bytes, wanted.bytes, got.n),
              "%s: got \"%s\" or another native file than from the whole GGUF", path[i], e.text);
        free(got.bytes);
        check_shrunk_part(path[i], i ? &m.parts[i - 1] : &m.file, &m);
        check(write_bytes(path[i], parts[i]), "%s cannot be written", path[i]);
        close_model(&m);
        unlink(native);
    }
    size_t n_failed_well = 0;
    for (faults.failing = 1; n_failed_well + 1 == faults.failing; faults.failing++) {  // each allocation in turn
        faults.n = 0;
        bool ok = map_parts(path[0], &m, &e) && open_model(m.file.bytes, m.file.n_bytes, 1, &m, &e);
        n_failed_well += !ok && e.status == NO_MEMORY;
        close_model(&m);
        if (ok && faults.n < faults.failing) break;
    }
    check(n_failed_well > 10 && faults.failing == n_failed_well + 1, "parts without memory: allocation %zu",
          faults.failing);
    faults.failing = 0;
    static const char *const no_parts[] = { "00004-of-00003", "00001-of--0003", "+0001-of-00001", "00001-of-    1" };
    for (size_t i = 0; i < sizeof no_parts / sizeof *no_parts; i++) {  // as any other file
        snprintf(plain, sizeof plain, "%s/model-%s.gguf", folder, no_parts[i]);
        check(!map_parts(plain, &m, &e) && !strstr(e.text, "part"), "%s: got \"%s\"", plain, e.text);
        close_model(&m);
    }
    unlink(path[1]);
    check(!map_parts(path[0], &m, &e) && strstr(e.text, "part 2: No such file"), "without part 2: got \"%s\"", e.text);
    close_model(&m);
    check(write_bytes(path[1], (Bytes){ parts[1].bytes, 0 }) && !map_parts(path[2], &m, &e) &&
          strstr(e.text, "part 2: an empty file"), "part 2 is empty: got \"%s\"", e.text);
    close_model(&m);
    for (int i = 0; i < N_SPLIT; i++) unlink(path[i]);
    snprintf(plain, sizeof plain, "%s/renamed.gguf", folder);
    check(write_bytes(plain, parts[0]) && map_parts(plain, &m, &e) &&
          !open_model(m.file.bytes, m.file.n_bytes, 1, &m, &e) && strstr(e.text, "one of 3 parts"),
          "a part by another name: got \"%s\"", e.text);
    close_model(&m);
    check(map_parts(plain, &m, &e) && open_vocabulary(m.file.bytes, m.file.n_bytes, -1, &m, &e) &&
          m.tokenizer.n_tokens == 131, "the vocabulary of a first part: got \"%s\"", e.text);
    close_model(&m);
    unlink(plain);
}

// A part with one tensor, whose data begin at a multiple of `alignment`, without the padding before it.
static void test_unpadded_part(void) {
    static const uint32_t alignments[] = { 32, 65536 };
    for (int i = 0; i < 2; i++) {
        Bytes b = read_golden("llama_linear.gguf"), parts[2];
        GgufParts *g = get(sizeof *g), *second = get(sizeof *second);
        take_apart(b, g);
        set_number(g, "split.count", 2, 2, 2);
        *second = (GgufParts){ .version = 3, .n_tensors = 1, .tensors = 1 };
        second->tensor[0] = g->tensor[--g->tensors];
        g->n_tensors--;
        size_t at = second->tensor[0].offset;
        second->data = copy_bytes(g->data.bytes + at, g->data.n - at);
        second->tensor[0].offset = 0;
        set_number(second, "general.alignment", 4, alignments[i], 4);
        set_number(second, "split.count", 2, 2, 2);
        parts[0] = put_together(g);
        parts[1] = put_together(second);
        Model m;
        Error e;
        bool ok = open_in_parts(parts, 2, &m, &e);
        check(i == 0 ? ok : !ok && is_refusal(&e) && strstr(e.text, "ends after the file does"),
              "a part of one tensor, aligned to %u: got %s\"%s\"", alignments[i], ok ? "it opened " : "", e.text);
        close_in_parts(&m);
        for (int k = 0; k < 2; k++) free(parts[k].bytes);
        free_parts(g), free_parts(second);
        free(g), free(second), free(b.bytes);
    }
}

static void test_parts(void) {
    static const struct { int part; DamageCase damage; const char *wanted; } cases[] = {
        { 3, { K_U32, "split.count", 4, NULL, NULL }, "part 3: one of 4 parts of a split GGUF, but of 3 by its name" },
        { 3, { K_DROP, "split.count", 0, NULL, NULL }, "part 3: one of 1 parts" },
        { 1, { K_U32, "split.count", 2, NULL, NULL }, "one of 2 parts" },
        { 2, { K_TEXT, "split.count", 0, "3", NULL }, "part 2: key split.count" },
        { 1, { K_DROP, "general.architecture", 0, NULL, NULL }, "general.architecture is missing" },
        { 1, { K_U32, "split.tensors.count", 21, NULL, NULL }, "says 21" },
        { 1, { K_TEXT, "split.tensors.count", 0, "20", NULL }, "split.tensors.count" },
        { 2, { K_U32, "general.alignment", 24, NULL, NULL }, "part 2: key general.alignment" },
        { 2, { K_TEXT, "general.alignment", 0, "32", NULL }, "part 2: key general.alignment" },
        { 2, { T_DROP, "blk.0.ffn_up.weight", 0, NULL, NULL }, "key split.tensors.count says" },
        { 2, { T_RENAME, "blk.0.ffn_up.weight", 0, "token_embd.weight", NULL }, "" },  // twice in all
        { 3, { T_OFFSET, "blk.1.ffn_up.weight", 0x1p40, NULL, NULL }, "part 3: blk.1.ffn_up.weight ends after" },
        { 3, { T_OFFSET, "blk.1.ffn_up.weight", 0, NULL, NULL }, "part 3: tensors" },
        { 3, { T_TYPE, "blk.1.ffn_up.weight", 99, NULL, NULL }, "part 3: blk.1.ffn_up.weight is of GGUF type 99" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check_damaged_part(cases[i].part, &cases[i].damage, cases[i].wanted);
    Bytes wanted = export_golden("llama_linear.gguf"), parts[N_SPLIT];
    for (int i = 0; i < N_SPLIT; i++) parts[i] = make_part("llama_linear.gguf", i + 1);
    check_named_parts(parts, wanted);
    size_t n_wrong = 0;
    Model m;
    Error e;
    Bytes second = parts[1];  // one that has room for as many tensors as there may be, but not beside the others
    parts[1] = new_bytes(second.n + 24 * MAX_TENSORS);
    memset(parts[1].bytes, 0, parts[1].n);
    memcpy(parts[1].bytes, second.bytes, second.n);
    memcpy(parts[1].bytes + 8, &(const uint64_t){ MAX_TENSORS }, 8);
    check(!open_in_parts(parts, N_SPLIT, &m, &e) && strstr(e.text, "part 2: claims to have 65536 tensors"),
          "more tensors than there may be: got \"%s\"", e.text);
    close_in_parts(&m);
    free(parts[1].bytes);
    parts[1] = second;
    parts[1].bytes[0] = 'g';
    check(!open_in_parts(parts, N_SPLIT, &m, &e) && strstr(e.text, "part 2: "), "a part that is none: got \"%s\"",
          e.text);
    close_in_parts(&m);
    parts[1].bytes[0] = 'G';
    for (size_t bit = 0; bit < 8 * 700; bit++) {  // of the header of the second
        parts[1].bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
        n_wrong += !open_in_parts(parts, N_SPLIT, &m, &e) && !is_refusal(&e);
        close_in_parts(&m);
        parts[1].bytes[bit / 8] ^= (unsigned char)(1 << bit % 8);
    }
    for (size_t whole = parts[2].n, n = whole; n-- > 0;) {
        parts[2].bytes = realloc(parts[2].bytes, n ? n : 1);
        parts[2].n = n;
        bool ok = parts[2].bytes && open_in_parts(parts, N_SPLIT, &m, &e);
        n_wrong += ok ? n + 32 <= whole : !is_refusal(&e) || !strstr(e.text, "part 3: ");
        close_in_parts(&m);
    }
    check(!n_wrong, "parts with a wrong bit or cut short: %zu wrong", n_wrong);
    for (int i = 0; i < N_SPLIT; i++) free(parts[i].bytes);
    free(wanted.bytes);
}

static void test_damaged_files(void) {
    test_small_matrices();
    test_damaged_ggufs();
    test_cut_ggufs();
    test_first_key();
    test_missing_kinds();
    test_expert_biases();
    test_readings();
    test_parts();
    test_unpadded_part();
    test_damaged_native();
    test_many_keys();
    test_other_vocabulary();
    test_wide_group();
    test_limits();
    test_damaged_llama2c();
    for (int i = 0; i < N_SOURCE_TYPES; i++) check_broken_source(&source_types[i]);
    test_broken_numbers();
    test_broken_weights();
}

// ---- Everywhere ----

static void check_count(const Victim *v, const char *what, const Count *c) {
    check(!c->n_wrong, "%s, %s: %zu of %zu cases wrong, the first: %s", v->name, what, c->n_wrong, c->n_cases,
          c->first);
    check(c->n_cases > 100 || v->header < 100, "%s, %s: only %zu cases", v->name, what, c->n_cases);
    // Scores, texts and padding may have any bits.
    check(c->n_refused > c->n_cases / 20, "%s, %s: of %zu cases only %zu were refused", v->name, what, c->n_cases,
          c->n_refused);
}

// Some random bytes at once, also in the weights.
static void check_random_damage(const char *name, Bytes b, size_t header) {
    size_t n_wrong = 0;
    Error e, kept = { 0 };
    for (int i = 0; i < 2000; i++) {
        Bytes damaged = copy_bytes(b.bytes, b.n);
        for (size_t k = 1 + random_below(6); k > 0; k--)
            damaged.bytes[random_below(k % 2 ? header : b.n)] = (unsigned char)random_bits();
        if (!try_open(damaged, &e) && !is_refusal(&e) && !n_wrong++) kept = e;
        free(damaged.bytes);
    }
    check(!n_wrong, "%s with random bytes: %zu wrong, first: got status %d \"%s\"", name, n_wrong, kept.status,
          kept.text);
}

// The quick part of make attack.
static void test_damage_everywhere(void) {
    static const struct { const char *name; bool native; size_t steps[3]; } cases[] = {
        { "llama_linear.gguf", false, { 1, 1, 8 } }, { "llama_linear.gguf", true, { 1, 1, 16 } },
        { "llama2c_v2.bin", false, { 1, 1, 2 } }, { "llama2c_v0.bin", false, { 1, 1, 1 } },
        { "tokenizer.bin", false, { 1, 5, 16 } }, { "qwen2_untied.gguf", true, { 64, 13, 64 } },
        { "mixtral.gguf", true, { 64, 13, 64 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Bytes b = cases[i].native ? export_golden(cases[i].name) : read_golden(cases[i].name);
        Victim v = { .name = cases[i].name, .bytes = b.bytes, .n = b.n, .is_vocabulary = i == 4 };
        sweep(&v, cases[i].steps, check_count);
        if (v.header < b.n) check_random_damage(v.name, b, v.header);
        free(b.bytes);
    }
}

// ---- What fuzzing has found ----

// A vocabulary without any text: a pointer to nothing was moved by nothing, which C does not define. It opens.
static void test_empty_pieces(void) {
    enum { N_TOKENS = 131 };  // of llama_linear.gguf
    Bytes b = read_golden("llama_linear.gguf");
    GgufParts g;
    take_apart(b, &g);
    unsigned char array[12 + 8 * N_TOKENS] = { 8, 0, 0, 0, N_TOKENS };  // of strings
    set_value(key_named(&g, "tokenizer.ggml.tokens", false), 9, array, sizeof array);
    Bytes empty = put_together(&g);
    Error e;
    check(try_open(empty, &e), "empty pieces: got \"%s\", wanted it to open", e.text);
    free(empty.bytes), free(b.bytes);
    free_parts(&g);
}

// The targets of fuzz.c on every input in tests/corpus: each reaches code that the others do not.
static void test_corpus(void) {
    test_empty_pieces();
    static const char *const targets[] = { "files", "texts", "models", "sessions" };
    for (int i = 0; i < 4; i++) {
        char path[400];
        int n = 0;
        snprintf(path, sizeof path, "tests/corpus/%s", targets[i]);
        DIR *corpus = opendir(path);
        for (struct dirent *d; corpus && (d = readdir(corpus));) {
            if (d->d_name[0] == '.') continue;
            snprintf(path, sizeof path, "tests/corpus/%s/%s", targets[i], d->d_name);
            Bytes b = read_bytes(path);
            const char *wrong = i == 1 ? try_text_input(b.bytes, b.n)
                              : i == 3 ? try_session(b.bytes, b.n) : try_file(b.bytes, b.n, false);
            if (i % 2 == 0 && !wrong) wrong = try_file(b.bytes, b.n, true);
            check(b.bytes && !wrong, "%s: %s", path, wrong ? wrong : "cannot be read");
            free(b.bytes);
            n++;
        }
        if (corpus) closedir(corpus);
        check(n >= (i == 3 ? 10 : 50), "tests/corpus/%s: got %d inputs", targets[i], n);
    }
}

// ---- Calls that fail ----

static bool open_and_run(Bytes b, Bytes vocabulary, Error *e) {
    Model m = { 0 };
    Runner s = { .w = { .n = 0 } };
    Sampler sampler = { .temperature = 1 };
    Tokens tokens = { 0 };
    Span span = { "Once upon a time, there wa\u0301s", 29, true };
    int token = 1;
    const char *path = temporary("no-memory.bin");
    bool ok = open_model(b.bytes, b.n, 1, &m, e) &&
              (!vocabulary.bytes || open_vocabulary(vocabulary.bytes, vocabulary.n, m.config.n_tokens, &m, e)) &&
              start_runner(&m, (Setting){ false, false, 1, 4, NULL }, &s, e) &&
              make_sampler(&sampler, m.config.n_tokens, 1, e) && encode(&m.tokenizer, &span, 1, &tokens, e) &&
              run_tokens(&m, &s, &token, 1, 1, e) && export_model(&m, path, e);
    check(ok || access(path, F_OK), "a file is there that was not written whole");
    if (ok) unlink(path);
    free(tokens.ids);
    free(sampler.candidates);
    free_runner(&s);
    close_model(&m);
    return ok;
}

// Texts of tokens of each kind, so many that memory is asked for at each of them: what fails there is told.
static void test_failing_encoding(void) {
    static const struct { const char *vocabulary, *pre, *first, *again; } cases[] = {
        { "spm.gguf", NULL, "", "</s>" }, { "spm.gguf", NULL, "a", "</s>" }, { "spm.gguf", NULL, "</s>a", "</s>a" },
        { "spm.gguf", NULL, "<tool>", "a<tool>" }, { "spm.gguf", NULL, "b", "a<tool>" },
        { "spm-bare.gguf", NULL, "", "\u4F60a" }, { "spm-bare.gguf", NULL, "a", "\u4F60a" },
        { "bpe.gguf", "qwen2", "", "a\u0301<|im_start|>" }, { "bpe.gguf", "llama-bpe", "a", " the\u4F60<|im_start|>" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char text[4096];
        Opened o;
        Error e;
        int n = snprintf(text, sizeof text, "%s", cases[i].first);
        for (int k = 0; k < 140; k++) n += snprintf(text + n, sizeof text - (size_t)n, "%s", cases[i].again);
        Span span = { text, (size_t)n, true };
        bool ok = !open_golden_vocabulary(cases[i].vocabulary, cases[i].pre, &o, &e);
        size_t n_told = 0, failing = 0;
        while (!ok && failing < 1000) {
            Tokens tokens = { 0 };
            e = (Error){ 0 };
            faults.n = 0;
            faults.failing = ++failing;
            faults.for_good = false;
            ok = encode(&o.model.tokenizer, &span, 1, &tokens, &e);
            n_told += !ok && e.status == NO_MEMORY;
            ok = ok && faults.n < failing;
            faults.failing = 0;
            free(tokens.ids);
        }
        check(failing > 4 && n_told == failing - 1, "%s%s...: %zu of %zu failures were told", cases[i].first,
              cases[i].again, n_told, failing - 1);
        close_opened(&o);
    }
    Error e = { 0 };
    Span huge = { "", (size_t)MAX_TEXT + 1, false };
    check(!encode(&(Tokenizer){ 0 }, &huge, 1, &(Tokens){ 0 }, &e) && e.status == NO_ROOM, "2^30 + 1 bytes: got \"%s\"",
          e.text);
}

// The n-th allocation fails, for every n, once and from there on; then the n-th call for output.
static void test_failing_calls(void) {
    static const char *const files[] = { "llama_linear.gguf", "qwen2.gguf", "mixed_fused.gguf", "llama2c_v2.bin" };
    static const struct { const char *name; int kinds, status; } kinds[] = {
        { "allocations", MEMORY, NO_MEMORY }, { "calls for output", OUTPUT, BROKEN_IO },
    };
    for (int i = 0; i < 16; i++) {
        const char *name = files[i % 4];
        Bytes b = i / 4 % 2 ? export_golden(name) : read_golden(name), vocabulary = { NULL, 0 };
        if (i % 8 == 3) vocabulary = read_golden("tokenizer.bin");
        faults.kinds = kinds[i / 8].kinds;
        for (int for_good = 0; for_good < 2; for_good++) {
            Error e = { 0 };
            faults.n = 0;
            if (!check(open_and_run(b, vocabulary, &e), "%s: got \"%s\"", name, e.text)) continue;
            size_t n = faults.n, n_wrong = 0, first = 0;
            for (size_t k = 1; k <= n; k++) {
                e = (Error){ 0 };
                faults.n = 0;
                faults.failing = k;
                faults.for_good = for_good;
                bool ok = open_and_run(b, vocabulary, &e);
                faults.failing = 0;
                if ((ok || e.status != kinds[i / 8].status) && !n_wrong++) first = k;
            }
            check(n > 5 && !n_wrong, "%s%s: of %zu %s that failed%s, %zu were not told as status %d, first number %zu",
                  name, i / 4 % 2 ? " exported" : "", n, kinds[i / 8].name, for_good ? " for good" : "", n_wrong,
                  kinds[i / 8].status, first);
        }
        faults.kinds = MEMORY;
        free(b.bytes), free(vocabulary.bytes);
    }
    test_failing_encoding();
}
