"""Home folders, writable folders and atomic replacement."""

import os
from pathlib import Path

import pytest

from progressive_vae import paths
from progressive_vae.paths import example, expand_home, make_folder, replacing


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "home")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("~", "{home}"),
        ("~/", "{home}/"),
        ("~/a b\nc", "{home}/a b\nc"),
        (Path("~/a"), "{home}/a"),
        ("$HOME/a", "$HOME/a"),
        ("a/~/b", "a/~/b"),
        ("/a~", "/a~"),
        ("", ""),
        ("./~/a", "{cwd}/~/a"),
        ("./~", "{cwd}/~"),
    ],
)
def test_expand_home(path, expected, home):
    expected = expected.format(home=home, cwd=os.getcwd())
    assert expand_home(path, "output_dir") == expected
    assert expand_home(expected, "output_dir") == expected  # expanding twice changes nothing


def test_an_unknown_user_is_an_error():
    with pytest.raises(ValueError, match="expected output_dir in a home .*got '~nobody_here/a'"):
        expand_home("~nobody_here/a", "output_dir")


def test_make_folder_creates_parents(tmp_path):
    assert make_folder("a/b", "output_dir") == Path("a/b")
    make_folder("a/b", "output_dir")
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("name", ["file", "file/x", "/dev/null/x"])
def test_a_folder_that_cannot_be_created_is_named(name, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"expected output_dir .*got '{name}': "):
        make_folder(name, "output_dir")


def test_replacing_a_file_is_atomic(tmp_path):
    path = tmp_path / "x.json"
    with replacing(path) as temporary:
        temporary.write_text("old")
    with pytest.raises(OSError), replacing(path) as temporary:
        temporary.write_text("incompl")
        raise OSError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_replacing_a_folder_is_atomic(tmp_path):
    path = tmp_path / "folder"
    with pytest.raises(OSError), replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "file").touch()
        raise OSError
    assert not list(tmp_path.iterdir())
    with replacing(path) as temporary:
        temporary.mkdir()
    assert list(tmp_path.iterdir()) == [path]


def test_shipped_models(tmp_path, monkeypatch):
    """They are found in a checkout, and in a wheel, which has one of them beside the package."""
    checkout = Path(__file__).parents[1]
    assert example("color_64") == checkout / "examples" / "color_64"
    with pytest.raises(ValueError, match="name of a model among .*'fashion_mnist'.*, got 'x'"):
        example("x")
    target = 'examples/fashion_mnist" = "progressive_vae/examples/fashion_mnist"'
    assert target in (checkout / "pyproject.toml").read_text(encoding="utf-8")
    monkeypatch.setattr(paths, "__file__", str(tmp_path / "progressive_vae" / "paths.py"))
    model = tmp_path / "progressive_vae" / "examples" / "fashion_mnist"
    model.mkdir(parents=True)
    (model / "model_index.json").touch()
    assert example("fashion_mnist") == model
