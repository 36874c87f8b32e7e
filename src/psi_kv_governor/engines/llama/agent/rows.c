// The rows of caches that a graph writes, and the sequences that they belong to.

#include <stdlib.h>

#include "graph.h"

// Fewer rows come back soon enough by themselves.
#define LEAST_TAKEN 64

// Attention looks at each row of a stream before the last that is used, and on to a multiple of this (llama.cpp's n_kv): free
// ones become resident by that too.
#define LOOKED_AT_ROWS 256

void rows_reached(struct region * region, int64_t row) {
    for (int64_t i = 0; row < 0 && region->cells && i < region->n_rows / region->stream_rows; i++) {
        region->reached[i] = region->stream_rows;
    }
    if (row >= 0 && region->reached[row / region->stream_rows] <= row % region->stream_rows) {
        region->reached[row / region->stream_rows] = row % region->stream_rows + 1;
    }
}

void rows_dropped(struct region * region) {
    const bool known = region->cells && !region->copied;
    for (int64_t i = 0; known && i < region->n_rows / region->stream_rows; i++) {
        region->reached[i] = 0;
    }
    for (int64_t i = 0; known && i < region->n_rows; i++) {
        if (region->flags[i] & ROW_USED) {
            rows_reached(region, i);
        }
    }
}

bool row_reached(const struct region * region, int64_t row) {
    const int64_t reached = region->reached[row / region->stream_rows];
    return row % region->stream_rows < (reached + LOOKED_AT_ROWS - 1) / LOOKED_AT_ROWS * LOOKED_AT_ROWS;
}

static void row_fresh(struct region * region, int64_t row) {
    rows_reached(region, row);
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

int64_t index_at(const struct ggml_tensor * index, int64_t i) {
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
        if (j > i) {
            expect_rows(region, row, row + j - i);
        }
        i = j > i ? j : i + 1;
    }
    sequence->parked = false;
}

// Whether the kernel took some of it by itself, which nobody tells: a page is looked for in eight of its tensors, others each
// time (4 us), and in all of them when it has rested (30 us for 60). What is born in a file is mapped without reading ahead:
// 33,000 pages came back one by one, at 32 MB/s.
static bool taken(const struct region * region, const struct sequence * sequence) {
    const bool    rested = region->used_s - sequence->used_s > 1.0;
    const int32_t apart  = rested || region->n_tensors < 16 ? 1 : region->n_tensors / 8;
    const int32_t step   = sequence->n / (region->n_tensors + 1) + 1;
    int32_t       i    = (int32_t) (region->n_graphs * 97 % (uint64_t) (sequence->n + 1));
    uint64_t      first, last;
    bool          gone = false;
    int32_t       t    = (int32_t) (region->n_graphs % (uint64_t) apart);
    for (; t < region->n_tensors && sequence->n >= LEAST_TAKEN && !gone; t += apart, i += step) {
        const int32_t row = sequence->rows[i % sequence->n];
        if (!(region->flags[row] & ROW_MASKED) && pages_of(region, &region->tensors[t], row, row + 1, true, &first, &last)) {
            gone = resident_in(first, first + page_bytes()) == 0;
        }
    }
    return gone;
}

static void sequence_used(struct region * region, int32_t id) {
    struct sequence * sequence = id >= 0 ? map_sequence(region, id, true) : NULL;
    if (sequence && sequence->used_s != region->used_s) {
        sequence->parked = sequence->parked || (region->backing == BACKING_FILE && taken(region, sequence));
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

// What was masked there before is other tokens now.
static void note_rows(struct region * region, const struct ggml_tensor * index, const struct ggml_tensor * positions) {
    const int64_t n       = index->ne[0];
    const bool    placed  = positions && positions->type == TYPE_I32 && positions->ne[0] >= n;
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

void rows_written(struct region * region, const struct ggml_tensor * index, const struct ggml_tensor * positions) {
    if (index && (index->type == TYPE_I64 || index->type == TYPE_I32)) {
        note_rows(region, index, positions);
        copy_rows(region, index);
    } else {
        region->writes_all = true;
    }
    if (region->writes_all) {
        rows_reached(region, -1);
    }
}
