#ifndef CRIA_GROUND_FLOOR  // built alone, as a command: run.c brings everything and, at its end, the command's main()
#define TOKENIZER_COMMAND 1
#include "run.c"
#else

/* ==== 2. Text to tokens ==============================================================================================
   A model reads numbers. Its vocabulary lists some ten thousand pieces of text; a token is the number of a piece. Both
   kinds of vocabulary begin with the smallest pieces (SPM, SentencePiece: characters; BPE: bytes) and join neighbours
   again and again, always the pair that the vocabulary likes best. They differ in the liking: SPM joins what gives a
   piece, the best score first; BPE has a list of pairs, the earliest first, and cuts the text into words beforehand.
   Every source of a vocabulary is brought into one form, the section, which one function checks.

   The section, little-endian, as native files carry it:

       | header, 40 bytes | f32 score[n_tokens] | u32 text_start[n_tokens + 1] | u32 merge[n_merges][3] |
       | u32 end_id[n_end] | u8 type[n_tokens] | text, text_bytes | zeros up to a multiple of 4 |

   Piece i is the bytes text_start[i] .. text_start[i + 1] of text, as they stand in a text: SPM's U+2581 is a space, a
   byte token is its byte, and BPE's printable spelling of bytes is undone. merge[rank] = left, right, their result. */

enum { SPM = 1, BPE = 2 };
enum { PIECE_NORMAL = 1, PIECE_UNKNOWN, PIECE_CONTROL, PIECE_USER_DEFINED, PIECE_UNUSED, PIECE_BYTE };  // as in GGUF
enum { TEXT_TYPES = 1 << PIECE_NORMAL | 1 << PIECE_USER_DEFINED };  // what plain text can become
enum { SPECIAL_TYPES = 1 << PIECE_CONTROL | 1 << PIECE_USER_DEFINED };
enum { ADD_BOS = 1, ADD_EOS = 2, DUMMY_PREFIX = 4, IGNORE_MERGES = 8, ALL_TOKENIZER_FLAGS = 15 };
enum { MAX_TOKENS = 1 << 20, MAX_MERGES = 1 << 23, MAX_PIECE = 4096, MAX_SPECIAL_PIECE = 256, MAX_TEXT = 1 << 30 };

typedef struct {
    uint32_t kind, pre, flags;  // SPM or BPE; a row of pre_tokenizers[]; a set of the flags above
    int32_t bos, eos, unk;      // ids, or -1
    uint32_t n_end, n_tokens, n_merges, text_bytes;
} TokenizerHeader;
_Static_assert(sizeof(TokenizerHeader) == 40, "the header as drawn");

typedef struct {
    int kind, pre, bos, eos, unk, n_tokens, n_merges, n_end;
    bool add_bos, add_eos, dummy_prefix, ignore_merges;
    const float *score;          // (n_tokens)        these lie in the section
    const uint32_t *text_start;  // (n_tokens + 1)
    const uint32_t (*merge)[3];  // (n_merges, 3)
    const uint32_t *end_id;      // (n_end)           an answer ends at any of these
    const uint8_t *type;         // (n_tokens)
    const char *text;
    int *piece_slots;            // (piece_mask + 1)  hash table: bytes -> id; -1 is empty
    int *merge_slots;            // (merge_mask + 1)  hash table: left and right -> rank; -1 is empty
    size_t piece_mask, merge_mask;
    uint8_t *class_of;           // (N_CLASSIFIED)    classes of characters by code point; BPE only
    int byte_id[256];            // the token that stands for a single byte, or -1
    uint8_t begins[256];         // the set of types (1 << type) that pieces have that begin with this byte
    bool space_leads;            // SPM: no piece has a space after another character, words can be joined one by one
} Tokenizer;

// A token's own bytes; a control token's are its spelling.
static const char *piece(const Tokenizer *t, int id, size_t *n_bytes) {
    bool known = id >= 0 && id < t->n_tokens;
    *n_bytes = known ? t->text_start[id + 1] - t->text_start[id] : 0;
    return known ? t->text + t->text_start[id] : "";
}

// The character at s: returns its length in bytes, 0 if the n bytes end before the character does, -1 if no valid UTF-8
// begins like this (overlong forms, surrogates and all above U+10FFFF are not valid).
static int read_character(const char *s, size_t n, uint32_t *code) {
    const unsigned char *u = (const unsigned char *)s;
    if (n == 0) return 0;
    *code = u[0];
    if (u[0] < 0x80) return 1;
    if (u[0] < 0xC2 || u[0] > 0xF4) return -1;
    int length = u[0] < 0xE0 ? 2 : u[0] < 0xF0 ? 3 : 4;
    *code = u[0] & (0xFFu >> (length + 1));
    unsigned char low = u[0] == 0xE0 ? 0xA0 : u[0] == 0xF0 ? 0x90 : 0x80;  // the second byte's limits
    unsigned char high = u[0] == 0xED ? 0x9F : u[0] == 0xF4 ? 0x8F : 0xBF;
    for (int i = 1; i < length; i++, low = 0x80, high = 0xBF) {
        if ((size_t)i == n) return 0;
        if (u[i] < low || u[i] > high) return -1;
        *code = *code << 6 | (u[i] & 0x3F);
    }
    return length;
}

// How many bytes of s can be printed without cutting a character that further bytes could still complete.
static size_t whole_characters(const char *s, size_t n) {
    for (size_t tail = 1; tail <= 3 && tail <= n; tail++) {
        uint32_t code;
        unsigned char c = (unsigned char)s[n - tail];
        if (c >= 0xC0) return read_character(s + n - tail, tail, &code) == 0 ? n - tail : n;
        if (c < 0x80) return n;
    }
    return n;
}

/* ---- Looking up -------------------------------------------------------------------------------------------------- */

// The hash of n + 1 bytes from that of the first n: one pass over a text hashes all its beginnings. A vocabulary made
// to collide is refused, so this need not be secret.
static uint64_t hash_byte(uint64_t hash, char byte) { return (hash ^ (unsigned char)byte) * 0x9E3779B97F4A7C15u; }

static uint64_t hash_bytes(const char *s, size_t n) {
    uint64_t hash = 1;
    for (size_t i = 0; i < n; i++) hash = hash_byte(hash, s[i]);
    return hash;
}

// Where the piece with these bytes and one of these types is in the table of pieces, or where it would be put.
static int *piece_slot(const Tokenizer *t, const char *s, size_t n, uint64_t hash, unsigned types, size_t *steps) {
    for (size_t slot = (size_t)(hash ^ hash >> 32);; slot++, ++*steps) {
        int *id = &t->piece_slots[slot & t->piece_mask];
        size_t n_bytes;
        if (*id < 0) return id;
        const char *bytes = piece(t, *id, &n_bytes);
        if (n_bytes == n && types >> t->type[*id] & 1 && memcmp(bytes, s, n) == 0) return id;
    }
}

// The lowest id of a piece with these bytes whose type is in `types`, or -1.
static int lookup(const Tokenizer *t, const char *s, size_t n, unsigned types) {
    size_t steps = 0;
    return *piece_slot(t, s, n, hash_bytes(s, n), types, &steps);
}

// The lowest id that text with these bytes can become, or -1; byte tokens and control tokens have no part in this.
static int find_piece(const Tokenizer *t, const char *s, size_t n) { return lookup(t, s, n, TEXT_TYPES); }

// The longest piece of this type that the n bytes at s begin with; or -1, and a length of 1.
static int longest_special(const Tokenizer *t, int type, const char *s, size_t n, size_t *n_bytes) {
    int found = -1;
    *n_bytes = 1;
    if (!(t->begins[(unsigned char)s[0]] >> type & 1)) return found;
    uint64_t hash = 1;
    size_t steps = 0;
    for (size_t length = 1; length <= n && length <= MAX_SPECIAL_PIECE; length++) {
        hash = hash_byte(hash, s[length - 1]);
        int id = *piece_slot(t, s, length, hash, 1u << type, &steps);
        if (id < 0) continue;
        found = id;
        *n_bytes = length;
    }
    return found;
}

// Where the pair is in the table of merges, or where it would be put.
static int *find_merge(const Tokenizer *t, uint32_t left, uint32_t right, size_t *steps) {
    uint64_t hash = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    for (size_t slot = (size_t)(hash ^ hash >> 32);; slot++, ++*steps) {
        int *rank = &t->merge_slots[slot & t->merge_mask];
        if (*rank < 0 || (t->merge[*rank][0] == left && t->merge[*rank][1] == right)) return rank;
    }
}

// Memory for a table of at least n entries, all of them -1: a power of two slots, at most two thirds of them used.
static int *make_table(size_t n, size_t *mask, Error *e) {
    size_t slots = 16;
    while (slots < n + n / 2) slots *= 2;
    int *table = allocate(slots, sizeof *table, e);
    if (table) memset(table, 0xFF, slots * sizeof *table);
    *mask = slots - 1;
    return table;
}

// Fills the table behind lookup(), and what can be known about single bytes, and about spaces, before any text is seen.
// Of pieces with the same bytes and the same type only the first has an entry.
static bool index_pieces(Tokenizer *t, Error *e) {
    t->piece_slots = make_table((size_t)t->n_tokens, &t->piece_mask, e);
    if (!t->piece_slots) return false;
    memset(t->byte_id, 0xFF, sizeof t->byte_id);
    t->space_leads = t->kind == SPM;
    size_t n, steps = 0;
    for (int id = 0; id < t->n_tokens; id++) {
        const char *s = piece(t, id, &n);
        int type = t->type[id], first = n ? (unsigned char)s[0] : 0;
        if (n == 1 && type == (t->kind == SPM ? PIECE_BYTE : PIECE_NORMAL) && t->byte_id[first] < 0)
            t->byte_id[first] = id;
        if (n == 0 || type == PIECE_BYTE) continue;
        for (size_t i = 1; i < n && t->space_leads && TEXT_TYPES >> type & 1; i++)
            t->space_leads = s[i] != ' ' || s[i - 1] == ' ';
        t->begins[first] |= (uint8_t)(1 << type);
        int *slot = piece_slot(t, s, n, hash_bytes(s, n), 1u << type, &steps);
        if (*slot < 0) *slot = id;
        if (steps > 8 * t->piece_mask) return refuse(e, "the vocabulary's pieces are made to collide");
    }
    return true;
}

// Fills the table of merges. Of two for the same pair the earlier counts.
static bool index_merges(Tokenizer *t, Error *e) {
    t->merge_slots = make_table((size_t)t->n_merges, &t->merge_mask, e);
    if (!t->merge_slots) return false;
    size_t steps = 0;
    for (int rank = 0; rank < t->n_merges; rank++) {
        int *slot = find_merge(t, t->merge[rank][0], t->merge[rank][1], &steps);
        if (*slot < 0) *slot = rank;
        if (steps > 8 * t->merge_mask) return refuse(e, "the vocabulary's merges are made to collide");
    }
    return true;
}

/* ---- Cutting text into words (BPE) ----------------------------------------------------------------------------------
   A model's training began with regular expressions that cut the text, and joining never crosses a cut. A rule is one
   such expression, written by hand: it says where the match that begins at `at` ends, or `at` itself if none does. Each
   byte of the text has a set of bits, its character's classes, and rules look at bits. Time is linear. */

enum { LETTER = 1, NUMBER = 2, SPACE = 4, SYMBOL = 8, CASED = 16, MARK = 32, ASIAN = 64, NEWLINE = 128 };
enum { CONTINUES = 256, CUT = 512, WORD = LETTER | NUMBER | SPACE, N_CLASSIFIED = 0x323B0 };

typedef struct {
    const char *text;
    const uint16_t *class;  // one set per byte; CONTINUES: not its character's first byte; CUT: a word begins here
} Characters;

// Unicode 16.0 as runs of a class over all code points from 0 on: how many (if not 1), then c letter with a case,
// l another letter, n number, p punctuation, s white space, _ none of these. tests/make_unicode.py made and checks it.
static const char character_classes[] =
    "9_5s18_s3p_6p_4p10n2p3_2p26c3p_p_26cp_p7_s26_sp5_p2_lp6_2n_c2p_nlp3np23c_31c_195cl4c4l208cl27c18l4_12l14_5l7_l"
    "_l129_4cl_2c2_l3cpc6_cp3c_c_20c_83c_139c8_166c_38c2_l6p41l2p51_p_p2_p2_p9_27l4_4l2p20_2p_2p13_p_3p43l21_10n4p"
    "2l_99lpl15_2l7_2l10n3l2_l14p2_l_30l29_89l11_l14_10n33l9_2l_3pl5_22l4_l9_l3_l7_15p_25l5_p_11l5_24l_6l17_42l58_"
    "54l3_l18_l7_10l2_2p10np16l4_8l2_2l2_22l_7l_l3_4l3_l16_l13_2l_3l4_10n2l2_6n2_lp7_6l4_2l2_22l_7l_2l_2l_2l31_4l_l"
    "7_10n2_3l_p14_9l_3l_22l_7l_2l_5l3_l18_l15_2l4_10np8_l11_8l2_2l2_22l_7l_2l_5l3_l30_2l_3l4_10n_l6n11_l_6l3_3l_4l"
    "3_2l_l_2l3_2l3_3l3_12l22_l21_13n18_8l_3l_23l_16l3_l26_3l2_l2_2l4_10n7_p7n_l3_p8l_3l_23l_10l_5l3_l31_2l_2l4_10n"
    "_2l17_9l_3l_41l2_l16_l5_3l_7n3l4_19n_6l5_18l3_24l_9l_l2_7l31_10n4_p12_48l_2l12_7l8_p10n2p37_2l_l_5l_24l_l_10l_"
    "2l9_l2_5l_l9_10n2_4l32_l3_15p_p11_20n6_4p2_8l_36l24_p2_5l67_5p4_2p37_43l20_l10n6p6l4_4l3_l3_2l7_3l4_13l12_l_"
    "10n6_38c_l5_l2_43lp333l_4l2_7l_l_4l2_41l_4l2_33l_4l2_7l_l_4l2_15l_57l_4l2_67l5_9p20n3_16l16_86c2_6c2_p620l_p"
    "17ls26l2p3_75l3p3n8l7_18l13_19l3_2p9_18l14_13l_3l15_52l32_3pl3p_l3_10n6_10n6_11p5_10n6_89l7_5l2_34l_l5_70l10_"
    "31l37_2p10n30l2_5l11_44l4_26l6_11n37_23l7_2p53l43_10n6_10n6_7pl6p87_47l17_8l_2p10n7p28_3p3_30l13_2l10n44l22_4p"
    "36l23_5p10n3_3l10n36l2p11l5_43c2_3c8p11_p21_4l_6l_2l3_l5_44c63l13cl34c37l64_278c2_6c2_38c2_6c2_8c_c_c_c_31c2_"
    "53c_7c_c3_3c_7c3_4c2_6c4_13c5_3c_7c3_11s5_24p2s5_s20p_13p_12ps16_nl2_6n3_2pl10n3_2p_13l101_c4_c2_10c_c3_5c6_c_"
    "c_c_4c_6c4lc2_4c5_5c4_c_51n2c5n382_4p29_2p309_60n78_22n616_14p30n49_2p31_10p403_22p63_4p32_2p514_124c2l103c6_"
    "4c3_2c5_4pn2p38l_l5_l2_56l7_lp15_23l9_7l_7l_7l_7l_7l_7l_7l_7l33_47pl32p2_12p418_s3p_2ln10p2_12p_9n6_p5l2_3n2lp"
    "3_86l6_3lp90lp4l5_43l_94l3_4n10_32l48_16l32_10n30_8n_15n32_10n39_15n320_6592l64_22157l67_46l2p269l3p16l10n2l"
    "20_46cl4_p10_pl28c2l2_70l10n2_6p31_9l2_78cl23cl2_4c63l2_2l_l_8l21_16l_3l_4l_23l13_6n10_52l4p10_50l26_2p10n24_"
    "6l3plp2l_10n28l8_2p23l24_p29l7_47l14_13p_l10n4_2p5l_10l10n5l_41l23_3l_8l4_10n2_4p23l3_l3_50l_l3_2l2_5l2_l_l24_"
    "3l2p11l5_2p3l12_6l2_6l2_6l9_7l_7l_43l_14l6_80c35l8_p4_10n6_11172l12_23l4_49l8452_366l2_106l38_7c12_5c5_l_10l_"
    "13l_5l_l_2l_2l_108l33_363l2p16_64l2_54l40_12l20_10p22_35p_14p_p4_p_2p4_5l_135l4_3p_6p_4p10n2p3_2p26c3p_p_26cp_"
    "p_7p89l3_6l2_6l2_6l2_3l35_12l_26l_19l_2l_15l2_14l34_123l5_3p4_45n12_57n17_2n244_29l3_49l16_27n4_32l4n9_20ln8ln"
    "5_38l10_30l_p36l4_8lp5n42_80c78l2_10n6_36c4_36c4_40l8_52l11_p11l_15l_7l_2l_11l_15l_7l_2l3_52l12_311l9_22l10_8l"
    "24_6l_42l_9l69_6l2_l_44l_2l3_l2_23l_p8n23l2_7n31l8_9n48_19l_2l5_5n22l6n3_p26l5_p64_56l4_2n2l16n2_46nl15_4l_3l_"
    "29l10_9n7_9p7_29l2np29l3n32_8l_28l6_5n7p9_54l3_7p22l2_8n19l5_8n18l7_4p12_7n80_73l55_51c13_51c7_6n36l12_10n6_"
    "10n28l8_p23l218_31n_42l3_p2_2l16_3l59_29l10nl8_22l11_4n5p22_18l4_4p38_21l7n20_23l12_53l15_7p4_30n_2l2_l13_45l"
    "11_2p_4p14_25l7_10n9_36l15_10n4pl2_l8_35l_2pl12_48l14_4l4p4_p2_10nlpl3p_20n11_18l_25l12_6p_2l63_7l_l_4l_15l_"
    "10lp6_47l17_10n11_8l2_2l2_22l_7l_2l_5l3_l18_l12_5l30_10l_l2_l_38l_l25_l_l2p_2p39_53l18_4l5p10n2p_p_3l30_48l20_"
    "2lpl8_10n166_47l18_23p4l36_48l17_3pl11_10n6_13p19_43l13_lp6_10n6_20n28_27l21_12n3p_7l185_44l15_p100_64c19n12_"
    "8l2_l2_8l_2l_24l15_l_l2_3p9_10n70_8l2_39l16_lpl28_l10_40l7_l4_8p9_l11_46l16_3pl5p13_73l7_10p182_33lp14_10n6_9l"
    "_37l17_l5p10_29n3_2p30l112_7l_2l_38l21_l9_10n6_6l_2l_32l14_l7_10n310_19l4_2p9_l_13l_34l15_13p10n86_l15_21n42_p"
    "922l102_111n_5p11_196l2636_97l2p13_1072l17_6l25_3995l5_583l6841_30l18_10n1734_569l7_31l_10n4_2p79l_10n6_30l7_p"
    "10_48l7_5p4_4lp11_10n_7n_21l5_19l432_45l3p10n198_64l23n4p101_75l5_l66_13l64_2lpl28_6136l8_1238l41_10l8935_4l_"
    "7l_2l_291l15_l29_3l2_l14_4l8_396l2308_107l5_13l3_9l7_10l5_p4176_10n1478_20n12_20n108_25n135_85l_71l_2l2_l2_2l"
    "2_4l_12l_l_7l_65l_4l2_8l_7l_28l_4l_5l_l3_7l_340l2_25l_25l_31l_25l_31l_25l_31l_25l_31l_25l_8l2_50n647_5p1140_"
    "31l6_6l261_62l146_45l10_7l2_10n4_l321_30l18_44l4_10n470_28l4_10n214_30l2_l10n4_p480_7l_4l_2l_15l_197l2_9n48_"
    "68c7_l4_10n4_2p785_59n_3n_4n76_45n_15n194_4l_27l_2l_l2_l_10l_4l_l_l6_l4_l_l_l_3l_2l_l2_l_l_l_l_l_2l_l2_4l_7l_"
    "4l_4l_l_10l_17l5_3l_5l_17l580_13n2787_10n1030_42720l32_4154l6_222l2_5762l14_7473l15_622l2466_542l1506_4939l5_"
    "4192l";

// Sets that single models' expressions name range by range.
static const struct { uint32_t first, last, bits; } more_classes[] = {
    {'$', '$', SYMBOL},      {'+', '+', SYMBOL},      {'<', '>', SYMBOL},      {'^', '^', SYMBOL},
    {'|', '|', SYMBOL},      {'~', '~', SYMBOL},      {'!', '/', MARK},        {':', '~', MARK},
    {0xFF01, 0xFF0F, MARK},  {0xFF1A, 0xFF5E, MARK},  {0x2018, 0x201F, MARK},  {0x3000, 0x3002, MARK},
    {0x0800, 0x9FA5, ASIAN}, {0xAC00, 0xD7FF, ASIAN}, {'\n', '\n', NEWLINE},   {'\r', '\r', NEWLINE},
};

static bool unpack_classes(Tokenizer *t, Error *e) {
    if (!(t->class_of = allocate(N_CLASSIFIED, sizeof *t->class_of, e))) return false;
    static const uint8_t bits[128] = {
        ['c'] = LETTER | CASED, ['l'] = LETTER, ['n'] = NUMBER, ['p'] = SYMBOL, ['s'] = SPACE};
    size_t code = 0;
    for (const char *p = character_classes; *p; p++) {
        size_t count = 0;
        for (; *p <= '9'; p++) count = count * 10 + (size_t)(*p - '0');
        if (count == 0) count = 1;
        memset(t->class_of + code, bits[(unsigned char)*p], count);
        code += count;
    }
    for (size_t i = 0; i < sizeof more_classes / sizeof *more_classes; i++)
        for (code = more_classes[i].first; code <= more_classes[i].last; code++)
            t->class_of[code] |= (uint8_t)more_classes[i].bits;
    return true;
}

// The end of the run of bytes from `at` on whose bits under `mask` are `bits`.
static size_t run_end(const Characters *x, size_t at, size_t end, int mask, int bits) {
    while (at < end && (x->class[at] & mask) == bits) at++;
    return at;
}

static size_t next_character(const Characters *x, size_t at, size_t end) {
    return run_end(x, at + 1, end, CONTINUES, CONTINUES);
}

// 's|'t|'re|'ve|'m|'ll|'d        with any_case: (?i:...), and then U+017F, the long s, is an s too
static size_t contraction(const Characters *x, size_t at, size_t end, bool any_case) {
    if (x->text[at] != '\'' || at + 1 >= end) return at;
    char a = x->text[at + 1], b = at + 2 < end ? x->text[at + 2] : 0;
    if (any_case && a == '\xC5' && b == '\xBF') return at + 3;
    if (any_case && a >= 'A' && a <= 'Z') a = (char)(a + 32);
    if (any_case && b >= 'A' && b <= 'Z') b = (char)(b + 32);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 2;
    return (b == 'e' && (a == 'r' || a == 'v')) || (b == 'l' && a == 'l') ? at + 3 : at;
}

// \s+(?!\S)|\s+        a run of white space leaves its last character to the word that follows it
static size_t white_space(const Characters *x, size_t at, size_t end) {
    size_t stop = run_end(x, at, end, SPACE, SPACE), last = stop;
    if (stop == at || stop == end) return stop;
    do last--;
    while (x->class[last] & CONTINUES);
    return last > at ? last : stop;
}

// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
static size_t gpt2_rule(const Characters *x, size_t at, size_t end, int any_case) {
    size_t stop = contraction(x, at, end, any_case);
    if (stop > at) return stop;
    size_t word = x->text[at] == ' ' && at + 1 < end ? at + 1 : at;
    int bits = x->class[word] & WORD;
    return bits != SPACE ? run_end(x, word, end, WORD, bits) : white_space(x, at, end);
}

// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+
// |\s+(?!\S)|\s+
static size_t modern_rule(const Characters *x, size_t at, size_t end, int digits) {
    size_t stop = contraction(x, at, end, true), word = at;
    if (stop > at) return stop;
    if (!(x->class[at] & (LETTER | NUMBER | NEWLINE))) word = next_character(x, at, end);
    stop = run_end(x, word, end, LETTER, LETTER);
    if (stop > word) return stop;
    for (stop = at; digits > 0 && stop < end && x->class[stop] & NUMBER; digits--) stop = next_character(x, stop, end);
    if (stop > at) return stop;
    word = x->text[at] == ' ' ? at + 1 : at;
    stop = run_end(x, word, end, WORD, 0);
    if (stop > word) return run_end(x, stop, end, NEWLINE, NEWLINE);
    stop = run_end(x, at, end, SPACE, SPACE);
    while (stop > at && !(x->class[stop - 1] & NEWLINE)) stop--;
    return stop > at ? stop : white_space(x, at, end);
}

// [0-9]{n}
static size_t digits_rule(const Characters *x, size_t at, size_t end, int n) {
    for (size_t i = at; i < at + (size_t)n; i++)
        if (i >= end || x->text[i] < '0' || x->text[i] > '9') return at;
    return at + (size_t)n;
}

// One character of the set.
static size_t one_rule(const Characters *x, size_t at, size_t end, int set) {
    return x->class[at] & set ? next_character(x, at, end) : at;
}

// [set]+
static size_t run_rule(const Characters *x, size_t at, size_t end, int set) { return run_end(x, at, end, set, set); }

// \s?[set]+        the space may itself be one of the set
static size_t spaced_rule(const Characters *x, size_t at, size_t end, int set) {
    size_t word = one_rule(x, at, end, SPACE), stop = run_end(x, word, end, set, set);
    return stop > word ? stop : run_end(x, at, end, set, set);
}

// \s+$        only tried where a run of white space begins: tried inside of long runs it would take quadratic time
static size_t last_rule(const Characters *x, size_t at, size_t end, int set) {
    if (!(x->class[at] & CUT) && x->class[at - 1] & set) return at;
    return run_end(x, at, end, set, set) == end ? end : at;
}

// To add a row: write its expressions as rules, in the order of the model's tokenizer.json (what an expression leaves
// between its matches is a word too, and each is applied to the words that those before it made), and append the names
// that GGUF files use, with the flags that hold where a file is silent. Native files hold a row's number, so rows stay
// where they are. tests/make_token_goldens.py has the same table for its reference.
typedef struct {
    size_t (*match)(const Characters *x, size_t at, size_t end, int what);
    int what;
} Rule;

static const struct {
    const char *names;
    unsigned flags;
    Rule rules[7];  // up to one without a function
} pre_tokenizers[] = {
    {"gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4 mellum a.x-4.0 gigachat", 0, {{gpt2_rule, false}}},
    {"smollm starcoder refact command-r codeshell exaone minerva-7b mellum2", 0,
     {{one_rule, NUMBER}, {gpt2_rule, false}}},
    {"llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2", IGNORE_MERGES | ADD_BOS, {{modern_rule, 3}}},
    {"dbrx smaug-bpe", 0, {{modern_rule, 3}}},
    {"qwen2 deepseek-r1-qwen stablelm2 hunyuan megrez kormo solar-open grok-2", 0, {{modern_rule, 1}}},
    {"deepseek-llm", 0,
     {{one_rule, NEWLINE}, {spaced_rule, CASED}, {spaced_rule, MARK}, {last_rule, SPACE}, {run_rule, ASIAN},
      {run_rule, NUMBER}}},
    {"default", 0, {{run_rule, SYMBOL}, {gpt2_rule, false}, {run_rule, NUMBER}, {digits_rule, 3}}},
};
enum { N_PRE_TOKENIZERS = sizeof pre_tokenizers / sizeof *pre_tokenizers };

// Gives every byte the bits of its character; a byte that is not UTF-8 is a character of its own, of no class.
static void classify(const Tokenizer *t, const char *s, size_t n, uint16_t *class) {
    for (size_t i = 0; i < n;) {
        uint32_t code = 0;
        int length = read_character(s + i, n - i, &code);
        uint16_t bits = length > 0 && code < N_CLASSIFIED ? t->class_of[code] : 0;
        class[i++] = bits;
        for (int rest = length - 1; rest > 0; rest--) class[i++] = bits | CONTINUES;
    }
}

// Sets CUT at the first byte of every word.
static void cut_words(const Tokenizer *t, const char *s, size_t n, uint16_t *class) {
    Characters x = {s, class};
    classify(t, s, n, class);
    class[0] |= CUT;
    for (const Rule *rule = pre_tokenizers[t->pre].rules; rule->match; rule++) {
        for (size_t at = 0, end; at < n; at = end) {  // one word so far
            end = run_end(&x, at + 1, n, CUT, 0);
            for (size_t stop; at < end; at = stop) {  // one match, or what lies before the next match
                class[at] |= CUT;
                stop = rule->match(&x, at, end, rule->what);
                if (stop > at) continue;
                do stop = next_character(&x, stop, end);
                while (stop < end && rule->match(&x, stop, end, rule->what) == stop);
            }
        }
    }
}

/* ---- Encoding ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *text;
    size_t n_bytes;
    bool special;  // control tokens spelled here are meant; elsewhere the same spelling is plain text
} Span;

typedef struct {
    int *ids;
    size_t n, capacity;
    size_t n_dropped;  // bytes that the vocabulary has no token for, not even an unknown one: as in Hugging Face's BPE
} Tokens;

// A stretch of the text that is one piece already; neighbours get joined until no pair is left that may.
typedef struct {
    uint32_t start, length;  // length is 0 once it was joined to the one on its left
    int previous, next, id;  // -1: there is none; the character is no piece
} Symbol;

// A pair that may be joined. The smallest order goes first: the vocabulary's liking, then the leftmost.
typedef struct {
    uint64_t order;   // | rank, 32 bits | number of the left symbol, 32 bits |
    uint32_t length;  // of both together; if that has changed, the pair is no more
    int id;
} Pair;

typedef struct {
    const Tokenizer *t;
    Symbol *symbols;  // (capacity)
    Pair *heap;       // (2 * capacity)  every joining takes one pair out and puts at most two in: n - 1 + n - 1 at most
    size_t n_symbols, n_heap, capacity;
    uint16_t *scratch;  // BPE: classes; SPM: the text with its dummy prefix
    size_t first;       // where in out->ids this stretch of plain text begins
    Tokens *out;
    Error *e;
} Encoder;

static bool emit(Tokens *out, int id, Error *e) {
    if (out->n == out->capacity) {
        size_t capacity = out->capacity ? 2 * out->capacity : 64;
        int *ids = realloc(out->ids, times(capacity, sizeof *ids));
        if (!ids) return fail(e, NO_MEMORY, "no memory for %zu tokens", capacity);
        out->ids = ids;
        out->capacity = capacity;
    }
    out->ids[out->n++] = id;
    return true;
}

// The heap has four children to a node: half the depth of two, and four neighbours share a line of the cache.
static void push_pair(Encoder *c, Pair pair) {
    size_t i = c->n_heap++;
    for (; i > 0 && c->heap[(i - 1) / 4].order > pair.order; i = (i - 1) / 4) c->heap[i] = c->heap[(i - 1) / 4];
    c->heap[i] = pair;
}

static Pair pop_pair(Encoder *c) {
    Pair top = c->heap[0], last = c->heap[--c->n_heap];
    size_t i = 0;
    for (size_t first = 1; first < c->n_heap; first = 4 * i + 1) {
        size_t least = first;
        for (size_t child = first + 1; child < first + 4 && child < c->n_heap; child++)
            if (c->heap[child].order < c->heap[least].order) least = child;
        if (last.order <= c->heap[least].order) break;
        c->heap[i] = c->heap[least];
        i = least;
    }
    c->heap[i] = last;
    return top;
}

// Makes unsigned numbers of finite floats: the larger the score, the smaller the number, and -0 is 0.
static uint32_t score_order(float score) {
    uint32_t bits;
    score += 0.0f;
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7FFFFFFF;
}

// Puts the symbol and the one on its right into the heap, if the vocabulary lets them be joined.
static void offer_pair(Encoder *c, const char *s, int left) {
    const Tokenizer *t = c->t;
    const Symbol *a = &c->symbols[left];
    if (a->next < 0) return;
    const Symbol *b = &c->symbols[a->next];
    Pair pair = {.length = a->length + b->length, .id = -1};
    uint32_t rank = 0;
    if (t->kind == SPM) {
        pair.id = find_piece(t, s + a->start, pair.length);
        if (pair.id >= 0) rank = score_order(t->score[pair.id]);
    } else {
        size_t steps = 0;
        int merge = *find_merge(t, (uint32_t)a->id, (uint32_t)b->id, &steps);
        if (merge >= 0) pair.id = (int)t->merge[merge][2];
        rank = (uint32_t)merge;
    }
    if (pair.id < 0) return;
    pair.order = (uint64_t)rank << 32 | (uint32_t)left;
    push_pair(c, pair);
}

static void join_symbols(Encoder *c, const char *s) {
    c->n_heap = 0;
    for (size_t i = 0; i + 1 < c->n_symbols; i++) offer_pair(c, s, (int)i);
    while (c->n_heap > 0) {
        Pair pair = pop_pair(c);
        int left = (int)(uint32_t)pair.order;
        Symbol *a = &c->symbols[left], *b = a->next < 0 ? NULL : &c->symbols[a->next];
        if (a->length == 0 || !b || a->length + b->length != pair.length) continue;
        a->length = pair.length;
        a->id = pair.id;
        a->next = b->next;
        b->length = 0;
        if (a->next >= 0) c->symbols[a->next].previous = left;
        if (a->previous >= 0) offer_pair(c, s, a->previous);
        offer_pair(c, s, left);
    }
}

// A character that is no piece: its bytes' tokens, where there are some; else one unknown token for all such characters
// in a row (as SentencePiece does).
static bool emit_unknown(Encoder *c, const char *s, size_t n) {
    const Tokenizer *t = c->t;
    for (size_t i = 0; i < n; i++) {
        int id = t->byte_id[(unsigned char)s[i]];
        if (id < 0) id = t->unk;
        if (id < 0) c->out->n_dropped++;
        else if (id == t->unk && c->out->n > c->first && c->out->ids[c->out->n - 1] == id) continue;
        else if (!emit(c->out, id, c->e)) return false;
    }
    return true;
}

static bool reserve_symbols(Encoder *c, size_t n) {
    if (n <= c->capacity) return true;
    free(c->symbols);
    free(c->heap);
    c->symbols = allocate(n, sizeof *c->symbols, c->e);
    c->heap = allocate(2 * n, sizeof *c->heap, c->e);
    c->capacity = c->symbols && c->heap ? n : 0;
    return c->capacity > 0;
}

// Tokens of text that nothing outside of it can join with.
static bool encode_word(Encoder *c, const char *s, size_t n) {
    const Tokenizer *t = c->t;
    int whole = t->ignore_merges ? find_piece(t, s, n) : -1;
    if (whole >= 0) return emit(c->out, whole, c->e);
    if (!reserve_symbols(c, n)) return false;
    c->n_symbols = 0;
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t code;
        int of_character = t->kind == SPM ? read_character(s + i, n - i, &code) : 1;
        length = of_character > 0 ? (size_t)of_character : 1;
        int id = t->kind == SPM ? find_piece(t, s + i, length) : t->byte_id[(unsigned char)s[i]];
        int at = (int)c->n_symbols;
        if (id < 0 && t->kind == BPE) c->out->n_dropped++;  // its neighbours become neighbours of each other
        else c->symbols[c->n_symbols++] = (Symbol){(uint32_t)i, (uint32_t)length, at - 1, at + 1, id};
    }
    if (c->n_symbols == 0) return true;
    c->symbols[c->n_symbols - 1].next = -1;
    join_symbols(c, s);
    for (int i = 0; i >= 0; i = c->symbols[i].next) {
        const Symbol *a = &c->symbols[i];
        if (a->id >= 0 ? !emit(c->out, a->id, c->e) : !emit_unknown(c, s + a->start, a->length)) return false;
    }
    return true;
}

// Tokens of text that holds no user-defined piece.
static bool encode_words(Encoder *c, const char *s, size_t n) {
    if (n == 0) return true;
    bool bpe = c->t->kind == BPE, spaces_cut = c->t->space_leads;
    if (bpe) cut_words(c->t, s, n, c->scratch);
    for (size_t at = 0, end; at < n; at = end) {
        end = at + 1;
        while (end < n && !(bpe && c->scratch[end] & CUT) && !(spaces_cut && s[end] == ' ' && s[end - 1] != ' ')) end++;
        if (!encode_word(c, s + at, end - at)) return false;
    }
    return true;
}

// Copies text as SentencePiece sees it, U+2581 a space. Returns the length.
static size_t normalise(const char *s, size_t n, char *to) {
    size_t length = 0;
    for (size_t i = 0; i < n; i++) {
        bool bar = n - i >= 3 && memcmp(s + i, "\xE2\x96\x81", 3) == 0;
        to[length++] = bar ? ' ' : s[i];
        if (bar) i += 2;
    }
    return length;
}

// Takes the tokens of one type out of the text: the leftmost, then longest, wherever they begin from `at` to `end`.
// What lies before each, from *begin on, is encoded by `rest`; *begin is left behind the last.
static bool encode_around(Encoder *c, int type, const char *s, size_t *begin, size_t at, size_t end,
                          bool (*rest)(Encoder *c, const char *s, size_t n)) {
    for (size_t length; at < end; at += length) {
        int id = longest_special(c->t, type, s + at, end - at, &length);
        if (id < 0) continue;
        if (!rest(c, s + *begin, at - *begin) || !emit(c->out, id, c->e)) return false;
        *begin = at + length;
    }
    return true;
}

// Tokens of what stands between two control tokens: what sentencepiece or Hugging Face would be given as one text. The
// leftmost, then longest user-defined piece is always itself, whatever the words.
static bool encode_plain(Encoder *c, const char *s, size_t n) {
    if (n == 0) return true;
    c->first = c->out->n;
    if (c->t->kind == SPM) {
        char *normal = (char *)c->scratch;
        if (c->t->dummy_prefix) *normal++ = ' ';
        n = normalise(s, n, normal) + c->t->dummy_prefix;
        s = (const char *)c->scratch;
    }
    size_t begin = 0;
    return encode_around(c, PIECE_USER_DEFINED, s, &begin, 0, n, encode_words) && encode_words(c, s + begin, n - begin);
}

// Tokens of the joined text of the spans. A control token must lie wholly in special spans.
static bool encode_spans(Encoder *c, const char *text, size_t n, const Span *spans, int n_spans) {
    size_t begin = 0, at = 0, end = 0;
    for (int i = 0; i < n_spans; i++) {
        end += spans[i].n_bytes;
        if (i + 1 < n_spans && spans[i + 1].special == spans[i].special) continue;
        if (spans[i].special && !encode_around(c, PIECE_CONTROL, text, &begin, at, end, encode_plain)) return false;
        at = end;
    }
    return encode_plain(c, text + begin, n - begin);
}

// Appends the tokens of the spans' text, joined to one text. The model's begin and end tokens are the caller's affair.
static bool encode(const Tokenizer *t, const Span *spans, int n_spans, Tokens *out, Error *e) {
    size_t n = 0;
    for (int i = 0; i < n_spans; i++) n = plus(n, spans[i].n_bytes);
    if (n > MAX_TEXT) return fail(e, NO_ROOM, "the text has %zu bytes; at most %d can be encoded at once", n, MAX_TEXT);
    char *text = allocate(n + 1, 1, e);
    Encoder c = {.t = t, .out = out, .e = e, .scratch = allocate(n + 1, sizeof *c.scratch, e)};
    bool ok = text && c.scratch;
    for (size_t i = 0, at = 0; ok && i < (size_t)n_spans; at += spans[i++].n_bytes)
        if (spans[i].n_bytes) memcpy(text + at, spans[i].text, spans[i].n_bytes);
    ok = ok && encode_spans(&c, text, n, spans, n_spans);
    free(text);
    free(c.scratch);
    free(c.symbols);
    free(c.heap);
    return ok;
}

// What a token adds to a text after the token `previous` (-1: nothing came before). With dummy_prefix, encoding put a
// space before the text and after each control token; here it goes. So decoding gives back every byte that was encoded,
// as far as the vocabulary has all bytes (but U+2581 has become a space in SPM).
static const char *decode(const Tokenizer *t, int previous, int id, size_t *n_bytes) {
    const char *s = piece(t, id, n_bytes);
    if (*n_bytes == 0) return s;
    if (t->type[id] == PIECE_CONTROL) *n_bytes = 0;
    if (t->type[id] == PIECE_UNKNOWN) {
        *n_bytes = 3;
        return "\xEF\xBF\xBD";
    }
    bool starts = previous < 0 || previous >= t->n_tokens || t->type[previous] == PIECE_CONTROL;
    if (!starts || !t->dummy_prefix || *n_bytes == 0 || s[0] != ' ') return s;
    --*n_bytes;
    return s + 1;
}

// Whether an answer ends here.
static bool is_end_token(const Tokenizer *t, int id) {
    for (int i = 0; i < t->n_end; i++)
        if (t->end_id[i] == (uint32_t)id) return true;
    return false;
}

/* ---- Opening a section ------------------------------------------------------------------------------------------- */

static void close_tokenizer(Tokenizer *t) {
    free(t->piece_slots);
    free(t->merge_slots);
    free(t->class_of);
    *t = (Tokenizer){0};
}

static bool check_header(const TokenizerHeader *h, Error *e) {
    if ((h->kind != SPM && h->kind != BPE) || h->pre >= N_PRE_TOKENIZERS || h->flags > ALL_TOKENIZER_FLAGS)
        return refuse(e, "vocabulary of kind %u, pre-tokenizer %u, flags %u", h->kind, h->pre, h->flags);
    if (h->n_tokens == 0 || h->n_tokens > MAX_TOKENS)
        return refuse(e, "vocabulary of %u tokens, expected 1 to %d", h->n_tokens, MAX_TOKENS);
    if (h->n_merges > (h->kind == BPE ? MAX_MERGES : 0) || h->n_end > h->n_tokens)
        return refuse(e, "vocabulary with %u merges and %u end tokens", h->n_merges, h->n_end);
    const int32_t ids[] = {h->bos, h->eos, h->unk};
    for (int i = 0; i < 3; i++)
        if (ids[i] < -1 || ids[i] >= (int32_t)h->n_tokens)
            return refuse(e, "special token %d in a vocabulary of %u", ids[i], h->n_tokens);
    if ((h->flags & ADD_BOS && h->bos < 0) || (h->flags & ADD_EOS && h->eos < 0))
        return refuse(e, "the vocabulary adds a begin or end token that it does not have");
    return true;
}

static bool check_pieces(const Tokenizer *t, uint32_t text_bytes, Error *e) {
    if (t->text_start[0] != 0 || t->text_start[t->n_tokens] != text_bytes)
        return refuse(e, "the pieces do not fill the vocabulary's text of %u bytes", text_bytes);
    for (int id = 0; id < t->n_tokens; id++) {
        uint32_t start = t->text_start[id], end = t->text_start[id + 1];
        int type = t->type[id];
        if (start > end || end > text_bytes) return refuse(e, "token %d: it ends before it begins", id);
        if (type < PIECE_NORMAL || type > PIECE_BYTE) return refuse(e, "token %d has type %d", id, type);
        uint32_t limit = type == PIECE_BYTE ? 1 : SPECIAL_TYPES >> type & 1 ? MAX_SPECIAL_PIECE : MAX_PIECE;
        if (end - start > limit || (type == PIECE_BYTE && start == end))
            return refuse(e, "token %d of type %d has %u bytes, at most %u", id, type, end - start, limit);
        if (!isfinite(t->score[id])) return refuse(e, "token %d: its score is not a finite number", id);
    }
    for (int i = 0; i < t->n_end; i++)
        if (t->end_id[i] >= (uint32_t)t->n_tokens) return refuse(e, "no end token %u", t->end_id[i]);
    return true;
}

// A merge's result must be the bytes of its parts: else what is decoded would not be what was encoded.
static bool check_merges(const Tokenizer *t, Error *e) {
    for (int rank = 0; rank < t->n_merges; rank++) {
        const uint32_t *merge = t->merge[rank];
        const char *s[3];
        size_t n[3];
        for (int i = 0; i < 3; i++) s[i] = piece(t, (int)merge[i], &n[i]);  // no bytes where there is no such token
        if (!n[0] || !n[1] || n[0] + n[1] != n[2] || memcmp(s[2], s[0], n[0]) || memcmp(s[2] + n[0], s[1], n[1]))
            return refuse(e, "merge %d: token %u is not %u and %u", rank, merge[2], merge[0], merge[1]);
    }
    return true;
}

// Opens a section in place; it must be aligned to 4 bytes and stay as long as the tokenizer. On failure too,
// close_tokenizer() frees what there is.
static bool open_tokenizer(const unsigned char *section, size_t n_bytes, Tokenizer *t, Error *e) {
    Cursor c = {.at = section, .left = n_bytes};
    TokenizerHeader h;
    take_into(&c, &h, sizeof h);
    if (c.bad) return refuse(e, "the vocabulary is cut short");
    if (!check_header(&h, e)) return false;
    size_t n = h.n_tokens;
    *t = (Tokenizer){.kind = (int)h.kind, .pre = (int)h.pre, .bos = h.bos, .eos = h.eos, .unk = h.unk,
                     .n_tokens = (int)h.n_tokens, .n_merges = (int)h.n_merges, .n_end = (int)h.n_end,
                     .add_bos = h.flags & ADD_BOS, .add_eos = h.flags & ADD_EOS,
                     .dummy_prefix = h.kind == SPM && h.flags & DUMMY_PREFIX,
                     .ignore_merges = h.kind == BPE && h.flags & IGNORE_MERGES};
    t->score = (const void *)take(&c, times(n, sizeof *t->score));
    t->text_start = (const void *)take(&c, times(n + 1, sizeof *t->text_start));
    t->merge = (const void *)take(&c, times(h.n_merges, sizeof *t->merge));
    t->end_id = (const void *)take(&c, times(h.n_end, sizeof *t->end_id));
    t->type = take(&c, n);
    t->text = (const void *)take(&c, h.text_bytes);
    if (c.bad || c.left > 3 || n_bytes % 4)
        return refuse(e, "the vocabulary has %zu bytes, its header asks for %s", n_bytes, c.bad ? "more" : "fewer");
    while (c.left > 0)
        if (*take(&c, 1)) return refuse(e, "the vocabulary's last bytes are not zero");
    return check_pieces(t, h.text_bytes, e) && check_merges(t, e) && index_pieces(t, e) && index_merges(t, e) &&
           (t->kind == SPM || unpack_classes(t, e));
}

/* ---- Making a section -------------------------------------------------------------------------------------------- */

// Bytes of a file, with no NUL behind them; `at` is NULL where there is no such text.
typedef struct { const char *at; size_t n; } Text;

// A vocabulary as containers have it. Arrays may be unaligned; -1 is an id, or an answer, that the file does not give.
typedef struct {
    int kind;
    Text pre;                     // the pre-tokenizer's name; BPE only
    size_t n_tokens, n_merges;
    bool llama2c;                 // the pieces are those of a tokenizer.bin, which have their scores with them
    Cursor pieces;                // else strings as in GGUF: u64 length, bytes; byte tokens are spelled <0xAB>
    const unsigned char *scores;  // f32 (n_tokens), or NULL: all 0
    const unsigned char *types;   // i32 (n_tokens), or NULL: all normal
    Cursor merges;                // strings: left part, space, right part
    int bos, eos, eot, eom, unk;
    int add_bos, add_eos, dummy_prefix;
} Vocabulary;

enum { SCORES, STARTS, MERGES, END_IDS, PIECE_TYPES, PIECE_TEXT, N_PARTS };  // of a section, in their order

// <0xAB> -> its byte, or -1
static int spelled_byte(const char *s, size_t n) {
    static const char digits[] = "0123456789ABCDEF0123456789abcdef";
    if (n != 6 || memcmp(s, "<0x", 3) || s[5] != '>') return -1;
    const char *high = memchr(digits, s[3], 32), *low = memchr(digits, s[4], 32);
    return high && low ? (int)((high - digits) % 16 * 16 + (low - digits) % 16) : -1;
}

// Undoes GPT-2's spelling of bytes by printable characters: 33-126, 161-172 and 174-255 are themselves, the others in
// their order U+0100, U+0101 ... Returns the length, or 0 where a character is none of these.
static size_t unspell_bytes(const char *s, size_t n, char *to) {
    size_t length = 0;
    for (size_t i = 0; i < n;) {
        uint32_t code = 0;
        int n_character = read_character(s + i, n - i, &code);
        if (n_character <= 0 || code < 33 || (code > 126 && code < 161) || code == 173 || code > 323) return 0;
        uint32_t other = code - 256;  // the 256 others: 0-32, 127-160, 173
        to[length++] = (char)(code < 256 ? code : other < 33 ? other : other < 67 ? other - 33 + 127 : 173);
        i += (size_t)n_character;
    }
    return length;
}

// Writes a piece as it stands in texts, and returns its length, at most n; *type may change.
static size_t unspell_piece(int kind, Text s, int32_t *type, char *to) {
    if (*type == PIECE_BYTE) {
        int byte = spelled_byte(s.at, s.n);
        to[0] = (char)byte;
        return byte >= 0;
    }
    if (kind == SPM && *type != PIECE_CONTROL && *type != PIECE_UNKNOWN) return normalise(s.at, s.n, to);
    if (kind == BPE && *type == PIECE_NORMAL) {
        size_t length = unspell_bytes(s.at, s.n, to);
        if (length > 0) return length;
        *type = PIECE_UNUSED;  // not in that spelling: no text can become it
    }
    memcpy(to, s.at, s.n);
    return s.n;
}

// A string as in GGUF: 64 bits of length, then bytes.
static Text take_string(Cursor *c) {
    uint64_t n = take_u64(c);
    if (n > c->left) c->bad = true;
    return (Text){(const char *)take(c, (size_t)n), (size_t)n};
}

// A piece of llama2.c's tokenizer.bin: | f32 score | i32 length | bytes |. Spaces are spaces; ids 0, 1, 2 are <unk>,
// <s>, </s> (its exporter puts newlines round the last two), 3 to 258 the bytes, as "<0xAB>" or as U+00AB.
static Text take_llama2c_piece(Cursor *c, size_t id, float *score, int32_t *type, char *spelled) {
    take_into(c, score, sizeof *score);
    size_t n = take_u32(c);
    const char *s = (const char *)take(c, n);
    *type = id == 0 ? PIECE_UNKNOWN : id < 3 ? PIECE_CONTROL : id < 259 ? PIECE_BYTE : PIECE_NORMAL;
    if (s && *type == PIECE_CONTROL && n > 2 && s[0] == '\n' && s[n - 1] == '\n') return (Text){s + 1, n - 2};
    if (!s || *type != PIECE_BYTE) return (Text){s, n};
    return (Text){spelled, (size_t)snprintf(spelled, 8, "<0x%02X>", (unsigned)id - 3)};
}

static bool pack_pieces(const Vocabulary *v, Buffer *part, Error *e) {
    Cursor c = v->pieces;
    for (size_t id = 0; id < v->n_tokens; id++) {
        char bytes[MAX_PIECE], spelled[8];
        int32_t type = PIECE_NORMAL;
        float score = 0;
        Text s = v->llama2c ? take_llama2c_piece(&c, id, &score, &type, spelled) : take_string(&c);
        if (!s.at) return refuse(e, "the vocabulary ends in token %zu of %zu", id, v->n_tokens);
        if (s.n > MAX_PIECE) return refuse(e, "token %zu has more than %d bytes", id, MAX_PIECE);
        if (v->types) memcpy(&type, v->types + 4 * id, 4);
        if (v->scores) memcpy(&score, v->scores + 4 * id, 4);
        if (type == 0) type = PIECE_NORMAL;  // GGUF's "undefined"
        if (type < PIECE_NORMAL || type > PIECE_BYTE) return refuse(e, "token %zu has type %d", id, type);
        size_t n = unspell_piece(v->kind, s, &type, bytes);
        if (type == PIECE_BYTE && n == 0) return refuse(e, "byte token %zu is not one of <0x00> to <0xFF>", id);
        uint8_t packed_type = (uint8_t)type;
        uint32_t start = (uint32_t)part[PIECE_TEXT].n;
        if (!append(&part[STARTS], &start, 4, e) || !append(&part[SCORES], &score, 4, e) ||
            !append(&part[PIECE_TYPES], &packed_type, 1, e) || (n && !append(&part[PIECE_TEXT], bytes, n, e)))
            return false;
    }
    uint32_t end = (uint32_t)part[PIECE_TEXT].n;
    if (end < part[PIECE_TEXT].n) return refuse(e, "the vocabulary's text has more than 2^32 bytes");
    return append(&part[STARTS], &end, 4, e);
}

// Merges by ids. One whose parts or whole are not in the vocabulary can never apply and is left out, as is one whose
// spelling is wrong: nothing is the length of that, and no piece.
static bool pack_merges(const Vocabulary *v, const Tokenizer *t, Buffer *merges, Error *e) {
    Cursor c = v->merges;
    for (size_t rank = 0; t->kind == BPE && rank < v->n_merges; rank++) {
        char bytes[2 * MAX_PIECE];
        Text s = take_string(&c);
        if (!s.at) return refuse(e, "the vocabulary ends in merge %zu of %zu", rank, v->n_merges);
        const char *space = s.n > 2 && s.n < sizeof bytes ? memchr(s.at + 1, ' ', s.n - 1) : NULL;
        if (!space) continue;
        size_t n_left = unspell_bytes(s.at, (size_t)(space - s.at), bytes);
        size_t n_right = unspell_bytes(space + 1, (size_t)(s.at + s.n - space - 1), bytes + n_left);
        int ids[3] = {find_piece(t, bytes, n_left), find_piece(t, bytes + n_left, n_right),
                      find_piece(t, bytes, n_left + n_right)};
        if (ids[0] >= 0 && ids[1] >= 0 && ids[2] >= 0 && !append(merges, ids, sizeof ids, e)) return false;
    }
    return true;
}

// The tokens that end an answer: those that the file names, and special ones whose name says so. <|end|> does not where
// <|return|> exists: there it only ends one of several messages.
static bool pack_end_ids(const Vocabulary *v, const Tokenizer *t, int eos, Buffer *end_ids, Error *e) {
    static const char *const names[] = {
        "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<|return|>", "<end_of_turn>",
        "<eos>", "</s>", "<EOT>", "<end_of_utterance>", "<\uFF5Cend\u2581of\u2581sentence\uFF5C>", "<|end|>",
    };
    enum { N_NAMES = sizeof names / sizeof *names };
    int ids[N_NAMES + 3] = {eos, v->eot, v->eom};
    for (size_t i = 0; i < N_NAMES; i++) ids[i + 3] = lookup(t, names[i], strlen(names[i]), SPECIAL_TYPES);
    if (lookup(t, "<|return|>", 10, SPECIAL_TYPES) >= 0) ids[N_NAMES + 2] = -1;
    for (size_t i = 0; i < N_NAMES + 3; i++) {
        bool new = ids[i] >= 0;
        for (size_t j = 0; j < i; j++) new = new && ids[j] != ids[i];
        if (new && !append(end_ids, &ids[i], sizeof ids[i], e)) return false;
    }
    return true;
}

// *pre = the row of pre_tokenizers[] with this name (which may be none).
static bool choose_pre_tokenizer(Text name, uint32_t *pre, Error *e) {
    char known[160] = "";
    for (*pre = 0; *pre < N_PRE_TOKENIZERS; ++*pre) {
        const char *names = pre_tokenizers[*pre].names;
        size_t length = strcspn(names, " "), end = strlen(known);
        snprintf(known + end, sizeof known - end, "%s%.*s", end ? ", " : "", (int)length, names);
        for (; *names; names += length + strspn(names + length, " ")) {
            length = strcspn(names, " ");
            if (name.at && length == name.n && memcmp(names, name.at, name.n) == 0) return true;
        }
    }
    return refuse(e, "pre-tokenizer \"%.*s\" is not known; choose one with --pre NAME: %s",
                (int)(name.n < 40 ? name.n : 40), name.at ? name.at : "", known);
}

// Ids and flags: what the file says; where it is silent, what SentencePiece's or the pre-tokenizer's models have.
static void pack_header(const Vocabulary *v, const Tokenizer *t, TokenizerHeader *h) {
    bool spm = v->kind == SPM;
    h->bos = v->bos < 0 && spm ? lookup(t, "<s>", 3, 1 << PIECE_CONTROL) : v->bos;
    h->eos = v->eos < 0 && spm ? lookup(t, "</s>", 4, 1 << PIECE_CONTROL) : v->eos;
    h->unk = v->unk;
    for (int id = 0; spm && h->unk < 0 && id < t->n_tokens; id++)
        if (t->type[id] == PIECE_UNKNOWN) h->unk = id;
    unsigned usual = spm ? ADD_BOS | DUMMY_PREFIX : pre_tokenizers[h->pre].flags;
    h->flags = usual & IGNORE_MERGES;
    if (h->bos >= 0 && (v->add_bos < 0 ? usual & ADD_BOS : (unsigned)v->add_bos)) h->flags |= ADD_BOS;
    if (h->eos >= 0 && v->add_eos > 0) h->flags |= ADD_EOS;
    if (spm && v->dummy_prefix) h->flags |= DUMMY_PREFIX;
}

// Appends the section of a vocabulary.
static bool pack_vocabulary(const Vocabulary *v, Buffer *section, Error *e) {
    if (v->n_tokens == 0 || v->n_tokens > MAX_TOKENS || v->n_merges > MAX_MERGES)
        return refuse(e, "vocabulary of %zu tokens and %zu merges, expected 1 to %d and at most %d", v->n_tokens,
                      v->n_merges, MAX_TOKENS, MAX_MERGES);
    TokenizerHeader h = {.kind = (uint32_t)v->kind, .n_tokens = (uint32_t)v->n_tokens};
    if (v->kind == BPE && !choose_pre_tokenizer(v->pre, &h.pre, e)) return false;
    Buffer part[N_PARTS] = {{0}};
    bool ok = pack_pieces(v, part, e);
    Tokenizer t = {.kind = v->kind, .n_tokens = (int)v->n_tokens, .type = part[PIECE_TYPES].bytes,
                   .text_start = (const void *)part[STARTS].bytes,
                   .text = part[PIECE_TEXT].n ? (const void *)part[PIECE_TEXT].bytes : ""};
    ok = ok && index_pieces(&t, e);
    if (ok) pack_header(v, &t, &h);
    ok = ok && pack_merges(v, &t, &part[MERGES], e) && pack_end_ids(v, &t, h.eos, &part[END_IDS], e);
    h.n_merges = (uint32_t)(part[MERGES].n / 12);
    h.n_end = (uint32_t)(part[END_IDS].n / 4);
    h.text_bytes = (uint32_t)part[PIECE_TEXT].n;
    ok = ok && append(section, &h, sizeof h, e);
    for (size_t i = 0; i < N_PARTS; i++) {
        if (part[i].n) ok = ok && append(section, part[i].bytes, part[i].n, e);
        free(part[i].bytes);
    }
    close_tokenizer(&t);
    return ok && append(section, NULL, round_up(section->n, 4) - section->n, e);
}

// llama2.c's tokenizer.bin: | i32 longest piece | pieces |.
static bool read_llama2c_tokenizer(Cursor c, Buffer *section, Error *e) {
    take_u32(&c);  // nothing here needs the longest piece
    Vocabulary v = {.kind = SPM, .llama2c = true, .pieces = c, .bos = 1, .eos = 2, .eom = -1, .unk = 0,
                    .eot = 1,  // llama2.c stops at a begin token, too: its stories follow each other
                    .add_bos = 1, .add_eos = 0, .dummy_prefix = 1};
    for (; c.left > 0 && v.n_tokens <= MAX_TOKENS; v.n_tokens++) {
        take_u32(&c);
        take(&c, take_u32(&c));
        if (c.bad) return refuse(e, "not a tokenizer.bin, or cut short: token %zu does not end", v.n_tokens);
    }
    if (v.n_tokens < 3) return refuse(e, "not a tokenizer.bin: %zu tokens, expected at least 3", v.n_tokens);
    return pack_vocabulary(&v, section, e);
}

#endif
