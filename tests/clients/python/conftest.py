"""Fixtures: where the live servers are, and clients for them.

run.sh starts the servers and sets the TEST_ variables that are read here.
Nothing here depends on what a particular model says beyond what both demo models do.
"""

import os
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import pytest

from wire import gauge


@dataclass(frozen=True)
class Server:
    """The server under test, which asks for no key."""

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


@dataclass(frozen=True)
class Keyed:
    """A server of the same model that asks for keys. Its context is 512 tokens; one request runs, one waits."""

    url: str
    key: str
    key_of_metrics: str
    """Lacks the scope `inference`."""
    key_without_tokens: str
    """May use one token a minute, and so none."""

    @contextmanager
    def full(self):
        """While it has no place for another request."""
        body = {"prompt": "1, 2, 3,", "max_tokens": 480, "temperature": 1.8, "stream": True}
        bearer = {"authorization": f"Bearer {self.key}"}
        end = threading.Event()

        def occupy():
            with httpx.Client(base_url=self.url, headers=bearer, timeout=120) as http:
                while not end.is_set():
                    with http.stream("POST", "/v1/completions", json=body) as answer:
                        for _ in answer.iter_raw():
                            if end.is_set():
                                return

        occupants = [threading.Thread(target=occupy) for _ in range(2)]
        metrics = {"authorization": f"Bearer {self.key_of_metrics}"}
        with httpx.Client(base_url=self.url, headers=metrics, timeout=60) as http:
            try:
                for occupant in occupants:
                    occupant.start()
                self.wait(http, 1)
                yield
            finally:
                end.set()
                for occupant in occupants:
                    occupant.join()
                self.wait(http, 0)

    @staticmethod
    def wait(http: httpx.Client, waiting: int) -> None:
        """Until so many wait, and none runs when none waits."""
        deadline = time.monotonic() + 30
        while gauge(http, "m40llm_sequences_waiting") != waiting or (
            waiting == 0 and gauge(http, "m40llm_sequences_running") > 0
        ):
            assert time.monotonic() < deadline, f"not {waiting} waiting after 30 s"
            time.sleep(0.02)


def pytest_collection_modifyitems(config, items) -> None:
    """Without --full, tests marked `full` are not among those that run."""
    if os.environ.get("TEST_FULL") != "1":
        left_out = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("full")]


@pytest.fixture(scope="session")
def server() -> Server:
    env = os.environ
    return Server(env["TEST_URL"], env["TEST_BINARY"], env["TEST_MODEL"], int(env["TEST_CTX"]))


@pytest.fixture(scope="session")
def keyed() -> Keyed:
    env = os.environ
    return Keyed(
        env["TEST_KEYED_URL"], env["TEST_KEY"], env["TEST_KEY_OF_METRICS"], env["TEST_KEY_WITHOUT_TOKENS"]
    )


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
