"""Text for calibration and evaluation: bundled, from a file, or from the hub."""

import io
import json
import os
import reprlib
from collections.abc import Callable, Iterator
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

from qoq.errors import DataError, QoqError, first_line

BUNDLED = {"c4": "c4.jsonl"}  # name -> file in calibration/text
# name -> path and configuration on the hub, and the only split it has, if there is only one
HUB_DATASETS: dict[str, tuple[str, str | None, str | None]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
    "pileval": ("mit-han-lab/pile-val-backup", None, "validation"),
}
ROWS_AT_ONCE = 1024  # of a parquet file

Render = Callable[[list[dict[str, str]]], str]


def documents(dataset: str, split: str = "train", render: Render | None = None) -> Iterator[str]:
    """The texts of a bundled name, a file (.txt, .raw, .jsonl, .parquet) or a split of a data set on the hub.

    `render` makes text of the "messages" of a conversation in a .jsonl file; without it they are refused.
    A .txt file is one document. A .raw file is WikiText's: its lines are the rows of the data set.

    Raises:
        DataError: no such data set, or a file of another form.
    """
    path = Path(os.path.expanduser(dataset))
    if dataset in BUNDLED:
        text = resources.files("qoq.calibration").joinpath("text", BUNDLED[dataset]).read_text(encoding="utf-8")
        return _json_lines(text, dataset, render)
    if path.suffix in (".txt", ".raw", ".jsonl", ".parquet"):
        if not os.path.isfile(path):
            raise DataError(f"{dataset}: no such file")
        if path.suffix == ".parquet":
            return _parquet(path)
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{dataset}: not UTF-8 text ({error.reason} at byte {error.start})") from None
        if path.suffix == ".raw":
            return (line if line.strip() else "" for line in io.StringIO(text))
        return _json_lines(text, dataset, render) if path.suffix == ".jsonl" else iter((text,))
    return _hub(dataset, split)


def _json_lines(content: str, where: str, render: Render | None) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text = render(row["messages"]) if render and "messages" in row else row["text"]
            text.encode()  # JSON can name halves of characters, which no tokenizer takes
        except QoqError:
            raise
        except Exception as error:  # a chat template is a program and raises what it likes
            other = ' or "messages" that the chat template takes' if render else ""
            raise DataError(
                f'{where}, line {number}: expected an object with a "text" key that holds a string{other} '
                f"({type(error).__name__}: {error})"
            ) from None
        yield text


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path}: reading parquet needs pyarrow; pip install 'qoq[eval]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE, columns=["text"]):
                for text in batch.column("text").to_pylist():
                    if not isinstance(text, str):
                        raise ValueError(f"a text is {reprlib.repr(text)}")
                    yield text
    except (pyarrow.ArrowException, OSError, KeyError, ValueError) as error:
        raise DataError(f"{path}: no parquet file with a text column ({first_line(error)})") from None


def _hub(name: str, split: str) -> Iterator[str]:
    where, config, only_split = HUB_DATASETS.get(name, (name, None, None))
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{name}: no such file, and hub data sets need pip install 'qoq[eval]'") from None
    try:
        rows = iter(load_dataset(where, config, split=only_split or split, streaming=True))
        first = next(rows)
    except Exception as error:  # the hub, its client and the builder raise many kinds
        raise DataError(
            f"{name}: not a bundled text ({', '.join(BUNDLED)}), a .txt, .jsonl or .parquet file, "
            f"or a data set the hub gives ({first_line(error)})"
        ) from None
    if "text" not in first:
        raise DataError(f"{name}: no column 'text'; it has {', '.join(first)}")
    return _texts(name, chain([first], rows))


def _texts(name: str, rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    """Of a data set on the hub, which may break off and may hold anything."""
    number = 1
    try:
        for row in rows:
            text = row["text"]
            if not isinstance(text, str):
                raise ValueError(f"a text is {reprlib.repr(text)}")
            yield text
            number += 1
    except Exception as error:  # as above
        raise DataError(f"{name}, row {number}: cannot be read ({first_line(error)})") from None
