"""Which pages of the KV cache are whose: reference counts, and full pages found again by the tokens they hold.

A page is used (by one or more sequences), blank (free, with nothing worth keeping) or idle (free, but full and named,
so that a prompt that begins alike can take it over). Blank pages are given out first, then idle ones, the longest
unused first.
"""

from array import array
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def page_name(previous: bytes, tokens: Sequence[int]) -> bytes:
    """The name of a full page: a digest of its token ids and of the name of the page before it (b"" for the first)."""
    return blake2b(previous + array("q", tokens).tobytes(), digest_size=16).digest()


class Pages:
    """The pages 0 .. count - 1 of a cache, of `size` tokens each."""

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self._users = [0] * count
        self._blank = list(reversed(range(count)))
        self._idle: dict[int, None] = {}  # in the order they fell idle
        self._page: dict[bytes, int] = {}
        self._name: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that `take` can give."""
        return len(self._blank) + len(self._idle)

    def needed(self, tokens: int) -> int:
        """Pages for so many tokens."""
        return -(-tokens // self.size)

    def take(self, count: int) -> list[int] | None:
        """So many pages with one user and no name, or None, and nothing done, where fewer are free."""
        if count > self.free:
            return None
        taken = []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page = next(iter(self._idle))
                del self._idle[page]
                del self._page[self._name.pop(page)]
            self._users[page] = 1
            taken.append(page)
        return taken

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages of these names, up to the first that is not here."""
        found = []
        for name in names:
            if name not in self._page:
                break
            found.append(self._page[name])
        return found

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each of these pages, which `find` gave."""
        for page in pages:
            self._idle.pop(page, None)
            self._users[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One user less for each page of a sequence; the last page falls idle first, since beginnings are shared."""
        for page in reversed(pages):
            if self._users[page] == 0:
                raise ValueError(f"page {page} is free already")
            self._users[page] -= 1
            if self._users[page] > 0:
                continue
            if page in self._name:
                self._idle[page] = None
            else:
                self._blank.append(page)

    def name(self, page: int, name: bytes) -> None:
        """Say what a full page holds. Where another page holds the same, that one stays the one to be found."""
        if name not in self._page and page not in self._name:
            self._page[name] = page
            self._name[page] = name
