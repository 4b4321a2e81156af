"""The real vLLM on the real small model, held against transformers on the same tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import engines, models
from distill.engines.transformers import TransformersEngine
from distill.recipe import EngineConfig
from distill.records import Array, Completion, Request, Sampling

pytestmark = pytest.mark.slow

SAMPLING = Sampling(temperature=1.0, max_tokens=24)
QUESTIONS = [
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What is 17 + 25?",
    "Name three colours.",
    "Why is the sky blue?",
    "Translate 'good morning' to Spanish.",
]


def requests(tokenizer, number: int) -> list[Request]:
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        for question in QUESTIONS
    ]
    return [Request(f"r{n}", np.asarray(prompts[n % len(prompts)], np.int32), seed=n) for n in range(number)]


def to_score(asked: Iterable[Request], written: Iterable[Completion]) -> list[Request]:
    by_id = {request.request_id: request for request in asked}
    return [Request(c.request_id, by_id[c.request_id].prompt_ids, completion_ids=c.ids_T) for c in written]


def differences(left: list[Completion], right: list[Completion]) -> tuple[Array, Array]:
    """|difference| of the tokens' log-probs, and of the candidates that both sides kept."""
    tokens, candidates = [], []
    for a, b in zip(left, right, strict=True):
        assert a.request_id == b.request_id
        np.testing.assert_array_equal(a.ids_T, b.ids_T)
        tokens.append(np.abs(a.logprob_T - b.logprob_T))
        (ids_a, logp_a), (ids_b, logp_b) = a.top.dense(), b.top.dense()
        same = ids_a[:, :, None] == ids_b[:, None, :]
        candidates.append(np.abs(logp_a[:, :, None] - logp_b[:, None, :])[same])
    return np.concatenate(tokens), np.concatenate(candidates)


def show(label: str, tokens: Array, candidates: Array) -> None:
    print(
        f"\n{label}: tokens mean {tokens.mean():.2e} worst {tokens.max():.2e} nat; "
        f"candidates mean {candidates.mean():.2e} worst {candidates.max():.2e} nat ({len(candidates)})"
    )


@pytest.fixture(scope="module")
def asked(tokenizer) -> list[Request]:
    return requests(tokenizer, 48)


@pytest.fixture(scope="module")
def written(vllm_engine, asked) -> list[Completion]:
    return list(vllm_engine.generate(asked, SAMPLING, top_k=64))


@pytest.fixture(scope="module")
def trainer(smollm2_dir: Path) -> TransformersEngine:
    return TransformersEngine(smollm2_dir, max_model_len=512)


def test_completions_are_whole(vllm_engine, asked, written):
    assert {c.request_id for c in written} == {r.request_id for r in asked}
    assert {c.finish_reason for c in written} == {"stop", "length"}
    for done in written:
        assert len(done.ids_T) == len(done.logprob_T) == len(done.top) <= SAMPLING.max_tokens
        assert (done.finish_reason == "stop") == (done.ids_T[-1] == 2)
        assert 2 not in done.ids_T[:-1]
        assert (done.top.count_T == 64).all()
        ids_TK, logp_TK = done.top.dense()
        assert (np.diff(logp_TK, axis=1) <= 0).all()
        assert all(len(set(row)) == 64 for row in ids_TK.tolist())
        total_T = np.exp(logp_TK.astype(float)).sum(1) + np.exp(done.top.tail_T.astype(float))
        # The engine's log-softmax over 49,152 tokens is a sum in float32.
        np.testing.assert_allclose(total_T, 1.0, atol=5e-5)
        inside = ids_TK == done.ids_T[:, None]
        np.testing.assert_array_equal(logp_TK[inside], done.logprob_T[inside.any(1)])


def test_transformers_gives_the_traces_the_same_log_probabilities(asked, written, trainer):
    """Open-ended text at temperature 1 is the worst case: bfloat16 activations alone differ by 0.03 nat there.

    (As much as transformers differs from itself in float32, or when it takes the same trace in other chunks.)
    So there is a bound for all tokens, one for those the model is sure of, and one for the bias.
    """
    some = written[:16]
    again = list(trainer.score(to_score(asked, some), top_k=64))
    tokens, candidates = differences(some, again)
    sure = np.concatenate([c.logprob_T for c in some]) > np.log(0.9)
    bias = np.concatenate([a.logprob_T - b.logprob_T for a, b in zip(some, again, strict=True)])
    show("vLLM against transformers", tokens, candidates)
    print(f"sure tokens: mean {tokens[sure].mean():.2e} worst {tokens[sure].max():.2e} ({sure.sum()})")
    print(f"bias {bias.mean():+.2e}")
    assert tokens.mean() <= 5e-2
    assert sure.sum() >= 20
    assert tokens[sure].mean() <= 1e-2
    assert abs(bias.mean()) <= 1e-2


def test_its_own_scores_are_those_of_generation(vllm_engine, asked, written):
    scored = list(vllm_engine.score(to_score(asked, written), top_k=64))
    assert [c.request_id for c in scored] == [c.request_id for c in written]
    tokens, candidates = differences(written, scored)
    show("vLLM generation against its own scores", tokens, candidates)
    assert tokens.mean() <= 5e-2


def test_the_same_seed_alone_in_a_batch_draws_the_same(vllm_engine, asked):
    first, again = [next(vllm_engine.generate([asked[1]], SAMPLING)) for _ in range(2)]
    assert first.ids_T.tolist() == again.ids_T.tolist()
    assert first.top is None
    other = Request("other", asked[1].prompt_ids, seed=99)
    (different,) = vllm_engine.generate([other], SAMPLING)
    assert different.ids_T.tolist() != first.ids_T.tolist()


def test_seeds_survive_other_company(vllm_engine, asked, written):
    """Batches change the sums a little, so a few draws may differ; most completions must not."""
    by_id = {c.request_id: c.ids_T.tolist() for c in written}
    backwards = vllm_engine.generate(asked[::-1], SAMPLING)
    same = [by_id[c.request_id] == c.ids_T.tolist() for c in backwards]
    print(f"\n{sum(same)} of {len(same)} completions the same in another order")
    assert sum(same) > len(same) / 2


def test_completions_stream_while_requests_are_still_drawn(vllm_engine, tokenizer):
    many = requests(tokenizer, 100)
    drawn, finished = 0, 0

    def source() -> Iterator[Request]:
        nonlocal drawn
        for request in many:
            drawn += 1
            yield request

    for _ in vllm_engine.generate(source(), Sampling(max_tokens=3)):
        finished += 1
        assert drawn - finished <= 2 * 32
    assert finished == len(many)


def test_leaving_early_leaves_nothing_behind(vllm_engine, asked):
    stream = vllm_engine.generate(asked, SAMPLING)
    next(stream)
    stream.close()
    assert len(list(vllm_engine.generate(asked[:2], Sampling(max_tokens=2)))) == 2


def test_greedy_is_greedy(vllm_engine, asked):
    for done in vllm_engine.generate(asked[:4], Sampling(0.0, 1.0, 8), top_k=1):
        np.testing.assert_array_equal(done.ids_T, done.top.ids_E)


def test_log_probabilities_are_raw_at_any_temperature(vllm_engine, asked):
    warm, cold = Sampling(1.0, 1.0, 1), Sampling(0.3, 0.5, 1)
    one = next(vllm_engine.generate(asked[:1], warm, top_k=16))
    two = next(vllm_engine.generate(asked[:1], cold, top_k=16))
    np.testing.assert_allclose(one.top.logp_E, two.top.logp_E, atol=1e-6)


def test_what_does_not_fit_is_refused_by_name(vllm_engine, asked):
    with pytest.raises(ValueError, match=r"'long'.*512"):
        list(vllm_engine.generate([asked[0], Request("long", np.full(512, 500))], SAMPLING))
    with pytest.raises(ValueError, match="top_k up to 64"):
        list(vllm_engine.generate(asked[:1], SAMPLING, top_k=65))
    assert len(list(vllm_engine.generate(asked[:2], Sampling(max_tokens=2)))) == 2


def test_the_process_keeps_its_own_random_state(vllm_engine, asked):
    state = torch.get_rng_state()
    list(vllm_engine.generate(asked[:4], Sampling(max_tokens=4)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.fixture
def changed(smollm2_dir: Path, vllm_engine):
    """A trainer whose weights have moved, embedding included; the engine gets its old weights back."""
    engine = TransformersEngine(smollm2_dir, max_model_len=512)
    old = {name: p.detach().clone() for name, p in engine._model.named_parameters()}
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in engine._model.parameters():
            parameter.mul_(1 + 0.03 * torch.randn_like(parameter))
    yield engine
    vllm_engine.sync(old.items(), version=0)


def test_after_a_sync_the_engine_is_the_trainer(vllm_engine, changed, asked, written):
    vllm_engine.sync(changed._model.named_parameters(), version=5)
    fresh = list(vllm_engine.generate(asked[:8], SAMPLING, top_k=64))
    assert {c.version for c in fresh} == {5}
    again = list(changed.score(to_score(asked, fresh), top_k=64))
    tokens, candidates = differences(fresh, again)
    show("after a sync, engine against trainer", tokens, candidates)
    assert tokens.mean() <= 5e-2
    some = written[:8]
    moved, _ = differences(some, list(changed.score(to_score(asked, some), top_k=64)))
    assert moved.mean() > 5 * tokens.mean(), "the weights must move for this to say anything"


@pytest.fixture
def library_head(vllm_engine):
    """The library's own output head in place of the float32 one: the one that keeps a packed copy."""
    processors = vllm_engine._llm.apply_model(lambda model: model.logits_processor)
    ours = [processor.__dict__.pop("_apply_head", None) for processor in processors]
    if None in ours:
        pytest.skip("an engine in float32 has the library's head anyway")
    for processor in processors:
        processor.head_dtype = torch.bfloat16
    yield
    for processor, apply in zip(processors, ours, strict=True):
        processor._apply_head = apply


def test_without_the_explicit_head_the_head_stays_old(vllm_engine, changed, asked, library_head):
    """The reason for the explicit lm_head in `sync`. Where the first half fails, the library has mended it."""
    from distill.engines import vllm_weights

    pairs = [(name, p.detach()) for name, p in changed._model.named_parameters()]
    means = []
    for explicit in (False, True):
        if explicit:
            vllm_engine.sync(pairs, version=7)
        else:
            vllm_weights.reload(vllm_engine._llm, iter(pairs), ignore=("ParallelLMHead",))
            vllm_engine._llm.reset_prefix_cache()
        fresh = list(vllm_engine.generate(asked[:6], SAMPLING, top_k=64))
        again = list(changed.score(to_score(asked, fresh), top_k=64))
        tokens, candidates = differences(fresh, again)
        show(f"library head, explicit in the sync: {explicit}", tokens, candidates)
        means.append(tokens.mean())
    assert means[0] > 0.1
    assert means[1] <= 6e-2


def test_weights_that_reach_no_layer_are_an_error(vllm_engine, changed):
    pairs = [(n, p) for n, p in changed._model.named_parameters() if "norm" not in n]
    with pytest.raises(ValueError, match="RMSNorm"):
        vllm_engine.sync(pairs, version=6)
    assert vllm_engine.version == 0
    with pytest.raises(ValueError, match="embedding"):
        vllm_engine.sync([("model.norm.weight", torch.ones(576))], version=6)


def test_weights_do_not_change_under_running_requests(vllm_engine, asked):
    stream = vllm_engine.generate(asked, SAMPLING)
    next(stream)
    with pytest.raises(RuntimeError, match="in flight"):
        vllm_engine.sync([], version=1)
    stream.close()


@pytest.fixture(scope="module")
def padded(tiny_dir: Path, tmp_path_factory, tokenizer):
    """A second engine in the process: float32, on a tiny model whose head has loud rows past the tokenizer."""
    model = models.load(tiny_dir, dtype="float32")
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[len(tokenizer) :] = 5.0
    folder = tmp_path_factory.mktemp("padded")
    models.save(model, tokenizer, folder)
    config = EngineConfig(fn="vllm", dtype="float32", batch_size=4, kv_cache_gib=0.1)
    return engines.open_engine(config, folder, max_model_len=128, max_top_k=8)


@pytest.fixture(scope="module")
def unpadded(tiny_dir: Path) -> TransformersEngine:
    return TransformersEngine(tiny_dir, max_model_len=128, dtype="float32")


def test_in_float32_the_engines_agree_and_padding_has_no_probability(padded, unpadded):
    assert padded.vocab_size == unpadded.vocab_size
    asked = [Request(f"p{n}", np.array([400, 500, 600 + n]), seed=n) for n in range(8)]
    fresh = list(padded.generate(asked, Sampling(max_tokens=8), top_k=8))
    tokens, candidates = differences(fresh, list(unpadded.score(to_score(asked, fresh), top_k=8)))
    show("float32 vLLM, padded head, against transformers without padding", tokens, candidates)
    assert max(tokens.max(), candidates.max()) < 1e-3


def test_a_trace_scored_in_chunks_is_scored_the_same(padded, unpadded, monkeypatch):
    from distill.engines import vllm

    given = np.random.default_rng(0).integers(100, 40000, 123)
    request = Request("long", np.array([400, 500, 600, 700, 800]), completion_ids=given)
    (want,) = unpadded.score([request], top_k=4)
    (whole,) = padded.score([request], top_k=4)
    monkeypatch.setattr(vllm, "SCORE_TOKENS", 48)
    chunks, again = padded.score([request, request], top_k=4)
    for got in (whole, chunks, again):
        tokens, candidates = differences([want], [got])
        assert max(tokens.max(), candidates.max()) < 1e-3


def test_draws_from_the_tail_have_its_probabilities(vllm_engine, tokenizer, smollm2_dir):
    """Generated and scored, pooled over many seeds: chi-square over 12 ranges of rank, against transformers' own distribution."""
    top_k, num = 8, 16
    prompt = requests(tokenizer, 1)[0].prompt_ids
    asked = [Request(f"r{n}", prompt, seed=7 * n + 1, tail_draws=num) for n in range(64)]
    one, few = Sampling(temperature=1.0, max_tokens=1), Sampling(temperature=1.0, max_tokens=6)
    written = {c.request_id: c for c in vllm_engine.generate(asked, one, top_k=top_k)}
    plain = {c.request_id: c for c in vllm_engine.generate(requests(tokenizer, 6), few, top_k=top_k)}
    again = {
        c.request_id: c
        for c in vllm_engine.generate(
            [dataclasses.replace(r, tail_draws=num) for r in requests(tokenizer, 6)], few, top_k=top_k
        )
    }
    for name, completion in plain.items():
        np.testing.assert_array_equal(completion.ids_T, again[name].ids_T)
        assert again[name].beyond.ids_TN.shape == (len(completion.ids_T), num)
    scored = list(
        vllm_engine.score(
            [Request(r.request_id, prompt, r.seed + 1000, written[r.request_id].ids_T, tail_draws=num) for r in asked],
            top_k=top_k,
        )
    )
    model = models.load(smollm2_dir, dtype="float32").eval()
    with torch.no_grad():
        logits_V = model(torch.tensor(prompt, dtype=torch.long)[None]).logits[0, -1]
    logp_V = logits_V[: vllm_engine.vocab_size].double().log_softmax(0).numpy()
    for completions in (list(written.values()), scored):
        top = completions[0].top
        p_V = np.exp(logp_V)
        p_V[top.ids_E] = 0
        np.testing.assert_allclose(top.tail_T, np.log(p_V.sum()), atol=0.05)
        drawn = np.concatenate([c.beyond.ids_TN[0] for c in completions])
        assert drawn.shape == (64 * num,)
        assert len({c.beyond.ids_TN[0].tobytes() for c in completions}) > 60
        assert not np.isin(drawn, top.ids_E).any()
        # Twelve ranges of nearly equal mass, by rank.
        order = np.argsort(-p_V)
        ranges = np.empty(len(p_V), int)
        ranges[order] = np.minimum((np.cumsum(p_V[order]) / p_V.sum() * 12).astype(int), 11)
        expected = np.bincount(ranges, p_V / p_V.sum() * len(drawn), minlength=12)
        chi_square = ((np.bincount(ranges[drawn], minlength=12) - expected) ** 2 / np.maximum(expected, 1)).sum()
        assert chi_square < 31.3  # 11 degrees of freedom: one in a thousand
