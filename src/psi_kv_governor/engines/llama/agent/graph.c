// What happens around each graph: the rows that it writes are noted, parked cells are masked in its own mask, and of
// some graphs attention is sampled.

#include <errno.h>

#include "graph.h"

__thread struct call call;

void graph_call_begin(struct llama_context * ctx, const struct llama_batch * batch, bool again) {
    call = (struct call){.ctx = ctx, .batch = batch, .again = again};
    pthread_mutex_lock(&agent.lock);
    for (int i = 0; again && i < MAX_REGIONS; i++) {
        if (agent.regions[i].alive && agent.regions[i].ctx == ctx && agent.regions[i].sampler) {
            sampler_again(agent.regions[i].sampler, batch->n_tokens);
        }
    }
    pthread_mutex_unlock(&agent.lock);
}

void graph_call_end(void) { call = (struct call){0}; }

// Asks llama.cpp where the cells are, if that is not known: this thread is the one that may, also between two micro-batches.
static void refresh(struct lib * lib) {
    bool stale = false;
    for (int i = 0; i < call.walk->n_touched; i++) {
        const struct region * region = call.walk->touched[i].region;
        stale = stale || (region->cells && !map_fresh(region));
    }
    if (stale && agent.watched && call.ctx) {
        pthread_mutex_unlock(&agent.lock);
        (void) map_refresh(call.ctx, lib);
        pthread_mutex_lock(&agent.lock);
    }
}

void graph_before(struct lib * lib, ggml_backend_sched_t sched, struct ggml_cgraph * graph) {
    call.walk = NULL;
    if (!lib->graph_n_nodes || !lib->graph_node || !lib->proven) {
        return;
    }
    pthread_mutex_lock(&agent.lock);
    struct scheduler *  scheduler = scheduler_of(sched);
    const struct walk * walk      = call.walk = walk_of(lib, scheduler, graph);
    const struct ggml_tensor * positions = input_there(lib, walk->positions) ? walk->positions : NULL;
    const double now_s = agent_now_s();
    for (int i = 0; i < walk->n_touched; i++) {
        struct region * region = walk->touched[i].region;
        region->ctx          = region->ctx ? region->ctx : call.ctx;
        region->used_s       = now_s;
        region->writes_all   = walk->touched[i].writes_all;
        region->n_write_rows = 0;
        rows_written(region, walk->touched[i].index, positions);
        region->computing    = true;
        region->n_graphs++;
    }
    refresh(lib);
    for (int i = 0; i < walk->n_masks; i++) {
        if (walk->masks[i].region->n_masked > 0) {
            write_mask(&walk->masks[i], index_of(walk, walk->masks[i].region));
        }
    }
    bool due = false;
    for (int i = 0; i < walk->n_touched; i++) {
        due = observed_next(walk->touched[i].region) || due;
    }
    if (call.batch && walk->n_touched > 0 && walk->touched[0].index) {
        call.next += (int32_t) walk->touched[0].index->ne[0];
    }
    observe_graph(lib, scheduler, due);
    pthread_mutex_unlock(&agent.lock);
}

// A long prefill was in use until its end, and not only when it began.
void graph_after(void) {
    pthread_mutex_lock(&agent.lock);
    const double now_s = agent_now_s();
    for (int i = 0; call.walk && i < call.walk->n_touched; i++) {
        struct region * region = call.walk->touched[i].region;
        for (int32_t j = 0; j < region->n_sequences; j++) {
            if (region->sequences[j].used_s == region->used_s) {
                region->sequences[j].used_s = now_s;
            }
        }
        region->took_s    = now_s - region->used_s;
        region->took_rows = region->n_write_rows;
        region->used_s    = now_s;
        region->computing = false;
    }
    call.walk = NULL;
    pthread_cond_broadcast(&agent.graph_over);
    pthread_mutex_unlock(&agent.lock);
}

// Waits for the end of the graph that uses the region now, if there is one: half as long again as the last one took, if it
// is of its kind, and until `most_s` after its beginning. One that takes longer may be waiting for memory itself.
void graph_wait(struct region * region, double most_s) {
    const double          usual_s = region->took_rows == region->n_write_rows ? 1.5 * region->took_s : most_s;
    const double          left_s  = region->used_s + (usual_s < most_s ? usual_s : most_s) - agent_now_s();
    const struct timespec until   = realtime_in(left_s > 0 ? left_s : 0);
    const uint64_t        begun   = region->n_graphs;
    int error = 0;
    while (region->computing && region->n_graphs == begun && error != ETIMEDOUT) {
        error = pthread_cond_timedwait(&agent.graph_over, &agent.lock, &until);
    }
}
