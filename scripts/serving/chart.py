"""The open loop as an SVG: three panels over the arrival rate. Colours follow the reader's light or dark preference."""

import html
import math

WIDTH, HEIGHT, TOP, BOTTOM = 960, 340, 62, 288
PANELS = ((70, 300), (390, 620), (710, 940))  # left and right edges of the plots
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #333 } .title { font-weight: 600; font-size: 13px }
.back { fill: #fff } .grid { stroke: #ddd } .axis { stroke: #777 }
.line { fill: none; stroke-width: 2 } .dash { stroke-dasharray: 5 4 }
.c0 { stroke: #0969da } .c1 { stroke: #8250df } .c2 { stroke: #bc4c00 } .c3 { stroke: #6e7781 }
circle { stroke-width: 2; fill: #fff }
@media (prefers-color-scheme: dark) {
text { fill: #ddd } .back, circle { fill: #0d1117 } .grid { stroke: #2d333b } .axis { stroke: #8b949e }
.c0 { stroke: #58a6ff } .c1 { stroke: #bc8cff } .c2 { stroke: #f0883e } .c3 { stroke: #9aa4af }
}"""


class Panel:
    def __init__(self, edges: tuple[int, int], title: str, unit: str, most_x: float, low: float, high: float, log: bool):
        self.left, self.right = edges
        self.most_x, self.low, self.high, self.log = most_x, low, high, log
        self.parts = [f'<text class="title" x="{self.left}" y="22">{title}</text>']
        for value in self.ticks():
            y = self.y(value)
            self.parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.text(self.left - 8, y + 4, f"{value:,.10g}", "end")
        for value in range(0, math.floor(most_x) + 1, max(1, round(most_x / 5))):
            self.text(self.x(value), BOTTOM + 18, str(value), "middle")
        self.parts.append(f'<path class="axis line" d="M{self.left} {TOP}V{BOTTOM}H{self.right}"/>')
        self.text((self.left + self.right) / 2, BOTTOM + 38, "requests arriving a second", "middle")
        middle = (TOP + BOTTOM) / 2
        self.parts.append(f'<text text-anchor="middle" transform="translate({self.left - 50} {middle}) rotate(-90)">{unit}</text>')

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [10.0**power for power in powers]
        step = max(1, math.ceil(self.high / 5))
        return [float(value) for value in range(0, math.floor(self.high) + 1, step)]

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.most_x

    def y(self, value: float) -> float:
        scale = math.log10 if self.log else float
        share = (scale(max(value, self.low)) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return BOTTOM - (BOTTOM - TOP) * share

    def text(self, x: float, y: float, words: str, anchor: str) -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{words}</text>')

    def series(self, number: int, name: str, points: list[tuple[float, float]], place: int, dashed: bool = False) -> None:
        """A line with its points, and its name in the row above the plot."""
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        dash = " dash" if dashed else ""
        self.parts.append(f'<path class="line c{number}{dash}" d="M{path}"/>')
        if not dashed:
            self.parts += [f'<circle class="c{number}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3"/>' for x, y in points]
        at = self.left + 76 * place
        self.parts.append(f'<path class="line c{number}{dash}" d="M{at} 42h18"/>')
        self.text(at + 23, 46, name, "start")


def draw(found: list[dict], caption: str) -> str:
    offered = [one["offered_per_s"] for one in found]
    most = max(offered) * 1.05
    parts = []
    for edges, title, key in zip(PANELS, ("Time to first token", "Between tokens"), ("ttft_s", "gap_s")):
        # No time at all has no place on a logarithmic axis.
        values = [value * 1e3 for one in found for value in one[key].values() if value > 0] or [1.0]
        low, high = 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.ceil(math.log10(max(values)))
        panel = Panel(edges, title, "milliseconds", most, low, max(high, low * 10), log=True)
        for number, name in enumerate(("p50", "p90", "p99")):
            panel.series(number, name, [(x, one[key][name] * 1e3) for x, one in zip(offered, found)], number)
        parts += panel.parts
    panel = Panel(PANELS[2], "Goodput", "requests a second", most, 0.0, most, log=False)
    panel.series(3, "arriving", [(0.0, 0.0), (max(offered), max(offered))], 1, dashed=True)
    panel.series(0, "good", [(x, one["goodput_per_s"]) for x, one in zip(offered, found)], 0)
    parts += panel.parts
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="Latency and goodput over the arrival rate: {html.escape(caption)}">\n<style>{STYLE}\n</style>\n'
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}"/>\n{body}\n</svg>\n'
    )
