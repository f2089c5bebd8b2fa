"""Counterflow: DualPipe schedules and expert balancing for Megatron-Core, by flags.

Importing changes nothing; `enable` (or ``python -m counterflow.launch SCRIPT``) installs the seams.
"""

import sys
from collections.abc import Mapping
from typing import Any

from counterflow.config import Options, merge_options, read_flags, read_mapping
from counterflow.patching import Patches
from counterflow.version import __version__

__all__ = ["Options", "__version__", "enable"]

_enabled: Patches | None = None


def enable(options: Options | Mapping[str, Any] | None = None) -> Patches:
    """Install the plugin into Megatron in this process; call it before the script's ``pretrain``.

    ``options`` is an `Options` or a mapping of its names; ``--cf-*`` flags of the command line are added to
    it and win. A second call changes nothing. Returns the undo log.

    Raises `OptionError` for bad options and `SeamError` where Megatron is not as expected.
    """
    global _enabled
    if _enabled:
        return _enabled
    flags = read_flags(sys.argv[1:])
    if options is not None:
        flags = merge_options(options if isinstance(options, Options) else read_mapping(options), flags)

    from counterflow.platform import install_cpu, needs_cpu

    patches = install_cpu() if needs_cpu(flags.platform) else Patches()
    from counterflow.megatron.seams import install_flags

    install_flags(patches, flags)
    _enabled = patches
    return patches
