// Answers one message: checks it, and hands it to what acts (orders.c) or says what is (state.c).

#define _GNU_SOURCE
#include <string.h>
#include <unistd.h>

#include "protocol.h"
#include "recall.h"

pthread_mutex_t serving = PTHREAD_MUTEX_INITIALIZER;

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
    if (request->op == RECALL && request->n_ranges >= 4) {
        const struct range * r = request->ranges;
        pthread_mutex_lock(&agent.lock);
        recall_settings.mode = r[0].start, recall_settings.every = r[0].stop > 0 ? r[0].stop : 1;
        recall_settings.sink_cells = r[1].start, recall_settings.window_cells = r[1].stop;
        recall_settings.layers = r[2].start, recall_settings.paused = r[2].stop != 0;
        recall_settings.bytes_per_s = r[3].start * 1048576.0;
        const int32_t n_marked = (int32_t) request->n_ranges - 4;
        recall_settings.n_marked = n_marked < MOST_MARKED ? n_marked : MOST_MARKED;
        memcpy(recall_settings.marked, r + 4, (size_t) recall_settings.n_marked * sizeof(struct range));
        pthread_mutex_unlock(&agent.lock);
        return to;
    }
    if (request->op == BLOBS) {
        return tell_blobs(to, end, reply);
    }
    if (request->op == BUFFERS) {
        static struct buffer_info told[256];
        pthread_mutex_lock(&agent.lock);
        reply->count = (uint32_t) buffers_tell(told, 256);
        pthread_mutex_unlock(&agent.lock);
        return put(to, end, told, reply->count * sizeof(told[0]));
    }
    if (request->op == PARK_BLOB) {
        reply->bytes = blob_park(request->region, request->flags & 1, &reply->written);
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
        case MARK:
        case MASK:
        case PARK:
        case WRITE:    order_park(region, request, begin_s, reply); break;
        case UNMASK:
        case UNPARK:   order_unpark(region, request, begin_s, reply); break;
        case RELEASE:  order_release(region, request, begin_s, reply); break;
        case EVICT:    order_evict(region, request, begin_s, reply); break;
        case FORGET:   forget_masks(region); break;
        case RECALLED: return recall_tell(region, to, end);
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
    recall_settings.mode = 0;
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
