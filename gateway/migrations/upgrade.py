"""Bring a schema to the newest migration. The only importer of Alembic: a current schema never gets here."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config


def upgrade(connection: sa.Connection) -> None:
    """Apply what is missing within the connection's transaction. Alembic looks again at the version, so of
    two processes that found an old schema the second does nothing."""
    command.upgrade(configuration(connection), "head")


def configuration(connection: sa.Connection | None = None) -> Config:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(Path(__file__).parent))
    config.set_main_option("path_separator", "os")
    return config
