"""Tables lowered to programs: every message is sent and received once, and what has been sent is let go in time."""

import importlib.util

import pytest
from hypothesis import given

from counterflow.schedule import ScheduleTable
from tests.support.slow_schedule import any_table

pytestmark = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="the runtime needs torch")


@given(any_table)
def test_every_message_is_posted_before_it_is_received_and_received_once(table: ScheduleTable) -> None:
    from counterflow.runtime.lowering import lower

    programs = [lower(table, rank) for rank in range(table.ranks)]
    sent = {(p.rank, part.send.peer, part.send.tag) for p in programs for s in p.instructions for part in s.parts if part.send}
    received = []
    for program in programs:
        posted: set[int] = set()
        for step in program.instructions:
            posted |= {transfer.tag for transfer in step.posts}
            for part in step.parts:
                if part.receive is not None:
                    assert part.receive.tag in posted, f"{part.single} waits for a receive that was never posted"
                    received.append((part.receive.peer, program.rank, part.receive.tag))
    assert len(received) == len(set(received))
    assert set(received) == sent


@given(any_table)
def test_what_was_sent_is_let_go_after_it_was_sent_and_few_are_kept(table: ScheduleTable) -> None:
    from counterflow.runtime.lowering import lower

    for rank in range(table.ranks):
        kept: set[int] = set()
        most = 0
        for step in lower(table, rank).instructions:
            for part in step.parts:
                assert kept.issuperset(part.delivered), f"rank {rank}, {part.single}: lets go of what it has not sent"
                kept -= set(part.delivered)
                if part.send is not None:
                    kept.add(part.send.tag)
                most = max(most, len(kept))
        live = max(len([s for s in row if s.kind in "F&B"]) for row in table.actions)
        # GPipe sends all its forwards before the first backward tells of any; others know after a few.
        assert most <= (live if table.name == "gpipe" else 4 * table.ranks + 4), f"{table.name}: {most} sends kept on rank {rank}"


@given(any_table)
def test_no_receive_is_posted_before_its_sender_can_do_without_this_rank(table: ScheduleTable) -> None:
    """On a GPU a receive is a kernel that waits; the host may have to wait for it inside any later action."""
    from counterflow.runtime.lowering import lower
    from counterflow.schedule.dependencies import find_input, find_result

    row_of = {find_result(single): rank for rank in range(table.ranks) for single in table.singles(rank)}
    for rank in range(table.ranks):
        for position, step in enumerate(lower(table, rank).instructions):
            for transfer in step.posts:
                # Run all that needs nothing of this rank from this position on: the message has to come of it.
                made, places, moved = set(), [0] * table.ranks, True
                while moved:
                    moved = False
                    for row, actions in enumerate(table.actions):
                        while places[row] < (position if row == rank else len(actions)):
                            singles = list(actions[places[row]].singles())
                            needed = {find_input(one, table.layout.last_stage) for one in singles} - {None}
                            if not needed <= made | {find_result(one) for one in singles}:
                                break
                            made |= {find_result(one) for one in singles}
                            places[row], moved = places[row] + 1, True
                assert transfer.message in made, f"{transfer} is posted at {position}, and needs a later action of rank {rank}"
                assert row_of[transfer.message] == transfer.peer
