"""Packing: alignment by hand, and packed = unpacked through a real decoder."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from distill import models
from distill.records import TopK
from distill.training import attention, doc_layout
from distill.training.loss.objective import StoredObjective
from distill.training.loss.sparse import cross_entropy, forward_kl
from distill.training.packing import Example, pack, steps
from distill.training.policy import StudentModule


def example(name, prompt, completion, k=None, seed=0):
    top = None
    if k:
        rng = np.random.default_rng(seed)
        logits = rng.normal(size=(len(completion), 50)) * 3
        logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        top = TopK.from_dense(np.tile(np.arange(50), (len(completion), 1)), logp).truncate(top_k=k, mass=0.95)
    return Example(name, np.array(prompt, np.int32), np.array(completion, np.int32), top)


@pytest.mark.fault(11)
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
    by_trace = [batch.weight_T[a:b].sum() for a, b in zip(batch.doc_offsets, batch.doc_offsets[1:], strict=False)]
    assert by_trace == pytest.approx([1, 1])


@pytest.mark.fault(21)
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
    assert sorted(trace_id for step in every[:3] for trace_id in step) == sorted(f"0:{n}" for n in range(10))
    for start in range(8):
        assert first_eight(start) == every[start:]


@pytest.fixture(scope="module")
def student_parts(tiny_dir):
    return lambda loss: StudentModule(models.load(tiny_dir, dtype="float32"), StoredObjective(loss), 49152)


def gradients(student_module, batches):
    student_module.zero_grad()
    total = 0.0
    for batch in batches:
        rows = torch.from_numpy(batch.weight_T.nonzero()[0])
        out = student_module(batch.to_torch(), rows)
        out.loss.backward()
        total += out.loss.item()
    return total, {name: p.grad.clone() for name, p in student_module.named_parameters()}


@pytest.mark.parametrize("loss", [cross_entropy, forward_kl])
def test_packed_equals_one_trace_at_a_time_and_any_split(student_parts, loss):
    rng = np.random.default_rng(0)
    lengths = [(3, 5), (1, 1), (30, 20), (7, 40), (2, 300), (12, 9), (1, 33)]
    examples = [
        example(str(n), rng.integers(3, 1000, p), [*rng.integers(3, 50, c - 1), 2], k=8, seed=n)
        for n, (p, c) in enumerate(lengths)
    ]
    student_module = student_parts(loss)
    packed = gradients(student_module, pack(examples, micro_tokens=10_000))
    for micro_tokens in (1, 64, 350):
        split = gradients(student_module, pack(examples, micro_tokens=micro_tokens))
        assert split[0] == pytest.approx(packed[0], rel=1e-5)
        for name, grad in packed[1].items():
            torch.testing.assert_close(split[1][name], grad, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("micro_tokens", [10_000, 300, 90])
def test_traces_of_one_prompt_share_it_and_nothing_else_changes(student_parts, micro_tokens):
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
    student_module = student_parts(forward_kl)
    alone = [b for e in examples for b in pack([e], micro_tokens=1)]
    denominator = sum(len(e.completion_ids) for e in examples)
    alone = [dataclasses.replace(b, denominator=float(denominator)) for b in alone]
    shared = pack(examples, micro_tokens=micro_tokens)
    want, got = gradients(student_module, alone), gradients(student_module, shared)
    assert got[0] == pytest.approx(want[0], rel=1e-5)
    for name, grad in want[1].items():
        torch.testing.assert_close(got[1][name], grad, rtol=1e-3, atol=2e-6, msg=name)
    tokens = sum(len(b.ids_T) for b in shared)
    assert sorted(i for b in shared for i in b.trace_ids) == sorted(e.trace_id for e in examples)
    if micro_tokens == 10_000:  # all but one of the five, the four and the two: 11, 39 and 299 tokens less
        assert tokens == sum(len(e) for e in examples) - 4 * 11 - 3 * 39 - 299


def test_a_tree_of_shared_prompts_by_hand():
    """Eight tokens common to all four examples, four more to a and b: 8 * 3 and, of `wide`, 20 * 1 tokens are saved."""
    frame, wide = list(range(10, 18)), list(range(30, 50))
    a = example("a", [*frame, *wide, 7], [20, 2])
    b = example("b", [*frame, *wide, 8], [21, 2])
    c, d = example("c", [*frame, 60], [22, 2]), example("d", [*frame, 61, 62], [23, 24, 2])
    (batch,) = pack([d, b, a, c], micro_tokens=100)
    assert batch.trace_ids == ("a", "b", "c", "d")
    own = [[7, 20, 2], [8, 21, 2], [60, 22, 2], [61, 62, 23, 24, 2]]
    assert batch.ids_T.tolist() == [t for ids in [*own, wide, frame] for t in ids]
    assert batch.doc_offsets.tolist() == [0, 3, 6, 9, 14, 34, 42]
    assert batch.parent.tolist() == [4, 4, 5, 5, 5, -1]
    assert batch.position_T[batch.doc_offsets[:-1]].tolist() == [28, 28, 8, 8, 8, 0]
    assert batch.position_T[9:14].tolist() == [8, 9, 10, 11, 12]
    assert batch.weight_T.tolist() == [1, 1, 0] * 3 + [0, 1, 1, 1, 0] + [0] * 28
    assert batch.label_T[batch.weight_T > 0].tolist() == [20, 2, 21, 2, 22, 2, 23, 24, 2]
    seen = [(3, 28), (3, 28), (3, 8), (5, 8), (20, 8), (8, 0)]
    assert batch.squared_lengths == sum(own**2 + 2 * own * before for own, before in seen)
    # A prefix that would save fewer than MIN_TOKENS_SAVED tokens is not shared.
    (plain,) = pack([c, d], micro_tokens=100)
    assert (plain.parent == -1).all()


def test_the_last_prompt_token_is_never_shared():
    """It predicts the first token of each example's own completion, of one prompt and where one prompt begins another."""
    prompt = list(range(10, 40))
    examples = [
        example("a", prompt, [5, 2]),
        example("b", prompt, [6, 2]),
        example("c", [*prompt, 50], [7, 2]),
    ]
    (batch,) = pack(examples, micro_tokens=100)
    assert batch.parent.tolist() == [3, 3, 3, -1]
    assert batch.ids_T[:10].tolist() == [39, 5, 2, 39, 6, 2, 39, 50, 7, 2]
    assert batch.ids_T[10:].tolist() == prompt[:-1]


@pytest.mark.parametrize("micro_tokens", [60, 100, 1000])
def test_bins_count_tokens_after_sharing_and_hold_what_shares_together(micro_tokens):
    """Sixteen groups of four with 20 tokens common to all and 10 to a group: 20 + 16 * (10 + 4 * 6) tokens in all."""
    rng = np.random.default_rng(0)
    frame = list(range(100, 120))
    examples = [
        example(f"{group}.{n}", [*frame, *range(group, group + 11)], [5, 6, 7, 8, 2])
        for group in range(16)
        for n in range(4)
    ]
    rng.shuffle(examples)
    batches = pack(examples, micro_tokens=micro_tokens)
    sizes = [len(batch.ids_T) for batch in batches]
    assert max(sizes) <= micro_tokens
    # What a micro-batch adds: the frame, a group that is continued, and room for less than an example.
    assert len(batches) <= -(-(16 * (10 + 4 * 6)) // (micro_tokens - 20 - 10 - 6))
    assert sum(sizes) <= 16 * (10 + 4 * 6) + len(batches) * (20 + 10)
    if micro_tokens == 1000:
        assert sizes == [20 + 16 * (10 + 4 * 6)]


@st.composite
def prompt_trees(draw):
    """Prompts that begin with parts of one another, each with one or more completions, in any order."""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    prompts = [rng.integers(3, 1000, draw(st.integers(1, 60)))]
    for _ in range(draw(st.integers(1, 5))):
        stem = draw(st.sampled_from(prompts))
        kept = draw(st.integers(0, len(stem)))
        prompts.append(np.append(stem[:kept], rng.integers(3, 1000, draw(st.integers(1, 40)))))
    counts = draw(st.lists(st.integers(1, 4), min_size=len(prompts), max_size=len(prompts)))
    lengths = [draw(st.integers(0, 25)) for _ in range(sum(counts))]
    chosen = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
    examples = [
        example(str(n), prompt, [*rng.integers(3, 1000, length), 2])
        for n, (prompt, length) in enumerate(zip(chosen, lengths, strict=True))
    ]
    return draw(st.permutations(examples))


@pytest.fixture
def in_fp64(tiny_dir, monkeypatch):
    """StudentModule and, as the oracle, the model with torch's own attention (transformers' eager one rounds to fp32, as its norms do)."""

    def forward(norm, x):
        return norm.weight * x * (x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    plain = models.load(tiny_dir, dtype="float64", attn_implementation="sdpa")
    student_module = StudentModule(models.load(tiny_dir, dtype="float64"), StoredObjective(cross_entropy), 49152)
    return student_module, plain


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompt_trees(), st.sampled_from([1, 64, 150, 10_000]), st.sampled_from([attention.SHORT, 16]))
def test_sharing_over_random_trees_changes_neither_loss_nor_gradients(in_fp64, examples, micro_tokens, short):
    """The oracle runs each trace alone through torch's attention and log-softmax; a low SHORT takes fused kernels."""
    student_module, plain = in_fp64
    # A power of two: weights are float32.
    batches = pack(examples, micro_tokens=micro_tokens, denominator=64.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SHORT", short)
        patch.setattr(doc_layout, "SHORT", short)
        loss, grads = gradients(student_module, batches)
    total = torch.zeros((), dtype=torch.float64)
    for e in examples:
        ids = torch.from_numpy(np.concatenate([e.prompt_ids, e.completion_ids])).long()
        logq = plain(input_ids=ids[None]).logits[0].log_softmax(-1)
        first = len(e.prompt_ids)
        total = total - logq[first - 1 : -1].gather(1, ids[first:, None]).sum() / 64
    plain.zero_grad()
    total.backward()
    assert loss == pytest.approx(total.item(), rel=1e-10)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(grads[f"model.{name}"], parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


def test_packed_attention_equals_transformers_own_on_each_trace_alone(tiny_dir):
    """The oracle is transformers' eager attention on unpacked traces, dense softmax, autograd."""
    rng = np.random.default_rng(1)
    examples = [
        example(str(n), rng.integers(3, 1000, p), rng.integers(3, 1000, c))
        for n, (p, c) in enumerate([(5, 9), (40, 300), (2, 17)])
    ]
    student_module = StudentModule(models.load(tiny_dir, dtype="float32"), StoredObjective(cross_entropy), 49152)
    loss, grads = gradients(student_module, pack(examples, micro_tokens=10_000))
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
        torch.testing.assert_close(grads[f"model.{name}"], parameter.grad, rtol=1e-3, atol=2e-6, msg=name)
