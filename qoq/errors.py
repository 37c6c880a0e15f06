"""The errors a user can cause or must hear of.

    QoqError
    ├── ModelError         a source model that cannot be found, read or supported
    ├── DataError          calibration or evaluation text
    ├── RecipeError        a recipe or budget, its file or a setting
    ├── QuantizationError  numbers that cannot be quantized, or a transform that changed the model
    ├── CheckpointError    a checkpoint folder that is incomplete, damaged or contradictory
    ├── KernelError        GPU kernels that cannot be compiled, loaded or run here
    ├── OutputError        an output folder that cannot be used or written
    ├── RankError          another process of the same run failed (calibration/ranks.py)
    └── RankGone           another process of the same run does not answer (there too)

Each message is one line: what, where, and what was expected. The command line prints it and exits with 1;
every other exception is a bug and keeps its traceback.
"""

LONGEST_LINE = 1000  # characters of a message


def printable(text: str) -> str:
    """`text` on one line: what is not printable is escaped, what is beyond `LONGEST_LINE` is left out."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:LONGEST_LINE])
    return shown if len(text) <= LONGEST_LINE else f"{shown}... ({len(text)} characters)"


def first_line(error: Exception) -> str:
    """What another program's exception says, without the rest of its story."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def first_sentence(error: Exception) -> str:
    """As torch says that memory is out, without the figures."""
    return str(error).split(". ")[0]


class QoqError(Exception):
    """Base of all errors that are the input's fault, not the program's. Names in a message may be anyone's."""

    def __str__(self) -> str:
        return printable(super().__str__())


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
