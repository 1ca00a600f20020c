"""The built-in quantisations: how the weights of layers are stored small."""
