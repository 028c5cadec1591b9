// Opens a model, tokenizes, and answers two turns greedily: prints them with a line "--" between, for the
// caller to compare.
#include "check.h"

static const char FIRST[] = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n";
static const char SECOND[] = "<|im_end|>\n<|im_start|>user\nAnd of Italy?<|im_end|>\n<|im_start|>assistant\n";

static void information(const m40llm_model *model) {
    CHECK(strchr(m40llm_version(), '.') != NULL);
    m40llm_info info = {.size = sizeof info};
    OK(m40llm_model_info(model, &info));
    CHECK(info.size == sizeof info);
    CHECK(strcmp(info.architecture, "llama") == 0);
    CHECK(strcmp(info.quantization, "Q4_1") == 0);
    CHECK(strncmp(info.backend, "cpu", 3) == 0);
    CHECK(info.name != NULL && info.name[0] != 0);
    CHECK(info.vocab_size == 49152 && info.layers == 30 && info.embedding_length == 576);
    CHECK(info.ctx_size == 512 && info.ctx_train >= 2048 && info.kv_tokens >= 512 && info.kv_bytes > 0);
    CHECK(info.parameters > 100000000 && info.size_bytes > 50000000);
    CHECK(info.bos < info.vocab_size && info.eos < info.vocab_size);

    // An older program's shorter struct is filled as far as it goes, a newer one's longer with zeros.
    struct {
        m40llm_info known;
        uint64_t later, beyond;
    } wide;
    memset(&wide, 0x55, sizeof wide);
    wide.known.size = offsetof(m40llm_info, quantization);
    OK(m40llm_model_info(model, &wide.known));
    CHECK(strcmp(wide.known.architecture, "llama") == 0);
    CHECK((uintptr_t)wide.known.quantization == (uintptr_t)0x5555555555555555);
    wide.known.size = sizeof wide.known + sizeof wide.later;
    OK(m40llm_model_info(model, &wide.known));
    CHECK(strcmp(wide.known.quantization, "Q4_1") == 0);
    CHECK(wide.later == 0 && wide.beyond == 0x5555555555555555);
}

static void tokens(const m40llm_model *model) {
    const char text[] = "Grüße aus 東京! <|im_end|>";
    size_t count = 0, again = 0, length = 0;
    FAILS(m40llm_tokenize(model, text, strlen(text), M40LLM_PARSE_SPECIAL, NULL, 0, &count), BUFFER_TOO_SMALL,
          "tokens");
    CHECK(count > 4 && count < 40);
    uint32_t ids[40];
    memset(ids, 0x55, sizeof ids);
    FAILS(m40llm_tokenize(model, text, strlen(text), M40LLM_PARSE_SPECIAL, ids, count - 1, &again),
          BUFFER_TOO_SMALL, "are needed");
    CHECK(again == count && ids[0] == 0x55555555);
    OK(m40llm_tokenize(model, text, strlen(text), M40LLM_PARSE_SPECIAL, ids, count, &again));
    CHECK(again == count && ids[count] == 0x55555555);

    FAILS(m40llm_detokenize(model, ids, count, NULL, 0, &length), BUFFER_TOO_SMALL, "text");
    CHECK(length == strlen(text));
    char back[64];
    memset(back, 'x', sizeof back);
    FAILS(m40llm_detokenize(model, ids, count, back, length, &length), BUFFER_TOO_SMALL, "are needed");
    CHECK(back[0] == 'x');
    OK(m40llm_detokenize(model, ids, count, back, length + 1, &length));
    CHECK(strcmp(back, text) == 0);

    // Without the flag, the end of a turn is text like any other.
    OK(m40llm_tokenize(model, text, strlen(text), 0, ids, 40, &again));
    CHECK(again > count);
    OK(m40llm_tokenize(model, NULL, 0, 0, NULL, 0, &again));
    CHECK(again == 0);
}

struct answer {
    pthread_t thread;
    char text[4096];
    size_t length, tokens;
};

static int print(uint32_t token, const char *text, size_t length, void *user_data) {
    struct answer *answer = user_data;
    CHECK(pthread_equal(answer->thread, pthread_self()));
    CHECK(text[length] == 0 && answer->length + length < sizeof answer->text);
    memcpy(answer->text + answer->length, text, length);
    answer->length += length;
    answer->tokens += token != M40LLM_NO_TOKEN;
    printf("%s", text);
    return 0;
}

static void turn(m40llm_session *session, const char *prompt) {
    add(session, prompt);
    size_t before = history(session);
    struct answer answer = {.thread = pthread_self()};
    m40llm_outcome outcome = {.size = sizeof outcome};
    OK(m40llm_session_decode(session, 48, print, &answer, &outcome));
    CHECK(outcome.finish == M40LLM_FINISH_STOP && outcome.prompt_tokens == before);
    // The end-of-turn token is counted, and neither told nor remembered.
    CHECK(outcome.completion_tokens == answer.tokens + 1);
    CHECK(history(session) == before + answer.tokens);
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    m40llm_model *model = open_model(argv[1]);
    information(model);
    tokens(model);

    m40llm_session *session = NULL;
    OK(m40llm_session_new(model, NULL, &session));
    turn(session, FIRST);
    size_t answered = history(session);
    printf("\n--\n");
    turn(session, SECOND);

    // The second turn taken back and given as tokens.
    OK(m40llm_session_truncate(session, answered));
    uint32_t ids[64];
    size_t count = 0;
    OK(m40llm_tokenize(model, SECOND, strlen(SECOND), M40LLM_PARSE_SPECIAL, ids, 64, &count));
    OK(m40llm_session_add_tokens(session, ids, count));
    printf("\n--\n");
    turn(session, "");

    OK(m40llm_session_free(session));
    OK(m40llm_model_free(model));
    return 0;
}
