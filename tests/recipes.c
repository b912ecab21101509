// What tests/recipes.sh has added to a copy of run.c, put to use.
//     recipes type          products of the new type by every kernel, against plain arithmetic on the file's bytes
//     recipes sampler       choices with the new sampler, against what must not be chosen
//     recipes ARGUMENTS     ./run with the new family, option, kernels, step and sampler
#define main run_main
#include "run.c"
#undef main

// A block: f16 scale | 8 bytes: bits 0, 1 | 4 bytes: bit 2
enum { ROWS = 21, COLS = 96, TOKENS = 5, BLOCK_BYTES = 14 };

static unsigned char file[ROWS][COLS / 32][BLOCK_BYTES];

// Weight c of a row is scale * (q - 4). Of its low bits, the first eight weights have theirs in a byte each, the next
// eight above these; of its high bit, four times as many.
static int weight(int row, int c) {
    const unsigned char *block = file[row][c / 32];
    int i = c % 32, low = block[2 + i % 8] >> i / 8 * 2 & 3, high = block[10 + i % 4] >> i / 4 & 1;
    return low + 4 * high - 4;
}

static unsigned next_random(void) {
    static unsigned random = 1;
    return (random = random * 1103515245 + 12345) >> 16;
}

static int check_type(void) {
    static _Alignas(64) unsigned char tiles[2 * 3 * 1024];
    static _Alignas(64) float x[TOKENS][COLS], y[TOKENS][32];
    static _Alignas(64) Block rounded[COLS / 32 * TOKENS];
    const SourceType *type = &source_types[N_SOURCE_TYPES - 1];
    int wrong = 0, n_kernels = 0;
    for (unsigned char *p = file[0][0]; p < file[0][0] + sizeof file; p++) *p = (unsigned char)next_random();
    for (int i = 0; i < ROWS * COLS / 32; i++)  // scales are powers of two: 2^-10 and others
        memcpy(file[i / 3][i % 3], (uint16_t[]){ (uint16_t)(0x1400 + i % 7 * 0x400) }, 2);
    for (int i = 0; i < TOKENS * COLS; i++)  // integers, 127 the largest of each block: they round to themselves
        x[i / COLS][i % COLS] = i % 32 ? (float)((int)(next_random() & 255) % 255 - 127) : 127;
    Source source = { .type = type, .rows = ROWS, .cols = COLS, .data = file[0][0] };
    Tensor w = { .type = type->tile, .rows = ROWS, .cols = COLS, .tiles = tiles };
    if (strcmp(type->name, "Q3_0") || tensor_bytes(&w) > sizeof tiles) return printf("the row is not the last\n"), 1;
    pack_rows(tiles, &source, (Range){ 0, 2 });
    for (int k = 0; k < N_KERNELS; k++) {
        if (!cpu_can_run(all_kernels[k])) continue;
        kernels = all_kernels[k];
        n_kernels++;
        kernels->round(rounded, x[0], COLS, COLS, TOKENS, (Range){ 0, TOKENS });
        multiply_rows(y[0], 32, &w, (Range){ 0, 2 }, &(Activations){ NULL, rounded, TOKENS, 0, TOKENS, 0 });
        for (int t = 0; t < TOKENS; t++) {
            for (int r = 0; r < ROWS; r++) {
                double sum = 0;  // exact: all of it are small multiples of 2^-10
                for (int c = 0; c < COLS; c++) {
                    double scale = ldexp(1, -10 + (r * 3 + c / 32) % 7);
                    sum += scale * weight(r, c) * x[t][c];
                }
                if (y[t][r] != sum && wrong++ < 3)
                    printf("kernel %s, token %d, row %d: got %a, wanted %a\n", kernels->name, t, r, (double)y[t][r],
                           sum);
            }
        }
    }
    return wrong > 0 || n_kernels < 2;
}

// Probabilities are 2^-1, 2^-2, ... 2^-10 and, twice, 2^-11 of their sum: which of them may be chosen is plain to see.
static int check_sampler(void) {
    enum { N = 12 };
    float logits[N];
    Sampler s = { .temperature = 1 };
    Error e = { 0 };
    kernels = all_kernels[N_KERNELS - 1];
    if (!make_sampler(&s, N, 1, &e)) return 1;
    for (int i = 0; i < N; i++) logits[i] = -logf(2) * (float)(i < N - 1 ? i : N - 2);
    for (int most = 1; most <= 8; most++) {
        unsigned chosen = 0;
        s.epsilon = 0.75f * ldexpf(1, -most);
        for (int i = 0; i < 10000; i++) chosen |= 1u << choose_token(&s, NULL, 0, logits, N);
        if (chosen == (1u << most) - 1) continue;
        printf("epsilon %g: got tokens %#x, wanted the first %d\n", (double)s.epsilon, chosen, most);
        return 1;
    }
    return 0;
}

int main(int argc, char **argv) {
    if (argc == 2 && !strcmp(argv[1], "type")) return check_type();
    if (argc == 2 && !strcmp(argv[1], "sampler")) return check_sampler();
    return run_main(argc, argv);
}
