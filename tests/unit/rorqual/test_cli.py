"""The `rorqual` command: its table, its help, and how failures become one line."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual import __version__, cli

COMMANDS = (
    cli.Command(name="works", target="fake_target:works", summary="does its work", example="rorqual works"),
    cli.Command(name="fails", target="fake_target:fails", summary="cannot", example="rorqual fails"),
    cli.Command(name="port", target="fake_target:port", summary="cannot bind", example="rorqual port"),
    cli.Command(
        name="stopped", target="fake_target:stopped", summary="was stopped", example="rorqual stopped"
    ),
    cli.Command(name="bug", target="fake_target:bug", summary="has a bug", example="rorqual bug"),
    cli.Command(name="absent", target="no_such_module:main", summary="not there", example="rorqual absent"),
)

TARGET = """
from rorqual.errors import ConfigError
seen = []
def works(argv):
    seen.append(argv)
    return 7
def fails(argv):
    raise ConfigError("config.json: key 'head_dim' is missing")
def port(argv):
    raise OSError(98, "Address already in use")
def stopped(argv):
    raise KeyboardInterrupt
def bug(argv):
    raise ZeroDivisionError
"""


@pytest.fixture(autouse=True)
def target(tmp_path, monkeypatch):
    (tmp_path / "fake_target.py").write_text(TARGET)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("fake_target", None)


def run(capsys, *argv):
    status = cli.main(argv, commands=COMMANDS)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_command_gets_the_arguments_after_its_name_and_gives_its_status(capsys):
    assert run(capsys, "works", "--fast", "x")[0] == 7
    assert sys.modules["fake_target"].seen == [["--fast", "x"]]


def test_nothing_is_imported_for_help(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for command in COMMANDS:
        assert command.summary in out
        assert command.example in out
    assert "fake_target" not in sys.modules


def test_no_command_shows_help_and_fails(capsys):
    assert run(capsys)[0] == 2


def test_the_version_is_the_packages(capsys):
    assert run(capsys, "--version") == (0, f"rorqual {__version__}\n", "")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("fails", "rorqual fails: config.json: key 'head_dim' is missing\n"),
        ("port", "rorqual port: [Errno 98] Address already in use\n"),
    ],
)
def test_an_expected_failure_is_one_line_and_status_one(capsys, name, line):
    assert run(capsys, name) == (1, "", line)


def test_a_missing_package_is_one_line(capsys):
    status, _, err = run(capsys, "absent")
    assert status == 1
    assert "No module named 'no_such_module'" in err
    assert err.count("\n") == 1


def test_a_bug_is_not_swallowed(capsys):
    with pytest.raises(ZeroDivisionError):
        run(capsys, "bug")


def test_ctrl_c_ends_quietly(capsys):
    assert run(capsys, "stopped") == (130, "", "")


@pytest.mark.parametrize(("wrong", "meant"), [("work", "works"), ("fial", "fails"), ("prot", "port")])
def test_an_unknown_command_suggests_the_nearest(capsys, wrong, meant):
    status, out, err = run(capsys, wrong)
    assert (status, out) == (2, "")
    assert f"unknown command '{wrong}'; did you mean '{meant}'?" in err


def test_an_unknown_command_far_from_all_suggests_nothing(capsys):
    status, _, err = run(capsys, "zzzz")
    assert status == 2
    assert "did you mean" not in err


@pytest.mark.parametrize("argv", [["--parent"], ["--parent", "x", "works"]])
def test_parent_needs_a_process_id(capsys, argv):
    assert run(capsys, *argv)[0] == 2


def test_every_command_of_the_real_table_exists():
    for command in cli.COMMANDS:
        module, _, function = command.target.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None, f"{command.name}: no module {module}"
        assert f"def {function}(" in Path(spec.origin).read_text()


def test_a_reader_that_closes_early_gets_no_traceback():
    command = f"{sys.executable} -m rorqual.cli --help | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=20)
    assert "Traceback" not in done.stderr
