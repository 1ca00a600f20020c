"""The workloads of `nanoengine bench`, and how they are run and reported."""
