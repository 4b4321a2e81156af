"""The transformers and reference engines on a tiny random model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from distill import engines, models
from distill.recipe import EngineConfig
from distill.records import Completion, Request, Sampling, UserError

SAMPLING = Sampling(temperature=1.0, max_tokens=12)


def start(folder: Path, fn: str = "reference", **options) -> engines.Engine:
    config = EngineConfig(fn=fn, dtype="float32", **options)
    return engines.open_engine(config, folder, max_model_len=128, max_top_k=64)


def requests(number: int, seed: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(f"r{n}", rng.integers(100, 40000, 5 + n % 7).astype(np.int32), seed=1000 + n) for n in range(number)
    ]


def content(completion: Completion) -> bytes:
    top = completion.top
    parts = [completion.ids_T, completion.logprob_T]
    if top is not None:
        parts += [top.count_T, top.ids_E, top.logp_E, top.tail_T]
    return b"|".join(part.tobytes() for part in parts)


@pytest.fixture(scope="module")
def reference(tiny_dir: Path):
    return start(tiny_dir)


@pytest.fixture(scope="module")
def batched(tiny_dir: Path):
    return start(tiny_dir, "transformers", batch_size=4)


def test_reference_results_do_not_depend_on_other_requests(reference):
    asked = requests(6)
    together = {c.request_id: content(c) for c in reference.generate(asked, SAMPLING, top_k=8)}
    backwards = {c.request_id: content(c) for c in reference.generate(asked[::-1], SAMPLING, top_k=8)}
    (alone,) = reference.generate([asked[3]], SAMPLING, top_k=8)
    assert together == backwards
    assert together["r3"] == content(alone)


def test_batched_decoding_samples_the_references_tokens(reference, batched):
    asked = requests(10)
    expected = {c.request_id: c for c in reference.generate(asked, SAMPLING, top_k=8)}
    got = {c.request_id: c for c in batched.generate(asked, SAMPLING, top_k=8)}
    assert expected.keys() == got.keys()
    for key, want in expected.items():
        np.testing.assert_array_equal(got[key].ids_T, want.ids_T)
        np.testing.assert_allclose(got[key].logprob_T, want.logprob_T, atol=1e-4)
        np.testing.assert_array_equal(got[key].top.ids_E, want.top.ids_E)


def uneven(number: int) -> list[Request]:
    """Prompts with a common prefix of 30 tokens, each requested twice, with room for 1 to 48 tokens."""
    rng = np.random.default_rng(7)
    common = rng.integers(100, 40000, 30)
    prompts = [np.concatenate([common, rng.integers(100, 40000, 50 + n * 29 % 48)]) for n in range(number)]
    return [Request(f"r{n}", prompts[n // 2].astype(np.int32), seed=n) for n in range(2 * number)]


def test_rows_that_join_a_running_batch_equal_single_ones(reference, batched, monkeypatch):
    """Rows end and others join at different lengths; every completion equals the reference's."""
    from distill.engines.kv_cache import GrowingCache

    joins: list[int] = []
    join = GrowingCache.join
    monkeypatch.setattr(
        GrowingCache,
        "join",
        lambda self, other, skip: (joins.append(skip), join(self, other, skip)),
    )
    asked, sampling = uneven(8), Sampling(max_tokens=64)
    expected = {c.request_id: c for c in reference.generate(asked, sampling, top_k=4)}
    assert not joins
    got = {c.request_id: c for c in batched.generate(asked, sampling, top_k=4)}
    assert len(joins) >= 3
    assert max(joins) > 0
    assert got.keys() == expected.keys()
    assert len({len(c.ids_T) for c in expected.values()}) > 4
    for key, want in expected.items():
        np.testing.assert_array_equal(got[key].ids_T, want.ids_T)
        np.testing.assert_allclose(got[key].logprob_T, want.logprob_T, atol=1e-4)


def test_a_common_prefix_is_computed_once(tiny_dir):
    engine = start(tiny_dir, "transformers", batch_size=16)
    asked = uneven(8)
    fed = []
    forward = engine._forward
    engine._forward = lambda ids, *rest: (fed.append(ids.numel()), forward(ids, *rest))[1]
    assert len(list(engine.generate(asked, Sampling(max_tokens=1)))) == 16
    longest = max(len(request.prompt_ids) for request in asked)
    # The common prefix once, then the rest of each of the eight prompts, padded to the longest.
    assert fed == [30, 8 * (longest - 30)]


@pytest.mark.parametrize("sampling", [SAMPLING, Sampling(0.7, 0.8, 12), Sampling(0.0, 1.0, 12)])
def test_scores_are_the_log_probabilities_of_generation(reference, monkeypatch, sampling):
    from distill.engines import transformers

    monkeypatch.setattr(transformers, "CHUNK", 5)
    asked = requests(4)
    written = list(reference.generate(asked, sampling, top_k=8))
    again = [Request(r.request_id, r.prompt_ids, completion_ids=c.ids_T) for r, c in zip(asked, written, strict=True)]
    for want, got in zip(written, reference.score(again, top_k=8), strict=True):
        assert got.request_id == want.request_id
        np.testing.assert_array_equal(got.ids_T, want.ids_T)
        np.testing.assert_allclose(got.logprob_T, want.logprob_T, atol=1e-4)
        np.testing.assert_allclose(got.top.logp_E, want.top.logp_E, atol=1e-4)
        assert got.finish_reason == want.finish_reason


def test_completions_scored_together_equal_single_ones(reference, tiny_dir, monkeypatch):
    """In the order of the requests, with several lengths, with and without a long one in between."""
    from distill.engines import transformers

    monkeypatch.setattr(transformers, "SCORED", 40)
    engine = start(tiny_dir, "transformers", batch_size=16)
    sizes = []
    together = engine._score_group
    monkeypatch.setattr(engine, "_score_group", lambda group, k: (sizes.append(len(group)), together(group, k))[1])
    rng = np.random.default_rng(3)
    asked = [
        Request(r.request_id, r.prompt_ids[:60], completion_ids=rng.integers(100, 40000, length))
        for r, length in zip(uneven(4), (3, 9, 1, 50, 7, 7, 2, 5), strict=True)
    ]
    got = list(engine.score(asked, top_k=8))
    assert [c.request_id for c in got] == [r.request_id for r in asked]
    # 3 x 9 fit into 40, the 50 is alone, 4 x 7 fit.
    assert sizes == [3, 1, 4]
    for one, want in zip(got, reference.score(asked, top_k=8), strict=True):
        np.testing.assert_array_equal(one.ids_T, want.ids_T)
        np.testing.assert_allclose(one.logprob_T, want.logprob_T, atol=1e-4)
        np.testing.assert_array_equal(one.top.ids_E, want.top.ids_E)


def test_rows_are_the_models_own_distribution(reference, tiny_dir):
    model = models.load(tiny_dir, dtype="float32")
    (request,) = requests(1)
    (done,) = reference.generate([request], SAMPLING, top_k=8)
    ids = torch.tensor(np.concatenate([request.prompt_ids, done.ids_T]), dtype=torch.long)[None]
    logp_TV = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].double().log_softmax(-1)
    sampled_T = logp_TV.gather(1, torch.tensor(done.ids_T, dtype=torch.long)[:, None])[:, 0]
    np.testing.assert_allclose(done.logprob_T, sampled_T.detach().numpy(), atol=1e-4)
    ids_TK, kept_TK = done.top.dense()
    np.testing.assert_array_equal(ids_TK, logp_TV.topk(8).indices.numpy())
    total_T = np.exp(kept_TK.astype(float)).sum(1) + np.exp(done.top.tail_T.astype(float))
    np.testing.assert_allclose(total_T, 1.0, atol=1e-6)


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.4, 0.3, 0.2, 0.1]),
        (0.5, 1.0, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
        (1.0, 0.65, [4 / 7, 3 / 7, 0, 0]),
        (1.0, 0.71, [4 / 9, 3 / 9, 2 / 9, 0]),
        (0.5, 0.5, [1, 0, 0, 0]),
    ],
)
def test_draws_follow_the_distribution(temperature, top_p, expected):
    """Against hand-computed probabilities; top-p keeps the fewest most probable tokens that reach its mass."""
    from distill.engines.transformers import _draw

    number = 20000
    logits_BV = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(number, 4)
    generators = [torch.Generator().manual_seed(seed) for seed in range(number)]
    drawn = _draw(logits_BV, Sampling(temperature, top_p), generators).bincount(minlength=4)
    observed = drawn[[1, 3, 2, 0]].double().numpy() / number
    assert np.abs(observed - expected).max() < 4 * np.sqrt(0.25 / number)
    assert not observed[np.asarray(expected) == 0].any()


def test_seeds_decide_the_draws(reference):
    request = requests(1)[0]
    other = Request("other", request.prompt_ids, seed=7)
    first, again, different = [
        next(reference.generate([r], SAMPLING)).ids_T.tolist() for r in (request, request, other)
    ]
    assert first == again != different


def test_greedy_chooses_the_most_probable(batched):
    for done in batched.generate(requests(4), Sampling(0.0, 1.0, 6), top_k=1):
        np.testing.assert_array_equal(done.ids_T, done.top.ids_E)


def with_stop_ids(folder: Path, target: Path, ids: list[int]) -> Path:
    shutil.copytree(folder, target)
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return target


@pytest.mark.fault(12)
def test_first_of_several_stop_ids_ends_and_is_kept(reference, tiny_dir, tmp_path):
    asked = requests(6)
    free = {c.request_id: c.ids_T.tolist() for c in reference.generate(asked, SAMPLING)}
    assert all(len(ids) == SAMPLING.max_tokens for ids in free.values())
    stops = [free["r0"][3], free["r1"][5]]
    engine = start(with_stop_ids(tiny_dir, tmp_path / "m", stops), "transformers", batch_size=3)
    for done in engine.generate(asked, SAMPLING):
        ids = free[done.request_id]
        end = next((n + 1 for n, token in enumerate(ids) if token in stops), None)
        assert done.ids_T.tolist() == ids[:end]
        assert done.finish_reason == ("stop" if end else "length")


def test_the_context_ends_a_completion_and_a_prompt_that_fills_it_is_refused(reference):
    (done,) = reference.generate([Request("fits", np.full(120, 500))], Sampling(max_tokens=99))
    assert len(done.ids_T) == 8
    assert done.finish_reason == "length"
    with pytest.raises(ValueError, match=r"'long'.*128"):
        list(reference.generate([Request("long", np.full(128, 500))], SAMPLING))
    with pytest.raises(ValueError, match="'empty'"):
        list(reference.generate([Request("empty", np.empty(0, np.int32))], SAMPLING))
    with pytest.raises(ValueError, match=r"'none'.*score"):
        list(reference.score([Request("none", np.full(3, 500))]))


def test_requests_are_drawn_as_they_are_needed(batched):
    drawn = 0

    def source():
        nonlocal drawn
        for request in requests(40):
            drawn += 1
            yield request

    finished = 0
    for _ in batched.generate(source(), Sampling(max_tokens=2)):
        finished += 1
        assert drawn - finished < 2 * 4
    assert finished == 40


def test_new_weights_change_the_output_and_the_version(tiny_dir):
    engine = start(tiny_dir)
    request = requests(1)[0]
    (before,) = engine.generate([request], SAMPLING)
    changed = models.load(tiny_dir, dtype="float32")
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    engine.sync(changed.named_parameters(), version=3)
    (after,) = engine.generate([request], SAMPLING)
    assert (before.version, after.version) == (0, 3)
    assert before.ids_T.tolist() != after.ids_T.tolist()
    ids = torch.tensor(np.concatenate([request.prompt_ids, after.ids_T]), dtype=torch.long)[None]
    logp_TV = changed(ids).logits[0, len(request.prompt_ids) - 1 : -1].log_softmax(-1)
    want_T = logp_TV.gather(1, torch.tensor(after.ids_T, dtype=torch.long)[:, None])[:, 0]
    np.testing.assert_allclose(after.logprob_T, want_T.detach().numpy(), atol=1e-4)
    with pytest.raises(ValueError, match="missing"):
        engine.sync(list(changed.named_parameters())[:2], version=4)
    with pytest.raises(ValueError, match="no weight called 'nonsense'"):
        engine.sync([("nonsense", torch.zeros(1))], version=4)


@pytest.mark.parametrize("fn", ["reference", "transformers"])
def test_a_sleeping_engine_holds_no_weights_and_a_sync_brings_them_back(tiny_dir, fn):
    engine = start(tiny_dir, fn)
    asked = requests(3)
    before = sorted(engine.generate(asked, SAMPLING), key=lambda c: c.request_id)
    weights = {name: p.detach().clone() for name, p in engine._model.named_parameters()}
    engine.sleep()
    assert sum(p.nbytes for p in engine._model.parameters()) == 0
    with pytest.raises(ValueError, match="missing"):
        engine.sync(list(weights.items())[:2], version=1)
    engine.sleep()
    engine.sync(weights.items(), version=1)
    for old, new in zip(before, sorted(engine.generate(asked, SAMPLING), key=lambda c: c.request_id), strict=True):
        assert new.ids_T.tolist() == old.ids_T.tolist()
        # Weights at other addresses are summed in another order.
        np.testing.assert_allclose(new.logprob_T, old.logprob_T, atol=1e-5)


def test_options_of_vllm_are_refused(tiny_dir):
    for key, value in {"memory_share": 0.5, "tensor_parallel": 2}.items():
        with pytest.raises(UserError, match=rf"engine\.{key}: the engine transformers .*remove the key"):
            start(tiny_dir, "transformers", **{key: value})


@pytest.mark.fault(9)
def test_padding_of_the_head_has_no_probability(tiny_dir, tmp_path, tokenizer):
    """A head with padding rows of large weights: the distribution is that of the unpadded model."""
    model = models.load(tiny_dir, dtype="float32")
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[len(tokenizer) :] = 5.0
    models.save(model, tokenizer, tmp_path / "padded")
    asked = requests(3)
    plain, padded = start(tiny_dir), start(tmp_path / "padded")
    assert padded.vocab_size == len(tokenizer)
    for want, got in zip(
        plain.generate(asked, SAMPLING, top_k=8),
        padded.generate(asked, SAMPLING, top_k=8),
        strict=True,
    ):
        np.testing.assert_array_equal(got.ids_T, want.ids_T)
        np.testing.assert_allclose(got.logprob_T, want.logprob_T, atol=1e-4)
        np.testing.assert_allclose(got.top.tail_T, want.top.tail_T, atol=1e-3)


def test_unknown_engines_are_named_with_the_nearest(tiny_dir):
    with pytest.raises(UserError, match=r"engine\.fn.*'referense'.*'reference'"):
        start(tiny_dir, "referense")


def test_a_users_own_engine_is_imported(tiny_dir):
    assert type(start(tiny_dir, "distill.engines.factories:reference")).__name__ == "TransformersEngine"


def test_a_context_past_the_models_positions_is_refused(tiny_dir):
    with pytest.raises(UserError, match=r"engine\.max_model_len.*512 positions"):
        engines.open_engine(EngineConfig(fn="reference"), tiny_dir, max_model_len=513, max_top_k=0)


def test_draws_from_the_tail_have_its_probabilities_and_change_no_token(reference, batched):
    """Pooled over many seeds: chi-square over 16 ranges of ids of the model's own distribution beyond the top entries."""
    prompt = np.array([5, 600, 7000], np.int32)
    asked = [Request(f"r{n}", prompt, seed=n, tail_draws=8) for n in range(250)]
    one = Sampling(temperature=1.0, max_tokens=1)
    written = sorted(batched.generate(asked, one, top_k=4), key=lambda c: int(c.request_id[1:]))
    plain = sorted(
        batched.generate([Request(r.request_id, prompt, seed=r.seed) for r in asked], one, top_k=4),
        key=lambda c: int(c.request_id[1:]),
    )
    assert [content(c) for c in written] == [content(c) for c in plain]
    assert plain[0].beyond is None
    logp_V = reference.plain_logits(torch.tensor(prompt, dtype=torch.long))[-1].double().log_softmax(0).numpy()
    drawn = np.concatenate([c.beyond.ids_TN.ravel() for c in written])
    assert drawn.shape == (2000,)
    np.testing.assert_allclose(np.concatenate([c.beyond.logp_TN.ravel() for c in written]), logp_V[drawn], atol=1e-4)
    p_V = np.exp(logp_V)
    p_V[written[0].top.ids_E] = 0
    np.testing.assert_allclose(written[0].top.tail_T, np.log(p_V.sum()), atol=1e-4)
    assert not np.isin(drawn, written[0].top.ids_E).any()
    ranges = np.arange(len(p_V)) * 16 // len(p_V)
    expected = np.bincount(ranges, p_V / p_V.sum() * len(drawn))
    chi_square = ((np.bincount(ranges[drawn], minlength=16) - expected) ** 2 / expected).sum()
    assert chi_square < 37.7  # 15 degrees of freedom: one in a thousand


def test_scored_draws_depend_on_seed_and_position_alone(reference, batched):
    asked = requests(5)
    scored = [
        Request(r.request_id, r.prompt_ids, r.seed, np.arange(50, 60 + n, dtype=np.int32), tail_draws=3)
        for n, r in enumerate(asked)
    ]
    alone = {c.request_id: c.beyond.ids_TN for c in reference.score(scored, top_k=4)}
    together = {c.request_id: c.beyond.ids_TN for c in batched.score(scored, top_k=4)}
    assert [ids.shape for ids in alone.values()] == [(10 + n, 3) for n in range(5)]
    same = np.concatenate([(alone[i] == together[i]).ravel() for i in alone])
    assert same.mean() > 0.9  # float32 sums in another order move a few draws to a neighbour
    mixed = [Request("a", asked[0].prompt_ids, 1, tail_draws=2), Request("b", asked[0].prompt_ids, 2)]
    with pytest.raises(ValueError, match="same number of tail draws"):
        list(batched.generate(mixed, SAMPLING, top_k=4))
