"""The layout of the moments and the signatures in C++ are declared once, and all copies of them are compared here."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from stabnorm.functional import RawMoments, moments
from stabnorm.functional.detail import DETAIL
from stabnorm.functional.moments import RAW
from stabnorm.ops import use_kernels
from stabnorm.ops.cpp import build, library
from stabnorm.ops.cpp.moments import KINDS
from stabnorm.ops.rows import affine_of_rows

CHANNEL, TOKEN = RAW.fields["channel"].names, RAW.fields["token"].names
LAYOUT_H = (build.FOLDER / "layout.h").read_text()
MOMENTS_CPP = (build.FOLDER / "moments.cpp").read_text()


def enums(text: str) -> list[list[str]]:
    """The names in every enum of a C++ source."""
    return [re.findall(r"\w+", names) for names in re.findall(r"enum(?: \w+)? \{([^}]*)\}", text)]


def test_every_row_is_where_its_name_says() -> None:
    assert tuple(RAW.fields) == RawMoments._fields
    for names in (CHANNEL, TOKEN):
        assert [getattr(moments, name) for name in names] == list(range(len(names)))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_have_the_same_layout() -> None:
    from stabnorm.ops.triton import accumulating

    for name in (*CHANNEL, *TOKEN, "CHANNEL_ROWS", "TOKEN_ROWS"):
        assert getattr(accumulating, name).value == getattr(moments, name), name


def test_the_sources_in_cpp_have_the_same_layout() -> None:
    declared = enums(LAYOUT_H) + enums(MOMENTS_CPP)
    assert [*CHANNEL, "CHANNEL_ROWS"] in declared
    assert [*TOKEN, "TOKEN_ROWS"] in declared
    assert [kind.upper() for kind in sorted(KINDS, key=KINDS.__getitem__)] in declared
    of_detail = enums((build.FOLDER / "detail.cpp").read_text())
    for field, beside in (("counts", []), ("means", ["MEANS"]), ("sequences", [])):
        assert [*DETAIL.fields[field].names, *beside] in of_detail
    names = {"FLOAT": torch.float32, "BFLOAT16": torch.bfloat16, "HALF": torch.float16}
    (types,) = [declared for declared in enums((build.FOLDER / "vectors.h").read_text()) if "HALF" in declared]
    assert {names[name]: number for number, name in enumerate(types)} == library.TYPES


@pytest.mark.parametrize("change", [f"WHAT_IS_NEW, {CHANNEL[-1]}", f"{CHANNEL[-1]}, {CHANNEL[-2]}"])
def test_a_row_that_is_added_or_moved_on_one_side_only_is_noticed(change: str) -> None:
    changed = re.sub(r"\w+, \w+, CHANNEL_ROWS", f"{change}, CHANNEL_ROWS", LAYOUT_H)
    assert changed != LAYOUT_H
    assert [*CHANNEL, "CHANNEL_ROWS"] not in enums(changed)


# --- signatures ---


def test_the_arguments_of_every_function_are_read_from_its_declaration() -> None:
    defined = {name for path in build.sources() for name in re.findall(r"\bstabnorm_(\w+)\(", path.read_text())}
    signatures = library.signatures()
    assert set(signatures) == defined
    calls = re.compile(r"\b(?:call|function)\(\s*\"(\w+)\"")
    called = {name for path in build.FOLDER.glob("*.py") for name in calls.findall(path.read_text())}
    assert called == defined
    pointer, size, integer, real = (library._c_type(kind) for kind in ("void* x", "int64_t R", "int n", "float eps"))
    assert signatures["scale_groups"] == (
        None,
        (pointer, integer, size, size, size, real, integer, pointer, pointer),
    )
    assert signatures["batch_moments"][0] is size


@pytest.fixture
def loaded_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The library of now, and whatever declarations the test puts in the place of the sources."""
    reason = library.why_not()
    if reason is not None:
        pytest.skip(reason)
    path = library._built()
    monkeypatch.setattr(library, "_built", lambda: path)
    library._load.cache_clear()
    yield
    library._load.cache_clear()


@pytest.mark.usefixtures("loaded_anew")
@pytest.mark.parametrize(
    ("old", "new"),
    [("int threads,\n                     void* y", "int threads, int added, void* y"), ("const float* shift, ", "")],
    ids=["added in C++", "added in Python"],
)
def test_a_parameter_that_is_added_on_one_side_only_is_refused_before_memory_is_touched(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = (build.FOLDER / "rows.cpp").read_text()
    changed = tmp_path / "rows.cpp"
    start = text.index("void stabnorm_affine(")
    changed.write_text(text[:start] + text[start:].replace(old, new, 1))
    assert changed.read_text() != text
    others = [path for path in build.sources() if path.name != "rows.cpp"]
    monkeypatch.setattr(build, "sources", lambda: [*others, changed])
    with use_kernels("cpp"), pytest.raises(TypeError, match=r"stabnorm_affine takes (9|7) arguments, got 8"):
        affine_of_rows(torch.ones(2, 3), torch.ones(3), torch.ones(3))
