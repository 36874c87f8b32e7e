// Recall: what is parked comes back when a question needs it. While something of a sequence is masked, the newest queries
// are held against the summaries of what is parked; blocks that would get more attention than what is live gets change
// places with the least attended live ones (exchange.c).

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "protocol.h"
#include "recall.h"
#include "values.h"

// What is left of a share at the next observation.
#define LEFT 0.8f
// A batch of so many tokens is decoded again at the most: a quarter of a second of prefill on the demo model.
#define MOST_AGAIN 256
#define LEAST_AGAIN 3
// Where in the depth the layer lies whose keys are summarised. Of SmolLM2-135M's layers 0 to 29, the 18th puts the block of a
// hidden fact among the first four of 476 for 29 of 29 questions in four texts, the 15th between the first and the 64th.
#define LAYER_DEPTH 0.6
// Of a block's bytes that its summary may take.
#define MOST_SUMMARY 0.02

struct recall_settings recall_settings;
struct recall_told recall_told;

// ---- summaries --------------------------------------------------------------------------------------------------

static int32_t choose(const struct region * region, int32_t * layers) {
    int32_t keys[MAX_TENSORS], n = 0;
    for (int32_t i = 0; i < region->n_tensors; i++) {
        const struct tensor * t = &region->tensors[i];
        if (t->keys && t->n_head > 0 && !t->alibi && t->whole_rows && keys_readable(t)) {
            keys[n++] = i;
        }
    }
    const struct tensor * first = n ? &region->tensors[keys[(int32_t) (LAYER_DEPTH * n)]] : NULL;
    if (!first || first->head_dim % 2) {
        return 0;
    }
    const uint64_t heads = first->row_bytes / values_bytes(first->type, first->head_dim);
    int32_t count = (int32_t) (MOST_SUMMARY * (double) region->cell_bytes / (double) (heads * HEAD_BYTES(first->head_dim)));
    count         = count < recall_settings.layers ? count : recall_settings.layers;
    int32_t found = 0;
    for (int32_t i = (int32_t) (LAYER_DEPTH * n); i < n && found < count && found < MAX_RECALL_LAYERS; i += n / 10 > 0 ? n / 10 : 1) {
        const struct tensor * t = &region->tensors[keys[i]];
        if (t->type == first->type && t->row_bytes == first->row_bytes && t->head_dim == first->head_dim) {
            layers[found++] = keys[i];
        }
    }
    return found;
}

const char * recall_why_not(const struct region * region) {
    int32_t layers[MAX_RECALL_LAYERS];
    if (!region->cells)  { return "a recurrent state has no cells"; }
    if (!region->masks)  { return region->why_no_mask; }
    if (!region->recall && choose(region, layers) == 0) {
        return "its keys can't be read here, or their summaries would take more than 2 % of what is parked";
    }
    return NULL;
}

void recall_free(struct recall * r) {
    if (r) {
        free(r->summaries), free(r->summarised), free(r->parked), free(r->score), free(r->now), free(r->moved);
        free(r->logits), free(r->highest);
        free(r);
    }
}

static struct recall * recall_new(const struct region * region) {
    struct recall * r = calloc(1, sizeof(*r));
    if (!r) {
        return NULL;
    }
    r->n_layers = choose(region, r->layers);
    r->n_rows   = region->n_rows;
    r->n_blocks = (region->n_rows + BLOCK_CELLS - 1) / BLOCK_CELLS;
    r->fast     = fast_kernels();
    r->observed = REST;  // the first exchange waits for nothing
    if (r->n_layers > 0) {
        const struct tensor * t = &region->tensors[r->layers[0]];
        r->type  = t->type;
        r->dim   = t->head_dim;
        r->heads = (int32_t) (t->row_bytes / values_bytes(t->type, t->head_dim));
    }
    // Not touched before they are needed: what is resident grows with what is parked.
    const size_t rows = (size_t) r->n_rows, blocks = (size_t) r->n_blocks;
    r->head_bytes = HEAD_BYTES(r->dim);
    r->summaries  = calloc(rows, (size_t) r->n_layers * (size_t) r->heads * r->head_bytes + 1);
    r->summarised = calloc(rows, 1);
    r->parked     = calloc(rows, 1);
    r->score      = calloc(blocks, sizeof(float));
    r->now        = calloc(blocks, sizeof(float));
    r->moved      = calloc(blocks, sizeof(uint32_t));
    r->logits     = calloc(rows, MAX_QUERIES * sizeof(float));
    r->highest    = calloc(blocks, MAX_QUERIES * sizeof(float));
    if (!r->n_layers || !r->summaries || !r->summarised || !r->parked || !r->score || !r->now || !r->moved || !r->logits || !r->highest) {
        recall_free(r);
        return NULL;
    }
    return r;
}

// Reads the keys in place: they are about to be parked, and still in memory.
void recall_summarise(struct region * region, const uint8_t * rows) {
    if (recall_settings.mode == 0) {
        return;
    }
    if (!region->recall) {
        struct recall * made = recall_why_not(region) ? NULL : recall_new(region);
        pthread_mutex_lock(&agent.lock);
        region->recall = made;
        pthread_mutex_unlock(&agent.lock);
    }
    struct recall * r = region->recall;
    for (int64_t row = 0; r && row < r->n_rows; row++) {
        for (int32_t l = 0; rows[row] == 3 && l < r->n_layers; l++) {
            const struct tensor * t = &region->tensors[r->layers[l]];
            const uint8_t * keys = (const uint8_t *) (uintptr_t) t->base + (uint64_t) row * t->row_bytes;
            for (int32_t h = 0; h < r->heads; h++) {
                (r->fast ? summary_make_avx2 : summary_make_any)(recall_summary(r, row, l, h), r->type, keys + (uint64_t) h * values_bytes(r->type, r->dim), r->dim);
            }
        }
        r->summarised[row] = r->summarised[row] || rows[row] == 3;
    }
}

// ---- demand ---------------------------------------------------------------------------------------------------------

static int32_t only_sequence(const struct llama_batch * batch, int32_t i) {
    return batch->n_seq_id && batch->seq_id ? (batch->n_seq_id[i] == 1 ? batch->seq_id[i][0] : -1) : 0;
}

void recall_forget(struct recall * r) {
    if (r && r->observed > REST) {
        r->observed = REST;
        memset(r->score, 0, (size_t) r->n_blocks * sizeof(float));
        memset(r->moved, 0, (size_t) r->n_blocks * sizeof(uint32_t));
    }
}

// Before a graph that decodes `n` tokens into `rows`, the tokens `next` and on of the batch: whether it is observed.
// The lock is held.
bool recall_before(struct region * region, const struct llama_batch * batch, int32_t next, const int64_t * rows, int64_t n) {
    struct recall * r = region->recall;
    if (!r) {
        return false;
    }
    r->due = false;
    if (region->n_masked == 0) {
        recall_forget(r);  // all is back: when pressure returns, other questions count
    }
    for (int64_t i = 0; i < n && rows[i] >= 0 && rows[i] < r->n_rows; i++) {
        r->score[rows[i] / BLOCK_CELLS] = 0.0f;  // nobody asked for what is there now
    }
    if (recall_settings.mode == 0 || region->n_masked == 0 || !batch || n < 1 || next + n > batch->n_tokens) {
        return false;
    }
    r->since += n > 1 ? recall_settings.every : 1;
    if (r->since < recall_settings.every) {
        return false;
    }
    r->since       = 0;
    r->first_token = n > TAIL_TOKENS ? n - TAIL_TOKENS : 0;
    r->last_token  = n - 1;
    r->sequence    = only_sequence(batch, next + (int32_t) n - 1);
    for (int64_t i = 0; i < n; i++) {
        if (only_sequence(batch, next + (int32_t) i) != r->sequence) {  // several conversations: one token, by turns
            const int64_t one = (int64_t) (r->observed % (uint32_t) n);
            r->first_token = r->last_token = one;
            r->sequence = only_sequence(batch, next + (int32_t) one);
            break;
        }
    }
    const int64_t row = rows[r->last_token];
    struct sequence * sequence = r->sequence >= 0 ? map_sequence(region, r->sequence, false) : NULL;
    if (!sequence || row < 0 || row >= region->n_rows || (batch->pos && batch->pos[next + r->last_token] != region->pos[row])) {
        return false;  // the graph's tokens may come in another order than the batch's
    }
    memset(r->parked, 0, (size_t) r->n_rows);
    for (int32_t i = 0; i < sequence->n; i++) {
        const int32_t cell = sequence->rows[i];
        if ((region->flags[cell] & ROW_MASKED) && r->summarised[cell]) {
            r->parked[cell] = r->due = true;
        }
    }
    for (int64_t b = 0; r->due && b < r->n_blocks; b++) {
        r->now[b] = -INFINITY;
    }
    r->any = false;
    return r->due;
}

bool recall_due(const struct region * region) { return region->recall && region->recall->due; }

bool recall_wants(const struct region * region, const struct tensor * keys) {
    for (int32_t l = 0; keys && l < region->recall->n_layers; l++) {
        if (&region->tensors[region->recall->layers[l]] == keys) {
            return true;
        }
    }
    return false;
}

void recall_observe(struct region * region, const struct tensor * keys, const struct ggml_tensor * node) {
    struct recall * r = region->recall;
    const struct ggml_tensor * q = node->src[0];
    const struct ggml_tensor * k = node->src[1];
    const struct ggml_tensor * m = node->src[3];
    const int64_t first = (int64_t) (((uint64_t) (uintptr_t) k->data - keys->base) / keys->row_bytes);
    if (q->type != TYPE_F32 || !q->data || !m || m->type != TYPE_F16 || !m->data || k->type != r->type || k->ne[0] != r->dim ||
        k->ne[2] != r->heads || k->ne[3] != 1 || q->ne[3] != 1 || q->ne[1] <= r->last_token || first < 0 || first % BLOCK_CELLS ||
        first + k->ne[1] > r->n_rows || m->ne[0] < k->ne[1] || q->ne[2] % k->ne[2]) {
        return;
    }
    for (int32_t l = 0; l < r->n_layers; l++) {
        for (int64_t t = r->first_token; &region->tensors[r->layers[l]] == keys && t <= r->last_token; t++) {
            (r->fast ? recall_scores_avx2 : recall_scores_any)(r, l, node, first, t);
            r->any = true;
        }
    }
}

float recall_wanted(const struct recall * r, int64_t row) {
    return r && recall_settings.mode > 0 && r->observed > REST ? r->score[row / BLOCK_CELLS] : NAN;  // it begins at REST
}

// ---- around a call ------------------------------------------------------------------------------------------------------

// The only cache of the context, while something of it is masked.
static struct region * region_of_context(const struct llama_context * ctx) {
    struct region * found = NULL;
    int n = 0;
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (agent.regions[i].alive && agent.regions[i].ctx == ctx) {
            found = &agent.regions[i];
            n++;
        }
    }
    return n == 1 && found->cells && found->recall && found->n_masked > 0 ? found : NULL;
}

int32_t recall_begin(struct llama_context * ctx, struct lib * lib, const struct llama_batch * b) {
    if (recall_settings.mode < 2 || !region_of_context(ctx) || !lib->seq_rm || !lib->pos_max || !lib->get_memory ||
        !b->token || b->embd || b->n_tokens < LEAST_AGAIN || b->n_tokens > MOST_AGAIN) {
        return -1;
    }
    const int32_t sequence = only_sequence(b, 0);
    const int32_t from     = sequence < 0 ? -1 : lib->pos_max(lib->get_memory(ctx), sequence) + 1;
    for (int32_t i = 0; from > 0 && i < b->n_tokens; i++) {
        // Only the end of a prompt: drafts that are verified ask for what comes after each of them.
        if (only_sequence(b, i) != sequence || (b->pos && b->pos[i] != from + i) ||
            (b->logits && b->logits[i] && i < b->n_tokens - 1)) {
            return -1;
        }
    }
    return from > 0 ? from : -1;
}

bool recall_end(struct llama_context * ctx, struct lib * lib, int32_t again_from) {
    pthread_mutex_lock(&agent.lock);
    struct region * region = recall_settings.mode > 0 && !agent.forked ? region_of_context(ctx) : NULL;
    struct recall * r      = region ? region->recall : NULL;
    const bool observed    = r && r->due && r->any;
    if (observed) {
        r->due = false;
        r->observed++;
        for (int64_t b = 0; b < r->n_blocks; b++) {
            r->now[b]   = r->now[b] > -INFINITY ? 1.0f / (1.0f + expf(-r->now[b])) : -1.0f;
            r->score[b] = r->now[b] > LEFT * r->score[b] ? r->now[b] : LEFT * r->score[b];
        }
    }
    pthread_mutex_unlock(&agent.lock);
    // Somebody else's order may be under way: then another time.
    if (!observed || recall_settings.paused || pthread_mutex_trylock(&serving) != 0) {
        return false;
    }
    const bool changed = exchange(region, again_from >= 0);
    pthread_mutex_unlock(&serving);
    if (!changed || again_from < 0 || !lib->seq_rm(lib->get_memory(ctx), r->sequence, again_from, -1)) {
        return false;
    }
    pthread_mutex_lock(&agent.lock);
    agent.memory_generation++;
    recall_told.decoded_again++;
    pthread_mutex_unlock(&agent.lock);
    return true;
}

// The totals of the process, the bytes of a cell's summary, and why it does not work here.
char * recall_tell(struct region * region, char * to, char * end) {
    const struct recall * r = region->recall;
    const char * why  = recall_why_not(region);
    uint64_t told[5] = {recall_told.read_bytes, recall_told.blocks_back, recall_told.exchanges, recall_told.decoded_again,
                        r ? (uint64_t) r->n_layers * (uint64_t) r->heads * r->head_bytes : 0};
    to = put(to, end, told, sizeof(told));
    return why ? put(to, end, why, strlen(why)) : to;
}
