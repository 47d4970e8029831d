"""An open world: pictures that nobody here drew, called by any words."""
