/* ==== 2. Text to tokens ==============================================================================================
   A model reads numbers. Its vocabulary lists tens of thousands of pieces of text; a token is a piece's index. To
   encode a text, start with its smallest pieces and join neighbours again and again, always the best pair. There are
   two kinds of vocabulary. SPM (SentencePiece) starts with characters and joins the pair whose result has the best
   score. BPE cuts the text into words, starts with bytes and joins the pair that is the earliest in a list of merges.

   Vocabularies of all files are brought into one form, the section. It is little-endian; native files carry it:

       | header, 40 bytes | f32 score[n_tokens] | u32 text_start[n_tokens + 1] | u32 merge[n_merges][3] |
       | u32 end_id[n_end] | i32 around[2][4], if a flag says so | u8 type[n_tokens] | u8 takes[n_tokens], likewise |
       | text, text_bytes | zeros up to a multiple of 4 |

   Piece i is the bytes text_start[i] .. text_start[i + 1] of text, as a user writes them: SPM's U+2581 is a space, a
   byte token is its byte, and BPE's printable spelling of bytes is undone. merge[rank] = left, right, their result. */

enum { SPM = 1, BPE = 2 };
enum { PIECE_NORMAL = 1, PIECE_UNKNOWN, PIECE_CONTROL, PIECE_USER_DEFINED, PIECE_UNUSED, PIECE_BYTE };  // as in GGUF
enum { TEXT_TYPES = 1 << PIECE_NORMAL | 1 << PIECE_USER_DEFINED };  // what plain text can become
enum { SPECIAL_TYPES = 1 << PIECE_CONTROL | 1 << PIECE_USER_DEFINED };
enum { ADD_BOS = 1, ADD_EOS = 2, DUMMY_PREFIX = 4, IGNORE_MERGES = 8, COMPOSE = 16 };
// SPM as tokenizer.json may have it: the prefix only where the text begins, or only where there is no space yet; and
// user-defined pieces found before any prefix is put.
enum { PREFIX_FIRST = 32, PREFIX_UNLESS_SPACE = 64, ADDED_FIRST = 128 };
enum { PREFIX_LAST = 256 };                                   // the prefix is put after the text, not before it
enum { TAKES_WHITE = 512 };                                   // some special pieces take the white space beside them:
enum { TAKES_BEFORE = 1, TAKES_AFTER = 2, TAKES_BOTH = 3 };   // of what a piece takes
enum { AROUND = 1024, N_FLAGS = 11, MAX_AROUND = 4 };         // more than one token before a text, or after it
enum { SPM_FLAGS = ADD_BOS | ADD_EOS | DUMMY_PREFIX | PREFIX_FIRST | PREFIX_UNLESS_SPACE | ADDED_FIRST | PREFIX_LAST |
                   TAKES_WHITE | AROUND };
enum { BPE_FLAGS = ADD_BOS | ADD_EOS | IGNORE_MERGES | COMPOSE | TAKES_WHITE | AROUND };
enum { MAX_TOKENS = 1 << 20, MAX_MERGES = 3 << 19, MAX_PIECE = 4096, MAX_SPECIAL_PIECE = 256 };
enum { MAX_VOCABULARY = 1 << 24, MAX_TEXT = 1 << 30 };  // bytes of all pieces of a GGUF, and of a prompt

// How characters compose: an entry of a hash table.
typedef struct {
    uint64_t key;       // a character's code, or | first part, 32 bits | second part, 32 bits |; 0 is empty
    uint32_t parts[2];  // the character's parts (0 and 0: none); of a pair, the character that it composes to
    uint32_t class;     // the combining class; 0: not a mark
} Composition;

typedef struct {
    uint32_t kind, pre, flags;   // SPM or BPE; a row of pre_tokenizers[]; a set of the flags above
    int32_t bos, eos, unk;       // ids, or -1
    int32_t n_end, n_tokens, n_merges;
    uint32_t text_bytes;         // up to here this is the section's header
    const float *score;          // (n_tokens)        the arrays up to text lie in the section
    const uint32_t *text_start;  // (n_tokens + 1)
    const uint32_t (*merge)[3];  // (n_merges, 3)
    const uint32_t *end_id;      // (n_end)           each of these tokens ends an answer
    const int32_t (*around)[MAX_AROUND];  // (2, MAX_AROUND) or NULL: in place of bos and of eos, up to the first -1
    const uint8_t *type;         // (n_tokens)
    const uint8_t *takes;        // (n_tokens) or NULL: TAKES_BEFORE, TAKES_AFTER
    const char *text;
    int *piece_slots;            // (piece_mask + 1)  hash table: bytes -> id; -1 is empty
    int *merge_slots;            // (merge_mask + 1)  hash table: left and right -> rank; -1 is empty
    size_t piece_mask, merge_mask;
    uint16_t *sets_of;           // (N_CLASSIFIED + 1)  bits: the sets that a character is in; BPE only, as the next two
    uint16_t set_bits[128];      // a set's bit in sets_of, by the letter of the set
    Composition *compositions;   // (N_COMPOSITIONS)  hash table: characters and pairs
    int byte_id[256];            // the token of a single byte, or -1
    uint8_t *specials;           // (1 << 16)  a filter, by the upper bits of a hash. Bit 0: of a special piece's
                                 // prefix; bit `type`: of a whole special piece
    bool space_leads;            // SPM: a space is only at the beginning of pieces, so words are encoded one by one
} Tokenizer;

enum { HEADER_BYTES = offsetof(Tokenizer, text_bytes) + sizeof(uint32_t) };
_Static_assert(HEADER_BYTES == 40, "the header as drawn");

// A token's bytes; of a control token, its name.
static const char *piece(const Tokenizer *t, int id, size_t *n_bytes) {
    bool known = id >= 0 && id < t->n_tokens;
    *n_bytes = known ? t->text_start[id + 1] - t->text_start[id] : 0;
    return known ? t->text + t->text_start[id] : "";
}

// The character at s. Returns its length in bytes, 0 if the n > 0 bytes end inside it, -1 if it is not valid UTF-8
// (overlong forms, surrogates and codes above U+10FFFF are not).
static int read_character(const char *s, size_t n, uint32_t *code) {
    const unsigned char *u = (const unsigned char *)s;
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

// How many of the n bytes can be printed: all but a last character that further bytes may complete.
static size_t whole_characters(const char *s, size_t n) {
    for (size_t tail = 1; tail <= 3 && tail <= n; tail++) {
        uint32_t code;
        unsigned char c = (unsigned char)s[n - tail];
        if (c >= 0xC0) return read_character(s + n - tail, tail, &code) == 0 ? n - tail : n;
        if (c < 0x80) return n;
    }
    return n;
}

// Undoes GPT-2's spelling of bytes by printable characters: bytes 33-126, 161-172 and 174-255 are the characters with
// these codes, the other 68 in their order are U+0100, U+0101 ... Returns the length, or 0 if a character is none.
static size_t unspell_bytes(const char *s, size_t n, char *to) {
    size_t length = 0;
    for (size_t i = 0; i < n;) {
        uint32_t code = 0;
        int n_character = read_character(s + i, n - i, &code);
        if (n_character <= 0 || code < 33 || (code > 126 && code < 161) || code == 173 || code > 323) return 0;
        uint32_t other = code - 256;  // the others: 0-32, 127-160, 173
        to[length++] = (char)(code < 256 ? code : other < 33 ? other : other < 67 ? other - 33 + 127 : 173);
        i += (size_t)n_character;
    }
    return length;
}

/* ---- Looking up -------------------------------------------------------------------------------------------------- */

// The hash of n + 1 bytes from the hash of the first n: one pass over a text hashes all its prefixes. The multiplier,
// 2^64 / the golden ratio, need not be secret: vocabularies that are made to collide are refused.
static uint64_t hash_byte(uint64_t hash, char byte) { return (hash ^ (unsigned char)byte) * 0x9E3779B97F4A7C15u; }

static uint64_t hash_bytes(const char *s, size_t n) {
    uint64_t hash = 1;
    for (size_t i = 0; i < n; i++) hash = hash_byte(hash, s[i]);
    return hash;
}

// How many slots a lookup may visit. In tables that are at most a quarter full the longest run of a million entries has
// about 25. A vocabulary that needs more is refused: special pieces are looked up at every byte of a text.
enum { MAX_PROBES = 48 };

// The slot where a lookup begins. Mixing all bits spreads the pairs of merges, whose ids form a grid.
static size_t first_slot(uint64_t hash) { return (size_t)((hash ^ hash >> 32) * 0xD6E8FEB86659FD93u >> 32); }

// The slot of the piece with these bytes and one of these types, or an empty slot for it; NULL: there is neither.
static int *piece_slot(const Tokenizer *t, const char *s, size_t n, uint64_t hash, unsigned types) {
    for (size_t slot = first_slot(hash), i = 0; i < MAX_PROBES; slot++, i++) {
        int *id = &t->piece_slots[slot & t->piece_mask];
        size_t n_bytes;
        if (*id < 0) return id;
        const char *bytes = piece(t, *id, &n_bytes);
        if (n_bytes == n && types >> t->type[*id] & 1 && memcmp(bytes, s, n) == 0) return id;
    }
    return NULL;
}

// The number in the slot; -1: none.
static int at_slot(const int *slot) { return slot ? *slot : -1; }

// The lowest id of a piece with these bytes whose type is in `types`, or -1.
static int lookup(const Tokenizer *t, const char *s, size_t n, unsigned types) {
    return at_slot(piece_slot(t, s, n, hash_bytes(s, n), types));
}

// The longest piece of this type that is a prefix of the n bytes at s; or -1, and a length of 1.
static int longest_special(const Tokenizer *t, int type, const char *s, size_t n, size_t *n_bytes) {
    int found = -1;
    *n_bytes = 1;
    uint64_t hash = 1;
    for (size_t length = 1; length <= n && length <= MAX_SPECIAL_PIECE; length++) {
        hash = hash_byte(hash, s[length - 1]);
        if (!t->specials[hash >> 48]) break;
        int id = t->specials[hash >> 48] >> type & 1 ? at_slot(piece_slot(t, s, length, hash, 1u << type)) : -1;
        if (id < 0) continue;
        found = id;
        *n_bytes = length;
    }
    return found;
}

// The slot of the pair's merge, or an empty slot for it; NULL: there is neither.
static int *merge_slot(const Tokenizer *t, uint32_t left, uint32_t right) {
    uint64_t hash = ((uint64_t)left << 32 | right) * 0x9E3779B97F4A7C15u;
    for (size_t slot = first_slot(hash), i = 0; i < MAX_PROBES; slot++, i++) {
        int *rank = &t->merge_slots[slot & t->merge_mask];
        if (*rank < 0 || (t->merge[*rank][0] == left && t->merge[*rank][1] == right)) return rank;
    }
    return NULL;
}

// A table for n entries, empty (-1): a power of two of slots, of which at most a quarter will be used.
static int *make_table(size_t n, size_t *mask, Error *e) {
    size_t slots = 16;
    while (slots < 4 * n) slots *= 2;
    int *table = allocate(slots, sizeof *table, e);
    if (table) memset(table, 0xFF, slots * sizeof *table);
    *mask = slots - 1;
    return table;
}

// Fills the table for lookup(), and those for single bytes and special pieces; looks where spaces are. Of pieces with
// equal bytes and equal type only the first has an entry.
static bool index_pieces(Tokenizer *t, Error *e) {
    t->piece_slots = make_table((size_t)t->n_tokens, &t->piece_mask, e);
    t->specials = allocate(1 << 16, 1, e);
    if (!t->piece_slots || !t->specials) return false;
    memset(t->byte_id, 0xFF, sizeof t->byte_id);
    t->space_leads = t->kind == SPM;
    for (int id = 0; id < t->n_tokens; id++) {
        size_t n;
        const char *s = piece(t, id, &n);
        int type = t->type[id];
        bool is_text = TEXT_TYPES >> type & 1, is_special = SPECIAL_TYPES >> type & 1;
        if (n == 1 && type == (t->kind == SPM ? PIECE_BYTE : PIECE_NORMAL) && t->byte_id[(unsigned char)s[0]] < 0)
            t->byte_id[(unsigned char)s[0]] = id;
        if (n == 0 || type == PIECE_BYTE) continue;
        uint64_t hash = 1;
        for (size_t i = 0; i < n; i++) {
            hash = hash_byte(hash, s[i]);
            if (is_special) t->specials[hash >> 48] |= (uint8_t)(1 | (i + 1 == n) << type);
            if (is_text && i > 0 && s[i] == ' ' && s[i - 1] != ' ') t->space_leads = false;
        }
        int *slot = piece_slot(t, s, n, hash, 1u << type);
        if (!slot) return refuse(e, "the vocabulary's pieces are made to collide");
        if (*slot < 0) *slot = id;
    }
    return true;
}

// Checks the merges and fills their table. A merge's result must be the bytes of its parts, or else decoding would not
// give back what was encoded. Of two merges of the same pair the earlier counts.
static bool index_merges(Tokenizer *t, Error *e) {
    t->merge_slots = make_table((size_t)t->n_merges, &t->merge_mask, e);
    if (!t->merge_slots) return false;
    for (int rank = 0; rank < t->n_merges; rank++) {
        const uint32_t *merge = t->merge[rank];
        const char *s[3];
        size_t n[3];
        for (int i = 0; i < 3; i++) s[i] = piece(t, (int)merge[i], &n[i]);  // no bytes if there is no such token
        if (!n[0] || !n[1] || n[0] + n[1] != n[2] || memcmp(s[2], s[0], n[0]) || memcmp(s[2] + n[0], s[1], n[1]))
            return refuse(e, "merge %d: token %u is not %u and %u", rank, merge[2], merge[0], merge[1]);
        int *slot = merge_slot(t, merge[0], merge[1]);
        if (!slot) return refuse(e, "the vocabulary's merges are made to collide");
        if (*slot < 0) *slot = rank;
    }
    return true;
}

/* ---- Composing characters (BPE) ------------------------------------------------------------------------------------
   A letter can be spelled in more than one way: as U+00E9, or as e and U+0301. Some vocabularies were trained on texts
   in NFC, the composed form: each character is decomposed into its parts, marks are sorted by their combining classes,
   and then what can compose is composed (Unicode Standard Annex 15). Meanwhile a character is a number, | class, 8 bits
   | code, 24 bits |; a byte that is not UTF-8 has a code above Unicode's. */

enum { N_COMPOSITIONS = 1 << 13, NOT_UTF8 = 0x110000 };

// The entry with this key, or the empty one for it.
static Composition *find_composition(const Tokenizer *t, uint64_t key) {
    size_t slot = (size_t)(key * 0x9E3779B97F4A7C15u >> 40);
    while (t->compositions[slot % N_COMPOSITIONS].key && t->compositions[slot % N_COMPOSITIONS].key != key) slot++;
    return &t->compositions[slot % N_COMPOSITIONS];
}

// Writes a character's parts, decomposed in turn. Returns how many: at most twice as many as it has bytes.
static size_t decompose(const Tokenizer *t, uint32_t code, uint32_t *to) {
    const Composition *whole = find_composition(t, code);
    *to = whole->class << 24 | code;
    if (!whole->parts[0]) return 1;
    size_t n = decompose(t, whole->parts[0], to);
    return whole->parts[1] ? n + decompose(t, whole->parts[1], to + n) : n;
}

// Sorts marks by class; within a class they keep their order. A counting sort: a text may consist of marks.
static void sort_marks(uint32_t *marks, size_t n, uint32_t *sorted) {
    size_t end_of[257] = {0}, i;
    if (n < 2) return;
    for (i = 0; i < n; i++) end_of[(marks[i] >> 24) + 1]++;
    for (i = 1; i < 257; i++) end_of[i] += end_of[i - 1];
    for (i = 0; i < n; i++) sorted[end_of[marks[i] >> 24]++] = marks[i];
    memcpy(marks, sorted, n * sizeof *marks);
}

// The character that two others compose to, or 0. Hangul has 19 x 21 syllables of two letters, each with 27 of three.
static uint32_t composed(const Tokenizer *t, uint32_t first, uint32_t second) {
    uint32_t syllable = first - 0xAC00, last = second - 0x11A7;
    if (first - 0x1100 < 19 && second - 0x1161 < 21) return 0xAC00 + ((first - 0x1100) * 21 + second - 0x1161) * 28;
    if (syllable < 11172 && syllable % 28 == 0 && last - 1 < 27) return first + last;
    return find_composition(t, (uint64_t)first << 32 | second)->parts[0];
}

// Composes in place. Returns how many characters are left. Two compose if only marks of lower classes are between them.
static size_t compose(const Tokenizer *t, uint32_t *characters, size_t n) {
    size_t kept = 0, base = SIZE_MAX;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = characters[i], class = c >> 24, whole = 0;
        if (base != SIZE_MAX && (kept == base + 1 || characters[kept - 1] >> 24 < class))
            whole = composed(t, characters[base], c & 0xFFFFFF);
        if (whole) characters[base] = whole;
        if (!whole && class == 0) base = kept;
        if (!whole) characters[kept++] = c;
    }
    return kept;
}

static size_t write_character(uint32_t code, char *to) {
    int length = code < 0x80 || code >= NOT_UTF8 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    for (int i = length - 1; i > 0; i--, code >>= 6) to[i] = (char)(0x80 | (code & 0x3F));
    to[0] = (char)(length == 1 ? code : 0xFF00u >> length | code);
    return (size_t)length;
}

// Sets *s and *n to the text in NFC, which is in *to and at most 3 times as long. Text up to U+02FF is in NFC already.
static bool compose_text(const Tokenizer *t, const char **s, size_t *n, char **to, Error *e) {
    size_t n_characters = 0, n_bytes = 0, i = 0, end;
    while (i < *n && (unsigned char)(*s)[i] < 0xCC) i++;
    if (i == *n) return true;
    free(*to);
    *to = allocate(*n, 3, e);
    uint32_t code, *characters = allocate(*n, 4 * sizeof *characters, e);  // the second half is scratch for sorting
    if (!*to || !characters) return free(characters), false;
    for (i = 0; i < *n;) {
        int length = read_character(*s + i, *n - i, &code);
        if (length <= 0) code = NOT_UTF8 + (unsigned char)(*s)[i];
        n_characters += decompose(t, code, characters + n_characters);
        i += length > 0 ? (size_t)length : 1;
    }
    for (i = 0; i < n_characters; i = end + 1) {
        for (end = i; end < n_characters && characters[end] >> 24; end++) {}
        sort_marks(characters + i, end - i, characters + 2 * *n);
    }
    n_characters = compose(t, characters, n_characters);
    for (i = 0; i < n_characters; i++) n_bytes += write_character(characters[i] & 0xFFFFFF, *to + n_bytes);
    free(characters);
    *s = *to;
    *n = n_bytes;
    return n_bytes <= MAX_TEXT || fail(e, NO_ROOM, "the text has %zu bytes when composed", n_bytes);
}

/* ---- Cutting text into words (BPE) ----------------------------------------------------------------------------------
   Regular expressions cut the text into words, as they did when the model was trained, and joining never crosses a cut.
   Here a regular expression is a rule. A letter is one character of a set; ? * + | are as usual, and 3 is {1,3}.
   ' is (?:'s|'t|'re|'ve|'m|'ll|'d), " is (?i:'), ! is (?!\S), $ is the end of the word. ^ is (?<!\s): a run of white
   space is tried from its beginning only, so time is linear. Every byte has a bit for each set of its character.

   unicode_data is a list of numbers (no digits: 1), each with a letter after it. First come the kinds of all characters
   from U+0000 on (U+E0000 follows U+33FFF), each with the number of characters: r line ends, b the space, s other white
   space, d n numbers, m marks, A a U u L l o letters, h q p punctuation, y t z symbols, _ the rest; k is the combining
   class of the marks from here on. Then come decompositions: c the character (default: the next one), f its first part
   (default: as before), + its second part, - its second part if the two do not compose again, = its only part.
   tests/make_unicode.py makes and checks the list. Kinds are Unicode 16.0's, as in the regular expressions of Hugging
   Face's tokenizers; decompositions are 9.0's, as in their NFC. */

static const char unicode_data[] =
    "9_sr2sr18_b3qy6qy3qh10d2q3y2q26A3qyqt26aqyqy6_s26_sp5zp2zopz_4z2nzL2pznop3np23Uz7U24Lz8LULULULULULULULULULULUL"
    "ULULULULULULULULULULULULULULULULU2LULULULULULULULU2LULULULULULULULULULULULULULULULULULULULULULULUL2ULULU3L2ULU"
    "L2UL3U2L4UL2UL3U3L2UL2ULULUL2ULU2LUL2UL3ULUL2U2LoU3L4o2UL2UL2ULULULULULULULULU2LULULULULULULULULU2L2ULUL3ULULU"
    "LULULULULULULULULULULULULULULULULULULULULULULULULULULU7L2UL2U2LUL4ULULULULU69Lo27L18o4z12o14z5o7zozo17z230k21m"
    "232km220k4m232km216km220k5m202k2m220k4m202k2m220k11mk5m220k4m230k8m240km230km220k3m230k3m220k2m0km230k3m220k4m"
    "230km232km220k2m230km233km234k2m233km234k2m233km230k13mULULozUL2_o3LpU4_2zUp3U_U_2UL17U_9U35LU2L3U3LULULULULUL"
    "ULULULULULULU5LULzUL2U2L51U48LULULULULULULULULULULULULULULULULULz5m0k2mULULULULULULULULULULULULULULULULULULULU"
    "LULULULULULULUL2ULULULULULULU2LULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULU"
    "LULULULULULULULUL_38U2_o6p41l2p2_3z_220km230k4m220km230k3m222km220km230k6m220k6m230k2m220km230k2m222km228km"
    "230km10km11km12km13km14km15km16km17km18km19k2m20km21km22kmp23kmp24km25kmp230km220kmp18km8_27o4_4o2p17_3z2pz2p"
    "2z230k8m30km31km32kmp_3p43o27km28km29km30km31km32km33km34km230k2m220k2m230k5m220km230k2m220km10n4p2o35km99opo"
    "230k7m_z4m220km230km2o2mz220km230k2m220km2o10n3o2zo14p2_o36km30o230km220km230k2m220km230k2m220k3m230km220k2m"
    "230km220km230k3m220km230km220km230km220km230km220km230k2m2_89o0k11mo14_10n33o230k7m220km230km2oz3po2_0km2z22o"
    "230k4mo9mo3mo5m2_15p_25o220k3m2_p_11o5_24oz6o8_0k9m42o10m230k14m_220km230k2m220km230k2m220km230k3m220k3m27km"
    "28km29km230k3m220km230k2m220k2m230k5m0k4m54o2m7kmo0k15m9km0k2mo230km220km230k2m0k3m10o2m2p10np16o3m_8o2_2o2_"
    "22o_7o_o3_4o2_7kmo0k7m2_2m2_2m9kmo8_0km4_2o_3o2m2_10n2o2z6n2zopm2_3m_6o4_2o2_22o_7o_2o_2o_2o2_7km_0k5m4_2m2_2m"
    "9km3_0km7_4o_o7_10n2m3omp10_3m_9o_3o_22o_7o_2o_5o2_7kmo0k8m_3m_2m9km2_o15_2o0k2m2_10npz7_o6m_3m_8o2_2o2_22o_7o"
    "_2o_5o2_7kmo0k7m2_2m2_2m9km7_0k3m4_2o_3o2m2_10nzo6n10_mo_6o3_3o_4o3_2o_o_2o3_2o3_3o3_12o4_5m3_3m_3m9km2_o6_0km"
    "14_13n8z5_5m8o_3o_23o_16o2_mo7m_3m_3m9km7_84km91km_3o2_o2_2o0k2m2_10n7_p7nzo3mp8o_3o_23o_10o_5o2_7kmo0k7m_3m_"
    "3m9km7_0k2m6_2o_2o2m2_10n_2om12_4m9o_3o_41o2mo7m_3m_3m9kmoz4_3o0km7n3o2m2_19nz6o_3m_18o3_24o_9o_o2_7o3_9km4_0k"
    "6m_m_8m6_10n2_2mp12_48om2o4m103k2m9km4_z7o0km107k4m0k3mp10n2p37_2o_o_5o_24o_o_10om2o4m118k2m0k3mo2_5o_o_122k4m"
    "0k3m_10n2_4o32_o3z15pzp3z220k2m6z20nzmzmz216km4p0k2m8o_36o4_129km130km0km132km0k5m130k4m0k2m130km0km230k2m9kmp"
    "230k2m5o0k11m_36m_8z220km6z_2z5p4z2p37_43o0k12m7km0km9k2m0k4mo10n6p6o4m4o3mo3m2o7m3o4m13o11m220kmo0km10n4m2z"
    "38U_u5_u2_43lpo3l329o_4o2_7o_o_4o2_41o_4o2_33o_4o2_7o_o_4o2_15o_57o_4o2_67o2_230k3m9p20n3_16o10z6_86U2_6L2_p"
    "620ozp17os26o2p3_75o3p3n8o7_18o0k2m9km0km9_19o2m9km2p9_18o0k2m12_13o_3o_2m12_52o30m9km0km3po3pzo230km2_10n6_"
    "10n6_11p0k3m_m10n6_89o7_5o2m34o228kmo5_70o10_31o_0k12m4_9m222km230km220km4_z3_2p10n30o2_5o11_44o4_26o6_11n3_"
    "34z23o230km220km0k3m2_2p53o10m_9km0k20m230k8m2_220km10n6_10n6_7po6p2_230k5m220k6m230k2m220km0k17m49_5m47o7km0k"
    "15m9km8o_2p10n7p10z230km220km230k7m9z3p0k3m30o9m9k2m0k2m2o10n44o7km0k11m9k2m8_4p36o0k19m7km3_5p10n3_3o10n36o2p"
    "9lul5_43U2_3U8p8_230k3mpkm220k5m230k2m220k4m230km0kmk7m4o220km6o230km2o0km230k2mo5_44L63o13Lo34L37o2m220km230k"
    "7m220km230k2m234km214km220km202km230k37m0k5m230km233km220km230km220kmULULULULULULULULULULULULULULULULULULULULU"
    "LULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULU9L"
    "ULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULU9L8U6L2_6U2_"
    "8L8U8L8U6L2_6U2_8L_U_U_U_U8L8U14L2_8L8U8L8U8L8U5L_2L5UzL3z3L_2L5U3z4L2_2L4U_3z8L5U3z2_3L_2L5U2z_11s5_24p2s5_s"
    "20pz13pz12ps16_no2_6n3z2po10n3z2p_13o3_33z15_230k2mk2m230k4mk3m230k2m0k4m230km0k3mk2m230km220km230kmk2m220k4m"
    "230km15_2zU4zU2zL3U2L3ULzU3z5U6zUzUzUz4UzL4UL4oL2z2L2U5zU4L4zLz51nUL5n2z4_376z4p29z2p255z22_11z21_60n78z22n"
    "616z14p30n49z2p31z10p403z22p63z4p32z2p374z2_32z_105z48U48LUL3U2LULULUL4ULU2LU6L2o3ULULULULULULULULULULULULULUL"
    "ULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULULU2L6zULUL3mUL5_4pn2p38l_l5_l2_56o7_op14_"
    "9km23o9_7o_7o_7o_7o_7o_7o_7o_7o_230k32m47po32p2z12p34_26z_89z12_214z26_16zs3pz2on10p2z12pz9n218km228km232km"
    "222km224k2mp5o2z3n2op2z_86o2_8k2m2z3op90op4o5_43o_94o_2z4n10z32o38z9_z16o31z_10n30z8nz15n32z10n39z15n320z6592o"
    "64z22157o3_55z9_46o2p269o3p16o10n2o20_ULULULULULULULULULULULULULULULULULULULULULULULo230km0k3mp230k10mpoULULUL"
    "ULULULULULULULULULULUL2o2m70o10n2m6p8_23z9o2zULULULULULULU3LULULULULULULULULULULULULULULULULULULULULULULULULUL"
    "ULULULULULULo8LULUL2ULULULULULo2zULULoulu3lulululululululululul5ul5ulululululululul4ulul2ul2_ul_l_lulululu21_"
    "3oul3ol7o0km3o9km4o0km23o5m4zm3_6n4z6_52o4p8_2m50o16m9km0km8_2p10n6_230k18m6o3pop2o0km10n28o5m220k3m2p23o0k12m"
    "9km11_p29o3_0k4m47o7km0k12m9km13p_o10n4_2p5o0km10o10n5o_41o14m9_3om8o2m2_10n2_4p23o3zo3m50o230kmo2m220km2o230k"
    "2m5o2momo24_3o2p11o0k5m2p3om9km10_6o2_6o2_6o9_7o_7o_43lz4o9lo2z4_80L35o0k8mpm9km2_10n6_11172o12_23o4_49o8452_"
    "366o2_106o38_7L12_5L5_o26km10oz13o_5o_o_2o_2o_108o17z16_363o2p16z64o2_54o7_z32_12o4z0k16m10p6_230k7m220k7m230k"
    "2m35p_14pzp3z_pz2p4_5o_135o4_3pz6pz4p10n2p3z2p26U3pzpz26Lpzpz7p89o3_6o2_6o2_6o2_3o3_7z_7z13_2z2_12o_26o_19o_2o"
    "_15o2_14o34_123o5_3p4_45n3_9z57n17z2n3z_13z3_z47_45z220km130_29o3_49o15_m27n4_32o4n9_20on8on5_38o230k5m5_30o_p"
    "36o4_8op5n42_40U40L78o2_10n6_36U4_36L4_40o8_52o11_p11u_15u_7u_2u_11l_15l_7l_2l3_52o12_311o9_22o10_8o24_6o_42o_"
    "9o69_6o2_o_44o_2o3_o2_23o_p8n23o2z7n31o8_9n48_19o_2o5_5n22o6n3_p26o5_p64_56o4_2n2o16n2_46no0k3m_2m5_m220km0km"
    "230km4o_3o_29o2_mkm220km4_9km9n7_9p7_29o2np29o3n32_8oz28o230km220km4_5n7p9_54o3_7p22o2_8n19o5_8n18o7_4p12_7n"
    "80_73o55_51U13_51L7_6n36o0k4m8_10n6_10n6o22u3_5mpo22l8_2z208_31n_42o_2mp2_2o16_3o55_4m29o10no8_22o11m4n5p22_"
    "18o4m4p38_21o7n20_23o9_3m53o14m9km7p4_30n0km2o2mo9_9km0k3m45o9m9km7km2p_4p0km13_25o7_10n6_230k3m36o0k12m9k2m_"
    "10n4po0k2mo8_35o7km2po9_0k3m48o13m9km4o4p0km7km0k2mp2m10nopo3p_20n11_18o_25o9m9km7km0km6pm2om62_7o_o_4o_15o_"
    "10op6_47o10m7km9km5_10n6_0k4m_8o2_2o2_22o_7o_2o_5o_m7kmo0k7m2_2m2_2m9km2_o6_0km5_5o2m2_230k7m3_5m11_10o_o2_o_"
    "38o_o0k9m_m2_m_4m_5momo2p_2p8_2m29_53o13m9km0k3m7km4o5p10n2p_p0km3o30_48o18m9km7km2opo8_10n166_47o0k7m2_7m9km"
    "7km23p4o0k2m34_48o15m9km0km3po11_10n6_13p19_43o11m9km7kmop6_10n6_20n28_27o2_0k14m9km4_12n3pz7o185_44o0k15mp"
    "100_32U32L19n12_8o2_o2_8o_2o_24o6m_2m2_4momo2m3p9_10n70_8o2_39o7m2_7mopom27_o10m40o7mo4m8pm8_o11m46o16m3po5p"
    "13_73o7_10p182_33op14_10n6_9o_37o8m_7m9kmo5p10_29n3_2p30o2_0k22m_14m73_7o_2o_38o6m3_m_2m_7mom8_10n6_6o_2o_32o"
    "5m_2m_5mo7_10n310_19o4m2p7_2mom13o_34o7m3_5m13p10nm85_o15_21n29z13_p922o102_111n_5p11_196o2636_97o2p13_1072o"
    "16_m6o15m10_3995o5_583o6841_30o18m10n1734_569o7_31o_10n4_2p79o_10n6_30o2_k5mp10_48o230k7m5p4z4opz10_10n_7n_21o"
    "5_19o432_45o3p10n198_32u32l23n4p101_75o4_0kmo55m7_4m13o64_2opom11_2m14_6136o8_1238o41_10o8935_4o_7o_2o_291o15_"
    "o29_3o2_o14_4o8_396o2308_107o5_13o3_9o7_10o2_zmkmp3936_240z10n6_436z76_0k46m2_23m9_116z60_246z10_39z2_60z216k"
    "2mk3m3z226km216k5m8_220k8m2z230k5m220k2m30z230k4m61z21_66z3mz122_20n12_20n12_87z9_25n135_26u26l26u7l_18l26u26l"
    "u_2u2_u2_2u2_4u_8u4l_l_7l_11l26u26l2u_4u2_8u_7u_26l2u_4u_5u_u3_7u_26l26u26l26u26l26u26l26u26l26u26l26u28l2_25u"
    "z25lz6l25uz25lz6l25uz25lz6l25uz25lz6l25uz25lz6lul2_50n512z0k55m4z50m8zm14zm2z5p15_5m_15m1104_10lo20l6_6l213_"
    "230k7m_17m2_7m_2m_5m5_62o33_0km112_45o3_7m7o2_10n4_oz320_30om17_44o4m10n5_z464_28o4m10n214_30o2mo10n4_p480_7o_"
    "4o_2o_15o_197o2_9n220k7m41_34U34L230k6m7kmo4_10n4_2p785_59nz3nz4n76_45nz15n194_4o_27o_2o_o2_o_10o_4o_o_o6_o4_o"
    "_o_o_3o_2o_o2_o_o_o_o_o_2o_o2_4o_7o_4o_4o_o_10o_17o5_3o_5o_17o52_2z270_44z4_100z12_15z2_15z_15z_37z10_13n161z"
    "56_29z13_44z4_9z7_2z14_6z154_984z4_17z3_13z3_119z4_95z6_12z4_z15_12z4_56z8_10z6_40z8_30z2_12z4_2z62_340z12_14z"
    "2_13z3_10z5_56z7_15z2_11z6_9z7_147z_92z10n1030_42720o32_4154o6_222o2_5762o14_7473o15_622o2466_542o1506_4939o5_"
    "4192o7504_0k240m192c65f768+769+770+771+776+778+199c67f807+69f768+769+770+776+73f768+769+770+776+209c78f771+79f"
    "768+769+770+771+776+217c85f768+769+770+776+89f769+224c97f768+769+770+771+776+778+231c99f807+101f768+769+770+"
    "776+105f768+769+770+776+241c110f771+111f768+769+770+771+776+249c117f768+769+770+776+121f769+255c776+65f772+97f"
    "772+65f774+97f774+65f808+97f808+67f769+99f769+67f770+99f770+67f775+99f775+67f780+99f780+68f780+100f780+274c69f"
    "772+101f772+69f774+101f774+69f775+101f775+69f808+101f808+69f780+101f780+71f770+103f770+71f774+103f774+71f775+"
    "103f775+71f807+103f807+72f770+104f770+296c73f771+105f771+73f772+105f772+73f774+105f774+73f808+105f808+73f775+"
    "308c74f770+106f770+75f807+107f807+313c76f769+108f769+76f807+108f807+76f780+108f780+323c78f769+110f769+78f807+"
    "110f807+78f780+110f780+332c79f772+111f772+79f774+111f774+79f779+111f779+340c82f769+114f769+82f807+114f807+82f"
    "780+114f780+83f769+115f769+83f770+115f770+83f807+115f807+83f780+115f780+84f807+116f807+84f780+116f780+360c85f"
    "771+117f771+85f772+117f772+85f774+117f774+85f778+117f778+85f779+117f779+85f808+117f808+87f770+119f770+89f770+"
    "121f770+89f776+90f769+122f769+90f775+122f775+90f780+122f780+416c79f795+111f795+431c85f795+117f795+461c65f780+"
    "97f780+73f780+105f780+79f780+111f780+85f780+117f780+220f772+252f772+220f769+252f769+220f780+252f780+220f768+"
    "252f768+478c196f772+228f772+550f772+551f772+198f772+230f772+486c71f780+103f780+75f780+107f780+79f808+111f808+"
    "490f772+491f772+439f780+658f780+106f780+500c71f769+103f769+504c78f768+110f768+197f769+229f769+198f769+230f769+"
    "216f769+248f769+65f783+97f783+65f785+97f785+69f783+101f783+69f785+101f785+73f783+105f783+73f785+105f785+79f"
    "783+111f783+79f785+111f785+82f783+114f783+82f785+114f785+85f783+117f783+85f785+117f785+83f806+115f806+84f806+"
    "116f806+542c72f780+104f780+550c65f775+97f775+69f807+101f807+214f772+246f772+213f772+245f772+79f775+111f775+"
    "558f772+559f772+89f772+121f772+832c768=769=835c787=776f769-884c697=894c59=901c168f769+913f769+183=917f769+919f"
    "769+921f769+908c927f769+910c933f769+937f769+970f769+938c921f776+933f776+945f769+949f769+951f769+953f769+971f"
    "769+970c953f776+965f776+959f769+965f769+969f769+979c978f769+776+1024c1045f768+776+1027c1043f769+1031c1030f776+"
    "1036c1050f769+1048f768+1059f774+1049c1048f774+1081c1080f774+1104c1077f768+776+1107c1075f769+1111c1110f776+"
    "1116c1082f769+1080f768+1091f774+1142c1140f783+1141f783+1217c1046f774+1078f774+1232c1040f774+1072f774+1040f776+"
    "1072f776+1238c1045f774+1077f774+1242c1240f776+1241f776+1046f776+1078f776+1047f776+1079f776+1250c1048f772+1080f"
    "772+1048f776+1080f776+1054f776+1086f776+1258c1256f776+1257f776+1069f776+1101f776+1059f772+1091f772+1059f776+"
    "1091f776+1059f779+1091f779+1063f776+1095f776+1272c1067f776+1099f776+1570c1575f1619+1620+1608f1620+1575f1621+"
    "1610f1620+1728c1749f1620+1730c1729f1620+1747c1746f1620+2345c2344f2364+2353c2352f2364+2356c2355f2364+2392c2325f"
    "2364-2326f2364-2327f2364-2332f2364-2337f2364-2338f2364-2347f2364-2351f2364-2507c2503f2494+2519+2524c2465f2492-"
    "2466f2492-2527c2479f2492-2611c2610f2620-2614c2616f2620-2649c2582f2620-2583f2620-2588f2620-2654c2603f2620-2888c"
    "2887f2902+2891c2878+2903+2908c2849f2876-2850f2876-2964c2962f3031+3018c3014f3006+3015f3006+3014f3031+3144c3142f"
    "3158+3264c3263f3285+3271c3270f3285+3286+3274c3266+3274f3285+3402c3398f3390+3399f3390+3398f3415+3546c3545f3530+"
    "3548c3535+3548f3530+3545f3551+3907c3906f4023-3917c3916f4023-3922c3921f4023-3927c3926f4023-3932c3931f4023-3945c"
    "3904f4021-3955c3953f3954-3957c3956-4018f3968-3960c4019f3968-3969c3953f3968-3987c3986f4023-3997c3996f4023-4002c"
    "4001f4023-4007c4006f4023-4012c4011f4023-4025c3984f4021-4134c4133f4142+6918c6917f6965+6920c6919f6965+6922c6921f"
    "6965+6924c6923f6965+6926c6925f6965+6930c6929f6965+6971c6970f6965+6973c6972f6965+6976c6974f6965+6975f6965+6979c"
    "6978f6965+7680c65f805+97f805+66f775+98f775+66f803+98f803+66f817+98f817+199f769+231f769+68f775+100f775+68f803+"
    "100f803+68f817+100f817+68f807+100f807+68f813+100f813+274f768+275f768+274f769+275f769+69f813+101f813+69f816+"
    "101f816+552f774+553f774+70f775+102f775+71f772+103f772+72f775+104f775+72f803+104f803+72f776+104f776+72f807+104f"
    "807+72f814+104f814+73f816+105f816+207f769+239f769+75f769+107f769+75f803+107f803+75f817+107f817+76f803+108f803+"
    "7734f772+7735f772+76f817+108f817+76f813+108f813+77f769+109f769+77f775+109f775+77f803+109f803+78f775+110f775+"
    "78f803+110f803+78f817+110f817+78f813+110f813+213f769+245f769+213f776+245f776+332f768+333f768+332f769+333f769+"
    "80f769+112f769+80f775+112f775+82f775+114f775+82f803+114f803+7770f772+7771f772+82f817+114f817+83f775+115f775+"
    "83f803+115f803+346f775+347f775+352f775+353f775+7778f775+7779f775+84f775+116f775+84f803+116f803+84f817+116f817+"
    "84f813+116f813+85f804+117f804+85f816+117f816+85f813+117f813+360f769+361f769+362f776+363f776+86f771+118f771+86f"
    "803+118f803+87f768+119f768+87f769+119f769+87f776+119f776+87f775+119f775+87f803+119f803+88f775+120f775+88f776+"
    "120f776+89f775+121f775+90f770+122f770+90f803+122f803+90f817+122f817+104f817+116f776+119f778+121f778+7835c383f"
    "775+7840c65f803+97f803+65f777+97f777+194f769+226f769+194f768+226f768+194f777+226f777+194f771+226f771+7840f770+"
    "7841f770+258f769+259f769+258f768+259f768+258f777+259f777+258f771+259f771+7840f774+7841f774+69f803+101f803+69f"
    "777+101f777+69f771+101f771+202f769+234f769+202f768+234f768+202f777+234f777+202f771+234f771+7864f770+7865f770+"
    "73f777+105f777+73f803+105f803+79f803+111f803+79f777+111f777+212f769+244f769+212f768+244f768+212f777+244f777+"
    "212f771+244f771+7884f770+7885f770+416f769+417f769+416f768+417f768+416f777+417f777+416f771+417f771+416f803+417f"
    "803+85f803+117f803+85f777+117f777+431f769+432f769+431f768+432f768+431f777+432f777+431f771+432f771+431f803+432f"
    "803+89f768+121f768+89f803+121f803+89f777+121f777+89f771+121f771+7936c945f787+788+7936f768+7937f768+7936f769+"
    "7937f769+7936f834+7937f834+913f787+788+7944f768+7945f768+7944f769+7945f769+7944f834+7945f834+949f787+788+7952f"
    "768+7953f768+7952f769+7953f769+7960c917f787+788+7960f768+7961f768+7960f769+7961f769+7968c951f787+788+7968f768+"
    "7969f768+7968f769+7969f769+7968f834+7969f834+919f787+788+7976f768+7977f768+7976f769+7977f769+7976f834+7977f"
    "834+953f787+788+7984f768+7985f768+7984f769+7985f769+7984f834+7985f834+921f787+788+7992f768+7993f768+7992f769+"
    "7993f769+7992f834+7993f834+959f787+788+8000f768+8001f768+8000f769+8001f769+8008c927f787+788+8008f768+8009f768+"
    "8008f769+8009f769+8016c965f787+788+8016f768+8017f768+8016f769+8017f769+8016f834+8017f834+8025c933f788+8027c"
    "8025f768+8029c769+8031c834+969f787+788+8032f768+8033f768+8032f769+8033f769+8032f834+8033f834+937f787+788+8040f"
    "768+8041f768+8040f769+8041f769+8040f834+8041f834+945f768+940=949f768+941=951f768+942=953f768+943=959f768+972="
    "965f768+973=969f768+974=8064c7936f837+7937f837+7938f837+7939f837+7940f837+7941f837+7942f837+7943f837+7944f837+"
    "7945f837+7946f837+7947f837+7948f837+7949f837+7950f837+7951f837+7968f837+7969f837+7970f837+7971f837+7972f837+"
    "7973f837+7974f837+7975f837+7976f837+7977f837+7978f837+7979f837+7980f837+7981f837+7982f837+7983f837+8032f837+"
    "8033f837+8034f837+8035f837+8036f837+8037f837+8038f837+8039f837+8040f837+8041f837+8042f837+8043f837+8044f837+"
    "8045f837+8046f837+8047f837+945f774+772+8048f837+945f837+940f837+8118c945f834+8118f837+913f774+772+768+902=837+"
    "8126c953=8129c168f834+8052f837+951f837+942f837+8134c951f834+8134f837+917f768+904=919f768+905=837+8127f768+769+"
    "834+953f774+772+970f768+912=8150c953f834+970f834+921f774+772+768+906=8157c8190f768+769+834+965f774+772+971f"
    "768+944=961f787+788+965f834+971f834+933f774+772+768+910=929f788+168f768+901=96=8178c8060f837+969f837+974f837+"
    "8182c969f834+8182f837+927f768+908=937f768+911=837+180=8192c8194=8195=8486c937=8490c75=197=8602c8592f824+8594f"
    "824+8622c8596f824+8653c8656f824+8660f824+8658f824+8708c8707f824+8713c8712f824+8716c8715f824+8740c8739f824+"
    "8742c8741f824+8769c8764f824+8772c8771f824+8775c8773f824+8777c8776f824+8800c61f824+8802c8801f824+8813c8781f824+"
    "60f824+62f824+8804f824+8805f824+8820c8818f824+8819f824+8824c8822f824+8823f824+8832c8826f824+8827f824+8836c"
    "8834f824+8835f824+8840c8838f824+8839f824+8876c8866f824+8872f824+8873f824+8875f824+8928c8828f824+8829f824+8849f"
    "824+8850f824+8938c8882f824+8883f824+8884f824+8885f824+9001c12296=12297=10972c10973f824-12364c12363f12441+"
    "12366c12365f12441+12368c12367f12441+12370c12369f12441+12372c12371f12441+12374c12373f12441+12376c12375f12441+"
    "12378c12377f12441+12380c12379f12441+12382c12381f12441+12384c12383f12441+12386c12385f12441+12389c12388f12441+"
    "12391c12390f12441+12393c12392f12441+12400c12399f12441+12442+12403c12402f12441+12442+12406c12405f12441+12442+"
    "12409c12408f12441+12442+12412c12411f12441+12442+12436c12358f12441+12446c12445f12441+12460c12459f12441+12462c"
    "12461f12441+12464c12463f12441+12466c12465f12441+12468c12467f12441+12470c12469f12441+12472c12471f12441+12474c"
    "12473f12441+12476c12475f12441+12478c12477f12441+12480c12479f12441+12482c12481f12441+12485c12484f12441+12487c"
    "12486f12441+12489c12488f12441+12496c12495f12441+12442+12499c12498f12441+12442+12502c12501f12441+12442+12505c"
    "12504f12441+12442+12508c12507f12441+12442+12532c12454f12441+12535c12527f12441+12528f12441+12529f12441+12530f"
    "12441+12542c12541f12441+63744c35912=26356=36554=36040=28369=20018=21477=40860=40860=22865=37329=21895=22856="
    "25078=30313=32645=34367=34746=35064=37007=27138=27931=28889=29662=33853=37226=39409=20098=21365=27396=29211="
    "34349=40478=23888=28651=34253=35172=25289=33240=34847=24266=26391=28010=29436=37070=20358=20919=21214=25796="
    "27347=29200=30439=32769=34310=34396=36335=38706=39791=40442=30860=31103=32160=33737=37636=40575=35542=22751="
    "24324=31840=32894=29282=30922=36034=38647=22744=23650=27155=28122=28431=32047=32311=38475=21202=32907=20956="
    "20940=31260=32190=33777=38517=35712=25295=27138=35582=20025=23527=24594=29575=30064=21271=30971=20415=24489="
    "19981=27852=25976=32034=21443=22622=30465=33865=35498=27578=36784=27784=25342=33509=25504=30053=20142=20841="
    "20937=26753=31975=33391=35538=37327=21237=21570=22899=24300=26053=28670=31018=38317=39530=40599=40654=21147="
    "26310=27511=36706=24180=24976=25088=25754=28451=29001=29833=31178=32244=32879=36646=34030=36899=37706=21015="
    "21155=21693=28872=35010=35498=24265=24565=25467=27566=31806=29557=20196=22265=23527=23994=24604=29618=29801="
    "32666=32838=37428=38646=38728=38936=20363=31150=37300=38584=24801=20102=20698=23534=23615=26009=27138=29134="
    "30274=34044=36988=40845=26248=38446=21129=26491=26611=27969=28316=29705=30041=30827=32016=39006=20845=25134="
    "38520=20523=23833=28138=36650=24459=24900=26647=29575=38534=21033=21519=23653=26131=26446=26792=27877=29702="
    "30178=32633=35023=35041=37324=38626=21311=28346=21533=29136=29848=34298=38563=40023=40607=26519=28107=33256="
    "31435=31520=31890=29376=28825=35672=20160=33590=21050=20999=24230=25299=31958=23429=27934=26292=36667=34892="
    "38477=35211=24275=20800=21952=64016c22618=64018c26228=64021c20958=29482=30410=31036=31070=31077=31119=38742="
    "31934=32701=64032c34322=64034c35576=64037c36920=37117=64042c39151=39164=39208=40372=37086=38583=20398=20711="
    "20813=21193=21220=21329=21917=22022=22120=22592=22696=23652=23662=24724=24936=24974=25074=25935=26082=26257="
    "26757=28023=28186=28450=29038=29227=29730=30865=31038=31049=31048=31056=31062=31069=31117=31118=31296=31361="
    "31680=32244=32265=32321=32626=32773=33261=33401=33401=33879=35088=35222=35585=35641=36051=36104=36790=36920="
    "38627=38911=38971=24693=148206=33304=64112c20006=20917=20840=20352=20805=20864=21191=21242=21917=21845=21913="
    "21986=22618=22707=22852=22868=23138=23336=24274=24281=24425=24493=24792=24910=24840=24974=24928=25074=25140="
    "25540=25628=25682=25942=26228=26391=26395=26454=27513=27578=27969=28379=28363=28450=28702=29038=30631=29237="
    "29359=29482=29809=29958=30011=30237=30239=30410=30427=30452=30538=30528=30924=31409=31680=31867=32091=32244="
    "32574=32773=33618=33775=34681=35137=35206=35222=35519=35576=35531=35585=35582=35565=35641=35722=36104=36664="
    "36978=37273=37494=38524=38627=38742=38875=38911=38923=38971=39698=40860=141386=141380=144341=15261=16408="
    "16441=152137=154832=163539=40771=40846=64285c1497f1460-64287c1522f1463-64298c1513f1473-1474-64329f1473-1474-"
    "1488f1463-1464-1468-1489f1468-1490f1468-1491f1468-1492f1468-1493f1468-1494f1468-64312c1496f1468-1497f1468-"
    "1498f1468-1499f1468-1500f1468-64318c1502f1468-64320c1504f1468-1505f1468-64323c1507f1468-1508f1468-64326c1510f"
    "1468-1511f1468-1512f1468-1513f1468-1514f1468-1493f1465-1489f1471-1499f1471-1508f1471-69786c69785f69818+69788c"
    "69787f69818+69803c69797f69818+69934c69937f69927+69938f69927+70475c70471f70462+70487+70843c70841f70842+70832+"
    "70846c70845+71098c71096f71087+71097f71087+119134c119127f119141-119128f119141-119135f119150-119151-119152-"
    "119153-119154-119227c119225f119141-119226f119141-119227f119150-119228f119150-119227f119151-119228f119151-"
    "194560c20029=20024=20033=131362=20320=20398=20411=20482=20602=20633=20711=20687=13470=132666=20813=20820="
    "20836=20855=132380=13497=20839=20877=132427=20887=20900=20172=20908=20917=168415=20981=20995=13535=21051="
    "21062=21106=21111=13589=21191=21193=21220=21242=21253=21254=21271=21321=21329=21338=21363=21373=21375=21375="
    "21375=133676=28784=21450=21471=133987=21483=21489=21510=21662=21560=21576=21608=21666=21750=21776=21843=21859="
    "21892=21892=21913=21931=21939=21954=22294=22022=22295=22097=22132=20999=22766=22478=22516=22541=22411=22578="
    "22577=22700=136420=22770=22775=22790=22810=22818=22882=136872=136938=23020=23067=23079=23000=23142=14062="
    "14076=23304=23358=23358=137672=23491=23512=23527=23539=138008=23551=23558=24403=23586=14209=23648=23662=23744="
    "23693=138724=23875=138726=23918=23915=23932=24033=24034=14383=24061=24104=24125=24169=14434=139651=14460="
    "24240=24243=24246=24266=172946=24318=140081=140081=33281=24354=24354=14535=144056=156122=24418=24427=14563="
    "24474=24525=24535=24569=24705=14650=14620=24724=141012=24775=24904=24908=24910=24908=24954=24974=25010=24996="
    "25007=25054=25074=25078=25104=25115=25181=25265=25300=25424=142092=25405=25340=25448=25475=25572=142321=25634="
    "25541=25513=14894=25705=25726=25757=25719=14956=25935=25964=143370=26083=26360=26185=15129=26257=15112=15076="
    "20882=20885=26368=26268=32941=17369=26391=26395=26401=26462=26451=144323=15177=26618=26501=26706=26757=144493="
    "26766=26655=26900=15261=26946=27043=27114=27304=145059=27355=15384=27425=145575=27476=15438=27506=27551=27578="
    "27579=146061=138507=146170=27726=146620=27839=27853=27751=27926=27966=28023=27969=28009=28024=28037=146718="
    "27956=28207=28270=15667=28363=28359=147153=28153=28526=147294=147342=28614=28729=28702=28699=15766=28746="
    "28797=28791=28845=132389=28997=148067=29084=148395=29224=29237=29264=149000=29312=29333=149301=149524=29562="
    "29579=16044=29605=16056=16056=29767=29788=29809=29829=29898=16155=29988=150582=30014=150674=30064=139679="
    "30224=151457=151480=151620=16380=16392=30452=151795=151794=151833=151859=30494=30495=30495=30538=16441=30603="
    "16454=16534=152605=30798=30860=30924=16611=153126=31062=153242=153285=31119=31211=16687=31296=31306=31311="
    "153980=154279=154279=31470=16898=154539=31686=31689=16935=154752=31954=17056=31976=31971=32000=155526=32099="
    "17153=32199=32258=32325=17204=156200=156231=17241=156377=32634=156478=32661=32762=32773=156890=156963=32864="
    "157096=32880=144223=17365=32946=33027=17419=33086=23221=157607=157621=144275=144284=33281=33284=36766=17515="
    "33425=33419=33437=21171=33457=33459=33469=33510=158524=33509=33565=33635=33709=33571=33725=33767=33879=33619="
    "33738=33740=33756=158774=159083=158933=17707=34033=34035=34070=160714=34148=159532=17757=17761=159665=159954="
    "17771=34384=34396=34407=34409=34473=34440=34574=34530=34681=34600=34667=34694=17879=34785=34817=17913=34912="
    "34915=161383=35031=35038=17973=35066=13499=161966=162150=18110=18119=35488=35565=35722=35925=162984=36011="
    "36033=36123=36215=163631=133124=36299=36284=36336=133342=36564=36664=165330=165357=37012=37105=37137=165678="
    "37147=37432=37591=37592=37500=37881=37909=166906=38283=18837=38327=167287=18918=38595=23986=38691=168261="
    "168474=19054=19062=38880=168970=19122=169110=38923=38923=38953=169398=39138=19251=39209=39335=39362=39422="
    "19406=170800=39698=40000=40189=19662=19693=40295=172238=19704=172293=172558=172689=40635=19798=40697=40702="
    "40709=40719=40726=40763=173568=";

// How many columns of a screen the characters from U+0000 to U+E01EF have, written likewise: w two (East Asian, emoji),
// m none (marks), _ one. From Unicode 14.0.
static const char unicode_widths[] =
    "768_112m275_7m263_45m_m_2m_2m_m56_6m10_11m_m46_21m16_m101_8m_6m2_2m_4m33_m_m30_27m91_11m58_9m9_m24_4m_9m_3m_5m"
    "43_3m52_2m6_8m42_57m55_m_m4_8m4_m3_7m10_2m29_m58_m4_4m8_m20_2m26_m2_2m57_m4_2m4_2m2_3m3_m30_2m3_m11_2m57_m4_5m"
    "_2m4_m20_2m22_6m_m58_m2_m_4m8_m7_2m11_2m30_m61_m12_m50_m3_m55_m_3m5_3m_4m7_2m11_2m29_m58_m2_m6_m5_2m20_2m28_2m"
    "57_2m4_4m8_m20_2m29_m72_m7_3m_m90_m2_7m12_8m98_m2_9m11_6m74_2m27_m_m_m55_14m_5m_2m5_11m_36m9_m102_4m_6m_2m2_2m"
    "25_2m4_3m16_4m13_m2_2m6_m15_m98_96w160m349_3m946_3m29_2m30_2m30_2m64_2m_7m8_m2_11m9_m45_5m117_2m34_m118_3m4_2m"
    "9_m6_3m219_2m2_m58_m_7m_m_m2_8m6_10m2_m48_31m49_4m48_m_5m_m5_m40_9m12_2m32_4m2_2m_3m56_m_2m3_m_3m58_8m2_2m152_"
    "3m_13m_7m4_m6_m3_2m198_64m523_5m26_5m49_5m_10m96_33m553_2w13_2w190_4w3_w2_w521_2w21_2w50_12w43_w19_w13_w8_2w"
    "17_2w5_2w8_w5_w21_w7_2w_w4_w2_w7_w4_2w28_w35_w_w4_3w_w61_3w24_w14_w859_2w51_w4_w409_3m141_m96_32m128_26w_89w"
    "12_214w26_12w4_42w4m17w2_86w2_2m101w5_43w_94w_84w12_47w_40w8_7024w64_22157w3_55w424_4m_10m32_2m80_2m272_m3_m4_"
    "m25_2m5_m151_2m26_18m13_m38_8m25_11m14_29w3_3m48_m2_4m2_2m39_m67_6m2_2m2_2m12_m8_m47_m51_m_3m2_2m5_2m_m42_2m8_"
    "m238_m2_m4_m18_11172w8540_366w2_106w68_m737_16m10w6_16m35w_19w_4w147_m_96w127_7w18_3m513_m226_m149_5m1670_3m_"
    "2m5_4m40_3m4_m165_2m573_4m387_2m153_11m49_4m123_m54_15m41_m2_2m10_3m49_4m2_2m2_m4_m10_m50_3m36_5m_8m62_m12_2m"
    "52_9m10_4m2_m95_3m2_m_2m6_m160_m3_8m21_2m57_2m3_m37_7m3_5m195_8m2_3m_m23_m84_6m_m4_2m_2m238_4m6_2m_2m27_2m85_"
    "8m2_m_2m106_m_m2_6m_m101_3m2_4m_5m259_9m_2m256_2m_m4_m144_4m2_2m4_m32_10m40_6m2_4m8_m9_6m2_3m46_13m_2m406_7m_"
    "6m_m82_22m2_7m_2m_2m122_6m3_m_2m_7m_m72_2m3_m_m347_2m5435_9m14007_5m59_7m1048_m63_4m77_4wm11_2w14_6136w8_1238w"
    "42_9w8935_4w_7w_2w_291w45_3w17_4w8_396w2465_2m_4m4700_46m2_23m544_3m9_16m2_7m30_4m148_3m1979_55m4_50m8_m14_m"
    "22_5m_15m1360_7m_17m2_7m_2m_5m261_7m375_m61_4m1504_7m109_7m1721_w202_w190_w2_10w101_3w13_44w4_9w7_2w14_6w154_"
    "33w12_9w_70w_22w12_43w4_5w12_17w3_w3_71w_w_187w2_63w13_4w_24w18_w26_2w13_w86_85w48_70w6_w3_3w2_3w5_3w11_2w7_9w"
    "227_12w4_w283_47w_10w_185w112_5w3_5w3_7w9_29w3_11w5_6w10_10w6_8w8_7w1289_65534w2_65534w655363_m30_96m128_240m";

// The sets that rules name, as the kinds of their members; set_ranges has those that are no kinds.
static const char *const sets[128] = {
    [' '] = "b", ['r'] = "r", ['/'] = "rh", ['s'] = "rbs",        // the space, [\r\n], [\r\n/], \s
    ['L'] = "AaUuLlo", ['M'] = "AaUuLlom", ['N'] = "dn",          // \p{L}, [\p{L}\p{M}], \p{N}
    ['P'] = "hqp", ['S'] = "hqpytz", ['D'] = "hqpy",              // \p{P}, [\p{P}\p{S}], [\p{P}$+<=>^|~]
    ['U'] = "AUuom", ['W'] = "aLlom",                             // [\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}], and with \p{Ll}
    ['x'] = "bsmhqpytz_", ['y'] = "bsdnm_",                       // [^\r\n\p{L}\p{N}], [^\r\n\p{L}\p{P}\p{S}]
    ['O'] = "mhqpytz_", ['o'] = "hqpytz_",                        // [^\s\p{L}\p{N}], [^\s\p{L}\p{M}\p{N}]
    ['A'] = "Aa", ['d'] = "d", ['q'] = "hqyt", ['c'] = "AaUL",    // [A-Za-z], [0-9], ASCII punctuation, cased letters
    ['m'] = "", ['K'] = "", ['J'] = "",
};
static const struct { char set; uint32_t first, last; } set_ranges[] = {
    {'m', '!', '/'}, {'m', ':', '~'}, {'m', 0xFF01, 0xFF0F}, {'m', 0xFF1A, 0xFF5E}, {'m', 0x2018, 0x201F},
    {'m', 0x3000, 0x3002}, {'K', 0x3040, 0x30FF}, {'K', 0x4E00, 0x9FA5}, {'J', 0x0800, 0x9FA5}, {'J', 0xAC00, 0xD7FF},
};

static const char gpt2_words[] = "'| ?L+| ?N+| ?O+|s+!|s+";
static const char llama3_words[] = "\"|x?L+|N3| ?O+r*|s*r+|s+!|s+", qwen2_words[] = "\"|x?L+|N| ?O+r*|s*r+|s+!|s+";

// To add a row: the names that GGUF files use, the flags that hold where a file is silent, and the expressions of the
// model's tokenizer.json as rules, in their order. A rule is applied to each word that the rule before made; text
// between two matches is a word, too. Append rows only: native files hold a row's number. The reference in
// tests/make_token_goldens.py has the same table.
static const struct {
    const char *names;
    unsigned flags;
    const char *rules[7];  // up to NULL
} pre_tokenizers[] = {
    {"gpt-2 phi-2 jais trillion granite-docling exaone4 mellum a.x-4.0 gigachat modern-bert roberta-bpe jina-es "
     "jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code", 0, {gpt2_words}},
    {"smollm starcoder refact codeshell exaone minerva-7b mellum2", 0, {"N", gpt2_words}},
    {"llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano", IGNORE_MERGES | ADD_BOS,
     {llama3_words}},
    {"dbrx smaug-bpe chatglm-bpe", 0, {llama3_words}},
    {"qwen2 deepseek-r1-qwen stablelm2 f2llmv2", COMPOSE, {qwen2_words}},
    {"deepseek-llm", 0, {"r", "s?c+", "s?m+", "^s+$", "J+", "N+"}},
    {"default", 0, {"D+", gpt2_words, "N+", "ddd"}},
    {"mpt olmo", COMPOSE, {gpt2_words}},
    {"command-r", COMPOSE, {"N", gpt2_words}},
    {"hunyuan megrez kormo solar-open grok-2", 0, {qwen2_words}},
    {"glm4 glm5", IGNORE_MERGES, {llama3_words}},
    {"qwen35", COMPOSE, {"\"|x?M+|N| ?o+r*|s*r+|s+!|s+"}},
    {"tekken", IGNORE_MERGES | ADD_BOS, {"x?U*W+|x?U+W*|N| ?O+/*|s*r+|s+!|s+"}},
    {"gpt-4o llama4 kanana2 talkie minimax-m2", 0, {"x?U*W+\"?|x?U+W*\"?|N3| ?O+/*|s*r+|s+!|s+"}},
    {"deepseek-v3 hunyuan-dense joyai-llm hy_v4", 0, {"N3", "K+", "qA+|y?M+| ?S+r*|s*r+|s+!|s+"}},
    {"deepseek-coder", 0, {"r", "s?L+", "s?P+", "J+", "N"}},
};
enum { N_PRE_TOKENIZERS = sizeof pre_tokenizers / sizeof *pre_tokenizers };

// Characters from GAP to GAP_END, and from U+E01F0 on, have no kind.
enum { GAP = 0x34000, GAP_END = 0xE0000, N_CLASSIFIED = GAP + 0x1F0 };

// Gives each character the bits of the pre-tokenizer's sets; fills the table of compositions.
static bool unpack_unicode(Tokenizer *t, Error *e) {
    uint16_t kind_bits[128] = {0};
    uint32_t code = 0, first = 0, class = 0, n_sets = 0;  // at most 14 sets
    t->sets_of = allocate(N_CLASSIFIED + 1, sizeof *t->sets_of, e);
    t->compositions = allocate(N_COMPOSITIONS, sizeof *t->compositions, e);
    if (!t->sets_of || !t->compositions) return false;
    for (const char *const *rule = pre_tokenizers[t->pre].rules; *rule; rule++) {
        for (const unsigned char *p = (const unsigned char *)*rule; *p; p++) {
            if (!sets[*p] || t->set_bits[*p]) continue;
            t->set_bits[*p] = (uint16_t)(1 << n_sets++);
            for (const char *kind = sets[*p]; *kind; kind++) kind_bits[(unsigned char)*kind] |= t->set_bits[*p];
        }
    }
    for (const char *p = unicode_data; *p; p++) {
        uint32_t n = !isdigit((unsigned char)*p);  // default: 1
        for (; isdigit((unsigned char)*p); p++) n = n * 10 + (uint32_t)(*p - '0');
        if (*p == 'k') class = n;
        else if (*p == 'c') code = n;
        else if (*p == 'f') first = n;
        else if (*p == '=') *find_composition(t, code) = (Composition){code, {n, 0}, 0}, code++;
        else if (*p == '+' || *p == '-') {
            uint64_t pair = (uint64_t)first << 32 | n;
            if (*p == '+') *find_composition(t, pair) = (Composition){pair, {code, 0}, 0};
            *find_composition(t, code) = (Composition){code, {first, n}, 0}, code++;
        } else for (; n > 0; n--, code++) {
            t->sets_of[code] = kind_bits[(unsigned char)*p];
            if (*p == 'm' && class) *find_composition(t, code) = (Composition){code, {0, 0}, class};
        }
    }
    t->sets_of[N_CLASSIFIED] = kind_bits['_'];
    for (size_t i = 0; i < sizeof set_ranges / sizeof *set_ranges; i++)
        for (code = set_ranges[i].first; code <= set_ranges[i].last; code++)
            t->sets_of[code] |= t->set_bits[(unsigned char)set_ranges[i].set];
    return true;
}

enum { CONTINUES = 1 << 14, CUT = 1 << 15 };  // a byte that is not its character's first; a byte where a word begins

typedef struct {
    const char *text;
    const uint16_t *class;     // one for each byte: the sets of its character, and the two flags
    const uint16_t *set_bits;  // a set's bit, by the letter of the set
} Characters;

// The end of the run of bytes from `at` on that have exactly `bits` of `mask`.
static size_t run_end(const Characters *x, size_t at, size_t end, int mask, int bits) {
    while (at < end && (x->class[at] & mask) == bits) at++;
    return at;
}

// The end of 's|'t|'re|'ve|'m|'ll|'d, or `at`. any_case: (?i:...), to which U+017F, the long s, is an s.
static size_t contraction(const Characters *x, size_t at, size_t end, bool any_case) {
    if (at + 1 >= end || x->text[at] != '\'') return at;
    char a = x->text[at + 1], b = at + 2 < end ? x->text[at + 2] : 0;
    if (any_case && a == '\xC5' && b == '\xBF') return at + 3;
    if (any_case && a >= 'A' && a <= 'Z') a = (char)(a + 32);
    if (any_case && b >= 'A' && b <= 'Z') b = (char)(b + 32);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return at + 2;
    return (b == 'e' && (a == 'r' || a == 'v')) || (b == 'l' && a == 'l') ? at + 3 : at;
}

// The end of the match, from `at` on, of the rest of an alternative: greedy, with backtracking. SIZE_MAX: none.
static size_t match_rest(const Characters *x, const char *p, size_t at, size_t end) {
    if (*p == '|' || *p == 0) return at;
    char item = *p++, how_often = *p;
    uint16_t set = x->set_bits[(unsigned char)item], space = x->set_bits['s'];
    if (item == '!' || item == '^' || item == '$') {
        bool holds = item == '!' ? at == end || x->class[at] & space
                   : item == '^' ? x->class[at] & CUT || !(x->class[at - 1] & space) : at == end;
        return holds ? match_rest(x, p, at, end) : SIZE_MAX;
    }
    bool optional = how_often == '?' || how_often == '*', unlimited = how_often == '*' || how_often == '+';
    size_t stop = set ? at : contraction(x, at, end, item == '"');
    if (optional || unlimited || how_often == '3') p++;
    if (unlimited) stop = run_end(x, at, end, set, set);
    else for (int i = how_often == '3' ? 3 : 1; set && i > 0 && stop < end && x->class[stop] & set; i--)
        stop = run_end(x, stop + 1, end, CONTINUES, CONTINUES);
    while (stop > at || optional) {
        size_t found = match_rest(x, p, stop, end);
        if (found != SIZE_MAX || stop == at) return found;
        do stop--;
        while (x->class[stop] & CONTINUES);
    }
    return SIZE_MAX;
}

// The end of the match that begins at `at`, by the first alternative that has one. `at`: none.
static size_t match_rule(const Characters *x, const char *rule, size_t at, size_t end) {
    for (const char *p = rule; p; p = strchr(p, '|')) {
        if (*p == '|') p++;
        size_t stop = match_rest(x, p, at, end);
        if (stop != SIZE_MAX) return stop;
    }
    return at;
}

// Gives each byte the bits of its character, and sets CUT at the first byte of each word.
static void cut_words(const Tokenizer *t, const char *s, size_t n, uint16_t *class) {
    Characters x = {s, class, t->set_bits};
    for (size_t i = 0; i < n;) {
        uint32_t code = 0;
        int length = read_character(s + i, n - i, &code);
        if (length <= 0) code = N_CLASSIFIED;
        else if (code >= GAP) code = code - GAP_END < N_CLASSIFIED - GAP ? code - GAP_END + GAP : N_CLASSIFIED;
        uint16_t bits = t->sets_of[code];
        class[i++] = bits;
        for (; length > 1; length--) class[i++] = bits | CONTINUES;
    }
    class[0] |= CUT;
    for (const char *const *rule = pre_tokenizers[t->pre].rules; *rule; rule++) {
        for (size_t at = 0, end; at < n; at = end) {  // a word of the rules before
            end = run_end(&x, at + 1, n, CUT, 0);
            for (size_t stop; at < end; at = stop) {  // a match, or what is between two
                class[at] |= CUT;
                stop = match_rule(&x, *rule, at, end);
                if (stop > at) continue;
                do stop = run_end(&x, stop + 1, end, CONTINUES, CONTINUES);
                while (stop < end && match_rule(&x, *rule, stop, end) == stop);
            }
        }
    }
}

/* ---- Encoding ---------------------------------------------------------------------------------------------------- */

typedef struct {
    const char *text;
    size_t n_bytes;
    bool special;  // the name of a control token is that token here; elsewhere it is plain text
} Span;

typedef struct {
    int *ids;
    size_t n, capacity;
    size_t n_dropped;  // bytes left out, as in Hugging Face: the vocabulary has no token for them, and no unknown token
} Tokens;

// A part of the text that is one piece so far. Neighbours are joined until no pair may be.
typedef struct {
    int previous, next;  // indices; none: -1 and n_symbols
    int what;            // BPE: the piece; SPM: its offset in the text. One symbol after the last has the text's length
} Symbol;

typedef struct {
    const Tokenizer *t;
    Symbol *symbols;     // (capacity + 1)
    uint32_t *least;     // (3 * capacity + 2)  a tree: least[i] is the less of least[2 * i] and least[2 * i + 1];
                         // from least[width] on, the rank of each symbol's pair with the next (UINT32_MAX: none)
    size_t n_symbols, capacity, width;  // the last: a power of two, not less than n_symbols
    uint16_t *scratch;   // BPE: the bytes' classes; SPM: the text with its dummy prefix
    char *composed;      // (3 * n)  text in NFC
    size_t first;        // where in out->ids this plain text begins
    const char *text;    // all of it
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

// Emits the tokens that begin a text, or those that end it.
static bool emit_around(const Tokenizer *t, bool ends, Tokens *out, Error *e) {
    if (!t->around || t->around[ends][0] < 0) return emit(out, ends ? t->eos : t->bos, e);
    for (int i = 0; i < MAX_AROUND && t->around[ends][i] >= 0; i++) if (!emit(out, t->around[ends][i], e)) return false;
    return true;
}

// Sets the rank of pair i, and what changes with it further up the tree.
static void set_rank(Encoder *c, size_t i, uint32_t rank) {
    c->least[i += c->width] = rank;
    for (i /= 2; i > 0; i /= 2) {
        rank = c->least[2 * i] < c->least[2 * i + 1] ? c->least[2 * i] : c->least[2 * i + 1];
        if (c->least[i] == rank) return;
        c->least[i] = rank;
    }
}

// An integer for a finite score: the better the score, the smaller the integer. Adding 0 makes -0 a 0.
static uint32_t score_order(float score) {
    uint32_t bits;
    score += 0.0f;
    memcpy(&bits, &score, sizeof bits);
    return bits >> 31 ? bits : ~bits & 0x7FFFFFFF;
}

// Ranks the pair of this symbol and the next: BPE by the merge, SPM by the score of the result.
static void rank_pair(Encoder *c, const char *s, size_t left) {
    const Tokenizer *t = c->t;
    const Symbol *a = &c->symbols[left], *b = &c->symbols[a->next];
    bool is_spm = t->kind == SPM;
    int found = -1;
    if ((size_t)a->next < c->n_symbols)
        found = is_spm ? lookup(t, s + a->what, (size_t)(c->symbols[b->next].what - a->what), TEXT_TYPES)
                       : at_slot(merge_slot(t, (uint32_t)a->what, (uint32_t)b->what));
    set_rank(c, left, is_spm && found >= 0 ? score_order(t->score[found]) : (uint32_t)found);
}

// Joins pairs, the least rank first; among equal ranks, the leftmost.
static void join_symbols(Encoder *c, const char *s) {
    const Tokenizer *t = c->t;
    for (c->width = 1; c->width < c->n_symbols;) c->width *= 2;
    memset(c->least, 0xFF, (c->width + c->n_symbols + 1) * sizeof *c->least);
    for (size_t i = 0; i < c->n_symbols; i++) rank_pair(c, s, i);
    for (uint32_t rank; (rank = c->least[1]) != UINT32_MAX;) {
        size_t left = 1;  // down the tree, to the leftmost pair of that rank
        while (left < c->width) left = 2 * left + (c->least[2 * left] != rank);
        left -= c->width;
        Symbol *a = &c->symbols[left], *b = &c->symbols[a->next];
        if (t->kind == BPE) a->what = (int)t->merge[rank][2];
        set_rank(c, (size_t)a->next, UINT32_MAX);
        a->next = b->next;
        c->symbols[a->next].previous = (int)left;
        if (a->previous >= 0) rank_pair(c, s, (size_t)a->previous);
        rank_pair(c, s, left);
    }
}

// Emits a character that is no piece as bytes, or else, as SentencePiece does, one unknown token for a run of them.
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
    free(c->least);
    c->symbols = allocate(n + 1, sizeof *c->symbols, c->e);
    c->least = allocate(plus(times(n, 3), 2), sizeof *c->least, c->e);
    c->capacity = c->symbols && c->least ? n : 0;
    return c->capacity > 0;
}

// Encodes a word: nothing joins with what is outside of it.
static bool encode_word(Encoder *c, const char *s, size_t n) {
    const Tokenizer *t = c->t;
    int whole = t->flags & IGNORE_MERGES ? lookup(t, s, n, TEXT_TYPES) : -1;
    if (whole >= 0) return emit(c->out, whole, c->e);
    if (!reserve_symbols(c, n)) return false;
    c->n_symbols = 0;
    for (size_t i = 0, length; i < n; i += length) {
        uint32_t code;
        int read = t->kind == SPM ? read_character(s + i, n - i, &code) : 1, at = (int)c->n_symbols;
        int what = t->kind == SPM ? (int)i : t->byte_id[(unsigned char)s[i]];
        length = read > 0 ? (size_t)read : 1;
        if (what < 0) c->out->n_dropped++;
        else c->symbols[c->n_symbols++] = (Symbol){at - 1, at + 1, what};
    }
    if (c->n_symbols == 0) return true;
    c->symbols[c->n_symbols].what = (int)n;
    join_symbols(c, s);
    for (size_t i = 0; i < c->n_symbols; i = (size_t)c->symbols[i].next) {
        const Symbol *a = &c->symbols[i];
        size_t length = (size_t)(c->symbols[a->next].what - a->what);  // SPM's
        int id = t->kind == SPM ? lookup(t, s + a->what, length, TEXT_TYPES) : a->what;
        if (id >= 0 ? !emit(c->out, id, c->e) : !emit_unknown(c, s + a->what, length)) return false;
    }
    return true;
}

// Encodes text without user-defined pieces.
static bool encode_words(Encoder *c, const char *s, size_t n) {
    if (n == 0) return true;
    bool bpe = c->t->kind == BPE, spaces_cut = c->t->space_leads;
    if (c->t->flags & COMPOSE && !compose_text(c->t, &s, &n, &c->composed, c->e)) return false;
    if (bpe) cut_words(c->t, s, n, c->scratch);
    for (size_t at = 0, end; at < n; at = end) {
        end = at + 1;
        while (end < n && !(bpe && c->scratch[end] & CUT) && !(spaces_cut && s[end] == ' ' && s[end - 1] != ' ')) end++;
        if (!encode_word(c, s + at, end - at)) return false;
    }
    return true;
}

// Copies text, with U+2581 as a space. Returns the length.
static size_t normalise(const char *s, size_t n, char *to) {
    size_t length = 0;
    for (size_t i = 0; i < n; i++) {
        bool bar = n - i >= 3 && memcmp(s + i, "\xE2\x96\x81", 3) == 0;
        to[length++] = bar ? ' ' : s[i];
        if (bar) i += 2;
    }
    return length;
}

// What a regular expression's \s matches.
static bool is_space(uint32_t c) {
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200A) ||
           c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// The bytes of the character at s that are white space; 0: none, or no character.
static size_t white_at(const char *s, size_t n) {
    uint32_t code;
    int length = n > 0 ? read_character(s, n, &code) : 0;
    return length > 0 && is_space(code) ? (size_t)length : 0;
}

// The length of a text without the white space at its end.
static size_t trim_white(const char *s, size_t n) {
    size_t content = 0;
    for (size_t at = 0, white; at < n; at += white ? white : 1) {
        white = white_at(s + at, n - at);
        if (!white) content = at + 1;
    }
    return content;
}

// Emits the special pieces of one type between `at` and `end`: the leftmost first, of these the longest, which may take
// the white space beside it, up to n. `rest` encodes the text before each, from *begin on; afterwards *begin is where
// the last one ends.
static bool encode_around(Encoder *c, int type, const char *s, size_t *begin, size_t at, size_t end, size_t n,
                          bool (*rest)(Encoder *c, const char *s, size_t n)) {
    for (size_t length; at < end; at += length) {
        int id = longest_special(c->t, type, s + at, end - at, &length);
        if (id < 0) continue;
        size_t before = at - *begin;
        int takes = c->t->takes ? c->t->takes[id] : 0;
        if (takes & TAKES_BEFORE) before = trim_white(s + *begin, before);
        for (size_t white = 1; takes & TAKES_AFTER && white; length += white)
            white = white_at(s + at + length, n - at - length);
        if (!rest(c, s + *begin, before) || !emit(c->out, id, c->e)) return false;
        *begin = at + length;
    }
    return true;
}

// Encodes a part that gets a prefix of its own. User-defined pieces are found first, whatever the words.
static bool encode_part(Encoder *c, const char *s, size_t n) {
    if (n == 0) return true;
    unsigned flags = c->t->flags;
    c->first = c->out->n;
    if (c->t->kind == SPM) {
        bool prefix = flags & DUMMY_PREFIX && (s == c->text || !(flags & PREFIX_FIRST));
        char *normal = (char *)c->scratch + 1;
        n = normalise(s, n, normal);
        if (*normal == ' ' && flags & PREFIX_UNLESS_SPACE) prefix = false;
        if (prefix && flags & PREFIX_LAST) normal[n] = ' ';
        else if (prefix) *--normal = ' ';
        n += prefix;
        s = normal;
    }
    size_t begin = 0, end = flags & ADDED_FIRST ? 0 : n;
    return encode_around(c, PIECE_USER_DEFINED, s, &begin, 0, end, n, encode_words) &&
           encode_words(c, s + begin, n - begin);
}

// Encodes plain text between two control tokens.
static bool encode_plain(Encoder *c, const char *s, size_t n) {
    size_t begin = 0, end = c->t->flags & ADDED_FIRST ? n : 0;
    return encode_around(c, PIECE_USER_DEFINED, s, &begin, 0, end, n, encode_part) &&
           encode_part(c, s + begin, n - begin);
}

// Appends the tokens of the spans' joined text. A control token must lie in special spans as a whole. The caller adds
// the model's begin and end tokens.
static bool encode(const Tokenizer *t, const Span *spans, int n_spans, Tokens *out, Error *e) {
    size_t n = 0, begin = 0, at = 0, end = 0;
    for (int i = 0; i < n_spans; i++) n = plus(n, spans[i].n_bytes);
    if (n > MAX_TEXT) return fail(e, NO_ROOM, "the text has %zu bytes; at most %d can be encoded at once", n, MAX_TEXT);
    char *text = allocate(n + 1, 1, e);
    Encoder c = {.t = t, .out = out, .e = e, .text = text};
    c.scratch = allocate((t->flags & COMPOSE ? 3 : 1) * n + 1, sizeof *c.scratch, e);
    bool ok = text && c.scratch;
    for (int i = 0; ok && i < n_spans; end += spans[i++].n_bytes)
        if (spans[i].n_bytes) memcpy(text + end, spans[i].text, spans[i].n_bytes);
    end = 0;
    for (int i = 0; ok && i < n_spans; i++) {
        end += spans[i].n_bytes;
        if (i + 1 < n_spans && spans[i + 1].special == spans[i].special) continue;
        if (spans[i].special) ok = encode_around(&c, PIECE_CONTROL, text, &begin, at, end, n, encode_plain);
        at = end > begin ? end : begin;  // a token may have taken white space of the next span
    }
    ok = ok && encode_plain(&c, text + begin, n - begin);
    free(text);
    free(c.scratch);
    free(c.composed);
    free(c.symbols);
    free(c.least);
    return ok;
}

// The text that a token adds after the token `previous` (-1: none). Encoding with dummy_prefix puts a space before the
// text and after each control token; decoding removes it. So every byte that was encoded comes back, if the vocabulary
// has all bytes (but in SPM U+2581 becomes a space; PREFIX_UNLESS_SPACE, ADDED_FIRST and TAKES_WHITE do not keep all
// white space; and the space of PREFIX_LAST stays).
static const char *decode(const Tokenizer *t, int previous, int id, size_t *n_bytes) {
    char spelled[MAX_PIECE];
    const char *s = piece(t, id, n_bytes);
    if (*n_bytes == 0) return s;
    int type = t->type[id];
    if (type == PIECE_UNKNOWN) return *n_bytes = 3, "\xEF\xBF\xBD";
    // Padding prints nothing. A misspelled piece of BPE is PIECE_UNUSED, too: its bytes are as they were in the file.
    bool is_padding = type == PIECE_UNUSED && (t->kind == SPM || unspell_bytes(s, *n_bytes, spelled) > 0);
    if (type == PIECE_CONTROL || is_padding) *n_bytes = 0;
    bool again = previous == t->bos || !(t->flags & PREFIX_FIRST);  // after a control token
    bool starts = previous < 0 || (t->type[previous] == PIECE_CONTROL && again);
    bool prefixed = (t->flags & (DUMMY_PREFIX | PREFIX_LAST)) == DUMMY_PREFIX;
    if (!starts || !prefixed || *n_bytes == 0 || s[0] != ' ') return s;
    --*n_bytes;
    return s + 1;
}

static bool is_end_token(const Tokenizer *t, int id) {
    for (int i = 0; i < t->n_end; i++) if (t->end_id[i] == (uint32_t)id) return true;
    return false;
}

/* ---- Bytes -------------------------------------------------------------------------------------------------------
   What comes from a file is read through a cursor, which cannot pass the end; what is made grows in a buffer. */

// A place in bytes of a known length. A read past the end gives zeros and makes the cursor bad for good, so that a
// parser may read a whole record and look once.
typedef struct {
    const unsigned char *at;
    size_t left;
    bool bad;
} Cursor;

// The next n bytes where they stand, or NULL.
static const unsigned char *take(Cursor *c, size_t n) {
    if (c->bad || n > c->left) {
        c->bad = true;
        return NULL;
    }
    const unsigned char *at = c->at;
    c->at += n;
    c->left -= n;
    return at;
}

// The next n bytes, copied to a variable of any alignment (files are little-endian, and so are the machines we run on).
static void take_into(Cursor *c, void *to, size_t n) {
    const unsigned char *from = take(c, n);
    if (from) memcpy(to, from, n);
    else memset(to, 0, n);
}

static uint32_t take_u32(Cursor *c) {
    uint32_t x;
    take_into(c, &x, sizeof x);
    return x;
}

static uint64_t take_u64(Cursor *c) {
    uint64_t x;
    take_into(c, &x, sizeof x);
    return x;
}

// Bytes of a file, without a NUL after them; `at` is NULL if there is no such text.
typedef struct { const char *at; size_t n; } Text;

// A string as in GGUF: 64 bits of length, then bytes.
static Text take_string(Cursor *c) {
    uint64_t n = take_u64(c);
    if (n > c->left) c->bad = true;
    return (Text){(const char *)take(c, (size_t)n), (size_t)n};
}

static bool is_text(Text t, const char *expected) {
    return t.at && strlen(expected) == t.n && !memcmp(t.at, expected, t.n);
}

// The number that n <= 8 hexadecimal digits spell; NOT_UTF8: they are none.
static uint32_t read_digits(const char *s, size_t n) {
    char digits[9] = {0};
    for (size_t i = 0; i < n && isxdigit((unsigned char)s[i]); i++) digits[i] = s[i];
    return digits[n - 1] ? (uint32_t)strtoul(digits, NULL, 16) : NOT_UTF8;
}

// Bytes that grow: a text being read, a section of a file being made.
typedef struct {
    unsigned char *bytes;
    size_t n, capacity;
} Buffer;

// Appends n bytes (zeros where `from` is NULL).
static bool append(Buffer *b, const void *from, size_t n, Error *e) {
    size_t needed = plus(b->n, n);
    if (needed > b->capacity) {
        size_t capacity = needed > SIZE_MAX / 2 ? needed : needed * 2;
        unsigned char *bytes = realloc(b->bytes, capacity);
        if (!bytes) return fail(e, NO_MEMORY, "no memory for %zu bytes", needed);
        b->bytes = bytes;
        b->capacity = capacity;
    }
    if (n && from) memcpy(b->bytes + b->n, from, n);
    if (n && !from) memset(b->bytes + b->n, 0, n);
    b->n = needed;
    return true;
}

/* ---- Opening a section ------------------------------------------------------------------------------------------- */

static void close_tokenizer(Tokenizer *t) {
    free(t->piece_slots);
    free(t->specials);
    free(t->merge_slots);
    free(t->sets_of);
    free(t->compositions);
    *t = (Tokenizer){0};
}

static bool check_header(const Tokenizer *t, Error *e) {
    if ((t->kind != SPM && t->kind != BPE) || t->pre >= N_PRE_TOKENIZERS || t->flags >> N_FLAGS)
        return refuse(e, "bad vocabulary: of kind %u, pre-tokenizer %u, flags %u", t->kind, t->pre, t->flags);
    if (t->n_tokens < 1 || t->n_tokens > MAX_TOKENS)
        return refuse(e, "vocabulary of %d tokens, expected 1 to %d", t->n_tokens, MAX_TOKENS);
    if (t->n_merges < 0 || t->n_merges > (t->kind == BPE ? MAX_MERGES : 0) || t->n_end < 0 || t->n_end > t->n_tokens)
        return refuse(e, "vocabulary with %d merges and %d end tokens", t->n_merges, t->n_end);
    const int32_t ids[] = {t->bos, t->eos, t->unk};
    for (int i = 0; i < 3; i++)
        if (ids[i] < -1 || ids[i] >= t->n_tokens)
            return refuse(e, "special token %d in a vocabulary of %d", ids[i], t->n_tokens);
    if ((t->flags & ADD_BOS && t->bos < 0) || (t->flags & ADD_EOS && t->eos < 0))
        return refuse(e, "the vocabulary adds a begin or end token, but has none");
    return true;
}

static bool check_pieces(const Tokenizer *t, Error *e) {
    if (t->text_start[0] != 0 || t->text_start[t->n_tokens] != t->text_bytes)
        return refuse(e, "the pieces do not fill the vocabulary's text of %u bytes", t->text_bytes);
    for (int id = 0; id < t->n_tokens; id++) {
        uint32_t start = t->text_start[id], end = t->text_start[id + 1];
        int type = t->type[id];
        if (start > end) return refuse(e, "token %d ends before it begins", id);  // so none ends after the last
        if (type < PIECE_NORMAL || type > PIECE_BYTE) return refuse(e, "token %d has type %d", id, type);
        uint32_t limit = type == PIECE_BYTE ? 1 : SPECIAL_TYPES >> type & 1 ? MAX_SPECIAL_PIECE : MAX_PIECE;
        if (end - start > limit || (type == PIECE_BYTE && start == end))
            return refuse(e, "token %d of type %d has %u bytes, at most %u", id, type, end - start, limit);
        if (!isfinite(t->score[id])) return refuse(e, "token %d: its score is not finite", id);
        if (t->takes && t->takes[id] > TAKES_BOTH) return refuse(e, "token %d takes %d, unknown", id, t->takes[id]);
    }
    for (int i = 0; i < t->n_end; i++)
        if (t->end_id[i] >= (uint32_t)t->n_tokens)
            return refuse(e, "end token %u is not in the vocabulary", t->end_id[i]);
    for (int i = 0; t->around && i < 2 * MAX_AROUND; i++)
        if (t->around[i / MAX_AROUND][i % MAX_AROUND] >= t->n_tokens)
            return refuse(e, "no token %d, with which texts begin or end", t->around[i / MAX_AROUND][i % MAX_AROUND]);
    return true;
}

// Opens a section in place: it must be aligned to 4 bytes and outlive the tokenizer. After a failure, close it as well.
static bool open_tokenizer(const unsigned char *section, size_t n_bytes, Tokenizer *t, Error *e) {
    Cursor c = {.at = section, .left = n_bytes};
    *t = (Tokenizer){0};
    take_into(&c, t, HEADER_BYTES);
    if (c.bad) return refuse(e, "the vocabulary is cut short");
    if (!check_header(t, e)) return false;
    t->flags &= t->kind == SPM ? SPM_FLAGS : BPE_FLAGS;
    size_t n = (size_t)t->n_tokens;
    t->score = (const void *)take(&c, times(n, sizeof *t->score));
    t->text_start = (const void *)take(&c, times(n + 1, sizeof *t->text_start));
    t->merge = (const void *)take(&c, times((size_t)t->n_merges, sizeof *t->merge));
    t->end_id = (const void *)take(&c, times((size_t)t->n_end, sizeof *t->end_id));
    t->around = t->flags & AROUND ? (const void *)take(&c, 2 * sizeof *t->around) : NULL;
    t->type = take(&c, n);
    t->takes = t->flags & TAKES_WHITE ? take(&c, n) : NULL;
    t->text = (const void *)take(&c, t->text_bytes);
    if (c.bad || c.left > 3 || n_bytes % 4)
        return refuse(e, "the vocabulary has %zu bytes, its header asks for %s", n_bytes, c.bad ? "more" : "fewer");
    while (c.left > 0) if (*take(&c, 1)) return refuse(e, "the vocabulary's last bytes are not zero");
    return check_pieces(t, e) && index_pieces(t, e) && index_merges(t, e) &&
           (t->kind == SPM || unpack_unicode(t, e));
}

/* ---- Making a section -------------------------------------------------------------------------------------------- */

// A vocabulary as files have it. Arrays may be unaligned, strings are known to end in the file; -1: the file is silent.
typedef struct {
    int kind;
    Text pre;                     // the pre-tokenizer's name; BPE only
    size_t n_tokens, n_merges;
    bool llama2c;                 // the pieces are as in a tokenizer.bin, each after its score, up to the file's end
    Cursor pieces;                // else strings as in GGUF: u64 length, bytes; byte tokens are spelled <0xAB>
    const unsigned char *scores;  // f32 (n_tokens), or NULL: all 0
    const unsigned char *types;   // i32 (n_tokens), or NULL: all normal
    const unsigned char *takes;   // i32 (n_tokens), or NULL: no special piece takes white space, unless
    bool phi3;                    // llama.cpp knows a model of this name: most take that after them
    Cursor merges;                // strings: left part, space, right part
    const unsigned char *ends;    // u32 (n_ends): more end tokens
    size_t n_ends;
    int around[2][MAX_AROUND];    // as in Tokenizer, if the last of says[] is 1
    int bos, eos, eot, eom, unk;
    int says[N_FLAGS];  // the flags, from ADD_BOS to AROUND
} Vocabulary;

// The parts of a section, in order.
enum { SCORES, STARTS, MERGES, END_IDS, ENDS_AROUND, PIECE_TYPES, PIECE_TAKES, PIECE_TEXT, N_PARTS };

// Names of tokens that end an answer, those of llama.cpp.
static const char *const end_names[] = {
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>", "<|return|>", "<end_of_turn>",
    "<eos>", "</s>", "<EOT>", "<end_of_utterance>", "<\uFF5Cend\u2581of\u2581sentence\uFF5C>", "_<EOT>", "[EOT]",
    "[EOS]", "<|call|>", "<|calls|>", "<|flush|>", "<turn|>", "<|tool_response>", "[e~[", "<|fim_pad|>", "<fim-pad>",
    "<fim_pad>", "<PAD>", "[PAD]", "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>",
    "<|file_sep|>", "<|end|>",
};
enum { N_END_NAMES = sizeof end_names / sizeof *end_names };

// Some files mark such a token as normal text. Only </s> may well be text: it is in HTML.
static bool is_unmarked_control(Text s) {
    for (size_t i = 0; i < N_END_NAMES; i++) if (is_text(s, end_names[i])) return !is_text(s, "</s>");
    return false;
}

// Writes a piece as a user writes it. Returns its length, at most s.n; *type may change.
static size_t unspell_piece(int kind, Text s, int32_t *type, char *to) {
    if (*type == PIECE_BYTE) {
        bool is_spelled = s.n == 6 && !memcmp(s.at, "<0x", 3) && s.at[5] == '>';
        uint32_t byte = is_spelled ? read_digits(s.at + 3, 2) : NOT_UTF8;
        to[0] = (char)byte;
        return byte != NOT_UTF8;
    }
    if (kind == SPM && *type != PIECE_CONTROL && *type != PIECE_UNKNOWN) return normalise(s.at, s.n, to);
    if (kind == BPE && *type == PIECE_NORMAL) {
        size_t length = unspell_bytes(s.at, s.n, to);
        if (length > 0) return length;
        *type = PIECE_UNUSED;  // misspelled: no text can become it
    }
    memcpy(to, s.at, s.n);
    return s.n;
}

// A piece of llama2.c's tokenizer.bin: | f32 score | i32 length | bytes |. A space is a space. Ids 0, 1, 2 are <unk>,
// <s>, </s> (the last two with newlines around them); 3 to 258 are the bytes, as <0xAB> or as U+00AB.
static Text take_llama2c_piece(Cursor *c, size_t id, float *score, int32_t *type, char *spelled) {
    take_into(c, score, sizeof *score);
    size_t n = take_u32(c);
    const char *s = (const char *)take(c, n);
    if (!s) return (Text){NULL, 0};
    *type = id == 0 ? PIECE_UNKNOWN : id < 3 ? PIECE_CONTROL : id < 259 ? PIECE_BYTE : PIECE_NORMAL;
    if (*type == PIECE_CONTROL && n > 2 && s[0] == '\n' && s[n - 1] == '\n') return (Text){s + 1, n - 2};
    if (*type != PIECE_BYTE) return (Text){s, n};
    return (Text){spelled, (size_t)snprintf(spelled, 8, "<0x%02X>", (unsigned)id - 3)};
}

static bool takes_in_phi3(Text s, int type) {
    bool special = SPECIAL_TYPES >> type & 1 || is_text(s, "</s>");
    return special && !is_text(s, "<unk>") && !is_text(s, "<s>") && !is_text(s, "<|endoftext|>");
}

static bool pack_pieces(const Vocabulary *v, Buffer *part, Error *e) {
    Cursor c = v->pieces;
    for (size_t id = 0; v->llama2c ? c.left > 0 : id < v->n_tokens; id++) {
        char bytes[MAX_PIECE], spelled[8];
        int32_t type = PIECE_NORMAL;
        float score = 0;
        if (id == MAX_TOKENS) return refuse(e, "a vocabulary of more than %d tokens", MAX_TOKENS);
        Text s = v->llama2c ? take_llama2c_piece(&c, id, &score, &type, spelled) : take_string(&c);
        if (c.bad) return refuse(e, "not a tokenizer.bin, or cut short: token %zu does not end", id);
        if (s.n > MAX_PIECE) return refuse(e, "token %zu has more than %d bytes", id, MAX_PIECE);
        if (v->types) memcpy(&type, v->types + 4 * id, 4);
        if (v->scores) memcpy(&score, v->scores + 4 * id, 4);
        if (type == 0) type = PIECE_NORMAL;  // GGUF's "undefined"
        if (type < PIECE_NORMAL || type > PIECE_BYTE) return refuse(e, "token %zu has type %d", id, type);
        if (type == PIECE_NORMAL && is_unmarked_control(s)) type = PIECE_CONTROL;
        size_t n = unspell_piece(v->kind, s, &type, bytes);
        if (type == PIECE_BYTE && n == 0) return refuse(e, "byte token %zu is not one of <0x00> to <0xFF>", id);
        if (part[PIECE_TEXT].n > MAX_VOCABULARY) return refuse(e, "its pieces have more than %d bytes", MAX_VOCABULARY);
        uint8_t packed_type = (uint8_t)type;
        uint8_t takes = v->takes ? v->takes[4 * id] : v->phi3 && takes_in_phi3(s, type) ? TAKES_AFTER : 0;
        if (v->takes && memcmp(v->takes + 4 * id, (int32_t[]){takes & TAKES_BOTH}, 4))
            return refuse(e, "token %zu takes an unknown kind of white space", id);
        uint32_t start = (uint32_t)part[PIECE_TEXT].n;
        if (!append(&part[STARTS], &start, 4, e) || !append(&part[SCORES], &score, 4, e) ||
            !append(&part[PIECE_TYPES], &packed_type, 1, e) || (n && !append(&part[PIECE_TEXT], bytes, n, e)) ||
            ((v->takes || v->phi3) && !append(&part[PIECE_TAKES], &takes, 1, e)))
            return false;
    }
    uint32_t end = (uint32_t)part[PIECE_TEXT].n;
    return append(&part[STARTS], &end, 4, e);
}

// Packs merges as ids. A merge is left out if a part or its result is not in the vocabulary. (A misspelled part has
// length 0, and no piece has.)
static bool pack_merges(const Vocabulary *v, const Tokenizer *t, Buffer *merges, Error *e) {
    Cursor c = v->merges;
    for (size_t rank = 0; t->kind == BPE && rank < v->n_merges; rank++) {
        char bytes[2 * MAX_PIECE];
        Text s = take_string(&c);
        const char *space = s.n > 2 && s.n < sizeof bytes ? memchr(s.at + 1, ' ', s.n - 1) : NULL;
        if (!space) continue;
        size_t n_left = unspell_bytes(s.at, (size_t)(space - s.at), bytes);
        size_t n_right = unspell_bytes(space + 1, (size_t)(s.at + s.n - space - 1), bytes + n_left);
        int ids[3] = {lookup(t, bytes, n_left, TEXT_TYPES), lookup(t, bytes + n_left, n_right, TEXT_TYPES),
                      lookup(t, bytes, n_left + n_right, TEXT_TYPES)};
        if (ids[0] >= 0 && ids[1] >= 0 && ids[2] >= 0 && !append(merges, ids, sizeof ids, e)) return false;
    }
    return true;
}

// The tokens that end an answer: those that the file names, and special ones with an end name. But where <|return|> or
// <|flush|> exists, <|end|> ends only one of several messages.
static bool pack_end_ids(const Vocabulary *v, const Tokenizer *t, Buffer *end_ids, Error *e) {
    const int ids[] = {t->eos, v->eot, v->eom};
    bool goes_on = lookup(t, "<|return|>", 10, SPECIAL_TYPES) >= 0 || lookup(t, "<|flush|>", 9, SPECIAL_TYPES) >= 0;
    for (size_t i = 0, n = N_END_NAMES; i < 3 + n + v->n_ends; i++) {
        const char *name = i < 3 || i >= 3 + n || (i == 2 + n && goes_on) ? "" : end_names[i - 3];
        int id = i < 3 ? ids[i] : lookup(t, name, strlen(name), SPECIAL_TYPES);
        if (i >= 3 + n) memcpy(&id, v->ends + 4 * (i - 3 - n), 4);
        bool new = id >= 0 && id < t->n_tokens;
        for (size_t j = 0; j < end_ids->n; j += 4) new = new && memcmp(end_ids->bytes + j, &id, 4);
        if (new && !append(end_ids, &id, 4, e)) return false;
    }
    return true;
}

// Sets *pre to the row of pre_tokenizers[] with this name.
static bool choose_pre_tokenizer(Text name, uint32_t *pre, Error *e) {
    char known[200] = "";
    for (*pre = 0; *pre < N_PRE_TOKENIZERS; ++*pre) {
        const char *names = pre_tokenizers[*pre].names;
        size_t length = strcspn(names, " "), end = strlen(known);
        snprintf(known + end, sizeof known - end, "%s%.*s", end ? ", " : "", (int)length, names);
        for (; *names; names += length + strspn(names + length, " "), length = strcspn(names, " "))
            if (name.at && length == name.n && memcmp(names, name.at, name.n) == 0) return true;
    }
    return refuse(e, "pre-tokenizer \"%.*s\" is not known; choose one with --pre NAME: %s",
                  (int)(name.n < 40 ? name.n : 40), name.at ? name.at : "", known);
}

// Sets ids and flags: the file's, or else those usual for SentencePiece or for the pre-tokenizer.
static void complete_header(const Vocabulary *v, Tokenizer *t) {
    bool spm = t->kind == SPM;
    t->bos = v->bos < 0 && spm ? lookup(t, "<s>", 3, 1 << PIECE_CONTROL) : v->bos;
    t->eos = v->eos < 0 && spm ? lookup(t, "</s>", 4, 1 << PIECE_CONTROL) : v->eos;
    t->unk = v->unk;
    for (int id = 0; spm && t->unk < 0 && id < t->n_tokens; id++) if (t->type[id] == PIECE_UNKNOWN) t->unk = id;
    unsigned usual = spm ? ADD_BOS | DUMMY_PREFIX : pre_tokenizers[t->pre].flags;
    for (int i = 0; i < N_FLAGS; i++) if (v->says[i] < 0 ? usual >> i & 1 : (unsigned)v->says[i]) t->flags |= 1u << i;
    if (t->bos < 0) t->flags &= ~(unsigned)ADD_BOS;
    if (t->eos < 0) t->flags &= ~(unsigned)ADD_EOS;
}

// Appends the section of a vocabulary.
static bool pack_vocabulary(const Vocabulary *v, Buffer *section, Error *e) {
    if (v->n_merges > MAX_MERGES) return refuse(e, "%zu merges, expected at most %d", v->n_merges, MAX_MERGES);
    Tokenizer t = {.kind = (uint32_t)v->kind};
    if (v->kind == BPE && !choose_pre_tokenizer(v->pre, &t.pre, e)) return false;
    Buffer part[N_PARTS] = {{0}};
    bool ok = pack_pieces(v, part, e);
    t.n_tokens = (int)part[PIECE_TYPES].n;
    t.text_start = (const void *)part[STARTS].bytes;
    t.type = part[PIECE_TYPES].bytes;
    t.text = part[PIECE_TEXT].n ? (const char *)part[PIECE_TEXT].bytes : "";
    t.text_bytes = (uint32_t)part[PIECE_TEXT].n;
    ok = ok && index_pieces(&t, e);
    if (ok) complete_header(v, &t);
    ok = ok && pack_merges(v, &t, &part[MERGES], e) && pack_end_ids(v, &t, &part[END_IDS], e);
    t.n_merges = (int)(part[MERGES].n / 12);
    t.n_end = (int)(part[END_IDS].n / 4);
    if (t.flags & AROUND) ok = ok && append(&part[ENDS_AROUND], v->around, sizeof v->around, e);
    ok = ok && append(section, &t, HEADER_BYTES, e);
    for (size_t i = 0; i < N_PARTS; i++) {
        if (part[i].n) ok = ok && append(section, part[i].bytes, part[i].n, e);
        free(part[i].bytes);
    }
    close_tokenizer(&t);
    return ok && append(section, NULL, round_up(section->n, 4) - section->n, e);
}

// llama2.c's tokenizer.bin: | i32 longest piece | pieces |.
static bool read_llama2c_tokenizer(Cursor c, Buffer *section, Error *e) {
    take_u32(&c);
    Vocabulary v = {.kind = SPM, .llama2c = true, .pieces = c, .bos = 1, .eos = 2, .eom = -1, .unk = 0,
                    .eot = 1,  // a begin token begins the next story, so it ends this one
                    .says = {1, 0, 1, -1, -1}};
    return pack_vocabulary(&v, section, e);
}

/* ---- Values --------------------------------------------------------------------------------------------------------
   What JSON texts describe and chat templates compute with. Templates never change values once made, so they are
   passed as they are and share their parts. All parts lie in a pool, which is freed as a whole. */

// Only templates have those after IS_DICT.
typedef enum {
    IS_NONE, IS_BOOLEAN, IS_INTEGER, IS_FLOAT, IS_STRING, IS_LIST, IS_DICT,
    IS_TUPLE, IS_UNDEFINED, IS_NAMESPACE, IS_LOOP, IS_MACRO, IS_FUNCTION,
    N_VALUE_KINDS
} ValueKind;

typedef struct Value {
    ValueKind kind;
    size_t n;  // bytes of a string, items of a list; of a dict the keys and values, which follow each other in turn
    union {
        bool truth;
        int64_t integer;
        double number;
        const char *text;
        struct Value *items;
        const struct Node *node;  // of a macro
    };
    union {
        const char *marks;     // of a string, for each byte: 1 if a template spelled it. NULL: none of them
        struct Scope *scope;   // a namespace's variables, those that a macro sees
        size_t at;             // of a loop: the index of its item
    };
} Value;

// Memory in blocks, each twice as large as the one before.
typedef struct PoolBlock { struct PoolBlock *before; size_t used, size; } PoolBlock;
typedef struct { PoolBlock *last; } Pool;

static void free_pool(Pool *a) {
    for (PoolBlock *block = a->last, *before; block; block = before) {
        before = block->before;
        free(block);
    }
    a->last = NULL;
}

// n bytes for values or text; NULL: no memory.
static void *reserve(Pool *a, size_t n, Error *e) {
    PoolBlock *last = a->last;
    size_t needed = round_up(n, sizeof(Value));
    if (!last || needed > last->size - last->used) {
        size_t size = last ? 2 * last->size : 1 << 12;
        if (size < needed) size = needed;
        PoolBlock *block = allocate(1, plus(round_up(sizeof *block, sizeof(Value)), size), e);
        if (!block) return NULL;
        *block = (PoolBlock){last, 0, size};
        a->last = last = block;
    }
    char *at = (char *)last + round_up(sizeof *last, sizeof(Value)) + last->used;
    last->used += needed;
    return at;
}

// Appends an item to a list that is being made. Its room is a power of two and doubles when it is full.
static bool push_value(Pool *a, Value *list, Value item, Error *e) {
    if ((list->n & (list->n - 1)) == 0) {
        Value *items = reserve(a, times(list->n ? 2 * list->n : 1, sizeof item), e);
        if (!items) return false;
        if (list->n) memcpy(items, list->items, list->n * sizeof item);
        list->items = items;
    }
    list->items[list->n++] = item;
    return true;
}

static Value integer(int64_t i) { return (Value){.kind = IS_INTEGER, .integer = i}; }
static Value boolean(bool b) { return (Value){.kind = IS_BOOLEAN, .truth = b}; }
static Value real(double x) { return (Value){.kind = IS_FLOAT, .number = x}; }
static Value string(const char *s) { return (Value){.kind = IS_STRING, .text = s, .n = strlen(s)}; }
static bool same_text(Value s, const char *text) { return s.n == strlen(text) && !memcmp(s.text, text, s.n); }

// The value of a dict's key, or NULL; also where v is no dict.
static const Value *find_member(const Value *v, const char *key) {
    for (size_t i = 0; v->kind == IS_DICT && i < v->n; i += 2)
        if (v->items[i].kind == IS_STRING && same_text(v->items[i], key)) return &v->items[i + 1];
    return NULL;
}

/* ---- JSON ----------------------------------------------------------------------------------------------------------
   A reader of RFC 8259, strict, but that a byte order mark is skipped. Integers have 64 bits. Of equal keys the last
   one's value counts, at the first one's place, as in Python. */

enum { MAX_JSON_DEPTH = 100, MAX_JSON_KEYS = 1000 };  // of a dict: each is compared with all others

typedef struct {
    const char *start, *at, *end;
    int depth;
    Pool *pool;
    Error *e;
} JsonReader;

static bool json_error(JsonReader *r, const char *at, const char *what) {
    size_t line = 1, column = 1;
    for (const char *p = r->start; p < at; p++, column++) if (*p == '\n') line++, column = 0;
    return refuse(r->e, "line %zu, column %zu is not JSON: %s", line, column, what);
}

// The next character after white space; 0 at the end.
static char next_json(JsonReader *r) {
    while (r->at < r->end && memchr(" \t\r\n", *r->at, 4)) r->at++;
    return r->at < r->end ? *r->at : 0;
}

// The character that the escape at s stands for: a backslash with one of `letters`, or \u and four digits, twice above
// U+FFFF. Reading ends at the quote after it. Returns its length, 0 if it is unknown; the character is NOT_UTF8 if it
// is half of such a pair.
static size_t read_escape(const char *s, const char *letters, const char *meanings, uint32_t *code) {
    const char *letter = s[1] ? strchr(letters, s[1]) : NULL;
    if (letter) return *code = (unsigned char)meanings[letter - letters], 2;
    *code = s[1] == 'u' ? read_digits(s + 2, 4) : NOT_UTF8;
    if (*code == NOT_UTF8) return 0;
    if (*code < 0xD800 || *code > 0xDFFF) return 6;
    uint32_t low = s[6] == '\\' && s[7] == 'u' ? read_digits(s + 8, 4) : 0;
    bool is_pair = *code < 0xDC00 && low > 0xDBFF && low < 0xE000;
    *code = is_pair ? 0x10000 + ((*code - 0xD800) << 10) + (low - 0xDC00) : NOT_UTF8;
    return 12;
}

static bool read_json_string(JsonReader *r, Value *v) {
    const char *quote = r->at++, *end = r->at;
    while (end < r->end && *end != '"') end += *end == '\\' ? 2 : 1;
    if (end >= r->end) return json_error(r, quote, "a string without an end");
    char *to = reserve(r->pool, (size_t)(end - r->at), r->e);  // no escape is shorter than its character
    if (!to) return false;
    *v = (Value){.kind = IS_STRING, .text = to};
    while (r->at < end) {
        uint32_t code = 0;
        int length = read_character(r->at, (size_t)(end - r->at), &code);
        if (length <= 0) return json_error(r, r->at, "bytes that are not UTF-8");
        if (code < 32) return json_error(r, r->at, "a control character in a string");
        if (code == '\\')
            length = (int)read_escape(r->at, "\"\\/bfnrt", "\"\\/\b\f\n\r\t", &code);
        if (!length) return json_error(r, r->at, "an unknown escape");
        if (code == NOT_UTF8) return json_error(r, r->at, "half of a surrogate pair");
        r->at += length;
        v->n += write_character(code, to + v->n);
    }
    r->at = end + 1;
    return true;
}

// -? (0 | [1-9][0-9]*) (. [0-9]+)? ([eE] [+-]? [0-9]+)?   Returns its length; 0: none is there, or it is too large.
static size_t scan_number(const char *s, size_t n, Value *v) {
    static const char numerals[] = "0123456789";
    char digits[402] = {0};  // the longest double without an exponent, 5e-324, has 325 places
    size_t sign = *s == '-', length, most = sizeof digits - 3;
    memcpy(digits, s, n < most ? n : most);
    length = sign + strspn(digits + sign, numerals);
    size_t whole = length, exponent;
    if (length == sign || (digits[sign] == '0' && length > sign + 1)) return 0;
    if (digits[length] == '.' && isdigit((unsigned char)digits[length + 1]))
        length += 1 + strspn(digits + length + 1, numerals);
    exponent = length + 1 + (digits[length + 1] == '+' || digits[length + 1] == '-');
    if ((digits[length] == 'e' || digits[length] == 'E') && isdigit((unsigned char)digits[exponent]))
        length = exponent + strspn(digits + exponent, numerals);
    if (length >= most) return 0;
    errno = 0;
    *v = length == whole ? integer(strtoll(digits, NULL, 10)) : real(strtod(digits, NULL));
    return (length == whole ? errno == ERANGE : isinf(v->number)) ? 0 : length;
}

static int compare_strings(const Value *a, const Value *b) {
    int order = memcmp(a->text, b->text, a->n < b->n ? a->n : b->n);
    return order ? order : (a->n > b->n) - (a->n < b->n);
}

static bool read_json(JsonReader *r, Value *v);

// A list or a dict, from its bracket to the one that closes it.
static bool read_json_items(JsonReader *r, Value *v) {
    bool is_dict = *r->at++ == '{';
    char close = is_dict ? '}' : ']';
    *v = (Value){.kind = is_dict ? IS_DICT : IS_LIST};
    if (++r->depth > MAX_JSON_DEPTH) return json_error(r, r->at - 1, "nested too deep");
    for (bool first = true; next_json(r) != close; first = false) {
        Value key, item, *old = NULL;
        if (!first && next_json(r) != ',') return json_error(r, r->at, is_dict ? "no , or }" : "no , or ]");
        if (!first) r->at++;
        if (is_dict) {
            if (next_json(r) != '"') return json_error(r, r->at, "no \" of a key");
            if (!read_json_string(r, &key)) return false;
            if (next_json(r) != ':') return json_error(r, r->at, "expected : after a key");
            r->at++;
            for (size_t i = 0; i < v->n; i += 2) if (!compare_strings(&v->items[i], &key)) old = &v->items[i + 1];
            if (!old && !push_value(r->pool, v, key, r->e)) return false;
            if (v->n > 2 * MAX_JSON_KEYS) return json_error(r, r->at, "a dict of more than 1,000 keys");
        }
        if (!read_json(r, &item)) return false;
        if (old) *old = item;
        else if (!push_value(r->pool, v, item, r->e)) return false;
        if (next_json(r) == close) break;
    }
    r->at++;
    r->depth--;
    return true;
}

static bool read_json(JsonReader *r, Value *v) {
    static const struct { const char *word; Value value; } words[] = {
        {"null", {.kind = IS_NONE}}, {"true", {.kind = IS_BOOLEAN, .truth = true}}, {"false", {.kind = IS_BOOLEAN}},
    };
    char c = next_json(r);
    size_t left = (size_t)(r->end - r->at), length = 0;
    if (c == '"') return read_json_string(r, v);
    if (c == '{' || c == '[') return read_json_items(r, v);
    if (left == 0) return json_error(r, r->at, "unexpected end");
    for (size_t i = 0; i < 3; i++) {
        size_t n = strlen(words[i].word);
        if (left < n || memcmp(r->at, words[i].word, n)) continue;
        *v = words[i].value;
        length = n;
    }
    if (!length) length = scan_number(r->at, left, v);
    r->at += length;
    return length || json_error(r, r->at, "neither a value nor a number, or one that is too large");
}

// Reads the n bytes as one value. Its parts lie in the pool, none in `text`.
static bool parse_json(const char *text, size_t n, Pool *pool, Value *v, Error *e) {
    if (n == 0) text = "";
    JsonReader r = {text, text, text + n, 0, pool, e};
    if (n >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3)) r.at += 3;
    if (!read_json(&r, v)) return false;
    next_json(&r);
    return r.at == r.end || json_error(&r, r.at, "something after the value");
}

/* ---- Chat templates -----------------------------------------------------------------------------------------------
   The form of a chat is a program in the language Jinja, which comes with the model: text with {{ expressions }},
   {% statements %} and {# comments #} in it. This is an interpreter of the part that published templates use, with the
   results of jinja2 as transformers sets it up (trim_blocks, lstrip_blocks, a sandbox in which nothing can be changed).
   Where Python has generators and views, here are lists.

   A template is read once: functions parse_...(), one for each rule of the grammar, make a tree of it. Then the tree's
   nodes are evaluated. After an error the reader sees LEX_END, which no rule accepts, and no node is evaluated:
   everything ends, and few places have to look for errors.

   A template is bytes from a stranger. Its work is counted (in bytes copied, or as much as that takes) and limited,
   and with it time, memory and output; so is its depth. Each byte of a string is marked if the template itself spelled
   it: these alone may become control tokens. */

// The deepest takes at most 139 KB of stack (293 KB without optimisation). The last is the sandbox's.
enum { MAX_TEMPLATE_BYTES = 1 << 20, MAX_TEMPLATE_DEPTH = 200, MAX_RANGE = 100000 };
enum { MAX_TEMPLATE_WORK = 1 << 25, NODE_WORK = 8 };  // half a second; what it costs to evaluate a node

typedef enum { LEX_NAME, LEX_STRING, LEX_NUMBER, LEX_SIGN, LEX_CLOSE, LEX_END } LexemeKind;

// What a node is, and what hangs on it. A list goes from its first node by `next`.
typedef enum {
    NODE_CONSTANT, NODE_VARIABLE,           // value: itself; its name
    NODE_LIST, NODE_TUPLE, NODE_DICT,       // second: list of items; of keys and values in turn
    NODE_MEMBER, NODE_ITEM,                 // first.value; first[second]
    NODE_SLICE,                             // first[second], a list of three
    NODE_FILTER, NODE_TEST, NODE_METHOD,    // first|value(second); first is value(second); first.value(second), a list
    NODE_CALL,                              // first(second), a list
    NODE_NAMED,                             // value=second: an argument, a parameter; value second: < b of a < b < c
    NODE_COMPARE,                           // first, and what follows it: a list
    NODE_NOT, NODE_SIGN,                    // not first; value, + or -, before first
    NODE_AND, NODE_OR, NODE_COMPUTE,        // value, the operator, between first and second: the last to have an `up`
    NODE_CAPTURE,                           // the text of `body`
    NODE_OUTPUT,                            // {{ first }}
    NODE_IF,                                // if first, then body, else otherwise: statements, or an expression
    NODE_FOR,                               // body for second (targets) in first, whose `next` is the condition
    NODE_SET,                               // second (targets) = first
    NODE_MACRO,                             // value: the name; second: parameters; body
    NODE_BREAK, NODE_CONTINUE
} NodeKind;

typedef struct Node {
    NodeKind kind;
    size_t from;          // where it is in the source
    Value value;
    struct Node *first, *second, *body, *otherwise, *next;
    struct Node *up;      // of an expression that is another's first: that one
} Node;

typedef struct Scope { struct Scope *outer; Value variables; } Scope;  // a dict
typedef struct { Value list, named; } Arguments;

// What has been rendered.
typedef struct {
    Buffer text, marks;  // bytes, and for each 1 if the template spelled it, or 0
} Rendered;

static void free_rendered(Rendered *r) {
    free(r->text.bytes);
    free(r->marks.bytes);
}

typedef struct {
    const char *source, *ones;  // with \n at the ends of lines, and zeros after it; marks for strings of the template
    size_t n_source, at, work_left;
    size_t from;                // where the lexeme or node is that is read or evaluated
    LexemeKind lexeme;          // the next one in a tag: of which kind, ...
    Value word, constant;       // ... as it is spelled, and the string or number that it means
    const char *closing;        // what ends the tag, unless brackets are open
    int n_open, n_loops, n_for; // brackets; loops round the place that is read, in its macro; round its macro, too
    Node spare;                 // stands for any node when there is no memory
    int depth;
    bool failed;
    enum { STAYS, BREAKS, GOES_ON } leaves;  // what `break` and `continue` set
    const struct tm *now;
    Scope *scope;
    Rendered *out;              // also where strings are made: at its end, from where take_string_from() takes them
    Pool pool;
    Error *e;
} Template;

static const Value undefined = {.kind = IS_UNDEFINED, .text = ""};
static const Value absent = {.kind = IS_UNDEFINED, .text = "absent"};  // an argument that is not given
static bool is_given(Value argument) { return argument.kind != IS_UNDEFINED || argument.text != absent.text; }

// Ends the run, with the one line of error that it will give. Only the first counts.
__attribute__((format(printf, 3, 4))) static Value stop(Template *j, int status, const char *format, ...) {
    char what[240];
    va_list list;
    va_start(list, format);
    vsnprintf(what, sizeof what, format, list);
    va_end(list);
    int line = 1;
    for (size_t i = 0; i < j->from && i < j->n_source; i++) line += j->source[i] == '\n';
    if (!j->failed) fail(j->e, status, "the chat template, line %d: %s", line, what);
    j->failed = true;
    j->lexeme = LEX_END;
    return undefined;
}

static Value lacks(Template *j, const char *what, Value name) {
    return stop(j, BAD_FILE, "%s %.*s is not supported; --template takes another template", what,
                (int)(name.n < 60 ? name.n : 60), name.text);
}

// A value of a kind that does not fit. An undefined one answers which one it is.
static Value complain(Template *j, const char *what, Value v) {
    static const char *const names[N_VALUE_KINDS] = {
        "None", "bool", "int", "float", "str", "list", "dict", "tuple", "undefined", "namespace", "loop", "macro",
        "function",
    };
    if (v.kind != IS_UNDEFINED) return stop(j, MISUSE, "%s of a value of type %s", what, names[v.kind]);
    return stop(j, MISUSE, "'%.*s' is undefined", (int)(v.n < 60 ? v.n : 60), v.text);
}

// Counts work. False after an error.
static bool spend(Template *j, size_t n) {
    if (n > j->work_left) stop(j, NO_ROOM, "it takes too long, or too much memory");
    else j->work_left -= n;
    return !j->failed;
}

static bool enter(Template *j) {
    if (++j->depth > MAX_TEMPLATE_DEPTH) stop(j, BAD_FILE, "nested too deep, or an endless recursion");
    return spend(j, NODE_WORK);
}

static void *get_memory(Template *j, size_t n) {
    void *p = spend(j, n) ? reserve(&j->pool, n, j->e) : NULL;
    if (!p && !j->failed) stop(j, NO_MEMORY, "no memory");
    return p;
}

static void push(Template *j, Value *list, Value item) {
    if (j->failed || !spend(j, 2 * sizeof item)) return;
    if (!push_value(&j->pool, list, item, j->e)) stop(j, NO_MEMORY, "no memory");
}

static Value part_of(Value s, size_t from, size_t to) {
    return (Value){.kind = IS_STRING, .n = to - from, .text = s.text + from, .marks = s.marks ? s.marks + from : NULL};
}

static bool has_word(const char *words, Value name) {
    for (size_t n; *words; words += n + (words[n] == ' ')) {
        n = strcspn(words, " ");
        if (n == name.n && !memcmp(words, name.text, n)) return true;
    }
    return false;
}

// Appends bytes to what is rendered.
static void add_bytes(Template *j, const char *text, size_t n, const char *marks) {
    if (n == 0 || !spend(j, times(n, 2))) return;
    bool ok = append(&j->out->text, text, n, j->e) && append(&j->out->marks, marks, n, j->e);
    if (!ok) stop(j, NO_MEMORY, "no memory");
}
static void put_string(Template *j, Value s) { add_bytes(j, s.text, s.n, s.marks); }
static void add_text(Template *j, const char *text) { add_bytes(j, text, strlen(text), NULL); }

// Takes back what was put since the output had n bytes, as a string.
static Value take_string_from(Template *j, size_t n) {
    size_t length = j->out->text.n - n;
    char *copy = get_memory(j, 2 * length);
    if (!copy) return undefined;
    if (length) memcpy(copy, j->out->text.bytes + n, length);
    if (length) memcpy(copy + length, j->out->marks.bytes + n, length);
    j->out->text.n = j->out->marks.n = n;
    return (Value){.kind = IS_STRING, .n = length, .text = copy, .marks = copy + length};
}

// The bytes of the character at s; a byte that is not UTF-8 counts as one.
static size_t character(const char *s, size_t n, uint32_t *code) {
    int length = read_character(s, n, code);
    return length > 0 ? (size_t)length : 1;
}

// What Python's strip() and split() remove.
static bool is_white(uint32_t c) { return is_space(c) || (c >= 28 && c <= 31); }

// A string without the characters at its start and its end that are in `set`, or are white space.
static Value strip(Value s, bool start, bool end, const Value *set) {
    size_t from = 0, to = s.n, length;
    uint32_t c;
    for (; start && from < to; from += length) {
        length = character(s.text + from, to - from, &c);
        if (set ? !memmem(set->text, set->n, s.text + from, length) : !is_white(c)) break;
    }
    for (; end && to > from; to -= length) {
        for (length = 1; length < 4 && length < to - from && (s.text[to - length] & 0xC0) == 0x80;) length++;
        if (character(s.text + to - length, length, &c) != length) length = 1, c = 0;
        if (set ? !memmem(set->text, set->n, s.text + to - length, length) : !is_white(c)) break;
    }
    return part_of(s, from, to);
}

/* ---- Chat templates: lexemes ---- */

// A string of the template: the bytes from `from` to `to` of its source.
static Value spelled(const Template *j, size_t from, size_t to) {
    return (Value){.kind = IS_STRING, .text = j->source + from, .n = to - from, .marks = j->ones};
}

// Reads the string whose quote is at s, with Python's escapes. Returns its length.
static size_t read_string(Template *j, const char *s) {
    const char *end = s + 1, *past = j->source + j->n_source;
    while (end < past && *end != *s) end += *end == '\\' ? 2 : 1;
    char *to = end < past ? get_memory(j, (size_t)(end - s)) : NULL;
    if (!to) return stop(j, BAD_FILE, "a string without an end"), 1;
    j->constant = (Value){.kind = IS_STRING, .text = to, .marks = j->ones};
    for (const char *at = s + 1; at < end;) {
        uint32_t code;
        size_t n = 0, n_digits = *at != '\\' ? 0 : at[1] == 'x' ? 2 : at[1] == 'U' ? 8 : 0;
        for (code = 0; *at == '\\' && n < 3 && (at[n + 1] & 0xF8) == '0'; n++) code = 8 * code + (at[n + 1] & 7);
        n += n > 0;  // \ and its octal digits
        if (n_digits) n = (code = read_digits(at + 2, n_digits)) < 0x110000 && code >> 11 != 27 ? 2 + n_digits : 0;
        else if (*at == '\\' && !n) n = read_escape(at, "\\'\"abfnrtv", "\\'\"\a\b\f\n\r\t\v", &code);
        if (*at == '\\' && (n ? code == NOT_UTF8 : memchr("NUux\n", at[1], 5) != NULL))
            return stop(j, BAD_FILE, "the escape \\%c is not supported", at[1]), 1;
        if (n) j->constant.n += write_character(code, to + j->constant.n);
        else to[j->constant.n++] = *at;  // the backslash of an unknown escape stays
        at += n ? n : 1;
    }
    return (size_t)(end - s) + 1;
}

// Goes on to the next lexeme of a tag.
static void next_lexeme(Template *j) {
    static const char pairs[][3] = {"==", "!=", "<=", ">=", "//", "**"};
    const char *s = j->source + j->at;
    size_t n;
    uint32_t code;
    if (j->failed) return;
    for (; n = character(s, 4, &code), is_white(code); s += n) {}
    j->from = (size_t)(s - j->source);
    j->constant = undefined;
    size_t left = j->n_source - j->from, sign = *s == '-' || (*s == '+' && *j->closing == '%');
    for (n = 0; isalnum((unsigned char)s[n]) || s[n] == '_' || s[n] & 0x80; n++) {}
    if (j->n_open <= 0 && s[sign] == *j->closing && s[sign + 1] == '}') j->lexeme = LEX_CLOSE, n = sign + 2;
    else if (left == 0) stop(j, BAD_FILE, "a tag without %s", j->closing);
    else if (*s == '\'' || *s == '"') j->lexeme = LEX_STRING, n = read_string(j, s);
    else if (isdigit((unsigned char)*s)) {
        size_t length = scan_number(s, left, &j->constant);
        if (!length || s[length] == '_' || isalnum((unsigned char)s[length]))
            lacks(j, "the number", spelled(j, j->from, j->from + n));
        j->lexeme = LEX_NUMBER, n = length;
    } else if (n) j->lexeme = LEX_NAME;
    else {
        j->lexeme = LEX_SIGN, n = 1;
        for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++) if (!memcmp(s, pairs[i], 2)) n = 2;
        j->n_open += memchr("([{", *s, 3) ? 1 : memchr(")]}", *s, 3) ? -1 : 0;
        if (n == 1 && !memchr("([{)]}+-/*%~<>=.:|,", *s, 19)) stop(j, BAD_FILE, "an unexpected character");
        if (*s == '*' && n == 2) lacks(j, "the operator", string("**"));
    }
    if (j->failed) j->lexeme = LEX_END;
    j->word = spelled(j, j->from, j->from + n);
    j->at = j->from + n;
}

static bool sees(const Template *j, const char *what) {
    return (j->lexeme == LEX_NAME || j->lexeme == LEX_SIGN) && same_text(j->word, what);
}

static bool take_word(Template *j, const char *what) {
    bool found = sees(j, what);
    if (found) next_lexeme(j);
    return found;
}

static void expect(Template *j, const char *what) {
    if (!take_word(j, what))
        stop(j, BAD_FILE, "expected %s, found %.*s", what, (int)(j->word.n < 40 ? j->word.n : 40), j->word.text);
}

static Value take_name(Template *j) {
    Value name = j->word;
    if (j->lexeme == LEX_NAME) next_lexeme(j);
    else expect(j, "a name");
    return name;
}

// Begins the tag, or passes over the comment, that is here. Returns the character after its {.
static char open_tag(Template *j) {
    const char *s = j->source + j->at, *end;
    j->from = j->at;
    j->at += 2 + (s[2] == '-' || s[2] == '+');
    j->n_open = 0;
    j->closing = s[1] == '{' ? "}}" : s[1] == '%' ? "%}" : "#}";
    if (s[1] != '#') {
        next_lexeme(j);
        return s[1];
    }
    end = memmem(j->source + j->at, j->n_source - j->at, "#}", 2);
    if (!end) return stop(j, BAD_FILE, "a comment without #}"), s[1];
    size_t close = (size_t)(end - j->source), sign = close > j->at && (end[-1] == '-' || end[-1] == '+');
    j->lexeme = LEX_CLOSE;
    j->word = spelled(j, close - sign, close + 2);
    j->at = close + 2;
    return s[1];
}

// Ends a tag or comment, and passes over the white space that it removes: after - all; else a line end, if it is no
// output and has no +.
static void close_tag(Template *j) {
    char sign = *j->word.text;
    if (j->lexeme != LEX_CLOSE) expect(j, "the tag's end");
    else if (sign == '-') j->at = j->n_source - strip(spelled(j, j->at, j->n_source), true, false, NULL).n;
    else if (sign != '+' && sign != '}' && j->source[j->at] == '\n') j->at++;
}

// Reads the text before the next tag, and stops there. The tag can remove white space from its end: with - all; else,
// if it is no output and has no +, what indents it in its line.
static Value read_plain(Template *j) {
    const char *s = j->source;
    size_t from = j->at, end = from, line;
    while (end < j->n_source && !(s[end] == '{' && memchr("{%#", s[end + 1], 3))) end++;
    j->from = from;
    j->at = line = end;
    while (line > from && s[line - 1] != '\n') line--;
    bool is_indent = (line == 0 || s[line - 1] == '\n') && strip(spelled(j, line, end), true, false, NULL).n == 0;
    if (end == j->n_source) return spelled(j, from, end);
    if (s[end + 2] == '-') end = from + strip(spelled(j, from, end), false, true, NULL).n;
    else if (s[end + 2] != '+' && s[end + 1] != '{' && is_indent) end = line;
    return spelled(j, from, end);
}

/* ---- Chat templates: reading expressions ---- */

static Node *parse_expression(Template *j);
static Node *parse_binary(Template *j, int least);

// A node begins where its first part does.
static Node *new_node(Template *j, NodeKind kind, Value value, Node *first, Node *second) {
    Node *x = get_memory(j, sizeof *x);
    if (!x) x = &j->spare;
    *x = (Node){.kind = kind, .from = first ? first->from : j->from, .value = value, .first = first, .second = second};
    if (first && kind <= NODE_COMPUTE) first->up = x;
    return x;
}

// Refuses an argument or parameter that has the name of one before.
static void check_names(Template *j, const Node *list) {
    for (const Node *x = list; x && !j->failed; x = x->next)
        for (const Node *y = list; x->kind == NODE_NAMED && y != x && spend(j, 1); y = y->next)
            if (y->kind == NODE_NAMED && y->value.n == x->value.n && !compare_strings(&y->value, &x->value))
                stop(j, BAD_FILE, "%.*s is given twice", (int)(x->value.n < 60 ? x->value.n : 60), x->value.text);
}

// Reads what stands in brackets, up to `end`: items, keys and values in turn, arguments or parameters.
static Node *parse_items(Template *j, const char *end) {
    Node *first = NULL, **last = &first;
    bool named = false;
    while (!j->failed && !sees(j, end)) {
        Node *x = *last = parse_expression(j);
        if (*end == '}') {
            expect(j, ":");
            x = x->next = parse_expression(j);
        } else if (*end == ')' && x->kind == NODE_VARIABLE && take_word(j, "=")) {
            x->kind = NODE_NAMED;
            x->second = parse_expression(j);
            named = true;
        } else if (named) stop(j, BAD_FILE, "an argument without a name after one with a name");
        last = &x->next;
        if (!take_word(j, ",")) break;
    }
    check_names(j, first);
    expect(j, end);
    return first;
}

// a, b, c or one value alone; in brackets it may be empty. Where `if` has another meaning, the values are no choices.
static Node *parse_tuple(Template *j, bool choices) {
    if (sees(j, ")")) return new_node(j, NODE_TUPLE, undefined, NULL, NULL);
    Node *first = choices ? parse_expression(j) : parse_binary(j, 0), **last = &first->next;
    if (!sees(j, ",")) return first;
    for (; take_word(j, ",") && j->lexeme != LEX_CLOSE && !sees(j, ")"); last = &(*last)->next)
        *last = choices ? parse_expression(j) : parse_binary(j, 0);
    return new_node(j, NODE_TUPLE, undefined, NULL, first);
}

// Whether a value begins here that is not in round brackets.
static bool sees_value(const Template *j) {
    return j->lexeme == LEX_STRING || j->lexeme == LEX_NUMBER || sees(j, "[") || sees(j, "{") ||
           (j->lexeme == LEX_NAME && !has_word("or and in not if else is", j->word));
}

static Node *parse_primary(Template *j) {
    Node *x = new_node(j, NODE_CONSTANT, j->constant, NULL, NULL);
    Value name = j->word;
    LexemeKind lexeme = j->lexeme;
    if (take_word(j, "(")) {
        x = parse_tuple(j, true);
        expect(j, ")");
        return x;
    }
    if (!sees_value(j)) return expect(j, "a value"), x;
    next_lexeme(j);
    if (lexeme == LEX_SIGN) {
        x->kind = *name.text == '[' ? NODE_LIST : NODE_DICT;
        x->second = parse_items(j, *name.text == '[' ? "]" : "}");
    } else if (lexeme == LEX_NAME) {
        x->value = name;
        if (has_word("true True false False", name)) x->value = boolean(*name.text == 't' || *name.text == 'T');
        else if (has_word("none None", name)) x->value = (Value){.kind = IS_NONE};
        else x->kind = NODE_VARIABLE;
    }
    for (; lexeme == LEX_STRING && j->lexeme == LEX_STRING; next_lexeme(j))
        x = new_node(j, NODE_COMPUTE, string("~"), x, new_node(j, NODE_CONSTANT, j->constant, NULL, NULL));
    return x;
}

// [index] or [from:to:step]
static Node *parse_subscript(Template *j, Node *of) {
    Node *x = new_node(j, NODE_ITEM, undefined, of, NULL), **last = &x->second;
    if (sees(j, "]")) expect(j, "an index");
    for (int i = 0; i < 3; i++, last = &(*last)->next) {
        bool given = !sees(j, ":") && !sees(j, "]");
        *last = given ? parse_expression(j) : new_node(j, NODE_CONSTANT, (Value){.kind = IS_NONE}, NULL, NULL);
        if (i < 2 && take_word(j, ":")) x->kind = NODE_SLICE;
    }
    expect(j, "]");
    return x;
}

static Node *parse_filter(Template *j, Node *of) {
    Node *x = new_node(j, NODE_FILTER, take_name(j), of, NULL);
    if (take_word(j, "(")) x->second = parse_items(j, ")");
    return x;
}

static Node *parse_postfix(Template *j, Node *x, bool filters);

// not name argument
static Node *parse_test(Template *j, Node *of) {
    bool negated = take_word(j, "not");
    Node *x = new_node(j, NODE_TEST, take_name(j), of, NULL);
    if (take_word(j, "(")) x->second = parse_items(j, ")");
    else if (sees(j, "is")) stop(j, BAD_FILE, "a test of a test: ( ) are missing");
    else if (sees_value(j)) x->second = parse_postfix(j, parse_primary(j), false);
    return negated ? new_node(j, NODE_NOT, undefined, x, NULL) : x;
}

// What follows a value: .member [index] (call) and, if they may, | filter and `is` test.
static Node *parse_postfix(Template *j, Node *x, bool filters) {
    for (bool filtered = false; !j->failed;) {
        if (!filtered && take_word(j, ".")) x = new_node(j, NODE_MEMBER, take_name(j), x, NULL);
        else if (!filtered && take_word(j, "[")) x = parse_subscript(j, x);
        else if (!filtered && take_word(j, "(")) {
            if (x->kind == NODE_MEMBER) x->kind = NODE_METHOD;
            else x = new_node(j, NODE_CALL, undefined, x, NULL);
            x->second = parse_items(j, ")");
        }
        else if (filters && take_word(j, "|")) x = parse_filter(j, x), filtered = true;
        else if (filters && take_word(j, "is")) x = parse_test(j, x), filtered = true;
        else break;
    }
    return x;
}

static Node *parse_unary(Template *j, bool filters) {
    Value sign = j->word;
    Node *x = &j->spare;
    if (enter(j)) {
        bool is_signed = take_word(j, "-") || take_word(j, "+");
        x = is_signed ? new_node(j, NODE_SIGN, sign, parse_unary(j, false), NULL) : parse_primary(j);
        x = parse_postfix(j, x, filters);
    }
    j->depth--;
    return x;
}

enum { LEVEL_OR = 1, LEVEL_AND, LEVEL_NOT, LEVEL_COMPARE, LEVEL_ADD };

// How tight the operator that is here binds; 0: it is none.
static int see_level(const Template *j) {
    static const char *const signs[] = {"or", "and", "", "in not == != <= >= < >", "+ -", "~", "// * / %"};
    int level = sizeof signs / sizeof *signs;
    if (j->lexeme != LEX_NAME && j->lexeme != LEX_SIGN) return 0;
    while (level > 0 && !has_word(signs[level - 1], j->word)) level--;
    return level;
}

// Operators that bind at least as tight as `least`: all take their left operand first, but a < b < c is one node.
static Node *parse_binary(Template *j, int least) {
    Node *left, **last = NULL;
    if (least <= LEVEL_NOT && take_word(j, "not")) {
        left = new_node(j, NODE_NOT, undefined, enter(j) ? parse_binary(j, LEVEL_NOT) : NULL, NULL);
        j->depth--;
    } else left = parse_unary(j, true);
    for (int level; (level = see_level(j)) && level >= least;) {
        Value sign = j->word;
        NodeKind kind = level == LEVEL_OR ? NODE_OR : level == LEVEL_AND ? NODE_AND
                      : level == LEVEL_COMPARE ? NODE_COMPARE : NODE_COMPUTE;
        next_lexeme(j);
        if (same_text(sign, "not")) expect(j, "in");
        Node *right = parse_binary(j, level + 1);
        if (level != LEVEL_COMPARE || !last) left = new_node(j, kind, sign, left, right), last = NULL;
        if (level != LEVEL_COMPARE) continue;
        if (!last) last = &left->second;
        *last = new_node(j, NODE_NAMED, sign, NULL, right);
        last = &(*last)->next;
    }
    return left;
}

// value if condition else other
static Node *parse_expression(Template *j) {
    Node *x = enter(j) ? parse_binary(j, 0) : &j->spare;
    while (take_word(j, "if")) {
        Node *choice = new_node(j, NODE_IF, undefined, parse_binary(j, 0), NULL);
        choice->body = x;
        if (take_word(j, "else")) choice->otherwise = parse_expression(j);
        x = choice;
    }
    j->depth--;
    return x;
}

/* ---- Chat templates: reading statements ---- */

static Node *parse_statement(Template *j);

// Reads up to a statement that is one of `ends`, and stands on its name.
static Node *parse_body(Template *j, const char *ends) {
    Node *first = NULL, **last = &first;
    const char *end = strrchr(ends, ' ');
    if (*ends) close_tag(j);
    for (bool ok = enter(j); ok && !j->failed; last = *last ? &(*last)->next : last) {
        Value text = read_plain(j);
        if (text.n) {
            *last = new_node(j, NODE_OUTPUT, undefined, new_node(j, NODE_CONSTANT, text, NULL, NULL), NULL);
            last = &(*last)->next;
        }
        if (j->at == j->n_source && *ends) stop(j, BAD_FILE, "%s is missing", end ? end + 1 : ends);
        if (j->at == j->n_source) break;
        char what = open_tag(j);
        if (what == '%' && j->lexeme == LEX_NAME && has_word(ends, j->word)) break;
        if (what == '%') *last = parse_statement(j);
        if (what == '{') *last = new_node(j, NODE_OUTPUT, undefined, parse_tuple(j, true), NULL);
        close_tag(j);
    }
    j->depth--;
    return first;
}

// Reads a body. Loops round it reach into it, unless it is called.
static Node *parse_block(Template *j, const char *end, bool called) {
    int n_loops = j->n_loops;
    if (called) j->n_loops = 0;
    Node *body = parse_body(j, end);
    j->n_loops = n_loops;
    expect(j, end);
    return body;
}

// A block whose text is a value, with the filters that stand here.
static Node *parse_capture(Template *j, const char *end, bool filtered) {
    Node *capture = new_node(j, NODE_CAPTURE, undefined, NULL, NULL), *x = capture;
    while (filtered) {
        x = parse_filter(j, x);
        filtered = take_word(j, "|");
    }
    capture->body = parse_block(j, end, same_text(string(end), "endgeneration"));
    return x;
}

// Refuses a name that cannot be set: a constant's, and in a `for` that of the loop.
static void check_target(Template *j, Value name) {
    if (has_word("true True false False none None", name) || (j->n_for && same_text(name, "loop")))
        stop(j, BAD_FILE, "%.*s cannot be set here", (int)name.n, name.text);
}

// a or space.a or a, b
static Node *parse_targets(Template *j) {
    Node *first = NULL, **last = &first;
    do {
        Node *x = new_node(j, NODE_VARIABLE, take_name(j), NULL, NULL);
        bool is_member = take_word(j, ".");
        if (!is_member) check_target(j, x->value);
        *last = is_member ? new_node(j, NODE_MEMBER, take_name(j), x, NULL) : x;
        last = &(*last)->next;
    } while (take_word(j, ","));
    return first;
}

static Node *parse_if(Template *j) {
    Node *first = NULL, **last = &first;
    do {
        Node *x = *last = new_node(j, NODE_IF, undefined, parse_tuple(j, false), NULL);
        x->body = parse_body(j, "elif else endif");
        last = &x->otherwise;
    } while (take_word(j, "elif"));
    if (take_word(j, "else")) *last = parse_body(j, "endif");
    expect(j, "endif");
    return first;
}

static Node *parse_for(Template *j) {
    j->n_for++;
    Node *x = new_node(j, NODE_FOR, undefined, NULL, parse_targets(j));
    expect(j, "in");
    x->first = parse_tuple(j, false);
    if (take_word(j, "if")) x->first->next = parse_expression(j);
    if (sees(j, "recursive")) lacks(j, "the loop that is", j->word);
    j->n_loops++;
    x->body = parse_body(j, "else endfor");
    j->n_loops--;
    if (take_word(j, "else")) x->otherwise = parse_body(j, "endfor");
    expect(j, "endfor");
    j->n_for--;
    return x;
}

static Node *parse_set(Template *j) {
    Node *targets = parse_targets(j), *v;
    v = take_word(j, "=") ? parse_tuple(j, true) : parse_capture(j, "endset", take_word(j, "|"));
    return new_node(j, NODE_SET, undefined, v, targets);
}

static Node *parse_macro(Template *j) {
    Node *x = new_node(j, NODE_MACRO, take_name(j), NULL, NULL);
    if (!same_text(x->value, "loop")) check_target(j, x->value);
    expect(j, "(");
    x->second = parse_items(j, ")");
    for (Node *p = x->second; p && !j->failed; p = p->next) {
        if (p->kind != NODE_VARIABLE && p->kind != NODE_NAMED) stop(j, BAD_FILE, "a parameter that is no name");
        p->kind = NODE_NAMED;
    }
    check_names(j, x->second);
    x->body = parse_block(j, "endmacro", true);
    return x;
}

static Node *parse_statement(Template *j) {
    Value name = take_name(j);
    if (same_text(name, "if")) return parse_if(j);
    if (same_text(name, "for")) return parse_for(j);
    if (same_text(name, "set")) return parse_set(j);
    if (same_text(name, "macro")) return parse_macro(j);
    bool is_filter = same_text(name, "filter");
    if (is_filter || same_text(name, "generation")) {  // the latter is noted for training
        Node *x = parse_capture(j, is_filter ? "endfilter" : "endgeneration", is_filter);
        return new_node(j, NODE_OUTPUT, undefined, x, NULL);
    }
    if (!has_word("break continue", name)) lacks(j, "the statement", name);
    else if (j->n_loops == 0) stop(j, BAD_FILE, "%.*s outside of a loop", (int)name.n, name.text);
    return new_node(j, *name.text == 'b' ? NODE_BREAK : NODE_CONTINUE, undefined, NULL, NULL);
}

/* ---- Chat templates: values ---- */

static bool is_list(Value v) { return v.kind == IS_LIST || v.kind == IS_TUPLE; }
static bool is_whole(Value v) { return v.kind == IS_BOOLEAN || v.kind == IS_INTEGER; }
static bool is_number(Value v) { return is_whole(v) || v.kind == IS_FLOAT; }
static bool is_missing(Value v) { return v.kind == IS_NONE || v.kind == IS_UNDEFINED; }
static int64_t as_integer(Value v) { return v.kind == IS_BOOLEAN ? v.truth : v.integer; }
static double as_real(Value v) { return v.kind == IS_FLOAT ? v.number : (double)as_integer(v); }
static Value unknown(Value name) { return (Value){.kind = IS_UNDEFINED, .text = name.text, .n = name.n}; }

static bool is_true(Value v) {
    if (is_whole(v)) return as_integer(v) != 0;
    if (v.kind == IS_FLOAT) return v.number != 0;
    return !is_missing(v) && (v.n > 0 || v.kind > IS_UNDEFINED);
}

// -1, 0, 1: a is less than b, equal, greater; 2: one is NaN. Rounding keeps the order unless both come out equal.
static int compare_numbers(Value a, Value b) {
    double x = as_real(a), y = as_real(b);
    bool a_rounds = a.kind != IS_FLOAT, b_rounds = b.kind != IS_FLOAT;
    if (isnan(x) || isnan(y)) return 2;
    if (x != y || !(a_rounds || b_rounds)) return (x > y) - (x < y);
    if (x >= 0x1p63 && a_rounds != b_rounds) return a_rounds ? -1 : 1;  // the float is no 64-bit integer
    int64_t i = a_rounds ? as_integer(a) : (int64_t)x, k = b_rounds ? as_integer(b) : (int64_t)y;
    return (i > k) - (i < k);
}

static bool is_equal(Template *j, Value a, Value b);

// The value of a dict's key, or NULL.
static Value *find_value(Template *j, Value dict, Value key) {
    for (size_t i = 0; i < dict.n && spend(j, 4); i += 2)
        if (is_equal(j, dict.items[i], key)) return &dict.items[i + 1];
    return NULL;
}

// Refuses what cannot be a key: lists, dicts and tuples of them.
static void check_key(Template *j, Value key) {
    if (key.kind == IS_LIST || key.kind == IS_DICT) complain(j, "a key", key);
    bool enters = key.kind == IS_TUPLE && enter(j);
    for (size_t i = 0; enters && i < key.n && !j->failed; i++) check_key(j, key.items[i]);
    j->depth -= key.kind == IS_TUPLE;
}

// Sets a key of a dict that is being made.
static void set_member(Template *j, Value *dict, Value key, Value value) {
    Value *old = find_value(j, *dict, key);
    check_key(j, key);
    if (old) *old = value;
    else push(j, dict, key), push(j, dict, value);
}

static bool is_equal(Template *j, Value a, Value b) {
    if (is_number(a) && is_number(b)) return compare_numbers(a, b) == 0;
    if (a.kind != b.kind) return false;
    if (is_missing(a)) return true;
    if (a.n != b.n) return false;
    if (a.kind == IS_STRING || a.kind == IS_FUNCTION)
        return spend(j, a.n / 16 + 1) && memcmp(a.text, b.text, a.n) == 0;
    if (a.kind != IS_DICT && !is_list(a)) return a.items == b.items && a.scope == b.scope;
    bool same = enter(j), is_dict = a.kind == IS_DICT;
    for (size_t i = 0; same && i < a.n && spend(j, 4); i += 1 + is_dict) {
        const Value *other = is_dict ? find_value(j, b, a.items[i]) : &b.items[i];
        same = other && is_equal(j, a.items[i + is_dict], *other);
    }
    j->depth--;
    return same && !j->failed;
}

// Whether a < b: numbers, or strings by their characters' codes.
static bool is_less(Template *j, Value a, Value b) {
    if (is_number(a) && is_number(b)) return compare_numbers(a, b) == -1;
    if (a.kind == IS_STRING && b.kind == IS_STRING)
        return spend(j, (a.n < b.n ? a.n : b.n) / 16 + 1) && compare_strings(&a, &b) < 0;
    if (is_list(a) && a.kind == b.kind) lacks(j, "the order of", string("lists"));
    else complain(j, "the order", a.kind == IS_UNDEFINED ? a : b);
    return false;
}

// A float as Python prints it: the fewest digits that give it back.
static void put_real(Template *j, double x, bool json) {
    char digits[40], text[400];
    int precision = 0;
    if (isnan(x)) snprintf(text, sizeof text, json ? "NaN" : "nan");
    else if (isinf(x)) snprintf(text, sizeof text, "%s%s", x < 0 ? "-" : "", json ? "Infinity" : "inf");
    else {
        do snprintf(digits, sizeof digits, "%.*e", precision, x);
        while (strtod(digits, NULL) != x && ++precision < 17);
        int exponent = atoi(strchr(digits, 'e') + 1), places = precision - exponent;
        if (exponent < -4 || exponent >= 16) snprintf(text, sizeof text, "%s", digits);
        else snprintf(text, sizeof text, "%.*f", places > 1 ? places : 1, x);
    }
    add_bytes(j, text, strlen(text), j->ones);
}

// Puts a string as repr() or JSON spell it.
static void put_quoted(Template *j, Value s, bool json) {
    const char *letters = json ? "\b\f\n\r\t" : "\n\r\t", *names = json ? "bfnrt" : "nrt";
    char quote = json || (memchr(s.text, '\'', s.n) && !memchr(s.text, '"', s.n)) ? '"' : '\'', text[16];
    add_bytes(j, &quote, 1, NULL);
    for (size_t i = 0, length; i < s.n && !j->failed; i += length) {
        uint32_t c;
        length = character(s.text + i, s.n - i, &c);
        const char *letter = c && c < 32 ? strchr(letters, (int)c) : NULL;
        bool hidden = is_white(c) || c == 0xAD || (c >= 0x200B && c < 0x2010) || (c >= 0x202A && c < 0x2070) ||
                      c == 0xFEFF || (c >= 0xE000 && c < 0xF900) || (c >= 0xE0000 && c - 0xE0100 > 0xEF);
        bool plain = c >= 32 && c != '\\' && c != (uint32_t)quote && (json || c < 127 || (c > 160 && !hidden));
        if (letter) snprintf(text, sizeof text, "\\%c", names[letter - letters]);
        else if (c == '\\' || c == (uint32_t)quote) snprintf(text, sizeof text, "\\%c", (char)c);
        else snprintf(text, sizeof text, json ? "\\u%04x" : c < 256 ? "\\x%02x" : c < 65536 ? "\\u%04x" : "\\U%08x", c);
        if (plain) put_string(j, part_of(s, i, i + length));
        else add_text(j, text);
    }
    add_bytes(j, &quote, 1, NULL);
}

// Begins a line of JSON, if it has lines: if indent >= 0.
static void put_line(Template *j, int64_t indent, int depth) {
    if (indent < 0) return;
    add_text(j, "\n");
    for (int64_t i = indent * depth; i > 0 && !j->failed; i--) add_text(j, " ");
}

// Puts a value as in a list: as repr() or JSON spell it.
static void put_value(Template *j, Value v, bool json, int64_t indent, int depth) {
    bool is_dict = v.kind == IS_DICT, is_tuple = v.kind == IS_TUPLE && !json;
    char text[24];
    int n = snprintf(text, sizeof text, "%lld", v.kind == IS_INTEGER ? (long long)v.integer : 0);
    if (v.kind == IS_STRING) put_quoted(j, v, json);
    else if (v.kind == IS_NONE) add_text(j, json ? "null" : "None");
    else if (v.kind == IS_BOOLEAN) add_text(j, json ? (v.truth ? "true" : "false") : v.truth ? "True" : "False");
    else if (v.kind == IS_FLOAT) put_real(j, v.number, json);
    else if (v.kind == IS_INTEGER) add_bytes(j, text, (size_t)n, j->ones);
    else if (v.kind == IS_UNDEFINED && !json) add_text(j, "Undefined");
    else if (!is_list(v) && !is_dict) complain(j, json ? "JSON" : "the text", v);
    else if (enter(j)) {
        add_text(j, is_dict ? "{" : is_tuple ? "(" : "[");
        for (size_t i = 0; i < v.n && !j->failed; i += 1 + is_dict) {
            if (i) add_text(j, indent < 0 ? ", " : ",");
            put_line(j, indent, depth + 1);
            if (is_dict && json && v.items[i].kind != IS_STRING) lacks(j, "JSON with", string("a key that is no text"));
            if (is_dict) put_value(j, v.items[i], json, indent, depth + 1);
            if (is_dict) add_text(j, ": ");
            put_value(j, v.items[i + is_dict], json, indent, depth + 1);
        }
        if (v.n) put_line(j, indent, depth);
        add_text(j, is_dict ? "}" : !is_tuple ? "]" : v.n == 1 ? ",)" : ")");
        j->depth--;
    }
}

// Puts a value as str() gives it.
static void put_plain(Template *j, Value v) {
    if (v.kind == IS_STRING) put_string(j, v);
    else if (v.kind != IS_UNDEFINED) put_value(j, v, false, -1, 0);
}

static Value to_string(Template *j, Value v) {
    size_t start = j->out->text.n;
    if (v.kind == IS_STRING) return v;
    put_plain(j, v);
    return take_string_from(j, start);
}

// The items of what a loop can run over, as a list.
static Value list_items(Template *j, Value v) {
    Value list = {.kind = IS_LIST};
    uint32_t c;
    if (is_list(v)) list = v, list.kind = IS_LIST;
    else if (v.kind == IS_DICT)
        for (size_t i = 0; i < v.n; i += 2) push(j, &list, v.items[i]);
    else if (v.kind == IS_STRING)
        for (size_t i = 0, n; i < v.n && !j->failed; i += n) {
            n = character(v.text + i, v.n - i, &c);
            push(j, &list, part_of(v, i, i + n));
        }
    else if (v.kind != IS_UNDEFINED) complain(j, "the items", v);
    return list;
}

/* ---- Chat templates: texts ---- */

// What is done to texts, up to TO_STRING, to lists, up to MAXIMUM (to what is false, up to REJECT_ATTR, nothing), ...
typedef enum {
    LOWER, UPPER, CAPITALIZE, TITLE, TITLE_WORDS, STRIP, LSTRIP, RSTRIP, SPLIT, RSPLIT, REPLACE, FIND, COUNT_TEXT,
    STARTS_WITH, ENDS_WITH, INDENT, TO_STRING,
    MAP, SELECT, REJECT, SELECT_ATTR, REJECT_ATTR,
    UNIQUE, SORT, REVERSE, JOIN, MAKE_LIST, FIRST, LAST, MINIMUM, MAXIMUM,
    VALUES, ITEMS, DICT_SORT, GET, LENGTH, DEFAULT, TO_JSON, TO_INTEGER, TO_FLOAT, ROUND, STRFTIME_NOW, RANGE,
    RAISE_EXCEPTION
} Operation;

// To add one: a row here, and what it does in one of the functions below. Kinds: | a filter, s a string's method, d a
// dict's, f a function. A ! is before the names of parameters that must be given.
typedef struct { const char *kinds, *name; Operation what; const char *parameters; } OperationRow;
static const OperationRow operations[] = {
    {"|s", "upper", UPPER, ""}, {"|s", "lower", LOWER, ""}, {"|s", "capitalize", CAPITALIZE, ""},
    {"|", "title", TITLE_WORDS, ""}, {"s", "title", TITLE, ""}, {"|", "trim", STRIP, "chars"},
    {"s", "strip", STRIP, "chars"}, {"s", "lstrip", LSTRIP, "chars"}, {"s", "rstrip", RSTRIP, "chars"},
    {"s", "split", SPLIT, "sep maxsplit"}, {"s", "rsplit", RSPLIT, "sep maxsplit"},
    {"|s", "replace", REPLACE, "!old !new count"}, {"s", "find", FIND, "!what"}, {"s", "count", COUNT_TEXT, "!what"},
    {"s", "startswith", STARTS_WITH, "!what"}, {"s", "endswith", ENDS_WITH, "!what"},
    {"|", "indent", INDENT, "width first"}, {"|", "string", TO_STRING, ""}, {"|", "safe", TO_STRING, ""},
    {"|", "tojson", TO_JSON, "ensure_ascii indent"}, {"|", "default", DEFAULT, "default_value boolean"},
    {"|", "d", DEFAULT, "default_value boolean"}, {"|", "length", LENGTH, ""}, {"|", "count", LENGTH, ""},
    {"|", "first", FIRST, ""}, {"|", "last", LAST, ""}, {"|", "list", MAKE_LIST, ""}, {"|d", "items", ITEMS, ""},
    {"d", "keys", MAKE_LIST, ""}, {"d", "values", VALUES, ""}, {"d", "get", GET, "!key default"},
    {"|", "reverse", REVERSE, ""}, {"|", "join", JOIN, "d"},
    {"|", "map", MAP, "filter attribute"}, {"|", "select", SELECT, "test value"},
    {"|", "reject", REJECT, "test value"}, {"|", "selectattr", SELECT_ATTR, "!attribute test value"},
    {"|", "rejectattr", REJECT_ATTR, "!attribute test value"}, {"|", "unique", UNIQUE, "case_sensitive attribute"},
    {"|", "sort", SORT, "reverse case_sensitive attribute"},
    {"|", "dictsort", DICT_SORT, "case_sensitive by reverse"}, {"|", "min", MINIMUM, "case_sensitive attribute"},
    {"|", "max", MAXIMUM, "case_sensitive attribute"}, {"|", "int", TO_INTEGER, "default"},
    {"|", "float", TO_FLOAT, "default"}, {"|", "round", ROUND, "precision"},
    {"f", "raise_exception", RAISE_EXCEPTION, "message"}, {"f", "strftime_now", STRFTIME_NOW, "!format"},
    {"f", "range", RANGE, "!1 2 3"},
};
enum { MAX_PARAMETERS = 3 };

// The row of a name, or NULL.
static const OperationRow *find_operation(char kind, Value name) {
    for (size_t i = 0; i < sizeof operations / sizeof *operations; i++)
        if (strchr(operations[i].kinds, kind) && same_text(name, operations[i].name)) return &operations[i];
    return NULL;
}

// Whether a character that is not ASCII is of a script without capital letters, or a sign.
static bool has_one_case(uint32_t c) {
    return (c < 0xC0 && c != 0xAA && c != 0xB5 && c != 0xBA) || (c >= 0x590 && c < 0x10A0) ||
           (c >= 0x2000 && c < 0x2070) || (c >= 0x2500 && c < 0x2C00) || (c >= 0x2E80 && c < 0xA640) ||
           (c >= 0xAC00 && c < 0xFB00) || (c >= 0xFE00 && c < 0xFF20) || c >= 0x1F200;
}

// Changes the case of ASCII letters. A text with others that may have two is refused: there is no table of them here.
static Value change_case(Template *j, Value s, Operation how) {
    char *to = get_memory(j, s.n);
    uint32_t c;
    bool starts = true;
    for (size_t i = 0, n; to && i < s.n; i += n) {
        n = character(s.text + i, s.n - i, &c);
        if (n > 1 && !has_one_case(c)) return lacks(j, "the case of", part_of(s, i, i + n));
        memcpy(to + i, s.text + i, n);
        if (n == 1) to[i] = (char)(how == UPPER || (how != LOWER && starts) ? toupper(s.text[i]) : tolower(s.text[i]));
        if (how == TITLE_WORDS) starts = is_white(c) || (c && c < 128 && strchr("-({[<", (int)c));
        else starts = how == TITLE && !(c < 128 && isalpha((int)c));
    }
    return to ? (Value){.kind = IS_STRING, .n = s.n, .text = to, .marks = s.marks} : undefined;
}

static int64_t count_characters(Value s) {
    int64_t count = 0;
    uint32_t c;
    for (size_t i = 0; i < s.n; count++) i += character(s.text + i, s.n - i, &c);
    return count;
}

// Where the character of this index begins, or the string ends.
static size_t byte_of(Value s, int64_t index) {
    size_t i = 0;
    uint32_t c;
    for (; index > 0 && i < s.n; index--) i += character(s.text + i, s.n - i, &c);
    return i;
}

// Where `what` first (or last) is in the bytes of s between two places; SIZE_MAX: it is not.
static size_t find_text(Template *j, Value s, size_t from, size_t to, Value what, bool last) {
    for (; from + what.n <= to && spend(j, what.n / 16 + 1); from += !last, to -= last)
        if (!memcmp(s.text + (last ? to - what.n : from), what.text, what.n)) return last ? to - what.n : from;
    return SIZE_MAX;
}

// Puts the items of a list one after the other.
static Value join_items(Template *j, Value list, Value separator) {
    size_t start = j->out->text.n;
    for (size_t i = 0; i < list.n && !j->failed; i++) {
        if (i) put_string(j, separator);
        put_plain(j, list.items[i]);
    }
    return take_string_from(j, start);
}

static const Value backwards[3] = {{.kind = IS_NONE}, {.kind = IS_NONE}, {.kind = IS_INTEGER, .integer = -1}};

// The items, or characters, from..to by steps, as Python's [from:to:step]; NONE: not given.
static Value slice(Template *j, Value v, const Value bounds[3]) {
    bool is_string = v.kind == IS_STRING;
    Value taken = {.kind = IS_LIST};
    if (!is_string && !is_list(v)) return complain(j, "a slice", v);
    for (int i = 0; i < 3; i++)
        if (bounds[i].kind > IS_INTEGER) return complain(j, "a bound", bounds[i]);
    int64_t n = is_string ? count_characters(v) : (int64_t)v.n;
    int64_t by = bounds[2].kind == IS_NONE ? 1 : as_integer(bounds[2]);
    if (by == 0) return stop(j, MISUSE, "a slice with a step of 0");
    int64_t low = by > 0 ? 0 : -1, high = low + n, ends[2] = {by > 0 ? low : high, by > 0 ? high : low};
    for (int i = 0; i < 2; i++) {
        if (bounds[i].kind == IS_NONE) continue;
        int64_t at = as_integer(bounds[i]);
        if (at < 0) at = at < -n ? low : at + n;
        ends[i] = at < low ? low : at > high ? high : at;
    }
    spend(j, is_string ? v.n / 4 : 0);
    if (is_string && by == 1)
        return part_of(v, byte_of(v, ends[0]), byte_of(v, ends[1] > ends[0] ? ends[1] : ends[0]));
    Value list = list_items(j, v);
    for (int64_t i = ends[0]; (by > 0 ? i < ends[1] : i > ends[1]) && !j->failed; i += by) {
        push(j, &taken, list.items[i]);
        if (by > n || by < -n) break;
    }
    if (is_string) return join_items(j, taken, string(""));
    taken.kind = v.kind;
    return taken;
}

static Value split_words(Template *j, Value s) {
    Value words = {.kind = IS_LIST};
    uint32_t c;
    for (size_t i, n; (s = strip(s, true, false, NULL)).n && !j->failed; s = part_of(s, i, s.n)) {
        for (i = 0; i < s.n && (n = character(s.text + i, s.n - i, &c), !is_white(c)); i += n) {}
        push(j, &words, part_of(s, 0, i));
    }
    return words;
}

// The parts between separators, of which at most `most` count, or all if it is < 0.
static Value split_text(Template *j, Value s, Value separator, int64_t most, bool right) {
    Value parts = {.kind = IS_LIST};
    size_t from = 0, to = s.n, at;
    for (; most != 0 && (at = find_text(j, s, from, to, separator, right)) != SIZE_MAX; most--) {
        push(j, &parts, right ? part_of(s, at + separator.n, to) : part_of(s, from, at));
        if (right) to = at;
        else from = at + separator.n;
    }
    push(j, &parts, part_of(s, from, to));
    return right ? slice(j, parts, backwards) : parts;
}

// A text n times
static Value repeat(Template *j, Value text, int64_t n) {
    size_t start = j->out->text.n;
    for (; n > 0 && text.n && !j->failed; n--) put_string(j, text);
    return take_string_from(j, start);
}

// Lines after the first that have text begin with `width` spaces.
static Value indent_lines(Template *j, Value s, int64_t width, bool first) {
    size_t start = j->out->text.n;
    uint32_t c;
    Value gap = repeat(j, string(" "), width);
    s.n -= s.n && s.text[s.n - 1] == '\r';  // jinja2 appends a \n, which ends the same line
    if (first) put_string(j, gap);
    for (size_t i = 0, n, begin = SIZE_MAX; i < s.n && !j->failed; i += n) {
        n = character(s.text + i, s.n - i, &c);
        bool ends = (c >= 10 && c <= 13) || (c >= 28 && c <= 30) || c == 0x85 || c == 0x2028 || c == 0x2029;
        if (i == begin && !ends) put_string(j, gap);
        if (c == '\r' && i + 1 < s.n && s.text[i + 1] == '\n') n = 2;
        if (ends) begin = i + n, add_text(j, "\n");
        else put_string(j, part_of(s, i, i + n));
    }
    return take_string_from(j, start);
}

static Value need_text(Template *j, Value v) { return v.kind == IS_STRING ? v : complain(j, "the characters", v); }

static int64_t need_count(Template *j, Value v, int64_t otherwise) {
    if (!is_given(v)) return otherwise;
    if (!is_whole(v)) complain(j, "the count", v);
    return as_integer(v);
}

// A filter or method of a text. What was not given of its arguments is undefined.
static Value apply_to_text(Template *j, Operation what, Value s, const Value *a) {
    bool from_start = what != RSTRIP, to_end = what != LSTRIP;
    if (what == TO_STRING || !spend(j, s.n / 4)) return s;
    if (what <= TITLE_WORDS) return change_case(j, s, what);
    if (what == INDENT) return indent_lines(j, s, need_count(j, a[0], 4), is_true(a[1]));
    if (what <= RSTRIP && is_missing(a[0])) return strip(s, from_start, to_end, NULL);
    if (what == SPLIT && is_missing(a[0]) && is_missing(a[1])) return split_words(j, s);
    if (what <= RSPLIT && is_missing(a[0])) return lacks(j, "a split like this without", string("a separator"));
    Value part = need_text(j, a[0]);
    if (!spend(j, times(what <= RSTRIP ? s.n / 16 + 1 : 1, part.n / 16 + 1))) return undefined;
    if (what <= RSTRIP) return strip(s, from_start, to_end, &part);
    if (what == STARTS_WITH) return boolean(part.n <= s.n && !memcmp(s.text, part.text, part.n));
    if (what == ENDS_WITH) return boolean(part.n <= s.n && !memcmp(s.text + s.n - part.n, part.text, part.n));
    if (part.n == 0 && what == FIND) return integer(0);
    if (part.n == 0 && what == COUNT_TEXT) return integer(count_characters(s) + 1);
    if (part.n == 0) return lacks(j, "a separator", string("without characters"));
    bool all = what == COUNT_TEXT || (what == REPLACE && is_missing(a[2]));
    int64_t most = all ? -1 : what == FIND ? 1 : need_count(j, a[1 + (what == REPLACE)], -1);
    Value parts = split_text(j, s, part, most, what == RSPLIT);
    if (what == REPLACE) return join_items(j, parts, need_text(j, a[1]));
    if (what == COUNT_TEXT) return integer((int64_t)parts.n - 1);
    return what != FIND ? parts : integer(parts.n > 1 ? count_characters(parts.items[0]) : -1);
}

/* ---- Chat templates: members and items ---- */

static Value loop_member(Template *j, Value loop, Value name) {
    int64_t i = (int64_t)loop.at, n = (int64_t)loop.n;
    const struct { const char *name; Value value; } members[] = {
        {"index", integer(i + 1)}, {"index0", integer(i)}, {"revindex", integer(n - i)},
        {"revindex0", integer(n - i - 1)}, {"length", integer(n)}, {"first", boolean(i == 0)},
        {"last", boolean(i == n - 1)}, {"previtem", i > 0 ? loop.items[i - 1] : unknown(name)},
        {"nextitem", i < n - 1 ? loop.items[i + 1] : unknown(name)},
    };
    for (size_t k = 0; k < sizeof members / sizeof *members; k++)
        if (same_text(name, members[k].name)) return members[k].value;
    return has_word("changed cycle depth depth0", name) ? lacks(j, "the loop's", name) : unknown(name);
}

static char kind_of_methods(Value v) { return v.kind == IS_STRING ? 's' : v.kind == IS_DICT ? 'd' : '-'; }

// value.key (dotted) or value[key]; undefined: there is none. Python's methods are values too; they are refused here.
static Value member(Template *j, Value v, Value key, bool dotted) {
    bool is_name = key.kind == IS_STRING, is_method = is_name && find_operation(kind_of_methods(v), key);
    const Value *found = NULL;
    if (v.kind == IS_UNDEFINED) return complain(j, "a member", v);
    if (v.kind == IS_DICT && !(is_method && dotted)) found = find_value(j, v, key);
    if (v.kind == IS_NAMESPACE) found = find_value(j, v.scope->variables, key);
    if (found) return *found;
    if (v.kind == IS_LOOP && is_name) return loop_member(j, v, key);
    if (is_method) return lacks(j, "without a call the method", key);
    if (is_whole(key) && (is_list(v) || v.kind == IS_STRING)) {
        int64_t i = as_integer(key), n = v.kind == IS_STRING ? count_characters(v) : (int64_t)v.n;
        bool exists = i < n && i >= -n && spend(j, v.kind == IS_STRING ? v.n / 4 : 0);
        if (i < 0) i += n;
        if (exists) return v.kind == IS_STRING ? part_of(v, byte_of(v, i), byte_of(v, i + 1)) : v.items[i];
    }
    return unknown(is_name ? key : string("an item"));
}

// The member that the filters' attribute= names; without one the value itself.
static Value member_at(Template *j, Value v, Value path) {
    if (is_missing(path)) return v;
    bool is_path = path.kind == IS_STRING && (memchr(path.text, '.', path.n) || memchr(path.text, ',', path.n) ||
                                              (path.n && isdigit((unsigned char)path.text[0])));
    if (is_path) return lacks(j, "the path", path);
    return member(j, v, path, false);
}

// What the filters unique, sort, ... compare of an item, by their arguments case_sensitive and attribute: letters of
// both cases are equal, unless the first is true.
static Value key_of(Template *j, Value item, const Value *a) {
    Value key = member_at(j, item, a[1]);
    return key.kind == IS_STRING && !is_true(a[0]) ? change_case(j, key, LOWER) : key;
}

// Equal items keep their order.
static Value sort_items(Template *j, Value list, const Value *a, bool reverse) {
    Value keys = {.kind = IS_LIST}, sorted = {.kind = IS_LIST};
    for (size_t i = 0, k; i < list.n; i++) {
        Value key = key_of(j, list.items[i], a);
        push(j, &keys, key);
        push(j, &sorted, list.items[i]);
        if (j->failed) return undefined;
        for (k = i; k > 0 && spend(j, 8); k--) {
            const Value *before = &keys.items[k - 1];
            if (is_equal(j, key, *before) || !(reverse ? is_less(j, *before, key) : is_less(j, key, *before))) break;
            keys.items[k] = *before;
            sorted.items[k] = sorted.items[k - 1];
        }
        keys.items[k] = key;
        sorted.items[k] = list.items[i];
    }
    return sorted;
}

static bool contains(Template *j, Value v, Value what) {
    if (v.kind == IS_STRING && what.kind != IS_STRING) return complain(j, "`in` a text", what), false;
    if (v.kind == IS_STRING) return find_text(j, v, 0, v.n, what, false) != SIZE_MAX;
    if (v.kind == IS_DICT) return check_key(j, what), find_value(j, v, what) != NULL;
    Value list = list_items(j, v);
    for (size_t i = 0; i < list.n && spend(j, 4); i++) if (is_equal(j, list.items[i], what)) return true;
    return false;
}

/* ---- Chat templates: operators, tests, filters, functions ---- */

// Like Python's: integers that do not fit 64 bits are refused.
static Value compute_integers(Template *j, char op, int64_t a, int64_t b) {
    int64_t result = 0;
    bool wraps = false;
    if (op == '+') wraps = __builtin_add_overflow(a, b, &result);
    if (op == '-') wraps = __builtin_sub_overflow(a, b, &result);
    if (op == '*') wraps = __builtin_mul_overflow(a, b, &result);
    if (op == '/' || op == '%') {
        if (b == 0) return stop(j, MISUSE, "a division by 0");
        if (b == -1) return op == '%' ? integer(0) : compute_integers(j, '-', 0, a);
        int64_t rest = a % b, below = rest != 0 && (rest < 0) != (b < 0);
        return integer(op == '/' ? a / b - below : rest + (below ? b : 0));
    }
    return wraps ? stop(j, MISUSE, "an integer that is too large") : integer(result);
}

static bool compare(Template *j, Value sign, Value a, Value b) {
    if (has_word("in not", sign)) return contains(j, b, a) == (*sign.text == 'i');  // not: of `not in`
    if (has_word("== !=", sign)) return is_equal(j, a, b) == (*sign.text == '=');
    bool less = sign.text[0] == '<' ? is_less(j, a, b) : is_less(j, b, a);
    return less || (sign.n == 2 && !j->failed && is_equal(j, a, b));
}

static Value compute(Template *j, Value sign, Value a, Value b) {
    char op = same_text(sign, "/") ? ':' : sign.text[0];  // '/' is //
    bool a_joins = a.kind == IS_STRING || is_list(a), b_joins = b.kind == IS_STRING || is_list(b);
    if (op == '~' || (op == '+' && a.kind == IS_STRING && b.kind == IS_STRING))
        return join_items(j, (Value){.kind = IS_LIST, .n = 2, .items = (Value[]){a, b}}, string(""));
    if (is_whole(a) && is_whole(b) && op != ':') return compute_integers(j, op, as_integer(a), as_integer(b));
    if (is_number(a) && is_number(b)) {
        double x = as_real(a), y = as_real(b);
        if (op == '+' || op == '-') return real(op == '+' ? x + y : x - y);
        if (op == '*') return real(x * y);
        if (op != ':') return lacks(j, "for floats the operator", sign);
        return y ? real(x / y) : stop(j, MISUSE, "a division by 0");
    }
    if (op == '*' && a.kind == IS_STRING && is_whole(b)) return repeat(j, a, as_integer(b));
    if ((op == '*' && (a_joins || b_joins)) || (op == '%' && a.kind == IS_STRING))
        return lacks(j, "for such values the operator", sign);
    if (op != '+' || a.kind != b.kind || !a_joins)
        return complain(j, "arithmetic", is_number(a) || b.kind == IS_UNDEFINED ? b : a);
    Value list = {.kind = a.kind};
    for (size_t i = 0; i < a.n + b.n && !j->failed; i++) push(j, &list, i < a.n ? a.items[i] : b.items[i - a.n]);
    return list;
}

// value is name(arguments): whether the value is of one of some kinds, or how it compares with the argument.
static bool apply_test(Template *j, Value name, Value v, const Arguments *a) {
    enum { NUMBERS = 1 << IS_BOOLEAN | 1 << IS_INTEGER | 1 << IS_FLOAT,
           SEQUENCES = 1 << IS_STRING | 1 << IS_DICT | 1 << IS_LIST | 1 << IS_TUPLE | 1 << IS_UNDEFINED };
    static const struct { const char *names; int kinds; const char *sign; } tests[] = {
        {"defined", ~(1 << IS_UNDEFINED), NULL}, {"undefined", 1 << IS_UNDEFINED, NULL}, {"none", 1 << IS_NONE, NULL},
        {"string", 1 << IS_STRING, NULL}, {"number", NUMBERS, NULL}, {"integer", 1 << IS_INTEGER, NULL},
        {"float", 1 << IS_FLOAT, NULL}, {"boolean true false", 1 << IS_BOOLEAN, NULL},
        {"mapping", 1 << IS_DICT, NULL}, {"sequence", SEQUENCES, NULL}, {"iterable", SEQUENCES | 1 << IS_LOOP, NULL},
        {"eq equalto", 0, "=="}, {"ne", 0, "!="}, {"lt lessthan", 0, "<"}, {"le", 0, "<="}, {"gt greaterthan", 0, ">"},
        {"ge", 0, ">="}, {"== != < <= > >= in", 0, ""},  // those are signs themselves, for select("==", 1)
    };
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        const char *sign = tests[i].sign;
        if (!has_word(tests[i].names, name)) continue;
        if (a->list.n != (sign != NULL) || a->named.n) return stop(j, MISUSE, "a test with wrong arguments"), false;
        if (sign) return compare(j, *sign ? string(sign) : name, v, a->list.items[0]);
        return tests[i].kinds >> v.kind & 1 && (!has_word("true false", name) || v.truth == (*name.text == 't'));
    }
    lacks(j, "the test", name);
    return false;
}

// Reads the number that a text is for Python: digits may have _ between them. False: it is none.
static bool read_number(Template *j, Value v, bool whole, Value *number) {
    Value s = strip(v, true, true, NULL);
    char *text = get_memory(j, s.n + 1), *end = text;
    size_t n = 0;
    for (size_t i = 0; text && i < s.n; i++) {
        bool skipped = i && s.text[i] == '_' && isdigit((unsigned char)s.text[i - 1]) &&
                       i + 1 < s.n && isdigit((unsigned char)s.text[i + 1]);
        if (!skipped) text[n++] = (char)tolower((unsigned char)s.text[i]);
    }
    if (!text) return false;
    text[n] = 0;
    size_t sign = *text == '-' || *text == '+', n_numeric = strspn(text, "0123456789+-.e");
    uint32_t c = 0;
    if (n_numeric < n) character(text + n_numeric, n - n_numeric, &c);
    if ((c >= 0x660 && c < 0x1C60) || (c >= 0xA620 && c < 0xAC00) || c >= 0xFF10)  // other scripts' digits
        lacks(j, "the number", s);
    if (n_numeric != n && !has_word("inf infinity nan", string(text + sign))) return false;
    errno = 0;
    *number = integer(strtoll(text, &end, 10));
    if (!whole || *end) *number = real(strtod(text, &end));
    else if (errno == ERANGE) stop(j, MISUSE, "an integer that is too large");
    return end > text && *end == 0;
}

// The number that a text or a number is, for the filters int and float; else the default.
static Value convert_number(Template *j, Value v, bool whole, Value otherwise) {
    if (v.kind == IS_UNDEFINED) return complain(j, "the number", v);
    if (v.kind == IS_STRING && (!read_number(j, v, whole, &v) || (whole && isinf(as_real(v))))) return otherwise;
    if (!is_number(v)) return otherwise;
    if (!whole) return real(as_real(v));
    if (is_whole(v)) return integer(as_integer(v));
    if (isnan(v.number)) return otherwise;
    if (fabs(v.number) >= 0x1p63) return stop(j, MISUSE, "a number that is too large");
    return integer((int64_t)v.number);
}

static Value round_number(Template *j, Value v, int64_t places) {
    char digits[400];
    if (!is_number(v)) return complain(j, "round", v);
    if (places < 0 || places > 20) return lacks(j, "round to", string("so many places"));
    if (is_whole(v)) return integer(as_integer(v));
    if (!isfinite(v.number)) return places ? v : stop(j, MISUSE, "round of infinity or NaN");
    snprintf(digits, sizeof digits, "%.*f", (int)places, v.number);
    return real(strtod(digits, NULL));
}

static Value strftime_now(Template *j, Value format) {
    char text[512], pattern[256] = "";
    if (format.n < sizeof pattern) memcpy(pattern, format.text, format.n);
    size_t start = j->out->text.n, n = strftime(text, sizeof text, pattern, j->now);
    if (strlen(pattern) != format.n || (n == 0 && format.n)) return lacks(j, "the date", format);  // a NUL ends it
    add_bytes(j, text, n, NULL);
    return take_string_from(j, start);
}

static Value range(Template *j, const Value *a) {
    Value list = {.kind = IS_LIST};
    bool has_start = is_given(a[1]);
    int64_t i = has_start ? need_count(j, a[0], 0) : 0, end = need_count(j, a[has_start], 0);
    int64_t step = need_count(j, a[2], 1);
    if (step == 0) return stop(j, MISUSE, "range() with a step of 0");
    while ((step > 0 ? i < end : i > end) && !j->failed) {
        if (list.n == MAX_RANGE) return stop(j, MISUSE, "range() of more than %d integers", MAX_RANGE);
        push(j, &list, integer(i));
        if (__builtin_add_overflow(i, step, &i)) break;
    }
    return list;
}

static Value apply(Template *j, char kind, Value name, Value v, const Arguments *a);

// map: what a filter makes of the items, or a member of each. select, reject, selectattr, rejectattr: the items that
// pass a test, or fail it, or whose member does. unique: the first of equal ones.
static Value choose_items(Template *j, Operation what, Value list, const Value *a) {
    bool by_member = what == SELECT_ATTR || what == REJECT_ATTR, wanted = what == SELECT || what == SELECT_ATTR;
    Value test = a[by_member], other = a[by_member + 1], chosen = {.kind = IS_LIST}, keys = chosen;
    Value path = what == MAP || what == UNIQUE ? a[1] : by_member ? a[0] : undefined;
    Arguments rest = {.list = {.kind = IS_LIST}, .named = {.kind = IS_DICT}};
    if (what == MAP && is_missing(a[0]) == is_missing(a[1])) return lacks(j, "map with", string("such arguments"));
    if (!is_missing(test) && what != UNIQUE) need_text(j, test);
    if (is_given(other) && what != MAP && what != UNIQUE) push(j, &rest.list, other);
    for (size_t i = 0; i < list.n && !j->failed; i++) {
        Value item = list.items[i], part = what == UNIQUE ? key_of(j, item, a) : member_at(j, item, path);
        if (what == UNIQUE && (is_list(part) || part.kind == IS_DICT)) complain(j, "a key", part);
        else if (what == MAP) push(j, &chosen, is_missing(test) ? part : apply(j, '|', test, item, &rest));
        else if (what == UNIQUE && !contains(j, keys, part)) push(j, &keys, part), push(j, &chosen, item);
        else if (what != UNIQUE && (is_missing(test) ? is_true(part) : apply_test(j, test, part, &rest)) == wanted)
            push(j, &chosen, item);
    }
    return chosen;
}

// A filter, method or function. Most work on texts or lists; other values become such.
static Value perform(Template *j, Operation what, Value v, const Value *a) {
    size_t start = j->out->text.n;
    Value list = {.kind = IS_LIST};
    const Value *found;
    int64_t width;
    bool by_value = false;
    if (what == INDENT && v.kind != IS_STRING) return complain(j, "the lines", v);
    if (what <= TO_STRING) return apply_to_text(j, what, to_string(j, v), a);
    if (what <= MAXIMUM && (is_true(v) || what >= UNIQUE)) list = list_items(j, v);
    if (what == MINIMUM || what == MAXIMUM) list = sort_items(j, list, a, what == MAXIMUM);
    switch (what) {
    case MAP: case SELECT: case REJECT: case SELECT_ATTR: case REJECT_ATTR: case UNIQUE:
        return choose_items(j, what, list, a);
    case SORT: return sort_items(j, list, a + 1, is_true(a[0]));
    case REVERSE: return slice(j, v.kind == IS_STRING ? v : list, backwards);
    case JOIN: return join_items(j, list, to_string(j, a[0]));
    case FIRST: case MINIMUM: case MAXIMUM: return list.n ? list.items[0] : undefined;
    case LAST: return list.n ? list.items[list.n - 1] : undefined;
    case VALUES:
        for (size_t i = 1; i < v.n && !j->failed; i += 2) push(j, &list, v.items[i]);
        return list;
    case ITEMS: case DICT_SORT:
        if (v.kind != IS_DICT && (v.kind != IS_UNDEFINED || what == DICT_SORT)) return complain(j, "the items", v);
        for (size_t i = 0; v.kind == IS_DICT && i < v.n && !j->failed; i += 2)
            push(j, &list, (Value){.kind = IS_TUPLE, .n = 2, .items = v.items + i});
        if (what == ITEMS) return list;
        if (is_given(a[1])) by_value = same_text(need_text(j, a[1]), "value");
        if (is_given(a[1]) && !by_value && !same_text(a[1], "key")) return lacks(j, "dictsort by", a[1]);
        return sort_items(j, list, (Value[]){a[0], integer(by_value)}, is_true(a[2]));
    case GET:
        check_key(j, a[0]);
        found = find_value(j, v, a[0]);
        return found ? *found : is_given(a[1]) ? a[1] : (Value){.kind = IS_NONE};
    case LENGTH:
        if (v.kind == IS_STRING) return integer(spend(j, v.n / 4) ? count_characters(v) : 0);
        if (!is_list(v) && v.kind != IS_DICT && v.kind != IS_UNDEFINED) return complain(j, "the length", v);
        return integer((int64_t)(v.kind == IS_DICT ? v.n / 2 : is_list(v) ? v.n : 0));
    case DEFAULT:
        if (v.kind != IS_UNDEFINED && (is_true(v) || !is_true(a[1]))) return v;
        return is_given(a[0]) ? a[0] : string("");
    case TO_JSON:
        width = is_missing(a[1]) ? 0 : need_count(j, a[1], 0);
        if (width < 0 || width > 1 << 20) return stop(j, MISUSE, "it takes too long to indent so far");
        if (is_true(a[0])) return lacks(j, "tojson with", string("ensure_ascii"));
        put_value(j, v, true, is_missing(a[1]) ? -1 : width, 0);
        return take_string_from(j, start);
    case TO_INTEGER: return convert_number(j, v, true, is_given(a[0]) ? a[0] : integer(0));
    case TO_FLOAT: return convert_number(j, v, false, is_given(a[0]) ? a[0] : real(0));
    case ROUND:
        if (a[0].kind != IS_NONE) return round_number(j, v, need_count(j, a[0], 0));
        return convert_number(j, round_number(j, v, 0), true, undefined);
    case STRFTIME_NOW: return strftime_now(j, need_text(j, a[0]));
    case RANGE: return range(j, a);
    case RAISE_EXCEPTION:
        v = to_string(j, a[0]);
        return stop(j, MISUSE, "%.*s", (int)(v.n < 200 ? v.n : 200), v.text);
    default: return list;
    }
}

// A filter, method or function of this name, if there is one. The arguments go to the places of its parameters.
static Value apply(Template *j, char kind, Value name, Value v, const Arguments *a) {
    const char *what = kind == '|' ? "the filter" : kind == 'f' ? "the function" : "the method";
    const OperationRow *row = find_operation(kind, name);
    if (!row) return lacks(j, what, name);
    Value bound[MAX_PARAMETERS];
    const char *parameters = row->parameters;
    size_t n_taken = 0;
    for (size_t i = 0; i < MAX_PARAMETERS; i++) {
        bool needed = *parameters == '!';
        parameters += needed;
        Value parameter = {.kind = IS_STRING, .text = parameters, .n = strcspn(parameters, " ")};
        const Value *found = parameter.n && i < a->list.n ? &a->list.items[i] : find_value(j, a->named, parameter);
        if (needed && !found) stop(j, MISUSE, "the argument %.*s is missing", (int)parameter.n, parameter.text);
        bound[i] = found ? *found : absent;
        n_taken += found != NULL;
        parameters += parameter.n + (parameters[parameter.n] == ' ');
    }
    if (n_taken < a->list.n + a->named.n / 2) lacks(j, "an argument of", name);
    return j->failed ? undefined : perform(j, row->what, v, bound);
}

/* ---- Chat templates: evaluation ---- */

static Value evaluate(Template *j, const Node *x);
static Value execute(Template *j, const Node *x);

static Scope *new_scope(Template *j, Scope *outer, Value variables) {
    Scope *scope = get_memory(j, sizeof *scope);
    if (!scope) return outer;
    *scope = (Scope){outer, variables};
    return scope;
}

// A variable, by the scopes from the innermost outwards, or a function.
static Value variable(Template *j, Value name) {
    const Value *found = NULL;
    for (const Scope *scope = j->scope; scope && !found && spend(j, 1); scope = scope->outer)
        found = find_value(j, scope->variables, name);
    if (found) return *found;
    Value v = unknown(name);
    if (has_word("namespace dict", name) || find_operation('f', name)) v.kind = IS_FUNCTION;
    else if (has_word("cycler joiner lipsum self varargs kwargs caller", name)) lacks(j, "the name", name);
    return v;
}

static Arguments evaluate_list(Template *j, const Node *x) {
    Arguments a = {.list = {.kind = IS_LIST}, .named = {.kind = IS_DICT}};
    for (; x && !j->failed; x = x->next) {
        Value v = evaluate(j, x->kind == NODE_NAMED ? x->second : x);
        if (x->kind == NODE_NAMED) set_member(j, &a.named, x->value, v);
        else push(j, &a.list, v);
    }
    return a;
}

static Value make_dict(Template *j, const Node *x) {
    Value dict = {.kind = IS_DICT};
    for (; x && !j->failed; x = x->next->next) {
        Value key = evaluate(j, x);
        set_member(j, &dict, key, evaluate(j, x->next));
    }
    return dict;
}

static Value call_macro(Template *j, Value macro, const Arguments *a) {
    size_t start = j->out->text.n, n = 0, n_taken = 0;
    Scope *outer = j->scope;
    j->scope = new_scope(j, macro.scope, (Value){.kind = IS_DICT});
    for (const Node *x = macro.node->second; x && !j->failed; x = x->next, n++) {
        const Value *given = n < a->list.n ? &a->list.items[n] : find_value(j, a->named, x->value);
        set_member(j, &j->scope->variables, x->value, given ? *given : unknown(x->value));
        n_taken += given != NULL;
    }
    n = 0;  // a default may name any parameter
    for (const Node *x = macro.node->second; x && !j->failed; x = x->next, n++)
        if (x->second && n >= a->list.n && !find_value(j, a->named, x->value))
            set_member(j, &j->scope->variables, x->value, evaluate(j, x->second));
    if (n_taken < a->list.n + a->named.n / 2) stop(j, MISUSE, "an argument without a parameter");
    execute(j, macro.node->body);
    j->scope = outer;
    return take_string_from(j, start);
}

// function(arguments), macro(arguments) or value.method(arguments)
static Value call(Template *j, const Node *x, Value v, const Arguments *a) {
    Value name = {.kind = IS_STRING, .text = v.text, .n = v.n};
    if (v.kind == IS_UNDEFINED) return complain(j, "a call", v);
    if (x->kind == NODE_METHOD) return apply(j, kind_of_methods(v), x->value, v, a);
    if (v.kind == IS_MACRO) return call_macro(j, v, a);
    if (v.kind != IS_FUNCTION) return complain(j, "a call", v);
    if (!has_word("dict namespace", name)) return apply(j, 'f', name, undefined, a);
    if (a->list.n) return lacks(j, "an argument without a name of", name);
    if (*name.text == 'd') return a->named;
    return (Value){.kind = IS_NAMESPACE, .scope = new_scope(j, NULL, a->named)};
}

// Sets what is named, `a` or `space.a` or `a, b`, to a value or its items.
static void assign(Template *j, const Node *x, Value v) {
    Value list = x->next ? list_items(j, v) : (Value){.kind = IS_LIST, .n = 1, .items = &v};
    size_t n = 0;
    for (; x && !j->failed; x = x->next, n++) {
        Scope *scope = j->scope;
        if (x->kind == NODE_MEMBER) {
            Value space = evaluate(j, x->first);
            if (space.kind == IS_NAMESPACE) scope = space.scope;
            else complain(j, "a member to be set", space);
        }
        if (n < list.n && !j->failed) set_member(j, &scope->variables, x->value, list.items[n]);
    }
    if (n != list.n) stop(j, MISUSE, "%zu values for %zu names", list.n, n);
}

static void run_loop(Template *j, const Node *x, Value over) {
    Scope *outer = j->scope;
    const Node *condition = x->first->next;
    Value all = list_items(j, over), list = {.kind = IS_LIST};
    for (size_t i = 0; condition && i < all.n && !j->failed; i++) {
        j->scope = new_scope(j, outer, (Value){.kind = IS_DICT});
        assign(j, x->second, all.items[i]);
        if (is_true(evaluate(j, condition))) push(j, &list, all.items[i]);
    }
    if (!condition) list = all;
    bool ended = false;  // a pass that reached the end of the body, without break or continue
    for (size_t i = 0; i < list.n && j->leaves != BREAKS && !j->failed; i++) {
        j->leaves = STAYS;
        j->scope = new_scope(j, outer, (Value){.kind = IS_DICT});
        assign(j, x->second, list.items[i]);
        set_member(j, &j->scope->variables, string("loop"),
                   (Value){.kind = IS_LOOP, .n = list.n, .items = list.items, .at = i});
        execute(j, x->body);
        ended |= j->leaves == STAYS;
    }
    j->leaves = STAYS;
    j->scope = new_scope(j, outer, (Value){.kind = IS_DICT});
    if (!ended) execute(j, x->otherwise);
    j->scope = outer;
}

// a < b < c is a < b and b < c, but b is evaluated once.
static bool compare_list(Template *j, Value left, const Node *x) {
    bool holds = true;
    for (; x && holds && !j->failed; x = x->next) {
        Value right = evaluate(j, x->second);
        holds = !j->failed && compare(j, x->value, left, right);
        left = right;
    }
    return holds;
}

// The value of a node, given that of its first.
static Value evaluate_node(Template *j, const Node *x, Value first) {
    enum { LISTS = 1 << NODE_LIST | 1 << NODE_TUPLE | 1 << NODE_SLICE | 1 << NODE_FILTER | 1 << NODE_TEST |
                   1 << NODE_METHOD | 1 << NODE_CALL };
    size_t start = j->out->text.n;
    Scope *outer = j->scope;
    j->from = x->from;
    if (j->leaves != STAYS) return undefined;  // the first is a block that `break` or `continue` left
    Arguments a = evaluate_list(j, LISTS >> x->kind & 1 ? x->second : NULL);
    if (j->failed) return undefined;
    switch (x->kind) {
    case NODE_CONSTANT: return x->value;
    case NODE_VARIABLE: return variable(j, x->value);
    case NODE_LIST: return a.list;
    case NODE_TUPLE: return (Value){.kind = IS_TUPLE, .n = a.list.n, .items = a.list.items};
    case NODE_DICT: return make_dict(j, x->second);
    case NODE_MEMBER: return member(j, first, x->value, true);
    case NODE_ITEM: return member(j, first, evaluate(j, x->second), false);
    case NODE_SLICE: return slice(j, first, a.list.items);
    case NODE_FILTER: return apply(j, '|', x->value, first, &a);
    case NODE_TEST: return boolean(apply_test(j, x->value, first, &a));
    case NODE_METHOD: case NODE_CALL: return call(j, x, first, &a);
    case NODE_NOT: return boolean(!is_true(first));
    case NODE_SIGN:
        if (first.kind == IS_FLOAT) return real(*x->value.text == '-' ? -first.number : first.number);
        return compute(j, x->value, integer(0), first);
    case NODE_AND: case NODE_OR: return is_true(first) == (x->kind == NODE_OR) ? first : evaluate(j, x->second);
    case NODE_COMPARE: return boolean(compare_list(j, first, x->second));
    case NODE_COMPUTE: return compute(j, x->value, first, evaluate(j, x->second));
    case NODE_IF:
        for (const Node *y; !is_true(first) && (y = x->otherwise) && y->kind == NODE_IF && !y->next; x = y)
            first = evaluate(j, y->first);  // elif
        return execute(j, is_true(first) ? x->body : x->otherwise);
    case NODE_CAPTURE:
        j->scope = new_scope(j, outer, (Value){.kind = IS_DICT});
        execute(j, x->body);
        j->scope = outer;
        return take_string_from(j, start);
    case NODE_OUTPUT: put_plain(j, first); break;
    case NODE_SET: assign(j, x->second, first); break;
    case NODE_FOR: run_loop(j, x, first); break;
    case NODE_BREAK: j->leaves = BREAKS; break;
    case NODE_CONTINUE: j->leaves = GOES_ON; break;
    case NODE_MACRO:
        set_member(j, &j->scope->variables, x->value, (Value){.kind = IS_MACRO, .node = x, .scope = j->scope});
        break;
    case NODE_NAMED: break;
    }
    return undefined;
}

// The value of an expression; undefined where there is none, and of statements. Chains, as a ~ b ~ c or a|b|c, can be
// very deep on their left: they are evaluated from the innermost node outwards.
static Value evaluate(Template *j, const Node *x) {
    if (!x) return undefined;
    size_t from = j->from;
    const Node *part = x;
    Value v = undefined;
    j->from = x->from;
    if (enter(j)) {
        while (part->kind <= NODE_COMPUTE && part->first && spend(j, NODE_WORK)) part = part->first;
        if (part->kind > NODE_COMPUTE) v = evaluate(j, part->first);
        for (v = evaluate_node(j, part, v); part != x; v = evaluate_node(j, part, v)) part = part->up;
    }
    j->from = from;
    j->depth--;
    return v;
}

// Evaluates a list of statements, or an expression, whose value it returns.
static Value execute(Template *j, const Node *x) {
    Value v = undefined;
    for (; x && j->leaves == STAYS && !j->failed; x = x->next) v = evaluate(j, x);
    return v;
}

// Renders a chat template with the variables that it is given, and at most so much work.
static bool render_template(Text source, const Value *given, const struct tm *now, size_t work, Rendered *out,
                            Error *e) {
    if (source.n > MAX_TEMPLATE_BYTES) return refuse(e, "the chat template has more than %d bytes", MAX_TEMPLATE_BYTES);
    Template j = {.now = now, .out = out, .e = e, .work_left = work, .word = string("")};
    char *text = get_memory(&j, source.n + 8), *ones = get_memory(&j, source.n + 64);
    if (text && ones) {
        memset(ones, 1, source.n + 64);
        for (size_t i = 0; i < source.n; i++)
            if (source.at[i] != '\n' || i == 0 || source.at[i - 1] != '\r')
                text[j.n_source++] = source.at[i] == '\r' ? '\n' : source.at[i];
        j.n_source -= j.n_source && text[j.n_source - 1] == '\n';
        text[j.n_source] = 0;
        j.source = text;
        j.ones = ones;
        const Node *body = parse_body(&j, "");
        j.scope = new_scope(&j, new_scope(&j, NULL, *given), (Value){.kind = IS_DICT});
        if (!j.failed) execute(&j, body);
    }
    free_pool(&j.pool);
    return !j.failed;
}
