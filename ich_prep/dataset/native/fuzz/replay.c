/* Runs the fuzz target on files, without libFuzzer: to debug a finding, and for the tests, which need gcc only. */

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static int run(const char *path) {
    FILE *file = fopen(path, "rb");
    if (file == NULL || fseek(file, 0, SEEK_END) != 0) {
        return 0;
    }
    long size = ftell(file);
    uint8_t *data = malloc(size > 0 ? (size_t)size : 1);
    rewind(file);
    int complete = size >= 0 && data != NULL && fread(data, 1, (size_t)size, file) == (size_t)size;
    if (complete) {
        LLVMFuzzerTestOneInput(data, (size_t)size);
    }
    free(data);
    fclose(file);
    return complete;
}

int main(int count, char **paths) {
    for (int i = 1; i < count; i++) {
        if (!run(paths[i])) {
            fprintf(stderr, "cannot read %s\n", paths[i]);
            return 1;
        }
    }
    return 0;
}
