// The summary of a parked cell: its keys of a layer in four bits a value, and what a query would think of them. Compiled
// twice, as kernels.c.
//
// Bounds of a whole block (the lowest and highest value in each channel: Quest, arXiv 2406.10774) take no more memory and
// find far less: with 16 cells a block the block of a hidden fact is among the wanted in 50 % of the cases by bounds,
// 61 % by bounds and means together, 89 % by four bits, 93 % by the keys themselves.

#include <math.h>

#include "recall.h"
#include "values.h"

#ifndef KERNEL
#define KERNEL(name) name##_any
#endif

#ifndef SUMMARY_HEAD
#define SUMMARY_HEAD
struct summary_head { float low, step; };  // before the values of a head, two a byte
#endif

// One head of one key: `n` values from `row`.
void KERNEL(summary_make)(uint8_t * to, int32_t type, const uint8_t * row, int64_t n) {
    float values[MAX_HEAD];
    values_read(type, row, values, n);
    struct summary_head head = {.low = values[0]};
    float high = values[0];
    for (int64_t i = 0; i < n; i++) {
        head.low = values[i] < head.low ? values[i] : head.low;
        high     = values[i] > high ? values[i] : high;
    }
    head.step = (high - head.low) / 15.0f;
    memcpy(to, &head, sizeof(head));
    const float scale = head.step > 0.0f ? 1.0f / head.step : 0.0f;
    for (int64_t i = 0; i < n / 2; i++) {
        const int32_t a = (int32_t) ((values[i] - head.low) * scale + 0.5f), b = (int32_t) ((values[i + n / 2] - head.low) * scale + 0.5f);
        to[sizeof(head) + (size_t) i] = (uint8_t) (a | b << 4);
    }
}

// A query head, as numbers that four bits can be multiplied with: the products are whole, and taken 16 at a time.
struct query {
    const float * values;
    int16_t       whole[MAX_HEAD];
    float         step, sum;       // of a whole number; of all values
    float         top;             // highest logit of a live cell
};

#define INLINE_HERE static inline __attribute__((always_inline))

INLINE_HERE void query_make(struct query * q, const float * values, int64_t dim) {
    float most = 0.0f, sum = 0.0f;
    for (int64_t i = 0; i < dim; i++) {
        most = fabsf(values[i]) > most ? fabsf(values[i]) : most;
        sum += values[i];
    }
    const float scale = most > 0.0f ? 32000.0f / most : 0.0f;
    for (int64_t i = 0; i < dim; i++) {
        q->whole[i] = (int16_t) (values[i] * scale);
    }
    q->values = values;
    q->step   = most / 32000.0f;
    q->sum    = sum;
    q->top    = -INFINITY;
}

INLINE_HERE int32_t whole_dot(const int16_t * a, const int16_t * b, int64_t n) {
    int32_t sum = 0;  // 15 x 32,000 x 1,024 fits
    for (int64_t i = 0; i < n; i++) {
        sum += (int32_t) a[i] * (int32_t) b[i];
    }
    return sum;
}

// The products of `n` queries with the summary of a parked cell, and with the key of a live one.
INLINE_HERE void parked_dots(const struct query * q, int64_t n, const uint8_t * summary, int64_t dim, float * to) {
    struct summary_head head;
    int16_t codes[MAX_HEAD];
    memcpy(&head, summary, sizeof(head));
    summary += sizeof(head);
    for (int64_t i = 0; i < dim / 2; i++) {
        codes[i]           = summary[i] & 15;
        codes[i + dim / 2] = summary[i] >> 4;
    }
    for (int64_t h = 0; h < n; h++) {
        to[h] = head.low * q[h].sum + head.step * q[h].step * (float) whole_dot(codes, q[h].whole, dim);
    }
}

// The products of `n_queries` queries with each of `n` summaries that lie `step` bytes apart: to[query][summary].
void KERNEL(summary_dots)(float * to, const float * queries, int64_t n_queries, const uint8_t * summaries, int64_t step, int64_t n, int64_t dim) {
    struct query q[MAX_QUERIES];
    float found[MAX_QUERIES];
    for (int64_t first = 0; first < n_queries; first += MAX_QUERIES) {
        const int64_t some = n_queries - first < MAX_QUERIES ? n_queries - first : MAX_QUERIES;
        for (int64_t h = 0; h < some; h++) {
            query_make(&q[h], queries + (first + h) * dim, dim);
        }
        for (int64_t i = 0; i < n; i++) {
            parked_dots(q, some, summaries + i * step, dim, found);
            for (int64_t h = 0; h < some; h++) {
                to[(first + h) * n + i] = found[h];
            }
        }
    }
}

INLINE_HERE void live_dots(const struct query * q, int64_t n, int32_t type, const uint8_t * row, int64_t dim, float * to) {
    float key[MAX_HEAD];
    values_read(type, row, key, dim);
    for (int64_t h = 0; h < n; h++) {
        to[h] = dot(key, q[h].values, dim);
    }
}

// One head of the keys at a flash attention node: what `n` queries get from each cell.
struct looked {
    struct recall * r;
    const struct ggml_tensor * k;
    const uint16_t * mask;
    const uint8_t *  parked;      // of the first cell
    int64_t first_row, head, n_kv;
    int32_t layer;
    float   scale, cap;
};

// The logits of the live cells one after the other, and the highest of each block. Gives the number of live cells.
INLINE_HERE int64_t logits_of(const struct looked * l, struct query * q, int64_t n, int32_t type, int64_t dim) {
    struct recall * r = l->r;
    const uint8_t * keys = (const uint8_t *) l->k->data + (size_t) l->head * l->k->nb[2];
    float   found[MAX_QUERIES], highest[MAX_QUERIES];
    int64_t n_live = 0;
    for (int64_t i = 0; i < l->n_kv; i++) {
        const bool live = !l->mask[i];
        for (int64_t h = 0; i % BLOCK_CELLS == 0 && h < n; h++) {
            highest[h] = -INFINITY;
        }
        if (live) {
            live_dots(q, n, type, keys + (size_t) i * l->k->nb[1], dim, found);
        } else if (l->parked[i]) {
            parked_dots(q, n, recall_summary(r, l->first_row + i, l->layer, (int32_t) l->head), dim, found);
        }
        for (int64_t h = 0; (live || l->parked[i]) && h < n; h++) {
            const float logit = l->cap == 0.0f ? l->scale * found[h] : l->cap * tanhf(l->scale * found[h] / l->cap);
            highest[h] = logit > highest[h] ? logit : highest[h];
            q[h].top   = live && logit > q[h].top ? logit : q[h].top;
            r->logits[h * r->n_rows + n_live] = logit;  // of a parked cell: written over by the next live one
        }
        n_live += live;
        for (int64_t h = 0; (i % BLOCK_CELLS == BLOCK_CELLS - 1 || i == l->n_kv - 1) && h < n; h++) {
            r->highest[h * r->n_blocks + i / BLOCK_CELLS] = highest[h];
        }
    }
    return n_live;
}

// The highest share of attention that a cell of each block gets from query `h` or, where it is parked, would get: as the
// logarithm of what it has over what the others have.
static void note_shares(const struct looked * l, int64_t h, int64_t n_live, float top) {
    struct recall * r      = l->r;
    const float *   logits = r->logits + h * r->n_rows, * highest = r->highest + h * r->n_blocks;
    float *         now    = r->now + l->first_row / BLOCK_CELLS;
    float sum = 0.0f;
    for (int64_t i = 0; i < n_live; i++) {
        sum += exp_of(logits[i] - top);
    }
    const float all = top + logf(sum);  // what every share is a part of
    for (int64_t b = 0; b * BLOCK_CELLS < l->n_kv; b++) {
        now[b] = highest[b] - all > now[b] ? highest[b] - all : now[b];
    }
}

// One token at a flash attention node: its queries, head by head, against the keys that are live and those that are parked.
void KERNEL(recall_scores)(struct recall * r, int32_t layer, const struct ggml_tensor * node, int64_t first_row, int64_t token) {
    const struct ggml_tensor * q = node->src[0];
    const struct ggml_tensor * k = node->src[1];
    const struct ggml_tensor * m = node->src[3];
    const int64_t group = q->ne[2] / k->ne[2], dim = k->ne[0];
    struct looked l = {
        .r = r, .k = k, .mask = (const uint16_t *) ((const char *) m->data + (size_t) token * m->nb[1]),
        .parked = r->parked + first_row, .first_row = first_row, .n_kv = k->ne[1], .layer = layer,
    };
    memcpy(&l.scale, (const float *) node->op_params + 0, sizeof(l.scale));
    memcpy(&l.cap, (const float *) node->op_params + 2, sizeof(l.cap));
    struct query queries[MAX_QUERIES];
    for (int64_t first = 0; first < q->ne[2];) {
        l.head = first / group;
        const int64_t left = (l.head + 1) * group - first, n = left < MAX_QUERIES ? left : MAX_QUERIES;
        for (int64_t h = 0; h < n; h++) {
            query_make(&queries[h], (const float *) ((const char *) q->data + (size_t) token * q->nb[1] + (size_t) (first + h) * q->nb[2]), dim);
        }
        // The usual sizes are constants to the compiler: no loops within a key.
        const int64_t n_live = k->type != TYPE_F16 ? logits_of(&l, queries, n, k->type, dim)
                               : dim == 64         ? logits_of(&l, queries, n, TYPE_F16, 64)
                               : dim == 128        ? logits_of(&l, queries, n, TYPE_F16, 128)
                                                   : logits_of(&l, queries, n, TYPE_F16, dim);
        for (int64_t h = 0; n_live > 0 && h < n; h++) {
            note_shares(&l, h, n_live, queries[h].top);
        }
        first += n;
    }
}
