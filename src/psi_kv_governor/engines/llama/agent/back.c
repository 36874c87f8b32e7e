// Back again: rows that are parked or masked are read, in slices and until a deadline.

#include <stdlib.h>

#include "protocol.h"

// Reads rows back, in runs of neighbours.
static uint64_t read_rows(struct region * region, const int32_t * rows, int32_t n) {
    uint64_t bytes = 0;
    for (int32_t t = 0; t < region->n_tensors; t++) {
        for (int32_t a = 0; a < n;) {
            int32_t b = a + 1;
            while (b < n && rows[b] == rows[b - 1] + 1) {
                b++;
            }
            uint64_t first, last;
            if (region->tensors[t].whole_rows && pages_of(region, &region->tensors[t], rows[a], rows[b - 1] + 1, true, &first, &last)) {
                bytes += unpark_pages(region, first, last);
            }
            a = b;
        }
    }
    return bytes;
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

// Reads a slice of rows back and has attention look at them again, until the time or the bytes are up.
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
        if (late(request, begin_s) || enough(request, reply)) {
            reply->done = 0;
            return;
        }
        int32_t batch[64], n = 0;
        pthread_mutex_lock(&agent.lock);
        for (; i < sequence->n && n < 64; i++) {
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
