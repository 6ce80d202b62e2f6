/* conform.h - what the parts of the conformance kit share: the command line, and an opened model.
 *
 * conform.c has the command line and the measuring commands; each other command is a file beside
 * it. A function that can fail returns an exit code, having said why in one sentence: 0 is well
 * and, of a comparison, "conforms"; DIFFERS; WRONG when the command line or the input was.
 */
#ifndef CONFORM_H
#define CONFORM_H

#include <stdio.h>
#include "../gemma3.h"

enum { CONFORMS = 0, DIFFERS = 1, WRONG = 2 };

enum {
    DEFAULT_PIECE = 512,     /* tokens of perplexity's pieces, as in llama-perplexity */
    ROWS_AT_ONCE = 32,       /* rows of logits held at once, at most */
    MAX_VALUES = 8,          /* arguments without a name, at most */
};

struct args {
    const char *model, *prompt, *file, *ids_file, *isa, *kv;
    int n_threads, n_batch, n_ctx;
    int exact, no_bos, special, help;
    const char *dir;         /* trace */
    const char *positions;   /* compare, export */
    const char *npy, *safetensors, *kld_base; /* export */
    const char *other;       /* check */
    int json, each, no_diagnosis; /* compare */
    const char *band, *suspect;
    const char *value[MAX_VALUES];
    int n_values;
};

/* An opened model with what belongs to it. */
struct session {
    const struct args *args;
    gemma3_pool *pool;
    gemma3_model *model;
    const gemma3_config *config;
    const gemma3_tokenizer *tokenizer;
    gemma3_params params;
    gemma3_state *state;
    int32_t *ids;            /* [n_ids] the text */
    int n_ids;
    float *logits;           /* [max_rows][n_vocab] */
    int max_rows;            /* of them computed at once */
};

static inline int min_int(int a, int b) { return a < b ? a : b; }

/* Says what went wrong, and gives WRONG. */
int complain(const char *format, ...);
int out_of_memory(size_t n_bytes, const char *what);
/* What is in stdout's buffer gets out, or we say why not. */
int flush_stdout(void);

/* All bytes of a file, "-" being stdin, and a NUL after them; the caller frees them. */
int read_whole(const char *path, char **data, size_t *n);
/* Writes float32 as little-endian bytes on any machine; -1 when it cannot. */
int write_floats(FILE *f, const float *x, size_t n);
/* Whole numbers separated by any of the separators; returns how many, -1 at something else. */
int parse_numbers(const char *text, const char *separators, int32_t **out);

int open_model(struct session *s, const struct args *a);
/* Fills s->ids from -p, -f or --ids. */
int read_ids(struct session *s);
int open_state(struct session *s);
void close_session(struct session *s);

/* Is handed rows of logits, in order: their positions and [n_rows][n_vocab]. Returns an exit code.
 */
typedef int take_rows(void *user, const int *position, int n_rows, const float *rows);

/* Takes the ids through the model, piece by piece, and hands over the rows of the positions for
 * which wanted[] is not 0; of every position when wanted is NULL. */
int run_ids(struct session *s, const char *wanted, take_rows *take, void *user);

/* Runs task(job, i, worker) for i in 0 .. n-1 on the session's threads. */
void share_out(const struct session *s, int n, gemma3_task *task, void *job);

/* The text of a token between quotes, control characters escaped. */
void print_piece(FILE *out, const gemma3_tokenizer *t, int32_t id);

#endif
