// Attention, sampled while the model decodes: at the flash attention nodes of a few layers, the softmax of the
// newest queries over all cells is computed once more and added to a running mean for each cell.
//
// A cell's mean is `sum / weight`, both decaying with every observation that could see it. So a young cell is
// not at a disadvantage (its weight is small as well), and a cell that is masked (spilled, or free) keeps its
// last mean: nothing is added to it, and nothing decays.
//
// What a token's near neighbours gave it does not count: everybody looks at its neighbours. Were it counted, the
// last tokens of each of a prompt's batches would seem important, since its sampled queries are among them.

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "tap.h"
#include "values.h"

// Query heads whose logits are held at once; more in one group are done in turns.
#define MAX_QUERIES 8

struct psikv_sampler {
    int64_t    n_cells;
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

EXPORT struct psikv_sampler * psikv_sampler_new(int64_t n_cells, int32_t every, int32_t window, float keep) {
    struct psikv_sampler * s = calloc(1, sizeof(*s));
    if (!s) {
        return NULL;
    }
    s->n_cells = n_cells;
    s->every   = every;
    s->window  = window;
    s->keep    = keep;
    s->sum     = calloc((size_t) n_cells, sizeof(float));
    s->weight  = calloc((size_t) n_cells, sizeof(float));
    s->used    = calloc((size_t) n_cells, sizeof(uint32_t));
    s->born    = calloc((size_t) n_cells, sizeof(uint32_t));
    s->share   = calloc((size_t) n_cells, sizeof(float));
    s->logits  = calloc((size_t) n_cells * MAX_QUERIES, sizeof(float));
    if (!s->sum || !s->weight || !s->used || !s->born || !s->share || !s->logits) {
        psikv_sampler_free(s);
        return NULL;
    }
    return s;
}

void psikv_sampler_free(struct psikv_sampler * s) {
    if (s) {
        free(s->sum);
        free(s->weight);
        free(s->used);
        free(s->born);
        free(s->share);
        free(s->logits);
        free(s);
    }
}

// The sampler belongs to the tap from now on, which frees it.
EXPORT void psikv_tap_sample(struct psikv_tap * tap, struct psikv_sampler * sampler) {
    psikv_sampler_free(tap->sampler);
    tap->sampler = sampler;
}

EXPORT void           psikv_tap_sample_layer(struct psikv_tap * tap, int32_t i, int32_t on) { tap->tensors[i].sampled = on; }
EXPORT void           psikv_sampler_near(struct psikv_sampler * s, int32_t near) { s->near = near; }
EXPORT const float *  psikv_sampler_sum(const struct psikv_sampler * s) { return s->sum; }
EXPORT const float *  psikv_sampler_weight(const struct psikv_sampler * s) { return s->weight; }
EXPORT const uint32_t * psikv_sampler_used(const struct psikv_sampler * s) { return s->used; }
EXPORT uint32_t       psikv_sampler_queries(const struct psikv_sampler * s) { return s->queries; }
EXPORT int32_t        psikv_sampler_problem(const struct psikv_sampler * s) { return s->problem; }

EXPORT void psikv_sampler_forget(struct psikv_sampler * s) {
    memset(s->weight, 0, (size_t) s->n_cells * sizeof(float));
    memset(s->sum, 0, (size_t) s->n_cells * sizeof(float));
    memset(s->used, 0, (size_t) s->n_cells * sizeof(uint32_t));
}

void psikv_sampler_written(struct psikv_sampler * s, const int64_t * cells, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        s->sum[cells[i]]    = 0.0f;
        s->weight[cells[i]] = 0.0f;
        s->used[cells[i]]   = 0;
        s->born[cells[i]]   = ++s->written;
    }
    s->since += n > 1 ? s->every : 1;
    s->due = s->since >= s->every;
    if (s->due) {
        s->since = 0;
        s->queries += (uint32_t) (n < s->window ? n : s->window);
    }
}

// exp(x) for x <= 0 to a few parts in 10^7, in a form that compilers vectorise: expf would be three quarters
// of the whole cost.
static inline float exp_of(float x) {
    const float    y        = (x < -87.0f ? -87.0f : x) * 1.44269504f;
    const float    whole    = (float) (int32_t) (y - 0.5f);  // rounds to nearest, since y <= 0
    const float    rest     = (y - whole) * 0.69314718f;
    const uint32_t exponent = (uint32_t) ((int32_t) whole + 127) << 23;
    float          power;
    memcpy(&power, &exponent, sizeof(power));
    const float series = 1.0f / 120 + rest * (1.0f / 720);
    return power * (1.0f + rest * (1.0f + rest * (0.5f + rest * (1.0f / 6 + rest * (1.0f / 24 + rest * series)))));
}

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
static void add_heads(struct psikv_sampler * s, const struct ggml_tensor * node, int64_t token, int64_t first, int64_t n, int64_t head_kv) {
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

static void observe(struct psikv_sampler * s, const struct ggml_tensor * node, int64_t token) {
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

static bool as_expected(struct psikv_tap * tap, const struct ggml_tensor * node) {
    const struct ggml_tensor * q = node->src[0];
    const struct ggml_tensor * k = node->src[1];
    const struct ggml_tensor * m = node->src[3];
    return q->type == GGML_TYPE_F32 && m && m->type == GGML_TYPE_F16 && values_readable(k->type) &&
           k->ne[0] <= MAX_HEAD && k->ne[1] <= tap->sampler->n_cells && q->ne[3] == 1 && m->ne[0] >= k->ne[1] &&
           q->ne[2] % k->ne[2] == 0 && psikv_tap_is_host(tap, q->buffer) && psikv_tap_is_host(tap, m->buffer);
}

// Which keys a flash attention node reads, and with how many heads.
static void note_attention(struct psikv_tap * tap, const struct ggml_tensor * node) {
    struct psikv_tensor * keys = psikv_tap_find(tap, node->src[1]);
    if (keys) {
        float max_bias;
        memcpy(&max_bias, (const float *) node->op_params + 1, sizeof(max_bias));
        keys->head_dim = (int32_t) node->src[1]->ne[0];
        keys->n_head   = (int32_t) node->src[0]->ne[2];
        keys->alibi    = max_bias != 0.0f;
    }
}

bool psikv_attention(struct psikv_tap * tap, const struct ggml_tensor * node, bool ask) {
    struct psikv_sampler * s = tap->sampler;
    if (!s) {
        if (tap->learning) {
            note_attention(tap, node);
        }
        return false;
    }
    const struct psikv_tensor * keys = s->due ? psikv_tap_find(tap, node->src[1]) : NULL;
    if (!keys || !keys->sampled) {
        return !ask;
    }
    if (ask) {
        return true;
    }
    if (!as_expected(tap, node)) {
        s->problem = 1;
        return true;
    }
    const int64_t n_tokens = node->src[0]->ne[1];
    int64_t       token    = n_tokens > s->window ? n_tokens - s->window : 0;
    for (; token < n_tokens; token++) {
        observe(s, node, token);
    }
    return true;
}
