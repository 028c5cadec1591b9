"""POST /v1/completions: prompts of every kind, echo, legacy logprobs, stop strings, UTF-8."""

import pytest

from wire import check_usage, sse_chunks, stream

COUNT = "1, 2, 3, 4, 5, 6, 7, 8, 9,"
FRANCE = "The capital of France is"


def tokens_of(http, text: str) -> list[int]:
    return http.post("/tokenize", json={"content": text, "add_special": True}).json()["tokens"]


def test_answer_has_the_documented_shape(client, server):
    answer = client.completions.create(model=server.model_id, prompt=FRANCE, max_tokens=8, temperature=0)
    assert answer.object == "text_completion"
    assert answer.model == server.model_id
    assert answer.id.startswith("cmpl-")
    (choice,) = answer.choices
    assert choice.text.startswith(" Paris")
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    check_usage(answer.usage.model_dump(), prompt=5, completion=8)


def test_max_tokens_defaults_to_16(client):
    answer = client.completions.create(model="", prompt=COUNT, temperature=0)
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


def test_the_default_limit_never_makes_a_prompt_too_long(http, server):
    (token,) = http.post("/tokenize", json={"content": " cat"}).json()["tokens"]
    answer = http.post("/v1/completions", json={"prompt": [token] * (server.ctx - 4), "temperature": 0})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] <= 4
    answer = http.post("/v1/completions", json={"prompt": [token] * server.ctx})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_stream_chunks_byte_by_byte(http, greedy, server):
    body = {"prompt": COUNT, "max_tokens": 9, "temperature": 0, "stream_options": {"include_usage": True}}
    answer, raw = stream(http, "/v1/completions", body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, totals = sse_chunks(raw)
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        assert chunk["model"] == server.model_id
        assert chunk["usage"] is None
    assert len({(chunk["id"], chunk["created"]) for chunk in [*chunks, totals]}) == 1
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert "".join(choice["text"] for choice in choices) == greedy(COUNT, max_tokens=9)
    assert totals["choices"] == []
    check_usage(totals["usage"], completion=9)


def test_token_ids_are_the_same_prompt(http, greedy):
    ids = tokens_of(http, FRANCE)
    assert greedy(ids) == greedy([ids]) == greedy(FRANCE)


def test_special_tokens_in_a_prompt_are_parsed(http):
    body = {"prompt": "<|im_start|>user\nHi<|im_end|>\n", "max_tokens": 1}
    usage = http.post("/v1/completions", json=body).json()["usage"]
    assert usage["prompt_tokens"] == len(tokens_of(http, body["prompt"])) <= 7


@pytest.mark.parametrize("as_ids", [False, True], ids=["strings", "ids"])
def test_lists_of_prompts_number_their_choices(http, greedy, as_ids):
    prompts = [FRANCE, COUNT, "def add(a, b):"]
    sent = [tokens_of(http, prompt) for prompt in prompts] if as_ids else prompts
    answer = http.post("/v1/completions", json={"prompt": sent, "n": 2, "max_tokens": 8, "temperature": 0}).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    expected = [greedy(prompt, max_tokens=8) for prompt in prompts for _ in range(2)]
    assert [choice["text"] for choice in answer["choices"]] == expected
    check_usage(answer["usage"], prompt=sum(len(tokens_of(http, prompt)) for prompt in prompts), completion=48)


def test_a_list_of_prompts_streams_under_the_same_numbers(http, greedy):
    prompts = [FRANCE, COUNT]
    _, raw = stream(http, "/v1/completions", {"prompt": prompts, "max_tokens": 8, "temperature": 0})
    texts = ["", ""]
    for chunk in sse_chunks(raw):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == [greedy(prompt, max_tokens=8) for prompt in prompts]


def test_stop_string_cuts_and_is_not_printed(client):
    # ", 12" lies across token borders: digits are tokens of their own in both vocabularies.
    for stop in (", 12", [", 12"], ["never", ", 12", "zzz"]):
        answer = client.completions.create(model="", prompt=COUNT, max_tokens=48, temperature=0, stop=stop)
        assert answer.choices[0].text == " 10, 11"
        assert answer.choices[0].finish_reason == "stop"


def test_stop_string_across_tokens_in_a_stream(client):
    chunks = list(
        client.completions.create(model="", prompt=COUNT, max_tokens=48, temperature=0, stop=[", 12"], stream=True)
    )
    assert "".join(chunk.choices[0].text for chunk in chunks) == " 10, 11"
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_the_earliest_stop_string_wins(client):
    answer = client.completions.create(model="", prompt=COUNT, max_tokens=48, temperature=0, stop=["15", "2, 13", " 11"])
    assert answer.choices[0].text == " 10,"


def test_text_held_for_a_stop_string_is_released_at_the_end(client, greedy):
    # The output ends within what could have become the stop string.
    text = greedy(COUNT, max_tokens=9)
    held = client.completions.create(model="", prompt=COUNT, max_tokens=9, temperature=0, stop=[text[-2:] + "@@"])
    assert held.choices[0].text == text
    assert held.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stop", [None, "", [], [""]], ids=repr)
def test_empty_stops_stop_nothing(http, greedy, stop):
    assert greedy(COUNT, stop=stop) == greedy(COUNT)


def test_sixteen_stops_are_accepted(greedy):
    assert greedy(COUNT, stop=[f"never{i}" for i in range(15)] + [", 12"]) == " 10, 11"


def test_echo_repeats_the_prompt(http, greedy):
    body = {"prompt": FRANCE, "max_tokens": 4, "temperature": 0, "echo": True}
    assert http.post("/v1/completions", json=body).json()["choices"][0]["text"] == FRANCE + greedy(FRANCE, max_tokens=4)
    _, raw = stream(http, "/v1/completions", body)
    joined = "".join(chunk["choices"][0]["text"] for chunk in sse_chunks(raw))
    assert joined == FRANCE + greedy(FRANCE, max_tokens=4)


def test_max_tokens_0_with_echo_scores_the_prompt(client, http):
    answer = client.completions.create(model="", prompt=FRANCE, max_tokens=0, echo=True, logprobs=2, temperature=0)
    (choice,) = answer.choices
    assert choice.text == FRANCE
    assert choice.finish_reason == "length"
    check_usage(answer.usage.model_dump(), prompt=5, completion=0)
    scored = choice.logprobs
    assert "".join(scored.tokens) == FRANCE
    assert len(scored.tokens) == len(scored.token_logprobs) == len(scored.top_logprobs) == len(scored.text_offset) == 5
    assert scored.token_logprobs[0] is None and scored.top_logprobs[0] is None
    offset = 0
    for place, token in enumerate(scored.tokens):
        assert scored.text_offset[place] == offset
        offset += len(token)
    for token, value, top in list(zip(scored.tokens, scored.token_logprobs, scored.top_logprobs))[1:]:
        assert -9999.0 <= value < 0
        # The two best, and the token itself when it is not among them.
        assert 2 <= len(top) <= 3
        assert value <= max(top.values()) + 1e-4
        assert top.get(token, value) == pytest.approx(value, abs=1e-4)


def test_max_tokens_0_without_echo_is_empty(http):
    answer = http.post("/v1/completions", json={"prompt": FRANCE, "max_tokens": 0})
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == ""
    check_usage(answer.json()["usage"], prompt=5, completion=0)


def test_logprobs_of_output_and_their_offsets(http):
    body = {"prompt": FRANCE, "max_tokens": 6, "temperature": 0, "logprobs": 3}
    choice = http.post("/v1/completions", json=body).json()["choices"][0]
    scored = choice["logprobs"]
    assert set(scored) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert "".join(scored["tokens"]) == choice["text"]
    assert len(scored["tokens"]) == 6
    # Offsets count characters of the returned text.
    assert scored["text_offset"][0] == 0
    assert scored["text_offset"][-1] == len(choice["text"]) - len(scored["tokens"][-1])
    for token, value, top in zip(scored["tokens"], scored["token_logprobs"], scored["top_logprobs"]):
        assert len(top) == 3
        assert top[token] == pytest.approx(value, abs=1e-4)
        assert max(top, key=top.get) == token
    _, raw = stream(http, "/v1/completions", body)
    streamed = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for chunk in sse_chunks(raw):
        part = chunk["choices"][0].get("logprobs") or {}
        for key in part:
            streamed[key] += part[key]
    assert streamed == scored


def test_a_prompt_scored_and_the_same_tokens_generated_agree(http):
    body = {"prompt": FRANCE, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    generated = http.post("/v1/completions", json=body).json()["choices"][0]
    echoed = http.post("/v1/completions", json={**body, "echo": True}).json()["choices"][0]
    assert echoed["text"] == FRANCE + generated["text"]
    assert echoed["logprobs"]["tokens"][5:] == generated["logprobs"]["tokens"]
    ids = tokens_of(http, FRANCE + generated["text"])
    scored = http.post("/v1/completions", json={**body, "prompt": ids, "echo": True, "max_tokens": 0}).json()
    values = scored["choices"][0]["logprobs"]["token_logprobs"]
    if scored["choices"][0]["logprobs"]["tokens"][5:] == generated["logprobs"]["tokens"]:
        assert values[5:] == pytest.approx(generated["logprobs"]["token_logprobs"], abs=0.05)
    assert values[1:5] == pytest.approx(echoed["logprobs"]["token_logprobs"][1:5], abs=0.05)


def test_best_of_returns_n_of_them(http):
    body = {"prompt": FRANCE, "n": 1, "best_of": 3, "max_tokens": 6, "temperature": 1, "seed": 3}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 1


CHARACTERS = {
    "emoji": ("🦀\n" * 8, "🦀\n🦀\n🦀\n🦀\n"),
    "modifier": ("👍🏽 ok\n" * 8, "👍🏽 ok\n👍🏽 ok\n"),
    "rare-cjk": ("龘 " * 9 + "龘", " 龘 龘 龘 龘"),
}


@pytest.mark.parametrize("case", CHARACTERS)
def test_characters_of_several_tokens_are_never_halved(http, greedy, case):
    prompt, expected = CHARACTERS[case]
    whole = greedy(prompt, max_tokens=24)
    assert whole.startswith(expected)
    assert "\ufffd" not in whole
    _, raw = stream(http, "/v1/completions", {"prompt": prompt, "max_tokens": 24, "temperature": 0})
    texts = [chunk["choices"][0]["text"] for chunk in sse_chunks(raw)]
    assert not [text for text in texts if "\ufffd" in text]
    assert "".join(texts) == whole


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_limit_within_a_character_streams_what_it_returns(http, greedy, cut):
    prompt, expected = CHARACTERS["modifier"]
    whole = greedy(prompt, max_tokens=cut)
    _, raw = stream(http, "/v1/completions", {"prompt": prompt, "max_tokens": cut, "temperature": 0})
    assert "".join(chunk["choices"][0]["text"] for chunk in sse_chunks(raw)) == whole
    assert expected.startswith(whole.rstrip("\ufffd"))


def test_logprob_bytes_join_to_the_characters(http):
    prompt, _ = CHARACTERS["emoji"]
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": prompt}, {"role": "user", "content": prompt}]
    body = {"messages": messages, "max_tokens": 24, "temperature": 0, "logprobs": True}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    joined = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
    assert joined.decode("utf-8", errors="ignore").startswith(choice["message"]["content"].rstrip("\ufffd"))


def test_stop_may_be_an_emoji(greedy):
    prompt, _ = CHARACTERS["emoji"]
    assert greedy(prompt, max_tokens=24, stop=["\n🦀\n🦀"]) == "🦀"
