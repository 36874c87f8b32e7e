// What the parts around a graph share.

#pragma once

#include "recall.h"

#define MAX_MASKS 16

// What one graph does to caches. llama.cpp lays a graph out once and decodes many tokens with it.
struct touched { struct region * region; const struct ggml_tensor * index; bool writes_all; };  // index: the rows it writes
struct masked { struct region * region; struct tensor * keys; const struct ggml_tensor * k; struct ggml_tensor * mask; };
struct walk {
    const struct ggml_cgraph * graph;  // NULL: it has to be looked through each time
    bool     known;                    // it was, and nothing has changed since
    uint64_t regions;                  // agent.region_changes then
    const struct ggml_tensor * positions;
    struct touched touched[MAX_REGIONS];  // as many as there are caches: never full
    int      n_touched;
    struct masked masks[MAX_MASKS];       // beyond, masked cells are read: slower, never wrong
    int      n_masks;
};

struct scheduler {
    ggml_backend_sched_t sched;
    ggml_backend_sched_eval_callback callback;  // the program's own, behind which ours stands while attention is sampled
    void *      user;
    struct walk walk;
};

// The call that this thread is in: whose tokens its graphs decode.
struct call {
    struct llama_context * ctx;
    const struct llama_batch * batch;  // NULL: not known
    int32_t next;                      // first token of the batch that no graph has decoded yet
    bool    again;                     // these tokens were decoded once already, and have been counted
    const struct walk * walk;          // of the graph that runs
};
extern __thread struct call call;

// ---- walk.c. The lock is held.

struct scheduler * scheduler_of(ggml_backend_sched_t sched);  // NULL: not known, because the table is full
const struct walk * walk_of(struct lib * lib, struct scheduler * scheduler, struct ggml_cgraph * graph);
// Whether an input's values can be read before its graph runs: it lies in the host's memory, and is not a copy (CUDA0#name#0)
// that the scheduler makes while the graph runs.
bool input_there(const struct lib * lib, const struct ggml_tensor * input);
const struct ggml_tensor * index_of(const struct walk * walk, const struct region * region);

// ---- rows.c. The lock is held.

int64_t index_at(const struct ggml_tensor * index, int64_t i);
void rows_written(struct region * region, const struct ggml_tensor * index, const struct ggml_tensor * positions);  // NULL: not known

// ---- mask.c. The lock is held.

void write_mask(const struct masked * one, const struct ggml_tensor * index);

// ---- observe.c

// Before a graph whose rows are noted. Whether some of its nodes are observed. The lock is held.
bool observed_next(struct region * region);
// Has the scheduler ask us about its nodes, and the program's own callback behind us, or only that one.
void observe_graph(struct lib * lib, struct scheduler * scheduler, bool due);
