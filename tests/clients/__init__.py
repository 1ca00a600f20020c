"""Clients of other projects against a real server of a small real model. They run only with `-m clients`."""
