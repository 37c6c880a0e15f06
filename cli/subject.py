"""What a command measures: a checkpoint folder, or a model as `quantize` takes it."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qoq.checkpoint import Checkpoint
    from qoq.evaluate import Model
    from qoq.models.architecture import ModelSpec
    from qoq.models.source import Source


class Subject:
    """A model by its name on the command line; weights are read by `load` alone."""

    def __init__(self, name: str, trust_remote_code: bool = False):
        from qoq.checkpoint import Checkpoint, is_checkpoint

        self.name = name
        self.trust_remote_code = trust_remote_code
        self.checkpoint: Checkpoint | None = Checkpoint(name) if is_checkpoint(name) else None

    @cached_property
    def original(self) -> "Source":
        """The unquantized model: of a checkpoint, the one it was made from.

        Raises:
            CheckpointError, ModelError: it is not known or not there.
        """
        from qoq.errors import CheckpointError
        from qoq.models.source import open_source

        if self.checkpoint is None:
            return open_source(self.name, self.trust_remote_code)
        model = self.checkpoint.report().get("model", "")
        if not model:
            raise CheckpointError(f"{self.checkpoint.folder}: no qoq_report.json names the model it was made from")
        return open_source(model, self.trust_remote_code)

    @property
    def folder(self) -> "Checkpoint | Source":
        """What has the config and the tokenizer."""
        return self.checkpoint or self.original

    @property
    def spec(self) -> "ModelSpec":
        return self.folder.spec

    def tokenizer(self) -> Any:
        return self.folder.tokenizer()

    def load(self, backend: str, device: str) -> "Model":
        """The model, ready to run through one of the backends of `qoq eval`."""
        from qoq import evaluate

        if backend == "original":
            return evaluate.OriginalModel(self.original, device)
        assert self.checkpoint is not None, f"{self.name} is no checkpoint"
        kind = evaluate.EngineModel if backend in ("prefill", "decode") else evaluate.QuantizedModel
        return kind(self.checkpoint, backend, device)
