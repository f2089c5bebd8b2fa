"""Build the model chunks and data sets of a V layout with Megatron's own builders."""

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.module import Float16Module

from counterflow.errors import OptionError
from counterflow.megatron.state import of_chunk
from counterflow.megatron.v_layout.embeddings import copy_embedding
from counterflow.megatron.v_layout.mirror import hold_mirrored_group, hold_mirrored_rank, mirror_collection, run_mirrored
from counterflow.options import Options
from counterflow.schedule.layouts import V
from counterflow.trainer.tables import choose_layout, name_model_layout

WAY_BACK = 1


def lay_out_as_v(build_chunk: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a builder of one model chunk: chunk 1 is built as on the mirrored pipeline rank.

    The keyword ``vp_stage`` tells ``build_chunk`` which chunk to build. The builder may take ``pre_process`` and
    ``post_process``, and process groups by keyword or as its first argument, since Megatron calls builders in both ways. It may
    also read all of these from ``parallel_state``.
    """
    built: list[Any] = []

    @wraps(build_chunk)
    def build(*args: Any, vp_stage: int | None = None, **kwargs: Any) -> Any:
        if vp_stage != WAY_BACK:
            built[:] = [build_chunk(*args, vp_stage=vp_stage, **kwargs)]
            return built[0]
        with hold_mirrored_rank():
            args, kwargs = _mirror_arguments(build_chunk, args, kwargs)
            with hold_mirrored_group():
                chunk = build_chunk(*args, vp_stage=vp_stage, **kwargs)
            _require_mirrored(chunk)
        chunk.sharded_state_dict = run_mirrored(chunk.sharded_state_dict)
        of_chunk(chunk).is_on_way_back = True
        copy_embedding([*built, chunk])
        built.clear()
        return chunk

    return build


def lay_out_for(options: Options, build_chunk: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a builder of model chunks if the schedule in force lays them out as a V; otherwise return it as it is."""
    is_v = options.schedule is not None and name_model_layout(choose_layout(options, 2, 2)) == V
    return lay_out_as_v(build_chunk) if is_v else build_chunk


def build_in_v(build_model: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of Megatron's whose first argument builds a model chunk: it is laid out as a V."""
    return wrap_first(build_model, lay_out_as_v)


def wrap_first(function: Callable[..., Any], wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    """Call ``function`` with its first argument, by position or by name, wrapped."""
    name = next(iter(inspect.signature(function).parameters))

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            return function(*args, **{**kwargs, name: wrap(kwargs[name])})
        return function(wrap(args[0]), *args[1:], **kwargs)

    return wrapped


def _mirror_arguments(build_chunk: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return a builder's arguments for chunk 1: mirrored groups, no embedding, and the loss on the rank that has it."""
    parameters = list(inspect.signature(build_chunk).parameters.values())
    names = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    places = {"pre_process": False, "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=True)}
    mirrored = list(args)
    for index, (value, name) in enumerate(zip(args, names, strict=False)):
        mirrored[index] = places.get(name, value)
    mirrored = [mirror_collection(value) if hasattr(value, "pp") else value for value in mirrored]
    kwargs = {name: mirror_collection(value) if name == "pg_collection" and value else value for name, value in kwargs.items()}
    return tuple(mirrored), kwargs | {name: value for name, value in places.items() if name in kwargs}


def _require_mirrored(chunk: Any) -> None:
    groups, rank = getattr(chunk, "pg_collection", None), parallel_state.get_pipeline_model_parallel_rank()
    if groups is not None and groups.pp.rank() != rank:
        raise OptionError(
            f"chunk 1 of a V is built as on pipeline rank {rank} and its builder took rank {groups.pp.rank()} from process "
            "groups of its own: let it take them by a keyword pg_collection, and give it that"
        )


def is_on_way_back(chunk: Any) -> bool:
    """Tell whether a chunk, wrapped by data parallelism or not, was built as the second chunk of a V."""
    return of_chunk(unwrap(chunk)).is_on_way_back


def unwrap(chunk: Any) -> Any:
    """Return the model chunk without its wrappers for data parallelism and half precision."""
    while isinstance(chunk, (DistributedDataParallel, Float16Module)):
        chunk = chunk.module
    return chunk


def is_for_way_back(provider: Any) -> bool:
    """Tell whether Megatron builds chunk 1's data sets with this provider."""
    return isinstance(provider, partial) and provider.keywords.get("vp_stage") == WAY_BACK


def mirror_dataset_provider(provider: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a data set provider: for chunk 1 it runs as on the mirrored pipeline rank."""
    if is_for_way_back(provider):
        mirrored = run_mirrored(provider)
        mirrored.is_distributed = getattr(provider, "is_distributed", False)  # type: ignore[attr-defined]
        return mirrored
    return provider
