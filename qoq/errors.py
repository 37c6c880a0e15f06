"""The errors a user can cause or must hear of.

    QoqError
    ├── ModelError         a source model that cannot be found, read or supported
    ├── DataError          calibration or evaluation text
    ├── RecipeError        a recipe file or setting
    ├── QuantizationError  numbers that cannot be quantized, or a transform that changed the model
    ├── CheckpointError    a checkpoint folder that is incomplete, damaged or contradictory
    ├── KernelError        GPU kernels that cannot be compiled, loaded or run here
    └── OutputError        an output folder that cannot be used or written

Each message is one line: what, where, and what was expected. The command line prints it and exits with 1;
every other exception is a bug and keeps its traceback.
"""


class QoqError(Exception):
    """Base of all errors that are the input's fault, not the program's."""


class ModelError(QoqError):
    pass


class DataError(QoqError):
    pass


class RecipeError(QoqError):
    pass


class QuantizationError(QoqError):
    pass


class CheckpointError(QoqError):
    pass


class KernelError(QoqError):
    pass


class OutputError(QoqError):
    pass
