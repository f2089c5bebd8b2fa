"""Predicted loads: which predictor wins where, forecasts, and a slow predictor that remembers all to compare with."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from counterflow.arrays import Array
from counterflow.balance.files.loads import read_trace
from counterflow.balance.prediction import PREDICTORS, LoadPredictor
from counterflow.errors import BalanceError


def watch(counts: Array, horizon: int = 1) -> LoadPredictor:
    """A predictor that has seen them all."""
    predictor = LoadPredictor(*counts.shape[1:], horizon)
    for loads in counts:
        predictor.observe(loads)
    return predictor


def average(seen: list[float], weight: float) -> float:
    """Reference: an exponential average that starts at the first."""
    mean = seen[0]
    for value in seen[1:]:
        mean += weight * (value - mean)
    return mean


def extend_trend(seen: list[float], ahead: int) -> float:
    """Reference: Holt's linear trend."""
    level, slope = seen[0], 0.0
    for value in seen[1:]:
        before = level
        level = 0.3 * value + (1 - 0.3) * (level + slope)
        slope += 0.1 * (level - before - slope)
    return max(level + ahead * slope, 0.0)


def predict_slowly(seen: list[float], ahead: int) -> dict[str, float]:
    """Reference: an expert's load by each predictor, from all of its past."""
    last = seen[-8:]
    return {
        "ema fast": average(seen, 0.5),
        "ema slow": average(seen, 0.2),
        "window": sum(last) / len(last),
        "persistence": seen[-1],
        "trend": extend_trend(seen, ahead),
    }


def forecast_slowly(rows: list[list[float]], ahead: int, count: int) -> tuple[list[list[float]], dict[str, float]]:
    """Reference: one layer's forecasts after ``rows[micro-batch][expert]``, and the errors over persistence's."""
    error = dict.fromkeys(PREDICTORS, 0.0)
    made: list[list[dict[str, float]]] = []
    chosen: list[list[float]] = []
    following: list[list[float]] = []
    missed: list[list[float]] = []
    for now, row in enumerate(rows):
        if now >= ahead:
            for name in PREDICTORS:
                wrong = sum(abs(made[now - ahead][expert][name] - load) for expert, load in enumerate(row))
                error[name] += 0.1 * (wrong / max(sum(row), 1.0) - error[name])
        if now:
            missed.insert(0, [load - following[-1][expert] for expert, load in enumerate(row)])
        pasts = [[past[expert] for past in rows[: now + 1]] for expert in range(len(row))]
        made.append([predict_slowly(past, ahead) for past in pasts])
        best = min(PREDICTORS, key=error.__getitem__)
        chosen.append([predicted[best] for predicted in made[-1]])
        following.append([predict_slowly(past, 1)[best] for past in pasts])
    forecasts = [
        [max(load + more, 0.0) for load, more in zip(chosen[-1], miss, strict=True)] for miss in missed[: min(count, 32)]
    ]
    base = error["persistence"]
    return forecasts or [chosen[-1]], {name: error[name] / base if base else 1.0 for name in PREDICTORS}


@settings(max_examples=100, deadline=None)
@given(
    counts=hnp.arrays(np.int64, st.tuples(st.integers(1, 40), st.integers(1, 2), st.integers(1, 4)), elements=st.integers(0, 50)),
    horizon=st.integers(1, 5),
    count=st.integers(1, 40),
)
def test_forecasts_are_those_of_the_slow_predictor(counts: Array, horizon: int, count: int) -> None:
    predictor = watch(counts, horizon)
    forecasts, errors = predictor.forecast(count), predictor.errors()
    for layer in range(counts.shape[1]):
        expected, ratios = forecast_slowly(counts[:, layer].astype(float).tolist(), horizon, count)
        np.testing.assert_allclose(forecasts[:, layer], expected, rtol=1e-9, atol=1e-9)
        for name, ratio in ratios.items():
            assert errors[name][layer] == pytest.approx(ratio)


def make_noise(rng: np.random.Generator) -> Array:
    return rng.poisson(np.tile(rng.uniform(50, 200, 16), (200, 1)))


def make_drift(rng: np.random.Generator) -> Array:
    begin, end = rng.uniform(200, 2000, (2, 16))
    return np.round(begin + (end - begin) * np.linspace(0, 1, 200)[:, None])


def make_jumps(rng: np.random.Generator) -> Array:
    """Loads with noise that are dealt anew every five micro-batches."""
    return rng.poisson(np.repeat(rng.uniform(20, 200, (40, 16)), 5, axis=0))


@pytest.mark.parametrize("horizon", [1, 5])
def test_the_trend_wins_where_loads_drift(horizon: int) -> None:
    counts = make_drift(np.random.default_rng(0))[:, None]
    predictor = watch(counts[:-horizon], horizon)
    errors = predictor.errors()
    assert min(errors, key=lambda name: errors[name][0]) == "trend" and errors["trend"][0] < 0.5
    np.testing.assert_allclose(predictor.predict(), counts[-1], rtol=0.01)
    np.testing.assert_allclose(predictor.forecast(8), np.tile(counts[-1], (8, 1, 1)), rtol=0.015)


def test_averages_win_where_loads_are_noise() -> None:
    errors = watch(make_noise(np.random.default_rng(0))[:, None]).errors()
    assert errors["persistence"][0] == 1 and errors["ema slow"][0] < 0.8 and errors["window"][0] < 0.8
    assert max(errors["ema slow"][0], errors["window"][0]) < errors["ema fast"][0]


def test_the_fast_win_where_loads_jump() -> None:
    errors = watch(make_jumps(np.random.default_rng(0))[:, None]).errors()
    assert max(errors["ema fast"][0], 1) < min(errors["ema slow"][0], errors["window"][0])


def test_each_layer_has_the_predictor_that_errs_least_there() -> None:
    rng = np.random.default_rng(1)
    predictor = watch(np.stack((make_drift(rng), make_noise(rng), make_jumps(rng)), 1))
    errors = predictor.errors()
    best = [min(PREDICTORS, key=lambda name, layer=layer: errors[name][layer]) for layer in range(3)]
    assert best[0] == "trend" and best[1] in ("ema slow", "window") and best[2] in ("ema fast", "persistence")
    for layer, name in enumerate(best):
        np.testing.assert_array_equal(predictor.predict()[layer], predictor.predict_each()[name][layer])


def test_nothing_seen_is_uniform_and_one_seen_is_repeated() -> None:
    predictor = LoadPredictor(2, 3, horizon=2)
    np.testing.assert_array_equal(predictor.predict(), np.ones((2, 3)))
    assert predictor.forecast(4).shape == (1, 2, 3) and set(predictor.errors()) == set(PREDICTORS)
    counts = np.arange(6).reshape(2, 3)
    predictor.observe(counts)
    np.testing.assert_array_equal(predictor.predict(), counts)
    assert predictor.forecast(4).shape == (1, 2, 3)
    for rows in (1, 1, 2, 3, 4, 4):
        assert len(predictor.forecast(4)) == rows
        predictor.observe(counts)


def test_what_is_returned_is_the_callers_own() -> None:
    predictor = watch(np.ones((3, 1, 2)))
    for returned in (predictor.predict(), predictor.forecast(2), predictor.predict_each()["window"], predictor.state()["fast"]):
        returned[:] = 77
    np.testing.assert_array_equal(predictor.predict(), [[1, 1]])
    np.testing.assert_array_equal(predictor.forecast(2)[0], [[1, 1]])


def test_a_saved_state_goes_on_as_if_nothing_had_been() -> None:
    counts = np.random.default_rng(0).integers(0, 99, (60, 2, 4))
    predictor = watch(counts[:33], 3)
    other = LoadPredictor(2, 4, 3)
    other.load_state(predictor.state())
    for loads in counts[33:]:
        predictor.observe(loads)
        other.observe(loads)
        np.testing.assert_array_equal(other.forecast(9), predictor.forecast(9))


@pytest.mark.parametrize(
    ("sizes", "said"), [((0, 4, 1), "0 given for layers"), ((1, 0, 1), "0 given for experts"), ((1, 4, 0), "0 given for horizon")]
)
def test_bad_sizes_are_refused(sizes: tuple[int, int, int], said: str) -> None:
    with pytest.raises(BalanceError, match=said):
        LoadPredictor(*sizes)


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (np.ones((2, 3)), r"counts of type float64 and shape \(2, 3\); allowed: numbers of shape \(1, 2\)"),
        (np.array([["1", "2"]]), "counts of type <U1"),
        (np.array([[1, -1]]), "counts from -1 to 1; allowed: finite numbers, 0 or more"),
        (np.array([[1, np.nan]]), "counts from nan to nan"),
    ],
)
def test_bad_counts_are_refused(counts: Array, said: str) -> None:
    with pytest.raises(BalanceError, match=said):
        LoadPredictor(1, 2).observe(counts)


def test_bad_states_and_forecasts_are_refused() -> None:
    predictor = watch(np.ones((3, 1, 2)))
    state = predictor.state()
    short = {name: array for name, array in state.items() if name != "level"}
    for changed, said in (
        (LoadPredictor(1, 3).state(), r"state has float64 of shape \(8, 1, 3\) for loads; allowed: float64 of shape \(8, 1, 2\)"),
        (LoadPredictor(1, 2, 2).state(), "for predicted"),
        (short, "state has nothing for level"),
        (state | {"slow": state["slow"] * np.nan}, "state has numbers for slow that are not finite"),
        (state | {"seen": np.array(-1)}, "state has -1 for seen; allowed: 0 or more"),
    ):
        with pytest.raises(BalanceError, match=said):
            predictor.load_state(changed)
    np.testing.assert_array_equal(predictor.predict(), [[1, 1]])
    with pytest.raises(BalanceError, match="0 forecasts asked for; allowed: 1 or more"):
        predictor.forecast(0)


@pytest.mark.parametrize(("horizon", "most"), [(1, 0.9), (20, 0.95)])
def test_real_routing_is_predicted_better_than_by_persistence(shared_data: Path, horizon: int, most: float) -> None:
    counts = read_trace(shared_data / "routing_a.npz")
    predictor = LoadPredictor(*counts.shape[1:], horizon)
    made = []
    for loads in counts:
        predictor.observe(loads)
        made.append(predictor.predict())
    missed = np.abs(made[:-horizon] - counts[horizon:]).sum()
    assert missed < most * np.abs(counts[:-horizon] - counts[horizon:]).sum()
