"""The six scenarios and what is told in them.

Numbers of samples and of templates are the paper's (arXiv 2501.04698, version 2, table 4); the sentences are
our own, by its pattern ("<ID1> and <ID2> hugging each other in front of a bridge."). ``{p1}`` is the first
person, ``{l1}`` a living thing that is no person, ``{s1}`` a thing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

KINDS = {"p": "persons", "l": "livings", "s": "stuffs"}
"""What a letter of a template stands for; also the folders of the pictures."""
SLOT = re.compile(r"\{([pls])(\d)\}")


@dataclass(frozen=True)
class Scenario:
    """What a part of the set is about: its name, how many samples it has, and their sentences."""

    name: str
    samples: int
    templates: tuple[str, ...]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of concepts in it, by their folders' names."""
        letters = {letter for template in self.templates for letter, _ in SLOT.findall(template)}
        return tuple(folder for letter, folder in KINDS.items() if letter in letters)


SCENARIOS = (
    Scenario(
        "persons",
        40,
        (
            "{p1} and {p2} shaking hands at the entrance of a library.",
            "{p1} and {p2} dancing together on a rooftop at dusk.",
            "{p1} whispering something to {p2} on a park bench.",
            "{p1} and {p2} walking side by side along a harbour.",
            "{p1} and {p2} laughing over a chessboard by a window.",
            "{p1}, {p2} and {p3} posing for a photograph before a waterfall.",
        ),
    ),
    Scenario(
        "persons-livings",
        40,
        (
            "{p1} brushing {l1} on a wooden porch.",
            "{p1} kneeling beside {l1} in a field of poppies.",
            "{p1} carrying {l1} across a shallow stream.",
            "{p1} teaching {l1} a trick in a sunlit yard.",
            "{p1} sleeping on a sofa while {l1} watches.",
            "{p1} running along a beach, followed by {l1}.",
            "{p1} feeding {l1} by hand next to a red barn.",
            "{p1} and {l1} looking out of a rainy window.",
            "{p1} and {p2} playing with {l1} in fresh snow.",
            "{p1} handing {l1} over to {p2} in front of a train.",
            "{p1} sitting by a campfire between {l1} and {l2}.",
        ),
    ),
    Scenario(
        "persons-stuffs",
        40,
        (
            "{p1} polishing {s1} in a small workshop.",
            "{p1} holding up {s1} in the middle of a market.",
            "{p1} carrying {s1} down a flight of stone steps.",
            "{p1} painting a picture of {s1} in a bright studio.",
            "{p1} unpacking {s1} on a kitchen table.",
            "{p1} leaning against {s1} under a street lamp.",
            "{p1} admiring {s1} in a shop window.",
            "{p1} dusting {s1} in an old attic.",
            "{p1} pointing at {s1} on a stage.",
            "{p1} drawing a circle around {s1} in the sand.",
            "{p1} waiting for a bus beside {s1}.",
            "{p1} repairing {s1} in a garage.",
            "{p1} presenting {s1} to {p2} on a balcony.",
            "{p1} and {p2} lifting {s1} together in a garden.",
            "{p1} comparing {s1} with {s2} at a flea market.",
            "{p1} sitting between {s1} and {s2} on a lawn.",
        ),
    ),
    Scenario(
        "livings",
        30,
        (
            "{l1} and {l2} chasing each other through tall grass.",
            "{l1} resting its head on {l2} on a woollen rug.",
            "{l1} and {l2} drinking from the same pond.",
            "{l1}, {l2} and {l3} sitting in a row on a stone wall.",
        ),
    ),
    Scenario(
        "livings-stuffs",
        30,
        (
            "{l1} sniffing at {s1} on a tiled floor.",
            "{l1} hiding behind {s1} in an autumn garden.",
            "{l1} pushing {s1} across a frozen lake.",
            "{l1} sleeping on top of {s1} in the afternoon sun.",
            "{l1} walking around {s1} in a hallway.",
            "{l1} standing guard over {s1} on a jetty.",
            "{l1} and {l2} quarrelling over {s1} in a meadow.",
            "{l1} jumping from {s1} to {s2} in a barn.",
        ),
    ),
    Scenario(
        "persons-livings-stuffs",
        30,
        (
            "{p1} showing {s1} to {l1} on a village square.",
            "{p1} pulling {l1} along on {s1} in a park.",
            "{p1} balancing {s1} while {l1} jumps up, in a circus tent.",
            "{p1} reading in the shade of {s1} with {l1} at their feet.",
            "{p1} washing {l1} next to {s1} in a courtyard.",
        ),
    ),
)
OTHER = "other"
"""Where samples count whose name is of none of these."""


def scenario_of(name: str) -> str:
    """The scenario that a sample belongs to, by its name ("persons-livings-07"); else ``OTHER``."""
    stem = name.rpartition("-")[0]
    return stem if any(scenario.name == stem for scenario in SCENARIOS) else OTHER
