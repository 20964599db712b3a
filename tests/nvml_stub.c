/* A stand-in for libnvidia-ml.so.1 with one GPU, whose answers the tests set in the environment:
 *
 *   STUB_INIT, STUB_FIND, STUB_MEMORY, STUB_PROCESSES   the code that the call returns (0: success)
 *   STUB_MEMORY_V2                                      likewise, of the second version of the memory call alone
 *   STUB_OWN_UUID, STUB_OWN_BUS                         by which the GPU is found
 *   STUB_TOTAL, STUB_FREE, STUB_RESERVED                bytes; those reserved are the driver's own
 *   STUB_PIDS                                           "pid:bytes,pid:bytes"; bytes -1: not available
 *   STUB_MIG_MODE, STUB_MIG_SLICE                       1 or 0; not set: not supported
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, VERSION_MISMATCH = 25 };

typedef struct { unsigned long long total, free, used; } Memory;
typedef struct { unsigned int version; unsigned long long total, reserved, free, used; } MemoryV2;
typedef struct { unsigned int pid; unsigned long long used; unsigned int gpu_instance, compute_instance; } Process;

static const char *text(const char *name, const char *fallback) {
    const char *value = getenv(name);
    return value ? value : fallback;
}
static int code(const char *name) { return atoi(text(name, "0")); }
static unsigned long long bytes(const char *name) { return strtoull(text(name, "0"), NULL, 10); }

int nvmlInitWithFlags(unsigned int flags) { (void)flags; return code("STUB_INIT"); }
int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    *device = (void *)1;
    if (code("STUB_FIND")) return code("STUB_FIND");
    return strcmp(uuid, text("STUB_OWN_UUID", "GPU-1111")) ? NOT_FOUND : SUCCESS;
}
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    *device = (void *)1;
    return strcmp(bus, text("STUB_OWN_BUS", "00000000:3B:00.0")) ? NOT_FOUND : SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned int length) {
    snprintf(version, length, "580.65.06");
    return SUCCESS;
}
int nvmlDeviceGetName(void *device, char *name, unsigned int length) {
    (void)device;
    snprintf(name, length, "Stub GPU");
    return SUCCESS;
}
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length) {
    (void)device;
    snprintf(uuid, length, "%s", text("STUB_OWN_UUID", "GPU-1111"));
    return SUCCESS;
}
int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
    (void)device;
    memory->total = bytes("STUB_TOTAL");
    memory->free = bytes("STUB_FREE");
    memory->used = memory->total - memory->free;
    return code("STUB_MEMORY");
}
int nvmlDeviceGetMemoryInfo_v2(void *device, MemoryV2 *memory) {
    (void)device;
    if (memory->version != (sizeof(MemoryV2) | 2u << 24)) return VERSION_MISMATCH;
    memory->total = bytes("STUB_TOTAL");
    memory->reserved = bytes("STUB_RESERVED");
    memory->free = bytes("STUB_FREE");
    memory->used = memory->total - memory->free - memory->reserved;
    return code(getenv("STUB_MEMORY_V2") ? "STUB_MEMORY_V2" : "STUB_MEMORY");
}
int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, Process *processes) {
    (void)device;
    if (code("STUB_PROCESSES")) return code("STUB_PROCESSES");
    char list[1024];
    unsigned int found = 0;
    snprintf(list, sizeof list, "%s", text("STUB_PIDS", ""));
    for (char *entry = strtok(list, ","); entry; entry = strtok(NULL, ",")) {
        if (processes && found < *count) {
            memset(&processes[found], 0, sizeof(Process));
            processes[found].pid = (unsigned int)atoi(entry);
            processes[found].used = (unsigned long long)strtoll(strchr(entry, ':') + 1, NULL, 10);
        }
        found++;
    }
    int too_small = found > *count;
    *count = found;
    return too_small ? INSUFFICIENT_SIZE : SUCCESS;
}

static int flag(const char *name, unsigned int *value) {
    if (!getenv(name)) return NOT_SUPPORTED;
    *value = (unsigned int)code(name);
    return SUCCESS;
}
int nvmlDeviceGetMigMode(void *device, unsigned int *current, unsigned int *pending) {
    (void)device;
    *pending = 0;
    return flag("STUB_MIG_MODE", current);
}
int nvmlDeviceIsMigDeviceHandle(void *device, unsigned int *is_slice) {
    (void)device;
    return flag("STUB_MIG_SLICE", is_slice);
}
