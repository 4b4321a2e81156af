"""Words that occur nowhere else, to find out what a template does with a text."""

PROBE = ("Qwa17", "Zpo38", "Vex59", "Jub26")
"""Words that stand for a question, a thought, an answer and a system message."""
