/* state.c - any bytes as a saved state, made to look right: its beginning and its SHA-256 are put
 * in order first, as whoever wants to do harm would. What is loaded must compute.
 *
 *     byte 0: bit 0: the beginning stays as it is; bit 1: so does the hash; bits 2-: bytes cut off
 */
#include "../../gemma3.h"
#include "../tiny.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void state_must(int true_always, const char *what)
{
    if (true_always) return;
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
}

static int state_read(void *user, uint64_t offset, void *buffer, size_t n)
{
    const bytes *b = user;
    if (offset > b->n || n > b->n - offset) return -1;
    memcpy(buffer, b->p + offset, n);
    return 0;
}

static int state_write(void *user, const void *p, size_t n)
{
    put(user, p, n);
    return 0;
}

static gemma3_state *state_new(const gemma3_model *m)
{
    gemma3_params p = gemma3_default_params(m);
    p.n_ctx = 8;
    return gemma3_state_new(m, &p, NULL);
}

/* A saved state of three tokens: its beginning is that of every one. */
static bytes state_saved(gemma3_state *s)
{
    const int32_t ids[3] = { 2, 5, 31 };
    bytes b = { NULL, 0 };
    gemma3_error err;
    state_must(!gemma3_forward(s, ids, 3, NULL, 0, NULL), "three tokens");
    state_must(!gemma3_state_save(s, state_write, &b, &err), "a state is saved");
    return b;
}

/* The file that is tried: magic, three numbers, the number of tokens (the input's), the model. */
static bytes state_forged(const bytes *right, const uint8_t *data, size_t size)
{
    enum { START = 16 + 4 * 4 + 64, HASH = 64 };
    bytes b = { NULL, 0 };
    char hex[65];
    put(&b, data + 1, size - 1);
    while (b.n < START) put_int(&b, 0, 1);
    if (!(data[0] & 1)) {
        memcpy(b.p, right->p, 28);
        memcpy(b.p + 32, right->p + 32, 64);
    }
    gemma3_sha256 sum;
    gemma3_sha256_init(&sum);
    gemma3_sha256_add(&sum, b.p, b.n);
    gemma3_sha256_end(&sum, hex);
    if (!(data[0] & 2)) put(&b, hex, HASH);
    b.n -= (size_t)(data[0] >> 2) < b.n ? (size_t)(data[0] >> 2) : b.n;
    return b;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const gemma3_model *m;
    static bytes file, right;
    gemma3_error err = { "" };
    if (size < 1) return 0;
    if (!m) {
        tiny t = tiny_chat();
        file = tiny_file(&t);
        tiny_free(&t);
        m = gemma3_open_memory(file.p, file.n, "x.gguf", NULL, &err);
        state_must(m != NULL, "the model opens");
        gemma3_state *first = state_new(m);
        right = state_saved(first);
        gemma3_state_free(first);
    }
    gemma3_state *s = state_new(m);
    bytes b = state_forged(&right, data, size);
    if (gemma3_state_load(s, state_read, &b, &err)) {
        state_must(err.text[0] && !strchr(err.text, '\n'), "a refusal is one sentence");
        state_must(gemma3_state_pos(s) == 0, "on failure nothing is loaded");
    } else {
        int n = gemma3_state_pos(s), row = 0;
        const int32_t next = 7;
        float logits[TINY_CHAT_VOCAB];
        state_must(n >= 0 && n <= 8, "the context holds the tokens");
        for (int i = 0; i < n; i++)
            state_must(gemma3_state_ids(s)[i] >= 0 && gemma3_state_ids(s)[i] < TINY_CHAT_VOCAB,
                       "ids are in the vocabulary");
        state_must(!gemma3_forward(s, &next, 1, &row, 1, logits) == (n < 8), "it goes on");
    }
    gemma3_state_free(s);
    free(b.p);
    return 0;
}
