// The mask: before a graph runs, -inf is written for parked cells into the mask that its attention takes.

#include <math.h>

#include "graph.h"

// Writes -inf for masked rows of one stream into the mask of one token. Whether one of them had been looked at.
static bool mask_token(const struct region * region, char * row, int32_t type, int64_t first, int64_t n_kv) {
    bool hid = false;
    for (int64_t j = 0; j < n_kv; j++) {
        if (!(region->flags[first + j] & ROW_MASKED)) {
            continue;
        }
        if (type == TYPE_F32) {
            float * value = (float *) row + j;
            hid           = hid || *value > -INFINITY;
            *value        = -INFINITY;
        } else {
            uint16_t * value = (uint16_t *) row + j;
            hid              = hid || *value != 0xfc00;
            *value           = 0xfc00;
        }
    }
    return hid;
}

void write_mask(const struct masked * one, const struct ggml_tensor * index) {
    struct region * region = one->region;
    const struct ggml_tensor * k = one->k;
    struct ggml_tensor * mask = one->mask;
    const int64_t n_kv = k->ne[1], n_tokens = mask->ne[1], n_stream = mask->ne[3];
    const int64_t first  = (int64_t) (((uint64_t) (uintptr_t) k->data - one->keys->base) / one->keys->row_bytes);
    const int64_t stride = n_stream > 1 ? (int64_t) (k->nb[3] / one->keys->row_bytes) : 0;
    for (int64_t s = 0; s < n_stream; s++) {
        const int64_t from = first + s * stride;
        if (from < 0 || from + n_kv > region->n_rows || mask->ne[0] < n_kv) {
            return;
        }
        for (int64_t t = 0; t < n_tokens; t++) {
            char * row = (char *) mask->data + (size_t) t * mask->nb[1] + (size_t) s * mask->nb[3];
            if (!mask_token(region, row, mask->type, from, n_kv) || !index || s * n_tokens + t >= index->ne[0]) {
                continue;
            }
            const int64_t own = index_at(index, s * n_tokens + t);
            if (own >= 0 && own < region->n_rows && !(region->flags[own] & ROW_AFFECTED)) {
                region->flags[own] |= ROW_AFFECTED;
                region->n_affected++;
            }
        }
    }
}
