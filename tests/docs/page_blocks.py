"""Code blocks of the documentation: found, checked and run, as docs/site/WRITING.md describes it.

`blocks` reads a page; `Runner` runs its blocks, in order, in a folder of the page's own. A block that is wrong raises AssertionError
with the page and the line.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from project import command_line

from distill import recipe as recipes
from distill.recipe import document
from distill.recipe.tree import Recipe

ROOT = Path(__file__).parents[2]
REASONS = ("gpu", "network", "cluster", "endpoint", "minutes", "system")
"""Why a block is not run: it needs a GPU, the internet, several machines or a served model, takes minutes, changes the machine."""

PARSED_ONLY = {("doctor",), ("push",), ("chat",), ("watch",), ("traces", "push")}
"""Verbs that take minutes, wait for a person or need a network: their options are checked, and their recipe."""

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
_NOTE = re.compile(r"^ *<!-- block: (?P<note>.+?) -->\s*$")
_FILE = re.compile(r"^# (?P<name>[\w./-]+\.(?:py|yaml))\s*$")
_ELLIPSIS = "..."


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block. place: page and line, for messages; note: the comment before it."""

    language: str
    text: str
    note: str
    place: str

    @property
    def reason(self) -> str:
        """Why the block is not run; "" if it is."""
        return self.note.removeprefix("not run: ") if self.note.startswith("not run: ") else ""

    @property
    def file(self) -> str:
        """The file that the block is written to; "" if none."""
        named = _FILE.match(self.text.partition("\n")[0])
        return self.note.removeprefix("file ") if self.note.startswith("file ") else named["name"] if named else ""


def blocks(page: Path, name: str = "") -> list[Block]:
    """The fenced blocks of a page. Raises AssertionError for a block without a language and a comment without a block."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    note, number = "", 0
    while number < len(lines):
        place = f"{name or page.name}:{number + 1}"
        if noted := _NOTE.match(lines[number]):
            note = noted["note"]
        elif opened := _FENCE.match(lines[number]):
            assert opened["info"].strip(), f"{place}: a block without a language"
            inside: list[str] = []
            while (number := number + 1) < len(lines) and lines[number].strip() != opened["fence"]:
                inside.append(lines[number].removeprefix(opened["indent"]))
            assert number < len(lines), f"{place}: a block without an end"
            found.append(Block(opened["info"].split()[0], "\n".join(inside) + "\n", note, place))
            note = ""
        else:
            assert not note or not lines[number].strip(), f"{place}: a comment `block: {note}` without a block after it"
        number += 1
    for block in found:
        known = re.fullmatch(r"|part of \S+|fields of \S+/\S+|file \S+|fails \d+|not run: \w+", block.note)
        assert known, f"{block.place}: unknown comment `block: {block.note}`"
        assert not block.reason or block.reason in REASONS, (
            f"{block.place}: {block.reason!r} is no reason; there are: {REASONS}"
        )
    return found


class Runner:
    """Runs the blocks of one page. folder: the working directory of all of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "__page__"}

    def run(self, block: Block) -> None:
        """Run one block by its language. Raises AssertionError if it is wrong."""
        ways = {
            "yaml": self._yaml,
            "python": self._python,
            "sh": self._shell,
            "json": self._data,
            "jsonl": self._data,
            "toml": self._data,
        }
        assert block.language in {*ways, "text"}, f"{block.place}: no such language: {block.language!r}"
        try:
            if block.file:
                target = self.folder / block.file
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(block.text, encoding="utf-8")
            if block.language == "yaml":  # a recipe may name modules of the page
                with self._inside():
                    self._yaml(block)
            elif block.language != "text":
                ways[block.language](block)
        except AssertionError as error:
            raise AssertionError(f"{block.place}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{block.place}: {type(error).__name__}: {error}") from error

    def _data(self, block: Block) -> None:
        if block.language == "toml":
            tomllib.loads(block.text)
        for text in block.text.splitlines() if block.language == "jsonl" else [block.text] * (block.language == "json"):
            json.loads(text)

    def _yaml(self, block: Block) -> None:
        tree = document.read(block.text, block.place)
        assert isinstance(tree, dict), "a yaml block is a mapping"
        words = block.note.split()
        if {"name", "stages"} <= tree.keys():
            recipes.validate(self._filled(tree, {}, tree), block.place)
        elif words[:2] == ["fields", "of"]:
            base, _, stage = words[2].partition("/")
            whole = self._base(base)
            assert stage in whole["stages"], f"{base} has no stage {stage!r}"
            whole["stages"][stage] |= tree
            recipes.validate(whole, block.place)
        else:
            recipes.validate(
                self._merged(tree, self._base(words[2] if words[:2] == ["part", "of"] else "quickstart")), block.place
            )

    def _base(self, name: str) -> dict[str, Any]:
        """The tree of a recipe: a file of this page, or one of the repository."""
        own = self.folder / name
        path = own if own.is_file() else ROOT / "recipes" / f"{Path(name).stem}.yaml"
        tree = document.read(path.read_text(encoding="utf-8"), str(path))
        assert isinstance(tree, dict)
        return tree

    def _merged(self, part: Mapping[str, Any], base: dict[str, Any]) -> dict[str, Any]:
        """The base with a part's keys; a key that no recipe has is the name of a stage."""
        stages = {key: value for key, value in part.items() if key not in Recipe.model_fields}
        part = {key: value for key, value in part.items() if key in Recipe.model_fields}
        part["stages"] = {**part.get("stages", {}), **stages}
        for key, value in part.items():
            if (
                isinstance(value, Mapping)
                and isinstance(base.get(key, {}), Mapping)
                and key in ("models", "tasks", "stages")
            ):
                base[key] = {
                    **base.get(key, {}),
                    **{name: self._filled(one, base.get(key, {}).get(name, {}), base) for name, one in value.items()},
                }
            else:
                base[key] = value
        return base

    def _filled(self, value: Any, like: Any, base: Mapping[str, Any]) -> Any:
        """A mapping whose `...` is replaced by the fields of `like`: of the stage of this name, or the first of this kind."""
        if not isinstance(value, Mapping):
            return value
        given = {key: one for key, one in value.items() if key != _ELLIPSIS}
        if _ELLIPSIS not in value:
            return given
        if not isinstance(like, Mapping) or like.get("kind") != given.get("kind"):
            like = next((one for one in base.get("stages", {}).values() if one.get("kind") == given.get("kind")), {})
        return {**like, **given}

    def _python(self, block: Block) -> None:
        code = compile(block.text, block.place, "exec")
        if block.reason or block.file:
            return
        with self._inside():
            exec(code, self.names)

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        """Work in the page's folder, whose modules can be imported."""
        before, path = Path.cwd(), list(sys.path)
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            os.chdir(before)
            sys.path[:] = path

    def _shell(self, block: Block) -> None:
        commands = list(_commands(block.text))
        for number, words in enumerate(commands):
            status = int(block.note.split()[1]) if block.note.startswith("fails") and number == len(commands) - 1 else 0
            self._command(words, block, status)

    def _command(self, words: list[str], block: Block, status: int) -> None:
        program = Path(words[0]).name
        if program == "distill":
            self._distill(words[1:], run=not block.reason, status=status)
        elif program == "make":
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            unknown = [word for word in words[1:] if "=" not in word and word not in targets]
            assert not unknown, f"the Makefile has no target {unknown}"
        elif "install" in words and program in ("pip", "uv", "pipx"):
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            for found in re.findall(r"(?:distill|\.)\[([\w,-]+)\]", " ".join(words)):
                assert set(found.split(",")) <= extras.keys(), f"there is no extra {found!r}"
        elif program in ("python", "python3") and len(words) > 1 and words[1].endswith(".py"):
            script = next((one for one in (self.folder / words[1], ROOT / words[1]) if one.is_file()), None)
            assert script is not None, f"there is no {words[1]}"
            if not block.reason and script.is_relative_to(self.folder):
                self._python(Block("python", script.read_text(), "", f"{block.place} {words[1]}"))
        else:
            assert block.reason, f"{program!r} is not run by this test: say why, as `<!-- block: not run: system -->`"

    def _distill(self, words: list[str], run: bool, status: int) -> None:
        verb, options = parsed(words)
        path = options.get("recipe")
        if verb in PARSED_ONLY or not run or options.get("live"):
            if path is not None and status == 0:
                self._load(path, options.get("overrides") or [])
            return
        if status == 0 and not options.get("gpu") and not options.get("dry_run"):
            ways = {("run",): self._is_finished, ("check",): self._is_small}
            if verb in ways and not ways[verb](self._load(path, options.get("overrides") or [])):
                return
        done = command_line(self.folder, *words)
        said = f"{shlex.join(['distill', *words])} ended with {done.returncode}, not {status}:\n{done.stdout}\n{done.stderr}"
        assert done.returncode == status, said

    def _load(self, path: Path, overrides: list[str]) -> Recipe:
        here = path if path.is_absolute() or not (self.folder / path).exists() else self.folder / path
        return recipes.load(here, overrides)

    def _is_small(self, recipe: Recipe) -> bool:
        """Whether all models are folders of this machine, as the tiny one is."""
        return all(Path(model.source).is_dir() for model in recipe.models.values())

    def _is_finished(self, recipe: Recipe) -> bool:
        """Whether there is a finished run of a recipe, so that running it again does little."""
        return (self.folder / "runs" / recipe.name / "report.json").is_file()


def parsed(words: list[str]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return (verb, options by name) of a `distill` command. Raises AssertionError if it is no such command."""
    import typer

    from distill.cli import app

    words = [word for word in words if word != "--debug"]
    command: Any = typer.main.get_command(app)
    verb: tuple[str, ...] = ()
    if words and words[0] == "--version":
        return verb, {}
    while words and words[0] in getattr(command, "commands", {}):
        command, verb, words = command.commands[words[0]], (*verb, words[0]), words[1:]
    said = f"distill has no verb {' '.join([*verb, *words[:1]])!r}"
    assert verb, said
    assert not hasattr(command, "commands"), said
    try:
        return verb, command.make_context(verb[-1], list(words)).params
    except Exception as error:
        raise AssertionError(f"distill {' '.join(verb)}: {getattr(error, 'message', error)}") from error


def _commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, each as words; `NAME=value` before a command is left out."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            assert not {"|", ">", "&&", ";"} & set(words), f"one command a line, without pipes: {line}"
            yield words
