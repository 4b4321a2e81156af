"""The reference pages of the site, made from the code at each build (a hook of mkdocs): what recipes can name, the command line,
exit statuses. Nothing here is copied by hand, so a page cannot differ from the code.
"""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from distill import errors
from distill.recipe.fields import ModelConfig, RewardConfig, TaskConfig, WeightsConfig
from distill.recipe.tree import Recipe
from distill.tools import listing
from distill.tools.listing import Option

CHANGE = {"identity": "result", "growth": "growth", "execution": "execution"}
SIGNAL_STATUSES = ((130, "SIGINT (Ctrl-C)"), (143, "SIGTERM, as schedulers send it before they end a job"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages to the site's files."""
    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """Yield (path in docs/, Markdown) of every generated page."""
    yield "reference/index.md", _index()
    yield "reference/recipes.md", _recipes()
    yield "reference/recipe.md", _recipe()
    yield "reference/stages.md", _stages()
    yield (
        "reference/losses.md",
        _plugs("Losses, objectives, weights", {"losses": "Losses", "objectives": "Objectives", "weights": "Weights"}),
    )
    yield (
        "reference/tasks.md",
        _plugs("Rewards, filters, tasks", {"tasks": "Tasks", "rewards": "Rewards", "filters": "Filters"})
        + _templates(),
    )
    yield "reference/engines.md", _plugs("Engines", {"engines": "Engines"})
    yield "reference/layouts.md", _layouts()
    yield "reference/cli.md", _command_line()
    yield "reference/exit-statuses.md", _exit_statuses()


def _index() -> str:
    return (
        "# Reference\n\nThese pages are made from the code when the site is built. `distill ls SORT` and `distill ls SORT NAME` print the "
        "same in a terminal, and `distill schema` writes the JSON schema of recipes, with which an editor completes and checks them.\n\n"
        "- [All recipes](recipes.md) that come with distill\n- [The recipe](recipe.md): its top level, models, tasks\n- [Stages](stages.md): every kind with its fields\n"
        "- [Losses, objectives, weights](losses.md)\n- [Rewards, filters, tasks, templates](tasks.md)\n- [Engines](engines.md)\n"
        "- [Data layouts](layouts.md)\n- [The command line](cli.md)\n- [Exit statuses](exit-statuses.md)\n\n"
        "A default `required` means that the field must be given. The last column of a table says what a change means for a finished "
        "stage:\n\n" + "\n".join(f"- **{CHANGE[role]}**: {meaning}" for role, meaning in listing.ROLES.items()) + "\n"
    )


def _recipes() -> str:
    text = "# All recipes\n\nThe recipes that come with distill: `distill run NAME` runs one, `distill init MINE --recipe NAME` copies it.\n"
    for path in sorted(listing.RECIPES.glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        whole = "\n".join(line for line in lines if "yaml-language-server" not in line)
        text += f"\n## {path.stem}\n\n```yaml\n{whole}\n```\n"
    return text


def _recipe() -> str:
    text = "# The recipe\n\nA recipe is one YAML file. Any field can be set on the command line, as `stages.kl.lr=1e-4`.\n\n## Top level\n\n"
    text += _table(one for one in listing.fields(Recipe) if "." not in one.name)
    for title, model in (
        ("A model", ModelConfig),
        ("A task", TaskConfig),
        ("A reward", RewardConfig),
        ("Weights of tokens", WeightsConfig),
    ):
        text += f"\n## {title}\n\n{_prose(inspect.getdoc(model) or '')}\n\n{_table(listing.fields(model))}"
    return text


def _stages() -> str:
    text = "# Stages\n\nEvery stage has a `kind` and the fields of this kind. Their order in the file does not matter: it follows from what each reads.\n"
    sections: dict[tuple[str, tuple[Option, ...]], str] = {}
    for kind, _ in listing.of("stages"):
        description, options = listing.options("stages", kind)
        text += f"\n## {kind}\n\n{_prose(description)}\n\n{_table(one for one in options if '.' not in one.name)}"
        for name in dict.fromkeys(one.name.partition(".")[0] for one in options if "." in one.name):
            fields = tuple(one for one in options if one.name.startswith(f"{name}."))
            anchor = f"{kind}-{name}"
            known = sections.setdefault((name, fields), anchor)
            if known == anchor:
                text += f"\n### {kind}: `{name}` {{ #{anchor} }}\n\n{_table(fields)}"
            else:
                text += f"\nThe fields of `{name}` are those of [{known.replace('-', ': ')}](#{known}).\n"
    return text


def _plugs(title: str, sorts: dict[str, str]) -> str:
    """A page of functions that a recipe names by `fn`: description and options."""
    text = f"# {title}\n\nEach is a function that a recipe names as `fn`, with its options beside it. Your own: `fn: mine:function`.\n"
    for sort, heading in sorts.items():
        text += f"\n## {heading}\n"
        for name, _ in listing.of(sort):
            description, options = listing.options(sort, name)
            text += f"\n### {name} {{ #{sort}-{name} }}\n\n{_prose(description)}\n"
            if options:
                rows = (f"| `{one.name}` | {_cell(one.type)} | {_cell(one.default)} |\n" for one in options)
                text += f"\n| option | type | default |\n|---|---|---|\n{''.join(rows)}"
    return text


def _templates() -> str:
    text = (
        "\n## Templates\n\nThe prompt of a problem, and where its answer is in a completion. `system` is for models with a chat template, "
        "`plain` is the whole prompt for those without.\n"
    )
    for name, _ in listing.of("templates"):
        described, _ = listing.options("templates", name)
        text += f"\n### {name} {{ #templates-{name} }}\n\n```text\n{described}\n```\n"
    return text


def _layouts() -> str:
    rows = "".join(f"| `{name}` | {_cell(text)} |\n" for name, text in listing.of("layouts"))
    return (
        "# Data layouts\n\nThe layouts of rows that `data` of `train` and `score` stages, and the file of a `jsonl` task, may have. A row's "
        f"columns tell which it is; `fields` names the columns of any other.\n\n| layout | columns |\n|---|---|\n{rows}"
    )


def _command_line() -> str:
    """The page that typer makes of its commands."""
    asked = [
        sys.executable,
        "-m",
        "typer",
        "distill.cli",
        "utils",
        "docs",
        "--name",
        "distill",
        "--title",
        "The command line",
    ]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout


def _exit_statuses() -> str:
    text = "# Exit statuses\n\n| status | meaning |\n|---|---|\n| 0 | done |\n"
    text += "| 1 | a stage failed for a reason that distill does not know (a bug), or a check said no: damaged shards in `traces verify`, a failed trial in `doctor` |\n"
    for status, kind in sorted(errors.STATUSES.items()):
        text += f"| {status} | {_cell((inspect.getdoc(kind) or '').partition(chr(10))[0])} |\n"
    for status, signal in SIGNAL_STATUSES:
        text += f"| {status} | interrupted by {signal}; the same command continues |\n"
    return f"{text}\nA mistake gives one message without a traceback; `--debug`, anywhere in the command, shows where it arose.\n"


def _table(options: Iterable[Option]) -> str:
    rows = (
        f"| `{one.name}` | {_cell(one.type)} | {_cell(one.default)} | {_cell(one.meaning)} | {CHANGE[one.role]} |\n"
        for one in options
    )
    return f"| field | type | default | meaning | change |\n|---|---|---|---|---|\n{''.join(rows)}"


def _cell(text: str) -> str:
    return _bar(_escape(" ".join(text.split())))


def _bar(text: str) -> str:
    return text.replace("|", "\\|")


def _prose(docstring: str) -> str:
    """A docstring as Markdown: its paragraphs, with indented lines (formulas, examples) kept as they are."""
    return "\n\n".join(
        f"```text\n{part}\n```" if all(line.startswith("  ") for line in part.splitlines()) else _escape(part)
        for part in re.split(r"\n\s*\n", docstring.strip())
    )


def _escape(text: str) -> str:
    """Escape what Markdown would read as markup, outside `code`."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\<>*_\[\]])", r"\\\1", part) for part in parts)
