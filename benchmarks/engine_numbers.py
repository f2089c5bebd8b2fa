"""Measure how near the CPU platform's stand-in for Transformer Engine is to its kernels on a GPU.

``write FILE`` computes with whichever of the two this machine has, from the same drawn numbers: what each module's weights are in
FP8, its output and its gradients. ``compare GPU CPU`` says what differs, with status 1 if data in FP8 or scales do, or an output
by more than its numbers' rounding. Run ``write`` on a machine with a GPU and with ``--cpu`` on one without.
"""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / name) for name in ("tests/distributed", ".")]

NUMBERS = ("bf16", "delayed", "tensorwise", "blockwise")
ROWS = 256
BLOCK = 128
# Relative, in norm: products of the same FP8 values that are added in another order, and rounded to BF16.
BOUND = 5e-3


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write", help="compute here and write FILE")
    write.add_argument("file", type=Path)
    write.add_argument("--cpu", action="store_true", help="with the stand-in, on the CPU")
    compare = commands.add_parser("compare", help="compare two files")
    compare.add_argument("gpu", type=Path)
    compare.add_argument("cpu", type=Path)
    options = parser.parse_args()
    if options.command == "write":
        write_numbers(options.file, on_cpu=options.cpu)
    else:
        differences = list(
            compare_numbers(torch.load(options.gpu, weights_only=True), torch.load(options.cpu, weights_only=True))
        )
        print("\n".join(line for line, _ in differences))
        raise SystemExit(any(is_bad for _, is_bad in differences))


def write_numbers(path: Path, *, on_cpu: bool) -> None:
    """Compute every module under every kind of numbers and save the results."""
    if on_cpu:
        from counterflow.platform import install_cpu

        install_cpu(engine=True)
    te_checks = importlib.import_module("te_checks")
    device = "cpu" if on_cpu else "cuda"
    found: dict[str, torch.Tensor] = {}
    for numbers in NUMBERS:
        for kind in (*te_checks.LINEARS, *te_checks.NORMS):
            module = te_checks.build(kind, torch.bfloat16, device=device)
            draw_parameters(module)
            x, gradient = draw((ROWS, 128), 1).to(device), draw((ROWS, find_width(kind)), 2).to(device)
            # The second time, delayed scales are those of the first.
            for turn in range(2):
                made, of_input, *of_parameters = te_checks.run_module(module, kind, x, gradient, numbers)
                names = [name for name, _ in module.named_parameters()]
                values = {"output": made, "input's gradient": of_input} | dict(zip(names, of_parameters, strict=True))
                found |= {f"{numbers} {kind} {turn} {name}": value.detach().cpu().clone() for name, value in values.items()}
                module.zero_grad()
            for name, form in list_forms(module):
                found |= {f"{numbers} {kind} form {name}{key}": part.cpu() for key, part in form.items()}
    torch.save(found, path)
    print(f"{len(found)} tensors in {path}")


def draw(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return normal BF16 numbers with a few large ones, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator)
    drawn.view(-1)[::97] *= 20
    return drawn.bfloat16()


def draw_parameters(module: torch.nn.Module) -> None:
    """Fill parameters with drawn numbers."""
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(draw(tuple(parameter.shape), 10 + index) * 0.05)


def find_width(kind: str) -> int:
    """Return the width of a module's output."""
    return 128 if kind in ("LayerNorm", "RMSNorm", "LayerNormMLP") else 256


def list_forms(module: Any) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Return the FP8 weights that a module would compute with: data and scales, by the quantizer's own names."""
    from counterflow.megatron.experts.packing import FORMS

    if not getattr(module, "fp8_initialized", False):
        return []
    quantizers = module._get_weight_quantizers()
    weights = [(name, p) for name, p in module.named_parameters() if "weight" in name and "norm" not in name]
    forms = []
    for (name, parameter), own in zip(weights, quantizers, strict=False):
        if (names := FORMS.get(type(own).__name__)) is None:
            continue
        quantizer = own.copy()
        quantizer.internal = False
        quantizer.set_usage(rowwise=True, columnwise=False)
        form = quantizer(parameter.detach())
        high, wide = (-(-size // BLOCK) for size in parameter.shape)
        # What pads the scales of blocks is not filled.
        forms.append(
            (name, {part: cut(getattr(form, part), high, wide) if "scale" in part else getattr(form, part) for part in names})
        )
    return forms


def cut(scales: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """Return the scales of ``high`` x ``wide`` blocks, or the one scale of a tensor."""
    return scales[:high, :wide].contiguous() if scales.dim() == 2 else scales


def compare_numbers(gpu: dict[str, torch.Tensor], cpu: dict[str, torch.Tensor]) -> "list[tuple[str, bool]]":
    """Return a line for each tensor that differs, and whether it may not."""
    lines = [(f"only in one of the two: {name}", True) for name in sorted(gpu.keys() ^ cpu.keys())]
    equal = 0
    for name in sorted(gpu.keys() & cpu.keys()):
        one, other = gpu[name], cpu[name]
        if one.shape == other.shape and torch.equal(one, other):
            equal += 1
            continue
        if one.shape != other.shape:
            lines.append((f"{name}: {tuple(one.shape)} on the GPU, {tuple(other.shape)} on the CPU", True))
            continue
        one, other = one.float(), other.float()
        off = float((one - other).norm() / other.norm().clamp_min(1e-30))
        share = float((one != other).float().mean())
        lines.append((f"{name}: {off:.1e} apart in norm, {share:.2%} of the values differ", " form " in name or off > BOUND))
    return [*lines, (f"{equal} of {len(gpu)} tensors are the same bits", False)]


if __name__ == "__main__":
    main()
