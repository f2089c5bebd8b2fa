"""Counterflow: DualPipe schedules and expert balancing for Megatron-Core, by flags.

Importing changes nothing; `enable` (or ``python -m counterflow.launch SCRIPT``) installs the seams.
"""

import sys
from collections.abc import Mapping
from typing import Any

from counterflow.config import Options, read_flags, read_mapping
from counterflow.patching import Patches
from counterflow.version import __version__

__all__ = ["Options", "__version__", "enable"]

_enabled: Patches | None = None


def enable(options: Options | Mapping[str, Any] | None = None) -> Patches:
    """Install the plugin into Megatron in this process; call it before the script's ``pretrain``.

    ``options`` is an `Options`, a mapping of its names, or None to read the ``--cf-*`` flags of the
    command line. A second call changes nothing. Returns the undo log.

    Raises `OptionError` for bad options and `SeamError` where Megatron is not as expected.
    """
    global _enabled
    if _enabled:
        return _enabled
    if options is None:
        options = read_flags(sys.argv[1:])
    elif not isinstance(options, Options):
        options = read_mapping(options)

    from counterflow.platform import install_cpu, needs_cpu

    patches = install_cpu() if needs_cpu(options.platform) else Patches()
    from counterflow.megatron.seams import install_flags

    install_flags(patches, options)
    _enabled = patches
    return patches
