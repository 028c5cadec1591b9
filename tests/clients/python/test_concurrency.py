"""Requests beside each other: same texts, same seeds, and nothing left running."""

import asyncio
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from wire import gauge

PROMPTS = [
    "Once upon a time",
    "def fibonacci(n):",
    "1, 2, 3, 4, 5, 6, 7, 8, 9,",
    "The capital of France is",
    "🦀\n" * 8,
    "In the beginning, there was",
    "SELECT name FROM users WHERE",
    "The quick brown fox jumps over the lazy dog. " * 6,
]
RUNNING = "m40llm_sequences_running"
WAITING = "m40llm_sequences_waiting"


async def streamed(client, prompt: str, max_tokens: int, **more) -> str:
    parameters = {"max_tokens": max_tokens, "temperature": 0, **more}
    chunks = await client.completions.create(model="", prompt=prompt, stream=True, **parameters)
    return "".join([chunk.choices[0].text async for chunk in chunks])


def test_eight_concurrent_streams_equal_one_after_another(async_client, greedy, full):
    length = 96 if full else 32

    async def together(rounds: int) -> None:
        # All in one event loop: the client keeps connections, which do not outlive theirs.
        for _ in range(rounds):
            assert await asyncio.gather(*(streamed(async_client, prompt, length) for prompt in PROMPTS)) == alone

    alone = [greedy(prompt, max_tokens=length) for prompt in PROMPTS]
    asyncio.run(together(5 if full else 1))


def test_a_seed_is_the_same_alone_and_beside_seven_others(async_client, greedy, full):
    sampled = {"temperature": 1.0, "top_p": 0.95, "seed": 1234}
    length = 64 if full else 24
    alone = greedy(PROMPTS[0], max_tokens=length, **sampled)

    async def beside():
        others = [
            streamed(async_client, prompt, length, temperature=0.8, seed=place)
            for place, prompt in enumerate(PROMPTS[1:])
        ]
        return (await asyncio.gather(streamed(async_client, PROMPTS[0], length, **sampled), *others))[0]

    assert asyncio.run(beside()) == alone
    assert greedy(PROMPTS[0], max_tokens=length, **sampled) == alone


def test_greedy_is_deterministic(greedy):
    assert len({greedy("Once upon a time", max_tokens=32) for _ in range(3)}) == 1


def test_seeds_hold_for_each_of_n(http):
    body = {"prompt": "Once upon a time", "n": 3, "temperature": 1.2, "seed": 42, "max_tokens": 12}
    first, second = (http.post("/v1/completions", json=body).json()["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in second]
    assert len({choice["text"] for choice in first}) == 3


def test_requests_without_a_seed_differ(greedy):
    texts = {greedy("Once upon a time", max_tokens=16, temperature=1.5) for _ in range(4)}
    assert len(texts) > 1


def test_more_requests_than_places_all_end(server, full):
    def one(place: int) -> int:
        body = {"prompt": PROMPTS[place % 8], "max_tokens": 4, "temperature": 0}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=240).status_code

    count = 160 if full else 40
    with ThreadPoolExecutor(count) as pool:
        assert list(pool.map(one, range(count))) == [200] * count


def wait_until(reached, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if reached():
            return True
        time.sleep(0.05)
    return reached()


def idle(http) -> bool:
    return gauge(http, RUNNING) == 0


ENDLESS = {"prompt": "Once upon a time", "max_tokens": 1800, "temperature": 1.0}


@pytest.fixture
def endless(http):
    """A request that runs for many seconds: end-of-turn tokens are forbidden."""
    ends = [http.post("/tokenize", json={"content": text}).json()["tokens"] for text in ("<|im_end|>", "<|endoftext|>")]
    return {**ENDLESS, "logit_bias": {str(token): -100 for (token,) in ends}}


def test_closing_a_stream_ends_the_work(http, server, endless):
    assert wait_until(lambda: idle(http), 5)
    with httpx.stream("POST", f"{server.url}/v1/completions", json={**endless, "stream": True}, timeout=60) as answer:
        lines = answer.iter_lines()
        for _ in range(6):
            next(lines)
        assert gauge(http, RUNNING) >= 1
    assert wait_until(lambda: idle(http), 4), "the sequence went on after its client had gone"


def test_closing_an_sdk_stream_ends_the_work(http, client, endless):
    chunks = client.completions.create(model="", stream=True, **endless)
    next(iter(chunks))
    assert gauge(http, RUNNING) >= 1
    chunks.close()
    assert wait_until(lambda: idle(http), 4)


def send(server, route: str, body: dict) -> socket.socket:
    """A request under way, whose answer nobody reads yet."""
    payload = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    connection.sendall(head.encode() + payload)
    return connection


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_a_client_that_gives_up_unstreamed_ends_the_work(http, server, endless, route):
    body = dict(endless)
    if "chat" in route:
        body["messages"] = [{"role": "user", "content": body.pop("prompt")}]
    if route == "/generate":
        # No logit_bias there; high temperature makes an early end unlikely.
        body = {"prompt": "Once upon a time", "max_tokens": 1800, "temperature": 1.8, "prompt_format": "raw", "seed": 5}
    assert wait_until(lambda: idle(http), 5)
    connection = send(server, route, body)
    assert wait_until(lambda: gauge(http, RUNNING) == 1, 30)
    connection.close()
    assert wait_until(lambda: idle(http), 4), "the sequence went on after its client had gone"


def test_gone_clients_leave_the_queue_too(http, server, endless):
    """More requests than places; all clients leave, running and queued, and the next one is served."""
    assert wait_until(lambda: idle(http), 5)
    connections = [send(server, "/v1/completions", endless) for _ in range(24)]
    assert wait_until(lambda: gauge(http, RUNNING) + gauge(http, WAITING) == 24 and gauge(http, WAITING) > 0, 60)
    for connection in connections:
        connection.close()
    assert wait_until(lambda: idle(http) and gauge(http, WAITING) == 0, 4)
    assert http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200
