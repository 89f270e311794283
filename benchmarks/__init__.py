"""Answers to standing questions, each with its peers and the limit of the machine in the same run."""
