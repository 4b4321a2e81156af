"""Losses: the output head, losses on stored targets, losses with a teacher in the trainer."""
