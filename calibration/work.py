"""The work folder: what an interrupted run leaves behind, and how the next one goes on.

<output>.work/run.json                     what this run is: sources, recipe, tokens, version
<output>.work/parts/<name>.safetensors     finished parts: embed, layer-00000 ..., head; report in the metadata
<output>.work/checkpoint/                  the folder that becomes <output> once it is verified
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq import checkpoint, shards
from qoq.errors import OutputError

RUN = "run.json"


class Work:
    """The work folder of one output.

    Raises:
        OutputError: the output exists already, or the work folder belongs to another run (with `resume`).
    """

    def __init__(self, output: Path, run: Mapping[str, Any], resume: bool):
        self.output = output
        self.folder = output.with_name(output.name + ".work")
        self.parts = self.folder / "parts"
        self.draft = self.folder / "checkpoint"
        refuse_existing(output)
        self._open(dict(run), resume)

    def _open(self, run: dict[str, Any], resume: bool) -> None:
        marker = self.folder / RUN
        if self.folder.exists() and not marker.is_file():
            if any(self.folder.iterdir()):
                raise OutputError(
                    f"{self.folder}: exists and is no work folder of qoq; remove it or name another --output"
                )
        elif marker.is_file():
            if resume:
                self._refuse_other(run)
            else:
                shutil.rmtree(self.folder)
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise shards.cannot_write(self.parts, error) from None
        shards.write_bytes(marker, json.dumps(run, indent=2) + "\n")

    def _refuse_other(self, run: dict[str, Any]) -> None:
        try:
            found = dict(json.loads((self.folder / RUN).read_text()))
        except (ValueError, TypeError, OSError):
            found = {}
        changed = [key for key in run if found.get(key) != run[key]]
        if changed:
            raise OutputError(
                f"{self.folder}: left by a run with another {' and '.join(changed)}; "
                "use --no-resume to start over, or name another --output"
            )

    def path(self, part: str) -> Path:
        return self.parts / f"{part}.safetensors"

    def has(self, part: str) -> bool:
        return self.path(part).is_file()

    def write(self, part: str, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
        """Write a finished part; it is whole or absent.

        Raises:
            OutputError: says how to go on after a full disk.
        """
        try:
            shards.write_tensors(self.path(part), tensors, {"report": json.dumps(report)})
        except OutputError as error:
            raise self.keep(error) from None

    def keep(self, error: OutputError) -> OutputError:
        """The same error, with how to go on."""
        return OutputError(
            f"{error}; finished layers are kept in {self.folder}: make room and run the same command again"
        )

    def report(self, part: str) -> dict[str, Any]:
        """What was recorded with a part.

        Raises:
            OutputError: the part is damaged.
        """
        try:
            with safe_open(self.path(part), framework="pt") as file:
                return json.loads(file.metadata()["report"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{self.path(part)}: damaged ({error}); use --no-resume to start over") from None

    def finish(self) -> None:
        """Give the verified draft its final name and remove the rest."""
        refuse_existing(self.output)
        try:
            if self.output.is_dir():
                self.output.rmdir()
            self.draft.rename(self.output)
        except OSError as error:
            raise self.keep(shards.cannot_write(self.output, error)) from None
        shutil.rmtree(self.folder, ignore_errors=True)


def refuse_existing(output: Path) -> None:
    """Raise OutputError unless `output` is absent or an empty folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if checkpoint.is_checkpoint(output):
        raise OutputError(f"{output}: holds a finished checkpoint; remove it or name another --output")
    raise OutputError(f"{output}: exists and is not a checkpoint of ours; name another --output")
