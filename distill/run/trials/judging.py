"""Trials of judges and rewards: right answers are right, wrong ones are not, and rewards tell them apart.

A reply with a problem's own gold answer, in the form that the task's template reads, must be judged correct; with another problem's
gold answer it must not. A group of such replies must get rewards that differ, the right one's the highest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distill.errors import MachineError
from distill.recipe import GenerateStage, GrpoStage, base_name
from distill.records import Group, Problem, Task, Template, UserError, Verdict
from distill.run.trials.trial import Trial, TrialSetup
from distill.stages.inputs.named_rewards import resolve_rewards
from distill.tasks.combined_reward import CombinedReward

PROBLEMS = 12
"""Problems whose gold answers are judged."""
ENOUGH = 4
"""The least number of pairs of different answers for which a share says anything."""
LEAST_GOLD, MOST_SHUFFLED = 0.8, 0.2
"""Shares of accepted answers below (own gold) and above (another's gold) which a judge fails."""
THOUGHT = "<think>\nI work it out step by step.\n</think>\n\n"
FORMS = (
    f"{THOUGHT}<answer>{{}}</answer>",
    f"{THOUGHT}The answer is \\boxed{{{{{{}}}}}}",
    f"{THOUGHT}{{}}",
    f"{THOUGHT}#### {{}}",
    f"{THOUGHT}```python\n{{}}\n```",
    "{}",
    f'{THOUGHT}{{{{"answer": "{{}}"}}}}',
)
"""Replies with an answer, of which a template reads at least one."""
PROSE = f"{THOUGHT}I do not know."
LOREM = ("So", "we", "add", "2", "and", "3,", "Wait!", "wait?\n\n")
"""Words of the replies that differ in length only."""
SHOWN = 5
"""Replies of a group that are told: right, wrong, without an answer, empty and cut."""
GROUPS = 3
"""Problems of which a group of replies is scored."""
PATIENCE = 20.0
"""Seconds that a reward may take for a group in a trial."""
ALIKE = "All replies get the same score, so every advantage is 0. Use a reward that tells a right reply from others."
NO_ORDER = frozenset({"random"})
"""Rewards that do not depend on the text."""
WITH_MODEL = frozenset({"model"})
"""Rewards that load a model."""


SHORT = 60
"""Characters of an answer that a template must read as it is."""


def form_of(template: Template, golds: Sequence[str]) -> str | None:
    """Return the form of a reply from which the template reads most of the answers as they are; None if it reads none."""
    got = {form: [template.extract(form.format(gold)) for gold in golds] for form in FORMS}
    found = {form: sum(answer is not None for answer in answers) for form, answers in got.items()}
    read = {
        form: sum(
            answer is not None and answer.strip() == gold.strip() for answer, gold in zip(answers, golds, strict=True)
        )
        for form, answers in got.items()
    }
    best = max(FORMS, key=lambda form: (read[form], found[form]))
    return best if found[best] else None


@dataclass(frozen=True, slots=True)
class _Judged:
    """A task's problems, the form of their answers, and (problem, own gold, another problem's gold) of each."""

    task: Task
    form: str
    triples: list[tuple[Problem, str, str | None]]

    def verdict(self, problem: Problem, answer: str) -> Verdict:
        return self.task.judge(problem, self.form.format(answer), True)


def _judged(setup: TrialSetup, name: str) -> _Judged | Trial:
    """Return what a task's judge is tried on, or why it cannot be."""
    what, subject = "judge", f"tasks.{name}"
    task = setup.task(name)
    try:
        _, problems = setup.some_problems(name, PROBLEMS)
    except MachineError as error:
        return Trial(what, subject, "skip", str(error))
    except UserError as error:
        return Trial(what, subject, "fail", "the task has no problems", str(error))
    with_gold = [(problem, problem.gold) for problem in problems if problem.gold]
    if not with_gold:
        return Trial(what, subject, "skip", "its problems have no gold answers")
    form = form_of(task.template, [gold for _, gold in with_gold])
    if form is None:
        remedy = "Its `extract` returned None for answers in tags, in a box, after four hash signs, in a code block, in JSON and bare."
        return Trial(
            what, subject, "warn", f"template {task.template.name:.60} reads an answer in no usual form", remedy
        )
    golds = [gold for _, gold in with_gold]
    triples = []
    for number, (problem, gold) in enumerate(with_gold):
        others = [*golds[number + 1 :], *golds[:number]]
        other = next((one for one in others if one != gold and not task.same_answer(one, gold)), None)
        triples.append((problem, gold, other))
    return _Judged(task, form, triples)


def judges(setup: TrialSetup) -> Iterator[Trial]:
    """Judge gold answers and shuffled ones of every task that a due stage uses."""
    used = {task: None for name in setup.due for task in setup.recipe.stages[name].reads("task")}
    for name in used:
        judged = _judged(setup, name)
        yield judged if isinstance(judged, Trial) else _judge(name, judged)


def _judge(name: str, judged: _Judged) -> Trial:
    what, subject = "judge", f"tasks.{name}"
    own = [(problem, judged.verdict(problem, gold)) for problem, gold, _ in judged.triples]
    swapped = [(p, judged.verdict(p, other)) for p, _, other in judged.triples if other is not None]
    right = sum(verdict.correct is True for _, verdict in own)
    wrong = sum(verdict.correct is True for _, verdict in swapped)
    figure = f"{right} of {len(own)} gold answers are correct, {wrong} of {len(swapped)} of other problems"
    short = all(len(gold) <= SHORT and "\n" not in gold for _, gold, _ in judged.triples)
    if right < len(own):
        problem, verdict = next((p, v) for p, v in own if v.correct is not True)
        remedy = (
            f"Problem {problem.problem_id}, gold {problem.gold!r:.60}: the template reads {verdict.answer!r:.60}, judged "
            f"{verdict.reason or 'wrong'!r}. Use the template that the answers' form needs, or another judge."
        )
        # A long gold answer may be a whole solution, of which nobody but its judge knows how it is written in a reply.
        failed = right < LEAST_GOLD * len(own) and short
        return Trial(what, subject, "fail" if failed else "warn", figure, remedy)
    if wrong:
        problem, verdict = next((p, v) for p, v in swapped if v.correct is True)
        remedy = (
            f"Problem {problem.problem_id}, gold {problem.gold!r:.60}: the answer {verdict.answer!r:.60} is accepted too. A judge that "
            "accepts wrong answers rewards them; use a stricter one."
        )
        many = len(swapped) >= ENOUGH and wrong > MOST_SHUFFLED * len(swapped)
        return Trial(what, subject, "fail" if many else "warn", figure, remedy)
    return Trial(what, subject, "pass", figure)


def rewards(setup: TrialSetup, *, with_models: bool = True) -> Iterator[Trial]:
    """Score a right reply, a wrong one, one without an answer, an empty and a cut one with each stage's rewards.

    Of the copies of a stage with other training seeds, whose rewards are the same, the first is tried.
    """
    tried: set[str] = set()
    judged_of: dict[str, _Judged | Trial] = {}
    for name, stage in setup.stages(GrpoStage, GenerateStage):
        names = [reward.fn for reward in stage.rewards]
        if not names or base_name(name) in tried:
            continue
        tried.add(base_name(name))
        subject = f"stages.{name}"
        if not with_models and WITH_MODEL & {*names}:
            yield Trial("rewards", subject, "skip", "a reward model is not loaded for a trial")
            continue
        if stage.task not in judged_of:
            judged_of[stage.task] = _judged(setup, stage.task)
        judged = judged_of[stage.task]
        if isinstance(judged, Trial):
            yield Trial("rewards", subject, "skip", judged.figure)
            continue
        yield _reward(subject, stage, names, judged)


def _reward(subject: str, stage: GrpoStage | GenerateStage, names: list[str], judged: _Judged) -> Trial:
    what = "rewards"
    found = [(problem, gold, other) for problem, gold, other in judged.triples if other is not None][:GROUPS]
    if not found:
        return Trial(what, subject, "skip", "all problems have the same answer")
    reward = CombinedReward(
        resolve_rewards(stage, subject),
        limit_s=min(stage.reward_timeout, PATIENCE),
        first_limit_s=PATIENCE,
        max_failed=stage.max_failed_rewards,
    )
    scores = reward([_group(stage, judged, problem, gold, other) for problem, gold, other in found])
    told = [_told(each.total) for each in scores]
    figure = f"right, wrong, without an answer, empty, cut: {told[0]}"
    failed = [each for each in scores if each.failed]
    if failed:
        figure = f"{', '.join(failed[0].failed)} raised or took longer than {PATIENCE:g} s in {len(failed)} of {len(scores)} groups"
        remedy = "A group whose reward fails is not learned from, and a stage of which many fail ends. Mend the reward."
        return Trial(what, subject, "fail" if len(failed) == len(scores) else "warn", figure, remedy)
    alike = all(_alike(each.total) for each in scores) and not NO_ORDER & {*names}
    if alike:
        return Trial(what, subject, "warn" if isinstance(stage, GenerateStage) else "fail", figure, ALIKE)
    for each, shown in zip(scores, told, strict=True):
        if remedy := _wrong(each.total, names):
            return Trial(what, subject, "fail", f"right, wrong, without an answer, empty, cut: {shown}", remedy)
    return Trial(what, subject, "pass", figure)


def _group(stage: GrpoStage | GenerateStage, judged: _Judged, problem: Problem, gold: str, other: str) -> Group:
    """A right reply, a wrong one, one without an answer, an empty and a cut one; then some that differ in length and in form,
    which a reward may be about."""
    limit = stage.sampling.max_tokens
    right = judged.form.format(gold)
    # (text, whether it ended by itself)
    tried = (
        *((right, True), (judged.form.format(other), True), (PROSE, True), ("", True), (right[:20], False)),
        *((form.format(gold), True) for form in FORMS),
        *((" ".join(LOREM[:words]), True) for words in range(1, len(LOREM) + 1)),
    )
    return Group(
        problem=problem,
        template=judged.task.template,
        texts=tuple(text for text, _ in tried),
        num_tokens=tuple(min(limit, len(text.split()) + 1) if ended else limit for text, ended in tried),
        finished=tuple(ended for _, ended in tried),
        verdicts=tuple(judged.task.judge(problem, text, ended) for text, ended in tried),
        max_tokens=limit,
    )


def _told(totals: Sequence[float | None]) -> str:
    return ", ".join("none" if one is None else f"{one:.3g}" for one in totals[:SHOWN])


def _alike(totals: Sequence[float | None]) -> bool:
    known = [one for one in totals if one is not None]
    return len(known) > 1 and max(known) - min(known) < 1e-9


def _wrong(totals: Sequence[float | None], names: list[str]) -> str:
    """Return what is wrong with the rewards of a group whose first reply is right; empty if nothing is."""
    known = [one for one in totals[:SHOWN] if one is not None]
    if totals[0] is None or len(known) < 2:
        return "A right reply gets no score, so that nothing can be learned from it."
    if NO_ORDER & {*names}:
        return ""
    if {"accuracy", "code"} & {*names} and max(known[1:]) >= known[0]:
        return (
            "Another reply gets as much as the right one, and training would go there. Compare weights and their signs."
        )
    return ""
