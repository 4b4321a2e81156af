"""distill: teacher-to-student distillation of language models from stored next-token distributions."""

from distill import companions

__version__ = "0.1.0"

# Before anything imports peft, transformers or vLLM.
companions.hide()
