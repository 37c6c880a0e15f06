"""The bytes of single tokens, of each kind of tokenizer: together they are the text."""

from typing import Any

import pytest
from conftest import make_tokenizer

from qoq.runtime.token_bytes import TokenBytes

TEXT = "né → 漢字 𝄞"


def sentencepiece_like() -> Any:
    """As Llama 2's: ▁ for a space, and bytes for what is no token."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<s>", "é▁", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "n", "é", "▁n", "<0xZZ>"]
    vocab = {name: token for token, name in enumerate(names)}
    merges = [("é", "▁"), ("▁", "n")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "<a▁b>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize(("make", "start"), [(make_tokenizer, ""), (sentencepiece_like, " ")])
def test_the_bytes_of_tokens_are_those_of_the_text(make, start):
    tokenizer = make()
    token_bytes = TokenBytes(tokenizer)
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert b"".join(token_bytes[token] for token in tokens).decode() == start + TEXT
    assert token_bytes.name(tokens[-1]) == "\ufffd"  # the end of a character


def test_tokens_that_are_no_text():
    tokenizer = sentencepiece_like()
    token_bytes = TokenBytes(tokenizer)
    for name, expected in (("<s>", "<s>"), ("<a▁b>", "<a▁b>"), ("▁n", " n"), ("<0xZZ>", "<0xZZ>"), ("<0x41>", "A")):
        assert token_bytes.name(tokenizer.convert_tokens_to_ids(name)) == expected
    assert token_bytes[10_000] == b""  # a model may have more rows than its tokenizer has tokens
    byte_level = make_tokenizer()
    byte_level.add_tokens(["éé", "漢"])  # the first has letters of the alphabet of bytes
    assert [TokenBytes(byte_level).name(len(byte_level) - back) for back in (2, 1)] == ["éé", "漢"]


def test_a_tokenizer_of_another_kind_decodes():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"fox": 0, "[unk]": 1}, unk_token="[unk]"))
    assert TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words))[0] == b"fox"


def test_a_token_is_looked_up_once(monkeypatch):
    tokenizer = make_tokenizer()
    token_bytes = TokenBytes(tokenizer)
    asked: list[int] = []
    monkeypatch.setattr(tokenizer, "convert_ids_to_tokens", lambda token: asked.append(token))
    assert token_bytes[7] == token_bytes[7] and asked == [7]
