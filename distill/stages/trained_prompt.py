"""The prompt that a model of a run was trained or evaluated under: its task's template, found through the recipe.

In: a resolved recipe and the name of a stage or model. Out: the template, without reading the task's problems where the task
says its template by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill import plug
from distill.recipe import Recipe
from distill.recipe.lineage import upstream_stages
from distill.records import Template, UserError
from distill.stages.context import find_data, make_task
from distill.stages.inputs.score_inputs import AS_IT_IS, is_traces
from distill.tasks import templates


@dataclass(frozen=True, slots=True)
class TrainedPrompt:
    """A template and the task that it belongs to; an empty task is the model's own chat template with nothing added."""

    template: Template
    task: str = ""


UNKNOWN = TrainedPrompt(AS_IT_IS)


def trained_prompt(recipe: Recipe, name: str) -> TrainedPrompt:
    """Return the prompt of the nearest stage that gave the model its text, else of a stage that evaluates it.

    Raises UserError for a task's template that cannot be found.
    """
    for stage in upstream_stages(recipe, name) if name in recipe.stages else ():
        config = recipe.stages[stage]
        task = getattr(config, "task", None)
        if isinstance(task, str) and task in recipe.tasks:
            return TrainedPrompt(template_of_task(recipe, task), task)
        if config.trains and _reads_conversations(recipe, stage):
            return UNKNOWN
    for config in recipe.stages.values():
        task = getattr(config, "task", None)
        if isinstance(task, str) and task in recipe.tasks and name in config.reads("model"):
            return TrainedPrompt(template_of_task(recipe, task), task)
    return UNKNOWN


def template_of_task(recipe: Recipe, task: str) -> Template:
    """Return a task's template by the name in its options; a task without such an option is made."""
    config = recipe.tasks[task]
    options = plug.all_options(config.fn, config.options, "distill.tasks", f"tasks.{task}")
    given = options.get("template")
    if not isinstance(given, str):
        return make_task(task, config).template
    with templates.given_options(config.template_options):
        return templates.find(given, f"tasks.{task}.template")


def _reads_conversations(recipe: Recipe, stage: str) -> bool:
    """Whether a stage trains on a file of conversations, which no task renders."""
    for name in recipe.stages[stage].reads("data"):
        if name not in recipe.stages:
            try:
                return not is_traces(find_data(name))
            except (OSError, UserError):
                return True
    return False
