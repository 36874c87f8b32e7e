// Which pages of a range are in memory, counted by the kernel.

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include "agent.h"

// Under a seccomp filter mincore may be death (systemd's @system-service leaves it out); the page map is a file.
static int filtered(void) {
    static int answer = -1;
    if (answer < 0) {
        char   text[8192];
        FILE * file = fopen("/proc/self/status", "re");
        size_t n    = file ? fread(text, 1, sizeof(text) - 1, file) : 0;
        text[n]     = 0;
        if (file) {
            fclose(file);
        }
        const char * line = strstr(text, "\nSeccomp:");
        answer            = !line || line[9 + strspn(line + 9, " \t")] != '0';
    }
    return answer;
}

// The page map of [first, first + n pages); false where it can't be read.
bool page_map(uint64_t first, size_t n, uint64_t * entries) {
    static int fd = -2;
    static pid_t owner;
    if (fd == -2 || owner != getpid()) {
        fd    = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
        owner = getpid();
    }
    return fd >= 0 && pread(fd, entries, n * 8, (off_t) (first / page_bytes() * 8)) == (ssize_t) (n * 8);
}

// Resident bytes of [first, last), counted by the kernel: for pages of a file those in the page cache too.
uint64_t resident_in(uint64_t first, uint64_t last) {
    const size_t page  = page_bytes();
    uint64_t     pages = 0;
    while (first < last) {
        size_t n = (last - first) / page;
        n        = n > MAP_BATCH ? MAP_BATCH : n;
        if (filtered()) {
            uint64_t entries[MAP_BATCH];
            if (page_map(first, n, entries)) {
                for (size_t i = 0; i < n; i++) {
                    pages += entries[i] >> 63;
                }
            }
        } else {
            unsigned char here[MAP_BATCH];
            if (mincore((void *) first, n * page, here) == 0) {
                for (size_t i = 0; i < n; i++) {
                    pages += here[i] & 1;
                }
            }
        }
        first += n * page;
    }
    return pages * page;
}

// The kernel's own count of a file's pages (Linux 6.5): it walks those that are there, where mincore asks for each that may
// be. False where there is none, or where asking may be death.
static bool cached_in(int fd, uint64_t offset, uint64_t bytes, uint64_t * pages) {
#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif
    static bool none = false;
    const struct { uint64_t offset, bytes; } range = {offset, bytes};
    struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } counts;
    none   = none || filtered() || syscall(SYS_cachestat, fd, &range, &counts, 0) != 0;
    *pages = none ? 0 : counts.cached;
    return !none;
}

uint64_t resident_of(const struct region * region, uint64_t first, uint64_t last) {
    uint64_t pages;
    if (region->backing == BACKING_FILE && cached_in(region->fd, first - region->first, last - first, &pages)) {
        return pages * page_bytes();
    }
    return resident_in(first, last);
}

// Bytes of [first, last) in memory or in swap, and of these the ones in swap. Nothing is looked up while no swap is used by
// anybody: the page map costs ten times what resident_in does.
uint64_t held_in(uint64_t first, uint64_t last, uint64_t * swapped) {
    struct sysinfo machine;
    uint64_t       held = 0, entries[MAP_BATCH];
    *swapped = 0;
    if (sysinfo(&machine) != 0 || machine.totalswap == machine.freeswap) {
        return 0;
    }
    while (first < last) {
        size_t n = (last - first) / page_bytes();
        n        = n > MAP_BATCH ? MAP_BATCH : n;
        if (!page_map(first, n, entries)) {
            *swapped = 0;
            return 0;
        }
        for (size_t i = 0; i < n; i++) {
            held += (entries[i] & (IN_MEMORY | IN_SWAP)) != 0;
            *swapped += (entries[i] & IN_SWAP) != 0;
        }
        first += n * page_bytes();
    }
    *swapped *= page_bytes();
    return held * page_bytes();
}
