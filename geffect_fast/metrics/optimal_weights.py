"""The best token weights for a forget set, to first order, and files that hold them.

With `u_t` and `r_t` token `t`'s share of the effects of `ga` on the forget and the retain risk, an
objective with a weight for every token has

    e_u = sum_t w_t u_t,        e_r = sum_t w_t r_t,        0 <= w_t <= W,

so the most removal for a given harm, and the least harm for a given removal, are linear
programs in `w`. Both are one continuous knapsack, which sorting solves exactly, without a solver.
The signs of a token's two shares (removal is `u < 0`, harm `r < 0`) decide its weight:

    u < 0, r >= 0    full: it removes for nothing; also u = 0, r > 0
    u >= 0, r <= 0   0: it removes nothing, and may do harm
    u < 0, r < 0     costly: it removes `|u|` and does harm `|r|`
    u > 0, r > 0     repairing: it undoes removal `u` and harm `r`

The solution starts where `e_r` is largest: repairing tokens are full, costly ones are 0. To move a
token of either kind to the other end of its weight gains `W |u|` of removal for `W |r|` of harm.
The best order is therefore by descending `|u| / |r|`, and the gains add up to the frontier: a
concave curve with one vertex for each token, from the largest `e_r` to the smallest `e_u`. At most
one token's weight lies strictly between 0 and `W`: that of the token at which the budget runs out.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geffect_fast.data import read_rows, write_jsonl
from geffect_fast.data.batch import IGNORE
from geffect_fast.data.row_kinds import row_place
from geffect_fast.data.tokenize import question_of
from geffect_fast.errors import InputError, NonFiniteError
from geffect_fast.paths import user_path
from geffect_fast.results.axes import stored_text
from geffect_fast.results.intervals import effect_intervals
from geffect_fast.results.told_apart import has_intervals
from geffect_fast.storage.disk import whole_file

if TYPE_CHECKING:
    import xarray as xr

RISKS = ("unlearn", "retain")
ROUNDING = 1e-12
"""Relative error up to which a request beyond the attainable is met, since totals round."""


def optimal_weights(
    result: xr.Dataset,
    *,
    retain_budget: float | None = None,
    removal: float | None = None,
    max_weight: float = 1.0,
) -> xr.Dataset:
    """The weights of the forget set's tokens that give the most removal for an allowed harm.

        minimise e_u   subject to   e_r >= -retain_budget     (removal is e_u < 0, harm e_r < 0)
        maximise e_r   subject to   e_u <= removal            where `removal` is given instead

    over `0 <= w <= max_weight`, with `e_u = sum w u` and `e_r = sum w r` of the tokens' shares in
    the effects of `ga`. Training with these weights is the objective `token_weights`, with the
    same `reduction` as the result's; `write_weighted` writes its data.

    Args:
        result: a result of `profile`, with objective `ga`, risks `unlearn` and `retain`, and axes
            `sample` and `token`; other axes are summed.
        retain_budget: the allowed harm in units of `e_r`: a step of size `lr` may raise the retain
            risk by `lr * retain_budget`. 0 allows no harm, `inf` any; a negative number demands
            that the risk falls.
        removal: the `e_u` to reach at least, a negative number or 0. Give this or the budget.
        max_weight: the largest weight; `ga` has weight 1.

    Returns:
        A Dataset, all fp64. Samples are the forget rows and tokens their answers' label tokens,
        with the coordinates that they have in `result`.

        - `weight` (sample, token): the weights, NaN behind the end of an answer.
        - `e_u`, `e_r`: the effects at the optimum.
        - `frontier_e_u`, `frontier_e_r` (vertex): the best `e_u` for every `e_r`, from the largest
          `e_r` down; the frontier is linear between vertices.
        - `shadow_price`: the removal that one more unit of the budget would buy at the optimum; 0
          where nothing is left to buy.
        - `token_e_u`, `token_e_r` (sample, token): the shares `u` and `r` of `ga`.
        - `e_u_low`, `e_u_high`, `e_r_low`, `e_r_high`, where the result has intervals: bounds of
          the effects of these same weights on other rows of the kind.
        - `ga_e_u_low`, `ga_e_u_high`, `ga_e_r_low`, `ga_e_r_high`, likewise: bounds of the effects
          of `ga`.

        Of several optima the result is one that no other beats in `e_u` and `e_r` at once. Tokens
        of equal `|u| / |r|` change their weights in the order of the data.

    Raises:
        InputError: an axis, objective or risk is missing; not exactly one of budget and removal is
            given; or the request cannot be reached, and the message says what can be.
        NonFiniteError: an effect is NaN or infinite.

    Examples:
        >>> result = gf.profile(..., objectives=["ga"], resolve=("sample", "token"))
        >>> gf.optimal_weights(result, retain_budget=0.0).e_u
    """
    if (retain_budget is None) == (removal is None):
        raise InputError(
            "give either retain_budget (--retain-budget), the harm allowed, or removal "
            "(--removal), the e_u to reach"
        )
    if not 0 < _number("max_weight", max_weight) < math.inf:
        raise InputError(f"max_weight: must be a finite number above 0, got {max_weight!r}")
    shares = _token_shares(result)
    there = shares["there"].values
    u, r = (shares[name].values[there] for name in ("token_e_u", "token_e_r"))
    frontier = Frontier.of(u, r, float(max_weight))
    if retain_budget is not None:
        done, part = frontier.within(_number("retain_budget", retain_budget))
        asked = {"retain_budget": float(retain_budget)}
    else:
        assert removal is not None
        done, part = frontier.reaching(_number("removal", removal))
        asked = {"removal": float(removal)}
    chosen = frontier.weights(done, part)
    weight = np.full(there.shape, np.nan)
    weight[there] = chosen
    found = shares.drop_vars("there").assign(
        weight=(("sample", "token"), weight),
        e_u=float(chosen @ u),
        e_r=float(chosen @ r),
        frontier_e_u=("vertex", frontier.e_u),
        frontier_e_r=("vertex", frontier.e_r),
        shadow_price=frontier.price(done),
    )
    return found.assign(_intervals(found, result)).assign_attrs(
        asked, max_weight=float(max_weight), reduction=result.attrs["reduction"]
    )


def _intervals(found: xr.Dataset, result: xr.Dataset) -> dict[str, float]:
    """Bounds of `e_u` and `e_r` of the optimum and of `ga`, where the result has intervals."""
    if not has_intervals(result):
        return {}
    tokens = np.stack([found[name].values for name in ("token_e_u", "token_e_r")])
    weights = np.stack([np.ones(tokens.shape[1:]), np.nan_to_num(found["weight"].values)])
    rows = (weights[:, None] * tokens).sum(-1)
    spread = result["risk_row_spread"].sel(risk="retain").values[: int(result.attrs["n_retain"])]
    bounds = effect_intervals(rows, ["forget"] * rows.shape[-1], [spread])
    return {
        f"{prefix}{name}_{side}": float(bounds[f"g_effect_{side}"][1][k, m])
        for k, prefix in enumerate(("ga_", ""))
        for m, name in enumerate(("e_u", "e_r"))
        for side in ("low", "high")
    }


@dataclass(frozen=True)
class Frontier:
    """Every best choice of weights, from the largest `e_r` to the smallest `e_u`.

    Attributes:
        start: `(n,)` weights at the first vertex.
        order: `(n_changes,)` tokens in the order in which their weights move to the other end.
        prices: `(n_changes,)` removal for a unit of harm; prices fall along the order.
        e_u, e_r: `(n_changes + 1,)` effects at the vertices; both fall.
        max_weight: the largest weight; the smallest is 0.
    """

    start: np.ndarray
    order: np.ndarray
    prices: np.ndarray
    e_u: np.ndarray
    e_r: np.ndarray
    max_weight: float

    @classmethod
    def of(cls, u: np.ndarray, r: np.ndarray, max_weight: float) -> Frontier:
        """Make the frontier from the tokens' shares `(n,)` of `e_u` and `e_r` at weight 1."""
        start = max_weight * ((r > 0) | ((u < 0) & (r == 0)))
        traded = np.flatnonzero(np.sign(u) * np.sign(r) > 0)
        with np.errstate(over="ignore"):
            prices = u[traded] / r[traded]
        by_price = np.argsort(-prices, kind="stable")
        order = traded[by_price]
        # Each sum begins at the end that limits requests, and so is exact there.
        lost, gained = (max_weight * np.abs(x[order]) for x in (r, u))
        e_r = np.cumsum([max_weight * r[r > 0].sum(), *-lost])
        e_u = np.cumsum([max_weight * u[u < 0].sum(), *gained[::-1]])[::-1]
        return cls(start, order, prices[by_price], e_u, e_r, max_weight)

    def within(self, budget: float) -> tuple[int, float]:
        """The last place along the order with `e_r >= -budget`: whole changes, part of the next."""
        most = float(self.e_r[0])
        if -budget > most and not math.isclose(-budget, most, rel_tol=ROUNDING):
            raise InputError(
                f"retain_budget: {budget!r} asks for an e_r of at least {-budget!r}; the best that "
                f"weights up to {self.max_weight:g} reach is {most!r}, so give at least {-most!r}"
            )
        wanted = min(-budget, most)
        done = int(np.searchsorted(-self.e_r, -wanted, side="right")) - 1
        return self._at(self.e_r, done, wanted)

    def reaching(self, removal: float) -> tuple[int, float]:
        """The first place along the order with `e_u <= removal`, in the form of `within`."""
        if removal > 0:
            raise InputError(
                f"removal: {removal!r} is an e_u above 0, where the forget risk falls; give a "
                "negative one"
            )
        lowest = float(self.e_u[-1])
        if removal < lowest and not math.isclose(removal, lowest, rel_tol=ROUNDING):
            raise InputError(
                f"removal: no weights up to {self.max_weight:g} reach an e_u of {removal!r}; the "
                f"lowest is {lowest!r}"
            )
        wanted = max(removal, lowest)
        first = int(np.searchsorted(-self.e_u, -wanted, side="left"))
        return self._at(self.e_u, first - 1, wanted) if first else (0, 0.0)

    def _at(self, values: np.ndarray, done: int, wanted: float) -> tuple[int, float]:
        """The place between vertex `done` and the next where `values` equal `wanted`."""
        if done == len(self.order):
            return done, 0.0
        part = (values[done] - wanted) / (values[done] - values[done + 1])
        return (done, float(part)) if part < 1 else (done + 1, 0.0)

    def weights(self, done: int, part: float) -> np.ndarray:
        """The weights `(n,)` after `done` changes and the part `part` of the next."""
        weights = self.start.copy()
        moved = self.order[:done]
        weights[moved] = self.max_weight - weights[moved]
        if part:
            token = self.order[done]
            weights[token] += part * (self.max_weight - 2 * weights[token])
        return weights

    def price(self, done: int) -> float:
        """Removal that one more unit of harm would buy after `done` changes."""
        return float(self.prices[done]) if done < len(self.prices) else 0.0


def write_weighted(
    forget: Any, weights: xr.Dataset, path: str | Path, *, data_format: str = "auto"
) -> Path:
    """Write a forget set whose rows have `weights`, for the objective `token_weights`.

    Args:
        forget: the forget data that `weights` were computed from, as `profile` takes it.
        weights: a result of `optimal_weights`, or any Dataset with its variable `weight` (sample,
            token) and the coordinates of this variable.
        path: file of JSON lines to write, completely or not at all; an earlier file is replaced.
            Its rows are those of `forget` with all their fields.
        data_format: format of `forget`, as `profile` takes it.

    Returns:
        The path of the file.

    Raises:
        InputError: the rows are not those of the weights, a row cannot be written as JSON, or the
            disk refuses.
    """
    rows = read_rows(forget, name="forget", data_format=data_format)
    weight = weights["weight"].transpose("sample", "token")
    if weight["sample"].values.tolist() != list(range(len(rows))):
        raise InputError(
            f"weights: are those of {weight.sizes['sample']} rows, and forget has {len(rows)}; "
            "give all rows of the data that was profiled, in their order"
        )
    for i, row in enumerate(rows):
        own = weight[i]
        own = own[own.notnull().values]
        _check_same(row, own, row_place("forget", i))
        row["weights"] = own.values.tolist()
        for field, value in row.items():
            try:
                json.dumps(value, ensure_ascii=False).encode()
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"{row_place('forget', i)}: '{field}' cannot be written as JSON ({error}); "
                    "leave it out"
                ) from None
    with whole_file(f"weighted data {path}", path, "path (--out)") as part:
        write_jsonl(rows, part)
    return user_path(path)


def _check_same(row: dict[str, Any], weight: xr.DataArray, place: str) -> None:
    """Raise `InputError` where a row is not the one that the weights belong to."""
    same = str(weight["question"].item()) == stored_text(question_of(row))
    if "labels" in row:
        labels = [label for label in row["labels"] if label != IGNORE]
        same = same and weight["token_id"].values.tolist() == labels
    if not same:
        raise InputError(
            f"{place} is another than the weights'; give the data that was profiled, in its order"
        )


def _token_shares(result: xr.Dataset) -> xr.Dataset:
    """Shares `token_e_u` and `token_e_r` (sample, token) of `ga`, for the answers of forget rows.

    The variable `there` (sample, token) marks where an answer has a token.
    """
    import xarray as xr

    if "g_effect" not in getattr(result, "data_vars", ()):
        raise InputError(f"result: got {type(result).__name__}; give what gf.profile returns")
    effect = result["g_effect"]
    if "step" in effect.dims:
        raise InputError("result: has several steps; choose one, such as result.isel(step=-1)")
    for axis in ("sample", "token"):
        if axis not in effect.dims:
            raise InputError(
                f"result: has no axis '{axis}'; profile with resolve=('sample', 'token') "
                "(--resolve sample,token)"
            )
    for axis, names in (("objective", ("ga",)), ("risk", RISKS)):
        for name in names:
            if name not in effect[axis].values:
                raise InputError(
                    f"result: has no {axis} '{name}', which the weights are made from; profile it "
                    "too"
                )
    ga = effect.sel(objective="ga", drop=True)
    ga = ga.isel(sample=np.flatnonzero(ga["set"].values == "forget"))
    ga = ga.sum([d for d in ga.dims if d not in ("risk", "sample", "token")], skipna=False)
    ga = ga.to_dataset(name="e").transpose("risk", "sample", "token")["e"]  # coordinates too
    # An answer's tokens are followed by those of its alternatives, which ga does not read.
    there = ga["sequence"].values == 0
    width = int(there.sum(1).max(initial=0))
    ga, there = ga.isel(token=slice(width)), there[:, :width]
    if not np.isfinite(ga.sel(risk=list(RISKS)).values).all():
        raise NonFiniteError(
            "result: an effect of ga is not finite", remedy="check the model's precision"
        )
    variables: dict[str, Any] = {"there": (("sample", "token"), there)}
    for name, risk in zip(("token_e_u", "token_e_r"), RISKS, strict=True):
        variables[name] = (("sample", "token"), ga.sel(risk=risk).values)
    shares = xr.Dataset(variables, ga.drop_vars(["risk", "set", "sequence"]).coords)
    return shares.assign_coords(
        {
            name: shares[name].where(shares["there"], end)
            for name, end in (("token_id", -1), ("token_text", ""))
            if name in shares.coords
        }
    )


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise InputError(f"{name}: must be a number, got {value!r}")
    number = float(value)
    if math.isnan(number):
        raise InputError(f"{name}: must be a number, got {value!r}")
    return number
