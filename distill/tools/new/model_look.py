"""Look at a teacher and a student before a recipe is written for them: sizes, tokenizers, chat templates, contexts.

Only config and tokenizer are read, and fetched from the hub if need be; weights are not, but for a GGUF file, which is converted once.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from distill import models
from distill.compute.flops import ModelShape
from distill.errors import MachineError
from distill.models import architectures
from distill.models import hub as hubs
from distill.models.locate import PACKAGE
from distill.recipe import ModelConfig
from distill.records import UserError
from distill.run.known_sizes import model_shape

PRUNED = ("pruned", "prune")
"""Words for a student that is made of the teacher; the first is the one that pages name."""


@dataclass(frozen=True, slots=True)
class ModelLook:
    """What is known of a model. source: as a recipe names it. context: tokens that fit, None = unknown. tokenizer: its fingerprint,
    "" if it is not on this machine. chat: whether it has a chat template. quantised: the method, or ""."""

    source: str
    shape: ModelShape
    context: int | None
    tokenizer: str
    chat: bool
    chat_template: str
    quantised: str

    @property
    def params(self) -> float:
        """The number of parameters."""
        return float(self.shape.params_total)

    def words(self) -> str:
        """Describe the model in a line."""
        parts = [count(self.params), f"{self.shape.layers} layers"]
        parts += [f"context {self.context:,}"] if self.context else []
        if not self.tokenizer:
            parts.append("not on this machine: sizes from the table of known models")
        else:
            parts.append("chat template" if self.chat else "no chat template (a base model)")
        return ", ".join(parts) + (f", quantised ({self.quantised})" if self.quantised else "")


def count(params: float) -> str:
    """A number of parameters in words: 135 million, 7.6 billion."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if params >= size:
            return f"{params / size:.3g} {word} parameters"
    return f"{params:.0f} parameters"


def source_of(text: str) -> str:
    """Return a model as a recipe names it; `package:NAME` is short for the one GGUF file in that package. Raises UserError."""
    text = text.strip()
    if text.startswith("package:") and not text.startswith(PACKAGE):
        text = PACKAGE + text.removeprefix("package:")
    if not text.startswith(PACKAGE):
        return text
    package, _, file = text.removeprefix(PACKAGE).partition("/")
    if file:
        return text
    there = models.package_files(text)
    if len(there) != 1:
        raise UserError(f"{text}: name one of the GGUF files in the package: {', '.join(there) or 'it has none'}.")
    return f"{PACKAGE}{package}/{there[0]}"


def look_at(text: str, *, elsewhere: bool = False) -> ModelLook:
    """Look at a model. elsewhere: whether the recipe runs on another machine, so that a known hub id will do.

    Raises UserError if it cannot be had, with the ways that work.
    """
    source = source_of(text)
    if not source:
        raise UserError("name a model: a hub id (owner/name), a folder, or package:NAME.")
    if source.endswith(".gguf") and Path(source).expanduser().is_file():
        raise UserError(
            f"{source}: a GGUF file is read from an installed package only (package:NAME). Convert it once: transformers' from_pretrained(FOLDER, "
            "gguf_file=...) of model and tokenizer, then save_pretrained(NEW) of both; and name NEW."
        )
    if Path(source).expanduser().is_file():
        raise UserError(
            f"{source}: is a file. Name a folder in transformers format, a hub id (owner/name), or package:NAME."
        )
    model = ModelConfig(source=source)
    here = source.startswith(PACKAGE) or Path(source).expanduser().is_dir()
    try:
        with contextlib.nullcontext() if here else hubs.offline_unless_reachable():
            folder = models.resolve(model, weights=here)
    except MachineError as error:
        if (known := architectures.known_config(source)) is None or source.startswith(PACKAGE):
            raise
        if elsewhere:
            context = known[1].get("max_position_embeddings")
            return ModelLook(source, model_shape(model)[0], context, "", True, "", "")
        raise MachineError(f"{error} For a recipe that runs elsewhere, say where: --gpu h100:1.") from None
    config = models.config_of(folder)
    tokenizer = models.load_tokenizer(folder)
    part = models.text_part(config)
    return ModelLook(
        source=source,
        shape=ModelShape.from_config(config),
        context=part.get("max_position_embeddings"),
        tokenizer=models.tokenizer_fingerprint(tokenizer),
        chat=bool(tokenizer.chat_template),
        chat_template=str(tokenizer.chat_template or ""),
        quantised=models.quantised_as(config),
    )


def check_pair(teacher: ModelLook, student: ModelLook) -> None:
    """Refuse a student that is its own teacher, that is larger, or that cannot be trained. Raises UserError."""
    same = Path(teacher.source).expanduser(), Path(student.source).expanduser()
    if teacher.source == student.source or (same[0].is_dir() and same[1].is_dir() and same[0].samefile(same[1])):
        raise UserError(
            f"{student.source}: is the teacher itself, from which it has nothing to learn. Name a smaller model, or answer "
            "`pruned` to make one out of the teacher by leaving out layers (`pruned:12` keeps 12)."
        )
    if student.params > teacher.params:
        raise UserError(
            f"{student.source}: the student is larger ({count(student.params)}) than the teacher ({count(teacher.params)}). Are the two "
            "swapped?"
        )
    if student.quantised:
        raise UserError(
            f"{student.source}: has quantised weights ({student.quantised}), which cannot be trained. Name the model that it was made from."
        )


def layers_kept(text: str, teacher: ModelLook) -> int | None:
    """Return the number of layers of a student `pruned` or `pruned:N`, two thirds by default; None for another model."""
    word, _, number = text.strip().partition(":")
    if word not in PRUNED:
        return None
    layers = teacher.shape.layers
    if layers < 3:
        raise UserError(f"{text}: the teacher has only {layers} layers; name a model of its own as student.")
    if not number:
        return max(2, round(layers * 2 / 3))
    if not number.isdigit() or not 2 <= int(number) < layers:
        raise UserError(f"{text}: the teacher has {layers} layers; write pruned:N with N from 2 to {layers - 1}.")
    return int(number)
