/* layers.c - the command layers: tensors inside another engine against ours, in the order in which
 * they come, up to the first that differs.
 *
 * Theirs are a folder of files named by llama.cpp's labels (l_out-7.npy, .f32, .bin, .safetensors),
 * one safetensors file of tensors with such names, transformers' hidden states, or the text that
 * llama-eval-callback prints. Nothing is held whole: our trace shows a few rows, theirs are read
 * then.
 */
#include <dirent.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "compare.h"

enum { MAX_PRINTED = 6 * 6 * 6 * 6, PRINTED_AT_END = 3 };

/* What makes each tensor out of those before it. */
static const struct step {
    const char *label, *what;
} steps[] = {
    {"inp_scaled", "the embedding row times sqrt(d_model)"},
    {"attn_norm", "the norm with attn_norm.weight"},
    {"Qcur_raw", "attn_q.weight"},
    {"Kcur_raw", "attn_k.weight"},
    {"Vcur", "attn_v.weight"},
    {"Qcur_normed", "the norm of each query head with attn_q_norm.weight"},
    {"Kcur_normed", "the norm of each key head with attn_k_norm.weight"},
    {"Qcur", "RoPE of the queries"},
    {"Kcur", "RoPE of the keys"},
    {"kqv_out", "attention: the query scale, which keys are seen, softmax, the cache"},
    {"attn_out", "attn_output.weight"},
    {"attn_post_norm", "the norm with post_attention_norm.weight"},
    {"sa_out", "the residual added"},
    {"ffn_norm", "the norm with ffn_norm.weight"},
    {"ffn_gate", "ffn_gate.weight"},
    {"ffn_up", "ffn_up.weight"},
    {"ffn_geglu", "GELU of the gate, times up"},
    {"ffn_out", "ffn_down.weight"},
    {"ffn_post_norm", "the norm with post_ffw_norm.weight"},
    {"l_out", "the residual added"},
    {"result_norm", "the norm with output_norm.weight"},
    {"result_output", "the head, and softcap"},
};
enum { N_STEPS = sizeof steps / sizeof *steps, FIRST_OF_LAYER = 1, LAST_OF_LAYER = N_STEPS - 3 };

/* A tensor of theirs. */
struct tensor {
    char name[64];           /* label-layer */
    char path[1024];
    int is_raw, is_printed;
    struct array array;
    uint64_t size;           /* of a raw file */
    int heads;               /* of an array [heads][tokens][head_dim]; 0: [tokens][width] */
    int dim[4];              /* printed: fastest first */
    float *printed;          /* values, in the order of print */
    int n_printed;
    int order;               /* as our trace saw it, from 1; 0: not yet */
    int width, n_rows;
    double sum_diff, sum_ours, max_diff;
    int worst;               /* position of the largest difference */
};

struct layers {
    struct session *s;
    const char *path;
    struct tensor *tensor;
    int n, room, n_seen;
    float *theirs;           /* [room for a trace's rows] */
    size_t room_theirs;
    int code;
};

/* ---- Names ---- */

static int step_of(const char *label, size_t n)
{
    for (int i = 0; i < N_STEPS; i++)
        if (strlen(steps[i].label) == n && memcmp(steps[i].label, label, n) == 0) return i;
    return -1;
}

/* transformers' hidden states: 0 is what comes in, n_layers what the last norm gives. */
static void name_hidden(const struct layers *y, int index, char out[64])
{
    if (index == 0) snprintf(out, 64, "inp_scaled");
    else if (index == y->s->config->n_layers) snprintf(out, 64, "result_norm");
    else snprintf(out, 64, "l_out-%d", index - 1);
}

/* Turns "l_out-7", "l_out_7", "l_out.7" or "hidden_states-7" into a name of ours; -1 when it is
 * none. */
static int read_name(const struct layers *y, const char *text, char out[64])
{
    size_t n = strlen(text), digits = n;
    while (digits > 0 && text[digits - 1] >= '0' && text[digits - 1] <= '9') digits--;
    if (step_of(text, n) >= 0) return snprintf(out, 64, "%s", text), 0;
    if (digits == n || digits < 2 || n - digits > 4 || !strchr("-_.", text[digits - 1])) return -1;
    int layer = atoi(text + digits), step = step_of(text, digits - 1);
    if (digits - 1 >= 12 && memcmp(text, "hidden_state", 12) == 0 &&
        layer <= y->s->config->n_layers)
        return name_hidden(y, layer, out), 0;
    if (step < FIRST_OF_LAYER || step > LAST_OF_LAYER || layer >= y->s->config->n_layers) return -1;
    snprintf(out, 64, "%s-%d", steps[step].label, layer);
    return 0;
}

static struct tensor *add_tensor(struct layers *y, const char *name)
{
    if (y->n == y->room) {
        int room = y->room ? 2 * y->room : 256;
        struct tensor *larger = realloc(y->tensor, (size_t)room * sizeof *larger);
        if (!larger) return NULL;
        y->tensor = larger, y->room = room;
    }
    struct tensor *t = &y->tensor[y->n++];
    memset(t, 0, sizeof *t);
    snprintf(t->name, sizeof t->name, "%s", name);
    return t;
}

/* ---- Files ---- */

/* [L+1][T][d] or [L+1][1][T][d]: one array of all hidden states. */
static int add_hidden(struct layers *y, const char *path, const struct array *a)
{
    if (a->n_dims < 3 || a->dim[0] != (uint64_t)y->s->config->n_layers + 1)
        return complain("%s: expected hidden states [%d][tokens][%d]", path,
                        y->s->config->n_layers + 1, y->s->config->d_model);
    for (int i = 0; i <= y->s->config->n_layers; i++) {
        char name[64];
        name_hidden(y, i, name);
        struct tensor *t = add_tensor(y, name);
        if (!t) return out_of_memory(sizeof *t, "their tensors");
        snprintf(t->path, sizeof t->path, "%s", path);
        t->array = *a;
        t->array.n_dims--;
        memmove(t->array.dim, t->array.dim + 1, sizeof t->array.dim - sizeof *t->array.dim);
        t->array.at += (uint64_t)i * array_values(&t->array) *
                       (a->number == NUMBER_F64 ? 8 : a->number == NUMBER_F32 ? 4 : 2);
    }
    return 0;
}

static int add_array(struct layers *y, const char *path, const char *text, const struct array *a)
{
    char name[64];
    if (strcmp(text, "hidden_states") == 0) return add_hidden(y, path, a);
    if (read_name(y, text, name)) return 0; /* not ours to compare */
    struct tensor *t = add_tensor(y, name);
    if (!t) return out_of_memory(sizeof *t, "their tensors");
    snprintf(t->path, sizeof t->path, "%s", path);
    t->array = *a;
    return 0;
}

/* One file: an array named by the file, or a safetensors file of several. */
static int add_file(struct layers *y, const char *path, const char *stem)
{
    struct file_bytes f;
    struct input in;
    struct array a;
    char error[READER_ERROR], name[64];
    int code = open_input(&in, &f, path);
    if (code) return code;
    if (is_npy(&in))
        code = read_npy(&in, &a, error) ? complain("%s", error) : add_array(y, path, stem, &a);
    else if (is_safetensors(&in)) {
        int found = 1;
        for (int i = 0; !code && (found = read_safetensors(&in, i, &a, error)) == 1; i++)
            code = add_array(
                y, path,
                read_name(y, a.name, name) && strcmp(a.name, "hidden_states") ? stem : a.name, &a);
        if (found < 0) code = complain("%s", error);
    } else if (read_name(y, stem, name) == 0) {
        struct tensor *t = add_tensor(y, name);
        if (t) snprintf(t->path, sizeof t->path, "%s", path), t->is_raw = 1, t->size = in.size;
        else code = out_of_memory(sizeof *t, "their tensors");
    }
    fclose(f.file);
    return code;
}

static int add_folder(struct layers *y, const char *folder)
{
    DIR *dir = opendir(folder);
    struct dirent *e;
    int code = 0;
    if (!dir) return complain("%s: %s", folder, strerror(errno));
    while (!code && (e = readdir(dir))) {
        char path[1024], stem[256];
        const char *dot = strrchr(e->d_name, '.');
        if (!dot || dot == e->d_name ||
            (strcmp(dot, ".npy") && strcmp(dot, ".f32") && strcmp(dot, ".bin") &&
             strcmp(dot, ".safetensors")))
            continue;
        snprintf(stem, sizeof stem, "%.*s", (int)(dot - e->d_name), e->d_name);
        if (snprintf(path, sizeof path, "%s/%s", folder, e->d_name) >= (int)sizeof path) continue;
        code = add_file(y, path, stem);
    }
    closedir(dir);
    return code;
}

/* ---- The text of llama-eval-callback ---- */

/* A line like: NAME = (f32) OP(SRC{..}, ..) = {ne0, ne1, ne2, ne3} begins a tensor that we know.
 * llama.cpp gives queries and keys one name before their norm and after RoPE; the operation tells
 * them apart. */
static int read_header(const struct layers *y, const char *line, char name[64], int dim[4])
{
    char theirs[64], op[64];
    int layer, whole = 0;
    const char *equals = strstr(line, " = ("), *last = equals;
    for (const char *p = equals; p && (p = strstr(p + 1, ") = {"));) last = p;
    if (!equals || last == equals ||
        sscanf(last, ") = {%d, %d, %d, %d}", dim, dim + 1, dim + 2, dim + 3) != 4)
        return -1;
    const char *begin = equals;
    while (begin > line && begin[-1] != ' ' && begin[-1] != ':') begin--;
    snprintf(theirs, sizeof theirs, "%.*s", (int)(equals - begin), begin);
    if (sscanf(equals, " = (%*[^)]) %63[A-Z_]", op) != 1) return -1;
    if (strcmp(op, "VIEW") == 0) return -1;
    if (sscanf(equals, " = (%*[^)]) MUL_MAT(blk.%d.attn_output%n", &layer, &whole) == 1 && whole)
        snprintf(theirs, sizeof theirs, "attn_out-%d", layer);
    int is_qkv = strncmp(theirs, "Qcur-", 5) == 0 || strncmp(theirs, "Kcur-", 5) == 0 ||
                 strncmp(theirs, "Vcur-", 5) == 0;
    if (is_qkv && strcmp(op, "RESHAPE") == 0) return -1;
    if (is_qkv && theirs[0] != 'V' && strcmp(op, "MUL_MAT") == 0) {
        char raw[64];
        snprintf(raw, sizeof raw, "%.4s_raw%.50s", theirs, theirs + 4);
        snprintf(theirs, sizeof theirs, "%s", raw);
    }
    return read_name(y, theirs, name);
}

static int n_shown(int n) { return n > 2 * PRINTED_AT_END ? 2 * PRINTED_AT_END : n; }
static int index_shown(int k, int n)
{
    return n > 2 * PRINTED_AT_END && k >= PRINTED_AT_END ? n - 2 * PRINTED_AT_END + k : k;
}

/* The numbers after a header, up to "sum =". */
static const char *read_values(const char *p, struct tensor *t)
{
    int most = n_shown(t->dim[0]) * n_shown(t->dim[1]) * n_shown(t->dim[2]) * n_shown(t->dim[3]);
    t->printed = malloc((size_t)most * sizeof *t->printed);
    while (t->printed && *p && strncmp(p, "sum", 3) != 0) {
        char *end = (char *)p;
        double x = strchr("+-0123456789n", *p) ? strtod(p, &end) : 0;
        if (end == p) {
            p++;
            continue;
        }
        if (t->n_printed < most) t->printed[t->n_printed] = (float)x;
        t->n_printed++;
        p = end;
    }
    if (t->n_printed != most) t->n_printed = 0; /* not whole: left out */
    return p;
}

static int add_printed(struct layers *y, const char *path)
{
    char *text = NULL, name[64];
    size_t n_bytes;
    int dim[4], code = read_whole(path, &text, &n_bytes);
    if (code) return code;
    for (const char *p = text, *next; *p; p = next) {
        next = p + strcspn(p, "\n");
        next += *next == '\n';
        char line[512];
        snprintf(line, sizeof line, "%.*s",
                 (int)strcspn(p, "\n") < 511 ? (int)strcspn(p, "\n") : 511, p);
        if (read_header(y, line, name, dim) || dim[0] < 1 || dim[1] < 1 || dim[2] < 1 || dim[3] < 1)
            continue;
        int is_known = 0; /* a tensor is printed once for each call: the first one is the text's */
        for (int i = 0; i < y->n; i++) is_known |= strcmp(y->tensor[i].name, name) == 0;
        if (is_known) continue;
        struct tensor *t = add_tensor(y, name);
        if (!t) return free(text), out_of_memory(sizeof *t, "their tensors");
        memcpy(t->dim, dim, sizeof dim);
        t->is_printed = 1;
        next = read_values(next, t);
        if (t->n_printed == 0) free(t->printed), y->n--;
    }
    free(text);
    return 0;
}

/* ---- Comparing ---- */

static void add_value(struct tensor *t, double ours, double theirs, int position)
{
    double d = fabs(ours - theirs);
    if (t->is_printed) d = d > 5.1e-5 ? d - 5.1e-5 : 0; /* they print four decimals */
    t->sum_diff += d * d;
    t->sum_ours += ours * ours;
    if (!(d <= t->max_diff)) t->max_diff = d, t->worst = position;
}

/* Row and column of a printed value: [tokens][width], or [tokens][heads][head_dim] as three
 * dimensions. */
static void compare_printed(struct tensor *t, int n_ids, const struct seen *x)
{
    int k = 0, width = x->width, heads = t->dim[0] != width || t->dim[2] > 1;
    t->n_rows = heads ? t->dim[2] : t->dim[1];
    int first = n_ids - t->n_rows; /* fewer rows are those of the last positions */
    if ((heads ? t->dim[0] * t->dim[1] : t->dim[0]) != width) return;
    for (int c = 0; c < n_shown(t->dim[2]); c++)
        for (int b = 0; b < n_shown(t->dim[1]); b++)
            for (int a = 0; a < n_shown(t->dim[0]); a++, k++) {
                int i0 = index_shown(a, t->dim[0]), i1 = index_shown(b, t->dim[1]),
                    i2 = index_shown(c, t->dim[2]);
                int token = first + (heads ? i2 : i1), column = heads ? i1 * t->dim[0] + i0 : i0;
                if (token < x->pos || token >= x->pos + x->n) continue;
                size_t at = (size_t)(token - x->pos) * (size_t)width + (size_t)column;
                add_value(t, x->data[at], t->printed[k], token);
            }
}

static int is_per_head(const char *name)
{
    return strchr("QKV", name[0]) || strncmp(name, "kqv_out", 7) == 0;
}

/* transformers keeps heads before tokens: [1][heads][tokens][head_dim]. dim: three without leading
 * ones. Which of the two is meant can be seen unless there are as many heads as tokens. */
static int find_heads(const struct layers *y, struct tensor *t, const uint64_t dim[3])
{
    char shape[SHAPE_TEXT];
    uint64_t D = (uint64_t)y->s->config->head_dim, heads = (uint64_t)t->width / D;
    if (!is_per_head(t->name) || dim[2] != D || dim[0] != heads) return 0;
    if (dim[1] == heads && heads > 1)
        return complain("%s: %s has the shape %s: as many heads as tokens, so that their order "
                        "cannot be seen; expected [tokens][%d], or another text",
                        t->path, t->name, array_shape(&t->array, shape), t->width);
    t->heads = (int)heads;
    t->n_rows = dim[1] <= (uint64_t)y->s->n_ids ? (int)dim[1] : 0;
    return 0;
}

/* What a file holds, now that the width is known. */
static int check_shape(struct layers *y, struct tensor *t, int width)
{
    struct array *a = &t->array;
    char shape[SHAPE_TEXT];
    int skip = 0, code = 0;
    if (t->is_raw)
        *a = (struct array){.number = NUMBER_F32, .n_dims = 2,
                            .dim = {t->size / 4 / (uint64_t)width, (uint64_t)width}};
    uint64_t n = array_values(a), rows = n / (uint64_t)width;
    t->width = width;
    t->n_rows = rows <= (uint64_t)y->s->n_ids ? (int)rows : 0;
    while (skip + 1 < a->n_dims && a->dim[skip] == 1 && rows > 1) skip++;
    if (a->n_dims - skip == 3 && rows > 1) code = find_heads(y, t, a->dim + skip);
    if (code) return code;
    if (t->n_rows && n == rows * (uint64_t)width && (!t->is_raw || t->size == 4 * n) &&
        (rows == 1 || t->heads || a->dim[skip] == rows))
        return 0;
    if (t->is_raw)
        return complain("%s: %s has %llu values, expected [%d][%d]", t->path, t->name,
                        (unsigned long long)t->size / 4, y->s->n_ids, width);
    return complain("%s: %s has the shape %s, expected [%d][%d]%s", t->path, t->name,
                    array_shape(a, shape), y->s->n_ids, width,
                    is_per_head(t->name) ? ", or heads before or after tokens" : "");
}

/* Their rows from .. from + n - 1, heads as they lie. */
static int read_theirs(struct layers *y, const struct input *in, const struct tensor *t, int from,
                       int n)
{
    char error[READER_ERROR];
    int heads = t->heads ? t->heads : 1;
    size_t part = (size_t)(t->width / heads), n_part = (size_t)n * part;
    for (int h = 0; h < heads; h++) {
        uint64_t at = ((uint64_t)h * (uint64_t)t->n_rows + (uint64_t)from) * part;
        if (array_read(in, &t->array, at, n_part, y->theirs + (size_t)h * n_part, error))
            return complain("%s", error);
    }
    return 0;
}

static int compare_file(struct layers *y, struct tensor *t, const struct seen *x)
{
    struct file_bytes f;
    struct input in;
    int first = y->s->n_ids - t->n_rows; /* fewer rows are those of the last positions */
    size_t width = (size_t)x->width, n_values = (size_t)x->n * width;
    if (n_values > y->room_theirs) {
        free(y->theirs);
        y->theirs = malloc(n_values * sizeof *y->theirs);
        y->room_theirs = y->theirs ? n_values : 0;
        if (!y->theirs) return out_of_memory(n_values * sizeof *y->theirs, "their rows");
    }
    int from = x->pos > first ? x->pos : first, n = x->pos + x->n - from;
    if (n <= 0) return 0;
    int code = open_input(&in, &f, t->path);
    if (code) return code;
    code = read_theirs(y, &in, t, from - first, n);
    const float *ours = x->data + (size_t)(from - x->pos) * width;
    size_t part = width / (size_t)(t->heads ? t->heads : 1);
    for (size_t k = 0; !code && k < (size_t)n * width; k++) { /* in the order of theirs */
        size_t h = k / ((size_t)n * part), i = k / part % (size_t)n, j = k % part;
        add_value(t, ours[i * width + h * part + j], y->theirs[k], from + (int)i);
    }
    fclose(f.file);
    return code;
}

static void see_tensor(void *user, const char *label, int layer, int pos, int n, int width,
                       float *data)
{
    struct layers *y = user;
    char name[64];
    snprintf(name, sizeof name, layer < 0 ? "%s" : "%s-%d", label, layer);
    for (int i = 0; i < y->n && !y->code; i++) {
        struct tensor *t = &y->tensor[i];
        if (strcmp(t->name, name) != 0) continue;
        struct seen x = {label, layer, pos, n, width, data};
        if (!t->order) {
            t->order = ++y->n_seen;
            if (!t->is_printed) y->code = check_shape(y, t, width);
        }
        if (t->is_printed) compare_printed(t, y->s->n_ids, &x);
        else if (!y->code) y->code = compare_file(y, t, &x);
    }
}

static int stop_on_fault(void *user, const int *position, int n_rows, const float *rows)
{
    (void)position, (void)n_rows, (void)rows;
    return ((struct layers *)user)->code;
}

/* ---- The report ---- */

static int by_order(const void *a, const void *b)
{
    return ((const struct tensor *)a)->order - ((const struct tensor *)b)->order;
}

/* Place of a tensor among all of the model, whether they have it or not. */
static int place_of(const char *name)
{
    const char *dash = strrchr(name, '-');
    int step = step_of(name, dash ? (size_t)(dash - name) : strlen(name));
    return dash                    ? step + atoi(dash + 1) * N_STEPS
           : step < FIRST_OF_LAYER ? -1
                                   : step + GEMMA3_MAX_LAYERS * N_STEPS;
}

/* What stands between two tensors: every operation, or the layers as a whole when there are many.
 */
static void print_between(const struct layers *y, const char *good, const char *bad)
{
    int from = good ? place_of(good) : -2, to = place_of(bad), layer = to / N_STEPS, n = 0;
    printf("%s stands:", good ? "between them" : "before it");
    if (to < 0) {
        printf(" %s\n", steps[0].what);
        return;
    }
    if (strncmp(bad, "result_", 7) == 0 && from < to - 1 &&
        from / N_STEPS < y->s->config->n_layers - 1)
        printf(" the layers up to the last one;");
    else if (layer < y->s->config->n_layers && from < layer * N_STEPS &&
             to % N_STEPS == LAST_OF_LAYER) {
        printf(" the whole of layer %d, which is %s\n", layer,
               y->s->config->is_local[layer] ? "local" : "global");
        return;
    }
    for (int p = from + 1 > layer * N_STEPS ? from + 1 : layer * N_STEPS; p <= to; p++) {
        int step = p % N_STEPS, is_after = layer == GEMMA3_MAX_LAYERS;
        if (p < 0 ||
            (is_after ? step <= LAST_OF_LAYER : step < FIRST_OF_LAYER || step > LAST_OF_LAYER))
            continue;
        printf("%s %s", n++ ? "," : "", steps[step].what);
    }
    if (layer < y->s->config->n_layers)
        printf(" (layer %d is %s)", layer, y->s->config->is_local[layer] ? "local" : "global");
    putchar('\n');
}

static double nmse(const struct tensor *t)
{
    return t->sum_ours > 0 ? t->sum_diff / t->sum_ours : t->sum_diff;
}

/* NMSE of a tensor in each of the bands, as measured: see test/vectors/README.md. */
static const double band_nmse[] = {1e-9, 1e-6, 1e-3, 1e-2, 1e-1};

/* Noise grows from layer to layer, but slowly: what is many times noisier than all before it
 * differs. */
static int report(struct layers *y)
{
    static const double jump = 100, most = 0.1;
    double worst = 0, floor = band_nmse[find_band(y->s->args->band ? y->s->args->band : "float32")];
    const struct tensor *good = NULL;
    int n = 0;
    qsort(y->tensor, (size_t)y->n, sizeof *y->tensor, by_order);
    for (int i = 0; i < y->n; i++) {
        const struct tensor *t = &y->tensor[i];
        if (!t->order || (t->is_printed && t->sum_ours == 0)) continue;
        double limit = jump * worst > floor ? jump * worst : floor, is = nmse(t);
        limit = limit < most ? limit : most;
        printf("%-18s [%d] NMSE %.2e, max diff %.3g at position %d\n", t->name, t->n_rows, is,
               t->max_diff, t->worst);
        n++;
        if (!(is <= limit)) {
            printf("%s is the first that differs", t->name);
            if (good) printf("; %s before it is good", good->name);
            putchar('\n');
            print_between(y, good ? good->name : NULL, t->name);
            for (int k = 1; !y->s->args->band && k < 4; k++)
                if (is <= band_nmse[k] && is > band_nmse[k - 1])
                    printf("so much is usual with %s: --band %s goes on\n", bands[k].words,
                           bands[k].name);
            return DIFFERS;
        }
        worst = is > worst ? is : worst;
        good = t;
    }
    if (n == 0)
        return complain(
            "%s: no tensor has one of our names (l_out-7, attn_norm-0, hidden_states ...)",
            y->path);
    printf("all %d tensors agree; the noisiest has NMSE %.2e\n", n, worst);
    return CONFORMS;
}

int layers(struct session *s, const struct args *a)
{
    struct layers y = {.s = s, .path = a->value[0]};
    struct stat st;
    int code = open_model(s, a);
    if (!code) code = read_ids(s);
    if (!code && stat(y.path, &st)) code = complain("%s: %s", y.path, strerror(errno));
    if (!code && S_ISDIR(st.st_mode)) code = add_folder(&y, y.path);
    else if (!code) {
        code = add_file(&y, y.path, "");
        if (!code && y.n == 0) code = add_printed(&y, y.path);
    }
    if (!code && y.n == 0)
        code = complain(
            "%s: no tensor has one of our names (l_out-7, attn_norm-0, hidden_states ...)", y.path);
    s->params.n_ctx = s->n_ids;
    s->params.trace = see_tensor;
    s->params.trace_user = &y;
    if (!code) code = open_state(s);
    int needs_rows = 0;
    for (int i = 0; i < y.n; i++) needs_rows |= strncmp(y.tensor[i].name, "result_", 7) == 0;
    char *wanted = code || needs_rows ? NULL : calloc((size_t)s->n_ids, 1);
    if (!code) code = run_ids(s, wanted, stop_on_fault, &y);
    if (!code) code = y.code ? y.code : report(&y);
    for (int i = 0; i < y.n; i++) free(y.tensor[i].printed);
    free(y.tensor);
    free(y.theirs);
    free(wanted);
    return code;
}
