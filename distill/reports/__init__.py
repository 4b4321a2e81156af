"""Statistics, comparisons of arms, and the report, plots and model cards of a run. Imports no torch."""
