"""One stream through `m40llm run`: tokens a second from the first to the last token, and peak memory.

usage: server_speed.py BINARY MODEL.gguf [TOKENS [THREADS]]
"""

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Tokens of context served; one place in the batch, so that the KV cache has exactly this many.
CONTEXT = 2048
# Both demo models count on and on.
PROMPT = ", ".join(str(number) for number in range(1, 20)) + ","


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def post(port: int, path: str, body: dict) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        raise RuntimeError(f"{path}: {answer.status} {answer.read().decode()}")
    return answer


def forbid_the_end(port: int) -> dict[str, int]:
    """A logit_bias against the end-of-turn tokens of both demo models, where the vocabulary has them."""
    bias = {}
    for text in ("<|im_end|>", "<|endoftext|>"):
        tokens = json.load(post(port, "/tokenize", {"content": text}))["tokens"]
        if len(tokens) == 1:
            bias[str(tokens[0])] = -100
    return bias


def stream(port: int, tokens: int, bias: dict[str, int]) -> float:
    """Tokens a second between the first and the last chunk that carries text, over raw HTTP."""
    body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True, "logit_bias": bias,
            "stream_options": {"include_usage": True}}  # fmt: skip
    answer = post(port, "/v1/completions", body)
    first = last = written = None
    for line in answer:
        now = time.perf_counter()
        if line.startswith(b"data: {"):
            # Parsing is left for the end of the stream: it would take time from the server's threads.
            if b'"choices":[]' in line:
                written = json.loads(line[6:])["usage"]["completion_tokens"]
            elif b'"finish_reason":null' in line:
                first, last = first or now, now
    if written != tokens or first is None:
        raise RuntimeError(f"the stream brought {written} of {tokens} tokens")
    return (tokens - 1) / (last - first)


def wait_for_health(port: int, server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError("the server did not begin to serve within a minute")


class Server:
    """`m40llm run` for as long as the `with` block; it uses no CPU between streams."""

    def __init__(self, binary: str, model: Path, threads: int, environment: dict[str, str]):
        flags = ["--ctx-size", str(CONTEXT), "--max-batch", "1", "--threads", str(threads), "--backend", "cpu"]
        self.port = free_port()
        self.command = [binary, "run", str(model), "--addr", f"127.0.0.1:{self.port}", *flags]
        self.environment = environment

    def __enter__(self) -> "Server":
        # An own state directory: the user's keys would be asked for.
        self.state, self.log = tempfile.TemporaryDirectory(), tempfile.TemporaryFile()
        environment = {**self.environment, "XDG_STATE_HOME": self.state.name}
        self.process = subprocess.Popen(self.command, stdout=self.log, stderr=self.log, env=environment)
        try:
            wait_for_health(self.port, self.process)
            self.bias = forbid_the_end(self.port)
            self.stream(16)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        self.state.cleanup()
        self.log.close()

    def stream(self, tokens: int) -> float:
        return stream(self.port, tokens, self.bias)

    def peak_bytes(self) -> int:
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())[1]) * 1024


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 128
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else len(os.sched_getaffinity(0))
    with Server(sys.argv[1], Path(sys.argv[2]).resolve(), threads, dict(os.environ)) as server:
        speed = server.stream(tokens)
        print(json.dumps({"tokens_per_s": speed, "peak_bytes": server.peak_bytes()}))


if __name__ == "__main__":
    main()
