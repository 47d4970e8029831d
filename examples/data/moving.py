"""What moves against the background, without any weights: evidence per pixel, and things with their boxes.

The camera's own motion is taken out: an affine map between neighbours, fitted to the flow by RANSAC. What the
background looks like is learned from the frames in which a pixel does not move. A pixel that differs from it
is a thing's for sure; where the background never shows, what moves is so probably; GrabCut (Rother,
Kolmogorov and Blake 2004) decides what is left by its colours."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from .motion import Sampled
from .thresholds import Thresholds

LEAST_PIXELS = 0.4
"""Flow below this is noise, in pixels of the sampled frames."""
SAME, OTHER = 14, 36
"""Greatest difference from the background of what is still background, and least of what is sure to be none:
of 255, in the channel that differs most."""
ROUNDS = 3
SMALLEST = 0.01
"""Least share of a frame that a thing covers: smaller ones are noise."""
NEAR = 0.25
"""How far a thing may move between two frames with boxes, in diagonals."""
STILL_CAMERA, SAME_LIGHT = 0.5, 6
"""Motion of the frame's corners, in pixels, that counts as none; and the greatest change of a pixel that
counts so, of 255: where most of a frame does not change, the camera stands still, whatever the flow makes of
plain ground."""
APART = 3
"""Sampled frames between two that are compared for motion: neighbours alone miss what turns round."""


@dataclass
class Thing:
    """What was followed through frames: masks bool [H,W] by sampled frame."""

    masks: dict[int, np.ndarray]

    def middle(self, at: int) -> np.ndarray:
        """Of its mask in a sampled frame, x and y in pixels."""
        return np.argwhere(self.masks[at]).mean(0)[::-1]


class Moving:
    """The evidence of a shot, computed once for all its frames."""

    def __init__(self, sampled: Sampled, thresholds: Thresholds):
        self.sampled = sampled
        count, self.height, self.width = sampled.grey.shape
        self._corners = np.array(
            [[[0, 0]], [[self.width, 0]], [[0, self.height]], [[self.width, self.height]]], np.float32
        )
        self._least = max(LEAST_PIXELS, thresholds.least_motion / 100 * sampled.diagonal)
        self._to_middle = self._camera()
        moves = [self._moves(at) for at in range(count)]
        self.moves = moves
        self._background, self._known = self._learn(moves)

    def evidence(self, at: int) -> np.ndarray:
        """What GrabCut starts from in a sampled frame: cv2.GC_BGD, GC_PR_BGD, GC_PR_FGD, GC_FGD, uint8
        [H,W]."""
        background = self._from_middle(self._background, at)
        known = self._from_middle(self._known.astype(np.uint8), at) > 0
        apart = np.abs(self.sampled.frames[at].astype(np.int16) - background).max(2)
        moves = self.moves[at]
        found = np.where(moves, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
        found[known & (apart <= SAME)] = cv2.GC_BGD
        found[known & (apart > SAME) & (apart < OTHER)] = cv2.GC_PR_FGD
        sure = cv2.morphologyEx((known & (apart >= OTHER)).astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3)))
        found[sure > 0] = cv2.GC_FGD
        near = cv2.dilate((moves | (sure > 0)).astype(np.uint8), np.ones((9, 9))) > 0
        found[~near & (found != cv2.GC_FGD)] = cv2.GC_BGD
        return found

    def foreground(self, at: int) -> np.ndarray:
        """What is no background in a sampled frame, bool [H,W]."""
        return cut(self.sampled.frames[at], self.evidence(at))

    def things(self, chosen: list[int]) -> list[Thing]:
        """What moves, followed through these sampled frames; each thing in some of them."""
        things: list[Thing] = []
        reach = NEAR * self.sampled.diagonal
        for at in chosen:
            pieces = self._pieces(self.foreground(at))
            pairs = []
            for t, thing in enumerate(things):
                last = thing.middle(max(thing.masks))
                for p, piece in enumerate(pieces):
                    pairs.append((float(np.hypot(*(np.argwhere(piece).mean(0)[::-1] - last))), t, p))
            taken_things, taken = set[int](), set[int]()
            for distance, t, p in sorted(pairs):
                if distance <= reach and t not in taken_things and p not in taken:
                    things[t].masks[at] = pieces[p]
                    taken_things.add(t)
                    taken.add(p)
            things += [Thing({at: piece}) for p, piece in enumerate(pieces) if p not in taken]
        return things

    def _pieces(self, mask: np.ndarray) -> list[np.ndarray]:
        """The connected parts of a mask that are no noise."""
        count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
        least = SMALLEST * mask.size
        return [labels == n for n in range(1, count) if stats[n, cv2.CC_STAT_AREA] >= least]

    def _camera(self) -> list[np.ndarray]:
        """Of every sampled frame the affine map [2,3] of its pixels into those of the middle one."""
        count = len(self.sampled.numbers)
        steps = [self._fit(n) for n in range(count - 1)]
        middle = count // 2
        maps = [np.eye(3)] * count
        for n in range(middle - 1, -1, -1):
            maps[n] = maps[n + 1] @ steps[n]
        for n in range(middle, count - 1):
            maps[n + 1] = maps[n] @ np.linalg.inv(steps[n])
        return [found[:2] for found in maps]

    def _fit(self, at: int) -> np.ndarray:
        """The camera's motion from a sampled frame to the next, [3,3]: what most pixels do."""
        change = cv2.absdiff(self.sampled.grey[at], self.sampled.grey[at + 1])
        if (change <= SAME_LIGHT).mean() > 0.5:
            return np.eye(3)
        flow = self.sampled.flow(at, at + 1)
        step = max(4, self.width // 40)
        y, x = np.mgrid[step // 2 : self.height : step, step // 2 : self.width : step]
        there = np.stack([x, y], -1).reshape(-1, 2).astype(np.float32)
        then = there + flow[y, x].reshape(-1, 2)
        found, _ = cv2.estimateAffinePartial2D(there, then, method=cv2.RANSAC, ransacReprojThreshold=0.7)
        if found is None:
            return np.eye(3)
        moved = cv2.transform(self._corners, found) - self._corners
        if np.abs(moved).max() < STILL_CAMERA:
            return np.eye(3)
        return np.vstack([found, [0, 0, 1]])

    def _moves(self, at: int) -> np.ndarray:
        """Where a sampled frame moves otherwise than the camera, towards those `APART` before or behind: bool
        [H,W]. On plain ground flow spreads beyond what moves, so it counts only between pixels that
        change."""
        moves, changes = np.zeros((2, self.height, self.width), bool)
        y, x = np.mgrid[0 : self.height, 0 : self.width]
        here = np.stack([x, y], -1).reshape(-1, 1, 2).astype(np.float32)
        frames = self.sampled.frames
        for other in {max(0, at - APART), min(len(frames) - 1, at + APART)} - {at}:
            inverse = cv2.invertAffineTransform(self._to_middle[other])
            camera = cv2.transform(cv2.transform(here, self._to_middle[at]), inverse) - here
            own = self.sampled.flow(at, other) - camera.reshape(self.height, self.width, 2)
            moves |= np.linalg.norm(own, axis=2) > self._least
            there = self._from_middle(self._warp(frames[other], self._to_middle[other]), at)
            changes |= cv2.absdiff(frames[at], there).max(2) > SAME
        count, labels = cv2.connectedComponents(moves.astype(np.uint8))
        between = np.zeros((self.height, self.width), np.uint8)
        changes = cv2.morphologyEx(changes.astype(np.uint8), cv2.MORPH_OPEN, np.ones((2, 2))) > 0
        for label in range(1, count):
            points = np.argwhere((labels == label) & changes)[:, ::-1]
            if len(points) > 2:
                cv2.fillConvexPoly(between, cv2.convexHull(points.astype(np.int32)), 1)
        return np.asarray(moves & (between > 0))

    def _learn(self, moves: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """The background in the middle frame's place: uint8 [H,W,3], and where it is known, bool [H,W].

        It is known where a pixel does not move in some frames, and where it never changes, out to the edge.
        """
        frames, shown = [], []
        for at, frame in enumerate(self.sampled.frames):
            wide = cv2.dilate(moves[at].astype(np.uint8), np.ones((7, 7)))
            shown.append(self._warp(1 - wide, self._to_middle[at]) > 0)
            frames.append(self._warp(frame, self._to_middle[at]))
        seen, stack = np.stack(shown), np.stack(frames)
        known = seen.sum(0) >= max(2, len(frames) // 12)
        never = np.ptp(stack, axis=0).max(2) <= SAME
        _, labels = cv2.connectedComponents(never.astype(np.uint8), connectivity=4)
        edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
        never &= np.isin(labels, edge[edge > 0])
        shows = np.where((seen | never)[..., None], stack.astype(np.float32), np.nan)
        known |= never
        background = np.zeros((self.height, self.width, 3), np.uint8)
        background[known] = np.nanmedian(shows[:, known], axis=0).astype(np.uint8)
        return background, known

    def _from_middle(self, image: np.ndarray, at: int) -> np.ndarray:
        return self._warp(image, cv2.invertAffineTransform(self._to_middle[at]))

    def _warp(self, image: np.ndarray, to: np.ndarray) -> np.ndarray:
        if np.array_equal(to, np.eye(3)[:2]):
            return image
        return np.asarray(cv2.warpAffine(image, to, (self.width, self.height), flags=cv2.INTER_LINEAR))


def cut(frame: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """GrabCut of a frame uint8 [H,W,3] from evidence uint8 [H,W], which stays as it is: bool [H,W].

    Where all is background, or nothing is, there is nothing to learn colours from, and the evidence is it.
    """
    mask = evidence.copy()
    probable = (mask == cv2.GC_PR_FGD) | (mask == cv2.GC_FGD)
    if 20 < probable.sum() < mask.size - 20:
        background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.setRNGSeed(0)  # its clusters start at random
        cv2.grabCut(
            np.ascontiguousarray(frame[..., ::-1]),
            mask,
            None,
            background,
            foreground,
            ROUNDS,
            cv2.GC_INIT_WITH_MASK,
        )
        probable = (mask == cv2.GC_PR_FGD) | (mask == cv2.GC_FGD)
    opened = cv2.morphologyEx(probable.astype(np.uint8), cv2.MORPH_OPEN, np.ones((3, 3)))
    return np.asarray(opened > 0)
