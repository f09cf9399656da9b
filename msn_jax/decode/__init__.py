"""Trees, drafters and the loop: from a model and a prompt to text."""
