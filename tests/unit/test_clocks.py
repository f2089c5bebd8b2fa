"""Records of several hosts come onto one clock."""

import random

import pytest

from counterflow.runtime.clocks import READINGS, find_offset
from counterflow.runtime.recorder import Recorder
from counterflow.schedule.actions import Action

OFFSETS = {"a": 0.0, "b": 5000.25, "c": -17.5}


@pytest.mark.parametrize("seed", range(3))
def test_the_offset_of_a_host_is_found_within_the_time_of_a_barrier(seed: int) -> None:
    draw, hosts = random.Random(seed), ["a", "b", "a", "c", "b", "c"]
    # Ranks leave a barrier up to 0.1 ms apart; one in ten is held up.
    rounds = [100.0 + 0.01 * number for number in range(READINGS)]
    late = [[draw.random() * 1e-4 + (draw.random() < 0.1) * 0.05 for _ in rounds] for _ in hosts]
    readings = [
        [at + OFFSETS[host] + one for at, one in zip(rounds, held, strict=True)] for host, held in zip(hosts, late, strict=True)
    ]
    found = [find_offset(hosts, readings, rank) for rank in range(len(hosts))]
    assert found[0] == found[2] == 0.0, "ranks on the first rank's host have its clock"
    assert found[1] == found[4] and found[3] == found[5], "ranks on one host have one clock"
    assert found == [pytest.approx(-OFFSETS[host], abs=2e-3) for host in hosts]


def test_what_is_recorded_is_of_the_common_clock() -> None:
    spans = []
    for offset in (0.0, 1000.0):
        recorder = Recorder(0, False, offset)
        recorder.start(Action("F", 0, 0))
        recorder.begin_compute()
        recorder.stop()
        spans += recorder.take_spans()
    assert spans[1].start - spans[0].start == pytest.approx(1000.0, abs=1.0)
    assert 0 <= spans[1].end - spans[1].start < 1
