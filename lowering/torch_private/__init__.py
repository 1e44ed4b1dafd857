"""What is private in torch, and the only place that touches it."""
