"""What the planner reads and writes for Megatron is what Megatron reads."""

import pytest

from counterflow.planner.layouts import parse_layout


@pytest.mark.parametrize("text", ["Et|(tt|)*30mL", "Et*3|(tt|)*6tmL", "E,t*4|(t*4|)*2,tL", "Ett|m|L"])
def test_a_layout_string_is_read_as_megatron_reads_it(text: str) -> None:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    upstream = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_layout(text) == ["".join(letters[one.name] for one in stage) for stage in upstream]
