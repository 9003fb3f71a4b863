"""The main job from a photo to an Inversion: what it accepts, what it returns, how it ends."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast import save_network
from clone_fast.errors import CheckpointError, DivergenceError, PhotoError, SettingsError
from clone_fast.inversion import Inversion
from clone_fast.invert import choose_device
from clone_fast.latent import Latent
from clone_fast.nn import Network
from clone_fast.photo import save_png

PHOTO = tiny.photo()
METRICS = {
    "psnr",
    "ssim",
    "ms_ssim",
    "latent_psnr",
    "latent_ssim",
    "drift_psnr",
    "drift_ssim",
    "drift_frechet",
    "editability",
}


def run(network: Any = None, photo: Any = PHOTO, **changes: Any) -> Inversion:
    return tiny.inverted(network, photo, **changes)


@pytest.fixture(scope="module")
def done() -> Inversion:
    return run()


# ---- what comes out --------------------------------------------------------------------------------------------------


def test_an_inversion_holds_everything(done: Inversion) -> None:
    for image in (done.photo, done.image, done.latent_only):
        assert (image.shape, image.dtype) == ((1, 3, 16, 16), torch.float32)
        assert -1 <= float(image.min()) <= float(image.max()) <= 1
        assert not image.requires_grad
    torch.testing.assert_close(done.photo, PHOTO)
    assert done.original is not None
    with torch.no_grad():
        assert torch.equal(done.image, done.latent.draw(done.generator).clamp(-1, 1))
        assert torch.equal(done.latent_only, Latent(done.latent.ws).draw(done.original).clamp(-1, 1))
    assert not torch.equal(done.image, done.latent_only)
    assert set(done.metrics) == METRICS
    assert done.metrics["psnr"] == pytest.approx(tiny.psnr(done.image, PHOTO), abs=1e-3)
    assert done.metrics["latent_psnr"] == pytest.approx(tiny.psnr(done.latent_only, PHOTO), abs=1e-3)
    assert done.metrics["ms_ssim"] is None  # the image is too small
    assert set(done.seconds) == {"load", "latent", "tweak", "metrics"}
    assert all(value > 0 for value in done.seconds.values())
    assert set(done.directions) == {f"pca{i}" for i in range(1, 9)}
    assert done.settings["stopped"] == "steps"
    assert done.settings["steps"] == 3
    assert done.settings["interrupted"] is False
    assert done.settings["network"] == "tiny0"
    assert done.settings["device"] == "cpu"


def test_the_history_has_a_row_for_each_check_of_each_stage(done: Inversion) -> None:
    assert [(row["stage"], row["step"]) for row in done.history] == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (1, 3)]
    for row in done.history:
        assert {"loss", "psnr"} <= set(row)
        assert all(isinstance(value, float) for value in row.values())
    assert {"recon", "local", "global", "paired", "edit", "loss_d"} <= set(done.history[-1])


def test_progress_hears_of_both_stages() -> None:
    told: list[tuple[str, int, int]] = []
    run(progress=lambda *a: told.append(a[:3]))
    assert told == [("latent", i, 3) for i in (1, 2, 3)] + [("tweak", i, 3) for i in (1, 2, 3)]


def test_the_network_given_is_not_changed() -> None:
    net = tiny.network()
    g, d = tiny.state(net.generator), tiny.state(tiny.judge(net))
    made = run(net)
    tiny.assert_state(net.generator, g)
    tiny.assert_state(tiny.judge(net), d)
    assert net.directions == {}
    assert made.original is net.generator
    assert made.original_discriminator is net.discriminator
    assert made.generator is not net.generator
    assert tiny.changed(made.generator, g)


# ---- what goes in ----------------------------------------------------------------------------------------------------


def test_a_network_a_file_and_a_generator_give_the_same(done: Inversion, tmp_path: Path) -> None:
    net = tiny.network()
    save_network(net, tmp_path / "net.safetensors")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    from_file = run(tmp_path / "net.safetensors")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(from_file.image, done.image)
    assert from_file.settings["network"] == str(tmp_path / "net.safetensors")
    assert torch.equal(run(str(tmp_path / "net.safetensors")).image, done.image)
    alone = run(net.generator, mode="recon")
    assert torch.equal(alone.image, run(net, mode="recon").image)


def test_recon_needs_no_discriminator_and_clone_says_where_to_get_one(tmp_path: Path) -> None:
    net = tiny.network()
    made = run(net.generator, mode="recon")
    assert made.discriminator is made.original_discriminator is None
    assert set(made.metrics) == METRICS - {"drift_frechet"}
    assert made.settings["mode"] == "recon"
    for given in (net.generator, Network(net.generator)):
        with pytest.raises(CheckpointError, match=r"holds no discriminator; give .* or use --mode recon"):
            run(given, mode="clone")
    save_network(Network(net.generator), tmp_path / "alone.safetensors")
    save_network(net, tmp_path / "both.safetensors")
    joined = run(tmp_path / "alone.safetensors", discriminator=tmp_path / "both.safetensors")
    assert torch.equal(joined.image, run(net).image)
    with pytest.raises(SettingsError, match="discriminator"):
        run(net, discriminator=tmp_path / "both.safetensors")


@pytest.mark.parametrize("kind", ["path", "pil", "array", "uint8 tensor", "tensor"])
def test_photos_of_every_kind_are_the_same_target(kind: str, tmp_path: Path) -> None:
    pixels = ((PHOTO[0] + 1) * 127.5).round().to(torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    picture.save(tmp_path / "photo.png")
    given = {
        "path": tmp_path / "photo.png",
        "pil": picture,
        "array": np.asarray(picture),
        "uint8 tensor": pixels,
        "tensor": pixels.float() / 127.5 - 1,
    }[kind]
    made = run(photo=given, latent_steps=0, steps=1, mode="recon")
    torch.testing.assert_close(made.photo, pixels[None].float() / 127.5 - 1)


def test_a_photo_of_another_size_is_cropped_or_padded() -> None:
    wide = torch.cat([PHOTO[0], -PHOTO[0], PHOTO[0]], dim=2)
    quick: dict[str, Any] = {"latent_steps": 0, "steps": 1, "mode": "recon"}
    torch.testing.assert_close(run(photo=wide, **quick).photo, -PHOTO)
    torch.testing.assert_close(run(photo=wide, crop=(32, 0, 16), **quick).photo, PHOTO)
    assert not torch.allclose(run(photo=wide, resize="pad", **quick).photo, -PHOTO, atol=0.1)
    with pytest.raises(PhotoError):
        run(photo=torch.full([3, 16, 16], math.nan))


def test_arguments_take_precedence_over_settings(done: Inversion) -> None:
    assert run().settings["latent"]["steps"] == 3
    made = run(space="w", latent_steps=2, steps=4, mode="recon", target_psnr=90.0)
    assert made.settings["latent"] | {"space": "w", "steps": 2} == made.settings["latent"]
    wanted = {"mode": "recon", "steps": 4, "target_psnr": 90.0, "reconstruction_weight": 10.0}
    assert made.settings["tweak"] | wanted == made.settings["tweak"]
    assert torch.equal(made.latent.ws, made.latent.ws[:, :1].expand(-1, 6, -1))
    assert [row["stage"] for row in made.history].count(1) == made.settings["steps"] == 4
    target = float(made.metrics["latent_psnr"] or 0) - 1
    coarse = run(precision="bf16")
    assert coarse.settings["latent"]["precision"] == coarse.settings["tweak"]["precision"] == "bf16"
    assert coarse.history[0]["loss"] != done.history[0]["loss"] == pytest.approx(coarse.history[0]["loss"], rel=0.05)
    assert run(target_psnr=target).settings["stopped"] == "target"
    again = run(recompute=True)
    assert again.settings["latent"]["recompute"] is again.settings["tweak"]["recompute"] is True
    assert again.history == done.history


def test_a_latent_given_is_where_it_starts() -> None:
    net = tiny.network()
    w = tiny.latent(net, seed=4).ws
    for given in (w[0, 0], w[:, 0], w[0], w, Latent(w), w[0].double(), w.clone().requires_grad_(True)):
        made = run(net, latent=given, latent_steps=0, steps=1)
        assert torch.equal(made.latent.ws, w)
        assert made.latent.ws.dtype == torch.float32
    average = run(net, latent=net.generator.mapping.w_avg, latent_steps=0, steps=1)
    assert torch.equal(average.latent.ws, net.generator.mapping.w_avg.expand(1, 6, 16))
    noisy = tiny.latent(net, noise=True)
    made = run(net, latent=noisy, latent_steps=0, tweak_settings=tiny.settings(noise_lr=0.0))
    assert torch.equal(made.latent.noise["b4.conv1"], noisy.noise["b4.conv1"])
    assert torch.equal(made.latent_only, noisy.draw(net.generator).clamp(-1, 1))
    with pytest.raises(SettingsError, match="latent must be"):
        run(net, latent=torch.zeros(3))


def test_a_conditional_network_takes_the_photos_class() -> None:
    net = tiny.network(c_dim=3)
    made = run(net, label=1)
    assert made.settings["stopped"] == "steps"
    assert not torch.equal(made.image, run(net, label=2).image)


def unreached(*_: Any) -> None:
    raise AssertionError("the search of the latent began")


@pytest.mark.parametrize(
    ("network", "changes", "message"),
    [
        ({"c_dim": 3}, {}, "label"),
        ({"c_dim": 3}, {"label": 3}, r"label must be in \[0, 3\) .* got 3"),
        ({"c_dim": 3}, {"label": -1}, "label must be"),
        ({"c_dim": 3}, {"label": 0, "real_images": PHOTO}, "real images"),
        ({}, {"label": 0}, "no classes"),
        ({}, {"device": "warp"}, "device 'warp' cannot be used"),
        ({}, {"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({}, {"real_images": torch.zeros(2, 3, 8, 8)}, r"real_images must be .*16, 16\], got .*8, 8\]"),
        ({}, {"real_images": torch.zeros(2, 3, 16, 16, dtype=torch.uint8)}, "real_images must be float"),
        ({}, {"tweak_settings": tiny.settings(batch=6)}, "batch must be"),
        ({}, {"mode": "pti"}, "mode must be"),
        ({}, {"space": "z"}, "space must be"),
        ({}, {"steps": 0}, "steps must be"),
        ({}, {"latent_steps": -1}, "steps of the latent must be"),
    ],
)
def test_what_cannot_work_is_told_before_the_search(
    network: dict[str, int], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        run(tiny.network(**network), progress=unreached, **changes)
    assert "\n" not in str(caught.value)


def test_a_device_is_chosen_if_none_is_named() -> None:
    want = "cuda" if torch.cuda.is_available() else "cpu"
    assert choose_device(None).type == choose_device("auto").type == want
    assert choose_device(torch.device("cpu")).type == choose_device("cpu").type == "cpu"


def test_real_images_come_from_a_folder_or_a_tensor(done: Inversion, tmp_path: Path) -> None:
    photos = torch.cat([tiny.photo(seed=i) for i in range(1, 4)])
    for i, image in enumerate(photos):
        save_png(tmp_path / f"{i}.png", image)
    stored = (photos + 1).mul(127.5).round() / 127.5 - 1
    from_folder = run(real_images=tmp_path)
    assert torch.equal(from_folder.image, run(real_images=stored).image)
    assert not torch.equal(from_folder.image, done.image)


def test_a_similarity_of_ones_own_is_what_is_minimised() -> None:
    calls = 0

    def similarity(image: Tensor, photo: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (image - photo).abs().mean()

    run(similarity=similarity)
    assert calls == 3


@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_the_seed_decides_everything_and_torchs_own_generator_nothing(mode: str) -> None:
    made = []
    for seed, disturb in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(disturb)
        before = torch.get_rng_state()
        made.append(run(mode=mode, seed=seed))
        assert torch.equal(torch.get_rng_state(), before)
    first, again, other = made
    assert torch.equal(first.image, again.image)
    assert first.metrics == again.metrics
    assert first.history == again.history
    tiny.assert_state(again.generator, tiny.state(first.generator))
    assert not torch.equal(first.image, other.image)


# ---- how it ends early -----------------------------------------------------------------------------------------------


def ctrl_c(at: tuple[str, int]) -> Callable[..., None]:
    def progress(stage: str, step: int, *_: Any) -> None:
        if (stage, step) == at:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_in_the_search_skips_the_tweak_and_gives_a_result(tmp_path: Path) -> None:
    made = run(progress=ctrl_c(("latent", 2)))
    assert made.settings["interrupted"] is True
    assert made.settings["stopped"] == "interrupted"
    assert made.settings["steps"] == 0
    assert torch.equal(made.image, made.latent_only)
    assert {row["stage"] for row in made.history} == {0}
    assert set(made.metrics) == METRICS
    made.save(tmp_path)
    assert Inversion.load(tmp_path).settings["interrupted"] is True


def test_ctrl_c_in_the_tweak_gives_the_best_so_far() -> None:
    made = run(progress=ctrl_c(("tweak", 3)))
    assert made.settings["interrupted"] is True
    assert made.settings["steps"] == 3
    assert not torch.equal(made.image, made.latent_only)


def test_a_loss_that_is_never_finite_is_an_error() -> None:
    with pytest.raises(DivergenceError):
        run(similarity=lambda image, photo: image.sum() * math.nan)
