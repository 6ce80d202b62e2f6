/* compare.h - how far another engine's logits are from ours. */
#ifndef COMPARE_H
#define COMPARE_H

#include "conform.h"
#include "mistakes.h"
#include "readers.h"

/* One position's logits against ours, or the whole of them. */
struct measure {
    int position;
    double max_diff, max_relative; /* of logits; relative to the row's largest magnitude */
    double sum_diff, sum_ours;     /* sums of squares: of the difference, of ours less its mean */
    double kl;               /* of theirs from ours, nats */
    double delta_nll;        /* theirs less ours, of the next id; 0 after the last */
    int rank;                /* of their first choice among ours, from 0 */
    int first_agrees, in_5, in_10; /* how many of the first 1, 5, 10 are among theirs */
    int n_known;             /* values that were there to compare */
    int n_masked;            /* theirs that are -infinity */
    int is_log;              /* theirs are log probabilities */
};

/* Measures a row; next is the id that comes after it or -1. is_log: theirs are log probabilities.
 */
struct measure measure_row(const float *ours, const float *theirs, int n_vocab, int next,
                           int is_log);

/* What lies between the widths of arithmetic: see test/vectors/README.md, which says how these were
 * measured. */
struct band {
    const char *name, *words;
    double mean_kl;
};
extern const struct band bands[];
extern const int n_bands;
/* The narrowest that holds this mean KL; n_bands when none does. */
int band_of(double mean_kl);
int find_band(const char *name); /* -1 when there is none of that name */

struct total {
    int n, n_next, first_agrees, in_5, in_10, n_log, worst; /* worst: position of the largest KL */
    long long n_masked;
    int masked_at;           /* the first position that has some */
    double max_diff, max_relative, sum_diff, sum_ours, sum_kl, max_kl, sum_delta;
    int worst_rank;
};
void add_measure(struct total *t, const struct measure *m, int has_next);

/* A file as input. It stays where it is: open_input's caller closes f->file. */
struct file_bytes {
    FILE *file;
    uint64_t at;             /* where it stands */
};
int open_input(struct input *in, struct file_bytes *f, const char *path);

/* Their rows beside our text. */
struct theirs {
    struct reader reader;
    struct file_bytes file;
    int *row_of;             /* [n_ids] the row of each position, -1 when there is none */
    char *wanted;            /* [n_ids] 1 when there is one */
};
int open_theirs(struct theirs *t, struct session *s, const char *path);
void close_theirs(struct theirs *t);
/* Gives each position its row. piece: of a base file. */
int align_rows(struct theirs *t, const struct session *s, int piece);

/* How much of a mistake that --suspect names is in the difference: 1 when it is made, 0 when it is
 * not, and how uncertain that is. */
struct suspect {
    const struct mistake *mistake;
    double weight, error;
};

/* Which mistake explains the difference: runs the model with each of them. */
enum { MAX_CAUSES = 2, MAX_SUSPECTS = 8 };
struct cause {
    int n;                   /* mistakes: 0 when none explains it */
    const struct mistake *mistake[MAX_CAUSES];
    double explained;        /* share of the difference that is gone with them: 1 is all */
    double weight, error;    /* of one that is hidden, as a suspect's */
    int is_hidden;           /* it stands out of a difference that is mostly something else */
    struct suspect suspect[MAX_SUSPECTS];
    int n_suspects;
};
int find_cause(struct session *s, struct theirs *t, const float *kl, struct cause *cause);

/* What came of a comparison. */
struct result {
    struct total total;
    int conforms, band;      /* band: the narrowest that holds the mean KL */
    struct cause cause;
    int was_searched;
};
/* The logits in a file against ours for s->ids, whose state is not open yet. */
int compare_with(struct session *s, const char *path, struct result *r);

/* --positions, ascending, as wanted[] for run_ids, NULL for all; and how many. */
int wanted_positions(const struct session *s, char **wanted, int *n_rows);

int compare(struct session *s, const struct args *a);
int export_logits(struct session *s, const struct args *a);
int layers(struct session *s, const struct args *a);
int write_vectors(struct session *s, const struct args *a);
int check(struct session *s, const struct args *a);

#endif
