"""The verbs of the command line that are not stages: audit, inspect, ls."""
