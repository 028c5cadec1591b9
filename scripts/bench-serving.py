#!/usr/bin/env python3
"""What callers who share one server notice of each other, in one run on one machine, repeatable by anybody.

usage: scripts/bench-serving.py [--check] [--quick] [--only PART,...] [--json FILE] [--chart FILE.svg] [MODEL.gguf]

Real servers (`m40llm run`, no model: the demo model SmolLM2) on free loopback ports, a client on the same machine
that streams and stamps every read. The parts, of which --only picks some:

  throughput  16 prompts one after the other, in eights and all at once: tokens a second from the first request to
              the last token; every text equal to the sequential one
  long        a 3,000-token prompt that comes to six running streams: the streams' gaps between texts from its
              arrival to its first token, beside their median in the two seconds before; its time to first token (TTFT)
              beside that alone
  prefix      two prompts with 1,000 tokens in common, one after the other: cached tokens, and the second's TTFT
  memory      the 16 streams with a quarter of the KV blocks that they want: how they end, preemptions, texts beside
              those of the same streams one after the other
  fairness    one key's request beside 50 of another key's: its TTFT beside that alone
  soak        5,000 short requests of ever other prompts: resident memory after them, beside that after 500
  open_loop   Poisson arrivals at several rates, prompts and outputs of many lengths, whether or not earlier ones are
              done: percentiles of TTFT and gaps, and goodput, the requests a second that met both limits below

Where something is measured several times the median is judged, but of gaps the longest of all. TTFT counts from when a
request was due. Run it on an idle machine.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts" / "serving"))
import chart  # noqa: E402
from load import Answer, Ask, LoadedServer  # noqa: E402

BLOCK = 32
# Goodput: a request counts when its first token came within the one, and its longest gap within the other.
TTFT_LIMIT, GAP_LIMIT = 1.0, 0.25


class Sizes:
    """What a run of the promised size does; `quick` is a smoke test that judges nothing."""

    def __init__(self, quick: bool):
        self.rounds = 1 if quick else 3
        self.streams, self.written = (4, 80) if quick else (16, 128)
        self.beside, self.lead, self.long = (2, 0.5, 200) if quick else (6, 3.0, 3000)
        self.common = 96 if quick else 1000
        self.crowd, self.crowd_prompt, self.crowd_written = (4, 20, 40) if quick else (50, 200, 200)
        self.few, self.many = (20, 40) if quick else (500, 5000)
        self.rates, self.seconds = ((2.0,), 1.5) if quick else ((1.0, 2.0, 3.0, 4.0, 6.0, 8.0), 12.0)
        self.lengths, self.outputs = ((8, 40), (4, 8)) if quick else ((16, 512), (16, 128))


def percentile(values: list[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * int(share * 1000) // 1000) - 1)]


def whole(answers: list[Answer]) -> list[Answer]:
    for answer in answers:
        if answer.status != 200 or not answer.finished or not answer.times:
            sys.exit(f"bench-serving: an answer with status {answer.status} is not complete: {answer.complaint}")
    return answers


def throughput(sizes: Sizes, start) -> dict:
    """Tokens a second by streams at once, and how many texts differ from the sequential ones."""
    groups = (1, max(2, sizes.streams // 2), sizes.streams)
    speeds = {group: [] for group in groups}
    texts, different = [], 0
    # Nothing from an earlier round may be reused.
    with start("--prefix-cache", "off") as server:
        for _ in range(sizes.rounds):
            for group in groups:
                asks = stream_asks(server, sizes)
                answers, seconds = [], 0.0
                for at in range(0, len(asks), group):
                    together = whole(server.run(asks[at : at + group]))
                    seconds += max(answer.times[-1] for answer in together)
                    answers += together
                speeds[group].append(sum(answer.usage["completion_tokens"] for answer in answers) / seconds)
                texts = texts or [answer.text for answer in answers]
                different += sum(answer.text != text for answer, text in zip(answers, texts))
    middle = {group: statistics.median(found) for group, found in speeds.items()}
    ratios = {group: speed / middle[1] for group, speed in middle.items()}
    return {"tokens_per_s": middle, "ratios": ratios, "rounds": speeds, "different_texts": different}


def stream_asks(server: LoadedServer, sizes: Sizes) -> list[Ask]:
    return [Ask(server.prompt(24, f"stream {number}"), sizes.written) for number in range(sizes.streams)]


def memory(sizes: Sizes, start, bytes_per_token: int) -> dict:
    """The streams of `throughput` in a quarter of their blocks."""
    each = -(-(24 + sizes.written) // BLOCK)
    blocks = max(each, sizes.streams * each // 4)
    size = blocks * BLOCK * bytes_per_token
    with start("--kv-memory", str(size), "--ctx-size", str(each * BLOCK)) as server:
        texts = [whole(server.run([ask]))[0].text for ask in stream_asks(server, sizes)]
        pool, before = server.metric("m40llm_kv_blocks"), server.metric("m40llm_preemptions_total")
        answers = server.run(stream_asks(server, sizes))
        preemptions = server.metric("m40llm_preemptions_total") - before
    return {
        "blocks": pool,
        "wanted_blocks": sizes.streams * each,
        "preemptions": preemptions,
        "failed": sum(answer.status != 200 or not answer.finished for answer in answers),
        "different_texts": sum(answer.text != text for answer, text in zip(answers, texts)),
    }


def long_prompt(sizes: Sizes, server: LoadedServer) -> dict:
    rounds = []
    for number in range(sizes.rounds):
        alone = whole(server.run([Ask(server.prompt(sizes.long, f"alone {number}"), 2)]))[0]
        asks = [Ask(server.prompt(40, f"beside {number} {one}"), 2000) for one in range(sizes.beside)]
        asks.append(Ask(server.prompt(sizes.long, f"long {number}"), 2, due=sizes.lead))
        *streams, late = server.run(asks, until=sizes.beside)
        arrival, first = late.due, whole([late])[0].times[0]
        before = [gap for one in streams for gap in one.gaps(arrival - min(2.0, sizes.lead / 2), arrival)]
        during = [gap for one in streams for gap in one.gaps(arrival, first)]
        median = statistics.median(before)
        rounds.append({
            "median_before_s": median, "p99_s": percentile(during, 0.99), "p99_ratio": percentile(during, 0.99) / median,
            "max_s": max(during), "gaps": len(during), "ttft_alone_s": alone.ttft, "ttft_beside_s": late.ttft,
            "ttft_ratio": late.ttft / alone.ttft,
        })  # fmt: skip
    return {**medians(rounds), "max_s": max(one["max_s"] for one in rounds), "rounds": rounds}


def prefix(sizes: Sizes, server: LoadedServer) -> dict:
    rounds = []
    for number in range(sizes.rounds):
        common = server.prompt(sizes.common, f"common {number}")
        asks = [Ask(common + server.prompt(24, f"own {number} {own}"), 2) for own in range(2)]
        one, two = (whole(server.run([ask]))[0] for ask in asks)
        cached = two.usage["prompt_tokens_details"]["cached_tokens"]
        rounds.append({"cached": cached, "first_s": one.ttft, "second_s": two.ttft, "ttft_ratio": two.ttft / one.ttft})
    return {**medians(rounds), "cached": min(one["cached"] for one in rounds), "rounds": rounds}


def fairness(sizes: Sizes, server: LoadedServer) -> dict:
    """Singles one after another beside one crowd that never gets smaller than the batch."""
    single = lambda number, due=0.0: Ask(  # noqa: E731
        server.prompt(sizes.crowd_prompt, f"single {number} {due}"), 8, due, "second"
    )
    solo = [whole(server.run([single(number)]))[0].ttft for number in range(sizes.rounds)]
    asks = [Ask(server.prompt(sizes.crowd_prompt, f"crowd {one}"), sizes.crowd_written) for one in range(sizes.crowd)]
    asks += [single(number, sizes.lead / 2 * (number + 1)) for number in range(sizes.rounds)]
    answers = server.run(asks, until=sizes.crowd)
    crowd, singles = answers[: sizes.crowd], whole(answers[sizes.crowd :])
    for answer in crowd:
        # 0: it waits for its place still.
        if answer.status not in (0, 200):
            sys.exit(f"bench-serving: one of the crowd was answered {answer.status}: {answer.complaint}")
    base, rounds = statistics.median(solo), []
    for one in singles:
        step = statistics.median(gap for other in crowd for gap in other.gaps(one.due - 1.0, one.due) or [0.0])
        unfinished = sum(not other.finished or other.times[-1] > one.times[0] for other in crowd)
        rounds.append({"ttft_s": one.ttft, "step_s": step, "ttft_less_step_ratio": (one.ttft - step) / base,
                       "crowd_left": unfinished})  # fmt: skip
    return {**medians(rounds), "solo_s": base, "solos_s": solo, "rounds": rounds}


def soak(sizes: Sizes, server: LoadedServer) -> dict:
    """In waves that the queue can hold."""
    sizes_after, done = {}, 0
    for count in (sizes.few, sizes.many):
        while done < count:
            dice = random.Random(f"soak {done}")
            wave = range(done, min(done + 50, count))
            whole(server.run([Ask(server.prompt(dice.randint(8, 64), f"soak {one}"), 4) for one in wave]))
            done = wave.stop
        sizes_after[count] = server.bytes("VmRSS")
    few, many = sizes_after.values()
    return {"bytes": sizes_after, "ratio": many / few}


def open_loop(sizes: Sizes, server: LoadedServer) -> list[dict]:
    found = []
    for rate in sizes.rates:
        dice, asks, due = random.Random(f"open loop {rate}"), [], 0.0
        while (due := due + dice.expovariate(rate)) < sizes.seconds or not asks:
            # Lengths over several magnitudes, short ones as frequent as long ones.
            prompt, output = (round(low * (high / low) ** dice.random()) for low, high in (sizes.lengths, sizes.outputs))
            asks.append(Ask(server.prompt(prompt, f"{rate} {len(asks)}"), output, due, dice.choice(["first", "second"])))
        answers = whole(server.run(asks))
        gaps = [gap for answer in answers for gap in answer.gaps()]
        good = sum(answer.ttft <= TTFT_LIMIT and max(answer.gaps(), default=0.0) <= GAP_LIMIT for answer in answers)
        spread = lambda values: {name: percentile(values, share) for name, share in  # noqa: E731
                                 (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}  # fmt: skip
        found.append({
            "rate": rate, "requests": len(asks), "offered_per_s": len(asks) / sizes.seconds,
            "goodput_per_s": good / sizes.seconds, "ttft_s": spread([answer.ttft for answer in answers]),
            "gap_s": spread(gaps), "max_gap_s": max(gaps),
            "tokens_per_s": sum(answer.usage["completion_tokens"] for answer in answers)
            / max(answer.times[-1] for answer in answers),
        })  # fmt: skip
        print(f"open loop: {rate:g} a second done", file=sys.stderr)
    return found


# Those that share a server.
SHARING = {"long": long_prompt, "prefix": prefix, "fairness": fairness, "soak": soak, "open_loop": open_loop}
PARTS = ["throughput", "memory", *SHARING]


def medians(rounds: list[dict]) -> dict:
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}


def judged(results: dict) -> list[tuple[str, str, str, bool]]:
    """What was promised of the parts that were measured: name, figure, bound, whether it is kept."""
    rows = []
    if speed := results.get("throughput"):
        single, half, full = speed["ratios"]
        rows += [(f"{group} streams, tokens/s over those of one", speed["ratios"][group], ">=", bound, "{:.2f}")
                 for group, bound in ((half, 2.2), (full, 2.5))]  # fmt: skip
        rows.append(("texts unlike the sequential ones", speed["different_texts"], "<=", 0, "{:.0f}"))
    if late := results.get("long"):
        rows += [
            ("long prompt: streams' p99 gap over their median before", late["p99_ratio"], "<=", 4, "{:.2f}"),
            ("long prompt: streams' longest gap, ms", late["max_s"] * 1e3, "<=", 400, "{:.0f}"),
            ("long prompt: TTFT over that alone", late["ttft_ratio"], "<=", 1.8, "{:.2f}"),
        ]
    if shared := results.get("prefix"):
        rows += [
            ("common prefix: cached tokens", shared["cached"], ">=", 960, "{:.0f}"),
            ("common prefix: second TTFT over the first", shared["ttft_ratio"], "<=", 0.25, "{:.2f}"),
        ]
    if tight := results.get("memory"):
        rows += [
            ("quarter of the memory: failed requests", tight["failed"], "<=", 0, "{:.0f}"),
            ("quarter of the memory: texts unlike", tight["different_texts"], "<=", 0, "{:.0f}"),
            ("quarter of the memory: preemptions", tight["preemptions"], ">=", 1, "{:.0f}"),
        ]
    if fair := results.get("fairness"):
        rows.append(("one beside 50: TTFT less a step, over that alone", fair["ttft_less_step_ratio"], "<=", 2, "{:.2f}"))
    if after := results.get("soak"):
        few, many = after["bytes"]
        rows.append((f"memory after {many} requests over that after {few}", after["ratio"], "<=", 1.05, "{:.3f}"))
    return [(name, form.format(value), f"{sign} {bound}", value >= bound if sign == ">=" else value <= bound)
            for name, value, sign, bound, form in rows]  # fmt: skip


def markdown(results: dict) -> str:
    facts, said = results["machine"], []
    if speed := results.get("throughput"):
        said.append("Tokens a second: " + ", ".join(f"{value:.0f} with {group}" for group, value in speed["tokens_per_s"].items()) + ".")
    if late := results.get("long"):
        said.append(f"Long prompt: median gap before {late['median_before_s'] * 1e3:.1f} ms, p99 beside {late['p99_s'] * 1e3:.1f} ms, "
                    f"{', '.join(format(one['p99_ratio'], '.2f') for one in late['rounds'])} times that in the rounds; "
                    f"TTFT {late['ttft_alone_s']:.2f} s alone, {late['ttft_beside_s']:.2f} s beside.")  # fmt: skip
    if fair := results.get("fairness"):
        said.append(f"One beside 50: TTFT {fair['solo_s'] * 1e3:.0f} ms alone, {fair['ttft_s'] * 1e3:.0f} ms beside, "
                    f"a step {fair['step_s'] * 1e3:.0f} ms.")  # fmt: skip
    if after := results.get("soak"):
        said.append("Resident memory: " + ", ".join(f"{size / 1e6:.0f} MB after {count}" for count, size in after["bytes"].items()) + ".")
    lines = [
        f"{facts['cpu']}, {facts['cores']} cores, {facts['threads']} threads; {facts['m40llm']}, {results['model']}; {facts['date']}.",
        "",
        " ".join(said),
        "",
        "| measured | figure | bound |",
        "| --- | ---: | ---: |",
        *(f"| {name} | {figure}{'' if kept or results['quick'] else ' (missed)'} | {bound} |" for name, figure, bound, kept in judged(results)),
    ]
    if results.get("open_loop"):
        lines += [
            "",
            "| arrivals/s | requests | TTFT p50, ms | p90 | p99 | gap p50, ms | p90 | p99 | max | tokens/s | goodput/s |",
            "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
    for one in results.get("open_loop", []):
        times = [*one["ttft_s"].values(), *one["gap_s"].values(), one["max_gap_s"]]
        cells = [f"{one['offered_per_s']:.1f}", str(one["requests"]), *(f"{value * 1e3:.0f}" for value in times)]
        lines.append("| " + " | ".join([*cells, f"{one['tokens_per_s']:.0f}", f"{one['goodput_per_s']:.1f}"]) + " |")
    return "\n".join(lines) + "\n"


def machine(args) -> dict:
    cpu = platform.processor() or "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "threads": args.threads,
            "m40llm": output(args.binary, "--version").strip(), "load": os.getloadavg()[0],
            "date": time.strftime("%Y-%m-%d")}  # fmt: skip


def environment() -> dict[str, str]:
    """The caller's environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("M40LLM_")}


def output(*command: str) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment())
    if done.returncode != 0:
        sys.exit(f"bench-serving: exit {done.returncode} from: {' '.join(map(str, command))}")
    return done.stdout


def arguments() -> argparse.Namespace:
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--binary", default=str(target / "release" / "m40llm"))
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--check", action="store_true", help="exit 1 when a bound is missed")
    parser.add_argument("--quick", action="store_true", help="small numbers, a smoke test that judges nothing")
    parser.add_argument("--only", type=lambda names: names.split(","), default=PARTS, metavar="PART,...",
                        help="some of: " + ", ".join(PARTS))  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures here")
    parser.add_argument("--chart", type=Path, metavar="FILE.svg", help="also draw the open loop here")
    args = parser.parse_args()
    if unknown := set(args.only) - set(PARTS):
        parser.error(f"--only: no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.chart and "open_loop" not in args.only:
        parser.error("--chart: it draws the open loop, which --only leaves out")
    return args


def main() -> None:
    args = arguments()
    if not Path(args.binary).exists():
        sys.exit(f"bench-serving: no {args.binary}; build it with: cargo build --release -p m40llm")
    model = (args.model or Path(output(str(ROOT / "scripts" / "fetch-model.sh"), "smollm2").split("\n")[-2])).resolve()
    sizes = Sizes(args.quick)
    start = lambda *flags: LoadedServer(args.binary, model, args.threads, environment(), *flags)  # noqa: E731

    results: dict = {"machine": machine(args), "model": model.name, "quick": args.quick}

    def measure(name: str, part, *more) -> None:
        if name in args.only:
            results[name] = part(sizes, *more)
            print(f"{name} done", file=sys.stderr)

    measure("throughput", throughput, start)
    plan = json.loads(output(args.binary, "inspect", str(model), "--json"))["memory"]
    measure("memory", memory, start, plan["kv_bytes_per_token"]["f16"])
    with start() as server:
        for name, part in SHARING.items():
            measure(name, part, server)
    rows = judged(results)
    results["missed"] = [] if args.quick else [f"{name}: {figure}, wanted {bound}" for name, figure, bound, kept in rows if not kept]
    print(markdown(results), end="")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    if args.chart:
        args.chart.write_text(chart.draw(results["open_loop"], f"{results['model']}, {results['machine']['date']}"))
    for line in results["missed"]:
        print("missed: " + line, file=sys.stderr)
    if results["missed"] and args.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
