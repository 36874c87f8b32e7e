// Finds the functions that the hooks stand before. Several versions of llama.cpp may be in one process, so the answer
// depends on who calls: each module reaches what it would reach without the agent.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <link.h>
#include <stdlib.h>
#include <string.h>

#include "agent.h"

static char          primary_path[512];  // the library that ctypes users load: they call from libffi, which has none
static struct lib    libs[8];
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
            dlclose(handle);
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
        dlclose(handle);
    }
    if (!found) {
        found = not_ours(agent_dlsym(RTLD_NEXT, name));
    }
    if (!found && primary_path[0] && (handle = dlopen(primary_path, RTLD_LAZY | RTLD_NOLOAD))) {
        found = not_ours(agent_dlsym(handle, name));
        dlclose(handle);
    }
    if (!found) {
        struct search search = {.name = name};
        dl_iterate_phdr(search_module, &search);
        found = search.found;
    }
    return found;
}

void * real_of(const char * name, void * caller, struct real_cache * cache) {
    for (int i = 0; i < 8; i++) {
        if (__atomic_load_n(&cache->slots[i].caller, __ATOMIC_ACQUIRE) == caller) {
            return cache->slots[i].function;
        }
    }
    void * found = look_up(name, caller);
    if (!found) {
        agent_say("nothing provides %s, which this program calls", name);
        abort();  // its caller was linked against it: without us it would not have started
    }
    pthread_mutex_lock(&lib_lock);
    for (int i = 0; i < 8; i++) {
        if (!cache->slots[i].caller) {
            cache->slots[i].function = found;
            __atomic_store_n(&cache->slots[i].caller, caller, __ATOMIC_RELEASE);
            break;
        }
    }
    pthread_mutex_unlock(&lib_lock);
    return found;
}

static void * in_module(void * handle, const char * name) {
    void * symbol = agent_dlsym(handle, name);
    return not_ours(symbol) ? symbol : look_up(name, NULL);
}

static void fill(struct lib * lib, void * handle) {
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
}

// The llama.cpp that the module of `address` is, or uses. Never NULL.
struct lib * lib_of(void * address) {
    static struct lib none;
    struct link_map * map = module_of(address);
    if (!map) {
        return &none;
    }
    pthread_mutex_lock(&lib_lock);
    struct lib * lib = NULL;
    for (int i = 0; i < n_libs && !lib; i++) {
        lib = libs[i].module == map ? &libs[i] : NULL;
    }
    if (!lib && n_libs < 8) {
        void * handle = open_module(map);
        if (handle) {
            lib         = &libs[n_libs];
            lib->module = map;
            fill(lib, handle);
            n_libs++;
            dlclose(handle);
        }
    }
    pthread_mutex_unlock(&lib_lock);
    return lib ? lib : &none;
}

bool lib_is(const struct lib * lib, int32_t op, const char * name) {
    return lib->op_name && op >= 0 && op < 4096 && strcmp(lib->op_name(op), name) == 0;
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
