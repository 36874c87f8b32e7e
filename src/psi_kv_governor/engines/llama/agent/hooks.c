// The functions that stand before those of ggml and llama.cpp. Each does what the real one does, and more or less
// around it; where llama.cpp is of another version, functions that it lacks are never called.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "recall.h"

#if defined(__x86_64__)
#define DLSYM_FIRST "GLIBC_2.2.5"
#else
#define DLSYM_FIRST "GLIBC_2.17"
#endif

struct agent agent = {.lock = PTHREAD_MUTEX_INITIALIZER};

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

static void left(int * unused) {
    (void) unused;
    gate_leave();
}

// The gate is left however the call ends, also by an exception that passes through.
#define CALLER __builtin_return_address(0)
#define REAL(name)                                                                       \
    static struct real_cache cache;                                                      \
    typeof(&name) real = (typeof(&name)) real_of(#name, CALLER, &cache)
#define INSIDE                                                                           \
    __attribute__((cleanup(left), unused)) int inside = 0;                               \
    gate_enter()

// ---- buffers ------------------------------------------------------------------------------------------------

EXPORT ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors_from_buft(struct ggml_context * context, ggml_backend_buffer_type_t type) {
    REAL(ggml_backend_alloc_ctx_tensors_from_buft);
    ggml_backend_buffer_t buffer = real(context, type);
    region_born(lib_of(CALLER), buffer, context);
    return buffer;
}

EXPORT void ggml_backend_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    REAL(ggml_backend_buffer_clear);
    if (value != 0 || !region_clear(buffer)) {
        real(buffer, value);
    }
}

EXPORT void ggml_backend_buffer_free(ggml_backend_buffer_t buffer) {
    REAL(ggml_backend_buffer_free);
    if (buffer) {
        region_gone(buffer);
    }
    real(buffer);
}

EXPORT void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    REAL(ggml_backend_tensor_get);
    if (!map_asking(tensor, offset, size)) {
        real(tensor, data, offset, size);
    }
}

EXPORT void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    REAL(ggml_backend_tensor_set);
    rows_overwritten(tensor, offset, size);
    real(tensor, data, offset, size);
}

// ---- graphs ---------------------------------------------------------------------------------------------------

EXPORT void ggml_backend_sched_set_eval_callback(ggml_backend_sched_t sched, ggml_backend_sched_eval_callback callback, void * user) {
    REAL(ggml_backend_sched_set_eval_callback);
    graph_note_callback(sched, callback, user);
    real(sched, callback, user);
}

EXPORT bool ggml_backend_sched_alloc_graph(ggml_backend_sched_t sched, struct ggml_cgraph * graph) {
    REAL(ggml_backend_sched_alloc_graph);
    graph_laid_out(sched, graph);
    return real(sched, graph);
}

EXPORT void ggml_backend_sched_reset(ggml_backend_sched_t sched) {
    REAL(ggml_backend_sched_reset);
    graph_laid_out(sched, NULL);
    real(sched);
}

EXPORT void ggml_backend_sched_free(ggml_backend_sched_t sched) {
    REAL(ggml_backend_sched_free);
    graph_forget_scheduler(sched);
    real(sched);
}

EXPORT int32_t ggml_backend_sched_graph_compute_async(ggml_backend_sched_t sched, struct ggml_cgraph * graph) {
    REAL(ggml_backend_sched_graph_compute_async);
    INSIDE;  // whoever did not come through one of the functions below
    struct lib * lib = lib_of(CALLER);
    graph_before(lib, sched, graph);
    gate_compute_begin();
    const int32_t status = real(sched, graph);
    gate_compute_end();
    graph_after();
    return status;
}

// ---- calls into llama.cpp -----------------------------------------------------------------------------------------

EXPORT int32_t llama_decode(struct llama_context * ctx, struct llama_batch batch) {
    REAL(llama_decode);
    INSIDE;
    struct lib *  lib  = lib_of((void *) real);
    const int32_t from = recall_begin(ctx, lib, &batch);
    graph_call_begin(ctx, &batch, false);
    int32_t result = real(ctx, batch);
    graph_call_end();
    if (result == 0 && recall_end(ctx, lib, from)) {  // what it asks for has come back: the same tokens once more
        graph_call_begin(ctx, &batch, true);
        result = real(ctx, batch);
        graph_call_end();
    }
    return result;
}

EXPORT int32_t llama_encode(struct llama_context * ctx, struct llama_batch batch) {
    REAL(llama_encode);
    INSIDE;
    graph_call_begin(ctx, NULL, false);
    const int32_t result = real(ctx, batch);
    graph_call_end();
    return result;
}

// Newer, and still changing: whatever else it takes is handed on as it is.
EXPORT int32_t llama_process(struct llama_context * ctx, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e) {
    REAL(llama_process);
    INSIDE;
    struct lib *   lib   = lib_of((void *) real);
    const uint32_t n_max = lib && lib->n_seq_max ? lib->n_seq_max(ctx) : 0;
    const struct llama_batch * batch = batch_seen((const void *) b, n_max);  // (context, what to do, batch)
    graph_call_begin(ctx, batch ? batch : batch_seen((const void *) a, n_max), false);
    const int32_t result = real(ctx, a, b, c, d, e);
    graph_call_end();
    return result;
}

#define EXTENDS(name, more)                                                                                         \
    EXPORT uintptr_t name(void * batch, uintptr_t a, uintptr_t b, uintptr_t c, uintptr_t d, uintptr_t e) {       \
        REAL(name);                                                                                              \
        const uintptr_t result = real(batch, a, b, c, d, e);                                                     \
        more;                                                                                                    \
        return result;                                                                                           \
    }

EXTENDS(llama_batch_ext_add, batch_added(batch, (int32_t) result, (int32_t) a))
EXTENDS(llama_batch_ext_add_token, batch_added(batch, (int32_t) result, (int32_t) a))
EXTENDS(llama_batch_ext_add_seq, batch_changed(batch, (int32_t) a, NULL))
EXTENDS(llama_batch_ext_set_pos, batch_changed(batch, (int32_t) a, (const int32_t *) b))
EXTENDS(llama_batch_ext_clear, batch_emptied(batch, false))
EXTENDS(llama_batch_ext_free, batch_emptied(batch, true))

static void cells_changed(void) {
    pthread_mutex_lock(&agent.lock);
    agent.memory_generation++;
    pthread_mutex_unlock(&agent.lock);
}

#define CHANGES(type, name, parameters, arguments)  \
    EXPORT type name parameters {                   \
        REAL(name);                                 \
        INSIDE;                                     \
        cells_changed();                            \
        return real arguments;                      \
    }

EXPORT bool llama_memory_seq_rm(llama_memory_t mem, int32_t seq, int32_t p0, int32_t p1) {
    REAL(llama_memory_seq_rm);
    INSIDE;
    if (!map_untouched(mem, p0)) {
        cells_changed();
    }
    const bool done = real(mem, seq, p0, p1);
    if (done) {
        lost_removed(mem, seq, p0, p1, false);
    }
    return done;
}

EXPORT void llama_memory_seq_cp(llama_memory_t mem, int32_t from, int32_t to, int32_t p0, int32_t p1) {
    REAL(llama_memory_seq_cp);
    INSIDE;
    cells_changed();
    lost_copied(mem, from, to, p0, p1);
    real(mem, from, to, p0, p1);
}

EXPORT void llama_memory_seq_keep(llama_memory_t mem, int32_t seq) {
    REAL(llama_memory_seq_keep);
    INSIDE;
    cells_changed();
    lost_removed(mem, seq, -1, -1, true);
    real(mem, seq);
}

EXPORT void llama_memory_clear(llama_memory_t mem, bool data) {
    REAL(llama_memory_clear);
    INSIDE;
    cells_changed();
    lost_removed(mem, -1, -1, -1, false);
    real(mem, data);
}

EXPORT void llama_memory_seq_add(llama_memory_t mem, int32_t seq, int32_t p0, int32_t p1, int32_t delta) {
    REAL(llama_memory_seq_add);
    INSIDE;
    real(mem, seq, p0, p1, delta);
    map_shift(mem, seq, p0, p1, delta, 1);
}

EXPORT void llama_memory_seq_div(llama_memory_t mem, int32_t seq, int32_t p0, int32_t p1, int d) {
    REAL(llama_memory_seq_div);
    INSIDE;
    real(mem, seq, p0, p1, d);
    map_shift(mem, seq, p0, p1, 0, d);
}

CHANGES(size_t, llama_state_set_data, (struct llama_context * ctx, const uint8_t * from, size_t size), (ctx, from, size))
CHANGES(size_t, llama_state_seq_set_data, (struct llama_context * ctx, const uint8_t * from, size_t size, int32_t seq), (ctx, from, size, seq))
CHANGES(bool, llama_state_load_file, (struct llama_context * ctx, const char * path, int32_t * tokens, size_t capacity, size_t * n), (ctx, path, tokens, capacity, n))
CHANGES(size_t, llama_state_seq_load_file, (struct llama_context * ctx, const char * path, int32_t seq, int32_t * tokens, size_t capacity, size_t * n), (ctx, path, seq, tokens, capacity, n))

#define READS(type, name, parameters, arguments)    \
    EXPORT type name parameters {                   \
        REAL(name);                                 \
        INSIDE;                                     \
        return real arguments;                      \
    }

READS(size_t, llama_state_get_data, (struct llama_context * ctx, uint8_t * to, size_t size), (ctx, to, size))
READS(size_t, llama_state_get_size, (struct llama_context * ctx), (ctx))
READS(size_t, llama_state_seq_get_data, (struct llama_context * ctx, uint8_t * to, size_t size, int32_t seq), (ctx, to, size, seq))
READS(size_t, llama_state_seq_get_size, (struct llama_context * ctx, int32_t seq), (ctx, seq))
READS(bool, llama_state_save_file, (struct llama_context * ctx, const char * path, const int32_t * tokens, size_t n), (ctx, path, tokens, n))
READS(size_t, llama_state_seq_save_file, (struct llama_context * ctx, const char * path, int32_t seq, const int32_t * tokens, size_t n), (ctx, path, seq, tokens, n))

EXPORT size_t llama_state_seq_get_size_ext(struct llama_context * ctx, int32_t seq, uint32_t flags) {
    REAL(llama_state_seq_get_size_ext);
    INSIDE;
    const size_t size = real(ctx, seq, flags);
    blob_expect(size, flags);
    return size;
}

EXPORT size_t llama_state_seq_get_data_ext(struct llama_context * ctx, uint8_t * to, size_t size, int32_t seq, uint32_t flags) {
    REAL(llama_state_seq_get_data_ext);
    blob_begun(to);
    INSIDE;
    graph_state_read(ctx, seq);
    const size_t n = real(ctx, to, size, seq, flags);
    blob_whole(to, n);
    return n;
}

EXPORT size_t llama_state_seq_set_data_ext(struct llama_context * ctx, const uint8_t * from, size_t size, int32_t seq, uint32_t flags) {
    REAL(llama_state_seq_set_data_ext);
    INSIDE;
    cells_changed();
    blob_used(from);
    return real(ctx, from, size, seq, flags);
}

READS(int32_t, llama_memory_seq_pos_min, (llama_memory_t mem, int32_t seq), (mem, seq))
READS(int32_t, llama_memory_seq_pos_max, (llama_memory_t mem, int32_t seq), (mem, seq))

READS(void, llama_free, (struct llama_context * ctx), (ctx))

// ---- the beginning, and forks ---------------------------------------------------------------------------------------

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
    pthread_mutex_init(&serving, NULL);
    pthread_mutex_init(&blob_lock, NULL);
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

// Programs that look functions up by name (ctypes, JNA, purego) find the hooks too. Only under LD_PRELOAD does this stand
// before the C library's own. A plain return is a jump at -O2: for RTLD_NEXT the C library sees who really asks.
typedef void * (*lookup)(void *, const char *);

static lookup real_lookup(void) {
    static lookup found;
    if (!found) {
        found = (lookup) dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34");
        found = found ? found : (lookup) dlvsym(RTLD_NEXT, "dlsym", DLSYM_FIRST);
        found = found ? found : (lookup) dlvsym(RTLD_DEFAULT, "dlsym", "GLIBC_2.34");
        found = found ? found : (lookup) dlvsym(RTLD_DEFAULT, "dlsym", DLSYM_FIRST);
    }
    return found;
}

void * agent_dlsym(void * handle, const char * name) { return real_lookup()(handle, name); }

static const struct { const char * name; void * hook; } hooks[] = {
#define HOOK(name) {#name, (void *) name}
    HOOK(llama_decode), HOOK(llama_encode), HOOK(llama_process), HOOK(llama_free), HOOK(llama_memory_seq_rm),
    HOOK(llama_memory_seq_cp), HOOK(llama_memory_seq_keep), HOOK(llama_memory_seq_add), HOOK(llama_memory_seq_div),
    HOOK(llama_memory_clear), HOOK(llama_memory_seq_pos_min), HOOK(llama_memory_seq_pos_max), HOOK(llama_state_set_data),
    HOOK(llama_state_get_data), HOOK(llama_state_get_size), HOOK(llama_state_seq_set_data), HOOK(llama_state_seq_get_data),
    HOOK(llama_state_seq_get_size), HOOK(llama_state_load_file), HOOK(llama_state_save_file), HOOK(llama_state_seq_load_file),
    HOOK(llama_state_seq_save_file), HOOK(llama_state_seq_get_size_ext), HOOK(llama_state_seq_get_data_ext),
    HOOK(llama_state_seq_set_data_ext), HOOK(llama_batch_ext_add), HOOK(llama_batch_ext_add_token), HOOK(llama_batch_ext_add_seq),
    HOOK(llama_batch_ext_set_pos), HOOK(llama_batch_ext_clear), HOOK(llama_batch_ext_free),
};

static void * hooked(void * handle, const char * name) {
    void * found = real_lookup()(handle, name);
    for (size_t i = 0; found && i < sizeof(hooks) / sizeof(hooks[0]); i++) {
        if (!strcmp(name, hooks[i].name)) {
            return hooks[i].hook;
        }
    }
    return found;
}

EXPORT void * dlsym(void * restrict handle, const char * restrict name) {
    const lookup real = real_lookup();
    if (handle != RTLD_NEXT && !strncmp(name, "llama_", 6)) {
        return hooked(handle, name);
    }
    return real(handle, name);
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
