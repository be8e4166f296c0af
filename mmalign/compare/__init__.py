"""Compare models fairly: same prompts, same seeds, held-out rewards, paired intervals, one self-contained report."""
