"""A stage's inputs, found and opened: examples, texts to score, teachers, losses, the student."""
