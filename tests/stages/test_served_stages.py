"""generate, score and eval through an endpoint, and a generate stage that is killed fifty times."""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scored_runs import SUMS
from stub_server import Stub

from distill import recipe
from distill.engines.served.journal import AnswerJournal
from distill.inspector import trace_page
from distill.progress import Screen
from distill.records import UserError
from distill.stages import eval as evaluation
from distill.stages import generate, score
from distill.stages.context import Context
from distill.traces.reader import open_traces

KILLS = 50
PRICE = {"input": 2.0, "output": 10.0}


def context(run: Path, stub: Stub, folder: Path, name: str, **changes) -> Context:
    engine = {"fn": "openai", "base_url": stub.url, "model": "tiny", "batch_size": 4, "price": PRICE}
    asked = {"model": "a", "task": "sums", "problems": 4, "samples": 2, "sampling": {"max_tokens": 6}, "engine": engine}
    stages = {
        "traces": {"kind": "generate", "top_logprobs": 5, **asked, **changes},
        "scored": {"kind": "score", "model": "a", "data": "traces", "top_logprobs": 5, "engine": engine},
        "tested": {"kind": "eval", **asked},
    }
    tree = {"name": "t", "models": {"a": str(folder)}, "tasks": {"sums": SUMS}, "stages": stages}
    ctx = Context(recipe=recipe.validate(tree), run=run, name=name, screen=Screen(io.StringIO()))
    ctx.folder.mkdir(parents=True, exist_ok=True)
    return ctx


@pytest.fixture
def tokenizer_only(tiny_dir, tmp_path) -> Path:
    """A model's folder without its weights: an endpoint has them."""
    folder = tmp_path / "tokenizer_only"
    folder.mkdir()
    for file in tiny_dir.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_generate_score_and_eval_need_no_weights_and_state_their_price(tokenizer, tokenizer_only, tmp_path):
    run = tmp_path / "run"
    with Stub(tokenizer) as stub:
        made = {}
        for name, kind in (("traces", generate), ("scored", score), ("tested", evaluation)):
            ctx = context(run, stub, tokenizer_only, name)
            made[name] = kind.run(ctx.recipe.stages[name], ctx)
        traces, scored = open_traces(run / "traces" / "traces"), open_traces(run / "scored" / "traces")
        again = context(run, stub, tokenizer_only, "traces")
        asked = len(stub.asked)
        same = generate.run(again.recipe.stages["traces"], again)
    assert len(stub.asked) == asked
    assert traces.metadata.versions["served_model"] == "tiny"
    lengths = traces.lengths()
    paid = (2.0 * lengths.prompt.sum() + 10.0 * lengths.completion.sum()) / 1e6
    assert made["traces"].cost.dollars == pytest.approx(paid)
    assert same.cost.dollars == pytest.approx(paid)
    assert made["traces"].cost.flops == 0
    assert made["scored"].cost.dollars > 0
    assert made["tested"].cost.dollars > 0
    by_id = {trace_id: n for block in scored.blocks() for n, trace_id in enumerate(block.trace_id)}
    for block, other in zip(traces.blocks(), scored.blocks(), strict=True):
        for n, trace_id in enumerate(block.trace_id):
            m = by_id[trace_id]
            assert block.completion_ids[n].tolist() == other.completion_ids[m].tolist()
            assert block.logprob[n] == pytest.approx(other.logprob[m], abs=0.05)
    assert [path.name for path in (run / "traces" / "answers").iterdir()] == ["usage.json"]


def test_text_without_log_probabilities_is_stored_as_such(tokenizer, tiny_dir, tmp_path):
    with Stub(tokenizer, speaks="chat", reasoning="reasoning") as stub:
        ctx = context(tmp_path, stub, tiny_dir, "traces", top_logprobs=0)
        generate.run(ctx.recipe.stages["traces"], ctx)
        tested = context(tmp_path, stub, tiny_dir, "tested")
        evaluation.run(tested.recipe.stages["tested"], tested)
    (block,) = open_traces(tmp_path / "traces" / "traces").blocks()
    assert len(block) == 8
    assert block.logprob.lengths.tolist() == [0] * 8
    assert block.top is None
    assert all("Let me\nthink.\n</think>\n\n" in text for text in block.completion)
    for n in range(8):
        assert tokenizer.decode(block.completion_ids[n], skip_special_tokens=True) == block.completion[n]
    page = trace_page.Page("traces")
    shown = trace_page.render(trace_page.rows_of(block), lambda ids: [b"x"] * len(ids), frozenset(), page)
    assert "</html>" in shown
    system = [message["content"] for message in stub.asked[0]["messages"]]
    assert block.messages[0][-1]["content"] in " ".join(one["messages"][-1]["content"] for one in stub.asked)
    assert system


def test_a_partly_mapped_run_leaves_out_what_has_no_distribution(tokenizer, tiny_dir, tmp_path):
    def other_token(tree):
        tree["choices"][0]["logprobs"]["content"][0]["token"] = "\ud7ff"
        tree["choices"][0]["logprobs"]["content"][0]["bytes"] = [255]
        return tree

    with Stub(tokenizer, speaks="chat", faults={2: other_token, 5: other_token}) as stub:
        ctx = context(tmp_path, stub, tiny_dir, "traces")
        result = generate.run(ctx.recipe.stages["traces"], ctx)
        asked = len(stub.asked)
        again = context(tmp_path, stub, tiny_dir, "traces")
        generate.run(again.recipe.stages["traces"], again)
    assert sum(len(block) for block in open_traces(tmp_path / "traces" / "traces").blocks()) == 6
    assert result.cost.samples_failed == 2
    assert "2 completions left out" in ctx.screen.stream.getvalue()
    assert len(stub.asked) == asked  # those two are in the journal: not paid for again


# ---------------------------------------------------------------------------------------------------- kills


class Killed:
    """A process that runs the stage in forks (killed_stage.py)."""

    def __init__(self, run: Path, url: str, folder: Path) -> None:
        script = Path(__file__).parent / "killed_stage.py"
        self._server = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._line = f"{run} {url} {folder}"

    def begin(self) -> int:
        print(self._line, file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def end(self) -> int:
        return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()


def on_disk(run: Path) -> set[str]:
    """The ids whose answers a killed stage has left in its shards and its journal."""
    stored: set[str] = set()
    if any((run / "traces" / "traces").glob("manifest-*.json")):
        for table in open_traces(run / "traces" / "traces").tables(columns=["trace_id"]):
            stored.update(table.column("trace_id").to_pylist())
    return stored | set(AnswerJournal(run / "traces" / "answers")._where)


def whole(run: Path) -> dict[str, tuple]:
    return {
        trace_id: (tuple(block.completion_ids[n]), tuple(block.logprob[n]), block.completion[n], block.finish_reason[n])
        for block in open_traces(run / "traces" / "traces").blocks()
        for n, trace_id in enumerate(block.trace_id)
    }


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_kills_give_the_same_rows_and_no_answer_is_asked_for_twice(tokenizer, tiny_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("SERVED_KEY", "sk-1")
    chance = random.Random(3)
    killed = 0
    with Stub(tokenizer, delay=0.03) as stub:
        stage = Killed(tmp_path / "killed", stub.url, tiny_dir)
        known: set[str] = set()
        while killed < KILLS:
            before, wanted = len(stub.once), chance.randint(0, 9)
            pid = stage.begin()
            ended = time.monotonic() + 60
            while len(stub.once) < before + wanted and time.monotonic() < ended:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.06))
            os.kill(pid, signal.SIGKILL)
            status = stage.end()
            assert status == -signal.SIGKILL, f"the stage ended with {status} after {killed} kills"
            killed += 1
            asked = {once.partition("-")[0] for once in stub.once[before:]}
            assert not asked & known, "an answer that was on the disk was asked for again"
            known |= on_disk(tmp_path / "killed")
        before = len(stub.once)
        stage.begin()
        assert stage.end() == 0
        assert not {once.partition("-")[0] for once in stub.once[before:]} & known
        total = len(stub.once)
        stage.close()
        straight = Killed(tmp_path / "straight", stub.url, tiny_dir)
        straight.begin()
        assert straight.end() == 0
        straight.close()
    rows = whole(tmp_path / "killed")
    assert rows == whole(tmp_path / "straight")
    assert len(rows) == 320
    # Only requests in flight at a kill were asked again: at most batch_size for each.
    again = total - len(rows)
    print(f"\n{killed} kills: {again} of {total} requests asked again")
    assert again <= 4 * KILLS
    assert len(set(stub.once)) == len(rows)


def test_a_model_of_a_stage_and_a_comparison_are_refused(tiny_dir):
    engine = {"fn": "openai", "base_url": "http://localhost:1/v1", "model": "m"}
    trained = {"kind": "prune", "model": "a", "layers": 2}
    tested = {"kind": "eval", "model": "kl", "task": "sums", "engine": engine}
    tree = {
        "name": "t",
        "models": {"a": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {"kl": trained, "e": tested},
    }
    with pytest.raises(UserError, match="an endpoint runs the model that it was started with"):
        recipe.validate(tree)
    compare = {"kind": "compare", "arms": {"x": "a", "y": "kl"}, "task": "sums", "engine": engine}
    with pytest.raises(UserError, match="an endpoint runs one of them"):
        recipe.validate({**tree, "stages": {"kl": trained, "c": compare}})
    policy = {
        "kind": "grpo",
        "model": "a",
        "task": "sums",
        "rewards": [{"fn": "accuracy"}],
        "steps": 1,
        "engine": engine,
    }
    with pytest.raises(UserError, match="which an endpoint does not take"):
        recipe.validate({**tree, "stages": {"rl": policy}})
