"""Language models: conversations, fine-tuning by LoRA, preferences, calibrated compression, measures."""
