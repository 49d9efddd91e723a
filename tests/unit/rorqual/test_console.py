"""The console writes in order, and never makes its caller wait."""

import io
import threading

import pytest

from rorqual.console import Console


class Gate(io.StringIO):
    """A reader that takes nothing until opened."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.writing = threading.Event()

    def write(self, text: str) -> int:
        self.writing.set()
        assert self.opened.wait(10)
        return super().write(text)


def test_lines_come_out_in_order():
    stream = io.StringIO()
    console = Console(stream)
    for number in range(1000):
        console.line(str(number))
    console.close()
    assert stream.getvalue().splitlines() == [str(number) for number in range(1000)]


def test_a_stalled_reader_costs_lines_and_no_time():
    stream = Gate()
    console = Console(stream, lines_max=3)
    console.line("first")
    assert stream.writing.wait(10)  # the writer holds it and is stuck
    for number in range(10):
        console.line(str(number))  # three fit
    stream.opened.set()
    while console._lines.qsize():
        pass
    console.line("last")
    console.close()
    assert stream.getvalue().splitlines() == [
        "first", "0", "1", "2", "(7 lines dropped: the reader of this output was too slow)", "last"
    ]  # fmt: skip


def test_a_reader_that_is_gone_is_forgotten():
    stream = io.StringIO()
    console = Console(stream)
    stream.close()
    console.line("into the void")
    console.line("again")
    console.close()


def test_nothing_is_written_after_close():
    stream = io.StringIO()
    console = Console(stream)
    console.close()
    console.line("late")
    console.close()
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("colour", "line"), [(False, "both-0 | hi\n"), (True, "\x1b[36mboth-0 |\x1b[0m hi\n")]
)
def test_a_childs_line_carries_its_name(colour, line):
    stream = io.StringIO()
    console = Console(stream, colour=colour)
    console.prefixed("both-0", "hi", width=6, number=0)
    console.close()
    assert stream.getvalue() == line
