"""How videos of this world are judged."""
