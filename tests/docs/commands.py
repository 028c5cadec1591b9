"""Whether a command line names what there is: m40llm's commands and flags, the Makefile's targets, the repository's scripts.

For lines that are not run: marked examples, and commands within sentences.
"""

from __future__ import annotations

import functools
import re
import shlex
import subprocess

import runner
from examples import ROOT

# Words that stand for something of the reader's own.
PLACEHOLDERS = re.compile(r"^(…|\.\.\.|\$@)$")


@functools.cache
def flags_of(command: tuple[str, ...]) -> frozenset[str]:
    """The flags in a command's help; an AssertionError where there is no such command."""
    done = subprocess.run([runner.BINARY, *command, "--help"], text=True, capture_output=True)
    assert done.returncode == 0, f"m40llm {' '.join(command)}: {done.stderr}"
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", done.stdout))


@functools.cache
def subcommands_of(*command: str) -> frozenset[str]:
    done = subprocess.run([runner.BINARY, *command, "--help"], text=True, capture_output=True)
    if "Commands:" not in done.stdout:
        return frozenset()
    listed = done.stdout.split("Commands:", 1)[1].split("\n\n", 1)[0]
    return frozenset(re.findall(r"^ {2}([a-z-]+)", listed, re.MULTILINE))


@functools.cache
def targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_m40llm(words: list[str]) -> None:
    words = [word for word in words if not PLACEHOLDERS.match(word)]
    if not words or words[0] == "COMMAND":
        return
    command: tuple[str, ...] = (words[0],)
    if words[0].startswith("-"):
        command = ()
    elif subcommands_of(words[0]) and len(words) > 1 and not words[1].startswith("-"):
        command = (words[0], words[1])
    known = flags_of(command)
    for word in words[len(command) :]:
        flag = word.split("=", 1)[0]
        if re.match(r"^--?[a-z]", flag):
            assert flag in known, f"m40llm {' '.join(command)} has no {flag}"


def check_make(words: list[str]) -> None:
    for word in words:
        if not word.startswith("-") and "=" not in word:
            assert word in targets(), f"the Makefile has no target {word}"


def check_text(text: str) -> None:
    """Each line of a script, those that go on in the next one together."""
    for line in text.replace("\\\n", " ").splitlines():
        check_line(line)


def check_line(line: str) -> None:
    """Each of the commands in a line of shell."""
    line = re.sub(r"\$\(|`", " ; ", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";|&()<>")
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:
        # A string that goes on in the next line: what comes before it is looked at.
        words = line.split("'")[0].split('"')[0].split()
    command: list[str] = []
    for word in [*words, ";"]:
        if set(word) <= set(";|&()<>"):
            check_command(command)
            command = []
        else:
            command.append(word)


def check_command(words: list[str]) -> None:
    while words and re.match(r"^([A-Z_0-9]+=|exec$)", words[0]):
        words = words[1:]
    if not words:
        return
    if words[0] == "make":
        check_make(words[1:])
    elif words[0].startswith(("scripts/", "tests/")):
        assert (ROOT / words[0]).is_file(), f"there is no {words[0]}"
    # Also as what another program runs: `docker compose run m40llm keys create`.
    known = [[command] for command in subcommands_of()]
    for at, word in enumerate(words):
        if word in ("m40llm", "/usr/local/bin/m40llm") and (at == 0 or words[at + 1 : at + 2] in known):
            check_m40llm(words[at + 1 :])
            return
