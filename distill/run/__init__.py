"""Run a recipe: the order of stages, the process of each, costs before and after, reports and model cards."""
