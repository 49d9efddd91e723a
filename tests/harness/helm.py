"""Runs of real Helm and kubectl against a stand-in API server, each with folders of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

RUN_SECONDS_MAX = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    status: int
    output: str
    errors: str


class Tool:
    """`await Tool(path, ...)("get", "pods")`: its output. A status other than 0 fails the test; `may_fail` shows it."""

    def __init__(self, program: Path, *, kubeconfig: Path, home: Path) -> None:
        self._program = program
        self._env = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),  # caches and settings of both programs
            "KUBECONFIG": str(kubeconfig),
        }

    async def __call__(self, *words: str) -> str:
        done = await self.may_fail(*words)
        assert done.status == 0, f"{' '.join(words)}: status {done.status}\n{done.output}{done.errors}"
        return done.output

    async def may_fail(self, *words: str) -> Done:
        async with self.running(*words) as process:
            output, errors = await asyncio.wait_for(process.communicate(), RUN_SECONDS_MAX)
        assert process.returncode is not None
        return Done(status=process.returncode, output=output.decode(), errors=errors.decode())

    @contextlib.asynccontextmanager
    async def running(self, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
        """While the block runs, and no longer."""
        process = await asyncio.create_subprocess_exec(
            str(self._program),
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=self._env,
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


async def until(holds: Callable[[], bool], *, what: str, seconds_max: float = 20.0) -> None:
    """Fails the test, naming `what`, where it does not come to hold."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds_max
    while not holds():
        assert loop.time() < end, f"not within {seconds_max} s: {what}"
        await asyncio.sleep(0.02)


async def until_async(holds: Callable[[], Awaitable[bool]], *, what: str, seconds_max: float = 20.0) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds_max
    while not await holds():
        assert loop.time() < end, f"not within {seconds_max} s: {what}"
        await asyncio.sleep(0.02)


async def page(url: str) -> str:
    """What is served there; "" where nobody serves. Asked once: aiohttp would ask again by itself."""
    parts = urlsplit(url)
    try:
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            writer.write(f"GET {parts.path} HTTP/1.0\r\n\r\n".encode())
            data = await reader.read()
        finally:
            writer.close()
    except OSError:
        return ""
    head, _, body = data.partition(b"\r\n\r\n")
    return body.decode() if b" 200 " in head.split(b"\r\n")[0] else ""
