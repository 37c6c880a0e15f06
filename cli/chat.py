"""qoq chat: text from a checkpoint, one answer or a conversation."""

import contextlib
import io
import signal
import sys
import threading
import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import click

from qoq.cli.engine import engine_options
from qoq.cli.output import check_device, common_options, note, print_json
from qoq.errors import QoqError

if TYPE_CHECKING:
    from qoq.runtime.conversation import Conversation
    from qoq.runtime.engine import LLMEngine, Prompt, RequestOutput
    from qoq.runtime.sampler import SamplingParams

ANSWER_TOKENS = 128  # of --prompt, unless told otherwise


@click.command()
@click.argument("checkpoint")
@click.option("--prompt", help="What to answer.  [default: a conversation]")
@click.option("--system", help="System message, before all others.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it is, without the chat template.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    help=f"Of an answer.  [default: {ANSWER_TOKENS} of --prompt, in a conversation what the model has room for]",
)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True, help="0: greedily.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="Of the probability mass.")
@click.option("--top-k", type=click.IntRange(min=0), default=0, help="Among so many tokens; 0: all.")
@click.option("--seed", type=int, help="For the same answer again.  [default: a new one]")
@engine_options()
@click.option("--device", default="cpu", show_default=True, help="Where to compute: cpu, cuda, cuda:1.")
@common_options
def chat(
    checkpoint: str,
    prompt: str | None,
    system: str | None,
    raw: bool,
    max_tokens: int | None,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    engine: dict[str, Any],
    device: str,
    as_json: bool,
) -> None:
    """Talk with CHECKPOINT, or let it answer one prompt.

    Without --prompt each line of stdin is a turn. /reset starts a new conversation; /exit and Ctrl-D leave; Ctrl-C
    stops the answer.
    """
    from qoq.runtime.engine import LLMEngine
    from qoq.runtime.sampler import SamplingParams

    device = check_device(device)
    if prompt is None and (raw or as_json):
        raise click.UsageError(f"{'--raw' if raw else '--json'} needs --prompt")
    if raw and system:
        raise click.UsageError("--system is for the chat template, which --raw leaves out")
    loaded = LLMEngine.from_checkpoint(checkpoint, device, max_num_seqs=1, **engine)
    if max_tokens is None:
        max_tokens = loaded.max_model_len if prompt is None else ANSWER_TOKENS
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    if prompt is None:
        _converse(loaded, system, params)
    else:
        _answer(loaded, prompt, system, raw, params, as_json)


def _answer(
    engine: "LLMEngine", prompt: str, system: str | None, raw: bool, params: "SamplingParams", as_json: bool
) -> None:
    from qoq.runtime.conversation import chat_tokens

    asked: Prompt = prompt
    if system and not engine.tokenizer.chat_template:
        raise QoqError("the tokenizer has no chat template: nothing says where a system message goes")
    if not raw and engine.tokenizer.chat_template:
        messages = [{"role": "system", "content": system}] if system else []
        asked = chat_tokens(engine.tokenizer, [*messages, {"role": "user", "content": prompt}])
    started = time.monotonic()
    for output in engine.stream(asked, params):
        if not as_json:
            click.echo(output.delta, nl=False)
    seconds = time.monotonic() - started
    if output.error is not None:
        raise QoqError(output.error)
    if as_json:
        print_json(
            {
                "text": output.text,
                "finish_reason": output.finish_reason,
                "prompt_tokens": len(output.prompt_token_ids),
                "completion_tokens": len(output.token_ids),
                "seconds": round(seconds, 2),
            }
        )
        return
    click.echo()
    _note_speed(output, seconds)


def _converse(engine: "LLMEngine", system: str | None, params: "SamplingParams") -> None:
    from qoq.runtime.conversation import Conversation

    conversation = Conversation(engine, system)
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
            note("a new conversation")
            continue
        try:
            _take_turn(conversation, line, params)
        except QoqError as error:
            note(f"qoq: {error}")


def _lines() -> Iterator[str]:
    """What the user says, line by line, without empty ones."""
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives `input` a history and keys to edit with)

        note("/reset starts a new conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # bytes that are no UTF-8 are no reason to end
    while True:
        try:
            line = input("> " if terminal and sys.stdout.isatty() else "").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            note("")
            continue
        if line:
            yield line


def _take_turn(conversation: "Conversation", text: str, params: "SamplingParams") -> None:
    started, output, stopped = time.monotonic(), None, False
    try:
        with _interrupt_between_tokens() as interrupted, contextlib.closing(conversation.answer(text, params)) as turn:
            for output in turn:
                click.echo(output.delta, nl=False)
                if interrupted.is_set():
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        stopped = True
    finally:
        if output is not None:
            click.echo()
    if stopped:
        note("stopped")
    if output is not None:
        _note_speed(output, time.monotonic() - started)


@contextlib.contextmanager
def _interrupt_between_tokens() -> Generator[threading.Event, Any, None]:
    """Ctrl-C sets the event, for a step of the engine must not be torn; the second one does not wait."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def _note_speed(output: "RequestOutput", seconds: float) -> None:
    note(f"{len(output.token_ids)} tokens, {len(output.token_ids) / seconds:.1f} tokens/s")
