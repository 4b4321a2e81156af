"""Whatever stands in a recipe's file, it is a recipe or one clear message with its place; never a traceback, never a wait."""

from __future__ import annotations

import math
import os
import re
import time

import pytest
import yaml
from changed_trees import changed, places
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from needs import slowness

from distill import recipe
from distill.recipe import document
from distill.records import UserError
from distill.tools.listing import RECIPES

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
BAD = {
    "a: !!int foo": r"'foo' is not a number \(line 1, column 4\)",
    "a: !!float x": "'x' is not a number",
    "a: !!bool maybe": "not valid YAML",
    "a: !!timestamp 2026": "the tag .*timestamp.* is not used here",
    "a: !!binary aGk=": "binary.* is not used here",
    "a: !!set {x, y}": "set.* is not used here",
    "a: !!omap [b: 1]": "omap.* is not used here",
    "a: !!python/object/apply:os.system [ls]": "python.* is not used here",
    "a: !own 3": "the tag '!own' is not used here",
    "a: !!null x": "",
    'a: "\\ud800"': "half of a surrogate pair",
    "a: " + "9" * 5000: "a number of more than 64 characters",
    "a: -" + "9" * 5000 + ".5": "a number of more than 64 characters",
    "a: .inf": "infinite and undefined numbers are not used here",
    "b: 1\na: -.inf": r"infinite .*\(line 2, column 4\)",
    "a: .nan": "undefined numbers",
    "a: 1e999": "infinite",
    "a: 1\nb: 2\na: 3": r"the key 'a' is given twice \(line 3, column 1\)",
    "a: {b: 1, b: 2}": "the key 'b' is given twice",
    "? [a, b]\n: 1": "a key must be a text",
    "? {a: 1}\n: 1": "a key must be a text",
    "a: &a [*a]": "an alias that contains itself",
    "a: &a {b: *a}": "an alias that contains itself",
    "a: *none": "undefined alias",
    "[" * 40 + "]" * 40: "more than 32 mappings and lists inside one another",
    "[" * 100_000: "more than 32 mappings",
    "{a: " * 100_000: "more than 32 mappings",
    "- " * 100_000: "more than 32 mappings",
    BOMB: "more than 200,000 values, aliases included",
    "a: b: c": "mapping values are not allowed here",
    "a: [1": "not valid YAML",
    "a: 'x": "not valid YAML",
    "\t- a": "not valid YAML",
    "a: \x00": "not valid YAML",
    "a: \x07": "not valid YAML",
    "--- a\n--- b": "not valid YAML",
    "%YAML 3.0\n--- a": "not valid YAML",
    "a: 0x": "",
    "a: 1:99:99": "",
    "a: " + "x" * 5_000_000: "longer than",
    "<<: 3": "not valid YAML",
    "<<: [1, 2]": "not valid YAML",
}  # fmt: skip
"""Documents, and what the message says ("" = a value, or some message)."""


@pytest.mark.parametrize("number", range(len(BAD)))
def test_a_bad_document_is_one_message(number):
    text, said = [*BAD.items()][number]
    began = time.perf_counter()
    message = value = None
    try:
        value = document.read(text, "r.yaml")
    except UserError as error:
        message = str(error)
    if message is None:
        assert not said, value
    else:
        assert message.startswith("r.yaml: not valid YAML: ")
        assert "\n" not in message
        assert len(message) < 500
        assert re.search(said, message), message
    assert time.perf_counter() - began < 5 * slowness()


def test_plain_documents_are_read_as_yaml_reads_them():
    text = (
        "name: a\nbase: &b {lr: 1e-4, seeds: [1, 2], x: 2026-11-27, on: yes}\nmore: {<<: *b, lr: 2.5, y: ~, z: 0x1f}\n"
    )
    assert document.read(text, "r") == {
        "name": "a",
        "base": {"lr": 1e-4, "seeds": [1, 2], "x": "2026-11-27", True: True},
        "more": {"lr": 2.5, "seeds": [1, 2], "x": "2026-11-27", True: True, "y": None, "z": 31},
    }
    for number, value in {"1e-4": 1e-4, "-3E5": -3e5, "+1.e2": 100.0, "1e4x": "1e4x", "1_000": 1000}.items():
        assert document.read(number, "r") == value
    assert document.read("", "r") is None
    for file in RECIPES.glob("*.yaml"):
        shipped = document.read(file.read_text(), "r")
        assert shipped["stages"].keys() == yaml.safe_load(file.read_text())["stages"].keys()


@pytest.mark.parametrize("value", [".inf", "!!int x", "[1", "9" * 5000, "{a: 1, a: 2}"])
def test_an_override_is_held_to_the_same(value, tmp_path):
    with pytest.raises(UserError, match=r"override .*not valid YAML") as raised:
        recipe.load(RECIPES / "quickstart.yaml", [f"stages.kl.lr={value}"])
    assert len(str(raised.value)) < 500


def test_files_that_are_no_text(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        recipe.load(file)
    with pytest.raises(UserError, match="no such file"):
        recipe.load(tmp_path)


# ------------------------------------------------------------------------------------------------ any document

SHIPPED = [yaml.safe_load(file.read_text()) for file in sorted(RECIPES.glob("*.yaml"))]
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12),
    st.sampled_from([":", "a:b", "..", "/", "-1", "0", "1e400", "none:none", "distill.cli:main", "auto", "owner/name", "\u0000", "~"]),
)  # fmt: skip
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.sampled_from(["fn", "kind", "model"]), inner, max_size=3), max_leaves=6)  # fmt: skip


def holds_together(text, tmp_path):
    """A text is a recipe, or one clear message."""
    file = tmp_path / "fuzzed.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogatepass")
    said = None
    try:
        resolved = recipe.load(file)
    except UserError as error:
        said = str(error)
    if said is not None:
        assert said.strip()
        assert max(map(len, said.splitlines())) < 2000
        return
    for stage in resolved.stages.values():
        assert all(math.isfinite(x) for x in stage.model_dump().values() if isinstance(x, float))
    again = recipe.validate(document.read(yaml.safe_dump(resolved.model_dump(mode="json")), "again"))
    assert again == resolved


FEW = settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
MANY = settings(FEW, max_examples=int(os.environ.get("DISTILL_EXAMPLES", "2500")))
"""CI tries thousands; DISTILL_EXAMPLES=5000 twice as many, in five minutes."""


def mutated(draw):
    tree = draw(st.sampled_from(SHIPPED))
    for _ in range(draw(st.integers(1, 3))):
        every = places(tree)
        tree = changed(tree, draw(st.sampled_from(every)), draw(values), draw(st.booleans()))
        if not isinstance(tree, dict):
            break
    return yaml.safe_dump(tree, allow_unicode=True)


mutations = st.composite(mutated)()
texts = st.one_of(
    st.text(st.characters(codec=None), max_size=60),
    st.text(st.sampled_from(list("[]{}:,-&*!|>'\"%@`#?~ \n\tab01.e<")), max_size=40),
    values.map(yaml.safe_dump),
)


@FEW
@given(text=st.one_of(texts, mutations))
def test_any_document_is_a_recipe_or_one_message(text, tmp_path_factory):
    holds_together(text, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(text=mutations)
def test_thousands_of_changed_recipes_are_recipes_or_one_message(text, tmp_path_factory):
    holds_together(text, tmp_path_factory.getbasetemp())


@pytest.mark.slow
@pytest.mark.timeout(1800)
@MANY
@given(text=texts)
def test_thousands_of_texts_are_recipes_or_one_message(text, tmp_path_factory):
    holds_together(text, tmp_path_factory.getbasetemp())
