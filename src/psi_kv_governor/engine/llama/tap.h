// What the parts of the native library share: the tensors of a cache, and the tap that sees them.

#pragma once

#include <stdbool.h>
#include <stdint.h>

#include "ggml-backend.h"
#include "ggml.h"

#define EXPORT __attribute__((visibility("default")))
#define MAX_TENSORS 1024

struct psikv_tensor {
    char     name[GGML_MAX_NAME];
    uint64_t base;       // address of cell 0's row
    uint64_t row_bytes;  // distance from one cell's row to the next
    uint64_t rows;       // cells
    int32_t  type;       // enum ggml_type
    int32_t  host;       // the rows are in this process's memory
    int32_t  contiguous; // one cell is one row; 0 for a transposed V
    int32_t  head_dim;   // values of one head in a row; 0 where the graph does not tell
    uint64_t index_source; // identity of the index tensor in the newest graph: same source, same cells
    int32_t  n_head;     // query heads of the flash attention that reads these keys; 0 without it
    int32_t  alibi;      // the attention adds a slope by position, which sampling does not follow
    int32_t  sampled;    // attention is sampled in this layer
    int32_t  reserved;
};

struct psikv_sampler;

struct psikv_tap {
    // These first: Python reads and writes them in place.
    int64_t log_count;
    int32_t problem;       // 1: indices not readable, 2: more tensors or indices than there is room for
    int32_t interrupt;     // somebody waits for the context and can't any longer
    int32_t interruptible; // the decode that runs is run again by whoever started it
    int32_t unused;
    struct psikv_tensor        tensors[MAX_TENSORS];
    const struct ggml_tensor * identity[MAX_TENSORS];
    int32_t   n_tensors;
    int32_t   cursor;  // tensors come in the same order in every graph, so the next one is nearly always here
    int32_t   leader;  // the tensor whose indices are logged
    bool      learning; // until the leader is chosen: heads are looked at as well
    int64_t * log;
    int64_t   log_capacity;
    bool (*is_host)(ggml_backend_buffer_t);
    struct psikv_sampler * sampler; // NULL until attention is wanted
};

bool psikv_tap_is_host(struct psikv_tap * tap, ggml_backend_buffer_t buffer);

// The tensor of the cache that `view` looks into, or NULL.
struct psikv_tensor * psikv_tap_find(struct psikv_tap * tap, const struct ggml_tensor * view);

// Tokens are about to be written into these cells.
void psikv_sampler_written(struct psikv_sampler * sampler, const int64_t * cells, int64_t n);

// A flash attention node, before (`ask`) and after it ran; before, gives whether it is to be seen after.
bool psikv_attention(struct psikv_tap * tap, const struct ggml_tensor * node, bool ask);

void psikv_sampler_free(struct psikv_sampler * sampler);
