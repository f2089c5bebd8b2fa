"""Copies of the embedding in a V's checkpoints."""

from typing import Any

import torch

from counterflow.megatron.v_layout.embeddings import load_copies_apart


def list_tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, dict | list):
        return [tensor for part in (value.values() if isinstance(value, dict) else value) for tensor in list_tensors(part)]
    return [value] if torch.is_tensor(value) else []


def test_no_two_loaded_tensors_are_one() -> None:
    moments, buffer = torch.arange(6.0).reshape(2, 3), torch.arange(4.0)

    def read() -> Any:
        return {
            "model0": {"embedding": moments[:]},
            "optimizer": {"state": [{"exp_avg": moments, "step": 3}, {"exp_avg": moments, "empty": torch.empty(0)}]},
            "side by side": [buffer[:2], buffer[2:]],
            "args": "no tensor",
        }

    expected, found = read(), load_copies_apart(read)()
    tensors = [tensor for tensor in list_tensors(found) if tensor.numel()]
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)
    for one, other in zip(list_tensors(found), list_tensors(expected), strict=True):
        assert torch.equal(one, other)
    assert found["side by side"][1].data_ptr() == buffer[2:].data_ptr(), "what is apart already was copied"
    assert found["args"] == "no tensor" and found["optimizer"]["state"][0]["step"] == 3


def test_what_else_a_reader_returns_stays() -> None:
    tensor = torch.ones(2)
    assert load_copies_apart(lambda: (None, "", False))() == (None, "", False)
    state, name, *rest = load_copies_apart(lambda: ({"a": tensor, "b": tensor}, "iter_0000002", False))()
    assert (name, rest) == ("iter_0000002", [False])
    state["a"].add_(1)
    assert state["b"].tolist() == [1, 1]
