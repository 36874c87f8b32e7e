// Cells that nobody uses any more: their pages go back.

#include <stdlib.h>

#include "protocol.h"

// What the map says is free; it was asked just now, and nobody is in llama.cpp. Of a large cache most was never written.
void drop_free(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    uint8_t * rows = malloc((size_t) region->n_rows);
    int64_t   used = 0, reached = 0;
    for (int64_t i = 0; rows && i < region->n_rows; i++) {
        rows[i] = region->flags[i] & ROW_USED ? 0 : row_reached(region, i) ? 2 : 1;
        used += rows[i] == 0;
        reached += rows[i] == 2;
    }
    if (reached > 0 && used == 0) {
        act_on_all(region, request, begin_s, ACT_DROP, reply);
    } else if (reached > 0) {
        act_on_rows(region, request, begin_s, ACT_DROP, rows, reply);
    }
    if (rows && reply->done) {
        rows_dropped(region);
    }
    free(rows);
}

void order_release(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    if (!region->cells || !region->ctx || gate_inside() || !gate_take(true, PATIENCE_S)) {
        reply->done = 0;
        return;
    }
    // Asked at this very moment, and nobody gets in before the pages are gone.
    if (region->alive && map_used(region->ctx, region->lib)) {
        drop_free(region, request, begin_s, reply);
    }
    gate_give();
}
