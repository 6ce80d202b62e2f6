/* replay.c - what the fuzzers found worth keeping, run again: every input in test/fuzz/corpus keeps
 * the promises that the targets in test/fuzz/ state. (How the fuzzers run: test/fuzz/README.md.)
 */
#define _POSIX_C_SOURCE 200809L
#include <dirent.h>

#include <stdint.h>

#include "fixture.h"

#define LLVMFuzzerTestOneInput fuzz_gguf
#include "fuzz/gguf.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_state
#include "fuzz/state.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_tokenizer
#include "fuzz/tokenizer.c"
#undef LLVMFuzzerTestOneInput
#define LLVMFuzzerTestOneInput fuzz_readers
#include "fuzz/readers.c"
#undef LLVMFuzzerTestOneInput

/* Each input in exactly as much memory as it has bytes. A broken promise ends the program. */
static void replay(const char *target, int (*run)(const uint8_t *, size_t))
{
    char folder[64], path[400];
    int n_inputs = 0;
    size_t n_bytes = 0;
    snprintf(folder, sizeof folder, "test/fuzz/corpus/%s", target);
    DIR *dir = opendir(folder);
    for (struct dirent *e; dir && (e = readdir(dir)) != NULL;) {
        if (e->d_name[0] == '.') continue;
        size_t n;
        snprintf(path, sizeof path, "%s/%s", folder, e->d_name);
        char *data = read_file(path, &n);
        uint8_t *exact = malloc(n ? n : 1);
        memcpy(exact, data, n);
        free(data);
        run(exact, n);
        free(exact);
        n_inputs++;
        n_bytes += n;
    }
    if (dir) closedir(dir);
    ok(n_inputs > 0, "%s: %d inputs, %zu bytes, keep every promise", target, n_inputs, n_bytes);
}

int main(void)
{
    replay("gguf", fuzz_gguf);
    replay("state", fuzz_state);
    replay("tokenizer", fuzz_tokenizer);
    replay("readers", fuzz_readers);
    return done_testing();
}
