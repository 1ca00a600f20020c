"""Building blocks for model authors: parallel layers that load their own slices of a checkpoint."""
