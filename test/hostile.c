/* hostile.c - files from strangers: each kind of lie is refused in one sentence, and no damage to a
 * file, of any byte of its header, leads to anything but a refusal or a model that computes.
 *
 * test/gguf.c has the lies about an ordinary file. Here are those that other parsers were bitten
 * by, on files of 2 KB, and what only small files allow: to try everything. The library is used as
 * any program uses it.
 */
#define _POSIX_C_SOURCE 200809L
#include "../gemma3.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "tap.h"
#include "tiny.h"
#include "fuzz/gguf.c"

/* ---- Opening --------------------------------------------------------------------------------- */

/* In exactly as much memory as the file has bytes. */
static gemma3_model *open_exactly(const bytes *b, unsigned char **memory, gemma3_error *err)
{
    err->text[0] = 0;
    *memory = malloc(b->n ? b->n : 1);
    memcpy(*memory, b->p, b->n);
    return gemma3_open_memory(*memory, b->n, "x.gguf", NULL, err);
}

static void refused_bytes(const bytes *b, const char *what, const char *sentence)
{
    gemma3_error err;
    unsigned char *memory;
    gemma3_model *m = open_exactly(b, &memory, &err);
    int unsaid = !gemma3_open_memory(memory, b->n, "x.gguf", NULL, NULL);
    if (!ok(!m && unsaid && !strcmp(err.text, sentence), "%s is refused", what)) {
        diag("  got  %s", m ? "a model" : err.text);
        diag("  want %s", sentence);
    }
    gemma3_close(m);
    free(memory);
}

static void refused(tiny t, const char *what, const char *sentence)
{
    bytes b = tiny_file(&t);
    refused_bytes(&b, what, sentence);
    free(b.p);
    tiny_free(&t);
}

/* Logits after two tokens; 0, or -1 and a sentence. */
static int compute(const gemma3_model *m, float logits[64], gemma3_error *err)
{
    gemma3_params p = gemma3_default_params(m);
    const int32_t ids[2] = { 2, 5 };
    int row = 1;
    p.n_ctx = 8;
    gemma3_state *s = gemma3_state_new(m, &p, err);
    int failed = !s || gemma3_forward(s, ids, 2, &row, 1, logits);
    gemma3_state_free(s);
    return failed ? -1 : 0;
}

/* Opens, computes, and gives the logits of the unchanged file or, with other, some others. */
static void accepted(tiny t, const char *what, int other)
{
    static float want[64];
    float got[64] = { 0 };
    gemma3_error err;
    unsigned char *memory;
    if (want[0] == 0) {
        tiny plain = tiny_new(TINY_F32);
        bytes b = tiny_file(&plain);
        gemma3_model *m = open_exactly(&b, &memory, &err);
        ok(m && !compute(m, want, &err), "the unchanged file computes");
        gemma3_close(m);
        free(memory);
        free(b.p);
        tiny_free(&plain);
    }
    bytes b = tiny_file(&t);
    gemma3_model *m = open_exactly(&b, &memory, &err);
    if (ok(m && !compute(m, got, &err), "%s is accepted", what)) {
        int same = !memcmp(got, want, TINY_VOCAB * sizeof *got);
        ok(same == !other, "and computes %s", other ? "something else" : "the same");
    } else diag("  %s", err.text);
    gemma3_close(m);
    free(memory);
    free(b.p);
    tiny_free(&t);
}

/* ---- Headers --------------------------------------------------------------------------------- */

static void with_version(uint32_t version, const char *sentence)
{
    tiny t = tiny_new(TINY_F32);
    t.version = version;
    refused(t, "another version", sentence);
}

/* Counts whose product with the size of anything wraps, or that are one too many. */
static void with_counts(uint64_t n_tensors, uint64_t n_keys)
{
    tiny t = tiny_new(TINY_F32);
    bytes b = tiny_file(&t), counts = { NULL, 0 };
    char sentence[200];
    put_int(&counts, n_tensors, 8);
    put_int(&counts, n_keys, 8);
    memcpy(b.p + 8, counts.p, 16);
    snprintf(sentence, sizeof sentence, "x.gguf is truncated: its header promises %llu keys and "
             "%llu tensors",
             (unsigned long long)n_keys, (unsigned long long)n_tensors);
    refused_bytes(&b, "a header with such counts", sentence);
    free(counts.p);
    free(b.p);
    tiny_free(&t);
}

static void headers(void)
{
    with_version(0, "x.gguf: GGUF version 0, expected 2 or 3");
    with_version(4, "x.gguf: GGUF version 4, expected 2 or 3");
    with_version(UINT32_MAX, "x.gguf: GGUF version 4294967295, expected 2 or 3");
    with_version(2u << 24, "x.gguf: GGUF version 33554432 (a big-endian file), expected 2 or 3");
    const uint64_t huge[] = { 1 << 20, 1ull << 32, 1ull << 56, (1ull << 58) + 1, 1ull << 60,
                              1ull << 63, UINT64_MAX };
    for (size_t i = 0; i < sizeof huge / sizeof *huge; i++) {
        with_counts(15, huge[i]);
        with_counts(huge[i], 9);
    }
    bytes b = { NULL, 0 };
    put(&b, "GGUF\3\0\0\0", 8);
    refused_bytes(&b, "a header of 8 bytes", "x.gguf is truncated: its header promises 0 keys and "
                  "0 tensors");
    free(b.p);
    tiny t = tiny_new(TINY_F32);
    t.n_tensors = 0;
    refused(t, "a file without tensors", "x.gguf: heads of 0 elements, expected an even number");
    t = tiny_new(TINY_F32);
    while (t.n_keys) free(t.key[--t.n_keys].p);
    refused(t, "a file without keys", "x.gguf: general.architecture is missing, expected "
            "\"gemma3\"");
}

static void alignments(void)
{
    static const uint32_t wrong[] = { 0, 3, 33, 0x80000001, UINT32_MAX };
    tiny t;
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        t = tiny_new(TINY_F32);
        tiny_set_u32(&t, "general.alignment", wrong[i]);
        refused(t, "such an alignment", "x.gguf: general.alignment must be a u32 power of two");
    }
    t = tiny_new(TINY_F32);
    put_int(tiny_set(&t, "general.alignment", T_U64), 32, 8);
    refused(t, "an alignment of 64 bits", "x.gguf: general.alignment must be a u32 power of two");
    t = tiny_new(TINY_F32);
    put_int(tiny_set_array(&t, "general.alignment", T_U32, 1), 32, 4);
    refused(t, "an alignment that is a list", "x.gguf: general.alignment must be a u32 power of "
            "two");
    t = tiny_new(TINY_F32);
    tiny_set_u32(&t, "general.alignment", 1u << 31);
    refused(t, "an alignment of 2^31, behind the end of the file,", "x.gguf is truncated: tensor "
            "token_embd.weight ends "
            "192 bytes past the end of the file");
}

/* ---- Keys ------------------------------------------------------------------------------------ */

static void strings(void)
{
    static const char *const ends = "x.gguf is truncated: it ends inside its header";
    const uint64_t length[] = { 1 << 20, 1ull << 32, 1ull << 63, UINT64_MAX - 7, UINT64_MAX };
    for (size_t i = 0; i < sizeof length / sizeof *length; i++) {
        tiny t = tiny_new(TINY_F32);
        put_int(tiny_add(&t, "some.text", T_STRING), length[i], 8);
        refused(t, "a text of such a length", ends);
        t = tiny_new(TINY_F32);
        bytes *b = &t.key[t.n_keys++];
        *b = (bytes){ NULL, 0 };
        put_int(b, length[i], 8);
        refused(t, "a key of such a length", ends);
        t = tiny_new(TINY_F32);
        b = tiny_set_array(&t, "tokenizer.ggml.tokens", T_STRING, 2);
        put_string(b, "a");
        put_int(b, length[i], 8);
        refused(t, "a token of such a length", ends);
    }
    tiny t = tiny_new(TINY_F32);
    bytes b = tiny_file(&t);
    memset(b.p + tiny_header(&t, &b) - 80, 0xff, 8); /* somewhere in the last names */
    gemma3_error err;
    unsigned char *memory;
    ok(!open_exactly(&b, &memory, &err), "a damaged name of a tensor is refused: %s", err.text);
    free(memory);
    free(b.p);
    tiny_free(&t);
}

static void texts_with_nul(void)
{
    tiny t = tiny_new(TINY_F32);
    put_text(tiny_set(&t, "general.architecture", T_STRING), "gemma3\0", 7);
    refused(t, "an architecture with a NUL", "x.gguf: general.architecture is \"gemma3?\", "
            "expected \"gemma3\"");
    t = tiny_new(TINY_F32);
    tiny_drop(&t, "gemma3.block_count");
    bytes *b = &t.key[t.n_keys++];
    *b = (bytes){ NULL, 0 };
    put_text(b, "gemma3.block_count\0", 19);
    put_int(b, T_U32, 4);
    put_int(b, 1, 4);
    refused(t, "a key with a NUL, which is another key,", "x.gguf: key gemma3.block_count is "
            "missing");
    t = tiny_new(TINY_F32);
    tiny_tensor_of(&t, "output_norm.weight")->name[0] = 'O';
    refused(t, "a tensor whose name differs in a letter", "x.gguf: tensor output_norm.weight is "
            "missing");
    t = tiny_new(TINY_F32);
    put_text(tiny_add(&t, "general.name", T_STRING), "a\0b", 3);
    accepted(t, "a model's name with a NUL", 0);
    t = tiny_new(TINY_F32);
    tiny_set_string(&t, "general.architecture", "\x1b[2J\n\xff");
    refused(t, "an architecture that would clear the screen", "x.gguf: general.architecture is "
            "\"?[2J??\", expected \"gemma3\"");
}

static void arrays(void)
{
    static const char *const ends = "x.gguf is truncated: it ends inside its header";
    static const int size[13] = { 1, 1, 2, 2, 4, 4, 4, 1, 8, 0, 8, 8, 8 };
    for (uint32_t element = 0; element < 13; element++) {
        if (element == T_ARRAY) continue;
        /* to 0 bytes */
        uint64_t wraps = UINT64_MAX / (unsigned)size[element] + (size[element] > 1);
        const uint64_t count[] = { 1ull << 40, wraps, UINT64_MAX, 1ull << 63 };
        for (int i = 0; i < 4; i++) {
            tiny t = tiny_new(TINY_F32);
            tiny_set_array(&t, "some.array", element, count[i]);
            refused(t, "an array that is longer than memory", ends);
        }
    }
    tiny t = tiny_new(TINY_F32);
    bytes *b = tiny_add(&t, "some.nest", T_ARRAY);
    for (int depth = 0; depth < 10000; depth++) put_int(b, T_ARRAY, 4), put_int(b, 1, 8);
    refused(t, "10,000 arrays in each other", "x.gguf: key some.nest is an array of arrays, which "
            "is not supported");
}

static void types_of_values(void)
{
    static const struct { uint32_t type; const char *text; } wrong[] = {
        {13, "13"}, {255, "255"}, {1u << 31, "2147483648"}, {UINT32_MAX, "4294967295"},
    };
    char sentence[200];
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        snprintf(sentence, sizeof sentence, "x.gguf: key some.thing has value type %s, which is "
                 "not one of GGUF's",
                 wrong[i].text);
        tiny t = tiny_new(TINY_F32);
        put_int(tiny_add(&t, "some.thing", wrong[i].type), 0, 8);
        refused(t, "a value of no type", sentence);
        t = tiny_new(TINY_F32);
        tiny_set_array(&t, "some.thing", wrong[i].type, 1);
        refused(t, "an array of no type", sentence);
    }
    tiny t = tiny_new(TINY_F32);
    bytes *b = tiny_set_array(&t, "tokenizer.ggml.scores", T_F64, TINY_VOCAB);
    for (int i = 0; i < TINY_VOCAB; i++) put_int(b, 0, 8);
    refused(t, "scores of 8 bytes", "x.gguf: key tokenizer.ggml.scores must be an array of 12 f32");
    t = tiny_new(TINY_F32);
    b = tiny_set_array(&t, "tokenizer.ggml.token_type", T_STRING, TINY_VOCAB);
    for (int i = 0; i < TINY_VOCAB; i++) put_string(b, "1");
    refused(t, "token types in words", "x.gguf: key tokenizer.ggml.token_type must be an array of "
            "12 i32");
    t = tiny_new(TINY_F32);
    tiny_set_array(&t, "tokenizer.ggml.tokens", T_STRING, 0);
    refused(t, "a vocabulary of nothing", "x.gguf: key tokenizer.ggml.tokens is missing or no "
            "array of strings");
    t = tiny_new(TINY_F32);
    put_int(tiny_set_array(&t, "tokenizer.ggml.tokens", T_U8, 12), 0, 8);
    put_int(&t.key[t.n_keys - 1], 0, 4);
    refused(t, "a vocabulary of numbers", "x.gguf: key tokenizer.ggml.tokens is missing or no "
            "array of strings");
    t = tiny_new(TINY_F32);
    tiny_set_string(&t, "tokenizer.ggml.tokens", "a b c");
    refused(t, "a vocabulary that is one text", "x.gguf: key tokenizer.ggml.tokens is missing or "
            "no array of strings");
}

/* ---- Numbers of the configuration ------------------------------------------------------------ */

static void with_u32(const char *key, uint32_t x, const char *sentence)
{
    tiny t = tiny_new(TINY_F32);
    tiny_set_u32(&t, key, x);
    refused(t, key, sentence);
}

static void with_f32(const char *key, float x, const char *sentence)
{
    tiny t = tiny_new(TINY_F32);
    tiny_set_f32(&t, key, x);
    refused(t, key, sentence);
}

static void numbers(void)
{
    with_u32("gemma3.block_count", 1000000000,
             "x.gguf: key gemma3.block_count is 1000000000, expected an integer from 1 to 128");
    with_u32("gemma3.block_count", 0, "x.gguf: key gemma3.block_count is 0, expected an integer "
             "from 1 to 128");
    with_u32("gemma3.context_length", 1u << 31,
             "x.gguf: key gemma3.context_length is 2147483648, expected an integer from 1 to "
                 "16777216");
    with_u32("gemma3.attention.head_count", 0,
             "x.gguf: key gemma3.attention.head_count is 0, expected an integer from 1 to 1024");
    with_u32("gemma3.attention.head_count_kv", 0,
             "x.gguf: key gemma3.attention.head_count_kv is 0, expected an integer from 1 to 1024");
    with_u32("gemma3.attention.key_length", 0,
             "x.gguf: key gemma3.attention.key_length is 0, expected an integer from 2 to 1024");
    with_u32("gemma3.attention.key_length", 3, "x.gguf: heads of 3 elements, expected an even "
             "number");
    with_u32("gemma3.feed_forward_length", UINT32_MAX,
             "x.gguf: key gemma3.feed_forward_length is 4294967295, expected an integer from 1 to "
                 "1048576");
    with_u32("gemma3.attention.sliding_window", 1u << 31,
             "x.gguf: key gemma3.attention.sliding_window is 2147483648, expected an integer from "
                 "0 to 16777216");
    with_u32("gemma3.attention.sliding_window_pattern", 129,
             "x.gguf: key gemma3.attention.sliding_window_pattern is 129, expected an integer "
                 "from 0 to 128");
    with_f32("gemma3.attention.layer_norm_rms_epsilon", -1e-6f, "x.gguf: key "
             "gemma3.attention.layer_norm_rms_epsilon is -1e-06, expected a number from 0 to 1e30");
    with_f32("gemma3.attention.layer_norm_rms_epsilon", NAN, "x.gguf: key "
             "gemma3.attention.layer_norm_rms_epsilon is nan, expected a number from 0 to 1e30");
    with_f32("gemma3.rope.freq_base", 0, "x.gguf: key gemma3.rope.freq_base is 0, expected a "
             "number from 1 to 1e30");
    with_f32("gemma3.rope.scaling.factor", -8,
             "x.gguf: key gemma3.rope.scaling.factor is -8, expected a number from 0 to 1e30");
    with_f32("gemma3.final_logit_softcapping", -30,
             "x.gguf: key gemma3.final_logit_softcapping is -30, expected a number from 0 to 1e30");
    for (int i = 0; i < 3; i++) {
        static const char *const name[] = { "bos", "eos", "unknown" };
        char key[64], sentence[200];
        snprintf(key, sizeof key, "tokenizer.ggml.%s_token_id", name[i]);
        snprintf(sentence, sizeof sentence, "x.gguf: key %s is 12, outside the vocabulary of 12",
                 key);
        with_u32(key, 12, sentence);
        snprintf(sentence, sizeof sentence, "x.gguf: key %s is 4294967295, outside the vocabulary "
                 "of 12", key);
        with_u32(key, UINT32_MAX, sentence);
        snprintf(sentence, sizeof sentence, "x.gguf: key %s is -1, outside the vocabulary of 12",
                 key);
        tiny t = tiny_new(TINY_F32);
        put_int(tiny_set(&t, key, T_I32), UINT32_MAX, 4);
        refused(t, "a negative id", sentence);
    }
    tiny t = tiny_new(TINY_F32);
    put_int(tiny_set(&t, "gemma3.block_count", T_I64), UINT64_MAX, 8);
    refused(t, "a negative number of layers", "x.gguf: key gemma3.block_count is -1, expected an "
            "integer from 1 to 128");
    t = tiny_new(TINY_F32);
    put_int(tiny_set(&t, "gemma3.block_count", T_U64), (1ull << 32) + 1, 8);
    refused(t, "2^32 + 1 layers", "x.gguf: key gemma3.block_count is 4294967297, expected an "
            "integer from 1 to 128");
    t = tiny_new(TINY_F32);
    tiny_set_u32(&t, "gemma3.attention.sliding_window", 0);
    accepted(t, "a window of 0, which means none,", 0);
    t = tiny_new(TINY_F32);
    tiny_set_f32(&t, "gemma3.rope.scaling.factor", 0);
    accepted(t, "a RoPE factor of 0, which means none,", 0);
    t = tiny_new(TINY_F32);
    tiny_set_u32(&t, "general.name", 7);
    accepted(t, "a name that is a number, which is none,", 0);
    t = tiny_new(TINY_F32);
    put_int(tiny_set_array(&t, "gemma3.block_count", T_U32, 1), 1, 4);
    refused(t, "a list of numbers of layers", "x.gguf: key gemma3.block_count is a array, "
            "expected a number");
    t = tiny_new(TINY_F32);
    tiny_set_string(&t, "tokenizer.ggml.add_bos_token", "true");
    refused(t, "a <bos> in words", "x.gguf: key tokenizer.ggml.add_bos_token is a string, expected "
            "a number");
    t = tiny_new(TINY_F32);
    tiny_set_f32(&t, "gemma3.attention.layer_norm_rms_epsilon", 0);
    refused(t, "an epsilon of 0", "x.gguf: key gemma3.attention.layer_norm_rms_epsilon is 0, "
            "expected more");
}

/* ---- Tensors --------------------------------------------------------------------------------- */

static void with_dims(uint32_t n_dims, const char *text)
{
    char sentence[200];
    tiny t = tiny_new(TINY_F32);
    tiny_tensor_of(&t, "output_norm.weight")->n_dims = n_dims;
    snprintf(sentence, sizeof sentence, "x.gguf: tensor output_norm.weight has %s dimensions, "
             "expected 1 to 4", text);
    refused(t, "another number of dimensions", sentence);
}

static void with_ne(const char *name, int k, uint64_t ne, const char *sentence)
{
    tiny t = tiny_new(TINY_F32);
    tiny_tensor *w = tiny_tensor_of(&t, name);
    for (; (int)w->n_dims <= k; w->n_dims++) w->ne[w->n_dims] = 1;
    w->ne[k] = ne;
    refused(t, "a size that lies", sentence);
}

static void shapes(void)
{
    with_dims(0, "0");
    with_dims(5, "5");
    with_dims(8, "8");
    with_dims(UINT32_MAX, "4294967295");
    with_ne("blk.0.attn_q.weight", 0, 0, "x.gguf: tensor blk.0.attn_q.weight is [4][0], expected "
            "[4][4]");
    with_ne("blk.0.attn_q.weight", 1, 0, "x.gguf: heads of 0 elements, expected an even number");
    with_ne("blk.0.ffn_up.weight", 1, 0, "x.gguf: tensor blk.0.ffn_up.weight is [0][4], expected "
            "[2][4]");
    with_ne("blk.0.ffn_up.weight", 0, UINT64_MAX,
            "x.gguf: tensor blk.0.ffn_up.weight is [2][18446744073709551615], expected [2][4]");
    /* times 2^22, or 4 bytes and 2^20 columns, it wraps */
    with_ne("blk.0.ffn_up.weight", 1, (1ull << 42) + 1,
            "x.gguf: tensor blk.0.ffn_up.weight is [4398046511105][4], expected [2][4]");
    /* the product with 4 columns is the right one */
    with_ne("blk.0.ffn_up.weight", 1, (1ull << 62) + 2,
            "x.gguf: tensor blk.0.ffn_up.weight is [4611686018427387906][4], expected [2][4]");
    with_ne("blk.0.ffn_up.weight", 2, 0, "x.gguf: tensor blk.0.ffn_up.weight is [0][2][4], "
            "expected [2][4]");
    with_ne("blk.0.ffn_up.weight", 3, 1ull << 63,
            "x.gguf: tensor blk.0.ffn_up.weight is [9223372036854775808][1][2][4], expected "
                "[2][4]");
    with_ne("token_embd.weight", 1, 0, "x.gguf: tensor token_embd.weight is [0][4], expected [any "
            "number of tokens][4]");
    with_ne("token_embd.weight", 1, 1ull << 62, "x.gguf: tensor token_embd.weight is "
            "[4611686018427387904][4], expected "
            "[any number of tokens][4]");
    with_ne("token_embd.weight", 1, (1 << 24) + 1,
            "x.gguf: tensor token_embd.weight is [16777217][4], expected [any number of "
                "tokens][4]");
    tiny t = tiny_new(TINY_F32);
    char sentence[200];
    snprintf(sentence, sizeof sentence, "x.gguf is truncated: tensor token_embd.weight ends %lu "
             "bytes past the end of "
             "the file", (1ul << 28) - (unsigned long)t.data.n);
    tiny_free(&t);
    with_ne("token_embd.weight", 1, 1 << 24, sentence);
    t = tiny_new(TINY_F32);
    tiny_tensor_of(&t, "token_embd.weight")->type = TINY_Q4_0;
    refused(t, "a row shorter than a block",
            "x.gguf: tensor token_embd.weight has rows of 4, expected a multiple of Q4_0's block "
                "of 32");
    t = tiny_new(TINY_F32);
    tiny_set_u32(&t, "gemma3.embedding_length", 5);
    refused(t, "another width", "x.gguf: tensor token_embd.weight is [12][4], expected [any "
            "number of tokens][5]");
}

static int is_known(uint32_t type)
{
    for (int k = 0; k < TINY_FORMATS; k++)
        if (tiny_formats[k].type == type) return 1;
    return 0;
}

/* Removed from GGUF, of other families, not yet given, and negative ones. */
static void types_of_tensors(void)
{
    for (uint32_t i = 0; i < 68; i++) {
        static const uint32_t far[] = { 255, 1u << 16, 1u << 31, UINT32_MAX };
        uint32_t type = i < 64 ? i : far[i - 64];
        if (is_known(type)) continue;
        tiny t = tiny_new(TINY_F32);
        tiny_tensor_of(&t, "blk.0.attn_q.weight")->type = type;
        bytes b = tiny_file(&t);
        gemma3_error err;
        unsigned char *memory;
        gemma3_model *m = open_exactly(&b, &memory, &err);
        ok(!m && !strncmp(err.text, "x.gguf: tensor blk.0.attn_q.weight has type ", 44) &&
           strstr(err.text, " not supported"), "tensor type %lu is refused", (unsigned long)type);
        gemma3_close(m);
        free(memory);
        free(b.p);
        tiny_free(&t);
    }
}

static void with_offset(uint64_t offset, const char *sentence)
{
    tiny t = tiny_new(TINY_F32);
    tiny_tensor_of(&t, "blk.0.ffn_up.weight")->offset = offset;
    refused(t, "an offset that lies", sentence);
}

static void offsets(void)
{
    tiny t = tiny_new(TINY_F32);
    uint64_t n = t.data.n;
    char sentence[200];
    tiny_free(&t);
    uint64_t past = (n + 31) / 32 * 32;
    snprintf(sentence, sizeof sentence, "x.gguf is truncated: tensor blk.0.ffn_up.weight ends "
             "%llu bytes past the end "
             "of the file", (unsigned long long)(past + 32 - n));
    with_offset(past, sentence);
    with_offset(16, "x.gguf: tensor blk.0.ffn_up.weight is at offset 16, expected a multiple of "
                "32");
    with_offset(UINT64_MAX - 15, "x.gguf: tensor blk.0.ffn_up.weight is at offset "
                "18446744073709551600, expected a "
                "multiple of 32");
    snprintf(sentence, sizeof sentence, "x.gguf is truncated: tensor blk.0.ffn_up.weight ends "
             "%llu bytes past the end "
             "of the file", (unsigned long long)((1ull << 63) + 32 - n));
    with_offset(1ull << 63, sentence);
    /* what stands at the end of the address space ends past the end too: its sum stops there */
    snprintf(sentence, sizeof sentence, "x.gguf is truncated: tensor blk.0.ffn_up.weight ends "
             "%llu bytes past the end of the file", (unsigned long long)(UINT64_MAX - n));
    with_offset(UINT64_MAX - 31, sentence);
    t = tiny_new(TINY_F32);
    tiny_tensor *gate = tiny_tensor_of(&t, "blk.0.ffn_gate.weight");
    tiny_tensor_of(&t, "blk.0.ffn_up.weight")->offset = gate->offset;
    accepted(t, "a tensor in another's place", 1);
}

/* Memory is asked for by what the header says, before a tensor is looked for. */
static void tensors_that_share_their_bytes(void)
{
    for (int rows = 64; rows <= 128; rows += 64) {
        tiny t = tiny_new(TINY_F32);
        for (int i = 0; t.n_tensors < TINY_TENSORS; i++) {
            tiny_tensor *more = &t.tensor[t.n_tensors++];
            *more = *tiny_tensor_of(&t, "token_embd.weight");
            snprintf(more->name, sizeof more->name, "more.%d", i);
            more->ne[1] = (uint64_t)rows;
        }
        if (rows == 64) accepted(t, "a file that has a tensor again and again", 0);
        else refused(t, "a file of which that needs too much memory", "x.gguf: its tensors share "
                     "their bytes more than 16 times");
    }
}

/* A vocabulary of another length than the embedding, in either direction, is harmless. */
static void vocabulary_and_embedding(void)
{
    for (int more = -1; more <= 1; more += 2) {
        tiny t = tiny_new(TINY_F32);
        gemma3_error err;
        unsigned char *memory;
        tiny_set_vocab(&t, TINY_VOCAB + more);
        bytes b = tiny_file(&t);
        gemma3_model *m = open_exactly(&b, &memory, &err);
        if (ok(m != NULL, "%d tokens for 12 rows", TINY_VOCAB + more))
            is_int(gemma3_model_config(m)->n_vocab, more < 0 ? 11 : 12, "count as the fewer of "
                   "both");
        gemma3_close(m);
        free(memory);
        free(b.p);
        tiny_free(&t);
    }
}

/* Weights may be anything: what comes out is a number or none, and a choice is a token. */
static void scales_that_are_no_numbers(void)
{
    static const uint16_t strange[] = { 0x7c00, 0xfc00, 0x7e00, 0xffff, 0x7bff, 0x0001, 0x8000 };
    int n_tried = 0;
    for (int k = 0; k < TINY_FORMATS; k++)
        for (size_t i = 0; i < sizeof strange / sizeof *strange; i++) {
            const struct tiny_format *f = &tiny_formats[k];
            tiny t = tiny_new(f->type);
            for (int w = 0; w < t.n_tensors; w++) {
                int at = t.tensor[w].type != f->type ? -1 : f->elements == 1
                    ? f->bytes - 2 : f->scale[n_tried % 2];
                if (at < 0) continue;
                t.data.p[t.tensor[w].offset + (unsigned)at] = (unsigned char)strange[i];
                t.data.p[t.tensor[w].offset + (unsigned)at + 1] = (unsigned char)(strange[i] >> 8);
            }
            bytes b = tiny_file(&t);
            unsigned char *exact = malloc(b.n);
            memcpy(exact, b.p, b.n);
            if (!gguf_try(exact, b.n)) ok(0, "%s with scale %04x opens", f->name,
                                          (unsigned)strange[i]);
            free(exact);
            free(b.p);
            tiny_free(&t);
            n_tried++;
        }
    ok(1, "%d models with infinite, missing and subnormal scales compute", n_tried);
}

/* ---- Everything ------------------------------------------------------------------------------ */

static void every_seed_computes(void)
{
    char name[64];
    bytes b;
    int n = 0;
    for (; (b = tiny_seed(n, name)).p; n++) {
        unsigned char *exact = malloc(b.n);
        memcpy(exact, b.p, b.n);
        ok(gguf_try(exact, b.n) && b.n <= TINY_LIMIT, "%s: %zu bytes open and compute", name, b.n);
        free(exact);
        free(b.p);
    }
}

static void every_truncation(const char *what, tiny t)
{
    bytes b = tiny_file(&t);
    int wrong = 0;
    for (size_t n = 0; n < b.n; n++) {
        bytes cut = { b.p, n };
        gemma3_error err;
        unsigned char *memory;
        gemma3_model *m = open_exactly(&cut, &memory, &err);
        const char *want = n < 4 ? "x.gguf is not a GGUF file" : "x.gguf is truncated: ";
        if ((m || strncmp(err.text, want, strlen(want))) && !wrong++)
            diag("cut to %zu: %s", n, m ? "opens" : err.text);
        gemma3_close(m);
        free(memory);
    }
    is_int(wrong, 0, "%s, cut short at each of its %zu bytes, is refused as truncated", what, b.n);
    free(b.p);
    tiny_free(&t);
}

static void every_damage(const char *what, tiny t)
{
    bytes b = tiny_file(&t);
    size_t header = tiny_header(&t, &b);
    int n_opened = 0, n_tried = 0;
    unsigned char *p = malloc(b.n);
    memcpy(p, b.p, b.n);
    for (size_t i = 0; i < header; i++) {
        for (int k = 0; k < 10; k++, n_tried++) {
            p[i] = k == 8 ? 0x00 : k == 9 ? 0xff : (unsigned char)(b.p[i] ^ 1 << k);
            n_opened += gguf_try(p, b.n);
        }
        p[i] = b.p[i];
    }
    ok(n_opened > 0 && n_opened < n_tried, "%s, each of %zu bytes of its header changed in ten "
       "ways: %d of %d files "
       "open and compute, the others are refused", what, header, n_opened, n_tried);
    free(p);
    free(b.p);
    tiny_free(&t);
}

/* ---- Time ------------------------------------------------------------------------------------ */

static double seconds_of(const bytes *b, const char *sentence)
{
    gemma3_error err = { "" };
    clock_t begin = clock(); /* of this process alone: other work does not count */
    gemma3_model *m = gemma3_open_memory(b->p, b->n, "x.gguf", NULL, &err);
    double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
    if (sentence ? m || strcmp(err.text, sentence) : !m)
        ok(0, "opens, or is refused as expected: %s", err.text);
    gemma3_close(m);
    return seconds;
}

/* A file of n keys: all different, in order or not, or with a last one that is there already. */
static bytes file_of_keys(int n, int twice)
{
    tiny t = tiny_new(TINY_F32);
    bytes b = tiny_file(&t), all = { NULL, 0 };
    put(&all, b.p, 16);
    put_int(&all, (uint64_t)(t.n_keys + n), 8);
    size_t keys = 24, room = 0;
    for (int i = 0; i < t.n_keys; i++) keys += t.key[i].n;
    put(&all, b.p + 24, keys - 24);
    room = all.n + (size_t)n * 40 + b.n;
    all.p = realloc(all.p, room);
    for (int i = 0; i < n; i++) {
        char name[32];
        unsigned scrambled = (unsigned)(twice && i == n - 1 ? 0 : i) * 2654435761u;
        snprintf(name, sizeof name, "some.key.%08x", scrambled);
        unsigned char *p = all.p + all.n;
        memset(p, 0, 33);
        p[0] = 17, memcpy(p + 8, name, 17), p[25] = T_U32;
        all.n += 33;
    }
    put(&all, b.p + keys, tiny_header(&t, &b) - keys);
    while (all.n % 32) put_int(&all, 0, 1);
    put(&all, t.data.p, t.data.n);
    free(b.p);
    tiny_free(&t);
    return all;
}

/* Ten times as many cost some ten times as much, not a hundred times. */
static void many_keys(void)
{
    double seconds[2][2];
    for (int twice = 0; twice < 2; twice++)
        for (int large = 0; large < 2; large++) {
            bytes b = file_of_keys(large ? 100000 : 10000, twice);
            seconds[twice][large] = 1e9;
            for (int i = 0; i < 3; i++) {
                double s = seconds_of(&b, twice ? "x.gguf: key some.key.00000000 occurs "
                                      "twice" : NULL);
                if (s < seconds[twice][large]) seconds[twice][large] = s;
            }
            free(b.p);
        }
    for (int twice = 0; twice < 2; twice++)
        ok(seconds[twice][1] < 40 * seconds[twice][0] + 0.5, /* of 10^10 comparisons: minutes */
           "100,000 keys%s take %.3f s, 10,000 %.3f s", twice ? ", one of them twice," : "",
           seconds[twice][1], seconds[twice][0]);
}

/* Keys that are long and alike are the worst for a sort. */
static void long_equal_names(void)
{
    enum { LENGTH = 1 << 20, KEYS = 8 };
    static char name[LENGTH];
    memset(name, 'k', LENGTH);
    tiny t = tiny_new(TINY_F32);
    for (int i = 0; i < KEYS; i++) {
        bytes *b = &t.key[t.n_keys++];
        *b = (bytes){ NULL, 0 };
        put_text(b, name, LENGTH - (size_t)(i % (KEYS - 1)));
        put_int(b, T_U8, 4);
        put_int(b, 0, 1);
    }
    bytes b = tiny_file(&t);
    char sentence[512];
    snprintf(sentence, sizeof sentence, "x.gguf: key %.79s occurs twice", name);
    double s = seconds_of(&b, sentence);
    ok(s < 1, "eight keys of 1 MB, all alike: %.3f s", s);
    free(b.p);
    tiny_free(&t);
}

static void put_info(bytes *b, const tiny_tensor *w, const char *name)
{
    put_string(b, name);
    put_int(b, w->n_dims, 4);
    for (uint32_t k = 0; k < w->n_dims; k++) put_int(b, w->ne[k], 8);
    put_int(b, w->type, 4);
    put_int(b, w->offset, 8);
}

/* Layers share their bytes, which a file may do within limits: 101 of them are 1,315 tensors. */
static void a_hundred_layers(void)
{
    enum { LAYERS = 101 };
    tiny t = tiny_new(TINY_F32);
    tiny_set_u32(&t, "gemma3.block_count", LAYERS);
    bytes b = { NULL, 0 };
    put(&b, "GGUF\3\0\0\0", 8);
    put_int(&b, (uint64_t)(t.n_tensors - 13 + 13 * LAYERS), 8);
    put_int(&b, (uint64_t)t.n_keys, 8);
    for (int i = 0; i < t.n_keys; i++) put(&b, t.key[i].p, t.key[i].n);
    for (int i = 0; i < t.n_tensors; i++) {
        const char *name = t.tensor[i].name, *role = strncmp(name, "blk.0.", 6) ? NULL : name + 6;
        for (int l = 0; l < (role ? LAYERS : 1); l++) {
            char of_layer[80];
            snprintf(of_layer, sizeof of_layer, "blk.%d.%s", l, role ? role : "");
            put_info(&b, &t.tensor[i], role ? of_layer : name);
        }
    }
    while (b.n % t.alignment) put_int(&b, 0, 1);
    put(&b, t.data.p, t.data.n);
    gemma3_error err;
    unsigned char *memory;
    float logits[64];
    gemma3_model *m = open_exactly(&b, &memory, &err);
    if (!ok(m && !compute(m, logits, &err), "a model of %d layers computes", LAYERS))
        diag("  %s", err.text);
    gemma3_tensor last;
    ok(m && !gemma3_model_tensor(m, 13 * LAYERS, &last) && !strncmp(last.name, "blk.100.", 8),
       "its last layer has number 100");
    gemma3_close(m);
    free(memory);
    free(b.p);
    tiny_free(&t);
}

/* ---- Files ----------------------------------------------------------------------------------- */

static char folder[] = "/tmp/gemma3-hostile-XXXXXX";

static const char *in_folder(const char *name)
{
    static char path[128];
    snprintf(path, sizeof path, "%s/%s", folder, name);
    return path;
}

static void refused_path(const char *path, const char *what, const char *reason)
{
    gemma3_error err = { "" };
    char sentence[300];
    gemma3_model *m = gemma3_open(path, NULL, &err);
    snprintf(sentence, sizeof sentence, "%s%s", path, reason);
    if (!ok(!m && !strcmp(err.text, sentence), "%s is refused", what))
        diag("  got %s", m ? "a model" : err.text);
    gemma3_close(m);
}

static int write_at(int fd, const void *p, size_t n, off_t at)
{
    return pwrite(fd, p, n, at) == (ssize_t)n ? 0 : -1;
}

static void things_that_are_no_files(void)
{
    refused_path(folder, "a folder", " is not a regular file");
    refused_path("/dev/zero", "a device", " is not a regular file");
    const char *path = in_folder("fifo");
    if (mkfifo(path, 0600)) skip(1, "no FIFO here");
    else refused_path(path, "a FIFO, which is not waited for,", " is not a regular file");
    unlink(path);
    path = in_folder("empty");
    close(open(path, O_CREAT | O_WRONLY, 0600));
    refused_path(path, "an empty file", " has 0 bytes: it is empty");
    unlink(path);
    refused_path(in_folder("nothing"), "no file", " cannot be opened: No such file or directory");
}

/* Offsets beyond 2 and 4 GB, in a file with a hole. */
static void large_offsets(void)
{
    const int64_t at[] = { (1ll << 31) - 32, 1ll << 31, (1ll << 32) - 32, 1ll << 32,
                           (1ll << 33) + 64 };
    float want[64], got[64];
    gemma3_error err = { "" };
    if (sizeof(size_t) < 8 || sizeof(off_t) < 8) {
        skip(5, "no such large files here");
        return;
    }
    for (size_t i = 0; i < sizeof at / sizeof *at; i++) {
        tiny t = tiny_new(TINY_F32);
        const char *path = in_folder("large.gguf");
        bytes b = tiny_file(&t);
        unsigned char *memory;
        gemma3_model *m = open_exactly(&b, &memory, &err);
        int failed = !m || compute(m, want, &err);
        gemma3_close(m);
        free(memory);
        tiny_tensor *w = tiny_tensor_of(&t, "token_embd.weight");
        size_t header = tiny_header(&t, &b), n = TINY_VOCAB * 4 * 4;
        uint64_t old = w->offset;
        w->offset = (uint64_t)at[i];
        bytes moved = tiny_file(&t);
        int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0600);
        failed = failed || fd < 0 || write_at(fd, moved.p, moved.n, 0);
        if (!failed && write_at(fd, t.data.p + old, n, (off_t)(at[i] + (int64_t)header))) {
            skip(1, "no file of this size here");
        } else {
            m = failed ? NULL : gemma3_open(path, NULL, &err);
            ok(m && !compute(m, got, &err) && !memcmp(got, want, TINY_VOCAB * sizeof *got),
               "a tensor %lld bytes behind the header is found", (long long)at[i]);
            gemma3_close(m);
        }
        if (fd >= 0) close(fd);
        unlink(path);
        free(moved.p);
        free(b.p);
        tiny_free(&t);
    }
}

/* Whoever shortens a file while it is used takes pages away that the process has mapped. There is
 * no right answer any more: it must end, and not with a wrong one. */
static void a_file_that_shrinks(void)
{
    tiny t = tiny_chat();
    const char *path = in_folder("shrinks.gguf");
    bytes b = tiny_file(&t);
    int fd = open(path, O_CREAT | O_WRONLY | O_TRUNC, 0600);
    for (int i = 0; i < 1 << 13; i++) put_int(&b, 0, 8); /* whole pages of it */
    ok(fd >= 0 && !write_at(fd, b.p, b.n, 0), "a file is written");
    close(fd);
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) {
        gemma3_error err;
        float before[64], after[64];
        const gemma3_options o = { .no_repack = 1 };
        signal(SIGBUS, SIG_DFL);
        gemma3_model *m = gemma3_open(path, &o, &err);
        if (!m || compute(m, before, &err)) _exit(2);
        if (truncate(path, 0)) _exit(3);
        if (compute(m, after, &err)) _exit(1);
        _exit(memcmp(before, after, TINY_CHAT_VOCAB * sizeof *after) ? 4 : 0);
    }
    int status = 0;
    waitpid(child, &status, 0);
#if defined(__linux__)
    ok(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS, "a file emptied in use is SIGBUS");
#else
    ok(WIFSIGNALED(status) || (WIFEXITED(status) && WEXITSTATUS(status) < 2),
       "a file emptied in use ends the process or does no harm; never by a wrong answer");
#endif
    unlink(path);
    free(b.p);
    tiny_free(&t);
}

/* ---- Tokens and texts ------------------------------------------------------------------------ */

static void ids_outside_the_vocabulary(void)
{
    static const struct { int32_t id; const char *sentence; } wrong[] = {
        {-1, "token 2 is -1, outside the vocabulary of 12"},
        {12, "token 2 is 12, outside the vocabulary of 12"},
        {INT32_MAX, "token 2 is 2147483647, outside the vocabulary of 12"},
        {INT32_MIN, "token 2 is -2147483648, outside the vocabulary of 12"},
    };
    tiny t = tiny_new(TINY_F32);
    bytes b = tiny_file(&t);
    gemma3_error err;
    unsigned char *memory;
    gemma3_model *m = open_exactly(&b, &memory, &err);
    gemma3_params p = gemma3_default_params(m);
    gemma3_state *s = gemma3_state_new(m, &p, &err);
    float logits[TINY_VOCAB];
    int row = 0;
    char piece[GEMMA3_PIECE_MAX];
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const int32_t ids[3] = { 1, 2, wrong[i].id };
        ok(gemma3_forward(s, ids, 3, &row, 1, logits) == -1, "id %ld is refused",
           (long)wrong[i].id);
        ok(strstr(gemma3_state_error(s), wrong[i].sentence) != NULL, "in a sentence: %s",
           gemma3_state_error(s));
        is_int(gemma3_state_pos(s), 0, "nothing was appended");
        is_int(gemma3_decode(gemma3_model_tokenizer(m), wrong[i].id, 0, piece), 0, "it has no "
               "text");
        ok(!gemma3_is_stop(gemma3_model_tokenizer(m), wrong[i].id), "it ends no answer");
    }
    gemma3_state_free(s);
    gemma3_close(m);
    free(memory);
    free(b.p);
    tiny_free(&t);
}

/* A text of any bytes: its ids are in the vocabulary, at most one for each byte and <bos>. */
static void texts_of_any_bytes(void)
{
    enum { N = 1 << 20 };
    tiny t = tiny_chat();
    bytes b = tiny_file(&t);
    gemma3_error err;
    unsigned char *memory;
    gemma3_model *m = open_exactly(&b, &memory, &err);
    const gemma3_tokenizer *k = gemma3_model_tokenizer(m);
    char *text = malloc(N);
    int32_t *ids = malloc((N + 1) * sizeof *ids);
    static const char *const what[] = { "NULs", "bytes 0xff", "halves of a character",
                                        "the letter a", "spaces", "random bytes",
                                        "the beginning of a token" };
    for (int kind = 0; kind < 7; kind++) {
        for (int i = 0; i < N; i++)
            text[i] = kind == 0 ? 0 : kind == 1 ? (char)0xff : kind == 2 ? (char)0xc3 : kind == 3
                ? 'a' : kind == 4 ? ' '
                    : kind == 5 ? (char)(tiny_random(&t)) : "<unused0"[i % 8];
        int n = gemma3_encode(k, text, N, GEMMA3_BOS | GEMMA3_SPECIAL, ids, N + 1), outside = 0;
        for (int i = 0; i < n; i++) outside += ids[i] < 0 || ids[i] >= TINY_CHAT_VOCAB;
        ok(n > 0 && n <= N + 1 && !outside, "1 MB of %s become %d ids of the vocabulary",
           what[kind], n);
    }
    free(ids);
    free(text);
    gemma3_close(m);
    free(memory);
    free(b.p);
    tiny_free(&t);
}

int main(void)
{
    headers();
    alignments();
    strings();
    texts_with_nul();
    arrays();
    types_of_values();
    numbers();
    shapes();
    types_of_tensors();
    offsets();
    tensors_that_share_their_bytes();
    vocabulary_and_embedding();
    scales_that_are_no_numbers();
    every_seed_computes();
    every_truncation("the smallest model", tiny_new(TINY_F32));
    every_truncation("one that can chat", tiny_chat());
    every_damage("the smallest model", tiny_new(TINY_F32));
    every_damage("one that can chat", tiny_chat());
    many_keys();
    long_equal_names();
    a_hundred_layers();
    if (mkdtemp(folder)) {
        things_that_are_no_files();
        large_offsets();
        a_file_that_shrinks();
        rmdir(folder);
    }
    ids_outside_the_vocabulary();
    texts_of_any_bytes();
    return done_testing();
}
