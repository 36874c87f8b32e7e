// A sampler of attention: one running mean for each cell.

#pragma once

#include "agent.h"

// Query heads whose logits are held at once; more in one group are done in turns.
#define MAX_QUERIES 8

struct sampler {
    int64_t    n_cells;
    bool       fast;     // this processor has the wide instructions
    int32_t    every;    // of tokens decoded singly, one in so many is sampled
    int32_t    window;   // last queries of a prompt's batch that are
    int32_t    near;     // nearer cells are not observed, in tokens; 0: all are
    float      keep;     // what is left of an older observation at the next one
    int32_t    since;    // tokens since the last sample
    bool       due;      // the graph that is about to run is sampled
    uint32_t   queries;  // tokens sampled so far, with those of the graph that is about to run
    int32_t    problem;  // 1: a node was not as expected, and nothing was taken from it
    float *    sum;      // [n_cells]
    float *    weight;   // [n_cells]
    uint32_t * used;     // [n_cells] number of the newest token that gave the cell more than an equal share
    uint32_t   written;  // tokens written so far
    uint32_t * born;     // [n_cells] number of the token that was written into the cell
    float *    share;    // [n_cells] attention of one query, mean over the heads; < 0: masked
    float *    logits;   // [MAX_QUERIES][n_cells]
};

// Each twice: for any processor, and for those of x86 with vectors of 256 bits (kernels_avx2.c).
bool fast_kernels(void);
void sampler_observe_any(struct sampler * sampler, const struct ggml_tensor * node);
void sampler_observe_avx2(struct sampler * sampler, const struct ggml_tensor * node);
bool keys_score_any(const struct tensor * keys, bool cosine, const int32_t * rows, int64_t n, float * out, float * scratch);
bool keys_score_avx2(const struct tensor * keys, bool cosine, const int32_t * rows, int64_t n, float * out, float * scratch);
