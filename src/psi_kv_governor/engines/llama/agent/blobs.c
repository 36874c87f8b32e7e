// Saved states that a program keeps in memory: entries of a prompt cache, checkpoints. The program asks for a state's
// size, allocates so much, and has it filled; here this one allocation becomes a mapping of its own, which can be parked
// once it is whole. It is read again only when the state is loaded.

#define _GNU_SOURCE
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "blobs.h"

#define MAX_BLOBS 4096
#define LEAST_BYTES (1u << 20)

static struct blob blobs[MAX_BLOBS];
static int         n_blobs;  // slots used so far
static uint32_t    next_id;
static bool        refusing;
pthread_mutex_t    blob_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t written = PTHREAD_COND_INITIALIZER;  // some blob is busy no more

// The state that this thread is about to make room for.
static __thread struct { size_t bytes; uint32_t flags; } expected;

void blob_expect(size_t bytes, uint32_t flags) {
    expected.bytes = bytes;
    expected.flags = flags;
}

void blobs_refuse(bool refuse) { refusing = refuse; }

static struct blob * blob_at(const void * address) {
    for (int i = 0; i < n_blobs; i++) {
        if (blobs[i].bytes && (uintptr_t) address == blobs[i].base) {
            return &blobs[i];
        }
    }
    return NULL;
}

// For a handler of signals: nothing is locked.
bool blob_holds(uintptr_t address) {
    for (int i = 0; i < n_blobs; i++) {
        if (blobs[i].bytes && address >= blobs[i].base && address < blobs[i].base + blobs[i].mapped) {
            return true;
        }
    }
    return false;
}

static void * take(size_t bytes) {
    const size_t mapped = (bytes + page_bytes() - 1) & ~(page_bytes() - 1);
    void * at = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED) {
        return NULL;
    }
    pthread_mutex_lock(&blob_lock);
    int slot = 0;
    while (slot < n_blobs && blobs[slot].bytes) {
        slot++;
    }
    const bool fits = slot < MAX_BLOBS;
    if (fits) {
        n_blobs     = slot == n_blobs ? n_blobs + 1 : n_blobs;
        blobs[slot] = (struct blob){.id = ++next_id, .base = (uintptr_t) at, .bytes = bytes, .mapped = mapped,
                                    .checkpoint = expected.flags != 0, .used_s = agent_now_s()};
    }
    pthread_mutex_unlock(&blob_lock);
    if (!fits) {
        munmap(at, mapped);
    }
    return fits ? at : NULL;
}

static void unmap(struct blob * blob) {
    munmap((void *) blob->base, blob->mapped);
    blob->bytes = 0;
}

// One address in 256 of small ones lies at the start of a page. Nobody waits here for a disk: what is being written goes
// when that is done.
static bool gone(void * address) {
    if ((uintptr_t) address & (page_bytes() - 1)) {
        return false;
    }
    pthread_mutex_lock(&blob_lock);
    struct blob * blob = blob_at(address);
    if (blob && blob->busy) {
        blob->doomed = true;
    } else if (blob) {
        unmap(blob);
    }
    pthread_mutex_unlock(&blob_lock);
    return blob != NULL;
}

// What the module of whoever asks first would reach without us: of a Python program nobody else may have a libstdc++.
static void * (*real_new)(size_t);
static void (*real_delete)(void *);

static void find_real(void * caller) {
    static struct real_cache news, deletes;
    real_delete = (void (*)(void *)) real_of("_ZdlPv", caller, &deletes);
    real_new    = (void * (*)(size_t)) real_of("_Znwm", caller, &news);
}

// Where a program's operator new throws for want of memory, its own prompt cache makes itself smaller. A checkpoint
// must never fail.
EXPORT void * _Znwm(size_t bytes) {
    if (!real_new) {
        find_real(__builtin_return_address(0));
    }
    if (bytes >= LEAST_BYTES && bytes == expected.bytes) {
        const uint32_t flags = expected.flags;
        expected.bytes       = 0;
        if (refusing && flags == 0) {
            return real_new(SIZE_MAX / 2);  // throws what the program expects
        }
        void * at = take(bytes);
        if (at) {
            return at;
        }
    }
    return real_new(bytes);
}

EXPORT void _ZdlPv(void * address) {
    if (!address || (n_blobs && gone(address))) {
        return;
    }
    if (!real_delete) {
        find_real(__builtin_return_address(0));
    }
    real_delete(address);
}

EXPORT void _ZdlPvm(void * address, __attribute__((unused)) size_t bytes) { _ZdlPv(address); }

// A state is about to be written to `address`. What is in the file will not be it.
void blob_begun(const void * address) {
    pthread_mutex_lock(&blob_lock);
    struct blob * blob = blob_at(address);
    while (blob && blob->busy) {  // only its owner frees it, and is here
        pthread_cond_wait(&written, &blob_lock);
    }
    if (blob) {
        blob->whole = blob->parked = false;
    }
    pthread_mutex_unlock(&blob_lock);
}

// A state was written to `address`: if that is one of ours, it is whole.
void blob_whole(const void * address, size_t bytes) {
    if (!n_blobs || !bytes) {
        return;
    }
    pthread_mutex_lock(&blob_lock);
    struct blob * blob = blob_at(address);
    if (blob) {
        blob->whole  = true;
        blob->used_s = agent_now_s();
    }
    pthread_mutex_unlock(&blob_lock);
}

// It is about to be read, whole. A parked one is read ahead as one piece: page by page that was 3,500 reads for the 14 MB
// of a conversation of 300 tokens, of a disk with others at it.
void blob_used(const void * address) {
    pthread_mutex_lock(&blob_lock);
    const struct blob * blob = n_blobs ? blob_at(address) : NULL;
    const struct blob   one  = blob ? *blob : (struct blob){0};
    pthread_mutex_unlock(&blob_lock);
    // Only its owner frees it, and is here.
    for (uint64_t at = 0; one.parked && at < one.mapped; at += AHEAD_BYTES) {
        (void) madvise((void *) (one.base + at), one.mapped - at < AHEAD_BYTES ? one.mapped - at : AHEAD_BYTES, MADV_WILLNEED);
    }
    blob_whole(address, 1);
}

int blobs_tell(struct blob * to, int most) {
    int n = 0;
    pthread_mutex_lock(&blob_lock);
    for (int i = 0; i < n_blobs && n < most; i++) {
        if (blobs[i].bytes && blobs[i].whole && !blobs[i].doomed) {
            to[n++] = blobs[i];
        }
    }
    pthread_mutex_unlock(&blob_lock);
    return n;
}

// Moves a whole blob to a file; where it is `kept`, its pages stay in the page cache, clean, for the kernel to take. Nobody
// waits for the disk but this thread: it is not written while it is busy, and goes at the end if it was freed meanwhile.
// Gives the resident bytes that went.
uint64_t blob_park(uint32_t id, bool kept, uint64_t * bytes_written) {
    pthread_mutex_lock(&blob_lock);
    struct blob * blob = NULL;
    for (int i = 0; i < n_blobs && !blob; i++) {
        blob = blobs[i].bytes && blobs[i].whole && blobs[i].id == id ? &blobs[i] : NULL;
    }
    if (!blob || blob->busy) {
        pthread_mutex_unlock(&blob_lock);
        return 0;
    }
    blob->busy            = true;
    const struct blob one = *blob;
    pthread_mutex_unlock(&blob_lock);

    const uint64_t before = resident_in(one.base, one.base + one.mapped);
    bool           moved  = false;
    if (one.parked) {  // loaded since, and so back in memory: clean, and dropped as it is
        (void) madvise((void *) one.base, one.mapped, MADV_DONTNEED);
    } else {
        moved = move_to_file(one.base, one.base + one.mapped, kept);
        *bytes_written += moved ? one.mapped : 0;
    }
    const uint64_t after = resident_in(one.base, one.base + one.mapped);

    pthread_mutex_lock(&blob_lock);
    blob->busy   = false;
    blob->parked = one.parked || moved;
    if (blob->doomed) {
        unmap(blob);
    }
    pthread_cond_broadcast(&written);
    pthread_mutex_unlock(&blob_lock);
    return before > after ? before - after : 0;
}

// The writer is the parent's.
void blobs_after_fork(void) {
    pthread_mutex_init(&blob_lock, NULL);
    pthread_cond_init(&written, NULL);
    for (int i = 0; i < n_blobs; i++) {
        blobs[i].busy = false;
        if (blobs[i].bytes && blobs[i].doomed) {
            unmap(&blobs[i]);
        }
    }
}
