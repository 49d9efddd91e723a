"""A list of objects kept current: list, watch, and list again whenever the watch cannot be trusted.

Called by `ClusterApi.watch`. A watch is an optimisation: it may end at any time, be refused as too old (410), be cut in
the middle of a line, or stay silent for ever though things change. So silence has a bound, every end leads to a new
list, and there is one now and then whatever the watch says. Never forgets what it knew because of a failure.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Protocol, cast

from rorqual.errors import RorqualError

Object = dict[str, Any]

OBJECTS_MAX = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPace:
    silence_seconds_max: float = 90.0  # servers send a bookmark about every minute, to whoever asks for them
    relist_seconds: float = 300.0  # whatever the watch says
    backoff_seconds_min: float = 0.5
    backoff_seconds_max: float = 30.0
    # A watch that ends sooner and brought nothing counts as a failure, for the wait before the next list.
    watch_seconds_min: float = 5.0


class Lister(Protocol):
    async def get(self, path: str, *, query: Mapping[str, str] | None = None) -> Object: ...

    def stream(
        self, path: str, *, query: Mapping[str, str], silence_seconds_max: float
    ) -> AbstractAsyncContextManager[AsyncIterator[Object]]: ...


class Watch:
    def __init__(
        self,
        lister: Lister,
        path: str,
        *,
        query: Mapping[str, str],
        on_change: Callable[[Mapping[str, Object]], None],
        on_failure: Callable[[str], None],
        randomness: random.Random,
        pace: WatchPace,
    ) -> None:
        self._lister = lister
        self._path = path
        self._query = query
        self._on_change = on_change
        self._on_failure = on_failure
        self._randomness = randomness
        self._pace = pace
        self._num_failures = 0  # one after the other
        self._objects: dict[str, Object] = {}
        self._version = ""
        self._has_listed = False
        self._watching_since = math.inf  # on the loop's clock

    async def run(self) -> None:
        """Until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            began, self._watching_since = loop.time(), math.inf
            try:
                await self._list()
                is_useful = await self._follow()
                # A server that ends each watch at once must not be asked in a loop.
                is_useful = is_useful or loop.time() - began >= self._pace.watch_seconds_min
                self._num_failures = 0 if is_useful else self._num_failures + 1
            except RorqualError as error:
                # A watch that lived for a while and was cut, as balancers do to idle ones, is asked for again soon.
                lived = loop.time() - self._watching_since >= self._pace.watch_seconds_min
                self._num_failures = 1 if lived else self._num_failures + 1
                self._on_failure(str(error))
            await asyncio.sleep(self._backoff_seconds(self._num_failures))

    async def _list(self) -> None:
        objects: dict[str, Object] = {}
        query = {**self._query, "limit": "500"}
        while True:
            page = await self._lister.get(self._path, query=query)
            items, metadata = page.get("items") or [], page.get("metadata") or {}
            if not isinstance(items, list) or not isinstance(metadata, dict):
                raise RorqualError(f"{self._path}: the answer is no list of objects")
            for item in cast("list[Object]", items):
                objects[_name(item)] = item
            metadata = cast("Object", metadata)
            self._version = str(metadata.get("resourceVersion", ""))
            more = str(metadata.get("continue") or "")
            if not more:
                break
            if len(objects) > OBJECTS_MAX:
                raise RorqualError(f"{self._path} lists more than {OBJECTS_MAX} objects")
            query = {**query, "continue": more}
        if objects != self._objects or not self._has_listed:
            self._objects, self._has_listed = objects, True
            self._on_change(dict(objects))

    async def _follow(self) -> bool:
        """Take in what changes until the watch ends, is too old, or it is time to look at everything again. Says
        whether it brought anything."""
        num_taken = 0
        query = {
            **self._query,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": self._version,
            "timeoutSeconds": str(max(1, int(self._pace.relist_seconds))),
        }
        try:
            async with (
                # The server ends the watch at its time; this one is for servers that do not.
                asyncio.timeout(self._pace.relist_seconds * 1.2),
                self._lister.stream(
                    self._path, query=query, silence_seconds_max=self._pace.silence_seconds_max
                ) as events,
            ):
                # Not before: a list alone is stale as soon as it is there, and one that may be listed and not watched
                # would be told as well and as failing by turns.
                self._on_failure("")
                self._watching_since = asyncio.get_running_loop().time()
                async for event in events:
                    if not self._take(event):
                        break
                    num_taken += 1
                    self._num_failures = 0
        except TimeoutError:
            pass
        return num_taken > 0

    def _take(self, event: Object) -> bool:
        """False when the watch is of no more use."""
        kind, item = event.get("type"), event.get("object") or {}
        if kind == "BOOKMARK":
            return True
        if kind not in ("ADDED", "MODIFIED", "DELETED"):
            return False  # ERROR: mostly 410, the version is too old; a list tells what is true
        name = _name(item)
        if kind == "DELETED":
            changed = self._objects.pop(name, None) is not None
        else:
            changed = self._objects.get(name) != item
            self._objects[name] = item
        if changed:
            self._on_change(dict(self._objects))
        return True

    def _backoff_seconds(self, num_failures: int) -> float:
        """Half of it drawn: clients that lost a server together come back apart."""
        ceiling = min(
            self._pace.backoff_seconds_max, self._pace.backoff_seconds_min * 2 ** min(num_failures, 20)
        )
        return ceiling * (0.5 + 0.5 * self._randomness.random())


def _name(item: Object) -> str:
    try:
        metadata = item.get("metadata") or {}
        return f"{metadata.get('namespace', '')}/{metadata.get('name', '')}"
    except AttributeError:
        raise RorqualError("the API server sent what is no object") from None
