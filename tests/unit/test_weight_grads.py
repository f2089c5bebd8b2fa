"""Weight-gradient work runs at once, or waits for whoever holds it."""

import pytest

from counterflow.runtime import defer_weight_grad, hold_weight_grads


def test_at_once_in_a_b_and_later_in_an_i() -> None:
    done: list[int] = []
    defer_weight_grad(lambda: done.append(1))
    assert done == [1]
    with hold_weight_grads() as queue:
        defer_weight_grad(lambda: done.append(2))
        defer_weight_grad(lambda: done.append(3))
        assert done == [1], "an I did the work of its W"
    for compute in queue:
        compute()
    assert done == [1, 2, 3]


def test_an_error_in_an_i_ends_the_holding() -> None:
    done: list[int] = []
    with pytest.raises(KeyError), hold_weight_grads():
        raise KeyError
    defer_weight_grad(lambda: done.append(1))
    assert done == [1], "the next backward's work would be lost"


def test_an_i_inside_an_i_is_an_error() -> None:
    with hold_weight_grads(), pytest.raises(RuntimeError, match="held already"), hold_weight_grads():
        pass
