"""The table of docs/CONFIGURATION.md against the binary's own help."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache

import pytest

import runner
from examples import ROOT


@dataclass(frozen=True)
class Setting:
    flag: str
    variable: str
    default: str
    commands: tuple[str, ...]


def settings() -> list[Setting]:
    text = (ROOT / "docs/CONFIGURATION.md").read_text().split("## Settings", 1)[1].split("\n## ", 1)[0]
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if (flag := re.match(r"\| `([a-z0-9-]+)`", line)) and len(cells) == 5:
            variable = re.match(r"`(M40LLM_[A-Z0-9_]+)`", cells[1])[1]
            # "run; on generate the flag only", "run, health by flag or variable": commands are words that the binary knows.
            commands = tuple(word for word in re.findall(r"[a-z]+", cells[4]) if word in options())
            found.append(Setting(flag[1], variable, cells[2], commands))
    return found


@cache
def options() -> dict[str, dict[str, str]]:
    """Of each command its options, with what the help says of them."""
    return {name: options_of([name]) for name in ["run", "health", "generate", "chat", "bench"]} | {
        "keys": options_of(["keys", "create"]) | options_of(["keys", "list"])
    }


def options_of(command: list[str]) -> dict[str, str]:
    help = subprocess.run([runner.BINARY, *command, "--help"], text=True, capture_output=True, check=True).stdout
    parts = re.split(r"^ +(?:-\w, )?--([a-z0-9-]+)", help, flags=re.MULTILINE)[1:]
    return {name: " ".join(words.split()) for name, words in zip(parts[::2], parts[1::2])}


def test_every_flag_of_the_server_is_in_the_table() -> None:
    named = {setting.flag for setting in settings()}
    assert set(options()["run"]) - {"help"} == named
    assert len(named) > 30


@pytest.mark.parametrize("setting", settings(), ids=lambda setting: setting.flag)
def test_a_setting_is_as_the_table_says(setting: Setting) -> None:
    assert setting.variable == "M40LLM_" + setting.flag.upper().replace("-", "_")
    assert setting.commands
    for command in setting.commands:
        assert setting.flag in options()[command], f"m40llm {command} has no --{setting.flag}"
    for command in set(options()) - set(setting.commands):
        assert setting.flag not in options()[command], f"m40llm {command} has --{setting.flag} too"
    told = re.search(r"\[default: ([^\]]+)\]", options()[setting.commands[0]][setting.flag])
    plain = re.fullmatch(r"`([^`]+)`", setting.default)
    # The help need not say of a switch that it is off.
    if plain and not (plain[1] == "false" and not told):
        assert told and told[1] == plain[1], f"the help says {told}"
