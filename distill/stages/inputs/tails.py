"""Which estimate of the teacher's tail a loss makes, and whether the stage's traces hold what it needs.

In: a stage's loss and data. Out: the estimate (`training.loss.stored_targets.Tail`), or a UserError that says why these traces
cannot give it. Stages of the recipe are judged by their settings, before anything runs; folders by their metadata and, for
selections, by their filters.

The trace's own token is a draw from the teacher's distribution only if that teacher wrote the trace, at temperature 1 and without
top-p, and if nothing selected the trace by what follows from the token: its verdict, its language, its length, whether it ended.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from distill import plug
from distill.recipe import FilterStage, GenerateStage, OnPolicyStage, PlugConfig, Recipe, ScoreStage, TrainStage, served
from distill.records import Sampling, UserError
from distill.stages.context import find_data
from distill.stages.inputs.score_inputs import is_traces
from distill.traces.filters import PROMPT_FILTERS
from distill.traces.reader import TraceReader, open_traces
from distill.traces.selection import filters_of
from distill.training.loss.stored_targets import Tail

LOSSES = "distill.training.loss.sparse"


@dataclass(frozen=True, slots=True)
class TraceOrigin:
    """How traces were made. filters: of all selections on the way, by name. scored: by another model than their writer, or anew."""

    sampling: Sampling
    tail_draws: int
    scored: bool = False
    served: bool = False
    filters: tuple[str, ...] = ()

    @staticmethod
    def of_reader(reader: TraceReader) -> TraceOrigin:
        meta = reader.metadata
        return TraceOrigin(
            meta.sampling, meta.tail_draws, bool(meta.source), meta.engine == served.FN, filters_of(reader.path)
        )

    @staticmethod
    def of_recipe(recipe: Recipe, data: str) -> TraceOrigin | None:
        """Return the origin of a stage's or a folder's traces; None where it is not known yet, or they are no traces."""
        config = recipe.stages.get(data)
        if isinstance(config, FilterStage):
            before = TraceOrigin.of_recipe(recipe, config.data)
            own = tuple(keep.fn for keep in config.keep)
            return None if before is None else replace(before, filters=(*before.filters, *own))
        if isinstance(config, GenerateStage):
            return TraceOrigin(config.sampling.record(), config.tail_draws, served=config.engine.is_served)
        if isinstance(config, ScoreStage):
            return TraceOrigin(Sampling(), config.tail_draws, scored=True)
        path = None if config is not None else find_data(data)
        return TraceOrigin.of_reader(open_traces(path)) if path is not None and is_traces(path) else None


def tail_of(loss: PlugConfig, where: str) -> Tail | None:
    """Return a loss's option `tail`; None if it is not set, or the loss has no such option.

    Raises UserError for a share of the bucket in the bucket.
    """
    if not _has_tail(loss):
        return None
    options = plug.all_options(loss.fn, loss.options, LOSSES, where)
    tail: Tail | None = options["tail"]
    if "bucket_share" in loss.options and tail == "bucket":
        raise UserError(
            f"{where}.bucket_share: with tail: bucket there is nothing to mix the bucket with; set tail: own_token or draws, "
            "or remove it."
        )
    return tail


def bucket_tail(loss: PlugConfig) -> PlugConfig:
    """Return a loss with the bucket for the tail, whatever else the traces hold."""
    return PlugConfig(**{"fn": loss.fn, **loss.options, **({"tail": "bucket"} if _has_tail(loss) else {})})


def used_tail(config: TrainStage, where: str, origin: TraceOrigin) -> Tail:
    """Return the estimate that a stage makes with traces of an origin: the one named, else draws where there are some.

    Raises UserError if the traces cannot give the one named.
    """
    tail = tail_of(config.loss, f"{where}.loss")
    if tail is None and "bucket_share" in config.loss.options and not origin.tail_draws:
        raise UserError(
            f"{where}.loss.bucket_share: the tail is the bucket alone, for {config.data!r} has no draws; set tail: own_token, or "
            "tail_draws: 4 in the stage that stores the distributions, or remove it."
        )
    if tail is None:
        return "draws" if origin.tail_draws and _has_tail(config.loss) else "bucket"
    if tail == "draws" and not origin.tail_draws:
        raise UserError(
            f"{where}.loss.tail: draws needs draws from the teacher's tail, and {config.data!r} has none. Set tail_draws: 4 in the "
            "stage (generate or score) that stores the distributions, or use tail: bucket."
        )
    reason = _why_not_own(origin, config) if tail == "own_token" else ""
    if reason:
        raise UserError(
            f"{where}.loss.tail: own_token takes a trace's own token for a draw from the teacher's distribution, but {reason}. Use "
            "tail: draws (with tail_draws: 4 in the stage that stores the distributions), or tail: bucket."
        )
    return tail


def check_tail(config: TrainStage | OnPolicyStage, where: str, recipe: Recipe | None = None) -> None:
    """Raise UserError for a tail that a stage cannot have. recipe: to judge its data by."""
    tail, here = tail_of(config.loss, f"{where}.loss"), f"{where}.loss.tail"
    given = tail is not None or "bucket_share" in config.loss.options
    if config.teacher is not None and given and not (isinstance(config, OnPolicyStage) and config.scoring == "engine"):
        raise UserError(
            f"{here}: a teacher in the trainer is compared on its whole vocabulary, so that there is no tail to estimate; remove "
            "tail and bucket_share."
        )
    if isinstance(config, OnPolicyStage):
        if tail in ("own_token", "draws") or (given and tail is None):
            raise UserError(
                f"{here}: the tokens of an on_policy stage are the student's, not draws from the teacher, and its engine returns no "
                "draws from the tail. Use tail: bucket, or scoring: trainer without tail, which compares the whole vocabulary."
            )
        return
    if isinstance(config.data, Mapping):
        if tail in ("own_token", "draws") or (given and tail is None):
            raise UserError(
                f"{here}: several teachers are mixed by their stored entries and the bucket. A trace's own token is a draw from none "
                "or one of them, and draws are not mixed; use tail: bucket, or one set of traces."
            )
        return
    if config.teacher is None and recipe is not None and (origin := TraceOrigin.of_recipe(recipe, config.data)):
        used_tail(config, where, origin)


def _has_tail(loss: PlugConfig) -> bool:
    return "tail" in plug.option_names(loss.fn, LOSSES)


def _why_not_own(origin: TraceOrigin, config: TrainStage) -> str:
    """Return why the traces' own tokens are not draws from the stored distributions; "" if they are."""
    sampling = origin.sampling
    chosen = [name for name in origin.filters if name not in PROMPT_FILTERS]
    if origin.scored:
        return "these distributions are of a model that scored the traces, which did not draw the tokens"
    if origin.served:
        return "an endpoint may sample with settings of its own, and completions that do not fit this tokenizer are left out"
    if sampling.temperature == 0:
        return "the traces were decoded greedily (sampling.temperature 0)"
    if sampling.temperature != 1 or sampling.top_p != 1:
        return f"the traces were sampled at temperature {sampling.temperature:g} and top_p {sampling.top_p:g}, not at 1 and 1"
    if chosen:
        return (
            f"the traces were selected by what they led to ({', '.join(chosen)}), which conditions every token on it; "
            f"only filters of the prompt ({', '.join(sorted(PROMPT_FILTERS))}) do not"
        )
    if not config.keep_truncated:
        return (
            "keep_truncated: false leaves out the traces that were cut at the token limit, which conditions every token on the "
            "trace's end; set keep_truncated: true"
        )
    return ""


def refuse_dropped(config: TrainStage, where: str, tail: Tail, num: int) -> None:
    """Raise UserError if traces that are too long would be left out of own-token losses."""
    if tail == "own_token" and num:
        raise UserError(
            f"{where}.max_tokens: {num} traces are longer than {config.max_tokens} tokens. Without them every token is conditioned on "
            "a short trace, and loss.tail: own_token is not unbiased: raise max_tokens, or use another tail."
        )
