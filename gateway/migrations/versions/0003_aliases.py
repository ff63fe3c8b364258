"""Names that stand for models."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "aliases",
        sa.Column("name", sa.String, primary_key=True),
        sa.Column("weights", sa.JSON, nullable=False),
        sa.Column("changed_s", sa.Float, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("aliases")
