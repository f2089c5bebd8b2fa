"""Which pipeline rank holds which stages.

A model passes the ranks once or several times, each pass up (rank 0 to P-1) or down. A layout is named after
its passes::

    straight (u)    looped (uu)      V (ud)           zigzag (udu…)      bidirectional
    rank 0: 0       rank 0: 0 2      rank 0: 0 3      rank 0: 0 3 4      rank 0: 0 3
    rank 1: 1       rank 1: 1 3      rank 1: 1 2      rank 1: 1 2 5      rank 1: 1 2
    rank 2: 2                                                            rank 2: 1 2
    rank 3: 3                                                            rank 3: 0 3

In a V the model turns on the last rank, which holds two neighbouring stages, and ends where it began. In the
bidirectional layout of full DualPipe each stage has two homes, ranks s and P-1-s: the first half of the
micro-batches enters at rank 0, the second half at rank P-1.
"""

from dataclasses import dataclass
from functools import cached_property

from counterflow.bounds import take_whole
from counterflow.errors import ScheduleError

STRAIGHT, LOOPED, V, ZIGZAG, BIDIRECTIONAL = "straight", "looped", "v", "zigzag", "bidirectional"


@dataclass(frozen=True)
class Layout:
    """``stages[rank]`` lists the stages of that rank, one per model chunk, in forward order."""

    name: str
    stages: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> int:
        """Number of pipeline ranks."""
        return len(self.stages)

    @property
    def chunks(self) -> int:
        """Number of model chunks on each rank."""
        return len(self.stages[0])

    @cached_property
    def last_stage(self) -> int:
        """The stage that computes the loss."""
        return max(stage for held in self.stages for stage in held)

    @property
    def chunk_share(self) -> float:
        """A chunk's part of 1/P of the model: what one of its micro-batches counts as a live activation."""
        return self.ranks / (self.last_stage + 1)

    @cached_property
    def homes(self) -> dict[int, tuple[int, ...]]:
        """The ranks of each stage: one, or two where micro-batches flow in both directions."""
        found: dict[int, list[int]] = {}
        for rank, held in enumerate(self.stages):
            for stage in held:
                found.setdefault(stage, []).append(rank)
        # The first half of the micro-batches runs towards higher ranks: stage s on rank s.
        return {stage: tuple(sorted(ranks, key=lambda rank: rank != stage)) for stage, ranks in found.items()}

    @cached_property
    def rank_of(self) -> dict[int, int]:
        """The rank of each stage; of two homes, that of the first half of the micro-batches."""
        return {stage: ranks[0] for stage, ranks in self.homes.items()}

    def chunk_of(self, stage: int) -> int:
        """Return the index of the model chunk that is this stage on its rank."""
        return self.stages[self.rank_of[stage]].index(stage)


def lay_passes(ranks: int, passes: str) -> Layout:
    """One stage a rank and pass; ``passes`` has a letter for each: ``u`` (rank 0 to P-1) or ``d`` (back)."""
    if not passes or set(passes) - {"u", "d"}:
        raise ScheduleError(f"layout passes {passes!r} given; allowed are letters u (rank 0 to P-1) and d (P-1 to 0), like udu")
    ranks = take_whole(ranks, "layout: ranks", 1, error=ScheduleError)
    starts = range(0, ranks * len(passes), ranks)
    stages = tuple(
        tuple(start + (rank if way == "u" else ranks - 1 - rank) for start, way in zip(starts, passes, strict=True))
        for rank in range(ranks)
    )
    return Layout(_name_passes(passes), stages)


def _name_passes(passes: str) -> str:
    known = {"u": STRAIGHT, "u" * len(passes): LOOPED, ("ud" * len(passes))[: len(passes)]: ZIGZAG}
    known |= {"u": STRAIGHT, "ud": V}
    return known.get(passes, passes)


def lay_straight(ranks: int) -> Layout:
    """One stage a rank."""
    return lay_passes(ranks, "u")


def lay_looped(ranks: int, chunks: int) -> Layout:
    """``chunks`` stages a rank, dealt round by round (Megatron's virtual pipeline)."""
    return lay_passes(ranks, "u" * chunks)


def lay_v(ranks: int) -> Layout:
    """Two stages a rank: the way there and the way back."""
    return lay_passes(ranks, "ud")


def lay_bidirectional(ranks: int) -> Layout:
    """Stage s on ranks s and P-1-s (P even): full DualPipe."""
    take_whole(ranks, "bidirectional layout: ranks", 2, error=ScheduleError)
    half = [(rank, ranks - 1 - rank) for rank in range(ranks // 2)]
    return Layout(BIDIRECTIONAL, tuple(half + half[::-1]))


def lay_named(name: str, ranks: int, chunks: int) -> Layout:
    """Return the layout of a name on ``ranks`` ranks; ``chunks`` per rank (2 or more) count where the name leaves them open."""
    if name == BIDIRECTIONAL:
        return lay_bidirectional(ranks)
    passes = {STRAIGHT: "u", V: "ud", LOOPED: "u" * max(chunks, 2), ZIGZAG: ("ud" * max(chunks, 3))[: max(chunks, 3)]}
    return lay_passes(ranks, passes[name])


def find_layout(stages: tuple[tuple[int, ...], ...]) -> Layout | None:
    """Return the layout that has these stages (each rank's in rising order), if one has."""
    ranks, chunks = len(stages), len(stages[0]) if stages else 0
    if any(len(held) != chunks for held in stages):
        return None
    passes = "".join("u" if stages[0][chunk] == chunk * ranks else "d" for chunk in range(chunks))
    candidates = [lay_v(ranks)] if ranks == 1 and chunks == 2 else [lay_passes(ranks, passes)] if passes else []
    candidates += [lay_bidirectional(ranks)] if ranks % 2 == 0 else []
    return next((layout for layout in candidates if layout.stages == stages), None)
