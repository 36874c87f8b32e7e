// For a llama.cpp that is linked into a program and calls itself by address: of what it calls in the C library two
// functions are enough to have its caches paged on demand. A cache is a large aligned allocation that is zeroed by hand
// at once; memory fresh from the kernel is zero already, and pages that nobody touched stay where they are.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

#define LEAST_BYTES (8u << 20)  // less is zeroed in the time that looking takes
#define MAX_FRESH 64
#define IS_MAPPED 2u
#define FLAGS 7u
#define PIECE_PAGES 4096

// What malloc mapped for one allocation, and its header then: if it stands there still, so does the mapping.
struct fresh { uintptr_t at; size_t bytes; uint64_t header[2]; };

static struct fresh    fresh[MAX_FRESH];
static int             next;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static bool            able;

// malloc.c of glibc: two words before each allocation, the size and its flags in the second.
static void note(void * at, size_t bytes) {
    const uint64_t * header = (const uint64_t *) at - 2;
    const uint64_t   size   = header[1] & ~(uint64_t) FLAGS;
    if ((header[1] & FLAGS) != IS_MAPPED || size < bytes || size > bytes + 4 * page_bytes()) {
        return;
    }
    pthread_mutex_lock(&mutex);
    fresh[next] = (struct fresh){(uintptr_t) at, bytes, {header[0], header[1]}};
    next        = (next + 1) % MAX_FRESH;
    pthread_mutex_unlock(&mutex);
}

EXPORT int posix_memalign(void ** to, size_t alignment, size_t bytes) {
    static int (*real)(void **, size_t, size_t);
    if (!real) {
        real = (int (*)(void **, size_t, size_t)) agent_dlsym(RTLD_NEXT, "posix_memalign");
    }
    const int error = real(to, alignment, bytes);
    if (able && !error && bytes >= LEAST_BYTES && *to && alignment < page_bytes()) {
        note(*to, bytes);
    }
    return error;
}

static bool was_fresh(void * at, size_t bytes) {
    bool found = false;
    pthread_mutex_lock(&mutex);
    for (int i = 0; i < MAX_FRESH && !found; i++) {
        const uint64_t * header = (const uint64_t *) at - 2;
        found = fresh[i].at == (uintptr_t) at && bytes <= fresh[i].bytes && fresh[i].header[0] == header[0] &&
                fresh[i].header[1] == header[1];
    }
    pthread_mutex_unlock(&mutex);
    return found && !region_of_address((uint64_t) (uintptr_t) at);
}

static void * (*real_memset)(void *, int, size_t);

// Zeroes what is there of whole pages; a page of anonymous memory that is not there reads as zero. False: not known.
static bool zero_pages(uintptr_t first, uintptr_t last) {
    static const uint64_t there = 3ull << 62;  // present, or swapped out
    const size_t page = page_bytes();
    const int    fd   = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    uint64_t *   some = fd >= 0 ? malloc(PIECE_PAGES * sizeof(*some)) : NULL;
    bool         known = some != NULL;
    for (uintptr_t at = first; known && at < last; at += PIECE_PAGES * page) {
        const size_t n = (last - at) / page < PIECE_PAGES ? (last - at) / page : PIECE_PAGES;
        known = pread(fd, some, n * sizeof(*some), (off_t) (at / page * sizeof(*some))) == (ssize_t) (n * sizeof(*some));
        for (size_t i = 0; known && i < n; i++) {
            if (some[i] & there) {
                real_memset((void *) (at + i * page), 0, page);
            }
        }
    }
    free(some);
    if (fd >= 0) {
        close(fd);
    }
    return known;
}

EXPORT void * memset(void * to, int value, size_t bytes) {
    if (__builtin_expect(!real_memset, 0)) {
        real_memset = (void * (*)(void *, int, size_t)) agent_dlsym(RTLD_NEXT, "memset");
    }
    if (__builtin_expect(bytes < LEAST_BYTES || value != 0 || !able || !was_fresh(to, bytes), 1)) {
        return real_memset(to, value, bytes);
    }
    const uintptr_t page = page_bytes() - 1, at = (uintptr_t) to, end = at + bytes;
    const uintptr_t first = (at + page) & ~page, last = end & ~page;
    if (!zero_pages(first, last)) {
        return real_memset(to, value, bytes);
    }
    real_memset(to, 0, first - at);
    real_memset((void *) last, 0, end - last);
    return to;
}

// Only in front of glibc's own malloc: another one keeps its books elsewhere.
void libc_start(void) {
    Dl_info of_malloc, of_libc;
    void *  allocates = agent_dlsym(RTLD_NEXT, "posix_memalign");
    void *  other     = agent_dlsym(RTLD_NEXT, "gnu_get_libc_version");
    able = allocates && other && dladdr(allocates, &of_malloc) && dladdr(other, &of_libc) && of_malloc.dli_fbase == of_libc.dli_fbase;
}

void libc_after_fork(void) { pthread_mutex_init(&mutex, NULL); }
