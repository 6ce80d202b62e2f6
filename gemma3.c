/* gemma3.c - Google's Gemma 3, forward pass and all, in one C file for the CPU.
 *
 * What this is: a reference to read, to port and to check other engines against. It computes the
 * same bits on every machine (the numeric contract, README.md) and it is fast.
 * What this is not: a framework. There is one architecture, one forward pass and no dependency but
 * libc and threads.
 *
 * The model on half a page. A text is a list of tokens (pieces of words), each a number, its id.
 * Every token becomes a vector x of d_model numbers, the residual stream, to which each layer adds
 * twice. Attention lets a token look at those before it: it asks with a query q, they answer with a
 * key k and a value v, and the better q and k fit (their score, a dot product), the more of v it
 * takes. This happens in n_heads heads at once, each with a q of its own, so that each can look for
 * something else; several share one k and v. The feed-forward part works on each token alone. At
 * the end each token of the vocabulary gets a number, its logit: the larger, the likelier it comes
 * next. W.., *_norm and embedding are the weights, learned in training and read from the file.
 *
 *     x = embedding[id] * sqrt(d_model)
 *     for each layer:
 *         y = rms(x) * attn_norm
 *         q, k, v = Wq y, Wk y, Wv y              n_heads queries, n_kv_heads keys and values
 *         q, k = rms(q) * q_norm, rms(k) * k_norm     each head for itself
 *         q, k = rope(q), rope(k)                 turns the pairs (j, j + head_dim/2) of the token
 *                                                 at position p by p / base^(2j/head_dim) / factor;
 *                                                 base and factor are the layer's. So q . k
 *                                                 depends on how far apart two tokens are
 *         a = sum of softmax(q . k * query_scale) v    over the positions that the token sees;
 *                                                 query head h: kv head h / (n_heads / n_kv_heads)
 *         x = x + rms(Wo a) * post_attention_norm     the a of all heads, end to end
 *         y = rms(x) * ffn_norm
 *         f = Wdown (gelu(Wgate y) * Wup y)
 *         x = x + rms(f) * post_ffw_norm
 *     logits = lm_head (rms(x) * output_norm)     lm_head is the embedding matrix itself
 *     logits = cap * tanh(logits / cap)           only where a file has a softcap: no Gemma 3 does
 *
 * where rms(x) = x / sqrt(mean(x^2) + eps), softmax(s)_p = exp(s_p) / sum of all exp(s), gelu(x) is
 * about x for x far above 0 and about 0 far below, W y is a matrix times a vector, and * between
 * vectors is element by element. A program repeats: ids -> logits after the last token -> choose an
 * id -> append it. K and V of earlier tokens never change, so they are kept: the KV cache. Sources:
 * the Gemma 3 Technical Report (arXiv 2503.19786), and transformers' modeling_gemma3.py. By default
 * a matrix's input is rounded to int8, 32 numbers to a scale, and weights are what the file has;
 * exact mode keeps everything in float32, and agrees with transformers to float32's rounding.
 *
 * One layer, with the shapes of 1B:
 *
 *     x [1152] ---.
 *        |     attn_norm
 *        |        | y [1152]
 *        |        +-------------+-------------.
 *        |      attn_q        attn_k        attn_v
 *        |        | [4][256]    | [1][256]    | [1][256]
 *        |      q_norm        k_norm          |
 *        |       rope          rope           |
 *        |        |             |             |
 *        |        |        .----+-------------+----.
 *        |        |        | KV cache of the layer |  k, v of the positions so far
 *        |        |        '----+-------------+----'
 *        |     softmax(q . k / 16) ---------- v
 *        |        | [4][256]
 *        |     attn_output
 *        |        | [1152]
 *        |     post_attention_norm
 *       (+)-------'
 *     x [1152] ---.
 *        |     ffn_norm
 *        |        | y [1152]
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
 * factor divides the angles of global layers alone. 168 is 27B's d_model / n_heads, 256 head_dim.
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
 * In the formulas above Wq is attn_q, Wo attn_output, q_norm attn_q_norm, and a is attended. Tokens
 * go through the layers in micro-batches of n_ubatch. Indices: l layer, i token of the micro-batch,
 * p position in the text, h query head, g key-value head, r row, b block of 32 elements, j element
 * or lane. n is the number of tokens in the micro-batch. "Rule 4" is rule 4 of the numeric contract
 * in README.md.
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

#if !defined(INSTANCE) /* the file includes itself for each instruction set: section 9 */

/* For the compiler; a first reading goes on with section 1. The contract forbids it to fuse a*b+c
 * on its own (we say fma where we mean it), and to treat floats as real numbers, whatever its
 * command line allows; gemma3_open checks that it obeyed. For gcc tree-vectorize and no-tree-ter
 * change speed, never bits. */
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
#pragma GCC optimize("no-unsafe-math-optimizations", "no-tree-reassoc")
#pragma GCC optimize("no-trapping-math", "no-math-errno", "no-finite-math-only")
#pragma GCC optimize("tree-vectorize", "vect-cost-model=dynamic")
#pragma GCC optimize("no-tree-ter") /* with it sums wait for their last use: registers run out */
#if defined(__ARM_FEATURE_MVE)
#pragma GCC optimize("no-tree-vectorize") /* Helium's vectors of floats flush subnormals */
#endif
#endif
#if defined(__FAST_MATH__)
#error "gemma3.c computes the same bits everywhere: build it without -ffast-math"
#endif

/* What hosts have beyond C11 (section 15), under -std=c11 too; macOS and most BSDs hide nothing. */
#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#endif
#define _NETBSD_SOURCE 1
#define _FILE_OFFSET_BITS 64    /* files over 2 GB where pointers have 32 bits */
#include "gemma3.h"

#include <float.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if FLT_EVAL_METHOD != 0 && FLT_EVAL_METHOD != 16
#error "float arithmetic is wider than float: x86 wants -msse2 -mfpmath=sse, s390x -std=gnu11"
#endif

#if defined(__x86_64__) || (defined(__i386__) && defined(__SSE2__))
#include <cpuid.h>
#pragma push_macro("_MSC_VER")
#undef _MSC_VER /* clang-cl: with it vectors are left out that the command line does not name */
#include <immintrin.h>
#pragma pop_macro("_MSC_VER")
#define HAVE_X86 1
#elif defined(__aarch64__) && !defined(__AARCH64EB__)
#include <arm_neon.h>
#define HAVE_NEON 1
#elif defined(__ARM_FEATURE_MVE)
#include <arm_mve.h>
#elif defined(__ARM_FEATURE_SIMD32)
#include <arm_acle.h>
#endif

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
enum { BIG_ENDIAN_CPU = 1 };
#else
enum { BIG_ENDIAN_CPU = 0 };
#endif

#define INLINE static inline __attribute__((always_inline, unused))
#if defined(__GNUC__) && !defined(__clang__)
#define UNROLL _Pragma("GCC unroll 16")
#else
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

typedef uint64_t fp_state;
static fp_state fp_enter(void);       /* rounding and subnormals as IEEE wants them: section 7 */
static void fp_leave(fp_state old);   /* as the caller had them */
static int sentence(char *text, size_t n, const char *name, const char *format, ...); /* -1 */

INLINE int min_int(int a, int b) { return a < b ? a : b; }
INLINE int max_int(int a, int b) { return a > b ? a : b; }

/* ==== 1. The model and the state =================================================================
 *
 * Two structs hold everything. The model is what a file says, and never changes once it is open, so
 * that any number of threads and conversations can share it. A state is one conversation: its KV
 * cache, and room for what is on its way through the layers. Both lie in one block of memory each,
 * which a caller may give, so a board needs no malloc. */

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
    const uint8_t *data;              /* NULL: not in memory, read when it is needed */
    uint64_t offset;                  /* where it begins in the file */
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

enum { MAX_STOP_IDS = 16, MAX_ORIGINS = 16, MAX_NOTES = 8 }; /* no file has more of the last two */

struct string {
    const char *text;                 /* without NUL */
    size_t n;
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
    struct layer *layer;              /* [n_layers] */

    gemma3_tokenizer *tokenizer;
    gemma3_vocab vocab;
    int32_t stop[MAX_STOP_IDS];       /* the vocabulary's */
    gemma3_info info;
    char name[128];
    const struct release *release;    /* Google's, or none: section 12 */
    struct origin { const char *key, *text; } origin[MAX_ORIGINS]; /* of what no key says */
    char note[MAX_NOTES][160];        /* sentences about keys that are not obeyed */
    int n_origins, n_notes;

    gemma3_source source;             /* the file */
    size_t streamed_row;              /* bytes of the longest row that is not in memory */
    void *allocated;                  /* by gemma3_open, else NULL */
};

/* One conversation: the KV cache, and room for the n_ubatch tokens that go through the layers at
 * once. Shapes are said here; where everything lies says lay_out (section 13). */
struct gemma3_state {
    const gemma3_model *m;
    const gemma3_config *c;           /* the model's, unless params have another */
    gemma3_params p;
    void *allocated;                  /* by _new, else NULL */
    int pos;                          /* tokens in the cache */
    int n_ubatch;                     /* of a micro-batch: tokens in the layers at once */
    int n_abreast;                    /* of them, those whose attention is computed at once */
    int ring;                         /* slots of a local layer's cache */
    int32_t *ids;                     /* [n_ctx] the tokens in the cache */
    uint8_t *k_cache[GEMMA3_MAX_LAYERS]; /* of F16 or F32; section 4 says how they lie */
    uint8_t *v_cache[GEMMA3_MAX_LAYERS];
    float *inv_freq[2];               /* [head_dim/2] 1 / base^(2j/head_dim) / factor */
                                      /* [0] of global layers, [1] of local ones */
    float *cosine[2], *sine[2];       /* [n_ubatch][head_dim/2] */
    float *x;                         /* [n_ubatch][d_model]        residual stream */
    float *y;                         /* [n_ubatch][d_model]        branch */
    float *q, *attended;              /* [n_ubatch][n_heads][head_dim] */
    float *k, *v;                     /* [n_ubatch][n_kv_heads][head_dim] */
    float *gate, *up;                 /* [n_ubatch][d_ff] */
    float *score_sum;                 /* [n_abreast][n_heads] */
    float *score;                     /* [n_abreast][n_heads][score_stride] q . k, then its exp */
    size_t score_stride;              /* n_ctx, rounded up to 16 */
    /* Working room of the threads: sections 6 and 8. */
    struct q8_block *q8;              /* [n_ubatch][widest input / 32]   a matrix's input as int8 */
    int n_acc;                        /* vectors that a worker multiplies at once, at most */
    float (*acc)[TILE_ROWS];          /* [n_threads][n_acc] */
    struct unpacked *unpacked;        /* [n_threads] */
    float *row_floats;                /* [n_threads][TILE_ROWS][widest input], exact mode */
    uint8_t *streamed;                /* [n_threads][TILE_ROWS][streamed_row] */
    uint8_t *read_failed;             /* [n_threads] 1: a worker's weights could not be read */
    char error[256];
};

/* ==== 2. The operations ==========================================================================
 *
 * All arithmetic of the model is in this table; the sections up to 6 only say which numbers meet.
 * A table exists for plain C, which is the definition (section 9), and for each instruction set
 * (section 10). All give the same bits. Loops over tokens and heads are the callers'. A first
 * reading needs no more than the names: section 3 is next. */

/* 32 activations as int8: x[j] is about d * code[j] (rule 1). */
struct q8_block {
    float d;
    float d_sum;           /* d times the sum of the codes: for weights of scale * code + minimum */
    int32_t sum[2];        /* of the codes in each half */
    int32_t minus_8_sums;  /* -8 times both: Q4_0 keeps codes -8 .. 7 as 0 .. 15 */
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
enum { MIX_WIDTH = 32 };     /* elements of a slice; a head's last may have fewer */

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
    /* x [n] -> codes: amax the largest |x|, d = amax / 127, code = round(x * (127 / amax)), ties to
     * even (rule 1). */
    void (*quantize)(struct q8_block *out, const float *x, int n);
    /* acc[i][r] += row r . q8[i], an integer format's tile: for each block in order
     * acc = fma(isum, d_row * d, acc), isum the exact integer dot product (rule 2). */
    void (*mul_codes)(const struct product *p);
    /* acc[i][r] = row r . x[i], rows of F32, F16, BF16: 16 partial sums, the lanes, element j into
     * lane j mod 16 by fma, joined as a tree (rule 4). */
    void (*mul_floats)(const struct product *p);
    /* out [n][cols] = rows r .. r+n-1 of w, which lie in one tile, as float32, as their format
     * defines. */
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
    /* The sum of exp(logits - max), max the largest, in double: for scores (rule 9). */
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

/* ==== 3. The forward pass =======================================================================
 *
 * The preface's formulas as code. The tokens of a micro-batch go through the layers side by side,
 * because each weight is then fetched from memory once for all of them; what a token may see of the
 * others is attention's business alone. The result does not depend on how a text is cut. */

/* out [n][rows] = w in, one of several with the same input in [n][cols]. */
struct linear {
    const struct matrix *w;
    float *out;
};
static void matmul(const gemma3_state *s, const struct linear *to, int n_to, const float *in,
                   int n);

static void dequantize_row(const gemma3_state *s, const struct matrix *w, int row, float *out);
static void embed(gemma3_state *s, const int32_t *ids, int n);
static void rope_tables(gemma3_state *s, int n);
static void rmsnorm(const gemma3_state *s, float *y, const float *x, const float *w, int n,
                    int width);
static void attention(gemma3_state *s, const struct layer *w, int l, int n);
static void feed_forward(gemma3_state *s, const struct layer *w, int l, int n);
static void add(float *x, const float *y, size_t n);

/* n <= n_ubatch tokens through all layers: x [n][d_model] afterwards. A prompt and a single new
 * token go the same way. x is the residual stream, y the branch that leaves it and is added. */
static void forward_ubatch(gemma3_state *s, const int32_t *ids, int n)
{
    const gemma3_config *c = s->c;
    size_t n_floats = (size_t)n * c->d_model;
    rope_tables(s, n);
    embed(s, ids, n);
    trace(s, "inp_scaled", -1, s->x, c->d_model, n);
    for (int l = 0; l < c->n_layers; l++) {
        const struct layer *w = &s->m->layer[l];
        rmsnorm(s, s->y, s->x, w->attn_norm, n, c->d_model);
        trace(s, "attn_norm", l, s->y, c->d_model, n);
        attention(s, w, l, n);
        trace(s, "attn_out", l, s->y, c->d_model, n);
        rmsnorm(s, s->y, s->y, w->post_attention_norm, n, c->d_model);
        trace(s, "attn_post_norm", l, s->y, c->d_model, n);
        add(s->x, s->y, n_floats);
        trace(s, "sa_out", l, s->x, c->d_model, n);
        rmsnorm(s, s->y, s->x, w->ffn_norm, n, c->d_model);
        trace(s, "ffn_norm", l, s->y, c->d_model, n);
        feed_forward(s, w, l, n);
        trace(s, "ffn_out", l, s->y, c->d_model, n);
        rmsnorm(s, s->y, s->y, w->post_ffw_norm, n, c->d_model);
        trace(s, "ffn_post_norm", l, s->y, c->d_model, n);
        add(s->x, s->y, n_floats);
        trace(s, "l_out", l, s->x, c->d_model, n);
    }
}

/* x [n][d_model] = rows of the embedding times sqrt(d_model): the matrix is the lm_head too, and as
 * an embedding its numbers are too small beside what the layers add. */
static void embed(gemma3_state *s, const int32_t *ids, int n)
{
    const gemma3_config *c = s->c;
    for (int i = 0; i < n; i++) {
        float *x = s->x + (size_t)i * c->d_model;
        dequantize_row(s, &s->m->token_embd, ids[i], x);
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

/* Logits of tokens rows[0 .. n_rows-1] of the micro-batch, each n_vocab long. */
static void unembed(gemma3_state *s, const int *rows, int n_rows, float *logits)
{
    const gemma3_config *c = s->c;
    gemma3_trace *look = s->p.trace;  /* as trace, but from the first row's position on */
    int pos = s->pos + rows[0];
    for (int k = 0; k < n_rows; k++) /* rows ascend, so a copy never overwrites one still needed */
        memmove(s->x + (size_t)k * c->d_model, s->x + (size_t)rows[k] * c->d_model,
                c->d_model * sizeof(float));
    rmsnorm(s, s->y, s->x, s->m->output_norm, n_rows, c->d_model);
    if (look) look(s->p.trace_user, "result_norm", -1, pos, n_rows, c->d_model, s->y);
    matmul(s, &(struct linear){&s->m->lm_head, logits}, 1, s->y, n_rows);
    if (c->final_softcap > 0) softcap(logits, (size_t)n_rows * c->n_vocab, c->final_softcap);
    if (look) look(s->p.trace_user, "result_output", -1, pos, n_rows, c->n_vocab, logits);
}

static int forward_fault(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows);

int gemma3_forward(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows,
                   float *logits)
{
    if (forward_fault(s, ids, n, rows, n_rows)) return -1;
    fp_state fp = fp_enter();
    for (int done = 0, take; done < n; done += take) {
        int n_here = 0, rows_here[GEMMA3_MAX_UBATCH]; /* the rows wanted of these tokens */
        take = min_int(n - done, s->n_ubatch);
        forward_ubatch(s, ids + done, take);
        for (; n_rows > 0 && *rows < done + take; n_rows--) rows_here[n_here++] = *rows++ - done;
        if (n_here) unembed(s, rows_here, n_here, logits);
        if (n_here) logits += (size_t)n_here * s->c->n_vocab;
        if (memchr(s->read_failed, 1, s->p.n_threads)) break;
        memcpy(s->ids + s->pos, ids + done, take * sizeof *ids);
        s->pos += take;
    }
    fp_leave(fp);
    if (!memchr(s->read_failed, 1, s->p.n_threads)) return 0;
    memset(s->read_failed, 0, s->p.n_threads);
    return sentence(s->error, sizeof s->error, "", "the model's weights cannot be read");
}

/* 0; or, when these tokens cannot be taken or these rows not given, not 0 and a sentence in
 * s->error. */
static int forward_fault(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows)
{
    int n_vocab = s->c->n_vocab;
    size_t size = sizeof s->error;
    if (n < 0) return sentence(s->error, size, "", "%d tokens were given, expected 0 or more", n);
    if (n > s->p.n_ctx - s->pos)
        return sentence(s->error, size, "the context is full: ", "it holds %d tokens, %d are in it "
                        "and %d more were given", s->p.n_ctx, s->pos, n);
    for (int i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= n_vocab)
            return sentence(s->error, size, "", "token %d is %d, outside the vocabulary of %d",
                            s->pos + i, (int)ids[i], n_vocab);
    for (int k = 0; k < n_rows; k++)
        if (rows[k] < 0 || rows[k] >= n || (k && rows[k] <= rows[k - 1]))
            return sentence(s->error, size, "", "rows[%d] is %d: rows must ascend and lie in 0..%d",
                            k, rows[k], n - 1);
    return 0;
}

/* Labels of the trace as they come, llama.cpp's where it has one: the first and the last two come
 * once, the others in each layer. For llama.cpp Qcur_raw and Kcur_raw are Qcur and Kcur too. */
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
 * K (after norm and rope) and V are rounded to the cache's type before any use, even by their own
 * token. A global layer has a slot for every position. A local layer looks back `window` tokens,
 * itself included, and keeps a ring of window + n_ubatch - 1 slots: so the oldest key that the
 * first token of a micro-batch sees survives the micro-batch's own writes.
 *
 * Decoding reads the whole cache for each token, so each task's part of it is contiguous:
 *     K [n_kv_heads][slots][head_dim]                             a task scores a run of positions
 *     V [n_kv_heads][slices of MIX_WIDTH elements][slots][MIX_WIDTH]  a task sums one slice
 *
 * The queries of a token that share a K and V meet each key and value once. Tried: the queries of
 * four tokens together. It saved 0 to 3 % of the time of a prompt of 4,096 tokens (270M, 1B; of
 * 1,500 tokens on 4B, where only two queries share a key, 2 % on AVX2 and 6 % on AVX-512) and took
 * twice the text. */

static int cache_type(const gemma3_state *s) { return s->p.kv_type == GEMMA3_KV_F16 ? F16 : F32; }
static size_t kv_element(const gemma3_state *s) { return s->p.kv_type == GEMMA3_KV_F16 ? 2 : 4; }
static int slots_of(const gemma3_state *s, int l)
{
    return s->c->is_local[l] ? s->ring : s->p.n_ctx;
}

/* The attention of tokens i0 .. i0+n-1 of the micro-batch in layer l, all at once. */
struct attention {
    gemma3_state *s;
    const struct layer *w;
    int l, slots, heads_per_kv;
    int i0, n;
};

static float dot(int type, const uint8_t *row, const float *x, int n);
static float exp_scores_of(float *score, int n, int first);
static float value_of(int type, const uint8_t *row, size_t j);
static int first_seen(const struct attention *a, int p);
static uint8_t *key_at(const struct attention *a, int g, int p);
static uint8_t *value_at(const struct attention *a, int g, int j0, int p);

/* What this section computes, for one query: out [head_dim] = softmax(q . k) v over the positions
 * first .. p that the token at position p sees. q is scaled; score has room for those positions.
 * The definition: test/attention.c compares it with attend_abreast, which threads share. */
__attribute__((unused))
static void attention_by_definition(const struct attention *a, const float *q, int g, int p,
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

/* each(job, i, worker) for every i < n_items, on all threads, of which `worker` runs it. */
static void for_each(const gemma3_state *s, int n_items, gemma3_task *each, void *job);
static float (*acc_of(const gemma3_state *s, int worker))[TILE_ROWS];
static void copy_floats(float *to, const float *from, int n);
static void rope_heads(void *arg, int i, int worker);
static void scale_and_store(void *arg, int i, int worker);
static void attend_abreast(struct attention *a);

/* y [n][d_model] -> y, through attention over the cache of layer l, which gains n positions. */
static void attention(gemma3_state *s, const struct layer *w, int l, int n)
{
    const gemma3_config *c = s->c;
    int q_width = c->n_heads * c->head_dim, kv_width = c->n_kv_heads * c->head_dim;
    struct attention a = {.s = s, .w = w, .l = l, .slots = slots_of(s, l),
                          .heads_per_kv = c->n_heads / c->n_kv_heads};
    struct linear qkv[] = {{&w->attn_q, s->q}, {&w->attn_k, s->k}, {&w->attn_v, s->v}};
    matmul(s, qkv, 3, s->y, n);
    trace(s, "Qcur_raw", l, s->q, q_width, n);
    trace(s, "Kcur_raw", l, s->k, kv_width, n);
    trace(s, "Vcur", l, s->v, kv_width, n);
    rmsnorm(s, s->q, s->q, w->attn_q_norm, n * c->n_heads, c->head_dim);
    rmsnorm(s, s->k, s->k, w->attn_k_norm, n * c->n_kv_heads, c->head_dim);
    trace(s, "Qcur_normed", l, s->q, q_width, n);
    trace(s, "Kcur_normed", l, s->k, kv_width, n);
    for_each(s, n, rope_heads, &a);
    trace(s, "Qcur", l, s->q, q_width, n);
    trace(s, "Kcur", l, s->k, kv_width, n);
    for_each(s, n, scale_and_store, &a);
    for (a.i0 = 0; a.i0 < n; a.i0 += a.n) {
        a.n = min_int(n - a.i0, s->n_abreast);
        attend_abreast(&a);
    }
    trace(s, "kqv_out", l, s->attended, q_width, n);
    matmul(s, &(struct linear){&w->attn_output, s->y}, 1, s->attended, n);
}

/* Head h of token i in q [n][n_heads][head_dim], or in k or v [n][n_kv_heads][head_dim]. */
static float *head_at(float *x, int n_heads, int head_dim, int i, int h)
{
    return x + ((size_t)i * n_heads + h) * head_dim;
}

static void rope_heads(void *arg, int i, int worker)
{
    const struct attention *a = arg;
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

/* K and V of token i go into the cache; its queries are scaled. */
static void scale_and_store(void *arg, int i, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int D = s->c->head_dim, q_width = s->c->n_heads * D, p = s->pos + i;
    float *q = s->q + (size_t)i * q_width;
    (void)worker;
    for (int j = 0; j < q_width; j++) q[j] *= s->c->query_scale;
    for (int g = 0; g < s->c->n_kv_heads; g++) {
        const float *k = head_at(s->k, s->c->n_kv_heads, D, i, g);
        const float *v = head_at(s->v, s->c->n_kv_heads, D, i, g);
        s->m->kernels->store(key_at(a, g, p), k, D, cache_type(s));
        for (int j0 = 0; j0 < D; j0 += MIX_WIDTH)
            s->m->kernels->store(value_at(a, g, j0, p), v + j0, slice_width(D, j0), cache_type(s));
    }
}

/* First position that the token at position p sees: p - first < window in a local layer. */
static int first_seen(const struct attention *a, int p)
{
    const gemma3_config *c = a->s->c;
    return c->is_local[a->l] && p >= c->window ? p - c->window + 1 : 0;
}

/* ---- softmax(q . k) v ---- */

/* The queries of one token that share a kv head: heads_per_kv rows of each array. */
struct queries {
    int g;                            /* the kv head */
    int p, first;                     /* the token's position, and the first that it sees */
    const float *q;                   /* [][head_dim], scaled */
    float *score;                     /* [][score_stride], of first .. p */
    float *sum;                       /* softmax's denominators */
    float *out;                       /* [][head_dim] */
};

/* Number index of them: kv head index % n_kv_heads of token i0 + index / n_kv_heads. */
static struct queries queries_of(const struct attention *a, int index)
{
    const gemma3_state *s = a->s;
    int g = index % s->c->n_kv_heads, nth = index / s->c->n_kv_heads, p = s->pos + a->i0 + nth;
    size_t query = (size_t)nth * s->c->n_heads + g * a->heads_per_kv; /* the first, of all */
    size_t at = ((size_t)a->i0 * s->c->n_heads + query) * s->c->head_dim;
    return (struct queries){.g = g, .p = p, .first = first_seen(a, p), .q = s->q + at,
                            .score = s->score + query * s->score_stride,
                            .sum = s->score_sum + query, .out = s->attended + at};
}

/* How many of positions begin .. end-1 lie side by side: fewer when the ring's end comes first. */
static int contiguous(const struct attention *a, int begin, int end)
{
    return min_int(end - begin, a->slots - begin % a->slots);
}

enum { SCORE_RUN = 64 };              /* positions that one task scores */

/* Runs of the last token; no other sees more. */
static int n_score_runs(const struct attention *a)
{
    int p = a->s->pos + a->i0 + a->n - 1;
    return (p - first_seen(a, p)) / SCORE_RUN + 1;
}

/* Scores of one run of positions: the keys are the rows of a matrix. Later positions get no score:
 * that is the causal mask. A token that sees fewer runs than the last has empty ones. */
static void score_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int D = s->c->head_dim, n_runs = n_score_runs(a);
    struct queries qs = queries_of(a, index / n_runs);
    int p = qs.first + index % n_runs * SCORE_RUN, end = min_int(qs.p + 1, p + SCORE_RUN);
    struct product keys = {.format = find_format(cache_type(s)), .row_bytes = D * kv_element(s),
                           .cols = D, .x_stride = D, .acc = acc_of(s, worker)};
    for (; p < end; p += keys.n_rows) {
        keys.rows = key_at(a, qs.g, p);
        keys.n_rows = min_int(contiguous(a, p, end), TILE_ROWS);
        for (int h = 0; h < a->heads_per_kv; h += keys.n) {
            keys.x = qs.q + h * D;
            keys.n = min_int(a->heads_per_kv - h, s->n_acc);
            s->m->kernels->mul_floats(&keys);
            for (int i = 0; i < keys.n; i++)
                copy_floats(qs.score + (h + i) * s->score_stride + (p - qs.first), keys.acc[i],
                            keys.n_rows);
        }
    }
}

/* One query: its scores become exp(score - max); one thread adds them up in fixed order. */
static void softmax_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    struct queries qs = queries_of(a, index / a->heads_per_kv);
    int h = index % a->heads_per_kv, n = qs.p + 1 - qs.first;
    float *score = qs.score + h * a->s->score_stride;
    (void)worker;
    qs.sum[h] = a->s->m->kernels->exp_scores(score, n, qs.first);
}

/* out = sum of e_p v_p over positions in order, divided by the sum of e_p: one slice of a head. */
static void mix_task(void *arg, int index, int worker)
{
    const struct attention *a = arg;
    gemma3_state *s = a->s;
    int D = s->c->head_dim, j0 = index % n_slices(D) * MIX_WIDTH, width = slice_width(D, j0);
    struct queries qs = queries_of(a, index / n_slices(D));
    struct mix m = {.type = cache_type(s), .v_bytes = width * kv_element(s), .width = width,
                    .e_stride = s->score_stride, .out = qs.out + j0, .out_stride = D,
                    .n = a->heads_per_kv};
    (void)worker;
    for (int h = 0; h < m.n; h++) memset(m.out + h * D, 0, width * sizeof(float));
    for (int p = qs.first; p <= qs.p; p += m.n_pos) {
        m.v = value_at(a, qs.g, j0, p);
        m.n_pos = contiguous(a, p, qs.p + 1);
        m.e = qs.score + (p - qs.first);
        s->m->kernels->mix_values(&m);
    }
    for (int h = 0; h < m.n; h++)
        for (int j = 0; j < width; j++) m.out[h * D + j] /= qs.sum[h];
}

/* attended [i0 .. i0+n-1][n_heads][head_dim]: three steps, each shared out. */
static void attend_abreast(struct attention *a)
{
    const gemma3_state *s = a->s;
    int n = a->n * s->c->n_kv_heads;
    for_each(s, n * n_score_runs(a), score_task, a);
    for_each(s, n * a->heads_per_kv, softmax_task, a);
    for_each(s, n * n_slices(s->c->head_dim), mix_task, a);
}

/* ==== 5. Feed-forward ===========================================================================
 *
 * Each token by itself. Most of a layer's weights and time are here. It is gated: gelu(gate) says
 * how much of up passes (GEGLU, arXiv 2002.05202). */

static void gelu_task(void *state, int i, int worker)
{
    gemma3_state *s = state;
    size_t d_ff = s->c->d_ff;
    (void)worker;
    s->m->kernels->gelu(s->gate + i * d_ff, s->up + i * d_ff, (int)d_ff);
}

/* y [n][d_model] -> y: Wdown (gelu(Wgate y) * Wup y) */
static void feed_forward(gemma3_state *s, const struct layer *w, int l, int n)
{
    matmul(s, (struct linear[]){{&w->ffn_gate, s->gate}, {&w->ffn_up, s->up}}, 2, s->y, n);
    trace(s, "ffn_gate", l, s->gate, s->c->d_ff, n);
    trace(s, "ffn_up", l, s->up, s->c->d_ff, n);
    for_each(s, n, gelu_task, s);
    trace(s, "ffn_geglu", l, s->gate, s->c->d_ff, n);
    matmul(s, &(struct linear){&w->ffn_down, s->y}, 1, s->gate, n);
}

/* ==== 6. Matrix times vectors, and how threads share =============================================
 *
 * Threads share out whole things: tokens, heads, tiles of 32 rows. Which thread takes which cannot
 * change a bit, because a sum is one thread's work (rule 7). Matrices with the same input are
 * shared out as one: every call ends when its slowest thread does, so few long calls are better
 * than many short ones. */

/* Share number i of total things cut into n_tasks shares: [*begin, *end). */
static void share_of(int total, int n_tasks, int i, int *begin, int *end)
{
    *begin = (int)((int64_t)total * i / n_tasks);
    *end = (int)((int64_t)total * (i + 1) / n_tasks);
}

/* A loop over n_items, cut into a few shares for each thread. */
struct items {
    int n_items, n_tasks;
    gemma3_task *each;
    void *job;
};

enum { TASKS_PER_THREAD = 6 };        /* 16 gave the same speed */

static void items_task(void *arg, int index, int worker)
{
    const struct items *items = arg;
    fp_state fp = fp_enter(); /* a thread of the caller's pool has its own rounding mode */
    int i, end;
    share_of(items->n_items, items->n_tasks, index, &i, &end);
    for (; i < end; i++) items->each(items->job, i, worker);
    fp_leave(fp);
}

static void for_each(const gemma3_state *s, int n_items, gemma3_task *each, void *job)
{
    struct items w = {n_items, min_int(n_items, s->p.n_threads * TASKS_PER_THREAD), each, job};
    if (n_items > 1 && s->p.n_threads > 1) s->p.parallel_for(s->p.pool, w.n_tasks, items_task, &w);
    else
        for (int i = 0; i < n_items; i++) each(job, i, 0);
}

/* y = rms(x) * w; x and y are [n][width] */
struct norm {
    const gemma3_state *s;
    float *y;
    const float *x, *w;
    int width;
};

static void norm_task(void *arg, int i, int worker)
{
    const struct norm *job = arg;
    size_t at = (size_t)i * job->width;
    (void)worker;
    job->s->m->kernels->rmsnorm(job->y + at, job->x + at, job->w, job->width, job->s->c->rms_eps);
}

/* A single token's heads are not worth calling the other threads. */
static void rmsnorm(const gemma3_state *s, float *y, const float *x, const float *w, int n,
                    int width)
{
    struct norm job = {.s = s, .y = y, .x = x, .w = w, .width = width};
    if ((int64_t)n * width >= 16384) for_each(s, n, norm_task, &job);
    else
        for (int i = 0; i < n; i++) norm_task(&job, i, 0);
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

/* w itself; or, when it is not in memory, its rows row .. row + n - 1, n <= TILE_ROWS, read into
 * the worker's room, as a matrix of their own. */
static struct matrix rows_in_memory(const gemma3_state *s, const struct matrix *w, int row, int n,
                                    int worker)
{
    struct matrix here = *w;
    const gemma3_source *from = &s->m->source;
    if (w->data) return here;
    uint8_t *room = s->streamed + (size_t)worker * TILE_ROWS * s->m->streamed_row;
    uint64_t offset = w->offset + (uint64_t)row * w->row_bytes;
    if (from->read(from->user, offset, room, n * w->row_bytes)) {
        memset(room, 0, n * w->row_bytes);
        s->read_failed[worker] = 1;
    }
    here.data = room;
    here.rows = n;
    return here;
}

static void dequantize_row(const gemma3_state *s, const struct matrix *w, int row, float *out)
{
    struct matrix here = rows_in_memory(s, w, row, 1, 0);
    s->m->kernels->dequantize(&here, w->data ? row : 0, 1, out);
}

struct matmul {
    const gemma3_state *s;
    const struct linear *to;
    const float *in;                  /* [n][cols] */
    int n;
    size_t row_blocks;                /* of a row of q8 */
};

/* n_rows rows of one tile times every vector, into acc, which is 0. Section 8 says how. */
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
    struct matrix here = rows_in_memory(job->s, to->w, row, n_rows, worker);
    memset(acc, 0, job->n * sizeof *acc);
    mul_tile(job, &here, to->w->data ? row : 0, n_rows, worker);
    for (int i = 0; i < job->n; i++)
        copy_floats(to->out + (size_t)i * to->w->rows + row, acc[i], n_rows);
}

static void quantize_task(void *arg, int i, int worker)
{
    const struct matmul *job = arg;
    int cols = job->to->w->cols;
    (void)worker;
    const float *x = job->in + (size_t)i * cols;
    job->s->m->kernels->quantize(job->s->q8 + i * job->row_blocks, x, cols);
}

/* out = w in for each of n_to matrices with the same input in [n][cols]. */
static void matmul(const gemma3_state *s, const struct linear *to, int n_to, const float *in, int n)
{
    struct matmul job = {s, to, in, n, ((size_t)to->w->cols + 31) / 32};
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
 * sum and its error (Knuth's TwoSum) are rounded to odd (a double whose last bit says "there was
 * more"), so that rounding it again, to float, cannot go wrong (Boldo and Melquiond, "Emulation of
 * FMA and correctly rounded sums"). */
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

/* Round half to even for |x| < 2^22: in this range a float's last bit is 1 once 1.5 * 2^23 is
 * added, so the addition itself rounds; the integer stands in the low bits. */
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

/* The rounding mode and the flush-to-zero bits belong to the thread, and the caller may have
 * changed them: every public call and every worker sets IEEE's and puts the caller's back. */
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
    fp_leave(old & ~0x07c89f00u); /* rounding, flush, default NaN, traps; comparisons' flags stay */
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

/* exp in double: x = n ln2 + r, Taylor's polynomial of degree 13 in r, then n goes into the
 * exponent, in two parts, as 2^n may be too small or large for a number. Without branches, so that
 * sums of many become vectors. n stands in the low bits of n + 1.5 * 2^52. */
INLINE double exp_double(double x)
{
    static const double taylor[14] = {
        1, 1, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320,
        1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
    union { double d; uint64_t u; } shifted = {x * 0x1.71547652b82fep+0 + 0x1.8p52}, low, high;
    double n = shifted.d - 0x1.8p52, r = (x - n * LN2_HIGH) - n * LN2_LOW, e = taylor[13];
    UNROLL for (int k = 12; k >= 0; k--) e = taylor[k] + e * r;
    low.u = ((shifted.u + 4096) >> 1) - 2048;
    high.u = (shifted.u - low.u + 1023) << 52;
    low.u = (low.u + 1023) << 52;
    e = e * low.d * high.d;
    e = x < -745.2 ? 0 : e;
    e = x > 709.78 ? (double)float_of(0x7f800000) : e;
    return x != x ? x : e;
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

/* cos and sin of a rotary angle, 0 <= angle < 2^31: less k quarter turns in three steps, then
 * Taylor's series on [-pi/4, pi/4]. pi/2 is cut into parts of 33 bits and k into its low 20 bits
 * and the rest, so that all products with the first two parts are exact. A model is refused whose
 * angles could reach 2^31 (read_config); NaN for them here, because casts of such numbers
 * differ between CPUs. */
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
    static const double even_term[9] = {
        1, -1.0 / 2, 1.0 / 24, -1.0 / 720, 1.0 / 40320, -1.0 / 3628800, 1.0 / 479001600,
        -1.0 / 87178291200, 1.0 / 20922789888000};
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
    volatile uint32_t nan_bits = 0x7fc00000;
    float five = 5 * one, huge = big, unit = one; /* read once, so that a compiler may be tempted */
    float nan = float_of(nan_bits);
    if (nan == nan) return "what is not a number is taken for one";
    if (tiny / 2 == 0) return "subnormal numbers are flushed to zero";
    if (big + one != big || big + 3 * one != big + 4 * one)
        return "sums are not rounded to nearest, ties to even";
    if ((huge + unit) - huge != 0) return "sums are reordered as if floats were real numbers";
    if (five / 3.0f != 0x1.aaaaaap+0f)
        return "a division became a multiplication by the reciprocal";
    if ((large + 1.5) - large != 2)
        return "doubles are wider than double: 32-bit x86 wants -msse2 -mfpmath=sse";
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
 * little-endian. Here is first what a block of one row means, then how 32 rows are interleaved for
 * the vector kernels, which read the same drawings, and last how a tile is multiplied. */

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
 * then it is m * 2^-24, made from the integer, as arithmetic on subnormal floats can be slow. */
INLINE float f16_to_f32(uint16_t x)
{
    uint32_t sign = (uint32_t)(x & 0x8000) << 16, exponent = x & 0x7c00;
    uint32_t rebias = exponent == 0x7c00 ? 0x70000000 : 0x38000000; /* 31 -> 255, 15 -> 127 */
    uint32_t normal = ((uint32_t)(x & 0x7fff) << 13) + rebias;
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

/* The integer formats. A block of 256 elements is 8 groups of 32; g is the group wanted, j = 0 ..
 * 31 an element of it, h = j / 16 its half. q is the code as the bits say it.
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
 *             each half of 128 elements has 64 bytes of ql, 32 of qh and 4 groups k: low four bits
 *             in nibble k / 2 of ql[32(k % 2) + j], high two in bits 2k of qh[j]; scales[2g + h] */
static const int8_t iq4_level[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                     1, 13, 25, 38, 53, 69, 89, 113};

/* Where the 16 codes of half h of group g are: byte j of `low` shifted right, masked, and what byte
 * j of `top` has, shifted left by up. A mask of 0: there is no top. */
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

enum { MAX_BYTES_OF_32 = 34 };        /* Q8_0 */

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
            int q = p[b.low + j] >> b.shift & b.mask;
            q |= (p[b.top + j] >> b.top_shift & b.top_mask) << b.up;
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
    if (f->type == IQ4_XS) {
        int low = p[4 + g / 2] >> 4 * (g % 2) & 15, top = load_u16_le(p + 2) >> 2 * g & 3;
        o->d *= (float)((low | top << 4) - 32);
    }
    if (f->type == Q4_K || f->type == Q5_K) {
        int low = p[4 + g % 4], mid = p[8 + g % 4], high = p[12 + g % 4];
        o->d *= (float)(g < 4 ? low & 63 : (high & 15) | low >> 6 << 4);
        o->m *= -(float)(g < 4 ? mid & 63 : high >> 4 | mid >> 6 << 4);
    }
    if (f->type == Q2_K) o->m = -o->m;
    for (int h = 0, i = 2 * g; h < 2 && f->has_halves; h++, i++) {
        if (f->type == Q2_K) o->scale[h] = p[i] & 15, o->min[h] = p[i] >> 4;
        if (f->type == Q3_K) {
            int low = p[96 + i % 8] >> 4 * (i / 8) & 15, top = p[104 + i % 4] >> 2 * (i / 4) & 3;
            o->scale[h] = (low | top << 4) - 32;
        }
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
 * For the vector kernels an integer matrix lies as tiles: 32 rows whose bytes are interleaved, so
 * that each 32-bit lane of a vector register holds 4 bytes of one row: a lane's sum is that row's,
 * and none is needed across lanes. What lies at byte `at` of a block lies at 32 * at in the tile:
 * codes in units of 4 bytes, scales in units of one number. A block of Q4_0 in a tile (d scale, q
 * bytes of nibbles):
 *
 *     0                   64                                                 192            576
 *     | d0 | d1 | .. | d31 | row 0 q0-3 | row 1 q0-3 | .. | row 31 q0-3 | row 0 q4-7 | .. | */

/* n units of each row, side by side. */
INLINE void interleave(uint8_t *to, const uint8_t *from, size_t row_bytes, int n_rows, int n,
                       int unit)
{
    for (int k = 0; k < n; k++)
        for (int r = 0; r < n_rows; r++)
            memcpy(to + (k * TILE_ROWS + r) * unit, from + r * row_bytes + k * unit, unit);
}

/* The same for all rows of a tile and units of 4 bytes, two rows and two units at a time: most of
 * what opening a model does. first and second are in memory's order, whatever the CPU's. */
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
__attribute__((noinline)) /* gcc's -O3 sees writes past a tile's end where it is inlined */
static void make_tile(uint8_t *tile, const uint8_t *rows, size_t row_bytes, int n_rows,
                      int n_blocks, const struct format *f)
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

enum { PREFETCH_FROM = 4, PREFETCH_AHEAD = 8192, PREFETCH_STREAM = 2048 };
enum { UNPACK_FROM = 4 };              /* vectors from which on a panel pays */
enum { COLS_AT_ONCE = 512, POSITIONS_AT_ONCE = 128 }; /* what stays in a cache of 32 KB */
enum { PANEL = 100 };                 /* beside the types of tensors: a tile that is unpacked */

/* A byte four times. */
INLINE int32_t four_times(int byte) { return (int32_t)(0x01010101u * (uint32_t)byte); }

/* Where a kernel is: a block of a tile or a panel, the group in it, the activations there. */
struct place {
    const uint8_t *from;
    int g;
    const struct q8_block *x;
};

enum { PANELS = 8 };                  /* unpacked at a time: 256 columns, one super-block */

/* 32 columns of a tile, unpacked by the vector kernels that need them several times. */
struct panel {
    uint8_t code[32 * TILE_ROWS];     /* element 4q + k of row r at (q * TILE_ROWS + r) * 4 + k */
    float d[TILE_ROWS], m[TILE_ROWS], scale[2][TILE_ROWS], min[2][TILE_ROWS]; /* as struct group */
};

/* A worker's room for the weights that it is multiplying. */
struct unpacked {
    struct panel panel[PANELS];
    uint8_t tile[PANELS * TILE_ROWS * MAX_BYTES_OF_32]; /* of a matrix that was not repacked */
};

/* Rows of an integer format as floats, for all tokens. */
static void dequantize_rows(const gemma3_state *s, const struct matrix *w, int row, int worker,
                            struct product *p)
{
    float *rows = s->row_floats + (size_t)worker * TILE_ROWS * w->cols;
    s->m->kernels->dequantize(w, row, p->n_rows, rows);
    to_file_order(rows, p->n_rows * w->cols); /* mul_floats reads floats as files have them */
    p->format = find_format(F32);
    p->rows = (const uint8_t *)rows;
    p->row_bytes = 4 * (size_t)w->cols;
}

/* Rows that lie as in the file are made into tiles, PANELS blocks of 32 columns at a time. */
static void mul_untiled(const gemma3_state *s, struct product p, uint8_t *tile)
{
    const struct format *f = p.format;
    const uint8_t *rows = p.rows;
    int n_blocks = p.cols / f->elements, at_once = 32 * PANELS / f->elements;
    p.rows = tile;
    for (int b = 0, take; b < n_blocks; b += take, p.q8 += take * (f->elements / 32)) {
        take = min_int(n_blocks - b, at_once);
        make_tile(tile, rows + (size_t)b * f->bytes, p.row_bytes, p.n_rows, take, f);
        p.cols = take * f->elements;
        s->m->kernels->mul_codes(&p);
    }
}

static void mul_tile(const struct matmul *job, const struct matrix *w, int row, int n_rows,
                     int worker)
{
    const gemma3_state *s = job->s;
    const struct kernels *k = s->m->kernels;
    int floats = is_float(w->format), codes = !floats && !s->m->exact;
    struct product p = {.format = w->format, .rows = w->data + row * w->row_bytes,
                        .row_bytes = w->row_bytes, .n_rows = n_rows, .cols = w->cols,
                        .n = job->n, .q8 = s->q8, .x = job->in,
                        .x_stride = codes ? job->row_blocks : (size_t)w->cols,
                        .acc = acc_of(s, worker),
                        .scratch = codes ? s->unpacked[worker].panel : NULL};
    if (!floats && !codes) dequantize_rows(s, w, row, worker, &p);
    if (!codes) k->mul_floats(&p);
    else if (w->tiled || !k->tiles) k->mul_codes(&p);
    else mul_untiled(s, p, s->unpacked[worker].tile);
}

/* ---- What vector kernels share, whatever their width ---- */

typedef float four __attribute__((vector_size(16)));

/* The last two steps of rule 4's tree, lane j + lane j+2, then + 1, for four sums. */
#if defined(HAVE_X86)
INLINE four last_joins(four a, four b, four c, four d)
{
    four ab = (four)_mm_movelh_ps((__m128)a, (__m128)b) + (four)_mm_movehl_ps((__m128)b, (__m128)a);
    four cd = (four)_mm_movelh_ps((__m128)c, (__m128)d) + (four)_mm_movehl_ps((__m128)d, (__m128)c);
    __m128 x = (__m128)ab, y = (__m128)cd;
    return (four)_mm_shuffle_ps(x, y, 0x88) + (four)_mm_shuffle_ps(x, y, 0xdd);
}
#elif defined(HAVE_NEON)
INLINE four last_joins(four a, four b, four c, four d)
{
    float32x4_t ab = vcombine_f32(vget_low_f32(a), vget_low_f32(b));
    float32x4_t cd = vcombine_f32(vget_low_f32(c), vget_low_f32(d));
    ab += vcombine_f32(vget_high_f32(a), vget_high_f32(b));
    cd += vcombine_f32(vget_high_f32(c), vget_high_f32(d));
    return vpaddq_f32(ab, cd);
}
#endif

#if defined(HAVE_X86) || defined(HAVE_NEON)
/* Four times 16 lanes, or once (n 1), as rule 4's tree. */
INLINE void join_4(float out[4], float lane[4][16], int n)
{
    four sum[4], part[4];
    UNROLL for (int s = 0; s < 4; s++) {
        UNROLL for (int k = 0; k < 4; k++) memcpy(&part[k], lane[s % n] + 4 * k, sizeof part[k]);
        sum[s] = (part[0] + part[2]) + (part[1] + part[3]);            /* lane j + lane j+8, + 4 */
    }
    sum[0] = last_joins(sum[0], sum[1], sum[2], sum[3]);
    memcpy(out, &sum[0], sizeof sum[0]);
}
#endif

/* Asks for memory before it is needed, a little with each block, because a burst stalls.
 * PREFETCH_FROM: with that many vectors a Q4_0 tile is multiplied again and again, and meanwhile
 * the next tile comes; left to itself the machine notices too late where a tile ends (prompt x1.2).
 * One vector is a stream that needs no help. PREFETCH_AHEAD: bytes ahead of other formats, which
 * are unpacked field by field, as no machine foresees (Q6_K 9 -> 27 GB/s on one core, Q4_K 7 ->
 * 21). PREFETCH_STREAM: bytes ahead in attention's values. */
INLINE void prefetch(const uint8_t *p, size_t n_bytes)
{
    for (size_t at = 0; at < n_bytes; at += 64) __builtin_prefetch(p + at);
}

/* What a copy of the kernels is compiled for. */
struct kind {
    int type;                 /* of a tile that is read as it lies (for one vector: Q4_K 9 -> 17 */
                              /* GB/s on AVX2 against a panel), or PANEL */
    int quads;                /* products of 4 codes that a dot_sum holds */
    int has_min, has_halves, is_wide; /* as in struct format */
};

#endif /* !INSTANCE */

#if defined(INSTANCE)
/* ==== 9. The operations: definitions ============================================================
 *
 * From here to the end of section 10 the text is compiled once for plain C and once for each
 * instruction set: the file includes itself there, with INSTANCE set to the name that ends the
 * names of all functions, and LANES to the number of floats in a vector register, 1 in plain C.
 * What stands in this section is the definition of each operation. The pieces that go element by
 * element are plain C in every instance: the compiler makes vectors of their loops, and since every
 * operation is one IEEE rounding, all give the same bits. Those that take nearly all of the time,
 * mul_codes with its unpacking, mul_floats, mix_values and dequantize, are written a second time,
 * for vectors, in section 10. */

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

/* Rule 1. A block that holds NaN or infinity becomes d = NaN and codes 0, one that is nearly 0
 * becomes all 0. */
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

/* RMSNorm (arXiv 1910.07467). Gemma's formula has (1 + w): the converters to GGUF have already
 * added the 1. */
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

/* Rule 9: the sum of exp(logits[j] - max) in double, in 16 lanes. */
static double NAME(sum_exp)(const float *logits, int n, float max)
{
    double lane[16] = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) lane[j] += exp_double((double)logits[i + j] - max);
    for (int j = 0; i + j < n; j++) lane[j] += exp_double((double)logits[i + j] - max);
    for (int step = 8; step > 0; step /= 2)
        for (int j = 0; j < step; j++) lane[j] += lane[j + step];
    return lane[0];
}
#endif /* !HAS_PIECES */

#if LANES == 1
/* Rows as they lie in the file. The values of the `gguf` package, bit for bit: each is rounded at
 * most twice, as there. */
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

/* sum + 16 codes, which are bits of bytes, times 16 of x. This is a board's main work: Helium
 * multiplies 16 bytes at once, a Cortex-M with DSP instructions two. */
INLINE int32_t NAME(dot_16)(int32_t sum, const uint8_t *w, int shift, int mask, const int8_t *x)
{
#if defined(__ARM_FEATURE_MVE)
    uint8x16_t code = vandq_u8(vshlq_r_u8(vldrbq_u8(w), -shift), vdupq_n_u8((uint8_t)mask));
    return vmladavaq_s8(sum, vreinterpretq_s8_u8(code), vldrbq_s8(x));
#elif defined(__ARM_FEATURE_SIMD32)
    for (int j = 0; j < 16; j += 4) {
        uint32_t a = load_u32_le(w + j) >> shift & (uint32_t)mask * 0x01010101;
        uint32_t b = load_u32_le((const uint8_t *)x + j);
        sum = __smlad(__sxtb16(a), __sxtb16(b), sum); /* bytes 0 and 2, then 1 and 3 */
        sum = __smlad(__sxtb16(a >> 8 | a << 24), __sxtb16(b >> 8 | b << 24), sum);
    }
    return sum;
#else
    for (int j = 0; j < 16; j++) sum += (int8_t)(w[j] >> shift & mask) * x[j];
    return sum;
#endif
}

/* Rows of integer formats, as they lie in the file (rule 2). Small models are made of these two. */
INLINE void NAME(mul_plain)(const struct product *p, int type)
{
    for (int r = 0; r < p->n_rows; r++)
        for (int b = 0; b < p->cols / 32; b++) {
            const uint8_t *block = p->rows + r * p->row_bytes + b * (type == Q4_0 ? 18 : 34);
            const uint8_t *w = block + 2;
            float d = f16_to_f32(load_u16_le(block));
            for (int i = 0; i < p->n; i++) {
                const struct q8_block *x = &p->q8[i * p->x_stride + b];
                int32_t isum = type == Q4_0 ? NAME(dot_16)(x->minus_8_sums, w, 0, 15, x->code) :
                                              NAME(dot_16)(0, w, 0, 255, x->code);
                isum = type == Q4_0 ? NAME(dot_16)(isum, w, 4, 15, x->code + 16) :
                                      NAME(dot_16)(isum, w + 16, 0, 255, x->code + 16);
                p->acc[i][r] = fma_of((float)isum, d * x->d, p->acc[i][r]);
            }
        }
}

static void NAME(mul_codes)(const struct product *p)
{
    const struct format *f = p->format;
    if (f->type == Q4_0) {
        NAME(mul_plain)(p, Q4_0);
        return;
    }
    if (f->type == Q8_0) {
        NAME(mul_plain)(p, Q8_0);
        return;
    }
    for (int r = 0; r < p->n_rows; r++)
        for (int b = 0; b < p->cols / 32; b++) {
            const uint8_t *row = p->rows + r * p->row_bytes;
            const uint8_t *block = row + (size_t)(32 * b / f->elements) * f->bytes;
            struct group w;
            unpack(f, block, b % (f->elements / 32), &w);                               /* step 1 */
            for (int i = 0; i < p->n; i++) {
                const struct q8_block *x = &p->q8[i * p->x_stride + b];
                int32_t half[2] = {0, 0};
                for (int j = 0; j < 32; j++) half[j / 16] += w.code[j] * x->code[j];    /* step 2 */
                int32_t isum = w.scale[0] * half[0] + w.scale[1] * half[1];
                int32_t msum = w.min[0] * x->sum[0] + w.min[1] * x->sum[1];
                float *acc = &p->acc[i][r];
                *acc = fma_of((float)isum, w.d * x->d, *acc);                           /* step 3 */
                if (f->m) *acc = fma_of(w.m, (float)msum * x->d, *acc);                 /* step 4 */
            }
        }
}

/* Rows of floats (rule 4). They stay as they lie in the file: so vector kernels hold 16 columns of
 * a row in registers, not 16 rows, and that is why the contract's order has 16 lanes. */
static void NAME(mul_floats)(const struct product *p)
{
    for (int i = 0; i < p->n; i++)
        for (int r = 0; r < p->n_rows; r++) {
            const float *x = p->x + i * p->x_stride;
            float lane[16] = {0};
            for (int j = 0; j < p->cols; j++)
                lane[j % 16] = fma_of(load_float(p->format->type, p->rows + r * p->row_bytes, j),
                                      x[j], lane[j % 16]);
            p->acc[i][r] = join_lanes(lane);
        }
}

static void NAME(mix_values)(const struct mix *m)
{
    for (int i = 0; i < m->n; i++)
        for (int j = 0; j < m->width; j++) {
            float sum = m->out[i * m->out_stride + j];
            for (int p = 0; p < m->n_pos; p++)
                sum = fma_of(m->e[i * m->e_stride + p],
                             load_float(m->type, m->v + p * m->v_bytes, j), sum);
            m->out[i * m->out_stride + j] = sum;
        }
}

#else
/* ==== 10. The operations: vector kernels ========================================================
 *
 * The verbs first: what an instruction set must be able to do. floats and ints hold LANES numbers
 * of 32 bits; + - * & | ^ and shifts go lane by lane in GNU C, and a single number next to a vector
 * counts for every lane. */

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
#define look_up NAME(look_up)         /* bytes 0 .. 15 -> iq4_level */
#define dot_begin NAME(dot_begin)     /* start + products of 4 bytes of w (unsigned) and 4 of x */
#define dot_add NAME(dot_add)         /* in each lane; start counts in begin or in end, as the */
#define dot_end NAME(dot_end)         /* instructions like it */
#define dot_wide NAME(dot_wide)       /* the same at once for w signed */

/* Without a dot instruction dot_sum is int16: 8 quads of 4-bit codes fit, 4 of 5 bits, 2 of 6.
 * x86's dot instruction wants w unsigned: wide codes get + 128. */
#define INT16_SUMS (LANES < 16 && !HAS_DOT)
#define FLIPS (LANES > 4 && HAS_DOT)

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));

#if HAS_DOT
typedef ints dot_sum;
INLINE dot_sum dot_begin(int32_t start) { return (ints){0} + start; }
INLINE ints dot_end(dot_sum sum, int32_t start) { (void)start; return sum; }
#endif

#if LANES == 8
/* AVX2: maddubs adds neighbouring products to int16, madd those to int32. With AVX-VNNI dpbusd does
 * all that at once. */
INLINE floats splat(float x) { return (floats)_mm256_set1_ps(x); }
INLINE floats mul_add(floats a, floats b, floats c)
{
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
INLINE floats widen_f16(const void *p) { return (floats)_mm256_cvtph_ps(_mm_loadu_si128(p)); }
INLINE ints widen_u16(const void *p) { return (ints)_mm256_cvtepu16_epi32(_mm_loadu_si128(p)); }
INLINE ints widen_u8(const void *p) { return (ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(p)); }
INLINE ints look_up(ints c)
{
    __m256i level = _mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)iq4_level));
    return (ints)_mm256_shuffle_epi8(level, (__m256i)c);
}
#if HAS_DOT
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
}
/* wide codes come as code + 128 */
INLINE ints dot_wide(ints sum, ints w, ints x) { return dot_add(sum, w, x); }
#else
typedef ints dot_sum;
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
INLINE floats mul_add(floats a, floats b, floats c)
{
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE floats widen_f16(const void *p) { return (floats)_mm512_cvtph_ps(_mm256_loadu_si256(p)); }
INLINE ints widen_u16(const void *p) { return (ints)_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)); }
INLINE ints widen_u8(const void *p) { return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(p)); }
INLINE ints look_up(ints c)
{
    __m512i level = _mm512_broadcast_i32x4(_mm_loadu_si128((const void *)iq4_level));
    return (ints)_mm512_shuffle_epi8(level, (__m512i)c);
}
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
}
/* wide codes come as code + 128 */
INLINE ints dot_wide(ints sum, ints w, ints x) { return dot_add(sum, w, x); }

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
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    return vdotq_s32(sum, vreinterpretq_s8_s32(w), vreinterpretq_s8_s32(x));
}
#else
typedef struct { int16x8_t low, high; } dot_sum;
INLINE dot_sum dot_begin(int32_t start)
{
    (void)start;
    return (dot_sum){vdupq_n_s16(0), vdupq_n_s16(0)};
}
INLINE dot_sum dot_add(dot_sum sum, ints w, ints x)
{
    int8x16_t a = vreinterpretq_s8_s32(w), b = vreinterpretq_s8_s32(x);
    return (dot_sum){vmlal_s8(sum.low, vget_low_s8(a), vget_low_s8(b)),
                     vmlal_high_s8(sum.high, a, b)};
}
INLINE ints dot_end(dot_sum sum, int32_t start)
{
    return vpaddlq_s16(vpaddq_s16(sum.low, sum.high)) + start;
}
#endif
INLINE ints dot_wide(ints sum, ints w, ints x)
{
    return sum + dot_end(dot_add(dot_begin(0), w, x), 0);
}
#endif

/* The same in every instruction set. */
INLINE ints load_ints(const void *p) { ints v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_ints(void *p, ints v) { memcpy(p, &v, sizeof v); }
INLINE floats load_floats(const void *p) { floats v; memcpy(&v, p, sizeof v); return v; }
INLINE void store_floats(void *p, floats v) { memcpy(p, &v, sizeof v); }
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

/* Codes 4q .. 4q+3 of the half that b finds, for LANES rows from row r on. */
#define codes_of NAME(codes_of)
INLINE ints codes_of(int type, struct code_bits b, const uint8_t *tile, int q, int r)
{
    const uint8_t *p = tile + 4 * r + TILE_ROWS * 4 * (q % 4);
    ints w = load_ints(p + TILE_ROWS * b.low) >> b.shift & four_times(b.mask);
    if (b.top_mask)
        w |= (load_ints(p + TILE_ROWS * b.top) >> b.top_shift & four_times(b.top_mask)) << b.up;
    if (fifth_bits(type)) { /* the product copies bit k of four to the lowest bit of byte k */
        ints four = load_ints(tile + TILE_ROWS * fifth_bits(type) + 4 * r) >> 4 * q & 15;
        w |= (four * 0x00204081 & 0x01010101) << 4;
    }
    if (type == IQ4_NL || type == IQ4_XS) w = look_up(w);
    if (FLIPS && (type == Q8_0 || type == IQ4_NL || type == IQ4_XS)) w ^= four_times(128);
    return w;
}

/* What unpack_scales does, for all rows of a tile. */
static void NAME(unpack_scales)(const struct format *f, const uint8_t *tile, int g,
                                struct panel *o)
{
    const int type = f->type;
    for (int r = 0; r < TILE_ROWS; r += LANES) {
        const uint8_t *f16 = tile + 2 * r, *byte = tile + r, *s = byte + TILE_ROWS * (4 + g % 4);
        floats d = widen_f16(f16 + TILE_ROWS * f->d), m = widen_f16(f16 + TILE_ROWS * f->m);
        if (type == Q4_K || type == Q5_K) {
            ints low = widen_u8(s), mid = widen_u8(s + TILE_ROWS * 4);
            ints high = widen_u8(s + TILE_ROWS * 8);
            d *= to_floats(g < 4 ? low & 63 : (high & 15) | low >> 6 << 4);
            m *= -to_floats(g < 4 ? mid & 63 : high >> 4 | mid >> 6 << 4);
        }
        if (type == IQ4_XS) {
            ints low = widen_u8(byte + TILE_ROWS * (4 + g / 2)) >> 4 * (g % 2) & 15;
            d *= to_floats((low | (widen_u16(f16 + TILE_ROWS * 2) >> 2 * g & 3) << 4) - 32);
        }
        store_floats(o->d + r, d);
        store_floats(o->m + r, type == Q2_K ? -m : m);
        for (int h = 0, i = 2 * g; h < 2; h++, i++) {
            int at = type == Q6_K ? 192 + i : type == Q3_K ? 96 + i % 8 : i;
            ints scale = {0}, min = scale + 1;
            if (f->has_halves) scale = widen_u8(byte + TILE_ROWS * at);
            if (type == Q2_K) min = scale >> 4, scale &= 15;
            else if (type == Q3_K) {
                ints top = widen_u8(byte + TILE_ROWS * (104 + i % 4)) >> 2 * (i / 4) & 3;
                scale = ((scale >> 4 * (i / 8) & 15) | top << 4) - 32;
            } else scale = type == Q6_K ? (scale ^ 128) - 128 : min;
            store_floats(o->scale[h] + r, to_floats(scale));
            store_floats(o->min[h] + r, to_floats(min));
        }
    }
}

static void NAME(unpack_panel)(const struct format *f, const uint8_t *tile, int g, struct panel *o)
{
    const int32_t flip = FLIPS && f->type == Q8_0 ? four_times(128) : 0;
    const int simple = f->type == Q8_0 || (!f->is_wide && !fifth_bits(f->type));
    NAME(unpack_scales)(f, tile, g, o);
    for (int q = 0; q < 8; q++) {
        struct code_bits b = find_codes(f->type, g, q / 4);
        const uint8_t *low = tile + TILE_ROWS * (b.low + 4 * (q % 4));
        uint8_t *to = o->code + 4 * TILE_ROWS * q;
        if (simple && !b.top_mask) /* codes_of in short */
            for (int r = 0; r < TILE_ROWS; r += LANES)
                store_ints(to + 4 * r,
                           (load_ints(low + 4 * r) >> b.shift & four_times(b.mask)) ^ flip);
        else
            for (int r = 0; r < TILE_ROWS; r += LANES)
                store_ints(to + 4 * r, codes_of(f->type, b, tile, q, r));
    }
}

/* ---- A tile times vectors ----
 *
 * The steps of rule 2, as in the definition: (1) the codes of a group of 32 columns, (2) their
 * integer products with the activations' codes, (3) the sums scaled by d of both, (4) the minimum.
 * Here for NT vectors from i0 on and NH registers of rows from r0 on at once. NT, NH and the kind
 * are constants in each call, so that INLINE makes a copy of the code whose sums stay in registers.
 * Tried: 8 vectors times one register 0.88 of 4 times 2 on AVX2, 6 times 2 0.96, 8 times 2 on
 * AVX-512 0.8 to 1; formats read at run time where one vector is multiplied 0.5. */
#define dot_group NAME(dot_group)
#define mul_part NAME(mul_part)
#define mul_vectors NAME(mul_vectors)

/* Steps 1 and 2: isum = the integer products of one group, with halves' scales. */
INLINE void dot_group(const struct product *p, struct kind kind, int NT, int NH,
                      const struct place *at, floats isum[8][8])
{
    const int nibbles = kind.type == Q4_0, wide = kind.is_wide && !FLIPS, quads = kind.quads;
    const int bias = FLIPS && p->format->is_wide ? 128 : p->format->bias;
    const struct panel *o = kind.type == PANEL ? (const struct panel *)at->from : p->scratch;
    ints total[8][8];
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int h = 0; h < NH; h++) total[i][h] = (ints){0}, isum[i][h] = splat(0);
    for (int q0 = 0; q0 < (nibbles ? 4 : 8); q0 += quads) {
        dot_sum part[8][8];
        int32_t start[8]; /* what takes the bias of the codes away */
        UNROLL for (int i = 0; i < NT; i++) {
            const struct q8_block *x = at->x + i * p->x_stride;
            start[i] = nibbles ? x->minus_8_sums : q0 % 4 ? 0 :
                       -bias * (quads == 8 ? x->sum[0] + x->sum[1] : x->sum[q0 / 4]);
            UNROLL for (int h = 0; h < NH; h++) part[i][h] = dot_begin(start[i]);
        }
        UNROLL for (int q = q0; q < q0 + quads; q++)
            UNROLL for (int high = 0; high <= nibbles; high++) {
                ints w[8];
                UNROLL for (int h = 0; h < NH; h++) {
                    const int r = LANES * h, code = 4 * (TILE_ROWS * q + r);
                    if (nibbles)
                        w[h] = load_ints(at->from + TILE_ROWS * 2 + code) >> 4 * high &
                               four_times(15);
                    else if (kind.type == PANEL) w[h] = load_ints(o->code + code);
                    else
                        w[h] = codes_of(kind.type, find_codes(kind.type, at->g, q / 4), at->from,
                                        q, r);
                }
                UNROLL for (int i = 0; i < NT; i++) {
                    ints c = repeat_4(at->x[i * p->x_stride].code + 4 * q + 16 * high);
                    UNROLL for (int h = 0; h < NH; h++)
                        if (wide) total[i][h] = dot_wide(total[i][h], w[h], c);
                        else part[i][h] = dot_add(part[i][h], w[h], c);
                }
            }
        UNROLL for (int i = 0; i < NT; i++)
            UNROLL for (int h = 0; h < NH; h++) {
                if (!wide) total[i][h] += dot_end(part[i][h], start[i]);
                if (!kind.has_halves || (q0 + quads) % 4) continue;
                floats scale = load_floats(o->scale[q0 / 4] + LANES * h);
                isum[i][h] = mul_add(scale, to_floats(total[i][h]), isum[i][h]); /* below 2^24, */
                total[i][h] = (ints){0};                            /* so that float is exact */
            }
    }
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int h = 0; h < NH; h++)
            if (!kind.has_halves) isum[i][h] = to_floats(total[i][h]);
}

/* All groups of the part's columns, in order. */
INLINE void mul_part(const struct product *p, struct kind kind, int NT, int NH, int i0, int r0)
{
    const struct format *f = p->format;
    const int panels = kind.type == PANEL, groups = panels ? 1 : f->elements / 32;
    const int n_groups = p->cols / 32;
    const size_t bytes = panels ? sizeof(struct panel) : (size_t)TILE_ROWS * f->bytes;
    struct place at = {p->rows + 4 * r0, 0, p->q8 + i0 * p->x_stride};
    floats sum[8][8], isum[8][8];
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int h = 0; h < NH; h++)
            sum[i][h] = load_floats(p->acc[i0 + i] + r0 + LANES * h);
    for (int b = 0; b < n_groups; b++, at.x++) {
        const struct panel *o = panels ? (const struct panel *)at.from : p->scratch;
        if (kind.type == Q4_0 && i0 == 0 && r0 == 0 && p->n >= PREFETCH_FROM)
            prefetch(at.from + n_groups * bytes, bytes);
        if (kind.type != Q4_0 && !panels) {
            prefetch(at.from + PREFETCH_AHEAD + at.g * (bytes / groups), bytes / groups);
            NAME(unpack_scales)(f, at.from, at.g, p->scratch);
        }
        dot_group(p, kind, NT, NH, &at, isum);
        UNROLL for (int h = 0; h < NH; h++) {
            const int r = LANES * h;
            floats d = kind.type == Q4_0 ? widen_f16(at.from - 2 * r0 + 2 * r)
                                         : load_floats(o->d + r);
            UNROLL for (int i = 0; i < NT; i++) {
                const struct q8_block *x = at.x + i * p->x_stride;
                sum[i][h] = mul_add(isum[i][h], d * splat(x->d), sum[i][h]); /* step 3 */
                if (!kind.has_min) continue;
                floats msum = splat(x->d_sum);                               /* step 4 */
                if (kind.has_halves) {
                    msum = splat((float)x->sum[0]) * load_floats(o->min[0] + r);
                    msum = mul_add(splat((float)x->sum[1]), load_floats(o->min[1] + r), msum);
                    msum *= splat(x->d);
                }
                sum[i][h] = mul_add(load_floats(o->m + r), msum, sum[i][h]);
            }
        }
        if (++at.g == groups) at.g = 0, at.from += bytes;
    }
    UNROLL for (int i = 0; i < NT; i++)
        UNROLL for (int h = 0; h < NH; h++)
            store_floats(p->acc[i0 + i] + r0 + LANES * h, sum[i][h]);
}

/* All rows times vectors i, i+1 .., NT at a time; returns the first that is left. */
INLINE int mul_vectors(const struct product *p, struct kind kind, int NT, int i)
{
    const int one = INT16_SUMS && kind.quads < 8 && kind.type == PANEL && !kind.is_wide;
    const int NH = NT == 1 ? TILE_ROWS / LANES : one ? 1 : 2;
    for (; i + NT <= p->n; i += NT)
        for (int r = 0; r < TILE_ROWS; r += NH * LANES) mul_part(p, kind, NT, NH, i, r);
    return i;
}

#if !HAS_PIECES
/* Rows r0 .. r0+n-1 of a panel as float32, cols apart: first their codes side by side. */
static void NAME(dequantize_panel)(const struct panel *o, const struct format *f, int r0, int n,
                                   float *out, int cols)
{
    const int bias = f->is_wide ? 128 : f->bias;
    uint8_t code[TILE_ROWS][32];
    for (int i = 0; i < n; i++)
        for (int q = 0; q < 8; q++)
            memcpy(code[i] + 4 * q, o->code + 4 * (TILE_ROWS * q + r0 + i), 4);
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
    enum { OF_4_BITS = 8, OF_5_BITS = INT16_SUMS ? 4 : 8, OF_6_BITS = INT16_SUMS ? 2 : 4,
           OF_8_BITS = FLIPS ? 8 : 4 };
    const struct format *f = p->format;
    const int has_min = f->m != 0, wide = f->is_wide && !FLIPS, blocks = p->cols / 32;
    const int groups = f->elements / 32, bytes = TILE_ROWS * f->bytes, i = p->n / 4 * 4;
    struct product some = *p;
    switch (f->type == Q4_0 || p->n < UNPACK_FROM ? f->type : PANEL) {
    case Q4_0: mul_vectors(p, (struct kind){Q4_0, 4, 0, 0, 0}, 1,
                           mul_vectors(p, (struct kind){Q4_0, 4, 0, 0, 0}, 4, 0)); return;
    case Q8_0: mul_vectors(p, (struct kind){Q8_0, OF_8_BITS, 0, 0, 1}, 1, 0); return;
    case Q4_K: mul_vectors(p, (struct kind){Q4_K, OF_4_BITS, 1, 0, 0}, 1, 0); return;
    case Q5_K: mul_vectors(p, (struct kind){Q5_K, OF_5_BITS, 1, 0, 0}, 1, 0); return;
    case Q6_K: mul_vectors(p, (struct kind){Q6_K, OF_6_BITS, 0, 1, 0}, 1, 0); return;
    case Q5_0: mul_vectors(p, (struct kind){Q5_0, OF_5_BITS, 0, 0, 0}, 1, 0); return;
    }
    some.rows = (const uint8_t *)p->scratch;
    for (int b = 0; b < blocks; b += PANELS, some.q8 += PANELS) {
        some.cols = 32 * min_int(blocks - b, PANELS);
        for (int a = 0; a < some.cols / 32; a++) {
            const uint8_t *block = p->rows + (size_t)((b + a) / groups) * bytes;
            prefetch(block + PREFETCH_AHEAD + a % groups * (bytes / groups), bytes / groups);
            NAME(unpack_panel)(f, block, (b + a) % groups, p->scratch + a);
        }
        if (wide) mul_vectors(&some, (struct kind){PANEL, 4, has_min, 0, 1}, 4, 0);
        else if (f->has_halves)
            mul_vectors(&some, (struct kind){PANEL, OF_6_BITS, has_min, 1, 0}, 4, 0);
        else if (!INT16_SUMS || f->type == Q4_K || f->type == Q4_1)
            mul_vectors(&some, (struct kind){PANEL, OF_4_BITS, has_min, 0, 0}, 4, 0);
        else mul_vectors(&some, (struct kind){PANEL, OF_5_BITS, has_min, 0, 0}, 4, 0);
        /* those that are left: one copy of the code for all formats */
        mul_vectors(&some, (struct kind){PANEL, OF_6_BITS, has_min, 1, f->is_wide}, 1, i);
    }
}

#if !HAS_PIECES
/* ---- Floats ---- */

/* Rows r0 .. r0+NR-1 times vectors i0 .. i0+NV-1: NR * NV sums of 16 lanes are more than registers
 * hold, but lanes are independent. So a pass over the columns takes one register of each 16 lanes:
 * with 8 lanes and 4 x 3 sums, 7 loads for 12 multiplications (2 x 2 sums in one pass: 8 for 8).
 * One row times one vector is a stream and takes all lanes in one pass. Of AVX2's peak in L1: F16
 * keys 0.76 (2 x 2: 0.56), long F16 rows 0.87, F32 rows of 1,152 columns 0.73, of 6,912 0.53
 * (0.42), bound by L2. Tried: rows in registers instead of vectors: 0.55; lanes of all tiles kept
 * in memory between pieces of columns: 6,912 columns 0.70, but F16 0.67; AVX-512 in 4 x 5 or 4 x 6:
 * no gain. */
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
                    int at = j + LANES * k;
                    UNROLL for (int i = 0; i < NV; i++)
                        xj[i] = load_floats(x + i * p->x_stride + at);
                    UNROLL for (int r = 0; r < NR; r++) {
                        floats w = widen(type, rows + r * p->row_bytes + (size_t)size * at);
                        UNROLL for (int i = 0; i < NV; i++)
                            sum[i][r][k] = mul_add(w, xj[i], sum[i][r][k]);
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
        join_4(joined, lane[i], NR);
        memcpy(p->acc[i0 + i] + r0, joined, NR * sizeof(float));
    }
}

#define mul_floats_of NAME(mul_floats_of)
INLINE void mul_floats_of(const struct product *p, int type)
{
    enum { NV = LANES == 8 ? 3 : 4 }; /* sums that fit 16 registers, or 32 */
    int r = 0, i;
    for (; r + 4 <= p->n_rows && p->n > 1; r += 4) {
        for (i = 0; p->n - i >= NV && (NV != 3 || p->n - i != 4); i += NV) /* 4 = 2 + 2 */
            mul_floats_part(p, type, r, i, 4, NV);
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

/* Positions p0 .. end-1 for NQ queries from q0 on, NP registers of the slice at a time: half a
 * slice for six queries widens each value four times for 16 queries, a whole one for two eight
 * times. */
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
            UNROLL for (int k = 0; k < NP; k++)
                sum[q][k] = load_floats(out + q * m->out_stride + LANES * k);
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
            UNROLL for (int k = 0; k < NP; k++)
                store_floats(out + q * m->out_stride + LANES * k, sum[q][k]);
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
    STRING(INSTANCE), LANES > 1, PIECE(quantize), NAME(mul_codes), PIECE(mul_floats),
    PIECE(dequantize), PIECE(rmsnorm), PIECE(rope), PIECE(store), PIECE(exp_scores),
    PIECE(mix_values), PIECE(gelu), PIECE(sum_exp)};

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
#define BEGIN_TARGET(features)                                                                     \
    PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
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
/* clang learned dotprod's attribute with 16; before, it makes such code if the command line asks */
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

/* Verbs that are other names below. */
#undef floats
#undef widen

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
static float exp_scores_of(float *score, int n, int first)
{
    return exp_scores_scalar(score, n, first);
}
static float dot(int type, const uint8_t *row, const float *x, int n)
{
    float acc[1][TILE_ROWS];
    mul_floats_scalar(&(struct product){.format = find_format(type), .rows = row, .n_rows = 1,
                                        .cols = n, .n = 1, .x = x, .acc = acc});
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
    if (!strcmp(isa, "avxvnni")) { /* not every compiler knows the name */
        unsigned a, b, c, d;
        return avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
    }
    if (!strcmp(isa, "avx512vnni")) return avx512 && __builtin_cpu_supports("avx512vnni");
#elif defined(HAVE_NEON) && defined(__linux__)
    if (!strcmp(isa, "dotprod")) return (getauxval(AT_HWCAP) >> 20 & 1) != 0;   /* HWCAP_ASIMDDP */
#elif defined(HAVE_NEON) && defined(__APPLE__)
    if (!strcmp(isa, "dotprod")) return apple_has("hw.optional.arm.FEAT_DotProd");
#endif
    return !strcmp(isa, "scalar") || !strcmp(isa, "neon");
}

/* Whether kernels find what a block with a known answer gives: d = 2^-24 and element 1 is d, the
 * others 0, times an x that makes a subnormal number of it. A compiler may have made vectors that
 * flush those, or a port may read its own floats in the order of a file's. */
__attribute__((noinline)) /* 1 KB of stack */
static const char *kernel_fault(const struct kernels *k)
{
    static const uint8_t block[18] = {1, 0, 0x88, 0x89, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88,
                                      0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88, 0x88};
    struct matrix w = {.format = find_format(Q4_0), .rows = 1, .cols = 32, .data = block};
    float x[32] = {127 * 0x1p-106f, 0x1p-106f}, row[32], acc[1][TILE_ROWS] = {{0}};
    uint8_t tile[18 * TILE_ROWS];
    struct q8_block q8;
    struct product p = {.format = w.format, .rows = k->tiles ? tile : block, .row_bytes = 18,
                        .n_rows = 1, .cols = 32, .n = 1, .q8 = &q8, .x = x, .x_stride = 1,
                        .acc = acc};
    make_tile(tile, block, 18, 1, 1, w.format);
    k->quantize(&q8, x, 32);
    k->mul_codes(&p);
    if (bits_of(acc[0][0]) != 0x80000) return "the product with int8 codes is wrong";
    k->dequantize(&w, 0, 1, row);
    to_file_order(row, 32);
    p.format = find_format(F32);
    p.rows = (const uint8_t *)row;
    k->mul_floats(&p);
    if (bits_of(acc[0][0]) != 0x80000) return "the product with floats is wrong";
    for (int j = 0; j < 32; j++) x[j] = 1, row[j] = acc[0][0];
    k->rmsnorm(x, x, row, 32, 0);
    return memcmp(x, row, sizeof x) ? "vectors lose subnormal numbers" : NULL;
}

const char *gemma3_isa_name(int index)
{
    for (int i = 0; i < N_KERNELS; i++)
        if (cpu_has(all_kernels[i]->name) && index-- == 0) return all_kernels[i]->name;
    return NULL;
}

/* ==== 11. Reading GGUF ==========================================================================
 *
 *     "GGUF" | u32 version | u64 n_tensors | u64 n_kv | pairs | infos of tensors | padding | data
 *     pair:  string key | u32 type | value          string: u64 length | bytes
 *     info:  string name | u32 n_dims | u64 ne[n_dims] | u32 type | u64 offset from data
 *     array: u32 element type | u64 count | elements
 *
 * ne[0] is the length of a row. Nothing of the file is trusted: every read goes through a cursor
 * that knows what is left, and every tensor's type, shape and end are checked once, when it is
 * bound. Of pairs and infos we keep where they begin, sorted by name, and read them when asked:
 * that takes 8 bytes for each, so that a board has room for it, and no file of n bytes costs more
 * than n log n steps to refuse. */

/* Sizes stop at SIZE_MAX, which no memory has, instead of wrapping on a machine of 32 bits. */
/* not reached: more than SIZE_MAX, on 64 bits */
static size_t times(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }
/* not reached: more than SIZE_MAX, on 64 bits */
static size_t plus(size_t a, size_t b) { return a > SIZE_MAX - b ? SIZE_MAX : a + b; }

/* Takes pieces of one block, each aligned to 64 bytes; with base NULL it only counts. */
struct arena {
    uint8_t *base;
    size_t used, size;
};

static void *piece(struct arena *a, size_t count, size_t bytes)
{
    size_t at = a->used;
    a->used = plus(at, plus(times(count, bytes), 63) & ~(size_t)63);
    return a->base && a->used <= a->size ? a->base + at : NULL;
}

/* What a model is opened with, and what is known of its file on the way. */
struct opening {
    gemma3_source from;
    gemma3_options options;
    gemma3_error *err;
    const uint8_t *header;           /* the file's first bytes, or a copy of them */
    size_t n_header;
    uint64_t n_kv, n_tensors;
    const uint8_t **names;           /* where each pair and info begins, sorted by name */
    size_t n_names;
    const uint8_t *infos;            /* where infos begin */
    uint64_t data, alignment;        /* where tensors begin; of every tensor */
    uint64_t n_tokens;               /* of the vocabulary */
    uint64_t tensor_bytes;           /* of all that could be weights */
    size_t weight_bytes;             /* of those that are */
    struct arena arena, weights;     /* the model's memory; what its norms and tiles will need */
    gemma3_model *m;
    void *tokenizer_room;
    const struct kernels *kernels;
    int repacks;
    int obeys;                       /* keys are obeyed that contradict Google's model */
    int failed;                      /* a number was refused */
};

/* Leaves a sentence that begins with name, of a long path the end, in text [n], or nowhere when it
 * is NULL. Returns -1. */
#if defined(GEMMA3_NO_ERROR_TEXT)
INLINE int sentence(char *text, size_t n, const char *name, const char *format, ...)
{
    if (text) *text = 0;
    return (void)n, (void)name, (void)format, -1;
}
#else
static int sentence(char *text, size_t n, const char *name, const char *format, ...)
{
    va_list args;
    if (!text) return -1;
    size_t length = strlen(name), cut = length < 240 ? 0 : length - 236;
    while (cut && (name[cut] & 0xc0) == 0x80) cut++; /* not in the middle of a character */
    int used = snprintf(text, n, "%s%s", cut ? "..." : "", name + cut);
    va_start(args, format);
    vsnprintf(text + used, n - (size_t)used, format, args);
    va_end(args);
    return -1;
}
#endif
/* An error; one about a file of that name; one about the model's. */
#define fail(err, ...) fail_about(err, "", __VA_ARGS__)
#define fail_about(err, name, ...) \
    sentence((err) ? (err)->text : NULL, sizeof (err)->text, name, __VA_ARGS__)
#define reject(o, ...) fail_about((o)->err, (o)->from.name, __VA_ARGS__)

/* ---- The cursor ----
 *
 * Whoever asks for more than is left gets zeros and empty texts, then and ever after. So a pair is
 * read as it is written above, and what failed is asked once, at its end. */

struct cursor {
    const uint8_t *p;
    size_t left;
    int failed;
};

/* Where the next n bytes are; NULL when they are not there. */
static const uint8_t *take(struct cursor *c, uint64_t n)
{
    const uint8_t *p = c->p;
    if (n > c->left) c->failed = 1;
    if (c->failed) return NULL;
    c->p += n;
    c->left -= (size_t)n;
    return p;
}

/* A little-endian number of n bytes. */
static uint64_t take_int(struct cursor *c, int n)
{
    const uint8_t *p = take(c, n);
    uint64_t u = 0;
    for (int j = n; p && j-- > 0;) u = u << 8 | p[j];
    return u;
}

static uint32_t take_u32(struct cursor *c) { return (uint32_t)take_int(c, 4); }

static struct string take_string(struct cursor *c)
{
    uint64_t n = take_int(c, 8);
    struct string s = {(const char *)take(c, n), (size_t)n};
    return s.text ? s : (struct string){"", 0};
}

/* As memcmp, a beginning before what goes on. Texts may have NULs: no function of C's for them. */
static int compare_strings(struct string a, struct string b)
{
    int c = memcmp(a.text, b.text, a.n < b.n ? a.n : b.n);
    return c ? c : (a.n > b.n) - (a.n < b.n);
}

static int string_is(struct string s, const char *text)
{
    return !compare_strings(s, (struct string){text, strlen(text)});
}

/* A name for an error message: printable, and not too long. */
struct shown { char text[80]; };
static struct shown shown(struct string s)
{
    struct shown out = {""};
    for (size_t j = 0; j < s.n && j < sizeof out.text - 1; j++)
        out.text[j] = s.text[j] >= 32 && s.text[j] < 127 ? s.text[j] : '?';
    return out;
}

/* ---- Pairs and infos ---- */

/* Types of values by their number in GGUF. */
enum { KV_U8, KV_I8, KV_U16, KV_I16, KV_U32, KV_I32, KV_F32, KV_BOOL, KV_STRING, KV_ARRAY, KV_U64,
       KV_I64, KV_F64, KV_TYPES };
static const struct { const char *name; uint8_t bytes, is_signed; } kv_types[KV_TYPES] = {
    {"u8", 1, 0}, {"i8", 1, 1}, {"u16", 2, 0}, {"i16", 2, 1}, {"u32", 4, 0}, {"i32", 4, 1},
    {"f32", 4, 0}, {"bool", 1, 0}, {"string", 0, 0}, {"array", 0, 0}, {"u64", 8, 0}, {"i64", 8, 1},
    {"f64", 8, 0}};

struct kv {
    struct string key;
    uint32_t type, element;          /* element: of an array, else type */
    uint64_t count;                  /* of an array, else 1 */
    struct cursor value;
};

struct tensor {
    struct string name;
    uint32_t type;
    uint64_t ne[4], offset;
};

/* Reads a pair, but its value, which it steps over. */
static int read_kv(const struct opening *o, struct cursor *c, struct kv *kv)
{
    kv->key = take_string(c);
    kv->element = kv->type = take_u32(c);
    kv->count = 1;
    if (kv->type == KV_ARRAY) kv->element = take_u32(c), kv->count = take_int(c, 8);
    kv->value = *c;
    if (c->failed) return 0;
    if (kv->element == KV_ARRAY)
        return reject(o, ": key %s is an array of arrays, which is not supported",
                      shown(kv->key).text);
    if (kv->element >= KV_TYPES)
        return reject(o, ": key %s has value type %u, which is not one of GGUF's",
                      shown(kv->key).text, (unsigned)kv->element);
    if (kv->element == KV_STRING)
        for (uint64_t k = 0; k < kv->count && !c->failed; k++) take_string(c);
    else if (kv->count > c->left) c->failed = 1; /* before it is multiplied */
    else take(c, kv->count * kv_types[kv->element].bytes);
    return 0;
}

static int read_tensor(const struct opening *o, struct cursor *c, struct tensor *t)
{
    t->name = take_string(c);
    uint32_t n_dims = take_u32(c);
    if (!c->failed && (n_dims < 1 || n_dims > 4))
        return reject(o, ": tensor %s has %u dimensions, expected 1 to 4", shown(t->name).text,
                      (unsigned)n_dims);
    for (uint32_t k = 0; k < 4; k++) t->ne[k] = k < n_dims ? take_int(c, 8) : 1;
    t->type = take_u32(c);
    t->offset = take_int(c, 8);
    return 0;
}

/* Why a file is none of ours, by how it begins. */
static const struct { const char *begin; uint8_t n, at; const char *what; } other_files[] = {
    {"version https://git-lfs", 23, 0, "is a Git LFS pointer: get the file itself (git lfs pull)"},
    {"<!", 2, 0, "is a web page: the download failed, or asked for a login"},
    {"<html", 5, 0, "is a web page: the download failed, or asked for a login"},
    {"{\"", 2, 8, "is a safetensors file: convert it to GGUF (llama.cpp's convert_hf_to_gguf.py)"},
    {"PK\3\4", 4, 0, "is a zip archive or a PyTorch file: unpack it, or convert it to GGUF"},
    {"\x80\2", 2, 0, "is a PyTorch file: convert it to GGUF"},
    {"\x1f\x8b", 2, 0, "is compressed with gzip: unpack it"},
    {"", 0, 0, "does not begin with \"GGUF\""}};

static int read_start(struct opening *o, struct cursor *c)
{
    const uint8_t *magic = take(c, 4);
    size_t k = o->n_header < 24 ? sizeof other_files / sizeof *other_files - 1 : 0;
    if (!magic || memcmp(magic, "GGUF", 4)) {
        while (memcmp(o->header + other_files[k].at, other_files[k].begin, other_files[k].n)) k++;
        return reject(o, " is not a GGUF file: it %s", other_files[k].what);
    }
    uint32_t version = take_u32(c);
    if (!c->failed && version != 2 && version != 3)
        return reject(o, ": GGUF version %u%s, expected 2 or 3", (unsigned)version,
                      version && !(version & 0xffff) ? " (a big-endian file)" : "");
    o->n_tensors = take_int(c, 8);
    o->n_kv = take_int(c, 8);
    /* A pair has 13 bytes or more, an info 32. */
    if (c->failed || o->n_kv > o->from.size / 13 || o->n_tensors > o->from.size / 32)
        return reject(o, " is truncated: its header promises %llu keys and %llu tensors",
                      (unsigned long long)o->n_kv, (unsigned long long)o->n_tensors);
    return 0;
}

/* ---- Looking up ----
 *
 * Sorted once, names are found in log n steps, and one that occurs twice stands beside itself.
 * A key and a tensor must not share one either; no model's file does. */

static struct string name_at(const uint8_t *begin)
{
    struct cursor c = {begin, SIZE_MAX, 0};
    return take_string(&c);
}

/* Heap sort: n log n steps whatever the file, and no memory. */
static int sort_names(const struct opening *o)
{
    const uint8_t **at = o->names;
    size_t n = o->n_names;
    for (size_t start = n / 2, left = n, i, child; left > 1;) {
        const uint8_t *moved = at[start > 0 ? --start : --left];
        if (left < n) at[left] = at[0];
        for (i = start; (child = 2 * i + 1) < left; i = child) {
            child += child + 1 < left &&
                     compare_strings(name_at(at[child + 1]), name_at(at[child])) > 0;
            if (compare_strings(name_at(moved), name_at(at[child])) >= 0) break;
            at[i] = at[child];
        }
        at[i] = moved;
    }
    for (size_t k = 1; k < n; k++)
        if (!compare_strings(name_at(at[k - 1]), name_at(at[k])))
            return reject(o, ": %s %s occurs twice", at[k] < o->infos ? "key" : "tensor",
                          shown(name_at(at[k])).text);
    return 0;
}

/* 1 and a cursor where the pair or info of that name begins, or 0. */
static int find_name(const struct opening *o, const char *name, int of_tensor, struct cursor *c)
{
    const uint8_t *const *at = o->names;
    for (size_t n = o->n_names; n;) {
        int order = compare_strings(name_at(at[n / 2]), (struct string){name, strlen(name)});
        if (order == 0) {
            *c = (struct cursor){at[n / 2], o->n_header - (size_t)(at[n / 2] - o->header), 0};
            return (at[n / 2] >= o->infos) == of_tensor;
        }
        if (order < 0) at += n / 2 + 1, n -= n / 2 + 1;
        else n /= 2;
    }
    return 0;
}

/* 1 and the pair of that key, or 0. It was read before: nothing can be wrong with it. */
static int find_kv(const struct opening *o, const char *key, struct kv *kv)
{
    struct cursor c;
    /* not reached: a refusal */
    return find_name(o, key, 0, &c) && !read_kv(o, &c, kv);
}

static int find_tensor(const struct opening *o, const char *name, struct tensor *t)
{
    struct cursor c;
    /* not reached: a refusal */
    return find_name(o, name, 1, &c) && !read_tensor(o, &c, t);
}

/* 1 and the array of that key, if it has at least n such elements. */
static int find_array(const struct opening *o, const char *key, uint32_t element, int n,
                      struct kv *kv)
{
    return find_kv(o, key, kv) && kv->type == KV_ARRAY && kv->element == element &&
           kv->count >= (uint64_t)n;
}

/* The next number of a pair or array as double (exact for every value we accept). */
static int take_number(const struct opening *o, struct kv *kv, double *out)
{
    int bytes = kv_types[kv->element].bytes, unused = 64 - 8 * bytes;
    if (!bytes)
        return reject(o, ": key %s is a %s, expected a number", shown(kv->key).text,
                      kv_types[kv->type].name);
    uint64_t u = take_int(&kv->value, bytes);
    if (kv->element == KV_F32) *out = float_of((uint32_t)u);
    else if (kv->element == KV_F64) memcpy(out, &u, 8);
    else if (kv_types[kv->element].is_signed) *out = (double)((int64_t)(u << unused) >> unused);
    else *out = (double)u;
    return 0;
}

/* Key's number, if there is such a key: 1, 0 when there is none, -1 when it is no number. */
static int find_number(const struct opening *o, const char *key, double *out)
{
    struct kv kv;
    if (!find_kv(o, key, &kv)) return 0;
    if (kv.type == KV_ARRAY) kv.element = KV_ARRAY; /* which is none */
    return take_number(o, &kv, out) ? -1 : 1;
}

/* A string; empty when there is none. */
static struct string find_string(const struct opening *o, const char *key)
{
    struct kv kv;
    int found = find_kv(o, key, &kv) && kv.type == KV_STRING;
    return found ? take_string(&kv.value) : (struct string){"", 0};
}

/* 0 when a key is absent or the usual string, 1 when it is the other, else -1. */
static int check_string(const struct opening *o, const char *key, const char *usual,
                        const char *other)
{
    struct kv kv;
    if (!find_kv(o, key, &kv)) return 0;
    if (kv.type != KV_STRING)
        return reject(o, ": key %s is a %s, expected a string", key, kv_types[kv.type].name);
    struct string s = take_string(&kv.value);
    if (string_is(s, usual)) return 0;
    if (string_is(s, other)) return 1;
    return reject(o, ": %s is \"%s\", expected \"%s\"", key, shown(s).text, usual);
}

/* ==== 12. Opening a model =======================================================================
 *
 * From a file's header to a model that can compute. The header is walked through to add up the
 * memory that everything will need, so that one block is asked for at the beginning and none
 * afterwards, and again to note its names. What follows asks for keys and tensors by name. All
 * that can be refused is refused before the one step that takes long, making tiles. After this
 * section nothing is checked again: the forward pass trusts the numbers in the config, the
 * matrices' shapes, and that their bytes are in the file. */

/* Of Google's models what a file may leave out or have wrong, as config.json and the technical
 * report have it: the only place that knows them. The last is any other model. */
static const struct release {
    const char *name;
    int n_layers, d_model, window;
    float rope_factor;               /* of global layers */
    int is_scaled_by_width;          /* queries times 1/sqrt(d_model / n_heads), not of head_dim */
} releases[] = {
    {"270M", 18,  640,  512, 1, 0},
    {"1B",   26, 1152,  512, 1, 0},
    {"4B",   34, 2560, 1024, 8, 0},
    {"12B",  48, 3840, 1024, 8, 0},
    {"27B",  62, 5376, 1024, 8, 1},
    {"",      0,    0,    0, 1, 0},
};
enum { N_RELEASES = sizeof releases / sizeof *releases - 1 };

/* What a host with virtual memory does for us; elsewhere nothing (section 15). */
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n);
static void host_use_large_pages(uint8_t *begin, size_t n);
static void host_unmap(const gemma3_model *m);

/* Says in one sentence why this is no Gemma 3 text model that we can run. */
static int refuse_others(const struct opening *o)
{
    struct kv kv;
    double n;
    /* First, because later parts have no other keys. */
    if (find_number(o, "split.count", &n) > 0 && n > 1)
        return reject(o, " is one of %.0f parts of a split model: merge them first "
                      "(llama-gguf-split --merge)", n);
    if (!find_kv(o, "general.architecture", &kv))
        return reject(o, ": general.architecture is missing, expected \"gemma3\"");
    int other = check_string(o, "general.architecture", "gemma3", "clip");
    if (other < 0) return -1;
    if (other)
        return reject(o, " is only a model's image encoder (mmproj): give the text model's file");
    for (size_t k = 0; k < o->n_names; k++) {
        struct string name = name_at(o->names[k]);
        if (o->names[k] < o->infos) continue;
        if (name.n > 5 && !memcmp(name.text, "dense", 5))
            return reject(o, ": tensor %s belongs to an embedding model (EmbeddingGemma), not to a "
                          "Gemma 3 text model", shown(name).text);
        if (name.n > 16 && !memcmp(name.text + name.n - 15, "attn_qkv.weight", 15))
            return reject(o, ": tensor %s is a fused projection, expected attn_q, attn_k and "
                          "attn_v", shown(name).text);
    }
    return 0;
}

/* ---- What the keys say ----
 *
 * Keys that lie. Files exist whose keys contradict the model they hold. Ollama's own gemma3:1b has
 * final_logit_softcapping 30, which is Gemma 2's (null in transformers' config of Gemma 3; Ollama
 * took it out later); obeying it halves the probability of the right word. Others have lost or
 * changed RoPE's factor or local base. So for a model of a release's layers and d_model its
 * definition wins, and a note says so. options.obey_file lets the file win: to check what another
 * engine makes of it, and for models whose context was extended. What a file leaves out is taken
 * from the release of as many layers. */

static const double ANY = 1e30;      /* the upper end of numbers that need not be integers */
enum { REQUIRED = -1 };

/* A key's number in [low, high], an integer unless high is ANY; fallback when the key is absent.
 * The first that is refused sets o->failed; low, which does no harm, is returned from then on. */
static double get_number(struct opening *o, const char *key, double low, double high,
                         double fallback)
{
    double x = fallback;
    int found = o->failed ? -1 : find_number(o, key, &x);
    if (found == 0 && fallback != REQUIRED) {
        o->m->origin[o->m->n_origins++] = (struct origin){key, "default"};
        return fallback;
    }
    if (found > 0 && x >= low && x <= high && (high == ANY || x == (int)x)) return x;
    o->failed = 1;
    if (found == 0) reject(o, ": key %s is missing", key);
    else if (found > 0 && high < ANY)
        reject(o, ": key %s is %.10g, expected an integer from %d to %d", key, x, (int)low,
               (int)high);
    else if (found > 0)
        reject(o, ": key %s is %g, expected a number from %g to 1e30", key, x, low);
    return low;
}

/* The same for what a release defines; older: another spelling of the key, or NULL. */
static double get_defined(struct opening *o, const char *key, const char *older, double low,
                          double high, double definition)
{
    gemma3_model *m = o->m;
    struct kv kv;
    if (older && !find_kv(o, key, &kv) && find_kv(o, older, &kv)) key = older;
    double x = get_number(o, key, low, high, definition), off = x - definition;
    if (o->failed || o->obeys) return x;
    if ((off > 0 ? off : -off) > 1e-6 * definition) {
        sentence(m->note[m->n_notes++], sizeof *m->note, "key ", "%s is %g, but Gemma 3 %s has %g, "
                 "which is used", key, x, m->release->name, definition);
        m->origin[m->n_origins++] = (struct origin){key, "overridden"};
    }
    return definition;
}

/* Rows of a tensor, for what some converters leave out; 0 when it has none that could be meant. */
static int rows_of(const struct opening *o, const char *name)
{
    struct tensor t;
    return find_tensor(o, name, &t) && t.ne[1] <= 1 << 20 ? (int)t.ne[1] : 0;
}

/* What decides the tensors' shapes. */
static int read_shapes(struct opening *o)
{
    gemma3_config *c = &o->m->config;
    c->n_layers = get_number(o, "gemma3.block_count", 1, GEMMA3_MAX_LAYERS, REQUIRED);
    c->d_model = get_number(o, "gemma3.embedding_length", 1, 1 << 16, REQUIRED);
    c->d_ff = get_number(o, "gemma3.feed_forward_length", 1, 1 << 20, REQUIRED);
    c->n_heads = get_number(o, "gemma3.attention.head_count", 1, 1024, REQUIRED);
    c->head_dim = get_number(o, "gemma3.attention.key_length", 2, 1024,
                             rows_of(o, "blk.0.attn_q.weight") / c->n_heads);
    if (!o->failed && (c->head_dim < 2 || c->head_dim % 2))
        return reject(o, ": heads of %d elements, expected an even number", c->head_dim);
    c->n_kv_heads = get_number(o, "gemma3.attention.head_count_kv", 1, 1024,
                               rows_of(o, "blk.0.attn_k.weight") / c->head_dim);
    int value_length = get_number(o, "gemma3.attention.value_length", 1, 1024, c->head_dim);
    if (o->failed) return -1;
    if (c->n_kv_heads < 1 || c->n_heads % c->n_kv_heads)
        return reject(o, ": %d query heads do not divide into %d key-value heads", c->n_heads,
                      c->n_kv_heads);
    if (value_length != c->head_dim)
        return reject(o, ": gemma3.attention.value_length is %d, expected key_length's %d",
                      value_length, c->head_dim);
    return 0;
}

/* Which layers are local: gemma3.attention.sliding_window_pattern is absent (6), a number n (every
 * n-th layer is global), or an array with one bool for each layer (true: local). */
static int read_layers(struct opening *o, int window)
{
    const char *key = "gemma3.attention.sliding_window_pattern";
    gemma3_config *c = &o->m->config;
    struct kv kv;
    int is_array = find_kv(o, key, &kv) && kv.type == KV_ARRAY;
    int n = is_array ? 0 : get_number(o, key, 0, GEMMA3_MAX_LAYERS, 6);
    c->window = get_defined(o, "gemma3.attention.sliding_window", NULL, 0, 1 << 24, window);
    if (is_array && !find_array(o, key, KV_BOOL, c->n_layers, &kv))
        return reject(o, ": %s must have one bool for each of %d layers", key, c->n_layers);
    for (int l = 0; l < c->n_layers; l++) {
        int local = is_array ? kv.value.p[l] != 0 : n > 1 && (l + 1) % n != 0;
        c->is_local[l] = (uint8_t)(local && c->window > 0);
    }
    return o->failed;
}

static int read_config(struct opening *o)
{
    gemma3_model *m = o->m;
    gemma3_config *c = &m->config;
    const struct release *like = releases;
    if (read_shapes(o)) return -1;
    while (like->n_layers && like->n_layers != c->n_layers) like++;
    m->release = like->d_model == c->d_model ? like : &releases[N_RELEASES];
    o->obeys = o->options.obey_file || !m->release->n_layers;
    c->n_ctx_train = get_number(o, "gemma3.context_length", 1, 1 << 24, 32768);
    c->rms_eps = get_number(o, "gemma3.attention.layer_norm_rms_epsilon", 0, ANY, 1e-6f);
    c->final_softcap = get_defined(o, "gemma3.final_logit_softcapping", NULL, 0, ANY, 0);
    c->rope_base_global = get_defined(o, "gemma3.rope.freq_base", "gemma3.rope.global.freq_base",
                                      1, ANY, 1e6);
    c->rope_base_local = get_defined(o, "gemma3.rope.freq_base_swa", "gemma3.rope.local.freq_base",
                                     1, ANY, 1e4);
    c->rope_factor = get_defined(o, "gemma3.rope.scaling.factor", "gemma3.rope.scale_linear",
                                 0, ANY, like->rope_factor);
    int divisor = like->is_scaled_by_width ? c->d_model / c->n_heads : c->head_dim;
    c->query_scale = get_defined(o, "gemma3.attention.scale", NULL, 0x1p-20, ANY,
                                 1.0f / sqrt_of((float)divisor));
    c->embedding_scale = sqrt_of((float)c->d_model);
    int none = check_string(o, "gemma3.rope.scaling.type", "linear", "none");
    if (o->failed || none < 0) return -1;
    if (o->obeys && (none || c->rope_factor == 0)) c->rope_factor = 1;
    /* Positions are below 2^24, and angles must be below 2^31: cos_sin takes no larger ones. */
    if (c->rope_factor < 0x1p-7f)
        return reject(o, ": gemma3.rope.scaling.factor is %g, expected at least 1/128 (angles must "
                      "stay below 2^31)", (double)c->rope_factor);
    if (c->rms_eps == 0)
        return reject(o, ": key gemma3.attention.layer_norm_rms_epsilon is 0, expected more");
    if (c->final_softcap > 0)
        sentence(m->note[m->n_notes++], sizeof *m->note, "key gemma3.", "final_logit_softcapping "
                 "is %g, which no Gemma 3 of Google has: it is obeyed", c->final_softcap);
    return read_layers(o, like->window);
}

/* ---- The tokenizer ----
 *
 * Its arrays stand in one piece of the model's memory with the tokenizer behind them; the texts
 * stay in the header. tokenizer.ggml.model is "llama": pieces with scores, or "gpt2": pieces, and
 * merges that make them (rank_merges). */

enum { TOKEN_BYTES = sizeof(char *) + sizeof(uint32_t) + sizeof(float) + sizeof(int32_t) };

/* 1 when it has merges instead of scores, 0 or -1. */
static int read_vocab(struct opening *o)
{
    struct kv tokens, scores, types, merges;
    int n = o->m->token_embd.rows;
    int can_be = find_array(o, "tokenizer.ggml.merges", KV_STRING, 1, &merges);
    int gpt2 = check_string(o, "tokenizer.ggml.model", "llama", can_be ? "gpt2" : "llama");
    if (gpt2 < 0) return -1;
    if (!find_array(o, "tokenizer.ggml.tokens", KV_STRING, 1, &tokens))
        return reject(o, ": key tokenizer.ggml.tokens is missing or no array of strings");
    if (tokens.count < (uint64_t)n) n = (int)tokens.count;
    if (!gpt2 && !find_array(o, "tokenizer.ggml.scores", KV_F32, n, &scores))
        return reject(o, ": key tokenizer.ggml.scores must be an array of %d f32", n);
    int has_types = find_kv(o, "tokenizer.ggml.token_type", &types);
    if (has_types && !find_array(o, "tokenizer.ggml.token_type", KV_I32, n, &types) &&
        !find_array(o, "tokenizer.ggml.token_type", KV_U32, n, &types))
        return reject(o, ": key tokenizer.ggml.token_type must be an array of %d i32", n);
    const char **text = o->tokenizer_room;
    uint32_t *length = (uint32_t *)(void *)(text + n);
    float *score = (float *)(void *)(length + n);
    int32_t *type = (int32_t *)(void *)(score + n);
    for (int k = 0; k < n; k++) {
        struct string s = take_string(&tokens.value);
        if (s.n > GEMMA3_PIECE_MAX)
            return reject(o, ": key tokenizer.ggml.tokens: token %d has %llu bytes, expected at "
                          "most %d", k, (unsigned long long)s.n, GEMMA3_PIECE_MAX);
        text[k] = s.text;
        length[k] = (uint32_t)s.n;
        score[k] = gpt2 ? -(float)merges.count : float_of(take_u32(&scores.value));
        type[k] = has_types ? (int32_t)take_u32(&types.value) : 1;
    }
    o->m->vocab = (gemma3_vocab){.n_vocab = n, .text = text, .length = length, .score = score,
                                 .type = type, .stop = o->m->stop};
    o->m->config.n_vocab = n;
    return gpt2;
}

/* Merges "a b" come in the order in which they are made: the rank of the first that makes a piece
 * takes the place of its score. */
static __attribute__((noinline)) int rank_merges(const struct opening *o) /* 1 KB of stack */
{
    float *score = (float *)(uintptr_t)o->m->vocab.score;
    struct kv merges;
    if (gemma3_find(o->m->tokenizer, "<0x0A>", 6) < 0)
        return reject(o, ": tokenizer.ggml.tokens is not Gemma's vocabulary: it has no <0x0A>");
    find_kv(o, "tokenizer.ggml.merges", &merges);
    for (uint64_t k = 0; k < merges.count; k++) {
        char joined[GEMMA3_PIECE_MAX];
        struct string s = take_string(&merges.value);
        const char *space = s.n > 2 ? memchr(s.text + 1, ' ', s.n - 2) : NULL;
        if (!space || s.n > sizeof joined)
            return reject(o, ": key tokenizer.ggml.merges: number %llu is no pair of pieces",
                          (unsigned long long)k);
        size_t left = (size_t)(space - s.text);
        memcpy(joined, s.text, left);
        memcpy(joined + left, space + 1, s.n - left - 1);
        int32_t id = gemma3_find(o->m->tokenizer, joined, s.n - 1);
        if (id >= 0 && score[id] == -(float)merges.count) score[id] = -(float)k;
    }
    return 0;
}

/* The ids that a key gives, one or an array: how many, or -1. When there are none, *ids is that of
 * the first token with this text, or -1. */
static int read_ids(const struct opening *o, const char *key, const char *text, int32_t *ids,
                    int max)
{
    const gemma3_vocab *v = &o->m->vocab;
    struct kv kv;
    double x;
    if (!find_kv(o, key, &kv)) kv.count = 0;
    if (kv.count > (uint64_t)max)
        return reject(o, ": key %s has %llu ids, expected at most %d", key,
                      (unsigned long long)kv.count, max);
    for (int k = 0; k < (int)kv.count; k++) {
        if (take_number(o, &kv, &x)) return -1;
        if (!(x >= 0 && x < v->n_vocab))
            return reject(o, ": key %s is %.10g, outside the vocabulary of %d", key, x, v->n_vocab);
        if (x != (int)x) return reject(o, ": key %s is %.10g, expected an integer", key, x);
        ids[k] = (int32_t)x;
    }
    if (kv.count > 0 || !text) return (int)kv.count;
    int32_t id = 0;
    while (id < v->n_vocab && !string_is((struct string){v->text[id], v->length[id]}, text)) id++;
    *ids = id < v->n_vocab ? id : -1;
    return 0;
}

/* An answer ends with any of the ids that four keys may name; eos is the first of the first. */
static int open_tokenizer(struct opening *o)
{
    static const char *const stop[] = {
        "tokenizer.ggml.eos_token_id", "tokenizer.ggml.eos_token_ids",
        "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"};
    gemma3_model *m = o->m;
    gemma3_vocab *v = &m->vocab;
    double add_bos = 1;
    int has_merges = read_vocab(o);
    if (has_merges < 0 ||
        read_ids(o, "tokenizer.ggml.bos_token_id", "<bos>", &v->bos, 1) < 0 ||
        read_ids(o, "tokenizer.ggml.unknown_token_id", "<unk>", &v->unknown, 1) < 0)
        return -1;
    for (int k = 0, n; k < 4; k++, v->n_stop += n) {
        n = read_ids(o, stop[k], k ? NULL : "<eos>", m->stop + v->n_stop, MAX_STOP_IDS - v->n_stop);
        if (n < 0) return -1;
        if (k == 0) v->eos = m->stop[0];
    }
    if (find_number(o, "tokenizer.ggml.add_bos_token", &add_bos) < 0) return -1;
    v->add_bos = add_bos != 0;
    void *behind = (int32_t *)(uintptr_t)v->type + v->n_vocab;
    m->tokenizer = gemma3_tokenizer_init(v, behind, gemma3_tokenizer_size(v), o->err);
    /* not reached: what could be wrong was refused above */
    if (!m->tokenizer) return -1;
    return has_merges ? rank_merges(o) : 0;
}

/* ---- Weights ----
 *
 * The list below is all that a model is made of; whoever wants to see every weight goes through it
 * by number. A matrix is used where it lies in the file; a norm, of which a layer has six and all
 * are small, is copied as float32, so that the forward pass knows one type of them. */

/* One tensor that the model needs, [rows][cols]. */
struct weight {
    const char *role;                /* "attn_q" */
    int rows, cols;                  /* rows 0, before it is bound: as many as the file has */
    struct matrix *w;                /* NULL of a norm, which has one row */
    const float **norm;
    char name[48];                   /* "blk.7.attn_q.weight" */
};

enum { PER_LAYER = 13 };

/* Number index of them, in the order of the forward pass; -1 after the last. */
static int find_weight(const gemma3_model *of, int index, struct weight *t)
{
    gemma3_model *m = (gemma3_model *)(uintptr_t)of;
    const gemma3_config *c = &m->config;
    int D = c->d_model, q = c->n_heads * c->head_dim, kv = c->n_kv_heads * c->head_dim;
    int in_layers = c->n_layers * PER_LAYER, l = -1, k = index;
    if (index > in_layers) k = index - in_layers + PER_LAYER;
    else if (index > 0) l = (index - 1) / PER_LAYER, k = 1 + (index - 1) % PER_LAYER;
    struct layer *w = &m->layer[l < 0 ? 0 : l];
    const struct weight all[PER_LAYER + 3] = {
        {"token_embd", m->token_embd.rows, D, &m->token_embd, NULL, ""},
        {"attn_norm", 1, D, NULL, &w->attn_norm, ""},
        {"attn_q", q, D, &w->attn_q, NULL, ""},
        {"attn_k", kv, D, &w->attn_k, NULL, ""},
        {"attn_v", kv, D, &w->attn_v, NULL, ""},
        {"attn_q_norm", 1, c->head_dim, NULL, &w->attn_q_norm, ""},
        {"attn_k_norm", 1, c->head_dim, NULL, &w->attn_k_norm, ""},
        {"attn_output", D, q, &w->attn_output, NULL, ""},
        {"post_attention_norm", 1, D, NULL, &w->post_attention_norm, ""},
        {"ffn_norm", 1, D, NULL, &w->ffn_norm, ""},
        {"ffn_gate", c->d_ff, D, &w->ffn_gate, NULL, ""},
        {"ffn_up", c->d_ff, D, &w->ffn_up, NULL, ""},
        {"ffn_down", D, c->d_ff, &w->ffn_down, NULL, ""},
        {"post_ffw_norm", 1, D, NULL, &w->post_ffw_norm, ""},
        {"output_norm", 1, D, NULL, &m->output_norm, ""},
        {"output", m->token_embd.rows, D, &m->lm_head, NULL, ""}};
    if (index < 0 || k > PER_LAYER + 2 - m->tied) return -1;
    *t = all[k];
    char *to = t->name;
    if (l >= 0) {
        to += strlen(strcpy(to, "blk."));
        for (int unit = l >= 100 ? 100 : l >= 10 ? 10 : 1; unit; unit /= 10)
            *to++ = (char)('0' + l / unit % 10);
        *to++ = '.';
    }
    strcat(strcpy(to, t->role), ".weight");
    return 0;
}

/* All types of ggml by number, those that were removed from it too. */
static const char *const type_names[] = {
    "F32", "F16", "Q4_0", "Q4_1", "Q4_2", "Q4_3", "Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q2_K", "Q3_K",
    "Q4_K", "Q5_K", "Q6_K", "Q8_K", "IQ2_XXS", "IQ2_XS", "IQ3_XXS", "IQ1_S", "IQ4_NL", "IQ3_S",
    "IQ2_S", "IQ4_XS", "I8", "I16", "I32", "I64", "F64", "IQ1_M", "BF16", "Q4_0_4_4", "Q4_0_4_8",
    "Q4_0_8_8", "TQ1_0", "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4", "NVFP4",
    "Q1_0"};
enum { N_TYPES = sizeof type_names / sizeof *type_names };

/* Type and shape. Of more than two dimensions the others are 1. */
static int check_tensor(const struct opening *o, const struct weight *s, const struct tensor *t)
{
    const struct format *f = find_format(t->type);
    char shape[96], *to = shape, want[24] = "any number of tokens";
    if (!f) {
        sentence(want, sizeof want, "", "%u", (unsigned)t->type);
        return reject(o, ": tensor %s has type %s, which is not supported (F32 F16 BF16 Q4_0 Q4_1 "
                      "Q5_0 Q5_1 Q8_0 Q2_K to Q6_K IQ4_NL IQ4_XS are)", s->name,
                      t->type < N_TYPES ? type_names[t->type] : want);
    }
    int rows_fit = s->rows ? t->ne[1] == (uint64_t)s->rows : t->ne[1] >= 1 && t->ne[1] <= 1 << 24;
    if (s->rows) sentence(want, sizeof want, "", "%d", s->rows);
    for (int k = t->ne[3] != 1 ? 3 : t->ne[2] != 1 ? 2 : 1; k >= 0; k--, to += strlen(to))
        sentence(to, 24, "", "[%llu]", (unsigned long long)t->ne[k]);
    if (t->ne[0] != (uint64_t)s->cols || !rows_fit || t->ne[2] != 1 || t->ne[3] != 1)
        return reject(o, ": tensor %s is %s, expected [%s][%d]", s->name, shape, want, s->cols);
    if (s->cols % f->elements)
        return reject(o, ": tensor %s has rows of %d, expected a multiple of %s's block of %d",
                      s->name, s->cols, f->name, f->elements);
    if (s->norm && !is_float(f))
        return reject(o, ": tensor %s has type %s, expected F32", s->name, f->name);
    return 0;
}

/* Finds a tensor and checks its type, shape and end. A matrix stays where it is; a norm is copied,
 * as float32: one that is read comes to the end of the room that its numbers will fill. */
static int bind(struct opening *o, const struct weight *s)
{
    struct tensor t;
    struct matrix norm, *w = s->w ? s->w : &norm;
    if (!find_tensor(o, s->name, &t)) return reject(o, ": tensor %s is missing", s->name);
    if (check_tensor(o, s, &t)) return -1;
    const struct format *f = find_format(t.type);
    size_t row_bytes = (size_t)(s->cols / f->elements) * f->bytes;
    uint64_t bytes = row_bytes * t.ne[1], left = 0;
    if (o->from.size > o->data) left = o->from.size - o->data;
    if (t.offset % o->alignment)
        return reject(o, ": tensor %s is at offset %llu, expected a multiple of %llu", s->name,
                      (unsigned long long)t.offset, (unsigned long long)o->alignment);
    uint64_t end = bytes > UINT64_MAX - t.offset ? UINT64_MAX : t.offset + bytes;
    if (end > left)
        return reject(o, " is truncated: tensor %s ends %llu bytes past the end of the file",
                      s->name, (unsigned long long)(end - left));
    *w = (struct matrix){.format = f, .rows = (int)t.ne[1], .cols = s->cols, .row_bytes = row_bytes,
                         .offset = o->data + t.offset};
    if (w->offset + bytes <= o->from.n_data) w->data = (const uint8_t *)o->from.data + w->offset;
    else if (row_bytes > o->m->streamed_row) o->m->streamed_row = row_bytes;
    o->weight_bytes += (size_t)bytes;
    if (s->w) return 0;
    float *floats = piece(&o->arena, w->cols, sizeof *floats);
    uint8_t *stored = (uint8_t *)(floats + w->cols) - row_bytes;
    if (!w->data && o->from.read(o->from.user, w->offset, stored, row_bytes))
        return reject(o, ": tensor %s cannot be read", s->name);
    if (!w->data) w->data = stored;
    o->kernels->dequantize(w, 0, 1, floats);
    *s->norm = floats;
    return 0;
}

/* ---- Integer formats into tiles ----
 *
 * 32 rows interleaved, as the vector kernels read them (section 8). It takes seconds, so that it
 * comes last, is shared out to threads and tells how far it is. */

struct repack {
    const gemma3_model *m;
    const struct matrix *w;
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
    int tile, end;
    (void)worker;
    share_of(n_tiles(w), job->n_tasks, index, &tile, &end);
    int row = tile * TILE_ROWS, last = min_int(end * TILE_ROWS, w->rows);
    const uint8_t *begin = w->data + row * w->row_bytes;
    for (int n; row < last; row += n) {
        n = min_int(last - row, TILE_ROWS);
        make_tile(job->to + row * w->row_bytes, w->data + row * w->row_bytes, w->row_bytes, n,
                  w->cols / w->format->elements, w->format);
    }
    host_give_back(job->m, begin, (size_t)(w->data + last * w->row_bytes - begin));
}

/* Bytes of a matrix as tiles; 0 when it stays as it is. */
static size_t tiled_bytes(const struct matrix *w)
{
    return is_float(w->format) ? 0 : times(n_tiles(w), times(TILE_ROWS, w->row_bytes));
}

/* All matrices that are in memory; the others are interleaved whenever they are read. */
static void repack(struct opening *o)
{
    const gemma3_options *p = &o->options;
    struct weight s;
    for (int k = 0, n = 1 + o->m->config.n_layers * PER_LAYER; !find_weight(o->m, k, &s); k++) {
        if (p->progress) p->progress(p->user, (double)min_int(k + 1, n) / n);
        size_t bytes = s.w && s.w->data ? tiled_bytes(s.w) : 0;
        if (!bytes) continue;
        struct repack job = {o->m, s.w, piece(&o->arena, 1, bytes),
                             MIN_REPACK_TASKS + (int)(bytes / REPACK_BYTES)};
        if (p->parallel_for && p->n_threads > 1)
            p->parallel_for(p->pool, job.n_tasks, repack_task, &job);
        else
            for (int i = 0; i < job.n_tasks; i++) repack_task(&job, i, 0);
        s.w->data = job.to;
        s.w->tiled = 1;
    }
}

/* ---- Opening ---- */

/* The kernels asked for, or the best that this CPU has. */
static int choose_kernels(struct opening *o)
{
    const char *isa = o->options.isa ? o->options.isa : gemma3_isa_name(0);
    for (int k = 0; k < N_KERNELS; k++)
        if (!strcmp(all_kernels[k]->name, isa) && cpu_has(isa)) o->kernels = all_kernels[k];
    if (!o->kernels)
        return fail(o->err, "instruction set \"%s\" is unknown or this CPU does not have it", isa);
    o->repacks = o->kernels->tiles && !o->options.no_repack;
    return 0;
}

/* Adds up the memory for a tensor's floats or tiles, also of one that is never asked for. What
 * cannot be bound, because it is not in the file, needs none. */
static int count_tensor(struct opening *o, const struct tensor *t)
{
    const struct format *f = find_format(t->type);
    if (!f || t->ne[0] > 1 << 20 || t->ne[1] > 1 << 24) return 0;
    struct matrix w = {.format = f, .rows = (int)t->ne[1], .cols = (int)t->ne[0],
                       .row_bytes = (size_t)t->ne[0] / f->elements * f->bytes};
    uint64_t bytes = (uint64_t)w.row_bytes * t->ne[1];
    if (bytes > o->from.size) return 0;
    if (w.rows == 1) piece(&o->weights, w.cols, sizeof(float));
    if (o->repacks) piece(&o->weights, 1, tiled_bytes(&w));
    o->tensor_bytes += bytes;
    if (o->tensor_bytes / 16 > o->from.size)
        return reject(o, ": its tensors share their bytes more than 16 times");
    return 0;
}

/* Walks through the header and adds up sizes or, once there is room, notes where names begin. */
static int walk(struct opening *o)
{
    struct cursor c = {o->header, o->n_header, 0};
    struct kv kv;
    struct tensor t;
    if (read_start(o, &c)) return -1;
    o->weights.used = o->tensor_bytes = o->n_tokens = 0;
    o->infos = o->header + o->n_header;
    o->n_names = (size_t)(o->n_kv + o->n_tensors);
    for (size_t k = 0; k < o->n_names && !c.failed; k++) {
        const uint8_t *begin = c.p;
        if (k == o->n_kv) o->infos = begin;
        if (k < o->n_kv ? read_kv(o, &c, &kv) : read_tensor(o, &c, &t)) return -1;
        if (o->names) o->names[k] = begin;
        else if (k >= o->n_kv && !c.failed && count_tensor(o, &t)) return -1;
        else if (k < o->n_kv && string_is(kv.key, "tokenizer.ggml.tokens")) o->n_tokens = kv.count;
    }
    if (c.failed && o->n_header == o->from.size)
        return reject(o, " is truncated: it ends inside its header");
    if (c.failed)
        return reject(o, ": its header is longer than the first %llu bytes, which were given",
                      (unsigned long long)o->n_header);
    o->data = o->n_header -= c.left;
    return 0;
}

/* A mapped file is no safe place for the header, which the tokenizer goes on using: somebody may
 * change it, even between two steps of opening. So what counts is what stands in the copy. */
static int copy_header(struct opening *o)
{
    uint8_t *copy = o->from.is_mapped ? piece(&o->arena, o->n_header, 1) : NULL;
    if (!copy) return 0; /* if there was no room for it, there is none for the rest */
    o->header = memcpy(copy, o->header, o->n_header);
    return walk(o);
}

/* Where everything of a model lies; norms and tiles come behind it. A layer has PER_LAYER tensors
 * in the file, so that the first one that is missing belongs to one of these layers. */
static int lay_out_model(struct opening *o)
{
    struct arena *a = &o->arena;
    /* not reached: 2^24 tokens, a file of 128 MB */
    int n = o->n_tokens < 1 << 24 ? (int)o->n_tokens : 1 << 24;
    gemma3_model *m = o->m = piece(a, 1, sizeof *m);
    o->names = piece(a, o->n_names, sizeof *o->names);
    struct layer *layer = piece(a, (size_t)o->n_tensors / PER_LAYER + 1, sizeof *layer);
    o->tokenizer_room = piece(a, 1, plus(times(n, TOKEN_BYTES),
                                         gemma3_tokenizer_size(&(gemma3_vocab){.n_vocab = n})));
    size_t needed = plus(a->used, o->weights.used);
    /* not reached: so much, on 64 bits */
    if (needed == SIZE_MAX) return reject(o, " needs more memory than this machine can address");
    if (needed > a->size)
        return reject(o, " needs more than the %llu bytes of memory that were given",
                      (unsigned long long)a->size);
    if (!m) return 0;
    memset(m, 0, sizeof *m);
    m->layer = layer;
    m->kernels = o->kernels;
    m->exact = o->options.exact != 0;
    m->source = o->from;
    if (o->from.is_mapped) host_give_back(m, o->from.data, o->n_header);
    return 0;
}

/* Data begins at the next multiple of the alignment. */
static int align_data(struct opening *o)
{
    struct kv kv;
    int found = find_kv(o, "general.alignment", &kv);
    uint64_t a = !found ? 32 : kv.type == KV_U32 ? take_u32(&kv.value) : 0;
    if (!a || (a & (a - 1))) return reject(o, ": general.alignment must be a u32 power of two");
    o->alignment = a;
    o->data = (o->data + a - 1) & ~(a - 1);
    return 0;
}

static int open_steps(struct opening *o)
{
    const char *fault = arithmetic_fault();
    if (choose_kernels(o)) return -1;
    /* not reached: a fault */
    if (!fault) fault = kernel_fault(o->kernels);
    /* not reached: a fault */
    if (fault) return fail(o->err, "this build cannot keep the numeric contract: %s", fault);
    /* not reached: a mapped file that somebody changes between two steps */
    if (walk(o) || copy_header(o) || lay_out_model(o) || walk(o) || sort_names(o) ||
        align_data(o) || refuse_others(o) || read_config(o))
        return -1;
    gemma3_model *m = o->m;
    struct tensor t;
    struct weight w;
    m->tied = !find_tensor(o, "output.weight", &t);
    for (int k = 0; !find_weight(m, k, &w); k++)
        if (bind(o, &w)) return -1;
    if (open_tokenizer(o)) return -1;
    m->token_embd.rows = m->lm_head.rows = m->config.n_vocab; /* rows behind them are padding */
    if (o->repacks) repack(o);
    if (m->tied) m->lm_head = m->token_embd;
    size_t not_of_a_token = m->tied ? 0 : m->token_embd.row_bytes * m->token_embd.rows;
    struct string name = find_string(o, "general.name");
    struct string chat = find_string(o, "tokenizer.chat_template");
    memcpy(m->name, name.text, name.n < sizeof m->name - 1 ? name.n : sizeof m->name - 1);
    m->info = (gemma3_info){.name = m->name, .release = m->release->name, .isa = o->kernels->name,
                            .exact = m->exact, .weight_bytes = o->weight_bytes,
                            .token_bytes = o->weight_bytes - not_of_a_token,
                            .chat_template = chat.n ? chat.text : NULL, .n_chat_template = chat.n};
    return 0;
}

/* Without a read function all of the file is in memory. */
static struct opening start(const gemma3_source *from, const gemma3_options *options,
                            gemma3_error *err)
{
    struct opening o = {.from = *from, .err = err};
    if (!from->read) o.from.size = o.from.n_data = from->data ? (size_t)from->size : 0;
    if (!from->name) o.from.name = "a model in memory";
    if (options) o.options = *options;
    o.header = from->data ? from->data : (const uint8_t *)"";
    o.n_header = o.from.n_data;
    return o;
}

size_t gemma3_model_size(const gemma3_source *from, const gemma3_options *options,
                         gemma3_error *err)
{
    struct opening o = start(from, options, err);
    o.arena = (struct arena){NULL, 64, SIZE_MAX}; /* to align any memory to 64 */
    /* not reached: the same, and too much memory on 64 bits */
    if (choose_kernels(&o) || walk(&o) || copy_header(&o) || lay_out_model(&o)) return 0;
    return o.arena.used + o.weights.used;
}

gemma3_model *gemma3_model_init(const gemma3_source *from, const gemma3_options *options, void *mem,
                                size_t size, gemma3_error *err)
{
    struct opening o = start(from, options, err);
    size_t to_align = (64 - (uintptr_t)mem % 64) % 64;
    if (size >= to_align)
        o.arena = (struct arena){(uint8_t *)mem + to_align, 0, size - to_align};
    fp_state fp = fp_enter();
    int failed = open_steps(&o);
    fp_leave(fp);
    return failed ? NULL : o.m;
}

gemma3_model *gemma3_open_source(const gemma3_source *from, const gemma3_options *options,
                                 gemma3_error *err)
{
    size_t size = gemma3_model_size(from, options, err);
    void *mem = size ? malloc(size) : NULL;
    if (size && !mem) fail(err, "out of memory for a model (%llu bytes)", (unsigned long long)size);
    if (!mem) return NULL;
    host_use_large_pages(mem, size);
    gemma3_model *m = gemma3_model_init(from, options, mem, size, err);
    if (m) m->allocated = mem;
    else free(mem);
    return m;
}

gemma3_model *gemma3_open_memory(const void *data, size_t size, const char *name,
                                 const gemma3_options *options, gemma3_error *err)
{
    return gemma3_open_source(&(gemma3_source){.data = data, .size = size, .name = name}, options,
                              err);
}

void gemma3_close(gemma3_model *m)
{
    if (!m) return;
    host_unmap(m);
    free(m->allocated);
}

const gemma3_config *gemma3_model_config(const gemma3_model *m) { return &m->config; }
const gemma3_tokenizer *gemma3_model_tokenizer(const gemma3_model *m) { return m->tokenizer; }
const gemma3_info *gemma3_model_info(const gemma3_model *m) { return &m->info; }

const char *gemma3_model_note(const gemma3_model *m, int index)
{
    return index >= 0 && index < m->n_notes ? m->note[index] : NULL;
}

const char *gemma3_model_origin(const gemma3_model *m, const char *key)
{
    key += strncmp(key, "gemma3.", 7) ? 0 : 7;
    for (int k = 0; k < m->n_origins; k++)
        if (!strcmp(m->origin[k].key + 7, key)) return m->origin[k].text;
    return "";
}

int gemma3_model_tensor(const gemma3_model *m, int index, gemma3_tensor *t)
{
    struct weight s;
    if (find_weight(m, index, &s)) return -1;
    *t = (gemma3_tensor){.rows = s.rows, .cols = s.cols, .format = "F32"};
    strcpy(t->name, s.name);
    if (s.norm) t->data = t->floats = *s.norm, t->bytes = s.cols * sizeof(float);
    else t->format = s.w->format->name, t->data = s.w->data, t->bytes = s.w->row_bytes * s.w->rows;
    return 0;
}

/* ==== 13. Sizes and states =======================================================================
 *
 * A state is one block of memory, of which one function says what lies where, so that its size can
 * be told before anything is allocated and a caller may bring the memory. What it costs is seen
 * there: cache and scores grow with the context, the rest with the batch. The config that it
 * computes with may be the caller's own, which is how a test makes a mistake on purpose. At the
 * end: what of a state is worth keeping in a file, and how a file is known to fit. */

static void size_state(gemma3_state *s, const gemma3_config *c, const gemma3_params *p)
{
    s->c = c;
    s->p = *p;
    s->n_ubatch = min_int(min_int(p->n_batch, GEMMA3_MAX_UBATCH), p->n_ctx);
    s->n_abreast = min_int(s->n_ubatch, 4); /* scores take n_ctx floats for each head of each */
    s->n_acc = s->n_ubatch < 16 ? 16 : s->n_ubatch; /* a kv head may have that many queries */
    s->ring = min_int(min_int(c->window, 1 << 24) + s->n_ubatch - 1, p->n_ctx);
}

size_t gemma3_kv_bytes(const gemma3_config *c, const gemma3_params *p)
{
    gemma3_state s;
    size_t slots = 0;
    size_state(&s, c, p);
    for (int l = 0; l < c->n_layers; l++) slots = plus(slots, c->is_local[l] ? s.ring : p->n_ctx);
    return times(times(slots, times(c->n_kv_heads, c->head_dim)), 2 * kv_element(&s));
}

/* Where everything of a state lies: the one place that knows. With base NULL it only counts. */
static size_t lay_out(gemma3_state *s, const gemma3_model *m, const gemma3_params *p, uint8_t *base)
{
    size_state(s, p->config ? p->config : &m->config, p);
    struct arena arena = {base, 0, SIZE_MAX}, *a = &arena;
    const gemma3_config *c = s->c;
    size_t D = c->head_dim, q = c->n_heads * D, kv = times(c->n_kv_heads, D), n = s->n_ubatch;
    size_t n_queries = (size_t)s->n_abreast * c->n_heads, n_threads = s->p.n_threads;
    size_t widest_input = max_int(max_int(c->d_model, c->d_ff), (int)q);
    size_t blocks = (widest_input + 31) / 32;
    int exact = m->exact;
    for (int l = 0; l < c->n_layers; l++) {
        s->k_cache[l] = piece(a, times(slots_of(s, l), kv), kv_element(s));
        s->v_cache[l] = piece(a, times(slots_of(s, l), kv), kv_element(s));
    }
    for (int local = 0; local < 2; local++) {
        s->inv_freq[local] = piece(a, D / 2, sizeof(float));
        s->cosine[local] = piece(a, n * (D / 2), sizeof(float));
        s->sine[local] = piece(a, n * (D / 2), sizeof(float));
    }
    s->ids = piece(a, s->p.n_ctx, sizeof *s->ids);
    s->score_stride = ((size_t)s->p.n_ctx + 15) & ~(size_t)15;
    s->x = piece(a, n * c->d_model, sizeof *s->x);
    s->y = piece(a, n * c->d_model, sizeof *s->y);
    s->q = piece(a, n * q, sizeof *s->q);
    s->attended = piece(a, n * q, sizeof *s->attended);
    s->k = piece(a, times(n, kv), sizeof *s->k);
    s->v = piece(a, times(n, kv), sizeof *s->v);
    s->gate = piece(a, n * c->d_ff, sizeof *s->gate);
    s->up = piece(a, n * c->d_ff, sizeof *s->up);
    s->score_sum = piece(a, n_queries, sizeof *s->score_sum);
    s->score = piece(a, times(n_queries, s->score_stride), sizeof *s->score);
    s->q8 = piece(a, exact ? 0 : n * blocks, sizeof *s->q8);
    s->acc = piece(a, n_threads * s->n_acc, sizeof *s->acc);
    s->unpacked = piece(a, exact ? 0 : n_threads, sizeof *s->unpacked);
    s->row_floats = piece(a, exact ? n_threads * TILE_ROWS * blocks : 0, 32 * sizeof(float));
    s->streamed = piece(a, times(n_threads, TILE_ROWS), m->streamed_row);
    s->read_failed = piece(a, n_threads, 1);
    return a->used;
}

/* 4,096 tokens: the cache for all that a model was trained for may take gigabytes. */
gemma3_params gemma3_default_params(const gemma3_model *m)
{
    return (gemma3_params){.n_ctx = min_int(m->config.n_ctx_train, 4096),
                           .n_batch = GEMMA3_MAX_UBATCH,
                           .kv_type = m->exact ? GEMMA3_KV_F32 : GEMMA3_KV_F16, .n_threads = 1};
}

size_t gemma3_state_size(const gemma3_model *m, const gemma3_params *p)
{
    gemma3_state s;
    return plus(lay_out(&s, m, p, NULL), sizeof s + 128); /* to align any memory to 64 */
}

/* A caller's config: the model's shapes, and numbers with which no angle and no index leaves its
 * bounds. The others may be any: what comes out is then no number, and does no harm. */
static int check_config(const gemma3_config *c, const gemma3_config *m, gemma3_error *err)
{
    const struct { const char *name; float x, low, high; } number[] = {
        {"rope_base_global", c->rope_base_global, 1, 1e30f},
        {"rope_base_local", c->rope_base_local, 1, 1e30f},
        {"rope_factor", c->rope_factor, 0x1p-7f, 1e30f},
        {"window", (float)c->window, memchr(c->is_local, 1, sizeof c->is_local) != NULL, 0x1p24f}};
    if (memcmp(c, m, offsetof(gemma3_config, n_ctx_train))) /* the fields before it are shapes */
        return fail(err, "a config with other shapes than the model's");
    for (size_t k = 0; k < sizeof number / sizeof *number; k++)
        if (!(number[k].x >= number[k].low && number[k].x <= number[k].high))
            return fail(err, "a config with %s %g: expected a number from %g to %g", number[k].name,
                        (double)number[k].x, (double)number[k].low, (double)number[k].high);
    for (int l = 0; l < c->n_layers; l++)
        if (c->is_local[l] > 1)
            return fail(err, "a config with is_local[%d] %d: expected 0 or 1", l, c->is_local[l]);
    return 0;
}

/* Bytes of a state; 0 and a sentence when none can be made of these params. */
static size_t checked_size(const gemma3_model *m, const gemma3_params *p, gemma3_error *err)
{
    if (p->n_ctx < 1 || p->n_ctx > 1 << 24)
        return fail(err, "a context of %d tokens: expected 1 to %d", p->n_ctx, 1 << 24), 0;
    if (p->n_batch < 1)
        return fail(err, "a batch of %d tokens: expected at least 1", p->n_batch), 0;
    if (p->kv_type != GEMMA3_KV_F16 && p->kv_type != GEMMA3_KV_F32)
        return fail(err, "a cache of type %d: expected GEMMA3_KV_F16 or _F32", (int)p->kv_type), 0;
    if (p->n_threads < 1 || p->n_threads > GEMMA3_MAX_THREADS)
        return fail(err, "%d threads: expected 1 to %d", p->n_threads, GEMMA3_MAX_THREADS), 0;
    if (p->n_threads > 1 && !p->parallel_for)
        return fail(err, "%d threads, but no parallel_for to run them", p->n_threads), 0;
    if (p->config && check_config(p->config, &m->config, err)) return 0;
    size_t size = gemma3_state_size(m, p);
    if (size < SIZE_MAX) return size;
    return fail(err, "a context of %d tokens needs more memory than this machine can address",
                p->n_ctx), 0;
}

gemma3_state *gemma3_state_init(const gemma3_model *m, const gemma3_params *p, void *mem,
                                size_t size, gemma3_error *err)
{
    size_t need = checked_size(m, p, err);
    if (!need) return NULL;
    if (size < need)
        return fail(err, "a state needs %llu bytes, %llu were given", (unsigned long long)need,
                    (unsigned long long)size), NULL;
    fp_state fp = fp_enter();
    gemma3_state *s = (gemma3_state *)(((uintptr_t)mem + 63) & ~(uintptr_t)63);
    memset(s, 0, sizeof *s);
    s->m = m;
    lay_out(s, m, p, (uint8_t *)s + ((sizeof *s + 63) & ~(size_t)63));
    memset(s->read_failed, 0, p->n_threads);
    for (int local = 0; local < 2; local++)
        for (int j = 0, D = s->c->head_dim; j < D / 2; j++) {
            float base = local ? s->c->rope_base_local : s->c->rope_base_global;
            float turned = (float)power(base, 2.0 * j / D);
            s->inv_freq[local][j] = (1.0f / turned) / (local ? 1.0f : s->c->rope_factor);
        }
    fp_leave(fp);
    return s;
}

gemma3_state *gemma3_state_new(const gemma3_model *m, const gemma3_params *p, gemma3_error *err)
{
    size_t size = checked_size(m, p, err);
    void *mem = size ? malloc(size) : NULL;
    if (size && !mem)
        fail(err, "out of memory for a context of %d tokens (%llu bytes)", p->n_ctx,
             (unsigned long long)size);
    gemma3_state *s = mem ? gemma3_state_init(m, p, mem, size, err) : NULL;
    if (s) s->allocated = mem;
    return s;
}

void gemma3_state_free(gemma3_state *s) { free(s ? s->allocated : NULL); }
void gemma3_state_reset(gemma3_state *s) { s->pos = 0; }
int gemma3_state_pos(const gemma3_state *s) { return s->pos; }
const int32_t *gemma3_state_ids(const gemma3_state *s) { return s->ids; }
const char *gemma3_state_error(const gemma3_state *s) { return s->error; }

/* ---- States that are kept ----
 *
 *     "gemma3 state 1\n" NUL | u32 contract, exact, kv_type, n | SHA-256 of model and config as hex
 *     u32 ids[n] | for each layer and kv head: K and V of all positions, or of the last `window`
 *     SHA-256 of all before as hex
 *
 * Saving and loading take the same steps: only what `pass` does with the bytes differs. So what is
 * loaded is compared with what would be saved. */

struct stream {
    gemma3_write *write;             /* or: */
    gemma3_read *read;
    void *user;
    uint64_t at;
    int failed;
    gemma3_sha256 sum;
};

/* Writes n bytes, or reads them in their place. */
static void pass(struct stream *f, void *bytes, size_t n)
{
    if (f->failed) return;
    f->failed = f->write ? f->write(f->user, bytes, n) : f->read(f->user, f->at, bytes, n);
    f->at += n;
    gemma3_sha256_add(&f->sum, bytes, f->failed ? 0 : n);
}

/* What a state's numbers depend on: the config, every norm and one row of every matrix, which no
 * two trained models share. All the weights would take seconds. */
static int hash_model(gemma3_state *s, char hex[65])
{
    const gemma3_config *c = s->c;
    const float number[] = {(float)c->window, c->rms_eps, c->rope_base_global, c->rope_base_local,
                            c->rope_factor, c->query_scale, c->embedding_scale};
    gemma3_sha256 sum;
    struct weight t;
    fp_state fp = fp_enter();
    gemma3_sha256_init(&sum);
    gemma3_sha256_add_floats(&sum, number, sizeof number / sizeof *number);
    gemma3_sha256_add(&sum, c->is_local, c->n_layers);
    for (int k = 0; !find_weight(s->m, k, &t); k++) {
        float *row = t.cols == c->d_ff ? s->gate : t.cols == c->d_model ? s->y : s->q;
        if (t.w) dequantize_row(s, t.w, t.rows / 2, row);
        gemma3_sha256_add_floats(&sum, t.w ? row : *t.norm, t.cols);
    }
    gemma3_sha256_end(&sum, hex);
    fp_leave(fp);
    int failed = s->read_failed[0];
    s->read_failed[0] = 0;
    return failed;
}

/* The beginning, of 96 bytes, as this state's would be. What comes instead must be the same but for
 * the number of tokens, *n; a sentence says what is not. */
static int pass_start(struct stream *f, gemma3_state *s, uint32_t *n, gemma3_error *err)
{
    static const char *const field[] = {"contract", "exact mode", "KV type"};
    const uint32_t ours[] = {GEMMA3_CONTRACT, s->m->exact, s->p.kv_type, s->pos};
    uint8_t want[16 + 16 + 65] = "gemma3 state 1\n", got[sizeof want];
    for (int k = 0; k < 4; k++) store_u32_le(want + 16 + 4 * k, ours[k]);
    if (hash_model(s, (char *)want + 32)) return fail(err, "the model's weights cannot be read");
    pass(f, memcpy(got, want, 96), 96);
    if (f->failed) return 0;
    if (memcmp(got, want, 16)) return fail(err, "this is no saved state of gemma3");
    for (int k = 0; k < 3; k++)
        if (load_u32_le(got + 16 + 4 * k) != ours[k])
            return fail(err, "the state was saved with %s %u, expected %u", field[k],
                        (unsigned)load_u32_le(got + 16 + 4 * k), (unsigned)ours[k]);
    if (memcmp(got + 32, want + 32, 64))
        return fail(err, "the state was saved with another model or config");
    *n = load_u32_le(got + 28);
    if (*n > (uint32_t)s->p.n_ctx)
        return fail(err, "the state holds %u tokens, the context only %d", (unsigned)*n,
                    s->p.n_ctx);
    return 0;
}

/* Of each layer what the next token can see. */
static void pass_cache(struct stream *f, gemma3_state *s, int n)
{
    const gemma3_config *c = s->c;
    for (int l = 0; l < c->n_layers; l++) {
        struct attention a = {.s = s, .l = l, .slots = slots_of(s, l)};
        int first = c->is_local[l] && n > c->window ? n - c->window : 0, D = c->head_dim;
        for (int g = 0; g < c->n_kv_heads; g++)
            for (int p = first; p < n; p++) {
                pass(f, key_at(&a, g, p), D * kv_element(s));
                for (int j0 = 0; j0 < D; j0 += MIX_WIDTH)
                    pass(f, value_at(&a, g, j0, p), slice_width(D, j0) * kv_element(s));
            }
    }
}

static int pass_state(struct stream *f, gemma3_state *s, gemma3_error *err)
{
    uint8_t id[4];
    uint32_t n = 0;
    char hex[65], theirs[64];
    gemma3_sha256_init(&f->sum);
    if (pass_start(f, s, &n, err)) return -1;
    for (uint32_t i = 0; i < n; i++) {
        store_u32_le(id, (uint32_t)s->ids[i]);
        pass(f, id, 4);
        s->ids[i] = (int32_t)load_u32_le(id);
        if (!f->failed && (s->ids[i] < 0 || s->ids[i] >= s->c->n_vocab))
            return fail(err, "the saved token %u is %d, outside the vocabulary of %d", (unsigned)i,
                        (int)s->ids[i], s->c->n_vocab);
    }
    pass_cache(f, s, (int)n);
    gemma3_sha256_end(&f->sum, hex);
    pass(f, memcpy(theirs, hex, 64), 64);
    if (f->failed && f->write) return fail(err, "the state cannot be written");
    if (f->failed) return fail(err, "the saved state is truncated, or cannot be read");
    if (memcmp(theirs, hex, 64))
        return fail(err, "the saved state is damaged: its SHA-256 differs");
    s->pos = (int)n;
    return 0;
}

int gemma3_state_save(gemma3_state *s, gemma3_write *write, void *user, gemma3_error *err)
{
    return pass_state(&(struct stream){.write = write, .user = user}, s, err);
}

int gemma3_state_load(gemma3_state *s, gemma3_read *read, void *user, gemma3_error *err)
{
    s->pos = 0;
    return pass_state(&(struct stream){.read = read, .user = user}, s, err);
}

/* ==== 14. Scores, sampling, SHA-256 ==============================================================
 *
 * What is done with logits. None of it allocates, fails or keeps anything but what the caller
 * holds, so that it also serves logits of other programs. It is part of the contract: the same
 * logits give the same score, and the same seed the same choices, everywhere. Therefore each sum
 * has an order (rules 8 and 9), and every comparison says what becomes of equal numbers and NaN:
 * the lower id wins, NaN never. */

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

/* Without a model, so with the best kernels there are: all give the same sum (rule 9). */
double gemma3_nll(const float *logits, int n_vocab, int32_t id)
{
    fp_state fp = fp_enter();
    int k = 0;
    while (!cpu_has(all_kernels[k]->name)) k++;
    float max = largest_of(logits, n_vocab);
    double sum = all_kernels[k]->sum_exp(logits, n_vocab, max);
    double nll = ((double)max - logits[id]) + log_double(sum);
    fp_leave(fp);
    return nll;
}

/* ---- Sampling: rule 8 ---- */

/* A seed goes through splitmix64, so that seeds that are alike begin with states that are not. */
gemma3_sampler gemma3_sampler_new(uint64_t seed)
{
    gemma3_sampler s = {.temperature = 1, .top_k = 64, .top_p = 0.95f, .repeat_penalty = 1};
    uint64_t z = seed + 0x9E3779B97F4A7C15;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    z ^= z >> 31;
    s.rng = z ? z : 1;
    return s;
}

/* n_last goes round in the ring's second half, where it also says that the ring is full. */
void gemma3_sampler_accept(gemma3_sampler *s, int32_t id)
{
    s->last[s->n_last++ % GEMMA3_PENALTY_WINDOW] = id;
    if (s->n_last == 2 * GEMMA3_PENALTY_WINDOW) s->n_last = GEMMA3_PENALTY_WINDOW;
}

/* Shell's sort, by id or else the best first: logit down, id up. */
static void sort(gemma3_candidate *c, int n, int by_id)
{
    for (int gap = (5 * n + 1) / 11; gap > 0; gap = (5 * gap + 1) / 11)
        for (int i = gap; i < n; i++)
            for (int j = i - gap; j >= 0; j -= gap) {
                gemma3_candidate a = c[j], b = c[j + gap];
                if (by_id || a.logit == b.logit ? a.id < b.id : a.logit > b.logit) break;
                c[j] = b, c[j + gap] = a;
            }
}

/* Puts the k best numbers among logits into c; returns how many there are. They gather until there
 * are 2k, then the worse half goes; runs of 256 below the rest are passed over. */
static int keep_best(const float *logits, int n_vocab, gemma3_candidate *c, int k)
{
    float least = MINUS_INFINITY;
    int n = 0;
    for (int32_t id = 0, end; id < n_vocab; id = end) {
        end = id + min_int(n_vocab - id, 256);
        if (largest_of(logits + id, end - id) < least) continue;
        for (; id < end; id++)
            if (logits[id] >= least) c[n++] = (gemma3_candidate){logits[id], id};
        if (n - k >= k) sort(c, n, 0), n = k, least = c[k - 1].logit;
    }
    if (n > k) sort(c, n, 0);
    return min_int(n, k);
}

/* Penalty, top-k, temperature, top-p, min-p, choice. The sum that top-p is a part of is added in
 * the order of ids, as softmax's is, what is kept from the likeliest on: so c is sorted twice.
 * Without top-k it sorts all, 45 ms; to sort 1,024 first, which often do, would take 17 lines. */
int32_t gemma3_sample(gemma3_sampler *s, float *logits, int n_vocab, gemma3_candidate *c)
{
    fp_state fp = fp_enter();
    float lane[16] = {0}, top = MINUS_INFINITY, sum = 0, kept = 0, seen = 0, r = s->repeat_penalty;
    int k = s->temperature > 0 ? n_vocab : 1, n_kept = 0;
    if (s->top_k > 0) k = min_int(k, s->top_k);
    for (int j = 0, first = 0; j < min_int(s->n_last, GEMMA3_PENALTY_WINDOW); j++, first = 0) {
        int32_t id = s->last[j];
        while (s->last[first] != id) first++;
        if (first < j || id < 0 || id >= n_vocab) continue; /* once for each id */
        logits[id] = logits[id] > 0 ? logits[id] / r : logits[id] * r;
    }
    int n = keep_best(logits, n_vocab, c, k);
    sort(c, n, 1);
    for (int j = 0; j < n; j++) top = c[j].logit > top ? c[j].logit : top;
    for (int j = 0; j < n; j++)
        lane[c[j].id % 16] += exp_f32((c[j].logit - top) / s->temperature);
    float limit = s->top_p * join_lanes(lane);
    sort(c, n, 0);
    int32_t chosen = n > 0 ? c[0].id : 0;
    if (k > 1 && top - top == 0) {
        for (; n_kept < n && (n_kept == 0 || sum < limit); n_kept++) {
            float e = c[n_kept].logit = exp_f32((c[n_kept].logit - top) / s->temperature);
            sum += e;
            kept += e >= s->min_p ? e : 0;
        }
        s->rng ^= s->rng >> 12; /* xorshift64* */
        s->rng ^= s->rng << 25;
        s->rng ^= s->rng >> 27;
        float u = (float)(s->rng * 0x2545F4914F6CDD1D >> 40) * 0x1p-24f * kept;
        for (int j = 0; j < n_kept && !(seen > u); j++)
            if (c[j].logit >= s->min_p) seen += c[j].logit, chosen = c[j].id;
    }
    fp_leave(fp);
    return chosen;
}

/* ---- SHA-256 (FIPS 180-4) ---- */

static uint32_t rotate_right(uint32_t x, int n) { return x >> n | x << (32 - n); }

/* The first 32 bits of the fractions of the cube roots of the first 64 primes. */
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
    uint32_t w[64], v[8]; /* v: a .. h of the standard */
    memcpy(w, c->block, sizeof c->block);
    memcpy(v, c->h, sizeof v);
    for (int i = 16; i < 64; i++) {
        uint32_t x = w[i - 15], y = w[i - 2];
        w[i] = w[i - 16] + (rotate_right(x, 7) ^ rotate_right(x, 18) ^ x >> 3) +
               w[i - 7] + (rotate_right(y, 17) ^ rotate_right(y, 19) ^ y >> 10);
    }
    for (int i = 0; i < 64; i++) {
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
                          0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19}, {0}, 0};
}

/* A byte is shifted into its word: words are numbers, so that it is the same on any machine. */
void gemma3_sha256_add(gemma3_sha256 *c, const void *data, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        uint32_t *word = &c->block[c->n_bytes / 4 % 16];
        *word = *word << 8 | ((const uint8_t *)data)[i];
        if (++c->n_bytes % 64 == 0) sha256_block(c);
    }
}

void gemma3_sha256_add_floats(gemma3_sha256 *c, const float *x, size_t n)
{
    for (size_t i = 0; i < 4 * n; i++)
        gemma3_sha256_add(c, &(uint8_t){(uint8_t)(bits_of(x[i / 4]) >> 8 * (i % 4))}, 1);
}

/* A one bit, zeros, and the message's length in bits fill the last block. */
void gemma3_sha256_end(gemma3_sha256 *c, char hex[65])
{
    uint64_t n_bits = c->n_bytes * 8;
    gemma3_sha256_add(c, "\x80", 1);
    while (c->n_bytes % 64 != 56) gemma3_sha256_add(c, "", 1);
    c->block[14] = (uint32_t)(n_bits >> 32);
    c->block[15] = (uint32_t)n_bits;
    sha256_block(c);
    for (int i = 0; i < 64; i++) hex[i] = "0123456789abcdef"[c->h[i / 8] >> 4 * (7 - i % 8) & 15];
    hex[64] = 0;
}

/* ==== 15. Threads and files of the host =========================================================
 *
 * What is asked of an operating system: map a file, say what of the machine is ours, run threads,
 * and what a program needs beyond C11 (gemma3.h, "The host"). There is one body for POSIX and one
 * for Windows, nowhere else; below them nothing knows which. */

#if !defined(GEMMA3_NO_FILE)
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <sys/stat.h>

struct limits {
    double cpus, bytes; /* CPUs' worth of time, memory */
};

#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>
#define THREAD void *

/* A file's bytes, and in *size how many; -1: it cannot be opened, -2: it is not a regular file.
 * Asked of the open file, not of its name, which may lead elsewhere by then; O_NONBLOCK, because
 * opening a FIFO would wait for somebody who writes into it. */
static const void *host_map(const char *path, long long *size)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_NONBLOCK);
    void *data = MAP_FAILED;
    *size = fd < 0 ? -1 : fstat(fd, &st) || !S_ISREG(st.st_mode) ? -2 : (long long)st.st_size;
    if (*size > 0 && (unsigned long long)*size <= SIZE_MAX)
        data = mmap(NULL, (size_t)*size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (fd >= 0) close(fd);
    return data == MAP_FAILED ? NULL : data;
}

static void host_unmap(const gemma3_model *m)
{
    if (m->source.is_mapped) munmap((void *)(uintptr_t)m->source.data, m->source.n_data);
}

/* madvise for the whole pages inside [begin, begin + n). */
static void advise(const uint8_t *begin, size_t n, int advice)
{
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), at = (uintptr_t)begin;
    uintptr_t from = (at + page - 1) / page * page, to = (at + n) / page * page;
    if (to > from) madvise((void *)from, to - from, advice);
}

/* After repacking, the file's pages are not needed any more: without this a model would count
 * twice against a container's limit. */
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n)
{
    if (m->source.is_mapped) advise(begin, n, MADV_DONTNEED);
}

#if !defined(MADV_HUGEPAGE)
#define MADV_HUGEPAGE MADV_NORMAL
#endif
/* A token reads all weights: small pages would cost it a look-up of an address every 4 KB. */
static void host_use_large_pages(uint8_t *begin, size_t n) { advise(begin, n, MADV_HUGEPAGE); }

/* The first or second number in a file, or `other`: "max" is none. */
static double number_in(const char *folder, const char *name, int is_second, double other)
{
    char path[4300];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    FILE *f = fopen(path, "r");
    if (f && fscanf(f, is_second ? "%*s %lf" : "%lf", &other) < 1) clearerr(f);
    if (f) fclose(f);
    return other;
}

/* The file `self` lists this process's control groups as "number:controllers:/path"; version 1
 * keeps each list of controllers in a folder of that name below root, and has a file for each
 * number, where version 2 says "quota period". The groups above bind a group too, and inside a
 * container they are all that can be seen. */
static void limit_by_groups(const char *self, const char *root, struct limits *l)
{
    char line[4096], folder[4200];
    FILE *f = fopen(self, "r");
    while (f && fgets(line, sizeof line, f)) {
        char *list = strchr(line, ':'), *path = list ? strchr(list + 1, ':') : NULL;
        if (!path) continue;
        line[strcspn(line, "\n")] = 0;
        *path = 0;
        char *end = folder + snprintf(folder, sizeof folder, "%s/%s", root, list + 1);
        for (char *cut = strchr(strcpy(end, path + 1), 0); cut; cut = strrchr(end, '/')) {
            *cut = 0;
            double quota = number_in(folder, "cpu.cfs_quota_us", 0, -1);
            double period = number_in(folder, "cpu.cfs_period_us", 0, 1e5);
            double bytes = number_in(folder, "memory.limit_in_bytes", 0, -1);
            quota = number_in(folder, "cpu.max", 0, quota);
            period = number_in(folder, "cpu.max", 1, period);
            bytes = number_in(folder, "memory.max", 0, bytes);
            if (quota > 0 && quota / period < l->cpus) l->cpus = quota / period;
            if (bytes >= 0 && bytes < l->bytes) l->bytes = bytes;
        }
    }
    if (f) fclose(f);
}

/* Of the hardware threads that share a core one counts: two of them gain nothing where memory or
 * multipliers are the limit. Fast and slow ones count alike, as tasks go to whoever is free. */
static struct limits host_limits(void)
{
    struct limits l = {(double)sysconf(_SC_NPROCESSORS_ONLN),
                       (double)sysconf(_SC_PHYS_PAGES) * (double)sysconf(_SC_PAGESIZE)};
#if defined(RLIMIT_AS)
    struct rlimit room;
    if (!getrlimit(RLIMIT_AS, &room) && (double)room.rlim_cur < l.bytes)
        l.bytes = (double)room.rlim_cur;
#endif
#if defined(__linux__)
    cpu_set_t may_use;
    uint8_t seen[CPU_SETSIZE] = {0};
    int n = sched_getaffinity(0, sizeof may_use, &may_use) ? 0 : CPU_SETSIZE;
    if (n) l.cpus = 0;
    for (int cpu = 0; cpu < n; cpu++) {
        char folder[96];
        if (!CPU_ISSET(cpu, &may_use)) continue;
        snprintf(folder, sizeof folder, "/sys/devices/system/cpu/cpu%d/topology", cpu);
        int first = (int)number_in(folder, "thread_siblings_list", 0, cpu) % n;
        l.cpus += !seen[first];
        seen[first] = 1;
    }
#endif
    limit_by_groups("/proc/self/cgroup", "/sys/fs/cgroup", &l);
    return l;
}

/* A mapped file's pages are gone when somebody shortens it, or its disk fails: no way on. */
static void end_without_file(int number)
{
    static const char why[] = "gemma3: the model's file can no longer be read: was it cut off?\n";
    (void)number;
    _exit(!!write(2, why, sizeof why - 1));
}

/* A closed stream leaves its number to the next file that is opened: a model as standard error,
 * say. What takes that number here can do nothing. SIGPIPE and SIGXFSZ would end the program
 * without a word, and leave half a file: ignored, they are errors of writing like any other. */
char **gemma3_host_start(char **argv)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd ? O_RDONLY : O_WRONLY) < 0) break;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGXFSZ, SIG_IGN);
    signal(SIGBUS, end_without_file);
    if (*argv && !strchr(*argv, '/')) *argv = "/proc/self/exe"; /* it was found in $PATH */
    return argv;
}

long long gemma3_file_size(const char *path)
{
    struct stat st;
    return stat(path, &st) ? -1 : S_ISREG(st.st_mode) ? (long long)st.st_size : -2;
}

FILE *gemma3_fopen(const char *path, const char *mode) { return fopen(path, mode); }
int gemma3_rename(const char *from, const char *to) { return rename(from, to); }
int gemma3_remove(const char *path) { return remove(path); }
int gemma3_is_terminal(FILE *f) { return isatty(fileno(f)); }
int gemma3_typed_byte(gemma3_typed *t) { return (void)t, getchar(); }

double gemma3_seconds(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#else /* Windows */
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
#include <io.h>
#include <shellapi.h>

/* A path as Windows wants it: in UTF-16 and, marked by \\?\, longer than 260 characters. "" when
 * that cannot be, which names no file. */
struct wide_path { wchar_t text[32768]; };

static struct wide_path widen(const char *path)
{
    struct wide_path given, full = {L"\\\\?\\"};
    if (!MultiByteToWideChar(CP_UTF8, 0, path, -1, given.text, 32764)) given.text[0] = 0;
    DWORD n = GetFullPathNameW(given.text, 32764, full.text + 4, NULL);
    return !n || full.text[4] == '\\' ? given : full; /* a share or a device has a mark already */
}

static const void *host_map(const char *path, long long *size)
{
    struct _stat64 st;
    int fd = _wopen(widen(path).text, _O_RDONLY | _O_BINARY);
    *size = fd < 0 ? -1 : _fstat64(fd, &st) || (st.st_mode & _S_IFMT) != _S_IFREG ? -2 : st.st_size;
    HANDLE file = *size <= 0 ? NULL :
                  CreateFileMappingW((HANDLE)_get_osfhandle(fd), NULL, PAGE_READONLY, 0, 0, NULL);
    const void *data = file ? MapViewOfFile(file, FILE_MAP_READ, 0, 0, 0) : NULL;
    if (file) CloseHandle(file);
    if (fd >= 0) _close(fd);
    return data;
}

static void host_unmap(const gemma3_model *m)
{
    if (m->source.is_mapped) UnmapViewOfFile(m->source.data);
}

/* Unlocking pages that are not locked drops them from the working set. */
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n)
{
    if (m->source.is_mapped) VirtualUnlock((void *)(uintptr_t)begin, n);
}

/* Large pages are a privilege there. */
static void host_use_large_pages(uint8_t *begin, size_t n) { (void)begin, (void)n; }

static struct limits host_limits(void)
{
    SYSTEM_LOGICAL_PROCESSOR_INFORMATION core[1024];
    DWORD bytes = sizeof core;
    DWORD_PTR may_use, exist;
    MEMORYSTATUSEX memory = {.dwLength = sizeof memory};
    struct limits l = {0, GlobalMemoryStatusEx(&memory) ? (double)memory.ullTotalPhys : 0};
    if (!GetProcessAffinityMask(GetCurrentProcess(), &may_use, &exist) ||
        !GetLogicalProcessorInformation(core, &bytes)) return l;
    for (DWORD k = 0; k < bytes / sizeof *core; k++)
        if (core[k].Relationship == RelationProcessorCore && core[k].ProcessorMask & may_use)
            l.cpus++;
    return l;
}

/* main's argv has '?' for what the system's code page lacks, and streams turn \n into \r\n. */
char **gemma3_host_start(char **argv)
{
    struct wide_path self;
    int n;
    SetConsoleOutputCP(CP_UTF8);
    SetConsoleCP(CP_UTF8);
    _setmode(0, _O_BINARY);
    _setmode(1, _O_BINARY);
    wchar_t **wide = CommandLineToArgvW(GetCommandLineW(), &n);
    if (wide && GetModuleFileNameW(NULL, self.text, 32768)) wide[0] = self.text;
    size_t room = 3 * (wcslen(GetCommandLineW()) + 32768); /* bytes for each UTF-16 unit, at most */
    char **utf8 = wide ? malloc((size_t)(n + 1) * sizeof *utf8 + room) : NULL;
    if (!utf8) return argv;
    char *to = (char *)(utf8 + n + 1);
    for (int i = 0; i < n; i++) {
        utf8[i] = to;
        to += WideCharToMultiByte(CP_UTF8, 0, wide[i], -1, to, (int)room, NULL, NULL);
    }
    utf8[n] = NULL;
    return utf8;
}

/* Windows itself follows links, and where they lead is not asked. */
#define realpath(path, unused) _strdup(path)

long long gemma3_file_size(const char *path)
{
    struct _stat64 st;
    if (_wstat64(widen(path).text, &st)) return -1;
    return (st.st_mode & _S_IFMT) == _S_IFREG ? st.st_size : -2;
}

FILE *gemma3_fopen(const char *path, const char *mode)
{
    wchar_t wide[32] = {0};
    mbstowcs(wide, mode, 31); /* a mode is ASCII */
    return _wfopen(widen(path).text, wide);
}

int gemma3_rename(const char *from, const char *to)
{
    return MoveFileExW(widen(from).text, widen(to).text, MOVEFILE_REPLACE_EXISTING)
           ? 0 : (errno = EACCES, -1);
}

int gemma3_remove(const char *path) { return _wremove(widen(path).text); }
int gemma3_is_terminal(FILE *f) { return _isatty(_fileno(f)); }

/* For bytes, the console of Windows 10 has 0 where a typed letter is not ASCII. */
int gemma3_typed_byte(gemma3_typed *t)
{
    wchar_t wide[256];
    DWORD n = 0, rest = 0;
    HANDLE console = GetStdHandle(STD_INPUT_HANDLE);
    if (!gemma3_is_terminal(stdin)) return getchar();
    if (t->at < t->n) return (unsigned char)t->text[t->at++];
    if (!ReadConsoleW(console, wide, 255, &n, NULL) || n == 0 || *wide == 26) return EOF; /* ^Z */
    if (wide[n - 1] >> 10 == 0xD800 >> 10) ReadConsoleW(console, wide + n, 1, &rest, NULL);
    t->n = WideCharToMultiByte(CP_UTF8, 0, wide, (int)(n + rest), t->text, 768, NULL, NULL);
    t->at = 1;
    return t->n ? (unsigned char)*t->text : EOF;
}

double gemma3_seconds(void)
{
    LARGE_INTEGER now, per_second;
    QueryPerformanceCounter(&now);
    QueryPerformanceFrequency(&per_second);
    return (double)now.QuadPart / (double)per_second.QuadPart;
}

/* As much of POSIX threads as a pool needs. */
typedef HANDLE pthread_t;
typedef SRWLOCK pthread_mutex_t;
typedef CONDITION_VARIABLE pthread_cond_t;
#define PTHREAD_MUTEX_INITIALIZER SRWLOCK_INIT
#define PTHREAD_COND_INITIALIZER CONDITION_VARIABLE_INIT
#define pthread_mutex_lock AcquireSRWLockExclusive
#define pthread_mutex_unlock ReleaseSRWLockExclusive
#define pthread_mutex_destroy(mutex) ((void)(mutex))
#define pthread_cond_wait(cond, mutex) SleepConditionVariableSRW(cond, mutex, INFINITE, 0)
#define pthread_cond_broadcast WakeAllConditionVariable
#define pthread_cond_destroy(cond) ((void)(cond))
#define pthread_create(t, unused, run, arg) (!(*(t) = CreateThread(NULL, 0, run, arg, 0, NULL)))
#define pthread_join(t, unused) (WaitForSingleObject(t, INFINITE), CloseHandle(t))
#define sched_yield SwitchToThread
#define THREAD DWORD WINAPI /* what a thread's function returns; nobody reads it */
#endif

/* A mapped file costs no memory of its own and no time to read: what is used comes in, and several
 * programs share it. */
gemma3_model *gemma3_open(const char *path, const gemma3_options *options, gemma3_error *err)
{
    long long size;
    if (!path) return fail(err, "no path of a model was given"), NULL;
    const void *data = host_map(path, &size);
    if (size == -1) return fail_about(err, path, " cannot be opened: %s", strerror(errno)), NULL;
    if (size == -2) return fail_about(err, path, " is not a regular file"), NULL;
    if (size == 0) return fail_about(err, path, " has 0 bytes: it is empty"), NULL;
    if ((unsigned long long)size > SIZE_MAX)
        return fail_about(err, path, " has %lld bytes: more than this machine can address", size),
               NULL;
    if (!data) return fail_about(err, path, " cannot be mapped: %s", strerror(errno)), NULL;
    gemma3_source from = {.data = data, .n_data = (size_t)size, .size = (uint64_t)size,
                          .name = path, .is_mapped = 1};
    gemma3_model *m = gemma3_open_source(&from, options, err);
    if (!m) host_unmap(&(gemma3_model){.source = from});
    return m;
}

int gemma3_real_path(const char *path, char *real, size_t size)
{
    char *found = realpath(path, NULL);
    int n = snprintf(real, size, "%s", found ? found : path);
    free(found);
    return (size_t)n < size ? 0 : (errno = ENAMETOOLONG, -1);
}

int gemma3_default_threads(void)
{
    double cpus = host_limits().cpus;
    if (cpus > GEMMA3_MAX_THREADS) return GEMMA3_MAX_THREADS;
    return cpus < 1 ? 1 : (int)cpus + (cpus > (int)cpus); /* half a CPU is worth a thread */
}

size_t gemma3_memory_limit(void)
{
    double bytes = host_limits().bytes;
    return !(bytes > 0) ? 0 : bytes < (double)SIZE_MAX ? (size_t)bytes : SIZE_MAX;
}

/* A call of gemma3_pool_run is a round: who takes part claims one task after another by counting
 * `left` down, and the round ends when none is undone. Only who has claimed a task reads what it
 * is: then the round cannot end, so nothing changes meanwhile; and nobody waits for a worker that
 * comes late and finds none left. Between rounds workers spin a while, for 20,000 looks (longer
 * than what one thread does alone), then sleep: a round is often shorter than it takes to
 * wake a thread. */
enum { SPINS = 20000 };

struct gemma3_pool {
    gemma3_task *task;                /* of this round, with the next two */
    void *job;
    int n_tasks;
    atomic_int left, undone;          /* tasks that nobody has claimed; that have not ended */
    atomic_int stop, n_workers;       /* 1: all shall end; how many have a number */
    pthread_mutex_t turn;             /* held during a round: states that share a pool take turns */
    pthread_mutex_t mutex;            /* and the condition: of those who sleep */
    pthread_cond_t wake;
    int n_threads;
    pthread_t thread[];               /* [n_threads], the first unused: it is whoever calls */
};

static void relax(int spin)
{
#if defined(HAVE_X86)
    _mm_pause();
#endif
    if (spin % 256 == 255) sched_yield(); /* where threads outnumber CPUs, let the others end */
}

static void take_part(gemma3_pool *pool, int worker)
{
    int n = 0;
    for (int left; (left = atomic_fetch_sub(&pool->left, 1)) > 0; n++)
        pool->task(pool->job, pool->n_tasks - left, worker);
    if (n > 0) atomic_fetch_sub(&pool->undone, n);
}

/* Under the mutex, or a worker that has just found nothing to do would sleep through it. */
static void offer(gemma3_pool *pool, int n_tasks)
{
    pthread_mutex_lock(&pool->mutex);
    atomic_store(&pool->left, n_tasks);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

static int is_idle(gemma3_pool *pool)
{
    return atomic_load(&pool->left) <= 0 && !atomic_load(&pool->stop);
}

static THREAD worker_main(void *arg)
{
    gemma3_pool *pool = arg;
    int worker = 1 + atomic_fetch_add(&pool->n_workers, 1);
    fp_enter(); /* each thread has a floating-point state of its own */
    while (!atomic_load(&pool->stop)) {
        for (int spin = 0; spin < SPINS && is_idle(pool); spin++) relax(spin);
        if (is_idle(pool)) {
            pthread_mutex_lock(&pool->mutex);
            while (is_idle(pool)) pthread_cond_wait(&pool->wake, &pool->mutex);
            pthread_mutex_unlock(&pool->mutex);
        }
        take_part(pool, worker);
    }
    return 0;
}

void gemma3_pool_run(void *arg, int n_tasks, gemma3_task *task, void *job)
{
    gemma3_pool *pool = arg;
    pthread_mutex_lock(&pool->turn);
    pool->task = task;
    pool->job = job;
    pool->n_tasks = n_tasks;
    atomic_store(&pool->undone, n_tasks);
    offer(pool, n_tasks);
    take_part(pool, 0);
    for (int spin = 0; atomic_load(&pool->undone) > 0; spin++) relax(spin);
    pthread_mutex_unlock(&pool->turn);
}

gemma3_pool *gemma3_pool_new(int n_threads, gemma3_error *err)
{
    size_t room = n_threads > 0 ? n_threads : 1;
    gemma3_pool *pool = malloc(sizeof *pool + room * sizeof *pool->thread);
    if (!pool) return fail(err, "out of memory for %d threads", n_threads), NULL;
    *pool = (gemma3_pool){.turn = PTHREAD_MUTEX_INITIALIZER, .mutex = PTHREAD_MUTEX_INITIALIZER,
                          .wake = PTHREAD_COND_INITIALIZER};
    for (pool->n_threads = 1; pool->n_threads < n_threads; pool->n_threads++) {
        if (!pthread_create(&pool->thread[pool->n_threads], NULL, worker_main, pool)) continue;
        fail(err, "thread %d of %d cannot be started", pool->n_threads + 1, n_threads);
        return gemma3_pool_free(pool), NULL;
    }
    return pool;
}

void gemma3_pool_free(gemma3_pool *pool)
{
    if (!pool) return;
    atomic_store(&pool->stop, 1);
    offer(pool, 0);
    for (int k = 1; k < pool->n_threads; k++) pthread_join(pool->thread[k], NULL);
    pthread_cond_destroy(&pool->wake);
    pthread_mutex_destroy(&pool->mutex);
    pthread_mutex_destroy(&pool->turn);
    free(pool);
}
#else
static void host_give_back(const gemma3_model *m, const uint8_t *begin, size_t n)
{
    (void)m, (void)begin, (void)n;
}
static void host_use_large_pages(uint8_t *begin, size_t n) { (void)begin, (void)n; }
static void host_unmap(const gemma3_model *m) { (void)m; }
#endif /* GEMMA3_NO_FILE */

#ifndef GEMMA3_NO_MAIN

/* ==== 16. The command line ======================================================================
 *
 * From here on only gemma3.h and C11 are used: this is the worked example of the library, and
 * whoever wants the library alone defines GEMMA3_NO_MAIN. Text and results go to stdout, the
 * rest to stderr. Whatever fails says why in one sentence and ends the program: exit code 1, or 2
 * when the command line was wrong. So no function here returns an error, and what is allocated is
 * given back only at the end of a job that was done. */

#include "gemma3.h"

#include <errno.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_PATH_BYTES = 4096, MAX_TEXT_BYTES = 1 << 29, MAX_STOPS = 32, MAX_STOP_BYTES = 1000 };

/* Set by Ctrl-C while an answer is written: a second one ends the program. A signal handler can be
 * given nothing, so this is the one variable of the program that does not live in a struct. */
static volatile sig_atomic_t interrupted;
static void note_interrupt(int number) { interrupted = 1, signal(number, SIG_DFL); }

/* Text from anywhere, a file's names too: whole characters, and none that a terminal obeys
 * (U+0000-1F, 7F-9F), or a model could clear the screen, or type. */
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

enum { NOTE, FAILED, WRONG }; /* what a sentence means; the last two end the program */

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

/* Of a file. Who reads from a pipe and goes away has what he wanted: nothing is said then. errno
 * may be 0, as C11's streams need not set it. */
static void check(int ok, const char *name)
{
    if (ok) return;
    if (errno == EPIPE) exit(FAILED);
    say(FAILED, "%s: %s", name, strerror(errno ? errno : EIO));
}

/* Before the program may say that it has printed something: a full disk shows only now. */
static void flush(FILE *f) { check(!fflush(f) && !ferror(f), "standard output"); }

static void *allocate(void *old, size_t n_bytes, const char *what)
{
    void *p = realloc(old, n_bytes);
    if (!p) say(FAILED, "out of memory: %s needs %zu bytes", what, n_bytes);
    return p;
}

/* ---- Command line: the options ---- */

/* The help is the table of options too: two spaces, name, space, value; [ ] may be left out. */
static const char *const help[] = {
    "usage: gemma3 [-m MODEL] -p TEXT | -f FILE | --ids FILE | -i  [options]",
    "For a model and a sequence of ids, mode (--exact or not) and --kv give one bit pattern of",
    "logits, on every machine and with every other option.\n\nWhat to read:",
    "  -m MODEL             a Gemma 3 GGUF; default: the small one in weights/",
    "  -p TEXT              continue TEXT, as it stands, after <bos>",
    "  -f FILE              continue the text in FILE; - is stdin",
    "  --ids FILE           continue the ids in FILE as they are; - is stdin",
    "  -i                   chat; \\ at a line's end: it goes on; Ctrl-C stops, /clear, /quit",
    "  --system TEXT        put before the first turn of a chat",
    "  --state FILE         keep what the prompt, or --system, computes for the next time",
    "  --special            control tokens are read and printed as their text",
    "  --no-bos             no <bos> before the text\n\nWhat to write:",
    "  -n N                 tokens to generate; default: until a stop token or a full context",
    "  --temp T             temperature; 0: always the likeliest; default 1",
    "  --top-k K            choose among the K likeliest; 0: all; default 64",
    "  --top-p P            among the likeliest with this probability together; default 0.95",
    "  --min-p P            among those with P times the largest probability; default 0",
    "  --repeat-penalty R   against repeating any of the last 64 tokens; default 1: none",
    "  --seed S             a seed gives the same text everywhere; default 42",
    "  --stop TEXT          end before TEXT; may be given several times",
    "  --out-ids            print the ids generated, without the stop token, not their text",
    "\nNumbers instead of text (nothing is generated unless -n is given):",
    "  --logits FILE        float32, little-endian, [positions][n_vocab]; - is stdout",
    "  --positions LIST     which rows, ascending, as 0,5,-1 (the last); default: all",
    "  --hash               contract, mode, type of the cache, SHA-256 of those same logits",
    "  --tokenize [TEXT]    ids of TEXT, or of the text of -f",
    "  --detokenize IDS     bytes of the ids, as \"2 818 5279\"\n\nHow to compute:",
    "  -c N                 context in tokens; default: the model's, at most 4096",
    "  -t N                 threads; default: physical cores",
    "  -b N                 tokens of the prompt taken at once; default, and at most, 64",
    "  --exact              weights and activations in float32",
    "  --kv f16|f32         numbers in the cache; default f16, with --exact f32",
    "  --isa NAME           force kernels; list: those that this CPU can run",
    "  --no-repack          weights where they lie in the file: opens faster, runs slower",
    "  --obey-file          also where its keys contradict what the model is\n\nAbout:",
    "  --info               the model's hyperparameters, and memory in bytes",
    "  --version            of the program and of the numeric contract",
    "  --help               this text\n",
    "Scores and tensors inside: make conform, then test/conform.",
    "Exit: 0, 1 when the job failed, 2 when the command line was wrong.", NULL,
};

struct session {
    const char *value[sizeof help / sizeof *help]; /* of the option in that line of help, or NULL */
    const char *stop[MAX_STOPS + 1], *mode, *kv;
    int n_predict;           /* tokens to generate; -1: until a stop token or a full context */
    int special, chats, prints_ids; /* GEMMA3_SPECIAL or 0; -i; --out-ids */
    gemma3_model *model;
    const gemma3_config *config;
    const gemma3_tokenizer *tokenizer;
    gemma3_params params;
    gemma3_state *state;
    gemma3_sampler sampler;
    gemma3_error err;        /* of the last call that failed */
    size_t n_vocab;
    gemma3_candidate *candidates; /* [n_vocab] */
    float *logits;           /* [GEMMA3_MAX_UBATCH][n_vocab] */
    int32_t *ids;            /* [n_ids] the prompt */
    char *wanted;            /* [n_ids] 1: a row for --logits and --hash; or NULL */
    gemma3_sha256 sha256;    /* of those rows */
    int n_ids, n_read, n_written; /* of the prompt; tokens so far, for the speed */
    double read_seconds, write_seconds;
    int fault;               /* first position whose logits are not numbers, or -1 */
    FILE *out, *file;        /* of text; of --logits or --state, by another name */
    char path[MAX_PATH_BYTES], part[MAX_PATH_BYTES + 24]; /* until it is whole */
    gemma3_utf8 utf8;        /* text on its way out: whole characters, and nothing of what may */
    char held[MAX_STOP_BYTES + 1]; /* begin a --stop text */
    size_t n_held;
    int stopped;             /* a --stop text came */
};

/* The line of help that has this option; 0, which has none, when there is no such option. */
static int find_option(const char *name, size_t n)
{
    for (int i = 0; help[i] && *name == '-' && n > 1; i++)
        if (strcspn(help[i] + 2, " ") == n && strncmp(help[i] + 2, name, n) == 0) return i;
    return 0;
}

/* The value given to an option, the last one, "" for a flag; NULL: it was not given. */
static const char *option(const struct session *s, const char *name)
{
    return s->value[find_option(name, strlen(name))];
}

/* Takes all arguments, "--seed 7" or "--seed=7", before any is obeyed: a mistake at the end of a
 * line is found before minutes of work. A value may begin with -, as in --positions -1; only where
 * it may lack the next argument is an option instead. */
static void read_arguments(struct session *s, char **args)
{
    static const char *const moved[] = {"--nll", "--perplexity", "--top", "--trace", "--trace-dir"};
    for (int n_stops = 0; *args;) {
        const char *arg = *args++, *value = "";
        size_t n = strncmp(arg, "--", 2) == 0 ? strcspn(arg, "=") : strlen(arg);
        int i = find_option(arg, n);
        for (int k = 0; !i && k < 5; k++)
            if (strcmp(arg, moved[k]) == 0)
                say(WRONG, "%s is now `test/conform %.*s` (make conform)", arg,
                    (int)strcspn(arg + 2, "-"), arg + 2);
        if (!i) say(WRONG, *arg == '-' ? "unknown option %s" : "unexpected argument \"%s\"", arg);
        const char *what = help[i] + n + 3; /* " " of a flag, "VALUE", "[VALUE]" */
        if (arg[n] == '=' && *what == ' ') say(WRONG, "%.*s takes no value", (int)n, arg);
        if (arg[n] == '=') value = arg + n + 1;
        else if (*what != ' ' && *args && (*what != '[' || **args != '-')) value = *args++;
        else if (*what != ' ' && *what != '[')
            say(WRONG, "%s needs a value: %.*s", arg, (int)strcspn(what, " "), what);
        s->value[i] = value;
        if (i != find_option("--stop", 6)) continue; /* the one that may come several times */
        if (n_stops == MAX_STOPS) say(WRONG, "--stop: %d of them are possible", MAX_STOPS);
        if (!*value || strlen(value) > MAX_STOP_BYTES)
            say(WRONG, "--stop: expected a text of 1 to %d bytes", MAX_STOP_BYTES);
        s->stop[n_stops++] = value;
    }
}

/* An option's number; x when it is not given. */
static double number(const struct session *s, const char *name, int is_whole, double least,
                     double most, double x)
{
    const char *text = option(s, name);
    char rest;
    if (text && (sscanf(text, "%lf%c", &x, &rest) != 1 || !(x >= least && x <= most) ||
                 (is_whole && text[strspn(text, "0123456789")])))
        say(WRONG, "%s %s: expected a %s from %.10g to %.10g", name, text,
            is_whole ? "whole number" : "number", least, most);
    return x;
}

/* What can be wrong before a model is opened, which may take seconds: one thing to do, and nothing
 * without effect, because who gives an option expects one. */
static void read_options(struct session *s)
{
    const char *seed = option(s, "--seed"), *tokenize = option(s, "--tokenize");
    int numbers = option(s, "--logits") || option(s, "--hash"), file = !!option(s, "-f");
    int prompts = file + !!option(s, "-p") + !!option(s, "--ids"), exact = !!option(s, "--exact");
    int n_jobs = prompts + !!option(s, "-i") + (tokenize && (*tokenize || !file)) +
                 !!option(s, "--detokenize") + !!option(s, "--info");
    char *end = "";
    if (n_jobs != 1)
        say(WRONG, n_jobs ? "contradictory: one of -p, -f, --ids, -i, --tokenize TEXT, "
            "--detokenize and --info, not several" : "nothing to do: give a prompt with -p TEXT, "
            "-f FILE (- is stdin) or --ids FILE, or chat with -i");
    if (numbers && (!prompts || tokenize)) say(WRONG, "--logits and --hash need -p, -f or --ids");
    if (!numbers && option(s, "--positions")) say(WRONG, "--positions needs --logits or --hash");
    if (!option(s, "-i") && option(s, "--system")) say(WRONG, "--system needs -i");
    if (numbers && option(s, "--state")) say(WRONG, "--state is not for --logits and --hash");
    s->special = option(s, "--special") ? GEMMA3_SPECIAL : 0;
    s->prints_ids = option(s, "--out-ids") != NULL;
    s->chats = option(s, "-i") != NULL;
    s->mode = exact ? "exact" : "default";
    s->kv = option(s, "--kv") ? option(s, "--kv") : exact ? "f32" : "f16";
    if (strcmp(s->kv, "f16") != 0 && strcmp(s->kv, "f32") != 0)
        say(WRONG, "--kv %s: expected f16 or f32", s->kv);
    s->params.kv_type = s->kv[1] == '3' ? GEMMA3_KV_F32 : GEMMA3_KV_F16;
    s->params.n_ctx = (int)number(s, "-c", 1, 1, 1 << 24, 0);
    s->params.n_batch = (int)fmin(GEMMA3_MAX_UBATCH, number(s, "-b", 1, 1, INT_MAX, 64));
    s->params.n_threads = (int)number(s, "-t", 1, 1, GEMMA3_MAX_THREADS,
                                    gemma3_default_threads());
    s->n_predict = (int)number(s, "-n", 1, 0, INT_MAX, -1);
    errno = 0;
    s->sampler = gemma3_sampler_new(seed ? strtoull(seed, &end, 10) : 42);
    if (*end || errno || (seed && (*seed < '0' || *seed > '9'))) /* strtoull takes " -1" too */
        say(WRONG, "--seed %s: expected a whole number from 0 to 2^64-1", seed);
    s->sampler.temperature = (float)number(s, "--temp", 0, 0, 1e6, 1);
    s->sampler.top_k = (int)number(s, "--top-k", 1, 0, INT_MAX, 64);
    s->sampler.top_p = (float)number(s, "--top-p", 0, 0, 1, 0.95);
    s->sampler.min_p = (float)number(s, "--min-p", 0, 0, 1, 0);
    s->sampler.repeat_penalty = (float)number(s, "--repeat-penalty", 0, 1e-6, 1e6, 1);
}

/* The model that comes with the program lies in weights/ beside it, or where we are. */
static const char *find_model(const char *program, char path[MAX_PATH_BYTES])
{
    static const char model[] = "weights/gemma3-folktales-q4_0.gguf";
    size_t n = gemma3_real_path(program, path, MAX_PATH_BYTES) ? 0 : strlen(path);
    while (n > 0 && path[n - 1] != '/' && path[n - 1] != '\\') n--;
    snprintf(path + n, MAX_PATH_BYTES - n, "%s", model);
    if (gemma3_file_size(path) < 0) strcpy(path, model);
    if (gemma3_file_size(path) < 0) say(WRONG, "no model: give -m MODEL.gguf");
    return path;
}

static void open_model(struct session *s, const char *path, int computes)
{
    gemma3_params *p = &s->params;
    const char *note;
    p->parallel_for = gemma3_pool_run;
    p->pool = gemma3_pool_new(p->n_threads, &s->err);
    if (!p->pool) say(FAILED, "%s", s->err.text);
    gemma3_options o = {
        .exact = option(s, "--exact") != NULL, .no_repack = !computes || option(s, "--no-repack"),
        .isa = option(s, "--isa"), .obey_file = option(s, "--obey-file") != NULL,
        .n_threads = p->n_threads, .parallel_for = p->parallel_for, .pool = p->pool,
    };
    s->model = gemma3_open(path, &o, &s->err);
    if (!s->model) say(FAILED, "%s", s->err.text);
    for (int i = 0; (note = gemma3_model_note(s->model, i)) != NULL; i++) say(NOTE, "%s", note);
    s->config = gemma3_model_config(s->model);
    s->n_vocab = (size_t)s->config->n_vocab;
    s->tokenizer = gemma3_model_tokenizer(s->model);
    if (!p->n_ctx) p->n_ctx = gemma3_default_params(s->model).n_ctx;
    if (!computes) return;
    /* Systems promise more memory than they have, and end whoever uses it: so it is asked first. */
    size_t need = gemma3_state_size(s->model, p), limit = gemma3_memory_limit();
    size_t weights = o.no_repack ? 0 : gemma3_model_info(s->model)->weight_bytes;
    if (limit && (need > limit || weights > limit - need))
        say(FAILED, "out of memory: -c %d needs %zu MB beside %zu MB of weights, and this process "
            "may use %zu MB", p->n_ctx, need >> 20, weights >> 20, limit >> 20);
    if (p->n_ctx > s->config->n_ctx_train)
        say(NOTE, "-c %d goes beyond the %d tokens the model was trained on (RoPE factor %g): what "
            "it writes after them may make no sense", p->n_ctx, s->config->n_ctx_train,
            (double)s->config->rope_factor);
    s->state = gemma3_state_new(s->model, p, &s->err);
    if (!s->state) say(FAILED, "%s", s->err.text);
    s->logits = allocate(NULL, s->n_vocab * GEMMA3_MAX_UBATCH * sizeof *s->logits, "the logits");
    s->candidates = allocate(NULL, s->n_vocab * sizeof *s->candidates, "sampling");
}

/* All bytes of a file, "-" being stdin, and a NUL after them; allocated. What is too long is
 * refused before it is read, where that can be known: not of pipes. */
static char *read_file(const char *path, size_t *n)
{
    FILE *f = strcmp(path, "-") == 0 ? stdin : gemma3_fopen(path, "rb");
    check(f != NULL, path);
    long long size = f == stdin ? 0 : gemma3_file_size(path);
    char *bytes = NULL;
    for (size_t room = *n = 0; *n == room;) {
        if (size > MAX_TEXT_BYTES)
            say(FAILED, "%s: %lld bytes, expected at most %d", path, size, MAX_TEXT_BYTES);
        bytes = allocate(bytes, (room = 2 * room + 65536) + 1, path);
        *n += fread(bytes + *n, 1, room - *n, f);
        check(!ferror(f), path);
        if (*n > MAX_TEXT_BYTES)
            say(FAILED, "%s: more than %d bytes, which is too long", path, MAX_TEXT_BYTES);
    }
    if (f != stdin) fclose(f);
    bytes[*n] = 0;
    return bytes;
}

/* Takes the next number of a list. 0: that was all; -1: there is something else. */
static int next_number(const char **list, int *x)
{
    static const char between[] = ", \t\r\n\v\f";
    char *end;
    *list += strspn(*list, between);
    if (**list == 0) return 0;
    long long number = strtoll(*list, &end, 10);
    if (end == *list || (*end && !strchr(between, *end)) || number != (int32_t)number) return -1;
    *list = end;
    *x = (int)number;
    return 1;
}

/* The ids spelled in n bytes of text: two bytes each at least, as something parts them. Editors of
 * Windows begin a file with a byte-order mark; a zero byte would end the text unseen. */
static void parse_ids(struct session *s, const char *text, size_t n, const char *where)
{
    const char *left = text + (strncmp(text, "\xEF\xBB\xBF", 3) ? 0 : 3);
    int id, found, last = s->config->n_vocab - 1;
    s->ids = allocate(NULL, (n / 2 + 1) * sizeof *s->ids, where);
    while ((found = next_number(&left, &id)) > 0) {
        if (id < 0 || id > last)
            say(FAILED, "%s: id %d is outside the vocabulary, 0 to %d", where, id, last);
        s->ids[s->n_ids++] = id;
    }
    if (found < 0 || left < text + n)
        say(FAILED, "%s: expected ids separated by spaces or line ends, found \"%.20s\"", where,
            found ? left : "a zero byte");
}

/* Fills s->ids with what is to be continued or shown. */
static void read_prompt(struct session *s)
{
    const char *text = option(s, "-p"), *list = option(s, "--detokenize");
    const char *ids = option(s, "--ids"), *path = ids ? ids : option(s, "-f");
    int flags = s->special | (option(s, "--no-bos") ? 0 : GEMMA3_BOS);
    if (!text) text = list ? list : option(s, "--tokenize");
    size_t n = path ? 0 : strlen(text);
    char *bytes = path ? read_file(path, &n) : NULL;
    if (bytes) text = bytes;
    if (ids || list) {
        parse_ids(s, text, n, ids ? ids : "--detokenize");
    } else {
        if (flags == (GEMMA3_BOS | GEMMA3_SPECIAL) && strncmp(text, "<bos>", 5) == 0) {
            say(NOTE, "the text begins with <bos>: no other is put before it");
            flags = GEMMA3_SPECIAL;
        }
        s->ids = allocate(NULL, (n + 1) * sizeof *s->ids, "the text's ids");
        s->n_ids = gemma3_encode(s->tokenizer, text, n, flags, s->ids, (int)n + 1);
        if (s->n_ids < 0)
            say(FAILED, "out of memory: encoding needs %zu bytes", gemma3_encode_work(n));
    }
    free(bytes);
}

/* --positions, or all. They must ascend: rows are written as they are computed, and in another
 * order than was asked for they would be a trap. */
static void choose_rows(struct session *s)
{
    const char *list = option(s, "--positions"), *left = list;
    int x, found = 0, last = -1;
    s->wanted = allocate(NULL, (size_t)s->n_ids, "--positions");
    memset(s->wanted, !list, (size_t)s->n_ids);
    while (list && (found = next_number(&left, &x)) > 0) {
        int position = x < 0 ? x + s->n_ids : x;
        if (position < 0 || position >= s->n_ids)
            say(FAILED, "--positions %d: the prompt has %d tokens", x, s->n_ids);
        if (position <= last)
            say(FAILED, "--positions: expected them to ascend, found %d after %d", position, last);
        s->wanted[last = position] = 1;
    }
    if (found < 0 || (list && last < 0))
        say(WRONG, "--positions \"%s\": expected whole numbers separated by commas or spaces",
            list);
}

/* Opens s->file under another name than path until it is whole, so that a job that fails leaves
 * what was there; a pipe or a device cannot be replaced, and is written to. The name is the real
 * one, or a link would be replaced instead of what it leads to; one that leads nowhere is. */
static void open_out(struct session *s, const char *path)
{
    char magic[4] = "";
    long long size = gemma3_file_size(path);
    if (!*path) say(FAILED, "the name of a file to write is empty");
    FILE *old = size >= 0 ? gemma3_fopen(path, "r+b") : NULL; /* what may not be written stays */
    check(!old || fread(magic, 1, 4, old) == 4 || !ferror(old), path);
    if (memcmp(magic, "GGUF", 4) == 0)
        say(FAILED, "%s: this is a model, which would be overwritten", path);
    if (old) fclose(old);
    check(!gemma3_real_path(path, s->path, sizeof s->path), path);
    snprintf(s->part, sizeof s->part, size == -2 ? "%s" : "%s.%llx.part", s->path,
             (unsigned long long)(gemma3_seconds() * 1e9)); /* another run's has another name */
    s->file = size < 0 || old ? gemma3_fopen(s->part, "wb") : NULL;
    check(s->file != NULL, path);
}

/* Flushes at once, or an error would show only after minutes of work. Is a gemma3_write. */
static int write_out(void *session, const void *bytes, size_t n)
{
    struct session *s = session;
    int ok = fwrite(bytes, 1, n, s->file) == n && fflush(s->file) == 0;
    if (!ok && strcmp(s->part, s->path) != 0) gemma3_remove(s->part);
    check(ok, s->file == stdout ? "standard output" : s->path);
    return 0;
}

static void close_out(struct session *s)
{
    if (s->file == stdout) return;
    int ok = !fclose(s->file) && !gemma3_rename(s->part, s->path);
    if (!ok && strcmp(s->part, s->path) != 0) gemma3_remove(s->part);
    check(ok, s->path);
}

/* ---- Command line: tokens in, tokens out ---- */

static int are_numbers(const float *x, size_t n)
{
    int all = 1;
    for (size_t i = 0; i < n; i++) all &= !!isfinite(x[i]);
    return all;
}

/* A row for --logits and --hash: float32 as little-endian bytes on any machine. */
static void write_row(struct session *s, const float *row)
{
    unsigned char *bytes = (unsigned char *)s->candidates; /* idle meanwhile, and large enough */
    for (size_t i = 0; i < 4 * s->n_vocab; i++) {
        uint32_t bits;
        memcpy(&bits, &row[i / 4], 4);
        bytes[i] = (unsigned char)(bits >> i % 4 * 8);
    }
    gemma3_sha256_add(&s->sha256, bytes, 4 * s->n_vocab);
    if (s->file) write_out(s, bytes, 4 * s->n_vocab);
}

/* Every token goes through here: into the cache, and into what the repeat penalty remembers. Logits
 * that are not numbers are remembered, not told: a hash or a file of them is what was asked for. */
static void forward(struct session *s, const int32_t *ids, int n, const int *rows, int n_rows)
{
    int pos = gemma3_state_pos(s->state);
    if (gemma3_forward(s->state, ids, n, rows, n_rows, s->logits))
        say(FAILED, "%s", gemma3_state_error(s->state));
    for (int i = 0; i < n; i++) gemma3_sampler_accept(&s->sampler, ids[i]);
    for (int r = 0; r < n_rows; r++) {
        const float *row = s->logits + (size_t)r * s->n_vocab;
        if (s->fault < 0 && !are_numbers(row, s->n_vocab)) s->fault = pos + rows[r];
        if (s->wanted && pos < s->n_ids && s->wanted[pos + rows[r]]) write_row(s, row);
    }
}

/* Takes tokens through the model, in pieces for which s->logits has room: rows are cheaper
 * together, but 262,144 logits for every token of a long prompt would be gigabytes. s->logits is
 * then the last one's row, from which write_tokens goes on. */
static void read_tokens(struct session *s, const int32_t *ids, int n)
{
    double start = gemma3_seconds();
    for (int i = 0, count; i < n; i += count) {
        int rows[GEMMA3_MAX_UBATCH], n_rows = 0;
        for (count = 0; count < GEMMA3_MAX_UBATCH && i + count < n; count++)
            if ((s->wanted && s->wanted[i + count]) || i + count + 1 == n) rows[n_rows++] = count;
        forward(s, ids + i, count, rows, n_rows);
        const float *last = s->logits + (size_t)(n_rows - 1) * s->n_vocab;
        if (n_rows > 1) memcpy(s->logits, last, 4 * s->n_vocab);
    }
    s->n_read += n;
    s->read_seconds += gemma3_seconds() - start;
}

/* A state is read from front to end, so nothing is sought: pipes will do. */
static int read_next(void *file, uint64_t offset, void *buffer, size_t n)
{
    (void)offset;
    return fread(buffer, 1, n, file) == n ? 0 : -1;
}

/* --state: the first n tokens are read from the file, as far as it has them, or computed and
 * kept there. Returns how many are in the state. A file of other tokens that fit the context is
 * no mistake: it is of another prompt, and overwritten. What the repeat penalty remembers is no
 * part of a state. */
static int keep_tokens(struct session *s, const int32_t *ids, int n)
{
    const char *path = n > 0 ? option(s, "--state") : NULL;
    if (!path) return 0;
    FILE *f = gemma3_fopen(path, "rb");
    if (f && gemma3_state_load(s->state, read_next, f, &s->err))
        say(FAILED, "%s: %s", path, s->err.text);
    if (f) fclose(f);
    const int32_t *kept = gemma3_state_ids(s->state);
    int n_kept = gemma3_state_pos(s->state);
    if (n_kept > 0 && n_kept <= n && memcmp(kept, ids, (size_t)n_kept * sizeof *ids) == 0) {
        for (int i = 0; i < n_kept; i++) gemma3_sampler_accept(&s->sampler, ids[i]);
        return n_kept;
    }
    gemma3_state_reset(s->state);
    read_tokens(s, ids, n);
    open_out(s, path);
    if (gemma3_state_save(s->state, write_out, s, &s->err))
        say(FAILED, "%s: %s", path, s->err.text);
    close_out(s);
    return n;
}

/* Whole characters, but for those at the end that may begin a stop text: they are held back until
 * they do, or do not. Of stop texts that end together the longest counts. */
static void print_text(struct session *s, const char *text, int n_bytes)
{
    for (int i = 0; i < n_bytes && !s->stopped; i++) {
        s->held[s->n_held++] = text[i];
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
}

/* 0: the token ends the text: a stop token, or one without text that a --stop text spells. Each is
 * flushed, because somebody reads as it comes. */
static int print_token(struct session *s, int32_t id, int is_first)
{
    char piece[GEMMA3_PIECE_MAX], c[8];
    int n = gemma3_decode(s->tokenizer, id, s->special, piece);
    if (gemma3_is_stop(s->tokenizer, id)) return 0;
    for (const char **stop = s->stop; n == 0 && *stop; stop++)
        if (gemma3_find(s->tokenizer, *stop, strlen(*stop)) == id) return 0;
    for (int i = 0; i < n; i++)
        print_text(s, c, gemma3_utf8_push(&s->utf8, (unsigned char)piece[i], c));
    if (s->prints_ids && !s->stopped) fprintf(s->out, is_first ? "%d" : " %d", (int)id);
    flush(s->out);
    return 1;
}

/* Token after token: chosen, printed, taken in. In a chat the last one too: it goes on after it. */
static void write_tokens(struct session *s)
{
    double start = gemma3_seconds();
    char c[8];
    int row = 0, is_last = s->n_predict == 0, is_full = 0;
    s->n_held = 0, s->stopped = 0;
    for (int i = 1; !is_last && !is_full && !interrupted && s->fault < 0; i++) {
        int32_t id = gemma3_sample(&s->sampler, s->logits, (int)s->n_vocab, s->candidates);
        if (!print_token(s, id, i == 1)) break;
        s->n_written++;
        is_last = i == s->n_predict || s->stopped;
        is_full = gemma3_state_pos(s->state) == s->params.n_ctx;
        if (!is_full && (!is_last || s->chats)) forward(s, &id, 1, &row, !is_last);
    }
    s->write_seconds += gemma3_seconds() - start;
    print_text(s, c, gemma3_utf8_end(&s->utf8, c));
    if (!s->prints_ids && !s->stopped) fwrite(s->held, 1, s->n_held, s->out); /* text after all */
    if (s->prints_ids || s->chats || gemma3_is_terminal(stdout)) fputc('\n', s->out);
    flush(s->out);
    if (is_full && !is_last)
        say(NOTE, "the context of %d tokens is full%s", s->params.n_ctx,
            s->chats ? "; /clear starts again, -c gives more" : "");
}

/* ---- Command line: the jobs ---- */

/* -p, -f, --ids */
static void continue_prompt(struct session *s)
{
    const char *logits = option(s, "--logits"), *hash = option(s, "--hash");
    char hex[65];
    if (s->n_ids == 0) say(FAILED, "the prompt has no tokens");
    if (s->n_ids > s->params.n_ctx)
        say(FAILED, "the prompt has %d tokens and the context room for %d: give -c %d or more",
            s->n_ids, s->params.n_ctx, s->n_ids);
    if (logits || hash) choose_rows(s);
    if (logits && strcmp(logits, "-") == 0) s->file = stdout, s->out = stderr;
    else if (logits) open_out(s, logits);
    gemma3_sha256_init(&s->sha256);
    int n_kept = keep_tokens(s, s->ids, s->n_ids - 1); /* the last one's logits are not kept */
    read_tokens(s, s->ids + n_kept, s->n_ids - n_kept);
    gemma3_sha256_end(&s->sha256, hex);
    if (logits) close_out(s);
    if (hash)
        fprintf(s->out, "contract %d mode %s kv %s sha256 %s\n", GEMMA3_CONTRACT, s->mode, s->kv,
                hex);
    if (s->n_predict > 0 || (s->n_predict < 0 && !logits && !hash)) write_tokens(s);
}

/* Memory is said for the -c, -b, -t and --kv that are given: what would fit is tried here. */
static void print_info(const struct session *s)
{
    const gemma3_config *c = s->config;
    const gemma3_info *info = gemma3_model_info(s->model);
    const gemma3_params *p = &s->params;
    size_t n_kv = gemma3_kv_bytes(c, p), n_scratch = gemma3_state_size(s->model, p) - n_kv;
    const struct { const char *name, *key; double value; } fields[] = { /* keys that may lack */
        {"n_layers", "", c->n_layers}, {"d_model", "", c->d_model}, {"d_ff", "", c->d_ff},
        {"n_heads", "", c->n_heads}, {"n_kv_heads", "", c->n_kv_heads},
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
    print_safe(stdout, info->name);
    printf("\nchat template          %s\ncontract               %d\nmode                   %s\n"
           "isa                    %s\n", info->chat_template ? "yes" : "no", GEMMA3_CONTRACT,
           s->mode, info->isa);
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
        const char *origin = gemma3_model_origin(s->model, fields[i].key);
        printf("%-22s %.9g", fields[i].name, fields[i].value);
        printf(*origin ? " (%s)\n" : "\n", origin);
    }
    printf("global layers         ");
    for (int l = 0; l < c->n_layers; l++)
        if (!c->is_local[l]) printf(" %d", l);
    printf("\nweights                %zu bytes, %zu read for each token generated\n"
           "KV cache               %zu bytes for -c %d in %s\n"
           "scratch and tables     %zu bytes for -c %d -b %d -t %d\n",
           info->weight_bytes, info->token_bytes, n_kv, p->n_ctx, s->kv, n_scratch, p->n_ctx,
           p->n_batch, p->n_threads);
}

/* One turn and its answer. 0: it does not fit, and nothing happened. */
static int answer(struct session *s, const char *text)
{
    const char *system = option(s, "--system");
    int pos = gemma3_state_pos(s->state), left = s->params.n_ctx - pos, n_same = 0;
    size_t room = strlen(text) + (system ? strlen(system) : 0) + 32;
    int32_t *ids = s->ids = allocate(s->ids, 2 * room * sizeof *ids, "the turn");
    int32_t *bare = ids + room;
    int n = room > MAX_TEXT_BYTES ? -2 :
            gemma3_encode_turn(s->tokenizer, system, text, pos == 0, ids, (int)room);
    if (n == -2) say(FAILED, "out of memory: encoding needs %zu bytes", gemma3_encode_work(room));
    if (n < 0) say(FAILED, "the vocabulary has no <start_of_turn> and <end_of_turn>: no chat");
    if (n > left) {
        say(NOTE, "the context of %d tokens is full: this turn needs %d and %d are left; /clear "
            "starts again, -c gives more", s->params.n_ctx, n, left);
        return 0;
    }
    /* --state keeps what does not depend on the text: the tokens that an empty one begins with. */
    int n_bare = pos == 0 ? gemma3_encode_turn(s->tokenizer, system, "", 1, bare, (int)room) : 0;
    if (n_bare >= n) n_bare = n - 1; /* no logits are kept: the last token is always computed */
    while (n_same < n_bare && bare[n_same] == ids[n_same]) n_same++;
    int n_kept = keep_tokens(s, ids, n_same);
    /* Elsewhere Ctrl-C ends the program, as it ends any other. */
    interrupted = 0;
    signal(SIGINT, note_interrupt);
    read_tokens(s, ids + n_kept, n - n_kept);
    write_tokens(s);
    signal(SIGINT, SIG_DFL);
    /* Whatever ended the answer, the model finds it closed when the next turn comes. */
    ids[0] = gemma3_find(s->tokenizer, "<end_of_turn>", 13);
    if (gemma3_state_pos(s->state) < s->params.n_ctx) forward(s, ids, 1, NULL, 0);
    return 1;
}

/* A line of the user's, allocated; one that ends in \ goes on in the next. NULL: that was all. The
 * prompt goes to stderr, so that stdout has the answers alone. */
static char *read_line(void)
{
    size_t n = 0, room = 256;
    char *line = allocate(NULL, room, "the line");
    gemma3_typed typed = {.n = 0};
    int c;
    if (gemma3_is_terminal(stdin)) fputs("> ", stderr);
    while ((c = gemma3_typed_byte(&typed)) != EOF) {
        if (n + 1 == room) line = allocate(line, room *= 2, "the line");
        if (!c) say(FAILED, "standard input: a zero byte in a line");
        line[n++] = (char)c;
        if (c != '\n') continue;
        n -= n > 1 && line[n - 2] == '\r' ? 2 : 1;
        if (n == 0 || line[n - 1] != '\\') break;
        line[n - 1] = '\n';
    }
    check(!ferror(stdin), "standard input");
    line[n] = 0;
    if (n || c == '\n') return line;
    return free(line), NULL;
}

/* Turns are Gemma's whatever the file's template says: that is a program in a language which is not
 * spoken here. What its words show is said. A full context ends the chat, unless somebody is there
 * to type /clear. */
static void chat(struct session *s)
{
    const char *const words[] = {"<start_of_turn>", "source_lang_code", "developer", "tools"};
    const char *template = gemma3_model_info(s->model)->chat_template;
    size_t n = gemma3_model_info(s->model)->n_chat_template, at;
    char *line;
    if (!template)
        say(NOTE, "no chat template in the file: this may be a base model, not trained to chat");
    for (int i = 0; template && i < 4; i++) {
        size_t n_word = strlen(words[i]);
        for (at = 0; at + n_word <= n && memcmp(template + at, words[i], n_word) != 0;) at++;
        if ((at + n_word <= n) != (i == 0)) /* it has no turns, or wants what they have not */
            say(NOTE, "the file's chat template %s %s: turns here are Gemma's, without more",
                i == 0 ? "has no" : "asks for", words[i]);
    }
    for (int goes_on = 1; goes_on && s->fault < 0 && (line = read_line()); free(line)) {
        if (strcmp(line, "/quit") == 0) goes_on = 0;
        else if (strcmp(line, "/clear") == 0) gemma3_state_reset(s->state), s->sampler.n_last = 0;
        else if (line[strspn(line, " \t")]) goes_on = answer(s, line) || gemma3_is_terminal(stdin);
    }
}

/* The library calls this with every tensor inside. */
static void find_fault(void *user, const char *name, int layer, int pos, int n, int width, float *x)
{
    char *first = user;
    (void)pos;
    if (*first || are_numbers(x, (size_t)n * (size_t)width)) return;
    snprintf(first, 64, layer < 0 ? "%s" : "%s-%d", name, layer);
}

/* The same tokens again, tensor by tensor: watching them all the time would cost speed. */
static void explain_fault(struct session *s)
{
    char first[64] = "";
    s->params.trace = find_fault, s->params.trace_user = first;
    gemma3_state *again = gemma3_state_new(s->model, &s->params, &s->err);
    if (again)
        gemma3_forward(again, gemma3_state_ids(s->state), s->fault + 1, &s->fault, 1, s->logits);
    say(FAILED, "logits are not numbers at position %d%s%s%s", s->fault,
        gemma3_model_info(s->model)->exact && s->kv[1] == '3' ? "" : ": try --kv f32 or --exact",
        *first ? "; the first tensor that holds what is none is " : "", first);
}

/* Everything that needs a model. */
static void run_job(struct session *s, const char *program)
{
    const char *tokenize = option(s, "--tokenize"), *info = option(s, "--info");
    const char *detokenize = option(s, "--detokenize"), *path = option(s, "-m");
    char piece[GEMMA3_PIECE_MAX], found[MAX_PATH_BYTES];
    read_options(s);
    open_model(s, path ? path : find_model(program, found), !tokenize && !detokenize && !info);
    if (!info && !s->chats) read_prompt(s);
    for (int i = 0, n; i < s->n_ids && (tokenize || detokenize); i++) {
        n = gemma3_decode(s->tokenizer, s->ids[i], s->special, piece);
        if (tokenize) printf(i ? " %d" : "%d", (int)s->ids[i]);
        else fwrite(piece, 1, (size_t)n, stdout);
    }
    if (tokenize || (detokenize && gemma3_is_terminal(stdout))) putchar('\n');
    else if (info) print_info(s);
    else if (s->chats) chat(s);
    else if (!detokenize) continue_prompt(s);
    if (s->fault >= 0) explain_fault(s);
    if (s->write_seconds > 0)
        fprintf(stderr, "prompt %d tokens, %.1f tokens/s; generated %d tokens, %.1f tokens/s\n",
                s->n_read, s->n_read / s->read_seconds, s->n_written,
                s->n_written / s->write_seconds);
    gemma3_state_free(s->state);
    gemma3_close(s->model);
    gemma3_pool_free(s->params.pool);
    free(s->candidates), free(s->logits), free(s->wanted), free(s->ids);
}

int main(int argc, char **argv)
{
    char **args = gemma3_host_start(argv);
    struct session s = {.out = stdout, .fault = -1};
    if (argc > 0) read_arguments(&s, args + 1);
    const char *isa = option(&s, "--isa");
    if (option(&s, "--help"))
        for (int i = 0; help[i]; i++) puts(help[i]);
    else if (option(&s, "--version"))
        printf("gemma3.c %s, numeric contract %d\n", GEMMA3_VERSION, GEMMA3_CONTRACT);
    else if (isa && strcmp(isa, "list") == 0)
        for (int i = 0; gemma3_isa_name(i); i++) puts(gemma3_isa_name(i));
    else run_job(&s, argc > 0 ? args[0] : "");
    flush(stdout);
    return 0;
}

#endif
#endif /* INSTANCE */
