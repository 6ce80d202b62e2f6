/* gguf.c - reading model files: those that lie are refused in one sentence that names the key or
 * tensor, what was found and what was expected; the quirks of published ones are understood.
 *
 * Every file here is test/data/tiny.gguf taken apart, changed in one place and put together again.
 * Each lies in exactly as much memory as it has bytes, so that the sanitizers see a read behind it.
 */
#define GEMMA3_NO_MAIN
#include "../gemma3.c"

#include "fixture.h"

#include <time.h>

enum { MAX_KEYS = 64, MAX_TENSORS = 256 };

/* ---- Files taken apart ----------------------------------------------------------------------- */

typedef struct bytes {
    unsigned char *p;
    size_t n;
} bytes;

typedef struct info {
    char name[80];
    uint32_t n_dims, type;
    uint64_t ne[8], offset;
} info;

typedef struct image {
    bytes original;
    uint32_t version;
    int n_keys, n_tensors;
    bytes key[MAX_KEYS];     /* a whole pair: key, type, value */
    info tensor[MAX_TENSORS];
    size_t data, n_data;     /* where the original's tensors lie */
} image;

static void push(bytes *b, const void *p, size_t n)
{
    b->p = realloc(b->p, b->n + n + 1);
    if (n) memcpy(b->p + b->n, p, n);
    b->n += n;
}

static void push_int(bytes *b, uint64_t x, int n)
{
    for (int i = 0; i < n; i++, x >>= 8) push(b, &(unsigned char){ (unsigned char)x }, 1);
}

static void push_string(bytes *b, const char *s)
{
    push_int(b, strlen(s), 8);
    push(b, s, strlen(s));
}

static uint64_t get(const image *f, size_t *at, int n)
{
    uint64_t x = 0;
    for (int i = 0; i < n; i++) x |= (uint64_t)f->original.p[*at + i] << 8 * i;
    *at += n;
    return x;
}

static void skip_value(const image *f, size_t *at, uint32_t type)
{
    static const int size[] = { 1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8 };
    uint64_t n = 1;
    if (type == KV_ARRAY) type = (uint32_t)get(f, at, 4), n = get(f, at, 8);
    for (uint64_t i = 0; i < n; i++)
        *at += type == KV_STRING ? get(f, at, 8) : (uint64_t)size[type];
}

/* tiny.gguf, anew. */
static image take_apart(void)
{
    static bytes original;
    image f = { .version = 3 };
    if (!original.p) original.p = (unsigned char *)read_file("test/data/tiny.gguf", &original.n);
    f.original = original;
    size_t at = 8;
    f.n_tensors = (int)get(&f, &at, 8);
    f.n_keys = (int)get(&f, &at, 8);
    for (int i = 0; i < f.n_keys; i++) {
        size_t begin = at;
        at += get(&f, &at, 8);
        uint32_t type = (uint32_t)get(&f, &at, 4);
        skip_value(&f, &at, type);
        push(&f.key[i], original.p + begin, at - begin);
    }
    for (int i = 0; i < f.n_tensors; i++) {
        info *t = &f.tensor[i];
        size_t n = get(&f, &at, 8);
        memcpy(t->name, original.p + at, n);
        at += n;
        t->n_dims = (uint32_t)get(&f, &at, 4);
        for (uint32_t k = 0; k < t->n_dims; k++) t->ne[k] = get(&f, &at, 8);
        t->type = (uint32_t)get(&f, &at, 4);
        t->offset = get(&f, &at, 8);
    }
    f.data = (at + 31) / 32 * 32;
    f.n_data = original.n - f.data;
    return f;
}

static void throw_away(image *f)
{
    for (int i = 0; i < f->n_keys; i++) free(f->key[i].p);
}

static bytes put_together(const image *f)
{
    bytes b = { NULL, 0 };
    push(&b, "GGUF", 4);
    push_int(&b, f->version, 4);
    push_int(&b, f->n_tensors, 8);
    push_int(&b, f->n_keys, 8);
    for (int i = 0; i < f->n_keys; i++) push(&b, f->key[i].p, f->key[i].n);
    for (int i = 0; i < f->n_tensors; i++) {
        const info *t = &f->tensor[i];
        push_string(&b, t->name);
        push_int(&b, t->n_dims, 4);
        for (uint32_t k = 0; k < t->n_dims; k++) push_int(&b, t->ne[k], 8);
        push_int(&b, t->type, 4);
        push_int(&b, t->offset, 8);
    }
    while (b.n % 32) push_int(&b, 0, 1);
    push(&b, f->original.p + f->data, f->n_data);
    return b;
}

/* ---- Changing them --------------------------------------------------------------------------- */

static int key_index(const image *f, const char *key)
{
    for (int i = 0; i < f->n_keys; i++)
        if (f->key[i].p[0] == strlen(key) && !memcmp(f->key[i].p + 8, key, strlen(key))) return i;
    return -1;
}

static void drop_key(image *f, const char *key)
{
    int i = key_index(f, key);
    if (i < 0) return;
    free(f->key[i].p);
    f->key[i] = f->key[--f->n_keys];
}

/* The bytes of a new key up to its value; the caller pushes that. */
static bytes *add_key(image *f, const char *key, int type)
{
    bytes *b = &f->key[f->n_keys++];
    *b = (bytes){ NULL, 0 };
    push_string(b, key);
    push_int(b, type, 4);
    return b;
}

static void set_u32(image *f, const char *key, uint32_t x)
{
    drop_key(f, key);
    push_int(add_key(f, key, KV_U32), x, 4);
}

static void set_float(image *f, const char *key, float x)
{
    drop_key(f, key);
    push_int(add_key(f, key, KV_F32), bits_of(x), 4);
}

static void set_string(image *f, const char *key, const char *x)
{
    drop_key(f, key);
    push_string(add_key(f, key, KV_STRING), x);
}

static bytes *set_array(image *f, const char *key, int element, uint64_t n)
{
    drop_key(f, key);
    bytes *b = add_key(f, key, KV_ARRAY);
    push_int(b, element, 4);
    push_int(b, n, 8);
    return b;
}

static info *tensor_of(image *f, const char *name)
{
    for (int i = 0; i < f->n_tensors; i++)
        if (!strcmp(f->tensor[i].name, name)) return &f->tensor[i];
    return NULL;
}

static void drop_tensor(image *f, const char *name)
{
    *tensor_of(f, name) = f->tensor[f->n_tensors - 1];
    f->n_tensors--;
}

static info *add_tensor(image *f, const char *name, uint32_t type, uint64_t n)
{
    info *t = &f->tensor[f->n_tensors++];
    *t = (info){ .n_dims = 1, .type = type, .ne = { n } };
    snprintf(t->name, sizeof t->name, "%s", name);
    return t;
}

/* ---- Opening them ---------------------------------------------------------------------------- */

/* The file must stay while the model is used: it is freed with the image's next one. */
static bytes last;

static gemma3_model *open_image(image *f, gemma3_error *err)
{
    free(last.p);
    last = put_together(f);
    last.p = realloc(last.p, last.n); /* not a byte more */
    throw_away(f);
    err->text[0] = 0;
    return gemma3_open_memory(last.p, last.n, "x.gguf", NULL, err);
}

/* Refused with exactly this sentence. */
/* With a sentence, and, where nobody wants to know why, without. */
static void refused(image f, const char *what, const char *sentence)
{
    gemma3_error err;
    gemma3_model *m = open_image(&f, &err);
    int unsaid = !gemma3_open_memory(last.p, last.n, "x.gguf", NULL, NULL);
    if (!ok(!m && unsaid && !strcmp(err.text, sentence), "%s is refused", what)) {
        diag("  got  %s", m ? "a model" : err.text);
        diag("  want %s", sentence);
    }
    gemma3_close(m);
}

static gemma3_model *accepted(image f, const char *what)
{
    gemma3_error err;
    gemma3_model *m = open_image(&f, &err);
    if (!ok(m != NULL, "%s is accepted", what)) diag("  %s", err.text);
    return m;
}

/* Logits after the second of two ids, in default mode. */
static int compute(const gemma3_model *m, float *logits)
{
    gemma3_params p = gemma3_default_params(m);
    int n_vocab = gemma3_model_config(m)->n_vocab, row = 1;
    const int32_t ids[2] = { 3 % n_vocab, n_vocab - 1 };
    p.n_ctx = 16;
    gemma3_state *s = gemma3_state_new(m, &p, NULL);
    int failed = !s || gemma3_forward(s, ids, 2, &row, 1, logits);
    gemma3_state_free(s);
    return failed;
}

/* Opens and computes what tiny.gguf itself does. */
static void same_as_tiny(image f, const char *what)
{
    static float want[443], got[443];
    if (want[0] == 0) {
        gemma3_model *m = accepted(take_apart(), "the unchanged file");
        ok(m && !compute(m, want), "and computes");
        gemma3_close(m);
    }
    gemma3_model *m = accepted(f, what);
    memset(got, 0, sizeof got);
    if (m && !compute(m, got)) is_bits(got, want, sizeof got, "and computes the same");
    gemma3_close(m);
}

/* ---- Headers --------------------------------------------------------------------------------- */

static void every_truncation_is_noticed(void)
{
    image f = take_apart();
    size_t wrong = 0, n_tried = 0;
    for (size_t n = 0; n < f.original.n; n += n < f.data + 64 ? 1 : 397) {
        unsigned char *p = malloc(n ? n : 1);
        gemma3_error err = { "" };
        memcpy(p, f.original.p, n);
        gemma3_model *m = gemma3_open_memory(p, n, "x.gguf", NULL, &err);
        const char *want = n < 4 ? "x.gguf is not a GGUF file" : "x.gguf is truncated: ";
        if (m || strncmp(err.text, want, strlen(want))) {
            if (!wrong++) diag("cut to %zu bytes: %s", n, m ? "opens" : err.text);
        }
        gemma3_close(m);
        free(p);
        n_tried++;
    }
    is_int(wrong, 0, "a file cut short at any of %zu places is refused as truncated", n_tried);
    throw_away(&f);
}

static void refused_bytes(const char *p, size_t n, const char *what, const char *sentence)
{
    gemma3_error err = { "" };
    char *exact = malloc(n);
    memcpy(exact, p, n);
    gemma3_model *m = gemma3_open_memory(exact, n, "x.gguf", NULL, &err);
    int unsaid = !gemma3_open_memory(exact, n, "x.gguf", NULL, NULL);
    if (!ok(!m && unsaid && !strcmp(err.text, sentence), "%s is refused", what))
        diag("  got %s", err.text);
    gemma3_close(m);
    free(exact);
}

static void no_file_at_all(void)
{
    gemma3_error err = { "" };
    ok(!gemma3_open(NULL, NULL, &err) && !strcmp(err.text, "no path of a model was given"),
       "no path is refused");
    ok(!gemma3_open_memory("GGML", 4, NULL, NULL, &err) &&
           !strncmp(err.text, "a model in memory is not", 24),
       "a file in memory needs no name");
    ok(!gemma3_open_memory(NULL, 0, "x.gguf", NULL, &err) &&
           !strncmp(err.text, "x.gguf is not a GGUF file", 25),
       "nothing in memory is refused");
}

/* The reason is at the end of the sentence: a long path must leave room for it. */
static void long_paths(void)
{
    char path[3000];
    gemma3_error err = { "" };
    for (int i = 0; i < 1400; i++) memcpy(path + 2 * i, "\xc3\xa4", 2);
    for (int shift = 0; shift < 2; shift++) {
        strcpy(path + 2800, &"/my.gguf"[shift]);
        ok(!gemma3_open_memory("GGML", 4, path, NULL, &err) &&
               !strncmp(err.text, "...\xc3\xa4", 5) &&
               strstr(err.text, "my.gguf is not a GGUF file: it does not begin with \"GGUF\""),
           "a long path is shortened");
        ok(!gemma3_open(path, NULL, &err) && strstr(err.text, "my.gguf cannot be opened: "),
           "a longer one too");
    }
}

static void headers(void)
{
    image f;
    refused_bytes("GGML\3\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 24, "another magic",
                  "x.gguf is not a GGUF file: it does not begin with \"GGUF\"");
    refused_bytes("GGUF\1\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 24, "version 1",
                  "x.gguf: GGUF version 1, expected 2 or 3");
    refused_bytes("GGUF\0\0\0\3\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 24, "a big-endian file",
                  "x.gguf: GGUF version 50331648 (a big-endian file), expected 2 or 3");
    refused_bytes("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 24, "a file of nothing",
                  "x.gguf: general.architecture is missing, expected \"gemma3\"");
    refused_bytes("GGUF\3\0\0\0\377\377\377\377\377\377\377\377\0\0\0\0\0\0\0\0", 24,
                  "a header with 2^64-1 tensors",
                  "x.gguf is truncated: its header promises 0 keys and 18446744073709551615 "
                  "tensors");
    refused_bytes("GGUF\3\0\0\0\0\0\0\0\0\0\0\0\377\377\377\377\377\377\377\177", 24,
                  "a header with 2^63-1 keys",
                  "x.gguf is truncated: its header promises 9223372036854775807 keys and 0 "
                  "tensors");

    f = take_apart();
    f.version = 2;
    same_as_tiny(f, "version 2");
    f = take_apart();
    set_u32(&f, "general.alignment", 24);
    refused(f, "an alignment of 24", "x.gguf: general.alignment must be a u32 power of two");
    f = take_apart();
    set_string(&f, "general.alignment", "32");
    refused(f, "an alignment in words", "x.gguf: general.alignment must be a u32 power of two");
    f = take_apart();
    push_int(add_key(&f, "gemma3.block_count", KV_U32), 8, 4);
    refused(f, "a key that occurs twice", "x.gguf: key gemma3.block_count occurs twice");
    f = take_apart();
    f.tensor[f.n_tensors++] = *tensor_of(&f, "blk.3.ffn_up.weight");
    refused(f, "a tensor that occurs twice", "x.gguf: tensor blk.3.ffn_up.weight occurs twice");
}

/* What people have in their hands instead of a GGUF file, by how it begins. */
static void files_of_other_kinds(void)
{
    const struct { const char *begin; size_t n; const char *what, *sentence; } file[] = {
        { "version https://git-lfs.github.com/spec/v1\n", 43, "a Git LFS pointer",
          "is a Git LFS pointer: get the file itself (git lfs pull)" },
        { "<!DOCTYPE html><html></html>", 28, "a web page",
          "is a web page: the download failed, or asked for a login" },
        { "<html><head><title>401</title>", 30, "another web page",
          "is a web page: the download failed, or asked for a login" },
        { "\x40\0\0\0\0\0\0\0{\"__metadata__\":{}}", 26, "a safetensors file",
          "is a safetensors file: convert it to GGUF (llama.cpp's convert_hf_to_gguf.py)" },
        { "PK\3\4xxxxxxxxxxxxxxxxxxxxxxxx", 28, "a PyTorch checkpoint",
          "is a zip archive or a PyTorch file: unpack it, or convert it to GGUF" },
        { "\x80\2}q\1xxxxxxxxxxxxxxxxxxxxxxxx", 28, "an old PyTorch checkpoint",
          "is a PyTorch file: convert it to GGUF" },
        { "\x1f\x8b\x08xxxxxxxxxxxxxxxxxxxxxxxx", 27, "a file packed by gzip",
          "is compressed with gzip: unpack it" },
        { "PK\3", 3, "a file of three bytes", "does not begin with \"GGUF\"" },
    };
    for (size_t i = 0; i < sizeof file / sizeof *file; i++) {
        char want[256];
        snprintf(want, sizeof want, "x.gguf is not a GGUF file: it %s", file[i].sentence);
        refused_bytes(file[i].begin, file[i].n, file[i].what, want);
    }
    image f = take_apart();
    set_string(&f, "general.architecture", "clip");
    refused(f, "an image encoder",
            "x.gguf is only a model's image encoder (mmproj): give the text model's file");
}

/* A header of n keys; the last has the name of the first. */
static void many_keys(void)
{
    enum { N = 100000 };
    bytes b = { NULL, 0 };
    b.p = malloc(N * 32), b.n = 0;
    memcpy(b.p, "GGUF\3\0\0\0\0\0\0\0\0\0\0\0", 16);
    for (int i = 0; i < 8; i++) b.p[16 + i] = (unsigned char)((uint64_t)N >> 8 * i);
    b.n = 24;
    for (int i = 0; i < N; i++) {
        char key[16];
        snprintf(key, sizeof key, "k%06d", i == N - 1 ? 0 : (i * 7919) % N);
        memcpy(b.p + b.n, "\7\0\0\0\0\0\0\0", 8);
        memcpy(b.p + b.n + 8, key, 7);
        memcpy(b.p + b.n + 15, "\0\0\0\0\1", 5);
        b.n += 20;
    }
    clock_t begin = clock();
    refused_bytes((char *)b.p, b.n, "one of 100,000 keys that occurs twice",
                  "x.gguf: key k000000 occurs twice");
    ok(clock() - begin < 5 * CLOCKS_PER_SEC, "that takes no time");
    free(b.p);
}

/* Counts and lengths that point behind the file. */
static void lying_lengths(void)
{
    const uint64_t lies[] = { 1000000, 1ull << 32, 1ull << 61, 1ull << 62, 1ull << 63, UINT64_MAX };
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++)
        for (int element = 0; element <= 12; element++) {
            if (element == KV_ARRAY) continue;
            image f = take_apart();
            set_array(&f, "some.array", element, lies[i]);
            gemma3_error err;
            gemma3_model *m = open_image(&f, &err);
            if (m || strcmp(err.text, "x.gguf is truncated: it ends inside its header"))
                ok(0, "an array of %llu elements of type %d: %s", (unsigned long long)lies[i],
                   element, m ? "opens" : err.text);
            gemma3_close(m);
        }
    ok(1, "arrays longer than the file are tried");
    image f = take_apart();
    push_int(add_key(&f, "some.text", KV_STRING), UINT64_MAX - 3, 8);
    refused(f, "a string longer than the file", "x.gguf is truncated: it ends inside its header");
    f = take_apart();
    push_int(add_key(&f, "some.thing", 13), 0, 8);
    refused(f, "an unknown type of value",
            "x.gguf: key some.thing has value type 13, which is not one of GGUF's");
    f = take_apart();
    set_array(&f, "some.arrays", KV_ARRAY, 0);
    refused(f, "an array of arrays",
            "x.gguf: key some.arrays is an array of arrays, which is not supported");
}

/* ---- Other models ---------------------------------------------------------------------------- */

static void other_models(void)
{
    image f = take_apart();
    set_string(&f, "general.architecture", "llama");
    refused(f, "another architecture",
            "x.gguf: general.architecture is \"llama\", expected \"gemma3\"");
    f = take_apart();
    set_string(&f, "general.architecture", "gemma3n");
    refused(f, "a near relative",
            "x.gguf: general.architecture is \"gemma3n\", expected \"gemma3\"");
    f = take_apart();
    set_u32(&f, "general.architecture", 3);
    refused(f, "an architecture that is a number",
            "x.gguf: key general.architecture is a u32, expected a string");
    f = take_apart();
    set_float(&f, "gemma3.rope.scaling.type", 8);
    refused(f, "a scaling of RoPE that is a number",
            "x.gguf: key gemma3.rope.scaling.type is a f32, expected a string");
    f = take_apart();
    set_u32(&f, "split.count", 3);
    refused(f, "the first part of a split model",
            "x.gguf is one of 3 parts of a split model: merge them first (llama-gguf-split "
            "--merge)");
    f = take_apart();
    drop_key(&f, "general.architecture"); /* later parts have no keys of the model's */
    set_u32(&f, "split.count", 3);
    refused(f, "a later part of a split model",
            "x.gguf is one of 3 parts of a split model: merge them first (llama-gguf-split "
            "--merge)");
    f = take_apart();
    set_u32(&f, "split.count", 1);
    same_as_tiny(f, "a split of one part");
    f = take_apart();
    add_tensor(&f, "dense.0.weight", 0, 64);
    refused(f, "EmbeddingGemma as Ollama has it", "x.gguf: tensor dense.0.weight belongs to an "
            "embedding model (EmbeddingGemma), not to a Gemma 3 text model");
    f = take_apart();
    add_tensor(&f, "dense_2.weight", 0, 64);
    refused(f, "EmbeddingGemma as llama.cpp has it", "x.gguf: tensor dense_2.weight belongs to an "
            "embedding model (EmbeddingGemma), not to a Gemma 3 text model");
    f = take_apart();
    add_tensor(&f, "blk.0.attn_qkv.weight", 0, 64);
    refused(f, "a fused projection", "x.gguf: tensor blk.0.attn_qkv.weight is a fused projection, "
            "expected attn_q, attn_k and attn_v");
    f = take_apart();
    set_string(&f, "gemma3.rope.scaling.type", "yarn");
    refused(f, "another scaling of RoPE",
            "x.gguf: gemma3.rope.scaling.type is \"yarn\", expected \"linear\"");
}

/* ---- Keys ------------------------------------------------------------------------------------ */

static void without_key(const char *key, const char *sentence)
{
    image f = take_apart();
    drop_key(&f, key);
    refused(f, key, sentence);
}

static void with_key(const char *key, uint32_t value, const char *sentence)
{
    image f = take_apart();
    set_u32(&f, key, value);
    refused(f, key, sentence);
}

static void keys(void)
{
    without_key("gemma3.block_count", "x.gguf: key gemma3.block_count is missing");
    without_key("gemma3.embedding_length", "x.gguf: key gemma3.embedding_length is missing");
    without_key("gemma3.feed_forward_length", "x.gguf: key gemma3.feed_forward_length is missing");
    without_key("gemma3.attention.head_count",
                "x.gguf: key gemma3.attention.head_count is missing");
    without_key("tokenizer.ggml.tokens",
                "x.gguf: key tokenizer.ggml.tokens is missing or no array of strings");
    without_key("tokenizer.ggml.scores",
                "x.gguf: key tokenizer.ggml.scores must be an array of 443 f32");
    with_key("gemma3.block_count", 129,
             "x.gguf: key gemma3.block_count is 129, expected an integer from 1 to 128");
    with_key("gemma3.embedding_length", 0,
             "x.gguf: key gemma3.embedding_length is 0, expected an integer from 1 to 65536");
    with_key("gemma3.attention.head_count", UINT32_MAX,
             "x.gguf: key gemma3.attention.head_count is 4294967295, expected an integer from 1 to "
             "1024");
    with_key("gemma3.attention.head_count_kv", 3,
             "x.gguf: 4 query heads do not divide into 3 key-value heads");
    with_key("gemma3.attention.key_length", 31,
             "x.gguf: heads of 31 elements, expected an even number");
    with_key("gemma3.attention.value_length", 16,
             "x.gguf: gemma3.attention.value_length is 16, expected key_length's 32");
    with_key("gemma3.block_count", 9, "x.gguf: tensor blk.8.attn_norm.weight is missing");
    with_key("gemma3.feed_forward_length", 128,
             "x.gguf: tensor blk.0.ffn_gate.weight is [96][64], expected [128][64]");
    with_key("tokenizer.ggml.eos_token_id", 443,
             "x.gguf: key tokenizer.ggml.eos_token_id is 443, outside the vocabulary of 443");

    image f = take_apart();
    bytes *b = set_array(&f, "tokenizer.ggml.tokens", KV_STRING, 443);
    for (int i = 0; i < 443; i++) {
        static char text[1026];
        memset(text, 'a', 1025);
        text[i == 7 ? 1025 : 1] = 0;
        push_string(b, text);
    }
    refused(f, "a token of 1025 bytes",
            "x.gguf: key tokenizer.ggml.tokens: token 7 has 1025 bytes, expected at most 1024");
    f = take_apart();
    set_float(&f, "tokenizer.ggml.bos_token_id", 2.5f);
    refused(f, "half an id", "x.gguf: key tokenizer.ggml.bos_token_id is 2.5, expected an integer");
    f = take_apart();
    set_string(&f, "tokenizer.ggml.model", "gpt2");
    refused(f, "another kind of tokenizer",
            "x.gguf: tokenizer.ggml.model is \"gpt2\", expected \"llama\"");
    f = take_apart();
    set_u32(&f, "tokenizer.ggml.model", 1);
    refused(f, "a kind of tokenizer that is a number",
            "x.gguf: key tokenizer.ggml.model is a u32, expected a string");
    f = take_apart();
    set_string(&f, "gemma3.block_count", "8");
    refused(f, "a number in words",
            "x.gguf: key gemma3.block_count is a string, expected a number");
    f = take_apart();
    set_float(&f, "gemma3.block_count", 7.5f);
    refused(f, "half a layer",
            "x.gguf: key gemma3.block_count is 7.5, expected an integer from 1 to 128");
    f = take_apart();
    set_float(&f, "gemma3.rope.freq_base", -1);
    refused(f, "a negative RoPE base",
            "x.gguf: key gemma3.rope.freq_base is -1, expected a number from 1 to 1e30");
    f = take_apart();
    set_float(&f, "gemma3.rope.freq_base_swa", 1e-38f);
    refused(f, "a RoPE base whose angles grow beyond all bounds",
            "x.gguf: key gemma3.rope.freq_base_swa is 1e-38, expected a number from 1 to 1e30");
    f = take_apart();
    set_float(&f, "gemma3.rope.scaling.factor", 1e-30f);
    refused(f, "a RoPE factor that does the same", "x.gguf: gemma3.rope.scaling.factor is 1e-30, "
            "expected at least 1/128 (angles must stay below 2^31)");
    f = take_apart();
    set_float(&f, "gemma3.rope.scaling.factor", 0x1p-7f);
    gemma3_close(accepted(f, "a RoPE factor of 1/128"));
    f = take_apart();
    set_float(&f, "gemma3.attention.layer_norm_rms_epsilon", float_of(0x7f800000));
    refused(f, "an infinite epsilon", "x.gguf: key gemma3.attention.layer_norm_rms_epsilon is inf, "
            "expected a number from 0 to 1e30");
    f = take_apart();
    set_float(&f, "gemma3.attention.layer_norm_rms_epsilon", 0);
    refused(f, "no epsilon",
            "x.gguf: key gemma3.attention.layer_norm_rms_epsilon is 0, expected more");
    f = take_apart();
    push_int(set_array(&f, "gemma3.attention.sliding_window_pattern", KV_BOOL, 7), 0, 7);
    refused(f, "a pattern of 7 layers for 8",
            "x.gguf: gemma3.attention.sliding_window_pattern must have one bool for each of 8 "
            "layers");
    f = take_apart();
    push_int(set_array(&f, "tokenizer.ggml.scores", KV_F32, 1), 0, 4);
    refused(f, "one score for all tokens",
            "x.gguf: key tokenizer.ggml.scores must be an array of 443 f32");
    f = take_apart();
    push_int(set_array(&f, "tokenizer.ggml.token_type", KV_I32, 1), 0, 4);
    refused(f, "one type for all tokens",
            "x.gguf: key tokenizer.ggml.token_type must be an array of 443 i32");
}

/* ---- Tensors --------------------------------------------------------------------------------- */

static void tensors(void)
{
    image f = take_apart();
    drop_tensor(&f, "blk.7.attn_q_norm.weight");
    refused(f, "a missing norm", "x.gguf: tensor blk.7.attn_q_norm.weight is missing");
    f = take_apart();
    drop_tensor(&f, "token_embd.weight");
    refused(f, "no embedding", "x.gguf: tensor token_embd.weight is missing");
    f = take_apart();
    tensor_of(&f, "blk.2.attn_v.weight")->type = 16;
    refused(
        f, "a type that we do not have",
        "x.gguf: tensor blk.2.attn_v.weight has type IQ2_XXS, "
        "which is not supported (F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K to Q6_K IQ4_NL IQ4_XS "
        "are)");
    f = take_apart();
    tensor_of(&f, "blk.2.attn_v.weight")->type = UINT32_MAX;
    refused(f, "type 2^32-1",
            "x.gguf: tensor blk.2.attn_v.weight has type 4294967295, which is not supported (F32 "
            "F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K to Q6_K IQ4_NL IQ4_XS are)");
    f = take_apart();
    tensor_of(&f, "blk.2.attn_v.weight")->type = 12;
    refused(f, "a K type with short rows", "x.gguf: tensor blk.2.attn_v.weight has rows of 64, "
            "expected a multiple of Q4_K's block of 256");
    f = take_apart();
    tensor_of(&f, "blk.0.attn_norm.weight")->type = 8;
    refused(f, "an integer norm",
            "x.gguf: tensor blk.0.attn_norm.weight has type Q8_0, expected F32");
    f = take_apart();
    tensor_of(&f, "blk.1.ffn_down.weight")->ne[0] = 64;
    refused(f, "a wrong shape",
            "x.gguf: tensor blk.1.ffn_down.weight is [64][64], expected [64][96]");
    f = take_apart();
    tensor_of(&f, "token_embd.weight")->ne[0] = 32;
    refused(f, "an embedding of another width",
            "x.gguf: tensor token_embd.weight is [443][32], expected [any number of tokens][64]");
    f = take_apart();
    tensor_of(&f, "token_embd.weight")->ne[1] = 1ull << 60;
    refused(f, "an embedding of 2^60 tokens", "x.gguf: tensor token_embd.weight is "
            "[1152921504606846976][64], expected [any number of tokens][64]");
    f = take_apart();
    info *wide = tensor_of(&f, "blk.1.ffn_down.weight");
    wide->n_dims = 3, wide->ne[2] = 2;
    refused(f, "a third dimension",
            "x.gguf: tensor blk.1.ffn_down.weight is [2][64][96], expected [64][96]");
    f = take_apart();
    wide = tensor_of(&f, "blk.1.ffn_down.weight");
    wide->n_dims = 4, wide->ne[2] = 1, wide->ne[3] = 3;
    refused(f, "a fourth dimension",
            "x.gguf: tensor blk.1.ffn_down.weight is [3][1][64][96], expected [64][96]");
    f = take_apart();
    tensor_of(&f, "output_norm.weight")->n_dims = 5;
    refused(f, "five dimensions",
            "x.gguf: tensor output_norm.weight has 5 dimensions, expected 1 to 4");
    f = take_apart();
    tensor_of(&f, "output_norm.weight")->n_dims = 3;
    tensor_of(&f, "output_norm.weight")->ne[1] = 1;
    tensor_of(&f, "output_norm.weight")->ne[2] = 1;
    same_as_tiny(f, "a vector in three dimensions");
    f = take_apart();
    tensor_of(&f, "blk.0.attn_norm.weight")->offset += 4;
    refused(f, "an offset between the lines",
            "x.gguf: tensor blk.0.attn_norm.weight is at offset 30148, expected a multiple of 32");
    f = take_apart();
    tensor_of(&f, "output_norm.weight")->offset = f.n_data / 32 * 32;
    refused(f, "an offset at the end of the file", "x.gguf is truncated: tensor output_norm.weight "
            "ends 256 bytes past the end of the file");
    f = take_apart();
    tensor_of(&f, "output_norm.weight")->offset = UINT64_MAX - 31;
    gemma3_error err;
    gemma3_model *m = open_image(&f, &err);
    ok(!m && strstr(err.text, "output_norm.weight"), "an offset of nearly 2^64 is refused");
    gemma3_close(m);
    f = take_apart();
    tensor_of(&f, "blk.1.ffn_up.weight")->offset = tensor_of(&f, "blk.1.ffn_gate.weight")->offset;
    gemma3_close(accepted(f, "a file whose tensors share their bytes"));
}

/* ---- What published files do ----------------------------------------------------------------- */

static void quirks(void)
{
    image f = take_apart();
    drop_key(&f, "gemma3.attention.layer_norm_rms_epsilon");
    same_as_tiny(f, "a file without epsilon (1e-6)");
    f = take_apart();
    drop_key(&f, "gemma3.attention.head_count_kv");
    drop_key(&f, "gemma3.attention.key_length");
    drop_key(&f, "gemma3.attention.value_length");
    same_as_tiny(f, "a file whose heads are known by shapes alone");
    f = take_apart();
    drop_key(&f, "gemma3.rope.freq_base");
    drop_key(&f, "gemma3.rope.freq_base_swa");
    same_as_tiny(f, "a file without RoPE bases (1e6, 1e4)");
    f = take_apart();
    drop_key(&f, "gemma3.rope.scaling.type");
    drop_key(&f, "gemma3.rope.scaling.factor");
    set_float(&f, "gemma3.rope.scale_linear", 8);
    same_as_tiny(f, "the old name of the factor");
    f = take_apart();
    drop_key(&f, "gemma3.rope.freq_base");
    drop_key(&f, "gemma3.rope.freq_base_swa");
    set_float(&f, "gemma3.rope.global.freq_base", 1e6f);
    set_float(&f, "gemma3.rope.local.freq_base", 1e4f);
    same_as_tiny(f, "Ollama's names of the bases");
    f = take_apart();
    push(set_array(&f, "gemma3.attention.sliding_window_pattern", KV_BOOL, 8),
         "\1\1\1\1\1\0\1\1", 8);
    same_as_tiny(f, "Ollama's pattern, a bool for each layer");
    f = take_apart();
    set_u32(&f, "gemma3.attention.sliding_window_pattern", 6);
    same_as_tiny(f, "a pattern that is a number");
    f = take_apart();
    f.tensor[0].ne[f.tensor[0].n_dims++] = 1;
    same_as_tiny(f, "an embedding with a third dimension of 1");
    f = take_apart();
    set_string(&f, "tokenizer.ggml.model", "llama");
    drop_key(&f, "tokenizer.ggml.token_type");
    same_as_tiny(f, "a file without token types");
    f = take_apart();
    add_tensor(&f, "v.patch_embd.weight", 99, 12345)->offset = 1ull << 40;
    add_tensor(&f, "mm.input_projection.weight", 1, 64)->ne[0] = 7;
    set_u32(&f, "gemma3.vision.block_count", 27);
    same_as_tiny(f, "a file with an image tower, which is not looked at,");
    f = take_apart();
    add_tensor(&f, "rope_freqs.weight", 0, 64);
    same_as_tiny(f, "a tensor that nobody asks for");
    f = take_apart();
    for (int i = 0, n = f.n_tensors; i < n / 2; i++) {
        info t = f.tensor[i];
        f.tensor[i] = f.tensor[n - 1 - i], f.tensor[n - 1 - i] = t;
    }
    same_as_tiny(f, "a file with its tensors in another order");
}

static void quirks_of_config(void)
{
    image f = take_apart();
    drop_key(&f, "gemma3.attention.sliding_window");
    gemma3_model *m = accepted(f, "a file of 8 layers without window");
    int n_local = 0;
    for (int l = 0; m && l < 8; l++) n_local += gemma3_model_config(m)->is_local[l];
    is_int(n_local, 0, "all its layers are global");
    gemma3_close(m);
    f = take_apart();
    set_u32(&f, "gemma3.attention.sliding_window_pattern", 2);
    m = accepted(f, "a pattern of 2");
    const uint8_t pattern[8] = { 1, 0, 1, 0, 1, 0, 1, 0 };
    if (m) is_bits(gemma3_model_config(m)->is_local, pattern, 8, "every second layer is global");
    gemma3_close(m);
    f = take_apart();
    set_string(&f, "gemma3.rope.scaling.type", "none");
    m = accepted(f, "scaling \"none\"");
    ok(m && gemma3_model_config(m)->rope_factor == 1, "has factor 1 whatever the other key says");
    gemma3_close(m);
    f = take_apart();
    drop_key(&f, "gemma3.context_length");
    m = accepted(f, "a file without context length");
    if (m) is_int(gemma3_model_config(m)->n_ctx_train, 32768, "has 32,768 tokens");
    gemma3_close(m);
}

/* Token types are forced by text: here all of them are NORMAL, as in Google's own files. */
static void quirks_of_vocabulary(void)
{
    image f = take_apart();
    bytes *b = set_array(&f, "tokenizer.ggml.token_type", KV_I32, 443);
    for (int i = 0; i < 443; i++) push_int(b, 1, 4);
    drop_key(&f, "tokenizer.ggml.eos_token_id");
    drop_key(&f, "tokenizer.ggml.add_bos_token");
    gemma3_model *m = accepted(f, "a file with every token NORMAL and no eos_token_id");
    if (!m) return;
    const gemma3_tokenizer *t = gemma3_model_tokenizer(m);
    const char turn[] = "<end_of_turn>\xff";
    int32_t ids[32];
    int n = gemma3_encode(t, turn, 14, GEMMA3_BOS | GEMMA3_SPECIAL, ids, 32);
    ok(n == 3 && ids[0] == 3 && ids[1] == 261 && ids[2] == 4 + 255,
       "<bos>, <end_of_turn> and bytes are what their texts say");
    ok(gemma3_is_stop(t, 0) && gemma3_is_stop(t, 261) && !gemma3_is_stop(t, 260),
       "an answer ends with <eos> and <end_of_turn>");
    gemma3_close(m);

    f = take_apart();
    drop_key(&f, "tokenizer.ggml.bos_token_id");
    drop_key(&f, "tokenizer.ggml.model");
    m = accepted(f, "a file without bos_token_id and without tokenizer.ggml.model");
    if (m)
        is_int(gemma3_tokenizer_vocab(gemma3_model_tokenizer(m))->bos, 3, "has <bos> by its text");
    gemma3_close(m);

    f = take_apart();
    set_u32(&f, "tokenizer.ggml.eos_token_id", 300);
    m = accepted(f, "a file with another eos_token_id");
    t = m ? gemma3_model_tokenizer(m) : NULL;
    ok(t && gemma3_is_stop(t, 0) && gemma3_is_stop(t, 261) && gemma3_is_stop(t, 300),
       "an answer ends with that too");
    gemma3_close(m);

    f = take_apart();
    tensor_of(&f, "token_embd.weight")->ne[1] = 440;
    m = accepted(f, "a file with more tokens than rows of the embedding");
    if (m) is_int(gemma3_model_config(m)->n_vocab, 440, "has the smaller number of them");
    gemma3_close(m);
}

static int stops_at(const gemma3_model *m, int32_t id)
{
    return gemma3_is_stop(gemma3_model_tokenizer(m), id);
}

/* Every key that names the end of an answer, and arrays of them. */
static void ends_of_answers(void)
{
    image f = take_apart();
    set_u32(&f, "tokenizer.ggml.eot_token_id", 301);
    set_u32(&f, "tokenizer.ggml.eom_token_id", 302);
    bytes *b = set_array(&f, "tokenizer.ggml.eos_token_ids", KV_I32, 2);
    push_int(b, 303, 4), push_int(b, 304, 4);
    gemma3_model *m = accepted(f, "a file with eot_token_id, eom_token_id and eos_token_ids");
    ok(m && stops_at(m, 0) && stops_at(m, 301) && stops_at(m, 302) && stops_at(m, 303) &&
       stops_at(m, 304) && !stops_at(m, 305), "an answer ends with each of them");
    gemma3_close(m);
    f = take_apart();
    b = set_array(&f, "tokenizer.ggml.eos_token_id", KV_U32, 2);
    push_int(b, 310, 4), push_int(b, 311, 4);
    m = accepted(f, "an eos_token_id that is an array");
    ok(m && stops_at(m, 310) && stops_at(m, 311), "an answer ends with both");
    if (m) is_int(gemma3_tokenizer_vocab(gemma3_model_tokenizer(m))->eos, 310, "the first is eos");
    gemma3_close(m);
    f = take_apart();
    b = set_array(&f, "tokenizer.ggml.eos_token_ids", KV_U32, 17);
    for (int i = 0; i < 17; i++) push_int(b, i, 4);
    refused(f, "more of them than anybody needs",
            "x.gguf: key tokenizer.ggml.eos_token_ids has 17 ids, expected at most 15");
    f = take_apart();
    push_string(set_array(&f, "tokenizer.ggml.eos_token_ids", KV_STRING, 1), "<eos>");
    refused(f, "ids that are texts",
            "x.gguf: key tokenizer.ggml.eos_token_ids is a array, expected a number");
    f = take_apart();
    set_u32(&f, "tokenizer.ggml.eot_token_id", 443);
    refused(f, "an end that is no token",
            "x.gguf: key tokenizer.ggml.eot_token_id is 443, outside the vocabulary of 443");
}

/* ---- Keys that lie --------------------------------------------------------------------------- */

/* A file of 270M's layers and width, narrow elsewhere; all its tensors are the same bytes. */
static image of_270m_shape(void)
{
    static const struct { const char *name; uint64_t cols, rows;
    } per_layer[] = {{"attn_norm", 640, 0},    {"attn_q", 640, 32},
                     {"attn_k", 640, 32},      {"attn_v", 640, 32},
                     {"attn_q_norm", 32, 0},   {"attn_k_norm", 32, 0},
                     {"attn_output", 32, 640}, {"post_attention_norm", 640, 0},
                     {"ffn_norm", 640, 0},     {"ffn_gate", 640, 32},
                     {"ffn_up", 640, 32},      {"ffn_down", 32, 640},
                     {"post_ffw_norm", 640, 0}};
    image f = take_apart();
    f.n_tensors = 0;
    add_tensor(&f, "output_norm.weight", F32, 640);
    info *e = add_tensor(&f, "token_embd.weight", Q4_0, 640);
    e->n_dims = 2, e->ne[1] = 64;
    for (int l = 0; l < 18; l++)
        for (int k = 0; k < 13; k++) {
            char name[80];
            snprintf(name, sizeof name, "blk.%d.%s.weight", l, per_layer[k].name);
            info *t = add_tensor(&f, name, per_layer[k].rows ? Q4_0 : F32, per_layer[k].cols);
            if (per_layer[k].rows) t->n_dims = 2, t->ne[1] = per_layer[k].rows;
        }
    set_u32(&f, "gemma3.block_count", 18);
    set_u32(&f, "gemma3.embedding_length", 640);
    set_u32(&f, "gemma3.feed_forward_length", 32);
    set_u32(&f, "gemma3.attention.head_count", 1);
    set_u32(&f, "gemma3.attention.head_count_kv", 1);
    set_u32(&f, "gemma3.attention.sliding_window", 512);
    drop_key(&f, "gemma3.rope.scaling.factor");
    return f;
}

static void true_keys(void)
{
    image f = of_270m_shape();
    gemma3_model *m = accepted(f, "a file of 270M's shape");
    if (!m) return;
    ok(!strcmp(gemma3_model_info(m)->release, "270M"), "it is recognised");
    ok(!gemma3_model_note(m, 0), "there is nothing to say about its keys");
    ok(!strcmp(gemma3_model_origin(m, "attention.sliding_window"), ""), "the window is the file's");
    ok(!strcmp(gemma3_model_origin(m, "gemma3.rope.scaling.factor"), "default"),
       "the factor, which it does not have, is a default");
    ok(gemma3_model_config(m)->rope_factor == 1 &&
           gemma3_model_config(m)->query_scale == 1 / sqrtf(32),
       "and is 270M's");
    gemma3_close(m);
}

/* A key that contradicts the definition: not obeyed, unless asked to. */
static void lie(const char *key, float value, size_t at, int is_int, float definition,
                const char *note)
{
    for (int obey = 0; obey <= 1; obey++) {
        char full[80];
        snprintf(full, sizeof full, "gemma3.%s", key);
        image f = of_270m_shape();
        if (is_int) set_u32(&f, full, (uint32_t)value);
        else set_float(&f, full, value);
        bytes b = put_together(&f);
        gemma3_options o = { .obey_file = obey };
        gemma3_error err = { "" };
        gemma3_model *m = gemma3_open_memory(b.p, b.n, "x.gguf", &o, &err);
        if (!ok(m != NULL, "a file whose %s is %g opens", key, value)) diag("  %s", err.text);
        const char *field = m ? (const char *)gemma3_model_config(m) + at : NULL;
        float got = !m ? 0 : is_int ? (float)*(const int *)field : *(const float *)field;
        ok(got == (obey ? value : definition), obey ? "obey_file obeys it" : "it is not obeyed");
        const char *said = m ? gemma3_model_note(m, 0) : NULL;
        int is_softcap = !strcmp(key, "final_logit_softcapping"); /* which is said even so */
        if (!ok(obey ? is_softcap == (said && strstr(said, "obeyed") != NULL)
                     : said && !strcmp(said, note),
                obey ? "with a note for a softcap alone" : "and a note says so"))
            diag("  got  %s", said ? said : "nothing"), diag("  want %s", note);
        ok(m && !strcmp(gemma3_model_origin(m, key), obey ? "" : "overridden"),
           "its origin is known");
        ok(!m || !gemma3_model_note(m, 1), "no other key is named");
        gemma3_close(m);
        free(b.p);
        throw_away(&f);
    }
}

static void keys_that_lie(void)
{
    true_keys();
    lie("final_logit_softcapping", 30, offsetof(gemma3_config, final_softcap), 0, 0,
        "key gemma3.final_logit_softcapping is 30, but Gemma 3 270M has 0, which is used");
    lie("rope.scaling.factor", 8, offsetof(gemma3_config, rope_factor), 0, 1,
        "key gemma3.rope.scaling.factor is 8, but Gemma 3 270M has 1, which is used");
    lie("rope.freq_base_swa", 1e6f, offsetof(gemma3_config, rope_base_local), 0, 1e4f,
        "key gemma3.rope.freq_base_swa is 1e+06, but Gemma 3 270M has 10000, which is used");
    lie("rope.freq_base", 1e4f, offsetof(gemma3_config, rope_base_global), 0, 1e6f,
        "key gemma3.rope.freq_base is 10000, but Gemma 3 270M has 1e+06, which is used");
    lie("attention.sliding_window", 4096, offsetof(gemma3_config, window), 1, 512,
        "key gemma3.attention.sliding_window is 4096, but Gemma 3 270M has 512, which is used");
    lie("attention.scale", 0.0625f, offsetof(gemma3_config, query_scale), 0, 1 / sqrtf(32),
        "key gemma3.attention.scale is 0.0625, but Gemma 3 270M has 0.176777, which is used");
    image f = take_apart();
    set_float(&f, "gemma3.final_logit_softcapping", 30);
    gemma3_model *m = accepted(f, "a softcap in a shape that nobody published");
    const char *said = m ? gemma3_model_note(m, 0) : NULL;
    ok(m && gemma3_model_config(m)->final_softcap == 30 && said && strstr(said, "it is obeyed") &&
       !strcmp(gemma3_model_info(m)->release, ""), "it is obeyed, and a note says so");
    gemma3_close(m);
}

/* ---- Vocabularies without scores ------------------------------------------------------------- */

static int ids_of(const gemma3_model *m, const char *text, int32_t *ids)
{
    return gemma3_encode(gemma3_model_tokenizer(m), text, strlen(text), GEMMA3_BOS, ids, 256);
}

/* The merges that a converter would write: each piece in order of its score, and each way to cut it
 * into two pieces. */
static uint64_t push_merges(bytes *b, const gemma3_tokenizer *t)
{
    const gemma3_vocab *v = gemma3_tokenizer_vocab(t);
    uint64_t n = 0;
    int32_t *order = malloc(v->n_vocab * sizeof *order);
    for (int32_t i = 0, k; i < v->n_vocab; i++) {
        for (k = i; k > 0 && v->score[order[k - 1]] < v->score[i]; k--) order[k] = order[k - 1];
        order[k] = i;
    }
    for (int i = 0; i < v->n_vocab; i++) {
        const char *text = v->text[order[i]];
        size_t length = v->length[order[i]];
        for (size_t cut = 1; cut < length && v->type[order[i]] == 1; cut++) {
            char pair[GEMMA3_PIECE_MAX + 2];
            int32_t left = gemma3_find(t, text, cut),
                    right = gemma3_find(t, text + cut, length - cut);
            if (left < 0 || right < 0) continue;
            snprintf(pair, sizeof pair, "%.*s %.*s", (int)cut, text, (int)(length - cut),
                     text + cut);
            push_string(b, pair);
            n++;
        }
    }
    free(order);
    return n;
}

static void merges_instead_of_scores(void)
{
    const char *const texts[] = {
        "the cat sat on the mat.", "Once upon a time, there was a little dog.",
        "  spaces   and\n\nlines\t", "other words that are not in there: \xe4\xbd\xa0"};
    image f = take_apart();
    gemma3_model *scores = accepted(take_apart(), "a vocabulary with scores");
    bytes merges = { NULL, 0 };
    uint64_t n = push_merges(&merges, gemma3_model_tokenizer(scores));
    push_string(&merges, "\1 \2"); /* which make no piece */
    n++;
    int32_t want[4][256], got[256];
    int n_want[4];
    for (int i = 0; i < 4; i++) n_want[i] = ids_of(scores, texts[i], want[i]);
    gemma3_close(scores);
    ok(n > 20, "%llu merges make its pieces", (unsigned long long)n);
    set_string(&f, "tokenizer.ggml.model", "gpt2");
    drop_key(&f, "tokenizer.ggml.scores");
    push(set_array(&f, "tokenizer.ggml.merges", KV_STRING, n), merges.p, merges.n);
    gemma3_model *m = accepted(f, "the same one with merges and no scores");
    for (int i = 0; m && i < 4; i++) {
        int n_got = ids_of(m, texts[i], got);
        ok(n_got == n_want[i] && !memcmp(got, want[i], n_got * sizeof *got),
           "text %d has the same ids", i);
    }
    gemma3_close(m);
    free(merges.p);
    f = take_apart();
    set_string(&f, "tokenizer.ggml.model", "gpt2");
    push_string(set_array(&f, "tokenizer.ggml.merges", KV_STRING, 1), "ab");
    refused(f, "a merge of one piece",
            "x.gguf: key tokenizer.ggml.merges: number 0 is no pair of pieces");
    f = take_apart();
    set_string(&f, "tokenizer.ggml.model", "gpt2");
    char longer[GEMMA3_PIECE_MAX + 2] = "a ";
    memset(longer + 2, 'b', GEMMA3_PIECE_MAX - 1);
    push_string(set_array(&f, "tokenizer.ggml.merges", KV_STRING, 1), longer);
    refused(f, "a merge that makes too long a piece",
            "x.gguf: key tokenizer.ggml.merges: number 0 is no pair of pieces");
    f = take_apart();
    set_string(&f, "tokenizer.ggml.model", "gpt2");
    push_string(set_array(&f, "tokenizer.ggml.merges", KV_STRING, 1), "a b");
    bytes *b = set_array(&f, "tokenizer.ggml.tokens", KV_STRING, 443);
    for (int i = 0; i < 443; i++) push_string(b, i % 2 ? "\xc4\xa0the" : "a");
    refused(f, "GPT-2's own vocabulary",
            "x.gguf: tokenizer.ggml.tokens is not Gemma's vocabulary: it has no <0x0A>");
}

/* ---- The caller's memory, and files that are not in memory ----------------------------------- */

static void memory_of_the_caller(void)
{
    for (int i = 0; i < 8; i++) {
        image f = take_apart();
        bytes b = put_together(&f);
        gemma3_source from = { .data = b.p, .size = b.n, .name = "x.gguf" };
        gemma3_options o = {
            .exact = i & 1, .no_repack = i >> 1 & 1, .isa = i & 4 ? "scalar" : NULL};
        gemma3_error err = { "" };
        float want[443], got[443];
        size_t size = gemma3_model_size(&from, &o, &err);
        char *mem = malloc(size + 3), sentence[128]; /* not a byte more: the sanitizers look */
        gemma3_model *m = gemma3_open_memory(b.p, b.n, "x.gguf", &o, &err);
        gemma3_model *here = gemma3_model_init(&from, &o, mem + 3, size, &err);
        if (!ok(m && here, "a model opens in %zu bytes, at any address", size))
            diag("  %s", err.text);
        ok(m && here && !compute(m, want) && !compute(here, got), "and computes");
        is_bits(got, want, sizeof got, "the same");
        gemma3_close(m);
        gemma3_close(here);
        ok(!gemma3_model_init(&from, &o, mem + 3, size / 2, &err), "half of that is refused");
        snprintf(sentence, sizeof sentence, "x.gguf needs more than the");
        ok(!strncmp(err.text, sentence, strlen(sentence)), "in a sentence");
        ok(!gemma3_model_init(&from, &o, mem + 3, size / 2, NULL), "or without one");
        from.size = from.n_data = 100;
        ok(!gemma3_model_init(&from, &o, mem + 3, size, &err), "so is another file: %s", err.text);
        from.size = from.n_data = b.n;
        for (size_t n = 0; n < size; n += size / 97)
            gemma3_close(gemma3_model_init(&from, &o, mem + 3, n, &err));
        free(mem);
        free(b.p);
        throw_away(&f);
    }
}

/* A file behind a function; it fails from its `left`th call on. */
typedef struct device {
    bytes file;
    int left;
    size_t bytes_read;
} device;

static int read_device(void *user, uint64_t offset, void *buffer, size_t n)
{
    device *d = user;
    if (d->left-- <= 0 || offset > d->file.n || n > d->file.n - offset) return -1;
    memcpy(buffer, d->file.p + offset, n);
    d->bytes_read += n;
    return 0;
}

static void weights_that_stay_outside(const char *name)
{
    fixture x = fixture_load(name);
    size_t n;
    bytes file = { NULL, 0 };
    file.p = (unsigned char *)read_file(x.path, &n), file.n = n;
    for (int i = 0; i < 4; i++) {
        device d = { file, INT32_MAX, 0 };
        gemma3_options o = { .exact = i & 1, .isa = i & 2 ? "scalar" : NULL };
        gemma3_error err = { "" };
        gemma3_model *m = gemma3_open_memory(file.p, file.n, name, &o, &err);
        size_t header = m->token_embd.offset < m->layer[0].attn_q.offset ? m->token_embd.offset :
                        m->layer[0].attn_q.offset; /* or more: that may be in memory, too */
        gemma3_source from = { file.p, header, file.n, read_device, &d, name, 0 };
        gemma3_model *outside = gemma3_open_source(&from, &o, &err);
        if (!ok(outside != NULL, "%s: opens with its first %zu bytes in memory", name, header)) {
            diag("  %s", err.text);
            return;
        }
        float *want = malloc(x.n_vocab * sizeof *want), *got = malloc(x.n_vocab * sizeof *got);
        ok(!compute(m, want) && !compute(outside, got), "computes");
        is_bits(got, want, x.n_vocab * sizeof *got, "the same logits");
        ok(d.bytes_read >= gemma3_model_info(outside)->token_bytes, "it has read its weights");
        gemma3_params p = gemma3_default_params(outside);
        p.n_ctx = 16;
        gemma3_state *s = gemma3_state_new(outside, &p, &err);
        d.left = 5;
        is_int(gemma3_forward(s, x.ids, 3, NULL, 0, NULL), -1,
               "when reading fails, so does the call");
        ok(!strcmp(gemma3_state_error(s), "the model's weights cannot be read"), "with a sentence");
        is_int(gemma3_state_pos(s), 0, "and nothing is appended");
        d.left = INT32_MAX;
        int row = 1;
        const int32_t ids[2] = { 3 % x.n_vocab, x.n_vocab - 1 };
        is_int(gemma3_forward(s, ids, 2, &row, 1, got), 0, "when it works again, so does the call");
        is_bits(got, want, x.n_vocab * sizeof *got, "with the same logits");
        gemma3_state_free(s);
        gemma3_close(outside);
        from.n_data = 1000;
        ok(!gemma3_open_source(&from, &o, &err) &&
               strstr(err.text, ": its header is longer than the first 1000"
                                " bytes, which were given"),
           "a header that is not all there is refused");
        ok(!gemma3_open_source(&from, &o, NULL), "also where nobody wants to know why");
        d.left = 2, from.n_data = header;
        ok(!gemma3_open_source(&from, &o, &err) && strstr(err.text, " cannot be read"),
           "a norm that cannot be read, too");
        d.left = 2;
        ok(!gemma3_open_source(&from, &o, NULL), "and without a sentence");
        gemma3_close(m);
        free(want);
        free(got);
    }
    free(file.p);
    free(x.want);
}

static void note_progress(void *user, double done)
{
    double *last = user;
    *last = done >= *last ? done : 2;
}

/* What is asked of opening beside the file. */
static void options_of_opening(void)
{
    image f = take_apart();
    bytes b = put_together(&f);
    double last = 0;
    gemma3_error err = { "" };
    gemma3_options o = { .isa = "abacus" };
    gemma3_source from = { .data = b.p, .n_data = b.n, .size = b.n, .name = "x.gguf" };
    ok(!gemma3_open_source(&from, &o, &err) && !strcmp(err.text, "instruction set \"abacus\" is "
       "unknown or this CPU does not have it"), "kernels that nobody has are refused");
    ok(!gemma3_open_source(&from, &o, NULL), "also without a sentence");
    static char mem[1000];
    ok(!gemma3_model_init(&from, &o, mem, sizeof mem, &err), "and in memory of the caller's");
    o = (gemma3_options){ .progress = note_progress, .user = &last };
    gemma3_model *m = gemma3_open_source(&from, &o, &err);
    ok(m && (last == 1 || !m->kernels->tiles), "opening tells how far it is, up to %g", last);
    ok(m && !gemma3_model_note(m, -1) && !gemma3_model_note(m, 1000), "there are no other notes");
    gemma3_close(m);
    free(b.p);
    throw_away(&f);
}

static void names_of_tensors(void)
{
    gemma3_model *m = accepted(take_apart(), "the unchanged file");
    gemma3_tensor t;
    int n = 0, n_norms = 0, found = 0;
    for (; !gemma3_model_tensor(m, n, &t); n++) {
        n_norms += t.floats != NULL;
        found += !strcmp(t.name, "blk.7.ffn_down.weight") && t.rows == 64 && t.cols == 96;
        if (t.rows < 1 || t.cols < 1 || !t.data || !t.bytes)
            ok(0, "%s has rows, columns and data", t.name);
    }
    is_int(n, 8 * 13 + 2, "the model has as many tensors as the file");
    is_int(n_norms, 8 * 6 + 1, "so many of them are norms");
    is_int(found, 1, "blk.7.ffn_down.weight is among them");
    ok(gemma3_model_tensor(m, -1, &t) == -1 && gemma3_model_tensor(m, n + 1, &t) == -1,
       "there are no others");
    gemma3_close(m);
}

/* The tokenizer of a file that somebody empties goes on working: nothing of it lies in the
 * mapping. */
static void a_file_that_is_emptied(void)
{
    char path[] = "/tmp/gemma3-gguf-XXXXXX";
    image f = take_apart();
    bytes b = put_together(&f);
    int fd = mkstemp(path);
    gemma3_error err = { "" };
    if (fd < 0 || write(fd, b.p, b.n) != (ssize_t)b.n) {
        skip(2, "no temporary file can be written");
        return;
    }
    gemma3_model *m = gemma3_open(path, NULL, &err);
    ok(m && !ftruncate(fd, 0), "a file is emptied after it was opened");
    int32_t ids[64];
    char piece[GEMMA3_PIECE_MAX];
    const gemma3_tokenizer *t = gemma3_model_tokenizer(m);
    int n = gemma3_encode(t, "the cat", 7, GEMMA3_BOS, ids, 64), n_bytes = 0;
    for (int i = 0; i < n; i++) n_bytes += gemma3_decode(t, ids[i], 0, piece);
    is_int(n_bytes, 7, "its tokenizer still works");
    gemma3_close(m);
    close(fd);
    unlink(path);
    free(b.p);
    throw_away(&f);
}

/* A head whose bytes are the embedding's, read as another type, is a matrix of its own. */
static void a_head_that_shares_bytes(void)
{
    float got[2][443];
    for (int no_repack = 0; no_repack <= 1; no_repack++) {
        image f = take_apart();
        info *e = tensor_of(&f, "token_embd.weight"), *t = add_tensor(&f, "output.weight", 0, 64);
        e->type = Q8_0, t->type = Q4_0; /* each fits into what the file has */
        t->n_dims = 2, t->ne[1] = 443, t->offset = e->offset;
        bytes b = put_together(&f);
        gemma3_options o = { .no_repack = no_repack };
        gemma3_error err = { "" };
        gemma3_model *m = gemma3_open_memory(b.p, b.n, "x.gguf", &o, &err);
        if (!ok(m && !compute(m, got[no_repack]),
                "a head at the embedding's place in the file opens"))
            diag("  %s", err.text);
        ok(m && m->lm_head.format->type == Q4_0 && m->token_embd.format->type == Q8_0,
           "each has its own type");
        if (m)
            is_int(m->info.weight_bytes - gemma3_model_info(m)->token_bytes, 443 * 2 * 34,
                   "a token reads all but the embedding");
        gemma3_close(m);
        free(b.p);
        throw_away(&f);
    }
    is_bits(got[0], got[1], sizeof got[0], "repacked or not");
}

/* ---- Random damage --------------------------------------------------------------------------- */

/* Whatever opens must compute, and its tokenizer must work. */
static void use(const gemma3_model *m)
{
    const gemma3_tokenizer *t = gemma3_model_tokenizer(m);
    int n_vocab = gemma3_model_config(m)->n_vocab;
    float *logits = malloc((size_t)n_vocab * sizeof *logits);
    int32_t ids[64];
    char piece[GEMMA3_PIECE_MAX];
    compute(m, logits);
    gemma3_encode(t, "the cat<eos>\xff", 13, GEMMA3_BOS | GEMMA3_SPECIAL, ids, 64);
    for (int32_t id = 0; id < n_vocab; id++) gemma3_decode(t, id, GEMMA3_SPECIAL, piece);
    free(logits);
}

static void random_damage(void)
{
    image f = take_apart();
    uint64_t random = 1;
    int n_opened = 0, n_silent = 0;
    enum { TRIES = 4000 };
    for (int i = 0; i < TRIES; i++) {
        unsigned char *p = malloc(f.original.n);
        gemma3_error err = { "" };
        memcpy(p, f.original.p, f.original.n);
        for (int k = 0; k <= i % 4; k++) {
            random = random * 6364136223846793005u + 1442695040888963407u;
            size_t range = i % 8 < 6 ? f.data : f.original.n; /* mostly in the header */
            p[(random >> 33) % range] = (unsigned char)(i % 3 ? random >> 20 : 255 * (i & 1));
        }
        gemma3_options o = { .exact = i & 1, .no_repack = i >> 1 & 1 };
        gemma3_model *m = gemma3_open_memory(p, f.original.n, "x.gguf", &o, &err);
        if (m) use(m);
        n_opened += m != NULL;
        n_silent += !m && strncmp(err.text, "x.gguf", 6);
        gemma3_close(m);
        free(p);
    }
    is_int(n_silent, 0, "%d damaged files: each that is refused is named", TRIES);
    ok(n_opened > 0 && n_opened < TRIES, "%d of them open and compute", n_opened);
    throw_away(&f);
}

int main(void)
{
    every_truncation_is_noticed();
    no_file_at_all();
    long_paths();
    headers();
    files_of_other_kinds();
    many_keys();
    lying_lengths();
    other_models();
    keys();
    tensors();
    quirks();
    quirks_of_config();
    quirks_of_vocabulary();
    ends_of_answers();
    keys_that_lie();
    merges_instead_of_scores();
    options_of_opening();
    memory_of_the_caller();
    weights_that_stay_outside("tiny");
    weights_that_stay_outside("tiny-mixed");
    names_of_tensors();
    a_file_that_is_emptied();
    a_head_that_shares_bytes();
    random_damage();
    return done_testing();
}
