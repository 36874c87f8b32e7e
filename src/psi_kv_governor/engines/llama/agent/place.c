// The folder where parked bytes live: its files without a name, and the space that is left.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "agent.h"

int open_unlinked(int flags) {
    int fd = open(agent.place, O_TMPFILE | O_RDWR | O_CLOEXEC | flags, 0600);
    if (fd < 0 && (errno == EOPNOTSUPP || errno == EISDIR || errno == ENOENT || errno == EINVAL)) {
        char name[sizeof(agent.place) + 32];
        snprintf(name, sizeof(name), "%s/park-XXXXXX", agent.place);
        fd = mkostemp(name, O_CLOEXEC | flags);
        if (fd >= 0) {
            unlink(name);
        }
    }
    return fd;
}

bool space_for(uint64_t bytes) {
    struct statvfs disk;
    if (statvfs(agent.place, &disk) != 0) {
        snprintf(agent.problem, sizeof(agent.problem), "%s can't be read: %s", agent.place, strerror(errno));
        return false;
    }
    const uint64_t free_bytes = (uint64_t) disk.f_bavail * disk.f_frsize;
    if (free_bytes < bytes + agent.reserve_bytes) {
        snprintf(agent.problem, sizeof(agent.problem), "%s has %llu MB free: %llu MB and the reserve of %llu MB don't fit", agent.place,
                 (unsigned long long) free_bytes / 1000000, (unsigned long long) bytes / 1000000,
                 (unsigned long long) agent.reserve_bytes / 1000000);
        return false;
    }
    if (agent.limit_bytes && agent.born_bytes + bytes > agent.limit_bytes) {
        snprintf(agent.problem, sizeof(agent.problem), "parked context may take %llu MB of %s",
                 (unsigned long long) agent.limit_bytes / 1000000, agent.place);
        return false;
    }
    return true;
}

// A touched page would bring its neighbours with it (8 MiB of them on some machines): those that were just dropped too.
// Whole ranges are read ahead by name when they are wanted.
void no_read_ahead(uint64_t first, uint64_t last) {
    (void) madvise((void *) first, last - first, MADV_RANDOM);
}

// Maps the pages to a file of their own, allocated whole, so that a full disk can't end in SIGBUS later and the first
// touch of a page costs 0.7 us and not 9.4.
bool bear_in_file(struct region * region) {
    const uint64_t bytes = region->last - region->first;
    if (!agent.place[0] || !space_for(bytes)) {
        return false;
    }
    const int fd = open_unlinked(0);
    if (fd < 0) {
        snprintf(agent.problem, sizeof(agent.problem), "no file can be made in %s: %s", agent.place, strerror(errno));
        return false;
    }
    if (fallocate(fd, 0, 0, (off_t) bytes) != 0) {
        snprintf(agent.problem, sizeof(agent.problem), "%llu MB can't be allocated in %s: %s",
                 (unsigned long long) bytes / 1000000, agent.place, strerror(errno));
        close(fd);
        return false;
    }
    void * at = mmap((void *) region->first, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
    if (at == MAP_FAILED) {
        snprintf(agent.problem, sizeof(agent.problem), "the file in %s can't be mapped: %s", agent.place, strerror(errno));
        close(fd);
        return false;
    }
    no_read_ahead(region->first, region->last);
    region->fd      = fd;
    region->mapped  = true;
    region->backing = BACKING_FILE;
    agent.born_bytes += bytes;
    sigbus_install();
    return true;
}

// The file that ranges of plain memory are moved to, made when the first is.
bool have_file(struct region * region) {
    if (region->fd >= 0) {
        return true;
    }
    if (!agent.place[0]) {
        snprintf(agent.problem, sizeof(agent.problem), "there is no place to park");
        return false;
    }
    region->fd = open_unlinked(0);
    if (region->fd < 0 || ftruncate(region->fd, (off_t) (region->last - region->first)) != 0) {
        snprintf(agent.problem, sizeof(agent.problem), "no file can be made in %s: %s", agent.place, strerror(errno));
        close(region->fd);
        region->fd = -1;
        return false;
    }
    char name[64];
    snprintf(name, sizeof(name), "/proc/self/fd/%d", region->fd);
    region->direct_fd = open(name, O_RDWR | O_CLOEXEC | O_DIRECT);  // -1 is fine: through the page cache, then
    return true;
}
