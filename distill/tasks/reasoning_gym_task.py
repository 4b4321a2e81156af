"""Problems from the generators of reasoning_gym, judged by the generators' own scorers.

A generator seeds item i with `seed + i`, so two neighbouring seeds share nearly all their items, and small
spaces repeat. So problems are drawn from blocks whose seeds are far apart; problems of the other split and repeated
problems are dropped (by content), and the rest is counted before any is used.

Some scorers evaluate the answer as Python. They get only expressions that call nothing but mathematical
functions, and run in a worker process with a hard limit. A few generators iterate over sets of text, so their items
depend on the process's hash seed: they run in the worker, where that seed is fixed, because all arms of a comparison must
get the same problems.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import json
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from distill.errors import MachineError
from distill.plug import nearest
from distill.records import Problem, Split, Template, UserError, Verdict, draw_seed, stable_hash
from distill.tasks import splits, templates
from distill.tasks.judge import worker_pool
from distill.tasks.judge.verdict import exact_verdict, judge, math_verdict

BLOCK = 256
"""The number of items drawn from one generator seed. A change of this value changes the problems."""

HASH_SEEDED = frozenset(
    [
        "composite",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    ]
)
"""Generators whose items differ between processes with different PYTHONHASHSEED."""

MIN_IDLE_DRAWS = 2000
MAX_IDLE_SECONDS = 300.0
MAX_FAILED_DRAWS = 50
SCORE_LIMIT_S = 10.0
MAX_ANSWER_CHARS = 20_000
_WALKER_OPTIONS = ("seed", "size")
_MATHS_NAMES = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs abs Rational Integer"
_MATHS = frozenset(_MATHS_NAMES.split())


def reasoning_gym(
    name: str,
    *,
    dataset: str,
    options: dict[str, Any] | None = None,
    template: templates.Given = "think_answer",
) -> GeneratedTask:
    """Problems of any reasoning_gym generator; `options` are the generator's own, except seed and size."""
    options = dict(options or {})
    where = f"tasks.{name}"
    _check_options(dataset, options, where)
    try:
        generator(dataset, options, 0)[0]
    except Exception as error:
        # Generators check their options with asserts, or only when an item is drawn.
        raise UserError(f"{where}.options: {dataset} refuses them: {str(error) or type(error).__name__}.") from error
    return GeneratedTask(name, dataset, options, templates.find(template, f"{where}.template"))


class GeneratedTask:
    """A task of generated problems; endless unless the generator's space is small."""

    def __init__(self, name: str, dataset: str, options: Mapping[str, Any], template: Template) -> None:
        self.name, self.template = name, template
        self.dataset, self.options = dataset, dict(options)
        self.fingerprint = stable_hash(
            "reasoning_gym",
            dataset,
            json.dumps(self.options, sort_keys=True, default=str),
            *templates.fingerprint(template),
        )

    def problems(self, split: Split, num: int | None, seed: int) -> Iterator[Problem]:
        """Return `num` distinct problems of a split; all are drawn before the first is returned."""
        if num is None:
            raise UserError(f"tasks.{self.name}: {self.dataset} writes problems without end; say how many are wanted.")
        return iter(self._collect(split, num, seed))

    def _collect(self, split: Split, num: int, seed: int) -> list[Problem]:
        found: list[Problem] = []
        seen: set[str] = set()
        num_drawn = num_idle = num_failed = 0
        last_new = time.monotonic()
        why = ""
        for base, index, entry in self._draws(seed) if num else ():
            num_drawn, num_idle = num_drawn + 1, num_idle + 1
            if isinstance(entry, Exception):
                num_failed += 1
                why = f" {num_failed} draws failed: {entry!r}."
            elif (key := splits.content_hash(entry["question"])) not in seen:
                seen.add(key)
                if splits.split_of(entry["question"]) == split:
                    found.append(self._problem(entry, base, index))
                    num_idle, last_new = 0, time.monotonic()
                    if len(found) == num:
                        break
            # In a space of n problems, the last unseen one is still missing after 5 n draws with probability below 1%.
            if (
                num_idle >= max(MIN_IDLE_DRAWS, 5 * len(seen))
                or num_failed >= max(MAX_FAILED_DRAWS, num_drawn // 2)
                or time.monotonic() - last_new > MAX_IDLE_SECONDS
            ):
                raise UserError(
                    f"tasks.{self.name}: {num} {split} problems are wanted, but {self.dataset} with these "
                    f"options has too few: found only {len(found)} distinct {split} problems after "
                    f"{num_drawn} draws, the last {num_idle} without a new one.{why} Ask for fewer, or "
                    f"widen the generator's options."
                )
        return found

    def _draws(self, seed: int) -> Iterator[tuple[int, int, Any]]:
        """Yield the items of a seed: (generator seed, item, entry); a failed draw yields its exception."""
        for block in itertools.count():
            base = draw_seed("reasoning_gym", seed, block) % 2**31
            for index in range(BLOCK):
                yield base, index, self._entry(base, index)

    def _entry(self, base: int, index: int) -> Any:
        try:
            if self.dataset not in HASH_SEEDED:
                return item(self.dataset, self.options, base, index)[1]
            reply = worker_pool.ask("score", self.dataset, self.options, base, index)
        except Exception as error:
            return error
        if isinstance(reply, str):
            return RuntimeError(reply)
        return {"question": reply[0], "answer": reply[1]}

    def _problem(self, entry: Mapping[str, Any], base: int, index: int) -> Problem:
        question = str(entry["question"])
        answer = entry["answer"]
        return Problem(
            problem_id=splits.problem_id(f"reasoning_gym/{self.dataset}", question),
            task=self.name,
            question=question,
            messages=({"role": "user", "content": question},),
            gold=None if answer is None else str(answer),
            payload={"seed": base, "index": index},
        )

    @property
    def is_endless(self) -> bool:
        return True

    def holds_out(self, question: str) -> bool:
        return splits.is_held_out(question)

    def judge(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        return judge(self.template, completion, finished, functools.partial(self._verdict, problem))

    def same_answer(self, one: str, other: str) -> bool:
        """Compare two answers as text or as mathematics: a generator's own scorer only compares with its gold answer."""
        return exact_verdict(one, other).correct is True or math_verdict(one, other).correct is True

    def _verdict(self, problem: Problem, answer: str) -> Verdict:
        if len(answer) > MAX_ANSWER_CHARS:
            return Verdict(False, 0.0, answer, "answer too long")
        base, index = problem.payload["seed"], problem.payload["index"]
        try:
            if self.dataset in HASH_SEEDED or scorer_evaluates(self.dataset):
                if scorer_evaluates(self.dataset) and not is_arithmetic(answer):
                    return Verdict(False, 0.0, answer, "not an expression")
                reply = worker_pool.ask("score", self.dataset, self.options, base, index, answer, limit_s=SCORE_LIMIT_S)
            else:
                reply = score(self.dataset, self.options, base, index, answer=answer)
        except worker_pool.StuckError as stuck:
            return Verdict(None, None, answer, str(stuck))
        except Exception as error:
            reply = f"{type(error).__name__}: {error}"
        if isinstance(reply, str):
            return Verdict(None, None, answer, f"scorer failed: {reply}")
        partial = min(max(float(reply), 0.0), 1.0)
        return Verdict(partial == 1.0, partial, answer, "" if partial == 1.0 else "wrong")


# ----------------------------------------------------------------------------------------------- generators


def library() -> Any:
    """reasoning_gym's table of generators: name -> (class, its config). Raises MachineError if the package is not installed."""
    if importlib.util.find_spec("reasoning_gym") is None:
        raise MachineError(
            "the puzzles of reasoning_gym are not installed: pip install 'distill[examples]', or pip install reasoning-gym."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # a dependency of reasoning_gym compares with `is "..."`
        import reasoning_gym.factory

    return reasoning_gym.factory.DATASETS


def generator(dataset: str, options: Mapping[str, Any], seed: int) -> Any:
    """Return the generator with its options and a seed."""
    kind, config = library()[dataset]
    options = dict(options)
    if dataset == "composite":
        from reasoning_gym.composite import DatasetSpec

        options["datasets"] = [DatasetSpec(**each) for each in options.get("datasets", [])]
    return kind(config=config(**options, seed=seed, size=BLOCK))


def item(dataset: str, options: Mapping[str, Any], seed: int, index: int) -> tuple[Any, Any]:
    """Return the generator and one of its items."""
    items = _items(dataset, json.dumps(options, sort_keys=True), seed)
    return items, items[index]


@functools.lru_cache(maxsize=8)
def _items(dataset: str, options: str, seed: int) -> Any:
    return generator(dataset, json.loads(options), seed)


def score(dataset: str, options: Mapping[str, Any], seed: int, index: int, *, answer: str) -> float:
    """Score an answer to an item with the generator's own scorer."""
    items, entry = _scored(dataset, json.dumps(options, sort_keys=True), seed, index)
    return float(items.score_answer(answer, entry))


@functools.lru_cache(maxsize=16384)
def _scored(dataset: str, options: str, seed: int, index: int) -> tuple[Any, Any]:
    return item(dataset, json.loads(options), seed, index)


@functools.cache
def scorer_evaluates(dataset: str) -> bool:
    """Return whether a generator's scorer may run the answer as code."""
    source = inspect.getsource(sys.modules[library()[dataset][0].__module__])
    return dataset == "composite" or re.search(r"\b(?:eval|parse_expr)\(", source) is not None


def is_arithmetic(answer: str) -> bool:
    """Return whether evaluating an answer as Python can only do arithmetic (or fail)."""
    text = answer.strip().replace("!", "")
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # Not an expression, so nothing runs, except sympy's own notations, which call functions by name.
        return re.search(r"[A-Za-z_]{2,}\s*\(|__|\.\s*[A-Za-z_]", text) is None
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            function = node.func
            if not isinstance(function, ast.Name) or (function.id not in _MATHS and len(function.id) > 1):
                return False
        elif isinstance(node, ast.Attribute | ast.Lambda | ast.NamedExpr | ast.JoinedStr | ast.comprehension):
            return False
    return True


def _check_options(dataset: str, options: Mapping[str, Any], where: str) -> None:
    known = library()
    if dataset not in known:
        raise UserError(f"{where}.dataset: reasoning_gym has no generator {dataset!r}.{nearest(dataset, known)}")
    fields = [field.name for field in dataclasses.fields(known[dataset][1]) if field.name not in _WALKER_OPTIONS]
    for key in options:
        if key in _WALKER_OPTIONS:
            raise UserError(f"{where}.options.{key}: is set by the stage that uses the problems; remove this key.")
        if key not in fields:
            raise UserError(f"{where}.options.{key}: unknown option.{nearest(key, fields)}")
