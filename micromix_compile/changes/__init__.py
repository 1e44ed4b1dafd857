"""Whether a tensor is still what it was when something was made from it."""
