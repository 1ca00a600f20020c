"""Request models: what clients may send, field by field. An unknown field is refused by name."""
