// Finds the functions that the hooks stand before. Several versions of llama.cpp may be in one process, so the answer
// depends on who calls: each module reaches what it would reach without the agent.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

static char          primary_path[512];  // the library that ctypes users load: they call from libffi, which has none
#define MAX_LIBS 8
static struct lib    libs[MAX_LIBS];
static int           n_libs;
pthread_mutex_t       lib_lock = PTHREAD_MUTEX_INITIALIZER;

void real_set_primary(const char * path) {
    strncpy(primary_path, path, sizeof(primary_path) - 1);
}

static void * module_of(void * address) {
    Dl_info           info;
    struct link_map * map = NULL;
    if (!address || !dladdr1(address, &info, (void **) &map, RTLD_DL_LINKMAP)) {
        return NULL;
    }
    return map;
}

static void * open_module(struct link_map * map) {
    return dlopen(map->l_name && map->l_name[0] ? map->l_name : NULL, RTLD_LAZY | RTLD_NOLOAD);
}

static int close_module(void * handle) {
    static int (*real)(void *);
    if (!real) {
        real = (int (*)(void *)) agent_dlsym(RTLD_NEXT, "dlclose");
    }
    return real(handle);
}

static void * not_ours(void * symbol) {
    return symbol && module_of(symbol) != module_of((void *) not_ours) ? symbol : NULL;
}

struct search { const char * name; void * found; };

static int search_module(struct dl_phdr_info * info, size_t size, void * data) {
    (void) size;
    struct search * search = data;
    if (info->dlpi_name && info->dlpi_name[0]) {
        void * handle = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
        if (handle) {
            search->found = not_ours(agent_dlsym(handle, search->name));
            close_module(handle);
        }
    }
    return search->found != NULL;
}

static void * look_up(const char * name, void * caller) {
    struct link_map * map    = module_of(caller);
    void *            found  = NULL;
    void *            handle = map ? open_module(map) : NULL;
    if (handle) {
        found = not_ours(agent_dlsym(handle, name));
        close_module(handle);
    }
    if (!found) {
        found = not_ours(agent_dlsym(RTLD_NEXT, name));
    }
    if (!found && primary_path[0] && (handle = dlopen(primary_path, RTLD_LAZY | RTLD_NOLOAD))) {
        found = not_ours(agent_dlsym(handle, name));
        close_module(handle);
    }
    if (!found) {
        struct search search = {.name = name};
        dl_iterate_phdr(search_module, &search);
        found = search.found;
    }
    return found;
}

// ---- what was found once, by the address that asked. Without it each call would look symbols up: 30 to 100 us.

static struct real_cache * caches;  // those in which something is

static size_t slot_of(const void * address) { return ((uintptr_t) address * 0x9e3779b97f4a7c15u) >> 58; }

static void forget_all(struct real_cache * cache) {
    for (size_t i = 0; i < REAL_SLOTS; i++) {
        __atomic_store_n(&cache->slots[i].address, NULL, __ATOMIC_RELEASE);
    }
}

static void * known(const struct real_cache * cache, const void * address) {
    for (size_t i = 0, at = slot_of(address); i < REAL_SLOTS; i++, at = (at + 1) % REAL_SLOTS) {
        const struct real_slot * slot = &cache->slots[at];
        const void * there = __atomic_load_n(&slot->address, __ATOMIC_ACQUIRE);
        if (!there) {
            return NULL;
        }
        void * found = slot->found;
        if (there == address && __atomic_load_n(&slot->address, __ATOMIC_ACQUIRE) == address) {
            return found;
        }
    }
    return NULL;
}

// `lib_lock` is held. A full table is begun anew: programs have fewer places from which they call one function.
static void remember(struct real_cache * cache, void * address, void * found) {
    if (!cache->listed) {
        cache->listed = true;
        cache->next   = caches;
        caches        = cache;
    }
    for (size_t i = 0, at = slot_of(address); i < REAL_SLOTS; i++, at = (at + 1) % REAL_SLOTS) {
        if (!cache->slots[at].address) {
            cache->slots[at].found = found;
            __atomic_store_n(&cache->slots[at].address, address, __ATOMIC_RELEASE);
            return;
        }
    }
    forget_all(cache);
}

void * real_of(const char * name, void * caller, struct real_cache * cache) {
    void * found = known(cache, caller);
    if (found) {
        return found;
    }
    found = look_up(name, caller);
    if (!found) {
        agent_say("nothing provides %s, which this program calls", name);
        abort();  // its caller was linked against it: without us it would not have started
    }
    pthread_mutex_lock(&lib_lock);
    remember(cache, caller, found);
    pthread_mutex_unlock(&lib_lock);
    return found;
}

static int is_module(struct dl_phdr_info * info, size_t size, void * data) {
    (void) size;
    const struct lib * lib = data;
    return info->dlpi_name == lib->module_name && info->dlpi_addr == lib->module_base;
}

// A library was closed: another may come to lie where it was.
static void libraries_changed(void) {
    pthread_mutex_lock(&lib_lock);
    for (struct real_cache * cache = caches; cache; cache = cache->next) {
        forget_all(cache);
    }
    for (int i = 0; i < n_libs; i++) {
        if (libs[i].module && !dl_iterate_phdr(is_module, &libs[i])) {
            libs[i].module = NULL;
        }
    }
    pthread_mutex_unlock(&lib_lock);
}

EXPORT int dlclose(void * handle) {
    const int error = close_module(handle);
    if (!error) {
        libraries_changed();
    }
    return error;
}

static void * in_module(void * handle, const char * name) {
    void * symbol = agent_dlsym(handle, name);
    return not_ours(symbol) ? symbol : look_up(name, NULL);
}

static void fill_opcodes(struct lib * lib) {
    const struct { const char * name; int32_t * op; } wanted[] = {
        {"SET_ROWS", &lib->op.set_rows}, {"FLASH_ATTN_EXT", &lib->op.flash}, {"VIEW", &lib->op.view}, {"RESHAPE", &lib->op.reshape},
        {"PERMUTE", &lib->op.permute}, {"TRANSPOSE", &lib->op.transpose}, {"CONT", &lib->op.cont}, {"CPY", &lib->op.cpy},
        {"ROPE", &lib->op.rope}, {"NONE", &lib->op.none},
    };
    memset(&lib->op, 0xff, sizeof(lib->op));
    for (int32_t op = 0; op < 160 && lib->op_name; op++) {
        const char * name = lib->op_name(op);
        if (!name || !strcmp(name, "COUNT")) {
            break;
        }
        for (size_t i = 0; i < sizeof(wanted) / sizeof(wanted[0]); i++) {
            *wanted[i].op = strcmp(name, wanted[i].name) ? *wanted[i].op : op;
        }
    }
}

static void fill(struct lib * lib, void * handle) {
    memset(lib, 0, sizeof(*lib));
    *(void **) &lib->graph_n_nodes     = in_module(handle, "ggml_graph_n_nodes");
    *(void **) &lib->graph_node        = in_module(handle, "ggml_graph_node");
    *(void **) &lib->op_name           = in_module(handle, "ggml_op_name");
    *(void **) &lib->get_name          = in_module(handle, "ggml_get_name");
    *(void **) &lib->get_data          = in_module(handle, "ggml_get_data");
    *(void **) &lib->first_tensor      = in_module(handle, "ggml_get_first_tensor");
    *(void **) &lib->next_tensor       = in_module(handle, "ggml_get_next_tensor");
    *(void **) &lib->buffer_base       = in_module(handle, "ggml_backend_buffer_get_base");
    *(void **) &lib->buffer_size       = in_module(handle, "ggml_backend_buffer_get_size");
    *(void **) &lib->buffer_name       = in_module(handle, "ggml_backend_buffer_name");
    *(void **) &lib->buffer_is_host    = in_module(handle, "ggml_backend_buffer_is_host");
    *(void **) &lib->set_eval_callback = in_module(handle, "ggml_backend_sched_set_eval_callback");
    *(void **) &lib->get_memory        = in_module(handle, "llama_get_memory");
    *(void **) &lib->n_seq_max         = in_module(handle, "llama_n_seq_max");
    *(void **) &lib->pos_min           = in_module(handle, "llama_memory_seq_pos_min");
    *(void **) &lib->pos_max           = in_module(handle, "llama_memory_seq_pos_max");
    *(void **) &lib->seq_rm            = in_module(handle, "llama_memory_seq_rm");
    *(void **) &lib->synchronize       = in_module(handle, "llama_synchronize");
    *(void **) &lib->state_seq_get     = in_module(handle, "llama_state_seq_get_data_ext");
    fill_opcodes(lib);
}

static bool in_use(const struct lib * lib) {
    bool used = false;
    for (int i = 0; i < MAX_REGIONS; i++) {
        used = used || (agent.regions[i].alive && agent.regions[i].lib == lib);
    }
    return used;
}

// The one of `module`, or a free one: never used, or of a module that was closed. `lib_lock` is held.
static struct lib * lib_for(struct link_map * module) {
    struct lib * closed = NULL;
    for (int i = 0; i < n_libs; i++) {
        if (libs[i].module == module) {
            return &libs[i];
        }
        closed = !libs[i].module && !in_use(&libs[i]) ? &libs[i] : closed;
    }
    struct lib * lib    = n_libs < MAX_LIBS ? &libs[n_libs] : closed;
    void *       handle = lib ? open_module(module) : NULL;
    if (!lib) {
        static bool said;
        if (!said) {
            agent_say("more than %d libraries here use llama.cpp: the rest is not governed", MAX_LIBS);
        }
        said = true;
    }
    if (handle) {
        fill(lib, handle);
        lib->module      = module;
        lib->module_name = module->l_name;
        lib->module_base = module->l_addr;
        n_libs += lib == &libs[n_libs];
        close_module(handle);
    }
    return handle ? lib : NULL;
}

// The llama.cpp that the module of `address` is, or uses. Never NULL.
struct lib * lib_of(void * address) {
    static struct lib        none;
    static struct real_cache of_address;
    struct lib * lib = known(&of_address, address);
    if (lib) {
        return lib;
    }
    struct link_map * map = module_of(address);
    pthread_mutex_lock(&lib_lock);
    lib = map ? lib_for(map) : NULL;
    if (lib) {
        remember(&of_address, address, lib);
    }
    pthread_mutex_unlock(&lib_lock);
    return lib ? lib : &none;
}

// Whether the struct is laid out as declared: the library's own accessors say where a name and the data are. A layout
// in which only fields before them moved would show in the strides.
bool lib_proven(struct lib * lib, const struct ggml_tensor * tensor) {
    if (lib->proven) {
        return true;
    }
    if (!lib->get_name || !lib->get_data || !lib->buffer_base || !lib->buffer_size) {
        return false;
    }
    lib->proven = lib->get_name(tensor) == tensor->name && lib->get_data(tensor) == tensor->data &&
                  tensor->ne[0] > 0 && tensor->ne[1] > 0 && tensor->nb[1] >= tensor->nb[0] &&
                  tensor->nb[2] == tensor->nb[1] * (size_t) tensor->ne[1];
    return lib->proven;
}
