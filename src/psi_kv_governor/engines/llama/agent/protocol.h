// What the agent and its governor say to each other: one message in, one message out, the same in-process and over a
// socket. Plain structs in the byte order of the machine: both ends are on it.

#pragma once

#include "blobs.h"

enum { VERSION = 1 };
enum op { HELLO = 1, SNAPSHOT, SEQUENCE, MASK, UNMASK, PARK, UNPARK, WRITE, RELEASE, EVIDENCE, COLLECT, FORGET, BLOBS, PARK_BLOB, REFUSE, SAMPLED, BUFFERS, RECALL, RECALLED, EVICT, MARK };
enum kind { ARRIVALS = 1, KEY_NORMS, KEY_DIFFS, ATTENTION, LAST_USED, DEMAND };

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
    uint32_t id, flags;           // 1: by cell, 2: maskable, 4: born in a file, 8: a graph runs, 16: the map is stale, 32: free cells are in swap
    uint64_t context, n_rows, cell_bytes, row_bytes, size, resident, masked, affected;
    double   used_s;
    uint32_t n_sequences, n_readable;  // tensors of keys that can be read
    uint64_t written;             // by the agent, over all regions
    char     why_no_mask[96];
};

struct blob_info { uint32_t id, flags; uint64_t bytes; double used_s; };  // 1: parked, 2: a checkpoint

struct sequence_info { int32_t id, low, high, n, masked, affected, parked, lost; double used_s; };

// ---- orders.c, back.c, release.c and evict.c: acting on what was asked -----------------------------------------

// How long a program's call may be kept waiting for us, and how long we wait for it.
#define PATIENCE_S 0.02

bool refresh_map(struct region * region, bool anyway);
void order_park(struct region * region, const struct request * request, double begin_s, struct reply * reply);
void order_unpark(struct region * region, const struct request * request, double begin_s, struct reply * reply);
void order_release(struct region * region, const struct request * request, double begin_s, struct reply * reply);
uint64_t order_exchange(struct region * region, const uint8_t * rows);
void order_evict(struct region * region, const struct request * request, double begin_s, struct reply * reply);
void drop_free(struct region * region, const struct request * request, double begin_s, struct reply * reply);
bool asked_for(const struct request * request, int32_t pos);
bool late(const struct request * request, double begin_s);
bool enough(const struct request * request, const struct reply * reply);
enum act { ACT_PARK, ACT_WRITE, ACT_DROP, ACT_PARK_HERE };  // here: this thread's own graph has just ended
void act_on_all(struct region * region, const struct request * request, double begin_s, enum act act, struct reply * reply);
void act_on_rows(struct region * region, const struct request * request, double begin_s, enum act act, const uint8_t * rows, struct reply * reply);
void forget_masks(struct region * region);

// ---- state.c: saying what is. Each gives where its reply ends, NULL if there was no place for it -----------------

void map_settle(const struct region * region);  // waits while llama.cpp is asked, for some time. agent.lock is held
char * put(char * to, char * end, const void * from, size_t n);
char * tell_region(struct region * region, char * to, char * end, bool count_resident);
char * tell_sequence(struct region * region, const struct request * request, char * to, char * end, struct reply * reply);
char * tell_evidence(struct region * region, const struct request * request, char * to, char * end, struct reply * reply);
char * tell_sampled(struct region * region, const char * from, size_t n_from, char * to, char * end);
char * tell_blobs(char * to, char * end, struct reply * reply);
