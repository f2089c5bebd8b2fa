"""Replace attributes of other people's modules, and put every one of them back.

Megatron imports functions by name (``from m import f``), so a replacement has to reach each loaded
module whose attribute *is* the original. Modules loaded later read the replacement from its home.
"""

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_ABSENT = object()


class Patches:
    """An undo log of what was changed."""

    def __init__(self) -> None:
        self._log: list[Callable[[], None]] = []

    def __bool__(self) -> bool:
        return bool(self._log)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Assign ``owner.name = value`` and remember what was there."""
        original = vars(owner).get(name, _ABSENT)
        if original is _ABSENT:
            self.on_undo(lambda: delattr(owner, name))
        else:
            self.on_undo(lambda: setattr(owner, name, original))
        setattr(owner, name, value)

    def on_undo(self, action: Callable[[], None]) -> None:
        """Run ``action`` when the patches are undone."""
        self._log.append(action)

    def replace(self, home: ModuleType, name: str, wrap: Callable[[Any], Any]) -> None:
        """Replace ``home.name`` by ``wrap(original)`` there and wherever it was imported by name."""
        original = getattr(home, name)
        replacement = wrap(original)
        for module in list(sys.modules.values()):
            if isinstance(module, ModuleType) and vars(module).get(name, _ABSENT) is original:
                self.set(module, name, replacement)

    def undo(self) -> None:
        """Put every original back, newest first."""
        while self._log:
            self._log.pop()()
