"""``--cf-profile`` beside Megatron's own profiler."""

import pytest

from counterflow.errors import OptionError
from counterflow.megatron.checks import prepare_arguments
from counterflow.options import Options
from tests.megatron.test_checks import make_arguments


def test_two_torch_profilers_are_refused_and_ranges_for_nsys_are_not() -> None:
    options = Options(schedule="1f1b", profile="3:4")
    with pytest.raises(OptionError, match="--cf-profile 3:4 and --profile --use-pytorch-profiler are both given"):
        prepare_arguments(make_arguments(profile=True, use_pytorch_profiler=True), options)
    for given in ({"profile": True, "use_pytorch_profiler": False}, {"profile": False, "use_pytorch_profiler": True}):
        prepare_arguments(make_arguments(**given), options)
    prepare_arguments(make_arguments(profile=True, use_pytorch_profiler=True), Options(schedule="1f1b"))
