"""The picture of a grid, as SVG: panels of coloured cells, blue where latency falls, orange where it rises."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from router.simulate.chart import INK, box, text

# Of Okabe and Ito's colours, which the colour-blind can tell apart.
BETTER, WORSE = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
# The change at which a cell has its full colour.
FULL_BETTER, FULL_WORSE = 0.3, 0.05
COLUMNS = 2
CELL_WIDTH, CELL_HEIGHT = 42, 20
LEFT, HEAD, MARGIN = 36, 40, 24


@dataclass(frozen=True, slots=True)
class Panel:
    """A title, the names of lines and columns, and a change for each cell."""

    title: str
    lines: Sequence[str]
    columns: Sequence[str]
    changes: Sequence[Sequence[float]]


def draw(panels: Sequence[Panel], title: str) -> str:
    """The picture's text."""
    wide = LEFT + CELL_WIDTH * max(len(panel.columns) for panel in panels) + MARGIN
    high = HEAD + CELL_HEIGHT * max(len(panel.lines) for panel in panels) + MARGIN
    width, height = MARGIN + COLUMNS * wide, HEAD + math.ceil(len(panels) / COLUMNS) * high
    size = {"viewBox": f"0 0 {width} {height}", "width": f"{width}", "height": f"{height}"}
    style = {"font-family": "sans-serif", "font-size": "11", "fill": INK}
    root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size, **style})
    box(root, 0, 0, width, height, "#ffffff")
    text(root, MARGIN, 25, title, size=14)
    for number, panel in enumerate(panels):
        line, column = divmod(number, COLUMNS)
        place = f"translate({MARGIN + column * wide},{HEAD + line * high})"
        _panel(ET.SubElement(root, "g", {"transform": place}), panel)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _panel(parent: ET.Element, panel: Panel) -> None:
    text(parent, 0, 12, panel.title)
    for column, name in enumerate(panel.columns):
        text(parent, LEFT + (column + 0.5) * CELL_WIDTH, 28, name, size=9, anchor="middle")
    for line, name in enumerate(panel.lines):
        top = 33 + line * CELL_HEIGHT
        text(parent, 0, top + 14, name, size=9)
        for column, change in enumerate(panel.changes[line]):
            left = LEFT + column * CELL_WIDTH
            box(parent, left, top, CELL_WIDTH - 1, CELL_HEIGHT - 1, _colour(change))
            text(parent, left + CELL_WIDTH / 2, top + 14, f"{100 * change:+.1f}", size=9, anchor="middle")


def _colour(change: float) -> str:
    """White for no change."""
    end, full = (BETTER, FULL_BETTER) if change < 0 else (WORSE, FULL_WORSE)
    share = min(abs(change) / full, 1.0)
    return "#" + "".join(f"{round(255 + share * (channel - 255)):02x}" for channel in end)
