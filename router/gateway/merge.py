"""Updates of one request's prompts as one stream, each with the number of its prompt.

Called by `router.gateway.server`. Closing the stream closes every generation; nothing runs on after it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from router.generation import ChoiceUpdate, Generation, Generator

NUM_UPDATES_MAX = 256
"""Held between generations and a client that reads slowly; beyond, generations wait to hand theirs over."""


async def updates_of(
    generator: Generator, generations: Sequence[Generation]
) -> AsyncGenerator[tuple[int, ChoiceUpdate], None]:
    if len(generations) == 1:  # nearly every request: no task and no queue between
        async with aclosing(generator.generate(generations[0])) as updates:
            async for update in updates:
                yield 0, update
        return
    async with aclosing(_interleaved(generator, generations)) as merged:
        async for item in merged:
            yield item


async def _interleaved(
    generator: Generator, generations: Sequence[Generation]
) -> AsyncGenerator[tuple[int, ChoiceUpdate], None]:
    assert len(generations) < NUM_UPDATES_MAX
    queue: asyncio.Queue[tuple[int, ChoiceUpdate | None]] = asyncio.Queue(NUM_UPDATES_MAX)

    async def pump(prompt: int) -> None:
        try:
            async with aclosing(generator.generate(generations[prompt])) as updates:
                async for update in updates:
                    await queue.put((prompt, update))
        finally:
            await queue.put((prompt, None))

    pumps = [asyncio.create_task(pump(prompt)) for prompt in range(len(generations))]
    num_running = len(pumps)
    try:
        while num_running:
            prompt, update = await queue.get()
            if update is not None:
                yield prompt, update
                continue
            num_running -= 1
            await pumps[prompt]  # raises what its generation raised
    finally:
        for task in pumps:
            task.cancel()
        while not queue.empty():  # room for every pump to say that it ended
            queue.get_nowait()
        await asyncio.gather(*pumps, return_exceptions=True)
