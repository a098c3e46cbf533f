"""Alembic's scripts for the jobs' tables; `rest_gateway.jobs.schema` runs them."""
