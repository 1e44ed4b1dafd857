"""The public verbs, a file each: the backend of torch.compile, `calibrate`, `quantize_`."""
