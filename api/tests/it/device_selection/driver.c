// A libcuda.so.1 that describes the cards it is told of and computes nothing on them. DRIVER_CUDA is the version that it
// offers, 12040 for 12.4; CARD_0, CARD_1, ... are its cards, as `scan` reads them.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NO_DEVICE = 100, INVALID_DEVICE = 101 };

struct card {
    int major, minor, ecc, multiprocessors, clock_khz, memory_clock_khz, bus_bits, pci_bus;
    size_t total, free;
    char name[96];
};

static int scan(int index, struct card *card) {
    char variable[16];
    snprintf(variable, sizeof variable, "CARD_%d", index);
    const char *text = getenv(variable);
    return text && sscanf(text, "%d.%d total=%zu free=%zu ecc=%d sms=%d clock=%d memory_clock=%d bus_bits=%d pci=%x %95[^\n]",
                          &card->major, &card->minor, &card->total, &card->free, &card->ecc, &card->multiprocessors,
                          &card->clock_khz, &card->memory_clock_khz, &card->bus_bits, (unsigned *)&card->pci_bus,
                          card->name) == 11;
}

int cuDriverGetVersion(int *version) {
    *version = atoi(getenv("DRIVER_CUDA"));
    return SUCCESS;
}

int cuInit(unsigned flags) {
    struct card card;
    return flags ? INVALID_VALUE : scan(0, &card) ? SUCCESS : NO_DEVICE;
}

int cuDeviceGetCount(int *count) {
    struct card card;
    for (*count = 0; scan(*count, &card); ++*count) {
    }
    return SUCCESS;
}

int cuDeviceGet(int *device, int index) {
    struct card card;
    *device = index;
    return scan(index, &card) ? SUCCESS : INVALID_DEVICE;
}

int cuDeviceGetName(char *name, int size, int device) {
    struct card card;
    if (!scan(device, &card)) {
        return INVALID_DEVICE;
    }
    snprintf(name, size, "%s", card.name);
    return SUCCESS;
}

int cuDeviceGetUuid(unsigned char uuid[16], int device) {
    static const unsigned char first[16] = {0x5f, 0x2c, 0x4a, 0x1e, 0, 0, 0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0x44, 0x44, 0x55, 0x55};
    memcpy(uuid, first, 16);
    uuid[3] += device;
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    struct card card;
    if (!scan(device, &card)) {
        return INVALID_DEVICE;
    }
    *bytes = card.total;
    return SUCCESS;
}

// The numbers are those of CUdevice_attribute in cuda.h.
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    struct card card;
    if (!scan(device, &card)) {
        return INVALID_DEVICE;
    }
    switch (attribute) {
    case 13: *value = card.clock_khz; break;
    case 16: *value = card.multiprocessors; break;
    case 32: *value = card.ecc; break;
    case 33: *value = card.pci_bus; break;
    case 36: *value = card.memory_clock_khz; break;
    case 37: *value = card.bus_bits; break;
    case 75: *value = card.major; break;
    case 76: *value = card.minor; break;
    default: *value = 0;
    }
    return SUCCESS;
}

// A context is its device's number and one, so that it is never null.
static _Thread_local size_t current;

int cuDevicePrimaryCtxRetain(size_t *context, int device) {
    *context = device + 1;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    (void)device;
    return SUCCESS;
}

int cuCtxGetCurrent(size_t *context) {
    *context = current;
    return SUCCESS;
}

int cuCtxSetCurrent(size_t context) {
    current = context;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t *free, size_t *total) {
    struct card card;
    if (!current || !scan(current - 1, &card)) {
        return INVALID_DEVICE;
    }
    *free = card.free;
    *total = card.total;
    return SUCCESS;
}

// As far as a model's memory is counted: nothing is copied and no kernel is there.
static _Atomic size_t address = 1 << 30;

int cuMemAlloc_v2(size_t *pointer, size_t bytes) {
    size_t free, total;
    int status = cuMemGetInfo_v2(&free, &total);
    if (status) {
        return status;
    }
    if (bytes > free) {
        return OUT_OF_MEMORY;
    }
    *pointer = address += bytes;
    return SUCCESS;
}

int cuMemFree_v2(size_t pointer) {
    (void)pointer;
    return SUCCESS;
}

int cuMemHostAlloc(void **pointer, size_t bytes, unsigned flags) {
    (void)flags;
    *pointer = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return *pointer ? SUCCESS : OUT_OF_MEMORY;
}

int cuMemFreeHost(void *pointer) {
    free(pointer);
    return SUCCESS;
}

int cuStreamCreate(size_t *stream, unsigned flags) {
    (void)flags;
    *stream = 0x100;
    return SUCCESS;
}

int cuStreamSynchronize(size_t stream) {
    (void)stream;
    return SUCCESS;
}

int cuStreamDestroy_v2(size_t stream) {
    (void)stream;
    return SUCCESS;
}

int cuEventCreate(size_t *event, unsigned flags) {
    (void)flags;
    *event = 0x100;
    return SUCCESS;
}

int cuEventDestroy_v2(size_t event) {
    (void)event;
    return SUCCESS;
}
