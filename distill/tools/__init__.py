"""Command-line tools that are not stages."""
