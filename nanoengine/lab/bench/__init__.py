"""The workloads of `nanoengine bench`, and the code that runs and reports them."""
