/* seeds.c - writes the models of test/tiny.h into a folder, for a fuzzer to begin with. */
#include "../tiny.h"

int main(int argc, char **argv)
{
    char name[64], path[4096];
    bytes b;
    for (int k = 0; argc == 2 && (b = tiny_seed(k, name)).p; k++) {
        snprintf(path, sizeof path, "%s/%s.gguf", argv[1], name);
        FILE *f = fopen(path, "wb");
        if (!f || fwrite(b.p, 1, b.n, f) != b.n || fclose(f)) return 1;
        free(b.p);
    }
    return argc != 2;
}
