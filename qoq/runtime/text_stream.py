"""Text from tokens as they come: whole characters alone, up to a stop string."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no character, or not yet


class TextStream:
    """The text of one request.

    A token may hold a part of a character, and what it adds to the text may depend on the token before it. So each
    piece is decoded together with the one before, and kept back while it ends in the middle of a character.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self._longest = max(map(len, stop), default=1)
        self.text = ""
        self.stopped = False  # at a stop string, which is not part of the text
        self._ids: list[int] = []
        self._previous = self._read = 0  # ids before _read are in the text; those from _previous on are its last piece

    def push(self, token: int) -> None:
        """One more token."""
        push_each([self], [token])

    def finish(self) -> None:
        """No more tokens come: add what was kept back, without a character that was never finished."""
        before, after = decode_each(self.tokenizer, self._pieces())
        self._previous = self._read = len(self._ids)
        self._extend(after[len(before) :].rstrip(BROKEN))

    @property
    def safe(self) -> int:
        """How many characters stay, whatever comes: the end may be the beginning of a stop string."""
        if not self.stop:
            return len(self.text)
        lengths = (
            length
            for stop in self.stop
            for length in range(1, min(len(stop), len(self.text) + 1))
            if self.text.endswith(stop[:length])
        )
        return len(self.text) if self.stopped else len(self.text) - max(lengths, default=0)

    def _pieces(self) -> tuple[list[int], list[int]]:
        """The last piece of the text, and that with what came since."""
        return self._ids[self._previous : self._read], self._ids[self._previous :]

    def _take(self, before: str, after: str) -> None:
        """The texts of `_pieces`."""
        if len(after) > len(before) and not after.endswith(BROKEN):
            self._previous, self._read = self._read, len(self._ids)
            self._extend(after[len(before) :])

    def _extend(self, piece: str) -> None:
        if self.stopped or not piece:
            return
        start = max(0, len(self.text) - self._longest + 1)
        self.text += piece
        ends = [end for stop in self.stop if (end := self.text.find(stop, start)) >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True


def push_each(streams: Sequence[TextStream], tokens: Sequence[int]) -> None:
    """One more token for each of these streams, which have one tokenizer, in one call of it."""
    if not streams:
        return
    tokenizer = streams[0].tokenizer
    known: list[str | None] = []
    pieces: list[list[int]] = []
    for stream, token in zip(streams, tokens, strict=True):
        stream._ids.append(token)
        before, after = stream._pieces()
        pieces.append(after)
        known.append(_text_of(tokenizer, before[0]) if len(before) == 1 else None)
        if known[-1] is None:
            pieces.append(before)
    texts = iter(decode_each(tokenizer, pieces))
    for stream, text in zip(streams, known, strict=True):
        after_text = next(texts)
        stream._take(next(texts) if text is None else text, after_text)


@lru_cache(maxsize=1 << 18)
def _text_of(tokenizer: Any, token: int) -> str:
    """What most pieces are: one token."""
    return decode_each(tokenizer, [[token]])[0]


def decode_each(tokenizer: Any, pieces: Sequence[list[int]]) -> list[str]:
    """The text of each list of tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)  # its wrapper takes ten times as long
    if fast is not None:
        return fast.decode_batch(pieces, skip_special_tokens=True)
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in pieces]
