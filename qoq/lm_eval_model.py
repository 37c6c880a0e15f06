"""An evaluated model as lm-eval sees it: token log-likelihoods and greedy generation, one request at a time.

And its tasks as we see them: what cannot be loaded is an error of ours.
"""

from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from qoq.errors import DataError, first_line
from qoq.evaluate import Model

MAX_GENERATED_TOKENS = 256  # where a task names none, as lm-eval's own models have it


class Tasks(TaskManager):
    """Tasks whose data lm-eval finds, or a DataError before anything is evaluated."""

    def load(self, task_list: Any) -> Any:
        try:
            return super().load(task_list)
        except Exception as error:  # lm-eval, the hub, its client and the builders raise many kinds
            names = (t.get("group", t.get("task")) if isinstance(t, dict) else t for t in task_list)
            raise DataError(f"--tasks {','.join(map(str, names))}: cannot be loaded ({first_line(error)})") from None


class QoqLM(TemplateLM):
    """Requests longer than `max_length` tokens lose their beginning."""

    def __init__(self, model: Model, tokenizer: Any, max_length: int):
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        special = True if add_special_tokens is None else add_special_tokens
        return self.tokenizer(string, add_special_tokens=special).input_ids

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, **kwargs: Any) -> Any:
        return [
            self._score(context, continuation)
            for _, context, continuation in tqdm(requests, disable=disable_tqdm or None, desc="loglikelihood")
        ]

    def _score(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """Sum of log-probabilities of the continuation, and whether it is the greedy one."""
        ids = torch.tensor((context + continuation)[-(self.max_length + 1) :])
        count = len(continuation)
        logprobs = self.model.logits(ids[None, :-1])[0, -count:].float().log_softmax(-1)
        target = ids[-count:].to(logprobs.device)
        total = logprobs.gather(1, target[:, None]).sum()
        return float(total), bool((logprobs.argmax(-1) == target).all())

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        scores = []
        for request in tqdm(requests, disable=disable_tqdm or None, desc="loglikelihood_rolling"):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            scores.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
        return scores

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        return [
            self._generate(*request.args)
            for request in tqdm(requests, disable=disable_tqdm or None, desc="generate_until")
        ]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        """Greedy text up to the first stop string or the end-of-text token."""
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        room = min(int(options.get("max_gen_toks", MAX_GENERATED_TOKENS)), self.max_length - 1)
        ids: list[int] = []
        text = ""
        for token in self.model.stream(self.tok_encode(context)[-(self.max_length - room) :], room):
            if token == self.eot_token_id:
                break
            ids.append(token)
            text = self.tokenizer.decode(ids)
            if any(stop in text for stop in stops):
                break
        return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]
