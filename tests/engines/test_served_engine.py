"""The served engine against a stub that misbehaves: what is asked, repeated, refused, kept and told."""

from __future__ import annotations

import numpy as np
import pytest
from stub_server import Stub, distribution

from distill import engines
from distill.engines.served import client
from distill.engines.served.journal import AnswerJournal, billed
from distill.engines.served.limits import RateLimits
from distill.recipe import EngineConfig
from distill.records import Request, Sampling, UserError

SAMPLING = Sampling(temperature=1.0, max_tokens=12)
KEY = "sk-secret/+5f3e"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Pauses of a hundredth; the key in its variable."""
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.005)
    monkeypatch.setattr(client, "LONGEST_PAUSE", 0.02)
    monkeypatch.setenv("SERVED_KEY", KEY)


def start(stub: Stub, folder, *, max_top_k: int = 8, **options):
    given = {"fn": "openai", "base_url": stub.url, "model": "tiny", "batch_size": 4, "timeout": 1.0, **options}
    return engines.open_engine(EngineConfig(**given), folder, max_model_len=128, max_top_k=max_top_k)


def requests(number: int, **more) -> list[Request]:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1000, 9000, 5 + n % 7).astype(np.int32) for n in range(number)]
    asked = [Request(f"r{n}", each, seed=1000 + n, **more) for n, each in enumerate(ids)]
    if "messages" not in more:
        return asked
    return [
        Request(
            one.request_id, one.prompt_ids, one.seed, None, ({"role": "user", "content": f"number {n}"},), one.opened
        )
        for n, one in enumerate(asked)
    ]


def rows(engine, asked, top_k: int = 8):
    return {one.request_id: one for one in engine.generate(asked, SAMPLING, top_k=top_k)}


def same(left, right) -> bool:
    parts = [(c.ids_T, c.logprob_T, c.top.count_T, c.top.ids_E, c.top.logp_E, c.top.tail_T) for c in (left, right)]
    return all(np.array_equal(a, b) for a, b in zip(*parts, strict=True)) and left.finish_reason == right.finish_reason


# -------------------------------------------------------------------------------------------- ids both ways


def test_ids_and_distributions_are_the_servers(tokenizer, tiny_dir):
    with Stub(tokenizer, gives=5) as stub:
        engine = start(stub, tiny_dir)
        found = rows(engine, requests(6))
        engine.close()
    assert "gives 5 of 8 entries" in engine.note
    assert len(found) == 6
    for request in requests(6):
        one = found[request.request_id]
        assert (one.finish_reason == "stop") == (one.ids_T[-1] == 2)
        assert len(one.top) == len(one.ids_T)
        assert (one.top.count_T == 5).all()
        for t, token in enumerate(one.ids_T):
            truth = distribution([*request.prompt_ids.tolist(), *one.ids_T[:t].tolist()], stub.words)
            best = sorted(truth, key=lambda each: -truth[each])[:5]
            assert one.top.slice(t, t + 1).ids_E.tolist() == best
            assert one.logprob_T[t] == pytest.approx(truth[int(token)], abs=1e-6)
            assert np.exp(one.top.tail_T[t]) == pytest.approx(1 - sum(np.exp(truth[each]) for each in best), abs=1e-5)


def test_the_servers_defaults_do_not_reach_the_distribution(tokenizer, tiny_dir):
    """vLLM's server fills in top_k and penalties from the model's generation config unless a request states them."""
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir)
        rows(engine, requests(1))
        engine.close()
    body = stub.asked[0]
    assert (body["top_k"], body["repetition_penalty"], body["min_p"]) == (0, 1.0, 0.0)
    assert body["prompt"] == requests(1)[0].prompt_ids.tolist()


def test_scores_come_in_the_order_of_the_requests(tokenizer, tiny_dir):
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir)
        made = rows(engine, requests(6))
        asked = [Request(r.request_id, r.prompt_ids, completion_ids=made[r.request_id].ids_T) for r in requests(6)]
        scored = list(engine.score(asked, top_k=8))
        engine.close()
    assert [one.request_id for one in scored] == [f"r{n}" for n in range(6)]
    for one in scored:
        np.testing.assert_array_equal(one.ids_T, made[one.request_id].ids_T)
        np.testing.assert_allclose(one.logprob_T, made[one.request_id].logprob_T, atol=1e-6)
        np.testing.assert_array_equal(one.top.ids_E, made[one.request_id].top.ids_E)


@pytest.mark.parametrize("options", [{"scores": False}, {"speaks": "chat"}])
def test_an_endpoint_that_cannot_score_is_told_so(tokenizer, tiny_dir, options):
    with Stub(tokenizer, **options) as stub:
        engine = start(stub, tiny_dir)
        with pytest.raises(UserError, match="prompt_logprobs"):
            list(engine.score([Request("r", np.arange(5), completion_ids=np.arange(3))], top_k=8))
        engine.close()


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("speaks", ["ids", "chat"])
def test_more_entries_than_offered_are_refused_before_a_request(tokenizer, tiny_dir, speaks):
    with Stub(tokenizer, speaks=speaks, max_logprobs=5) as stub:
        with pytest.raises(UserError, match="top_logprobs: 5"):
            start(stub, tiny_dir, max_top_k=20)
        assert not stub.asked


@pytest.mark.parametrize("speaks", ["ids", "chat"])
def test_log_probabilities_after_the_temperature_are_refused(tokenizer, tiny_dir, speaks):
    with Stub(tokenizer, speaks=speaks, raw=False) as stub:
        engine = start(stub, tiny_dir)
        with pytest.raises(UserError, match="temperature: 1"):
            list(engine.generate(requests(1, messages=()), Sampling(temperature=0.7, max_tokens=4), top_k=8))
        assert len(rows(engine, requests(2, messages=()))) == 2
        engine.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "another"}, "SERVED_KEY"),
        ({"model": "tinny"}, "tiny"),
        ({"base_url": "http://127.0.0.1:9/v1", "max_retries": 1}, "2 attempts"),
    ],
)
def test_a_wrong_key_model_or_address_is_one_message(tokenizer, tiny_dir, options, message):
    with Stub(tokenizer, key=options.pop("key", KEY)) as stub, pytest.raises(UserError, match=message) as refused:
        start(stub, tiny_dir, key="$SERVED_KEY", **options)
    assert KEY not in str(refused.value)


def test_an_unset_variable_is_one_message(tokenizer, tiny_dir):
    with Stub(tokenizer) as stub, pytest.raises(UserError, match="NO_SUCH_KEY is not set"):
        start(stub, tiny_dir, key="$NO_SUCH_KEY")


def test_a_longer_context_than_the_servers_is_refused(tokenizer, tiny_dir):
    with Stub(tokenizer) as stub:
        config = EngineConfig(fn="openai", base_url=stub.url, model="tiny")
        with pytest.raises(UserError, match=r"engine\.max_model_len: 256"):
            engines.open_engine(config, tiny_dir, max_model_len=300, max_top_k=0)


# ------------------------------------------------------------------------------------------------- failures


def _no_logprobs(tree):
    del tree["choices"][0]["logprobs"]
    return tree


def _other_tokens(tree):
    table = tree["choices"][0]["logprobs"]
    table["tokens"][0] = f"token_id:{int(table['tokens'][0][9:]) + 1}"
    return tree


def _fewer(tree):
    for name in ("tokens", "token_logprobs", "top_logprobs"):
        tree["choices"][0]["logprobs"][name].pop()
    return tree


def _twice(tree):
    return {**tree, "choices": tree["choices"] * 2}


def _too_much_mass(tree):
    top = tree["choices"][0]["logprobs"]["top_logprobs"][0]
    tree["choices"][0]["logprobs"]["token_logprobs"][0] = -0.1
    tree["choices"][0]["logprobs"]["top_logprobs"][0] = dict.fromkeys(top, -0.1)
    return tree


FAULTS = {
    "limited": (429, "slow down", {"Retry-After": "0.05"}),
    "broken": (500, "oh no"),
    "unavailable": (503, "restarting"),
    "half": "half",
    "no json": "no json",
    "reset": "reset",
    "hang": "hang",
    "no logprobs": _no_logprobs,
    "other tokens": _other_tokens,
    "fewer logprobs": _fewer,
    "answered twice": _twice,
    "too much mass": _too_much_mass,
    "another form": lambda tree: {"hello": tree},
}


@pytest.mark.parametrize("fault", FAULTS, ids=list(FAULTS))
def test_a_failure_that_passes_is_asked_again(tokenizer, tiny_dir, fault):
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir)
        truth = rows(engine, requests(6))
        before = len(stub.asked)
        stub.faults = {before + 1: FAULTS[fault], before + 3: FAULTS[fault]}
        found = rows(engine, requests(6))
        engine.close()
    assert len(stub.asked) == before + 8
    assert all(same(found[name], truth[name]) for name in truth)


@pytest.mark.parametrize("fault", FAULTS, ids=list(FAULTS))
def test_a_failure_that_stays_is_one_message(tokenizer, tiny_dir, fault):
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir, max_retries=2, batch_size=1, timeout=0.3)
        stub.faults = dict.fromkeys(range(99), FAULTS[fault])
        with pytest.raises(UserError, match="3 attempts") as refused:
            rows(engine, requests(3))
        engine.close()
    assert len(stub.asked) == 3
    if isinstance(FAULTS[fault], tuple):
        assert FAULTS[fault][1] in str(refused.value)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422, 301])
def test_a_refusal_is_not_asked_again(tokenizer, tiny_dir, status):
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir, batch_size=1, key="$SERVED_KEY")
        stub.faults = {0: (status, f"no, not with Bearer {KEY}")}
        with pytest.raises(UserError, match="no, not with") as refused:
            rows(engine, requests(3))
        engine.close()
    assert len(stub.asked) == 1
    assert KEY not in str(refused.value)


def test_retry_after_holds_all_requests_back(tokenizer, tiny_dir):
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir, batch_size=1)
        stub.faults = {0: (429, "slow down", {"Retry-After": "0.4"})}
        rows(engine, requests(2))
        engine.close()
    assert stub.times[1] - stub.times[0] >= 0.4


# ------------------------------------------------------------------------------------------------------ text


def chat(stub: Stub, folder, tokenizer, *, top_k: int, opened: str = "", **options):
    engine = start(stub, folder, max_top_k=top_k, **options)
    found = rows(engine, requests(4, messages=(), opened=opened), top_k)
    engine.close()
    return engine, found


def test_a_chat_endpoint_gives_text_in_the_local_tokens(tokenizer, tiny_dir):
    with Stub(tokenizer, speaks="chat", extra_fields=False, listing=False) as stub:
        _, found = chat(stub, tiny_dir, tokenizer, top_k=0)
    for one in found.values():
        assert one.top is None
        assert len(one.logprob_T) == 0
        assert one.ids_T.tolist()[: len(one.ids_T) - (one.finish_reason == "stop")] == tokenizer(one.text)["input_ids"]
        assert (one.ids_T[-1] == 2) == (one.finish_reason == "stop")
    assert {"stop", "length"} >= {one.finish_reason for one in found.values()}


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_that_a_server_keeps_apart_is_put_back(tokenizer, tiny_dir, field):
    with Stub(tokenizer, speaks="chat", reasoning=field) as stub:
        _, found = chat(stub, tiny_dir, tokenizer, top_k=0)
        _, begun = chat(stub, tiny_dir, tokenizer, top_k=0, opened="<think>\n")
    assert all(one.text.startswith("<think>\nLet me\nthink.\n</think>\n\n") for one in found.values())
    assert all(one.text.startswith("Let me\nthink.\n</think>\n\n") for one in begun.values())


@pytest.mark.parametrize("ends_listed", [True, False])
def test_a_chat_endpoint_with_the_same_tokens_gives_distributions(tokenizer, tiny_dir, ends_listed):
    with Stub(tokenizer, speaks="chat", ends_listed=ends_listed) as stub:
        _, found = chat(stub, tiny_dir, tokenizer, top_k=5)
    for number, one in enumerate(found[f"r{n}"] for n in range(4)):
        prompt = tokenizer(f"number {number}", add_special_tokens=False)["input_ids"]
        assert len(one.top) == len(one.ids_T) == len(one.logprob_T) > 0
        for t, token in enumerate(one.ids_T):
            truth = distribution([*prompt, *one.ids_T[:t].tolist()], stub.words)
            best = sorted(truth, key=lambda each: -truth[each])[:5]
            assert one.top.slice(t, t + 1).ids_E.tolist() == best
            assert one.logprob_T[t] == pytest.approx(truth[int(token)], abs=1e-6)
    assert any(one.finish_reason == "stop" for one in found.values())
    assert all((one.ids_T[-1] == 2) == (one.finish_reason == "stop" and ends_listed) for one in found.values())


def test_distributions_of_another_tokenizer_are_refused_and_its_text_is_taken(tokenizer, narrow_dir, foreign_dir):
    with Stub(tokenizer) as stub:
        with pytest.raises(UserError, match="another tokenizer"):
            start(stub, narrow_dir)
        with pytest.raises(UserError, match="another tokenizer"):
            start(stub, foreign_dir)
        engine = start(stub, foreign_dir, max_top_k=0)
        found = rows(engine, requests(4, messages=()), 0)
        engine.close()
    assert all(one.top is None and one.text for one in found.values())


def test_reasoning_without_log_probabilities_has_no_distribution(tokenizer, tiny_dir):
    """A distribution of a part of the text would be about another text than the trace's."""
    with Stub(tokenizer, speaks="chat", reasoning="reasoning") as stub:
        _, found = chat(stub, tiny_dir, tokenizer, top_k=5)
    assert all(one.top is None and "Let me" in one.text for one in found.values())


# ------------------------------------------------------------------------------------------------ the journal


def test_answers_in_the_journal_are_not_asked_for(tokenizer, tiny_dir, tmp_path):
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir)
        engine.keep_answers(tmp_path, set())
        truth = rows(engine, requests(6))
        engine.close()
        with next(tmp_path.glob("answers-*.jsonl")).open("ab") as file:
            file.write(b'{"id": "r9", "ids": "AAA')  # cut by a kill
        again = start(stub, tiny_dir)
        again.keep_answers(tmp_path, set())
        found = rows(again, requests(8))
        others = rows(again, [Request("r0", np.arange(1000, 1005), seed=1)])
        again.close()
    assert all(same(found[name], truth[name]) for name in truth)
    assert len(stub.asked) == 6 + 2 + 1
    assert max(stub.answered.values()) == 1
    assert not np.array_equal(others["r0"].ids_T, found["r0"].ids_T)
    usage = billed(tmp_path)
    assert usage.completion == sum(len(one.ids_T) for one in [*found.values(), *others.values()])


def test_segments_are_removed_once_their_answers_are_stored(tokenizer, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("distill.engines.served.journal.SEGMENT_BYTES", 2000)
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir)
        journal = engine.keep_answers(tmp_path, set())
        truth = rows(engine, requests(20))
        total = journal.usage
        assert len(list(tmp_path.glob("answers-*.jsonl"))) > 3
        journal.stored(list(truth)[:10])
        assert billed(tmp_path) == total
        journal.stored(list(truth))
        engine.close()
    assert [path.name for path in tmp_path.iterdir()] == ["usage.json"]
    assert billed(tmp_path) == total
    assert AnswerJournal(tmp_path).usage == total


def test_useless_answers_are_paid_for_too(tokenizer, tiny_dir, tmp_path):
    with Stub(tokenizer) as stub:
        engine = start(stub, tiny_dir, batch_size=1)
        engine.keep_answers(tmp_path, set())
        stub.faults = {0: _other_tokens}
        (one,) = rows(engine, requests(1)).values()
        engine.close()
    assert billed(tmp_path).completion == 2 * len(one.ids_T)


def test_an_early_end_and_an_error_leave_the_engine_usable(tokenizer, tiny_dir, tmp_path):
    with Stub(tokenizer, delay=0.05) as stub:
        engine = start(stub, tiny_dir)
        engine.keep_answers(tmp_path, set())
        stopped = engine.generate(requests(12), SAMPLING, top_k=8)
        next(stopped)
        stopped.close()
        stub.faults = {len(stub.asked) + 1: (400, "no")}
        with pytest.raises(UserError, match="no"):
            rows(engine, requests(12))
        asked = len(stub.asked)
        found = rows(engine, requests(12))
        engine.close()
    assert len(found) == 12
    # What was in flight beside the refused request was answered and kept.
    assert len(stub.asked) - asked < 9
    assert max(stub.answered.values()) <= 2


def test_rate_limits_hold_in_any_minute():
    now = [0.0]
    limits = RateLimits(3, 100, clock=lambda: now[0])
    for _ in range(3):
        limits.wait(10)
    assert limits._delay(10) == pytest.approx(60)
    now[0] = 59.0
    assert limits._delay(10) == pytest.approx(1)
    now[0] = 60.0
    assert limits._delay(10) == 0
    limits.wait(95)
    assert limits._delay(10) == pytest.approx(60)
    assert RateLimits(None, 100)._delay(1000) == 0  # larger than the limit: alone
    limits.pause(100)
    assert limits._delay(1) == pytest.approx(100)
