"""A prefill and a decode worker of `tests.harness.lending`, each with a session; the test is in the router's place."""

from __future__ import annotations

import dataclasses
from typing import Any

from rorqual.session import FinishReason
from tests.harness.lending import LEASE_SECONDS, Computed, Ear, World, an_open, computed, the_answer

LENGTH = 700  # two full pages and a partial one


class Pair:
    def __init__(self, world: World, *, lease_seconds: float = LEASE_SECONDS, **options: Any) -> None:
        """`options` are the decode worker's; the prefill worker has room for everything."""
        self.world = world
        self.prefill = world.start_prefill(
            num_pages=64,
            num_slots=8,
            num_records=16,
            lease_seconds=lease_seconds,
            drafts=options.get("drafts", 0),
        )
        self.decode = world.start_decode(**options)
        self.up: Ear = self.prefill.connect()
        self.down: Ear = self.decode.connect()

    async def lent(self, number: int, *, length: int = LENGTH, **options: Any) -> Computed:
        return await computed(self.prefill, self.up, an_open(number, length=length, **options))

    def open(self, prompt: Computed) -> None:
        """On the decode worker, which is told of nothing to read yet."""
        self.down.submit(dataclasses.replace(prompt.command, source=prompt.source))

    def bind(self, prompt: Computed) -> None:
        """As the router does late: it is opened and told of everything at once."""
        self.open(prompt)
        for take in prompt.takes():
            self.down.submit(take)

    async def check_handed_over(self, prompt: Computed) -> None:
        number = prompt.command.sequence_id
        await self.down.ended(number, FinishReason.LENGTH)
        assert list(prompt.tokens) + self.down.tokens(number) == the_answer(prompt.command)
        await self.up.ended(number, FinishReason.HANDED_OVER)

    async def empty(self) -> None:
        await self.world.empty()
