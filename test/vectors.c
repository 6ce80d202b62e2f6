/* vectors.c - the commands vectors and check: what every build and machine must compute, as files.
 *
 * test/vectors/README.md has the format. vectors writes the files, check computes everything in
 * them anew, and with --other lets another engine compute it.
 */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "compare.h"

enum {
    TOP = 16,                /* ids of a "top" line */
    ALL_ROWS = 100,          /* texts up to so many tokens have a row for every position */
    MAX_SPECIAL = 120,       /* control tokens of one text */
    LINE = 1 << 16,          /* bytes of a line, at most */
};

static const struct model {
    const char *name, *path;
    int longest;             /* tokens of a text far beyond the window; 0: none */
} models[] = {
    {"tiny", "test/data/tiny.gguf", 2100},
    {"tiny-62", "test/data/tiny-62.gguf", 300},
    {"tiny-mixed", "test/data/tiny-mixed.gguf", 300},
    {"folktales", "weights/gemma3-folktales-q4_0.gguf", 500},
    {"270m", "weights/gemma-3-270m-q4_k_m.gguf", 0},
};
enum { N_MODELS = sizeof models / sizeof *models };

/* What a position must give. */
struct row {
    int position;
    char exact[65], plain[65]; /* SHA-256 of the logits, exact and default mode */
    double nll;              /* exact, of the next id; -1 at the end */
    int has_top;
    int32_t top[TOP];
    uint32_t top_bits[TOP];
};

struct prompt {
    char name[32];
    int flags;               /* of gemma3_encode */
    unsigned char *text;     /* NULL: only ids are given */
    size_t n_text;
    int32_t *ids;
    int n_ids;
    struct row *row;
    int n_rows;
};

static void free_prompt(struct prompt *p)
{
    free(p->text);
    free(p->ids);
    free(p->row);
    *p = (struct prompt){.n_ids = 0};
}

/* ---- Computing ---- */

struct work {
    struct session *s;
    struct prompt *p;
    int n_done;              /* rows */
    const float *rows;
};

static struct row *row_at(struct work *w, int i) { return &w->p->row[w->n_done + i]; }

static void hash_row(void *job, int i, int worker)
{
    struct work *w = job;
    int n_vocab = w->s->config->n_vocab;
    gemma3_sha256 h;
    (void)worker;
    gemma3_sha256_init(&h);
    gemma3_sha256_add_floats(&h, w->rows + (size_t)i * (size_t)n_vocab, (size_t)n_vocab);
    gemma3_sha256_end(&h, gemma3_model_info(w->s->model)->exact ? row_at(w, i)->exact
                                                             : row_at(w, i)->plain);
}

static void find_top(struct row *r, const float *x, int n_vocab)
{
    int n = 0;
    for (int i = 0; i < n_vocab; i++) {
        int k = n < TOP ? n++ : TOP;
        for (; k > 0 && x[r->top[k - 1]] < x[i]; k--)
            if (k < TOP) r->top[k] = r->top[k - 1];
        if (k < TOP) r->top[k] = i;
    }
    for (int k = 0; k < n; k++) memcpy(&r->top_bits[k], &x[r->top[k]], 4);
}

static int take_hashes(void *user, const int *position, int n_rows, const float *rows)
{
    struct work *w = user;
    int n_vocab = w->s->config->n_vocab;
    w->rows = rows;
    share_out(w->s, n_rows, hash_row, w);
    for (int i = 0; i < n_rows && gemma3_model_info(w->s->model)->exact; i++) {
        const float *row = rows + (size_t)i * (size_t)n_vocab;
        struct row *r = row_at(w, i);
        r->nll = position[i] + 1 < w->p->n_ids
                     ? gemma3_nll(row, n_vocab, w->p->ids[position[i] + 1])
                     : -1;
        if (r->has_top) find_top(r, row, n_vocab);
    }
    w->n_done += n_rows;
    return 0;
}

/* All rows of a prompt, by an exact or a default session. */
static int compute(struct session *s, struct prompt *p)
{
    struct work w = {.s = s, .p = p};
    char *wanted = calloc((size_t)p->n_ids, 1);
    if (!wanted) return out_of_memory((size_t)p->n_ids, "the positions");
    for (int i = 0; i < p->n_rows; i++) wanted[p->row[i].position] = 1;
    gemma3_state_free(s->state);
    s->state = NULL;
    s->ids = p->ids, s->n_ids = s->params.n_ctx = p->n_ids;
    int code = open_state(s);
    if (!code) code = run_ids(s, wanted, take_hashes, &w);
    s->ids = NULL;
    free(wanted);
    return code;
}

/* An exact and a default session over one file. */
struct pair {
    struct args args[2];
    struct session s[2];     /* exact, default */
};

static int open_pair(struct pair *m, const struct args *a, const char *path)
{
    int code = 0;
    memset(m->s, 0, sizeof m->s);
    for (int i = 0; i < 2 && !code; i++) {
        m->args[i] = *a;
        m->args[i].model = path;
        m->args[i].exact = i == 0;
        code = open_model(&m->s[i], &m->args[i]);
    }
    return code;
}

static void close_pair(struct pair *m)
{
    for (int i = 0; i < 2; i++) close_session(&m->s[i]);
}

/* ---- The file of a model ---- */

static int hash_file(const char *path, char hex[65])
{
    char bytes[1 << 14];
    gemma3_sha256 h;
    FILE *f = fopen(path, "rb");
    if (!f) return complain("%s: %s", path, strerror(errno));
    gemma3_sha256_init(&h);
    for (size_t n; (n = fread(bytes, 1, sizeof bytes, f)) > 0;) gemma3_sha256_add(&h, bytes, n);
    fclose(f);
    gemma3_sha256_end(&h, hex);
    return 0;
}

static void write_prompt(FILE *f, const struct prompt *p)
{
    fprintf(f, "prompt %s %d%s%s\n", p->name, p->n_ids, p->flags & GEMMA3_BOS ? " bos" : "",
            p->flags & GEMMA3_SPECIAL ? " special" : "");
    if (p->text) fputs("text ", f);
    for (size_t i = 0; p->text && i < p->n_text; i++) fprintf(f, "%02x", p->text[i]);
    fputs(p->text ? "\nids" : "ids", f);
    for (int i = 0; i < p->n_ids; i++) fprintf(f, " %d", (int)p->ids[i]);
    fputc('\n', f);
    for (int i = 0; i < p->n_rows; i++) {
        const struct row *r = &p->row[i];
        fprintf(f, "row %d %s %s", r->position, r->exact, r->plain);
        if (r->nll >= 0) fprintf(f, " %.9g", r->nll);
        if (r->has_top) fprintf(f, "\ntop %d", r->position);
        for (int k = 0; r->has_top && k < TOP; k++)
            fprintf(f, " %d:%08lx", (int)r->top[k], (unsigned long)r->top_bits[k]);
        fputc('\n', f);
    }
}

/* ---- Making the prompts ---- */

/* Rows of all positions, or of those where something may change: the beginning, about every
 * multiple of the window, the end, and some between. */
static int choose_rows(struct prompt *p, int window)
{
    p->row = calloc((size_t)p->n_ids, sizeof *p->row);
    if (!p->row) return out_of_memory((size_t)p->n_ids * sizeof *p->row, "rows");
    p->n_rows = 0;
    for (int i = 0; i < p->n_ids; i++) {
        int about = window > 2 ? (i + 2) % window : 9,
            is_edge = window >= 64 && i >= window - 2 && about <= 4;
        if (p->n_ids > ALL_ROWS && i >= 4 && i < p->n_ids - 2 && !is_edge && i % 64) continue;
        struct row *r = &p->row[p->n_rows++];
        r->position = i;
        r->has_top = p->n_rows % 16 == 1 || i + 1 == p->n_ids;
    }
    return 0;
}

static int finish_prompt(struct pair *m, FILE *f, struct prompt *p)
{
    int code = p->n_ids ? choose_rows(p, m->s[0].config->window) : 0;
    for (int i = 0; i < 2 && !code && p->n_ids; i++) code = compute(&m->s[i], p);
    if (!code && p->n_ids) write_prompt(f, p);
    free_prompt(p);
    return code;
}

static int write_text(struct pair *m, FILE *f, const char *name, const void *text, size_t n,
                      int flags)
{
    struct prompt p = {.flags = flags,
                       .n_text = n,
                       .text = malloc(n + 1),
                       .ids = malloc((n + 2) * sizeof(int32_t))};
    if (!p.text || !p.ids) return out_of_memory(5 * n, "a text");
    memcpy(p.text, text, n);
    snprintf(p.name, sizeof p.name, "%s", name);
    p.n_ids = gemma3_encode(m->s[0].tokenizer, text, n, flags, p.ids, (int)n + 2);
    return p.n_ids < 0 ? complain("%s cannot be encoded", name) : finish_prompt(m, f, &p);
}

/* The first n ids of a text; of a text that is too short, again and again. */
static int write_length(struct pair *m, FILE *f, const int32_t *ids, int n_ids, int n)
{
    struct prompt p = {.n_ids = n, .ids = malloc((size_t)n * sizeof(int32_t))};
    if (!p.ids) return out_of_memory((size_t)n * sizeof(int32_t), "a text");
    for (int i = 0; i < n; i++) p.ids[i] = i < n_ids ? ids[i] : ids[1 + (i - 1) % (n_ids - 1)];
    snprintf(p.name, sizeof p.name, "length-%d", n);
    return finish_prompt(m, f, &p);
}

static int write_lengths(struct pair *m, FILE *f, int longest)
{
    const gemma3_config *c = m->s[0].config;
    int W = c->window, lengths[] = {1, 2, W - 1, W, W + 1, 2 * W, 3 * W, longest};
    char *text = NULL;
    size_t n_text = 0;
    int code = read_whole("weights/heldout.txt", &text, &n_text), n_ids = 0;
    if (n_text > 12000) n_text = 12000;
    int32_t *ids = code ? NULL : malloc((n_text + 1) * sizeof *ids);
    if (ids)
        n_ids = gemma3_encode(m->s[0].tokenizer, text, n_text, GEMMA3_BOS, ids, (int)n_text + 1);
    if (!code && n_ids < 2) code = complain("weights/heldout.txt cannot be encoded");
    for (int i = 0; i < 8 && !code; i++)
        if (lengths[i] > 0) code = write_length(m, f, ids, n_ids, lengths[i]);
    free(text);
    free(ids);
    return code;
}

/* Every control and user-defined token but <unused..>, and runs of whitespace, spelled in one text.
 */
static int write_specials(struct pair *m, FILE *f)
{
    const gemma3_vocab *v = gemma3_tokenizer_vocab(m->s[0].tokenizer);
    char text[MAX_SPECIAL * 64];
    size_t n = 0;
    int count = 0;
    for (int id = 0; id < v->n_vocab && count < MAX_SPECIAL; id++) {
        int is_special = v->type[id] == 2 || v->type[id] == 3 || v->type[id] == 4;
        if (!is_special || v->length[id] < 3 || v->length[id] > 40 ||
            !strchr("<[", v->text[id][0]) || strncmp(v->text[id], "<unused", 7) == 0)
            continue;
        memcpy(text + n, v->text[id], v->length[id]);
        n += v->length[id];
        count++;
    }
    return count ? write_text(m, f, "specials", text, n, GEMMA3_BOS | GEMMA3_SPECIAL) : 0;
}

static int write_whitespace(struct pair *m, FILE *f)
{
    char text[2048];
    size_t n = 0;
    for (int run = 1; run <= 33; run += run < 6 ? 1 : 9)
        for (int k = 0; k < 3; k++) {
            memset(text + n, " \n\t"[k], (size_t)run);
            n += (size_t)run;
            text[n++] = "abc"[k];
        }
    memcpy(text + n, " \r\n  \n \t end ", 13);
    return write_text(m, f, "whitespace", text, n + 13, GEMMA3_BOS);
}

static int write_turn(struct pair *m, FILE *f)
{
    static const char text[] =
        "<start_of_turn>user\nBe brief.\n\nWho was the king's daughter?<end_of_turn>\n"
        "<start_of_turn>model\nNobody knows.<end_of_turn>\n"
        "<start_of_turn>user\nTell me more.<end_of_turn>\n<start_of_turn>model\n";
    if (gemma3_find(m->s[0].tokenizer, "<start_of_turn>", 15) < 0) return 0;
    return write_text(m, f, "turns", text, sizeof text - 1, GEMMA3_BOS | GEMMA3_SPECIAL);
}

static int write_prompts(struct pair *m, FILE *f, int longest)
{
    static const char invalid[] =
        "ab\xC3 \xE2\x82 \xF0\x9F\x98 \xFF\xFE\xC0\x80 \xED\xA0\x80 \xF4\x90\x80\x80z";
    static const char languages[] =
        "h\xC3\xA9llo \xE4\xBD\xA0\xE5\xA5\xBD \xF0\x9F\xA4\x97 "
        "\xD0\x9F\xD1\x80\xD0\xB8\xD0\xB2\xD0\xB5\xD1\x82 1234567890 e\xCC\x81";
    unsigned char bytes[256];
    for (int i = 0; i < 256; i++) bytes[i] = (unsigned char)i;
    int code = write_text(m, f, "empty", "", 0, GEMMA3_BOS);
    if (!code) code = write_text(m, f, "without-bos", "once upon a time", 16, 0);
    if (!code) code = write_text(m, f, "bytes", bytes, 256, GEMMA3_BOS);
    if (!code) code = write_text(m, f, "invalid-utf8", invalid, sizeof invalid - 1, GEMMA3_BOS);
    if (!code) code = write_text(m, f, "languages", languages, sizeof languages - 1, GEMMA3_BOS);
    if (!code) code = write_whitespace(m, f);
    if (!code) code = write_specials(m, f);
    if (!code) code = write_turn(m, f);
    return code ? code : write_lengths(m, f, longest);
}

static int write_model(const struct args *a, const struct model *model)
{
    struct pair m;
    char path[256], hex[65];
    snprintf(path, sizeof path, "%s/%s.vec", a->value[0], model->name);
    if (access(model->path, R_OK)) {
        printf("%s: no %s, its vectors are left alone\n", model->name, model->path);
        return 0;
    }
    int code = hash_file(model->path, hex);
    if (!code) code = open_pair(&m, a, model->path);
    else return code;
    FILE *f = code ? NULL : fopen(path, "w");
    if (!code && !f) code = complain("%s: %s", path, strerror(errno));
    if (f) {
        fprintf(f,
                "# made by conform vectors, gemma3.c %s; README.md has the format\ncontract "
                "%d\nmodel %s %s %d\n",
                GEMMA3_VERSION, GEMMA3_CONTRACT, model->path, hex, m.s[0].config->n_vocab);
        code = write_prompts(&m, f, model->longest);
        if (fclose(f) && !code) code = complain("%s: %s", path, strerror(errno));
    }
    close_pair(&m);
    return code;
}

static int is_chosen(const struct args *a, int first, const char *name)
{
    int chosen = a->n_values <= first;
    for (int i = first; i < a->n_values; i++) chosen |= strcmp(a->value[i], name) == 0;
    return chosen;
}

/* Every name stands for vectors that there are. */
static int check_chosen(const struct args *a, int first)
{
    char list[128] = "";
    for (int k = 0; k < N_MODELS; k++)
        snprintf(list + strlen(list), sizeof list - strlen(list), "%s%s", k ? ", " : "",
                 models[k].name);
    for (int i = first; i < a->n_values; i++) {
        int k = 0;
        while (k < N_MODELS && strcmp(a->value[i], models[k].name) != 0) k++;
        if (k == N_MODELS)
            return complain("there are no vectors \"%s\", but %s", a->value[i], list);
    }
    return 0;
}

int write_vectors(struct session *s, const struct args *a)
{
    int code = check_chosen(a, 1);
    (void)s;
    for (int i = 0; i < N_MODELS && !code; i++)
        if (is_chosen(a, 1, models[i].name)) code = write_model(a, &models[i]);
    return code;
}

/* ---- Reading the files ---- */

/* A file of vectors that is being read. */
struct vectors {
    FILE *f;
    const char *path;
    char *line;              /* [LINE] the one that comes next */
    int n_line;
    char model[256], hex[65];
    int n_vocab;
};

static int bad_line(const struct vectors *v)
{
    return complain("%s, line %d is not as README.md says: \"%.40s\"", v->path, v->n_line, v->line);
}

/* 0 at the end. */
static int next_line(struct vectors *v)
{
    do {
        if (!fgets(v->line, LINE, v->f)) return *v->line = 0, 0;
        v->n_line++;
    } while (*v->line == '#');
    v->line[strcspn(v->line, "\r\n")] = 0;
    return 1;
}

static int open_vectors(struct vectors *v, const char *path)
{
    int contract = 0;
    *v = (struct vectors){.f = fopen(path, "r"), .path = path, .line = malloc(LINE)};
    if (!v->f || !v->line)
        return complain("%s: %s (check runs in the source's folder; --dir is where vectors are)",
                        path, strerror(errno));
    if (!next_line(v) || sscanf(v->line, "contract %d", &contract) != 1) return bad_line(v);
    if (contract != GEMMA3_CONTRACT)
        return complain("%s is of contract %d, this program of %d", path, contract,
                        GEMMA3_CONTRACT);
    if (!next_line(v) || sscanf(v->line, "model %255s %64s %d", v->model, v->hex, &v->n_vocab) != 3)
        return bad_line(v);
    next_line(v);
    return 0;
}

static void close_vectors(struct vectors *v)
{
    if (v->f) fclose(v->f);
    free(v->line);
}

static int read_text(struct prompt *p, const char *hex)
{
    size_t n = strlen(hex) / 2;
    p->text = malloc(n + 1);
    for (size_t i = 0; p->text && i < n; i++) {
        unsigned byte;
        if (sscanf(hex + 2 * i, "%2x", &byte) != 1) return -1;
        p->text[p->n_text++] = (unsigned char)byte;
    }
    return p->text ? 0 : -1;
}

static int read_row(struct prompt *p, const char *line)
{
    struct row *r = &p->row[p->n_rows], *last = r - 1;
    int n = 0;
    if (p->n_rows < p->n_ids &&
        sscanf(line, "row %d %64s %64s%n", &r->position, r->exact, r->plain, &n) == 3) {
        r->nll = line[n] == ' ' ? strtod(line + n, NULL) : -1;
        int after = p->n_rows ? last->position : -1;
        p->n_rows++;
        return r->position > after && r->position < p->n_ids ? 0 : -1;
    }
    if (p->n_rows == 0 || sscanf(line, "top %d%n", &r->position, &n) != 1) return -1;
    last->has_top = 1;
    for (int k = 0; k < TOP; k++) {
        int id, used = 0;
        unsigned long bits;
        if (sscanf(line + n, " %d:%8lx%n", &id, &bits, &used) != 2) return -1;
        last->top[k] = id, last->top_bits[k] = (uint32_t)bits;
        n += used;
    }
    return 0;
}

/* The next prompt: 1, 0 at the end, or -1 having said what is wrong. */
static int read_prompt(struct vectors *v, struct prompt *p)
{
    *p = (struct prompt){.n_ids = 0};
    if (!*v->line) return 0;
    if (sscanf(v->line, "prompt %31s %d", p->name, &p->n_ids) != 2 || p->n_ids < 1 ||
        p->n_ids > 1 << 20)
        return bad_line(v), -1;
    p->flags = (strstr(v->line, " bos") ? GEMMA3_BOS : 0) |
               (strstr(v->line, " special") ? GEMMA3_SPECIAL : 0);
    p->row = calloc((size_t)p->n_ids + 1, sizeof *p->row);
    int n = -1, fault = !p->row;
    while (!fault && next_line(v) && strncmp(v->line, "prompt ", 7) != 0) {
        if (strncmp(v->line, "text ", 5) == 0) fault = read_text(p, v->line + 5);
        else if (strncmp(v->line, "ids ", 4) == 0)
            fault = (n = parse_numbers(v->line + 4, " ", &p->ids)) != p->n_ids;
        else fault = read_row(p, v->line);
    }
    for (int i = 0; !fault && i < n; i++) fault = p->ids[i] < 0 || p->ids[i] >= v->n_vocab;
    if (!fault && n == p->n_ids) return 1;
    return bad_line(v), -1;
}

/* ---- Checking ourselves ---- */

struct checked {
    int n_models, n_prompts, n_rows, n_failed;
};

static void fail(struct checked *c, const struct vectors *v, const struct prompt *p,
                 const char *what)
{
    if (c->n_failed++ < 10) printf("%s %s: %s\n", v->path, p->name, what);
}

static void check_ids(struct checked *c, const struct vectors *v, struct pair *m,
                      const struct prompt *p)
{
    int32_t *ids = malloc((p->n_text + 2) * sizeof *ids);
    if (!ids) return;
    int n = gemma3_encode(m->s[0].tokenizer, (const char *)p->text, p->n_text, p->flags, ids,
                          (int)p->n_text + 2);
    if (n != p->n_ids || memcmp(ids, p->ids, (size_t)n * sizeof *ids) != 0)
        fail(c, v, p, "the text has other ids");
    free(ids);
}

static int check_prompt(struct checked *c, const struct vectors *v, struct pair *m,
                        struct prompt *p)
{
    struct prompt now = *p;
    int code = 0;
    now.row = calloc((size_t)p->n_rows + 1, sizeof *now.row);
    if (!now.row) return out_of_memory((size_t)p->n_rows * sizeof *now.row, "rows");
    for (int i = 0; i < p->n_rows; i++)
        now.row[i].position = p->row[i].position, now.row[i].has_top = p->row[i].has_top;
    if (p->text) check_ids(c, v, m, p);
    for (int i = 0; i < 2 && !code; i++) code = compute(&m->s[i], &now);
    for (int i = 0; i < p->n_rows && !code; i++) {
        const struct row *a = &p->row[i], *b = &now.row[i];
        char what[100], nll[2][32];
        snprintf(nll[0], sizeof *nll, "%.9g", a->nll);
        snprintf(nll[1], sizeof *nll, "%.9g", b->nll);
        const char *which = strcmp(a->exact, b->exact)   ? "exact mode's logits"
                            : strcmp(a->plain, b->plain) ? "default mode's logits"
                            : strcmp(nll[0], nll[1])     ? "nll"
                            : memcmp(a->top, b->top, sizeof a->top) ||
                                    memcmp(a->top_bits, b->top_bits, sizeof a->top_bits)
                                ? "the first 16"
                                : NULL;
        snprintf(what, sizeof what, "position %d: %s differs", a->position, which ? which : "");
        if (which) fail(c, v, p, what);
    }
    c->n_rows += p->n_rows;
    c->n_prompts++;
    free(now.row);
    return code;
}

static int check_file(struct checked *c, struct vectors *v, const struct args *a)
{
    struct pair m;
    struct prompt p;
    char hex[65];
    int more, code = hash_file(v->model, hex);
    if (code) return code;
    if (strcmp(hex, v->hex) != 0)
        return complain(
            "%s is another file than the vectors are of: its SHA-256 is %s, expected %s", v->model,
            hex, v->hex);
    code = open_pair(&m, a, v->model);
    while (!code && (more = read_prompt(v, &p)) != 0) {
        code = more < 0 ? WRONG : check_prompt(c, v, &m, &p);
        free_prompt(&p);
    }
    c->n_models++;
    close_pair(&m);
    return code;
}

/* ---- Checking another engine ---- */

/* Puts what {ids}, {out}, {model} and {n_vocab} stand for into the command. */
static int fill_command(char *out, size_t room, const char *template, const char *const names[][2])
{
    size_t n = 0;
    while (*template) {
        const char *value = NULL;
        for (int i = 0; names[i][0] && !value; i++) {
            size_t length = strlen(names[i][0]);
            if (strncmp(template, names[i][0], length) != 0) continue;
            value = names[i][1];
            template += length;
        }
        int count = value ? snprintf(out + n, room - n, "%s", value)
                          : snprintf(out + n, room - n, "%c", *template++);
        n += (size_t)count;
        if (n >= room) return -1;
    }
    return 0;
}

struct other {
    char ids[64], out[64];   /* files */
    int n, n_conform, n_failed;
};

static int run_other(const struct other *o, const struct args *a, const struct vectors *v,
                     const struct prompt *p)
{
    char command[4096], n_vocab[16];
    snprintf(n_vocab, sizeof n_vocab, "%d", v->n_vocab);
    const char *const names[][2] = {{"{ids}", o->ids}, {"{out}", o->out}, {"{model}", v->model},
                                    {"{n_vocab}", n_vocab}, {NULL, NULL}};
    FILE *f = fopen(o->ids, "w");
    if (!f) return complain("%s: %s", o->ids, strerror(errno));
    for (int i = 0; i < p->n_ids; i++) fprintf(f, i ? " %d" : "%d", (int)p->ids[i]);
    fputc('\n', f);
    if (fclose(f)) return complain("%s: %s", o->ids, strerror(errno));
    remove(o->out);
    if (fill_command(command, sizeof command, a->other, names))
        return complain("--other: the command is too long");
    fflush(stdout);
    return system(command) ? DIFFERS : 0;
}

static int judge_other(struct other *o, struct session *s, const struct vectors *v,
                       struct prompt *p)
{
    struct result r;
    int code = run_other(o, s->args, v, p);
    if (code == WRONG) return code;
    o->n++;
    printf("%-11s %-13s %6d ",
           v->path + (strrchr(v->path, '/') ? strrchr(v->path, '/') - v->path + 1 : 0), p->name,
           p->n_ids);
    gemma3_state_free(s->state);
    s->state = NULL;
    s->ids = p->ids, s->n_ids = s->params.n_ctx = p->n_ids;
    if (!code) code = compare_with(s, o->out, &r);
    s->ids = NULL;
    if (code == WRONG || code == DIFFERS) {
        puts("the command failed, or gave no logits");
        o->n_failed++;
        return 0;
    }
    o->n_conform += r.conforms;
    printf("%6d %10.3g %10.3g %7.2f %%  %s", r.total.n, r.total.sum_kl / r.total.n, r.total.max_kl,
           100.0 * r.total.first_agrees / r.total.n, r.conforms ? "conforms" : "differs");
    printf(" (%s)", r.band < n_bands ? bands[r.band].name : "beyond all bands");
    for (int i = 0; i < r.cause.n; i++) printf("%s%s", i ? " + " : ": ", r.cause.mistake[i]->name);
    putchar('\n');
    return flush_stdout();
}

static int check_other_file(struct other *o, struct vectors *v, const struct args *a)
{
    struct args exact = *a;
    struct session s;
    struct prompt p;
    int more, code;
    exact.model = v->model, exact.exact = 1;
    code = open_model(&s, &exact);
    while (!code && (more = read_prompt(v, &p)) != 0) {
        code = more < 0 ? WRONG : judge_other(o, &s, v, &p);
        free_prompt(&p);
    }
    close_session(&s);
    return code;
}

/* ---- The command ---- */

static int check_one(const struct args *a, const char *name, struct checked *c, struct other *o)
{
    struct vectors v;
    char path[256];
    snprintf(path, sizeof path, "%s/%s.vec", a->dir ? a->dir : "test/vectors", name);
    int code = open_vectors(&v, path);
    if (!code && access(v.model, R_OK)) printf("%s: no %s, left out\n", path, v.model);
    else if (!code) code = a->other ? check_other_file(o, &v, a) : check_file(c, &v, a);
    close_vectors(&v);
    return code;
}

static int make_temporary(char path[64])
{
    snprintf(path, 64, "/tmp/conform-XXXXXX");
    int fd = mkstemp(path);
    if (fd < 0) return complain("%s: %s", path, strerror(errno));
    close(fd);
    return 0;
}

int check(struct session *s, const struct args *a)
{
    struct checked c = {0, 0, 0, 0};
    struct other o = {.n = 0};
    int code = check_chosen(a, 0);
    (void)s;
    if (a->other && !code) {
        code = make_temporary(o.ids) || make_temporary(o.out) ? WRONG : 0;
        printf("%-11s %-13s %6s %6s %10s %10s %9s\n", "vectors", "prompt", "tokens", "rows",
               "mean KL", "largest", "first");
    }
    for (int i = 0; i < N_MODELS && !code; i++)
        if (is_chosen(a, 0, models[i].name)) code = check_one(a, models[i].name, &c, &o);
    if (a->other) {
        if (*o.ids) remove(o.ids);
        if (*o.out) remove(o.out);
        if (!code && o.n == 0) code = complain("check: there is no model for those vectors");
        if (!code) printf("%d of %d prompts conform\n", o.n_conform, o.n);
        return code ? code : o.n && o.n_conform == o.n ? CONFORMS : DIFFERS;
    }
    if (code) return code;
    if (c.n_rows == 0) return complain("check: there is no model for those vectors");
    printf("%s: contract %d, %s, %d models, %d prompts, %d rows in exact and default mode%s\n",
           c.n_failed ? "does not conform" : "conforms", GEMMA3_CONTRACT,
           a->isa ? a->isa : gemma3_isa_name(0), c.n_models, c.n_prompts, c.n_rows,
           c.n_failed ? "" : ", every bit");
    return c.n_failed ? DIFFERS : CONFORMS;
}
