/* gguf.c - any bytes as a model: opened, and when they open, run.
 *
 * What is claimed of every input: no crash and no undefined behaviour;
 a refusal is one sentence that
 * begins with the file's name; what opens computes,
     two tokens at once give the bits that one after the
 * other give,
     and nothing is allocated beyond what the sizes promise. The last byte chooses the mode.
 */
#include "../../gemma3.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void gguf_must(int true_always, const char *what)
{
    if (true_always) return;
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
}

static void gguf_use_tokenizer(const gemma3_tokenizer *t, int n_vocab)
{
    static const char text[] = "ab  <eos>\n\n<start_of_turn>\xe2\x96\x81\xff\xe2\x96";
    enum { N = sizeof text - 1 };
    int32_t ids[N + 1];
    char piece[GEMMA3_PIECE_MAX];
    int n = gemma3_encode(t, text, N, GEMMA3_BOS | GEMMA3_SPECIAL, ids, N + 1);
    gguf_must(n >= 0 && n <= N + 1, "n + 1 ids suffice");
    for (int i = 0; i < n; i++) gguf_must(ids[i] >= 0 && ids[i] < n_vocab, "ids are in the "
                                          "vocabulary");
    for (int32_t id = -1; id <= n_vocab && id < 300; id++) {
        int bytes = gemma3_decode(t, id, GEMMA3_SPECIAL, piece);
        gguf_must(bytes >= 0 && bytes <= GEMMA3_PIECE_MAX, "a piece has its place");
        gemma3_is_stop(t, id);
    }
    int32_t turn[64];
    n = gemma3_encode_turn(t, "s", " user ", 1, turn, 64);
    gguf_must(n >= -3 && n <= 7 + 32, "a turn is as long as its text and 32 ids");
}

/* NaN's payload is outside the contract. */
static int gguf_same(const float *a, const float *b, int n)
{
    for (int i = 0; i < n; i++)
        if (memcmp(a + i, b + i, sizeof *a) && (a[i] == a[i] || b[i] == b[i])) return 0;
    return 1;
}

static void gguf_compute(const gemma3_model *m, int kv_type)
{
    const gemma3_config *c = gemma3_model_config(m);
    int n_vocab = c->n_vocab, rows[2] = { 0, 1 };
    gemma3_params p = gemma3_default_params(m);
    p.n_ctx = 8, p.n_batch = 4, p.kv_type = (gemma3_kv_type)kv_type;
    gemma3_error err = { "" };
    gemma3_state *s = gemma3_state_new(m, &p, &err);
    gguf_must(s != NULL, "a state of 8 tokens");
    float *logits = malloc((size_t)n_vocab * 4 * sizeof *logits);
    const int32_t ids[3] = { 0, n_vocab - 1, n_vocab };
    gguf_must(!gemma3_forward(s, ids, 2, rows, 2, logits), "two tokens");
    gguf_must(gemma3_forward(s, ids + 2, 1, rows, 1, logits) == -1, "an id too large is refused");
    gemma3_state_reset(s);
    float *one_by_one = logits + 2 * (size_t)n_vocab;
    for (int i = 0; i < 2; i++)
        gguf_must(!gemma3_forward(s, ids + i, 1, rows, 1, one_by_one + (size_t)i * n_vocab), "one "
                  "token");
    gguf_must(gguf_same(logits, one_by_one, 2 * n_vocab), "the same bits at once and one by one");
    gemma3_sampler sampler = gemma3_sampler_new(1);
    gemma3_candidate *scratch = malloc((size_t)n_vocab * sizeof *scratch);
    int32_t id = gemma3_sample(&sampler, logits, n_vocab, scratch);
    gguf_must(id >= 0 && id < n_vocab, "a choice is a token");
    gemma3_nll(logits, n_vocab, id);
    free(scratch);
    free(logits);
    gemma3_state_free(s);
}

/* 1 when it opens. */
static int gguf_try(const uint8_t *data, size_t size)
{
    int how = size ? data[size - 1] : 0;
    gemma3_options o = { .exact = how & 1, .no_repack = how >> 1 & 1, .isa = how & 8
                         ? "scalar" : NULL };
    gemma3_error err = { "" };
    gemma3_model *m = gemma3_open_memory(data, size, "x.gguf", &o, &err);
    if (!m) {
        gguf_must(!strncmp(err.text, "x.gguf", 6) || !strncmp(err.text, "tokenizer: ", 11), "a "
                  "refusal names the file");
        gguf_must(!strchr(err.text, '\n'), "a refusal is one line");
        return 0;
    }
    gguf_use_tokenizer(gemma3_model_tokenizer(m), gemma3_model_config(m)->n_vocab);
    gguf_compute(m, how >> 2 & 1);
    gemma3_close(m);
    return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    gguf_try(data, size);
    return 0;
}
