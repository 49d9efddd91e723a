"""The HTTP gateway: routes, authentication, limits, and each request's story from body to last byte.

Owned by the router's process, which calls `start` and `stop`. It asks a Generator for tokens and a
PromptSource for ids, and knows nothing of workers. No request ends it: what fails is answered, counted and
logged.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from rorqual.api_keys import ApiKeys
from rorqual.clock import Clock
from rorqual.errors import InvalidRequest, Overloaded, RorqualError, StageTimedOut
from rorqual.ids import RequestId
from rorqual.sampling import SEED_BITS
from rorqual.service import format_address
from rorqual.telemetry import fields
from rorqual.tls import TlsFiles, TlsKeeper
from router.admission import Admission
from router.gateway.chat import ChatWriter
from router.gateway.completions import CompletionWriter
from router.gateway.errors import RETRY_AFTER, answer_to, error_body, error_of
from router.gateway.http1 import Headers, HttpLimits, HttpReply, HttpRequest, HttpServer, Refusal
from router.gateway.merge import updates_of
from router.gateway.requests import (
    ChatJob,
    CompletionJob,
    SeedSource,
    read_chat,
    read_completion,
    read_tokenize,
)
from router.gateway.schema import ChatBody, CompletionBody, TokenizeBody, decode_body
from router.gateway.writers import DONE, AnswerWriter, to_json
from router.gateway_metrics import GatewayMetrics, RequestMeter
from router.generation import Generation, Generator, PromptSource, ServedModel
from router.limits import check_session_key

SESSION_HEADER = b"x-session-id"
"""Requests of one session begin alike. Nothing is asked of a client that sends none."""

log = logging.getLogger(__name__)

JSON = b"application/json"
EVENT_STREAM = b"text/event-stream; charset=utf-8"
# Proxies must pass events on as they come (nginx buffers without the second).
STREAM_HEADERS: Headers = ((b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no"))


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpSettings:
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    shared_cache_salt: str = ""  # see `rorqual.api_keys.ApiKeys`
    api_keys: tuple[str, ...] = ()  # none: open to everyone who can connect
    request_seconds_max: float = 6 * 3600.0  # a million tokens at 50 a second
    drain_seconds_max: float = 30.0
    limits: HttpLimits = field(default_factory=HttpLimits)
    tls: TlsFiles | None = None


@dataclass(slots=True, kw_only=True)
class _Exchange:
    """One request, everything needed to answer it, and what is told of it afterwards."""

    request: HttpRequest
    reply: HttpReply
    meter: RequestMeter
    status: str = "cancelled"  # of a stream that fails, its failure's


_Answer = Callable[[_Exchange], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Route:
    method: str
    answer: _Answer
    open: bool = False  # without an API key


class HttpGateway:
    def __init__(
        self,
        *,
        generator: Generator,
        prompts: PromptSource,
        settings: HttpSettings,
        metrics: GatewayMetrics,
        admission: Admission,
        clock: Clock,
        draw_seed: SeedSource = lambda: secrets.randbits(SEED_BITS),
        missing: Callable[[], str] = lambda: "",
    ) -> None:
        """`missing`: why no request can be answered yet, for whoever asks whether we are ready."""
        self._generator = generator
        self._prompts = prompts
        self._settings = settings
        self._metrics = metrics
        self._admission = admission
        self._clock = clock
        self._draw_seed = draw_seed
        self._missing = missing
        self._api_keys = ApiKeys(settings.api_keys, shared_cache_salt=settings.shared_cache_salt)
        self._server = HttpServer(
            self._handle,
            on_head=self._look_at_head,
            limits=settings.limits,
            clock=clock,
            cut_off=lambda reason: metrics.cut_off.labels(reason).inc(),
        )
        metrics.body_bytes_inflight.set_function(lambda: self._server.body_bytes_inflight)
        self._routes = {
            "/v1/chat/completions": _Route(method="POST", answer=self._chat),
            "/v1/completions": _Route(method="POST", answer=self._completions),
            "/v1/models": _Route(method="GET", answer=self._models),
            "/tokenize": _Route(method="POST", answer=self._tokenize),
            "/health": _Route(method="GET", answer=self._health, open=True),
            "/ready": _Route(method="GET", answer=self._ready, open=True),
            "/metrics": _Route(method="GET", answer=self._expose_metrics, open=True),
        }
        self._model_route = _Route(method="GET", answer=self._model_by_name)

    def replace_api_keys(self, keys: Sequence[str]) -> None:
        """From the next request on."""
        self._api_keys.replace(keys)

    async def start(self) -> str:
        """Listen; returns the URL to reach us at. Raises OSError when the address cannot be had."""
        host = self._settings.host
        tls, scheme = None, "http"
        if self._settings.tls is not None:
            tls, scheme = TlsKeeper(self._settings.tls, serves=True).listening_context(), "https"
        port = await self._server.start(host=host, port=self._settings.port, tls=tls)
        reachable = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"{scheme}://{format_address(reachable, port)}"

    async def stop(self) -> None:
        """Take no more requests, let running ones finish for `drain_seconds_max`, cancel what is left and
        tell its clients."""
        await self._server.stop(drain_seconds=self._settings.drain_seconds_max)

    # --- one request

    async def _handle(self, request: HttpRequest, reply: HttpReply) -> None:
        name, route = self._find(request.path)
        meter = RequestMeter(self._metrics, route=name, clock=self._clock)
        exchange = _Exchange(request=request, reply=reply, meter=meter)
        try:
            if request.refusal is not None:
                raise error_of(request.refusal)
            assert route is not None
            await self._answer(route, exchange)
            exchange.status = str(reply.status)
        except RorqualError as error:
            self._fail(exchange, error)
        except asyncio.CancelledError:
            self._cancelled(exchange)
            raise
        except Exception:
            meter.failed()
            log.exception("failed by a fault of the router %s", exchange.meter.about())
            self._fail(exchange, RorqualError("the router failed to answer this request"))
        finally:
            meter.end(exchange.status)

    def _cancelled(self, exchange: _Exchange) -> None:
        """By a client that went away, or at the end of the router's own time to finish requests."""
        if exchange.reply.client_is_gone:
            exchange.meter.cancelled()
            tokens = exchange.meter.num_completion_tokens
            log.info("cancelled a request %s %s", exchange.meter.about(), fields(completion_tokens=tokens))
        else:
            self._fail(exchange, Overloaded("the router is stopping; try again later"))

    async def _answer(self, route: _Route, exchange: _Exchange) -> None:
        deadline = asyncio.timeout(self._settings.request_seconds_max)
        try:
            async with deadline:
                await route.answer(exchange)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise StageTimedOut(f"the request outlived {self._settings.request_seconds_max:g} s") from None

    def _find(self, path: str) -> tuple[str, _Route | None]:
        """The route and its name among metrics: what clients invent must not become labels."""
        if path in self._routes:
            return path, self._routes[path]
        if path.startswith("/v1/models/"):
            return "/v1/models/{id}", self._model_route
        return "unknown", None

    def _look_at_head(self, request: HttpRequest) -> Refusal | None:
        """What is refused without a look at the body, and without keeping it."""
        route = self._find(request.path)[1]
        is_open = route is not None and route.open
        if not is_open and not self._api_keys.accept(request.headers.get(b"authorization", b"")):
            message = "give an API key as 'Authorization: Bearer KEY'"
            return Refusal(status=401, message=message, code="invalid_api_key")
        path = request.path[:200]
        if route is None:
            return Refusal(status=404, message=f"there is no {path}", code="unknown_url")
        if request.method != route.method and (request.method, route.method) != ("HEAD", "GET"):
            message = f"{path} takes {route.method}, not {request.method}"
            return Refusal(status=405, message=message, code="method_not_allowed")
        if request.headers.get(b"content-encoding", b"identity") != b"identity":
            return Refusal(status=415, message="a body with a content-encoding is not supported")
        return None

    def _fail(self, exchange: _Exchange, error: RorqualError) -> None:
        answer = answer_to(error)
        exchange.status = str(answer.status)
        reply = exchange.reply
        if reply.started or answer.status >= 500:
            about = fields(status=answer.status, streamed=reply.started, error=error)
            log.warning("failed a request %s %s", exchange.meter.about(), about)
        if reply.finished:
            return
        if reply.started:
            reply.write(b"data: %b\n\n" % answer.body)
            reply.finish()
            return
        headers = (*answer.headers, *_id_header(exchange.meter.request_id))
        if answer.status == 401:
            headers = (*headers, (b"www-authenticate", b"Bearer"))
        if answer.status == 405:
            route = self._find(exchange.request.path)[1]
            headers = (*headers, (b"allow", b"GET, HEAD" if route and route.method == "GET" else b"POST"))
        reply.send(answer.status, answer.body, content_type=JSON, headers=headers)

    # --- generating

    async def _chat(self, exchange: _Exchange) -> None:
        with self._admission.enter() as place:
            job = await self._read_chat(exchange)
            place.grow(job.num_choices)
            writer = ChatWriter(job, names=self._prompts, created=int(self._clock.wall()))
            await self._generate(exchange, writer)

    async def _completions(self, exchange: _Exchange) -> None:
        with self._admission.enter() as place:
            job = await self._read_completion(exchange)
            place.grow(job.num_choices)
            writer = CompletionWriter(job, names=self._prompts, created=int(self._clock.wall()))
            await self._generate(exchange, writer)

    # Bodies end with these two: what is generated for hours must not hold on to megabytes of JSON.

    async def _read_chat(self, exchange: _Exchange) -> ChatJob:
        body = decode_body(_CHAT_DECODER, exchange.request.take_body())
        job = await read_chat(body, model=self._model(), prompts=self._prompts, draw_seed=self._draw_seed)
        return replace(job, generation=self._of_client(exchange, job.generation))

    async def _read_completion(self, exchange: _Exchange) -> CompletionJob:
        body = decode_body(_COMPLETION_DECODER, exchange.request.take_body())
        job = await read_completion(
            body, model=self._model(), prompts=self._prompts, draw_seed=self._draw_seed
        )
        return replace(job, generations=tuple(self._of_client(exchange, item) for item in job.generations))

    def _of_client(self, exchange: _Exchange, generation: Generation) -> Generation:
        """With what its headers say: whose state it may share, and which requests it belongs with."""
        headers = exchange.request.headers
        salt = self._api_keys.cache_salt(headers.get(b"authorization", b""))
        session_key = headers.get(SESSION_HEADER, b"").decode("latin-1")
        return replace(
            generation,
            cache_salt=salt,
            session_key=check_session_key(session_key, field=SESSION_HEADER.decode()),
        )

    async def _generate(self, exchange: _Exchange, writer: AnswerWriter) -> None:
        """Drive the generations into the answer. Cancelled with its client, it closes them before it ends."""
        meter = exchange.meter
        meter.request_id = writer.style.request_id
        meter.prompted(sum(len(generation.prompt) for generation in writer.generations))
        if writer.style.stream:
            await self._stream(exchange, writer)
        else:
            await self._collect(exchange, writer)
        log.info("finished a request %s %s", meter.about(), meter.finished())

    async def _stream(self, exchange: _Exchange, writer: AnswerWriter) -> None:
        meter, reply = exchange.meter, exchange.reply
        headers = (*STREAM_HEADERS, *_id_header(exchange.meter.request_id))
        num_choices = writer.style.num_choices
        async with aclosing(updates_of(self._generator, writer.generations)) as updates:
            async for prompt, update in updates:
                if not reply.started:  # not before: a failure until here still has its own status
                    reply.start(200, content_type=EVENT_STREAM, headers=headers)
                meter.saw(update, choice=prompt * num_choices + update.choice, prompt=prompt)
                events = writer.events(prompt, update)
                if events:
                    reply.write(events)
                    await reply.drain()
        assert reply.started, "a generation ended without an update"
        reply.write(writer.last_event(meter.usage) + DONE)
        reply.finish()

    async def _collect(self, exchange: _Exchange, writer: AnswerWriter) -> None:
        meter = exchange.meter
        num_choices = writer.style.num_choices
        async with aclosing(updates_of(self._generator, writer.generations)) as updates:
            async for prompt, update in updates:
                meter.saw(update, choice=prompt * num_choices + update.choice, prompt=prompt)
                writer.add(prompt, update)
        body = writer.body(meter.usage)
        exchange.reply.send(200, body, content_type=JSON, headers=_id_header(exchange.meter.request_id))

    def _model(self) -> ServedModel:
        model = self._generator.model()
        if model is None:
            raise Overloaded("no worker is connected yet; try again later")
        return model

    # --- everything else

    async def _models(self, exchange: _Exchange) -> None:
        model = self._generator.model()
        data = [] if model is None else [_model_card(model)]
        exchange.reply.send(200, to_json({"object": "list", "data": data}), content_type=JSON)

    async def _model_by_name(self, exchange: _Exchange) -> None:
        name = exchange.request.path.removeprefix("/v1/models/")
        model = self._model()
        if name != model.name:
            raise InvalidRequest(
                f"the model {name[:200]!r} does not exist", field="model", status=404, code="model_not_found"
            )
        exchange.reply.send(200, to_json(_model_card(model)), content_type=JSON)

    async def _tokenize(self, exchange: _Exchange) -> None:
        body = decode_body(_TOKENIZE_DECODER, exchange.request.take_body())
        model = self._generator.model()
        ids = await read_tokenize(body, model=model, prompts=self._prompts)
        answer = {
            "tokens": ids.tolist(),
            "count": len(ids),
            "max_model_len": None if model is None else model.sequence_tokens_max,
        }
        exchange.reply.send(200, to_json(answer), content_type=JSON)

    async def _health(self, exchange: _Exchange) -> None:
        exchange.reply.send(200, to_json({"status": "ok"}), content_type=JSON)

    async def _ready(self, exchange: _Exchange) -> None:
        model = self._generator.model()
        if self._server.stopping or model is None:
            missing = self._missing() or "no worker is connected yet"
            reason = "the router is stopping" if self._server.stopping else missing
            body = error_body(reason, kind="overloaded_error", code="not_ready")
            exchange.reply.send(503, body, content_type=JSON, headers=RETRY_AFTER)
            return
        exchange.reply.send(200, to_json({"status": "ready", "model": model.name}), content_type=JSON)

    async def _expose_metrics(self, exchange: _Exchange) -> None:
        body = generate_latest(self._metrics.registry)
        exchange.reply.send(200, body, content_type=CONTENT_TYPE_LATEST.encode())


_CHAT_DECODER = msgspec.json.Decoder(ChatBody)
_COMPLETION_DECODER = msgspec.json.Decoder(CompletionBody)
_TOKENIZE_DECODER = msgspec.json.Decoder(TokenizeBody)


def _id_header(request_id: RequestId | None) -> Headers:
    return () if request_id is None else ((b"x-request-id", request_id.encode()),)


def _model_card(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "rorqual",
        "max_model_len": model.sequence_tokens_max,
    }
