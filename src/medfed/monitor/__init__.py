"""What happened: events, figures, and what people are shown."""
