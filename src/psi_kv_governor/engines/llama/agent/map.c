// Which rows belong to which sequence. llama.cpp is asked, in public functions only: the state of a sequence is "saved"
// into memory that nobody fills, while the copies that this takes are written down instead of made. Between two
// questions the rows of each decode are added as they are written. The map decides what is cold, and nothing else.

#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "agent.h"

// Numbers before the positions in a saved sequence: of streams and of cells, and a version where there is one.
#define MOST_COUNTS 16

static __thread struct { bool on; int32_t id; } asking;

struct sequence * map_sequence(struct region * region, int32_t id, bool create) {
    for (int32_t i = 0; i < region->n_sequences; i++) {
        if (region->sequences[i].id == id) {
            return &region->sequences[i];
        }
    }
    if (!create || region->n_sequences == MAX_SEQUENCES) {
        return NULL;
    }
    struct sequence * sequence = &region->sequences[region->n_sequences++];
    *sequence = (struct sequence){.id = id, .highest = -1};
    return sequence;
}

static void append(struct region * region, struct sequence * sequence, int32_t row) {
    if (sequence->n == sequence->capacity) {
        const int32_t capacity = sequence->capacity ? 2 * sequence->capacity : 1024;
        int32_t *     rows     = realloc(sequence->rows, (size_t) capacity * sizeof(int32_t));
        if (!rows) {
            return;  // an incomplete map only leaves cells where they are
        }
        sequence->rows     = rows;
        sequence->capacity = capacity;
    }
    sequence->rows[sequence->n++] = row;
    sequence->highest             = region->pos[row] > sequence->highest ? region->pos[row] : sequence->highest;
}

void map_append(struct region * region, int32_t id, int32_t row) {
    struct sequence * sequence = map_sequence(region, id, true);
    if (sequence) {
        append(region, sequence, row);
    }
}

bool map_fresh(const struct region * region) {
    return region->map_generation > 1 && region->map_generation == agent.memory_generation + 2;
}

// In ggml_backend_tensor_get: true where the copy is only written down.
bool map_asking(const struct ggml_tensor * tensor, size_t offset, size_t size) {
    if (!asking.on) {
        return false;
    }
    const uint64_t  address = (uint64_t) (uintptr_t) tensor->data + offset;
    struct region * region  = region_of_address(address);
    if (region && region->cells) {
        const struct tensor * leader = &region->tensors[region->leader];
        if (address >= leader->base && address < leader->base + leader->row_bytes * leader->n_rows) {
            const int32_t row = (int32_t) ((address - leader->base) / leader->row_bytes);
            const int32_t n   = (int32_t) (size / leader->row_bytes);
            // Looked up once, and not for each of 131,072 rows among 128 sequences.
            struct sequence * sequence = asking.id >= 0 ? map_sequence(region, asking.id, true) : NULL;
            for (int32_t i = row; i < row + n && i < region->n_rows; i++) {
                if (sequence) {
                    append(region, sequence, i);
                }
                region->flags[i] |= ROW_USED;
            }
        }
    }
    return true;
}

static int by_position(const void * a, const void * b, void * pos) {
    const int32_t x = ((const int32_t *) pos)[*(const int32_t *) a], y = ((const int32_t *) pos)[*(const int32_t *) b];
    return (x > y) - (x < y);
}

// A saved sequence begins with a few counts, and then says of each cell: its position, how many sequences it is of (here one
// at the most), and which. Believed only where every cell of the map is told of, and the highest position is the one that
// llama.cpp has.
static bool positions_saved(struct region * region, const struct sequence * sequence, int32_t highest, const int32_t * state) {
    for (int start = 0; start < MOST_COUNTS; start++) {
        const int32_t * at = &state[start + 1];
        int32_t most = -1, i = 0;
        for (; state[start] == sequence->n && i < sequence->n; i++) {
            if (at[0] < 0 || at[0] > highest || at[1] < 0 || at[1] > 1 || (at[1] && at[2] != sequence->id)) {
                break;
            }
            region->pos[sequence->rows[i]] = at[0];
            most = at[0] > most ? at[0] : most;
            at += 2 + at[1];
        }
        if (i > 0 && i == sequence->n && most == highest) {
            return true;
        }
    }
    return false;
}

static bool only_cache(const struct region * region) {
    llama_memory_t memory = region->lib->get_memory(region->ctx);
    return region_of_memory(memory, NULL) == region && !region_of_memory(memory, region);
}

// Positions come from the graphs that wrote the rows. Of rows that came otherwise (a loaded state) the saved sequence tells
// them; where that is not understood they are taken to be in the order of their cells, up to the highest.
static void place(struct region * region, struct sequence * sequence, int32_t highest, const int32_t * state) {
    sequence->highest = highest;
    lost_change(region, sequence, highest, -1, true, 0, 1);
    bool known = true, sorted = true;
    for (int32_t i = 0; i < sequence->n; i++) {
        const int32_t pos = region->pos[sequence->rows[i]];
        known = known && pos >= 0 && pos <= highest;
    }
    if (!known && !(only_cache(region) && positions_saved(region, sequence, highest, state))) {
        for (int32_t i = 0; i < sequence->n; i++) {
            region->pos[sequence->rows[i]] = highest - (sequence->n - 1) + i;
        }
    }
    for (int32_t i = 1; i < sequence->n; i++) {
        sorted = sorted && region->pos[sequence->rows[i]] > region->pos[sequence->rows[i - 1]];
    }
    if (!sorted) {
        qsort_r(sequence->rows, (size_t) sequence->n, sizeof(int32_t), by_position, region->pos);
    }
    if (!known) {
        lost_loaded(region, sequence);
    }
}

// Has llama.cpp "save" a sequence (-1: all of them). False where it gives nothing.
static bool save(struct llama_context * ctx, struct lib * lib, int32_t id, void * scratch, size_t bytes) {
    asking.on      = true;
    asking.id      = id;
    const size_t n = lib->state_seq_get(ctx, scratch, bytes, id, 0);
    asking.on      = false;
    return n > 0;
}

// Whether all caches of `ctx` are asked. agent.lock is held.
static void asked(const struct llama_context * ctx, bool on) {
    for (int i = 0; i < MAX_REGIONS; i++) {
        if (agent.regions[i].alive && agent.regions[i].ctx == ctx) {
            agent.regions[i].asked = on;
        }
    }
    pthread_cond_broadcast(&agent.graph_over);
}

// Asks for all caches of `ctx`: which rows each sequence has, and which are used at all. Not `each`: only the latter, in one
// look at all cells and not in one for each of 128 sequences.
static bool ask(struct llama_context * ctx, struct lib * lib, bool each) {
    if (!lib->state_seq_get || !lib->get_memory || !lib->pos_max || !lib->n_seq_max) {
        return false;
    }
    llama_memory_t memory = lib->get_memory(ctx);
    if (!memory) {
        return false;
    }
    pthread_mutex_lock(&agent.lock);
    size_t bytes = 1 << 20;
    for (int i = 0; i < MAX_REGIONS; i++) {
        const struct region * region = &agent.regions[i];
        const bool ours = region->alive && region->ctx == ctx;
        bytes += ours ? region->last - region->first + (size_t) (region->n_rows + 1) * 64 + (1 << 16) : 0;
    }
    void * scratch = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (scratch == MAP_FAILED) {
        pthread_mutex_unlock(&agent.lock);
        return false;
    }
    asked(ctx, true);
    for (int i = 0; i < MAX_REGIONS; i++) {
        struct region * region = &agent.regions[i];
        if (region->alive && region->ctx == ctx && region->cells) {
            for (int32_t j = 0; each && j < region->n_sequences; j++) {
                region->sequences[j].n       = 0;
                region->sequences[j].highest = -1;
            }
            for (int64_t j = 0; j < region->n_rows; j++) {
                region->flags[j] &= (uint8_t) ~ROW_USED;
            }
        }
    }
    const uint64_t generation = agent.memory_generation;
    pthread_mutex_unlock(&agent.lock);
    const uint32_t n = lib->n_seq_max(ctx) < MAX_SEQUENCES ? lib->n_seq_max(ctx) : MAX_SEQUENCES;
    for (uint32_t id = 0; each && id < n; id++) {
        const int32_t highest = lib->pos_max(memory, (int32_t) id);
        if (highest < 0) {
            continue;
        }
        (void) save(ctx, lib, (int32_t) id, scratch, bytes);
        pthread_mutex_lock(&agent.lock);
        for (int i = 0; i < MAX_REGIONS; i++) {
            struct region *   region   = &agent.regions[i];
            struct sequence * sequence = region->alive && region->ctx == ctx && region->cells ? map_sequence(region, (int32_t) id, false) : NULL;
            if (sequence) {
                place(region, sequence, highest, scratch);
            }
        }
        pthread_mutex_unlock(&agent.lock);
    }
    // Cells outside of a sliding window are left out above, but may be looked at again after a rollback: -1 lists them.
    const bool told = save(ctx, lib, -1, scratch, bytes);
    munmap(scratch, bytes);
    pthread_mutex_lock(&agent.lock);
    asked(ctx, false);
    if (!told && !each) {
        agent.memory_generation++;  // what is used has to be asked for again
        pthread_mutex_unlock(&agent.lock);
        return false;
    }
    for (int i = 0; i < MAX_REGIONS; i++) {
        struct region * region = &agent.regions[i];
        if (!region->alive || region->ctx != ctx || !region->cells) {
            continue;
        }
        region->map_generation = each ? generation + 2 : region->map_generation;  // 0: new, 1: cleared once
        for (int32_t j = 0; each && region->n_lost && j < region->n_sequences; j++) {
            if (region->sequences[j].n == 0) {
                lost_change(region, &region->sequences[j], 0, -1, true, 0, 1);
            }
        }
        for (int64_t j = 0; j < region->n_rows; j++) {
            if (!(region->flags[j] & ROW_USED) && region->flags[j]) {
                region->n_masked -= (region->flags[j] & ROW_MASKED) != 0;
                region->n_affected -= (region->flags[j] & ROW_AFFECTED) != 0;
                region->flags[j] = 0;
            }
        }
    }
    pthread_mutex_unlock(&agent.lock);
    return true;
}

bool map_refresh(struct llama_context * ctx, struct lib * lib) { return ask(ctx, lib, true); }

bool map_used(struct llama_context * ctx, struct lib * lib) { return ask(ctx, lib, false); }

// A tail is cut before every decode by some programs, where there is none.
bool map_untouched(llama_memory_t memory, int32_t p0) {
    bool untouched = p0 > 0;
    pthread_mutex_lock(&agent.lock);
    for (const struct region * region = NULL; untouched && (region = region_of_memory(memory, region));) {
        untouched = map_fresh(region);
        for (int32_t j = 0; j < region->n_sequences && untouched; j++) {
            untouched = region->sequences[j].highest < p0;
        }
    }
    pthread_mutex_unlock(&agent.lock);
    return untouched;
}

// Positions are about to change. Which cells they belong to has to be known then: a copy or a load may have come since the
// map was made. Nobody else may be in llama.cpp.
void map_before_shift(llama_memory_t memory) {
    pthread_mutex_lock(&agent.lock);
    const struct region * region = NULL;
    while ((region = region_of_memory(memory, region)) && map_fresh(region)) {
    }
    struct llama_context * ctx = region ? region->ctx : NULL;
    struct lib *           lib = region ? region->lib : NULL;
    pthread_mutex_unlock(&agent.lock);
    if (ctx) {
        (void) map_refresh(ctx, lib);
    }
}

// llama_memory_seq_add and seq_div: the cells stay, their positions change.
void map_shift(llama_memory_t memory, int32_t id, int32_t p0, int32_t p1, int32_t delta, int32_t divide) {
    pthread_mutex_lock(&agent.lock);
    for (struct region * region = NULL; (region = region_of_memory(memory, region));) {
        struct sequence * sequence = map_sequence(region, id, false);
        if (sequence) {
            lost_change(region, sequence, p0 < 0 ? 0 : p0, p1, false, delta, divide);
        }
        for (int32_t j = 0; sequence && j < sequence->n; j++) {
            int32_t * pos = &region->pos[sequence->rows[j]];
            if (*pos >= (p0 < 0 ? 0 : p0) && (p1 < 0 || *pos < p1)) {
                *pos = divide > 1 ? *pos / divide : *pos + delta;
            }
        }
    }
    agent.memory_generation++;
    pthread_mutex_unlock(&agent.lock);
}
