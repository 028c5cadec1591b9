"""A server of one's own: `m40llm run` on the CPU for as long as a `with` block, on a free loopback port."""

import http.client
import json
import re
import socket
import subprocess
import tempfile
import time
from pathlib import Path


class Server:
    """With a state directory of its own: the user's keys would be asked for. It has a key for each name in `callers`;
    where there is none, nobody needs one."""

    def __init__(self, binary: str, model: Path, threads: int, environment: dict[str, str], *flags: str,
                 callers: tuple[str, ...] = ()):  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.binary, self.environment, self.callers = binary, environment, callers
        self.command = [binary, "run", str(model), "--addr", f"127.0.0.1:{self.port}", "--backend", "cpu",
                        "--threads", str(threads), "--log-level", "warn", *flags]  # fmt: skip

    def __enter__(self):
        self.state, self.log = tempfile.TemporaryDirectory(), tempfile.TemporaryFile()
        self.keys = {name: self.key(name) for name in self.callers}
        self.process = subprocess.Popen([*self.command, "--state-dir", self.state.name],
                                        stdout=self.log, stderr=self.log, env=self.environment)  # fmt: skip
        try:
            self.wait_for_health()
            # Against the end-of-turn tokens of both demo models, where the vocabulary has them: no stream ends before its time.
            ends = [self.tokens(text) for text in ("<|im_end|>", "<|endoftext|>")]
            self.bias = {str(ids[0]): -100 for ids in ends if len(ids) == 1}
            self.warm_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)
        self.state.cleanup()
        self.log.close()

    def warm_up(self) -> None:
        """Before anything is measured."""

    def key(self, name: str) -> str:
        made = subprocess.run(
            [self.binary, "keys", "create", "--name", name, "--scope", "inference", "--scope", "metrics",
             "--state-dir", self.state.name, "--json"],
            stdout=subprocess.PIPE, check=True, env=self.environment,
        )  # fmt: skip
        return json.loads(made.stdout)["key"]

    def wait_for_health(self) -> None:
        for _ in range(600):
            if self.process.poll() is not None:
                self.log.seek(0)
                raise RuntimeError(f"the server ended with exit code {self.process.returncode}: {self.log.read().decode()}")
            try:
                self.call("GET", "/health")
                return
            except (OSError, RuntimeError):
                time.sleep(0.1)
        raise RuntimeError("the server did not begin to serve within a minute")

    def open(self, method: str, path: str, body: dict | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        headers = {"Content-Type": "application/json"}
        if self.keys:
            headers["Authorization"] = f"Bearer {self.keys[self.callers[0]]}"
        connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status} {answer.read().decode()}")
        return answer

    def call(self, method: str, path: str, body: dict | None = None) -> bytes:
        return self.open(method, path, body).read()

    def tokens(self, text: str) -> list[int]:
        return json.loads(self.call("POST", "/tokenize", {"content": text}))["tokens"]

    def metric(self, name: str) -> float:
        """One without labels."""
        for line in self.call("GET", "/metrics").decode().splitlines():
            if line.startswith(name + " "):
                return float(line.split()[-1])
        raise RuntimeError(f"/metrics has no {name}")

    def bytes(self, which: str) -> int:
        """Memory as the system counts it: `VmRSS` now, `VmHWM` at most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{which}:\s+(\d+) kB", status)[1]) * 1024
