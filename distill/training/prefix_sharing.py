"""When traces share the computation of a common beginning of their prompts (`packing` does it, `check` foresees it)."""

MAX_TOKENS = 2048
"""Tokens of prompt and completion up to which a trace takes part."""
