"""What each operation means, in plain torch: the oracle of all kernel tests."""
