"""A page and pictures of what calibration decided, of what a packed model holds, and of what was measured of it."""
