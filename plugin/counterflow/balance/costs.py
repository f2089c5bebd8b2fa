"""What clones and moved homes cost: bytes of each tier, times of links, and their price in tokens of the slowest rank."""

from dataclasses import dataclass

from counterflow.bounds import take_number
from counterflow.errors import BalanceError

# What travels for each, in experts' weights of two bytes. A just-in-time clone gets its weights for the forward and again for the
# backward, and sends a gradient of four bytes home. A resident clone gets them once a step. A home moves with weights, masters of
# four bytes and two moments of four.
JUST_IN_TIME, RESIDENT, HOME = 4, 3, 7
# Far above any price; sums of prices stay whole numbers of 64 bits.
MOST_PRICE = 2**36
# What each field of `Costs` is called, the least and the most that it may be.
BOUNDS = {
    "expert_bytes": ("expert bytes", 1.0, 1e15),
    "token_time": ("token time in seconds", 1e-12, 1e3),
    "node_speed": ("node speed in bytes a second", 1.0, 1e18),
    "network_speed": ("network speed in bytes a second", 1.0, 1e18),
    "clone_time": ("clone time in seconds", 0.0, 1e3),
    "exposed": ("exposed share", 0.0, 1.0),
}


@dataclass(frozen=True)
class Costs:
    """Times and bytes by which clones are weighed; the defaults are those of a DeepSeek-V3 expert on H100 nodes.

    ``expert_bytes``: an expert's weights, of two bytes each. ``token_time``: seconds of an expert's forward and backward for a
    token. ``node_speed`` and ``network_speed``: bytes a second that a rank receives from its own node and from another.
    ``clone_time``: seconds that a clone holds up its rank in a micro-batch, whatever its tokens: its GEMMs read the weights
    twice and add up a gradient. ``exposed``: the share of a transfer's time that computation does not hide. Raises
    `BalanceError` for numbers that cannot be.
    """

    expert_bytes: float = 88e6
    token_time: float = 0.66e-6
    node_speed: float = 400e9
    network_speed: float = 45e9
    clone_time: float = 100e-6
    exposed: float = 0.15

    def __post_init__(self) -> None:
        for field, (name, least, most) in BOUNDS.items():
            take_number(getattr(self, field), name, least, most, error=BalanceError)

    def time_transfer(self, units: int, *, is_far: bool) -> float:
        """Return the seconds that ``units`` times an expert's weights take on a link."""
        return units * self.expert_bytes / (self.network_speed if is_far else self.node_speed)

    def time_clone(self, *, is_far: bool) -> float:
        """Return the seconds by which a just-in-time clone holds up computation, where nothing else does."""
        return self.clone_time + self.exposed * self.time_transfer(JUST_IN_TIME, is_far=is_far)

    def price_clones(self, ranks: int) -> tuple[int, int]:
        """Return the price of a just-in-time clone from its own node and from another, in 1024ths of a token.

        Clones of all ranks are sent and computed side by side, so a clone costs the slowest rank its share of ``ranks`` of what
        it costs its own.
        """
        near, far = (self.time_clone(is_far=is_far) / self.token_time / ranks * 1024 for is_far in (False, True))
        return min(MOST_PRICE, max(1, round(near))), min(MOST_PRICE, max(1, round(far)))
