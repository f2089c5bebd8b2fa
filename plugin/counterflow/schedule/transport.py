"""Would a table deadlock where sends wait for their receiver?

This project's runtime never waits for a send. Others do. A rank sends what an action made before its next action, and
takes what that one needs; a send is over once its receiver has posted the receive. A rank posts the receive of
what it needs when it comes to it, and keeps the next ``receives_ahead`` of each sender posted, in the sender's order.

- ``blocking``: first the sends, one after the other, then the receives
- ``batched``: sends and receives of one stop together, as Megatron's fused send and receive
"""

from dataclasses import dataclass

from counterflow.errors import ScheduleError
from counterflow.schedule.dependencies import Result, find_input, find_receiver, find_result
from counterflow.schedule.table import ScheduleTable

TRANSPORTS = ("blocking", "batched")


@dataclass
class _Channel:
    """What one rank sends another, in the sender's order: how many are offered, posted and taken."""

    size: int = 0
    offered: int = 0
    posted: int = 0
    taken: int = 0


@dataclass(frozen=True)
class _Stop:
    """What a rank sends and receives between two actions: (channel, place in it)."""

    sends: list[tuple[_Channel, int]]
    receives: list[tuple[_Channel, int]]


def count_receives_ahead(table: ScheduleTable, transport: str) -> int:
    """Return how many receives of each sender must be kept posted so that a valid table does not deadlock."""
    traffic = _list_stops(table)
    most = max((channel.size for channel in traffic[1]), default=0)
    low, high = 0, 0
    # More never hold anyone up, and all of them hold up no valid table: double what is too little, then halve what is left.
    while high < most and _find_held_up(traffic, transport, high) is not None:
        low, high = high + 1, min(2 * high + 1, most)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if _find_held_up(traffic, transport, middle) is None else (middle + 1, high)
    return low


def require_transport(table: ScheduleTable, transport: str, receives_ahead: int) -> None:
    """Raise `ScheduleError`, naming rank, position and action, where the table deadlocks under this transport."""
    held_up = find_held_up(table, transport, receives_ahead)
    if held_up is not None:
        rank, position = held_up
        row = table.actions[rank]
        action = row[position] if position < len(row) else "end"
        raise ScheduleError(
            f"rank {rank}, position {position}, action {action}: held up for ever under {transport} P2P with {receives_ahead} "
            f"receives ahead; it needs {count_receives_ahead(table, transport)}"
        )


def find_held_up(table: ScheduleTable, transport: str, receives_ahead: int) -> tuple[int, int] | None:
    """Return (rank, position) of a rank that never gets past a stop, None where all ranks finish."""
    return _find_held_up(_list_stops(table), transport, receives_ahead)


def _find_held_up(
    traffic: tuple[list[list[_Stop]], list[_Channel]], transport: str, receives_ahead: int
) -> tuple[int, int] | None:
    if transport not in TRANSPORTS:
        raise ScheduleError(f"transport {transport!r} given; allowed: {', '.join(TRANSPORTS)}")
    stops, channels = traffic
    for channel in channels:
        channel.offered, channel.posted, channel.taken = 0, receives_ahead, 0
    position = [0] * len(stops)
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(stops):
            while position[rank] < len(row) and _pass_stop(row[position[rank]], transport, receives_ahead):
                position[rank] += 1
                moved = True
    return next(((rank, at) for rank, at in enumerate(position) if at < len(stops[rank])), None)


def _pass_stop(stop: _Stop, transport: str, receives_ahead: int) -> bool:
    """Send and post what the stop allows; tell whether all of it is over. May be called again where it is not."""
    for channel, place in stop.sends:
        channel.offered = max(channel.offered, place + 1)
        if transport == "blocking" and channel.posted <= place:
            return False
    for channel, place in stop.receives:
        channel.posted = max(channel.posted, place + 1)
    sent = all(channel.posted > place for channel, place in stop.sends)
    if not sent or any(channel.offered <= place for channel, place in stop.receives):
        return False
    for channel, _ in stop.receives:
        channel.taken += 1
        channel.posted = max(channel.posted, channel.taken + receives_ahead)
    return True


def _list_stops(table: ScheduleTable) -> tuple[list[list[_Stop]], list[_Channel]]:
    """Return the stops of each rank, before each action and after the last, and the channels between ranks."""
    channels: dict[tuple[int, int], _Channel] = {}
    on_way: dict[Result, tuple[_Channel, int]] = {}
    sends: list[list[list[tuple[_Channel, int]]]] = [[[] for _ in range(len(row) + 1)] for row in table.actions]
    for rank, row in enumerate(table.actions):
        for position, action in enumerate(row, start=1):
            for single in action.singles():
                result, receiver = find_result(single), find_receiver(table, single)
                if result is not None and receiver is not None and receiver != rank:
                    channel = channels.setdefault((rank, receiver), _Channel())
                    on_way[result] = (channel, channel.size)
                    sends[rank][position].append(on_way[result])
                    channel.size += 1
    stops = []
    for rank, row in enumerate(table.actions):
        needs = [[find_input(single, table.layout.last_stage) for single in action.singles()] for action in row]
        receives = [[on_way[need] for need in before if need in on_way] for before in needs]
        stops.append([_Stop(out, back) for out, back in zip(sends[rank], [*receives, []], strict=True)])
    return stops, list(channels.values())
