// The buffers of caches, from birth to end.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include "agent.h"

// Smaller buffers are left alone: less than a trim of the smallest model here returns.
#define LEAST_BYTES (1u << 20)

static uint64_t page_floor(uint64_t address) { return address & ~(uint64_t) (page_bytes() - 1); }
static uint64_t page_ceil(uint64_t address) { return page_floor(address + page_bytes() - 1); }

size_t page_bytes(void) {
    static size_t cached = 0;
    if (!cached) {
        cached = (size_t) sysconf(_SC_PAGESIZE);
    }
    return cached;
}

struct region * region_of_address(uint64_t address) {
    for (int i = 0; i < MAX_REGIONS; i++) {
        struct region * region = &agent.regions[i];
        if (region->alive && address >= region->base && address < region->end) {
            return region;
        }
    }
    return NULL;
}

struct region * region_of_id(uint32_t id) {
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (agent.regions[i].alive && agent.regions[i].id == id) {
            return &agent.regions[i];
        }
    }
    return NULL;
}

struct tensor * region_tensor(struct region * region, uint64_t address) {
    for (int32_t i = 0; i < region->n_tensors; i++) {
        struct tensor * tensor = &region->tensors[i];
        if (address >= tensor->base && address < tensor->base + tensor->row_bytes * tensor->n_rows) {
            return tensor;
        }
    }
    return NULL;
}

// "cache_k_l0", or with a tag before the letter; "cache_r_l0" and "cache_s_l0" are recurrent states.
static char tensor_kind(const char * name) {
    if (strncmp(name, "cache_", 6) != 0 || strchr(name, ' ')) {
        return 0;  // a view is named "cache_k_l0 (view)"
    }
    const char * layer = strstr(name, "_l");
    return layer && layer > name + 6 - 1 ? layer[-1] : 0;
}

static void note_tensors(struct region * region, struct lib * lib, struct ggml_context * context) {
    region->cells              = true;
    region->shortest_row_bytes = UINT64_MAX;
    for (struct ggml_tensor * t = lib->first_tensor(context); t; t = lib->next_tensor(context, t)) {
        const char kind = tensor_kind(t->name);
        if (t->view_src || !kind || region->n_tensors == MAX_TENSORS) {
            continue;
        }
        const uint64_t address = (uint64_t) (uintptr_t) t->data;
        if (!lib_proven(lib, t) || address < region->base || address + t->nb[3] > region->end) {
            region->cells = false;
            return;
        }
        struct tensor * tensor = &region->tensors[region->n_tensors];
        *tensor = (struct tensor){
            .identity = t, .base = address, .row_bytes = t->nb[1], .n_rows = (uint64_t) (t->ne[1] * t->ne[2]),
            .type = t->type, .keys = kind == 'k',
        };
        memcpy(tensor->name, t->name, sizeof(tensor->name) - 1);
        region->cells = region->cells && (kind == 'k' || kind == 'v');
        if (tensor->keys && region->n_rows == 0) {
            region->leader = region->n_tensors;
            region->n_rows = (int64_t) tensor->n_rows;
        }
        region->cells              = region->cells && (int64_t) tensor->n_rows == region->n_rows;
        region->cell_bytes        += tensor->row_bytes;
        region->shortest_row_bytes = tensor->row_bytes < region->shortest_row_bytes ? tensor->row_bytes : region->shortest_row_bytes;
        region->n_tensors++;
    }
    region->cells = region->cells && region->n_rows > 0;
}

static void forget(struct region * region) {
    region->alive = false;
    close(region->fd);  // -1 is refused, and harmless
    close(region->direct_fd);
    for (int i = 0; i < region->n_sequences; i++) {
        free(region->sequences[i].rows);
    }
    sampler_free(region->sampler);
    free(region->tensors);
    free(region->pos);
    free(region->flags);
    free(region->in_file);
    free(region->write_rows);
    memset(region, 0, sizeof(*region));
    region->fd = region->direct_fd = -1;
}

// A buffer with the tensors of a cache was allocated. Knows it from now on, as plain memory.
void region_born(struct lib * lib, ggml_backend_buffer_t buffer, struct ggml_context * context) {
    if (!buffer || !lib->first_tensor || !lib->next_tensor || !lib->buffer_base || !lib->buffer_size ||
        !lib->buffer_name || lib->buffer_size(buffer) < LEAST_BYTES || strcmp(lib->buffer_name(buffer), "CPU") != 0) {
        return;  // only plain host memory: a device's buffer may look like memory, and must never be mapped over
    }
    const struct ggml_tensor * one = lib->first_tensor(context);
    if (!one || !tensor_kind(one->name)) {
        return;
    }
    pthread_mutex_lock(&agent.lock);
    struct region * region = NULL;
    for (int i = 0; i < MAX_REGIONS && !region; i++) {
        region = agent.regions[i].alive ? NULL : &agent.regions[i];
    }
    if (region) {
        memset(region, 0, sizeof(*region));
        region->fd = region->direct_fd = -1;
        region->buffer  = buffer;
        region->lib     = lib;
        region->tensors = calloc(MAX_TENSORS, sizeof(*region->tensors));
        region->base    = (uint64_t) (uintptr_t) lib->buffer_base(buffer);
        region->end     = region->base + lib->buffer_size(buffer);
        region->first   = page_ceil(region->base);
        region->last    = page_floor(region->end);
        if (region->tensors && region->first < region->last) {
            note_tensors(region, lib, context);
            region->pos     = region->cells ? malloc((size_t) region->n_rows * sizeof(int32_t)) : NULL;
            region->flags   = region->cells ? calloc((size_t) region->n_rows, 1) : NULL;
            region->in_file = calloc((region->last - region->first) / page_bytes(), 1);
            region->cells   = region->cells && region->pos && region->flags;
            for (int64_t i = 0; region->cells && i < region->n_rows; i++) {
                region->pos[i] = -1;
            }
            strcpy(region->why_no_mask, "no graph with flash attention has run yet");
            region->id    = ++agent.next_id;
            region->alive = region->in_file != NULL;
        }
        if (!region->alive) {
            forget(region);
        }
    }
    const bool known = region && region->alive;
    pthread_mutex_unlock(&agent.lock);
    if (known) {
        socket_start();
    }
}

// ---- files ------------------------------------------------------------------------------------------------

static int open_unlinked(int flags) {
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

static bool space_for(uint64_t bytes) {
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
static void no_read_ahead(uint64_t first, uint64_t last) {
    (void) madvise((void *) first, last - first, MADV_RANDOM);
}

// Maps the pages to a file of their own, allocated whole, so that a full disk can't end in SIGBUS later and the first
// touch of a page costs 0.7 us and not 9.4.
static bool bear_in_file(struct region * region) {
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
static bool have_file(struct region * region) {
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

// ---- birth and end of the buffer ----------------------------------------------------------------------------

// llama.cpp zeroes a new cache by hand, which makes all of it resident. Fresh pages are zeros as well.
bool region_clear(ggml_backend_buffer_t buffer) {
    bool done = false;
    pthread_mutex_lock(&agent.lock);
    for (int i = 0; i < MAX_REGIONS; i++) {
        struct region * region = &agent.regions[i];
        if (!region->alive || region->buffer != buffer) {
            continue;
        }
        const uint64_t bytes = region->last - region->first;
        const bool     born  = region->map_generation > 0;
        if (born) {  // llama_memory_clear: not its birth
            done = drop_pages(region, region->first, region->last) > 0 || resident_in(region->first, region->last) == 0;
        } else {
            // A huge page would make 2 MiB resident for one row, and a part of it can't be returned.
            (void) madvise((void *) region->first, bytes, MADV_NOHUGEPAGE);
            done = (agent.want_backing == BACKING_FILE && bear_in_file(region)) ||
                   madvise((void *) region->first, bytes, MADV_DONTNEED) == 0;
            region->map_generation = 1;
        }
        if (done) {
            memset((void *) region->base, 0, region->first - region->base);
            memset((void *) region->last, 0, region->end - region->last);
        }
        break;
    }
    pthread_mutex_unlock(&agent.lock);
    return done;
}

// The allocator gets back what it gave: plain memory, whatever it does with it next.
void region_gone(ggml_backend_buffer_t buffer) {
    pthread_mutex_lock(&serving);
    pthread_mutex_lock(&agent.lock);
    for (int i = 0; i < MAX_REGIONS; i++) {
        struct region * region = &agent.regions[i];
        if (!region->alive || region->buffer != buffer) {
            continue;
        }
        const uint64_t bytes = region->last - region->first;
        if (region->mapped) {
            (void) mmap((void *) region->first, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        }
        if (region->backing == BACKING_FILE) {
            agent.born_bytes -= bytes;
        }
        forget(region);
    }
    pthread_mutex_unlock(&agent.lock);
    pthread_mutex_unlock(&serving);
}

// ---- residence ------------------------------------------------------------------------------------------------

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

#define MAP_BATCH 4096
#define IN_MEMORY (1ull << 63)
#define IN_SWAP   (1ull << 62)
#define OF_FILE   (1ull << 61)

// The page map of [first, first + n pages); false where it can't be read.
static bool page_map(uint64_t first, size_t n, uint64_t * entries) {
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
    snprintf(agent.problem, sizeof(agent.problem), "%s: %s", what,
             errno == EINVAL ? "the memory is locked (mlock), or of a kind that can't be dropped" : strerror(errno));
}

// Pages of a shared file are what the file holds, whoever writes meanwhile: they can be dropped at any moment.
static uint64_t park_shared(struct region * region, uint64_t first, uint64_t last) {
    const uint64_t before = resident_in(first, last);
    const off_t    offset = (off_t) (first - region->first), bytes = (off_t) (last - first);
    if (sync_file_range(region->fd, offset, bytes,
                        SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER) != 0 &&
        errno != ENOSYS && errno != EPERM) {
        refused("parked pages can't be written");
        return 0;  // they stay: a page that the disk refused is safe only in memory
    }
    if (madvise((void *) first, (size_t) bytes, MADV_DONTNEED) != 0) {
        refused("pages can't be dropped");
        return 0;
    }
    (void) posix_fadvise(region->fd, offset, bytes, POSIX_FADV_DONTNEED);
    const uint64_t after = resident_in(first, last);
    return before > after ? before - after : 0;
}

// Writes [first, last) to the region's file; past the page cache where `direct`.
static bool copy_out(struct region * region, uint64_t first, uint64_t last, bool direct) {
    while (first < last) {
        const off_t offset = (off_t) (first - region->first);
        const int   fd     = direct && region->direct_fd >= 0 ? region->direct_fd : region->fd;
        ssize_t     n      = pwrite(fd, (void *) first, last - first, offset);
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

// Moves anonymous pages to the file and maps them from there. Nobody may write them meanwhile.
static bool move_out(struct region * region, uint64_t first, uint64_t last, bool direct) {
    if (!copy_out(region, first, last, direct)) {
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
                if (region->direct_fd < 0) {
                    (void) sync_file_range(region->fd, (off_t) (from - region->first), (off_t) (to - from),
                                           SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
                }
                (void) posix_fadvise(region->fd, (off_t) (from - region->first), (off_t) (to - from), POSIX_FADV_DONTNEED);
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
    } else if (!being_written(region, first, last)) {
        uint64_t written = 0;
        (void) park_private(region, first, last, false, &written);
        agent.written_bytes += written;
    }
}

void expect_pages(struct region * region, uint64_t first, uint64_t last) {
    if (region->fd >= 0) {
        (void) posix_fadvise(region->fd, (off_t) (first - region->first), (off_t) (last - first), POSIX_FADV_WILLNEED);
    }
}

uint64_t unpark_pages(struct region * region, uint64_t first, uint64_t last) {
    const uint64_t before = resident_in(first, last);
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif
    expect_pages(region, first, last);
    // Read, never written: what comes back comes back clean, and the kernel can take it again.
    (void) madvise((void *) first, last - first, MADV_POPULATE_READ);
    const uint64_t after = resident_in(first, last);
    return after > before ? after - before : 0;
}

// A saved state: its own unlinked file, which vanishes with the mapping.
uint64_t move_to_file(uint64_t first, uint64_t last) {
    if (!agent.place[0] || !space_for(last - first)) {
        return 0;
    }
    const uint64_t before = resident_in(first, last);
    struct region  one    = {.first = first, .last = last, .fd = open_unlinked(0), .direct_fd = -1};
    one.in_file           = calloc((last - first) / page_bytes(), 1);
    if (one.fd < 0 || !one.in_file) {
        refused("no file can be made for a saved state");
    } else if (move_out(&one, first, last, false)) {
        (void) sync_file_range(one.fd, 0, (off_t) (last - first), SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
        (void) posix_fadvise(one.fd, 0, (off_t) (last - first), POSIX_FADV_DONTNEED);
        agent.written_bytes += last - first;
    }
    close(one.fd);
    free(one.in_file);
    const uint64_t after = resident_in(first, last);
    return before > after ? before - after : 0;
}

uint64_t drop_pages(struct region * region, uint64_t first, uint64_t last) {
    const uint64_t before = resident_in(first, last);
    if (before == 0 && !region->mapped) {
        return 0;
    }
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
        if (madvise((void *) first, bytes, MADV_DONTNEED) != 0) {
            refused("pages can't be dropped");
        }
    } else {
        (void) mmap((void *) first, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
        (void) madvise((void *) first, bytes, MADV_NOHUGEPAGE);
        memset(region->in_file + (first - region->first) / page_bytes(), 0, bytes / page_bytes());
    }
    const uint64_t after = resident_in(first, last);
    return before > after ? before - after : 0;
}

// ---- forks ------------------------------------------------------------------------------------------------------

// A mapping of a shared file would let parent and child see each other's writes. Both go on with a private view of the
// file as it is at the fork, which nobody writes any more: what each writes later is its own, as with plain memory.
void regions_after_fork(bool child) {
    for (int i = 0; i < MAX_REGIONS; i++) {
        struct region * region = &agent.regions[i];
        if (!region->alive) {
            continue;
        }
        if (region->backing == BACKING_FILE) {
            (void) mmap((void *) region->first, region->last - region->first, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE, region->fd, 0);
            memset(region->in_file, 1, (region->last - region->first) / page_bytes());
        }
        // Later parking goes to a new file; the mappings keep the old one alive.
        region->backing = BACKING_MEMORY;
        close(region->fd);
        close(region->direct_fd);
        region->fd = region->direct_fd = -1;
        if (child) {
            region->computing = false;
        }
    }
    agent.forked = agent.forked || child;
}
