"""What a GPU is asked first: which of several ways to compute the same is the fastest, and how exact each is.

To ask something, write a function that takes the `Job` and yields `Question`s into the file that it belongs
to, or into a new one that is put into ASKED. Questions are asked in that order, as long as there is time.
"""

from __future__ import annotations

from ..job import Job
from . import attention, decode, linear
from .question import ask

ASKED = (attention, linear, decode)


def questions(job: Job) -> None:
    """Asks all, one after the other; what there was no time for is named."""
    missed: list[str] = []
    for file in ASKED:
        for question in file.questions(job):
            if job.left() < question.seconds:
                missed.append(question.name)
                continue
            ask(question, job)
    if missed:
        job.found["left_out"] = missed
        job.say(f"no time was left to ask: {', '.join(missed)}")
