"""The loop: masters, schedule, resume bitwise, bad steps."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch.optim import AdamW

from distill import models
from distill.recipe import TrainStage
from distill.records import UserError
from distill.training.loop import train
from distill.training.loss.objective import StoredObjective
from distill.training.loss.sparse import cross_entropy
from distill.training.optim import MasterAdamW, learning_rate
from distill.training.packing import Example, pack, steps
from distill.training.step import Length, Step


class Copying:
    """Traces that a model of any size can learn: the completion repeats the prompt."""

    fingerprint = "copying"
    num_examples = 24

    def epoch(self, index, skip=0):
        order = np.random.default_rng(index).permutation(self.num_examples)[skip:]
        for n in order:
            word = np.random.default_rng(1000 + n).integers(10, 20, 5).astype(np.int32)
            yield Example(f"t{n}", word, np.append(word, np.int32(2)))


def config(**changes):
    defaults = {
        "kind": "train",
        "model": "m",
        "data": "./d",
        "steps": 8,
        "batch_traces": 8,
        "lr": 1e-2,
        "checkpoint_every": 3,
        "dtype": "bfloat16",
    }
    return TrainStage(**{**defaults, **changes})


def run(tiny_dir, folder, stop_after=None, loss=cross_entropy, **changes):
    cfg = config(**changes)
    model = models.load(tiny_dir, dtype=cfg.dtype)
    folder.mkdir(exist_ok=True)

    def source(start, policy):
        for n, taken in enumerate(steps(Copying(), batch_traces=cfg.batch_traces, start=start), start):
            if n == stop_after:
                raise KeyboardInterrupt
            yield Step(pack(taken, micro_tokens=cfg.micro_tokens, normalise=cfg.normalise))

    try:
        counts = train(
            model,
            source,
            StoredObjective(loss),
            cfg,
            length=Length(cfg.steps),
            vocab_size=49152,
            folder=folder,
        )
    except KeyboardInterrupt:
        return None, None
    return model, counts


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_resumed_equals_uninterrupted_bitwise(tiny_dir, tmp_path, dtype):
    whole, counts = run(tiny_dir, tmp_path / "whole", dtype=dtype)
    run(tiny_dir, tmp_path / "cut", stop_after=5, dtype=dtype)
    assert len(metrics(tmp_path / "cut")) == 5
    resumed, resumed_counts = run(tiny_dir, tmp_path / "cut", dtype=dtype)
    for (name, a), b in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name
    timeless = [
        [{k: v for k, v in m.items() if k not in ("tokens_per_second", "seconds")} for m in metrics(tmp_path / f)]
        for f in ("whole", "cut")
    ]
    assert timeless[0] == timeless[1]
    assert (counts.tokens, counts.head_tokens) == (resumed_counts.tokens, resumed_counts.head_tokens)


def test_it_learns_and_any_micro_batch_split_gives_the_same_metrics(tiny_dir, tmp_path):
    run(tiny_dir, tmp_path / "a", dtype="float32", steps=12, checkpoint_every=100)
    run(tiny_dir, tmp_path / "b", dtype="float32", steps=12, checkpoint_every=100, micro_tokens=24)
    a, b = metrics(tmp_path / "a"), metrics(tmp_path / "b")
    assert a[-1]["loss"] < 0.7 * a[0]["loss"]
    assert [m["loss"] for m in a[:5]] == pytest.approx([m["loss"] for m in b[:5]], rel=1e-3)
    assert [m["grad_norm"] for m in a[:5]] == pytest.approx([m["grad_norm"] for m in b[:5]], rel=1e-3)


def test_a_loss_is_told_how_far_training_is(tiny_dir, tmp_path):
    def progress(student, targets):
        return 0 * student.label_T + targets.progress

    run(tiny_dir, tmp_path / "whole", loss=progress, steps=5)
    assert [m["loss"] for m in metrics(tmp_path / "whole")] == [0, 0.25, 0.5, 0.75, 1]


def test_bf16_masters_keep_updates_that_bf16_would_round_away():
    parameter = torch.nn.Parameter(torch.full((4, 4), 256.0, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("w", parameter)], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(20):
        parameter.grad = torch.ones_like(parameter)
        optimizer.accumulate()
        optimizer.step(0.1)
    assert optimizer.masters[0][0, 0].item() == pytest.approx(254.0, abs=0.01)
    assert parameter[0, 0].item() == 254.0


def test_a_resumed_optimizer_is_where_its_parameters_are():
    """The meta device stands for a GPU: checkpoints are read to the CPU."""
    here = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    saved = MasterAdamW([("w", here)], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    here.grad = torch.ones_like(here)
    saved.accumulate()
    saved.step(0.1)
    there = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16, device="meta"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", lambda groups, fused, **options: AdamW(groups, **options))
        resumed = MasterAdamW([("w", there)], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    assert {n: (t.shape, t.dtype) for n, t in resumed.state(create=True).items()} == {
        n: (t.shape, t.dtype) for n, t in saved.state().items()
    }
    resumed.loaded(saved.state())
    (master,) = resumed.masters
    moments = resumed.adamw.state[master]
    assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
    assert {tensor.device.type for tensor in (there, master, *moments.values())} == {"meta"}


def test_accumulation_adds_in_fp32():
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    optimizer = MasterAdamW([("b", parameter)], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for value in (256.0, 1.0, 1.0):  # bf16 would stay at 256
        parameter.grad = torch.full_like(parameter, value)
        optimizer.accumulate()
    assert optimizer.masters[0].grad.tolist() == [258.0] * 3
    assert optimizer.clip(1e9) == pytest.approx(258 * math.sqrt(3))


def test_schedule_by_hand():
    at = [learning_rate(s, lr=1.0, num_steps=12, warmup_ratio=2 / 12, min_lr_ratio=0.1) for s in range(13)]
    assert at[0] == 0.5
    assert at[1] == 1.0
    assert at[2] == 1.0
    assert at[7] == pytest.approx(0.55)
    assert at[12] == pytest.approx(0.1)


@pytest.mark.fault(15)
def test_a_step_that_is_not_finite_is_skipped_and_named_and_too_many_stop(tiny_dir, tmp_path):
    def poisoned(student, targets):
        return student.label_T * math.nan

    with pytest.raises(UserError, match="3 steps in a row"):
        run(tiny_dir, tmp_path / "bad", loss=poisoned, max_bad_steps=3)
    dumped = [json.loads(line) for line in (tmp_path / "bad" / "bad_steps.jsonl").read_text().splitlines()]
    assert [d["step"] for d in dumped] == [1, 2, 3]
    assert len(dumped[0]["trace_ids"]) == 8


@pytest.mark.fault(15)
def test_one_bad_step_leaves_the_weights_alone(tiny_dir, tmp_path):
    calls = []

    def once(student, targets):
        calls.append(1)
        return -student.label_T * (math.nan if len(calls) == 2 else 1.0)

    model, counts = run(tiny_dir, tmp_path / "once", loss=once, steps=3)
    assert counts.bad_steps == 1
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert math.isnan(metrics(tmp_path / "once")[1]["loss"])


def test_a_token_without_an_embedding_is_refused(tiny_dir, tmp_path):
    def source(start, policy):
        yield Step(pack([Example("odd", np.array([5]), np.array([49152, 2]))], micro_tokens=64))

    with pytest.raises(UserError, match=r"among odd has the token id 49152, and the model knows 49152 tokens"):
        train(
            models.load(tiny_dir),
            source,
            StoredObjective(cross_entropy),
            config(),
            length=Length(1),
            vocab_size=49152,
            folder=tmp_path,
        )


@pytest.mark.fault(29)
def test_an_interrupted_save_is_never_resumed_from(tiny_dir, tmp_path):
    from distill.training import checkpoint

    run(tiny_dir, tmp_path / "x", stop_after=5)
    *_, found = checkpoint.every(tmp_path / "x" / "checkpoints")
    assert found.name == "step-00000003"
    (found.parent / ".building-00000004").mkdir()
    assert checkpoint.every(found.parent) == [found]
    (found.parent / "step-00000009").mkdir()
    said = []
    assert checkpoint.resume(found.parent, {}, said.append)["step"] == 3
    assert "step-00000009 is damaged" in said[0]
    assert (found.parent / "damaged-step-00000009").is_dir()


def test_lora_trains_only_the_adapter(tiny_dir, tmp_path):
    from distill.recipe import LoraConfig

    cfg = config(steps=2)
    model = models.add_lora(models.load(tiny_dir), LoraConfig(rank=2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    tmp_path.joinpath("l").mkdir()

    def source(start, policy):
        for taken in steps(Copying(), batch_traces=8, start=start):
            yield Step(pack(taken, micro_tokens=512))

    train(
        model,
        source,
        StoredObjective(cross_entropy),
        cfg,
        length=Length(2),
        vocab_size=49152,
        folder=tmp_path / "l",
    )
    changed = {name for name, p in model.named_parameters() if not torch.equal(p.cpu(), before[name])}
    assert changed
    assert all("lora_" in name for name in changed)


def test_gradient_checkpointing_changes_memory_not_numbers(tiny_dir, tmp_path):
    run(tiny_dir, tmp_path / "a", dtype="float32", steps=3)
    run(tiny_dir, tmp_path / "b", dtype="float32", steps=3, gradient_checkpointing=True)
    assert [m["loss"] for m in metrics(tmp_path / "a")] == pytest.approx(
        [m["loss"] for m in metrics(tmp_path / "b")], rel=1e-6
    )


def test_a_tracker_that_is_not_installed_is_an_error(tiny_dir, tmp_path):
    with pytest.raises(UserError, match="trackers: nosuch"):
        run(tiny_dir, tmp_path / "t", steps=2, trackers=["nosuch"])


def test_a_tracker_gets_what_the_log_gets_each_step_once_over_an_interruption(tiny_dir, tmp_path):
    """Interrupted at step 3 with a checkpoint at 2, so that step 3 is made twice."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "road" / "kl"
    folder.parent.mkdir()
    settings = {"steps": 5, "checkpoint_every": 2, "trackers": ["tensorboard"], "dtype": "float32"}
    run(tiny_dir, folder, stop_after=3, **settings)
    interrupted = metrics(folder)
    assert [line["step"] for line in interrupted] == [1, 2, 3]
    run(tiny_dir, folder, **settings)
    lines = interrupted[:3] + metrics(folder)[3:]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    (event_folder,) = {path.parent for path in folder.rglob("events.out.tfevents.*") if "road" in path.parent.name}
    events = EventAccumulator(str(event_folder))
    events.Reload()
    for name in lines[0].keys() - {"step"}:
        got = events.Scalars(name)
        assert [each.step for each in got] == [1, 2, 3, 4, 5], name
        assert [each.value for each in got] == pytest.approx([line[name] for line in lines], rel=1e-6)
    assert {"loss", "lr", "grad_norm", "tokens"} <= lines[0].keys()
