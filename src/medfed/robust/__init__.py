"""Rules that turn rows into weights, so that liars lose their influence."""
