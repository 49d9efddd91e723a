"""The command lines of workers: how many drafts they ask their ranks for."""

from __future__ import annotations

import pytest

from engine.worker.host import HostConfig
from engine.worker.options import parse_options
from engine.worker.process import rank_settings
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
