/* A fault of a kernel in a program that has none: loaded into it by LD_PRELOAD, this waits for the file that FAULT_TRIGGER
 * names, then launches a kernel in the primary context of device 0, which its whole process shares. FAULT_KIND says what the
 * kernel does: trap, or address (a write to address 0). The driver's functions are declared here, so that no toolkit is needed. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HEAD ".version 6.0\n.target sm_52\n.address_size 64\n.visible .entry fault()\n{\n"
static const char TRAP[] = HEAD "trap;\nret;\n}\n";
static const char ADDRESS[] = HEAD ".reg .u64 %a;\nmov.u64 %a, 0;\nst.global.u32 [%a], 1;\nret;\n}\n";

static void *driver;

static void *function(const char *name) {
    void *found = dlsym(driver, name);
    if (!found) fprintf(stderr, "fault: the driver has no %s\n", name);
    return found;
}

static void check(int result, const char *call) {
    if (result != 0) fprintf(stderr, "fault: %s: %d\n", call, result);
}

static void *wait_and_fault(void *trigger) {
    while (access(trigger, F_OK) != 0) usleep(1000);
    driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) return NULL;
    int (*retain)(void **, int), (*set)(void *), (*load)(void **, const void *), (*get)(void **, void *, const char *);
    int (*launch)(void *, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void *, void **, void **);
    *(void **)&retain = function("cuDevicePrimaryCtxRetain");
    *(void **)&set = function("cuCtxSetCurrent");
    *(void **)&load = function("cuModuleLoadData");
    *(void **)&get = function("cuModuleGetFunction");
    *(void **)&launch = function("cuLaunchKernel");
    void *context = NULL, *module = NULL, *kernel = NULL;
    const char *kind = getenv("FAULT_KIND");
    check(retain(&context, 0), "cuDevicePrimaryCtxRetain");
    check(set(context), "cuCtxSetCurrent");
    check(load(&module, kind && strcmp(kind, "address") == 0 ? ADDRESS : TRAP), "cuModuleLoadData");
    check(get(&kernel, module, "fault"), "cuModuleGetFunction");
    check(launch(kernel, 1, 1, 1, 1, 1, 1, 0, NULL, NULL, NULL), "cuLaunchKernel");
    fprintf(stderr, "fault: launched\n");
    return NULL;
}

__attribute__((constructor)) static void start(void) {
    const char *trigger = getenv("FAULT_TRIGGER");
    pthread_t thread;
    if (trigger && pthread_create(&thread, NULL, wait_and_fault, (void *)trigger) == 0) pthread_detach(thread);
}
