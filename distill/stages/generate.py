"""generate: sample a model's completions of a task's problems, with its distribution at every position."""

from __future__ import annotations

from distill.recipe import GenerateStage
from distill.stages.beside import leaving_rewards
from distill.stages.context import Context, Result
from distill.stages.trace_sampling import sample_traces
from distill.traces.reader import content_fingerprint
from distill.traces.summary import stats


def run(config: GenerateStage, context: Context) -> Result:
    folder = context.folder / "traces"
    counts, cost = sample_traces(leaving_rewards(config), context, folder, config.split)
    held = stats(folder)
    context.say(str(held).replace("\n", "\n  "))
    if held.warning:
        context.say(held.warning)
    metrics = {**held.as_dict(), "prompts_too_long": counts.prompts_too_long}
    if config.rewards:
        metrics["rewards_failed"] = counts.rewards_failed
    return Result(cost, metrics, content_fingerprint(folder))
