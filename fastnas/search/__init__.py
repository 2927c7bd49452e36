"""The search: a bilevel loop that joins a space, a method and data."""
