"""Load a stage's inputs: training examples, texts to score, teachers, losses, rewards, the student."""
