"""What examples are run with."""

from __future__ import annotations

import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import runner


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A directory with what examples name."""
    runner.prepare(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Where a server of the model listens, for examples that ask one and start none."""
    work = tmp_path_factory.mktemp("server")
    runner.prepare(work)
    port = runner.free_port()
    with open(work / "log", "w") as log:
        command = [runner.BINARY, "run", runner.MODEL, "--ctx-size", "512"]
        server = subprocess.Popen(command, env=runner.environment(work, port), stdout=log, stderr=log)
    for _ in range(300):
        assert server.poll() is None, (work / "log").read_text()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).close()
            break
        except OSError:
            time.sleep(0.2)
    else:
        pytest.fail("the server did not become healthy: " + (work / "log").read_text())
    yield port
    server.terminate()
    assert server.wait(60) == 0, (work / "log").read_text()
