"""Rewards: each public function here is a reward, `name(group, *, options) -> one score per completion`.

Rewards are pure: a group's scores do not depend on other groups. None means that a completion could not be judged, which
excludes it from the baseline; it is not the same as 0. A bad completion gets 0, also if it is empty, unfinished or its
format is broken. Weights, failures and limits are in `combined_reward`.
"""

from __future__ import annotations

import re

import pydantic

from distill.language import language_share
from distill.reasoning import reasoning_of, without_prefill
from distill.recipe import Dtype
from distill.records import Group, Template, UserError, draw_seed
from distill.tasks.templates import last_box

_THOUGHT = re.compile(r"\s*<think>(.*)</think>(.*)", re.DOTALL)
_TAGGED = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
_BOX = re.compile(r"\\f?boxed(?![A-Za-z])|\\fbox(?![A-Za-z])")
_AFTER_BOX = re.compile(r"(?:[\s.$*]|\\\)|\\\])*")


def accuracy(group: Group, *, partial: bool = False) -> list[float | None]:
    """1 for a correct completion, 0 for a wrong one, None if the verdict is None (DeepSeek-R1, section 2.2.2).

    partial: use the verdict's score in [0, 1], which gives partial credit if the task's scorer does.
    """
    if partial:
        return [verdict.score for verdict in group.verdicts]
    return [None if verdict.correct is None else float(verdict.correct) for verdict in group.verdicts]


def think_format(group: Group) -> list[float | None]:
    r"""1 if the whole text is one `<think>...</think>` with content and then one answer, else 0 (DeepSeek-R1, 2.2.2).

    The answer has the form that the task's template asks for: one `<answer>...</answer>` with content and nothing
    around it; or a text that ends with its only `\boxed{...}`; or whatever else the template finds an answer in.
    Unfinished completions get 0.
    """
    form = _answer_form(group.template)
    return [
        float(finished and _is_formatted(text, group.template, form))
        for text, finished in zip(group.texts, group.finished, strict=True)
    ]


def language(group: Group, *, target: str = "en") -> list[float | None]:
    """Share of the reasoning's words in the language `target` (ISO 639-1), in [0, 1] (DeepSeek-R1, 2.3.2).

    Judges the same span as the filter `language`: the reasoning in what the model wrote (`reasoning_of`), without the
    template's prefill. Reasoning without words (pure arithmetic) gets 1; a completion without reasoning gets 0.
    """
    scores: list[float | None] = []
    for text in group.texts:
        reasoning = reasoning_of(without_prefill(text, group.template.prefill))
        share = language_share(reasoning, target)
        scores.append(float(bool(reasoning.strip())) if share is None else share)
    return scores


def length(group: Group, *, cache: pydantic.PositiveInt) -> list[float | None]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), in [-1, 0]; lengths are in tokens.

    0 up to max_tokens - cache tokens, then linearly down to -1 at max_tokens; -1 for a completion that was cut off.
    Raises UserError if cache is larger than max_tokens.
    """
    soft = group.max_tokens - cache
    if soft < 0:
        raise UserError(
            f"length: cache is {cache} tokens, but completions have at most {group.max_tokens} (max_tokens). "
            "Use a smaller cache, for example a fifth of max_tokens."
        )
    return [
        min(0.0, max(-1.0, (soft - num) / cache)) if finished else -1.0
        for num, finished in zip(group.num_tokens, group.finished, strict=True)
    ]


def model(
    group: Group,
    *,
    path: str,
    sigmoid: bool = False,
    batch_size: pydantic.PositiveInt = 8,
    dtype: Dtype = "auto",
) -> list[float | None]:
    """The logit r(prompt, completion) of a trained reward model (Bradley-Terry loss, InstructGPT).

    The model was trained with the loss -log sigmoid(r_chosen - r_rejected) (arXiv 2203.02155, eq. 1).
    path: folder or hub id of a sequence classifier with one label. sigmoid: use 1 / (1 + exp(-r)) in (0, 1), because r
    has no fixed scale and a few extreme logits would dominate the other rewards. batch_size, dtype:
    of its forward passes. None if prompt and completion together are longer than the model's context.
    Raises UserError for a model that cannot be reached or is not a reward model.
    """
    from distill.tasks import reward_model

    loaded = reward_model.load(path, dtype)
    return loaded.score(group.problem.messages, group.texts, sigmoid=sigmoid, batch_size=batch_size)


def code(
    group: Group,
    *,
    test_timeout_s: pydantic.PositiveFloat = 5.0,
    timeout_s: pydantic.PositiveFloat = 20.0,
    memory_mb: pydantic.PositiveInt = 512,
    unsafe: bool = False,
    sandbox_command: str | None = None,
) -> list[float | None]:
    """Share of the problem's tests that the completion's program passes, in [0, 1]; for problems with tests (`tasks.code`).

    test_timeout_s, timeout_s: wall seconds for one test and for all of a program's. memory_mb: address space of each
    process. unsafe, sandbox_command: the isolation of the program (`tasks.sandbox`). None if the sandbox failed; unfinished
    completions and those without an answer get 0. A group waits for its slowest programs: set reward_timeout to
    timeout_s times the group's size over the number of cores.
    Raises UserError for a problem without tests, or without a sandbox.
    """
    from distill.tasks import sandbox
    from distill.tasks.code import code_verdicts

    payload = group.problem.payload
    if "tests" not in payload and "check" not in payload:
        raise UserError(
            f"code: task {group.problem.task!r} has problems without tests (the first is {group.problem.problem_id}). "
            f"Use this reward only for tasks whose answers are programs, such as humaneval."
        )
    limits = sandbox.Limits(test_s=test_timeout_s, problem_s=timeout_s, memory_mb=memory_mb)
    answers = [
        group.template.extract(text) if finished else None
        for text, finished in zip(group.texts, group.finished, strict=True)
    ]
    run = [answer for answer in answers if answer is not None]
    held = sandbox.choose(unsafe, sandbox_command)
    verdicts = iter(code_verdicts(run, payload, held, limits))
    return [0.0 if answer is None else next(verdicts).score for answer in answers]


def random(group: Group, *, probability: float = 0.5) -> list[float | None]:
    """A control: 1 with the given probability, else 0, for any text; drawn from (seed, problem, index in the group)."""
    return [
        float(draw_seed(group.seed, group.problem.problem_id, index) < probability * 2**63)
        for index in range(len(group))
    ]


# -------------------------------------------------------------------------------------------- format


def _answer_form(template: Template) -> str:
    """Return the form of answer that a template accepts, found by trying it: "any" text, one in "tags", or in a "box".

    A template whose instructions ask for tags requires them here, even if its `extract` accepts less (r1_zero).
    """
    if "<answer>" in f"{template.system or ''}{template.plain}":
        return "tags"
    for form, answer in (("any", "1"), ("tags", "<answer>1</answer>"), ("box", r"\boxed{1}")):
        if template.extract(f"<think>1</think>{answer}") is not None:
            return form
    return "any"


def _is_formatted(text: str, template: Template, form: str) -> bool:
    if text.count("<think>") != 1 or text.count("</think>") != 1:
        return False
    found = _THOUGHT.fullmatch(text)
    if found is None or not found[1].strip() or not found[2].strip():
        return False
    answer = found[2]
    if form == "tags":
        tagged = _TAGGED.fullmatch(answer)
        once = text.count("<answer>") == 1 and text.count("</answer>") == 1
        if not once or tagged is None or not tagged[1].strip():
            return False
    elif form == "box" and not _ends_with_its_only_box(answer):
        return False
    return template.extract(text) is not None


def _ends_with_its_only_box(text: str) -> bool:
    """Return whether a text ends with its only box; a full stop or a closing dollar sign may follow."""
    boxes = list(_BOX.finditer(text))
    content = last_box(text)
    if len(boxes) != 1 or not content or "<answer>" in text:
        return False
    closed = text.find(content, boxes[0].end()) + len(content)
    rest = text[closed:].lstrip()
    return rest.startswith("}") and _AFTER_BOX.fullmatch(rest[1:]) is not None
