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

static void summary_read(const uint8_t * from, float * to, int64_t n) {
    struct summary_head head;
    memcpy(&head, from, sizeof(head));
    from += sizeof(head);
    for (int64_t i = 0; i < n / 2; i++) {
        to[i]         = head.low + head.step * (float) (from[i] & 15);
        to[i + n / 2] = head.low + head.step * (float) (from[i] >> 4);
    }
}

// The highest share of attention that a cell of each block gets from query head `h` or, where it is parked, would get.
static void note_shares(struct recall * r, int64_t h, int64_t first_row, int64_t n_kv, const uint16_t * mask, float top) {
    const float * logits = r->logits + h * r->n_rows;
    float sum = 0.0f;
    for (int64_t i = 0; i < n_kv; i++) {
        const float part = exp_of(fminf(logits[i] - top, 0.0f));
        sum += mask[i] ? 0.0f : part;
    }
    const float all = top + logf(sum);  // what every share is a part of
    for (int64_t b = 0; b * BLOCK_CELLS < n_kv; b++) {
        float highest = -INFINITY;
        for (int64_t i = b * BLOCK_CELLS; i < (b + 1) * BLOCK_CELLS && i < n_kv; i++) {
            highest = logits[i] > highest ? logits[i] : highest;
        }
        float * now       = r->now + first_row / BLOCK_CELLS + b;
        const float share = highest > all - 40.0f ? 1.0f / (1.0f + expf(all - highest)) : 0.0f;
        *now              = share > *now ? share : *now;
    }
}

// One token at a flash attention node: its queries, head by head, against the keys that are live and those that are parked.
void KERNEL(recall_scores)(struct recall * r, int32_t layer, const struct ggml_tensor * node, int64_t first_row, int64_t token) {
    const struct ggml_tensor * q = node->src[0];
    const struct ggml_tensor * k = node->src[1];
    const struct ggml_tensor * m = node->src[3];
    const uint16_t * mask  = (const uint16_t *) ((const char *) m->data + (size_t) token * m->nb[1]);
    const int64_t    group = q->ne[2] / k->ne[2], dim = k->ne[0], n_kv = k->ne[1];
    float scale, cap, key[MAX_HEAD], top[MAX_QUERIES];
    memcpy(&scale, (const float *) node->op_params + 0, sizeof(scale));
    memcpy(&cap, (const float *) node->op_params + 2, sizeof(cap));
    for (int64_t first = 0; first < q->ne[2];) {
        const int64_t head = first / group, left = (head + 1) * group - first, n = left < MAX_QUERIES ? left : MAX_QUERIES;
        for (int64_t h = 0; h < n; h++) {
            top[h] = -INFINITY;
        }
        for (int64_t i = 0; i < n_kv; i++) {
            if (!mask[i]) {
                values_read(k->type, (const uint8_t *) k->data + (size_t) i * k->nb[1] + (size_t) head * k->nb[2], key, dim);
            } else if (r->parked[first_row + i]) {
                summary_read(recall_summary(r, first_row + i, layer, (int32_t) head), key, dim);
            }
            for (int64_t h = 0; h < n; h++) {
                float logit = -INFINITY;
                if (!mask[i] || r->parked[first_row + i]) {
                    logit = scale * dot(key, (const float *) ((const char *) q->data + (size_t) token * q->nb[1] + (size_t) (first + h) * q->nb[2]), dim);
                    logit = cap == 0.0f ? logit : cap * tanhf(logit / cap);
                }
                r->logits[h * r->n_rows + i] = logit;
                top[h] = !mask[i] && logit > top[h] ? logit : top[h];
            }
        }
        for (int64_t h = 0; h < n; h++) {
            note_shares(r, h, first_row, n_kv, mask, top[h]);
        }
        first += n;
    }
}
