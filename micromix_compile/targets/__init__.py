"""Who computes: what runs on a device, and the launches of its kernels."""
