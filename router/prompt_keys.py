"""The page keys of one prompt, computed once, whatever the number of choices and workers. Called by `router.dispatch`.

Keys begin at a root that names model, numerics and wire id, as a worker's Welcome tells them, and the salt of the
client. Workers of one fleet have the same model and numerics; with more than one wire id there is a chain for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kvstore.keys import PageKey, page_keys, root_key
from rorqual.session import TokenArray, Welcome

Keys = Mapping[str, tuple[PageKey, ...]]
"""By wire id, of the full pages of a prompt in order."""


class PromptKeys:
    def __init__(self, prompt: TokenArray, *, salt: str) -> None:
        self._prompt = prompt
        self._salt = salt
        self._keys: dict[str, tuple[PageKey, ...]] = {}

    def of(self, welcomes: Iterable[Welcome]) -> Keys:
        """For all these workers. 100k tokens take about a millisecond, the first time."""
        for welcome in welcomes:
            if welcome.wire_id not in self._keys:
                root = root_key(
                    fingerprint=welcome.model_fingerprint,
                    numerics=welcome.numerics,
                    wire_id=welcome.wire_id,
                    salt=self._salt,
                )
                self._keys[welcome.wire_id] = page_keys(root, self._prompt)
        return self._keys
