"""Statistics, comparisons, and the pages and plots of a run. Imports no torch and no other room."""
