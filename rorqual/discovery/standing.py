"""How a source stands: fresh or failing, since its last look, told in the log once per change and counted.

Base of the sources of `rorqual.discovery`; it asks nobody anything.
"""

from __future__ import annotations

import logging

from rorqual.discovery.sources import OnChange, SourceSpec
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

NOT_ASKED = "not asked yet"


class Standing:
    """What is told to `on_change` is told once: a set that is known already changes nothing."""

    def __init__(self, spec: SourceSpec) -> None:
        self.text = spec.text
        self.last_error = NOT_ASKED
        self.num_failures = 0
        self._known: frozenset[str] | None = None

    def took(self, addresses: frozenset[str], on_change: OnChange) -> None:
        if addresses != self._known:
            self._known = addresses
            on_change(addresses)

    def succeeded(self) -> None:
        if self.last_error not in ("", NOT_ASKED):
            log.info("asked for workers again %s", fields(source=self.text))
        self.last_error = ""

    def failed(self, why: str) -> None:
        """Told once for each reason, and counted each time."""
        self.num_failures += 1
        if why != self.last_error:
            log.warning(
                "failed to ask for workers, what is known stays %s", fields(source=self.text, error=why)
            )
        self.last_error = why
