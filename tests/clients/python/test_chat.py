"""POST /v1/chat/completions through openai-python, and its bytes through raw HTTP."""

import time

import pytest

from wire import FINISH_REASONS, check_usage, sse_chunks, stream

HELLO = [{"role": "user", "content": "Say hello."}]
STORY = [{"role": "user", "content": "Write a story about a cat."}]


def ask(client, messages=HELLO, **more):
    more.setdefault("max_tokens", 24)
    more.setdefault("temperature", 0)
    return client.chat.completions.create(model="", messages=messages, **more)


def test_answer_has_the_documented_shape(client, server):
    before = int(time.time())
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.model == server.model_id
    assert answer.id.startswith("chatcmpl-")
    assert before - 1 <= answer.created <= time.time() + 1
    assert answer.system_fingerprint
    (choice,) = answer.choices
    assert choice.index == 0
    assert choice.message.role == "assistant"
    assert "hello" in choice.message.content.lower()
    assert choice.message.tool_calls is None
    assert choice.logprobs is None
    assert choice.finish_reason in FINISH_REASONS
    check_usage(answer.usage.model_dump())


def test_ids_differ_between_requests(client):
    assert ask(client, max_tokens=1).id != ask(client, max_tokens=1).id


def test_prompt_tokens_are_those_of_the_rendered_template(client, http):
    rendered = http.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
    tokens = http.post("/tokenize", json={"content": rendered, "add_special": True}).json()["tokens"]
    assert ask(client, max_tokens=1).usage.prompt_tokens == len(tokens)


def test_chat_is_a_completion_of_the_rendered_template(client, http, greedy):
    rendered = http.post("/apply-template", json={"messages": HELLO}).json()["prompt"]
    assert greedy(rendered, max_tokens=16) == ask(client, max_tokens=16).choices[0].message.content


def test_max_tokens_cuts_with_length(client):
    answer = ask(client, STORY, max_tokens=7)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 7


def test_max_completion_tokens_alone_and_before_max_tokens(client):
    assert ask(client, STORY, max_tokens=None, max_completion_tokens=5).usage.completion_tokens == 5
    assert ask(client, STORY, max_tokens=9, max_completion_tokens=5).usage.completion_tokens == 5
    assert ask(client, STORY, max_tokens=5, max_completion_tokens=9).usage.completion_tokens == 9


def test_end_of_turn_is_stop_and_never_printed(client):
    # Without max_tokens: chat runs to the end of the turn.
    answer = ask(client, max_tokens=None)
    assert answer.choices[0].finish_reason == "stop"
    assert "<|im_end|>" not in answer.choices[0].message.content


def test_streamed_text_equals_unstreamed(client):
    for messages in (HELLO, STORY):
        whole = ask(client, messages)
        chunks = list(ask(client, messages, stream=True))
        joined = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert joined == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_stream_is_more_than_one_lump(client):
    chunks = list(ask(client, STORY, stream=True, max_tokens=24))
    assert sum(1 for chunk in chunks if chunk.choices[0].delta.content) >= 12


def test_stream_headers_and_chunks_byte_by_byte(http, server):
    answer, raw = stream(http, "/v1/chat/completions", {"messages": STORY, "max_tokens": 8, "temperature": 0})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["x-request-id"]
    assert raw.endswith(b"\n\ndata: [DONE]\n\n")
    chunks = sse_chunks(raw)
    for chunk in chunks:
        assert chunk["object"] == "chat.completion.chunk"
        assert chunk["model"] == server.model_id
        assert "usage" not in chunk
        assert len(chunk["choices"]) == 1
        assert chunk["choices"][0]["index"] == 0
    for key in ("id", "created", "model", "system_fingerprint"):
        assert len({chunk[key] for chunk in chunks}) == 1, key
    first, *middle, last = [chunk["choices"][0] for chunk in chunks]
    assert first["delta"] == {"role": "assistant", "content": ""}
    assert first["finish_reason"] is None
    assert middle
    for choice in middle:
        assert set(choice["delta"]) == {"content"}
        assert choice["delta"]["content"] != ""
        assert choice["finish_reason"] is None
    assert last["delta"] == {}
    assert last["finish_reason"] == "length"


def test_include_usage_adds_null_to_each_chunk_and_one_chunk_of_totals(http, client):
    body = {"messages": STORY, "max_tokens": 6, "temperature": 0, "n": 2, "stream_options": {"include_usage": True}}
    _, raw = stream(http, "/v1/chat/completions", body)
    *chunks, totals = sse_chunks(raw)
    for chunk in chunks:
        assert "usage" in chunk and chunk["usage"] is None
        assert chunk["choices"]
    assert totals["choices"] == []
    assert totals["object"] == "chat.completion.chunk"
    assert totals["id"] == chunks[0]["id"]
    prompt = ask(client, STORY, max_tokens=1).usage.prompt_tokens
    check_usage(totals["usage"], prompt=prompt, completion=12)
    assert [c["choices"][0]["finish_reason"] for c in chunks if c["choices"][0]["finish_reason"]] == ["length"] * 2


def test_include_usage_false_has_no_usage_key(http):
    body = {"messages": HELLO, "max_tokens": 3, "stream_options": {"include_usage": False}}
    _, raw = stream(http, "/v1/chat/completions", body)
    assert all("usage" not in chunk and chunk["choices"] for chunk in sse_chunks(raw))


def test_n_streams_each_choice_with_its_own_role_and_end(http):
    body = {"messages": STORY, "max_tokens": 6, "temperature": 1, "seed": 7, "n": 3}
    _, raw = stream(http, "/v1/chat/completions", body)
    choices = [chunk["choices"][0] for chunk in sse_chunks(raw)]
    texts = {}
    for index in range(3):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [own[-1]["finish_reason"]]
        assert own[-1]["finish_reason"] in FINISH_REASONS and own[-1]["delta"] == {}
        texts[index] = "".join(choice["delta"].get("content", "") for choice in own)
    whole = http.post("/v1/chat/completions", json=body).json()
    assert [choice["message"]["content"] for choice in whole["choices"]] == [texts[i] for i in range(3)]


def test_n_choices_are_numbered_differ_and_share_one_usage(client):
    answer = ask(client, STORY, n=3, temperature=1.5, seed=11, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 36


def test_null_is_absent_for_every_optional_field(http):
    plain = {"messages": STORY, "max_tokens": 8, "temperature": 0}
    names = (
        "model stream stream_options max_completion_tokens top_p n stop seed logit_bias logprobs top_logprobs "
        "presence_penalty frequency_penalty user store metadata service_tier response_format tools tool_choice "
        "parallel_tool_calls prediction verbosity safety_identifier prompt_cache_key min_p top_k reasoning_effort"
    ).split()
    expected = http.post("/v1/chat/completions", json=plain).json()["choices"]
    answer = http.post("/v1/chat/completions", json={**plain, **dict.fromkeys(names)})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == expected


def test_unknown_and_inert_fields_are_ignored(http):
    plain = {"messages": STORY, "max_tokens": 8, "temperature": 0}
    inert = {
        "user": "u", "store": False, "metadata": {"a": "b"}, "service_tier": "auto", "verbosity": "low",
        "safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": True,
        "prediction": {"type": "content", "content": "x"}, "no_such_field": {"deep": [1]},
    }  # fmt: skip
    expected = http.post("/v1/chat/completions", json=plain).json()["choices"]
    answer = http.post("/v1/chat/completions", json={**plain, **inert})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == expected


def test_integral_floats_are_integers(http):
    body = {"messages": STORY, "max_tokens": 4.0, "n": 1.0, "seed": 5.0, "temperature": 0}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}],
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo", "tool_calls": []}, {"role": "user", "content": "Bye"}],
    ],
    ids=["system", "developer", "parts", "turns", "empty-tool-calls"],
)  # fmt: skip
def test_accepted_messages(client, messages):
    assert ask(client, messages, max_tokens=2).usage.completion_tokens >= 1


def test_text_parts_are_joined_and_developer_is_system(client):
    parts = [{"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]}]
    joined = [{"role": "user", "content": "Say\nhello."}]
    assert ask(client, parts).choices[0].message.content == ask(client, joined).choices[0].message.content
    texts = [
        ask(client, [{"role": role, "content": "You are a pirate."}, *HELLO]).choices[0].message.content
        for role in ("developer", "system")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("model", ["", None, "own"])
def test_empty_absent_and_own_model_are_the_loaded_one(http, server, model):
    body = {"messages": HELLO, "max_tokens": 1}
    if model is not None:
        body["model"] = server.model_id if model == "own" else model
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == server.model_id


def test_logprobs_have_the_documented_shape(client):
    answer = ask(client, STORY, max_tokens=6, logprobs=True, top_logprobs=3)
    choice = answer.choices[0]
    assert len(choice.logprobs.content) == 6
    assert choice.logprobs.refusal is None
    for entry in choice.logprobs.content:
        assert -9999.0 <= entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        values = [alternative.logprob for alternative in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        # Greedy: the token is the best alternative.
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == pytest.approx(values[0], abs=1e-4)
    joined = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert joined.decode() == choice.message.content


def test_logprobs_without_alternatives(client):
    for more in ({}, {"top_logprobs": 0}):
        answer = ask(client, STORY, max_tokens=3, logprobs=True, **more)
        assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content] == [[], [], []]


def test_streamed_logprobs_equal_the_unstreamed(client):
    parameters = {"max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, STORY, **parameters).choices[0].logprobs.content
    streamed = []
    for chunk in ask(client, STORY, stream=True, **parameters):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == whole


def test_twenty_alternatives_are_finite(http):
    body = {"messages": HELLO, "max_tokens": 2, "logprobs": True, "top_logprobs": 20, "logit_bias": {"5": -100}}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert "Infinity" not in answer.text and "NaN" not in answer.text
    for entry in answer.json()["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 20


def test_logit_bias_forces_and_forbids(client, http):
    (token,) = http.post("/tokenize", json={"content": " cat"}).json()["tokens"]
    answer = ask(client, STORY, max_tokens=3, logit_bias={str(token): 100})
    assert answer.choices[0].message.content == " cat cat cat"
    plain = ask(client, STORY, max_tokens=1, logprobs=True).choices[0].message.content
    (first,) = http.post("/tokenize", json={"content": plain}).json()["tokens"]
    assert ask(client, STORY, max_tokens=1, logit_bias={str(first): -100}).choices[0].message.content != plain


def test_same_seed_same_text_other_seed_other_text(client):
    def sample(seed):
        return ask(client, STORY, temperature=1.2, seed=seed, max_tokens=24).choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(1, 5)}) == 4
