"""Webhooks: endpoints, events, how they are signed and sent out, what became of them, and sending again."""
