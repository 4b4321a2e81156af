"""What a stage needs beside its recipe: variables of the environment, before anything is run."""

from __future__ import annotations

from distill.recipe import EngineConfig
from distill.records import UserError
from distill.run.nodes import Node


def check_ready(node: Node) -> None:
    """Raise UserError if an endpoint's key is missing, or if the environment has vLLM run in a way that the stage cannot use."""
    from distill import engines

    where = f"stages.{node.name}"
    node.config.check_environment(where)
    engine = getattr(node.config, "engine", None)
    if isinstance(engine, EngineConfig):
        try:
            engines.check_draws(engine, getattr(node.config, "tail_draws", 0))
        except UserError as error:
            raise error.within(f"{where}.{error}") from None
