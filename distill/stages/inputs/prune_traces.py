"""The traces that a prune stage measures a model on: a bounded number of positions, the same every time."""

from __future__ import annotations

from typing import Any

from distill import models
from distill.models.prune_probe import ProbeTrace
from distill.recipe import PruneStage
from distill.records import UserError, draw_seed
from distill.stages.context import Context
from distill.traces.reader import TraceReader, open_traces

TRACES = 8
"""At least this many traces are read where there are as many: each gives at most positions / TRACES positions."""
LONGEST = 4096
"""Tokens of the longest trace that is read, the prompt included."""
IDS = ["trace_id", "prompt_ids", "completion_ids"]
TOP = ["top_count", "top_ids", "top_logprobs", "tail_logprob"]


def read_traces(config: PruneStage, context: Context, tokenizer: Any) -> list[ProbeTrace]:
    """Read traces in a shuffled order until they give `positions` positions; the rest of a long completion is cut.

    Raises UserError if the traces are of another tokenizer, hold no distributions that `by` needs, or are too few.
    """
    assert config.data is not None, "checked by the config"
    where = f"stages.{context.name}.data"
    reader = open_traces(context.data_path(config.data))
    metadata = reader.metadata
    mine = models.tokenizer_fingerprint(tokenizer)
    if metadata.tokenizer != mine:
        raise UserError(
            f"{where}: the traces of {config.data!r} are of another tokenizer ({metadata.tokenizer}) than the model's ({mine}), so "
            "their ids mean other text; name traces that the model itself wrote or scored."
        )
    with_top = metadata.top_k > 0 and metadata.logprob_temperature == 1
    if config.by == "importance" and not with_top:
        raise UserError(
            f"{where}: by: importance reads the traces' distributions at temperature 1, and {config.data!r} holds none; generate or "
            "score with top_logprobs > 0, or use by: block_influence."
        )
    found = _take(reader, config.positions, draw_seed(context.seed, context.name, "positions"), with_top)
    if len(found) < TRACES:
        raise UserError(
            f"{where}: {config.data!r} has {len(found)} traces of 1 to {LONGEST} tokens; pruning by measurement needs {TRACES}."
        )
    return found


def _take(reader: TraceReader, positions: int, seed: int, with_top: bool) -> list[ProbeTrace]:
    found: list[ProbeTrace] = []
    missing = positions
    for block in reader.shuffled(seed, rows=64, columns=[*IDS, *TOP] if with_top else IDS):
        starts = block.completion_ids.offsets
        for n in range(len(block)):
            prompt, completion = block.prompt_ids[n], block.completion_ids[n]
            if not len(completion) or len(prompt) + len(completion) > LONGEST:
                continue
            taken = min(len(completion), positions // TRACES)
            top = (
                block.top.slice(int(starts[n]), int(starts[n]) + taken) if with_top and block.top is not None else None
            )
            found.append(ProbeTrace(prompt, completion[:taken], top))
            missing -= taken
            if missing <= 0:
                return found
    return found
