"""What the runs measured, what is promised of it, and what llama.cpp does on the same card."""

from dataclasses import dataclass

TYPES = ("F16", "Q8_0", "Q4_K_M")
# All that weights are stored as: no step of any may stand out.
SWEPT = (*TYPES, "BF16", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0")
MODELS = ("llama3-8b", "llama3-70b-16l")

# llama.cpp b11434 on an H100, held to what it does on compute capability 5.2: no dp4a, no FP16 arithmetic, FP32 cuBLAS; flash
# attention, random weights. Tokens a second in aggregate by batch.
PEER_BATCHES = (1, 4, 8, 9, 16, 32)
PEER = {
    ("llama3-8b", "F16"): (150, 311, 413, 224, 317, 648),
    ("llama3-8b", "Q8_0"): (208, 688, 990, 214, 308, 621),
    ("llama3-8b", "Q4_K_M"): (198, 508, 652, 209, 298, 603),
    ("llama3-70b-16l", "Q8_0"): (154, 518, 696, 90, 162, 397),
    ("llama3-70b-16l", "Q4_K_M"): (151, 341, 415, 89, 160, 391),
}
PEER_PROMPT = {
    ("llama3-8b", "F16"): 2830,
    ("llama3-8b", "Q8_0"): 2840,
    ("llama3-8b", "Q4_K_M"): 2748,
    ("llama3-70b-16l", "Q8_0"): 1590,
    ("llama3-70b-16l", "Q4_K_M"): 1582,
}

# What is promised, and what is aimed at: tokens a second by model, type and batch; 0 is a prompt of 512 tokens.
GOALS = {
    ("llama3-8b", "F16", 1): (150, 175),
    ("llama3-8b", "Q8_0", 1): (195, 260),
    ("llama3-8b", "Q4_K_M", 1): (200, 290),
    ("llama3-70b-16l", "F16", 1): (95, 103),
    ("llama3-70b-16l", "Q8_0", 1): (160, 195),
    ("llama3-70b-16l", "Q4_K_M", 1): (170, 260),
    ("llama3-8b", "F16", 8): (900, 1150),
    ("llama3-8b", "Q8_0", 8): (1000, 1500),
    ("llama3-8b", "Q4_K_M", 8): (900, 1300),
    ("llama3-8b", "F16", 16): (1100, 1600),
    ("llama3-8b", "Q8_0", 16): (1100, 1700),
    ("llama3-8b", "Q4_K_M", 16): (900, 1300),
    ("llama3-8b", "F16", 32): (1200, 1900),
    ("llama3-8b", "Q8_0", 32): (1200, 1900),
    ("llama3-8b", "Q4_K_M", 32): (1100, 1700),
    ("llama3-70b-16l", "Q4_K_M", 8): (550, 800),
    ("llama3-70b-16l", "Q4_K_M", 16): (600, 850),
    ("llama3-70b-16l", "Q4_K_M", 32): (650, 950),
    ("llama3-8b", "F16", 0): (2500, 3100),
    ("llama3-8b", "Q4_K_M", 0): (2400, 3000),
}
# A step of one more sequence takes at most so many times the one before.
CLIFF = 1.3
DEEP = 8192


def peer(model: str, kind: str, batch: int) -> float | None:
    return dict(zip(PEER_BATCHES, PEER.get((model, kind), ()))).get(batch)


class Speeds:
    """The results of all runs; of what was measured twice, the later one."""

    def __init__(self, runs: list[dict]):
        self.device = runs[-1]["report"]["device"]
        self.copies = [run["report"]["copy_gb_per_s"] for run in runs]
        self.products: dict[str, list[float]] = {}
        self.found = {}
        for report in (run["report"] for run in runs):
            for by, tflops in report.get("products_tflops", {}).items():
                self.products.setdefault(by, []).append(tflops)
            for one in report["results"]:
                self.found[report["model"], report["quant"], one["test"], one["batch"], one["depth"]] = one

    def decode(self, model: str, kind: str, batch: int, depth: int = 0) -> dict | None:
        return self.found.get((model, kind, "decode", batch, depth))

    def prompt(self, model: str, kind: str, batch: int = 1) -> dict | None:
        return self.found.get((model, kind, "prompt", batch, 0))

    def by_batch(self, model: str, kind: str) -> dict[int, float]:
        """Tokens a second of all batches measured, in their order."""
        batches = sorted(b for m, k, test, b, depth in self.found if (m, k, test, depth) == (model, kind, "decode", 0))
        return {batch: self.decode(model, kind, batch)["tokens_per_s"] for batch in batches}

    def steepest(self, model: str, kind: str) -> tuple[float, int] | None:
        """The largest ratio of a step's time to that with one sequence less, and its batch."""
        seconds = {batch: batch / speed for batch, speed in self.by_batch(model, kind).items()}
        ratios = [(seconds[b] / seconds[b - 1], b) for b in seconds if b - 1 in seconds]
        return max(ratios, default=None)


@dataclass
class Goal:
    """One line of the table. Shares and ratios are plain numbers; `unit` says how they are written."""

    name: str
    unit: str
    measured: float | None
    bound: float | None = None
    aim: float | None = None
    peer: float | None = None
    # Where to look it up in the model: model, type, batch (0: prompt).
    key: tuple[str, str, int] | None = None
    at_most: bool = False
    note: str = ""

    def kept(self) -> bool:
        if self.bound is None:
            return True
        if self.measured is None:
            return False
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def judged(speeds: Speeds) -> list[Goal]:
    goals = [decode(speeds, model, kind, 1) for model in MODELS for kind in TYPES]
    goals += [decode(speeds, MODELS[0], kind, batch) for kind in TYPES for batch in (8, 16, 32)]
    goals += [decode(speeds, MODELS[1], "Q4_K_M", batch) for batch in (8, 16, 32)]
    goals += [prompt(speeds, kind) for kind in TYPES]
    return [*goals, deep(speeds), host(speeds), *(steps(speeds, kind) for kind in SWEPT)]


def decode(speeds: Speeds, model: str, kind: str, batch: int) -> Goal:
    one = speeds.decode(model, kind, batch)
    theirs = peer(model, kind, batch)
    note = f"{100 * one['share_of_copy']:.0f} % of copy" if one and batch == 1 else ""
    measured = one and one["tokens_per_s"]
    bound, aim = GOALS[model, kind, batch]
    return Goal(f"{model} {kind}, batch {batch}", "t/s", measured, bound, aim, theirs, (model, kind, batch), note=note)


def prompt(speeds: Speeds, kind: str) -> Goal:
    one = speeds.prompt(MODELS[0], kind)
    key = (MODELS[0], kind, 0)
    bound, aim = GOALS.get(key, (None, None))
    measured = one and one["tokens_per_s"]
    return Goal(f"{MODELS[0]} {kind}, prompt 512", "t/s", measured, bound, aim, PEER_PROMPT[MODELS[0], kind], key)


def deep(speeds: Speeds) -> Goal:
    shallow, at = (speeds.decode(MODELS[0], "Q4_K_M", 1, depth) for depth in (0, DEEP))
    lost = 1 - at["tokens_per_s"] / shallow["tokens_per_s"] if shallow and at else None
    note = f"{at['tokens_per_s']:.1f} t/s" if at else ""
    return Goal(f"{MODELS[0]} Q4_K_M, batch 1: lost at depth {DEEP}", "%", lost, 0.15, 0.11, at_most=True, note=note)


def host(speeds: Speeds) -> Goal:
    one = speeds.decode(MODELS[0], "Q4_K_M", 16)
    share = one and one.get("host_share")
    return Goal(f"{MODELS[0]} Q4_K_M, batch 16: host time between steps", "%", share, 0.05, 0.01, at_most=True)


def steps(speeds: Speeds, kind: str) -> Goal:
    name = f"{MODELS[0]} {kind}, 1 to 32: a step over that of one less, at most"
    found = speeds.steepest(MODELS[0], kind) if len(speeds.by_batch(MODELS[0], kind)) == 32 else None
    ratio, batch = found or (None, None)
    return Goal(name, "x", ratio, CLIFF, at_most=True, note=f"at {batch}" if batch else "")
