"""Stored distributions in the trainers of other libraries."""
