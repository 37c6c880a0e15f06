"""Text from tokens as they come: whole characters alone, up to a stop string."""

from collections.abc import Sequence
from functools import lru_cache
from os.path import commonprefix
from typing import Any

BROKEN = "\ufffd"  # what a tokenizer makes of bytes that are no character, or not yet
CONTEXT = 8  # tokens of a prompt that are decoded before its answer
LONGEST = 8  # tokens that may add nothing to the text; a character has at most 4 bytes


class TextStream:
    """The text of one answer.

    A token may hold a part of a character, and what it adds to the text may depend on the token before it. So each
    piece is decoded together with the one before, the first one with the end of the prompt, and kept back while it
    ends in the middle of a character.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.tokenizer, self.stop = tokenizer, stop
        self._longest = max(map(len, stop), default=1)
        self._text = ""  # that nobody has taken
        self.stopped = False  # at a stop string, which is not part of the text
        self._finished = False
        self._previous = 0  # ids before _read are in the text; those from _previous on are its last piece
        self._ids, self._read = end_of(tokenizer, prompt)
        (self._begun,) = decode_each(tokenizer, [self._ids])  # as long as the first piece is not there

    def push(self, token: int) -> None:
        """One more token."""
        push_each([self], [token])

    def finish(self) -> None:
        """No more tokens come: add what was kept back, without a character that was never finished."""
        before, after = decode_each(self.tokenizer, self._pieces())
        self._previous = self._read = len(self._ids)
        self._extend(after[self._known(before, after) :].rstrip(BROKEN))
        self._finished = True

    def take(self) -> str:
        """The text since the last call, as far as it stays: its end may be the beginning of a stop string."""
        kept = 0
        if self.stop and not self.stopped and not self._finished:
            lengths = (
                length
                for stop in self.stop
                for length in range(1, min(len(stop), len(self._text) + 1))
                if self._text.endswith(stop[:length])
            )
            kept = max(lengths, default=0)
        end = len(self._text) - kept
        taken, self._text = self._text[:end], self._text[end:]
        return taken

    def _pieces(self) -> tuple[list[int], list[int]]:
        """The last piece of the text, and that with what came since."""
        return self._ids[self._previous : self._read], self._ids[self._previous :]

    def _take(self, before: str, after: str) -> None:
        """The texts of `_pieces`."""
        start, long = self._known(before, after), len(self._ids) - self._read > LONGEST
        if len(after) > start and (long or not after.endswith(BROKEN)):
            self._previous, self._read, self._begun = self._read, len(self._ids), ""
            self._extend(after[start:])
        elif long:
            del self._ids[self._read :]

    def _known(self, before: str, after: str) -> int:
        """How many characters are not new. One that the prompt began is, once it is finished."""
        return max(_common(before, after), _common(self._begun, after))

    def _extend(self, piece: str) -> None:
        if self.stopped or not piece:
            return
        start = max(0, len(self._text) - self._longest + 1)
        self._text += piece
        ends = [end for stop in self.stop if (end := self._text.find(stop, start)) >= 0]
        if ends:
            self._text, self.stopped = self._text[: min(ends)], True


def end_of(tokenizer: Any, prompt: Sequence[int]) -> tuple[list[int], int]:
    """The last tokens of a prompt, which decide on the text behind it, and how many of them are whole characters.

    Text begins anew behind a special token, so it is not among them.
    """
    end = list(prompt[-CONTEXT:])
    after = max((place for place, token in enumerate(end, start=1) if _is_special(tokenizer, token)), default=0)
    cut = after == 0 and len(prompt) > CONTEXT  # maybe within a character
    end = end[after:]
    for stop in range(len(end), max(len(end) - 4, 0), -1):
        for start in range(4 if cut else 1):
            if BROKEN not in decode_each(tokenizer, [end[start:stop]])[0]:
                return end[start:], stop - start
    return end, len(end)


def _common(before: str, after: str) -> int:
    """The length of a text that another one goes on from, whose last bytes may have become a character by then."""
    return len(commonprefix((before, after))) if before.endswith(BROKEN) else len(before)


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


@lru_cache(maxsize=1 << 18)
def _is_special(tokenizer: Any, token: int) -> bool:
    """What has a name and adds no text."""
    return not _text_of(tokenizer, token) and bool(tokenizer.decode([token], skip_special_tokens=False))


def decode_each(tokenizer: Any, pieces: Sequence[list[int]]) -> list[str]:
    """The text of each list of tokens."""
    fast = getattr(tokenizer, "backend_tokenizer", None)  # its wrapper takes ten times as long
    if fast is not None:
        return fast.decode_batch(pieces, skip_special_tokens=True)
    return [tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False) for ids in pieces]
