"""Packed linear layers: the module, its weight for those who read it, its gradient, what it takes over."""
