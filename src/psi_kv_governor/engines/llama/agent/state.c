// Saying what is: the buffers, their sequences, the evidence for a policy, and the saved states.

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "protocol.h"
#include "recall.h"

#define LEAST_SWAPPED (1u << 20)

char * put(char * to, char * end, const void * from, size_t n) {
    if (to && (size_t) (end - to) >= n) {
        memcpy(to, from, n);
        return to + n;
    }
    return NULL;
}

// Whether a MiB or more of rows that nobody uses is in swap. What is parked of the used ones hides some.
static bool frees_swap(const struct region * region) {
    uint64_t swapped, used = 0;
    const uint64_t held = region->cells && region->backing == BACKING_MEMORY ? held_in(region->first, region->last, &swapped) : 0;
    if (held == 0 || swapped < LEAST_SWAPPED) {
        return false;
    }
    for (int64_t i = 0; i < region->n_rows; i++) {
        used += (region->flags[i] & ROW_USED) != 0;
    }
    // The page in which the used rows of a tensor end can't go.
    return held >= used * region->cell_bytes + (uint64_t) region->n_tensors * page_bytes() + LEAST_SWAPPED;
}

// In the middle a cache seems empty. It takes milliseconds: 0.2 s is for a thread that is not let run.
void map_settle(const struct region * region) {
    const struct timespec until = realtime_in(0.2);
    for (int error = 0; region->asked && error != ETIMEDOUT;) {
        error = pthread_cond_timedwait(&agent.graph_over, &agent.lock, &until);
    }
}

char * tell_region(struct region * region, char * to, char * end, bool count_resident) {
    const bool fresh = refresh_map(region, false);
    struct region_info info = {
        .id = region->id,
        .flags = (region->cells ? 1u : 0u) | (region->masks ? 2u : 0u) | (region->backing == BACKING_FILE ? 4u : 0u) |
                 (region->computing ? 8u : 0u) | (fresh ? 0u : 16u) | (count_resident && fresh && frees_swap(region) ? 32u : 0u),
        .context = (uint64_t) (uintptr_t) region->ctx, .n_rows = (uint64_t) region->n_rows, .cell_bytes = region->cell_bytes,
        .row_bytes = region->shortest_row_bytes, .size = region->last - region->first,
        .resident = count_resident ? resident_of(region, region->first, region->last) : 0, .used_s = region->used_s,
        .written = agent.written_bytes,
    };
    pthread_mutex_lock(&agent.lock);
    map_settle(region);
    info.masked   = (uint64_t) region->n_masked;
    info.affected = (uint64_t) region->n_affected;
    memcpy(info.why_no_mask, region->why_no_mask, sizeof(info.why_no_mask));
    for (int32_t i = 0; i < region->n_tensors; i++) {
        info.n_readable += keys_readable(&region->tensors[i]);
    }
    for (int32_t i = 0; i < region->n_sequences; i++) {
        info.n_sequences += region->sequences[i].n > 0;
    }
    to = put(to, end, &info, sizeof(info));
    for (int32_t i = 0; i < region->n_sequences; i++) {
        const struct sequence * sequence = &region->sequences[i];
        if (sequence->n == 0) {
            continue;
        }
        struct sequence_info one = {.id = sequence->id, .low = INT32_MAX, .high = -1, .n = sequence->n, .lost = sequence->n_lost, .used_s = sequence->used_s};
        const bool plain = region->n_masked == 0 && region->n_affected == 0 && !sequence->parked;
        for (int32_t j = 0; j < sequence->n; j += plain && j == 0 && sequence->n > 1 ? sequence->n - 1 : 1) {
            const int32_t row = sequence->rows[j];
            one.low  = region->pos[row] < one.low ? region->pos[row] : one.low;
            one.high = region->pos[row] > one.high ? region->pos[row] : one.high;
            one.masked += (region->flags[row] & ROW_MASKED) != 0;
            one.affected += (region->flags[row] & ROW_AFFECTED) != 0;
            one.parked += (region->flags[row] & ROW_PARKED) != 0;
        }
        to = put(to, end, &one, sizeof(one));
    }
    pthread_mutex_unlock(&agent.lock);
    return to;
}

char * tell_sequence(struct region * region, const struct request * request, char * to, char * end, struct reply * reply) {
    (void) refresh_map(region, false);
    pthread_mutex_lock(&agent.lock);
    map_settle(region);
    const struct sequence * sequence = region->cells ? map_sequence(region, request->sequence, false) : NULL;
    reply->status = sequence ? 0 : 1;
    for (int32_t i = 0; sequence && i < sequence->n && to; i++) {
        const int32_t item[2] = {region->pos[sequence->rows[i]], region->flags[sequence->rows[i]]};
        to = put(to, end, item, sizeof(item));
        reply->count++;
    }
    for (int32_t i = 0; sequence && i < sequence->n_lost && to; i++) {
        const int32_t item[2] = {sequence->lost[i], ROW_LOST};
        to = put(to, end, item, sizeof(item));
        reply->count++;
    }
    pthread_mutex_unlock(&agent.lock);
    return to;
}

static void score(const struct region * region, const struct sequence * sequence, bool cosine, float * of_row) {
    int32_t * rows = malloc((size_t) (sequence->n + 1) * sizeof(int32_t));
    float *   out  = calloc((size_t) sequence->n + 1, 2 * sizeof(float));
    int64_t   n = 0, layers = 0;
    for (int32_t i = 0; rows && i < sequence->n; i++) {
        if (!(region->flags[sequence->rows[i]] & (ROW_PARKED | ROW_MASKED))) {
            rows[n++] = sequence->rows[i];
        }
    }
    for (int32_t i = 0; rows && out && i < region->n_tensors; i++) {
        layers += keys_score(&region->tensors[i], cosine, rows, n, out, out + sequence->n + 1);
    }
    for (int64_t i = 0; layers && i < n; i++) {
        of_row[rows[i]] = (cosine ? -out[i] : out[i]) / (float) layers;
    }
    free(rows);
    free(out);
}

char * tell_evidence(struct region * region, const struct request * request, char * to, char * end, struct reply * reply) {
    (void) refresh_map(region, false);
    const struct range part = request->n_ranges ? request->ranges[0] : (struct range){0, 0};
    float * of_row = region->cells ? malloc((size_t) region->n_rows * sizeof(float)) : NULL;
    pthread_mutex_lock(&agent.lock);
    const struct sequence * sequence = of_row ? map_sequence(region, request->sequence, false) : NULL;
    const struct sampler *  sampler  = region->sampler;
    reply->status = sequence ? (sampler && sampler_failed(sampler) && (request->flags == ATTENTION || request->flags == LAST_USED) ? 3 : 0) : 1;
    for (int64_t i = 0; sequence && i < region->n_rows; i++) {
        of_row[i] = NAN;
    }
    if (sequence && (request->flags == KEY_NORMS || request->flags == KEY_DIFFS)) {
        score(region, sequence, request->flags == KEY_DIFFS, of_row);
    }
    float * values = sequence && to && end - to >= (int64_t) (part.stop - part.start) * 4 ? (float *) to : NULL;
    for (int32_t i = part.start; values && i < part.stop; i++) {
        values[i - part.start] = NAN;
    }
    for (int32_t i = 0; values && i < sequence->n; i++) {
        const int32_t row = sequence->rows[i], pos = region->pos[row];
        if (pos < part.start || pos >= part.stop) {
            continue;
        }
        values[pos - part.start] = request->flags == ATTENTION ? (sampler ? sampler_attention(sampler, row) : NAN)
                                 : request->flags == LAST_USED ? (sampler ? sampler_last_used(sampler, row) : NAN)
                                 : request->flags == ARRIVALS ? (float) i
                                 : request->flags == DEMAND ? recall_wanted(region->recall, row)
                                                              : of_row[row];
    }
    pthread_mutex_unlock(&agent.lock);
    free(of_row);
    reply->count = values ? (uint32_t) (part.stop - part.start) : 0;
    return values ? to + (int64_t) (part.stop - part.start) * 4 : to;
}

// All that was sampled of a cache; with `from`, what is known from now on: for measurements that try one thing after
// another from the same beginning.
char * tell_sampled(struct region * region, const char * from, size_t n_from, char * to, char * end) {
    void * parts[3];
    pthread_mutex_lock(&agent.lock);
    const size_t bytes = region->sampler ? sampler_memory(region->sampler, parts) : 0;
    if (bytes && n_from == 3 * bytes) {
        recall_forget(region->recall);
    }
    for (int i = 0; i < 3 && bytes && to; i++) {
        if (n_from == 3 * bytes) {
            memcpy(parts[i], from + (size_t) i * bytes, bytes);
        } else {
            to = put(to, end, parts[i], bytes);
        }
    }
    pthread_mutex_unlock(&agent.lock);
    return to;
}

char * tell_blobs(char * to, char * end, struct reply * reply) {
    static struct blob blobs[4096];
    const int n = blobs_tell(blobs, 4096);
    for (int i = 0; i < n && to; i++) {
        const struct blob_info info = {
            blobs[i].id, (blobs[i].parked ? 1u : 0u) | (blobs[i].checkpoint ? 2u : 0u), blobs[i].bytes, blobs[i].used_s};
        to = put(to, end, &info, sizeof(info));
        reply->count++;
    }
    return to;
}
