"""Trials of what the models read and learn: prompts, replies, the ends of turns, and the tokenizers of teacher and student."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distill import models
from distill.conversations import Reader
from distill.models.probe import PROBE
from distill.printable import printable
from distill.recipe import (
    CompareStage,
    EvalStage,
    FilterStage,
    GenerateStage,
    GrpoStage,
    OnPolicyStage,
    ScoreStage,
    TrainStage,
    data_of,
    teachers_of,
)
from distill.records import Array, Template, UserError
from distill.run.trials.trial import LocalModel, Trial, TrialSetup
from distill.stages.context import find_data
from distill.stages.inputs.conversation_data import DroppedRows, conversations, open_rows
from distill.stages.inputs.resolve import is_cross_tokenizer
from distill.stages.inputs.score_inputs import is_traces, question_of, template_of

PROBLEMS = 16
"""Problems whose prompts are measured."""
ROWS = 64
"""Rows of a data set that are rendered."""
LOST = 0.5
"""A data set that loses a larger share of its rows than this fails."""
SAMPLERS = (GenerateStage, EvalStage, CompareStage, GrpoStage, OnPolicyStage)
LONGEST_SHOWN = 600
"""Characters of an example that are shown."""


def templates(setup: TrialSetup) -> Iterator[Trial]:
    """Render a problem and a reply with reasoning for every pair of a model and a task: nothing is lost, and the turn ends."""
    seen = set()
    for name, stage in setup.stages(*SAMPLERS, TrainStage, ScoreStage):
        for model in stage.reads("model"):
            for task in stage.reads("task"):
                local = setup.local(model)
                source = local if isinstance(local, str) else local.source
                if (source, task) in seen:
                    continue
                seen.add((source, task))
                subject = f"models.{source}, tasks.{task}" if not isinstance(local, str) else f"stages.{name}"
                yield _template(setup, local, task, subject)


def _template(setup: TrialSetup, local: LocalModel | str, name: str, subject: str) -> Trial:
    what = "prompt and reply"
    if isinstance(local, str):
        return Trial(what, subject, "skip", local)
    task = setup.task(name)
    template, tokenizer = task.template, local.tokenizer
    problem = setup.some_problems(name, PROBLEMS)[1][0]
    prompt = models.render_prompt(tokenizer, template, problem.messages)
    shown = _spelled(tokenizer, prompt)
    bos = tokenizer.bos_token_id
    if bos is not None and len(prompt) > 1 and prompt[0] == bos == prompt[1]:
        remedy = (
            "The chat template writes a BOS and the tokenizer adds another; use a tokenizer with add_bos_token: false."
        )
        return Trial(what, subject, "fail", "the prompt begins with two BOS tokens", remedy, (shown,))
    # Of a chat template, `render_prompt` itself refuses to lose a message.
    if models.chat_template_of(tokenizer, template) is None and "{question}" not in template.plain:
        remedy = "Write {question} where the problem's text belongs in the template's `plain`."
        return Trial(
            what, subject, "fail", f"template {template.name:.60} has no place for the question", remedy, (shown,)
        )
    return _reply(local, template, problem.messages, prompt, subject, shown)


def _reply(local: LocalModel, template: Template, messages: Any, prompt: Array, subject: str, shown: str) -> Trial:
    what, tokenizer = "prompt and reply", local.tokenizer
    _, thought, answer, _ = PROBE
    given = {"role": "assistant", "content": f"<think>\n{thought}\n</think>\n\n{answer}"}
    note = ""
    try:
        ids = models.render_reply(tokenizer, template, messages, given)
    except UserError as error:
        # Rows with reasoning are then refused and counted, not changed in silence.
        note = f"; replies with reasoning are refused: {error}"
        ids, thought = models.render_reply(tokenizer, template, messages, {**given, "content": answer}), ""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    shown = f"{shown}⟦{_spelled(tokenizer, ids)}⟧"
    for part, called in ((thought, "reasoning"), (answer, "answer")):
        if part not in text:
            remedy = (
                f"A model trained on such replies never sees the {called}. Use a chat template that keeps it, or a task template of "
                "plain text (template: raw)."
            )
            return Trial(what, subject, "fail", f"the rendered reply has lost its {called}", remedy, (shown,))
    stops = models.stop_ids(local.folder, tokenizer, template)
    if not len(ids) or int(ids[-1]) not in stops:
        ends = repr(tokenizer.decode(ids[-1:])) if len(ids) else "nothing"
        remedy = (
            "A model trained on it does not learn to stop. Give the tokenizer an eos_token, or the chat template an end of the "
            "assistant's turn that generation_config.json lists among eos_token_id."
        )
        return Trial(
            what, subject, "fail", f"a reply ends in {ends}, at which generation does not stop", remedy, (shown,)
        )
    end = tokenizer.convert_ids_to_tokens(int(ids[-1]))
    return Trial(what, subject, "pass", f"{len(prompt)} tokens of prompt; a reply ends in {end}{note}", "", (shown,))


def _spelled(tokenizer: Any, ids: Array) -> str:
    text = str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
    return printable(text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]} …")


def contexts(setup: TrialSetup) -> Iterator[Trial]:
    """Prompts and completions fit the context of the model that writes them."""
    longest_of: dict[tuple[str, str], int] = {}
    for name, stage in setup.stages(*SAMPLERS):
        local = setup.local(stage.reads("model")[0])
        if isinstance(local, str):
            continue
        limit = models.config_of(local.folder).get("max_position_embeddings")
        key = (local.source, stage.task)
        if key not in longest_of:
            template = setup.task(stage.task).template
            longest_of[key] = max(
                len(models.render_prompt(local.tokenizer, template, problem.messages))
                for problem in setup.some_problems(stage.task, PROBLEMS)[1]
            )
        longest = longest_of[key]
        most = stage.sampling.max_tokens
        figure = f"{longest} tokens of prompt and at most {most} of completion, of {limit or 'any number'}"
        subject = f"stages.{name}"
        if limit and max(longest, most) >= limit:
            remedy = f"Lower sampling.max_tokens to {max(limit - longest, 1)} or less, or take a model with a longer context."
            yield Trial("context", subject, "fail", figure, remedy)
        elif limit and longest + most > limit:
            remedy = f"A completion ends where the context does, after {limit - longest} tokens."
            yield Trial("context", subject, "warn", figure, remedy)
        else:
            yield Trial("context", subject, "pass", figure)


@dataclass(frozen=True, slots=True)
class _Pair:
    """A student and a teacher that meet in a stage. ids: whether the stage compares token ids, not text. template: the teacher's."""

    stage: str
    student: str
    teacher: str
    ids: bool
    task: str | None


def pairs(setup: TrialSetup) -> Iterator[Trial]:
    """Teacher and student have the same tokenizer where ids are compared, and stop at the same token."""
    seen = set()
    for pair in _pairs(setup):
        student, teacher = setup.local(pair.student), setup.local(pair.teacher)
        if isinstance(student, str) or isinstance(teacher, str):
            continue
        key = (student.source, teacher.source, pair.ids or student.source == teacher.source, pair.task)
        if key in seen:
            continue
        seen.add(key)
        subject = f"stages.{pair.stage}: {student.source} from {teacher.source}"
        yield _vocabularies(subject, pair, student, teacher)
        same = models.tokenizer_fingerprint(student.tokenizer) == models.tokenizer_fingerprint(teacher.tokenizer)
        if same and pair.task is not None:
            yield _ends(subject, student, teacher, setup.task(pair.task).template)
            yield _prompts(subject, student, teacher, setup, pair.task)


def _pairs(setup: TrialSetup) -> Iterator[_Pair]:
    for name, stage in setup.stages(TrainStage, OnPolicyStage):
        cross = is_cross_tokenizer(stage)
        if isinstance(stage, OnPolicyStage):
            for teacher in teachers_of(stage.teacher):
                yield _Pair(name, stage.model, teacher, not cross, stage.task)
            continue
        for teacher in teachers_of(stage.teacher) if stage.teacher else ():
            yield _Pair(name, stage.model, teacher, not cross, stage.task)
        for data in data_of(stage.data):
            writer = setup.recipe.stages.get(data)
            while isinstance(writer, FilterStage):
                writer = setup.recipe.stages.get(writer.data)
            if isinstance(writer, GenerateStage | ScoreStage):
                reads = stage.loss.fn != "cross_entropy" and stage.teacher is None
                yield _Pair(name, stage.model, writer.model, reads, writer.task)


def _vocabularies(subject: str, pair: _Pair, student: LocalModel, teacher: LocalModel) -> Trial:
    what = "tokenizers"
    rows = []
    for one in (student, teacher):
        config = models.text_part(models.config_of(one.folder))
        used = models.vocabulary_size(one.tokenizer, models.config_of(one.folder))
        if used > int(config.get("vocab_size", used)):
            remedy = (
                f"{one.source} has fewer rows than its tokenizer has tokens; take the tokenizer that belongs to it."
            )
            return Trial(what, subject, "fail", f"{used} tokens, {config['vocab_size']} rows", remedy)
        rows.append(f"{used:,} tokens in {config.get('vocab_size', used):,} rows")
    mine, theirs = (models.tokenizer_fingerprint(one.tokenizer) for one in (student, teacher))
    figure = f"student {rows[0]}, teacher {rows[1]}"
    if mine == theirs:
        return Trial(what, subject, "pass", f"the same; {figure}")
    if not pair.ids:
        return Trial(what, subject, "pass", f"two, and the loss reads text; {figure}")
    remedy = (
        "Their ids mean other text, so stored distributions cannot be compared. Take a teacher with the student's tokenizer, learn "
        "from the text (loss: {fn: cross_entropy}), or use a loss between tokenizers (loss: {fn: aligned})."
    )
    return Trial(what, subject, "fail", f"two, {mine} and {theirs}; {figure}", remedy)


def _ends(subject: str, student: LocalModel, teacher: LocalModel, template: Template) -> Trial:
    """Compare the token at which the teacher ends its completions with those at which the student's generation stops."""
    what = "end of a completion"
    end = models.end_id(teacher.tokenizer, template)
    stops = models.stop_ids(student.folder, student.tokenizer, template)
    named = ", ".join(str(student.tokenizer.convert_ids_to_tokens(i)) for i in stops) or "nothing"
    if end is None:
        remedy = "Give the teacher's tokenizer an eos_token, or use a template that ends the assistant's turn."
        return Trial(what, subject, "fail", "the teacher's completions end in no token", remedy)
    token = teacher.tokenizer.convert_ids_to_tokens(end)
    if end in stops:
        return Trial(what, subject, "pass", f"the teacher ends in {token}; the student stops at {named}")
    remedy = (
        f"The student learns to write {token} and would go on behind it to the token limit. Add its id ({end}) to eos_token_id in the "
        "student's generation_config.json, or take a teacher and a student that were both instructed, or neither."
    )
    return Trial(what, subject, "fail", f"the teacher ends in {token}, and the student stops at {named}", remedy)


def _prompts(subject: str, student: LocalModel, teacher: LocalModel, setup: TrialSetup, task: str) -> Trial:
    """Compare the prompts that the teacher answers, from which the student learns, with those that the student is asked later."""
    what, template = "the same prompts", setup.task(task).template
    messages = setup.some_problems(task, 1)[1][0].messages
    mine, theirs = (models.render_prompt(one.tokenizer, template, messages) for one in (student, teacher))
    if mine.tolist() == theirs.tolist():
        return Trial(what, subject, "pass", f"teacher and student read the same {len(mine)} tokens")
    shown = tuple(
        f"{name}: {_spelled(one.tokenizer, ids)}"
        for name, one, ids in (("teacher", teacher, theirs), ("student", student, mine))
    )
    chats = [models.chat_template_of(one.tokenizer, template) is not None for one in (student, teacher)]
    remedy = (
        "The student learns to answer the teacher's prompts, and is evaluated and used under its own chat template. Give it the teacher's "
        "(chat_template.jinja in the student's folder), set the task's template_options so that both agree, or use template: raw."
    )
    figure = "teacher and student read different prompts for the same problem"
    # Two chat templates may differ in a date or a greeting alone; a chat and plain text do not.
    return Trial(what, subject, "warn" if chats[0] == chats[1] else "fail", figure, remedy, shown)


def data(setup: TrialSetup) -> Iterator[Trial]:
    """The first rows of every data set of conversations can be rendered, fit, and are no held-out problems."""
    for name, stage in setup.stages(TrainStage, ScoreStage):
        if isinstance(stage.data, dict) or stage.data in setup.recipe.stages:
            continue
        path = find_data(stage.data)
        if path is None and not setup.fetches:
            yield Trial("data", f"stages.{name}", "skip", f"{stage.data} is not on this machine yet")
        elif path is None or not is_traces(path):
            yield _rows(setup, name, stage)


def _rows(setup: TrialSetup, name: str, stage: TrainStage | ScoreStage) -> Trial:
    assert isinstance(stage.data, str), "several sets are stages' traces"
    what, subject = "data", f"stages.{name}"
    local = setup.local(stage.model)
    if isinstance(local, str):
        return Trial(what, subject, "skip", local)
    task = setup.task(stage.task) if stage.task is not None else None
    template, left_out = template_of(stage, task), DroppedRows()
    table = open_rows(stage.data, stage.model_copy(update={"max_rows": ROWS}), f"{subject}.data")
    kept, lost, longest, shown = 0, 0, 0, ""
    for given in conversations(table, Reader(stage.fields, stage.keep_wrong), left_out):
        replies = list(given.replies(stage.turns if isinstance(stage, TrainStage) else "last"))
        if not replies:
            left_out.reject(given.number, "there is no reply to learn")
        for messages, reply in replies:
            if task is not None and task.holds_out(question_of(messages)):
                left_out.add("held-out problems of the task")
                continue
            try:
                prompt = models.render_prompt(local.tokenizer, template, messages, given.tools)
                ids = models.render_reply(local.tokenizer, template, messages, reply, given.tools)
            except UserError as error:
                left_out.reject(given.number, str(error))
                continue
            longest = max(longest, len(prompt) + len(ids))
            fits = stage.max_tokens is None or len(prompt) + len(ids) <= stage.max_tokens
            kept, lost = kept + fits, lost + (not fits)
            shown = shown or f"{_spelled(local.tokenizer, prompt)}⟦{_spelled(local.tokenizer, ids)}⟧"
    if lost:
        left_out.add(f"longer than max_tokens (the longest has {longest} tokens)", lost)
    out = sum(left_out.reasons.values())
    figure = f"{kept} of the first {kept + out} replies are used, the longest {longest} tokens"
    why = "; ".join(f"{count} left out: {reason}" for reason, count in left_out.reasons.items())
    if not kept or out > LOST * (kept + out):
        first = f" {left_out.first[0]}." if left_out.first else ""
        remedy = f"{why or 'It has no rows.'}{first} `distill check --show` prints the first examples."
        return Trial(what, subject, "fail", figure, remedy, (shown,) if shown else ())
    return Trial(what, subject, "pass", f"{figure}{'; ' + why if why else ''}", "", (shown,) if shown else ())
