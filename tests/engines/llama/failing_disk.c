// Stands before the C library: what PSIKV_TEST_FAILS names fails as on a file system or a disk that can't do it.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(const char * what, int with) {
    const char * named = getenv("PSIKV_TEST_FAILS");
    if (named && strstr(named, what)) {
        errno = with;
        return 1;
    }
    return 0;
}

int open(const char * path, int flags, ...) {
    static int (*real)(const char *, int, ...);
    va_list more;
    va_start(more, flags);
    const int mode = va_arg(more, int);
    va_end(more);
    real = real ? real : (int (*)(const char *, int, ...)) dlsym(RTLD_NEXT, "open");
    if ((flags & O_TMPFILE) == O_TMPFILE && fails("O_TMPFILE", EOPNOTSUPP)) {
        return -1;
    }
    if ((flags & O_DIRECT) && fails("O_DIRECT", EINVAL)) {
        return -1;
    }
    return real(path, flags, mode);
}

int fallocate(int fd, int mode, off_t offset, off_t length) {
    static int (*real)(int, int, off_t, off_t);
    real = real ? real : (int (*)(int, int, off_t, off_t)) dlsym(RTLD_NEXT, "fallocate");
    if (fails("allocation", EOPNOTSUPP) || (mode && fails("hole", EOPNOTSUPP)) || fails("space", ENOSPC)) {
        return -1;
    }
    return real(fd, mode, offset, length);
}

ssize_t pwrite(int fd, const void * from, size_t n, off_t offset) {
    static ssize_t (*real)(int, const void *, size_t, off_t);
    real = real ? real : (ssize_t (*)(int, const void *, size_t, off_t)) dlsym(RTLD_NEXT, "pwrite");
    if (fails("write", EIO) || fails("space", ENOSPC)) {
        return -1;
    }
    return real(fd, from, n, offset);
}

int sync_file_range(int fd, off64_t offset, off64_t n, unsigned flags) {
    static int (*real)(int, off64_t, off64_t, unsigned);
    real = real ? real : (int (*)(int, off64_t, off64_t, unsigned)) dlsym(RTLD_NEXT, "sync_file_range");
    if (fails("write", EIO) || fails("through", EIO)) {
        return -1;
    }
    return real(fd, offset, n, flags);
}
