"""Find and open a stage's inputs: examples, texts to score, teachers, losses, the student."""
