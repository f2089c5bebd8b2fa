"""``"eplb"`` in the calls of DeepSpeed's engines: when clones get weights, when their gradients go home, and what is logged.

forward               before the first of a step: take the plan, start sending weights to clones
  F, B, W …           map tokens to slots, count loads
  reductions          those of experts wait, where backwards start them
allreduce_gradients   before the last of a step: add gradients of clones at the homes, sum the loads, start the next plan
_report_progress      add balancedness, clones and traffic to the log; monitors have them after each step
save_checkpoint       move homes to where AutoEP expects them, and back
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from counterflow.trainer.balanced_layers import BalancedLayers, ExpertGroups
from counterflow.trainer.balancer import Balancer, Waiting, say_idle
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


class EngineBalancer(Balancer[EngineLayers]):
    """Leads the layers of one engine through its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = Waiting()
        self.is_in_step = False
        self._microbatches = 0

    @contextmanager
    def run_forward(self, engine: Any) -> Iterator[None]:
        """Begin a step if there is none yet, or an evaluation."""
        if not (engine.module.training and torch.is_grad_enabled()):
            with nullcontext() if self.is_in_step else self.evaluate():
                yield
            return
        if not self.is_in_step:
            self.is_in_step, self._microbatches = True, 0
            with speaking_json():
                self.begin_step(engine.global_steps + 1)
        self._microbatches += 1
        yield

    def finish_step(self, engine: Any) -> None:
        """Bring the gradients of clones home, then start the reductions that waited; a second call in a step does nothing."""
        if not self.is_in_step:
            return
        with speaking_json():
            self.end_step(getattr(engine, "micro_batches", self._microbatches))
        self.is_in_step = False
        self.waiting.start()
        if engine.monitor.enabled and dist.get_rank() == 0 and self.figures is not None:
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
    for number, (_, layer) in zip(_number([name for name, _ in layers]), layers, strict=True):
        slots_of[layer] = AutoEPSlots(layer, number, options)
    balancer = balancer_of[engine] = EngineBalancer()
    for _, layer in layers:
        layer.register_state_dict_pre_hook(partial(_require_order, ref(balancer)))
        for parameter in layer.experts.parameters():
            holder_of[parameter] = ref(balancer)
    balancer.take(EngineLayers(options, engine, [one for _, one in layers]) if layers else None, options.eplb_clones_per_rank)


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
        with balancer.run_forward(self):
            return forward(self, *inputs, **kwargs)

    return run


def end_before(reduce: Callable[..., None]) -> Callable[..., None]:
    """Wrap an engine's reduction of gradients: before that of a step the gradients of clones come home."""

    @wraps(reduce)
    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        if (balancer := balancer_of.get(self)) is not None and self.is_gradient_accumulation_boundary():
            balancer.finish_step(self)
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
        return SummedGradients(lambda whole: whole.grad_accum, optimizer.gradient_accumulation_dtype)  # type: ignore[attr-defined]
    return PlainGradients()


def _number(names: list[str]) -> list[int]:
    """Return the layers' numbers in the model, from 1: after the first number in their names, or in order."""
    found = [int(match[0]) + 1 for name in names if (match := re.search(r"\d+", name))]
    return found if len(set(found)) == len(names) else list(range(1, len(names) + 1))
