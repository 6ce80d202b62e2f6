/* kernels.c - arithmetic, number formats, and every kernel of this CPU against its definition.
 *
 * The definition itself is held against numbers made elsewhere: exact fractions and mpmath
 * (arithmetic.vec), the Python package gguf (formats.vec), sums in double written out here. A
 * kernel is held against the definition bit by bit, on inputs that lie flush against forbidden
 * pages.
 */
#define GEMMA3_NO_MAIN
#include "../gemma3.c"

#include "fixture.h"

#include <sys/mman.h>

/* ---- Helpers --------------------------------------------------------------------------------- */

static uint64_t random_state = 1;

static uint32_t random_u32(void)
{
    random_state = random_state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(random_state >> 32);
}

static int random_below(int n) { return (int)(random_u32() % (uint32_t)n); }

/* In -1 .. 1 */
static float random_float(void) { return (float)((int32_t)random_u32() / 2147483648.0); }

/* A NaN's payload is outside the contract: all NaNs are made the same before bits are compared. */
static void unify_nans(float *x, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (x[i] != x[i]) x[i] = float_of(0x7fc00000);
}

static int same_floats(float *a, float *b, size_t n)
{
    unify_nans(a, n);
    unify_nans(b, n);
    return memcmp(a, b, n * sizeof *a) == 0;
}

/* Memory whose first byte (at_end 0) or last byte (at_end 1) touches a page nobody may touch. */
struct guarded {
    void *map;
    size_t map_bytes;
    void *data;
};

static struct guarded guard(size_t bytes, int at_end)
{
    size_t page = 1 << 16, room = (bytes + page - 1) / page * page + (bytes == 0) * page;
    struct guarded g = { .map_bytes = room + 2 * page };
    g.map = mmap(NULL, g.map_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (g.map == MAP_FAILED || mprotect((char *)g.map + page, room, PROT_READ | PROT_WRITE)) {
        printf("Bail out! no guarded memory\n");
        exit(1);
    }
    g.data = (char *)g.map + page + (at_end ? room - bytes : 0);
    return g;
}

static struct guarded guarded_copy(const void *from, size_t bytes, int at_end)
{
    struct guarded g = guard(bytes, at_end);
    memcpy(g.data, from, bytes);
    return g;
}

static void unguard(struct guarded g) { munmap(g.map, g.map_bytes); }

static uint64_t next_u64(char **text) { return strtoull(*text, text, 16); }
static double next_double(char **text)
{
    uint64_t u = next_u64(text);
    double x;
    memcpy(&x, &u, 8);
    return x;
}

/* Rows of arithmetic.vec that begin with this word: moves past the word, or returns 0 at the
 * end. */
static int next_case(char **line, const char *word, char **p)
{
    size_t n = strlen(word);
    for (; **line; *line = next_line(*line))
        if (!strncmp(*line, word, n) && (*line)[n] == ' ') {
            *p = *line + n;
            *line = next_line(*line);
            return 1;
        }
    return 0;
}

/* ---- Arithmetic ------------------------------------------------------------------------------ */

/* With the instruction, where there is one. */
#if defined(HAVE_X86)
BEGIN_TARGET("avx2,fma,f16c")
static float hard_fmaf(float a, float b, float c) { return fma_of_avx2(a, b, c); }
static float hard_exp(float x) { return exp_of_avx2(x); }
END_TARGET
static int has_hard_fma(void) { return cpu_has("avx2"); }
#else
static float hard_fmaf(float a, float b, float c) { return fma_f32(a, b, c); }
static float hard_exp(float x) { return exp_f32(x); }
static int has_hard_fma(void) { return HARD_FMA; }
#endif

typedef float fma_function(float, float, float);

static void fma_is_rounded_once(fma_function *f, const char *name, char *line)
{
    int n = 0, wrong = 0;
    for (char *p; next_case(&line, "fma", &p); n++) {
        float a = next_bits(&p), b = next_bits(&p), c = next_bits(&p);
        uint32_t want = (uint32_t)next_u64(&p), got = bits_of(f(a, b, c));
        if (got != want && !wrong++)
            diag("  fma(%a, %a, %a) is %08x, want %08x", a, b, c, got, want);
    }
    ok(n > 3000 && wrong == 0, "%s: %d ties, cancellations, subnormals, overflows", name, n);

    wrong = 0;
    for (int i = 0; i < 2000000; i++) {
        float a = float_of(random_u32()), b = float_of(random_u32()), c = float_of(random_u32());
        if (i % 4 == 1) c = -(a * b);                     /* cancels but for the rounding */
        if (i % 4 == 2) c = float_of(bits_of(a * b) ^ (random_u32() & 0x8c000007));
        if (i % 4 == 3)
            b = float_of((bits_of(b) & 0x80ffffff) | (uint32_t)(254 - (bits_of(a) >> 23 & 255))
                                                         << 23);
        float got = f(a, b, c), want = fmaf(a, b, c);
        if (!same_floats(&got, &want, 1) && !wrong++)
            diag("  fma(%a, %a, %a) is %a, want %a", a, b, c, got, want);
    }
    is_int(wrong, 0, "%s: two million random cases as the C library has them", name);

    float inf = float_of(0x7f800000), nan = float_of(0x7fc00000), zero = 0;
    ok(f(inf, 1, 1) == inf && f(-2, inf, 1) == -inf && f(1, 1, -inf) == -inf, "%s: infinities",
       name);
    float none[5] = { f(inf, zero, 1), f(inf, 1, -inf), f(nan, 1, 1), f(1, nan, 1), f(1, 1, nan) };
    int nans = 0;
    for (int i = 0; i < 5; i++) nans += none[i] != none[i];
    is_int(nans, 5, "%s: infinity times zero and the like are NaN", name);
    ok(bits_of(f(-zero, 1, -zero)) == 0x80000000 && bits_of(f(-zero, 1, zero)) == 0 &&
       bits_of(f(1, 1, -1)) == 0, "%s: signs of zero", name);
}

typedef float exp_function(float);

static void exp_is_the_contracts(exp_function *f, const char *name, char *line)
{
    int n = 0, wrong = 0;
    double worst = 0;
    for (char *p; next_case(&line, "exp", &p); n++) {
        float x = next_bits(&p);
        uint32_t want = (uint32_t)next_u64(&p);
        double exact = next_double(&p), ulp = ldexp(1, ilogb(exact) - 23);
        float got = f(x);
        if (bits_of(got) != want && !wrong++) diag("  exp(%a) is %a, want %08x", x, got, want);
        double off = fabs(got - exact) / ulp;
        if (!(off <= worst)) worst = off;
    }
    ok(n > 600 && !wrong, "%s: %d values have the contract's bits", name, n);
    ok(worst <= 0.92, "%s: %.3f ulp wrong at worst, at most 0.92", name, worst);
    float inf = float_of(0x7f800000);
    ok(f(-87.00001f) == 0 && f(-inf) == 0 && f(-1e30f) == 0 && f(88.70001f) == inf && f(inf) == inf,
       "%s: +0 below -87, infinity above 88.7", name);
    ok(f(float_of(0x7fc00000)) != f(float_of(0x7fc00000)), "%s: NaN for NaN", name);
    ok(bits_of(f(0)) == bits_of(1) && bits_of(f(-0.0f)) == bits_of(1), "%s: exp(0) = 1", name);
}

static double ulps_off(double got, double want)
{
    return got == want
               ? 0
               : fabs(got - want) / ldexp(1, ilogb(want) < -1022 ? -1074 : ilogb(want) - 52);
}

static void double_functions_are_within_ulps(char *text)
{
    double worst_exp = 0, worst_log = 0;
    char *line = text, *p;
    while (next_case(&line, "dexp", &p)) {
        double x = next_double(&p), off = ulps_off(gemma3_exp(x), next_double(&p));
        if (!(off <= worst_exp)) worst_exp = off;
    }
    line = text;
    while (next_case(&line, "dlog", &p)) {
        double x = next_double(&p), off = ulps_off(gemma3_log(x), next_double(&p));
        if (!(off <= worst_log)) worst_log = off;
    }
    ok(worst_exp <= 2, "gemma3_exp is %.2f ulp wrong at worst", worst_exp);
    ok(worst_log <= 2, "gemma3_log is %.2f ulp wrong at worst", worst_log);
    double inf = (double)float_of(0x7f800000), nan = (double)float_of(0x7fc00000);
    ok(gemma3_exp(-inf) == 0 && gemma3_exp(inf) == inf && gemma3_exp(nan) != gemma3_exp(nan) &&
           gemma3_exp(-746) == 0 && gemma3_exp(710) == inf && gemma3_exp(0) == 1,
       "gemma3_exp at its ends");
    ok(gemma3_log(0) == -inf && gemma3_log(inf) == inf && gemma3_log(-1) != gemma3_log(-1) &&
       gemma3_log(nan) != gemma3_log(nan) && gemma3_log(1) == 0, "gemma3_log at its ends");
}

static void rotary_angles_are_correctly_rounded(char *text)
{
    int n = 0, wrong = 0;
    char *line = text, *p;
    for (; next_case(&line, "angle", &p); n++) {
        float x = next_bits(&p), c, s;
        uint32_t want_c = (uint32_t)next_u64(&p), want_s = (uint32_t)next_u64(&p);
        cos_sin(x, &c, &s);
        if ((bits_of(c) != want_c || bits_of(s) != want_s) && !wrong++)
            diag("  at %a: cos %08x, want %08x, sin %08x, want %08x", x, bits_of(c), want_c,
                 bits_of(s), want_s);
    }
    ok(n > 700 && !wrong, "cos and sin of %d angles below 2^31 are correctly rounded", n);
    float outside[] = { 0x1p31f, 1e30f, float_of(0x7f800000), float_of(0x7fc00000), -1 }, c, s;
    for (wrong = n = 0; n < 5; n++) cos_sin(outside[n], &c, &s), wrong += c == c || s == s;
    is_int(wrong, 0, "outside there is no cosine: not a number, on every CPU");
    n = wrong = 0;
    line = text;
    for (; next_case(&line, "freq", &p); n++) {
        double base = next_double(&p), exponent = next_double(&p);
        wrong += bits_of(1.0f / (float)power(base, exponent)) != (uint32_t)next_u64(&p);
    }
    ok(n == 256 && !wrong, "1 / theta^(2j/D) of %d frequencies likewise", n);
}

static void lanes_join_as_a_tree(void)
{
    float x[16], lane[16];
    int wrong = 0;
    for (int k = 0; k < 1000; k++) {
        for (int j = 0; j < 16; j++) lane[j] = x[j] = random_float() * ldexpf(1, random_below(30));
        float want = (((x[0] + x[8]) + (x[4] + x[12])) + ((x[2] + x[10]) + (x[6] + x[14]))) +
                     (((x[1] + x[9]) + (x[5] + x[13])) + ((x[3] + x[11]) + (x[7] + x[15])));
        wrong += bits_of(join_lanes(lane)) != bits_of(want);
    }
    is_int(wrong, 0, "16 lanes join as j + (j+8), then +4, +2, +1");
}

/* ---- Half precision -------------------------------------------------------------------------- */

static float half_value(int h) /* finite, from the format's definition */
{
    int e = h >> 10 & 31, m = h & 1023;
    float x = e ? ldexpf((float)(1024 + m), e - 25) : ldexpf((float)m, -24);
    return h & 0x8000 ? -x : x;
}

static void half_precision_is_ieee(void)
{
    int wrong = 0, back = 0, ties = 0;
    for (int h = 0; h < 65536; h++) {
        float x = f16_to_f32((uint16_t)h);
        int is_nan = (h & 0x7fff) > 0x7c00, is_inf = (h & 0x7fff) == 0x7c00;
        if (is_nan) wrong += x == x;
        else if (is_inf) wrong += x != (h & 0x8000 ? -1 : 1) * float_of(0x7f800000);
        else wrong += bits_of(x) != bits_of(half_value(h));
        int again = f32_to_f16(x);
        back += is_nan ? (again & 0x7fff) <= 0x7c00 : again != h;
    }
    is_int(wrong, 0, "all 65536 half precision numbers");
    is_int(back, 0, "and back");
    for (int h = 0; h < 0x7c00;
         h++) { /* halfway to the next, and a float's last place to each side */
        float next = h == 0x7bff ? 65536 : half_value(h + 1), middle = (half_value(h) + next) / 2;
        int even = h & 1 ? h + 1 : h;
        for (int sign = 0; sign <= 0x8000; sign += 0x8000) {
            float m = sign ? -middle : middle;
            ties += f32_to_f16(m) != (sign | even);
            ties += f32_to_f16(float_of(bits_of(m) - 1)) != (sign | h);
            ties += f32_to_f16(float_of(bits_of(m) + 1)) != (sign | (h + 1));
        }
    }
    is_int(ties, 0, "a float becomes the nearest, ties to even, too large infinity");
    ok(f32_to_f16(1e-30f) == 0 && f32_to_f16(-1e-30f) == 0x8000 && f32_to_f16(1e30f) == 0x7c00,
       "and far outside zero or infinity");
}

/* ---- Number formats -------------------------------------------------------------------------- */

/* A matrix over rows as they lie in a file, or over tiles made of them. */
static struct matrix matrix_of(const struct format *f, const uint8_t *data, int rows, int cols)
{
    return (struct matrix){ .format = f, .rows = rows, .cols = cols, .data = data,
                            .row_bytes = (size_t)(cols / f->elements) * f->bytes };
}

static size_t tiles_size(const struct matrix *w) { return n_tiles(w) * TILE_ROWS * w->row_bytes; }

static void repack_into(uint8_t *to, const struct matrix *w)
{
    for (int r = 0; r < w->rows; r += TILE_ROWS)
        make_tile(to + r * w->row_bytes, w->data + r * w->row_bytes, w->row_bytes,
                  w->rows - r < TILE_ROWS ? w->rows - r : TILE_ROWS, w->cols / w->format->elements,
                  w->format);
}

static const struct format *format_named(const char *name)
{
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if (!strcmp(formats[i].name, name)) return &formats[i];
    return NULL;
}

static void hex_bytes(const char *line, uint8_t *out, int n)
{
    for (int i = 0; i < n; i++) {
        char two[3] = { line[2 * i], line[2 * i + 1], 0 };
        out[i] = (uint8_t)strtoul(two, NULL, 16);
    }
}

/* Every block as a row of its own: one by one, and all rows of a tile together. */
static void a_format_is_ggufs(const struct format *f, const uint8_t *blocks, float *want, int n)
{
    int size = f->elements;
    struct matrix w = matrix_of(f, blocks, n, size), tiled = w;
    struct guarded tiles = guard(tiles_size(&w), 1),
                   rows = guarded_copy(blocks, n * w.row_bytes, 1);
    repack_into(tiles.data, &w);
    w.data = rows.data;
    tiled.tiled = 1, tiled.data = tiles.data;
    for (int k = 0; k < N_KERNELS; k++) {
        if (!cpu_has(all_kernels[k]->name)) continue;
        int wrong = 0;
        for (int t = 0; t <= all_kernels[k]->tiles; t++)
            for (int at_once = 1; at_once <= TILE_ROWS; at_once *= TILE_ROWS)
                for (int r = 0; r < n; r += at_once) {
                    int n_rows = min_int(n - r, at_once);
                    struct guarded got = guard((size_t)n_rows * size * sizeof(float), 1);
                    all_kernels[k]->dequantize(t ? &tiled : &w, r, n_rows, got.data);
                    wrong += !same_floats(got.data, want + (size_t)r * size, (size_t)n_rows * size);
                    unguard(got);
                }
        ok(!wrong, "%s, %s: %d blocks have the values of gguf, also from tiles", f->name,
           all_kernels[k]->name, n);
    }
    unguard(tiles);
    unguard(rows);
}

static void formats_are_ggufs(void)
{
    char *text = read_file("test/data/formats.vec", NULL), *line = text;
    int seen = 0;
    while (*line == '#') line = next_line(line);
    while (!strncmp(line, "type ", 5)) {
        char name[16];
        int number, elements, bytes, n;
        if (sscanf(line, "type %15s %d %d %d %d", name, &number, &elements, &bytes, &n) != 5) break;
        line = next_line(line);
        const struct format *f = format_named(name);
        if (!ok(f && f->type == number && f->elements == elements && f->bytes == bytes,
                "%s is type %d: %d elements in %d bytes", name, number, elements, bytes)) break;
        uint8_t *blocks = malloc((size_t)n * bytes);
        float *want = malloc((size_t)n * elements * sizeof *want);
        for (int i = 0; i < n; i++) {
            hex_bytes(line, blocks + (size_t)i * bytes, bytes);
            char *p = line = next_line(line);
            for (int j = 0; j < elements; j++) want[(size_t)i * elements + j] = next_bits(&p);
            line = next_line(line);
        }
        a_format_is_ggufs(f, blocks, want, n);
        free(blocks), free(want);
        seen++;
    }
    int quantised = 0;
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        quantised += !is_float(&formats[i]);
    is_int(seen, quantised, "every quantised format was compared");
    free(text);
}

/* ---- Activations ----------------------------------------------------------------------------- */

static uint32_t largest_bits(const float *x, int n)
{
    uint32_t most = 0;
    for (int j = 0; j < n; j++)
        most = (bits_of(x[j]) & 0x7fffffff) > most ? bits_of(x[j]) & 0x7fffffff : most;
    return most;
}

/* Rule 1, written again. Returns d. */
static float quantise_by_rule_1(const float *x, int code[32])
{
    float amax = float_of(largest_bits(x, 32));
    memset(code, 0, 32 * sizeof *code);
    if (!(amax < float_of(0x7f800000))) return float_of(0x7fc00000);
    if (amax < ldexpf(1, -100)) return 0;
    float scale = 127 / amax;
    for (int j = 0; j < 32; j++) code[j] = (int)rintf(x[j] * scale);
    return amax / 127;
}

enum { BLOCK_KINDS = 10 };

static void fill_block(float *x, int kind)
{
    float size = ldexpf(1 + random_float() / 2, random_below(200) - 80);
    for (int j = 0; j < 32; j++) x[j] = random_float() * size;
    int at = random_below(32);
    switch (kind) {
    case 1: memset(x, 0, 32 * sizeof *x); x[at] = -0.0f; break;
    case 2: for (int j = 0; j < 32; j++) x[j] = j % 3 ? size : -size; break;    /* all +-127 */
    case 3: for (int j = 0; j < 32; j++) x[j] = ldexpf(random_float(), -100); break;
    case 4:
        for (int j = 0; j < 32; j++) x[j] = float_of(random_u32() & 0x807fffff);
        break; /* subnormal */
    case 5: x[at] = float_of(0x7f800000 | (random_u32() & 0x80000000)); break;
    case 6: x[at] = float_of(0x7fc00000); break;
    case 7:
        for (int j = 0; j < 32; j++) x[j] = (float)(random_below(255) - 127) / 2;
        x[at] = 127;
        break; /* ties */
    case 8: for (int j = 0; j < 32; j++) x[j] = j == at ? ldexpf(1, -100) : 0; break;
    case 9: x[at] = float_of(0x7f7fffff); break;
    default: break;
    }
}

static void activations_follow_rule_1(const struct kernels *k)
{
    int wrong = 0, outside = 0, sums = 0;
    for (int i = 0; i < 20000; i++) {
        float x[32];
        int code[32];
        struct q8_block b;
        fill_block(x, i % BLOCK_KINDS);
        float d = quantise_by_rule_1(x, code);
        k->quantize(&b, x, 32);
        int sum[2] = { 0, 0 }, bad = !same_floats(&b.d, &d, 1);
        for (int j = 0; j < 32; j++) {
            bad |= b.code[j] != code[j];
            outside += b.code[j] == -128;
            sum[j / 16] += b.code[j];
        }
        if (bad && !wrong++)
            diag("  kind %d: d %08x, want %08x", i % BLOCK_KINDS, bits_of(b.d), bits_of(d));
        sums += b.sum[0] != sum[0] || b.sum[1] != sum[1];
    }
    is_int(wrong, 0, "%s: activation blocks follow rule 1", k->name);
    is_int(outside, 0, "%s: no activation is ever -128", k->name);
    is_int(sums, 0, "%s: a block keeps the sums of its halves", k->name);
}

static void long_activations_are_blocks(const struct kernels *k)
{
    int wrong = 0;
    for (int n = 32; n <= 320; n += 32)
        for (int at_end = 0; at_end <= 1; at_end++) {
            struct guarded x = guard(n * sizeof(float), at_end);
            struct guarded got = guard(n / 32 * sizeof(struct q8_block), at_end);
            for (int j = 0; j < n; j += 32)
                fill_block((float *)x.data + j, random_below(BLOCK_KINDS));
            k->quantize(got.data, x.data, n);
            for (int b = 0; b < n / 32; b++) {
                struct q8_block *one = (struct q8_block *)got.data + b;
                int code[32];
                float d = quantise_by_rule_1((float *)x.data + 32 * b, code);
                wrong += !same_floats(&one->d, &d, 1);
                for (int j = 0; j < 32; j++) wrong += one->code[j] != code[j];
            }
            unguard(x), unguard(got);
        }
    is_int(wrong, 0, "%s: vectors of up to 10 blocks, touching nothing around them", k->name);
}

/* ---- Matrix times vectors -------------------------------------------------------------------- */

/* y [n][rows] = W x, as a model whose kernels are k computes it, in memory of the exact size. */
static void multiply(const struct kernels *k, int exact, const struct matrix *w, const float *x,
                     int n, float *y, int at_end)
{
    gemma3_model *m = calloc(1, sizeof *m);
    struct unpacked *unpacked = calloc(1, sizeof *unpacked);
    size_t blocks = ((size_t)w->cols + 31) / 32;
    struct guarded q8 = guard(n * blocks * sizeof(struct q8_block), at_end);
    float *rows = calloc(TILE_ROWS * 32 * blocks, sizeof *rows);
    m->exact = exact;
    m->kernels = k;
    gemma3_state *s = calloc(1, sizeof *s);
    s->m = m;
    s->p.n_threads = 1;
    s->q8 = q8.data;
    s->unpacked = unpacked;
    s->row_floats = rows;
    s->acc = calloc(n, sizeof *s->acc);
    s->n_acc = n;
    matmul(s, &(struct linear){w, y}, 1, x, n);
    unguard(q8);
    free(m), free(unpacked), free(rows), free(s->acc), free(s);
}

/* Where a block's half precision scales lie. Returns how many there are. */
static int scales_of(const struct format *f, int at[2])
{
    static const struct { const char *name; int n, at[2];
    } where[] = {{"Q4_0", 1, {0}},    {"Q4_1", 2, {0, 2}}, {"Q5_0", 1, {0}},
                 {"Q5_1", 2, {0, 2}}, {"Q8_0", 1, {0}},    {"Q2_K", 2, {80, 82}},
                 {"Q3_K", 1, {108}},  {"Q4_K", 2, {0, 2}}, {"Q5_K", 2, {0, 2}},
                 {"Q6_K", 1, {208}},  {"IQ4_NL", 1, {0}},  {"IQ4_XS", 1, {0}}};
    for (size_t i = 0; i < sizeof where / sizeof *where; i++)
        if (!strcmp(where[i].name, f->name)) {
            at[0] = where[i].at[0], at[1] = where[i].at[1];
            return where[i].n;
        }
    return 0;
}

enum { ORDINARY, EXTREME, RANDOM, WEIGHT_KINDS };
static const char *const kind_names[] = { "ordinary", "extreme", "any" };

/* Blocks with random codes and small scales; with one byte all over and the largest scales; or with
 * random bytes everywhere: infinite, subnormal and NaN scales among them. */
static void fill_weights(const struct format *f, uint8_t *data, size_t n_blocks, int kind)
{
    static const uint8_t bytes[] = { 0x80, 0x00, 0xff, 0x7f, 0x88, 0xf8 };
    static const uint16_t extremes[] = { 0x7bff, 0xfbff, 0x3c00, 0x0001, 0x83ff, 0x0000, 0x8000 };
    int at[2], n_scales = scales_of(f, at);
    for (size_t b = 0; b < n_blocks; b++, data += f->bytes) {
        int fill = random_below(8);
        for (int j = 0; j < f->bytes; j++)
            data[j] = kind == EXTREME && fill < 6 ? bytes[fill] : (uint8_t)random_u32();
        if (is_float(f) && kind == ORDINARY) {
            float x = random_float();
            if (f->type == F32) store_u32_le(data, bits_of(x));
            else store_u16_le(data, f->type == F16 ? f32_to_f16(x) : (uint16_t)(bits_of(x) >> 16));
        }
        for (int i = 0; i < n_scales && kind != RANDOM; i++)
            store_u16_le(data + at[i], kind == EXTREME ? extremes[random_below(7)]
                                                       : f32_to_f16(random_float() / 30));
    }
}

static void fill_activations(float *x, int n, int kind)
{
    for (int j = 0; j < n; j++) x[j] = random_float();
    for (int j = 0; kind != ORDINARY && j + 32 <= n; j += 32) {
        static const int finite[] = { 0, 1, 2, 3, 4, 7, 8, 9 };
        fill_block(x + j, kind == EXTREME   ? finite[random_below(8)]
                          : random_below(8) ? random_below(5)
                                            : random_below(BLOCK_KINDS));
    }
}

/* One product by every kernel, repacked and as it lies in the file, against the scalar one. */
static void try_product(const struct format *f, int kind, int exact, int rows, int cols, int n,
                        int at_end, int wrong[N_KERNELS])
{
    size_t bytes = rows * (size_t)(cols / f->elements) * f->bytes, y_size = (size_t)n * rows;
    struct guarded data = guard(bytes, at_end), x = guard((size_t)n * cols * sizeof(float), at_end);
    struct guarded y = guard(y_size * sizeof(float), at_end);
    float *want = malloc(y_size * sizeof *want);
    fill_weights(f, data.data, bytes / f->bytes, kind);
    fill_activations(x.data, n * cols, kind);
    struct matrix w = matrix_of(f, data.data, rows, cols), tiled = w;
    struct guarded tiles = guard(is_float(f) ? 0 : tiles_size(&w), at_end);
    if (!is_float(f)) {
        repack_into(tiles.data, &w);
        tiled.tiled = 1, tiled.data = tiles.data;
    }
    multiply(all_kernels[N_KERNELS - 1], exact, &w, x.data, n, want, at_end);
    for (int k = 0; k < N_KERNELS; k++) {
        if (!cpu_has(all_kernels[k]->name)) continue;
        for (int t = 0; t <= (!is_float(f) && all_kernels[k]->tiles); t++) {
            multiply(all_kernels[k], exact, t ? &tiled : &w, x.data, n, y.data, at_end);
            if (!same_floats(y.data, want, y_size) && !wrong[k]++)
                diag("  %s, %s weights%s: [%d][%d] times %d%s", all_kernels[k]->name,
                     kind_names[kind], t ? " in tiles" : "", rows, cols, n, exact ? ", exact" : "");
        }
    }
    free(want);
    unguard(data), unguard(x), unguard(y), unguard(tiles);
}

static void kernels_are_the_definition(const struct format *f, int exact)
{
    static const int tokens[] = {1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14,
                                 15, 16, 17, 18, 19, 20, 21, 23, 24, 25, 32, 33, 63, 64};
    static const int row_counts[] = { 1, 2, 7, 15, 16, 17, 31, 32, 33, 48, 50 };
    static const int col_counts[] = { 1, 2, 3, 5, 8, 9, 10 }; /* blocks of 32, or of 256 */
    static const int float_cols[] = {1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 100, 129, 527, 528, 1100};
    int wrong[N_KERNELS] = { 0 }, n_cases = 0, block = f->elements == 256 ? 256 : 32;
    for (int kind = 0; kind < WEIGHT_KINDS; kind++) {
        for (size_t i = 0; i < sizeof tokens / sizeof *tokens; i++, n_cases++)
            try_product(f, kind, exact, 33, block == 256 ? 256 : 96, tokens[i], i % 2, wrong);
        for (size_t i = 0; i < sizeof row_counts / sizeof *row_counts; i++, n_cases++)
            try_product(f, kind, exact, row_counts[i], block, 1 + random_below(9), i % 2, wrong);
        for (size_t i = 0; i < sizeof col_counts / sizeof *col_counts; i++, n_cases++)
            if (block == 32 || col_counts[i] <= 3)
                try_product(f, kind, exact, 18, block * col_counts[i], 1 + (int)i, i % 2, wrong);
        for (size_t i = 0; is_float(f) && i < sizeof float_cols / sizeof *float_cols;
             i++, n_cases++)
            try_product(f, kind, exact, 18, float_cols[i], 1 + random_below(9), i % 2, wrong);
    }
    for (int k = 0; k < N_KERNELS; k++)
        if (cpu_has(all_kernels[k]->name))
            ok(!wrong[k], "%s, %s%s: %d products have the definition's bits", f->name,
               all_kernels[k]->name, exact ? ", exact" : "", n_cases);
}

/* Exact mode: rule 4 over the dequantised row. */
static float product_by_rule_4(const float *w, const float *x, int n)
{
    float lane[16] = { 0 };
    for (int j = 0; j < n; j++) lane[j % 16] = fmaf(w[j], x[j], lane[j % 16]);
    return join_lanes(lane);
}

/* Default mode: the same product in double. *size: of its terms, for the tolerance. */
static double product_in_double(const float *w, const float *x, int n, double *size)
{
    double sum = 0;
    *size = 0;
    for (int b = 0; b < n; b += 32) {
        int code[32];
        double d = quantise_by_rule_1(x + b, code);
        for (int j = 0; j < 32; j++) {
            sum += w[b + j] * d * code[j];
            *size += fabs(w[b + j] * d * code[j]);
        }
    }
    return sum;
}

static void the_definition_is_the_product(const struct format *f)
{
    enum { ROWS = 19, COLS = 512, N = 3 };
    const struct kernels *scalar = all_kernels[N_KERNELS - 1];
    size_t bytes = (size_t)ROWS * (COLS / f->elements) * f->bytes;
    uint8_t *data = malloc(bytes);
    float x[N * COLS], y[N * ROWS], row[COLS];
    fill_weights(f, data, bytes / f->bytes, ORDINARY);
    fill_activations(x, N * COLS, ORDINARY);
    struct matrix w = matrix_of(f, data, ROWS, COLS);
    for (int exact = 0; exact <= 1; exact++) {
        int wrong = 0, by_rule_4 = exact || is_float(f);
        double worst = 0;
        multiply(scalar, exact, &w, x, N, y, 1);
        for (int r = 0; r < ROWS; r++) {
            scalar->dequantize(&w, r, 1, row);
            for (int i = 0; i < N; i++) {
                double size, want = product_in_double(row, x + i * COLS, COLS, &size);
                wrong +=
                    bits_of(y[i * ROWS + r]) != bits_of(product_by_rule_4(row, x + i * COLS, COLS));
                double off = fabs(y[i * ROWS + r] - want) / size;
                if (!(off <= worst)) worst = off;
            }
        }
        if (by_rule_4)
            is_int(wrong, 0, "%s%s: rule 4 over the file's values", f->name,
                   exact ? ", exact" : "");
        else
            ok(worst < 1e-6, "%s: %.2g of the product's terms from its value in double", f->name,
               worst);
    }
    free(data);
}

/* ---- Attention's sums ------------------------------------------------------------------------ */

/* out[i][j] = fma(e[i][p], v[p][j], out[i][j]) over p in order; v in F16 or F32. */
static void mix_by_definition(const struct mix *m)
{
    for (int i = 0; i < m->n; i++)
        for (int j = 0; j < m->width; j++)
            for (int p = 0; p < m->n_pos; p++) {
                float *out = m->out + i * m->out_stride + j;
                *out = fmaf(m->e[i * m->e_stride + p],
                            load_float(m->type, m->v + p * m->v_bytes, j), *out);
            }
}

static void values_are_mixed_in_order(const struct kernels *k)
{
    static const int widths[] = { 1, 5, 8, 15, 16, 17, 31, MIX_WIDTH };
    int wrong = 0, n_cases = 0;
    for (int type = F32; type <= F16; type++)
        for (size_t c = 0; c < sizeof widths / sizeof *widths; c++)
            for (int n = 1; n <= 17; n++, n_cases++) {
                int width = widths[c], n_pos = 1 + random_below(n % 3 ? 40 : 300),
                    element = type == F16 ? 2 : 4;
                struct guarded v = guard((size_t)n_pos * width * element, n % 2);
                struct guarded e = guard((size_t)n * n_pos * sizeof(float), n % 2);
                struct guarded out = guard((size_t)n * width * sizeof(float), n % 2);
                float *want = malloc((size_t)n * width * sizeof *want);
                for (int j = 0; j < n_pos * width; j++)
                    if (type == F16)
                        store_u16_le((uint8_t *)v.data + 2 * j, f32_to_f16(random_float()));
                    else store_u32_le((uint8_t *)v.data + 4 * j, bits_of(random_float()));
                for (int j = 0; j < n * n_pos; j++) ((float *)e.data)[j] = random_float();
                for (int j = 0; j < n * width; j++)
                    want[j] = ((float *)out.data)[j] = random_float();
                struct mix m = {.type = type,
                                .v = v.data,
                                .v_bytes = (size_t)width * element,
                                .n_pos = n_pos,
                                .e = e.data,
                                .e_stride = n_pos,
                                .out = want,
                                .out_stride = width,
                                .n = n,
                                .width = width};
                mix_by_definition(&m);
                m.out = out.data;
                k->mix_values(&m);
                wrong += !same_floats(out.data, want, (size_t)n * width);
                free(want);
                unguard(v), unguard(e), unguard(out);
            }
    ok(!wrong, "%s: %d weighted sums of values, position by position", k->name, n_cases);
}

/* ---- Element by element ---------------------------------------------------------------------- */

enum { LONGEST = 200 };

static void fill_vector(float *x, int n, int kind)
{
    float size = ldexpf(1, random_below(12) - 6);
    for (int j = 0; j < n; j++) x[j] = kind == 2 ? float_of(random_u32()) : random_float() * size;
    if (kind == 1) x[random_below(n)] = float_of(random_below(2) ? 0x7f800000 : 0x7fc00000);
}

static double gelu_in_double(double x)
{ return 0.5 * x * (1 + tanh(sqrt(2 / acos(-1)) * (x + 0.044715 * x * x * x))); }

static void norm_by_definition(float *y, const float *x, const float *w, int n, float eps)
{
    float r = 1.0f / sqrtf(product_by_rule_4(x, x, n) / (float)n + eps);
    for (int j = 0; j < n; j++) y[j] = x[j] * r * w[j];
}

static float softmax_by_definition(float *s, int n, int first)
{
    float lane[16] = { 0 }, most = s[0];
    for (int j = 1; j < n; j++) most = s[j] > most ? s[j] : most;
    for (int j = 0; j < n; j++) {
        s[j] = exp_f32(s[j] - most);
        lane[(first + j) % 16] += s[j];
    }
    return join_lanes(lane);
}

/* Every length from 1 on, flush against both ends, numbers of all kinds. */
static void pieces_are_the_definition(const struct kernels *k)
{
    int norm = 0, rope = 0, gelu = 0, softmax = 0;
    for (int n = 1; n <= LONGEST; n++)
        for (int kind = 0; kind < 3; kind++) {
            int at_end = (n + kind) % 2, first = random_below(50), half = n + n % 2;
            float a[LONGEST], b[LONGEST], w[LONGEST], want[LONGEST];
            fill_vector(a, half < LONGEST ? half : LONGEST, kind);
            fill_vector(b, n, kind);
            fill_vector(w, n, 0);
            struct guarded x = guarded_copy(a, n * sizeof(float), at_end),
                           y = guarded_copy(b, n * sizeof(float), at_end);
            struct guarded g = guarded_copy(w, n * sizeof(float), at_end);

            norm_by_definition(want, a, w, n, 1e-6f);
            k->rmsnorm(y.data, x.data, g.data, n, 1e-6f);
            norm += !same_floats(y.data, want, n);
            k->rmsnorm(x.data, x.data, g.data, n, 1e-6f);
            norm += !same_floats(x.data, want, n);

            memcpy(x.data, a, n * sizeof(float)), memcpy(y.data, b, n * sizeof(float));
            for (int j = 0; j < n; j++) {
                float u = a[j] * fmaf(float_of(0x3d122279), a[j] * a[j], float_of(0x3f4c422a));
                want[j] = a[j] / (1 + exp_f32(-2 * u)) * b[j];
            }
            k->gelu(x.data, y.data, n);
            gelu += !same_floats(x.data, want, n);

            if (kind < 2) { /* scores that are NaN have no maximum: the sum below is NaN too */
                memcpy(x.data, a, n * sizeof(float)), memcpy(want, a, n * sizeof(float));
                for (int j = 0; j < n && kind == 1; j++)
                    ((float *)x.data)[j] = want[j] = 40 * random_float();
                float sum = softmax_by_definition(want, n, first),
                      got = k->exp_scores(x.data, n, first);
                softmax += !same_floats(x.data, want, n) || bits_of(sum) != bits_of(got);
            }
            unguard(x), unguard(y), unguard(g);

            float c[LONGEST], s[LONGEST];
            if (half > LONGEST) continue;
            for (int j = 0; j < half / 2; j++)
                cos_sin((float)random_below(100000) / 7, c + j, s + j);
            for (int j = 0; j < half / 2; j++) {
                want[j] = fmaf(a[j], c[j], -(a[j + half / 2] * s[j]));
                want[j + half / 2] = fmaf(a[j + half / 2], c[j], a[j] * s[j]);
            }
            struct guarded v = guarded_copy(a, half * sizeof(float), at_end);
            struct guarded vc = guarded_copy(c, half / 2 * sizeof(float), at_end);
            struct guarded vs = guarded_copy(s, half / 2 * sizeof(float), at_end);
            k->rope(v.data, vc.data, vs.data, half);
            rope += !same_floats(v.data, want, half);
            unguard(v), unguard(vc), unguard(vs);
        }
    is_int(norm, 0, "%s: RMSNorm of every length to %d, also in place", k->name, LONGEST);
    is_int(gelu, 0, "%s: GELU and gate likewise", k->name);
    is_int(softmax, 0, "%s: softmax likewise, from any position", k->name);
    is_int(rope, 0, "%s: RoPE likewise", k->name);
}

static void softmax_depends_on_no_hidden_scores(const struct kernels *k)
{
    float s[64], equal[40];
    for (int j = 0; j < 40; j++) equal[j] = 3.25f;
    is_close(k->exp_scores(equal, 40, 7), 40, 0, "%s: equal scores count one each", k->name);
    for (int j = 0; j < 64; j++) s[j] = j == 20 ? 90 : -90;
    is_close(k->exp_scores(s, 64, 0), 1, 0, "%s: one large score takes all", k->name);
    float one = -1e30f;
    ok(k->exp_scores(&one, 1, 5) == 1 && one == 1, "%s: a single score", k->name);
}

static void gelu_is_the_tanh_formula(void)
{
    float worst = 0;
    for (float x = -12; x <= 12; x += 0.01f) {
        float gate = x, up = 1;
        all_kernels[N_KERNELS - 1]->gelu(&gate, &up, 1);
        float off = (float)(fabs(gate - gelu_in_double(x)) / (1e-3 + fabs(gelu_in_double(x))));
        if (!(off <= worst)) worst = off;
    }
    ok(worst < 1e-6f, "GELU is the tanh formula to %.2g", worst);
}

int main(void)
{
    fp_state fp = fp_enter();
    char *vec = read_file("test/data/arithmetic.vec", NULL);
    for (int k = 0; k < N_KERNELS; k++)
        if (!cpu_has(all_kernels[k]->name)) diag("this CPU has no %s", all_kernels[k]->name);
    ok(arithmetic_fault() == NULL, "this build and machine pass the self-test");
    fma_is_rounded_once(soft_fmaf, "fma in software", vec);
    exp_is_the_contracts(exp_f32, "exp of the definition", vec);
    if (has_hard_fma()) {
        fma_is_rounded_once(hard_fmaf, "fma in hardware", vec);
        exp_is_the_contracts(hard_exp, "exp in hardware", vec);
    } else {
        skip(10, "this CPU has no fma instruction, or the build does not use it");
    }
    double_functions_are_within_ulps(vec);
    rotary_angles_are_correctly_rounded(vec);
    lanes_join_as_a_tree();
    half_precision_is_ieee();
    formats_are_ggufs();
    gelu_is_the_tanh_formula();
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++) {
        the_definition_is_the_product(&formats[i]);
        for (int exact = 0; exact <= !is_float(&formats[i]); exact++)
            kernels_are_the_definition(&formats[i], exact);
    }
    for (int k = 0; k < N_KERNELS; k++) {
        if (!cpu_has(all_kernels[k]->name)) continue;
        activations_follow_rule_1(all_kernels[k]);
        long_activations_are_blocks(all_kernels[k]);
        values_are_mixed_in_order(all_kernels[k]);
        pieces_are_the_definition(all_kernels[k]);
        softmax_depends_on_no_hidden_scores(all_kernels[k]);
    }
    free(vec);
    fp_leave(fp);
    return done_testing();
}
