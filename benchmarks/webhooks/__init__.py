"""Webhooks: how many deliveries a worker makes, what each costs, and how soon they arrive."""
