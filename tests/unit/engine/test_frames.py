"""Frames cross a socket whole, and what is not a frame is refused."""

from __future__ import annotations

import socket
import struct
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.frames import (
    FRAME_BYTES_MAX,
    FrameError,
    decode_from_rank,
    decode_to_rank,
    encode_frame,
    payload_bytes,
    read_frame,
    write_frame,
)
from engine.plan import (
    RankFailed,
    RankSettings,
    Sampled,
    Segment,
    Shutdown,
    SlotOpen,
    StepPlan,
    StepResult,
)
from rorqual.sampling import SamplingParams

plans = st.builds(
    StepPlan,
    number=st.integers(1, 2**40),
    closes=st.lists(st.integers(0, 99), max_size=3).map(tuple),
    opens=st.lists(
        st.builds(
            SlotOpen,
            slot=st.integers(0, 99),
            tokens=st.binary(max_size=40),
            num_prompt=st.integers(1, 9),
            sampling=st.builds(SamplingParams, seed=st.integers(0, 2**63 - 1), top_p=st.floats(0, 1)),
        ),
        max_size=3,
    ).map(tuple),
    segments=st.lists(
        st.builds(
            Segment,
            slot=st.integers(0, 99),
            start=st.integers(0, 2**20),
            count=st.integers(1, 512),
            pages=st.lists(st.integers(0, 2**20), max_size=3).map(tuple),
            sample=st.booleans(),
        ),
        max_size=3,
    ).map(tuple),
)
settings_frame = RankSettings(
    model="m",
    numerics="served",
    exact=True,
    num_pages=None,
    kv_bytes=5,
    num_slots=4,
    prefill_tokens_max=512,
    threads=1,
    kernels={"a": "b"},
)


@given(st.lists(plans | st.just(Shutdown()) | st.just(settings_frame), max_size=4), st.integers(1, 50))
def test_messages_to_the_rank_arrive_as_sent_however_the_bytes_are_cut(messages: list, cut: int) -> None:
    host, rank = socket.socketpair()
    data = b"".join(encode_frame(message) for message in messages)
    with host, rank:

        def send() -> None:
            for start in range(0, len(data), cut):
                host.sendall(data[start : start + cut])
            host.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        received = []
        while (message := read_frame(rank)) is not None:
            received.append(message)
        sender.join()
    assert received == messages


def test_a_message_from_the_rank_decodes_on_the_host() -> None:
    host, rank = socket.socketpair()
    result = StepResult(
        number=3,
        sampled=(Sampled(slot=1, token_id=7, logprob=-0.5, alternatives=((7, -0.5), (2, -3.0))),),
        prompt_scores=(),
        step_ms=1.5,
    )
    with host, rank:
        write_frame(rank, result)
        data = host.recv(65536)
    assert payload_bytes(data[:4]) == len(data) - 4
    assert decode_from_rank(data[4:]) == result


def test_a_host_that_dies_within_a_frame_is_the_end_of_the_stream() -> None:
    host, rank = socket.socketpair()
    with rank:
        host.sendall(encode_frame(Shutdown())[:-1])
        host.close()
        assert read_frame(rank) is None


def test_a_frame_beyond_the_bound_is_refused_before_it_is_read() -> None:
    host, rank = socket.socketpair()
    with host, rank:
        host.sendall(struct.pack("<I", FRAME_BYTES_MAX + 1))
        with pytest.raises(FrameError, match="exceeds the bound"):
            read_frame(rank)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x91\x05", encode_frame(RankFailed(message="x"))[4:]])
def test_bytes_that_are_no_message_to_the_rank_are_a_frame_error(data: bytes) -> None:
    with pytest.raises(FrameError, match="does not decode"):
        decode_to_rank(data)
