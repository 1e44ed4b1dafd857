"""One model while it is calibrated and after: names, observers, packed weights, graphs."""
