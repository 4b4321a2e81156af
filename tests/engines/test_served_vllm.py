"""The served engine against vLLM's own server on localhost, held against the engines of this machine on the same model."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import numpy as np
import pytest

from distill import engines
from distill.engines.auto import installed_vllm
from distill.recipe import EngineConfig
from distill.records import Request, Sampling, UserError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(installed_vllm() is None, reason="vLLM is not installed"),
]

KEY = "sk-of-the-test"
GREEDY = Sampling(temperature=0.0, max_tokens=16)
SAMPLED = Sampling(temperature=0.7, top_p=0.9, max_tokens=16)


@pytest.fixture(scope="session")
def vllm_url(tiny_dir, tmp_path_factory):
    """vLLM's server with the tiny model in float32, at most 20 entries a position, behind a key."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log.txt"
    options = {
        "model": tiny_dir, "served-model-name": "tiny", "dtype": "float32", "host": "127.0.0.1", "port": port,
        "max-model-len": 256, "max-num-seqs": 16, "api-key": KEY,
    }  # fmt: skip
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    env = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *arguments]
    with log.open("w") as out:
        server = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 600
        while not _is_up(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, 9)
            server.wait()


def _is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=1):
            return True
    except (urllib.error.URLError, OSError):
        return False


@pytest.fixture(scope="module")
def served(vllm_url, tiny_dir):
    os.environ["SERVED_TEST_KEY"] = KEY
    config = EngineConfig(fn="openai", base_url=vllm_url, model="tiny", key="$SERVED_TEST_KEY", batch_size=16)
    engine = engines.open_engine(config, tiny_dir, max_model_len=128, max_top_k=20)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def here(tiny_dir):
    """The same model in this process, by vLLM too."""
    config = EngineConfig(fn="vllm", dtype="float32", batch_size=16, kv_cache_gib=0.2)
    engine = engines.open_engine(config, tiny_dir, max_model_len=128, max_top_k=20)
    yield engine
    engine.close()


def requests(number: int) -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(f"r{n}", rng.integers(100, 40000, 5 + n % 7).astype(np.int32), seed=1000 + n) for n in range(number)
    ]


def same_rows(left, right) -> int:
    """Check the rows with the same ids, and return their number."""
    equal = 0
    for name in left.keys() & right.keys():
        a, b = left[name], right[name]
        if np.array_equal(a.ids_T, b.ids_T):
            equal += 1
            assert a.finish_reason == b.finish_reason
            np.testing.assert_allclose(a.logprob_T, b.logprob_T, atol=1e-4)
            np.testing.assert_allclose(a.top.tail_T, b.top.tail_T, atol=1e-3)
            for t in range(len(a.ids_T)):
                one, other = a.top.slice(t, t + 1), b.top.slice(t, t + 1)
                there = dict(zip(other.ids_E.tolist(), other.logp_E.tolist(), strict=True))
                # Entries on both sides of the cut may change places.
                common = [
                    each for each in zip(one.ids_E.tolist(), one.logp_E.tolist(), strict=True) if each[0] in there
                ]
                assert len(common) >= 18
                assert all(abs(value - there[token]) <= 1e-4 for token, value in common)
    return equal


def test_greedy_rows_are_those_of_the_engine_in_this_process(served, here):
    asked = requests(24)
    found = {one.request_id: one for one in served.generate(asked, GREEDY, top_k=20)}
    truth = {one.request_id: one for one in here.generate(asked, GREEDY, top_k=20)}
    assert same_rows(found, truth) == 24


def test_sampled_rows_have_the_raw_log_probabilities_of_their_ids(served, here):
    """At a temperature of 0.7 and top_p 0.9 the log-probabilities are still those before sampling."""
    found = {one.request_id: one for one in served.generate(requests(24), SAMPLED, top_k=20)}
    asked = [Request(r.request_id, r.prompt_ids, completion_ids=found[r.request_id].ids_T) for r in requests(24)]
    truth = {one.request_id: one for one in here.score(asked, top_k=20)}
    for name, one in found.items():
        np.testing.assert_allclose(one.logprob_T, truth[name].logprob_T, atol=1e-4)


def test_scores_are_those_of_the_engine_in_this_process(served, here):
    made = {one.request_id: one for one in here.generate(requests(24), SAMPLED, top_k=20)}
    asked = [Request(r.request_id, r.prompt_ids, completion_ids=made[r.request_id].ids_T) for r in requests(24)]
    found = {one.request_id: one for one in served.score(asked, top_k=20)}
    truth = {one.request_id: one for one in here.score(asked, top_k=20)}
    assert same_rows(found, truth) == 24


def test_more_entries_than_the_server_gives_are_refused_with_the_remedy(vllm_url, tiny_dir, served):
    config = EngineConfig(fn="openai", base_url=vllm_url, model="tiny", key="$SERVED_TEST_KEY")
    with pytest.raises(UserError, match="set top_logprobs: 20, or start vLLM's server with --max-logprobs 64"):
        engines.open_engine(config, tiny_dir, max_model_len=128, max_top_k=64)
    with pytest.raises(UserError, match="lower top_logprobs"):
        list(served.score([Request("r", np.arange(100, 105), completion_ids=np.arange(100, 103))], top_k=64))


def test_another_tokenizer_gets_its_text(vllm_url, served, foreign_dir):
    config = EngineConfig(fn="openai", base_url=vllm_url, model="tiny", key="$SERVED_TEST_KEY")
    with pytest.raises(UserError, match="another tokenizer"):
        engines.open_engine(config, foreign_dir, max_model_len=128, max_top_k=5)
    engine = engines.open_engine(config, foreign_dir, max_model_len=128, max_top_k=0)
    messages = ({"role": "user", "content": "Say a word."},)
    asked = [Request(f"r{n}", np.arange(5), seed=n, messages=messages) for n in range(4)]
    found = list(engine.generate(asked, SAMPLED, top_k=0))
    engine.close()
    assert len(found) == 4
    assert all(one.top is None and len(one.ids_T) and one.text is not None for one in found)
