// What happens around each graph: the rows that it writes are noted, parked cells are masked in its own mask, and of
// some graphs attention is sampled.

#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "recall.h"

// The call that this thread is in: whose tokens its graphs decode.
static __thread struct {
    struct llama_context * ctx;
    const struct llama_batch * batch;  // NULL: not known
    int32_t next;                      // first token of the batch that no graph has decoded yet
    struct region * touched[8];        // regions of the graph that runs
    int n_touched;
    const struct ggml_tensor * index[8];
} call;

// The program's own eval callback of each scheduler, behind which ours stands while attention is sampled.
static struct { ggml_backend_sched_t sched; ggml_backend_sched_eval_callback callback; void * user; } callbacks[MAX_CONTEXTS];

struct opcodes { struct lib * lib; int32_t set_rows, flash, view, reshape, permute, transpose, none, cont, cpy, rope, soft_max; };
static struct opcodes opcodes[8];

static const struct opcodes * opcodes_of(struct lib * lib) {
    static pthread_mutex_t once = PTHREAD_MUTEX_INITIALIZER;
    for (int i = 0; i < 8; i++) {
        if (__atomic_load_n(&opcodes[i].lib, __ATOMIC_ACQUIRE) == lib) {
            return &opcodes[i];
        }
    }
    const struct opcodes * answer = NULL;
    pthread_mutex_lock(&once);
    for (int i = 0; i < 8 && !answer; i++) {
        struct opcodes * o = &opcodes[i];
        if (o->lib == lib) {
            answer = o;
        } else if (!o->lib) {
            for (int32_t op = 0; op < 160 && lib->op_name; op++) {
                const char * name = lib->op_name(op);
                if (!name || !strcmp(name, "COUNT")) { break; }
                if (!strcmp(name, "SET_ROWS"))       { o->set_rows = op; }
                if (!strcmp(name, "FLASH_ATTN_EXT")) { o->flash = op; }
                if (!strcmp(name, "VIEW"))           { o->view = op; }
                if (!strcmp(name, "RESHAPE"))        { o->reshape = op; }
                if (!strcmp(name, "PERMUTE"))        { o->permute = op; }
                if (!strcmp(name, "TRANSPOSE"))      { o->transpose = op; }
                if (!strcmp(name, "CONT"))           { o->cont = op; }
                if (!strcmp(name, "CPY"))            { o->cpy = op; }
                if (!strcmp(name, "ROPE"))           { o->rope = op; }
                if (!strcmp(name, "SOFT_MAX"))       { o->soft_max = op; }
            }
            __atomic_store_n(&o->lib, lib, __ATOMIC_RELEASE);
            answer = o;
        }
    }
    pthread_mutex_unlock(&once);
    return answer ? answer : &opcodes[0];
}

void graph_call_begin(struct llama_context * ctx, const struct llama_batch * batch) {
    call.ctx   = ctx;
    call.batch = batch;
    call.next  = 0;
}

void graph_call_end(void) {
    call.ctx   = NULL;
    call.batch = NULL;
}

void graph_note_callback(ggml_backend_sched_t sched, ggml_backend_sched_eval_callback callback, void * user) {
    pthread_mutex_lock(&agent.lock);
    int at = -1;
    for (int i = 0; i < MAX_CONTEXTS; i++) {
        if (callbacks[i].sched == sched) { at = i; break; }
        if (!callbacks[i].sched && at < 0) { at = i; }
    }
    if (at >= 0) {
        callbacks[at].sched    = sched;
        callbacks[at].callback = callback;
        callbacks[at].user     = user;
    }
    pthread_mutex_unlock(&agent.lock);
}

void graph_forget_callback(ggml_backend_sched_t sched) {
    pthread_mutex_lock(&agent.lock);
    for (int i = 0; i < MAX_CONTEXTS; i++) {
        if (callbacks[i].sched == sched) {
            callbacks[i].sched = NULL;
        }
    }
    pthread_mutex_unlock(&agent.lock);
}

// ---- rows ---------------------------------------------------------------------------------------------------

static void row_fresh(struct region * region, int64_t row) {
    region->n_masked -= (region->flags[row] & ROW_MASKED) != 0;
    region->n_affected -= (region->flags[row] & ROW_AFFECTED) != 0;
    region->flags[row] = ROW_USED;
}

// Somebody wrote into rows without a graph (a state is loaded): what was known of them is no more.
void rows_overwritten(const struct ggml_tensor * t, size_t offset, size_t size) {
    const uint64_t address = (uint64_t) (uintptr_t) t->data + offset;
    pthread_mutex_lock(&agent.lock);
    struct region * region = size ? region_of_address(address) : NULL;
    struct tensor * tensor = region && region->cells ? region_tensor(region, address) : NULL;
    if (tensor && tensor == &region->tensors[region->leader]) {
        const int64_t row = (int64_t) ((address - tensor->base) / tensor->row_bytes);
        const int64_t n   = (int64_t) (size / tensor->row_bytes);
        for (int64_t i = row; i < row + n && i < region->n_rows; i++) {
            row_fresh(region, i);
            region->pos[i] = -1;
        }
        agent.memory_generation++;
    }
    pthread_mutex_unlock(&agent.lock);
}

static int64_t index_at(const struct ggml_tensor * index, int64_t i) {
    return index->type == TYPE_I64 ? ((const int64_t *) index->data)[i] : ((const int32_t *) index->data)[i];
}

// The sequence of the batch's next token, if the graph's tokens come in the order of the batch: positions tell.
static int32_t sequence_at(const struct llama_batch * batch, int32_t i) {
    return batch->n_seq_id && batch->seq_id ? (batch->n_seq_id[i] == 1 ? batch->seq_id[i][0] : -1) : 0;
}

// Whoever reads the cells of a parked sequence has them back: they are read ahead in runs, not page by page.
static void sequence_read(struct region * region, struct sequence * sequence) {
    for (int32_t i = 0; sequence->parked && i < sequence->n;) {
        int32_t       j   = i;
        const int32_t row = sequence->rows[i];
        for (; j < sequence->n && sequence->rows[j] == row + j - i && !(region->flags[row + j - i] & ROW_MASKED); j++) {
            region->flags[row + j - i] &= (uint8_t) ~ROW_PARKED;
        }
        for (int32_t t = 0; j > i && t < region->n_tensors; t++) {
            const uint64_t page = page_bytes() - 1, base = region->tensors[t].base, bytes = region->tensors[t].row_bytes;
            const uint64_t a = (base + (uint64_t) row * bytes) & ~page, b = base + (uint64_t) (row + j - i) * bytes;
            expect_pages(region, a < region->first ? region->first : a, b < region->last ? b : region->last);
        }
        i = j > i ? j : i + 1;
    }
    sequence->parked = false;
}

static void sequence_used(struct region * region, int32_t id) {
    struct sequence * sequence = id >= 0 ? map_sequence(region, id, true) : NULL;
    if (sequence) {
        sequence->used_s = region->used_s;
        sequence_read(region, sequence);
    }
}

// Its state is about to be saved: servers do that to each idle slot before they give it to somebody else.
void graph_state_read(struct llama_context * ctx, int32_t id) {
    pthread_mutex_lock(&agent.lock);
    for (int i = 0; i < MAX_REGIONS && ctx && id >= 0; i++) {
        struct region *   region   = &agent.regions[i];
        struct sequence * sequence = region->alive && region->cells && region->ctx == ctx ? map_sequence(region, id, false) : NULL;
        if (sequence && sequence->parked && map_fresh(region)) {
            sequence_read(region, sequence);
        }
    }
    pthread_mutex_unlock(&agent.lock);
}

// Whether some of the batch's tokens are of that sequence; of a batch that is not known, they may be.
static bool in_batch(const struct llama_batch * batch, int32_t id) {
    bool found = !batch;
    for (int32_t i = 0; batch && !found && i < batch->n_tokens; i++) {
        const int32_t one = sequence_at(batch, i);
        found = one < 0 || one == id;
    }
    return found;
}

static void note_rows(struct region * region, const struct ggml_tensor * index, const struct ggml_tensor * positions) {
    const int64_t n       = index->ne[0];
    const bool    placed  = positions && positions->type == TYPE_I32 && positions->data && positions->ne[0] >= n;
    const int32_t * pos   = placed ? positions->data : NULL;
    const struct llama_batch * batch = call.batch;
    bool          known   = batch && call.next + n <= batch->n_tokens && map_fresh(region);
    for (int64_t i = 0; known && placed && batch->pos && i < n; i++) {
        known = batch->pos[call.next + i] == pos[i];
    }
    known = known && (placed || n == 1);
    bool lossy = false;  // it is decoded without cells that were evicted
    for (int32_t i = 0; region->n_lost && i < region->n_sequences; i++) {
        lossy = lossy || (region->sequences[i].n_lost && in_batch(batch, region->sequences[i].id));
    }
    for (int64_t i = 0; i < n; i++) {
        const int64_t row = index_at(index, i);
        if (row < 0 || row >= region->n_rows) {
            continue;
        }
        const bool reused = region->flags[row] & ROW_USED;  // a sliding window writes over its own cells
        row_fresh(region, row);
        region->pos[row] = pos ? pos[i] : -1;
        if (lossy) {
            region->flags[row] |= ROW_AFFECTED;
            region->n_affected++;
        }
        const int32_t id = known ? sequence_at(batch, call.next + (int32_t) i) : -1;
        if (id < 0 || reused) {
            known = false;
        } else {
            map_append(region, id, (int32_t) row);
            sequence_used(region, id);
        }
    }
    if (!known) {
        agent.memory_generation++;
        for (int32_t i = 0; batch && i < batch->n_tokens; i++) {  // who is running is known all the same
            sequence_used(region, sequence_at(batch, i));
        }
    }
}

// ---- the mask -------------------------------------------------------------------------------------------------

static struct ggml_tensor * mask_leaf(const struct opcodes * o, struct ggml_tensor * mask) {
    for (int depth = 0; mask && depth < 8; depth++) {
        if (mask->view_src) {
            mask = mask->view_src;
        } else if (mask->op == o->cpy || mask->op == o->cont) {
            mask = mask->src[0];
        } else {
            return mask->op == o->none && strstr(mask->name, "kq_mask") ? mask : NULL;
        }
    }
    return NULL;
}

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

static void write_mask(struct region * region, const struct tensor * keys, const struct ggml_tensor * k, struct ggml_tensor * mask,
                       const struct ggml_tensor * index) {
    const int64_t n_kv = k->ne[1], n_tokens = mask->ne[1], n_stream = mask->ne[3];
    const int64_t first  = (int64_t) (((uint64_t) (uintptr_t) k->data - keys->base) / keys->row_bytes);
    const int64_t stride = n_stream > 1 ? (int64_t) (k->nb[3] / keys->row_bytes) : 0;
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

// ---- attention --------------------------------------------------------------------------------------------------

struct chained { ggml_backend_sched_eval_callback callback; void * user; struct lib * lib; };
static __thread struct chained chained;

static bool sampled_node(struct ggml_tensor * node) {
    if (node->op != opcodes_of(chained.lib)->flash) {
        return false;
    }
    struct region * region = region_of_address((uint64_t) (uintptr_t) node->src[1]->data);
    struct tensor * keys   = region && region->sampler ? region_tensor(region, (uint64_t) (uintptr_t) node->src[1]->data) : NULL;
    return keys && keys->sampled && sampler_due(region->sampler);
}

// The keys of a node whose queries are held against what is parked.
static struct tensor * recalled_node(struct ggml_tensor * node, struct region ** region) {
    if (node->op != opcodes_of(chained.lib)->flash) {
        return NULL;
    }
    *region = region_of_address((uint64_t) (uintptr_t) node->src[1]->data);
    return *region && recall_due(*region) ? region_tensor(*region, (uint64_t) (uintptr_t) node->src[1]->data) : NULL;
}

static bool observe(struct ggml_tensor * node, bool ask, void * user_data) {
    (void) user_data;
    struct region *       region   = NULL;
    const struct tensor * recalled = recalled_node(node, &region);
    const bool sampled = sampled_node(node), ours = sampled || recall_wants(region, recalled);
    const bool theirs = chained.callback && chained.callback(node, ask, chained.user);
    if (ask) {
        return ours || theirs;
    }
    if (sampled) {
        sampler_observe(region_of_address((uint64_t) (uintptr_t) node->src[1]->data)->sampler, node);
    }
    if (recall_wants(region, recalled)) {
        recall_observe(region, recalled, node);
    }
    return chained.callback ? theirs : true;
}

static void choose_layers(struct region * region) {
    int32_t keys[MAX_TENSORS], n = 0;
    for (int32_t i = 0; i < region->n_tensors; i++) {
        if (region->tensors[i].keys && region->tensors[i].n_head > 0 && !region->tensors[i].alibi) {
            keys[n++] = i;
        }
    }
    // Evenly spaced from the middle to five sixths of the depth: there attention looks things up.
    const int32_t from = n / 2, to = n * 5 / 6 > from ? n * 5 / 6 : from + 1;
    const int32_t count = agent.sample_layers < to - from ? agent.sample_layers : to - from;
    for (int32_t i = 0; i < count && n > 0; i++) {
        region->tensors[keys[from + (int32_t) ((i + 0.5) * (to - from) / count)]].sampled = true;
    }
    if (n > 0) {
        const float keep = powf(0.5f, 1.0f / (agent.sample_half_life * (float) count));
        region->sampler  = sampler_new(region->n_rows, agent.sample_every, agent.sample_window, keep, agent.sample_near);
    }
}

// ---- around the graph ---------------------------------------------------------------------------------------------

static void touch(struct region * region, const struct ggml_tensor * index) {
    for (int i = 0; i < call.n_touched; i++) {
        if (call.touched[i] == region) {
            call.index[i] = call.index[i] ? call.index[i] : index;
            return;
        }
    }
    if (call.n_touched < 8) {
        call.touched[call.n_touched]    = region;
        call.index[call.n_touched++]    = index;
        region->writes_all              = false;
        region->n_write_rows            = 0;
    }
}

static const struct ggml_tensor * index_of(const struct region * region) {
    for (int i = 0; i < call.n_touched; i++) {
        if (call.touched[i] == region) {
            return call.index[i];
        }
    }
    return NULL;
}

static struct region * region_of_tensor(const struct ggml_tensor * t) {
    const struct ggml_tensor * cache = t->view_src ? t->view_src : t;
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (agent.regions[i].alive && agent.regions[i].buffer == cache->buffer) {
            return &agent.regions[i];
        }
    }
    return NULL;
}

// The graph's own copy may be overwritten while it runs, once no node needs it any more.
static void copy_rows(struct region * region, const struct ggml_tensor * index) {
    if (index->ne[0] > region->write_capacity) {
        int64_t * rows = realloc(region->write_rows, (size_t) index->ne[0] * sizeof(int64_t));
        if (!rows) {
            region->writes_all = true;
            return;
        }
        region->write_rows     = rows;
        region->write_capacity = index->ne[0];
    }
    region->n_write_rows = index->ne[0];
    for (int64_t i = 0; i < index->ne[0]; i++) {
        region->write_rows[i] = index_at(index, i);
    }
}

static void learn_heads(struct tensor * keys, const struct ggml_tensor * node) {
    if (keys->n_head == 0) {
        float max_bias;
        memcpy(&max_bias, (const float *) node->op_params + 1, sizeof(max_bias));
        keys->head_dim = (int32_t) node->src[1]->ne[0];
        keys->alibi    = max_bias != 0.0f;
        keys->n_head   = (int32_t) node->src[0]->ne[2];
    }
}

void graph_before(struct lib * lib, ggml_backend_sched_t sched, struct ggml_cgraph * graph) {
    call.n_touched = 0;
    if (!lib->graph_n_nodes || !lib->graph_node || !lib->proven) {
        return;
    }
    const struct opcodes * o = opcodes_of(lib);
    const int              n = lib->graph_n_nodes(graph);
    const struct ggml_tensor * positions = NULL;
    pthread_mutex_lock(&agent.lock);
    // First the rows that are written: what was masked there before is other tokens now.
    for (int i = 0; i < n; i++) {
        struct ggml_tensor * node = lib->graph_node(graph, i);
        if (node->op == o->rope && !positions && node->src[1] && node->src[1]->op == o->none) {
            positions = node->src[1];
        }
        if (!node->view_src || node->op == o->view || node->op == o->reshape || node->op == o->permute || node->op == o->transpose) {
            continue;
        }
        struct region * region = region_of_tensor(node);
        if (!region) {
            continue;
        }
        struct tensor * tensor = region->cells ? region_tensor(region, (uint64_t) (uintptr_t) node->view_src->data) : NULL;
        if (node->op != o->set_rows || !tensor) {
            touch(region, NULL);
            region->writes_all = true;  // a shift of all positions, or a recurrent state
            continue;
        }
        tensor->whole_rows = node->ne[0] == tensor->identity->ne[0];
        const bool leads   = tensor == &region->tensors[region->leader];
        touch(region, leads ? node->src[1] : NULL);
        region->writes_all = region->writes_all || !node->src[1] || !lib->buffer_is_host || !node->src[1]->buffer;
    }
    const double now_s = agent_now_s();
    for (int i = 0; i < call.n_touched; i++) {
        struct region * region = call.touched[i];
        region->ctx    = region->ctx ? region->ctx : call.ctx;
        region->used_s = now_s;
        const struct ggml_tensor * index = call.index[i];
        if (index && index->data && (index->type == TYPE_I64 || index->type == TYPE_I32)) {
            note_rows(region, index, positions);
            copy_rows(region, index);
        } else {
            region->writes_all = true;
        }
        region->computing = true;
    }
    bool stale = false;
    for (int i = 0; i < call.n_touched; i++) {
        stale = stale || (call.touched[i]->cells && !map_fresh(call.touched[i]));
    }
    if (stale && agent.watched && call.ctx) {
        // This thread is the one that may look at its context, also between two micro-batches.
        pthread_mutex_unlock(&agent.lock);
        (void) map_refresh(call.ctx, lib);
        pthread_mutex_lock(&agent.lock);
    }
    bool due = false;
    struct ggml_tensor * done[16];
    int    n_done = 0;
    for (int i = 0; i < n && call.n_touched > 0; i++) {
        struct ggml_tensor * node = lib->graph_node(graph, i);
        if (node->op != o->flash || !node->src[1]) {
            continue;
        }
        struct region * region = region_of_tensor(node->src[1]);
        struct tensor * keys   = region && region->cells ? region_tensor(region, (uint64_t) (uintptr_t) node->src[1]->data) : NULL;
        if (!keys) {
            continue;
        }
        learn_heads(keys, node);
        struct ggml_tensor * mask = mask_leaf(o, node->src[3]);
        const bool usable = mask && mask->data && (mask->type == TYPE_F16 || mask->type == TYPE_F32) && lib->buffer_is_host &&
                            mask->buffer && lib->buffer_is_host(mask->buffer);
        if (usable != region->masks) {
            region->masks = usable;
            strcpy(region->why_no_mask, usable ? "" : "its attention takes no mask that can be written");
        }
        bool again = !usable || region->n_masked == 0;
        for (int j = 0; j < n_done; j++) {
            again = again || done[j] == mask;
        }
        if (!again && n_done < 16) {
            done[n_done++] = mask;
            write_mask(region, keys, node->src[1], mask, index_of(region));
        }
    }
    for (int i = 0; i < call.n_touched; i++) {
        struct region * region = call.touched[i];
        if (!region->masks && region->cells) {
            strcpy(region->why_no_mask, "flash attention is off: masked cells would be read all the same (flash_attn=True)");
        }
        if (agent.sample_every > 0 && region->cells && !region->sampler && region->masks) {
            choose_layers(region);
        }
        if (region->sampler && agent.sample_every > 0 && !region->writes_all) {
            sampler_written(region->sampler, region->write_rows, region->n_write_rows);
            due = due || sampler_due(region->sampler);
        }
        if (region->recall && !region->writes_all) {
            due = recall_before(region, call.batch, call.next, region->write_rows, region->n_write_rows) || due;
        }
    }
    chained = (struct chained){.lib = lib};
    bool known = false;  // whose callback is not known, because the table is full, keeps it: it is not sampled
    for (int i = 0; i < MAX_CONTEXTS; i++) {
        if (callbacks[i].sched == sched) {
            known            = true;
            chained.callback = callbacks[i].callback;
            chained.user     = callbacks[i].user;
        }
    }
    if (call.batch && call.n_touched > 0 && call.index[0]) {
        call.next += (int32_t) call.index[0]->ne[0];
    }
    pthread_mutex_unlock(&agent.lock);
    if (known && lib->set_eval_callback && (agent.sample_every > 0 || recall_settings.mode > 0)) {
        lib->set_eval_callback(sched, due ? observe : chained.callback, due ? NULL : chained.user);
    }
}

// A long prefill was in use until its end, and not only when it began.
void graph_after(void) {
    pthread_mutex_lock(&agent.lock);
    const double now_s = agent_now_s();
    for (int i = 0; i < call.n_touched; i++) {
        struct region * region = call.touched[i];
        for (int32_t j = 0; j < region->n_sequences; j++) {
            if (region->sequences[j].used_s == region->used_s) {
                region->sequences[j].used_s = now_s;
            }
        }
        region->used_s    = now_s;
        region->computing = false;
    }
    call.n_touched = 0;
    pthread_mutex_unlock(&agent.lock);
}
