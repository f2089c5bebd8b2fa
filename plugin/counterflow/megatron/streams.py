"""Several residual streams between stages: hyper-connections (mHC).

Megatron lays a micro-batch's streams side by side in one tensor: the first stage widens the embedding's output, the last one
adds the streams up. So a message between stages is one tensor, as many times wider.
"""

import warnings
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from counterflow.errors import OptionError

# By the argument that turns hyper-connections on: its flag, and the argument with the number of streams. Those of the dev branch
# are the second ones.
_STREAMS = {
    "enable_mhc_connections": ("--enable-mhc-connections", "mhc_num_residual_streams"),
    "enable_hyper_connections": ("--enable-hyper-connections", "num_residual_streams"),
}


def count_streams(config: Any) -> int:
    """Return how many residual streams a model has; the tensors between its stages are so many times as wide."""
    counts = [int(getattr(config, count)) for name, (_, count) in _STREAMS.items() if getattr(config, name, False)]
    return max(counts, default=1)


def check_streams(args: Any, schedule: str) -> None:
    """Refuse hyper-connections where this Megatron does not let them cross from stage to stage, with its reason."""
    for name, (flag, _) in _STREAMS.items():
        if getattr(args, name, None) and (obstacle := _find_obstacle(name)):
            raise OptionError(
                f"--cf-schedule {schedule} does not run with {flag}, as this Megatron-Core does not on several pipeline ranks "
                f"({obstacle}): drop one of the two"
            )


def _find_obstacle(name: str) -> str | None:
    """Return why this Megatron does not build a model with hyper-connections on several pipeline ranks; None if it does."""
    given = {name: True, "num_layers": 2, "hidden_size": 2, "num_attention_heads": 1}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TransformerConfig(**given, pipeline_model_parallel_size=2, pipeline_dtype=torch.float32)
    except Exception as error:
        return cut_error(error)
    return None


def cut_error(error: Exception) -> str:
    """Return the first sentence of an error."""
    return (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0].rstrip(".")
