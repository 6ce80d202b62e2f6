/* gemma3.h - Google's Gemma 3 in plain C: the library behind the gemma3 program.
 *
 *     #define GEMMA3_NO_MAIN   before including or compiling gemma3.c leaves the command line out
 *     #define GEMMA3_NO_FILE   (with NO_MAIN) leaves out what needs an operating system:
 *                              gemma3_open, the pool, gemma3_default_threads, gemma3_memory_limit,
 *                              "The host" below, and what allocates: gemma3_encode, _encode_turn
 *     #define GEMMA3_NO_ERROR_TEXT  leaves out the sentences of errors, and with them snprintf
 *
 * A whole program:
 *
 *     gemma3_error err;
 *     gemma3_model *m = gemma3_open("model.gguf", NULL, &err);
 *     if (!m) { puts(err.text); return 1; }
 *     gemma3_params p = gemma3_default_params(m);
 *     gemma3_state *s = gemma3_state_new(m, &p, &err);
 *     if (!s) { puts(err.text); return 1; }
 *
 *     int32_t ids[64];
 *     int n = gemma3_encode(gemma3_model_tokenizer(m), "The capital of France is", 24,
 *                           GEMMA3_BOS, ids, 64);
 *     int n_vocab = gemma3_model_config(m)->n_vocab;
 *     float *logits = malloc(n_vocab * sizeof *logits);
 *     int row = n - 1;                              // logits after the last token only
 *     for (int i = 0; i < 8; i++) {
 *         if (gemma3_forward(s, ids, n, &row, 1, logits)) return puts(gemma3_state_error(s)), 1;
 *         ids[0] = gemma3_argmax(logits, n_vocab);
 *         char text[GEMMA3_PIECE_MAX];
 *         fwrite(text, 1, gemma3_decode(gemma3_model_tokenizer(m), ids[0], 0, text), stdout);
 *         n = 1, row = 0;
 *     }
 *
 * The numeric contract. For a model file and a sequence of ids, (mode, type of the KV cache) gives
 * one bit pattern of logits: on every instruction set, number of threads, batch, compiler and
 * system. README.md says it in full; GEMMA3_CONTRACT is its version.
 *
 * Ownership. A model is read-only after it is opened and may be shared by any number of states and
 * threads. A state is one conversation and is used by one thread at a time. There are no globals.
 *
 * Errors. A fallible function returns NULL or a negative number and leaves one sentence that names
 * the file, key or tensor, what was found and what was expected. Nothing is printed, nothing exits.
 *
 * Shapes are written [slowest][fastest], row-major. Letters: n tokens of this call.
 */
#ifndef GEMMA3_H
#define GEMMA3_H

#include <stddef.h>
#include <stdint.h>
#ifndef GEMMA3_NO_FILE
#include <stdio.h>
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define GEMMA3_VERSION "0.1.0"

enum {
    GEMMA3_CONTRACT = 1,     /* version of the numeric contract */
    GEMMA3_MAX_LAYERS = 128,
    GEMMA3_MAX_UBATCH = 64,        /* tokens taken through the layers at once, at most */
    GEMMA3_MAX_THREADS = 256,
    GEMMA3_PENALTY_WINDOW = 64, /* tokens the repeat penalty looks back at */
};

typedef struct gemma3_error {
    char text[512];
} gemma3_error;

/* ---- The model ------------------------------------------------------------------------------- */

/* What the file says about the model. Plain data: a test may change a number and see what breaks.
 * Right: GGUF key after "gemma3.", and transformers' name in config.json. */
typedef struct gemma3_config {
    int n_layers;            /* block_count                       num_hidden_layers */
    int d_model;             /* embedding_length                  hidden_size */
    int d_ff;                /* feed_forward_length               intermediate_size */
    int n_heads;             /* attention.head_count              num_attention_heads */
    int n_kv_heads;          /* attention.head_count_kv           num_key_value_heads */
    int head_dim;            /* attention.key_length              head_dim */
    int n_vocab;             /* rows of token_embd.weight         vocab_size */
    int n_ctx_train;         /* context_length                    max_position_embeddings, tokens */
    int window;              /* attention.sliding_window          sliding_window, tokens */
    float rms_eps;           /* attention.layer_norm_rms_epsilon  rms_norm_eps */
    float rope_base_global;  /* rope.freq_base                    rope_theta */
    float rope_base_local;   /* rope.freq_base_swa                rope_local_base_freq */
    float rope_factor;       /* rope.scaling.factor: global layers' angles are divided by it */
    float query_scale;       /* 1/sqrt(head_dim), 27B: of d_model/n_heads  query_pre_attn_scalar */
    float embedding_scale;   /* sqrt(d_model) */
    float final_softcap;     /* final_logit_softcapping, 0 when absent */
    uint8_t is_local[GEMMA3_MAX_LAYERS]; /* 1: sliding-window layer, 0: global   layer_types */
} gemma3_config;

typedef struct gemma3_model gemma3_model;
typedef struct gemma3_state gemma3_state;
typedef struct gemma3_tokenizer gemma3_tokenizer;

/* Runs task(job, i, worker) once for every i in 0 .. n_tasks-1, on any threads in any order, and
 * returns when all have ended. worker is in 0 .. n_threads-1 and no two tasks that run at the same
 * time share one. The sums inside never depend on it: threads divide rows, never a sum. */
typedef void gemma3_task(void *job, int index, int worker);
typedef void gemma3_parallel_for(void *pool, int n_tasks, gemma3_task *task, void *job);

typedef struct gemma3_options {
    int exact;               /* 1: weights in float32, the oracle's mode; 0: int8 activations */
    int no_repack;           /* 1: use the weights where they lie in the file; same bits */
    const char *isa;         /* force kernels: "scalar" "avx2" ...; NULL: the best this CPU has */
    int n_threads;           /* workers that parallel_for has; 0 or 1: one thread */
    gemma3_parallel_for *parallel_for; /* repacks weights while opening; NULL: one thread */
    void *pool;
    void (*progress)(void *user, double fraction); /* may be NULL */
    void *user;
    int obey_file;           /* 1: keys that contradict a release's definition are obeyed */
} gemma3_options;

/* Opens a Gemma 3 GGUF. options may be NULL. NULL and err on failure. The file must not be cut or
 * overwritten while the model is used (replacing it by renaming another is safe). */
gemma3_model *gemma3_open(const char *path, const gemma3_options *options, gemma3_error *err);

/* The same for a file's bytes in memory, which must outlive the model. name is used in errors and
 * may be NULL. */
gemma3_model *gemma3_open_memory(const void *data, size_t size, const char *name,
                                 const gemma3_options *options, gemma3_error *err);
void gemma3_close(gemma3_model *m);  /* of one from _init: before its memory is used otherwise */

/* Reads n bytes at offset into buffer; writes n bytes after those before. 0, or -1 when it
 * cannot. */
typedef int gemma3_read(void *user, uint64_t offset, void *buffer, size_t n);
typedef int gemma3_write(void *user, const void *bytes, size_t n);

/* Where a model file is. For machines whose memory is smaller than the file, only its beginning
 * need be in memory, if that has the whole header: weights behind it are read, 32 rows at a time
 * and with the same bits, whenever they are multiplied, so that a token costs the time of reading
 * gemma3_info.token_bytes. */
typedef struct gemma3_source {
    const void *data;        /* the file's first bytes, which must outlive the model */
    size_t n_data;           /* how many; without read it is the whole file */
    uint64_t size;           /* bytes of the file */
    gemma3_read *read;       /* NULL, or reads the rest; several workers may call it at once */
    void *user;
    const char *name;        /* for errors, may be NULL */
    int is_mapped;           /* 1: data is a mapped file, which gemma3_close unmaps; of it only the
                                weights are used once it is open */
} gemma3_source;

/* Opens one, in memory that is allocated at once. */
gemma3_model *gemma3_open_source(const gemma3_source *from, const gemma3_options *options,
                                 gemma3_error *err);

/* The same without malloc, for boards: how many bytes the model takes (0 and err on failure), and
 * opening it in size bytes of the caller's memory (any alignment). With no_repack the weights stay
 * where they are, in flash say, and the model takes little more than its tokenizer. */
size_t gemma3_model_size(const gemma3_source *from, const gemma3_options *options,
                         gemma3_error *err);
gemma3_model *gemma3_model_init(const gemma3_source *from, const gemma3_options *options, void *mem,
                                size_t size, gemma3_error *err);

const gemma3_config *gemma3_model_config(const gemma3_model *m);
const gemma3_tokenizer *gemma3_model_tokenizer(const gemma3_model *m);
/* What else is known of a model. */
typedef struct gemma3_info {
    const char *name;        /* general.name, "" when absent */
    const char *release;     /* "270M" "1B" "4B" "12B" "27B" when it has the layers and d_model of
                                that model of Google's, else "" */
    const char *isa;         /* name of the kernels chosen */
    int exact;
    size_t weight_bytes;     /* of weights read from the file */
    size_t token_bytes;      /* of weights that a new token reads */
    const char *chat_template; /* n_chat_template bytes without a NUL; NULL when there is none */
    size_t n_chat_template;
} gemma3_info;
const gemma3_info *gemma3_model_info(const gemma3_model *m);

/* Sentences about keys that were not obeyed, because they contradict that release's definition;
 * NULL after the last. */
const char *gemma3_model_note(const gemma3_model *m, int index);
/* Where a field of gemma3_config comes from: "" the file, "default": it has no such key,
 * "overridden": a note says why. key is the one that stands beside the field, query_scale's
 * "attention.scale". */
const char *gemma3_model_origin(const gemma3_model *m, const char *key);

/* A weight. data is as in the file where it lies there: with no_repack or exact, or floats. */
typedef struct gemma3_tensor {
    char name[64];           /* blk.0.attn_q.weight */
    const char *format;      /* "Q4_0" */
    int rows, cols;          /* [rows][cols]; a norm has one row */
    const void *data;        /* NULL: not in memory */
    size_t bytes;
    const float *floats;     /* of a norm: its values; NULL for matrices */
} gemma3_tensor;
/* Tensor number index, in the order of the forward pass. 0, or -1 past the last. */
int gemma3_model_tensor(const gemma3_model *m, int index, gemma3_tensor *out);

/* Names of the kernels this CPU can run, best first; NULL after the last. */
const char *gemma3_isa_name(int index);

/* Threads that are worth having: the physical cores that this process, or its container, may
 * use. */
int gemma3_default_threads(void);

/* Bytes of memory that this process may use: the machine's, its container's limit or the user's
 * (ulimit -v), whichever is least; 0 when the system does not say. */
size_t gemma3_memory_limit(void);

/* ---- A conversation -------------------------------------------------------------------------- */

typedef enum gemma3_kv_type { GEMMA3_KV_F16 = 0, GEMMA3_KV_F32 = 1 } gemma3_kv_type;

/* Called with every intermediate tensor, under llama.cpp's labels ("attn_norm", "Qcur", "l_out",
 * ...). layer is -1 outside the layers; data is [n][width], its first row belongs to position pos,
 * the others to those that follow. Only result_norm and result_output have the rows asked for
 * alone: pos is that of the first one. */
typedef void gemma3_trace(void *user, const char *name, int layer, int pos, int n, int width,
                          float *data);

/* Those labels, as they come; NULL after the last. *in_layers: 1 when every layer has this
 * tensor. */
const char *gemma3_trace_label(int index, int *in_layers);

typedef struct gemma3_params {
    int n_ctx;               /* tokens the cache can hold */
    int n_batch;             /* tokens taken at once, GEMMA3_MAX_UBATCH at most */
    gemma3_kv_type kv_type;
    int n_threads;           /* workers that parallel_for has, 1 without it */
    gemma3_parallel_for *parallel_for; /* NULL: one thread */
    void *pool;
    gemma3_trace *trace;     /* NULL: none */
    void *trace_user;
    const gemma3_config *config; /* NULL: the model's. Or a copy of it with other numbers and the
                                    same shapes, which must outlive the state */
} gemma3_params;

/* min(n_ctx_train, 4096) tokens, GEMMA3_MAX_UBATCH at once, F16 cache (F32 in exact mode), one
 * thread. */
gemma3_params gemma3_default_params(const gemma3_model *m);

/* Bytes of a state's cache, and of all of it, before anything is allocated. SIZE_MAX when they are
 * more than can be addressed. */
size_t gemma3_kv_bytes(const gemma3_config *c, const gemma3_params *p);
size_t gemma3_state_size(const gemma3_model *m, const gemma3_params *p);

/* Makes a state in size bytes of the caller's memory (any alignment), or, with _new, allocated.
 * The model must outlive it. NULL and err when the parameters are wrong or the memory too small. */
gemma3_state *gemma3_state_init(const gemma3_model *m, const gemma3_params *p, void *mem,
                                size_t size, gemma3_error *err);
gemma3_state *gemma3_state_new(const gemma3_model *m, const gemma3_params *p, gemma3_error *err);
void gemma3_state_free(gemma3_state *s);   /* only for states from _new */
void gemma3_state_reset(gemma3_state *s);  /* forget all tokens */
int gemma3_state_pos(const gemma3_state *s);     /* tokens in the cache */
const int32_t *gemma3_state_ids(const gemma3_state *s); /* [gemma3_state_pos] those tokens */
const char *gemma3_state_error(const gemma3_state *s);

/* Takes n tokens through the model and appends them to the cache. For each of the n_rows ascending
 * indices rows[] into this call's tokens, writes n_vocab logits to logits [n_rows][n_vocab]. 0, or
 * -1 when an id is outside the vocabulary, the context is full or rows do not ascend within 0 ..
 * n-1 (nothing is appended then), or when weights behind a read callback cannot be read (then the
 * tokens before that piece are in the cache: gemma3_state_pos). transformers:
 * Gemma3ForCausalLM.forward. */
int gemma3_forward(gemma3_state *s, const int32_t *ids, int n, const int *rows, int n_rows,
                   float *logits);

/* Keeps a conversation: what save writes, load puts into a state of the same model and config,
 * mode and KV type, whatever its n_ctx, batch, threads and kernels, if it holds the tokens. What
 * is computed afterwards is the same to the bit. Both go from front to end: load leaves no gaps
 * between offsets. 0, or -1 and err; after a failed load the state is empty. */
int gemma3_state_save(gemma3_state *s, gemma3_write *write, void *user, gemma3_error *err);
int gemma3_state_load(gemma3_state *s, gemma3_read *read, void *user, gemma3_error *err);

/* Threads of the host, for parallel_for: they spin briefly, then sleep. One pool may serve several
 * states on several threads: their calls of gemma3_pool_run take turns (a task must not call
 * it). */
typedef struct gemma3_pool gemma3_pool;
gemma3_pool *gemma3_pool_new(int n_threads, gemma3_error *err);
void gemma3_pool_free(gemma3_pool *pool);
void gemma3_pool_run(void *pool, int n_tasks, gemma3_task *task, void *job);

/* ---- Scores and choices ---------------------------------------------------------------------- */

/* In this part logits is [n_vocab], as gemma3_forward writes it, n_vocab >= 1; all of it belongs to
 * the caller. Nothing fails, nothing is allocated. */

/* The largest logit's id; of equal ones the lowest; NaN never wins; 0 when there is nothing else.
 * torch.argmax, llama.cpp's greedy sampler. */
int32_t gemma3_argmax(const float *logits, int n_vocab);

/* -log p(id) under softmax(logits), in nats, in double (README, rule 9); id in 0 .. n_vocab-1. NaN
 * when a logit is NaN or the largest is infinite. torch.nn.functional.cross_entropy of one row; the
 * mean over a text is what llama-perplexity takes exp of. */
double gemma3_nll(const float *logits, int n_vocab, int32_t id);

/* exp and log as the contract defines them, the same bits everywhere, relatively within 1e-15 of
 * the true value (a subnormal one to its last bit), for figures made of nll. exp: 0 below -745.2,
 * infinite above 709.78; log: -infinity of 0, NaN of negative numbers. */
double gemma3_exp(double x);
double gemma3_log(double x);

typedef struct gemma3_candidate {
    float logit;             /* while sampling: of some, exp((logit - largest) / temperature) */
    int32_t id;
} gemma3_candidate;

/* Settings and state of one conversation's choices. Plain data: settings may change at any time, a
 * copy goes on by itself. Any value is safe; those that make no sense choose the likeliest. */
typedef struct gemma3_sampler {
    float temperature;       /* logits are divided by it; 0: greedy */
    int top_k;               /* only the top_k largest (arXiv 1805.04833); 0: all */
    float top_p;             /* only the likeliest with top_p together (arXiv 1904.09751); 1: all */
    float min_p;             /* only those with min_p of the largest (arXiv 2407.01082); 0: all */
    float repeat_penalty;    /* of the last ids (CTRL, arXiv 1909.05858, section 4.1); 1: none */
    uint64_t rng;            /* xorshift64* state, never 0 */
    int32_t last[GEMMA3_PENALTY_WINDOW]; /* ring of the last ids seen */
    int n_last;              /* ids in it; from the window's size on also where it goes on */
} gemma3_sampler;

/* Gemma's recommendation: temperature 1, top-k 64, top-p 0.95. Any seed. */
gemma3_sampler gemma3_sampler_new(uint64_t seed);
/* Tells the sampler of a token, of the prompt too, for the repeat penalty. Any id: those outside
 * the vocabulary do not matter. */
void gemma3_sampler_accept(gemma3_sampler *s, int32_t id);
/* Chooses the next id by README's rule 8; the same seed and logits give the same ids everywhere. It
 * is not accepted yet. The penalty changes logits of the last ids in place, as transformers'
 * RepetitionPenaltyLogitsProcessor does. scratch has room for n_vocab candidates, 8 bytes each. */
int32_t gemma3_sample(gemma3_sampler *s, float *logits, int n_vocab, gemma3_candidate *scratch);

/* SHA-256 (FIPS 180-4), so that a board can print the hash of its logits: init, any number of adds,
 * end, which writes 64 hexadecimal digits and a NUL. After end only init may follow. */
typedef struct gemma3_sha256 {
    uint32_t h[8], block[16];
    uint64_t n_bytes;        /* so far */
} gemma3_sha256;
void gemma3_sha256_init(gemma3_sha256 *c);
void gemma3_sha256_add(gemma3_sha256 *c, const void *data, size_t n);
/* Adds n float32 values as little-endian bytes on any machine. */
void gemma3_sha256_add_floats(gemma3_sha256 *c, const float *x, size_t n);
void gemma3_sha256_end(gemma3_sha256 *c, char hex[65]);

/* ---- The tokenizer (tokenizer.c) ------------------------------------------------------------- */

/* A vocabulary as arrays of n_vocab entries, 1 to 2^24; all are borrowed and must outlive the
 * tokenizer. Right: GGUF's key after "tokenizer.ggml.". */
typedef struct gemma3_vocab {
    int n_vocab;
    const char *const *text; /* tokens: UTF-8 with U+2581 for a space; not NUL-terminated */
    const uint32_t *length;  /* bytes of text[i], at most GEMMA3_PIECE_MAX */
    const float *score;      /* scores, or -(rank of the first merge that makes the piece): the pair
                                whose joined piece has the highest score is joined first */
    const int32_t *type;     /* token_type: 1 normal 2 unknown 3 control 4 user 5 unused 6 byte */
    int32_t bos, eos, unknown; /* bos_token_id, eos_token_id, unknown_token_id; -1: none */
    int add_bos;             /* add_bos_token, 1 when absent */
    const int32_t *stop;     /* [n_stop] more ids that end an answer: eot_token_id and its kin */
    int n_stop;              /* 0: stop may be NULL */
} gemma3_vocab;

enum {
    GEMMA3_BOS = 1,          /* encode: put <bos> first, unless the file says add_bos_token false */
    GEMMA3_SPECIAL = 2,      /* encode: control tokens written in the text are those tokens
                                (transformers always does so; llama.cpp: parse_special);
                                decode: control tokens become their text instead of nothing */
    GEMMA3_PIECE_MAX = 1024, /* bytes one token can decode to, at most; longer ones are refused */
};

/* Bytes of a tokenizer over v (7 to 13 an entry; 0 when n_vocab is out of range), and building it
 * in that many of the caller's, at any address; it needs no freeing. It is read-only afterwards,
 * for any number of threads. NULL and err (which may be NULL) when v cannot be used. */
size_t gemma3_tokenizer_size(const gemma3_vocab *v);
gemma3_tokenizer *gemma3_tokenizer_init(const gemma3_vocab *v, void *mem, size_t size,
                                        gemma3_error *err);
/* What it was built over, for as long as it lives. */
const gemma3_vocab *gemma3_tokenizer_vocab(const gemma3_tokenizer *t);

/* Text to ids as transformers' GemmaTokenizerFast does for Gemma 3, but for special tokens (above).
 * n bytes of any content, at most 2^29 (2^27 on 32 bits): what is not valid UTF-8 becomes byte
 * tokens. Writes at most max_ids ids and returns how many; -1 when more are needed (n + 1 always
 * suffice), -2 when memory for the work (28 bytes for each of text) is not there. O(n log n). */
int gemma3_encode(const gemma3_tokenizer *t, const char *text, size_t n, int flags, int32_t *ids,
                  int max_ids);
/* The same with n_work >= gemma3_encode_work(n) bytes of the caller's memory, at any address,
 * instead of malloc. SIZE_MAX for texts that are too long. */
size_t gemma3_encode_work(size_t n);
int gemma3_encode_in(const gemma3_tokenizer *t, const char *text, size_t n, int flags, int32_t *ids,
                     int max_ids, void *work, size_t n_work);

/* Bytes of one token, written to out [GEMMA3_PIECE_MAX]; returns how many. May end inside a UTF-8
 * character: gemma3_utf8_push puts them together. An id outside the vocabulary gives 0 bytes. What
 * the ids of a text decode to, one after the other, is that text, with spaces for U+2581.
 * transformers' decode with skip_special_tokens, or, with GEMMA3_SPECIAL, without; llama.cpp:
 * llama_token_to_piece. */
int gemma3_decode(const gemma3_tokenizer *t, int32_t id, int flags, char *out);

/* Id of the token with exactly this text (U+2581 for spaces), or -1. */
int32_t gemma3_find(const gemma3_tokenizer *t, const char *text, size_t n);
/* 1 when an answer ends with this token: eos and stop of the vocabulary, and by text <eos>,
 * <end_of_turn>, <|im_end|>. llama.cpp: llama_vocab_is_eog. */
int gemma3_is_stop(const gemma3_tokenizer *t, int32_t id);

/* One turn of Gemma's chat template, as ids: the user's (system before it in the first one, or
 * NULL), then the opening of the model's answer. Both texts end with a NUL; text is trimmed, and
 * control tokens in it are plain text. first: 1 puts <bos> before it; 0 first ends the line of the
 * model's last turn ("\n"). Returns as gemma3_encode does, or -3 when the vocabulary has no turn
 * tokens; n_text + n_system + 32 ids always suffice. transformers: apply_chat_template. */
int gemma3_encode_turn(const gemma3_tokenizer *t, const char *system, const char *text, int first,
                       int32_t *ids, int max_ids);

/* Collects bytes and hands out only whole UTF-8 characters; an invalid byte becomes U+FFFD, as with
 * Python's errors="replace". Zeroed at the beginning. */
typedef struct gemma3_utf8 {
    unsigned char byte[4];
    int n;
} gemma3_utf8;
/* Adds one byte; writes 0 to 8 bytes to out and returns how many. */
int gemma3_utf8_push(gemma3_utf8 *u, unsigned char byte, char out[8]);
/* What is left at the end: 0 to 3 bytes as U+FFFD. */
int gemma3_utf8_end(gemma3_utf8 *u, char out[8]);

/* ---- The host -------------------------------------------------------------------------------- */

#ifndef GEMMA3_NO_FILE
/* What the command line needs beyond C11, for other programs too: the same on POSIX and Windows,
 * where paths are UTF-8 as well and may be longer than 260 characters. What fails sets errno. */

/* To be called first. Returns the arguments in UTF-8, of which the first leads to the program's
 * file, on Linux and Windows also when it was found in $PATH. From then on closed standard
 * streams cannot become other files, writing to a pipe without reader or beyond a limit fails
 * instead of ending the program, standard input and output are binary, a console shows UTF-8, and
 * a model's file that is cut while it is used ends the program with a sentence (SIGBUS). */
char **gemma3_host_start(char **argv);

FILE *gemma3_fopen(const char *path, const char *mode);
int gemma3_rename(const char *from, const char *to); /* replaces to. 0, or -1 */
int gemma3_remove(const char *path);                 /* 0, or -1 */
/* Bytes of a regular file; -1: there is none, -2: it is a device, a pipe or a folder. */
long long gemma3_file_size(const char *path);
/* Where a path leads through links, or path itself when there is nothing. 0, or -1 when that takes
 * more than size bytes. */
int gemma3_real_path(const char *path, char *real, size_t size);
int gemma3_is_terminal(FILE *f);
/* The next byte of stdin in UTF-8, also when it is typed at Windows' console; EOF: no more. */
typedef struct gemma3_typed { char text[768]; int at, n; } gemma3_typed; /* begin with zeros */
int gemma3_typed_byte(gemma3_typed *t);
double gemma3_seconds(void);                         /* of a clock that only goes forward */
#endif

#ifdef __cplusplus
}
#endif
#endif
