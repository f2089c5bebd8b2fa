"""The distribution's version, and those of others."""

from importlib import metadata

__version__ = "0.1.0"


def find_package(name: str) -> str | None:
    """Return the installed version of a distribution, None where there is none."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
