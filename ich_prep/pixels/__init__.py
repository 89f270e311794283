"""The arithmetic of one slice, all of it pure: stored values -> repairs -> HU -> size -> window codes, and the audit."""
