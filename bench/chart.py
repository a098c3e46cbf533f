"""The picture: bars for the zero-time cases, as SVG, which every browser and forge shows and no dependency writes.

One column of panels per workload, one row per figure; in a panel one bunch of bars per number of callers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from bench.results import GroupResult, Result
from bench.workloads import WORKLOADS

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = {"echo": "#999999", "unary": "#0072B2", "infer": "#CC79A7", "stream": "#009E73", "rest": "#D55E00"}

PANEL_WIDTH = 560
PANEL_HEIGHT = 250
MARGIN = 30
HEAD = 60
BAR_ROOM = 165  # pixels of the highest bar
BASE = 215  # a panel's pixels above its base line
INK = "#222222"


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of panels."""

    title: str
    value: Callable[[Result], float | None]


def _cpu_us(result: Result) -> float | None:
    known = [result.median.router_us_per_vector, result.median.gateway_us_per_vector]
    return sum(value for value in known if value is not None) if any(known) else None


FIGURES = (
    Figure("requests per second", lambda result: result.median.requests_per_s),
    Figure("p50 in ms", lambda result: result.median.p50_ms),
    Figure("CPU of router and gateway (echo: its server), µs per vector", _cpu_us),
)


def draw(found: GroupResult, subtitle: str) -> str:
    """The picture's text."""
    workloads = list(dict.fromkeys(result.case.workload for result in found.results))
    width = MARGIN + (PANEL_WIDTH + MARGIN) * len(workloads)
    height = HEAD + PANEL_HEIGHT * len(FIGURES) + MARGIN
    root = ET.Element(
        "svg",
        {
            "xmlns": "http://www.w3.org/2000/svg",
            "viewBox": f"0 0 {width} {height}",
            "width": f"{width}",
            "height": f"{height}",
            "font-family": "sans-serif",
            "font-size": "12",
            "fill": INK,
        },
    )
    _box(root, 0, 0, width, height, "#ffffff")
    _text(root, MARGIN, 25, f"{found.group.title}. {subtitle}", size=14)
    _legend(root)
    for column, workload in enumerate(workloads):
        results = [result for result in found.results if result.case.workload == workload]
        for row, figure in enumerate(FIGURES):
            left, top = MARGIN + column * (PANEL_WIDTH + MARGIN), HEAD + row * PANEL_HEIGHT
            panel = ET.SubElement(root, "g", {"transform": f"translate({left},{top})"})
            _panel(panel, f"{WORKLOADS[workload].title}: {figure.title}", results, figure.value)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def short(value: float) -> str:
    """At most five characters: 0.52, 8.1, 64, 812, 5.3k, 49k."""
    for limit, form in ((1, ".2f"), (10, ".1f"), (1000, ".0f")):
        if value < limit * 0.9995:
            return format(value, form)
    return f"{value / 1000:.1f}k" if value < 9_950 else f"{value / 1000:.0f}k"


def _panel(
    panel: ET.Element, title: str, results: Sequence[Result], value_of: Callable[[Result], float | None]
) -> None:
    _text(panel, 0, 25, title)
    callers = sorted({result.case.callers for result in results})
    highest = max((value_of(result) or 0.0 for result in results), default=0.0) or 1.0
    bunch = PANEL_WIDTH / len(callers)
    bar = bunch / (len(COLOURS) + 1)
    for result in results:
        bunch_left = callers.index(result.case.callers) * bunch
        left = bunch_left + (list(COLOURS).index(result.case.system) + 0.5) * bar
        value = value_of(result)
        if value is not None:
            height = BAR_ROOM * value / highest
            _box(panel, left, BASE - height, bar * 0.92, height, COLOURS[result.case.system])
            _text(panel, left + bar * 0.46, BASE - height - 3, short(value), size=9, anchor="middle")
    for number, count in enumerate(callers):
        label = f"{count} caller" if count == 1 else f"{count} callers"
        _text(panel, (number + 0.5) * bunch, BASE + 15, label, size=11, anchor="middle")
    _box(panel, 0, BASE, PANEL_WIDTH, 1, INK)


def _legend(root: ET.Element) -> None:
    for number, (system, colour) in enumerate(COLOURS.items()):
        left = MARGIN + 90 * number
        _box(root, left, 38, 12, 12, colour)
        _text(root, left + 18, 48, system)


def _box(parent: ET.Element, left: float, top: float, width: float, height: float, fill: str) -> None:
    numbers = {"x": left, "y": top, "width": width, "height": height}
    ET.SubElement(parent, "rect", {**{name: f"{value:.1f}" for name, value in numbers.items()}, "fill": fill})


def _text(parent: ET.Element, left: float, base: float, text: str, *, size: int = 12, anchor: str = "start") -> None:
    place = {"x": f"{left:.1f}", "y": f"{base:.1f}", "font-size": f"{size}", "text-anchor": anchor}
    ET.SubElement(parent, "text", place).text = text
