"""Data sets of conversations as others wrote them: files and folders in any common format, rows in any common layout."""

from distill.conversations.layouts import LAYOUTS, Conversation, Fields, Reader, nearest_layout
from distill.conversations.tables import Reject, Table, is_table, open_table, splits_of

__all__ = [
    "LAYOUTS",
    "Conversation",
    "Fields",
    "Reader",
    "Reject",
    "Table",
    "is_table",
    "nearest_layout",
    "open_table",
    "splits_of",
]
