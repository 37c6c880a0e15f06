"""A conversation with a model, in the form that its chat template gives it."""

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from qoq.errors import QoqError
from qoq.runtime.engine import GREEDY, LLMEngine, RequestOutput
from qoq.runtime.sampler import SamplingParams

Message = dict[str, str]


class Conversation:
    """Messages so far. Each turn gives the engine all of them: its prefix cache has what was computed before.

    Raises:
        QoqError: the tokenizer has no chat template.
    """

    def __init__(self, engine: LLMEngine, system: str | None = None):
        if not engine.tokenizer.chat_template:
            raise QoqError("the tokenizer has no chat template: only text can be continued, with --prompt and --raw")
        self.engine = engine
        self.messages: list[Message] = []
        self._beginning = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._beginning)

    def answer(self, text: str, params: SamplingParams = GREEDY) -> Generator[RequestOutput, None, None]:
        """Answer the user's text, with an output for each token.

        However this ends (closed by the caller, or by an exception such as KeyboardInterrupt), what came of the answer
        stays in the conversation; if nothing came, or it was in error, the user's text does not stay either.

        Raises:
            QoqError: the conversation is as long as the model takes, or the engine failed.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        tokens = chat_tokens(self.engine.tokenizer, asked)
        if len(tokens) >= self.engine.max_model_len:
            raise QoqError(
                f"conversation of {len(tokens)} tokens, the model takes fewer than {self.engine.max_model_len}; "
                "/reset starts a new one"
            )
        output = None
        try:
            for output in self.engine.stream(tokens, params):
                yield output
        finally:
            if output is not None and output.error is None:
                self.messages = [*asked, {"role": "assistant", "content": output.text}]
        if output is not None and output.error is not None:
            raise QoqError(output.error)


def chat_tokens(tokenizer: Any, messages: Sequence[Message], variables: Mapping[str, Any] | None = None) -> list[int]:
    """Messages in the tokenizer's chat template, up to where the answer begins.

    The template alone says which special tokens there are, and which variables it knows.

    Raises:
        QoqError: the template refuses them.
    """
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=False, **(variables or {})
        )
    except (TemplateError, TypeError) as error:
        raise QoqError(f"the chat template refuses the messages: {error}") from None
