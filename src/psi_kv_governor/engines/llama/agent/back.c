// Back again: rows that are parked or masked are read, in slices and until a deadline.

#include <stdlib.h>

#include "protocol.h"

// Read between two looks at the clock: a second of a disk that gives 2 MB/s, and half as much keeps one of 1.3 GB/s waiting.
#define BATCH_BYTES (2u << 20)
#define MOST_ROWS 512
#define LEAST_ROWS 16

// Bytes of rows [from, to) in memory, over all tensors; read back first, where that is asked for.
static uint64_t rows_here(const struct region * region, int32_t from, int32_t to, bool read) {
    uint64_t here = 0, first, last;
    for (int32_t t = 0; t < region->n_tensors; t++) {
        if (pages_of(region, &region->tensors[t], from, to, true, &first, &last)) {
            if (read) {
                read_pages(first, last);
            }
            here += resident_of(region, first, last);
        }
    }
    return here;
}

// Where the run of neighbours ends that begins with the i-th row.
static int32_t run_end(const int32_t * rows, int32_t n, int32_t i) {
    for (i++; i < n && rows[i] == rows[i - 1] + 1;) {
        i++;
    }
    return i;
}

// Reads rows back; gives the bytes that were not there. All of them are asked for before the first is waited for: a row is
// a few hundred bytes in each of many tensors, and one piece after the other the disk stands still between them.
static uint64_t read_rows(struct region * region, const int32_t * rows, int32_t n) {
    uint64_t before = 0, after = 0;
    for (int32_t i = 0, end; i < n; i = end) {
        end = run_end(rows, n, i);
        before += rows_here(region, rows[i], rows[end - 1] + 1, false);
        expect_rows(region, rows[i], rows[end - 1] + 1);
    }
    for (int32_t i = 0, end; i < n; i = end) {
        end = run_end(rows, n, i);
        after += rows_here(region, rows[i], rows[end - 1] + 1, true);
    }
    return after > before ? after - before : 0;
}

// Rows that are 3 are masked and parked, and in their place those that are 1 come back. In the thread whose graph has just
// ended, so that nobody writes them. Gives the bytes read.
uint64_t order_exchange(struct region * region, const uint8_t * rows) {
    const struct request none = {.op = MASK};
    struct reply reply = {.done = 1};
    uint8_t * cold = malloc((size_t) region->n_rows);
    int32_t * back = malloc((size_t) region->n_rows * sizeof(int32_t)), n = 0;
    pthread_mutex_lock(&agent.lock);
    for (int32_t row = 0; cold && back && row < region->n_rows; row++) {
        if (rows[row] == 1) {
            back[n++] = row;
        }
        if (rows[row] == 3 && !(region->flags[row] & ROW_MASKED)) {
            region->flags[row] |= ROW_MASKED | ROW_PARKED;
            region->n_masked++;
        }
        const bool elsewhere = (region->flags[row] & ROW_PARKED) || !(region->flags[row] & ROW_USED);
        cold[row] = rows[row] == 3 ? 3 : rows[row] == 1 ? 0 : elsewhere;
    }
    pthread_mutex_unlock(&agent.lock);
    uint64_t bytes = 0;
    if (cold && back) {
        act_on_rows(region, &none, 0.0, ACT_PARK_HERE, cold, &reply);
        bytes = read_rows(region, back, n);
        pthread_mutex_lock(&agent.lock);
        for (int32_t i = 0; i < n; i++) {
            region->n_masked -= (region->flags[back[i]] & ROW_MASKED) != 0;
            region->flags[back[i]] &= (uint8_t) ~(ROW_MASKED | ROW_PARKED);
        }
        pthread_mutex_unlock(&agent.lock);
    }
    free(cold);
    free(back);
    return bytes;
}

// So many rows are read at once, within what is asked for.
static int32_t rows_at_once(const struct region * region, const struct request * request, const struct reply * reply) {
    const uint64_t left  = request->max_bytes > 0 ? request->max_bytes - reply->bytes : BATCH_BYTES;
    const uint64_t bytes = left < BATCH_BYTES ? left : BATCH_BYTES;
    const uint64_t rows  = region->cell_bytes ? bytes / region->cell_bytes : MOST_ROWS;
    return rows < LEAST_ROWS ? LEAST_ROWS : rows > MOST_ROWS ? MOST_ROWS : (int32_t) rows;
}

// Reads a slice of rows back and has attention look at them again, until the time or the bytes are up: some in any case, so
// that slices come to an end also on a machine that stands still before each.
void order_unpark(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    (void) refresh_map(region, false);
    pthread_mutex_lock(&agent.lock);
    struct sequence * sequence = region->cells ? map_sequence(region, request->sequence, false) : NULL;
    pthread_mutex_unlock(&agent.lock);
    if (!sequence) {
        reply->status = 1;
        return;
    }
    const uint8_t from_flag = request->op == UNMASK ? ROW_MASKED : ROW_PARKED;
    int32_t i = 0;
    while (i < sequence->n) {
        if (reply->cells > 0 && (late(request, begin_s) || enough(request, reply))) {
            reply->done = 0;
            return;
        }
        const int32_t at_once = rows_at_once(region, request, reply);
        int32_t batch[MOST_ROWS], n = 0;
        pthread_mutex_lock(&agent.lock);
        for (; i < sequence->n && n < at_once; i++) {
            const int32_t row = sequence->rows[i];
            if ((region->flags[row] & from_flag) && asked_for(request, region->pos[row])) {
                batch[n++] = row;
            }
        }
        pthread_mutex_unlock(&agent.lock);
        reply->bytes += read_rows(region, batch, n);
        pthread_mutex_lock(&agent.lock);
        for (int32_t a = 0; a < n; a++) {
            region->n_masked -= (region->flags[batch[a]] & ROW_MASKED) != 0;
            region->flags[batch[a]] &= (uint8_t) ~(ROW_MASKED | ROW_PARKED);
        }
        pthread_mutex_unlock(&agent.lock);
        reply->cells += (uint64_t) n;
    }
}

void forget_masks(struct region * region) {
    pthread_mutex_lock(&agent.lock);
    for (int64_t i = 0; region->cells && i < region->n_rows; i++) {
        region->flags[i] &= (uint8_t) ~ROW_MASKED;
    }
    region->n_masked = 0;
    pthread_mutex_unlock(&agent.lock);
}
