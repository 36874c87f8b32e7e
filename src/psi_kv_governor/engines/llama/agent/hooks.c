// The functions that stand before those of ggml and llama.cpp. Each does what the real one does, and more or less
// around it; where llama.cpp is of another version, functions that it lacks are never called.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include "hooks.h"

#if defined(__x86_64__)
#define DLSYM_FIRST "GLIBC_2.2.5"
#else
#define DLSYM_FIRST "GLIBC_2.17"
#endif

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
    map_before_shift(mem);
    real(mem, seq, p0, p1, delta);
    map_shift(mem, seq, p0, p1, delta, 1);
}

EXPORT void llama_memory_seq_div(llama_memory_t mem, int32_t seq, int32_t p0, int32_t p1, int d) {
    REAL(llama_memory_seq_div);
    INSIDE;
    map_before_shift(mem);
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

// ---- functions that are looked up by name -------------------------------------------------------------------------

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
