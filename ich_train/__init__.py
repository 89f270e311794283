"""Trains, evaluates and reports a hemorrhage classifier from the shards that ``ich_prep`` writes."""
