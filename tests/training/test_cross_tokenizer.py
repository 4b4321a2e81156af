"""Models with different tokenizers: SmolLM2's and a small byte-level BPE trained here, against NumPy and finite differences."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from head_problems import softmax
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distill.errors import UserError
from distill.models import render_prompt, render_reply
from distill.records import Template
from distill.training.loss import divergences
from distill.training.loss.cross_tokenizer.alignment import (
    END,
    RetokenizedTrace,
    Retokenizer,
    VocabularyMap,
    align,
    token_bytes,
)
from distill.training.loss.cross_tokenizer.losses import Pair, aligned, uld
from distill.training.loss.cross_tokenizer.vocabulary_divergences import shared_token_divergence, sorted_distance
from distill.training.loss.dense import Logits, compare_rows
from distill.training.loss.head import HeadForm, Targets
from distill.training.packing import Example, pack

TEXT = "Zoë adds 12345 and 678: the naïve sum is 13023 — première réponse. \n\n日本語 also works, twice as slowly."


@pytest.fixture(scope="module")
def small():
    """A byte-level BPE of 420 tokens, with other token boundaries than SmolLM2's."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=420,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    lines = [
        "the sum of the numbers is the answer 12345 678 13023",
        "deux réponses, the first sum is naïve",
    ]
    made.train_from_iterator(lines * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>")


def ids_of(tokenizer, text):
    """Return the ids of a text, followed by the end-of-text id."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def pieces(tokenizer, text):
    """Return the ids of a text with its end, and their bytes."""
    ids = ids_of(tokenizer, text)
    table = token_bytes(tokenizer)
    return ids, [table[i] for i in ids]


def test_bytes_of_both_tokenizers_join_to_the_text(tokenizer, small):
    for one in (tokenizer, small):
        ids, parts = pieces(one, TEXT)
        assert b"".join(parts) == TEXT.encode() + END
        assert len(token_bytes(one)) == len(one)
        assert all(parts[n] == b"" or one.decode([i]) != "" for n, i in enumerate(ids))


def test_sentencepiece_bytes_and_a_tokenizer_of_neither_kind():
    class Fake:
        eos_token_id = 0

        def __init__(self):
            self.added_tokens_decoder = {}

        def get_vocab(self):
            return {"</s>": 0, "▁hi": 1, "<0x0A>": 2, "é": 3}

    assert token_bytes(Fake()) == [END, b" hi", b"\n", "é".encode()]
    Fake.get_vocab = lambda self: {"a": 0, "##b": 1}
    with pytest.raises(UserError, match="cross_entropy"):
        token_bytes(Fake())


def test_shared_tokens_have_the_same_text(tokenizer, small):
    shared = VocabularyMap.of(token_bytes(small), token_bytes(tokenizer))
    texts_s, texts_t = token_bytes(small), token_bytes(tokenizer)
    assert len(shared.student_shared_M) > 250
    assert [texts_s[i] for i in shared.student_shared_M] == [texts_t[i] for i in shared.teacher_shared_M]
    assert small.eos_token_id in shared.student_shared_M
    assert len(shared.student_shared_M) + len(shared.student_other) == len(texts_s)
    assert not {texts_s[i] for i in shared.student_other} & set(texts_t) - {b""}


def brute_force(a, b):
    """Spans by walking over every byte position at which both sides have ended a token."""

    def cuts(parts):
        return [len(b"".join(parts[: n + 1])) for n in range(len(parts))]

    both = [c for c in cuts(a) if c in cuts(b)]
    spans, start = [], 0
    for cut in both:
        spans.append(tuple([n for n, c in enumerate(cuts(x)) if start < c <= cut] for x in (a, b)))
        start = cut
    return spans


def test_alignment_equals_a_walk_over_the_bytes(tokenizer, small):
    _, a = pieces(small, TEXT)
    _, b = pieces(tokenizer, TEXT)
    for left, right in ((a, b), (b, a), (a, b[:-3]), ([b"ab", b"c"], [b"a", b"bc", b"d"])):
        got = align(left, right)
        spans = brute_force(left, right)
        assert got.student_start_G.tolist() == [s[0] for s, _ in spans]
        assert got.teacher_start_G.tolist() == [t[0] for _, t in spans]
        for g, (s, t) in enumerate(spans):
            assert np.flatnonzero(got.student_span_T == g).tolist() == s
            assert np.flatnonzero(got.teacher_span_T == g).tolist() == t
    assert len(align(a, b).student_start_G) > 20
    for side in (align(a, b).student_span_T, align(a, b).teacher_span_T):
        assert max(np.bincount(side)) > 1


def test_other_texts_are_refused():
    with pytest.raises(ValueError, match="same text"):
        align([b"ab"], [b"ac"])


# ------------------------------------------------------------------------------------------------ the losses


def rows_of(V, U, T=5, seed=0):
    rng = np.random.default_rng(seed)
    return softmax(rng.normal(size=(T, U)) * 2), softmax(rng.normal(size=(T, V)) * 2)


def numpy_gap(p, q):
    size = max(len(p), len(q))
    p, q = (np.pad(np.sort(x)[::-1], (0, size - len(x))) for x in (p, q))
    return np.abs(p - q).sum()


@pytest.mark.parametrize(("V", "U"), [(7, 7), (31, 12), (3, 47)])
def test_the_sorted_distance_equals_numpy(V, U):
    p, q = rows_of(V, U)
    got = sorted_distance(torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)))
    np.testing.assert_allclose(got.numpy(), [numpy_gap(a, b) for a, b in zip(p, q, strict=True)], atol=1e-12)


def toy_map():
    """Student 6 tokens, teacher 5; three are the same, in another order."""
    return VocabularyMap.of([b"a", b"b", b"c", b"xy", b"z", END], [END, b"c", b"a", b"bc", b"w"])


def numpy_aligned(p, q, sorted_weight):
    P, Q = np.append(p[[2, 1, 0]], p[[3, 4]].sum()), np.append(q[[0, 2, 5]], q[[1, 3, 4]].sum())
    return (P * np.log(P / Q)).sum() + sorted_weight * numpy_gap(p[[3, 4]], q[[1, 3, 4]])


@pytest.mark.parametrize("sorted_weight", [0.0, 0.5])
def test_shared_token_divergence_equals_numpy(sorted_weight):
    p, q = rows_of(6, 5)
    got = shared_token_divergence(
        torch.from_numpy(np.log(p)), torch.from_numpy(np.log(q)), toy_map(), divergences.forward_kl,
        sorted_weight=sorted_weight,
    )  # fmt: skip
    expected = [numpy_aligned(a, b, sorted_weight) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)


def models(T_s, T_t, V, U, seed=1):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return (
        Logits(normal(T_s, 4).requires_grad_(), normal(V, 4).requires_grad_(), HeadForm(V)),
        Logits(normal(T_t, 3), normal(U, 3), HeadForm(U)),
    )


def pair_of(student, teacher, alignment, labels_s, labels_t, weight_G, shared):
    """Return the Pair that the trainer builds from one trace, with weights chosen by the test."""
    found = RetokenizedTrace(np.array([0]), np.array(labels_t), alignment)
    (batch,) = pack([Example("t", np.array([0]), np.array(labels_s), retokenized=found)], micro_tokens=99)
    spans = dataclasses.replace(batch.cross_tokenizer.to_torch(), weight_G=weight_G, denominator=1.0)
    assert spans.batch.label_T[spans.rows].tolist() == list(labels_t)
    return Pair(student, teacher, torch.tensor(labels_s), torch.tensor(labels_t), spans, shared)


def test_the_sorted_distance_through_the_chunks_equals_the_dense_graph():
    student, teacher = models(9, 9, 31, 17)
    weight_T = torch.linspace(0.1, 1, 9, dtype=torch.float64)
    out = compare_rows(
        student, [teacher], sorted_distance, Targets(torch.zeros(9, dtype=torch.long), weight_T), chunk=4
    )
    q = (student.hidden_TD @ student.weight_VD.T).softmax(1)
    p = (teacher.hidden_TD @ teacher.weight_VD.T).softmax(1)
    p = torch.nn.functional.pad(p, (0, 14)).sort(1).values
    dense_T = (p - q.sort(1).values).abs().sum(1)
    torch.testing.assert_close(out.loss_T, dense_T.detach())
    inputs = (student.hidden_TD, student.weight_VD)
    expected = torch.autograd.grad((dense_T * weight_T).sum(), inputs)
    for mine, theirs in zip(torch.autograd.grad(out.loss, inputs), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def whole_aligned_loss(student, teacher, labels_s, labels_t, groups, weight_G, **weights):
    """Student rows -> loss by autograd over dense rows, span by span, in probability space."""
    q = (student.hidden_TD @ student.weight_VD.T).softmax(1)
    p = (teacher.hidden_TD @ teacher.weight_VD.T).softmax(1)
    total = 0
    for (s, t), weight in zip(groups, weight_G, strict=True):
        P = torch.cat([p[t[0], [2, 1, 0]], p[t[0], [3, 4]].sum()[None]])
        Q = torch.cat([q[s[0], [0, 2, 5]], q[s[0], [1, 3, 4]].sum()[None]])
        loss = (P * (P / Q).log()).sum()
        other_p = torch.cat([p[t[0], [3, 4]].sort(descending=True).values, torch.zeros(1)])
        other_q = q[s[0], [1, 3, 4]].sort(descending=True).values
        loss = loss + weights["sorted_weight"] * (other_p - other_q).abs().sum()
        if len(s) > 1 or len(t) > 1:
            yes_p = torch.stack([p[n, labels_t[n]] for n in t]).prod()
            yes_q = torch.stack([q[n, labels_s[n]] for n in s]).prod()
            kl = yes_p * (yes_p / yes_q).log() + (1 - yes_p) * ((1 - yes_p) / (1 - yes_q)).log()
            loss = loss + weights["span_weight"] * kl
        total = total + weight * loss
    return total


@pytest.mark.parametrize("span_weight", [0.0, 0.7])
def test_aligned_spans_through_the_chunks_equal_the_dense_graph(span_weight):
    """One text, "abcac" and its end, where "bc" is one token of the teacher and two of the student."""
    student_parts = [b"a", b"b", b"c", b"a", b"c", END]
    teacher_parts = [b"a", b"bc", b"a", b"c", END]
    labels_s, labels_t = [0, 1, 2, 0, 2, 5], [2, 3, 2, 1, 0]
    student, teacher = models(6, 5, 6, 5)
    found = align(student_parts, teacher_parts)
    groups = brute_force(student_parts, teacher_parts)
    weight_G = torch.linspace(0.2, 1, len(groups), dtype=torch.float64)
    pair = pair_of(student, teacher, found, labels_s, labels_t, weight_G, toy_map())
    out = aligned(pair, sorted_weight=0.5, span_weight=span_weight)
    gaps = uld(pair).loss_T.numpy()
    q, p = (softmax((m.hidden_TD @ m.weight_VD.T).detach().numpy()) for m in (student, teacher))
    by_hand = [numpy_gap(p[t[0]], q[s[0]]) for s, t in groups]
    np.testing.assert_allclose(gaps, by_hand, atol=1e-12)
    expected = whole_aligned_loss(
        student, teacher, labels_s, labels_t, groups, weight_G, sorted_weight=0.5, span_weight=span_weight
    )  # fmt: skip
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close((out.loss_T * weight_G).sum(), expected)
    inputs = (student.hidden_TD, student.weight_VD)
    theirs = torch.autograd.grad(expected, inputs)
    for mine, other in zip(torch.autograd.grad(out.loss, inputs), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


def test_a_student_with_the_teachers_tokenizer_and_weights_is_left_alone(tokenizer):
    """Every token aligned and shared: the loss is the plain divergence, zero here."""
    _, parts = pieces(tokenizer, TEXT)
    table = [b"a", b"b", END]
    student, _ = models(4, 4, 3, 3)
    found = align([b"a", b"b", b"a", END], [b"a", b"b", b"a", END])
    labels = [0, 1, 0, 2]
    same = Logits(student.hidden_TD.detach(), student.weight_VD.detach(), HeadForm(3))
    weight_G = torch.ones(4, dtype=torch.float64)
    pair = pair_of(student, same, found, labels, labels, weight_G, VocabularyMap.of(table, table))
    out = aligned(pair, divergence="jsd")
    assert len(align(parts, parts).student_start_G) == len(parts)
    assert out.loss.abs() < 1e-12
    for grad in torch.autograd.grad(out.loss, (student.hidden_TD, student.weight_VD)):
        assert grad.abs().max() < 1e-12


def test_real_vocabularies_and_text_lower_the_loss_by_its_own_gradient(tokenizer, small):
    """SmolLM2's 49152 tokens as the teacher's: one small step against the gradient lowers the loss by its norm squared."""
    ids_s, parts_s = pieces(small, TEXT)
    ids_t, parts_t = pieces(tokenizer, TEXT)
    student, teacher = models(len(ids_s), len(ids_t), len(small), len(tokenizer))
    found = align(parts_s, parts_t)
    shared = VocabularyMap.of(token_bytes(small), token_bytes(tokenizer))
    weight_G = torch.full((len(found.student_start_G),), 1 / len(found.student_start_G)).double()
    pair = pair_of(student, teacher, found, ids_s, ids_t, weight_G, shared)
    before = aligned(pair).loss
    grad_h, grad_w = torch.autograd.grad(before, (student.hidden_TD, student.weight_VD))
    size = 1e-5
    moved = Logits(student.hidden_TD.detach() - size * grad_h, student.weight_VD.detach() - size * grad_w, student.form)  # fmt: skip
    after = aligned(dataclasses.replace(pair, student=moved)).loss
    slope = (before - after).item() / size
    assert slope == pytest.approx((grad_h.square().sum() + grad_w.square().sum()).item(), rel=1e-3)


# ----------------------------------------------------------------------------------------- re-tokenising and packing


PLAIN = Template(name="plain", system=None, plain="Q: {question}\nA: ", extract=str, chat=False)
QUESTION = [{"role": "user", "content": "how much?"}]


def test_sampled_ids_are_retokenized_for_any_tokenization(tokenizer, small, mistral):
    """Also for ids that no encoder produces: the text is equal, and it has an end only if the student's has."""
    single = [tokenizer.convert_tokens_to_ids(c) for c in "3+4=7"]
    for other in (small, mistral):
        read = Retokenizer(tokenizer, other, PLAIN)
        for ids in ([*single, tokenizer.eos_token_id], single, ids_of(tokenizer, TEXT)):
            found = read(QUESTION, np.array(ids))
            ended = ids[-1] == tokenizer.eos_token_id
            assert (found.completion_ids[-1] == other.eos_token_id) == ended
            assert other.decode(found.completion_ids, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)  # fmt: skip
            assert other.decode(found.prompt_ids) == "Q: how much?\nA: "
            assert len(found.alignment.student_span_T) == len(ids)
            assert (found.alignment.student_span_T >= 0).all()
            assert (found.alignment.teacher_span_T >= 0).all()


CHAT = Template(name="chat", system=None, plain="{question}", extract=str)
REASONED = "<think>\nthree and four\n</think>\n\nIt is 7."


def templated(folder, chat_template, eos, *tokens):
    """SmolLM2's tokenizer with another chat template, end and added tokens."""
    made = AutoTokenizer.from_pretrained(folder)
    made.add_special_tokens({"additional_special_tokens": [eos]})
    made.add_tokens(list(tokens))
    made.chat_template, made.eos_token = chat_template, eos
    return made


@pytest.fixture(scope="module")
def qwen_like(smollm2_dir):
    """A base model's: turns end with <|im_end|>, and the EOS is another token."""
    turns = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return templated(
        smollm2_dir, turns + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", "<|endoftext|>"
    )


@pytest.fixture(scope="module")
def r1_like(smollm2_dir):
    """One that writes <think>, a token, into the prompt, as R1's distilled models do."""
    turns = (
        "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}{% else %}<A>{{ m.content.split('</think>')[-1] }}"
        "<E>{% endif %}{% endfor %}{% if add_generation_prompt %}<A><think>\n{% endif %}"
    )
    return templated(smollm2_dir, turns, "<E>", "<U>", "<A>", "<think>", "</think>")


def test_reasoning_that_one_prompt_opens_is_opened_once_for_the_teacher(qwen_like, r1_like):
    for student, teacher, beginning in ((qwen_like, r1_like, "<U>how much?<A>"), (r1_like, qwen_like, None)):
        ids = render_reply(student, CHAT, QUESTION, {"content": REASONED})
        found = Retokenizer(student, teacher, CHAT)(QUESTION, ids)
        read = teacher.decode([*found.prompt_ids, *found.completion_ids])
        assert (read.count("<think>"), read.count("</think>")) == (1, 1), read
        assert REASONED in read
        assert beginning is None or read.startswith(f"{beginning}<think>\n")


def test_a_reply_without_reasoning_keeps_the_teachers_prompt(qwen_like, r1_like):
    ids = render_reply(qwen_like, CHAT, QUESTION, {"content": "It is 7."})
    found = Retokenizer(qwen_like, r1_like, CHAT)(QUESTION, ids)
    assert np.array_equal(found.prompt_ids, render_prompt(r1_like, CHAT, QUESTION))


def test_the_ends_of_both_turns_correspond_where_a_turn_ends_with_another_token_than_the_eos(qwen_like, r1_like):
    """One span of its own, and one pair of the vocabulary map; a sampled EOS ends the teacher's reading too."""
    turn, eos = qwen_like.convert_tokens_to_ids("<|im_end|>"), qwen_like.eos_token_id
    ids = render_reply(qwen_like, CHAT, QUESTION, {"content": REASONED})
    assert ids[-1] == turn != eos
    read = Retokenizer(qwen_like, r1_like, CHAT)
    for last in (turn, eos):
        found = read(QUESTION, np.append(ids[:-1], last))
        assert found.completion_ids[-1] == r1_like.eos_token_id
        for spans in (found.alignment.student_span_T, found.alignment.teacher_span_T):
            assert spans[-1] == spans[-2] + 1 == found.alignment.num_spans - 1
    shared = VocabularyMap.of_tokenizers(qwen_like, len(qwen_like), r1_like, len(r1_like), CHAT)
    pairs = dict(zip(shared.teacher_shared_M.tolist(), shared.student_shared_M.tolist(), strict=True))
    assert pairs[r1_like.eos_token_id] == turn
    assert eos in shared.student_other


def test_the_leading_space_of_sentencepiece_is_not_part_of_the_text(tokenizer, mistral):
    ids = [
        *mistral("3 + 4 = 7 wie schön", add_special_tokens=False)["input_ids"],
        mistral.eos_token_id,
    ]
    assert token_bytes(mistral)[ids[0]][:1] == b" "
    found = Retokenizer(mistral, tokenizer, PLAIN)(QUESTION, np.array(ids))
    assert tokenizer.decode(found.completion_ids, skip_special_tokens=True) == "3 + 4 = 7 wie schön"


def test_a_completion_cut_inside_a_character_is_not_retokenized(tokenizer, small):
    ids = ids_of(tokenizer, TEXT)
    cut = next(ids[:n] for n in range(1, len(ids)) if "\ufffd" in tokenizer.decode(ids[:n]))
    assert Retokenizer(tokenizer, small, PLAIN)(QUESTION, np.array(cut)) is None


@pytest.mark.parametrize("normalise", ["token", "sequence"])
def test_retokenized_traces_are_packed_with_their_batch_whatever_the_split(tokenizer, small, normalise):
    """Every span of every trace once, between the same texts, with the same weight, however the step is split."""
    texts = ["3+4=7", "naïve sum", "12345 and 678", "a", "première réponse"]
    read = Retokenizer(tokenizer, small, PLAIN)
    texts_s, texts_t = token_bytes(tokenizer), token_bytes(small)
    prompt = tokenizer("Q: ", add_special_tokens=False)["input_ids"]
    examples = []
    for n, text in enumerate(texts):
        ids = np.array(ids_of(tokenizer, text))
        examples.append(Example(str(n), np.array(prompt), ids, retokenized=read(QUESTION, ids)))
    found = []
    for micro_tokens in (8, 25, 999):
        spans = {}
        for batch in pack(examples, micro_tokens=micro_tokens, normalise=normalise):
            beside, rows = batch.cross_tokenizer, batch.weight_T.nonzero()[0]
            for g, weight in enumerate(beside.weight_G / beside.denominator):
                starts = [
                    ids_T[row] for ids_T, row in (
                        (batch.label_T, rows[beside.student_start_G[g]]),
                        (beside.batch.label_T, beside.rows[beside.teacher_start_G[g]]),
                    )
                ]  # fmt: skip
                a, b = texts_s[starts[0]], texts_t[starts[1]]
                assert a.startswith(b) or b.startswith(a)
                spans.setdefault((a, b), []).append(round(float(weight), 6))
            for rows_M, span_M, starts_G in (
                (beside.student_piece_M, beside.student_span_M, beside.student_start_G),
                (beside.teacher_piece_N, beside.teacher_span_N, beside.teacher_start_G),
            ):
                assert beside.split_G[span_M].all()
                assert set(span_M) == set(np.flatnonzero(beside.split_G))
                assert (rows_M >= starts_G[span_M]).all()
        found.append({key: sorted(weights) for key, weights in spans.items()})
        assert sum(map(sum, spans.values())) == pytest.approx(1.0, abs=1e-4)
    assert found[0] == found[1] == found[2]
