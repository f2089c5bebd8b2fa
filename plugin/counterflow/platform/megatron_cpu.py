"""The few Megatron functions that reach past ``torch.cuda``'s public names.

Each is replaced where it lives and wherever it was imported by name; see `platform.cpu` for the rest.
"""

import contextlib
import copy
import importlib
import logging
import os
import sys
from concurrent.futures import Future
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from counterflow.patching import Patches
from counterflow.platform import streams


def _get_rng_state(device: Any = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _keep_on_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    # Upstream converts to numpy only on the way from a GPU; all_to_all wants plain integers either way.
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _compile_where_missing(compile_helpers: Any) -> Any:
    def compile_or_reuse_helpers() -> None:
        # The wheel ships the compiled helper and no makefile; a checkout has the makefile.
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            # The makefile asks the PATH's python3 for pybind11 and its python3-config for a name; both are to
            # be this Python's, whose config script stands beside the one that made the virtual environment.
            path = os.environ["PATH"]
            first = (str(Path(sys.executable).parent), str(Path(sys.base_prefix, "bin")))
            os.environ["PATH"] = os.pathsep.join((*first, path))
            compile_helpers()
            os.environ["PATH"] = path

    return compile_or_reuse_helpers


def _allocate_state_first(state_dict: Any) -> Any:
    @wraps(state_dict)
    def allocate_and_get(self: Any) -> Any:
        # Upstream reads the step from the first parameter's state, which a torch optimizer does not
        # have before its first step, so a fresh one could not be loaded into.
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    zeros = {key: torch.zeros_like(parameter.data) for key in self.optimizer_state_keys}
                    self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **zeros}
        return state_dict(self)

    return allocate_and_get


def _give_each_its_step(load_state_dict: Any) -> Any:
    @wraps(load_state_dict)
    def load(self: Any, state: Any) -> None:
        load_state_dict(self, state)
        # Upstream hands one step tensor to all parameters, and torch's Adam counts it up once for each
        # of them: after a resume the bias correction would run ahead by the number of parameters.
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()

    return load


def _leave_step_alone(set_states: Any) -> Any:
    @wraps(set_states)
    def set_all_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # Upstream wants a source for every tensor of the state. The step is restored on its own; what the default form of the
        # distributed optimizer's state hands over for it is that of before the load, zero.
        set_states(self, model_param, {**tensors, "step": None})

    return set_all_but_step


def _submit_node(run: Any) -> Any:
    """Wrap a schedule node's forward or backward: it is submitted to its stream's worker, and its future returned.

    Events are waited for and recorded here, in the order of issue, as CUDA has it.
    """

    @wraps(run)
    def submit(self: Any, *inputs: Any) -> Any:
        stream = self.stream() if callable(self.stream) else self.stream
        if streams.is_home(stream):
            return run(self, *inputs)
        self.stream = stream
        self.event.wait(stream)
        output = stream.submit(lambda: run(self, *_read_inputs(inputs)))
        self.event.record(stream)
        return output

    return submit


def _read_inputs(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    # What another node is to make stands as one future for all of it.
    if len(inputs) != 1 or not isinstance(inputs[0], Future):
        return inputs
    made = inputs[0].result()
    return made if isinstance(made, tuple) else (made,)


def _wait_for_input(send: Any) -> Any:
    """Wrap what a chunk plan calls with its result, to send it: that reads a tensor where a node has left a future."""

    @wraps(send)
    def wait_and_send(made: Any, *args: Any, **kwargs: Any) -> Any:
        return send(made.result() if isinstance(made, Future) else made, *args, **kwargs)

    return wait_and_send


def _run_on_workers(run: Any, compute: streams.Stream, get_comm_stream: Any) -> Any:
    """Wrap a chunk plan's ``run``: upstream's order of issue, with compute and communication on two workers."""

    @wraps(run)
    def run_on_workers(*args: Any, **kwargs: Any) -> Any:
        # Megatron's own interleaved schedule sends to other ranks from within the plan.
        kwargs |= {name: _wait_for_input(kwargs[name]) for name in ("post_forward", "post_backward") if kwargs.get(name)}
        with streams.issue_to(compute):
            output = run(*args, **kwargs)
        streams.join(compute, get_comm_stream())
        return output.result() if isinstance(output, Future) else output

    return staticmethod(run_on_workers)


def _let_streams_run(patches: Patches) -> None:
    """Give overlapped F&B (Megatron's layer schedule plans) streams that run at once."""
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan as Plan
    from megatron.core.pipeline_parallel import utils

    for name in ("_forward", "_backward"):
        patches.set(utils.ScheduleNode, name, _submit_node(getattr(utils.ScheduleNode, name)))
    # The submitter has ordered the node; in the worker it just runs.
    patches.set(utils.ScheduleNode, "stream_acquire_context", lambda self, name=None: contextlib.nullcontext())
    patches.set(Plan, "run", _run_on_workers(Plan.run, streams.Stream(), lambda: utils.get_comm_stream()))


def _allow_sequence_parallel(new: Any) -> Any:
    @wraps(new)
    def build_norm(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return new(cls, config, *args, **kwargs)
        # A norm works token by token and runs on a part of the sequence as it is. Upstream refuses torch's only because
        # nothing marks its parameters as those whose gradients are summed over the tensor-parallel ranks.
        config = copy.copy(config)
        config.sequence_parallel = False
        norm = new(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return build_norm


def _know_no_inference_layers(patches: Patches) -> None:
    """Without TE Megatron's linears for inference are no classes, and asking whether a module is one of them is a TypeError."""
    from megatron.core.tensor_parallel import inference_layers

    asked = "is_inference_column_parallel_linear"  # of 0.20, in multi-token prediction
    if hasattr(inference_layers, asked) and not isinstance(inference_layers.InferenceColumnParallelLinear, type):
        patches.replace(inference_layers, asked, lambda original: lambda module: False)


class _SilenceForkWarning(logging.Filter):
    """Drops the tracker's warning that the CPU random state changed: here it is the CUDA state too."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()


def _mend_torch_adam(patches: Patches, sharded: Any) -> None:
    """Make the distributed optimizer save and resume exactly over torch's Adam (no TE, no Apex)."""
    patches.set(sharded, "state_dict", _allocate_state_first(sharded.state_dict))
    patches.set(sharded, "load_state_dict", _give_each_its_step(sharded.load_state_dict))
    name = "_set_main_param_and_optimizer_states"
    patches.set(sharded, name, _leave_step_alone(getattr(sharded, name)))


def install(patches: Patches) -> None:
    """Replace what Megatron-Core does differently without a GPU or without TE; log into ``patches``."""
    from megatron.core.datasets import utils as dataset_utils
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.tensor_parallel import random as rng
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.moe import moe_utils

    patches.replace(rng, "_get_cuda_rng_state", lambda original: _get_rng_state)
    patches.replace(rng, "_set_cuda_rng_state", lambda original: _set_rng_state)
    patches.replace(moe_utils, "maybe_move_tensor_to_cpu", lambda original: _keep_on_cpu)
    patches.set(
        torch_norm.WrappedTorchNorm, "__new__", staticmethod(_allow_sequence_parallel(torch_norm.WrappedTorchNorm.__new__))
    )
    patches.replace(dataset_utils, "compile_helpers", _compile_where_missing)
    _let_streams_run(patches)
    _know_no_inference_layers(patches)
    if not distrib_optimizer.HAVE_APEX_OR_TE:
        _mend_torch_adam(patches, distrib_optimizer.DistributedOptimizer)
    silence = _SilenceForkWarning()
    tracker_log = logging.getLogger(rng.__name__)
    tracker_log.addFilter(silence)
    patches.on_undo(lambda: tracker_log.removeFilter(silence))
