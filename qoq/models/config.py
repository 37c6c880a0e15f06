"""config.json, held against what a model can have before transformers builds lists of that length from it."""

import os
from pathlib import Path
from typing import Any

from qoq.errors import ModelError, first_line
from qoq.shards import read_object

MAX_LAYERS = 10_000
SIZES = {  # keys that count something -> the largest count
    "num_hidden_layers": MAX_LAYERS,
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), 1 << 30),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "head_dim"), 1 << 16),
}


def load_config(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model folder; `name` is for messages.

    Raises:
        ModelError: it is not there, or says what no model has.
    """
    path = folder / "config.json"
    if not os.path.isfile(path):
        raise ModelError(f"{name}: no config.json; expected a Hugging Face model folder")
    try:
        _check_sizes(read_object(path))
    except ValueError as error:
        raise ModelError(f"{name}: config.json cannot be read ({error})") from None
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here
        raise ModelError(f"{name}: config.json cannot be read ({first_line(error)})") from None


def _check_sizes(config: dict[str, Any]) -> None:
    for key, most in SIZES.items():
        value = config.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            raise ValueError(f"{key} is {value!r}, expected a number from 1 to {most}")
