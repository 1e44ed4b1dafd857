"""What bits mean: formats, layouts, the reference, rounding and folding. Everything else is tested against it."""
