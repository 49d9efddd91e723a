"""The link to a rank process: frames both ways, and a rank's last words are heard however it ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvloop

from engine.frames import FrameError
from engine.plan import RankFailed, RankProgress, RankReady, RankSettings, Segment, SlotOpen, StepPlan
from engine.worker.rank_link import RankLost, RankProcess, start_rank
from rorqual.sampling import SamplingParams

FAKE_RANK = Path(__file__).parents[3] / "fakes" / "fake_rank_process.py"
SETTINGS = RankSettings(
    model="a-model",
    numerics="float32",
    exact=False,
    num_pages=8,
    kv_bytes=None,
    num_slots=2,
    prefill_tokens_max=512,
    threads=1,
    kernels={},
)

# Says what the test wants, byte for byte, once it has read its settings.
SCRIPT = """
import sys, time
from engine.frames import encode_frame, join_host, read_frame
from engine.plan import RankFailed
connection = join_host(int(sys.argv[-1]))
read_frame(connection)
{body}
"""


@asynccontextmanager
async def a_rank(*command: str) -> AsyncIterator[RankProcess]:
    link = await start_rank(SETTINGS, command=(sys.executable, *command))
    try:
        async with asyncio.timeout(20):
            yield link
    finally:
        await link.stop(seconds_max=5)


def a_plan(number: int) -> StepPlan:
    opened = SlotOpen(slot=0, tokens=b"\x05\0\0\0", num_prompt=1, sampling=SamplingParams(seed=1))
    segment = Segment(slot=0, start=number - 1, count=1, pages=(0,) if number == 1 else (), sample=True)
    return StepPlan(number=number, closes=(), opens=(opened,) if number == 1 else (), segments=(segment,))


@pytest.mark.parametrize(
    "factory", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"]
)
def test_settings_plans_and_results_cross_and_the_rank_stops_when_asked(factory: object) -> None:
    async def story() -> None:
        async with a_rank(str(FAKE_RANK)) as link:
            assert isinstance(await link.receive(), RankProgress)
            ready = await link.receive()
            assert isinstance(ready, RankReady)
            assert (ready.num_pages, ready.num_slots) == (8, 2)
            for number in (1, 2):
                link.send(a_plan(number))
            assert [(await link.receive()).number for _ in range(2)] == [1, 2]
        with pytest.raises(RankLost, match="ended: exit status 0"):
            await link.receive()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(story())


@pytest.mark.parametrize("num_plans", [0, 5])
async def test_why_a_rank_failed_is_heard_though_it_left_plans_unread(num_plans: int) -> None:
    body = "time.sleep(0.1); connection.sendall(encode_frame(RankFailed(message='out of memory')))"
    async with a_rank("-c", SCRIPT.format(body=body)) as link:
        for number in range(1, num_plans + 1):
            link.send(a_plan(number))
        # Blocks the loop, so that nothing of what the rank said is read before it has ended.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, link.pid, os.WEXITED | os.WNOWAIT)  # noqa: ASYNC222
        link.send(a_plan(num_plans + 1))
        assert await link.receive() == RankFailed(message="out of memory")
        with pytest.raises(RankLost, match="exit status 0"):
            await link.receive()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("connection.sendall(bytes([255, 255, 255, 255]))", "exceeds the bound"),
        ("connection.sendall(bytes([1, 0, 0, 0, 193]))", "rank sent a frame that does not decode"),
    ],
)
async def test_a_rank_that_sends_nonsense_is_a_frame_error(body: str, text: str) -> None:
    async with a_rank("-c", SCRIPT.format(body=body)) as link:
        with pytest.raises(FrameError, match=text):
            await link.receive()


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("connection.sendall(bytes([9, 0, 0, 0, 1]))", "exit status 0"),
        ("raise SystemExit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 9)", "killed by SIGKILL"),
    ],
)
async def test_how_a_rank_ended_is_said(body: str, text: str) -> None:
    async with a_rank("-c", SCRIPT.format(body=body)) as link:
        with pytest.raises(RankLost, match=text):
            await link.receive()


async def test_after_nonsense_nothing_more_is_kept() -> None:
    body = "connection.sendall(bytes([255] * 4) + bytes(40_000_000))"
    async with a_rank("-c", SCRIPT.format(body=body)) as link:
        with pytest.raises(FrameError, match="exceeds the bound"):
            await link.receive()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        await link._process.wait()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize("when", ["connecting", "starting"])
async def test_a_start_that_is_cancelled_leaves_no_process_and_no_socket(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid_file = tmp_path / "pid"
    script = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()) + ';'); time.sleep(60)"
    num_sockets = len(os.listdir("/proc/self/fd"))
    if when == "connecting":

        async def connect(*_args: object, **_options: object) -> None:
            await asyncio.Event().wait()

        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", connect)
    starting = asyncio.create_task(start_rank(SETTINGS, command=(sys.executable, "-c", script)))
    if when == "connecting":
        while not (pid_file.exists() and pid_file.read_text().endswith(";")):
            await asyncio.sleep(0.01)
    else:
        await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    if when == "connecting":
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text().rstrip(";")), 0)
    await asyncio.sleep(0.05)
    assert len(os.listdir("/proc/self/fd")) <= num_sockets


async def test_a_rank_that_cannot_be_started_is_one_clear_line() -> None:
    with pytest.raises(RankLost, match=r"cannot be started: .*No such file"):
        await start_rank(SETTINGS, command=("/absent/program",))
