"""Load on a server: streams whose every read is stamped when it returns.

One thread has all connections, and parses nothing before the load is over: both would take time from a server on
the same cores. Requests are HTTP/1.0, so that a body is its events and nothing else.
"""

import asyncio
import json
import random
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

from server import Server

WORDS = " sea tree house light rain road stone bread cat river cloud song door hand water fire".split()


@dataclass
class Ask:
    prompt: list[int]
    tokens: int
    due: float = 0.0  # seconds after the load's start
    caller: str = "first"


@dataclass
class Answer:
    """What came back; times are seconds after the load's start."""

    due: float
    status: int = 0
    times: list[float] = field(default_factory=list)  # of each piece of text
    text: str = ""
    usage: dict = field(default_factory=dict)
    finished: bool = False
    complaint: str = ""

    @property
    def ttft(self) -> float:
        """From when the request was due, not from when a busy client came to send it."""
        return self.times[0] - self.due

    def gaps(self, start: float = 0.0, end: float = 1e9) -> list[float]:
        """Times between texts, of those that overlap start..end."""
        return [b - a for a, b in zip(self.times, self.times[1:]) if b > start and a < end]


def parsed(due: float, reads: list[tuple[float, bytes]]) -> Answer:
    answer, rest, seen = Answer(due), b"", b""
    for now, data in reads:
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            seen = (seen + line)[-300:]
            if line.startswith(b"HTTP/"):
                answer.status = int(line.split()[1])
            elif line == b"data: [DONE]":
                answer.finished = True
            elif line.startswith(b"data: {"):
                event = json.loads(line[6:])
                answer.usage = event.get("usage") or answer.usage
                if event.get("choices") and event["choices"][0]["text"]:
                    answer.times.append(now)
                    answer.text += event["choices"][0]["text"]
    if not answer.finished:
        answer.complaint = (seen + rest)[-300:].decode(errors="replace")
    return answer


class LoadedServer(Server):
    """With two callers, and many requests at once."""

    def __init__(self, binary: str, model: Path, threads: int, environment: dict[str, str], *flags: str):
        super().__init__(binary, model, threads, environment, *flags, callers=("first", "second"))

    def warm_up(self) -> None:
        self.words = [self.tokens(" " + word) for word in WORDS]
        self.words = [ids[0] for ids in self.words if len(ids) == 1]
        self.run([Ask(self.prompt(40, "warm"), 8), Ask(self.prompt(600, "warm"), 8)])

    def prompt(self, length: int, seed: object) -> list[int]:
        """So many words of one token each; other seeds have no prefix in common."""
        return random.Random(f"{seed}").choices(self.words, k=length)

    def run(self, asks: list[Ask], until: int | None = None) -> list[Answer]:
        """All asks when they are due; with `until`, those before it are abandoned once it and those after it are answered."""
        return asyncio.run(self.load(asks, until))

    async def load(self, asks: list[Ask], until: int | None) -> list[Answer]:
        origin = time.perf_counter()
        reads: list[list] = [[] for _ in asks]
        tasks = [asyncio.create_task(self.one(ask, origin, got)) for ask, got in zip(asks, reads)]
        if until is not None:
            await asyncio.gather(*tasks[until:])
            for task in tasks[:until]:
                task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        return [parsed(ask.due, got) for ask, got in zip(asks, reads)]

    async def one(self, ask: Ask, origin: float, reads: list[tuple[float, bytes]]) -> None:
        body = json.dumps({"prompt": ask.prompt, "max_tokens": ask.tokens, "temperature": 0, "stream": True,
                           "logit_bias": self.bias, "stream_options": {"include_usage": True}}).encode()  # fmt: skip
        head = (f"POST /v1/completions HTTP/1.0\r\nHost: 127.0.0.1:{self.port}\r\nContent-Type: application/json\r\n"
                f"Authorization: Bearer {self.keys[ask.caller]}\r\nContent-Length: {len(body)}\r\n\r\n")  # fmt: skip
        loop = asyncio.get_running_loop()
        await asyncio.sleep(max(0.0, origin + ask.due - time.perf_counter()))
        with socket.socket() as connection:
            connection.setblocking(False)
            await loop.sock_connect(connection, ("127.0.0.1", self.port))
            await loop.sock_sendall(connection, head.encode() + body)
            while data := await loop.sock_recv(connection, 65536):
                reads.append((time.perf_counter() - origin, data))
