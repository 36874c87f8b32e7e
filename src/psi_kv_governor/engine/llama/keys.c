// Scores of keys alone, read in place from the rows of the cache. No copy is made: a head's keys are gone over
// once or twice, and the second time they are still in the processor's cache.

#include <math.h>
#include <string.h>

#include "tap.h"
#include "values.h"

#define INLINE static inline __attribute__((always_inline))

// One head of the keys of many cells.
struct head {
    const uint8_t * base;
    uint64_t        row_bytes;
    const int64_t * cells;
    int64_t         n;
    float *         out;      // [n] added to
    float *         scratch;  // [n]
    float           part;     // of the heads: 1 / their number
};

INLINE void key_of(const struct head * h, int64_t i, int32_t type, int64_t dim, float * key) {
    values_read(type, h->base + (uint64_t) h->cells[i] * h->row_bytes, key, dim);
}

INLINE void norms(const struct head * h, int32_t type, int64_t dim) {
    float  key[MAX_HEAD];
    double sum = 0.0;
    for (int64_t i = 0; i < h->n; i++) {
        key_of(h, i, type, dim, key);
        h->scratch[i] = sqrtf(dot(key, key, dim));
        sum += h->scratch[i];
    }
    const float scale = sum > 0.0 ? (float) ((double) h->n / sum) * h->part : 0.0f;
    for (int64_t i = 0; i < h->n; i++) {
        h->out[i] += h->scratch[i] * scale;
    }
}

INLINE void cosines(const struct head * h, int32_t type, int64_t dim) {
    float key[MAX_HEAD], anchor[MAX_HEAD];
    memset(anchor, 0, (size_t) dim * sizeof(float));
    for (int64_t i = 0; i < h->n; i++) {
        key_of(h, i, type, dim, key);
        const float norm    = sqrtf(dot(key, key, dim));
        const float inverse = norm > 0.0f ? 1.0f / norm : 0.0f;
        for (int64_t j = 0; j < dim; j++) {
            anchor[j] += key[j] * inverse;
        }
        h->scratch[i] = inverse;
    }
    const float length = sqrtf(dot(anchor, anchor, dim));
    const float scale  = length > 0.0f ? h->part / length : 0.0f;
    for (int64_t i = 0; i < h->n; i++) {
        key_of(h, i, type, dim, key);
        h->out[i] += dot(key, anchor, dim) * h->scratch[i] * scale;
    }
}

// The usual types and sizes are constants to the compiler: the loops over a key then have no loop, which
// makes them about twice as fast.
#define SPECIALISED(function, h, type, dim)                                                              \
    do {                                                                                                 \
        if ((type) == GGML_TYPE_F16 && (dim) == 64)        { function(h, GGML_TYPE_F16, 64); }           \
        else if ((type) == GGML_TYPE_F16 && (dim) == 128)  { function(h, GGML_TYPE_F16, 128); }          \
        else if ((type) == GGML_TYPE_Q8_0 && (dim) == 64)  { function(h, GGML_TYPE_Q8_0, 64); }          \
        else if ((type) == GGML_TYPE_Q8_0 && (dim) == 128) { function(h, GGML_TYPE_Q8_0, 128); }         \
        else                                               { function(h, type, dim); }                   \
    } while (0)

// Adds a score of the keys of cells[i] to out[i], averaged over the heads: with `cosine` the cosine between
// the key and the mean of all normalised keys, else the key's length over the mean length. `scratch` holds n
// floats. 0 when the keys can't be read.
EXPORT int32_t psikv_score_keys(const struct psikv_tensor * keys, int32_t cosine, const int64_t * cells, int64_t n, float * out, float * scratch) {
    const int64_t dim = keys->head_dim;
    if (dim <= 0 || dim > MAX_HEAD || !keys->host || !values_readable(keys->type)) {
        return 0;
    }
    const uint64_t head_bytes = values_bytes(keys->type, dim);
    const int64_t  heads      = (int64_t) (keys->row_bytes / head_bytes);
    for (int64_t i = 0; i < heads; i++) {
        const struct head h = {
            .base = (const uint8_t *) (uintptr_t) keys->base + (uint64_t) i * head_bytes,
            .row_bytes = keys->row_bytes, .cells = cells, .n = n, .out = out, .scratch = scratch,
            .part = 1.0f / (float) heads,
        };
        if (cosine) {
            SPECIALISED(cosines, &h, keys->type, dim);
        } else {
            SPECIALISED(norms, &h, keys->type, dim);
        }
    }
    return 1;
}
