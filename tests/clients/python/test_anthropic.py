"""POST /v1/messages through Anthropic's Python SDK."""

import asyncio
from typing import Literal

import anthropic
import pytest
from pydantic import BaseModel

from sdk import HELLO, STORY, TOO_LONG, WEATHER, WEATHER_SCHEMA, check_weather

TOOL = {"name": "get_weather", "description": "The weather of the next days.", "input_schema": WEATHER_SCHEMA}

ANY = {"type": "any", "disable_parallel_tool_use": True}
# The SDK has no name for it any more, older ones do.
GREEDY = {"extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def claude(server):
    return anthropic.Anthropic(base_url=server.url, api_key="unused", max_retries=0, timeout=300)


def ask(claude, content=STORY, **more):
    parameters = {"model": "", "max_tokens": 16, "messages": [{"role": "user", "content": content}]}
    return claude.messages.create(**{**parameters, **GREEDY, **more})


def keyed_client(keyed, key: str) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=keyed.url, api_key=key, max_retries=0, timeout=60)


def test_an_answer_is_that_of_chat(claude, client, server):
    answer = ask(claude, HELLO, max_tokens=64)
    chat = client.chat.completions.create(
        model="", messages=[{"role": "user", "content": HELLO}], max_tokens=64, temperature=0
    )
    assert answer.type == "message" and answer.role == "assistant"
    assert answer.id.startswith("msg_")
    assert answer.model == server.model_id
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == chat.choices[0].message.content
    assert answer.stop_reason == "end_turn" and answer.stop_sequence is None
    cached = answer.usage.cache_read_input_tokens or 0
    assert answer.usage.input_tokens + cached == chat.usage.prompt_tokens
    assert answer.usage.output_tokens == chat.usage.completion_tokens
    assert answer._request_id


def test_why_it_stopped(claude):
    assert ask(claude).stop_reason == "max_tokens"
    answer = ask(claude, "Count: 1, 2, 3, 4, 5", stop_sequences=["a", "e", "i", "o", "u", "1", "2"], max_tokens=64)
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence in ("a", "e", "i", "o", "u", "1", "2")
    assert all(answer.stop_sequence not in block.text for block in answer.content)


def test_a_stream_is_the_answer(claude):
    whole = ask(claude)
    parameters = {"model": "", "max_tokens": 16, "messages": [{"role": "user", "content": STORY}]}
    with claude.messages.stream(**parameters, **GREEDY) as events:
        pieces = list(events.text_stream)
        final = events.get_final_message()
    assert len(pieces) > 4
    assert "".join(pieces) == whole.content[0].text == final.content[0].text
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 16
    assert final.usage.input_tokens > 0


def test_the_events_of_a_stream(claude):
    kinds = [event.type for event in ask(claude, stream=True) if event.type != "ping"]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_asynchronously(server, claude):
    async def answer():
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="unused", max_retries=0) as client:
            return await ask(client, HELLO)

    assert asyncio.run(answer()).content == ask(claude, HELLO).content


def test_system_and_turns(claude, client):
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "user", "content": [{"type": "text", "text": STORY}]},
    ]
    plain = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": STORY},
    ]  # fmt: skip
    chat = client.chat.completions.create(
        model="", messages=[{"role": "system", "content": "You are a pirate."}, *plain], max_tokens=16, temperature=0
    )
    for system in ("You are a pirate.", [{"type": "text", "text": "You are a pirate."}]):
        answer = ask(claude, messages=turns, system=system)
        assert answer.content[0].text == chat.choices[0].message.content


def test_tokens_are_counted(claude):
    counted = claude.messages.count_tokens(model="", messages=[{"role": "user", "content": STORY}])
    answer = ask(claude, max_tokens=1)
    assert counted.input_tokens == answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)


@pytest.mark.parametrize("choice", [ANY, {"type": "tool", "name": "get_weather"}], ids=["any", "tool"])
def test_a_call(claude, choice):
    answer = ask(claude, WEATHER, tools=[TOOL], tool_choice=choice, max_tokens=200)
    assert answer.stop_reason == "tool_use"
    call = answer.content[-1]
    assert call.type == "tool_use" and call.name == "get_weather" and call.id
    check_weather(call.input)


def test_a_streamed_call(claude):
    parameters = {"model": "", "max_tokens": 200, "tools": [TOOL], "tool_choice": ANY}
    with claude.messages.stream(**parameters, messages=[{"role": "user", "content": WEATHER}]) as events:
        pieces = [event.partial_json for event in events if event.type == "input_json"]
        final = events.get_final_message()
    assert final.stop_reason == "tool_use"
    assert len(pieces) > 2
    check_weather(final.content[-1].input)


def test_a_call_and_its_result_go_back(claude):
    answer = ask(claude, WEATHER, tools=[TOOL], tool_choice=ANY, max_tokens=200)
    call = answer.content[-1]
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "sunny"}]}
    turns = [
        {"role": "user", "content": WEATHER},
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result]},
    ]
    again = ask(claude, messages=turns, tools=[TOOL])
    assert again.usage.input_tokens + (again.usage.cache_read_input_tokens or 0) > 40


class Verdict(BaseModel):
    """A review without bounds, which this SDK turns into words before it sends a schema."""

    verdict: Literal["good", "bad"]
    seen: bool


def test_an_answer_of_a_shape(claude):
    answer = claude.messages.parse(
        model="", max_tokens=64, messages=[{"role": "user", "content": "Review the film."}], output_format=Verdict
    )
    assert isinstance(answer.parsed_output, Verdict)


def test_models(claude, server):
    assert [model.id for model in claude.models.list()] == [server.model_id]


def test_errors(claude, keyed):
    with pytest.raises(anthropic.NotFoundError) as missing:
        ask(claude, model="claude-nonsense")
    # Types are the same on every route; the SDK tells errors apart by their status.
    assert missing.value.type == "invalid_request_error"
    assert missing.value.request_id
    hot = {"extra_body": {"temperature": 9}}
    for more, field in ((hot, "temperature"), ({"max_tokens": -1}, "max_tokens"), ({"messages": []}, "messages")):
        with pytest.raises(anthropic.BadRequestError, match=field) as refused:
            ask(claude, **more)
        assert refused.value.type == "invalid_request_error"
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        ask(keyed_client(keyed, keyed.key), TOO_LONG)
    for key, error, kind in (
        ("none", anthropic.AuthenticationError, "invalid_request_error"),
        (keyed.key_of_metrics, anthropic.PermissionDeniedError, "permission_error"),
        (keyed.key_without_tokens, anthropic.RateLimitError, "rate_limit_error"),
    ):
        for stream in (False, True):
            with pytest.raises(error) as refused:
                ask(keyed_client(keyed, key), HELLO, stream=stream)
            assert refused.value.type == kind


def test_a_full_server(keyed):
    with keyed.full(), pytest.raises(anthropic.APIStatusError) as refused:
        ask(keyed_client(keyed, keyed.key), HELLO)
    # Anthropic's own servers say 529: the SDK tries both again.
    assert refused.value.status_code == 503
    assert refused.value.type == "server_error"
