// Preloaded into the unchanged binary by device_selection.rs: what it reads of the bus and of the kernel's driver comes from
// the directory MACHINE, and not from the machine that the tests run on.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *placed(const char *path, char buffer[PATH_MAX]) {
    const char *machine = getenv("MACHINE");
    int ours = !strncmp(path, "/sys/bus/pci/", 13) || !strncmp(path, "/proc/driver/nvidia/", 20);
    if (!machine || !ours) {
        return path;
    }
    snprintf(buffer, PATH_MAX, "%s%s", machine, path);
    return buffer;
}

int open64(const char *path, int flags, ...) {
    char buffer[PATH_MAX];
    va_list rest;
    va_start(rest, flags);
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
    va_end(rest);
    int (*real)(const char *, int, mode_t) = (int (*)(const char *, int, mode_t))dlsym(RTLD_NEXT, "open64");
    return real(placed(path, buffer), flags, mode);
}

DIR *opendir(const char *path) {
    char buffer[PATH_MAX];
    DIR *(*real)(const char *) = (DIR * (*)(const char *)) dlsym(RTLD_NEXT, "opendir");
    return real(placed(path, buffer));
}
