"""What a job would run on: cards, the links between them, what they give, and how often they fail."""
