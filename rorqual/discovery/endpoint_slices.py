"""Workers as Kubernetes knows them: the endpoints of EndpointSlices with certain labels.

Made by `rorqual.discovery.make_source`. EndpointSlices carry their Service's labels. An endpoint counts while it is
ready, and also while it terminates and still serves: a worker that drains is not yet gone. Needs the right to get, list
and watch endpointslices of discovery.k8s.io in the namespace.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rorqual.cluster_api import ClusterApi, Object
from rorqual.discovery.sources import OnChange, SourceSpec
from rorqual.discovery.standing import Standing
from rorqual.errors import ConfigError
from rorqual.service import format_address

CONFIG_SECONDS = 30.0
"""Until it is looked again for a way to the API server where there was none."""


class EndpointSliceSource(Standing):
    def __init__(
        self, spec: SourceSpec, *, connect: Callable[[], Awaitable[ClusterApi]] = ClusterApi.connect
    ) -> None:
        super().__init__(spec)
        self._spec = spec
        self._connect_once = connect
        self._fault = ""  # of what the API server says

    async def run(self, on_change: OnChange) -> None:
        api = await self._connect()
        try:
            namespace = self._spec.namespace or api.namespace
            await api.watch(
                f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
                query={"labelSelector": self._spec.selector},
                on_change=lambda objects: self._take(objects, on_change),
                on_failure=self._note,
            )
        finally:
            await api.close()

    async def _connect(self) -> ClusterApi:
        while True:
            try:
                return await self._connect_once()
            except ConfigError as error:
                self.failed(str(error))
                await asyncio.sleep(CONFIG_SECONDS * (0.5 + random.random()))

    def _take(self, slices: Mapping[str, Object], on_change: OnChange) -> None:
        try:
            addresses = addresses_of(slices.values(), port_name=self._spec.port_name)
        except (AttributeError, TypeError, ValueError):
            self._fault = "an EndpointSlice is not what discovery.k8s.io/v1 says"
            self.failed(self._fault)
            return
        self._fault = ""
        self.took(addresses, on_change)

    def _note(self, why: str) -> None:
        if why:
            self.failed(why)
        elif not self._fault:
            self.succeeded()


class _Endpoint(NamedTuple):
    """Orders as it is preferred: IPv4 before IPv6 before names, then by address."""

    family: int
    address: str
    target: str  # which pod it is; empty: not said


_FAMILIES = {"IPv4": 0, "IPv6": 1}


def addresses_of(slices: Iterable[Mapping[str, Any]], *, port_name: str) -> frozenset[str]:
    """ "HOST:PORT" of every endpoint that takes work, or finishes what it has. A Service of two address families has
    slices of both, which name the same pods: each pod counts once."""
    found = sorted(endpoint for item in slices for endpoint in _endpoints(item, port_name))
    seen: set[str] = set()
    addresses: set[str] = set()
    for endpoint in found:
        if not endpoint.target or endpoint.target not in seen:
            addresses.add(endpoint.address)
        seen.add(endpoint.target)
    return frozenset(addresses)


def _endpoints(item: Mapping[str, Any], port_name: str) -> Iterator[_Endpoint]:
    ports = [port.get("port") for port in item.get("ports") or () if (port.get("name") or "") == port_name]
    if not ports or ports[0] is None:
        return
    port = int(ports[0])
    family = _FAMILIES.get(str(item.get("addressType", "IPv4")), 2)
    for endpoint in item.get("endpoints") or ():
        conditions = endpoint.get("conditions") or {}
        # Ready where it is not said: so the API defines it.
        is_ready = conditions.get("ready") is not False
        is_finishing = conditions.get("terminating") is True and conditions.get("serving") is True
        addresses = endpoint.get("addresses") or ()
        if addresses and (is_ready or is_finishing):
            # All addresses of an endpoint are the same endpoint.
            reference = endpoint.get("targetRef") or {}
            target = str(reference.get("uid") or "")
            yield _Endpoint(family, format_address(str(addresses[0]), port), target and f"{target}:{port}")
