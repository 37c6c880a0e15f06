"""Which GEMM kernel runs, and in what tiles: legal configurations, the tuned table, and a model of time for the rest.

Every configuration gives the same bits, so the choice is about time alone. It depends on the card and on the shape of
the product and is never measured at run time: `tuning.json` holds what `scripts/tune_kernels.py` found for some cards
and shapes; for others the configuration of least modelled time is taken.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from qoq.kernels.cards import RESERVED, Card

STEP = 128  # features of K in one stage
TAIL_TOKENS = 128  # of a tile: fewer take memory's time, of which a second launch spares nothing
STEPS_IN_SPLIT = 4  # at least, so that filling and draining the pipeline stays small beside them
COUNTERS = 16384  # int32 words of the workspace: one counter for each split tile, then
PARTIALS = 4 << 20  # partial sums
LATENCY = 1400  # clocks from asking device memory to having
TUNING = Path(__file__).with_name("tuning.json")
BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # tokens for which the table has entries


# Kernels


@dataclass(frozen=True)
class Config:
    """How a GEMM runs. A tile is `rows` rows of W by `tokens` tokens; `stages` steps of K are kept in shared memory;
    `splits` blocks share the steps of a tile. With `tail` > 1 a second launch makes the tiles of a last wave that would
    leave multiprocessors idle, and so many blocks share each of them."""

    kernel: str
    rows: int
    tokens: int
    stages: int
    splits: int = 1
    tail: int = 1

    def tiles(self, M: int, N: int) -> int:
        return -(-M // self.tokens) * -(-N // self.rows)

    @property
    def launched(self) -> list["Config"]:
        """What is compiled for it, without tails: one, and another for the tail."""
        whole = replace(self, tail=1)
        return [whole] if self.tail == 1 else [whole, replace(whole, splits=self.tail)]


class Kernel(ABC):
    """A GEMM kernel: the tiles it offers and how one is launched."""

    source: str
    shapes: tuple[tuple[int, int], ...]  # rows, tokens
    fewest_stages: int
    most_stages: int
    most_splits: int
    tensor_map = False  # whether the activations come as one
    swiglu = False  # whether it can end in silu(gate) * up
    tails = False  # whether a launch may make some of the tiles

    @abstractmethod
    def threads(self, config: Config) -> int:
        """In a block."""

    @abstractmethod
    def shared_bytes(self, config: Config, group_size: int) -> int:
        """Of a block."""

    @abstractmethod
    def resident(self, config: Config) -> int:
        """Blocks for which a multiprocessor has registers."""

    @abstractmethod
    def grid(self, part: "Part", card: Card, group_size: int) -> tuple[int, int, int]:
        """Blocks to launch."""

    @abstractmethod
    def arguments(self, part: "Part") -> tuple[int, ...]:
        """Of the kernel, its last ones."""

    @abstractmethod
    def split_fits(self, config: Config, group_size: int, M: int, N: int) -> bool:
        """Whether splits > 1 have room for their partial sums."""

    @abstractmethod
    def clocks(self, config: Config, card: Card, M: int, N: int, K: int, group_size: int) -> float:
        """A rough time: that of device memory, L2 and arithmetic, each with what the grid leaves idle."""

    def defines(self, config: Config, group_size: int, swiglu: bool = False) -> dict[str, int | str]:
        """Of the source; `swiglu` for the kernel that ends in silu(gate) * up."""
        return {"ROWS": config.rows, "TOKENS": config.tokens, "STAGES": config.stages, "GROUP_SIZE": group_size}


@dataclass(frozen=True)
class Part:
    """One launch: the tiles `first` and on of a product."""

    config: Config  # without a tail
    first: int
    tiles: int


def memory_clocks(
    config: Config, card: Card, M: int, N: int, K: int, group_size: int, busy: int, at_once: int
) -> float:
    """For reading and writing everything once, with `at_once` blocks on each of `busy` multiprocessors."""
    kernel, limits = KERNELS[config.kernel], card.limits
    ring = kernel.shared_bytes(config, group_size) * (config.stages - 1) / config.stages
    in_flight = at_once * min(ring, -(-steps(K) // config.splits) * step_bytes(config, group_size))
    total = N * K // 2 + N * levels_bytes(1, group_size) * steps(K) + M * K + 2 * M * N
    return total / min(card.multiprocessors * limits.memory, busy * in_flight / LATENCY)


def step_bytes(config: Config, group_size: int) -> int:
    """That a block reads for a step."""
    return config.rows * STEP // 2 + levels_bytes(config.rows, group_size) + config.tokens * STEP


def levels_bytes(rows: int, group_size: int) -> int:
    """s2 and zeros of one step; per-channel weights keep the room of one group."""
    return 2 * rows * (1 if group_size == -1 else STEP // group_size)


class Mma(Kernel):
    """mma.sync on sm_80 and newer (csrc/gemm_mma.cu): eight warps, 32 rows each; fewer rows mean teams along K."""

    source = "gemm_mma.cu"
    shapes = (
        *((rows, tokens) for tokens in (8, 16, 32) for rows in (32, 64, 128)),
        *((rows, 64) for rows in (64, 128, 256)),
        *((rows, 128) for rows in (128, 256)),
    )
    fewest_stages, most_stages, most_splits = 2, 8, 16
    ROWS = 256  # of all warps together
    OVERHEAD = 2500  # clocks of a launch, its first copies and its last stores
    DEQUANTIZE = 2.5  # clocks for a row of W in one step
    SPLIT_OVERHEAD = 2500  # clocks in which blocks that share a tile find one another
    SPLIT_BYTES = 8  # moved for each partial sum

    def threads(self, config: Config) -> int:
        return self.ROWS

    def shared_bytes(self, config: Config, group_size: int) -> int:
        rows, tokens, teams = config.rows, config.tokens, self.ROWS // config.rows
        stage = rows * STEP // 2 + tokens * STEP + levels_bytes(rows, group_size)
        ring = -(-stage // 128) * 128 * config.stages * teams
        parts = 4 * rows * tokens * (teams - 1)
        turned = 2 * (rows + 8) * tokens
        return max(ring, 8 * tokens + max(parts, turned))

    def resident(self, config: Config) -> int:
        return 1 if config.tokens >= 64 else 2

    def grid(self, part: Part, card: Card, group_size: int) -> tuple[int, int, int]:
        return part.tiles, part.config.splits, 1

    def arguments(self, part: Part) -> tuple[int, ...]:
        return (part.config.splits,)

    def split_fits(self, config: Config, group_size: int, M: int, N: int) -> bool:
        tiles = config.tiles(M, N)
        return tiles <= COUNTERS and tiles * config.rows * config.tokens <= PARTIALS

    def clocks(self, config: Config, card: Card, M: int, N: int, K: int, group_size: int) -> float:
        limits, count = card.limits, card.multiprocessors
        blocks = config.tiles(M, N) * config.splits
        turns = -(-steps(K) // config.splits)  # steps of a block
        busy = min(count, blocks)
        at_once = min(resident(config, card, group_size), -(-blocks // busy))
        memory = memory_clocks(config, card, M, N, K, group_size, busy, at_once)
        fullest = -(-blocks // count)  # blocks of the busiest multiprocessor
        l2 = max(fullest, blocks / count) * turns * step_bytes(config, group_size) / limits.cache
        multiply = max(self.DEQUANTIZE, config.tokens * STEP / limits.products)
        products = fullest * turns * config.rows * multiply
        waves = -(-blocks // (count * at_once))
        clocks = max(memory, l2, products) + self.OVERHEAD + (waves - 1) * LATENCY / at_once
        if config.splits > 1:
            moved = blocks * config.rows * config.tokens * self.SPLIT_BYTES
            clocks += self.SPLIT_OVERHEAD + moved / (count * limits.cache)
        return clocks


class Wgmma(Kernel):
    """wgmma on sm_90a (csrc/gemm_wgmma.cu): one or two warpgroups, and one that loads; splits are clusters."""

    source = "gemm_wgmma.cu"
    shapes = (*((rows, tokens) for tokens in (8, 16, 32, 64, 96, 128) for rows in (128, 256)), (128, 256))
    fewest_stages, most_stages, most_splits = 2, 12, 8
    tensor_map = True
    swiglu = True
    tails = True
    WARPGROUP = 128
    NEIGHBOURS = 18  # multiprocessors, among which all blocks of a cluster must be; the last ones are fewer
    OVERHEAD = 7000  # clocks of a launch, its first copies and its last stores
    SPLIT_OVERHEAD = 300  # clocks in which the blocks of a cluster find one another
    SUM = 0.15  # clocks for showing a partial sum and adding it up
    WAVE = 6000  # clocks between the end of clusters and the work of those that found no room before
    SECOND = 4000  # clocks between a first launch's last products and those of a tail

    def threads(self, config: Config) -> int:
        return (self.warpgroups(config) + 1) * self.WARPGROUP

    def warpgroups(self, config: Config) -> int:
        """That multiply: one for 128 rows, and for 64 where it has as many sums as its registers hold."""
        return config.rows // (64 if config.tokens > 128 else 128)

    def shared_bytes(self, config: Config, group_size: int) -> int:
        rows, tokens = config.rows, config.tokens
        stage = rows * STEP // 2 + tokens * STEP + levels_bytes(rows, group_size) + 16
        written_at_once = 2048 * self.warpgroups(config)
        return config.stages * stage + written_at_once + 8 * tokens * self.warpgroups(config)

    def resident(self, config: Config) -> int:
        return 2 if config.rows == self.WARPGROUP and config.tokens <= (64 if config.splits > 1 else 32) else 1

    def grid(self, part: Part, card: Card, group_size: int) -> tuple[int, int, int]:
        if part.config.splits > 1:
            return part.tiles * part.config.splits, 1, 1
        return min(part.tiles, card.multiprocessors * resident(part.config, card, group_size)), 1, 1

    def arguments(self, part: Part) -> tuple[int, ...]:
        return part.first, part.first + part.tiles

    def split_fits(self, config: Config, group_size: int, M: int, N: int) -> bool:
        return config.stages * STEP * (config.rows // 2 + config.tokens) >= 4 * config.rows * config.tokens

    def clocks(self, config: Config, card: Card, M: int, N: int, K: int, group_size: int) -> float:
        products, beside, most = 0.0, 0.0, 0
        launches = parts(config, card, group_size, M, N)
        for part in launches:
            splits = part.config.splits
            at_once, waves = self._waves(part, card, group_size)
            # A warpgroup alone waits for its products and then dequantizes; several take turns, but not perfectly.
            warpgroups = at_once * self.warpgroups(config)
            step = 290 + 300 * warpgroups + (0.4 + 2 * warpgroups) * config.tokens
            if config.tokens > 128:  # half as much to dequantize
                step = 4.3 * config.tokens
            products += waves * -(-steps(K) // splits) * step
            if splits > 1:
                sums = at_once * config.rows * config.tokens
                beside += self.SPLIT_OVERHEAD + sums * self.SUM + (waves - 1) * self.WAVE
            most = max(most, part.tiles * splits)
        first = launches[0]
        at_once, _ = self._waves(first, card, group_size)
        busy = min(card.multiprocessors, most)
        memory = memory_clocks(first.config, card, M, N, K, group_size, busy, at_once)
        clocks = (memory**3 + products**3) ** (1 / 3) + self.OVERHEAD + 4 * config.tokens
        return clocks + beside + (len(launches) - 1) * self.SECOND

    def _waves(self, part: Part, card: Card, group_size: int) -> tuple[int, int]:
        """Blocks that run at once on a multiprocessor, and the waves of them all."""
        splits, blocks = part.config.splits, part.tiles * part.config.splits
        whole, rest = divmod(card.multiprocessors, self.NEIGHBOURS)
        clusters = whole * (self.NEIGHBOURS // splits) + rest // splits
        alone = max(1, clusters) * splits  # blocks that have a multiprocessor for themselves
        at_once = min(resident(part.config, card, group_size), -(-blocks // alone))
        return at_once, -(-blocks // (alone * at_once))

    def defines(self, config: Config, group_size: int, swiglu: bool = False) -> dict[str, int | str]:
        split = {**super().defines(config, group_size), "SPLITS": config.splits}
        return {**split, "SWIGLU": 1} if swiglu else split


KERNELS: dict[str, Kernel] = {"mma": Mma(), "wgmma": Wgmma()}


# Legal configurations


def resident(config: Config, card: Card, group_size: int) -> int:
    """Blocks that a multiprocessor runs at once; 0: not even one."""
    kernel = KERNELS[config.kernel]
    room = card.limits.shared_bytes // (kernel.shared_bytes(config, group_size) + RESERVED)
    return min(kernel.resident(config), room)


def problem(config: Config, card: Card, M: int, N: int, K: int, group_size: int) -> str | None:
    """Why a configuration cannot run there, or None."""
    kernel = KERNELS.get(config.kernel)
    if kernel is None or config.kernel not in card.limits.kernels:
        return f"no kernel {config.kernel!r} on {card.architecture}"
    if (config.rows, config.tokens) not in kernel.shapes:
        return f"no tile of {config.rows} rows by {config.tokens} tokens"
    if not kernel.fewest_stages <= config.stages <= kernel.most_stages:
        return f"{config.stages} stages, expected {kernel.fewest_stages} to {kernel.most_stages}"
    if resident(config, card, group_size) == 0:
        return f"more shared memory than {card.architecture} has"
    if not 1 <= config.splits <= min(kernel.most_splits, steps(K)):
        return f"{config.splits} splits, expected 1 to {min(kernel.most_splits, steps(K))}"
    if config.splits > 1 and not kernel.split_fits(config, group_size, M, N):
        return f"no room for the partial sums of {config.splits} splits"
    if config.tail != 1:
        if config.splits > 1 or not kernel.tails:
            return f"a tail of {config.tail} beside {config.splits} splits of kernel {config.kernel!r}, expected 1"
        return problem(config.launched[1], card, M, N, K, group_size)
    return None


@cache
def parts(config: Config, card: Card, group_size: int, M: int, N: int) -> tuple[Part, ...]:
    """The launches that make a product."""
    whole, last = config.launched[0], config.launched[-1]
    tiles = config.tiles(M, N)
    rest = 0 if config.tail == 1 else tiles % (card.multiprocessors * resident(whole, card, group_size))
    return tuple(part for part in (Part(whole, 0, tiles - rest), Part(last, tiles - rest, rest)) if part.tiles > 0)


def steps(K: int) -> int:
    return -(-K // STEP)


def most_splits(K: int) -> int:
    """Of a tile, which leave a block enough steps."""
    return max(1, steps(K) // STEPS_IN_SPLIT)


def configs(name: str, card: Card, group_size: int) -> Iterator[Config]:
    """The tiles of a kernel worth trying on a card, unsplit, each with as many stages as let one block, or two when
    they are split, run at once."""
    kernel = KERNELS[name]
    for rows, tokens in kernel.shapes:
        depths = {}
        for stages in range(kernel.fewest_stages, kernel.most_stages + 1):
            config = Config(name, rows, tokens, stages)
            depths[resident(replace(config, splits=2), card, group_size)] = config
        yield from (config for blocks, config in depths.items() if blocks > 0)


def splits(config: Config, card: Card, M: int, N: int, K: int, group_size: int) -> Iterator[Config]:
    """The legal ways to split the tiles of a configuration, with no more stages than a block has steps: what it leaves
    of a multiprocessor's memory is room for the kernels before and after it."""
    fewest = KERNELS[config.kernel].fewest_stages
    for count in range(1, most_splits(K) + 1):
        stages = min(config.stages, max(-(-steps(K) // count), fewest))
        split = replace(config, stages=stages, splits=count)
        if problem(split, card, M, N, K, group_size) is None:
            yield split


def tails(config: Config, card: Card, M: int, N: int, K: int, group_size: int) -> Iterator[Config]:
    """A configuration as it is, and with the legal tails of a last wave that is not full, where products take the
    time."""
    yield config
    if config.splits == 1 and config.tokens >= TAIL_TOKENS:
        for count in range(2, most_splits(K) + 1):
            tail = replace(config, tail=count)
            legal = problem(tail, card, M, N, K, group_size) is None
            if legal and len(parts(tail, card, group_size, M, N)) == 2:
                yield tail


def candidates(card: Card, M: int, N: int, K: int, group_size: int) -> Iterator[Config]:
    """All that the fastest kernel of a card offers for x8 (M, K) times W (N, K), without tails."""
    found = (
        split
        for config in configs(card.limits.kernels[-1], card, group_size)
        for split in splits(config, card, M, N, K, group_size)
    )
    yield from dict.fromkeys(found)  # of few steps, deep and shallow rings are one


# The choice


def choose(card: Card, M: int, N: int, K: int, group_size: int) -> Config:
    """The configuration for x8 (M, K) times W (N, K) on a card: from the table, else of least modelled time.

    The tail is of least modelled time in any case: it depends on M, of which an entry of the table has many.
    """
    return chosen(card, rounded(M), N, K, group_size)


def rounded(M: int) -> int:
    """The most tokens that have a common choice with M: it takes some ms, and a server meets every M.

    They have as many tiles of each width that is worth a try.
    """
    step = 1 if M <= 8 else 8 if M <= 256 else 64
    return -(-M // step) * step


@cache
def chosen(card: Card, M: int, N: int, K: int, group_size: int) -> Config:
    """As `choose`, for a rounded M."""
    shape = M, N, K, group_size
    entry = tuned().get(card.name, {}).get(entry_name(N, K, group_size), {}).get(str(bucket(M)))
    found = [] if entry is None else [Config(*entry)]
    if not found or problem(found[0], card, *shape) is not None:
        found = list(candidates(card, *shape))
    return min(
        (each for config in found for each in tails(config, card, *shape)),
        key=lambda config: KERNELS[config.kernel].clocks(config, card, *shape),
    )


def bucket(M: int) -> int:
    """The entry of the table that serves M tokens."""
    return next((tokens for tokens in BUCKETS if M <= tokens), BUCKETS[-1])


def entry_name(N: int, K: int, group_size: int) -> str:
    return f"{N}x{K} " + ("channel" if group_size == -1 else f"g{group_size}")


@cache
def tuned() -> dict[str, dict[str, dict[str, list]]]:
    """Card -> shape -> bucket -> the fields of a Config."""
    return json.loads(TUNING.read_text())
