/* diagnose.c - which known mistake explains the difference between another engine and ours.
 *
 * The model runs again with each mistake switched on. What that changes, e, is compared with what
 * the other engine has different, d, on a sketch: some columns of some rows, each row less its mean
 * (which softmax does not see). A mistake explains the share 1 - |d - e|^2 / |d|^2 of the
 * difference. When one alone does not, pairs are tried: the best ones with every other. A mistake
 * that is smaller than the noise of the engine's arithmetic still shows in the weight <d, e> / <e,
 * e>, which is near 1 when it is made and near 0 when it is not, since noise does not point its
 * way. How surely it shows grows with the rows: for those mistakes of which the first sketch could
 * not say, the model runs again with all the rows there are.
 */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "compare.h"

enum {
    MAX_COLUMNS = 1024,      /* of a row */
    COARSE_ROWS = 24,        /* of the sketch that every mistake gets */
    COARSE_AFTER = 64,       /* positions looked at after the first that differs */
    FINE_ROWS = 640,         /* and of the one for those that stay doubtful */
    FINE_AFTER = 512,
    MAX_BLOCKS = 32,         /* of rows, for the uncertainty of a weight */
    N_BEST = 3,              /* mistakes that are paired with every other */
    N_LIKELY = 12,           /* pairs whose sum comes closest */
};

/* Shares of the difference, and of our own logits, that may be left. */
static const double may_be_left = 0.1, is_rounding = 3e-11;
/* A difference up to so much of our logits, of which no mistake explains more than so much, is an
 * engine's arithmetic: pairs need not be tried. */
static const double is_small = 0.02, is_little = 0.1;
/* A larger one is no noise that a mistake could hide in. */
static const double is_large = 0.1;

/* Some columns of some rows. */
struct sketch {
    char is_there[FINE_ROWS];
    float value[][MAX_COLUMNS]; /* [n_rows] */
};

struct search {
    struct session *s;
    struct theirs *t;
    int max_rows, max_before; /* rows, and those of them before the window is full */
    int after_first;         /* positions looked at after the first that differs */
    int n_ids;               /* of the text that are run */
    int n_rows, position[FINE_ROWS], n_columns[FINE_ROWS];
    int (*column)[MAX_COLUMNS]; /* [n_rows] */
    char *wanted;
    struct sketch *base, *d, *now; /* ours; theirs less ours; the pass that is running */
    struct sketch **e;       /* [n_mistakes] what each changes, NULL when it does not apply */
    double *left;            /* [n_mistakes] share of d that is left with each */
    double rounding;         /* what may be left of d for float32 to explain it */
    int n_runs;
};

/* ---- Sketches ---- */

/* NULL without memory. */
static struct sketch *new_sketch(const struct search *f)
{
    struct sketch *k = NULL;
    return calloc(1, sizeof *k + (size_t)f->n_rows * sizeof *k->value);
}

static void centre(const struct search *f, struct sketch *k)
{
    for (int r = 0; r < f->n_rows; r++) {
        double sum = 0;
        for (int j = 0; j < f->n_columns[r]; j++) sum += k->value[r][j];
        for (int j = 0; j < f->n_columns[r]; j++) k->value[r][j] -= (float)(sum / f->n_columns[r]);
    }
}

/* The columns of a row: those that are there, or some of them evenly. */
static int choose_columns(struct search *f, int r, const float *row, int n_vocab)
{
    int n = 0, k = 0;
    for (int i = 0; i < n_vocab; i++) n += isfinite(row[i]);
    for (int i = 0, seen = 0; i < n_vocab && k < MAX_COLUMNS; i++) {
        if (!isfinite(row[i])) continue;
        if ((int64_t)seen++ * MAX_COLUMNS / (n > MAX_COLUMNS ? n : MAX_COLUMNS) >= k)
            f->column[r][k++] = i;
    }
    return k;
}

static int sketch_theirs(struct search *f)
{
    int n_vocab = f->s->config->n_vocab;
    float *row = malloc((size_t)n_vocab * sizeof *row);
    if (!row) return out_of_memory((size_t)n_vocab * sizeof *row, "a row");
    for (int r = 0; r < f->n_rows; r++) {
        if (reader_row(&f->t->reader, f->t->row_of[f->position[r]], row, n_vocab)) {
            free(row);
            return complain("%s", f->t->reader.error);
        }
        f->n_columns[r] = choose_columns(f, r, row, n_vocab);
        for (int j = 0; j < f->n_columns[r]; j++) f->d->value[r][j] = row[f->column[r][j]];
        f->d->is_there[r] = f->n_columns[r] > 0;
    }
    free(row);
    return 0;
}

static int take_sketch(void *user, const int *position, int n_rows, const float *rows)
{
    struct search *f = user;
    for (int i = 0; i < n_rows; i++)
        for (int r = 0; r < f->n_rows; r++) {
            const float *row = rows + (size_t)i * (size_t)f->s->config->n_vocab;
            if (f->position[r] != position[i]) continue;
            f->now->is_there[r] = 1;
            for (int j = 0; j < f->n_columns[r]; j++) f->now->value[r][j] = row[f->column[r][j]];
        }
    return 0;
}

static void subtract(const struct search *f, struct sketch *from, const struct sketch *x)
{
    for (int r = 0; r < f->n_rows; r++) {
        from->is_there[r] &= x->is_there[r];
        for (int j = 0; j < f->n_columns[r]; j++) from->value[r][j] -= x->value[r][j];
    }
}

/* <a, b> of one row. */
static double row_dot(const struct search *f, const struct sketch *a, const struct sketch *b, int r)
{
    double sum = 0;
    for (int j = 0; j < f->n_columns[r]; j++) sum += (double)a->value[r][j] * b->value[r][j];
    return sum;
}

/* Share of |d|^2 that is left when e, and e2 unless it is NULL, are taken away: over the rows that
 * all have. Not a number counts as nothing explained. */
static double share_left(const struct search *f, const struct sketch *e, const struct sketch *e2)
{
    double left = 0, all = 0;
    for (int r = 0; r < f->n_rows; r++) {
        if (!f->d->is_there[r] || !e->is_there[r] || (e2 && !e2->is_there[r])) continue;
        for (int j = 0; j < f->n_columns[r]; j++) {
            double d = f->d->value[r][j], x = d - e->value[r][j] - (e2 ? e2->value[r][j] : 0);
            left += x * x, all += d * d;
        }
    }
    return all > 0 && left == left ? left / all : 1;
}

static double energy(const struct search *f, const struct sketch *e)
{
    double sum = 0;
    for (int r = 0; r < f->n_rows; r++)
        if (e->is_there[r]) sum += row_dot(f, e, e, r);
    return sum;
}

static int no_sketch(const struct search *f)
{
    return out_of_memory((size_t)f->n_rows * MAX_COLUMNS * sizeof(float), "a sketch");
}

/* ---- Runs ---- */

static void show_progress(const struct search *f, const char *name)
{
    if (isatty(STDERR_FILENO)) fprintf(stderr, "\rtrying %-30.30s %3d\r", name, f->n_runs);
}

/* What the mistakes change, into e. */
static int run_one(struct search *f, const struct mistake *const *m, int n, struct sketch *e)
{
    f->now = e;
    memset(e->is_there, 0, sizeof e->is_there);
    f->n_runs++;
    show_progress(f, n ? m[n - 1]->name : "none");
    int code = run_mistaken(f->s, m, n, f->n_ids, f->wanted, take_sketch, f);
    if (code) return code;
    centre(f, e);
    if (n) subtract(f, e, f->base);
    return 0;
}

static int is_suspected(const struct session *s, const struct mistake *m)
{
    return !s->args->suspect || names_mistake(s->args->suspect, m);
}

/* Up to one that leaves no more than rounding: no other can be better. */
static int run_singles(struct search *f)
{
    for (int i = 0; i < n_mistakes; i++) f->left[i] = 1;
    for (int i = 0; i < n_mistakes; i++) {
        const struct mistake *m = &mistakes[i];
        if (!mistake_applies(f->s, m) || !is_suspected(f->s, m)) continue;
        f->e[i] = new_sketch(f);
        if (!f->e[i]) return no_sketch(f);
        int code = run_one(f, &m, 1, f->e[i]);
        if (code) return code;
        double size = energy(f, f->e[i]);
        if (size <= 1e-12 * energy(f, f->base)) { /* nothing of it shows in this text */
            free(f->e[i]);
            f->e[i] = NULL;
        } else f->left[i] = share_left(f, f->e[i], NULL);
        if (f->left[i] <= f->rounding) return 0;
    }
    return 0;
}

static int best_single(const struct search *f)
{
    int best = -1;
    for (int i = 0; i < n_mistakes; i++)
        if (f->e[i] && (best < 0 || f->left[i] < f->left[best])) best = i;
    return best;
}

/* ---- Pairs ---- */

struct pairs {
    int a, b;                /* the best so far; -1 */
    double left;
    char *tried;             /* [n_mistakes][n_mistakes] */
    struct sketch *e;
};

static int try_pair(struct search *f, struct pairs *p, int a, int b)
{
    if (a == b || !f->e[a] || !f->e[b] || p->tried[a * n_mistakes + b] || p->left <= f->rounding)
        return 0;
    p->tried[a * n_mistakes + b] = p->tried[b * n_mistakes + a] = 1;
    const struct mistake *m[2] = {&mistakes[a], &mistakes[b]};
    int code = run_one(f, m, 2, p->e);
    double left = code ? 1 : share_left(f, p->e, NULL);
    if (!code && left < p->left) p->left = left, p->a = a, p->b = b;
    return code;
}

/* The pairs whose changes, added, come closest. */
static int run_likely(struct search *f, struct pairs *p)
{
    double last = -1;
    for (int k = 0; k < N_LIKELY; k++) {
        int a = -1, b = -1;
        double least = INFINITY;
        for (int i = 0; i < n_mistakes; i++)
            for (int j = i + 1; j < n_mistakes; j++) {
                if (!f->e[i] || !f->e[j]) continue;
                double left = share_left(f, f->e[i], f->e[j]);
                if (left > last && left < least) least = left, a = i, b = j;
            }
        if (a < 0) return 0;
        int code = try_pair(f, p, a, b);
        if (code) return code;
        last = least;
    }
    return 0;
}

/* Each of the best mistakes with every other. */
static int run_pairs(struct search *f, struct pairs *p, int n_best)
{
    char *used = calloc((size_t)n_mistakes, 1);
    p->tried = calloc((size_t)(n_mistakes * n_mistakes), 1);
    p->e = new_sketch(f);
    int code = used && p->tried && p->e ? run_likely(f, p) : no_sketch(f);
    for (int k = 0; k < n_best && !code; k++) {
        int best = -1;
        for (int i = 0; i < n_mistakes; i++)
            if (f->e[i] && !used[i] && (best < 0 || f->left[i] < f->left[best])) best = i;
        if (best < 0) break;
        used[best] = 1;
        for (int j = 0; j < n_mistakes && !code; j++) code = try_pair(f, p, best, j);
    }
    free(used);
    free(p->tried);
    free(p->e);
    return code;
}

/* ---- Below the noise ---- */

/* How much of a mistake is in the difference, and how uncertain that is. */
struct weight {
    double is, error;
};

/* A row counts by the inverse of its noise, which is nearly all of d where it matters. The error is
 * from leaving out each block of rows in turn: neighbours share much of their noise. */
static struct weight weight_of(const struct search *f, const struct sketch *e)
{
    double de[FINE_ROWS], ee[FINE_ROWS], sum_de = 0, sum_ee = 0, squares = 0;
    int n = 0;
    for (int r = 0; r < f->n_rows; r++) {
        int is_there = f->d->is_there[r] && e->is_there[r];
        double dd = is_there ? row_dot(f, f->d, f->d, r) : 0, own = row_dot(f, e, e, r);
        if (!(dd > 0) || !(own > 0)) continue;
        de[n] = row_dot(f, f->d, e, r) / dd, ee[n] = own / dd;
        sum_de += de[n], sum_ee += ee[n];
        n++;
    }
    struct weight w = {n ? sum_de / sum_ee : 0, INFINITY};
    int block = (n + MAX_BLOCKS - 1) / MAX_BLOCKS, n_blocks = n ? (n + block - 1) / block : 0;
    for (int b = 0; b < n_blocks; b++) {
        double de_left = sum_de, ee_left = sum_ee;
        for (int i = b * block; i < n && i < (b + 1) * block; i++)
            de_left -= de[i], ee_left -= ee[i];
        squares += (de_left / ee_left - w.is) * (de_left / ee_left - w.is);
    }
    if (n_blocks > 1) w.error = sqrt(squares * (n_blocks - 1) / n_blocks);
    return w;
}

/* Surely not 0, and 1 as far as one can tell. */
static int is_made(struct weight w)
{
    double off = fabs(w.is - 1);
    return w.is > 6 * w.error && (off < 0.3 || off < 3 * w.error);
}

/* A mistake that is surely made though it explains little. */
static void find_hidden(const struct search *f, struct cause *cause)
{
    double best = 0;
    for (int i = 0; i < n_mistakes; i++) {
        if (!f->e[i] || mistakes[i].is_precision) continue;
        struct weight w = weight_of(f, f->e[i]);
        if (!is_made(w) || w.is / w.error <= best) continue;
        best = w.is / w.error;
        cause->n = 1, cause->mistake[0] = &mistakes[i], cause->explained = 1 - f->left[i];
        cause->weight = w.is, cause->error = w.error, cause->is_hidden = 1;
    }
}

/* ---- The search ---- */

/* Takes up to n of the rows that are there in [from, to), evenly, the last one among them. */
static void pick_rows(struct search *f, int from, int to, int n)
{
    int n_there = 0, n_picked = 0;
    for (int i = from; i < to; i++) n_there += f->t->wanted[i];
    for (int i = from, seen = 0; i < to && n_picked < n; i++) {
        if (!f->t->wanted[i]) continue;
        seen++;
        if ((int64_t)seen * n / (n_there > n ? n_there : n) <= n_picked) continue;
        n_picked++;
        f->wanted[i] = 1;
        f->position[f->n_rows++] = i;
    }
}

/* Rows of the sketch: from the first that differs on, some of them beyond the window when the text
 * goes there. What comes much later need not be computed. */
static void choose_rows(struct search *f, const float *kl)
{
    int first = -1, n = 0, window = f->s->config->window, n_ids = f->s->n_ids;
    int has_local = memchr(f->s->config->is_local, 1, (size_t)f->s->config->n_layers) != NULL;
    for (int i = 0; i < n_ids && first < 0; i++)
        if (f->t->wanted[i] && kl[i] > bands[0].mean_kl) first = i;
    if (first < 0) first = 0;
    int is_before = has_local && window < n_ids && window > first;
    f->n_ids = min_int(n_ids, (is_before ? window : first) + f->after_first);
    for (int i = first; i < f->n_ids; i++) n += f->t->wanted[i];
    if (n == 0) f->n_ids = n_ids; /* rows of late positions alone */
    if (is_before) {
        pick_rows(f, first, window, f->max_before);
        first = window;
    }
    pick_rows(f, first, f->n_ids, f->max_rows - f->n_rows);
}

static int prepare(struct search *f, const float *kl)
{
    f->wanted = calloc((size_t)f->s->n_ids + 1, 1);
    f->e = calloc((size_t)n_mistakes, sizeof *f->e);
    f->left = calloc((size_t)n_mistakes, sizeof *f->left);
    if (!f->wanted || !f->e || !f->left) return no_sketch(f);
    choose_rows(f, kl);
    f->column = malloc((size_t)f->n_rows * sizeof *f->column);
    f->base = new_sketch(f), f->d = new_sketch(f);
    return f->column && f->base && f->d ? 0 : no_sketch(f);
}

/* What they have different from us. */
static int find_difference(struct search *f)
{
    int code = sketch_theirs(f);
    if (!code) code = run_one(f, NULL, 0, f->base);
    if (code) return code;
    centre(f, f->d);
    subtract(f, f->d, f->base);
    f->rounding = is_rounding * energy(f, f->base) / energy(f, f->d);
    return 0;
}

static void free_search(struct search *f)
{
    for (int i = 0; f->e && i < n_mistakes; i++) free(f->e[i]);
    free(f->wanted);
    free(f->column);
    free(f->base);
    free(f->d);
    free(f->e);
    free(f->left);
}

/* ---- A closer look ---- */

/* Whether the first sketch leaves it open that the mistake is made. */
static int is_doubtful(const struct search *f, int i)
{
    if (!f->e[i] || mistakes[i].is_precision) return 0;
    struct weight w = weight_of(f, f->e[i]);
    return f->s->args->suspect || !(fabs(w.is - 1) > 4 * w.error);
}

static void add_suspect(struct cause *cause, const struct mistake *m, struct weight w)
{
    if (cause->n_suspects == MAX_SUSPECTS) return;
    cause->suspect[cause->n_suspects++] = (struct suspect){m, w.is, w.error};
}

/* Runs what is doubtful with as many rows as there are. */
static int look_closer(struct search *f, const float *kl, struct cause *cause)
{
    struct search fine = {.s = f->s, .t = f->t, .max_rows = FINE_ROWS, .max_before = FINE_ROWS / 4,
                          .after_first = FINE_AFTER, .n_runs = f->n_runs};
    int code = prepare(&fine, kl);
    if (!code && fine.n_rows > f->n_rows) code = find_difference(&fine);
    for (int i = 0; i < n_mistakes && !code && fine.n_rows > f->n_rows; i++) {
        const struct mistake *m = &mistakes[i];
        fine.left[i] = 1;
        if (!is_doubtful(f, i)) continue;
        if (!(fine.e[i] = new_sketch(&fine))) code = no_sketch(&fine);
        if (!code) code = run_one(&fine, &m, 1, fine.e[i]);
        if (!code) fine.left[i] = share_left(&fine, fine.e[i], NULL);
    }
    const struct search *best = fine.n_rows > f->n_rows ? &fine : f;
    if (!code && !cause->n) find_hidden(best, cause);
    for (int i = 0; i < n_mistakes && !code && f->s->args->suspect; i++)
        if (best->e[i]) add_suspect(cause, &mistakes[i], weight_of(best, best->e[i]));
    f->n_runs = fine.n_runs;
    free_search(&fine);
    return code;
}

/* ---- The end ---- */

static void conclude(const struct search *f, const struct pairs *p, struct cause *cause)
{
    int best = best_single(f);
    double left = best < 0 ? 1 : f->left[best];
    int pair_is_better = p->a >= 0 && p->left < 0.5 * left;
    cause->weight = 1;
    if (pair_is_better && p->left < may_be_left) {
        cause->n = 2, cause->explained = 1 - p->left;
        cause->mistake[0] = &mistakes[p->a], cause->mistake[1] = &mistakes[p->b];
    } else if (left < may_be_left) {
        cause->n = 1, cause->explained = 1 - left, cause->mistake[0] = &mistakes[best];
    } else find_hidden(f, cause);
}

/* An engine's noise, with nothing in it that a pair of mistakes could explain. */
static int is_noise(const struct search *f, int best)
{
    return energy(f, f->d) < is_small * energy(f, f->base) && f->left[best] > 1 - is_little;
}

int find_cause(struct session *s, struct theirs *t, const float *kl, struct cause *cause)
{
    struct search f = {.s = s, .t = t, .max_rows = COARSE_ROWS, .max_before = COARSE_ROWS / 2,
                       .after_first = COARSE_AFTER};
    struct pairs p = {.a = -1, .b = -1, .left = 1};
    clock_t start = clock();
    int code = prepare(&f, kl);
    if (!code) code = find_difference(&f);
    if (!code) code = run_singles(&f);
    int best = code ? -1 : best_single(&f), is_slow = clock() - start > 60 * CLOCKS_PER_SEC;
    if (best >= 0 && f.left[best] > f.rounding && !is_noise(&f, best) && !s->args->suspect)
        code = run_pairs(&f, &p, is_slow ? 1 : N_BEST);
    if (!code) conclude(&f, &p, cause);
    int is_fine = !code && energy(&f, f.d) < is_large * energy(&f, f.base);
    if (is_fine && (!cause->n || s->args->suspect)) code = look_closer(&f, kl, cause);
    show_progress(&f, "");
    free_search(&f);
    return code;
}
