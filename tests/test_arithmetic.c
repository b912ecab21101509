// Numbers and kernels against plain arithmetic in double. Part of test.c.

static const double UNIT = 0x1p-24;  // the relative error of one rounding to float, at most

// The value of an f16 by IEEE 754: (-1)^s * 2^(e-15) * 1.f, subnormals 2^-14 * 0.f.
static double value_of_half(unsigned h) {
    int exponent = h >> 10 & 31, fraction = h & 1023;
    double size = exponent == 31 ? (fraction ? NAN : INFINITY)
                  : exponent     ? ldexp(1024 + fraction, exponent - 25)
                                 : ldexp(fraction, -24);
    return h & 0x8000 ? -size : size;
}

// The f16 nearest to x, of two the even one: rint() rounds so, in units of the last place.
static unsigned half_of_value(double x) {
    unsigned sign = signbit(x) ? 0x8000 : 0;
    double size = fabs(x);
    int exponent;
    if (isnan(x)) return 0x7e00;
    if (size < 0x1p-14) return sign | (unsigned)rint(size * 0x1p24);
    if (size >= 65520) return sign | 0x7c00;
    frexp(size, &exponent);  // size = 0.1f * 2^exponent
    double units = rint(ldexp(size, 11 - exponent));
    if (units == 2048) units = 1024, exponent++;
    return sign | (((unsigned)(exponent + 14) << 10) + ((unsigned)units - 1024));
}

// What does not fit is SIZE_MAX.
static void test_sizes(void) {
    static const size_t half = SIZE_MAX / 2 + 1;
    check(plus(2, 3) == 5 && plus(SIZE_MAX - 1, 1) == SIZE_MAX && plus(SIZE_MAX, 1) == SIZE_MAX &&
          plus(half, half) == SIZE_MAX, "plus: wrong");
    check(times(2, 3) == 6 && times(half, 2) == SIZE_MAX && times(SIZE_MAX, SIZE_MAX) == SIZE_MAX &&
          times(0, SIZE_MAX) == 0 && times(half, 1) == half, "times: wrong");
    check(round_up(0, 64) == 0 && round_up(1, 64) == 64 && round_up(64, 64) == 64 && round_up(65, 64) == 128 &&
          round_up(SIZE_MAX - 62, 64) == SIZE_MAX && round_up(SIZE_MAX, 8) == SIZE_MAX, "round_up: wrong");
    Cursor c = { (const unsigned char *)"abcd", 4, false };
    check(!take(&c, 5) && c.bad && !take(&c, 1) && c.left == 4, "a cursor that is bad: something was taken");
    Error e = { 0 };
    Buffer b = { .n = 16, .capacity = 16 };
    faults.n = 0, faults.failing = 1;  // sanitizers end what asks for so much
    check(!append(&b, NULL, SIZE_MAX - 8, &e) && e.status == NO_MEMORY && b.n == 16, "append: got \"%s\"", e.text);
    faults.failing = 0;
    check(!map_memory(SIZE_MAX - 4096, false, &e) && e.status == NO_MEMORY, "map_memory: got \"%s\"", e.text);
}

static void check_half(float x, const char *what) {
    unsigned got = half_of_float(x), wanted = half_of_value(x);
    bool both_nan = isnan(x) && (got & 0x7c00) == 0x7c00 && (got & 0x3ff);
    check(both_nan || got == wanted, "half_of_float %s %a: got %04x, wanted %04x", what, (double)x, got, wanted);
}

static void test_halves(void) {
    for (unsigned h = 0; h < 65536; h++) {
        float got = float_of_half((uint16_t)h);
        double wanted = value_of_half(h);
        bool same = isnan(wanted) ? isnan(got) : (double)got == wanted && !signbit(got) == !signbit(wanted);
        check(same, "float_of_half %04x: got %a, wanted %a", h, (double)got, wanted);
        float bfloat = float_of_bfloat((uint16_t)h);
        int exponent = h >> 7 & 255, fraction = h & 127;
        double size = exponent == 255 ? (fraction ? NAN : INFINITY)
                      : exponent      ? ldexp(128 + fraction, exponent - 134)
                                      : ldexp(fraction, -133);
        wanted = h & 0x8000 ? -size : size;
        same = isnan(wanted) ? isnan(bfloat) : (double)bfloat == wanted && !signbit(bfloat) == !signbit(wanted);
        check(same, "float_of_bfloat %04x: got %a, wanted %a", h, (double)bfloat, wanted);
    }
    for (unsigned h = 0; h < 0x7c00; h++) {  // each number, the middle to the next one, and the floats beside that
        float x = (float)value_of_half(h), next = h == 0x7bff ? 65536.0f : (float)value_of_half(h + 1);
        float middle = (x + next) / 2;
        float cases[] = { x, -x, middle, -middle, nextafterf(middle, 0), nextafterf(middle, INFINITY) };
        for (int i = 0; i < 6; i++) check_half(cases[i], "at a boundary");
    }
    const float special[] = { 65504, 65519.996f, 65520, 65536, FLT_MAX, INFINITY, NAN, 0.0f, FLT_MIN, 1e-45f,
                              0x1p-25f, 0x1.000002p-25f };
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        check_half(special[i], "of"), check_half(-special[i], "of");
    check(half_of_float(65519.996f) == 0x7bff && half_of_float(65520) == 0x7c00,
          "half_of_float: Inf has to begin at 65520");
    check(half_of_float(-0.0f) == 0x8000 && half_of_float(0x1p-25f) == 0 && half_of_float(0x1.8p-24f) == 2,
          "half_of_float: the smallest ones");
    int wrong = 0;
    for (uint64_t u = 0; u < 1ull << 32; u += 4093) {
        float x = float_of_bits((uint32_t)u);
        unsigned got = half_of_float(x);
        wrong += isnan(x) ? (got & 0x7fff) <= 0x7c00 : got != half_of_value(x);
    }
    check(wrong == 0, "half_of_float over a million floats: got %d wrong ones", wrong);
}

// The distance of got from the true value, in units of the last place of a float of that size.
static double error_in_ulps(float got, double wanted) {
    int exponent;
    frexp(wanted, &exponent);
    return fabs((double)got - wanted) / ldexp(1, (exponent < -125 ? -125 : exponent) - 24);
}

static void test_exponential(void) {
    double worst = 0, worst_at = 0;
    for (int sign = 0; sign < 2; sign++) {
        uint32_t last = bits_of_float(sign ? 87.0f : 88.0f);
        for (uint32_t u = 0; u <= last; u += 739) {
            float x = float_of_bits(u | (uint32_t)sign << 31);
            double error = error_in_ulps(exponential(x), exp(x));
            if (error > worst) worst = error, worst_at = x;
        }
    }
    // Measured: 0.90 ulp, as run.c says. llama2.c's expf (glibc) has 0.50; 1 makes no difference that a logit shows.
    check(worst <= 0.91, "e^%.9g: got %.3f ulp from libm's double, wanted at most 0.91", worst_at, worst);
    const struct { float x, wanted; } cases[] = {
        { 0.0f, 1.0f }, { -0.0f, 1.0f }, { INFINITY, INFINITY }, { -INFINITY, 0 }, { 88.00001f, INFINITY },
        { -87.00001f, 0 }, { FLT_MAX, INFINITY }, { -FLT_MAX, 0 }, { 1e-45f, 1 }, { -1e-45f, 1 }, { 1e30f, INFINITY },
        { -1e30f, 0 },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        check(exponential(cases[i].x) == cases[i].wanted, "e^%.9g: got %.9g, wanted %.9g", (double)cases[i].x,
              (double)exponential(cases[i].x), (double)cases[i].wanted);
    check(!signbit(exponential(-100)), "e^-100: got -0, wanted 0");
    check(isnan(exponential(NAN)), "e^NaN: got %g", (double)exponential(NAN));
}

// ---- Activations in 8 bits ----

typedef struct {
    int8_t q[32];
    float scale;
    int32_t sum;
} Rounded;

// By design.md, chapter 2. A double holds the exact product of two floats, and rounding a quotient of floats from
// double to float gives the float quotient, so (float) is the only rounding here.
static Rounded wanted_block(const float *x) {
    Rounded r = { .scale = 0 };
    double max = 0;
    for (int i = 0; i < 32; i++) {
        if (!isfinite(x[i])) max = NAN;
        else if (!isnan(max) && fabs(x[i]) > max) max = fabs(x[i]);
    }
    if (isnan(max)) r.scale = NAN;
    if (isnan(max) || max < 0x1p-100) return r;
    r.scale = (float)(max / 127);
    double inverse = (float)(127 / max);
    for (int i = 0; i < 32; i++) {
        r.q[i] = (int8_t)rint((float)(x[i] * inverse));
        r.sum += r.q[i];
    }
    return r;
}

// Whether a block is what it must be, with the sums of all and of both halves; a scale that is no number is NaN on all
// CPUs.
static bool is_block(const Block *b, const Rounded *wanted) {
    bool same = isnan(wanted->scale) ? isnan(b->scale) : b->scale == wanted->scale;
    for (int part = 0; part < 3; part++) {
        int sum = 0;
        for (int i = part == 2 ? 16 : 0; i < (part == 1 ? 16 : 32); i++) sum += wanted->q[i];
        float scaled = wanted->scale * (float)sum;
        same = same && (isnan(scaled) ? isnan(b->scaled_sum[part]) : b->scaled_sum[part] == scaled) &&
               (part ? b->minus_32_sum[part - 1] == -32 * sum
                     : b->minus_128_sum == -128 * sum && b->minus_8_sum == -8 * sum);
    }
    return same && !memcmp(b->q, wanted->q, 32);
}

static void check_block(const Kernels *k, const float *block, const char *what) {
    float x[32];
    Block b;
    memcpy(x, block, sizeof x);
    k->round(&b, x, 32, 32, 1, (Range){ 0, 1 });
    Rounded wanted = wanted_block(x);
    int at = 0;
    while (at < 31 && b.q[at] == wanted.q[at]) at++;
    check(is_block(&b, &wanted), "%s, kernel %s: got scale %a, sum %d, q[%d] %d, wanted %a, %d, %d", what, k->name,
          (double)b.scale, b.minus_8_sum / -8, at, b.q[at], (double)wanted.scale, wanted.sum, wanted.q[at]);
}

// -m export --type: a matrix of 20 rows and 96 columns becomes the blocks that a script makes of it, with its errors.
static void test_quantised_blocks(void) {
    static const struct { Type type; const char *name; } cases[] = { { Q8, "Q8_0" }, { Q4, "Q4_0" }, { Q4M, "Q4_1" } };
    Bytes golden = read_golden("quantised.bin");
    const unsigned char *at = golden.bytes + 20 * 96 * 4;
    Source floats = { .type = source_types, .rows = 20, .cols = 96, .data = golden.bytes };
    Tensor from = { F32, 20, 96, NULL };
    Bytes tiles = new_bytes(tensor_bytes(&from));
    pack_rows(tiles.bytes, &floats, (Range){ 0, 2 });
    for (int i = 0; i < 3; i++) {
        Tensor to = { cases[i].type, 20, 96, NULL };
        Bytes got = new_bytes(tensor_bytes(&to)), wanted = new_bytes(tensor_bytes(&to));
        Source s = { .rows = 20, .cols = 96, .data = at };
        for (int k = 0; k < N_SOURCE_TYPES; k++)
            if (!strcmp(source_types[k].name, cases[i].name)) s.type = &source_types[k];
        pack_rows(wanted.bytes, &s, (Range){ 0, 2 });
        Loss all = { 0, 0, 0 };
        memset(got.bytes, 0xFF, got.n);
        for (size_t k = 0; k < 2; k++) {
            Loss l = convert_row_tile(got.bytes + k * row_tile_bytes(&to), to.type, &from,
                                      tiles.bytes + k * row_tile_bytes(&from), k ? 4 : 16);
            all = (Loss){ all.squares + l.squares, all.norm + l.norm, fmax(all.worst, l.worst) };
        }
        check(!memcmp(got.bytes, wanted.bytes, got.n), "%s: other blocks than the script's", cases[i].name);
        double error[2];
        memcpy(error, at + source_bytes(&s), sizeof error);
        check(fabs(sqrt(all.squares / all.norm) / error[0] - 1) < 1e-9 && fabs(all.worst / error[1] - 1) < 1e-9,
              "%s: got an error of %g and %g, wanted %g and %g", cases[i].name, sqrt(all.squares / all.norm), all.worst,
              error[0], error[1]);
        at += source_bytes(&s) + sizeof error;
        free(got.bytes), free(wanted.bytes);
    }
    check(at == golden.bytes + golden.n, "quantised.bin: another length");
    free(tiles.bytes), free(golden.bytes);
}

static void test_quantise(void) {
    test_quantised_blocks();
    const struct { const char *what; float first, second, rest; } cases[] = {
        { "all zero", 0, 0, 0 }, { "minus zero", -0.0f, -0.0f, -0.0f }, { "ties at 127", 127, 0.5f, 1.5f },
        { "ties at -127", -127, -0.5f, -2.5f }, { "just too small", 0x1.fffffep-101f, 0x1p-110f, 0 },
        { "just large enough", 0x1p-100f, -0x1p-101f, 0x1p-110f }, { "subnormal", 1e-45f, -1e-45f, 1e-40f },
        { "Inf", INFINITY, 1, 2 }, { "-Inf", 1, -INFINITY, 2 }, { "NaN", 1, NAN, 2 },
        { "NaN and Inf", INFINITY, NAN, 2 }, { "-NaN", 1, -NAN, 0 }, { "the largest", FLT_MAX, -FLT_MAX, 1e38f },
        { "large and small", 1e30f, 1e-30f, 1 }, { "all equal", 3, 3, 3 }, { "negative", -5, -3, -1e-3f },
    };
    for (const Kernels *const *k = usable_kernels(); *k; k++) {
        float x[32];
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            for (int place = 0; place < 32; place += 7) {
                for (int j = 0; j < 32; j++)
                    x[j] = j == place ? cases[i].first : j == (place + 5) % 32 ? cases[i].second : cases[i].rest;
                check_block(*k, x, cases[i].what);
            }
        }
        for (int n = 0; n < 2000; n++) {
            double size = pow(2, random_real(-130, 120));
            for (int j = 0; j < 32; j++)
                x[j] = n % 3 ? random_float(size)
                             : (float)(random_real(-127, 127) > 0 ? rint(random_real(-254, 254)) / 2 : 0);
            check_block(*k, x, "random");
        }
        enum { ROWS = 5, STRIDE = 160, COLS = 128 };  // some rows of several, and nothing beside them
        static float many[ROWS * STRIDE];
        Block blocks[COLS / 32 * ROWS], untouched;
        for (int i = 0; i < ROWS * STRIDE; i++) many[i] = random_float(1);
        memset(blocks, 77, sizeof blocks);
        memset(&untouched, 77, sizeof untouched);
        (*k)->round(blocks, many, STRIDE, COLS, ROWS, (Range){ 1, 4 });
        bool ok = true;
        for (int c = 0; c < COLS / 32; c++) {
            for (int t = 0; t < ROWS; t++) {
                const Block *b = &blocks[c * ROWS + t];
                Rounded wanted = wanted_block(many + t * STRIDE + 32 * c);
                ok = ok && (t >= 1 && t < 4 ? is_block(b, &wanted) : !memcmp(b, &untouched, sizeof *b));
            }
        }
        check(ok, "rows 1 to 3 of 5, kernel %s: other values than block by block", (*k)->name);
    }
    const float tie[32] = { 127, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, -2.5f };
    Rounded r = wanted_block(tie);  // by hand: to the even neighbour
    check(r.q[1] == 0 && r.q[2] == 2 && r.q[3] == 2 && r.q[4] == 0 && r.q[5] == -2 && r.q[6] == -2 && r.sum == 127,
          "the reference's ties");
}

// ---- Products ----

// One weight of a row of blocks, by ggml's definition (ggml-common.h, ggml-quants.c): scale and minimum are 1 and 0
// where the format has none; q is the integer without its offset.
typedef struct {
    double q, scale, min;
    int offset;
} Weight;

// Bits n .. n + width - 1 of a string of bytes.
static int bits_at(const unsigned char *bytes, size_t n, int width) {
    int x = 0;
    for (int i = 0; i < width; i++) x |= (bytes[(n + (size_t)i) / 8] >> (n + (size_t)i) % 8 & 1) << i;
    return x;
}

static Weight weight_of_32(const char *type, const unsigned char *block, size_t i) {
    static const int curve_points[] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
    static const double e2m1[] = { 0, 0.5, 1, 1.5, 2, 3, 4, 6 };
    bool five = type[1] == '5', min = !strcmp(type + 2, "_1");
    double scale = value_of_half((uint16_t)(block[0] | block[1] << 8));
    if (!strcmp(type, "Q8_0")) return (Weight){ (int8_t)block[2 + i], scale, 0, 0 };
    const unsigned char *high = block + (min ? 4 : 2), *quants = high + (five ? 4 : 0);
    if (!strcmp(type, "MXFP4")) quants = block + 1;
    int q = bits_at(quants, i % 16 * 8 + i / 16 * 4, 4);
    if (!strcmp(type, "IQ4_NL")) return (Weight){ curve_points[q], scale, 0, 0 };
    if (!strcmp(type, "MXFP4")) return (Weight){ (q & 8 ? -2 : 2) * e2m1[q & 7], ldexp(1, block[0] - 128), 0, 0 };
    if (five) q += 16 * bits_at(high, i, 1);
    if (min) return (Weight){ q, scale, value_of_half((uint16_t)(block[2] | block[3] << 8)), 0 };
    return (Weight){ q, scale, 0, five ? 16 : 8 };
}

// Blocks of 256: scales of 16 or 32 weights are numbers of 4 to 8 bits times the block's own.
static Weight weight_of_256(const char *type, const unsigned char *b, size_t i) {
    static const int curve_points[] = { -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113 };
    size_t sixteen = i / 16, sub = i / 32, in = i % 32, half = i / 128;
    if (!strcmp(type, "Q2_K")) {
        double d = value_of_half((uint16_t)(b[80] | b[81] << 8)), m = value_of_half((uint16_t)(b[82] | b[83] << 8));
        int q = bits_at(b + 16 + 32 * half + in, 2 * (sub % 4), 2);
        return (Weight){ q, d * (b[sixteen] % 16), -(m * (b[sixteen] / 16)), 0 };
    }
    if (!strcmp(type, "Q3_K")) {
        const unsigned char *s = b + 96;
        int scale = bits_at(s + sixteen % 8, sixteen / 8 * 4, 4);
        scale += 16 * bits_at(s + 8 + sixteen % 4, sixteen / 4 * 2, 2);
        int q = bits_at(b + 32 + 32 * half + in, 2 * (sub % 4), 2) + 4 * bits_at(b + in, sub, 1);
        return (Weight){ q, value_of_half((uint16_t)(b[108] | b[109] << 8)) * (scale - 32), 0, 4 };
    }
    if (!strcmp(type, "Q6_K")) {
        int q = bits_at(b + 64 * half + i % 64, i % 128 / 64 * 4, 4);
        q += 16 * bits_at(b + 128 + 32 * half + in, sub % 4 * 2, 2);
        return (Weight){ q, value_of_half((uint16_t)(b[208] | b[209] << 8)) * (int8_t)b[192 + sixteen], 0, 32 };
    }
    if (!strcmp(type, "IQ4_XS")) {
        int scale = bits_at(b + 4, 4 * sub, 4) + 16 * bits_at(b + 2, 2 * sub, 2);
        int q = bits_at(b + 8 + 16 * sub + in % 16, in / 16 * 4, 4);
        return (Weight){ curve_points[q], value_of_half((uint16_t)(b[0] | b[1] << 8)) * (scale - 32), 0, 0 };
    }
    // Q4_K, Q5_K: twelve bytes of scales; bits 6 and 7 of the first eight belong to the last four
    const unsigned char *s = b + 4;
    int scale = sub < 4 ? s[sub] % 64 : s[sub + 4] % 16 + s[sub - 4] / 64 * 16;
    int min = sub < 4 ? s[sub + 4] % 64 : s[sub + 4] / 16 + s[sub] / 64 * 16;
    bool five = type[1] == '5';
    int q = bits_at(b + (five ? 48 : 16) + 32 * (sub / 2) + in, sub % 2 * 4, 4);
    q += five ? 16 * bits_at(b + 16 + in, sub, 1) : 0;
    return (Weight){ q, value_of_half((uint16_t)(b[0] | b[1] << 8)) * scale,
                     -(value_of_half((uint16_t)(b[2] | b[3] << 8)) * min), 0 };
}

static Weight weight_of(const SourceType *type, const unsigned char *row, size_t col) {
    uint16_t half;
    float f;
    const unsigned char *block = row + col / type->block_cols * type->block_bytes;
    if (type->block_cols == 256) return weight_of_256(type->name, block, col % 256);
    if (type->block_cols == 32) return weight_of_32(type->name, block, col % 32);
    if (!strcmp(type->name, "F32")) {
        memcpy(&f, block, 4);
        return (Weight){ f, 1, 0, 0 };
    }
    memcpy(&half, block, 2);
    if (type->name[0] == 'F') return (Weight){ value_of_half(half), 1, 0, 0 };
    uint32_t bits = (uint32_t)half << 16;
    memcpy(&f, &bits, 4);
    return (Weight){ f, 1, 0, 0 };
}

// Columns that share a scale, and whether there is a minimum.
static size_t scale_columns(const SourceType *type) {
    return strstr("Q2_K Q3_K Q6_K", type->name) ? 16 : 32;
}

static bool has_minimum(const SourceType *type) {
    return strstr("Q4_1 Q5_1 Q2_K Q4_K Q5_K", type->name) != NULL;
}

typedef struct {
    const char *type;  // one of source_types
    size_t rows, cols;
    int n;
} ProductCase;

// y[t,r] by design.md, chapter 2, from the source's bytes. Sums of products of integers are exact in double.
static float wanted_product(const ProductCase *p, const Source *s, size_t r, const float *x, bool exact) {
    const SourceType *type = s->type;
    bool groups = type->gguf_id < 0, quantised = type->block_cols > 1;
    const unsigned char *row = s->data + r * (p->cols / type->block_cols) * type->block_bytes;
    float y = 0;
    for (size_t c0 = 0; c0 < p->cols; c0 += 32) {
        size_t n = p->cols - c0 < 32 ? p->cols - c0 : 32;
        Weight w[32];
        float block[32] = { 0 };
        for (size_t i = 0; i < n; i++) {
            block[i] = x[c0 + i];
            if (!groups) {
                w[i] = weight_of(type, row, c0 + i);
                continue;
            }
            float scale;
            memcpy(&scale, s->scales + (r * p->cols + c0 + i) / s->group * 4, 4);
            w[i] = (Weight){ (int8_t)row[c0 + i], scale, 0, 0 };
        }
        if (!quantised || exact) {
            for (size_t i = 0; i < n; i++) {
                // gguf-py: d * q, then + m, each rounded to float
                float weight = (float)(w[i].scale * (w[i].q - w[i].offset));
                if (has_minimum(type)) weight = (float)((double)weight + w[i].min);
                y = fmaf(weight, block[i], y);
            }
            continue;
        }
        Rounded a = wanted_block(block);
        for (size_t i = 0; i < 32; i += scale_columns(type)) {
            double dot = 0, sum = 0;
            for (size_t k = i; k < i + scale_columns(type); k++) {
                dot += (w[k].q - w[k].offset) * a.q[k];
                sum += a.q[k];
            }
            y = fmaf((float)(w[i].scale * a.scale), (float)dot, y);
            if (has_minimum(type)) y = fmaf((float)w[i].min, (float)((double)a.scale * sum), y);
        }
    }
    return y;
}

// Bytes of random weights. Scales are finite halves of every size, subnormals too; integers take all their values, or
// only the extreme ones, whose sums are the largest.
static void fill_random(unsigned char *data, size_t n, const SourceType *type, double size) {
    bool extreme = type->block_cols > 1 && random_below(4) == 0;
    for (size_t i = 0; i < n; i++) data[i] = (unsigned char)random_bits();
    if (extreme) memset(data, random_below(2) ? 0xff : 0, n);
    bool wide = random_below(4) == 0;
    static const struct { const char *type; size_t at; } scales[] = {
        { "Q2_K", 80 }, { "Q3_K", 108 }, { "Q6_K", 208 }, { "Q4_K", 0 }, { "Q5_K", 0 },
    };
    size_t at = 0;
    for (size_t i = 0; i < sizeof scales / sizeof *scales; i++)
        if (!strcmp(scales[i].type, type->name)) at = scales[i].at;
    for (size_t i = 0; i + type->block_bytes <= n; i += type->block_bytes) {
        float f = random_float(size);
        uint16_t half[2] = { (uint16_t)half_of_value(f), (uint16_t)half_of_value(random_float(size)) };
        uint32_t bits = bits_of_float(f);
        if (wide && type->block_cols > 1)
            half[0] = (uint16_t)(half[0] & 0x83ff), half[1] = (uint16_t)(random_bits() % 0x7000);
        if (!strcmp(type->name, "F32")) memcpy(data + i, &f, 4);
        else if (!strcmp(type->name, "BF16")) memcpy(data + i, (char *)&bits + 2, 2);
        else if (!strcmp(type->name, "MXFP4"))
            data[i] = (unsigned char)(wide ? random_below(200) : 115 + random_below(12));
        else if (type->gguf_id >= 0) memcpy(data + i + at, half, has_minimum(type) ? 4 : 2);
    }
}

static void check_product(const SourceType *type, ProductCase p) {
    size_t x_stride = round_up(p.cols, 32), y_stride = round_up(p.rows, 16);
    size_t n_bytes = p.rows * (p.cols / type->block_cols) * type->block_bytes;
    size_t group = p.cols % 64 ? 32 : 64;
    unsigned char *data = get(n_bytes);
    float *scales = get(p.rows * p.cols / group * 4 + 4);
    Source source = { .type = type, .rows = p.rows, .cols = p.cols, .data = data,
                      .scales = type->gguf_id < 0 ? (unsigned char *)scales : NULL, .group = group };
    fill_random(data, n_bytes, type, 0.05);
    for (size_t i = 0; i < p.rows * p.cols / group; i++) scales[i] = random_float(0.01);
    Tensor w = { type->tile, (int)p.rows, (int)p.cols, NULL };
    Bytes tiles = new_bytes(tensor_bytes(&w));
    w.tiles = tiles.bytes;
    pack_rows(tiles.bytes, &source, (Range){ 0, n_row_tiles(&w) });
    Bytes x_bytes = new_bytes((size_t)p.n * x_stride * 4), blocks = new_bytes(x_bytes.n);
    Bytes rounded = new_bytes((size_t)p.n * x_stride / 32 * sizeof(Block));
    float *x = (float *)(void *)x_bytes.bytes, *y = get((size_t)p.n * y_stride * 4);
    memset(x, 0, x_bytes.n);
    for (size_t t = 0; t < (size_t)p.n; t++) {
        bool extreme = random_below(4) == 0;
        for (size_t c = 0; c < p.cols; c++)
            x[t * x_stride + c] = extreme ? 1 : random_float(random_below(50) ? 1 : 30);
    }
    for (size_t i = 0; i < (size_t)p.n * x_stride; i += 32)  // block c of token t is [c * n + t]
        memcpy(blocks.bytes + (i % x_stride * (size_t)p.n + i / x_stride * 32) * 4, x + i, 128);
    float *wanted = get(2 * (size_t)p.n * p.rows * sizeof *wanted);  // (2, n, rows)  as usual, and exact
    for (size_t i = 0; i < 2 * (size_t)p.n * p.rows; i++) {
        size_t r = i % p.rows, t = i / p.rows % (size_t)p.n;
        wanted[i] = wanted_product(&p, &source, r, x + t * x_stride, i >= (size_t)p.n * p.rows);
    }
    for (const Kernels *const *k = usable_kernels(); *k; k++) {
        kernels = *k;
        kernels->round((void *)rounded.bytes, x, x_stride, p.cols, (size_t)p.n, (Range){ 0, (size_t)p.n });
        for (int exact = 0; exact < 2; exact++) {
            Activations a = { (const void *)blocks.bytes, exact ? NULL : (const void *)rounded.bytes, (size_t)p.n, 0,
                              (size_t)p.n, 0 };
            for (size_t i = 0; i < (size_t)p.n * y_stride; i++) y[i] = 12345;
            multiply_rows(y, y_stride, &w, (Range){ 0, n_row_tiles(&w) / 2 }, &a);
            multiply_rows(y, y_stride, &w, (Range){ n_row_tiles(&w) / 2, n_row_tiles(&w) }, &a);
            size_t wrong = 0, t1 = 0, r1 = 0;
            for (size_t t = 0; t < (size_t)p.n; t++) {
                for (size_t r = 0; r < p.rows; r++) {
                    bool same = bits_of_float(y[t * y_stride + r]) ==
                                bits_of_float(wanted[((size_t)exact * (size_t)p.n + t) * p.rows + r]);
                    if (!same && !wrong++) t1 = t, r1 = r;
                }
            }
            check(!wrong, "%s %zu x %zu, %d tokens%s, kernel %s: %zu wrong, first token %zu row %zu: got %a, wanted %a",
                  type->name, p.rows, p.cols, p.n, exact ? ", exact" : "", (*k)->name, wrong, t1, r1,
                  (double)y[t1 * y_stride + r1], (double)wanted[((size_t)exact * (size_t)p.n + t1) * p.rows + r1]);
        }
    }
    free(wanted), free(data), free(scales), free(tiles.bytes), free(x_bytes.bytes), free(blocks.bytes);
    free(rounded.bytes), free(y);
}

// Products small enough for a pencil: one block, x = 1, 2, 0, 0, ..., the last one 127 so that the scale is 1.
static void test_products_by_hand(void) {
    // 0.5, minimum -0.5
    unsigned char q8[34] = { 0x00, 0x38 }, q4[18] = { 0x00, 0x38 }, q4m[20] = { 0x00, 0x38, 0x00, 0xb8 };
    q8[2] = 0x80, q8[3] = 3, q8[33] = 1;            // -64, 1.5, ..., 0.5
    // (0-8)/2 = -4, (11-8)/2 = 1.5, ..., (9-8)/2 = 0.5
    memset(q4 + 2, 0x88, 16), q4[2] = 0x80, q4[3] = 0x8b, q4[17] = 0x98;
    q4m[4] = 0x0f, q4m[5] = 0x02, q4m[19] = 0x30;   // 7.5-0.5 = 7, 1-0.5 = 0.5, others -0.5, last 1.5-0.5 = 1
    // (31-16)/2 = 7.5, (0-16)/2 = -8, the others as they are given, the last (15-16)/2 = -0.5
    unsigned char q5[22] = { 0x00, 0x38, 0x01, 0, 0, 0, 0x0f, [21] = 0xf0 };
    // 31/2-0.5 = 15, 0-0.5 = -0.5, ..., the last 15/2-0.5 = 7
    unsigned char q5m[24] = { 0x00, 0x38, 0x00, 0xb8, 0x01, 0, 0, 0, 0x0f, [23] = 0xf0 };
    const struct { const char *type; const unsigned char *block; float wanted; } cases[] = {
        { "Q8_0", q8, 0.5f * (-128 * 1 + 3 * 2 + 1 * 127) },           // 2.5
        { "Q4_0", q4, -4 * 1 + 1.5f * 2 + 0.5f * 127 },                // 62.5
        { "Q4_1", q4m, 7 * 1 + 0.5f * 2 + 1 * 127 },                   // 135
        { "Q5_0", q5, 7.5f * 1 - 8 * 2 - 0.5f * 127 },                 // -72
        { "Q5_1", q5m, 15 * 1 - 0.5f * 2 + 7 * 127 },                  // 903
    };
    float x[32] = { 1, 2, [31] = 127 };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const SourceType *type = NULL;
        for (int k = 0; k < N_SOURCE_TYPES; k++) {
            if (!strcmp(source_types[k].name, cases[i].type)) type = &source_types[k];
        }
        if (!check(type != NULL, "type %s: not in source_types", cases[i].type)) continue;
        Source source = { .type = type, .rows = 1, .cols = 32, .data = cases[i].block };
        Tensor w = { type->tile, 1, 32, NULL };
        Bytes tile = new_bytes(tensor_bytes(&w));
        w.tiles = tile.bytes;
        pack_rows(tile.bytes, &source, (Range){ 0, 1 });
        for (const Kernels *const *k = usable_kernels(); *k; k++) {
            float y[16];
            Block rounded;
            kernels = *k;
            kernels->round(&rounded, x, 32, 32, 1, (Range){ 0, 1 });
            for (int exact = 0; exact < 2; exact++) {
                Activations a = { (const void *)x, exact ? NULL : &rounded, 1, 0, 1, 0 };
                multiply_rows(y, 16, &w, (Range){ 0, 1 }, &a);
                check(y[0] == cases[i].wanted, "%s by hand, exact %d: got %g, wanted %g", cases[i].type, exact,
                      (double)y[0], (double)cases[i].wanted);
                check(y[1] == 0 && y[15] == 0, "%s by hand: got %g in a row of padding, wanted 0", cases[i].type,
                      (double)y[1]);
            }
        }
        free(tile.bytes);
    }
}

static void test_multiply(void) {
    static const size_t rows[] = { 1, 15, 16, 17, 37, 150 }, cols[] = { 1, 5, 31, 32, 33, 70, 96, 256 };
    static const int tokens[] = { 1, 2, 3, 4, 5, 7, 8, 33 };
    test_products_by_hand();
    for (int i = 0; i < N_SOURCE_TYPES; i++) {
        for (size_t r = 0; r < 6; r++) {
            for (size_t c = 0; c < 8; c++) {
                if (cols[c] % source_types[i].block_cols) continue;
                check_product(&source_types[i],
                              (ProductCase){ source_types[i].name, rows[r], cols[c], tokens[(r + 3 * c) % 8] });
            }
        }
        size_t wide = source_types[i].block_cols == 256 ? 512 : 64;
        for (int n = 0; n < 8; n++)
            check_product(&source_types[i], (ProductCase){ source_types[i].name, 33, wide, tokens[n] });
        for (int n = 127; n <= 257; n += 65)  // a weight is read once for 128 tokens
            check_product(&source_types[i], (ProductCase){ source_types[i].name, 17, wide / 2, n });
    }
}

// ---- Vectors ----

static void check_normalise(size_t dim, double size, float eps) {
    float *x = get(dim * 4), *weight = get(dim * 4), *out = get(dim * 4), *first = get(dim * 4);
    double sum = 0, worst = 0;
    for (size_t i = 0; i < dim; i++) {
        x[i] = random_float(size);
        weight[i] = random_float(1);
        sum += (double)x[i] * x[i];
    }
    // At most dim/16 + 5 roundings of the sum of squares, halved by the root; then 6: /n, +eps, root, 1/x, * r, * w.
    double bound = ((double)dim / 32 + 9) * UNIT;
    for (const Kernels *const *k = usable_kernels(); *k; k++) {
        bool finite = (*k)->normalise(out, x, weight, NULL, dim, eps);
        for (size_t i = 0; i < dim; i++) {
            double wanted = x[i] / sqrt(sum / (double)dim + eps) * weight[i];
            double error = fabs(out[i] - wanted) / (fabs(wanted) + 1e-300);
            worst = error > worst ? error : worst;
        }
        check(finite && worst <= bound,
              "normalise %zu numbers, kernel %s: got a relative error of %g, wanted at most %g", dim, (*k)->name, worst,
              bound);
        if (k == usable_kernels()) memcpy(first, out, dim * 4);
        check(!memcmp(first, out, dim * 4), "normalise %zu numbers: kernels %s and %s differ", dim,
              usable_kernels()[0]->name, (*k)->name);
        float kept = x[dim / 2];
        const float bad[] = { NAN, INFINITY, -INFINITY, 1e25f };  // the square of the last is not finite
        for (int i = 0; i < 4; i++) {
            x[dim / 2] = bad[i];
            check(!(*k)->normalise(out, x, weight, NULL, dim, eps), "normalise with %g in it: got true, wanted false",
                  (double)bad[i]);
            for (size_t j = 0; j < dim; j++)
                check(isnan(out[j]), "normalise with %g in it: got a number", (double)bad[i]);
        }
        x[dim / 2] = kept;
    }
    free(x), free(weight), free(out), free(first);
}

static float fold_by_halves(float *lane) {
    for (int half = 8; half; half /= 2) {
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    }
    return lane[0];
}

// LayerNorm in float, operation by operation as README has it.
static void plain_layer_norm(float *y, const float *x, const float *weight, const float *bias, size_t dim, float eps) {
    float sums[16] = { 0 }, squares[16] = { 0 };
    for (size_t i = 0; i < dim; i++) sums[i % 16] = sums[i % 16] + x[i];
    float mean = fold_by_halves(sums) / (float)dim;
    for (size_t i = 0; i < dim; i++) y[i] = x[i] - mean;
    for (size_t i = 0; i < dim; i++) squares[i % 16] = fmaf(y[i], y[i], squares[i % 16]);
    float r = 1 / sqrtf(fold_by_halves(squares) / (float)dim + eps);
    for (size_t i = 0; i < dim; i++) y[i] = y[i] * r;
    for (size_t i = 0; i < dim; i++) y[i] = y[i] * weight[i];
    for (size_t i = 0; i < dim; i++) y[i] = y[i] + bias[i];
}

// With a bias: LayerNorm.
static void check_layer_norm(size_t dim, double size, double offset) {
    float *x = get(dim * 4), *weight = get(dim * 4), *bias = get(dim * 4), *out = get(dim * 4), *first = get(dim * 4);
    double mean = 0, absolute = 0, variance = 0, n = (double)dim, eps = (double)1e-5f;
    for (size_t i = 0; i < dim; i++) {
        x[i] = (float)offset + random_float(size);
        weight[i] = random_float(1), bias[i] = random_float(1);
        mean += (double)x[i] / n, absolute += fabs((double)x[i]) / n;
    }
    for (size_t i = 0; i < dim; i++) variance += (x[i] - mean) * (x[i] - mean) / n;
    // The mean is off by the roundings of its sum and of its division, which moves all numbers alike; the variance by
    // the square of that, and else as in RMSNorm; the bias adds one rounding.
    plain_layer_norm(first, x, weight, bias, dim, 1e-5f);
    double off = (n / 16 + 6) * UNIT * absolute, r = 1 / sqrt(variance + eps), relative = (n / 32 + 11) * UNIT;
    for (const Kernels *const *k = usable_kernels(); *k; k++) {
        bool finite = (*k)->normalise(out, x, weight, bias, dim, 1e-5f);
        double worst = 0;
        for (size_t i = 0; i < dim; i++) {
            double scaled = (x[i] - mean) * r * weight[i], wanted = scaled + bias[i];
            double bound = off * r * fabs((double)weight[i]) + fabs(scaled) * (relative + off * off * r * r) +
                           UNIT * fabs(wanted);
            double error = fabs(out[i] - wanted) / (bound * 1.001 + 1e-300);
            if (error > worst) worst = error;  // gcc 12 for arm64 breaks down over fmax() here
        }
        check(finite && worst <= 1, "LayerNorm of %zu numbers, kernel %s: got %g times the error that may be", dim,
              (*k)->name, worst);
        check(!memcmp(first, out, dim * 4), "LayerNorm of %zu numbers, kernel %s: not README's bits", dim, (*k)->name);
        memcpy(out, x, dim * 4);
        (*k)->normalise(out, out, weight, bias, dim, 1e-5f);
        check(!memcmp(first, out, dim * 4), "LayerNorm of %zu numbers in place: other bits", dim);
        float kept = x[dim / 2];
        const float bad[] = { NAN, INFINITY, -INFINITY };
        for (int i = 0; i < 3; i++) {
            x[dim / 2] = bad[i];
            check(!(*k)->normalise(out, x, weight, bias, dim, 1e-5f), "LayerNorm with %g in it: got true, wanted false",
                  (double)bad[i]);
        }
        x[dim / 2] = kept;
    }
    free(x), free(weight), free(bias), free(out), free(first);
}

static void check_activation(Activation how, size_t n, double size) {
    float *gate = get(n * 4 + 4), *up = get(n * 4 + 4), *out = get(n * 4 + 4), *first = get(n * 4 + 4);
    for (size_t i = 0; i < n; i++) gate[i] = random_float(size), up[i] = random_float(1);
    if (n > 6) gate[0] = -100, gate[1] = 100, gate[2] = 0, gate[3] = -87.5f, gate[4] = 88.5f, gate[5] = -0.0f;
    for (const Kernels *const *k = usable_kernels(); *k; k++) {
        double worst = 0, worst_at = 0;
        memcpy(out, gate, n * 4);
        out[n] = 4711;
        (*k)->activate(out, up, n, how);
        for (size_t i = 0; i < n; i++) {
            double x = gate[i], inner = sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x);
            double wanted = (how == SILU ? x / (1 + exp(-x)) : 0.5 * x * (1 + tanh(inner))) * up[i];
            // e^-x within 1 ulp (2 roundings), 1 + it, the quotient, the product. Beyond 88 e^-x is Inf and the result
            // 0, which differs from the truth by less than 88 * e^-88 * |up|.
            double error = (fabs(out[i] - wanted) - (gate[i] < -87 ? 1e-36 * fabs(up[i]) : 0)) / (fabs(wanted) + 1e-38);
            // GELU adds 1 to a tanh that ends a few roundings of 1 away from its own, however near to -1 it is.
            if (how == GELU) error = fabs(out[i] - wanted) / (fabs(x * up[i]) * (1 + fabs(inner)) + 1e-38);
            if (error > worst) worst = error, worst_at = gate[i];
        }
        check(worst <= 6 * UNIT, "activation of %g, kernel %s: got a relative error of %g, wanted at most %g", worst_at,
              (*k)->name, worst, 6 * UNIT);
        check(out[n] == 4711, "activation of %zu numbers, kernel %s: wrote behind them", n, (*k)->name);
        if (k == usable_kernels()) memcpy(first, out, n * 4);
        check(!memcmp(first, out, n * 4), "activation of %zu numbers: kernels %s and %s differ", n,
              usable_kernels()[0]->name, (*k)->name);
    }
    free(gate), free(up), free(out), free(first);
}

static void test_vectors(void) {
    static const size_t sizes[] = { 1, 2, 15, 16, 17, 24, 31, 32, 33, 63, 64, 65, 100, 257, 576, 2048 };
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        check_normalise(sizes[i], 1, 1e-5f);
        check_normalise(sizes[i], 1e-4, 1e-5f);
        check_normalise(sizes[i], 1e6, 1e-6f);
        check_layer_norm(sizes[i], 1, 0);
        check_layer_norm(sizes[i], 1, 30);
        check_layer_norm(sizes[i], 1e3, -10);
        for (int how = SILU; how <= GELU; how++) {
            check_activation((Activation)how, sizes[i], 1);
            check_activation((Activation)how, sizes[i], 40);
        }
    }
}

// ---- Attention ----

typedef struct {
    int head_dim, group, n;
    size_t position;
    bool cache_f32;
    double size;  // of queries and keys
    size_t window;  // 0: none
    double cap;     // 0: none
} AttentionCase;

// softmax(cap(q . k / sqrt(K))) . v over the window in double, and how far a float result may be from it.
static double wanted_attention(const AttentionCase *c, const float *query, const double *keys, const double *values,
                               size_t n, int d, double *bound) {
    double sum = 0, out = 0, max = -INFINITY, largest = 0, score_error = 0, *score = get(n * sizeof *score);
    size_t from = c->window && n > c->window ? n - c->window : 0;
    for (size_t p = from; p < n; p++) {
        double dot = 0, absolute = 0;
        for (int i = 0; i < c->head_dim; i++) {
            dot += query[i] * keys[p * (size_t)c->head_dim + (size_t)i];
            absolute += fabs(query[i] * keys[p * (size_t)c->head_dim + (size_t)i]);
        }
        score[p] = dot / sqrt(c->head_dim);
        if (c->cap > 0) score[p] = c->cap * tanh(score[p] / c->cap);
        max = score[p] > max ? score[p] : max;
        // a chain of K roundings of at most the sum of absolute values, then the scale's two and the product
        double error = (c->head_dim + 3) * UNIT * absolute / sqrt(c->head_dim);
        error += 6 * c->cap * UNIT;  // the cap's roundings, and those of 1 - 2 / (e^2x + 1)
        score_error = error > score_error ? error : score_error;
    }
    for (size_t p = from; p < n; p++) {
        double weight = exp(score[p] - max);
        sum += weight;
        out += weight * values[p * (size_t)c->head_dim + (size_t)d];
        largest = fmax(largest, fabs(values[p * (size_t)c->head_dim + (size_t)d]));
        if (score_error < fabs(score[p]) * UNIT) score_error = fabs(score[p]) * UNIT;
    }
    // A weight is off by the factor e^(errors of score and max, and of their difference) and one ulp; numerator and
    // denominator both; their chains are n and n/16 + 4 long; one division. All of that times the largest value.
    *bound = largest * (2 * (3 * score_error + 2 * UNIT) + ((double)n + (double)n / 16 + 5) * UNIT);
    free(score);
    return out / sum;
}

// The cache of this one head: pages in an order that is not theirs, filled with NaN where nothing was stored.
static Sequence put_into_cache(AttentionCase c, Cache *cache, size_t n, double *keys, double *values) {
    size_t head_dim = (size_t)c.head_dim, item = c.cache_f32 ? 4 : 2;
    Layer layer = { .n_kv_heads = 1 };
    Model m = { .config = { .n_layers = 1, .head_dim = c.head_dim }, .layers = &layer };
    Error e = { 0 };
    if (!make_cache(&m, cache, (Settings){ .context = (int)n + 100, .cache_f32 = c.cache_f32 }, 1, &e)) exit(1);
    Sequence s = new_sequence(cache, 0);
    for (size_t i = 0; i < n_pages((int)n); i++) s.pages[i] = (int)(n_pages((int)n) - i);
    memset(cache->pool, 255, cache->page_bytes * n_pages((int)n + 100));
    for (size_t p = 0; p < n; p++) {
        size_t page_bytes = 64 * (head_dim + round_up(head_dim, 16)) * item;
        unsigned char *to_keys = cache->pool + (size_t)s.pages[p / 64] * page_bytes;
        unsigned char *to_values = to_keys + 64 * head_dim * item;
        for (size_t d = 0; d < head_dim; d++) {
            float key = random_float(c.size), value = random_float(1);
            uint16_t half[2] = { (uint16_t)half_of_value(key), (uint16_t)half_of_value(value) };
            keys[p * head_dim + d] = c.cache_f32 ? key : value_of_half(half[0]);
            values[p * head_dim + d] = c.cache_f32 ? value : value_of_half(half[1]);
            // (4, K, 16) and (K/16, 64, 16), written out
            size_t k = p % 64 / 16 * head_dim * 16 + d * 16 + p % 16, v = d / 16 * 64 * 16 + p % 64 * 16 + d % 16;
            memcpy(to_keys + k * item, c.cache_f32 ? (void *)&key : (void *)&half[0], item);
            memcpy(to_values + v * item, c.cache_f32 ? (void *)&value : (void *)&half[1], item);
        }
    }
    return s;
}

static void check_attention(AttentionCase c) {
    size_t n_positions = c.position + (size_t)c.n, head_dim = (size_t)c.head_dim, row = round_up(head_dim, 16);
    size_t stride = round_up((size_t)c.group * head_dim, 32) + 32, score_stride = round_up(n_positions, 16);
    double *keys = get(n_positions * head_dim * sizeof *keys), *values = get(n_positions * head_dim * sizeof *values);
    Cache cache;
    Sequence sequence = put_into_cache(c, &cache, n_positions, keys, values);
    size_t n_out = (size_t)c.n * stride, n_queries = (size_t)(c.n * c.group);
    float *query = get(n_out * 4), *out = get(n_out * 4), *first = get(n_out * 4);
    Bytes scores = new_bytes(n_queries * score_stride * 4), queries = new_bytes(n_queries * row * 4);
    Bytes sums = new_bytes(n_queries * row * 4), totals = new_bytes(n_queries * 4);
    for (size_t i = 0; i < n_out; i++) query[i] = random_float(c.size);
    Attention a = {
        .query = query, .out = out, .stride = stride, .cached = cache.layers, .pages = sequence.pages,
        .cache_f32 = c.cache_f32, .head_dim = head_dim, .padded = row, .group = c.group,
        .n_queries = (int)n_queries, .position = c.position,
        .window = c.window ? c.window : SIZE_MAX, .scale = 1.0f / sqrtf((float)head_dim), .cap = (float)c.cap,
        .scores = (float *)(void *)scores.bytes, .score_stride = score_stride, .totals = (float *)(void *)totals.bytes,
        .queries = (float *)(void *)queries.bytes, .sums = (float *)(void *)sums.bytes,
    };
    double worst = 0, got = 0, wanted = 0;
    for (const Kernels *const *k = usable_kernels(); *k; k++) {
        for (size_t i = 0; i < n_out; i++) out[i] = 4711;
        kernels = *k;
        attend_unit(&a);
        if (k == usable_kernels()) memcpy(first, out, n_out * 4);
        check(!memcmp(first, out, n_out * 4), "%d heads of %d, %d tokens from %zu: kernels %s and %s differ", c.group,
              c.head_dim, c.n, c.position, usable_kernels()[0]->name, (*k)->name);
    }
    for (size_t at = 0; at < n_out; at++) {
        size_t t = at / stride, i = at % stride;
        if (i >= (size_t)c.group * head_dim) {
            if (first[at] != 4711) worst = INFINITY;  // written beside the heads
            continue;
        }
        double bound, right = wanted_attention(&c, query + t * stride + i / head_dim * head_dim, keys, values,
                                               c.position + t + 1, (int)(i % head_dim), &bound);
        double error = fabs(first[at] - right) / bound;
        if (!(error <= worst)) worst = error, got = first[at], wanted = right;
    }
    check(worst <= 1,
          "%d heads of %d, %d tokens from %zu, %s cache: got %.9g, wanted %.9g, %.2f times as far as allowed", c.group,
          c.head_dim, c.n, c.position, c.cache_f32 ? "f32" : "f16", got, wanted, worst);
    free(keys), free(values), free(query), free(out), free(first), munmap(cache.arena, cache.arena_bytes);
    free(scores.bytes), free(queries.bytes), free(sums.bytes), free(totals.bytes);
}

static void test_attention(void) {
    static const size_t positions[] = { 0, 1, 14, 15, 16, 17, 31, 40, 63, 64, 65, 130 };
    static const int head_dims[] = { 4, 8, 16, 20, 64, 40 };
    for (size_t p = 0; p < 12; p++) {
        for (size_t d = 0; d < 6; d++) {
            for (int n = 1; n <= 8; n++) {
                int group = 1 + (int)(p + d) % 7;
                check_attention((AttentionCase){ head_dims[d], group, n, positions[p], n % 2, 1, 0, 0 });
                check_attention((AttentionCase){ head_dims[d], group, n, positions[p], n % 2 == 0, n == 3 ? 4 : 0.1,
                                                 1 + (size_t)(7 * n) % 40, n % 3 });
            }
        }
    }
    check_attention((AttentionCase){ 64, 1, 24, 100, false, 1, 30, 0 });
    check_attention((AttentionCase){ 32, 32, 2, 70, false, 1, 0, 2 });
    // A cap would make what is not finite finite again.
    for (const Kernels *const *k = usable_kernels(); *k; k++) {
        const float bad[] = { NAN, INFINITY, -INFINITY };
        for (int i = 0; i < 3; i++) {
            float p[16] = { 1, bad[i], 2 };
            float lane[16] = { 0 };
            (*k)->exponentiate(lane, p, 3, (*k)->scale_scores(p, 0, 3, 1, 50));
            check(isnan(fold_lanes(lane)), "a score of %g under a cap: got a number", (double)bad[i]);
        }
    }
}

// ---- Rotation ----

// By what angles are divided. YaRN's values: transformers 5.24, _compute_yarn_parameters, as the quotient of the plain
// frequencies and its own; the others are plain.
static void test_slow_down(void) {
    static const struct {
        int rope_dim, original;
        double theta, factor, fast, slow, wanted[16];
    } cases[] = {
        { 16, 20, 10000, 4, 32, 1, { 1, 1.59999997, 4, 4, 4, 4, 4, 4 } },
        { 32, 20, 10000, 4, 1, 0.25, { 1, 1, 1, 1.33333337, 2.00000015, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4 } },
        { 32, 4096, 1e+06, 8, 32, 1, { 1, 1, 1, 1, 1.21212119, 1.53846149, 2.10526327, 3.3333335, 8, 8, 8,
          8, 8, 8, 8, 8 } },
        { 8, 4096, 100, 4, 32, 1, { 1, 1, 1, 1.23076931 } },
        { 8, 64, 10000, 2.5, 4, 2, { 1, 2.50000009, 2.49999983, 2.50000018 } },
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        Model m = { .config = { .rope_dim = cases[i].rope_dim, .context = 1000, .original_context = cases[i].original,
                                .rope_theta = cases[i].theta, .rope_scale = cases[i].factor,
                                .yarn_fast = cases[i].fast, .yarn_slow = cases[i].slow } };
        for (int k = 0; k < cases[i].rope_dim / 2; k++) {
            double got = slow_down(&m, 64, k), wanted = cases[i].wanted[k];  // theirs are quotients of two floats
            check(fabs(got - wanted) <= 3 * UNIT * wanted, "YaRN case %zu, pair %d: got %.9g, wanted %.9g", i, k, got,
                  wanted);
        }
    }
    const float long_factors[] = { 2, 3 }, short_factors[] = { 1, 1.5f };
    Model m = { .config = { .rope_dim = 4, .context = 1000, .original_context = 64, .rope_scale = 1 },
                .long_factors = long_factors, .short_factors = short_factors };
    for (int k = 0; k < 2; k++) {
        check(slow_down(&m, 64, k) == (double)short_factors[k], "LongRoPE, as long as before: not the short factors");
        check(slow_down(&m, 65, k) == (double)long_factors[k], "LongRoPE, longer than before: not the long factors");
    }
    m.config.original_context = 0;  // a file that does not say: as long as the model's own
    check(slow_down(&m, 1000, 1) == 1.5, "LongRoPE without an original context: not the short factors");
}

static void test_rotation(void) {
    test_slow_down();
    const struct { Pairing pairing; int head_dim, rope_dim; double theta, scale; const char *what; } cases[] = {
        { ADJACENT, 4, 4, 10000, 1, "adjacent" }, { HALVES, 8, 8, 1e6, 1, "halves" },
        { ADJACENT, 16, 16, 5e5, 4, "adjacent, scaled" }, { HALVES, 64, 64, 10000, 1, "halves of 64" },
        { ADJACENT, 16, 8, 10000, 1, "half of a head" }, { HALVES, 16, 6, 10000, 1, "6 of 16" },
    };
    const float factors[32] = { 1, 1.5f, 8, 4, 2, 1, 8, 8 };
    for (size_t i = 0; i < 2 * sizeof cases / sizeof *cases; i++) {
        const bool slowed = i % 2 && cases[i / 2].rope_dim == 16;
        const double magnitude = slowed ? 1.25 : 1;
        Config c = {
            .pairing = cases[i / 2].pairing, .head_dim = cases[i / 2].head_dim, .rope_dim = cases[i / 2].rope_dim,
            .rope_theta = cases[i / 2].theta, .rope_scale = cases[i / 2].scale, .rope_magnitude = magnitude,
            .context = 1000,
        };
        Model m = { .config = c, .rope_factors = slowed ? factors : NULL };
        double turns[64];
        Rotation a = { .turns = turns, .cosine_sine = get(1000 * (size_t)c.rope_dim * 4), .positions = 1000 };
        make_turns(&m, &a, 1000);
        for (size_t position = 0; position < 1000; position++) make_angles(&m, &a, position);
        double worst = 0;
        int half = c.rope_dim / 2;
        for (int position = 0; position < 1000; position += 27) {
            float head[64], out[64] = { 0 }, first[64], before[64];
            for (int k = 0; k < c.head_dim; k++) head[k] = out[k] = random_float(1);
            memcpy(first, out, sizeof first);
            for (const Kernels *const *k = usable_kernels(); *k; k++) {
                memcpy(out, first, sizeof out);
                (*k)->rotate(out, a.cosine_sine + (size_t)position * (size_t)c.rope_dim, c.rope_dim, c.pairing);
                if (k != usable_kernels() && memcmp(out, before, sizeof out)) worst = INFINITY;
                memcpy(before, out, sizeof out);
            }
            for (int k = 0; k < c.head_dim; k++) {
                double wanted = head[k];
                if (k < c.rope_dim) {  // RoFormer, equation 34; the partner of k and who of the two comes first
                    int pair = c.pairing == ADJACENT ? k / 2 : k % half;
                    bool is_first = c.pairing == ADJACENT ? k % 2 == 0 : k < half;
                    int other = c.pairing == ADJACENT ? (is_first ? k + 1 : k - 1) : (is_first ? k + half : k - half);
                    double angle = position / c.rope_scale * pow(c.rope_theta, -2.0 * pair / c.rope_dim) /
                                   (slowed ? factors[pair] : 1);
                    wanted = (head[k] * cos(angle) + (is_first ? -1 : 1) * head[other] * sin(angle)) * magnitude;
                    // cos, sin, two products and a sum are rounded once each: 3 roundings of each of two terms
                    double size = magnitude * (fabs(head[k]) + fabs(head[other]));
                    double error = fabs(out[k] - wanted) / (3.01 * UNIT * size);
                    worst = error > worst ? error : worst;
                } else if (out[k] != head[k]) {
                    worst = INFINITY;
                }
            }
        }
        check(worst <= 1, "%s%s: got an error of %.2f times the bound of 3 roundings", cases[i / 2].what,
              slowed ? ", with factors" : "", worst);
        free(a.cosine_sine);
    }
}
