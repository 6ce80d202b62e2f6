/* readers.c - any bytes as logits of another program: opened in every form they can be taken for,
 * and read row by row.
 *
 * What is claimed of every input: no crash and no undefined behaviour; a refusal is one sentence;
 * an array that opens lies inside the file; a row that is there can be read.
 */
#include "../readers.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void readers_must(int true_always, const char *what)
{
    if (true_always) return;
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
}

static int32_t find_letter(void *user, const char *text, size_t n)
{
    (void)user;
    return n == 1 && text[0] >= 'a' ? text[0] - 'a' : -1;
}

static void is_sentence(const char *error)
{
    size_t n = strnlen(error, READER_ERROR);
    readers_must(n > 0 && n < READER_ERROR, "a refusal says why");
    readers_must(!strchr(error, '\n'), "a refusal is one line");
}

static void read_values(const struct input *in, const struct array *a, size_t size)
{
    char error[READER_ERROR] = "";
    float value[64];
    static const int bytes[] = { 2, 2, 4, 8 };
    uint64_t n = array_values(a);
    readers_must(a->at <= size && n <= (size - a->at) / (unsigned)bytes[a->number],
                 "an array lies inside the file");
    for (uint64_t at = 0; at < n && at < 4096; at += 64) {
        size_t some = n - at < 64 ? (size_t)(n - at) : 64;
        readers_must(!array_read(in, a, at, some, value, error), "values inside can be read");
    }
}

static void read_arrays(const struct input *in, size_t size)
{
    char error[READER_ERROR] = "";
    struct array a;
    if (is_npy(in)) {
        if (read_npy(in, &a, error)) is_sentence(error);
        else read_values(in, &a, size);
    }
    int found = is_safetensors(in);
    for (int i = 0; found && i < 100; i++) {
        int got = read_safetensors(in, i, &a, error);
        if (got < 0) is_sentence(error);
        if (got <= 0) break;
        read_values(in, &a, size);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 1) return 0;
    struct memory m = { data + 1, size - 1 };
    struct input in = input_of_memory(&m, "x");
    const int n_vocab = data[0] & 1 ? 32 : 130, n_tokens = 1 + (data[0] >> 1 & 7);
    const struct expected e = { .n_vocab = n_vocab, .n_tokens = n_tokens,
                                .n_rows = data[0] & 16 ? n_tokens : 0,
                                .find = data[0] & 32 ? find_letter : NULL };
    struct reader r;
    memset(&r, 0, sizeof r);
    read_arrays(&in, size - 1);
    if (reader_open(&r, &in, &e)) is_sentence(r.error);
    float *row = malloc((size_t)n_vocab * sizeof *row);
    for (int i = 0; !r.error[0] && i < r.n_rows && i < 64; i++)
        if (reader_row(&r, i, row, n_vocab)) is_sentence(r.error);
    free(row);
    reader_close(&r);
    return 0;
}
