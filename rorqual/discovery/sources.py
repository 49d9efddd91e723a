"""The text of a source, what it means, and the source it makes.

    static:HOST:PORT[,HOST:PORT...]                    these
    dns:NAME:PORT                                      all addresses that NAME has, asked again every few seconds
    file:PATH[?pool=NAME]                              {"workers": [{"address": "HOST:PORT", "pool": "NAME"}, ...]}
    kubernetes:[NAMESPACE]?selector=LABELS&port=NAME   EndpointSlices with these labels

Called where options and policies are read; makes sources and runs none.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl

from rorqual.errors import ConfigError
from rorqual.service import format_address, parse_address

PORT_NAME = "session"
_NAMESPACE = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_FORMS = "static:HOST:PORT, dns:NAME:PORT, file:PATH or kubernetes:[NAMESPACE]?selector=LABELS&port=NAME"

OnChange = Callable[[frozenset[str]], None]


class AddressSource(Protocol):
    """Tells who is there. `last_error` says why what it told may be stale; empty: it is not. `num_failures` counts
    looks that failed."""

    @property
    def text(self) -> str:
        """As it was written, to name it in logs and metrics."""
        ...

    @property
    def last_error(self) -> str: ...

    @property
    def num_failures(self) -> int: ...

    async def run(self, on_change: OnChange) -> None:
        """Until cancelled. `on_change` gets the whole set of "HOST:PORT", first as soon as it is known and again
        whenever it changes, and never because of a failure."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """One source, checked. What a kind does not use is empty."""

    text: str
    kind: str  # "static", "dns", "file", "kubernetes"
    addresses: tuple[str, ...] = ()
    name: str = ""  # of DNS
    port: int = 0
    path: Path = Path()
    pool: str = ""
    namespace: str = ""
    selector: str = ""
    port_name: str = PORT_NAME


def parse_source(text: str, *, option: str) -> SourceSpec:
    """Raises ConfigError naming the option."""
    kind, separator, rest = text.partition(":")
    parsers = {"static": _static, "dns": _dns, "file": _file, "kubernetes": _kubernetes}
    if not separator or kind not in parsers:
        raise ConfigError(f"{option} must be {_FORMS}, not {text!r}")
    return parsers[kind](text, rest, option)


def make_source(spec: SourceSpec) -> AddressSource:
    if spec.kind == "kubernetes":
        # Here, since the client of the API takes a while to import.
        from rorqual.discovery.endpoint_slices import EndpointSliceSource

        return EndpointSliceSource(spec)
    from rorqual.discovery.looking import DnsSource, FileSource, StaticSource

    return {"static": StaticSource, "dns": DnsSource, "file": FileSource}[spec.kind](spec)


def _static(text: str, rest: str, option: str) -> SourceSpec:
    addresses = [format_address(*parse_address(item.strip(), option=option)) for item in rest.split(",")]
    return SourceSpec(text=text, kind="static", addresses=tuple(dict.fromkeys(addresses)))


def _dns(text: str, rest: str, option: str) -> SourceSpec:
    name, port = parse_address(rest, option=option)
    if port == 0:
        raise ConfigError(f"{option}: {text!r} needs a port above 0")
    return SourceSpec(text=text, kind="dns", name=name, port=port)


def _file(text: str, rest: str, option: str) -> SourceSpec:
    path, _, query = rest.partition("?")
    found = _query(text, query, option, allowed=("pool",))
    if not path:
        raise ConfigError(f"{option}: {text!r} names no file")
    return SourceSpec(text=text, kind="file", path=Path(path), pool=found.get("pool", ""))


def _kubernetes(text: str, rest: str, option: str) -> SourceSpec:
    namespace, _, query = rest.partition("?")
    found = _query(text, query, option, allowed=("selector", "port"))
    if namespace and not re.fullmatch(_NAMESPACE, namespace):
        raise ConfigError(f"{option}: {namespace!r} is no name of a namespace")
    if not found.get("selector"):
        raise ConfigError(f"{option}: {text!r} needs a selector, such as rorqual.io/role=decode")
    return SourceSpec(
        text=text,
        kind="kubernetes",
        namespace=namespace,
        selector=found["selector"],
        port_name=found.get("port", PORT_NAME),
    )


def _query(text: str, query: str, option: str, *, allowed: tuple[str, ...]) -> dict[str, str]:
    try:
        found = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError:
        raise ConfigError(f"{option}: what follows the ? in {text!r} is not NAME=VALUE&...") from None
    unknown = sorted(set(found) - set(allowed))
    if unknown:
        raise ConfigError(f"{option}: {text!r} has {unknown[0]!r}; known are {', '.join(allowed)}")
    return found
