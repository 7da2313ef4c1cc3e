"""The server's routes: OpenAI's, health, metrics, and a page to try a prompt.

    app = create_app(llm, Settings(model="demo"))

Needs the extra: pip install 'ease-lm[serve]'. A request is read, queued with the Dispatcher, and followed
until it ends or its client goes away.
"""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ease_common.errors import RequestError
from ease_common.extras import missing_extra
from ease_runtime.llm import TextEngine
from ease_runtime.options import TO_THE_END, Options
from ease_runtime.server.answers import Answer
from ease_runtime.server.api_error import ApiError, error_object
from ease_runtime.server.dispatcher import Dispatcher, Ticket
from ease_runtime.server.engine_thread import Job
from ease_runtime.server.front import Front
from ease_runtime.server.metrics import Metrics
from ease_runtime.server.requests import GenerationRequest, check_length, read_chat, read_completion
from ease_runtime.server.shadow import Shadow
from ease_runtime.server.updates import Update

if TYPE_CHECKING:
    from fastapi import FastAPI, Request, Response

PAGE = Path(__file__).parent / "page.html"
JSON = "application/json"
HANG_UP = 499  # as nginx counts requests whose client has gone
Reader = Callable[[Any, TextEngine, Options, int | None], GenerationRequest]


@dataclass(frozen=True)
class Settings:
    """How to serve. Sizes are limits; what is past them is refused."""

    model: str  # the name that clients see
    options: Options = field(default_factory=Options)  # where a request says nothing
    api_key: str | None = None
    max_body_bytes: int = 2**20
    max_prompt_tokens: int | None = None  # None: as many as the model's context takes
    body_seconds: float = 30.0  # that a body may take to come
    hosts: frozenset[str] | None = None  # names that requests may call this server by; None: any
    cors_origins: tuple[str, ...] = ()  # pages of other origins that may ask; "*": all
    max_queued: int = 64  # completions that wait for a slot
    shadow: float = 0.0  # share of the early answers that run again at full depth
    certificate: dict[str, Any] | None = None  # what such answers are held against
    max_chat_tokens: int = TO_THE_END  # the `max_tokens` of a chat that says nothing
    clamp_max_tokens: bool = False  # shorten what is past the context instead of refusing it


class Service:
    """One model being served."""

    def __init__(self, llm: TextEngine, settings: Settings) -> None:
        self.llm = llm
        self.settings = settings
        self.metrics = Metrics(llm.stack, llm.engine.cache.num_slots)
        self.shadow = Shadow(llm.engine, settings.shadow, settings.certificate) if settings.shadow else None
        self.worker = Dispatcher(llm, self.metrics, max_queued=settings.max_queued, shadow=self.shadow)
        self.started = int(time.time())

    def check_key(self, request: "Request") -> None:
        """Raises ApiError unless the request has the key, where there is one."""
        expected = self.settings.api_key
        scheme, _, given = dict(request.scope["headers"]).get(b"authorization", b"").partition(b" ")
        known = expected is None or hmac.compare_digest(given.strip(), expected.encode())
        if not known or (expected is not None and scheme.lower() != b"bearer"):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'",
                code="invalid_api_key",
            )

    async def read_body(self, request: "Request") -> Any:
        """The JSON of a body.

        Raises ApiError for one that is said to be something else, is too large, comes too slowly, or is no
        UTF-8 or no JSON.
        """
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind != JSON and not kind.endswith("+json"):
            raise ApiError(415, f"the body is {kind[:80]!r}; send JSON, with Content-Type: {JSON}")
        limit = self.settings.max_body_bytes
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise ApiError(
                            413,
                            f"the body is larger than {limit} bytes; send a shorter prompt",
                            code="body_too_large",
                        )
        except TimeoutError:
            raise ApiError(408, f"the body took longer than {self.settings.body_seconds:g} seconds") from None
        try:
            return json.loads(body.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ApiError(400, f"the body is not UTF-8: {error.reason} at byte {error.start}") from None
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {error}") from None

    async def read(self, request: "Request", reader: Reader, base: Options) -> GenerationRequest:
        """What a request asks for, over the options where it says nothing. Raises RequestError."""
        self.check_key(request)
        self.worker.check_room(1)  # before anything is done for it
        body = await self.read_body(request)
        if isinstance(body, dict) and body.get("model") not in (None, self.settings.model):
            raise ApiError(
                404,
                f"no model {str(body['model'])[:80]!r} here; this server has '{self.settings.model}'",
                code="model_not_found",
            )
        asked = await asyncio.to_thread(reader, body, self.llm, base, self.settings.max_prompt_tokens)
        check_length(
            asked,
            context=self.llm.stack.max_positions,
            max_prompt=self.settings.max_prompt_tokens,
            clamp=self.settings.clamp_max_tokens,
        )
        return asked

    async def answer(self, request: "Request", endpoint: str, reader: Reader) -> "Response":
        """One request from its body to its last token."""
        base = self.settings.options
        if endpoint == "chat":
            base = replace(base, max_tokens=self.settings.max_chat_tokens)
        try:
            asked = await self.read(request, reader, base)
            job = Job(asked.prompts, asked.options, asked.score_prompt, asked.patterns)
            ticket = await self.worker.submit(job)
        except RequestError as error:
            status = error.status if isinstance(error, ApiError) else 400
            self.metrics.requests.labels(endpoint, "refused" if status in (429, 503) else "invalid").inc()
            raise
        self.watch(request, ticket)
        answer = Answer(asked, self.settings.model, endpoint == "chat", self.llm.token_bytes)
        events = self.follow(ticket, endpoint)
        return stream(answer, ticket, events) if asked.stream else await collect(answer, ticket, events)

    async def follow(self, ticket: Ticket, endpoint: str) -> AsyncGenerator[Update, None]:
        """The updates of a request, until it has ended.

        Raises ApiError when it fails, ClientGone when nobody listens.
        """
        outcome = "cancelled"
        first = True
        num_open = ticket.size
        try:
            while num_open:
                updates = await ticket.inbox.get()
                if updates is None:
                    raise ClientGone
                if first:
                    self.metrics.first_token.observe(time.monotonic() - ticket.since)
                first = False
                for update in updates:
                    if update.error is not None:
                        outcome = "error"
                        raise ApiError(500, update.error, code="generation_failed")
                    num_open -= update.finish_reason is not None
                    yield update
            outcome = "ok"
        finally:
            self.worker.close(ticket)
            self.metrics.requests.labels(endpoint, outcome).inc()
            self.metrics.duration.observe(time.monotonic() - ticket.since)

    def watch(self, request: "Request", ticket: Ticket) -> None:
        """Give a request up when its client hangs up."""

        async def wait() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            ticket.inbox.put_nowait(None)
            self.worker.close(ticket)

        task = asyncio.create_task(wait())
        ticket.on_close.append(task.cancel)

    def health(self) -> tuple[int, dict[str, Any]]:
        """Status and body of /health."""
        alive = self.worker.alive
        return 200 if alive else 503, {
            "status": "ok" if alive else "stopping",
            "model": self.settings.model,
            "taken": self.worker.num_taken,
            **({"shadow": self.shadow.report()} if self.shadow else {}),
        }

    def model(self) -> dict[str, Any]:
        """The model, for /v1/models; `ease` says what a client may ask of it."""
        stack = self.llm.stack
        ease = {"exit_layers": list(stack.exit_layers), "max_positions": stack.max_positions}
        template = self.llm.template
        ease |= {"chat": template is not None and template.problem is None}
        ease |= {"tools": self.llm.call_form is not None}
        ease |= {"gates": all(leave.gate for leave in stack.exits[:-1])}
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.started,
            "owned_by": "ease",
            "ease": ease,
        }


class ClientGone(Exception):  # noqa: N818 - no error
    """Nobody listens any more."""


async def collect(answer: Answer, ticket: Ticket, updates: AsyncGenerator[Update, None]) -> "Response":
    """A whole answer."""
    from fastapi import Response
    from fastapi.responses import JSONResponse

    completions = [Update(index, []) for index in range(ticket.size)]
    try:
        async with aclosing(updates):
            async for update in updates:
                completions[update.index] = update.after(completions[update.index])
    except ClientGone:
        return Response(status_code=HANG_UP)
    return JSONResponse(answer.whole(completions, ticket.tally))


def stream(answer: Answer, ticket: Ticket, updates: AsyncGenerator[Update, None]) -> "Response":
    """Server-sent events, one a token or a few."""
    from fastapi.responses import StreamingResponse

    async def lines() -> AsyncIterator[str]:
        for first in answer.opening(ticket.size):
            yield event(first)
        try:
            async with aclosing(updates):
                async for update in updates:
                    if (part := answer.more(update)) is not None:
                        yield event(part)
        except ClientGone:
            return
        except ApiError as error:
            yield event(error_object(error.status, str(error), error.code))
            return
        if answer.request.include_usage:
            yield event(answer.closing(ticket.tally))
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        lines(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


def event(value: Any) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def create_app(llm: TextEngine, settings: Settings) -> "FastAPI":
    """The application.

    Raises MissingExtraError where FastAPI is not installed. `app.state.service` is its Service.
    """
    try:
        from fastapi import FastAPI, Request, Response
        from fastapi.responses import HTMLResponse, JSONResponse
        from starlette.exceptions import HTTPException
        from starlette.middleware.cors import CORSMiddleware
        from starlette.requests import ClientDisconnect

        service = Service(llm, settings)
    except ModuleNotFoundError as error:
        raise missing_extra(error) or error from None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.worker.stop)

    app = FastAPI(title="EASE", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.service = service

    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    app.add_middleware(Front, hosts=settings.hosts)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        known = error if isinstance(error, ApiError) else ApiError(400, str(error))
        return JSONResponse(error_object(known.status, str(known), known.code), known.status, known.headers)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_object(error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(ClientDisconnect)
    async def hang_up(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=HANG_UP)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> Response:
        return JSONResponse(error_object(500, "the server has failed; its log says more"), 500)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await service.answer(request, "completions", read_completion)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await service.answer(request, "chat", read_chat)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.check_key(request)
        return JSONResponse({"object": "list", "data": [service.model()]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        service.check_key(request)
        if name != settings.model:
            raise ApiError(
                404,
                f"no model {name[:80]!r} here; this server has '{settings.model}'",
                code="model_not_found",
            )
        return JSONResponse(service.model())

    @app.get("/health")
    async def health() -> Response:
        status, body = service.health()
        return JSONResponse(body, status)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"))

    return app
