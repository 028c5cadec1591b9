"""Runs the examples that are marked `gpu`, on a CUDA device, and counts the launches that docs/FORWARD.md tells.

`tests/docs/run.sh --gpu BINARY MODEL.gguf` calls it. Standard library only, and no repository but its documents: so it
runs on a machine to which a binary and a model were carried. It fails where there is no device.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

import examples
import runner
from examples import ROOT, Block


def run(block: Block, timeout: float = 540) -> str:
    """Runs a block in a directory of its own; what it says, or the end of the script."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        runner.prepare(work)
        done = runner.run_shell(block, work, None, timeout)
        log = (work / "server.log").read_text() if (work / "server.log").exists() else ""
        if done.returncode != 0:
            sys.exit(f"{block}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{log}")
        for trace in work.glob("*.json"):
            events = json.loads(trace.read_text())
            assert events, f"{block}: {trace.name} is empty"
            print(f"{trace.name}: {trace.stat().st_size} bytes")
        return done.stdout + done.stderr + log


def launches_of_a_step(backend: str = "cuda") -> tuple[float, float]:
    """Launches and waits of a step of one decoding sequence, from two requests of different length."""
    ask = (
        "curl http://127.0.0.1:58439/v1/completions -H 'content-type: application/json' -o /dev/null -d "
        """'{"prompt": "Once upon a time, there was", "temperature": 0, "max_tokens": %d}'\n"""
        "echo; curl http://127.0.0.1:58439/metrics | grep -E '^m40llm_(steps|kernel_launches|device_syncs)_total'\n"
    )
    start = f"m40llm run model.gguf --ctx-size 512 --backend {backend} --prefix-cache off\n"
    said = run(Block(ROOT / "docs/FORWARD.md", 0, "sh", start + ask % 20 + ask % 20 + ask % 70))
    found = [int(n) for n in re.findall(r"^m40llm_\w+_total (\d+)$", said, re.MULTILINE)]
    if len(found) != 9:
        sys.exit(f"counters of three requests were expected:\n{said}")
    names = re.findall(r"^m40llm_(\w+)_total \d+$", said, re.MULTILINE)[:3]
    first, second, third = (dict(zip(names, found[i : i + 3])) for i in (0, 3, 6))
    # The second request against the third: both have found every graph made, and differ by 50 steps.
    steps = {name: (third[name] - second[name]) - (second[name] - first[name]) for name in names}
    if steps["steps"] != 50:
        sys.exit(f"50 steps more were expected: {steps}")
    return steps["kernel_launches"] / 50, steps["device_syncs"] / 50


def main() -> None:
    devices = run(Block(ROOT / "docs/device_selection.md", 0, "sh", "m40llm devices --json\n"))
    if not json.loads(devices)["devices"]:
        sys.exit(f"no CUDA device: {devices}")
    marked = [block for block in examples.all_blocks() if block.mark == "gpu"]
    assert marked, "nothing is marked gpu"
    for block in marked:
        print(f"=== {block}: {block.reason}\n{block.text}", flush=True)
        print(run(block), flush=True)
    text = (ROOT / "docs/FORWARD.md").read_text()
    told = int(re.search(r"^\| decode, 1 to 8 sequences .*\| (\d+) \|$", text, re.MULTILINE)[1])
    launches, waits = launches_of_a_step()
    print(f"a step of one sequence: {launches} launches ({told} are told), {waits} waits")
    if "smollm2-135m" in runner.MODEL.name and "q4_1" in runner.MODEL.name and launches != told:
        sys.exit(f"docs/FORWARD.md tells {told} launches a step; there were {launches}")
    print(f"{len(marked)} examples ran")


if __name__ == "__main__":
    main()
