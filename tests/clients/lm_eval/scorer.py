"""The engine's own scores of what lm-evaluation-harness asks for: engine/examples/score.rs, and no HTTP.

How texts become tokens and windows is written here once more, from what lm-evaluation-harness documents.
"""

import json
import subprocess


class Scorer:
    """The engine, one question after the other."""

    def __init__(self, program: str, model: str):
        self.process = subprocess.Popen(
            [program, model], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        self.known = {}

    def ask(self, **question):
        line = json.dumps(question)
        if line not in self.known:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
            assert answer, f"the engine ended at {line}"
            self.known[line] = json.loads(answer)
        return self.known[line]

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0

    def tokens(self, text: str) -> list[int]:
        return self.ask(text=text)["tokens"]

    def pair(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The tokens of both, and where the continuation begins: with the white space at the context's end."""
        return self.tokens(context + continuation), len(self.tokens(context.rstrip()))

    def likelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        """The continuation's log-likelihood, and whether it is what greedy decoding says."""
        tokens, start = self.pair(context, continuation)
        scores = self.ask(tokens=tokens, **{"from": start})
        assert len(scores["logprobs"]) == len(tokens) - start > 0
        return sum(scores["logprobs"]), all(scores["greedy"])

    def rolling(self, text: str, prefix: int, window: int) -> float:
        """The text's log-likelihood, `window` tokens at a time: the first after `prefix`, the last with all the context
        that fits beside it, and no token scored twice."""
        tokens = self.tokens(text)
        total = 0.0
        for start in range(0, len(tokens), window):
            end = min(start + window, len(tokens))
            before = [prefix] if start == 0 else tokens[max(end - window - 1, 0) : start]
            scores = self.ask(tokens=before + tokens[start:end], **{"from": len(before)})
            total += sum(scores["logprobs"])
        return total

    def greedy(self, text: str, max_tokens: int, stop: list[str]) -> str:
        return self.ask(tokens=self.tokens(text), max_tokens=max_tokens, stop=stop)["text"]
