"""The verb `distill chat`: talk to a model in the terminal, under the prompt that it was trained on.

In: a model (a folder, RUN/STAGE, RUN/MODEL, package:// or a hub id). Out: streamed replies, with the reasoning told apart
from the answer. Replies are generated with transformers on this machine, one conversation at a time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from distill import models, run_folder
from distill.errors import DataError, MachineError
from distill.models.checkpoint_folder import ADAPTER, check_folder
from distill.printable import printable
from distill.progress import Screen
from distill.reasoning import MARKERS, canonical, split_reasoning
from distill.recipe import ModelConfig, Recipe
from distill.records import Message, Template, UserError
from distill.stages.inputs.score_inputs import AS_IT_IS
from distill.stages.trained_prompt import trained_prompt

Write = Callable[[str, bool], None]
"""Called with a piece of a reply and whether it is reasoning."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model's folder, its adapter's folder if it is one, and the prompt that its run trained it under."""

    folder: Path
    adapter: Path | None = None
    template: Template = AS_IT_IS
    task: str = ""


# ------------------------------------------------------------------------------------------------ finding


def find(reference: str) -> FoundModel:
    """Find a model. Raises UserError for one that is not there, DataError for one that is unfinished or damaged."""
    for base in (Path(reference).expanduser(), Path("runs") / reference):
        if (base / ADAPTER).is_file():
            return _adapter(base)
        for folder in (base, base / "model"):
            if (folder / "config.json").is_file():
                return _of_folder(folder)
        if run_folder.is_run(base):
            raise UserError(f"{base} is a run; name one of its models: {_models_of(base)}.")
        if run_folder.is_run(base.parent):
            return _of_run(base.parent, base.name)
        if base.is_dir():
            check_folder(base)
    return FoundModel(models.resolve(ModelConfig(source=reference)))


def _of_folder(folder: Path) -> FoundModel:
    """A model's folder on the disk; one that a stage wrote has the stage's prompt."""
    models.verify(folder, "Put back a copy, or make it again with `distill run RECIPE --redo STAGE`.")
    check_folder(folder)
    stage = folder.absolute().parent
    if folder.name != "model" or not run_folder.is_run(stage.parent):
        return FoundModel(folder)
    return _with_prompt(FoundModel(folder), run_folder.recipe(stage.parent), stage.name)


def _of_run(run: Path, name: str) -> FoundModel:
    """A model that the run's recipe names, or a stage without a model."""
    recipe = run_folder.recipe(run)
    if name in recipe.models:
        return _with_prompt(FoundModel(models.resolve(run_folder.at_commit(run, recipe.models[name]))), recipe, name)
    if name not in recipe.stages:
        raise UserError(f"{run} has no stage or model {name!r}; its models are: {_models_of(run)}.")
    if recipe.stages[name].writes != "model":
        raise UserError(
            f"{run}/{name} is a {recipe.stages[name].kind} stage, which makes no model; name {_models_of(run)}."
        )
    state = run_folder.read(run / name)
    raise DataError(
        f"{run}/{name} has no model yet: the stage {'has not started' if state is None else f'is {state.status}'}. "
        f"Run its recipe (`distill run {run / 'recipe.yaml'}`), or name {_models_of(run)}."
    )


def _models_of(run: Path) -> str:
    """The models that can be talked to, in words."""
    recipe = run_folder.recipe(run)
    written = [name for name in recipe.stages if (run / name / "model" / "config.json").is_file()]
    return ", ".join(f"{run}/{name}" for name in (*written, *recipe.models)) or "none is written yet"


def _with_prompt(found: FoundModel, recipe: Recipe, name: str) -> FoundModel:
    prompt = trained_prompt(recipe, name)
    return replace(found, template=prompt.template, task=prompt.task)


def _adapter(folder: Path) -> FoundModel:
    """A LoRA adapter: its base is found as any model is."""
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{folder / ADAPTER}: is not JSON ({error}); download or save the adapter again.") from None
    if not base:
        raise DataError(f"{folder / ADAPTER}: names no base model (base_model_name_or_path).")
    return replace(find(str(base)), adapter=folder)


# ------------------------------------------------------------------------------------------------ talking


@dataclass(slots=True)
class Chat:
    """A conversation with a loaded model. messages: the turns so far, without the template's system message.

    temperature: 0 takes the most probable token. max_tokens: of a reply. stop_ids: tokens that end a reply.
    """

    model: Any
    tokenizer: Any
    template: Template
    temperature: float
    max_tokens: int
    stop_ids: tuple[int, ...]
    limit: int
    messages: list[Message] = field(default_factory=list)

    @property
    def system(self) -> str | None:
        """The system message, as the model gets it; None for a prompt of plain text."""
        return self.template.system if self.template.chat and self.tokenizer.chat_template else None

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def use_system(self, text: str | None) -> None:
        """Begin a new conversation under another system message. Raises UserError for prompts of plain text."""
        if not (self.template.chat and self.tokenizer.chat_template):
            raise UserError("system: this model's prompts are plain text, without a place for a system message.")
        self.template = replace(self.template, system=text)
        self.reset()

    def next_prompt(self, question: str) -> str:
        """Return the text of the prompt that a question would be asked with."""
        asked = [*self.messages, {"role": "user", "content": question}]
        return models.prompt_text(self.tokenizer, self.template, asked)

    def ask(self, question: str, write: Write) -> Reply:
        """Generate a reply to a question, given to `write` piece by piece. KeyboardInterrupt ends it; what was said stays.

        Raises UserError if the conversation leaves no room in the model's context.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        prompt = models.render_prompt(self.tokenizer, self.template, asked)
        room = min(self.max_tokens, self.limit - len(prompt))
        if room < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens, and the model's context holds {self.limit}: /reset begins a new one."
            )
        begun = models.opened_thinking(self.tokenizer, self.template)
        pieces = _Pieces(begun, write)
        ids: list[int] = []
        stopped = False
        try:
            for token in self._tokens(prompt, room):
                ids.append(token)
                pieces.show(models.decode(self.tokenizer, np.array(ids)))
        except KeyboardInterrupt:
            stopped = True
        pieces.end()
        text = pieces.text if pieces.text.startswith(begun) else begun + pieces.text
        reasoning, answer = split_reasoning(text)
        if reasoning is None and canonical(text).lstrip().startswith("<think>"):
            answer = ""
        is_cut = not stopped and len(ids) == room and ids[-1] not in self.stop_ids
        self.messages = [*asked, {"role": "assistant", "content": answer.strip()}]
        return Reply(answer.strip(), len(ids), is_cut=is_cut, stopped=stopped)

    def _tokens(self, prompt: Any, room: int) -> Iterator[int]:
        """Yield the ids of a reply, one by one, the one that ends it included."""
        import torch

        ids = torch.as_tensor(prompt, dtype=torch.long, device=self.model.device)[None]
        cache = None
        with torch.inference_mode():
            for _ in range(room):
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                logits_V = out.logits[0, -1].float()
                if self.temperature:
                    token = int(torch.multinomial((logits_V / self.temperature).softmax(-1), 1))
                else:
                    token = int(logits_V.argmax())
                yield token
                if token in self.stop_ids:
                    return
                ids = torch.tensor([[token]], device=self.model.device)


@dataclass(frozen=True, slots=True)
class Reply:
    """A reply's answer without reasoning. tokens: generated. is_cut: it reached the limit. stopped: it was interrupted."""

    answer: str
    tokens: int
    is_cut: bool
    stopped: bool


class _Pieces:
    """Splits a growing text into reasoning and answer, and holds back what may still become a marker or a character."""

    def __init__(self, begun: str, write: Write) -> None:
        self.text = ""
        self._write, self._done = write, 0
        self._closing = next((c for o, c in MARKERS if begun.lstrip().startswith(o)), "")
        self._openings = dict(MARKERS)

    def show(self, text: str) -> None:
        """Take the text so far, and write what is certain of it."""
        self.text = text
        self._advance(final=False)

    def end(self) -> None:
        """Write the rest."""
        self._advance(final=True)

    def _advance(self, *, final: bool) -> None:
        text = self.text if final else self.text.rstrip("\ufffd")
        while True:
            markers = [self._closing] if self._closing else [*self._openings] if not text[: self._done].strip() else []
            places = [(text.find(mark, self._done), mark) for mark in markers if mark in text[self._done :]]
            place, mark = min(places, default=(-1, ""))
            if place < 0 or (not self._closing and text[self._done : place].strip()):
                break
            self._emit(text[self._done : place])
            self._done = place + len(mark)
            self._closing = "" if self._closing else self._openings[mark]
        held = 0 if final else max((_overlap(text[self._done :], mark) for mark in markers), default=0)
        self._emit(text[self._done : len(text) - held])
        self._done = max(self._done, len(text) - held)

    def _emit(self, piece: str) -> None:
        if piece:
            self._write(printable(piece), bool(self._closing))


def _overlap(text: str, marker: str) -> int:
    """The length of the longest end of a text that begins the marker."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)


def open_chat(
    reference: str, *, system: str | None, temperature: float, max_tokens: int, screen: Screen
) -> tuple[Chat, FoundModel]:
    """Load a model for a conversation. system: in place of the one that it was trained under; "" is none.

    Raises UserError for a system message that its prompt has no place for.
    """
    found = find(reference)
    screen.phase("loading the libraries")
    tokenizer = models.load_tokenizer(_with_tokenizer(found))
    template = found.template
    limit = int(models.text_part(models.config_of(found.folder)).get("max_position_embeddings") or 1 << 20)
    chat = Chat(None, tokenizer, template, temperature, max_tokens, (), limit)
    if system is not None:
        chat.use_system(system or None)
    models.check_template(tokenizer, chat.template, reference)
    chat.stop_ids = models.stop_ids(found.folder, tokenizer, chat.template)
    screen.phase("loading the model")
    chat.model = _load(found)
    return chat, found


def _with_tokenizer(found: FoundModel) -> Path:
    return found.adapter if found.adapter is not None and models.has_tokenizer(found.adapter) else found.folder


def _load(found: FoundModel) -> Any:
    """Load a model, its adapter merged, on the GPU if there is one."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # two seconds, in the midst of an answer that may be piped
    cuda = torch.cuda.is_available()
    dtype = "bfloat16" if cuda else models.auto_dtype(found.folder)
    with _as_data_error(found.adapter or found.folder):
        model = models.load(found.folder, dtype=dtype)
        if found.adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, found.adapter).merge_and_unload()
    return model.to("cuda" if cuda else "cpu").eval()


@contextmanager
def _as_data_error(folder: Path) -> Iterator[None]:
    """Turn what the libraries say about weights that do not fit the model into one message."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError, OSError) as error:
        if "out of memory" in str(error).lower():
            raise MachineError(f"{folder}: does not fit into the memory of this machine.") from None
        said = " ".join(str(error).split())[:300]
        raise DataError(f"{folder}: cannot be loaded: {said}. Download or make the model again.") from None
