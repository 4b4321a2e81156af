"""Rollouts from a real engine (the reference, the tiny model) through the loop: requests, learning, resuming."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from project import SUMS

from distill import engines, models, recipe
from distill.progress import Screen
from distill.recipe import EngineConfig, GrpoStage, LoraConfig
from distill.records import Problem, Prompt, Scores, UserError, Verdict
from distill.stages.context import Context
from distill.stages.inputs.student import load_student
from distill.stages.policy_sampling import PolicySampler
from distill.stages.sampling import Grader
from distill.tasks.templates import raw
from distill.training import loop
from distill.training.rl import policy_objectives as objectives
from distill.training.rl.reward_rollout import RewardRollouts
from distill.training.step import Length


def problems(num=6):
    return [
        Prompt(
            Problem(f"p{n}", "toy", str(n), ({"role": "user", "content": str(n)},), "1"),
            np.array([1, 100 + n, 200 + 3 * n], np.int32),
        )
        for n in range(num)
    ]


@pytest.fixture(scope="module")
def good(tiny_dir):
    """Return the rewarded ids: the half whose embedding starts with a positive number."""
    return models.load(tiny_dir, dtype="float32").get_input_embeddings().weight[:, 0].gt(0).numpy()


@pytest.fixture
def share(good):
    """The reward: share of a completion's tokens that are good."""
    return lambda group: [float(np.mean(good[list(map(int, t.split()))])) for t in group.texts]


class Spy:
    """An engine that records its requests."""

    def __init__(self, engine):
        self.engine, self.requests, self.versions = engine, [], []

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def generate(self, requests, sampling, *, top_k=0):
        requests = list(requests)
        self.requests.append([(r.request_id, r.seed) for r in requests])
        return self.engine.generate(requests, sampling, top_k=top_k)

    def sync(self, weights, version):
        self.versions.append(version)
        self.engine.sync(weights, version)


@pytest.fixture(scope="module")
def engine(tiny_dir):
    config = EngineConfig(fn="transformers", dtype="float32", batch_size=64)
    return engines.open_engine(config, tiny_dir, max_model_len=64, max_top_k=0)


def stage(**changes):
    defaults = {
        "kind": "grpo",
        "model": "m",
        "task": "t",
        "rewards": [{"fn": "accuracy"}],
        "steps": 3,
        "prompts": 4,
        "group_size": 4,
        "sampling": {"max_tokens": 4},
        "lr": 1e-3,
        "dtype": "float32",
        "checkpoint_every": 1,
    }
    return GrpoStage(**{**defaults, **changes})


def source(engine, config, objective, reward, seed=1, **changes):
    pool = problems()
    sampler = PolicySampler(
        engine=engine,
        grader=Grader(
            template=raw,
            judge=lambda problem, text, finished: Verdict(True, 1.0, text),
            decode=lambda ids: " ".join(str(i) for i in ids),
        ),
        prompts=lambda rollout, attempt, num: [pool[(rollout + n + attempt) % 6] for n in range(num)],
        sampling=config.sampling.record(),
        group_size=config.group_size,
        seed=seed,
    )
    defaults = {
        "sampler": sampler,
        "config": config,
        "objective": objective,
        "rewards": lambda groups: [Scores(reward(g), {"r": reward(g)}) for g in groups],
        "seed": seed,
    }
    return RewardRollouts(**{**defaults, **changes})


def run(tiny_dir, folder, rollouts, *, lora=None, stop_before=None):
    """Train as the stage does. stop_before: stop before that step, as a kill would."""
    config = rollouts.config
    model = models.load(tiny_dir, dtype=config.dtype)
    if lora is not None:
        torch.manual_seed(0)
        model = models.add_lora(model, lora)
    folder.mkdir(exist_ok=True)

    def steps(start, policy):
        for number, step in enumerate(rollouts.steps(start, policy), start + 1):
            if number == stop_before:
                raise KeyboardInterrupt
            yield step

    with contextlib.suppress(KeyboardInterrupt):
        loop.train(
            model,
            steps,
            rollouts.objective,
            config,
            length=Length(config.steps),
            vocab_size=49152,
            folder=folder,
            carried=rollouts.journal,
        )
    return model


def metrics(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    timed = ("seconds", "tokens_per_second")
    return [{k: v for k, v in json.loads(line).items() if not k.endswith(timed)} for line in lines]


# ------------------------------------------------------------------------------------------------- learning


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_each_objective_raises_the_reward(tiny_dir, engine, tmp_path, share, name):
    """Half of the tokens are good at the start; three in four soon are."""
    objective = getattr(objectives, name)(mask_truncated=False)
    config = stage(steps=24, group_size=8, lr=1e-2, mini_batches=2, prompts=2)
    run(tiny_dir, tmp_path, source(engine, config, objective, share))
    rewards = [m["reward"] for m in metrics(tmp_path)]
    assert np.mean(rewards[:4]) < 0.65
    assert np.mean(rewards[-4:]) > 0.75, rewards


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_reward_rises_and_random_rewards_do_not_raise_it(tiny_dir, engine, tmp_path, share, seed):
    config = stage(steps=16, group_size=8, lr=1e-2)
    objective = objectives.grpo(mask_truncated=False)
    run(tiny_dir, tmp_path / "real", source(engine, config, objective, share, seed=seed))
    assert np.mean([m["reward"] for m in metrics(tmp_path / "real")][-3:]) > 0.7

    def chance(group):
        return np.random.default_rng([seed, group.seed % 2**32]).integers(0, 2, len(group)).tolist()

    true_scores = []

    def recorded(groups):
        true_scores.append(np.mean([share(g) for g in groups]))
        return [Scores([float(r) for r in chance(g)], {}) for g in groups]

    run(
        tiny_dir,
        tmp_path / "chance",
        source(engine, config, objective, share, seed=seed, rewards=recorded),
    )
    assert np.mean(true_scores[-3:]) < 0.7


# ---------------------------------------------------------------------------------------------- conventions


def test_passes_reuse_the_rollout_and_its_old_log_probs(tiny_dir, engine, tmp_path, share):
    """Two passes: one rollout, and at the second the ratio is no longer 1 but against the weights that sampled it."""
    spy = Spy(engine)
    config = stage(steps=4, num_iterations=2, lr=1e-2)
    seen = []
    objective = objectives.grpo(beta=0.0, mask_truncated=False)

    def measure(student, targets):
        seen.append((student.label_T - targets.old_logp_T).abs().max().item())
        return {}

    run(tiny_dir, tmp_path, source(spy, config, replace(objective, measure=measure), share))
    assert len(spy.requests) == 2
    assert spy.versions == [0, 2]
    assert seen[0] < 1e-5
    assert seen[2] < 1e-5
    assert seen[1] > 1e-3
    assert seen[3] > 1e-3


def test_an_engine_that_sleeps_while_the_model_trains_changes_nothing(tiny_dir, tmp_path, share):
    """From before the log-probabilities of the reference until the next sync."""
    objective = objectives.grpo(beta=0.01, mask_truncated=False)
    found, naps = [], []
    for sleep in (False, True):
        config = stage(steps=4, mini_batches=2, engine={"fn": "transformers", "sleep": sleep})
        spy = Spy(
            engines.open_engine(
                EngineConfig(fn="transformers", dtype="float32"), tiny_dir, max_model_len=64, max_top_k=0
            )
        )
        spy.sleep = lambda spy=spy: (naps.append((len(spy.requests), len(spy.versions))), spy.engine.sleep())
        folder = tmp_path / str(sleep)
        run(tiny_dir, folder, source(spy, config, objective, share))
        found.append(metrics(folder))
    for awake, asleep in zip(*found, strict=True):
        assert asleep == pytest.approx(awake, abs=1e-5)
    assert naps == [(1, 1), (2, 2)]


def test_the_engine_samples_with_the_current_weights(tiny_dir, engine, tmp_path, share):
    config = stage(steps=6, lr=1e-2)
    run(tiny_dir, tmp_path, source(engine, config, objectives.grpo(mask_truncated=False), share))
    assert max(m["kl_engine"] for m in metrics(tmp_path)) < 1e-8


@pytest.mark.fault(25)
def test_a_stale_engine_is_refused(tiny_dir, engine, tmp_path, share):
    class Stale(Spy):
        def sync(self, weights, version):
            self.engine.sync(weights, 0)  # an old version number

    with pytest.raises(RuntimeError, match="version 0; the policy is at 1"):
        run(tiny_dir, tmp_path, source(Stale(engine), stage(), objectives.grpo(beta=0.0), share))


@pytest.mark.fault(16)
def test_groups_without_a_difference_are_sampled_again_up_to_the_cap(tiny_dir, engine, tmp_path, share):
    spy = Spy(engine)
    kept = []

    def dull(group):
        return [1.0] * len(group) if group.problem.problem_id in ("p0", "p1") else share(group)

    rollouts = source(
        spy,
        stage(steps=1),
        objectives.dapo(resample=3),
        dull,
        on_rollout=lambda step, rollout: kept.append(rollout),
    )
    run(tiny_dir, tmp_path, rollouts)
    (rollout,) = kept
    assert len(rollout.groups) == 4
    asked = [len(call) // 4 for call in spy.requests]
    assert asked[0] == 4
    assert asked[1] == 2  # p0 and p1 are replaced
    assert all(s.advantage.any() for s in rollout.groups)
    (line,) = metrics(tmp_path)
    assert line["frac_reward_zero_std"] == pytest.approx(2 / sum(asked), abs=0.2)
    everything = [t for s in rollout.sampled for t in s.scores.total]
    trained = [t for s in rollout.groups for t in s.scores.total]
    assert len(everything) == 4 * sum(asked)
    assert line["reward"] == pytest.approx(np.mean(everything))
    assert line["kept/reward"] == pytest.approx(np.mean(trained))
    assert line["reward"] > line["kept/reward"]  # the dull groups got 1.0
    lengths = [n for s in rollout.sampled for n in s.graded.group.num_tokens]
    assert line["length"] == pytest.approx(np.mean(lengths))
    assert {f"kept/{key}" for key in ("length", "entropy", "clipped_ratio", "unjudged")} <= set(line)

    def always_dull(group):
        return [1.0] * len(group)

    spy.requests.clear()
    (tmp_path / "dull").mkdir()
    before = models.load(tiny_dir, dtype="float32")
    after = run(
        tiny_dir,
        tmp_path / "dull",
        source(spy, stage(steps=1), objectives.dapo(resample=3), always_dull),
    )
    assert len(spy.requests) == 3
    assert metrics(tmp_path / "dull")[0] | {"frac_reward_zero_std": 1.0, "groups": 12.0, "loss": 0.0, "tokens": 0} == metrics(tmp_path / "dull")[0]  # fmt: skip
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.fault(20)
def test_cut_completions_leave_the_loss_or_stay_in_it(tiny_dir, engine, tmp_path, share):
    """All completions of four tokens are cut: masked there is nothing to learn, penalised there is."""
    for mask, tokens in ((True, 0), (False, 4 * 4 * (3 + 4))):
        folder = tmp_path / str(mask)
        objective = objectives.grpo(beta=0.001, mask_truncated=mask)
        run(tiny_dir, folder, source(engine, stage(steps=1), objective, share))
        (line,) = metrics(folder)
        assert line["clipped_ratio"] == 1.0
        assert line["tokens"] == tokens


@pytest.mark.fault(17)
def test_unjudged_completions_are_counted_and_carry_no_advantage(tiny_dir, engine, tmp_path, share):
    kept = []

    def half(group):
        return [s if n % 2 else None for n, s in enumerate(share(group))]

    rollouts = source(
        engine,
        stage(steps=1),
        objectives.grpo(mask_truncated=False),
        half,
        on_rollout=lambda step, rollout: kept.append(rollout),
    )
    run(tiny_dir, tmp_path, rollouts)
    assert metrics(tmp_path)[0]["unjudged"] == 0.5
    for sampled in kept[0].groups:
        assert (sampled.advantage[::2] == 0).all()


# ------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize("stop_before", [2, 4, 6])
def test_resumed_equals_uninterrupted_wherever_it_was_killed(tiny_dir, tmp_path, share, stop_before):
    """Two mini-batches and two passes a rollout, the reference synced: killed before, inside and after rollouts."""
    config = stage(
        steps=8,
        prompts=2,
        mini_batches=2,
        num_iterations=2,
        lr=1e-2,
        reference_every=4,
        engine={"fn": "reference"},
    )
    objective = objectives.grpo(beta=0.1, mask_truncated=False)

    def fresh():
        return engines.open_engine(config.engine, tiny_dir, max_model_len=64, max_top_k=0)

    whole = run(tiny_dir, tmp_path / "whole", source(fresh(), config, objective, share))
    run(
        tiny_dir,
        tmp_path / "cut",
        source(fresh(), config, objective, share),
        stop_before=stop_before,
    )
    resumed = run(tiny_dir, tmp_path / "cut", source(fresh(), config, objective, share))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert [m["step"] for m in metrics(tmp_path / "cut")] == list(range(1, 9))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert metrics(tmp_path / "whole")[4]["kl_ref"] == pytest.approx(0.0, abs=1e-9)
    assert metrics(tmp_path / "whole")[7]["kl_ref"] > 1e-4


def test_under_lora_the_reference_is_the_model_without_its_adapter(tiny_dir, engine, tmp_path, share):
    config = stage(steps=4, lr=2e-2)
    objective = objectives.grpo(beta=0.05, mask_truncated=False)
    lora = LoraConfig(rank=4)
    model = run(tiny_dir, tmp_path, source(engine, config, objective, share), lora=lora)
    lines = metrics(tmp_path)
    assert lines[0]["kl_ref"] == 0.0
    assert lines[-1]["kl_ref"] > 1e-4
    assert max(m["kl_engine"] for m in lines) < 1e-8
    base = models.load(tiny_dir, dtype="float32").state_dict()
    for name, tensor in model.get_base_model().state_dict().items():
        if "lora_" not in name:
            assert torch.equal(tensor, base[name.replace(".base_layer", "")]), name


def test_exported_weights_are_the_merged_ones(tiny_dir):
    lora = LoraConfig(rank=4, modules_to_save=["norm"], target_modules=["q_proj", "down_proj"])
    model = models.add_lora(models.load(tiny_dir, dtype="float32"), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)  # fmt: skip
    exported = dict(models.exported_weights(model))
    merged = dict(model.merge_and_unload().named_parameters())
    assert set(merged) <= set(exported)
    for name, tensor in merged.items():
        torch.testing.assert_close(exported[name], tensor.detach(), msg=name)


@pytest.mark.parametrize("ends", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_one_end_of_a_tied_model_cannot_be_trained_alone_beside_an_engine(ends, tiny_dir, tmp_path):
    """The engine keeps both ends as one matrix, so the trained policy would differ from the one that samples."""
    stage = {"kind": "grpo", "model": "base", "task": "sums", "rewards": [{"fn": "accuracy"}], "steps": 1, "dtype": "float32",
             "sampling": {"max_tokens": 4}, "lora": {"rank": 4, **ends}}  # fmt: skip
    tree = {"name": "t", "models": {"base": str(tiny_dir)}, "tasks": {"sums": SUMS}, "stages": {"rl": stage}}
    context = Context(recipe=recipe.validate(tree), run=tmp_path, name="rl", screen=Screen(io.StringIO()))
    context.folder.mkdir()
    with pytest.raises(
        UserError, match=r"stages\.rl\.lora: .*(lm_head|embed_tokens).* is one matrix with the other end"
    ):
        load_student(context.recipe.stages["rl"], context)
