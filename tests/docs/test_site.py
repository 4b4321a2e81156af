"""The documentation's site: built strictly, so that a broken link, a missing anchor or a page out of the menu fails; and it works without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXTERNAL = re.compile(r"<(script|link|img|iframe|source)\b[^>]*?\b(?:src|href)=\"?(https?:)?//[^\s\">]+", re.IGNORECASE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    asked = [sys.executable, "-m", "mkdocs", "build", "--config-file", DOCS / "site" / "mkdocs.yml"]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    built = subprocess.run(
        [*asked, "--site-dir", folder], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_every_page_is_built(site):
    for page in DOCS.glob("**/*.md"):
        if page.parent.name != "site":
            assert (site / page.relative_to(DOCS).with_suffix(".html")).is_file(), page


def test_the_site_loads_nothing_from_another_host(site):
    for page in site.glob("**/*.html"):
        found = [match[0] for match in EXTERNAL.finditer(page.read_text()) if 'rel="canonical"' not in match[0]]
        assert not found, f"{page.name}: {found}"


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
URL = re.compile(r"https?://[\w.-]+\.\w{2,}(:\d+)?(/[\w./%#?=&~+-]*)?")


def test_the_readme_links_to_what_is_there(site):
    links = LINK.findall((ROOT / "README.md").read_text())
    assert len(links) > 10
    for link in links:
        target, _, anchor = link.partition("#")
        if "://" in link:
            assert URL.fullmatch(link), link
            continue
        assert (ROOT / target).exists(), link
        if anchor and target.startswith("docs/"):
            built = site / Path(target).relative_to("docs").with_suffix(".html")
            assert f'id="{anchor}"' in built.read_text(), link


def test_links_to_other_sites_are_well_formed():
    for page in DOCS.glob("*.md"):
        for link in LINK.findall(page.read_text()):
            assert "://" not in link or URL.fullmatch(link), f"{page.name}: {link}"


def test_the_reference_names_everything_that_a_recipe_can_name(site):
    from distill.recipe import KINDS
    from distill.tools import listing

    stages = (site / "reference" / "stages.html").read_text()
    for kind in KINDS:
        _, options = listing.options("stages", kind)
        assert f'id="{kind}"' in stages
        for option in options:
            assert f"<code>{option.name}</code>" in stages, f"{kind}.{option.name}"
    for sort, page in (
        ("losses", "losses"),
        ("objectives", "losses"),
        ("rewards", "tasks"),
        ("filters", "tasks"),
        ("engines", "engines"),
    ):
        text = (site / "reference" / f"{page}.html").read_text()
        for name, _ in listing.of(sort):
            assert f'id="{sort}-{name}"' in text, f"{sort}: {name}"


def test_the_reference_has_every_verb(site):
    import typer

    from distill.cli import app

    page = (site / "reference" / "cli.html").read_text()
    command = typer.main.get_command(app)
    for name, verb in command.commands.items():
        for below in getattr(verb, "commands", {"": None}):
            assert f'id="distill-{name}{"-" * bool(below)}{below}"' in page
