"""Requests: what one costs us, and what it costs those whom a user would take instead."""
