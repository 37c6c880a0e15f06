"""The work folder: what an interrupted run leaves behind, and how the next one goes on.

<output>.work/lock                         held by the run that is at work here
<output>.work/run.json                     what this run is: sources, recipe, tokens, version
<output>.work/parts/<name>.safetensors     finished parts: embed, layer-00000 ..., head; report in the metadata
<output>.work/checkpoint/                  the folder that becomes <output> once it is verified
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qoq import checkpoint, shards
from qoq.errors import OutputError

RUN, LOCK = "run.json", "lock"


class Work:
    """The work folder of one output; `hold` opens it."""

    def __init__(self, output: Path):
        self.output = Path(os.path.abspath(output))  # "." has no name
        self.folder = self.output.with_name(self.output.name + ".work")
        self.parts = self.folder / "parts"
        self.draft = self.folder / "checkpoint"

    @contextmanager
    def hold(self, run: Mapping[str, Any], resume: bool) -> Iterator["Work"]:
        """Work there alone, from where the same run stopped (with `resume`) or from the start.

        Raises:
            OutputError: the output exists already, the work folder is none of ours or belongs to another run, or one
                is at work there.
        """
        refuse_existing(self.output)
        self._refuse_foreign()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / LOCK).open("w")
        except OSError as error:
            raise shards.cannot_write(self.folder, error) from None
        with lock:
            self._lock(lock)
            self._start(dict(run), resume)
            yield self

    def _refuse_foreign(self) -> None:
        if not self.folder.exists() or (self.folder / RUN).is_file():
            return
        if not self.folder.is_dir() or any(path.name != LOCK for path in self.folder.iterdir()):
            raise OutputError(f"{self.folder}: exists and is no work folder of qoq; remove it or name another --output")

    def _lock(self, file: IO[str]) -> None:
        """The system lets go of it when the file is closed or its process ends, however that happens."""
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{self.folder}: another run is at work here; wait for its end or name another --output"
            ) from None
        except OSError:  # a file system without locks
            pass

    def _start(self, run: dict[str, Any], resume: bool) -> None:
        if (self.folder / RUN).is_file():
            if resume:
                self._refuse_other(run)
            else:
                for folder in filter(Path.exists, (self.parts, self.draft)):
                    shutil.rmtree(folder)
        shards.write_bytes(self.folder / RUN, json.dumps(run, indent=2) + "\n")
        try:
            self.parts.mkdir(exist_ok=True)
        except OSError as error:
            raise shards.cannot_write(self.parts, error) from None

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
            shards.write_tensors(self.path(part), tensors, {"report": json.dumps(report, allow_nan=False)})
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
