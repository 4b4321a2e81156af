"""The stage kinds, one module each with `run(config, context) -> Result`, and modules that they share.

The packages tasks, engines, traces, training, reports and inspector do not import each other; the stages connect them.

prune.py generate.py score.py filter.py train.py grpo.py on_policy.py eval.py compare.py    the kinds
context.py         the context a stage runs in, and its result
auto_settings.py   the engine and dtypes of `auto`
budget.py          training length given as another stage's FLOPs
inputs/            find and open a stage's inputs
"""
