import subprocess
import sys

import pytest

from conceptmaster.errors import InputError
from conceptmaster.examples.stickers import cli
from conceptmaster.examples.stickers.world import atlas as making

from .small import atlas


@pytest.mark.parametrize("command", ["fetch", "train", "decoder", "score"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0 and "--atlas FILE" in capsys.readouterr().out


def test_no_help_needs_pytorch():
    code = """
import sys
sys.modules["torch"] = None
from conceptmaster.examples.stickers import cli
for command in sys.argv[1:]:
    try:
        cli.main([command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, command
"""
    commands = [command.name for command in cli.COMMANDS]
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("usage:") == len(commands), done.stderr


def test_fetched_pictures_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(making, "build", lambda cache, without: atlas())
    path = tmp_path / "atlas.npz"
    assert cli.main(["fetch", "--cache", str(tmp_path), "--atlas", str(path)]) == 0
    assert "train: 18 of 9 nouns, nouns: 6 of 3 nouns, sets: 12 of 12 nouns" in capsys.readouterr().out
    assert making.load(path).entries == atlas().entries


def test_a_set_out_of_reach_is_one_line_and_no_traceback(tmp_path, monkeypatch, capsys):
    def fail(cache, without):
        raise InputError("the picture set cannot be fetched")

    monkeypatch.setattr(making, "build", fail)
    assert cli.main(["fetch", "--cache", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "error: the picture set cannot be fetched" in told


def test_a_set_that_nobody_knows_is_refused_before_anything_is_fetched(tmp_path, capsys):
    cache = tmp_path / "cache"
    assert cli.main(["fetch", "--cache", str(cache), "--without", "notto"]) == 2
    assert "there is no picture set 'notto': noto, " in capsys.readouterr().err
    assert not cache.exists()


def test_training_without_an_atlas_or_with_wrong_options_is_refused(tmp_path, capsys):
    missing = ["--output", str(tmp_path), "--atlas", str(tmp_path / "none.npz")]
    assert cli.main(["train", *missing]) == 2
    assert "fetch` makes it" in capsys.readouterr().err
    assert cli.main(["train", *missing, "--lr", "3"]) == 2
    assert "--lr must lie between 0 and 1" in capsys.readouterr().err
    assert cli.main(["decoder", *missing, "--steps", "0"]) == 2
    assert "--steps must be at least 1" in capsys.readouterr().err
