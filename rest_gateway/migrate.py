"""`python -m rest_gateway.migrate`: bring the tables of DATABASE_URL up to date, and say what was done.

Exit status: 0 when the tables are up to date, 1 when they cannot be, 2 for a bad URL or argument. Several may run at
once on PostgreSQL, also beside gateways; a SQLite file must not be in use.
"""

import argparse
import asyncio
import os
import sys

from rest_gateway.jobs.database import Database
from rest_gateway.jobs.records import StoreError, StoreSettings


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    _parse(arguments)
    default = StoreSettings()
    settings = StoreSettings(url=os.environ.get("DATABASE_URL") or default.url)
    try:
        before, after = asyncio.run(_migrate(settings))
    except ValueError as exc:
        return _complain(f"bad setting: DATABASE_URL {exc}", 2)
    except StoreError as exc:
        return _complain(str(exc), 1)
    if before == after:
        print(f"the tables have version {after}, which is the newest")
    else:
        print(f"migrated the tables from version {before or 'none'} to {after}")
    return 0


async def _migrate(settings: StoreSettings) -> tuple[str | None, str | None]:
    database = Database(settings)
    await database.open()
    try:
        return await database.prepare(should_migrate=True)
    finally:
        await database.aclose()


def _parse(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rest_gateway.migrate",
        description="Brings the jobs' tables up to date.",
        epilog=f"DATABASE_URL tells where they are (default {StoreSettings().url}).",
    )
    parser.parse_args(arguments)


def _complain(text: str, status: int) -> int:
    print(f"rest_gateway.migrate: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
