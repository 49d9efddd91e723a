"""The page keys of one prompt, and what the store has of it: once, whatever the number of choices and workers. Called
by `router.dispatch`.

Keys begin at a root that names model, numerics and wire id, as a worker's Welcome tells them, and the salt of the
client. Workers of one fleet have the same model and numerics; with more than one wire id there is a chain for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from kvstore.keys import PageKey, page_keys, root_key
from rorqual.session import TokenArray
from router.placement.least_wait import NOTHING_STORED

Keys = Mapping[str, tuple[PageKey, ...]]
"""By wire id, of the full pages of a prompt in order."""


class Root(NamedTuple):
    """What keys begin at, but for the salt; alike for most workers of a fleet."""

    fingerprint: str
    numerics: str
    wire_id: str


class PromptKeys:
    def __init__(self, prompt: TokenArray, *, salt: str) -> None:
        self._prompt = prompt
        self._salt = salt
        self._keys: dict[str, tuple[PageKey, ...]] = {}
        self.stored = NOTHING_STORED
        """What the store has of the first chain; whoever asks it says so here."""

    def of(self, roots: Iterable[Root]) -> Keys:
        """For workers with any of these. 100k tokens take about a millisecond, the first time."""
        for root in roots:
            if root.wire_id not in self._keys:
                parent = root_key(
                    fingerprint=root.fingerprint,
                    numerics=root.numerics,
                    wire_id=root.wire_id,
                    salt=self._salt,
                )
                self._keys[root.wire_id] = page_keys(parent, self._prompt)
        return self._keys
