// The protocol: one message in, one message out, the same in-process and over a socket. Plain structs in the byte order
// of the machine: both ends are on it.

#define _GNU_SOURCE
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "agent.h"

enum { VERSION = 1 };
enum op { HELLO = 1, SNAPSHOT, SEQUENCE, MASK, UNMASK, PARK, UNPARK, WRITE, RELEASE, EVIDENCE, COLLECT, FORGET, BLOBS, PARK_BLOB, REFUSE, SAMPLED };
enum kind { ARRIVALS = 1, KEY_NORMS, KEY_DIFFS, ATTENTION, LAST_USED };

struct range { int32_t start, stop; };

struct request {
    uint32_t version, op, region;
    int32_t  sequence;            // -1: all of the region
    uint32_t flags, n_ranges;
    uint64_t max_bytes;
    double   deadline_s;
    struct range ranges[];
};

struct reply {
    int32_t  status;              // 0: answered, 1: no such region or sequence, 2: not understood
    uint32_t count;               // of the items that follow
    uint64_t bytes, cells, masked, written;
    double   seconds;
    uint32_t done, n_problem;     // the text of the problem stands at the very end
};

struct region_info {
    uint32_t id, flags;           // 1: by cell, 2: maskable, 4: born in a file, 8: a graph runs, 16: the map is stale
    uint64_t context, n_rows, cell_bytes, row_bytes, size, resident, masked, affected;
    double   used_s;
    uint32_t n_sequences, n_readable;  // tensors of keys that can be read
    uint64_t written;             // by the agent, over all regions
    char     why_no_mask[96];
};

struct blob_info { uint32_t id, flags; uint64_t bytes; double used_s; };  // 1: parked, 2: a checkpoint

struct sequence_info { int32_t id, low, high, n, masked, affected, parked, unused; double used_s; };

pthread_mutex_t serving = PTHREAD_MUTEX_INITIALIZER;

#define SLICE_BYTES (8u << 20)
// How long a program's call may be kept waiting for us, and how long we wait for it.
#define PATIENCE_S 0.02

static bool late(const struct request * request, double begin_s) {
    return request->deadline_s > 0 && agent_now_s() - begin_s >= request->deadline_s;
}

static bool enough(const struct request * request, const struct reply * reply) {
    return request->max_bytes > 0 && reply->bytes >= request->max_bytes;
}

// Asks llama.cpp if the map is not what it would say, when nobody is in there. False: it stays as it was.
static bool refresh(struct region * region, bool anyway) {
    if (!region->ctx || !region->cells || (!anyway && map_fresh(region))) {
        return region->ctx != NULL;
    }
    if (gate_inside() || !gate_take(true, PATIENCE_S)) {
        return false;
    }
    const bool done = region->alive && map_refresh(region->ctx, region->lib);
    gate_give();
    return done;
}

static bool asked_for(const struct request * request, int32_t pos) {
    for (uint32_t i = 0; i < request->n_ranges; i++) {
        if (pos >= request->ranges[i].start && pos < request->ranges[i].stop) {
            return true;
        }
    }
    return request->n_ranges == 0;
}

// ---- parking --------------------------------------------------------------------------------------------------

// Pages that hold nothing but rows [from, to) of a tensor, within the region.
static bool pages_of(const struct region * region, const struct tensor * tensor, int64_t from, int64_t to, bool outward,
                     uint64_t * first, uint64_t * last) {
    const uint64_t page = page_bytes() - 1;
    const uint64_t a = tensor->base + (uint64_t) from * tensor->row_bytes, b = tensor->base + (uint64_t) to * tensor->row_bytes;
    *first = outward ? a & ~page : (a + page) & ~page;
    *last  = outward ? (b + page) & ~page : b & ~page;
    *first = *first < region->first ? region->first : *first;
    *last  = *last > region->last ? region->last : *last;
    return *first < *last;
}

enum act { ACT_PARK, ACT_WRITE, ACT_DROP };

static void act_on(struct region * region, enum act act, uint64_t first, uint64_t last, struct reply * reply) {
    // A shared file holds what was written, whoever writes now; anonymous pages are moved while nobody writes them.
    const bool gate = region->backing == BACKING_MEMORY && act != ACT_DROP;
    if (gate && (gate_inside() || !gate_take(false, PATIENCE_S))) {
        snprintf(agent.problem, sizeof(agent.problem), "the program is busy in llama.cpp: nothing can be moved now");
        return;
    }
    if (act == ACT_PARK) {
        reply->bytes += park_pages(region, first, last, &reply->written);
    } else if (act == ACT_WRITE) {
        write_pages(region, first, last);
    } else {
        reply->bytes += drop_pages(region, first, last);
    }
    if (gate) {
        gate_give();
    }
}

// Runs of rows with all of `set` and none of `clear`, page by page over all tensors; at most a slice at a time.
static void act_on_rows(struct region * region, const struct request * request, double begin_s, enum act act, const uint8_t * rows, struct reply * reply) {
    for (int32_t i = 0; i < region->n_tensors && region->alive; i++) {
        const struct tensor * tensor = &region->tensors[i];
        if (!tensor->whole_rows) {
            continue;
        }
        for (int64_t from = 0; from < region->n_rows;) {
            if (!rows[from]) {
                from++;
                continue;
            }
            int64_t to = from, wanted = 0;
            for (; to < region->n_rows && rows[to]; to++) {
                wanted += rows[to] > 1;  // 2: asked for; 1: cold neighbours, which only round the pages
            }
            uint64_t first, last;
            if (wanted && pages_of(region, tensor, from, to, false, &first, &last)) {
                for (uint64_t at = first; at < last; at += SLICE_BYTES) {
                    if (late(request, begin_s)) {
                        reply->done = 0;
                        return;
                    }
                    act_on(region, act, at, at + SLICE_BYTES < last ? at + SLICE_BYTES : last, reply);
                }
            }
            from = to;
        }
    }
}

static void act_on_all(struct region * region, const struct request * request, double begin_s, enum act act, struct reply * reply) {
    for (uint64_t at = region->first; at < region->last; at += SLICE_BYTES) {
        if (late(request, begin_s) || enough(request, reply)) {
            reply->done = 0;
            return;
        }
        act_on(region, act, at, at + SLICE_BYTES < region->last ? at + SLICE_BYTES : region->last, reply);
    }
}

// Rows of the sequence that are asked for become 2, other cold ones (parked, free) 1. Rows that a sequence used later
// has as well stay out.
static void choose_rows(struct region * region, const struct request * request, struct sequence * sequence, uint8_t * rows, uint8_t set, struct reply * reply) {
    for (int64_t i = 0; i < region->n_rows; i++) {
        rows[i] = (region->flags[i] & ROW_PARKED) || !(region->flags[i] & ROW_USED);
    }
    for (int32_t i = 0; i < sequence->n; i++) {
        const int32_t row = sequence->rows[i];
        if ((region->flags[row] & ROW_USED) && asked_for(request, region->pos[row])) {
            rows[row] = 2;
        }
    }
    for (int32_t j = 0; !(set & ROW_MASKED) && j < region->n_sequences; j++) {
        const struct sequence * other = &region->sequences[j];
        for (int32_t i = 0; other != sequence && other->used_s > sequence->used_s && i < other->n; i++) {
            rows[other->rows[i]] = 0;
        }
    }
    for (int32_t i = 0; i < sequence->n; i++) {
        const int32_t row = sequence->rows[i];
        if (rows[row] == 2) {
            reply->cells++;
            reply->masked += (set & ROW_MASKED) && !(region->flags[row] & ROW_MASKED);
            region->n_masked += (set & ROW_MASKED) && !(region->flags[row] & ROW_MASKED);
            region->flags[row] |= set;
        }
    }
    sequence->parked = sequence->parked || (set & ROW_PARKED);
}

static void park(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    if (request->sequence < 0) {
        act_on_all(region, request, begin_s, request->op == WRITE ? ACT_WRITE : ACT_PARK, reply);
        return;
    }
    (void) refresh(region, false);
    uint8_t * rows = region->cells ? malloc((size_t) region->n_rows) : NULL;
    pthread_mutex_lock(&agent.lock);
    struct sequence * sequence = rows ? map_sequence(region, request->sequence, false) : NULL;
    if (sequence) {
        const uint8_t set = request->op == MASK ? ROW_MASKED | ROW_PARKED : request->op == PARK ? ROW_PARKED : 0;
        choose_rows(region, request, sequence, rows, set, reply);
    }
    pthread_mutex_unlock(&agent.lock);
    reply->status = sequence ? 0 : 1;
    if (sequence) {
        act_on_rows(region, request, begin_s, request->op == WRITE ? ACT_WRITE : ACT_PARK, rows, reply);
    }
    free(rows);
}

// ---- back again -------------------------------------------------------------------------------------------------

// Reads a slice of rows back and has attention look at them again, until the time or the bytes are up.
static void unpark(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    (void) refresh(region, false);
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
        for (int32_t t = 0; t < region->n_tensors; t++) {
            for (int32_t a = 0; a < n;) {
                int32_t b = a + 1;
                while (b < n && batch[b] == batch[b - 1] + 1) {
                    b++;
                }
                uint64_t first, last;
                if (region->tensors[t].whole_rows && pages_of(region, &region->tensors[t], batch[a], batch[b - 1] + 1, true, &first, &last)) {
                    reply->bytes += unpark_pages(region, first, last);
                }
                a = b;
            }
        }
        pthread_mutex_lock(&agent.lock);
        for (int32_t a = 0; a < n; a++) {
            region->n_masked -= (region->flags[batch[a]] & ROW_MASKED) != 0;
            region->flags[batch[a]] &= (uint8_t) ~(ROW_MASKED | ROW_PARKED);
        }
        pthread_mutex_unlock(&agent.lock);
        reply->cells += (uint64_t) n;
    }
}

static void forget_masks(struct region * region) {
    pthread_mutex_lock(&agent.lock);
    for (int64_t i = 0; region->cells && i < region->n_rows; i++) {
        region->flags[i] &= (uint8_t) ~ROW_MASKED;
    }
    region->n_masked = 0;
    pthread_mutex_unlock(&agent.lock);
}

// ---- free cells --------------------------------------------------------------------------------------------------

static void release(struct region * region, const struct request * request, double begin_s, struct reply * reply) {
    if (!region->cells || !region->ctx || gate_inside() || !gate_take(true, PATIENCE_S)) {
        reply->done = 0;
        return;
    }
    uint8_t * rows = malloc((size_t) region->n_rows);
    // Asked at this very moment, and nobody gets in before the pages are gone.
    if (rows && region->alive && map_refresh(region->ctx, region->lib)) {
        int64_t used = 0;
        for (int64_t i = 0; i < region->n_rows; i++) {
            rows[i] = region->flags[i] & ROW_USED ? 0 : 2;
            used += rows[i] == 0;
        }
        if (used == 0) {
            act_on_all(region, request, begin_s, ACT_DROP, reply);
        } else {
            act_on_rows(region, request, begin_s, ACT_DROP, rows, reply);
        }
    }
    gate_give();
    free(rows);
}

// ---- telling -----------------------------------------------------------------------------------------------------

static char * put(char * to, char * end, const void * from, size_t n) {
    if (to && (size_t) (end - to) >= n) {
        memcpy(to, from, n);
        return to + n;
    }
    return NULL;
}

static char * tell_region(struct region * region, char * to, char * end, bool count_resident) {
    const bool fresh = refresh(region, false);
    struct region_info info = {
        .id = region->id,
        .flags = (region->cells ? 1u : 0u) | (region->masks ? 2u : 0u) | (region->backing == BACKING_FILE ? 4u : 0u) |
                 (region->computing ? 8u : 0u) | (fresh ? 0u : 16u),
        .context = (uint64_t) (uintptr_t) region->ctx, .n_rows = (uint64_t) region->n_rows, .cell_bytes = region->cell_bytes,
        .row_bytes = region->shortest_row_bytes, .size = region->last - region->first,
        .resident = count_resident ? resident_in(region->first, region->last) : 0, .used_s = region->used_s,
        .written = agent.written_bytes,
    };
    pthread_mutex_lock(&agent.lock);
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
        struct sequence_info one = {.id = sequence->id, .low = INT32_MAX, .high = -1, .n = sequence->n, .used_s = sequence->used_s};
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

static char * tell_sequence(struct region * region, const struct request * request, char * to, char * end, struct reply * reply) {
    (void) refresh(region, false);
    pthread_mutex_lock(&agent.lock);
    const struct sequence * sequence = region->cells ? map_sequence(region, request->sequence, false) : NULL;
    reply->status = sequence ? 0 : 1;
    for (int32_t i = 0; sequence && i < sequence->n && to; i++) {
        const int32_t item[2] = {region->pos[sequence->rows[i]], region->flags[sequence->rows[i]]};
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

static char * tell_evidence(struct region * region, const struct request * request, char * to, char * end, struct reply * reply) {
    (void) refresh(region, false);
    const struct range part = request->n_ranges ? request->ranges[0] : (struct range){0, 0};
    float * of_row = region->cells ? malloc((size_t) region->n_rows * sizeof(float)) : NULL;
    pthread_mutex_lock(&agent.lock);
    const struct sequence * sequence = of_row ? map_sequence(region, request->sequence, false) : NULL;
    const struct sampler *  sampler  = region->sampler;
    reply->status = sequence ? (sampler && sampler_failed(sampler) && request->flags >= ATTENTION ? 3 : 0) : 1;
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
                                                              : of_row[row];
    }
    pthread_mutex_unlock(&agent.lock);
    free(of_row);
    reply->count = values ? (uint32_t) (part.stop - part.start) : 0;
    return values ? to + (int64_t) (part.stop - part.start) * 4 : to;
}

// All that was sampled of a cache; with `from`, what is known from now on: for measurements that try one thing after
// another from the same beginning.
static char * tell_sampled(struct region * region, const char * from, size_t n_from, char * to, char * end) {
    void * parts[3];
    pthread_mutex_lock(&agent.lock);
    const size_t bytes = region->sampler ? sampler_memory(region->sampler, parts) : 0;
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

// ---- one message ----------------------------------------------------------------------------------------------------

static char * answer(const struct request * request, size_t n_message, char * to, char * end, struct reply * reply) {
    const double begin_s = agent_now_s();
    agent.watched        = true;
    if (request->op == HELLO) {
        const int32_t hello[2] = {(int32_t) getpid(), VERSION};
        return put(to, end, hello, sizeof(hello));
    }
    if (request->op == SNAPSHOT) {
        for (int i = 0; i < MAX_REGIONS && to; i++) {
            if (agent.regions[i].alive && (!request->region || agent.regions[i].id == request->region)) {
                to = tell_region(&agent.regions[i], to, end, request->flags & 1);
                reply->count++;
            }
        }
        return to;
    }
    if (request->op == COLLECT && request->n_ranges >= 3) {
        agent.sample_every = request->ranges[0].start, agent.sample_window = request->ranges[0].stop;
        agent.sample_near = request->ranges[1].start, agent.sample_layers = request->ranges[1].stop;
        agent.sample_half_life = (float) request->ranges[2].start;
        return to;
    }
    if (request->op == BLOBS) {
        static struct blob told[4096];
        const int n = blobs_tell(told, 4096);
        for (int i = 0; i < n && to; i++) {
            const struct blob_info info = {told[i].id, (told[i].parked ? 1u : 0u) | (told[i].checkpoint ? 2u : 0u), told[i].bytes, told[i].used_s};
            to = put(to, end, &info, sizeof(info));
            reply->count++;
        }
        return to;
    }
    if (request->op == PARK_BLOB) {
        reply->bytes = blob_park(request->region, &reply->written);
        return to;
    }
    if (request->op == REFUSE) {
        blobs_refuse(request->flags != 0);
        return to;
    }
    struct region * region = region_of_id(request->region);
    if (!region || agent.forked) {
        reply->status = 1;
        return to;
    }
    switch (request->op) {
        case SEQUENCE: return tell_sequence(region, request, to, end, reply);
        case EVIDENCE: return tell_evidence(region, request, to, end, reply);
        case SAMPLED:  return tell_sampled(region, (const char *) (request + 1), n_message - sizeof(*request), to, end);
        case MASK:
        case PARK:
        case WRITE:    park(region, request, begin_s, reply); break;
        case UNMASK:
        case UNPARK:   unpark(region, request, begin_s, reply); break;
        case RELEASE:  release(region, request, begin_s, reply); break;
        case FORGET:   forget_masks(region); break;
        default:       reply->status = 2;
    }
    return to;
}

void agent_alone(void) {
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (agent.regions[i].alive) {
            forget_masks(&agent.regions[i]);
        }
    }
    agent.watched      = false;
    agent.sample_every = 0;
    blobs_refuse(false);
}

// One request at a time. Gives the bytes of the reply, or minus the bytes that it would need.
EXPORT int64_t psikv_serve(const void * message, int64_t n_message, void * answer_to, int64_t capacity) {
    const struct request * request = message;
    struct reply reply = {.done = 1};
    char * to  = (char *) answer_to + sizeof(reply);
    char * end = (char *) answer_to + capacity - sizeof(agent.problem);
    if (capacity < (int64_t) (sizeof(reply) + sizeof(agent.problem)) || n_message < (int64_t) sizeof(*request) ||
        request->version != VERSION || n_message < (int64_t) (sizeof(*request) + request->n_ranges * sizeof(struct range))) {
        return 0;
    }
    const double begin_s = agent_now_s();
    pthread_mutex_lock(&serving);
    agent.problem[0] = 0;
    to               = answer(request, (size_t) n_message, to, end, &reply);
    const size_t n_problem = strlen(agent.problem);
    if (to) {
        memcpy(to, agent.problem, n_problem);
    }
    pthread_mutex_unlock(&serving);
    if (!to) {
        return -2 * capacity;
    }
    reply.n_problem = (uint32_t) n_problem;
    reply.seconds   = agent_now_s() - begin_s;
    memcpy(answer_to, &reply, sizeof(reply));
    return to + n_problem - (char *) answer_to;
}
