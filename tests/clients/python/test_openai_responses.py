"""POST /v1/responses and /v1/embeddings through openai-python."""

import json
import math

import openai
import pytest

from sdk import HELLO, ONE_CALL, STORY, WEATHER, WEATHER_SCHEMA, Review, check_weather

TOOL = {"type": "function", "name": "get_weather", "parameters": WEATHER_SCHEMA, "strict": True}


def ask(client, input=STORY, **more):
    return client.responses.create(**{"model": "", "input": input, "max_output_tokens": 16, "temperature": 0, **more})


def check_usage(usage) -> None:
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 <= usage.input_tokens_details.cached_tokens <= usage.input_tokens
    assert usage.output_tokens_details.reasoning_tokens >= 0


def test_an_answer_is_that_of_chat(client, server):
    answer = ask(client, HELLO, max_output_tokens=64)
    chat = client.chat.completions.create(
        model="", messages=[{"role": "user", "content": HELLO}], max_tokens=64, temperature=0
    )
    assert answer.object == "response"
    assert answer.status == "completed"
    assert answer.model == server.model_id
    assert answer.id.startswith("resp_")
    assert answer.error is None
    assert answer.output_text == chat.choices[0].message.content
    check_usage(answer.usage)
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens


def test_a_cut_answer_is_incomplete(client):
    answer = ask(client)
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 16


def test_a_stream(client):
    whole = ask(client)
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.incomplete"
    assert kinds.count("response.output_text.done") == 1
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    assert kinds.count("response.output_text.delta") > 4
    assert events[-1].response.output_text == text
    assert events[-1].response.usage.output_tokens == 16


def test_the_stream_helper(client):
    with client.responses.stream(model="", input=HELLO, max_output_tokens=64, temperature=0) as events:
        for _ in events:
            pass
        final = events.get_final_response()
    assert final.status == "completed"
    assert final.output_text == ask(client, HELLO, max_output_tokens=64).output_text


def test_instructions_and_turns(client):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": [{"type": "input_text", "text": STORY}]},
    ]
    answer = ask(client, turns, instructions="You are a pirate.")
    system = {"role": "system", "content": "You are a pirate."}
    turns[2]["content"] = STORY
    chat = client.chat.completions.create(model="", messages=[system, *turns], max_tokens=16, temperature=0)
    assert answer.output_text == chat.choices[0].message.content


def test_a_call_and_its_result(client):
    parameters = {"tools": [TOOL], "max_output_tokens": 200, **ONE_CALL}
    answer = ask(client, WEATHER, tool_choice="required", **parameters)
    call = answer.output[-1]
    assert call.type == "function_call" and call.name == "get_weather" and call.call_id
    check_weather(json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "sunny"}'}
    turns = [{"role": "user", "content": WEATHER}, call, result]
    # It may call once more: then there is no text.
    again = ask(client, turns, tools=[TOOL], max_output_tokens=200)
    assert again.output_text or again.output[-1].type == "function_call"


def test_a_streamed_call(client):
    parameters = {"tools": [TOOL], "max_output_tokens": 200, **ONE_CALL}
    events = list(ask(client, WEATHER, tool_choice="required", stream=True, **parameters))
    pieces = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
    done = [event.arguments for event in events if event.type == "response.function_call_arguments.done"]
    assert "".join(pieces) == "".join(done)
    assert len(pieces) > len(done)
    for arguments in done:
        check_weather(json.loads(arguments))
    assert events[-1].type == "response.completed"


def test_an_answer_of_a_shape(client):
    parameters = {"model": "", "input": "Review the film.", "max_output_tokens": 64}
    answer = client.responses.parse(**parameters, text_format=Review, temperature=1.5)
    assert isinstance(answer.output_parsed, Review)


def test_errors(client, keyed, server):
    with pytest.raises(openai.NotFoundError) as refused:
        ask(client, model="gpt-nonsense")
    assert refused.value.code == "model_not_found"
    for more, param in (({"temperature": 9}, "temperature"), ({"max_output_tokens": -1}, "max_output_tokens")):
        with pytest.raises(openai.BadRequestError) as refused:
            ask(client, **more)
        assert refused.value.param == param
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, "hello " * (server.ctx + 10), stream=True)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        ask(openai.OpenAI(base_url=f"{keyed.url}/v1", api_key="none", max_retries=0))


def test_what_is_not_kept_is_refused(client):
    """Answers are not stored: an earlier one cannot be named."""
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"


def norm(vector) -> float:
    return math.sqrt(sum(value * value for value in vector))


def test_embeddings(client, server):
    texts = ["The cat sleeps.", "A cat is asleep.", "SELECT name FROM users"]
    # The SDK asks for base64 by itself, and for floats when it is told.
    packed = client.embeddings.create(model="", input=texts)
    floats = client.embeddings.create(model="", input=texts, encoding_format="float")
    assert packed.object == "list" and packed.model == server.model_id
    assert [item.index for item in packed.data] == [0, 1, 2]
    assert packed.usage.prompt_tokens == packed.usage.total_tokens > 0
    for one, other in zip(packed.data, floats.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert norm(one.embedding) == pytest.approx(1, abs=1e-3)
    cat, sleeps, select = (item.embedding for item in packed.data)

    def likeness(one, other):
        return sum(a * b for a, b in zip(one, other, strict=True))

    assert likeness(cat, sleeps) > likeness(cat, select)


def test_embeddings_of_one_text_and_of_tokens(client, http):
    tokens = http.post("/tokenize", json={"content": HELLO, "add_special": True}).json()["tokens"]
    (text,) = client.embeddings.create(model="", input=HELLO).data
    (ids,) = client.embeddings.create(model="", input=tokens).data
    assert text.embedding == pytest.approx(ids.embedding, abs=1e-6)


def test_embeddings_that_cannot_be(client, server):
    for input in ([], "", "hello " * (server.ctx + 10)):
        with pytest.raises(openai.BadRequestError):
            client.embeddings.create(model="", input=input)
