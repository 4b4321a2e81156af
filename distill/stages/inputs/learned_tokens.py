"""Which tokens a train stage learns: its `weights`, and the positions whose distributions the data hold.

In: the config, the data's metadata. Out: examples with a weight for those tokens; examples of which only the first tokens can
have one are cut after them, so that the rest is not computed. What is chosen in the step (`divergence`, and `entropy` with a
teacher in the trainer) is a `RowChoice` of the objective instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

import numpy as np

from distill import plug, token_weights
from distill.plug import Function
from distill.recipe import FilterStage, GenerateStage, Recipe, TrainStage, WeightsConfig, data_of
from distill.records import TopK, UserError
from distill.stages.context import find_data
from distill.stages.inputs.score_inputs import is_traces
from distill.token_choice import PREFIX, ScoreTokens, TokenValues, choose, num_kept
from distill.traces.schema import Metadata
from distill.training.loss.row_choice import RowChoice
from distill.training.packing import Example, Source

if TYPE_CHECKING:
    from distill.stages.context import Context

WEIGHTS = token_weights.__name__


def bind_weights(config: WeightsConfig, where: str) -> ScoreTokens:
    """Return the function that scores tokens. Raises UserError for an unknown function or a wrong option."""
    return cast(ScoreTokens, plug.bind(config.fn, config.options, WEIGHTS, f"{where}.weights"))


def function_of(config: WeightsConfig, where: str) -> Function:
    return plug.find(config.fn, WEIGHTS, f"{where}.weights")


def row_choice(config: TrainStage, where: str) -> RowChoice | None:
    """Return what the loss itself chooses in the step; None if nothing. Raises UserError for `weights` that do not fit the stage."""
    if config.weights is None:
        return None
    bind_weights(config.weights, where)
    function, here = function_of(config.weights, where), f"{where}.weights"
    if function is token_weights.divergence and config.loss.fn == "sampled_kd":
        raise UserError(
            f"{here}: sampled_kd draws a few ids from the teacher, from which no divergence follows. Use fn: entropy or prefix, "
            "or loss: {fn: forward_kl}."
        )
    if function is token_weights.prefix:
        return None
    if function is token_weights.divergence or (function is token_weights.entropy and config.teacher is not None):
        fn: Literal["entropy", "divergence"] = "divergence" if function is token_weights.divergence else "entropy"
        return RowChoice(fn, config.weights.share)
    if config.teacher is not None:
        raise UserError(
            f"{here}: your own function reads stored distributions, and the teacher is in the trainer. Use fn: entropy, divergence or "
            "prefix, or score the traces with the teacher and remove `teacher`."
        )
    return None


@dataclass(frozen=True, slots=True)
class LearnedTokens:
    """The tokens of each completion that have a weight.

    held: (function's name, share) of the positions whose distributions the data hold, if the loss needs them; None = all. score:
    keeps `share` of those; None = keep all, or choose as many in the step. with_top: whether examples have distributions.
    """

    held: tuple[str, float] | None
    score: ScoreTokens | None
    share: float
    with_top: bool
    where: str

    def count(self, num: int) -> int:
        """The number of tokens learned of a completion of `num` tokens."""
        return num_kept(num if self.held is None else num_kept(num, self.held[1]), self.share)

    def apply(self, example: Example) -> Example:
        """Return the example with the tokens that it may learn.

        Where these are the first ones, it is cut after them. Of an example without its distributions, which is read for
        planning only, the number of tokens is known.
        """
        num = len(example.completion_ids)
        learned, held = self.count(num), self.held
        if held is not None and held[0] == PREFIX:
            example, held = example.first(num_kept(num, held[1])), None
        if self.score is not None and _is_prefix(self.score) and held is None:
            return replace(example.first(learned), num_weighted=learned)
        if (held is None and self.score is None) or (self.with_top and example.top is None):
            return replace(example, num_weighted=learned)
        values = TokenValues.of(example.completion_ids, example.top)
        kept_C = np.ones(len(values), bool)
        if held is not None:
            assert isinstance(example.top, TopK)
            kept_C = np.asarray(example.top.count_T) > 0
        if self.score is not None:
            chosen = choose(self.score, values.at(kept_C), self.share, self.where)
            kept_C[kept_C] = chosen
        return replace(example, weighted=kept_C, num_weighted=learned)


def _is_prefix(score: ScoreTokens) -> bool:
    return getattr(score, "func", score) is token_weights.prefix


@dataclass(frozen=True, slots=True)
class LearnedSource:
    """Another source's examples, with the tokens that each may learn."""

    source: Source
    tokens: LearnedTokens

    @property
    def num_examples(self) -> int:
        return self.source.num_examples

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def epoch(self, index: int, skip: int = 0) -> Iterator[Example]:
        return map(self.tokens.apply, self.source.epoch(index, skip))

    def complete(self, examples: list[Example]) -> list[Example]:
        done = self.source.complete(examples)
        return [each if each.num_weighted is not None else self.tokens.apply(each) for each in done]


def needs_distributions(config: TrainStage, where: str) -> bool:
    """Return whether the stage's `weights` read stored distributions, whatever the loss reads."""
    if config.weights is None or config.teacher is not None:
        return False
    return function_of(config.weights, where) in (token_weights.entropy, token_weights.divergence)


def check_stored(config: TrainStage, where: str, recipe: Recipe) -> None:
    """Check before the run that the data hold the distributions that `weights` read, as far as the recipe knows. Raises UserError."""
    if not needs_distributions(config, where):
        return
    for name in data_of(config.data):
        writer = name
        while writer in recipe.stages and isinstance(recipe.stages[writer], FilterStage):
            (writer,) = recipe.stages[writer].reads("data")
        stage = recipe.stages.get(writer)
        if isinstance(stage, GenerateStage) and stage.top_logprobs == 0:
            raise UserError(no_distributions(config, where, f"{writer!r} generates with top_logprobs: 0"))
        path = None if writer in recipe.stages else find_data(writer)
        if path is not None and not is_traces(path):
            raise UserError(no_distributions(config, where, f"{writer!r} holds conversations"))


def no_distributions(config: TrainStage, where: str, why: str) -> str:
    """The message of `weights` that read distributions which the data do not hold."""
    assert config.weights is not None
    return (
        f"{where}.weights: {config.weights.fn} reads the teacher's distributions, and {why}. Generate with top_logprobs > 0, score "
        "the data (a stage of kind score), or use weights: {fn: prefix}."
    )


def may_read_distributions(config: TrainStage, where: str) -> bool:
    """Return whether the stage's `weights` read distributions where there are some: your own function does."""
    if config.weights is None or config.teacher is not None:
        return False
    return function_of(config.weights, where) is not token_weights.prefix


def with_learned_tokens(
    source: Source, config: TrainStage, metadata: Metadata | None, context: Context, *, needed: bool, with_top: bool
) -> Source:
    """Return the source with the tokens that the stage learns, and say what share of them that is.

    metadata: of the shards; None for conversations. needed: whether the loss or the weights need distributions. with_top:
    whether the examples have them.
    """
    where = f"stages.{context.name}"
    held = None
    if needed and metadata is not None and metadata.position_share < 1:
        held = metadata.positions, metadata.position_share
        context.say(
            f"the data hold distributions at {held[1]:.0%} of the positions ({held[0]}): the others have weight 0 in this stage"
        )
    if held is None and config.weights is None:
        return source
    score, share = None, 1.0
    if config.weights is not None:
        share = config.weights.share
        if row_choice(config, where) is None:
            score = bind_weights(config.weights, where)
        of = "the tokens" if held is None else "these"
        context.say(f"weights: {config.weights.fn} keeps {share:.0%} of {of} of each completion")
    return LearnedSource(source, LearnedTokens(held, score, share, with_top, f"{where}.weights"))
