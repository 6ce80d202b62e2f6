/* gemma3.c - Google's Gemma 3, forward pass and all, in one C file for the CPU.
 *
 * What this is: a reference to read, to port and to check other engines against. It computes the
 * same bits on every machine (the numeric contract, README.md) and it is fast.
 * What this is not: a framework. There is one architecture, one forward pass and no dependency but
 * libc and threads.
 *
 * The model in 20 lines. x is the residual stream, one vector of d_model numbers for each token.
 *
 *     x = embedding[id] * sqrt(d_model)
 *     for each layer:
 *         h = rms(x) * attn_norm
 *         q, k, v = Wq h, Wk h, Wv h              n_heads queries, n_kv_heads keys and values
 *         q, k = rms(q) * q_norm, rms(k) * k_norm     each head for itself
 *         q, k = rope(q), rope(k)                 turns the pairs (j, j + head_dim/2) of the token
 *                                                 at position p by p * base^(-2j/head_dim) / factor
 *         a = softmax(q . k * query_scale) v      over the positions that the token sees
 *         x = x + rms(Wo a) * post_attention_norm
 *         h = rms(x) * ffn_norm
 *         f = Wdown (gelu(Wgate h) * Wup h)
 *         x = x + rms(f) * post_ffw_norm
 *     logits = lm_head (rms(x) * output_norm)     lm_head is the embedding matrix itself
 *     logits = cap * tanh(logits / cap)           only where a file has a softcap: no Gemma 3 does
 *
 * where rms(x) = x / sqrt(mean(x^2) + eps), W h is a matrix times a vector, and * between vectors
 * is element by element. A program repeats: ids -> logits after the last token -> choose an id ->
 * append it. K and V of earlier tokens never change, so they are kept: the KV cache. Sources: the
 * Gemma 3 Technical Report (arXiv 2503.19786), and transformers' modeling_gemma3.py, with which
 * exact mode agrees to float32 rounding.
 *
 * One layer, with the shapes of 1B:
 *
 *     x [1152] ---.
 *        |     attn_norm
 *        |        | h [1152]
 *        |        +-------------+-------------.
 *        |      attn_q        attn_k        attn_v
 *        |        | [4][256]    | [1][256]    | [1][256]
 *        |      q_norm        k_norm          |
 *        |       rope          rope           |
 *        |        |             |             |
 *        |        |        .----+-------------+----.
 *        |        |        | KV cache of the layer |  k, v of the positions so far
 *        |        |        '----+-------------+----'
 *        |     softmax(q . k / 16) ---------- v       query head h meets kv head h / (n_heads /
 *        |        | [4][256]                          n_kv_heads): several queries share one K, V
 *        |     attn_output
 *        |        | [1152]
 *        |     post_attention_norm
 *       (+)-------'
 *     x [1152] ---.
 *        |     ffn_norm
 *        |        | h [1152]
 *        |        +-------------.
 *        |     ffn_gate       ffn_up
 *        |        | [6912]      | [6912]
 *        |      gelu -------- times
 *        |        | [6912]
 *        |     ffn_down
 *        |        | [1152]
 *        |     post_ffw_norm
 *       (+)-------'
 *     x [1152]  into the next layer
 *
 * Five local layers, then a global one, and so on: L L L L L G L L L L L G ... A global layer sees
 * the whole past, a local one the last `window` positions, the token's own included. With window 4:
 *
 *     token 9 sees    global  0 1 2 3 4 5 6 7 8 9         local              6 7 8 9
 *
 * So a local layer need not keep more than the window: its cache is a ring, and position p lies in
 * slot p mod ring. With a ring of 4 slots, before and after token 10 comes:
 *
 *     slot  0 1 2 3          slot  0 1  2 3
 *     pos   8 9 6 7          pos   8 9 10 7
 *
 * The published sizes (the code knows them in section 12 alone):
 *
 *             n_layers  d_model   d_ff  heads  kv heads  head_dim  window  factor  query_scale
 *     270M          18      640   2048      4         1       256     512       1  1/sqrt(256)
 *     1B            26     1152   6912      4         1       256     512       1  1/sqrt(256)
 *     4B            34     2560  10240      8         4       256    1024       8  1/sqrt(256)
 *     12B           48     3840  15360     16         8       256    1024       8  1/sqrt(256)
 *     27B           62     5376  21504     32        16       128    1024       8  1/sqrt(168)
 *
 * n_vocab is 262,144. rope's base is 10,000 in local layers and 1,000,000 in global ones; the
 * factor divides the angles of global layers alone. 27B's queries are scaled by d_model / n_heads,
 * the others' by head_dim.
 *
 * Names. One vocabulary everywhere:
 *     ours            paper / transformers           GGUF
 *     d_model         hidden_size                    gemma3.embedding_length
 *     d_ff            intermediate_size              gemma3.feed_forward_length
 *     attn_norm       input_layernorm                blk.N.attn_norm.weight
 *     attn_q, _k, _v  self_attn.{q,k,v}_proj         blk.N.attn_{q,k,v}.weight
 *     attn_q_norm     self_attn.q_norm               blk.N.attn_q_norm.weight
 *     attn_output     self_attn.o_proj               blk.N.attn_output.weight
 *     post_attention_norm  post_attention_layernorm  blk.N.post_attention_norm.weight
 *     ffn_norm        pre_feedforward_layernorm      blk.N.ffn_norm.weight
 *     ffn_gate, _up, _down  mlp.{gate,up,down}_proj  blk.N.ffn_{gate,up,down}.weight
 *     post_ffw_norm   post_feedforward_layernorm     blk.N.post_ffw_norm.weight
 *     output_norm     model.norm                     output_norm.weight
 *     lm_head         lm_head                        output.weight, else token_embd.weight
 * and n_layers, n_heads, n_kv_heads, head_dim, n_vocab, window: gemma3_config in gemma3.h.
 * Indices: l layer, i token of this call, p position in the text, h query head, g key-value head,
 * r row, b block of 32 elements, j element or lane. n is the number of tokens in this call. "Rule
 * 4" is rule 4 of the numeric contract in README.md.
 *
 * Contents
 *      1  The model and the state
 *      2  The operations
 *      3  The forward pass
 *      4  Attention and the KV cache
 *      5  Feed-forward
 *      6  Matrix times vectors, and how threads share
 *    How each operation is computed:
 *      7  Arithmetic that is the same everywhere
 *      8  Number formats
 *      9  The operations: definitions
 *     10  The operations: vector kernels
 *    Around the model:
 *     11  Reading GGUF
 *     12  Opening a model
 *     13  Sizes and states
 *     14  Scores, sampling, SHA-256
 *     15  Threads and files of the host
 *     16  The command line
 */

#if !defined(INSTANCE) /* the file includes itself: section 9 */

/* The contract forbids the compiler to fuse a*b+c on its own (we say fma where we mean it), and to
 * treat floats as real numbers, whatever its command line allows; open() tests that it was heard.
 * The two last lines for gcc change speed, never bits. */
#if defined(__clang__)
#if __clang_major__ >= 12
#pragma clang diagnostic push
#pragma clang diagnostic ignored "-Wignored-pragmas" /* some targets do not know the first */
#pragma float_control(precise, on)
#pragma clang fp reassociate(off)
#pragma clang diagnostic pop
#endif
#pragma STDC FP_CONTRACT OFF /* after the others: "precise" would allow it again */
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off")
#pragma GCC optimize("no-associative-math", "no-reciprocal-math", "signed-zeros")
#pragma GCC optimize("no-unsafe-math-optimizations", "no-tree-reassoc", "no-trapping-math", "no-math-errno")
#pragma GCC optimize("tree-vectorize", "vect-cost-model=dynamic")
#pragma GCC optimize("no-tree-ter") /* with it sums wait for their last use: registers run out */
#if defined(__ARM_FEATURE_MVE)
#pragma GCC optimize("no-tree-vectorize") /* Helium's vectors of floats flush subnormals */
#endif
#endif
#if defined(__FAST_MATH__)
#error "gemma3.c computes the same bits everywhere: build it without -ffast-math"
#endif

/* What a host has beyond C11 (section 15), under -std=c11 too; macOS and other BSDs hide nothing. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#endif
#define _NETBSD_SOURCE 1
#define _FILE_OFFSET_BITS 64    /* files over 2 GB where pointers have 32 bits */
#include "gemma3.h"

#include <float.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float arithmetic is wider than float: x86 wants -msse2 -mfpmath=sse, s390x -std=gnu11"
#endif

#if defined(__x86_64__) || (defined(__i386__) && defined(__SSE2__))
#include <immintrin.h>
#define HAVE_X86 1
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#include <arm_neon.h>
#define HAVE_NEON 1
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
enum { BIG_ENDIAN_CPU = 1 };
#else
enum { BIG_ENDIAN_CPU = 0 };
#endif

#define INLINE static inline __attribute__((always_inline))
#if defined(__GNUC__) && !defined(__clang__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

typedef uint64_t fp_state;
static fp_state fp_enter(void);       /* rounding and subnormals as IEEE wants them: section 7 */
static void fp_leave(fp_state old);   /* as the caller had them */

INLINE int min_int(int a, int b) { return a < b ? a : b; }

/* ==== 1. The model and the state ============================================================== */

/* Tensor types by their number in GGUF. */
enum { F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11,
       Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30 };

enum { TILE_ROWS = 32 };              /* rows of a matrix multiplied together: section 8 */

/* A weight matrix: y = W x for x [cols], y [rows]. Rows lie one after the other as in the file, or
 * as tiles: 32 rows interleaved, the last tile filled up with zero rows (section 8). */
struct matrix {
    const struct format *format;      /* F32, Q4_0 ...: section 8 */
    int rows, cols, tiled;
    size_t row_bytes;
    const uint8_t *data;
};

/* Weights of one layer. Norms are float32 vectors, the rest matrices [rows][cols]. */
struct layer {
    const float *attn_norm;           /* [d_model] */
    struct matrix attn_q;             /* [n_heads * head_dim][d_model] */
    struct matrix attn_k, attn_v;     /* [n_kv_heads * head_dim][d_model] */
    const float *attn_q_norm, *attn_k_norm; /* [head_dim] */
    struct matrix attn_output;        /* [d_model][n_heads * head_dim] */
    const float *post_attention_norm; /* [d_model] */
    const float *ffn_norm;            /* [d_model] */
    struct matrix ffn_gate, ffn_up;   /* [d_ff][d_model] */
    struct matrix ffn_down;           /* [d_model][d_ff] */
    const float *post_ffw_norm;       /* [d_model] */
};

/* Read-only once it is open. */
struct gemma3_model {
    gemma3_config config;
    int exact;                        /* float activations, dequantised weights */
    const struct kernels *kernels;    /* the operations on this CPU: section 2 */
    struct matrix token_embd;         /* [n_vocab][d_model] */
    struct matrix lm_head;            /* token_embd itself in every public Gemma 3 */
    int tied;                         /* it is: there is no output.weight */
    const float *output_norm;         /* [d_model] */
    struct layer layer[GEMMA3_MAX_LAYERS];

    gemma3_tokenizer *tokenizer;
    gemma3_vocab vocab;
    int can_chat;
    char name[128];
    size_t weight_bytes;
    void *owned[8];                   /* blocks to free on close */
    int n_owned;
    const void *mapping;              /* the file, when we mapped it */
    size_t mapping_bytes;
};

/* One conversation: the KV cache, and room for the n_ubatch tokens that go through the layers at
 * once. Shapes are said here; where everything lies says lay_out (section 13). */
struct gemma3_state {
    const gemma3_model *m;
    const gemma3_config *c;           /* the model's, unless params have another */
    gemma3_params p;
    void *allocated;                  /* by _new, else NULL */
    int pos;                          /* tokens in the cache */
    int n_ubatch;                     /* min(n_batch, GEMMA3_MAX_UBATCH) */
    int q_block;                      /* tokens whose attention is computed together */
    int ring;                         /* slots of a local layer's cache */
    uint8_t *k_cache[GEMMA3_MAX_LAYERS]; /* of F16 or F32; section 4 says how they lie */
    uint8_t *v_cache[GEMMA3_MAX_LAYERS];
    float *inv_freq[2];               /* [head_dim/2]; 0 global, 1 local, as is_local */
    float *cosine[2], *sine[2];       /* [n_ubatch][head_dim/2] */
    float *x;                         /* [n_ubatch][d_model]        residual stream */
    float *h;                         /* [n_ubatch][d_model]        branch */
    float *q, *attended;              /* [n_ubatch][n_heads][head_dim] */
    float *k, *v;                     /* [n_ubatch][n_kv_heads][head_dim] */
    float *gate, *up;                 /* [n_ubatch][d_ff] */
    float *block_q, *block_out;       /* [n_kv_heads][q_block][heads per kv head][head_dim] */
    float *score_sum;                 /* [n_kv_heads][q_block][heads per kv head] */
    float *score;                     /* [n_kv_heads][q_block][heads per kv head][n_score] */
    size_t n_score;                   /* n_ctx, rounded up to 16 */
    struct q8_block *q8;              /* [n_ubatch][widest input / 32]   a matrix's input as int8 */
    int n_acc;                        /* vectors that a worker multiplies at once, at most */
    float (*acc)[TILE_ROWS];          /* [n_threads][n_acc] */
    struct unpacked *unpacked;        /* [n_threads] */
    float *row_floats;                /* [n_threads][TILE_ROWS][widest input], exact mode */
    char error[256];
};

/* ==== 2. The operations ==========================================================================
 *
 * All arithmetic of the model is in this table; the sections up to 6 only say which numbers meet.
 * A table exists for plain C, which is the definition (section 9), and for each instruction set
 * (section 10). All give the same bits. Loops over tokens, heads and rows are the callers'. */

/* 32 activations as int8: x[j] is about d * code[j] (rule 1). */
struct q8_block {
    float d;
    float d_sum;           /* d times the sum of the codes, for formats with a minimum */
    int32_t sum[2];        /* of the codes in each half */
    int32_t minus_8_sums;  /* -8 times both: what unsigned Q4_0 nibbles are too large by */
    int32_t unused[3];     /* 64 bytes: a cache line */
    int8_t code[32];
};

/* Up to TILE_ROWS rows of a matrix times n vectors. */
struct product {
    const struct format *format;
    const uint8_t *rows;     /* n_rows rows, row_bytes apart, or a tile */
    size_t row_bytes;
    int n_rows, cols, n;
    const struct q8_block *q8; /* mul_codes: [n][x_stride] */
    const float *x;          /* mul_floats: [n][x_stride] */
    size_t x_stride;
    float (*acc)[TILE_ROWS]; /* [n][TILE_ROWS] */
    struct panel *scratch;   /* mul_codes: [PANELS] */
};

/* Values of the cache, weighted and added up: for n queries and a slice of a head. */
enum { MIX_WIDTH = 32 };     /* elements of a slice, but at a head's end */

struct mix {
    int type;                /* of the cache: F16 or F32 */
    const uint8_t *v;        /* [n_pos][width], v_bytes apart */
    size_t v_bytes;
    int n_pos;
    const float *e;          /* [n][n_pos], e_stride apart */
    size_t e_stride;
    float *out;              /* [n][width], out_stride apart */
    size_t out_stride;
    int n, width;
};

struct kernels {
    const char *name;
    int tiles;               /* mul_codes takes a tile; 0: rows as they lie in the file */
    /* x [n] -> codes: d = amax / 127, code = round(x * (127 / amax)), ties to even (rule 1). */
    void (*quantize)(struct q8_block *out, const float *x, int n);
    /* acc[i][r] += row r . q8[i], an integer format's tile: for each block in order
     * acc = fma(isum, d_row * d, acc), isum the exact integer dot product (rule 2). */
    void (*mul_codes)(const struct product *p);
    /* acc[i][r] = row r . x[i], rows of F32, F16, BF16: element j into lane j mod 16 by fma, the
     * lanes joined as a tree (rule 4). */
    void (*mul_floats)(const struct product *p);
    /* out [cols] = row r of w as float32, as its format defines. */
    void (*dequantize)(const struct matrix *w, int r, int n, float *out);
    /* y [n] = x / sqrt(mean(x^2) + eps) * w (rules 4, 5). */
    void (*rmsnorm)(float *y, const float *x, const float *w, int n, float eps);
    /* v [head_dim]: each pair (j, j + head_dim/2) turned by its angle (rule 5). */
    void (*rope)(float *v, const float *cosine, const float *sine, int head_dim);
    /* to [n] = x rounded to the cache's type, F16 or F32 (rule 6). */
    void (*store)(uint8_t *to, const float *x, int n, int type);
    /* s[k] = exp(s[k] - max) for positions first + k; returns their sum, added in the lanes of the
     * absolute position: softmax's numerators and denominator (rule 6). */
    float (*exp_scores)(float *s, int n, int first);
    /* out[i] = fma(e[i][p], v[p], out[i]), positions in order (rule 6). */
    void (*mix_values)(const struct mix *m);
    /* gate [n] = gelu(gate) * up, the tanh form of GELU (rule 5). */
    void (*gelu)(float *gate, const float *up, int n);
    /* The sum of exp(logits - max) in double, for scores (rule 9). */
    double (*sum_exp)(const float *logits, int n, float max);
};

/* From later sections: what the forward pass uses besides the table. */
static void cos_sin(float angle, float *c, float *s);
static void softcap(float *logits, size_t n, float cap);
static float fma_f32(float a, float b, float c);
static float exp_f32(float x);
static const struct format *find_format(uint32_t type);
static int is_float(const struct format *f);

/* For params.trace, which may look at every tensor, and change it to see what a mistake would
 * do. */
static void trace(const gemma3_state *s, const char *name, int l, float *x, int width, int n)
{
    if (s->p.trace) s->p.trace(s->p.trace_user, name, l, s->pos, n, width, x);
}

/* ==== 3. The forward pass ===================================================================== */

/* y [n][rows] = w x, one of several with the same input x [n][cols]. */
struct linear {
    const struct matrix *w;
    float *y;
};
static void matmul(const gemma3_state *s, const struct linear *to, int n_to, const float *x, int n);

static void embed(gemma3_state *s, const int32_t *ids, int n);
static void rope_tables(gemma3_state *s, int n);
static void rmsnorm(const gemma3_state *s, float *y, const float *x, const float *w, int n);
static void attention(gemma3_state *s, const struct layer *w, int l, int n);
static void feed_forward(gemma3_state *s, const struct layer *w, int l, int n);
static void add(float *x, const float *y, size_t n);

/* n <= n_ubatch tokens through all layers: x [n][d_model] afterwards. A prompt and a single new
 * token are the same. h is the branch that leaves the residual stream x and is added to it
 * again. */
static void forward_ubatch(gemma3_state *s, const int32_t *ids, int n)
{
    const gemma3_config *c = s->c;
    size_t size = (size_t)n * c->d_model;
    rope_tables(s, n);
    embed(s, ids, n);
    trace(s, "inp_scaled", -1, s->x, c->d_model, n);
    for (int l = 0; l < c->n_layers; l++) {
        const struct layer *w = &s->m->layer[l];
        rmsnorm(s, s->h, s->x, w->attn_norm, n);
        trace(s, "attn_norm", l, s->h, c->d_model, n);
        attention(s, w, l, n);
        trace(s, "attn_out", l, s->h, c->d_model, n);
        rmsnorm(s, s->h, s->h, w->post_attention_norm, n);
        trace(s, "attn_post_norm", l, s->h, c->d_model, n);
        add(s->x, s->h, size);
        trace(s, "sa_out", l, s->x, c->d_model, n);
        rmsnorm(s, s->h, s->x, w->ffn_norm, n);
        trace(s, "ffn_norm", l, s->h, c->d_model, n);
        feed_forward(s, w, l, n);
        trace(s, "ffn_out", l, s->h, c->d_model, n);
        rmsnorm(s, s->h, s->h, w->post_ffw_norm, n);
        trace(s, "ffn_post_norm", l, s->h, c->d_model, n);
        add(s->x, s->h, size);
        trace(s, "l_out", l, s->x, c->d_model, n);
    }
}

/* x [n][d_model] = rows of the embedding times sqrt(d_model): Gemma ties embedding and head, and
 * this scale makes one matrix serve as both. */
static void embed(gemma3_state *s, const int32_t *ids, int n)
{
    const gemma3_config *c = s->c;
    for (int i = 0; i < n; i++) {
        float *x = s->x + (size_t)i * c->d_model;
        s->m->kernels->dequantize(&s->m->token_embd, ids[i], 1, x);
        for (int j = 0; j < c->d_model; j++) x[j] *= c->embedding_scale;
    }
}

static void add(float *x, const float *y, size_t n)
{
    for (size_t j = 0; j < n; j++) x[j] += y[j];
}

/* cos and sin of the angles of these n tokens, for both bases; all layers share them. Linear
 * scaling divides the angle of global layers (factor 8 in 4B and larger); it is inside inv_freq. */
static void rope_tables(gemma3_state *s, int n)
{
    int half = s->c->head_dim / 2;
    for (int local = 0; local < 2; local++)
        for (int i = 0; i < n; i++)
            for (int j = 0; j < half; j++)
                cos_sin(s->inv_freq[local][j] * (float)(s->pos + i),
                        &s->cosine[local][i * half + j], &s->sine[local][i * half + j]);
}

/* Logits of n_rows of the tokens that forward_ubatch has taken, each n_vocab long. */
static void unembed(gemma3_state *s, const int *rows, int n_rows, float *logits)
{
    const gemma3_config *c = s->c;
    gemma3_trace *look = s->p.trace;  /* as trace, but the rows begin at another position */
    int pos = s->pos + rows[0];
    for (int k = 0; k < n_rows; k++) /* rows ascend, so a copy never overwrites one still needed */
        memmove(s->x + (size_t)k * c->d_model, s->x + (size_t)rows[k] * c->d_model,
                c->d_model * sizeof(float));
    rmsnorm(s, s->h, s->x, s->m->output_norm, n_rows);
    if (look) look(s->p.trace_user, "result_norm", -1, pos, n_rows, c->d_model, s->h);
    matmul(s, &(struct linear){&s->m->lm_head, logits}, 1, s->h, n_rows);
    if (c->final_softcap > 0) softcap(logits, (size_t)n_rows * c->n_vocab, c->final_softcap);
    if (look) look(s->p.trace_user, "result_output", -1, pos, n_rows, c->n_vocab, logits);
}

static int forward_fault(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows);

int gemma3_forward(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows,
                   float *logits)
{
    if (forward_fault(s, ids, n, rows, n_rows)) return -1;
    void standin_keep(int pos, const int32_t *ids, int n); /* stand-in, drop at merge */
    standin_keep(s->pos, ids, n);
    fp_state fp = fp_enter();
    for (int done = 0, take; done < n; done += take) {
        int n_here = 0, rows_here[GEMMA3_MAX_UBATCH];
        take = min_int(n - done, s->n_ubatch);
        forward_ubatch(s, ids + done, take);
        for (; n_rows > 0 && *rows < done + take; n_rows--) rows_here[n_here++] = *rows++ - done;
        if (n_here) unembed(s, rows_here, n_here, logits);
        if (n_here) logits += (size_t)n_here * s->c->n_vocab;
        s->pos += take;
    }
    fp_leave(fp);
    return 0;
}

/* A sentence in s->error when these tokens cannot be taken or these rows cannot be given. */
static int forward_fault(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows)
{
    int n_vocab = s->c->n_vocab;
    size_t size = sizeof s->error;
    if (n < 0) return snprintf(s->error, size, "%d tokens were given, expected 0 or more", n);
    if (n > s->p.n_ctx - s->pos)
        return snprintf(s->error, size, "the context is full: it holds %d tokens, %d are in it and "
                        "%d more were given", s->p.n_ctx, s->pos, n);
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_vocab)
            return snprintf(s->error, size, "token %d is %d, outside the vocabulary of %d",
                            s->pos + i, (int)ids[i], n_vocab);
    for (int k = 0; k < n_rows; k++)
        if (rows[k] < 0 || rows[k] >= n || (k && rows[k] <= rows[k - 1]))
            return snprintf(s->error, size, "rows[%d] is %d: rows must ascend and lie in 0..%d", k,
                            rows[k], n - 1);
    return 0;
}

/* Labels of the trace as they come, llama.cpp's where it has one; from the second to the third from
 * the end each layer has them. llama.cpp calls Qcur_raw and Kcur_raw Qcur and Kcur too. */
static const char *const trace_labels[] = {
    "inp_scaled", "attn_norm", "Qcur_raw", "Kcur_raw", "Vcur", "Qcur_normed", "Kcur_normed", "Qcur",
    "Kcur", "kqv_out", "attn_out", "attn_post_norm", "sa_out", "ffn_norm", "ffn_gate", "ffn_up",
    "ffn_geglu", "ffn_out", "ffn_post_norm", "l_out", "result_norm", "result_output"};
enum { N_TRACE_LABELS = sizeof trace_labels / sizeof *trace_labels };

const char *gemma3_trace_label(int index, int *in_layers)
{
    if (index < 0 || index >= N_TRACE_LABELS) return NULL;
    *in_layers = index > 0 && index < N_TRACE_LABELS - 2;
    return trace_labels[index];
}

/* ==== 4. Attention and the KV cache ==============================================================
 *
 * K (after norm and rope) and V are rounded to the cache's type before any use, also by their own
 * token. A global layer has a slot for every position. A local layer looks back `window` tokens,
 * itself included, and keeps a ring of window + n_ubatch - 1 slots: so the oldest key that the
 * first token of a call sees survives the call's own writes.
 *
 * Decoding reads the whole cache for each token, so every task finds its part of it in one stream:
 *     K [n_kv_heads][slots][head_dim]                             a task scores a run of positions
 *     V [n_kv_heads][head_dim / MIX_WIDTH][slots][MIX_WIDTH]      a task sums one slice of a head
 *
 * A prompt's tokens are taken in blocks of q_block tokens: the queries of a block that share a K
 * and V meet each key and value once. With 4 heads to a kv head and q_block 4 that is 16
 * queries. */

static int cache_type(const gemma3_state *s) { return s->p.kv_type == GEMMA3_KV_F16 ? F16 : F32; }
static size_t kv_element(const gemma3_state *s) { return s->p.kv_type == GEMMA3_KV_F16 ? 2 : 4; }
static int slots_of(const gemma3_state *s, int l)
{
    return s->c->is_local[l] ? s->ring : s->p.n_ctx;
}

/* The attention of one query block in layer l. t counts the block's queries of one kv head: that
 * of token i0 + t / heads_per_kv, query head t % heads_per_kv of the group that shares the kv
 * head. */
struct attention {
    gemma3_state *s;
    const struct layer *w;
    int l, slots;
    int i0, n;                        /* tokens i0 .. i0+n-1 of this call */
    int first_pos;                    /* lowest position that any of them sees */
    int heads_per_kv;
};

static void for_each(const gemma3_state *s, int n_items, gemma3_task *each, void *job);
static float (*acc_of(const gemma3_state *s, int worker))[TILE_ROWS];
static void copy_floats(float *to, const float *from, int n);
static void norm_heads(void *attention, int i, int worker);
static void rope_heads(void *attention, int i, int worker);
static void store_heads(void *attention, int i, int worker);
static void attend(struct attention *a);

/* h [n][d_model] -> h, through attention over the cache of layer l, which gains n positions. */
static void attention(gemma3_state *s, const struct layer *w, int l, int n)
{
    const gemma3_config *c = s->c;
    int q_width = c->n_heads * c->head_dim, kv_width = c->n_kv_heads * c->head_dim;
    struct attention a = {.s = s, .w = w, .l = l, .slots = slots_of(s, l),
                          .heads_per_kv = c->n_heads / c->n_kv_heads};
    struct linear qkv[] = {{&w->attn_q, s->q}, {&w->attn_k, s->k}, {&w->attn_v, s->v}};
    matmul(s, qkv, 3, s->h, n);
    trace(s, "Qcur_raw", l, s->q, q_width, n);
    trace(s, "Kcur_raw", l, s->k, kv_width, n);
    trace(s, "Vcur", l, s->v, kv_width, n);
    for_each(s, n, norm_heads, &a);
    trace(s, "Qcur_normed", l, s->q, q_width, n);
    trace(s, "Kcur_normed", l, s->k, kv_width, n);
    for_each(s, n, rope_heads, &a);
    trace(s, "Qcur", l, s->q, q_width, n);
    trace(s, "Kcur", l, s->k, kv_width, n);
    for_each(s, n, store_heads, &a);
    for (a.i0 = 0; a.i0 < n; a.i0 += s->q_block) {
        a.n = min_int(n - a.i0, s->q_block);
        attend(&a);
    }
    trace(s, "kqv_out", l, s->attended, q_width, n);
    matmul(s, &(struct linear){&w->attn_output, s->h}, 1, s->attended, n);
}

/* Head h of token i in q [n][n_heads][head_dim], or in k or v [n][n_kv_heads][head_dim]. */
static float *head_at(float *x, int n_heads, int head_dim, int i, int h)
{
    return x + ((size_t)i * n_heads + h) * head_dim;
}

static void norm_heads(void *attention, int i, int worker)
{
    const struct attention *a = attention;
    const gemma3_config *c = a->s->c;
    (void)worker;
    for (int h = 0; h < c->n_heads; h++) {
        float *q = head_at(a->s->q, c->n_heads, c->head_dim, i, h);
        a->s->m->kernels->rmsnorm(q, q, a->w->attn_q_norm, c->head_dim, c->rms_eps);
    }
    for (int g = 0; g < c->n_kv_heads; g++) {
        float *k = head_at(a->s->k, c->n_kv_heads, c->head_dim, i, g);
        a->s->m->kernels->rmsnorm(k, k, a->w->attn_k_norm, c->head_dim, c->rms_eps);
    }
}

static void rope_heads(void *attention, int i, int worker)
{
    const struct attention *a = attention;
    const gemma3_state *s = a->s;
    int D = s->c->head_dim, local = s->c->is_local[a->l];
    const float *cosine = s->cosine[local] + i * (D / 2), *sine = s->sine[local] + i * (D / 2);
    (void)worker;
    for (int h = 0; h < s->c->n_heads; h++)
        s->m->kernels->rope(head_at(s->q, s->c->n_heads, D, i, h), cosine, sine, D);
    for (int g = 0; g < s->c->n_kv_heads; g++)
        s->m->kernels->rope(head_at(s->k, s->c->n_kv_heads, D, i, g), cosine, sine, D);
}

/* ---- Where the cache keeps what ---- */

static int slice_width(int head_dim, int j0) { return min_int(head_dim - j0, MIX_WIDTH); }
static int n_slices(int head_dim) { return (head_dim + MIX_WIDTH - 1) / MIX_WIDTH; }

/* K of kv head g at position p, and elements j0 .. j0 + slice_width - 1 of V. */
static uint8_t *key_at(const struct attention *a, int g, int p)
{
    size_t before = ((size_t)g * a->slots + p % a->slots) * a->s->c->head_dim;
    return a->s->k_cache[a->l] + before * kv_element(a->s);
}

static uint8_t *value_at(const struct attention *a, int g, int j0, int p)
{
    int D = a->s->c->head_dim;
    size_t before = ((size_t)g * D + j0) * a->slots + (size_t)(p % a->slots) * slice_width(D, j0);
    return a->s->v_cache[a->l] + before * kv_element(a->s);
}

/* K and V of token i go into the cache. */
static void store_heads(void *attention, int i, int worker)
{
    const struct attention *a = attention;
    gemma3_state *s = a->s;
    int D = s->c->head_dim, p = s->pos + i;
    (void)worker;
    for (int g = 0; g < s->c->n_kv_heads; g++) {
        const float *k = head_at(s->k, s->c->n_kv_heads, D, i, g);
        const float *v = head_at(s->v, s->c->n_kv_heads, D, i, g);
        s->m->kernels->store(key_at(a, g, p), k, D, cache_type(s));
        for (int j0 = 0; j0 < D; j0 += MIX_WIDTH)
            s->m->kernels->store(value_at(a, g, j0, p), v + j0, slice_width(D, j0), cache_type(s));
    }
}

/* First position that the token at position p sees: q - k < window in a local layer. */
static int first_seen(const struct attention *a, int p)
{
    const gemma3_config *c = a->s->c;
    return c->is_local[a->l] && p >= c->window ? p - c->window + 1 : 0;
}

/* ---- softmax(q . k) v ---- */

/* What all the rest of this section computes, for one query: out [head_dim] = softmax(q . k) v over
 * the positions that the token at position p sees. q is scaled; score has room for those positions.
 * A test compares it with attend. */
static float dot(int type, const uint8_t *row, const float *x, int n);
static float exp_scores_of(float *score, int n, int first);
static float value_of(int type, const uint8_t *row, size_t j);
static inline void attention_by_definition(const struct attention *a, const float *q, int g, int p,
                                           float *score, float *out)
{
    int D = a->s->c->head_dim, first = first_seen(a, p), n = p + 1 - first, type = cache_type(a->s);
    for (int t = 0; t < n; t++) score[t] = dot(type, key_at(a, g, first + t), q, D);
    float sum = exp_scores_of(score, n, first);
    for (int j = 0; j < D; j++) {
        int j0 = j / MIX_WIDTH * MIX_WIDTH;
        float o = 0;
        for (int t = 0; t < n; t++)
            o = fma_f32(score[t], value_of(type, value_at(a, g, j0, first + t), j - j0), o);
        out[j] = o / sum;
    }
}

static int n_queries(const struct attention *a) { return a->n * a->heads_per_kv; }

/* Number of a query among all of the block: where its row of block_q, score and block_out lies. */
static size_t query_at(const struct attention *a, int g, int t)
{
    return (size_t)g * a->s->q_block * a->heads_per_kv + t;
}

/* Queries of one kv head side by side, and scaled. */
static void gather_queries(const struct attention *a)
{
    gemma3_state *s = a->s;
    const gemma3_config *c = s->c;
    size_t q_floats = (size_t)a->heads_per_kv * c->head_dim;
    for (int i = 0; i < a->n; i++)
        for (int g = 0; g < c->n_kv_heads; g++) {
            const float *q = s->q + ((size_t)(a->i0 + i) * c->n_kv_heads + g) * q_floats;
            float *to = s->block_q + ((size_t)g * s->q_block + i) * q_floats;
            for (size_t j = 0; j < q_floats; j++) to[j] = q[j] * c->query_scale;
        }
}

enum { SCORE_RUN = 64 };              /* positions that one task scores */

static int n_score_runs(const struct attention *a)
{
    return (a->s->pos + a->i0 + a->n - a->first_pos + SCORE_RUN - 1) / SCORE_RUN;
}

/* Positions [begin, end) of the cache that lie in a row: fewer when the ring's end comes first. */
static int run_of(const struct attention *a, int begin, int end)
{
    return min_int(end - begin, a->slots - begin % a->slots);
}

/* Scores of SCORE_RUN positions with every query of one kv head: keys are the rows of a matrix.
 * Among them are positions that a query must not see, later ones and those before its window:
 * softmax and mix pass over them, which is the causal mask. */
static void score_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int D = s->c->head_dim, g = index / n_score_runs(a);
    int p = a->first_pos + index % n_score_runs(a) * SCORE_RUN;
    int end = min_int(s->pos + a->i0 + a->n, p + SCORE_RUN);
    struct product keys = {.format = find_format(cache_type(s)), .row_bytes = D * kv_element(s),
                           .cols = D, .x_stride = D, .acc = acc_of(s, worker)};
    for (; p < end; p += keys.n_rows) {
        keys.rows = key_at(a, g, p);
        keys.n_rows = min_int(run_of(a, p, end), TILE_ROWS);
        for (int t = 0; t < n_queries(a); t += keys.n) {
            keys.x = s->block_q + query_at(a, g, t) * D;
            keys.n = min_int(n_queries(a) - t, s->n_acc);
            s->m->kernels->mul_floats(&keys);
            for (int k = 0; k < keys.n; k++)
                copy_floats(s->score + query_at(a, g, t + k) * s->n_score + (p - a->first_pos),
                            keys.acc[k], keys.n_rows);
        }
    }
}

/* One query: its visible scores become exp(score - max); one thread adds them up in fixed order. */
static void softmax_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int g = index / n_queries(a), t = index % n_queries(a);
    int p = s->pos + a->i0 + t / a->heads_per_kv, first = first_seen(a, p);
    float *score = s->score + query_at(a, g, t) * s->n_score + (first - a->first_pos);
    (void)worker;
    s->score_sum[query_at(a, g, t)] = s->m->kernels->exp_scores(score, p + 1 - first, first);
}

/* The sums of one slice, divided by their queries' score_sum, go where attn_output expects them. */
static void divide_and_place(const struct attention *a, int g, int j0, const float *out)
{
    gemma3_state *s = a->s;
    int D = s->c->head_dim;
    for (int t = 0; t < n_queries(a); t++) {
        int i = a->i0 + t / a->heads_per_kv, h = g * a->heads_per_kv + t % a->heads_per_kv;
        float *to = head_at(s->attended, s->c->n_heads, D, i, h) + j0;
        float sum = s->score_sum[query_at(a, g, t)];
        for (int j = 0; j < slice_width(D, j0); j++) to[j] = out[(size_t)t * D + j] / sum;
    }
}

/* out = sum of e_p v_p over positions in order, for one slice of a kv head and its queries. The
 * tokens of the block see different ranges, [first_seen(p), p], and both ends grow with the token.
 * So the tokens that see a position are one run [from, to). For a window of 4 and tokens 8, 9, 10
 * of a block:
 *
 *     position    5  6  7  8  9  10
 *     token 8     x  x  x  x              from = 0 until 8
 *     token 9        x  x  x  x           to = 2 from 6 on
 *     token 10          x  x  x  x        to = 3 from 7 on, from = 1 at 9, 2 at 10
 *
 * Positions are taken up to where either end of the run changes, or the ring wraps. */
static void mix_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int D = s->c->head_dim, g = index / n_slices(D), j0 = index % n_slices(D) * MIX_WIDTH;
    int p0 = s->pos + a->i0, from = 0, to = 1;
    float *out = s->block_out + query_at(a, g, 0) * D + j0;
    struct mix m = {.type = cache_type(s), .v_bytes = slice_width(D, j0) * kv_element(s),
                    .e_stride = s->n_score, .out_stride = D, .width = slice_width(D, j0)};
    (void)worker;
    for (int t = 0; t < n_queries(a); t++) memset(out + (size_t)t * D, 0, m.width * sizeof(float));
    for (int p = a->first_pos, end; p < p0 + a->n; p = end) {
        while (p0 + from < p) from++;
        while (to < a->n && first_seen(a, p0 + to) <= p) to++;
        end = p0 + from + 1;
        if (to < a->n) end = min_int(end, first_seen(a, p0 + to));
        end = p + run_of(a, p, end);
        m.v = value_at(a, g, j0, p);
        m.n_pos = end - p;
        m.n = (to - from) * a->heads_per_kv;
        m.e = s->score + query_at(a, g, from * a->heads_per_kv) * s->n_score + (p - a->first_pos);
        m.out = out + (size_t)from * a->heads_per_kv * D;
        s->m->kernels->mix_values(&m);
    }
    divide_and_place(a, g, j0, out);
}

/* attended [i0 .. i0+n-1][n_heads][head_dim] for one query block: three phases, each shared out. */
static void attend(struct attention *a)
{
    const gemma3_state *s = a->s;
    a->first_pos = first_seen(a, s->pos + a->i0);
    gather_queries(a);
    for_each(s, s->c->n_kv_heads * n_score_runs(a), score_task, a);
    for_each(s, s->c->n_kv_heads * n_queries(a), softmax_task, a);
    for_each(s, s->c->n_kv_heads * n_slices(s->c->head_dim), mix_task, a);
}

/* ==== 5. Feed-forward ========================================================================= */

static void gelu_task(void *state, int i, int worker)
{
    gemma3_state *s = state;
    size_t d_ff = s->c->d_ff;
    (void)worker;
    s->m->kernels->gelu(s->gate + i * d_ff, s->up + i * d_ff, (int)d_ff);
}

/* h [n][d_model] -> h: Wdown (gelu(Wgate h) * Wup h) */
static void feed_forward(gemma3_state *s, const struct layer *w, int l, int n)
{
    matmul(s, (struct linear[]){{&w->ffn_gate, s->gate}, {&w->ffn_up, s->up}}, 2, s->h, n);
    trace(s, "ffn_gate", l, s->gate, s->c->d_ff, n);
    trace(s, "ffn_up", l, s->up, s->c->d_ff, n);
    for_each(s, n, gelu_task, s);
    trace(s, "ffn_geglu", l, s->gate, s->c->d_ff, n);
    matmul(s, &(struct linear){&w->ffn_down, s->h}, 1, s->gate, n);
}

/* ==== 6. Matrix times vectors, and how threads share =============================================
 *
 * Threads share out whole things: tokens, heads, tiles of 32 rows. Which thread takes which cannot
 * change a bit, because no sum is ever divided (rule 7). */

/* Share number i of total things cut into n_tasks runs: [*begin, *end). */
static void share_of(int total, int n_tasks, int i, int *begin, int *end)
{
    *begin = (int)((int64_t)total * i / n_tasks);
    *end = (int)((int64_t)total * (i + 1) / n_tasks);
}

/* Things to do for each of n_items, handed out in a few runs for each thread. */
struct items {
    int n_items, n_tasks;
    gemma3_task *each;
    void *job;
};

enum { TASKS_PER_THREAD = 6 };        /* 16 gave the same speed */

static void items_task(void *arg, int index, int worker)
{
    const struct items *w = arg;
    fp_state fp = fp_enter(); /* the thread may be the caller's */
    int i, end;
    share_of(w->n_items, w->n_tasks, index, &i, &end);
    for (; i < end; i++) w->each(w->job, i, worker);
    fp_leave(fp);
}

/* each(job, i, worker) for every i < n_items, on all threads. */
static void for_each(const gemma3_state *s, int n_items, gemma3_task *each, void *job)
{
    struct items w = {n_items, min_int(n_items, s->p.n_threads * TASKS_PER_THREAD), each, job};
    if (n_items > 1 && s->p.n_threads > 1) s->p.parallel_for(s->p.pool, w.n_tasks, items_task, &w);
    else
        for (int i = 0; i < n_items; i++) each(job, i, 0);
}

/* y = rms(x) * w; x and y are [n][d_model] */
struct norm {
    const gemma3_state *s;
    float *y;
    const float *x, *w;
};

static void norm_task(void *arg, int i, int worker)
{
    const struct norm *job = arg;
    const gemma3_config *c = job->s->c;
    size_t at = (size_t)i * c->d_model;
    (void)worker;
    job->s->m->kernels->rmsnorm(job->y + at, job->x + at, job->w, c->d_model, c->rms_eps);
}

static void rmsnorm(const gemma3_state *s, float *y, const float *x, const float *w, int n)
{
    struct norm job = {.s = s, .y = y, .x = x, .w = w};
    for_each(s, n, norm_task, &job);
}

static int n_tiles(const struct matrix *w) { return (w->rows + TILE_ROWS - 1) / TILE_ROWS; }

static float (*acc_of(const gemma3_state *s, int worker))[TILE_ROWS]
{
    return s->acc + (size_t)worker * s->n_acc;
}

/* n <= 32; nearly always 32, which the compiler then copies in line. */
static void copy_floats(float *to, const float *from, int n)
{
    if (n == TILE_ROWS) memcpy(to, from, TILE_ROWS * sizeof(float));
    else memcpy(to, from, n * sizeof(float));
}

struct matmul {
    const gemma3_state *s;
    const struct linear *to;
    const float *x;                   /* [n][cols] */
    int n;
    size_t blocks;                    /* of a row of q8 */
};

static void mul_tile(const struct matmul *job, const struct matrix *w, int row, int n_rows,
                     int worker);

/* Rows of tile `index`, counted through all the matrices, times every vector. */
static void matmul_task(void *arg, int index, int worker)
{
    const struct matmul *job = arg;
    const struct linear *to = job->to;
    for (; index >= n_tiles(to->w); to++) index -= n_tiles(to->w);
    float (*acc)[TILE_ROWS] = acc_of(job->s, worker);
    int row = index * TILE_ROWS, n_rows = min_int(to->w->rows - row, TILE_ROWS);
    memset(acc, 0, job->n * sizeof *acc);
    mul_tile(job, to->w, row, n_rows, worker);
    for (int i = 0; i < job->n; i++)
        copy_floats(to->y + (size_t)i * to->w->rows + row, acc[i], n_rows);
}

static void quantize_task(void *arg, int i, int worker)
{
    const struct matmul *job = arg;
    int cols = job->to->w->cols;
    (void)worker;
    job->s->m->kernels->quantize(job->s->q8 + i * job->blocks, job->x + (size_t)i * cols, cols);
}

/* Every one of n_to matrices with the same input x [n][cols]. */
static void matmul(const gemma3_state *s, const struct linear *to, int n_to, const float *x, int n)
{
    struct matmul job = {s, to, x, n, ((size_t)to->w->cols + 31) / 32};
    int tiles = 0, has_codes = 0;
    for (int k = 0; k < n_to; k++) {
        tiles += n_tiles(to[k].w);
        has_codes |= !is_float(to[k].w->format);
    }
    if (has_codes && !s->m->exact) for_each(s, n, quantize_task, &job);
    for_each(s, tiles, matmul_task, &job);
}

/* ==== 7. Arithmetic that is the same everywhere =================================================
 *
 * IEEE 754 rounds + - * / and sqrt correctly on every machine. A fused multiply-add is the other
 * operation we build on; exp, sin, cos, pow and log are made of these, because every C library
 * rounds its own a little differently. */

INLINE uint32_t bits_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

INLINE float float_of(uint32_t u)
{
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* a*b+c rounded once, without the instruction: the product of two floats is exact in double; the
 * sum and its error (Knuth's TwoSum) are rounded to odd (a double whose last bit says "there was more"),
 * so that rounding it again, to float, cannot go wrong (Boldo and Melquiond, "Emulation of FMA and
 * correctly rounded sums"). */
static float soft_fmaf(float a, float b, float c)
{
    double product = (double)a * b, sum = product + c;
    double c_in_sum = sum - product, error = (product - (sum - c_in_sum)) + (c - c_in_sum);
    uint64_t u;
    memcpy(&u, &sum, 8);
    if (error != 0 && (u & 1) == 0 && sum - sum == 0) { /* inexact, even and finite */
        u += (error > 0) == (sum > 0) ? 1 : (uint64_t)-1;
        memcpy(&sum, &u, 8);
    }
    return (float)sum;
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(__riscv_f) || defined(__s390x__) || \
    defined(__powerpc64__)
enum { HARD_FMA = 1 };
#else
enum { HARD_FMA = 0 };
#endif

INLINE float sqrt_of(float x)
{
    return __builtin_sqrtf(x);
}

/* Round half to even for |x| < 2^22: in this range a float's last bit is 1 once 1.5 * 2^23 is added,
 * so the addition itself rounds; the integer stands in the low bits. */
#define ROUNDER 12582912.0f
INLINE int32_t round_to_int(float x)
{
    return (int32_t)(bits_of(x + ROUNDER) - bits_of(ROUNDER));
}

INLINE float join_lanes(float lane[16])
{
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    return lane[0];
}

/* The rounding mode and the flush-to-zero bits belong to the thread, and the caller may have changed
 * them: every public call and every worker sets IEEE's defaults and puts the caller's back. */
#if defined(HAVE_X86)
static fp_state fp_enter(void)
{
    unsigned old = _mm_getcsr();
    _mm_setcsr(0x1f80);
    return old;
}
static void fp_leave(fp_state old) { _mm_setcsr((unsigned)old); }
#elif defined(__aarch64__)
static fp_state fp_enter(void)
{
    uint64_t old;
    __asm__ volatile("mrs %0, fpcr" : "=r"(old));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
    return old;
}
static void fp_leave(fp_state old) { __asm__ volatile("msr fpcr, %0" : : "r"(old)); }
#elif defined(__arm__) && defined(__VFP_FP__) && !defined(__SOFTFP__)
static void fp_leave(fp_state old) { __asm__ volatile("vmsr fpscr, %0" : : "r"((uint32_t)old)); }
static fp_state fp_enter(void)
{
    uint32_t old;
    __asm__ volatile("vmrs %0, fpscr" : "=r"(old));
    fp_leave(old & ~0x07c89f00u); /* rounding, flush, default NaN, traps; flags of comparisons stay */
    return old;
}
#else
#include <fenv.h>
#if defined(FE_TONEAREST)
static fp_state fp_enter(void)
{
    int old = fegetround();
    fesetround(FE_TONEAREST);
    return (fp_state)old;
}
static void fp_leave(fp_state old) { fesetround((int)old); }
#else /* floats in software, which know one way of rounding */
static fp_state fp_enter(void) { return 0; }
static void fp_leave(fp_state old) { (void)old; }
#endif
#endif

#define LN2_HIGH 0x1.62e42fee00000p-1 /* 21 zero bits at the end: times an exponent it is exact */
#define LN2_LOW 0x1.a39ef35793c76p-33

static const double exp_taylor[14] = {1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040,
                                      1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800,
                                      1.0 / 479001600, 1.0 / 6227020800};

/* The same three steps in double, to degree 13; a large n is applied in parts. */
static double exp_double(double x)
{
    if (x != x) return x;
    if (x < -745.2) return 0;
    if (x > 709.78) return (double)float_of(0x7f800000);
    double n = (x * 0x1.71547652b82fep+0 + 0x1.8p52) - 0x1.8p52;
    double r = (x - n * LN2_HIGH) - n * LN2_LOW;
    double e = 0;
    for (int k = 13; k >= 0; k--) e = exp_taylor[k] + e * r;
    for (; n > 1000; n -= 512) e *= 0x1p512;
    for (; n < -1000; n += 512) e *= 0x1p-512;
    uint64_t u = (uint64_t)(int64_t)(n + 1023) << 52;
    double scale;
    memcpy(&scale, &u, 8);
    return e * scale;
}

static double log_double(double x)
{
    if (!(x > 0)) return x == 0 ? -(double)float_of(0x7f800000) : (double)float_of(0x7fc00000);
    if (x - x != 0) return x;
    int n = 0;
    for (; x < 0x1p-500; x *= 0x1p500) n -= 500;
    uint64_t u;
    memcpy(&u, &x, 8);
    n += (int)(u >> 52) - 1023;
    u = (u & 0xfffffffffffff) | 0x3ff0000000000000;
    memcpy(&x, &u, 8);                          /* 1 <= x < 2 */
    if (x > 0x1.6a09e667f3bcdp+0) x /= 2, n++;  /* around 1 */
    double s = (x - 1) / (x + 1), s2 = s * s, sum = 0; /* log x = 2 artanh s */
    for (int k = 25; k >= 1; k -= 2) sum = sum * s2 + 1.0 / k;
    return n * LN2_HIGH + (2 * s * sum + n * LN2_LOW);
}

double gemma3_exp(double x)
{
    fp_state fp = fp_enter();
    double e = exp_double(x);
    fp_leave(fp);
    return e;
}

double gemma3_log(double x)
{
    fp_state fp = fp_enter();
    double l = log_double(x);
    fp_leave(fp);
    return l;
}

static double power(double base, double exponent) /* base > 0 */
{
    return exp_double(exponent * log_double(base));
}

/* cos and sin of a rotary angle, 0 <= angle < 2^31: less k quarter turns in three steps, then Taylor's
 * series on [-pi/4, pi/4]. pi/2 is cut into parts of 33 bits and k into its low 20 bits and the rest, so
 * that all products with the first two parts are exact. A model is refused whose angles could reach
 * 2^31 (configure_rope); NaN for them here, because casts of such numbers differ between CPUs. */
static void cos_sin(float angle, float *c, float *s)
{
    if (!(angle >= 0 && angle < 0x1p31f)) {
        *c = *s = float_of(0x7fc00000);
        return;
    }
    double x = angle;
    double k = (x * 0x1.45f306dc9c883p-1 + 0x1.8p52) - 0x1.8p52; /* 2/pi */
    double low = (double)((uint32_t)k & 0xfffff), high = k - low;
    double r = (x - high * 0x1.921fb54400000p+0) - low * 0x1.921fb54400000p+0;
    r = (r - high * 0x1.0b4611a600000p-34) - low * 0x1.0b4611a600000p-34;
    r -= k * 0x1.3198a2e037073p-69;
    static const double even_term[9] = {1, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800,
                                        1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};
    static const double odd_term[9] = {1, -1.0 / 6, 1.0 / 120, -1.0 / 5040, 1.0 / 362880,
                                       -1.0 / 39916800, 1.0 / 6227020800, -1.0 / 1307674368000,
                                       1.0 / 355687428096000};
    double r2 = r * r, even = 0, odd = 0;
    for (int j = 8; j >= 0; j--) {
        even = even_term[j] + even * r2;
        odd = odd_term[j] + odd * r2;
    }
    odd *= r;
    int quarter = (int)((uint32_t)k & 3);
    double cosine = quarter & 1 ? odd : even, sine = quarter & 1 ? even : odd;
    *c = (float)(quarter == 1 || quarter == 2 ? -cosine : cosine);
    *s = (float)(quarter >= 2 ? -sine : sine);
}

static void softcap(float *logits, size_t n, float cap)
{
    for (size_t j = 0; j < n; j++) {
        float t = logits[j] / cap, e = exp_f32(-2.0f * float_of(bits_of(t) & 0x7fffffff));
        float tanh_of_abs = (1.0f - e) / (1.0f + e);
        logits[j] = cap * float_of(bits_of(tanh_of_abs) | (bits_of(t) & 0x80000000));
    }
}

/* Says whether this build on this machine computes as the contract needs it; run by every open. */
static const char *arithmetic_fault(void)
{
    volatile float one = 1, tiny = 0x1p-126f, a = 0x1.000002p0f, b = 0x1.fffffep-1f, big = 16777216;
    volatile double large = 0x1p53;
    float five = 5 * one, huge = big, unit = one; /* read once, so that a compiler may be tempted */
    if (tiny / 2 == 0) return "subnormal numbers are flushed to zero";
    if (big + one != big || big + 3 * one != big + 4 * one) return "sums are not rounded to nearest, ties to even";
    if ((huge + unit) - huge != 0) return "sums are reordered as if floats were real numbers";
    if (five / 3.0f != 0x1.aaaaaap+0f) return "a division became a multiplication by the reciprocal";
    if ((large + 1.5) - large != 2) return "doubles are wider than double: 32-bit x86 wants -msse2 -mfpmath=sse";
    if (a * b - one != 0) return "a product and a sum were fused into one operation";
    if (soft_fmaf(a, b, -one) != 0x1.fffffcp-25f) return "the emulated fused multiply-add is wrong";
    if (fma_f32(a, b, -one) != 0x1.fffffcp-25f) return "the fused multiply-add rounds twice";
    if (one / 3 != 0x1.555556p-2f || sqrt_of(2 * one) != 0x1.6a09e6p0f)
        return "division or square root is not correctly rounded";
    if (bits_of(exp_f32(one)) != 0x402df854) return "exp(1) is wrong";
    return NULL;
}

/* ==== 8. Number formats =========================================================================
 *
 * Weights lie in blocks of 32 or 256 elements that share a scale. All numbers in a file are
 * little-endian. Here is what a block of one row means; how 32 rows are interleaved for the vector
 * kernels, which read the same drawings, comes at the end. */

INLINE uint16_t load_u16_le(const uint8_t *p)
{
    uint16_t u;
    memcpy(&u, p, 2);
    return BIG_ENDIAN_CPU ? __builtin_bswap16(u) : u;
}
INLINE uint32_t load_u32_le(const uint8_t *p)
{
    uint32_t u;
    memcpy(&u, p, 4);
    return BIG_ENDIAN_CPU ? __builtin_bswap32(u) : u;
}
INLINE uint64_t load_u64_le(const uint8_t *p)
{
    return load_u32_le(p) | (uint64_t)load_u32_le(p + 4) << 32;
}
INLINE void store_u16_le(uint8_t *p, uint16_t u)
{
    u = BIG_ENDIAN_CPU ? __builtin_bswap16(u) : u;
    memcpy(p, &u, 2);
}
INLINE void store_u32_le(uint8_t *p, uint32_t u)
{
    u = BIG_ENDIAN_CPU ? __builtin_bswap32(u) : u;
    memcpy(p, &u, 4);
}

/* IEEE half precision:  s eeeee mmmmmmmmmm   value = (-1)^s * 2^(e-15) * 1.m, subnormal when e = 0:
 * then it is m * 2^-24, made from the integer, because arithmetic on subnormal floats can be slow. */
INLINE float f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x & 0x7c00, rest = (uint32_t)(x & 0x7fff) << 13;
    uint32_t normal = rest + (exponent == 0x7c00 ? 0x70000000 : 0x38000000); /* exponent 15 -> 127, 31 -> 255 */
    uint32_t subnormal = bits_of((float)(int32_t)(x & 0x3ff) * 0x1p-24f);
    return float_of((exponent ? normal : subnormal) | sign);
}

/* To nearest, ties to even; too large becomes infinity, as IEEE says. */
INLINE uint16_t f32_to_f16(float x)
{
    uint32_t u = bits_of(x), sign = u >> 16 & 0x8000, a = u & 0x7fffffff;
    uint32_t normal = (a - 0x38000000 + 0xfff + (a >> 13 & 1)) >> 13;       /* exponent 127 -> 15 */
    uint32_t subnormal = bits_of(float_of(a) + 0.5f) - 0x3f000000;           /* the sum rounds */
    uint32_t half = a < 0x38800000 ? subnormal : normal;
    half = a >= 0x477ff000 ? 0x7c00 : half;
    half = a > 0x7f800000 ? 0x7e00 : half;
    return (uint16_t)(sign | half);
}

/* bfloat16 is the upper half of a float. */
INLINE float bf16_to_f32(uint16_t x) { return float_of((uint32_t)x << 16); }

/* Element j of a row of floats as a file or the KV cache stores them. */
INLINE float load_float(int type, const uint8_t *row, size_t j)
{
    if (type == F16) return f16_to_f32(load_u16_le(row + 2 * j));
    if (type == BF16) return bf16_to_f32(load_u16_le(row + 2 * j));
    return float_of(load_u32_le(row + 4 * j));
}

/* The integer formats. A block of 256 elements is 8 groups of 32; g is the group wanted, j = 0 .. 31 an
 * element of it, h = j / 16 its half. q is the code as the bits say it.
 *
 *     Q4_0    | d f16 | qs[16] |                       18 bytes, 32 elements      d * (q - 8)
 *             qs[j % 16]: low nibble element j, high nibble element j + 16; so in all that follow
 *     Q4_1    | d f16 | m f16 | qs[16] |               20, 32     d * q + m
 *     Q5_0    | d f16 | fifth u32 | qs[16] |           22, 32     d * (q - 16)
 *             bit j of fifth is the fifth bit of element j
 *     Q5_1    | d f16 | m f16 | fifth u32 | qs[16] |   24, 32     d * q + m
 *     Q8_0    | d f16 | qs[32] int8 |                  34, 32     d * q
 *     IQ4_NL  | d f16 | qs[16] |                       18, 32     d * iq4_level[q]
 *     IQ4_XS  | d f16 | sh u16 | sl[4] | qs[8][16] |  136, 256    d * (scale - 32) * iq4_level[q]
 *             scale: nibble g % 2 of sl[g / 2] below bits 2g, 2g + 1 of sh
 *     Q2_K    | scales[16] | qs[64] | d f16 | dmin f16 |   84, 256    d * scale * q - dmin * min
 *             scales[2g + h]: low nibble scale, high nibble min
 *             qs: bytes 0-31 hold groups 0-3, bytes 32-63 groups 4-7, two bits each, lowest first
 *     Q3_K    | third[32] | qs[64] | scales[12] | d f16 |  110, 256   d * (scale - 32) * (q - 4)
 *             qs as in Q2_K; bit g of third[j] is the third bit of element j
 *             scale i = 2g + h: nibble i / 8 of byte i % 8 below bits 2(i / 4) of byte 8 + i % 4
 *     Q4_K    | d f16 | dmin f16 | scales[12] | qs[128] |  144, 256   d * scale * q - dmin * min
 *             32 bytes of qs hold two groups, the even one in the low nibbles
 *             scales: byte 0-3: scale 0-3 in bits 0-5; bits 6-7: the top of scale 4-7
 *                     byte 4-7: min 0-3 likewise; bits 6-7: the top of min 4-7
 *                     byte 8-11: low nibble scale 4-7, high nibble min 4-7
 *     Q5_K    | d f16 | dmin f16 | scales[12] | fifth[32] | qs[128] |   176, 256    as Q4_K
 *             bit g of fifth[j] is the fifth bit of element j
 *     Q6_K    | ql[128] | qh[64] | scales[16] int8 | d f16 |   210, 256   d * scale * (q - 32)
 *             each half of 128 elements has 64 bytes of ql, 32 of qh and 4 groups k: low four bits in
 *             nibble k / 2 of ql[32(k % 2) + j], high two in bits 2k of qh[j]; scales[2g + h] */
static const int8_t iq4_level[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

/* Where the 16 codes of half h of group g are: byte j of `low` shifted right, masked, and what byte j of
 * `top` has, shifted left by up. A mask of 0: there is no top. */
struct code_bits { int low, shift, mask, top, top_shift, top_mask, up; };

INLINE struct code_bits find_codes(int type, int g, int h)
{
    int k = g % 4, nibble = 4 * h, j = 16 * h;
    switch (type) {
    case Q4_1: return (struct code_bits){4, nibble, 15, 0, 0, 0, 0};
    case Q5_0: return (struct code_bits){6, nibble, 15, 0, 0, 0, 0}; /* and fifth_bits */
    case Q5_1: return (struct code_bits){8, nibble, 15, 0, 0, 0, 0}; /* likewise */
    case Q8_0: return (struct code_bits){2 + j, 0, 255, 0, 0, 0, 0};
    case IQ4_XS: return (struct code_bits){8 + 16 * g, nibble, 15, 0, 0, 0, 0};
    case Q2_K: return (struct code_bits){16 + 32 * (g / 4) + j, 2 * k, 3, 0, 0, 0, 0};
    case Q3_K: return (struct code_bits){32 + 32 * (g / 4) + j, 2 * k, 3, j, g, 1, 2};
    case Q4_K: return (struct code_bits){16 + 32 * (g / 2) + j, 4 * (g % 2), 15, 0, 0, 0, 0};
    case Q5_K: return (struct code_bits){48 + 32 * (g / 2) + j, 4 * (g % 2), 15, 16 + j, g, 1, 4};
    case Q6_K: return (struct code_bits){64 * (g / 4) + 32 * (k % 2) + j, 4 * (k / 2), 15,
                                         128 + 32 * (g / 4) + j, 2 * k, 3, 4};
    default: return (struct code_bits){2, nibble, 15, 0, 0, 0, 0}; /* Q4_0, IQ4_NL */
    }
}

/* Byte offset of Q5_0's and Q5_1's fifth; other formats have none, and 0 */
INLINE int fifth_bits(int type) { return type == Q5_0 ? 2 : type == Q5_1 ? 4 : 0; }

struct format {
    int type;
    const char *name;
    int elements, bytes;              /* of a block */
    int bias;                         /* what q is too large by */
    int d, m;                         /* where in a block they stand; m 0: there is no minimum */
    int has_halves;                   /* scales, and minima, that differ between the halves */
    int is_wide;                      /* codes use all 8 bits and are signed; others are 0 .. 63 */
    struct { int at, bytes, unit; } field[3]; /* how a tile interleaves a block's bytes */
};

static const struct format formats[] = {
    /* type, name, elements, bytes, bias, d, m, halves, wide, fields {at, bytes, unit} */
    {F32, "F32", 1, 4, 0, 0, 0, 0, 0, {{0}}},
    {F16, "F16", 1, 2, 0, 0, 0, 0, 0, {{0}}},
    {BF16, "BF16", 1, 2, 0, 0, 0, 0, 0, {{0}}},
    {Q4_0, "Q4_0", 32, 18, 8, 0, 0, 0, 0, {{0, 2, 2}, {2, 16, 4}}},
    {Q4_1, "Q4_1", 32, 20, 0, 0, 2, 0, 0, {{0, 4, 2}, {4, 16, 4}}},
    {Q5_0, "Q5_0", 32, 22, 16, 0, 0, 0, 0, {{0, 2, 2}, {2, 20, 4}}},
    {Q5_1, "Q5_1", 32, 24, 0, 0, 2, 0, 0, {{0, 4, 2}, {4, 20, 4}}},
    {Q8_0, "Q8_0", 32, 34, 0, 0, 0, 0, 1, {{0, 2, 2}, {2, 32, 4}}},
    {Q2_K, "Q2_K", 256, 84, 0, 80, 82, 1, 0, {{0, 16, 1}, {16, 64, 4}, {80, 4, 2}}},
    {Q3_K, "Q3_K", 256, 110, 4, 108, 0, 1, 0, {{0, 96, 4}, {96, 12, 1}, {108, 2, 2}}},
    {Q4_K, "Q4_K", 256, 144, 0, 0, 2, 0, 0, {{0, 4, 2}, {4, 12, 1}, {16, 128, 4}}},
    {Q5_K, "Q5_K", 256, 176, 0, 0, 2, 0, 0, {{0, 4, 2}, {4, 12, 1}, {16, 160, 4}}},
    {Q6_K, "Q6_K", 256, 210, 32, 208, 0, 1, 0, {{0, 192, 4}, {192, 16, 1}, {208, 2, 2}}},
    {IQ4_NL, "IQ4_NL", 32, 18, 0, 0, 0, 0, 1, {{0, 2, 2}, {2, 16, 4}}},
    {IQ4_XS, "IQ4_XS", 256, 136, 0, 0, 0, 0, 1, {{0, 4, 2}, {4, 4, 1}, {8, 128, 4}}},
};

enum { MAX_BLOCK_BYTES = 210, MAX_BYTES_OF_32 = 34 }; /* Q6_K; Q8_0 */

static const struct format *find_format(uint32_t type)
{
    for (size_t i = 0; i < sizeof formats / sizeof *formats; i++)
        if ((uint32_t)formats[i].type == type) return &formats[i];
    return NULL;
}

static int is_float(const struct format *f) { return f->elements == 1; }

/* 32 elements of one row: element j is d * scale[j / 16] * code[j] + m * min[j / 16]. */
struct group {
    int8_t code[32];
    int scale[2], min[2];             /* 1 where the halves share one */
    float d, m;
};

INLINE void unpack_codes(const struct format *f, const uint8_t *p, int g, int8_t code[32])
{
    uint32_t fifth = fifth_bits(f->type) ? load_u32_le(p + fifth_bits(f->type)) : 0;
    for (int h = 0; h < 2; h++) {
        struct code_bits b = find_codes(f->type, g, h);
        for (int j = 0; j < 16; j++) {
            int q = (p[b.low + j] >> b.shift & b.mask) | (p[b.top + j] >> b.top_shift & b.top_mask) << b.up;
            q |= (int)(fifth >> (16 * h + j) & 1) << 4;
            code[16 * h + j] = (int8_t)(q - f->bias);
        }
    }
    if (f->type == IQ4_NL || f->type == IQ4_XS)
        for (int j = 0; j < 32; j++) code[j] = iq4_level[code[j]];
}

/* Products of d and a sub-scale of at most 8 bits are exact. */
INLINE void unpack_scales(const struct format *f, const uint8_t *p, int g, struct group *o)
{
    o->d = f16_to_f32(load_u16_le(p + f->d));
    o->m = f16_to_f32(load_u16_le(p + f->m));
    o->scale[0] = o->scale[1] = o->min[0] = o->min[1] = 1;
    if (f->type == IQ4_XS)
        o->d *= (float)(((p[4 + g / 2] >> 4 * (g % 2) & 15) | (load_u16_le(p + 2) >> 2 * g & 3) << 4) - 32);
    if (f->type == Q4_K || f->type == Q5_K) {
        int low = p[4 + g % 4], mid = p[8 + g % 4], high = p[12 + g % 4];
        o->d *= (float)(g < 4 ? low & 63 : (high & 15) | low >> 6 << 4);
        o->m *= -(float)(g < 4 ? mid & 63 : high >> 4 | mid >> 6 << 4);
    }
    if (f->type == Q2_K) o->m = -o->m;
    for (int h = 0, i = 2 * g; h < 2 && f->has_halves; h++, i++) {
        const uint8_t *s = p + 96;
        if (f->type == Q2_K) o->scale[h] = p[i] & 15, o->min[h] = p[i] >> 4;
        if (f->type == Q3_K) o->scale[h] = ((s[i % 8] >> 4 * (i / 8) & 15) | (s[8 + i % 4] >> 2 * (i / 4) & 3) << 4) - 32;
        if (f->type == Q6_K) o->scale[h] = (int8_t)p[192 + i];
    }
}

/* Group g of the block at p. */
INLINE void unpack(const struct format *f, const uint8_t *p, int g, struct group *o)
{
    unpack_codes(f, p, g, o->code);
    unpack_scales(f, p, g, o);
}

/* ---- Tiles ----
 *
 * For the vector kernels an integer matrix lies as tiles: 32 rows whose bytes are interleaved, so that
 * each 32-bit lane of a vector register holds 4 bytes of one row: a lane's sum is that row's, and none is
 * needed across lanes. What lies at byte `at` of a block lies at 32 * at in the tile: codes in units of
 * 4 bytes, scales in units of one number. A block of Q4_0 in a tile (d scale, q bytes of nibbles):
 *
 *     0                   64                                                 192            576
 *     | d0 | d1 | .. | d31 | row 0 q0-3 | row 1 q0-3 | .. | row 31 q0-3 | row 0 q4-7 | .. | */

/* n units of each row, side by side. */
INLINE void interleave(uint8_t *to, const uint8_t *from, size_t row_bytes, int n_rows, int n, int unit)
{
    for (int k = 0; k < n; k++)
        for (int r = 0; r < n_rows; r++)
            memcpy(to + (k * TILE_ROWS + r) * unit, from + r * row_bytes + k * unit, unit);
}

/* The same for all rows of a tile and units of 4 bytes, two rows and two units at a time: most of what
 * opening a model does. first and second are in memory's order, whatever the CPU's. */
INLINE void interleave_words(uint8_t *to, const uint8_t *from, size_t row_bytes, int n)
{
    int k = 0;
    for (; k + 2 <= n; k += 2)
        for (int r = 0; r < TILE_ROWS; r += 2) {
            uint64_t a, b, first, second;
            memcpy(&a, from + r * row_bytes + 4 * k, 8);
            memcpy(&b, from + (r + 1) * row_bytes + 4 * k, 8);
            first = BIG_ENDIAN_CPU ? a >> 32 << 32 | b >> 32 : (uint32_t)a | b << 32;
            second = BIG_ENDIAN_CPU ? a << 32 | (uint32_t)b : a >> 32 | b >> 32 << 32;
            memcpy(to + (k * TILE_ROWS + r) * 4, &first, 8);
            memcpy(to + ((k + 1) * TILE_ROWS + r) * 4, &second, 8);
        }
    interleave(to + k * TILE_ROWS * 4, from + 4 * k, row_bytes, TILE_ROWS, n - k, 4);
}

/* n_blocks blocks of n_rows rows as tiles; rows that are missing become zeros. */
static void make_tile(uint8_t *tile, const uint8_t *rows, size_t row_bytes, int n_rows, int n_blocks,
                      const struct format *f)
{
    if (n_rows < TILE_ROWS) memset(tile, 0, (size_t)n_blocks * TILE_ROWS * f->bytes);
    for (int b = 0; b < n_blocks; b++, tile += TILE_ROWS * f->bytes, rows += f->bytes)
        for (int k = 0; k < 3 && f->field[k].unit; k++) {
            int at = f->field[k].at, unit = f->field[k].unit, n = f->field[k].bytes / unit;
            uint8_t *to = tile + TILE_ROWS * at;
            /* the same thing thrice: with constants a memcpy is one instruction */
            if (unit == 4 && n_rows == TILE_ROWS) interleave_words(to, rows + at, row_bytes, n);
            else if (unit == 2) interleave(to, rows + at, row_bytes, n_rows, n, 2);
            else interleave(to, rows + at, row_bytes, n_rows, n, unit);
        }
}

/* ---- A tile times vectors ---- */

/* Our own floats, from now on in the order of a file's bytes. */
static void to_file_order(float *x, int n)
{
    for (int j = 0; BIG_ENDIAN_CPU && j < n; j++) store_u32_le((uint8_t *)&x[j], bits_of(x[j]));
}

/* Rows as floats: where they lie if they are floats, dequantised once for all tokens if not. */
static void mul_tile_floats(const struct matmul *job, const struct matrix *w, int row, int n_rows, int worker)
{
    const gemma3_state *s = job->s;
    struct product p = {.format = w->format, .rows = w->data + row * w->row_bytes, .row_bytes = w->row_bytes,
                        .n_rows = n_rows, .cols = w->cols, .n = job->n, .x = job->x, .x_stride = w->cols,
                        .acc = acc_of(s, worker)};
    if (!is_float(w->format)) {
        float *rows = s->row_floats + (size_t)worker * TILE_ROWS * 32 * job->blocks;
        s->m->kernels->dequantize(w, row, n_rows, rows);
        to_file_order(rows, n_rows * w->cols); /* mul_floats reads floats as files have them */
        p.format = find_format(F32);
        p.rows = (const uint8_t *)rows;
        p.row_bytes = 4 * (size_t)w->cols;
    }
    s->m->kernels->mul_floats(&p);
}

/* A panel: 32 columns of a tile, unpacked by the vector kernels that need it several times. */
enum { PREFETCH_FROM = 4, PREFETCH_AHEAD = 8192, PREFETCH_STREAM = 2048, UNPACK_FROM = 4 };
enum { COLS_AT_ONCE = 512, POSITIONS_AT_ONCE = 128 }; /* what stays in a cache of 32 KB */
enum { NIBBLES = 100, PANEL, PANEL_NIBBLES, PANEL_HALVES, PANEL_WIDE };
typedef uint32_t tile_row __attribute__((vector_size(TILE_ROWS))); /* a byte of every row */
enum { PANELS = 8 };                  /* unpacked at a time: 256 columns, one super-block */

struct panel {
    uint8_t code[32 * TILE_ROWS];     /* element 4q + k of row r at (q * TILE_ROWS + r) * 4 + k */
    float d[TILE_ROWS], m[TILE_ROWS], scale[2][TILE_ROWS], min[2][TILE_ROWS]; /* as struct group */
};

/* A worker's room for the weights that it is multiplying. */
struct unpacked {
    struct panel panel[PANELS];
    uint8_t tile[PANELS * TILE_ROWS * MAX_BYTES_OF_32]; /* of a matrix that was not repacked */
};

/* Int8 activations. A matrix that lies as in the file is made into tiles here, PANELS blocks of 32
 * columns at a time. */
static void mul_tile_codes(const struct matmul *job, const struct matrix *w, int row, int n_rows, int worker)
{
    const gemma3_state *s = job->s;
    struct unpacked *u = &s->unpacked[worker];
    struct product p = {.format = w->format, .rows = w->data + row * w->row_bytes, .row_bytes = w->row_bytes,
                        .n_rows = n_rows, .cols = w->cols, .n = job->n, .q8 = s->q8, .x_stride = job->blocks,
                        .acc = acc_of(s, worker), .scratch = u->panel};
    if (w->tiled || !s->m->kernels->tiles) {
        s->m->kernels->mul_codes(&p);
        return;
    }
    int n_blocks = w->cols / w->format->elements, at_once = 32 * PANELS / w->format->elements;
    const uint8_t *rows = p.rows;
    p.rows = u->tile;
    for (int b = 0; b < n_blocks; b += at_once) {
        int take = min_int(n_blocks - b, at_once);
        make_tile(u->tile, rows + (size_t)b * w->format->bytes, w->row_bytes, n_rows, take, w->format);
        p.cols = take * w->format->elements;
        p.q8 = s->q8 + (size_t)b * (w->format->elements / 32);
        s->m->kernels->mul_codes(&p);
    }
}

static void mul_tile(const struct matmul *job, const struct matrix *w, int row, int n_rows, int worker)
{
    if (job->s->m->exact || is_float(w->format)) mul_tile_floats(job, w, row, n_rows, worker);
    else mul_tile_codes(job, w, row, n_rows, worker);
}

enum { EXP_RUN = 64 };                /* logits that sum_exp takes together */

#endif /* !INSTANCE */

#if defined(INSTANCE)
/* ==== 9. The operations: definitions ============================================================
 *
 * From here to the end of section 10 the text is compiled once for plain C and once for each instruction
 * set: the file includes itself there, with INSTANCE set to the name that ends the names of all functions,
 * and LANES to the number of floats in a vector register, 1 in plain C. What stands in this section is the
 * definition of each operation. The pieces that go element by element are plain C in every instance: the
 * compiler makes vectors of their loops, and since every operation is one IEEE rounding, all give the
 * same bits. The three that take nearly all of the time, mul_codes, mul_floats and mix_values, are
 * written a second time, for vectors, in section 10. */

#define PASTE_(x, suffix) x##_##suffix
#define PASTE(x, suffix) PASTE_(x, suffix)
#define NAME(x) PASTE(x, INSTANCE)
#define PIECE(x) PASTE(x, PIECES)
#define fma_of NAME(fma_of)
#define exp_of NAME(exp_of)

#if !HAS_PIECES
INLINE float fma_of(float a, float b, float c)
{
    return LANES > 1 || HARD_FMA ? __builtin_fmaf(a, b, c) : soft_fmaf(a, b, c);
}

/* exp of a float, at most 0.92 ulp wrong: x = n ln2 + r, |r| <= ln2 / 2; Taylor's polynomial of
 * degree 7 in r; then n goes into the exponent. */
INLINE float exp_of(float x)
{
    float shifted = fma_of(x, 0x1.715476p+0f, ROUNDER);       /* 1/ln2 */
    float n = shifted - ROUNDER;
    float r = fma_of(n, -0x1.62e430p-1f, x);                  /* ln2, leading part */
    r = fma_of(n, 0x1.05c610p-29f, r);                        /* and the rest */
    float e = 1.0f / 5040;
    e = fma_of(e, r, 1.0f / 720);
    e = fma_of(e, r, 1.0f / 120);
    e = fma_of(e, r, 1.0f / 24);
    e = fma_of(e, r, 1.0f / 6);
    e = fma_of(e, r, 0.5f);
    e = fma_of(e, r, 1.0f);
    e = fma_of(e, r, 1.0f);
    e = float_of(bits_of(e) + (bits_of(shifted) << 23));      /* ROUNDER's own low 9 bits are 0 */
    e = x < -87.0f ? 0.0f : e;
    e = x > 88.7f ? float_of(0x7f800000) : e;
    return x != x ? x : e;
}

/* Rule 1. A block that holds NaN or infinity becomes d = NaN and codes 0, one that is nearly 0 becomes
 * all 0. */
static void NAME(quantize)(struct q8_block *out, const float *x, int n)
{
    for (; n > 0; n -= 32, x += 32, out++) {
        uint32_t amax_bits = 0; /* as integers, so that NaN is larger than everything */
        for (int j = 0; j < 32; j++) {
            uint32_t a = bits_of(x[j]) & 0x7fffffff;
            amax_bits = a > amax_bits ? a : amax_bits;
        }
        float amax = float_of(amax_bits), to_code = 127.0f / amax;
        out->d = amax / 127.0f;
        if (amax_bits >= 0x7f800000) out->d = float_of(0x7fc00000);
        if (amax_bits >= 0x7f800000 || amax < 0x1p-100f) to_code = 0;
        if (amax < 0x1p-100f) out->d = 0;
        int32_t code[32], sum[2] = {0, 0}, mask = to_code == 0 ? 0 : -1;
        for (int j = 0; j < 32; j++) code[j] = round_to_int(x[j] * to_code) & mask;
        for (int j = 0; j < 32; j++) out->code[j] = (int8_t)code[j];
        for (int j = 0; j < 16; j++) sum[0] += code[j], sum[1] += code[j + 16];
        out->sum[0] = sum[0];
        out->sum[1] = sum[1];
        out->minus_8_sums = -8 * (sum[0] + sum[1]);
        out->d_sum = (float)(sum[0] + sum[1]) * out->d;
    }
}

/* RMSNorm (arXiv 1910.07467). Gemma's formula has (1 + w): the converters to GGUF have already added
 * the 1. */
static void NAME(rmsnorm)(float *y, const float *x, const float *w, int n, float eps)
{
    float lane[16] = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lane[j] = fma_of(x[i + j], x[i + j], lane[j]);
    for (; i < n; i++) lane[i % 16] = fma_of(x[i], x[i], lane[i % 16]);
    float r = 1.0f / sqrt_of(join_lanes(lane) / (float)n + eps);
    for (i = 0; i < n; i++) y[i] = (x[i] * r) * w[i];
}

/* Rotary position embedding (arXiv 2104.09864). The pairs are (j, j + D/2), as in GPT-NeoX and
 * transformers, not neighbours (2j, 2j+1) as in the paper. */
static void NAME(rope)(float *v, const float *cosine, const float *sine, int head_dim)
{
    int half = head_dim / 2;
    for (int j = 0; j < half; j++) {
        float a = v[j], b = v[j + half], c = cosine[j], s = sine[j];
        v[j] = fma_of(a, c, -(b * s));
        v[j + half] = fma_of(b, c, a * s);
    }
}

/* With the tanh form of GELU: tanh(y) = 2 / (1 + exp(-2y)) - 1, so 0.5 x (1 + tanh(u)) =
 * x / (1 + exp(-2u)) with u = sqrt(2/pi) (x + 0.044715 x^3). */
static void NAME(gelu)(float *gate, const float *up, int n)
{
    const float c0 = float_of(0x3f4c422a), c1 = float_of(0x3d122279); /* sqrt(2/pi), 0.044715 c0 */
    for (int j = 0; j < n; j++) {
        float x = gate[j], u = x * fma_of(c1, x * x, c0);
        gate[j] = x / (1.0f + exp_of(-2.0f * u)) * up[j];
    }
}

/* Little-endian like a file's tensors, so that one kernel reads both. */
static void NAME(store)(uint8_t *restrict to, const float *restrict x, int n, int type)
{
    for (int j = 0; type == F16 && j < n; j++) store_u16_le(to + 2 * j, f32_to_f16(x[j]));
    for (int j = 0; type != F16 && j < n; j++) store_u32_le(to + 4 * j, bits_of(x[j]));
}

/* The lane is the absolute position's, so that it does not matter where the window begins. */
static float NAME(exp_scores)(float *s, int n, int first)
{
    float top[16], lane[16] = {0};
    for (int j = 0; j < 16; j++) top[j] = s[0];
    int k = 0;
    for (; k + 16 <= n; k += 16)
        for (int j = 0; j < 16; j++) top[j] = s[k + j] > top[j] ? s[k + j] : top[j];
    for (; k < n; k++) top[0] = s[k] > top[0] ? s[k] : top[0];
    float max = top[0];
    for (int j = 1; j < 16; j++) max = top[j] > max ? top[j] : max;
    for (k = 0; k < n; k++) s[k] = exp_of(s[k] - max);
    for (k = 0; k < n && (first + k) % 16; k++) lane[(first + k) % 16] += s[k];
    for (; k + 16 <= n; k += 16)
        for (int j = 0; j < 16; j++) lane[j] += s[k + j];
    for (int j = 0; k < n; k++, j++) lane[j] += s[k];
    return join_lanes(lane);
}

/* lane[j % 16] += exp_double(logits[j] - max) for a run of differences from -690 to 0, operation by
 * operation. n reaches the exponent through the low bits of n + 1.5 * 2^52. */
static void NAME(add_exp_run)(double *lane, const float *logits, double max)
{
    union { double d[EXP_RUN]; uint64_t u[EXP_RUN]; } n;
    double e[EXP_RUN];
    for (int j = 0; j < EXP_RUN; j++)
        n.d[j] = (logits[j] - max) * 0x1.71547652b82fep+0 + 0x1.8p52;
    for (int j = 0; j < EXP_RUN; j++) {
        double x = logits[j] - max, whole = n.d[j] - 0x1.8p52;
        double r = (x - whole * LN2_HIGH) - whole * LN2_LOW;
        e[j] = exp_taylor[13];
        UNROLL for (int k = 12; k >= 0; k--) e[j] = exp_taylor[k] + e[j] * r;
    }
    for (int j = 0; j < EXP_RUN; j++) n.u[j] = (n.u[j] + 1023) << 52;
    for (int i = 0; i < EXP_RUN; i += 16)
        for (int j = 0; j < 16; j++) lane[j] += e[i + j] * n.d[i + j];
}

/* Rule 9: the sum of exp(logits[j] - max) in double, in 16 lanes. Where a difference is not a number
 * or below -690, the definition itself runs. */
static double NAME(sum_exp)(const float *logits, int n, float max)
{
    double lane[16] = {0};
    int i = 0;
    for (int run, n_near; i < n; i += run) {
        run = min_int(n - i, EXP_RUN), n_near = 0;
        for (int j = 0; j < run; j++) n_near += logits[i + j] - max >= -690.0f;
        if (n_near == EXP_RUN)
            NAME(add_exp_run)(lane, logits + i, max);
        else
            for (int j = 0; j < run; j++)
                lane[j % 16] += exp_double((double)logits[i + j] - max);
    }
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    return lane[0];
}
#endif /* !HAS_PIECES */

#if LANES == 1
/* Rows as they lie in the file. The values of the `gguf` package, bit for bit: each is rounded at most
 * twice, as there. */
static void NAME(dequantize)(const struct matrix *w, int r, int n, float *out)
{
    const struct format *f = w->format;
    struct group o;
    for (const uint8_t *row = w->data + r * w->row_bytes; n > 0; n--, row += w->row_bytes) {
        for (int j = 0; is_float(f) && j < w->cols; j++) *out++ = load_float(f->type, row, j);
        for (int b = 0; !is_float(f) && b < w->cols / 32; b++, out += 32) {
            unpack(f, row + (size_t)(32 * b / f->elements) * f->bytes, b % (f->elements / 32), &o);
            for (int j = 0; j < 32; j++) out[j] = o.d * (float)o.scale[j / 16] * (float)o.code[j];
            for (int j = 0; f->m && j < 32; j++) out[j] += o.m * (float)o.min[j / 16];
        }
    }
}

/* Rows of integer formats, as they lie in the file (rule 2). */
static void NAME(mul_codes)(const struct product *p)
{
    const struct format *f = p->format;
    for (int r = 0; r < p->n_rows; r++)
        for (int b = 0; b < p->cols / 32; b++) {
            const uint8_t *block = p->rows + r * p->row_bytes + (size_t)(32 * b / f->elements) * f->bytes;
            struct group w;
            unpack(f, block, b % (f->elements / 32), &w);
            for (int i = 0; i < p->n; i++) {
                const struct q8_block *x = &p->q8[i * p->x_stride + b];
                int32_t half[2] = {0, 0};
                for (int j = 0; j < 32; j++) half[j / 16] += w.code[j] * x->code[j];
                int32_t isum = w.scale[0] * half[0] + w.scale[1] * half[1];
                int32_t msum = w.min[0] * x->sum[0] + w.min[1] * x->sum[1];
                float *acc = &p->acc[i][r];
                *acc = fma_of((float)isum, w.d * x->d, *acc);
                if (f->m) *acc = fma_of(w.m, (float)msum * x->d, *acc);
            }
        }
}

/* Rows of floats (rule 4): a register holds 16 columns of one row here, not 16 rows, because floats stay as
 * they are; that is why the contract's order has 16 lanes. */
static void NAME(mul_floats)(const struct product *p)
{
    for (int i = 0; i < p->n; i++)
        for (int r = 0; r < p->n_rows; r++) {
            const float *x = p->x + i * p->x_stride;
            float lane[16] = {0};
            for (int j = 0; j < p->cols; j++)
                lane[j % 16] = fma_of(load_float(p->format->type, p->rows + r * p->row_bytes, j), x[j], lane[j % 16]);
            p->acc[i][r] = join_lanes(lane);
        }
}

static void NAME(mix_values)(const struct mix *m)
{
    for (int i = 0; i < m->n; i++)
        for (int j = 0; j < m->width; j++) {
            float sum = m->out[i * m->out_stride + j];
            for (int p = 0; p < m->n_pos; p++)
                sum = fma_of(m->e[i * m->e_stride + p], load_float(m->type, m->v + p * m->v_bytes, j), sum);
            m->out[i * m->out_stride + j] = sum;
        }
}

#else
/* ==== 10. The operations: vector kernels ========================================================
 *
 * The verbs first: what an instruction set must be able to do. floats and ints hold LANES numbers of 32
 * bits; + - * & | ^ and shifts go lane by lane in GNU C, and a single number next to a vector counts for
 * every lane. */

#define floats NAME(floats)
#define ints NAME(ints)
#define dot_sum NAME(dot_sum)         /* the sum of products of bytes, on its way to int32 */
#define load_ints NAME(load_ints)
#define store_ints NAME(store_ints)
#define load_floats NAME(load_floats)
#define store_floats NAME(store_floats)
#define to_floats NAME(to_floats)
#define widen_u8 NAME(widen_u8)       /* LANES small integers from memory */
#define widen_u16 NAME(widen_u16)
#define widen_f16 NAME(widen_f16)
#define widen NAME(widen)             /* LANES of F32, F16 or BF16 from memory */
#define repeat_4 NAME(repeat_4)           /* 4 bytes in every lane */
#define splat NAME(splat)                 /* a float in every lane */
#define mul_add NAME(mul_add)         /* a * b + c rounded once */
#define join_4 NAME(join_4)           /* four times 16 lanes as rule 4's tree */
#define last_joins NAME(last_joins)
#define look_up NAME(look_up)         /* bytes 0 .. 15 -> iq4_level */
#define dot_begin NAME(dot_begin)     /* products of 4 bytes of w (unsigned) and of x are added to a */
#define dot_add NAME(dot_add)         /* lane: begin, which may start with a number, add, and end, */
#define dot_end NAME(dot_end)         /* which starts with it if begin did not */
#define dot_wide NAME(dot_wide)       /* the same at once for w signed */

#define INT16_SUMS (LANES < 16 && !HAS_DOT) /* dot_sum is int16: 8 quads of 4 bits fit, 4 of 5, 2 of 6 */
#define FLIPS (LANES > 4 && HAS_DOT)  /* the dot instruction wants w unsigned: wide codes get + 128 */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

#define four NAME(four)
typedef float four __attribute__((vector_size(16)));
#if defined(HAVE_X86)
INLINE four last_joins(four a, four b, four c, four d) /* lane j + lane j+2, + 1 */
{
    four ab = (four)_mm_movelh_ps((__m128)a, (__m128)b) + (four)_mm_movehl_ps((__m128)b, (__m128)a);
    four cd = (four)_mm_movelh_ps((__m128)c, (__m128)d) + (four)_mm_movehl_ps((__m128)d, (__m128)c);
    return (four)_mm_shuffle_ps((__m128)ab, (__m128)cd, 0x88) + (four)_mm_shuffle_ps((__m128)ab, (__m128)cd, 0xdd);
}
#else
INLINE four last_joins(four a, four b, four c, four d)
{
    four ab = vcombine_f32(vget_low_f32(a), vget_low_f32(b)) + vcombine_f32(vget_high_f32(a), vget_high_f32(b));
    four cd = vcombine_f32(vget_low_f32(c), vget_low_f32(d)) + vcombine_f32(vget_high_f32(c), vget_high_f32(d));
    return vpaddq_f32(ab, cd);
}
#endif

#if LANES == 8
/* AVX2: maddubs adds neighbouring products to int16, madd those to int32. With AVX-VNNI dpbusd does all
 * that at once. */
INLINE floats splat(float x) { return (floats)_mm256_set1_ps(x); }
INLINE floats mul_add(floats a, floats b, floats c) { return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
INLINE floats widen_f16(const void *p) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE ints widen_u16(const void *p) { return (ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(p)); }
INLINE ints widen_u8(const void *p) { return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
INLINE ints look_up(ints c)
{
    __m256i level = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)iq4_level));
    return (ints)_mm256_shuffle_epi8(level, (__m256i)c);
}
typedef ints dot_sum;
#if HAS_DOT
INLINE dot_sum dot_begin(int32_t start) { return (ints){0} + start; }
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
INLINE ints dot_wide(ints sum, ints w, ints x) { return dot_add(sum, w, x); } /* w comes as code + 128 */
INLINE ints dot_end(dot_sum sum, int32_t start) { (void)start; return sum; }
#else
INLINE dot_sum dot_begin(int32_t start) { (void)start; return (ints){0}; }
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    return (ints)_mm256_add_epi16((__m256i)sum, _mm256_maddubs_epi16((__m256i)w, (__m256i)x));
}
INLINE ints dot_end(dot_sum sum, int32_t start)
{
    return (ints)_mm256_madd_epi16((__m256i)sum, _mm256_set1_epi16(1)) + start;
}
INLINE ints dot_wide(ints sum, ints w, ints x) /* |w| * (x with w's sign): 2 * 128 * 127 fits */
{
    __m256i signed_x = _mm256_sign_epi8((__m256i)x, (__m256i)w);
    __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8((__m256i)w), signed_x);
    return sum + (ints)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}
#endif

#elif LANES == 16
/* AVX-512 with VNNI */
INLINE floats splat(float x) { return (floats)_mm512_set1_ps(x); }
INLINE floats mul_add(floats a, floats b, floats c) { return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
INLINE floats widen_f16(const void *p) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE ints widen_u16(const void *p) { return (ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE ints widen_u8(const void *p) { return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
INLINE ints look_up(ints c)
{
    __m512i level = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)iq4_level));
    return (ints)_mm512_shuffle_epi8(level, (__m512i)c);
}
typedef ints dot_sum;
INLINE dot_sum dot_begin(int32_t start) { return (ints){0} + start; }
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
INLINE ints dot_wide(ints sum, ints w, ints x) { return dot_add(sum, w, x); } /* w comes as code + 128 */
INLINE ints dot_end(dot_sum sum, int32_t start) { (void)start; return sum; }

#else
/* NEON. vmull makes int16 products; with dotprod vdot does all at once. */
INLINE floats splat(float x) { return vdupq_n_f32(x); }
INLINE floats mul_add(floats a, floats b, floats c) { return vfmaq_f32(c, a, b); }
INLINE floats widen_f16(const void *p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
INLINE ints widen_u16(const void *p) { return vreinterpretq_s32_u32(vmovl_u16(vld1_u16(p))); }
INLINE ints widen_u8(const void *p)
{
    uint8x8_t four = vreinterpret_u8_u32(vld1_dup_u32(p));
    return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(four))));
}
INLINE ints look_up(ints c)
{
    return vreinterpretq_s32_s8(vqtbl1q_s8(vld1q_s8(iq4_level), vreinterpretq_u8_s32(c)));
}
#if HAS_DOT
typedef ints dot_sum;
INLINE dot_sum dot_begin(int32_t start) { return (ints){0} + start; }
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
INLINE ints dot_end(dot_sum sum, int32_t start) { (void)start; return sum; }
#else
typedef struct { int16x8_t low, high; } dot_sum;
INLINE dot_sum dot_begin(int32_t start) { (void)start; return (dot_sum){vdupq_n_s16(0), vdupq_n_s16(0)}; }
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
    return (dot_sum){vmlal_s8(sum.low, vget_low_s8(a), vget_low_s8(b)), vmlal_high_s8(sum.high, a, b)};
}
INLINE ints dot_end(dot_sum sum, int32_t start)
{
    return vpaddlq_s16(vpaddq_s16(sum.low, sum.high)) + start;
}
#endif
INLINE ints dot_wide(ints sum, ints w, ints x) { return sum + dot_end(dot_add(dot_begin(0), w, x), 0); }
#endif

/* The same in every instruction set. */
INLINE ints load_ints(const void *p) { ints v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_ints(void *p, ints v) { memcpy(p, &v, sizeof v); }
INLINE floats load_floats(const void *p) { floats v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_floats(void *p, floats v) { memcpy(p, &v, sizeof v); }
INLINE void join_4(float out[4], const float *a, const float *b, const float *c, const float *d)
{
    const float *lane[4] = {a, b, c, d};
    four sum[4], part[4];
    UNROLL for (int s = 0; s < 4; s++) {
        UNROLL for (int k = 0; k < 4; k++) memcpy(&part[k], lane[s] + 4 * k, sizeof part[k]);
        sum[s] = (part[0] + part[2]) + (part[1] + part[3]);            /* lane j + lane j+8, + 4 */
    }
    sum[0] = last_joins(sum[0], sum[1], sum[2], sum[3]);
    memcpy(out, &sum[0], sizeof sum[0]);
}
INLINE floats to_floats(ints v) { return __builtin_convertvector(v, floats); }
INLINE ints repeat_4(const int8_t *p)
{
    int32_t x;
    memcpy(&x, p, 4);
    return (ints){0} + x;
}
INLINE floats widen(int type, const uint8_t *p)
{
    return type == F16 ? widen_f16(p) : type == F32 ? load_floats(p) : (floats)(widen_u16(p) << 16);
}

/* ---- Integer formats ---- */

/* Asks for memory before it is needed, a little with each block, because a burst stalls. PREFETCH_FROM: with
 * that many vectors a Q4_0 tile is multiplied again and again, and meanwhile the next tile comes; left to
 * itself the machine notices too late where a tile ends (prompt x1.2). One vector is a stream that needs
 * no help. PREFETCH_AHEAD: bytes ahead of other formats, which are unpacked field by field, as no machine
 * foresees (Q6_K 9 -> 27 GB/s on one core, Q4_K 7 -> 21). PREFETCH_STREAM: bytes ahead in attention's
 * values. */
#define prefetch NAME(prefetch)
INLINE void prefetch(const uint8_t *p, size_t n_bytes)
{
    for (size_t at = 0; at < n_bytes; at += 64) __builtin_prefetch(p + at);
}

/* Codes 4q .. 4q+3 of the half that b finds, for LANES rows from row r on. */
#define codes_of NAME(codes_of)
INLINE ints codes_of(int type, struct code_bits b, const uint8_t *tile, int q, int r)
{
    const uint8_t *p = tile + 4 * r + TILE_ROWS * 4 * (q % 4);
    ints w = load_ints(p + TILE_ROWS * b.low) >> b.shift & (int32_t)(b.mask * 0x01010101u);
    if (b.top_mask) w |= (load_ints(p + TILE_ROWS * b.top) >> b.top_shift & (int32_t)(b.top_mask * 0x01010101u)) << b.up;
    if (fifth_bits(type)) { /* the product copies bit k of four to the lowest bit of byte k */
        ints four = load_ints(tile + TILE_ROWS * fifth_bits(type) + 4 * r) >> 4 * q & 15;
        w |= (four * 0x00204081 & 0x01010101) << 4;
    }
    if (type == IQ4_NL || type == IQ4_XS) w = look_up(w);
    if (FLIPS && (type == Q8_0 || type == IQ4_NL || type == IQ4_XS)) w ^= (int32_t)0x80808080;
    return w;
}

/* What unpack_scales does, for all rows of a tile. */
static void NAME(unpack_scales)(const struct format *f, const uint8_t *tile, int g, struct panel *o)
{
    tile_row a, b, c, scale[2], min[2] = {{0}, {0}};
    if (f->type == Q4_K || f->type == Q5_K) {
        const uint8_t *k = tile + TILE_ROWS * (4 + g % 4);
        memcpy(&a, k, sizeof a), memcpy(&b, k + TILE_ROWS * 4, sizeof b), memcpy(&c, k + TILE_ROWS * 8, sizeof c);
        scale[0] = g < 4 ? a & 0x3f3f3f3f : (c & 0x0f0f0f0f) | (a >> 2 & 0x30303030);
        min[0] = g < 4 ? b & 0x3f3f3f3f : (c >> 4 & 0x0f0f0f0f) | (b >> 2 & 0x30303030);
    } else if (f->type == IQ4_XS) {
        uint16_t top __attribute__((vector_size(2 * TILE_ROWS)));
        memcpy(&a, tile + TILE_ROWS * (4 + g / 2), sizeof a), memcpy(&top, tile + TILE_ROWS * 2, sizeof top);
        uint8_t low __attribute__((vector_size(TILE_ROWS))) = __builtin_convertvector(top >> 2 * g & 3, uint8_t __attribute__((vector_size(TILE_ROWS))));
        memcpy(&b, &low, sizeof b);
        scale[0] = (a >> 4 * (g % 2) & 0x0f0f0f0f) | b << 4;
    }
    for (int h = 0, i = 2 * g; h < 2 && f->has_halves; h++, i++) {
        memcpy(&a, tile + TILE_ROWS * (f->type == Q6_K ? 192 + i : f->type == Q3_K ? 96 + i % 8 : i), sizeof a);
        memcpy(&b, tile + TILE_ROWS * (f->type == Q3_K ? 104 + i % 4 : 0), sizeof b);
        scale[h] = f->type == Q6_K ? a ^ 0x80808080 :
                   f->type == Q3_K ? (a >> 4 * (i / 8) & 0x0f0f0f0f) | (b >> 2 * (i / 4) & 0x03030303) << 4 : a & 0x0f0f0f0f;
        min[h] = a >> 4 & 0x0f0f0f0f;
    }
    const int bias = f->type == Q6_K ? 128 : f->type == Q3_K || f->type == IQ4_XS ? 32 : 0;
    const int k_scales = f->elements == 256 && !f->has_halves;
    for (int r = 0; r < TILE_ROWS; r += LANES) {
        floats d = widen_f16(tile + TILE_ROWS * f->d + 2 * r), m = widen_f16(tile + TILE_ROWS * f->m + 2 * r);
        if (k_scales) {
            d *= to_floats(widen_u8((const uint8_t *)scale + r) - bias);
            m *= to_floats(widen_u8((const uint8_t *)min + r));
        }
        store_floats(o->d + r, d);
        store_floats(o->m + r, f->elements == 256 ? -m : m);
        for (int h = 0; h < 2 && f->has_halves; h++) {
            store_floats(o->scale[h] + r, to_floats(widen_u8((const uint8_t *)(scale + h) + r) - bias));
            store_floats(o->min[h] + r, to_floats(widen_u8((const uint8_t *)(min + h) + r)));
        }
    }
}

static void NAME(unpack_panel)(const struct format *f, const uint8_t *tile, int g, struct panel *o)
{
    NAME(unpack_scales)(f, tile, g, o);
    for (int q = 0; q < 8; q++) {
        struct code_bits b = find_codes(f->type, g, q / 4);
        for (int r = 0; r < TILE_ROWS; r += LANES)
            store_ints(o->code + 4 * (TILE_ROWS * q + r), codes_of(f->type, b, tile, q, r));
    }
}

/* acc of NT vectors from vector i0 on and NH registers of rows from row r0 on. NT and NH are constants in
 * each call, so that INLINE makes a copy of the code in which sums stay in registers. */
#define mul_part NAME(mul_part)
INLINE void mul_part(const struct product *p, int kind, int i0, int NT, int r0, int NH)
{
    const struct format *f = p->format;
    const int halves = kind == Q6_K || kind == PANEL_HALVES, wide = (kind == Q8_0 && !FLIPS) || kind == PANEL_WIDE;
    const int nibbles = kind == NIBBLES, small = kind == Q4_K || kind == PANEL_NIBBLES || !INT16_SUMS;
    const int quads = nibbles ? 4 : halves ? (INT16_SUMS ? 2 : 4) : small && !wide ? 8 : 4;
    const int bias = FLIPS && f->is_wide ? 128 : f->bias, groups = kind <= NIBBLES ? f->elements / 32 : 1;
    const size_t block_bytes = kind <= NIBBLES ? (size_t)TILE_ROWS * f->bytes : sizeof(struct panel);
    const int ahead = nibbles && i0 == 0 && r0 == 0 && p->n >= PREFETCH_FROM;
    const uint8_t *from = p->rows;
    floats sum[8][8];
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int h = 0; h < NH; h++) sum[i][h] = load_floats(p->acc[i0 + i] + r0 + LANES * h);
    for (int b = 0, g = 0; b < p->cols / 32; b++) {
        const struct q8_block *x = p->q8 + i0 * p->x_stride + b;
        const struct panel *panel = kind <= NIBBLES ? p->scratch : (const struct panel *)from;
        floats isum[8][8];
        ints total[8][8];
        if (ahead) prefetch(from + (size_t)p->cols / 32 * block_bytes, block_bytes);
        if (kind < NIBBLES) {
            prefetch(from + PREFETCH_AHEAD + g * (block_bytes / groups), block_bytes / groups);
            NAME(unpack_scales)(f, from, g, p->scratch);
        }
        UNROLL for (int i = 0; i < NT; i++)
            UNROLL for (int h = 0; h < NH; h++) total[i][h] = (ints){0}, isum[i][h] = splat(0);
        for (int q0 = 0; q0 < (nibbles ? 4 : 8); q0 += quads) {
            dot_sum part[8][8];
            int32_t start[8];
            UNROLL for (int i = 0; i < NT; i++) {
                const struct q8_block *xi = x + i * p->x_stride;
                start[i] = nibbles ? xi->minus_8_sums : q0 % 4 ? 0 : -bias * (quads == 8 ? xi->sum[0] + xi->sum[1] : xi->sum[q0 / 4]);
                UNROLL for (int h = 0; h < NH; h++) part[i][h] = dot_begin(start[i]);
            }
            UNROLL for (int q = q0; q < q0 + quads; q++)
                UNROLL for (int high = 0; high <= nibbles; high++) {
                    ints w[8];
                    UNROLL for (int h = 0; h < NH; h++) {
                        const int r = r0 + LANES * h, at = 4 * (TILE_ROWS * q + r);
                        if (nibbles) w[h] = load_ints(from + TILE_ROWS * 2 + at) >> 4 * high & 0x0f0f0f0f;
                        else w[h] = kind < NIBBLES ? codes_of(kind, find_codes(kind, g, q / 4), from, q, r) : load_ints(panel->code + at);
                    }
                    UNROLL for (int i = 0; i < NT; i++) {
                        ints c = repeat_4(x[i * p->x_stride].code + 4 * q + 16 * high);
                        UNROLL for (int h = 0; h < NH; h++)
                            if (wide) total[i][h] = dot_wide(total[i][h], w[h], c);
                            else part[i][h] = dot_add(part[i][h], w[h], c);
                    }
                }
            UNROLL for (int i = 0; i < NT && !wide; i++)
                UNROLL for (int h = 0; h < NH; h++) total[i][h] += dot_end(part[i][h], start[i]);
            if (halves && (q0 + quads) % 4 == 0)
                UNROLL for (int h = 0; h < NH; h++)
                    UNROLL for (int i = 0; i < NT; i++) {
                        floats scale = load_floats(panel->scale[q0 / 4] + r0 + LANES * h);
                        isum[i][h] = mul_add(scale, to_floats(total[i][h]), isum[i][h]);
                        total[i][h] = (ints){0};
                    }
        }
        UNROLL for (int h = 0; h < NH; h++) {
            int r = r0 + LANES * h;
            floats d = nibbles ? widen_f16(from + 2 * r) : load_floats(panel->d + r);
            UNROLL for (int i = 0; i < NT; i++) {
                const struct q8_block *xi = x + i * p->x_stride;
                if (!halves) isum[i][h] = to_floats(total[i][h]);
                sum[i][h] = mul_add(isum[i][h], d * splat(xi->d), sum[i][h]);
                if (kind < PANEL ? kind != Q4_K && kind != Q5_K : !f->m) continue;
                floats msum = splat(xi->d_sum);
                if (halves)
                    msum = splat(xi->d) * mul_add(splat((float)xi->sum[1]), load_floats(panel->min[1] + r),
                                                  splat((float)xi->sum[0]) * load_floats(panel->min[0] + r));
                sum[i][h] = mul_add(load_floats(panel->m + r), msum, sum[i][h]);
            }
        }
        if (++g == groups) g = 0, from += block_bytes;
    }
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int h = 0; h < NH; h++) store_floats(p->acc[i0 + i] + r0 + LANES * h, sum[i][h]);
}

#define mul_all NAME(mul_all)
INLINE void mul_all(const struct product *p, int kind)
{
    const int NT = 4, NH = INT16_SUMS && (kind == PANEL_HALVES || kind == PANEL) ? 1 : 2, ALONE = TILE_ROWS / LANES;
    int i = 0;
    for (; kind >= NIBBLES && i + NT <= p->n; i += NT)
        for (int r = 0; r < TILE_ROWS; r += NH * LANES) mul_part(p, kind, i, NT, r, NH);
    for (; i < p->n; i++)
        for (int r = 0; r < TILE_ROWS; r += ALONE * LANES) mul_part(p, kind, i, 1, r, ALONE);
}

#if !HAS_PIECES
/* Rows r0 .. r0+n-1 of a panel as float32, cols apart: first their codes side by side. */
static void NAME(dequantize_panel)(const struct panel *o, const struct format *f, int r0, int n, float *out, int cols)
{
    const int bias = f->is_wide ? 128 : f->bias;
    uint8_t code[TILE_ROWS][32];
    for (int i = 0; i < n; i++)
        for (int q = 0; q < 8; q++) memcpy(code[i] + 4 * q, o->code + 4 * (TILE_ROWS * q + r0 + i), 4);
    for (int i = 0; i < n; i++, out += cols)
        UNROLL for (int j = 0; j < 32; j += LANES) {
            int h = j / 16, r = r0 + i;
            ints c = widen_u8(code[i] + j);
            if (f->is_wide && !FLIPS) c ^= 128;
            floats x = splat(o->d[r] * (f->has_halves ? o->scale[h][r] : 1)) * to_floats(c - bias);
            if (f->m) x += splat(o->m[r] * (f->has_halves ? o->min[h][r] : 1));
            store_floats(out + j, x);
        }
}

static void NAME(dequantize)(const struct matrix *w, int r, int n, float *out)
{
    const struct format *f = w->format;
    const int groups = f->elements / 32;
    const uint8_t *tile = w->data + r / TILE_ROWS * TILE_ROWS * w->row_bytes;
    struct panel o;
    if (!w->tiled) dequantize_scalar(w, r, n, out);
    for (int b = 0; w->tiled && b < w->cols / 32; b++) {
        NAME(unpack_panel)(f, tile + (size_t)(b / groups) * TILE_ROWS * f->bytes, b % groups, &o);
        NAME(dequantize_panel)(&o, f, r % TILE_ROWS, n, out + 32 * b, w->cols);
    }
}
#endif /* !HAS_PIECES */

static void NAME(mul_codes)(const struct product *p)
{
    const struct format *f = p->format;
    const int wide = f->is_wide && !FLIPS;
    int blocks = p->cols / 32, groups = f->elements / 32;
    size_t block_bytes = (size_t)TILE_ROWS * f->bytes;
    struct product some = *p;
    if (f->type == Q4_0) mul_all(p, NIBBLES);
    else if (p->n < UNPACK_FROM && f->type == Q8_0) mul_all(p, Q8_0);
    else if (p->n < UNPACK_FROM && f->type == Q4_K) mul_all(p, Q4_K);
    else if (p->n < UNPACK_FROM && f->type == Q5_K) mul_all(p, Q5_K);
    else if (p->n < UNPACK_FROM && f->type == Q6_K) mul_all(p, Q6_K);
    else if (p->n < UNPACK_FROM && f->type == Q5_0) mul_all(p, Q5_0);
    else
        for (int b = 0; b < blocks; b += PANELS) {
            some.cols = 32 * min_int(blocks - b, PANELS);
            some.q8 = p->q8 + b;
            some.rows = (const uint8_t *)p->scratch;
            for (int a = 0; a < some.cols / 32; a++) {
                const uint8_t *block = p->rows + (size_t)((b + a) / groups) * block_bytes;
                prefetch(block + PREFETCH_AHEAD + a % groups * (block_bytes / groups), block_bytes / groups);
                NAME(unpack_panel)(f, block, (b + a) % groups, p->scratch + a);
            }
            if (wide) mul_all(&some, PANEL_WIDE);
            else if (f->has_halves) mul_all(&some, PANEL_HALVES);
            else if (INT16_SUMS && (f->type == Q4_K || f->type == Q4_1)) mul_all(&some, PANEL_NIBBLES);
            else mul_all(&some, PANEL);
        }
}

#if !HAS_PIECES
/* ---- Floats ---- */

/* Rows r0 .. r0+NR-1 times vectors i0 .. i0+NV-1: NR * NV sums of 16 lanes are more than registers can
 * hold, but lanes are independent. So a pass over the columns takes one register of each 16 lanes, and
 * with 8 lanes and 4 x 3 sums it loads 7 registers for 12 multiplications (2 x 2 sums in one pass: 8 for
 * 8). One row times one vector is a stream, and takes all lanes in one pass. */
#define mul_floats_part NAME(mul_floats_part)
INLINE void mul_floats_part(const struct product *p, int type, int r0, int i0, int NR, int NV)
{
    enum { PARTS = 16 / LANES };
    const int NP = NR == 1 ? PARTS : 1, size = type == F32 ? 4 : 2, whole = p->cols & ~15;
    const uint8_t *rows = p->rows + r0 * p->row_bytes;
    const float *x = p->x + i0 * p->x_stride;
    float lane[4][4][16];
    if (whole == 0) memset(lane, 0, sizeof lane);
    for (int j0 = 0, end; j0 < whole; j0 = end) {
        end = NP == PARTS ? whole : min_int(j0 + COLS_AT_ONCE, whole);
        for (int l = 0; l < 16; l += NP * LANES) {
            floats sum[4][4][PARTS];
            UNROLL for (int i = 0; i < NV; i++)
                UNROLL for (int r = 0; r < NR; r++)
                    UNROLL for (int k = 0; k < NP; k++)
                        sum[i][r][k] = j0 ? load_floats(lane[i][r] + l + LANES * k) : splat(0);
            for (int j = j0 + l; j < end; j += 16)
                UNROLL for (int k = 0; k < NP; k++) {
                    floats xj[4];
                    UNROLL for (int i = 0; i < NV; i++) xj[i] = load_floats(x + i * p->x_stride + j + LANES * k);
                    UNROLL for (int r = 0; r < NR; r++) {
                        floats w = widen(type, rows + r * p->row_bytes + size * (size_t)(j + LANES * k));
                        UNROLL for (int i = 0; i < NV; i++) sum[i][r][k] = mul_add(w, xj[i], sum[i][r][k]);
                    }
                }
            UNROLL for (int i = 0; i < NV; i++)
                UNROLL for (int r = 0; r < NR; r++)
                    UNROLL for (int k = 0; k < NP; k++)
                        store_floats(lane[i][r] + l + LANES * k, sum[i][r][k]);
        }
    }
    UNROLL for (int i = 0; i < NV; i++) {
        for (int j = whole; j < p->cols; j++)
            for (int r = 0; r < NR; r++)
                lane[i][r][j % 16] = fma_of(load_float(type, rows + r * p->row_bytes, j),
                                            x[i * p->x_stride + j], lane[i][r][j % 16]);
        float joined[4];
        join_4(joined, lane[i][0], lane[i][NR > 1], lane[i][NR > 2 ? 2 : 0], lane[i][NR > 3 ? 3 : 0]);
        memcpy(p->acc[i0 + i] + r0, joined, NR * sizeof(float));
    }
}

#define mul_floats_of NAME(mul_floats_of)
INLINE void mul_floats_of(const struct product *p, int type)
{
    enum { NV = LANES == 8 ? 3 : 4 }; /* sums that fit 16 registers, or 32 */
    int r = 0, i;
    for (; r + 4 <= p->n_rows && p->n > 1; r += 4) {
        for (i = 0; p->n - i >= NV && p->n - i != NV + 1; i += NV) mul_floats_part(p, type, r, i, 4, NV);
        for (; p->n - i >= 2; i += 2) mul_floats_part(p, type, r, i, 4, 2);
        for (int k = 0; k < 4 && i < p->n; k++) mul_floats_part(p, type, r + k, i, 1, 1);
    }
    for (; r < p->n_rows; r++)
        for (i = 0; i < p->n; i++) mul_floats_part(p, type, r, i, 1, 1);
}

static void NAME(mul_floats)(const struct product *p)
{
    switch (p->format->type) { /* the type becomes a constant of the loop */
    case F32: mul_floats_of(p, F32); break;
    case F16: mul_floats_of(p, F16); break;
    default: mul_floats_of(p, BF16);
    }
}

/* Positions p0 .. end-1 for NQ queries from q0 on, NP registers of the slice at a time. */
#define mix_part NAME(mix_part)
INLINE void mix_part(const struct mix *m, int type, int p0, int end, int q0, int NQ)
{
    enum { PARTS = MIX_WIDTH / LANES };
    const int NP = min_int(PARTS, NQ > 4 ? 2 : 4), size = type == F32 ? 4 : 2;
    const float *e = m->e + q0 * m->e_stride;
    for (int j = 0; j < MIX_WIDTH; j += NP * LANES) {
        floats sum[8][4], v[4];
        float *out = m->out + q0 * m->out_stride + j;
        UNROLL for (int q = 0; q < NQ; q++)
            UNROLL for (int k = 0; k < NP; k++) sum[q][k] = load_floats(out + q * m->out_stride + LANES * k);
        for (int p = p0; p < end; p++) {
            const uint8_t *from = m->v + p * m->v_bytes + size * j;
            __builtin_prefetch(from + PREFETCH_STREAM);
            UNROLL for (int k = 0; k < NP; k++) v[k] = widen(type, from + size * LANES * k);
            UNROLL for (int q = 0; q < NQ; q++) {
                floats ep = splat(e[q * m->e_stride + p]);
                UNROLL for (int k = 0; k < NP; k++) sum[q][k] = mul_add(ep, v[k], sum[q][k]);
            }
        }
        UNROLL for (int q = 0; q < NQ; q++)
            UNROLL for (int k = 0; k < NP; k++) store_floats(out + q * m->out_stride + LANES * k, sum[q][k]);
    }
}

#define mix_of NAME(mix_of)
INLINE void mix_of(const struct mix *m, int type)
{
    enum { MANY = LANES == 8 ? 6 : 8, FEW = LANES == 8 ? 2 : 4 };
    for (int p = 0, end; p < m->n_pos; p = end) {
        int q = 0;
        end = min_int(m->n_pos, p + POSITIONS_AT_ONCE);
        for (; q + MANY <= m->n; q += MANY) mix_part(m, type, p, end, q, MANY);
        for (; q + FEW <= m->n; q += FEW) mix_part(m, type, p, end, q, FEW);
        for (; q < m->n; q++) mix_part(m, type, p, end, q, 1);
    }
}

static void NAME(mix_values)(const struct mix *m)
{
    if (m->width < MIX_WIDTH) mix_values_scalar(m);
    else if (m->type == F16) mix_of(m, F16);
    else mix_of(m, F32);
}
#endif /* !HAS_PIECES */
#endif /* LANES > 1 */

#define STRING_(x) #x
#define STRING(x) STRING_(x)
static const struct kernels NAME(kernels) = {
    STRING(INSTANCE), LANES > 1, PIECE(quantize), NAME(mul_codes), PIECE(mul_floats), PIECE(dequantize), PIECE(rmsnorm),
    PIECE(rope), PIECE(store), PIECE(exp_scores), PIECE(mix_values), PIECE(gelu), PIECE(sum_exp)};

#undef INSTANCE
#undef LANES
#undef HAS_DOT
#undef PIECES
#undef HAS_PIECES

#else /* INSTANCE is not defined */

/* ---- The instances ---- */

/* All functions between BEGIN and END may use these instructions. */
#define PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define BEGIN_TARGET(features) PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define END_TARGET PRAGMA(clang attribute pop)
#else
#define BEGIN_TARGET(features) PRAGMA(GCC push_options) PRAGMA(GCC target(features))
#define END_TARGET PRAGMA(GCC pop_options)
#endif

#define INSTANCE scalar
#define PIECES scalar
#define HAS_PIECES 0
#define LANES 1
#define HAS_DOT 0
#include "gemma3.c"

#if defined(HAVE_X86)
BEGIN_TARGET("avx2,fma,f16c")
#define INSTANCE avx2
#define PIECES avx2
#define HAS_PIECES 0
#define LANES 8
#define HAS_DOT 0
#include "gemma3.c"
END_TARGET
BEGIN_TARGET("avx2,fma,f16c,avxvnni")
#define INSTANCE avxvnni
#define PIECES avx2
#define HAS_PIECES 1
#define LANES 8
#define HAS_DOT 1
#include "gemma3.c"
END_TARGET
BEGIN_TARGET("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#define INSTANCE avx512vnni
#define PIECES avx512vnni
#define HAS_PIECES 0
#define LANES 16
#define HAS_DOT 1
#include "gemma3.c"
END_TARGET
#endif

#if defined(HAVE_NEON)
#define INSTANCE neon
#define PIECES neon
#define HAS_PIECES 0
#define LANES 4
#define HAS_DOT 0
#include "gemma3.c"
/* clang learned dotprod's target attribute with 16; before that it makes the code if the command line asks */
#if defined(__ARM_FEATURE_DOTPROD) || !defined(__clang__) || __clang_major__ >= 16
#define HAVE_DOTPROD 1
#if defined(__clang__) && __clang_major__ >= 16
BEGIN_TARGET("+dotprod")
#elif defined(__clang__)
#elif defined(__ARM_FEATURE_DOTPROD) || defined(__ARM_FEATURE_SVE) || defined(__ARM_FEATURE_COMPLEX)
BEGIN_TARGET("+dotprod")
#else /* "arch=" replaces the command line's: keep what such cores may have */
BEGIN_TARGET("arch=armv8.2-a+crypto+fp16+dotprod")
#endif
#define INSTANCE dotprod
#define PIECES neon
#define HAS_PIECES 1
#define LANES 4
#define HAS_DOT 1
#include "gemma3.c"
#if !defined(__clang__) || __clang_major__ >= 16
END_TARGET
#endif
#endif
#endif

/* Best first. The last is the definition, which runs everywhere. */
static const struct kernels *const all_kernels[] = {
#if defined(HAVE_X86)
    &kernels_avx512vnni, &kernels_avxvnni, &kernels_avx2,
#endif
#if defined(HAVE_DOTPROD)
    &kernels_dotprod,
#endif
#if defined(HAVE_NEON)
    &kernels_neon,
#endif
    &kernels_scalar,
};
enum { N_KERNELS = sizeof all_kernels / sizeof *all_kernels };

/* What the rest of the program needs of the definition. */
static float fma_f32(float a, float b, float c) { return fma_of_scalar(a, b, c); }
static float exp_f32(float x) { return exp_of_scalar(x); }
static float value_of(int type, const uint8_t *row, size_t j) { return load_float(type, row, j); }
static float exp_scores_of(float *score, int n, int first) { return exp_scores_scalar(score, n, first); }
static float dot(int type, const uint8_t *row, const float *x, int n)
{
    float acc[1][TILE_ROWS];
    mul_floats_scalar(&(struct product){.format = find_format(type), .rows = row, .n_rows = 1, .cols = n, .n = 1,
                                        .x = x, .acc = acc});
    return acc[0][0];
}

#if defined(HAVE_NEON) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(HAVE_NEON) && defined(__APPLE__)
#include <sys/sysctl.h>
static int apple_has(const char *feature)
{
    int has = 0;
    size_t size = sizeof has;
    return !sysctlbyname(feature, &has, &size, NULL, 0) && has;
}
#endif

static int cpu_has(const char *isa)
{
#if defined(HAVE_X86)
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (!strcmp(isa, "avx2")) return avx2; /* every CPU with AVX2 and FMA has F16C */
    if (!strcmp(isa, "avxvnni")) return avx2 && __builtin_cpu_supports("avxvnni");
    if (!strcmp(isa, "avx512vnni")) return avx512 && __builtin_cpu_supports("avx512vnni");
#elif defined(HAVE_NEON) && defined(__linux__)
    if (!strcmp(isa, "dotprod")) return (getauxval(AT_HWCAP) >> 20 & 1) != 0;   /* HWCAP_ASIMDDP */
    if (!strcmp(isa, "i8mm")) return cpu_has("dotprod") && (getauxval(AT_HWCAP2) >> 13 & 1) != 0;
#elif defined(HAVE_NEON) && defined(__APPLE__)
    if (!strcmp(isa, "dotprod")) return apple_has("hw.optional.arm.FEAT_DotProd");
    if (!strcmp(isa, "i8mm")) return cpu_has("dotprod") && apple_has("hw.optional.arm.FEAT_I8MM");
#endif
    return !strcmp(isa, "scalar") || !strcmp(isa, "neon");
}

const char *gemma3_isa_name(int index)
{
    for (int i = 0; i < N_KERNELS; i++)
        if (cpu_has(all_kernels[i]->name) && index-- == 0) return all_kernels[i]->name;
    return NULL;
}

/* ==== 11. Reading GGUF ==========================================================================
 *
 *     "GGUF" | u32 version | u64 n_tensors | u64 n_kv | n_kv pairs | n_tensors infos | padding | data
 *     pair:  string key | u32 type | value          string: u64 length | bytes
 *     info:  string name | u32 n_dims | u64 ne[n_dims] | u32 type | u64 offset from data
 *     array: u32 element type | u64 count | elements
 *
 * ne[0] is the length of a row. Nothing of the file is trusted: every read goes through a cursor that
 * knows what is left, and every tensor's type, shape and end are checked once, when it is bound. */

static void *fail(gemma3_error *err, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    if (err) vsnprintf(err->text, sizeof err->text, format, args);
    va_end(args);
    return NULL;
}

/* A path for an error message, whose reason comes after it: the end of a long one. */
enum { SHORT_PATH = 240 };
static const char *short_path(const char *path, char out[SHORT_PATH])
{
    size_t n = strlen(path);
    if (n < SHORT_PATH) return path;
    path += n - (SHORT_PATH - 4);
    while ((*path & 0xc0) == 0x80) path++; /* not in the middle of a character */
    snprintf(out, SHORT_PATH, "...%s", path);
    return out;
}

struct cursor {
    const uint8_t *p;
    size_t left;
    int failed;
};

static const uint8_t *take(struct cursor *c, uint64_t n)
{
    const uint8_t *p = c->p;
    if (c->failed || n > c->left) {
        c->failed = 1;
        return NULL;
    }
    c->p += n;
    c->left -= (size_t)n;
    return p;
}

static uint32_t take_u32(struct cursor *c)
{
    const uint8_t *p = take(c, 4);
    return p ? load_u32_le(p) : 0;
}

static uint64_t take_u64(struct cursor *c)
{
    const uint8_t *p = take(c, 8);
    return p ? load_u64_le(p) : 0;
}

struct string {
    const char *text;
    size_t n;
};
static struct string standin_template; /* stand-ins, drop at merge */
static int standin_obey;
static float standin_cap;

static struct string take_string(struct cursor *c)
{
    uint64_t n = take_u64(c);
    struct string s = {(const char *)take(c, n), (size_t)n};
    if (!s.text) s.n = 0;
    return s;
}

enum { KV_U8, KV_I8, KV_U16, KV_I16, KV_U32, KV_I32, KV_F32, KV_BOOL, KV_STRING, KV_ARRAY, KV_U64,
       KV_I64, KV_F64, KV_TYPES };

static const uint8_t kv_bytes[KV_TYPES] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
static const char *const kv_names[KV_TYPES] = {"u8", "i8", "u16", "i16", "u32", "i32", "f32", "bool",
                                               "string", "array", "u64", "i64", "f64"};

struct kv {
    struct string key;
    uint32_t type, element;      /* element: of an array */
    uint64_t count;              /* of an array, else 1 */
    struct cursor value;
};

struct tensor {
    struct string name;
    uint32_t type;
    uint64_t ne[4], offset;
};

struct gguf {
    const char *name;            /* of the file */
    const uint8_t *data;         /* tensors */
    size_t data_bytes;
    uint64_t alignment;          /* of every tensor in data */
    struct kv *kv;               /* sorted by key */
    struct tensor *tensor;       /* sorted by name */
    size_t n_kv, n_tensors;
    gemma3_error *err;
};

static int compare_strings(struct string a, struct string b)
{
    size_t n = a.n < b.n ? a.n : b.n;
    int c = n ? memcmp(a.text, b.text, n) : 0;
    return c ? c : (a.n > b.n) - (a.n < b.n);
}

static int compare_kv(const void *a, const void *b)
{
    return compare_strings(((const struct kv *)a)->key, ((const struct kv *)b)->key);
}

static int compare_tensors(const void *a, const void *b)
{
    return compare_strings(((const struct tensor *)a)->name, ((const struct tensor *)b)->name);
}

/* A name for an error message: printable, and not too long. */
static const char *shown(struct string s, char out[80])
{
    size_t n = s.n < 79 ? s.n : 79;
    for (size_t j = 0; j < n; j++) out[j] = s.text[j] >= 32 && s.text[j] < 127 ? s.text[j] : '?';
    out[n] = 0;
    return out;
}

static int read_kv(struct gguf *g, struct cursor *c, struct kv *kv)
{
    char text[80];
    kv->key = take_string(c);
    kv->type = take_u32(c);
    kv->element = kv->type;
    kv->count = 1;
    if (!c->failed && kv->type == KV_ARRAY) {
        kv->element = take_u32(c);
        kv->count = take_u64(c);
    }
    kv->value = *c;
    if (c->failed) return 0;
    if (kv->element == KV_ARRAY)
        return fail(g->err, "%s: key %s is an array of arrays, which is not supported", g->name,
                    shown(kv->key, text)), -1;
    if (kv->element >= KV_TYPES)
        return fail(g->err, "%s: key %s has value type %u, which is not one of GGUF's", g->name,
                    shown(kv->key, text), (unsigned)kv->element), -1;
    if (kv->element == KV_STRING)
        for (uint64_t k = 0; k < kv->count && !c->failed; k++) take_string(c);
    else if (kv->count > c->left) c->failed = 1;
    else take(c, kv->count * kv_bytes[kv->element]);
    return 0;
}

static int read_tensor(struct gguf *g, struct cursor *c, struct tensor *t)
{
    char text[80];
    t->name = take_string(c);
    uint32_t n_dims = take_u32(c);
    if (!c->failed && (n_dims < 1 || n_dims > 4))
        return fail(g->err, "%s: tensor %s has %u dimensions, expected 1 to 4", g->name,
                    shown(t->name, text), (unsigned)n_dims), -1;
    for (uint32_t k = 0; k < 4; k++) t->ne[k] = k < n_dims ? take_u64(c) : 1;
    t->type = take_u32(c);
    t->offset = take_u64(c);
    return 0;
}

static const struct kv *find_kv(const struct gguf *g, const char *key)
{
    struct kv wanted = {.key = {key, strlen(key)}};
    return g->n_kv ? bsearch(&wanted, g->kv, g->n_kv, sizeof wanted, compare_kv) : NULL;
}

static const struct tensor *find_tensor(const struct gguf *g, const char *name)
{
    struct tensor wanted = {.name = {name, strlen(name)}};
    return g->n_tensors ? bsearch(&wanted, g->tensor, g->n_tensors, sizeof wanted, compare_tensors) : NULL;
}

static int read_header(struct gguf *g, struct cursor *c)
{
    const uint8_t *magic = take(c, 4);
    if (!magic || memcmp(magic, "GGUF", 4))
        return fail(g->err, "%s is not a GGUF file: it does not begin with \"GGUF\"", g->name), -1;
    uint32_t version = take_u32(c);
    if (!c->failed && version != 2 && version != 3)
        return fail(g->err, "%s: GGUF version %u%s, expected 2 or 3", g->name, (unsigned)version,
                    version && !(version & 0xffff) ? " (a big-endian file)" : ""), -1;
    uint64_t n_tensors = take_u64(c), n_kv = take_u64(c);
    if (c->failed || n_kv > c->left / 13 || n_tensors > c->left / 32) /* their least sizes */
        return fail(g->err, "%s is truncated: its header promises %llu keys and %llu tensors", g->name,
                    (unsigned long long)n_kv, (unsigned long long)n_tensors), -1;
    g->n_kv = (size_t)n_kv;
    g->n_tensors = (size_t)n_tensors;
    g->kv = calloc(g->n_kv + 1, sizeof *g->kv);
    g->tensor = calloc(g->n_tensors + 1, sizeof *g->tensor);
    if (!g->kv || !g->tensor) return fail(g->err, "%s: out of memory for its keys", g->name), -1;
    return 0;
}

static int sort_directory(struct gguf *g)
{
    char text[80];
    qsort(g->kv, g->n_kv, sizeof *g->kv, compare_kv);
    qsort(g->tensor, g->n_tensors, sizeof *g->tensor, compare_tensors);
    for (size_t k = 1; k < g->n_kv; k++)
        if (!compare_kv(g->kv + k - 1, g->kv + k))
            return fail(g->err, "%s: key %s occurs twice", g->name, shown(g->kv[k].key, text)), -1;
    for (size_t k = 1; k < g->n_tensors; k++)
        if (!compare_tensors(g->tensor + k - 1, g->tensor + k))
            return fail(g->err, "%s: tensor %s occurs twice", g->name, shown(g->tensor[k].name, text)), -1;
    return 0;
}

static int read_gguf(struct gguf *g, const void *data, size_t size)
{
    struct cursor c = {data, size, 0};
    if (read_header(g, &c)) return -1;
    for (size_t k = 0; k < g->n_kv && !c.failed; k++)
        if (read_kv(g, &c, g->kv + k)) return -1;
    for (size_t k = 0; k < g->n_tensors && !c.failed; k++)
        if (read_tensor(g, &c, g->tensor + k)) return -1;
    if (c.failed) return fail(g->err, "%s is truncated: it ends inside its header", g->name), -1;
    if (sort_directory(g)) return -1;
    const struct kv *a = find_kv(g, "general.alignment");
    uint64_t alignment = a && a->type == KV_U32 ? load_u32_le(a->value.p) : 32;
    if ((a && a->type != KV_U32) || alignment == 0 || (alignment & (alignment - 1)))
        return fail(g->err, "%s: general.alignment must be a u32 power of two", g->name), -1;
    uint64_t start = (size - c.left + alignment - 1) & ~(alignment - 1);
    g->alignment = alignment;
    g->data = (const uint8_t *)data + (start < size ? start : size);
    g->data_bytes = start < size ? (size_t)(size - start) : 0;
    return 0;
}

/* A number of any type as double (exact for every value we accept); 0 and a sentence if it is none. */
static int read_number(const struct gguf *g, const struct kv *kv, double *out)
{
    const uint8_t *p = kv->value.p;
    char text[80];
    switch (kv->type) {
    case KV_U8: case KV_BOOL: *out = p[0]; return 1;
    case KV_I8: *out = (int8_t)p[0]; return 1;
    case KV_U16: *out = load_u16_le(p); return 1;
    case KV_I16: *out = (int16_t)load_u16_le(p); return 1;
    case KV_U32: *out = load_u32_le(p); return 1;
    case KV_I32: *out = (int32_t)load_u32_le(p); return 1;
    case KV_F32: *out = float_of(load_u32_le(p)); return 1;
    case KV_U64: *out = (double)load_u64_le(p); return 1;
    case KV_I64: *out = (double)(int64_t)load_u64_le(p); return 1;
    case KV_F64: { uint64_t u = load_u64_le(p); memcpy(out, &u, 8); return 1; }
    default:
        fail(g->err, "%s: key %s is a %s, expected a number", g->name, shown(kv->key, text),
             kv_names[kv->type]);
        return 0;
    }
}

/* Key "gemma3.NAME" as an integer in [low, high], or, when it is absent, fallback (< 0: required). */
static int get_int(const struct gguf *g, const char *name, int low, int high, int fallback, int *out)
{
    char key[96];
    double x;
    snprintf(key, sizeof key, "gemma3.%s", name);
    const struct kv *kv = find_kv(g, key);
    *out = fallback;
    if (!kv && fallback < 0) return fail(g->err, "%s: key %s is missing", g->name, key), -1;
    if (!kv) return 0;
    if (!read_number(g, kv, &x)) return -1;
    if (!(x >= low && x <= high) || x != (int)x)
        return fail(g->err, "%s: key %s is %.10g, expected an integer from %d to %d", g->name, key, x,
                    low, high), -1;
    *out = (int)x;
    return 0;
}

/* The same for a float of at least `least`; other: an older spelling of the key, or NULL. */
static int get_float(const struct gguf *g, const char *name, const char *other, float least, float fallback,
                     float *out)
{
    char key[96];
    double x;
    snprintf(key, sizeof key, "gemma3.%s", name);
    const struct kv *kv = find_kv(g, key);
    if (!kv && other) {
        snprintf(key, sizeof key, "gemma3.%s", other);
        kv = find_kv(g, key);
    }
    *out = fallback;
    if (!kv) return 0;
    if (!read_number(g, kv, &x)) return -1;
    if (!(x >= least && x <= 1e30))
        return fail(g->err, "%s: key %s is %g, expected a number from %g to 1e30", g->name, key, x, (double)least), -1;
    *out = (float)x;
    return 0;
}

static struct string get_string(const struct gguf *g, const char *key)
{
    const struct kv *kv = find_kv(g, key);
    struct cursor c;
    struct string none = {"", 0};
    if (!kv || kv->type != KV_STRING) return none;
    c = kv->value;
    return take_string(&c);
}

static int string_is(struct string s, const char *text)
{
    return s.n == strlen(text) && !memcmp(s.text, text, s.n);
}

/* 0 when a key is absent or one of two strings, of which the first is the usual one. */
static int check_string(const struct gguf *g, const char *key, const char *usual, const char *other)
{
    char text[80];
    const struct kv *kv = find_kv(g, key);
    if (!kv) return 0;
    if (kv->type != KV_STRING)
        return fail(g->err, "%s: key %s is a %s, expected a string", g->name, key, kv_names[kv->type]), -1;
    struct string s = get_string(g, key);
    if (string_is(s, usual) || string_is(s, other)) return 0;
    return fail(g->err, "%s: %s is \"%s\", expected \"%s\"", g->name, key, shown(s, text), usual), -1;
}

/* ==== 12. Opening a model ======================================================================= */

/* What a host with virtual memory does for us; elsewhere nothing (section 15). */
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n);
static void host_use_large_pages(uint8_t *begin, size_t n);
static void host_unmap(const gemma3_model *m);

struct opening {
    struct gguf g;
    gemma3_model *m;
    gemma3_options options;
    float *norms;                /* where the next norm goes */
};

static void *own(struct opening *o, size_t bytes, const char *what)
{
    gemma3_model *m = o->m;
    void *p = m->n_owned < 8 ? malloc(bytes ? bytes : 1) : NULL;
    if (!p) return fail(o->g.err, "%s: out of memory for %s (%llu bytes)", o->g.name, what, (unsigned long long)bytes);
    return m->owned[m->n_owned++] = p;
}

/* Says in one sentence why this is no Gemma 3 text model that we can run. */
static int refuse_others(const struct opening *o)
{
    const struct gguf *g = &o->g;
    char text[80];
    double count = 0;
    const struct kv *split = find_kv(g, "split.count"); /* only the first part has the model's keys */
    if (split && read_number(g, split, &count) && count > 1)
        return fail(g->err, "%s is one of %.0f parts of a split model: merge them first (llama-gguf-split --merge)",
                    g->name, count), -1;
    if (!find_kv(g, "general.architecture"))
        return fail(g->err, "%s: general.architecture is missing, expected \"gemma3\"", g->name), -1;
    if (check_string(g, "general.architecture", "gemma3", "gemma3")) return -1;
    for (size_t k = 0; k < g->n_tensors; k++) {
        struct string name = g->tensor[k].name;
        if (name.n > 5 && !memcmp(name.text, "dense", 5))
            return fail(g->err, "%s: tensor %s belongs to an embedding model (EmbeddingGemma), not to a Gemma 3 text model",
                        g->name, shown(name, text)), -1;
        if (name.n > 16 && !memcmp(name.text + name.n - 15, "attn_qkv.weight", 15))
            return fail(g->err, "%s: tensor %s is a fused projection, expected attn_q, attn_k and attn_v", g->name,
                        shown(name, text)), -1;
    }
    return 0;
}

/* [ne1][ne0], and what is not 1 before them. */
static const char *shape_of(const struct tensor *t, char out[96])
{
    int n = 0;
    for (int k = t->ne[3] != 1 ? 3 : t->ne[2] != 1 ? 2 : 1; k >= 0; k--)
        n += snprintf(out + n, 96 - n, "[%llu]", (unsigned long long)t->ne[k]);
    return out;
}

/* Finds a tensor and checks its type, shape and end: [rows][cols], rows 0 for "any". */
static int bind(struct opening *o, const char *name, int rows, int cols, struct matrix *w)
{
    const struct gguf *g = &o->g;
    const struct tensor *t = find_tensor(g, name);
    if (!t) return fail(g->err, "%s: tensor %s is missing", g->name, name), -1;
    w->format = find_format(t->type);
    if (!w->format)
        return fail(g->err, "%s: tensor %s has type %u, which is not supported (F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 "
                    "Q2_K to Q6_K IQ4_NL are)", g->name, name, (unsigned)t->type), -1;
    char shape[96], want[32] = "any number of tokens";
    if (rows) snprintf(want, sizeof want, "%d", rows);
    if (t->ne[0] != (uint64_t)cols || (rows ? t->ne[1] != (uint64_t)rows : t->ne[1] < 1 || t->ne[1] > 1 << 24) ||
        t->ne[2] != 1 || t->ne[3] != 1)
        return fail(g->err, "%s: tensor %s is %s, expected [%s][%d]", g->name, name, shape_of(t, shape), want,
                    cols), -1;
    if (cols % w->format->elements)
        return fail(g->err, "%s: tensor %s has rows of %d, expected a multiple of %s's block of %d", g->name, name,
                    cols, w->format->name, w->format->elements), -1;
    w->rows = (int)t->ne[1];
    w->cols = cols;
    w->tiled = 0;
    w->row_bytes = (size_t)(cols / w->format->elements) * w->format->bytes;
    uint64_t bytes = (uint64_t)w->row_bytes * w->rows;
    if (t->offset % g->alignment)
        return fail(g->err, "%s: tensor %s is at offset %llu, expected a multiple of %llu", g->name, name,
                    (unsigned long long)t->offset, (unsigned long long)g->alignment), -1;
    if (t->offset > g->data_bytes || bytes > g->data_bytes - t->offset)
        return fail(g->err, "%s is truncated: tensor %s ends %llu bytes past the end of the file", g->name, name,
                    (unsigned long long)(t->offset + bytes - g->data_bytes)), -1;
    w->data = g->data + t->offset;
    o->m->weight_bytes += (size_t)bytes;
    return 0;
}

static int bind_layer(struct opening *o, int l, const char *name, int rows, int cols, struct matrix *w)
{
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s.weight", l, name);
    return bind(o, full, rows, cols, w);
}

/* A norm's vector: any float type, copied out as float32. */
static int bind_norm(struct opening *o, const char *name, int n, const float **out)
{
    struct matrix w;
    if (bind(o, name, 1, n, &w)) return -1;
    if (!is_float(w.format))
        return fail(o->g.err, "%s: tensor %s has type %s, expected F32", o->g.name, name, w.format->name), -1;
    o->m->kernels->dequantize(&w, 0, 1, o->norms);
    *out = o->norms;
    o->norms += n;
    return 0;
}

static int bind_layer_norm(struct opening *o, int l, const char *name, int n, const float **out)
{
    char full[64];
    snprintf(full, sizeof full, "blk.%d.%s.weight", l, name);
    return bind_norm(o, full, n, out);
}

/* Heads: some converters leave the keys out, the tensors' shapes always tell. */
static int configure_heads(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    const struct tensor *q = find_tensor(&o->g, "blk.0.attn_q.weight"), *k = find_tensor(&o->g, "blk.0.attn_k.weight");
    if (get_int(&o->g, "attention.head_count", 1, 1024, -1, &c->n_heads)) return -1;
    int from_q = q && q->ne[1] <= 1 << 20 ? (int)q->ne[1] / c->n_heads : 0;
    if (get_int(&o->g, "attention.key_length", 2, 1024, from_q, &c->head_dim)) return -1;
    if (c->head_dim < 2 || c->head_dim % 2)
        return fail(o->g.err, "%s: heads of %d elements, expected an even number", o->g.name, c->head_dim), -1;
    int from_k = k && k->ne[1] <= 1 << 20 ? (int)k->ne[1] / c->head_dim : 0, value_length;
    if (get_int(&o->g, "attention.head_count_kv", 1, 1024, from_k, &c->n_kv_heads)) return -1;
    if (c->n_kv_heads < 1 || c->n_heads % c->n_kv_heads)
        return fail(o->g.err, "%s: %d query heads do not divide into %d key-value heads", o->g.name, c->n_heads,
                    c->n_kv_heads), -1;
    if (get_int(&o->g, "attention.value_length", 1, 1024, c->head_dim, &value_length)) return -1;
    if (value_length != c->head_dim)
        return fail(o->g.err, "%s: gemma3.attention.value_length is %d, expected key_length's %d", o->g.name,
                    value_length, c->head_dim), -1;
    return 0;
}

/* Which layers are local: gemma3.attention.sliding_window_pattern is absent (6), a number n (every
 * n-th layer is global), or an array with one bool for each layer (true: local). */
static int configure_layers(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    int known = c->n_layers == 18 || c->n_layers == 26 ? 512   /* 270M, 1B; 4B, 12B, 27B */
              : c->n_layers == 34 || c->n_layers == 48 || c->n_layers == 62 ? 1024 : 0, pattern;
    if (get_int(&o->g, "attention.sliding_window", 0, 1 << 24, known, &c->window)) return -1;
    const struct kv *kv = find_kv(&o->g, "gemma3.attention.sliding_window_pattern");
    int is_array = kv && kv->type == KV_ARRAY;
    if (is_array && (kv->element != KV_BOOL || kv->count < (uint64_t)c->n_layers))
        return fail(o->g.err, "%s: gemma3.attention.sliding_window_pattern must have one bool for each of %d layers",
                    o->g.name, c->n_layers), -1;
    if (is_array) pattern = 0;
    else if (get_int(&o->g, "attention.sliding_window_pattern", 0, GEMMA3_MAX_LAYERS, 6, &pattern)) return -1;
    for (int l = 0; l < c->n_layers; l++) {
        int local = is_array ? kv->value.p[l] != 0 : pattern > 1 && (l + 1) % pattern != 0;
        c->is_local[l] = (uint8_t)(local && c->window > 0);
    }
    return 0;
}

static int configure_rope(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    int large = c->n_layers == 34 || c->n_layers == 48 || c->n_layers == 62;
    if (check_string(&o->g, "gemma3.rope.scaling.type", "linear", "none")) return -1;
    struct string type = get_string(&o->g, "gemma3.rope.scaling.type");
    if (get_float(&o->g, "rope.freq_base", "rope.global.freq_base", 1, 1e6f, &c->rope_base_global) ||
        get_float(&o->g, "rope.freq_base_swa", "rope.local.freq_base", 1, 1e4f, &c->rope_base_local) ||
        get_float(&o->g, "rope.scaling.factor", "rope.scale_linear", 0, large ? 8 : 1, &c->rope_factor))
        return -1;
    if (c->rope_factor == 0 || string_is(type, "none")) c->rope_factor = 1;
    /* Angles are at most position / factor, positions below 2^24: cos_sin can take angles below 2^31. */
    if (c->rope_factor < 0x1p-7f)
        return fail(o->g.err, "%s: gemma3.rope.scaling.factor is %g, expected at least 1/128 (angles must stay below 2^31)",
                    o->g.name, (double)c->rope_factor), -1;
    return 0;
}

static int configure(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    const struct gguf *g = &o->g;
    if (get_int(g, "block_count", 1, GEMMA3_MAX_LAYERS, -1, &c->n_layers) ||
        get_int(g, "embedding_length", 1, 1 << 16, -1, &c->d_model) ||
        get_int(g, "feed_forward_length", 1, 1 << 20, -1, &c->d_ff) ||
        get_int(g, "context_length", 1, 1 << 24, 32768, &c->n_ctx_train) ||
        get_float(g, "attention.layer_norm_rms_epsilon", NULL, 0, 1e-6f, &c->rms_eps) ||
        get_float(g, "final_logit_softcapping", NULL, 0, 0, &c->final_softcap))
        return -1;
    if (configure_heads(o) || configure_layers(o) || configure_rope(o)) return -1;
    /* 27B's queries are scaled by 1/sqrt(d_model / n_heads) = 1/sqrt(168), not by 1/sqrt(head_dim). */
    int n = c->n_layers == 62 ? c->d_model / c->n_heads : c->head_dim;
    c->query_scale = 1.0f / sqrt_of((float)n);
    c->embedding_scale = sqrt_of((float)c->d_model);
    return 0;
}

/* The arrays that the tokenizer works on; strings stay in the file. */
static int read_vocab(struct opening *o)
{
    gemma3_model *m = o->m;
    const struct gguf *g = &o->g;
    const struct kv *tokens = find_kv(g, "tokenizer.ggml.tokens"), *scores = find_kv(g, "tokenizer.ggml.scores");
    const struct kv *types = find_kv(g, "tokenizer.ggml.token_type");
    if (!tokens || tokens->type != KV_ARRAY || tokens->element != KV_STRING || !tokens->count)
        return fail(g->err, "%s: key tokenizer.ggml.tokens is missing or no array of strings", g->name), -1;
    int n = m->token_embd.rows;
    if (tokens->count < (uint64_t)n) n = (int)tokens->count;
    m->config.n_vocab = n;
    if (!scores || scores->type != KV_ARRAY || scores->element != KV_F32 || scores->count < (uint64_t)n)
        return fail(g->err, "%s: key tokenizer.ggml.scores must be an array of %d f32", g->name, n), -1;
    if (types && (types->type != KV_ARRAY || (types->element != KV_I32 && types->element != KV_U32) ||
                  types->count < (uint64_t)n))
        return fail(g->err, "%s: key tokenizer.ggml.token_type must be an array of %d i32", g->name, n), -1;
    const char **text = own(o, n * sizeof *text, "the vocabulary");
    uint32_t *length = own(o, n * (sizeof *length + sizeof(float) + sizeof(int32_t)), "the vocabulary");
    if (!text || !length) return -1;
    float *score = (float *)(void *)(length + n);
    int32_t *type = (int32_t *)(void *)(score + n);
    struct cursor c = tokens->value;
    for (int k = 0; k < n; k++) {
        struct string s = take_string(&c);
        if (s.n > GEMMA3_PIECE_MAX)
            return fail(g->err, "%s: key tokenizer.ggml.tokens: token %d has %llu bytes, expected at most %d", g->name,
                        k, (unsigned long long)s.n, GEMMA3_PIECE_MAX), -1;
        text[k] = s.text;
        length[k] = (uint32_t)s.n;
        score[k] = float_of(load_u32_le(scores->value.p + 4 * (size_t)k));
        type[k] = types ? (int32_t)load_u32_le(types->value.p + 4 * (size_t)k) : 1;
    }
    m->vocab = (gemma3_vocab){.n_vocab = n, .text = text, .length = length, .score = score, .type = type};
    return 0;
}

/* The id that a key gives, or, when it is absent, that of the token with this text; -1: none. */
static int special_id(const struct opening *o, const char *key, const char *text, int32_t *id)
{
    const struct kv *kv = find_kv(&o->g, key);
    const gemma3_vocab *v = &o->m->vocab;
    double x = -1;
    if (kv && !read_number(&o->g, kv, &x)) return -1;
    if (kv && !(x >= 0 && x < v->n_vocab))
        return fail(o->g.err, "%s: key %s is %.10g, outside the vocabulary of %d", o->g.name, key, x, v->n_vocab), -1;
    *id = (int32_t)x;
    if (*id != x) return fail(o->g.err, "%s: key %s is %.10g, expected an integer", o->g.name, key, x), -1;
    for (int32_t k = 0; !kv && *id < 0 && k < v->n_vocab; k++)
        if (string_is((struct string){v->text[k], v->length[k]}, text)) *id = k;
    return 0;
}

static int open_tokenizer(struct opening *o)
{
    gemma3_model *m = o->m;
    gemma3_vocab *v = &m->vocab;
    double add_bos = 1;
    if (check_string(&o->g, "tokenizer.ggml.model", "llama", "llama") || read_vocab(o) ||
        special_id(o, "tokenizer.ggml.bos_token_id", "<bos>", &v->bos) ||
        special_id(o, "tokenizer.ggml.eos_token_id", "<eos>", &v->eos) ||
        special_id(o, "tokenizer.ggml.unknown_token_id", "<unk>", &v->unknown))
        return -1;
    const struct kv *kv = find_kv(&o->g, "tokenizer.ggml.add_bos_token");
    if (kv && !read_number(&o->g, kv, &add_bos)) return -1;
    v->add_bos = add_bos != 0;
    size_t size = gemma3_tokenizer_size(v);
    void *mem = own(o, size, "the tokenizer");
    if (!mem) return -1;
    m->tokenizer = gemma3_tokenizer_init(v, mem, size, o->g.err);
    return m->tokenizer ? 0 : -1;
}

static int bind_weights(struct opening *o)
{
    gemma3_model *m = o->m;
    const gemma3_config *c = &m->config;
    int d = c->d_model, D = c->head_dim, q = c->n_heads * D, kv = c->n_kv_heads * D;
    o->norms = own(o, ((size_t)c->n_layers * (4 * d + 2 * D) + d) * sizeof(float), "the norms");
    if (!o->norms || bind(o, "token_embd.weight", 0, d, &m->token_embd) ||
        bind_norm(o, "output_norm.weight", d, &m->output_norm))
        return -1;
    m->lm_head = m->token_embd;
    m->tied = !find_tensor(&o->g, "output.weight");
    if (!m->tied && bind(o, "output.weight", m->token_embd.rows, d, &m->lm_head)) return -1;
    for (int l = 0; l < c->n_layers; l++) {
        struct layer *w = &m->layer[l];
        if (bind_layer_norm(o, l, "attn_norm", d, &w->attn_norm) ||
            bind_layer(o, l, "attn_q", q, d, &w->attn_q) ||
            bind_layer(o, l, "attn_k", kv, d, &w->attn_k) ||
            bind_layer(o, l, "attn_v", kv, d, &w->attn_v) ||
            bind_layer(o, l, "attn_output", d, q, &w->attn_output) ||
            bind_layer_norm(o, l, "attn_q_norm", D, &w->attn_q_norm) ||
            bind_layer_norm(o, l, "attn_k_norm", D, &w->attn_k_norm) ||
            bind_layer_norm(o, l, "post_attention_norm", d, &w->post_attention_norm) ||
            bind_layer_norm(o, l, "ffn_norm", d, &w->ffn_norm) ||
            bind_layer(o, l, "ffn_gate", c->d_ff, d, &w->ffn_gate) ||
            bind_layer(o, l, "ffn_up", c->d_ff, d, &w->ffn_up) ||
            bind_layer(o, l, "ffn_down", d, c->d_ff, &w->ffn_down) ||
            bind_layer_norm(o, l, "post_ffw_norm", d, &w->post_ffw_norm))
            return -1;
    }
    return 0;
}

/* ---- Integer formats into tiles ---- */

struct repack {
    const gemma3_model *m;
    struct matrix *w;
    uint8_t *to;
    int n_tasks;
};

/* A share of the work: small, because until its end its rows are in memory twice. */
enum { REPACK_BYTES = 1 << 19, MIN_REPACK_TASKS = 8 };

/* A share of the tiles; then the file's pages are given back, so that no row is in memory twice. */
static void repack_task(void *arg, int index, int worker)
{
    const struct repack *job = arg;
    const struct matrix *w = job->w;
    int tile, end, row, last;
    (void)worker;
    share_of(n_tiles(w), job->n_tasks, index, &tile, &end);
    row = tile * TILE_ROWS, last = end * TILE_ROWS < w->rows ? end * TILE_ROWS : w->rows;
    const uint8_t *from = w->data + row * w->row_bytes;
    for (int n; row < last; row += n) {
        n = last - row < TILE_ROWS ? last - row : TILE_ROWS;
        make_tile(job->to + row * w->row_bytes, w->data + row * w->row_bytes, w->row_bytes, n,
                  w->cols / w->format->elements, w->format);
    }
    host_give_back(job->m, from, (size_t)(w->data + last * w->row_bytes - from));
}

static size_t tiled_bytes(const struct matrix *w)
{
    return is_float(w->format) ? 0 : (size_t)n_tiles(w) * TILE_ROWS * w->row_bytes;
}

static void repack_one(struct opening *o, struct matrix *w, uint8_t **to)
{
    size_t bytes = tiled_bytes(w);
    struct repack job = {o->m, w, *to, MIN_REPACK_TASKS + (int)(bytes / REPACK_BYTES)};
    if (!bytes) return;
    if (o->options.parallel_for && o->options.n_threads > 1)
        o->options.parallel_for(o->options.pool, job.n_tasks, repack_task, &job);
    else
        for (int k = 0; k < job.n_tasks; k++) repack_task(&job, k, 0);
    w->data = *to;
    w->tiled = 1;
    *to += bytes;
}

static int repack(struct opening *o)
{
    gemma3_model *m = o->m;
    int n = 0, n_layers = m->config.n_layers;
    struct matrix *all[GEMMA3_MAX_LAYERS * 7 + 2];
    all[n++] = &m->token_embd;
    if (!m->tied) all[n++] = &m->lm_head;
    for (int l = 0; l < n_layers; l++) {
        struct layer *w = &m->layer[l];
        struct matrix *of_layer[7] = {&w->attn_q, &w->attn_k, &w->attn_v, &w->attn_output,
                                      &w->ffn_gate, &w->ffn_up, &w->ffn_down};
        for (int k = 0; k < 7; k++) all[n++] = of_layer[k];
    }
    size_t bytes = 0;
    for (int k = 0; k < n; k++) bytes += tiled_bytes(all[k]);
    if (!bytes) return 0;
    uint8_t *to = own(o, bytes + 64, "the weights");
    if (!to) return -1;
    host_use_large_pages(to, bytes);
    to += -(uintptr_t)to & 63;
    for (int k = 0; k < n; k++) {
        repack_one(o, all[k], &to);
        if (o->options.progress) o->options.progress(o->options.user, (double)(k + 1) / n);
    }
    if (m->tied) m->lm_head = m->token_embd;
    return 0;
}

static int choose_kernels(struct opening *o)
{
    const char *wanted = o->options.isa ? o->options.isa : gemma3_isa_name(0);
    for (int k = 0; k < N_KERNELS; k++)
        if (!strcmp(all_kernels[k]->name, wanted) && cpu_has(wanted)) {
            o->m->kernels = all_kernels[k];
            return 0;
        }
    return fail(o->g.err, "instruction set \"%s\" is unknown or this CPU does not have it", wanted), -1;
}

static int open_steps(struct opening *o, const void *data, size_t size)
{
    gemma3_model *m = o->m;
    const char *fault = arithmetic_fault();
    if (fault) return fail(o->g.err, "this build cannot keep the numeric contract: %s", fault), -1;
    if (choose_kernels(o) || read_gguf(&o->g, data, size) || refuse_others(o) || configure(o) ||
        bind_weights(o) || open_tokenizer(o))
        return -1;
    m->token_embd.rows = m->lm_head.rows = m->config.n_vocab; /* rows beyond the tokens are padding */
    if (m->kernels->tiles && !o->options.no_repack && repack(o)) return -1;
    struct string name = get_string(&o->g, "general.name");
    memcpy(m->name, name.text, name.n < sizeof m->name - 1 ? name.n : sizeof m->name - 1);
    m->can_chat = get_string(&o->g, "tokenizer.chat_template").n > 0;
    standin_template = get_string(&o->g, "tokenizer.chat_template"); /* stand-in, drop at merge */
    standin_obey = o->options.obey_file, standin_cap = m->config.final_softcap;
    if (!standin_obey) m->config.final_softcap = 0;
    return 0;
}

static gemma3_model *open_bytes(const void *data, size_t size, const char *name, const gemma3_options *options,
                                gemma3_error *err, gemma3_model *m)
{
    char shortened[SHORT_PATH];
    struct opening o = {.g = {.name = short_path(name, shortened), .err = err}, .m = m};
    fp_state fp = fp_enter();
    if (options) o.options = *options;
    m->exact = o.options.exact;
    int failed = open_steps(&o, data, size);
    free(o.g.kv);
    free(o.g.tensor);
    fp_leave(fp);
    if (failed) gemma3_close(m);
    return failed ? NULL : m;
}

gemma3_model *gemma3_open_memory(const void *data, size_t size, const char *name, const gemma3_options *options,
                                 gemma3_error *err)
{
    gemma3_model *m = calloc(1, sizeof *m);
    if (!name) name = "a model in memory";
    if (!m) return fail(err, "out of memory for a model");
    return open_bytes(data, size, name, options, err, m);
}

void gemma3_close(gemma3_model *m)
{
    if (!m) return;
    for (int k = 0; k < m->n_owned; k++) free(m->owned[k]);
    host_unmap(m);
    free(m);
}

const gemma3_config *gemma3_model_config(const gemma3_model *m) { return &m->config; }
const gemma3_tokenizer *gemma3_model_tokenizer(const gemma3_model *m) { return m->tokenizer; }
const char *gemma3_model_isa(const gemma3_model *m) { return m->kernels->name; }
const char *gemma3_model_name(const gemma3_model *m) { return m->name; }
int gemma3_model_is_exact(const gemma3_model *m) { return m->exact; }
int gemma3_model_can_chat(const gemma3_model *m) { return m->can_chat; }
size_t gemma3_model_weight_bytes(const gemma3_model *m) { return m->weight_bytes; }

size_t gemma3_model_token_bytes(const gemma3_model *m)
{
    return m->weight_bytes - (m->tied ? 0 : m->token_embd.row_bytes * m->token_embd.rows);
}

/* ==== 13. Sizes and states ====================================================================== */

/* Takes pieces of one block, each aligned to 64 bytes; with base NULL it only counts. */
struct arena {
    uint8_t *base;
    size_t used;
};

/* Sizes stop at SIZE_MAX, which no memory has, instead of wrapping on a machine of 32 bits. */
static size_t times(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }
static size_t plus(size_t a, size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }

static void *piece(struct arena *a, size_t count, size_t bytes)
{
    void *p = a->base ? a->base + a->used : NULL;
    size_t size = times(count, bytes);
    a->used = plus(a->used, size > SIZE_MAX - 63 ? SIZE_MAX : (size + 63) & ~(size_t)63);
    return p;
}

static void size_state(gemma3_state *s, const gemma3_config *c, const gemma3_params *p)
{
    s->p = *p;
    s->n_ubatch = p->n_batch < GEMMA3_MAX_UBATCH ? p->n_batch : GEMMA3_MAX_UBATCH;
    s->n_ubatch = s->n_ubatch < p->n_ctx ? s->n_ubatch : p->n_ctx;
    s->q_block = s->n_ubatch < 4 ? s->n_ubatch : 4;
    s->n_acc = s->n_ubatch < 16 ? 16 : s->n_ubatch; /* attention has that many queries of a kv head */
    s->ring = c->window + s->n_ubatch - 1 < p->n_ctx ? c->window + s->n_ubatch - 1 : p->n_ctx;
}

size_t gemma3_kv_bytes(const gemma3_config *c, const gemma3_params *p)
{
    gemma3_state s;
    size_t slots = 0;
    size_state(&s, c, p);
    for (int l = 0; l < c->n_layers; l++) slots = plus(slots, c->is_local[l] ? s.ring : p->n_ctx);
    return times(times(slots, times(c->n_kv_heads, c->head_dim)), 2 * kv_element(&s));
}

static int widest_input(const gemma3_config *c)
{
    int widest = c->d_model > c->d_ff ? c->d_model : c->d_ff;
    return widest > c->n_heads * c->head_dim ? widest : c->n_heads * c->head_dim;
}

/* Where everything of a state lies. The one place that knows: sizes are counted by the same lines. */
static void lay_out(gemma3_state *s, struct arena *a)
{
    const gemma3_config *c = s->c;
    size_t D = c->head_dim, q = c->n_heads * D, kv = times(c->n_kv_heads, D), n = s->n_ubatch;
    size_t n_queries = (size_t)s->q_block * c->n_heads, blocks = ((size_t)widest_input(c) + 31) / 32;
    for (int l = 0; l < c->n_layers; l++) {
        s->k_cache[l] = piece(a, times(slots_of(s, l), kv), kv_element(s));
        s->v_cache[l] = piece(a, times(slots_of(s, l), kv), kv_element(s));
    }
    for (int local = 0; local < 2; local++) {
        s->inv_freq[local] = piece(a, D / 2, sizeof(float));
        s->cosine[local] = piece(a, n * (D / 2), sizeof(float));
        s->sine[local] = piece(a, n * (D / 2), sizeof(float));
    }
    s->x = piece(a, n * c->d_model, sizeof(float));
    s->h = piece(a, n * c->d_model, sizeof(float));
    s->q = piece(a, n * q, sizeof(float));
    s->attended = piece(a, n * q, sizeof(float));
    s->k = piece(a, times(n, kv), sizeof(float));
    s->v = piece(a, times(n, kv), sizeof(float));
    s->gate = piece(a, n * c->d_ff, sizeof(float));
    s->up = piece(a, n * c->d_ff, sizeof(float));
    s->block_q = piece(a, n_queries * D, sizeof(float));
    s->block_out = piece(a, n_queries * D, sizeof(float));
    s->score_sum = piece(a, n_queries, sizeof(float));
    s->n_score = ((size_t)s->p.n_ctx + 15) & ~(size_t)15;
    s->score = piece(a, times(n_queries, s->n_score), sizeof(float));
    s->q8 = piece(a, s->m->exact ? 0 : n * blocks, sizeof *s->q8);
    s->acc = piece(a, (size_t)s->p.n_threads * s->n_acc, sizeof *s->acc);
    s->unpacked = piece(a, s->m->exact ? 0 : (size_t)s->p.n_threads, sizeof *s->unpacked);
    s->row_floats = piece(a, s->m->exact ? (size_t)s->p.n_threads * TILE_ROWS * blocks : 0, 32 * sizeof(float));
}

gemma3_params gemma3_default_params(const gemma3_model *m)
{
    gemma3_params p = {.n_ctx = m->config.n_ctx_train < 4096 ? m->config.n_ctx_train : 4096, .n_batch = 512,
                       .kv_type = m->exact ? GEMMA3_KV_F32 : GEMMA3_KV_F16, .n_threads = 1};
    return p;
}

size_t gemma3_state_size(const gemma3_model *m, const gemma3_params *p)
{
    gemma3_state s = {.m = m, .c = &m->config};
    struct arena a = {NULL, 0};
    size_state(&s, &m->config, p);
    lay_out(&s, &a);
    return plus(a.used, sizeof s + 128); /* to align any memory to 64 */
}

/* -1 and a sentence when no state can be made of these. */
static int check_params(const gemma3_model *m, const gemma3_params *p, gemma3_error *err)
{
    if (p->n_ctx < 1 || p->n_ctx > 1 << 24)
        return fail(err, "a context of %d tokens: expected 1 to %d", p->n_ctx, 1 << 24), -1;
    if (p->n_batch < 1) return fail(err, "a batch of %d tokens: expected at least 1", p->n_batch), -1;
    if (p->n_threads < 1 || p->n_threads > GEMMA3_MAX_THREADS)
        return fail(err, "%d threads: expected 1 to %d", p->n_threads, GEMMA3_MAX_THREADS), -1;
    if (p->n_threads > 1 && !p->parallel_for)
        return fail(err, "%d threads, but no parallel_for to run them", p->n_threads), -1;
    if (gemma3_state_size(m, p) == SIZE_MAX)
        return fail(err, "a context of %d tokens needs more memory than this machine can address", p->n_ctx), -1;
    return 0;
}

gemma3_state *gemma3_state_init(const gemma3_model *m, const gemma3_params *p, void *mem, size_t size,
                                gemma3_error *err)
{
    const gemma3_config *c = &m->config;
    if (check_params(m, p, err)) return NULL;
    size_t need = gemma3_state_size(m, p);
    if (size < need)
        return fail(err, "a state needs %llu bytes, %llu were given", (unsigned long long)need,
                    (unsigned long long)size);
    fp_state fp = fp_enter();
    gemma3_state *s = (gemma3_state *)(((uintptr_t)mem + 63) & ~(uintptr_t)63);
    struct arena a = {(uint8_t *)s + ((sizeof *s + 63) & ~(size_t)63), 0};
    memset(s, 0, sizeof *s);
    s->m = m;
    s->c = &m->config;
    size_state(s, c, p);
    lay_out(s, &a);
    for (int local = 0; local < 2; local++)
        for (int j = 0; j < c->head_dim / 2; j++) {
            float base = local ? c->rope_base_local : c->rope_base_global;
            float turned = (float)power(base, 2.0 * j / c->head_dim);
            s->inv_freq[local][j] = (1.0f / turned) / (local ? 1.0f : c->rope_factor);
        }
    fp_leave(fp);
    return s;
}

gemma3_state *gemma3_state_new(const gemma3_model *m, const gemma3_params *p, gemma3_error *err)
{
    if (check_params(m, p, err)) return NULL;
    size_t size = gemma3_state_size(m, p);
    void *mem = malloc(size);
    if (!mem)
        return fail(err, "out of memory for a context of %d tokens (%llu bytes)", p->n_ctx, (unsigned long long)size);
    gemma3_state *s = gemma3_state_init(m, p, mem, size, err);
    if (!s) free(mem);
    else s->allocated = mem;
    return s;
}

void gemma3_state_free(gemma3_state *s)
{
    if (s) free(s->allocated);
}

void gemma3_state_reset(gemma3_state *s) { s->pos = 0; }
int gemma3_state_pos(const gemma3_state *s) { return s->pos; }
int gemma3_state_n_ctx(const gemma3_state *s) { return s->p.n_ctx; }
const char *gemma3_state_error(const gemma3_state *s) { return s->error; }

/* ==== 14. Scores, sampling, SHA-256 ============================================================= */

#define MINUS_INFINITY float_of(0xff800000)

/* The largest of n logits; -infinity when all are NaN. */
static float largest_of(const float *logits, int n)
{
    float lane[16];
    int i = 0;
    for (int j = 0; j < 16; j++) lane[j] = MINUS_INFINITY;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lane[j] = logits[i + j] > lane[j] ? logits[i + j] : lane[j];
    for (; i < n; i++) lane[0] = logits[i] > lane[0] ? logits[i] : lane[0];
    for (int j = 1; j < 16; j++) lane[0] = lane[j] > lane[0] ? lane[j] : lane[0];
    return lane[0];
}

int32_t gemma3_argmax(const float *logits, int n_vocab)
{
    fp_state fp = fp_enter();
    float top = largest_of(logits, n_vocab);
    int32_t id = 0;
    while (top > MINUS_INFINITY && logits[id] != top) id++;
    fp_leave(fp);
    return id;
}

double gemma3_nll(const float *logits, int n_vocab, int32_t id)
{
    fp_state fp = fp_enter();
    float max = largest_of(logits, n_vocab);
    int k = 0;
    while (!cpu_has(all_kernels[k]->name)) k++;
    double sum = all_kernels[k]->sum_exp(logits, n_vocab, max);
    double nll = ((double)max - logits[id]) + log_double(sum);
    fp_leave(fp);
    return nll;
}

/* ---- Sampling (README, rule 8) ---- */

gemma3_sampler gemma3_sampler_new(uint64_t seed)
{
    gemma3_sampler s = {.temperature = 1, .top_k = 64, .top_p = 0.95f, .repeat_penalty = 1};
    uint64_t z = seed + 0x9E3779B97F4A7C15; /* splitmix64 */
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    z ^= z >> 31;
    s.rng = z ? z : 1;
    return s;
}

void gemma3_sampler_accept(gemma3_sampler *s, int32_t id)
{
    s->last[s->n_last++ % GEMMA3_PENALTY_WINDOW] = id;
    if (s->n_last == 2 * GEMMA3_PENALTY_WINDOW) s->n_last = GEMMA3_PENALTY_WINDOW;
}

static float next_uniform(gemma3_sampler *s) /* xorshift64*, 24 bits, [0, 1) */
{
    s->rng ^= s->rng >> 12;
    s->rng ^= s->rng << 25;
    s->rng ^= s->rng >> 27;
    return (float)(s->rng * 0x2545F4914F6CDD1D >> 40) * 0x1p-24f;
}

/* Whether the repeat penalty changes id: whether it is among the first n of the last ids. */
static int is_recent(const gemma3_sampler *s, int n, int32_t id)
{
    n = s->repeat_penalty == 1 ? 0 : min_int(n, s->n_last);
    for (int j = 0; j < n; j++)
        if (s->last[j] == id) return 1;
    return 0;
}

static gemma3_candidate candidate(const gemma3_sampler *s, const float *logits, int32_t id)
{
    float r = is_recent(s, GEMMA3_PENALTY_WINDOW, id) ? s->repeat_penalty : 1;
    float l = logits[id] > 0 ? logits[id] / r : logits[id] * r;
    return (gemma3_candidate){l == l ? l : MINUS_INFINITY, id}; /* NaN never wins */
}

/* Orders of candidates: the best first, which is logit down and id up; and id up. */
static int is_better(gemma3_candidate a, gemma3_candidate b)
{
    return a.logit != b.logit ? a.logit > b.logit : a.id < b.id;
}

static int has_lower_id(gemma3_candidate a, gemma3_candidate b) { return a.id < b.id; }

/* Shell's sort: insertion sort of every gap-th element, for gaps down to 1. */
INLINE void sort(gemma3_candidate *c, int n, int (*before)(gemma3_candidate, gemma3_candidate))
{
    for (int gap = n; gap > 1;) {
        gap = gap < 5 ? 1 : (int)(gap * (5 / 11.0));
        for (int i = gap, j; i < n; i++) {
            gemma3_candidate new = c[i];
            for (j = i; j >= gap && before(new, c[j - gap]); j -= gap) c[j] = c[j - gap];
            c[j] = new;
        }
    }
}

/* Puts the k best of n_vocab candidates into c, the best first. They gather until there are 2k;
 * then the worse half goes, and only what is better than the last one left may still come. Runs of
 * 256 logits below it are passed over; recent ids come first, as the penalty changes theirs. */
static void keep_best(const gemma3_sampler *s, const float *logits, int n_vocab,
                      gemma3_candidate *c, int k)
{
    gemma3_candidate last = {MINUS_INFINITY, INT32_MAX};
    int n = 0, n_recent = s->repeat_penalty == 1 ? 0 : min_int(s->n_last, GEMMA3_PENALTY_WINDOW);
    for (int j = 0; j < n_recent; j++)
        if (s->last[j] >= 0 && s->last[j] < n_vocab && !is_recent(s, j, s->last[j]))
            c[n++] = candidate(s, logits, s->last[j]);
    for (int32_t id = 0, end; id < n_vocab; id = end) {
        end = id + min_int(n_vocab - id, 256);
        if (largest_of(logits + id, end - id) < last.logit) continue;
        for (; id < end; id++) {
            if (logits[id] < last.logit || is_recent(s, GEMMA3_PENALTY_WINDOW, id)) continue;
            gemma3_candidate new = candidate(s, logits, id);
            if (is_better(new, last)) c[n++] = new;
        }
        if (n - k < k) continue;
        sort(c, n, is_better);
        last = c[(n = k) - 1];
    }
    sort(c, n, is_better);
}

static float weight(const gemma3_sampler *s, float logit, float top)
{
    return exp_f32((logit - top) / s->temperature);
}

/* Draws one of the best n candidates, whose logits become weights; -1 when there are more and top-p
 * may want them. Far below min_p nothing can be drawn any more: the rest is not looked at. */
static int32_t draw(gemma3_sampler *s, gemma3_candidate *c, int n, int more, float top, float limit)
{
    float sum = 0, total = 0, e = s->min_p;
    int kept = 0;
    for (; kept < n && (kept == 0 || (sum < limit && !(e < s->min_p / 2))); kept++) {
        c[kept].logit = e = weight(s, c[kept].logit, top);
        sum += e;
        if (e >= s->min_p) total += e;
    }
    if (kept == n && more) return -1;
    float u = next_uniform(s) * total;
    int32_t chosen = c[0].id;
    sum = 0;
    for (int j = 0; j < kept && !(sum > u); j++)
        if (c[j].logit >= s->min_p) sum += c[j].logit, chosen = c[j].id;
    return chosen;
}

int32_t gemma3_sample(gemma3_sampler *s, const float *logits, int n_vocab, gemma3_candidate *c)
{
    fp_state fp = fp_enter();
    float lane[16] = {0};
    int n = s->temperature > 0 ? n_vocab : 1;
    if (s->top_k > 0) n = min_int(n, s->top_k);
    int all = n == n_vocab, k = all ? min_int(n, 1024) : n; /* of all, the best may do for top-p */
    keep_best(s, logits, n_vocab, c, k);
    int32_t chosen = c[0].id;
    float top = c[0].logit;
    if (n > 1 && top - top == 0) {
        if (!all) sort(c, n, has_lower_id);
        for (int j = 0; j < n; j++) {
            gemma3_candidate next = all ? candidate(s, logits, j) : c[j];
            lane[next.id % 16] += weight(s, next.logit, top);
        }
        if (!all) sort(c, n, is_better);
        float limit = s->top_p * join_lanes(lane);
        while ((chosen = draw(s, c, k, k < n, top, limit)) < 0) {
            k = k > n / 8 ? n : 8 * k;
            keep_best(s, logits, n_vocab, c, k);
        }
    }
    fp_leave(fp);
    return chosen;
}

/* ---- SHA-256 (FIPS 180-4) ---- */

static uint32_t rotate_right(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* Constants: the first 32 bits of the fractions of the cube roots of the first 64 primes. */
static const uint32_t sha256_k[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

static void sha256_block(gemma3_sha256 *c)
{
    uint32_t w[64], v[8]; /* v: a b c d e f g h of the standard */
    memcpy(v, c->h, sizeof v);
    for (int i = 0; i < 64; i++) {
        const uint8_t *p = c->block + 4 * (i % 16);
        w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
        if (i >= 16) {
            uint32_t x = w[i - 15], y = w[i - 2];
            w[i] = w[i - 16] + (rotate_right(x, 7) ^ rotate_right(x, 18) ^ x >> 3) +
                   w[i - 7] + (rotate_right(y, 17) ^ rotate_right(y, 19) ^ y >> 10);
        }
        uint32_t t1 = v[7] + ((v[4] & v[5]) ^ (~v[4] & v[6])) + sha256_k[i] + w[i] +
                      (rotate_right(v[4], 6) ^ rotate_right(v[4], 11) ^ rotate_right(v[4], 25));
        uint32_t t2 = ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2])) +
                      (rotate_right(v[0], 2) ^ rotate_right(v[0], 13) ^ rotate_right(v[0], 22));
        memmove(v + 1, v, 7 * sizeof *v);
        v[4] += t1;
        v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++) c->h[i] += v[i];
}

void gemma3_sha256_init(gemma3_sha256 *c)
{
    *c = (gemma3_sha256){{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                          0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, 0, 0, {0}};
}

void gemma3_sha256_add(gemma3_sha256 *c, const void *data, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        c->block[c->n_low++ % 64] = ((const uint8_t *)data)[i];
        c->n_high += c->n_low == 0;
        if (c->n_low % 64 == 0) sha256_block(c);
    }
}

void gemma3_sha256_add_floats(gemma3_sha256 *c, const float *x, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint8_t bytes[4];
        store_u32_le(bytes, bits_of(x[i]));
        gemma3_sha256_add(c, bytes, 4);
    }
}

void gemma3_sha256_end(gemma3_sha256 *c, char hex[65])
{
    uint8_t length[8], pad = 0x80;
    uint64_t n_bits = ((uint64_t)c->n_high << 32 | c->n_low) * 8;
    for (int i = 0; i < 8; i++) length[i] = (uint8_t)(n_bits >> (56 - 8 * i));
    gemma3_sha256_add(c, &pad, 1);
    for (pad = 0; c->n_low % 64 != 56;) gemma3_sha256_add(c, &pad, 1);
    gemma3_sha256_add(c, length, 8);
    for (int i = 0; i < 64; i++)
        hex[i] = "0123456789abcdef"[c->h[i / 8] >> (28 - 4 * (i % 8)) & 15];
    hex[64] = 0;
}

/* ==== 15. Threads and files of the host =========================================================
 *
 * What is asked of an operating system: map a file, count cores, say how much memory there is, start
 * and stop threads. Each has a body for POSIX and one for Windows; below them nothing knows which. */

#if !defined(GEMMA3_NO_FILE)
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>

struct worker {
    gemma3_pool *pool;
    int id;
};
static void worker_main(struct worker *w);

#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

/* Opens a file; *size: its bytes, -1 when it is not a regular file. -1 and errno on failure. */
static int host_open(const char *path, long long *size)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK); /* a FIFO is not waited for */
    *size = fd < 0 || fstat(fd, &st) || !S_ISREG(st.st_mode) ? -1 : (long long)st.st_size;
    return fd;
}

static void host_close(int fd) { close(fd); }

static const void *host_map(int fd, size_t n)
{
    void *data = mmap(NULL, n, PROT_READ, MAP_PRIVATE, fd, 0);
    return data == MAP_FAILED ? NULL : data;
}

static void host_unmap(const gemma3_model *m)
{
    if (m->mapping) munmap((void *)(uintptr_t)m->mapping, m->mapping_bytes);
}

/* madvise for the whole pages inside [begin, begin + n). */
static void advise(const uint8_t *begin, size_t n, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), from = ((uintptr_t)begin + page - 1) / page * page;
    uintptr_t to = ((uintptr_t)begin + n) / page * page;
    if (to > from) madvise((void *)from, to - from, advice);
}

/* After repacking, the file's pages are not needed any more. */
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n)
{
    if (m->mapping) advise(begin, n, MADV_DONTNEED);
}

static void host_use_large_pages(uint8_t *begin, size_t n)
{
#if defined(MADV_HUGEPAGE)
    advise(begin, n, MADV_HUGEPAGE);
#else
    (void)begin, (void)n;
#endif
}

/* Up to two numbers in a file; what is not there, or is "max", leaves *a and *b as they are. */
static void numbers_in(const char *folder, const char *name, double *a, double *b)
{
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, "%lf %lf", a, b) < 0) errno = 0;
    if (f) fclose(f);
}

/* What control groups leave of the machine. Version 2 says "quota period" in cpu.max, version 1 has a
 * file for each. */
struct limits {
    double cpus, bytes;
};

static void limit_by_group(const char *folder, struct limits *least)
{
    double quota = -1, period = 1e5, bytes = -1, unused;
    numbers_in(folder, "cpu.max", &quota, &period);
    numbers_in(folder, "cpu.cfs_quota_us", &quota, &unused);
    numbers_in(folder, "cpu.cfs_period_us", &period, &unused);
    numbers_in(folder, "memory.max", &bytes, &unused);
    numbers_in(folder, "memory.limit_in_bytes", &bytes, &unused);
    if (quota > 0 && period > 0 && quota / period < least->cpus) least->cpus = quota / period;
    if (bytes >= 0 && bytes < least->bytes) least->bytes = bytes;
}

/* The file `self` lists this process's groups as "number:controllers:/path"; version 1 keeps each list of
 * controllers in a folder of that name below root. The groups above bind a group too. */
static struct limits cgroup_limits(const char *self, const char *root)
{
    struct limits least = {1e9, 1e18};
    char line[4096], folder[4200];
    FILE *f = fopen(self, "r");
    while (f && fgets(line, sizeof line, f)) {
        char *list = strchr(line, ':'), *path = list ? strchr(list + 1, ':') : NULL;
        if (!path) continue;
        line[strcspn(line, "\n")] = 0;
        *path++ = 0;
        char *end = folder + snprintf(folder, sizeof folder, "%s/%s", root, list + 1);
        memcpy(end, path, strlen(path) + 1);
        for (char *cut = folder; cut; cut = strrchr(end, '/')) {
            if (cut > folder) *cut = 0;
            limit_by_group(folder, &least);
        }
    }
    if (f) fclose(f);
    return least;
}

/* The cores this process may use: of the hardware threads that share a core one counts (two of them
 * gain nothing where memory or multipliers are the limit), fast and slow cores alike, because tasks go
 * to whoever is free. */
static int host_cores(void)
{
    int cores = (int)sysconf(_SC_NPROCESSORS_ONLN);
#if defined(__linux__)
    enum { MAX_CPUS = 1024 };
    cpu_set_t may_use;
    uint8_t seen[MAX_CPUS] = {0};
    if (sched_getaffinity(0, sizeof may_use, &may_use)) return cores;
    cores = 0;
    for (int cpu = 0; cpu < MAX_CPUS && cpu < CPU_SETSIZE; cpu++) {
        char folder[96];
        double core = cpu, unused; /* named by the first of its threads */
        if (!CPU_ISSET(cpu, &may_use)) continue;
        snprintf(folder, sizeof folder, "/sys/devices/system/cpu/cpu%d/topology", cpu);
        numbers_in(folder, "thread_siblings_list", &core, &unused);
        if (!(core >= 0 && core < MAX_CPUS)) core = cpu;
        cores += !seen[(int)core];
        seen[(int)core] = 1;
    }
#endif
    double cpus = cgroup_limits("/proc/self/cgroup", "/sys/fs/cgroup").cpus;
    return cpus < cores ? (int)cpus + (cpus > (int)cpus) : cores;
}

static double host_memory(void)
{
    struct rlimit space;
    double bytes = (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE);
    double group = cgroup_limits("/proc/self/cgroup", "/sys/fs/cgroup").bytes;
    if (group < bytes) bytes = group;
    if (!getrlimit(RLIMIT_AS, &space) && space.rlim_cur != RLIM_INFINITY && space.rlim_cur < bytes)
        bytes = (double)space.rlim_cur;
    return bytes;
}

struct host_lock { /* and a bell for those who wait under it */
    pthread_mutex_t mutex;
    pthread_cond_t bell;
};
static void lock_init(struct host_lock *l)
{
    pthread_mutex_init(&l->mutex, NULL);
    pthread_cond_init(&l->bell, NULL);
}
static void lock_free(struct host_lock *l)
{
    pthread_cond_destroy(&l->bell);
    pthread_mutex_destroy(&l->mutex);
}
static void lock(struct host_lock *l) { pthread_mutex_lock(&l->mutex); }
static void unlock(struct host_lock *l) { pthread_mutex_unlock(&l->mutex); }
static void wait_for_bell(struct host_lock *l) { pthread_cond_wait(&l->bell, &l->mutex); }
static void ring(struct host_lock *l) { pthread_cond_broadcast(&l->bell); }

typedef pthread_t host_thread;
static void *thread_main(void *worker)
{
    worker_main(worker);
    return NULL;
}
static int host_start(host_thread *t, struct worker *w) { return pthread_create(t, NULL, thread_main, w); }
static void host_join(host_thread t) { pthread_join(t, NULL); }
static void host_yield(void) { sched_yield(); }

#else /* Windows */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <io.h>
#include <sys/stat.h>

/* A path in UTF-8 as Windows wants it: UTF-16 and, marked by \\?\, longer than 260 characters. */
static wchar_t *wide_path(const char *path)
{
    enum { MOST = 32768 };
    wchar_t *wide = calloc(2 * MOST, sizeof *wide), *given = wide + MOST;
    if (!wide || !MultiByteToWideChar(CP_UTF8, 0, path, -1, given, MOST)) return wide;
    memcpy(wide, L"\\\\?\\", 4 * sizeof *wide);
    GetFullPathNameW(given, MOST - 4, wide + 4, NULL);
    if (wide[4] == '\\') memcpy(wide, given, MOST * sizeof *wide); /* a share or a device */
    return wide;
}

static int host_open(const char *path, long long *size)
{
    struct _stat64 st;
    wchar_t *wide = wide_path(path);
    int fd = wide ? _wopen(wide, _O_RDONLY | _O_BINARY) : -1;
    free(wide);
    *size = fd < 0 || _fstat64(fd, &st) || (st.st_mode & _S_IFMT) != _S_IFREG ? -1 : st.st_size;
    return fd;
}

static void host_close(int fd) { _close(fd); }

static const void *host_map(int fd, size_t n)
{
    HANDLE file = CreateFileMappingW((HANDLE)_get_osfhandle(fd), NULL, PAGE_READONLY, 0, 0, NULL);
    const void *data = file ? MapViewOfFile(file, FILE_MAP_READ, 0, 0, n) : NULL;
    if (file) CloseHandle(file);
    if (!data) errno = ENOMEM;
    return data;
}

static void host_unmap(const gemma3_model *m)
{
    if (m->mapping) UnmapViewOfFile(m->mapping);
}

/* Unlocking pages that are not locked drops them from the working set. */
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n)
{
    if (m->mapping) VirtualUnlock((void *)(uintptr_t)begin, n);
}

static void host_use_large_pages(uint8_t *begin, size_t n) { (void)begin, (void)n; } /* a privilege */

static int host_cores(void)
{
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION all[1024];
    DWORD bytes = sizeof all;
    DWORD_PTR may_use = 1, exist;
    int cores = 0;
    GetProcessAffinityMask(GetCurrentProcess(), &may_use, &exist);
    if (!GetLogicalProcessorInformation(all, &bytes)) return 1;
    for (DWORD k = 0; k < bytes / sizeof *all; k++)
        cores += all[k].Relationship == RelationProcessorCore && (all[k].ProcessorMask & may_use);
    return cores;
}

static double host_memory(void)
{
    MEMORYSTATUSEX status = {.dwLength = sizeof status};
    return GlobalMemoryStatusEx(&status) ? (double)status.ullTotalPhys : 0;
}

struct host_lock {
    SRWLOCK mutex;
    CONDITION_VARIABLE bell;
};
static void lock_init(struct host_lock *l) { memset(l, 0, sizeof *l); }
static void lock_free(struct host_lock *l) { (void)l; }
static void lock(struct host_lock *l) { AcquireSRWLockExclusive(&l->mutex); }
static void unlock(struct host_lock *l) { ReleaseSRWLockExclusive(&l->mutex); }
static void wait_for_bell(struct host_lock *l) { SleepConditionVariableSRW(&l->bell, &l->mutex, INFINITE, 0); }
static void ring(struct host_lock *l) { WakeAllConditionVariable(&l->bell); }

typedef HANDLE host_thread;
static DWORD WINAPI thread_main(void *worker)
{
    worker_main(worker);
    return 0;
}
static int host_start(host_thread *t, struct worker *w)
{
    *t = CreateThread(NULL, 0, thread_main, w, 0, NULL);
    return *t ? 0 : -1;
}
static void host_join(host_thread t)
{
    WaitForSingleObject(t, INFINITE);
    CloseHandle(t);
}
static void host_yield(void) { SwitchToThread(); }
#endif

gemma3_model *gemma3_open(const char *path, const gemma3_options *options, gemma3_error *err)
{
    char shortened[SHORT_PATH];
    long long size;
    if (!path) return fail(err, "no path of a model was given");
    const char *name = short_path(path, shortened);
    int fd = host_open(path, &size);
    if (fd < 0) return fail(err, "%s cannot be opened: %s", name, strerror(errno));
    const void *data = size > 0 && (uint64_t)size <= SIZE_MAX ? host_map(fd, (size_t)size) : NULL;
    const char *why = strerror(errno);
    host_close(fd);
    if (size < 0) return fail(err, "%s is not a regular file", name);
    if (size == 0) return fail(err, "%s has 0 bytes: it is empty", name);
    if ((uint64_t)size > SIZE_MAX) return fail(err, "%s has %lld bytes: more than this machine can address", name, size);
    if (!data) return fail(err, "%s cannot be mapped: %s", name, why);
    gemma3_model *m = calloc(1, sizeof *m), unmapped = {.mapping = data, .mapping_bytes = (size_t)size};
    if (!m) {
        host_unmap(&unmapped);
        return fail(err, "%s: out of memory", name);
    }
    m->mapping = data;
    m->mapping_bytes = (size_t)size;
    return open_bytes(data, m->mapping_bytes, path, options, err, m);
}

int gemma3_default_threads(void)
{
    int cores = host_cores();
    return cores < 1 ? 1 : cores > GEMMA3_MAX_THREADS ? GEMMA3_MAX_THREADS : cores;
}

size_t gemma3_memory_limit(void)
{
    double bytes = host_memory();
    return !(bytes > 0) ? 0 : bytes < (double)SIZE_MAX ? (size_t)bytes : SIZE_MAX;
}

/* A call of gemma3_pool_run is a round. Workers enter it while it is open and claim one task after
 * another; it ends when the caller has found none left, closed it, and all who were inside have gone. So
 * task and job change only while nobody is inside. A worker spins a while for the next round, then sleeps. */
struct gemma3_pool {
    int n_threads;
    host_thread *thread;
    gemma3_task *task;                /* of this round, with the next two */
    void *job;
    int n_tasks;
    atomic_int next;                  /* the first task that nobody has claimed */
    atomic_int inside;                /* workers inside; plus OPEN while more may enter */
    atomic_uint round;                /* how many there were: a new number wakes the workers */
    atomic_int sleepers, stop;
    struct host_lock turn;            /* held during a round: states that share a pool take turns */
    struct host_lock sleep;
};

enum { OPEN = 1 << 16, SPINS = 20000 }; /* a fifth of a millisecond: longer than what one thread does alone */

static void relax(int spin)
{
#if defined(HAVE_X86)
    _mm_pause();
#endif
    if (spin % 256 == 255) host_yield();
}

static void claim_tasks(gemma3_pool *pool, int worker)
{
    for (int i; (i = atomic_fetch_add(&pool->next, 1)) < pool->n_tasks;) pool->task(pool->job, i, worker);
}

static int enter_round(gemma3_pool *pool)
{
    int inside = atomic_load(&pool->inside);
    while (inside >= OPEN)
        if (atomic_compare_exchange_weak(&pool->inside, &inside, inside + 1)) return 1;
    return 0;
}

static void sleep_until_round(gemma3_pool *pool, unsigned seen)
{
    lock(&pool->sleep);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->round) == seen && !atomic_load(&pool->stop)) wait_for_bell(&pool->sleep);
    atomic_fetch_sub(&pool->sleepers, 1);
    unlock(&pool->sleep);
}

static void wake_workers(gemma3_pool *pool)
{
    lock(&pool->sleep);
    ring(&pool->sleep);
    unlock(&pool->sleep);
}

static void worker_main(struct worker *w)
{
    struct worker me = *w;
    gemma3_pool *pool = me.pool;
    unsigned seen = 0;
    free(w);
    fp_enter();
    while (!atomic_load(&pool->stop)) {
        for (int spin = 0; spin < SPINS && atomic_load(&pool->round) == seen; spin++) relax(spin);
        if (atomic_load(&pool->round) == seen) sleep_until_round(pool, seen);
        seen = atomic_load(&pool->round);
        if (!enter_round(pool)) continue;
        claim_tasks(pool, me.id);
        atomic_fetch_sub(&pool->inside, 1);
    }
}

void gemma3_pool_run(void *arg, int n_tasks, gemma3_task *task, void *job)
{
    gemma3_pool *pool = arg;
    lock(&pool->turn);
    pool->task = task;
    pool->job = job;
    pool->n_tasks = n_tasks;
    atomic_store(&pool->next, 0);
    atomic_store(&pool->inside, OPEN);
    atomic_fetch_add(&pool->round, 1);
    if (atomic_load(&pool->sleepers)) wake_workers(pool);
    claim_tasks(pool, 0);
    atomic_fetch_sub(&pool->inside, OPEN);
    for (int spin = 0; atomic_load(&pool->inside); spin++) relax(spin);
    unlock(&pool->turn);
}

gemma3_pool *gemma3_pool_new(int n_threads, gemma3_error *err)
{
    gemma3_pool *pool = calloc(1, sizeof *pool);
    if (!pool || !(pool->thread = calloc(n_threads > 0 ? n_threads : 1, sizeof *pool->thread))) {
        free(pool);
        return fail(err, "out of memory for %d threads", n_threads);
    }
    lock_init(&pool->turn);
    lock_init(&pool->sleep);
    for (pool->n_threads = 1; pool->n_threads < n_threads; pool->n_threads++) {
        struct worker *w = malloc(sizeof *w);
        if (w) *w = (struct worker){pool, pool->n_threads};
        if (!w || host_start(&pool->thread[pool->n_threads], w)) {
            fail(err, "thread %d of %d cannot be started", pool->n_threads + 1, n_threads);
            free(w);
            gemma3_pool_free(pool);
            return NULL;
        }
    }
    return pool;
}

void gemma3_pool_free(gemma3_pool *pool)
{
    if (!pool) return;
    atomic_store(&pool->stop, 1);
    wake_workers(pool);
    for (int k = 1; k < pool->n_threads; k++) host_join(pool->thread[k]);
    lock_free(&pool->sleep);
    lock_free(&pool->turn);
    free(pool->thread);
    free(pool);
}
#else
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n) { (void)m, (void)begin, (void)n; }
static void host_use_large_pages(uint8_t *begin, size_t n) { (void)begin, (void)n; }
static void host_unmap(const gemma3_model *m) { (void)m; }
#endif /* GEMMA3_NO_FILE */

/* Stand-ins, drop at merge: the least that lets the command line be written and tested. */
static int32_t standin_ids[1 << 20];

const char *gemma3_model_chat_template(const gemma3_model *m, size_t *n)
{
    *n = standin_template.n;
    return m->can_chat ? standin_template.text : NULL;
}
const char *gemma3_model_note(const gemma3_model *m, int index)
{
    return index == 0 && m->config.final_softcap == 0 && standin_cap > 0 && !standin_obey ?
        "final_logit_softcapping = 30 contradicts Gemma 3's definition and was ignored" : NULL;
}
const char *gemma3_model_origin(const gemma3_model *m, const char *key)
{
    if (!strcmp(key, "final_logit_softcapping") && gemma3_model_note(m, 0)) return "overridden";
    return !strcmp(key, "attention.scale") ? "default" : "";
}
const int32_t *gemma3_state_ids(const gemma3_state *s) { (void)s; return standin_ids; }
void standin_keep(int pos, const int32_t *ids, int n);
void standin_keep(int pos, const int32_t *ids, int n)
{
    if (ids != standin_ids) memcpy(standin_ids + pos, ids, (size_t)n * 4);
}
int gemma3_state_save(gemma3_state *s, gemma3_write *write, void *user, gemma3_error *err)
{
    (void)err;
    return write(user, "state", 5) || write(user, &s->pos, sizeof s->pos) ||
           write(user, standin_ids, (size_t)s->pos * 4);
}
int gemma3_state_load(gemma3_state *s, gemma3_read *read, void *user, gemma3_error *err)
{
    char magic[5];
    int n;
    gemma3_state_reset(s);
    if (read(user, 0, magic, 5) || memcmp(magic, "state", 5)) return fail(err, "this is no state"), -1;
    if (read(user, 5, &n, sizeof n) || read(user, 9, standin_ids, (size_t)n * 4))
        return fail(err, "the state is cut off"), -1;
    return gemma3_forward(s, standin_ids, n, NULL, 0, NULL);
}
#ifndef GEMMA3_NO_MAIN

/* ==== 16. The command line ======================================================================
 *
 * From here on only gemma3.h is used: this is the worked example of the library, and whoever wants
 * the library alone deletes from here to the end. The parts: what is asked of the system, messages,
 * the options, a session (the options and an opened model), numbers out, text out, the jobs.
 *
 * Text and results go to stdout, everything else to stderr. Whatever fails says why in one sentence
 * and ends the program: exit code 1, or 2 when the command line was wrong. */

#include "gemma3.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    MAX_PATH_BYTES = 4096,
    MAX_TEXT_BYTES = 1 << 29, /* of a prompt: the tokenizer takes no more */
    MAX_STOPS = 32,          /* --stop texts */
    MAX_STOP_BYTES = 1000,   /* of one of them */
};

/* ---- Command line: what is asked of the system ---- */

/* Set by Ctrl-C while an answer is written. A signal handler can be given nothing, so this is the
 * one variable of the program that does not live in a struct. */
static volatile sig_atomic_t interrupted;

static void note_interrupt(int signal_number)
{
    interrupted = 1;
    signal(signal_number, SIG_DFL); /* whoever cannot wait presses it again */
}

/* 1: Ctrl-C sets interrupted. 0: it ends the program, as it ends any other. */
static void catch_interrupts(int on)
{
    interrupted = 0;
    signal(SIGINT, on ? note_interrupt : SIG_DFL);
}

/* Streams and signals as the rest expects them, and the arguments in UTF-8. No file that we open
 * may get the number of a stream that the caller has closed: what stands in for that can be neither
 * read nor written. A reader that goes away, or a file beyond its limit, is an error of writing. */
static char **start_program(char **argv)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) < 0) break;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    return argv;
}

static int is_terminal(FILE *f)
{
    return isatty(fileno(f));
}

static double seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Bytes of a regular file. -1: there is none; -2: it is a device, a pipe or a folder. */
static long long file_size(const char *path)
{
    struct stat st;
    if (stat(path, &st)) return -1;
    return S_ISREG(st.st_mode) ? (long long)st.st_size : -2;
}

/* Where a path leads through links. */
static void real_path(const char *path, char real[MAX_PATH_BYTES])
{
    char *found = realpath(path, NULL);
    snprintf(real, MAX_PATH_BYTES, "%s", found ? found : path);
    free(found);
}

/* Gives a file its name, also when another one has it. */
static int replace_file(const char *from, const char *to)
{
    return rename(from, to);
}

/* Where the program with this argv[0] lies: what has no slash was found through $PATH. */
static void program_path(const char *name, char path[MAX_PATH_BYTES])
{
    char found[MAX_PATH_BYTES];
    const char *dir = strchr(name, '/') ? NULL : getenv("PATH");
    snprintf(found, sizeof found, "%s", name);
    for (size_t n; dir && *dir; dir += n + (dir[n] == ':')) {
        n = strcspn(dir, ":");
        snprintf(found, sizeof found, "%.*s/%s", n ? (int)n : 1, n ? dir : ".", name);
        if (file_size(found) >= 0 && access(found, X_OK) == 0) break;
    }
    real_path(found, path);
}

/* ---- Command line: messages ---- */

/* Text from anywhere, for people: whole characters, and none that a terminal obeys (U+0000 to 1F
 * and 7F to 9F). */
static void print_safe(FILE *f, const char *text)
{
    gemma3_utf8 whole = {.n = 0};
    char c[8];
    for (; *text; text++) {
        int n = gemma3_utf8_push(&whole, (unsigned char)*text, c); /* 0 within a character */
        if (n == 2 && memcmp(c, "\xC2\xA0", 2) < 0) c[0] = 127, n = 1;
        if (n && ((unsigned char)c[n - 1] < 32 || c[n - 1] == 127)) c[n - 1] = '?';
        fwrite(c, 1, (size_t)n, f);
    }
    fwrite(c, 1, (size_t)gemma3_utf8_end(&whole, c), f);
}

enum { NOTE, FAILED, WRONG }; /* what a sentence means: the exit codes 1 and 2 end the program */

static void say(int code, const char *format, ...)
{
    char text[2 * MAX_PATH_BYTES];
    va_list list;
    va_start(list, format);
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fputs("gemma3: ", stderr);
    print_safe(stderr, text);
    fputs(code == WRONG ? " (gemma3 --help lists the options)\n" : "\n", stderr);
    if (code) exit(code);
}

static void *reallocate(void *old, size_t n_bytes, const char *what)
{
    void *p = realloc(old, n_bytes);
    if (!p) say(FAILED, "out of memory: %s needs %zu bytes", what, n_bytes);
    return p;
}

static void *allocate(size_t n_bytes, const char *what)
{
    return reallocate(NULL, n_bytes, what);
}

/* What was written gets out, or we say why not: errno is that of the write that failed, now or
 * before. A reader that has gone away knows. */
static void flush(FILE *f, const char *name)
{
    if (fflush(f) == 0 && !ferror(f)) return;
    if (errno == EPIPE) exit(FAILED);
    say(FAILED, "%s: %s", name, strerror(errno ? errno : EIO));
}

/* ---- Command line: the options ---- */

/* A file has another name beside its own until it is whole: a job that ends early leaves what was
 * there. Devices and pipes are written as they are. */
struct file_out {
    const char *name;        /* as messages call it */
    FILE *file;
    char path[MAX_PATH_BYTES], part[MAX_PATH_BYTES + 8]; /* part "": written as it is */
};

/* What the options say, and an opened model with all that belongs to it. */
struct session {
    const char *path, *prompt, *file, *ids_file, *system, *seed, *stop[MAX_STOPS + 1];
    const char *state_file, *logits_file, *positions, *tokenize, *detokenize, *kv;
    int chats, special, no_bos, prints_ids, hash, info, version, help;
    int n_predict;           /* -1: until a stop token */
    int numbers, writes;     /* --logits or --hash; text is generated */
    int fault;               /* first position whose logits are not numbers, or -1 */
    gemma3_options options;
    gemma3_params params;
    gemma3_sampler sampler;
    gemma3_pool *pool;
    gemma3_model *model;
    const gemma3_config *config;
    const gemma3_tokenizer *tokenizer;
    gemma3_state *state;
    gemma3_candidate *candidates; /* [n_vocab] */
    float *logits;           /* [GEMMA3_MAX_UBATCH][n_vocab]; of text [1][n_vocab] */
    int32_t *ids;            /* [n_ids] the prompt */
    int n_ids;
    char *wanted;            /* [n_ids] 1: this row is for --logits and --hash; or NULL */
    gemma3_sha256 sha256;
    struct file_out to;      /* --logits, --state */
    FILE *out;               /* stdout, or stderr while the logits go to stdout */
    gemma3_utf8 utf8;        /* text on its way out: whole characters only, and */
    char held[MAX_STOP_BYTES + 1]; /* nothing that may begin a --stop text before that is decided */
    size_t n_held;
    int n_printed, stopped;  /* ids of this text; a --stop text came */
    int n_read, n_written;   /* tokens, for the speed */
    double read_seconds, write_seconds;
};

enum option_kind { HEADING, FLAG, WHOLE, REAL, TEXT };

struct option {
    const char *name;        /* as typed; of a HEADING, the heading */
    const char *value;       /* what --help calls the value; in [ ]: it may be absent */
    enum option_kind kind;
    size_t field;            /* where it goes: an int, int, float or const char * of the session */
    double least, most;      /* of a number; most of a TEXT: how many may be given */
    const char *help;
};

#define FIELD(name) offsetof(struct session, name)

static const struct option options[] = {
    {"What to read", "", HEADING, 0, 0, 0, ""},
    {"-m", "MODEL", TEXT, FIELD(path), 0, 1, "a Gemma 3 GGUF; default: the small one in weights/"},
    {"-p", "TEXT", TEXT, FIELD(prompt), 0, 1, "continue TEXT, as it stands, after <bos>"},
    {"-f", "FILE", TEXT, FIELD(file), 0, 1, "continue the text in FILE; - is stdin"},
    {"--ids", "FILE", TEXT, FIELD(ids_file), 0, 1, "continue exactly the ids in FILE; - is stdin"},
    {"-i", "", FLAG, FIELD(chats), 0, 0,
     "chat, in Gemma's turns; /clear forgets, /quit ends, Ctrl-C stops an answer;\n"
     "                       a line that ends in \\ goes on in the next"},
    {"--system", "TEXT", TEXT, FIELD(system), 0, 1, "put before the first turn of a chat"},
    {"--state", "FILE", TEXT, FIELD(state_file), 0, 1,
     "where a prompt's state, or a --system text's, is kept: computed once, then read"},
    {"--special", "", FLAG, FIELD(special), 0, 0, "read and print control tokens as their text"},
    {"--no-bos", "", FLAG, FIELD(no_bos), 0, 0, "no <bos> before the text"},
    {"What to write", "", HEADING, 0, 0, 0, ""},
    {"-n", "N", WHOLE, FIELD(n_predict), 0, INT_MAX,
     "tokens to generate; default: until a stop token or a full context"},
    {"--temp", "T", REAL, FIELD(sampler.temperature), 0, 1e6, "0: the likeliest always; default 1"},
    {"--top-k", "K", WHOLE, FIELD(sampler.top_k), 0, INT_MAX,
     "choose among the K likeliest; 0: all; default 64"},
    {"--top-p", "P", REAL, FIELD(sampler.top_p), 0, 1,
     "among the likeliest that have probability P together; default 0.95"},
    {"--min-p", "P", REAL, FIELD(sampler.min_p), 0, 1,
     "among those with P times the largest probability; default 0"},
    {"--repeat-penalty", "R", REAL, FIELD(sampler.repeat_penalty), 1e-6, 1e6,
     "against repeating any of the last 64 tokens; default 1: none"},
    {"--seed", "S", TEXT, FIELD(seed), 0, 1, "a seed gives the same text everywhere; default 42"},
    {"--stop", "TEXT", TEXT, FIELD(stop), 0, MAX_STOPS, "end before TEXT; may be given repeatedly"},
    {"--out-ids", "", FLAG, FIELD(prints_ids), 0, 0, "print the ids generated, not their text"},
    {"Numbers instead of text (with -n text is generated too)", "", HEADING, 0, 0, 0, ""},
    {"--logits", "FILE", TEXT, FIELD(logits_file), 0, 1,
     "float32, little-endian, [positions][n_vocab]; -: stdout, the rest on stderr"},
    {"--positions", "LIST", TEXT, FIELD(positions), 0, 1,
     "which rows, ascending, as 0,5,-1; from the end when negative; default: all"},
    {"--hash", "", FLAG, FIELD(hash), 0, 0, "contract, mode, cache, SHA-256 of those same logits"},
    {"--tokenize", "[TEXT]", TEXT, FIELD(tokenize), 0, 1, "ids of TEXT, or of the text of -f"},
    {"--detokenize", "IDS", TEXT, FIELD(detokenize), 0, 1, "bytes of the ids, as \"2 818 5279\""},
    {"How to compute", "", HEADING, 0, 0, 0, ""},
    {"-c", "N", WHOLE, FIELD(params.n_ctx), 1, 1 << 24,
     "context in tokens; default: the smaller of the model's and 4096"},
    {"-t", "N", WHOLE, FIELD(params.n_threads), 1, GEMMA3_MAX_THREADS, "default: physical cores"},
    {"-b", "N", WHOLE, FIELD(params.n_batch), 1, INT_MAX, "prompt's tokens at once; default 512"},
    {"--exact", "", FLAG, FIELD(options.exact), 0, 0, "weights and activations in float32"},
    {"--kv", "f16|f32", TEXT, FIELD(kv), 0, 1, "type of the cache; default f16, with --exact f32"},
    {"--isa", "NAME", TEXT, FIELD(options.isa), 0, 1, "force kernels; list: what this CPU can run"},
    {"--no-repack", "", FLAG, FIELD(options.no_repack), 0, 0,
     "use the weights where they lie: opens faster, runs slower, same bits"},
    {"--obey-file", "", FLAG, FIELD(options.obey_file), 0, 0,
     "keys of the file win even where they contradict what the model is"},
    {"About", "", HEADING, 0, 0, 0, ""},
    {"--info", "", FLAG, FIELD(info), 0, 0, "the model's hyperparameters, and memory in bytes"},
    {"--version", "", FLAG, FIELD(version), 0, 0, "of the program and of the numeric contract"},
    {"--help", "", FLAG, FIELD(help), 0, 0, "this text"},
    {NULL, NULL, HEADING, 0, 0, 0, NULL},
};

static void print_help(void)
{
    puts("usage: gemma3 [-m MODEL] -p TEXT | -f FILE | --ids FILE | -i  [options]\n\n"
         "Runs Gemma 3. For a model and a sequence of ids, mode (--exact or not) and --kv give\n"
         "one bit pattern of logits, on every machine and with every other option.");
    for (const struct option *o = options; o->name; o++)
        if (o->kind == HEADING) printf("\n%s:\n", o->name);
        else printf("  %s %-*s%s\n", o->name, 20 - (int)strlen(o->name), o->value, o->help);
    puts("\nScores and tensors inside: make conform, then test/conform --help.\n"
         "Exit: 0, 1 when the job failed, 2 when the command line was wrong.");
}

static const struct option *find_option(const char *name, size_t n)
{
    for (const struct option *o = options; o->name; o++)
        if (o->kind != HEADING && strlen(o->name) == n && memcmp(o->name, name, n) == 0) return o;
    return NULL;
}

static const char no_text[] = ""; /* --tokenize without its text: the one given by -f is meant */

static void set_option(struct session *s, const struct option *o, const char *text)
{
    char *field = (char *)s + o->field, *end;
    const char **slot = (const char **)(void *)field;
    if (o->kind == FLAG) {
        *(int *)(void *)field = 1;
    } else if (o->kind == TEXT) {
        for (int i = 1; *slot && i < (int)o->most; i++) slot++;
        if (*slot && o->most > 1) say(WRONG, "%s: %.0f of them are possible", o->name, o->most);
        *slot = text;
    } else {
        int whole = o->kind == WHOLE, digits = text[strspn(text, "0123456789")] == 0;
        double x = strtod(text, &end);
        if (end == text || *end || (whole && !digits) || !(x >= o->least && x <= o->most))
            say(WRONG, "%s %s: expected a %s from %.10g to %.10g", o->name, text,
                whole ? "whole number" : "number", o->least, o->most);
        if (whole) *(int *)(void *)field = (int)x;
        else *(float *)(void *)field = (float)x;
    }
}

/* What measures numbers is a program of its own now. */
static void refuse_name(const char *name, size_t n)
{
    static const char *const moved[] = {"--nll", "--perplexity", "--top", "--trace", "--trace-dir"};
    for (int i = 0; i < 5; i++)
        if (strlen(moved[i]) == n && memcmp(moved[i], name, n) == 0)
            say(WRONG, "%s is now `test/conform %.*s` (make conform)", moved[i],
                (int)strcspn(name + 2, "-="), name + 2);
    say(WRONG, *name == '-' ? "unknown option %s" : "unexpected argument \"%s\"", name);
}

/* Both "--seed 7" and "--seed=7". */
static void parse_options(struct session *s, char **arg)
{
    while (*arg) {
        const char *name = *arg++, *text = *arg;
        size_t n = strncmp(name, "--", 2) == 0 ? strcspn(name, "=") : strlen(name);
        const struct option *o = find_option(name, n);
        if (!o) refuse_name(name, n);
        if (name[n] == '=' && o->kind == FLAG) say(WRONG, "%s takes no value", o->name);
        if (name[n] == '=') text = name + n + 1;
        else if (o->value[0] == '[' && (!text || find_option(text, strlen(text)))) text = no_text;
        else if (o->kind != FLAG && !*arg++) say(WRONG, "%s needs a value: %s", o->name, o->value);
        set_option(s, o, text);
    }
}

static void check_isa(const char *isa)
{
    char list[256] = "";
    for (int i = 0; gemma3_isa_name(i); i++) {
        if (strcmp(gemma3_isa_name(i), isa) == 0) return;
        size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, " %s", gemma3_isa_name(i));
    }
    say(WRONG, "--isa %s: this CPU can run%s", isa, list);
}

/* One thing to do, and nothing that would have no effect. */
static void check_options(struct session *s)
{
    int of_file = s->tokenize == no_text, n_prompts = !!s->prompt + !!s->file + !!s->ids_file;
    int n_jobs = n_prompts + s->chats + (s->tokenize && !of_file) + !!s->detokenize + s->info;
    int continues = n_prompts && !of_file;
    s->numbers = s->logits_file || s->hash;
    s->writes = s->n_predict != 0 && (s->chats || (continues && (!s->numbers || s->n_predict > 0)));
    if (s->logits_file && strcmp(s->logits_file, "-") == 0) s->out = stderr;
    if (of_file && !s->file) say(WRONG, "--tokenize needs a TEXT or -f FILE");
    if (n_jobs > 1)
        say(WRONG, "contradictory: one of -p, -f, --ids, -i, --tokenize TEXT, --detokenize and "
            "--info, not several");
    if (n_jobs == 0)
        say(WRONG, "nothing to do: give a prompt with -p TEXT, -f FILE (- is stdin) or --ids FILE, "
            "or chat with -i");
    if (s->kv && strcmp(s->kv, "f16") != 0 && strcmp(s->kv, "f32") != 0)
        say(WRONG, "--kv %s: expected f16 or f32", s->kv);
    if (s->numbers && !continues) say(WRONG, "--logits and --hash need -p, -f or --ids");
    if (s->positions && !s->numbers) say(WRONG, "--positions needs --logits or --hash");
    if (s->n_predict > 0 && !s->writes)
        say(WRONG, "-n needs a prompt to continue: -p, -f, --ids or -i");
    if (s->system && !s->chats) say(WRONG, "--system needs -i");
    if (s->state_file && (s->numbers || !(continues || s->chats)))
        say(WRONG, "--state needs a text to continue, and neither --logits nor --hash");
    for (const char **stop = s->stop; *stop; stop++)
        if (!**stop || strlen(*stop) > MAX_STOP_BYTES)
            say(WRONG, "--stop: expected a text of 1 to %d bytes", MAX_STOP_BYTES);
    if (s->options.isa) check_isa(s->options.isa);
    char *end;
    errno = 0;
    s->sampler.rng = gemma3_sampler_new(strtoull(s->seed, &end, 10)).rng;
    if (*s->seed < '0' || *s->seed > '9' || *end || errno)
        say(WRONG, "--seed %s: expected a whole number from 0 to 2^64-1", s->seed);
}

/* Takes the next number of a list parted by spaces, line ends or commas. 0: that was all; -1: there
 * is something else. */
static int next_number(const char **list, int *x)
{
    static const char between[] = ", \t\r\n\v\f";
    char *end;
    *list += strspn(*list, between);
    if (**list == 0) return 0;
    errno = 0;
    long number = strtol(*list, &end, 10);
    if (end == *list || (*end && !strchr(between, *end)) || errno || number != (int32_t)number)
        return -1;
    *list = end;
    *x = (int)number;
    return 1;
}

/* ---- Command line: a session ---- */

static void show_loading(void *user, double fraction)
{
    (void)user;
    fprintf(stderr, fraction < 1 ? "\rloading %3.0f %%" : "\r             \r", 100 * fraction);
}

/* The model that comes with the program lies in weights/ or beside it, or where we are. */
static const char *find_model(const char *program, char path[MAX_PATH_BYTES])
{
    char real[MAX_PATH_BYTES];
    program_path(program, real);
    int n_folder = strrchr(real, '/') ? (int)(strrchr(real, '/') - real) + 1 : 0;
    for (int i = 0; i < 4; i++) {
        snprintf(path, MAX_PATH_BYTES, "%.*s%sgemma3-folktales-q4_0.gguf", i < 2 ? n_folder : 0,
                 real, i % 2 ? "" : "weights/");
        if (file_size(path) >= 0) return path;
    }
    say(WRONG, "no model: give -m MODEL.gguf");
    return NULL;
}

/* What will not fit is said before it is tried. Weights used where they lie in the file need none. */
static void check_memory(const struct session *s, size_t n_weights, size_t n_state)
{
    size_t limit = gemma3_memory_limit();
    if (s->options.no_repack) n_weights = 0;
    if (limit && (n_state > limit || n_weights > limit - n_state))
        say(FAILED, "out of memory: the weights need %zu MB, what -c %d asks for %zu MB, and this "
            "process may use %zu MB (--no-repack and a smaller -c need less)", n_weights >> 20,
            s->params.n_ctx, n_state >> 20, limit >> 20);
}

static void open_model(struct session *s, int computes)
{
    gemma3_error err;
    gemma3_options *o = &s->options;
    const char *note;
    long long size = file_size(s->path);
    if (computes && size > 0) check_memory(s, (size_t)size, 0);
    s->pool = gemma3_pool_new(s->params.n_threads, &err);
    if (!s->pool) say(FAILED, "%s", err.text);
    o->no_repack |= !computes;
    o->n_threads = s->params.n_threads;
    o->parallel_for = s->params.parallel_for = gemma3_pool_run;
    o->pool = s->params.pool = s->pool;
    o->progress = computes && is_terminal(stderr) ? show_loading : NULL;
    s->model = gemma3_open(s->path, o, &err);
    if (!s->model) say(FAILED, "%s", err.text);
    s->config = gemma3_model_config(s->model);
    s->tokenizer = gemma3_model_tokenizer(s->model);
    gemma3_params usual = gemma3_default_params(s->model);
    if (!s->params.n_ctx) s->params.n_ctx = usual.n_ctx;
    s->params.kv_type = usual.kv_type;
    if (s->kv) s->params.kv_type = strcmp(s->kv, "f32") == 0 ? GEMMA3_KV_F32 : GEMMA3_KV_F16;
    for (int i = 0; (note = gemma3_model_note(s->model, i)); i++) say(NOTE, "%s", note);
    if (computes && s->params.n_ctx > s->config->n_ctx_train)
        say(NOTE, "-c %d goes beyond the %d tokens the model was trained on (RoPE factor %g): what it "
            "writes after them may make no sense", s->params.n_ctx, s->config->n_ctx_train,
            (double)s->config->rope_factor);
}

/* What computing needs besides the model. */
static void open_state(struct session *s)
{
    size_t n_vocab = (size_t)s->config->n_vocab;
    size_t n_rows = s->numbers ? GEMMA3_MAX_UBATCH : 1;
    gemma3_error err;
    check_memory(s, gemma3_model_weight_bytes(s->model),
                 gemma3_state_size(s->model, &s->params) + n_rows * n_vocab * sizeof *s->logits);
    s->state = gemma3_state_new(s->model, &s->params, &err);
    if (!s->state) say(FAILED, "%s", err.text);
    s->logits = allocate(n_rows * n_vocab * sizeof *s->logits, "the logits");
    s->candidates = allocate(n_vocab * sizeof *s->candidates, "sampling");
}

/* All bytes of a file, "-" being stdin, and a NUL after them; allocated. */
static char *read_file(const char *path, size_t *n)
{
    FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    if (!f) say(FAILED, "%s: %s", path, strerror(errno));
    long long size = f == stdin ? 0 : file_size(path);
    char *bytes = NULL;
    for (size_t room = *n = 0; *n == room; ) {
        if (size <= (long long)room) size = (long long)room;
        if (size > MAX_TEXT_BYTES)
            say(FAILED, "%s: %lld bytes, expected at most %d", path, size, MAX_TEXT_BYTES);
        bytes = reallocate(bytes, (room = 2 * room + 65536) + 1, path);
        *n += fread(bytes + *n, 1, room - *n, f);
        if (ferror(f)) say(FAILED, "%s: %s", path, strerror(errno));
    }
    if (f != stdin) fclose(f);
    bytes[*n] = 0;
    return bytes;
}

static void encode_text(struct session *s, const char *text, size_t n)
{
    int flags = (s->no_bos ? 0 : GEMMA3_BOS) | (s->special ? GEMMA3_SPECIAL : 0);
    if (flags == (GEMMA3_BOS | GEMMA3_SPECIAL) && n >= 5 && memcmp(text, "<bos>", 5) == 0) {
        say(NOTE, "the text begins with <bos>: no other is put before it");
        flags = GEMMA3_SPECIAL;
    }
    s->ids = allocate((n + 1) * sizeof *s->ids, "the text's ids");
    s->n_ids = gemma3_encode(s->tokenizer, text, n, flags, s->ids, (int)n + 1);
    if (s->n_ids < 0) say(FAILED, "out of memory: encoding needs %zu bytes", gemma3_encode_work(n));
}

/* The ids spelled in n bytes of text. */
static void parse_ids(struct session *s, const char *text, size_t n, const char *where)
{
    const char *left = n >= 3 && memcmp(text, "\xEF\xBB\xBF", 3) == 0 ? text + 3 : text; /* BOM */
    int id, found;
    s->ids = allocate((n / 2 + 1) * sizeof *s->ids, where);
    while ((found = next_number(&left, &id)) > 0) {
        if (id < 0 || id >= s->config->n_vocab)
            say(FAILED, "%s: id %d is outside the vocabulary, 0 to %d", where, id,
                s->config->n_vocab - 1);
        s->ids[s->n_ids++] = id;
    }
    if (found < 0 || left < text + n)
        say(FAILED, "%s: expected ids parted by spaces or line ends, found \"%.20s\"", where,
            found ? left : "a zero byte");
}

/* Fills s->ids with what is to be continued or shown. */
static void read_prompt(struct session *s)
{
    const char *path = s->ids_file ? s->ids_file : s->file;
    const char *text = s->prompt ? s->prompt : s->tokenize;
    size_t n = path ? 0 : strlen(text);
    char *bytes = path ? read_file(path, &n) : NULL;
    if (s->ids_file) parse_ids(s, bytes, n, path);
    else encode_text(s, bytes ? bytes : text, n);
    free(bytes);
}

/* ---- Command line: numbers out ---- */

static void open_out(struct file_out *o, const char *path)
{
    char magic[4] = "";
    long long size = file_size(path);
    *o = (struct file_out){.name = "standard output", .file = stdout};
    if (strcmp(path, "-") == 0) return;
    if (size >= 0) {
        FILE *old = fopen(path, "r+b"); /* what may not be written is not replaced either */
        if (!old) say(FAILED, "%s: %s", path, strerror(errno));
        if (fread(magic, 1, 4, old) == 4 && memcmp(magic, "GGUF", 4) == 0)
            say(FAILED, "%s: this is a model, which would be overwritten", path);
        fclose(old);
    }
    o->name = path;
    real_path(path, o->path);
    if (size != -2) snprintf(o->part, sizeof o->part, "%s.part", o->path);
    o->file = fopen(size == -2 ? path : o->part, "wb");
    if (!o->file) say(FAILED, "%s: %s", path, strerror(errno));
}

static void write_out(struct file_out *o, const void *bytes, size_t n)
{
    if (fwrite(bytes, 1, n, o->file) == n && fflush(o->file) == 0) return;
    if (o->part[0]) remove(o->part);
    flush(o->file, o->name);
}

static void close_out(struct file_out *o)
{
    int failed = o->file != stdout && fclose(o->file);
    if (failed || (o->part[0] && replace_file(o->part, o->path)))
        say(FAILED, "%s: %s", o->name, strerror(errno));
}

/* --positions, or all. */
static void choose_rows(struct session *s)
{
    const char *left = s->positions;
    int x, found = 0, last = -1;
    s->wanted = allocate((size_t)s->n_ids, "--positions");
    memset(s->wanted, !left, (size_t)s->n_ids);
    while (left && (found = next_number(&left, &x)) > 0) {
        int position = x < 0 ? x + s->n_ids : x;
        if (position < 0 || position >= s->n_ids)
            say(FAILED, "--positions %d: the prompt has %d tokens", x, s->n_ids);
        if (position <= last)
            say(FAILED, "--positions: expected them to ascend, found %d after %d", position, last);
        s->wanted[last = position] = 1;
    }
    if (found < 0 || (left && last < 0))
        say(WRONG, "--positions \"%s\": expected whole numbers parted by commas or spaces",
            s->positions);
}

/* Float32 as little-endian bytes on any machine. */
static void write_row(struct session *s, const float *row)
{
    unsigned char *bytes = (unsigned char *)s->candidates; /* idle meanwhile, and large enough */
    size_t n = (size_t)s->config->n_vocab;
    for (size_t i = 0; i < n; i++) {
        uint32_t u;
        memcpy(&u, &row[i], 4);
        for (int k = 0; k < 4; k++) bytes[4 * i + k] = (unsigned char)(u >> 8 * k);
    }
    gemma3_sha256_add(&s->sha256, bytes, 4 * n);
    if (s->logits_file) write_out(&s->to, bytes, 4 * n);
}

static int are_numbers(const float *x, size_t n)
{
    int all = 1;
    for (size_t i = 0; i < n; i++) all &= isfinite(x[i]) != 0;
    return all;
}

/* Every token goes through here: into the cache, and into what the repeat penalty remembers. */
static void forward(struct session *s, const int32_t *ids, int n, const int *rows, int n_rows)
{
    if (gemma3_forward(s->state, ids, n, rows, n_rows, s->logits))
        say(FAILED, "%s", gemma3_state_error(s->state));
    for (int i = 0; i < n; i++) gemma3_sampler_accept(&s->sampler, ids[i]);
    for (int r = 0; r < n_rows && s->fault < 0; r++)
        if (!are_numbers(s->logits + (size_t)r * s->config->n_vocab, (size_t)s->config->n_vocab))
            s->fault = gemma3_state_pos(s->state) - n + rows[r];
}

/* Takes tokens through the model; s->logits is then the last one's row. */
static void read_tokens(struct session *s, const int32_t *ids, int n)
{
    size_t n_vocab = (size_t)s->config->n_vocab;
    double start = seconds();
    for (int i = 0, count; i < n; i += count) {
        int rows[GEMMA3_MAX_UBATCH], n_rows = 0, most = s->params.n_batch;
        if (most > GEMMA3_MAX_UBATCH) most = GEMMA3_MAX_UBATCH;
        for (count = 0; count < most && i + count < n; count++)
            if ((s->wanted && s->wanted[i + count]) || i + count + 1 == n) rows[n_rows++] = count;
        forward(s, ids + i, count, rows, n_rows);
        for (int r = 0; s->wanted && r < n_rows; r++)
            if (s->wanted[i + rows[r]]) write_row(s, s->logits + (size_t)r * n_vocab);
        if (n_rows > 1) memcpy(s->logits, s->logits + (size_t)(n_rows - 1) * n_vocab, 4 * n_vocab);
    }
    s->n_read += n;
    s->read_seconds += seconds() - start;
}

/* ---- Command line: text out ---- */

static void print_byte(struct session *s, char byte)
{
    if (s->stopped) return;
    s->held[s->n_held++] = byte;
    size_t n_out = s->n_held; /* bytes before the first that may begin, or began, a stop text */
    for (size_t n = 1; n <= s->n_held; n++)
        for (const char **stop = s->stop; *stop; stop++) {
            if (strncmp(*stop, s->held + s->n_held - n, n) != 0) continue;
            if (!(*stop)[n] || !s->stopped) n_out = s->n_held - n;
            if (!(*stop)[n]) s->stopped = 1;
        }
    if (!s->prints_ids) fwrite(s->held, 1, n_out, s->out);
    memmove(s->held, s->held + n_out, s->n_held -= n_out);
}

static void print_token(struct session *s, int32_t id)
{
    char piece[GEMMA3_PIECE_MAX], character[8];
    int n = gemma3_decode(s->tokenizer, id, s->special ? GEMMA3_SPECIAL : 0, piece);
    for (int i = 0; i < n; i++) {
        int n_bytes = gemma3_utf8_push(&s->utf8, (unsigned char)piece[i], character);
        for (int k = 0; k < n_bytes; k++) print_byte(s, character[k]);
    }
    if (s->prints_ids && !s->stopped) fprintf(s->out, s->n_printed++ ? " %d" : "%d", (int)id);
    flush(s->out, "standard output");
}

/* What is still held back is text after all. */
static void end_text(struct session *s)
{
    char character[8];
    int n = gemma3_utf8_end(&s->utf8, character);
    for (int i = 0; i < n; i++) print_byte(s, character[i]);
    if (!s->prints_ids && !s->stopped) fwrite(s->held, 1, s->n_held, s->out);
    if (s->prints_ids || s->chats || is_terminal(stdout)) fputc('\n', s->out);
    flush(s->out, "standard output");
    s->n_held = 0, s->n_printed = s->stopped = 0;
}

/* A stop token, or one without text that a --stop text spells. */
static int ends_text(const struct session *s, int32_t id)
{
    char piece[GEMMA3_PIECE_MAX];
    int32_t spelled;
    if (gemma3_is_stop(s->tokenizer, id)) return 1;
    if (gemma3_decode(s->tokenizer, id, s->special ? GEMMA3_SPECIAL : 0, piece) > 0) return 0;
    for (const char *const *stop = s->stop; *stop; stop++)
        if (gemma3_encode(s->tokenizer, *stop, strlen(*stop), GEMMA3_SPECIAL, &spelled, 1) == 1 &&
            spelled == id)
            return 1;
    return 0;
}

/* Chooses, prints and takes in one token after another. In a chat the last one is taken in too,
 * because the conversation goes on after it. */
static void write_tokens(struct session *s)
{
    double start = seconds();
    int row = 0, is_last = s->n_predict == 0, is_full = 0;
    for (int i = 1; !is_last && !is_full && !interrupted && s->fault < 0; i++) {
        int32_t id = gemma3_sample(&s->sampler, s->logits, s->config->n_vocab, s->candidates);
        if (ends_text(s, id)) break;
        print_token(s, id);
        s->n_written++;
        is_last = i == s->n_predict || s->stopped;
        is_full = gemma3_state_pos(s->state) == s->params.n_ctx;
        if (!is_full && (!is_last || s->chats)) forward(s, &id, 1, &row, !is_last);
    }
    s->write_seconds += seconds() - start;
    end_text(s);
    if (is_full && !is_last)
        say(NOTE, "the context of %d tokens is full%s", s->params.n_ctx,
            s->chats ? "; /clear starts again, -c gives more" : "");
}

/* ---- Command line: the jobs ---- */

/* --logits and --hash */
static void write_numbers(struct session *s)
{
    char hex[65];
    gemma3_sha256_init(&s->sha256);
    choose_rows(s);
    if (s->logits_file) open_out(&s->to, s->logits_file);
    read_tokens(s, s->ids, s->n_ids);
    if (s->logits_file) close_out(&s->to);
    gemma3_sha256_end(&s->sha256, hex);
    if (s->hash)
        fprintf(s->out, "contract %d mode %s kv %s sha256 %s\n", GEMMA3_CONTRACT,
                s->options.exact ? "exact" : "default",
                s->params.kv_type == GEMMA3_KV_F32 ? "f32" : "f16", hex);
}

static int write_state(void *user, const void *bytes, size_t n)
{
    write_out(user, bytes, n);
    return 0;
}

static int read_state(void *user, uint64_t offset, void *buffer, size_t n)
{
    return fseek(user, (long)offset, SEEK_SET) || fread(buffer, 1, n, user) < n ? -1 : 0;
}

/* --state: the first n tokens are read from the file, as far as it has them, or computed and kept
 * there. Returns how many are in the state. */
static int keep_tokens(struct session *s, const int32_t *ids, int n)
{
    gemma3_error err;
    FILE *f = fopen(s->state_file, "rb");
    if (f && gemma3_state_load(s->state, read_state, f, &err))
        say(FAILED, "%s: %s", s->state_file, err.text);
    if (f) fclose(f);
    int pos = gemma3_state_pos(s->state);
    if (pos > n || memcmp(gemma3_state_ids(s->state), ids, (size_t)pos * sizeof *ids) != 0) pos = 0;
    for (int i = 0; i < pos; i++) gemma3_sampler_accept(&s->sampler, ids[i]);
    if (pos > 0 || n == 0) return pos;
    gemma3_state_reset(s->state);
    read_tokens(s, ids, n);
    open_out(&s->to, s->state_file);
    if (gemma3_state_save(s->state, write_state, &s->to, &err)) say(FAILED, "%s", err.text);
    close_out(&s->to);
    return n;
}

/* -p, -f, --ids */
static void continue_prompt(struct session *s)
{
    read_prompt(s);
    if (s->n_ids == 0) say(FAILED, "the prompt has no tokens");
    if (s->n_ids > s->params.n_ctx)
        say(FAILED, "the prompt has %d tokens and the context room for %d: give -c %d or more",
            s->n_ids, s->params.n_ctx, s->n_ids);
    open_state(s);
    if (s->numbers) write_numbers(s);
    else {
        int n_kept = s->state_file ? keep_tokens(s, s->ids, s->n_ids - 1) : 0;
        read_tokens(s, s->ids + n_kept, s->n_ids - n_kept);
    }
    if (s->writes) write_tokens(s);
}

static void tokenize(struct session *s)
{
    read_prompt(s);
    for (int i = 0; i < s->n_ids; i++) printf(i ? " %d" : "%d", (int)s->ids[i]);
    putchar('\n');
}

static void detokenize(struct session *s)
{
    int flags = s->special ? GEMMA3_SPECIAL : 0;
    char piece[GEMMA3_PIECE_MAX];
    parse_ids(s, s->detokenize, strlen(s->detokenize), "--detokenize");
    for (int i = 0; i < s->n_ids; i++)
        fwrite(piece, 1, (size_t)gemma3_decode(s->tokenizer, s->ids[i], flags, piece), stdout);
    if (is_terminal(stdout)) putchar('\n');
}

static void print_info(struct session *s)
{
    const gemma3_config *c = s->config;
    const struct { const char *name, *key; double value; } fields[] = {
        {"n_layers", "block_count", c->n_layers}, {"d_model", "embedding_length", c->d_model},
        {"d_ff", "feed_forward_length", c->d_ff}, {"n_heads", "attention.head_count", c->n_heads},
        {"n_kv_heads", "attention.head_count_kv", c->n_kv_heads},
        {"head_dim", "attention.key_length", c->head_dim}, {"n_vocab", "", c->n_vocab},
        {"n_ctx_train", "context_length", c->n_ctx_train},
        {"window", "attention.sliding_window", c->window},
        {"rms_eps", "attention.layer_norm_rms_epsilon", c->rms_eps},
        {"rope_base_global", "rope.freq_base", c->rope_base_global},
        {"rope_base_local", "rope.freq_base_swa", c->rope_base_local},
        {"rope_factor", "rope.scaling.factor", c->rope_factor},
        {"query_scale", "attention.scale", c->query_scale},
        {"embedding_scale", "", c->embedding_scale},
        {"final_softcap", "final_logit_softcapping", c->final_softcap},
    };
    printf("name                   ");
    print_safe(stdout, gemma3_model_name(s->model));
    printf("\nchat template          %s\n", gemma3_model_can_chat(s->model) ? "yes" : "no");
    printf("contract               %d\n", GEMMA3_CONTRACT);
    printf("mode                   %s\n", gemma3_model_is_exact(s->model) ? "exact" : "default");
    printf("isa                    %s\n", gemma3_model_isa(s->model));
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const char *origin = gemma3_model_origin(s->model, fields[i].key);
        printf("%-22s %.9g%s%s%s\n", fields[i].name, fields[i].value, *origin ? " (" : "", origin,
               *origin ? ")" : "");
    }
    printf("global layers         ");
    for (int l = 0; l < c->n_layers; l++)
        if (!c->is_local[l]) printf(" %d", l);
    const gemma3_params *p = &s->params;
    size_t n_kv = gemma3_kv_bytes(c, p), n_scratch = gemma3_state_size(s->model, p) - n_kv;
    printf("\nweights                %zu bytes, %zu read for each token generated\n",
           gemma3_model_weight_bytes(s->model), gemma3_model_token_bytes(s->model));
    printf("KV cache               %zu bytes for -c %d in %s\n", n_kv, p->n_ctx,
           p->kv_type == GEMMA3_KV_F32 ? "f32" : "f16");
    printf("scratch and tables     %zu bytes for -c %d -b %d -t %d\n", n_scratch, p->n_ctx,
           p->n_batch, p->n_threads);
}

/* The beginning of a first turn that does not depend on the user's text. */
static int keep_system(struct session *s, const int32_t *ids, int n)
{
    int32_t *other = allocate(((size_t)n + 32) * sizeof *other, "the turn");
    int n_other = gemma3_encode_turn(s->tokenizer, s->system, "", 1, other, n + 32), n_same = 0;
    while (n_same < n_other && n_same < n && other[n_same] == ids[n_same]) n_same++;
    free(other);
    return keep_tokens(s, ids, n_same);
}

/* One turn and its answer. 0: it does not fit, and nothing happened. */
static int answer(struct session *s, const char *text)
{
    int pos = gemma3_state_pos(s->state), left = s->params.n_ctx - pos;
    size_t room = strlen(text) + (s->system ? strlen(s->system) : 0) + 32;
    if (room > MAX_TEXT_BYTES) say(FAILED, "a turn of %zu bytes is too long", room);
    int32_t *ids = allocate(room * sizeof *ids, "the turn");
    int n = gemma3_encode_turn(s->tokenizer, s->system, text, pos == 0, ids, (int)room);
    if (n == -2) say(FAILED, "out of memory: encoding needs %zu bytes", gemma3_encode_work(room));
    if (n < 0) say(FAILED, "the vocabulary has no <start_of_turn> and <end_of_turn>: no chat");
    if (n > left)
        say(NOTE, "the context of %d tokens is full: this turn needs %d and %d are left; /clear "
            "starts again, -c gives more", s->params.n_ctx, n, left);
    if (n <= left) {
        int n_kept = s->state_file && pos == 0 ? keep_system(s, ids, n) : 0;
        catch_interrupts(1);
        read_tokens(s, ids + n_kept, n - n_kept);
        write_tokens(s);
        catch_interrupts(0);
        /* Whatever ended the answer, the model finds it closed when the next turn comes. */
        ids[0] = gemma3_find(s->tokenizer, "<end_of_turn>", 13);
        if (gemma3_state_pos(s->state) < s->params.n_ctx) forward(s, ids, 1, NULL, 0);
    }
    free(ids);
    return n <= left;
}

/* A line of the user's without its end, allocated; one that ends in \ goes on in the next. NULL:
 * there is none any more. */
static char *read_line(void)
{
    size_t n = 0, room = 256;
    char *line = allocate(room, "the line");
    int c = 0;
    if (is_terminal(stdin)) fputs("> ", stderr);
    while (c != '\n' && (c = getchar()) != EOF) {
        if (n + 1 == room) line = reallocate(line, room *= 2, "the line");
        line[n++] = (char)c;
        if (c != '\n') continue;
        n -= n > 1 && line[n - 2] == '\r' ? 2 : 1;
        if (n && line[n - 1] == '\\') line[n - 1] = '\n', c = 0;
    }
    if (c == EOF && ferror(stdin)) say(FAILED, "standard input: %s", strerror(errno));
    line[n] = 0;
    if (n || c == '\n') return line;
    free(line);
    return NULL;
}

/* We write Gemma's turns, whatever the file's template says: where it says something else, so do we. */
static void check_template(const struct session *s)
{
    static const char *const words[] = {"<start_of_turn>", "source_lang_code", "developer", "tools"};
    size_t n = 0;
    const char *template = gemma3_model_chat_template(s->model, &n);
    if (!template)
        say(NOTE, "no chat template in the file: this may be a base model, not trained to chat");
    for (int i = 0; template && i < 4; i++) {
        size_t length = strlen(words[i]), at = 0;
        while (at + length <= n && memcmp(template + at, words[i], length) != 0) at++;
        int has = at + length <= n;
        if (i == 0 && !has) say(NOTE, "the file's chat template has no <start_of_turn>: it is not Gemma's, "
                                "whose turns are used here");
        if (i > 0 && has) say(NOTE, "the file's chat template asks for %s, which a chat here has not", words[i]);
    }
}

/* A full context ends the chat, unless somebody is there to type /clear. */
static void chat(struct session *s)
{
    int goes_on = 1;
    char *line;
    open_state(s);
    check_template(s);
    while (goes_on && (line = read_line())) {
        if (strcmp(line, "/quit") == 0) goes_on = 0;
        else if (strcmp(line, "/clear") == 0) gemma3_state_reset(s->state), s->sampler.n_last = 0;
        else if (line[strspn(line, " \t")]) goes_on = (answer(s, line) || is_terminal(stdin)) && s->fault < 0;
        free(line);
    }
}

/* The library calls this with every tensor inside. */
static void find_fault(void *user, const char *name, int layer, int pos, int n, int width,
                       float *data)
{
    char *first = user;
    (void)pos;
    if (*first || are_numbers(data, (size_t)n * (size_t)width)) return;
    snprintf(first, 64, layer < 0 ? "%s" : "%s-%d", name, layer);
}

/* The same tokens again, tensor by tensor. */
static void explain_fault(struct session *s)
{
    int n = s->fault + 1;
    char first[64] = "";
    gemma3_error err;
    int32_t *ids = allocate((size_t)n * sizeof *ids, "the tokens again");
    memcpy(ids, gemma3_state_ids(s->state), (size_t)n * sizeof *ids);
    gemma3_state_free(s->state);
    s->params.trace = find_fault, s->params.trace_user = first;
    s->state = gemma3_state_new(s->model, &s->params, &err);
    if (s->state) gemma3_forward(s->state, ids, n, &s->fault, 1, s->logits);
    free(ids);
    say(FAILED, "logits are not numbers at position %d%s%s%s", s->fault,
        s->options.exact && s->params.kv_type == GEMMA3_KV_F32 ? "" : ": try --kv f32 or --exact",
        *first ? "; the first tensor to hold what is none was " : "", first);
}

static void run_job(struct session *s)
{
    open_model(s, !s->tokenize && !s->detokenize && !s->info);
    if (s->chats) chat(s);
    else if (s->info) print_info(s);
    else if (s->tokenize) tokenize(s);
    else if (s->detokenize) detokenize(s);
    else continue_prompt(s);
    if (s->fault >= 0) explain_fault(s);
    if (s->writes && s->n_read)
        fprintf(stderr, "prompt %d tokens, %.1f tokens/s; generated %d tokens, %.1f tokens/s\n",
                s->n_read, s->n_read / s->read_seconds, s->n_written,
                s->n_written ? s->n_written / s->write_seconds : 0.0);
    gemma3_state_free(s->state);
    gemma3_close(s->model);
    gemma3_pool_free(s->pool);
    free(s->candidates);
    free(s->logits);
    free(s->wanted);
    free(s->ids);
}

int main(int argc, char **argv)
{
    struct session s = {
        .n_predict = -1, .fault = -1, .seed = "42", .sampler = gemma3_sampler_new(42), .out = stdout,
        .params = {.n_batch = 512, .n_threads = gemma3_default_threads()},
    };
    char found[MAX_PATH_BYTES];
    argv = start_program(argv);
    if (argc > 0) parse_options(&s, argv + 1);
    if (s.help) {
        print_help();
    } else if (s.version) {
        printf("gemma3.c %s, numeric contract %d\n", GEMMA3_VERSION, GEMMA3_CONTRACT);
    } else if (s.options.isa && strcmp(s.options.isa, "list") == 0) {
        for (int i = 0; gemma3_isa_name(i); i++) puts(gemma3_isa_name(i));
    } else {
        check_options(&s);
        if (!s.path) s.path = find_model(argc > 0 ? argv[0] : "", found);
        run_job(&s);
    }
    flush(stdout, "standard output");
    return 0;
}

#endif
#endif /* INSTANCE */
