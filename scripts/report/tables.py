"""The figures as Markdown."""

from .figures import MODELS, TYPES, Goal, Speeds, peer

# The batches of the table; the chart has all.
SHOWN = (1, 2, 3, 4, 6, 8, 9, 12, 13, 16, 17, 20, 24, 25, 28, 32)


def written(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return {"%": f"{100 * value:.1f} %", "x": f"{value:.2f}", "t/s": f"{value:.1f}" if value < 1000 else f"{value:.0f}"}[unit]


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows]) + "\n"


def spread(values: list[float]) -> str:
    low, high = (f"{value:.0f}" if value >= 100 else f"{value:.1f}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def machine(found: dict, speeds: Speeds) -> str:
    facts = found["machine"]
    driver = f" (driver {facts['driver']})" if facts["driver"] else ""
    products = "".join(f", {by} {spread(values)} TFLOP/s" for by, values in speeds.products.items())
    copies = f"copy {spread(speeds.copies)} GB/s{products}"
    return f"{speeds.device}{driver}; {facts['version']}; {facts['date']}; {copies}.\n"


def promised(goals: list[Goal], modelled: dict) -> str:
    """What is bounded, beside its bound; the last column is no measurement."""
    rows = []
    for goal in goals:
        sense = "≤ " if goal.at_most else "≥ "
        limits = [sense + written(limit, goal.unit) if limit is not None else "" for limit in (goal.bound, goal.aim)]
        measured = written(goal.measured, goal.unit) or "not measured"
        if goal.note:
            measured += f" ({goal.note})"
        theirs = written(goal.peer, goal.unit)
        rows.append([goal.name, *limits, measured, theirs, written(modelled.get(goal.key), "t/s")])
    return table(["", "bound", "aim", "measured", "llama.cpp on an H100", "*M40, modelled*"], rows)


def decoding(speeds: Speeds) -> str:
    """Tokens a second by batch, llama.cpp's below ours."""
    rows = []
    for model in MODELS:
        for kind in TYPES:
            ours = speeds.by_batch(model, kind)
            if len(ours) < 2:
                continue
            rows.append([f"{model} {kind}", *(written(ours.get(b), "t/s") for b in SHOWN)])
            theirs = [peer(model, kind, b) for b in SHOWN]
            rows.append(["llama.cpp on an H100", *("" if value is None else str(value) for value in theirs)])
    return table(["batch", *map(str, SHOWN)], rows)


def host_times(speeds: Speeds) -> str:
    rows = []
    for kind in TYPES:
        shares = {b: (speeds.decode(MODELS[0], kind, b) or {}).get("host_share") for b in (1, 8, 16, 32)}
        rows.append([f"{MODELS[0]} {kind}", *(written(share, "%") for share in shares.values())])
    return table(["host time between steps, batch", "1", "8", "16", "32"], rows)


def markdown(found: dict, speeds: Speeds, goals: list[Goal], modelled: dict) -> str:
    # A shell writes the long list of batches.
    listed = ",".join(map(str, range(1, 33)))
    commands = "\n".join(dict.fromkeys(run["command"].replace(f" {listed} ", " $(seq -s, 32) ") for run in found["runs"]))
    example = f"<!-- example: gpu: models that only a card runs at speed -->\n```sh\n{commands}\n```\n"
    return "\n".join([machine(found, speeds), promised(goals, modelled), decoding(speeds), host_times(speeds), example])


def replaced(page: str, part: str, text: str) -> str:
    """The page with what is between the part's two marks replaced."""
    begin, end = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"bench-report: the page lacks {begin.strip()} or {end}")
    return before + begin + "\n" + text.strip() + "\n\n" + end + after


def missed(goal: Goal) -> str | None:
    if goal.kept():
        return None
    sense = "at most" if goal.at_most else "at least"
    return f"{goal.name}: {written(goal.measured, goal.unit) or 'not measured'}, wanted {sense} {written(goal.bound, goal.unit)}"
