"""Real text for the example: Python's standard library, one token per byte."""

import sysconfig
from pathlib import Path

import numpy as np
import torch

END_OF_DOCUMENT = 256
MAX_BYTES = 16 * 2**20
SKIPPED = {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def list_sources(root: Path) -> list[Path]:
    """Return the library's Python files in a fixed order."""
    return sorted(path for path in root.rglob("*.py") if not SKIPPED & set(path.relative_to(root).parts))


def prepare_text(directory: Path, max_bytes: int = MAX_BYTES) -> Path:
    """Write the data set in Megatron's indexed format, once; return its path prefix.

    Takes whole files until ``max_bytes`` are reached.

    A finished data set has its ``.idx`` file: it is written last and renamed into place, so that an
    interrupted run leaves nothing that looks whole.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = directory / "python-stdlib-bytes"
    binary, index = prefix.with_suffix(".bin"), prefix.with_suffix(".idx")
    if index.exists() and binary.exists():
        return prefix
    directory.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(str(binary), dtype=np.uint16)
    written = 0
    for path in list_sources(Path(sysconfig.get_paths()["stdlib"])):
        document = np.frombuffer(path.read_bytes(), dtype=np.uint8).astype(np.int32)
        builder.add_item(torch.from_numpy(np.append(document, END_OF_DOCUMENT).astype(np.int32)))
        builder.end_document()
        written += document.size
        if written >= max_bytes:
            break
    unfinished = index.with_suffix(".idx.part")
    builder.finalize(str(unfinished))
    unfinished.replace(index)
    return prefix
