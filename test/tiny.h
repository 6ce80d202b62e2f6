/* tiny.h - valid Gemma 3 files of at most 8 KB, made in memory, for tests that break them and for
 * fuzzers that begin with them: one for each tensor type and one for each optional key.
 *
 *     tiny t = tiny_new(TINY_Q4_0);            one layer, 12 tokens, every required key and tensor
 *     tiny_set_u32(&t, "gemma3.block_count", 2); or any other change
 *     bytes b = tiny_file(&t);                 the file's bytes, the caller's to free
 *     tiny_free(&t);
 *
 * The matrices have the type asked for, but the two whose rows are shorter than a block,
     which are F16
 * like the norms. Weights are a fixed sequence of random numbers.
 */
#ifndef TINY_H
#define TINY_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct bytes {
    unsigned char *p;
    size_t n;
} bytes;

enum { TINY_KEYS = 64, TINY_TENSORS = 64, TINY_LIMIT = 8192 };

/* Types of tensors and of values as GGUF numbers them. */
enum { TINY_F32 = 0, TINY_F16 = 1, TINY_Q4_0 = 2, TINY_Q8_0 = 8, TINY_Q4_K = 12, TINY_Q6_K = 14 };
enum { T_U8, T_I8, T_U16, T_I16, T_U32, T_I32, T_F32, T_BOOL, T_STRING, T_ARRAY, T_U64, T_I64,
       T_F64 };

typedef struct tiny_tensor {
    char name[64];
    uint32_t n_dims, type;
    uint64_t ne[8], offset;
} tiny_tensor;

typedef struct tiny {
    uint32_t version;
    uint64_t alignment;
    int n_keys, n_tensors;
    bytes key[TINY_KEYS];    /* a whole pair: key, type, value */
    tiny_tensor tensor[TINY_TENSORS];
    bytes data;
    uint64_t random;
} tiny;

/* ---- Bytes ----------------------------------------------------------------------------------- */

static inline void put(bytes *b, const void *p, size_t n)
{
    unsigned char *larger = realloc(b->p, b->n + n + 1);
    if (!larger) abort();
    b->p = larger;
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
}

/* The lowest n bytes of x, the lowest first. */
static inline void put_int(bytes *b, uint64_t x, int n)
{
    unsigned char little[8];
    for (int i = 0; i < n; i++, x >>= 8) little[i] = (unsigned char)x;
    put(b, little, (size_t)n);
}

static inline void put_text(bytes *b, const char *text, size_t n)
{
    put_int(b, n, 8);
    put(b, text, n);
}

static inline void put_string(bytes *b, const char *s) { put_text(b, s, strlen(s)); }

static inline void put_float(bytes *b, float x)
{
    uint32_t bits;
    memcpy(&bits, &x, 4);
    put_int(b, bits, 4);
}

/* ---- Keys ------------------------------------------------------------------------------------ */

static inline void tiny_drop(tiny *t, const char *key)
{
    size_t n = strlen(key);
    for (int i = 0; i < t->n_keys; i++) {
        const bytes *k = &t->key[i];
        if (k->n < 8 + n || k->p[0] != n || memcmp(k->p + 8, key, n)) continue;
        free(k->p);
        t->key[i] = t->key[--t->n_keys];
        return;
    }
}

/* A further key, or one again: its bytes up to the value, which the caller puts. */
static inline bytes *tiny_add(tiny *t, const char *key, uint32_t type)
{
    if (t->n_keys == TINY_KEYS) abort();
    bytes *b = &t->key[t->n_keys++];
    *b = (bytes){ NULL, 0 };
    put_string(b, key);
    put_int(b, type, 4);
    return b;
}

static inline bytes *tiny_set(tiny *t, const char *key, uint32_t type)
{
    tiny_drop(t, key);
    return tiny_add(t, key, type);
}

static inline void tiny_set_u32(tiny *t, const char *key, uint32_t x)
{
    put_int(tiny_set(t, key, T_U32), x, 4);
}

static inline void tiny_set_f32(tiny *t, const char *key, float x)
{
    put_float(tiny_set(t, key, T_F32), x);
}

static inline void tiny_set_bool(tiny *t, const char *key, int x)
{
    put_int(tiny_set(t, key, T_BOOL), x != 0, 1);
}

static inline void tiny_set_string(tiny *t, const char *key, const char *x)
{
    put_string(tiny_set(t, key, T_STRING), x);
}

static inline bytes *tiny_set_array(tiny *t, const char *key, uint32_t element, uint64_t n)
{
    bytes *b = tiny_set(t, key, T_ARRAY);
    put_int(b, element, 4);
    put_int(b, n, 8);
    return b;
}

/* ---- Tensors --------------------------------------------------------------------------------- */

/* What a block of a type is: elements, bytes, and where its f16 scales lie (-1: no more). */
static const struct tiny_format {
    uint32_t type;
    const char *name;
    int elements, bytes, scale[2];
} tiny_formats[] = {
    {0, "F32", 1, 4, {-1, -1}},
    {1, "F16", 1, 2, {0, -1}},
    {30, "BF16", 1, 2, {-1, -1}},
    {2, "Q4_0", 32, 18, {0, -1}},
    {3, "Q4_1", 32, 20, {0, 2}},
    {6, "Q5_0", 32, 22, {0, -1}},
    {7, "Q5_1", 32, 24, {0, 2}},
    {8, "Q8_0", 32, 34, {0, -1}},
    {10, "Q2_K", 256, 84, {80, 82}},
    {11, "Q3_K", 256, 110, {108, -1}},
    {12, "Q4_K", 256, 144, {0, 2}},
    {13, "Q5_K", 256, 176, {0, 2}},
    {14, "Q6_K", 256, 210, {208, -1}},
    {20, "IQ4_NL", 32, 18, {0, -1}},
    {23, "IQ4_XS", 256, 136, {0, -1}},
};
enum { TINY_FORMATS = sizeof tiny_formats / sizeof *tiny_formats };

static inline const struct tiny_format *tiny_format_of(uint32_t type)
{
    for (int i = 0; i < TINY_FORMATS; i++)
        if (tiny_formats[i].type == type) return &tiny_formats[i];
    abort();
}

static inline uint32_t tiny_random(tiny *t)
{
    t->random = t->random * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(t->random >> 33);
}

/* One block of random codes with a scale of 1/16 to 1/8, or a random number from 1/2 to 2. */
static inline void tiny_put_block(tiny *t, const struct tiny_format *f)
{
    unsigned char block[210];
    for (int i = 0; i < f->bytes; i++) block[i] = (unsigned char)tiny_random(t);
    uint32_t r = tiny_random(t), sign = (r & 1) << 31;
    uint32_t bits = sign | 0x3f000000 | (r & 0xfffffe);
    if (f->type == 0) for (int i = 0; i < 4; i++) block[i] = (unsigned char)(bits >> 8 * i);
    else if (f->type == 30) block[0] = (unsigned char)(bits >> 16),
        block[1] = (unsigned char)(bits >> 24);
    for (int k = 0; k < 2 && f->scale[k] >= 0; k++) {
        uint32_t half = f->elements == 1
            ? 0x3800 | sign >> 16 | (r >> 8 & 0x3ff) : 0x2c00 | (r >> (8 + 8 * k) & 0x3ff);
        block[f->scale[k]] = (unsigned char)half;
        block[f->scale[k] + 1] = (unsigned char)(half >> 8);
    }
    put(&t->data, block, (size_t)f->bytes);
}

/* A tensor [rows][cols] behind the others. */
static inline tiny_tensor *tiny_add_tensor(tiny *t, const char *name, uint32_t type, int rows,
                                           int cols)
{
    const struct tiny_format *f = tiny_format_of(type);
    if (t->n_tensors == TINY_TENSORS) abort();
    while (t->data.n % t->alignment) put_int(&t->data, 0, 1);
    tiny_tensor *w = &t->tensor[t->n_tensors++];
    *w = (tiny_tensor){ .n_dims = rows == 1 ? 1 : 2, .type = type, .offset = t->data.n };
    w->ne[0] = (uint64_t)cols, w->ne[1] = (uint64_t)rows;
    snprintf(w->name, sizeof w->name, "%s", name);
    for (int i = 0; i < rows * (cols / f->elements); i++) tiny_put_block(t, f);
    return w;
}

static inline tiny_tensor *tiny_tensor_of(tiny *t, const char *name)
{
    for (int i = 0; i < t->n_tensors; i++)
        if (!strcmp(t->tensor[i].name, name)) return &t->tensor[i];
    abort();
}

static inline void tiny_drop_tensor(tiny *t, const char *name)
{
    *tiny_tensor_of(t, name) = t->tensor[t->n_tensors - 1];
    t->n_tensors--;
}

/* ---- Whole models ---------------------------------------------------------------------------- */

static const char *const tiny_tokens[] = {
    "<pad>", "<eos>", "<bos>", "<unk>", "\xe2\x96\x81", "a", "b", "ab", ("\xe2\x96\x81" "ab"), "  ",
        "<0x0A>", "\n\n",
    /* what follows only in the vocabulary of tiny_chat */
    "<start_of_turn>", "<end_of_turn>", "\n", "u", "s", "e", "r", "m", "o", "d", "l", "us", "er",
        "user", "<b>",
    "<unused0>", "\t", "\xc3\xa9", "<0xC3>", "<0xA9>",
};
enum { TINY_VOCAB = 12, TINY_CHAT_VOCAB = sizeof tiny_tokens / sizeof *tiny_tokens };

static inline void tiny_set_vocab(tiny *t, int n)
{
    bytes *b = tiny_set_array(t, "tokenizer.ggml.tokens", T_STRING, (uint64_t)n);
    for (int i = 0; i < n; i++) put_string(b, tiny_tokens[i]);
    b = tiny_set_array(t, "tokenizer.ggml.scores", T_F32, (uint64_t)n);
    for (int i = 0; i < n; i++) put_float(b, (float)-i);
}

static inline void tiny_add_layer(tiny *t, int l, uint32_t type, int d_model, int q, int kv,
                                  int d_ff)
{
    const struct { const char *name; uint32_t type; int rows, cols; } part[] = {
        {"attn_norm", 1, 1, d_model},
        {"attn_q", type, q, d_model},
        {"attn_k", type, kv, d_model},
        {"attn_v", type, kv, d_model},
        {"attn_output", 1, d_model, q},
        {"attn_q_norm", 1, 1, 2},
        {"attn_k_norm", 1, 1, 2},
        {"post_attention_norm", 1, 1, d_model},
        {"ffn_norm", 1, 1, d_model},
        {"ffn_gate", type, d_ff, d_model},
        {"ffn_up", type, d_ff, d_model},
        {"ffn_down", 1, d_model, d_ff},
        {"post_ffw_norm", 1, 1, d_model},
    };
    char name[64];
    uint64_t norm = tiny_tensor_of(t, "output_norm.weight")->offset;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) {
        snprintf(name, sizeof name, "blk.%d.%s.weight", l, part[i].name);
        int is_wide_norm = part[i].rows == 1 && part[i].cols == 256;
        tiny_tensor *w = tiny_add_tensor(t, name, part[i].type, part[i].rows, is_wide_norm
                                         ? 0 : part[i].cols);
        /* one place for all of them, to save 2 KB */
        if (is_wide_norm) w->ne[0] = 256, w->offset = norm;
    }
}

/* The required keys and tensors, and no more: heads of 2 elements, 2 query heads (of 256-element
 * formats: one) to 1 key-value head. */
static inline tiny tiny_new_of(uint32_t type, int n_layers, int n_vocab)
{
    tiny t = { .version = 3, .alignment = 32, .random = type + 1 };
    int elements = tiny_format_of(type)->elements, d_model = elements == 1 ? 4 : elements;
    int heads = elements == 256 ? 1 : 2, d_ff = heads;
    tiny_set_string(&t, "general.architecture", "gemma3");
    tiny_set_u32(&t, "gemma3.block_count", (uint32_t)n_layers);
    tiny_set_u32(&t, "gemma3.embedding_length", (uint32_t)d_model);
    tiny_set_u32(&t, "gemma3.feed_forward_length", (uint32_t)d_ff);
    tiny_set_u32(&t, "gemma3.attention.head_count", (uint32_t)heads);
    tiny_set_u32(&t, "gemma3.attention.sliding_window", 2);
    tiny_set_vocab(&t, n_vocab);
    tiny_add_tensor(&t, "token_embd.weight", type, n_vocab, d_model);
    tiny_add_tensor(&t, "output_norm.weight", 1, 1, d_model);
    for (int l = 0; l < n_layers; l++) tiny_add_layer(&t, l, type, d_model, 2 * heads, 2, d_ff);
    return t;
}

static inline tiny tiny_new(uint32_t type) { return tiny_new_of(type, 1, TINY_VOCAB); }

/* One that can chat: a local and a global layer, all keys that published files have. */
static inline tiny tiny_chat(void)
{
    tiny t = tiny_new_of(TINY_Q4_0, 2, TINY_CHAT_VOCAB);
    tiny_set_string(&t, "general.name", "tiny");
    tiny_set_string(&t, "tokenizer.chat_template", "{{ bos_token }}<start_of_turn>");
    tiny_set_string(&t, "tokenizer.ggml.model", "llama");
    put(tiny_set_array(&t, "gemma3.attention.sliding_window_pattern", T_BOOL, 2), "\1\0", 2);
    tiny_set_u32(&t, "tokenizer.ggml.bos_token_id", 2);
    tiny_set_u32(&t, "tokenizer.ggml.eos_token_id", 1);
    tiny_set_u32(&t, "tokenizer.ggml.unknown_token_id", 3);
    tiny_set_bool(&t, "tokenizer.ggml.add_bos_token", 1);
    return t;
}

static inline bytes tiny_file(const tiny *t)
{
    bytes b = { NULL, 0 };
    put(&b, "GGUF", 4);
    put_int(&b, t->version, 4);
    put_int(&b, (uint64_t)t->n_tensors, 8);
    put_int(&b, (uint64_t)t->n_keys, 8);
    for (int i = 0; i < t->n_keys; i++) put(&b, t->key[i].p, t->key[i].n);
    for (int i = 0; i < t->n_tensors; i++) {
        const tiny_tensor *w = &t->tensor[i];
        put_string(&b, w->name);
        put_int(&b, w->n_dims, 4);
        for (uint32_t k = 0; k < w->n_dims && k < 8; k++) put_int(&b, w->ne[k], 8);
        put_int(&b, w->type, 4);
        put_int(&b, w->offset, 8);
    }
    while (b.n % t->alignment) put_int(&b, 0, 1);
    put(&b, t->data.p, t->data.n);
    return b;
}

/* Bytes before the tensors' data. */
static inline size_t tiny_header(const tiny *t, const bytes *file) { return file->n - t->data.n; }

static inline void tiny_free(tiny *t)
{
    for (int i = 0; i < t->n_keys; i++) free(t->key[i].p);
    free(t->data.p);
    *t = (tiny){ 0 };
}

/* ---- One for each tensor type and each optional key ------------------------------------------ */

/* Changes an F32 model in the way number k and names it; NULL after the last. */
static inline const char *tiny_change(tiny *t, int k)
{
    int d = 4, n = TINY_VOCAB;
    bytes *b;
    switch (k) {
    case 0: return "required-keys";
    case 1: tiny_set_string(t, "general.name", "tiny"); return "name";
    case 2: tiny_set_u32(t, "gemma3.context_length", 64); return "context";
    case 3: tiny_set_f32(t, "gemma3.attention.layer_norm_rms_epsilon", 1e-5f); return "epsilon";
    case 4: tiny_set_f32(t, "gemma3.final_logit_softcapping", 30); return "softcap";
    case 5: tiny_set_u32(t, "gemma3.attention.key_length", 2); return "key-length";
    case 6: tiny_set_u32(t, "gemma3.attention.value_length", 2); return "value-length";
    case 7: tiny_set_u32(t, "gemma3.attention.head_count_kv", 1); return "kv-heads";
    case 8: tiny_drop(t, "gemma3.attention.sliding_window"); return "no-window";
    case 9: tiny_set_u32(t, "gemma3.attention.sliding_window_pattern", 1); return "pattern";
    case 10: put_int(tiny_set_array(t, "gemma3.attention.sliding_window_pattern", T_BOOL, 1), 0, 1);
    return "pattern-of-bools";
    case 11: tiny_set_f32(t, "gemma3.rope.freq_base", 1e5f); return "base";
    case 12: tiny_set_f32(t, "gemma3.rope.freq_base_swa", 1e3f); return "local-base";
    case 13: tiny_set_f32(t, "gemma3.rope.global.freq_base", 1e5f); return "base-of-old";
    case 14: tiny_set_f32(t, "gemma3.rope.local.freq_base", 1e3f); return "local-base-of-old";
    case 15: tiny_set_string(t, "gemma3.rope.scaling.type", "linear");
             tiny_set_f32(t, "gemma3.rope.scaling.factor", 8); return "factor";
    case 16: tiny_set_f32(t, "gemma3.rope.scale_linear", 8); return "factor-of-old";
    case 17: tiny_set_string(t, "gemma3.rope.scaling.type", "none"); return "no-scaling";
    case 18: tiny_set_string(t, "tokenizer.ggml.model", "llama"); return "kind-of-tokenizer";
    case 19: b = tiny_set_array(t, "tokenizer.ggml.token_type", T_I32, (uint64_t)n);
             for (int i = 0; i < n; i++) put_int(b, i < 4 ? 3 : i == 5 ? 4 : 1, 4);
             return "token-types";
    case 20: b = tiny_set_array(t, "tokenizer.ggml.token_type", T_U32, (uint64_t)n);
             for (int i = 0; i < n; i++) put_int(b, i == 3 ? 2 : i == 7 ? 5 : i == 6 ? 6 : 1, 4);
             return "unsigned-token-types";
    case 21: tiny_set_u32(t, "tokenizer.ggml.bos_token_id", 1); return "bos";
    case 22: tiny_set_u32(t, "tokenizer.ggml.eos_token_id", 5); return "eos";
    case 23: tiny_set_u32(t, "tokenizer.ggml.unknown_token_id", 3); return "unknown";
    case 24: tiny_set_bool(t, "tokenizer.ggml.add_bos_token", 0); return "no-bos";
    case 25: tiny_set_string(t, "tokenizer.chat_template", "<start_of_turn>"); return "template";
    case 26: tiny_set_u32(t, "split.count", 1); return "split-of-one";
    case 27: tiny_add_tensor(t, "output.weight", TINY_F16, n, d); return "head";
    case 28: tiny_add_tensor(t, "v.patch_embd.weight", TINY_F32, 1, 4)->type = 99;
    return "image-tower";
    case 29: t->tensor[0].ne[t->tensor[0].n_dims++] = 1; return "third-dimension";
    case 30: tiny_tensor_of(t, "token_embd.weight")->ne[1]--; return "fewer-rows";
    case 31: t->version = 2; return "version-2";
    case 32: put_int(tiny_set(t, "gemma3.block_count", T_U64), 1, 8);
             put_int(tiny_set(t, "gemma3.attention.sliding_window", T_I8), 2, 1);
             put_int(tiny_set(t, "gemma3.context_length", T_I16), 64, 2);
             return "integers-of-other-types";
    case 33: put_int(tiny_set(t, "gemma3.rope.freq_base", T_F64), 0x40f86a0000000000u, 8);
             put_int(tiny_set(t, "gemma3.feed_forward_length", T_I64), 2, 8);
             put_int(tiny_set(t, "gemma3.attention.head_count", T_U16), 2, 2);
             put_int(tiny_set(t, "gemma3.attention.key_length", T_I32), 2, 4);
             put_int(tiny_set(t, "gemma3.attention.head_count_kv", T_U8), 1, 1);
             return "numbers-of-other-types";
    case 34: tiny_set_array(t, "some.array", T_F64, 0); return "empty-array";
    default: return NULL;
    }
}

/* The file number k of all of these, and its name; no bytes after the last. */
static inline bytes tiny_seed(int k, char name[64])
{
    tiny t;
    if (k < TINY_FORMATS) {
        t = tiny_new(tiny_formats[k].type);
        snprintf(name, 64, "%s", tiny_formats[k].name);
    } else if (k == TINY_FORMATS) {
        t = tiny_chat();
        snprintf(name, 64, "chat");
    } else if (k == TINY_FORMATS + 1) {
        t = tiny_new(TINY_F32); /* its tensors anew, in other distances */
        t.alignment = 64, t.n_tensors = 0, t.data.n = 0;
        tiny_set_u32(&t, "general.alignment", 64);
        tiny_add_tensor(&t, "token_embd.weight", TINY_F32, TINY_VOCAB, 4);
        tiny_add_tensor(&t, "output_norm.weight", TINY_F32, 1, 4);
        tiny_add_layer(&t, 0, TINY_F32, 4, 4, 2, 2);
        snprintf(name, 64, "alignment");
    } else {
        t = tiny_new(TINY_F32);
        const char *what = tiny_change(&t, k - TINY_FORMATS - 2);
        if (!what) {
            tiny_free(&t);
            return (bytes){ NULL, 0 };
        }
        snprintf(name, 64, "%s", what);
    }
    bytes b = tiny_file(&t);
    tiny_free(&t);
    return b;
}

#endif
