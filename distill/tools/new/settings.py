"""The settings of a new recipe, chosen from the looks at data and models: sizes, stages, rates, memory.

In: a `DataLook`, two `ModelLook`s and what the user answered. Out: `Settings`, which `recipe_text` writes down. What depends on the
machine (memory, time) is chosen in `costing`, by predicting.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from distill.recipe.served import FN
from distill.tasks.problem_list import Judge
from distill.tools.new.data_look import DataLook
from distill.tools.new.model_look import ModelLook

LearnFrom = Literal["teacher", "data"]
SMALL, LITTLE = 1000, 200
"""Questions below which several completions of each are sampled, and below which there is little to learn from and to measure."""
MEASURED = 256
"""Held-out questions on which accuracy is measured, at most."""
UNSEEN = 128
"""Held-out questions on which the distance from the teacher is measured, at most."""
SPARE = 32
"""Tokens of the context that the estimate of the longest prompt may be wrong by."""
WEAK = 4e8
"""Parameters below which a teacher is said to be rarely right."""
LARGE = 3e9
"""Parameters from which the learning rate is lower."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A teacher that is served elsewhere. url: its address; name: of the model there; key: $NAME of a variable, or ""."""

    url: str
    name: str
    key: str = ""

    def section(self, requests: int) -> dict[str, object]:
        """Return the engine section. requests: in flight at a time."""
        key = {"key": self.key} if self.key else {}
        return {"fn": FN, "base_url": self.url, "model": self.name, **key, "batch_size": requests}


@dataclass(frozen=True, slots=True)
class Training:
    """How the students are trained, as far as memory decides it. rank: of a LoRA adapter, 0 = all weights are trained."""

    rank: int = 0
    checkpointing: bool = False
    micro_tokens: int = 2048


LADDERS = {
    "cpu": (Training(), Training(0, True, 1024), Training(16), Training(16, True, 1024)),
    "cuda": (
        Training(0, False, 16384), Training(0, True, 16384), Training(0, True, 4096), Training(64, True, 8192),
        Training(64, True, 2048), Training(16, True, 1024),
    ),
}  # fmt: skip
"""Ways of training by device, from the one that needs most memory on."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that the recipe's text says.

    name: of the recipe. learn_from: the teacher's own completions, or those in the data. judge, template: of the task. plain: whether prompts
    are plain text because one of the models has no chat template. train, held_out: questions there are. questions: of them used.
    samples: completions of each. max_tokens: of a completion. longest: tokens of prompt and completion that are learned.
    layers: of a pruned student, None for a model. same_tokens: whether both models have the same tokenizer.
    apart: whether the students' distance is measured in stages of their own, because the teacher does not fit the memory in float32.
    """

    name: str
    data: DataLook
    teacher: ModelLook
    student: ModelLook
    layers: int | None
    endpoint: Endpoint | None
    learn_from: LearnFrom
    judge: Judge
    train: int
    held_out: int
    questions: int
    samples: int
    max_tokens: int
    device: str
    training: Training
    apart: bool = False

    @property
    def same_tokens(self) -> bool:
        """Whether both tokenizers are the same, as far as is known."""
        return self.teacher.tokenizer == self.student.tokenizer or not (
            self.teacher.tokenizer and self.student.tokenizer
        )

    @property
    def plain(self) -> bool:
        """Whether prompts are plain text: one of the models has a chat template, the other has none."""
        return self.endpoint is None and self.teacher.chat != self.student.chat

    @property
    def judged(self) -> bool:
        return self.judge != "none"

    @property
    def template(self) -> str:
        asks = "boxed" if self.judged and self.learn_from == "teacher" else "direct"
        return f"{asks}_plain" if self.plain else asks

    @property
    def traces(self) -> int:
        """Traces to learn from, at most."""
        return self.questions * self.samples if self.learn_from == "teacher" else self.data.rows

    @property
    def stores(self) -> bool:
        """Whether the teacher's distributions can be stored and compared with the student's."""
        return self.same_tokens

    @property
    def measures_distance(self) -> bool:
        """Whether there are held-out questions enough to measure the distance from the teacher on."""
        return self.stores and self.held_out >= 2

    @property
    def unseen(self) -> int:
        return min(self.held_out, UNSEEN)

    @property
    def measured(self) -> int:
        return min(self.held_out, MEASURED)

    @property
    def epochs(self) -> int:
        return 3 if self.traces < LITTLE else 2 if self.traces < 5000 else 1

    @property
    def batch(self) -> int:
        """Traces in an optimiser step: about 40 steps or more, at least 4 and at most 64 traces."""
        wanted = max(self.traces * self.epochs / 40, 4)
        return int(min(2 ** int(math.log2(wanted)), 64))

    @property
    def steps(self) -> int:
        return max(1, self.traces * self.epochs // self.batch)

    @property
    def lr(self) -> str:
        """The peak learning rate, as text."""
        size = self.student.params
        if self.training.rank:
            return "5e-4" if size < 1e9 else "2e-4"
        return "1e-4" if size < LARGE else "2e-5"

    @property
    def top_logprobs(self) -> int:
        return 20 if self.endpoint else 64

    @property
    def engine_batch(self) -> int:
        return 32 if self.endpoint else 256 if self.device == "cuda" else 64

    @property
    def longest(self) -> int:
        """Tokens of prompt and completion together that a stage learns from, at most."""
        if self.learn_from == "teacher":
            return 4096
        wanted = 1.5 * (self.data.prompt_tokens + self.data.reply_tokens) + SPARE
        return int(min(max(rounded(wanted), 256), self.context))

    @property
    def context(self) -> int:
        return context_of(self.teacher, self.student)

    def remarks(self) -> list[str]:
        """What the user should know before the run."""
        found = []
        if self.train + self.held_out < LITTLE:
            tens = f" (an accuracy on {self.held_out} held-out questions has an interval of tens of points)"
            on = tens if self.judged and self.held_out > 1 else ""
            found.append(
                f"{self.train + self.held_out} questions are few: enough to see that everything works, too few to tell one way of training "
                f"from another{on}. Some hundreds are better."
            )
        if self.judged and self.learn_from == "teacher" and not self.endpoint and self.teacher.params < WEAK:
            found.append(
                "a teacher of this size rarely writes a right answer where the judge looks for it, and only right ones are learned: look at the line "
                "`right answers` of `distill doctor`. --judge none learns all completions."
            )
        if self.held_out < 2:
            found.append(
                "fewer than two questions are held out (one in ten is, by a hash of its text), so nothing can be measured: add questions."
            )
        if not self.same_tokens:
            found.append(
                "teacher and student have different tokenizers: stored distributions cannot be compared, so the teacher runs in the trainer and "
                "the loss `aligned` compares both where their tokens begin at the same characters."
            )
        if self.plain:
            found.append(
                "one of the models has no chat template: both read the prompts as plain text, so that the student learns under the prompts it "
                "is used with. An instructed teacher may answer worse so; with an instructed student this is not needed."
            )
        templates = {one.chat_template for one in (self.teacher, self.student) if one.tokenizer}
        if len(templates) > 1 and self.same_tokens and not self.plain:
            found.append(
                "the chat templates differ: the student learns under the teacher's prompts and is used under its own; `distill doctor` shows both."
            )
        return found


def context_of(teacher: ModelLook, student: ModelLook) -> int:
    """Tokens that fit both models."""
    return min(teacher.context or 1 << 20, student.context or 1 << 20)


def rounded(tokens: float) -> int:
    """Round up to a multiple of 64."""
    return 64 * math.ceil(tokens / 64)


def default_tokens(data: DataLook, teacher: ModelLook, student: ModelLook, judged: bool, device: str) -> int:
    """Choose the limit of a completion: by the replies in the data, or by what is usual; within the models' context."""
    if data.reply_tokens:
        wanted = min(max(rounded(2 * data.reply_tokens), 128), 2048)
    else:
        wanted = (1024 if judged else 512) if device == "cuda" else (384 if judged else 256)
    return min(wanted, most_tokens(data, teacher, student))


def most_tokens(data: DataLook, teacher: ModelLook, student: ModelLook) -> int:
    """Tokens of a completion that fit the context behind the longest of 20 prompts, at least 16."""
    room = context_of(teacher, student) - 1.3 * data.prompt_tokens - 2 * SPARE
    return max(16, int(room))


def default_samples(questions: int) -> int:
    """Completions of each question: more where questions are few."""
    return 1 if questions >= SMALL else 2 if questions >= LITTLE else 4
