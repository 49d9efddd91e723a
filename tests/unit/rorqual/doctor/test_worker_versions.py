"""What `rorqual doctor` says of the versions of workers: alike, mixed, not said, and of itself. Never a failure."""

from __future__ import annotations

import pytest

from rorqual.doctor import network
from rorqual.doctor.finding import Finding, Status
from rorqual.doctor.process import as_text
from rorqual.ids import Incarnation, WorkerId
from rorqual.session import Load, Role, Welcome

LOAD = Load(
    sequences_running=0,
    sequences_waiting=0,
    tokens_waiting=0,
    pages_free=1,
    pages_total=1,
    slots_free=1,
    slots_total=1,
    step_ms=1.0,
    prefill_tokens_per_second=1.0,
)


def greeting(number: int, version: str) -> network.Greeting:
    welcome = Welcome(
        worker_id=WorkerId(f"w{number}"),
        incarnation=Incarnation(1),
        model_fingerprint="abc",
        numerics="served",
        exact=False,
        vocab_size=9,
        sequence_tokens_max=8,
        eos_token_ids=(1,),
        sequences_max=4,
        load=LOAD,
        role=Role.BOTH,
        version=version,
    )
    return network.Greeting(address=f"w{number}:1", welcome=welcome)


def judged(*versions: str, ours: str = "0.2.0") -> list[Finding]:
    greetings = [greeting(number, version) for number, version in enumerate(versions)]
    return network.judge_worker_versions(greetings, ours=ours)


@pytest.mark.parametrize(
    ("versions", "status", "found"),
    [
        (("0.2.0",), Status.OK, "all (1) run rorqual 0.2.0, as this doctor does"),
        (("0.2.0", "0.2.0"), Status.OK, "all (2) run rorqual 0.2.0, as this doctor does"),
        (("0.1.0", "0.1.0"), Status.WARN, "all (2) run rorqual 0.1.0; this doctor is 0.2.0"),
        (
            ("0.1.0", "0.2.0", "0.1.0"),
            Status.WARN,
            "they differ (0.1.0: w0:1, w2:1; 0.2.0: w1:1); this doctor is 0.2.0",
        ),
        (("0.2.0", ""), Status.WARN, "they differ (not said: w1:1; 0.2.0: w0:1); this doctor is 0.2.0"),
        (("",), Status.WARN, "all (1) do not say theirs, as old ones do not; this doctor is 0.2.0"),
    ],
)
def test_versions_are_told(versions: tuple[str, ...], status: Status, found: str):
    (finding,) = judged(*versions)
    assert (finding.check, finding.status, finding.found) == ("worker versions", status, found)


def test_a_mix_says_what_to_do_and_one_that_may_be_fine_says_when():
    (mixed,) = judged("0.1.0", "0.2.0")
    assert "wait" in mixed.cure
    assert "old ReplicaSet" in mixed.cure
    assert f"-> {mixed.cure}" in as_text([mixed])
    (apart,) = judged("0.1.0")
    assert apart.cure.startswith("fine for a doctor that is not of the cluster's image")


def test_who_did_not_welcome_us_has_no_version_and_without_any_nothing_is_told():
    refused = network.Greeting(address="w9:1", code="UNAVAILABLE", text="worker is loading")
    assert network.judge_worker_versions([refused], ours="0.2.0") == []
    (finding,) = network.judge_worker_versions([refused, greeting(0, "0.2.0")], ours="0.2.0")
    assert finding.found == "all (1) run rorqual 0.2.0, as this doctor does"


@pytest.mark.parametrize(("version", "said"), [("0.1.0", "rorqual 0.1.0"), ("", "of an unknown version")])
def test_the_line_of_a_worker_has_its_version(version: str, said: str):
    finding = network.judge_worker(greeting(0, version), is_tls=False)
    assert (finding.status, said in finding.found) == (Status.OK, True)
