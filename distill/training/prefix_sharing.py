"""The rule by which traces share the computation of a common prompt prefix; `packing` applies it, `check` predicts it."""

MAX_TOKENS = 2048
"""Tokens of prompt and completion up to which a trace takes part."""
