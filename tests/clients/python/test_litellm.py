"""LiteLLM: its OpenAI route, the fallback to a larger context, and its Anthropic route."""

import json

import litellm
import pytest

from sdk import HELLO, ONE_CALL, STORY, TOO_LONG, WEATHER, WEATHER_TOOL, Review, check_weather
from wire import check_usage

WEATHER_MESSAGES = [{"role": "user", "content": WEATHER}]


def ask(server, content=STORY, **more):
    parameters = {
        "model": f"openai/{server.model_id}", "api_base": f"{server.url}/v1", "api_key": "unused", "max_tokens": 16,
        "temperature": 0, "num_retries": 0, "max_retries": 0, "timeout": 300,
        "messages": [{"role": "user", "content": content}],
    }  # fmt: skip
    return litellm.completion(**{**parameters, **more})


def ask_keyed(server, keyed, key: str, content=HELLO, **more):
    return ask(server, content, api_base=f"{keyed.url}/v1", api_key=key, **{"max_tokens": 4, **more})


def test_an_answer(server):
    answer = ask(server)
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    check_usage(answer.usage.model_dump(), completion=16)


def test_a_stream_is_the_answer(server):
    whole = ask(server)
    chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
    assert len(chunks) > 8
    total = litellm.stream_chunk_builder(chunks, messages=[{"role": "user", "content": STORY}])
    assert total.choices[0].message.content == whole.choices[0].message.content
    assert total.choices[0].finish_reason == "length"
    assert total.usage.completion_tokens == 16
    assert total.usage.prompt_tokens == whole.usage.prompt_tokens


def test_a_call_and_its_result(server):
    parameters = {"tools": [WEATHER_TOOL], "max_tokens": 200, **ONE_CALL}
    answer = ask(server, WEATHER, tool_choice="required", **parameters).choices[0]
    assert answer.finish_reason == "tool_calls"
    call = answer.message.tool_calls[0]
    check_weather(json.loads(call.function.arguments))
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'}
    messages = [*WEATHER_MESSAGES, answer.message.model_dump(), result]
    assert ask(server, messages=messages, tools=[WEATHER_TOOL]).usage.prompt_tokens > 40


def test_a_streamed_call(server):
    parameters = {"tools": [WEATHER_TOOL], "max_tokens": 200, **ONE_CALL}
    chunks = list(ask(server, WEATHER, tool_choice="required", stream=True, **parameters))
    total = litellm.stream_chunk_builder(chunks, messages=WEATHER_MESSAGES).choices[0]
    assert total.finish_reason == "tool_calls"
    for call in total.message.tool_calls:
        check_weather(json.loads(call.function.arguments))


def test_an_answer_of_a_shape(server):
    answer = ask(server, "Review the film.", response_format=Review, max_tokens=64, temperature=1.2)
    Review.model_validate_json(answer.choices[0].message.content)


def test_errors(server, keyed):
    with pytest.raises(litellm.NotFoundError):
        ask(server, model="openai/gpt-nonsense")
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        ask(server, temperature=9)
    for key, error, status in (
        ("none", litellm.AuthenticationError, 401),
        # A 403 has no class of its own here.
        (keyed.key_of_metrics, litellm.APIError, 403),
        (keyed.key_without_tokens, litellm.RateLimitError, 429),
    ):
        with pytest.raises(error) as refused:
            ask_keyed(server, keyed, key)
        assert refused.value.status_code == status


def test_a_full_server(server, keyed):
    with keyed.full(), pytest.raises((litellm.ServiceUnavailableError, litellm.InternalServerError)) as refused:
        ask_keyed(server, keyed, keyed.key)
    assert refused.value.status_code == 503


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_prompt_that_is_too_long_is_told_apart(server, keyed, stream):
    with pytest.raises(litellm.ContextWindowExceededError):
        list(ask_keyed(server, keyed, keyed.key, TOO_LONG, stream=stream))


def test_the_router_falls_back_to_the_larger_context(server, keyed):
    name = f"openai/{server.model_id}"
    small = {"model": name, "api_base": f"{keyed.url}/v1", "api_key": keyed.key}
    large = {"model": name, "api_base": f"{server.url}/v1", "api_key": "unused"}
    router = litellm.Router(
        model_list=[
            {"model_name": "small", "litellm_params": small},
            {"model_name": "large", "litellm_params": large},
        ],
        context_window_fallbacks=[{"small": ["large"]}],
        num_retries=0,
    )
    answer = router.completion("small", [{"role": "user", "content": TOO_LONG}], max_tokens=2)
    assert answer.usage.prompt_tokens > 512


def test_embeddings(server):
    parameters = {"model": f"openai/{server.model_id}", "api_base": f"{server.url}/v1", "api_key": "unused"}
    answer = litellm.embedding(input=["The cat sleeps.", HELLO], **parameters)
    one, two = (item["embedding"] for item in answer.data)
    assert len(one) == len(two) > 100
    assert answer.usage.prompt_tokens > 0


@pytest.mark.full
def test_over_responses(server):
    parameters = {"model": f"openai/{server.model_id}", "api_base": f"{server.url}/v1", "api_key": "unused"}
    answer = litellm.responses(input=STORY, max_output_tokens=16, temperature=0, **parameters)
    assert answer.output[-1].content[0].text == ask(server).choices[0].message.content
    assert answer.usage.output_tokens == 16


def test_over_messages(server):
    anthropic = {"model": f"anthropic/{server.model_id}", "api_base": server.url}
    answer = ask(server, **anthropic)
    assert answer.choices[0].message.content == ask(server).choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 16
    chunks = list(ask(server, stream=True, **anthropic))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == answer.choices[0].message.content


@pytest.mark.full
def test_a_call_over_messages(server):
    anthropic = {"model": f"anthropic/{server.model_id}", "api_base": server.url}
    parameters = {"tools": [WEATHER_TOOL], "tool_choice": "required", "max_tokens": 200, **ONE_CALL}
    answer = ask(server, WEATHER, **anthropic, **parameters).choices[0]
    assert answer.finish_reason == "tool_calls"
    check_weather(json.loads(answer.message.tool_calls[0].function.arguments))
