"""Texts: every form of file, and the line of a mistake."""

import json

import pytest
from conftest import TESTS

from qoq.errors import DataError
from qoq.text import documents


def test_txt_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One.\n\nTwo \u00e9.\n", encoding="utf-8")
    assert list(documents(str(path))) == ["One.\n\nTwo \u00e9.\n"]


def test_jsonl_is_a_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "One\\u2028still one"}\n\n{"id": 1, "text": "Two"}\n')
    assert list(documents(str(path))) == ["One\u2028still one", "Two"]


def test_parquet(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").table
    path = tmp_path / "a.parquet"
    parquet.write_table(table({"id": [1, 2], "text": ["One", "Two"]}), path)
    assert list(documents(str(path))) == ["One", "Two"]
    parquet.write_table(table({"body": ["One"]}), path)
    with pytest.raises(DataError, match="a.parquet: no parquet file with a text column") as caught:
        list(documents(str(path)))
    assert "\n" not in str(caught.value)
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match="a.parquet: no parquet file"):
        list(documents(str(path)))


def test_raw_lines_are_the_rows_of_wikitext():
    rows = list(documents(str(TESTS / "data" / "wiki.test.head.raw"), "test"))
    assert rows[:4] == ["", " = Robert Boulter = \n", "", rows[3]]
    assert rows[3].startswith(" Robert Boulter is an English film") and rows[3].endswith("\n")


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        (" \n = A = \n \n b \n", ["", " = A = \n", "", " b \n"]),
        (" \n = A = \n \n b", ["", " = A = \n", "", " b"]),
        ("a\u2028b\x0bc\n\n", ["a\u2028b\x0bc\n", ""]),
        ("", []),
    ],
)
def test_the_last_row_needs_no_newline(tmp_path, text, rows):
    path = tmp_path / "wiki.raw"
    path.write_text(text)
    assert list(documents(str(path))) == rows


def test_bundled_c4_is_there_and_apart_from_what_quality_is_measured_on():
    bundled = list(documents("c4"))
    assert len(bundled) > 1000 and all(text.strip() for text in bundled)
    held_out = set(documents(str(TESTS / "data" / "c4_heldout.jsonl")))
    assert len(held_out) > 100 and not held_out & set(bundled)


@pytest.mark.parametrize("line", ["{", '"text"', "[1]", "3", '{"txt": "a"}', "null", '{"text": null}', '{"text": [1]}'])
def test_a_bad_line_is_numbered(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(DataError, match=r'a\.jsonl, line 3: expected an object with a "text" key'):
        list(documents(str(path)))


@pytest.mark.parametrize("suffix", ["txt", "raw", "jsonl", "parquet"])
def test_no_such_file(tmp_path, suffix):
    with pytest.raises(DataError, match="no such file"):
        documents(str(tmp_path / f"absent.{suffix}"))


def test_text_must_be_utf8(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 text \(.* at byte 3\)"):
        documents(str(path))


def test_an_unreachable_data_set_lists_what_is_there():
    pytest.importorskip("datasets")
    with pytest.raises(DataError, match=r"nobody/nothing: not a bundled text \(c4\)") as caught:
        documents("nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ({"text": None}, r"own/texts, row 3: cannot be read \(a text is None\)"),
        ({"txt": "a"}, r"own/texts, row 3: cannot be read \('text'\)"),
        (ConnectionError("reset\nby peer"), r"own/texts, row 3: cannot be read \(reset\)$"),
    ],
    ids=["null", "absent", "network"],
)
def test_a_later_row_of_the_hub_that_cannot_be_read(monkeypatch, last, message):
    def rows(*args, **options):
        yield from ({"text": "One"}, {"text": "Two"})
        if isinstance(last, Exception):
            raise last
        yield last

    monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", rows)
    found = documents("own/texts")
    assert [next(found), next(found)] == ["One", "Two"]
    with pytest.raises(DataError, match=message):
        next(found)


def test_jsonl_keeps_what_json_says(tmp_path):
    texts = ['tab\tquote"', "\u00fc\u4e2d", ""]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts), encoding="utf-8")
    assert list(documents(str(path))) == texts
