"""MC-Bench of the sprites: the scorer that ships is admitted, an untrained one refused; the table."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("cv2")
pytest.importorskip("skvideo")

from conceptmaster.examples.sprites.cli import main  # noqa: E402
from conceptmaster.examples.sprites.mc_bench import admission, bench, told, train_scorer  # noqa: E402
from conceptmaster.examples.sprites.mc_bench.command import WEIGHTS  # noqa: E402
from conceptmaster.examples.sprites.mc_bench.scorer import (  # noqa: E402
    LONGEST,
    Looks,
    Names,
    Scorer,
    numbers_of,
    open_scorer,
    words,
)
from conceptmaster.examples.sprites.world.draw import draw_clip  # noqa: E402
from conceptmaster.examples.sprites.world.scenes import NOUNS, random_scene  # noqa: E402

SEEDS = range(9000, 9012)


def test_the_scorer_that_ships_separates_and_an_untrained_one_does_not():
    found = admission.separation(open_scorer(WEIGHTS), SEEDS)
    assert min(found.values()) >= 0.9, found
    torch.manual_seed(0)
    drawn = admission.separation(Scorer().eval().requires_grad_(False), SEEDS)
    assert drawn["named"] < 0.5
    refused = admission.Admission(**drawn, agreement=0.9, within=0, videos=8)
    assert any(reason.startswith("named") for reason in refused.reasons)


def test_every_limit_refuses():
    good = admission.Admission(pairs=1, twins=1, named=1, captions=1, agreement=1, within=0, videos=1)
    assert good.reasons == []
    for name in ("pairs", "twins", "named", "captions", "agreement"):
        assert replace(good, **{name: 0.5}).reasons == [f"{name} 0.500, must be {good_limit(name)}"]
        assert replace(good, **{name: float("nan")}).reasons


def good_limit(name: str) -> float:
    return {"pairs": 0.9, "twins": 0.9, "named": 0.9, "captions": 0.9, "agreement": 0.6}[name]


def test_agreement_is_of_ranks():
    rising = np.arange(20.0)
    assert admission.correlation(rising, rising**3) == pytest.approx(1)
    assert admission.correlation(rising, -rising) == pytest.approx(-1)


def test_boxes_and_masks_are_where_the_true_video_has_them():
    name, indices = told.name_of(9), (0, 8, 16)
    frames = draw_clip(told.scene_of(name))[0][list(indices)]
    labels = [actor.label for actor in told.scene_of(name).actors]
    boxes = told.ToldBoxes().find(frames, labels, indices, name)
    masks = told.ToldMasks().find(frames, labels, indices, name)
    for of, inside in zip(boxes, masks, strict=True):
        for box, mask in zip(of, inside, strict=True):
            x0, y0, x1, y1 = box.box
            covered = mask.mask[y0:y1, x0:x1].sum() / mask.mask.sum()
            assert covered > 0.85
    assert not np.logical_and(masks[0][0].mask, masks[1][0].mask).any()


def test_embeddings_are_unit_vectors_and_know_other_words():
    scorer = open_scorer(WEIGHTS)
    picture = draw_clip(random_scene(3, held_out=True))[0][0]
    for found in (Looks(scorer).pictures([picture, picture[:20, :31]]), Names(scorer).texts(NOUNS)):
        assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-5)
    assert numbers_of(["the cat, zebra"]).tolist()[0][:3] == [words()["the"], words()["cat"], 0]
    assert numbers_of(["a " * 200]).shape == (1, LONGEST)


def test_the_pool_has_no_look_that_is_held_out():
    pool = train_scorer.draw_pool(6, 700)
    scenes = [random_scene(seed, held_out=False) for seed in range(700, 706)]
    actors = [actor for scene in scenes for actor in scene.actors]
    assert not any(actor.identity.held_out for actor in actors)
    assert [NOUNS[n] for n in pool["noun"]] == [actor.noun for actor in actors]
    assert len(pool["crops"]) == len(pool["pictures"]) == len(actors)
    scorer = Scorer()
    found = train_scorer.losses(scorer, pool, torch.arange(6), torch.Generator().manual_seed(0))
    found["total"].backward()
    assert torch.isfinite(found["total"])
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in scorer.parameters())


@pytest.mark.slow
def test_a_table_of_the_model_and_the_truth(tmp_path):
    rows = [row for row in bench.ROWS if row.name in ("true videos", bench.ASKED, "pictures swapped")]
    report, found = bench.bench(tmp_path, 2, WEIGHTS, rows, progress=False)
    names = report["rows"]
    truth, asked, swapped = (names[row.name] for row in rows)
    assert truth["judge"]["mean"] > asked["judge"]["mean"] > swapped["judge"]["mean"]
    assert truth["DINO-I"]["mean"] > swapped["DINO-I"]["mean"]
    assert truth["found"]["mean"] > 0.95 and found.videos == 6
    apart = report["less_asked"]["pictures swapped"]["DINO-I"]
    assert apart["mean"] == pytest.approx(swapped["DINO-I"]["mean"] - asked["DINO-I"]["mean"], abs=1e-4)
    text = bench.table(report["rows"])
    assert text.count("\n") >= 15 and "| DINO-I ↑ |" in text
    made = sorted(tmp_path.rglob("*.mp4"))
    times = [path.stat().st_mtime_ns for path in made]
    again, _ = bench.bench(tmp_path, 2, WEIGHTS, rows, progress=False)
    assert len(made) == 6 and times == [path.stat().st_mtime_ns for path in made]
    assert again["samples"] == report["samples"]


@pytest.mark.parametrize(
    ("options", "told_so"),
    [(["--requests", "1"], "--requests must be"), (["--scorer", "nowhere"], "no scorer at 'nowhere'")],
)
def test_wrong_input_is_one_line(options, told_so, tmp_path, capsys):
    assert main(["mc-bench", "--output", str(tmp_path / "x"), *options]) == 2
    error = capsys.readouterr().err
    assert told_so in error and error.count("\n") == 1
