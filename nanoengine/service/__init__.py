"""The engine as a service: one thread makes its steps, and clients in this process or in others add requests."""
