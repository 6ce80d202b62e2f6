/* main.c - a whole program for a board without an operating system: the model lies in flash, tells
 * the beginning of a story, and prints the hash of its logits, which is the PC's:
 *
 *     gemma3 -m weights/gemma3-folktales-q4_0.gguf -p "Once upon a time" --hash
 *     gemma3 -m weights/gemma3-folktales-q4_0.gguf -p "Once" --exact --hash
 *
 * The board gives it `print` and `stop` (start.c) and memory (board.ld). Nothing calls malloc. */
#include "gemma3.h"

#include <stddef.h>
#include <string.h>

void print(const char *text);
void stop(int code);

extern const unsigned char model[], model_end[]; /* the file, in flash */
extern unsigned char heap[], stack[], stack_top[];

#if !defined(STORY)
#define STORY 12 /* tokens */
#endif

enum { MAX_IDS = 64, N_CTX = 64 };

static int32_t ids[MAX_IDS];
static unsigned char work[4096]; /* of the tokenizer */
static float *logits;            /* [MAX_IDS][n_vocab] */
static size_t used;              /* bytes of memory */

static void print_number(const char *what, size_t n)
{
    char text[24], *p = text + sizeof text - 1;
    *p = 0;
    do *--p = (char)('0' + n % 10);
    while (n /= 10);
    print(what);
    print(p);
    print("\n");
}

static void quit(const char *why)
{
    print(why);
    print("\n");
    stop(1);
}

static int encode(const gemma3_model *m, const char *text)
{
    int n = gemma3_encode_in(gemma3_model_tokenizer(m), text, strlen(text), GEMMA3_BOS, ids,
                             MAX_IDS, work, sizeof work);
    if (n < 1) quit("the prompt cannot be encoded");
    return n;
}

/* Takes n ids through the model and prints the hash of all their logits. */
static void print_hash(const char *mode, const gemma3_model *m, gemma3_state *s, int n)
{
    int rows[MAX_IDS], n_vocab = gemma3_model_config(m)->n_vocab;
    char hex[65];
    gemma3_sha256 hash;
    for (int i = 0; i < n; i++) rows[i] = i;
    if (gemma3_forward(s, ids, n, rows, n, logits)) quit(gemma3_state_error(s));
    gemma3_sha256_init(&hash);
    gemma3_sha256_add_floats(&hash, logits, (size_t)n * n_vocab);
    gemma3_sha256_end(&hash, hex);
    print(mode);
    print(hex);
    print("\n");
}

static void tell(const gemma3_model *m, gemma3_state *s, const char *prompt, const float *last)
{
    print(prompt);
    for (int i = 0; i < STORY; i++) {
        static char text[GEMMA3_PIECE_MAX + 1];
        int32_t id = gemma3_argmax(last, gemma3_model_config(m)->n_vocab);
        int row = 0;
        text[gemma3_decode(gemma3_model_tokenizer(m), id, 0, text)] = 0;
        print(text);
        if (gemma3_forward(s, &id, 1, &row, 1, logits)) quit(gemma3_state_error(s));
        last = logits;
    }
    print("\n");
}

/* The next n bytes of memory; what the last run took is free again when `used` is 0. */
static void *take(size_t n)
{
    size_t at = used;
    used += (n + 15) & ~(size_t)15;
    return heap + at;
}

static void run(int exact, const char *prompt)
{
    static gemma3_error err;
    size_t n_file = model_end - model, size;
    gemma3_source from = {.data = model, .n_data = n_file, .size = n_file, .name = "model"};
    gemma3_options options = {.exact = exact, .no_repack = 1};
    used = 0;
    size = gemma3_model_size(&from, &options, &err);
    if (size == 0) quit(err.text);
    gemma3_model *m = gemma3_model_init(&from, &options, take(size), size, &err);
    if (!m) quit(err.text);
    print_number("bytes of the opened model: ", size);
    gemma3_params p = gemma3_default_params(m);
    p.n_ctx = N_CTX;
    p.n_batch = 4;
    size = gemma3_state_size(m, &p);
    gemma3_state *s = gemma3_state_init(m, &p, take(size), size, &err);
    if (!s) quit(err.text);
    print_number("bytes of the state: ", size);
    int n = encode(m, prompt), n_vocab = gemma3_model_config(m)->n_vocab;
    logits = take((size_t)n * n_vocab * sizeof *logits);
    print_hash(exact ? "exact " : "default ", m, s, n);
    if (!exact) tell(m, s, prompt, logits + (size_t)(n - 1) * n_vocab);
}

int main(void)
{
    unsigned char *low = stack;
    while (low + 256 < (unsigned char *)&low) *low++ = 0xa5; /* what stays so was never used */
    run(0, "Once upon a time");
#if !defined(NO_EXACT)
    run(1, "Once");
#endif
    for (low = stack; *low == 0xa5;) low++;
    print_number("bytes of stack used: ", (size_t)(stack_top - low));
    return 0;
}
