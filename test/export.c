/* export.c - the command export: exact mode's logits in files that other programs read. */
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "compare.h"

struct export {
    struct session *s;
    const char *path;
    FILE *file;
    int is_new;              /* a file of ours: not a device or a pipe, which stays what it is */
    uint16_t *code;          /* of a base file: room for a row */
};

/* Opens x->path for writing, but for a model, which would be gone. */
static int open_new(struct export *x)
{
    char magic[4] = "";
    long long size = gemma3_file_size(x->path);
    FILE *old = size >= 0 ? gemma3_fopen(x->path, "rb") : NULL;
    size_t n = old ? fread(magic, 1, 4, old) : 0;
    if (old) fclose(old);
    if (n == 4 && memcmp(magic, "GGUF", 4) == 0)
        return complain("%s: this is a model, which would be overwritten", x->path);
    x->is_new = size != -2;
    x->file = gemma3_fopen(x->path, "wb");
    return x->file ? 0 : complain("%s: %s", x->path, strerror(errno));
}

static int write_bytes(struct export *x, const void *bytes, size_t n)
{
    if (fwrite(bytes, 1, n, x->file) == n) return 0;
    return complain("%s: %s", x->path, strerror(errno ? errno : EIO));
}

static int write_u32(struct export *x, uint32_t u)
{
    unsigned char b[4] = {(unsigned char)u, (unsigned char)(u >> 8), (unsigned char)(u >> 16),
                          (unsigned char)(u >> 24)};
    return write_bytes(x, b, 4);
}

static int write_rows(void *user, const int *position, int n_rows, const float *rows)
{
    struct export *x = user;
    (void)position;
    if (!write_floats(x->file, rows, (size_t)n_rows * (size_t)x->s->config->n_vocab)) return 0;
    return complain("%s: %s", x->path, strerror(errno ? errno : EIO));
}

/* A header of NumPy's format 1.0 ends at a multiple of 64 bytes, with a line end. */
static int npy_header(struct export *x, int n_rows)
{
    char header[128];
    memset(header, ' ', sizeof header);
    memcpy(header, "\x93NUMPY\1\0\x76\0", 10);
    int n = snprintf(header + 10, sizeof header - 10,
                     "{'descr': '<f4', 'fortran_order': False, 'shape': (%d, %d), }", n_rows,
                     x->s->config->n_vocab);
    header[10 + n] = ' ';
    header[sizeof header - 1] = '\n';
    return write_bytes(x, header, sizeof header);
}

static int safetensors_header(struct export *x, int n_rows)
{
    char header[264];
    int n_vocab = x->s->config->n_vocab;
    memset(header, ' ', sizeof header);
    memset(header, 0, 8);
    header[1] = 1; /* 256 bytes follow */
    int n = snprintf(header + 8, 256,
                     "{\"__metadata__\":{\"made_by\":\"gemma3.c %s, contract %d, exact\"},"
                     "\"logits\":{\"dtype\":\"F32\",\"shape\":[%d,%d],\"data_offsets\":[0,%llu]}}",
                     GEMMA3_VERSION, GEMMA3_CONTRACT, n_rows, n_vocab,
                     4 * (unsigned long long)n_rows * (unsigned long long)n_vocab);
    header[8 + n] = ' ';
    return write_bytes(x, header, sizeof header);
}

/* ---- llama-perplexity's base file ---- */

/* A row: 16 bits for each log probability, between the largest and 16 below it. */
static int write_base_rows(void *user, const int *position, int n_rows, const float *rows)
{
    struct export *x = user;
    int n = x->s->config->n_vocab, code = 0;
    (void)position;
    for (int r = 0; r < n_rows && !code; r++) {
        const float *row = rows + (size_t)r * (size_t)n;
        float max = row[gemma3_argmax(row, n)], min = max;
        for (int i = 0; i < n; i++) min = row[i] < min ? row[i] : min;
        if (min < max - 16) min = max - 16;
        float scale = (max - min) / 65535, floats[2] = {scale, 0};
        floats[1] = (float)(min - max - gemma3_nll(row, n, gemma3_argmax(row, n)));
        for (int i = 0; i < n; i++) {
            uint16_t c = row[i] > min ? (uint16_t)lrintf((row[i] - min) / scale) : 0;
            unsigned char b[2] = {(unsigned char)c, (unsigned char)(c >> 8)};
            memcpy(x->code + i, b, 2);
        }
        if (write_floats(x->file, floats, 2)) code = complain("%s: %s", x->path, strerror(errno));
        if (!code) code = write_bytes(x, x->code, 2 * (((size_t)n + 1) / 2 * 2));
    }
    return code;
}

/* The text in pieces of n tokens, each begun with <bos>; rows of the second half, but the last. */
static int write_base(struct export *x, int n)
{
    struct session *s = x->s, piece = *s;
    const gemma3_vocab *v = gemma3_tokenizer_vocab(s->tokenizer);
    int n_pieces = s->n_ids / n, code = write_bytes(x, "_logits_", 8);
    const uint32_t header[] = {(uint32_t)n, (uint32_t)s->config->n_vocab, (uint32_t)n_pieces};
    char *wanted = calloc((size_t)n, 1);
    x->code = calloc((size_t)s->config->n_vocab + 1, sizeof *x->code);
    if (!wanted || !x->code) code = out_of_memory((size_t)s->config->n_vocab * 2, "a row");
    for (int i = 0; i < 3 && !code; i++) code = write_u32(x, header[i]);
    for (int i = 0; i < n_pieces * n && !code; i++) code = write_u32(x, (uint32_t)s->ids[i]);
    for (int i = n / 2; i < n - 1 && wanted; i++) wanted[i] = 1;
    piece.n_ids = n;
    for (int k = 0; k < n_pieces && !code; k++) {
        piece.ids = s->ids + (size_t)k * (size_t)n;
        if (v->bos >= 0 && v->add_bos)
            piece.ids[0] = v->bos; /* the file has the token that was there */
        gemma3_state_reset(s->state);
        code = run_ids(&piece, wanted, write_base_rows, x);
    }
    free(wanted);
    free(x->code);
    return code;
}

/* ---- The command ---- */

static int write_array(struct export *x, const char *wanted, int n_rows)
{
    int code = x->s->args->npy ? npy_header(x, n_rows) : safetensors_header(x, n_rows);
    return code ? code : run_ids(x->s, wanted, write_rows, x);
}

int export_logits(struct session *s, const struct args *a)
{
    struct export x = {.s = s,
                       .path = a->npy           ? a->npy
                               : a->safetensors ? a->safetensors
                                                : a->kld_base};
    int piece = a->n_ctx ? a->n_ctx : DEFAULT_PIECE, n_rows = 0;
    char *wanted = NULL;
    if (!!a->npy + !!a->safetensors + !!a->kld_base != 1)
        return complain("export needs one of --npy FILE, --safetensors FILE and --kld-base FILE");
    int code = open_model(s, a);
    if (!code) code = read_ids(s);
    if (!code && a->kld_base && (piece < 3 || s->n_ids < piece))
        code =
            complain("the text has %d tokens; --kld-base needs pieces of 3 or more (-c), here %d",
                     s->n_ids, piece);
    if (!code && !a->kld_base) code = wanted_positions(s, &wanted, &n_rows);
    s->params.n_ctx = a->kld_base ? piece : s->n_ids;
    if (!code) code = open_state(s);
    if (!code) code = open_new(&x);
    if (!code) code = a->kld_base ? write_base(&x, piece) : write_array(&x, wanted, n_rows);
    if (x.file && fclose(x.file) && !code) code = complain("%s: %s", x.path, strerror(errno));
    if (x.file && code && x.is_new) remove(x.path);
    free(wanted);
    return code;
}
