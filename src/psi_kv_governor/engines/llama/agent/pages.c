// The pages of a range: parking, writing and dropping them, and reading them back.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "agent.h"

bool being_written(const struct region * region, uint64_t first, uint64_t last) {
    if (!region->computing) {
        return false;
    }
    if (region->writes_all) {
        return true;
    }
    for (int32_t i = 0; i < region->n_tensors; i++) {
        const struct tensor * tensor = &region->tensors[i];
        if (tensor->base >= last || tensor->base + tensor->row_bytes * tensor->n_rows <= first) {
            continue;
        }
        if (!tensor->whole_rows) {
            return true;
        }
        for (int64_t j = 0; j < region->n_write_rows; j++) {
            const uint64_t row = tensor->base + (uint64_t) region->write_rows[j] * tensor->row_bytes;
            if (row < last && row + tensor->row_bytes > first) {
                return true;
            }
        }
    }
    return false;
}

static void refused(const char * what) {
    const int problem = errno;
    snprintf(agent.problem, sizeof(agent.problem), "%s: %s", what,
             problem == EINVAL ? "the memory is locked (mlock), or of a kind that can't be dropped" : strerror(problem));
    errno = problem;
}

// Writes pages of the file through to the disk. After an error of the disk the kernel takes the lost pages for clean, so
// that the next attempt would succeed and drop them: nothing of this file is dropped any more.
static bool written_through(struct region * region, uint64_t first, uint64_t last) {
    if (region->disk_failed) {
        errno = EIO;
    } else if (sync_file_range(region->fd, (off_t) (first - region->first), (off_t) (last - first),
                               SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) == 0 ||
               errno == ENOSYS || errno == EPERM) {
        return true;
    }
    region->disk_failed = errno == EIO;
    refused("parked pages can't be written");
    return false;  // they stay: a page that the disk refused is safe only in memory
}

// Whether pages of the range can't be dropped, found out before they are written: MADV_COLD changes nothing but the
// order in which the kernel would take them, and refuses exactly what MADV_DONTNEED refuses. Before Linux 5.4 nobody
// can tell.
static bool locked(uint64_t first, uint64_t last) {
#ifndef MADV_COLD
#define MADV_COLD 20
#endif
    static int known = -1;
    if (known < 0) {
        void * page = mmap(NULL, page_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        known       = page != MAP_FAILED && madvise(page, page_bytes(), MADV_COLD) == 0;
        if (page != MAP_FAILED) {
            (void) munmap(page, page_bytes());
        }
    }
    if (!known || madvise((void *) first, last - first, MADV_COLD) == 0 || errno != EINVAL) {
        return false;
    }
    refused("nothing is parked");
    return true;
}

// Pages of a shared file are what the file holds, whoever writes meanwhile: they can be dropped at any moment.
static uint64_t park_shared(struct region * region, uint64_t first, uint64_t last) {
    const uint64_t before = resident_of(region, first, last);
    const off_t    offset = (off_t) (first - region->first), bytes = (off_t) (last - first);
    if (!written_through(region, first, last)) {
        return 0;
    }
    if (madvise((void *) first, (size_t) bytes, MADV_DONTNEED) != 0) {
        refused("pages can't be dropped");
        return 0;
    }
    (void) posix_fadvise(region->fd, offset, bytes, POSIX_FADV_DONTNEED);
    const uint64_t after = resident_of(region, first, last);
    return before > after ? before - after : 0;
}

// Writes [first, last) to the region's file; past the page cache where `direct`. Into it page by page: the kernel keeps what
// comes in one piece as one (a large folio) and drops a part of it never, so that of a comb of 64 cells 1 % was returned.
static bool copy_out(struct region * region, uint64_t first, uint64_t last, bool direct) {
    const uint64_t most = direct ? last - first : page_bytes();
    while (first < last) {
        const off_t offset = (off_t) (first - region->first);
        const int   fd     = direct && region->direct_fd >= 0 ? region->direct_fd : region->fd;
        ssize_t     n      = pwrite(fd, (void *) first, last - first < most ? last - first : most, offset);
        if (n < 0 && fd == region->direct_fd && (errno == EINVAL || errno == EFAULT)) {
            close(region->direct_fd);
            region->direct_fd = -1;
            continue;
        }
        if (n <= 0) {
            refused(n == 0 ? "the file for parked pages takes no more" : "parked pages can't be written");
            return false;
        }
        first += (uint64_t) n;
    }
    return true;
}

// Moves anonymous pages to the file and maps them from there. Nobody may write them meanwhile. Those that are to be
// dropped have to be on the disk before.
static bool move_out(struct region * region, uint64_t first, uint64_t last, bool drop) {
    if (!copy_out(region, first, last, drop) || (drop && region->direct_fd < 0 && !written_through(region, first, last))) {
        return false;
    }
    const off_t offset = (off_t) (first - region->first);
    if (mmap((void *) first, last - first, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, region->fd,
             offset) == MAP_FAILED) {
        refused("parked pages can't be mapped (vm.max_map_count?)");
        return false;  // the old pages are still there
    }
    no_read_ahead(first, last);
    region->mapped = true;
    sigbus_install();
    memset(region->in_file + (first - region->first) / page_bytes(), 1, (last - first) / page_bytes());
    return true;
}

static uint64_t park_private(struct region * region, uint64_t first, uint64_t last, bool drop, uint64_t * written) {
    if (!have_file(region)) {
        return 0;
    }
    const size_t   page   = page_bytes();
    const uint64_t before = resident_in(first, last);
    uint64_t       entries[MAP_BATCH];
    for (uint64_t at = first; at < last;) {
        size_t n = (last - at) / page;
        n        = n > MAP_BATCH ? MAP_BATCH : n;
        if (!page_map(at, n, entries)) {
            refused("/proc/self/pagemap can't be read");
            break;
        }
        for (size_t i = 0; i < n;) {
            // Runs of a kind: anonymous and present is moved. What is swapped out stays there: to move it would take
            // memory first. A page that is in the file and was not written since is dropped as it is.
            const bool moves = (entries[i] & IN_MEMORY) && !(entries[i] & OF_FILE);
            const bool drops = !moves && !(entries[i] & IN_SWAP) && region->in_file[(at - region->first) / page + i];
            size_t     j     = i + 1;
            while (j < n && (((entries[j] & IN_MEMORY) && !(entries[j] & OF_FILE)) == moves) &&
                   ((!((entries[j] & IN_MEMORY) && !(entries[j] & OF_FILE)) && !(entries[j] & IN_SWAP) &&
                     region->in_file[(at - region->first) / page + j]) == drops)) {
                j++;
            }
            const uint64_t from = at + i * page, to = at + j * page;
            if (moves) {
                if (!space_for(to - from) || !move_out(region, from, to, drop)) {
                    goto out;
                }
                *written += to - from;
            }
            if (drop && (moves || drops)) {
                (void) madvise((void *) from, to - from, MADV_DONTNEED);
                if (moves || written_through(region, from, to)) {  // what was written behind may still be on its way
                    (void) posix_fadvise(region->fd, (off_t) (from - region->first), (off_t) (to - from), POSIX_FADV_DONTNEED);
                }
            }
            i = j;
        }
        at += n * page;
    }
out:;
    const uint64_t after = resident_in(first, last);
    return before > after ? before - after : 0;
}

uint64_t park_pages(struct region * region, uint64_t first, uint64_t last, uint64_t * written) {
    if (locked(first, last)) {
        return 0;
    }
    if (region->backing == BACKING_FILE) {
        return park_shared(region, first, last);
    }
    if (being_written(region, first, last)) {
        return 0;
    }
    const uint64_t before = *written;
    const uint64_t bytes  = park_private(region, first, last, true, written);
    agent.written_bytes += *written - before;
    return bytes;
}

void write_pages(struct region * region, uint64_t first, uint64_t last) {
    if (region->backing == BACKING_FILE) {
        (void) sync_file_range(region->fd, (off_t) (first - region->first), (off_t) (last - first), SYNC_FILE_RANGE_WRITE);
    } else if (!being_written(region, first, last) && !locked(first, last)) {
        uint64_t written = 0;
        (void) park_private(region, first, last, false, &written);
        agent.written_bytes += written;
    }
}

void expect_rows(struct region * region, int64_t from, int64_t to) {
    uint64_t at, last;
    for (int32_t t = 0; t < region->n_tensors && region->fd >= 0; t++) {
        if (!pages_of(region, &region->tensors[t], from, to, true, &at, &last)) {
            continue;
        }
        for (; at < last; at += AHEAD_BYTES) {
            const uint64_t bytes = last - at < AHEAD_BYTES ? last - at : AHEAD_BYTES;
            (void) posix_fadvise(region->fd, (off_t) (at - region->first), (off_t) bytes, POSIX_FADV_WILLNEED);
        }
    }
}

void read_pages(uint64_t first, uint64_t last) {
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
    // Read, never written: what comes back comes back clean, and the kernel can take it again.
    (void) madvise((void *) first, last - first, MADV_POPULATE_READ);
}

// A saved state: its own unlinked file, which vanishes with the mapping. It is on the disk when this returns; pages that
// are `kept` stay in the page cache besides.
bool move_to_file(uint64_t first, uint64_t last, bool kept) {
    if (!agent.place[0] || !space_for(last - first)) {
        return false;
    }
    struct region one   = {.first = first, .last = last, .fd = open_unlinked(0), .direct_fd = -1};
    bool          moved = false;
    one.in_file         = calloc((last - first) / page_bytes(), 1);
    if (one.fd < 0 || !one.in_file) {
        refused("no file can be made for a saved state");
    } else if ((moved = move_out(&one, first, last, true))) {
        if (!kept) {
            (void) posix_fadvise(one.fd, 0, (off_t) (last - first), POSIX_FADV_DONTNEED);
        }
        agent.written_bytes += last - first;
    }
    close(one.fd);
    free(one.in_file);
    return moved;
}

uint64_t drop_pages(struct region * region, uint64_t first, uint64_t last) {
    const uint64_t before = resident_of(region, first, last);
    const uint64_t bytes = last - first;
    if (region->backing == BACKING_FILE) {
        const off_t offset = (off_t) (first - region->first);
#ifndef FALLOC_FL_ZERO_RANGE
#define FALLOC_FL_ZERO_RANGE 0x10
#endif
        // Zeros without pages, and the space stays reserved.
        if (fallocate(region->fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, offset, (off_t) bytes) != 0) {
            (void) park_shared(region, first, last);
        }
    } else if (!region->mapped) {
        // Also where nothing is resident: what was swapped out is freed in the swap (zram), without reading it.
        if (madvise((void *) first, bytes, MADV_DONTNEED) != 0) {
            refused("pages can't be dropped");
        }
    } else {
        (void) mmap((void *) first, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        (void) madvise((void *) first, bytes, MADV_NOHUGEPAGE);
        memset(region->in_file + (first - region->first) / page_bytes(), 0, bytes / page_bytes());
    }
    const uint64_t after = resident_of(region, first, last);
    return before > after ? before - after : 0;
}
