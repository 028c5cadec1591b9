// m40llm: GGUF inference in process. Link with -lm40llm_engine.
//
// Calls return a status. When it is not M40LLM_STATUS_OK, m40llm_last_error says why in one line; what a
// call was to store is then not stored, unless it says otherwise.
//
// Handles are opaque and never dereferenced: one that is NULL, was freed or never was one is
// M40LLM_STATUS_INVALID_ARGUMENT. Whoever opened or made one frees it, in any order. Models may be used by any
// threads at once, a session by one at a time; see their types.
//
// Pointers are the caller's, and are not kept after the call. They must be valid for what the call reads or
// writes there: strings end with NUL or come with their length in bytes, arrays with their number of
// elements, and nobody else writes there meanwhile. NULL is an error where a call needs something.
//
// Structs begin with their size, so that programs and libraries of different versions understand each other:
// struct m40llm_model_options options = { .size = sizeof options }; sets that, and all else to zero.
//
// After fork, a child must not use what its parent opened. The library must not be unloaded (dlclose).

#ifndef M40LLM_H
#define M40LLM_H

// Made by cbindgen from engine/src/ffi: change that, then run `make header`.

#include <stddef.h>
#include <stdint.h>

// A CUDA device where one is usable, else the CPU.
#define M40LLM_BACKEND_AUTO 0

// The CPU's fast paths.
#define M40LLM_BACKEND_CPU 1

// A CUDA device, or an error.
#define M40LLM_BACKEND_CUDA 2

// The plain 32-bit float reference on the CPU: slow, exact.
#define M40LLM_BACKEND_REFERENCE 3

// Keys and values in half precision.
#define M40LLM_KV_F16 0

// Keys and values in single precision.
#define M40LLM_KV_F32 1

// Keys and values in 8-bit blocks.
#define M40LLM_KV_Q8 2

// Flag for text: add the beginning- and end-of-text tokens that the model wants.
#define M40LLM_ADD_SPECIAL 1

// Flag for text: recognise control tokens written out in it, such as "<|im_start|>".
#define M40LLM_PARSE_SPECIAL 2

// Flag for sessions: go on past end-of-generation tokens.
#define M40LLM_IGNORE_EOS 1

// Stands where there is no token.
#define M40LLM_NO_TOKEN 4294967295

// The decode ended with an end-of-generation token or a stop string.
#define M40LLM_FINISH_STOP 1

// The decode ended with max_tokens or at the end of the context.
#define M40LLM_FINISH_LENGTH 2

// The decode was cancelled.
#define M40LLM_FINISH_CANCELLED 3

// What a call returns. m40llm_last_error has the details of all but M40LLM_STATUS_OK.
enum m40llm_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // Done.
    M40LLM_STATUS_OK = 0,
    // A pointer is NULL or misaligned, a handle unknown or freed, a value not among those allowed, a text
    // not UTF-8.
    M40LLM_STATUS_INVALID_ARGUMENT = 1,
    // The buffer is too small. What it must hold was stored; nothing else was.
    M40LLM_STATUS_BUFFER_TOO_SMALL = 2,
    // The file cannot be read, or is no model that this library runs.
    M40LLM_STATUS_MODEL = 3,
    // The options ask for what cannot be had here: memory, a device.
    M40LLM_STATUS_CONFIG = 4,
    // The history, with max_tokens, is longer than the context.
    M40LLM_STATUS_CONTEXT_LENGTH = 5,
    // The session is decoding, or too many requests are waiting: try again later.
    M40LLM_STATUS_BUSY = 6,
    // A callback or m40llm_session_cancel ended the decode. The session can go on.
    M40LLM_STATUS_CANCELLED = 7,
    // The model failed on this request.
    M40LLM_STATUS_BACKEND = 8,
    // The model has stopped for good, such as by a fault of its device: end the process and start again.
    M40LLM_STATUS_STOPPED = 9,
    // A bug in this library; the call had no effect that can be relied on.
    M40LLM_STATUS_INTERNAL = 10,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum m40llm_status m40llm_status;
#else
typedef int32_t m40llm_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// An open model. Any thread may use it, several at once.
typedef struct m40llm_model m40llm_model;

// A conversation: a history of tokens and a way to choose further ones. Any thread may use it, one at a
// time: a call made while another one works with it returns M40LLM_STATUS_BUSY, but for
// m40llm_session_cancel and m40llm_session_free, which may come at any time.
typedef struct m40llm_session m40llm_session;

// How a model is opened. Zero is the default of every field but size.
typedef struct m40llm_model_options {
    // sizeof(struct m40llm_model_options).
    size_t size;
    // M40LLM_BACKEND_*.
    uint32_t backend;
    // M40LLM_KV_*.
    uint32_t kv_type;
    // Which CUDA device, by number or by the beginning of its UUID; NULL: the first of compute capability
    // 5.2, else the first newer one.
    const char *device;
    // Longest sequence, in tokens; 0: the model's own, as far as memory allows.
    size_t ctx_size;
    // CPU threads; 0: one per core this process may use.
    size_t threads;
    // Most sequences that run together; 0: 16.
    size_t max_batch;
    // Most sequences that wait beside them; 0: 256.
    size_t max_queue;
    // Most bytes for keys and values; 0: what the backend has for them.
    uint64_t kv_memory;
} m40llm_model_options;

// What is open. Strings are valid until the model is freed.
typedef struct m40llm_info {
    // sizeof(struct m40llm_info), set by the caller.
    size_t size;
    // The model's name; NULL when the file gives none.
    const char *name;
    // Such as "llama".
    const char *architecture;
    // Such as "Q4_K_M".
    const char *quantization;
    // Where it runs, in words.
    const char *backend;
    // Weights, counted.
    uint64_t parameters;
    // Bytes of weights.
    uint64_t size_bytes;
    // Bytes for keys and values, of all sequences together.
    uint64_t kv_bytes;
    // Tokens that these hold.
    uint64_t kv_tokens;
    // The longest sequence.
    uint64_t ctx_size;
    // The context the model was trained for.
    uint64_t ctx_train;
    // Token ids are below this.
    uint32_t vocab_size;
    // The embedding's width.
    uint32_t embedding_length;
    // Transformer layers.
    uint32_t layers;
    // Beginning of text, or M40LLM_NO_TOKEN.
    uint32_t bos;
    // End of text, or M40LLM_NO_TOKEN.
    uint32_t eos;
    // Zero.
    uint32_t reserved;
} m40llm_info;

// How a session chooses tokens. Zero is the default of every field but size, and greedy.
typedef struct m40llm_session_options {
    // sizeof(struct m40llm_session_options).
    size_t size;
    // 0 to 2; 0 always takes the most likely token.
    float temperature;
    // Keep the k most likely; 0: all.
    uint32_t top_k;
    // Keep the smallest set whose probability reaches this; 0 to 1, 0: all.
    float top_p;
    // Keep tokens at least this likely relative to the best; 0 to 1.
    float min_p;
    // Makes tokens of the history less likely; up to 100, 1 changes nothing, and so does 0.
    float repetition_penalty;
    // Subtracted once from the logits of tokens generated by this decode; -2 to 2.
    float presence_penalty;
    // Subtracted for each time; -2 to 2.
    float frequency_penalty;
    // M40LLM_IGNORE_EOS or 0.
    uint32_t flags;
    // The same seed gives the same tokens; 0: another one for each decode.
    uint64_t seed;
    // Texts that end a decode and are not part of its output: stop_count NUL-terminated strings, copied.
    const char *const *stop;
    // How many.
    size_t stop_count;
} m40llm_session_options;

// Told what is generated, on the thread that decodes. A return other than 0 cancels the decode.
//
// text is UTF-8 of length bytes, and a NUL after them; it never ends within a character, and is valid
// during the call only. It may be empty, for tokens that stand for part of a character or for none, and
// token is M40LLM_NO_TOKEN for text whose token is settled later. The callback may call every function,
// must not jump out (longjmp, C++ exceptions), and holds up nobody but this decode.
typedef int (*m40llm_token_callback)(uint32_t token, const char *text, size_t length, void *user_data);

// How a decode went.
typedef struct m40llm_outcome {
    // sizeof(struct m40llm_outcome), set by the caller.
    size_t size;
    // M40LLM_FINISH_*.
    uint32_t finish;
    // Zero.
    uint32_t reserved;
    // Tokens of the history that the decode started with.
    uint64_t prompt_tokens;
    // Of these, taken from a cache.
    uint64_t cached_tokens;
    // Tokens generated, the end-of-generation token included.
    uint64_t completion_tokens;
} m40llm_outcome;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Why the last call that failed on this thread did: one line of UTF-8, never NULL, "" if none failed.
// Valid until the next m40llm call on this thread.
const char *m40llm_last_error(void);

// The library's version, such as "0.1.0". Static.
const char *m40llm_version(void);

// Opens a GGUF file (of a split one, the first part) and stores a handle, to be freed with
// m40llm_model_free. Takes seconds; options may be NULL. The file must not change while it is open.
m40llm_status m40llm_model_open(const char *path,
                                const struct m40llm_model_options *options,
                                struct m40llm_model **model);

// Fills info, whose size the caller has set.
m40llm_status m40llm_model_info(const struct m40llm_model *model, struct m40llm_info *info);

// Frees a model's handle. Sessions made with it go on, and keep the model's memory until they are freed.
// NULL is allowed.
m40llm_status m40llm_model_free(struct m40llm_model *model);

// Token ids of a text of length bytes; flags are M40LLM_ADD_SPECIAL and M40LLM_PARSE_SPECIAL.
// Stores in count how many there are. When they are more than capacity, that is all it does, and the call
// returns M40LLM_STATUS_BUFFER_TOO_SMALL; with capacity 0, tokens may be NULL.
m40llm_status m40llm_tokenize(const struct m40llm_model *model,
                              const char *text,
                              size_t length,
                              uint32_t flags,
                              uint32_t *tokens,
                              size_t capacity,
                              size_t *count);

// The text of count token ids, special tokens printed. Stores in length its bytes, without the NUL that
// ends it. When length + 1 is more than capacity, that is all it does, and the call returns
// M40LLM_STATUS_BUFFER_TOO_SMALL; with capacity 0, text may be NULL.
m40llm_status m40llm_detokenize(const struct m40llm_model *model,
                                const uint32_t *tokens,
                                size_t count,
                                char *text,
                                size_t capacity,
                                size_t *length);

// Makes a session with an empty history and stores its handle, to be freed with m40llm_session_free.
// Sessions of one model run together, in one batch. options may be NULL.
m40llm_status m40llm_session_new(const struct m40llm_model *model,
                                 const struct m40llm_session_options *options,
                                 struct m40llm_session **session);

// Appends a text of length bytes to the history; flags as for m40llm_tokenize.
m40llm_status m40llm_session_add_text(struct m40llm_session *session,
                                      const char *text,
                                      size_t length,
                                      uint32_t flags);

// Appends count token ids to the history.
m40llm_status m40llm_session_add_tokens(struct m40llm_session *session, const uint32_t *tokens, size_t count);

// Generates at most max_tokens tokens (0: what the context leaves) after the history, tells the callback of
// each, and appends them to the history. Returns when it is done: M40LLM_STATUS_OK, or
// M40LLM_STATUS_CANCELLED when it was cancelled. In both cases it fills outcome, whose size the caller has
// set. callback and outcome may be NULL.
//
// A history holds what the callback was told: not the end-of-generation token, and after a cancel not
// what it was not told. So the next turn's text begins with what ends a turn.
m40llm_status m40llm_session_decode(struct m40llm_session *session,
                                    size_t max_tokens,
                                    m40llm_token_callback callback,
                                    void *user_data,
                                    struct m40llm_outcome *outcome);

// Cancels the decode that runs now: it returns M40LLM_STATUS_CANCELLED at once, or after the callback that
// runs now. Without one, nothing happens. From any thread, and from a callback.
m40llm_status m40llm_session_cancel(struct m40llm_session *session);

// The history. Stores in count how many tokens it has; when they are more than capacity, that is all it
// does, and the call returns M40LLM_STATUS_BUFFER_TOO_SMALL; with capacity 0, tokens may be NULL.
m40llm_status m40llm_session_tokens(const struct m40llm_session *session,
                                    uint32_t *tokens,
                                    size_t capacity,
                                    size_t *count);

// Forgets all but the first count tokens of the history: 0 begins anew, fewer than there are takes a turn
// back. More than there are is an error.
m40llm_status m40llm_session_truncate(struct m40llm_session *session, size_t count);

// Frees a session's handle, and cancels its decode if one runs. NULL is allowed.
m40llm_status m40llm_session_free(struct m40llm_session *session);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* M40LLM_H */
