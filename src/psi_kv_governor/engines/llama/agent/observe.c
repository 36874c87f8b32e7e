// While some nodes of a graph are observed, our callback stands before the program's own.

#include <math.h>

#include "graph.h"

struct chained { ggml_backend_sched_eval_callback callback; void * user; struct lib * lib; };
static __thread struct chained chained;

static bool sampled_node(struct ggml_tensor * node) {
    if (node->op != chained.lib->op.flash) {
        return false;
    }
    struct region * region = region_of_address((uint64_t) (uintptr_t) node->src[1]->data);
    struct tensor * keys   = region && region->sampler ? region_tensor(region, (uint64_t) (uintptr_t) node->src[1]->data) : NULL;
    return keys && keys->sampled && sampler_due(region->sampler);
}

// The keys of a node whose queries are held against what is parked.
static struct tensor * recalled_node(struct ggml_tensor * node, struct region ** region) {
    if (node->op != chained.lib->op.flash) {
        return NULL;
    }
    *region = region_of_address((uint64_t) (uintptr_t) node->src[1]->data);
    return *region && recall_due(*region) ? region_tensor(*region, (uint64_t) (uintptr_t) node->src[1]->data) : NULL;
}

static bool observe(struct ggml_tensor * node, bool ask, void * user_data) {
    (void) user_data;
    struct region *       region   = NULL;
    const struct tensor * recalled = recalled_node(node, &region);
    const bool sampled = sampled_node(node), ours = sampled || recall_wants(region, recalled);
    const bool theirs = chained.callback && chained.callback(node, ask, chained.user);
    if (ask) {
        return ours || theirs;
    }
    if (sampled) {
        sampler_observe(region_of_address((uint64_t) (uintptr_t) node->src[1]->data)->sampler, node);
    }
    if (recall_wants(region, recalled)) {
        recall_observe(region, recalled, node);
    }
    return chained.callback ? theirs : true;
}

static void choose_layers(struct region * region) {
    int32_t keys[MAX_TENSORS], n = 0;
    for (int32_t i = 0; i < region->n_tensors; i++) {
        if (region->tensors[i].keys && region->tensors[i].n_head > 0 && !region->tensors[i].alibi) {
            keys[n++] = i;
        }
    }
    // Evenly spaced from the middle to five sixths of the depth: there attention looks things up.
    const int32_t from = n / 2, to = n * 5 / 6 > from ? n * 5 / 6 : from + 1;
    const int32_t count = agent.sample_layers < to - from ? agent.sample_layers : to - from;
    for (int32_t i = 0; i < count && n > 0; i++) {
        region->tensors[keys[from + (int32_t) ((i + 0.5) * (to - from) / count)]].sampled = true;
    }
    if (n > 0) {
        const float keep = powf(0.5f, 1.0f / (agent.sample_half_life * (float) count));
        region->sampler  = sampler_new(region->n_rows, agent.sample_every, agent.sample_window, keep, agent.sample_near);
    }
}

bool observed_next(struct region * region) {
    bool due = false;
    if (agent.sample_every > 0 && region->cells && !region->sampler && region->masks) {
        choose_layers(region);
    }
    if (region->sampler && agent.sample_every > 0 && !region->writes_all) {
        sampler_written(region->sampler, region->write_rows, region->n_write_rows, call.again);
        due = sampler_due(region->sampler);
    }
    if (region->recall && !region->writes_all) {
        due = recall_before(region, call.batch, call.next, region->write_rows, region->n_write_rows) || due;
    }
    return due;
}

// A scheduler that is not known keeps the callback that it has: nothing of it is observed.
void observe_graph(struct lib * lib, struct scheduler * scheduler, bool due) {
    if (scheduler && lib->set_eval_callback && (agent.sample_every > 0 || recall_settings.mode > 0)) {
        chained = (struct chained){scheduler->callback, scheduler->user, lib};
        lib->set_eval_callback(scheduler->sched, due ? observe : scheduler->callback, due ? NULL : scheduler->user);
    }
}
