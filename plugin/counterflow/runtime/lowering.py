"""Insert communication into a table: what one rank receives, computes and sends, in order.

A table lists computations; communication follows from them. A stage's output goes to the next stage, its input gradient to the
stage before; a message between two stages of one rank is kept there. An action's result is sent at once. Receives are posted
ahead: for each sender, the next few messages, in the order in which the sender makes them. Both ends derive that order from the
same table, so messages need no names and one FIFO per pair of ranks is enough, as NCCL has it. A message is a tuple of tensors
(`messages`); the mailbox knows how many, the program does not.

Sent tensors are kept until they have arrived. The receiver does not confirm that. But when it sends a result of its own, it has
run its row up to that action and has received all that came before. So each receive names the earlier sends to that peer that
can be released.
"""

from dataclasses import dataclass
from typing import NamedTuple

from counterflow.schedule.actions import Action
from counterflow.schedule.dependencies import Result, find_input, find_receiver, find_result
from counterflow.schedule.table import ScheduleTable

# Receives posted for each sender beyond the one needed now, so that a sender never waits for a receive.
POSTED_AHEAD = 2


class Transfer(NamedTuple):
    """One message between this rank and ``peer`` (a pipeline rank). Gloo matches by ``tag``; NCCL by order."""

    message: Result
    peer: int
    tag: int

    def __str__(self) -> str:
        return f"{self.message} of rank {self.peer} (tag {self.tag})"


class Part(NamedTuple):
    """A single action. Its input is received, or kept from an earlier part; its result is sent, or kept for a later part.

    Once ``receive`` is complete, the sends with the tags ``delivered`` have arrived.
    """

    single: Action
    receive: Transfer | None
    take: Result | None
    send: Transfer | None
    keep: Result | None
    delivered: tuple[int, ...] = ()


class Instruction(NamedTuple):
    """One action of a row: the receives to post before it, and its parts."""

    action: Action
    posts: tuple[Transfer, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Program:
    """What one pipeline rank does; ``instructions`` has one per action of the table's row."""

    table: ScheduleTable
    rank: int
    instructions: tuple[Instruction, ...]


def lower(table: ScheduleTable, rank: int) -> Program:
    """Return the program of one rank; the table must be valid."""
    channels = list_incoming(table, rank)
    deliveries = {sender: _list_deliveries(table, rank, sender) for sender in channels}
    place_of = {message: (sender, place) for sender, messages in channels.items() for place, message in enumerate(messages)}
    posted, wanted = dict.fromkeys(channels, 0), dict.fromkeys(channels, POSTED_AHEAD)
    waits_on = count_awaited(table, rank)
    instructions = []
    for position, action in enumerate(table.actions[rank]):
        parts = tuple(_lower_single(table, rank, single, place_of, deliveries) for single in action.singles())
        posts: list[Transfer] = []
        for sender, messages in channels.items():
            needed = [place_of[part.receive.message][1] + 1 for part in parts if part.receive and part.receive.peer == sender]
            wanted[sender] = max(wanted[sender], max(needed, default=0) + POSTED_AHEAD)
            ahead = messages[posted[sender] : wanted[sender]]
            end = posted[sender] + sum(1 for message in ahead if waits_on[message] <= position)
            posts += [Transfer(message, sender, make_tag(table, message)) for message in messages[posted[sender] : end]]
            posted[sender] = end
        instructions.append(Instruction(action, tuple(posts), parts))
    return Program(table, rank, tuple(instructions))


def count_awaited(table: ScheduleTable, rank: int) -> dict[Result, int]:
    """Return, for each result of the table, how many of this rank's first actions have to run before it can be made.

    No receive of it is posted before: on a GPU it would be a kernel that waits for this rank, and whatever makes the host wait
    for the GPU meanwhile (a kernel's code that is loaded at its first use, memory that is freed) would wait for ever.
    """
    made: dict[Result, int] = {}
    reached, places = [0] * table.ranks, [0] * table.ranks
    due = list(range(table.ranks))
    while due:
        row = due.pop()
        for action in table.actions[row][places[row] :]:
            singles = list(action.singles())
            own = {find_result(single) for single in singles}
            needed = [find_input(single, table.layout.last_stage) for single in singles]
            if any(one is not None and one not in made and one not in own for one in needed):
                break
            places[row] += 1
            reached[row] = max(reached[row], *(made.get(one, 0) for one in needed if one is not None), 0)
            if row == rank:
                reached[row] = places[row]
            for single in singles:
                if (result := find_result(single)) is not None:
                    made[result] = reached[row]
                    receiver = find_receiver(table, single)
                    if receiver is not None and receiver != row and receiver not in due:
                        due.append(receiver)
    return made


def list_incoming(table: ScheduleTable, rank: int) -> dict[int, list[Result]]:
    """Return the messages that each other rank sends to ``rank``, in the order in which it sends them."""
    incoming: dict[int, list[Result]] = {}
    for sender in range(table.ranks):
        for single in table.singles(sender) if sender != rank else ():
            result = find_result(single)
            if result is not None and find_receiver(table, single) == rank:
                incoming.setdefault(sender, []).append(result)
    return incoming


def _list_deliveries(table: ScheduleTable, rank: int, peer: int) -> dict[Result, tuple[int, ...]]:
    """Return, for each message from ``peer``, the tags of the messages that it received since it sent the one before."""
    deliveries: dict[Result, tuple[int, ...]] = {}
    taken: list[int] = []
    for single in table.singles(peer):
        needed = find_input(single, table.layout.last_stage)
        if needed is not None and table.rank_of(needed.stage, needed.microbatch) == rank:
            taken.append(make_tag(table, needed))
        made = find_result(single)
        if made is not None and find_receiver(table, single) == rank:
            deliveries[made], taken = tuple(taken), []
    return deliveries


def _lower_single(
    table: ScheduleTable,
    rank: int,
    single: Action,
    place_of: dict[Result, tuple[int, int]],
    deliveries: dict[int, dict[Result, tuple[int, ...]]],
) -> Part:
    needed, made, receiver = find_input(single, table.layout.last_stage), find_result(single), find_receiver(table, single)
    comes = needed is not None and needed in place_of
    goes = made is not None and receiver is not None and receiver != rank
    receive = Transfer(needed, place_of[needed][0], make_tag(table, needed)) if needed is not None and comes else None
    return Part(
        single,
        receive=receive,
        take=None if comes else needed,
        send=Transfer(made, receiver, make_tag(table, made)) if made and receiver is not None and goes else None,
        keep=made if receiver == rank else None,
        delivered=deliveries[receive.peer][receive.message] if receive else (),
    )


def make_tag(table: ScheduleTable, message: Result) -> int:
    """Return a number that no other message of the table has."""
    stages = table.layout.last_stage + 1
    return (message.microbatch * stages + message.stage) * 2 + (message.kind == "B")
