/* readers.h - numbers in the files of other programs: arrays of NumPy and safetensors, raw float32,
 * llama-perplexity's base files, and the JSON of OpenAI-style servers. Forms are told apart by
 * content.
 *
 * Nothing here knows of models. Input may be hostile: it is read through a function, never beyond
 * its size, and a fault leaves one sentence that says what was found and what was expected.
 */
#ifndef READERS_H
#define READERS_H

#include <stddef.h>
#include <stdint.h>

/* Where bytes come from. read fills n bytes from offset at, and returns how many it could. */
struct input {
    const char *name;        /* for sentences */
    uint64_t size;
    size_t (*read)(void *user, uint64_t at, void *to, size_t n);
    void *user;
};

struct memory {
    const unsigned char *data;
    size_t size;
};
struct input input_of_memory(const struct memory *m, const char *name);

/* ---- Arrays of any shape ---- */

enum number { NUMBER_F16, NUMBER_BF16, NUMBER_F32, NUMBER_F64 };

enum { MAX_DIMS = 6, READER_ERROR = 512, TENSOR_NAME = 128 };

/* An array in a file, C order. */
struct array {
    char name[TENSOR_NAME];  /* in a safetensors file */
    enum number number;
    int big_endian;
    uint64_t at;             /* of its first byte */
    int n_dims;
    uint64_t dim[MAX_DIMS];  /* slowest first */
};

int is_npy(const struct input *in);
int is_safetensors(const struct input *in);
/* 0, or -1 and a sentence in error [READER_ERROR]. The array lies inside the file then. */
int read_npy(const struct input *in, struct array *a, char *error);
/* The tensor number index of a safetensors file, as its header lists them: 1, 0 past the last, -1.
 */
int read_safetensors(const struct input *in, int index, struct array *a, char *error);
uint64_t array_values(const struct array *a);
/* "[72][64]". */
enum { SHAPE_TEXT = 160 };
const char *array_shape(const struct array *a, char out[SHAPE_TEXT]);
/* n values from number first on, as float. */
int array_read(const struct input *in, const struct array *a, uint64_t first, size_t n, float *out,
               char *error);

/* ---- Logits ---- */

enum form { FORM_RAW, FORM_NPY, FORM_SAFETENSORS, FORM_KLD_BASE, FORM_JSON };

/* Id of a token's text, or -1. */
typedef int32_t find_token(void *user, const char *text, size_t n);

/* A log probability that a server told. */
struct known {
    int32_t id;
    float value;
};

struct known_row {
    size_t begin, end;       /* in known[] */
    int32_t chosen;          /* the token that came, -1 when it is not said */
};

struct reader {
    struct input in;
    enum form form;
    const char *form_name;
    struct array array;
    int n_rows, width;       /* width 0: only some values of a row are there */
    int is_log;              /* values are log probabilities, not logits */
    int n_ctx, n_pieces; /* of a base file: its text is pieces of n_ctx tokens, each on its own */
    int32_t *tokens;         /* of a base file: [n_pieces][n_ctx] */
    struct known *known;     /* of a server */
    struct known_row *row;
    size_t n_known, room_known, room_rows;
    unsigned char *bytes;    /* room for one row as it is in the file */
    char error[READER_ERROR];
};

/* Opens logits of a model with n_vocab tokens for a text of n_tokens (n_rows of them are asked for
 * when only some positions are; else 0). A width of up to 64 more or less than n_vocab is padding
 * or added tokens and passes. find may be NULL. 0, or -1 and r->error. */
struct expected {
    int n_vocab, n_tokens, n_rows;
    find_token *find;
    void *find_user;
};
int is_kld_base(const struct input *in);
int reader_open(struct reader *r, const struct input *in, const struct expected *e);

/* Row number index as n_vocab floats: what is not there is NaN. A NaN or +infinity that *is* there
 * is an error; -infinity passes. 0, or -1 and r->error. */
int reader_row(struct reader *r, int index, float *row, int n_vocab);
void reader_close(struct reader *r);

#endif
