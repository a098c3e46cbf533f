"""The tables' version: bring it up to date, or say why that cannot be.

Several processes may start at once on one PostgreSQL: an advisory lock lets one migrate and the others find it done.
A step either happens wholly or not at all, since both engines take DDL back with its transaction.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from rest_gateway.jobs.records import SchemaError

if TYPE_CHECKING:
    from alembic.config import Config

MIGRATIONS: Final = Path(__file__).with_name("migrations")
VERSION_TABLE: Final = "jobs_version"
# Any number that nobody else uses: "jobs" in ASCII.
_LOCK: Final = 0x6A6F6273


def prepare(connection: sa.Connection, *, should_migrate: bool) -> tuple[str | None, str]:
    """Brings the tables to the program's version within the connection's transaction, or only checks them.

    Returns their version before and after. Raises SchemaError when they are newer than the program, or are older and
    must not be migrated.
    """
    # Alembic takes 0.2 s to import, and a process that only reads settings needs none of it.
    from alembic import command  # noqa: PLC0415
    from alembic.runtime.migration import MigrationContext  # noqa: PLC0415
    from alembic.script import ScriptDirectory  # noqa: PLC0415

    if should_migrate and connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    config = _config(connection)
    scripts = ScriptDirectory.from_config(config)
    head = scripts.get_current_head()
    assert head is not None, "there is no migration: this is a bug"
    context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE})
    current = context.get_current_revision()
    if current is not None and current not in {script.revision for script in scripts.walk_revisions()}:
        raise SchemaError(
            f"the database's tables have version {current}, which this program does not know (it knows {head}): "
            "a newer program has migrated them; run that one"
        )
    if current != head:
        if not should_migrate:
            raise SchemaError(
                f"the database's tables have version {current or 'none'}, this program needs {head}: "
                "run python -m rest_gateway.migrate, or set GATEWAY_MIGRATE=true"
            )
        command.upgrade(config, "head")
    return current, head


def _config(connection: sa.Connection) -> "Config":
    from alembic.config import Config  # noqa: PLC0415

    config = Config(attributes={"connection": connection, "version_table": VERSION_TABLE})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    return config
