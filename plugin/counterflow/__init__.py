"""Counterflow: DualPipe schedules and expert balancing for Megatron-Core, by flags.

Importing changes nothing; `enable` (or ``python -m counterflow.launch SCRIPT``) installs the seams.
"""

import ast
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counterflow.options import Options, read_flags, read_values
from counterflow.patching import Patches
from counterflow.version import __version__

if TYPE_CHECKING:
    from counterflow.deepspeed.install import Installation as DeepSpeedInstallation
    from counterflow.megatron.install import Installation

MEGATRON, DEEPSPEED = "megatron", "deepspeed"
# What scripts import that train with DeepSpeed without importing it.
OVER_DEEPSPEED = ("accelerate", "Trainer")

__all__ = ["Options", "__version__", "enable", "find_data_rank", "lay_out_chunks"]

_installation: "Installation | DeepSpeedInstallation | None" = None


def enable(options: Options | Mapping[str, Any] | None = None) -> Patches:
    """Put the plugin in force in this process, under ``megatron.training`` and in any other loop over ``megatron.core``.

    Call it before process groups and models are made. ``options`` is an `Options` or a mapping of its names; ``--cf-*`` flags of
    the command line are added to it and win, whatever their value. A loop of your own builds its model chunks by
    `lay_out_chunks`. Returns the undo log.

    Raises `OptionError` for bad options, and in a second call for options that differ from those in force. Raises `SeamError` if
    Megatron is not as expected.
    """
    global _installation
    values = read_values(options) if options is not None else {}
    flags = read_flags(sys.argv[1:])
    if (installation := _find_installation()) is not None:
        installation.require_same(values | flags)
        return installation.patches
    if find_trainer(Path(sys.argv[0])) == DEEPSPEED:
        return _enable_deepspeed(values, flags)

    from counterflow.platform import install_cpu, needs_cpu
    from counterflow.platform.engine import asks_for_engine

    is_on_cpu = needs_cpu((values | flags).get("platform", "auto"))
    is_stood_in = is_on_cpu and asks_for_engine(sys.argv[1:])
    if not is_stood_in:
        from counterflow.megatron.engine_checks import check_installed

        check_installed()
    patches = install_cpu(engine=is_stood_in) if is_on_cpu else Patches()
    from counterflow.megatron.install import install

    try:
        _installation = install(patches, values, flags)
    except BaseException:
        patches.undo()
        raise
    return patches


def lay_out_chunks(build_chunk: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the function with which a loop over ``megatron.core`` builds a model chunk, as the schedule in force needs it.

    ``build_chunk`` is called for every chunk of a pipeline rank in order with ``vp_stage=0``, ``vp_stage=1``, …, and returns a
    ``MegatronModule``. It may take ``pre_process``, ``post_process`` and ``pg_collection``, or ask ``parallel_state``. Under a
    schedule in a V, chunk 1 is built as if this rank were its mirror image; elsewhere, and without the plugin, nothing changes.
    ``megatron.training`` does this by itself.
    """
    installation = _find_installation()
    if installation is None or installation.options is None or find_trainer(Path(sys.argv[0])) == DEEPSPEED:
        return build_chunk
    from counterflow.megatron.v_layout.model import lay_out_for

    return lay_out_for(installation.options, build_chunk)


def find_data_rank(vp_stage: int) -> int:
    """Return the data-parallel rank whose samples a model chunk reads.

    A loop over ``megatron.core`` has a data iterator for each chunk of a pipeline rank, all over the same samples. Under full
    DualPipe alone chunk 1 runs the micro-batches of the partner replica, and so reads the partner's samples.
    """
    from counterflow.megatron.install import get_data_rank

    installation = _find_installation()
    return get_data_rank() if installation is None else installation.find_data_rank(vp_stage)


def _enable_deepspeed(values: dict[str, Any], flags: dict[str, Any]) -> Patches:
    global _installation
    from counterflow.deepspeed.install import install

    patches = Patches()
    try:
        _installation = install(patches, values, flags)
    except BaseException:
        patches.undo()
        raise
    return patches


def find_trainer(script: Path) -> str:
    """Return the trainer of a script: DeepSpeed if it is imported already or the script imports it, and Megatron is not.

    Accelerate and the Trainer of transformers import DeepSpeed themselves, later.
    """
    imported = {name for name in (DEEPSPEED, MEGATRON) if name in sys.modules}
    try:
        nodes = list(ast.walk(ast.parse(script.read_bytes())))
    except (OSError, SyntaxError, ValueError):
        nodes = []
    imported |= {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and node.module == "transformers"]
    imported |= {alias.name for node in froms for alias in node.names if alias.name in OVER_DEEPSPEED}
    return DEEPSPEED if imported & {DEEPSPEED, *OVER_DEEPSPEED} and MEGATRON not in imported else MEGATRON


def _find_installation() -> "Installation | DeepSpeedInstallation | None":
    """Return the installation in force; None before `enable` and after its undo."""
    return _installation if _installation is not None and _installation.patches else None
