"""The gRPC gateway: `rorqual.v1.Generation/Generate`, standard health and reflection.

Owned by the router's process, which calls `start` and `stop`. It asks the same Generator and PromptSource
as the HTTP gateway. A call that is cancelled, or whose deadline passes, closes its generation at once; a
client that does not read is cut off at the write deadline.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

import grpc
import grpc.aio

from rorqual.api_keys import ApiKeys
from rorqual.clock import Clock
from rorqual.errors import InvalidRequest, Overloaded, RorqualError, StageTimedOut, WorkerLost
from rorqual.grpc_health import HealthService
from rorqual.ids import draw_request_id
from rorqual.sampling import SEED_BITS, SamplingParams
from rorqual.session import TokenArray
from rorqual.telemetry import fields
from rorqual.tls import SERVER_OPTIONS, TlsFiles, TlsKeeper
from router.admission import Admission, Place, TooManyRequests
from router.gateway_metrics import GatewayMetrics, RequestMeter
from router.generation import (
    ChoiceUpdate,
    Generation,
    Generator,
    PromptSource,
    ServedModel,
    Usage,
    finish_name,
)
from router.limits import (
    COMPLETION_TOKENS_DEFAULT,
    check_model,
    check_num_choices,
    check_num_logit_biases,
    check_session_key,
    check_stops,
    token_array,
    token_budget,
)
from router.wire import SERVICE_NAME, CallContext, GenerateCall, add_generation_service

log = logging.getLogger(__name__)

ROUTE = "rorqual.v1.Generation/Generate"
HEALTH_SECONDS = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpcSettings:
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    shared_cache_salt: str = ""  # see `rorqual.api_keys.ApiKeys`
    api_keys: tuple[str, ...] = ()  # checked against the metadata "authorization: Bearer KEY"
    message_bytes_max: int = 16 * 1024 * 1024
    calls_max: int = 4096  # of every kind, health checks too
    write_seconds_max: float = 30.0
    # A client whose machine vanished without a word is noticed after both together, and its choices freed.
    keepalive_seconds: float = 30.0
    keepalive_reply_seconds_max: float = 10.0
    request_seconds_max: float = 6 * 3600.0
    drain_seconds_max: float = 30.0
    tls: TlsFiles | None = None


class GrpcGateway:
    def __init__(
        self,
        *,
        generator: Generator,
        prompts: PromptSource,
        settings: GrpcSettings,
        metrics: GatewayMetrics,
        admission: Admission,
        clock: Clock,
    ) -> None:
        self._generator = generator
        self._prompts = prompts
        self._settings = settings
        self._metrics = metrics
        self._admission = admission
        self._clock = clock
        self._api_keys = ApiKeys(settings.api_keys, shared_cache_salt=settings.shared_cache_salt)
        self._server: grpc.aio.Server | None = None
        self._health = HealthService(SERVICE_NAME)
        self._health_task: asyncio.Task[None] | None = None
        self._is_serving = False  # as health says

    def replace_api_keys(self, keys: Sequence[str]) -> None:
        """From the next request on."""
        self._api_keys.replace(keys)

    async def start(self) -> str:
        """Listen; returns host:port. Raises OSError when the address cannot be had."""
        settings = self._settings
        server = grpc.aio.server(
            maximum_concurrent_rpcs=settings.calls_max,
            options=(*_channel_options(settings), *SERVER_OPTIONS),
        )
        add_generation_service(server, self._generate)
        self._health.add_to(server)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            if settings.tls is None:
                port = server.add_insecure_port(f"{host}:{settings.port}")
            else:
                credentials = TlsKeeper(settings.tls, serves=True).server_credentials()
                port = server.add_secure_port(f"{host}:{settings.port}", credentials)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {host}:{settings.port}: {error}") from None
        if port == 0:
            raise OSError(f"gRPC cannot listen on {host}:{settings.port}")
        await self._health.set_serving(False)
        await server.start()
        self._server = server
        self._health_task = asyncio.create_task(self._watch_health())
        reachable = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
        return f"{reachable}:{port}"

    async def watch(self) -> None:
        """Ends only by a fault of the task that reports health, and raises it."""
        assert self._health_task is not None
        await asyncio.shield(self._health_task)

    async def stop(self) -> None:
        if self._health_task is not None:
            self._health_task.cancel()
            await asyncio.gather(self._health_task, return_exceptions=True)
        if self._server is not None:
            await self._health.shut_down()
            await self._server.stop(self._settings.drain_seconds_max)

    # --- health: serving while a worker is connected

    async def refresh_health(self) -> None:
        """Now, and not with the next round: whoever is told that the router is ready finds it so."""
        ready = self._generator.model() is not None
        if ready != self._is_serving:
            self._is_serving = ready
            await self._health.set_serving(ready)

    async def _watch_health(self) -> None:
        while True:
            await self.refresh_health()
            await asyncio.sleep(HEALTH_SECONDS)

    # --- one call

    async def _generate(self, call: GenerateCall, context: CallContext) -> None:
        meter = RequestMeter(self._metrics, route=ROUTE, clock=self._clock)
        status = grpc.StatusCode.CANCELLED
        try:
            if not self._api_keys.accept(context.metadata("authorization").encode()):
                raise InvalidRequest("give an API key as metadata 'authorization: Bearer KEY'", status=401)
            with self._admission.enter() as place:
                async with asyncio.timeout(self._settings.request_seconds_max):
                    await self._answer(call, context, meter, place)
            status = grpc.StatusCode.OK
            log.info("finished a request %s %s", meter.about(), meter.finished())
        except RorqualError as error:
            status = self._fail(context, meter, error)
        except TimeoutError:
            late = StageTimedOut(f"the request outlived {self._settings.request_seconds_max:g} s")
            status = self._fail(context, meter, late)
        except asyncio.CancelledError:
            meter.cancelled()
            tokens = meter.num_completion_tokens
            log.info("cancelled a request %s %s", meter.about(), fields(completion_tokens=tokens))
            raise
        except Exception:
            meter.failed()
            log.exception("failed by a fault of the router %s", meter.about())
            status = grpc.StatusCode.INTERNAL
            context.fail(status, "the router failed to answer this request")
        finally:
            meter.end(status.name)

    def _fail(self, context: CallContext, meter: RequestMeter, error: RorqualError) -> grpc.StatusCode:
        status = _status(error)
        context.fail(status, _details(error))
        if not isinstance(error, InvalidRequest | TooManyRequests):
            about = fields(status=status.name, error=error)
            log.warning("failed a request %s %s", meter.about(), about)
        return status

    async def _answer(
        self, call: GenerateCall, context: CallContext, meter: RequestMeter, place: Place
    ) -> None:
        model = self._generator.model()
        if model is None:
            raise Overloaded("no worker is connected yet; try again later")
        salt = self._api_keys.cache_salt(context.metadata("authorization").encode())
        generation = await self._read(call, model, cache_salt=salt)
        meter.request_id = generation.request_id
        place.grow(generation.num_choices)
        meter.prompted(len(generation.prompt))
        num_unfinished = generation.num_choices
        async with aclosing(self._generator.generate(generation)) as updates:
            async for update in updates:
                meter.saw(update, choice=update.choice)
                num_unfinished -= update.finish_reason is not None
                usage = None
                if num_unfinished == 0:
                    usage = meter.usage
                await self._write(context, update, generation, usage)

    async def _write(
        self, context: CallContext, update: ChoiceUpdate, generation: Generation, usage: Usage | None
    ) -> None:
        deadline = asyncio.timeout(self._settings.write_seconds_max)
        try:
            async with deadline:
                await context.write(
                    update,
                    request_id=generation.request_id,
                    seed=generation.sampling.seed,
                    finish_reason=finish_name(update.finish_reason) or "",
                    usage=usage,
                )
        except TimeoutError:
            if not deadline.expired():
                raise
            self._metrics.cut_off.labels("grpc_write_deadline").inc()
            raise StageTimedOut(
                f"the client read nothing for {self._settings.write_seconds_max:g} s"
            ) from None

    async def _read(self, call: GenerateCall, model: ServedModel, *, cache_salt: str) -> Generation:
        """The call as a checked Generation. Raises InvalidRequest naming the message's field."""
        check_model(call.model, model)
        check_num_logit_biases(len(call.logit_bias), field="sampling.logit_bias")
        sampling = SamplingParams(
            seed=secrets.randbits(SEED_BITS) if call.seed is None else call.seed,
            logit_bias=call.logit_bias,
            logprobs=call.logprobs,
            **call.sampling,
        )
        try:
            sampling.check(model.vocab_size)
        except InvalidRequest as error:
            raise InvalidRequest(str(error), field=f"sampling.{error.field}") from None
        num_choices = check_num_choices(1 if call.num_choices is None else call.num_choices)
        wanted = COMPLETION_TOKENS_DEFAULT if call.max_tokens is None else call.max_tokens
        if wanted == 0:
            raise InvalidRequest("max_tokens must be at least 1", field="max_tokens")
        stops = check_stops(call.stops)
        prompt, field = await self._encode(call, model)
        return Generation(
            request_id=draw_request_id("gen"),
            prompt=prompt,
            max_tokens=token_budget(
                prompt, wanted, model=model, prompt_field=field, budget_field="max_tokens"
            ),
            num_choices=num_choices,
            sampling=sampling,
            stop=stops,
            ignore_eos=call.ignore_eos,
            cache_salt=cache_salt,
            session_key=check_session_key(call.session_key, field="session_key"),
        )

    async def _encode(self, call: GenerateCall, model: ServedModel) -> tuple[TokenArray, str]:
        if call.token_ids is not None:
            field = "token_ids.ids"
            return token_array(call.token_ids, vocab_size=model.vocab_size, field=field), field
        if call.text is not None:
            return await self._prompts.aencode_text(
                call.text, field="text", num_tokens_max=model.sequence_tokens_max
            ), "text"
        raise InvalidRequest("prompt is missing: set text or token_ids", field="prompt")


def _channel_options(settings: GrpcSettings) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", settings.message_bytes_max),
        ("grpc.so_reuseport", 0),  # or a second router would share the port in silence
        ("grpc.keepalive_time_ms", int(1e3 * settings.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", int(1e3 * settings.keepalive_reply_seconds_max)),
        # Keepalive's probes are pings, which have a deadline of their own: a minute, if it is not said.
        ("grpc.http2.ping_timeout_ms", int(1e3 * settings.keepalive_reply_seconds_max)),
        ("grpc.http2.max_pings_without_data", 0),  # a long prefill sends no data
        # A client may probe us as often as we probe it; by default gRPC ends one that does within 5 minutes.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    )


def _status(error: RorqualError) -> grpc.StatusCode:
    if isinstance(error, InvalidRequest):
        by_status = {401: grpc.StatusCode.UNAUTHENTICATED, 404: grpc.StatusCode.NOT_FOUND}
        return by_status.get(error.status, grpc.StatusCode.INVALID_ARGUMENT)
    if isinstance(error, TooManyRequests):
        return grpc.StatusCode.RESOURCE_EXHAUSTED
    if isinstance(error, StageTimedOut):
        return grpc.StatusCode.DEADLINE_EXCEEDED
    if isinstance(error, Overloaded | WorkerLost):
        return grpc.StatusCode.UNAVAILABLE
    return grpc.StatusCode.INTERNAL


def _details(error: RorqualError) -> str:
    """INVALID_ARGUMENT must name its field, also where the text alone does not."""
    if isinstance(error, InvalidRequest) and error.field and error.field not in str(error):
        return f"{error.field}: {error}"
    return str(error)
