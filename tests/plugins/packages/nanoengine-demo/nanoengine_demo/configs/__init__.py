"""Config groups of nanoengine-demo."""
