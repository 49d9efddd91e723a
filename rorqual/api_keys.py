"""API keys: read from options and files, handed to a child process in a file, and compared with a client's.

Called by the command lines of `rorqual up` and `rorqual router`, and by both gateways. A key never stands in
a log line, and never in the argument list of a process that we start: everyone on a machine can read those.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.telemetry import fields

log = logging.getLogger(__name__)

KEY_FILE_BYTES_MAX = 1 << 20


class ApiKeys:
    """The keys that a service asks for; none: it is open to everyone who can connect.

    Workers keep the state of prompts, and what is kept answers faster: who shares it can tell what others have asked.
    So clients share it by key alone, unless a deployment declares one salt for all of them.
    """

    def __init__(self, keys: Sequence[str] = (), *, shared_cache_salt: str = "") -> None:
        self._shared_cache_salt = shared_cache_salt
        self.replace(keys)

    def replace(self, keys: Sequence[str]) -> None:
        """From the next request on. A stream that was let in goes on to its end."""
        self._keys = tuple(key.encode() for key in keys)

    def accept(self, authorization: bytes) -> bool:
        """Whether this value of an authorization header lets a client in."""
        if not self._keys:
            return True
        scheme, _, key = authorization.partition(b" ")
        # Every key is compared, in constant time, so that the time taken tells nothing.
        matches = [hmac.compare_digest(key.strip(), known) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)

    def cache_salt(self, authorization: bytes) -> str:
        """Of a client that was let in: equal for those who share what workers keep, in every router. No key can be
        found from it; without keys it is empty."""
        if self._shared_cache_salt or not self._keys:
            return self._shared_cache_salt
        key = authorization.partition(b" ")[2].strip()
        return "key:" + hashlib.sha256(b"rorqual cache salt\0" + key).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKeySource:
    """Where the keys of a service are: in options, and in files that may change."""

    given: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()


class ApiKeyKeeper:
    """The keys as their files last had them, for as long as these can be read: a Secret is renewed in place."""

    def __init__(self, source: ApiKeySource) -> None:
        """Raises ConfigError: the files must be good at the start."""
        self._source = source
        self._seen = self._signature()
        self.keys = read_api_keys(source.given, source.files)

    def changed(self) -> tuple[str, ...] | None:
        """The keys, where they are others than before. Files that cannot be used change nothing; each such state is
        told once."""
        seen = self._signature()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            keys = read_api_keys(self._source.given, self._source.files)
        except ConfigError as error:
            log.warning("kept the API keys in force %s", fields(error=str(error)))
            return None
        if keys == self.keys:
            return None
        log.info("took changed API keys %s", fields(keys=len(keys), before=len(self.keys)))
        self.keys = keys
        return keys

    def _signature(self) -> list[tuple[int, int, int] | None]:
        """Changes whenever a file is replaced or written. None: it is not there."""
        found: list[tuple[int, int, int] | None] = []
        for path in self._source.files:
            try:
                status = path.stat()
                found.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                found.append(None)
        return found


def read_api_keys(given: Sequence[str], files: Sequence[Path]) -> tuple[str, ...]:
    """The keys of `--api-key` and `--api-key-file` (one key per line). Raises ConfigError naming the
    option."""
    keys = [_checked(key, "--api-key") for key in given]
    for file in files:
        keys += _read_file(file)
    return tuple(dict.fromkeys(keys))


def write_api_key_file(file: Path, keys: Sequence[str]) -> None:
    """A new file that only this user can read, as `--api-key-file` takes it."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.writelines(f"{key}\n" for key in keys)


def _read_file(file: Path) -> list[str]:
    try:
        with file.open("rb") as stream:
            data = stream.read(KEY_FILE_BYTES_MAX + 1)
        text = data.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"--api-key-file: {file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--api-key-file: {file} is not UTF-8 text") from None
    if len(data) > KEY_FILE_BYTES_MAX:
        raise ConfigError(f"--api-key-file: {file} is over {KEY_FILE_BYTES_MAX} bytes")
    keys = [_checked(line.strip(), f"--api-key-file {file}") for line in text.splitlines() if line.strip()]
    if not keys:
        # Taken as no keys at all, it would open the service to everyone.
        raise ConfigError(f"--api-key-file: {file} has no key; it takes one key per line")
    return keys


def _checked(key: str, option: str) -> str:
    """No client could send another one: a header's value is one word of printable characters here."""
    if not key or not key.isprintable() or any(char.isspace() for char in key):
        raise ConfigError(f"{option}: a key must be printable, without spaces and not empty")
    return key
