"""The positions whose distributions a generate or score stage stores: all, or those that its `weights` keep."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from distill import plug, token_weights
from distill.recipe import EvalStage, GenerateStage, ScoreStage
from distill.records import Array, TopK, UserError
from distill.token_choice import ScoreTokens, TokenValues, choose, only

Capture = Callable[[Array, TopK], TopK]
"""(completion ids [C], its distributions [C]) -> those that are stored."""


def capture_of(config: GenerateStage | EvalStage | ScoreStage, where: str) -> Capture:
    """Return what a stage stores of a completion's distributions: cut to `top_logprobs` and `mass`, at the positions wanted.

    Raises UserError for a function of `weights` that does not exist, is not for capture or has wrong options.
    """
    assert not isinstance(config, EvalStage), "eval stores no distributions"
    top_k, mass, weights = config.top_logprobs, config.mass, config.weights
    if weights is None:
        return lambda ids_C, top: top.truncate(top_k=top_k, mass=mass)
    here = f"{where}.weights"
    score = cast(ScoreTokens, plug.bind(weights.fn, weights.options, token_weights.__name__, here))
    if plug.find(weights.fn, token_weights.__name__, here) is token_weights.divergence:
        raise UserError(
            f"{here}: divergence compares a student with its teacher, and nothing is trained here. Use fn: entropy or prefix, "
            "or give weights to the stage that trains."
        )
    share = weights.share

    def captured(ids_C: Array, top: TopK) -> TopK:
        cut = top.truncate(top_k=top_k, mass=mass)
        return only(cut, choose(score, TokenValues.of(ids_C, cut), share, here))

    return captured


def positions_of(config: GenerateStage | EvalStage | ScoreStage) -> dict[str, Any]:
    """Return the metadata's fields of the positions that have a distribution."""
    weights = None if isinstance(config, EvalStage) else config.weights
    return {} if weights is None else {"positions": weights.fn, "position_share": weights.share}
