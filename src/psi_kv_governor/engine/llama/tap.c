// The native part: sees where llama.cpp keeps the rows of its KV cache, and returns the pages of rows nobody
// uses. Compiled on first use against the ggml headers that came with the installed library, so that
// `struct ggml_tensor` below is exactly the library's.
//
// It allocates nothing after psikv_tap_reserve(), and calls nothing in ggml but what it looks up at run time
// (llama-cpp-python loads the library with RTLD_LOCAL, so there is nothing to link against).

#define _GNU_SOURCE
#include <dlfcn.h>
#if defined(__APPLE__)
#include <mach-o/dyld.h>
#else
#include <link.h>
#endif
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "tap.h"

// ---- what is looked up in libggml-base ------------------------------------------------------------------

// By what is loaded and not by a path: a wheel may hold the same library under several names, as copies.
#if defined(__APPLE__)
static void * base_library(void) {
    for (uint32_t i = 0; i < _dyld_image_count(); i++) {
        const char * name = _dyld_get_image_name(i);
        if (name && strstr(name, "libggml-base.")) {
            return dlopen(name, RTLD_LAZY | RTLD_NOLOAD);
        }
    }
    return NULL;
}
#else
static int find_base_library(struct dl_phdr_info * info, size_t size, void * found) {
    (void) size;
    if (info->dlpi_name && strstr(info->dlpi_name, "libggml-base.")) {
        *(void **) found = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    }
    return *(void **) found != NULL;
}

static void * base_library(void) {
    void * library = NULL;
    dl_iterate_phdr(find_base_library, &library);
    return library;
}
#endif

static void * ggml_symbol(const char * name) {
    static void * library = NULL;
    if (!library) {
        library = base_library();
    }
    return library ? dlsym(library, name) : NULL;
}

static size_t page_bytes(void) {
    static size_t cached = 0;
    if (!cached) {
        cached = (size_t) sysconf(_SC_PAGESIZE);
    }
    return cached;
}

static uintptr_t page_floor(uintptr_t address) { return address & ~(uintptr_t) (page_bytes() - 1); }
static uintptr_t page_ceil(uintptr_t address) { return page_floor(address + page_bytes() - 1); }

// Gives whole pages back; they read as zeros when they are touched again. 0 when it worked.
static int drop_pages(uintptr_t first, uintptr_t last) {
#if defined(__linux__)
    return madvise((void *) first, last - first, MADV_DONTNEED);
#else
    // Elsewhere MADV_DONTNEED is a hint that frees nothing, and MADV_FREE frees when it suits the kernel. Fresh
    // pages mapped over the old ones free them at once.
    const int flags = MAP_PRIVATE | MAP_ANON | MAP_FIXED;
    return mmap((void *) first, last - first, PROT_READ | PROT_WRITE, flags, -1, 0) == MAP_FAILED ? -1 : 0;
#endif
}

// A huge page would make 2 MiB resident for one row, and a part of it can't be returned.
static void keep_pages_small(uintptr_t first, uintptr_t last) {
#if defined(MADV_NOHUGEPAGE)
    (void) madvise((void *) first, last - first, MADV_NOHUGEPAGE);
#else
    (void) first;
    (void) last;
#endif
}

// ---- the cache is demand-paged from its first moment ----------------------------------------------------

// Below this a buffer is not worth a system call.
#define CLEAR_MIN_BYTES (1u << 20)

static uint64_t demand_paged_bytes = 0;

// Bytes of buffers that were handed over unpopulated so far: tells whether the function below is in force.
EXPORT uint64_t psikv_demand_paged_bytes(void) { return demand_paged_bytes; }

// Stands before libggml-base's own function when this library is loaded first and RTLD_GLOBAL. Zeroing by
// hand makes every page of a new cache resident; dropping the pages gives the same zeros without memory.
EXPORT void ggml_backend_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    static void (*real_clear)(ggml_backend_buffer_t, uint8_t);
    static void * (*get_base)(ggml_backend_buffer_t);
    static size_t (*get_size)(ggml_backend_buffer_t);
    static const char * (*get_name)(ggml_backend_buffer_t);
    if (!real_clear) {
        get_base   = (void * (*) (ggml_backend_buffer_t)) ggml_symbol("ggml_backend_buffer_get_base");
        get_size   = (size_t (*)(ggml_backend_buffer_t)) ggml_symbol("ggml_backend_buffer_get_size");
        get_name   = (const char * (*) (ggml_backend_buffer_t)) ggml_symbol("ggml_backend_buffer_name");
        real_clear = (void (*)(ggml_backend_buffer_t, uint8_t)) ggml_symbol("ggml_backend_buffer_clear");
    }
    if (!real_clear || !get_base || !get_size || !get_name) {
        abort();  // the library that called us has these symbols; without them nothing would be cleared
    }
    // Only plain host memory: a pinned or mapped buffer of another backend must not be dropped.
    if (value != 0 || get_size(buffer) < CLEAR_MIN_BYTES || strcmp(get_name(buffer), "CPU") != 0) {
        real_clear(buffer, value);
        return;
    }
    char *    base  = get_base(buffer);
    char *    end   = base + get_size(buffer);
    uintptr_t first = page_ceil((uintptr_t) base);
    uintptr_t last  = page_floor((uintptr_t) end);
    keep_pages_small(first, last);
    if (drop_pages(first, last) != 0) {
        real_clear(buffer, value);  // locked memory
        return;
    }
    memset(base, 0, first - (uintptr_t) base);
    memset((char *) last, 0, (uintptr_t) end - last);
    demand_paged_bytes += last - first;
}

// ---- the tap: rows and cells from the public graph ------------------------------------------------------

EXPORT struct psikv_tap * psikv_tap_new(void) {
    struct psikv_tap * tap = calloc(1, sizeof(*tap));
    if (tap) {
        tap->learning = true;
    }
    return tap;
}

// For `llama_context_params.abort_callback`, which is asked before each node of a graph on the CPU.
EXPORT bool psikv_tap_abort(void * user_data) {
    const struct psikv_tap * tap = user_data;
    return __atomic_load_n(&tap->interrupt, __ATOMIC_RELAXED) && tap->interruptible;
}

// Room for as many cell indices, so that the log never grows while a graph runs. 0 when there is no memory.
EXPORT int32_t psikv_tap_reserve(struct psikv_tap * tap, int64_t log_capacity) {
    int64_t * log = realloc(tap->log, (size_t) log_capacity * sizeof(int64_t));
    if (!log) {
        return 0;
    }
    tap->log          = log;
    tap->log_capacity = log_capacity;
    return 1;
}

EXPORT void psikv_tap_free(struct psikv_tap * tap) {
    if (tap) {
        psikv_sampler_free(tap->sampler);
        free(tap->log);
        free(tap);
    }
}

EXPORT int32_t psikv_tap_n_tensors(const struct psikv_tap * tap) { return tap->n_tensors; }
EXPORT const struct psikv_tensor * psikv_tap_tensor(const struct psikv_tap * tap, int32_t i) { return &tap->tensors[i]; }

// The cells of tensor `i` are logged from now on. All tensors are known by now.
EXPORT void psikv_tap_lead(struct psikv_tap * tap, int32_t i) {
    tap->leader   = i;
    tap->learning = false;
}

EXPORT const int64_t * psikv_tap_log(const struct psikv_tap * tap) { return tap->log; }

bool psikv_tap_is_host(struct psikv_tap * tap, ggml_backend_buffer_t buffer) {
    if (!tap->is_host) {
        tap->is_host = (bool (*)(ggml_backend_buffer_t)) ggml_symbol("ggml_backend_buffer_is_host");
    }
    return buffer && tap->is_host && tap->is_host(buffer);
}

struct psikv_tensor * psikv_tap_find(struct psikv_tap * tap, const struct ggml_tensor * view) {
    const struct ggml_tensor * cache = view->view_src ? view->view_src : view;
    for (int32_t i = 0; i < tap->n_tensors; i++) {
        if (tap->identity[i] == cache) {
            return &tap->tensors[i];
        }
    }
    return NULL;
}

// Values of one head in a row: the new rows come as a view of [head_dim, n_head, n_tokens].
static int32_t head_dim_of(const struct ggml_tensor * node) {
    const struct ggml_tensor * rows  = node->src[0];
    const struct ggml_tensor * heads = rows->op == GGML_OP_VIEW ? rows->src[0] : NULL;
    return heads && heads->ne[0] * heads->ne[1] == rows->ne[0] ? (int32_t) heads->ne[0] : 0;
}

static int32_t enter_tensor(struct psikv_tap * tap, const struct ggml_tensor * node) {
    const struct ggml_tensor * cache = node->view_src ? node->view_src : node;
    for (int32_t i = 0; i < tap->n_tensors; i++) {
        if (tap->identity[i] == cache) {
            return i;
        }
    }
    if (tap->n_tensors == MAX_TENSORS) {
        tap->problem = 2;
        return -1;
    }
    struct psikv_tensor * entry = &tap->tensors[tap->n_tensors];
    memcpy(entry->name, cache->name, GGML_MAX_NAME);
    entry->base       = (uint64_t) (uintptr_t) cache->data;
    entry->row_bytes  = cache->nb[1];
    entry->rows       = (uint64_t) cache->ne[1];
    entry->type       = (int32_t) cache->type;
    entry->host       = psikv_tap_is_host(tap, cache->buffer);
    entry->contiguous = node->ne[0] == cache->ne[0];
    entry->head_dim   = head_dim_of(node);
    tap->identity[tap->n_tensors] = cache;
    return tap->n_tensors++;
}

static void log_cells(struct psikv_tap * tap, const struct ggml_tensor * index) {
    if (!index || !psikv_tap_is_host(tap, index->buffer)) {
        tap->problem = 1;
        return;
    }
    const int64_t n = index->ne[0];
    if (tap->log_count + n > tap->log_capacity) {
        tap->problem = 2;
        return;
    }
    int64_t * to = tap->log + tap->log_count;
    if (index->type == GGML_TYPE_I64) {
        memcpy(to, index->data, (size_t) n * sizeof(int64_t));
    } else {
        const int32_t * from = index->data;
        for (int64_t i = 0; i < n; i++) {
            to[i] = from[i];
        }
    }
    tap->log_count += n;
    if (tap->sampler) {
        psikv_sampler_written(tap->sampler, to, n);
    }
}

// llama_context_params.cb_eval: is asked before each node runs, when the graph's inputs are already set.
// Answering false throughout lets the scheduler run the graph in one piece, as without a callback.
EXPORT bool psikv_tap_eval(struct ggml_tensor * node, bool ask, void * user) {
    struct psikv_tap * tap = user;
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        return psikv_attention(tap, node, ask);
    }
    if (node->op != GGML_OP_SET_ROWS) {
        return false;
    }
    const struct ggml_tensor * cache = node->view_src ? node->view_src : node;
    if (tap->cursor >= tap->n_tensors || tap->identity[tap->cursor] != cache) {
        if (strncmp(cache->name, "cache_", 6) != 0) {
            return false;
        }
        const int32_t found = enter_tensor(tap, node);
        if (found < 0) {
            return false;
        }
        tap->cursor = found;
    }
    tap->tensors[tap->cursor].index_source = (uint64_t) (uintptr_t) node->src[1];
    if (tap->cursor == tap->leader) {
        log_cells(tap, node->src[1]);
    }
    tap->cursor = tap->cursor + 1 < tap->n_tensors ? tap->cursor + 1 : 0;
    return false;
}

// ---- returning pages ------------------------------------------------------------------------------------

// Resident pages in [first, last): counted in the page tables, swapped-out pages not included.
static uint64_t resident_bytes(uintptr_t first, uintptr_t last) {
    unsigned char here[4096];
    const size_t  page  = page_bytes();
    uint64_t      pages = 0;
    while (first < last) {
        size_t n = (last - first) / page;
        n        = n > sizeof(here) ? sizeof(here) : n;
        if (mincore((void *) first, n * page, (void *) here) == 0) {
            for (size_t i = 0; i < n; i++) {
                pages += here[i] & 1;
            }
        }
        first += n * page;
    }
    return pages * page;
}

// Returns the pages of dead cells to the kernel. Each run is four cell numbers: the dead cells [0, 1), and
// within them the ones [2, 3) whose rows may be resident. Pages are rounded inward to the dead cells, so a
// live row is never touched. Gives the resident bytes that went, or -1 when the kernel refused.
EXPORT int64_t psikv_release(const struct psikv_tensor * tensor, const int64_t * runs, int64_t n_runs) {
    int64_t returned = 0;
    for (int64_t i = 0; i < n_runs; i++) {
        const int64_t * run   = runs + 4 * i;
        const uintptr_t dead0 = page_ceil(tensor->base + (uint64_t) run[0] * tensor->row_bytes);
        const uintptr_t dead1 = page_floor(tensor->base + (uint64_t) run[1] * tensor->row_bytes);
        uintptr_t       first = page_floor(tensor->base + (uint64_t) run[2] * tensor->row_bytes);
        uintptr_t       last  = page_ceil(tensor->base + (uint64_t) run[3] * tensor->row_bytes);
        first = first < dead0 ? dead0 : first;
        last  = last > dead1 ? dead1 : last;
        if (first >= last) {
            continue;
        }
        const uint64_t before = resident_bytes(first, last);
        if (drop_pages(first, last) != 0) {
            return -1;
        }
        returned += (int64_t) (before - resident_bytes(first, last));
    }
    return returned;
}

// Keeps the kernel from making huge pages of these rows, for a cache that was not demand-paged from the start.
EXPORT void psikv_small_pages(const struct psikv_tensor * tensor) {
    const uintptr_t first = page_ceil(tensor->base);
    const uintptr_t last  = page_floor(tensor->base + tensor->rows * tensor->row_bytes);
    if (first < last) {
        keep_pages_small(first, last);
    }
}
