"""The stand-in's HTTP: discovery, objects, patches, watches, scales, in the words of Kubernetes.

Owns a port of the loopback and the faults that tests ask for; objects are `objects`'. One event loop, no threads.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from aiohttp import web

from tests.cluster.stand_in import patches, protobuf
from tests.cluster.stand_in.certificate import make_certificate
from tests.cluster.stand_in.checking import check, fill
from tests.cluster.stand_in.controllers import BY_NAME
from tests.cluster.stand_in.documents import Documents
from tests.cluster.stand_in.kinds import Kind
from tests.cluster.stand_in.objects import Object, Objects, Refused, Watcher, key_of
from tests.cluster.stand_in.owners import ReplicaOwners
from tests.cluster.stand_in.rights import ADMIN_TOKEN, Rights
from tests.cluster.stand_in.selectors import by_query, named_by

BOOKMARK_SECONDS = 5.0
PATCHES: dict[str, Callable[[Any, Any], Any]] = {
    "application/merge-patch+json": patches.merge,
    "application/strategic-merge-patch+json": patches.strategic,
    "application/json-patch+json": patches.json_patch,
}


@dataclass(slots=True)
class Faults:
    """What tests break. Of `conflicts` writes to a path that ends so, the next few are refused as stale."""

    down: bool = False  # connections are cut before an answer
    frozen_watches: bool = False  # events are kept back, and bookmarks
    conflicts: dict[str, int] = field(default_factory=dict)
    too_many: int = 0  # so many next requests hear 429, to come back in a second
    page_objects_max: int = 500  # a list gives no more at once, whatever its limit


class ApiServer:
    def __init__(self, objects: Objects, kinds: tuple[Kind, ...], *, folder: Path) -> None:
        self.objects = objects
        self._context, self.certificate = make_certificate(folder)
        self.rights = Rights(objects)
        self.faults = Faults()
        self.url = ""
        self.log_of: Callable[[str], str] = lambda name: ""  # of a pod: the kubelet's
        self.calls: list[str] = []  # method and path of every write, for tests
        self._documents = Documents(kinds)
        self._kinds = {(kind.group, kind.version, kind.plural): kind for kind in kinds}
        self._watching: dict[Watcher, web.Request] = {}
        self._replica_owners = ReplicaOwners()
        self._applied: dict[tuple[Kind, tuple[str, str], str], Object] = {}
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        app = web.Application(client_max_size=64 << 20)
        app.router.add_route("*", "/{rest:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.5, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._context)
        await site.start()
        port = self._runner.addresses[0][1]
        self.url = f"https://127.0.0.1:{port}"

    async def cut_watches(self) -> None:
        """Connections of all watches, in the middle of a line."""
        for request in self._watching.values():
            if request.transport is not None:
                request.transport.write(b"30\r\n" + b'{"type": "ADDED", "object": {"kin')
        await asyncio.sleep(0.01)
        for watcher, request in self._watching.items():
            if request.transport is not None:
                request.transport.abort()
            watcher.queue.put_nowait(None)

    def expire_watches(self) -> None:
        """All hear 410 within their stream and end, and from before now nobody can watch on."""
        self.objects.forget_changes()
        status = _status(Refused(410, "Expired", "too old resource version"))
        for watcher in self._watching:
            watcher.queue.put_nowait(("ERROR", status))
            watcher.queue.put_nowait(None)

    @property
    def watchers(self) -> list[Watcher]:
        return list(self._watching)

    async def stop(self) -> None:
        self.objects.end_watches()
        if self._runner is not None:
            await self._runner.cleanup()

    def kubeconfig(self, *, token: str = ADMIN_TOKEN, namespace: str = "default") -> str:
        trusted = base64.b64encode(self.certificate).decode()
        cluster = {"server": self.url, "certificate-authority-data": trusted}
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "stand-in",
                "clusters": [{"name": "stand-in", "cluster": cluster}],
                "users": [{"name": "user", "user": {"token": token}}],
                "contexts": [
                    {
                        "name": "stand-in",
                        "context": {"cluster": "stand-in", "user": "user", "namespace": namespace},
                    }
                ],
            }
        )

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        if self.faults.down:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if self.faults.too_many > 0:
            self.faults.too_many -= 1
            status = _status(Refused(429, "TooManyRequests", "come back later"))
            return web.json_response(status, status=429, headers={"Retry-After": "1"})
        try:
            document = self._documents.find(request.path)
            if document is not None:
                return web.json_response(document)
            return await self._serve(request)
        except Refused as refused:
            return web.json_response(_status(refused), status=refused.status)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            return web.json_response(await self._review(request), status=201)
        if request.path == "/apis/authorization.k8s.io/v1/selfsubjectrulesreviews":
            namespace = _body(await request.read())["spec"]["namespace"]
            rules = self.rights.rules(self._who(request), namespace)
            return web.json_response({"status": {"resourceRules": rules, "incomplete": False}}, status=201)
        kind, namespace, name, subresource = self._parse(request.path)
        self._check_right(request, kind, namespace, name, subresource)
        if request.method != "GET":
            self.calls.append(f"{request.method} {request.path}")
        if request.method == "GET":
            if name:
                item = self.objects.get(kind, namespace, name)
                if subresource == "log":
                    return web.Response(text=self.log_of(name))
                return _json(request, _scale_of(kind, item) if subresource == "scale" else item)
            if request.query.get("watch") in ("true", "1"):
                return await self._watch(request, kind, namespace)
            return self._list(request, kind, namespace)
        if subresource == "log" or (subresource and request.method not in ("PUT", "PATCH")):
            raise Refused(405, "MethodNotAllowed", f"{request.method} of {request.path}")
        if request.method == "DELETE":
            return self._delete(request, kind, namespace, name)
        body = _body(await request.read())
        if request.method == "POST":
            return _json(request, self._create(request, kind, namespace, body), status=201)
        self._fail_on_purpose(request.path)
        if request.method == "PATCH":
            return self._patch(request, kind, namespace, name, subresource, body)
        return _json(request, self._write(request, kind, namespace, name, subresource, body))

    def _parse(self, path: str) -> tuple[Kind, str, str, str]:
        parts = path.strip("/").split("/")
        group = "" if parts[0] == "api" else parts[1]
        rest = parts[1:] if parts[0] == "api" else parts[2:]
        version, rest = rest[0], rest[1:]
        namespace = ""
        if len(rest) > 2 and rest[0] == "namespaces" and (group, version, rest[2]) in self._kinds:
            namespace, rest = rest[1], rest[2:]
        kind = self._kinds.get((group, version, rest[0] if rest else ""))
        if kind is None:
            raise Refused(404, "NotFound", f"the server could not find the requested resource {path}")
        name, subresource = (*rest[1:3], "", "")[:2]
        if len(rest) > 3 or (subresource and subresource not in kind.subresources):
            raise Refused(404, "NotFound", f"the server could not find the requested resource {path}")
        return kind, namespace, name, subresource

    def _check_right(
        self, request: web.Request, kind: Kind, namespace: str, name: str, subresource: str
    ) -> None:
        who = self._who(request)
        verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        verb = verbs.get(request.method) or (
            "get" if name else "watch" if request.query.get("watch") in ("true", "1") else "list"
        )
        resource = f"{kind.plural}/{subresource}" if subresource else kind.plural
        if verb in ("list", "watch"):
            name = named_by(request.query)
        if not self.rights.may(who, verb, kind.group, resource, namespace, name):
            raise Refused(403, "Forbidden", f"{who} cannot {verb} resource {resource!r} in {namespace!r}")

    def _who(self, request: web.Request) -> tuple[str, str] | None:
        try:
            return self.rights.who(request.headers.get("Authorization", "").split(" ")[-1])
        except KeyError:
            raise Refused(401, "Unauthorized", "Unauthorized") from None

    async def _review(self, request: web.Request) -> Object:
        body = _body(await request.read())
        wanted = body["spec"].get("resourceAttributes") or {}
        who = self._who(request)
        resource = wanted.get("resource", "")
        if wanted.get("subresource"):
            resource += f"/{wanted['subresource']}"
        allowed = self.rights.may(
            who,
            wanted.get("verb", ""),
            wanted.get("group", ""),
            resource,
            wanted.get("namespace", ""),
            wanted.get("name", ""),
        )
        return {**body, "status": {"allowed": allowed}}

    def _list(self, request: web.Request, kind: Kind, namespace: str) -> web.Response:
        items = self.objects.all(kind, namespace, selects=by_query(request.query))
        metadata: Object = {"resourceVersion": str(self.objects.version)}
        limit = min(int(request.query.get("limit") or 0) or len(items), self.faults.page_objects_max)
        if request.query.get("continue"):
            version, after = json.loads(base64.b64decode(request.query["continue"]))
            items = [item for item in items if key_of(item) > tuple(after)]
            metadata["resourceVersion"] = version  # of the first page: what changed since is told by a watch
        if len(items) > limit:
            items = items[:limit]
            place = json.dumps([metadata["resourceVersion"], key_of(items[-1])])
            metadata["continue"] = base64.b64encode(place.encode()).decode()
        content = {
            "apiVersion": kind.group_version,
            "kind": f"{kind.kind}List",
            "metadata": metadata,
            "items": items,
        }
        return _json(request, content)

    async def _watch(self, request: web.Request, kind: Kind, namespace: str) -> web.StreamResponse:
        since = request.query.get("resourceVersion", "")
        wants_start = request.query.get("sendInitialEvents") == "true" or since in ("", "0")
        watcher = self.objects.watch(
            kind, namespace, selects=by_query(request.query), since=None if wants_start else int(since)
        )
        self._watching[watcher] = request
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        seconds = float(request.query.get("timeoutSeconds", "600"))
        try:
            await response.prepare(request)
            if request.query.get("sendInitialEvents") == "true":
                while not watcher.queue.empty():
                    await _send(request, response, watcher.queue.get_nowait())
                await self._bookmark(request, response, kind, is_start=True)
            async with asyncio.timeout(seconds):
                while await self._pass_on(request, response, watcher, kind):
                    pass
        except (TimeoutError, ConnectionError):
            pass
        finally:
            self.objects.unwatch(watcher)
            del self._watching[watcher]
        with contextlib.suppress(ConnectionError):
            await response.write_eof()
        return response

    async def _pass_on(
        self, request: web.Request, response: web.StreamResponse, watcher: Any, kind: Kind
    ) -> bool:
        """One event, or a bookmark when there was none for a while. False at the end of the watch."""
        try:
            async with asyncio.timeout(BOOKMARK_SECONDS):
                event = await watcher.queue.get()
        except TimeoutError:
            if not self.faults.frozen_watches:
                await self._bookmark(request, response, kind)
            return True
        while self.faults.frozen_watches:
            await asyncio.sleep(0.05)
        if event is None:
            return False
        await _send(request, response, event)
        return True

    async def _bookmark(
        self, request: web.Request, response: web.StreamResponse, kind: Kind, *, is_start: bool = False
    ) -> None:
        metadata: Object = {"resourceVersion": str(self.objects.version)}
        if is_start:
            metadata["annotations"] = {"k8s.io/initial-events-end": "true"}
        item = {"apiVersion": kind.group_version, "kind": kind.kind, "metadata": metadata}
        await _send(request, response, ("BOOKMARK", item))

    def _create(self, request: web.Request, kind: Kind, namespace: str, body: Object) -> Object:
        if kind.namespaced and not namespace:
            raise Refused(400, "BadRequest", f"{kind.plural} need a namespace")
        sent = copy.deepcopy(body)
        fill(kind, body)
        check(
            kind,
            {
                **body,
                "apiVersion": kind.group_version,
                "kind": kind.kind,
                "metadata": body.get("metadata") or {},
            },
        )
        if kind.namespaced:
            self.objects.get(BY_NAME["Namespace"], "", namespace)
        if request.query.get("dryRun"):
            return body
        item = self.objects.create(kind, namespace, body)
        self._replica_owners.created(kind, key_of(item), _manager(request), sent)
        return item

    def _write(
        self,
        request: web.Request,
        kind: Kind,
        namespace: str,
        name: str,
        subresource: str,
        body: Object,
        *,
        is_applied: bool = False,
    ) -> Object:
        """A whole object, a status or a scale, to replace the present one."""
        present = self.objects.get(kind, namespace, name)
        if subresource == "scale":
            wanted = body.get("spec", {}).get("replicas", 0)
            new = copy.deepcopy(present)
            new["spec"]["replicas"] = wanted
            version = body.get("metadata", {}).get("resourceVersion")
            new["metadata"]["resourceVersion"] = version or present["metadata"]["resourceVersion"]
            written = self.objects.update(kind, new)
            self._replica_owners.written(kind, key_of(new), _manager(request), present, written)
            return _scale_of(kind, written)
        body.setdefault("metadata", {})["name"] = name
        if kind.namespaced:
            body["metadata"]["namespace"] = namespace
        if subresource != "status":
            fill(kind, body)
            if kind.kind == "Service" and "clusterIP" in present.get("spec", {}):
                body["spec"].setdefault("clusterIP", present["spec"]["clusterIP"])
            check(kind, body)
        if request.query.get("dryRun"):
            return body
        written = self.objects.update(kind, body, subresource=subresource)
        if not is_applied:
            self._replica_owners.written(kind, key_of(written), _manager(request), present, written)
        return written

    def _patch(
        self, request: web.Request, kind: Kind, namespace: str, name: str, subresource: str, body: Any
    ) -> web.Response:
        content_type = request.content_type
        present = self.objects.find(kind, namespace, name)
        if content_type == "application/apply-patch+yaml":
            return self._apply(request, kind, namespace, name, subresource, present, body)
        if present is None:
            self.objects.get(kind, namespace, name)
            raise AssertionError("unreachable")
        shown = _scale_of(kind, present) if subresource == "scale" else present
        how: Callable[[Any, Any], Any] | None = PATCHES.get(content_type)
        if how is None:
            raise Refused(415, "UnsupportedMediaType", f"patches of type {content_type} are not understood")
        try:
            new = how(copy.deepcopy(shown), body)
        except (ValueError, KeyError, IndexError) as error:
            raise Refused(422, "Invalid", f"the patch does not fit: {error}") from None
        has_version = isinstance(body, dict) and "resourceVersion" in (body.get("metadata") or {})
        if not has_version:
            new["metadata"].pop("resourceVersion", None)
        return _json(request, self._write(request, kind, namespace, name, subresource, new))

    def _apply(
        self,
        request: web.Request,
        kind: Kind,
        namespace: str,
        name: str,
        subresource: str,
        present: Object | None,
        body: Object,
    ) -> web.Response:
        manager = _manager(request)
        key = (kind, (namespace, name), manager)
        wanted = copy.deepcopy(body)
        wanted.get("metadata", {}).pop("managedFields", None)
        if present is None:
            body.setdefault("metadata", {})["name"] = name
            answer = _json(request, self._create(request, kind, namespace, body), status=201)
        else:
            new = patches.apply(copy.deepcopy(present), wanted, self._applied.get(key))
            self._replica_owners.settle(
                kind,
                key_of(present),
                manager,
                wanted=wanted,
                present=present,
                new=new,
                is_forced=request.query.get("force") == "true",
                is_tried=bool(request.query.get("dryRun")),
            )
            if not (wanted.get("metadata") or {}).get("resourceVersion"):
                new["metadata"].pop("resourceVersion", None)
            written = self._write(request, kind, namespace, name, subresource, new, is_applied=True)
            answer = _json(request, written)
        if not request.query.get("dryRun"):
            self._applied[key] = wanted
        return answer

    def _delete(self, request: web.Request, kind: Kind, namespace: str, name: str) -> web.Response:
        if name:
            item = self.objects.delete(kind, namespace, name)
            return _json(request, item)
        for item in self.objects.all(kind, namespace, selects=by_query(request.query)):
            self.objects.delete(kind, *key_of(item))
        return web.json_response({"kind": "Status", "apiVersion": "v1", "status": "Success"})

    def _fail_on_purpose(self, path: str) -> None:
        for ending, left in self.faults.conflicts.items():
            if left > 0 and path.endswith(ending):
                self.faults.conflicts[ending] = left - 1
                raise Refused(409, "Conflict", f"{path}: the object has been modified")


def _manager(request: web.Request) -> str:
    return request.query.get("fieldManager") or request.headers.get("User-Agent", "").split("/")[0]


def _body(data: bytes) -> Any:
    if not data:
        return {}
    if data.startswith(protobuf.MAGIC):
        try:
            return protobuf.decode(data)
        except ValueError as error:
            raise Refused(415, "UnsupportedMediaType", str(error)) from None
    try:
        return json.loads(data)
    except ValueError:
        return yaml.safe_load(data)


def _status(refused: Refused) -> Object:
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": refused.message,
        "reason": refused.reason,
        "code": refused.status,
    }


def _scale_of(kind: Kind, item: Object) -> Object:
    assert "scale" in kind.subresources, f"{kind.kind} has no scale"
    labels = (item["spec"].get("selector") or {}).get("matchLabels") or {}
    metadata = {
        name: item["metadata"][name]
        for name in ("name", "namespace", "uid", "resourceVersion", "creationTimestamp")
        if name in item["metadata"]
    }
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": metadata,
        "spec": {"replicas": item["spec"].get("replicas", 0)},
        "status": {
            "replicas": (item.get("status") or {}).get("replicas", 0),
            "selector": ",".join(f"{name}={value}" for name, value in labels.items()),
        },
    }


def _shown(request: web.Request, item: Object) -> Object:
    """Metadata alone, to whoever accepts only that."""
    if "as=PartialObjectMetadata" not in request.headers.get("Accept", ""):
        return item
    if "items" in item:
        items = [_partial(one) for one in item["items"]]
        return {**item, "apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadataList", "items": items}
    return _partial(item)


def _partial(item: Object) -> Object:
    return {"apiVersion": "meta.k8s.io/v1", "kind": "PartialObjectMetadata", "metadata": item["metadata"]}


def _json(request: web.Request, item: Object, *, status: int = 200) -> web.Response:
    return web.json_response(_shown(request, item), status=status)


async def _send(request: web.Request, response: web.StreamResponse, event: tuple[str, Object] | None) -> None:
    assert event is not None
    line = json.dumps({"type": event[0], "object": _shown(request, event[1])})
    await response.write(line.encode() + b"\n")
