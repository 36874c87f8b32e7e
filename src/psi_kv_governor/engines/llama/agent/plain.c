// Summaries for engines that have no llama.cpp: the same code, given plain pointers. The caller sees to what is read and
// written; nothing here holds a lock or remembers anything.

#include "recall.h"
#include "values.h"

// Bytes of the summary of a head of `dim` values of a type; 0 where there is none.
EXPORT int64_t psikv_summary_bytes(int32_t type, int64_t dim) {
    return values_readable(type) && dim > 0 && dim % 2 == 0 && dim <= MAX_HEAD ? (int64_t) HEAD_BYTES(dim) : 0;
}

// The summaries of `n` heads whose values lie `row_step` bytes apart, `to_step` bytes apart.
EXPORT void psikv_summaries_make(uint8_t * to, int64_t to_step, int32_t type, const uint8_t * rows, int64_t row_step, int64_t n, int64_t dim) {
    const bool fast = fast_kernels();
    for (int64_t i = 0; i < n; i++) {
        (fast ? summary_make_avx2 : summary_make_any)(to + i * to_step, type, rows + i * row_step, dim);
    }
}

// The products of `n_queries` queries of `dim` floats with each of `n` summaries, `step` bytes apart: to[query][summary].
EXPORT void psikv_summaries_dots(float * to, const float * queries, int64_t n_queries, const uint8_t * summaries, int64_t step, int64_t n, int64_t dim) {
    (fast_kernels() ? summary_dots_avx2 : summary_dots_any)(to, queries, n_queries, summaries, step, n, dim);
}
