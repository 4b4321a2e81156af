"""filter: which traces to learn from. Writes a selection; the shards stay as they are."""

from __future__ import annotations

import shutil

from distill.recipe import FilterStage
from distill.records import Cost
from distill.stages.context import Context, Result
from distill.traces.reader import content_fingerprint
from distill.traces.selection import select


def run(config: FilterStage, context: Context) -> Result:
    out = context.folder / "traces"
    shutil.rmtree(out, ignore_errors=True)
    selection = select(context.data_path(config.data), out, config.keep)
    context.say(str(selection).replace("\n", "\n  "))
    metrics = {
        "rows": selection.rows,
        "kept": selection.kept,
        "problems": selection.problems,
        "problems_kept": selection.problems_kept,
        "dropped": {dropped.fn: dropped.dropped for dropped in selection.filters},
    }
    cost = Cost(samples_filtered=selection.rows - selection.kept)
    return Result(cost, metrics, content_fingerprint(out))
