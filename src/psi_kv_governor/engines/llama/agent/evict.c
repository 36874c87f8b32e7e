// Evicting: where there is no place to park, cells of a sequence are removed for good, by llama.cpp's own calls and
// between two calls of the program. Their positions are remembered until the program removes or rewrites them itself, so
// that it can be told what an answer was computed without.

#include <stdlib.h>
#include <string.h>

#include "protocol.h"

// How long a call of the program that has begun is waited for: a token of a large model. Nobody is kept waiting for us.
#define END_PATIENCE_S 0.25

// ---- lost positions ---------------------------------------------------------------------------------------------

static int ascending(const void * a, const void * b) {
    const int32_t x = *(const int32_t *) a, y = *(const int32_t *) b;
    return (x > y) - (x < y);
}

static void lost_add(struct region * region, struct sequence * sequence, const int32_t * positions, int32_t n) {
    int32_t * lost = n > 0 ? realloc(sequence->lost, (size_t) (sequence->n_lost + n) * sizeof(int32_t)) : NULL;
    if (!lost) {
        return;
    }
    memcpy(lost + sequence->n_lost, positions, (size_t) n * sizeof(int32_t));
    qsort(lost, (size_t) (sequence->n_lost + n), sizeof(int32_t), ascending);
    int32_t kept = 0;
    for (int32_t i = 0; i < sequence->n_lost + n; i++) {
        if (kept == 0 || lost[i] != lost[kept - 1]) {
            lost[kept++] = lost[i];
        }
    }
    region->n_lost += kept - sequence->n_lost;
    sequence->lost   = lost;
    sequence->n_lost = kept;
}

// What is known of positions from p0 to p1 (-1: to the end) is no more, or they have become others.
void lost_change(struct region * region, struct sequence * sequence, int32_t p0, int32_t p1, bool gone, int32_t delta, int32_t divide) {
    int32_t n = 0;
    for (int32_t i = 0; i < sequence->n_lost; i++) {
        const int32_t pos = sequence->lost[i];
        const bool    in  = pos >= p0 && (p1 < 0 || pos < p1);
        const int32_t now = !in ? pos : divide > 1 ? pos / divide : pos + delta;
        if (!(in && gone) && now >= 0) {
            sequence->lost[n++] = now;
        }
    }
    region->n_lost += n - sequence->n_lost;
    sequence->n_lost = n;
}

// A state was loaded: where cells are evicted, the positions that it lacks below its highest were. Its rows are sorted.
void lost_loaded(struct region * region, struct sequence * sequence) {
    bool slides = false;  // a small cache beside a large one has only the newest cells anyway
    for (const struct region * one = NULL; (one = region_of_memory(region->lib->get_memory(region->ctx), one));) {
        slides = slides || one->n_rows > region->n_rows;
    }
    lost_change(region, sequence, 0, -1, true, 0, 1);
    int32_t * positions = agent.evicts && !slides ? malloc((size_t) (sequence->highest + 1) * sizeof(int32_t)) : NULL;
    int32_t   n         = 0;
    for (int32_t pos = 0, i = 0; positions && pos < sequence->highest; pos++) {
        while (i < sequence->n && region->pos[sequence->rows[i]] < pos) {
            i++;
        }
        if (i == sequence->n || region->pos[sequence->rows[i]] != pos) {
            positions[n++] = pos;
        }
    }
    lost_add(region, sequence, positions, n);
    free(positions);
}

// The program removed positions of a sequence (-1: of each), copied one sequence to another, or kept only one.
void lost_removed(llama_memory_t memory, int32_t id, int32_t p0, int32_t p1, bool but) {
    pthread_mutex_lock(&agent.lock);
    for (struct region * region = NULL; (region = region_of_memory(memory, region));) {
        for (int32_t i = 0; region->n_lost && i < region->n_sequences; i++) {
            if (id < 0 || (region->sequences[i].id == id) != but) {
                lost_change(region, &region->sequences[i], p0, p1, true, 0, 1);
            }
        }
    }
    pthread_mutex_unlock(&agent.lock);
}

void lost_copied(llama_memory_t memory, int32_t from, int32_t to, int32_t p0, int32_t p1) {
    pthread_mutex_lock(&agent.lock);
    for (struct region * region = NULL; from != to && (region = region_of_memory(memory, region));) {
        if (region->n_rows > region->stream_rows) {
            region->copied = true;
            rows_reached(region, -1);
        }
        struct sequence * target = region->n_lost ? map_sequence(region, to, true) : NULL;
        struct sequence * source = target ? map_sequence(region, from, false) : NULL;
        for (int32_t i = 0; source && i < source->n_lost; i++) {
            if (source->lost[i] >= p0 && (p1 < 0 || source->lost[i] < p1)) {
                lost_add(region, target, &source->lost[i], 1);
            }
        }
    }
    pthread_mutex_unlock(&agent.lock);
}

// ---- the order --------------------------------------------------------------------------------------------------

// Positions of the sequence that are asked for and may go: never the last one, from which it goes on.
static int32_t choose(const struct region * region, const struct request * request, const struct sequence * sequence, int32_t * to) {
    const uint64_t most = request->max_bytes ? (request->max_bytes + region->cell_bytes - 1) / region->cell_bytes : UINT64_MAX;
    int32_t n = 0;
    for (int32_t i = 0; i < sequence->n && (uint64_t) n < most; i++) {
        const int32_t pos = region->pos[sequence->rows[i]];
        if (pos < sequence->highest && asked_for(request, pos)) {
            to[n++] = pos;
        }
    }
    return n;
}

// Nobody is in llama.cpp, and the map is fresh.
static void remove_cells(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    struct lib *   lib    = region->lib;
    llama_memory_t memory = lib->get_memory(region->ctx);
    pthread_mutex_lock(&agent.lock);
    struct sequence * sequence = map_sequence(region, request->sequence, false);
    const int32_t     before   = sequence ? sequence->n : 0;
    int32_t * positions = malloc((size_t) (before + 1) * sizeof(int32_t));
    const int32_t n = sequence && positions ? choose(region, request, sequence, positions) : 0;
    pthread_mutex_unlock(&agent.lock);
    int32_t done = 0;
    while (done < n) {
        int32_t end = done + 1;
        while (end < n && positions[end] == positions[end - 1] + 1) {
            end++;
        }
        if (!lib->seq_rm(memory, request->sequence, positions[done], positions[end - 1] + 1)) {
            snprintf(agent.problem, sizeof(agent.problem), "llama.cpp removes no part of this kind of cache");
            break;
        }
        done = end;
    }
    pthread_mutex_lock(&agent.lock);
    agent.memory_generation += done > 0;
    agent.evicts = agent.evicts || done > 0;
    lost_add(region, sequence, positions, done);
    pthread_mutex_unlock(&agent.lock);
    free(positions);
    if (done > 0 && map_refresh(region->ctx, lib)) {
        reply->cells += (uint64_t) (before - sequence->n);
        for (struct region * one = NULL; (one = region_of_memory(memory, one));) {
            drop_free(one, request, begin_s, reply);
        }
    }
    reply->status = sequence ? 0 : 1;
}

void order_evict(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    if (!region->ctx || !region->cells || !region->lib->seq_rm || !region->lib->get_memory) {
        reply->status = 1;
        snprintf(agent.problem, sizeof(agent.problem), "the calls of this cache's llama.cpp are not reached: nothing of it is removed");
        return;
    }
    // Not between two micro-batches: the graph that runs next looks at cells that it was told of before.
    if (gate_inside() || !gate_take_between_calls(END_PATIENCE_S)) {
        snprintf(agent.problem, sizeof(agent.problem), "the program is busy in llama.cpp: nothing can be removed now");
        reply->done = 0;
        return;
    }
    if (region->alive && (map_fresh(region) || map_refresh(region->ctx, region->lib))) {
        if (region->lib->synchronize) {
            region->lib->synchronize(region->ctx);  // a device may still be reading cells of the last graph
        }
        remove_cells(region, request, begin_s, reply);
    }
    gate_give();
}
