"""Simulate, measure, compare and verify a checkpoint."""
