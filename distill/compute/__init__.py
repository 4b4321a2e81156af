"""What work costs: FLOPs and memory, time estimates, and the ledger of what was spent."""
