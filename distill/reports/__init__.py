"""Statistics, the compute ledger, cost estimates and the pages of a run. No torch, no other room."""
