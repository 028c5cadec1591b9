"""Tools and structured output through openai-python."""

import json

import openai
import pytest

from sdk import HELLO, ONE_CALL, STORY, WEATHER, WEATHER_TOOL, Review, check_weather
from wire import check_usage

ASK_WEATHER = {"model": "", "messages": [{"role": "user", "content": WEATHER}], "tools": [WEATHER_TOOL], **ONE_CALL}
NAMED = {"type": "function", "function": {"name": "get_weather"}}
ASK_REVIEW = {"model": "", "messages": [{"role": "user", "content": "Review the film."}], "max_tokens": 64}


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_a_call(client, choice):
    answer = client.chat.completions.create(**ASK_WEATHER, tool_choice=choice, temperature=0)
    (choice,) = answer.choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    call = choice.message.tool_calls[0]
    assert call.type == "function" and call.id.startswith("call_")
    assert call.function.name == "get_weather"
    check_weather(json.loads(call.function.arguments))
    check_usage(answer.usage.model_dump())


def test_a_streamed_call_is_the_unstreamed(client):
    parameters = {**ASK_WEATHER, "tool_choice": "required", "temperature": 0}
    whole = client.chat.completions.create(**parameters).choices[0]
    pieces = []
    with client.chat.completions.stream(**parameters) as events:
        for event in events:
            if event.type == "tool_calls.function.arguments.delta":
                pieces.append(event.arguments_delta)
        final = events.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    calls = [(call.function.name, call.function.arguments) for call in final.message.tool_calls]
    assert calls == [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
    assert len(pieces) > len(calls), "arguments come in pieces"
    assert "".join(pieces) == "".join(arguments for _, arguments in calls)


def test_a_call_and_its_result_go_back(client):
    call = client.chat.completions.create(**ASK_WEATHER, tool_choice=NAMED, temperature=0).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": '{"weather": "sunny"}'}
    messages = [*ASK_WEATHER["messages"], call, result]
    answer = client.chat.completions.create(model="", messages=messages, tools=[WEATHER_TOOL], max_tokens=16)
    assert answer.usage.prompt_tokens > 40


def test_no_tools_are_called_when_none_may_be(client):
    answer = client.chat.completions.create(**ASK_WEATHER, tool_choice="none", max_tokens=16, temperature=0)
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].message.content


@pytest.mark.full
def test_the_runner_of_strict_tools_parses_arguments(client):
    strict = openai.pydantic_function_tool(Review, name="review")
    answer = client.chat.completions.parse(**ASK_REVIEW, tools=[strict], tool_choice="required", **ONE_CALL)
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Review)


def test_an_answer_of_a_shape(client):
    answer = client.chat.completions.parse(**ASK_REVIEW, response_format=Review, temperature=1.5)
    assert isinstance(answer.choices[0].message.parsed, Review)
    assert answer.choices[0].finish_reason == "stop"
    check_usage(answer.usage.model_dump())


def test_a_streamed_answer_of_a_shape(client):
    parameters = {**ASK_REVIEW, "response_format": Review, "temperature": 1.5, "seed": 4}
    with client.chat.completions.stream(**parameters) as events:
        final = events.get_final_completion().choices[0].message
    assert isinstance(final.parsed, Review)
    assert final.content == client.chat.completions.parse(**parameters).choices[0].message.content


@pytest.mark.full
def test_any_json_object(client):
    answer = client.chat.completions.create(
        **{**ASK_REVIEW, "max_tokens": 200}, response_format={"type": "json_object"}, temperature=0
    )
    choice = answer.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(json.loads(choice.message.content), dict)
    else:
        assert choice.finish_reason == "length" and choice.message.content.lstrip().startswith("{")


def test_an_answer_cut_short_is_not_parsed(client):
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**{**ASK_REVIEW, "max_tokens": 2}, response_format=Review)


def test_a_schema_that_cannot_be_enforced_is_refused(client):
    schema = {"type": "array", "uniqueItems": True}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**ASK_REVIEW, response_format=shape)
    assert "uniqueItems" in refused.value.message
    assert refused.value.param.startswith("response_format")


def test_shapes_beside_each_other(client):
    answer = client.chat.completions.parse(**ASK_REVIEW, response_format=Review, n=3, temperature=1.5, seed=1)
    assert all(isinstance(choice.message.parsed, Review) for choice in answer.choices)


def test_tools_that_are_none_are_refused(client):
    for tools, param in (([{"type": "function"}], "tools"), ([{**WEATHER_TOOL, "type": "nonsense"}], "tools")):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="", messages=[{"role": "user", "content": HELLO}], tools=tools)
        assert refused.value.param.startswith(param)
    with pytest.raises(openai.BadRequestError) as refused:
        other = {"type": "function", "function": {"name": "other"}}
        client.chat.completions.create(**ASK_WEATHER, tool_choice=other)
    assert refused.value.param.startswith("tool_choice")


@pytest.mark.full
def test_many_required_calls_hold_their_schema(client):
    for seed in range(20):
        answer = client.chat.completions.create(
            **ASK_WEATHER, tool_choice="required", temperature=1.5, seed=seed, max_tokens=400
        )
        assert answer.choices[0].finish_reason == "tool_calls"
        for call in answer.choices[0].message.tool_calls:
            check_weather(json.loads(call.function.arguments))


@pytest.mark.full
def test_text_beside_tools_that_may_be_called(client):
    messages = [{"role": "user", "content": STORY}]
    answer = client.chat.completions.create(
        model="", messages=messages, tools=[WEATHER_TOOL], tool_choice="auto", max_tokens=24, temperature=0
    )
    choice = answer.choices[0]
    assert (choice.finish_reason == "tool_calls") == bool(choice.message.tool_calls)
    assert choice.message.content or choice.message.tool_calls
