"""The inert pickle reader: every object that a stream asks for becomes a stand-in, and nothing is called."""
