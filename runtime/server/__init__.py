"""A queue of videos behind HTTP: jobs that survive, workers that are processes, one page."""
