"""The trace page: stored traces as one HTML file, with the distribution of every token."""
