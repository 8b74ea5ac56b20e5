"""From a model to a folder: whole or not at all, with names that load again, and a card that says what it is."""
