"""The report of a dataset: statistics over all of its rows, pictures of some, and advice, as one HTML page."""
