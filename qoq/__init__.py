"""qoq: W4A8KV4 quantization of Hugging Face LLMs, in QServe's checkpoint layout.

Importing this package starts nothing: torch and transformers are imported by the modules that compute.
"""

__version__ = "0.1.0"
