"""OpenAI's API as far as `qoq serve` speaks it: what a request may say, and how answers look.

A field that is not known here is refused, unless it changes nothing: null, a value that it has anyway, or a field that
no answer depends on.
"""

import codecs
import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from qoq.runtime.engine import Prompt, RequestOutput
from qoq.runtime.sampler import SamplingParams
from qoq.runtime.token_bytes import TokenBytes

IGNORED = {  # whatever they say
    "user",
    "name",  # of a message's author
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
    "prediction",
    "parallel_tool_calls",
    "include_obfuscation",
}
UNSUPPORTED: dict[str, tuple[Any, ...]] = {  # and the values that change nothing
    "n": (1,),
    "best_of": (1,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "length_penalty": (1,),
    "min_tokens": (0,),
    "bad_words": ([],),
    "use_beam_search": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "tool_calls": ([],),  # these two of messages that were answers
    "annotations": ([],),
}
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions; a chat goes on to the end of the context
MIN_LOGPROB = -9999.0  # JSON has no infinity
MAX_STOPS = 16
Asked = TypeVar("Asked", bound="Sampling")


class ApiError(Exception):
    """An answer in OpenAI's form of an error."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code or self.status}}


def _stop_strings(value: Any) -> Any:
    strings = value if isinstance(value, list) else [value]
    if value is not None and (len(strings) > MAX_STOPS or not all(isinstance(one, str) for one in strings)):
        raise PydanticCustomError("stop", f"expected a string or at most {MAX_STOPS} strings")
    return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None


class Sampling(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(_stop_strings)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def params(self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None) -> SamplingParams:
        """As the engine takes them; `max_tokens` is the default.

        Raises:
            QoqError: a value out of range.
        """
        given = {
            name: value
            for name in ("max_tokens", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos")
            if (value := getattr(self, name)) is not None
        }
        temperature = 1.0 if self.temperature is None else self.temperature
        told = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
        return SamplingParams(**{"max_tokens": max_tokens, **given, **told}, temperature=temperature)


class CompletionRequest(Sampling):
    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None

    def prompts(self) -> list[Prompt]:
        """Raises ApiError: neither text, nor token ids, nor a list of these."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt, list) and prompt:
            if all(isinstance(part, int) for part in prompt):
                return [prompt]
            if all(isinstance(part, str) for part in prompt):
                return prompt
            if all(isinstance(part, list) and all(isinstance(token, int) for token in part) for part in prompt):
                return prompt
        if prompt == []:
            raise ApiError(400, "empty prompt: expected at least one token", "prompt")
        raise ApiError(400, "prompt: expected a string, strings, token ids, or lists of token ids", "prompt")


class TextPart(BaseModel):
    type: str
    text: str | None = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")

    role: str
    content: str | list[TextPart] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it. Raises ApiError: a part that is no text."""
        if isinstance(self.content, list):
            for part in self.content:
                if part.type != "text":
                    raise ApiError(400, f"content of type {part.type!r}, expected text", "messages")
            return {"role": self.role, "content": "".join(part.text or "" for part in self.content)}
        return {"role": self.role, "content": self.content or ""}


class ChatRequest(Sampling):
    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


def read(kind: type[Asked], body: bytes) -> Asked:
    """A request from its JSON.

    Raises:
        ApiError: no JSON, a wrong type, or a field that is not known and may change the answer.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ApiError(400, f"{where or 'body'}: {first['msg']}", where or None) from None
    _refuse_unknown(request)
    if request.stream_options is not None:
        _refuse_unknown(request.stream_options, "stream_options.")
    if isinstance(request, ChatRequest):
        for number, message in enumerate(request.messages):
            _refuse_unknown(message, f"messages.{number}.")
    return request


def _refuse_unknown(part: BaseModel, where: str = "") -> None:
    for name, value in (part.model_extra or {}).items():
        neutral = UNSUPPORTED.get(name, ())
        if value is not None and name not in IGNORED and value not in neutral:
            expected = f", expected {neutral[0]!r}" if neutral else ""
            raise ApiError(400, f"{where}{name} is not supported{expected}", where + name)


class Reply:
    """One answer as it is written: its id, and the objects that carry parts of it or all of it."""

    def __init__(self, chat: bool, model: str, token_bytes: TokenBytes, starts: Sequence[str], top: int = 0):
        """`starts` are the echoed prompts, or empty strings; `top` is how many of the likeliest tokens a chat tells."""
        self.chat, self.bytes, self.starts, self.top = chat, token_bytes, starts, top
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._model, self._created = model, int(time.time())
        self._told = [0] * len(starts)  # tokens of the answer whose log-probabilities were sent
        self._echoed = [False] * len(starts)  # whether those of the prompt were
        self._offset = [0] * len(starts)  # characters of these that the text has
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in starts]

    def whole(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._choice(index, output, output.text) for index, output in enumerate(outputs)]
        return self._object(choices, chunk=False) | {"usage": usage(outputs)}

    def first(self, index: int) -> dict[str, Any] | None:
        """What a stream begins with: the role, or the echo."""
        if self.chat:
            content = {"role": "assistant", "content": ""}
            return self._object([{"index": index, "delta": content, "logprobs": None, "finish_reason": None}])
        if self.starts[index]:
            text = self.starts[index]
            return self._object([{"index": index, "text": text, "logprobs": None, "finish_reason": None}])
        return None

    def part(self, index: int, output: RequestOutput) -> dict[str, Any] | None:
        """What an output adds to a stream, if anything."""
        if not output.delta and output.finish_reason is None and output.answer.logprobs is None:
            return None
        return self._object([self._choice(index, output, output.delta, chunk=True)])

    def total(self, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
        """The chunk with the usage alone."""
        return self._object([]) | {"usage": usage(outputs)}

    def _object(self, choices: list[dict[str, Any]], chunk: bool = True) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}

    def _choice(self, index: int, output: RequestOutput, text: str, chunk: bool = False) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if self.chat and chunk:
            choice["delta"] = {"content": text} if text else {}
        elif self.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text if chunk else self.starts[index] + text
        logprobs = None if output.answer.logprobs is None else self._logprobs(index, output)
        return choice | {"logprobs": logprobs, "finish_reason": output.finish_reason}

    def _logprobs(self, index: int, output: RequestOutput) -> dict[str, Any]:
        """Of the tokens that were not told yet."""
        begin, self._told[index] = self._told[index], output.length
        tokens: list[int] = output.answer.token_ids[begin : output.length]
        told: list[dict[int, float] | None] = [*(output.answer.logprobs or [])[begin : output.length]]
        if output.prompt_logprobs is not None and not self._echoed[index]:
            self._echoed[index] = True
            tokens, told = output.prompt_token_ids + tokens, output.prompt_logprobs + told
            # the text lacks what a tokenizer puts before it
            echoed = b"".join(self.bytes[token] for token in output.prompt_token_ids)
            self._offset[index] = len(self.starts[index]) - len(echoed.decode(errors="replace"))
        if self.chat:
            return {"content": [self._content(token, own or {}) for token, own in zip(tokens, told, strict=True)]}
        offsets = []
        for token in tokens:
            offsets.append(max(0, self._offset[index]))
            self._offset[index] += len(self._decoders[index].decode(self.bytes[token]))
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        for token, own in zip(tokens, told, strict=True):
            if own is None:  # the first token of all follows nothing
                values.append(None)
                tops.append(None)
                continue
            values.append(_finite(own[token]))
            top = {self.bytes.name(token): _finite(own[token])}
            for other, value in own.items():
                top.setdefault(self.bytes.name(other), _finite(value))  # parts of characters share a name
            tops.append(top)
        names = [self.bytes.name(token) for token in tokens]
        return {"tokens": names, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _content(self, token: int, own: dict[int, float]) -> dict[str, Any]:
        likeliest = list(own.items())[: self.top]  # the token's own may follow them
        return self._entry(token, own[token]) | {"top_logprobs": [self._entry(*pair) for pair in likeliest]}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        return {"token": self.bytes.name(token), "logprob": _finite(value), "bytes": list(self.bytes[token])}


def usage(outputs: Sequence[RequestOutput]) -> dict[str, int]:
    prompt = sum(len(output.prompt_token_ids) for output in outputs)
    generated = sum(output.length for output in outputs)
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def _finite(value: float) -> float:
    return max(value, MIN_LOGPROB)
