"""The picture, as SVG: a panel per figure, in it a bunch of bars per setting, in it a bar per policy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from router.simulate.scenario import POLICIES, Answer

# Okabe and Ito's colours, which the colour-blind can tell apart.
COLOURS = dict(zip(POLICIES, ("#999999", "#0072B2", "#D55E00", "#009E73"), strict=True))
INK = "#222222"
PANEL_WIDTH = 520
PANEL_HEIGHT = 220
COLUMNS = 2
MARGIN = 30
HEAD = 60
BAR_ROOM = 135  # pixels of the highest bar
BASE = 180  # a panel's pixels above its base line


@dataclass(frozen=True, slots=True)
class Panel:
    """One figure of every answer."""

    title: str
    value: Callable[[Answer], float]


PANELS = (
    Panel("mean latency, s", lambda answer: answer.figures.mean_s),
    Panel("p99 latency, s", lambda answer: answer.figures.p99_s),
    Panel("median latency, s", lambda answer: answer.figures.p50_s),
    Panel("rows per batch", lambda answer: answer.figures.batch_mean),
    Panel("goodput, rows per second", lambda answer: answer.figures.goodput),
    Panel(
        "expired or refused, % of the rows",
        lambda answer: 100 * (answer.figures.expired_share + answer.figures.refused_share),
    ),
)


def draw(answers: Sequence[Answer], title: str) -> str:
    """The picture's text."""
    width = MARGIN + COLUMNS * (PANEL_WIDTH + MARGIN)
    height = HEAD + math.ceil(len(PANELS) / COLUMNS) * PANEL_HEIGHT + MARGIN
    size = {"viewBox": f"0 0 {width} {height}", "width": f"{width}", "height": f"{height}"}
    style = {"font-family": "sans-serif", "font-size": "12", "fill": INK}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, **style})
    box(root, 0, 0, width, height, "#ffffff")
    text(root, MARGIN, 25, title, size=14)
    _legend(root, list(dict.fromkeys(answer.scenario.policy for answer in answers)))
    for number, panel in enumerate(PANELS):
        row, column = divmod(number, COLUMNS)
        left, top = MARGIN + column * (PANEL_WIDTH + MARGIN), HEAD + row * PANEL_HEIGHT
        _panel(ET.SubElement(root, "g", {"transform": f"translate({left},{top})"}), panel, answers)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _panel(parent: ET.Element, panel: Panel, answers: Sequence[Answer]) -> None:
    text(parent, 0, 20, panel.title)
    settings = list(dict.fromkeys(_setting(answer) for answer in answers))
    policies = list(dict.fromkeys(answer.scenario.policy for answer in answers))
    values = [value if math.isfinite(value := panel.value(answer)) else 0.0 for answer in answers]
    highest = max(values, default=0.0) or 1.0
    bunch = PANEL_WIDTH / max(len(settings), 1)
    bar = bunch / (len(policies) + 1)
    for answer, value in zip(answers, values, strict=True):
        place = settings.index(_setting(answer)) * bunch + (policies.index(answer.scenario.policy) + 0.5) * bar
        height = BAR_ROOM * value / highest
        box(parent, place, BASE - height, bar * 0.92, height, COLOURS[answer.scenario.policy])
        if bar > 20:
            text(parent, place + bar * 0.46, BASE - height - 3, f"{value:.3g}", size=9, anchor="middle")
    for number, setting in enumerate(settings):
        text(parent, (number + 0.5) * bunch, BASE + 15, setting, size=10, anchor="middle")
    box(parent, 0, BASE, PANEL_WIDTH, 1, INK)


def _setting(answer: Answer) -> str:
    return f"{answer.scenario.replicas} x {answer.scenario.max_batch_size}"


def _legend(root: ET.Element, policies: Sequence[str]) -> None:
    for number, policy in enumerate(policies):
        left = MARGIN + 110 * number
        box(root, left, 38, 12, 12, COLOURS[policy])
        text(root, left + 18, 48, policy)
    text(root, MARGIN + 110 * len(policies) + 18, 48, "below the bars: replicas x max_batch_size")


def box(parent: ET.Element, left: float, top: float, width: float, height: float, fill: str) -> None:
    """A filled rectangle."""
    numbers = {"x": left, "y": top, "width": width, "height": height}
    ET.SubElement(parent, "rect", {**{name: f"{value:.1f}" for name, value in numbers.items()}, "fill": fill})


def text(parent: ET.Element, left: float, base: float, text: str, *, size: int = 12, anchor: str = "start") -> None:
    """A line of text, from its base line up."""
    place = {"x": f"{left:.1f}", "y": f"{base:.1f}", "font-size": f"{size}", "text-anchor": anchor}
    ET.SubElement(parent, "text", place).text = text
