"""Text from tokens as they come: whole characters alone, up to a stop string."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no character, or not yet


class TextStream:
    """The text of one request.

    A token may hold a part of a character, and what it adds to the text may depend on the token before it. So each
    piece is decoded together with the one before, and kept back while it ends in the middle of a character.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self.text = ""
        self.stopped = False  # at a stop string, which is not part of the text
        self._ids: list[int] = []
        self._previous = self._read = 0  # ids before _read are in the text; those from _previous on are its last piece

    def push(self, token: int) -> None:
        """One more token."""
        self._ids.append(token)
        before, after = (self._decode(self._ids[self._previous : end]) for end in (self._read, len(self._ids)))
        if len(after) > len(before) and not after.endswith(BROKEN):
            self._previous, self._read = self._read, len(self._ids)
            self._extend(after[len(before) :])

    def finish(self) -> None:
        """No more tokens come: add what was kept back, without a character that was never finished."""
        before, after = (self._decode(self._ids[self._previous : end]) for end in (self._read, len(self._ids)))
        self._previous = self._read = len(self._ids)
        self._extend(after[len(before) :].rstrip(BROKEN))

    @property
    def safe(self) -> int:
        """How many characters stay, whatever comes: the end may be the beginning of a stop string."""
        lengths = (
            length
            for stop in self.stop
            for length in range(1, min(len(stop), len(self.text) + 1))
            if self.text.endswith(stop[:length])
        )
        return len(self.text) if self.stopped else len(self.text) - max(lengths, default=0)

    def _decode(self, ids: list[int]) -> str:
        fast = getattr(self.tokenizer, "backend_tokenizer", None)  # its wrapper takes ten times as long
        if fast is not None:
            return fast.decode(ids, skip_special_tokens=True)
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _extend(self, piece: str) -> None:
        if self.stopped or not piece:
            return
        start = max(0, len(self.text) - max(map(len, self.stop), default=1) + 1)
        self.text += piece
        ends = [end for stop in self.stop if (end := self.text.find(stop, start)) >= 0]
        if ends:
            self.text, self.stopped = self.text[: min(ends)], True
