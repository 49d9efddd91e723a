"""One API server: get, create, replace, patch and watch, over the official client's connection.

Owns the connection, credentials (the official client reads them; a pod's token, which is rotated, we read before every
call) and the translation of failures into two errors with one clear line each. It retries nothing but an answer that
names a time to come back; what a failure means is decided above. Objects are plain JSON.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlencode

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError

from rorqual.cluster_api.watching import Watch, WatchPace
from rorqual.errors import ConfigError, RorqualError

Object = dict[str, Any]
"""A Kubernetes object, as JSON."""

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
RETRIES_MAX = 2
RETRY_AFTER_SECONDS_MAX = 5.0
BODY_BYTES_MAX = 64 << 20


_FAILURES = (TimeoutError, OSError, aiohttp.ClientError, HttpProcessingError)
"""Of a connection, or of what is no HTTP on it."""

_VERBS = {"GET": "get", "POST": "create", "PUT": "update", "PATCH": "patch"}
"""Of Kubernetes' rights, by method."""


class ApiError(RorqualError):
    """The API server has answered, and not with success."""

    def __init__(self, message: str, *, status: int, reason: str = "") -> None:
        super().__init__(message)
        self.status = status  # of HTTP
        self.reason = reason  # Kubernetes' own: NotFound, Conflict, Forbidden, Invalid, Expired, ...


class ApiUnreachable(RorqualError):
    """No answer: refused, cut off, too late, or told too often to come back later."""


class ClusterApi:
    """Made by `connect`; `close` gives the connections back."""

    def __init__(self, client: Any, *, namespace: str, call_seconds_max: float, pace: WatchPace) -> None:
        """`client` is the official ApiClient, whose stubs know less than it does."""
        self.namespace = namespace
        self._client = client
        self._call_seconds_max = call_seconds_max
        self._pace = pace

    @classmethod
    async def connect(
        cls,
        *,
        call_seconds_max: float = 10.0,
        pace: WatchPace | None = None,
        service_account: Path = SERVICE_ACCOUNT,
    ) -> ClusterApi:
        """By a pod's service account, else by KUBECONFIG or ~/.kube/config. Calls nobody yet. Raises ConfigError."""
        from kubernetes.aio import client, config
        from yaml import YAMLError

        configuration: Any = client.Configuration()
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ and (service_account / "token").is_file():
                _use_service_account(configuration, service_account)
                namespace = (service_account / "namespace").read_text(encoding="utf-8").strip()
            else:
                # Given by us: the official client looks at the variable once, when it is imported.
                file = os.environ.get("KUBECONFIG") or None
                await config.load_kube_config(config_file=file, client_configuration=configuration)
                _, active = config.list_kube_config_contexts(config_file=file)
                namespace = active["context"].get("namespace", "default")
            configuration.retries = None
            official = client.ApiClient(configuration)
        except (
            config.ConfigException,
            YAMLError,
            OSError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
        ) as error:
            # ValueError, AttributeError: certificates and keys that are none.
            raise ConfigError(
                f"no way to a Kubernetes API server: neither a pod's service account nor a kubeconfig: {error}"
            ) from None
        return cls(
            official,
            namespace=namespace,
            call_seconds_max=call_seconds_max,
            pace=pace or WatchPace(),
        )

    async def close(self) -> None:
        await self._client.close()

    async def get(self, path: str, *, query: Mapping[str, str] | None = None) -> Object:
        """`path` begins with /api or /apis. As all calls here: raises ApiError and ApiUnreachable."""
        return await self._call("GET", path, query=query)

    async def create(self, path: str, body: Object) -> Object:
        return await self._call("POST", path, body=body)

    async def replace(self, path: str, body: Object) -> Object:
        """With the body's resourceVersion, if it has one: another writer's change is ApiError 409."""
        return await self._call("PUT", path, body=body)

    async def merge_patch(self, path: str, body: Object) -> Object:
        return await self._call("PATCH", path, body=body, content_type="application/merge-patch+json")

    async def watch(
        self,
        path: str,
        *,
        on_change: Callable[[Mapping[str, Object]], None],
        query: Mapping[str, str] | None = None,
        on_failure: Callable[[str], None] = lambda why: None,
    ) -> None:
        """Keep the list at `path` current until cancelled: `on_change` gets all objects by "namespace/name", first
        after the list and again after each change. A failure is told to `on_failure` ("" once it is over) and changes
        nothing: what was known stays known. See `rorqual.cluster_api.watching`."""
        await Watch(
            self,
            path,
            query=dict(query or {}),
            on_change=on_change,
            on_failure=on_failure,
            randomness=random.Random(),
            pace=self._pace,
        ).run()

    @asynccontextmanager
    async def stream(
        self, path: str, *, query: Mapping[str, str], silence_seconds_max: float
    ) -> AsyncGenerator[AsyncIterator[Object]]:
        """The lines of a watch, as objects, until the server ends it. Raises ApiError, ApiUnreachable, also from the
        iterator, where nothing came for so long."""
        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=self._call_seconds_max, sock_read=silence_seconds_max
        )
        response = await self._send("GET", path, query=query, limits=limits)
        try:
            if response.status != 200:
                raise await _refusal("watch", path, response)
            yield _lines(path, response, silence_seconds_max)
        finally:
            response.close()

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> Object:
        limits = aiohttp.ClientTimeout(total=self._call_seconds_max)
        num_retries = 0
        while True:
            response = await self._send(
                method, path, query=query or {}, body=body, content_type=content_type, limits=limits
            )
            try:
                if 200 <= response.status < 300:
                    return await _json(path, response)
                refusal = await _refusal(_verb(method, query), path, response)
                wait = _retry_after(response)
            finally:
                response.close()
            if response.status not in (429, 503):
                raise refusal
            if num_retries == RETRIES_MAX or wait is None:
                raise ApiUnreachable(f"the API server is too busy: {refusal}")
            num_retries += 1
            await asyncio.sleep(wait)

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str],
        limits: aiohttp.ClientTimeout,
        body: Object | None = None,
        content_type: str = "application/json",
    ) -> aiohttp.ClientResponse:
        from kubernetes.aio.config import ConfigException

        assert path.startswith("/api"), f"{path} is no path of the API"
        headers = {"Accept": "application/json", "Content-Type": content_type, "User-Agent": "rorqual"}
        try:
            await self._client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
            url = f"{self._client.configuration.host}{path}"
            response = await self._client.rest_client.request(
                method,
                f"{url}?{urlencode(query)}" if query else url,
                headers=headers,
                body=body,
                _request_timeout=limits,
            )
        except (*_FAILURES, ssl.SSLError, ConfigException, ValueError) as error:
            # OSError: also a pod's token that cannot be read just now. ConfigException: of a kubeconfig's ways.
            # ValueError: what aiohttp makes of the environment, such as a .netrc.
            raise ApiUnreachable(f"{method} {path}: {_why(error)}") from None
        return response.response


def _use_service_account(configuration: Any, folder: Path) -> None:
    """The official client looks at the token again a minute after it did, whatever the server says of the old one: a
    leader whose token is refused would have lost its lease by then. A read of a kilobyte from the pod's memory before
    each call is nothing beside the call, and needs no clock. Raises ConfigException."""
    from kubernetes.aio.config.incluster_config import InClusterConfigLoader

    token = folder / "token"

    def refresh(configuration: Any) -> None:
        content = token.read_text(encoding="utf-8").strip()
        if not content:
            raise ApiUnreachable(f"the pod's token is empty: {token}")
        configuration.api_key["BearerToken"] = f"Bearer {content}"

    loader: Any = InClusterConfigLoader(str(token), str(folder / "ca.crt"), try_refresh_token=False)
    loader.load_and_set(configuration)
    # By the address that the pod was given, never by a proxy: networks in NO_PROXY, which Go's clients know, aiohttp
    # does not.
    configuration.client_session_kwargs = {"trust_env": False}
    configuration.refresh_api_key_hook = refresh


async def _lines(
    path: str, response: aiohttp.ClientResponse, silence_seconds_max: float
) -> AsyncIterator[Object]:
    while True:
        try:
            # aiohttp's own limit knows nothing of a body whose framing is broken.
            async with asyncio.timeout(silence_seconds_max):
                line = await response.content.readline()
        except (*_FAILURES, ValueError) as error:
            # ValueError: a line beyond aiohttp's buffer.
            raise ApiUnreachable(f"watch {path}: {_why(error)}") from None
        if not line:
            return
        if line.strip():
            yield _parse(path, line)


async def _json(path: str, response: aiohttp.ClientResponse) -> Object:
    try:
        data = await response.content.read(BODY_BYTES_MAX)
        while not response.content.at_eof():
            data += await response.content.read(BODY_BYTES_MAX)
            if len(data) > BODY_BYTES_MAX:
                raise ApiUnreachable(f"{path}: an answer of more than {BODY_BYTES_MAX} bytes")
    except _FAILURES as error:
        raise ApiUnreachable(f"{path}: {_why(error)}") from None
    return _parse(path, data)


def _parse(path: str, data: bytes) -> Object:
    try:
        content = json.loads(data)
    except ValueError:
        raise ApiUnreachable(f"{path}: the answer is not JSON, or was cut off") from None
    if not isinstance(content, dict):
        raise ApiUnreachable(f"{path}: the answer is no JSON object")
    return cast("Object", content)


async def _refusal(verb: str, path: str, response: aiohttp.ClientResponse) -> ApiError:
    """What the server says in one line, with its own words where it speaks as Kubernetes does; of what is forbidden,
    which right is missing."""
    reason, message = "", response.reason or ""
    try:
        status = await _json(path, response)
        reason, message = str(status.get("reason", "")), str(status.get("message", message))
    except ApiUnreachable:
        pass
    message = " ".join(message.split())[:500]
    if response.status == 403:
        text = f"the right to {verb} {_resource(path)} is missing, grant it by a Role (403: {message})"
    else:
        text = f"{verb} {path}: {response.status} {message}"
    return ApiError(text, status=response.status, reason=reason)


def _verb(method: str, query: Mapping[str, str] | None) -> str:
    return "list" if method == "GET" and query and "limit" in query else _VERBS[method]


def _resource(path: str) -> str:
    """What a path is about, as a Role names it: endpointslices of discovery.k8s.io in namespace x."""
    parts = path.strip("/").split("/")
    group, rest = ("", parts[2:]) if parts[0] == "api" else (parts[1] if len(parts) > 1 else "", parts[3:])
    namespace = ""
    if len(rest) > 2 and rest[0] == "namespaces":
        namespace, rest = f" in namespace {rest[1]}", rest[2:]
    # resource, or resource/name, or resource/name/subresource
    name = "/".join(rest[::2]) or path
    return f"{name} of {group or 'the core group'}{namespace}"


def _retry_after(response: aiohttp.ClientResponse) -> float | None:
    """Seconds; None where coming back is not asked for, or not soon enough to wait for it."""
    text = response.headers.get("Retry-After", "")
    seconds = float(text) if text.isdecimal() else None
    return seconds if seconds is not None and seconds <= RETRY_AFTER_SECONDS_MAX else None


def _why(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join(str(error).split())[:500] or type(error).__name__
