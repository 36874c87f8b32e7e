// What every hook does: it finds the function that it stands before, and enters the gate where that may touch a cache.

#pragma once

#include "blobs.h"
#include "recall.h"

static inline void gate_left(int * unused) {
    (void) unused;
    gate_leave();
}

// The gate is left however the call ends, also by an exception that passes through.
#define CALLER __builtin_return_address(0)
#define REAL(name)                                                                       \
    static struct real_cache cache;                                                      \
    typeof(&name) real = (typeof(&name)) real_of(#name, CALLER, &cache)
#define INSIDE                                                                           \
    __attribute__((cleanup(gate_left), unused)) int inside = 0;                               \
    gate_enter()
