"""What a student loses to stored top-k targets: against exact ones over the whole vocabulary, and against the text alone.

    python tests/bench/bench_targets.py [--steps 24] [--batch 8] [--tokens 96] [--held-out 48] [--layers 24] [--lr 3e-4] [--seeds 17]
        [--arms k64-mass0.98 k64-mass0.98-own_token ...]

SmolLM2-135M-Instruct answers open-ended prompts at temperature 1: flat distributions, the hard case for k entries. One
capture (vLLM, k = 128, mass 1, float32) is cut down to each setting, so that every student sees the same tokens in
the same batches from the same start: the teacher without every fifth layer. That leaves nats to learn which can only come
from the targets; of a noised copy, which is there already but for its noise, any target would do.
The arms whose names end in own_token, own_token-half and draws4 estimate the tail in these ways instead of by the bucket; for
draws the same traces are scored by the teacher with `tail_draws`.
Each student is trained by the project's own recipe stages. The measure is the KL over the whole vocabulary, teacher to
student, on traces of other prompts, in fp32 and with the teacher's own weights rather than what was stored.

Captured once and kept in tests/bench/out; students are trained anew each time.
Shapes: T positions, C of them in a chunk, D hidden size, V vocabulary, N held-out traces.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import chat_traces
import harness
import numpy as np
import torch
import yaml
from torch import Tensor

from distill import models, recipe
from distill.records import Array, Traces, stable_hash
from distill.reports.statistics import bca
from distill.run import nodes, pipeline
from distill.traces.reader import TraceReader, open_traces
from distill.traces.writer import TraceWriter

OUT = Path(__file__).parent / "out"
WIDTH = 128
"""Entries captured a position: the most that a setting can ask for."""
CHUNK = 256
"""Positions whose whole rows of logits are held at a time."""
SUBJECTS = (
    *chat_traces.SUBJECTS, "a broken clock", "deserts", "making bread", "the moon", "spiders", "a long train journey",
    "saving money", "volcanoes", "learning to swim", "libraries", "thunderstorms", "an empty house", "chess", "rivers",
    "growing tomatoes", "sleep", "islands", "a letter that arrives late", "mirrors", "whales", "markets", "mathematics",
    "snow", "an old photograph", "bicycles", "honesty", "glass", "penguins", "the first day of school", "maps", "cheese",
    "a forgotten garden", "lighthouses", "running a race", "the wind", "owls", "painting a wall", "trains", "coffee",
    "a quiet neighbour",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one experiment: `steps` optimiser steps of `batch` traces of at most `tokens` tokens, each seen once.

    held_out: traces that the students are measured on. layers: that the student keeps of its teacher's 30.
    """

    steps: int = 24
    batch: int = 8
    tokens: int = 96
    held_out: int = 48
    layers: int = 24
    lr: float = 3e-4

    @property
    def home(self) -> Path:
        """Where what is captured for these sizes is kept."""
        asked = (self.steps * self.batch, self.tokens, self.held_out, self.layers)
        return OUT / f"targets-{stable_hash(asked, SUBJECTS, length=8)}"


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to teach. top_k and mass are of the stored targets; top_k None reads none: the teacher is in the trainer.

    tail, bucket_share: options of the loss. draws: `tail_draws` of the stored targets.
    """

    top_k: int | None = 64
    mass: float = 1.0
    loss: str = "forward_kl"
    tail: str = "bucket"
    bucket_share: float = 0.0
    draws: int = 0

    @property
    def name(self) -> str:
        if self.loss == "cross_entropy":
            return "text"
        if self.top_k is None:
            return "online"
        tail = {"bucket": ""}.get(self.tail, f"-{self.tail}") + (str(self.draws) if self.draws else "")
        return f"k{self.top_k}-mass{self.mass:g}{tail}{'-half' if self.bucket_share else ''}"

    @property
    def options(self) -> dict[str, Any]:
        """The loss as a recipe has it."""
        if self.loss == "cross_entropy" or self.top_k is None:
            return {"fn": self.loss}
        return {
            "fn": self.loss,
            "tail": self.tail,
            **({"bucket_share": self.bucket_share} if self.bucket_share else {}),
        }


ONLINE, TEXT = Arm(None), Arm(loss="cross_entropy")
DRAWS = 4
TAILS = ((64, 0.98), (16, 0.95))
"""Settings at which the tail is estimated in every way."""


def tails(top_k: int, mass: float) -> list[Arm]:
    """Every estimate of the tail at a setting; the first three take the same bytes."""
    return [
        Arm(top_k, mass),
        Arm(top_k, mass, tail="own_token"),
        Arm(top_k, mass, tail="own_token", bucket_share=0.5),
        Arm(top_k, mass, tail="draws", draws=DRAWS),
    ]


ARMS = (*(arm for setting in TAILS for arm in tails(*setting)), Arm(), ONLINE, TEXT)


def main() -> None:
    asked, sizes = arguments(__doc__)
    capture(sizes)
    held_out, rows = HeldOut.of(sizes), []
    for seed in asked.seeds:
        batches: set[tuple[int, ...]] = set()
        rows.append({"seed": seed, "student": "start", **kl_columns(held_out.kl(start(sizes)))})
        found = {}
        for arm in ARMS:
            if asked.arms and arm != ONLINE and arm.name not in asked.arms:
                continue
            student = train(arm, sizes, seed, keep=asked.keep)
            found[arm.name] = held_out.kl(student)
            print(arm.name, kl_columns(found[arm.name]), flush=True)
            batches.add(batches_of(student))
        assert len(batches) == 1, "the students did not see the same batches"
        rows += [
            {"seed": seed, "student": name, **kl_columns(kl_N), **beside(kl_N, found[ONLINE.name])}
            for name, kl_N in found.items()
        ]
    harness.report("targets", rows, OUT)


def arguments(about: str | None, **files: Path) -> tuple[argparse.Namespace, Sizes]:
    """What is on the command line, and the sizes in it. files: further options, with their defaults."""
    parser = argparse.ArgumentParser(description=about)
    for field in dataclasses.fields(Sizes):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17])
    parser.add_argument("--arms", nargs="+", default=[], help="names of the arms to train besides online; none = all")
    parser.add_argument("--keep", action="store_true", help="take students that were trained before")
    for option, path in files.items():
        parser.add_argument(f"--{option}", type=Path, default=path)
    asked = parser.parse_args()
    return asked, Sizes(**{f.name: getattr(asked, f.name) for f in dataclasses.fields(Sizes)})


def kl_columns(kl_N: Array) -> dict[str, float]:
    """The held-out KL in nats a token, with its 95% interval over traces."""
    interval = bca(kl_N)
    return {"KL": interval.value, "KL from": interval.low, "KL to": interval.high}


def beside(kl_N: Array, exact_N: Array) -> dict[str, float]:
    """How much larger than the online student's KL, in percent of it, trace by trace."""
    interval = bca(100 * (kl_N - exact_N) / exact_N.mean())
    return {"over online %": interval.value, "% from": interval.low, "% to": interval.high}


# ------------------------------------------------------------------------------------- what is captured


def capture(sizes: Sizes) -> None:
    """Make the traces and the students' start, where they are not there yet."""
    questions = sizes.home / "questions.jsonl"
    questions.parent.mkdir(parents=True, exist_ok=True)
    asked = [form.format(subject) for subject in SUBJECTS for form in chat_traces.FORMS]
    lines = [json.dumps({"question": text, "answer": "any"}) + "\n" for text in asked]
    questions.write_text("".join(lines), encoding="utf-8")
    run_recipe(
        sizes.home / "capture",
        models={"teacher": {"source": chat_traces.SOURCE}},
        tasks={"chat": {"fn": "jsonl", "path": str(questions), "judge": "exact", "template": "distill.stages.inputs.score_inputs:AS_IT_IS"}},
        stages={
            "traces": {"kind": "generate", "model": "teacher", "task": "chat", "problems": sizes.steps * sizes.batch + sizes.held_out,
                       "sampling": {"max_tokens": sizes.tokens}, "top_logprobs": WIDTH, "mass": 1.0, "exact": True, "engine": {"batch_size": 96}},
            "start": {"kind": "prune", "model": "teacher", "layers": sizes.layers},
        },
    )  # fmt: skip


def run_recipe(folder: Path, seed: int = 17, **tree: Any) -> None:
    """Do all stages of a recipe, each in a process of its own; what is done already is skipped."""
    source = folder.with_name(f"{folder.name}.yaml")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(yaml.safe_dump({"name": "targets", "seed": seed, **tree}), encoding="utf-8")
    resolved = recipe.load(source)
    pipeline.Runner(resolved, source, folder).do(nodes.nodes(resolved))


def start(sizes: Sizes) -> Path:
    return sizes.home / "capture" / "start" / "model"


def captured(sizes: Sizes, *, held_out: bool) -> TraceReader:
    """The traces to learn from, or those to be measured on: no prompt is in both."""
    reader = open_traces(sizes.home / "capture" / "traces" / "traces")
    ids = [i for block in reader.blocks(columns=["trace_id"]) for i in block.trace_id]
    kept = set(sorted(ids)[: sizes.held_out])
    return reader.where(np.array([(i in kept) == held_out for i in ids], bool))


def cut(sizes: Sizes, top_k: int, mass: float, *, held_out: bool = False) -> Path:
    """A folder of what `generate` would have stored at this top_k and mass."""
    folder = sizes.home / "cut" / f"k{top_k}-mass{mass:g}" / ("held_out" if held_out else "train")
    shutil.rmtree(folder, ignore_errors=True)
    reader = captured(sizes, held_out=held_out)
    metadata = reader.metadata.model_copy(update={"top_k": top_k, "mass": mass, "exact": False})
    assert metadata.schema_version == 1
    with TraceWriter(folder, metadata) as writer:
        for block in reader.blocks():
            assert block.top is not None
            writer.add(dataclasses.replace(block, top=block.top.truncate(top_k=top_k, mass=mass)))
    return folder


def stored(arm: Arm, sizes: Sizes, *, held_out: bool = False) -> Path:
    """The folder of traces that an arm learns from: cut from the capture, or scored with draws from the tail."""
    assert arm.top_k is not None
    if not arm.draws:
        return cut(sizes, arm.top_k, arm.mass, held_out=held_out)
    run = sizes.home / "scored" / f"{arm.name}-{'held_out' if held_out else 'train'}"
    if not (run / "again" / "stage.json").is_file():
        stage = {
            "kind": "score", "model": "teacher", "data": str(cut(sizes, 1, 1.0, held_out=held_out)), "top_logprobs": arm.top_k,
            "mass": arm.mass, "tail_draws": arm.draws, "engine": {"batch_size": 32},
        }  # fmt: skip
        run_recipe(run, models={"teacher": {"source": chat_traces.SOURCE}}, stages={"again": stage})
    return run / "again" / "traces"


# --------------------------------------------------------------------------------------------- students


def train(arm: Arm, sizes: Sizes, seed: int, *, keep: bool = False) -> Path:
    """The model that an arm trains, from the start, by a recipe's train stage. keep: one from before will do."""
    run = sizes.home / f"{arm.name}-lr{sizes.lr:g}-seed{seed}"
    if keep and (run / "student" / "model").is_dir():
        return run / "student" / "model"
    shutil.rmtree(run, ignore_errors=True)
    stage: dict[str, Any] = {
        "kind": "train", "model": "start", "data": str(cut(sizes, 1, 1.0) if arm in (ONLINE, TEXT) else stored(arm, sizes)),
        "loss": arm.options, "lr": sizes.lr, "steps": sizes.steps, "batch_traces": sizes.batch, "keep_truncated": True,
    }  # fmt: skip
    if arm == ONLINE:
        stage["teacher"] = "teacher"
    sources = {"teacher": chat_traces.SOURCE, "start": str(start(sizes))}
    run_recipe(
        run,
        seed,
        models={name: {"source": source} for name, source in sources.items()},
        stages={"student": stage},
    )
    shutil.rmtree(run / "student" / "checkpoints")
    return run / "student" / "model"


def batches_of(student: Path) -> tuple[int, ...]:
    """The tokens of every step: traces differ in length, so other batches would show."""
    lines = (student.parent / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line)["tokens"] for line in lines)


@dataclass(frozen=True, slots=True, eq=False)
class HeldOut:
    """The traces that students are measured on, and the teacher's last hidden states there, fp32."""

    traces: Traces
    teacher_TD: Tensor
    head_VD: Tensor

    @staticmethod
    def of(sizes: Sizes) -> HeldOut:
        traces = next(captured(sizes, held_out=True).blocks(sizes.held_out))
        teacher = models.resolve(recipe.ModelConfig(source=chat_traces.SOURCE))
        return HeldOut(traces, *hidden_and_head(teacher, traces))

    def kl(self, student: Path) -> Array:
        """[N] KL(teacher || student) over the whole vocabulary, in nats a token.

        Of each trace the sum over its tokens by the mean number of tokens, so that the mean over traces is that over tokens.
        """
        student_TD, head_VD = hidden_and_head(student, self.traces)
        parts = []
        for teacher_CD, mine_CD in zip(self.teacher_TD.split(CHUNK), student_TD.split(CHUNK), strict=True):
            logp_CV = (teacher_CD @ self.head_VD.T).log_softmax(1)
            logq_CV = (mine_CD @ head_VD.T).log_softmax(1)
            parts.append((logp_CV.exp() * (logp_CV - logq_CV)).sum(1))
        kl_T = torch.cat(parts).double().numpy()
        offsets = self.traces.completion_ids.offsets
        return np.add.reduceat(kl_T, offsets[:-1]) * len(self.traces) / len(kl_T)


def hidden_and_head(folder: Path, traces: Traces) -> tuple[Tensor, Tensor]:
    """A model's last hidden states [T, D] that predict the traces' tokens, and its head [V, D], fp32."""
    model = models.load(folder, dtype="float32").eval()
    rows = [[column[n] for n in range(len(traces))] for column in (traces.prompt_ids, traces.completion_ids)]  # fmt: skip
    hidden_TD = torch.from_numpy(chat_traces.hidden(model, *rows))
    return hidden_TD, model.get_output_embeddings().weight.detach()


if __name__ == "__main__":
    main()
