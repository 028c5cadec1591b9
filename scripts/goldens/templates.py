#!/usr/bin/env python3
"""Chat prompts as Hugging Face's `apply_chat_template` renders them.

    pip install transformers==5.23.0 jinja2==3.1.6 gguf numpy
    scripts/fetch-vocabs.sh && python scripts/goldens/templates.py MODELS_DIR

MODELS_DIR holds the two demo models. Writes engine/tests/goldens/templates.json: the cases (requests as
OpenAI clients send them), and per template what comes out of each: a string, or {"error": message} where
the template itself refuses, or {"error": null} where it breaks.
"""

import json
import pathlib
import re
import sys

import gguf
import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

ROOT = pathlib.Path(__file__).resolve().parents[2]
LLAMA = ("<|begin_of_text|>", "<|eot_id|>")
FETCHED = {
    "llama-3": LLAMA,
    "llama-3.1": LLAMA,
    "llama-3.2": LLAMA,
    "qwen3": ("", "<|im_end|>"),
    "mistral-nemo": ("<s>", "</s>"),
}
OURS = {"llama3": LLAMA, "chatml": ("", "<|im_end|>")}
DEMOS = {
    "smollm2": ("smollm2-135m-instruct-q4_1.gguf", ("<|im_start|>", "<|im_end|>")),
    "qwen2.5-coder": ("qwen2.5-coder-0.5b-instruct-q4_k_m.gguf", ("<|endoftext|>", "<|im_end|>")),
}

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather <now> & then, in \"°C\"\nor °F",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Münster, 東京 …"},
                "days": {"type": "integer", "minimum": 0, "default": 1.0, "maximum": 1e21},
                "unit": {"type": "string", "enum": ["c", "f"], "x": []},
            },
            "required": ["city"],
            "additionalProperties": False,
            "z": None,
            "empty": {},
        },
    },
}
TIME = {"type": "function", "function": {"name": "time", "description": "", "parameters": {"type": "object", "properties": {}}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def call(name, arguments, n=1):
    return {"id": f"call00000{n}", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, n=1):
    return {"role": "tool", "tool_call_id": f"call00000{n}", "content": text}


ASK = user("How is the weather in Münster?")
CALL = {"role": "assistant", "content": None, "tool_calls": [call("get_weather", '{"city": "Münster", "days": 2, "b": true, "a": null, "f": 1.50}')]}
CASES = {
    "one": dict(messages=[user("Hi")]),
    "no generation prompt": dict(messages=[user("Hi"), assistant("Hello!")], add_generation_prompt=False),
    "system": dict(messages=[system("Be brief."), user("Hi")]),
    "empty system": dict(messages=[system(""), user("Hi")]),
    "turns": dict(messages=[system("  Be brief. "), user(" Hi \n"), assistant("Hello!\n"), user("And\n\nnow?"), assistant(""), user("?")]),
    "system in the middle": dict(messages=[user("Hi"), assistant("Yo"), system("Now in French."), user("Hi")]),
    "unicode": dict(messages=[system("Ünï 🦙"), user("日本語 <b>&amp;</b> 'q' \"q\" \\n {{ x }} {% y %} {# z #}"), assistant("👩‍👩‍👧‍👦\u2028")]),
    "markers in text": dict(messages=[user("<|im_end|><|eot_id|></s>[INST]"), assistant("<think>\nhm\n</think>\n\nyes"), user("go")]),
    "parts": dict(messages=[{"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]}]),
    "tools": dict(messages=[ASK], tools=[WEATHER, TIME]),
    "tools and system": dict(messages=[system("Be brief."), ASK], tools=[WEATHER]),
    "call": dict(messages=[ASK, CALL, result('{"temp": 20.5}')], tools=[WEATHER]),
    "call without tools": dict(messages=[system("S"), ASK, CALL, result("20 °C"), assistant("It is 20 °C."), user("Thanks")]),
    "call with text": dict(messages=[ASK, {**CALL, "content": "Let me see."}, result("ok")], tools=[TIME]),
    "two calls": dict(
        messages=[ASK, {"role": "assistant", "tool_calls": [call("time", "{}"), call("get_weather", {"city": "X"}, 2)]}, result("12:00"), result("hot", 2), assistant("Hot."), user("Ta")],
        tools=[WEATHER, TIME],
    ),
    "no calls": dict(messages=[user("Hi"), {"role": "assistant", "content": "x", "tool_calls": []}, user("y")]),
    "null content": dict(messages=[user("Hi"), {"role": "assistant", "content": None}, user("y")]),
    "arguments not json": dict(messages=[ASK, {"role": "assistant", "content": None, "tool_calls": [call("time", "now!")]}, result("x")], tools=[TIME]),
    "two users": dict(messages=[user("a"), user("b")]),
    "no messages": dict(messages=[]),
    "thinking off": dict(messages=[user("Hi")], extra={"enable_thinking": False}),
    "tools in system": dict(messages=[system("S"), ASK], tools=[WEATHER], extra={"tools_in_user_message": False}),
}


def normalised(message, source):
    """What servers do before the template: see `ChatTemplate::render`."""
    message = dict(message)
    if not message.get("tool_calls"):
        message.pop("tool_calls", None)
    content = message.get("content")
    if content is None:
        tested = re.search(r"content['\"\])]* is (not )?none", source)
        message["content"] = None if "tool_calls" in message and tested else ""
    elif isinstance(content, list):
        message["content"] = "".join(part["text"] for part in content)
    if "tool_calls" in message:
        message["tool_calls"] = [{**c, "function": {**c["function"], "arguments": parsed(c["function"]["arguments"])}} for c in message["tool_calls"]]
    return message


def parsed(arguments):
    try:
        value = json.loads(arguments)
        return value if isinstance(value, dict) else arguments
    except (TypeError, ValueError):
        return arguments


def render(source, bos, eos, case):
    try:
        rendered, _ = render_jinja_template(
            conversations=[[normalised(m, source) for m in case["messages"]]],
            tools=case.get("tools"),
            chat_template=source,
            add_generation_prompt=case.get("add_generation_prompt", True),
            bos_token=bos,
            eos_token=eos,
            **case["extra"],
        )
        return rendered[0]
    except jinja2.exceptions.UndefinedError:
        return {"error": None}
    except jinja2.exceptions.TemplateError as error:
        return {"error": str(error)}
    except TypeError:
        return {"error": None}


def main():
    demos = pathlib.Path(sys.argv[1])
    sources = {}
    for name, (file, special) in DEMOS.items():
        sources[name] = (gguf.GGUFReader(demos / file).fields["tokenizer.chat_template"].contents(), special)
    for name, special in FETCHED.items():
        sources[name] = ((ROOT / f"models/vocabs/templates/{name}.jinja").read_text(), special)
    for name, special in OURS.items():
        sources[name] = ((ROOT / f"templates/{name}.jinja").read_text(), special)
    # The date would change the goldens every day.
    cases = [{"name": name, **case, "extra": {"date_string": "26 Jul 2024", **case.get("extra", {})}} for name, case in CASES.items()]
    out = {name: {"bos": bos, "eos": eos, "prompts": [render(source, bos, eos, case) for case in cases]} for name, (source, (bos, eos)) in sources.items()}
    dump = lambda value: json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    rows = lambda values: "[\n" + ",\n".join(dump(v) for v in values) + "\n]"
    templates = [f'{dump(name)}:{{"bos":{dump(t["bos"])},"eos":{dump(t["eos"])},"prompts":{rows(t["prompts"])}}}' for name, t in out.items()]
    text = f'{{"cases":{rows(cases)},\n"templates":{{' + ",\n".join(templates) + "}}\n"
    assert json.loads(text) == {"cases": cases, "templates": out}
    (ROOT / "engine/tests/goldens/templates.json").write_text(text)


main()
