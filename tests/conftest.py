"""Two-layer random models of every supported family, made by transformers itself, and a byte-level tokenizer."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ["OMP_NUM_THREADS"] = "1"  # fastest for tiny models, and the same bits in every process

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from qoq import recipe
from qoq.recipe import Calibration, Recipe

settings.register_profile("qoq", deadline=None, max_examples=50, derandomize=True)
settings.register_profile("long", deadline=None, max_examples=2000)
settings.load_profile("qoq")
torch.set_num_threads(1)

TESTS = Path(__file__).parent
GROUP_SIZES = (128, 64, -1)
FAMILIES = ("llama", "llama-bias-tied", "mistral", "qwen2", "qwen3")
VOCAB, SEQLEN, WINDOW = 288, 48, 16
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
TEXT = "The quick brown fox jumps over the lazy dog; 42 is the answer, and nobody knows the question.\n" * 40


def make_model(family: str, hidden_size: int = 256) -> Any:
    """A transformers model with weights that make every part matter: gains far from 1, biases far from 0."""
    import transformers as hf

    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden_size,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "tie_word_embeddings": False,
    }
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, {}),
        "llama-bias-tied": (
            hf.LlamaConfig,
            hf.LlamaForCausalLM,
            {"attention_bias": True, "tie_word_embeddings": True},
        ),
        "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {"sliding_window": WINDOW}),
        "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, {"tie_word_embeddings": True}),
        "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {"head_dim": 128}),
    }
    config, model_class, extra = kinds[family]
    torch.manual_seed(FAMILIES.index(family))
    model = model_class(config(**common | extra)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomise(name, parameter)
    return model


def _randomise(name: str, parameter: torch.Tensor) -> None:
    if "norm" in name:
        parameter.uniform_(0.4, 1.6)
    elif name.endswith("bias"):
        parameter.normal_(0, 0.5)
        if "k_proj" in name:
            parameter[3] = 25.0  # the key outliers of Qwen2
    elif "embed" in name or "lm_head" in name:
        parameter.normal_(0, 0.5)
    else:
        parameter.normal_(0, parameter.shape[1] ** -0.5)


def make_tokenizer() -> Any:
    """One token for each byte, then bos (256) and eos (257)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


@pytest.fixture(scope="session")
def source_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """family -> its Hugging Face folder, made once. Do not write into it: see `copy_of`."""
    root = tmp_path_factory.mktemp("models")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            make_model(family).save_pretrained(path)
            make_tokenizer().save_pretrained(path)
        return path

    return folder


@pytest.fixture(scope="session", params=FAMILIES)
def any_model(request: pytest.FixtureRequest, source_folder: Callable[[str], Path]) -> Path:
    """The folder of each family in turn."""
    return source_folder(request.param)


@pytest.fixture(scope="session")
def llama(source_folder: Callable[[str], Path]) -> Path:
    return source_folder("llama")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def tiny_recipe(text_file: Path) -> Callable[..., Recipe]:
    """A shipped recipe with little text, the optional passes on: tiny_recipe("rtn", group_size=64, seed=1)."""

    def make(kind: str = "qoq", group_size: int = 128, **changes: Any) -> Recipe:
        shipped = recipe.load(f"{kind}-channel" if group_size == -1 else f"{kind}-g{group_size}")
        calibration = Calibration(dataset=str(text_file), nsamples=4, seqlen=32)
        every_pass = {"reorder": True} if kind == "qoq" else {}
        own = {"name": "tiny", "calibration": calibration, **every_pass, **changes}
        return dataclasses.replace(shipped, **own)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def checkpoint_folder(
    source_folder: Callable[[str], Path], tiny_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """(family, group_size) -> a quantized folder, made once by an undisturbed run. Do not write into it."""
    from qoq.calibration import pipeline
    from qoq.models.source import open_source

    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str = "llama", group_size: int = 128) -> Path:
        path = root / f"{family}{group_size}"
        if not path.exists():
            pipeline.quantize(open_source(str(source_folder(family))), path, tiny_recipe(group_size=group_size))
        return path

    return folder


@pytest.fixture(scope="session")
def any_checkpoint(any_model: Path, checkpoint_folder: Callable[..., Path]) -> Path:
    """A g128 checkpoint of each family in turn."""
    return checkpoint_folder(any_model.name)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder, to be damaged."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-{folder.name}"))

    return copy


def relative(x: torch.Tensor, reference: torch.Tensor) -> float:
    """|x - reference| / |reference|."""
    x, reference = x.detach(), reference.detach()
    return float((x.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture
def qoq(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command as the shell would; gives exit code, stdout, stderr."""
    from qoq.cli.main import main

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["qoq", *map(str, args)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capfd.readouterr())

    return run


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: x for path in sorted(folder.glob("*.safetensors")) for name, x in load_file(path).items()}


def pack_awq(codes: torch.Tensor) -> torch.Tensor:
    """(K, N) uint8 -> (K, N/8) int32 as AWQ has it: of each eight columns 0 2 4 6 1 3 5 7, lowest nibble first."""
    eights = codes.unflatten(-1, (-1, 8)).to(torch.int64)
    words = sum(eights[..., column] << 4 * nibble for nibble, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)))
    return torch.as_tensor(words).to(torch.uint32).view(torch.int32)


def weight_of(checkpoint: Any, full: str) -> Any:
    """The quantized weight of the linear of this full name."""
    index, name = full.removeprefix("model.layers.").split(".", 1)
    return checkpoint.linear(int(index), name).weight


def only_line(result: tuple[int, str, str]) -> str:
    """The one line on stderr of a command that failed."""
    code, out, err = result
    assert code == 1 and out == "", result
    assert len(err.splitlines()) == 1 and err.startswith("qoq: "), err
    return err


@pytest.fixture
def settings_file(tiny_recipe: Callable[..., Recipe], tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe.dump(tiny_recipe()))
    return path
