"""The command line of the router: every stage has an option, and what cannot be meant is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.service import STORE_VARIABLE
from router.process import RouterOptions, parse_options

BASE = ["--worker", "127.0.0.1:1", "--model", "m"]


def test_without_options_the_defaults_are_those_of_the_dataclass() -> None:
    options, log_level = parse_options(BASE)
    assert options == RouterOptions(workers=("127.0.0.1:1",), model=Path("m"))
    assert log_level == "info"


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("--start-seconds", "start_seconds_max"),
        ("--connect-seconds", "connect_seconds_max"),
        ("--silence-seconds", "silence_seconds_max"),
        ("--place-seconds", "place_seconds_max"),
        ("--credit-seconds", "credit_seconds_max"),
        ("--first-token-seconds", "first_token_seconds_max"),
        ("--hand-over-seconds", "hand_over_seconds_max"),
        ("--next-token-seconds", "next_token_seconds_max"),
        ("--drain-seconds", "drain_seconds_max"),
        ("--credit-queue", "credit_queue_max"),
        ("--requests-max", "requests_max"),
        ("--sequences-per-worker", "sequences_per_worker_max"),
        ("--bind-early-tokens", "bind_early_tokens"),
    ],
)
def test_each_bound_has_an_option_and_refuses_what_is_no_bound(option: str, field: str) -> None:
    options, _ = parse_options([*BASE, option, "17"])
    assert getattr(options, field) == 17
    with pytest.raises(ConfigError, match=f"{option} must be"):
        parse_options([*BASE, option, "-1"])


def test_binding_early_may_be_for_every_prompt_and_no_deadline_may_be_nothing() -> None:
    assert parse_options([*BASE, "--bind-early-tokens", "0"])[0].bind_early_tokens == 0
    for value in ("0", "nan"):
        with pytest.raises(ConfigError, match="--credit-seconds must be above 0"):
            parse_options([*BASE, "--credit-seconds", value])


def test_the_store_comes_from_the_environment_or_its_option_and_its_password_is_never_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(STORE_VARIABLE, "redis://user:secret@host:6379")
    options, _ = parse_options(BASE)
    assert options.store == "redis://user:secret@host:6379"
    assert "secret" not in repr(options)
    assert parse_options([*BASE, "--store", "redis://other"])[0].store == "redis://other"
    assert parse_options([*BASE, "--store", "none"])[0].store == ""
    with pytest.raises(ConfigError, match="begins with one of") as error:
        parse_options([*BASE, "--store", "http://user:secret@host"])
    assert "secret" not in str(error.value)
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    assert "secret" not in capsys.readouterr().out


def test_sources_are_read_at_once_and_stand_beside_workers_or_for_them() -> None:
    source = ["--discover", "dns:decode:9000", "--discover", "file:x?pool=p", "--discover", "file:x?pool=p"]
    options, _ = parse_options(["--model", "m", *source])
    assert options.workers == ()
    assert [spec.text for spec in options.discover] == ["dns:decode:9000", "file:x?pool=p"]
    assert parse_options([*BASE, *source])[0].workers == ("127.0.0.1:1",)
    with pytest.raises(ConfigError, match=r"--discover must be .*, not 'etcd:x'"):
        parse_options(["--model", "m", "--discover", "etcd:x"])
    with pytest.raises(ConfigError, match="give --worker HOST:PORT or --discover SOURCE"):
        parse_options(["--model", "m"])
