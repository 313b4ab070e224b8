"""Run the stages of a recipe, in the order of `pipeline`: they read the model, call algorithms and save state."""
