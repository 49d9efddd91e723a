"""Log lines: one per event, whatever is in them."""

import io
import logging
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.telemetry import LineFormatter, configure_logging, fields, one_line


def record(message: str, *args: object, level: int = logging.INFO, exc_info=None) -> logging.LogRecord:
    return logging.LogRecord("engine.worker.process", level, "worker.py", 1, message, args, exc_info)


@pytest.fixture
def stream():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    text = io.StringIO()
    yield text
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def test_a_line_has_time_level_name_and_message():
    line = LineFormatter().format(record("opened a sequence %s", fields(request="cmpl-1", tokens=12)))
    moment, rest = line.split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", moment)
    assert rest == "INFO engine.worker.process opened a sequence request=cmpl-1 tokens=12"


@given(st.text(), st.text())
def test_no_text_breaks_a_line_or_reaches_the_terminal_raw(message, value):
    line = LineFormatter().format(record("%s %s", message, fields(value=value)))
    assert line.isprintable()


@given(st.dictionaries(st.sampled_from(["request", "model", "why"]), st.text(), min_size=1))
def test_fields_can_be_read_back(values):
    pattern = re.compile(r'(\w+)=("(?:[^"\\]|\\.)*"|[^ "]+)(?: |$)')
    text = fields(**values)
    assert [name for name, _ in pattern.findall(text)] == list(values)
    assert pattern.sub("", text) == ""


def test_fields_leave_out_none_and_quote_words():
    assert fields(a=1, b=None, c="two words", d=0.123456789, e="") == 'a=1 c="two words" d=0.123457 e=""'


def test_an_exception_stays_on_its_line():
    try:
        raise ValueError("first\nsecond")
    except ValueError as error:
        line = LineFormatter().format(
            record("step failed", exc_info=(ValueError, error, error.__traceback__))
        )
    assert "\n" not in line
    assert 'error="ValueError: first\\nsecond"' in line
    assert "test_telemetry.py:" in line
    assert "test_an_exception_stays_on_its_line" in line


def test_colour_is_for_terminals_only(stream):
    assert "\x1b[33mWARNING" in LineFormatter(colour=True).format(record("x", level=logging.WARNING))
    configure_logging(stream=stream)
    logging.getLogger("a").warning("plain")
    assert "\x1b" not in stream.getvalue()


def test_the_level_is_the_least_severe_that_is_written(stream):
    configure_logging(level="warning", stream=stream)
    logging.getLogger("a").info("quiet")
    logging.getLogger("a").error("loud")
    assert "quiet" not in stream.getvalue()
    assert stream.getvalue().endswith("ERROR a loud\n")


def test_configuring_twice_does_not_double_the_lines(stream):
    configure_logging(stream=stream)
    configure_logging(stream=stream)
    logging.getLogger("a").info("once")
    assert stream.getvalue().count("once") == 1


def test_printable_text_is_untouched():
    assert one_line("größer 鯨 🐋") == "größer 鯨 🐋"
    assert one_line("a\x1b[2Jb") == "a\\x1b[2Jb"
