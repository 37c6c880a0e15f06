"""Proof that quantizing streams: a random Llama of 1.9 billion parameters, and the peak memory of `qoq quantize` on it,
beside what `qoq quantize --plan` says of it.

    python scripts/peak_memory.py

Exits with 1 if the peak exceeds 35 % of the size of the weight files, or the plan is off by more than it says. Needs
Linux (/proc) and 5 GB of disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig

from qoq import shards
from qoq.models.architecture import EMBEDDING, FINAL_NORM, LM_HEAD, ModelSpec, model_spec

LIMIT = 0.35
SHARD_BYTES = 1_000_000_000
CALIBRATION = ["--nsamples", "4", "--seqlen", "128"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=72, help="decoder layers, 50 MB each (default: 72)")
    parser.add_argument("--recipe", default="qoq-g128", help="name or YAML file (default: qoq-g128)")
    parser.add_argument("--folder", type=Path, help="where to work, and what to keep (default: a temporary folder)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        size = write_model(folder / "model", options.layers)
        print(f"random Llama, {options.layers} layers: {size / 1e9:.2f} GB", flush=True)
        model, output = str(folder / "model"), str(folder / "quantized")
        command = ["quantize", "--model", model, "--output", output, "--recipe", options.recipe, *CALIBRATION]
        planned = subprocess.run([sys.executable, "-m", "qoq", *command, "--plan", "--json"], stdout=subprocess.PIPE)
        run = json.loads(planned.stdout)["run"]
        peak = peak_memory([sys.executable, "-m", "qoq", *command])
    said = run["peak_bytes"]["host"]
    print(f"the plan said {said / 1e9:.2f} GB ({said / peak - 1:+.1%})")
    print(f"peak memory {peak / 1e9:.2f} GB, {100 * peak / size:.1f} % of the weights; allowed {100 * LIMIT:.0f} %")
    sys.exit(peak > LIMIT * size or abs(said / peak - 1) > run["error"])


def write_model(folder: Path, layers: int) -> int:
    """Write a model folder, a layer in memory at a time; returns the bytes of its shards."""
    torch.manual_seed(0)
    parts = folder / "parts"
    parts.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=128,
        tie_word_embeddings=False,
    )
    config.save_pretrained(folder)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    files = []
    for number, tensors in enumerate(random_parts(model_spec(config, "random"))):
        files.append(parts / f"{number:05d}.safetensors")
        shards.write_tensors(files[-1], tensors)
    shards.write_shards(folder, files, SHARD_BYTES)
    for file in files:
        file.unlink()
    parts.rmdir()
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def random_parts(spec: ModelSpec) -> Iterator[dict[str, Tensor]]:
    """Embedding, layers and head, float16."""
    yield {EMBEDDING: random(spec.vocab_size, spec.hidden_size)}
    for index in range(spec.num_layers):
        yield {f"model.layers.{index}.{name}": random(*shape) for name, shape in spec.layer_shapes().items()}
    yield {FINAL_NORM: random(spec.hidden_size), LM_HEAD: random(spec.vocab_size, spec.hidden_size)}


def random(*shape: int) -> Tensor:
    """Matrices of Llama's initial size, 0.02; vectors are norm gains and lie around 1."""
    values = torch.randn(shape) * 0.02
    return (values + 1 if len(shape) == 1 else values).half()


def byte_tokenizer() -> Tokenizer:
    """256 tokens, one for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: number for number, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def peak_memory(command: list[str]) -> int:
    """Run a command; the largest resident memory of its process, in bytes.

    Read from /proc while it runs: getrusage of a child counts this process's memory in, as it was at the fork.
    """
    process, peak = subprocess.Popen(command), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        lines = dict(line.split(":", 1) for line in status.splitlines())
        peak = max(peak, int(lines.get("VmHWM", "0 kB").split()[0]) * 1024)
        time.sleep(0.1)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return peak


if __name__ == "__main__":
    main()
