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


def measure(binary: str, model: Path, threads: int, tokens: int, environment: dict[str, str]) -> dict:
    port = free_port()
    flags = ["--ctx-size", str(CONTEXT), "--max-batch", "1", "--threads", str(threads), "--backend", "cpu"]
    with tempfile.TemporaryDirectory() as state, tempfile.TemporaryFile() as log:
        # An own state directory: the user's keys would be asked for.
        command = [binary, "run", str(model), "--addr", f"127.0.0.1:{port}", *flags]
        server = subprocess.Popen(command, stdout=log, stderr=log, env={**environment, "XDG_STATE_HOME": state})
        try:
            wait_for_health(port, server)
            bias = forbid_the_end(port)
            stream(port, 16, bias)
            speed = stream(port, tokens, bias)
            peak = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{server.pid}/status").read_text())
        finally:
            server.terminate()
            server.wait(timeout=30)
    return {"tokens_per_s": speed, "peak_bytes": int(peak[1]) * 1024}


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 128
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else len(os.sched_getaffinity(0))
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]).resolve(), threads, tokens, dict(os.environ))))


if __name__ == "__main__":
    main()
