"""A checkpoint of random weights: the shapes of a model for the benchmark, without its files.

Speed depends on shapes and bytes, so a model that is not at hand is measured by tensors that look like its own:
legal codes that use their whole range, norms of ones (rotation folds them), and scales that keep activations
plausible. Each product keeps the variance of its input, so the residual stream grows like the square root of the
number of layers and stays below 10, and sampled tokens are noise.
"""

from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from qoq import recipe
from qoq.checkpoint import Checkpoint
from qoq.layout import expected_tensors, quantization_config
from qoq.models.architecture import LM_HEAD
from qoq.roofline import Dimensions

MOST_S2 = 16
CODE_STD = (255 / 12) ** 0.5  # of codes 0..15, all alike
W8_STD = CODE_STD * ((MOST_S2 + 1) * (2 * MOST_S2 + 1) / 6) ** 0.5  # of codes * s2 - z, nearly


class RandomCheckpoint(Checkpoint):
    """Tensors under the names, shapes and dtypes of a checkpoint that the default recipe makes.

    Each is drawn where it is needed, on `device`, from the seed and its name: the same one whenever it is asked for.
    """

    def __init__(self, name: str, model: Dimensions, group_size: int, seed: int, device: str | torch.device):
        from transformers import AutoConfig

        self.folder = Path(f"random weights of {name}")  # there is no such folder; messages name it
        self.entries = {}
        self.group_size, self.seed, self.device = group_size, seed, torch.device(device)
        kv_cache = recipe.load("qoq-g128").kv_cache
        self.config = AutoConfig.for_model(
            **model.config(), quantization_config=quantization_config(group_size, kv_cache)
        )

    @cached_property
    def kinds(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name -> dtype and shape."""
        return expected_tensors(self.spec, self.group_size, self.kv_cache)

    def tensor(self, name: str) -> Tensor:
        dtype, shape = self.kinds[name]
        where: dict[str, Any] = {"dtype": dtype, "device": self.device}
        drawn = where | {"generator": torch.Generator(self.device).manual_seed(crc32(f"{self.seed} {name}".encode()))}
        linear, _, suffix = name.rpartition(".")
        if suffix == "qweight":
            return torch.randint(-128, 128, shape, **drawn)
        if suffix == "s2_scales":
            return torch.randint(1, MOST_S2 + 1, shape, **drawn)
        if suffix == "s2_zeros":  # z in 7 * s2 + 1 .. 8 * s2 keeps every code * s2 - z within int8
            s2 = self.tensor(f"{linear}.s2_scales").int()
            return -(7 * s2 + 1 + torch.randint(16, shape, **drawn) * s2 // 16).to(torch.int8)
        if suffix in ("s1_scales", "s1_szeros"):
            inputs = 2 * self.kinds[f"{linear}.qweight"][1][1]
            scale = inputs**-0.5 / (CODE_STD if self.group_size == -1 else W8_STD)
            return torch.full(shape, scale if suffix == "s1_scales" else 7.5 * scale, **where)
        if "norm" in name:
            return torch.ones(shape, **where)
        # what is left: embedding, lm_head, biases, offsets of the cache
        std = shape[1] ** -0.5 if name == LM_HEAD else 1.0
        return torch.randn(shape, **drawn).mul_(std)

    def tokenizer(self) -> Any:
        """As many made-up words as the model has tokens, so that text costs what it does with a real vocabulary."""
        from tokenizers import Tokenizer, decoders, models
        from transformers import PreTrainedTokenizerFast

        words = {f"Ġ{number:x}": number for number in range(self.spec.vocab_size)}
        made = Tokenizer(models.BPE(vocab=words, merges=[]))
        made.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=made)
