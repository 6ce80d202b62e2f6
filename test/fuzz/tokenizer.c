/* tokenizer.c - any vocabulary and any text: encoded, decoded, and put together to characters.
 *
 *     byte 0: flags, see below | byte 1: number of tokens | tokens | the text
 *     token: 4 bits of type, 4 bits of length | a byte for the score | its text
 *
 * What is claimed of every input: no crash and no undefined behaviour;
 n + 1 ids suffice and are in the
 * vocabulary; with a token for each byte the text comes back, but for U+2581, which is a space;
 one id
 * less than needed is noticed; characters that leave gemma3_utf8_push are whole. In a vocabulary of
 * letters alone, the ids are those of merging as README tells it, done in the simplest way.
 */
#include "../../gemma3.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { HAS_BYTES = 16, LETTERS = 32, ADD_BOS = 64 }; /* of byte 0; below them encode's flags */
enum { TOKENS = 256 + 128, TEXT = 2048 };

typedef struct vocabulary {
    gemma3_vocab v;
    const char *text[TOKENS];
    uint32_t length[TOKENS];
    float score[TOKENS];
    int32_t type[TOKENS];
    char bytes[256][8];      /* <0x00> and so on */
    char *letters;           /* the input's bytes, made letters */
} vocabulary;

static void tokenizer_must(int true_always, const char *what)
{
    if (true_always) return;
    fprintf(stderr, "broken promise: %s\n", what);
    abort();
}

static void add_piece(vocabulary *v, const char *text, size_t n, float score, int type)
{
    int id = v->v.n_vocab++;
    v->text[id] = text;
    v->length[id] = (uint32_t)n;
    v->score[id] = score;
    v->type[id] = type;
}

/* Scores are whole numbers, many of them equal, and some are none. */
static float score_of(int b, int flags)
{
    if (!(flags & LETTERS) && b == 255) return NAN;
    if (!(flags & LETTERS) && b == 254) return -INFINITY;
    return (float)(b & 15) - 8;
}

/* Reads the vocabulary and returns where the text begins. */
static size_t read_vocabulary(vocabulary *v, const uint8_t *data, size_t size, int flags)
{
    static const char *const fixed[] = { "<bos>", "<eos>", "<unk>", "\xe2\x96\x81",
                                         "<start_of_turn>", "<end_of_turn>",
                                         "a", "b", "c", "d" };
    const char *bytes = flags & LETTERS ? v->letters : (const char *)data;
    if (flags & HAS_BYTES)
        for (int i = 0; i < 256; i++) {
            snprintf(v->bytes[i], sizeof v->bytes[i], "<0x%02X>", (unsigned)i);
            add_piece(v, v->bytes[i], 6, 0, 6);
        }
    for (size_t i = flags & LETTERS ? 6 : 0; i < sizeof fixed / sizeof *fixed; i++)
        add_piece(v, fixed[i], strlen(fixed[i]), -100, 1);
    size_t at = 2;
    for (int i = data[1] % 64; i > 0 && at + 2 <= size; i--) {
        size_t n = data[at] & 15;
        int type = flags & LETTERS ? 1 : data[at] >> 4;
        float score = score_of(data[at + 1], flags);
        at += 2;
        if (n > size - at) n = size - at;
        add_piece(v, bytes + at, n, score, type);
        at += n;
    }
    v->v.text = v->text, v->v.length = v->length, v->v.score = v->score, v->v.type = v->type;
    v->v.add_bos = !!(flags & ADD_BOS);
    v->v.bos = v->v.eos = v->v.unknown = -1;
    if (!(flags & LETTERS)) {
        int first = flags & HAS_BYTES ? 256 : 0;
        v->v.bos = first, v->v.eos = first + 1, v->v.unknown = first + 2;
    }
    return at;
}

/* The first piece with this text, or -1. */
static int piece_of(const vocabulary *v, const char *text, size_t n)
{
    for (int id = 0; id < v->v.n_vocab; id++)
        if (v->length[id] == n && !memcmp(v->text[id], text, n)) return id;
    return -1;
}

/* Of all neighbours that spell a piece, the pair with the highest score is joined, the leftmost of
 * equal ones; again and again. Symbol i is text[begin[i]] to before text[begin[i + 1]]. */
static int merge_simply(const vocabulary *v, const char *text, size_t n, int32_t *ids)
{
    size_t begin[TEXT + 1];
    int n_ids = (int)n;
    for (size_t i = 0; i <= n; i++) begin[i] = i;
    for (;;) {
        int best = -1, best_id = -1;
        for (int i = 0; i + 1 < n_ids; i++) {
            int id = piece_of(v, text + begin[i], begin[i + 2] - begin[i]);
            if (id >= 0 && (best < 0 || v->score[id] > v->score[best_id])) best = i, best_id = id;
        }
        if (best < 0) break;
        memmove(begin + best + 1, begin + best + 2, (size_t)(n_ids - best - 1) * sizeof *begin);
        n_ids--;
    }
    for (int i = 0; i < n_ids; i++)
        ids[i] = piece_of(v, text + begin[i], begin[i + 1] - begin[i]);
    return n_ids;
}

static void is_merged(const vocabulary *v, const char *text, size_t n, const int32_t *ids,
                      int n_ids)
{
    int32_t want[TEXT];
    if (n > 200) return; /* cubic */
    int n_want = merge_simply(v, text, n, want);
    tokenizer_must(n_ids == n_want && !memcmp(ids, want, (size_t)n_ids * sizeof *ids), "merging "
                   "as it is told");
}

/* U+2581 as a space, in place. */
static size_t with_spaces(char *text, size_t n)
{
    size_t to = 0;
    for (size_t i = 0; i < n;) {
        int mark = n - i >= 3 && !memcmp(text + i, "\xe2\x96\x81", 3);
        text[to++] = mark ? ' ' : text[i];
        i += mark ? 3 : 1;
    }
    return to;
}

static void comes_back(const gemma3_tokenizer *t, const char *text, size_t n, const int32_t *ids,
                       int n_ids)
{
    char *want = malloc(n + 1), *got = malloc((size_t)n_ids * GEMMA3_PIECE_MAX + 1);
    size_t n_got = 0;
    for (int i = 0; i < n_ids; i++)
        n_got += (size_t)gemma3_decode(t, ids[i], GEMMA3_SPECIAL, got + n_got);
    memcpy(want, text, n);
    n = with_spaces(want, n);
    n_got = with_spaces(got, n_got);
    tokenizer_must(n == n_got && !memcmp(want, got, n), "the text comes back");
    free(want);
    free(got);
}

static int utf8_is_whole(const unsigned char *p, int n)
{
    if (n == 0) return 1;
    int length = p[0] < 0x80 ? 1 : p[0] >= 0xc2 && p[0] < 0xe0 ? 2 : (p[0] & 0xf0) == 0xe0
        ? 3 : (p[0] & 0xf8) == 0xf0 ? 4 : 9;
    if (length > n) return 0;
    for (int i = 1; i < length; i++)
        if ((p[i] & 0xc0) != 0x80) return 0;
    return utf8_is_whole(p + length, n - length);
}

static void characters_are_whole(const char *text, size_t n)
{
    gemma3_utf8 u = { { 0 }, 0 };
    char out[8];
    for (size_t i = 0; i <= n; i++) {
        int bytes = i < n ? gemma3_utf8_push(&u, (unsigned char)text[i], out)
                          : gemma3_utf8_end(&u, out);
        tokenizer_must(bytes >= 0 && bytes <= 8 && utf8_is_whole((unsigned char *)out, bytes),
                       "whole characters");
    }
    tokenizer_must(u.n == 0, "nothing is left at the end");
}

static void turns_are_bounded(const gemma3_tokenizer *t, const char *text, size_t n)
{
    char *user = malloc(n + 1);
    memcpy(user, text, n);
    user[n] = 0;
    size_t n_user = strlen(user), n_system = n_user < n ? strlen(user + n_user + 1) : 0;
    const char *system = n_user < n ? user + n_user + 1 : NULL;
    int room = (int)(n_user + n_system + 32);
    int32_t *ids = malloc((size_t)room * sizeof *ids);
    for (int first = 0; first < 2; first++) {
        int n_ids = gemma3_encode_turn(t, system, user, first, ids, room);
        tokenizer_must(n_ids >= 0 || n_ids == -3, "a turn has at most its bytes and 32 ids");
    }
    free(ids);
    free(user);
}

static void encode_and_back(const vocabulary *v, const gemma3_tokenizer *t, const char *text,
                            size_t n, int flags)
{
    size_t n_work = gemma3_encode_work(n), shift = n % 16;
    char *work = malloc(n_work + shift);
    int32_t *ids = malloc((n + 1) * sizeof *ids);
    int n_ids = gemma3_encode_in(t, text, n, flags & 3, ids, (int)n + 1, work + shift, n_work);
    tokenizer_must(n_ids >= 0 && n_ids <= (int)n + 1, "n + 1 ids suffice");
    for (int i = 0; i < n_ids; i++) tokenizer_must(ids[i] >= 0 && ids[i] < v->v.n_vocab, "ids are "
                                                   "in the vocabulary");
    int has_bos = flags & GEMMA3_BOS && v->v.add_bos && v->v.bos >= 0;
    tokenizer_must(!has_bos || (n_ids > 0 && ids[0] == v->v.bos), "<bos> is the first");
    if (flags & HAS_BYTES) comes_back(t, text, n, ids + has_bos, n_ids - has_bos);
    if (flags & LETTERS) is_merged(v, text, n, ids + has_bos, n_ids - has_bos);
    if (n_ids > 0) {
        int32_t *fewer = malloc((size_t)n_ids * sizeof *fewer);
        tokenizer_must(gemma3_encode(t, text, n, flags & 3, fewer, n_ids - 1) == -1, "too many "
                       "ids are noticed");
        tokenizer_must(gemma3_encode(t, text, n, flags & 3, fewer, n_ids) == n_ids, "as many as "
                       "needed suffice");
        tokenizer_must(!memcmp(fewer, ids, (size_t)n_ids * sizeof *ids), "the same text gives the "
                       "same ids");
        free(fewer);
    }
    free(ids);
    free(work);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2) return 0;
    vocabulary *v = calloc(1, sizeof *v);
    int flags = data[0];
    v->letters = malloc(size);
    for (size_t i = 0; i < size; i++) v->letters[i] = (char)('a' + (data[i] & 3));
    size_t at = read_vocabulary(v, data, size, flags);
    size_t needed = gemma3_tokenizer_size(&v->v), n = size - at < TEXT ? size - at : TEXT;
    void *memory = malloc(needed);
    gemma3_error err = { "" };
    gemma3_tokenizer *t = gemma3_tokenizer_init(&v->v, memory, needed, &err);
    tokenizer_must(t != NULL, "a tokenizer in the memory it asked for");
    for (int32_t id = 0; id < v->v.n_vocab; id++) {
        char piece[GEMMA3_PIECE_MAX];
        int32_t found = gemma3_find(t, v->text[id], v->length[id]);
        tokenizer_must(found < v->v.n_vocab, "what is found is in the vocabulary");
        tokenizer_must(gemma3_decode(t, id, 0, piece) <= (int)v->length[id], "a piece grows not");
    }
    /* the text in exactly as much memory as it has bytes */
    char *text = malloc(n ? n : 1);
    memcpy(text, flags & LETTERS ? v->letters + at : (const char *)data + at, n);
    encode_and_back(v, t, text, n, flags);
    characters_are_whole(text, n);
    turns_are_bounded(t, text, n);
    free(text);
    free(memory);
    free(v->letters);
    free(v);
    return 0;
}
