// What the C test programs share: checks that say where and why, and the model they open.
#ifndef CHECK_H
#define CHECK_H

#include "m40llm.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(condition)                                                                              \
    do {                                                                                              \
        if (!(condition)) {                                                                           \
            fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #condition,    \
                    m40llm_last_error());                                                             \
            exit(1);                                                                                  \
        }                                                                                             \
    } while (0)

#define OK(call) CHECK((call) == M40LLM_STATUS_OK)

// The call is refused with this status and a message that holds the text.
#define FAILS(call, status, text)                                                                     \
    do {                                                                                              \
        CHECK((call) == M40LLM_STATUS_##status);                                                      \
        CHECK(strstr(m40llm_last_error(), text) != NULL);                                             \
    } while (0)

static inline m40llm_model *open_model(const char *path) {
    m40llm_model_options options = {
        .size = sizeof options, .backend = M40LLM_BACKEND_CPU, .ctx_size = 512, .max_batch = 4, .threads = 2};
    m40llm_model *model = NULL;
    OK(m40llm_model_open(path, &options, &model));
    CHECK(model != NULL);
    return model;
}

static inline void add(m40llm_session *session, const char *text) {
    OK(m40llm_session_add_text(session, text, strlen(text), M40LLM_PARSE_SPECIAL));
}

static inline size_t history(const m40llm_session *session) {
    size_t count = 0;
    m40llm_status status = m40llm_session_tokens(session, NULL, 0, &count);
    CHECK(status == (count > 0 ? M40LLM_STATUS_BUFFER_TOO_SMALL : M40LLM_STATUS_OK));
    return count;
}

#endif
