"""Parts: the flat form, the manifest, the digest and files give back exactly what went in, or say so."""

import errno
import json
import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from common import parts
from common.errors import UserError
from common.parts import Corrupt, Manifest, Tensors

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = st.lists(st.integers(0, 3), max_size=4).map(tuple)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=8)
NAMES = TEXTS.filter(lambda name: name != "__metadata__")
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern there is: infinities, NaNs with a payload and minus zero too."""
    count = torch.Size(shape).numel() * dtype.itemsize
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(shape)


@st.composite
def groups(draw: st.DrawFn, mixed: bool = False) -> Tensors:
    one = draw(st.sampled_from(DTYPES))
    shapes = draw(st.dictionaries(NAMES, SHAPES, max_size=5))
    dtypes = [draw(st.sampled_from(DTYPES)) if mixed else one for _ in shapes]
    seeds = [draw(st.integers(0, 2**32)) for _ in shapes]
    items = zip(shapes.items(), dtypes, seeds, strict=True)
    return {name: random_bits(shape, dtype, seed) for (name, shape), dtype, seed in items}


def same(a: Tensors, b: Tensors) -> bool:
    """Equal bit for bit; a digest would prove nothing about itself."""

    def plain(t: Tensor) -> tuple[object, ...]:
        return t.dtype, t.shape, t.detach().contiguous().reshape(-1).view(torch.uint8).tolist()

    return a.keys() == b.keys() and all(plain(a[name]) == plain(b[name]) for name in a)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))


def test_tensors_are_live_floats_by_state_dict_name() -> None:
    module = net()
    found = parts.tensors(module)
    assert found.keys() == module.state_dict().keys() - {"1.num_batches_tracked"}
    assert found["0.weight"] is module[0].weight
    assert found["1.running_var"] is module[1].running_var


def test_tensors_by_name() -> None:
    module = net()
    assert parts.tensors(module, {"0.bias"}).keys() == {"0.bias"}
    with pytest.raises(ValueError, match=r"^1\.num_batches_tracked is not"):
        parts.tensors(module, ["0.bias", "1.num_batches_tracked"])


def test_snapshot_is_apart_and_load_brings_it_back() -> None:
    module = net()
    live = parts.tensors(module)
    before = parts.snapshot(live)
    weight = module[0].weight
    with torch.no_grad():
        for t in live.values():
            t.add_(1)
    assert not any(t.requires_grad for t in before.values())
    assert not same(live, before)
    parts.load(live, before)
    assert same(live, before)
    assert module[0].weight is weight
    assert weight.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("0.bias"), "0.bias is missing"),
        (lambda t: t.update({"0.c": torch.zeros(1)}), "0.c is not expected"),
        (lambda t: t.update({"0.bias": torch.zeros(1, 4)}), "0.bias has shape (1, 4) instead of (4,)"),
    ],
)
def test_load_refuses_other_names_and_shapes_and_writes_nothing(change, message) -> None:
    live = parts.tensors(net())
    before = parts.snapshot(live)
    values = {name: t + 1 for name, t in before.items()}
    change(values)
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the whole message is compared
        parts.load(live, values)
    assert str(refused.value) == message
    assert same(live, before)


@QUICK
@given(groups())
def test_flat_form_gives_the_part_back(group: Tensors) -> None:
    manifest = Manifest.of(group)
    flat = parts.flatten(group)
    assert flat.shape == (manifest.numel,)
    back = parts.unflatten(flat, manifest)
    assert same(back, group)
    assert all(t.numel() == 0 or t.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
               for t in back.values())  # fmt: skip


@QUICK
@given(groups(mixed=True))
def test_manifest_survives_json(group: Tensors) -> None:
    manifest = Manifest.of(group)
    assert Manifest.from_json(manifest.as_json()) == manifest
    assert [name for name, _, _ in manifest.entries] == sorted(group)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "null",
        '{"a": 1}',
        '["abc"]',
        '[["a",[1]]]',
        '[["a","1","float32"]]',
        '[["a",[-1],"float32"]]',
        '[["a",[true],"float32"]]',
        '[["a",[1.0],"float32"]]',
        '[["a",[1],"float"]]',
        '[["a",[1],"nn"]]',
        '[["a",[1],3]]',
        '[[1,[1],"float32"]]',
        '[["b",[1],"float32"],["a",[1],"float32"]]',
        '[["a",[1],"float32"],["a",[1],"float32"]]',
        "[" * 100_000,
    ],
)
def test_manifest_from_the_network_is_checked(text: str) -> None:
    with pytest.raises(ValueError, match="manifest"):
        Manifest.from_json(text)


@QUICK
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=12))
def test_manifest_from_any_json_raises_nothing_else(value: object) -> None:
    try:
        Manifest.from_json(json.dumps(value))
    except ValueError:
        return


def test_flat_form_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"different dtypes \(bfloat16, float32\)"):
        parts.flatten({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)})
    manifest = Manifest.of({"a": torch.zeros(2)})
    for flat in (torch.zeros(3), torch.zeros(1, 2), torch.zeros(())):
        with pytest.raises(ValueError, match="instead of"):
            parts.unflatten(flat, manifest)
    with pytest.raises(ValueError, match="a is float32 in the manifest but the flat tensor is float64"):
        parts.unflatten(torch.zeros(2, dtype=torch.float64), manifest)


def test_flat_form_carries_no_gradient() -> None:
    flat = parts.flatten(parts.tensors(nn.Linear(2, 2)))
    assert not flat.requires_grad


NAMED = pytest.mark.parametrize("name_of", [parts.digest, parts.label])


@NAMED
@QUICK
@given(group=groups(mixed=True), random=st.randoms())
def test_a_digest_depends_on_content_only(group: Tensors, random, name_of: Callable[[Tensors], str]) -> None:
    names = list(group)
    random.shuffle(names)
    shuffled = {name: group[name] for name in names}
    assert name_of(shuffled) == name_of(group)
    strided = {name: t.mT.contiguous().mT if t.dim() >= 2 else t for name, t in group.items()}
    assert name_of(strided) == name_of(group)


@NAMED
@QUICK
@given(group=groups(mixed=True), data=st.data())
def test_a_digest_sees_every_change(group: Tensors, data: st.DataObject, name_of: Callable[[Tensors], str]) -> None:
    before = name_of(group)
    assert name_of({**group, "another": torch.zeros(0)}) != before or "another" in group
    full = sorted(name for name, t in group.items() if t.numel())
    if full:
        name = data.draw(st.sampled_from(full))
        changed = group[name].clone()
        raw = changed.view(-1).view(torch.uint8)
        raw[data.draw(st.integers(0, raw.numel() - 1))] ^= 1 << data.draw(st.integers(0, 7))
        assert name_of({**group, name: changed}) != before
        assert name_of({**group, name: group[name].unsqueeze(0)}) != before


def test_digest_is_the_same_for_ever() -> None:
    """Digests are stored and sent: this one must not change with a release."""
    group = {"b": torch.tensor([1.0, -2.0]), "a": torch.tensor([[3.0]], dtype=torch.bfloat16)}
    assert parts.digest(group) == "d0db25423f4ada5faae44ac899d14fab8b04cf3be90805fd04b65f3c2980431f"


@QUICK
@given(group=groups(mixed=True), metadata=st.dictionaries(TEXTS, TEXTS))
def test_files_give_back_what_was_saved(tmp_path: Path, group: Tensors, metadata: dict[str, str]) -> None:
    path = tmp_path / "part.safetensors"
    metadata = {key: value for key, value in metadata.items() if key not in ("digest", "seal")}
    parts.save(path, group, metadata, durable=False)
    back, about = parts.read(path)
    assert same(back, group)
    assert about == metadata
    assert files(tmp_path) == ["part.safetensors"]


def sample(folder: Path) -> tuple[Path, Tensors]:
    path = folder / "part.safetensors"
    group = {"w": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}
    parts.save(path, group, {"round": "7"})
    return path, group


def test_any_layout_and_shared_memory_can_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "part.safetensors"
    image = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last).requires_grad_()
    group = {"image": image, "again": image, "turned": image[0, 0].T, "inner": image[:, 1:2]}
    parts.save(path, group, {})
    back, _ = parts.read(path)
    assert same(back, group)


def test_a_file_cut_anywhere_is_corrupt(tmp_path: Path) -> None:
    path, _ = sample(tmp_path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(Corrupt, match=r"part\.safetensors: is damaged"):
            parts.read(path)


def test_a_flipped_bit_is_never_read_as_something_else(tmp_path: Path) -> None:
    path, group = sample(tmp_path)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in range(8):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with suppress(Corrupt):  # not raised where a blank of the header turned into another blank
                back, about = parts.read(path)
                assert same(back, group)
                assert about == {"round": "7"}


def test_a_file_of_other_software_is_read_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "published.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(Corrupt):
        parts.read(path)
    back, about = parts.read(path, sealed=False)
    assert same(back, {"w": torch.ones(2)})
    assert about == {"format": "pt"}


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(Corrupt):
        parts.read(path, sealed=False)


def test_read_of_what_is_not_there_says_so(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(UserError, match="cannot be read") as refused:
            parts.read(path)
        assert not isinstance(refused.value, Corrupt)
        assert str(path) in str(refused.value)


def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch) -> None:
    path, group = sample(tmp_path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        parts.save(path, {"w": torch.zeros(1)}, {})
    assert files(tmp_path) == [path.name]
    assert same(parts.read(path)[0], group)
    with pytest.raises(UserError, match=r"cannot be written \(Not a directory\)"):
        parts.save(path / "inside", group, {})
    with pytest.raises(UserError, match=r"cannot be written \(No such file or directory\)"):
        parts.save(tmp_path / "none" / "part", group, {})


def test_durable_syncs_the_file_before_and_the_folder_after_the_rename(tmp_path: Path, monkeypatch) -> None:
    seen = []
    fsync = os.fsync

    def watch(handle: int) -> None:
        seen.append((stat.S_ISDIR(os.fstat(handle).st_mode), sorted(p.suffix for p in tmp_path.iterdir())))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    parts.save(tmp_path / "a.safetensors", {}, {}, durable=False)
    assert seen == []
    (tmp_path / "a.safetensors").unlink()
    parts.save(tmp_path / "a.safetensors", {}, {})
    assert seen == [(False, [".tmp"]), (True, [".safetensors"])]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    path, _ = sample(tmp_path)
    assert path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_own_metadata_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="digest"):
        parts.save(tmp_path / "a", {}, {"digest": "mine"})
