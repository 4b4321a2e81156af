"""Traces that the student wrote itself and a teacher scored: when they are required, checks, and the sampler's log-probabilities.

A scored trace holds the teacher's log-probability of each token. The student's own, at sampling, are in the shards of the
generate stage that wrote the trace; the two are joined by trace id.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from distill import models
from distill.recipe import FilterStage, GenerateStage, OnPolicyStage, Recipe, ScoreStage, TrainStage, base_name
from distill.recipe.lineage import training_line, writers_of_first_data
from distill.records import Array, Traces, UserError
from distill.traces.filters import PROMPT_FILTERS
from distill.traces.reader import open_traces
from distill.training.packing import Example

if TYPE_CHECKING:
    from distill.stages.context import Context

POLICY_GRADIENT = "policy_gradient"
IMPORTANCE_CAP = "importance_cap"
"""The option of a loss that weighs by importance."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a train stage's own traces come from: the stage that scored them, and the one that generated them."""

    scored: str
    generated: str


def required(config: TrainStage | OnPolicyStage) -> bool:
    """Whether the loss learns from the student's own completions only."""
    return config.loss.fn == POLICY_GRADIENT or config.loss.options.get(IMPORTANCE_CAP) is not None


def check(name: str, config: TrainStage, recipe: Recipe) -> None:
    """Check that a stage whose loss needs the student's own traces has them. Raises UserError."""
    if required(config):
        origin_of(name, config, recipe)


def origin_of(name: str, config: TrainStage, recipe: Recipe) -> Origin:
    """Return the stages that made a train stage's own traces. Raises UserError for any other data."""
    where, loss = f"stages.{name}", config.loss.fn if config.loss.fn == POLICY_GRADIENT else f"{IMPORTANCE_CAP}"
    recipe_for = "generate with the stage's model, score with the teacher, train on the scored stage"
    if config.teacher is not None:
        raise UserError(
            f"{where}.loss: {loss} learns from scored traces of the model's own; remove teacher ({recipe_for})."
        )
    if not isinstance(config.data, str) or config.data not in recipe.stages:
        raise UserError(
            f"{where}.data: {loss} needs the log-probabilities of the model that sampled the traces, which are known for stages of "
            f"the recipe: {recipe_for}."
        )
    chain = list(_chain(config.data, recipe))
    scored = next((one for one in chain if isinstance(recipe.stages[one], ScoreStage)), None)
    generated = recipe.stages[chain[-1]]
    if not isinstance(generated, GenerateStage):
        raise UserError(
            f"{where}.data: {loss} needs traces that the model generated itself; {chain[-1]!r} holds other text."
        )
    if scored is None:
        raise UserError(
            f"{where}.data: {loss} needs a teacher's log-probabilities of the model's traces, and {config.data!r} holds those of the "
            f"model that generated it: {recipe_for}."
        )
    _check_sampling(where, loss, generated, chain, config, recipe)
    return Origin(scored, chain[-1])


def _check_sampling(
    where: str, loss: str, generated: GenerateStage, chain: list[str], config: TrainStage, recipe: Recipe
) -> None:
    if generated.model not in training_line(recipe, config.model):
        raise UserError(
            f"{where}.data: {loss} learns from the model's own traces, and {generated.model!r} wrote these ({chain[-1]}), which "
            f"{config.model!r} was not trained from. Generate with {base_name(config.model)!r}, or use forward_kl."
        )
    if generated.engine.is_served:
        raise UserError(
            f"{where}.data: {loss} needs traces of an engine of this machine; an endpoint wrote {chain[-1]!r}."
        )
    if generated.sampling.temperature != 1.0 or generated.sampling.top_p != 1.0:
        raise UserError(
            f"{where}.data: {loss} needs traces sampled from the model's own distribution; set temperature and top_p of {chain[-1]!r} to 1."
        )
    for one in chain:
        stage = recipe.stages[one]
        if isinstance(stage, FilterStage):
            chosen = [keep.fn for keep in stage.keep if keep.fn not in PROMPT_FILTERS]
            if chosen:
                raise UserError(
                    f"{where}.data: {one!r} keeps traces by what they say ({', '.join(chosen)}), so they are no longer draws from the "
                    f"model; name the traces before the filter."
                )
    if not config.keep_truncated:
        raise UserError(
            f"{where}.keep_truncated: {loss} needs it to be true: without the traces that were cut at the token limit, the others are no "
            "longer draws from the model."
        )


def _chain(data: str, recipe: Recipe) -> Iterator[str]:
    """Yield a data stage and the ones it reads, up to the first that reads no data of the recipe."""
    while True:
        yield data
        before = [name for name in recipe.stages[data].reads("data") if name in recipe.stages]
        if not before:
            return
        data = before[0]


def other_teacher(recipe: Recipe, model: str, teachers: Sequence[str]) -> str:
    """Return a warning if no teacher of the model's own text is one whose traces the model learned from first; else ""."""
    writers = writers_of_first_data(recipe, model)
    if not writers or {base_name(teacher) for teacher in teachers} & {base_name(writer) for writer in writers}:
        return ""
    return (
        f"warning: {' and '.join(teachers)} scores text of a student that first learned from {' and '.join(sorted(writers))}: where "
        "the two put their probability elsewhere, the distributions say little about this student's text"
    )


def warnings(name: str, config: TrainStage, recipe: Recipe) -> list[str]:
    """The warnings about a train stage on own traces, before it runs."""
    scored = recipe.stages[origin_of(name, config, recipe).scored]
    assert isinstance(scored, ScoreStage)
    warning = other_teacher(recipe, config.model, [scored.model])
    return [f"{name}: {warning}"] if warning else []


def sampled_logprobs(config: TrainStage, context: Context) -> dict[str, Array]:
    """Return the log-probabilities [C] of each own trace's tokens under the model that sampled them, by trace id.

    Raises UserError if another model than the recipe's wrote the shards.
    """
    origin = origin_of(context.name, config, context.recipe)
    generated, scored = (context.recipe.stages[one] for one in (origin.generated, origin.scored))
    assert isinstance(generated, GenerateStage)
    assert isinstance(scored, ScoreStage)
    reader = open_traces(context.data_path(origin.generated))
    if reader.metadata.weights != models.weights_fingerprint(context.model_dir(generated.model)):
        raise UserError(
            f"stages.{context.name}.data: {origin.generated!r} was written with other weights than {generated.model!r} has now; run it "
            f"again: --redo {base_name(origin.generated)}."
        )
    if warning := other_teacher(context.recipe, config.model, [scored.model]):
        context.say(warning)
    return {
        trace_id: block.logprob[n]
        for block in reader.blocks(1024, ["trace_id", "logprob"])
        for n, trace_id in enumerate(block.trace_id)
    }


def with_sampler(examples: Iterator[Example], block: Traces, sampled: Mapping[str, Array]) -> Iterator[Example]:
    """Add to a block's examples the sampler's log-probabilities, and the teacher's minus the sampler's as advantages."""
    for n, example in enumerate(examples):
        own_C = sampled[example.trace_id]
        if len(own_C) != len(example.completion_ids):
            raise UserError(
                f"trace {example.trace_id}: it has other tokens now than when it was generated; score it again."
            )
        yield replace(example, advantage=block.logprob[n] - own_C, engine_logp=own_C)
