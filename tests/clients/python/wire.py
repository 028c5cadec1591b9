"""Reading streams byte by byte, and the shapes that several tests expect."""

import json
import re

import httpx

FINISH_REASONS = {"stop", "length", "tool_calls", "content_filter"}


def sse_events(raw: bytes) -> list[str]:
    """The payloads of an SSE body, after checking its framing byte by byte.

    Each event is one line `data: …` and a blank line; comment lines may stand between events.
    """
    text = raw.decode("utf-8")
    assert text.endswith("\n\n"), f"the last event is not closed by a blank line: {text[-80:]!r}"
    assert "\r" not in text
    payloads = []
    for block in text[:-2].split("\n\n"):
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        if not lines:
            continue
        assert len(lines) == 1, f"an event of more than one line: {block!r}"
        assert lines[0].startswith("data: "), f"not a data line: {lines[0]!r}"
        payloads.append(lines[0].removeprefix("data: "))
    return payloads


def sse_chunks(raw: bytes) -> list[dict]:
    """The JSON chunks of an OpenAI stream, which must end with [DONE] and hold it once."""
    payloads = sse_events(raw)
    assert payloads[-1] == "[DONE]", payloads[-1]
    assert "[DONE]" not in payloads[:-1]
    return [json.loads(payload) for payload in payloads[:-1]]


def stream(http: httpx.Client, path: str, body: dict, **more) -> tuple[httpx.Response, bytes]:
    """Posts `body` with `stream: true`; the response (headers) and its whole body."""
    with http.stream("POST", path, json={**body, "stream": True}, **more) as answer:
        return answer, b"".join(answer.iter_raw())


def check_usage(usage: dict, *, prompt: int | None = None, completion: int | None = None) -> None:
    """The usage object of a whole request."""
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert 0 <= cached <= usage["prompt_tokens"]
    if prompt is not None:
        assert usage["prompt_tokens"] == prompt
    if completion is not None:
        assert usage["completion_tokens"] == completion


def gauge(http: httpx.Client, name: str) -> float:
    """The sum over the labels of a metric of /metrics; fails when there is none."""
    text = http.get("/metrics").text
    found = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if not line.startswith("#") and re.split(r"[{ ]", line)[0] == name
    ]
    assert found, f"no metric {name} in:\n{text}"
    return sum(found)
