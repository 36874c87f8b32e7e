// All buffers that hold a cache, wherever they are: also those of a device, whose pages nobody can return. They are told
// of and nothing else; what is plain memory of the host is a region as well (region.c).

#define _GNU_SOURCE
#include <string.h>

#include "agent.h"

#define MAX_BUFFERS 256

static struct { ggml_backend_buffer_t buffer; struct buffer_info info; } known[MAX_BUFFERS];

// A buffer was allocated for the tensors of `context`. Gives whether they are those of a cache. The lock is held.
bool buffer_born(struct lib * lib, ggml_backend_buffer_t buffer, struct ggml_context * context) {
    struct buffer_info info = {0};
    for (struct ggml_tensor * t = lib->first_tensor(context); t; t = lib->next_tensor(context, t)) {
        const char kind = tensor_kind(t->name);
        if (t->view_src || !kind) {
            continue;
        }
        info.n_tensors++;
        info.cells |= kind == 'k' || kind == 'v';
        if (lib_proven(lib, t) && kind == 'k') {
            info.n_rows = (uint64_t) (t->ne[1] * t->ne[2]);
        }
    }
    for (int i = 0; i < MAX_BUFFERS && info.n_tensors; i++) {
        if (!known[i].buffer) {
            info.size    = lib->buffer_size(buffer);
            info.is_host = lib->buffer_is_host && lib->buffer_is_host(buffer);
            info.number  = ++agent.next_buffer;
            strncpy(info.name, lib->buffer_name(buffer), sizeof(info.name) - 1);
            known[i].buffer = buffer;
            known[i].info   = info;
            break;
        }
    }
    return info.n_tensors > 0;
}

void buffer_gone(ggml_backend_buffer_t buffer) {
    for (int i = 0; i < MAX_BUFFERS; i++) {
        if (known[i].buffer == buffer) {
            known[i].buffer = NULL;
        }
    }
}

int buffers_tell(struct buffer_info * to, int most) {
    int n = 0;
    for (int i = 0; i < MAX_BUFFERS && n < most; i++) {
        if (known[i].buffer) {
            to[n++] = known[i].info;
        }
    }
    return n;
}
