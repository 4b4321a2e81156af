"""The judge of answers: extraction, normalised spelling, equivalence."""
