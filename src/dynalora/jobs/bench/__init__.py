"""Time and memory, method against method."""
