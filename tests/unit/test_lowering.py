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
