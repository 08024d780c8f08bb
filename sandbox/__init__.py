"""A stand-in for Stripe Connect on this machine, for development and for tests; nothing in it is real."""
