"""The two copies of an embedding that a V holds on pipeline rank 0, in its first and in its last stage.

With tied embeddings the last stage's output weight, and with multi-token prediction its embedding, is a copy of the first
stage's embedding. Megatron expects the copies on the first and the last pipeline rank and keeps them equal by collectives
between the two. In a V both are on one rank: the copy is filled, and the gradients are added, without a message.

Megatron's marks are kept. Both copies have ``shared_embedding``, so each gets a gradient bucket of its own and the shards of
a distributed optimizer are cut alike in both. The second has ``shared``, so norms count it once. Checkpoints use the first
one's key for both: one of the two is saved, and both are loaded.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor


def keep_embeddings_on_first_rank(initialize_model_parallel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's creation of process groups: the embedding group is pipeline rank 0 alone."""

    @wraps(initialize_model_parallel)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        return initialize_model_parallel(*args, **{**kwargs, "get_embedding_ranks": lambda pipeline_ranks: pipeline_ranks[:1]})

    return initialize


def copy_embedding(chunks: list[Any]) -> None:
    """Fill the last stage's copy with the first stage's embedding; upstream leaves zeros in it."""
    copies = _find_copies(chunks)
    for copy in copies[1:]:
        copy.data.copy_(copies[0].data)


def add_embedding_gradients(chunks: list[Any]) -> None:
    """Set the gradient of both copies to their sum, after the reduction over the data-parallel ranks.

    After a reduce-scatter only this rank's shard is valid; it is the same part in both copies.
    """
    copies = [copy for copy in _find_copies(chunks) if copy.requires_grad]
    if len(copies) > 1:
        gradients = [getattr(copy, "main_grad", copy.grad) for copy in copies]
        for gradient in gradients[1:]:
            gradients[0].add_(gradient)
        for gradient in gradients[1:]:
            gradient.copy_(gradients[0])


def save_copies_once(distribute_main_replicas: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's choice of the shards that each rank saves: of two copies on one rank, only the first is saved.

    Megatron chooses by the shard's name, and both copies have the same name.
    """

    @wraps(distribute_main_replicas)
    def distribute(sharded_state_dict: Any, *args: Any, **kwargs: Any) -> None:
        distribute_main_replicas(sharded_state_dict, *args, **kwargs)
        chosen: set[Any] = set()
        for shard in nested_values(sharded_state_dict):
            if isinstance(shard, ShardedTensor) and shard.replica_id == 0:
                name = (shard.key, shard.global_offset)
                shard.replica_id = int(name in chosen)
                chosen.add(name)

    return distribute


def load_copies_apart(load: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Megatron's reading of a checkpoint: each tensor that it returns gets memory of its own.

    If ranks read for each other, Megatron hands out tensors by the shard's name, so both copies get the same tensor. The
    optimizer would then keep one moment for both and update it twice in every step.
    """

    @wraps(load)
    def load_apart(*args: Any, **kwargs: Any) -> Any:
        return separate_copies(load(*args, **kwargs))

    return load_apart


def separate_copies(loaded: Any) -> Any:
    """Return what was read from a checkpoint, with a clone in place of each tensor that occurs a second time."""
    seen: set[int] = set()

    def separate(value: Any) -> Any:
        if not torch.is_tensor(value) or not value.numel():
            return value
        # Addresses are compared, not storages: two parts of one buffer are not the same tensor. A quantized tensor has no
        # address.
        place = value.data_ptr() or id(value)
        if place in seen:
            return value.clone()
        seen.add(place)
        return value

    for part in loaded if isinstance(loaded, tuple) else (loaded,):
        if isinstance(part, dict | list):
            dict_list_map_inplace(separate, part)
    return loaded


def _find_copies(chunks: list[Any]) -> list[Any]:
    """Return the parameters marked ``shared_embedding``, in the order of the stages; [] if this rank has none."""
    return [parameter for chunk in chunks for parameter in chunk.parameters() if getattr(parameter, "shared_embedding", False)]
