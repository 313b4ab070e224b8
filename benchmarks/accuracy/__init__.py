"""Compare the accuracy of served and simulated checkpoints on the same tokens, with standard errors."""
