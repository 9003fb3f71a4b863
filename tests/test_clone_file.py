"""Clone files: small, near enough, and of one network only."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import tiny
import torch
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast.checkpoints import Clone, coding, load_clone, load_network, save_clone, save_network
from clone_fast.errors import CheckpointError, SettingsError
from clone_fast.inversion import Inversion
from clone_fast.latent import Latent
from clone_fast.nn import Network


@pytest.fixture(scope="module")
def done() -> Inversion:
    made = tiny.inverted(tiny.network(), steps=8)
    assert made.latent.noise
    return made


@pytest.fixture
def folder(done: Inversion, tmp_path: Path) -> Path:
    done.save(tmp_path / "out", networks="delta")
    return tmp_path / "out"


def base_of(done: Inversion) -> Network:
    assert done.original is not None
    return Network(done.original, done.original_discriminator)


def lost(done: Inversion, loaded: Inversion) -> float:
    return tiny.psnr(done.image, done.photo) - tiny.psnr(loaded.image, done.photo)


def one(dims: int) -> Tensor:
    """A factor of steps that are all 1."""
    return torch.ones([1] * dims)


# ---- the coding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1, 120, 40_000, 3_000_000])
@pytest.mark.parametrize("part", [16, 1 << 20])
def test_what_is_packed_is_unpacked(part: int, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_PART", part)
    source = torch.Generator().manual_seed(0)
    given = {
        "a": torch.randint(-largest, largest + 1, (7, 3, 3), generator=source).int(),
        "noise.b": torch.zeros(5, 0).int(),
        "c": torch.tensor([[largest, -largest]]).int(),
    }
    rows = torch.tensor([0.1, 3.0, 1.0, 1.0, 0.2, 0.1, 9.0]).view(7, 1, 1)
    steps = {"a": (rows, one(3)), "noise.b": (one(2), one(2)), "c": (one(2), torch.tensor([[1.0, 8.0]]))}
    packed, width = coding.pack(given, steps)
    got = coding.unpack(packed, width, steps, {name: tuple(value.shape) for name, value in given.items()})
    assert all(torch.equal(got[name], value) for name, value in given.items())


def test_small_numbers_take_few_bits() -> None:
    """Multiples that are mostly 0: within a fifth of their entropy."""
    values = (torch.randn(400, 400, generator=torch.Generator().manual_seed(0)) * 0.5).round().int()
    _, counts = torch.unique(values, return_counts=True)
    share = counts.double() / counts.sum()
    entropy = float(-(share * share.log2()).sum())
    packed, width = coding.pack({"a": values}, {"a": (one(2), one(2))})
    assert width == 1
    assert len(packed) * 8 / values.numel() < 1.2 * entropy


@pytest.mark.parametrize("damage", ["cut", "flipped", "more", "fewer", "kind", "width", "part", "twice"])
def test_damaged_codes_are_refused(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coding, "_PART", 100)
    steps = {"a": (one(1), one(1))}
    packed, width = coding.pack({"a": torch.arange(1000).int()}, steps)
    count = {"more": 1001, "fewer": 999}.get(damage, 1000)
    if damage == "cut":
        packed = packed[:-20]
    elif damage == "flipped":
        packed[len(packed) // 2] ^= 255
    elif damage == "kind":
        packed = packed.float()
    elif damage == "part":
        packed = packed[: bytes(packed.numpy()).rindex(b"\xfd7zXZ")]
    elif damage == "twice":
        packed = packed.repeat(2)
    with pytest.raises(ValueError, match="codes"):
        coding.unpack(packed, 9 if damage == "width" else width, steps, {"a": (count,)})


def test_a_small_file_cannot_unpack_to_a_large_one() -> None:
    steps = {"a": (one(1), one(1))}
    packed, _ = coding.pack({"a": torch.zeros(9_000_000, dtype=torch.int32)}, steps)
    assert len(packed) < 10_000
    with pytest.raises(ValueError, match="16 bytes wanted, got 17"):
        coding.unpack(packed, 1, steps, {"a": (16,)})


def test_sensitivity_is_the_squared_derivative() -> None:
    value = torch.tensor([[1.0, -2.0], [3.0, 0.0]], requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    weight = torch.tensor([[2.0, 1.0], [0.5, 4.0]])
    found = coding.sensitivity(value * weight, {"v": value, "u": unused})  # one pixel for each number: no estimate
    torch.testing.assert_close(found["v"], weight.square())
    assert "u" not in found


def test_steps_are_coarse_where_the_picture_does_not_look() -> None:
    seen = torch.outer(torch.tensor([1.0, 100.0]), torch.tensor([4.0, 1.0, 1.0]))
    change = {"w": torch.ones(2, 3), "mapping": torch.tensor([[0.5, -1.0]])}
    units = coding.unit_steps(change, {"w": seen})
    assert set(units) == {"w"}
    step = coding.step_of(*units["w"])
    torch.testing.assert_close(step[0] / step[1], torch.full((3,), 10.0), rtol=0.04, atol=0)
    torch.testing.assert_close(step[:, 1] / step[:, 0], torch.full((2,), 2.0), rtol=0.04, atol=0)
    scaled = coding.scaled(units, 3.0, change)
    torch.testing.assert_close(coding.step_of(*scaled["w"]), 3 * step, rtol=0.01, atol=0)
    assert int(coding.rounded(change, scaled)["mapping"].abs().max()) == 127


def test_coarse_steps_are_fitted_without_bias() -> None:
    source = torch.Generator().manual_seed(0)
    change = {"w": torch.randn(300, 4, generator=source) * torch.tensor([3.0, 1.0, 0.3, 0.01])}
    steps = {"w": (one(2).bfloat16(), torch.ones(1, 4).bfloat16())}
    multiples = coding.rounded(change, steps)
    fitted = coding.step_of(*coding.fitted(change, multiples, steps)["w"])
    along = (change["w"] * multiples["w"] * fitted).sum(0) / change["w"].square().sum(0)
    torch.testing.assert_close(along[:3], torch.ones(3), rtol=0.005, atol=0)
    assert float((change["w"] * multiples["w"]).sum(0)[2] / change["w"].square().sum(0)[2]) < 0.9  # it was too short
    assert fitted[0, 3] == 1  # nothing left to be made longer


@pytest.mark.parametrize("start", [1e-6, 0.3, 1e4])
def test_the_coarsest_that_fits_is_found(start: float) -> None:
    factor = coding.coarsest(lambda c: c * c, 0.25, start)
    assert 0.95 * 0.5 / 1.05 < factor <= 0.5


# ---- the file --------------------------------------------------------------------------------------------------------


def test_a_clone_is_loaded_with_its_base(done: Inversion, folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        "clone.png",
        "latent_only.png",
        "photo.png",
        "clone.safetensors",
        "metrics.json",
    }
    loaded = Inversion.load(folder, base_of(done))
    assert lost(done, loaded) < 0.3
    assert torch.equal(loaded.latent.ws, done.latent.ws)
    assert set(loaded.latent.noise) == set(done.latent.noise)
    assert set(loaded.directions) == set(done.directions)
    torch.testing.assert_close(loaded.photo, done.photo, rtol=0, atol=0.5 / 127.5 + 1e-6)
    torch.testing.assert_close(loaded.edit("pca1", 2.0), done.edit("pca1", 2.0), rtol=0, atol=0.3)
    assert loaded.discriminator is None
    assert loaded.original is base_of(done).generator
    assert loaded.metrics == done.metrics
    assert not any(value.requires_grad for value in loaded.generator.parameters())


def test_what_was_not_tweaked_is_as_in_the_base(done: Inversion, folder: Path) -> None:
    base = base_of(done).generator
    want = tiny.state(base)
    loaded = Inversion.load(folder, base_of(done)).generator
    tiny.assert_state(base, want)  # loading leaves it alone
    same = [name for name, value in done.generator.state_dict().items() if torch.equal(value, want[name])]
    assert {"mapping.w_avg", "synthesis.b4.conv1.noise_const"} <= set(same)
    assert all(torch.equal(loaded.state_dict()[name], want[name]) for name in same)
    for name, value in done.generator.state_dict().items():
        if value.ndim < 2:
            assert torch.equal(loaded.state_dict()[name], value)


def test_it_is_small(done: Inversion, folder: Path, tmp_path: Path) -> None:
    """The codes; a network as tiny as this one has as many bytes of names as of numbers."""
    with safetensors.safe_open(folder / "clone.safetensors", framework="pt") as file:
        size = file.get_slice("codes").get_shape()[0]
    count = sum(v.numel() for v in done.generator.synthesis.parameters())
    count += sum(v.numel() for v in done.latent.noise.values())
    assert size < count * 10 / 8


@pytest.mark.parametrize("loss", [0.02, 1.0])
def test_the_loss_can_be_chosen(done: Inversion, tmp_path: Path, loss: float) -> None:
    clone = Clone(done.generator, done.latent.ws, done.latent.noise, {})
    base = base_of(done).generator
    save_clone(tmp_path / "a.safetensors", clone, base, done.photo, loss=loss)
    read = load_clone(tmp_path / "a.safetensors", base)
    picture = Latent(read.ws, read.noise).picture(read.generator)
    own = tiny.psnr(done.image, done.photo)
    costs = own - tiny.psnr(picture, done.photo)
    added = 1 + 10 ** ((own - tiny.psnr(picture, done.image)) / 10)
    nearest = max(costs, 10 * math.log10(added))  # the one of the two limits that holds
    assert 0.7 * loss < nearest <= loss * 1.001
    with pytest.raises(ValueError, match="loss must be positive"):
        save_clone(tmp_path / "b.safetensors", clone, base, done.photo, loss=0)


def test_a_clone_without_noise_maps_and_with_a_mapping_of_its_own(tmp_path: Path) -> None:
    net = tiny.network()
    made = tiny.inverted(net, tweak_settings=tiny.settings(noise_lr=0.0, tune_mapping=True))
    assert not made.latent.noise
    moved = made.generator.mapping.get_parameter("fc0.weight") - net.generator.mapping.get_parameter("fc0.weight")
    assert moved.abs().max() > 0
    made.save(tmp_path, networks="delta")
    loaded = Inversion.load(tmp_path, net)
    assert not loaded.latent.noise
    assert lost(made, loaded) < 0.3
    got = loaded.generator.mapping.get_parameter("fc0.weight") - net.generator.mapping.get_parameter("fc0.weight")
    torch.testing.assert_close(got, moved, rtol=0, atol=float(moved.abs().max()) / 200)


def test_a_clone_that_is_its_base(tmp_path: Path) -> None:
    net = tiny.network()
    clone = Clone(net.generator, tiny.latent(net).ws, {}, {})
    save_clone(tmp_path / "a.safetensors", clone, net.generator, tiny.photo())
    tiny.assert_state(load_clone(tmp_path / "a.safetensors", net.generator).generator, tiny.state(net.generator))


def test_another_base_is_refused(done: Inversion, folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"was made from another network: give the one with the hash .* not "):
        Inversion.load(folder, tiny.network(seed=5))
    with pytest.raises(CheckpointError, match="was made from another network"):
        Inversion.load(folder, tiny.network(resolution=32))
    other = tiny.network(resolution=32).generator
    clone = Clone(done.generator, done.latent.ws, {}, {})
    with pytest.raises(CheckpointError, match="no tweak of this base"):
        save_clone(folder / "clone.safetensors", clone, other, done.photo)


def test_the_base_is_found_where_it_was(tmp_path: Path) -> None:
    save_network(tiny.network(), tmp_path / "net.safetensors")
    made = tiny.inverted(tmp_path / "net.safetensors")
    made.save(tmp_path / "out", networks="delta")
    assert lost(made, Inversion.load(tmp_path / "out")) < 0.3
    (tmp_path / "net.safetensors").rename(tmp_path / "moved.safetensors")
    with pytest.raises(CheckpointError, match=r"the network .*net\.safetensors, which is not there; give it"):
        Inversion.load(tmp_path / "out")
    assert lost(made, Inversion.load(tmp_path / "out", tmp_path / "moved.safetensors")) < 0.3


def test_one_save_takes_the_place_of_another(done: Inversion, folder: Path) -> None:
    done.save(folder)
    assert len(list(folder.iterdir())) == 5
    loaded = Inversion.load(folder)
    with pytest.raises(SettingsError, match="needs the original generator"):
        loaded.save(folder, networks="delta")
    done.save(folder, networks="delta")
    assert not (folder / "generator.safetensors").exists()
    again = Inversion.load(folder, base_of(done))
    again.save(folder, networks="delta")  # the base is at hand
    assert lost(done, Inversion.load(folder, base_of(done))) < 0.6


def test_it_is_no_network(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="a clone file, which holds only what a tweak changed"):
        load_network(folder / "clone.safetensors")


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise"])
@pytest.mark.parametrize("name", ["clone.safetensors", "photo.png", "metrics.json"])
def test_a_folder_that_is_not_whole_is_refused(done: Inversion, folder: Path, name: str, damage: str) -> None:
    file = folder / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": b"\xff\x00" * 500}[damage])
    with pytest.raises(CheckpointError) as caught:
        Inversion.load(folder, base_of(done))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "newer than this clone_fast reads"),
        ({"kind": "other"}, "not a clone file"),
        ({"coded": ["nothing"]}, "damaged: 'nothing'"),
        ({"coded": "synthesis.b4.const"}, "lacks an entry"),
        ({"coded": [3]}, "damaged"),
        ({"coded": []}, ""),
        ({"width": 3}, "damaged: codes of"),
        ({"width": None}, "damaged: codes"),
        ({"base": 3}, "lacks an entry"),
    ],
    ids=str,
)
def test_a_damaged_header_is_refused(done: Inversion, folder: Path, change: dict[str, object], message: str) -> None:
    path = folder / "clone.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["clone_fast"]) | change
    save = {"clone_fast": json.dumps(header)}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, metadata=save)
    if not message:  # nothing coded: only what is stored as it is
        assert load_clone(path, base_of(done).generator).noise == {}
        return
    with pytest.raises(CheckpointError, match=message):
        load_clone(path, base_of(done).generator)


@pytest.mark.parametrize("name", ["ws", "codes", "rows.synthesis.b4.const", "exact.synthesis.b4.conv1.bias"])
def test_a_tensor_that_does_not_fit_is_refused(done: Inversion, folder: Path, name: str) -> None:
    path = folder / "clone.safetensors"
    with safetensors.safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = safetensors.torch.load_file(path)
    for value in (torch.ones(3, 5), torch.full_like(tensors[name].float(), torch.nan), None):
        changed = {key: old for key, old in tensors.items() if key != name} | ({} if value is None else {name: value})
        safetensors.torch.save_file(changed, path, metadata=header)
        if value is None and name.startswith("exact."):
            continue  # as if it had not been changed
        with pytest.raises(CheckpointError, match="damaged"):
            load_clone(path, base_of(done).generator)


def test_what_is_not_finite_is_not_written(done: Inversion, tmp_path: Path) -> None:
    made = replace(done, latent=Latent(done.latent.ws * torch.nan, done.latent.noise))
    with pytest.raises(CheckpointError, match="ws is not finite"):
        made.save(tmp_path, networks="delta")
