"""Fixtures: where the live server is, and clients for it.

run.sh starts the server and sets TEST_URL, TEST_BINARY, TEST_MODEL, TEST_CTX and TEST_FULL.
Nothing here depends on what a particular model says beyond what both demo models do.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest


@dataclass(frozen=True)
class Server:
    """The server under test."""

    url: str
    binary: str
    model: str
    ctx: int

    @property
    def model_id(self) -> str:
        """The id the contract gives a model without an alias: the file's stem."""
        return Path(self.model).stem

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])


@pytest.fixture(scope="session")
def server() -> Server:
    env = os.environ
    return Server(env["TEST_URL"], env["TEST_BINARY"], env["TEST_MODEL"], int(env["TEST_CTX"]))


@pytest.fixture(scope="session")
def full() -> bool:
    """True with run.sh --full: larger counts."""
    return os.environ.get("TEST_FULL") == "1"


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    # No retries: a retried 503 would hide it.
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=300)


@pytest.fixture
def async_client(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0, timeout=300)


@pytest.fixture(scope="session")
def http(server: Server):
    """Raw HTTP, for what an SDK hides."""
    with httpx.Client(base_url=server.url, timeout=300) as raw:
        yield raw


@pytest.fixture(scope="session")
def greedy(http):
    """`greedy(prompt, **more)`: the text of a completion at temperature 0, unstreamed."""

    def run(prompt, max_tokens=24, **more) -> str:
        body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **more}
        answer = http.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["text"]

    return run
