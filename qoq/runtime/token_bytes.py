"""The bytes of single tokens. A tokenizer's `decode` makes text, which has none for parts of characters."""

import json
import re
from typing import Any

BYTE = re.compile("<0x([0-9A-F]{2})>")


class TokenBytes(dict[int, bytes]):
    """Token id -> its bytes, looked up when first asked for; for the thread of its tokenizer."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.tokenizer = tokenizer
        self._decoders = _decoders(tokenizer)
        self._alphabet = _alphabet()
        self._added = {token: str(text) for token, text in tokenizer.added_tokens_decoder.items()}

    def name(self, token: int) -> str:
        return self[token].decode(errors="replace")

    def __missing__(self, token: int) -> bytes:
        self[token] = found = self._find(token)
        return found

    def _find(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        text = self.tokenizer.convert_ids_to_tokens(token)
        if text is None:  # the model has more rows than the tokenizer tokens
            return b""
        if "ByteLevel" in self._decoders and all(letter in self._alphabet for letter in text):
            return bytes(self._alphabet[letter] for letter in text)
        if "ByteFallback" in self._decoders and (byte := BYTE.fullmatch(text)):
            return bytes.fromhex(byte[1])
        if self._decoders & {"ByteFallback", "Metaspace"}:
            return text.replace("▁", " ").encode()
        return self.tokenizer.decode([token]).encode()


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of steps that make text of the tokenizer's tokens, as far as they are known."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None or fast.decoder is None:
        return set()
    state = json.loads(fast.decoder.__getstate__())
    return {step["type"] for step in (state, *state.get("decoders", ()))}


def _alphabet() -> dict[str, int]:
    """GPT-2's letter for each byte: itself where it is printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = sorted(set(range(256)).difference(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
