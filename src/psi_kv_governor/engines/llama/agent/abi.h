// The public structs and functions of ggml and llama.cpp that the agent uses, and nothing else of them. Declared here
// so that one build serves every version: what is used of `struct ggml_tensor` is proven on the live library
// (see lib_proven) by comparing it with what the library's own accessors say.

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct ggml_backend_buffer * ggml_backend_buffer_t;
typedef struct ggml_backend_buffer_type * ggml_backend_buffer_type_t;
typedef struct ggml_backend_sched * ggml_backend_sched_t;
struct ggml_context;
struct ggml_cgraph;
struct llama_context;
typedef struct llama_memory_i * llama_memory_t;

struct ggml_tensor {
    int32_t                   type;
    ggml_backend_buffer_t     buffer;
    int64_t                   ne[4];  // elements
    size_t                    nb[4];  // strides in bytes
    int32_t                   op;
    int32_t                   op_params[16];
    int32_t                   flags;
    struct ggml_tensor *      src[10];
    struct ggml_tensor *      view_src;
    size_t                    view_offs;
    void *                    data;
    char                      name[64];
};

typedef bool (*ggml_backend_sched_eval_callback)(struct ggml_tensor * node, bool ask, void * user_data);

struct llama_batch {
    int32_t    n_tokens;
    int32_t *  token;
    float *    embd;
    int32_t *  pos;
    int32_t *  n_seq_id;
    int32_t ** seq_id;
    int8_t *   logits;
};

enum { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q8_0 = 8, TYPE_I32 = 26, TYPE_I64 = 27, TYPE_BF16 = 30 };
