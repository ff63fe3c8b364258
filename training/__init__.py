"""Makes the artifacts that runtimes load. Start at `recipe.run`; never imports gateway."""
