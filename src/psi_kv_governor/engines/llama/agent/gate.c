// The gate between the program's calls into llama.cpp and the agent's own work. Any number of calls may be inside at
// once, in any number of threads, as without us. The agent takes the gate for a moment when nobody is inside; while a
// graph runs, a call counts as outside for those who only move pages that this graph does not write.

#include <errno.h>
#include <time.h>

#include "agent.h"

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  changed = PTHREAD_COND_INITIALIZER;
static int  calls, inside, computing, waiting, waiting_for_end;
static bool taken, handed;
static __thread int depth;

bool gate_inside(void) { return depth > 0; }

void gate_enter(void) {
    if (depth++ > 0) {
        return;
    }
    pthread_mutex_lock(&mutex);
    while (taken || waiting > 0) {
        pthread_cond_wait(&changed, &mutex);
    }
    inside++;
    calls++;
    pthread_mutex_unlock(&mutex);
}

void gate_leave(void) {
    if (--depth > 0) {
        return;
    }
    pthread_mutex_lock(&mutex);
    inside--;
    if (--calls == 0 && waiting_for_end > 0 && !taken) {
        taken = handed = true;  // else the next call would most likely be there first
    }
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

// Between two micro-batches: whoever waits is let in first, then the graph runs.
void gate_compute_begin(void) {
    pthread_mutex_lock(&mutex);
    inside--;
    pthread_cond_broadcast(&changed);
    while (taken || waiting > 0) {
        pthread_cond_wait(&changed, &mutex);
    }
    computing++;
    pthread_mutex_unlock(&mutex);
}

void gate_compute_end(void) {
    pthread_mutex_lock(&mutex);
    while (taken) {  // not for those who wait: they may be waiting for this graph
        pthread_cond_wait(&changed, &mutex);
    }
    computing--;
    inside++;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

struct timespec realtime_in(double seconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    const long long ns = until.tv_nsec + (long long) (seconds * 1e9);
    until.tv_sec += ns / 1000000000;
    until.tv_nsec = ns % 1000000000;
    return until;
}

// `patience_s` bounds the wait; the program waits no longer than that for somebody who waits.
bool gate_take(bool and_graphs, double patience_s) {
    const struct timespec until = realtime_in(patience_s);
    pthread_mutex_lock(&mutex);
    waiting++;
    int error = 0;
    while ((taken || inside > 0 || (and_graphs && computing > 0)) && error != ETIMEDOUT) {
        error = pthread_cond_timedwait(&changed, &mutex, &until);
    }
    waiting--;
    const bool free = !taken && inside == 0 && !(and_graphs && computing > 0);
    taken           = taken || free;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
    return free;
}

// Where no call has begun, or when the last one ends: also between its micro-batches nobody is let in. The program waits
// for nobody meanwhile.
bool gate_take_between_calls(double patience_s) {
    const struct timespec until = realtime_in(patience_s);
    pthread_mutex_lock(&mutex);
    int error = 0;
    waiting_for_end++;
    while (!handed && (taken || calls > 0) && error != ETIMEDOUT) {
        error = pthread_cond_timedwait(&changed, &mutex, &until);
    }
    waiting_for_end--;
    const bool free = handed || (!taken && calls == 0);
    taken           = taken || free;
    handed          = false;
    pthread_mutex_unlock(&mutex);
    return free;
}

void gate_give(void) {
    pthread_mutex_lock(&mutex);
    taken = false;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&mutex);
}

// In a forked child only the forking thread lives on.
void gate_after_fork(void) {
    pthread_mutex_init(&mutex, NULL);
    pthread_cond_init(&changed, NULL);
    inside = calls = depth > 0;
    computing = waiting = waiting_for_end = 0;
    taken = handed = false;
}
