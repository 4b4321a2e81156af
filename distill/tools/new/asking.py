"""The questions of `distill new` and how their answers are settled: by flags, by the user, or by default."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from distill import machine, progress
from distill.compute import cards as gpus
from distill.compute.cards import Cards
from distill.conversations.layouts import FIELDS
from distill.errors import UserError
from distill.files import cache_home
from distill.recipe import served
from distill.tasks.problem_list import Judge
from distill.tools.new import costing, settings
from distill.tools.new.data_look import DataLook, UnknownLayoutError, look_at
from distill.tools.new.dialogue import Dialogue, Question, one_of, whole_number
from distill.tools.new.model_look import PRUNED, ModelLook, check_pair, layers_kept
from distill.tools.new.model_look import look_at as look_at_model
from distill.tools.new.settings import Endpoint, LearnFrom, Settings, Training

DATA = Question(
    "--data",
    "Questions or conversations",
    "A file (JSON lines, JSON, CSV, Parquet, .gz of them), a folder of files, or a data set on the hub (owner/name).",
)
TEACHER = Question(
    "--teacher",
    "Teacher",
    "The larger model: a hub id (owner/name), a folder, package:NAME for a GGUF file in an installed package, or the http address of an endpoint.",
)
TEACHER_NAME = Question(
    "--teacher-name", "The model's name at the endpoint", "As the endpoint lists it under /v1/models."
)
STUDENT = Question(
    "--student",
    "Student",
    "The smaller model, named in the same ways; or `pruned`: the teacher with two thirds of its layers (`pruned:12` keeps 12).",
)
LEARN_FROM = Question(
    "--learn-from",
    "Learn from the teacher's completions or from those in the data? (teacher, data)",
    "The data hold completions. `teacher`: the teacher answers anew. `data`: the student learns these, and the teacher's distributions over them.",
)
GPU = Question(
    "--gpu",
    "Where will it run?",
    "`here`, or GPUs that are elsewhere, as h100:1 or 4090:2 (memory and time are predicted for them).",
)
TOKENS = Question(
    "--max-tokens", "Tokens of a completion, at most", "Longer completions are cut and not learned. Time grows with it."
)
QUESTIONS = Question(
    "--questions", "Questions to learn from", "More take longer; a larger number later adds only the difference."
)
NAME = Question("NAME", "Name of the recipe", "It is written to NAME.yaml, and its run to runs/NAME.")
COLUMN = Question(
    "--column",
    "Columns, as question=COLUMN,answer=COLUMN",
    "Name the column of questions; answer= or reply= if there is one.",
)


@dataclass(frozen=True, slots=True)
class Given:
    """What the command line gave; None where it gave nothing. columns: as part=column."""

    name: str | None = None
    data: str | None = None
    teacher: str | None = None
    student: str | None = None
    learn_from: str | None = None
    gpu: str | None = None
    max_tokens: str | None = None
    questions: str | None = None
    samples: int | None = None
    judge: str | None = None
    columns: tuple[str, ...] = ()
    teacher_name: str | None = None
    teacher_key: str | None = None
    force: bool = False


def settle_all(dialogue: Dialogue, given: Given) -> tuple[Settings, Cards | None]:
    """Settle every question. Returns the settings and the GPUs that the recipe is for; None = this machine."""
    data = _data(dialogue, given)
    _show_data(dialogue, data)
    cards = dialogue.settle(GPU, given.gpu, _cards, "here")
    first, endpoint = _teacher(dialogue, given, cards is not None)
    teacher, student, layers = _models(dialogue, given, first, endpoint, cards is not None)
    learn_from = _learn_from(dialogue, given, data)
    judge = cast(Judge, one_of("math", "exact", "none")(given.judge) if given.judge else data.judge)
    train, held_out = data.questions(judge)
    if not train:
        raise UserError(f"--data: {data.given}: no question is left to learn from ({held_out} are held out).")
    device = "cuda" if cards is not None else _device(teacher, student)
    dialogue.say(f"  split     {train:,} questions to learn from, {held_out:,} held out to measure on (never learned)")
    samples = given.samples or settings.default_samples(train)
    chosen = Settings(
        "new", data, teacher, student, layers, endpoint, learn_from, judge, train, held_out, train, samples, 1, device, Training()
    )  # fmt: skip
    return _sized(dialogue, given, chosen, cards), cards


def _data(dialogue: Dialogue, given: Given) -> DataLook:
    columns = _columns(",".join(given.columns)) if given.columns else {}

    def read(text: str) -> DataLook:
        try:
            return _seen(text, columns, given)
        except UnknownLayoutError as error:
            if not dialogue.asks:
                raise error.within(f"{error} Name them: --column question=COLUMN --column answer=COLUMN.") from None
            dialogue.say(f"  {error}")
            return dialogue.settle(COLUMN, None, lambda pairs: _seen(text, _columns(pairs), given))

    return dialogue.settle(DATA, given.data, read)


def _seen(text: str, columns: dict[str, str], given: Given) -> DataLook:
    with progress.working("reading the data"):
        look = look_at(text, columns)
        look.questions(given.judge or look.judge)
    return look


def _columns(text: str) -> dict[str, str]:
    found = {}
    for pair in text.split(","):
        part, equals, column = pair.partition("=")
        if not equals or part.strip() not in FIELDS or not column.strip():
            raise UserError(f"--column {pair}: write part=column with one of the parts {', '.join(FIELDS)}.")
        found[part.strip()] = column.strip()
    return found


def _show_data(dialogue: Dialogue, data: DataLook) -> None:
    dialogue.say(f"\n{data.rows:,} rows, read as {data.layout}; columns: {', '.join(data.columns)}", strong=True)
    for question, reply, answer in data.examples:
        dialogue.say(f"  question  {_short(question)}")
        if reply:
            dialogue.say(f"  reply     {_short(reply)}")
        if answer:
            dialogue.say(f"  answer    {_short(answer)}")
    if data.rejected:
        dialogue.say(f"  left out  {len(data.rejected)} rows cannot be used; {_short(data.rejected[0])}")
    dialogue.say(f"  judge     {data.judge}: {data.why}")


def _short(text: str, most: int = 100) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _teacher(dialogue: Dialogue, given: Given, elsewhere: bool) -> tuple[ModelLook | None, Endpoint | None]:
    """Return the teacher, or the endpoint that serves it."""

    def read(text: str) -> ModelLook | str:
        if text.startswith(("http://", "https://")):
            try:
                return str(served.checked_url(text))
            except ValueError as error:
                raise UserError(f"{text}: {error}.") from None
        return _looked(text, elsewhere)

    found = dialogue.settle(TEACHER, given.teacher, read)
    if isinstance(found, ModelLook):
        dialogue.say(f"  teacher   {found.words()}")
        return found, None
    name = dialogue.settle(TEACHER_NAME, given.teacher_name, lambda text: text)
    try:
        served.checked_key(given.teacher_key)
    except ValueError as error:
        raise UserError(f"--teacher-key: {error}.") from None
    return None, Endpoint(found, name, given.teacher_key or "")


def _looked(text: str, elsewhere: bool) -> ModelLook:
    with progress.working(f"looking at {text}"):
        return look_at_model(text, elsewhere=elsewhere)


def _models(
    dialogue: Dialogue, given: Given, teacher: ModelLook | None, endpoint: Endpoint | None, elsewhere: bool
) -> tuple[ModelLook, ModelLook, int | None]:
    """Return (teacher, student, layers of a pruned student). A served teacher is read with the student's tokenizer."""

    def read(text: str) -> tuple[ModelLook, int | None]:
        if text.partition(":")[0] in PRUNED:
            if teacher is None:
                raise UserError("pruned: a served teacher cannot be pruned; name a model.")
            return teacher, layers_kept(text, teacher)
        student = _looked(text, elsewhere)
        if teacher is not None:
            check_pair(teacher, student)
        return student, None

    student, layers = dialogue.settle(STUDENT, given.student, read)
    kept = f"the teacher with {layers} of its {student.shape.layers} layers" if layers else student.words()
    dialogue.say(f"  student   {kept}")
    return teacher or student, student, layers


def _learn_from(dialogue: Dialogue, given: Given, data: DataLook) -> LearnFrom:
    if not data.replies:
        if given.learn_from == "data":
            raise UserError("--learn-from data: the data hold no completions, only questions.")
        return "teacher"
    default = "data" if data.replies > 0.5 else "teacher"
    return cast(LearnFrom, dialogue.settle(LEARN_FROM, given.learn_from, one_of("teacher", "data"), default))


def _cards(text: str) -> Cards | None:
    return None if text in ("", "here") else gpus.parse(text)


def _sized(dialogue: Dialogue, given: Given, chosen: Settings, cards: Cards | None) -> Settings:
    """Settle the length of completions and the number of questions, of which the default follows from the time that they take."""
    data, teacher, student, train = chosen.data, chosen.teacher, chosen.student, chosen.train
    most = settings.most_tokens(data, teacher, student)
    tokens = settings.default_tokens(data, teacher, student, chosen.judged, chosen.device)
    fitting = whole_number(1, most, "tokens that fit the models' context behind a prompt")
    chosen = replace(chosen, max_tokens=dialogue.settle(TOKENS, given.max_tokens, fitting, str(tokens)))
    if chosen.learn_from == "data":
        return chosen
    default = train
    if given.questions is None:
        with progress.working("predicting how long all questions take"):
            default = costing.affordable(*costing.fitted(chosen, Path.cwd(), cards))
    counted = whole_number(1, train, "questions to learn from in the data")
    number = dialogue.settle(QUESTIONS, given.questions, counted, str(default))
    return replace(chosen, questions=number, samples=given.samples or settings.default_samples(number))


def _device(*models: ModelLook) -> str:
    widths = [(model.shape.hidden, model.shape.intermediate) for model in models]
    with progress.working("measuring this machine"):
        return machine.measured(widths, cache_home() / "machine").device
