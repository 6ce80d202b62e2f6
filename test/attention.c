/* attention.c - softmax(q k) v: the fast one, shared out to threads, has the bits of the
 * definition, and the definition is the formula.
 *
 * No model file: random queries, keys and values go into a state of one local and one global layer,
 * for the head counts and head sizes of Gemma 3 and for odd ones, in pieces of 64, 7 and 1 tokens,
 * until the local layer's ring has wrapped. Every fifth token is compared: all places of a block.
 */
#define GEMMA3_NO_MAIN
#include "../gemma3.c"

#include "tap.h"

enum { N_TOKENS = 140, N_SHAPES = 5 };

static const struct shape { int n_heads, n_kv_heads, head_dim, window; } shapes[N_SHAPES] = {
    {4, 1, 256, 24}, {8, 4, 256, 17}, {4, 2, 128, 33}, {3, 3, 80, 12}, {3, 1, 16, 1}};

static uint32_t random_state = 1;
static float random_float(float size) /* -size .. size */
{
    random_state = random_state * 1664525 + 1013904223;
    return size * ((float)(int32_t)random_state / 2147483648.0f);
}

/* What goes in, and what the checks found. */
struct trial {
    gemma3_model m;
    gemma3_state *s;
    int with_formula;
    float *q, *k, *v;        /* [N_TOKENS][heads][head_dim] */
    float *score, *out;
    int other_bits;          /* heads whose output is not the definition's */
    double worst;            /* distance of an element from the formula in double */
};

/* One head of one token by the formula: everything in double, nothing of the cache. */
static void formula(const struct trial *t, int local, int p, int h, double *out)
{
    const gemma3_config *c = &t->m.config;
    int D = c->head_dim, g = h / (c->n_heads / c->n_kv_heads);
    double e[N_TOKENS], most = -1e300, sum = 0;
    const float *q = t->q + ((size_t)p * c->n_heads + h) * D;
    for (int i = 0; i <= p; i++) {
        const float *k = t->k + ((size_t)i * c->n_kv_heads + g) * D;
        e[i] = 0;
        for (int j = 0; j < D; j++) e[i] += (double)q[j] * c->query_scale * k[j];
        if (local && p - i >= c->window) e[i] = -1e300;
        if (e[i] > most) most = e[i];
    }
    for (int i = 0; i <= p; i++) sum += e[i] = exp(e[i] - most);
    for (int j = 0; j < D; j++) out[j] = 0;
    for (int i = 0; i <= p; i++)
        for (int j = 0; j < D; j++)
            out[j] += e[i] / sum * t->v[((size_t)i * c->n_kv_heads + g) * D + j];
}

static void check_token(struct trial *t, const struct attention *a, int i)
{
    const gemma3_config *c = &t->m.config;
    int D = c->head_dim, p = t->s->pos + i;
    for (int h = 0; h < c->n_heads; h++) {
        const float *q = head_at(t->q, c->n_heads, D, p, h);
        const float *got = head_at(t->s->attended, c->n_heads, D, i, h);
        float scaled[256];
        double want[256];
        for (int j = 0; j < D; j++) scaled[j] = q[j] * c->query_scale;
        attention_by_definition(a, scaled, h / a->heads_per_kv, p, t->score, t->out);
        t->other_bits += memcmp(got, t->out, D * sizeof *got) != 0;
        if (t->with_formula) formula(t, c->is_local[a->l], p, h, want);
        for (int j = 0; j < D && t->with_formula; j++)
            if (!(fabs(t->out[j] - want[j]) <= t->worst)) t->worst = fabs(t->out[j] - want[j]);
    }
}

/* As attention() does, between the products with the weights: n tokens from position s->pos on. */
static void take_tokens(struct trial *t, int l, int n)
{
    gemma3_state *s = t->s;
    const gemma3_config *c = s->c;
    struct attention a = {.s = s, .l = l, .slots = slots_of(s, l),
                          .heads_per_kv = c->n_heads / c->n_kv_heads};
    size_t q = (size_t)c->n_heads * c->head_dim, kv = (size_t)c->n_kv_heads * c->head_dim;
    memcpy(s->q, t->q + s->pos * q, n * q * sizeof(float));
    memcpy(s->k, t->k + s->pos * kv, n * kv * sizeof(float));
    memcpy(s->v, t->v + s->pos * kv, n * kv * sizeof(float));
    for (int i = 0; i < n; i++) scale_and_store(&a, i, 0);
    for (a.i0 = 0; a.i0 < n; a.i0 += a.n) {
        a.n = min_int(n - a.i0, s->n_abreast);
        attend_abreast(&a);
    }
    for (int i = 0; i < n; i++)
        if ((s->pos + i) % 5 == 4) check_token(t, &a, i);
}

static float *random_floats(size_t n, float size)
{
    float *x = malloc(n * sizeof *x);
    for (size_t i = 0; i < n; i++) x[i] = random_float(size);
    return x;
}

static void try_shape(const struct kernels *kernels, struct shape shape, int n_batch, int kv_type)
{
    struct trial t = {.m = {.kernels = kernels}, .with_formula = n_batch == 7};
    gemma3_config *c = &t.m.config;
    gemma3_error err;
    c->n_layers = 2, c->is_local[0] = 1;
    c->n_heads = shape.n_heads, c->n_kv_heads = shape.n_kv_heads, c->head_dim = shape.head_dim;
    c->window = shape.window, c->d_model = c->d_ff = 32, c->n_vocab = 1;
    c->rope_base_local = c->rope_base_global = 10000, c->rope_factor = 1;
    c->query_scale = 1 / sqrtf((float)shape.head_dim);
    gemma3_params p = {.n_ctx = N_TOKENS, .n_batch = n_batch, .kv_type = kv_type, .n_threads = 1};
    t.s = gemma3_state_new(&t.m, &p, &err);
    if (!t.s) {
        ok(0, "a state without weights: %s", err.text);
        return;
    }
    t.q = random_floats((size_t)N_TOKENS * c->n_heads * c->head_dim, 8);
    t.k = random_floats((size_t)N_TOKENS * c->n_kv_heads * c->head_dim, 1);
    t.v = random_floats((size_t)N_TOKENS * c->n_kv_heads * c->head_dim, 1);
    t.score = random_floats(N_TOKENS, 1);
    t.out = random_floats(c->head_dim, 1);
    for (int n; t.s->pos < N_TOKENS; t.s->pos += n) {
        n = min_int(t.s->n_ubatch, N_TOKENS - t.s->pos);
        for (int l = 0; l < 2; l++) take_tokens(&t, l, n);
    }
    ok(t.other_bits == 0, "%s, %s cache, %d heads on %d of %d, by %d tokens: the definition's bits",
       kernels->name, kv_type == GEMMA3_KV_F16 ? "F16" : "F32", shape.n_heads, shape.n_kv_heads,
       shape.head_dim, n_batch);
    if (t.with_formula)
        ok(t.worst < (kv_type == GEMMA3_KV_F16 ? 3e-3 : 3e-6), "the formula to %.1g", t.worst);
    free(t.q), free(t.k), free(t.v), free(t.score), free(t.out);
    gemma3_state_free(t.s);
}

int main(void)
{
    static const int n_batch[] = {7, 64, 1};
    fp_state fp = fp_enter();
    for (int k = 0; k < N_KERNELS; k++)
        for (int i = 0; i < N_SHAPES && cpu_has(all_kernels[k]->name); i++)
            for (int b = 0; b < (k == N_KERNELS - 1 ? 1 : 3); b++) {
                try_shape(all_kernels[k], shapes[i], n_batch[b], GEMMA3_KV_F16);
                try_shape(all_kernels[k], shapes[i], n_batch[b], GEMMA3_KV_F32);
            }
    fp_leave(fp);
    return done_testing();
}
