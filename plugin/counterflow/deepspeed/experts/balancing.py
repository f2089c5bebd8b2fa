"""``"eplb"`` in the calls of DeepSpeed's engines: when clones get weights, when their gradients go home, and what is logged.

forward               before the first of a step: take the plan, start sending weights to clones
  F, B, W …           map tokens to slots, count loads
  reductions          those of experts wait, where backwards start them
allreduce_gradients   before the last of a step: add gradients of clones at the homes, sum the loads, start the next plan
_report_progress      add balancedness, clones and traffic to the log; monitors have them after each step
save_checkpoint       move homes to where AutoEP expects them, and back
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial, wraps
from itertools import chain
from typing import Any
from weakref import ref

import torch
import torch.distributed as dist

from counterflow.deepspeed.checks import find_homes_obstacle
from counterflow.deepspeed.experts.layer import AutoEPSlots
from counterflow.deepspeed.experts.optimizer_state import take_state
from counterflow.deepspeed.stages import list_layers
from counterflow.deepspeed.state import balancer_of, holder_of, slots_of
from counterflow.errors import OptionError
from counterflow.moe.gradients import GradientStore, PlainGradients, SummedGradients
from counterflow.moe.planning import compile_planner
from counterflow.options import Options
from counterflow.sections import speaking_json
from counterflow.trainer.balanced_layers import BalancedLayers, ExpertGroups, number_layers
from counterflow.trainer.balancer import StepwiseBalancer, led_by, say_idle
from counterflow.trainer.balancing_log import describe_step, keep_homes_where
from counterflow.trainer.optimizer_state import find_elementwise_obstacle


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

    @contextmanager
    def lead_forward(self, engine: Any) -> Iterator[None]:
        """Around an engine's ``forward``, which runs a micro-batch, begin a step or an evaluation."""
        is_training = engine.module.training and torch.is_grad_enabled()
        with speaking_json(), self.run_forward(engine.global_steps + 1, is_training=is_training):
            yield

    @contextmanager
    def lead_reduction(self, engine: Any) -> Iterator[None]:
        """Bring the gradients of clones home before an engine's reduction of a step's gradients."""
        if engine.is_gradient_accumulation_boundary():
            self.end_of(engine)
        yield

    def lead_save(self, engine: Any) -> AbstractContextManager[None]:
        """Around an engine's ``save_16bit_model``, which all ranks call, have homes where AutoEP expects them."""
        return self.save(None)

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
    obstacle = find_elementwise_obstacle(engine.basic_optimizer) or find_homes_obstacle(engine._config._param_dict)
    if obstacle is not None and options.needs_moves:
        raise OptionError(f"eplb: eplb.rehome_interval {obstacle}: drop one of the two")
    options = keep_homes_where(obstacle, options)
    compile_planner()
    for number, (_, layer) in zip(number_layers([name for name, _ in layers]), layers, strict=True):
        slots_of[layer] = AutoEPSlots(layer, number, options)
    balancer = balancer_of[engine] = EngineBalancer()
    for _, layer in layers:
        balancer.guard_order(layer, "read weights from save_checkpoint or save_16bit_model, or give eplb.rehome_interval never")
        for parameter in layer.experts.parameters():
            holder_of[parameter] = ref(balancer)
    balancer.take(EngineLayers(options, engine, [one for _, one in layers]) if layers else None, options.layer_clones)


begin_before, end_before, save_at_home = (
    led_by(balancer_of, lead) for lead in (EngineBalancer.lead_forward, EngineBalancer.lead_reduction, EngineBalancer.lead_save)
)


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
        # A weight knows its own only from the first gradient on, and a clone's may be there before.
        weights, sums = (chain.from_iterable(groups) for groups in (optimizer.bf16_groups, optimizer.fp32_groups_gradients))
        kept = dict(zip(weights, sums, strict=True))
        return SummedGradients(lambda whole: kept[whole].view_as(whole), optimizer.grad_acc_dtype)
    if getattr(optimizer, "use_grad_accum_attribute", False):
        return SummedGradients.in_attribute("grad_accum", optimizer.gradient_accumulation_dtype)
    return PlainGradients()
