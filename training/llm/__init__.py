"""Language models: conversations, fine-tuning by LoRA, preferences, and how likely an answer is."""
