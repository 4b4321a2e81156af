"""The text of a new recipe: settings as YAML, each with the reason for its value beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distill.recipe.json_schema import FILE
from distill.tools.new.model_look import ModelLook
from distill.tools.new.settings import Settings
from distill.tools.new.stage_keys import capture, engine, located, rows, sampling
from distill.tools.new.student_stages import pruned, results, students
from distill.tools.new.yaml_lines import Lines

TEMPLATES = {
    "boxed": r"asks for reasoning and for the answer in \boxed{}, where the judge looks for it",
    "boxed_plain": r"asks for the answer in \boxed{}, as plain text: one of the models has no chat template",
    "direct": "the question as it is, under the model's chat template, without a system message",
    "direct_plain": "the question as it is, as plain text: one of the models has no chat template",
}
JUDGES = {
    "math": "compares what answers mean: numbers, formulas, choices, words. exact = as text, none = judge nothing",
    "exact": "compares answers as text. math = by what they mean, none = judge nothing",
    "none": "no answer is judged: there is none to compare with, or it is not short. Others: math, exact",
}


def write(settings: Settings, folder: Path, cost: Sequence[str] = ()) -> str:
    """Return the recipe's text. folder: that it will lie in, to which paths are relative. cost: lines for its head."""
    lines = Lines()
    lines.lines.append(f"# yaml-language-server: $schema={FILE}")
    _head(lines, settings, cost)
    lines.key(0, "name", settings.name, "the run's folder is runs/<name>")
    lines.key(0, "description", _description(settings))
    lines.key(0, "seed", 17, "of every random choice; another number gives another run")
    lines.key(0, "models")
    _model(lines, "teacher", settings.teacher, folder)
    if settings.layers is None:
        _model(lines, "student", settings.student, folder)
    _task(lines, settings, folder)
    lines.key(0, "stages")
    _data_stages(lines, settings, folder)
    if settings.measures_distance:
        _unseen(lines, settings)
    if settings.layers is not None:
        pruned(lines, settings)
    students(lines, settings, folder)
    results(lines, settings)
    return lines.text()


def _head(lines: Lines, settings: Settings, cost: Sequence[str]) -> None:
    own = "completions that the teacher writes" if settings.learn_from == "teacher" else "the completions in the data"
    lines.comment(
        f"Written by `distill new` for {settings.data.given}. A student learns from {own}: once the teacher's distribution at every token (kl), "
        "once only the text (sft)."
    )
    lines.comment(
        "Every value has its reason beside it. Change what you like, then: distill check, distill doctor, distill run."
    )
    for line in (*cost, *settings.remarks()):
        lines.comment(f"- {line}")


def _description(settings: Settings) -> str:
    source = Path(settings.data.given).name or settings.data.given
    return f"What does a student learn from its teacher's distributions, and what from text alone, on {source}?"


def _model(lines: Lines, name: str, look: ModelLook, folder: Path) -> None:
    path = Path(look.source).expanduser()
    lines.key(1, name, located(path, folder) if path.is_dir() else look.source, look.words())


def _task(lines: Lines, settings: Settings, folder: Path) -> None:
    data = settings.data
    path = None if data.path is None else located(data.path, folder)
    lines.key(0, "tasks")
    lines.key(1, "questions")
    whys = {
        "path": f"read as {data.layout}; columns: {', '.join(data.columns)}",
        "dataset": f"read as {data.layout}; columns: {', '.join(data.columns)}",
        "held_out_split": "hash = one in ten of the train split, by content"
        if (data.splits or ("", ""))[1] == "hash"
        else "",
        "judge": JUDGES[settings.judge],
        "template": TEMPLATES[settings.template],
    }
    for key, value in data.task(settings.judge, settings.template, path).items():
        lines.key(2, key, value, whys.get(key, ""))


def _data_stages(lines: Lines, settings: Settings, folder: Path) -> None:
    if settings.learn_from == "data":
        if settings.stores:
            lines.comment(
                "The teacher reads the completions in the data and stores its distribution at every token.", 1
            )
            lines.key(1, "scored")
            lines.key(2, "kind", "score")
            lines.key(2, "model", "teacher")
            rows(lines, settings, folder)
            capture(lines, settings)
            engine(lines, settings)
        return
    lines.comment("The teacher answers the questions; its distribution at every token is stored with the text.", 1)
    lines.key(1, "traces")
    lines.key(2, "kind", "generate")
    lines.key(2, "model", "teacher")
    lines.key(2, "task", "questions")
    left = settings.train - settings.questions
    used = "all that are not held out" if not left else f"of {settings.train}; a larger number adds only the difference"
    lines.key(2, "problems", settings.questions, used)
    why = "completions of each question" + ("; several, because questions are few" if settings.samples > 1 else "")
    lines.key(2, "samples", settings.samples, why)
    sampling(lines, settings, 1.0, "1.0: the text is a draw from the distribution that is stored with it")
    if settings.stores:
        capture(lines, settings)
    else:
        lines.key(
            2, "top_logprobs", 0, "text only: the student has other tokens, so stored distributions are of no use to it"
        )
    engine(lines, settings)
    lines.comment("Which of them are learned.", 1)
    lines.key(1, "clean")
    lines.key(2, "kind", "filter")
    lines.key(2, "data", "traces")
    keep: list[Any] = [{"fn": "correct"}] if settings.judged else []
    why = "right answers that came to an end" if settings.judged else "those that came to an end before max_tokens"
    lines.key(2, "keep", [*keep, {"fn": "finished"}], f"{why}; more: distill ls filters")


def _unseen(lines: Lines, settings: Settings) -> None:
    lines.comment(
        "The teacher's completions of held-out questions: how near to it the students are is measured on them.", 1
    )
    lines.key(1, "unseen")
    lines.key(2, "kind", "generate")
    lines.key(2, "model", "teacher")
    lines.key(2, "task", "questions")
    lines.key(2, "split", "held_out", "never learned")
    lines.key(2, "problems", settings.unseen, f"of {settings.held_out}")
    sampling(
        lines,
        settings,
        1.0,
        "as above" if settings.learn_from == "teacher" else "1.0: draws from the teacher's own distribution",
    )
    capture(lines, settings)
    engine(lines, settings)
