"""prune stages that measure: layers, widths and repair on stored traces, up to the model on the disk, the card and the costs."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_architectures import build
from transformers import AutoModelForCausalLM

from distill import models, recipe, run_folder
from distill.machine import Machine, Rates
from distill.models.saving import label_logps
from distill.progress import Screen
from distill.records import UserError
from distill.run import decide, nodes
from distill.run.model_card import ranges, write
from distill.run.plan import check_plugs, predict
from distill.stages import prune
from distill.stages.context import Context, Result

MACHINE = Machine(
    "",
    "cpu",
    "two cores",
    2,
    24 * 2**30,
    5e10,
    {"32x48": {"float32": Rates(1e11, 1e11, 1e11, 1e11), "bfloat16": Rates(1e11, 1e11, 1e11, 1e11)}},
)


@pytest.fixture(scope="module")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of four layers and two head groups behind the tokenizer of the traces."""
    folder = tmp_path_factory.mktemp("base")
    model = build("llama", len(tokenizer), tie_word_embeddings=True)
    models.save(model, tokenizer, folder)
    return folder


def resolved(base: Path, **stage: Any) -> recipe.Recipe:
    tree = {"name": "t", "models": {"base": str(base)}, "stages": {"s": {"kind": "prune", "model": "base", **stage}}}
    return recipe.validate(tree)


def run(base: Path, folder: Path, **stage: Any) -> tuple[Result, Context]:
    context = Context(recipe=resolved(base, **stage), run=folder, name="s", screen=Screen(io.StringIO()))
    context.folder.mkdir(parents=True)
    config: Any = context.recipe.stages["s"]
    return prune.run(config, context), context


def test_layers_and_widths_by_measurement_are_saved_and_recorded(base: Path, written: Path, tmp_path: Path) -> None:
    stage = {"layers": 3, "by": "importance", "ffn": 40, "heads": 2, "repair": True, "data": str(written / "traces"),
             "positions": 64}  # fmt: skip
    result, context = run(base, tmp_path, **stage)
    record = json.loads((context.folder / "pruned.json").read_text())
    kept = result.metrics["layers_kept"]
    assert kept == record["layers_kept"]
    assert len(kept) == 3
    assert [one["layer"] for one in record["removed"]] == sorted(set(range(4)) - set(kept))
    assert record["layers"] == 4
    assert record["widths"] == {"hidden": 32, "ffn": 40, "heads": 2}
    assert [len(each) for each in record["channels"]["ffn"]] == [40] * 3
    assert [len(each) for each in record["channels"]["groups"]] == [1] * 3
    assert record["channels"]["hidden"] is None
    assert record["repair"]["after"] <= record["repair"]["before"]
    assert record["kl"] >= 0
    saved = AutoModelForCausalLM.from_pretrained(context.folder / "model")
    config = saved.config
    assert (config.num_hidden_layers, config.intermediate_size, config.num_attention_heads) == (3, 40, 2)
    assert sum(p.numel() for p in saved.parameters()) == result.metrics["params"]
    # 8 traces of 6 tokens: each passes some of four layers many times.
    assert result.cost.tokens_scored > 8 * 6
    assert result.cost.flops > 0


def test_evenly_spaced_layers_need_no_data_and_cost_nothing(base: Path, tmp_path: Path) -> None:
    result, context = run(base, tmp_path, layers=2)
    assert result.metrics["layers_kept"] == [0, 3]
    assert result.cost.flops == 0
    whole = models.load(base, dtype="float32")
    models.prune_layers(whole, [0, 3])
    saved = models.load(context.folder / "model", dtype="float32")
    assert float((label_logps(saved) - label_logps(models.cast(whole, "bfloat16").float())).abs().max()) < 1e-4


def test_the_card_says_which_layers_and_widths_are_left(base: Path, written: Path, tmp_path: Path) -> None:
    stage = {"layers": 3, "by": "block_influence", "ffn": 40, "data": str(written / "traces")}
    result, context = run(base, tmp_path, **stage)
    state = run_folder.State(kind="prune", config={}, inputs={}, status="done", seconds=1.0, metrics=result.metrics)
    run_folder.write(context.folder, state)
    card = write(context.recipe, tmp_path, "s")
    assert card is not None
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in card.read_text().splitlines()]
    assert ["s", "layers kept", f"3 of 4: {ranges(result.metrics['layers_kept'])}"] in rows
    assert ["s", "width (ffn)", "40"] in rows
    assert ranges([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({}, "stages.s: nothing to prune: set layers, or a width (hidden, ffn, heads)"),
        ({"ffn": 40}, "stages.s: cutting a width needs data"),
        ({"layers": 2, "by": "importance"}, "stages.s: by: importance needs data"),
        ({"layers": 2, "repair": True}, "stages.s: repair needs data"),
        ({"ffn": 40, "by": "importance", "data": "./x"}, "by: importance chooses layers, but all are kept; set layers"),
        ({"layers": 2, "data": "./x"}, "data: evenly spaced layers are chosen without it; set by: importance"),
        (
            {"layers": 2, "positions": 100},
            "positions: evenly spaced layers are chosen without traces; remove positions",
        ),
        ({"layers": 1}, "stages.s.layers"),
    ],
)
def test_keys_that_do_nothing_together_are_refused(base: Path, stage: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        resolved(base, **stage)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({"layers": 5}, "stages.s.layers: the model has 4 layers; keep between 2 and 4, not 5."),
        ({"ffn": 56}, "stages.s.ffn: the model has 48; keep that many or fewer, not 56."),
        ({"heads": 3}, "stages.s.heads: 3 query heads do not divide into groups of 2"),
        ({"hidden": 12}, "stages.s.hidden: 12 is not a multiple of 8"),
    ],
)
def test_sizes_that_cannot_be_had_are_refused_before_the_run(
    base: Path, written: Path, stage: dict[str, Any], said: str
) -> None:
    data = {} if "layers" in stage else {"data": str(written / "traces")}
    with pytest.raises(UserError, match=re.escape(said)):
        predict(resolved(base, **stage, **data), MACHINE)


def test_data_that_cannot_be_used_is_refused_before_the_run(base: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"question": "1 + 1?", "completion": "2"}\n')
    with pytest.raises(
        UserError, match=r"stages\.s\.data: .*chat\.jsonl' holds no traces; name a stage of kind generate"
    ):
        check_plugs(resolved(base, layers=2, by="importance", data=str(tmp_path / "chat.jsonl")))
    tree: dict[str, Any] = {
        "name": "t", "models": {"base": str(base)}, "tasks": {"a": {"fn": "reasoning_gym", "dataset": "chain_sum"}},
        "stages": {
            "text": {"kind": "generate", "model": "base", "task": "a", "problems": 8, "top_logprobs": 0},
            "kept": {"kind": "filter", "data": "text", "keep": [{"fn": "finished"}]},
            "s": {"kind": "prune", "model": "base", "layers": 2, "by": "importance", "data": "kept"},
        },
    }  # fmt: skip
    with pytest.raises(
        UserError, match=r"stages\.s\.data: by: importance compares .* 'text' has none \(top_logprobs: 0\)"
    ):
        check_plugs(recipe.validate(tree))
    tree["stages"]["s"]["by"] = "block_influence"
    check_plugs(recipe.validate(tree))
    models.save(build("gemma2", len(tokenizer)), tokenizer, tmp_path / "gemma")
    tree["models"]["base"] = str(tmp_path / "gemma")
    tree["stages"]["s"] = {"kind": "prune", "model": "base", "ffn": 40, "data": "kept"}
    with pytest.raises(UserError, match=r"stages\.s\.hidden, ffn, heads: the widths of a gemma2 model cannot be cut"):
        check_plugs(recipe.validate(tree))


def test_traces_of_another_tokenizer_and_too_few_are_refused(
    base: Path, foreign_dir: Path, written: Path, tmp_path: Path
) -> None:
    data = str(written / "traces")
    with pytest.raises(UserError, match=r"stages\.s\.data: the traces of .* are of another tokenizer"):
        run(foreign_dir, tmp_path, ffn=24, data=data)
    few = tmp_path / "few"
    shutil.copytree(written / "traces", few)
    from distill.recipe.fields import PlugConfig
    from distill.traces.selection import select

    select(few, tmp_path / "one", [PlugConfig(fn="best_of_n", n=1)])
    with pytest.raises(UserError, match=r"has 4 traces of 1 to 4096 tokens; pruning by measurement needs 8"):
        run(base, tmp_path / "r", ffn=40, data=str(tmp_path / "one"))


def test_the_predicted_passes_are_about_those_that_were_made(base: Path, written: Path, tmp_path: Path) -> None:
    stage = {"layers": 2, "by": "importance", "data": str(written / "traces"), "positions": 64}
    (row,) = predict(resolved(base, **stage, repair=True), MACHINE)
    result, _ = run(base, tmp_path, **stage, repair=True)
    assert 0.5 < row.amounts["flops"] / result.cost.flops < 2
    assert row.memory.activations > 0


def test_a_stage_that_is_older_than_a_field_has_its_default(base: Path, tmp_path: Path) -> None:
    """A prune stage of an earlier version, whose record has no `by`, is not done again, and is refused with another value."""
    old = resolved(base, layers=2)
    config = {
        key: value
        for key, value in old.stages["s"].model_dump(mode="json").items()
        if key in ("kind", "model", "layers", "seed", "seeds")
    }
    (node,) = nodes.nodes(old)
    inputs = decide.input_fingerprints(node, old, tmp_path)
    (tmp_path / "s").mkdir()
    run_folder.write(tmp_path / "s", run_folder.State(kind="prune", config=config, inputs=inputs, status="done"))
    assert decide.decide(node, old, tmp_path).action == "skip"
    (changed,) = nodes.nodes(resolved(base, layers=2, by="block_influence", data=str(tmp_path / "s")))
    with pytest.raises(UserError, match=r'by: "even" -> "block_influence"'):
        decide.decide(changed, old, tmp_path)
