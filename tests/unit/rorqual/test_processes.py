"""Child processes: their lines, their ends, and the ends of what they started."""

import asyncio
import os
import signal
import sys

import pytest

from rorqual.processes import LINE_BYTES_MAX, describe_exit, start_child, stop_children


async def lines_of(script: str) -> tuple[list[str], int]:
    lines: list[str] = []
    child = start_child(
        [sys.executable, "-c", script], name="child", environment=os.environ, on_line=lines.append
    )
    await asyncio.wait_for(child.run(), 20)
    assert child.exit_status is not None
    return lines, child.exit_status


async def test_every_line_is_heard_and_the_exit_status_known():
    lines, status = await lines_of(
        "import sys; print('out',flush=True); print('err',file=sys.stderr); sys.stdout.write('rest'); exit(3)"
    )
    assert lines[:1] == ["out"]
    assert sorted(lines) == ["err", "out", "rest"]
    assert status == 3


async def test_the_last_lines_are_kept_and_no_more():
    child = start_child(
        [sys.executable, "-c", "for i in range(100): print(i)"],
        name="c",
        environment=os.environ,
        on_line=lambda _: None,
    )
    await child.run()
    assert list(child.tail) == [str(number) for number in range(92, 100)]


async def test_a_line_without_end_is_cut_and_bad_bytes_are_shown():
    lines, _ = await lines_of(
        "import os; os.write(1, b'y' * 300_000); os.write(1, b'\\n\\xff\\n50%\\r60%\\n')"
    )
    assert all(len(line) <= LINE_BYTES_MAX for line in lines)
    assert lines[-2:] == ["\ufffd", "60%"], "of a progress bar only the last state is a line"


async def test_what_a_child_leaves_in_its_group_is_ended_with_it(is_alive):
    script = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid, flush=True)"
    lines, status = await lines_of(script)  # returns although the grandchild holds the pipe
    assert status == 0
    for _ in range(500):
        if not is_alive(int(lines[0])):
            return
        await asyncio.sleep(0.01)
    pytest.fail("the grandchild lives on")


async def test_a_cancelled_run_ends_the_child():
    child = start_child([sys.executable, "-c", "input()"], name="c", environment=os.environ, on_line=print)
    sleeper = start_child(["sleep", "60"], name="s", environment=os.environ, on_line=print)
    await child.run()
    task = asyncio.ensure_future(sleeper.run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sleeper.exit_status == -signal.SIGKILL


async def test_stopping_is_orderly_first_and_by_force_at_the_deadline():
    polite = start_child(["sleep", "60"], name="polite", environment=os.environ, on_line=print)
    heard = asyncio.Event()
    ignoring = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    deaf = start_child(
        [sys.executable, "-c", ignoring],
        name="deaf",
        environment=os.environ,
        on_line=lambda _: heard.set(),
    )
    runs = asyncio.gather(polite.run(), deaf.run())
    await asyncio.wait_for(heard.wait(), 20)
    late = await stop_children([polite, deaf], grace_seconds=0.3, is_hurried=lambda: False)
    await runs
    assert late == [deaf]
    assert polite.exit_status == -signal.SIGTERM
    assert deaf.exit_status == -signal.SIGKILL


async def test_a_hurried_stop_does_not_wait():
    child = start_child(["sleep", "60"], name="s", environment=os.environ, on_line=print)
    run = asyncio.ensure_future(child.run())
    loop = asyncio.get_running_loop()
    start = loop.time()
    assert await stop_children([child], grace_seconds=60, is_hurried=lambda: True) == [child]
    await run
    assert loop.time() - start < 10


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (0, "exit status 0"),
        (3, "exit status 3"),
        (-15, "killed by SIGTERM"),
        (-9, "killed by SIGKILL (out of memory?)"),
    ],
)
def test_exits_are_described_for_people(status, text):
    assert describe_exit(status) == text
