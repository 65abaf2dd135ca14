"""LoRA adapters: read from Hugging Face PEFT folders, kept in the host's memory, and added to a model's products."""
