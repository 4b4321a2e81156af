"""The JSON schema of recipes, for editors: made from the config classes, with the short forms that they accept."""

from __future__ import annotations

import functools
import json
import operator
from typing import Annotated, Any

import pydantic
from pydantic import Field

from distill.recipe.fields import TemplateText
from distill.recipe.stages import KINDS
from distill.recipe.tree import Recipe

FILE = "recipe.schema.json"
_SHORT = {
    "EngineConfig": "an engine's name",
    "ModelConfig": "the model's source",
    "PlugConfig": "a function's name",
    "RewardConfig": "a reward's name",
    "TaskConfig": "a task's name",
    "WeightsConfig": "a function's name",
}
"""Sections that may be written as one word, and the meaning of this word."""


def as_tree() -> dict[str, Any]:
    """Return the schema (JSON Schema 2020-12). A user's stage kind, `package.module:Class`, may have any field."""
    kinds: Any = functools.reduce(operator.or_, KINDS.values())
    stage: Any = Annotated[kinds, Field(discriminator="kind")]
    stages = pydantic.TypeAdapter(stage).json_schema(ref_template="#/$defs/{model}")
    tree = Recipe.model_json_schema()
    definitions = {**tree.pop("$defs"), **stages.pop("$defs")}
    definitions.pop("StageConfig", None)
    text = TemplateText.model_json_schema()
    definitions["TemplateText"] = text
    definitions["TaskConfig"]["properties"]["template"] = {
        "anyOf": [
            {"type": "string", "description": "a name from `distill ls templates`, or package.module:NAME"},
            {"$ref": "#/$defs/TemplateText"},
        ],
        "description": "the prompt of the task's problems, and where the answer is in a reply",
    }
    for name, meaning in _SHORT.items():
        definitions[name] = {"anyOf": [{"type": "string", "description": meaning}, definitions[name]]}
    own = {
        "type": "object",
        "properties": {"kind": {"type": "string", "pattern": ":"}},
        "required": ["kind"],
        "description": "a custom stage kind",
    }
    (pattern,) = tree["properties"]["stages"]["patternProperties"]
    any_stage = {
        "type": "object",
        "if": {"properties": {"kind": {"pattern": ":"}}, "required": ["kind"]},
        "then": own,
        "else": {"oneOf": stages["oneOf"]},
    }
    tree["properties"]["stages"]["patternProperties"][pattern] = any_stage
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "$defs": definitions}


def as_text() -> str:
    """The schema as JSON text."""
    return json.dumps(as_tree(), indent=1, ensure_ascii=False, sort_keys=True) + "\n"
