"""Everything that turns files into weights."""
