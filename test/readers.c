/* readers.c - see readers.h. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "readers.h"

enum {
    MAX_HEADER = 1 << 24,    /* bytes of a header of NumPy or safetensors */
    MAX_JSON = 1 << 28,      /* bytes of a server's answers */
    MAX_DEPTH = 64,          /* of JSON */
    PADDING = 64,            /* columns that a vocabulary may have more or less than the model's */
    BASE_HEADER = 20,        /* bytes before the tokens of a base file */
};

static int fault(char *error, const char *format, ...)
{
    va_list list;
    va_start(list, format);
    vsnprintf(error, READER_ERROR, format, list);
    va_end(list);
    for (char *c = error; *c; c++)
        if ((unsigned char)*c < ' ' || *c == 127) *c = '?'; /* names out of files hold anything */
    return -1;
}

static size_t read_memory(void *user, uint64_t at, void *to, size_t n)
{
    const struct memory *m = user;
    if (at >= m->size) return 0;
    if (n > m->size - at) n = (size_t)(m->size - at);
    memcpy(to, m->data + at, n);
    return n;
}

struct input input_of_memory(const struct memory *m, const char *name)
{
    return (struct input){name, m->size, read_memory, (void *)m};
}

static int read_exactly(const struct input *in, uint64_t at, void *to, size_t n, char *error)
{
    if (at <= in->size && n <= in->size - at && in->read(in->user, at, to, n) == n) return 0;
    return fault(error, "%s ends after %llu bytes, expected %llu at least", in->name,
                 (unsigned long long)in->size, (unsigned long long)at + n);
}

/* ---- Numbers ---- */

static uint64_t unsigned_at(const unsigned char *p, int n_bytes, int big_endian)
{
    uint64_t u = 0;
    for (int i = 0; i < n_bytes; i++)
        u |= (uint64_t)p[big_endian ? n_bytes - 1 - i : i] << 8 * i;
    return u;
}

static float float_of_bits(uint32_t u)
{
    float x;
    memcpy(&x, &u, sizeof x);
    return x;
}

static float float_of_half(uint32_t h)
{
    int exponent = (int)(h >> 10 & 31);
    double x = exponent ? ldexp(1024 + (h & 1023), exponent - 25) : ldexp(h & 1023, -24);
    if (exponent == 31) x = h & 1023 ? NAN : INFINITY;
    return (float)(h >> 15 ? -x : x);
}

static int number_bytes(enum number n)
{
    return n == NUMBER_F64 ? 8 : n == NUMBER_F32 ? 4 : 2;
}

static float number_at(const unsigned char *p, const struct array *a)
{
    uint64_t u = unsigned_at(p, number_bytes(a->number), a->big_endian);
    double d;
    switch (a->number) {
    case NUMBER_F16: return float_of_half((uint32_t)u);
    case NUMBER_BF16: return float_of_bits((uint32_t)u << 16);
    case NUMBER_F32: return float_of_bits((uint32_t)u);
    case NUMBER_F64: break;
    }
    memcpy(&d, &u, sizeof d);
    return (float)d;
}

uint64_t array_values(const struct array *a)
{
    uint64_t n = 1;
    for (int i = 0; i < a->n_dims; i++) n *= a->dim[i];
    return n;
}

const char *array_shape(const struct array *a, char out[SHAPE_TEXT])
{
    int n = 0;
    out[0] = 0;
    for (int i = 0; i < a->n_dims; i++)
        n += snprintf(out + n, SHAPE_TEXT - (size_t)n, "[%llu]", (unsigned long long)a->dim[i]);
    return a->n_dims ? out : "that of a single number";
}

/* -1 when its values are more than can be counted or do not lie in the file. */
static int check_array(const struct input *in, const struct array *a, char *error)
{
    uint64_t n = 1, room = a->at < in->size ? in->size - a->at : 0;
    for (int i = 0; i < a->n_dims; i++) {
        if (a->dim[i] && n > UINT64_MAX / a->dim[i] / 16)
            return fault(error, "%s: a shape of more values than can be counted", in->name);
        n *= a->dim[i];
    }
    if (n <= room / (uint64_t)number_bytes(a->number)) return 0;
    return fault(
        error, "%s: its shape has %llu values of %d bytes, but the file has %llu bytes of data",
        in->name, (unsigned long long)n, number_bytes(a->number), (unsigned long long)room);
}

int array_read(const struct input *in, const struct array *a, uint64_t first, size_t n, float *out,
               char *error)
{
    unsigned char bytes[4096];
    size_t size = (size_t)number_bytes(a->number), at_once = sizeof bytes / size;
    for (size_t i = 0, count; i < n; i += count) {
        count = n - i < at_once ? n - i : at_once;
        if (read_exactly(in, a->at + (first + i) * size, bytes, count * size, error)) return -1;
        for (size_t k = 0; k < count; k++) out[i + k] = number_at(bytes + k * size, a);
    }
    return 0;
}

/* ---- NumPy ---- */

int is_npy(const struct input *in)
{
    char magic[6];
    return in->size >= 10 && in->read(in->user, 0, magic, 6) == 6 && !memcmp(magic, "\x93NUMPY", 6);
}

/* What follows 'key': in the header. */
static const char *after_key(const char *header, const char *key)
{
    const char *p = strstr(header, key);
    if (!p) return NULL;
    p += strlen(key);
    return p + strspn(p, "'\": ");
}

static int npy_type(struct array *a, const char *p)
{
    static const struct { const char *name; enum number number; } types[] = {
        {"f2", NUMBER_F16}, {"f4", NUMBER_F32}, {"f8", NUMBER_F64}, {"V2", NUMBER_BF16}};
    a->big_endian = *p == '>';
    p += strspn(p, "<>|=");
    for (size_t i = 0; i < sizeof types / sizeof *types; i++)
        if (!strncmp(p, types[i].name, 2) && strchr("'\"", p[2])) {
            a->number = types[i].number;
            return 0;
        }
    return -1;
}

static int npy_shape(struct array *a, const char *p)
{
    if (*p++ != '(') return -1;
    for (a->n_dims = 0; *p && *p != ')';) {
        char *end;
        if (*p < '0' || *p > '9' || a->n_dims == MAX_DIMS) return -1;
        a->dim[a->n_dims++] = strtoull(p, &end, 10);
        p = end + strspn(end, "L, ");
    }
    return *p == ')' ? 0 : -1;
}

int read_npy(const struct input *in, struct array *a, char *error)
{
    unsigned char start[12];
    memset(a, 0, sizeof *a);
    if (read_exactly(in, 0, start, 10, error)) return -1;
    int wide = start[6] > 1, at = wide ? 12 : 10;
    if (read_exactly(in, 0, start, (size_t)at, error)) return -1;
    uint64_t n = unsigned_at(start + 8, wide ? 4 : 2, 0);
    if (n > MAX_HEADER || n > in->size - (uint64_t)at)
        return fault(error, "%s: a NumPy header of %llu bytes", in->name, (unsigned long long)n);
    char *header = malloc((size_t)n + 1);
    if (!header) return fault(error, "%s: out of memory for its header", in->name);
    int failed = read_exactly(in, (uint64_t)at, header, (size_t)n, error);
    header[failed ? 0 : n] = 0;
    const char *type = after_key(header, "descr"), *order = after_key(header, "fortran_order");
    const char *shape = after_key(header, "shape");
    a->at = (uint64_t)at + n;
    if (!failed && (!type || !order || !shape || npy_shape(a, shape)))
        failed =
            fault(error, "%s: a NumPy header without descr, fortran_order and shape", in->name);
    if (!failed && npy_type(a, type))
        failed = fault(error, "%s: NumPy type %.*s, expected f2, f4, f8, or V2 for bfloat16",
                       in->name, (int)strcspn(type, "'\",}"), type);
    if (!failed && strncmp(order, "False", 5))
        failed = fault(error, "%s is in Fortran order, expected C order (numpy.ascontiguousarray)",
                       in->name);
    free(header);
    return failed ? -1 : check_array(in, a, error);
}

/* ---- JSON ---- */

struct json {
    const char *at, *end;
    int depth;
};

static int json_peek(struct json *j)
{
    while (j->at < j->end && memchr(" \t\r\n", *j->at, 4)) j->at++;
    return j->at < j->end ? (unsigned char)*j->at : 0;
}

static int json_take(struct json *j, int c)
{
    if (json_peek(j) != c) return 0;
    j->at++;
    return 1;
}

static size_t put_utf8(char *out, unsigned u)
{
    if (u < 0x80) return out[0] = (char)u, 1;
    if (u < 0x800) return out[0] = (char)(0xC0 | u >> 6), out[1] = (char)(0x80 | (u & 63)), 2;
    if (u < 0x10000) {
        out[0] = (char)(0xE0 | u >> 12), out[1] = (char)(0x80 | (u >> 6 & 63));
        return out[2] = (char)(0x80 | (u & 63)), 3;
    }
    out[0] = (char)(0xF0 | u >> 18), out[1] = (char)(0x80 | (u >> 12 & 63));
    return out[2] = (char)(0x80 | (u >> 6 & 63)), out[3] = (char)(0x80 | (u & 63)), 4;
}

static int json_hex(struct json *j, unsigned *u)
{
    *u = 0;
    for (int i = 0; i < 4; i++, j->at++) {
        if (j->at == j->end) return -1;
        const char *digits = "0123456789abcdef", c = *j->at;
        const char *d = c ? strchr(digits, c >= 'A' && c <= 'F' ? c + 32 : c) : NULL;
        if (!d) return -1;
        *u = *u << 4 | (unsigned)(d - digits);
    }
    return 0;
}

/* The character after a backslash, as 1 to 4 bytes of UTF-8; 0 when it is none. */
static size_t json_escape(struct json *j, char *out)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    unsigned u, low;
    if (j->at == j->end) return 0;
    char c = *j->at++;
    const char *found = c ? strchr(from, c) : NULL;
    if (found) return out[0] = to[found - from], 1;
    if (c != 'u' || json_hex(j, &u)) return 0;
    if (u >= 0xD800 && u < 0xDC00 && j->end - j->at >= 6 && j->at[0] == '\\' && j->at[1] == 'u') {
        j->at += 2;
        if (json_hex(j, &low)) return 0;
        if (low >= 0xDC00 && low < 0xE000) u = 0x10000 + ((u - 0xD800) << 10) + (low - 0xDC00);
    }
    return put_utf8(out, u);
}

/* A string; what is longer than room - 1 bytes is cut there, and *n counts what is kept. */
static int json_string(struct json *j, char *out, size_t room, size_t *n)
{
    *n = 0;
    if (!json_take(j, '"')) return -1;
    while (j->at < j->end && *j->at != '"') {
        char c[4] = {*j->at++};
        size_t count = 1;
        if (c[0] == '\\' && (count = json_escape(j, c)) == 0) return -1;
        for (size_t i = 0; i < count; i++)
            if (*n + 1 < room) out[(*n)++] = c[i];
    }
    if (room) out[*n] = 0;
    return json_take(j, '"') ? 0 : -1;
}

static int json_number(struct json *j, double *x)
{
    char text[64];
    size_t n = 0;
    json_peek(j);
    while (j->at < j->end && n < 63 && *j->at && strchr("+-.0123456789eE", *j->at))
        text[n++] = *j->at++;
    text[n] = 0;
    char *end;
    *x = strtod(text, &end);
    return n && !*end ? 0 : -1;
}

/* Begins an object or array; json_more then says whether another member follows. */
static int json_enter(struct json *j, int open)
{
    return json_take(j, open) && ++j->depth < MAX_DEPTH ? 0 : -1;
}

/* 1, or 0 at the end, or -1. *first is 1 before the first member. */
static int json_more(struct json *j, int close, int *first)
{
    if (json_take(j, close)) {
        j->depth--;
        return 0;
    }
    if (!*first && !json_take(j, ',')) return -1;
    *first = 0;
    return json_peek(j) ? 1 : -1;
}

static int json_key(struct json *j, char *key, size_t room)
{
    size_t n;
    return json_string(j, key, room, &n) || !json_take(j, ':') ? -1 : 0;
}

static int json_skip(struct json *j)
{
    int c = json_peek(j), first = 1, more;
    size_t n;
    double x;
    if (c == '"') return json_string(j, NULL, 0, &n);
    if (c != '{' && c != '[') {
        const char *words[] = {"true", "false", "null"};
        for (int i = 0; i < 3; i++) {
            n = strlen(words[i]);
            if ((size_t)(j->end - j->at) >= n && !memcmp(j->at, words[i], n)) return j->at += n, 0;
        }
        return json_number(j, &x);
    }
    if (json_enter(j, c)) return -1;
    while ((more = json_more(j, c + 2, &first)) ==
           1) { /* ']' and '}' come two after their openers */
        char key[4];
        if ((c == '{' && json_key(j, key, sizeof key)) || json_skip(j)) return -1;
    }
    return more;
}

/* ---- safetensors ---- */

int is_safetensors(const struct input *in)
{
    unsigned char start[9];
    if (in->size < 10 || in->read(in->user, 0, start, 9) != 9) return 0;
    uint64_t n = unsigned_at(start, 8, 0);
    return start[8] == '{' && n >= 2 && n <= in->size - 8;
}

static int tensor_type(struct array *a, const char *type)
{
    static const char *const names[] = {"F16", "BF16", "F32", "F64"}; /* as enum number */
    for (int i = 0; i < 4; i++)
        if (!strcmp(type, names[i])) {
            a->number = (enum number)i;
            return 0;
        }
    return -1;
}

static int whole_numbers(struct json *j, uint64_t *out, int most, int *n)
{
    int first = 1, more;
    *n = 0;
    if (json_enter(j, '[')) return -1;
    while ((more = json_more(j, ']', &first)) == 1) {
        double x;
        if (*n == most || json_number(j, &x) || !(x >= 0 && x < 0x1p62)) return -1;
        out[(*n)++] = (uint64_t)x;
    }
    return more;
}

/* {"dtype":..,"shape":..,"data_offsets":[begin,end]}. 1 when its type is none of ours. */
static int tensor_entry(struct json *j, struct array *a)
{
    char key[32], type[16] = "";
    int first = 1, more, n;
    uint64_t offsets[2] = {0, 0};
    size_t length;
    if (json_enter(j, '{')) return -1;
    while ((more = json_more(j, '}', &first)) == 1) {
        int failed = json_key(j, key, sizeof key);
        if (failed) return -1;
        if (!strcmp(key, "dtype")) failed = json_string(j, type, sizeof type, &length);
        else if (!strcmp(key, "shape")) failed = whole_numbers(j, a->dim, MAX_DIMS, &a->n_dims);
        else if (!strcmp(key, "data_offsets")) failed = whole_numbers(j, offsets, 2, &n);
        else failed = json_skip(j);
        if (failed) return -1;
    }
    a->at = offsets[0];
    return more ? -1 : tensor_type(a, type) ? 1 : 0;
}

/* Finds entry number index among those of a float type. */
static int find_entry(struct json *j, int index, struct array *a)
{
    int first = 1, more;
    if (json_enter(j, '{')) return -1;
    while ((more = json_more(j, '}', &first)) == 1) {
        memset(a, 0, sizeof *a);
        if (json_key(j, a->name, sizeof a->name)) return -1;
        int is_meta = !strcmp(a->name, "__metadata__"),
            code = is_meta ? json_skip(j) : tensor_entry(j, a);
        if (code < 0) return -1;
        if (!is_meta && code == 0 && index-- == 0) return 1;
    }
    return more;
}

int read_safetensors(const struct input *in, int index, struct array *a, char *error)
{
    unsigned char start[8];
    if (read_exactly(in, 0, start, 8, error)) return -1;
    uint64_t n = unsigned_at(start, 8, 0);
    if (n > MAX_HEADER || n > in->size - 8)
        return fault(error, "%s: a safetensors header of %llu bytes", in->name,
                     (unsigned long long)n);
    char *header = malloc((size_t)n + 1);
    if (!header) return fault(error, "%s: out of memory for its header", in->name);
    int found = read_exactly(in, 8, header, (size_t)n, error);
    if (!found) {
        struct json j = {header, header + n, 0};
        found = find_entry(&j, index, a);
        if (found < 0) fault(error, "%s: its safetensors header cannot be read", in->name);
    }
    free(header);
    if (found == 1) a->at += 8 + n; /* at most 2^62 and 2^24 */
    if (found == 1 && a->at > in->size)
        return fault(error, "%s: %s lies beyond the file", in->name, a->name);
    return found == 1 && check_array(in, a, error) ? -1 : found;
}

/* ---- Logits: arrays ---- */

/* Takes an array's shape as rows of logits: [T][V], [1][T][V] or [V]. */
static int shape_rows(struct reader *r, const struct array *a, const struct expected *e)
{
    int n = a->n_dims, skip = 0;
    while (n - skip > 1 && a->dim[skip] == 1) skip++;
    uint64_t width = n - skip > 0 ? a->dim[n - 1] : 0, rows = n - skip == 2 ? a->dim[skip] : 1;
    if (n - skip < 1 || n - skip > 2 || width < 1 || width + PADDING < (uint64_t)e->n_vocab ||
        width > (uint64_t)e->n_vocab + PADDING || rows < 1 || rows > INT32_MAX)
        return -1;
    r->width = (int)width;
    r->n_rows = (int)rows;
    return 0;
}

static int open_npy(struct reader *r, const struct expected *e)
{
    char shape[SHAPE_TEXT];
    r->form_name = "a NumPy array";
    if (read_npy(&r->in, &r->array, r->error)) return -1;
    if (!shape_rows(r, &r->array, e)) return 0;
    return fault(r->error, "%s: its shape is %s, expected [%d][%d], [1][%d][%d] or [%d]",
                 r->in.name, array_shape(&r->array, shape), e->n_tokens, e->n_vocab, e->n_tokens,
                 e->n_vocab, e->n_vocab);
}

static int open_safetensors(struct reader *r, const struct expected *e)
{
    struct array a, found = {.n_dims = 0};
    int n = 0, code;
    r->form_name = "a safetensors file";
    for (int i = 0; (code = read_safetensors(&r->in, i, &a, r->error)) == 1; i++)
        if (!shape_rows(r, &a, e)) {
            if (n++ == 1)
                return fault(r->error, "%s: two tensors have the shape of logits, %.60s and %.60s",
                             r->in.name, found.name, a.name);
            found = a;
        }
    if (code < 0) return -1;
    if (n == 0)
        return fault(r->error, "%s has no float tensor of shape [%d][%d], [1][%d][%d] or [%d]",
                     r->in.name, e->n_tokens, e->n_vocab, e->n_tokens, e->n_vocab, e->n_vocab);
    r->array = found;
    return shape_rows(r, &found, e);
}

/* Raw float32 says nothing of its shape: rows of n_vocab, or of a padded vocabulary, so many as
 * there are tokens or positions asked for, or one. */
static int open_raw(struct reader *r, const struct expected *e)
{
    const int widths[] = {e->n_vocab, e->n_vocab + 64, e->n_vocab + 1, e->n_vocab - 64};
    const int counts[] = {e->n_rows ? e->n_rows : e->n_tokens, 1, e->n_tokens - 1, e->n_tokens + 1};
    r->form_name = "raw float32";
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < (e->n_rows ? 1 : 4); k++)
            if (widths[i] > 0 && counts[k] > 0 &&
                r->in.size == 4 * (uint64_t)widths[i] * (uint64_t)counts[k]) {
                r->array = (struct array){.number = NUMBER_F32, .n_dims = 2,
                                          .dim = {(uint64_t)counts[k], (uint64_t)widths[i]}};
                r->width = widths[i];
                r->n_rows = counts[k];
                return 0;
            }
    return fault(r->error,
                 "%s has %llu bytes: raw float32 logits of %d positions and %d tokens have %llu, "
                 "those of the last position alone %llu",
                 r->in.name, (unsigned long long)r->in.size, counts[0], e->n_vocab,
                 4 * (unsigned long long)e->n_vocab * (unsigned long long)counts[0],
                 4 * (unsigned long long)e->n_vocab);
}

/* ---- Logits: llama-perplexity's base file ---- */

int is_kld_base(const struct input *in)
{
    char magic[8];
    return in->size >= BASE_HEADER && in->read(in->user, 0, magic, 8) == 8 &&
           !memcmp(magic, "_logits_", 8);
}

/* uint16 values of a row: scale and least value are two floats before the codes, which are even. */
static uint64_t base_row_bytes(int n_vocab)
{
    return 2 * (2 * (((uint64_t)n_vocab + 1) / 2) + 4);
}

static int open_kld_base(struct reader *r, const struct expected *e)
{
    unsigned char start[BASE_HEADER];
    r->form_name = "a base file of llama-perplexity";
    r->is_log = 1;
    if (read_exactly(&r->in, 0, start, sizeof start, r->error)) return -1;
    uint64_t n_ctx = unsigned_at(start + 8, 4, 0), width = unsigned_at(start + 12, 4, 0);
    uint64_t n_pieces = unsigned_at(start + 16, 4, 0);
    if (n_ctx < 3 || n_ctx > 1 << 24 || n_pieces < 1 || n_pieces > INT32_MAX / n_ctx)
        return fault(r->error, "%s: a base file of %llu pieces of %llu tokens", r->in.name,
                     (unsigned long long)n_pieces, (unsigned long long)n_ctx);
    if (width < 1 || width + PADDING < (uint64_t)e->n_vocab ||
        width > (uint64_t)e->n_vocab + PADDING)
        return fault(r->error, "%s has a vocabulary of %llu tokens, the model has %d", r->in.name,
                     (unsigned long long)width, e->n_vocab);
    uint64_t n_tokens = n_ctx * n_pieces, n_rows = n_ctx - 1 - n_ctx / 2;
    uint64_t size = BASE_HEADER + 4 * n_tokens + n_pieces * n_rows * base_row_bytes((int)width);
    if (r->in.size != size)
        return fault(r->error, "%s has %llu bytes, expected %llu for %llu pieces of %llu tokens",
                     r->in.name, (unsigned long long)r->in.size, (unsigned long long)size,
                     (unsigned long long)n_pieces, (unsigned long long)n_ctx);
    r->tokens = malloc((size_t)n_tokens * 4);
    if (!r->tokens) return fault(r->error, "%s: out of memory for its tokens", r->in.name);
    if (read_exactly(&r->in, BASE_HEADER, r->tokens, (size_t)n_tokens * 4, r->error)) return -1;
    for (size_t i = 0; i < n_tokens; i++) {
        unsigned char bytes[4];
        memcpy(bytes, &r->tokens[i], 4);
        r->tokens[i] = (int32_t)unsigned_at(bytes, 4, 0);
        if (r->tokens[i] < 0 || r->tokens[i] >= e->n_vocab)
            return fault(r->error, "%s: token %zu is %d, outside the vocabulary of %d", r->in.name,
                         i, (int)r->tokens[i], e->n_vocab);
    }
    r->width = (int)width;
    r->n_ctx = (int)n_ctx, r->n_pieces = (int)n_pieces;
    r->n_rows = (int)(n_pieces * n_rows);
    return 0;
}

/* What lies 16 or more below the largest was cut off there: it is not known. */
static int base_row(struct reader *r, int index, float *row, int n)
{
    uint64_t n_bytes = base_row_bytes(r->width);
    uint64_t at =
        BASE_HEADER + 4 * (uint64_t)r->n_ctx * (uint64_t)r->n_pieces + (uint64_t)index * n_bytes;
    if (read_exactly(&r->in, at, r->bytes, (size_t)n_bytes, r->error)) return -1;
    float scale = float_of_bits((uint32_t)unsigned_at(r->bytes, 4, 0));
    float least = float_of_bits((uint32_t)unsigned_at(r->bytes + 4, 4, 0));
    if (!isfinite(scale) || !isfinite(least))
        return fault(r->error, "%s: row %d holds NaN or infinity", r->in.name, index);
    for (int i = 0; i < n; i++) {
        unsigned code = (unsigned)unsigned_at(r->bytes + 8 + 2 * (size_t)i, 2, 0);
        row[i] = code ? scale * (float)code + least : NAN;
    }
    return 0;
}

/* ---- Logits: servers ---- */

static int looks_like_json(const struct input *in)
{
    char start[64];
    size_t n = in->read(in->user, 0, start, sizeof start), i = 0;
    while (i < n && memchr(" \t\r\n", start[i], 4)) i++;
    if (i < n && start[i] == '[') for (i++; i < n && memchr(" \t\r\n", start[i], 4);) i++;
    return i < n && start[i] == '{' && i + 1 < n && memchr("\" \t\r\n}", start[i + 1], 6);
}

static int begin_row(struct reader *r)
{
    if ((size_t)r->n_rows == r->room_rows) {
        size_t room = r->room_rows ? 2 * r->room_rows : 64;
        struct known_row *larger = realloc(r->row, room * sizeof *larger);
        if (!larger || room > INT32_MAX) return -1;
        r->row = larger, r->room_rows = room;
    }
    r->row[r->n_rows++] = (struct known_row){r->n_known, r->n_known, -1};
    return 0;
}

static int add_known(struct reader *r, int32_t id, double value)
{
    if (id < 0) return 0; /* a text that is no token of the model: nothing to compare with */
    if (r->n_known == r->room_known) {
        size_t room = r->room_known ? 2 * r->room_known : 1024;
        struct known *larger = realloc(r->known, room * sizeof *larger);
        if (!larger) return -1;
        r->known = larger, r->room_known = room;
    }
    r->known[r->n_known++] = (struct known){id, (float)value};
    r->row[r->n_rows - 1].end = r->n_known;
    return 0;
}

static int32_t id_of_text(const struct expected *e, const char *text, size_t n)
{
    return e->find ? e->find(e->find_user, text, n) : -1;
}

static int is_whole(const char *text, size_t n)
{
    return n > 0 && n < 10 && strspn(text, "0123456789") == n;
}

/* {"id":..,"token":..,"bytes":..,"logprob":..}, as far as it goes. */
struct told {
    int32_t id;
    double value;
    int has_value;
};

static int read_told(struct json *j, const struct expected *e, struct told *t)
{
    char key[32], text[1024];
    int first = 1, more, has_id = 0, n_bytes = 0;
    uint64_t bytes[64];
    size_t n;
    double x;
    *t = (struct told){-1, 0, 0};
    if (json_enter(j, '{')) return -1;
    while ((more = json_more(j, '}', &first)) == 1) {
        if (json_key(j, key, sizeof key)) return -1;
        int failed = 0, c = json_peek(j), is_number = c == '-' || (c >= '0' && c <= '9');
        if (!strcmp(key, "logprob") && is_number) {
            failed = json_number(j, &t->value);
            t->has_value = 1;
        } else if ((!strcmp(key, "id") || !strcmp(key, "token_id")) && is_number) {
            failed = json_number(j, &x);
            t->id = x >= 0 && x < INT32_MAX ? (int32_t)x : -1, has_id = 1;
        } else if (!strcmp(key, "token") && c == '"') {
            failed = json_string(j, text, sizeof text, &n);
            if (!has_id) t->id = id_of_text(e, text, n);
        } else if (!strcmp(key, "bytes") && c == '[') {
            failed = whole_numbers(j, bytes, 64, &n_bytes);
        } else failed = json_skip(j);
        if (failed) return -1;
    }
    if (!has_id && t->id < 0 && n_bytes > 0) { /* a token that is half a character */
        for (int i = 0; i < n_bytes; i++) text[i] = (char)bytes[i];
        t->id = id_of_text(e, text, (size_t)n_bytes);
    }
    return more;
}

/* One position: a list of {"token":..,"logprob":..}. */
static int list_of_told(struct json *j, struct reader *r, const struct expected *e)
{
    int first = 1, more;
    if (json_enter(j, '[')) return -1;
    while ((more = json_more(j, ']', &first)) == 1) {
        struct told t;
        if (read_told(j, e, &t) || (t.has_value && add_known(r, t.id, t.value))) return -1;
    }
    return more;
}

/* One position: {"text": logprob} of older servers, or {"id": {"logprob":..}}; null has no row's
 * values. */
static int map_of_told(struct json *j, struct reader *r, const struct expected *e)
{
    char text[1024];
    int first = 1, more;
    size_t n;
    if (json_peek(j) != '{') return json_skip(j);
    if (json_enter(j, '{')) return -1;
    while ((more = json_more(j, '}', &first)) == 1) {
        struct told t = {-1, 0, 1};
        if (json_string(j, text, sizeof text, &n) || !json_take(j, ':')) return -1;
        int is_map = json_peek(j) == '{';
        if (is_map ? read_told(j, e, &t) : json_number(j, &t.value)) return -1;
        if (is_map && is_whole(text, n)) t.id = (int32_t)strtol(text, NULL, 10);
        else t.id = id_of_text(e, text, n);
        if (t.has_value && add_known(r, t.id, t.value)) return -1;
    }
    return more;
}

/* The value of "top_logprobs": of one position when its members have a logprob of their own, else
 * one member for each position. */
static int top_of(struct json *j, struct reader *r, const struct expected *e)
{
    struct json look = *j;
    char key[32];
    int first = 1, more, is_list = 0;
    if (json_peek(j) != '[') return json_skip(j);
    if (!json_enter(&look, '[') && json_more(&look, ']', &first) == 1 && json_peek(&look) == '{' &&
        !json_enter(&look, '{')) {
        first = 1;
        while (json_more(&look, '}', &first) == 1 && !json_key(&look, key, sizeof key)) {
            is_list |= !strcmp(key, "logprob");
            if (json_skip(&look)) break;
        }
    }
    if (is_list) return begin_row(r) ? -1 : list_of_told(j, r, e);
    first = 1;
    if (json_enter(j, '[')) return -1;
    while ((more = json_more(j, ']', &first)) == 1)
        if (begin_row(r) || map_of_told(j, r, e)) return -1;
    return more;
}

/* Looks for top_logprobs anywhere in a value. The token beside it is the one that was chosen. */
static int search(struct json *j, struct reader *r, const struct expected *e)
{
    int c = json_peek(j), first = 1, more;
    if (c != '{' && c != '[') return json_skip(j);
    struct json whole = *j;
    int rows_before = r->n_rows;
    if (json_enter(j, c)) return -1;
    int has_top = 0;
    while ((more = json_more(j, c + 2, &first)) == 1) {
        char key[32] = "";
        if (c == '{' && json_key(j, key, sizeof key)) return -1;
        int is_top = !strcmp(key, "top_logprobs") || !strcmp(key, "prompt_logprobs");
        if (is_top ? top_of(j, r, e) : search(j, r, e)) return -1;
        has_top |= is_top;
    }
    if (more == 0 && has_top && r->n_rows == rows_before + 1) {
        struct told t;
        if (!read_told(&whole, e, &t)) r->row[rows_before].chosen = t.id;
    }
    return more;
}

static int open_json(struct reader *r, const struct expected *e)
{
    r->form_name = "a server's log probabilities";
    r->is_log = 1;
    if (r->in.size > MAX_JSON)
        return fault(r->error, "%s: %llu bytes of JSON, expected at most %d", r->in.name,
                     (unsigned long long)r->in.size, MAX_JSON);
    char *text = malloc((size_t)r->in.size + 1);
    if (!text) return fault(r->error, "%s: out of memory", r->in.name);
    int failed = read_exactly(&r->in, 0, text, (size_t)r->in.size, r->error);
    struct json j = {text, text + r->in.size, 0};
    while (!failed && json_peek(&j)) {
        failed = search(&j, r, e);
        if (failed)
            fault(r->error, "%s: byte %zu is not JSON", r->in.name, (size_t)(j.at - text));
    }
    free(text);
    for (size_t i = 0; i < r->n_known && !failed; i++)
        if (r->known[i].id >= e->n_vocab + PADDING)
            failed = fault(r->error, "%s: id %d is outside the vocabulary of %d", r->in.name,
                           (int)r->known[i].id, e->n_vocab);
    if (!failed && r->n_rows > e->n_tokens + 1)
        failed = fault(r->error, "%s has %d positions and the text %d tokens", r->in.name,
                       r->n_rows, e->n_tokens);
    if (!failed && r->n_known == 0)
        return fault(r->error, "%s has no \"top_logprobs\" with tokens of the model", r->in.name);
    return failed ? -1 : 0;
}

static int known_row(struct reader *r, int index, float *row, int n)
{
    for (int i = 0; i < n; i++) row[i] = NAN;
    for (size_t k = r->row[index].begin; k < r->row[index].end; k++) {
        if (!isfinite(r->known[k].value))
            return fault(r->error, "%s: row %d holds NaN or infinity", r->in.name, index);
        if (r->known[k].id < n) row[r->known[k].id] = r->known[k].value;
    }
    return 0;
}

/* ---- Logits: any form ---- */

int reader_open(struct reader *r, const struct input *in, const struct expected *e)
{
    memset(r, 0, sizeof *r);
    r->in = *in;
    int code;
    if (in->size == 0) return fault(r->error, "%s is empty", in->name);
    if (is_npy(in)) r->form = FORM_NPY, code = open_npy(r, e);
    else if (is_kld_base(in)) r->form = FORM_KLD_BASE, code = open_kld_base(r, e);
    else if (is_safetensors(in)) r->form = FORM_SAFETENSORS, code = open_safetensors(r, e);
    else if (looks_like_json(in)) r->form = FORM_JSON, code = open_json(r, e);
    else r->form = FORM_RAW, code = open_raw(r, e);
    if (!code && r->form != FORM_JSON) {
        r->bytes = malloc((size_t)r->width * 8 + 16);
        if (!r->bytes) code = fault(r->error, "%s: out of memory for a row", in->name);
    }
    if (code) reader_close(r);
    return code;
}

static int array_row(struct reader *r, int index, float *row, int n)
{
    size_t size = (size_t)number_bytes(r->array.number);
    uint64_t at = r->array.at + (uint64_t)index * (uint64_t)r->width * size;
    if (read_exactly(&r->in, at, r->bytes, (size_t)n * size, r->error)) return -1;
    for (int i = 0; i < n; i++) row[i] = number_at(r->bytes + (size_t)i * size, &r->array);
    for (int i = 0; i < n; i++)
        if (isnan(row[i]) || row[i] == INFINITY)
            return fault(r->error, "%s: row %d, value %d is %s, expected a number", r->in.name,
                         index, i, isnan(row[i]) ? "NaN" : "infinite");
    int n_same = 1;
    while (n_same < n && row[n_same] == row[0]) n_same++;
    if (n_same < n || n == 1) return 0;
    return fault(r->error, "%s: row %d, all its %d values are %g, expected logits", r->in.name,
                 index, n, row[0]);
}

int reader_row(struct reader *r, int index, float *row, int n_vocab)
{
    int n = r->width && r->width < n_vocab ? r->width : n_vocab;
    if (index < 0 || index >= r->n_rows)
        return fault(r->error, "%s: there is no row %d", r->in.name, index);
    for (int i = n; i < n_vocab; i++) row[i] = NAN;
    if (r->form == FORM_KLD_BASE) return base_row(r, index, row, n);
    if (r->form == FORM_JSON) return known_row(r, index, row, n);
    return array_row(r, index, row, n);
}

void reader_close(struct reader *r)
{
    free(r->tokens);
    free(r->known);
    free(r->row);
    free(r->bytes);
    r->tokens = NULL, r->known = NULL, r->row = NULL, r->bytes = NULL;
}
