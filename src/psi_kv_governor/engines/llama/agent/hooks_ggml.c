// The hooks before ggml: buffers of caches, and the graphs that use them.

#include "hooks.h"

// ---- buffers ------------------------------------------------------------------------------------------------

EXPORT ggml_backend_buffer_t ggml_backend_alloc_ctx_tensors_from_buft(struct ggml_context * context, ggml_backend_buffer_type_t type) {
    REAL(ggml_backend_alloc_ctx_tensors_from_buft);
    ggml_backend_buffer_t buffer = real(context, type);
    region_born(lib_of(CALLER), buffer, context);
    return buffer;
}

EXPORT void ggml_backend_buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    REAL(ggml_backend_buffer_clear);
    if (value != 0 || !region_clear(buffer)) {
        real(buffer, value);
    }
}

EXPORT void ggml_backend_buffer_free(ggml_backend_buffer_t buffer) {
    REAL(ggml_backend_buffer_free);
    if (buffer) {
        region_gone(buffer);
    }
    real(buffer);
}

EXPORT void ggml_backend_tensor_get(const struct ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    REAL(ggml_backend_tensor_get);
    if (!map_asking(tensor, offset, size)) {
        real(tensor, data, offset, size);
    }
}

EXPORT void ggml_backend_tensor_set(struct ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    REAL(ggml_backend_tensor_set);
    rows_overwritten(tensor, offset, size);
    real(tensor, data, offset, size);
}

// ---- graphs ---------------------------------------------------------------------------------------------------

EXPORT void ggml_backend_sched_set_eval_callback(ggml_backend_sched_t sched, ggml_backend_sched_eval_callback callback, void * user) {
    REAL(ggml_backend_sched_set_eval_callback);
    graph_note_callback(sched, callback, user);
    real(sched, callback, user);
}

EXPORT bool ggml_backend_sched_alloc_graph(ggml_backend_sched_t sched, struct ggml_cgraph * graph) {
    REAL(ggml_backend_sched_alloc_graph);
    graph_laid_out(lib_of(CALLER), sched, graph);
    return real(sched, graph);
}

EXPORT void ggml_backend_sched_reset(ggml_backend_sched_t sched) {
    REAL(ggml_backend_sched_reset);
    graph_laid_out(NULL, sched, NULL);
    real(sched);
}

EXPORT void ggml_backend_sched_free(ggml_backend_sched_t sched) {
    REAL(ggml_backend_sched_free);
    graph_forget_scheduler(sched);
    real(sched);
}

EXPORT int32_t ggml_backend_sched_graph_compute_async(ggml_backend_sched_t sched, struct ggml_cgraph * graph) {
    REAL(ggml_backend_sched_graph_compute_async);
    INSIDE;  // whoever did not come through one of the functions below
    struct lib * lib = lib_of(CALLER);
    graph_before(lib, sched, graph);
    gate_compute_begin();
    const int32_t status = real(sched, graph);
    gate_compute_end();
    graph_after();
    return status;
}
