"""`distill ls`: every name of every sort; each option with its type, default, meaning and role."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from distill.cli import app
from distill.recipe import KINDS
from distill.recipe.fields import Config, PlugConfig
from distill.recipe.load import section
from distill.recipe.stage import StageConfig
from distill.records import UserError
from distill.tools import listing


def shown(*arguments):
    done = CliRunner().invoke(app, ["ls", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.mark.parametrize("sort", listing.SORTS)
def test_every_name_of_every_sort_can_be_looked_up(sort):
    names = [name for name, _ in listing.of(sort)]
    assert names
    for name in names:
        description, options = listing.options(sort, name)
        assert description.strip()
        assert all(one.type and one.default and one.role in listing.ROLES for one in options), name


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_stage_says_what_it_means(kind):
    _, options = listing.options("stages", kind)
    assert {one.name for one in options if "." not in one.name} == {*KINDS[kind].model_fields} - {"kind"}
    assert [one.name for one in options if not one.meaning] == []


def test_a_field_is_printed_with_type_default_role_and_meaning():
    text = shown("stages", "train")
    assert "lr                      number > 0, default 0.0001 [identity]\n" in text
    assert "peak learning rate" in text
    assert "epochs                  whole number > 0, default none [growth]\n" in text
    assert "micro_tokens            whole number > 0, default 2048 [execution]\n" in text
    assert "lora.rank               whole number > 0, default 16 [identity]\n" in text
    assert "model                   text, required [identity]\n" in text
    assert "[growth] a larger value adds only the difference to a finished stage" in text


def test_what_is_in_a_section_that_may_change_may_change():
    _, options = listing.options("stages", "train")
    roles = {one.name: one.role for one in options}
    assert roles["distributed"] == roles["distributed.processes"] == "execution"
    assert roles["lora"] == roles["lora.rank"] == "identity"


def test_options_of_a_plug_and_its_whole_docstring():
    text = shown("objectives", "grpo")
    assert "loss = -w min(rho A" in text
    assert "kl              k3 | k2 | k3_ratio, default k3 [identity]" in text


def test_filters_say_what_they_keep():
    assert "correct             Keep traces that were judged correct." in shown("filters")


def test_a_users_own_plug_or_kind(tmp_path, monkeypatch):
    (tmp_path / "minelisted.py").write_text(
        "from distill.recipe import StageConfig\n"
        "def mine(student, targets, *, scale: float = 2.0):\n    'My loss.'\n"
        "class Kind(StageConfig):\n    'My kind.'\n    wide: int = 3\n    def run(self, context): ...\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "scale  number, default 2.0 [identity]" in shown("losses", "minelisted:mine")
    assert "wide   whole number, default 3 [identity]" in shown("stages", "minelisted:Kind")


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UserError, match="Did you mean 'losses'"):
        list(listing.of("loses"))
    with pytest.raises(UserError, match="Did you mean 'forward_kl'"):
        listing.options("losses", "forwardkl")
    with pytest.raises(UserError, match="Did you mean 'train'"):
        listing.options("stages", "trian")


def test_every_section_of_every_kind_is_described():
    for kind in KINDS.values():
        for name in kind.model_fields:
            below = section(kind, name)
            if below is not None and issubclass(below, Config) and not issubclass(below, PlugConfig | StageConfig):
                assert all(field.description for field in below.model_fields.values()), (kind, name)
