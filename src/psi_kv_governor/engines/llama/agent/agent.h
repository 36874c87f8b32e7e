// What the parts of the agent share. The agent stands between a program and llama.cpp: it knows where the rows of each
// KV cache are and which of them nobody uses, parks and masks what it is told to, and decides nothing.

#pragma once

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#include "abi.h"

#define EXPORT __attribute__((visibility("default")))
#define MAX_REGIONS 64
#define MAX_SCHEDULERS 64
#define MAX_TENSORS 512
#define MAX_SEQUENCES 256

void agent_say(const char * format, ...) __attribute__((format(printf, 1, 2)));  // one line on stderr
double agent_now_s(void);
void * agent_dlsym(void * handle, const char * name);  // the C library's own, which a hook of ours may hide

// ---- real.c: the functions that the hooks stand before -----------------------------------------------------

#define REAL_SLOTS 64
struct real_slot { void * address; void * found; };
struct real_cache { struct real_cache * next; bool listed; struct real_slot slots[REAL_SLOTS]; };

// The function `name` that `caller` would reach without us: the one of its own module or of what that needs.
void * real_of(const char * name, void * caller, struct real_cache * cache);

// Functions of one loaded llama.cpp that the agent calls by itself.
struct lib {
    void * module;               // NULL: it was closed
    const char * module_name;    // where its name stands, which nobody reads
    uintptr_t module_base;
    bool   proven;  // the layout of struct ggml_tensor is as declared
    struct { int32_t set_rows, flash, view, reshape, permute, transpose, none, cont, cpy, rope; } op;
    int     (*graph_n_nodes)(struct ggml_cgraph *);
    struct ggml_tensor * (*graph_node)(struct ggml_cgraph *, int);
    const char * (*op_name)(int32_t);
    const char * (*get_name)(const struct ggml_tensor *);
    void *  (*get_data)(const struct ggml_tensor *);
    struct ggml_tensor * (*first_tensor)(const struct ggml_context *);
    struct ggml_tensor * (*next_tensor)(const struct ggml_context *, struct ggml_tensor *);
    void *  (*buffer_base)(ggml_backend_buffer_t);
    size_t  (*buffer_size)(ggml_backend_buffer_t);
    const char * (*buffer_name)(ggml_backend_buffer_t);
    bool    (*buffer_is_host)(ggml_backend_buffer_t);
    void    (*set_eval_callback)(ggml_backend_sched_t, ggml_backend_sched_eval_callback, void *);
    llama_memory_t (*get_memory)(const struct llama_context *);
    uint32_t (*n_seq_max)(const struct llama_context *);
    int32_t (*pos_min)(llama_memory_t, int32_t);
    int32_t (*pos_max)(llama_memory_t, int32_t);
    bool    (*seq_rm)(llama_memory_t, int32_t, int32_t, int32_t);
    void    (*synchronize)(struct llama_context *);
    size_t  (*state_seq_get)(struct llama_context *, uint8_t *, size_t, int32_t, uint32_t);
};

struct lib * lib_of(void * address);
bool lib_proven(struct lib * lib, const struct ggml_tensor * tensor);

// ---- gate.c: when the agent may look at llama.cpp's bookkeeping, and when it may move pages -------------------

void gate_enter(void);           // the program is about to call into llama.cpp
void gate_leave(void);
void gate_compute_begin(void);   // a graph is about to run: its writes are known, and nothing else changes
void gate_compute_end(void);
bool gate_take(bool and_graphs, double patience_s);  // nobody is in llama.cpp (and, or, no graph runs either)
bool gate_take_between_calls(double patience_s);  // no call has begun
void gate_give(void);
bool gate_inside(void);          // this thread is inside of a call
struct timespec realtime_in(double seconds);
void gate_after_fork(void);

// ---- region.c: the buffers of caches, from birth to end -------------------------------------------------------

enum row_flag { ROW_USED = 1, ROW_MASKED = 2, ROW_PARKED = 4, ROW_AFFECTED = 8, ROW_LOST = 16 };  // the last is only told

struct tensor {
    struct ggml_tensor * identity;
    char     name[64];
    uint64_t base;
    uint64_t row_bytes;
    uint64_t n_rows;     // over all streams
    int32_t  type;
    bool     keys;
    bool     whole_rows; // one cell is one row: seen in a graph; a transposed V is not
    int32_t  head_dim;   // of a key; 0 until a graph told
    int32_t  n_head;     // query heads of the flash attention that reads it; 0 without it
    bool     alibi;
    bool     sampled;
};

// `lost` are positions that were evicted, in order: only decoding them again brings them back.
struct sequence { int32_t id; int32_t n, capacity; int32_t * rows; int32_t highest; int32_t n_lost; int32_t * lost; bool parked; double used_s; };

enum backing { BACKING_MEMORY = 0, BACKING_FILE = 1 };

struct sampler;
struct recall;

struct region {
    uint32_t id;
    bool     alive, asked;       // asked: llama.cpp is, and until it has told all the map is known in part
    ggml_backend_buffer_t buffer;
    struct lib * lib;
    struct llama_context * ctx;  // NULL until a graph of it ran
    uint64_t base, end;          // the buffer
    uint64_t first, last;        // its whole pages
    enum backing backing;
    bool     mapped;             // some of its pages are, or were, mappings of a file
    int      fd, direct_fd;      // -1: nothing is parked yet, or it can't be
    bool     disk_failed;        // it refused pages with an error: nothing is parked on it any more
    uint8_t * in_file;           // one a page: its content is in the file (backing memory only)
    struct tensor * tensors;
    int32_t  n_tensors, leader;  // the leader's indices and addresses stand for all
    int64_t  n_rows, stream_rows;  // of all streams, and of each
    int64_t * reached;           // of each stream: rows before it may hold something, since they were last dropped
    uint64_t cell_bytes, shortest_row_bytes;
    bool     cells;              // it holds keys and values by cell (a recurrent state does not)
    bool     copied;             // between streams, which llama.cpp does whole and later: any row may hold something
    bool     masks;              // its attention takes a mask that we can write
    char     why_no_mask[96];
    int32_t * pos;               // [n_rows], -1: not known
    uint8_t * flags;             // [n_rows]
    int64_t  n_masked, n_affected, n_lost;
    struct sequence sequences[MAX_SEQUENCES];
    int32_t  n_sequences;
    uint64_t map_generation;     // memory_generation when it was asked
    double   used_s;
    // What the graph that runs writes: rows first..last of each tensor, or everything.
    bool     computing, writes_all;
    uint64_t n_graphs, masked_in;  // that have begun; and during which of them rows were masked last
    int64_t  took_rows;          // the last one that is over wrote so many rows,
    double   took_s;             // and took so long
    int64_t * write_rows;
    int64_t  n_write_rows, write_capacity;
    struct sampler * sampler;
    struct recall * recall;      // NULL until something of it was masked
};

struct agent {
    pthread_mutex_t lock;        // of everything here and in the regions; held for microseconds
    pthread_cond_t  graph_over;  // a graph is
    struct region regions[MAX_REGIONS];
    uint32_t next_id, next_buffer;
    uint64_t memory_generation;  // cells changed hands since
    uint64_t region_changes;     // a cache was born, or ended
    uint64_t written_bytes, born_bytes;
    char     place[512];
    int      want_backing;       // enum backing
    uint64_t reserve_bytes, limit_bytes;
    char     problem[1024];      // the last reason for which less was done than asked
    bool     forked;
    bool     watched;            // somebody may ask soon: keep the map fresh
    bool     evicts;             // cells were removed for good
    int      sample_every, sample_window, sample_near, sample_layers;
    float    sample_half_life;
};

extern struct agent agent;

size_t page_bytes(void);
void region_born(struct lib * lib, ggml_backend_buffer_t buffer, struct ggml_context * tensors);
bool region_clear(ggml_backend_buffer_t buffer);     // true: done, no page became resident
void region_gone(ggml_backend_buffer_t buffer);
struct region * region_of_address(uint64_t address);
struct region * region_of_buffer(ggml_backend_buffer_t buffer);
struct region * region_of_id(uint32_t id);
struct region * region_of_memory(llama_memory_t memory, const struct region * after);  // the next one with cells of it
struct tensor * region_tensor(struct region * region, uint64_t address);
// Pages of rows [from, to) of a tensor, within the region: those that hold nothing else, or outward all that hold some of them.
bool pages_of(const struct region * region, const struct tensor * tensor, int64_t from, int64_t to, bool outward, uint64_t * first, uint64_t * last);
void regions_after_fork(bool child);

// ---- place.c: the folder where parked bytes live --------------------------------------------------------------

int open_unlinked(int flags);
bool space_for(uint64_t bytes);
bool bear_in_file(struct region * region);
bool have_file(struct region * region);
void no_read_ahead(uint64_t first, uint64_t last);

// ---- resident.c: which pages of a range are in memory ---------------------------------------------------------

#define MAP_BATCH 4096
#define IN_MEMORY (1ull << 63)
#define IN_SWAP   (1ull << 62)
#define OF_FILE   (1ull << 61)
bool page_map(uint64_t first, size_t n, uint64_t * entries);
uint64_t resident_in(uint64_t first, uint64_t last);
uint64_t resident_of(const struct region * region, uint64_t first, uint64_t last);  // the same, faster where the kernel can
uint64_t held_in(uint64_t first, uint64_t last, uint64_t * swapped);

// ---- pages.c: the pages of a range, and where their bytes reside ----------------------------------------------

// Parks pages [first, last). Gives the resident bytes that went; agent.problem says why less.
uint64_t park_pages(struct region * region, uint64_t first, uint64_t last, uint64_t * written);
// Writes them while they stay resident.
void write_pages(struct region * region, uint64_t first, uint64_t last);
// The kernel reads no more for one call than it would by itself (128 KiB on most machines), and forgets the rest of a
// greater wish without a word: that came page by page, 0.3 s and more for a conversation of 600 tokens.
#define AHEAD_BYTES (128u << 10)
// Starts reading them, without waiting.
void expect_rows(struct region * region, int64_t from, int64_t to);
// Has them back.
void read_pages(uint64_t first, uint64_t last);
// Drops their content. Gives the resident bytes that went.
uint64_t drop_pages(struct region * region, uint64_t first, uint64_t last);
// Whether the graph that runs may write into these pages.
bool being_written(const struct region * region, uint64_t first, uint64_t last);
// Moves pages of a mapping of our own, which nobody writes, to an unlinked file that vanishes with the mapping.
bool move_to_file(uint64_t first, uint64_t last, bool kept);

// ---- buffers.c: all buffers of caches, also those of a device --------------------------------------------------

struct buffer_info { uint32_t number, n_tensors, cells, is_host; uint64_t size, n_rows; char name[64]; };

char tensor_kind(const char * name);
bool buffer_born(struct lib * lib, ggml_backend_buffer_t buffer, struct ggml_context * context);
void buffer_gone(ggml_backend_buffer_t buffer);
int  buffers_tell(struct buffer_info * to, int most);

// ---- map.c: which rows belong to which sequence ---------------------------------------------------------------
bool map_asking(const struct ggml_tensor * tensor, size_t offset, size_t size);  // in ggml_backend_tensor_get
bool map_refresh(struct llama_context * ctx, struct lib * lib);  // nobody else may be in llama.cpp
bool map_used(struct llama_context * ctx, struct lib * lib);     // the same, but only which rows are used
bool map_fresh(const struct region * region);
struct sequence * map_sequence(struct region * region, int32_t id, bool create);
void map_append(struct region * region, int32_t id, int32_t row);
bool map_untouched(llama_memory_t memory, int32_t p0);  // nothing lies at p0 or after
void map_before_shift(llama_memory_t memory);
void map_shift(llama_memory_t memory, int32_t id, int32_t p0, int32_t p1, int32_t delta, int32_t divide);

// ---- evict.c: cells that were removed for good ------------------------------------------------------------------

void lost_change(struct region * region, struct sequence * sequence, int32_t p0, int32_t p1, bool gone, int32_t delta, int32_t divide);
void lost_loaded(struct region * region, struct sequence * sequence);
void lost_removed(llama_memory_t memory, int32_t id, int32_t p0, int32_t p1, bool but);  // of `id`, or of all but it
void lost_copied(llama_memory_t memory, int32_t from, int32_t to, int32_t p0, int32_t p1);

// ---- rows.c: which rows may hold something -------------------------------------------------------------------------

void rows_reached(struct region * region, int64_t row);  // it was written; below 0: all of them were
void rows_dropped(struct region * region);               // those that are free hold nothing any more
bool row_reached(const struct region * region, int64_t row);

// ---- graph.c, and graph.h for its parts: the mask, the rows that a graph writes, and attention -----------------

void graph_before(struct lib * lib, ggml_backend_sched_t sched, struct ggml_cgraph * graph);
void graph_after(void);
void graph_wait(struct region * region, double most_s);  // agent.lock is held
void graph_note_callback(ggml_backend_sched_t sched, ggml_backend_sched_eval_callback callback, void * user);
void graph_laid_out(const struct lib * lib, ggml_backend_sched_t sched, struct ggml_cgraph * graph);  // lib: of the graph
void graph_forget_scheduler(ggml_backend_sched_t sched);
void graph_call_begin(struct llama_context * ctx, const struct llama_batch * batch, bool again);
void graph_call_end(void);
void graph_state_read(struct llama_context * ctx, int32_t sequence);
void rows_overwritten(const struct ggml_tensor * tensor, size_t offset, size_t size);

// ---- attention.c, keys.c: evidence ----------------------------------------------------------------------------

struct sampler * sampler_new(int64_t n_cells, int32_t every, int32_t window, float keep, int32_t near);
void sampler_free(struct sampler * sampler);
void sampler_written(struct sampler * sampler, const int64_t * cells, int64_t n, bool again);
void sampler_again(struct sampler * sampler, int64_t n);  // the last n tokens are about to be decoded once more
bool sampler_due(const struct sampler * sampler);
void sampler_observe(struct sampler * sampler, const struct ggml_tensor * node);
float sampler_attention(const struct sampler * sampler, int64_t row);  // NaN: none was sampled
float sampler_last_used(const struct sampler * sampler, int64_t row);
double sampler_born(const struct sampler * sampler, int64_t row);
bool sampler_failed(const struct sampler * sampler);
size_t sampler_memory(struct sampler * sampler, void * parts[3]);  // all that was sampled: so many bytes in each part
bool keys_score(const struct tensor * keys, bool cosine, const int32_t * rows, int64_t n, float * out, float * scratch);
bool keys_readable(const struct tensor * keys);

// ---- serve.c, and protocol.h for its parts: one message in, one out -------------------------------------------

extern pthread_mutex_t serving;  // a request is being carried out: no buffer may go meanwhile
extern pthread_mutex_t blob_lock, lib_lock;
EXPORT int64_t psikv_serve(const void * request, int64_t n_request, void * reply, int64_t capacity);
EXPORT void psikv_configure(const char * place, int32_t backing, uint64_t reserve_bytes, uint64_t limit_bytes, const char * library);
void socket_start(void);
void socket_after_fork(void);
void agent_alone(void);  // the sidecar is gone: all masks are taken off
void sigbus_install(void);

// ---- batch.c: which sequences are in a batch of the newer kind --------------------------------------------------

void batch_added(const void * batch, int32_t at, int32_t sequence);
void batch_changed(const void * batch, int32_t at, const int32_t * pos);
void batch_emptied(const void * batch, bool gone);
const struct llama_batch * batch_seen(const void * batch, uint32_t n_seq_max);
void batch_after_fork(void);

// ---- libc.c: demand paging of a llama.cpp that is linked into the program -------------------------------------

void libc_start(void);
void libc_after_fork(void);
