"""A seam: one symbol of the trainer that an adapter replaces, calls or reads, as a value that can be checked and installed."""

import importlib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType
from typing import Any

from packaging.version import Version

from counterflow.errors import SeamError
from counterflow.patching import Patches

Wrapper = Callable[[Any], Any]


@dataclass(frozen=True)
class Seam:
    """The attribute ``symbol`` of ``owner``, a module or a class, both dotted.

    ``wrap`` is the name of a function that takes the original and returns its replacement; None if the symbol is only called or
    read. ``features`` need the seam. ``versions`` are the trainer's releases on which it was checked, oldest first. A release
    within their range that is not among them has no such symbol, and the seam is not used.

    A function's parameters must begin with ``parameters``. A module's symbol is replaced wherever it was imported by name, or
    only in its module (``alone``).
    """

    owner: str
    symbol: str
    wrap: str | None
    features: tuple[str, ...]
    versions: tuple[str, ...]
    why: str
    parameters: tuple[str, ...] = ()
    alone: bool = False

    @property
    def path(self) -> str:
        """The symbol's full name."""
        return f"{self.owner}.{self.symbol}"

    def is_due(self, version: str, known: tuple[str, ...]) -> bool:
        """Tell whether a release has the symbol; an unknown release counts as the nearest ``known`` one."""
        major, minor = (*Version(version).release, 0)[:2]
        nearest = min(known, key=lambda one: abs(Version(one).minor - minor) if Version(one).major == major else 1000)
        return nearest in self.versions

    def find_misfit(self) -> str | None:
        """Return what is wrong with the symbol; None if it fits."""
        try:
            owner = self.find_owner()
        except ImportError as error:
            return f"cannot be imported: {error}"
        if not _has(owner, self.symbol):
            return "does not exist"
        if not self.parameters:
            return None
        found = inspect.signature(inspect.unwrap(_find(owner, self.symbol))).parameters
        if tuple(found)[: len(self.parameters)] != self.parameters:
            return f"takes ({', '.join(found)}) where ({', '.join(self.parameters)}, …) is expected"
        return None

    def find_owner(self) -> Any:
        """Import the module or the class that has the symbol; raises `ImportError` if there is none."""
        parts = self.owner.split(".")
        for size in range(len(parts), 0, -1):
            name = ".".join(parts[:size])
            try:
                owner = importlib.import_module(name)
            except ModuleNotFoundError as error:
                if error.name != name or size == 1:
                    raise
                continue
            for part in parts[size:]:
                if not hasattr(owner, part):
                    raise ImportError(f"{name} has no {part}")
                owner = getattr(owner, part)
            return owner
        raise ImportError(self.owner)

    def take(self, patches: Patches, wrap: Wrapper) -> None:
        """Put ``wrap(original)`` in the symbol's place."""
        owner = self.find_owner()
        if isinstance(owner, ModuleType) and not self.alone:
            patches.replace(owner, self.symbol, wrap)
        else:
            patches.set(owner, self.symbol, wrap(getattr(owner, self.symbol)))


def take_seams(seams: Iterable[Seam], patches: Patches, features: Collection[str], package: str, run: Any = None) -> None:
    """Install the wrappers of the seams that these features need; ``package`` and ``run`` are those of `find_wrapper`."""
    for seam in seams:
        if seam.wrap is not None and set(features) & set(seam.features):
            seam.take(patches, find_wrapper(seam.wrap, package, run))


def find_wrapper(name: str, package: str, run: Any) -> Wrapper:
    """Return the wrapper that a seam names.

    It is an attribute of ``run``, the adapter's installation, if the name begins with a dot; else a function of the project, by
    its full name or by its name in the adapter's ``package``.
    """
    if name.startswith("."):
        return attrgetter(name[1:])(run)  # type: ignore[no-any-return]
    home, _, function = name.rpartition(".")
    full = home if home.startswith("counterflow.") else f"{package}.{home}"
    return getattr(importlib.import_module(full), function)  # type: ignore[no-any-return]


def _has(owner: Any, symbol: str) -> bool:
    """Tell whether ``owner`` has the symbol; for a class, also whether its ``__init__`` sets it on instances."""
    if _find(owner, symbol) is not None or symbol in vars(owner) or symbol in getattr(owner, "__annotations__", {}):
        return True
    makers = [inspect.unwrap(vars(one)["__init__"]) for one in getattr(owner, "__mro__", ()) if "__init__" in vars(one)]
    return any(symbol in maker.__code__.co_names for maker in makers if hasattr(maker, "__code__"))


def _find(owner: Any, symbol: str) -> Any:
    for name in symbol.split("."):
        owner = getattr(owner, name, None)
    return owner


def list_used(
    owner: str, features: tuple[str, ...], versions: tuple[str, ...], symbols: Mapping[str, str | tuple[str, tuple[str, ...]]]
) -> list[Seam]:
    """Return the seams of symbols of one owner that are only called, read or extended.

    ``symbols`` says of each what for, and with which parameters where that matters.
    """
    told = {symbol: (why, ()) if isinstance(why, str) else why for symbol, why in symbols.items()}
    return [Seam(owner, symbol, None, features, versions, why, parameters) for symbol, (why, parameters) in told.items()]


def check_seams(
    seams: Iterable[Seam], features: Iterable[str], trainer: str, supported: str, remedies: Mapping[str, str]
) -> None:
    """Raise `SeamError`, one line of trainer, symbol and the feature's remedy, if a seam of the features does not fit."""
    given = list(seams)
    for feature in features:
        for seam in given:
            if feature in seam.features and (misfit := seam.find_misfit()):
                raise SeamError(
                    f"{trainer}: {seam.path} {misfit}; this version of counterflow supports {supported}: install one of them "
                    f"and what it imports, or {remedies[feature]}"
                )
