/* fixture.h - reading the files in test/data, and comparing rows of logits. */
#ifndef FIXTURE_H
#define FIXTURE_H

#include "tap.h"

/* The whole of a file, with a NUL after it; n may be NULL. The test ends without it. */
static inline char *read_file(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    if (!f) {
        printf("Bail out! cannot read %s (tests run in the top folder)\n", path);
        exit(1);
    }
    size_t size = 0, room = 1 << 16, got;
    char *data = malloc(room + 1);
    while ((got = fread(data + size, 1, room - size, f)) > 0) {
        size += got;
        if (size == room) data = realloc(data, (room *= 2) + 1);
    }
    fclose(f);
    data[size] = 0;
    if (n) *n = size;
    return data;
}

/* A float32 from its little-endian bytes, or from eight hexadecimal digits. */
static inline float float_of_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float float_at(const char *bytes)
{
    const unsigned char *b = (const unsigned char *)bytes;
    return float_of_bits(b[0] | b[1] << 8 | b[2] << 16 | (uint32_t)b[3] << 24);
}

/* The next number of a text, and moves past it. */
static inline long next_int(char **text) { return strtol(*text, text, 10); }
static inline float next_bits(char **text)
{
    return float_of_bits((uint32_t)strtoul(*text, text, 16));
}

static inline char *next_line(char *text)
{
    text += strcspn(text, "\n");
    return *text ? text + 1 : text;
}

/* A model of test/data: what it is asked and what transformers answers. */
typedef struct fixture {
    const char *name;
    char path[64];           /* of the GGUF */
    int n, n_vocab;
    int32_t ids[128];
    float *want;             /* [n][n_vocab] */
} fixture;

static inline fixture fixture_load(const char *name)
{
    fixture f = { .name = name };
    char path[80];
    snprintf(f.path, sizeof f.path, "test/data/%s.gguf", name);
    snprintf(path, sizeof path, "test/data/%s.ids", name);
    char *text = read_file(path, NULL), *p = text;
    while (*p && *p != '\n' && f.n < 128) f.ids[f.n++] = (int32_t)next_int(&p);
    free(text);
    size_t size;
    snprintf(path, sizeof path, "test/data/%s.logits", name);
    char *raw = read_file(path, &size);
    f.n_vocab = (int)(size / 4 / f.n);
    f.want = malloc(size);
    for (size_t i = 0; i < size / 4; i++) f.want[i] = float_at(raw + 4 * i);
    free(raw);
    return f;
}

static inline double log_sum_exp(const float *x, int n)
{
    double m = x[0], sum = 0;
    for (int i = 1; i < n; i++) m = x[i] > m ? x[i] : m;
    for (int i = 0; i < n; i++) sum += exp(x[i] - m);
    return m + log(sum);
}

/* KL divergence of softmax(got) from softmax(want), in double. NaN when got has one. */
static inline double divergence(const float *want, const float *got, int n)
{
    double lw = log_sum_exp(want, n), lg = log_sum_exp(got, n), sum = 0;
    for (int i = 0; i < n; i++) sum += exp(want[i] - lw) * ((want[i] - lw) - (got[i] - lg));
    return sum;
}

typedef struct agreement {
    double mean_kl, max_kl;  /* over positions */
    double max_diff;         /* of logits */
    int other_argmax;        /* positions with another first choice, though want's first two
                                differ by more than 1e-4 */
} agreement;

static inline agreement agree(const float *want, const float *got, int n, int n_vocab)
{
    agreement a = { 0, 0, 0, 0 };
    for (int i = 0; i < n; i++) {
        const float *w = want + (size_t)i * n_vocab, *g = got + (size_t)i * n_vocab;
        double kl = divergence(w, g, n_vocab);
        a.mean_kl += kl / n;
        if (!(kl <= a.max_kl)) a.max_kl = kl;
        int first = w[1] > w[0], second = !first, ours = 0;
        for (int j = 0; j < n_vocab; j++) {
            double d = fabs((double)w[j] - g[j]);
            if (!(d <= a.max_diff)) a.max_diff = d;
            if (g[j] > g[ours]) ours = j;
            if (j > 1 && w[j] > w[first]) second = first, first = j;
            else if (j > 1 && w[j] > w[second]) second = j;
        }
        a.other_argmax += ours != first && w[first] - w[second] > 1e-4;
    }
    return a;
}

#endif
