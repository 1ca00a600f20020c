"""Loads of minutes on a server of the mock model. They run only with `-m load`."""
