"""What calibration decided: types, the file that keeps them, fingerprints of weights."""
