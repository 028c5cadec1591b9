#!/usr/bin/env python3
"""Speed and memory beside llama.cpp's, in one run on one machine, repeatable by anybody.

usage: scripts/bench-peer.py [MODEL.gguf ...]   (no model: the two demo models, and SmolLM2 as Q8_0 and F16)

Both programs measure in turns (A B A B ...), each in an own process with a warm-up, and the table shows
medians. llama.cpp is the PyPI package llama-cpp-python, built for this machine into .venv-peer/ on the first
run, which takes some minutes. Then single streams through the server, each beside bench just before and just
after it, the server's peak memory, and eight streams at once beside llama.cpp's decode of one.
Run it on an idle machine: the two programs, and bench and server, do not lose alike on a busy core.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts" / "peer"), str(ROOT / "scripts" / "serving")]
import server_speed  # noqa: E402
from load import Ask, LoadedServer  # noqa: E402

PACKAGES = ["llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy"]
# What the project promises, as shares of llama.cpp's and of bench's own speed.
PROMPT_SHARE, DECODE_SHARE, SERVER_SHARE, STREAMS_SHARE = 0.5, 0.7, 0.85, 1.6
STREAMS = 8
MEMORY_SLACK = 200_000_000
# llama.cpp is built for what the compiler finds. Some virtual machines list AMX, and the kernel grants it, but it traps.
ILLEGAL = f"""llama.cpp met an instruction that this machine lists but does not run, most likely AMX in a virtual machine.
Build it without, and try again:
    flags="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
    CMAKE_ARGS="-DCMAKE_C_FLAGS='$flags' -DCMAKE_CXX_FLAGS='$flags'" \\
        .venv-peer/bin/pip install --force-reinstall --no-deps --no-cache-dir {PACKAGES[0]}"""


def clean_environment() -> dict[str, str]:
    """The caller's environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("M40LLM_")}


def output(*command: str, hint: str = "") -> str:
    """What a command prints; `hint` is added where it died of an instruction that the machine does not run."""
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=clean_environment())
    if done.returncode == -signal.SIGILL and hint:
        sys.exit(f"bench-peer: {hint}")
    if done.returncode != 0:
        sys.exit(f"bench-peer: exit {done.returncode} from: {' '.join(map(str, command))}")
    return done.stdout


def peer_python() -> Path:
    """The interpreter that has llama-cpp-python; made when it is not there."""
    python = ROOT / ".venv-peer" / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import llama_cpp, gguf"], stderr=subprocess.DEVNULL).returncode:
        print("building llama.cpp into .venv-peer/ (some minutes) ...", file=sys.stderr)
        output(sys.executable, "-m", "venv", str(ROOT / ".venv-peer"))
        output(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES)
    return python


def default_models(python: Path) -> list[Path]:
    fetched = [
        Path(output(str(ROOT / "scripts" / "fetch-model.sh"), name).split("\n")[-2]).resolve()
        for name in ("smollm2", "qwen2.5-coder-0.5b")
    ]
    for kind in ("Q8_0", "F16"):
        made = ROOT / "models" / f"smollm2-135m-instruct-{kind.lower()}.gguf"
        if not made.exists():
            output(str(python), str(ROOT / "scripts" / "peer" / "requantize.py"), str(fetched[0]), kind, str(made))
        fetched.append(made)
    return fetched


def ours(args, model: Path) -> dict:
    sizes = ["-p", str(args.prompt), "-n", str(args.decode), "-b", "1", "-r", "1", "--threads", str(args.threads)]
    report = json.loads(output(args.binary, "bench", str(model), *sizes, "--backend", "cpu", "--json"))
    speeds = {result["test"]: result["tokens_per_s"] for result in report["results"]}
    return {**speeds, "device": report["device"], "quant": report["quant"], "copy": report["copy_gb_per_s"]}


def theirs(args, model: Path, python: Path) -> dict:
    script = str(ROOT / "scripts" / "peer" / "llama_cpp_speed.py")
    sizes = ["--prompt", str(args.prompt), "--decode", str(args.decode), "--threads", str(args.threads)]
    return json.loads(output(str(python), script, str(model), *sizes, hint=ILLEGAL))


def compare(args, model: Path, python: Path) -> dict:
    """Both programs in turns; medians."""
    rounds = []
    for number in range(1, args.rounds + 1):
        rounds.append((ours(args, model), theirs(args, model, python)))
        print(f"{model.name}: round {number}/{args.rounds}", file=sys.stderr)
    middle = lambda side, test: statistics.median(pair[side][test] for pair in rounds)  # noqa: E731
    row = {"model": model.name, "file_bytes": model.stat().st_size, "quant": rounds[0][0]["quant"]}
    for test in ("prompt", "decode"):
        row[test] = {"ours": middle(0, test), "peer": middle(1, test)}
        row[test]["ratio"] = row[test]["ours"] / row[test]["peer"]
        row[test]["rounds"] = [[pair[0][test], pair[1][test]] for pair in rounds]
    row["device"], row["copy_gb_per_s"] = rounds[0][0]["device"], middle(0, "copy")
    row["peer_version"] = rounds[0][1]["version"]
    return row


def decode_alone(args, model: Path) -> float:
    """Bench's decode, nothing else measured."""
    sizes = ["-p", "0", "-n", str(args.decode), "-b", "1", "-r", "1", "--threads", str(args.threads)]
    report = json.loads(output(args.binary, "bench", str(model), *sizes, "--backend", "cpu", "--json"))
    return report["results"][0]["tokens_per_s"]


def through_the_server(args, model: Path) -> dict:
    """Pairs of bench's decode and a stream through one server, and the server's memory.

    The machine drifts from second to second, so the ratio is taken within each pair: a stream against the
    mean of bench just before and just after it. The median of the pairs counts; all of them are reported.
    """
    pairs = []
    with server_speed.StreamServer(args.binary, model, args.threads, clean_environment()) as server:
        before = decode_alone(args, model)
        for _ in range(args.pairs):
            served = server.stream(args.decode)
            after = decode_alone(args, model)
            pairs.append(((before + after) / 2, served))
            before = after
        memory = server.peak_bytes()
    plan = json.loads(output(args.binary, "inspect", str(model), "--json"))["memory"]
    kv = server_speed.CONTEXT * plan["kv_bytes_per_token"]["f16"]
    ratios = sorted(served / bench for bench, served in pairs)
    return {
        "bench": statistics.median(bench for bench, _ in pairs),
        "server": statistics.median(served for _, served in pairs),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "peak_bytes": memory,
        "kv_bytes": kv,
        "allowed_bytes": model.stat().st_size + kv + MEMORY_SLACK,
    }


def streams_at_once(args, model: Path, python: Path) -> dict:
    """Tokens a second of several streams through one server, prompts included, and of one in llama.cpp, in turns."""
    rounds = []
    with LoadedServer(args.binary, model, args.threads, clean_environment(), "--prefix-cache", "off") as server:
        asks = [Ask(server.prompt(24, number), args.decode) for number in range(STREAMS)]
        for _ in range(args.rounds):
            answers = server.run(asks)
            if not all(answer.finished for answer in answers):
                sys.exit(f"bench-peer: a stream did not end: {answers[0].complaint}")
            written = sum(answer.usage["completion_tokens"] for answer in answers)
            served = written / max(answer.times[-1] for answer in answers)
            rounds.append((served, theirs(args, model, python)["decode"]))
    ours, peer = (statistics.median(one[side] for one in rounds) for side in range(2))
    return {"ours": ours, "peer": peer, "ratio": ours / peer, "rounds": rounds}


def machine(args, rows: list[dict]) -> dict:
    cpu = platform.processor() or "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": args.threads,
        "m40llm": output(args.binary, "--version").strip(),
        "backend": rows[0]["device"],
        "llama_cpp_python": rows[0]["peer_version"],
        "copy_gb_per_s": rows[0]["copy_gb_per_s"],
        "load": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def markdown(facts: dict, args, rows: list[dict]) -> str:
    mark = lambda good: "" if good else " (below)"  # noqa: E731
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads, copy {facts['copy_gb_per_s']:.1f} GB/s; "
        f"{facts['m40llm']} ({facts['backend']}) beside llama-cpp-python {facts['llama_cpp_python']}; "
        f"medians of {args.rounds} rounds in turns; {facts['date']}.",
        "",
        f"| model | prompt {args.prompt}, t/s | llama.cpp | ratio | decode {args.decode}, t/s | llama.cpp | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row["model"]]
        for test, share in (("prompt", PROMPT_SHARE), ("decode", DECODE_SHARE)):
            one = row[test]
            cells += [f"{one['ours']:.1f}", f"{one['peer']:.1f}", f"{one['ratio']:.2f}{mark(one['ratio'] >= share)}"]
        lines.append("| " + " | ".join(cells) + " |")
    if any("server" in row for row in rows):
        lines += [
            "",
            f"{STREAMS} streams at once through the server, prompts included, beside one in llama.cpp; medians of {args.rounds} rounds.",
            "",
            "| model | through the server, t/s | llama.cpp's decode, t/s | ratio |",
            "| --- | ---: | ---: | ---: |",
        ]
        for row in rows:
            one = row["streams"]
            ratio = f"{one['ratio']:.2f}{mark(one['ratio'] >= STREAMS_SHARE)}"
            lines.append(f"| {row['model']} | {one['ours']:.0f} | {one['peer']:.0f} | {ratio} |")
        lines += [
            "",
            f"Bench beside one stream through the server: medians of {args.pairs} pairs.",
            "",
            "| model | bench decode, t/s | through the server, t/s | ratio | of the pairs | peak memory, MB | file + KV + 200 MB |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
    for row in rows:
        if one := row.get("server"):
            cells = [
                row["model"], f"{one['bench']:.1f}", f"{one['server']:.1f}",
                f"{one['ratio']:.2f}{mark(one['ratio'] >= SERVER_SHARE)}",
                f"{one['ratios'][0]:.2f} to {one['ratios'][-1]:.2f}",
                f"{one['peak_bytes'] / 1e6:.0f}{mark(one['peak_bytes'] <= one['allowed_bytes'])}".replace("below", "above"),
                f"{one['allowed_bytes'] / 1e6:.0f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def failures(rows: list[dict]) -> list[str]:
    missed = []
    for row in rows:
        for test, share in (("prompt", PROMPT_SHARE), ("decode", DECODE_SHARE)):
            if row[test]["ratio"] < share:
                missed.append(f"{row['model']}: {test} {row[test]['ratio']:.2f} of llama.cpp's, wanted {share}")
        if one := row.get("streams"):
            if one["ratio"] < STREAMS_SHARE:
                missed.append(f"{row['model']}: {STREAMS} streams reach {one['ratio']:.2f} of llama.cpp's one, wanted {STREAMS_SHARE}")
        if one := row.get("server"):
            if one["ratio"] < SERVER_SHARE:
                missed.append(f"{row['model']}: the server keeps {one['ratio']:.2f} of bench's decode, wanted {SERVER_SHARE}")
            if one["peak_bytes"] > one["allowed_bytes"]:
                missed.append(f"{row['model']}: peak memory {one['peak_bytes']} of {one['allowed_bytes']} bytes allowed")
    return missed


def arguments() -> argparse.Namespace:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--binary", default=str(target / "release" / "m40llm"))
    parser.add_argument("--python", type=Path, help="an interpreter that has llama-cpp-python and gguf already")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=7, help="bench and a stream through the server, in turns")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=128)
    parser.add_argument("--no-server", action="store_true", help="leave the streams through the server out")
    parser.add_argument("--check", action="store_true", help="exit 1 when a promised figure is missed")
    parser.add_argument("--out", type=Path, help="also write the table (.md) or the figures (.json) here")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not Path(args.binary).exists():
        sys.exit(f"bench-peer: no {args.binary}; build it with: cargo build --release -p m40llm")
    python = args.python or peer_python()
    models = [model.resolve() for model in args.models] or default_models(python)
    rows = []
    for model in models:
        row = compare(args, model, python)
        if not args.no_server:
            row["server"] = through_the_server(args, model)
            row["streams"] = streams_at_once(args, model, python)
        rows.append(row)
    facts = machine(args, rows)
    table = markdown(facts, args, rows)
    print(table, end="")
    if args.out and args.out.suffix == ".json":
        args.out.write_text(json.dumps({"machine": facts, "results": rows}, indent=2) + "\n")
    elif args.out:
        args.out.write_text(table)
    missed = failures(rows)
    for line in missed:
        print("missed: " + line, file=sys.stderr)
    if missed and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
