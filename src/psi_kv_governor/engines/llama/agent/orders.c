// Acting on what was asked: parking, masking, writing and releasing, in slices and until a deadline.

#include <stdlib.h>
#include <string.h>

#include "protocol.h"
#include "recall.h"

#define SLICE_BYTES (8u << 20)
// Where there is a deadline and something has to be written for it: half a second of a disk that takes 2 MB/s.
#define URGENT_BYTES (1u << 20)
// How long after its beginning we wait for a graph that still reads what is masked now. In a file it can be taken meanwhile.
#define LONG_GRAPH_S(region) ((region)->backing == BACKING_FILE ? 1.0 : 0.25)

bool late(const struct request * request, double begin_s) {
    return request->deadline_s > 0 && agent_now_s() - begin_s >= request->deadline_s;
}

bool enough(const struct request * request, const struct reply * reply) {
    return request->max_bytes > 0 && reply->bytes >= request->max_bytes;
}

// Asks llama.cpp if the map is not what it would say, when nobody is in there. False: it stays as it was.
bool refresh_map(struct region * region, bool anyway) {
    if (!region->ctx || !region->cells || (!anyway && map_fresh(region))) {
        return region->ctx != NULL;
    }
    if (gate_inside() || !gate_take(true, PATIENCE_S)) {
        return false;
    }
    const bool done = region->alive && map_refresh(region->ctx, region->lib);
    gate_give();
    return done;
}

bool asked_for(const struct request * request, int32_t pos) {
    for (uint32_t i = 0; i < request->n_ranges; i++) {
        if (pos >= request->ranges[i].start && pos < request->ranges[i].stop) {
            return true;
        }
    }
    return request->n_ranges == 0;
}

// ---- parking --------------------------------------------------------------------------------------------------

static uint64_t slice_of(const struct region * region, const struct request * request) {
    return request->deadline_s > 0 && region->backing == BACKING_MEMORY ? URGENT_BYTES : SLICE_BYTES;
}

static void act_on(struct region * region, enum act act, uint64_t first, uint64_t last, struct reply * reply) {
    // A shared file holds what was written, whoever writes now; anonymous pages are moved while nobody writes them.
    const bool gate = region->backing == BACKING_MEMORY && act != ACT_DROP && act != ACT_PARK_HERE;
    if (gate && (gate_inside() || !gate_take(false, PATIENCE_S))) {
        snprintf(agent.problem, sizeof(agent.problem), "the program is busy in llama.cpp: nothing can be moved now");
        return;
    }
    if (act == ACT_PARK || act == ACT_PARK_HERE) {
        reply->bytes += park_pages(region, first, last, &reply->written);
    } else if (act == ACT_WRITE) {
        write_pages(region, first, last);
    } else {
        reply->bytes += drop_pages(region, first, last);
    }
    if (gate) {
        gate_give();
    }
}

// Rows [from, to) side by side, none of them 0.
struct run {
    int64_t from, to;
};

// The runs of rows that are asked for (2 and 3), with as many cold neighbours (1) as round their pages: `round` on either
// side. All that is free or parked already may be a neighbour, and a whole cache of 131,072 cells was looked at, 16 GB, for
// 1,024 of them. Gives their number; NULL for `runs` only counts.
static int64_t runs_in(const uint8_t * rows, int64_t n_rows, int64_t round, struct run * runs) {
    int64_t n = 0;
    for (int64_t from = 0, to; from < n_rows; from = to + 1) {
        int64_t first = -1, last = 0;
        for (to = from;; to++) {
            const bool ends = to == n_rows || !rows[to];
            if (first >= 0 && (ends || (rows[to] > 1 && to - last > 2 * round))) {
                if (runs) {
                    runs[n] = (struct run){
                        .from = first - round < from ? from : first - round, .to = last + 1 + round > to ? to : last + 1 + round,
                    };
                }
                n++;
                first = -1;
            }
            if (ends) {
                break;
            }
            if (rows[to] > 1) {
                first = first < 0 ? to : first;
                last  = to;
            }
        }
    }
    return n;
}

// Where a walk is over the pages of runs, tensor by tensor.
struct walk {
    const struct region * region;
    const struct run *    runs;
    int64_t               n_runs, run;
    uint64_t              slice, at, last;
    int32_t               tensor;
};

// The next pages that hold nothing but rows of a run; a slice at the most.
static bool walk_on(struct walk * w, uint64_t * first, uint64_t * last) {
    while (w->at >= w->last) {
        if (w->tensor >= w->region->n_tensors || !w->region->alive) {
            return false;
        }
        if (w->run >= w->n_runs) {
            w->run = 0;
            w->tensor++;
            continue;
        }
        const struct run * run = &w->runs[w->run++];
        if (!pages_of(w->region, &w->region->tensors[w->tensor], run->from, run->to, false, &w->at, &w->last)) {
            w->at = w->last = 0;
        }
    }
    *first = w->at;
    *last = w->at = w->at + w->slice < w->last ? w->at + w->slice : w->last;
    return true;
}

// Acts on rows that are asked for, page by page over all tensors. What has to be on the disk first is on its way there a
// slice ahead: a row is a few hundred bytes in each of many tensors, and one piece after the other the disk stands still.
void act_on_rows(struct region * region, const struct request * request, double begin_s, enum act act, const uint8_t * rows, struct reply * reply) {
    const bool    writes = region->backing == BACKING_FILE && (act == ACT_PARK || act == ACT_PARK_HERE);
    const int64_t round  = (int64_t) (page_bytes() / region->shortest_row_bytes) + 1;
    const int64_t n_runs = runs_in(rows, region->n_rows, round, NULL);
    struct run *  runs   = malloc((size_t) (n_runs + 1) * sizeof(struct run));
    if (!runs) {
        reply->done = 0;
        return;
    }
    (void) runs_in(rows, region->n_rows, round, runs);
    struct walk now = {.region = region, .runs = runs, .n_runs = n_runs, .slice = slice_of(region, request)}, ahead = now;
    uint64_t    first, last, on_its_way = 0;
    while (walk_on(&now, &first, &last)) {
        if (late(request, begin_s)) {
            reply->done = 0;
            break;
        }
        for (uint64_t a, b; writes && on_its_way < SLICE_BYTES && walk_on(&ahead, &a, &b); on_its_way += b - a) {
            write_pages(region, a, b);
        }
        act_on(region, act, first, last, reply);
        on_its_way -= writes ? last - first : 0;
    }
    free(runs);
}

void act_on_all(struct region * region, const struct request * request, double begin_s, enum act act, struct reply * reply) {
    const uint64_t slice = slice_of(region, request);
    for (uint64_t at = region->first; at < region->last; at += slice) {
        if (late(request, begin_s) || enough(request, reply)) {
            reply->done = 0;
            return;
        }
        act_on(region, act, at, at + slice < region->last ? at + slice : region->last, reply);
    }
}

// Parked rows so near to live ones may be back: over a prompt attention reads the cache in tiles of as many rows, whatever is
// masked in them (ggml's GGML_FA_TILE_KV). 14 MB of a context of 7,936 cells with 496 live ones stayed where they did not go again.
#define TILE_ROWS 64

static void choose_those_back(const struct region * region, uint8_t * rows) {
    for (int way = 0; way < 2; way++) {
        int64_t since_live = TILE_ROWS;
        for (int64_t k = 0; k < region->n_rows; k++) {
            const int64_t i      = way ? region->n_rows - 1 - k : k;
            const uint8_t flags  = region->flags[i];
            const bool    parked = flags & ROW_PARKED;
            since_live           = (flags & ROW_USED) && !parked ? 0 : since_live + 1;
            if (parked && rows[i] == 1 && since_live < TILE_ROWS) {
                rows[i] = 2;
            }
        }
    }
}

// Rows of the sequence that are asked for become 2, or 3 where they are masked only now; other cold ones (parked, free) 1. Rows that a sequence used later
// has as well stay out.
static void choose_rows(struct region * region, const struct request * request, struct sequence * sequence, uint8_t * rows, uint8_t set, struct reply * reply) {
    for (int64_t i = 0; i < region->n_rows; i++) {
        rows[i] = (region->flags[i] & ROW_PARKED) || !(region->flags[i] & ROW_USED);
    }
    for (int32_t i = 0; i < sequence->n; i++) {
        const int32_t row = sequence->rows[i];
        if ((region->flags[row] & ROW_USED) && asked_for(request, region->pos[row])) {
            rows[row] = 2;
        }
    }
    for (int32_t j = 0; !(set & ROW_MASKED) && j < region->n_sequences; j++) {
        const struct sequence * other = &region->sequences[j];
        for (int32_t i = 0; other != sequence && other->used_s > sequence->used_s && i < other->n; i++) {
            rows[other->rows[i]] = 0;
        }
    }
    for (int32_t i = 0; i < sequence->n; i++) {
        const int32_t row = sequence->rows[i];
        if (rows[row] == 2) {
            rows[row] = (set & ROW_MASKED) && !(region->flags[row] & ROW_MASKED) ? 3 : 2;
            reply->cells++;
            reply->masked += (set & ROW_MASKED) && !(region->flags[row] & ROW_MASKED);
            region->n_masked += (set & ROW_MASKED) && !(region->flags[row] & ROW_MASKED);
            region->flags[row] |= set;
        }
    }
    if (set & ROW_PARKED) {
        choose_those_back(region, rows);
    }
    sequence->parked = sequence->parked || (set & ROW_PARKED);
}

// A graph has its masks from its beginning, so the one that runs reads what is masked since. It read 140 MB back page by page,
// and took 2.5 s where it takes 0.1. What it waits for is written meanwhile: the kernel can take it at any moment.
static void let_graph_end(struct region * region, const struct request * request, double begin_s, const uint8_t * rows, struct reply * reply) {
    if (region->backing == BACKING_FILE) {
        act_on_rows(region, request, begin_s, ACT_WRITE, rows, reply);
    }
    pthread_mutex_lock(&agent.lock);
    graph_wait(region, LONG_GRAPH_S(region));
    pthread_mutex_unlock(&agent.lock);
}

void order_park(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    if (!region->ctx) {  // its states may be loaded at any moment, without the gate
        reply->status = 1;
        snprintf(agent.problem, sizeof(agent.problem), "the calls of this cache's llama.cpp are not reached: nothing of it is moved");
        return;
    }
    const bool masks = request->op == MASK || request->op == MARK;
    if (request->sequence < 0 && masks) {
        reply->status = 1;
        snprintf(agent.problem, sizeof(agent.problem), "what is masked is of one sequence, and none was named");
        return;
    }
    if (masks && !region->masks) {  // attention would read all of it, and bring it back with the next token
        reply->status = 1;
        snprintf(agent.problem, sizeof(agent.problem), "%s", region->why_no_mask);
        return;
    }
    if (request->sequence < 0) {
        act_on_all(region, request, begin_s, request->op == WRITE ? ACT_WRITE : ACT_PARK, reply);
        return;
    }
    (void) refresh_map(region, false);
    uint8_t * rows = region->cells ? malloc((size_t) region->n_rows) : NULL;
    pthread_mutex_lock(&agent.lock);
    map_settle(region);
    struct sequence * sequence = rows ? map_sequence(region, request->sequence, false) : NULL;
    if (sequence) {
        const uint8_t set = masks ? ROW_MASKED | ROW_PARKED : request->op == PARK ? ROW_PARKED : 0;
        choose_rows(region, request, sequence, rows, set, reply);
    }
    if (reply->masked > 0) {
        region->masked_in = region->computing ? region->n_graphs : 0;
    }
    const bool read = request->op == MASK && region->computing && region->masked_in == region->n_graphs && !gate_inside();
    pthread_mutex_unlock(&agent.lock);
    reply->status = sequence ? 0 : 1;
    if (sequence && masks) {
        recall_summarise(region, rows);
    }
    if (sequence && read) {
        let_graph_end(region, request, begin_s, rows, reply);
    }
    if (sequence && request->op != MARK) {  // marked rows go by a MASK that follows
        act_on_rows(region, request, begin_s, request->op == WRITE ? ACT_WRITE : ACT_PARK, rows, reply);
    }
    free(rows);
}
