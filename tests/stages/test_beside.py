"""What an engine beside a trainer may take of a GPU, by shapes; no GPU, no model."""

from __future__ import annotations

from typing import Any

import pytest

from distill import recipe
from distill.compute import cards
from distill.compute.memory import ENGINE_BYTES, Memory
from distill.compute.shared_gpu import ASLEEP_BYTES, USABLE, split
from distill.models.architectures import known_config
from distill.models.shape import ModelShape
from distill.recipe import GrpoStage, OnPolicyStage
from distill.records import UserError
from distill.run import fit
from distill.stages.beside import divided

GIB = 2**30
H100 = 80 * GIB
RL = {"kind": "grpo", "model": "base", "task": "t", "rewards": [{"fn": "accuracy"}], "steps": 4, "dtype": "bfloat16"}
SMALL, LARGE = (ModelShape.from_config(known_config(f"Qwen/Qwen2.5-{size}")[1]) for size in ("1.5B", "7B"))


def stage(**changes: Any) -> GrpoStage:
    engine = {"fn": "vllm", "dtype": "bfloat16", **changes.pop("engine", {})}
    return GrpoStage(**{**RL, "micro_tokens": 8192, "engine": engine, **changes})


def shared(config: Any, shape: ModelShape = SMALL, **more: Any) -> tuple[float, Any]:
    own, teacher = divided(config, shape, total=H100, max_model_len=1024, where="stages.rl", **more)
    return own.memory_share, teacher


def test_an_engine_gets_what_training_leaves():
    """Full training of 1.5B takes 20 bytes a parameter; a reference 2 more, a reward model its weights."""
    alone, _ = shared(stage())
    assert (1 - alone) * H100 > 20 * SMALL.params_total
    referred, _ = shared(stage(), reference=True)
    assert (alone - referred) * H100 == pytest.approx(2 * SMALL.params_total, rel=0.01)
    judged, _ = shared(stage(), rewards=3.0 * GIB)
    assert (alone - judged) * H100 == pytest.approx(3 * GIB, rel=0.01)
    taught, _ = shared(stage(), teachers=[SMALL])
    assert (alone - taught) * H100 == pytest.approx(2 * SMALL.params_total, rel=0.02)


def test_an_engine_that_sleeps_gets_more_and_fits_where_it_would_not():
    awake, asleep = (shared(stage(engine={"sleep": sleep}))[0] for sleep in (False, True))
    assert asleep > awake + 0.1
    tight = {"micro_tokens": 6144, "lora": {"rank": 8}}
    with pytest.raises(
        UserError, match=r"^stages\.rl: .* while the model trains beside its engine.*Engine\.sleep: true frees"
    ):
        shared(stage(**tight), LARGE)
    assert shared(stage(**tight, engine={"sleep": True}), LARGE)[0] > 0.3
    with pytest.raises(UserError, match=r"while the model trains and the engine sleeps: .*\. Micro_tokens"):
        shared(stage(engine={"sleep": True}), LARGE)


def test_a_teachers_engine_takes_its_part_of_the_first_ones_share_and_stays_awake():
    config = OnPolicyStage(
        kind="on_policy", model="base", teacher="t", task="t", steps=1, dtype="bfloat16", scoring="engine", micro_tokens=8192,
        engine={"fn": "vllm", "dtype": "bfloat16", "sleep": True},
    )  # fmt: skip
    own, teacher = shared(config, scoring=LARGE)
    assert teacher.sleep is False
    assert teacher.memory_share * H100 > 2 * LARGE.params_total + ENGINE_BYTES["vllm"]
    alone = divided(stage(engine={"sleep": True}), SMALL, total=H100, max_model_len=1024, where="")[0].memory_share
    assert alone - own == pytest.approx(teacher.memory_share, abs=1e-3)


def test_a_share_in_the_recipe_is_taken_or_refused():
    assert shared(stage(engine={"memory_share": 0.2}))[0] == 0.2
    with pytest.raises(UserError, match="while the model trains beside its engine"):
        shared(stage(engine={"memory_share": 0.9}))
    with pytest.raises(UserError, match="in the engine's share"):
        shared(stage(engine={"memory_share": 0.01}))


def test_shards_leave_more_and_a_split_engine_takes_less():
    whole = shared(stage())[0]
    sharded = shared(stage(distributed={"processes": 8, "strategy": "fsdp2"}))[0]
    assert sharded > whole + 0.15
    one, two = (shared(stage(engine={"kv_cache_gib": 1, "tensor_parallel": n}))[0] for n in (1, 2))
    assert (one - two) * H100 == pytest.approx(SMALL.params_total, rel=0.02)


def test_the_split_is_exact_on_round_numbers():
    """A GPU of 100: 10 held and 20 for a step; an engine of 5 and logits of 1, whose cache takes what is left."""
    training, engine = Memory(weights=10, activations=20), Memory(engine=5, logits=1, cache=1000)
    total = 100 / USABLE
    awake = split(training, engine, total=total, least_cache=2)
    assert (awake.engine, awake.peak(), awake.short) == (pytest.approx(70), pytest.approx(100), 0)
    beside = split(training, engine, total=total, others=8, least_cache=2)
    assert beside.engine == pytest.approx(62)
    sized = split(training, Memory(engine=5, logits=1, cache=4), total=total)
    assert (sized.engine, sized.peak()) == (10, 40)
    short = split(training, Memory(engine=75, logits=1), total=total, least_cache=2)
    assert (short.engine, short.short) == (78, pytest.approx(8))
    total = (1000 + 1e9 * 10) / USABLE
    large = Memory(weights=4e9, activations=3e9)
    asleep = split(large, engine, total=total, least_cache=2, sleep=True)
    assert asleep.engine == pytest.approx(total * USABLE - 4e9)
    assert asleep.asleep == 7e9 + ASLEEP_BYTES


def test_check_and_the_stage_count_alike():
    """The table of `check --gpu` says what the stage says when it starts: fits, or the same phase."""
    tree = {
        "name": "fit",
        "models": {"base": "Qwen/Qwen2.5-7B"},
        "tasks": {"t": {"fn": "reasoning_gym", "dataset": "basic_arithmetic", "template": "think_answer"}},
    }
    for sleep, words in ((False, "while the model trains beside its engine"), (True, "")):
        given = {
            **RL,
            "micro_tokens": 6144,
            "prompts": 512,
            "lora": {"rank": 8},
            "engine": {"sleep": sleep, "batch_size": 16},
        }
        given["objective"] = {"fn": "grpo", "beta": 0}
        (found,) = fit.verdicts(recipe.validate({**tree, "stages": {"rl": given}}, "test"), cards.parse("h100"))
        assert (words in found.problem) if words else found.fits, found.problem
        config = stage(**{**given, "engine": {**given["engine"], "fn": "vllm", "dtype": "bfloat16"}})
        if words:
            assert any("engine.sleep" in remedy.words for remedy in found.remedies)
            with pytest.raises(UserError, match=words):
                shared(config, LARGE)
        else:
            assert shared(config, LARGE)[0] > 0.2
