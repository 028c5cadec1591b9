"""Tools: calls that must be made fit their schemas, whatever is asked; streams say the same; conversations go on."""

import json
import os
import random
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest

WORDS = "city count date email filter height items limit mode name order page query radius size title unit user".split()
QUESTIONS = [
    "What is the weather like in Zürich today?",
    "Book a table for four at eight.",
    "Sort these: pear, apple, fig.",
    "Écris « bonjour » à Zoé, s'il te plaît.",
    "42",
    "Remind me to water the plants {every} [day] \"soon\".",
    "把灯打开 🙂",
    "Convert 3.5 miles to kilometres, and tell <b>why</b>.",
]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city now",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
        },
    },
}


def value_schema(rng: random.Random, depth: int) -> dict:
    kind = rng.choice(["string", "enum", "integer", "number", "boolean", "null or", "pattern"] + ["array", "object"] * (depth > 0))
    low = rng.randint(-50, 50)
    match kind:
        case "string":
            return {"type": "string", "minLength": rng.randint(0, 3), "maxLength": rng.randint(4, 24)}
        case "enum":
            return {"enum": rng.sample([*WORDS, 1, 2.5, True, None, 'q"uo\\te', "é🙂"], rng.randint(1, 5))}
        case "integer":
            return {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 500)}
        case "number":
            return {"type": "number", "minimum": low, "maximum": low + rng.randint(1, 500)}
        case "boolean":
            return {"type": "boolean"}
        case "null or":
            return {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 99}]}
        case "pattern":
            return {"type": "string", "pattern": rng.choice(["^[a-z]{2,8}$", "^[0-9]{4}-[0-9]{2}$", "^(up|down|left)$"])}
        case "array":
            return {"type": "array", "items": value_schema(rng, depth - 1), "maxItems": rng.randint(1, 3)}
        case _:
            return object_schema(rng, depth - 1)


def object_schema(rng: random.Random, depth: int) -> dict:
    names = rng.sample(WORDS, rng.randint(0, 3))
    schema = {"type": "object", "properties": {name: value_schema(rng, depth) for name in names}}
    if rng.random() < 0.7:
        schema["required"] = rng.sample(names, rng.randint(0, len(names)))
    # Objects without other properties: else a hot model makes them up until the limit.
    return schema | {"additionalProperties": False}


def random_tools(rng: random.Random) -> list[dict]:
    tools = []
    for name in rng.sample(WORDS, rng.randint(1, 4)):
        function = {"name": f"{rng.choice(['get', 'set-', 'find_'])}{name}"}
        if rng.random() < 0.9:
            function["parameters"] = object_schema(rng, 2)
        if rng.random() < 0.5:
            function["description"] = f"About {name}"
        tools.append({"type": "function", "function": function})
    return tools


def say(client, **request) -> tuple[str, list[tuple[str, str]], str]:
    """Text, calls and the reason for the end, of a whole answer or of a stream."""
    if not request.get("stream"):
        choice = client.chat.completions.create(model="", **request).choices[0]
        made = choice.message.tool_calls or []
        assert len({call.id for call in made}) == len(made)
        return choice.message.content or "", [(c.function.name, c.function.arguments) for c in made], choice.finish_reason
    text, calls, reason = "", [], None
    for chunk in client.chat.completions.create(model="", **request):
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        for call in choice.delta.tool_calls or []:
            if call.id:
                assert call.index == len(calls) and call.type == "function" and call.function.arguments == ""
                calls.append([call.function.name, ""])
            else:
                calls[call.index][1] += call.function.arguments
        reason = choice.finish_reason or reason
    return text, [tuple(call) for call in calls], reason


def one_request(client, seed: int) -> int:
    """A random request that must be answered with calls; how many whole ones there were."""
    rng = random.Random(seed)
    tools = random_tools(rng)
    schemas = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    named = rng.random() < 0.3
    choice = {"type": "function", "function": {"name": rng.choice(list(schemas))}} if named else "required"
    parallel = rng.random() < 0.2
    text, calls, reason = say(
        client,
        messages=[{"role": "user", "content": rng.choice(QUESTIONS)}],
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        temperature=rng.uniform(1, 1.6),
        seed=seed,
        max_tokens=200,
        stream=rng.random() < 0.5,
    )
    assert text == "", f"seed {seed}: {text!r}"
    assert reason in ("tool_calls", "length"), f"seed {seed}: {reason}"
    assert parallel or len(calls) <= 1, f"seed {seed}: {calls}"
    # The limit may cut the last one off.
    whole = calls if reason == "tool_calls" else calls[:-1]
    assert whole or reason == "length", f"seed {seed}: no call"
    for name, arguments in whole:
        if named:
            assert name == choice["function"]["name"], f"seed {seed}"
        try:
            jsonschema.validate(json.loads(arguments), schemas[name] or {"type": "object", "maxProperties": 0})
        except (ValueError, jsonschema.ValidationError) as error:
            pytest.fail(f"seed {seed}: {name}({arguments}): {error}")
    return len(whole)


def test_calls_that_must_be_made_fit_their_schemas(client, full, capsys):
    wanted = 200 if full else 16
    first = int(os.environ.get("TEST_SEED", random.randrange(1_000_000)))
    began = time.monotonic()
    made = asked = 0
    with ThreadPoolExecutor(16) as pool:
        while made < wanted:
            assert asked < 2 * wanted, f"only {made} whole calls in {asked} requests"
            made += sum(pool.map(lambda seed: one_request(client, seed), range(first + asked, first + asked + 16)))
            asked += 16
    with capsys.disabled():
        print(f"\nTEST_SEED={first}: {made} whole calls in {asked} requests, all valid, in {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_streamed_and_whole_are_the_same(client, choice):
    for seed in range(3):
        request = {
            "messages": [{"role": "user", "content": "How is the weather in Oslo?"}],
            "tools": [WEATHER],
            "tool_choice": choice,
            "temperature": 1,
            "seed": seed,
            "max_tokens": 60,
        }
        assert say(client, **request) == say(client, **request, stream=True)


def test_a_conversation_goes_on_after_a_call(client):
    messages = [{"role": "user", "content": "How is the weather in Oslo?"}]
    request = {"model": "", "tools": [WEATHER], "temperature": 0, "max_tokens": 60}
    first = client.chat.completions.create(
        messages=messages, tool_choice="required", parallel_tool_calls=False, **request
    ).choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content is None
    call = first.message.tool_calls[0]
    # As it came, ids and nulls and all.
    messages.append(first.message.model_dump())
    messages.append({"role": "tool", "tool_call_id": call.id, "content": '{"sky": "blue", "degrees": 21}'})
    second = client.chat.completions.create(messages=messages, tool_choice="none", **request).choices[0]
    assert second.message.content and not second.message.tool_calls
    assert second.finish_reason in ("stop", "length")


@pytest.mark.parametrize("choice", ["required", "auto"])
def test_a_schema_that_is_not_enforced_is_refused(client, choice):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "notAKeyword": 1}}}
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="", messages=[{"role": "user", "content": "Hi"}], tools=[tool], tool_choice=choice
        )
    assert refused.value.param == "tools[0].function.parameters"
    assert "notAKeyword" in refused.value.message
