#!/usr/bin/env python3
"""Holds the kernels' sm_52 machine code against kernels/budgets.toml: no GPU needed.

    sass_report.py [--all] [--model] [--out-dir] [CUBIN_DIR]

Builds the kernels as the engine does (a `cargo check` with feature cuda, which runs its build script), disassembles the
cubins and counts. A figure over its budget ends it with exit code 1 and a line that names the kernel, the figure and the
budget. --all lists every kernel instead of those with a budget of their own; --model prints the modelled Tesla M40 table
as Markdown; --out-dir builds and prints where the cubins and the PTX are. CUBIN_DIR takes cubins from there instead of building.
"""

import argparse
import concurrent.futures
import json
import re
import subprocess
import sys
from pathlib import Path

from sass import listing, model

try:
    import tomllib
except ImportError:  # before Python 3.11; pip brings its own
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
NVDISASM = ROOT / ".cuda" / "bin" / "nvdisasm"
BUDGETS = ROOT / "kernels" / "budgets.toml"

# What a budget may hold: the figure it bounds, whether from above, and how it is written.
FIGURES = {
    "registers": ("registers", "<=", "{:.0f}"),
    "local": ("local memory accesses", "<=", "{:.0f}"),
    "conflicts": ("bank conflicts per FFMA", "<=", "{:.1%}"),
    "slots": ("slots a weight", "<=", "{:.2f}"),
    "busiest": ("slots a weight, conflicts and slow pipes included", "<=", "{:.2f}"),
    "ffma": ("FFMA in all cycles", ">=", "{:.1%}"),
}


class Budgets:
    """kernels/budgets.toml."""

    def __init__(self, text):
        table = tomllib.loads(text)
        self.default = table.pop("default")
        self.entries = table.pop("kernel", [])
        if table:
            raise SystemExit(f"budgets: unknown table {next(iter(table))!r}: known are default and kernel")
        for entry in [self.default, *self.entries]:
            unknown = set(entry) - set(FIGURES) - {"name", "weights"}
            if unknown:
                raise SystemExit(f"budgets: unknown key {unknown.pop()!r} in {entry.get('name', 'default')!r}")

    def of(self, kernel):
        """The default with what the entries that match the whole name add, later ones over earlier ones."""
        found = [e for e in self.entries if re.fullmatch(e["name"], kernel)]
        merged = dict(self.default)
        for entry in found:
            merged.update(entry)
        return merged, bool(found)

    def unused(self, kernels):
        """Entries that match no kernel: renamed kernels would escape their budgets."""
        return [e["name"] for e in self.entries if not any(re.fullmatch(e["name"], k) for k in kernels)]


def figures(kernel, budget):
    """What a budget bounds, measured."""
    cost = listing.Cost.of(kernel.main_loop())
    weights = budget.get("weights")
    return cost, {
        "registers": kernel.registers,
        "local": kernel.local_accesses(),
        "conflicts": cost.conflict_share(),
        "slots": cost.slots / weights if weights else None,
        "busiest": cost.busiest() / weights if weights else None,
        "ffma": cost.ffma_share(),
    }


def violations(name, budget, measured):
    """One line each."""
    for key, (title, sense, form) in FIGURES.items():
        limit = budget.get(key)
        if limit is None:
            continue
        value = measured[key]
        if value is None:
            yield f"{name}: a budget of slots needs `weights`, those that a lane handles in a pass of the main loop"
        elif value > limit if sense == "<=" else value < limit:
            yield f"{name}: {title} {form.format(value)}, budget {sense} {form.format(limit)}"


def out_dir():
    """Where the engine's build script has put the cubins."""
    command = ["cargo", "check", "--quiet", "--workspace", "--features", "cuda", "--message-format", "json"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit("sass-report: the kernels do not build")
    for line in done.stdout.splitlines():
        message = json.loads(line) if line.startswith("{") else {}
        if message.get("reason") == "build-script-executed" and "m40llm-engine" in message["package_id"]:
            return Path(message["out_dir"])
    raise SystemExit("sass-report: cargo names no output of the engine's build script")


def disassemble(cubin):
    done = subprocess.run([NVDISASM, cubin], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"sass-report: nvdisasm {cubin}: {done.stderr.strip()}")
    return listing.parse(done.stdout.splitlines())


def read_kernels(directory):
    """All kernels of all cubins; subroutines of the compiler's own have names that begin with $ and no sections."""
    cubins = sorted(directory.glob("*.cubin"))
    if not cubins:
        raise SystemExit(f"sass-report: no cubins in {directory}")
    with concurrent.futures.ProcessPoolExecutor() as pool:
        found = {}
        for cubin, kernels in zip(cubins, pool.map(disassemble, cubins)):
            for name, kernel in kernels.items():
                if name in found:
                    raise SystemExit(f"sass-report: {name} is in {cubin.name} and in another file")
                found[name] = kernel
        return found


def measured_rows(kernels, budgets):
    """Name, cost of the main loop, and figures of each kernel."""
    return [(name, *figures(kernel, budgets.of(name)[0])) for name, kernel in sorted(kernels.items())]


def describe(rows):
    form = "{:<34}{:>5}{:>6}{:>7}{:>6}{:>6}{:>6}{:>9}{:>8}{:>8}{:>9}"
    head = ["kernel", "regs", "local", "slots", "half", "qtr", "FFMA", "conflict", "FFMA %", "slots/w", "busiest"]
    lines = [form.format(*head)]
    for name, cost, measured in rows:
        per_weight = [f"{measured[k]:.2f}" if measured[k] else "" for k in ("slots", "busiest")]
        lines.append(
            form.format(
                name,
                measured["registers"],
                measured["local"],
                cost.slots,
                cost.half_rate,
                cost.quarter_rate,
                cost.ffma,
                cost.conflicts,
                f"{100 * measured['ffma']:.1f}",
                *per_weight,
            )
        )
    return "\n".join(lines)


def modelled_costs(rows):
    """Slots a weight by batch and type, and FFMA's share of prompts by type, of the kernels that products use."""
    slots, share = {}, {}
    for name, _, measured in rows:
        if (match := MODELLED.fullmatch(name)) and measured["busiest"]:
            batch = int(match["batch"] or 1)
            slots.setdefault(batch, {})[match["type"]] = measured["busiest"]
        elif match := PREFILL.fullmatch(name):
            share[match["type"]] = measured["ffma"]
    return slots, share


def modelled():
    """
    Tokens a second of a Tesla M40 by its model, by (model, type, batch), where batch 0 is a prompt; and the table of the
    first model.
    """
    costs = modelled_costs(measured_rows(read_kernels(out_dir()), Budgets(BUDGETS.read_text())))
    found = {(name, *key): rate for name in model.MODELS for key, rate in model.rates(name, *costs).items()}
    return found, model.table(next(iter(model.MODELS)), *costs)


MODELLED = re.compile(r"(gemv|small|skinny)_(?P<type>[a-z0-9]+(_[01k])?)(_[bn](?P<batch>\d+))?")
PREFILL = re.compile(r"gemm_(?P<type>[a-z0-9]+(_[01k])?)")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="CUBIN_DIR", nargs="?", type=Path)
    parser.add_argument("--all", action="store_true", help="list every kernel")
    parser.add_argument("--model", action="store_true", help="print the modelled M40 table")
    parser.add_argument("--out-dir", action="store_true", help="print where the build puts cubins and PTX")
    args = parser.parse_args()
    if args.out_dir:
        print(out_dir())
        return 0

    budgets = Budgets(BUDGETS.read_text())
    if not NVDISASM.exists():
        raise SystemExit(f"sass-report: {NVDISASM} is missing: scripts/cuda-toolchain.sh disassembler")
    kernels = read_kernels(args.directory or out_dir())
    rows = measured_rows(kernels, budgets)
    listed = [row for row in rows if args.all or budgets.of(row[0])[1]]
    wrong = [line for name, _, measured in rows for line in violations(name, budgets.of(name)[0], measured)]
    wrong += [f"{name}: this budget matches no kernel" for name in budgets.unused(kernels)]
    if args.model:
        costs = modelled_costs(rows)
        print("\n\n".join(model.table(name, *costs) for name in model.MODELS))
    else:
        print(describe(listed))
    for line in wrong:
        print(f"sass-report: {line}", file=sys.stderr)
    if not wrong:
        print(f"sass-report: {len(kernels)} kernels within their budgets", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
