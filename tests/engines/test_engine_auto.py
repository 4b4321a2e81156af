"""`engine: auto`: vLLM if it can be used, else transformers; messages, records and refusals."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from project import SUMS, Project

from distill import engines, models, recipe, run_folder
from distill.engines import auto
from distill.progress import Screen
from distill.recipe import EngineConfig
from distill.records import UserError
from distill.run import plan
from distill.stages.auto_settings import settle_engine
from distill.stages.context import Context
from distill.traces.reader import open_traces

NO_VLLM = {
    "missing": (
        "raise ModuleNotFoundError(\"No module named 'vllm'\", name='vllm')",
        "vLLM is not installed",
    ),
    "needs": (
        "import a_package_that_is_not_there",
        "No module named 'a_package_that_is_not_there'",
    ),
    "name": ("from json import no_such_name", "cannot import name 'no_such_name'"),
    "library": (
        "import ctypes; ctypes.CDLL('libno-such-thing.so.1')",
        "libno-such-thing.so.1: cannot open shared object file",
    ),
}
"""A `vllm` package that cannot be imported: its source, and the expected message."""


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, Path]:
    """Folders for an interpreter's path, each with a `vllm` package that cannot be imported."""
    folders = {}
    for name, (source, _) in NO_VLLM.items():
        folders[name] = tmp_path_factory.mktemp(name)
        (folders[name] / "vllm").mkdir()
        (folders[name] / "vllm" / "__init__.py").write_text(source)
    return folders


@pytest.fixture
def without_vllm(monkeypatch) -> None:
    """Importing vllm fails in this process, as if it were not installed."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "distill.engines.vllm", raising=False)


def tree(base: Path, engine: object = "auto") -> dict:
    return {
        "name": "auto",
        "models": {"base": str(base)},
        "tasks": {"sums": SUMS},
        "stages": {
            "traces": {
                "kind": "generate", "model": "base", "task": "sums", "problems": 3, "sampling": {"max_tokens": 4},
                "top_logprobs": 4, "engine": engine,
            },
        },
    }  # fmt: skip


def test_where_vllm_cannot_be_imported_auto_is_transformers_and_says_why(broken, tiny_dir):
    code = """
import json, sys
from pathlib import Path
from distill import engines
from distill.recipe import EngineConfig
from distill.records import UserError
folder, said = Path(sys.argv[1]), {}
for path in sys.argv[2:]:
    sys.path.insert(0, path)
    found = engines.choose(EngineConfig(), folder)
    engine = engines.open_engine(EngineConfig(dtype="float32"), folder, max_model_len=64, max_top_k=4)
    try:
        engines.open_engine(EngineConfig(fn="vllm"), folder, max_model_len=64, max_top_k=4)
    except UserError as error:
        said[path] = [found.fn, found.why, type(engine).__name__, str(error)]
    sys.path.remove(path)
print(json.dumps(said))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_dir), *map(str, broken.values())],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    for name, (_, expected) in NO_VLLM.items():
        fn, why, opened, refusal = said[str(broken[name])]
        assert (fn, opened) == ("transformers", "TransformersEngine")
        assert expected in why
        assert f"about {auto.SLOWER} times slower" in why
        assert "\n" not in why
        # Named in the recipe, it is an error with the same reason and the way out.
        assert expected in refusal
        assert "set engine to auto or transformers" in refusal


def test_a_run_without_vllm_says_the_engine_and_records_it(broken, tiny_dir, tmp_path, monkeypatch):
    project = Project(tmp_path, tree(tiny_dir))
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(broken["missing"]), *filter(None, sys.path)]))
        done = project.run_alone()
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "vLLM" in line]
    assert line.strip() == (f"engine transformers: vLLM is not installed; about {auto.SLOWER} times slower")
    assert "starting the transformers engine for 3 completions" in done.stdout
    assert project.state("traces")["decided"]["engine.fn"]["value"] == "transformers"
    assert open_traces(project.run_dir / "traces" / "traces").metadata.engine == "transformers"
    # The recipe is stored as it was written.
    resolved = yaml.safe_load((project.run_dir / "resolved.yaml").read_text())
    assert resolved["stages"]["traces"]["engine"]["fn"] == "auto"

    # With vLLM there the finished stage stands; so it does where the engine it came to is named; another is a change.
    for engine in ("auto", "transformers"):
        again = project.run(f"stages.traces.engine={engine}")
        assert "traces: done already" in again.stdout, again.stdout + again.stderr
    other = project.run("stages.traces.engine=vllm")
    assert other.returncode == 2
    assert 'engine.fn: "transformers" -> "vllm"' in other.stderr
    # A larger number of problems continues with the engine of the start.
    more = project.run("stages.traces.problems=4")
    assert more.returncode == 0, more.stdout + more.stderr
    assert "engine transformers: as this stage began (vLLM is not installed" in more.stdout
    assert len(project.rows("traces")) == 4


def settled(tmp_path: Path, base: Path, engine: str, before: str | None) -> tuple[str, str, dict]:
    """The engine of a stage, the printed lines, and the content of stage.json."""
    loaded = recipe.validate(tree(base, engine))
    context = Context(recipe=loaded, run=tmp_path, name="traces", screen=Screen(io.StringIO()))
    decided = {} if before is None else {"engine.fn": {"value": before, "why": "of then"}}
    run_folder.write(context.folder, run_folder.State(kind="generate", config={}, inputs={}, decided=decided))
    config = settle_engine(loaded.stages["traces"].engine, "base", context)
    after = run_folder.read(context.folder).decided["engine.fn"]
    return config.fn, context.screen.stream.getvalue().strip(), after


def test_a_stage_goes_on_with_its_engine_where_it_can(without_vllm, tiny_dir, tmp_path):
    fn, said, after = settled(tmp_path, tiny_dir, "auto", "vllm")
    assert fn == after["value"] == "transformers"
    assert said == f"engine transformers: this stage began with vllm, but {after['why']}"
    fn, said, after = settled(tmp_path, tiny_dir, "auto", "transformers")
    assert (fn, after["why"]) == ("transformers", "of then")
    assert said == "engine transformers: as this stage began (of then)"


def test_a_named_engine_is_used_without_a_message(without_vllm, tiny_dir, tmp_path):
    for named in ("vllm", "reference", "mine:Engine"):
        fn, said, after = settled(tmp_path, tiny_dir, named, "transformers")
        assert fn == after["value"] == named
        assert said == ""


def test_installed_packages_decide_the_environment_of_the_process(monkeypatch):
    def nothing(name: str) -> str:
        raise auto.importlib.metadata.PackageNotFoundError(name)

    named = engines.environment(EngineConfig(fn="vllm"))
    assert engines.environment(EngineConfig(fn="auto")) == (named if auto.installed_vllm() else {})
    assert engines.environment(EngineConfig(fn="transformers")) == {}
    monkeypatch.setattr(auto.importlib.metadata, "version", nothing)
    assert engines.expected(EngineConfig()) == "transformers"
    assert engines.environment(EngineConfig()) == {}


STAGES = {
    "generate": {"model": "base", "task": "sums", "problems": 3},
    "score": {"model": "base", "data": "traces"},
    "eval": {"model": "base", "task": "sums"},
    "compare": {"arms": {"a": "base", "b": "base"}, "task": "sums"},
    "grpo": {"model": "base", "task": "sums", "rewards": [{"fn": "accuracy"}], "steps": 1},
    "on_policy": {"model": "base", "teacher": "base", "task": "sums", "loss": {"fn": "reverse_kl"}, "steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", STAGES)
def test_a_name_alone_is_an_engine_section(kind, tiny_dir):
    whole = tree(tiny_dir)
    whole["stages"]["one"] = {"kind": kind, **STAGES[kind], "engine": "reference"}
    assert recipe.validate(whole).stages["one"].engine == EngineConfig(fn="reference")
    del whole["stages"]["one"]["engine"]
    assert recipe.validate(whole).stages["one"].engine.fn == "auto"
    whole["stages"]["one"]["engine"] = "transformer"
    with pytest.raises(UserError, match=r"stages\.one\.engine\.fn: .*Did you mean 'transformers'"):
        plan.check_plugs(recipe.validate(whole))


@pytest.mark.slow
def test_a_model_that_vllm_does_not_support_is_run_by_transformers(tiny_dir, tmp_path):
    if engines.expected(EngineConfig()) != "vllm":
        pytest.skip("vLLM is not installed")
    assert engines.choose(EngineConfig(), tiny_dir) == engines.Choice("vllm", "it is installed and supports this model")
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    tokenizer = models.load_tokenizer(tiny_dir)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_layers=2, num_heads=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    models.save(GPTNeoForCausalLM(config), tokenizer, tmp_path / "neo")
    found = engines.choose(EngineConfig(), tmp_path / "neo")
    assert found.fn == "transformers"
    assert "vLLM does not support the architecture GPTNeoForCausalLM" in found.why
    # A problem that the user can solve is an error, not a reason for another engine.
    shutil.copytree(tiny_dir, tmp_path / "short")
    with pytest.raises(UserError, match="vLLM does not start"):
        engines.open_engine(
            EngineConfig(dtype="float32", kv_cache_gib=1e-6),
            tmp_path / "short",
            max_model_len=128,
            max_top_k=4,
        )
