/* The tokenizer, first on a small vocabulary made here, whose ids, types and ways to write spaces
 * are not Gemma's own; then on Gemma's, out of the real model, against Hugging Face's ids:
 *
 *     data/tokenizer-46-cases.txt   46 hard texts, separated by "\n__ggml_vocab_test__\n"
 *     data/tokenizer-46-cases.ids   their ids, a line each
 *     data/tokenizer-udhr.txt       2,748 lines of the Declaration of Human Rights, many languages;
 *                                   before each the FNV-1a of its ids as little-endian int32
 */
#define GEMMA3_NO_MAIN
#include "../gemma3.c"

#include <time.h>

#include "tap.h"

#define MODEL "weights/gemma-3-270m-q4_k_m.gguf"
#define MARK "\xE2\x96\x81" /* U+2581 */

/* ---- A small vocabulary ---------------------------------------------------------------------- */

enum { NORMAL = 1, UNKNOWN, CONTROL, USER, UNUSED, BYTE, MAX_PIECES = 512 };

struct small {
    const char *text[MAX_PIECES];
    uint32_t length[MAX_PIECES];
    float score[MAX_PIECES];
    int32_t type[MAX_PIECES];
    char bytes[256][8];
    gemma3_vocab vocab;
    gemma3_tokenizer *tokenizer;
    void *mem;
};

static int32_t add_piece(struct small *s, const char *text, float score, int type)
{
    int32_t id = s->vocab.n_vocab++;
    s->text[id] = text;
    s->length[id] = (uint32_t)strlen(text);
    s->score[id] = score;
    s->type[id] = type;
    return id;
}

static struct small *small_new(void)
{
    struct small *s = calloc(1, sizeof *s);
    s->vocab = (gemma3_vocab){.text = s->text, .length = s->length, .score = s->score,
                              .type = s->type, .bos = -1, .eos = -1, .unknown = -1, .add_bos = 1};
    return s;
}

static void add_bytes(struct small *s)
{
    for (int b = 0; b < 256; b++) {
        snprintf(s->bytes[b], sizeof s->bytes[b], "<0x%02X>", (unsigned)b);
        add_piece(s, s->bytes[b], 0, BYTE);
    }
}

/* Builds the tokenizer at an odd address, in exactly as much memory as it asks for. */
static struct small *build_tokenizer(struct small *s)
{
    gemma3_error err = {""};
    size_t size = gemma3_tokenizer_size(&s->vocab);
    s->mem = malloc(size + 1);
    s->tokenizer = gemma3_tokenizer_init(&s->vocab, (char *)s->mem + 1, size, &err);
    if (!s->tokenizer)
        diag("%s", err.text);
    return s;
}

static void small_free(struct small *s)
{
    free(s->mem);
    free(s);
}

/* Pieces enough for every behaviour. The turn tokens, the spaces and <unused7> have wrong types, as
 * in published files. */
static struct small *example(void)
{
    struct small *s = small_new();
    static const char *const letters[] = {"t", "h", "e", "c", "a", "x", "u", "s", "r", "m", "o",
                                          "d", "l", "<", ">", "\n", "0", "/", MARK};

    s->vocab.unknown = add_piece(s, "<unk>", 0, UNKNOWN);
    s->vocab.bos = add_piece(s, "<bos>", 0, CONTROL);
    s->vocab.eos = add_piece(s, "<eos>", 0, CONTROL);
    add_piece(s, "<start_of_turn>", 0, NORMAL);
    add_piece(s, "<end_of_turn>", 0, NORMAL);
    add_bytes(s);
    for (size_t i = 0; i < sizeof letters / sizeof *letters; i++)
        add_piece(s, letters[i], -100.0f, NORMAL);
    add_piece(s, "\n\n", 0, NORMAL);
    add_piece(s, "  ", 0, USER);
    add_piece(s, MARK MARK MARK, 0, NORMAL);
    add_piece(s, "<unused7>", 0, CONTROL);
    add_piece(s, "</s>", 0, CONTROL);
    add_piece(s, "he", -5, NORMAL);
    add_piece(s, "at", -8, NORMAL);
    add_piece(s, MARK "c", -11, NORMAL);
    add_piece(s, "th", -100, NORMAL);
    add_piece(s, "the", -943, NORMAL);
    add_piece(s, MARK "cat", -5372, NORMAL);
    add_piece(s, "cat", -8813, NORMAL);
    add_piece(s, "aa", -20, NORMAL);
    add_piece(s, "<e", -21, NORMAL);
    add_piece(s, "os>", -23, NORMAL);
    add_piece(s, "os", -22, NORMAL);
    add_piece(s, "xx", -24, UNUSED);
    add_piece(s, "[tool]", -24, USER);
    add_piece(s, "[tool]s", -24, USER);
    add_piece(s, "the", -1, NORMAL); /* a second time */
    return build_tokenizer(s);
}

/* ---- Asking for ids by their texts ----------------------------------------------------------- */

/* Id of the piece with this text, spaces in runs written as in the vocabulary. */
static int32_t id_of(const struct small *s, const char *text)
{
    return gemma3_find(s->tokenizer, text, strlen(text));
}

/* Checks that text becomes the pieces listed in want, "a|b|c". */
static void is_pieces(const struct small *s, const char *text, int flags, const char *want,
                      const char *claim)
{
    int32_t got[64], ids[64];
    int n = 0, n_got = gemma3_encode(s->tokenizer, text, strlen(text), flags, got, 64);

    for (const char *p = want; *p; n++) {
        size_t length = strcspn(p, "|");
        ids[n] = gemma3_find(s->tokenizer, p, length);
        p += length + (p[length] == '|');
    }
    if (!ok(n_got == n && memcmp(got, ids, (size_t)n * sizeof *ids) == 0, "%s", claim))
        for (int i = 0; i < n_got; i++)
            diag("  got id %d", (int)got[i]);
}

static void is_decoded(const struct small *s, int32_t id, int flags, const char *want,
                       const char *claim)
{
    char out[GEMMA3_PIECE_MAX];
    int n = gemma3_decode(s->tokenizer, id, flags, out);
    ok(n == (int)strlen(want) && memcmp(out, want, (size_t)n) == 0, "%s", claim);
}

/* ---- Text to ids ----------------------------------------------------------------------------- */

static void merging(void)
{
    struct small *s = example();

    is_pieces(s, "the cat", 0, "the|" MARK "cat", "the best pair is joined first");
    is_pieces(s, "aaa", 0, "aa|a", "of equal pairs the leftmost is joined first");
    is_pieces(s, "xx", 0, "x|x", "an unused piece is never made");
    is_pieces(s, "<eos>", 0, "<e|os>", "merging makes no special token");
    is_pieces(s, "<0x00>", 0, "<|0|x|0|0|>", "merging makes no byte token");
    is_pieces(s, "", 0, "", "no text is no ids");
    is_int(id_of(s, "the"), id_of(s, "th") + 1, "of two pieces with one text the lower id is used");
    small_free(s);
}

static void whole_tokens(void)
{
    struct small *s = example();

    is_pieces(s, "a<unused7>a", 0, "a|<unused7>|a", "<unusedN> is a token whatever its type");
    is_pieces(s, "a</s>a", 0, "a|</s>|a", "an HTML tag is a token whatever its type");
    is_pieces(s, "a\n\n\na", 0, "a|\n\n|\n|a", "line ends: the longest run first, from the left");
    is_pieces(s, "[tool]ss", 0, "[tool]s|s", "the longest of two added tokens is taken");
    is_pieces(s, "<start_of_turn>", GEMMA3_SPECIAL, "<start_of_turn>",
              "a special token counts with GEMMA3_SPECIAL, whatever its type");
    is_pieces(s, "s<eos>", GEMMA3_SPECIAL | GEMMA3_BOS, "<bos>|s|<eos>", "<bos> is put first");
    is_pieces(s, "<end_of_turn>", 0, "<e|<0x6E>|d|<0x5F>|o|<0x66>|<0x5F>|t|u|r|<0x6E>|>",
              "and without it is text");
    small_free(s);
}

static void spaces(void)
{
    struct small *s = example();

    is_pieces(s, "  a", 0, MARK MARK "|a", "two spaces, whether the file has spaces or U+2581");
    is_pieces(s, "   a", 0, MARK MARK MARK "|a", "three spaces");
    is_pieces(s, "    cat", 0, MARK MARK MARK "|" MARK "cat",
              "a space left over from a run begins the word");
    is_pieces(s, "x ", 0, "x|" MARK, "a space at the end is kept");
    is_pieces(s, MARK, 0, MARK, "U+2581 in the text is a space");
    is_pieces(s, " " MARK "a", 0, MARK MARK "|a", "and makes a run with a space");
    is_pieces(s, " " MARK MARK "a", 0, MARK "|" MARK MARK "|a",
              "but a run of U+2581 in the text is a token before spaces are looked at");
    small_free(s);
}

static void unknown_characters(void)
{
    struct small *s = example();

    is_pieces(s, "a\xC3\xA9t", 0, "a|<0xC3>|<0xA9>|t", "a character that is no piece: its bytes");
    is_pieces(s, "\xFF" "a\xE2\x96", 0, "<0xFF>|a|<0xE2>|<0x96>", "invalid UTF-8: its bytes");
    is_pieces(s, "\xED\xA0\x80", 0, "<0xED>|<0xA0>|<0x80>", "a surrogate: its bytes");
    is_pieces(s, "\r\n", 0, "<0x0D>|\n", "\\r has no piece");
    small_free(s);

    s = small_new();
    s->vocab.unknown = add_piece(s, "<unk>", 0, UNKNOWN);
    add_piece(s, "a", 0, NORMAL);
    build_tokenizer(s);
    is_pieces(s, "\xC3\xA9\xC3\xA9" "a\xC3\xA9", 0, "<unk>|a|<unk>",
              "without byte tokens: one <unk> for unknown characters in a row");
    small_free(s);
}

/* Texts that nearly are byte tokens, unused tokens or runs; a vocabulary without the usual. */
static void odd_pieces(void)
{
    static char marks[3 * 33 + 1];
    struct small *s = small_new();
    int32_t ids[40];
    for (int i = 0; i < 33; i++) memcpy(marks + 3 * i, MARK, 3);
    add_piece(s, "a", 0, NORMAL);
    int32_t no_byte = add_piece(s, "<0x0G>", 0, BYTE);
    add_piece(s, "<0xG0>", 0, NORMAL);
    add_piece(s, "<unused-1>", 0, NORMAL);
    add_piece(s, "<unusedx>", 0, NORMAL);
    add_piece(s, "<unused1>>", 0, NORMAL);
    add_piece(s, "<unused123", 0, NORMAL);
    add_piece(s, "<0x412", 0, NORMAL);
    add_piece(s, "<unused 1>", 0, USER);
    int32_t run = add_piece(s, marks + 3, 0, USER); /* 32 spaces: one more than a run may have */
    add_piece(s, MARK, 0, NORMAL);
    build_tokenizer(s);
    is_pieces(s, "a<0x0G>a", 0, "a|a", "what is no piece is left out without <unk>");
    is_pieces(s, "a<unused 1>a", 0, "a|<unused 1>|a", "the file's type counts where no rule does");
    is_decoded(s, no_byte, GEMMA3_SPECIAL, "", "a byte token without a byte decodes to nothing");
    is_int(gemma3_find(s->tokenizer, marks + 3, 96), run, "32 spaces are a piece like any other");
    is_int(gemma3_encode(s->tokenizer, marks, 99, 0, ids, 40), 2, "33 in the text: that and one");
    is_int(gemma3_encode(s->tokenizer, "a", 1, GEMMA3_BOS, ids, 40), 1, "no <bos>, none is put");
    ok(gemma3_tokenizer_vocab(s->tokenizer)->text == s->text, "the vocabulary is the caller's");
    small_free(s);
}

static void memory_limits(void)
{
    struct small *s = example();
    int32_t ids[8];
    char work[1024];
    const gemma3_tokenizer *t = s->tokenizer;

    is_int(gemma3_encode(t, "xtxtx", 5, GEMMA3_BOS, ids, 6), 6, "n + 1 ids suffice for n bytes");
    is_int(gemma3_encode(t, "xtxtx", 5, GEMMA3_BOS, ids, 5), -1, "too few ids: -1");
    is_int(gemma3_encode_in(t, "xtxtx", 5, 0, ids, 8, work + 1, gemma3_encode_work(5)), 5,
           "work memory may lie at any address");
    is_int(gemma3_encode_in(t, "xtxtx", 5, 0, ids, 8, work, gemma3_encode_work(5) - 1), -2,
           "too little of it: -2");
    is_int(gemma3_encode_in(t, "xtxtx", 5, 0, ids, 8, NULL, sizeof work), -2, "or none at all");
    ok(gemma3_encode_work(1000) <= 32 * 1000 + 100, "it is at most 32 bytes a byte");
    is_int((long long)(gemma3_encode_work(SIZE_MAX) == SIZE_MAX), 1, "absurd sizes do not wrap");
    is_int(gemma3_encode(t, "a\0a", 3, 0, ids, 8), 3, "a zero byte is a character like others");
    small_free(s);
}

/* Were a step to look at all that is left of the text, this would take an hour. */
static void long_texts(void)
{
    struct small *s = example();
    enum { N = 1 << 20 };
    char *text = malloc(N);
    int32_t *ids = malloc((N + 1) * sizeof *ids);

    memset(text, 'a', N);
    is_int(gemma3_encode(s->tokenizer, text, N, 0, ids, N + 1), N / 2, "a million equal letters");
    memset(text, ' ', N);
    is_int(gemma3_encode(s->tokenizer, text, N, 0, ids, N + 1), N / 3 + 1, "a million spaces");
    memset(text, '<', N);
    is_int(gemma3_encode(s->tokenizer, text, N, GEMMA3_SPECIAL, ids, N + 1), N,
           "a million beginnings of a token");
    memset(text, 0xE2, N);
    is_int(gemma3_encode(s->tokenizer, text, N, 0, ids, N + 1), N, "a million invalid bytes");
    free(text);
    free(ids);
    small_free(s);
}

/* ---- Any bytes, any vocabulary, any numbers -------------------------------------------------- */

static uint32_t next_random(uint32_t *random)
{
    *random = *random * 1664525u + 1013904223u;
    return *random >> 8;
}

/* Whether n bytes become ids of the vocabulary, at most n, that decode to the same bytes. */
static int comes_back(const gemma3_tokenizer *t, const char *text, size_t n)
{
    static int32_t ids[4096];
    char out[GEMMA3_PIECE_MAX];
    int n_ids = gemma3_encode(t, text, n, 0, ids, 4096);
    size_t at = 0;
    if (n_ids < 0 || (size_t)n_ids > n) return 0;
    for (int i = 0; i < n_ids; i++) {
        size_t length = (size_t)gemma3_decode(t, ids[i], 0, out);
        if (ids[i] < 0 || length > n - at || memcmp(out, text + at, length)) return 0;
        at += length;
    }
    return at == n;
}

/* Bytes of all kinds: any, letters of the vocabulary, beginnings of tokens, broken characters. */
static void any_bytes(void)
{
    static const char *const parts[] = {
        "the", " cat", "\n\n", "  ", "<unused7>", "</s>", "<eos>", "<0x41>", "\xE2\x96",
        "\xF0\x9F\xA4\x97", "\xED\xA0\x80", "aaa", "\xFF", "<start_of_", "[tool]s", "\xC3"};
    struct small *s = example();
    uint32_t random = 1;
    int n_same = 0, n_texts = 3000;
    for (int k = 0; k < n_texts; k++) {
        char text[512];
        size_t n = 0, want = next_random(&random) % 400;
        while (n < want) {
            uint32_t r = next_random(&random);
            const char *part = parts[r % 16];
            if (r >> 4 & 1) text[n++] = (char)(r >> 8); /* zero bytes, too */
            else for (size_t i = 0; part[i]; i++) text[n++] = part[i];
        }
        for (size_t i = 0; i + 3 <= n; i++) /* U+2581 comes back as a space: none here */
            if (!memcmp(text + i, MARK, 3)) text[i] = 'x';
        n_same += comes_back(s->tokenizer, text, n);
    }
    is_int(n_same, n_texts, "any bytes come back from their ids, which are no more");
    small_free(s);
}

static void any_numbers(void)
{
    struct small *s = example();
    const gemma3_tokenizer *t = s->tokenizer;
    int32_t ids[4], outside[] = {-1, INT32_MIN, INT32_MAX, s->vocab.n_vocab};
    char out[GEMMA3_PIECE_MAX];
    for (int i = 0; i < 4; i++)
        ok(gemma3_decode(t, outside[i], GEMMA3_SPECIAL, out) == 0 && !gemma3_is_stop(t, outside[i]),
           "id %ld decodes to nothing and does not stop", (long)outside[i]);
    is_int(gemma3_encode(t, "the", 3, 0, ids, 0), -1, "no room for ids: -1");
    is_int(gemma3_encode(t, "the", 3, 0, ids, -5), -1, "nor less than none");
    is_int(gemma3_encode(t, "", 0, 0, ids, 0), 0, "but no text needs no room");
    is_int(gemma3_encode(t, "the", ((size_t)1 << 29) + 1, 0, ids, 4), -2, "above 2^29 bytes: -2");
    is_int(gemma3_encode(t, "the", (size_t)INT32_MAX + 1, 0, ids, 4), -2, "one above 2^31");
    is_int(gemma3_encode(t, "the", SIZE_MAX, 0, ids, 4), -2, "one as large as can be");
    small_free(s);
}

/* Vocabularies of random bytes, lengths, scores and types open, and give ids of their own. */
static void any_vocabulary(void)
{
    uint32_t random = 3;
    int n_right = 0, n_vocabularies = 300;
    for (int k = 0; k < n_vocabularies; k++) {
        static char bytes[MAX_PIECES][8];
        struct small *s = small_new();
        int n_pieces = 1 + (int)(next_random(&random) % (MAX_PIECES - 1)), right = 1;
        for (int i = 0; i < n_pieces; i++) {
            uint32_t r = next_random(&random);
            for (int j = 0; j < 8; j++) {
                uint32_t byte = next_random(&random);
                bytes[i][j] = r & 1 ? (char)byte : " \n<>a\xE2\x96\x81"[byte % 8];
            }
            float score = r & 2 ? float_of(r << 8) : (float)(r >> 4);
            int32_t id = add_piece(s, "", score, (int)(r >> 4 & 7));
            s->text[id] = bytes[i];
            s->length[id] = r >> 8 & 7;
        }
        int32_t stop = (int32_t)next_random(&random) - 100;
        s->vocab.bos = s->vocab.unknown = n_pieces - 1;
        s->vocab.stop = &stop, s->vocab.n_stop = 1;
        build_tokenizer(s);
        for (int i = 0; s->tokenizer && i < 20; i++) {
            char text[300];
            int32_t ids[302];
            for (int j = 0; j < 300; j++)
                text[j] = bytes[next_random(&random) % (uint32_t)n_pieces][j % 8];
            int flags = GEMMA3_BOS | (i & 1 ? GEMMA3_SPECIAL : 0);
            int n = gemma3_encode(s->tokenizer, text, 300, flags, ids, 302);
            right &= n >= 0 && n <= 301;
            for (int j = 0; j < n; j++) right &= ids[j] >= 0 && ids[j] < n_pieces;
        }
        n_right += s->tokenizer && right;
        small_free(s);
    }
    is_int(n_right, n_vocabularies, "any vocabulary opens, and any text has ids in it");
}

/* ---- Texts chosen to collide ----------------------------------------------------------------- */

enum { BLOCK = 6, STAGES = 15, COLLIDING = 1 << STAGES };

static uint32_t fnv_1a(uint32_t hash, const char *text, size_t n)
{
    for (size_t i = 0; i < n; i++) hash = (hash ^ (unsigned char)text[i]) * 16777619u;
    return hash;
}

static void write_block(char *block, uint32_t k)
{
    for (int i = 0; i < BLOCK; i++, k /= 26) block[i] = (char)('a' + k % 26);
}

/* Two blocks that lead from one hash to the same next one. */
static uint32_t find_collision(uint32_t hash, char *a, char *b)
{
    enum { SLOTS = 1 << 20 };
    uint32_t *seen = calloc(SLOTS, sizeof *seen); /* numbers of blocks, by their hash */
    for (uint32_t k = 1;; k++) {
        write_block(a, k);
        uint32_t next = fnv_1a(hash, a, BLOCK), *slot = &seen[next % SLOTS];
        if (*slot) write_block(b, *slot);
        if (*slot && fnv_1a(hash, b, BLOCK) == next) {
            free(seen);
            return next;
        }
        *slot = k;
    }
}

/* CPU seconds that a vocabulary of these texts takes to build. Each text must be found. */
static double seconds_to_build(char (*text)[BLOCK * STAGES], const char *what)
{
    static const char *texts[COLLIDING];
    static uint32_t length[COLLIDING];
    static float score[COLLIDING];
    static int32_t type[COLLIDING];
    gemma3_vocab v = {.text = texts, .length = length, .score = score, .type = type,
                      .n_vocab = COLLIDING, .bos = -1, .eos = -1, .unknown = -1};
    for (int i = 0; i < COLLIDING; i++) texts[i] = text[i], length[i] = BLOCK * STAGES;
    size_t size = gemma3_tokenizer_size(&v);
    void *mem = malloc(size);
    clock_t begin = clock();
    const gemma3_tokenizer *t = gemma3_tokenizer_init(&v, mem, size, NULL);
    int n_found = 0;
    for (int i = 0; i < COLLIDING; i++) n_found += gemma3_find(t, text[i], BLOCK * STAGES) == i;
    double seconds = (double)(clock() - begin) / CLOCKS_PER_SEC;
    is_int(n_found, COLLIDING, "each of %d %s is found", COLLIDING, what);
    free(mem);
    return seconds;
}

/* Of two blocks at each of 15 places, 2^15 texts can be made, and all have one hash (Joux 2004). */
static void chosen_collisions(void)
{
    static char block[STAGES][2][BLOCK], text[COLLIDING][BLOCK * STAGES];
    uint32_t hash = 2166136261u, random = 1;
    for (int i = 0; i < COLLIDING; i++)
        for (int j = 0; j < STAGES; j++)
            write_block(text[i] + j * BLOCK, next_random(&random));
    double plain = seconds_to_build(text, "texts");
    for (int j = 0; j < STAGES; j++) hash = find_collision(hash, block[j][0], block[j][1]);
    int n_same = 0;
    for (int i = 0; i < COLLIDING; i++) {
        for (int j = 0; j < STAGES; j++)
            memcpy(text[i] + j * BLOCK, block[j][i >> j & 1], BLOCK);
        n_same += fnv_1a(2166136261u, text[i], BLOCK * STAGES) == hash;
    }
    is_int(n_same, COLLIDING, "%d texts have one hash", COLLIDING);
    double chosen = seconds_to_build(text, "texts with one hash");
    ok(chosen < 30 * plain + 0.3, "and cost no square of their number: %.3f s, others %.3f s",
       chosen, plain);
}

/* ---- Ids to text ----------------------------------------------------------------------------- */

static void decoding(void)
{
    struct small *s = example();
    int32_t bos = s->vocab.bos;

    is_decoded(s, id_of(s, MARK "cat"), 0, " cat", "U+2581 decodes to a space");
    is_decoded(s, id_of(s, MARK MARK), 0, "  ", "a run stored as spaces does too");
    is_decoded(s, id_of(s, "<0xE2>"), 0, "\xE2", "a byte token decodes to the byte");
    is_decoded(s, id_of(s, "</s>"), 0, "</s>", "an added token decodes to its text");
    is_decoded(s, id_of(s, "<unused7>"), 0, "<unused7>", "also when the file calls it control");
    is_decoded(s, bos, 0, "", "a special token decodes to nothing");
    is_decoded(s, bos, GEMMA3_SPECIAL, "<bos>", "or, with the flag, to its text");
    is_decoded(s, id_of(s, "<end_of_turn>"), 0, "", "also when the file calls it normal");
    is_decoded(s, -1, 0, "", "id -1 decodes to nothing");
    is_decoded(s, s->vocab.n_vocab, 0, "", "so does one beyond the vocabulary");
    small_free(s);
}

/* Pushes bytes through and checks all that comes out. */
static void is_streamed(const char *bytes, const char *want, const char *claim)
{
    gemma3_utf8 u = {{0}, 0};
    char out[256];
    int n = 0;

    for (const char *p = bytes; *p; p++)
        n += gemma3_utf8_push(&u, (unsigned char)*p, out + n);
    n += gemma3_utf8_end(&u, out + n);
    ok(n == (int)strlen(want) && memcmp(out, want, (size_t)n) == 0, "%s", claim);
}

static void whole_characters(void)
{
    gemma3_utf8 u = {{0}, 0};
    char out[8];

    is_int(gemma3_utf8_push(&u, 0xE2, out), 0, "half a character is held back");
    is_int(gemma3_utf8_push(&u, 0x96, out), 0, "so are two thirds");
    is_int(gemma3_utf8_push(&u, 0x81, out), 3, "and the whole is handed out");
    is_int(gemma3_utf8_end(&u, out), 0, "then nothing is left");
    is_streamed("h\xC3\xA9\xF0\x9F\xA4\x97", "h\xC3\xA9\xF0\x9F\xA4\x97",
                "valid text is unchanged");
    is_streamed("a\xFF" "b", "a\xEF\xBF\xBD" "b", "an invalid byte becomes U+FFFD");
    is_streamed("\xE2\x96" "a", "\xEF\xBF\xBD" "a", "so does a character broken off");
    is_streamed("\xF0\x9F\xA4", "\xEF\xBF\xBD", "also at the end");
    is_streamed("\xED\xA0\x80", "\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBD", "a surrogate is invalid");
    is_streamed("\xE2\xE2\x96\x81", "\xEF\xBF\xBD" MARK, "a new character may follow at once");
}

/* ---- Stops, turns, errors -------------------------------------------------------------------- */

static void no_bos(void)
{
    struct small *s = example();
    int32_t ids[32];
    is_int(gemma3_encode(s->tokenizer, "the", 3, GEMMA3_BOS, ids, 32), 2, "<bos> and a word");
    is_int(gemma3_encode_turn(s->tokenizer, NULL, "the", 1, ids, 32) > 0, 1, "a first turn");
    is_int(ids[0], s->vocab.bos, "a first turn begins with <bos>");
    free(s->mem);
    s->vocab.add_bos = 0;
    build_tokenizer(s);
    is_int(gemma3_encode(s->tokenizer, "the", 3, GEMMA3_BOS, ids, 32), 1,
           "no <bos> when the file wants none");
    is_int(gemma3_encode_turn(s->tokenizer, NULL, "the", 1, ids, 32) > 0, 1, "a first turn again");
    is_int(ids[0], s->vocab.bos, "but in a turn, because the template writes it");
    small_free(s);
}

static void stops(void)
{
    struct small *s = example();

    ok(gemma3_is_stop(s->tokenizer, id_of(s, "<eos>")), "<eos> stops, found by text");
    ok(gemma3_is_stop(s->tokenizer, id_of(s, "<end_of_turn>")), "<end_of_turn> too");
    ok(!gemma3_is_stop(s->tokenizer, id_of(s, "</s>")), "</s>, an HTML tag, does not");
    ok(!gemma3_is_stop(s->tokenizer, -1), "no token is no stop");
    small_free(s);

    s = example();
    s->vocab.eos = id_of(s, "a");
    free(s->mem);
    build_tokenizer(s);
    ok(gemma3_is_stop(s->tokenizer, id_of(s, "a")), "eos_token_id stops, whatever it is");
    ok(gemma3_is_stop(s->tokenizer, id_of(s, "<eos>")), "and <eos> still does");
    small_free(s);

    s = example();
    int32_t im_end = add_piece(s, "<|im_end|>", 0, NORMAL);
    int32_t more[2] = {id_of(s, "the"), id_of(s, "aa")};
    s->vocab.stop = more, s->vocab.n_stop = 2;
    free(s->mem);
    build_tokenizer(s);
    ok(gemma3_is_stop(s->tokenizer, im_end), "<|im_end|>, the end of ChatML's turns, stops too");
    ok(gemma3_is_stop(s->tokenizer, more[0]) && gemma3_is_stop(s->tokenizer, more[1]),
       "the vocabulary's list of more stops counts");
    ok(gemma3_is_stop(s->tokenizer, id_of(s, "<end_of_turn>")), "and the others still do");
    ok(!gemma3_is_stop(s->tokenizer, id_of(s, "a")), "but nothing else");
    small_free(s);
}

/* ---- FunctionGemma --------------------------------------------------------------------------- */

/* The flow on Google's page "FunctionGemma formatting and best practices": a developer's turn
 * declares a function, the model calls it and stops where the response begins, the program writes
 * the response, the model answers. */
static const char declaration[] =
    "<start_of_turn>developer\nYou can do function calling<start_function_declaration>"
    "declaration:get_weather{parameters:{properties:{city:{type:<escape>STRING<escape>}}}}"
    "<end_function_declaration><end_of_turn>\n"
    "<start_of_turn>user\nHow is the weather in Paris?<end_of_turn>\n<start_of_turn>model\n";
static const char call[] =
    "<start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>"
    "<start_function_response>";
static const char response[] =
    "response:get_weather{sky:<escape>sunny<escape>}<end_function_response>";
static const char answer[] = "It is sunny in Paris.<end_of_turn>";

/* Every special token is one id, what stands between them is one id for each byte. */
static void is_flow(const struct small *s, const char *text, const char *claim)
{
    int32_t ids[400], want[400];
    int n = 0, n_ids = gemma3_encode(s->tokenizer, text, strlen(text), GEMMA3_SPECIAL, ids, 400);
    for (const char *p = text; *p; n++) {
        size_t length = *p == '<' ? strcspn(p, ">") + 1 : 1;
        want[n] = gemma3_find(s->tokenizer, *p == ' ' ? MARK : p, *p == ' ' ? 3 : length);
        p += length;
    }
    if (!ok(n_ids == n && !memcmp(ids, want, (size_t)n * sizeof *ids), "%s", claim))
        diag("  %d ids, want %d", n_ids, n);
}

static void functions(void)
{
    static const char *const special[] = {
        "<start_of_turn>", "<end_of_turn>", "<start_function_declaration>",
        "<end_function_declaration>", "<start_function_call>", "<end_function_call>",
        "<start_function_response>", "<end_function_response>", "<escape>",
    };
    static char letters[128][2];
    struct small *s = small_new();
    for (int c = 33; c < 127; c++) {
        letters[c][0] = (char)c;
        add_piece(s, letters[c], 0, NORMAL);
    }
    add_piece(s, MARK, 0, NORMAL);
    add_piece(s, "\n", 0, NORMAL);
    for (size_t i = 0; i < sizeof special / sizeof *special; i++)
        add_piece(s, special[i], 0, i % 2 ? NORMAL : USER); /* wrong types, as in published files */
    int32_t stop = add_piece(s, "<unused99>", 0, USER) - 3; /* <start_function_response> */
    s->vocab.stop = &stop, s->vocab.n_stop = 1;
    build_tokenizer(s);
    is_flow(s, declaration, "FunctionGemma: a developer's turn with a declaration, a user's turn");
    is_flow(s, call, "the model's call");
    is_flow(s, response, "the program's response");
    is_flow(s, answer, "the model's answer");

    int32_t ids[200];
    int n = gemma3_encode(s->tokenizer, call, strlen(call), GEMMA3_SPECIAL, ids, 200), first = 0;
    while (first < n && !gemma3_is_stop(s->tokenizer, ids[first])) first++;
    is_int(first, n - 1, "it stops at <start_function_response>, the file's additional stop");
    is_decoded(s, stop, 0, "", "which is shown as nothing");
    is_decoded(s, stop, GEMMA3_SPECIAL, "<start_function_response>", "or as its text");
    n = gemma3_encode(s->tokenizer, call, strlen(call), 0, ids, 200);
    is_int(n, (int)strlen(call), "what a user types calls no function: all is plain text");
    small_free(s);
}

/* Checks a turn against the same text with its special tokens parsed. */
static void is_turn(const struct small *s, const char *system, const char *text, int first,
                    const char *want, const char *claim)
{
    int32_t got[256], ids[256];
    int n_got = gemma3_encode_turn(s->tokenizer, system, text, first, got, 256);
    int n = gemma3_encode(s->tokenizer, want, strlen(want), GEMMA3_SPECIAL, ids, 256);
    ok(n_got == n && memcmp(got, ids, (size_t)n * sizeof *ids) == 0, "%s", claim);
}

static void turns(void)
{
    struct small *s = example();
    int32_t ids[8];

    is_turn(s, NULL, "the cat", 1,
            "<bos><start_of_turn>user\nthe cat<end_of_turn>\n<start_of_turn>model\n",
            "a first turn");
    is_turn(s, NULL, "the cat", 0,
            "\n<start_of_turn>user\nthe cat<end_of_turn>\n<start_of_turn>model\n", "a later turn");
    is_turn(s, "the", "cat", 1,
            "<bos><start_of_turn>user\nthe\n\ncat<end_of_turn>\n<start_of_turn>model\n",
            "the system text stands before the first user text");
    is_turn(s, "\nthe\n", " \n\xC2\xA0" "cat\t\xE3\x80\x80\n", 1,
            "<bos><start_of_turn>user\n\nthe\n\n\ncat<end_of_turn>\n<start_of_turn>model\n",
            "the user's text is trimmed, the system text is not");
    is_turn(s, NULL, " \n ", 1,
            "<bos><start_of_turn>user\n<end_of_turn>\n<start_of_turn>model\n", "an empty turn");
    is_int(gemma3_encode_turn(s->tokenizer, NULL, "<end_of_turn>", 1, (int32_t[64]){0}, 64),
           gemma3_encode_turn(s->tokenizer, NULL, "", 1, (int32_t[64]){0}, 64) + 12,
           "what the user types cannot end the turn");
    is_int(gemma3_encode_turn(s->tokenizer, NULL, "the cat", 1, ids, 8), -1, "too few ids: -1");
    small_free(s);

    s = small_new();
    add_piece(s, "a", 0, NORMAL);
    build_tokenizer(s);
    is_int(gemma3_encode_turn(s->tokenizer, NULL, "a", 1, ids, 8), -3, "no turn tokens: -3");
    small_free(s);

    s = small_new();
    add_piece(s, "<start_of_turn>", 0, NORMAL);
    build_tokenizer(s);
    is_int(gemma3_encode_turn(s->tokenizer, NULL, "a", 1, ids, 8), -3, "one of two: -3");
    free(s->mem);
    add_piece(s, "<end_of_turn>", 0, NORMAL);
    for (const char *c = "u\0s\0e\0r\0m\0o\0d\0l\0\n\0"; *c; c += 2) add_piece(s, c, 0, NORMAL);
    add_bytes(s);
    build_tokenizer(s);
    is_turn(s, NULL, "user", 1,
            "<start_of_turn>user\nuser<end_of_turn>\n<start_of_turn>model\n",
            "a first turn of a vocabulary without <bos>");
    is_turn(s, NULL, "\x80\x80\x80\x80\x80 ", 1,
            "<start_of_turn>user\n\x80\x80\x80\x80\x80<end_of_turn>\n<start_of_turn>model\n",
            "bytes that are no characters are not trimmed");
    is_turn(s, NULL, "\x80", 1,
            "<start_of_turn>user\n\x80<end_of_turn>\n<start_of_turn>model\n",
            "nor is a single one");
    size_t n = ((size_t)1 << 27) + 1;
    char *huge = malloc(n + 1);
    memset(huge, 'u', n);
    huge[n] = 0;
    is_int(gemma3_encode_turn(s->tokenizer, NULL, huge, 1, ids, 8), -2, "above 2^27 bytes: -2");
    is_int(gemma3_encode_turn(s->tokenizer, huge, "u", 1, ids, 8), -2, "a system text too");
    free(huge);
    small_free(s);
}

static void is_refused(const struct small *s, size_t missing, const char *want, const char *claim)
{
    gemma3_error err = {""};
    size_t size = gemma3_tokenizer_size(&s->vocab);
    void *mem = malloc(size + 1);
    ok(!gemma3_tokenizer_init(&s->vocab, mem, size - missing, &err) && strstr(err.text, want),
       "%s: %s", claim, err.text);
    free(mem);
}

static void refused_vocabularies(void)
{
    struct small *s = example();
    int n_vocab = s->vocab.n_vocab;

    is_refused(s, 1, "memory", "too little memory");
    gemma3_error err;
    ok(!gemma3_tokenizer_init(&s->vocab, NULL, SIZE_MAX, &err), "no memory: %s", err.text);
    ok(!gemma3_tokenizer_init(&s->vocab, NULL, 0, NULL), "errors may be left unsaid");
    s->vocab.n_vocab = 0;
    is_refused(s, 0, "number of tokens", "no tokens");
    ok(!gemma3_tokenizer_init(&s->vocab, NULL, 0, NULL), "here too");
    s->vocab.n_vocab = (1 << 24) + 1;
    is_refused(s, 0, "number of tokens", "more tokens than 2^24");
    s->vocab.n_vocab = n_vocab;
    s->vocab.bos = n_vocab;
    is_refused(s, 0, "bos_token_id", "bos outside the vocabulary");
    s->vocab.bos = -2;
    is_refused(s, 0, "bos_token_id", "bos -2");
    s->vocab.bos = -1;
    s->vocab.eos = n_vocab;
    is_refused(s, 0, "eos_token_id", "eos outside the vocabulary");
    s->vocab.eos = -1;
    s->vocab.unknown = n_vocab;
    is_refused(s, 0, "unknown_token_id", "unknown outside the vocabulary");
    s->vocab.unknown = -1;
    s->length[5] = GEMMA3_PIECE_MAX + 1;
    is_refused(s, 0, "token 5", "a token longer than GEMMA3_PIECE_MAX");
    small_free(s);
}

/* ---- Gemma's own vocabulary ------------------------------------------------------------------ */

/* A whole file with a zero after it, or NULL. */
static char *read_file(const char *path, size_t *size)
{
    FILE *f = fopen(path, "rb");
    char *data = NULL;
    *size = 0;
    if (!f)
        return NULL;
    for (size_t room = 1 << 16, n = 1; n > 0; room *= 2) {
        data = realloc(data, room + 1);
        n = fread(data + *size, 1, room - *size, f);
        *size += n;
    }
    fclose(f);
    data[*size] = 0;
    return data;
}

/* Checks that text of n bytes becomes the ids that the line ids begins with. */
static int has_ids(const gemma3_tokenizer *t, const char *text, size_t n, int flags,
                   const char *ids)
{
    int32_t *got = malloc((n + 1) * sizeof *got);
    int n_got = gemma3_encode(t, text, n, flags, got, (int)n + 1), same = n_got >= 0;

    for (int i = 0; i < n_got && same; i++) {
        char *end;
        same = *ids && *ids != '\n' && strtol(ids, &end, 10) == got[i];
        if (same)
            ids = end + strspn(end, " ");
    }
    free(got);
    return same && (*ids == 0 || *ids == '\n');
}

static void golden_texts(const gemma3_tokenizer *t)
{
    static const struct { const char *text, *ids; } golden[] = {
        {"Hello, world!", "9259 236764 1902 236888"},
        {"The capital of France is", "818 5279 529 7001 563"},
        {"the cat", "1437 5866"},
        {"  two spaces", "138 13498 9952"},
        {"x  \r", "236781 138 251"},
        {"a\n\nb", "236746 108 236763"},
        {"a\tb", "236746 255968 236763"},
        {"                                 x", "167 138 236781"},
        {MARK "literal " MARK MARK "x", "37087 236743 138 236781"},
        {"1234567890", "236770 236778 236800 236812 236810 236825 236832 236828 236819 236771"},
        {"<b>bold</b>", "200 15640 209"},
        {"<unused6241>", "262143"},
        {"<|im_start|>", "236820 236909 548 236779 3041 111038"},
        {"<start_of_turn>", "236820 3041 236779 1340 236779 887 236813"},
        {"\xFF\xE2\x96", "493 464 388"},
    };

    for (size_t i = 0; i < sizeof golden / sizeof *golden; i++)
        ok(has_ids(t, golden[i].text, strlen(golden[i].text), 0, golden[i].ids), "ids %s",
           golden[i].ids);
    ok(has_ids(t, "Hi<end_of_turn>\n", 16, GEMMA3_SPECIAL | GEMMA3_BOS, "2 10979 106 107"),
       "special tokens in the text, with the flag");
}

static void golden_turn(const gemma3_tokenizer *t)
{
    static const int32_t want[] = {2, 105, 2364, 107, 10979, 106, 107, 105, 4368, 107};
    int32_t ids[40];

    is_int(gemma3_encode_turn(t, NULL, " Hi\n", 1, ids, 40), 10, "a first turn has 10 ids");
    is_bits(ids, want, sizeof want, "a first turn is that of Gemma's template");
    is_int(gemma3_encode_turn(t, NULL, "Hi", 0, ids, 40), 10, "a later turn has 10 ids");
    ok(ids[0] == 107 && memcmp(ids + 1, want + 1, 9 * sizeof *ids) == 0,
       "a later turn begins with the line end after <end_of_turn>");
}

static void hard_cases(const gemma3_tokenizer *t)
{
    static const char separator[] = "\n__ggml_vocab_test__\n";
    size_t n_texts, n_ids;
    char *texts = read_file("test/data/tokenizer-46-cases.txt", &n_texts);
    char *ids = read_file("test/data/tokenizer-46-cases.ids", &n_ids);
    int n = 0;

    if (ok(texts && ids, "the file of 46 cases is there")) {
        const char *line = ids;
        for (char *p = texts, *next; p; p = next) {
            next = strstr(p, separator);
            size_t length = next ? (size_t)(next - p) : strlen(p);
            ok(has_ids(t, p, length, 0, line), "case %d: %.*s", ++n, (int)strcspn(line, "\n"),
               line);
            line = strchr(line, '\n') ? strchr(line, '\n') + 1 : "";
            if (next)
                next += strlen(separator);
        }
        is_int(n, 46, "46 cases");
    }
    free(texts);
    free(ids);
}

/* Hash of the ids of a line; and whether the line comes back from them. */
static uint32_t hash_line(const gemma3_tokenizer *t, const char *line, size_t n, int *is_same)
{
    int32_t *ids = malloc((n + 1) * sizeof *ids);
    int n_ids = gemma3_encode(t, line, n, 0, ids, (int)n + 1);
    uint32_t h = 2166136261u;
    size_t at = 0;

    *is_same = 1;
    for (int i = 0; i < n_ids; i++) {
        char out[GEMMA3_PIECE_MAX];
        size_t length = (size_t)gemma3_decode(t, ids[i], 0, out);
        *is_same = *is_same && length <= n - at && memcmp(out, line + at, length) == 0;
        at += length;
        for (int shift = 0; shift < 32; shift += 8)
            h = (h ^ ((uint32_t)ids[i] >> shift & 255)) * 16777619u;
    }
    *is_same = *is_same && at == n;
    free(ids);
    return h;
}

static void many_languages(const gemma3_tokenizer *t)
{
    size_t size;
    char *file = read_file("test/data/tokenizer-udhr.txt", &size);
    int n = 0, n_wrong = 0, n_changed = 0;

    if (!ok(file != NULL, "the file of many languages is there"))
        return;
    for (char *p = file; *p; n++) {
        char *text, *end = p + strcspn(p, "\n");
        int is_same;
        uint32_t want = (uint32_t)strtoul(p, &text, 16);
        if (hash_line(t, text + 1, (size_t)(end - text) - 1, &is_same) != want) {
            n_wrong++;
            diag("line %d has other ids", n + 1);
        }
        n_changed += !is_same;
        p = end + (*end == '\n');
    }
    is_int(n, 2748, "2,748 lines of many languages");
    is_int(n_wrong, 0, "all have Hugging Face's ids");
    is_int(n_changed, 0, "all come back from their ids");
    free(file);
}

static void real_vocabulary(void)
{
    FILE *f = fopen(MODEL, "rb");
    if (!f) {
        skip(1, "Gemma's vocabulary: " MODEL " is not there, make it to run this");
        return;
    }
    fclose(f);

    gemma3_error err = {""};
    gemma3_options options = {0};
    options.no_repack = 1;
    gemma3_model *m = gemma3_open(MODEL, &options, &err);
    if (!ok(m != NULL, "the real model opens")) {
        diag("%s", err.text);
        return;
    }
    const gemma3_tokenizer *t = gemma3_model_tokenizer(m);
    golden_texts(t);
    golden_turn(t);
    hard_cases(t);
    many_languages(t);
    gemma3_close(m);
}

int main(void)
{
    merging();
    whole_tokens();
    spaces();
    unknown_characters();
    odd_pieces();
    memory_limits();
    long_texts();
    any_bytes();
    any_numbers();
    any_vocabulary();
    chosen_collisions();
    decoding();
    whole_characters();
    no_bos();
    stops();
    functions();
    turns();
    refused_vocabularies();
    real_vocabulary();
    return done_testing();
}
