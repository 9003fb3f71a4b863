"""`tune`: the tweak of `invert` on modules of other codebases, in place, whole or not at all."""

from __future__ import annotations

import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nvidia_networks
import pytest
import rosinality_networks
import tiny
import torch
from tiny import one_thread  # noqa: F401 (a fixture)
from torch import Tensor, nn

from clone_fast import tune as package_function
from clone_fast.checkpoints import modules, save_rosinality
from clone_fast.errors import CheckpointError, CloneFastError, DivergenceError, PhotoError, SettingsError
from clone_fast.latent import Latent
from clone_fast.nn import Network
from clone_fast.tune import Tuned, tune
from clone_fast.tweak import tweak

PHOTO = tiny.photo()
FAMILIES = ("nvidia", "rosinality")
Pair = tuple[Any, Any]


def nvidias(net: Network, code: Any = nvidia_networks) -> Pair:
    """The network as NVIDIA's modules, in train mode with gradients on, as who trains has them."""
    arch, clamp = net.arch, net.arch.conv_clamp
    resolution, channels = arch.img_resolution, arch.channels
    G = code.Generator(arch.z_dim, arch.c_dim, arch.w_dim, resolution, channels, arch.mapping_layers, clamp)
    D = code.Discriminator(arch.c_dim, resolution, channels, clamp)
    G.load_state_dict(net.generator.state_dict())
    D.load_state_dict(tiny.judge(net).state_dict(), strict=False)  # ours has no low-pass for a block that needs none
    return G, D


@pytest.fixture(scope="module")
def rosinalitys(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Network], Pair]:
    """Likewise as rosinality's, which loads them from the file that we write for it."""

    def make(net: Network) -> Pair:
        file, arch = tmp_path_factory.mktemp("theirs") / "network.pt", net.arch
        with pytest.warns(UserWarning, match="conv_clamp 256 is dropped"):
            save_rosinality(net, file, strict=False)
        content = torch.load(file)
        G = rosinality_networks.Generator(arch.img_resolution, arch.w_dim, arch.mapping_layers, arch.channels)
        D = rosinality_networks.Discriminator(arch.img_resolution, arch.channels)
        G.load_state_dict(content["g_ema"])
        D.load_state_dict(content["d"])
        return G, D

    return make


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest, rosinalitys: Callable[[Network], Pair]) -> Pair:
    """G and D of each family, of the same network."""
    return {"nvidia": nvidias, "rosinality": rosinalitys}[request.param](tiny.network())


def ws_of(net: Network | None = None) -> Tensor:
    return tiny.latent(net or tiny.network()).ws


def drawn(G: Any, ws: Tensor) -> Tensor:
    """As a user of that codebase draws it."""
    with torch.no_grad():
        if hasattr(G, "style"):
            image: Tensor = G([ws], input_is_latent=True, randomize_noise=False)[0]
        else:
            image = G.synthesis(ws, noise_mode="const")
    return image


def run(G: Any, D: Any, *, ws: Any = None, photo: Any = PHOTO, **changes: Any) -> Tuned:
    options = {name: changes.pop(name) for name in ("label", "progress", "similarity", "seed") if name in changes}
    settings = tiny.settings(**changes)
    return tune(G, D, photo, ws_of() if ws is None else ws, tweak_settings=settings, **options)


class Untouched:
    """Of modules: the objects, their order, modes and flags stay; with `assert_same` every number does."""

    def __init__(self, *given: nn.Module) -> None:
        self.modules, self.states = given, [tiny.state(module) for module in given]
        self.before = self.anatomy()

    def anatomy(self) -> list[Any]:
        found: list[Any] = []
        for module in self.modules:
            found += [(name, id(p), p.requires_grad, p.grad, p.is_leaf) for name, p in module.named_parameters()]
            found += [(name, id(b)) for name, b in module.named_buffers()]
            found += [(name, id(part), type(part), part.training) for name, part in module.named_modules()]
        return found

    def changed(self) -> list[set[str]]:
        assert self.anatomy() == self.before
        return [tiny.changed(module, state) for module, state in zip(self.modules, self.states, strict=True)]

    def assert_same(self) -> None:
        assert not any(self.changed())


# ---- what it does --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_their_modules_draw_the_clone_and_are_the_same_objects(pair: Pair, mode: str) -> None:
    G, D = pair
    kept, before = Untouched(G, D), tiny.psnr(drawn(G, ws_of()), PHOTO)
    done = run(G, D, mode=mode, steps=8)
    g, d = kept.changed()
    assert g
    assert not [name for name in g if name.startswith(("mapping", "style")) or name.endswith(("filter", "kernel"))]
    assert bool(d) == (mode == "clone")
    torch.testing.assert_close(drawn(G, ws_of()).clamp(-1, 1), done.image, rtol=0, atol=1e-5)
    assert done.psnr == pytest.approx(tiny.psnr(drawn(G, ws_of()), PHOTO), abs=1e-3)
    assert done.psnr > before + 1
    assert (done.steps, done.stopped, done.slowed) == (8, "steps", 0)
    assert [row["step"] for row in done.history] == list(range(1, 9))
    assert done.history[0]["psnr"] == pytest.approx(before, abs=1e-3)


def test_it_is_the_tweak_of_invert(pair: Pair) -> None:
    """Number for number, though the weights came from modules and went back there."""
    net, s = tiny.network(), tiny.settings(mode="clone")
    G, D = pair
    theirs, judges = modules.counterparts(G, D)
    assert judges is not None
    want = tweak(theirs.ours, judges.ours, Latent(ws_of(net)), PHOTO, s, seed=3)
    run(G, D, mode="clone", seed=3)
    after, after_d = modules.counterparts(G, D)
    assert after_d is not None
    want.latent.settle(want.generator)
    for ours, wanted in ((after.ours, want.generator), (after_d.ours, want.discriminator)):
        assert wanted is not None
        tiny.assert_state(ours, tiny.state(wanted))


def test_without_noise_the_constant_maps_stay(pair: Pair) -> None:
    G, D = pair
    kept = Untouched(G)
    run(G, D, noise_lr=0.0)
    (changed,) = kept.changed()
    assert changed
    assert not [name for name in changed if "noise_const" in name or name.startswith("noises")]


def test_the_mapping_moves_where_it_is_to(pair: Pair) -> None:
    G, D = pair
    kept = Untouched(G)
    run(G, D, tune_mapping=True, cohesion_weight=0.0, adversarial_weight=0.0)
    (changed,) = kept.changed()
    assert [name for name in changed if name.startswith(("mapping.fc", "style."))]
    assert "mapping.w_avg" not in changed


def test_an_optimiser_of_theirs_goes_on(pair: Pair) -> None:
    G, D = pair
    optimiser = torch.optim.SGD(G.parameters(), lr=0.0)
    optimiser_d = torch.optim.SGD(D.parameters(), lr=0.1)
    run(G, D)
    kept, kept_d = Untouched(G), Untouched(D)
    nvidia = hasattr(G, "synthesis")
    image = G.synthesis(ws_of(), noise_mode="const") if nvidia else G([ws_of()], input_is_latent=True)[0]
    (D(image, None) if nvidia else D(image)).sum().backward()
    optimiser.step()
    optimiser_d.step()
    assert not any(tiny.changed(m, s) for m, s in zip(kept.modules, kept.states, strict=True))
    assert tiny.changed(D, kept_d.states[0])


def test_one_family_may_judge_the_other(rosinalitys: Callable[[Network], Pair]) -> None:
    G, (_, D) = nvidias(tiny.network())[0], rosinalitys(tiny.network())
    kept = Untouched(G, D)
    run(G, D)
    assert all(kept.changed())


def test_a_conditional_network_takes_a_label() -> None:
    net = tiny.network(c_dim=3)
    G, D = nvidias(net)
    kept = Untouched(G, D)
    with pytest.raises(SettingsError, match="label"):
        run(G, D, ws=ws_of(net))
    kept.assert_same()
    run(G, D, ws=ws_of(net), label=1)
    assert all(kept.changed())


def test_classes_that_only_a_pickle_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """As NVIDIA's pickles bring them: executed source in a module that has no file; saved whole again, and reloaded."""
    name = "_imported_module_5e1f"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(Path(nvidia_networks.__file__).read_text(), module.__dict__)
    G, D = nvidias(tiny.network(), module)
    done = run(G, D)
    file = io.BytesIO()
    torch.save(G, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert type(again).__module__ == name
    torch.testing.assert_close(drawn(again, ws_of()).clamp(-1, 1), done.image, rtol=0, atol=1e-5)


def test_the_mode_follows_from_the_discriminator() -> None:
    G, D = nvidias(tiny.network())
    kept = Untouched(G, D)
    assert "loss_d" not in package_function(G, None, PHOTO, ws_of(), steps=2).history[0]
    assert "loss_d" in package_function(G, D, PHOTO, ws_of(), steps=2).history[0]
    assert all(kept.changed())
    with pytest.raises(SettingsError, match="needs a discriminator"):
        package_function(G, None, PHOTO, ws_of(), steps=2, mode="clone")


def test_recon_does_not_look_at_the_discriminator() -> None:
    assert run(nvidias(tiny.network())[0], nn.Linear(1, 1), mode="recon").steps == 3


@pytest.mark.parametrize("shape", ["[w_dim]", "[num_ws, w_dim]", "Latent"])
def test_latents_of_every_shape(shape: str) -> None:
    ws = ws_of()
    given = {"[w_dim]": ws[0, 0], "[num_ws, w_dim]": ws[0].requires_grad_(), "Latent": Latent(ws)}[shape]
    images = [run(nvidias(tiny.network())[0], None, ws=one, mode="recon").image for one in (ws, given)]
    assert torch.equal(*images)


@pytest.mark.parametrize(
    "caller", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)]
)
def test_what_the_caller_switched_makes_no_difference(caller: Callable[[], Any]) -> None:
    plain, other, ws = nvidias(tiny.network()), nvidias(tiny.network()), ws_of()
    done = run(*plain, ws=ws)
    with caller():
        under = run(*other, ws=ws)
    assert torch.equal(done.image, under.image)
    for one, two in zip(plain, other, strict=True):
        tiny.assert_state(one, tiny.state(two))


def test_the_callers_random_numbers_stay(pair: Pair) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(*pair)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["clone", "recon"])
def test_on_a_gpu_with_captured_iterations(pair: Pair, mode: str) -> None:
    G, D = (module.cuda() for module in pair)
    kept, ws = Untouched(G, D), ws_of().cuda()
    before = tiny.psnr(drawn(G, ws).cpu(), PHOTO)
    done = run(G, D, ws=ws, photo=PHOTO.cuda(), mode=mode, steps=40, target_psnr=None)
    g, d = kept.changed()
    assert g
    assert bool(d) == (mode == "clone")
    torch.testing.assert_close(drawn(G, ws).clamp(-1, 1), done.image, rtol=0, atol=1e-3)
    assert done.psnr > before + 1


def test_progress_and_target() -> None:
    calls: list[tuple[Any, ...]] = []
    G, _ = nvidias(tiny.network())
    done = tune(G, None, PHOTO, ws_of(), target_psnr=1.0, progress=lambda *row: calls.append(row))
    assert (done.stopped, len(calls)) == ("target", 1)


# ---- whole or not at all -------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_best_so_far(pair: Pair) -> None:
    G, D = pair

    def press(stage: str, step: int, *_: Any) -> None:
        if step == 3:
            raise KeyboardInterrupt

    kept = Untouched(G, D)
    done = run(G, D, steps=8, progress=press)
    assert done.stopped == "interrupted"
    assert all(kept.changed())
    torch.testing.assert_close(drawn(G, ws_of()).clamp(-1, 1), done.image, rtol=0, atol=1e-5)


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError, ValueError])
@pytest.mark.parametrize("where", ["clone_fast.tune.quick_psnr", "clone_fast.tune.write_back", "clone_fast.tune.tweak"])
def test_whatever_is_raised_changes_nothing(
    pair: Pair, where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    patch(monkeypatch, where, fail)
    kept = Untouched(*pair)
    with pytest.raises(error):
        run(*pair)
    kept.assert_same()


def patch(monkeypatch: pytest.MonkeyPatch, where: str, value: Any) -> None:
    """By the module's name in sys.modules: the package's attribute `tune` is the function."""
    module, _, name = where.rpartition(".")
    monkeypatch.setattr(sys.modules[module], name, value)


def test_all_is_written_in_one_call(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    write = torch._foreach_copy_
    theirs = {id(value) for module in pair for value in module.state_dict(keep_vars=True).values()}

    def count(targets: list[Tensor], values: list[Tensor]) -> None:
        if theirs & {id(target) for target in targets}:
            copies.append(len(targets))
        write(targets, values)

    monkeypatch.setattr(torch, "_foreach_copy_", count)
    kept = Untouched(*pair)
    run(*pair)
    assert copies == [sum(map(len, kept.changed()))]


def test_weights_that_are_not_finite_are_not_written(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """In D's very last update, which no check has seen."""

    def broken(*args: Any, **kwargs: Any) -> Any:
        done = tweak(*args, **kwargs)
        with torch.no_grad():
            next(iter(done.discriminator.parameters())).view(-1)[0] = torch.nan
        return done

    patch(monkeypatch, "clone_fast.tune.tweak", broken)
    kept = Untouched(*pair)
    with pytest.raises(DivergenceError, match="nothing was changed"):
        run(*pair)
    kept.assert_same()


# ---- what is not known is left alone -------------------------------------------------------------------------------


def changed_method(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    setattr(owner, name, make(getattr(owner, name)))


VARIANTS: dict[str, tuple[Callable[[Any, Any], Any], str]] = {
    "nvidia draws otherwise": (
        lambda G, D: changed_method(G.synthesis, "forward", lambda f: lambda *a, **k: f(*a, **k).tanh()),
        "G: a variant that is not known: .* draws another image",
    ),
    "nvidia maps otherwise": (
        lambda G, D: changed_method(G.mapping, "forward", lambda f: lambda z, c: f(2 * z + 1, c)),
        "G: a variant that is not known: .* maps z to other w",
    ),
    "nvidia judges otherwise": (
        lambda G, D: changed_method(D, "forward", lambda f: lambda *a, **k: -f(*a, **k)),
        "D: a variant that is not known: .* gives other logits",
    ),
    "nvidia gives several": (
        lambda G, D: changed_method(G.synthesis, "forward", lambda f: lambda *a, **k: (f(*a, **k), None)),
        "G: a variant that is not known: gives tuple instead of",
    ),
    "nvidia is called otherwise": (
        lambda G, D: changed_method(G.synthesis, "forward", lambda f: lambda ws: f(ws)),
        "G: a Generator that cannot be called as others of its family .TypeError",
    ),
    "nvidia has another layer": (lambda G, D: G.synthesis.b8.add_module("extra", nn.Linear(2, 2)), "G: does not fit"),
    "nvidia has another clamp": (lambda G, D: setattr(G.synthesis.b8.conv0, "conv_clamp", 3.0), "different conv_clamp"),
    "nvidia has another activation": (lambda G, D: setattr(D.b8.conv0, "activation", "relu"), "D: b8.conv0 has activ"),
    "nvidia has another low-pass": (lambda G, D: G.synthesis.b8.resample_filter.mul_(2), "low-pass filter other than"),
    "nvidia in half precision": (lambda G, D: G.half(), "G: .* is torch.float16; float32 is wanted: G.float"),
    "rosinality has another epsilon": (
        lambda G, D: [setattr(part, "eps", 0.1) for part in G.modules() if hasattr(part, "eps")],
        "G: a variant that is not known: .* draws another image",
    ),
    "rosinality has no constant noise": (lambda G, D: delattr(G, "noises"), "G: has no constant noise"),
    "rosinality has another layer": (lambda G, D: D.add_module("extra", nn.Linear(2, 2)), "D: does not fit rosinality"),
    "rosinality in double precision": (lambda G, D: D.double(), "D: .* is torch.float64"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_told_and_left_as_it_was(name: str, rosinalitys: Callable[[Network], Pair]) -> None:
    make = {"nvidia": nvidias, "rosinality": rosinalitys}[name.split()[0]]
    G, D = make(tiny.network())
    change, message = VARIANTS[name]
    change(G, D)
    G.synthesis.eval() if hasattr(G, "synthesis") else G.to_rgbs.eval()  # a mode that is mixed comes back so
    kept = Untouched(G, D)
    with pytest.raises(CheckpointError, match=message):
        run(G, D)
    kept.assert_same()


def test_what_is_no_network_of_the_families(rosinalitys: Callable[[Network], Pair]) -> None:
    net = tiny.network()
    G, D = nvidias(net)
    other = nvidias(tiny.network(resolution=8))[1]
    alias_free = nn.Module()
    alias_free.add_module("synthesis", nn.ModuleDict({"input": nn.Linear(2, 2)}))
    with torch.inference_mode():
        frozen = nvidias(net)[0]
    for first, second, message in (
        (nn.Linear(2, 2), D, "G: a Linear, not a StyleGAN2 generator"),
        (G, nn.Linear(2, 2), "D: a Linear, not a StyleGAN2 discriminator"),
        (D, G, "G: a Discriminator, not a StyleGAN2 generator"),
        (alias_free, D, "StyleGAN3"),
        (nn.DataParallel(G), D, r"give the module inside of the DataParallel, G\.module"),
        (G.state_dict(), D, "G: must be a torch.nn.Module, got OrderedDict"),
        (nn.Identity(), D, "G: must be on one device, got none"),
        (frozen, D, "inference_mode"),
        (G, other, "D: does not belong to G: img_resolution 8 instead of 16"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(first, second)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"photo": "nowhere.png"}, PhotoError),
        ({"ws": torch.zeros(3)}, SettingsError),
        ({"ws": "w.pt"}, SettingsError),
        ({"label": 1}, SettingsError),
    ],
)
def test_what_else_cannot_be_used(pair: Pair, changes: dict[str, Any], error: type[CloneFastError]) -> None:
    kept = Untouched(*pair)
    with pytest.raises(error):
        run(*pair, **changes)
    kept.assert_same()
