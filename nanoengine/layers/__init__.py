"""Building blocks for model authors: parallel layers that take slices of a checkpoint and know their shapes."""
