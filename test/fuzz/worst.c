/* worst.c - what the most expensive files and texts of their size cost: CPU seconds for each MB.
 * (make worst; the table is in test/fuzz/README.md.)
 */
#include "../../gemma3.h"
#include "../tiny.h"

#include <time.h>

static double now(void) { return (double)clock() / CLOCKS_PER_SEC; }

static void print_row(const char *what, size_t n, double seconds, const char *outcome)
{
    printf("%-52s %8.1f MB %8.3f s %8.4f s/MB  %s\n", what, (double)n / 1e6, seconds,
           seconds / ((double)n / 1e6), outcome);
    fflush(stdout);
}

static void open_it(const char *what, tiny *t)
{
    bytes b = tiny_file(t);
    gemma3_error err = { "" };
    double begin = now();
    gemma3_model *m = gemma3_open_memory(b.p, b.n, "x.gguf", NULL, &err);
    print_row(what, b.n, now() - begin, m ? "opens" : err.text);
    gemma3_close(m);
    free(b.p);
    tiny_free(t);
}

/* Room for n more bytes of a value, so that they can be put one by one. */
static void prepare(bytes *b, size_t n)
{
    b->p = realloc(b->p, b->n + n + 1);
    if (!b->p) abort();
}

static void many_tokens(int n)
{
    tiny t = tiny_new(TINY_F16);
    bytes *b = tiny_set_array(&t, "tokenizer.ggml.tokens", T_STRING, (uint64_t)n);
    prepare(b, 8 * (size_t)n);
    memset(b->p + b->n, 0, 8 * (size_t)n), b->n += 8 * (size_t)n;
    b = tiny_set_array(&t, "tokenizer.ggml.scores", T_F32, (uint64_t)n);
    prepare(b, 4 * (size_t)n);
    memset(b->p + b->n, 0, 4 * (size_t)n), b->n += 4 * (size_t)n;
    tiny_tensor *e = tiny_tensor_of(&t, "token_embd.weight");
    while (t.data.n % 32) put_int(&t.data, 0, 1);
    e->offset = t.data.n, e->ne[1] = (uint64_t)n;
    prepare(&t.data, 8 * (size_t)n);
    memset(t.data.p + t.data.n, 0, 8 * (size_t)n), t.data.n += 8 * (size_t)n;
    open_it("a vocabulary of empty tokens", &t);
}

/* One token twice as long as the last: a letter, again and again. */
static void equal_tokens(int n)
{
    static char text[1024];
    tiny t = tiny_new(TINY_F16);
    memset(text, 'a', sizeof text);
    bytes *b = tiny_set_array(&t, "tokenizer.ggml.tokens", T_STRING, (uint64_t)n);
    for (int i = 0; i < n; i++) put_text(b, text, 1024);
    b = tiny_set_array(&t, "tokenizer.ggml.scores", T_F32, (uint64_t)n);
    for (int i = 0; i < n; i++) put_float(b, 0);
    tiny_tensor *e = tiny_tensor_of(&t, "token_embd.weight");
    while (t.data.n % 32) put_int(&t.data, 0, 1);
    e->offset = t.data.n, e->ne[1] = (uint64_t)n;
    for (int i = 0; i < n; i++) put_int(&t.data, 0, 8);
    open_it("tokens of 1,024 bytes, all equal", &t);
}

static void long_names(void)
{
    enum { LENGTH = 1 << 20, KEYS = 48 };
    static char name[LENGTH];
    tiny t = tiny_new(TINY_F32);
    memset(name, 'k', LENGTH);
    for (int i = 0; i < KEYS; i++) {
        bytes *b = &t.key[t.n_keys++];
        *b = (bytes){ NULL, 0 };
        put_text(b, name, LENGTH - (size_t)i * 7 % KEYS);
        put_int(b, T_U8, 4);
        put_int(b, 0, 1);
    }
    open_it("keys of 1 MB that differ in their length", &t);
}

/* Keys or tensors in numbers that the builder has no room for: written behind its own. */
static void many_names(int n, int tensors)
{
    tiny t = tiny_new(TINY_F32);
    bytes b = tiny_file(&t), all = { NULL, 0 };
    size_t keys = 24, infos;
    for (int i = 0; i < t.n_keys; i++) keys += t.key[i].n;
    infos = keys;
    for (int i = 0; i < t.n_tensors; i++)
        infos += 8 + strlen(t.tensor[i].name) + 4 + 8 * t.tensor[i].n_dims + 12;
    put(&all, b.p, 8);
    put_int(&all, (uint64_t)(t.n_tensors + (tensors ? n : 0)), 8);
    put_int(&all, (uint64_t)(t.n_keys + (tensors ? 0 : n)), 8);
    put(&all, b.p + 24, (tensors ? infos : keys) - 24);
    prepare(&all, 64 * (size_t)n + b.n + 64);
    for (int i = 0; i < n; i++) {
        unsigned char *p = all.p + all.n;
        memset(p, 0, 48);
        p[0] = 16;
        snprintf((char *)p + 8, 17, "some.key%08x", (unsigned)i * 2654435761u);
        p[24] = tensors ? 1 : T_U32;
        if (tensors) p[28] = 1;
        all.n += tensors ? 24 + 4 + 8 + 4 + 8 : 24 + 4 + 4;
    }
    put(&all, b.p + (tensors ? infos : keys), (tensors ? 0 : infos - keys));
    while (all.n % 32) put_int(&all, 0, 1);
    put(&all, t.data.p, t.data.n);
    gemma3_error err = { "" };
    double begin = now();
    gemma3_model *m = gemma3_open_memory(all.p, all.n, "x.gguf", NULL, &err);
    print_row(tensors ? "tensors that nobody asks for" : "keys that nobody asks for", all.n,
              now() - begin, m ? "opens" : err.text);
    gemma3_close(m);
    free(all.p);
    free(b.p);
    tiny_free(&t);
}

static void encode_it(const gemma3_tokenizer *t, const char *what, const char *of, size_t n)
{
    char *text = malloc(n);
    int32_t *ids = malloc((n + 1) * sizeof *ids);
    size_t length = strlen(of) + (*of == 0);
    if (!text || !ids) abort();
    for (size_t i = 0; i < n; i++) text[i] = of[i % length];
    double begin = now();
    int n_ids = gemma3_encode(t, text, n, GEMMA3_BOS | GEMMA3_SPECIAL, ids, (int)n + 1);
    char outcome[64];
    snprintf(outcome, sizeof outcome, "%d ids", n_ids);
    print_row(what, n, now() - begin, outcome);
    free(ids);
    free(text);
}

/* A vocabulary made to be slow: whole tokens of "a" in each length, and one that every text of "b"
 * begins and none spells. */
static void encode_with_hostile_vocabulary(size_t n)
{
    enum { LONG = GEMMA3_PIECE_MAX };
    static char as[LONG], bs[LONG];
    const char *text[2 * LONG];
    uint32_t length[2 * LONG];
    float score[2 * LONG];
    int32_t type[2 * LONG];
    gemma3_vocab v = {.text = text, .length = length, .score = score, .type = type,
                      .n_vocab = 2 * LONG, .bos = -1, .eos = -1, .unknown = -1};
    memset(as, 'a', LONG);
    memset(bs, 'b', LONG);
    bs[LONG - 1] = 'c';
    for (int i = 0; i < LONG; i++) {
        text[i] = as, length[i] = (uint32_t)i + 1, score[i] = (float)i, type[i] = 1;
        text[LONG + i] = i ? bs : bs + LONG - 1, type[LONG + i] = i == LONG - 1 ? 4 : 1;
        length[LONG + i] = i ? (uint32_t)i + 1 : 1, score[LONG + i] = 0;
    }
    size_t size = gemma3_tokenizer_size(&v);
    void *mem = malloc(size);
    gemma3_error err;
    const gemma3_tokenizer *t = gemma3_tokenizer_init(&v, mem, size, &err);
    encode_it(t, "a hostile vocabulary: pieces of 1 to 1,024 letters", "a", n);
    encode_it(t, "a hostile vocabulary: 1,023 of a token's 1,024 letters", "b", n);
    free(mem);
}

int main(int argc, char **argv)
{
    size_t n = argc > 2 ? (size_t)atof(argv[2]) : 1000000;
    many_names(100000, 0);
    many_names(1000000, 0);
    many_names(100000, 1);
    long_names();
    many_tokens(1 << 20);
    many_tokens(1 << 24);
    equal_tokens(1 << 14);
    encode_with_hostile_vocabulary(n);
    gemma3_error err;
    gemma3_model *m = argc > 1 ? gemma3_open(argv[1], NULL, &err) : NULL;
    if (!m) return 0;
    const gemma3_tokenizer *t = gemma3_model_tokenizer(m);
    encode_it(t, "text: one letter", "a", n);
    encode_it(t, "text: spaces", " ", n);
    encode_it(t, "text: NULs", "", n);
    encode_it(t, "text: bytes that are no characters", "\xff", n);
    encode_it(t, "text: the beginning of a long token", "<unused9", n);
    encode_it(t, "text: words", "the quick brown fox jumps over the lazy dog. ", n);
    gemma3_close(m);
    return 0;
}
