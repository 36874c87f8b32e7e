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

#include "agent.h"
#include "recall.h"
#include "values.h"

struct sampler * sampler_new(int64_t n_cells, int32_t every, int32_t window, float keep, int32_t near) {
    struct sampler * s = calloc(1, sizeof(*s));
    if (!s) {
        return NULL;
    }
    s->n_cells = n_cells;
    s->fast    = fast_kernels();
    s->every   = every;
    s->window  = window;
    s->near    = near;
    s->keep    = keep;
    s->sum     = calloc((size_t) n_cells, sizeof(float));
    s->weight  = calloc((size_t) n_cells, sizeof(float));
    s->used    = calloc((size_t) n_cells, sizeof(uint32_t));
    s->born    = calloc((size_t) n_cells, sizeof(uint32_t));
    s->share   = calloc((size_t) n_cells, sizeof(float));
    s->logits  = calloc((size_t) n_cells * MAX_QUERIES, sizeof(float));
    if (!s->sum || !s->weight || !s->used || !s->born || !s->share || !s->logits) {
        sampler_free(s);
        return NULL;
    }
    return s;
}

void sampler_free(struct sampler * s) {
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

bool sampler_due(const struct sampler * s) { return s->due; }
bool sampler_failed(const struct sampler * s) { return s->problem != 0; }

size_t sampler_memory(struct sampler * s, void * parts[3]) {
    parts[0] = s->sum;
    parts[1] = s->weight;
    parts[2] = s->used;
    return (size_t) s->n_cells * sizeof(float);
}

float sampler_attention(const struct sampler * s, int64_t row) {
    return s->weight[row] > 0.0f ? s->sum[row] / s->weight[row] : NAN;
}

float sampler_last_used(const struct sampler * s, int64_t row) {
    return s->weight[row] > 0.0f ? (float) s->used[row] : NAN;
}

double sampler_born(const struct sampler * s, int64_t row) { return s->born[row]; }

void sampler_again(struct sampler * s, int64_t n) { s->written -= n < s->written ? (uint32_t) n : s->written; }

void sampler_written(struct sampler * s, const int64_t * cells, int64_t n, bool again) {
    for (int64_t i = 0; i < n; i++) {
        if (again && s->born[cells[i]] == s->written + 1) {
            s->written++;  // the same token in the same cell
            continue;
        }
        s->sum[cells[i]]    = 0.0f;
        s->weight[cells[i]] = 0.0f;
        s->used[cells[i]]   = 0;
        s->born[cells[i]]   = ++s->written;
    }
    if (again) {
        s->due = false;
        return;
    }
    s->since += n > 1 ? s->every : 1;
    s->due = s->since >= s->every;
    if (s->due) {
        s->since = 0;
        s->queries += (uint32_t) (n < s->window ? n : s->window);
    }
}

void sampler_observe(struct sampler * s, const struct ggml_tensor * node) {
    if (!s->fast) {
        sampler_observe_any(s, node);
    } else {
        sampler_observe_avx2(s, node);
    }
}

bool fast_kernels(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

#if !defined(__x86_64__)
void sampler_observe_avx2(struct sampler * s, const struct ggml_tensor * node) { sampler_observe_any(s, node); }
bool keys_score_avx2(const struct tensor * keys, bool cosine, const int32_t * rows, int64_t n, float * out, float * scratch) {
    return keys_score_any(keys, cosine, rows, n, out, scratch);
}
void summary_make_avx2(uint8_t * to, int32_t type, const uint8_t * row, int64_t n) { summary_make_any(to, type, row, n); }
void recall_scores_avx2(struct recall * r, int32_t layer, const struct ggml_tensor * node, int64_t first_row, int64_t token) {
    recall_scores_any(r, layer, node, first_row, token);
}
void summary_dots_avx2(float * to, const float * queries, int64_t n_queries, const uint8_t * summaries, int64_t step, int64_t n, int64_t dim) {
    summary_dots_any(to, queries, n_queries, summaries, step, n, dim);
}
#endif

bool keys_readable(const struct tensor * keys) {
    return keys->keys && keys->head_dim > 0 && keys->head_dim <= MAX_HEAD && values_readable(keys->type);
}

bool keys_score(const struct tensor * keys, bool cosine, const int32_t * rows, int64_t n, float * out, float * scratch) {
    return fast_kernels() ? keys_score_avx2(keys, cosine, rows, n, out, scratch) : keys_score_any(keys, cosine, rows, n, out, scratch);
}
