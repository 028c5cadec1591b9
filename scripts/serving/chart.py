"""The open loop as an SVG: three panels over the arrival rate."""

import math

from svg import Panel, Place, document

WIDTH, HEIGHT = 960, 340
PANELS = tuple(Place(left, right, 288) for left, right in ((70, 300), (390, 620), (710, 940)))
ACROSS = "requests arriving a second"


def draw(found: list[dict], caption: str) -> str:
    offered = [one["offered_per_s"] for one in found]
    most = max(offered) * 1.05
    panels = []
    for place, title, key in zip(PANELS, ("Time to first token", "Between tokens"), ("ttft_s", "gap_s")):
        # No time at all has no place on a logarithmic axis.
        values = [value * 1e3 for one in found for value in one[key].values() if value > 0] or [1.0]
        low, high = 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.ceil(math.log10(max(values)))
        panel = Panel(place, title, "milliseconds", ACROSS, most, low, max(high, low * 10), log=True)
        for number, name in enumerate(("p50", "p90", "p99")):
            panel.series(number, name, [(x, one[key][name] * 1e3) for x, one in zip(offered, found)], 76 * number)
        panels.append(panel)
    panel = Panel(PANELS[2], "Goodput", "requests a second", ACROSS, most, 0.0, most)
    panel.series(3, "arriving", [(0.0, 0.0), (max(offered), max(offered))], 76, dashed=True, dots=False)
    panel.series(0, "good", [(x, one["goodput_per_s"]) for x, one in zip(offered, found)], 0)
    return document(WIDTH, HEIGHT, f"Latency and goodput over the arrival rate: {caption}", [*panels, panel])
