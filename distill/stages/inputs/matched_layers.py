"""Which of the teacher's layers each layer of a pruned student was made from, from the records of the prune stages.

In: the recipe, and the results of finished prune stages. Out: pairs of layers for `hidden`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill import models
from distill.recipe import HiddenConfig, PruneStage, Recipe, TrainStage, teachers_of
from distill.records import UserError
from distill.stages.inputs.layer_pairs import different_depths, different_widths, layers_kept, prune_stages
from distill.stages.inputs.resolve import is_cross_tokenizer
from distill.training.forward import base_model
from distill.training.loss.hidden_states import HiddenMatch

if TYPE_CHECKING:
    from distill.stages.context import Context


def check_hidden(config: TrainStage, where: str, recipe: Recipe) -> None:
    """Check before the run that hidden states can be matched. Raises UserError."""
    if config.hidden is None:
        return
    if is_cross_tokenizer(config):
        raise UserError(
            f"{where}.hidden: {config.loss.fn} compares models with different tokenizers, whose hidden states belong to different "
            "tokens. Use a loss for one tokenizer, such as forward_kl, or remove hidden."
        )
    kept = [recipe.stages[name] for name in prune_stages(recipe, config.model)]
    last = kept[-1] if kept else None
    if isinstance(last, PruneStage) and last.layers:
        _check_layers(config.hidden, last.layers, where)


def _check_layers(hidden: HiddenConfig, num: int, where: str) -> None:
    if isinstance(hidden.layers, list) and max(hidden.layers) >= num:
        raise UserError(
            f"{where}.hidden.layers: the student has {num} layers, numbered 0 to {num - 1}; there is no {max(hidden.layers)}."
        )


def hidden_match(config: TrainStage, context: Context, student: Any, teacher: Any) -> HiddenMatch | None:
    """Return the layers to compare; None if the stage does not. student, teacher: the loaded models.

    Raises UserError if the models' widths differ, or the student was not made from a model as deep as the teacher.
    """
    if config.hidden is None:
        return None
    where = f"stages.{context.name}"
    widths = [int(model.config.get_text_config().hidden_size) for model in (student, teacher)]
    (name,) = teachers_of(config.teacher)
    if widths[0] != widths[1]:
        raise UserError(different_widths(where, config.model, name, *widths))
    depths = [models.num_layers(base_model(model)) for model in (student, teacher)]
    origin = layers_kept(context.recipe, context.run, config.model, depths[0])
    if len(origin.kept) != depths[0] or origin.total not in (None, depths[1]) or max(origin.kept) >= depths[1]:
        raise UserError(different_depths(where, config.model, name, depths[0], depths[1], origin.total))
    _check_layers(config.hidden, depths[0], where)
    chosen = {"all": range(depths[0]), "last": [depths[0] - 1]}.get(str(config.hidden.layers), config.hidden.layers)
    pairs = tuple((int(layer), origin.kept[int(layer)]) for layer in chosen)
    return HiddenMatch(pairs, config.hidden.weight, config.hidden.fn)
