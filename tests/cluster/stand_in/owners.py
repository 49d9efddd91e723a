"""Who owns `spec.replicas`: the one field that people, autoscalers and Helm write one after the other.

Kubernetes tracks owners of every field. Here it is this one alone, since an apply that takes replicas back from an
autoscaler, or is refused because of one, is what a chart must be tried with. Called by `server`.
"""

from __future__ import annotations

from tests.cluster.stand_in.kinds import Kind
from tests.cluster.stand_in.objects import Key, Object, Refused


class ReplicaOwners:
    def __init__(self) -> None:
        self._owners: dict[tuple[Kind, Key], set[str]] = {}

    def created(self, kind: Kind, key: Key, manager: str, body: Object) -> None:
        """With the body as it was sent: a default has no owner."""
        self._owners[kind, key] = {manager} if _replicas(body) is not None else set()

    def written(self, kind: Kind, key: Key, manager: str, before: Object, after: Object) -> None:
        """By an update, a patch or a scale: who changes the value owns it alone."""
        if _replicas(before) != _replicas(after):
            self._owners[kind, key] = {manager}

    def settle(
        self,
        kind: Kind,
        key: Key,
        manager: str,
        *,
        wanted: Object,
        present: Object,
        new: Object,
        is_forced: bool,
        is_tried: bool,
    ) -> None:
        """Make `new`, which an apply of `wanted` to `present` came to, keep what others own. Raises Refused 409 where
        they own another value and `is_forced` is not set. Notes nothing if it `is_tried` only."""
        owners = self._owners.get((kind, key), set())
        others = owners - {manager}
        if _replicas(wanted) is None:
            owners = others
            if _replicas(present) is not None and (
                others or manager not in self._owners.get((kind, key), set())
            ):
                new["spec"]["replicas"] = _replicas(present)
        elif _replicas(wanted) == _replicas(present):
            owners = owners | {manager}
        elif others and not is_forced:
            told = ", ".join(f'conflict with "{other}": .spec.replicas' for other in sorted(others))
            raise Refused(409, "Conflict", f"Apply failed with {len(others)} conflict: {told}")
        else:
            owners = {manager}
        if not is_tried:
            self._owners[kind, key] = owners


def _replicas(item: Object) -> int | None:
    return (item.get("spec") or {}).get("replicas")
