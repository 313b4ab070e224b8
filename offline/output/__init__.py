"""Write the checkpoint folder and its records, whole or not at all."""
