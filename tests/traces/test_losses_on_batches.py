"""distill.losses against torch in fp64, TRL's divergences, and a train stage's own objective on the same traces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import trace_samples as samples
from trl.experimental.gkd import GKDTrainer

from distill import losses
from distill.errors import UserError
from distill.losses import Head
from distill.traces.batches import collate, rows_of
from distill.training.loss import sparse
from distill.training.loss.metrics import distribution_metrics
from distill.training.loss.objective import StoredObjective
from distill.training.packing import examples_of, pack
from distill.training.policy import StudentModule

VOCAB, HIDDEN = 23, 6
NAMES = ("forward_kl", "reverse_kl", "jsd", "tvd", "skewed_forward_kl", "skewed_reverse_kl", "ce_kl", "cross_entropy")


def made(*, entries: int, seed: int = 0, lengths=((2, 5), (1, 3), (3, 1))):
    """Rows of traces (prompt and completion lengths) and the teacher's logits by row, [C, VOCAB], fp64."""
    rng = np.random.default_rng(seed)
    rows, logits = [], []
    for n, (prompt, completion) in enumerate(lengths):
        logits_CV = torch.from_numpy(rng.normal(size=(completion, VOCAB)) * 2)
        logp_CV = logits_CV.log_softmax(1)
        top = logp_CV.topk(entries, dim=1)
        tail_C = logp_CV.scatter(1, top.indices, -torch.inf).logsumexp(1)
        rows.append(
            {
                "trace_id": str(n),
                "prompt_ids": rng.integers(0, VOCAB, prompt),
                "completion_ids": rng.integers(0, VOCAB, completion),
                "top_count": np.full(completion, entries),
                "top_ids": top.indices.flatten().numpy(),
                "top_logprobs": top.values.flatten().numpy(),
                "tail_logprob": tail_C.numpy(),
            }
        )
        logits.append(logits_CV)
    return rows, logits


def student_of(batch, seed: int = 1):
    torch.manual_seed(seed)
    shape = batch["labels"].shape
    hidden = torch.randn(*shape, HIDDEN, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, HIDDEN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=True)
    return hidden, weight, bias


def by_hand(logits_BTV, batch, divergence):
    """The divergence over the vocabulary's buckets (each stored id, then the rest), token by token with autograd, [B, T]."""
    logq = logits_BTV.log_softmax(-1)
    found = torch.zeros(batch["labels"].shape, dtype=torch.float64)
    for b, t in (batch["labels"] != -100).nonzero().tolist():
        ids = batch["top_ids"][b, t]
        p = batch["top_logprobs"][b, t].double().exp()
        q = logq[b, t - 1, ids].exp()
        if len(ids) < VOCAB:
            rest = [v for v in range(VOCAB) if v not in ids.tolist()]
            p = torch.cat([p, batch["tail_logprob"][b, t].double().exp()[None]])
            q = torch.cat([q, logq[b, t - 1, rest].exp().sum()[None]])
        found = found.index_put((torch.tensor(b), torch.tensor(t)), divergence(p, q))
    return found


def kl(p, q):
    return (p * (p / q).log()).sum()


BY_HAND = {
    "forward_kl": kl,
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2,
    "tvd": lambda p, q: (p - q).abs().sum() / 2,
    "skewed_forward_kl": lambda p, q: kl(p, 0.1 * p + 0.9 * q),
    "skewed_reverse_kl": lambda p, q: kl(q, 0.9 * p + 0.1 * q),
}


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("entries", [4, VOCAB])
def test_value_and_gradients_from_logits_and_from_hidden_states_equal_autograd_by_hand(name, entries):
    batch = collate(made(entries=entries)[0])
    hidden, weight, bias = student_of(batch)
    num = int((batch["labels"] != -100).sum())
    expected = by_hand(hidden @ weight.t() + bias, batch, BY_HAND[name]).sum() / num
    wanted = torch.autograd.grad(expected, (hidden, weight, bias))

    fused = getattr(losses, name)(hidden, batch, head=Head(weight, bias))
    from_logits = getattr(losses, name)(hidden @ weight.t() + bias, batch)
    for loss in (fused, from_logits):
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        for found, grad in zip(torch.autograd.grad(loss, (hidden, weight, bias)), wanted, strict=True):
            torch.testing.assert_close(found, grad, atol=1e-6, rtol=0)
    torch.testing.assert_close(fused, from_logits, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "ce_kl"])
def test_the_losses_of_tokens_have_the_gradient_of_their_weighted_sum(name):
    batch = collate(made(entries=4)[0])
    hidden, weight, bias = student_of(batch)
    each = getattr(losses, name)(hidden, batch, head=Head(weight, bias), reduction="none")
    assert each.shape == batch["labels"].shape
    assert (each[batch["labels"] == -100] == 0).all()
    total = getattr(losses, name)(hidden, batch, head=Head(weight, bias), reduction="sum")
    torch.testing.assert_close(each.sum(), total)
    mixture = torch.rand_like(each)
    found = torch.autograd.grad((each * mixture).sum(), (hidden, weight, bias))
    # Against the rows one by one.
    b_N, t_N = losses.predicting(batch)
    expected = [torch.zeros_like(x) for x in (hidden, weight, bias)]
    for b, t in zip(b_N.tolist(), t_N.tolist(), strict=True):
        one = dict(batch) | {"labels": torch.full_like(batch["labels"], -100)}
        one["labels"][b, t + 1] = batch["labels"][b, t + 1]
        loss = getattr(losses, name)(hidden, one, head=Head(weight, bias)) * mixture[b, t + 1]
        for total_, grad in zip(expected, torch.autograd.grad(loss, (hidden, weight, bias)), strict=True):
            total_ += grad
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)
    rows = hidden[b_N, t_N]
    torch.testing.assert_close(
        getattr(losses, name)(rows, batch, head=Head(weight, bias), reduction="none"), each[b_N, t_N + 1]
    )


def test_padding_and_prompts_change_nothing():
    rows = made(entries=4)[0]
    batch, wider = collate(rows), collate(rows, pad_to_multiple_of=16, pad_id=3)
    hidden, weight, _ = student_of(wider)
    short = hidden[:, : batch["labels"].shape[1]]
    one, other = (
        losses.forward_kl(h, b, head=Head(weight), reduction="sum") for h, b in ((short, batch), (hidden, wider))
    )
    assert one.item() == pytest.approx(other.item(), rel=1e-14)
    grad = torch.autograd.grad(other, hidden)[0]
    b_N, t_N = losses.predicting(wider)
    used = torch.zeros(wider["labels"].shape, dtype=torch.bool).index_put((b_N, t_N), torch.tensor(True))
    assert (grad[~used] == 0).all()
    assert (grad[used].abs().sum(1) > 0).all()


def test_a_step_over_unequal_micro_batches_is_one_mean_over_its_tokens():
    rows = made(entries=4, lengths=((2, 9), (1, 1)))[0]
    whole, parts = collate(rows), [collate([row]) for row in rows]
    hidden, weight, _ = student_of(whole)
    expected = losses.forward_kl(hidden, whole, head=Head(weight))
    num = torch.tensor(10)
    split = [
        losses.forward_kl(hidden[b : b + 1, : part["labels"].shape[1]], part, head=Head(weight), denominator=num)
        for b, part in enumerate(parts)
    ]
    torch.testing.assert_close(sum(split), expected)
    means = [
        losses.forward_kl(hidden[b : b + 1, : part["labels"].shape[1]], part, head=Head(weight)).item()
        for b, part in enumerate(parts)
    ]
    assert abs(np.mean(means) - expected.item()) > 0.01


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_distributions_equal_torch_and_trl(temperature):
    rows, teacher = made(entries=VOCAB)
    batch = collate(rows)
    hidden, weight, bias = student_of(batch)
    logits = hidden @ weight.t() + bias
    b_N, t_N = losses.predicting(batch)
    theirs, ours = torch.cat(teacher), logits[b_N, t_N]

    def compare(found, expected):
        assert found.item() == pytest.approx(temperature**2 * expected.item(), abs=1e-6)
        grads = [torch.autograd.grad(loss, (hidden, weight), retain_graph=True) for loss in (found, expected)]
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, temperature**2 * other, atol=1e-6, rtol=0)

    how = {"head": Head(weight, bias), "temperature": temperature}
    logq, logp = (ours / temperature).log_softmax(1), (theirs / temperature).log_softmax(1)
    compare(losses.forward_kl(hidden, batch, **how), F.kl_div(logq, logp, reduction="batchmean", log_target=True))
    compare(losses.reverse_kl(hidden, batch, **how), F.kl_div(logp, logq, reduction="batchmean", log_target=True))
    for beta in (0.1, 0.5, 0.9):
        trl = GKDTrainer.generalized_jsd_loss(
            ours[None], theirs[None], beta=beta, temperature=temperature, labels=torch.zeros(1, len(ours)).long()
        )
        compare(losses.jsd(hidden, batch, beta=beta, **how), trl)
    for beta, name in ((0, "forward_kl"), (1, "reverse_kl")):
        trl = GKDTrainer.generalized_jsd_loss(
            ours[None], theirs[None], beta=beta, temperature=temperature, labels=torch.zeros(1, len(ours)).long()
        )
        compare(getattr(losses, name)(logits, batch, temperature=temperature), trl)


@pytest.mark.parametrize("name", NAMES)
def test_a_train_stage_computes_the_same_on_the_same_traces(name, tiny_dir):
    from distill import models

    block = samples.traces(range(8, 14), tokens=6)
    model = models.load(tiny_dir, dtype="float32")
    (packed,) = pack(list(examples_of(block)), micro_tokens=10_000)
    packed = packed.to_torch()
    module = StudentModule(model, StoredObjective(losses.loss_function(name), distribution_metrics), samples.VOCAB)
    stage = module(packed, packed.weight_T.nonzero()[:, 0])
    stage.loss.backward()
    expected = {key: value.grad.clone() for key, value in model.named_parameters()}
    model.zero_grad()

    model.set_attn_implementation("sdpa")
    batch = collate(list(rows_of(block)))
    hidden = model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    loss = getattr(losses, name)(hidden, batch, head=Head.of(model), vocab_size=samples.VOCAB)
    loss.backward()
    assert loss.item() == pytest.approx(stage.loss.item(), rel=1e-5)
    for key, value in model.named_parameters():
        torch.testing.assert_close(value.grad, expected[key], atol=2e-5, rtol=1e-3)


def test_padded_rows_of_the_vocabulary_take_no_part():
    batch = collate(made(entries=4)[0])
    hidden, weight, bias = student_of(batch)
    expected = losses.forward_kl(hidden, batch, head=Head(weight, bias))
    grads = torch.autograd.grad(expected, (hidden, weight))
    logits = torch.cat([hidden @ weight.t() + bias, torch.full((*batch["labels"].shape, 3), 50.0)], dim=-1)
    logits.retain_grad()
    loss = losses.forward_kl(logits, batch, vocab_size=VOCAB)
    torch.testing.assert_close(loss, expected)
    for found, grad in zip(torch.autograd.grad(loss, (hidden, weight), retain_graph=True), grads, strict=True):
        torch.testing.assert_close(found, grad)
    loss.backward()
    assert (logits.grad[..., VOCAB:] == 0).all()


def test_bfloat16_logits_are_computed_in_float32():
    batch = collate(made(entries=4)[0])
    hidden, weight, _ = student_of(batch)
    logits = (hidden @ weight.t()).detach().bfloat16().requires_grad_()
    loss = losses.forward_kl(logits, batch)
    exact = losses.forward_kl(logits.double(), batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16


def test_logits_are_left_as_they_are():
    batch = collate(made(entries=4)[0])
    hidden, weight, _ = student_of(batch)
    logits = (hidden @ weight.t()).detach().requires_grad_()
    before = logits.detach().clone()
    losses.forward_kl(logits, batch).backward()
    assert torch.equal(logits, before)


def test_draws_from_the_tail_and_the_trace_s_own_token_are_read():
    rows = made(entries=4)[0]
    for row in rows:
        num = len(row["completion_ids"])
        row |= {"logprob": np.full(num, -1.0, np.float32), "draw_count": np.ones(num, int), "draw_ids": np.arange(num)}
        row |= {"draw_logprobs": np.full(num, -3.0, np.float32), "draw_mass": np.full(num, 0.02, np.float32)}
    batch = collate(rows)
    hidden, weight, _ = student_of(batch)
    targets = losses.targets_of(batch)
    values = {
        tail: losses.forward_kl(hidden, batch, head=Head(weight), tail=tail).item()
        for tail in (None, "draws", "own_token", "bucket")
    }
    assert values[None] == values["draws"]
    assert len(set(values.values())) == 3
    assert targets.draw_mass_T.tolist() == [pytest.approx(0.02)] * 9
    assert targets.teacher_label_T.tolist() == [-1.0] * 9


def test_a_batch_without_a_learned_token_gives_zero():
    batch = collate(made(entries=4)[0])
    batch["labels"] = torch.full_like(batch["labels"], -100)
    hidden, weight, _ = student_of(batch)
    for student, head in ((hidden, Head(weight)), (hidden @ weight.t(), None)):
        loss = losses.forward_kl(student, batch, head=head)
        assert loss.item() == 0
        assert (torch.autograd.grad(loss, hidden)[0] == 0).all()


def test_a_loss_of_one_s_own():
    def doubled(student, targets, *, factor=2.0):
        return factor * sparse.forward_kl(student, targets)

    batch = collate(made(entries=4)[0])
    hidden, weight, _ = student_of(batch)
    once = losses.forward_kl(hidden, batch, head=Head(weight))
    found = losses.on_batch(doubled, hidden, batch, {"factor": 3.0}, head=Head(weight))
    torch.testing.assert_close(found, 3 * once)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda h, w, b: losses.forward_kl(h[:, 1:], b, head=Head(w)), "not shifted or cut"),
        (lambda h, w, b: losses.forward_kl(h[0], b, head=Head(w)), "9 tokens of the batch are learned"),
        (lambda h, w, b: losses.forward_kl(h @ w.t(), b, head=Head(w)), "the head takes 6 hidden features"),
        (lambda h, w, b: losses.forward_kl(h, b, vocab_size=VOCAB), "Are these hidden states"),
        (lambda h, w, b: losses.forward_kl(h, b), "the teacher's tokenizer is another"),
        (lambda h, w, b: losses.forward_kl(h, b, head=Head(w), temperature=2.0), "stored distributions have temperature 1"),
        (lambda h, w, b: losses.cross_entropy(h, b, head=Head(w), temperature=2.0), "temperature is for the divergences"),
        (lambda h, w, b: losses.jsd(h, b, head=Head(w), beta=1.0), "reverse_kl: name the one you mean"),
        (lambda h, w, b: losses.forward_kl(h, b, head=Head(w), tail="draws"), "tail: draws needs traces"),
        (lambda h, w, b: losses.forward_kl(h, b, head=Head(w), reduction="batchmean"), "none of mean, sum and none"),
        (lambda h, w, b: losses.on_batch("forwardkl", h, b), "Did you mean 'forward_kl'"),
        (lambda h, w, b: losses.on_batch("policy_gradient", h, b), "no loss on stored distributions"),
        (
            lambda h, w, b: losses.forward_kl(
                h, {k: v for k, v in b.items() if not k.startswith(("top", "tail"))}, head=Head(w)
            ),
            "the data hold none",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(call, said):
    batch = collate(made(entries=4)[0])
    hidden, weight, _ = student_of(batch)
    with pytest.raises(UserError, match=said):
        call(hidden, weight, batch)
