"""Stage kinds, one module each with `run(config, context) -> Result`; and what they share. Rooms meet only here.

prune.py generate.py score.py filter.py train.py grpo.py on_policy.py eval.py compare.py    the kinds
context.py         what a stage is given and what it returns
auto_settings.py   engine and dtypes that the recipe leaves to the machine
budget.py          a length in another stage's FLOPs
inputs/            what a stage names, found and opened
"""
