"""The symbols of torch that `counterflow.trainer.splits` replaces, for models made of torch's modules."""

from counterflow.trainer.seam import Seam

SPLITS = "counterflow.trainer.splits"
WAITS = "weight gradients wait for the W"


def list_split_seams(feature: str, versions: tuple[str, ...]) -> tuple[Seam, ...]:
    """Return the seams of split backward passes, as a feature of an adapter for these versions of its trainer."""
    common = (feature,), versions
    return (
        *(
            Seam("torch.nn.functional", name, f"{SPLITS}.split_{name}", *common, WAITS)
            for name in ("linear", "embedding", "conv1d", "conv2d", "conv3d")
        ),
        Seam("torch", "matmul", f"{SPLITS}.split_matmul", *common, WAITS, alone=True),
        Seam(
            "torch.autograd", "backward", f"{SPLITS}.split_backward", *common,
            "a backward from a loss may be split in its graph", ("tensors",), alone=True,
        ),
        Seam(
            "torch.Tensor", "register_hook", f"{SPLITS}.split_hooks", *common, "the nodes of tensors with hooks run once",
            ("self", "hook"),
        ),
    )  # fmt: skip
