"""Commands within sentences and tables name what there is; those of the README's table do what it says."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import commands
import examples
import runner
from examples import ROOT, Block

# A command between backticks: more than its program's name.
INLINE = re.compile(r"(?<!`)`((?:m40llm|make|scripts/|tests/)[^`\n]*?)`(?!`)")


def inline_commands() -> list[tuple[str, str]]:
    found = []
    for path in examples.documents():
        fenced = False
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if line.lstrip().startswith("```"):
                fenced = not fenced
            elif not fenced:
                place = f"{path.relative_to(ROOT)}:{number}"
                found += [(place, command) for command in INLINE.findall(line)]
    return found


def test_inline_commands_are_there() -> None:
    found = inline_commands()
    assert len(found) > 40, found
    for place, command in found:
        # `m40llm bench`, in a table of names `m40llm_…`, is a command; `m40llm.toml` is a file.
        if re.match(r"(m40llm|make)( |$)|(scripts|tests)/[\w./-]+\.(sh|py)", command):
            try:
                commands.check_line(command.replace("\\|", "|"))
            except AssertionError as error:
                pytest.fail(f"{place}: `{command}`: {error}")


def test_what_is_not_there_is_seen() -> None:
    for bad in ["m40llm serve x", "m40llm run m.gguf --port 1", "m40llm keys make", "make nothing", "scripts/no.sh",
                "docker run x m40llm run --nothing", "systemd-run --pipe /usr/local/bin/m40llm keys create --nothing"]:
        with pytest.raises(AssertionError):
            commands.check_line(bad)
    for good in ["m40llm run m.gguf --addr 0.0.0.0:1", "KEY=$(m40llm keys create --name x)", "make test && make lint"]:
        commands.check_line(good)


# How each command of the README's table is tried, where it is not as it stands: what it is given, and what it ends with.
TRIED = {
    "m40llm pull OWNER/REPO:QUANT": ("m40llm pull owner/repo:Q8_0", 1, "HF_ENDPOINT=http://127.0.0.1:9"),
    "m40llm keys create --name NAME": ("m40llm keys create --name me", 0, ""),
    "m40llm bench MODEL.gguf": ("m40llm bench model.gguf -p 16 -n 4 -r 1 --ctx-size 128", 0, ""),
    "m40llm chat MODEL.gguf": ("echo Hi | m40llm chat model.gguf --ctx-size 64", 0, ""),
    'm40llm generate MODEL.gguf "PROMPT"': ('m40llm generate model.gguf "Hi" --max-tokens 4', 0, ""),
    "m40llm health": ("m40llm run model.gguf --ctx-size 128\nm40llm health", 0, ""),
}


def readme_table() -> list[str]:
    text = (ROOT / "README.md").read_text().split("## The binary", 1)[1].split("\n## ", 1)[0]
    rows = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    return [command for row in rows for command in re.findall(r"`(m40llm [^`]+)`", row)]


@pytest.mark.parametrize("command", readme_table())
def test_readmes_commands(command: str, work: Path) -> None:
    text, code, setting = TRIED.get(command, (command.replace("MODEL.gguf", "model.gguf"), 0, ""))
    if setting:
        text = f"export {setting}\n{text}"
    if command.startswith("m40llm run"):
        text += " --ctx-size 128\ncurl http://127.0.0.1:58439/health\n"
    done = runner.run_shell(Block(ROOT / "README.md", 1, "sh", text), work, None)
    assert done.returncode == code, f"{text}\n{done.stdout}\n{done.stderr}"
    if code == 0 and "health" not in command:
        assert done.stdout.strip(), f"{text} says nothing"


def test_the_readme_names_every_command() -> None:
    help = subprocess.run([runner.BINARY, "--help"], text=True, capture_output=True, check=True).stdout
    listed = re.findall(r"^ {2}([a-z]+) ", help.split("Commands:", 1)[1].split("\n\n", 1)[0], re.MULTILINE)
    named = {command.split()[1] for command in readme_table()}
    assert set(listed) - {"help"} == named


def numbers(text: str) -> list[str]:
    return re.findall(r"\d[\d.,]*\d|\d", text)


def tables(path: Path) -> list[list[str]]:
    lines = path.read_text().splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_readmes_figures_are_those_of_the_measurements() -> None:
    text = (ROOT / "README.md").read_text().split("## How fast", 1)[1].split("\n## ", 1)[0]
    measured = "".join(path.read_text() for path in (ROOT / "docs").glob("PERFORMANCE*.md"))
    rows = [line for line in text.splitlines() if line.startswith("| ") and numbers(line.split("|", 2)[2])]
    assert len(rows) >= 3, rows
    known = set(numbers(measured))
    for row in rows:
        for number in numbers(row.split("|", 2)[2]):
            assert number in known, f"{number} of the README is in no docs/PERFORMANCE*.md: {row}"


def test_sizes_of_keys_and_values() -> None:
    """The table of docs/KV_CACHE.md against its own formula, and the demo model's against what the binary says."""
    rows = [row for row in tables(ROOT / "docs/KV_CACHE.md") if len(row) == 8 and row[1].isdigit()]
    assert len(rows) == 8
    for name, *cells in rows:
        layers, heads, width, f16, q8, f32, megabytes = map(int, cells)
        times = 2 * layers * heads
        scales = 2 * ((width + 31) // 32)
        assert (f16, q8, f32) == (times * 2 * width, times * (width + scales), times * 4 * width), name
        assert megabytes == round(8192 * f16 / 1e6), name
    report = subprocess.run([runner.BINARY, "inspect", runner.MODEL, "--json"], text=True, capture_output=True, check=True)
    sizes = json.loads(report.stdout)["memory"]["kv_bytes_per_token"]
    assert [str(sizes["f16"]), str(sizes["q8"])] in [row[4:6] for row in rows], sizes
