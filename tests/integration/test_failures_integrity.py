"""State that is not what was promised, and words that mean another life, model or form of state: each is refused or
found out, nobody is harmed, and the next request is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from engine.worker.wire import ATTACH_PATH, RENEW_PATH, AttachRequest, encode_attach_request
from rorqual.ids import Incarnation, LeaseName, SequenceId
from rorqual.sampling import SamplingParams
from rorqual.session import Cancel, ErrorCode, FinishReason, Open, Renew, SequenceReport, Source
from tests.harness.asking import ask
from tests.harness.failures import (
    NUM_TOKENS,
    PATIENT,
    PROMPT,
    RETURN_SECONDS_MAX,
    SLACK_SECONDS,
    check_serving,
    endpoint_of,
    living,
    spoil,
    unread,
)
from tests.harness.pools import Pools
from tests.harness.raw_session import RawSession, raw_session, refusal, release, renew
from tests.harness.system import wait_until

pytestmark = [pytest.mark.minutes, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def routed(two_of_each: Pools) -> Iterator[Pools]:
    """Memory is spoiled here where it lies, on an owner that must not go on from it: so nothing is kept, and everything
    is read."""
    workers = [*living(two_of_each, "prefill"), *living(two_of_each, "decode")]
    for name in workers:
        two_of_each.restart(name, "--prefix-cache", "off")
    two_of_each.restart("router", *PATIENT)
    yield two_of_each
    for name in workers:
        two_of_each.restart(name)


@pytest.fixture
def pools(routed: Pools) -> Iterator[Pools]:
    yield routed
    routed.heal()


def outcomes(pools: Pools, outcome: str) -> float:
    return sum(
        pools[name].by_label("rorqual_worker_hand_overs_total", "outcome").get(outcome, 0)
        for name in living(pools, "decode")
    )


@pytest.mark.parametrize("region", ["c4", "records"])
def test_state_that_has_changed_since_it_was_offered_is_not_used(
    pools: Pools, expected: list[int], region: str
) -> None:
    decoders = living(pools, "decode")
    failed = outcomes(pools, "failed")
    asking, lender = unread(pools)
    spoil(pools[lender].rank, endpoint_of(pools, lender), region, at=100)
    pools.resume(*decoders)
    code, message = asking.error(seconds_max=SLACK_SECONDS)
    assert code == "worker_lost"
    what = "record " if region == "records" else f" of {region}: "
    assert what in message
    assert "digest differs" in message
    assert asking.tokens == expected[:1]
    assert outcomes(pools, "failed") == failed + 3  # it is read anew, twice, before it is given up
    check_serving(pools, expected)


def test_a_reader_of_another_form_or_another_life_learns_nothing(pools: Pools) -> None:
    address = pools["prefill-0"].address
    with raw_session(address) as session:
        welcome = session.welcome
    sent = pools["prefill-0"].metrics()["rorqual_worker_endpoints_sent_total"]
    other = AttachRequest(incarnation=welcome.incarnation, wire_id="another")
    assert refusal(address, ATTACH_PATH, encode_attach_request(other)) == (
        "FAILED_PRECONDITION",
        f"state here has wire id {welcome.wire_id}, not another (model, numerics, or --drafts 0 on one side only)",
    )
    old = AttachRequest(incarnation=Incarnation(welcome.incarnation ^ 1), wire_id=welcome.wire_id)
    assert refusal(address, ATTACH_PATH, encode_attach_request(old)) == (
        "FAILED_PRECONDITION",
        f"this is incarnation {welcome.incarnation:x}, not {welcome.incarnation ^ 1:x}",
    )
    for path in (ATTACH_PATH, RENEW_PATH):
        assert refusal(address, path, b"\xff\xff")[0] == "INVALID_ARGUMENT"
    assert pools["prefill-0"].metrics()["rorqual_worker_endpoints_sent_total"] == sent


def an_open(*, source: Source | None = None) -> Open:
    return Open(
        sequence_id=SequenceId(1),
        request_id="a test's",
        prompt=np.array(PROMPT, dtype=np.int32),
        max_tokens=NUM_TOKENS,
        ignore_eos=True,
        sampling=SamplingParams(seed=0, temperature=0.0),
        source=source,
    )


def lend_to(session: RawSession) -> LeaseName:
    """A prompt is computed for a test; the lease its whole state is under."""
    session.send(an_open())
    report = session.wait_for(lambda item: item.offer is not None and item.offer.record is not None)
    assert report.offer is not None
    return report.offer.lease


def test_a_decode_worker_refuses_state_that_it_cannot_read(pools: Pools, expected: list[int]) -> None:
    decode, prefill = pools["decode-0"], pools["prefill-0"]
    lease = LeaseName(worker_id="prefill-0", incarnation=1, lease_id=0, generation=1)
    with raw_session(decode.address) as session:
        source = Source(address=prefill.address, lease=lease, wire_id="another")
        session.send(an_open(source=source))
        report = session.wait_for(is_last)
        assert (report.finish_reason, report.error_code) == (FinishReason.ERROR, ErrorCode.INVALID)
        text = f"state has wire id another; this worker reads {session.welcome.wire_id}"
        assert report.error == f"{text} (model, numerics, or --drafts 0 on one side only)"
        # Nor state under a lease of a life that has ended.
        session.send(an_open(source=replace(source, wire_id=session.welcome.wire_id)))
        report = session.wait_for(is_last)
        assert (report.finish_reason, report.error_code) == (FinishReason.ERROR, ErrorCode.FAILED)
        assert "this is incarnation" in report.error
        assert not report.bound
    check_serving(pools, expected)


def is_last(report: SequenceReport) -> bool:
    return report.finish_reason is not None


def test_the_names_of_leases_that_are_over_harm_nothing(pools: Pools, expected: list[int]) -> None:
    prefill = pools["prefill-0"]
    address = prefill.address
    with raw_session(address) as session:
        first = lend_to(session)
        session.send(Cancel(sequence_id=SequenceId(1)))
        session.wait_for(is_last)
        pools.wait_until_idle(seconds_max=RETURN_SECONDS_MAX)
        assert not renew(address, first).live
        lease = lend_to(session)
        assert (lease.lease_id, lease.generation) == (first.lease_id, first.generation + 1)
        others = (
            first,
            replace(lease, generation=lease.generation + 1),
            replace(lease, incarnation=lease.incarnation ^ 1),
            replace(lease, worker_id="prefill-1"),
            replace(lease, lease_id=lease.lease_id + 1),
        )
        for name in others:
            assert not renew(address, name).live
            assert not release(address, name).live
        assert renew(address, lease).live  # still
        # The session's word, for another sequence, is passed over too.
        session.send(Renew(sequence_ids=(SequenceId(77),)))
        assert release(address, lease).live
        assert session.wait_for(is_last).finish_reason is FinishReason.HANDED_OVER
        assert not release(address, lease).live
        assert not renew(address, lease).live
    check_serving(pools, expected)


def test_one_started_again_knows_nothing_of_what_it_lent_before(pools: Pools, expected: list[int]) -> None:
    prefill = pools["prefill-0"]
    with raw_session(prefill.address) as session:
        old, welcome = lend_to(session), session.welcome
    pools.kill("prefill-0")
    pools.restart("prefill-0")
    with raw_session(prefill.address) as session:
        assert session.welcome.incarnation != old.incarnation
        lease = lend_to(session)
        # Of the name that the lease would have had in that life, too.
        for name in (old, replace(lease, incarnation=old.incarnation)):
            assert not renew(prefill.address, name).live
            assert not release(prefill.address, name).live
        assert renew(prefill.address, lease).live
        request = AttachRequest(incarnation=old.incarnation, wire_id=welcome.wire_id)
        code, message = refusal(prefill.address, ATTACH_PATH, encode_attach_request(request))
        assert (code, "this is incarnation" in message) == ("FAILED_PRECONDITION", True)
    check_serving(pools, expected)


def test_a_worker_of_other_numerics_is_left_out_and_the_rest_serve(pools: Pools, expected: list[int]) -> None:
    router = pools["router"]
    pools.kill("decode-1")
    odd = pools.restart("decode-1", "--numerics", "served", wait=False)
    try:
        odd.wait_until_ready()
        with raw_session(odd.address) as session, raw_session(pools["decode-0"].address) as other:
            assert session.welcome.wire_id != other.welcome.wire_id
        wait_until(lambda: f"{odd.address} serves" in router.output(), seconds_max=SLACK_SECONDS)
        for _ in range(3):
            assert ask(pools, PROMPT, max_tokens=NUM_TOKENS).result() == expected
        assert router.metrics()["rorqual_router_workers_connected"] == 3
        assert odd.metrics()["rorqual_worker_sequences_opened_total"] == 0
    finally:
        pools.kill("decode-1")
