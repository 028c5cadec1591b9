"""Every error of the contract that needs no key: status, type, code, param, and the SDK's exception."""

import http.client
import json
import socket
import time

import openai
import pytest

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Say hello."}]


def check_error(answer, status: int, *, type_="invalid_request_error", code=None, param=None) -> str:
    """Checks an httpx response against the contract's error body; the message."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.headers["x-request-id"]
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == type_
    if code is not None:
        assert error["code"] == code
    assert error["code"] is None or isinstance(error["code"], str)
    if param is not None:
        # A path into the field, `messages[0].role`, names it too.
        assert error["param"] == param or (error["param"] or "").startswith((param + "[", param + ".")), error
    return error["message"]


def deep(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


BAD_CHAT = [
    ("messages", "Hi"), ("messages", []), ("messages", {}), ("messages", 5), ("messages", None), ("messages", ["Hi"]),
    ("messages", [{"content": "Hi"}]), ("messages", [{"role": "king", "content": "Hi"}]),
    ("messages", [{"role": "user", "content": 5}]), ("messages", [{"role": 5, "content": "Hi"}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]),
    ("messages", [{"role": "user", "content": [{"type": "nonsense"}]}]),
    ("model", 5), ("stream", "yes"), ("stream", 1),
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", []),
    ("top_p", -0.1), ("top_p", 1.1), ("top_p", "x"), ("min_p", -0.1), ("min_p", 1.1),
    ("top_k", "x"), ("top_k", 1.5),
    ("max_tokens", -1), ("max_tokens", 1.5), ("max_tokens", "x"), ("max_tokens", 1e30),
    ("max_completion_tokens", -1), ("max_completion_tokens", 1.5), ("max_completion_tokens", "x"),
    ("n", 0), ("n", -1), ("n", 100000), ("n", "x"), ("n", 1.5),
    ("stop", 5), ("stop", [5]), ("stop", {"a": 1}), ("stop", [f"s{i}" for i in range(17)]),
    ("seed", "x"), ("seed", 1.5),
    ("presence_penalty", 2.1), ("presence_penalty", -2.1), ("frequency_penalty", 2.1), ("frequency_penalty", "x"),
    ("logit_bias", []), ("logit_bias", {"x": 1}), ("logit_bias", {"1": 101}), ("logit_bias", {"1": "x"}),
    ("logit_bias", {"99999999": 1}), ("logit_bias", {"-1": 1}),
    ("logprobs", "yes"), ("logprobs", 1), ("top_logprobs", 21), ("top_logprobs", -1), ("top_logprobs", "x"),
    ("response_format", {"type": "xml"}), ("response_format", "json"),
    ("stream_options", 5), ("stream_options", {"include_usage": "x"}),
]  # fmt: skip

BAD_COMPLETIONS = [
    ("prompt", None), ("prompt", 5), ("prompt", []), ("prompt", [[]]), ("prompt", {}), ("prompt", [-1]),
    ("prompt", [1.5]), ("prompt", [99999999]), ("prompt", [1, "a"]), ("prompt", [[1], "a"]), ("prompt", [[["a"]]]),
    ("prompt", [[99999999]]), ("prompt", [None]),
    ("echo", "x"), ("logprobs", -1), ("logprobs", "x"), ("logprobs", 1000), ("best_of", 0), ("best_of", "x"),
    ("max_tokens", -1), ("temperature", 3), ("n", 0), ("stop", 5), ("suffix", 5), ("model", 5), ("seed", "x"),
]  # fmt: skip


def label(value) -> str:
    return str(value)[:40] if not isinstance(value, str) else value


@pytest.mark.parametrize(("field", "value"), BAD_CHAT, ids=label)
def test_bad_chat_field(http, field, value):
    body = {"messages": HELLO, "max_tokens": 1, "stream": field == "stream_options"}
    if field == "top_logprobs":
        body["logprobs"] = True
    check_error(http.post(CHAT, json={**body, field: value}), 400, param=field)


@pytest.mark.parametrize(("field", "value"), BAD_COMPLETIONS, ids=label)
def test_bad_completions_field(http, field, value):
    check_error(http.post(COMPLETIONS, json={"prompt": "Hi", "max_tokens": 1, field: value}), 400, param=field)


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        (CHAT, {"max_tokens": 1}, "messages"),
        (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2}, "top_logprobs"),
        (CHAT, {"messages": HELLO, "top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        (COMPLETIONS, {"max_tokens": 1}, "prompt"),
        (COMPLETIONS, {"prompt": "Hi", "stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"prompt": "Hi", "n": 3, "best_of": 2}, "best_of"),
        (COMPLETIONS, {"prompt": "Hi", "best_of": 2, "stream": True}, "best_of"),
        ("/generate", {}, "prompt"),
        ("/generate", {"prompt": 5}, "prompt"),
        ("/generate", {"prompt": "Hi", "prompt_format": "nonsense"}, "prompt_format"),
        ("/generate", {"prompt": "Hi", "max_tokens": -1}, "max_tokens"),
        ("/generate", {"prompt": "Hi", "temperature": "x"}, "temperature"),
        ("/generate", {"prompt": "Hi", "top_p": 2}, "top_p"),
        ("/generate", {"prompt": "Hi", "min_p": 2}, "min_p"),
        ("/generate", {"prompt": "Hi", "stop": 5}, "stop"),
        ("/generate", {"prompt": "Hi", "stream": "x"}, "stream"),
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": 5}, "content"),
        ("/tokenize", {"content": "Hi", "add_special": "x"}, "add_special"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"),
        ("/detokenize", {"tokens": [99999999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/apply-template", {}, "messages"),
        ("/apply-template", {"messages": [{"role": "user", "content": 5}]}, "messages"),
    ],
)
def test_bad_request(http, route, body, param):
    check_error(http.post(route, json=body), 400, param=param)


def test_suffix_needs_a_model_with_fim_tokens(http, server):
    answer = http.post(COMPLETIONS, json={"prompt": "def f(", "suffix": "return 1", "max_tokens": 2})
    fim = len(http.post("/tokenize", json={"content": "<|fim_prefix|>"}).json()["tokens"]) == 1
    if not fim:
        check_error(answer, 400, param="suffix")
    else:
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("depth", [100, 5000])
def test_deep_nesting_is_refused_or_ignored(http, depth):
    answer = http.post(CHAT, json={"messages": HELLO, "max_tokens": 1, "x": deep(100)})
    assert answer.status_code in (200, 400)
    text = json.dumps({"messages": HELLO, "max_tokens": 1})[:-1] + ', "x": ' + "[" * depth + "]" * depth + "}"
    answer = http.post(CHAT, content=text, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400)
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_context_length_exceeded(http, server, route, stream):
    for text, max_tokens in (("hello " * (server.ctx + 10), None), ("hello " * (server.ctx - 20), 64), ("hello", 10**6)):
        body = {"stream": stream}
        body |= {"messages": [{"role": "user", "content": text}]} if route == CHAT else {"prompt": text}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        message = check_error(http.post(route, json=body), 400, code="context_length_exceeded")
        assert f"This model's maximum context length is {server.ctx} tokens" in message


def test_context_length_exceeded_elsewhere(http, server):
    answer = http.post("/generate", json={"prompt": "hello " * (server.ctx + 10), "prompt_format": "raw"})
    check_error(answer, 400, code="context_length_exceeded")


@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
def test_unknown_model(http, route):
    body = {"model": "gpt-nonsense", "messages": HELLO, "prompt": "Hi"}
    message = check_error(http.post(route, json=body), 404, code="model_not_found")
    assert "gpt-nonsense" in message
    check_error(http.get("/v1/models/gpt-nonsense"), 404, code="model_not_found")


def test_the_sdk_raises_its_own_exceptions(client, server):
    with pytest.raises(openai.NotFoundError) as not_found:
        client.chat.completions.create(model="gpt-nonsense", messages=HELLO)
    assert not_found.value.code == "model_not_found"
    assert not_found.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="", messages=HELLO, temperature=9)
    assert bad.value.param == "temperature"
    assert bad.value.request_id
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="", prompt="hello " * (server.ctx + 10), stream=True)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-nonsense")


@pytest.mark.parametrize("path", ["/nope", "/v1/nope", "/v1/chat", "/%ff", "/x//y", "/v1/completions/"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_unknown_route(http, method, path):
    check_error(http.request(method, path, json={} if method == "POST" else None), 404)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"), ("PUT", CHAT, "POST"), ("DELETE", COMPLETIONS, "POST"), ("GET", "/generate", "POST"),
        ("GET", "/tokenize", "POST"), ("POST", "/v1/models", "GET"), ("POST", "/health", "GET"),
        ("POST", "/metrics", "GET"), ("POST", "/openapi.json", "GET"),
    ],
)  # fmt: skip
def test_wrong_method(http, method, path, allowed):
    answer = http.request(method, path, json={})
    check_error(answer, 405)
    assert allowed in [name.strip() for name in answer.headers["allow"].split(",")]


JSON_ROUTES = [CHAT, COMPLETIONS, "/generate", "/tokenize", "/detokenize", "/apply-template"]


@pytest.mark.parametrize("route", JSON_ROUTES)
@pytest.mark.parametrize(
    "raw", [b"", b"{", b"nonsense", b"[]", b"5", b"null", b'{"messages": }', b'{"a": "\xff"}', b"{}{}", b'{"prompt":"\\ud800"}'],
    ids=repr,
)  # fmt: skip
def test_body_that_is_not_a_json_object(http, route, raw):
    check_error(http.post(route, content=raw, headers={"content-type": "application/json"}), 400)


@pytest.mark.parametrize("route", JSON_ROUTES)
@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", None])
def test_wrong_content_type(http, route, content_type):
    headers = {} if content_type is None else {"content-type": content_type}
    check_error(http.post(route, content=b'{"content": "Hi"}', headers=headers), 415)


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"])
def test_accepted_content_types(http, content_type):
    answer = http.post("/tokenize", content=b'{"content": "Hi"}', headers={"content-type": content_type})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("route", JSON_ROUTES)
def test_too_large_is_told_before_the_body_is_read(server, route):
    """Only the head is sent, so the answer can only come from Content-Length."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("POST", route)
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", str(8 * 1024 * 1024 + 1))
    connection.endheaders()
    answer = connection.getresponse()
    body = json.loads(answer.read())
    assert answer.status == 413
    assert body["error"]["type"] == "invalid_request_error"
    connection.close()


@pytest.mark.parametrize(
    ("request_line", "content_type", "status"),
    [
        ("POST /v1/nope", "application/json", 404),
        ("PUT /v1/chat/completions", "application/json", 405),
        ("POST /v1/chat/completions", "text/plain", 415),
    ],
)
def test_a_refused_request_leaves_its_connection_usable(server, request_line, content_type, status):
    """Clients send head and body apart; a body that comes after the answer must not cost the next request."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        head = f"{request_line} HTTP/1.1\r\nHost: x\r\nContent-Type: {content_type}\r\nContent-Length: 2\r\n\r\n"
        raw.sendall(head.encode())
        assert raw.recv(65536).startswith(f"HTTP/1.1 {status}".encode())
        time.sleep(0.1)
        raw.sendall(b"{}")
        time.sleep(0.1)
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"HTTP/1.1 200" in raw.recv(65536)


def test_too_large_without_a_length(server):
    """A chunked body over the limit is cut off, not gathered."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        raw.sendall(head.encode())
        piece = b"100000\r\n" + b" " * 0x100000 + b"\r\n"
        try:
            for _ in range(9):
                raw.sendall(piece)
            raw.sendall(b"0\r\n\r\n")
        except OSError:
            pass  # closed early: the status may still be readable
        try:
            status = raw.recv(64)
        except ConnectionResetError:
            status = b""
        assert status == b"" or status.startswith(b"HTTP/1.1 413"), status


def test_a_body_just_under_the_limit_is_read(http):
    answer = http.post("/tokenize", json={"content": "Hi", "padding": "x" * (8 * 1024 * 1024 - 200)})
    assert answer.status_code == 200, answer.text


def test_errors_do_not_carry_rust(http):
    """Messages speak of JSON fields, not of the types behind them."""
    for body in ({"messages": 5}, {"messages": HELLO, "temperature": "x"}, {"messages": HELLO, "stop": {"a": 1}}):
        message = http.post(CHAT, json=body).json()["error"]["message"]
        for word in ("struct", "Option<", "Vec<", "untagged enum", "serde", "variant"):
            assert word not in message, message
