"""Where Alembic finds its connection: the one that `billing.storage.schema` opened."""

from alembic import context

from billing.storage.tables import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
