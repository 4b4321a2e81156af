"""The nodes of a run: one for each stage, and one for each stage that a stage expands into. Selection of nodes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from distill import plug, run_folder
from distill.recipe import Input, Recipe, StageConfig, base_name, kind_class, order
from distill.records import UserError


@dataclass(frozen=True, slots=True)
class Node:
    """A stage, or one of the stages that it expands into (an evaluation of a comparison)."""

    name: str
    stage: str
    config: StageConfig
    inputs: tuple[Input, ...]

    @property
    def kind(self) -> str:
        return self.config.kind

    @property
    def stages(self) -> set[str]:
        """Names that select this node: the name of its stage, with and without the training seed."""
        return {self.stage, base_name(self.stage)}

    def stages_read(self, recipe: Recipe) -> list[str]:
        """The stages of the recipe that this node reads."""
        return [each.name for each in self.inputs if each.name in recipe.stages]


def nodes(recipe: Recipe) -> list[Node]:
    """All nodes, inputs first. A compare stage comes after the eval nodes of its arms."""
    found = []
    for name in order(recipe):
        config = recipe.stages[name]
        children = config.children()
        found += [Node(f"{name}.{below}", name, child, tuple(child.inputs())) for below, child in children.items()]
        below = tuple(Input("data", f"{name}.{child}", f"arms.{child}") for child in children)
        found.append(Node(name, name, config, below or tuple(config.inputs())))
    return found


def select(
    recipe: Recipe,
    *,
    kinds: tuple[str, ...] = (),
    only: str | None = None,
    start: str | None = None,
) -> list[Node]:
    """The nodes to run: all, those of some kinds, those of the stage `only`, or those from the stage `start` on.

    A kind selects its stages with all nodes that they expand into, and nodes of this kind that other stages expand
    into. Raises UserError for a stage or kind that the recipe does not have.
    """
    every = nodes(recipe)
    known = {name for node in every for name in node.stages}
    for name in (only, start):
        if name is not None and name not in known:
            raise UserError(f"there is no stage {name!r}.{plug.nearest(name, known)}")
    if only is not None:
        return [node for node in every if only in node.stages]
    if start is not None:
        first = next(i for i, node in enumerate(every) if start in node.stages)
        return every[first:]
    if kinds:
        _check_kinds(kinds, {node.kind for node in every})
        return [node for node in every if node.kind in kinds or recipe.stages[node.stage].kind in kinds]
    return every


def _check_kinds(wanted: Iterable[str], there: set[str]) -> None:
    for kind in wanted:
        kind_class(kind)
        if kind not in there:
            raise UserError(f"no stage of this recipe is of kind {kind!r}. Its kinds are: {', '.join(sorted(there))}.")


def require_inputs(recipe: Recipe, run: Path, wanted: Iterable[Node]) -> None:
    """Raise UserError if a wanted node reads a stage that is neither wanted nor done."""
    wanted = list(wanted)
    doing = {node.name for node in wanted}
    for node in wanted:
        for reference in (each.name for each in node.inputs):
            if (reference in recipe.stages or "." in reference) and reference not in doing:
                standing = run_folder.read(run / reference)
                if reference.split(".")[0] in recipe.stages and (standing is None or standing.status != "done"):
                    raise UserError(
                        f"stage {node.name!r} needs {reference!r}, which is not done yet. Run that stage first, or the whole recipe."
                    )
