"""Learning from the policy's own completions: rollouts, advantages, objectives."""
