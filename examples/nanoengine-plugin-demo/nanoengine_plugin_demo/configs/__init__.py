"""Config groups, and the recipe `nanoengine run plugin-demo`."""
