"""The jobs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_INSTANT = sa.BigInteger().with_variant(sa.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    """Makes the table and its indexes."""
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), primary_key=True),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lost_leases", sa.Integer(), nullable=False),
        sa.Column("version", sa.Integer(), nullable=False),
        sa.Column("created_at", _INSTANT, nullable=False),
        sa.Column("updated_at", _INSTANT, nullable=False),
        sa.Column("started_at", _INSTANT),
        sa.Column("finished_at", _INSTANT),
        sa.Column("not_before", _INSTANT, nullable=False),
        sa.Column("deadline_at", _INSTANT, nullable=False),
        sa.Column("worker", sa.Text()),
        sa.Column("lease_until", _INSTANT),
        sa.Column("idempotency_key", sa.Text()),
        sa.Column("fingerprint", sa.LargeBinary(), nullable=False),
        sa.Column("error_code", sa.Text()),
        sa.Column("error_message", sa.Text()),
        sa.Column("input", sa.LargeBinary(), nullable=False),
        sa.Column("result", sa.LargeBinary()),
        # A queue leaves dead entries at the front of its indexes, where claims look. By default they would stay until a
        # fifth of all rows is dead, and most rows are finished jobs that never change.
        postgresql_with={"autovacuum_vacuum_scale_factor": "0.01", "autovacuum_vacuum_insert_scale_factor": "0.05"},
    )
    _create_index("jobs_page", "tenant", "status", "kind", "created_at", "id")
    _create_index("jobs_key", "tenant", "idempotency_key", where="idempotency_key IS NOT NULL", unique=True)
    _create_index("jobs_pending", "not_before", "id", "status", where="status = 'pending'")
    _create_index("jobs_leases", "lease_until", where="status = 'processing'")
    _create_index("jobs_deadlines", "deadline_at", where="status IN ('pending', 'processing')")
    _create_index("jobs_finished", "finished_at", where="finished_at IS NOT NULL")


def downgrade() -> None:
    """Drops the table with every job in it."""
    op.drop_table("jobs")


def _create_index(name: str, *columns: str, where: str | None = None, unique: bool = False) -> None:
    condition = None if where is None else sa.text(where)
    op.create_index(name, "jobs", list(columns), unique=unique, postgresql_where=condition, sqlite_where=condition)
