/* conform.c - everything that judges numbers: scores of a text, tensors inside the model, and how
 * another engine's logits compare with ours. make conform builds test/conform; test/conform --help
 * lists the commands. It uses the library through gemma3.h alone.
 */
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "compare.h"
#include "conform.h"

static const char default_model[] = "gemma3-folktales-q4_0.gguf";

enum { MAX_FILE_BYTES = 1 << 29 }; /* of a text: the tokenizer takes no more */

static int vcomplain(const char *format, va_list list, const char *end)
{
    fputs("conform: ", stderr);
    vfprintf(stderr, format, list);
    fputs(end, stderr);
    return WRONG;
}

int complain(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    int code = vcomplain(format, list, "\n");
    va_end(list);
    return code;
}

int out_of_memory(size_t n_bytes, const char *what)
{
    return complain("out of memory: %s needs %zu bytes", what, n_bytes);
}

/* A reader that has gone away knows. */
int flush_stdout(void)
{
    if (fflush(stdout) == 0 && !ferror(stdout)) return 0;
    if (errno == EPIPE) return WRONG;
    return complain("standard output: %s", strerror(errno ? errno : EIO));
}

/* ---- Files ---- */

/* Bytes of a regular file, 0 of anything else. */
static long long size_of_file(FILE *f)
{
    struct stat st;
    return fstat(fileno(f), &st) == 0 && S_ISREG(st.st_mode) ? (long long)st.st_size : 0;
}

int read_whole(const char *path, char **data, size_t *n)
{
    FILE *f = strcmp(path, "-") == 0 ? stdin : fopen(path, "rb");
    size_t room = 1 << 16, got = 0;
    if (!f) return complain("%s: %s", path, strerror(errno));
    long long size = size_of_file(f);
    char *bytes = size <= MAX_FILE_BYTES ? malloc(room + 1) : NULL;
    errno = 0;
    while (bytes) {
        got += fread(bytes + got, 1, room - got, f);
        if (got < room || room > MAX_FILE_BYTES) break;
        char *larger = realloc(bytes, (room *= 2) + 1);
        if (!larger) free(bytes);
        bytes = larger;
    }
    int failed = ferror(f), reason = errno;
    if (f != stdin) fclose(f);
    if (size > MAX_FILE_BYTES)
        return complain("%s: %lld bytes, expected at most %d", path, size, MAX_FILE_BYTES);
    if (!bytes) return out_of_memory(room, path);
    bytes[got] = 0;
    *data = bytes, *n = got;
    if (failed || got > MAX_FILE_BYTES) {
        free(bytes);
        *data = NULL;
        if (failed) return complain("%s: %s", path, strerror(reason));
        return complain("%s: expected at most %d bytes", path, MAX_FILE_BYTES);
    }
    return 0;
}

int write_floats(FILE *f, const float *x, size_t n)
{
    unsigned char bytes[4 * 512];
    for (size_t i = 0; i < n;) {
        size_t count = 0;
        for (; count < 512 && i < n; count++, i++) {
            uint32_t u;
            memcpy(&u, &x[i], 4);
            for (int k = 0; k < 4; k++) bytes[4 * count + k] = (unsigned char)(u >> 8 * k);
        }
        if (fwrite(bytes, 4, count, f) != count) return -1;
    }
    return 0;
}

int parse_numbers(const char *text, const char *separators, int32_t **out)
{
    size_t room = strlen(text) / 2 + 1, n = 0;
    int32_t *value = malloc(room * sizeof *value);
    text += strspn(text, separators);
    while (value && *text) {
        char *end;
        errno = 0;
        long number = strtol(text, &end, 10);
        if (end == text || (*end && !strchr(separators, *end)) || errno || number < INT32_MIN ||
            number > INT32_MAX || n == INT_MAX) {
            free(value);
            return -1;
        }
        value[n++] = (int32_t)number;
        text = end + strspn(end, separators);
    }
    *out = value;
    return value ? (int)n : -1;
}

/* ---- A session ---- */

/* The model that comes with the source lies in weights/, beside the folder of this program. */
static const char *find_model(const char *program, char *path, size_t size)
{
    const char *slash = strrchr(program, '/');
    int n_dir = slash ? (int)(slash - program) + 1 : 0;
    const char *way[] = {"../weights/", "weights/"};
    for (int i = 0; i < 3; i++) {
        snprintf(path, size, "%.*s%s%s", i < 2 ? n_dir : 0, program, way[i > 0], default_model);
        if (access(path, R_OK) == 0) return path;
    }
    return NULL;
}

int open_model(struct session *s, const struct args *a)
{
    gemma3_error err;
    *s = (struct session){.args = a, .pool = gemma3_pool_new(a->n_threads, &err)};
    if (!s->pool) return complain("%s", err.text);
    gemma3_options o = {.exact = a->exact, .isa = a->isa, .n_threads = a->n_threads,
                        .parallel_for = gemma3_pool_run, .pool = s->pool};
    s->model = gemma3_open(a->model, &o, &err);
    if (!s->model) return complain("%s", err.text);
    s->config = gemma3_model_config(s->model);
    s->tokenizer = gemma3_model_tokenizer(s->model);
    s->params = gemma3_default_params(s->model);
    if (a->n_ctx) s->params.n_ctx = a->n_ctx;
    if (a->kv) s->params.kv_type = strcmp(a->kv, "f32") == 0 ? GEMMA3_KV_F32 : GEMMA3_KV_F16;
    s->params.n_batch = a->n_batch;
    s->params.n_threads = a->n_threads;
    s->params.parallel_for = gemma3_pool_run;
    s->params.pool = s->pool;
    s->max_rows = min_int(a->n_batch, ROWS_AT_ONCE);
    return 0;
}

static int encode_text(struct session *s, const char *text, size_t n)
{
    int flags = (s->args->no_bos ? 0 : GEMMA3_BOS) | (s->args->special ? GEMMA3_SPECIAL : 0);
    s->ids = malloc((n + 1) * sizeof *s->ids);
    if (!s->ids) return out_of_memory((n + 1) * sizeof *s->ids, "the ids of the text");
    s->n_ids = gemma3_encode(s->tokenizer, text, n, flags, s->ids, (int)n + 1);
    return s->n_ids < 0 ? out_of_memory(gemma3_encode_work(n), "encoding the text") : 0;
}

static int take_ids(struct session *s, const char *path, const char *text, size_t n_bytes)
{
    s->n_ids = strlen(text) == n_bytes ? parse_numbers(text, " \t\r\n\v\f", &s->ids) : -1;
    if (s->n_ids < 0) return complain("%s: expected ids separated by spaces or line ends", path);
    for (int i = 0; i < s->n_ids; i++)
        if (s->ids[i] < 0 || s->ids[i] >= s->config->n_vocab)
            return complain("%s: id %d is outside the vocabulary, 0 to %d", path, (int)s->ids[i],
                            s->config->n_vocab - 1);
    return 0;
}

int read_ids(struct session *s)
{
    const struct args *a = s->args;
    char *text = NULL;
    size_t n = 0;
    int code = 0;
    if (a->prompt) code = encode_text(s, a->prompt, strlen(a->prompt));
    else code = read_whole(a->ids_file ? a->ids_file : a->file, &text, &n);
    if (!code && a->ids_file) code = take_ids(s, a->ids_file, text, n);
    else if (!code && a->file) code = encode_text(s, text, n);
    free(text);
    if (!code && s->n_ids == 0) return complain("the text has no tokens");
    return code;
}

int open_state(struct session *s)
{
    gemma3_error err;
    size_t n_bytes = (size_t)s->config->n_vocab * (size_t)s->max_rows * sizeof *s->logits;
    if (!s->logits) s->logits = malloc(n_bytes);
    if (!s->logits) return out_of_memory(n_bytes, "the logits");
    s->state = gemma3_state_new(s->model, &s->params, &err);
    return s->state ? 0 : complain("%s", err.text);
}

void close_session(struct session *s)
{
    free(s->ids);
    free(s->logits);
    gemma3_state_free(s->state);
    gemma3_close(s->model);
    gemma3_pool_free(s->pool);
}

/* A context that is not said is as long as the text, when that is longer than the default. */
static int open_for_text(struct session *s, const struct args *a)
{
    int code = open_model(s, a);
    if (!code) code = read_ids(s);
    if (!code && !a->n_ctx && s->n_ids > s->params.n_ctx) s->params.n_ctx = s->n_ids;
    if (!code && s->n_ids > s->params.n_ctx)
        code = complain("the text has %d tokens and the context room for %d: give -c %d or more",
                        s->n_ids, s->params.n_ctx, s->n_ids);
    return code;
}

int run_ids(struct session *s, const char *wanted, take_rows *take, void *user)
{
    for (int i = 0, n; i < s->n_ids; i += n) {
        int rows[ROWS_AT_ONCE], position[ROWS_AT_ONCE], n_rows = 0;
        for (n = 0; i + n < s->n_ids && n < GEMMA3_MAX_UBATCH && n_rows < s->max_rows; n++)
            if (!wanted || wanted[i + n]) {
                position[n_rows] = i + n;
                rows[n_rows++] = n;
            }
        if (gemma3_forward(s->state, s->ids + i, n, rows, n_rows, s->logits))
            return complain("%s", gemma3_state_error(s->state));
        int code = n_rows ? take(user, position, n_rows, s->logits) : 0;
        if (code) return code;
    }
    return 0;
}

void share_out(const struct session *s, int n, gemma3_task *task, void *job)
{
    gemma3_pool_run(s->pool, n, task, job);
}

/* ---- Scores ---- */

/* -log p of the token after each row; rows are shared out to the threads. */
struct scores {
    struct session *s;
    const int32_t *ids;      /* whose position is that of the rows */
    const int *position;
    const float *rows;
    double nll[ROWS_AT_ONCE];
};

static void score_row(void *job, int i, int worker)
{
    struct scores *c = job;
    int n_vocab = c->s->config->n_vocab;
    (void)worker;
    c->nll[i] = gemma3_nll(c->rows + (size_t)i * (size_t)n_vocab, n_vocab,
                           c->ids[c->position[i] + 1]);
}

/* No figure is made of what is none. */
static int refuse_score(int position)
{
    return complain("the logits at position %d are not numbers: no score (try --kv f32 or --exact)",
                    position);
}

static int print_scores(void *user, const int *position, int n_rows, const float *rows)
{
    struct scores *c = user;
    c->position = position, c->rows = rows;
    if (position[n_rows - 1] + 1 == c->s->n_ids) n_rows--; /* nothing comes after the last */
    share_out(c->s, n_rows, score_row, c);
    for (int i = 0; i < n_rows; i++) {
        if (!isfinite(c->nll[i])) return flush_stdout(), refuse_score(position[i]);
        printf("%d %d %.9g\n", position[i] + 1, (int)c->ids[position[i] + 1], c->nll[i]);
    }
    return flush_stdout();
}

static int nll(struct session *s, const struct args *a)
{
    int code = open_for_text(s, a);
    if (!code) code = open_state(s);
    struct scores c = {.s = s, .ids = s->ids};
    return code ? code : run_ids(s, NULL, print_scores, &c);
}

/* Sums over the tokens that perplexity scores. */
struct totals {
    double nll, nll_squared;
    size_t n, n_bytes;       /* tokens, and their text */
};

static void add_scores(struct totals *sum, const struct scores *c, int n_rows)
{
    for (int r = 0; r < n_rows; r++) {
        char piece[GEMMA3_PIECE_MAX];
        int32_t next = c->ids[c->position[r] + 1];
        sum->nll += c->nll[r];
        sum->nll_squared += c->nll[r] * c->nll[r];
        sum->n++;
        sum->n_bytes += (size_t)gemma3_decode(c->s->tokenizer, next, 0, piece);
    }
}

/* One piece of n tokens: <bos> in place of its first (as llama-perplexity does), scores for the
 * second half. Position i gives the probability of token i + 1. */
static int score_piece(struct session *s, const int32_t *ids, int n, struct totals *sum)
{
    const gemma3_vocab *v = gemma3_tokenizer_vocab(s->tokenizer);
    gemma3_state_reset(s->state);
    for (int i = 0, count; i < n - 1; i += count) {
        int rows[ROWS_AT_ONCE], position[ROWS_AT_ONCE], n_rows = 0;
        int32_t part[ROWS_AT_ONCE];
        count = min_int(n - 1 - i, s->max_rows);
        memcpy(part, ids + i, (size_t)count * sizeof *part);
        if (i == 0 && v->bos >= 0 && v->add_bos && !s->args->no_bos) part[0] = v->bos;
        for (int k = 0; k < count; k++)
            if (i + k >= n / 2) {
                position[n_rows] = i + k;
                rows[n_rows++] = k;
            }
        if (gemma3_forward(s->state, part, count, rows, n_rows, s->logits))
            return complain("%s", gemma3_state_error(s->state));
        struct scores c = {.s = s, .ids = ids, .position = position, .rows = s->logits};
        share_out(s, n_rows, score_row, &c);
        for (int r = 0; r < n_rows; r++)
            if (!isfinite(c.nll[r])) return flush_stdout(), refuse_score(position[r]);
        add_scores(sum, &c, n_rows);
    }
    return 0;
}

static int print_totals(const struct session *s, const struct totals *sum, int n)
{
    double n_scored = (double)sum->n, mean = sum->nll / n_scored;
    double variance = sum->nll_squared / n_scored - mean * mean, ppl = gemma3_exp(mean);
    double error = variance > 0 && sum->n > 1 ? ppl * sqrt(variance / (n_scored - 1)) : 0;
    printf("\ntokens scored %zu of %d, chunks %d of %d\n", sum->n, s->n_ids, s->n_ids / n, n);
    printf("mean nll %.9g\n", mean);
    if (sum->n_bytes)
        printf("bits per byte %.9g\n", sum->nll / gemma3_log(2) / (double)sum->n_bytes);
    printf("ppl %.4f +- %.5f\n", ppl, error);
    return 0;
}

static int perplexity(struct session *s, const struct args *a)
{
    int code = open_model(s, a), n = a->n_ctx ? a->n_ctx : DEFAULT_PIECE;
    struct totals sum = {0, 0, 0, 0};
    if (!code) code = read_ids(s);
    if (!code && s->n_ids / 2 < n)
        return complain(
            "the text has %d tokens; perplexity needs two pieces of %d (-c), %.0f tokens", s->n_ids,
            n, 2.0 * n);
    s->params.n_ctx = n;
    if (!code) code = open_state(s);
    for (int i = 0; i < s->n_ids / n && !code; i++) {
        code = score_piece(s, s->ids + (size_t)i * (size_t)n, n, &sum);
        if (!code) printf("[%d]%.4f,", i + 1, gemma3_exp(sum.nll / (double)sum.n));
        if (!code) code = flush_stdout();
    }
    return code ? code : print_totals(s, &sum, n);
}

void print_piece(FILE *out, const gemma3_tokenizer *t, int32_t id)
{
    char text[GEMMA3_PIECE_MAX];
    int n = gemma3_decode(t, id, GEMMA3_SPECIAL, text);
    fputc('"', out);
    for (int i = 0; i < n; i++) {
        unsigned char c = (unsigned char)text[i];
        if (c == '\n') fputs("\\n", out);
        else if (c == '"' || c == '\\') fprintf(out, "\\%c", c);
        else if (c < 32 || c == 127 || (n == 1 && c > 127)) fprintf(out, "\\x%02x", c);
        else fputc(c, out);
    }
    fputc('"', out);
}

/* By logit down, then by id up; what is not a number comes last. */
static int by_logit(const void *left, const void *right)
{
    const gemma3_candidate *a = left, *b = right;
    float x = isnan(a->logit) ? -INFINITY : a->logit, y = isnan(b->logit) ? -INFINITY : b->logit;
    if (x != y) return x < y ? 1 : -1;
    return (a->id > b->id) - (a->id < b->id);
}

/* p = exp(l - largest - log(sum)), where log(sum) is the largest one's nll. */
static int print_top(void *user, const int *position, int n_rows, const float *row)
{
    struct session *s = user;
    int n_vocab = s->config->n_vocab, n = atoi(s->args->value[0]);
    gemma3_candidate *c = malloc((size_t)n_vocab * sizeof *c);
    (void)position, (void)n_rows;
    if (!c) return out_of_memory((size_t)n_vocab * sizeof *c, "sorting");
    for (int i = 0; i < n_vocab; i++) c[i] = (gemma3_candidate){row[i], i};
    qsort(c, (size_t)n_vocab, sizeof *c, by_logit);
    double log_sum = gemma3_nll(row, n_vocab, c[0].id);
    for (int i = 0; i < min_int(n, n_vocab); i++) {
        printf("%d\t", (int)c[i].id);
        print_piece(stdout, s->tokenizer, c[i].id);
        printf("\t%.9g\t%.9g\n", (double)c[i].logit,
               gemma3_exp((double)c[i].logit - (double)c[0].logit - log_sum));
    }
    free(c);
    return 0;
}

/* Rows of the last position alone. NULL without memory. */
static char *last_only(const struct session *s)
{
    char *wanted = calloc((size_t)s->n_ids, 1);
    if (wanted) wanted[s->n_ids - 1] = 1;
    return wanted;
}

static int top(struct session *s, const struct args *a)
{
    char *end;
    long n = strtol(a->value[0], &end, 10);
    if (*a->value[0] == 0 || *end || n < 1 || n > INT_MAX)
        return complain("top %s: expected a whole number from 1 to %d", a->value[0], INT_MAX);
    int code = open_for_text(s, a);
    if (!code) code = open_state(s);
    if (code) return code;
    char *wanted = last_only(s);
    if (!wanted) return out_of_memory((size_t)s->n_ids, "the positions");
    code = run_ids(s, wanted, print_top, s);
    free(wanted);
    return code;
}

/* ---- Tensors inside ---- */

/* One tensor that was asked for. The text comes in several calls: rows are appended. */
struct tensor_seen {
    char name[64];           /* with its layer: l_out-7 */
    size_t n_rows;
    int width;
    float first[3], last[3], least, most;
    double sum;
};

struct watch {
    const char *names;       /* the list */
    const char *dir;         /* NULL: summaries */
    struct tensor_seen *seen;
    int n_seen, room;
    char trouble[300];       /* what went wrong, "" while nothing has */
};

/* Whether a name of the list, of n bytes, asks for this tensor: l_out is every layer's. */
static int asks_for(const char *wanted, size_t n, const char *name, const char *with_layer)
{
    return (strlen(name) == n && memcmp(wanted, name, n) == 0) ||
           (strlen(with_layer) == n && memcmp(wanted, with_layer, n) == 0);
}

static int is_watched(const struct watch *w, const char *name, const char *with_layer)
{
    for (const char *p = w->names; *p; p += *p == ',') {
        size_t n = strcspn(p, ",");
        if (asks_for(p, n, name, with_layer)) return 1;
        p += n;
    }
    return 0;
}

static struct tensor_seen *find_seen(struct watch *w, const char *with_layer)
{
    for (int i = 0; i < w->n_seen; i++)
        if (strcmp(w->seen[i].name, with_layer) == 0) return &w->seen[i];
    if (w->n_seen == w->room) {
        int room = w->room ? 2 * w->room : 64;
        struct tensor_seen *larger = realloc(w->seen, (size_t)room * sizeof *larger);
        if (!larger) return NULL;
        w->seen = larger, w->room = room;
    }
    struct tensor_seen *t = &w->seen[w->n_seen++];
    *t = (struct tensor_seen){.least = INFINITY, .most = -INFINITY};
    snprintf(t->name, sizeof t->name, "%s", with_layer);
    return t;
}

/* first and last: the first and the last three values of the whole tensor. */
static void summarize(struct tensor_seen *t, const float *x, size_t n)
{
    if (t->n_rows == 0) memcpy(t->first, x, (n < 3 ? n : 3) * sizeof *x);
    if (n >= 3) memcpy(t->last, x + n - 3, 3 * sizeof *x);
    for (size_t i = 0; i < n; i++) {
        t->sum += (double)x[i];
        t->least = x[i] < t->least ? x[i] : t->least;
        t->most = x[i] > t->most ? x[i] : t->most;
    }
}

/* Opened anew for every call: all layers of all tensors are more files than may be open at once. */
static void append_floats(struct watch *w, const struct tensor_seen *t, const float *x, size_t n)
{
    char path[4096];
    if (snprintf(path, sizeof path, "%s/%s.f32", w->dir, t->name) >= (int)sizeof path) {
        snprintf(w->trouble, sizeof w->trouble, "--dir: the name is too long");
        return;
    }
    FILE *f = fopen(path, t->n_rows ? "ab" : "wb");
    int failed = !f || write_floats(f, x, n);
    if ((f && fclose(f)) || failed)
        snprintf(w->trouble, sizeof w->trouble, "%.200s: %.80s", path, strerror(errno));
}

/* The library calls this with every tensor inside. */
static void see_tensor(void *user, const char *name, int layer, int pos, int n, int width,
                       float *data)
{
    struct watch *w = user;
    char with_layer[64];
    (void)pos;
    snprintf(with_layer, sizeof with_layer, layer < 0 ? "%s" : "%s-%d", name, layer);
    if (w->trouble[0] || !is_watched(w, name, with_layer)) return;
    struct tensor_seen *t = find_seen(w, with_layer);
    if (!t) {
        snprintf(w->trouble, sizeof w->trouble, "out of memory for the trace");
        return;
    }
    size_t n_values = (size_t)n * (size_t)width;
    if (w->dir) append_floats(w, t, data, n_values);
    else summarize(t, data, n_values);
    t->n_rows += (size_t)n;
    t->width = width;
}

/* Whether a name of n bytes is a label, or, as l_out-7, one with a layer. */
static int is_label(const char *name, size_t n, int n_layers)
{
    const char *label;
    int in_layers;
    for (int i = 0; (label = gemma3_trace_label(i, &in_layers)); i++) {
        if (asks_for(name, n, label, label)) return 1;
        for (int l = 0; in_layers && l < n_layers; l++) {
            char with_layer[64];
            snprintf(with_layer, sizeof with_layer, "%s-%d", label, l);
            if (asks_for(name, n, label, with_layer)) return 1;
        }
    }
    return 0;
}

/* Before anything is computed: are all names of the list known? */
static int check_names(const char *names, int n_layers)
{
    for (const char *p = names;; p++) {
        size_t n = strcspn(p, ",");
        if (!is_label(p, n, n_layers))
            return complain("trace: the model has no tensor \"%.*s\" (names are llama.cpp's: "
                            "attn_norm, Qcur, l_out-0, result_norm ...)", (int)n, p);
        p += n;
        if (!*p) return 0;
    }
}

/* Makes the folder unless it is there. */
static int make_folder(const char *path)
{
    struct stat st;
    if (mkdir(path, 0777) == 0) return 0;
    if (errno == EEXIST && stat(path, &st) == 0 && !S_ISDIR(st.st_mode)) errno = ENOTDIR;
    if (errno != EEXIST || access(path, W_OK | X_OK))
        return complain("%s: %s", path, strerror(errno));
    return 0;
}

static int print_watched(const struct watch *w)
{
    for (int i = 0; i < w->n_seen; i++) {
        const struct tensor_seen *t = &w->seen[i];
        printf("%s [%zu][%d]", t->name, t->n_rows, t->width);
        if (w->dir) printf(" %s/%s.f32\n", w->dir, t->name);
        else
            printf(" first %.9g %.9g %.9g last %.9g %.9g %.9g sum %.9g min %.9g max %.9g\n",
                   t->first[0], t->first[1], t->first[2], t->last[0], t->last[1], t->last[2],
                   t->sum, t->least, t->most);
    }
    return 0;
}

/* The rows are traced, and nobody needs them here. */
static int after_tile(void *user, const int *position, int n_rows, const float *rows)
{
    const struct watch *w = user;
    (void)position, (void)n_rows, (void)rows;
    return w->trouble[0] ? complain("%s", w->trouble) : 0;
}

/* Rows of logits cost most: all are computed only when a tensor after the layers is asked for. */
static int trace(struct session *s, const struct args *a)
{
    struct watch w = {.names = a->value[0], .dir = a->dir};
    int code = open_for_text(s, a);
    if (!code) code = check_names(w.names, s->config->n_layers);
    if (!code && w.dir) code = make_folder(w.dir);
    s->params.trace = see_tensor;
    s->params.trace_user = &w;
    if (!code) code = open_state(s);
    char *wanted = code || strstr(w.names, "result_") ? NULL : last_only(s);
    if (!code) code = run_ids(s, wanted, after_tile, &w);
    if (!code && w.trouble[0]) code = complain("%s", w.trouble);
    if (!code) code = print_watched(&w);
    free(wanted);
    free(w.seen);
    return code;
}

/* ---- The known mistakes ---- */

static int list_mistakes(struct session *s, const struct args *a)
{
    (void)s, (void)a;
    for (int i = 0; i < n_mistakes; i++)
        printf("%-24s %s\n", mistakes[i].name, mistakes[i].sentence);
    return 0;
}

/* ---- The command line ---- */

static const struct command {
    const char *name, *values; /* what stands after it without a name */
    int least, most;         /* how many of those */
    int (*run)(struct session *s, const struct args *a);
    const char *help;
} commands[] = {
    {"nll", "", 0, 0, nll,
     "for each position: pos, id, -log p(id given those before)"},
    {"perplexity", "", 0, 0, perplexity,
     "of a text by llama-perplexity's method: pieces of -c tokens (default\n"
     "512), the second half of each is scored"},
    {"top", "N", 1, 1, top,
     "the N likeliest next tokens: id, text, logit, probability"},
    {"trace", "NAMES", 1, 1, trace,
     "tensors inside, by llama.cpp's labels: l_out-7,attn_norm (of every\n"
     "layer); with --dir DIR whole, as DIR/l_out-7.f32"},
    {"compare", "OTHER", 1, 1, compare,
     "another engine's logits, in the file OTHER, against our exact mode:\n"
     "how far they are, whether that conforms, and if not which known\n"
     "mistake explains it. Forms, told apart by content: raw float32,\n"
     ".npy or .safetensors, [T][V] or of the last position [V]; the base\n"
     "file of llama-perplexity (its ids come with it); JSON lines of a\n"
     "server with \"top_logprobs\""},
    {"mistakes", "", 0, 0, list_mistakes, "names of the known mistakes, and what each is"},
    {"layers", "DIR", 1, 1, layers,
     "tensors inside another engine against ours, in order: the first that\n"
     "differs is named, and what stands before it. DIR: files by llama.cpp's\n"
     "labels (l_out-7.npy .f32 .safetensors), transformers' hidden_states, or\n"
     "a file with the text of llama-eval-callback"},
    {"check", "[NAME]..", 0, MAX_VALUES, check,
     "this build against the vectors in test/vectors (or --dir), all models\n"
     "or those named, every bit; with --other, another engine"},
    {"vectors", "DIR [NAME]..", 1, MAX_VALUES, write_vectors, "writes them"},
    {"export", "", 0, 0, export_logits,
     "exact mode's logits for other programs: --npy, --safetensors or\n"
     "--kld-base FILE (what llama-perplexity --kl-divergence-base reads, of\n"
     "pieces of -c tokens, default 512)"},
};

enum { N_COMMANDS = sizeof commands / sizeof *commands };

/* Those that take a model and a text. */
#define TEXTS "nll perplexity top trace compare layers export"

enum option_kind { FLAG, NUMBER, TEXT };

struct option {
    const char *name, *value; /* as typed; what --help calls its value */
    enum option_kind kind;
    size_t field;            /* offset in struct args */
    int least, most;         /* of a NUMBER */
    const char *commands;    /* that take it; NULL: all */
    const char *help;
};

#define FIELD(name) offsetof(struct args, name)

static const struct option options[] = {
    {"-m", "MODEL", TEXT, FIELD(model), 0, 0, TEXTS,
     "a Gemma 3 GGUF; default: the small one in weights/"},
    {"-p", "TEXT", TEXT, FIELD(prompt), 0, 0, TEXTS, "the text, after <bos>"},
    {"-f", "FILE", TEXT, FIELD(file), 0, 0, TEXTS, "the text in FILE; - is stdin"},
    {"--ids", "FILE", TEXT, FIELD(ids_file), 0, 0, TEXTS,
     "the ids in FILE, separated by spaces or line ends; no <bos> is added"},
    {"--no-bos", NULL, FLAG, FIELD(no_bos), 0, 0, TEXTS, "no <bos> before the text"},
    {"--special", NULL, FLAG, FIELD(special), 0, 0, TEXTS,
     "control tokens spelled in the text are those tokens"},
    {"--dir", "DIR", TEXT, FIELD(dir), 0, 0, "trace check",
     "trace: whole tensors, float32, little-endian; DIR is made when absent"},
    {"--other", "COMMAND", TEXT, FIELD(other), 0, 0, "check",
     "runs an engine for each prompt and judges it: {ids} is a file of ids,\n"
     "{out} the file for its logits, also {model} and {n_vocab}"},
    {"--positions", "LIST", TEXT, FIELD(positions), 0, 0, "compare export",
     "those that OTHER has rows of, or that are exported, as 0,5,-1; from\nthe end when negative"},
    {"--npy", "FILE", TEXT, FIELD(npy), 0, 0, "export", "a NumPy array [positions][n_vocab]"},
    {"--safetensors", "FILE", TEXT, FIELD(safetensors), 0, 0, "export",
     "a tensor \"logits\" of that shape"},
    {"--kld-base", "FILE", TEXT, FIELD(kld_base), 0, 0, "export",
     "a base file of llama-perplexity"},
    {"--json", NULL, FLAG, FIELD(json), 0, 0, "compare", "the report as JSON"},
    {"--each", NULL, FLAG, FIELD(each), 0, 0, "compare", "a line for each position too"},
    {"--band", "NAME", TEXT, FIELD(band), 0, 0, "compare layers check",
     "what noise conforms: float32 kv-f16 bf16 int8 4-bit; default of compare\n"
     "int8, of layers float32"},
    {"--no-diagnosis", NULL, FLAG, FIELD(no_diagnosis), 0, 0, "compare check",
     "do not look for the mistake that explains a difference"},
    {"--suspect", "LIST", TEXT, FIELD(suspect), 0, 0, "compare",
     "looks for these mistakes alone, and says how much of each is in the\n"
     "difference: names of conform mistakes, separated by commas"},
    {"-c", "N", NUMBER, FIELD(n_ctx), 1, 1 << 24, "nll perplexity top trace export",
     "context in tokens; default: enough for the text"},
    {"-t", "N", NUMBER, FIELD(n_threads), 1, GEMMA3_MAX_THREADS, NULL,
     "threads; default: physical cores"},
    {"-b", "N", NUMBER, FIELD(n_batch), 1, INT_MAX, NULL, "tokens taken at once; default 64"},
    {"--exact", NULL, FLAG, FIELD(exact), 0, 0, "nll perplexity top trace",
     "weights and activations in float32"},
    {"--kv", "f16|f32", TEXT, FIELD(kv), 0, 0, TEXTS,
     "numbers in the cache; default f16, with --exact f32"},
    {"--isa", "NAME", TEXT, FIELD(isa), 0, 0, NULL, "force the kernels of an instruction set"},
    {"--help", NULL, FLAG, FIELD(help), 0, 0, NULL, "this text, or, after a command, its own"},
};

enum { N_OPTIONS = sizeof options / sizeof *options };

static int refuse(const char *format, ...)
{
    va_list list;
    va_start(list, format);
    int code = vcomplain(format, list, " (conform --help lists the commands)\n");
    va_end(list);
    return code;
}

static void print_entry(const char *name, const char *value, const char *help)
{
    int n = printf("  %s %s", name, value ? value : "");
    printf("%*s", n < 22 ? 22 - n : 1, "");
    for (const char *c = help; *c; c++)
        if (*c == '\n') printf("\n%22s", "");
        else putchar(*c);
    putchar('\n');
}

static int takes(const struct command *c, const struct option *o)
{
    if (!o->commands || !c) return 1;
    for (const char *p = o->commands; *p; p += strspn(p, " ")) {
        size_t n = strcspn(p, " ");
        if (strlen(c->name) == n && memcmp(p, c->name, n) == 0) return 1;
        p += n;
    }
    return 0;
}

static int print_help(const struct command *only)
{
    if (only) printf("usage: conform %s %s [options]\n\n", only->name, only->values);
    else
        puts("usage: conform COMMAND -m MODEL -p TEXT | -f FILE | --ids FILE [options]\n\n"
             "Judges numbers: those of another engine against ours, to find out whether it is "
             "right, how\n"
             "close, and if not which mistake it makes; and ours alone.\n");
    for (int i = 0; i < N_COMMANDS; i++)
        if (!only || only == &commands[i])
            print_entry(commands[i].name, commands[i].values, commands[i].help);
    puts("\nOptions:");
    for (int i = 0; i < N_OPTIONS; i++)
        if (takes(only, &options[i]))
            print_entry(options[i].name, options[i].value, options[i].help);
    puts("\nExit: 0 it conforms, or all went well; 1 it does not conform; 2 the command line or "
         "the\n"
         "input was wrong.");
    return 0;
}

static const struct option *find_option(const char *name, size_t n)
{
    for (int i = 0; i < N_OPTIONS; i++)
        if (strlen(options[i].name) == n && memcmp(options[i].name, name, n) == 0)
            return &options[i];
    return NULL;
}

static int set_option(struct args *a, const struct option *o, const char *text)
{
    void *field = (char *)a + o->field;
    char *end;
    errno = 0;
    if (o->kind == FLAG) *(int *)field = 1;
    if (o->kind == TEXT) *(const char **)field = text;
    if (o->kind == NUMBER) {
        long x = strtol(text, &end, 10);
        if (end == text || *end || errno || x < o->least || x > o->most)
            return refuse("%s %s: expected a whole number from %d to %d", o->name, text, o->least,
                          o->most);
        *(int *)field = (int)x;
    }
    return 0;
}

static int parse_args(struct args *a, const struct command *c, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *text = NULL;
        size_t n = strcspn(name, "=");
        const struct option *o = *name == '-' && name[1] ? find_option(name, n) : NULL;
        if (!o && (*name != '-' || !name[1])) {
            if (a->n_values == MAX_VALUES || a->n_values == c->most)
                return refuse("unexpected argument \"%s\"", name);
            a->value[a->n_values++] = name;
            continue;
        }
        if (!o) return refuse("unknown option %s", name);
        if (!takes(c, o)) return refuse("%s does not belong to %s", o->name, c->name);
        if (name[n] == '=') text = name + n + 1;
        if (o->kind == FLAG && text) return refuse("%s takes no value", o->name);
        if (o->kind != FLAG && !text) {
            if (i + 1 == argc) return refuse("%s needs a value: %s", o->name, o->value);
            text = argv[++i];
        }
        int code = set_option(a, o, text);
        if (code) return code;
    }
    return 0;
}

/* check and vectors know theirs. */
static int needs_model(const struct command *c)
{
    return c->run != check && c->run != write_vectors && c->run != list_mistakes;
}

static int check_args(const struct args *a, const struct command *c)
{
    if (a->n_values < c->least) return refuse("%s needs %s", c->name, c->values);
    if (!!a->prompt + !!a->file + !!a->ids_file > 1)
        return refuse("contradictory: one of -p, -f and --ids, not several");
    int needs_text = needs_model(c) && c->run != compare;
    if (needs_text && !a->prompt && !a->file && !a->ids_file)
        return refuse("%s needs a text: -p TEXT, -f FILE (- is stdin) or --ids FILE", c->name);
    if (a->kv && strcmp(a->kv, "f16") != 0 && strcmp(a->kv, "f32") != 0)
        return refuse("--kv %s: expected f16 or f32", a->kv);
    if (a->band && find_band(a->band) < 0) return refuse("--band %s: no such band", a->band);
    if (c->run == perplexity && a->n_ctx && a->n_ctx < 3)
        return refuse("-c %d: perplexity needs pieces of 3 tokens or more", a->n_ctx);
    if (!a->isa) return 0;
    char list[256] = "";
    for (int i = 0; gemma3_isa_name(i); i++) {
        if (strcmp(gemma3_isa_name(i), a->isa) == 0) return 0;
        size_t n = strlen(list);
        snprintf(list + n, sizeof list - n, " %s", gemma3_isa_name(i));
    }
    return refuse("--isa %s: this CPU can run%s", a->isa, list);
}

static const struct command *find_command(const char *name)
{
    for (int i = 0; i < N_COMMANDS; i++)
        if (strcmp(commands[i].name, name) == 0) return &commands[i];
    return NULL;
}

/* No file that we open may get the number of a stream that the caller has closed. */
static void fill_streams(void)
{
    for (int fd = 0; fd < 3; fd++)
        if (fcntl(fd, F_GETFD) < 0 && open("/dev/null", fd == 0 ? O_WRONLY : O_RDONLY) < 0) return;
}

int main(int argc, char **argv)
{
    struct args a = {.n_threads = gemma3_default_threads(), .n_batch = GEMMA3_MAX_UBATCH};
    struct session s = {.args = &a};
    char found[4096];
    fill_streams();
    signal(SIGPIPE, SIG_IGN); /* a reader that goes away is an error of writing, not our end; */
    signal(SIGXFSZ, SIG_IGN); /* and so is a file beyond its limit */
    if (argc < 2) return refuse("which command?");
    int is_help = strcmp(argv[1], "--help") == 0 || strcmp(argv[1], "-h") == 0;
    const struct command *c = find_command(argv[1]);
    if (!c && !is_help) return refuse("there is no command \"%s\"", argv[1]);
    int code = is_help ? print_help(NULL) : parse_args(&a, c, argc - 1, argv + 1);
    if (!is_help && !code && a.help) code = print_help(c);
    else if (!is_help && !code) {
        code = check_args(&a, c);
        if (c->run == compare || c->run == export_logits || c->run == layers) a.exact = 1;
        if (!code && !a.model) a.model = find_model(argv[0], found, sizeof found);
        if (!code && !a.model && needs_model(c)) code = refuse("no model: give -m MODEL.gguf");
        if (!code) {
            code = c->run(&s, &a);
            close_session(&s);
        }
    }
    if (code == WRONG) return code; /* said already, or nobody reads */
    int flushed = flush_stdout();
    return flushed ? flushed : code;
}
