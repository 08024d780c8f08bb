"""The alternatives, each as its users would write it; they run in `.venv-bench`, and know nothing of us.

All of them ask the tables that we ask, through PostgreSQL's own environment variables (PGHOST and so on), as
a role that row security does not bind: they have no isolation to pay for. An index on the digest of a key is
made for them, so that their look-up is one join.
"""
