#!/usr/bin/env python3
"""The engine's speed on a CUDA device: every figure of docs/PERFORMANCE.md's table, in one run on one machine.

usage: scripts/bench-report.py [--check] [--only NAME,...] [--json FILE] [--chart FILE.svg] [--page FILE.md]
       scripts/bench-report.py --from FILE.json [FILE.json ...] [--check] [--json FILE] [--chart FILE.svg] [--page FILE.md]

Calls `m40llm bench` on random weights in the dimensions of known models, whole models with sampling included, and prints Markdown:
what is bounded beside its bound, llama.cpp's figures and a modelled Tesla M40; decoding by batch; the runs' commands. --json
writes what bench printed after each call; --from makes tables and chart of such files instead of measuring, where
a later file's figures go before an earlier one's. Modelled figures need the kernels' machine code: without nvdisasm
(scripts/cuda-toolchain.sh disassembler) they are left out. Use a device that nobody else uses.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from report import chart, figures, tables

ROOT = Path(__file__).resolve().parent.parent
BATCHES = ",".join(map(str, range(1, 33)))
SHAPES = {"8b": "llama3-8b", "70b": "llama3-70b-16l"}

# What bench is called with, by a name for --only. Runs that a table cannot do without come first.
RUNS = {
    "8b-q4_k_m": ("8b", "q4_k_m", ["-p", "0", "-n", "24", "-b", BATCHES]),
    "8b-q8_0": ("8b", "q8_0", ["-p", "0", "-n", "24", "-b", BATCHES]),
    "8b-f16": ("8b", "f16", ["-p", "0", "-n", "24", "-b", BATCHES]),
    **{f"8b-{kind.lower()}": ("8b", kind.lower(), ["-p", "0", "-n", "12", "-b", BATCHES]) for kind in figures.SWEPT[3:]},
    "70b-q4_k_m": ("70b", "q4_k_m", ["-p", "0", "-n", "24", "-b", "1,8,16,32"]),
    "70b-q8_0": ("70b", "q8_0", ["-p", "0", "-n", "24", "-b", "1"]),
    "70b-f16": ("70b", "f16", ["-p", "0", "-n", "24", "-b", "1"]),
    "prompt-f16": ("8b", "f16", ["-p", "512", "-n", "0", "-b", "1"]),
    "prompt-q8_0": ("8b", "q8_0", ["-p", "512", "-n", "0", "-b", "1"]),
    "prompt-q4_k_m": ("8b", "q4_k_m", ["-p", "512", "-n", "0", "-b", "1"]),
    "deep-q4_k_m": ("8b", "q4_k_m", ["-p", "0", "-n", "24", "-b", "1", "--depth", "8192"]),
}


def measure(args: argparse.Namespace) -> dict:
    """All runs; what there is so far is written after each."""
    found = {"machine": machine(args), "runs": []}
    for name in args.only:
        shape, quant, flags = RUNS[name]
        command = ["bench", "--shape", SHAPES[shape], "--quant", quant, *flags, "-r", str(args.repetitions)]
        began = time.monotonic()
        printed = output(args.binary, *command, "--json", "--backend", args.backend)
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr)
        found["runs"].append({"command": " ".join(["m40llm", *command]), "report": json.loads(printed)})
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n")
    return found


def machine(args: argparse.Namespace) -> dict:
    facts = {"date": datetime.date.today().isoformat(), "version": output(args.binary, "--version").strip()}
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        facts["driver"] = subprocess.run(query, stdout=subprocess.PIPE, text=True, check=True).stdout.split(",")[-1].strip()
    except (OSError, subprocess.CalledProcessError):
        facts["driver"] = None
    return facts


def output(*command: str) -> str:
    """What a command prints, in the caller's environment without settings of ours."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("M40LLM_")}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"bench-report: exit {done.returncode} from: {' '.join(command)}")
    return done.stdout


def merged(files: list[Path]) -> dict:
    """Runs of several files; the machine is the last file's, and must be that of all."""
    loaded = [json.loads(file.read_text()) for file in files]
    runs = [run for one in loaded for run in one["runs"]]
    if len(devices := {run["report"]["device"] for run in runs}) > 1:
        sys.exit(f"bench-report: these files are of several devices: {', '.join(sorted(devices))}")
    return {"machine": loaded[-1]["machine"], "runs": runs}


def modelled() -> tuple[dict, str]:
    """Tokens a second of a Tesla M40 by its model, and a table; nothing where the machine code cannot be read."""
    import sass_report

    if not sass_report.NVDISASM.exists():
        print("bench-report: no nvdisasm, so nothing is modelled", file=sys.stderr)
        return {}, ""
    return sass_report.modelled()


def arguments() -> argparse.Namespace:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--binary", default=str(target / "release" / "m40llm"))
    parser.add_argument("--backend", default="cuda", help="what bench runs on (cuda)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="how often each test is measured (3)")
    parser.add_argument("--only", type=lambda names: names.split(","), default=list(RUNS), metavar="NAME,...",
                        help="some of: " + ", ".join(RUNS))  # fmt: skip
    parser.add_argument("--from", dest="files", nargs="+", type=Path, metavar="FILE.json", help="measure nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="also draw decoding by batch here")
    parser.add_argument("--page", type=Path, metavar="FILE.md", help="also put the tables between the marks of this page")
    parser.add_argument("--check", action="store_true", help="exit 1 when a bound is missed, or not measured")
    args = parser.parse_args()
    if unknown := set(args.only) - set(RUNS):
        parser.error(f"--only: no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    return args


def main() -> None:
    args = arguments()
    if not args.files and not Path(args.binary).exists():
        sys.exit(f"bench-report: no {args.binary}; build it with: cargo build --release -p m40llm --features cuda")
    found = merged(args.files) if args.files else measure(args)
    if args.files and args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
    speeds = figures.Speeds(found["runs"])
    goals = figures.judged(speeds)
    on_m40, model_table = modelled()
    text = tables.markdown(found, speeds, goals, on_m40)
    print(text, end="")
    if args.page:
        page = tables.replaced(args.page.read_text(), "measured", text)
        if model_table:
            page = tables.replaced(page, "modelled", model_table)
        args.page.write_text(page)
    if args.chart:
        args.chart.write_text(chart.draw(speeds, f"{speeds.device}, {found['machine']['date']}"))
    missed = [line for line in map(tables.missed, goals) if line]
    for line in missed:
        print("missed: " + line, file=sys.stderr)
    if missed and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
