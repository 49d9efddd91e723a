"""What `rorqual up` makes of its command line: how many workers of which kind, with how many threads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import ConfigError
from rorqual.up_options import (
    parse_options,
    plan_workers,
    router_arguments,
    threads_per_worker,
    worker_arguments,
)


def counts(*argv: str) -> tuple[int, int, int]:
    options = parse_options(["--model", "m", *argv])
    return options.num_prefill, options.num_decode, options.num_both


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ((), (1, 1, 0)),
        (("--both", "1"), (0, 0, 1)),
        (("--prefill", "2", "--decode", "3"), (2, 3, 0)),
        (("--prefill", "1", "--decode", "1", "--both", "2"), (1, 1, 2)),
        (("--prefill", "0", "--both", "1"), (0, 0, 1)),
        (("--prefill", "1", "--both", "1"), (1, 0, 1)),
        (("--prefill", "32", "--decode", "32"), (32, 32, 0)),
    ],
    ids=str,
)
def test_naming_a_kind_of_worker_leaves_the_unnamed_out(argv, expected):
    assert counts(*argv) == expected


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--both", "-1"], "--both must be between 0 and 64, not -1"),
        (["--decode", "65"], "--decode must be between 0 and 64, not 65"),
        (["--both", "0"], "leave no worker at all"),
        (["--prefill", "0", "--decode", "0"], "leave no worker at all"),
        (["--prefill", "2"], "--prefill 2 needs a worker that goes on: add --decode N"),
        (["--decode", "1"], "--decode 1 needs a worker that computes prompts: add --prefill N"),
        (["--prefill", "32", "--decode", "32", "--both", "1"], "65 workers; at most 64"),
        (["--http", "65536"], "--http must be a port"),
        (["--grpc", "-1"], "--grpc must be a port"),
        (["--prefill-tokens", "0"], "--prefill-tokens must be at least 1, not 0"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--bind-early-tokens", "-1"], "--bind-early-tokens must be at least 0, not -1"),
        (["--credit-seconds", "0"], "--credit-seconds must be above 0"),
        (["--hand-over-seconds", "nan"], "--hand-over-seconds must be above 0, not nan"),
        (["--exact", "--threads", "2"], "--exact computes with one thread; leave out --threads 2"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_refused_by_name(argv, complaint):
    with pytest.raises(ConfigError, match=complaint):
        parse_options(["--model", "m", *argv])


def test_an_unknown_way_of_transfer_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--model", "m", "--transfer", "pigeon"])
    assert "pigeon" in capsys.readouterr().err


def test_all_workers_are_told_the_same_number_of_drafts(tmp_path):
    for argv, told in (((), []), (("--drafts", "auto"), ["auto"]), (("--drafts", "2"), ["2"])):
        options = parse_options(["--model", "m", "--prefill", "1", "--decode", "2", "--both", "1", *argv])
        for plan in plan_workers(options, num_cores=8):
            arguments = worker_arguments(options, plan, ready_file=tmp_path / "ready")
            after = [arguments[index + 1] for index, word in enumerate(arguments) if word == "--drafts"]
            assert after == told


def test_an_unknown_number_of_drafts_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--model", "m", "--drafts", "5"])
    assert "--drafts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_cores", "num_heavy", "num_decode", "expected"),
    [
        (1, 1, 0, 1),
        (2, 1, 0, 1),
        (2, 4, 0, 1),
        (16, 1, 0, 15),
        (16, 4, 0, 3),
        (1, 1, 1, (1, 1)),
        (2, 1, 1, (1, 1)),
        (4, 1, 1, (2, 1)),
        (8, 1, 1, (5, 2)),
        (16, 1, 1, (10, 5)),
        (16, 1, 3, (6, 3)),
        (16, 3, 1, (4, 2)),
        (4, 3, 1, (1, 1)),
    ],
)
def test_threads_go_to_prompts_first_and_leave_a_core_for_the_router(
    num_cores, num_heavy, num_decode, expected
):
    heavy, decode = threads_per_worker(
        num_cores=num_cores, num_heavy=num_heavy, num_decode=num_decode, exact=False
    )
    assert (heavy if num_decode == 0 else (heavy, decode)) == expected


@given(st.integers(1, 256), st.integers(1, 32), st.integers(0, 32))
def test_threads_never_outnumber_the_cores_unless_the_workers_do(num_cores, num_heavy, num_decode):
    heavy, decode = threads_per_worker(
        num_cores=num_cores, num_heavy=num_heavy, num_decode=num_decode, exact=False
    )
    assert heavy >= decode >= 1
    total = num_heavy * heavy + num_decode * decode
    if num_heavy + num_decode < num_cores:
        assert total <= num_cores - 1
        assert total > num_cores - 1 - num_heavy, "a core lies idle"


def test_exact_workers_have_one_thread_each_however_many_cores_there_are():
    options = parse_options(["--model", "m", "--exact"])
    assert [plan.threads for plan in plan_workers(options, num_cores=16)] == [1, 1]


def test_all_workers_keep_prefixes_or_none_and_the_router_hears_of_a_shared_salt(tmp_path):
    argv = ["--model", "m", "--prefix-cache", "off", "--shared-cache-salt", "public"]
    options = parse_options(argv)
    for plan in plan_workers(options, num_cores=8):
        arguments = worker_arguments(options, plan, ready_file=tmp_path / "ready")
        assert arguments[arguments.index("--prefix-cache") + 1] == "off"
    arguments = router_arguments(options, addresses=["a:1"], ready_file=tmp_path / "ready", api_key_file=None)
    assert arguments[arguments.index("--shared-cache-salt") + 1] == "public"


@pytest.mark.parametrize("size", [("--host-pages", "40"), ("--host-bytes", "8GB")])
def test_every_worker_has_the_host_memory_that_was_asked_for(size, tmp_path):
    options = parse_options(["--model", "m", *size])
    for plan in plan_workers(options, num_cores=8):
        arguments = worker_arguments(options, plan, ready_file=tmp_path / "ready")
        assert arguments[arguments.index(size[0]) + 1] == size[1]
    with pytest.raises(ConfigError, match="--host-pages"):
        parse_options(["--model", "m", "--host-pages", "-1"])
