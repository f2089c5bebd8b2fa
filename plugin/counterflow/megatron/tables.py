"""Which layout and table a ``--cf-schedule`` means for a run's sizes."""

from counterflow.config import AUTO, Options
from counterflow.errors import OptionError
from counterflow.schedule import ScheduleTable, build, lay_looped, lay_straight, lay_v, read_csv, validate
from counterflow.schedule.layouts import LOOPED, STRAIGHT, Layout, V


def choose_layout(options: Options, ranks: int, chunks: int) -> Layout:
    """Return the layout that the named schedule, or the file's table, runs on."""
    if options.schedule_file is not None:
        layout = read_csv(options.schedule_file).layout
        if layout.name not in (STRAIGHT, LOOPED, V):
            raise OptionError(
                f"--cf-schedule {options.schedule_file} is a table on the {layout.name} layout; this version builds Megatron "
                f"models on {STRAIGHT}, {LOOPED} and {V} layouts: give a table on one of them"
            )
        return layout
    if options.schedule in ("dualpipev", "zbv", AUTO):
        return lay_v(ranks)
    return lay_looped(ranks, chunks) if chunks > 1 else lay_straight(ranks)


def build_table(options: Options, ranks: int, microbatches: int, chunks: int, group: int | None = None) -> ScheduleTable:
    """Build and validate the training table for these sizes; a file's table must have them."""
    if options.schedule_file is not None:
        table = read_csv(options.schedule_file)
        given = (table.ranks, table.microbatches, table.layout.chunks)
        if given != (ranks, microbatches, chunks):
            raise OptionError(
                f"--cf-schedule {options.schedule_file} is a table for {given[0]} pipeline ranks, {given[1]} micro-batches "
                f"and {given[2]} chunks per rank; this run has {ranks}, {microbatches} and {chunks}"
            )
        _require_rising_forwards(table)
    else:
        sizes = {"vpp": chunks, "group": group} if options.schedule == "interleaved" else {}
        assert options.schedule is not None
        # What auto finds later has the sizes of what it runs first.
        name = "zbv" if options.schedule == AUTO else options.schedule
        table = build(name, ranks, microbatches, **{k: v for k, v in sizes.items() if v is not None})
    validate(table)
    return table


def _require_rising_forwards(table: ScheduleTable) -> None:
    # Each chunk draws micro-batches from its own data iterator, in order.
    for rank in range(table.ranks):
        reached: dict[int, int] = {}
        for single in table.singles(rank):
            if single.kind == "F" and single.microbatch != reached.setdefault(single.stage, 0):
                raise OptionError(
                    f"{table.name}: rank {rank}: {single} is out of order; each stage takes micro-batches 0, 1, 2, …"
                )
            if single.kind == "F":
                reached[single.stage] += 1
