"""Checks of what answers on the network: ports, workers, routers, and the difference of clocks.

Called by `rorqual.doctor.process`. A worker is greeted as a router greets it, and left at once; nothing is asked of it.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio

from rorqual import __version__
from rorqual.doctor.finding import Finding, fail, ok, warn
from rorqual.errors import ConfigError, WireError
from rorqual.service import format_address
from rorqual.session import PROTOCOL, Hello, Welcome
from rorqual.tls import TlsFiles, TlsKeeper, explain_unreachable
from rorqual.wire import SESSION_PATH, decode_report, encode_command

ANSWER_SECONDS_MAX = 5.0
CLOCK_SECONDS_MAX = 1.0
GREETINGS_MAX = 3
CURE_MIXED = (
    "while a rolling update goes on, wait for its end (kubectl rollout status); else look for pods of an old ReplicaSet"
    " (kubectl get pods -L pod-template-hash)"
)
CURE_APART = (
    "fine for a doctor that is not of the cluster's image; else routers and workers differ: run one version"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Greeting:
    """What a worker said: its welcome, or the code and the text of its refusal."""

    address: str
    welcome: Welcome | None = None
    code: str = ""
    text: str = ""


async def greet(address: str, *, tls: TlsFiles | None) -> Greeting:
    """gRPC's core now and then answers INTERNAL where a server refuses while we still write: then it is tried again."""
    for _ in range(GREETINGS_MAX - 1):
        greeting = await _greet_once(address, tls=tls)
        if greeting.code != "INTERNAL":
            return greeting
    return await _greet_once(address, tls=tls)


async def _greet_once(address: str, *, tls: TlsFiles | None) -> Greeting:
    options: tuple[tuple[str, Any], ...] = (
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),
    )
    if tls is None:
        channel: Any = grpc.aio.insecure_channel(address, options=options)
    else:
        keeper = TlsKeeper(tls, serves=False)
        options = (*options, *keeper.client_options())
        channel = grpc.aio.secure_channel(address, keeper.client_credentials(), options=options)
    async with channel:
        call: Any = channel.stream_stream(SESSION_PATH, None, None)(timeout=ANSWER_SECONDS_MAX)
        try:
            hello = Hello(protocol=PROTOCOL, router_id="doctor", version=__version__)
            await call.write(encode_command(hello))
            data = await call.read()
            if isinstance(data, bytes):
                report = decode_report(data)
                return Greeting(address=address, welcome=report if isinstance(report, Welcome) else None)
            return Greeting(address=address, code=(await call.code()).name, text=await call.details() or "")
        except grpc.aio.AioRpcError as error:
            return Greeting(address=address, code=error.code().name, text=error.details() or "")
        except grpc.aio.UsageError:
            return Greeting(address=address, code=(await call.code()).name, text=await call.details() or "")
        except WireError as error:
            return Greeting(address=address, code="WIRE", text=str(error))
        finally:
            call.cancel()


def judge_worker(greeting: Greeting, *, is_tls: bool) -> Finding:
    check = f"worker {greeting.address}"
    welcome, text = greeting.welcome, greeting.text
    if welcome is not None:
        version = welcome.version or "of an unknown version"
        said = (
            f"{welcome.role.value}, rorqual {version}, protocol {PROTOCOL}, model {welcome.model_fingerprint}"
        )
        return ok(check, f"welcomes us: {said}")
    if greeting.code == "UNAVAILABLE" and "loading" in text:
        return warn(check, "is loading its model", "wait; /ready on its metrics port turns 200")
    if greeting.code == "FAILED_PRECONDITION":
        return fail(check, text, "run the same version of Rorqual everywhere")
    if greeting.code == "RESOURCE_EXHAUSTED":
        return warn(check, f"takes no more sessions: {text}", "end routers that are not needed")
    if greeting.code == "DEADLINE_EXCEEDED":
        cure = (
            "the process stands still, or the network drops packets: look at it with py-spy or kubectl exec"
        )
        return fail(check, f"no answer within {ANSWER_SECONDS_MAX:g} s", cure)
    if greeting.code in ("UNIMPLEMENTED", "WIRE"):
        return fail(check, f"something else answers there: {text}", "give the address of --listen")
    why = explain_unreachable(text, is_tls=is_tls)
    if "TLS" in why or "certificate" in why:
        return fail(check, why, "give the same --tls-... here and there, or nowhere")
    return fail(check, f"cannot be reached: {why}", "is it running, and is its address right?")


def judge_agreement(greetings: Sequence[Greeting]) -> list[Finding]:
    """Of all workers that welcomed us."""
    welcomes = [(each.address, each.welcome) for each in greetings if each.welcome is not None]
    if len(welcomes) < 2:
        return []
    models = {welcome.model_fingerprint for _, welcome in welcomes}
    if len(models) > 1:
        found = "; ".join(f"{address} has {welcome.model_fingerprint}" for address, welcome in welcomes)
        return [fail("workers", f"they have different models: {found}", "give all the same checkpoint")]
    wires = {welcome.wire_id for _, welcome in welcomes if welcome.wire_id}
    if len(wires) > 1:
        cure = "give prefill and decode workers the same version, --numerics and --drafts"
        return [fail("workers", f"their states cannot be exchanged (wire ids {sorted(wires)})", cure)]
    return [ok("workers", f"{len(welcomes)} have the same model")]


def judge_worker_versions(greetings: Sequence[Greeting], *, ours: str) -> list[Finding]:
    """Of all workers that welcomed us, and of this doctor, whose version is `ours`. A mix may be as it should be."""
    addresses: dict[str, list[str]] = {}
    for each in greetings:
        if each.welcome is not None:
            addresses.setdefault(each.welcome.version, []).append(each.address)
    if not addresses:
        return []
    check = "worker versions"
    if len(addresses) > 1:
        parts = [f"{version or 'not said'}: {', '.join(who)}" for version, who in sorted(addresses.items())]
        return [warn(check, f"they differ ({'; '.join(parts)}); this doctor is {ours}", CURE_MIXED)]
    ((version, who),) = addresses.items()
    if version == ours:
        return [ok(check, f"all ({len(who)}) run rorqual {version}, as this doctor does")]
    if version:
        return [warn(check, f"all ({len(who)}) run rorqual {version}; this doctor is {ours}", CURE_APART)]
    found = f"all ({len(who)}) do not say theirs, as old ones do not; this doctor is {ours}"
    return [warn(check, found, CURE_APART)]


def clock_offset(date: str, *, asked: float, answered: float) -> float | None:
    """Seconds that the other clock is ahead for certain (below 0: behind), of a Date header, which has whole seconds,
    and our wall clock before and after; None: the header cannot be read."""
    try:
        whole = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError):
        return None
    if whole > answered:
        return whole - answered
    return min(0.0, whole + 1 - asked)


def judge_clock(check: str, offset: float | None) -> Finding:
    if offset is None:
        return warn(check, "tells no time", "")
    if abs(offset) > CLOCK_SECONDS_MAX:
        side = "ahead of" if offset > 0 else "behind"
        return warn(check, f"its clock is {abs(offset):.1f} s {side} ours", "run chrony or ntpd on both")
    return ok(check, "its clock is right to a second")


def look_at_router(url: str, ca: TlsFiles | None) -> list[Finding]:
    """Blocks, at most ANSWER_SECONDS_MAX for each answer."""
    check = f"router {url}"
    try:
        asked = time.time()
        health, date = _get(url, "/health", ca)
        answered = time.time()
        ready, _ = _get(url, "/ready", ca)
    except TimeoutError:
        return [fail(check, f"no answer within {ANSWER_SECONDS_MAX:g} s", "the process stands still")]
    except ssl.SSLError as error:
        return [fail(check, f"TLS: {error.reason or error}", "https or http? is the CA given (--tls-ca)?")]
    except (OSError, http.client.HTTPException) as error:
        return [fail(check, f"cannot be reached: {error}", "is it running, and is the URL right?")]
    found = [judge_clock(check, clock_offset(date, asked=asked, answered=answered))]
    if health != 200:
        found.append(fail(check, f"/health says {health}", "is this a router?"))
    elif ready != 200:
        found.append(warn(check, f"lives, but is not ready ({ready})", "it lacks workers: see its log"))
    else:
        found.append(ok(check, "lives and is ready"))
    return found


def _get(url: str, path: str, ca: TlsFiles | None) -> tuple[int, str]:
    split = urlsplit(url)
    if split.scheme not in ("http", "https") or not split.hostname:
        raise ConfigError(f"--router must be http://HOST:PORT or https://HOST:PORT, not {url!r}")
    if split.scheme == "https":
        context = ssl.create_default_context(cafile=None if ca is None else ca.ca)
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            split.hostname, split.port, timeout=ANSWER_SECONDS_MAX, context=context
        )
    else:
        connection = http.client.HTTPConnection(split.hostname, split.port, timeout=ANSWER_SECONDS_MAX)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.getheader("Date") or ""
    finally:
        connection.close()


def look_at_port(host: str, port: int) -> Finding:
    """Blocks, at most ANSWER_SECONDS_MAX."""
    check = f"port {format_address(host, port)}"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return ok(check, "free")
        except socket.gaierror as error:
            return fail(check, f"is no address: {error.strerror}", "give HOST:PORT of this machine")
        except PermissionError:
            return fail(check, "may not be taken by this user", "choose a port above 1023")
        except OSError as error:
            text = error.strerror or str(error)
    return fail(
        check, f"cannot be taken ({text}); {_who_answers(host, port)}", "choose another, or end who has it"
    )


def _who_answers(host: str, port: int) -> str:
    for request, sign, name in (
        (b"PING\r\n", b"+PONG", "a Redis answers there"),
        (b"PING\r\n", b"-NOAUTH", "a Redis with a password answers there"),
        (b"GET /health HTTP/1.0\r\n\r\n", b"HTTP/1.", "an HTTP server answers there"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x00\x00", "a gRPC server, perhaps a worker, answers there"),
    ):
        try:
            with socket.create_connection((host, port), timeout=1) as client:
                client.settimeout(1)
                client.sendall(request)
                if client.recv(64).startswith(sign):
                    return name
        except OSError:
            continue
    return "nobody there says who it is"
