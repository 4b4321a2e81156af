"""Facts for a model's card that its folder, its base model and its recipe hold: licence, size, prompt, data, limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill import models
from distill.errors import UserError
from distill.models.checkpoint_folder import weight_headers
from distill.models.hub import dataset_id
from distill.models.rendering import rest_of_prefill
from distill.recipe import Recipe
from distill.recipe.lineage import upstream_stages
from distill.records import Sampling
from distill.reports.run_report import ArmRow
from distill.reports.usage_snippets import Usage
from distill.reports.wording import percent
from distill.stages.trained_prompt import trained_prompt
from distill.tasks.hub_task import KNOWN

LICENCE_KEYS = ("license", "license_name", "license_link")


def front_matter_of(card: Path) -> dict[str, Any]:
    """The YAML front matter of a card; empty if there is no card, or none that can be read."""
    try:
        text = card.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    parts = text.split("---\n", 2)
    try:
        tree = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def base_card(source: str, revision: str | None) -> dict[str, Any]:
    """The front matter of a base model's card: in its folder, or in the hub's cache. Nothing is downloaded."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return front_matter_of(folder / "README.md")
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError

    try:
        found = huggingface_hub.try_to_load_from_cache(source, "README.md", revision=revision)
    except HFValidationError:  # package://, or no name of a model
        return {}
    return front_matter_of(Path(found)) if isinstance(found, str) else {}


def licence_of(folder: Path, base: Mapping[str, Any]) -> dict[str, str]:
    """The licence in the model's card, as its author has set it, else the base model's; empty if neither is known."""
    for tree in (front_matter_of(folder / "README.md"), base):
        if isinstance(tree.get("license"), str):
            return {key: str(tree[key]) for key in LICENCE_KEYS if tree.get(key)}
    return {}


@dataclass(frozen=True, slots=True)
class Size:
    """A model's weights. stored: their bytes. context: the most tokens, prompt and reply together; None if it does not say."""

    parameters: int
    stored: int
    dtype: str
    context: int | None

    @staticmethod
    def of(folder: Path) -> Size:
        """Read the headers of the weights and the config."""
        config = models.config_of(folder)
        parameters = 0
        for shape in weight_headers(folder).values():
            count = 1
            for length in shape:
                count *= length
            parameters += count
        stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "")
        return Size(parameters, stored, dtype, models.text_part(config).get("max_position_embeddings"))


def usage_of(recipe: Recipe, name: str, folder: Path) -> Usage | None:
    """How to prompt the model: the prompt it was trained under, with the sampling of its evaluation. None without a tokenizer."""
    if not models.has_tokenizer(folder):
        return None
    try:
        template = trained_prompt(recipe, name).template
        tokenizer = models.load_tokenizer(folder)
        chat = models.chat_template_of(tokenizer, template)
        asked = ({"role": "user", "content": "{question}"},)
        rendered = models.prompt_text(tokenizer, template, asked)
    except (UserError, OSError, ValueError):  # a chat template may refuse this prompt
        return None
    sampling = _sampling(recipe, name)
    prefill = template.prefill if chat is None else rest_of_prefill(template, chat.opened)
    system = [] if chat is None or template.system is None else [{"role": "system", "content": template.system}]
    folded = chat is not None and bool(system) and not chat.roles
    return Usage(
        rendered=rendered,
        messages=() if folded else system,
        plain=template.plain if chat is None else "",
        prefill=prefill,
        options=dict(template.options),
        before_question=f"{template.system}\n\n" if folded else "",
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
    )


def _sampling(recipe: Recipe, name: str) -> Sampling:
    """The sampling of the stage that evaluates the model, else of the traces that it learned from."""
    above = [recipe.stages[one] for one in upstream_stages(recipe, name)] if name in recipe.stages else []
    for config in (*(one for one in recipe.stages.values() if name in one.reads("model")), *above):
        if (sampling := getattr(config, "sampling", None)) is not None:
            found: Sampling = sampling.record()
            return found
    return Sampling(temperature=0.7)


def trained_on(recipe: Recipe, name: str) -> Iterator[tuple[str, str, str]]:
    """(stage, what it learned by, from what) of the stages that trained the model, the first one first."""
    above = set(upstream_stages(recipe, name))
    for one, config in recipe.stages.items():
        if one not in above or not config.trains:
            continue
        how = getattr(config, "loss", None) or getattr(config, "objective", None)
        data = [*config.reads("data"), *(f"task {task}" for task in _tasks(config))]
        texts = [f"the traces of stage {each}" if each in recipe.stages else each for each in data]
        yield one, getattr(how, "fn", config.kind), ", ".join(texts) or "–"


def _tasks(config: Any) -> list[str]:
    task = getattr(config, "task", None)
    return [task] if isinstance(task, str) else []


def hub_datasets(recipe: Recipe, name: str) -> list[str]:
    """The hub's data sets that the model's stages read: of their tasks, and given by name."""
    found: list[str] = []
    for one in upstream_stages(recipe, name):
        config = recipe.stages[one]
        named = [each for each in config.reads("data") if each not in recipe.stages and not Path(each).exists()]
        tasks = [recipe.tasks[task] for task in _tasks(config) if task in recipe.tasks]
        names = [str(task.options["dataset"]) for task in tasks if task.fn == "hub" and "dataset" in task.options]
        named += [KNOWN[each].dataset if each in KNOWN else each for each in names]
        for each in named:
            known = dataset_id(each)
            if known is not None and not Path(each).suffix and known[0] not in found:
                found.append(known[0])
    return found


def limits(recipe: Recipe, name: str, scores: Mapping[str, ArmRow], size: Size | None) -> list[str]:
    """What is known of where the model should not be trusted, one sentence each."""
    prompt = trained_prompt(recipe, name)
    task = f"task {prompt.task}" if prompt.task else "the conversations it was trained on"
    found = [f"Made for {task}, with the prompt above. Other questions, prompts and languages were not measured."]
    if not scores:
        found.append("Not evaluated: nothing is known of how often it is right.")
    for arm, row in scores.items():
        right = row["accuracy"]
        seeds = (
            "one training seed: another seed may score differently"
            if row["seeds"] == 1
            else f"{row['seeds']} training seeds"
        )
        found.append(
            f"{arm}: {percent(1 - right['value'])} of the replies to {right['n']} held-out problems were wrong or had no answer, and "
            f"{percent(row['clipped_ratio'])} were cut at the token limit; {seeds}."
        )
    longest = [
        getattr(recipe.stages[one], "max_tokens", None)
        for one in upstream_stages(recipe, name)
        if recipe.stages[one].trains
    ]
    if known := [number for number in longest if number]:
        context = f" Its context holds {size.context:,}." if size is not None and size.context else ""
        found.append(f"Trained on texts of at most {max(known):,} tokens, prompt and reply together.{context}")
    found.append(
        "Whatever is wrong in its base model and in the text it learned from may be in it too. No test of safety was made."
    )
    return found
