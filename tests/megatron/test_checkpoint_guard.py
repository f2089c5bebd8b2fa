"""What a checkpoint says of the layout it was saved under, and what is refused or said as the next run reads it."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from counterflow.errors import CounterflowError, OptionError
from counterflow.megatron.checkpoint import guard_checkpoint, refuse_batches_ahead
from counterflow.megatron.checks import prepare_arguments
from counterflow.megatron.stamp import name_layout
from counterflow.options import Options
from counterflow.schedule import ScheduleTable, add_reductions, build, to_csv
from counterflow.trainer.tables import build_table, choose_layout

TABLES = {
    "v": build("dualpipev", 2, 8),
    "looped": build("interleaved", 2, 8, vpp=2),
    "straight": build("1f1b", 2, 8),
    "bidirectional": build("dualpipe", 4, 16),
}
LAYOUTS = {"v": "v 2", "looped": "looped 2", "straight": "straight 1", "bidirectional": "v 2"}
CHUNKS = {"v": 2, "looped": 2, "straight": None, "bidirectional": 2}


def parse(chunks: int | None = 2, **given: Any) -> Namespace:
    """Return arguments as Megatron parses them, of two replicas of two pipeline ranks."""
    sizes = {"world_size": 4, "pipeline_model_parallel_size": 2, "micro_batch_size": 1, "global_batch_size": 16, "num_layers": 16}
    return Namespace(**{**sizes, "num_virtual_stages_per_pipeline_rank": chunks, **given})


def start(schedule: str, chunks: int | None = 2, **given: Any) -> Namespace:
    """Return the arguments of a run under a schedule, as they are once Megatron has validated them."""
    args = parse(chunks, **given)
    options = Options(schedule=schedule)
    prepare_arguments(args, options)
    # What the seam adds, and what Megatron derives.
    for name, value in options.model_dump(mode="json").items():
        setattr(args, f"cf_{name}", value)
    args.virtual_pipeline_model_parallel_size = args.num_virtual_stages_per_pipeline_rank
    flat = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": False}
    for name, value in {**flat, "no_load_optim": None, "finetune": False, "rank": 0}.items():
        setattr(args, name, given.get(name, value))
    return args


def forget(args: Namespace) -> Namespace:
    """Return the arguments as they were saved before layouts were written down."""
    return Namespace(**{name: value for name, value in vars(args).items() if name not in ("cf_layout", "cf_table")})


def load(saved: Namespace, args: Namespace) -> None:
    look = guard_checkpoint(
        lambda load_dir, args, rank0=False: ({"args": saved}, "", False, None),
        Options.model_construct(schedule=args.cf_schedule, eplb=False),
    )
    look("runs/x", args, rank0=True)


def write(path: Path, table: ScheduleTable) -> str:
    path.write_text(to_csv(table))
    return str(path)


@pytest.mark.parametrize("before", TABLES)
@pytest.mark.parametrize("after", TABLES)
def test_the_layout_that_was_saved_counts_not_the_file(tmp_path: Path, before: str, after: str) -> None:
    path = tmp_path / "table.csv"
    saved = start(write(path, TABLES[before]), CHUNKS[before])
    now = start(write(path, TABLES[after]), CHUNKS[after])
    assert name_layout(saved) == LAYOUTS[before]
    if LAYOUTS[before] == LAYOUTS[after]:
        load(saved, now)
        return
    with pytest.raises(OptionError, match=f"saved under layout '{LAYOUTS[before]}' .* this run has '{LAYOUTS[after]}'"):
        load(saved, now)
    # The one that fits is taken although the file holds another.
    by_name = {"v": "dualpipev", "looped": "interleaved", "straight": "1f1b", "bidirectional": "dualpipe"}[before]
    load(saved, start(by_name, CHUNKS[before]))


def test_a_file_that_was_moved_is_no_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    saved = start(write(old, TABLES["v"]))
    old.rename(new)
    load(saved, start(str(new)))
    load(saved, start("zbv"))
    assert not capsys.readouterr().out


def test_another_table_of_the_same_layout_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.csv"
    saved = start(write(path, TABLES["v"]))
    load(saved, start(str(path)))
    assert not capsys.readouterr().out
    now = start(write(path, build("zbv", 2, 8)))
    load(saved, now)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"{path} has another table than the run that saved the checkpoint in runs/x" in said
    now.rank = 1
    load(saved, now)
    assert not capsys.readouterr().out


@pytest.mark.parametrize("given", [{"no_load_optim": True}, {"finetune": True}])
def test_weights_alone_fit_any_layout(given: dict[str, Any]) -> None:
    load(start("interleaved"), start("dualpipev", **given))


def test_an_old_checkpoint_of_a_file_is_known_by_its_chunks_or_guessed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.csv"
    straight, looped = start(write(path, TABLES["straight"]), None), start(write(path, TABLES["looped"]))
    four = start(write(path, build("interleaved", 2, 8, vpp=4)), 4)
    path.write_text(to_csv(TABLES["v"]))
    assert [name_layout(forget(one)) for one in (straight, four, looped)] == ["straight 1", "looped 4", None]
    load(forget(straight), start("1f1b", None))
    assert not capsys.readouterr().out
    load(forget(looped), start("dualpipev"))
    said = capsys.readouterr().out
    assert "does not say which layout its table" in said and "taken for the 'v 2' that the file holds today" in said
    with pytest.raises(OptionError, match="this run has 'looped 2'.*; the checkpoint in runs/x does not say which layout its"):
        load(forget(looped), start("interleaved"))
    path.unlink()
    with pytest.raises(OptionError, match="'looped 2' or 'v 2'.* there is no such table any more: put it back") as raised:
        load(forget(looped), start("interleaved"))
    assert "\n" not in str(raised.value)


def test_checkpoints_of_names_and_of_megatron_alone_need_no_stamp() -> None:
    load(forget(start("dualpipev")), start("zbv"))
    plain = Namespace(use_distributed_optimizer=True, virtual_pipeline_model_parallel_size=2)
    load(plain, start("interleaved"))
    with pytest.raises(OptionError, match="saved under layout 'looped 2'"):
        load(plain, start("dualpipev"))


def test_a_file_is_read_once_per_start(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    options = Options(schedule=write(path, TABLES["v"]))
    prepare_arguments(parse(), options)
    for change in (lambda: write(path, TABLES["looped"]), lambda: path.write_text("nothing"), path.unlink):
        change()
        assert build_table(options, 2, 8, 2) == add_reductions(TABLES["v"]) and choose_layout(options, 2, 2).name == "v"
    write(path, TABLES["looped"])
    assert choose_layout(Options(schedule=str(path)), 2, 2).name == "looped", "another start reads anew"


@pytest.mark.parametrize(
    ("consumed", "iteration", "is_refused"), [(0, 0, True), (64, 16, True), (400, 100, False), (400, 199, False)]
)
def test_a_run_that_goes_on_is_checked_for_the_batches_still_to_come(
    tmp_path: Path, consumed: int, iteration: int, is_refused: bool
) -> None:
    # 2 micro-batches of each replica are too few, 8 are not.
    sizes = {"global_batch_size": None, "step_batch_size_schedule": "0:4 400:16", "train_iters": 200}
    with pytest.raises(OptionError, match="2 micro-batches on 2 ranks given"):
        start("dualpipev", **sizes)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    args = start("dualpipev", load=str(tmp_path), **sizes)
    saved = Namespace(consumed_train_samples=consumed)
    state, options = {"args": saved, "iteration": iteration}, Options(schedule="dualpipev")
    if is_refused:
        with pytest.raises(CounterflowError, match="2 micro-batches on 2 ranks given"):
            refuse_batches_ahead(state, args, options)
    else:
        refuse_batches_ahead(state, args, options)
