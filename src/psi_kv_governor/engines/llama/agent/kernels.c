// What is computed with keys: scores of keys alone, read in place from the rows of the cache, and the attention of sampled
// queries. Compiled for any processor, and once more for wider vectors (kernels_avx2.c).

#include <math.h>
#include <string.h>

#include "sampler.h"
#include "values.h"

#ifndef KERNEL
#define KERNEL(name) name##_any
#endif

// ---- scores of keys. No copy is made: a head's keys are gone over once or twice, and the second time they are still in
// the processor's cache.

#define INLINE static inline __attribute__((always_inline))

// One head of the keys of many cells.
struct head {
    const uint8_t * base;
    uint64_t        row_bytes;
    const int32_t * rows;
    int64_t         n;
    float *         out;      // [n] added to
    float *         scratch;  // [n]
    float           part;     // of the heads: 1 / their number
};

INLINE void key_of(const struct head * h, int64_t i, int32_t type, int64_t dim, float * key) {
    values_read(type, h->base + (uint64_t) h->rows[i] * h->row_bytes, key, dim);
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
        if ((type) == TYPE_F16 && (dim) == 64)        { function(h, TYPE_F16, 64); }           \
        else if ((type) == TYPE_F16 && (dim) == 128)  { function(h, TYPE_F16, 128); }          \
        else if ((type) == TYPE_Q8_0 && (dim) == 64)  { function(h, TYPE_Q8_0, 64); }          \
        else if ((type) == TYPE_Q8_0 && (dim) == 128) { function(h, TYPE_Q8_0, 128); }         \
        else                                               { function(h, type, dim); }                   \
    } while (0)

// Adds a score of the keys of rows[i] to out[i], averaged over the heads: with `cosine` the cosine between the key and
// the mean of all normalised keys, else the key's length over the mean length. `scratch` holds n floats. False when the
// keys can't be read.
bool KERNEL(keys_score)(const struct tensor * keys, bool cosine, const int32_t * rows, int64_t n, float * out, float * scratch) {
    if (!keys_readable(keys)) {
        return false;
    }
    const int64_t  dim        = keys->head_dim;
    const uint64_t head_bytes = values_bytes(keys->type, dim);
    const int64_t  heads      = (int64_t) (keys->row_bytes / head_bytes);
    for (int64_t i = 0; i < heads; i++) {
        const struct head h = {
            .base = (const uint8_t *) (uintptr_t) keys->base + (uint64_t) i * head_bytes,
            .row_bytes = keys->row_bytes, .rows = rows, .n = n, .out = out, .scratch = scratch,
            .part = 1.0f / (float) heads,
        };
        if (cosine) {
            SPECIALISED(cosines, &h, keys->type, dim);
        } else {
            SPECIALISED(norms, &h, keys->type, dim);
        }
    }
    return true;
}

// ---- attention

// In place: logits to their softmax. What is masked (-inf) becomes about 1e-38, which no sum can tell from 0.
static void softmax(float * logits, int64_t n, float highest) {
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
        logits[i] = exp_of(logits[i] - highest);
        sum += logits[i];
    }
    const float scale = 1.0f / sum;
    for (int64_t i = 0; i < n; i++) {
        logits[i] *= scale;
    }
}

// The attention of query heads [first, first + n) to keys of head `head_kv`, added to s->share.
static void add_heads(struct sampler * s, const struct ggml_tensor * node, int64_t token, int64_t first, int64_t n, int64_t head_kv) {
    const struct ggml_tensor * q = node->src[0];
    const struct ggml_tensor * k = node->src[1];
    const int64_t dim = k->ne[0], n_kv = k->ne[1];
    float         scale, cap, key[MAX_HEAD], highest[MAX_QUERIES];
    memcpy(&scale, (const float *) node->op_params + 0, sizeof(scale));
    memcpy(&cap, (const float *) node->op_params + 2, sizeof(cap));
    const char * query = (const char *) q->data + (size_t) token * q->nb[1] + (size_t) first * q->nb[2];
    for (int64_t h = 0; h < n; h++) {
        highest[h] = -INFINITY;
    }
    for (int64_t i = 0; i < n_kv; i++) {
        if (s->share[i] < 0.0f) {  // its page may have gone back to the kernel: do not even look at it
            for (int64_t h = 0; h < n; h++) {
                s->logits[h * s->n_cells + i] = -INFINITY;
            }
            continue;
        }
        values_read(k->type, (const uint8_t *) k->data + (size_t) i * k->nb[1] + (size_t) head_kv * k->nb[2], key, dim);
        for (int64_t h = 0; h < n; h++) {
            const float product = scale * dot(key, (const float *) (query + (size_t) h * q->nb[2]), dim);
            const float logit   = cap == 0.0f ? product : cap * tanhf(product / cap);
            highest[h]          = logit > highest[h] ? logit : highest[h];
            s->logits[h * s->n_cells + i] = logit;
        }
    }
    const float part = 1.0f / (float) q->ne[2];
    for (int64_t h = 0; h < n; h++) {
        float * logits = s->logits + h * s->n_cells;
        softmax(logits, n_kv, highest[h]);
        for (int64_t i = 0; i < n_kv; i++) {
            s->share[i] += s->share[i] < 0.0f ? 0.0f : logits[i] * part;
        }
    }
}

static void observe(struct sampler * s, const struct ggml_tensor * node, int64_t token) {
    const struct ggml_tensor * q = node->src[0];
    const struct ggml_tensor * k = node->src[1];
    const struct ggml_tensor * m = node->src[3];
    const int64_t    n_kv  = k->ne[1];
    const int64_t    group = q->ne[2] / k->ne[2];
    const uint32_t   query = s->queries - (uint32_t) (q->ne[1] - 1 - token);
    const uint16_t * mask  = (const uint16_t *) ((const char *) m->data + (size_t) token * m->nb[1]);
    const uint32_t   born  = s->written - (uint32_t) (q->ne[1] - 1 - token);
    int64_t          seen  = 0;
    for (int64_t i = 0; i < n_kv; i++) {
        s->share[i] = mask[i] ? -1.0f : 0.0f;  // without ALiBi a mask holds 0 and -inf only
        seen += !mask[i];
    }
    if (seen == 0) {
        return;
    }
    for (int64_t head_kv = 0; head_kv < k->ne[2]; head_kv++) {
        for (int64_t first = 0; first < group; first += MAX_QUERIES) {
            const int64_t n = group - first < MAX_QUERIES ? group - first : MAX_QUERIES;
            add_heads(s, node, token, head_kv * group + first, n, head_kv);
        }
    }
    for (int64_t i = 0; i < n_kv; i++) {
        if (s->share[i] < 0.0f || born - s->born[i] < (uint32_t) s->near) {
            continue;
        }
        const float times_equal = s->share[i] * (float) seen;
        s->sum[i]    = s->keep * s->sum[i] + times_equal;
        s->weight[i] = s->keep * s->weight[i] + 1.0f;
        if (times_equal > 1.0f) {
            s->used[i] = query;
        }
    }
}

static bool as_expected(const struct sampler * s, const struct ggml_tensor * node) {
    const struct ggml_tensor * q = node->src[0];
    const struct ggml_tensor * k = node->src[1];
    const struct ggml_tensor * m = node->src[3];
    return q->type == TYPE_F32 && m && m->type == TYPE_F16 && values_readable(k->type) && k->ne[0] <= MAX_HEAD &&
           k->ne[1] <= s->n_cells && k->ne[3] == 1 && q->ne[3] == 1 && m->ne[0] >= k->ne[1] && q->ne[2] % k->ne[2] == 0 &&
           q->data && m->data;
}

// A flash attention node after it ran: its inputs are still there.
void KERNEL(sampler_observe)(struct sampler * s, const struct ggml_tensor * node) {
    if (!as_expected(s, node)) {
        s->problem = 1;
        return;
    }
    const int64_t n_tokens = node->src[0]->ne[1];
    int64_t       token    = n_tokens > s->window ? n_tokens - s->window : 0;
    for (; token < n_tokens; token++) {
        observe(s, node, token);
    }
}
