"""How a recipe is decided: what is observed, what it costs, which policy splits channels."""
