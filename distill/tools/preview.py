"""`distill check --show`: the first prompts and supervised or scored tokens of a recipe's stages, as the models will read them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill import models
from distill.conversations import Conversation, Reader
from distill.recipe import Recipe, ScoreStage, StageConfig, TrainStage, served_models
from distill.recipe.lineage import origin
from distill.records import Array, Message, Messages, Task, Template, UserError
from distill.stages.context import find_data, make_task
from distill.stages.inputs.conversation_data import DroppedRows, conversations, open_rows
from distill.stages.inputs.score_inputs import conversation_to_score, is_traces, question_of, template_of

EXAMPLES = 2
"""Examples shown a stage."""
REFUSED = 5
"""Rows that cannot be rendered, after which no more are tried."""


@dataclass(frozen=True, slots=True)
class Preview:
    """One example of a stage. parts: texts with special tokens shown, and whether their tokens are supervised or scored.

    facts: lines about it, such as the stop tokens.
    """

    title: str
    parts: tuple[tuple[str, bool], ...]
    facts: tuple[str, ...]


def previews(recipe: Recipe, date: str | None = None) -> Iterator[Preview | str]:
    """Yield the previews of all stages that render text; for others, a line that says why there is none.

    date: the one that templates print (YYYY-MM-DD), which a run that has begun keeps; without it, today's.
    """
    if date is not None:
        models.pin_date(date)
    for name, stage in recipe.stages.items():
        model = next(iter(stage.reads("model")), None)
        if model is None or stage.kind in ("prune", "filter"):
            continue
        try:
            yield from _of_stage(name, stage, model, recipe)
        except UserError as error:
            yield f"{name}: {error}"


def _of_stage(name: str, stage: StageConfig, model: str, recipe: Recipe) -> Iterator[Preview | str]:
    source = origin(recipe, model)
    if source not in recipe.models:
        yield f"{name}: its model {source!r} is made by a stage of your own; no preview"
        return
    folder = models.resolve(recipe.models[source], weights=source not in served_models(recipe))
    tokenizer = models.load_tokenizer(folder, trust_remote_code=recipe.models[source].trust_remote_code)
    reference = next(iter(stage.reads("task")), None)
    task = make_task(reference, recipe.tasks[reference]) if reference is not None else None
    data = next(iter(stage.reads("data")), None)
    reads_rows = data is not None and data not in recipe.stages and not is_traces(find_data(data))
    if reads_rows and isinstance(stage, TrainStage | ScoreStage):
        yield from _rows(name, stage, str(data), tokenizer, task, folder)
    elif task is not None and (data is None or stage.kind in ("on_policy", "grpo", "compare")):
        split: Any = "held_out" if stage.kind in ("eval", "compare") else getattr(stage, "split", "train")
        for problem in list(task.problems(split, EXAMPLES, recipe.seed))[:1]:
            prompt = models.render_prompt(tokenizer, task.template, problem.messages)
            yield _preview(f"{name}: first prompt", tokenizer, prompt, None, task.template, folder)
    else:
        yield f"{name}: no preview: it reads stored traces, with the prompts that they were generated with"


def _rows(
    name: str, stage: TrainStage | ScoreStage, data: str, tokenizer: Any, task: Task | None, folder: Path
) -> Iterator[Preview | str]:
    template, left_out = template_of(stage, task), DroppedRows()
    table = open_rows(data, stage, f"stages.{name}.data")
    shown, refused = 0, set[str]()
    reader = Reader(stage.fields, stage.keep_wrong)
    for given in conversations(table, reader, left_out):
        for messages, reply in given.replies(stage.turns if isinstance(stage, TrainStage) else "last"):
            if shown == EXAMPLES:
                return
            if len(refused) == REFUSED:
                yield f"{name}: no further rows are tried"
                return
            if task is not None and task.holds_out(question_of(messages)):
                continue
            try:
                prompt, ids = _rendered(stage, given, messages, reply, tokenizer, template)
            except (UserError, ValueError) as error:
                line = f"{name}: row {given.number} is left out: {error}"
                if line not in refused:
                    yield line
                refused.add(line)
                continue
            shown += 1
            title = f"{name}: row {given.number} of {data} ({reader.layout})"
            learned = "supervised" if isinstance(stage, TrainStage) else "scored"
            yield _preview(title, tokenizer, prompt, ids, template, folder, learned)
    if not shown:
        yield f"{name}: {data} gives nothing to learn. {' '.join(left_out.lines())}"


def _rendered(
    stage: TrainStage | ScoreStage,
    given: Conversation,
    messages: Messages,
    reply: Message,
    tokenizer: Any,
    template: Template,
) -> tuple[Array, Array]:
    """Return the ids of a prompt and its reply as the stage renders them. Raises ValueError for what it leaves out."""
    if isinstance(stage, ScoreStage):
        whole = conversation_to_score(given, Counter())
        messages, reply = whole.messages, {"role": "assistant", "content": whole.reply}
    prompt = models.render_prompt(tokenizer, template, messages, given.tools)
    return prompt, models.render_reply(tokenizer, template, messages, reply, given.tools)


def _preview(
    title: str, tokenizer: Any, prompt: Array, reply: Array | None, template: Template, folder: Path, learned: str = ""
) -> Preview:
    parts = [(_shown(tokenizer, prompt), False)]
    facts = [f"{len(prompt)} tokens of prompt"]
    if reply is not None:
        parts.append((_shown(tokenizer, reply), True))
        facts = [f"{len(prompt)} tokens of prompt, {len(reply)} {learned}"]
    if begun := models.opened_thinking(tokenizer, template):
        facts.append(f"the prompt begins the completion with {begun!r}")
    stops = models.stop_ids(folder, tokenizer, template)
    named = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in stops)
    facts.append(f"generation stops at {named}" if named else "no token stops generation")
    chat = models.chat_template_of(tokenizer, template)
    if chat is not None and chat.has_date:
        facts.append(
            f"the chat template prints the date {models.pinned_date()}; a run keeps the date of its first start"
        )
    bos = tokenizer.bos_token_id
    if bos is not None:
        first = len(prompt) > 0 and int(prompt[0]) == bos
        facts.append(f"the prompt {'begins' if first else 'does not begin'} with BOS {tokenizer.bos_token}")
    return Preview(title, tuple(parts), tuple(facts))


def _shown(tokenizer: Any, ids: Array) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
