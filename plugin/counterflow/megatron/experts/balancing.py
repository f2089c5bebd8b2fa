"""``--cf-eplb`` in Megatron's calls: when clones get weights, when their gradients go home, and what is logged.

train_step            keep the optimizer, for homes that move
  forward_backward    take the plan, start sending weights to clones          (in the pipeline's first bubbles)
    F, B, W …         map tokens to slots, count loads
    last gradients    start sending the gradients of a chunk's clones home    (in the pipeline's last bubbles)
    finish_grad_sync  add them at the homes; then upstream reduces
  forward_backward    at its end, sum the loads and start the next plan       (beside the optimizer step)
training_log          add balancedness, clones and traffic to the log line and TensorBoard
save_checkpoint       move homes to where Megatron expects them, and back
"""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_layer import MoELayer

from counterflow.errors import OptionError
from counterflow.megatron.checks import check_loop, find_homes_obstacle
from counterflow.megatron.experts.balanced_model import BalancedModel
from counterflow.megatron.experts.forced import draw_again, keep_batches, time_forwards
from counterflow.megatron.loop import find_arguments, number_iteration
from counterflow.megatron.state import layer_slots, of_chunk
from counterflow.moe.planning import compile_planner
from counterflow.options import Options
from counterflow.trainer.balancer import Balancer, say_idle
from counterflow.trainer.balancing_log import describe_step, keep_homes_where


class ExpertBalancer(Balancer[BalancedModel]):
    """Wraps Megatron's calls; finds the model's MoE layers in the first step."""

    def __init__(self, options: Options) -> None:
        super().__init__()
        self._options = options
        self._is_attached = False
        # One expert-parallel rank: there is nothing to balance.
        self._is_idle = False
        self._training_steps = 0

    def wrap_schedule(self, forward_backward: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a ``forward_backward`` function."""

        @wraps(forward_backward)
        def balanced_forward_backward(*args: Any, **kwargs: Any) -> Any:
            chunks = kwargs["model"] if isinstance(kwargs["model"], list) else [kwargs["model"]]
            self._attach(chunks, kwargs["num_microbatches"])
            if self._is_idle:
                return forward_backward(*args, **kwargs)
            if kwargs.get("forward_only", False):
                with self.evaluate():
                    return forward_backward(*args, **kwargs)
            if not self._training_steps:
                _require_reductions(chunks)
            step = number_iteration(self._training_steps)
            self.begin_step(step, kwargs["num_microbatches"])
            is_measured = self._options.eplb_measure_forced and step % self._options.eplb_measure_forced == 0
            if is_measured:
                kwargs["data_iterator"] = keep_batches(kwargs["data_iterator"])
            result = forward_backward(*args, **kwargs)
            self._training_steps += 1
            measured = self._measure(forward_backward, chunks, step, args, kwargs) if is_measured else None
            self.end_step(kwargs["num_microbatches"], measured)
            return result

        return balanced_forward_backward

    def _measure(
        self, forward_backward: Callable[..., Any], chunks: list[Any], step: int, args: Any, kwargs: Any
    ) -> tuple[float, float]:
        """Return the seconds of the step's forward passes with as many tokens on every rank, and as routed."""

        def run() -> Any:
            again = {"data_iterator": draw_again(kwargs["data_iterator"]), "forward_only": True}
            return forward_backward(*args, **kwargs | again)

        # Whichever runs first may pay for what it makes.
        return time_forwards(run, chunks, self.layers, forced_first=bool(step // self._options.eplb_measure_forced % 2))

    def wrap_train_step(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``train_step``, whose arguments have the optimizer."""

        @wraps(train_step)
        def keep_optimizer(forward_step: Any, data_iterator: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            self._attach(model, _count_microbatches())
            if self.layers is not None:
                self.layers.optimizer = optimizer
            return train_step(forward_step, data_iterator, model, optimizer, *args, **kwargs)

        return keep_optimizer

    def wrap_save(self, save_checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap ``save_checkpoint``: homes are where Megatron expects them while it saves; the last loads are saved too."""

        @wraps(save_checkpoint)
        def save_at_home(iteration: int, *args: Any, **kwargs: Any) -> Any:
            # A checkpoint that is not persistent is in another folder and is soon deleted.
            is_kept = not kwargs.get("non_persistent_ckpt", False)
            with self.save(_find_checkpoint("save", iteration) if is_kept else None):
                return save_checkpoint(iteration, *args, **kwargs)

        return save_at_home

    def wrap_report(self, report: Callable[..., str]) -> Callable[..., str]:
        """Wrap Megatron's report of MoE metrics, which returns a part of the log line and writes to TensorBoard and W&B."""

        @wraps(report)
        def report_and_add(*args: Any, **kwargs: Any) -> str:
            line = report(*args, **kwargs)
            if self.figures is None:
                return line
            scalars = {f"eplb/{name}": value for name, value in self.figures.all.items()}
            if kwargs.get("per_layer_logging"):
                for number, figures in self.figures.layers.items():
                    scalars |= {f"eplb/layer {number}/{name}": value for name, value in figures.items()}
            if (writer := kwargs.get("writer")) is not None:
                for name, value in scalars.items():
                    writer.add_scalar(name, value, kwargs["iteration"])
            if (wandb := kwargs.get("wandb_writer")) is not None:
                wandb.log(scalars, kwargs["iteration"])
            return line + describe_step(self.figures.all)

        return report_and_add

    def _attach(self, chunks: list[Any], microbatches: int) -> None:
        if self._is_attached:
            return
        self._is_attached = True
        if parallel_state.get_expert_model_parallel_world_size() == 1:
            self._is_idle = True
            say_idle("--expert-model-parallel-size")
            return
        if find_arguments() is None:
            check_loop(chunks, self._options)
        self._options = keep_homes_where(find_homes_obstacle(find_arguments()), self._options)
        compile_planner()
        model = BalancedModel(self._options, chunks) if _find_slots(chunks) else None
        self.take(model, self._options.layer_clones)
        if model is not None:
            self.resume(_find_checkpoint("load"), microbatches)


def _find_slots(chunks: list[Any]) -> bool:
    """Tell whether this rank has layers to balance; raises `OptionError` if they were built without slots."""
    if any(layer not in layer_slots for chunk in chunks for layer in _list_layers(chunk)):
        raise OptionError("--cf-eplb: this model's MoE layers were built before counterflow.enable(): call it first")
    return any(_list_layers(chunk) for chunk in chunks)


def _require_reductions(chunks: list[Any]) -> None:
    """Raise `OptionError` if a chunk trains without data parallelism, so that gradients of clones would not go home."""
    for chunk in chunks:
        if _list_layers(chunk) and of_chunk(chunk).clones is None:
            raise OptionError(
                "--cf-eplb returns the gradients of clones before Megatron's data parallelism reduces them: wrap each model "
                f"chunk in DistributedDataParallel before its first step, evaluation too; {type(chunk).__name__} given"
            )


def _list_layers(chunk: Any) -> list[Any]:
    return [module for module in chunk.modules() if isinstance(module, MoELayer)]


def _count_microbatches() -> int:
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    return int(get_num_microbatches())


def _find_checkpoint(which: str, iteration: int | None = None) -> Path | None:
    """Return the folder of the checkpoint to ``save`` or to ``load``; None if there is no checkpoint."""
    args = find_arguments()
    if args is None:
        return None
    directory, iteration = getattr(args, which), args.iteration if iteration is None else iteration
    if not directory or not iteration:
        return None
    from megatron.training.checkpointing import get_checkpoint_name

    return Path(get_checkpoint_name(directory, iteration, return_base_dir=True))
