"""What may follow what: grammars, thoughts with a budget, forbidden tokens."""
