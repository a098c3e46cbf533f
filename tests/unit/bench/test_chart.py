"""The benchmark's picture."""

from xml.etree import ElementTree as ET

import pytest

from bench.chart import COLOURS, draw, short
from bench.plan import Case
from bench.results import collect
from tests.unit.bench.builders import figures, group

RECT, TEXT = "{http://www.w3.org/2000/svg}rect", "{http://www.w3.org/2000/svg}text"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.00"),
        (0.516, "0.52"),
        (0.9996, "1.0"),
        (8.14, "8.1"),
        (9.996, "10"),
        (64.4, "64"),
        (999.4, "999"),
        (999.6, "1.0k"),
        (5_254, "5.3k"),
        (9_951, "10k"),
        (48_960, "49k"),
    ],
)
def test_numbers_over_bars_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_bars_are_as_high_as_their_share_of_the_highest_in_the_panel() -> None:
    cases = [Case(system, "S1", 64) for system in COLOURS]
    rounds = {case: [figures(1000.0 * (number + 1))] for number, case in enumerate(cases)}
    picture = ET.fromstring(draw(collect(group(*cases), rounds), "here & now"))

    bars = [
        rect for rect in picture.iter(RECT) if float(rect.get("height", "0")) > 12 and rect.get("fill") != "#ffffff"
    ]
    heights = [float(bar.get("height", "0")) for bar in bars]
    assert [bar.get("fill") for bar in bars] == list(COLOURS.values())
    assert [height / heights[4] for height in heights] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1], abs=0.01)
    texts = [text.text for text in picture.iter(TEXT)]
    assert {"1.0k", "2.0k", "3.0k", "4.0k", "5.0k", "64 callers"} <= set(texts)
    assert texts[0] == "A title. here & now"
