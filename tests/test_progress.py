"""What both stages share: the ramp of the learning rate, and the record of what was read."""

from __future__ import annotations

import pytest
import tiny
import torch

from clone_fast.progress import Record, quick_psnr, ramp


def test_the_ramp_rises_stays_and_falls() -> None:
    rates = [ramp(step, 100, up=0.05, down=0.3) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:70] == [1.0] * 65
    assert rates[70:] == sorted(rates[70:], reverse=True)
    assert rates[85] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.01
    assert ramp(0, 1, up=0.05, down=0.3) == 1
    assert ramp(50, 100, up=0.0, down=0.0) == 1


def test_quick_psnr_is_that_of_the_clamped_images() -> None:
    photo = tiny.photo()
    image = photo + 0.5 * torch.randn(photo.shape, generator=torch.Generator().manual_seed(1))
    assert float(quick_psnr(image, photo)) == pytest.approx(tiny.psnr(image, photo), abs=1e-4)
    assert float(quick_psnr(photo, photo)) == pytest.approx(106.02, abs=0.01)  # finite, where the error is nothing


@pytest.mark.parametrize(
    ("total", "every", "want"),
    [(10, 4, [1, 4, 8, 10]), (3, 1, [1, 2, 3]), (3, 5, [1, 3]), (1, 5, [1]), (8, 4, [1, 4, 8])],
)
def test_a_record_is_due_at_the_first_the_last_and_every_so_many_steps(total: int, every: int, want: list[int]) -> None:
    record = Record("latent", total, every)
    assert [step for step in range(1, total + 1) if record.due(step)] == want


def test_a_record_keeps_and_tells_what_it_reads() -> None:
    told: list[tuple[str, int, int, float, float]] = []
    record = Record("tweak", 9, 2, lambda *row: told.append(row))
    loss = torch.tensor(2.0, requires_grad=True)
    row = record.add(4, loss, torch.tensor(30.5, dtype=torch.float64), recon=torch.tensor(1.5, dtype=torch.bfloat16))
    assert row == {"step": 4.0, "loss": 2.0, "psnr": 30.5, "recon": 1.5}
    assert record.rows == [row]
    assert told == [("tweak", 4, 9, 2.0, 30.5)]
    assert Record("tweak", 9, 2).add(1, loss, loss)["psnr"] == 2.0
