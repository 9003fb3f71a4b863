"""G's adversarial gradient out of the backward of D's own step, against an independent backward in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
import torch.nn.functional as F
from launches import Launches
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor

from clone_fast.adversary import Adversary, half_of_pairs, in_pairs, nearest_factor
from clone_fast.known import Known, KnownOfEach, known
from clone_fast.nn import Discriminator, Precision
from clone_fast.nn.layers import fast_layout
from clone_fast.settings import TweakSettings
from clone_fast.tweak import Tweak

DOUBLE = Precision("fp64", torch.float64, False)


def adversary_of(settings: TweakSettings, c_dim: int = 0, **shape: Any) -> Adversary:
    """In float64, of a D with random weights that is sure of some images."""
    torch.manual_seed(0)
    judge = Discriminator(replace(tiny.arch(c_dim=c_dim), **shape)).double()
    with torch.no_grad():
        judge.b4.out.weight.mul_(40 if c_dim else 10)
    found = Adversary(judge, settings)
    found.precision = DOUBLE
    return found


def pulls(found: Adversary, *, local: bool = True, c_dim: int = 0, n: int = 4) -> tuple[Tensor, Tensor]:
    """Of G's terms to the images [n, 3, 16, 16]: what `turn` gives, and what a backward through D gives."""
    s, source = found.settings, torch.Generator().manual_seed(1)
    real, images = (torch.randn(n, 3, 16, 16, dtype=torch.float64, generator=source) for _ in range(2))
    label = torch.eye(c_dim, dtype=torch.float64)[torch.arange(n) % c_dim] if c_dim else None
    images.requires_grad_(True)
    logits = found.original(images, label)
    assert logits.max() - logits.min() > 1
    loss = torch.zeros([], dtype=torch.float64)
    form = (lambda x: -F.softplus(x)) if s.saturating else (lambda x: F.softplus(-x))
    if local:
        loss = loss + s.adversarial_weight * form(logits[:1]).mean()
    loss = loss + s.cohesion_weight * form(logits[int(local) :]).mean()
    (want,) = torch.autograd.grad(loss, images)
    _, terms, _ = found.turn(real.split([1, n - 1]), images, label, local, torch.zeros([]), penalised=True)
    total = torch.stack(list(terms.values())).sum()
    torch.testing.assert_close(total, loss, rtol=1e-12, atol=0)
    (got,) = torch.autograd.grad(total, images)
    return got, want


ALONE = {"mbstd_num_channels": 0}
EXACT: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "without deviation": ({}, ALONE, {}),
    "without deviation, without the clone": ({}, ALONE, {"local": False}),
    "without deviation, no local term": ({"adversarial_weight": 0.0}, ALONE, {}),
    "without deviation, no global term": ({"cohesion_weight": 0.0}, ALONE, {}),
    "without deviation, saturating": ({"saturating": True}, ALONE, {}),
    "without deviation, conditional": ({}, ALONE, {"c_dim": 3}),
    "saturating": ({"saturating": True}, {}, {}),
    "saturating, two groups": ({"saturating": True, "batch": 8}, {}, {"n": 8}),
    "saturating, reals and fakes apart": ({"saturating": True}, {"mbstd_group_size": None}, {}),
}


@pytest.mark.parametrize("name", EXACT)
def test_it_is_exact_where_the_players_gradients_are_parallel(name: str) -> None:
    changes, shape, batch = EXACT[name]
    found = adversary_of(tiny.settings(one_pass=True, **changes), c_dim=batch.get("c_dim", 0), **shape)
    got, want = pulls(found, **batch)
    assert want.any()
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * float(want.abs().max()))


@pytest.mark.parametrize("shape", [{}, {"mbstd_group_size": None}], ids=["together", "apart"])
def test_it_is_near_where_the_deviation_joins_the_images(shape: dict[str, Any]) -> None:
    got, want = pulls(adversary_of(tiny.settings(one_pass=True), **shape))
    cosines = F.cosine_similarity(got.flatten(1), want.flatten(1))
    assert cosines.min() > 0.9
    assert cosines.max() < 1 - 1e-9


def test_the_factor_projects() -> None:
    x, y = torch.randn(2, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    x[1], y[2], x[3] = 0, 0, x[3] * 1e-30  # squares of the last are 0 in float32
    factor = nearest_factor(x, y, torch.float32)
    rest = (y - factor * x) * x
    torch.testing.assert_close(rest.double().sum(dim=[1, 2, 3]), torch.zeros(5).double(), rtol=0, atol=1e-5)
    assert factor.flatten()[[1, 2]].eq(0).all()
    assert 1e28 < factor.flatten()[3].abs() < 1e32


def test_a_d_that_is_sure_without_bounds_gives_nothing_that_is_not_finite() -> None:
    found = adversary_of(tiny.settings(one_pass=True))
    with torch.no_grad():
        found.discriminator.b4.out.bias.fill_(-1e4)
    images = torch.randn(4, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    _, terms, _ = found.turn([images.detach()], images, None, True, torch.zeros([]), penalised=False)
    (got,) = torch.autograd.grad(torch.stack(list(terms.values())).sum(), images)
    assert got.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "want"),
    [({}, [8]), ({"one_pass": False}, [8, 4]), ({"precision": "fp16"}, [8, 4]), ({"precision": "bf16"}, [8])],
    ids=str,
)
def test_d_is_run_once_but_in_float16(
    changes: dict[str, Any], want: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, seen, s = tiny.network(), list[int](), tiny.settings(**{"one_pass": True, "r1_gamma": 0.0} | changes)
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), tiny.photo(), s)
    work.step(1)  # with its rehearsal
    forward = Discriminator.forward

    def counted(self: Discriminator, images: Tensor, *args: Any, **more: Any) -> Tensor:
        seen.append(len(images))
        return forward(self, images, *args, **more)

    monkeypatch.setattr(Discriminator, "forward", counted)
    work.step(1)
    assert seen == want


def plain_pairs(real: list[Tensor], fake: Tensor, dtype: torch.dtype) -> Tensor:
    return fast_layout(torch.stack([torch.cat(real), fake], dim=1).flatten(0, 1), dtype)


def random_images(*counts: int, channels: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(n, channels, 6, 10).to(dtype) for n in counts]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("counts", [(4,), (1, 3), (1, 0), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("begun", [False, True])
def test_pairs_are_what_d_would_make_of_a_stack(
    counts: tuple[int, ...], dtype: torch.dtype, channels: int, begun: bool
) -> None:
    *real, fake = random_images(*counts, sum(counts), channels=channels)
    want = plain_pairs(real, fake, dtype)
    got = in_pairs(real, fake, dtype, half_of_pairs(real, dtype) if begun else None)
    assert got.dtype == dtype
    assert got.is_contiguous(memory_format=torch.channels_last)  # with one channel that is more than one stride
    assert torch.equal(got, want)
    assert fast_layout(got, dtype) is got


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_images_get_d_s_gradient_as_they_lie(form: torch.memory_format, dtype: torch.dtype) -> None:
    """Rounded by D alone: it is multiplied in float32, where it is converted, whatever it was in."""
    gradient = torch.randn(8, 3, 6, 10).to(dtype=dtype, memory_format=torch.channels_last)[1::2]
    images = torch.randn(4, 3, 6, 10).to(memory_format=form).requires_grad_(True)
    factor = torch.randn(4, 1, 1, 1)
    (got,) = torch.autograd.grad(KnownOfEach.apply(images, 1, torch.ones([]), gradient, factor)[0], images)
    assert got.dtype == torch.float32
    assert got.stride() == images.stride()
    assert torch.equal(got, gradient.float() * factor)


def test_pairs_lead_to_none_of_them() -> None:
    *real, fake = (images.requires_grad_(True) for images in random_images(2, 2))
    assert not in_pairs(real, fake, torch.float32).requires_grad


def test_what_makes_no_pairs_is_told() -> None:
    *real, fake = random_images(1, 2, 4)
    with pytest.raises(ValueError, match=r"got \[1, 3, 6, 10\], \[2, 3, 6, 10\] for \[4, 3, 6, 10\]"):
        in_pairs(real, fake, torch.float32)
    with pytest.raises(ValueError, match="a real image of its size"):
        in_pairs([fake[:, :1]], fake, torch.float32)


@pytest.mark.parametrize("one_pass", [True, False])
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("used", [(0,), (1,), (0, 1), ()], ids=str)
def test_other_terms_reach_the_images_through_the_parts_of_a_turn(
    used: tuple[int, ...], local: bool, one_pass: bool
) -> None:
    """And what they bring is added to what the turn brings, whose gradient nothing of it changes."""
    n = 4
    real, images, slopes = torch.randn(3, n, 3, 16, 16, dtype=torch.float64)
    images.requires_grad_(True)
    _, terms, parts = adversary_of(tiny.settings(one_pass=one_pass)).turn(
        [real], images, None, local, torch.zeros([]), penalised=False
    )
    total = torch.stack(list(terms.values())).sum()
    (alone,) = torch.autograd.grad(total, images, retain_graph=True)
    pieces, want, more = (images[: int(local)], images[int(local) :]), 3 * alone, 3 * total
    for i, (piece, slope) in enumerate(zip(pieces, slopes.split([int(local), n - local]), strict=True)):
        if i == 1 or local:  # without the local term nobody asks for the first part
            assert torch.equal(parts[i], piece)
        if i in used and (i == 1 or local):
            more = more + (parts[i].sin() * slope).sum() + (parts[i] * slope).sum()
            want = want + F.pad((piece.cos() + 1) * slope, [0] * 7 + [n - 1] if i == 0 else [0] * 6 + [int(local), 0])
    for _ in range(2):  # nothing that a second backward wants is written over
        (got,) = torch.autograd.grad(more, images, retain_graph=True)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    (got,) = torch.autograd.grad(parts[1].sum(), images)  # without the terms
    assert torch.equal(got, F.pad(torch.ones_like(pieces[1]), [0] * 6 + [int(local), 0]))


@pytest.mark.parametrize("edit_weight", [0.0, 3.0])
def test_an_iteration_makes_no_gradient_of_a_slice_of_images(edit_weight: float) -> None:
    net, shape = tiny.network(), (3, 16, 16)
    s = tiny.settings(one_pass=True, precision="bf16", r1_gamma=0.0, edit_weight=edit_weight)
    work = Tweak(net.generator, net.discriminator, tiny.latent(net), tiny.photo(), s)
    work.step(1)
    found: list[str] = []

    class Whole(Launches):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = super().__torch_dispatch__(func, types, args, kwargs)
            if isinstance(made, Tensor) and made.shape[-3:] == shape and len(made) >= s.batch:
                found.append(func._schema.name)
            return made

    with Whole():
        work.step(1)
    assert "aten::empty_strided" in found  # the one gradient of all images, in parts
    assert not {"aten::stack", "aten::slice_backward"} & set(found)
    assert found.count("aten::cat") == (edit_weight > 0)


def test_a_loss_that_is_known_beforehand() -> None:
    """Its value and its gradient, times what it is multiplied by; and nothing of it before that is asked."""
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    mapped = image.sin()
    value, gradient = known(lambda x: x.pow(3).mean(), mapped)
    assert not value.requires_grad
    assert not gradient.requires_grad
    got, want = 2.5 * Known.apply(mapped, value, gradient), 2.5 * mapped.pow(3).mean()
    torch.testing.assert_close(got, want)
    slopes = [torch.autograd.grad(one, image, retain_graph=True)[0] for one in (got, want)]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=0)
