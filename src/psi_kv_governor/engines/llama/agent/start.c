// The beginning: where caches are born and parked, and what a fork leaves of us.

#define _GNU_SOURCE
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "blobs.h"

struct agent agent = {.lock = PTHREAD_MUTEX_INITIALIZER, .graph_over = PTHREAD_COND_INITIALIZER};

void real_set_primary(const char * path);

void agent_say(const char * format, ...) {
    char    text[512];
    va_list arguments;
    va_start(arguments, format);
    const int n = vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    if (n > 0) {
        dprintf(2, "psi-kv: %s\n", text);
    }
}

double agent_now_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double) now.tv_sec + (double) now.tv_nsec * 1e-9;
}

static __thread bool held_for_fork;

static void before_fork(void) {
    // Whole micro-batches, unless the fork comes from inside of one: then the child's copy of that context is half a
    // decode, as without us.
    held_for_fork = !gate_inside() && gate_take(true, 0.5);
    pthread_mutex_lock(&agent.lock);
}

static void after_fork_in_parent(void) {
    regions_after_fork(false);
    pthread_mutex_unlock(&agent.lock);
    if (held_for_fork) {
        gate_give();
    }
}

static void after_fork_in_child(void) {
    regions_after_fork(true);
    pthread_mutex_init(&agent.lock, NULL);
    pthread_cond_init(&agent.graph_over, NULL);
    pthread_mutex_init(&serving, NULL);
    blobs_after_fork();
    pthread_mutex_init(&lib_lock, NULL);
    socket_after_fork();
    gate_after_fork();
    libc_after_fork();
    batch_after_fork();
}

EXPORT void psikv_configure(const char * place, int32_t backing, uint64_t reserve_bytes, uint64_t limit_bytes, const char * library) {
    pthread_mutex_lock(&agent.lock);
    snprintf(agent.place, sizeof(agent.place), "%s", place ? place : "");
    agent.want_backing  = backing;
    agent.reserve_bytes = reserve_bytes;
    agent.limit_bytes   = limit_bytes;
    pthread_mutex_unlock(&agent.lock);
    if (library && library[0]) {
        real_set_primary(library);
    }
}

__attribute__((constructor)) static void begin(void) {
    (void) pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    if (getenv("PSIKV_SOCKET")) {  // under `psi-kv exec`
        libc_start();
        const char * place   = getenv("PSIKV_PLACE");
        const char * backing = getenv("PSIKV_BACKING");
        const char * reserve = getenv("PSIKV_RESERVE_BYTES");
        const char * limit   = getenv("PSIKV_LIMIT_BYTES");
        psikv_configure(place, backing && !strcmp(backing, "file") ? BACKING_FILE : BACKING_MEMORY,
                        reserve ? strtoull(reserve, NULL, 10) : 0, limit ? strtoull(limit, NULL, 10) : 0, NULL);
    }
}
