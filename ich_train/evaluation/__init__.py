"""How good a trained network is: its probabilities, measures, curves, pictures and a report."""
