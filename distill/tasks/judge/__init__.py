"""The judge of answers: decides whether a completion's answer is equal to the gold answer."""
