"""Packing: alignment by hand, and packed = unpacked through a real decoder."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from distill import models
from distill.records import TopK
from distill.training.losses import cross_entropy, forward_kl
from distill.training.objective import Objective
from distill.training.packing import Example, pack, steps
from distill.training.policy import Trainee


def example(name, prompt, completion, k=None, seed=0):
    top = None
    if k:
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(len(completion), 50)) * 3
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        top = TopK.from_dense(np.tile(np.arange(50), (len(completion), 1)), logp).truncate(
            top_k=k, mass=0.95
        )
    return Example(name, np.array(prompt, np.int32), np.array(completion, np.int32), top)


def test_one_trace_by_hand():
    """Prompt 10 11 12, completion 20 21 2: rows 2, 3, 4 predict 20, 21 and the final EOS."""
    (batch,) = pack([example("a", [10, 11, 12], [20, 21, 2], k=3)], micro_tokens=100)
    assert batch.ids_T.tolist() == [10, 11, 12, 20, 21, 2]
    assert batch.position_T.tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.label_T[2:5].tolist() == [20, 21, 2]
    assert batch.weight_T.tolist() == [0, 0, 1, 1, 1, 0]
    assert batch.denominator == 3
    top = example("a", [10, 11, 12], [20, 21, 2], k=3).top
    ids, logp = top.dense(batch.teacher_ids_TK.shape[1])
    np.testing.assert_array_equal(batch.teacher_ids_TK[2:5], ids)
    np.testing.assert_array_equal(batch.teacher_logp_TK[2:5], logp)
    np.testing.assert_array_equal(batch.teacher_tail_T[2:5], top.tail_T)
    assert (batch.teacher_ids_TK[[0, 1, 5]] == -1).all()


def test_micro_batches_cover_every_trace_once_and_share_the_denominator():
    examples = [example(str(n), [1] * (1 + n % 3), [5] * (1 + n % 7)) for n in range(40)]
    whole = pack(examples, micro_tokens=10_000)
    split = pack(examples, micro_tokens=16)
    assert len(whole) == 1
    assert len(split) > 5
    assert all(len(batch.ids_T) <= 16 for batch in split)
    assert sorted(i for b in split for i in b.trace_ids) == sorted(e.trace_id for e in examples)
    assert {b.denominator for b in split} == {whole[0].denominator}
    assert sum(b.weight_T.sum() for b in split) == whole[0].weight_T.sum() == whole[0].denominator


def test_sequence_mean_counts_every_trace_equally():
    (batch,) = pack(
        [example("a", [1], [5, 2]), example("b", [1], [6, 7, 8, 2])],
        micro_tokens=100,
        normalise="sequence",
    )
    assert batch.denominator == 2
    by_trace = [
        batch.weight_T[a:b].sum()
        for a, b in zip(batch.doc_offsets, batch.doc_offsets[1:], strict=False)
    ]
    assert by_trace == pytest.approx([1, 1])


def test_processes_get_equally_many_batches_and_together_everything():
    examples = [example(str(n), [1, 1], [5] * 6) for n in range(5)]
    ranks = [pack(examples, micro_tokens=8, rank=r, world=4) for r in range(4)]
    assert {len(r) for r in ranks} == {2}
    seen = [i for r in ranks for b in r if b.weight_T.sum() for i in b.trace_ids]
    assert sorted(seen) == sorted(e.trace_id for e in examples)
    assert sum(b.weight_T.sum() for r in ranks for b in r) == ranks[0][0].denominator == 30


class Numbers:
    fingerprint = "n"
    num_examples = 10

    def epoch(self, index, skip=0):
        order = np.random.default_rng(index).permutation(10)[skip:]
        return (example(f"{index}:{n}", [1], [5, 2]) for n in order)


def test_steps_run_over_epochs_and_start_anywhere():
    def first_eight(start=0):
        taken = itertools.islice(steps(Numbers(), batch_traces=4, start=start), 8 - start)
        return [[e.trace_id for e in step] for step in taken]

    every = first_eight()
    assert [len(step) for step in every] == [4, 4, 2, 4, 4, 2, 4, 4]
    assert sorted(trace_id for step in every[:3] for trace_id in step) == sorted(
        f"0:{n}" for n in range(10)
    )
    for start in range(8):
        assert first_eight(start) == every[start:]


@pytest.fixture(scope="module")
def trainee_parts(tiny_dir):
    return lambda loss: Trainee(models.load(tiny_dir, dtype="float32"), Objective(loss), 49152)


def gradients(trainee, batches):
    trainee.zero_grad()
    total = 0.0
    for batch in batches:
        rows = torch.from_numpy(batch.weight_T.nonzero()[0])
        out = trainee(batch.to_torch(), rows)
        out.loss.backward()
        total += out.loss.item()
    return total, {name: p.grad.clone() for name, p in trainee.named_parameters()}


@pytest.mark.parametrize("loss", [cross_entropy, forward_kl])
def test_packed_equals_one_trace_at_a_time_and_any_split(trainee_parts, loss):
    rng = np.random.default_rng(0)
    lengths = [(3, 5), (1, 1), (30, 20), (7, 40), (2, 300), (12, 9), (1, 33)]
    examples = [
        example(str(n), rng.integers(3, 1000, p), [*rng.integers(3, 50, c - 1), 2], k=8, seed=n)
        for n, (p, c) in enumerate(lengths)
    ]
    trainee = trainee_parts(loss)
    packed = gradients(trainee, pack(examples, micro_tokens=10_000))
    for micro_tokens in (1, 64, 350):
        split = gradients(trainee, pack(examples, micro_tokens=micro_tokens))
        assert split[0] == pytest.approx(packed[0], rel=1e-5)
        for name, grad in packed[1].items():
            torch.testing.assert_close(split[1][name], grad, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("micro_tokens", [10_000, 300, 90])
def test_traces_of_one_prompt_share_it_and_nothing_else_changes(trainee_parts, micro_tokens):
    """The oracle packs each trace alone, where nothing can be shared."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 1000, n).astype(np.int32) for n in (12, 1, 40, 12, 300)]
    counts = [(0, 5), (1, 3), (2, 4), (3, 1), (4, 2)]
    examples = [
        example(f"{p}.{n}", prompts[p], [*rng.integers(3, 50, rng.integers(0, 30)), 2], k=4, seed=n)
        for p, count in counts
        for n in range(count)
    ]
    rng.shuffle(examples)
    trainee = trainee_parts(forward_kl)
    alone = [b for e in examples for b in pack([e], micro_tokens=1)]
    denominator = sum(len(e.completion_ids) for e in examples)
    alone = [dataclasses.replace(b, denominator=float(denominator)) for b in alone]
    shared = pack(examples, micro_tokens=micro_tokens)
    want, got = gradients(trainee, alone), gradients(trainee, shared)
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-3, atol=2e-6, msg=name)
    tokens = sum(len(b.ids_T) for b in shared)
    assert sorted(i for b in shared for i in b.trace_ids) == sorted(e.trace_id for e in examples)
    if micro_tokens == 10_000:  # all but one of the five and the four compute 11 and 39 tokens less
        assert tokens == sum(len(e) for e in examples) - 4 * 11 - 3 * 39


def test_a_shared_prompt_by_hand():
    a, b = example("a", [7, 8, 9], [20, 2]), example("b", [7, 8, 9], [30, 31, 2])
    (batch,) = pack([a, b], micro_tokens=100)
    assert batch.trace_ids == ("a", "b")
    assert batch.ids_T.tolist() == [9, 20, 2, 9, 30, 31, 2, 7, 8]
    assert batch.position_T.tolist() == [2, 3, 4, 2, 3, 4, 5, 0, 1]
    assert batch.doc_offsets.tolist() == [0, 3, 7, 9]
    assert batch.parent.tolist() == [2, 2, -1]
    assert batch.weight_T.tolist() == [1, 1, 0, 1, 1, 1, 0, 0, 0]
    assert batch.label_T[batch.weight_T > 0].tolist() == [20, 2, 30, 31, 2]
    assert batch.squared_lengths == 9 + 2 * 3 * 2 + 16 + 2 * 4 * 2 + 4


def test_packed_attention_equals_transformers_own_on_each_trace_alone(tiny_dir):
    """The oracle is transformers' eager attention on unpacked traces, dense softmax, autograd."""
    rng = np.random.default_rng(1)
    examples = [
        example(str(n), rng.integers(3, 1000, p), rng.integers(3, 1000, c))
        for n, (p, c) in enumerate([(5, 9), (40, 300), (2, 17)])
    ]
    trainee = Trainee(models.load(tiny_dir, dtype="float32"), Objective(cross_entropy), 49152)
    loss, grads = gradients(trainee, pack(examples, micro_tokens=10_000))
    plain = models.load(tiny_dir, dtype="float32", attn_implementation="eager")
    total = torch.zeros(())
    for e in examples:
        ids = torch.from_numpy(np.concatenate([e.prompt_ids, e.completion_ids])).long()
        logq = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        first = len(e.prompt_ids)
        total = total - logq[first - 1 : -1].gather(1, ids[first:, None]).sum()
    total = total / sum(len(e.completion_ids) for e in examples)
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-5)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            grads[f"model.{name}"], parameter.grad, rtol=1e-3, atol=2e-6, msg=name
        )
