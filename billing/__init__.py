"""A multi-tenant billing platform API, defined by one OpenAPI document."""
