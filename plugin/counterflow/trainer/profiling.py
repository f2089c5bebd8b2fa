"""Profile some training steps of a pipeline, ``--cf-profile``: a trace per rank, with actions, phases and layers annotated.

On a GPU (untested there) the trace has the kernels too. On a CPU the annotations say what computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from counterflow.analysis.summary import summarize_file
from counterflow.devices import wait_for_device
from counterflow.errors import CounterflowError
from counterflow.options import Options
from counterflow.runtime.executor import Work
from counterflow.schedule.actions import PAIR, REDUCTION, Action
from counterflow.schedule.annotations import Annotation, name_phase
from counterflow.trainer.layer_notes import LayeredWork, LayerNotes


class StepProfiler:
    """Profiles the steps that the options name, on one rank of a pipeline."""

    def __init__(self, options: Options, pipeline_ranks: list[int], rank: int, *, is_cuda: bool) -> None:
        assert options.profile_steps is not None
        self._first, self._last = options.profile_steps
        self._pipeline, self._rank = pipeline_ranks[0], rank
        self._path = options.profile_folder / f"profile-rank{pipeline_ranks[rank]:05d}.json.gz"
        self._is_cuda = is_cuda
        self._step = 0
        self._profile: Any = None
        self._layers = LayerNotes()
        # What goes with each part of an overlapped pair.
        self.carried = self._layers.carried

    def begin(self, step: int, work: Work) -> bool:
        """Start where the first step does; tell whether this step is profiled. Layers are those that its work lists."""
        self._step = step
        if step == self._first and self._profile is None:
            self._profile = _make_profile(self._is_cuda)
            self._profile.start()
        if self._profile is not None and isinstance(work, LayeredWork):
            self._layers.attach(work.list_layers())
        return self._profile is not None

    def end(self, step: int) -> None:
        """Write the trace where the last step ends, and print on global rank 0 what its own says."""
        self._layers.detach()
        if self._profile is None or step < self._last:
            return
        if self._is_cuda:
            wait_for_device()
        finished, self._profile = self._profile, None
        finished.stop()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        finished.export_chrome_trace(str(self._path))
        if dist.get_rank() == 0:
            print(f"counterflow: profile: {_summarize(self._path)}", flush=True)

    @contextmanager
    def annotate(self, action: Action) -> Iterator[None]:
        """Annotate an action, and its phase where it is not a pair."""
        if action.kind == REDUCTION:
            yield
            return
        with record_function(str(Annotation(self._step, self._pipeline, self._rank, action))):
            if action.kind == PAIR:
                yield
            else:
                with self.annotate_part(action):
                    yield

    @contextmanager
    def annotate_part(self, single: Action) -> Iterator[None]:
        """Annotate the phase of one part of a pair."""
        with record_function(name_phase(single.kind, single.stage)):
            yield
            self._layers.close()


def _make_profile(is_cuda: bool) -> Any:
    from torch._C._profiler import _ExperimentalConfig

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    # The B of a pair, and autograd, have threads of their own.
    return profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))


def _summarize(path: Path) -> str:
    try:
        return f"{path}: {summarize_file(path)}"
    except CounterflowError as error:
        return f"{path} was written and cannot be analysed: {error}"
