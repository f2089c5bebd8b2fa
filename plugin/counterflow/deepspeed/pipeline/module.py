"""Cut a PipelineModule into the model chunks of a schedule, in place.

The model is built before DeepSpeed reads its config, one stage a rank. Layers that another rank needs under the schedule are
built there again and get the weights of the rank that held them. So the model is the one that the script made: whatever it drew,
loaded or froze. Parameters that stay on their rank are the same objects as before.
"""

from collections.abc import Callable, Iterable
from functools import cache, wraps
from typing import Any

import torch
from torch import nn

from counterflow.deepspeed.state import chunks_of, method_of
from counterflow.errors import OptionError
from counterflow.schedule.layouts import lay_named
from counterflow.sections import Chosen
from counterflow.trainer.layer_chunks import Chunks
from counterflow.trainer.moved_layers import ParameterGroups, list_moves, receive_state, send_state
from counterflow.trainer.tables import choose_layout, name_model_layout


def note_method(partition_layers: Callable[..., None]) -> Callable[..., None]:
    """Wrap how a model is cut into stages: note the method, by which it may be cut again."""

    @wraps(partition_layers)
    def note(self: Any, method: str = "uniform") -> None:
        method_of[self] = method
        partition_layers(self, method)

    return note


def convert(model: Any, chosen: Chosen, optimizer: Any, parameters: Iterable[Any] | None) -> dict[str, Any]:
    """Cut a model into the chunks of the schedule (a collective call); return the arguments that name its parameters.

    ``optimizer`` and ``parameters`` are those of ``deepspeed.initialize``; they get the parameters that this rank has then.
    """
    if model not in method_of:
        raise OptionError("the PipelineModule was made before counterflow was on: call counterflow.enable() before it is made")
    ranks, rank = model.num_pipeline_stages(), model.stage_id
    layout = choose_layout(chosen.options, ranks, chosen.vpp or 2)
    layout = lay_named(name_model_layout(layout), ranks, layout.chunks)
    stages = layout.last_stage + 1
    if len(model._layer_specs) < stages:
        raise OptionError(
            f"schedule {chosen.options.schedule} cuts a model into {stages} stages on {ranks} ranks and the PipelineModule has "
            f"{len(model._layer_specs)} layers: give it {stages} or more, or a smaller num_stages"
        )
    given = [ParameterGroups(one) for one in (getattr(optimizer, "param_groups", None), parameters)]
    owners = [model.stage_owner(layer) for layer in range(model._num_layers)]
    # Layers on this rank; modules of tied layers have other names.
    held = {int(name): module for name, module in model.named_children() if name.isdecimal()}
    sources: dict[Any, Any] = held | dict(model.tied_modules)
    bounds = _cut(model, stages)
    chunks = Chunks(chosen, layout, rank, [bounds[stage] for stage in layout.stages[rank]])
    chunks_of[model] = chunks
    model.__class__ = make_chunked(_find_base(model))
    _build_chunks(model, chunks, held)
    _move_layers(model, owners, sources, given)
    model.tied_comms = model._index_tied_modules()
    model._synchronize_tied_weights()
    model.activate(0)
    _, new_parameters = (one.regroup(model.parameters()) for one in given)
    return {"optimizer": optimizer, "model_parameters": new_parameters}


@cache
def make_chunked(base: Any) -> Any:
    """Return a subclass of a PipelineModule's class that holds several chunks, of which one at a time is its forward."""

    class Chunked(base):  # type: ignore[misc]
        """A PipelineModule in chunks."""

        def activate(self, chunk: int) -> None:
            """Let ``forward``, and what looks at this rank's layers, be of one chunk."""
            chunks = chunks_of[self]
            self.forward_funcs = chunks.functions[chunk]
            self._local_start, self._local_stop = chunks.bounds[chunk]
            if chunks.recomputed:
                self.is_checkpointable_results = chunks.recomputed[chunk]

        def stage_owner(self, layer_idx: int) -> int:
            """Return the pipeline rank that holds a layer."""
            return chunks_of[self].layout.rank_of[super().stage_owner(layer_idx)]

        def _precompute_checkpointable_values(self) -> None:
            chunks = chunks_of[self]
            chunks.recomputed = []
            found = []
            for chunk in range(len(chunks.bounds)):
                self.activate(chunk)
                # Upstream computes them once for each interval.
                self.is_checkpointable_results_interval = None
                super()._precompute_checkpointable_values()
                found.append(self.is_checkpointable_results)
            chunks.recomputed = found
            self.activate(0)

    for name in ("save_state_dict", "load_state_dir", "compile"):
        setattr(Chunked, name, _for_each_chunk(base, name))
    # Upstream looks at the names of some users' classes.
    Chunked.__name__, Chunked.__qualname__ = base.__name__, base.__qualname__
    return Chunked


def _for_each_chunk(base: Any, name: str) -> Callable[..., None]:
    @wraps(getattr(base, name))
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        for chunk in range(len(chunks_of[self].bounds)):
            self.activate(chunk)
            getattr(base, name)(self, *args, **kwargs)
        self.activate(0)

    return run


def _find_base(model: Any) -> Any:
    """Return the class to extend. A model that upstream cut into the two chunks of a V is treated as one that it did not cut."""
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.dualpipev import DualPipeVModule

    if type(model) is DualPipeVModule:
        return PipelineModule
    if isinstance(model, DualPipeVModule):
        raise OptionError(
            f"{type(model).__name__} extends DualPipeVModule: let it extend PipelineModule, the schedule makes the V"
        )
    return type(model)


def _cut(model: Any, stages: int) -> list[tuple[int, int]]:
    """Let upstream cut the model into ``stages``; return the layers of each."""
    from deepspeed.pipe import PipelineModule

    model.num_stages = stages
    # Upstream builds layers to count their parameters; random numbers go on as if it had not.
    with torch.random.fork_rng():
        PipelineModule._partition_layers(model, method_of[model])
    return list(zip(model.parts[:-1], model.parts[1:], strict=True))


def _build_chunks(model: Any, chunks: Chunks, held: dict[int, nn.Module]) -> None:
    """Build the layers of all chunks; layers of ``held`` are there already."""
    from deepspeed.accelerator import get_accelerator

    for layer in held:
        del model._modules[str(layer)]
    specs, model.fwd_map = model._layer_specs, {}
    # A layer that is a module is taken as it is.
    model._layer_specs = [held.get(layer, spec) for layer, spec in enumerate(specs)]
    with torch.random.fork_rng():
        for start, stop in chunks.bounds:
            model._set_bounds(start, stop)
            model.forward_funcs = []
            model._build()
            chunks.functions.append(model.forward_funcs)
    model._layer_specs = specs
    needed = {_find_key(specs[layer]) for start, stop in chunks.bounds for layer in range(start, stop)}
    for key in set(model.tied_modules) - needed:
        del model.tied_modules[key], model.tied_weight_attrs[key]
    model.to(get_accelerator().device_name(model.local_rank))


def _find_key(spec: Any) -> str | None:
    """Return the key of a tied layer, None of another."""
    return getattr(spec, "key", None)


def _move_layers(model: Any, owners: list[int], sources: dict[Any, Any], given: list[ParameterGroups]) -> None:
    """Send the state of each layer from the rank that held it to the one that needs it, one layer after the other."""
    names = [_find_key(spec) or layer for layer, spec in enumerate(model._layer_specs)]
    group, find_rank = model._grid.get_pipe_parallel_group(), model._grid.stage_to_global
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    for name, layer, owner, home in list_moves(names, owners, [model.stage_owner(one) for one in range(len(names))]):
        if model.stage_id == owner:
            send_state(sources[name], find_rank(home), group, given)
        elif model.stage_id == home:
            built = model.tied_modules[name] if name in model.tied_modules else model._modules.get(str(layer))
            receive_state(built, find_rank(owner), group, given, device)
