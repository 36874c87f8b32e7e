// Summaries of parked blocks, and who wants them back.

#pragma once

#include "sampler.h"

// Cells of a block: the fewer, the more guesses fit into the cells that are live. Of 46 hidden facts, 93 % are found with
// 16 cells and 85 % with 32, in the place of 192 others.
#define BLOCK_CELLS 16
#define MAX_RECALL_LAYERS 4
// Last tokens of a batch whose queries are held against the summaries.
#define TAIL_TOKENS 16
// Observations for which a block that was exchanged stays where it is.
#define REST 3
#define MOST_MARKED 1024
// Of a summary for each head: a low value, a step, and half a byte a value.
#define HEAD_BYTES(dim) (2 * sizeof(float) + (size_t) (dim) / 2)

struct recall {
    int64_t    n_rows, n_blocks;
    bool       fast;
    int32_t    n_layers, layers[MAX_RECALL_LAYERS];  // which tensors of the region
    int32_t    type, dim, heads;                     // of a key: values of a head, heads of a row
    size_t     head_bytes;                           // of a summary
    uint8_t *  summaries;                            // [n_rows][n_layers][heads][head_bytes]
    uint8_t *  summarised;                           // [n_rows]
    uint8_t *  parked;                               // [n_rows] masked cells of the sequence that runs
    float *    score;                                // [n_blocks] the highest share of attention of late
    float *    now;                                  // [n_blocks] the same in this call (until its end the logarithm of
                                                     // share / rest); < 0: not observed
    uint32_t * moved;                                // [n_blocks] observation at which it was last exchanged
    uint32_t   observed;
    int32_t    since, sequence;
    int64_t    first_token, last_token;              // of the graph that runs, those that are observed
    bool       due, any;
    float *    logits;                               // [MAX_QUERIES][n_rows] of the live cells, one after the other
    float *    highest;                              // [MAX_QUERIES][n_blocks]
};

struct recall_settings {
    int32_t mode, every, layers, sink_cells, window_cells;  // mode 0: off, 1: follow, 2: ahead
    bool    paused;                                  // memory is short: nothing comes in
    double  bytes_per_s;
    int32_t n_marked;
    struct { int32_t start, stop; } marked[MOST_MARKED];      // positions that are never given up
};

struct recall_told { uint64_t read_bytes, blocks_back, exchanges, decoded_again; };

extern struct recall_settings recall_settings;
extern struct recall_told recall_told;

void recall_summarise(struct region * region, const uint8_t * rows);   // those that are 3 are about to be parked
char * recall_tell(struct region * region, char * to, char * end);
float recall_wanted(const struct recall * recall, int64_t row);            // share of attention of late; NaN: not observed
void recall_forget(struct recall * recall);                                // what was wanted so far
void recall_free(struct recall * recall);
const char * recall_why_not(const struct region * region);             // NULL: it works
bool recall_before(struct region * region, const struct llama_batch * batch, int32_t next, const int64_t * rows, int64_t n);
bool recall_due(const struct region * region);
bool recall_wants(const struct region * region, const struct tensor * keys);  // the queries of this layer are observed
void recall_observe(struct region * region, const struct tensor * keys, const struct ggml_tensor * node);
bool exchange(struct region * region, bool question);                   // true: blocks came back
// Around a call of llama_decode: the position at which it begins if it may be done twice, else -1; and after it, whether
// blocks were exchanged and its tokens taken out, so that it has to be done again.
int32_t recall_begin(struct llama_context * ctx, struct lib * lib, const struct llama_batch * batch);
bool recall_end(struct llama_context * ctx, struct lib * lib, int32_t again_from);

static inline uint8_t * recall_summary(const struct recall * r, int64_t row, int32_t layer, int32_t head) {
    return r->summaries + (size_t) ((row * r->n_layers + layer) * r->heads + head) * r->head_bytes;
}

// Each twice, as in sampler.h.
void summary_make_any(uint8_t * to, int32_t type, const uint8_t * row, int64_t n);
void summary_make_avx2(uint8_t * to, int32_t type, const uint8_t * row, int64_t n);
void summary_dots_any(float * to, const float * queries, int64_t n_queries, const uint8_t * summaries, int64_t step, int64_t n, int64_t dim);
void summary_dots_avx2(float * to, const float * queries, int64_t n_queries, const uint8_t * summaries, int64_t step, int64_t n, int64_t dim);
void recall_scores_any(struct recall * recall, int32_t layer, const struct ggml_tensor * node, int64_t first_row, int64_t token);
void recall_scores_avx2(struct recall * recall, int32_t layer, const struct ggml_tensor * node, int64_t first_row, int64_t token);
