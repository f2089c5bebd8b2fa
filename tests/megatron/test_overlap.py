"""An overlapped pair on real Megatron layers, one rank: the same gradients, really at once, errors that come out."""

import pytest

from counterflow.errors import OptionError
from tests.support.running import refuses, run_python

pytestmark = [pytest.mark.timeout(300), pytest.mark.slow]

PAIR = """
import tempfile, threading
from types import SimpleNamespace
import torch, torch.distributed as dist
from counterflow.platform import install_cpu
patches = install_cpu()
dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from counterflow.megatron.pipeline import overlap
from counterflow.megatron.pipeline.gradient_sync import GradientSync
from counterflow.megatron.pipeline.work import MegatronWork, Step
from counterflow.megatron.install import take_seams
from counterflow.megatron import seams
from counterflow.schedule import ScheduleTable, lay_straight
from counterflow.schedule.actions import Action, pair

parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1)
nodes = overlap.PairNodes()
take_seams(patches, [seams.ZERO_BUBBLE, seams.OVERLAP], SimpleNamespace(pairs=nodes))
config = TransformerConfig(
    num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=16, num_moe_experts=4, moe_router_topk=2,
    moe_token_dispatcher_type="alltoall", hidden_dropout=0.0, attention_dropout=0.0, use_cpu_initialization=True,
    add_bias_linear=False, gradient_accumulation_fusion=False, pipeline_dtype=torch.float32,
)
model = GPTModel(config, get_gpt_layer_local_spec(num_experts=4), 32, 8, position_embedding_type="rope")
for layer in model.decoder.layers:
    # One rank's all-to-all hands over the very tensor that the plan frees; upstream asks for two ranks, here a copy does.
    layer.mlp.dispatch = lambda *args, dispatch=layer.mlp.dispatch: tuple(tensor.clone() for tensor in dispatch(*args))
tokens = [torch.randint(0, 32, (1, 8), generator=torch.Generator().manual_seed(m)) for m in range(2)]
F, B = (lambda m: Action("F", 0, m)), (lambda m: Action("B", 0, m))
table = ScheduleTable("pair", lay_straight(1), 2, ((F(0), pair(F(1), B(0)), B(1)),))

def forward_step(data, model, return_schedule_plan=False):
    ids, run = next(data), model.build_schedule_plan if return_schedule_plan else model
    return run(ids, torch.arange(8).unsqueeze(0), None, labels=ids), lambda output: (output.mean(), {"loss": output.mean()})

def add_to_main_grad(parameter):
    # As Megatron's data parallelism does it.
    if not parameter.grad_added_to_main_grad:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None

for parameter in model.parameters():
    parameter.grad_added_to_main_grad = False
    parameter.register_post_accumulate_grad_hook(add_to_main_grad)

def run(kind, *more):
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros_like(parameter)
    count = torch.zeros([], dtype=torch.int)
    step = Step(forward_step, [iter(tokens)], [model], config, table, 2, 1, False, False, None, [], count)
    work = kind(step, GradientSync(config, [model], table, 0, forward_only=False), *more)
    work.forward(0, 0, ())
    if kind is MegatronWork:
        work.forward(0, 1, ()), work.backward(0, 0, ())
    else:
        work.forward_backward(F(1), (), B(0), ())
    work.backward(0, 1, ())
    return [loss["loss"].item() for loss in step.losses], [parameter.main_grad for parameter in model.parameters()]

"""

SAME = """
expected, found = run(MegatronWork), run(overlap.OverlapWork, nodes)
assert found[0] == expected[0], (found[0], expected[0])
assert all(g.any() for g in expected[1])
for name, one, other in zip(dict(model.named_parameters()), expected[1], found[1], strict=True):
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7, msg=name)
print("same")
"""

AT_ONCE = """
meeting = threading.Barrier(2)
class Meet(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)
    @staticmethod
    def backward(ctx, grad):
        if nodes.are_open:
            meeting.wait(timeout=60)  # the B's experts
        return grad
for layer in model.decoder.layers:
    layer.mlp.experts.register_forward_hook(lambda module, args, output: (Meet.apply(output[0]), output[1]))
    dispatch = layer.mlp.dispatch
    def meet_and_dispatch(*args, dispatch=dispatch):
        if nodes.are_open:
            meeting.wait(timeout=60)  # the F's all-to-all
        return dispatch(*args)
    layer.mlp.dispatch = meet_and_dispatch
run(overlap.OverlapWork, nodes)
print("at once")
"""

RAISES = """
def fail(*args):
    raise FloatingPointError("an expert gave up")
model.decoder.layers[1].mlp.experts.register_forward_hook(fail)
try:
    run(overlap.OverlapWork, nodes)
except FloatingPointError as error:
    print(error)
"""

LOST = """
from megatron.core.models.common.utils import TransformerLayerNode
patches.set(TransformerLayerNode, "backward_dw", lambda self: None)
try:
    run(overlap.OverlapWork, nodes)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (SAME, "same"),
        (AT_ONCE, "at once"),
        (RAISES, "an expert gave up"),
        (LOST, "upstream did not call backward_dw on mlp, pre_dispatch_computation"),
    ],
    ids=["same gradients", "dispatch of the F beside the experts of the B", "an error in a worker", "lost weight gradients"],
)
def test_a_pair_through_megatrons_plans(code: str, said: str) -> None:
    pytest.importorskip("megatron.core")
    assert said in run_python("-c", PAIR + code, timeout=240)


def test_a_script_that_cannot_return_a_plan_is_refused() -> None:
    pytest.importorskip("megatron.core")
    from counterflow.megatron.pipeline.overlap import require_schedule_plans

    def forward_step(data_iterator: object, model: object) -> None: ...

    def with_plan(data_iterator: object, model: object, return_schedule_plan: bool = False) -> None: ...

    require_schedule_plans(with_plan)
    require_schedule_plans(lambda *args, **kwargs: None)
    with refuses("forward_step does not take return_schedule_plan: add it or drop --cf-overlap", OptionError):
        require_schedule_plans(forward_step)
