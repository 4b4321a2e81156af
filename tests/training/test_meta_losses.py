"""Every loss, objective and way of attention on the meta device: nothing is left on the CPU, and nothing waits for the device
but what WAITS lists."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from tiny_architectures import build
from torch.optim import AdamW
from waits import Waits

from distill import models, plug
from distill.recipe import LoraConfig
from distill.records import Draws, TopK
from distill.training import attention, gpu_attention
from distill.training.loop import _Loop
from distill.training.loss import divergences, multi_teacher, sparse
from distill.training.loss.cross_tokenizer import losses as cross_tokenizer
from distill.training.loss.cross_tokenizer.alignment import RetokenizedTrace, VocabularyMap, align
from distill.training.loss.metrics import distribution_metrics
from distill.training.loss.objective import (
    CrossTokenizerObjective,
    DenseObjective,
    SampledTeacherObjective,
    StoredObjective,
    TeacherTopObjective,
)
from distill.training.optim import MasterAdamW
from distill.training.packing import Example, pack
from distill.training.policy import Policy, StudentModule, Teacher
from distill.training.rl import policy_objectives

META = torch.device("meta")
V = 320
WAITS = {
    "loop._Loop._accumulate": "the loss and the metrics of all micro-batches, once a step, for the log and the check for NaN",
    "optim.MasterAdamW.clip": "the gradient's norm, once a step, for the log and the check for NaN",
    "policy.Policy._score": "log-probabilities under the policy or the reference, once a micro-batch of a rollout, to be packed",
}
"""Where training waits for the device on purpose, and what for."""


def tiny(model_type="llama", **fields):
    return build(model_type, V, **fields).to(torch.bfloat16).to(META).train()


def example(n, top=None, advantage=None, retokenized=None):
    rng = np.random.default_rng(n)
    reply = rng.integers(3, 250, 6).astype(np.int32)
    prompt = np.append(np.arange(3, 23), n).astype(np.int32)  # the first twenty tokens are shared
    rollout = {} if advantage is None else {"advantage": advantage, "engine_logp": np.full(6, -1.0, np.float32)}
    return Example(str(n), prompt, reply, top, retokenized=retokenized, **rollout)


def top(n):
    rng = np.random.default_rng(n)
    ids = np.stack([rng.choice(V, 8, replace=False) for _ in range(6)])
    return TopK.from_dense(ids, np.log(rng.dirichlet(np.ones(8), 6) * 0.95))


def drawn(n):
    """An example with none to three draws a position, and the teacher's log-probabilities of its tokens."""
    count_T = np.array([0, 1, 3, 2, 0, 3], np.int32)
    rng = np.random.default_rng(n)
    draws = Draws(count_T, rng.integers(0, V, 9), np.full(9, -6.0, np.float32))
    logp, mass = np.full(6, -2.0, np.float32), np.full(6, 0.02, np.float32)
    return dataclasses.replace(example(n, top(n)), draws=draws, draw_mass=mass, teacher_logp=logp)


def step(module, batches, waits):
    """A whole optimiser step with the trainer's own code, as in `_Loop._step`; returns the optimiser."""
    with pytest.MonkeyPatch.context() as patch:  # the fused one knows no meta tensors
        patch.setattr(torch.optim, "AdamW", lambda groups, fused, **options: AdamW(groups, foreach=True, **options))
        optimizer = MasterAdamW(module.named_parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    loop = object.__new__(_Loop)
    loop.device, loop.module, loop.optimizer = META, module, optimizer
    with waits:
        loop._accumulate(batches)
        assert {master.grad.device for master in optimizer.masters if master.grad is not None} == {META}
        optimizer.clip(1.0)
        optimizer.step(1e-3)
    assert {tensor.device for tensor in optimizer.state().values() if tensor.ndim} == {META}
    return optimizer


def check_step(module, batches):
    waits = Waits()
    step(module, batches, waits)
    assert waits.at == {"loop._Loop._accumulate": 1, "optim.MasterAdamW.clip": 1}
    assert set(waits.at) <= set(WAITS)


def stored(loss, **options):
    return StoredObjective(loss, distribution_metrics, **options)


TOPS = {"cross_entropy", "forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl", "ce_kl"}
OTHER_LOSSES = {"sampled_kd", "policy_gradient"}


def test_no_loss_is_left_out():
    assert set(plug.names("distill.training.loss.sparse")) == TOPS | OTHER_LOSSES
    assert set(plug.names("distill.training.loss.cross_tokenizer.losses")) == {"uld", "aligned"}
    assert set(plug.names("distill.training.rl.policy_objectives")) == {"grpo", "dapo", "dr_grpo", "gspo", "cispo"}


@pytest.mark.parametrize("name", sorted(TOPS))
def test_stored_targets(name):
    module = StudentModule(tiny(), stored(getattr(sparse, name)), V)
    check_step(module, pack([example(n, top(n)) for n in range(4)], micro_tokens=64))


@pytest.mark.parametrize("tail", ["own_token", "draws"])
def test_samples_of_the_tail(tail):
    loss = functools.partial(sparse.forward_kl, tail=tail, bucket_share=0.5)
    batches = pack([drawn(n) for n in range(4)], micro_tokens=64)
    assert batches[0].draw_ids_TN.shape == (len(batches[0].ids_T), 3)
    check_step(StudentModule(tiny(), stored(loss), V), batches)


def test_stored_targets_of_several_teachers():
    shares = (0.7, 0.3)
    loss = multi_teacher.over_teachers(sparse.jsd, shares)
    mixtures = [multi_teacher.TeacherMixture.of([top(n), top(n + 9)], shares) for n in range(4)]
    module = StudentModule(tiny(), stored(loss), V)
    check_step(module, pack([example(n, mixture) for n, mixture in enumerate(mixtures)], micro_tokens=64))


@pytest.mark.parametrize(
    "name", ["top", "forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl"]
)
def test_teachers_in_the_trainer(name):
    objective = (
        TeacherTopObjective(sparse.forward_kl, distribution_metrics, entries=16)
        if name == "top"
        else DenseObjective(getattr(divergences, name), temperature=2.0)
    )
    teachers = [Teacher(tiny(hidden_size=48).eval(), share) for share in (0.6, 0.4)]
    module = StudentModule(tiny(), objective, V, teachers)
    check_step(module, pack([example(n) for n in range(4)], micro_tokens=64))


def test_ids_drawn_from_a_teacher(monkeypatch):
    objective = SampledTeacherObjective(sparse.sampled_kd, draws=8)
    module = StudentModule(tiny(), objective, V, [Teacher(tiny().eval())])
    generator = torch.Generator()
    monkeypatch.setattr(torch, "Generator", lambda device: generator)  # meta tensors have none
    check_step(module, pack([example(n) for n in range(4)], micro_tokens=64))


@pytest.mark.parametrize("name", ["uld", "aligned"])
def test_a_teacher_with_another_tokenizer(name):
    texts = [bytes([n % 256, n // 256]) for n in range(V)]
    half = [bytes([n]) for n in range(256)]
    shared = VocabularyMap.of([*half[:200], *texts[200:]], half)
    made = []
    for n in range(4):
        one = example(n)
        pieces = [*half[:200], *texts[200:]]
        student = [pieces[i] for i in one.completion_ids]
        ids = np.frombuffer(b"".join(student), np.uint8).astype(np.int64)
        alignment = align(student, [half[i] for i in ids])
        made.append(dataclasses.replace(one, retokenized=RetokenizedTrace(np.array([3, 4]), ids, alignment)))
    batches = pack(made, micro_tokens=64)
    assert any(len(batch.cross_tokenizer.student_piece_M) for batch in batches)
    teacher = Teacher(tiny().eval(), vocab_size=256, shared=shared)
    module = StudentModule(tiny(), CrossTokenizerObjective(getattr(cross_tokenizer, name)), V, [teacher])
    check_step(module, batches)


def rollout_batches(objective, *, old):
    """Micro-batches of a rollout; with the log-probabilities of the policy that wrote it where this is not its first update."""
    batches = pack([example(n, advantage=float(n % 3) - 1) for n in range(4)], micro_tokens=64)
    streams = {"ref_logp_T": "reference", **({"old_logp_T": "old"} if old else {})}
    return [
        dataclasses.replace(b, **{name: np.full(len(b.ids_T), -1.0, np.float32) for name in streams}) for b in batches
    ]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo"])
def test_policy_objectives(name, old):
    objective = getattr(policy_objectives, name)(beta=0.01)
    check_step(StudentModule(tiny(), objective, V), rollout_batches(objective, old=old))


def test_a_policy_gradient_on_an_engines_scores():
    check_step(StudentModule(tiny(), StoredObjective(sparse.policy_gradient), V), rollout_batches(None, old=True))


@pytest.mark.parametrize("adapter", [False, True])
def test_scoring_waits_once_a_batch(adapter):
    model = tiny()
    if adapter:
        model = models.add_lora(model, LoraConfig(rank=2)).to(META)
    module = StudentModule(model, policy_objectives.grpo(), V)
    reference = Policy.reference_of(module)
    assert (reference is None) == adapter
    policy, waits = Policy(module, reference, META), Waits()
    (batch,) = pack([example(n) for n in range(4)], micro_tokens=4096)
    with waits:
        assert policy.logp(batch).shape == policy.reference_logp(batch).shape == batch.ids_T.shape
        if reference is not None:
            policy.sync_reference()
    assert waits.at == {"policy.Policy._score": 2}
    assert set(waits.at) <= set(WAITS)


ARCHITECTURES = ("llama", "gemma2", "gemma3_text", "gpt_oss", "mistral", "deepseek_v3", "qwen3_moe")


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_windows_caps_sinks_and_recomputation(model_type):
    model = tiny(model_type)
    if model_type in ("llama", "gemma2", "gpt_oss"):
        model.gradient_checkpointing_enable()
    check_step(
        StudentModule(model, stored(sparse.forward_kl), V),
        pack([example(n, top(n)) for n in range(4)], micro_tokens=64),
    )


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mistral", "deepseek_v3"])
def test_the_flash_operator_takes_our_arguments(model_type, monkeypatch):
    """torch's own operator and its derivative on the meta device: signature, dtypes and shapes, with windows and prefixes."""
    calls = []

    def by_flash(*args, kernel=attention.by_flash):
        calls.append(args[-1])
        return kernel(*args, size=gpu_attention.flash_size(args[0].shape[3], args[2].shape[3], (8, 0)))

    monkeypatch.setattr(attention, "takes_flash", lambda query, value, shape: shape.plain)
    monkeypatch.setattr(attention, "by_flash", by_flash)
    module = StudentModule(tiny(model_type), stored(sparse.forward_kl), V)
    batches = pack([example(n, top(n)) for n in range(4)], micro_tokens=64)
    assert batches[0].parent.max() >= 0
    check_step(module, batches)
    assert calls
    assert any(window is not None for window in calls) == (model_type in ("gemma3_text", "mistral"))


def test_a_wait_is_noticed():
    """The check can fail: a loss that looks at a value is named."""

    def looks(student, targets):
        return -student.label_T * float(student.label_T.sum())

    waits = Waits()
    step(StudentModule(tiny(), StoredObjective(looks), V), pack([example(0)], micro_tokens=64), waits)
    assert set(waits.at) - set(WAITS)
