// Cancels from another thread and from the callback, frees while another thread decodes, and runs two
// sessions at once.
#include "check.h"

#include <stdatomic.h>

static m40llm_session *new_session(const m40llm_model *model, uint32_t flags) {
    m40llm_session_options options = {.size = sizeof options, .flags = flags};
    m40llm_session *session = NULL;
    OK(m40llm_session_new(model, &options, &session));
    return session;
}

// A decode on a thread of its own.
struct decode {
    m40llm_session *session;
    // Return this from the callback after so many tokens.
    size_t stop_after;
    size_t max_tokens;
    atomic_size_t told;
    m40llm_status status;
    m40llm_outcome outcome;
    uint64_t hash;
    char error[128];
};

static int told(uint32_t token, const char *text, size_t length, void *user_data) {
    struct decode *decode = user_data;
    for (size_t i = 0; i < length; i++) decode->hash = decode->hash * 31 + (unsigned char)text[i];
    size_t count = atomic_fetch_add(&decode->told, token != M40LLM_NO_TOKEN) + 1;
    return count == decode->stop_after ? 7 : 0;
}

static void *run(void *argument) {
    struct decode *decode = argument;
    decode->outcome.size = sizeof decode->outcome;
    decode->status = m40llm_session_decode(decode->session, decode->max_tokens, told, decode, &decode->outcome);
    snprintf(decode->error, sizeof decode->error, "%s", m40llm_last_error());
    return NULL;
}

static pthread_t start(struct decode *decode) {
    pthread_t thread;
    CHECK(pthread_create(&thread, NULL, run, decode) == 0);
    return thread;
}

static void until(struct decode *decode, size_t tokens) {
    struct timespec pause = {.tv_nsec = 1000000};
    while (atomic_load(&decode->told) < tokens) nanosleep(&pause, NULL);
}

static void cancelled_by_another_thread(const m40llm_model *model) {
    struct decode decode = {.session = new_session(model, M40LLM_IGNORE_EOS), .max_tokens = 480};
    // Nothing runs yet, so nothing is cancelled, now or later.
    OK(m40llm_session_cancel(decode.session));
    add(decode.session, "Once upon a time");
    size_t prompt = history(decode.session);
    pthread_t thread = start(&decode);
    until(&decode, 3);
    // What would change the history under the decode is refused; what reads it as well.
    FAILS(m40llm_session_add_text(decode.session, "x", 1, 0), BUSY, "decoding");
    FAILS(m40llm_session_truncate(decode.session, 0), BUSY, "decoding");
    FAILS(m40llm_session_decode(decode.session, 1, NULL, NULL, NULL), BUSY, "decoding");
    OK(m40llm_session_cancel(decode.session));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(decode.status == M40LLM_STATUS_CANCELLED);
    CHECK(strstr(decode.error, "cancelled") != NULL);
    CHECK(decode.outcome.finish == M40LLM_FINISH_CANCELLED);
    CHECK(decode.told >= 3 && decode.told < 480 && decode.outcome.completion_tokens == decode.told);
    CHECK(history(decode.session) == prompt + decode.told);
    // It goes on from there.
    OK(m40llm_session_decode(decode.session, 2, NULL, NULL, NULL));
    CHECK(history(decode.session) == prompt + decode.told + 2);
    OK(m40llm_session_free(decode.session));
}

static void cancelled_by_the_callback(const m40llm_model *model) {
    struct decode decode = {
        .session = new_session(model, M40LLM_IGNORE_EOS), .max_tokens = 480, .stop_after = 4};
    add(decode.session, "Once upon a time");
    size_t prompt = history(decode.session);
    run(&decode);
    CHECK(decode.status == M40LLM_STATUS_CANCELLED && decode.told == 4);
    CHECK(history(decode.session) == prompt + 4);
    OK(m40llm_session_free(decode.session));
}

static void freed_while_it_decodes(const char *path) {
    m40llm_model *model = open_model(path);
    struct decode decode = {.session = new_session(model, M40LLM_IGNORE_EOS), .max_tokens = 480};
    add(decode.session, "Once upon a time");
    pthread_t thread = start(&decode);
    until(&decode, 2);
    OK(m40llm_model_free(model));
    until(&decode, 4);
    OK(m40llm_session_free(decode.session));
    CHECK(pthread_join(thread, NULL) == 0);
    CHECK(decode.status == M40LLM_STATUS_CANCELLED && decode.told < 480);
    FAILS(m40llm_session_cancel(decode.session), INVALID_ARGUMENT, "freed");
}

static void two_at_once(const m40llm_model *model) {
    const char *prompts[2] = {"The sea is", "A list of primes: 2, 3,"};
    struct decode alone[2], together[2];
    pthread_t threads[2];
    for (int i = 0; i < 2; i++) {
        alone[i] = (struct decode){.session = new_session(model, M40LLM_IGNORE_EOS), .max_tokens = 40};
        together[i] = (struct decode){.session = new_session(model, M40LLM_IGNORE_EOS), .max_tokens = 40};
        add(alone[i].session, prompts[i]);
        add(together[i].session, prompts[i]);
        run(&alone[i]);
    }
    for (int i = 0; i < 2; i++) threads[i] = start(&together[i]);
    for (int i = 0; i < 2; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        CHECK(alone[i].status == M40LLM_STATUS_OK && together[i].status == M40LLM_STATUS_OK);
        CHECK(together[i].outcome.finish == M40LLM_FINISH_LENGTH && together[i].outcome.completion_tokens == 40);
        CHECK(alone[i].hash == together[i].hash);
        OK(m40llm_session_free(alone[i].session));
        OK(m40llm_session_free(together[i].session));
    }
    CHECK(alone[0].hash != alone[1].hash);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    m40llm_model *model = open_model(argv[1]);
    cancelled_by_another_thread(model);
    cancelled_by_the_callback(model);
    two_at_once(model);
    OK(m40llm_model_free(model));
    freed_while_it_decodes(argv[1]);
    return 0;
}
