"""What Alembic runs: apply the migrations over the connection it was handed, in that one's transaction."""

from alembic import context

context.configure(connection=context.config.attributes["connection"], render_as_batch=True)
context.run_migrations()
