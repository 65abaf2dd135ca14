"""Who may have how much, and when it is their turn: limits, the queue, the degradation ladder."""
