"""The real rank as a process, with the test as its host."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.frames import HEADER, decode_from_rank, encode_frame, payload_bytes
from engine.plan import FromRank, RankReady, RankSettings, Segment, SlotOpen, StepPlan, StepResult
from rorqual.sampling import SamplingParams
from tests.harness.system import IDS_CONFIG, make_checkpoint

NUM_TOKENS = 512


class RankUnderTest:
    def __init__(self, model: Path, *, numerics: str | None = "float32") -> None:
        self.host, theirs = socket.socketpair()
        self.host.settimeout(60)
        with theirs:
            command = [sys.executable, "-m", "engine.rank", "--fd", str(theirs.fileno())]
            self.process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        settings = RankSettings(
            model=str(model),
            numerics=numerics,
            exact=False,
            num_pages=8,
            kv_bytes=None,
            num_slots=2,
            prefill_tokens_max=NUM_TOKENS,
            threads=1,
            kernels={},
        )
        self.host.sendall(encode_frame(settings))

    def receive(self) -> FromRank:
        return decode_from_rank(self._read(payload_bytes(self._read(HEADER.size))))

    def ready(self) -> RankReady:
        while not isinstance(message := self.receive(), RankReady):
            pass
        return message

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self.host.recv(size - len(data))
            assert part, self.process.communicate()[1]
            data += part
        return bytes(data)


@pytest.fixture
def rank(ids_model: Path) -> Iterator[RankUnderTest]:
    rank = RankUnderTest(ids_model)
    yield rank
    rank.host.close()
    rank.process.kill()
    rank.process.communicate()


@pytest.mark.parametrize(("weights", "numerics"), [("quantised", "served"), ("float32", "float32")])
def test_numerics_are_the_checkpoints_own_unless_told(weights: str, numerics: str, tmp_path: Path) -> None:
    rank = RankUnderTest(make_checkpoint(tmp_path, IDS_CONFIG, name="m", weights=weights), numerics=None)
    try:
        assert rank.ready().numerics == numerics
    finally:
        rank.host.close()
        rank.process.kill()
        rank.process.communicate()


def a_plan(*, prompt_logprobs: int | None = None) -> StepPlan:
    tokens = b"".join(token.to_bytes(4, "little") for token in range(NUM_TOKENS))
    sampling = SamplingParams(seed=1, prompt_logprobs=prompt_logprobs)
    opened = SlotOpen(slot=0, tokens=tokens, num_prompt=NUM_TOKENS, sampling=sampling)
    segment = Segment(slot=0, start=0, count=NUM_TOKENS, pages=(0, 1), sample=True)
    return StepPlan(number=1, closes=(), opens=(opened,), segments=(segment,))


@pytest.mark.slow
def test_a_rank_whose_host_is_gone_in_the_middle_of_a_step_ends_without_a_word(rank: RankUnderTest) -> None:
    rank.ready()
    # Stopped, so that the step is certainly not done before the host is gone.
    rank.process.send_signal(signal.SIGSTOP)
    rank.host.sendall(encode_frame(a_plan()))
    rank.host.close()
    rank.process.send_signal(signal.SIGCONT)
    _, output = rank.process.communicate(timeout=60)
    assert (rank.process.returncode, output) == (0, "")


@pytest.mark.slow
def test_scores_of_a_chunk_come_with_its_step(rank: RankUnderTest) -> None:
    ready = rank.ready()
    assert ready.has_mtp
    assert ready.notices == ()
    rank.host.sendall(encode_frame(a_plan(prompt_logprobs=1)))
    result = rank.receive()
    assert isinstance(result, StepResult)
    scored = [item.first + index for item in result.prompt_scores for index in range(len(item.logprobs))]
    assert scored == list(range(1, NUM_TOKENS))
