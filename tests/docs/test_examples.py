"""Every example of the documentation works, or says why it is not run here."""

from __future__ import annotations

import configparser
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import commands
import examples
import gpu
import runner
from examples import ROOT, Block

BLOCKS = examples.all_blocks()
SHELL = [b for b in BLOCKS if b.language == "sh"]


def of(language: str) -> list[Block]:
    return [b for b in BLOCKS if b.language == language and not b.mark and not b.is_output]


def names(block: Block) -> str:
    return str(block)


def said(done: subprocess.CompletedProcess[str]) -> str:
    return f"exit code {done.returncode}\n--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}"


def output_below(block: Block) -> Block | None:
    """The block that shows what this one prints."""
    later = [b for b in BLOCKS if b.path == block.path and b.line > block.line]
    return later[0] if later and later[0].is_output else None


def assert_like(found: object, shown: object, place: str = "the output") -> None:
    """Of the same types, objects with the same keys; of a list, each entry like the first one shown."""
    assert type(found) is type(shown), f"{place} is {found!r}, shown as {shown!r}"
    if isinstance(shown, dict):
        assert found.keys() == shown.keys(), place
        for key in shown:
            assert_like(found[key], shown[key], f"{place}.{key}")
    if isinstance(shown, list) and shown:
        assert found, f"{place} is empty"
        for i, entry in enumerate(found):
            assert_like(entry, shown[0], f"{place}[{i}]")


def check_output(block: Block, found: str) -> None:
    shown = output_below(block)
    if shown and shown.language == "json":
        assert_like(json.loads(found), json.loads(shown.text))
    elif shown:
        pattern = re.escape(shown.text.strip()).replace("…", ".*")
        assert re.fullmatch(pattern, found.strip(), re.DOTALL), f"{found}\nis not\n{shown.text}"


def is_run(block: Block) -> bool:
    return not block.is_output and (not block.mark or (block.mark == "slow" and runner.FULL))


@pytest.mark.parametrize("block", list(filter(is_run, SHELL)), ids=names)
def test_shell(block: Block, work: Path, port: int) -> None:
    done = runner.run_shell(block, work, port, timeout=3600 if runner.FULL else 120)
    assert done.returncode == 0, said(done)
    check_output(block, done.stdout)
    if re.match(r"curl ", block.text) and done.stdout.startswith("{"):
        assert "error" not in json.loads(done.stdout), done.stdout


@pytest.mark.parametrize("block", of("python"), ids=names)
def test_python(block: Block, work: Path, port: int) -> None:
    done = runner.run_python(block, work, port)
    assert done.returncode == 0 and done.stdout.strip(), said(done)
    check_output(block, done.stdout)


@pytest.mark.parametrize("block", of("c"), ids=names)
def test_c_compiles(block: Block, work: Path) -> None:
    # What is no program is an expression.
    text = block.text if "main(" in block.text else f"const char *example(void) {{ return\n{block.text};}}\n"
    (work / "example.c").write_text(text)
    warnings = ["-std=gnu11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command = ["cc", *warnings, "-I", ROOT / "engine/include", "-c", "example.c", "-o", "example.o"]
    done = subprocess.run(command, cwd=work, text=True, capture_output=True)
    assert done.returncode == 0, said(done)


@pytest.mark.parametrize("block", of("toml"), ids=names)
def test_configuration_is_served(block: Block, work: Path, port: int) -> None:
    settings = tomllib.loads(block.text)
    free = runner.free_port()
    (work / "m40llm.toml").write_text(block.text.replace(settings["addr"], f"127.0.0.1:{free}"))
    script = f"m40llm run model.gguf --config m40llm.toml\ncurl http://{settings['addr']}/v1/models\n"
    script = script.replace(settings["addr"], "127.0.0.1:58439")
    # The file's address must be the one that counts, so the environment has none.
    served = Block(block.path, block.line, "sh", f"unset M40LLM_ADDR\n{script}")
    done = runner.run_shell(served, work, None, port=free)
    assert done.returncode == 0, said(done)
    (model,) = json.loads(done.stdout)["data"]
    assert model["id"] == settings["model-alias"]
    assert model["meta"]["context_length"] == settings["ctx-size"], model


def test_json_and_yaml_are_what_they_say() -> None:
    for block in BLOCKS:
        if block.language == "json":
            json.loads(block.text)
        if block.language == "yaml":
            assert isinstance(yaml.safe_load(block.text), dict), block


@pytest.mark.parametrize("block", of("ini"), ids=names)
def test_units_run_what_there_is(block: Block) -> None:
    # systemd allows a name to come twice, which replaces or adds to it.
    unit = configparser.RawConfigParser(strict=False, comment_prefixes=("#",))
    unit.read_string(block.text)
    assert unit.sections()
    lines = re.findall(r"m40llm (?:run|health|keys)\b[^;'\n]*", block.text)
    for line in lines:
        commands.check_line(line.strip())
    for name in re.findall(r"\bM40LLM_[A-Z0-9_]+", block.text):
        assert f"`{name}`" in (ROOT / "docs/CONFIGURATION.md").read_text(), f"{name} is no setting"


@pytest.mark.parametrize("block", [b for b in SHELL if b.mark], ids=names)
def test_what_is_not_run_is_there(block: Block) -> None:
    """Shell that bash reads, commands and flags that the binary has, targets that make knows."""
    done = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert done.returncode == 0, said(done)
    commands.check_text(block.text)


def test_stand_ins_do_for_the_examples(work: Path, port: int) -> None:
    """Where there is no curl or no openssl: the same examples, with what stands in for them first on the path."""
    for tool in ["curl", "openssl"]:
        (work / "bin" / tool).symlink_to(runner.STAND_INS / tool)
    for name, part in [("docs/TRANSPORT.md", "openssl req"), ("docs/FORWARD.md", "curl -s")]:
        block = next(b for b in SHELL if b.path == ROOT / name and part in b.text)
        done = runner.run_shell(block, work, port)
        assert done.returncode == 0 and done.stdout.strip(), said(done)
    block = Block(ROOT / "docs/x.md", 1, "sh", "curl -s http://127.0.0.1:58439/v1/nothing\n")
    done = runner.run_shell(block, work, port)
    assert done.returncode == 22 and json.loads(done.stdout)["error"], said(done)


def test_a_block_is_run_or_says_why_not() -> None:
    path = ROOT / "docs/x.md"
    good = "<!-- example: gpu: wants one -->\n```sh\na\n```\n\n```json\n{}\n```\n"
    assert [b.mark for b in examples.blocks(path, good)] == ["gpu", None]
    for bad, words in [
        ("```\na\n```\n", "language"),
        ("```bash\na\n```\n", "language"),
        ("<!-- example: gpu -->\n```sh\na\n```\n", "a mark reads"),
        ("<!-- example: later: no time -->\n```sh\na\n```\n", "marks are"),
        ("<!-- example: gpu: wants one -->\n\n```sh\na\n```\n", "without a block"),
        ("<!-- example: gpu: wants one -->\n", "without a block"),
        ("```sh\na\n", "does not end"),
    ]:
        with pytest.raises(ValueError, match=words):
            examples.blocks(path, bad)


def test_output_is_held_to_what_is_shown() -> None:
    assert_like({"a": [{"b": 1}, {"b": 2}]}, {"a": [{"b": 3}]})
    for wrong in [{"a": []}, {"a": [{"b": "1"}]}, {"a": [{"b": 1, "c": 2}]}, {}]:
        with pytest.raises(AssertionError):
            assert_like(wrong, {"a": [{"b": 3}]})


def test_a_failing_example_fails(work: Path) -> None:
    for text in [
        "false\ntrue\n",
        "m40llm run missing.gguf\n",
        "m40llm run model.gguf --ctx-size 512\nkill -9 $server\n",
        "m40llm run model.gguf --ctx-size 512\ncurl http://127.0.0.1:58439/v1/nothing\n",
    ]:
        block = Block(ROOT / "docs/x.md", 1, "sh", text)
        inner = work / str(len(text))
        inner.mkdir()
        runner.prepare(inner)
        assert runner.run_shell(block, inner, None).returncode != 0, text


def test_launches_are_counted_by_step() -> None:
    """What `run.sh --gpu` counts with: fifty steps between two requests. A CPU launches nothing."""
    assert gpu.launches_of_a_step("cpu") == (0, 0)


def test_what_wants_a_device_is_marked_and_nothing_else() -> None:
    """Without a device, an example that asks for one by name could not have run here."""
    for block in SHELL:
        asks = re.search(r"--(shape|per-kernel|trace-kernels|require-sm52)|--backend[ =]cuda", block.text)
        assert (block.mark == "gpu") == bool(asks), block
