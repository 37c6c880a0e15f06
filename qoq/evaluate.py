"""Quality of a model: perplexity, and lm-eval tasks."""

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
import yaml
from safetensors import SafetensorError
from torch import Tensor

from qoq.checkpoint import Checkpoint
from qoq.errors import DataError, ModelError, first_line
from qoq.models.source import Source
from qoq.runtime.engine import LLMEngine
from qoq.runtime.model import KVCache, greedy, load
from qoq.runtime.sampler import SamplingParams
from qoq.text import documents


class Model(Protocol):
    """What can be evaluated."""

    def logits(self, ids: Tensor) -> Tensor:
        """(1, T) int64 -> (1, T, vocab) float."""

    def stream(self, token_ids: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Greedy continuation, token by token."""


@dataclass(frozen=True)
class Perplexity:
    """One measurement."""

    model: str
    backend: str
    dataset: str
    seqlen: int
    windows: int
    tokens: int  # predicted
    perplexity: float
    seconds: float


def evaluation_text(dataset: str) -> str:
    """The text perplexity is measured on: the test rows or documents of `text.documents`, joined by blank lines."""
    return "\n\n".join(documents(dataset, split="test"))


def windows(tokenizer: Any, text: str, seqlen: int, limit: int | None = None) -> Tensor:
    """One tokenization of the whole text, cut into non-overlapping windows: (n, seqlen) int64.

    Raises:
        DataError: the text is shorter than one window.
    """
    ids = tokenizer(text).input_ids
    count = len(ids) // seqlen
    if count == 0:
        raise DataError(f"{len(ids)} tokens of text, expected at least one window of {seqlen}")
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * seqlen], dtype=torch.int64).view(count, seqlen)


def mean_nll(model: Model, ids: Tensor, on_window: Callable[[], object] = lambda: None) -> float:
    """Mean negative log-likelihood, in nats, of tokens 1.. of each window (n, seqlen)."""
    total = 0.0
    for window in ids:
        predicted = model.logits(window[None])[0, :-1].float()
        total += float(F.cross_entropy(predicted, window[1:].to(predicted.device), reduction="sum"))
        on_window()
    return total / (ids.shape[0] * (ids.shape[1] - 1))


def perplexity_of(nll: float) -> float:
    """exp(nll), short of overflow."""
    return math.exp(min(nll, 700.0))


def perplexity(
    model: Model,
    ids: Tensor,
    *,
    name: str,
    backend: str,
    dataset: str,
    on_window: Callable[[], object] = lambda: None,
) -> Perplexity:
    """exp of the mean negative log-likelihood over all windows."""
    started = time.monotonic()
    value = perplexity_of(mean_nll(model, ids, on_window))
    seconds = round(time.monotonic() - started, 2)
    count, seqlen = ids.shape
    return Perplexity(name, backend, dataset, seqlen, count, count * (seqlen - 1), value, seconds)


class OriginalModel:
    """The unquantized model through transformers: float32 on a CPU, its own dtype on a GPU.

    Raises:
        ModelError: weights are missing or damaged; transformers itself would fill gaps with random numbers.
    """

    def __init__(self, source: Source, device: str = "cpu"):
        from transformers import AutoModelForCausalLM

        self.device = device
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=torch.float32 if device == "cpu" else "auto",
                trust_remote_code=source.trust_remote_code,
                output_loading_info=True,
            )
        except (ValueError, RuntimeError, OSError, SafetensorError) as error:
            raise ModelError(f"{source.name}: cannot be loaded ({first_line(error)})") from None
        self.model, loading = loaded
        if loading["missing_keys"]:
            raise ModelError(f"{source.name}: tensor {sorted(loading['missing_keys'])[0]} is missing")
        self.model.to(torch.device(device))  # type: ignore[arg-type]

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids.to(self.device), use_cache=False).logits

    @torch.inference_mode()
    def stream(self, token_ids: Sequence[int], max_tokens: int) -> Iterator[int]:
        parameters = inspect.signature(self.model.forward).parameters
        name = "cache" if "cache" in parameters else "past_key_values"  # before transformers 5.24
        past, ids = None, torch.tensor([token_ids], device=self.device)
        for _ in range(max_tokens):
            out = self.model(ids, **{name: past}, use_cache=True)
            past, ids = out[name], out.logits[:, -1:].argmax(-1)
            yield int(ids)


class QuantizedModel:
    """A checkpoint through float fake quantization (`simulate`) or packed integers (`runtime`)."""

    def __init__(self, checkpoint: Checkpoint, backend: str, device: str = "cpu"):
        self.device = device
        self.decoder = load(checkpoint, backend == "simulate", device)

    def logits(self, ids: Tensor) -> Tensor:
        return self.decoder(ids.to(self.device), KVCache(len(self.decoder.blocks), self.decoder.kv_cache))

    def stream(self, token_ids: Sequence[int], max_tokens: int) -> Iterator[int]:
        return greedy(self.decoder, token_ids, max_tokens)


class EngineModel:
    """A checkpoint through the engine: as it computes prompts (`prefill`) or answers, token by token (`decode`)."""

    def __init__(self, checkpoint: Checkpoint, backend: str, device: str = "cpu"):
        self.by_token = backend == "decode"
        self.engine = LLMEngine.from_checkpoint(checkpoint, device, max_num_seqs=1)

    def logits(self, ids: Tensor) -> Tensor:
        return self.engine.logits(ids[0].tolist(), self.by_token)[None]

    def stream(self, token_ids: Sequence[int], max_tokens: int) -> Iterator[int]:
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        return (output.answer.token_ids[output.length - 1] for output in self.engine.stream(token_ids, params))


def tasks(
    model: Model, tokenizer: Any, names: Sequence[str], max_length: int, limit: int | None
) -> dict[str, dict[str, Any]]:
    """Run lm-eval tasks, by name or as .yaml files of one's own; task -> metric -> value.

    Raises:
        DataError: lm-eval is not installed, does not know a task, or cannot load its data.
    """
    try:
        from lm_eval import simple_evaluate

        from qoq.lm_eval_model import QoqLM, Tasks
    except ImportError:
        raise DataError("--tasks needs lm-eval; pip install 'qoq[eval]'") from None
    chosen = [_task(name) for name in names]
    own = all(isinstance(task, dict) for task in chosen)
    manager = Tasks(include_defaults=not own)
    unknown = [task for task in chosen if isinstance(task, str) and task not in manager.all_tasks]
    if unknown:
        raise DataError(f"{unknown[0]}: lm-eval knows no such task; a task of your own is a .yaml file")
    results = simple_evaluate(
        model=QoqLM(model, tokenizer, max_length), tasks=chosen, task_manager=manager, limit=limit, bootstrap_iters=0
    )
    return results["results"]


def _task(name: str) -> str | dict[str, Any]:
    """A task name, or the configuration in a .yaml file with its `data_files` taken relative to that file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return name
    if not path.is_file():
        raise DataError(f"{name}: no such task file")
    try:
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not {"task", "group"} & task.keys():
            raise ValueError("no task or group in it")
        options = task.get("dataset_kwargs") or {}
        if "data_files" in options:
            options["data_files"] = _beside(path, options["data_files"])
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{name}: not an lm-eval task ({first_line(error)})") from None
    return task


def _beside(path: Path, files: Any) -> Any:
    """`data_files` as datasets takes them, one name, several, or such for each split, beside the file `path`."""
    if isinstance(files, dict):
        return {split: _beside(path, names) for split, names in files.items()}
    if isinstance(files, list):
        return [_beside(path, name) for name in files]
    return str((path.parent / files).resolve())
