"""One engine split over two worker processes, on two cores: the completions, scores and new weights of an engine in one piece."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distill import engines, models
from distill.recipe import EngineConfig

RUN = """
import json, os, sys
from pathlib import Path
import numpy as np

def main(folder, size, out):
    from distill import engines, models
    from distill.recipe import EngineConfig
    from distill.records import Request, Sampling
    config = EngineConfig(fn="vllm", dtype="float32", batch_size=4, kv_cache_gib=0.1, tensor_parallel=size)
    os.environ.update(engines.environment(config))
    import torch
    engine = engines.open_engine(config, Path(folder), max_model_len=128, max_top_k=4)
    asked = [Request(f"p{n}", np.array([400, 500, 600 + n]), seed=n) for n in range(4)]

    def look():
        written = sorted(engine.generate(asked, Sampling(0.0, 1.0, 8), top_k=4), key=lambda c: c.request_id)
        given = [Request(c.request_id, a.prompt_ids, completion_ids=c.ids_T) for a, c in zip(asked, written)]
        scored = list(engine.score(given, top_k=4))
        return {
            "ids": [c.ids_T.tolist() for c in written],
            "logp": [c.logprob_T.tolist() for c in written],
            "scored": [c.logprob_T.tolist() for c in scored],
            "top": [c.top.ids_E.tolist() for c in scored],
        }

    found = [look()]
    model = models.load(Path(folder), dtype="float32")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    engine.sync(models.exported_weights(model), version=1)
    found.append(look())
    document = np.concatenate([asked[0].prompt_ids, np.array(found[1]["ids"][0])])
    found.append(models.plain_logps(model, document, engine.vocab_size)[2:].tolist())
    try:
        engine.sync(((n, w) for n, w in models.exported_weights(model) if "norm" not in n), version=2)
    except ValueError as error:
        found.append(str(error))
    engine.close()
    Path(out).write_text(json.dumps(found))

if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
"""


@pytest.fixture(scope="module")
def padded_dir(tiny_dir: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose head has loud rows past the tokenizer, in the second worker's half."""
    import torch

    model = models.load(tiny_dir, dtype="float32")
    model.resize_token_embeddings(len(tokenizer) + 64, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[len(tokenizer) :] = 5.0
    folder = tmp_path_factory.mktemp("padded")
    models.save(model, tokenizer, folder)
    return folder


def run(folder: Path, size: int, to: Path) -> Any:
    script, out = to / "engine.py", to / f"of-{size}.json"
    script.write_text(RUN)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(size), str(out)],
        capture_output=True, text=True, check=False, env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_two_workers_are_one_engine(padded_dir, tmp_path):
    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")
    one, two = (run(padded_dir, size, tmp_path) for size in (1, 2))
    assert one[0]["ids"] != one[1]["ids"], "the sync must move the weights for this to say anything"
    for alone, split in zip(one[:2], two[:2], strict=True):
        assert split["ids"] == alone["ids"]
        for key in ("logp", "scored"):
            np.testing.assert_allclose(split[key], alone[key], atol=1e-4)
        assert split["top"] == alone["top"]
        assert max(max(ids) for ids in split["top"]) < 49152
    np.testing.assert_allclose(two[1]["scored"][0], two[2], atol=1e-4)
    assert "RMSNorm" in two[3]
    assert two[3] == one[3]
    left = list(Path("/dev/shm").glob("distill-*")) if Path("/dev/shm").is_dir() else []
    assert left == []
