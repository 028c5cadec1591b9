// Everything a caller can get wrong is a status and a message, and never a crash.
#include "check.h"

static void opening(const char *program) {
    m40llm_model *model = NULL;
    FAILS(m40llm_model_open(NULL, NULL, &model), INVALID_ARGUMENT, "path is NULL");
    FAILS(m40llm_model_open("x", NULL, NULL), INVALID_ARGUMENT, "model is NULL");
    FAILS(m40llm_model_open("/no/such.gguf", NULL, &model), MODEL, "/no/such.gguf");
    FAILS(m40llm_model_open(program, NULL, &model), MODEL, program);
    FAILS(m40llm_model_open("\xff", NULL, &model), INVALID_ARGUMENT, "path is not UTF-8");

    m40llm_model_options options = {.size = 0};
    FAILS(m40llm_model_open(program, &options, &model), INVALID_ARGUMENT, "options->size is 0");
    options = (m40llm_model_options){.size = sizeof options, .backend = 99};
    FAILS(m40llm_model_open(program, &options, &model), INVALID_ARGUMENT, "options->backend is 99");
    options = (m40llm_model_options){.size = sizeof options, .kv_type = 99};
    FAILS(m40llm_model_open(program, &options, &model), INVALID_ARGUMENT, "options->kv_type is 99");
    options = (m40llm_model_options){.size = sizeof options, .backend = M40LLM_BACKEND_CPU, .device = "0"};
    FAILS(m40llm_model_open(program, &options, &model), INVALID_ARGUMENT, "options->device");
    options = (m40llm_model_options){.size = sizeof options, .device = "the fast one"};
    FAILS(m40llm_model_open(program, &options, &model), INVALID_ARGUMENT, "options->device");
    // Not an option of a later version that this one would pass over in silence.
    struct {
        m40llm_model_options known;
        uint64_t later;
    } newer = {.known = {.size = sizeof newer}, .later = 1};
    FAILS(m40llm_model_open(program, &newer.known, &model), INVALID_ARGUMENT, "does not know");
    newer.later = 0;
    FAILS(m40llm_model_open(program, &newer.known, &model), MODEL, program);
    CHECK(model == NULL);
}

static void configuration(const char *path) {
    m40llm_model *model = NULL;
    m40llm_model_options options = {.size = sizeof options, .backend = M40LLM_BACKEND_CPU, .max_batch = 100000};
    FAILS(m40llm_model_open(path, &options, &model), CONFIG, "max-batch");
    options = (m40llm_model_options){
        .size = sizeof options, .backend = M40LLM_BACKEND_CPU, .ctx_size = 1 << 20, .kv_memory = 1 << 20};
    FAILS(m40llm_model_open(path, &options, &model), CONFIG, "ctx-size");
    CHECK(model == NULL);
}

static void handles(m40llm_model *model, m40llm_session *session) {
    size_t count = 0;
    m40llm_session *none = NULL;
    m40llm_info info = {.size = sizeof info};
    m40llm_model *wrong[] = {NULL, (m40llm_model *)session, (m40llm_model *)&info, (m40llm_model *)-1};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        FAILS(m40llm_model_info(wrong[i], &info), INVALID_ARGUMENT, "model is");
        FAILS(m40llm_tokenize(wrong[i], "x", 1, 0, NULL, 0, &count), INVALID_ARGUMENT, "model is");
        FAILS(m40llm_detokenize(wrong[i], NULL, 0, NULL, 0, &count), INVALID_ARGUMENT, "model is");
        FAILS(m40llm_session_new(wrong[i], NULL, &none), INVALID_ARGUMENT, "model is");
        if (wrong[i] != NULL) FAILS(m40llm_model_free(wrong[i]), INVALID_ARGUMENT, "model is");
    }
    m40llm_session *bad[] = {NULL, (m40llm_session *)model, (m40llm_session *)&info};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        FAILS(m40llm_session_add_text(bad[i], "x", 1, 0), INVALID_ARGUMENT, "session is");
        FAILS(m40llm_session_add_tokens(bad[i], NULL, 0), INVALID_ARGUMENT, "session is");
        FAILS(m40llm_session_decode(bad[i], 1, NULL, NULL, NULL), INVALID_ARGUMENT, "session is");
        FAILS(m40llm_session_cancel(bad[i]), INVALID_ARGUMENT, "session is");
        FAILS(m40llm_session_tokens(bad[i], NULL, 0, &count), INVALID_ARGUMENT, "session is");
        FAILS(m40llm_session_truncate(bad[i], 0), INVALID_ARGUMENT, "session is");
        if (bad[i] != NULL) FAILS(m40llm_session_free(bad[i]), INVALID_ARGUMENT, "session is");
    }
    OK(m40llm_model_free(NULL));
    OK(m40llm_session_free(NULL));
    CHECK(none == NULL);
}

static void arguments(m40llm_model *model) {
    size_t count = 0;
    uint32_t ids[4] = {0};
    FAILS(m40llm_model_info(model, NULL), INVALID_ARGUMENT, "info is NULL");
    m40llm_info info = {.size = 1 << 30};
    FAILS(m40llm_model_info(model, &info), INVALID_ARGUMENT, "info->size");
    FAILS(m40llm_tokenize(model, NULL, 1, 0, ids, 4, &count), INVALID_ARGUMENT, "text is NULL");
    FAILS(m40llm_tokenize(model, "x", 1, 64, ids, 4, &count), INVALID_ARGUMENT, "flags is 64");
    FAILS(m40llm_tokenize(model, "ab\xff", 3, 0, ids, 4, &count), INVALID_ARGUMENT, "not UTF-8 at byte 2");
    FAILS(m40llm_tokenize(model, "x", (size_t)-1, 0, ids, 4, &count), INVALID_ARGUMENT, "text");
    FAILS(m40llm_tokenize(model, "x", 1, 0, ids, 4, NULL), INVALID_ARGUMENT, "count is NULL");
    FAILS(m40llm_tokenize(model, "x", 1, 0, NULL, 4, &count), INVALID_ARGUMENT, "tokens is NULL");
    FAILS(m40llm_tokenize(model, "x", 1, 0, (uint32_t *)((char *)ids + 1), 1, &count), INVALID_ARGUMENT,
          "misaligned");
    ids[2] = 49152;
    FAILS(m40llm_detokenize(model, ids, 3, NULL, 0, &count), INVALID_ARGUMENT, "tokens[2] is 49152");
    FAILS(m40llm_detokenize(model, NULL, 3, NULL, 0, &count), INVALID_ARGUMENT, "tokens is NULL");
    FAILS(m40llm_session_new(model, NULL, NULL), INVALID_ARGUMENT, "session is NULL");
}

static void session_options(m40llm_model *model) {
    m40llm_session *session = NULL;
    const char *stops[] = {"a", ""};
    const struct {
        m40llm_session_options options;
        const char *message;
    } wrong[] = {
        {{.temperature = 2.5f}, "temperature is 2.5"},
        {{.temperature = 0.0f / 0.0f}, "temperature is NaN"},
        {{.top_p = 1.5f}, "top_p"},
        {{.min_p = -1.0f}, "min_p"},
        {{.repetition_penalty = -1.0f}, "repetition_penalty"},
        {{.presence_penalty = 3.0f}, "presence_penalty"},
        {{.frequency_penalty = 3.0f}, "frequency_penalty"},
        {{.flags = 2}, "flags is 2"},
        {{.stop = stops, .stop_count = 2}, "an empty text"},
        {{.stop_count = 1}, "stop is NULL"},
    };
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        m40llm_session_options options = wrong[i].options;
        options.size = sizeof options;
        FAILS(m40llm_session_new(model, &options, &session), INVALID_ARGUMENT, wrong[i].message);
    }
    CHECK(session == NULL);
}

static void decoding(m40llm_session *session) {
    FAILS(m40llm_session_decode(session, 1, NULL, NULL, NULL), INVALID_ARGUMENT, "the prompt is empty");
    uint32_t ids[2] = {1, 49152};
    FAILS(m40llm_session_add_tokens(session, ids, 2), INVALID_ARGUMENT, "tokens[1] is 49152");
    FAILS(m40llm_session_truncate(session, 1), INVALID_ARGUMENT, "count is 1");
    OK(m40llm_session_add_tokens(session, ids, 1));
    FAILS(m40llm_session_decode(session, 512, NULL, NULL, NULL), CONTEXT_LENGTH, "the context holds 512");
    m40llm_outcome outcome = {.size = 3};
    FAILS(m40llm_session_decode(session, 1, NULL, NULL, &outcome), INVALID_ARGUMENT, "outcome->size is 3");
    CHECK(history(session) == 1);
}

// A callback that uses its own session: refused, never a deadlock.
static int meddle(uint32_t token, const char *text, size_t length, void *user_data) {
    (void)token, (void)text, (void)length;
    m40llm_session *session = user_data;
    FAILS(m40llm_session_add_text(session, "x", 1, 0), BUSY, "decoding");
    FAILS(m40llm_session_decode(session, 1, meddle, session, NULL), BUSY, "decoding");
    OK(m40llm_session_cancel(session));
    return 0;
}

static int free_it(uint32_t token, const char *text, size_t length, void *user_data) {
    (void)token, (void)text, (void)length;
    OK(m40llm_session_free(user_data));
    return 0;
}

static void freed(m40llm_model *model, m40llm_session *session) {
    add(session, "Once upon a time");
    FAILS(m40llm_session_decode(session, 50, meddle, session, NULL), CANCELLED, "cancelled");
    OK(m40llm_model_free(model));
    size_t count = 0;
    FAILS(m40llm_model_free(model), INVALID_ARGUMENT, "freed");
    FAILS(m40llm_tokenize(model, "x", 1, 0, NULL, 0, &count), INVALID_ARGUMENT, "freed");
    // The session keeps what it needs of the model.
    OK(m40llm_session_decode(session, 2, NULL, NULL, NULL));
    FAILS(m40llm_session_decode(session, 50, free_it, session, NULL), CANCELLED, "cancelled");
    FAILS(m40llm_session_free(session), INVALID_ARGUMENT, "freed");
    FAILS(m40llm_session_decode(session, 2, NULL, NULL, NULL), INVALID_ARGUMENT, "freed");
}

static void *no_error_here(void *unused) {
    (void)unused;
    CHECK(strcmp(m40llm_last_error(), "") == 0);
    return NULL;
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    opening(argv[0]);
    configuration(argv[1]);
    m40llm_model *model = open_model(argv[1]);
    m40llm_session *session = NULL;
    OK(m40llm_session_new(model, NULL, &session));
    handles(model, session);
    arguments(model);
    session_options(model);
    decoding(session);
    freed(model, session);
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, no_error_here, NULL) == 0 && pthread_join(thread, NULL) == 0);
    return 0;
}
