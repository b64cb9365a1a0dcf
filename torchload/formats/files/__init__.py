"""Files: one module per format, each of which turns a source into a checkpoint, and what they share."""
