"""What Alembic runs around the scripts: on the connection, and in the transaction, of `rest_gateway.jobs.schema`."""

from alembic import context

from rest_gateway.jobs.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=context.config.attributes["version_table"],
)
context.run_migrations()
