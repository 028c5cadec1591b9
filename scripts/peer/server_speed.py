"""One stream through `m40llm run`: tokens a second from the first to the last token, and peak memory.

usage: server_speed.py BINARY MODEL.gguf [TOKENS [THREADS]]
"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "serving"))
from server import Server  # noqa: E402

# Tokens of context served; one place in the batch, so that the KV cache has exactly this many.
CONTEXT = 2048
# Both demo models count on and on.
PROMPT = ", ".join(str(number) for number in range(1, 20)) + ","


class StreamServer(Server):
    """One place in the batch; it uses no CPU between streams."""

    def __init__(self, binary: str, model: Path, threads: int, environment: dict[str, str]):
        super().__init__(binary, model, threads, environment, "--ctx-size", str(CONTEXT), "--max-batch", "1")

    def warm_up(self) -> None:
        self.stream(16)

    def stream(self, tokens: int) -> float:
        """Tokens a second between the first and the last chunk that carries text, over raw HTTP."""
        body = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "stream": True, "logit_bias": self.bias,
                "stream_options": {"include_usage": True}}  # fmt: skip
        first = last = written = None
        for line in self.open("POST", "/v1/completions", body):
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

    def peak_bytes(self) -> int:
        return self.bytes("VmHWM")


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    tokens = int(sys.argv[3]) if len(sys.argv) > 3 else 128
    threads = int(sys.argv[4]) if len(sys.argv) > 4 else len(os.sched_getaffinity(0))
    with StreamServer(sys.argv[1], Path(sys.argv[2]).resolve(), threads, dict(os.environ)) as server:
        speed = server.stream(tokens)
        print(json.dumps({"tokens_per_s": speed, "peak_bytes": server.peak_bytes()}))


if __name__ == "__main__":
    main()
