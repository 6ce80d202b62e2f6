/* bench.c - how fast the library is on this machine, beside what the machine can do at most.
 *
 *     test/bench MODEL.gguf [-t THREADS] [-r REPEATS] [-n TOKENS] [-p TOKENS] [-d DEPTH,DEPTH...]
 *                           [--isa NAME] [--exact] [--no-repack]
 *
 * Decoding reads every weight once for each token, and the keys and values that the token sees:
 *
 *     bytes of the p-th token = weights + layers' K and V rows of min(p, window) positions
 *                                      (local) or p positions (global)
 *
 * so it cannot be faster than those bytes over the memory's read bandwidth, which is measured in
 * the same run, by the same threads, between the repeats: machines are shared and their speed
 * drifts. The prompt is bound by arithmetic: two operations for each weight and token, against the
 * multiply-add peak of the instruction set in use (int8; float in exact mode). Everything is the
 * median of the repeats, with the least and the most beside it. Uses gemma3.h only. */
#include "../gemma3.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { MAX_REPEATS = 99, MAX_DEPTHS = 8, BUFFER_BYTES = 256 << 20, PEAK_ROUNDS = 1000 * 1000 };

struct args {
    const char *model;
    int n_threads, n_repeats, n_decode, n_prompt, n_depths, depth[MAX_DEPTHS];
    gemma3_options options;
};

static void die(const char *what)
{
    fprintf(stderr, "bench: %s\n", what);
    exit(1);
}

/* ---- Figures: the repeats of one measurement ---- */

struct figure {
    double value[MAX_REPEATS];
    int n;
};

static void record(struct figure *f, double value)
{
    f->value[f->n++] = value;
}

static int compare_doubles(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(struct figure *f)
{
    qsort(f->value, (size_t)f->n, sizeof *f->value, compare_doubles);
    return f->n % 2 ? f->value[f->n / 2] : (f->value[f->n / 2 - 1] + f->value[f->n / 2]) / 2;
}

static void print_row(const char *name, struct figure *f, const char *unit, const char *note)
{
    double middle = median(f);
    printf("| %-26s | %9.4g | %9.4g .. %-9.4g | %-8s | %s |\n", name, middle, f->value[0],
           f->value[f->n - 1], unit, note);
}

/* ---- The machine: read bandwidth ---- */

typedef uint64_t vector __attribute__((vector_size(64)));

struct reading {
    const vector *buffer;
    size_t share;            /* vectors of one task */
    vector *sink;            /* [tasks], so that the reading is not optimised away */
};

static void read_share(void *arg, int index, int worker)
{
    const struct reading *job = arg;
    const vector *p = job->buffer + job->share * (size_t)index;
    vector a = p[0], b = p[1], c = p[2], d = p[3];
    (void)worker;
    for (size_t i = 4; i + 4 <= job->share; i += 4)
        a ^= p[i], b ^= p[i + 1], c ^= p[i + 2], d ^= p[i + 3];
    job->sink[index] = a ^ b ^ c ^ d;
}

/* GB/s of the pool's threads through memory that no cache holds. */
static double read_bandwidth(gemma3_pool *pool, void *buffer, vector *sink)
{
    enum { TASKS = 64 };
    struct reading job = {buffer, BUFFER_BYTES / sizeof(vector) / TASKS, sink};
    double best = 0;
    for (int r = 0; r < 3; r++) {
        double start = gemma3_seconds();
        gemma3_pool_run(pool, TASKS, read_share, &job);
        double rate = BUFFER_BYTES / (gemma3_seconds() - start) / 1e9;
        best = rate > best ? rate : best;
    }
    return best;
}

/* ---- The machine: multiply-add peak ---- */

/* Named registers, because an array of them would be kept in memory. */
#define SIX(f) f(0) f(1) f(2) f(3) f(4) f(5)
#define TWELVE(f) SIX(f) f(6) f(7) f(8) f(9) f(10) f(11)

struct peak {
    const char *isa;
    int exact;
    double ops;              /* of one task */
    gemma3_task *task;
};

#if defined(__x86_64__)
#define INT8_TASK(name, features, type, set, EACH, code)                                           \
    __attribute__((target(features))) static void name(void *arg, int index, int worker)           \
    {                                                                                              \
        type x = set##_epi8(3), y = set##_epi8(5), last = x;                                       \
        (void)index, (void)worker;                                                                 \
        EACH(DECLARE_##code)                                                                       \
        for (int i = 0; i < PEAK_ROUNDS; i++) { EACH(STEP_##code) }                                \
        EACH(DRAIN)                                                                                \
        *(volatile char *)arg = ((const char *)&last)[0];                                          \
    }
#define DRAIN(k) __asm__ volatile("" : : "v"(sum##k));
#define DECLARE_vnni(k) __m512i sum##k = x;
#define STEP_vnni(k) __asm__ volatile("vpdpbusd %2,%1,%0" : "+v"(sum##k) : "v"(x), "v"(y));
#define DECLARE_avxvnni(k) __m256i sum##k = x;
#define STEP_avxvnni(k)                                                                            \
    __asm__ volatile("%{vex%} vpdpbusd %2,%1,%0" : "+x"(sum##k) : "x"(x), "x"(y));
#define DECLARE_256(k) __m256i sum##k = x, product##k = x;
#define STEP_256(k)                                                                                \
    __asm__ volatile("vpmaddubsw %3,%2,%1\n\tvpaddw %1,%0,%0"                                      \
                     : "+x"(sum##k), "=&x"(product##k) : "x"(x), "x"(y));
#define DECLARE_f512(k) __m512 sum##k = _mm512_castsi512_ps(x);
#define DECLARE_f256(k) __m256 sum##k = _mm256_castsi256_ps(x);
#define STEP_f512(k) __asm__ volatile("vfmadd231ps %2,%1,%0" : "+v"(sum##k) : "v"(x), "v"(y));
#define STEP_f256(k) __asm__ volatile("vfmadd231ps %2,%1,%0" : "+x"(sum##k) : "x"(x), "x"(y));

INT8_TASK(int8_vnni, "avx512f,avx512bw,avx512vnni", __m512i, _mm512_set1, TWELVE, vnni)
INT8_TASK(int8_avxvnni, "avx2,avxvnni", __m256i, _mm256_set1, TWELVE, avxvnni)
INT8_TASK(int8_avx2, "avx2", __m256i, _mm256_set1, SIX, 256)
INT8_TASK(float_avx512, "avx512f,avx512bw", __m512i, _mm512_set1, TWELVE, f512)
INT8_TASK(float_avx2, "avx2,fma", __m256i, _mm256_set1, TWELVE, f256)
#endif

/* A multiply and an add count two. */
static const struct peak peaks[] = {
#if defined(__x86_64__)
    {"avx512vnni", 0, 2.0 * 12 * 64 * PEAK_ROUNDS, int8_vnni},
    {"avxvnni", 0, 2.0 * 12 * 32 * PEAK_ROUNDS, int8_avxvnni},
    {"avx2", 0, 2.0 * 6 * 32 * PEAK_ROUNDS, int8_avx2},
    {"avx512vnni", 1, 2.0 * 12 * 16 * PEAK_ROUNDS, float_avx512},
    {"avxvnni", 1, 2.0 * 12 * 8 * PEAK_ROUNDS, float_avx2},
    {"avx2", 1, 2.0 * 12 * 8 * PEAK_ROUNDS, float_avx2},
#endif
    {NULL, 0, 0, NULL},
};

/* Gop/s of the pool's threads; 0 when this instruction set has no measurement here. */
static double multiply_peak(const char *isa, int exact, int n_threads, gemma3_pool *pool)
{
    char sink;
    for (const struct peak *p = peaks; p->isa; p++) {
        if (strcmp(p->isa, isa) || p->exact != exact) continue;
        double start = gemma3_seconds();
        gemma3_pool_run(pool, n_threads, p->task, &sink);
        return n_threads * p->ops / (gemma3_seconds() - start) / 1e9;
    }
    return 0;
}

/* ---- The model ---- */

static size_t kv_bytes_at(const gemma3_config *c, int n_pos, int kv_type)
{
    size_t row = 2 * (size_t)c->n_kv_heads * c->head_dim * (kv_type == GEMMA3_KV_F32 ? 4 : 2),
           rows = 0;
    for (int l = 0; l < c->n_layers; l++)
        rows += (size_t)(c->is_local[l] && n_pos > c->window ? c->window : n_pos);
    return rows * row;
}

/* Weights that each token of a prompt meets: the layers' matrices. */
static double layer_weights(const gemma3_config *c)
{
    double d = c->d_model, q = (double)c->n_heads * c->head_dim,
           kv = (double)c->n_kv_heads * c->head_dim;
    return c->n_layers * (2 * d * q + 2 * d * kv + 3 * d * c->d_ff);
}

static double seconds_of(gemma3_state *s, const int32_t *ids, int n, int at_once, float *logits)
{
    double start = gemma3_seconds();
    for (int i = 0, take; i < n; i += take) {
        int row = (take = n - i < at_once ? n - i : at_once) - 1;
        if (gemma3_forward(s, ids + i, take, &row, 1, logits)) die(gemma3_state_error(s));
    }
    return gemma3_seconds() - start;
}

struct bench {
    struct args a;
    gemma3_pool *pool;
    gemma3_model *m;
    gemma3_params p;
    gemma3_state *s;
    int32_t *ids;
    float *logits;
    void *buffer;
    vector *sink;
    struct figure load, bandwidth, peak, prompt, decode[1 + MAX_DEPTHS];
};

static gemma3_model *open_timed(struct bench *b)
{
    gemma3_error err;
    double start = gemma3_seconds();
    gemma3_model *m = gemma3_open(b->a.model, &b->a.options, &err);
    if (!m) die(err.text);
    record(&b->load, gemma3_seconds() - start);
    return m;
}

static void prepare(struct bench *b)
{
    struct args *a = &b->a;
    gemma3_error err;
    if (!(b->pool = gemma3_pool_new(a->n_threads, &err))) die(err.text);
    a->options.n_threads = a->n_threads;
    a->options.parallel_for = gemma3_pool_run;
    a->options.pool = b->pool;
    gemma3_close(open_timed(b)); /* now the file is in the page cache */
    b->load.n = 0;
    for (int r = 1; r < a->n_repeats; r++) gemma3_close(open_timed(b));
    b->m = open_timed(b);
    b->p = gemma3_default_params(b->m);
    b->p.n_ctx = a->n_prompt + a->n_decode;
    for (int k = 0; k < a->n_depths; k++)
        if (a->depth[k] + a->n_decode > b->p.n_ctx) b->p.n_ctx = a->depth[k] + a->n_decode;
    b->p.n_threads = a->n_threads;
    b->p.parallel_for = gemma3_pool_run;
    b->p.pool = b->pool;
    if (!(b->s = gemma3_state_new(b->m, &b->p, &err))) die(err.text);
    int n_vocab = gemma3_model_config(b->m)->n_vocab;
    b->ids = malloc((size_t)b->p.n_ctx * sizeof *b->ids);
    b->logits = malloc((size_t)n_vocab * sizeof *b->logits);
    if (!b->ids || !b->logits) die("out of memory");
    uint32_t random = 1;
    for (int i = 0; i < b->p.n_ctx; i++) {
        random = random * 1664525 + 1013904223;
        b->ids[i] = (int32_t)(random >> 8) % n_vocab;
    }
}

static long peak_rss_mib(void)
{
    struct rusage use;
    getrusage(RUSAGE_SELF, &use);
    return use.ru_maxrss / 1024;
}

/* One round of everything: speeds drift, so what is compared is measured side by side. */
static void measure_once(struct bench *b)
{
    const struct args *a = &b->a;
    record(&b->bandwidth, read_bandwidth(b->pool, b->buffer, b->sink));
    record(&b->peak,
           multiply_peak(gemma3_model_info(b->m)->isa, a->options.exact, a->n_threads, b->pool));
    gemma3_state_reset(b->s);
    record(&b->prompt,
           a->n_prompt / seconds_of(b->s, b->ids, a->n_prompt, b->p.n_batch, b->logits));
    gemma3_state_reset(b->s);
    record(&b->decode[0], a->n_decode / seconds_of(b->s, b->ids, a->n_decode, 1, b->logits));
    for (int k = 0; k < a->n_depths; k++) {
        int more = a->depth[k] - gemma3_state_pos(b->s);
        if (more > 0) seconds_of(b->s, b->ids, more, b->p.n_batch, b->logits);
        record(&b->decode[1 + k],
               a->n_decode / seconds_of(b->s, b->ids, a->n_decode, 1, b->logits));
    }
}

/* The cost model: a token after `depth` others costs what its bytes do at the rate of depth 0. */
static void print_decode(struct bench *b, int k)
{
    const struct args *a = &b->a;
    const gemma3_config *c = gemma3_model_config(b->m);
    size_t weights = gemma3_model_info(b->m)->token_bytes;
    int depth = k ? a->depth[k - 1] : 0, half = a->n_decode / 2;
    double bytes = (double)(weights + kv_bytes_at(c, depth + half, b->p.kv_type));
    double bytes0 = (double)(weights + kv_bytes_at(c, half, b->p.kv_type));
    double rate = median(&b->decode[k]), rate0 = median(&b->decode[0]);
    char name[64], note[128];
    snprintf(name, sizeof name, k ? "decode tg%d after %d" : "decode tg%d", a->n_decode, depth);
    int n = snprintf(note, sizeof note, "%.1f GB/s, %.2f of read bandwidth", rate * bytes / 1e9,
                     rate * bytes / 1e9 / median(&b->bandwidth));
    if (k)
        snprintf(note + n, sizeof note - (size_t)n, "; cost model %.4g: x%.2f",
                 rate0 * bytes0 / bytes, rate / (rate0 * bytes0 / bytes));
    print_row(name, &b->decode[k], "tokens/s", note);
}

static void print_table(struct bench *b, long rss)
{
    const struct args *a = &b->a;
    const gemma3_config *c = gemma3_model_config(b->m);
    const gemma3_info *info = gemma3_model_info(b->m);
    size_t token_bytes = info->token_bytes, weights = info->weight_bytes;
    double products = 2 * layer_weights(c), peak = median(&b->peak);
    char note[128];
    printf("%s: %d layers, d_model %d, mode %s, isa %s, %d threads, %d repeats\n", a->model,
           c->n_layers, c->d_model, a->options.exact ? "exact" : "default", info->isa,
           a->n_threads, a->n_repeats);
    printf("weights %.1f MB, read for each token %.1f MB; peak RSS %ld MiB for the model and a "
           "context of %d\n\n",
           (double)weights / 1e6, (double)token_bytes / 1e6, rss, b->p.n_ctx);
    printf("| %-26s | %9s | %22s | %-8s | %s |\n", "what", "median", "least .. most", "unit",
           "beside the limit");
    printf("|---|---|---|---|---|\n");
    print_row("machine: read bandwidth", &b->bandwidth, "GB/s", "");
    if (peak > 0)
        print_row("machine: multiply-add peak", &b->peak, "Gop/s",
                  a->options.exact ? "float" : "int8");
    snprintf(note, sizeof note, "%.2f s/GB", median(&b->load) / ((double)weights / 1e9));
    print_row("load", &b->load, "s", note);
    double done = median(&b->prompt) * products / 1e9;
    int n = snprintf(note, sizeof note, "%.0f Gop/s", done);
    if (peak > 0) snprintf(note + n, sizeof note - (size_t)n, ", %.2f of the peak", done / peak);
    char name[64];
    snprintf(name, sizeof name, "prompt pp%d", a->n_prompt);
    print_row(name, &b->prompt, "tokens/s", note);
    for (int k = 0; k <= a->n_depths; k++) print_decode(b, k);
}

/* ---- Command line ---- */

static int number(const char *text, int least, int most)
{
    char *end;
    long x = strtol(text, &end, 10);
    if (end == text || (*end && *end != ',') || x < least || x > most) {
        fprintf(stderr, "bench: %s: expected a number from %d to %d\n", text, least, most);
        exit(2);
    }
    return (int)x;
}

static void read_depths(struct args *a, const char *text)
{
    a->n_depths = 0;
    while (text && *text && a->n_depths < MAX_DEPTHS) {
        int depth = number(text, 0, 1 << 20);
        if (depth > 0) a->depth[a->n_depths++] = depth;
        text = strchr(text, ',');
        text = text ? text + 1 : NULL;
    }
}

static struct args read_args(int argc, char **argv)
{
    struct args a = {.n_threads = gemma3_default_threads(),
                     .n_repeats = 5,
                     .n_decode = 64,
                     .n_prompt = 512,
                     .n_depths = 1,
                     .depth = {4096}};
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (!strcmp(name, "--exact")) a.options.exact = 1;
        else if (!strcmp(name, "--no-repack")) a.options.no_repack = 1;
        else if (*name != '-' && !a.model) a.model = name;
        else if (!value) break;
        else if (!strcmp(name, "-t")) a.n_threads = number(argv[++i], 1, GEMMA3_MAX_THREADS);
        else if (!strcmp(name, "-r")) a.n_repeats = number(argv[++i], 1, MAX_REPEATS);
        else if (!strcmp(name, "-n")) a.n_decode = number(argv[++i], 1, 1 << 20);
        else if (!strcmp(name, "-p")) a.n_prompt = number(argv[++i], 1, 1 << 20);
        else if (!strcmp(name, "-d")) read_depths(&a, argv[++i]);
        else if (!strcmp(name, "--isa")) a.options.isa = argv[++i];
        else {
            a.model = NULL;
            break;
        }
    }
    if (!a.model) {
        fprintf(stderr,
                "usage: bench MODEL.gguf [-t THREADS] [-r REPEATS] [-n TOKENS] [-p TOKENS]\n"
                "             [-d DEPTH,DEPTH...] [--isa NAME] [--exact] [--no-repack]\n");
        exit(2);
    }
    return a;
}

int main(int argc, char **argv)
{
    struct bench b = {.a = read_args(argc, argv)};
    prepare(&b);
    seconds_of(b.s, b.ids, b.a.n_prompt, b.p.n_batch, b.logits); /* touches every page */
    long rss = peak_rss_mib();
    b.buffer = aligned_alloc(4096, BUFFER_BYTES);
    b.sink = aligned_alloc(64, 64 * sizeof *b.sink);
    if (!b.buffer || !b.sink) die("out of memory");
    memset(b.buffer, 7, BUFFER_BYTES);
    for (int r = 0; r < b.a.n_repeats; r++) measure_once(&b);
    print_table(&b, rss);
    gemma3_state_free(b.s);
    gemma3_close(b.m);
    gemma3_pool_free(b.pool);
    free(b.buffer), free(b.sink), free(b.ids), free(b.logits);
    return 0;
}
