// Looks a graph through: which rows of which caches it writes, and where the masks of its attention are. That takes a
// tenth of a millisecond for 900 nodes that are not in the processor's cache, so it is done once for each graph that the
// scheduler lays out, and not for each token. What a scheduler computes is what it laid out last: a graph that is changed
// afterwards is not looked at by it either.

#include <string.h>

#include "graph.h"

static struct scheduler schedulers[MAX_SCHEDULERS];

static struct scheduler * find_scheduler(ggml_backend_sched_t sched, bool create) {
    struct scheduler * spare = NULL;
    for (int i = 0; i < MAX_SCHEDULERS; i++) {
        if (schedulers[i].sched == sched) {
            return &schedulers[i];
        }
        spare = !schedulers[i].sched && !spare ? &schedulers[i] : spare;
    }
    if (create && spare) {
        memset(spare, 0, sizeof(*spare));
        spare->sched = sched;
    }
    return create ? spare : NULL;
}

struct scheduler * scheduler_of(ggml_backend_sched_t sched) { return find_scheduler(sched, false); }

void graph_note_callback(ggml_backend_sched_t sched, ggml_backend_sched_eval_callback callback, void * user) {
    pthread_mutex_lock(&agent.lock);
    struct scheduler * one = find_scheduler(sched, true);
    if (one) {
        one->callback = callback;
        one->user     = user;
    }
    pthread_mutex_unlock(&agent.lock);
}

// The positions that rope takes.
static const struct ggml_tensor * positions_of(const struct lib * lib, struct ggml_cgraph * graph) {
    const int n = lib->graph_n_nodes && lib->graph_node && lib->proven ? lib->graph_n_nodes(graph) : 0;
    for (int i = 0; i < n; i++) {
        const struct ggml_tensor * node = lib->graph_node(graph, i);
        if (node->op == lib->op.rope && node->src[1] && node->src[1]->op == lib->op.none) {
            return node->src[1];
        }
    }
    return NULL;
}

// `graph` is about to be laid out, and computed as it is until the next one is; NULL: none is. Laying out puts the
// scheduler's own copies in the place of inputs that are read on a device, so those of the program are looked up before.
void graph_laid_out(const struct lib * lib, ggml_backend_sched_t sched, struct ggml_cgraph * graph) {
    pthread_mutex_lock(&agent.lock);
    struct scheduler * one = find_scheduler(sched, false);
    if (one) {
        one->walk.graph     = graph;
        one->walk.known     = false;
        one->walk.positions = graph ? positions_of(lib, graph) : NULL;
    }
    pthread_mutex_unlock(&agent.lock);
}

void graph_forget_scheduler(ggml_backend_sched_t sched) {
    pthread_mutex_lock(&agent.lock);
    struct scheduler * one = find_scheduler(sched, false);
    if (one) {
        one->sched = NULL;
    }
    pthread_mutex_unlock(&agent.lock);
}

// ---- looking a graph through ------------------------------------------------------------------------------------

static struct region * region_of_tensor(const struct ggml_tensor * t) {
    return region_of_buffer(t->view_src ? t->view_src->buffer : t->buffer);
}

static struct touched * touch(struct walk * walk, struct region * region) {
    for (int i = 0; i < walk->n_touched; i++) {
        if (walk->touched[i].region == region) {
            return &walk->touched[i];
        }
    }
    walk->touched[walk->n_touched] = (struct touched){.region = region};
    return &walk->touched[walk->n_touched++];
}

const struct ggml_tensor * index_of(const struct walk * walk, const struct region * region) {
    for (int i = 0; i < walk->n_touched; i++) {
        if (walk->touched[i].region == region) {
            return walk->touched[i].index;
        }
    }
    return NULL;
}

bool input_there(const struct lib * lib, const struct ggml_tensor * input) {
    return input && input->data && input->buffer && lib->buffer_is_host && lib->buffer_is_host(input->buffer) &&
           !strchr(input->name, '#');
}

// A node that may write into a cache.
static void note_writer(struct lib * lib, struct walk * walk, const struct ggml_tensor * node) {
    struct region * region = region_of_tensor(node);
    if (!region) {
        return;
    }
    struct touched * one    = touch(walk, region);
    struct tensor *  tensor = region->cells ? region_tensor(region, (uint64_t) (uintptr_t) node->view_src->data) : NULL;
    if (node->op != lib->op.set_rows || !tensor) {
        one->writes_all = true;  // a shift of all positions, or a recurrent state
        return;
    }
    tensor->whole_rows = node->ne[0] == tensor->identity->ne[0];
    const bool there = input_there(lib, node->src[1]);
    if (tensor == &region->tensors[region->leader] && !one->index && there) {
        one->index = node->src[1];
    }
    one->writes_all = one->writes_all || !there;
}

static void learn_heads(struct tensor * keys, const struct ggml_tensor * node) {
    if (keys->n_head == 0) {
        float max_bias;
        memcpy(&max_bias, (const float *) node->op_params + 1, sizeof(max_bias));
        keys->head_dim = (int32_t) node->src[1]->ne[0];
        keys->alibi    = max_bias != 0.0f;
        keys->n_head   = (int32_t) node->src[0]->ne[2];
    }
}

static struct ggml_tensor * mask_leaf(const struct lib * lib, struct ggml_tensor * mask) {
    for (int depth = 0; mask && depth < 8; depth++) {
        if (mask->view_src) {
            mask = mask->view_src;
        } else if (mask->op == lib->op.cpy || mask->op == lib->op.cont) {
            mask = mask->src[0];
        } else {
            return mask->op == lib->op.none && strstr(mask->name, "kq_mask") ? mask : NULL;
        }
    }
    return NULL;
}

// A node of flash attention.
static void note_reader(struct lib * lib, struct walk * walk, const struct ggml_tensor * node) {
    struct region * region = node->src[1] ? region_of_tensor(node->src[1]) : NULL;
    struct tensor * keys   = region && region->cells ? region_tensor(region, (uint64_t) (uintptr_t) node->src[1]->data) : NULL;
    if (!keys) {
        return;
    }
    learn_heads(keys, node);
    struct ggml_tensor * mask = mask_leaf(lib, node->src[3]);
    const bool usable = input_there(lib, mask) && (mask->type == TYPE_F16 || mask->type == TYPE_F32);
    if (usable != region->masks) {
        region->masks = usable;
        strcpy(region->why_no_mask, usable ? "" : "its attention takes no mask that can be written");
    }
    bool again = !usable;
    for (int i = 0; i < walk->n_masks; i++) {
        again = again || walk->masks[i].mask == mask;
    }
    if (!again && walk->n_masks < MAX_MASKS) {
        walk->masks[walk->n_masks++] = (struct masked){region, keys, node->src[1], mask};
    }
}

static void look_through(struct lib * lib, struct walk * walk, struct ggml_cgraph * graph) {
    walk->n_touched = walk->n_masks = 0;
    const int n = lib->graph_n_nodes(graph);
    bool flash = false;
    for (int i = 0; i < n; i++) {
        const struct ggml_tensor * node = lib->graph_node(graph, i);
        if (node->op == lib->op.flash) {
            flash = true;
            note_reader(lib, walk, node);
        } else if (node->view_src && node->op != lib->op.view && node->op != lib->op.reshape && node->op != lib->op.permute &&
                   node->op != lib->op.transpose) {
            note_writer(lib, walk, node);
        }
    }
    for (int i = 0; i < walk->n_touched; i++) {
        struct region * region = walk->touched[i].region;
        if (!region->masks && region->cells) {
            strcpy(region->why_no_mask, flash ? "its attention runs on a device, which is handed all cells for each token"
                                              : "flash attention is off: masked cells would be read all the same (flash_attn=True)");
        }
    }
}

const struct walk * walk_of(struct lib * lib, struct scheduler * scheduler, struct ggml_cgraph * graph) {
    static __thread struct walk spare;
    struct walk * walk = scheduler ? &scheduler->walk : &spare;
    if (walk->known && walk->graph == graph && walk->regions == agent.region_changes) {
        return walk;
    }
    if (!scheduler || walk->graph != graph) {  // that it was laid out was not seen
        walk->positions = positions_of(lib, graph);
    }
    look_through(lib, walk, graph);
    walk->known   = walk->graph == graph && scheduler;  // that it was laid out was seen, so the next will be too
    walk->regions = agent.region_changes;
    return walk;
}
