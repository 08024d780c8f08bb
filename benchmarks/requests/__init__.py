"""Requests: what one costs on our server, and on the alternatives that a user might choose."""
