// The buffers of caches, from birth to end: where each lies, what of it are keys and values, and which file it is born in.

#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "recall.h"

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

struct region * region_of_memory(llama_memory_t memory, const struct region * after) {
    for (int i = after ? (int) (after - agent.regions) + 1 : 0; i < MAX_REGIONS; i++) {
        struct region * region = &agent.regions[i];
        if (region->alive && region->cells && region->ctx && region->lib->get_memory(region->ctx) == memory) {
            return region;
        }
    }
    return NULL;
}

struct region * region_of_buffer(ggml_backend_buffer_t buffer) {
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (agent.regions[i].alive && agent.regions[i].buffer == buffer) {
            return &agent.regions[i];
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

bool pages_of(const struct region * region, const struct tensor * tensor, int64_t from, int64_t to, bool outward,
              uint64_t * first, uint64_t * last) {
    const uint64_t page = page_bytes() - 1;
    const uint64_t a = tensor->base + (uint64_t) from * tensor->row_bytes, b = tensor->base + (uint64_t) to * tensor->row_bytes;
    *first = outward ? a & ~page : (a + page) & ~page;
    *last  = outward ? (b + page) & ~page : b & ~page;
    *first = *first < region->first ? region->first : *first;
    *last  = *last > region->last ? region->last : *last;
    return tensor->whole_rows && *first < *last;
}

// "cache_k_l0", or with a tag before the letter; "cache_r_l0" and "cache_s_l0" are recurrent states.
char tensor_kind(const char * name) {
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
            region->stream_rows = t->ne[1];
        }
        region->cells              = region->cells && (int64_t) tensor->n_rows == region->n_rows;
        region->cell_bytes        += tensor->row_bytes;
        region->shortest_row_bytes = tensor->row_bytes < region->shortest_row_bytes ? tensor->row_bytes : region->shortest_row_bytes;
        region->n_tensors++;
    }
    region->cells = region->cells && region->n_rows > 0 && region->stream_rows > 0;
}

static void forget(struct region * region) {
    region->alive = false;
    agent.region_changes++;
    close(region->fd);  // -1 is refused, and harmless
    close(region->direct_fd);
    for (int i = 0; i < region->n_sequences; i++) {
        free(region->sequences[i].rows);
        free(region->sequences[i].lost);
    }
    sampler_free(region->sampler);
    recall_free(region->recall);
    free(region->tensors);
    free(region->pos);
    free(region->flags);
    free(region->reached);
    free(region->in_file);
    free(region->write_rows);
    memset(region, 0, sizeof(*region));
    region->fd = region->direct_fd = -1;
}

// A buffer with the tensors of a cache was allocated. Knows it from now on, as plain memory.
void region_born(struct lib * lib, ggml_backend_buffer_t buffer, struct ggml_context * context) {
    if (!buffer || !lib->first_tensor || !lib->next_tensor || !lib->buffer_base || !lib->buffer_size || !lib->buffer_name) {
        return;
    }
    pthread_mutex_lock(&agent.lock);
    const bool counts = buffer_born(lib, buffer, context) && lib->buffer_size(buffer) >= LEAST_BYTES;
    pthread_mutex_unlock(&agent.lock);
    if (!counts) {
        return;
    }
    if (strcmp(lib->buffer_name(buffer), "CPU") != 0) {
        socket_start();  // its saved states are in host memory
        return;          // only plain host memory: a device's buffer may look like memory, and must never be mapped over
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
            region->reached = region->cells ? calloc((size_t) (region->n_rows / region->stream_rows), sizeof(int64_t)) : NULL;
            region->in_file = calloc((region->last - region->first) / page_bytes(), 1);
            region->cells   = region->cells && region->pos && region->flags && region->reached;
            rows_reached(region, -1);
            for (int64_t i = 0; region->cells && i < region->n_rows; i++) {
                region->pos[i] = -1;
            }
            strcpy(region->why_no_mask, "no graph with flash attention has run yet");
            region->id    = ++agent.next_id;
            region->alive = region->in_file != NULL;
            agent.region_changes++;
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

// ---- birth and end of the buffer ----------------------------------------------------------------------------

// llama.cpp zeroes a new cache by hand, which makes all of it resident. Fresh pages are zeros as well.
bool region_clear(ggml_backend_buffer_t buffer) {
    bool done = false;
    pthread_mutex_lock(&agent.lock);
    struct region * region = region_of_buffer(buffer);
    if (region && region->map_generation > 0) {  // llama_memory_clear: not its birth
        done = drop_pages(region, region->first, region->last) > 0 || resident_of(region, region->first, region->last) == 0;
    } else if (region) {
        const uint64_t bytes = region->last - region->first;
        // A huge page would make 2 MiB resident for one row, and a part of it can't be returned.
        (void) madvise((void *) region->first, bytes, MADV_NOHUGEPAGE);
        done = (agent.want_backing == BACKING_FILE && bear_in_file(region)) ||
               madvise((void *) region->first, bytes, MADV_DONTNEED) == 0;
        region->map_generation = 1;
    }
    if (done) {
        memset((void *) region->base, 0, region->first - region->base);
        memset((void *) region->last, 0, region->end - region->last);
        rows_dropped(region);
    }
    pthread_mutex_unlock(&agent.lock);
    return done;
}

// The allocator gets back what it gave: plain memory, whatever it does with it next.
void region_gone(ggml_backend_buffer_t buffer) {
    pthread_mutex_lock(&agent.lock);
    buffer_gone(buffer);
    const bool ours = region_of_buffer(buffer) != NULL;
    pthread_mutex_unlock(&agent.lock);
    if (!ours) {
        return;  // a buffer of something else waits for nobody
    }
    pthread_mutex_lock(&serving);
    pthread_mutex_lock(&agent.lock);
    struct region * region = region_of_buffer(buffer);
    if (region) {
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
        region->disk_failed = false;
        if (child) {
            region->computing = region->asked = false;
        }
    }
    agent.forked = agent.forked || child;
}
