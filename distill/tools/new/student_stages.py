"""The stages of a new recipe that make, train and measure the students."""

from __future__ import annotations

from pathlib import Path

from distill.tools.new.settings import Settings
from distill.tools.new.stage_keys import rows, sampling
from distill.tools.new.yaml_lines import Lines


def pruned(lines: Lines, settings: Settings) -> None:
    """Add the stage that makes the student out of the teacher."""
    data = "traces" if settings.learn_from == "teacher" else "scored"
    lines.comment("The student: the teacher without some of its layers, mended on the teacher's traces.", 1)
    lines.key(1, "student")
    lines.key(2, "kind", "prune")
    lines.key(2, "model", "teacher")
    lines.key(2, "layers", settings.layers, f"of {settings.teacher.shape.layers}; fewer are faster and worse")
    lines.key(2, "by", "block_influence", "leaves out the layers that change a hidden state least")
    lines.key(2, "data", data)
    lines.key(2, "positions", 1024, "tokens that this is measured on")
    lines.key(2, "repair", True, "fits the matrices before each gap to the whole teacher")


def students(lines: Lines, settings: Settings, folder: Path) -> None:
    """Add the stages that train the students."""
    kl = (
        "the teacher's distribution at every token"
        if settings.stores
        else "the teacher's distributions, where both cut the text alike"
    )
    _student(lines, settings, folder, "kl", f"The student that learns {kl}.")
    _student(lines, settings, folder, "sft", "The student that learns the text alone, for comparison.")


def _student(lines: Lines, settings: Settings, folder: Path, name: str, what: str) -> None:
    lines.comment(what, 1)
    lines.key(1, name)
    lines.key(2, "kind", "train")
    lines.key(2, "model", "student")
    if settings.learn_from == "teacher":
        lines.key(2, "data", "clean")
        if not settings.same_tokens:
            lines.key(2, "task", "questions", "renders the prompts in the student's own tokens")
    elif name == "kl" and settings.stores:
        lines.key(2, "data", "scored")
    else:
        rows(lines, settings, folder)
    if name == "sft":
        lines.key(2, "loss", {"fn": "cross_entropy"})
    elif settings.stores:
        lines.key(
            2,
            "loss",
            {"fn": "forward_kl"},
            "others: distill ls losses; ce_kl learns the text as well, for a teacher that is often wrong",
        )
    else:
        lines.key(2, "loss", {"fn": "aligned"}, "between different tokenizers; the other one is uld")
        lines.key(2, "teacher", "teacher", "runs beside the student while it trains")
    _optimiser(lines, settings)


def _optimiser(lines: Lines, settings: Settings) -> None:
    how = settings.training
    lines.key(
        2,
        "lr",
        settings.lr,
        "peak learning rate; if the loss jumps, a third of it"
        + ("; adapters want more than full training" if how.rank else ""),
    )
    lines.key(2, "warmup_ratio", 0.1, "share of the steps in which it rises from 0")
    lines.key(
        2, "epochs", settings.epochs, f"passes over the data: about {settings.steps} steps of {settings.batch} traces"
    )
    lines.key(2, "batch_traces", settings.batch, "traces in a step; sized so that there are at least some 40 steps")
    lines.key(
        2,
        "micro_tokens",
        how.micro_tokens,
        "tokens in memory at a time; lower it if memory is short, results stay the same",
    )
    if how.checkpointing:
        lines.key(2, "gradient_checkpointing", True, "less memory, about a third slower; results stay the same")
    if how.rank:
        lines.key(
            2, "lora", {"rank": how.rank, "alpha": 32}, "an adapter: training all weights does not fit the memory"
        )


def results(lines: Lines, settings: Settings) -> None:
    """Add the stages that measure the students, or that show what they say where nothing can be measured."""
    if settings.judged and settings.held_out:
        _verdict(lines, settings)
    if settings.measures_distance and (settings.apart or not settings.judged):
        lines.comment(
            "How near to the teacher each student is on held-out questions, in nats a token (0 = the same model).", 1
        )
        for name, model in (("near_start", "student"), ("near_kl", "kl"), ("near_sft", "sft")):
            lines.key(1, name, {"kind": "divergence", "model": model, "data": "unseen"})
    if settings.held_out and not settings.judged and not settings.measures_distance:
        lines.comment(
            "No number tells these students apart: read what they say, with distill inspect runs/NAME/kl_says.", 1
        )
        shared = {"task": "questions", "split": "held_out", "problems": settings.unseen}
        for model in ("kl", "sft"):
            sampling = {"temperature": 0, "max_tokens": settings.max_tokens}
            stage = {"kind": "generate", "model": model, **shared, "sampling": sampling, "top_logprobs": 0}
            lines.key(1, f"{model}_says", stage)


def _verdict(lines: Lines, settings: Settings) -> None:
    with_distance = settings.measures_distance and not settings.apart
    near = ", and how near to the teacher they are" if with_distance else ""
    lines.comment(f"The result: accuracy of all models on the same held-out questions{near}.", 1)
    lines.key(1, "verdict")
    lines.key(2, "kind", "compare")
    teacher = {} if settings.endpoint else {"teacher": "teacher"}
    lines.key(
        2, "arms", {**teacher, "start": "student", "kl": "kl", "sft": "sft"}, "start: the student before training"
    )
    lines.key(2, "task", "questions")
    why = f"held-out questions, of {settings.held_out}; more give narrower intervals"
    lines.key(2, "problems", settings.measured, why)
    sampling(lines, settings, 0, "0: the likeliest token each time")
    if with_distance:
        lines.key(2, "targets", "unseen", "measures the KL to the teacher there")
    lines.key(2, "engine", {"batch_size": 256 if settings.device == "cuda" else 64})
    if settings.endpoint:
        lines.comment("The teacher on the same questions, at its endpoint.", 1)
        lines.key(1, "teacher_verdict")
        lines.key(2, "kind", "eval")
        lines.key(2, "model", "teacher")
        lines.key(2, "task", "questions")
        lines.key(2, "problems", settings.measured)
        sampling(lines, settings, 0, "0: the likeliest token each time")
        lines.key(2, "engine", settings.endpoint.section(settings.engine_batch))
