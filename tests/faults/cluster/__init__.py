"""A whole installation on loopback, clients that write to it, and faults in turn. `make faults` runs it.

Three PostgreSQL under Patroni with synchronous replication, etcd, Redis, two API processes, two workers, a receiver
of webhooks. docs/reliability.md describes the faults and their outcomes.
"""
