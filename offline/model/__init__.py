"""Read the source model: its files, its architecture, and its decoder layer by layer."""
