"""What the benchmark says while it runs."""

import io

from bench.progress import CLEAR_LINE, Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_one_line_is_rewritten_and_nothing_of_it_stays() -> None:
    terminal = Terminal()
    progress = Progress(40.0, terminal)
    progress.show("starting echo")
    progress.advance(10.0)
    progress.show("echo S1, 64 callers")
    progress.close()
    nothing, first, second, last = terminal.getvalue().split(CLEAR_LINE)
    assert first == "bench   0%, 0:40 left: starting echo"
    assert second.startswith("bench  25%")
    assert second.endswith("left: echo S1, 64 callers")
    assert (nothing, last) == ("", "")


def test_elsewhere_lines_are_few() -> None:
    stream = io.StringIO()
    progress = Progress(40.0, stream)
    progress.show("starting echo")
    progress.show("starting unary")
    progress.show("round 1", always=True)
    progress.close()
    first, second = stream.getvalue().splitlines()
    assert first == "bench   0%, 0:40 left: starting echo"
    assert second.endswith("left: round 1")
