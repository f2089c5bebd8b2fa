"""Predict the loads of the next micro-batches from past ones; each layer uses the predictor with the least error there."""

import numpy as np

from counterflow.arrays import Array
from counterflow.errors import BalanceError

# With equal errors, and before any are known, the first is used. The weights were chosen on recorded routing, see
# benchmarks/prediction.py: one of the two averages was within about 1 % of the best, for 1, 5 and 20 micro-batches ahead.
PREDICTORS = ("ema fast", "ema slow", "window", "persistence", "trend")
FAST, SLOW = 0.5, 0.2
WINDOW = 8
# Holt's linear trend: the weight of a new load in the level, and of the level's last change in the slope.
LEVEL, SLOPE = 0.3, 0.1
# The weight of the last micro-batch's error.
SMOOTHING = 0.1
# How many misses are kept for forecasts.
KEPT = 32


class LoadPredictor:
    """Predicts the loads of a model's layers, ``horizon`` micro-batches ahead, which is the distance to the next plan.

    It keeps ``5 * horizon + 46`` arrays of ``float64[layers, experts]``. Raises `BalanceError` for sizes below 1.
    """

    def __init__(self, layers: int, experts: int, horizon: int = 1) -> None:
        for name, size in (("layers", layers), ("experts", experts), ("horizon", horizon)):
            if size < 1:
                raise BalanceError(f"{size} given for {name}; allowed: 1 or more")
        self.shape = (layers, experts)
        self.horizon = horizon
        self._seen = 0
        # Ring buffers, by the number of the micro-batch: loads, the predictions of all predictors, and misses.
        self._loads = np.zeros((WINDOW, *self.shape))
        self._predicted = np.zeros((horizon, len(PREDICTORS), *self.shape))
        self._missed = np.zeros((KEPT, *self.shape))
        # The predictions of the chosen predictors: at the horizon, and for the next micro-batch.
        self._chosen, self._next = np.ones((2, *self.shape))
        self._fast, self._slow, self._level, self._slope = np.zeros((4, *self.shape))
        self._errors = np.zeros((len(PREDICTORS), layers))

    def observe(self, counts: Array) -> None:
        """Take the next micro-batch's ``counts[layers, experts]``, tokens per expert, and score the predictions for it.

        Raises `BalanceError` for another shape, and for counts that are negative or not finite.
        """
        counts = np.asarray(counts)
        if counts.shape != self.shape or counts.dtype.kind not in "iuf":
            raise BalanceError(f"counts of type {counts.dtype} and shape {counts.shape}; allowed: numbers of shape {self.shape}")
        if not (np.isfinite(counts).all() and counts.min() >= 0):
            raise BalanceError(f"counts from {counts.min()} to {counts.max()}; allowed: finite numbers, 0 or more")
        loads = counts.astype(np.float64)
        self._score(loads)
        self._update(loads)
        self._seen += 1
        place = (self._seen - 1) % self.horizon
        self._predicted[place] = self._apply_predictors(self.horizon)
        best, layers = self._errors.argmin(0), np.arange(self.shape[0])
        self._chosen = self._predicted[place, best, layers]
        self._next = self._apply_predictors(1)[best, layers]

    def predict(self) -> Array:
        """Return ``float64[layers, experts]``, each layer's load in a micro-batch by the predictor with the least error there.

        Before the first micro-batch every expert has the load 1, since an untrained router prefers none.
        """
        return self._chosen.copy()

    def predict_each(self) -> dict[str, Array]:
        """Return ``float64[layers, experts]`` of every predictor."""
        if not self._seen:
            return dict.fromkeys(PREDICTORS, np.ones(self.shape))
        return dict(zip(PREDICTORS, self._predicted[(self._seen - 1) % self.horizon].copy(), strict=True))

    def forecast(self, count: int) -> Array:
        """Return possible loads, ``float64[forecasts, layers, experts]``: the prediction plus each past miss, the last one first.

        A miss is a load minus its prediction one micro-batch before. (Misses of predictions far ahead, say 20 micro-batches, are
        much the same from one micro-batch to the next, so all forecasts would err in the same direction.) There are ``count``
        forecasts, but at most 32 and at most as many as misses; before the first miss, only the prediction. No load is below 0.
        Raises `BalanceError` for a count below 1.
        """
        if count < 1:
            raise BalanceError(f"{count} forecasts asked for; allowed: 1 or more")
        known = min(count, KEPT, self._seen - 1)
        if known < 1:
            return self.predict()[None]
        last = (self._seen - 1 - np.arange(known)) % KEPT
        forecasts: Array = np.maximum(self.predict() + self._missed[last], 0.0)
        return forecasts

    def errors(self) -> dict[str, Array]:
        """Return ``float64[layers]`` for each predictor: its error over that of persistence, 1 where the latter is 0 or unknown.

        An error is the sum of absolute misses over the sum of loads, averaged with more weight on later micro-batches.
        """
        base = self._errors[PREDICTORS.index("persistence")]
        ratios = np.divide(self._errors, base, out=np.ones_like(self._errors), where=base > 0)
        return dict(zip(PREDICTORS, ratios, strict=True))

    def state(self) -> dict[str, Array]:
        """Return the predictor's state as arrays, for `load_state` of a predictor of the same sizes."""
        arrays = {name[1:]: value.copy() for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return {"seen": np.array(self._seen, np.int64), **arrays}

    def load_state(self, state: dict[str, Array]) -> None:
        """Continue from a state that `state` returned.

        Raises `BalanceError` if arrays are missing, have another size, or are not finite.
        """
        own = self.state()
        for name, array in own.items():
            saved = state.get(name)
            if saved is None or (saved.shape, saved.dtype) != (array.shape, array.dtype):
                found = "nothing" if saved is None else f"{saved.dtype} of shape {saved.shape}"
                raise BalanceError(
                    f"state has {found} for {name}; allowed: {array.dtype} of shape {array.shape}, as this size saves it"
                )
            if not np.isfinite(saved).all():
                raise BalanceError(f"state has numbers for {name} that are not finite; allowed: what a predictor saved")
        if state["seen"] < 0:
            raise BalanceError(f"state has {state['seen']} for seen; allowed: 0 or more")
        for name in own:
            setattr(self, f"_{name}", state[name].copy())
        self._seen = int(state["seen"])

    def _score(self, loads: Array) -> None:
        if self._seen:
            self._missed[self._seen % KEPT] = loads - self._next
        if self._seen < self.horizon:
            return
        place = self._seen % self.horizon
        total = np.maximum(loads.sum(-1), 1.0)
        error = np.abs(self._predicted[place] - loads).sum(-1) / total
        self._errors += SMOOTHING * (error - self._errors)

    def _update(self, loads: Array) -> None:
        self._loads[self._seen % WINDOW] = loads
        if not self._seen:
            self._fast, self._slow, self._level = loads.copy(), loads.copy(), loads.copy()
            return
        self._fast += FAST * (loads - self._fast)
        self._slow += SLOW * (loads - self._slow)
        level = LEVEL * loads + (1 - LEVEL) * (self._level + self._slope)
        self._slope += SLOPE * (level - self._level - self._slope)
        self._level = level

    def _apply_predictors(self, ahead: int) -> Array:
        """Return ``float64[predictors, layers, experts]`` in the order of `PREDICTORS`."""
        window = self._loads[: min(self._seen, WINDOW)].mean(0)
        trend = np.maximum(self._level + ahead * self._slope, 0.0)
        return np.stack((self._fast, self._slow, window, self._loads[(self._seen - 1) % WINDOW], trend))
