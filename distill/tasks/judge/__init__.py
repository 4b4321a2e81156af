"""The judge of answers: extraction, spelling, and equivalence."""
