/* compare.c - the command compare: another engine's logits against ours, position by position, and
 * a verdict. diagnose.c then finds out which known mistake explains a difference.
 */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "compare.h"

const struct band bands[] = {
    {"float32", "another order of sums in float32, or float64", 1e-9},
    {"kv-f16", "float32 with a float16 cache", 3e-6},
    {"bf16", "bf16 weights or activations", 1e-2},
    {"int8", "8-bit activations", 1e-1},
    {"4-bit", "another 4-bit format of the same weights", 2},
};
const int n_bands = sizeof bands / sizeof *bands;

int band_of(double mean_kl)
{
    int i = 0;
    while (i < n_bands && !(mean_kl <= bands[i].mean_kl)) i++;
    return i;
}

int find_band(const char *name)
{
    for (int i = 0; i < n_bands; i++)
        if (strcmp(bands[i].name, name) == 0) return i;
    return -1;
}

/* The widest that conforms. */
static int widest_allowed(const struct args *a)
{
    return find_band(a->band ? a->band : "int8");
}

/* ---- Measuring a row ---- */

enum { TOP = 10 };

/* The ids of the largest values, the largest first; equal ones in order of id. What is not there
 * (NaN) never counts. Returns how many. */
static int top_of(const float *x, int n, int32_t top[TOP])
{
    int count = 0;
    float least = -INFINITY;
    for (int i = 0; i < n; i++) {
        if (!(x[i] > least) && !(count < TOP && x[i] == x[i])) continue;
        int k = count < TOP ? count++ : TOP - 1;
        for (; k > 0 && x[top[k - 1]] < x[i]; k--) top[k] = top[k - 1];
        top[k] = i;
        if (count == TOP) least = x[top[TOP - 1]];
    }
    return count;
}

static double log_sum_exp(const float *x, int n, double max)
{
    double sum = 0;
    for (int i = 0; i < n; i++)
        if (x[i] - max > -60) sum += exp(x[i] - max); /* NaN is left out */
    return max + log(sum);
}

static int n_shared(const int32_t *a, const int32_t *b, int n, int n_b)
{
    int count = 0;
    for (int i = 0; i < n; i++)
        for (int k = 0; k < n && k < n_b; k++) count += a[i] == b[k];
    return count;
}

/* KL of what is known: the rest of both is one more outcome. */
static double divergence(const float *ours, const float *theirs, int n, double lse_ours,
                         double lse_theirs)
{
    double sum = 0, p_known = 0, q_known = 0;
    for (int i = 0; i < n; i++) {
        double p = ours[i] - lse_ours, q = theirs[i] - lse_theirs;
        if (q != q) continue;
        double e = p > -60 ? exp(p) : 0;
        if (e > 0) sum += e * (p - q);
        p_known += e;
        if (lse_theirs == 0 && q > -60) q_known += exp(q);
    }
    if (lse_theirs != 0) return sum;
    double p_rest = 1 - p_known, q_rest = 1 - q_known;
    if (p_rest > 1e-6 && q_rest > 1e-6) sum += p_rest * log(p_rest / q_rest);
    return sum;
}

struct measure measure_row(const float *ours, const float *theirs, int n_vocab, int next,
                           int is_log)
{
    struct measure m = {.position = 0};
    int32_t top[TOP], other[TOP];
    int n_top = top_of(ours, n_vocab, top), n_other = top_of(theirs, n_vocab, other);
    if (n_other == 0) return m;
    double lse_ours = log_sum_exp(ours, n_vocab, ours[top[0]]);
    double lse_theirs = is_log ? 0 : log_sum_exp(theirs, n_vocab, theirs[other[0]]);
    if (!is_log && fabs(lse_theirs) < 1e-3 && fabs(lse_ours) > 0.1)
        is_log = 1; /* as they call them */
    double moved = is_log ? lse_ours : 0, sum = 0, largest = 0;
    for (int i = 0; i < n_vocab; i++) {
        double a = ours[i] - moved, d = theirs[i] - a;
        if (d != d) continue;
        m.n_known++;
        m.n_masked += theirs[i] == -INFINITY;
        sum += a;
        if (fabs(d) > m.max_diff) m.max_diff = fabs(d);
        if (fabs(a) > largest) largest = fabs(a);
        m.sum_diff += d * d;
        m.sum_ours += a * a;
    }
    m.sum_ours -= sum * sum / m.n_known;
    m.max_relative = largest > 0 ? m.max_diff / largest : 0;
    m.kl = divergence(ours, theirs, n_vocab, lse_ours, lse_theirs);
    if (next >= 0 && theirs[next] == theirs[next])
        m.delta_nll = (lse_theirs - theirs[next]) - (lse_ours - ours[next]);
    for (int i = 0; i < n_vocab; i++) m.rank += ours[i] > ours[other[0]];
    m.first_agrees = top[0] == other[0];
    m.in_5 = n_shared(top, other, n_top < 5 ? n_top : 5, n_other);
    m.in_10 = n_shared(top, other, n_top, n_other);
    m.is_log = is_log;
    return m;
}

void add_measure(struct total *t, const struct measure *m, int has_next)
{
    if (m->n_known == 0) return;
    t->n++;
    t->n_next += has_next;
    t->first_agrees += m->first_agrees, t->in_5 += m->in_5, t->in_10 += m->in_10;
    t->n_log += m->is_log;
    if (m->n_masked && !t->n_masked) t->masked_at = m->position;
    t->n_masked += m->n_masked;
    if (!(m->max_diff <= t->max_diff)) t->max_diff = m->max_diff;
    if (!(m->max_relative <= t->max_relative)) t->max_relative = m->max_relative;
    if (!(m->kl <= t->max_kl)) t->max_kl = m->kl, t->worst = m->position;
    if (m->rank > t->worst_rank) t->worst_rank = m->rank;
    t->sum_diff += m->sum_diff, t->sum_ours += m->sum_ours;
    t->sum_kl += m->kl, t->sum_delta += m->delta_nll;
}

/* ---- Their file ---- */

static size_t read_file(void *user, uint64_t at, void *to, size_t n)
{
    struct file_bytes *f = user;
    if (at != f->at && fseeko(f->file, (off_t)at, SEEK_SET)) return 0;
    size_t got = fread(to, 1, n, f->file);
    f->at = at + got;
    return got;
}

int open_input(struct input *in, struct file_bytes *f, const char *path)
{
    long long size = gemma3_file_size(path);
    if (size == -2) return complain("%s is not a regular file", path); /* a pipe waits */
    *f = (struct file_bytes){gemma3_fopen(path, "rb"), 0};
    if (!f->file) return complain("%s: %s", path, strerror(errno));
    *in = (struct input){path, (uint64_t)size, read_file, f};
    return 0;
}

/* A server says " Paris" where the vocabulary has U+2581 for the space. */
static int32_t find_text(void *user, const char *text, size_t n)
{
    char spaced[3 * 1024 + 8];
    size_t k = 0;
    if (n == 0 || n > 1024) return -1;
    for (size_t i = 0; i < n; i++)
        if (text[i] == ' ') memcpy(spaced + k, "\xE2\x96\x81", 3), k += 3;
        else spaced[k++] = text[i];
    int32_t id = gemma3_find(user, spaced, k);
    if (id < 0)
        id = gemma3_find(user, text, n); /* runs of spaces are spelled with spaces in some files */
    if (id < 0 && n == 1) {
        snprintf(spaced, sizeof spaced, "<0x%02X>", (unsigned char)*text);
        id = gemma3_find(user, spaced, 6);
    }
    return id;
}

/* --positions, as indices; -1 when there are none, -2 having said why they are wrong. */
static int positions_of(const struct session *s, int32_t **out)
{
    if (!s->args->positions) return -1;
    int n = parse_numbers(s->args->positions, ", \t\n", out);
    if (n < 1) return complain("--positions \"%s\": expected whole numbers separated by commas",
                               s->args->positions), -2;
    for (int i = 0; i < n; i++) {
        if ((*out)[i] < 0) (*out)[i] += s->n_ids;
        if ((*out)[i] < 0 || (*out)[i] >= s->n_ids)
            return complain("--positions: the text has %d tokens", s->n_ids), -2;
        if (i > 0 && (*out)[i] <= (*out)[i - 1])
            return complain("--positions: expected each after the one before"), -2;
    }
    return n;
}

int wanted_positions(const struct session *s, char **wanted, int *n_rows)
{
    int32_t *position = NULL;
    int n = positions_of(s, &position);
    *wanted = n < 0 ? NULL : calloc((size_t)s->n_ids, 1);
    for (int i = 0; i < n && *wanted; i++) (*wanted)[position[i]] = 1;
    free(position);
    if (n == -2) return WRONG;
    *n_rows = n < 0 ? s->n_ids : n;
    return n > 0 && !*wanted ? out_of_memory((size_t)s->n_ids, "the positions") : 0;
}

int open_theirs(struct theirs *t, struct session *s, const char *path)
{
    struct input in;
    int32_t *position = NULL;
    memset(t, 0, sizeof *t);
    int code = open_input(&in, &t->file, path);
    if (code) return code;
    if (s->n_ids == 0 && !is_kld_base(&in))
        return complain("compare needs the text: -p TEXT, -f FILE or --ids FILE");
    int n = positions_of(s, &position);
    free(position);
    if (n == -2) return WRONG;
    struct expected e = {.n_vocab = s->config->n_vocab,
                         .n_tokens = s->n_ids,
                         .n_rows = n < 0 ? 0 : n,
                         .find = find_text,
                         .find_user = (void *)s->tokenizer};
    return reader_open(&t->reader, &in, &e) ? complain("%s", t->reader.error) : 0;
}

void close_theirs(struct theirs *t)
{
    reader_close(&t->reader);
    if (t->file.file) fclose(t->file.file);
    free(t->row_of);
    free(t->wanted);
}

/* Where a server's rows lie: those tokens that were chosen must be the text's. A row before the
 * first known one is null, as the prediction of the first token. */
static int first_of_server(const struct reader *r, const struct session *s)
{
    int n_null = 0, best = s->n_ids - r->n_rows, most = -1;
    while (n_null < r->n_rows && r->row[n_null].begin == r->row[n_null].end) n_null++;
    if (n_null)
        return -1; /* each row is of its own token: the prediction comes from the one before */
    for (int first = s->n_ids - r->n_rows; first >= -1 && first >= s->n_ids - r->n_rows - 1;
         first--) {
        int n = 0;
        for (int i = 0; i < r->n_rows; i++) {
            int at = first + i + 1;
            n += at >= 0 && at < s->n_ids && r->row[i].chosen == s->ids[at];
        }
        if (n > most) most = n, best = first;
    }
    return best;
}

/* The tokens that a server chose are, on the whole, the text's. */
static int check_chosen(const struct reader *r, const struct session *s, int first)
{
    int n = 0, n_other = 0, row = -1;
    for (int i = 0; i < r->n_rows; i++) {
        int at = first + i + 1;
        if (r->row[i].chosen < 0 || at < 0 || at >= s->n_ids) continue;
        n++;
        if (r->row[i].chosen == s->ids[at]) continue;
        n_other++;
        if (row < 0) row = i;
    }
    if (2 * n_other <= n) return 0;
    return complain("%s: its token for position %d is %d, the text's is %d: these are other ids",
                    r->in.name, first + row + 1, (int)r->row[row].chosen,
                    (int)s->ids[first + row + 1]);
}

int align_rows(struct theirs *t, const struct session *s, int piece)
{
    struct reader *r = &t->reader;
    int32_t *position = NULL;
    int n = positions_of(s, &position), first = 0, n_rows = r->n_rows, skip = 0;
    free(t->row_of), free(t->wanted);
    t->row_of = malloc((size_t)s->n_ids * sizeof *t->row_of);
    t->wanted = calloc((size_t)s->n_ids, 1);
    if (!t->row_of || !t->wanted || n == -2)
        return out_of_memory((size_t)s->n_ids * 5, "the positions");
    if (r->form == FORM_KLD_BASE) {
        n_rows = r->n_ctx - 1 - r->n_ctx / 2;
        first = r->n_ctx / 2, skip = piece * n_rows;
    } else if (n > 0 && n_rows != n) {
        free(position);
        return complain("%s has %d rows, --positions names %d", r->in.name, n_rows, n);
    } else if (r->form == FORM_JSON) {
        first = first_of_server(r, s);
        if (n < 0 && check_chosen(r, s, first)) return WRONG;
    }
    else if (n_rows == 1) first = s->n_ids - 1;
    else if (n < 0 && (n_rows < s->n_ids - 1 || n_rows > s->n_ids + 1))
        return complain(
            "%s has %d rows and the text %d tokens: expected one row for each, or the last "
            "alone (--positions says which others)",
            r->in.name, n_rows, s->n_ids);
    else if (n < 0) first = s->n_ids - n_rows;
    for (int i = 0; i < s->n_ids; i++) {
        int row = i - first;
        t->row_of[i] = row >= 0 && row < n_rows ? row + skip : -1;
        if (n > 0) t->row_of[i] = -1;
    }
    for (int k = 0; k < n; k++) t->row_of[position[k]] = k;
    for (int i = 0; i < s->n_ids; i++) t->wanted[i] = t->row_of[i] >= 0;
    free(position);
    return 0;
}

/* ---- The comparison ---- */

struct comparison {
    struct session *s;
    struct theirs *t;
    float *rows;             /* [ROWS_AT_ONCE][n_vocab] theirs */
    float *kl;               /* [n_ids] of the text, or of a base file's first piece */
    int piece;
    struct total total;
    struct measure measured[ROWS_AT_ONCE];
    const float *ours;
    const int *position;
};

static void measure_task(void *job, int i, int worker)
{
    struct comparison *c = job;
    int n_vocab = c->s->config->n_vocab, p = c->position[i];
    size_t at = (size_t)i * (size_t)n_vocab;
    (void)worker;
    c->measured[i] = measure_row(c->ours + at, c->rows + at, n_vocab,
                                 p + 1 < c->s->n_ids ? c->s->ids[p + 1] : -1, c->t->reader.is_log);
    c->measured[i].position = p;
}

/* A member of a JSON object: JSON has no word for what is no number. */
static void print_member(const char *name, double x)
{
    if (isfinite(x)) printf("\"%s\":%.6g,", name, x);
    else printf("\"%s\":null,", name);
}

static void print_measure_json(const struct measure *m)
{
    printf("{\"position\":%d,", m->position);
    print_member("max_diff", m->max_diff);
    print_member("max_relative", m->max_relative);
    print_member("nmse", m->sum_diff / m->sum_ours);
    print_member("kl", m->kl);
    print_member("delta_nll", m->delta_nll);
    printf("\"rank\":%d,\"top1\":%d,\"top5\":%d,\"top10\":%d}", m->rank, m->first_agrees,
           m->in_5, m->in_10);
}

static void print_measure(const struct comparison *c, const struct measure *m)
{
    if (c->s->args->json) {
        if (c->total.n > 1) fputs(",\n", stdout);
        print_measure_json(m);
    } else if (c->s->args->each)
        printf("position %d: max diff %.3g (relative %.2g), NMSE %.2g, KL %.3g, their first is our "
               "%d, "
               "of 5 %d, of 10 %d agree, delta nll %.3g\n",
               m->position, m->max_diff, m->max_relative, m->sum_diff / m->sum_ours, m->kl,
               m->rank + 1, m->in_5, m->in_10, m->delta_nll);
}

static int take_ours(void *user, const int *position, int n_rows, const float *rows)
{
    struct comparison *c = user;
    int n_vocab = c->s->config->n_vocab;
    for (int i = 0; i < n_rows; i++)
        if (reader_row(&c->t->reader, c->t->row_of[position[i]],
                       c->rows + (size_t)i * (size_t)n_vocab, n_vocab))
            return complain("%s", c->t->reader.error);
    c->ours = rows, c->position = position;
    share_out(c->s, n_rows, measure_task, c);
    for (int i = 0; i < n_rows; i++) {
        const struct measure *m = &c->measured[i];
        add_measure(&c->total, m, m->position + 1 < c->s->n_ids);
        if (c->piece == 0) c->kl[m->position] = (float)m->kl;
        if (m->n_known) print_measure(c, m);
    }
    return flush_stdout();
}

/* The tokens of one piece of a base file, with <bos> first as llama-perplexity does. */
static int take_piece(struct session *s, const struct reader *r, int piece)
{
    const gemma3_vocab *v = gemma3_tokenizer_vocab(s->tokenizer);
    free(s->ids);
    s->n_ids = r->n_ctx;
    s->ids = malloc((size_t)s->n_ids * sizeof *s->ids);
    if (!s->ids) return out_of_memory((size_t)s->n_ids * sizeof *s->ids, "the ids");
    memcpy(s->ids, r->tokens + (size_t)piece * (size_t)r->n_ctx, (size_t)s->n_ids * sizeof *s->ids);
    if (v->bos >= 0 && v->add_bos) s->ids[0] = v->bos;
    return 0;
}

/* A text given beside a base file must be the file's. */
static int check_text(const struct session *s, const struct reader *r)
{
    for (int i = 0; i < s->n_ids && i < r->n_ctx * r->n_pieces; i++)
        if (s->ids[i] != r->tokens[i])
            return complain("%s: its token %d is %d, the text's is %d: these are other ids",
                            r->in.name, i, (int)r->tokens[i], (int)s->ids[i]);
    return 0;
}

static int compare_rows(struct comparison *c)
{
    struct session *s = c->s;
    int n_pieces = c->t->reader.form == FORM_KLD_BASE ? c->t->reader.n_pieces : 1, code = 0;
    for (c->piece = 0; c->piece < n_pieces && !code; c->piece++) {
        if (c->t->reader.form == FORM_KLD_BASE) code = take_piece(s, &c->t->reader, c->piece);
        if (!code) code = align_rows(c->t, s, c->piece);
        if (!code && !c->kl && !(c->kl = calloc((size_t)s->n_ids, sizeof *c->kl)))
            code = out_of_memory((size_t)s->n_ids * sizeof *c->kl, "the divergences");
        if (!code && c->piece) gemma3_state_reset(s->state);
        if (!code) code = run_ids(s, c->t->wanted, take_ours, c);
    }
    return code;
}

/* ---- The verdict ---- */

static void print_total(const struct total *t)
{
    double n = t->n;
    printf("rows                 %d\n", t->n);
    printf("max difference       %.4g, relative %.3g\n", t->max_diff, t->max_relative);
    printf("NMSE                 %.3g\n", t->sum_diff / t->sum_ours);
    printf("KL                   mean %.4g, largest %.4g at position %d\n", t->sum_kl / n,
           t->max_kl, t->worst);
    printf("first choice agrees  %.2f %%, their worst first choice is our number %d\n",
           100 * t->first_agrees / n, t->worst_rank + 1);
    printf("first 5, 10 agree    %.2f %%, %.2f %%\n", 100 * t->in_5 / (5 * n),
           100 * t->in_10 / (10 * n));
    if (t->n_next) printf("delta nll            mean %.4g\n", t->sum_delta / t->n_next);
}

/* Whether it is what an engine does whose noise is that of bf16. */
static int is_usual(const struct cause *c, int band)
{
    return c->n && c->is_hidden && c->mistake[0]->is_usual_in_bf16 && band >= find_band("bf16");
}

static int has_fault(const struct cause *c, int band)
{
    int n = 0;
    for (int i = 0; i < c->n; i++) n += !c->mistake[i]->is_precision && !is_usual(c, band);
    return n > 0;
}

static struct result judge(const struct total *t, const struct cause *cause, int was_searched,
                           const struct args *a)
{
    struct result v = {.total = *t, .band = band_of(t->sum_kl / t->n), .cause = *cause,
                       .was_searched = was_searched};
    v.conforms = v.band <= widest_allowed(a) && !has_fault(cause, v.band);
    return v;
}

static void print_cause(const struct result *v)
{
    const struct cause *c = &v->cause;
    if (c->n == 0 && v->was_searched && v->band)
        printf("known mistakes       %s\n", v->conforms
                                                ? "none is in it, as far as its noise lets see"
                                                : "none explains it, alone or in pairs");
    for (int i = 0; i < c->n; i++)
        printf("%-20s %s: %s\n", i ? "and" : "cause", c->mistake[i]->name, c->mistake[i]->sentence);
    if (c->n && c->is_hidden)
        printf("%-20s it stands out of other noise, with %.2f +- %.2f of its own weight\n", "",
               c->weight, c->error);
    if (is_usual(c, v->band))
        printf("%-20s engines in bf16 do so: no fault there\n", "");
    if (c->n && !c->is_hidden)
        printf("%-20s with %s, %.6g %% of the difference is gone\n", "",
               c->n > 1 ? "both" : "it", 100 * c->explained);
}

static void print_suspects(const struct result *v)
{
    for (int i = 0; i < v->cause.n_suspects; i++) {
        const struct suspect *p = &v->cause.suspect[i];
        printf("%-20s %.2f +- %.2f of it is in the difference\n", p->mistake->name, p->weight,
               p->error);
    }
}

static void print_verdict(const struct result *v)
{
    const struct cause *c = &v->cause;
    int is_fault = has_fault(c, v->band), is_named = c->n == 1 && c->mistake[0]->is_precision;
    print_total(&v->total);
    print_cause(v);
    print_suspects(v);
    printf("verdict              %s: ", v->conforms ? "conforms" : "does not conform");
    if (is_fault) printf("a known mistake%s\n", c->n > 1 ? " or two" : "");
    else if (v->band == n_bands) puts("no arithmetic explains so much");
    else
        printf("within the band of %s\n",
               bands[is_named ? find_band(c->mistake[0]->name) : v->band].words);
}

static void print_json(const struct result *v)
{
    const struct total *t = &v->total;
    double n = t->n;
    printf("],\n\"rows\":%d,", t->n);
    print_member("max_diff", t->max_diff);
    print_member("max_relative", t->max_relative);
    print_member("nmse", t->sum_diff / t->sum_ours);
    print_member("mean_kl", t->sum_kl / n);
    print_member("max_kl", t->max_kl);
    print_member("delta_nll", t->n_next ? t->sum_delta / t->n_next : 0);
    printf("\"worst_position\":%d,\"top1\":%.6g,\"top5\":%.6g,\"top10\":%.6g,\"worst_rank\":%d,\n",
           t->worst, t->first_agrees / n, t->in_5 / (5 * n), t->in_10 / (10 * n), t->worst_rank);
    printf("\"band\":\"%s\",\"conforms\":%s,\"causes\":[",
           v->band < n_bands ? bands[v->band].name : "none", v->conforms ? "true" : "false");
    for (int i = 0; i < v->cause.n; i++)
        printf("%s\"%s\"", i ? "," : "", v->cause.mistake[i]->name);
    printf("],\"explained\":%.6g", v->cause.n ? v->cause.explained : 0);
    for (int i = 0; i < v->cause.n_suspects; i++) {
        const struct suspect *p = &v->cause.suspect[i];
        printf("%s{\"name\":\"%s\",\"weight\":%.6g", i ? "," : ",\"suspects\":[",
               p->mistake->name, p->weight);
        if (isfinite(p->error)) printf(",\"error\":%.6g", p->error);
        putchar('}');
    }
    puts(v->cause.n_suspects ? "]}" : "}");
}

static void print_notes(const struct session *s, const struct reader *r, const struct total *t)
{
    if (r->width && r->width != s->config->n_vocab)
        fprintf(
            stderr,
            "conform: note: %s has %d columns, the model %d tokens: the first %d are compared\n",
            r->in.name, r->width, s->config->n_vocab, min_int(r->width, s->config->n_vocab));
    if (t->n_masked)
        fprintf(stderr,
                "conform: note: %s: %lld logits are -infinity, the first at position %d: a "
                "probability of 0 where ours is not makes the divergence infinite\n",
                r->in.name, t->n_masked, t->masked_at);
    if (t->n_log && !r->is_log)
        fprintf(stderr, "conform: note: %s holds log probabilities, ours are compared as such\n",
                r->in.name);
    if (r->form != FORM_KLD_BASE && !s->args->positions && r->n_rows != s->n_ids && r->n_rows > 1 &&
        r->form != FORM_JSON)
        fprintf(
            stderr,
            "conform: note: %s has %d rows and the text %d tokens: the last ones are compared\n",
            r->in.name, r->n_rows, s->n_ids);
    if (s->n_ids <= s->config->window &&
        memchr(s->config->is_local, 1, (size_t)s->config->n_layers))
        fprintf(
            stderr,
            "conform: note: %d tokens do not go beyond the window of %d: a mistake there cannot "
            "show\n",
            s->n_ids, s->config->window);
}

/* Ids of a base file come with it. */
static int open_for_compare(struct session *s, struct theirs *t, const struct args *a)
{
    int has_text = a->prompt || a->file || a->ids_file;
    int code = open_model(s, a);
    if (!code && has_text) code = read_ids(s);
    if (!code) code = open_theirs(t, s, a->value[0]);
    if (!code && t->reader.form == FORM_KLD_BASE && has_text) code = check_text(s, &t->reader);
    if (t->reader.form == FORM_KLD_BASE) s->params.n_ctx = t->reader.n_ctx;
    else s->params.n_ctx = s->n_ids;
    return code ? code : open_state(s);
}

/* Everything of a comparison but the report. */
static int compare_opened(struct session *s, struct theirs *t, struct result *r)
{
    struct comparison c = {.s = s, .t = t};
    struct cause cause = {.n = 0};
    size_t n_bytes = (size_t)s->max_rows * (size_t)s->config->n_vocab * sizeof *c.rows;
    int was_searched = 0,
        code = (c.rows = malloc(n_bytes)) ? 0 : out_of_memory(n_bytes, "their rows");
    if (!code) code = compare_rows(&c);
    if (!code && c.total.n == 0) code = complain("%s: nothing to compare", t->reader.in.name);
    if (!code && !s->args->other) print_notes(s, &t->reader, &c.total);
    if (!code && !s->args->no_diagnosis && band_of(c.total.sum_kl / c.total.n) > 0) {
        if (t->reader.n_pieces > 1) code = take_piece(s, &t->reader, 0);
        if (!code) code = align_rows(t, s, 0);
        if (!code) code = find_cause(s, t, c.kl, &cause);
        was_searched = 1;
    }
    if (!code) *r = judge(&c.total, &cause, was_searched, s->args);
    free(c.rows);
    free(c.kl);
    return code;
}

int compare_with(struct session *s, const char *path, struct result *r)
{
    struct theirs t;
    int code = open_theirs(&t, s, path);
    if (!code) code = open_state(s);
    if (!code) code = compare_opened(s, &t, r);
    close_theirs(&t);
    return code;
}

static int check_suspects(const struct args *a)
{
    int n_names = 0;
    for (const char *p = a->suspect; p && *p; n_names++) {
        size_t n = strcspn(p, ",");
        if (find_mistake(p, n) < 0)
            return complain("--suspect: there is no mistake \"%.*s\" (conform mistakes lists them)",
                            (int)n, p);
        p += n + (p[n] == ',');
    }
    return n_names <= MAX_SUSPECTS ? 0 : complain("--suspect: expected %d names at most",
                                                  MAX_SUSPECTS);
}

int compare(struct session *s, const struct args *a)
{
    struct theirs t = {.row_of = NULL};
    struct result r;
    int code = check_suspects(a);
    if (!code) code = open_for_compare(s, &t, a);
    if (!code && a->json) printf("{\"form\":\"%s\",\"positions\":[", t.reader.form_name);
    if (!code) code = compare_opened(s, &t, &r);
    if (!code) {
        if (a->json) print_json(&r);
        else print_verdict(&r);
        code = r.conforms ? CONFORMS : DIFFERS;
    }
    close_theirs(&t);
    return code;
}
