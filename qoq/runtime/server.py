"""An OpenAI-compatible server of one checkpoint: completions and chats, whole or as events, and what it counts."""

import asyncio
import copy
import hmac
import inspect
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

import qoq
from qoq.errors import QoqError
from qoq.runtime.async_engine import Answers, AsyncEngine, EngineDead, QueueFull
from qoq.runtime.conversation import chat_tokens
from qoq.runtime.engine import LLMEngine, Prompt, RequestOutput
from qoq.runtime.protocol import COMPLETION_TOKENS, ApiError, ChatRequest, CompletionRequest, Reply, Sampling, read
from qoq.runtime.sampler import SamplingParams
from qoq.runtime.token_bytes import TokenBytes

MAX_BODY = 16 << 20  # bytes
CLIENT_LEFT = 499  # nobody sees this status
log = logging.getLogger(__name__)
T = TypeVar("T")


def create_app(engine: LLMEngine, model_name: str, max_queue: int = 1024, api_key: str | None = None) -> FastAPI:
    """The server of a loaded engine, which belongs to it from now on.

    Args:
        model_name: what clients call the model.
        max_queue: requests that may wait beyond those that can run at a time; more get status 429.
        api_key: what clients have to send to `/v1` as a bearer token.
    """
    server = _Server(engine, model_name, max_queue, api_key)
    app = FastAPI(title="qoq", lifespan=server.lifespan, openapi_url=None)  # the routes read their bodies themselves
    app.state.engine = server.engine
    for kind in (ApiError, QoqError, QueueFull, EngineDead, HTTPException, Exception):
        app.add_exception_handler(kind, _error_response)
    guarded = APIRouter(prefix="/v1", dependencies=[Depends(server.check_key)])
    guarded.add_api_route("/models", server.models)
    guarded.add_api_route("/completions", server.completions, methods=["POST"])
    guarded.add_api_route("/chat/completions", server.chat, methods=["POST"])
    app.include_router(guarded)
    app.add_api_route("/health", server.health)
    app.add_api_route("/metrics", server.metrics)
    app.add_api_route("/version", server.version)
    return app


class _Server:
    def __init__(self, engine: LLMEngine, model_name: str, max_queue: int, api_key: str | None):
        self.engine, self.model_name, self.api_key = AsyncEngine(engine, max_queue), model_name, api_key
        self.tokenizer = copy.deepcopy(engine.tokenizer)  # the engine's thread has its own
        self.token_bytes = TokenBytes(self.tokenizer)
        self.template_options = inspect.signature(self.tokenizer.apply_chat_template).parameters
        self.tokenizing = ThreadPoolExecutor(1)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.engine.start()
        yield
        await self.engine.stop()
        self.tokenizing.shutdown()

    async def check_key(self, request: Request) -> None:
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode("latin-1"), self.api_key.encode()):
            raise ApiError(401, "wrong or missing API key", code="invalid_api_key")

    async def health(self) -> Response:
        return Response(status_code=200 if self.engine.failure is None else 503)

    async def version(self) -> dict[str, str]:
        return {"version": qoq.__version__}

    async def models(self) -> dict[str, Any]:
        length = self.engine.engine.max_model_len
        model = {"id": self.model_name, "object": "model", "created": 0, "owned_by": "qoq", "max_model_len": length}
        return {"object": "list", "data": [model]}

    async def metrics(self) -> Response:
        return PlainTextResponse(metrics(self.engine, self.model_name))

    async def completions(self, request: Request) -> Response:
        asked = read(CompletionRequest, await _body(request))
        self._check_model(asked)
        prompts = asked.prompts()
        params = asked.params(COMPLETION_TOKENS, asked.logprobs, asked.logprobs if asked.echo else None)
        starts = [""] * len(prompts)
        if asked.echo:
            starts = await self._tokenizing(lambda: [self._text(prompt) for prompt in prompts])
        tokens: list[Prompt] = await self._tokenizing(lambda: [self._tokens(prompt) for prompt in prompts])
        reply = Reply(False, self.model_name, self.token_bytes, starts)
        return await self._answer(request, asked, tokens, params, reply)

    async def chat(self, request: Request) -> Response:
        asked = read(ChatRequest, await _body(request))
        self._check_model(asked)
        if asked.max_completion_tokens is not None:
            asked.max_tokens = asked.max_completion_tokens
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs", "top_logprobs")
        params = asked.params(self.engine.engine.max_model_len, (asked.top_logprobs or 0) if asked.logprobs else None)
        messages = [message.plain() for message in asked.messages]
        variables = asked.chat_template_kwargs or {}
        tokens = await self._tokenizing(lambda: self._chat_tokens(messages, variables))
        reply = Reply(True, self.model_name, self.token_bytes, [""], asked.top_logprobs or 0)
        return await self._answer(request, asked, [tokens], params, reply)

    def _check_model(self, asked: Sampling) -> None:
        if asked.model not in (None, self.model_name):
            message = f"model {asked.model!r} is not here, expected {self.model_name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    async def _tokenizing(self, work: Callable[[], T]) -> T:
        """Away from the event loop; a tokenizer, and what asks it for names of tokens, is for one thread."""
        return await asyncio.get_running_loop().run_in_executor(self.tokenizing, work)

    def _text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        return self.tokenizer.decode([token for token in prompt if 0 <= token < len(self.tokenizer)])

    def _tokens(self, prompt: Prompt) -> Prompt:
        return self.tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt

    def _chat_tokens(self, messages: Sequence[dict[str, str]], variables: Mapping[str, Any]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise ApiError(400, "the model has no chat template, expected a request to /v1/completions")
        for name in variables:  # no template of the client's own, nor a prompt that is not tokens
            if name in self.template_options:
                where = f"chat_template_kwargs.{name}"
                raise ApiError(400, f"{where} is not supported, expected a variable of the template", where)
        try:
            return chat_tokens(self.tokenizer, messages, variables)
        except QoqError as error:
            raise ApiError(400, str(error), "messages") from None

    async def _answer(
        self, request: Request, asked: Sampling, prompts: Sequence[Prompt], params: SamplingParams, reply: Reply
    ) -> Response:
        if len(prompts) > self.engine.capacity:
            raise ApiError(400, f"{len(prompts)} prompts, at most {self.engine.capacity} can wait", "prompt")
        answers = await self.engine.submit(prompts, params)
        if asked.stream:
            return _Events(answers, self._events(answers, reply, asked.include_usage))
        outputs = await _unless_left(answers, request)
        if outputs is None:
            return Response(status_code=CLIENT_LEFT)
        for output in outputs:
            if output.error is not None:
                raise ApiError(500, output.error)
        if params.logprobs is None:
            return JSONResponse(reply.whole(outputs))
        return await self._tokenizing(lambda: JSONResponse(reply.whole(outputs)))

    async def _events(self, answers: Answers, reply: Reply, include_usage: bool) -> AsyncIterator[str]:
        last: dict[int, RequestOutput] = {}
        for index in range(len(answers.ids)):
            yield _event(reply.first(index))
        try:
            async for index, output in answers:
                last[index] = output
                if output.error is not None:
                    raise ApiError(500, output.error)
                if output.answer.logprobs is None:
                    yield _part(reply, index, output)
                else:
                    yield await self._tokenizing(partial(_part, reply, index, output))
            if include_usage:
                yield _event(reply.total(list(last.values())))
        except (ApiError, EngineDead) as error:  # the status is sent already
            yield _event(_api_error(error).body())
        yield "data: [DONE]\n\n"


class _Events(StreamingResponse):
    """Server-sent events. However it ends, even before it begins, the engine hears of it."""

    def __init__(self, answers: Answers, events: AsyncIterator[str]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.close()


def _part(reply: Reply, index: int, output: RequestOutput) -> str:
    return _event(reply.part(index, output))


def _event(document: dict[str, Any] | None) -> str:
    return "" if document is None else f"data: {json.dumps(document)}\n\n"


async def _unless_left(answers: Answers, request: Request) -> list[RequestOutput] | None:
    """The last outputs, or None if the client does not wait for them."""
    done = asyncio.ensure_future(answers.last())
    left = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((done, left), return_when=asyncio.FIRST_COMPLETED)
        return done.result() if done.done() else None
    finally:
        done.cancel()
        left.cancel()
        answers.close()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise ApiError(413, f"a body of more than {MAX_BODY} bytes")
    return bytes(body)


async def _error_response(request: Request, error: Exception) -> Response:
    told = _api_error(error)
    headers = {"WWW-Authenticate": "Bearer"} if told.status == 401 else None
    return JSONResponse(told.body(), told.status, headers)


def _api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QoqError):
        return ApiError(400, str(error))
    if isinstance(error, QueueFull):
        return ApiError(429, str(error))
    if isinstance(error, EngineDead):
        return ApiError(503, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, str(error.detail))
    return ApiError(500, "internal error")  # its traceback is in the log


def metrics(engine: AsyncEngine, model_name: str) -> str:
    """Prometheus' text format; the names are vLLM's, with another prefix."""
    name = model_name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    pages = engine.engine.scheduler.pages
    values: list[tuple[str, str, str, float]] = [
        ("num_requests_running", "gauge", "Requests that run.", engine.running),
        ("num_requests_waiting", "gauge", "Requests that wait.", engine.waiting),
        ("kv_cache_usage_perc", "gauge", "Part of the KV cache in use, 1 for all.", 1 - pages.free / pages.count),
        ("prompt_tokens_total", "counter", "Prompt tokens of requests that got a token.", engine.prompt_tokens),
        ("generation_tokens_total", "counter", "Tokens generated.", engine.generated_tokens),
    ]
    lines: list[str] = []
    for metric, kind, text, value in values:
        lines += [f"# HELP qoq:{metric} {text}", f"# TYPE qoq:{metric} {kind}"]
        lines.append(f'qoq:{metric}{{model_name="{name}"}} {value}')
    lines += ["# HELP qoq:request_success_total Requests that ended.", "# TYPE qoq:request_success_total counter"]
    for reason in ("stop", "length", "abort", "error"):
        label = f'model_name="{name}",finished_reason="{reason}"'
        lines.append(f"qoq:request_success_total{{{label}}} {engine.finished[reason]}")
    return "\n".join(lines) + "\n"
