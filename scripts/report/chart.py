"""Decoding by batch as an SVG: a panel for each type, llama.cpp's points beside our line."""

import math

from svg import Panel, Place, document

from .figures import MODELS, PEER, PEER_BATCHES, TYPES, Speeds

WIDTH, HEIGHT = 960, 380
EDGES = ((70, 310), (390, 630), (710, 950))
MOST = 32


def draw(speeds: Speeds, caption: str) -> str:
    model = MODELS[0]
    ours = {kind: list(speeds.by_batch(model, kind).items()) for kind in TYPES}
    # One scale for all panels, so that they compare.
    highest = max((speed for points in ours.values() for _, speed in points), default=1.0)
    high = math.ceil(max(highest, max(max(speeds) for speeds in PEER.values())) / 200) * 200
    panels = []
    for (left, right), (kind, points) in zip(EDGES, ours.items()):
        title = f"{model} {kind}"
        panel = Panel(Place(left, right, 316), title, "tokens a second, all sequences", "sequences decoded at once", MOST, 0, high)
        panel.series(2, "llama.cpp on an H100", list(zip(PEER_BATCHES, PEER[model, kind])), 80, dashed=True)
        if points:
            panel.series(0, "m40llm", points, 0, dots=False)
        panels.append(panel)
    panels[0].text(EDGES[0][0], HEIGHT - 6, f"m40llm: {caption}; llama.cpp: held to its path for compute capability 5.2", "start")
    return document(WIDTH, HEIGHT, f"Tokens a second by batch, m40llm and llama.cpp: {caption}", panels)
