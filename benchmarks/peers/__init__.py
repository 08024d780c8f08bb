"""The alternatives, each as its users would write it; they run in `.venv-bench`, and import nothing of ours.

All query the same tables as we, at an address from PostgreSQL's own environment variables (PGHOST and so on),
as a role that row security does not bind: they have no isolation to pay for. They get indexes on the digest of
a key and the id of a user, so that each look-up is one join.
"""
