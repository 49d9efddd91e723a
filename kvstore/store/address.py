"""Where a store's servers are: a URL as an operator writes it, checked and taken apart. No torch.

redis://[user[:password]@]host[:port][/db]      one server
rediss://...                                    the same over TLS; ?ssl_ca_certs=FILE and other ssl_ options
redis+cluster://..., rediss+cluster://...       a Cluster, of which host is any node; also ?cluster=true
unix://[user[:password]@]/path/to/socket        one server on this machine
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from redis.asyncio.connection import Connection, SSLConnection, UnixDomainSocketConnection, parse_url

from rorqual.errors import ConfigError

_SCHEMES = ("redis", "rediss", "unix", "redis+cluster", "rediss+cluster")
_OPTIONS = ("db", "cluster")  # and all that begin with ssl_
_TRUE = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """`options` are what a connection class of redis-py takes, host, port and password among them."""

    shown: str  # for logs: without the password
    is_cluster: bool
    transport: type[Connection] | type[SSLConnection] | type[UnixDomainSocketConnection]
    options: dict[str, Any] = field(repr=False)


def parse_address(url: str) -> Address:
    """Raises ConfigError, which never shows the password."""
    try:
        split = urlsplit(url)
        shown = urlunsplit((split.scheme, split.netloc.rpartition("@")[2], split.path, "", ""))
        _ = split.port
    except ValueError as error:
        raise ConfigError(f"the store's URL cannot be understood: {error}") from None
    if split.scheme not in _SCHEMES:
        raise ConfigError(f"the store's URL begins with one of {', '.join(_SCHEMES)}, not {split.scheme!r}")
    query = parse_qsl(split.query, keep_blank_values=True)
    for name, _ in query:
        if name not in _OPTIONS and not name.startswith("ssl_"):
            raise ConfigError(f"the store's URL {shown} has the option {name!r}, which nobody knows")
    asked = dict(query).get("cluster", "false").lower()
    if asked not in _TRUE:
        raise ConfigError(f"the store's URL {shown}: cluster is true or false, not {asked!r}")
    is_cluster = split.scheme.endswith("+cluster") or _TRUE[asked]
    rest = urlencode([(name, value) for name, value in query if name != "cluster"])
    scheme = split.scheme.removesuffix("+cluster")
    try:
        options = dict[str, Any](parse_url(urlunsplit((scheme, split.netloc, split.path, rest, ""))))
        transport = options.pop("connection_class", Connection)
        transport(**options)
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(f"the store's URL {shown} cannot be used: {error}") from None
    if is_cluster and (transport is UnixDomainSocketConnection or options.get("db")):
        raise ConfigError(
            f"the store's URL {shown}: a Cluster has neither a socket file nor a database number"
        )
    if transport is UnixDomainSocketConnection:
        if "path" not in options:
            raise ConfigError(f"the store's URL {shown} names no socket file")
    else:
        options.setdefault("host", "localhost")
        options.setdefault("port", 6379)
    return Address(shown=shown, is_cluster=is_cluster, transport=transport, options=options)
