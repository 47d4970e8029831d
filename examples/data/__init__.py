"""The paper's data pipeline: concept–video training pairs out of a folder of videos.

``python -m conceptmaster.examples.data pairs`` makes them, ``draw`` draws videos whose truth is known, and
``score`` compares pairs with that truth. docs/data.md tells all of it."""
