"""Engines in Ray actors: the same answers as one engine's, and every request answered once, whatever dies."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
from ray_processes import started

from distill import engines, models
from distill.recipe import EngineConfig
from distill.records import Request, Sampling, UserError

pytest.importorskip("ray", reason="Ray is not installed")

ONE = EngineConfig(fn="transformers", dtype="float32", batch_size=8)
TWO = ONE.model_copy(update={"ray": "local", "replicas": 2})
GREEDY, DRAWN = Sampling(temperature=0.0, max_tokens=12), Sampling(max_tokens=12)


def requests(num: int, given: int = 0) -> list[Request]:
    rng = np.random.default_rng(num)

    def ids(length: int):
        return rng.integers(5, 1000, length).astype(np.int32)

    return [
        Request(f"r{n}", ids(4 + n % 9), seed=n, completion_ids=ids(given + n % 5) if given else None)
        for n in range(num)
    ]


def opened(config: EngineConfig, folder: Path):
    return engines.open_engine(config, folder, max_model_len=64, max_top_k=8)


@pytest.fixture(scope="module")
def one(tiny_dir):
    engine = opened(ONE, tiny_dir)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def two(tiny_dir):
    engine = opened(TWO, tiny_dir)
    yield engine
    engine.close()


def same(mine, theirs) -> None:
    assert np.array_equal(mine.ids_T, theirs.ids_T)
    assert mine.finish_reason == theirs.finish_reason
    assert np.abs(mine.logprob_T - theirs.logprob_T).max() < 1e-5
    assert np.array_equal(mine.top.count_T, theirs.top.count_T)
    assert np.abs(np.exp(mine.top.logp_E) - np.exp(theirs.top.logp_E)).max() < 1e-5


def test_two_actors_say_what_one_engine_says_of_itself(one, two):
    assert (two.vocab_size, two.max_model_len, two.version) == (one.vocab_size, one.max_model_len, 0)
    assert len({fact.pid for fact in two.facts} | {os.getpid()}) == 3


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_the_same_completions_as_one_engine(one, two, sampling):
    asked = requests(60)
    expected = {c.request_id: c for c in one.generate(asked, sampling, top_k=8)}
    found = list(two.generate(iter(asked), sampling, top_k=8))
    assert sorted(c.request_id for c in found) == sorted(r.request_id for r in asked)
    for completion in found:
        same(completion, expected[completion.request_id])


def test_scores_come_in_the_order_of_the_requests(one, two):
    asked = requests(50, given=3)
    found = list(two.score(iter(asked), top_k=8))
    assert [c.request_id for c in found] == [r.request_id for r in asked]
    for mine, theirs in zip(found, one.score(asked, top_k=8), strict=True):
        same(mine, theirs)


def test_requests_are_taken_only_as_far_as_the_actors_are(two):
    taken = []

    def lazily():
        for request in requests(200):
            taken.append(request.request_id)
            yield request

    found = two.generate(lazily(), DRAWN)
    next(found)
    assert len(taken) <= 2 * two._window
    found.close()
    assert len(list(two.generate(requests(3), DRAWN))) == 3  # what was dropped does not come back


def test_both_actors_work(two):
    before = {fact.pid: cpu_seconds(fact.pid) for fact in two.facts}
    list(two.generate(requests(64), DRAWN))
    spent = [cpu_seconds(pid) - seconds for pid, seconds in before.items()]
    assert min(spent) > 0.2 * max(spent)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_prompt_that_does_not_fit_is_the_same_error(two):
    with pytest.raises(ValueError, match="context"):
        list(two.generate([Request("long", np.arange(5, 90, dtype=np.int32))], DRAWN))
    assert len(list(two.generate(requests(3), DRAWN))) == 3


def test_weights_reach_every_actor_and_its_successor(one, two, tiny_dir, other_dir):
    asked = requests(40, given=4)
    other, own = (dict(models.load(folder, dtype="float32").named_parameters()) for folder in (other_dir, tiny_dir))
    try:
        one.sync(other.items(), version=3)
        two.sync(other.items(), version=3)
        expected = list(one.score(asked, top_k=8))
        kill(two, 0)
        found = list(two.score(asked, top_k=8))
        assert {c.version for c in found} == {3}
        for mine, theirs in zip(found, expected, strict=True):
            same(mine, theirs)
        assert two.fleet.replaced >= 1
    finally:
        for engine in (one, two):
            engine.sync(own.items(), version=0)


def kill(engine, number: int) -> None:
    import ray

    pid = ray.get(engine.fleet.slots[number].worker.facts.remote()).pid
    os.kill(pid, signal.SIGKILL)


def test_actors_killed_twenty_times_answer_every_request_once(tiny_dir, two):
    """Kills at random moments, of all actors; the answers are the same as without. Their engine is one without a model."""
    asked = requests(1500)
    light = ONE.model_copy(update={"fn": "counting_engine:engine"})
    expected = {c.request_id: c for c in opened(light, tiny_dir).generate(asked, DRAWN, top_k=8)}
    many = opened(light.model_copy(update={"ray": "local", "replicas": 3}), tiny_dir)
    others = {fact.pid for fact in two.facts}
    rng, kills, found = random.Random(3), 0, []
    try:
        for completion in many.generate(iter(asked), DRAWN, top_k=8):
            found.append(completion)
            if kills < 20 and len(found) > 50 * kills and (alive := started("Replica") - others):
                os.kill(rng.choice(sorted(alive)), signal.SIGKILL)
                kills += 1
        assert kills == 20
        assert many.fleet.replaced >= 19  # who dies behind its last answer needs no successor
    finally:
        many.close()
    assert sorted(c.request_id for c in found) == sorted(expected)
    for completion in found:
        same(completion, expected[completion.request_id])


def test_an_actor_that_always_dies_is_an_error_that_names_the_log(tiny_dir, tmp_path, monkeypatch):
    (tmp_path / "dying_engine.py").write_text(
        "import os\ndef engine(model_dir, config, *, max_model_len, max_top_k, seed):\n    os._exit(7)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"replica \d ended 3 times in a row without an answer .*log\.txt"):
        opened(TWO.model_copy(update={"fn": "dying_engine:engine"}), tiny_dir)


def test_an_engine_that_cannot_start_says_why(tiny_dir):
    with pytest.raises(UserError, match="context"):
        engines.open_engine(TWO, tiny_dir, max_model_len=1 << 20, max_top_k=8)


@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1"])
def test_without_a_cluster_there_is_one_message(address, monkeypatch):
    import ray

    def nobody(**options):
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", nobody)  # "auto" would find the clusters of other tests
    with pytest.raises(UserError, match=r"engine\.ray: no Ray cluster is found .*ray start --head"):
        opened(TWO.model_copy(update={"ray": address}), Path("nowhere"))


def test_without_ray_there_is_one_message(tiny_dir, monkeypatch):
    from distill.engines import ray_cluster

    monkeypatch.setattr(ray_cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"Ray is not installed.*distill\[ray\]"):
        opened(TWO, tiny_dir)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"replicas": 2}, "ray: local"), ({"ray": "local", "sleep": True}, "GPUs of their own")],
)
def test_settings_that_do_not_go_together(fields, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig(**fields)
