"""The doors: decode a dialect into a Call, encode what comes back, decide nothing."""
