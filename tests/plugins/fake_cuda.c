/* A libcuda.so.1 that launches nothing and writes down what it was asked to launch: one line a launch into the file
 * FAKE_CUDA_LOG. The capability of its one device is FAKE_CUDA_CAPABILITY (such as 90), with 132 multiprocessors. How
 * many bytes a kernel's parameters have stands in FAKE_CUDA_PARAMETERS, a line a kernel: SYMBOL SIZE SIZE ... */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    unsigned gridX, gridY, gridZ, blockX, blockY, blockZ, shared;
    void* stream;
    void* attributes;
    unsigned attributeCount;
} Config;

int cuInit(unsigned flags) { return flags == 0 ? 0 : 1; }
int cuDriverGetVersion(int* version) { return *version = 13000, 0; }
int cuGetErrorString(int code, char const** text) { return *text = "fake error", code * 0; }
int cuCtxGetCurrent(void** context) { return *context = (void*)(uintptr_t)(getenv("FAKE_CUDA_NO_CONTEXT") == NULL), 0; }
int cuCtxSetCurrent(void* context) { return context == NULL; }
int cuDevicePrimaryCtxRetain(void** context, int device) { return *context = (void*)1, device; }
int cuCtxGetDevice(int* device) { return *device = 0, 0; }
int cuCtxGetId(void* context, unsigned long long* id) { return *id = (uintptr_t)context, 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    int capability = atoi(getenv("FAKE_CUDA_CAPABILITY"));
    *value = attribute == 75 ? capability / 10 : attribute == 76 ? capability % 10 : 132;
    return device;
}
int cuModuleLoadData(void** module, void const* image) { return *module = (void*)image, 0; }
int cuModuleGetFunction(void** function, void* module, char const* name) {
    return *function = strdup(name), module == NULL;
}
int cuFuncSetAttribute(void* function, int attribute, int value) { return function == NULL || attribute != 8 || value < 0; }

static int record(char const* symbol, Config const* config, void** parameters) {
    FILE* sizes = fopen(getenv("FAKE_CUDA_PARAMETERS"), "r");
    FILE* log = fopen(getenv("FAKE_CUDA_LOG"), "a");
    char line[4096];
    fprintf(log, "%s grid %u %u %u block %u %u %u shared %u attributes %u parameters", symbol, config->gridX, config->gridY,
            config->gridZ, config->blockX, config->blockY, config->blockZ, config->shared, config->attributeCount);
    while (fgets(line, sizeof(line), sizes) != NULL) {
        char* word = strtok(line, " \n");
        if (strcmp(word, symbol) != 0) {
            continue;
        }
        for (int i = 0; (word = strtok(NULL, " \n")) != NULL; ++i) {
            fputc(' ', log);
            for (int byte = atoi(word) - 1; byte >= 0; --byte) {
                fprintf(log, "%02x", ((unsigned char*)parameters[i])[byte]);
            }
        }
    }
    fputc('\n', log);
    fclose(sizes);
    return fclose(log);
}

int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
    Config config = {gx, gy, gz, bx, by, bz, shared, stream, NULL, 0};
    return extra != NULL || record(function, &config, parameters);
}

int cuLaunchKernelEx(Config const* config, void* function, void** parameters, void** extra) {
    return extra != NULL || record(function, config, parameters);
}

int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* address, uint64_t const* sizes,
                           uint64_t const* strides, uint32_t const* box, uint32_t const* steps, int interleave,
                           int swizzle, int promotion, int fill) {
    memset(map, 0, 128);
    int64_t words[16] = {type, rank, (intptr_t)address, (int64_t)sizes[0], (int64_t)sizes[1], (int64_t)sizes[2],
                         (int64_t)strides[0], (int64_t)strides[1], box[0], box[1], box[2], steps[0] + steps[1] + steps[2],
                         interleave, swizzle, promotion, fill};
    memcpy(map, words, sizeof(words));
    return (uintptr_t)map % 64 != 0;
}
