"""``counterflow balance`` as a user types it: what it prints, what it writes, and one line for bad input."""

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from counterflow.arrays import Array
from counterflow.balance.cluster import make_cluster
from counterflow.balance.files.recorded import read_record
from counterflow.balance.placement import Placement, measure_balancedness, share_evenly, sum_by_rank
from counterflow.balance.planning import POLICIES, Plan
from counterflow.balance.replay import Replay
from counterflow.commands.balance import describe_plan, describe_replay
from tests.support.made_record import make_record
from tests.support.running import check_refusal

Command = Callable[..., str]


@pytest.fixture
def loads(tmp_path: Path) -> Path:
    """Three layers of sixteen experts, skewed."""
    np.save(tmp_path / "loads.npy", np.random.default_rng(0).lognormal(0, 1, (3, 16)))
    return tmp_path / "loads.npy"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Twelve micro-batches of two layers of eight experts."""
    np.savez(tmp_path / "trace.npz", counts=np.random.default_rng(0).integers(0, 100, (12, 2, 8)), topk=2)
    return tmp_path / "trace.npz"


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """What two pipeline ranks recorded of 20 steps: three layers of sixteen experts on four ranks."""
    make_record(tmp_path / "record", {0: [2, 9], 4: [5]}, range(1, 21))
    return tmp_path / "record"


PLAN = "--slots 24 --ranks 4".split()
REPLAY = "--ranks 4 --clones-per-rank 1 --interval 2 --warmup 4".split()


def measure(experts: Any, loads: Array, ranks: int) -> list[float]:
    """Balancedness of ``[layers][slots]`` with even shares."""
    placement = Placement(make_cluster(ranks, len(experts[0])), np.array(experts))
    return list(measure_balancedness(sum_by_rank(share_evenly(loads, placement), placement.cluster)))


def test_plan_prints_what_it_writes(loads: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "placement.json"
    figures = json.loads(command("balance plan", loads, *PLAN, "--json", "--out", out))
    written = json.loads(out.read_text())
    assert written["cluster"] == {"slots_per_rank": [6] * 4, "node_of_rank": [0] * 4}
    after = measure(written["experts"], np.load(loads), 4)
    assert after == pytest.approx(written["balancedness"])
    assert after == pytest.approx([row["after"] for row in figures["layers"]])
    before = np.load(loads).reshape(3, 4, 4).sum(2)
    assert [row["before"] for row in figures["layers"]] == pytest.approx(before.mean(1) / before.max(1))
    assert written["bound"] == pytest.approx([row["bound"] for row in figures["layers"]])
    assert all(row["after"] * (1 + row["gap"]) == pytest.approx(row["bound"]) for row in figures["layers"])
    assert figures["mean"]["after"] == pytest.approx(np.mean(after)) and figures["worst"]["after"] == min(after)
    assert figures["mean"]["after"] > figures["mean"]["before"]
    assert "off_node" not in figures["mean"]


def test_plan_writes_arrays_and_prints_a_table(loads: Path, tmp_path: Path, command: Command) -> None:
    out = tmp_path / "placement.npz"
    text = command("balance plan", loads, *PLAN, *"--nodes 2 --groups 2 --traffic-weight 0.5 --out".split(), out)
    arrays = np.load(out)
    assert list(arrays["node_of_rank"]) == [0, 0, 1, 1] and list(arrays["slots_per_rank"]) == [6] * 4
    assert measure(arrays["experts"], np.load(loads), 4) == pytest.approx(list(arrays["balancedness"]))
    assert "3 layers, 16 experts, 24 slots, 4 ranks, 2 nodes" in text and str(out) in text
    assert "off node" in text and "layer 2" in text and f"{arrays['balancedness'][2]:.4f}" in text


def test_plan_prints_the_worst_of_many_layers(tmp_path: Path, command: Command) -> None:
    values = np.ones((20, 8))
    values[7, 3] = 1000
    np.save(tmp_path / "loads.npy", values)
    lines = command("balance plan --slots 8 --ranks 4", tmp_path / "loads.npy").splitlines()
    assert "the 5 least balanced layers" in lines[1]
    assert lines[3].startswith("layer 7 ") and sum(line.startswith("layer ") for line in lines) == 5


def test_plan_writes_what_servers_read(loads: Path, tmp_path: Path, command: Command) -> None:
    own, sglang, vllm = (tmp_path / f"{name}.json" for name in ("own", "sglang", "vllm"))
    command("balance plan", loads, *PLAN, "--out", own)
    said = command("balance plan --format sglang --first-layer 2", loads, *PLAN, "--out", sglang)
    assert f"--init-expert-location {sglang} --ep-num-redundant-experts 8 --ep-size 4" in said
    assert '"expert_map_path"' in command("balance plan --format vllm", loads, *PLAN, "--out", vllm)
    experts = json.loads(own.read_text())["experts"]
    assert json.loads(sglang.read_text())["physical_to_logical_map"][2:] == experts
    devices = json.loads(vllm.read_text())["layer_list"][1]["device_list"]
    assert [device["device_expert"] for device in devices] == np.reshape(experts[1], (4, 6)).tolist()


def test_figures_of_a_plan_by_hand() -> None:
    # Rank 0 holds experts 0 and 1, rank 1 holds 0 and 2; each copy of expert 0 takes half of its load.
    placement = Placement(make_cluster(2, 4, nodes=2), np.array([[0, 1, 0, 2]]))
    plan = Plan(placement, np.array([[8.0, 4.0]]), np.array([6.0]), np.array([3.0]))
    figures = describe_plan(plan, np.array([[6.0, 5.0, 1.0]]))
    wanted = {"before": 6 / 11, "after": 0.75, "bound": 1.0, "gap": 1 / 3, "replicated": 1, "most_copies": 2, "off_node": 0.25}
    assert figures["layers"] == [pytest.approx(wanted)]
    assert (figures["experts"], figures["slots"], figures["ranks"], figures["nodes"]) == (3, 4, 2, 2)


def test_replay_prints_figures_for_each_method(trace: Path, command: Command) -> None:
    figures = json.loads(command("balance replay", trace, *REPLAY, "--json"))
    assert list(figures) == ["fixed", "eplb", "counterflow", "oracle"]
    homes = np.load(trace)["counts"][4:].reshape(8, 2, 4, 2).sum(3)
    scores = homes.mean(2) / homes.max(2)
    wanted = {"mean": scores.mean(), "p5": np.percentile(scores, 5), "worst": scores.min(), "max_over_mean": (1 / scores).mean()}
    # Every micro-batch has as much to do, or nearly: its time is what its slowest rank has.
    ideal = homes.mean(2).sum() / homes.max(2).sum()
    assert figures["fixed"] == pytest.approx(wanted | {"force_balanced": ideal})
    assert figures["counterflow"]["plan"] == "predicted" and figures["counterflow"]["moves"] > 0


def test_replay_prints_a_table_and_draws(trace: Path, tmp_path: Path, command: Command) -> None:
    html, svg = tmp_path / "replay.html", tmp_path / "replay.svg"
    text = command("balance replay --nodes 2", trace, *REPLAY, "--html", html, "--svg", svg)
    assert "micro-batches 4 to 11, 2 layers, 4 ranks, 12 slots, 2 nodes" in text
    assert all(word in text for word in ("fixed", "eplb", "counterflow", "oracle", "p5", "worst", "moves"))
    assert html.read_text().lstrip().startswith("<!DOCTYPE html>")
    assert ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_replay_of_an_automatic_plan_says_what_each_tier_sent(trace: Path, command: Command) -> None:
    costs = "--expert-megabytes 0.001 --token-time 5 --node-speed 50 --network-speed 5 --clone-time 0 --exposed 0.5".split()
    figures = json.loads(command("balance replay --nodes 2 --plan auto --step 2", trace, *REPLAY, *costs, "--json"))
    ours = figures["counterflow"]
    assert ours["plan"] == "auto" and ours["mean"] > figures["fixed"]["mean"]
    tiers = ours["tiers"]
    units = {"resident": 3, "just_in_time": 4, "homes": 7}
    for tier, row in tiers.items():
        assert (row["near_bytes"], row["far_bytes"]) == pytest.approx(
            (1000 * units[tier] * row["near"], 1000 * units[tier] * row["far"])
        )
    assert (
        ours["bytes"] == pytest.approx(sum(row["near_bytes"] + row["far_bytes"] for row in tiers.values())) and ours["bytes"] > 0
    )
    assert figures["fixed"]["force_balanced"] < ours["force_balanced"] <= 1
    text = command("balance replay --nodes 2 --plan exact --rehome never --shared-slots 2", trace, *REPLAY)
    assert all(words in text for words in ("plan exact", "just-in-time", "resident", "homes", "force balanced", "max/mean"))


def test_replay_takes_half_of_a_short_trace_as_its_past_and_an_interval_beyond_it(trace: Path, command: Command) -> None:
    text = command("balance replay --ranks 4 --clones-per-rank 1", trace, "--interval", 10**400)
    assert "micro-batches 6 to 11" in text


def test_a_recorded_run_is_replayed(record: Path, tmp_path: Path, command: Command) -> None:
    text = command("balance replay", record, *REPLAY, "--json")
    np.save(tmp_path / "trace.npy", read_record(record).counts)
    assert text == command("balance replay", tmp_path / "trace.npy", *REPLAY, "--json")
    assert json.loads(text)["counterflow"]["mean"] > json.loads(text)["fixed"]["mean"]


def test_show_prints_figures(record: Path, command: Command) -> None:
    read = read_record(record)
    figures = json.loads(command("balance show", record, "--json"))
    sizes = ("steps", "first_step", "last_step", "microbatches", "experts", "slots", "ranks")
    assert [figures[name] for name in sizes] == [20, 1, 20, 40, 16, 20, 4]
    assert [row["layer"] for row in figures["layers"]] == [2, 5, 9]
    assert [row["before"] for row in figures["layers"]] == pytest.approx(read.before.mean(0))
    assert [row["worst_after"] for row in figures["layers"]] == pytest.approx(read.after.min(0))
    assert figures["mean"]["after"] == pytest.approx(read.after.mean()) and figures["worst"]["before"] == read.before.min()
    sent = read.figures["bytes"]
    assert figures["per_step"]["bytes"] == {"mean": sent.mean(), "most": sent.max(), "sum": sent.sum()}


def test_show_prints_tables_and_draws(record: Path, tmp_path: Path, command: Command) -> None:
    html, svg = tmp_path / "show.html", tmp_path / "show.svg"
    text = command("balance show", record, "--html", html, "--svg", svg)
    assert text.startswith("steps 1 to 20 · 40 micro-batches · 3 layers · 16 experts · 20 slots on 4 ranks; balancedness")
    after = read_record(record).after
    lines = [line.split() for line in text.splitlines()]
    assert f"{after[:, 1].mean():.4f}" in next(line for line in lines if line[:2] == ["layer", "5"])
    assert f"{after.min():.4f}" in next(line for line in lines if line[:2] == ["all", "layers"])
    assert all(words in text for words in ("clones sent", "of them new experts", "received, MB", "compute waited, ms"))
    assert "<h1>record</h1>" in html.read_text() and ElementTree.parse(svg).getroot().tag.endswith("svg")


def test_show_prints_the_worst_of_many_layers(tmp_path: Path, command: Command) -> None:
    make_record(tmp_path, {0: list(range(30, 50))}, range(2), experts=8)
    lines = command("balance show", tmp_path).splitlines()
    assert lines[1] == "the 5 layers of 20 that are least balanced on homes alone:"
    worst = 30 + int(read_record(tmp_path).before.mean(0).argmin())
    assert lines[3].startswith(f"layer {worst} ") and sum(line.startswith("layer ") for line in lines) == 5


def test_replay_counts_moves() -> None:
    scores = {name: np.linspace(0.5, 1, 101)[:, None] for name in ("fixed", "eplb", "counterflow", "oracle")}
    tokens = np.ones((101, 1, 2), np.int64)
    moves = np.zeros((101, 1), np.int64)
    moves[3], moves[70] = 4, 2
    figures = describe_replay(Replay(make_cluster(2, 4, 2), 50, scores, tokens, tokens, moves, moves // 2))
    wanted = {"mean": 0.75, "p5": 0.525, "worst": 0.5, "max_over_mean": (1 / scores["fixed"]).mean()}
    assert figures["oracle"] == pytest.approx(wanted)
    assert figures["counterflow"] == pytest.approx(wanted | {"moves": 6, "off_node_moves": 3})


def test_layers_without_load_are_planned_and_replayed(tmp_path: Path, command: Command) -> None:
    counts = np.random.default_rng(0).integers(1, 100, (12, 2, 8)) * [[[0], [1]]]
    for name, array in (("zero", counts[0, :1]), ("some", counts[0]), ("trace", counts), ("still", counts * 0)):
        np.save(tmp_path / f"{name}.npy", array)
    for policy in POLICIES:
        for name in ("zero", "some", "still"):
            sizes = f"--slots 12 --ranks 4 --nodes 2 --groups 2 --policy {policy} --json"
            out = command(f"balance plan {sizes}", tmp_path / f"{name}.npy")
            layer = json.loads(out, parse_constant=pytest.fail)["layers"][0]
            assert (layer["after"], layer["bound"], layer["gap"], layer["off_node"]) == (1, 1, 0, 0)
    for name in ("trace", "still"):
        out = command("balance replay --ranks 4 --json", tmp_path / f"{name}.npy")
        assert json.loads(out, parse_constant=pytest.fail)["counterflow"]["mean"] <= 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("plan {none}.npy --slots 8 --ranks 2", "{none}.npy: there is no such file"),
        ("plan {cut}.npz --slots 8 --ranks 2", "{cut}.npz: cannot be read as .npz"),
        ("plan {good}.csv --slots 2 --ranks 2", "2 slots"),
        ("plan {good}.csv --slots 9 --ranks 2", "9 slots on 2 ranks"),
        ("plan {good}.csv --slots 8 --ranks 0", "--ranks 0 given; allowed: a whole number from 1 to 1048576"),
        ("plan {good}.csv --slots 8 --ranks 4 --nodes 3", "4 ranks on 3 nodes"),
        ("plan {good}.csv --slots 8 --ranks 2 --groups 4", "4 groups"),
        ("plan {good}.csv --slots 8 --ranks 2 --groups 0", "--groups 0 given; allowed: a whole number from 1"),
        ("plan {good}.csv --slots 8 --ranks 2 --policy best", "best"),
        ("plan {good}.csv --slots 8 --ranks 2 --traffic-weight nan", "nan"),
        ("plan {good}.csv --slots 8 --ranks 2 --traffic-weight -1", "-1"),
        ("plan {good}.csv --slots 8 --ranks 2 --format vllm", "--format vllm given without a file to write"),
        ("plan {good}.csv --slots 8 --ranks 2 --out x.json --first-layer 3", "--first-layer 3 is of --format sglang"),
        ("plan {good}.csv --slots 8 --ranks 2 --out x.pt --format sglang", "allowed: a name that ends in .json"),
        ("plan {good}.csv --slots 8 --ranks 2 --out x.txt", "allowed: a name that ends in .json or .npz"),
        ("plan {good}.csv --slots 8 --ranks 2 --out nowhere/x.json", "there is no folder nowhere"),
        ("plan {good}.csv --slots 8 --ranks 2 --out /proc/x.json", "--out /proc/x.json cannot be written"),
        ("plan {good}.csv --slots 8 --ranks 2 --out {good}.json --format sglang --first-layer -1", "--first-layer -1 given"),
        ("replay {trace}.npz --ranks 2 --clones-per-rank 1 --interval 1 --key tokens", "no array tokens; it has counts, topk"),
        ("replay {cut}.npz --ranks 2 --clones-per-rank 1 --interval 1", "{cut}.npz: cannot be read as .npz"),
        ("replay {trace}.npz --ranks 3 --clones-per-rank 1 --interval 1 --warmup 2", "8 experts on 3 ranks"),
        ("plan {good}.csv --slots 1000000000000 --ranks 1000000000000", "--slots 1000000000000 given; allowed: a whole number"),
        ("plan {good}.csv --slots x --ranks 2", "--slots x given; allowed: a whole number from 1 to 1048576"),
        ("plan {good}.csv --slots 8 --ranks 2 --traffic-weight 1e300", "--traffic-weight 1e+300 given; allowed: a finite number"),
        ("replay {trace}.npz --ranks 2 --clones-per-rank -1 --interval 1 --warmup 2", "--clones-per-rank -1 given"),
        ("replay {trace}.npz --ranks 2 --clones-per-rank 9 --interval 1 --warmup 2", "9 clones per rank; allowed: 0 to 8"),
        (
            "replay {trace}.npz --ranks 2 --clones-per-rank 5 --interval 1 --warmup 2",
            "5 clones per rank; allowed: 0 to 4, the experts",
        ),
        ("replay {short}.npy --ranks 2 --clones-per-rank 1 --interval 1", "a trace of 1 micro-batches; allowed: 2 or more"),
        (
            "replay {trace}.npz --ranks 2 --clones-per-rank 1 --interval 0 --warmup 2",
            "--interval 0 given; allowed: a whole number from 1 up",
        ),
        ("replay {trace}.npz --ranks 2 --clones-per-rank 1 --interval 1 --warmup 12", "12"),
        ("replay {trace}.npz --ranks 2 --clones-per-rank 1 --interval 1 --warmup 2 --nodes 4", "2 ranks on 4 nodes"),
        ("replay {trace}.npz --ranks 2 --clones-per-rank 1 --interval 1 --svg nowhere/x.svg", "there is no folder nowhere"),
        ("replay {trace}.npz --ranks 2 --plan best", "invalid choice: 'best' (choose from"),
        ("replay {trace}.npz --ranks 2 --plan auto --node-speed 0", "--node-speed 0.0 given; allowed: a finite number"),
        ("replay {trace}.npz --ranks 2 --plan auto --network-speed nan", "--network-speed nan given; allowed: a finite number"),
        ("replay {trace}.npz --ranks 2 --plan auto --exposed 2", "--exposed 2.0 given; allowed: a finite number from 0 to 1"),
        (
            "replay {trace}.npz --ranks 2 --plan auto --network-speed 0",
            "--network-speed 0.0 given; allowed: a finite",
        ),
        (
            "replay {trace}.npz --ranks 2 --shared-slots 2",
            "--shared-slots 2 is for just-in-time clones, which",
        ),
        ("replay {trace}.npz --ranks 2 --plan auto --step 0", "--step 0 given; allowed: a whole number from 1 up"),
        ("replay {trace}.npz --ranks 2 --shared-slots -1", "--shared-slots -1 given; allowed: a whole number from 0"),
        ("replay {large}.npy --ranks 2 --plan exact", "tokens in a layer; allowed: 1.1259e+15 at most"),
        ("replay {empty} --ranks 2", "{empty} has 0 files eplb-rank*.jsonl; allowed: 1 to 4096"),
        ("show {none}", "{none} has 0 files eplb-rank*.jsonl"),
        ("show {trace}.npz", "{trace}.npz has 0 files eplb-rank*.jsonl"),
        ("show {empty} --html nowhere/x.html", "there is no folder nowhere"),
    ],
)
def test_bad_input_gets_one_line(argv: str, said: str, tmp_path: Path, trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "good.csv").write_text("1,2,3,4,5,6")
    (tmp_path / "cut.npz").write_bytes(trace.read_bytes()[:-50])
    np.save(tmp_path / "short.npy", np.ones((1, 1, 8), np.int64))
    np.save(tmp_path / "large.npy", np.full((4, 1, 2048), 2**40))
    (tmp_path / "empty").mkdir()
    names = {name: str(tmp_path / name) for name in ("none", "cut", "good", "trace", "short", "large", "empty")}
    check_refusal(["balance", *[part.format(**names) for part in argv.split()]], said.format(**names), capsys)


@pytest.mark.parametrize(
    "argv", [["--help"], ["plan", "--help"], ["replay", "--help"], ["workload", "--help"], ["show", "--help"]]
)
def test_help_is_there(argv: list[str], command: Command) -> None:
    out = command("balance", *argv)
    assert "usage: counterflow balance" in out
    assert "plan" not in argv or all(policy in out for policy in POLICIES)
