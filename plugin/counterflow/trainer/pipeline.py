"""Run a trainer's steps under the schedule of its options: choose the table, connect the ranks, watch and record the run."""

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from counterflow.errors import OptionError
from counterflow.options import AUTO, Options
from counterflow.runtime.clocks import measure_offset
from counterflow.runtime.executor import Work, run_program
from counterflow.runtime.handover import Carried, HandOver
from counterflow.runtime.lowering import Program, lower
from counterflow.runtime.mailbox import Channels, Mailbox
from counterflow.runtime.messages import Announced, Form
from counterflow.runtime.recorder import Recorder, append_record, check_folder
from counterflow.runtime.watch import Watch, find_store
from counterflow.schedule import ScheduleTable, build_forward_only
from counterflow.trainer.auto import AutoTable
from counterflow.trainer.tables import build_table, choose_layout, count_replicas

if TYPE_CHECKING:
    from counterflow.trainer.profiling import StepProfiler

# Takes the global ranks of this replica's pipeline; returns those of the table, and this rank's place among them.
Link = Callable[[list[int]], tuple[list[int], int]]


def check_folders(options: Options) -> None:
    """Raise `OptionError` if a folder that the run will write to cannot be written to."""
    if options.record is not None:
        check_folder("--cf-record", options.record)
    if options.profile is not None:
        check_folder("--cf-profile", options.profile_folder)


class Pipeline:
    """One rank of a pipeline, with its channels and the programs of its tables.

    ``group`` is the trainer's pipeline group; each of its ranks holds ``chunks`` model chunks. ``link`` joins two replicas for
    tables that span both (full DualPipe); without it such tables are refused. ``carried`` is the trainer's global state that goes
    with each part of an overlapped pair. All ranks make the same calls.
    """

    def __init__(
        self,
        options: Options,
        group: dist.ProcessGroup,
        chunks: int,
        device: torch.device,
        link: Link | None = None,
        carried: Sequence[Carried] = (),
    ) -> None:
        self._options, self._group, self._chunks, self._device = options, group, chunks, device
        self._tables: dict[tuple[int, bool], ScheduleTable] = {}
        self._programs: dict[tuple[int, bool], Program] = {}
        self._announced: dict[tuple[int, bool], Announced] = {}
        # By default a new group waits for half an hour; these have the timeout of the trainer's own.
        timeout = group._get_backend(device).options._timeout
        if options.stall_limit is not None:
            timeout = timedelta(seconds=options.stall_limit)
        ranks, rank = dist.get_process_group_ranks(group), group.rank()
        self.is_linked = count_replicas(choose_layout(options, len(ranks), chunks)) > 1
        if self.is_linked:
            if link is None:
                raise OptionError(f"schedule {options.schedule} joins two replicas, which this trainer does not: take another")
            ranks, rank = link(ranks)
        self.rank, self.timeout = rank, timeout
        self._channels = Channels(ranks, rank, timeout)
        self._watch = Watch(find_store(), ranks, rank, timeout.total_seconds())
        self._offset = measure_offset() if options.record is not None else 0.0
        self._profiler: StepProfiler | None = None
        if options.profile is not None:
            from counterflow.trainer import profiling  # loads the analyser

            self._profiler = profiling.StepProfiler(options, ranks, rank, is_cuda=device.type == "cuda")
            carried = [*carried, self._profiler.carried]
        self._handover = HandOver(carried) if options.overlap else None
        self._are_counts_told = False
        self._auto: AutoTable | None = None
        if options.schedule == AUTO:
            self._auto = AutoTable(
                group,
                device,
                has_pairs=options.overlap,
                splits=options.zero_bubble is not False,
                costs=options.file_costs,
            )

    def choose_table(
        self, microbatches: int, step: int, *, forward_only: bool = False, group: int | None = None
    ) -> ScheduleTable:
        """Return the table of a step with ``microbatches`` per replica.

        ``step`` is its number, from 1; ``group`` is the number of micro-batches that the interleaved family takes together.
        """
        if self._auto is not None and not forward_only:
            return self._auto.choose(microbatches, step)
        key, ranks = (microbatches, forward_only), self._group.size()
        if key not in self._tables and forward_only:
            layout = choose_layout(self._options, ranks, self._chunks)
            self._tables[key] = build_forward_only(layout, count_replicas(layout) * microbatches)
        elif key not in self._tables:
            self._tables[key] = build_table(self._options, ranks, microbatches, self._chunks, group)
        return self._tables[key]

    def prepare(self, table: ScheduleTable, form: Form | None, *, forward_only: bool = False) -> Program:
        """Return this rank's program; before a table's first run all ranks compare their tables, and connect."""
        key = table.digest, forward_only
        if key not in self._programs:
            self._programs[key] = lower(table, self.rank)
            self._channels.connect(self._programs[key], form, self._device)
        return self._programs[key]

    def run_announced(self, work: Work, microbatches: int, step: int, remedy: str | None, *, forward_only: bool = False) -> None:
        """Run a step whose stages hand on any tensors: each message brings its form, or with ``remedy`` those of a first run do.

        ``remedy`` says how a user allows that forms change.
        """
        table = self.choose_table(microbatches, step, forward_only=forward_only)
        program, form = self.prepare(table, None, forward_only=forward_only), None
        if remedy is not None:
            form = self._announced.setdefault((table.digest, forward_only), Announced(remedy))
        (self.evaluate if forward_only else self.train)(program, work, form, step)

    def forget_forms(self) -> None:
        """Let the next run of each table bring its forms anew."""
        self._announced.clear()

    def evaluate(self, program: Program, work: Work, form: Form | Announced | None, step: int) -> None:
        """Run a program of forwards alone, after training step ``step``."""
        self._watch.begin(step, is_evaluation=True)
        run_program(program, work, Mailbox(self._channels, form, self._device), watch=self._watch)

    def train(self, program: Program, work: Work, form: Form | Announced | None, step: int) -> None:
        """Run the program of training step ``step``; record it if the options ask for it or ``auto`` measures."""
        self._watch.begin(step)
        is_measured = self._auto is not None and self._auto.is_measuring
        is_recorded = is_measured or self._options.record is not None
        recorder = Recorder(self.rank, self._device.type == "cuda", self._offset) if is_recorded else None
        mailbox = Mailbox(self._channels, form, self._device)
        profiler = self._profiler
        notes = profiler if profiler is not None and profiler.begin(step, work) else None
        run_program(
            program, work, mailbox, recorder=recorder, watch=self._watch, handover=self._handover, annotations=notes
        )  # fmt: skip
        if profiler is not None:
            profiler.end(step)
        if self._handover is not None and not self._are_counts_told:
            self._are_counts_told = True
            self._tell_counts(self._handover)
        communications = recorder.take_communications() if recorder is not None else []
        turns = recorder.take_turns() if recorder is not None else []
        spans = recorder.take_spans() if recorder is not None else []
        if self._auto is not None and is_measured:
            self._auto.note(spans)
        if self._options.record is not None:
            name, ranks = program.table.name, self._channels.pipeline_ranks
            append_record(self._options.record, ranks, self.rank, step, name, spans, communications, turns)

    def _tell_counts(self, handover: HandOver) -> None:
        """Say in the log of global rank 0 how many communications the chunks of its pipeline have, as the first step had them."""
        store = dist.distributed_c10d.PrefixStore("counterflow/communications", find_store())
        ranks = self._channels.pipeline_ranks
        store.set(str(ranks[self.rank]), json.dumps(handover.list_counts()))
        if dist.get_rank() == 0:
            counts = sorted({tuple(one) for rank in ranks for one in json.loads(store.get(str(rank)))})
            print(describe_counts(counts), flush=True)


def describe_counts(counts: list[tuple[int, int, int]]) -> str:
    """Return a line for the log: of each stage, the communications of its F and of its B (or I)."""
    if not any(forward or backward for _, forward, backward in counts):
        return (
            "counterflow: overlapped pairs: no stage has a communication to overlap (no experts, or none on other ranks): the "
            "parts of a pair run one after the other"
        )
    found = ", ".join(f"stage {stage} {forward} and {backward}" for stage, forward, backward in counts)
    return f"counterflow: overlapped pairs: communications of a chunk's F and B: {found}"
