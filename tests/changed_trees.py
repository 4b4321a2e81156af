"""Trees of mappings and lists with something changed, for tests that read documents of any content."""

from __future__ import annotations


def places(tree, path=()):
    """The path of every value in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


def changed(tree, path, value, remove):
    """A copy of a tree with another value at a place, or without it."""
    if not path:
        return value
    key, *rest = path
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    if not rest and remove:
        del copy[key]
    else:
        copy[key] = changed(tree[key], rest, value, remove)
    return copy
