"""How many texts, or other rows, each call gave its model."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("usage", sa.Column("items", sa.Integer, nullable=False, server_default="0"))


def downgrade() -> None:
    op.drop_column("usage", "items")
