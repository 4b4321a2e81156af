"""Which tokens are learned: by hand, the same in the step as before it, and for a cut example as for a masked one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distill import models, token_weights
from distill.records import TopK, UserError
from distill.stages.inputs.learned_tokens import LearnedTokens
from distill.token_choice import TokenValues, choose, keep_highest, num_kept, only
from distill.training.loss import row_choice, sparse
from distill.training.loss.divergences import forward_kl
from distill.training.loss.objective import DenseObjective, StoredObjective
from distill.training.loss.row_choice import RowChoice
from distill.training.packing import Example, pack
from distill.training.policy import StudentModule, Teacher


def distributions(num, seed, width=6):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(num, 50)) * rng.uniform(0.2, 4, (num, 1))
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return TopK.from_dense(np.tile(np.arange(50), (num, 1)), logp).truncate(top_k=width)


def example(name, prompt, num, seed):
    rng = np.random.default_rng(seed)
    return Example(
        name, np.array(prompt, np.int32), rng.integers(3, 50, num).astype(np.int32), distributions(num, seed)
    )


EXAMPLES = [example(str(n), [7] * 20 + [n + 1], 2 + 3 * n, n) for n in range(5)]


def learned(fn=None, share=1.0, held=None):
    return LearnedTokens(held, fn, share, True, "weights")


def test_entropy_by_hand():
    """Two entries of a half and a quarter, and a tail of a quarter: 1.5 bits."""
    top = TopK(np.array([2, 1]), np.array([4, 5, 6]), np.log([0.5, 0.25, 1.0]), np.array([np.log(0.25), -np.inf]))
    found = token_weights.entropy(TokenValues.of(np.array([4, 6]), top))
    np.testing.assert_allclose(found, [1.5 * np.log(2), 0.0], atol=1e-12)


@given(st.integers(0, 40), st.sampled_from([0.01, 0.25, 0.3, 0.5, 0.9]), st.integers(0, 5))
def test_the_share_is_kept_and_equal_scores_go_by_place(num, share, levels):
    score = np.random.default_rng(num).integers(0, levels + 1, num).astype(float)
    kept = keep_highest(score, share)
    assert kept.sum() == num_kept(num, share) == max(min(num, 1), int(np.ceil(round(num * share, 6))))
    order = sorted(range(num), key=lambda n: (-score[n], n))
    assert set(np.flatnonzero(kept)) == set(order[: kept.sum()])


@pytest.mark.parametrize("share", [0.1, 0.34, 0.5])
def test_the_step_keeps_what_is_kept_before_it(share):
    lengths, rng = [1, 7, 3, 12], np.random.default_rng(3)
    scores = [rng.integers(0, 4, n).astype(float) for n in lengths]
    trace_T = torch.repeat_interleave(torch.tensor([0, 2, 3, 5]), torch.tensor(lengths))
    found = row_choice.keep_highest(torch.from_numpy(np.concatenate(scores)), trace_T, share)
    assert found.tolist() == np.flatnonzero(np.concatenate([keep_highest(s, share) for s in scores])).tolist()
    assert row_choice.keep_highest(torch.zeros(0), torch.zeros(0, dtype=torch.long), share).tolist() == []


@pytest.mark.parametrize("wrong", [lambda tokens: np.zeros(2), lambda tokens: np.full(len(tokens), np.nan)])
def test_a_function_that_gives_no_scores_is_refused(wrong):
    with pytest.raises(UserError, match="one finite score a token"):
        choose(wrong, TokenValues(np.arange(5)), 0.5, "stages.kl.weights")


@pytest.fixture(scope="module")
def base(tiny_dir):
    return models.load(tiny_dir, dtype="float32")


def step(base, examples, objective, normalise="token", micro_tokens=10_000, teachers=()):
    """The loss and the gradient of the model's weights over one step."""
    module = StudentModule(base, objective, 49152, teachers)
    module.zero_grad()
    total, rows = 0.0, 0
    for batch in pack(examples, micro_tokens=micro_tokens, normalise=normalise):
        index = torch.from_numpy(batch.weight_T.nonzero()[0])
        out = module(batch.to_torch(), index)
        out.loss.backward()
        total += out.loss.item()
        rows += len(out.weight_T)
    return total, rows, torch.cat([p.grad.flatten() for p in base.parameters()])


def same(one, other):
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    assert one[1] == other[1]
    torch.testing.assert_close(one[2], other[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_a_cut_example_is_a_masked_one(base, normalise):
    """What comes after the last token that is learned changes nothing, so it need not be computed."""
    cut = [learned(token_weights.prefix, 0.4).apply(e) for e in EXAMPLES]
    masked = [dataclasses.replace(e, weighted=keep_highest(-np.arange(len(e.completion_ids)), 0.4)) for e in EXAMPLES]
    assert sum(map(len, cut)) < sum(map(len, EXAMPLES))
    objective = StoredObjective(sparse.forward_kl)
    same(step(base, cut, objective, normalise), step(base, masked, objective, normalise))
    same(step(base, cut, objective, normalise), step(base, cut, objective, normalise, micro_tokens=40))


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_positions_without_a_distribution_have_no_weight(base, normalise):
    """Stored at the least certain third: the same as learning that third of whole data."""
    rule = learned(token_weights.entropy, 0.3)
    part = [dataclasses.replace(e, top=only(e.top, rule.apply(e).weighted)) for e in EXAMPLES]
    held = [learned(held=("entropy", 0.3)).apply(e) for e in part]
    objective = StoredObjective(sparse.forward_kl)
    whole = step(base, [rule.apply(e) for e in EXAMPLES], objective, normalise)
    same(step(base, held, objective, normalise), whole)
    assert whole[1] == sum(num_kept(len(e.completion_ids), 0.3) for e in EXAMPLES)


def test_planning_without_distributions_counts_the_same():
    rule = learned(token_weights.entropy, 0.3, held=("mine:fn", 0.5))
    for each in EXAMPLES:
        bare = rule.apply(dataclasses.replace(each, top=None))
        assert bare.num_learned == num_kept(num_kept(len(each.completion_ids), 0.5), 0.3)


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_divergence_keeps_the_tokens_of_the_largest_loss(base, normalise):
    """The rows chosen in the step are those that a first pass over all rows finds; packing does not matter."""
    (batch,) = pack(EXAMPLES, micro_tokens=10_000)
    rows = torch.from_numpy(batch.weight_T.nonzero()[0])
    module = StudentModule(
        base, StoredObjective(sparse.forward_kl, lambda s, t: {"kl": sparse.forward_kl(s, t)}), 49152
    )
    kl_T = module(batch.to_torch(), rows).measures["kl"].numpy()
    by_trace = {}
    for trace in batch.trace_ids:
        place = batch.trace_ids.index(trace)
        a, b = batch.doc_offsets[place : place + 2]
        by_trace[trace] = keep_highest(kl_T[(rows >= a) & (rows < b)], 0.5)
    masked = [dataclasses.replace(e, weighted=by_trace[e.trace_id]) for e in EXAMPLES]
    chosen = [LearnedTokens(None, None, 0.5, True, "").apply(e) for e in EXAMPLES]
    objective = StoredObjective(sparse.forward_kl)
    whole = step(base, masked, objective, normalise)
    choosing = dataclasses.replace(objective, choice=RowChoice("divergence", 0.5))
    same(step(base, chosen, choosing, normalise), whole)
    same(step(base, chosen, choosing, normalise, micro_tokens=40), whole)


@pytest.mark.parametrize("fn", ["entropy", "divergence"])
def test_a_teacher_in_the_trainer_chooses_over_the_whole_vocabulary(base, tiny_dir, other_dir, fn):
    other, *plain_models = (models.load(folder, dtype="float32").eval() for folder in (other_dir, other_dir, tiny_dir))
    plain = [dataclasses.replace(e, top=None) for e in EXAMPLES]
    chosen = [LearnedTokens(None, None, 0.5, False, "").apply(e) for e in plain]
    objective = DenseObjective(forward_kl, choice=RowChoice(fn, 0.5))
    found = step(base, chosen, objective, teachers=[Teacher(other)])
    masked = []
    for each in plain:
        ids = torch.from_numpy(np.concatenate([each.prompt_ids, each.completion_ids]).astype(np.int64))[None]
        at = slice(len(each.prompt_ids) - 1, -1)
        with torch.no_grad():
            logp, logq = (model(input_ids=ids).logits[0, at].log_softmax(1) for model in plain_models)
        score = -(logp.exp() * logp).sum(1) if fn == "entropy" else (logp.exp() * (logp - logq)).sum(1)
        masked.append(dataclasses.replace(each, weighted=keep_highest(score.numpy(), 0.5)))
    same(found, step(base, masked, DenseObjective(forward_kl), teachers=[Teacher(other)]))
