"""In which order a rank runs what belongs to an action."""

from typing import Any

import pytest

from counterflow.runtime.executor import run_program
from counterflow.runtime.lowering import lower
from counterflow.schedule import build


class PostedError(Exception):
    """A receive was posted."""


class Notes:
    """Stands for a recorder and a mailbox: notes what is called, up to the first post."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def start(self, _: Any) -> None:
        self.calls.append("record")

    def post(self, _: Any) -> None:
        self.calls.append("post")
        raise PostedError


def test_a_recorder_starts_before_a_receive_is_posted() -> None:
    """It waits for the device once; a receive of DualPipe's first action waits for another rank's, which would wait as well."""
    program = lower(build("dualpipe", 2, 8), 0)
    assert program.instructions[0].posts, "this table posts a receive with its first action"
    notes: Any = Notes()
    with pytest.raises(PostedError):
        run_program(program, notes, notes, recorder=notes)
    assert notes.calls == ["record", "post"]
