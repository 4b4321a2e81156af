"""On-policy distillation on the tiny model: scoring by trainer and engine, learning, stored traces, resuming."""

from __future__ import annotations

import contextlib
import json
from dataclasses import fields

import numpy as np
import pytest
import torch

from distill import engines, models
from distill.recipe import EngineConfig, OnPolicyStage
from distill.records import Problem, Prompt, Verdict
from distill.stages.policy_sampling import PolicySampler
from distill.stages.sampling import Grader
from distill.tasks.templates import raw
from distill.training import loop
from distill.training.loss import divergences, sparse
from distill.training.loss.head import Student, Targets
from distill.training.loss.metrics import distribution_metrics
from distill.training.loss.objective import DenseObjective, StoredObjective
from distill.training.packing import Example
from distill.training.policy import Teacher
from distill.training.rl.teacher_rollout import TeacherRollouts
from distill.training.step import Length


@pytest.fixture(scope="module")
def teacher_dir(tiny_dir, tmp_path_factory):
    """The tiny model with changed weights, so that its next tokens differ."""
    model = models.load(tiny_dir, dtype="float32")
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("teacher")
    models.save(model, models.load_tokenizer(tiny_dir), folder)
    return folder


def open_engine(folder):
    config = EngineConfig(fn="transformers", dtype="float32", batch_size=64)
    return engines.open_engine(config, folder, max_model_len=64, max_top_k=49152)


@pytest.fixture(scope="module")
def engine(tiny_dir):
    return open_engine(tiny_dir)


@pytest.fixture(scope="module")
def teacher_engine(teacher_dir):
    return open_engine(teacher_dir)


def stage(**changes):
    defaults = {
        "kind": "on_policy",
        "model": "m",
        "teacher": "t",
        "task": "t",
        "steps": 12,
        "prompts": 4,
        "group_size": 4,
        "sampling": {"max_tokens": 5},
        "lr": 3e-3,
        "dtype": "float32",
        "checkpoint_every": 3,
        "top_logprobs": 64,
        "mass": 1.0,
    }
    return OnPolicyStage(**{**defaults, **changes})


def prompts(rollout, attempt, num):
    return [
        Prompt(
            Problem(f"p{n}", "toy", str(n), ({"role": "user", "content": str(n)},), "1"),
            np.array([1, 100 + n, 200 + 3 * n], np.int32),
        )
        for n in range(rollout, rollout + num)
    ]


def source(engine, config, teacher=None, offline=None):
    sampler = PolicySampler(
        engine=engine,
        grader=Grader(
            template=raw, judge=lambda problem, text, finished: Verdict(None, None, None), decode=lambda ids: "x"
        ),
        prompts=prompts,
        sampling=config.sampling.record(),
        group_size=config.group_size,
        seed=1,
    )
    return TeacherRollouts(sampler, config, teacher=teacher, offline=offline)


def run(tiny_dir, folder, on_policy, objective, teachers=(), stop_before=None):
    config = on_policy.config
    model = models.load(tiny_dir, dtype=config.dtype)
    folder.mkdir(exist_ok=True)

    def steps(start, policy):
        for number, step in enumerate(on_policy.steps(start, policy), start + 1):
            if number == stop_before:
                raise KeyboardInterrupt
            yield step

    with contextlib.suppress(KeyboardInterrupt):
        loop.train(
            model,
            steps,
            objective,
            config,
            length=Length(config.steps),
            vocab_size=49152,
            folder=folder,
            teachers=teachers,
        )
    return model


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(timed)} for line in lines]


def beside(divergence):
    return DenseObjective(divergence)


def test_teacher_in_the_trainer_lowers_the_reverse_kl(tiny_dir, teacher_dir, engine, tmp_path):
    teacher = Teacher(models.load(teacher_dir, dtype="float32"))
    run(tiny_dir, tmp_path, source(engine, stage()), beside(divergences.reverse_kl), [teacher])
    course = [m["loss"] for m in metrics(tmp_path)]
    assert course[0] == pytest.approx(metrics(tmp_path)[0]["divergence"])
    assert np.mean(course[-3:]) < 0.7 * course[0]


def test_teacher_as_an_engine_lowers_it_too(tiny_dir, engine, teacher_engine, tmp_path):
    config = stage(scoring="engine")
    objective = StoredObjective(sparse.reverse_kl, distribution_metrics)
    run(tiny_dir, tmp_path, source(engine, config, teacher_engine), objective)
    course = [m["kl_teacher"] for m in metrics(tmp_path)]
    assert np.mean(course[-3:]) < 0.7 * course[0]
    assert {"agreement", "tail", "student_tail", "teacher_nll"} <= metrics(tmp_path)[0].keys()


def test_a_policy_gradient_needs_one_teacher_log_prob_a_token(tiny_dir, engine, teacher_engine, tmp_path):
    config = stage(scoring="engine", loss={"fn": "policy_gradient"}, steps=40, group_size=16, lr=3e-3)
    objective = StoredObjective(sparse.policy_gradient, distribution_metrics)
    run(tiny_dir, tmp_path, source(engine, config, teacher_engine), objective)
    course = [m["kl_teacher"] for m in metrics(tmp_path)]
    assert np.mean(course[-5:]) < 0.9 * np.mean(course[:3])


def test_the_policy_gradient_is_the_reverse_kls_in_expectation():
    """Summed over every token that could have been sampled, weighted by its probability: exactly d KL(q || p)."""
    torch.manual_seed(0)
    z = torch.randn(6, dtype=torch.float64, requires_grad=True)
    logp = torch.randn(6, dtype=torch.float64).log_softmax(0)
    logq = z.log_softmax(0)
    (want,) = torch.autograd.grad((logq.exp() * (logq - logp)).sum(), z, retain_graph=True)
    targets = Targets(
        torch.arange(6),
        torch.ones(6),
        advantage_T=(logp - logq).detach(),
        engine_logp_T=logq.detach(),
    )
    rest = {f.name: None for f in fields(Student)}
    loss_T = sparse.policy_gradient(Student(**{**rest, "label_T": logq}), targets)
    (got,) = torch.autograd.grad((logq.exp().detach() * loss_T).sum(), z)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_both_ways_of_scoring_agree_where_every_entry_is_kept(tiny_dir, teacher_dir, engine, teacher_engine, tmp_path):
    """All 49152 entries from the engine are the whole distribution that the trainer compares with."""
    whole = stage(steps=1, scoring="engine", top_logprobs=49152)
    run(
        tiny_dir,
        tmp_path / "a",
        source(engine, whole, teacher_engine),
        StoredObjective(sparse.reverse_kl, distribution_metrics),
    )
    teacher = Teacher(models.load(teacher_dir, dtype="float32"))
    run(
        tiny_dir,
        tmp_path / "b",
        source(engine, stage(steps=1)),
        beside(divergences.reverse_kl),
        [teacher],
    )
    (a,), (b,) = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_a_teacher_equal_to_the_student_gives_no_gradient(tiny_dir, engine, tmp_path):
    teacher = Teacher(models.load(tiny_dir, dtype="float32"))
    run(
        tiny_dir,
        tmp_path,
        source(engine, stage(steps=1)),
        beside(divergences.reverse_kl),
        [teacher],
    )
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(0.0, abs=1e-6)
    assert metrics(tmp_path)[0]["grad_norm"] < 1e-4


def test_the_offline_share_is_taken_from_stored_traces(tiny_dir, teacher_dir, engine, tmp_path):
    asked = []

    def offline(first, num):
        asked.append((first, num))
        ids = np.array([40, 50, 60, 2], np.int32)
        return [Example(f"off{first + n}", np.array([1, 9, 9], np.int32), ids) for n in range(num)]

    config = stage(steps=2, offline_share=0.5, data="traces")
    seen = []
    made = source(engine, config, offline=offline)
    inner = made.steps

    class Watching:
        def __init__(self):
            self.config = config

        def steps(self, start, policy):
            for step in inner(start, policy):
                seen.append([i for b in step.batches for i in b.trace_ids])
                yield step

    teacher = Teacher(models.load(teacher_dir, dtype="float32"))
    run(tiny_dir, tmp_path, Watching(), beside(divergences.jsd), [teacher])
    assert asked == [(0, 8), (8, 8)]
    for ids in seen:
        assert sum(i.startswith("off") for i in ids) == 8
        assert sum(i.startswith("rollout-") for i in ids) == 8


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.5, 0.7, 0.75])
def test_any_share_is_kept_over_the_steps_and_the_student_writes_in_each(engine, share):
    config = stage(steps=200, offline_share=share, data="traces")
    made = source(engine, config, offline=lambda first, num: [])
    nums = [made._num_offline(step) for step in range(200)]
    assert sum(nums) == int(200 * config.prompts * round(100 * share)) // 100
    assert max(nums) < config.prompts
    assert max(nums) - min(nums) <= 1
    assert [made._offline_before(step) for step in range(200)] == [sum(nums[:step]) for step in range(200)]


def test_a_share_that_leaves_nothing_to_the_student_is_refused():
    with pytest.raises(ValueError, match=r"0\.9 of 4 prompts leaves less than one .*set prompts to 10 or more"):
        stage(prompts=4, offline_share=0.9, data="traces")
    assert stage(prompts=10, offline_share=0.9, data="traces").prompts == 10


def test_resumed_equals_uninterrupted(tiny_dir, teacher_dir, tmp_path):
    config = stage(steps=6, engine={"fn": "reference"})

    def fresh():
        return source(engines.open_engine(config.engine, tiny_dir, max_model_len=64, max_top_k=0), config)

    def teachers():
        return [Teacher(models.load(teacher_dir, dtype="float32"))]

    objective = beside(divergences.reverse_kl)
    whole = run(tiny_dir, tmp_path / "whole", fresh(), objective, teachers())
    run(tiny_dir, tmp_path / "cut", fresh(), objective, teachers(), stop_before=5)
    resumed = run(tiny_dir, tmp_path / "cut", fresh(), objective, teachers())
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offline_share": 0.5}, "data and offline_share need each other"),
        ({"data": "x"}, "data and offline_share need each other"),
        ({"scoring": "engine", "temperature": 2.0}, "must be 1 with scoring: engine"),
        ({"scoring": "engine", "teacher": {"a": 0.5, "b": 0.5}}, "supports one teacher"),
        ({"loss": {"fn": "policy_gradient"}}, "needs scoring: engine"),
        (
            {"loss": {"fn": "policy_gradient"}, "scoring": "engine", "sampling": {"top_p": 0.9}},
            "must be 1",
        ),
    ],
)
def test_settings_that_contradict_each_other(changes, message):
    with pytest.raises(ValueError, match=message):
        stage(**changes)
