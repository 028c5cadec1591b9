"""The examples of the documentation: every fenced block of the languages below, and how it is marked.

A block is run or parsed by test_examples.py unless the line above it says why not:

    <!-- example: gpu: times kernels, of which a CPU has none -->

The kinds of marks are in MARKS. A block that shows what the one before it prints has `<!-- output -->` above it:
JSON is held to it by its shape, text to the letter but for `…`.

Standard library only: `run.sh --gpu` needs it where nothing is installed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Why a block is not run by `make test`, and what does with it instead.
MARKS = {
    "gpu": "wants a CUDA device: `tests/docs/run.sh --gpu` runs it",
    "slow": "takes minutes: `make test-full` runs it",
    "measures": "a benchmark, whose target `make` knows: run by hand on an idle machine",
    "suite": "runs the tests that this one is part of",
    "container": "wants a container runtime: `make test-container` builds the same image without one",
    "network": "fetches from hosts that tests do not ask",
    "root": "changes the machine's services",
    "part": "a part of something that is run whole elsewhere, which the reason names",
}

RUN = {"sh", "python"}
PARSED = {"c", "json", "toml", "ini", "yaml"}
# Shown, never run. A block without a language is not one of them: what it is has to be said.
# Sessions of consoles are those of docs/device_selection.md, which api/tests/it/device_selection.rs runs.
SHOWN = {"text", "console"}

COMMENT = re.compile(r"^<!--\s*example:\s*(?P<kind>[a-z]+):\s+(?P<reason>\S.*\S)\s*-->$")
OUTPUT = "<!-- output -->"
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")


@dataclass(frozen=True)
class Block:
    path: Path
    line: int
    language: str
    text: str
    mark: str | None = None
    reason: str = ""
    is_output: bool = False

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """What is documentation: all that the book holds."""
    named = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docker/README.md", "kernels/README.md"]
    return [ROOT / name for name in named] + sorted((ROOT / "docs").glob("*.md"))


def blocks(path: Path, text: str | None = None) -> list[Block]:
    """The fenced blocks of a document; a ValueError where one is not as this file says."""
    lines = (path.read_text() if text is None else text).splitlines()
    found: list[Block] = []
    above = ""
    at = 0
    while at < len(lines):
        fence = FENCE.match(lines[at])
        if not fence:
            if is_directive(above):
                raise ValueError(f"{path}:{at}: a mark without a block below it: {above}")
            above = lines[at].strip()
            at += 1
            continue
        start = at
        at += 1
        body = []
        while at < len(lines) and lines[at].strip() != "```":
            body.append(lines[at].removeprefix(fence["indent"]))
            at += 1
        if at == len(lines):
            raise ValueError(f"{path}:{start + 1}: the block does not end")
        found.append(block(path, start + 1, fence["info"].strip(), "\n".join(body) + "\n", above))
        above = ""
        at += 1
    if is_directive(above):
        raise ValueError(f"{path}: a mark without a block below it: {above}")
    return found


def is_directive(line: str) -> bool:
    return line.startswith("<!-- example") or line == OUTPUT


def block(path: Path, line: int, language: str, text: str, above: str) -> Block:
    if language not in RUN | PARSED | SHOWN:
        known = ", ".join(sorted(RUN | PARSED | SHOWN))
        raise ValueError(f"{path}:{line}: a block of language {language!r}; known are {known}")
    if above == OUTPUT:
        return Block(path, line, language, text, is_output=True)
    if not above.startswith("<!-- example"):
        return Block(path, line, language, text)
    comment = COMMENT.match(above)
    if not comment:
        raise ValueError(f"{path}:{line}: a mark reads `<!-- example: KIND: reason -->`, not {above}")
    if comment["kind"] not in MARKS:
        raise ValueError(f"{path}:{line}: marks are {', '.join(MARKS)}, not {comment['kind']!r}")
    return Block(path, line, language, text, comment["kind"], comment["reason"])


def all_blocks() -> list[Block]:
    return [block for path in documents() for block in blocks(path)]
