"""``"eplb"`` in the calls of DeepSpeed's engines: when clones get weights, when their gradients go home, and what is logged.

forward               before the first of a step: take the plan, start sending weights to clones
  F, B, W …           map tokens to slots, count loads
  reductions          those of experts wait, where backwards start them
allreduce_gradients   before the last of a step: add gradients of clones at the homes, sum the loads, start the next plan
_report_progress      add balancedness, clones and traffic to the log; monitors have them after each step
save_checkpoint       move homes to where AutoEP expects them, and back
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist

from counterflow.deepspeed.checks import find_homes_obstacle
from counterflow.deepspeed.experts.layer import AutoEPSlots
from counterflow.deepspeed.experts.optimizer_state import take_state
from counterflow.deepspeed.stages import list_layers
from counterflow.deepspeed.state import balancer_of, holder_of, slots_of
from counterflow.errors import BalanceError, OptionError
from counterflow.moe.gradients import GradientStore, PlainGradients, SummedGradients
from counterflow.moe.planning import compile_planner
from counterflow.options import Options
from counterflow.sections import speaking_json
from counterflow.trainer.balanced_layers import BalancedLayers, ExpertGroups, number_layers
from counterflow.trainer.balancer import StepwiseBalancer, say_idle
from counterflow.trainer.balancing_log import describe_step, keep_homes_where

# Optimizers whose state has a number for each number of a weight, which no other changes. Norms of whole weights, or rows and
# columns of them, would be those of other experts' weights too.
ELEMENTWISE = {
    "Adagrad", "Adam", "AdamW", "DeepSpeedCPUAdagrad", "DeepSpeedCPUAdam", "DeepSpeedCPULion", "FusedAdam", "FusedLion",
    "RMSprop", "SGD",
}  # fmt: skip


class EngineLayers(BalancedLayers):
    """AutoEP's layers in one rank's model; there is at least one."""

    def __init__(self, options: Options, engine: Any, layers: list[Any]) -> None:
        from deepspeed.utils import groups

        self._find_optimizer = ref(engine.optimizer)
        experts = ExpertGroups(
            experts=layers[0].ep_group,
            sources=layers[0].ep_group,
            replicas=groups._get_expert_data_parallel_group(layers[0].ep_group_name),
            stage=engine.data_parallel_group,
        )
        super().__init__(options, [[slots_of[one] for one in layers]], experts, _find_store(engine.optimizer))

    def take_state(self, parameter: Any) -> list[torch.Tensor]:
        """Return the fp32 master and the moments of an expert's weight in DeepSpeed's optimizer."""
        return take_state(self._find_optimizer(), parameter)


class EngineBalancer(StepwiseBalancer[EngineLayers]):
    """Leads the layers of one engine through its steps."""

    @speaking_json()
    def end_of(self, engine: Any) -> None:
        """End the step of an engine; a second call in a step does nothing."""
        has_ended = self.finish_step(getattr(engine, "micro_batches", None))
        if has_ended and engine.monitor.enabled and dist.get_rank() == 0 and self.figures is not None:
            samples = engine.global_samples + engine.train_batch_size()
            engine.monitor.write_events([(f"Train/EPLB/{name}", value, samples) for name, value in self.figures.all.items()])


def attach(engine: Any, options: Options) -> None:
    """Give the layers of an engine slots (a collective call)."""
    if engine._config.expert_parallel_config.autoep_size == 1:
        say_idle("expert_parallel.autoep_size")
        return
    layers = list_layers(engine)
    if (obstacle := _find_homes_obstacle(engine)) is not None and options.needs_moves:
        raise OptionError(f"eplb: eplb.rehome_interval {obstacle}: drop one of the two")
    options = keep_homes_where(obstacle, options)
    compile_planner()
    for number, (_, layer) in zip(number_layers([name for name, _ in layers]), layers, strict=True):
        slots_of[layer] = AutoEPSlots(layer, number, options)
    balancer = balancer_of[engine] = EngineBalancer()
    for _, layer in layers:
        layer.register_state_dict_pre_hook(partial(_require_order, ref(balancer)))
        for parameter in layer.experts.parameters():
            holder_of[parameter] = ref(balancer)
    balancer.take(EngineLayers(options, engine, [one for _, one in layers]) if layers else None, options.layer_clones)


def _find_homes_obstacle(engine: Any) -> str | None:
    """Return why homes cannot move with an engine's optimizer; None if they can."""
    names = {one.__name__ for one in type(engine.basic_optimizer).__mro__}
    if not names & ELEMENTWISE:
        return (
            f"moves the state of optimizers that treat each number alone ({', '.join(sorted(ELEMENTWISE))}), and "
            f"{type(engine.basic_optimizer).__name__} is given"
        )
    return find_homes_obstacle(engine._config._param_dict)


def _require_order(find: Callable[[], EngineBalancer | None], *_: Any) -> None:
    """Refuse to hand out weights of experts that are not where AutoEP puts them: whoever reads them takes them for others."""
    balancer = find()
    if balancer is not None and balancer.layers is not None and balancer.layers.are_away:
        raise BalanceError(
            "eplb: state_dict() is called while homes of experts are on other ranks than AutoEP puts them: read weights from "
            "save_checkpoint or save_16bit_model, or give eplb.rehome_interval never"
        )


def save_at_home(save: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an engine's ``save_16bit_model``, which all ranks call: homes are where AutoEP expects them."""

    @wraps(save)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (balancer := balancer_of.get(self)) is None:
            return save(self, *args, **kwargs)
        with balancer.save(None):
            return save(self, *args, **kwargs)

    return run


def begin_before(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an engine's ``forward``, which runs a micro-batch."""

    @wraps(forward)
    def run(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        if (balancer := balancer_of.get(self)) is None:
            return forward(self, *inputs, **kwargs)
        is_training = self.module.training and torch.is_grad_enabled()
        with speaking_json(), balancer.run_forward(self.global_steps + 1, is_training=is_training):
            return forward(self, *inputs, **kwargs)

    return run


def end_before(reduce: Callable[..., None]) -> Callable[..., None]:
    """Wrap an engine's reduction of gradients: before that of a step the gradients of clones come home."""

    @wraps(reduce)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        if (balancer := balancer_of.get(self)) is not None and self.is_gradient_accumulation_boundary():
            balancer.end_of(self)
        reduce(self, *args, **kwargs)

    return run


def wait_for_clones(reduce: Callable[..., None]) -> Callable[..., None]:
    """Wrap how ZeRO reduces a gradient that a backward has computed: an expert's waits for those of its clones."""

    @wraps(reduce)
    def run(self: Any, param: Any, i: int) -> None:
        find = holder_of.get(param)
        balancer = None if find is None else find()
        if balancer is None or not balancer.is_in_step or not self.is_gradient_accumulation_boundary():
            reduce(self, param, i)
        else:
            balancer.waiting.add(partial(reduce, self, param, i))

    return run


def report_after(report: Callable[..., None]) -> Callable[..., None]:
    """Wrap an engine's line of the log: balancedness, clones and traffic follow.

    They are printed, as a pipeline's losses are: DeepSpeed's logger leaves the line itself out unless its level is lowered.
    """

    @wraps(report)
    def run(self: Any, step: int) -> None:
        report(self, step)
        if (balancer := balancer_of.get(self)) is not None and balancer.figures is not None:
            print(f"step={step},{describe_step(balancer.figures.all)}", flush=True)

    return run


def _find_store(optimizer: Any) -> GradientStore:
    """Return where an engine's optimizer keeps the gradients of a step."""
    if hasattr(optimizer, "fp32_groups_gradients"):
        return SummedGradients(lambda whole: whole._hp_grad.view_as(whole), optimizer.grad_acc_dtype)  # type: ignore[attr-defined]
    if getattr(optimizer, "use_grad_accum_attribute", False):
        return SummedGradients(partial(_find_sum, optimizer.gradient_accumulation_dtype), optimizer.gradient_accumulation_dtype)
    return PlainGradients()


def _find_sum(dtype: torch.dtype, whole: Any) -> torch.Tensor:
    """Return where DeepSpeed sums a weight's gradients; before the first backward of a step has done so, it is made."""
    if whole.grad_accum is None:
        whole.grad_accum = torch.zeros_like(whole, dtype=dtype)
    return whole.grad_accum  # type: ignore[no-any-return]
