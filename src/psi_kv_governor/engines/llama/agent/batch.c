// Newer programs give llama.cpp their tokens in a batch that nobody can look into (llama_batch_ext): which sequences are
// in it is noted while it is filled. Whatever else its functions take is handed on as it is.

#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>

#include "agent.h"

#define MAX_BATCHES 16
#define MAX_TOKENS (1 << 20)
enum { UNKNOWN = -1 };

struct noted { const void * batch; int32_t n, capacity; int32_t * sequence; int32_t * pos; };

static struct noted    noted[MAX_BATCHES];
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

// What `llama_batch` looks like of one that was noted, for the call that this thread is in.
static __thread struct { struct llama_batch batch; int32_t capacity; } seen;

void batch_after_fork(void) { pthread_mutex_init(&mutex, NULL); }

static struct noted * of_batch(const void * batch, bool create) {
    struct noted * spare = NULL;
    for (int i = 0; i < MAX_BATCHES; i++) {
        if (noted[i].batch == batch) {
            return &noted[i];
        }
        spare = !noted[i].batch && !spare ? &noted[i] : spare;
    }
    if (create && spare) {
        *spare = (struct noted){.batch = batch};
    }
    return create ? spare : NULL;
}

static bool reach(struct noted * one, int32_t n) {
    if (n > one->capacity) {
        const int32_t capacity = n > 2 * one->capacity ? n + 64 : 2 * one->capacity;
        int32_t *     sequence = realloc(one->sequence, (size_t) capacity * sizeof(int32_t));
        one->sequence          = sequence ? sequence : one->sequence;
        int32_t * pos          = sequence ? realloc(one->pos, (size_t) capacity * sizeof(int32_t)) : NULL;
        one->pos               = pos ? pos : one->pos;
        if (!pos) {
            return false;
        }
        one->capacity = capacity;
    }
    for (; one->n < n; one->n++) {  // what came in by a way that is not known here
        one->sequence[one->n] = one->pos[one->n] = UNKNOWN;
    }
    return true;
}

void batch_added(const void * batch, int32_t at, int32_t sequence) {
    if (at < 0 || at >= MAX_TOKENS) {
        return;  // refused
    }
    pthread_mutex_lock(&mutex);
    struct noted * one = of_batch(batch, true);
    if (one && reach(one, at + 1)) {
        one->sequence[at] = sequence;
        one->pos[at]      = UNKNOWN;
    }
    pthread_mutex_unlock(&mutex);
}

// It belongs to one more sequence, or is at that position.
void batch_changed(const void * batch, int32_t at, const int32_t * pos) {
    pthread_mutex_lock(&mutex);
    struct noted * one = of_batch(batch, false);
    if (one && at >= 0 && at < one->n) {
        if (pos) {
            one->pos[at] = *pos;
        } else {
            one->sequence[at] = UNKNOWN;
        }
    }
    pthread_mutex_unlock(&mutex);
}

void batch_emptied(const void * batch, bool gone) {
    pthread_mutex_lock(&mutex);
    struct noted * one = of_batch(batch, false);
    if (one) {
        one->n = 0;
        if (gone) {
            free(one->sequence);
            free(one->pos);
            *one = (struct noted){0};
        }
    }
    pthread_mutex_unlock(&mutex);
}

static bool hold(int32_t n) {
    if (n <= seen.capacity) {
        return true;
    }
    free(seen.batch.pos);
    free(seen.batch.n_seq_id);
    free(seen.batch.seq_id);
    seen.batch.pos      = malloc((size_t) n * 2 * sizeof(int32_t));  // positions, then sequences
    seen.batch.n_seq_id = malloc((size_t) n * sizeof(int32_t));
    seen.batch.seq_id   = malloc((size_t) n * sizeof(int32_t *));
    const bool done     = seen.batch.pos && seen.batch.n_seq_id && seen.batch.seq_id;
    seen.capacity       = done ? n : 0;
    return done;
}

// The tokens of a noted batch; NULL where it was not noted, or in a way that can't be right.
const struct llama_batch * batch_seen(const void * batch, uint32_t n_seq_max) {
    pthread_mutex_lock(&mutex);
    const struct noted * one = of_batch(batch, false);
    bool right = batch && one && one->n > 0 && hold(one->n);
    for (int32_t i = 0; right && i < one->n; i++) {
        right = one->sequence[i] < (int32_t) n_seq_max;
        seen.batch.pos[i]                 = one->pos[i];
        seen.batch.pos[seen.capacity + i] = one->sequence[i];
        seen.batch.n_seq_id[i]            = one->sequence[i] < 0 ? 0 : 1;
        seen.batch.seq_id[i]              = &seen.batch.pos[seen.capacity + i];
    }
    seen.batch.n_tokens = right ? one->n : 0;
    pthread_mutex_unlock(&mutex);
    return right ? &seen.batch : NULL;
}
