"""The trace page: stored traces with the distribution behind every token."""
