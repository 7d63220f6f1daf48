"""Plans of customising a model: what fine-tuning, preferences and reinforcement learning hold and take."""
