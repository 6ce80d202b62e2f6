/* mistakes.c - the table of known mistakes, and a forward pass that makes them.
 *
 * Each is a number of the configuration, a change to a tensor that the trace shows on its way
 * through the model, a change to the weights of a private copy, or another text. The functions come
 * first, the table after them says what each is.
 */
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "mistakes.h"

/* What a mistake may need of tensors that went by: as they are after the mistakes. */
static const char *const kept_labels[] = {"inp_scaled",  "Qcur_raw", "Kcur_raw", "Qcur_normed",
                                          "Kcur_normed", "Qcur",     "Kcur",     "Vcur",
                                          "attn_out",    "sa_out",   "ffn_gate", "ffn_up",
                                          "ffn_out",     "l_out"};
enum { N_KEPT = sizeof kept_labels / sizeof *kept_labels, MAX_MADE = 3 };

struct pass {
    const gemma3_model *model;
    gemma3_config config;
    const struct mistake *const *mistake;
    int n_mistakes;
    float *kept[N_KEPT];     /* of the tokens that are on their way */
    size_t room[N_KEPT];
    float *past[GEMMA3_MAX_LAYERS]; /* [2][n_ctx][n_kv_heads * head_dim] keys and values */
    int n_ctx, layer;
    int out_of_memory;
};

/* ---- A number of the configuration ---- */

static int set(float *x, float to)
{
    int differs = *x != to;
    *x = to;
    return differs;
}

static float bf16(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    if (x == x) u += 0x7fff + (u >> 16 & 1); /* to the nearest, ties to even */
    u &= 0xffff0000;
    memcpy(&x, &u, 4);
    return x;
}

static int has_local(const gemma3_config *c)
{
    return memchr(c->is_local, 1, (size_t)c->n_layers) != NULL;
}

static int has_global(const gemma3_config *c)
{
    return memchr(c->is_local, 0, (size_t)c->n_layers) != NULL;
}

static int factor_missing(gemma3_config *c) { return set(&c->rope_factor, 1) && has_global(c); }
static int has_factor(gemma3_config *c) { return c->rope_factor != 1 && has_local(c); }
static int local_base_1e6(gemma3_config *c) { return set(&c->rope_base_local, 1e6f); }
static int global_base_1e4(gemma3_config *c) { return set(&c->rope_base_global, 1e4f); }
static int scale_of_head_dim(gemma3_config *c)
{
    return set(&c->query_scale, 1 / sqrtf((float)c->head_dim));
}
static int scale_of_quotient(gemma3_config *c)
{
    return set(&c->query_scale, 1 / sqrtf((float)(c->d_model / c->n_heads)));
}
static int scale_missing(gemma3_config *c) { return set(&c->query_scale, 1); }
static int scale_twice(gemma3_config *c)
{
    return set(&c->query_scale, c->query_scale * c->query_scale);
}
static int embedding_unscaled(gemma3_config *c) { return set(&c->embedding_scale, 1); }
static int embedding_bf16(gemma3_config *c)
{
    return set(&c->embedding_scale, bf16(c->embedding_scale));
}
static int softcap_30(gemma3_config *c)
{
    return c->final_softcap == 0 && set(&c->final_softcap, 30);
}
static int softcap_missing(gemma3_config *c) { return set(&c->final_softcap, 0); }
static int eps_1e5(gemma3_config *c) { return set(&c->rms_eps, 1e-5f); }

static int window_by(gemma3_config *c, int more)
{
    c->window += more;
    return has_local(c) && c->window > 0;
}

static int window_more(gemma3_config *c) { return window_by(c, 1); }
static int window_less(gemma3_config *c) { return window_by(c, -1); }
static int window_none(gemma3_config *c) { return window_by(c, (1 << 24) - c->window); }

static int all_layers(gemma3_config *c, int local)
{
    int applies = local ? has_global(c) : has_local(c);
    memset(c->is_local, local, (size_t)c->n_layers);
    return applies;
}

static int all_local(gemma3_config *c) { return all_layers(c, 1); }
static int all_global(gemma3_config *c) { return all_layers(c, 0); }

/* The layer that is global comes one earlier, or one later. */
static int pattern_by(gemma3_config *c, int late)
{
    uint8_t was[GEMMA3_MAX_LAYERS];
    int n = c->n_layers;
    memcpy(was, c->is_local, sizeof was);
    for (int l = 0; l < n; l++) {
        int from = l - late;
        c->is_local[l] = from < 0    ? was[n > 5 ? 5 : 0]
                         : from >= n ? was[n > 6 ? n - 6 : n - 1]
                                     : was[from];
    }
    return memcmp(was, c->is_local, (size_t)n) != 0;
}

static int pattern_early(gemma3_config *c) { return pattern_by(c, -1); }
static int pattern_late(gemma3_config *c) { return pattern_by(c, 1); }

/* ---- A tensor on its way ---- */

static int is(const struct seen *t, const char *label) { return strcmp(t->label, label) == 0; }
static size_t n_values(const struct seen *t) { return (size_t)t->n * (size_t)t->width; }

static const float *kept(const struct pass *p, const char *label)
{
    for (int i = 0; i < N_KEPT; i++)
        if (strcmp(kept_labels[i], label) == 0) return p->kept[i];
    return NULL;
}

/* The tensor becomes another one that went by. */
static void replace(const struct pass *p, const struct seen *t, const char *label)
{
    memcpy(t->data, kept(p, label), n_values(t) * sizeof *t->data);
}

static const float *norm_weights(const struct pass *p, const char *name, int layer)
{
    gemma3_tensor w;
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s.weight", layer, name);
    for (int i = 0; gemma3_model_tensor(p->model, i, &w) == 0; i++)
        if (strcmp(w.name, full) == 0) return w.floats;
    return NULL;
}

static void rmsnorm(float *x, const float *w, int n, float eps)
{
    double sum = 0;
    for (int j = 0; j < n; j++) sum += (double)x[j] * x[j];
    float r = (float)(1 / sqrt(sum / n + eps));
    for (int j = 0; j < n; j++) x[j] = x[j] * r * w[j];
}

static void no_qk_norm(struct pass *p, const struct seen *t)
{
    if (is(t, "Qcur_normed")) replace(p, t, "Qcur_raw");
    if (is(t, "Kcur_normed")) replace(p, t, "Kcur_raw");
}

static void norm_after_rope(struct pass *p, const struct seen *t)
{
    no_qk_norm(p, t);
    if (!is(t, "Qcur") && !is(t, "Kcur")) return;
    int D = p->config.head_dim;
    const float *w = norm_weights(p, is(t, "Qcur") ? "attn_q_norm" : "attn_k_norm", t->layer);
    for (size_t h = 0; h < n_values(t) / (size_t)D; h++)
        rmsnorm(t->data + h * (size_t)D, w, D, p->config.rms_eps);
}

/* Turns queries and keys anew, from before RoPE: numbers a and b of a head by the angle of pair j.
 */
static void turn(struct pass *p, const struct seen *t, int is_interleaved, double local_factor)
{
    const gemma3_config *c = &p->config;
    const float *from = kept(p, is(t, "Qcur") ? "Qcur_normed" : "Kcur_normed");
    int D = c->head_dim, local = c->is_local[t->layer];
    double base = local ? c->rope_base_local : c->rope_base_global;
    double factor = local ? local_factor : c->rope_factor;
    for (int i = 0; i < t->n; i++)
        for (int k = 0; k < t->width / 2; k++) {
            int j = k % (D / 2);
            size_t head = (size_t)i * (size_t)t->width + (size_t)(k / (D / 2) * D);
            size_t a = head + (size_t)(is_interleaved ? 2 * j : j),
                   b = a + (size_t)(is_interleaved ? 1 : D / 2);
            double angle = (t->pos + i) / factor * pow(base, -2.0 * j / D), x = from[a],
                   y = from[b];
            t->data[a] = (float)(x * cos(angle) - y * sin(angle));
            t->data[b] = (float)(y * cos(angle) + x * sin(angle));
        }
}

/* Pairs (2j, 2j + 1) instead of (j, j + D/2). */
static void interleaved_rope(struct pass *p, const struct seen *t)
{
    if (is(t, "Qcur") || is(t, "Kcur")) turn(p, t, 1, 1);
}

static void factor_on_local(struct pass *p, const struct seen *t)
{
    if ((is(t, "Qcur") || is(t, "Kcur")) && p->config.is_local[t->layer])
        turn(p, t, 0, p->config.rope_factor);
}

/* Query head h reads kv head h % K instead of h / (H / K): it stands where that one is read. */
static void wrong_kv_head(struct pass *p, const struct seen *t)
{
    int H = p->config.n_heads, K = p->config.n_kv_heads, D = p->config.head_dim,
        back = is(t, "kqv_out");
    if (!is(t, "Qcur") && !back) return;
    float *row = malloc((size_t)t->width * sizeof *row);
    if (!row) p->out_of_memory = 1;
    for (int i = 0; row && i < t->n; i++) {
        float *data = t->data + (size_t)i * (size_t)t->width;
        memcpy(row, data, (size_t)t->width * sizeof *row);
        for (int h = 0; h < H; h++) {
            int place = h % K * (H / K) + h / K, from = back ? place : h, to = back ? h : place;
            memcpy(data + to * D, row + from * D, (size_t)D * sizeof *row);
        }
    }
    free(row);
}

/* One query's attention, its scores capped. past: keys, then values. */
static int attend_capped(const struct pass *p, const float *q, const float *past, int pos,
                         float *out)
{
    static const double cap = 50;
    const gemma3_config *c = &p->config;
    size_t D = (size_t)c->head_dim, row = (size_t)c->n_kv_heads * D, all = (size_t)p->n_ctx * row;
    double *score = malloc((size_t)(pos + 1) * sizeof *score), sum = 0, most = -INFINITY;
    if (!score) return -1;
    int first = c->is_local[p->layer] && pos >= c->window ? pos - c->window + 1 : 0;
    for (int t = first; t <= pos; t++) {
        double s = 0;
        for (size_t j = 0; j < D; j++) s += (double)q[j] * past[(size_t)t * row + j];
        score[t] = cap * tanh(s * c->query_scale / cap);
        most = score[t] > most ? score[t] : most;
    }
    for (int t = first; t <= pos; t++) sum += score[t] = exp(score[t] - most);
    for (size_t j = 0; j < D; j++) {
        double o = 0;
        for (int t = first; t <= pos; t++) o += score[t] * past[all + (size_t)t * row + j];
        out[j] = (float)(o / sum);
    }
    free(score);
    return 0;
}

/* Scores are not traced: attention is computed anew from queries, keys and values. */
static void attention_softcap(struct pass *p, const struct seen *t)
{
    if (!is(t, "kqv_out")) return;
    size_t D = (size_t)p->config.head_dim, K = (size_t)p->config.n_kv_heads;
    size_t H = (size_t)p->config.n_heads, n = (size_t)t->n * K * D;
    size_t all = (size_t)p->n_ctx * K * D, at = (size_t)t->pos * K * D;
    float *past = p->past[t->layer];
    if (!past) p->past[t->layer] = past = malloc(2 * all * sizeof *past);
    if (!past) p->out_of_memory = 1;
    if (!past) return;
    memcpy(past + at, kept(p, "Kcur"), n * sizeof *past);
    memcpy(past + all + at, kept(p, "Vcur"), n * sizeof *past);
    p->layer = t->layer;
    for (size_t i = 0; i < (size_t)t->n * H; i++)
        if (attend_capped(p, kept(p, "Qcur") + i * D, past + i % H / (H / K) * D,
                          t->pos + (int)(i / H), t->data + i * D))
            p->out_of_memory = 1;
}

static int has_groups(gemma3_config *c) { return c->n_kv_heads > 1 && c->n_heads > c->n_kv_heads; }

static void other_gelu(struct pass *p, const struct seen *t, double (*act)(double))
{
    if (!is(t, "ffn_geglu")) return;
    const float *gate = kept(p, "ffn_gate"), *up = kept(p, "ffn_up");
    for (size_t j = 0; j < n_values(t); j++) t->data[j] = (float)act(gate[j]) * up[j];
}

static double gelu_erf_of(double x) { return x * (1 + erf(x / sqrt(2))) / 2; }
static double silu_of(double x) { return x / (1 + exp(-x)); }
static double quick_of(double x) { return x / (1 + exp(-1.702 * x)); }
static double relu_of(double x) { return x > 0 ? x : 0; }
static void gelu_erf(struct pass *p, const struct seen *t) { other_gelu(p, t, gelu_erf_of); }
static void silu(struct pass *p, const struct seen *t) { other_gelu(p, t, silu_of); }
static void quick_gelu(struct pass *p, const struct seen *t) { other_gelu(p, t, quick_of); }
static void relu(struct pass *p, const struct seen *t) { other_gelu(p, t, relu_of); }

static void gate_and_up_swapped(struct pass *p, const struct seen *t)
{
    if (!is(t, "ffn_geglu")) return;
    const float *gate = kept(p, "ffn_gate"), *up = kept(p, "ffn_up");
    for (size_t j = 0; j < n_values(t); j++) {
        double u = up[j];
        t->data[j] =
            (float)(u /
                    (1 + exp(-2 * sqrt(2 / 3.14159265358979324) * (u + 0.044715 * u * u * u)))) *
            gate[j];
    }
}

static void no_post_norms(struct pass *p, const struct seen *t)
{
    if (is(t, "attn_post_norm")) replace(p, t, "attn_out");
    if (is(t, "ffn_post_norm")) replace(p, t, "ffn_out");
}

/* norm(x + branch) instead of x + norm(branch). */
static void norms_after_residual(struct pass *p, const struct seen *t)
{
    int after_attention = is(t, "sa_out");
    if (!after_attention && !is(t, "l_out")) return;
    const float *w =
        norm_weights(p, after_attention ? "post_attention_norm" : "post_ffw_norm", t->layer);
    const float *branch = kept(p, after_attention ? "attn_out" : "ffn_out");
    replace(p, t, !after_attention ? "sa_out" : t->layer ? "l_out" : "inp_scaled");
    for (size_t j = 0; j < n_values(t); j++) t->data[j] += branch[j];
    for (int i = 0; i < t->n; i++)
        rmsnorm(t->data + (size_t)i * (size_t)t->width, w, t->width, p->config.rms_eps);
}

static void scale_in_head(struct pass *p, const struct seen *t)
{
    for (size_t j = 0; is(t, "result_output") && j < n_values(t); j++)
        t->data[j] *= p->config.embedding_scale;
}

static void f16_clamp(struct pass *p, const struct seen *t)
{
    (void)p;
    for (size_t j = 0; j < n_values(t); j++) t->data[j] = fminf(fmaxf(t->data[j], -65504), 65504);
}

static void bf16_everywhere(struct pass *p, const struct seen *t)
{
    (void)p;
    for (size_t j = 0; !is(t, "result_output") && j < n_values(t); j++)
        t->data[j] = bf16(t->data[j]);
}

/* ---- A weight of a private copy ---- */

static void norms_by(const gemma3_tensor *t, float more)
{
    float *w = (float *)t->floats; /* of a model that is ours alone */
    for (int j = 0; w && j < t->cols; j++) w[j] += more;
}

static void norms_without_one(const gemma3_tensor *t) { norms_by(t, -1); }
static void norms_with_two(const gemma3_tensor *t) { norms_by(t, 1); }

/* Where a block's nibbles lie: bytes of a block, the first of them, and how many belong together.
 */
static const struct nibbles {
    const char *format;
    int block, at, n, group;
} nibbles[] = {
    {"Q4_0", 18, 2, 16, 16},    {"Q4_1", 20, 4, 16, 16},   {"Q5_0", 22, 6, 16, 16},
    {"Q5_1", 24, 8, 16, 16},    {"IQ4_NL", 18, 2, 16, 16}, {"Q4_K", 144, 16, 128, 32},
    {"Q5_K", 176, 48, 128, 32},
};

/* The high nibble first. */
static void swap_nibbles(unsigned char *q, int n)
{
    for (int i = 0; i < n; i++) q[i] = (unsigned char)(q[i] << 4 | q[i] >> 4);
}

/* Byte i holds the values 2i and 2i + 1 instead of i and i + n. */
static void take_nibbles_in_turn(unsigned char *q, int n)
{
    unsigned char value[64];
    for (int i = 0; i < n; i++) value[2 * i] = q[i] & 15, value[2 * i + 1] = q[i] >> 4;
    for (int i = 0; i < n; i++) q[i] = (unsigned char)(value[i] | value[i + n] << 4);
}

static void change_nibbles(const gemma3_tensor *t, void (*change)(unsigned char *q, int n))
{
    for (size_t k = 0; k < sizeof nibbles / sizeof *nibbles; k++) {
        const struct nibbles *f = &nibbles[k];
        unsigned char *data = (unsigned char *)t->data; /* in a private mapping */
        if (strcmp(t->format, f->format) != 0) continue;
        for (size_t at = 0; at + (size_t)f->block <= t->bytes; at += (size_t)f->block)
            for (int g = 0; g < f->n; g += f->group) change(data + at + f->at + g, f->group);
    }
}

static void nibbles_swapped(const gemma3_tensor *t) { change_nibbles(t, swap_nibbles); }
static void nibbles_in_turn(const gemma3_tensor *t) { change_nibbles(t, take_nibbles_in_turn); }

/* ---- The table ---- */

const struct mistake mistakes[] = {
    {"rope-factor-missing", "the RoPE factor is missing on global layers",
     .config = factor_missing},
    {"rope-factor-on-local", "the RoPE factor is applied on local layers too", .config = has_factor,
     .hook = factor_on_local},
    {"rope-local-base", "local layers turn with a RoPE base of 1e6", .config = local_base_1e6},
    {"rope-global-base", "global layers turn with a RoPE base of 1e4", .config = global_base_1e4},
    {"rope-interleaved", "RoPE turns the pairs (2j, 2j+1) instead of (j, j+D/2)",
     .hook = interleaved_rope},
    {"window-plus-1", "local layers see window + 1 keys", .config = window_more},
    {"window-minus-1", "local layers see window - 1 keys", .config = window_less},
    {"window-none", "local layers see everything", .config = window_none},
    {"pattern-early", "the global layers come one layer early", .config = pattern_early},
    {"pattern-late", "the global layers come one layer late", .config = pattern_late},
    {"all-local", "every layer is treated as local", .config = all_local},
    {"all-global", "every layer is treated as global", .config = all_global},
    {"query-scale-head-dim", "attention is scaled by 1/sqrt(head_dim)",
     .config = scale_of_head_dim},
    {"query-scale-quotient", "attention is scaled by 1/sqrt(d_model / n_heads)",
     .config = scale_of_quotient},
    {"query-scale-missing", "attention is not scaled", .config = scale_missing},
    {"query-scale-twice", "attention is scaled twice", .config = scale_twice},
    {"attention-softcap", "attention scores are capped at 50", .hook = attention_softcap},
    {"norm-without-one", "norms multiply by w instead of 1 + w", .weights = norms_without_one},
    {"norm-with-two", "norms multiply by 2 + w instead of 1 + w", .weights = norms_with_two},
    {"norm-eps", "norms use an epsilon of 1e-5", .config = eps_1e5},
    {"qk-norm-missing", "queries and keys are not normed", .hook = no_qk_norm},
    {"qk-norm-after-rope", "queries and keys are normed after RoPE", .hook = norm_after_rope},
    {"kv-heads-mixed", "query head h reads kv head h % K instead of h / (H/K)",
     .config = has_groups, .hook = wrong_kv_head},
    {"embedding-unscaled", "embeddings are not scaled by sqrt(d_model)",
     .config = embedding_unscaled},
    {"embedding-scale-bf16", "the embedding scale is rounded to bf16", .is_usual_in_bf16 = 1,
     .config = embedding_bf16},
    {"embedding-scale-in-head", "the embedding scale is in the head too", .hook = scale_in_head},
    {"gelu-erf", "GELU is computed with erf instead of its tanh form", .hook = gelu_erf},
    {"gelu-quick", "GELU is x * sigmoid(1.702 x)", .hook = quick_gelu},
    {"silu", "SiLU stands in place of GELU", .hook = silu},
    {"relu", "ReLU stands in place of GELU", .hook = relu},
    {"gate-up-swapped", "ffn_gate and ffn_up are swapped", .hook = gate_and_up_swapped},
    {"post-norms-missing", "the norms after attention and feed-forward are missing",
     .hook = no_post_norms},
    {"post-norms-late", "those norms come after the residual is added",
     .hook = norms_after_residual},
    {"softcap-30", "logits are capped at 30", .config = softcap_30},
    {"softcap-missing", "the logits' softcap is missing", .config = softcap_missing},
    {"f16-clamp", "activations are clamped to float16's range", .hook = f16_clamp},
    {"bos-missing", "<bos> is missing", .bos = -1},
    {"bos-doubled", "<bos> stands twice", .bos = 1},
    {"rows-late", "logits come one position late", .late = 1},
    {"rows-early", "logits come one position early", .late = -1},
    {"nibbles-swapped", "a 4-bit format's high nibble is read first", .weights = nibbles_swapped},
    {"nibbles-in-turn", "a 4-bit format's nibbles are read in turn, not half a block apart",
     .weights = nibbles_in_turn},
    {"kv-f16", "keys and values are kept in float16", .is_precision = 1, .kv_f16 = 1},
    {"bf16", "activations are rounded to bf16", .is_precision = 1, .hook = bf16_everywhere},
    {"int8", "activations are rounded to 8 bits in blocks", .is_precision = 1, .int8 = 1},
};
const int n_mistakes = sizeof mistakes / sizeof *mistakes;

int find_mistake(const char *name, size_t n)
{
    for (int i = 0; i < n_mistakes; i++)
        if (strlen(mistakes[i].name) == n && memcmp(mistakes[i].name, name, n) == 0) return i;
    return -1;
}

int names_mistake(const char *list, const struct mistake *m)
{
    for (size_t n; *list; list += n + (list[n] == ',')) {
        n = strcspn(list, ",");
        if (strlen(m->name) == n && memcmp(m->name, list, n) == 0) return 1;
    }
    return 0;
}

/* Whether any weight of the model is in a format with nibbles. */
static int has_nibbles(const gemma3_model *m)
{
    gemma3_tensor t;
    for (int i = 0; gemma3_model_tensor(m, i, &t) == 0; i++)
        for (size_t k = 0; k < sizeof nibbles / sizeof *nibbles; k++)
            if (strcmp(t.format, nibbles[k].format) == 0) return 1;
    return 0;
}

int mistake_applies(const struct session *s, const struct mistake *m)
{
    gemma3_config c = *s->config;
    if (m->weights == nibbles_swapped || m->weights == nibbles_in_turn)
        return has_nibbles(s->model);
    if (m->bos) return s->n_ids > 1 && s->ids[0] == gemma3_tokenizer_vocab(s->tokenizer)->bos;
    return !m->config || m->config(&c);
}

/* ---- The pass ---- */

static void keep(struct pass *p, const struct seen *t)
{
    for (int i = 0; i < N_KEPT; i++) {
        if (!is(t, kept_labels[i])) continue;
        if (n_values(t) > p->room[i]) {
            free(p->kept[i]);
            p->kept[i] = malloc(n_values(t) * sizeof(float));
            p->room[i] = p->kept[i] ? n_values(t) : 0;
        }
        if (p->kept[i]) memcpy(p->kept[i], t->data, n_values(t) * sizeof(float));
        else p->out_of_memory = 1;
    }
}

static void make_mistakes(void *user, const char *label, int layer, int pos, int n, int width,
                          float *data)
{
    struct pass *p = user;
    struct seen t = {label, layer, pos, n, width, data};
    for (int i = 0; i < p->n_mistakes && !p->out_of_memory; i++)
        if (p->mistake[i]->hook) p->mistake[i]->hook(p, &t);
    keep(p, &t);
}

/* A copy of the model whose weights may be changed: only pages that are get memory of their own. */
struct copy {
    void *bytes;
    size_t size;
    gemma3_model *model;
};

static int open_copy(struct session *s, struct copy *c, const struct pass *p)
{
    gemma3_error err;
    gemma3_tensor t;
    struct stat st;
    int fd = open(s->args->model, O_RDONLY);
    *c = (struct copy){.bytes = MAP_FAILED};
    if (fd >= 0 && fstat(fd, &st) == 0) {
        c->size = (size_t)st.st_size;
        c->bytes = mmap(NULL, c->size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    }
    if (fd >= 0) close(fd);
    if (c->bytes == MAP_FAILED) return complain("%s: %s", s->args->model, strerror(errno));
    gemma3_options o = {.exact = 1, .no_repack = 1, .isa = s->args->isa};
    c->model = gemma3_open_memory(c->bytes, c->size, s->args->model, &o, &err);
    if (!c->model) return complain("%s", err.text);
    for (int k = 0; k < p->n_mistakes; k++)
        for (int i = 0; p->mistake[k]->weights && gemma3_model_tensor(c->model, i, &t) == 0; i++)
            p->mistake[k]->weights(&t);
    return 0;
}

static void close_copy(struct copy *c)
{
    if (c->bytes == MAP_FAILED) return;
    gemma3_close(c->model);
    munmap(c->bytes, c->size);
}

/* Rows on their way to the caller, who thinks of another position. */
struct moved {
    take_rows *take;
    void *user;
    int by;
};

static int take_moved(void *user, const int *position, int n_rows, const float *rows)
{
    const struct moved *m = user;
    int at[ROWS_AT_ONCE];
    for (int i = 0; i < n_rows; i++) at[i] = position[i] + m->by;
    return m->take(m->user, at, n_rows, rows);
}

/* The text and the rows wanted of it, as the mistakes have them: moved->by positions earlier. */
static int prepare_text(struct session *own, const struct session *s, const struct pass *p,
                        int n_ids, const char *wanted, char **own_wanted, struct moved *moved)
{
    int bos = 0, late = 0;
    for (int i = 0; i < p->n_mistakes; i++) bos += p->mistake[i]->bos, late += p->mistake[i]->late;
    own->n_ids = n_ids + bos;
    own->ids = malloc((size_t)(own->n_ids + 1) * sizeof *own->ids);
    *own_wanted = calloc((size_t)own->n_ids + 1, 1);
    if (!own->ids || !*own_wanted) return out_of_memory((size_t)n_ids * 5, "the text");
    for (int i = 0; i < own->n_ids; i++) own->ids[i] = s->ids[i - bos > 0 ? i - bos : 0];
    if (bos < 0) memcpy(own->ids, s->ids - bos, (size_t)own->n_ids * sizeof *own->ids);
    moved->by = late - bos;
    for (int i = 0; i < own->n_ids; i++) {
        int position = i + moved->by;
        (*own_wanted)[i] = position >= 0 && position < n_ids && (!wanted || wanted[position]);
    }
    return 0;
}

/* The same in default mode: another model over the same file. */
static int open_int8(struct session *own)
{
    gemma3_error err;
    gemma3_options o = {.isa = own->args->isa, .n_threads = own->args->n_threads,
                        .parallel_for = gemma3_pool_run, .pool = own->pool};
    own->model = gemma3_open(own->args->model, &o, &err);
    if (!own->model) return complain("%s", err.text);
    own->params.kv_type = GEMMA3_KV_F16;
    return 0;
}

int run_mistaken(struct session *s, const struct mistake *const *m, int n, int n_ids,
                 const char *wanted, take_rows *take, void *user)
{
    struct session own = *s;
    struct pass p = {.config = *s->config, .mistake = m, .n_mistakes = n};
    struct moved moved = {take, user, 0};
    struct copy copy = {.bytes = MAP_FAILED};
    char *own_wanted = NULL;
    int code = 0, int8 = 0, changes_weights = 0, has_hook = 0;
    own.state = NULL;
    for (int i = 0; i < n; i++) {
        if (m[i]->config) m[i]->config(&p.config);
        if (m[i]->kv_f16) own.params.kv_type = GEMMA3_KV_F16;
        int8 |= m[i]->int8, changes_weights |= m[i]->weights != NULL,
            has_hook |= m[i]->hook != NULL;
    }
    if (changes_weights) {
        code = open_copy(s, &copy, &p);
        own.model = copy.model;
    } else if (int8) code = open_int8(&own);
    p.model = own.model;
    own.params.config = &p.config;
    if (has_hook) own.params.trace = make_mistakes, own.params.trace_user = &p;
    if (!code) code = prepare_text(&own, s, &p, n_ids, wanted, &own_wanted, &moved);
    else own.ids = NULL;
    own.params.n_ctx = p.n_ctx = own.n_ids;
    if (!code) code = open_state(&own);
    if (!code) code = run_ids(&own, own_wanted, take_moved, &moved);
    if (!code && p.out_of_memory) code = complain("out of memory for a forward pass with mistakes");
    if (own.state) gemma3_state_free(own.state);
    if (int8 && !changes_weights) gemma3_close(own.model);
    close_copy(&copy);
    free(own.ids);
    free(own_wanted);
    for (int i = 0; i < N_KEPT; i++) free(p.kept[i]);
    for (int i = 0; i < GEMMA3_MAX_LAYERS; i++) free(p.past[i]);
    return code;
}
