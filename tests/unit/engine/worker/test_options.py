"""The command lines of workers: how many drafts and records they ask their ranks for."""

from __future__ import annotations

import pytest

from engine.worker.host import HostConfig
from engine.worker.options import parse_options
from engine.worker.process import rank_settings
from rorqual.errors import ConfigError
from rorqual.ids import Incarnation, WorkerId
from rorqual.session import Role

CONFIG = HostConfig(worker_id=WorkerId("w"), incarnation=Incarnation(1), exact=False, prefill_tokens_max=512)


@pytest.mark.parametrize(
    ("argv", "drafts", "drafts_max"),
    [
        ((), 0, 0),
        (("--drafts", "0"), 0, 0),
        (("--drafts", "3"), 3, 3),
        (("--drafts", "auto"), "auto", 4),
    ],
)
@pytest.mark.parametrize("role", Role)
def test_a_rank_of_any_role_keeps_what_the_drafts_asked_for_need(
    argv: tuple[str, ...], drafts: int | str, drafts_max: int, role: Role
) -> None:
    options, _ = parse_options(["--model", "m", *argv])
    assert options.drafts == drafts
    settings = rank_settings(options, CONFIG, role)
    assert settings.drafts_max == drafts_max
    assert settings.drafts_required == (drafts in (1, 2, 3, 4))


@pytest.mark.parametrize("value", ["5", "-1", "many", "1.5"])
def test_other_numbers_of_drafts_are_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--model", "m", f"--drafts={value}"])
    assert "--drafts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("role", "argv", "num_records", "has_tails"),
    [
        (Role.BOTH, (), 16, True),
        (Role.BOTH, ("--prefix-cache", "off"), 0, False),
        (Role.BOTH, ("--prefix-cache", "off", "--records", "5"), 0, False),
        (Role.BOTH, ("--records", "5"), 5, False),
        (Role.PREFILL, ("--slots", "4"), 8, True),
        (Role.DECODE, ("--slots", "4", "--prefix-cache", "off"), 8, False),
        (Role.DECODE, ("--records", "5"), 5, False),
    ],
)
def test_records_are_there_for_hand_overs_and_slots_and_a_share_of_memory_for_tails(
    role: Role, argv: tuple[str, ...], num_records: int, has_tails: bool
) -> None:
    options, _ = parse_options(["--model", "m", *argv])
    settings = rank_settings(options, CONFIG, role)
    assert (settings.num_records, settings.tail_share > 0) == (num_records, has_tails)


def test_the_help_says_what_records_are_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    assert "tails in 25% of the memory" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("argv", "num_host_pages", "host_bytes"),
    [
        ((), 0, None),
        (("--host-pages", "40"), 40, None),
        (("--host-bytes", "2GB"), 0, 2_000_000_000),
        (("--host-pages", "0", "--prefix-cache", "off"), 0, None),
    ],
)
@pytest.mark.parametrize("role", Role)
def test_host_memory_is_asked_for_in_pages_or_bytes(
    argv: tuple[str, ...], num_host_pages: int, host_bytes: int | None, role: Role
) -> None:
    options, _ = parse_options(["--model", "m", *argv])
    settings = rank_settings(options, CONFIG, role)
    assert (settings.num_host_pages, settings.host_bytes) == (num_host_pages, host_bytes)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (("--host-pages", "-1"), "--host-pages"),
        (("--host-bytes", "0"), "--host-bytes"),
        (("--host-pages", "4", "--prefix-cache", "off"), "--prefix-cache"),
        (("--host-bytes", "1GB", "--prefix-cache", "off"), "--prefix-cache"),
    ],
)
def test_host_memory_that_cannot_be_is_refused(argv: tuple[str, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_options(["--model", "m", *argv])
