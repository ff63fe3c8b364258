"""What each call cost, and what tenants and keys may spend."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("usage", sa.Column("cost_nano", sa.BigInteger, nullable=False, server_default="0"))
    op.create_table(
        "spending",
        sa.Column("day", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("tenant_id", sa.String, primary_key=True),
        sa.Column("key_id", sa.String, primary_key=True),
        sa.Column("cost_nano", sa.BigInteger, nullable=False),
    )
    for table in ("tenants", "keys"):
        for period in ("day", "month"):
            op.add_column(table, sa.Column(f"budget_{period}_nano", sa.BigInteger))


def downgrade() -> None:
    for table in ("tenants", "keys"):
        for period in ("day", "month"):
            op.drop_column(table, f"budget_{period}_nano")
    op.drop_table("spending")
    op.drop_column("usage", "cost_nano")
