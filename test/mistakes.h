/* mistakes.h - the known mistakes of engines, each as a change to our own forward pass. */
#ifndef MISTAKES_H
#define MISTAKES_H

#include "conform.h"

/* A tensor as a trace shows it; data may be changed. */
struct seen {
    const char *label;
    int layer, pos, n, width;
    float *data;             /* [n][width] */
};

struct pass;                 /* a forward pass that makes mistakes */

struct mistake {
    const char *name, *sentence;
    int is_precision;        /* fewer bits, not a fault */
    int is_usual_in_bf16;    /* engines in bf16 do so: a fault only where the rest is finer */
    int (*config)(gemma3_config *c); /* changes a number; 0 when this model has none to change */
    void (*hook)(struct pass *p, const struct seen *t); /* changes a tensor on its way */
    void (*weights)(const gemma3_tensor *t); /* changes a weight of a copy of the model */
    int bos;                 /* -1: without the first token, 1: with the first token twice */
    int late;                /* rows come so many positions late */
    int kv_f16, int8;        /* type of the cache; default mode */
};

extern const struct mistake mistakes[];
extern const int n_mistakes;

/* -1 when there is none of that name. */
int find_mistake(const char *name, size_t n);
/* Whether a list of names separated by commas has it. */
int names_mistake(const char *list, const struct mistake *m);

/* Whether the model and the text give the mistake something to be wrong about. */
int mistake_applies(const struct session *s, const struct mistake *m);

/* As run_ids, over the first n_ids ids, with each of n mistakes made. Rows whose position another
 * text has not are left out. */
int run_mistaken(struct session *s, const struct mistake *const *m, int n, int n_ids,
                 const char *wanted, take_rows *take, void *user);

#endif
