"""The positions whose distributions a generate or score stage stores: all, or those that its `weights` keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from distill import plug, token_weights
from distill.recipe import EvalStage, GenerateStage, ScoreStage
from distill.records import Completion, UserError
from distill.token_choice import ScoreTokens, TokenValues, choose, only


def keep_positions(config: GenerateStage | EvalStage | ScoreStage, where: str) -> Callable[[Completion], Completion]:
    """Return a function that removes the distributions at positions which the stage's `weights` leave out.

    Its argument is a completion whose distributions are already cut to `top_logprobs` and `mass`. Raises UserError for a
    function of `weights` that does not exist, is not for capture or has wrong options.
    """
    weights = None if isinstance(config, EvalStage) else config.weights
    if weights is None:
        return lambda completion: completion
    here = f"{where}.weights"
    score = cast(ScoreTokens, plug.bind(weights.fn, weights.options, token_weights.__name__, here))
    if plug.find(weights.fn, token_weights.__name__, here) is token_weights.divergence:
        raise UserError(
            f"{here}: divergence compares a student with its teacher, and nothing is trained here. Use fn: entropy or prefix, "
            "or give weights to the stage that trains."
        )
    share = weights.share

    def kept(completion: Completion) -> Completion:
        if completion.top is None:
            return completion
        chosen = choose(score, TokenValues.of(completion.ids_T, completion.top), share, here)
        return replace(completion, top=only(completion.top, chosen))

    return kept


def positions_of(config: GenerateStage | EvalStage | ScoreStage) -> dict[str, Any]:
    """Return the metadata's fields of the positions that have a distribution."""
    weights = None if isinstance(config, EvalStage) else config.weights
    return {} if weights is None else {"positions": weights.fn, "position_share": weights.share}
