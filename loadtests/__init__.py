"""Load for anything that speaks OpenAI's chat API, and what it cost. Imports nothing of the gateway."""
