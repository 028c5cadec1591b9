"""Charts as SVG: panels side by side. Colours follow the reader's light or dark preference."""

import html
import math
from dataclasses import dataclass

TOP = 62
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


@dataclass(frozen=True)
class Place:
    """Edges of a plot, its axes' words outside of them."""

    left: int
    right: int
    bottom: int


def round_step(least: float) -> int:
    """The next of 1, 2, 4, 5, 8 and their tenfolds: distances of ticks that are easily read."""
    power = 10 ** max(0, math.floor(math.log10(max(least, 1))))
    return next(n * power for n in (1, 2, 4, 5, 8, 10) if n * power >= least)


class Panel:
    """A plot from 0 to `most_x` across, which `across` names, and from `low` to `high`."""

    def __init__(self, place: Place, title: str, unit: str, across: str, most_x: float, low: float, high: float, log: bool = False):
        self.left, self.right, self.bottom = place.left, place.right, place.bottom
        self.most_x, self.low, self.high, self.log = most_x, low, high, log
        self.parts = [f'<text class="title" x="{self.left}" y="22">{html.escape(title)}</text>']
        for value in self.ticks():
            y = self.y(value)
            self.parts.append(f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
            self.text(self.left - 8, y + 4, f"{value:,.10g}", "end")
        for value in range(0, math.floor(most_x) + 1, round_step(most_x / 5)):
            self.text(self.x(value), self.bottom + 18, str(value), "middle")
        self.parts.append(f'<path class="axis line" d="M{self.left} {TOP}V{self.bottom}H{self.right}"/>')
        self.text((self.left + self.right) / 2, self.bottom + 38, across, "middle")
        middle = (TOP + self.bottom) / 2
        self.parts.append(f'<text text-anchor="middle" transform="translate({self.left - 54} {middle:.0f}) rotate(-90)">{html.escape(unit)}</text>')

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(round(math.log10(self.low)), round(math.log10(self.high)) + 1)
            return [10.0**power for power in powers]
        return [float(value) for value in range(0, math.floor(self.high) + 1, round_step(self.high / 5))]

    def x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self.most_x

    def y(self, value: float) -> float:
        scale = math.log10 if self.log else float
        share = (scale(max(value, self.low)) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return self.bottom - (self.bottom - TOP) * share

    def text(self, x: float, y: float, words: str, anchor: str) -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>')

    def series(self, number: int, name: str, points: list[tuple[float, float]], at: int, dashed: bool = False, dots: bool = True):
        """A line, its points if `dots`, and its name in the row above the plot, `at` from its left edge."""
        path = "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)
        dash = " dash" if dashed else ""
        self.parts.append(f'<path class="line c{number}{dash}" d="M{path}"/>')
        if dots:
            self.parts += [f'<circle class="c{number}" cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="3"/>' for x, y in points]
        at += self.left
        self.parts.append(f'<path class="line c{number}{dash}" d="M{at} 42h18"/>')
        self.text(at + 23, 46, name, "start")


def document(width: int, height: int, label: str, panels: list[Panel]) -> str:
    body = "\n".join(part for panel in panels for part in panel.parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{html.escape(label)}">\n<style>{STYLE}\n</style>\n'
        f'<rect class="back" width="{width}" height="{height}"/>\n{body}\n</svg>\n'
    )
