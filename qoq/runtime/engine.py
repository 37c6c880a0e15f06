"""Generation from a checkpoint."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qoq.checkpoint import Checkpoint
from qoq.errors import QoqError
from qoq.models.decoder import Decoder
from qoq.runtime import model
from qoq.runtime.cache import KVCache


@dataclass(frozen=True)
class SamplingParams:
    """When to stop; tokens are chosen greedily."""

    max_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclass
class RequestOutput:
    """What one prompt gave."""

    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = "length"  # or "stop"


class LLMEngine:
    """A loaded checkpoint with its tokenizer."""

    def __init__(self, decoder: Decoder, tokenizer: Any, eos_token_ids: Sequence[int], max_model_len: int):
        self.decoder = decoder
        self.tokenizer = tokenizer
        self.eos_token_ids = frozenset(eos_token_ids)
        self.max_model_len = max_model_len

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> "LLMEngine":
        """Load a checkpoint folder.

        Raises:
            CheckpointError, ModelError: the folder or its tokenizer cannot be read.
        """
        checkpoint = Checkpoint(folder)
        tokenizer = checkpoint.tokenizer()
        eos = _eos_token_ids(checkpoint, tokenizer)
        return cls(model.load(checkpoint), tokenizer, eos, checkpoint.config.max_position_embeddings)

    def generate(self, prompts: Sequence[str], params: SamplingParams = SamplingParams()) -> list[RequestOutput]:  # noqa: B008
        """Continue each prompt, one after the other."""
        outputs = []
        for prompt in prompts:
            output = RequestOutput(self.tokenizer(prompt).input_ids)
            for token in self.stream(output.prompt_token_ids, params):
                output.token_ids.append(token)
            stop = self._stop_ids(params)
            if output.token_ids and output.token_ids[-1] in stop:
                output.finish_reason = "stop"
            output.text = self.tokenizer.decode([t for t in output.token_ids if t not in stop])
            outputs.append(output)
        return outputs

    def stream(self, token_ids: Sequence[int], params: SamplingParams) -> Iterator[int]:
        """Yield new token ids one by one; the last may be a stop id.

        Raises:
            QoqError: an empty prompt, or one that leaves no room in the model's context.
        """
        if not token_ids:
            raise QoqError("empty prompt: expected at least one token")
        if len(token_ids) >= self.max_model_len:
            raise QoqError(f"prompt of {len(token_ids)} tokens, the model takes fewer than {self.max_model_len}")
        stop = self._stop_ids(params)
        for token in greedy(self.decoder, token_ids, min(params.max_tokens, self.max_model_len - len(token_ids))):
            yield token
            if token in stop:
                return

    def _stop_ids(self, params: SamplingParams) -> frozenset[int]:
        return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids)


def greedy(decoder: Decoder, token_ids: Sequence[int], max_tokens: int) -> Iterator[int]:
    """The most likely continuation of a prompt, token by token, with a KV4 cache."""
    cache, ids = KVCache(len(decoder.blocks), decoder.clip_ratios), list(token_ids)
    for _ in range(max_tokens):
        token = int(
            decoder(torch.tensor([ids], device=decoder.embedding.device), cache, start=cache.length)[0, -1].argmax()
        )
        yield token
        ids = [token]


def _eos_token_ids(checkpoint: Checkpoint, tokenizer: Any) -> list[int]:
    """From generation_config.json, else the config, else the tokenizer."""
    from transformers import GenerationConfig

    try:
        eos = GenerationConfig.from_pretrained(checkpoint.folder).eos_token_id
    except OSError:
        eos = getattr(checkpoint.config, "eos_token_id", None)
    eos = tokenizer.eos_token_id if eos is None else eos
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
