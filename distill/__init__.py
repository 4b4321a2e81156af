"""distill: teacher-to-student distillation of language models from stored next-token distributions."""

__version__ = "0.1.0"
