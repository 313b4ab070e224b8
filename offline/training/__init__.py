"""Decoder layers and models whose quantizers pass gradients, for clips and distillation."""
