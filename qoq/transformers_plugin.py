"""A checkpoint as a transformers model: the config and the quantizer that `from_pretrained` finds by "qoq".

    import qoq
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(FOLDER, device_map="cuda")

Registered while transformers is still being imported (`qoq.registration`), so this module imports no part of it that
builds models; `qoq.transformers_model` does, and is imported by the first load.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qoq.errors import ModelError

METHOD = "qoq"


def register() -> None:
    """Enter the registries of transformers; a second call changes nothing."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(QoqConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(QoqQuantizer)


class QoqConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json, word for word, so that `save_pretrained` writes what was read."""

    def __init__(self, **entries: Any):
        vars(self).update({"quant_method": METHOD} | entries)


class QoqQuantizer(HfQuantizer):
    """Checks the folder, gives the model its quantized linears and its quantized cache, checks what was loaded."""

    requires_calibration = True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Raises ModelError: anything but float16, in which scales, norms and the kernels are."""
        if dtype != torch.float16:
            name = str(dtype).removeprefix("torch.")
            raise ModelError(f"dtype is {name}; a qoq checkpoint computes in float16 (leave dtype out)")
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        """Raises CheckpointError for a damaged folder, of which transformers would only warn; ModelError."""
        from qoq.checkpoint import Checkpoint
        from qoq.transformers_model import convert

        if not checkpoint_files:
            raise ModelError("a qoq model is loaded from its folder; a state_dict alone is not enough")
        if getattr(model.config, "distributed_config", None) is not None:
            raise ModelError("tensor parallel plans cannot slice packed weights; leave tp_plan out, or use device_map")
        convert(model, Checkpoint(Path(checkpoint_files[0]).parent))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        """Raises ModelError for weights off their device; CheckpointError for a group that no kernel can multiply."""
        from qoq.kernels.library import ALIGNMENT
        from qoq.transformers_model import Linear

        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if "disk" in devices or "cpu" in devices and len(devices) > 1:
            raise ModelError(
                f"device_map spreads the model over {', '.join(sorted(devices))}; packed weights cannot be offloaded: "
                "give all layers to GPUs, or all to the CPU"
            )
        for parameter in model.requires_grad_(False).parameters():
            if parameter.data_ptr() % ALIGNMENT != 0:  # a view of the file
                parameter.data = parameter.data.clone()
        for module in model.modules():
            if isinstance(module, Linear):
                module.prepare()
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False
