"""Stages: one file a kind, from a typed config and inputs to an output folder. Only here do the rooms meet.

context.py   what a stage is given: its run, folder, inputs, seeds, live line
sampling.py  problems -> engine -> verdicts -> trace rows; generate and eval share it
sources.py   traces that exist already, as blocks that a model can score
prune.py generate.py score.py filter.py train.py eval.py compare.py    the kinds, `run(config, context) -> Result` each
__main__.py  `python -m distill.stages RUN STAGE`: the process of one stage
"""
