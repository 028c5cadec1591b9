"""LangChain's ChatOpenAI and OpenAIEmbeddings."""

import asyncio

import openai
import pytest
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

from sdk import HELLO, ONE_CALL, STORY, TOO_LONG, WEATHER, WEATHER_TOOL, Review, check_weather


def model(server, **more) -> ChatOpenAI:
    parameters = {"max_tokens": 16, "temperature": 0, "max_retries": 0, "api_key": "unused", "timeout": 300}
    return ChatOpenAI(**{"model": server.model_id, "base_url": f"{server.url}/v1", **parameters, **more})


def keyed_model(keyed, key: str) -> ChatOpenAI:
    return ChatOpenAI(
        model="", base_url=f"{keyed.url}/v1", api_key=key, max_retries=0, max_tokens=4, timeout=60
    )


def check_usage(message: AIMessage, output: int) -> None:
    usage = message.usage_metadata
    assert usage["output_tokens"] == output
    assert usage["total_tokens"] == usage["input_tokens"] + output


def test_an_answer(server):
    answer = model(server).invoke([SystemMessage("Be brief."), HumanMessage(STORY)])
    assert answer.content
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == server.model_id
    assert answer.response_metadata["system_fingerprint"]
    check_usage(answer, 16)


def test_a_stream_is_the_answer(server):
    whole = model(server).invoke(STORY)
    chunks = list(model(server, stream_usage=True).stream(STORY))
    total = chunks[0]
    for chunk in chunks[1:]:
        total += chunk
    assert total.content == whole.content
    assert len([chunk for chunk in chunks if chunk.content]) > 4
    assert total.response_metadata["finish_reason"] == "length"
    check_usage(total, 16)


def test_beside_each_other(server):
    whole = model(server).invoke(HELLO).content

    async def together():
        streamed = ["".join([chunk.content async for chunk in model(server).astream(HELLO)])]
        return streamed + [answer.content for answer in await model(server).abatch([HELLO] * 3)]

    assert asyncio.run(together()) == [whole] * 4


def test_stop_and_logprobs(server):
    answer = model(server, stop_sequences=[", 4"]).invoke("Count: 1, 2, 3, 4, 5")
    assert ", 4" not in answer.content
    answer = model(server, logprobs=True, top_logprobs=2, max_tokens=3).invoke(STORY)
    assert len(answer.response_metadata["logprobs"]["content"]) == 3


def test_a_call_and_its_result(server):
    bound = model(server, max_tokens=200).bind_tools([WEATHER_TOOL], tool_choice="any", **ONE_CALL)
    answer = bound.invoke(WEATHER)
    call = answer.tool_calls[0]
    assert call["name"] == "get_weather" and call["id"]
    assert not answer.invalid_tool_calls
    check_weather(call["args"])
    result = ToolMessage('{"weather": "sunny"}', tool_call_id=call["id"])
    free = model(server, max_tokens=200).bind_tools([WEATHER_TOOL])
    again = free.invoke([HumanMessage(WEATHER), answer, result])
    assert again.content or again.tool_calls


def test_a_streamed_call(server):
    bound = model(server, max_tokens=200).bind_tools([WEATHER_TOOL], tool_choice="get_weather")
    total = None
    for chunk in bound.stream(WEATHER):
        total = chunk if total is None else total + chunk
    assert [call["name"] for call in total.tool_calls] == ["get_weather"]
    check_weather(total.tool_calls[0]["args"])


@pytest.mark.full
def test_a_function_as_a_tool(server):
    @tool
    def add(a: int, b: int) -> int:
        """Adds two numbers."""
        return a + b

    bound = model(server, max_tokens=200).bind_tools([add], tool_choice="any", strict=True, **ONE_CALL)
    calls = bound.invoke("What is 2 + 3?").tool_calls
    assert calls and all(isinstance(add.invoke(call["args"]), int) for call in calls)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_an_answer_of_a_shape(server, method):
    shaped = model(server, max_tokens=200, temperature=1.2).with_structured_output(Review, method=method)
    assert isinstance(shaped.invoke("Review the film."), Review)


@pytest.mark.full
def test_a_streamed_answer_of_a_shape(server):
    shaped = model(server, max_tokens=200).with_structured_output(Review, method="json_schema")
    assert isinstance(list(shaped.stream("Review the film."))[-1], Review)


def test_over_responses(server):
    responses = model(server, use_responses_api=True)
    answer = responses.invoke(STORY)
    assert answer.text == model(server).invoke(STORY).content
    check_usage(answer, 16)
    assert "".join(chunk.text for chunk in responses.stream(STORY)) == answer.text


@pytest.mark.full
def test_calls_and_shapes_over_responses(server):
    responses = model(server, use_responses_api=True, max_tokens=200)
    (call, *_) = responses.bind_tools([WEATHER_TOOL], tool_choice="any", **ONE_CALL).invoke(WEATHER).tool_calls
    check_weather(call["args"])
    assert isinstance(responses.with_structured_output(Review, method="json_schema").invoke("Review."), Review)


def test_embeddings(server):
    # By itself it would look for OpenAI's tokenizer, on the network.
    embeddings = OpenAIEmbeddings(
        model=server.model_id, base_url=f"{server.url}/v1", api_key="unused", check_embedding_ctx_length=False
    )
    one, two = embeddings.embed_documents(["The cat sleeps.", HELLO])
    assert len(one) == len(two) > 100
    assert embeddings.embed_query(HELLO) == pytest.approx(two, abs=1e-6)


def test_errors(server, keyed):
    with pytest.raises(openai.NotFoundError):
        model(server, model="gpt-nonsense").invoke(HELLO)
    with pytest.raises(openai.BadRequestError) as refused:
        model(server, temperature=9).invoke(HELLO)
    assert refused.value.param == "temperature"
    with pytest.raises(ContextOverflowError):
        keyed_model(keyed, keyed.key).invoke(TOO_LONG)
    for key, error in (
        ("none", openai.AuthenticationError),
        (keyed.key_of_metrics, openai.PermissionDeniedError),
        (keyed.key_without_tokens, openai.RateLimitError),
    ):
        with pytest.raises(error):
            keyed_model(keyed, key).invoke(HELLO)
        with pytest.raises(error):
            list(keyed_model(keyed, key).stream(HELLO))


def test_a_full_server(keyed):
    with keyed.full(), pytest.raises(openai.InternalServerError) as refused:
        keyed_model(keyed, keyed.key).invoke(HELLO)
    assert refused.value.status_code == 503 and refused.value.code == "overloaded"
