"""qoq: W4A8KV4 quantization of Hugging Face LLMs, in QServe's checkpoint layout.

Importing this package starts nothing: torch and transformers are imported by the modules that compute. What it leaves
behind is a notice for transformers, so that `AutoModelForCausalLM.from_pretrained` opens a checkpoint.
"""

from qoq.registration import install

__version__ = "0.1.0"

install()
