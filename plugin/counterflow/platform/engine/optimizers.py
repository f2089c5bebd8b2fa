"""Functions over lists of tensors that optimizers use: scaling, norms, Adam."""

import torch

Tensor = torch.Tensor
Lists = list[list[Tensor]]


def multi_tensor_scale(chunk: int, noop: Tensor, lists: Lists, scale: float) -> None:
    """Put ``scale`` times each tensor of the first list into its place of the second."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source.float() * float(scale))


def multi_tensor_scale_tensor(chunk: int, noop: Tensor, lists: Lists, scale: Tensor) -> None:
    """Do the same with a scale that is a tensor."""
    multi_tensor_scale(chunk, noop, lists, float(scale))


def multi_tensor_l2norm(chunk: int, noop: Tensor, lists: Lists, per_tensor: bool = False) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together, ``[1]``, and if asked for that of each."""
    norms = [tensor.float().norm() for tensor in lists[0]]
    if not norms:
        return torch.zeros(1), torch.zeros(0)
    stacked = torch.stack(norms)
    return stacked.norm().reshape(1), stacked if per_tensor else torch.zeros(0)


def multi_tensor_unscale_l2norm(
    chunk: int, noop: Tensor, lists: Lists, inverse: Tensor, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the same norms of the tensors times ``inverse``."""
    return multi_tensor_l2norm(chunk, noop, [[tensor.float() * inverse for tensor in lists[0]]], per_tensor)


def multi_tensor_adam(
    chunk: int,
    noop: Tensor,
    lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Take a step of Adam (``mode`` 0) or AdamW (1); ``lists`` is gradients, parameters, two moments and perhaps masters."""
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, first, second, *masters in zip(*lists, strict=True):
        target = masters[0] if masters else parameter
        g, p = gradient.float(), target.float()
        if mode == 0:
            g = g + weight_decay * p
        m, v = beta1 * first.float() + (1 - beta1) * g, beta2 * second.float() + (1 - beta2) * g * g
        first.copy_(m)
        second.copy_(v)
        update = m / correction1 / ((v / correction2).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * p
        p = p - lr * update
        target.copy_(p)
        if masters:
            parameter.copy_(p)
