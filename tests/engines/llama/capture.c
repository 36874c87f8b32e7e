// Copies the queries of one layer's flash attention out of a graph: what the tests compare samples with.
// Compiled by the tests against the installed ggml headers, and independent of the code under test.

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ggml.h"

#define MAX_VALUES (1 << 20)

struct capture {
    int32_t layer;
    int32_t n_tokens;
    int32_t n_head;
    int32_t dim;
    float   scale;
    float   queries[MAX_VALUES];  // [n_tokens][n_head][dim]
};

__attribute__((visibility("default"))) bool capture_eval(struct ggml_tensor * node, bool ask, void * user) {
    struct capture * to = user;
    if (node->op != GGML_OP_FLASH_ATTN_EXT) {
        return !ask;
    }
    if (atoi(strrchr(node->src[1]->view_src->name, 'l') + 1) != to->layer) {
        return !ask;
    }
    if (ask) {
        return true;
    }
    const struct ggml_tensor * q = node->src[0];
    to->dim      = (int32_t) q->ne[0];
    to->n_tokens = (int32_t) q->ne[1];
    to->n_head   = (int32_t) q->ne[2];
    memcpy(&to->scale, node->op_params, sizeof(to->scale));
    float * out = to->queries;
    for (int64_t token = 0; token < q->ne[1]; token++) {
        for (int64_t head = 0; head < q->ne[2]; head++, out += q->ne[0]) {
            memcpy(out, (const char *) q->data + token * q->nb[1] + head * q->nb[2], (size_t) q->ne[0] * sizeof(float));
        }
    }
    return true;
}
