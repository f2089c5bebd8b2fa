"""A stage without layers, as an empty segment of HybridModel's pattern has it, hands on what it received."""

from pathlib import Path

from hybrid_cases import GPT_ALONE, MADE_OF_LAYERS, PATTERN, SCRIPT
from tests.support.comparing import assert_same_steps
from tests.support.run_cases import Runs
from tests.support.training import TWO_STAGES, Cases, drop_flags, list_base_flags


def test_a_v_whose_turn_begins_with_an_empty_stage_trains_like_megatron(text: Path, tmp_path: Path) -> None:
    base = drop_flags([*list_base_flags(text, tmp_path), *MADE_OF_LAYERS, *TWO_STAGES], *GPT_ALONE)
    cases = Cases(tmp_path, base, 2)
    whole = [PATTERN, "*E*|E*E"]
    cases.add("initial", whole, plugin=False, steps=1, save=1, script=SCRIPT)
    start = cases.start_from("initial")
    cases.add("megatron", start, whole, plugin=False, script=SCRIPT)
    cases.add("empty", start, [PATTERN, "*E|*E||*E", "--cf-schedule", "dualpipev", "--cf-overlap"], script=SCRIPT)
    runs = Runs("worker", cases, tmp_path)
    assert_same_steps(runs["empty"], runs["megatron"])
