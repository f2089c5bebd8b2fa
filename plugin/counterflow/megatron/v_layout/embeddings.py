"""Embeddings of which a V holds two copies, both on pipeline rank 0: in its first and in its last stage.

With tied embeddings the last stage's output weight, and with multi-token prediction its embedding, is a copy of the first
stage's embedding. Upstream expects the copies on the first and the last pipeline rank and keeps them equal by collectives
between the two. In a V both are here: the copy is filled and the gradients are added without a message.

Upstream's marks are kept: it gives both copies, ``shared_embedding``, gradient buckets of their own, so that the shards of
a distributed optimizer lie alike in both; the second is ``shared``, so that norms count it once; checkpoints name both by
the first one's key, under which one of the two is saved, and both are loaded.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor


def keep_embeddings_on_first_rank(initialize_model_parallel: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap upstream's making of process groups: the embedding group is pipeline rank 0 alone."""

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
    """Give both copies the sum of their gradients, after these have been reduced over the data-parallel ranks.

    Of a reduce-scattered gradient only this rank's shard is valid; it is the same part of both copies.
    """
    copies = [copy for copy in _find_copies(chunks) if copy.requires_grad]
    if len(copies) > 1:
        gradients = [getattr(copy, "main_grad", copy.grad) for copy in copies]
        for gradient in gradients[1:]:
            gradients[0].add_(gradient)
        for gradient in gradients[1:]:
            gradient.copy_(gradients[0])


def save_copies_once(distribute_main_replicas: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap upstream's choice of what each rank saves: of two copies on one rank the first is saved.

    Upstream marks a shard as this rank's to save by the shard's name, which two copies share.
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
    """Wrap upstream's reading of a checkpoint: no two of the tensors that it returns are one.

    Upstream hands out by a shard's name what the ranks have read for each other, and two copies share it. What an optimizer then
    keeps for them would be one tensor, updated twice in every step.
    """

    @wraps(load)
    def load_apart(*args: Any, **kwargs: Any) -> Any:
        return separate_copies(load(*args, **kwargs))

    return load_apart


def separate_copies(loaded: Any) -> Any:
    """Return what was read of a checkpoint, in which no two tensors are one any more."""
    seen: set[int] = set()

    def separate(value: Any) -> Any:
        if not torch.is_tensor(value) or not value.numel():
            return value
        # Not the storage: what a buffer holds side by side is apart already. A quantized tensor has no address.
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
    """Return the marked parameters in the order of the stages; [] where nothing is shared or on other ranks."""
    return [parameter for chunk in chunks for parameter in chunk.parameters() if getattr(parameter, "shared_embedding", False)]
