"""Recipes: which mistakes are refused, and whether the message says how to fix them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from distill import plug, recipe
from distill.records import UserError
from distill.run import nodes, plan
from distill.tools import listing

BASE = """
name: r
models: {base: some/model}
tasks: {sums: {fn: reasoning_gym, dataset: chain_sum}}
stages:
  traces: {kind: generate, model: base, task: sums, problems: 10}
  kl: {kind: train, model: base, data: traces, epochs: 1}
  test: {kind: eval, model: kl, task: sums}
"""


def load(tmp_path: Path, *overrides: str, text: str = BASE) -> recipe.Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return recipe.load(path, list(overrides))


def test_a_good_recipe_and_its_overrides(tmp_path):
    loaded = load(tmp_path, "stages.kl.lr=1e-5", "stages.traces.sampling.temperature=0.7", "seed=3")
    assert loaded.stages["kl"].lr == 1e-5
    assert loaded.stages["traces"].sampling.temperature == 0.7
    assert loaded.seed == 3
    assert recipe.order(loaded) == ["traces", "kl", "test"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("stages.kl.learning=1", "stages.kl.learning: unknown key"),
        ("stages.kl.eposch=1", "Did you mean 'epochs'"),
        ("stages.traces.sampling.temprature=1", "Did you mean 'temperature'"),
        ("stages.kl.lr=fast", "stages.kl.lr:"),
        ("stages.kl.lr=-1", "greater than 0"),
        ("stages.kl.kind=trian", "Did you mean 'train'"),
        ("stages.kl.model=bose", "Did you mean 'base'"),
        ("stages.kl.model=traces", "stage of kind generate"),
        ("stages.kl.data=trces", "Did you mean 'traces'"),
        ("stages.kl.model=kl", "kl -> kl is a cycle"),
        ("stages.traces.model=kl", "is a cycle"),
        ("stages.traces.task=sum", "Did you mean 'sums'"),
        ("stages.kl.steps=4", "set exactly one of epochs, steps and budget"),
        ("stages.test.pass_at=[8]", "needs samples: 8 or more"),
        ("nmae=x", "Did you mean 'name'"),
        ("name=../up", "name:"),
        ("stages.kl.lora={rnk: 8}", "Did you mean 'rank'"),
    ],
)
@pytest.mark.fault(30)
def test_mistakes_are_one_message_with_the_key_and_the_way_out(tmp_path, override, said):
    with pytest.raises(UserError) as error:
        load(tmp_path, override)
    assert said in str(error.value)
    assert str(error.value).count("\n") <= 2


def test_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        recipe.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not valid YAML"):
        load(tmp_path, text="name: [")
    with pytest.raises(UserError, match="is a mapping"):
        load(tmp_path, text="- 1")
    with pytest.raises(UserError, match="key=value"):
        load(tmp_path, "lr")


@pytest.mark.parametrize("path", listing.recipe_files(), ids=lambda path: path.stem)
def test_every_recipe_of_the_project_checks(path, monkeypatch):
    monkeypatch.chdir(listing.RECIPES.parent)
    loaded = recipe.load(path)
    assert loaded.name == path.stem
    plan.check_plugs(loaded)
    assert sum(row.amounts["flops"] for row in plan.predict(loaded)) > 0


def test_a_wrong_plug_or_option_is_found_at_check_time(tmp_path):
    for override, said in [
        ("stages.kl.loss={fn: foward_kl}", "Did you mean 'forward_kl'"),
        ("stages.kl.loss={fn: forward_kl, temperatur: 2}", "temperatur: unknown key"),
        ("stages.traces.engine={fn: vlm}", "Did you mean 'vllm'"),
    ]:
        with pytest.raises(UserError) as error:
            plan.check_plugs(load(tmp_path, override))
        assert said in str(error.value)
    text = BASE + "  few: {kind: filter, data: traces, keep: [{fn: corect}]}\n"
    with pytest.raises(UserError, match="Did you mean 'correct'"):
        plan.check_plugs(load(tmp_path, text=text))


def test_a_user_s_own_function_is_a_plug(tmp_path, monkeypatch):
    (tmp_path / "mylosses.py").write_text(
        "def mine(student, targets, *, scale: float = 1.0):\n    return -scale * student.label_T\n"
    )
    monkeypatch.chdir(tmp_path)
    bound = plug.bind("mylosses:mine", {"scale": "2"}, "distill.training.loss.sparse")
    assert bound.keywords == {"scale": 2.0}
    with pytest.raises(UserError, match=r"scal: unknown key\. Did you mean 'scale'"):
        plug.bind("mylosses:mine", {"scal": 2}, "distill.training.loss.sparse")
    with pytest.raises(UserError, match="cannot import"):
        plug.bind("mylosses:other", {}, "distill.training.loss.sparse")


def test_an_unreachable_model_is_unverified_in_check_not_failed(tmp_path):
    rows = plan.predict(load(tmp_path))
    assert any("unverified" in note for row in rows for note in row.notes)


def test_roles_are_stated_for_every_field_that_may_change():
    roles = {kind: {name: model.role(name) for name in model.model_fields} for kind, model in recipe.KINDS.items()}
    assert roles["generate"]["problems"] == roles["generate"]["samples"] == "growth"
    assert roles["train"]["epochs"] == roles["train"]["steps"] == "growth"
    assert roles["train"]["lr"] == roles["generate"]["top_logprobs"] == "identity"
    assert roles["train"]["micro_tokens"] == roles["generate"]["shard_rows"] == "execution"


def test_a_resolved_recipe_reads_back_the_same(tmp_path):
    loaded = load(tmp_path)
    again = recipe.validate(yaml.safe_load(yaml.safe_dump(loaded.model_dump(mode="json"))))
    assert again == loaded


def test_the_stages_of_a_kind_are_selected_and_a_kind_that_is_not_there_is_named(tmp_path):
    text = BASE + "  verdict: {kind: compare, arms: {base: base, kl: kl}, task: sums}\n"
    loaded = load(tmp_path, text=text)

    def names(*kinds: str) -> list[str]:
        return [node.name for node in nodes.select(loaded, kinds=kinds)]

    assert names("train") == ["kl"]
    assert names("eval") == ["test", "verdict.base", "verdict.kl"]
    assert names("compare") == ["verdict.base", "verdict.kl", "verdict"]
    assert names("generate", "train") == ["traces", "kl"]
    with pytest.raises(UserError, match=r"there is no stage kind 'trian'\. Did you mean 'train'"):
        names("trian")
    with pytest.raises(
        UserError, match=r"no stage of this recipe is of kind 'prune'\. Its kinds are: compare, eval, generate"
    ):
        names("prune")


RL = {"kind": "grpo", "model": "base", "task": "t", "rewards": [{"fn": "accuracy"}], "steps": 1}


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({**RL, "engine": {"tensor_parallel": 2}, "distributed": 2}, "engine.tensor_parallel: 2 processes have an engine each"),
        ({"kind": "generate", "model": "base", "task": "t", "problems": 1, "engine": {"sleep": True}}, "engine.sleep: nothing trains"),
    ],
)  # fmt: skip
def test_engine_settings_that_exclude_each_other_are_refused(stage, words):
    task = {"fn": "reasoning_gym", "dataset": "chain_sum", "template": "think_answer"}
    tree = {"name": "t", "models": {"base": "a/b"}, "tasks": {"t": task}, "stages": {"s": stage}}
    with pytest.raises(UserError) as error:
        recipe.validate(tree)
    assert words in str(error.value)
    kept = {key: value for key, value in stage.items() if key != "engine"}
    recipe.validate({**tree, "stages": {"s": kept}})


# ------------------------------------------------------------------------------------------- served engines

SERVED = {"fn": "openai", "base_url": "http://localhost:8000/v1", "model": "m"}


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"fn": "openai"}, "needs base_url and model"),
        ({**SERVED, "key": "sk-123"}, "as $NAME"),
        ({**SERVED, "key": 123}, "as $NAME"),
        ({**SERVED, "base_url": "localhost:8000"}, "http://host:port/v1"),
        ({**SERVED, "base_url": "https://me:sk-123@host/v1"}, "named by key"),
        ({**SERVED, "base_url": "https://host/v1?key=sk-123"}, "named by key"),
        ({**SERVED, "kv_cache_gib": 1}, "kv_cache_gib: the endpoint decides"),
        ({**SERVED, "tensor_parallel": 2}, "tensor_parallel: the endpoint decides"),
        ({**SERVED, "dtype": "float32"}, "dtype: the endpoint decides"),
        ({"fn": "vllm", "price": {"input": 1, "output": 2}}, "set fn: openai"),
        ({**SERVED, "api_key": "sk-123"}, "'key'"),
        ({**SERVED, "max_concurrency": 3}, "'batch_size'"),
        ({**SERVED, "price": {"input": -1, "output": 2}}, "price.input"),
    ],
)
def test_fields_of_a_served_engine(engine, message):
    stage = {"kind": "eval", "model": "base", "task": "sums", "engine": engine}
    task = {"fn": "reasoning_gym", "dataset": "chain_sum"}
    tree = {"name": "t", "models": {"base": "a/b"}, "tasks": {"sums": task}, "stages": {"e": stage}}
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        recipe.validate(tree)
    assert "sk-123" not in str(refused.value)


def test_a_served_model_needs_no_weights_here():
    served = {"kind": "eval", "model": "big", "task": "sums", "engine": {**SERVED, "key": "${SOME_KEY}"}}
    local = {"kind": "eval", "model": "base", "task": "sums"}
    task = {"fn": "reasoning_gym", "dataset": "chain_sum"}
    tree = {
        "name": "t",
        "models": {"base": "a/b", "big": "c/d"},
        "tasks": {"sums": task},
        "stages": {"e": served, "f": local},
    }
    assert recipe.served_models(recipe.validate(tree)) == {"big"}
    tree["stages"]["g"] = {**local, "model": "big"}
    assert recipe.served_models(recipe.validate(tree)) == set()
