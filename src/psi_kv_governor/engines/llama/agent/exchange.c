// The exchange: wanted blocks come back, and the least attended live ones are parked in their place. As many cells are live
// afterwards as before.

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "protocol.h"
#include "recall.h"

// A parked block has to be this much better than the live one whose place it takes, so that the two don't swing.
#define TIMES_BETTER 1.5f
#define LEAST_SHARE  0.02f

static double bucket_bytes, bucket_s;

struct place { float score; int32_t block, cells; };

static int by_score(const void * a, const void * b) {
    const float x = ((const struct place *) a)->score, y = ((const struct place *) b)->score;
    return (x > y) - (x < y);
}

static bool protected(const struct sequence * sequence, int32_t pos) {
    bool is = pos < recall_settings.sink_cells || pos > sequence->highest - recall_settings.window_cells;
    for (int32_t i = 0; i < recall_settings.n_marked && !is; i++) {
        is = pos >= recall_settings.marked[i].start && pos < recall_settings.marked[i].stop;
    }
    return is;
}

// Blocks of the sequence that could go, the least attended first, and after them in the same array those that are wanted,
// the most wanted last. Gives the number of the former.
static int32_t sort(struct region * region, const struct sequence * sequence, bool question, struct place * places, int32_t * n_wanted) {
    struct recall * r = region->recall;
    // For a question counts what it asks for, and not what was looked for or moved before it.
    const float *  score = question ? r->now : r->score;
    const uint32_t rest  = question ? 0 : REST;
    int32_t * live = calloc((size_t) r->n_blocks, 2 * sizeof(int32_t)), * masked = live + r->n_blocks, n = 0, wanted = 0;
    if (!live) {
        return 0;
    }
    for (int32_t i = 0; i < sequence->n; i++) {
        const int32_t row = sequence->rows[i], b = row / BLOCK_CELLS;
        const bool is_masked = region->flags[row] & ROW_MASKED;
        masked[b] += is_masked;
        live[b] += is_masked ? 0 : protected(sequence, region->pos[row]) ? -BLOCK_CELLS : 1;
    }
    for (int32_t b = 0; b < r->n_blocks; b++) {
        if (live[b] > 0 && !masked[b] && r->now[b] >= 0.0f && r->observed - r->moved[b] >= rest) {
            places[n++] = (struct place){score[b], b, live[b]};
        }
    }
    for (int32_t b = 0; b < r->n_blocks; b++) {
        if (masked[b] && r->now[b] >= LEAST_SHARE && r->observed - r->moved[b] >= rest) {
            places[n + wanted++] = (struct place){score[b], b, masked[b]};
        }
    }
    free(live);
    qsort(places, (size_t) n, sizeof(*places), by_score);
    qsort(places + n, (size_t) wanted, sizeof(*places), by_score);
    *n_wanted = wanted;
    return n;
}

static double allowance(void) {
    const double now_s = agent_now_s(), most = recall_settings.bytes_per_s;
    bucket_bytes = bucket_s > 0 ? fmin(most, bucket_bytes + (now_s - bucket_s) * most) : most;
    bucket_s     = now_s;
    return bucket_bytes;
}

// Which rows go (3) and which come (1). Gives the number of blocks that come. The lock is held.
static int32_t choose_exchange(struct region * region, const struct sequence * sequence, bool question, uint8_t * rows) {
    struct recall * r      = region->recall;
    struct place *  places = malloc(2 * (size_t) r->n_blocks * sizeof(*places));
    int32_t         n_wanted = 0, come = 0;
    const int32_t   n_live = places ? sort(region, sequence, question, places, &n_wanted) : 0;
    double          left   = allowance();
    uint8_t * moves = calloc((size_t) r->n_blocks, 1);
    for (int32_t i = n_wanted - 1, j = 0, cells = 0; places && moves && i >= 0; i--) {
        const struct place in = places[n_live + i];
        int32_t k = j, free_cells = cells;
        while (k < n_live && free_cells < in.cells && in.score > (question ? 1.0f : TIMES_BETTER) * places[k].score) {
            free_cells += places[k++].cells;
        }
        left -= (double) in.cells * (double) region->cell_bytes;
        if (free_cells < in.cells || left < 0) {
            break;
        }
        for (; j < k; j++) {
            moves[places[j].block] = 3;
        }
        cells           = free_cells - in.cells;
        moves[in.block] = 1;
        come++;
    }
    for (int32_t i = 0; moves && i < sequence->n; i++) {
        const int32_t row = sequence->rows[i], b = row / BLOCK_CELLS;
        rows[row] = moves[b] == 3 ? 3 : moves[b] == 1 && (region->flags[row] & ROW_MASKED) ? 1 : 0;
        if (moves[b]) {
            r->moved[b] = r->observed;
        }
    }
    free(places);
    free(moves);
    return come;
}

bool exchange(struct region * region, bool question) {
    struct recall * r = region->recall;
    uint8_t * rows = calloc((size_t) region->n_rows, 1);
    pthread_mutex_lock(&agent.lock);
    const struct sequence * sequence = map_sequence(region, r->sequence, false);
    const int32_t come = rows && sequence && map_fresh(region) ? choose_exchange(region, sequence, question, rows) : 0;
    pthread_mutex_unlock(&agent.lock);
    if (come > 0) {
        recall_summarise(region, rows);
        const uint64_t read_bytes = order_exchange(region, rows);
        bucket_bytes -= (double) read_bytes;
        recall_told.read_bytes += read_bytes;
        recall_told.blocks_back += (uint64_t) come;
        recall_told.exchanges++;
    }
    free(rows);
    return come > 0;
}
