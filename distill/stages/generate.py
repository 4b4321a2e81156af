"""generate: a teacher's traces of a task's train problems, with its distribution at every position."""

from __future__ import annotations

from distill.recipe import GenerateStage
from distill.stages.context import Context, Result
from distill.stages.sampling import sample
from distill.traces.reader import content_fingerprint
from distill.traces.summary import stats


def run(config: GenerateStage, context: Context) -> Result:
    folder = context.folder / "traces"
    counts, cost, _ = sample(config, context, folder, "train")
    held = stats(folder)
    context.say(str(held).replace("\n", "\n  "))
    metrics = {**held.as_dict(), "prompts_too_long": counts.prompts_too_long}
    return Result(cost, metrics, content_fingerprint(folder))
