"""What a Tesla M40 would do at best, derived from the slots of the kernels. A model, not a measurement.

A step reads every weight once and issues its slots for every weight; whichever takes longer is its time:

    seconds a step = max(bytes of weights / 245 GB/s, slots a weight * weights / 3.42e12 a second)

Slots are those of the busiest pipe, cycles lost to register-bank conflicts included. Prompts read their weights once for many
tokens, so there only FFMA's share of the 6.84 TFLOP/s counts.

245 GB/s is 85 % of the card's 288, what copies reach; 24 multiprocessors of 128 lanes at 1.114 GHz issue 3.42e12 slots a
second. Attention, launches and everything that is not a weight matrix are left out, so real speeds are lower.
"""

BANDWIDTH = 245e9
SLOTS_PER_SECOND = 24 * 128 * 1.114e9
FLOPS = 2 * SLOTS_PER_SECOND

# Bytes of a weight as stored, scales included.
BYTES = {
    "f16": 2.0,
    "bf16": 2.0,
    "q8_0": 34 / 32,
    "q6_k": 210 / 256,
    "q5_k": 176 / 256,
    "q5_1": 24 / 32,
    "q5_0": 22 / 32,
    "q4_k": 144 / 256,
    "q4_1": 20 / 32,
    "q4_0": 18 / 32,
}


# Width, width inside, of keys and values, vocabulary, layers.
MODELS = {
    "llama3-8b": (4096, 14336, 1024, 128_256, 32),
    "llama3-70b-16l": (8192, 28672, 1024, 32_000, 16),
}


def weights(name):
    """Weights that a step reads, in Q4_K_M's two kinds: those that Q6_K holds there, and the rest."""
    width, inner, kv, vocabulary, layers = MODELS[name]
    attention = 2 * width * width + 2 * width * kv
    total = layers * (attention + 3 * width * inner) + vocabulary * width
    # Q6_K: the output matrix, and attn_v and ffn_down of every second layer.
    larger = vocabulary * width + layers // 2 * (width * kv + width * inner)
    return larger, total - larger


def mixes(name):
    """Type, and (type, weights) of each part."""
    larger, rest = weights(name)
    uniform = {kind.upper(): [(kind, larger + rest)] for kind in BYTES}
    return {**uniform, "Q4_K_M": [("q6_k", larger), ("q4_k", rest)]}


def seconds(parts, slots):
    """Seconds of a step over `parts`, given slots a weight by type."""
    return sum(max(n * BYTES[kind] / BANDWIDTH, n * slots[kind] / SLOTS_PER_SECOND) for kind, n in parts)


def rates(name, slots, prefill_share):
    """
    Tokens a second of a model by (type, batch), where batch 0 is a prompt and None a step that does nothing but read.
    `slots`: {batch: {type: slots a weight}}; `prefill_share`: {type: FFMA in all cycles}.
    """
    found = {}
    for mix, parts in mixes(name).items():
        found[mix, None] = 1 / sum(n * BYTES[kind] / BANDWIDTH for kind, n in parts)
        for batch, of in slots.items():
            if all(kind in of for kind, _ in parts):
                found[mix, batch] = batch / seconds(parts, of)
        if all(kind in prefill_share for kind, _ in parts):
            found[mix, 0] = 1 / sum(2 * n / (FLOPS * prefill_share[kind]) for kind, n in parts)
    return found


def table(name, slots, prefill_share):
    """Markdown of `rates`."""
    found = rates(name, slots, prefill_share)
    batches = sorted(slots)
    head = [f"{name} as", "read at 245 GB/s"] + [f"batch {b}" for b in batches] + ["prompt"]
    rows = []
    for mix in mixes(name):
        cells = [found.get((mix, column)) for column in (None, *batches)]
        prompt = found.get((mix, 0))
        written = ["" if cell is None else f"{cell:.1f}" for cell in cells] + ["" if prompt is None else f"{prompt:.0f}"]
        rows.append([mix, *written])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
