"""Webhooks: what a tenant's URL may be, and the secret that signs what is sent there."""
