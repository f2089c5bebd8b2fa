"""Replace functions of Megatron that need a GPU, beyond their calls of public names of ``torch.cuda``.

`platform.cpu` replaces the public names. A function of Megatron is replaced in its own module and in every module that has
imported it by name.
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
    # Megatron converts to numpy only when it copies from a GPU, but all_to_all needs plain integers on the CPU too.
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _compile_where_missing(compile_helpers: Any) -> Any:
    def compile_or_reuse_helpers() -> None:
        # The wheel ships the compiled helper and no makefile; a checkout has the makefile.
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError:
            # The makefile runs python3 and python3-config from the PATH. Both have to belong to this Python; its
            # python3-config lies beside the Python that made the virtual environment.
            path = os.environ["PATH"]
            first = (str(Path(sys.executable).parent), str(Path(sys.base_prefix, "bin")))
            os.environ["PATH"] = os.pathsep.join((*first, path))
            compile_helpers()
            os.environ["PATH"] = path

    return compile_or_reuse_helpers


def _allocate_state_first(state_dict: Any) -> Any:
    @wraps(state_dict)
    def allocate_and_get(self: Any) -> Any:
        # Megatron reads the step from the first parameter's state. A torch optimizer has no state before its first
        # step, so without this a checkpoint could not be loaded into a new optimizer.
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
        # Megatron gives all parameters the same step tensor, and torch's Adam increments it once for each parameter.
        # After a resume the bias correction would use a step that is far too high.
        for parameter_state in self.optimizer.state.values():
            parameter_state["step"] = parameter_state["step"].clone()

    return load


def _leave_step_alone(set_states: Any) -> Any:
    @wraps(set_states)
    def set_all_but_step(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # Megatron copies every tensor of the state from the checkpoint's. The step is restored elsewhere; in the default form
        # of the distributed optimizer's state the value handed over here is the one from before the load, zero.
        set_states(self, model_param, {**tensors, "step": None})

    return set_all_but_step


def _submit_node(run: Any) -> Any:
    """Wrap a schedule node's forward or backward: submit it to its stream's worker and return its future.

    The node's event is waited for and recorded here, in the order of issue, as on CUDA.
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
    # One future stands for all outputs of the node before.
    if len(inputs) != 1 or not isinstance(inputs[0], Future):
        return inputs
    made = inputs[0].result()
    return made if isinstance(made, tuple) else (made,)


def _wait_for_input(send: Any) -> Any:
    """Wrap the function that sends a chunk plan's result: wait for the result if it is a future."""

    @wraps(send)
    def wait_and_send(made: Any, *args: Any, **kwargs: Any) -> Any:
        return send(made.result() if isinstance(made, Future) else made, *args, **kwargs)

    return wait_and_send


def _run_on_workers(run: Any, compute: streams.Stream, get_comm_stream: Any) -> Any:
    """Wrap a chunk plan's ``run``: nodes are issued in Megatron's order, to one worker for compute and one for communication."""

    @wraps(run)
    def run_on_workers(*args: Any, **kwargs: Any) -> Any:
        # Megatron's interleaved schedule sends to other ranks while the plan runs.
        kwargs |= {name: _wait_for_input(kwargs[name]) for name in ("post_forward", "post_backward") if kwargs.get(name)}
        with streams.issue_to(compute):
            output = run(*args, **kwargs)
        streams.join(compute, get_comm_stream())
        return output.result() if isinstance(output, Future) else output

    return staticmethod(run_on_workers)


def _let_streams_run(patches: Patches) -> None:
    """Give Megatron's layer schedule plans, which run overlapped pairs, two streams that run at the same time."""
    from megatron.core.models.common.model_chunk_schedule_plan import TransformerModelChunkSchedulePlan as Plan
    from megatron.core.pipeline_parallel import utils

    for name in ("_forward", "_backward"):
        patches.set(utils.ScheduleNode, name, _submit_node(getattr(utils.ScheduleNode, name)))
    # `_submit_node` has waited for the node's event, so the worker need not.
    patches.set(utils.ScheduleNode, "stream_acquire_context", lambda self, name=None: contextlib.nullcontext())
    patches.set(Plan, "run", _run_on_workers(Plan.run, streams.Stream(), lambda: utils.get_comm_stream()))


def _allow_sequence_parallel(new: Any) -> Any:
    @wraps(new)
    def build_norm(cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return new(cls, config, *args, **kwargs)
        # A norm works token by token, so it can run on a part of the sequence. Megatron refuses torch's norms only because
        # their parameters lack the mark for gradients that are summed over tensor-parallel ranks.
        config = copy.copy(config)
        config.sequence_parallel = False
        norm = new(cls, config, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True
        return norm

    return build_norm


def _know_no_inference_layers(patches: Patches) -> None:
    """Let no module count as one of Megatron's linears for inference: without TE the isinstance check raises a TypeError."""
    from megatron.core.tensor_parallel import inference_layers

    check = "is_inference_column_parallel_linear"  # of 0.20, called by multi-token prediction
    if hasattr(inference_layers, check) and not isinstance(inference_layers.InferenceColumnParallelLinear, type):
        patches.replace(inference_layers, check, lambda original: lambda module: False)


class _SilenceForkWarning(logging.Filter):
    """Drops the tracker's warning that the CPU random state changed, since the CPU's state serves as the CUDA state here."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed" not in record.getMessage()


def _mend_torch_adam(patches: Patches, sharded: Any) -> None:
    """Make the distributed optimizer save and resume exactly with torch's Adam, which it uses without TE and Apex."""
    patches.set(sharded, "state_dict", _allocate_state_first(sharded.state_dict))
    patches.set(sharded, "load_state_dict", _give_each_its_step(sharded.load_state_dict))
    name = "_set_main_param_and_optimizer_states"
    patches.set(sharded, name, _leave_step_alone(getattr(sharded, name)))


def install(patches: Patches) -> None:
    """Replace the functions that need a GPU or TE; ``patches`` is the undo log."""
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
