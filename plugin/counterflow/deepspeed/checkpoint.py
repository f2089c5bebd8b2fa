"""The stamp of a pipeline's checkpoint, and its guard.

DeepSpeed saves weights by the layer, but optimizer states by the pipeline rank: read under another layout they would load without
an error and be wrong. So a checkpoint says by which cut its states were saved. Weights load under every layout; so do states in a
universal checkpoint, which has them by the name of the parameter, and names have the layer's number.
"""

import inspect
import re
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

import torch.distributed as dist

from counterflow.deepspeed.state import balancer_of, chunks_of
from counterflow.errors import OptionError
from counterflow.trainer.stamp import PLAIN, Cut, read_cut, write_cut

LATEST = "latest"
# Upstream's name (deepspeed.checkpoint.constants).
UNIVERSAL_CHECKPOINT_INFO = "universal_checkpoint_info"


def stamp_after(save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the engine's ``save_checkpoint``: beside the checkpoint's files stands which layers each pipeline rank held."""
    signature = inspect.signature(save_checkpoint)

    @wraps(save_checkpoint)
    def save(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        folder = Path(given["save_dir"]) / str(given.get("tag") or f"global_step{self.global_steps}")
        has_chunks = self.module in chunks_of
        if has_chunks and not hasattr(self.module, UNIVERSAL_CHECKPOINT_INFO):
            # Upstream saves it; otherwise a script has to give it.
            setattr(self.module, UNIVERSAL_CHECKPOINT_INFO, describe_for_conversion(self.module))
        with balancer_of[self].save(folder) if self in balancer_of else nullcontext():
            result = save_checkpoint(self, *args, **kwargs)
        if has_chunks and dist.get_rank() == 0:
            write_cut(folder, find_cut(self.module))
        return result

    return save


def guard(load_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the engine's ``load_checkpoint``: optimizer states that were saved under another layout are refused."""
    signature = inspect.signature(load_checkpoint)

    @wraps(load_checkpoint)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        has_states = given["load_optimizer_states"] and not given["load_module_only"]
        has_layers = hasattr(self.module, "num_pipeline_stages") and hasattr(self.module, "parts")
        if has_layers and has_states and not self.load_universal_checkpoint():
            require_same_cut(self.module, Path(given["load_dir"]), given["tag"])
        if self not in balancer_of:
            return load_checkpoint(self, *args, **kwargs)
        folder = Path(given["load_dir"])
        with balancer_of[self].load(folder / _find_tag(folder, given["tag"]), self.gradient_accumulation_steps()):
            return load_checkpoint(self, *args, **kwargs)

    return load


def find_cut(model: Any) -> Cut:
    """Return how a PipelineModule is cut."""
    chunks = chunks_of.get(model)
    layout = f"{chunks.layout.name} {chunks.layout.chunks}" if chunks is not None else PLAIN
    return Cut(layout, model.num_pipeline_stages(), [int(part) for part in model.parts])


def describe_for_conversion(model: Any) -> dict[str, Any]:
    """Return what ``ds_to_universal`` needs to know of a PipelineModule: which layers are on several pipeline ranks.

    It takes their states from pipeline rank 0, and those of others from every rank.
    """
    from deepspeed.checkpoint import constants

    owners: dict[str, set[int]] = {}
    for layer, spec in enumerate(model._layer_specs):
        if (key := getattr(spec, "key", None)) is not None:
            owners.setdefault(key, set()).add(model.stage_owner(layer))
    tied = [rf"tied_modules\.{re.escape(key)}\." for key, ranks in owners.items() if len(ranks) > 1 and 0 in ranks]
    return {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        constants.PIPELINE_REPLICATED_PARAMETER_PATTERNS: tied,
    }


def require_same_cut(model: Any, folder: Path, tag: str | None) -> None:
    """Raise `OptionError` if a checkpoint's optimizer states were saved under another layout than this model's."""
    mine = find_cut(model)
    # Plain DeepSpeed's has no stamp: one stage a rank, cut as this model was when it was made.
    theirs = read_cut(folder / _find_tag(folder, tag)) or mine._replace(layout=PLAIN)
    if mine != theirs:
        raise OptionError(
            f"the checkpoint in {folder} has optimizer states of a {theirs} and this run's model is a {mine}: load its weights "
            "alone (load_checkpoint(…, load_optimizer_states=False)), resume under a schedule of the same layout, or convert it "
            "(python -m deepspeed.checkpoint.ds_to_universal --input_folder FOLDER/TAG --output_folder FOLDER/TAG_universal, "
            'ZeRO-1) and load that ("checkpoint": {"load_universal": true})'
        )


def _find_tag(folder: Path, tag: str | None) -> str:
    """Return the tag of the checkpoint in ``folder`` that is loaded; "" where there is none."""
    latest = folder / LATEST
    if tag is None:
        return latest.read_text().strip() if latest.is_file() else ""
    return str(tag)
