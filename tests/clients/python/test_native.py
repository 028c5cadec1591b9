"""The native routes, and the binary's own `generate`."""

import json
import subprocess

import pytest

from wire import check_usage, sse_events

FRANCE = "The capital of France is"
GREEDY = {"prompt": FRANCE, "max_tokens": 16, "temperature": 0, "prompt_format": "raw"}
HARD = [
    "Hello, world!", "", " ", "   leading and trailing   ", "\n\n\n", "\t\ttabs", "a\r\nb", "naïve café", "你好，世界",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈", "e\u0301 vs é", "it's we'll I'D", "3.14159 1000000", "def f(x):\n    return x**2\n",
    "\u2028\u2029\u0085", "\u0000", "العربية עברית", "<|im_end|>", "x" * 3000,
]  # fmt: skip


def test_generate(http, greedy):
    answer = http.post("/generate", json=GREEDY)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"output", "finish_reason", "usage"}
    assert body["output"] == greedy(FRANCE, max_tokens=16)
    assert body["finish_reason"] == "length"
    check_usage(body["usage"], prompt=5, completion=16)


def check_parts(parts: list[dict], whole: dict) -> None:
    *pieces, last = parts
    assert len(pieces) > 3
    for piece in pieces:
        assert set(piece) == {"output", "done"}
        assert piece["done"] is False
    assert set(last) == {"output", "done", "finish_reason", "usage"}
    assert (last["output"], last["done"], last["finish_reason"]) == ("", True, whole["finish_reason"])
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert "".join(piece["output"] for piece in pieces) == whole["output"]


def test_generate_streams_ndjson(http):
    whole = http.post("/generate", json=GREEDY).json()
    with http.stream("POST", "/generate", json={**GREEDY, "stream": True}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    assert raw.endswith(b"\n")
    check_parts([json.loads(line) for line in raw.decode().removesuffix("\n").split("\n")], whole)


def test_generate_streams_sse_when_accepted(http):
    whole = http.post("/generate", json=GREEDY).json()
    headers = {"accept": "text/event-stream"}
    with http.stream("POST", "/generate", json={**GREEDY, "stream": True}, headers=headers) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    payloads = [payload for payload in sse_events(raw) if payload != "[DONE]"]
    check_parts([json.loads(payload) for payload in payloads], whole)


def test_generate_by_default_uses_the_chat_template(http):
    body = {"prompt": "Say hello.", "max_tokens": 16, "temperature": 0}
    chat = http.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 16, "temperature": 0},
    ).json()
    assert http.post("/generate", json=body).json()["output"] == chat["choices"][0]["message"]["content"]
    # A prompt that holds the template's markers already is left alone.
    rendered = http.post("/apply-template", json={"messages": [{"role": "user", "content": "Say hello."}]}).json()
    again = http.post("/generate", json={**body, "prompt": rendered["prompt"]}).json()
    assert again["output"] == chat["choices"][0]["message"]["content"]


def test_generate_stops_at_strings_and_top_k_1_is_greedy(http):
    body = {**GREEDY, "prompt": "1, 2, 3, 4, 5, 6, 7, 8, 9,", "max_tokens": 48, "stop": [", 12"]}
    answer = http.post("/generate", json=body).json()
    assert (answer["output"], answer["finish_reason"]) == (" 10, 11", "stop")
    hot = http.post("/generate", json={**GREEDY, "temperature": 1.5, "top_k": 1}).json()
    assert hot["output"] == http.post("/generate", json=GREEDY).json()["output"]


@pytest.mark.parametrize("text", HARD, ids=lambda text: ascii(text)[:24])
def test_tokenize_and_back(http, text):
    answer = http.post("/tokenize", json={"content": text, "parse_special": False})
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"tokens"}
    tokens = answer.json()["tokens"]
    assert all(isinstance(token, int) and token >= 0 for token in tokens)
    assert http.post("/detokenize", json={"tokens": tokens}).json() == {"content": text}


def test_tokenize_parses_special_tokens_by_default(http):
    (token,) = http.post("/tokenize", json={"content": "<|im_end|>"}).json()["tokens"]
    assert http.post("/detokenize", json={"tokens": [token]}).json() == {"content": "<|im_end|>"}
    plain = http.post("/tokenize", json={"content": "<|im_end|>", "parse_special": False}).json()["tokens"]
    assert len(plain) > 1 and token not in plain


def test_detokenize_nothing(http):
    assert http.post("/detokenize", json={"tokens": []}).json() == {"content": ""}


def test_apply_template(http):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    assert http.post("/apply-template", json={"messages": messages}).json() == {
        "prompt": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    }


def test_apply_template_takes_tools(http):
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
    body = {"messages": [{"role": "user", "content": "Hi"}], "tools": [tool]}
    answer = http.post("/apply-template", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["prompt"].endswith("<|im_start|>assistant\n")


def generate(server, *arguments: str) -> str:
    command = [server.binary, "generate", server.model, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_the_binary_prints_generated_text_only(http, server, stream):
    arguments = [FRANCE, "--max-tokens", "16", "--temperature", "0", "--prompt-format", "raw", *stream]
    first, second = generate(server, *arguments), generate(server, *arguments)
    assert first == second
    expected = http.post("/generate", json=GREEDY).json()["output"]
    assert first in (expected, expected + "\n")


def test_the_binary_samples_what_the_server_samples(http, server):
    sampled = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "min_p": 0.02, "seed": 77, "max_tokens": 16}
    arguments = [part for name, value in sampled.items() for part in ("--" + name.replace("_", "-"), str(value))]
    expected = http.post("/generate", json={"prompt": "Say hello.", **sampled}).json()["output"]
    assert generate(server, "Say hello.", *arguments) in (expected, expected + "\n")
