"""The arithmetic of one slice, without I/O: stored values -> repairs -> HU -> resize -> window codes, and the audit."""
